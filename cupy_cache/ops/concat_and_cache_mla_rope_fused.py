# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Rotating queries and keys of multi-head latent attention, and writing its entries, in one
launch."""

from __future__ import annotations

from ..runtime import contract, formats
from ..types import ArrayLike, Scale, StreamLike
from .shared import rotary

NAME = "concat_and_cache_mla_rope_fused"
CALL = rotary.Call(
    NAME,
    needed=("positions", "query", "key", "value", "cos_sin_cache", "key_cache", "slot_mapping"),
    key_in_place=True,
    entries=True,
    called={
        "query": "q_pe", "key": "k_pe", "value": "kv_c", "key_cache": "kv_cache",
        "k_scale": "kv_cache_scale", "v_scale": "kv_cache_scale",
    },
)  # fmt: skip


def concat_and_cache_mla_rope_fused(
    positions: ArrayLike,
    q_pe: ArrayLike,
    k_pe: ArrayLike,
    kv_c: ArrayLike,
    cos_sin_cache: ArrayLike,
    is_neox: bool,
    slot_mapping: ArrayLike,
    kv_cache: ArrayLike,
    kv_cache_dtype: str = "auto",
    kv_cache_scale: Scale = None,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Rotate ``q_pe`` and ``k_pe`` in place by the angles of their positions, and write the entries
    [kv_c | rotated k_pe] into their slots of a paged MLA cache.

    Parameters
    ----------
    positions : int32 or int64 array [num_tokens]
        A token with a position outside the table is skipped in every array, and recorded (see
        `raise_faults`).
    q_pe : array [num_tokens, num_heads, qk_rope_head_dim]
        float16, bfloat16 or float32; the last dimension contiguous. Further rows are ignored, here
        and in ``k_pe`` and ``kv_c``.
    k_pe : array [num_tokens, qk_rope_head_dim]
        Likewise, of the dtype of ``q_pe``.
    kv_c : array [num_slots, kv_lora_rank]
        Likewise. Only read.
    cos_sin_cache : array [max_position, rotary_dim]
        For each position the cosines of rotary_dim / 2 angles, then their sines; of the dtype of
        ``q_pe``, or float32. The last dimension contiguous. rotary_dim is at most
        qk_rope_head_dim: further elements stay as they are.
    is_neox : bool
        Whether element ``i`` of the rotated ones turns together with ``i + rotary_dim / 2``
        (NeoX), or ``2 * i`` with ``2 * i + 1`` (GPT-J).
    slot_mapping : int32 or int64 array [num_slots], at most num_tokens
        Negative slots are padding, and so are tokens beyond num_slots: they are rotated, and not
        written. Slots past the cache are skipped and recorded. Of a slot that occurs twice nothing
        is defined: parts of each token may stay.
    kv_cache : array [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]
        Written in place, as by `concat_and_cache_mla`.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": of the dtype of ``q_pe``. "fp8" or "fp8_e4m3",
        "fp8_e5m2", "int8": value / kv_cache_scale, rounded and saturated.
    kv_cache_scale : float, or float32 array of one element, optional
        What a stored element is multiplied with to give the value. None is 1.0.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``kv_cache``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    A pair (x, y) becomes (x * cos - y * sin, y * cos + x * sin): float32 products, each rounded,
    and a float32 sum. The sum is rounded once: to the dtype of ``q_pe``, or, divided by the scale,
    to what the cache stores.

    Names and order are those of vLLM's operation of the same name, which rounds every product to
    the dtype of ``q_pe``, and leaves tokens without a slot unrotated.
    """
    array, number = None, 1.0
    if formats.is_scaled(kv_cache_dtype):
        array, number = contract.split_scale(NAME, "kv_cache_scale", kv_cache_scale)
    op, options, scalars = CALL.settle(
        is_neox=is_neox, kv_cache_dtype=kv_cache_dtype, k_scale=number, v_scale=number
    )
    objects = (
        positions, q_pe, k_pe, kv_c, cos_sin_cache, kv_cache, None, slot_mapping, None, None, None,
        None, array, array,
    )  # fmt: skip
    op(objects, options, stream, scalars)
