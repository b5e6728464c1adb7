# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Attention under the names, and with the order of arguments, of vLLM's first kernels (0.11). What
0.33 has is in `cupy_cache.integrations.vllm`."""

from __future__ import annotations

from . import errors
from .attention import paged_attention
from .runtime import arrays, contract
from .types import ArrayLike, Scale, StreamLike


def paged_attention_v1(
    out: ArrayLike,
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    num_kv_heads: int,
    scale: float,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: ArrayLike | None,
    kv_cache_dtype: str,
    k_scale: Scale,
    v_scale: Scale,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
    *,
    stream: StreamLike | None = None,
) -> None:
    """`paged_attention` for one query of each sequence, as vLLM's function of this name is called.

    Parameters
    ----------
    out, query, key_cache, value_cache, scale, seq_lens, alibi_slopes, kv_cache_dtype, stream
        As for `paged_attention`; caches of every layout that it takes.
    block_tables
        Its ``block_table``.
    k_scale, v_scale
        As there.
    num_kv_heads, block_size : int
        Those of the caches.
    max_seq_len, tp_rank : ignored
        There is no list of sizes, and no limit to lengths.
    blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size, \
blocksparse_head_sliding_step : int
        Sparse attention is not done here: their defaults.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.
    """
    del max_seq_len, tp_rank
    sparse = (
        blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size,
        blocksparse_head_sliding_step,
    )  # fmt: skip
    _attend(
        "paged_attention_v1", out, query, key_cache, value_cache, num_kv_heads, scale,
        block_tables, seq_lens, block_size, alibi_slopes, kv_cache_dtype, k_scale, v_scale, sparse,
        stream,
    )  # fmt: skip


def paged_attention_v2(
    out: ArrayLike,
    exp_sum: object,
    max_logits: object,
    tmp_out: object,
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    num_kv_heads: int,
    scale: float,
    block_tables: ArrayLike,
    seq_lens: ArrayLike,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: ArrayLike | None,
    kv_cache_dtype: str,
    k_scale: Scale,
    v_scale: Scale,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
    *,
    stream: StreamLike | None = None,
) -> None:
    """`paged_attention_v1`, with the scratch arrays of vLLM's function of this name.

    Parameters
    ----------
    exp_sum, max_logits, tmp_out : ignored
        Nothing is written there.
    out, query, key_cache, value_cache, num_kv_heads, scale, block_tables, seq_lens, block_size, \
max_seq_len, alibi_slopes, kv_cache_dtype, k_scale, v_scale, tp_rank, blocksparse_local_blocks, \
blocksparse_vert_stride, blocksparse_block_size, blocksparse_head_sliding_step, stream
        As for `paged_attention_v1`.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.
    """
    del exp_sum, max_logits, tmp_out, max_seq_len, tp_rank
    sparse = (
        blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size,
        blocksparse_head_sliding_step,
    )  # fmt: skip
    _attend(
        "paged_attention_v2", out, query, key_cache, value_cache, num_kv_heads, scale,
        block_tables, seq_lens, block_size, alibi_slopes, kv_cache_dtype, k_scale, v_scale, sparse,
        stream,
    )  # fmt: skip


def _attend(
    op, out, query, key_cache, value_cache, num_kv_heads, scale, block_tables, seq_lens, block_size,
    alibi_slopes, kv_cache_dtype, k_scale, v_scale, sparse, stream,
):  # fmt: skip
    names = "the blocksparse arguments", "num_kv_heads", "block_size"
    sparse = tuple(contract.integer(op, names[0], number) for number in sparse)
    wanted = [contract.integer(op, *pair) for pair in zip(names[1:], (num_kv_heads, block_size))]
    if sparse != (0, 0, 64, 0):
        expected = "their defaults, since sparse attention is not done here"
        raise errors.wrong("value", f"{op}: the blocksparse arguments", expected, sparse)
    if out is None:
        raise errors.wrong("value", f"{op}: out", "an array", "None")
    shape = arrays.view(key_cache, f"{op}: key_cache").shape
    if len(shape) in (4, 5):
        places = (1, 3) if len(shape) == 5 else (2, 1)
        sizes = [shape[place] for place in places]
        if sizes != wanted:
            expected = f"num_kv_heads = {wanted[0]} and block_size = {wanted[1]}"
            raise errors.wrong("shape", f"{op}: key_cache", expected, f"{sizes[0]} and {sizes[1]}")
    with errors.renamed(op, {"block_table": "block_tables"}):
        paged_attention.paged_attention(
            query, key_cache, value_cache, block_tables, seq_lens, scale=scale,
            alibi_slopes=alibi_slopes, kv_cache_dtype=kv_cache_dtype, k_scale=k_scale,
            v_scale=v_scale, out=out, stream=stream,
        )  # fmt: skip
