# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into an x-packed cache."""

from __future__ import annotations

import functools

from .. import cpu
from ..runtime import contract, dispatch, formats, launch, modules, params, plans, spelling
from ..types import ArrayLike, Scale, StreamLike
from .shared import transposed

NAME = "reshape_and_cache"
PARAMS = params.Struct(
    per_call="key:ptr value:ptr key_cache:ptr value_cache:ptr slot_mapping:ptr k_scale:ptr "
    "v_scale:ptr tokens:i64 k_scale_value:f32 v_scale_value:f32",
    constant="num_blocks:i64 slot_stride:i64 "
    "key_token_stride:i64 key_head_stride:i64 value_token_stride:i64 value_head_stride:i64 "
    "key_block_stride:i64 key_cache_head_stride:i64 key_pack_stride:i64 key_offset_stride:i64 "
    "value_block_stride:i64 value_cache_head_stride:i64 value_slots_stride:i64 "
    "value_element_stride:i64 "
    "k_scale_stride:i64 v_scale_stride:i64",
)
MAX_THREADS = 256


def reshape_and_cache(
    key: ArrayLike,
    value: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    interleaved_v: bool = False,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Write one step's keys and values into their slots of an x-packed paged cache.

    The layout is that of vLLM's first paged-attention kernels, with x elements in 16 bytes. Element
    ``d`` of head ``h`` of the token in slot ``b * block_size + o`` is at ``key_cache[b, h, d // x,
    o, d % x]`` and ``value_cache[b, h, d, o]``. Interleaved values are at ``value_cache[b, h, o //
    x, d, o % x]``.

    Parameters
    ----------
    key : array [num_tokens, num_kv_heads, head_size]
        float16, bfloat16 or float32, or already of the 8-bit dtype that ``kv_cache_dtype`` stores,
        which is then copied; for a raw copy any dtype. The last dimension contiguous. Rows beyond
        the slots are ignored.
    value : array [num_tokens, num_kv_heads, head_size_v]
        Like ``key``; its head size may differ.
    key_cache : array [num_blocks, num_kv_heads, head_size / x, block_size, x]
        Written in place; of the dtype of ``key`` for a raw copy, otherwise of the 8-bit dtype
        stored; uint8 may stand for any 8-bit dtype. Last dimension contiguous, other strides free.
        x is whatever the array says.
    value_cache : array [num_blocks, num_kv_heads, head_size_v, block_size]
        Likewise. With ``interleaved_v`` [num_blocks, num_kv_heads, block_size / x, head_size_v, x].
    slot_mapping : int64 or int32 array [num_slots]
        Negative slots are padding and skipped. Slots past the cache are skipped and recorded (see
        `raise_faults`). Of a slot that occurs twice nothing is defined: parts of each token may
        stay.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw copy, whichever of these the name is.
        "fp8" or "fp8_e4m3", "fp8_e5m2", "int8": quantised as by `reshape_and_cache_flash`.
    k_scale, v_scale : float, or float32 array [1], [num_kv_heads] or of no dimensions, optional
        What a stored element is multiplied with to give the value: one number, or one for each
        head. An array is read on its device, and its values are not looked at: with 0, NaN or a
        negative number an element is what that quotient gives. None is 1.0. A raw copy ignores
        them.
    interleaved_v : bool
        Whether the value cache is interleaved.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``key_cache``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Names, order and meaning are those of vLLM's cache operation of the same name.
    """
    arrays, scalars = contract.split_scales(NAME, kv_cache_dtype, k_scale, v_scale)
    objects = (key, value, key_cache, value_cache, slot_mapping, *arrays)
    OP(
        objects,
        (kv_cache_dtype, contract.flag(NAME, "interleaved_v", interleaved_v)),
        stream,
        scalars,
    )


def _plan(op, described, options):
    key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale = described
    kv_cache_dtype, interleaved = options
    fmt = formats.cache_format(op.name, kv_cache_dtype)
    check = contract.Contract(op.name)
    check.shape("key", key, "_ num_kv_heads head_size")
    check.shape("value", value, "_ num_kv_heads head_size_v")
    check.x_packed_caches(key_cache, value_cache, interleaved)
    check.shape("slot_mapping", slot_mapping, "_")
    stored = check.writes({a.name: x for a, x in zip(op.args[:5], described)}, fmt)
    heads = check.sizes["num_kv_heads"]
    scale_steps = (
        check.head_scale("k_scale", k_scale, heads),
        check.head_scale("v_scale", v_scale, heads),
    )

    if key_cache.device.kind == "cpu":
        run = functools.partial(cpu.reshape_and_cache, source=key.dtype, stored=stored)
        bits = [arg.name for arg in op.args[:4]]
        return plans.NumPyPlan(run, op.args, described, bits)
    return _gpu_plan(op, check.sizes, described, interleaved, stored, scale_steps)


def _gpu_plan(op, size, described, interleaved, stored, scale_steps):
    """The plan of the kernel. ``stored``: the type that elements are converted to, or None.
    ``scale_steps``: the bytes from one head's scale to the next, of keys and of values."""
    key, value, key_cache, value_cache, slot_mapping, *_ = described
    heads = size["num_kv_heads"]
    element = key_cache.dtype.bytes
    ratio = key.dtype.bytes // element
    key_bytes, value_bytes = size["head_size"] * element, size["head_size_v"] * element
    pack = size["x"] * element
    key_vector = contract.converting_vector_bytes(
        ratio,
        (key.ptr, *key.strides[:2]),
        (pack, key_cache.ptr, *key_cache.strides[:4]),
    )
    value_vector = transposed.vector_bytes(ratio, value, value_bytes)
    slots = size["x"] if interleaved else size["block_size"]
    block_stride, head_stride, *middle, _ = value_cache.strides
    slots_stride, element_stride = middle if interleaved else (0, *middle)
    vector_values = transposed.stores_vectors(
        value_cache.ptr, block_stride, head_stride, slots_stride, element_stride
    )
    # A thread for each vector of a tile's part of a head, up to the most.
    sides = ((key_bytes, key_vector), (value_bytes, value_vector))
    vectors = transposed.TILE * max(
        min(transposed.PART_BYTES, length) // vector for length, vector in sides
    )
    threads = launch.block_threads(vectors, 1, MAX_THREADS)
    parts = transposed.parts(heads, max(key_bytes, value_bytes))
    arguments = (
        "reshape_and_cache", spelling.quantiser(key.dtype, stored, key_vector),
        spelling.quantiser(key.dtype, stored, value_vector), element, pack, key_vector,
        value_vector, key_bytes, value_bytes, size["block_size"], slots, vector_values,
        spelling.indices(slot_mapping), threads,
    )  # fmt: skip
    kernel = modules.Kernel(
        op.name,
        op.name,
        spelling.instance(*arguments),
        PARAMS,
        guarded=("slot_mapping",),
        converts=stored is not None,
    )
    launcher = launch.Launcher(
        kernel,
        key_cache.device.index,
        (size["num_blocks"], slot_mapping.strides[0], *key.strides[:2], *value.strides[:2],
         *key_cache.strides[:4], block_stride, head_stride, slots_stride, element_stride,
         *scale_steps),
    )  # fmt: skip

    def shape(tokens):
        tiles = transposed.tiles(tokens)
        layers = launch.ceil_div(tiles, launch.MAX_GRID_YZ)
        return (parts, launch.ceil_div(tiles, layers) if layers else 0, layers), threads

    return plans.KernelPlan(launcher, shape)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("key", varies=dispatch.ROWS),
        dispatch.Arg("value", varies=dispatch.ROWS),
        dispatch.Arg("key_cache", written=True),
        dispatch.Arg("value_cache", written=True),
        dispatch.Arg("slot_mapping", varies=dispatch.ROWS, index=True),
        dispatch.Arg("k_scale", optional=True),
        dispatch.Arg("v_scale", optional=True),
    ),
    plan=_plan,
    destination=2,
    count=contract.slot_count(NAME, "key", "value", scales=2),
    options=("kv_cache_dtype",),
)
