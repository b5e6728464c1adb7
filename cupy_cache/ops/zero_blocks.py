# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Filling chosen blocks of all layers with zeros."""

from __future__ import annotations

from ..types import Indices, LayersOrPairs, StreamLike
from .shared import packing


def zero_blocks(
    caches: LayersOrPairs, block_ids: Indices, *, stream: StreamLike | None = None
) -> None:
    """Fill whole blocks of every layer with zero bytes.

    On a GPU it is one launch that can be captured in a CUDA graph; what does not fit one launch's
    parameters (with 32 layers of keys and values, more than 832 block numbers) takes several.

    Parameters
    ----------
    caches : list of arrays [num_blocks, ...], or list of (key_cache, value_cache)
        One entry for each layer, all alike in shape, strides, dtype (any) and device; keys and
        values may differ from each other. Blocks may have gaps between and inside them (views of
        packed pages); only their elements are written.
    block_ids : sequence of int, or int32 or int64 array [n]
        In host memory they are checked before anything is written. On the caches' GPU they are used
        where they are: numbers out of range are skipped and recorded (see `raise_faults`).
        Repetitions do no harm.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns the caches.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    OP(caches, block_ids, stream)


OP = packing.Operation("zero_blocks", packing.ZERO)
