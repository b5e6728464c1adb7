# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into one layer's cache of multi-head latent attention."""

from __future__ import annotations

import functools
from typing import Literal

from .. import cpu
from ..runtime import contract, dispatch, formats, modules, plans, spelling
from ..types import ArrayLike, Scale, StreamLike
from .shared import mla

NAME = "concat_and_cache_mla"
DS_SOURCES = tuple(formats.DTYPES[name] for name in ("float16", "bfloat16"))
DS_THREADS_PER_TOKEN = 32  # a warp
SCALE_RULES = ("power_of_two", "amax")


def concat_and_cache_mla(
    kv_c: ArrayLike,
    k_pe: ArrayLike,
    kv_cache: ArrayLike,
    slot_mapping: ArrayLike,
    kv_cache_dtype: str = "auto",
    scale: Scale = None,
    skip_scale: bool = False,
    *,
    scale_rule: Literal["power_of_two", "amax"] = "power_of_two",
    stream: StreamLike | None = None,
) -> None:
    """Write one step's compressed keys and values into their slots of a paged MLA cache.

    The entry of token ``t`` is ``kv_c[t]`` followed by ``k_pe[t]``. It goes to block
    ``slot_mapping[t] // block_size`` at offset ``slot_mapping[t] % block_size``. The number of
    tokens is ``slot_mapping.shape[0]``; ``kv_c`` and ``k_pe`` may have more rows (padding of a CUDA
    graph), which are ignored.

    Parameters
    ----------
    kv_c : array [num_tokens, kv_lora_rank]
        float16, bfloat16 or float32; the last dimension contiguous, the stride of the rows free.
    k_pe : array [num_tokens, qk_rope_head_dim]
        Like ``kv_c``. May have no columns.
    kv_cache : array [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]
        Written in place; strides are free except the last. Of the same dtype as ``kv_c`` for a raw
        copy; otherwise of the 8-bit dtype stored, or uint8. For "fp8_ds_mla" [num_blocks,
        block_size, 656] of uint8 or any other 8-bit dtype.
    slot_mapping : int64 or int32 array [num_slots]
        Negative slots are padding and skipped. Slots past the cache are skipped and recorded (see
        `raise_faults`). Of a slot that occurs twice nothing is defined: parts of each token may
        stay.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw copy. "fp8" or "fp8_e4m3", "fp8_e5m2",
        "int8": value / scale, rounded and saturated. "fp8_ds_mla": see Notes.
    scale : float, or float32 array of one element, optional
        What a stored element is multiplied with to give the value; for both parts. An array is read
        on its device, and its value is not looked at. None is 1.0. Used by the 8-bit dtypes only.
    skip_scale : bool
        Take 1.0 for ``scale``, whatever it is.
    scale_rule : {"power_of_two", "amax"}
        Of "fp8_ds_mla" alone; see Notes.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``kv_cache``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Names, order and bytes are those of vLLM's cache operation of the same name.

    **fp8_ds_mla** is the entry of DeepSeek V3.2's sparse attention. Bytes 0 to 511 are ``kv_c``
    (512 columns) as e4m3, value / scale, in four tiles of 128. Bytes 512 to 527 are the four tiles'
    scales, float32, little-endian. Bytes 528 to 655 are ``k_pe`` (64 columns) as it is, or zeros
    where it has no columns. Inputs are float16 or bfloat16, and a reader must know which: the rope
    part keeps their bits. float32 is refused, since the rope part has 16 bits for an element.

    With ``a`` the largest absolute value of a tile, its scale is ``2 ** ceil(log2(max(a / 448,
    1e-4)))`` ("power_of_two", vLLM 0.33) or ``max(a / 448, 2 ** -126)`` ("amax", vLLM 0.11);
    readers take either. The power is exact, found from the bits of the quotient. vLLM takes the
    logarithm in float32, which could round down to an integer just above a power of two. But ``a``
    has at most 11 significant bits and 448 is 7 * 64, so ``a / 448`` is a power of two, or at least
    one part in 2047 away from it. Both ways give the same bytes for every input. NaN does not count
    for ``a`` and is stored as 0x7f; an infinite value makes its tile's scale infinite.
    """
    skip = contract.flag(NAME, "skip_scale", skip_scale)
    array, scalars = scales_of("scale", kv_cache_dtype, None if skip else scale)
    OP((kv_c, k_pe, kv_cache, slot_mapping, *array), (kv_cache_dtype, scale_rule), stream, scalars)


