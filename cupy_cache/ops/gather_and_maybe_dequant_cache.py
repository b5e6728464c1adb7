# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the pages of sequences into contiguous rows of numbers."""

from __future__ import annotations

from ..runtime import contract
from ..types import ArrayLike, Scale, StreamLike
from .shared import gathering

NAME = "gather_and_maybe_dequant_cache"


def gather_and_maybe_dequant_cache(
    src_cache: ArrayLike,
    dst: ArrayLike,
    block_table: ArrayLike,
    cu_seq_lens: ArrayLike,
    token_to_seq: object,
    num_tokens: int,
    kv_cache_dtype: str,
    scale: Scale,
    seq_starts: ArrayLike | None = None,
    *,
    scale_cache: ArrayLike | None = None,
    layout: str = "NHD",
    stream: StreamLike | None = None,
) -> None:
    """Read the tokens of several sequences out of a paged cache, as numbers, into contiguous rows.

    Sequence ``b`` owns the rows ``cu_seq_lens[b] <= r < cu_seq_lens[b + 1]`` of ``dst``, as far as
    they are below ``num_tokens``; other rows are left as they are. With ``p = seq_starts[b] + r -
    cu_seq_lens[b]``, row ``r`` becomes ``src_cache[block_table[b, p // block_size], p %
    block_size]``, times its scale where ``kv_cache_dtype`` is scaled.

    Parameters
    ----------
    src_cache : array [num_blocks, block_size, ...]
        One or more dimensions follow the first two, of any size. Strides are free except the last
        dimension's, which is contiguous. Of any supported dtype for a raw copy; otherwise of the
        8-bit dtype stored, or uint8.
    dst : array [at least num_tokens, ...]
        Written in place; inner dimensions of ``src_cache``, strides as free as there. Of the dtype
        of ``src_cache`` for a raw copy; otherwise float16, bfloat16 or float32.
    block_table : int32 or int64 array [at least B, W]
        Block numbers of each sequence; the last dimension contiguous.
    cu_seq_lens : int32 or int64 array [B + 1]
        Where each sequence's rows start in ``dst``, and where the last one's end; never
        descending; contiguous. Rows that ``dst`` does not have are dropped, without a fault.
    token_to_seq : ignored
        It has its place in vLLM's order of arguments.
    num_tokens : int
        Rows from here on are not written.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw copy. "fp8" or "fp8_e4m3", "fp8_e5m2",
        "int8": stored * scale, in float32, rounded to nearest even. With ``scale_cache`` "int8",
        "fp8" or "fp8_e4m3", "int8_per_token_head" or "fp8_per_token_head".
    scale : float, float32 array [1] or [num_kv_heads], or None
        An array is read on its device; one scale for each head is for caches that have heads, which
        are then the first dimension of a token. None is 1.0. Used by the 8-bit dtypes only.
    seq_starts : int32 or int64 array [at least B], optional
        The position in its sequence, in tokens, from which each sequence is read; any value, not
        only multiples of the block size. By default 0.
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
    Values out of range are skipped and recorded as by `gather_cache`. A stored NaN gives a NaN;
    which one is not defined.

    Names, order and meaning are those of vLLM's cache operation of the same name (0.33).
    """
    del token_to_seq
    num_tokens = contract.integer(NAME, "num_tokens", num_tokens, 0)
    array, number = gathering.scales(NAME, kv_cache_dtype, scale, scale_cache)
    arrays = src_cache, dst, block_table, cu_seq_lens, seq_starts, array
    options = layout, kv_cache_dtype, scale_cache is not None
    OP(arrays, options, stream, (number, num_tokens))


def _count(extents, num_tokens):
    rows, table_rows, bounds, starts = extents
    return gathering.count_rows(NAME, rows, num_tokens, bounds, table_rows, starts, "dst")


OP = gathering.op(
    NAME,
    lambda op, described, options: gathering.plan(op, described, *options),
    _count,
    options=("layout", "kv_cache_dtype"),
)
