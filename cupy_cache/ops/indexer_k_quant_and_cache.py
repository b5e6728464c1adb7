# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Quantising the keys of a sparse-attention indexer into its cache."""

from __future__ import annotations

import functools

from .. import cpu, errors
from ..runtime import contract, dispatch, formats, launch, modules, params, plans, spelling
from ..types import ArrayLike, StreamLike
from .shared import indexer

NAME = "indexer_k_quant_and_cache"
PARAMS = params.Struct(
    per_call="k:ptr kv_cache:ptr slot_mapping:ptr tokens:i64",
    constant="num_blocks:i64 slot_stride:i64 k_stride:i64 block_stride:i64",
)
# What the last argument may be, and the kernel's name of how scales are then stored.
SCALES = {
    "auto": "kFloat32",
    "fp8": "kFloat32",
    "fp8_e4m3": "kFloat32",
    "ue8m0": "kPowerOfTwo",
    "mxfp8": "kExponents",
}


def indexer_k_quant_and_cache(
    k: ArrayLike,
    kv_cache: ArrayLike,
    slot_mapping: ArrayLike,
    quant_block_size: int,
    kv_cache_dtype: str,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Quantise one step's indexer keys and write them, with their scales, into their slots.

    Every ``quant_block_size`` elements of a key share a scale. With ``a`` the largest absolute
    value among them, the scale is ``max(a, 1e-4) / 448`` and an element is stored as e4m3 of
    element / scale, both in float32, the quotient rounded to nearest even and saturated.

    Token ``t`` goes to block ``slot_mapping[t] // block_size`` at offset ``slot_mapping[t] %
    block_size``. The number of tokens is ``slot_mapping.shape[0]``; ``k`` may have more rows
    (padding of a CUDA graph), which are ignored.

    Parameters
    ----------
    k : array [num_tokens, head_size]
        float16, bfloat16 or float32; the last dimension contiguous, the stride of the rows free.
    kv_cache : array [num_blocks, block_size, head_size + 4 * head_size / quant_block_size]
        Written in place; of uint8 or any other 8-bit dtype. The bytes of a block are the keys of
        all its slots, ``head_size`` bytes each, then the scales of all its slots, four bytes for
        each scale: its last dimension is not one token's memory. A block has no gaps; the stride of
        the blocks is free.
    slot_mapping : int64 or int32 array [num_slots]
        Negative slots are padding and skipped. Slots past the cache are skipped and recorded (see
        `raise_faults`). Of a slot that occurs twice nothing is defined: parts of each key may stay.
    quant_block_size : int
        Any divisor of ``head_size``.
    kv_cache_dtype : str
        How scales are stored. "auto", "fp8" or "fp8_e4m3": as float32. "ue8m0": as float32, rounded
        up to a power of two. "mxfp8": rounded likewise, as its biased exponent in each of the four
        bytes.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``kv_cache``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Names, order and bytes are those of vLLM's operation of the same name, whose last argument is
    the format of the scales too, in spite of its name. Other strings, for which vLLM would store
    e4m3 just the same, are refused. vLLM takes the power of two from float32 logarithms. Here it is
    exact, found from the bits of the scale; for float16 and bfloat16 that gives the same bytes.

    NaN does not count for ``a`` and is stored as 0x7f. An infinite value makes the scale of its
    quant block infinite ("mxfp8": 255, which UE8M0 reads as NaN); it is stored as 0x7f, its finite
    neighbours as zeros.
    """
    quant_block_size = contract.integer(NAME, "quant_block_size", quant_block_size, 1)
    OP((k, kv_cache, slot_mapping), (quant_block_size, kv_cache_dtype), stream)


def _plan(op, described, options):
    k, kv_cache, slot_mapping = described
    quant_block_size, kv_cache_dtype = options
    scales = SCALES[contract.choice(op.name, "kv_cache_dtype", kv_cache_dtype, SCALES)]
    check = contract.Contract(op.name)
    check.shape("k", k, "_ head_size")
    check.shape("slot_mapping", slot_mapping, "_")
    head_size = k.shape[1]
    check.positive("head_size", head_size)
    if head_size % quant_block_size:
        expected = f"a divisor of the head size {head_size}"
        raise errors.wrong("value", f"{op.name}: quant_block_size", expected, quant_block_size)
    quant_blocks = head_size // quant_block_size
    check.dtype("k", k, *formats.FLOATS)
    check.dtype("slot_mapping", slot_mapping, *formats.INDICES)
    indexer.check_cache(check, kv_cache, head_size, quant_blocks)
    check.writable("kv_cache", kv_cache)
    for name, array in (("k", k), ("slot_mapping", slot_mapping)):
        check.readable(name, array)
    check.contiguous("k", k)

    if kv_cache.device.kind == "cpu":
        run = functools.partial(
            cpu.indexer_k_quant_and_cache,
            source=k.dtype,
            quant_block_size=quant_block_size,
            power_of_two=scales != "kFloat32",
            exponents=scales == "kExponents",
        )
        return plans.NumPyPlan(run, op.args, described, ("k", "kv_cache"))

    num_blocks, block_size, _ = kv_cache.shape
    vector = contract.converting_vector_bytes(
        k.dtype.bytes,
        (k.ptr, k.strides[0]),
        (quant_block_size, kv_cache.ptr, kv_cache.strides[0]),
    )
    scale_vector = contract.vector_bytes(
        indexer.SCALE_BYTES, kv_cache.ptr, kv_cache.strides[0], block_size * head_size
    )
    # Of a group: a vector each.
    lanes = launch.lanes(quant_block_size // vector)
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"{NAME}<{spelling.element(k.dtype)}, "
        f"cupy_cache::Scales::{scales}, {vector}, {scale_vector}, {quant_block_size}, "
        f"{quant_blocks}, {lanes}, {block_size}, {spelling.indices(slot_mapping)}, "
        f"{indexer.MAX_THREADS}>",
        PARAMS,
        guarded=("slot_mapping",),
        converts=True,
    )
    constants = num_blocks, slot_mapping.strides[0], k.strides[0], kv_cache.strides[0]
    device, items = kv_cache.device.index, quant_blocks * lanes
    return plans.flat(kernel, device, constants, items, indexer.MAX_THREADS)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("k", varies=dispatch.ROWS),
        dispatch.Arg("kv_cache", written=True),
        dispatch.Arg("slot_mapping", varies=dispatch.ROWS, index=True),
    ),
    plan=_plan,
    destination=1,
    count=contract.slot_count(NAME, "k", scales=0),
    options=("quant_block_size", "kv_cache_dtype"),
)