def scales_of(name, kv_cache_dtype, scale):
    """The scale, which the caller calls ``name``, as (arrays, floats): the array, or none where the
    float counts. A raw copy has neither."""
    if not formats.is_scaled(kv_cache_dtype):
        return (), ()
    array, number = contract.split_scale(NAME, name, scale)
    return () if array is None else (array,), (number,)


def _plan(op, described, options):
    kv_c, k_pe, kv_cache, slot_mapping, scale = described
    kv_cache_dtype, scale_rule = options
    contract.choice(op.name, "scale_rule", scale_rule, SCALE_RULES)
    check = contract.Contract(op.name)
    check.shape("slot_mapping", slot_mapping, "_")
    if formats.text_of(kv_cache_dtype) == formats.FP8_DS_MLA:
        return _plan_fp8_ds_mla(check, described, scale_rule)
    names = (*formats.CACHE_FORMATS, formats.FP8_DS_MLA)
    fmt = formats.cache_format(op.name, kv_cache_dtype, names)
    check.shape("kv_c", kv_c, "_ kv_lora_rank")
    check.shape("k_pe", k_pe, "_ qk_rope_head_dim")
    check.shape("kv_cache", kv_cache, "num_blocks block_size _")
    mla.check_entries(check, _named(described), fmt.storage)
    if scale is not None:
        check.scale("scale", scale)

    if kv_cache.device.kind == "cpu":
        run = functools.partial(cpu.concat_and_cache_mla, source=kv_c.dtype, stored=fmt.stored)
        return _cpu_plan(run, described)

    kernel, items = mla.entry_kernel(
        op.name, "kOne", kv_c, k_pe, kv_cache, fmt.stored, slot_mapping, mla.ONE_LAYER
    )
    return _gpu_plan(kernel, items, described)


def _plan_fp8_ds_mla(check, described, scale_rule):
    kv_c, k_pe, kv_cache, slot_mapping, _ = described
    check.shape("kv_c", kv_c, f"_ {formats.DS_LATENT}")
    check.shape("k_pe", k_pe, f"_ {formats.DS_ROPE if k_pe.shape[-1:] != (0,) else 0}")
    check.shape("kv_cache", kv_cache, f"num_blocks block_size {formats.DS_ENTRY_BYTES}")
    check.dtype("kv_c", kv_c, *DS_SOURCES)
    check.dtype("kv_cache", kv_cache, *formats.BYTES)
    mla.check_arrays(check, _named(described))

    power_of_two, rope = scale_rule == "power_of_two", k_pe.shape[1] > 0
    if kv_cache.device.kind == "cpu":
        run = functools.partial(
            cpu.concat_and_cache_fp8_ds_mla, source=kv_c.dtype, power_of_two=power_of_two
        )
        return _cpu_plan(run, described)

    source_vector = contract.vector_bytes(*contract.row_starts(kv_c, *[k_pe] * rope))
    cache_vector = contract.vector_bytes(kv_cache.ptr, *kv_cache.strides[:2])
    arguments = (
        "concat_and_cache_fp8_ds_mla", spelling.element(kv_c.dtype), power_of_two, source_vector,
        cache_vector, rope, kv_cache.shape[1], spelling.indices(slot_mapping), mla.MAX_THREADS,
    )  # fmt: skip
    kernel = modules.Kernel(
        check.op,
        mla.STEM,
        spelling.instance(*arguments),
        mla.ONE_LAYER,
        guarded=("slot_mapping",),
        converts=True,
    )
    return _gpu_plan(kernel, DS_THREADS_PER_TOKEN, described)


def _named(described):
    """The arrays but for the scale, by their names."""
    return {arg.name: array for arg, array in zip(OP.args[:4], described)}


def _cpu_plan(run, described):
    return plans.NumPyPlan(run, OP.args, described, ("kv_c", "k_pe", "kv_cache"))


def _gpu_plan(kernel, items, described):
    kv_c, k_pe, kv_cache, slot_mapping, _ = described
    constants = (
        *(0,) * 5, kv_cache.shape[0], kv_c.strides[0], k_pe.strides[0], slot_mapping.strides[0],
        *kv_cache.strides[:2],
    )  # fmt: skip
    return plans.full(kernel, kv_cache.device.index, constants, items, mla.MAX_THREADS)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("kv_c", varies=dispatch.ROWS),
        dispatch.Arg("k_pe", varies=dispatch.ROWS),
        dispatch.Arg("kv_cache", written=True),
        dispatch.Arg("slot_mapping", varies=dispatch.ROWS, index=True),
        dispatch.Arg("scale", optional=True),
    ),
    plan=_plan,
    destination=2,
    count=contract.slot_count(NAME, "kv_c", "k_pe", scales=1),
    options=("kv_cache_dtype", "scale_rule"),
)
