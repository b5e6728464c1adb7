# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Ordinary calls of every public function, and what each must do, by plain loops."""

import functools

import ml_dtypes
import numpy as np
import oracle
import worlds

import cupy_cache as cc
from cupy_cache.runtime import formats

from .arrays import DTYPES, FLOATS, Call, bits, fresh, numpy_array, pick


def numbers(rng, values):
    """Indices of either type."""
    return fresh(rng, np.shape(values), pick(rng, "int32", "int64"), values=values)


def dense_numbers(rng, values):
    dtype = pick(rng, "int32", "int64")
    return fresh(rng, np.shape(values), dtype, dense=True, values=values)


def slots_of(rng, tokens, limit):
    """Distinct slots, some of them padding."""
    slots = rng.permutation(limit)[:tokens]
    slots[rng.random(len(slots)) < 0.2] = -int(rng.integers(1, 99))
    return slots


def sizes_of(rng):
    """Blocks, slots of one, heads, head size, tokens."""
    blocks, block_size = int(rng.integers(1, 5)), pick(rng, 1, 2, 4, 8)
    return blocks, block_size, pick(rng, 1, 2, 3), pick(rng, 1, 4, 8), int(rng.integers(0, 4))


def cache_dtypes(rng, formats_of=oracle.STORED):
    """(kv_cache_dtype, dtype of sources, of caches, what is stored)."""
    name = pick(rng, "auto", "auto", pick(rng, *formats_of))
    if name == "auto":
        dtype = pick(rng, *FLOATS, "int16", "float64")
        return name, dtype, dtype, None
    stored = formats_of[name]
    return name, pick(rng, *FLOATS), pick(rng, stored, "uint8"), stored


def scale_of(rng, heads=1):
    """A scale, as it is given."""
    values = (0.25 * rng.integers(1, 9, heads)).astype(np.float32)
    kind = pick(rng, "float", "array", "heads", "none", "0d")
    if kind == "none":
        return None
    if kind == "float":
        return float(values[0])
    if kind == "0d":
        return fresh(rng, (), "float32", values=values[0])
    return fresh(rng, (heads if kind == "heads" else 1,), "float32", True,
                 values if kind == "heads" else values[:1])  # fmt: skip


def scale_value(scale):
    return 1.0 if scale is None else np.asarray(scale, np.float32)


def flash(rng):
    blocks, block_size, heads, size, tokens = sizes_of(rng)
    name, source, dtype, stored = cache_dtypes(rng)
    other = pick(rng, size, size, 2 * size)
    args = {
        "key": fresh(rng, (tokens + pick(rng, 0, 0, 2), heads, size), source),
        "value": fresh(rng, (tokens, heads, other), source),
        "key_cache": fresh(rng, (blocks, block_size, heads, size), dtype),
        "value_cache": fresh(rng, (blocks, block_size, heads, other), dtype),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * block_size)),
        "kv_cache_dtype": name,
    }
    if stored is not None:
        args |= {"k_scale": scale_of(rng, heads), "v_scale": scale_of(rng, heads)}

    def expected(a):
        moved = [a[n] for n in ("key", "value")]
        caches = [bits(a[n]) for n in ("key_cache", "value_cache")]
        if stored is None or moved[0].itemsize == 1:
            oracle.reshape_and_cache_flash(*map(bits, moved), *caches, a["slot_mapping"])
        else:
            scales = scale_value(a.get("k_scale")), scale_value(a.get("v_scale"))
            oracle.reshape_and_cache_flash(*moved, *caches, a["slot_mapping"], *scales, stored)

    return Call("reshape_and_cache_flash", args, expected, ("key_cache", "value_cache"))


def x_packed(rng):
    blocks, block_size, heads, _, tokens = sizes_of(rng)
    name, source, dtype, stored = cache_dtypes(rng)
    x = pick(rng, 2, 4)
    packs, interleaved = pick(rng, 1, 2), block_size % x == 0 and rng.random() < 0.4
    values = (blocks, heads, packs * x, block_size)
    if interleaved:
        values = (blocks, heads, block_size // x, packs * x, x)
    args = {
        "key": fresh(rng, (tokens, heads, packs * x), source),
        "value": fresh(rng, (tokens, heads, packs * x), source),
        "key_cache": fresh(rng, (blocks, heads, packs, block_size, x), dtype),
        "value_cache": fresh(rng, values, dtype),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * block_size)),
        "kv_cache_dtype": name,
    }
    if stored is not None:
        args |= {"k_scale": scale_of(rng, heads), "v_scale": scale_of(rng, heads)}
    args["interleaved_v"] = bool(interleaved)

    def expected(a):
        moved = [a[n] for n in ("key", "value")]
        caches = [bits(a[n]) for n in ("key_cache", "value_cache")]
        if stored is None or moved[0].itemsize == 1:
            oracle.reshape_and_cache(*map(bits, moved), *caches, a["slot_mapping"])
        else:
            scales = scale_value(a.get("k_scale")), scale_value(a.get("v_scale"))
            oracle.reshape_and_cache(*moved, *caches, a["slot_mapping"], *scales, stored)

    return Call("reshape_and_cache", args, expected, ("key_cache", "value_cache"))


