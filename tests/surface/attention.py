# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Ordinary calls of attention, of rotary embedding and of `copy_tokens`, and what each must do, by
plain loops. Sums of many numbers are only near the loops'."""

import operator

import numpy as np
import oracle

from cupy_cache.runtime import formats

from .arrays import FLOATS, Call, bits, fresh, numpy_array, pick
from .calls import (
    dense_numbers,
    layers_of,
    numbers,
    scale_of,
    scale_value,
    sizes_of,
    slots_of,
)

STORED = {"fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "int8": "int8"}


def cache_of(rng, shape, dtype, stored):
    """A cache of this dtype, that holds no NaN."""
    spec = fresh(rng, shape, dtype)
    if stored is not None:
        numpy_array(spec).view(np.uint8)[...] = rng.integers(0, 0x70, spec.shape)
    return spec


def values_of(cache, stored, scale):
    """The numbers [block, offset, head, element] that a cache holds."""
    if stored is None:
        return cache.astype(np.float64)
    found = bits(cache).view(formats.DTYPES[stored].numpy).astype(np.float64)
    return found * np.asarray(scale_value(scale), np.float64).reshape(1, 1, -1, 1)


def a_step(rng, block_size, blocks):
    """Rows of each sequence, or None; lengths; a table; rows in all."""
    sequences, width = int(rng.integers(0, 4)), int(rng.integers(1, 4))
    lengths = rng.integers(0, width * block_size + 1, sequences)
    table = rng.integers(0, blocks, (sequences, width))
    counts = None
    if rng.random() < 0.5:
        counts = rng.integers(0, 3, sequences)
    rows = sequences if counts is None else int(counts.sum())
    return counts, lengths, table, rows


def arguments_of_step(rng, counts, lengths, table, rows, heads, dtype, value_size):
    """The arguments that both attentions have."""
    args = {"block_table": numbers(rng, table), "seq_lens": dense_numbers(rng, lengths)}
    if counts is not None:
        args["query_start_loc"] = dense_numbers(rng, np.concatenate([[0], np.cumsum(counts)]))
    if rng.random() < 0.7:
        args["out"] = fresh(rng, (rows + pick(rng, 0, 1), heads, value_size), dtype)
    if rng.random() < 0.5:
        args["lse"] = fresh(rng, (rows + pick(rng, 0, 1), heads), "float32")
    if rng.random() < 0.3:
        args["causal"] = bool(rng.integers(2))
    return args


def attended(made, a, keys, values, **options):
    """Write what the loops make of a step."""
    window = a.get("sliding_window")
    window = None if window is None else operator.index(window)
    seen, made.faults = oracle.tokens_seen(
        a["block_table"], a["seq_lens"], a.get("query_start_loc"), len(a["query"]), len(keys),
        keys.shape[1], window, bool(a.get("causal", True)),
    )  # fmt: skip
    if not len(a["query"]):  # then there is nothing to look at
        made.faults = ()
    found = oracle.paged_attention(a["query"].astype(np.float64), keys, values, seen, **options)
    for row, (attention, logarithms) in found.items():
        for name, result in (("out", attention), ("lse", logarithms)):
            if name in a:
                a[name][row] = result


def attention(rng):
    blocks, block_size, kv_heads, size, _ = sizes_of(rng)
    heads, value_size = kv_heads * pick(rng, 1, 2, 3), pick(rng, size, 4)
    step = a_step(rng, block_size, blocks)
    dtype, kv = pick(rng, *FLOATS), pick(rng, "auto", "auto", *STORED)
    stored = STORED.get(kv)
    held = dtype if stored is None else pick(rng, stored, "uint8")
    args = {
        "query": fresh(rng, (step[3], heads, size), dtype),
        "key_cache": cache_of(rng, (blocks, block_size, kv_heads, size), held, stored),
        "value_cache": cache_of(rng, (blocks, block_size, kv_heads, value_size), held, stored),
        **arguments_of_step(rng, *step, heads, dtype, value_size),
    }
    if stored is not None:
        args |= {"kv_cache_dtype": kv, "k_scale": scale_of(rng, kv_heads)}
        args |= {"v_scale": scale_of(rng, kv_heads)}
    for name, value in (
        ("alibi_slopes", fresh(rng, (heads,), "float32")),
        ("sinks", fresh(rng, (heads,), pick(rng, "float32", dtype))),
        ("sliding_window", int(rng.integers(1, 9))), ("soft_cap", pick(rng, 1.5, 30.0)),
        ("scale", pick(rng, 0.25, -0.5, 0.0)),
    ):  # fmt: skip
        if rng.random() < 0.25:
            args[name] = value

    def expected(a):
        options = {
            "scale": a.get("scale"), "alibi_slopes": a.get("alibi_slopes"),
            "soft_cap": a.get("soft_cap"), "sinks": a.get("sinks"),
        }  # fmt: skip
        if options["soft_cap"] is not None:
            options["soft_cap"] = float(options["soft_cap"])
        sides = (
            values_of(a[f"{side}_cache"], stored, a.get(f"{side[0]}_scale"))
            for side in ("key", "value")
        )
        attended(made, a, *sides, **options)

    made = Call("paged_attention", args, expected, ("out", "lse"))
    made.near, made.free = ("out", "lse"), ("scale",)
    return made


def latent(rng):
    blocks, block_size, _, _, _ = sizes_of(rng)
    heads, size, rank = pick(rng, 1, 2, 5), pick(rng, 8, 12), pick(rng, 4, 7)
    step = a_step(rng, block_size, blocks)
    dtype, kv = pick(rng, *FLOATS), pick(rng, "auto", "auto", *STORED)
    stored = STORED.get(kv)
    held = dtype if stored is None else pick(rng, stored, "uint8")
    args = {
        "query": fresh(rng, (step[3], heads, size), dtype),
        "kv_cache": cache_of(rng, (blocks, block_size, size), held, stored),
        **arguments_of_step(rng, *step, heads, dtype, rank),
        "scale": pick(rng, 0.25, -0.5, 0.0), "kv_lora_rank": rank,
    }  # fmt: skip
    if stored is not None:
        args |= {"kv_cache_dtype": kv, "kv_scale": scale_of(rng)}

    def expected(a):
        keys = values_of(a["kv_cache"][:, :, np.newaxis], stored, a.get("kv_scale"))
        attended(made, a, keys, keys[..., : int(a["kv_lora_rank"])], scale=a["scale"])

    made = Call("paged_attention_mla", args, expected, ("out", "lse"))
    made.near, made.free = ("out", "lse"), ("scale",)
    return made


def merging(rng):
    tokens, heads, size = int(rng.integers(0, 4)), pick(rng, 1, 3), pick(rng, 1, 4, 8)
    dtype = pick(rng, *FLOATS)
    args = {"output": fresh(rng, (tokens, heads, size), dtype)}
    for side in ("prefix", "suffix"):
        spare = pick(rng, 0, 0, 2)
        args[f"{side}_output"] = fresh(rng, (tokens + spare, heads, size), dtype)
        args[f"{side}_lse"] = fresh(rng, (heads, tokens + spare), "float32")
        view = numpy_array(args[f"{side}_lse"])
        view[rng.random(view.shape) < 0.2] = pick(rng, -np.inf, np.inf)
    if rng.random() < 0.5:
        args["output_lse"] = fresh(rng, (heads, tokens + pick(rng, 0, 1)), "float32")

    def expected(a):
        oracle.merge_attn_states(**a)

    made = Call("merge_attn_states", args, expected, ("output", "output_lse"))
    made.near = ("output", "output_lse")
    return made


# --- rotary embedding: small numbers and quarters of a turn are exact


def small(rng, *shape, dtype):
    return fresh(rng, shape, dtype, values=rng.integers(1, 99, shape))


def quarters(rng, size, dtype):
    """A table of angles that are quarters of a turn."""
    turns = rng.integers(0, 4, (7, size // 2))
    both = np.array([[1, 0, -1, 0], [0, 1, 0, -1]], np.float32)[:, turns]
    return fresh(rng, (7, size), dtype, values=np.concatenate([*both], axis=1))


def heads_of(row, size):
    """A token's heads [head, element], of either form of rows."""
    return row.reshape(-1, size) if row.ndim == 1 else row


def turn(made, a, rows, size, is_neox, offset=0, sign=1):
    """Turn ``rows`` [token, …] where they are; which tokens' positions are in the table."""
    table, positions, good = a["cos_sin_cache"], a["positions"], []
    for token, position in enumerate(positions.tolist()):
        good.append(0 <= position < len(table))
        if not good[-1]:
            made.faults = True
            continue
        for part in rows:
            if token >= len(part):
                continue
            for row in heads_of(part[token], size):
                pairs = [(float(x), float(x)) for x in row]
                turned = oracle.turned(pairs, table, [position], is_neox, offset, sign=sign)
                row[...] = [(low + high) / 2 for low, high in turned]
    return good


def positions_of(rng, tokens):
    return numbers(rng, rng.integers(0, 7, tokens))


def rotating(rng):
    tokens, size, dtype = int(rng.integers(0, 4)), pick(rng, 4, 8), pick(rng, *FLOATS)
    rotary = pick(rng, 2, size)
    offset = pick(rng, 0, size - rotary)
    args = {
        "positions": positions_of(rng, tokens),
        "query": small(rng, tokens + pick(rng, 0, 1), pick(rng, 1, 3), size, dtype=dtype),
        "key": small(rng, tokens + pick(rng, 0, 1), 2, size, dtype=dtype),
        "head_size": size, "cos_sin_cache": quarters(rng, rotary, pick(rng, "float32", dtype)),
        "is_neox": bool(rng.integers(2)), "rope_dim_offset": offset,
        "inverse": bool(rng.integers(2)),
    }  # fmt: skip

    def expected(a):
        sign = -1 if a["inverse"] else 1
        rows = a["query"], a["key"]
        turn(made, a, rows, int(a["head_size"]), a["is_neox"], int(a["rope_dim_offset"]), sign)

    made = Call("rotary_embedding", args, expected, ("query", "key"))
    made.near = ("query", "key")
    return made


def rotated_and_written(rng):
    blocks, block_size, kv_heads, size, tokens = sizes_of(rng)
    value_size, dtype = pick(rng, size, 4), pick(rng, *FLOATS)
    size = max(size, 4)
    tokens = min(tokens, blocks * block_size)
    args = {
        "positions": positions_of(rng, tokens),
        "query": small(rng, tokens, 2 * kv_heads, size, dtype=dtype),
        "key": small(rng, tokens, kv_heads, size, dtype=dtype),
        "value": fresh(rng, (tokens, kv_heads, value_size), dtype),
        "cos_sin_cache": quarters(rng, size, pick(rng, "float32", dtype)),
        "key_cache": fresh(rng, (blocks, block_size, kv_heads, size), dtype),
        "value_cache": fresh(rng, (blocks, block_size, kv_heads, value_size), dtype),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * block_size)),
        "is_neox": bool(rng.integers(2)),
    }

    def expected(a):
        size, slots = a["key_cache"].shape[3], a["slot_mapping"].copy()
        key = a["key"].copy()
        good = turn(made, a, (a["query"], key), size, a["is_neox"])
        slots[[not one for one in good[: len(slots)]]] = -1
        key, value = (
            rows.reshape(len(rows), *cache.shape[2:])
            for rows, cache in ((key, a["key_cache"]), (a["value"], a["value_cache"]))
        )
        oracle.reshape_and_cache_flash(
            bits(key), bits(value), bits(a["key_cache"]), bits(a["value_cache"]), slots
        )

    made = Call("rotary_and_cache", args, expected, ("query", "key_cache", "value_cache"))
    made.near = ("query", "key_cache")
    return made


def rotated_entries(rng):
    blocks, block_size, heads, size, tokens = sizes_of(rng)
    size, latent_size, dtype = max(size, 4), pick(rng, 4, 8), pick(rng, *FLOATS)
    tokens = min(tokens, blocks * block_size)
    args = {
        "positions": positions_of(rng, tokens),
        "q_pe": small(rng, tokens, heads, size, dtype=dtype),
        "k_pe": small(rng, tokens, size, dtype=dtype),
        "kv_c": fresh(rng, (tokens, latent_size), dtype),
        "cos_sin_cache": quarters(rng, size, pick(rng, "float32", dtype)),
        "is_neox": bool(rng.integers(2)),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * block_size)),
        "kv_cache": fresh(rng, (blocks, block_size, latent_size + size), dtype),
    }

    def expected(a):
        slots, size = a["slot_mapping"].copy(), a["k_pe"].shape[-1]
        good = turn(made, a, (a["q_pe"], a["k_pe"]), size, a["is_neox"])
        slots[[not one for one in good[: len(slots)]]] = -1
        oracle.concat_and_cache_mla(bits(a["kv_c"]), bits(a["k_pe"]), bits(a["kv_cache"]), slots)

    made = Call("concat_and_cache_mla_rope_fused", args, expected, ("q_pe", "k_pe", "kv_cache"))
    made.near = ("q_pe", "k_pe", "kv_cache")
    return made


