# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into a quantised cache with a scale for each token and head."""

from __future__ import annotations

import functools

from .. import cpu, errors
from ..runtime import contract, dispatch, formats, launch, modules, params, plans, spelling
from ..types import ArrayLike, StreamLike

NAME = "reshape_and_cache_flash_per_token_head"
PARAMS = params.Struct(
    per_call="key:ptr value:ptr key_cache:ptr value_cache:ptr k_scale_cache:ptr v_scale_cache:ptr "
    "slot_mapping:ptr tokens:i64",
    constant="num_blocks:i64 slot_stride:i64 "
    "key_token_stride:i64 key_head_stride:i64 value_token_stride:i64 value_head_stride:i64 "
    "key_block_stride:i64 key_offset_stride:i64 key_cache_head_stride:i64 "
    "value_block_stride:i64 value_offset_stride:i64 value_cache_head_stride:i64 "
    "k_scale_block_stride:i64 k_scale_offset_stride:i64 k_scale_head_stride:i64 "
    "v_scale_block_stride:i64 v_scale_offset_stride:i64 v_scale_head_stride:i64",
)
MAX_THREADS = 256
MAX_HEAD_SIZE = 2048  # a warp holds a head in its registers


def reshape_and_cache_flash_per_token_head(
    key: ArrayLike,
    value: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    k_scale_cache: ArrayLike,
    v_scale_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: str,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Write one step's keys and values into their slots of a quantised paged cache, each head of
    each token with a scale of its own, which goes beside the cache.

    Token ``t`` goes to block ``slot_mapping[t] // block_size`` at offset ``slot_mapping[t] %
    block_size``. The number of tokens is ``slot_mapping.shape[0]``; ``key`` and ``value`` may have
    more rows (padding of a CUDA graph), which are ignored.

    Parameters
    ----------
    key : array [num_tokens, num_kv_heads, head_size]
        float16, bfloat16 or float32; the last dimension contiguous. Head sizes up to 2048.
    value : array [num_tokens, num_kv_heads, head_size_v]
        Like ``key``; its head size may differ.
    key_cache : array [num_blocks, block_size, num_kv_heads, head_size]
        Written in place; int8 or float8_e4m3fn, or uint8 for either. Strides are free except the
        last, so views of pages that hold keys, values and scales work.
    value_cache : array [num_blocks, block_size, num_kv_heads, head_size_v]
        Likewise, with strides of its own.
    k_scale_cache, v_scale_cache : float32 array [num_blocks, block_size, num_kv_heads]
        Written in place; any strides.
    slot_mapping : int64 or int32 array [num_slots]
        Negative slots are padding and skipped. Slots past the cache are skipped and recorded (see
        `raise_faults`). Of a slot that occurs twice nothing is defined: parts of each token may
        stay.
    kv_cache_dtype : str
        "int8", "fp8" or "fp8_e4m3", or "int8_per_token_head" or "fp8_per_token_head".
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``key_cache``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    All is in float32, correctly rounded. With ``a`` the largest magnitude of a row, ``scale = max(a
    / Q, 1e-6)``, where Q is 127 for int8 and 448 for e4m3. A stored element is ``value * (1 /
    scale)`` rounded to nearest: in int8 ties away from zero, in e4m3 ties to even. Times the scale
    it gives the value back. NaN does not count for ``a`` and is stored as 0x7f, in int8 as 0. An
    infinite value makes its row's scale infinite and is stored like a NaN, the others as zeros.

    The meaning is that of vLLM's ``triton_reshape_and_cache_flash_per_token_head_quant``.
    """
    objects = key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping
    OP(objects, (kv_cache_dtype,), stream)


def _plan(op, described, options):
    key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping = described
    fmt = formats.cache_format(op.name, options[0], table=formats.PER_TOKEN_HEAD_FORMATS)
    check = contract.Contract(op.name)
    check.shape("key", key, "_ num_kv_heads head_size")
    check.shape("value", value, "_ num_kv_heads head_size_v")
    check.shape("key_cache", key_cache, "num_blocks block_size num_kv_heads head_size")
    check.shape("value_cache", value_cache, "num_blocks block_size num_kv_heads head_size_v")
    scale_caches = {"k_scale_cache": k_scale_cache, "v_scale_cache": v_scale_cache}
    for name, array in scale_caches.items():
        check.shape(name, array, "num_blocks block_size num_kv_heads")
        check.dtype(name, array, formats.FLOAT32)
    check.shape("slot_mapping", slot_mapping, "_")
    check.dtype("key", key, *formats.FLOATS)
    named = {arg.name: array for arg, array in zip(op.args, described)}
    check.writes({name: x for name, x in named.items() if name not in scale_caches}, fmt)
    for name, array in scale_caches.items():
        check.readable(name, array)
        check.writable(name, array)
    size = check.sizes
    sizes = size["head_size"], size["head_size_v"]
    for name, head_size in zip(("key", "value"), sizes):
        if head_size > MAX_HEAD_SIZE:
            expected = f"a head size of at most {MAX_HEAD_SIZE}"
            raise errors.wrong("shape", f"{op.name}: {name}", expected, head_size)

    if key_cache.device.kind == "cpu":
        run = functools.partial(
            cpu.reshape_and_cache_flash_per_token_head, source=key.dtype, stored=fmt.stored
        )
        bits = [arg.name for arg in op.args[:4]]
        return plans.NumPyPlan(run, op.args, described, bits)

    vector = contract.converting_vector_bytes(
        key.dtype.bytes,
        contract.row_starts(key, value),
        (*sizes, *contract.row_starts(key_cache, value_cache)),
    )
    lanes = launch.lanes(max(sizes) // vector)
    heads = size["num_kv_heads"]
    source, stored = (spelling.element(d) for d in (key.dtype, fmt.stored))
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"{NAME}<{source}, {stored}, {formats.LARGEST[fmt.stored.name]}, {vector}, {lanes}, "
        f"{heads}, {sizes[0]}, {sizes[1]}, {size['block_size']}, "
        f"{spelling.indices(slot_mapping)}, {MAX_THREADS}>",
        PARAMS,
        guarded=("slot_mapping",),
        converts=True,
    )
    constants = (
        size["num_blocks"], slot_mapping.strides[0], *key.strides[:2], *value.strides[:2],
        *key_cache.strides[:3], *value_cache.strides[:3], *k_scale_cache.strides,
        *v_scale_cache.strides,
    )  # fmt: skip
    return plans.flat(kernel, key_cache.device.index, constants, heads * lanes, MAX_THREADS)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("key", varies=dispatch.ROWS),
        dispatch.Arg("value", varies=dispatch.ROWS),
        dispatch.Arg("key_cache", written=True),
        dispatch.Arg("value_cache", written=True),
        dispatch.Arg("k_scale_cache", written=True),
        dispatch.Arg("v_scale_cache", written=True),
        dispatch.Arg("slot_mapping", varies=dispatch.ROWS, index=True),
    ),
    plan=_plan,
    destination=2,
    count=contract.slot_count(NAME, "key", "value", scales=0),
    options=("kv_cache_dtype",),
)