def per_token_head(rng):
    blocks, block_size, heads, size, tokens = sizes_of(rng)
    name, stored = pick(rng, ("int8", "int8"), ("fp8", "float8_e4m3fn"))
    dtype, source = pick(rng, stored, "uint8"), pick(rng, *FLOATS)
    block = blocks, block_size, heads
    args = {
        "key": fresh(rng, (tokens, heads, size), source),
        "value": fresh(rng, (tokens, heads, size), source),
        "key_cache": fresh(rng, (*block, size), dtype),
        "value_cache": fresh(rng, (*block, size), dtype),
        "k_scale_cache": fresh(rng, block, "float32"),
        "v_scale_cache": fresh(rng, block, "float32"),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * block_size)),
        "kv_cache_dtype": name,
    }

    def expected(a):
        key, value, key_cache, value_cache, *others, _ = a.values()
        oracle.reshape_and_cache_flash_per_token_head(
            key, value, bits(key_cache), bits(value_cache), *others, stored
        )

    written = ("key_cache", "value_cache", "k_scale_cache", "v_scale_cache")
    return Call("reshape_and_cache_flash_per_token_head", args, expected, written)


def mla(rng):
    blocks, block_size, _, size, tokens = sizes_of(rng)
    name, source, dtype, stored = cache_dtypes(rng)
    source, dtype = (pick(rng, *FLOATS),) * 2 if stored is None else (source, dtype)
    rope = pick(rng, 0, 1, 4)
    args = {
        "kv_c": fresh(rng, (tokens, size), source),
        "k_pe": fresh(rng, (tokens, rope), source),
        "kv_cache": fresh(rng, (blocks, block_size, size + rope), dtype),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * block_size)),
        "kv_cache_dtype": name,
    }
    if stored is not None:
        args |= {"scale": scale_of(rng), "skip_scale": bool(rng.random() < 0.2)}

    def expected(a):
        scale = 1.0 if a.get("skip_scale") else scale_value(a.get("scale"))
        moved = [a["kv_c"], a["k_pe"]]
        moved = [bits(m) for m in moved] if stored is None else moved
        scale = np.asarray(scale, np.float32).reshape(-1)[0]
        made.faults = oracle.concat_and_cache_mla(
            *moved, bits(a["kv_cache"]), a["slot_mapping"], scale, stored
        )

    made = Call("concat_and_cache_mla", args, expected, ("kv_cache",))
    return made


def fp8_ds_mla(rng):
    blocks, tokens = int(rng.integers(1, 3)), int(rng.integers(0, 2))
    source, rope = pick(rng, "float16", "bfloat16"), pick(rng, 0, 64)
    args = {
        "kv_c": fresh(rng, (tokens, 512), source),
        "k_pe": fresh(rng, (tokens, rope), source),
        "kv_cache": fresh(rng, (blocks, 2, 656), "uint8"),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * 2)),
        "kv_cache_dtype": "fp8_ds_mla",
        "scale_rule": pick(rng, "amax", "power_of_two"),
    }

    def expected(a):
        made.faults = oracle.concat_and_cache_fp8_ds_mla(
            a["kv_c"], a["k_pe"], bits(a["kv_cache"]), a["slot_mapping"], a["scale_rule"]
        )

    made = Call("concat_and_cache_mla", args, expected, ("kv_cache",))
    return made


