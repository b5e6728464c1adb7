# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into a cache indexed [block, offset, head, element]."""

from __future__ import annotations

import functools

from .. import cpu
from ..runtime import contract, dispatch, formats, modules, params, plans, spelling
from ..types import ArrayLike, Scale, StreamLike

NAME = "reshape_and_cache_flash"
PARAMS = params.Struct(
    per_call="key:ptr value:ptr key_cache:ptr value_cache:ptr slot_mapping:ptr k_scale:ptr "
    "v_scale:ptr tokens:i64 k_scale_value:f32 v_scale_value:f32",
    constant="num_blocks:i64 slot_stride:i64 "
    "key_token_stride:i64 key_head_stride:i64 value_token_stride:i64 value_head_stride:i64 "
    "key_block_stride:i64 key_offset_stride:i64 key_cache_head_stride:i64 "
    "value_block_stride:i64 value_offset_stride:i64 value_cache_head_stride:i64 "
    "k_scale_stride:i64 v_scale_stride:i64",
)
# 256 tokens take an H200 2.0 us with 128, 2.2 with 256, 512 or 1024; many tokens the same.
MAX_THREADS = 128
# {kv_cache_dtype: the form of a call without scales}, as `dispatch.Op` sees it.
_RAW_FORMS = {name: ((name,), 5) for name in formats.RAW}


def reshape_and_cache_flash(
    key: ArrayLike,
    value: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Write one step's keys and values into their slots of a paged cache.

    Token ``t`` goes to block ``slot_mapping[t] // block_size`` at offset ``slot_mapping[t] %
    block_size``. The number of tokens is ``slot_mapping.shape[0]``; ``key`` and ``value`` may have
    more rows (padding of a CUDA graph), which are ignored.

    Parameters
    ----------
    key : array [num_tokens, num_kv_heads, head_size]
        float16, bfloat16 or float32, or already of the 8-bit dtype that ``kv_cache_dtype`` stores,
        which is then copied; for a raw copy any dtype. The last dimension contiguous.
    value : array [num_tokens, num_kv_heads, head_size_v]
        Like ``key``; its head size may differ.
    key_cache : array [num_blocks, block_size, num_kv_heads, head_size]
        Written in place; of the dtype of ``key`` for a raw copy, otherwise of the 8-bit dtype
        stored; uint8 may stand for any 8-bit dtype. Strides are free except the last: NHD, HND as
        a permuted view, and views of one packed K|V page all work.
    value_cache : array [num_blocks, block_size, num_kv_heads, head_size_v]
        Likewise, with strides of its own.
    slot_mapping : int64 or int32 array [num_slots]
        Negative slots are padding and skipped. Slots past the cache are skipped and recorded (see
        `raise_faults`). Of a slot that occurs twice nothing is defined: parts of each token may
        stay.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw copy, whichever of these the name is.
        "fp8" or "fp8_e4m3", "fp8_e5m2", "int8": see Notes.
    k_scale, v_scale : float, or float32 array [1], [num_kv_heads] or of no dimensions, optional
        What a stored element is multiplied with to give the value: one number, or one for each
        head. An array is read on its device, and its values are not looked at: with 0, NaN or a
        negative number an element is what that quotient gives. None is 1.0. A raw copy ignores
        them.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``key_cache``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    An element of an 8-bit cache is the float32 quotient value / scale, correctly rounded, rounded
    again to the stored type: e4m3 and e5m2 to nearest, ties to even; int8 to nearest, ties away
    from zero. What is larger than the largest number becomes that, infinities too; a NaN becomes
    0x7f, in int8 0.

    Names, order and meaning are those of vLLM's cache operation of the same name.
    """
    try:
        form = _RAW_FORMS.get(kv_cache_dtype)
    except Exception:  # no name: the call says so
        form = ()
    if form is not None:  # the usual case, without ado
        objects = key, value, key_cache, value_cache, slot_mapping
        if stream is None:  # what the call of `OP` begins with: an engine's every layer
            for path in OP.fast_paths.forms.get(form, ()):
                if path(objects, (), None, objects) is not False:
                    return
        OP(objects, (kv_cache_dtype,), stream)
        return
    arrays, scalars = contract.split_scales(NAME, kv_cache_dtype, k_scale, v_scale)
    objects = (key, value, key_cache, value_cache, slot_mapping, *arrays)
    OP(objects, (kv_cache_dtype,), stream, scalars)


def _plan(op, described, options):
    key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale = described
    (kv_cache_dtype,) = options
    fmt = formats.cache_format(op.name, kv_cache_dtype)
    check = contract.Contract(op.name)
    check.shape("key", key, "_ num_kv_heads head_size")
    check.shape("value", value, "_ num_kv_heads head_size_v")
    check.shape("key_cache", key_cache, "num_blocks block_size num_kv_heads head_size")
    check.shape("value_cache", value_cache, "num_blocks block_size num_kv_heads head_size_v")
    check.shape("slot_mapping", slot_mapping, "_")
    stored = check.writes({a.name: x for a, x in zip(op.args[:5], described)}, fmt)
    heads = check.sizes["num_kv_heads"]
    scale_steps = (
        check.head_scale("k_scale", k_scale, heads),
        check.head_scale("v_scale", v_scale, heads),
    )

    if key_cache.device.kind == "cpu":
        run = functools.partial(cpu.reshape_and_cache_flash, source=key.dtype, stored=stored)
        bits = [arg.name for arg in op.args[:4]]
        return plans.NumPyPlan(run, op.args, described, bits)

    size, element = check.sizes, key_cache.dtype.bytes
    sides = (size["head_size"], key, key_cache), (size["head_size_v"], value, value_cache)
    rows = [_segments(heads, width, source, cache) for width, source, cache in sides]
    if rows[0][0] != rows[1][0] or any(scale_steps):
        # Only one side's heads are adjacent, or each has a scale of its own: keep them apart.
        rows = [(heads, size["head_size"]), (heads, size["head_size_v"])]
    segments = rows[0][0]
    key_bytes, value_bytes = (width * element for _, width in rows)
    vector = contract.converting_vector_bytes(
        key.dtype.bytes // element,
        contract.row_starts(key, value),
        (key_bytes, value_bytes, *contract.row_starts(key_cache, value_cache)),
    )
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"reshape_and_cache_flash<{spelling.quantiser(key.dtype, stored, vector)}, {vector}, "
        f"{segments}, {key_bytes}, {value_bytes}, {size['block_size']}, "
        f"{spelling.indices(slot_mapping)}, {MAX_THREADS}>",
        PARAMS,
        guarded=("slot_mapping",),
        converts=stored is not None,
    )
    constants = (
        size["num_blocks"], slot_mapping.strides[0], *key.strides[:2], *value.strides[:2],
        *key_cache.strides[:3], *value_cache.strides[:3], *scale_steps,
    )  # fmt: skip
    items = segments * max(key_bytes, value_bytes) // vector
    return plans.full(kernel, key_cache.device.index, constants, items, MAX_THREADS)


def _segments(heads, width, source, cache):
    """A token's row as (segments, elements of a segment): one where heads are adjacent."""
    strides = source.strides[1] // source.dtype.bytes, cache.strides[2] // cache.dtype.bytes
    if heads == 1 or strides == (width, width):
        return 1, heads * width
    return heads, width


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
