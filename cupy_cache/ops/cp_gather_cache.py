# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the pages of sequences into contiguous rows, with vLLM's arguments."""

from __future__ import annotations

from .. import errors
from ..runtime import contract
from ..types import ArrayLike, StreamLike
from .shared import gathering

NAME = "cp_gather_cache"


def cp_gather_cache(
    src_cache: ArrayLike,
    dst: ArrayLike,
    block_table: ArrayLike,
    cu_seq_lens: ArrayLike,
    batch_size: int,
    seq_starts: ArrayLike | None = None,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Copy the tokens of several sequences out of a paged cache into contiguous rows.

    `gather_cache` with vLLM's order of arguments. Sequence ``b < batch_size`` owns the rows
    ``cu_seq_lens[b] <= r < cu_seq_lens[b + 1]`` of ``dst``; other rows are left as they are. With
    ``p = seq_starts[b] + r - cu_seq_lens[b]``, row ``r`` becomes
    ``src_cache[block_table[b, p // block_size], p % block_size]``.

    Parameters
    ----------
    src_cache : array [num_blocks, block_size, ...]
        As for `gather_cache`.
    dst : array [num_rows, ...]
        As for `gather_cache`.
    block_table : int32 or int64 array [at least batch_size, W]
        Block numbers of each sequence; the last dimension contiguous.
    cu_seq_lens : int32 or int64 array [batch_size + 1]
        Where each sequence's rows start in ``dst``, and where the last one's end; never
        descending; contiguous. Rows that ``dst`` does not have are dropped, without a fault.
    batch_size : int
        The number of sequences.
    seq_starts : int32 or int64 array [at least batch_size], optional
        The position in its sequence, in tokens, from which each sequence is read; any value. By
        default 0.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``dst``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Values out of range are skipped and recorded as by `gather_cache`.

    Names, order and meaning are those of vLLM's cache operation of the same name. Elements may have
    any size, and offsets into ``dst`` are not limited to 31 bits.
    """
    batch_size = contract.integer(NAME, "batch_size", batch_size, 0)
    arrays = src_cache, dst, block_table, cu_seq_lens, seq_starts
    OP(arrays, (), stream, (0.0, batch_size))


def _count(extents, batch_size):
    rows, table_rows, bounds, starts = extents
    if bounds != batch_size + 1:
        found = errors.counted(bounds, "bound")
        expected = f"{bounds - 1}, one less than the {found} in cu_seq_lens"
        raise errors.wrong("value", f"{NAME}: batch_size", expected, batch_size)
    gathering.check_sequences(NAME, batch_size, table_rows, starts)
    return rows, batch_size


OP = gathering.op(NAME, lambda op, described, options: gathering.plan(op, described), _count)