def grouped(rng):
    blocks, block_size, _, size, tokens = sizes_of(rng)
    tokens = min(tokens, blocks * block_size)
    layers, dtype, rope = pick(rng, 1, 2, 3), pick(rng, *FLOATS), pick(rng, 0, 2)
    fp8 = rng.random() < 0.4
    cache = fresh(rng, (blocks, block_size, size + rope), "uint8" if fp8 else dtype)
    caches = [cache, *(_like(rng, cache) for _ in range(layers - 1))]
    slots = [slots_of(rng, tokens, blocks * block_size) for _ in range(layers)]
    args = {
        "kv_c": fresh(rng, (layers, tokens, size), dtype),
        "k_pe": fresh(rng, (layers, tokens, rope), dtype),
        "kv_cache_ptrs": caches,
        "slot_mapping": numbers(rng, np.reshape(slots, (layers, tokens))),
        "block_size": pick(rng, None, block_size),
    }
    if fp8:
        scales = (0.5 * rng.integers(1, 5, layers)).astype(np.float32)
        args |= {"kv_scales": fresh(rng, (layers,), "float32", True, scales)}
        args |= {"kv_cache_dtype": "fp8"}

    def expected(a):
        made.faults = []
        for layer, cache in enumerate(a["kv_cache_ptrs"]):
            moved = [a["kv_c"][layer], a["k_pe"][layer]]
            moved = moved if fp8 else [bits(m) for m in moved]
            scale = a["kv_scales"][layer] if fp8 else 1.0
            made.faults += oracle.concat_and_cache_mla(
                *moved, bits(cache), a["slot_mapping"][layer][: len(moved[0])], scale,
                "float8_e4m3fn" if fp8 else None,
            )  # fmt: skip

    made = Call("concat_and_cache_mla_grouped", args, expected, ("kv_cache_ptrs",))
    return made


def _like(rng, spec):
    """Another array of the same shape, strides and dtype."""
    buffer = worlds.Buffer(spec.buffer.bytes.size, rng)
    return buffer.view(spec.shape, spec.dtype, spec.offset, spec.strides)


def layers_of(rng, shape, dtype, count):
    first = fresh(rng, shape, dtype)
    return [first, *(_like(rng, first) for _ in range(count - 1))]


