# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the pages of sequences into contiguous rows."""

from __future__ import annotations

from .. import errors
from ..runtime import contract
from ..types import ArrayLike, StreamLike
from .shared import gathering

NAME = "gather_cache"


def gather_cache(
    src_cache: ArrayLike,
    dst: ArrayLike,
    block_table: ArrayLike,
    cu_seq_lens: ArrayLike,
    seq_starts: ArrayLike | None = None,
    *,
    layout: str = "NHD",
    stream: StreamLike | None = None,
) -> None:
    """Copy the tokens of several sequences out of a paged cache into contiguous rows.

    Sequence ``b`` owns the rows ``cu_seq_lens[b] <= r < cu_seq_lens[b + 1]`` of ``dst``. With
    ``p = seq_starts[b] + r - cu_seq_lens[b]``, row ``r`` becomes
    ``src_cache[block_table[b, p // block_size], p % block_size]``. Rows below ``cu_seq_lens[0]``
    and from ``cu_seq_lens[B]`` on are left as they are.

    Parameters
    ----------
    src_cache : array [num_blocks, block_size, ...]
        Of any supported dtype; the bytes are copied as they are. One or more dimensions follow the
        first two: [head size] for multi-head latent attention, [heads, head size] for the others.
        Strides are free except the last dimension's, which is contiguous: NHD, HND as a permuted
        view, and views of packed pages all work. For other dimensions see ``layout``.
    dst : array [num_rows, ...]
        Written in place; dtype and inner dimensions of ``src_cache``; strides as free as there.
        Of the inner dimensions, all that are adjacent in both arrays count as one; two more are
        allowed.
    block_table : int32 or int64 array [B, W]
        Block numbers of each sequence; the last dimension contiguous.
    cu_seq_lens : int32 or int64 array [B + 1]
        Where each sequence's rows start in ``dst``, and where the last one's end; never
        descending; contiguous. Rows that ``dst`` does not have are dropped, without a fault.
    seq_starts : int32 or int64 array [B], optional
        The position in its sequence, in tokens, from which each sequence is read; any value, not
        only multiples of the block size. By default 0.
    layout : str
        The dimensions of ``src_cache``. "NHD", "HND", "packed" and "rows" all mean those above.
        For one cache of `reshape_and_cache`, of which a row is a token's [num_kv_heads, head_size]:
        "x-packed-key" [num_blocks, num_kv_heads, head_size / x, block_size, x], "x-packed-value"
        [num_blocks, num_kv_heads, head_size, block_size], and "interleaved-value" [num_blocks,
        num_kv_heads, block_size / x, head_size, x]. x is whatever the array says; strides are free,
        except that the last dimension of keys is contiguous.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``dst``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    A row that would be read from outside the table or the cache is skipped, and recorded under its
    number (see `raise_faults`). The argument is ``seq_starts`` where the start is outside 0..W *
    block_size - 1. It is ``block_table`` where the page is not below W, and the value recorded is
    then the page; or where the block number is outside 0..num_blocks - 1.

    A number of ``cu_seq_lens`` below the one before is recorded under its place. A row that lies
    between the bounds of several sequences is then that of one of them, or left as it is; the same
    on CPU and GPU.

    The mapping is that of vLLM's ``cp_gather_cache``.
    """
    OP((src_cache, dst, block_table, cu_seq_lens, seq_starts), (layout,), stream)


def _count(extents):
    rows, sequences, bounds, starts = extents
    contract.check_sequence_count(NAME, "block_table", sequences)
    if bounds != sequences + 1:
        expected = f"[{sequences + 1}], one more than the rows of block_table"
        raise errors.wrong("shape", f"{NAME}: cu_seq_lens", expected, f"[{bounds}]")
    if starts not in (None, sequences):
        expected = f"[{sequences}], the rows of block_table"
        raise errors.wrong("shape", f"{NAME}: seq_starts", expected, f"[{starts}]")
    return rows, sequences


OP = gathering.op(
    NAME,
    lambda op, described, options: gathering.plan(op, described, *options),
    _count,
    options=("layout",),
)