def tokens_copied(rng):
    blocks, block_size, heads, size, _ = sizes_of(rng)
    inner = pick(rng, (size,), (heads, size))
    shape, dtype = (blocks, block_size, *inner), pick(rng, *FLOATS, "uint8", "int64")
    slots = rng.permutation(blocks * block_size)
    count = int(rng.integers(0, len(slots) // 2 + 1))
    pairs = np.stack([slots[:count], slots[count : 2 * count]], axis=1).reshape(-1, 2)
    pairs[rng.random(pairs.shape) < 0.1] = -1
    caches = layers_of(rng, shape, dtype, int(rng.integers(1, 4)))
    if rng.random() < 0.5:
        caches = list(zip(caches, layers_of(rng, shape, dtype, len(caches))))
    args = {"caches": caches, "pairs": numbers(rng, pairs)}

    def expected(a):
        flat = [x for one in a["caches"] for x in (one if isinstance(one, tuple) else (one,))]
        oracle.copy_tokens([bits(cache) for cache in flat], np.asarray(a["pairs"]).tolist())

    return Call("copy_tokens", args, expected, ("caches",), ("pairs",))


MAKERS = (
    attention, attention, latent, merging, rotating, rotated_and_written, rotated_entries,
    tokens_copied,
)  # fmt: skip