def pairs_of(rng, sources, destinations, disjoint):
    """(source, destination) pairs, as a list or an array."""
    count = int(rng.integers(0, 1 + min(sources, destinations) // (2 if disjoint else 1)))
    if disjoint:
        order = rng.permutation(min(sources, destinations))
        found = np.stack([order[:count], order[count : 2 * count]], 1)
    else:
        found = np.stack([rng.integers(0, sources, count), rng.permutation(destinations)[:count]],
                         1)  # fmt: skip
    if rng.random() < 0.5:
        return fresh(rng, (count, 2), pick(rng, "int32", "int64"), values=found)
    pairs = [tuple(map(int, pair)) for pair in found]
    return tuple(pairs) if rng.random() < 0.3 else pairs


def as_pairs(value):
    return [tuple(map(int, pair)) for pair in value]


def copy(rng):
    layers, blocks = pick(rng, 0, 1, 2, 3), int(rng.integers(1, 6))
    dtype, (a, b) = pick(rng, *DTYPES), (pick(rng, (4,), (2, 3), (2, 2, 4)) for _ in "kv")
    args = {
        "key_caches": layers_of(rng, (blocks, *a), dtype, layers) if layers else [],
        "value_caches": layers_of(rng, (blocks, *b), dtype, layers) if layers else [],
        "block_mapping": pairs_of(rng, blocks, blocks, True),
    }

    def expected(a):
        caches = [*a["key_caches"], *a["value_caches"]]
        oracle.copy_blocks([bits(cache) for cache in caches], as_pairs(a["block_mapping"]))

    return Call("copy_blocks", args, expected, ("key_caches", "value_caches"), ("block_mapping",))


def copy_mla(rng):
    blocks = int(rng.integers(1, 6))
    args = {
        "kv_caches": layers_of(rng, (blocks, 2, 3), pick(rng, *DTYPES), pick(rng, 1, 2)),
        "block_mapping": pairs_of(rng, blocks, blocks, True),
    }

    def expected(a):
        oracle.copy_blocks(map(bits, a["kv_caches"]), as_pairs(a["block_mapping"]))

    return Call("copy_blocks_mla", args, expected, ("kv_caches",), ("block_mapping",))


def swap(rng):
    layers, dtype, block = pick(rng, 0, 1, 2), pick(rng, *DTYPES), pick(rng, (4,), (2, 3))
    one, other = (int(n) for n in rng.integers(1, 6, 2))
    size = None
    if not layers:
        sides = [fresh(rng, (n, *block), dtype, dense=True) for n in (one, other)]
        size = pick(rng, None, formats.DTYPES[dtype].bytes * int(np.prod(block)))
    else:
        sides = [layers_of(rng, (n, *block), dtype, layers) for n in (one, other)]
    args = dict(zip(("src", "dst"), sides)) | {"block_mapping": pairs_of(rng, one, other, False)}
    if size is not None:
        args["block_size_in_bytes"] = size

    def expected(a):
        pairs = as_pairs(a["block_mapping"])
        if size is not None:  # blocks of so many bytes, whatever the shapes
            sides = (bits(a[n]).reshape(-1).view(np.uint8) for n in ("src", "dst"))
            sides = [side[: len(side) // size * size].reshape(-1, size) for side in sides]
            oracle.swap_blocks(*sides, pairs)
            return
        lists = [a[n] if isinstance(a[n], list) else [a[n]] for n in ("src", "dst")]
        for source, destination in zip(*lists):
            oracle.swap_blocks(bits(source), bits(destination), pairs)

    return Call("swap_blocks", args, expected, ("dst",), ("block_mapping",))


def ranges(rng):
    source, destination = (fresh(rng, (64,), "uint8", dense=True) for _ in range(2))
    count = int(rng.integers(0, 4))
    sizes = rng.integers(0, 16, count)
    starts = rng.integers(0, 48, count), 16 * rng.permutation(4)[:count]
    bases = (spec.buffer.bytes.ctypes.data + spec.offset for spec in (source, destination))
    columns = [base + start for base, start in zip(bases, starts)] + [sizes]
    names = ("src_ptrs", "dst_ptrs", "sizes")
    args = {name: fresh(rng, (count,), "int64", values=column)
            for name, column in zip(names, columns)}  # fmt: skip
    made = Call("swap_blocks_batch", args, None, ())
    made.hidden = source, destination

    def expected(a):
        del a
        if all(args[name] is made.args.get(name) for name in names):
            before = numpy_array(source).copy()
            for of, to, size in zip(*starts, sizes):
                made.copies[id(destination.buffer)][
                    destination.offset + to : destination.offset + to + size
                ] = before[of : of + size]

    made.expected = expected
    return made


def gather(rng, name="gather_cache"):
    blocks, block_size, heads, size, _ = sizes_of(rng)
    sequences, width = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    inner = pick(rng, (size,), (heads, size))
    lengths = rng.integers(0, width * block_size + 1, sequences)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    starts = None
    if rng.random() < 0.4:
        starts = np.array([int(rng.integers(0, max(width * block_size - n, 0) + 1))
                           for n in lengths])  # fmt: skip
        starts = np.minimum(starts, width * block_size - 1)
        lengths = np.minimum(lengths, width * block_size - starts)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
    rows = int(bounds[-1]) + pick(rng, 0, 2)
    kv, stored, dtype = "auto", None, pick(rng, *DTYPES)
    target = dtype
    if name == "gather_and_maybe_dequant_cache" and rng.random() < 0.6:
        kv = pick(rng, *oracle.STORED)
        stored, target = oracle.STORED[kv], pick(rng, *FLOATS)
        dtype = pick(rng, stored, "uint8")
    src = fresh(rng, (blocks, block_size, *inner), dtype)
    if stored is not None:
        numpy_array(src).view(np.uint8)[...] = rng.integers(0, 0x70, src.shape)  # no NaN
    args = {
        "src_cache": src,
        "dst": fresh(rng, (rows, *inner), target),
        "block_table": fresh(rng, (sequences, width), pick(rng, "int32", "int64"),
                             values=rng.integers(0, blocks, (sequences, width))),
        "cu_seq_lens": dense_numbers(rng, bounds),
    }  # fmt: skip
    if name == "cp_gather_cache":
        args["batch_size"] = sequences
    if stored is not None or name == "gather_and_maybe_dequant_cache":
        args |= {"token_to_seq": None, "num_tokens": pick(rng, rows, rows // 2)}
        args |= {"kv_cache_dtype": kv, "scale": scale_of(rng)}
    if starts is not None:
        args["seq_starts"] = numbers(rng, starts)

    def expected(a):
        options, src, dst = {}, a["src_cache"], bits(a["dst"])
        if "num_tokens" in a:
            options["rows"] = int(a["num_tokens"])
        if stored is None:
            src = bits(src)
        else:
            scale, dst = np.asarray(scale_value(a["scale"])).reshape(-1)[0], a["dst"]

            def token(block, offset):
                codes = bits(a["src_cache"][block, offset])
                made = [oracle.dequantise(code, scale, stored, dst.dtype)
                        for code in codes.reshape(-1)]  # fmt: skip
                return np.array(made, dst.dtype).reshape(codes.shape)

            options["token"] = token
        made.faults = oracle.gather_cache(
            src, dst, a["block_table"], a["cu_seq_lens"], a.get("seq_starts"), **options
        )

    made = Call(name, args, expected, ("dst",))
    return made


def slot_gather(rng):
    blocks, block_size, heads, size, _ = sizes_of(rng)
    inner, rows = pick(rng, (size,), (heads, size)), int(rng.integers(0, 6))
    kv, stored, dtype = "auto", None, pick(rng, *DTYPES)
    target = dtype
    if rng.random() < 0.6:
        kv = pick(rng, *oracle.STORED)
        stored, target = oracle.STORED[kv], pick(rng, *FLOATS)
        dtype = pick(rng, stored, "uint8")
    src = fresh(rng, (blocks, block_size, *inner), dtype)
    if stored is not None:
        numpy_array(src).view(np.uint8)[...] = rng.integers(0, 0x70, src.shape)  # no NaN
    slots = rng.integers(-1, blocks * block_size, rows)
    args = {
        "src_cache": src,
        "dst": fresh(rng, (rows + pick(rng, 0, 2), *inner), target),
        "slot_mapping": dense_numbers(rng, slots),
        "kv_cache_dtype": kv,
        "scale": scale_of(rng),
    }

    def expected(a):
        codes, dst = bits(a["src_cache"]), bits(a["dst"])
        token = None
        if stored is not None:
            scale, dst = np.asarray(scale_value(a["scale"])).reshape(-1)[0], a["dst"]

            def token(block, offset):
                entry = codes[block, offset]
                made = [oracle.dequantise(code, scale, stored, dst.dtype) for code in entry.flat]
                return np.array(made, dst.dtype).reshape(entry.shape)

        made.faults = oracle.gather_slots(codes, dst, a["slot_mapping"], token=token)

    made = Call("gather_slots", args, expected, ("dst",))
    return made


def gather_x_packed(rng):
    layout = pick(rng, "x-packed-key", "x-packed-value", "interleaved-value")
    blocks, heads, x, packs, groups = 3, pick(rng, 1, 2), 2, pick(rng, 1, 2), pick(rng, 1, 2)
    shape = {
        "x-packed-key": (blocks, heads, packs, x * groups, x),
        "x-packed-value": (blocks, heads, packs * x, x * groups),
        "interleaved-value": (blocks, heads, groups, packs * x, x),
    }[layout]
    dtype, rows = pick(rng, *DTYPES), int(rng.integers(0, 5))
    args = {
        "src_cache": fresh(rng, shape, dtype),
        "dst": fresh(rng, (rows, heads, packs * x), dtype),
        "block_table": fresh(rng, (1, 3), "int32", values=rng.integers(0, blocks, (1, 3))),
        "cu_seq_lens": dense_numbers(rng, [0, rows]),
        "layout": layout,
    }

    def expected(a):
        cache = bits(a["src_cache"])
        slots = cache.shape[2] * cache.shape[4] if "interleaved" in layout else cache.shape[3]
        made.faults = oracle.gather_cache(
            cache, bits(a["dst"]), a["block_table"], a["cu_seq_lens"], block_size=slots,
            token=lambda block, offset: oracle.packed_token(cache, block, offset, layout),
        )  # fmt: skip

    made = Call("gather_cache", args, expected, ("dst",))
    return made


def upconvert(rng):
    blocks, rows = int(rng.integers(1, 3)), int(rng.integers(0, 2))
    entries = rng.integers(0, 0x70, (blocks, 2, 656)).astype(np.uint8)
    entries[..., 512:528] = np.float32([0.5, 1, 0.25, 3]).view(np.uint8)
    target = pick(rng, *FLOATS)
    args = {
        "src_cache": fresh(rng, entries.shape, "uint8", values=entries),
        "dst": fresh(rng, (rows, 576), target),
        "block_table": fresh(rng, (1, 1), "int32", values=rng.integers(0, blocks, (1, 1))),
        "workspace_starts": dense_numbers(rng, [0]),
        "batch_size": 1,
        "rope_dtype": pick(rng, "bfloat16", "float16"),
    }

    def expected(a):
        rope = np.dtype(getattr(ml_dtypes, a["rope_dtype"], a["rope_dtype"]))
        src, dst = bits(a["src_cache"]), a["dst"]
        made.faults = oracle.gather_cache(
            src, dst, a["block_table"], [*a["workspace_starts"], len(dst)],
            token=lambda block, offset: oracle.fp8_ds_mla_token(
                src[block, offset], dst.dtype, rope
            ),
        )  # fmt: skip

    made = Call("cp_gather_and_upconvert_fp8_kv_cache", args, expected, ("dst",))
    return made


def indexer_write(rng):
    blocks, block_size, _, _, tokens = sizes_of(rng)
    quant, count = pick(rng, 2, 4), pick(rng, 1, 2)
    size = quant * count
    args = {
        "k": fresh(rng, (tokens, size), pick(rng, *FLOATS)),
        "kv_cache": fresh(rng, (blocks, block_size, size + 4 * count), "uint8", dense=True),
        "slot_mapping": numbers(rng, slots_of(rng, tokens, blocks * block_size)),
        "quant_block_size": quant,
        "kv_cache_dtype": pick(rng, "auto", "fp8", "ue8m0", "mxfp8"),
    }

    def expected(a):
        scales = {"auto": "float32", "fp8": "float32"}.get(a["kv_cache_dtype"], a["kv_cache_dtype"])
        made.faults = oracle.indexer_k_quant_and_cache(
            a["k"], bits(a["kv_cache"]), a["slot_mapping"], quant, scales
        )

    made = Call("indexer_k_quant_and_cache", args, expected, ("kv_cache",))
    return made


def indexer_gather(rng):
    blocks, block_size, sequences, width = 3, pick(rng, 1, 2, 4), pick(rng, 1, 2), 2
    size, count = 4, pick(rng, 1, 2)
    lengths = rng.integers(0, width * block_size + 1, sequences)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    rows = int(bounds[-1]) + pick(rng, 0, 1)
    table = rng.integers(0, blocks, (sequences, width))
    args = {
        "kv_cache": fresh(rng, (blocks, block_size, size + 4 * count), "uint8", dense=True),
        "dst_k": fresh(rng, (rows, size), pick(rng, "uint8", "float8_e4m3fn")),
        "dst_scale": fresh(rng, (rows, 4 * count), "uint8"),
        "block_table": fresh(rng, table.shape, pick(rng, "int32", "int64"), values=table),
        "cu_seq_lens": dense_numbers(rng, bounds),
    }

    def expected(a):
        cache, keys, scales, *others = a.values()
        made.faults = oracle.cp_gather_indexer_k_quant_cache(
            bits(cache), bits(keys), scales.view(np.uint8), *others, size // count
        )

    made = Call("cp_gather_indexer_k_quant_cache", args, expected, ("dst_k", "dst_scale"))
    return made


def packing(rng, name):
    by_slot, unpacks = name.endswith("tokens"), name.startswith("unpack")
    blocks, layers, tensors = int(rng.integers(1, 4)), pick(rng, 1, 2), pick(rng, 1, 2)
    shapes = [(blocks, 2, *pick(rng, (3,), (2, 2))) for _ in range(tensors)]
    dtype = pick(rng, *DTYPES)
    lists = [layers_of(rng, shape, dtype, layers) for shape in shapes]
    limit = blocks * 2 if by_slot else blocks
    count = int(rng.integers(0, limit + 1))
    chosen = rng.permutation(limit)[:count] if unpacks else rng.integers(0, limit, count)
    if by_slot and count:
        chosen[rng.random(count) < 0.2] = -1
    item = sum(int(np.prod(shape[1 + by_slot :])) for shape in shapes)
    room = layers * count * item * formats.DTYPES[dtype].bytes + pick(rng, 0, 5)
    caches = list(zip(*lists)) if tensors == 2 else lists[0]
    buffer = fresh(rng, (room,), "uint8", dense=True)
    index = {"slot_mapping" if by_slot else "block_ids": numbers(rng, chosen)}
    if unpacks:
        args = {"packed": buffer, "caches": caches, **index}
    else:
        args = {"caches": caches, **index, "out": buffer}
    args["layout"] = pick(rng, "layer_first", "page_first")

    def expected(a):
        layers = [[bits(t) for t in layer] if isinstance(layer, tuple) else [bits(layer)]
                  for layer in a["caches"]]  # fmt: skip
        chosen = a[next(iter(index))]
        if unpacks:
            packed = a["packed"].reshape(-1).view(np.uint8)
            oracle.unpack(packed, layers, chosen, a["layout"], by_slot)
        else:
            oracle.pack(layers, chosen, a["out"].reshape(-1).view(np.uint8), a["layout"], by_slot)

    return Call(name, args, expected, ("caches",) if unpacks else ("out",), tuple(index))


def zero(rng):
    blocks, layers = int(rng.integers(1, 4)), pick(rng, 0, 1, 2)
    caches = layers_of(rng, (blocks, 2, 3), pick(rng, *DTYPES), layers) if layers else []
    args = {"caches": caches, "block_ids": numbers(rng, rng.integers(0, blocks, 2))}
    return Call("zero_blocks", args, lambda a: oracle.zero_blocks(map(bits, a["caches"]),
                a["block_ids"]), ("caches",), ("block_ids",))  # fmt: skip


def mapping(rng):
    requests, width, block_size = int(rng.integers(1, 4)), int(rng.integers(1, 4)), pick(rng, 1, 4)
    world = pick(rng, 1, 1, 2)
    bounds = np.sort(rng.integers(0, 5, requests + 1))
    tokens = 5
    positions = rng.integers(0, width * block_size * world, tokens)
    args = {
        "block_table": fresh(rng, (requests, width), pick(rng, "int32", "int64"),
                             values=rng.integers(0, 99, (requests, width))),
        "positions": numbers(rng, positions),
        "query_start_loc": dense_numbers(rng, bounds),
        "block_size": block_size,
        "cp_world_size": world,
        "cp_rank": world - 1,
        "cp_interleave": pick(rng, 1, block_size),
    }  # fmt: skip
    if rng.random() < 0.5:
        args["out"] = fresh(rng, (tokens + pick(rng, 0, 2),), "int64", dense=True)

    def expected(a):
        out = a["out"] if "out" in a else np.empty(len(a["positions"]), np.int64)
        made.faults = oracle.slot_mapping(
            a["block_table"], a["positions"], a["query_start_loc"], block_size, out, world,
            world - 1, int(a["cp_interleave"]),
        )  # fmt: skip
        return out

    made = Call("slot_mapping", args, expected, ("out",))
    return made


def groups(rng):
    requests, count, tokens = 2, pick(rng, 1, 2), 3
    dtype = pick(rng, "int32", "int64")
    widths = [int(rng.integers(1, 3)) for _ in range(count)]
    tables = [fresh(rng, (3, width), dtype, True, rng.integers(0, 9, (3, width)))
              for width in widths]  # fmt: skip
    sizes = [pick(rng, 1, 4) for _ in range(count)]
    args = {
        "block_tables": tables,
        "idx_mapping": pick(rng, None, numbers(rng, [1, -1])),
        "positions": numbers(rng, [0, 0, 0]),
        "query_start_loc": dense_numbers(rng, [0, 2, 3][: requests + 1]),
        "block_sizes": sizes,
        "enabled": pick(rng, None, [bool(rng.random() < 0.7) for _ in range(count)]),
    }
    if rng.random() < 0.5:
        args["out"] = fresh(rng, (count, tokens), "int64", dense=True)

    def expected(a):
        out = a["out"] if "out" in a else np.empty((count, len(a["positions"])), np.int64)
        made.faults = oracle.slot_mapping_groups(
            a["block_tables"], a["idx_mapping"], a["positions"], a["query_start_loc"], sizes, out,
            a["enabled"],
        )  # fmt: skip
        return out

    made = Call("slot_mapping_groups", args, expected, ("out",))
    return made


def bias(rng):
    heads, queries, keys = (int(n) for n in rng.integers(1, 4, 3))
    dtype = pick(rng, *FLOATS)
    args = {
        "slopes": fresh(rng, (heads,), "float32"),
        "query_positions": numbers(rng, rng.integers(0, 99, queries)),
        "key_positions": numbers(rng, rng.integers(0, 99, keys)),
        "sqrt": bool(rng.random() < 0.5),
        "causal": bool(rng.random() < 0.5),
    }
    if rng.random() < 0.5:
        args["out"] = fresh(rng, (heads, queries, keys), dtype)
    else:
        args["dtype"] = dtype
    if rng.random() < 0.4:
        for name, rows in (("query_start_loc", queries), ("cu_seq_lens", keys)):
            args[name] = dense_numbers(rng, [0, int(rng.integers(0, rows + 1)), rows])

    def expected(a):
        shape = len(a["slopes"]), len(a["query_positions"]), len(a["key_positions"])
        out = a["out"] if "out" in a else np.empty(shape, formats.DTYPES[dtype].numpy)
        oracle.alibi_bias(
            a["slopes"], a["query_positions"], a["key_positions"], out, a["sqrt"], a["causal"],
            a.get("query_start_loc"), a.get("cu_seq_lens"),
        )  # fmt: skip
        return out

    return Call("alibi_bias", args, expected, ("out",))


def slopes(rng):
    ranks = pick(rng, 1, 2)
    heads = ranks * int(rng.integers(1, 5))
    args = {"num_heads": heads, "tp_size": ranks, "tp_rank": ranks - 1, "device": "cpu"}
    if rng.random() < 0.5:
        args |= {"out": fresh(rng, (heads // ranks,), "float32")}
        del args["device"]

    def expected(a):
        wanted = oracle.alibi_slopes(heads)[-(heads // ranks) :]
        if "out" in a:
            assert a["out"].shape == (heads // ranks,)
            a["out"][:] = cc.alibi_slopes(heads, device="cpu")[-(heads // ranks) :]
            np.testing.assert_allclose(a["out"], wanted, rtol=3e-7)
            return a["out"]
        return np.array(wanted, np.float32)

    return Call("alibi_slopes", args, expected, ("out",))


def placed(rng):
    values = [float(0.5 * n) for n in rng.integers(1, 9, int(rng.integers(1, 4)))]
    args = {"slopes": values, "out": fresh(rng, (len(values),), "float32")}

    def expected(a):
        a["out"][:] = values
        return a["out"]

    return Call("place_slopes", args, expected, ("out",))


def convert(rng):
    shape = pick(rng, (), (3,), (2, 3), (2, 2, 2))
    name = pick(rng, "fp8", "fp8_e4m3", "fp8_e5m2")
    stored, number, back = oracle.STORED[name], pick(rng, *FLOATS), rng.random() < 0.4
    code = pick(rng, stored, "uint8")
    output, source = fresh(rng, shape, number if back else code), fresh(rng, shape,
                     code if back else number)  # fmt: skip
    if back:
        numpy_array(source).view(np.uint8)[...] = rng.integers(0, 0x70, shape)
    args = {"output": output, "input": source, "scale": scale_of(rng), "kv_dtype": name}

    def expected(a):
        scale = np.asarray(scale_value(a["scale"])).reshape(-1)[0]
        to, of = a["output"], a["input"]
        for index in np.ndindex(*to.shape):
            if of.itemsize == 1:
                to[index] = oracle.dequantise(bits(of)[index], scale, stored, to.dtype)
            else:
                bits(to)[index] = oracle.quantise(of[index], scale, stored)

    return Call("convert_fp8", args, expected, ("output",))


def size_of(rng):
    blocks, shape = int(rng.integers(1, 4)), pick(rng, (2, 3), (2, 2, 2))
    caches = layers_of(rng, (blocks, *shape), "float16", 2)
    by_slot = rng.random() < 0.5
    args = {"caches": caches, "num_tokens" if by_slot else "num_blocks": 3}
    item = 2 * int(np.prod(shape[by_slot:]))

    def expected(a):
        assert [cache.shape[1 + by_slot :] for cache in a["caches"]] == [shape[by_slot:]] * 2
        return 2 * 3 * item

    return Call("packed_size", args, expected, ())


ORDINARY = (
    flash, flash, x_packed, per_token_head, mla, mla, grouped, copy, copy_mla, swap, ranges,
    gather, gather_x_packed, slot_gather, indexer_write, indexer_gather, zero, mapping, groups,
    bias, slopes, placed, convert, size_of,
    functools.partial(gather, name="cp_gather_cache"),
    functools.partial(gather, name="gather_and_maybe_dequant_cache"),
    *(functools.partial(packing, name=name)
      for name in ("pack_blocks", "unpack_blocks", "pack_tokens", "unpack_tokens")),
)  # fmt: skip
SLOW = (fp8_ds_mla, upconvert)  # their rows have hundreds of elements: one call of a hundred

# The calls that a `PagedKVCache` makes too, and what they write into its caches.
SOURCES = {
    "concat_and_cache_mla": ("kv_c", "k_pe"),
    "reshape_and_cache_flash": ("key", "value"),
}
