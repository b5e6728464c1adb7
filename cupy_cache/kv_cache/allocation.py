# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""New caches: the arrays of all layers, in one of the layouts."""

from __future__ import annotations

import functools
from typing import NamedTuple

from .. import errors
from ..errors import DeviceError
from ..runtime import contract, cuda, driver, formats, making

# Sizes of a cache, by the names of `PagedKVCache.allocate`'s arguments.
LAYOUTS = ("NHD", "HND", "packed", "x-packed", "rows")
PAGED = ("NHD", "HND")  # of these, with scales for each token and head
PACK_BYTES = 16  # of a pack in an x-packed cache
SIZES = ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_size")


def caches(
    op, sizes, head_size_v, dtype, kv_cache_dtype, layout, framework, device, pinned
):  # fmt: skip
    """(Key caches, value caches or None, pages or None), all zeros. ``sizes``: in the order of
    `SIZES`. Where tokens and heads have scales of their own, pages are `Pages` of the keys and of
    the values."""
    layers, *sizes = (
        contract.integer(op, name, size, 0 if name in ("num_layers", "num_blocks") else 1)
        for name, size in zip(SIZES, sizes)
    )
    head_size = sizes[-1]
    if head_size_v is None:
        head_size_v = head_size
    head_size_v = contract.integer(op, "head_size_v", head_size_v, 1)
    layout = contract.choice(op, "layout", layout, LAYOUTS)
    framework, device = _home(op, dtype, framework, device, contract.flag(op, "pinned", pinned))
    kv_cache_dtype = formats.text_of(kv_cache_dtype) or kv_cache_dtype
    if type(kv_cache_dtype) is str and kv_cache_dtype in formats.BY_TOKEN:
        if layout not in PAGED:
            way_out = "scales of tokens and heads have a place in these"
            expected = " or ".join(PAGED)
            raise errors.wrong("value", f"{op}: layout", expected, layout, way_out)
        stored = formats.PER_TOKEN_HEAD_FORMATS[kv_cache_dtype].stored
        made = [
            [
                _page(framework, device, pinned, layout, stored, *sizes[:-1], size)
                for _ in range(layers)
            ]
            for size in (head_size, head_size_v)
        ]
        pages = [Pages(*([page[i] for page in side] for i in (1, 2))) for side in made]
        return *([page[0] for page in side] for side in made), pages
    dtype = storage(op, formats.model_dtype(op, dtype), kv_cache_dtype, layout)
    shapes = _shapes(op, layout, *sizes, head_size_v, dtype)
    zeros = functools.partial(making.zeros, framework, device, dtype=dtype, pinned=pinned)
    made = [[zeros(shape) for _ in range(layers)] for shape in shapes]
    if layout == "rows":
        return made[0], None, None
    if layout == "packed":
        (pages,) = made
        keys, values = ([page[..., part] for page in pages]
                        for part in (slice(head_size), slice(head_size, None)))  # fmt: skip
        return keys, values, None
    if layout == "HND":
        made = [[array.swapaxes(1, 2) for array in arrays] for arrays in made]
    return *made, None


class Pages(NamedTuple):
    """For each layer the scales, and the array of whole pages, as which blocks are moved."""

    scales: list
    whole: list


def _page(framework, device, pinned, layout, stored, num_blocks, block_size, heads, head_size):
    """A layer's cache, its scales, and the pages that hold both. A page has all elements of a
    block, then all its scales, aligned."""
    elements, scales = block_size * heads * head_size, block_size * heads
    first = -(-elements // formats.FLOAT32.bytes) * formats.FLOAT32.bytes
    size = -(-(first + scales * formats.FLOAT32.bytes) // PACK_BYTES) * PACK_BYTES
    byte = formats.DTYPES["uint8" if stored.name != "int8" else "int8"]
    whole = making.zeros(framework, device, (num_blocks, size), byte, pinned)
    order = (block_size, heads) if layout == "NHD" else (heads, block_size)
    cache = whole[:, :elements].reshape(num_blocks, *order, head_size)
    of_cache = whole[:, first : first + scales * formats.FLOAT32.bytes]
    of_cache = making.viewed(of_cache, framework, formats.FLOAT32).reshape(num_blocks, *order)
    if layout == "HND":
        cache, of_cache = cache.swapaxes(1, 2), of_cache.swapaxes(1, 2)
    return cache, of_cache, whole


def _home(op, dtype, framework, device, pinned):
    """(Framework, device) of the arrays."""
    if framework is None and type(dtype).__module__ == "torch":
        framework = "torch"
    if pinned and device is None:
        device = "cpu"
    framework, device = making.home(op, framework, device)
    if pinned and device.kind != "cpu":
        way_out = "only host memory is pinned"
        raise errors.wrong("value", f"{op}: device", "'cpu'", device, way_out, error=DeviceError)
    if pinned and not driver.gpus():
        why, way_out = cuda.no_gpu()
        expected, name = f"False, since {why}", f"{op}: pinned"
        raise errors.wrong("value", name, expected, "True", way_out, error=DeviceError)
    return framework, device


def storage(op, dtype, kv_cache_dtype, layout):
    """The `formats.DType` of the arrays. fp8 is kept as bytes, which every framework has."""
    if layout == "rows" and formats.text_of(kv_cache_dtype) == formats.FP8_DS_MLA:
        return formats.UINT8
    more = formats.BY_TOKEN if layout in PAGED else ()
    names = (*formats.CACHE_FORMATS, *more, *([formats.FP8_DS_MLA] if layout == "rows" else []))
    stored = formats.cache_format(op, kv_cache_dtype, names).stored
    if stored is None:
        return dtype
    return stored if stored.name == "int8" else formats.UINT8


def _shapes(op, layout, num_blocks, block_size, heads, head_size, head_size_v, dtype):
    """The shape of each tensor of a layer, in memory order."""
    if layout == "rows":
        if heads != 1:
            way_out = "entries of latent attention have no heads"
            raise errors.wrong("value", f"{op}: num_kv_heads", "1", heads, way_out)
        return [(num_blocks, block_size, head_size)]
    if layout == "packed":
        return [(num_blocks, block_size, heads, head_size + head_size_v)]
    if layout == "x-packed":
        x = PACK_BYTES // dtype.bytes
        if head_size % x:
            expected = f"a multiple of x = {x}, the elements of {dtype.name} in {PACK_BYTES} bytes"
            raise errors.wrong("value", f"{op}: head_size", expected, head_size)
        return [
            (num_blocks, heads, head_size // x, block_size, x),
            (num_blocks, heads, head_size_v, block_size),
        ]
    sides = (block_size, heads) if layout == "NHD" else (heads, block_size)
    return [(num_blocks, *sides, size) for size in (head_size, head_size_v)]
