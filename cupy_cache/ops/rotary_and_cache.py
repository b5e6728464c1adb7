# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Rotating one step's queries and keys, and writing keys and values into a cache, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, SupportsIndex

from ..runtime import contract, formats
from ..types import ArrayLike, Scale, StreamLike
from .shared import rotary

NAME = "rotary_and_cache"
CALL = rotary.Call(NAME, needed=rotary.ROLES[:8])


def rotary_and_cache(
    positions: ArrayLike,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cos_sin_cache: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    slot_mapping: ArrayLike,
    is_neox: bool = True,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    *,
    rope_dim_offset: SupportsIndex = 0,
    mrope_section: Sequence[SupportsIndex] | None = None,
    mrope_interleaved: bool = False,
    norm_eps: float | None = None,
    q_norm_weight: ArrayLike | None = None,
    k_norm_weight: ArrayLike | None = None,
    norm_weight_bias: float = 0.0,
    out: ArrayLike | None = None,
    out_dtype: str = "auto",
    q_scale: Scale = None,
    k_scale_cache: ArrayLike | None = None,
    v_scale_cache: ArrayLike | None = None,
    rounding: Literal["once", "steps"] = "once",
    stream: StreamLike | None = None,
) -> None:
    """Rotate one step's queries and keys by the angles of their positions, and write the keys and
    the values into their slots of a paged cache: all that is between a layer's projection and its
    attention, in one launch.

    The queries are rotated in place, or written to ``out``; ``key`` and ``value`` stay as they are.

    Parameters
    ----------
    positions : int32 or int64 array [num_tokens]
        With ``mrope_section`` [3, num_tokens]: of time, height and width. A token with a position
        outside the table is skipped, its queries, keys and values, and recorded (see
        `raise_faults`).
    query : array [num_tokens, num_heads, head_size] or [num_tokens, num_heads * head_size]
        float16, bfloat16 or float32; the last dimension contiguous. Rotated in place without
        ``out``. Further rows are ignored, here and in ``key``, ``value`` and ``out``.
    key : array [num_slots, num_kv_heads, head_size] or [num_slots, num_kv_heads * head_size]
        Of the dtype of ``query``. With ``value``, they may all be views of one packed projection.
    value : array [num_slots, num_kv_heads, head_size_v] or the same in two dimensions
        Likewise; its head size may differ.
    cos_sin_cache : array [max_position, rotary_dim]
        For each position the cosines of rotary_dim / 2 angles, then their sines; of the dtype of
        ``query``, or float32. The last dimension contiguous.
    key_cache, value_cache : array
        Written in place, as by `reshape_and_cache_flash`, or, where ``key_cache`` has five
        dimensions, by `reshape_and_cache`; five of ``value_cache`` mean interleaved values. With
        scale caches as by `reshape_and_cache_flash_per_token_head`.
    slot_mapping : int32 or int64 array [num_slots], at most num_tokens
        Negative slots are padding, and so are tokens beyond num_slots: only their queries are
        rotated. Slots past the cache are skipped and recorded. Of a slot that occurs twice nothing
        is defined: parts of each token may stay.
    is_neox : bool
        Whether element ``i`` of the rotated ones turns together with ``i + rotary_dim / 2``
        (NeoX), or ``2 * i`` with ``2 * i + 1`` (GPT-J).
    kv_cache_dtype, k_scale, v_scale
        As for the function that writes such caches.
    rope_dim_offset : int
        The first element of a head that is rotated; rotary_dim are, the others stay.
    mrope_section : three integers, optional
        How many of the rotary_dim / 2 pairs turn by time, by height and by width.
    mrope_interleaved : bool
        Whether they take turns: pair ``i`` turns by height where ``i % 3 == 1`` and ``i < 3 *
        mrope_section[1]``, by width where ``i % 3 == 2`` and ``i < 3 * mrope_section[2]``, by time
        elsewhere. Else the pairs of time come first, then those of height, then those of width.
    norm_eps : float, optional
        Normalise each head of queries and keys first: ``x / sqrt(mean(x * x) + norm_eps) *
        (weight + norm_weight_bias)``. 0, or at least 2^-126. None: they are not.
    q_norm_weight, k_norm_weight : array [head_size], optional
        Of the dtype of ``query``, or float32. Without one there is no such factor.
    norm_weight_bias : float
        1.0 for models whose weights are kept less one.
    out : array, optional, of the shape of ``query``
        Where rotated queries go. Of the dtype of ``query``, or as ``out_dtype`` says.
    out_dtype : str
        "auto": that of ``query``. "fp8" or "fp8_e4m3", "fp8_e5m2", "int8": query / q_scale, rounded
        as `reshape_and_cache_flash` rounds. ``out`` has this dtype or is uint8.
    q_scale : float, or float32 array [1], [num_heads] or of no dimensions, optional
        What an element of an 8-bit ``out`` is multiplied with to give the query. None is 1.0.
    k_scale_cache, v_scale_cache : float32 array [num_blocks, block_size, num_kv_heads], optional
        Written in place: each head of each token gets a scale of its own, see
        `reshape_and_cache_flash_per_token_head`.
    rounding : {"once", "steps"}
        "once": normalising, rotating and quantising are float32, and the result is rounded once.
        "steps": what is normalised is rounded to the dtype of ``query``, and what is rotated too,
        as where each step is a kernel of its own, and in vLLM 0.33.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``key_cache``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    A pair (x, y) becomes (x * cos - y * sin, y * cos + x * sin): float32 products, each rounded,
    and a float32 sum, on every backend the same. The order in which squares are added up is not:
    where heads are normalised, results may differ in the last place. They may differ further where
    ``norm_eps`` is below 1e-30, as sums of squares below 2^-126 are 0 on a GPU.

    A NaN is stored with all bits but the sign set.

    Into x-packed caches values go as `reshape_and_cache` writes them: those of consecutive slots
    together, others element by element, each of which costs a whole memory sector.
    """
    arrays, (k_number, v_number) = (None, None), (1.0, 1.0)
    if k_scale_cache is None and formats.is_scaled(kv_cache_dtype):
        arrays, (k_number, v_number) = contract.split_scales(NAME, kv_cache_dtype, k_scale, v_scale)
    q_array, q_number = None, 1.0
    if formats.is_scaled(out_dtype):
        q_array, q_number = contract.split_scale(NAME, "q_scale", q_scale)
    op, options, scalars = CALL.settle(
        is_neox=is_neox, kv_cache_dtype=kv_cache_dtype, out_dtype=out_dtype, rounding=rounding,
        offset=rope_dim_offset, sections=mrope_section, interleaved=mrope_interleaved,
        norm_eps=norm_eps, norm_weight_bias=norm_weight_bias, q_scale=q_number, k_scale=k_number,
        v_scale=v_number,
    )  # fmt: skip
    objects = (
        positions, query, key, value, cos_sin_cache, key_cache, value_cache, slot_mapping,
        None if out is query else out, q_norm_weight, k_norm_weight, q_array, *arrays,
        k_scale_cache, v_scale_cache,
    )  # fmt: skip
    op(objects, options, stream, scalars)
