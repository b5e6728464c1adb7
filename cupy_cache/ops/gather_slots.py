# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the tokens in given slots into contiguous rows."""

from __future__ import annotations

import functools

from .. import cpu
from ..runtime import contract, dispatch, modules, params, plans, spelling
from ..types import ArrayLike, Scale, StreamLike
from .shared import gathering

NAME = "gather_slots"
PARAMS = params.Struct(
    per_call="src_cache:ptr dst:ptr slot_mapping:ptr scale:ptr rows:i64 scale_value:f32",
    constant=f"unused:u32 num_blocks:i64 {gathering.sides('sides')}",
)


def gather_slots(
    src_cache: ArrayLike,
    dst: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: str = "auto",
    scale: Scale = None,
    *,
    scale_cache: ArrayLike | None = None,
    layout: str = "NHD",
    stream: StreamLike | None = None,
) -> None:
    """Read the tokens in given slots of a paged cache, as numbers, into contiguous rows.

    With ``s = slot_mapping[r]``, row ``r`` of ``dst`` becomes ``src_cache[s // block_size, s %
    block_size]``, times its scale where ``kv_cache_dtype`` is scaled. A slot may come several
    times. Rows whose slot is negative (padding), and those from ``len(slot_mapping)`` on, are left
    as they are. It reads back what `reshape_and_cache_flash`, `reshape_and_cache` and
    `concat_and_cache_mla` write to the same slots.

    Parameters
    ----------
    src_cache : array [num_blocks, block_size, ...]
        One or more dimensions follow the first two, of any size. Strides are free except the last
        dimension's, which is contiguous. Of any supported dtype for a raw copy; otherwise of the
        8-bit dtype stored, or uint8.
    dst : array [at least num_slots, ...]
        Written in place; inner dimensions of ``src_cache``, strides as free as there. Of the dtype
        of ``src_cache`` for a raw copy; otherwise float16, bfloat16 or float32.
    slot_mapping : int32 or int64 array [num_slots]
        ``block * block_size + offset`` of each row; contiguous.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw copy. "fp8" or "fp8_e4m3", "fp8_e5m2",
        "int8": stored * scale, in float32, rounded to nearest even. With ``scale_cache`` "int8",
        "fp8" or "fp8_e4m3", "int8_per_token_head" or "fp8_per_token_head".
    scale : float, float32 array [1] or [num_kv_heads], or None
        An array is read on its device; one scale for each head is for caches that have heads, which
        are then the first dimension of a token. None is 1.0. Used by the 8-bit dtypes only.
    scale_cache : float32 array [num_blocks, block_size, num_kv_heads], optional
        A scale for each token and head, as `reshape_and_cache_flash_per_token_head` writes them;
        any strides. Then ``scale`` is None.
    layout : str
        The dimensions of ``src_cache``, where they are others: see `gather_cache`.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``dst``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    A slot past the cache is skipped and recorded (see `raise_faults`) under its row, with the
    argument ``slot_mapping``. A stored NaN gives a NaN; which one is not defined.
    """
    array, number = gathering.scales(NAME, kv_cache_dtype, scale, scale_cache)
    options = layout, kv_cache_dtype, scale_cache is not None
    OP((src_cache, dst, slot_mapping, array), options, stream, (number,))


def _plan(op, described, options):
    src, dst, slots, scale = described
    check = contract.Contract(op.name)
    moved = gathering.movement(check, src, dst, scale, *options)
    check.indices("slot_mapping", slots)
    if dst.device.kind == "cpu":
        run = functools.partial(cpu.gather_slots, op=op.name, side=moved)
        return plans.NumPyPlan(run, op.args, described, ("src_cache", "dst"))
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"gather_slots<{moved.converter}, {moved.vector}, {moved.outer}, {moved.heads}, "
        f"{moved.length}, {moved.scale_heads}, {moved.block_size}, {moved.group}, "
        f"{spelling.indices(slots)}, {moved.per_thread}, {gathering.MAX_THREADS}>",
        PARAMS,
        guarded=("slot_mapping",),
        converts=moved.stored is not None,
    )
    device, constants = dst.device.index, (0, src.shape[0], *moved.strides)
    return plans.flat(kernel, device, constants, moved.threads, gathering.MAX_THREADS)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("src_cache"),
        dispatch.Arg("dst", varies=dispatch.ROWS, written=True),
        dispatch.Arg("slot_mapping", varies=dispatch.ROWS, index=True),
        dispatch.Arg("scale", optional=True),
    ),
    plan=_plan,
    destination=1,
    count=contract.slot_count(NAME, "dst", scales=1),
    options=("layout", "kv_cache_dtype"),
)
