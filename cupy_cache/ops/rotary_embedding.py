# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Rotating queries and keys where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from ..runtime import contract
from ..types import ArrayLike, StreamLike
from .shared import rotary

NAME = "rotary_embedding"
CALL = rotary.Call(NAME, needed=("positions", "query", "cos_sin_cache"), key_in_place=True)


def rotary_embedding(
    positions: ArrayLike,
    query: ArrayLike,
    key: ArrayLike | None,
    head_size: SupportsIndex,
    cos_sin_cache: ArrayLike,
    is_neox: bool = True,
    rope_dim_offset: SupportsIndex = 0,
    inverse: bool = False,
    *,
    mrope_section: Sequence[SupportsIndex] | None = None,
    mrope_interleaved: bool = False,
    stream: StreamLike | None = None,
) -> None:
    """Rotate queries and keys, in place, by the angles of their positions.

    Parameters
    ----------
    positions : int32 or int64 array [num_tokens]
        With ``mrope_section`` [3, num_tokens]: of time, height and width. A token with a position
        outside the table stays as it is, and is recorded (see `raise_faults`).
    query : array [num_tokens, num_heads, head_size] or [num_tokens, num_heads * head_size]
        float16, bfloat16 or float32; the last dimension contiguous. Further rows are ignored, here
        and in ``key``.
    key : array [num_tokens, num_kv_heads, head_size] or [num_tokens, num_kv_heads * head_size]
        Likewise, of the dtype of ``query``; None: there are only queries.
    head_size : int
    cos_sin_cache : array [max_position, rotary_dim]
        For each position the cosines of rotary_dim / 2 angles, then their sines; of the dtype of
        ``query``, or float32. The last dimension contiguous.
    is_neox : bool
        Whether element ``i`` of the rotated ones turns together with ``i + rotary_dim / 2``
        (NeoX), or ``2 * i`` with ``2 * i + 1`` (GPT-J).
    rope_dim_offset : int
        The first element of a head that is rotated; rotary_dim are, the others stay.
    inverse : bool
        Turn back: by the negative angles.
    mrope_section, mrope_interleaved
        See `rotary_and_cache`.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``query``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    A pair (x, y) becomes (x * cos - y * sin, y * cos + x * sin): float32 products, each rounded,
    and a float32 sum, which is rounded to the dtype of ``query``. It is the same on every backend.

    Names, order and meaning are those of vLLM's operation of the same name.
    """
    size = contract.integer(NAME, "head_size", head_size, least=1)
    op, options, scalars = CALL.settle(
        is_neox=is_neox, offset=rope_dim_offset, sections=mrope_section,
        interleaved=mrope_interleaved, inverse=inverse, head_size=size,
    )  # fmt: skip
    op((positions, query, key, None, cos_sin_cache), options, stream, scalars)
