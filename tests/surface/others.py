# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Calls of what stands around the operations: methods of objects, and names that others gave. One
or two arguments are others than they should be; what must come then is a named error, with nothing
written, or the call's end. Whether bytes are right is for the tests of each."""

import numpy as np

import cupy_cache as cc
from cupy_cache.integrations import vllm

from .arrays import pick
from .changes import Broken, Index

try:
    import torch
except ImportError:
    torch = None

SIZES = {"max_sequences": 3, "max_tokens": 9, "max_length": 9}
VALUES = (
    None, 0, 1, -1, 2, 7, 2**63, 2**64, True, False, 0.0, 1.0, -1.5, 1e-60, 1e300, "auto",
    "fp8", "", b"a", [], [1], (1, 2), {}, np.int64(2), np.float32(0.5), np.bool_(True), np.array(2),
    np.array([1, 2]), object(), int, 1j, range(3), float("nan"), float("inf"),
)  # fmt: skip


def _tables(call):
    """A function of its keywords alone: ``call`` on new tables, with a sequence "a"."""

    def run(**named):
        tables = cc.BlockTables(9, 2, **SIZES)
        tables.add("a", [1, 2])
        call(tables, **named)

    return run


def calls(rng, array):
    """{name: (function, its arguments, further arrays that it may write)}; ``array`` makes one of
    numbers."""

    def floats(*shape):
        return array(rng.standard_normal(shape).astype(np.float32))

    def numbers(values):
        return array(np.array(values, np.int32))

    pair, entries = (
        cc.PagedKVCache([floats(4, 4, 2, 8)], [floats(4, 4, 2, 8)]),
        cc.PagedKVCache([floats(4, 4, 10)]),
    )
    caches = pair.key_caches + pair.value_caches
    query, table, lengths = floats(2, 4, 8), numbers([[0, 1], [2, 3]]), numbers([3, 5])
    step = {"query": query, "block_table": table, "seq_lens": lengths}
    packed = {"key_cache": floats(4, 2, 2, 4, 4), "value_cache": floats(4, 2, 8, 4)}
    sized = {
        "num_kv_heads": 2, "scale": 0.3, "block_tables": table, "seq_lens": lengths,
        "block_size": 4, "max_seq_len": 8, "alibi_slopes": floats(4), "kv_cache_dtype": "auto",
        "k_scale": None, "v_scale": None,
    }  # fmt: skip
    written = floats(2, 4, 8)
    return {
        "flash_attn_with_kvcache": (cc.flash_attn.flash_attn_with_kvcache, {
            "q": floats(2, 1, 4, 8), "k_cache": caches[0], "v_cache": caches[1],
            "k": floats(2, 1, 2, 8), "v": floats(2, 1, 2, 8), "cache_seqlens": lengths,
            "block_table": table, "softmax_scale": 0.3, "causal": True, "window_size": (-1, -1),
            "softcap": 0.0, "alibi_slopes": floats(4), "return_softmax_lse": True,
            "cache_batch_idx": None, "rotary_cos": None,
        }),
        "flash_attn_varlen_func": (cc.flash_attn.flash_attn_varlen_func, {
            "q": floats(3, 4, 8), "k": caches[0], "v": caches[1],
            "cu_seqlens_q": numbers([0, 1, 3]), "cu_seqlens_k": numbers([0, 3, 8]),
            "max_seqlen_q": 2, "max_seqlen_k": 5, "block_table": table, "dropout_p": 0.0,
            "causal": False, "window_size": (-1, 0), "return_attn_probs": True,
        }),
        "paged_attention_v1": (
            cc.paged_attention_v1, {"out": written, "query": query, **packed, **sized}
        ),
        "paged_attention_v2": (cc.paged_attention_v2, {
            "out": written, "exp_sum": None, "max_logits": None, "tmp_out": None, "query": query,
            **packed, **sized,
        }),
        "attend": (pair.attend, {
            "layer": 0, **step, "query_start_loc": numbers([0, 1, 2]), "scale": 0.3,
            "alibi_slopes": floats(4), "sinks": floats(4), "soft_cap": None, "causal": True,
            "sliding_window": None, "out": written, "lse": floats(2, 4), "stream": None,
        }),
        "attend_mla": (entries.attend_mla, {
            "layer": 0, **step, "query": floats(2, 3, 10), "scale": 0.2, "kv_lora_rank": 6,
            "out": floats(2, 3, 6), "lse": floats(2, 3), "causal": True, "stream": None,
        }),
        "gather": (pair.gather, {
            "layer": 0, "block_table": table, "cu_seq_lens": numbers([0, 3, 8]), "num_tokens": 8,
            "seq_starts": None, "dtype": None, "out": None, "stream": None,
        }),
        "rotary_write": (pair.rotary_write, {
            "layer": 0, "positions": numbers([0, 1]), "query": query, "key": floats(2, 2, 8),
            "value": floats(2, 2, 8), "cos_sin_cache": floats(9, 8),
            "slot_mapping": numbers([0, 5]), "is_neox": True, "rope_dim_offset": 0,
            "mrope_section": None, "norm_eps": 1e-5, "q_norm_weight": floats(8),
            "norm_weight_bias": 0.0, "out": written, "out_dtype": "auto", "q_scale": None,
            "rounding": "once", "stream": None,
        }),
        "merge_attn_states": (vllm.merge_attn_states, {
            "output": written, "prefix_output": query, "prefix_lse": floats(4, 2),
            "suffix_output": floats(2, 4, 8), "suffix_lse": floats(4, 2),
            "output_lse": floats(4, 2), "prefill_tokens_with_context": 1, "output_scale": None,
        }),
        "BlockTables.step": (
            _tables(lambda t, sequences, counts, **more: t.step(sequences, counts, **more)),
            {"sequences": ["a"], "counts": [2], "num_sequences": 3, "num_tokens": 5},
        ),
        "BlockTables.append": (
            _tables(lambda t, sequence, tokens: t.append(sequence, tokens)),
            {"sequence": "a", "tokens": [1, 2]},
        ),
        "BlockTables.fork": (
            _tables(lambda t, parent, child: t.fork(parent, child)), {"parent": "a", "child": "b"}
        ),
        "BlockTables": (cc.BlockTables, {
            "num_blocks": 4, "block_size": 2, **SIZES, "reuse_prefixes": True, "framework": None,
            "device": "cpu",
        }),
    }, caches + entries.key_caches  # fmt: skip


def changed(rng, value):
    """Another value; of an array often one that is nearly the same."""
    is_tensor = torch is not None and isinstance(value, torch.Tensor)
    if not (is_tensor or isinstance(value, np.ndarray)) or rng.random() < 0.3:
        return pick(rng, *VALUES, Index(2), Broken())
    plain = value.numpy() if is_tensor else value
    ways = [
        lambda: value[:0], lambda: value[..., :-1], lambda: value[None], lambda: value.reshape(-1),
        lambda: plain.astype(np.float64), lambda: plain.astype(plain.dtype.newbyteorder()),
        lambda: plain.astype(np.int16), plain.tolist,
        lambda: np.broadcast_to(plain[:1], plain.shape), lambda: np.ma.masked_array(plain),
        lambda: memoryview(plain), lambda: plain.astype(object),
    ]  # fmt: skip
    if torch is not None:
        known = torch.from_numpy(plain)
        ways += [
            lambda: known, lambda: known.to("meta"), known.to_sparse,
            lambda: torch.nested.nested_tensor(list(known.reshape(len(known), -1))),
        ]  # fmt: skip
    return pick(rng, *ways)()
