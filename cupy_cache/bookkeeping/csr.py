# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Block tables as FlashInfer takes them, and back: rows of blocks one behind the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import errors
from ..runtime import arrays, contract, dlpack, formats, making, tracing
from ..types import ArrayLike

LARGEST = 2**31 - 1


def block_table_to_csr(
    block_table: ArrayLike, seq_lens: ArrayLike, block_size: int
) -> tuple[Any, Any, Any]:
    """Turn a block table and lengths into FlashInfer's indptr, indices and last_page_len.

    Sequence ``b`` has the blocks ``indices[indptr[b]] … indices[indptr[b + 1] - 1]``, as many as
    its tokens need, of which the last one holds ``last_page_len[b]`` tokens.

    Parameters
    ----------
    block_table : int32 or int64 array [at least B, width]
        Block numbers of each sequence, in host memory: how many there are in all decides how large
        the result is.
    seq_lens : int32 or int64 array [B]
        Tokens of each sequence, likewise; any stride.
    block_size : int

    Returns
    -------
    indptr : int32 array [B + 1]
    indices : int32 array [indptr[B]]
    last_page_len : int32 array [B]
        0 for a sequence without tokens. All three are new arrays in host memory, of the framework
        of ``block_table`` (of NumPy where that one's arrays cannot be written).

    Raises
    ------
    CupyCacheError
        One of its kinds.

    Notes
    -----
    The three are those of FlashInfer's ``plan`` (0.7: ``paged_kv_indptr``, ``paged_kv_indices``,
    ``paged_kv_last_page_len``).

    Examples
    --------
    >>> block_table_to_csr(np.array([[7, 3], [5, -1]]), np.array([6, 4]), 4)
    (array([0, 2, 3], dtype=int32), array([7, 3, 5], dtype=int32), array([2, 4], dtype=int32))
    """
    op = "block_table_to_csr"
    block_size = _block_size(op, block_size)
    check = contract.Contract(op)
    table, like = _host(check, "block_table", block_table, "_ _")
    lens, _ = _host(check, "seq_lens", seq_lens, "_")
    if len(table) < len(lens):
        expected = f"at least {errors.counted(len(lens), 'row')}, as many as seq_lens has"
        raise errors.wrong("shape", f"{op}: block_table", expected, list(table.shape))
    table, width = table[: len(lens)], table.shape[1]
    _in_range(op, "seq_lens", lens, 0, width * block_size)
    pages = -(-lens // block_size)
    indptr = np.concatenate([[0], np.cumsum(pages)])
    _in_range(op, "seq_lens", indptr[-1:] * block_size, 0, LARGEST * block_size)
    used = np.arange(width) < pages[:, None]
    _in_range(op, "block_table", np.where(used, table, 0), 0, LARGEST)
    indices = table[used]
    last = np.where(lens > 0, (lens - 1) % block_size + 1, 0)
    return _as_arrays(op, like, indptr, indices, last)


def csr_to_block_table(
    indptr: ArrayLike,
    indices: ArrayLike,
    last_page_len: ArrayLike,
    block_size: int,
    *,
    width: int | None = None,
) -> tuple[Any, Any]:
    """Turn FlashInfer's indptr, indices and last_page_len into a block table and lengths: the
    inverse of `block_table_to_csr`.

    Parameters
    ----------
    indptr : int32 or int64 array [B + 1]
        In host memory, as all; never descending, from 0 on or later.
    indices : int32 or int64 array [at least indptr[B]]
    last_page_len : int32 or int64 array [B]
        From 1 to ``block_size``; of a sequence without blocks it is not looked at.
    block_size : int
    width : int, optional
        Of the table; by default what the longest sequence needs.

    Returns
    -------
    block_table : int32 array [B, width]
        -1 after a sequence's last block.
    seq_lens : int32 array [B]
        New arrays, as those of `block_table_to_csr`.

    Raises
    ------
    CupyCacheError
        One of its kinds.

    Examples
    --------
    >>> csr_to_block_table(np.array([0, 2, 3]), np.array([7, 3, 5]), np.array([2, 4]), 4)
    (array([[ 7,  3],
           [ 5, -1]], dtype=int32), array([6, 4], dtype=int32))
    """
    op = "csr_to_block_table"
    block_size = _block_size(op, block_size)
    check = contract.Contract(op)
    bounds, like = _host(check, "indptr", indptr, "_")
    blocks, _ = _host(check, "indices", indices, "_")
    last, _ = _host(check, "last_page_len", last_page_len, "_")
    if len(bounds) != len(last) + 1:
        expected = f"[{len(last) + 1}], one more than last_page_len has"
        raise errors.wrong("shape", f"{op}: indptr", expected, f"[{len(bounds)}]")
    pages = np.diff(bounds)
    _in_range(op, "indptr", bounds, 0, len(blocks))
    if (pages < 0).any():
        row = int(np.argmax(pages < 0))
        got = f"{bounds[row + 1]} behind {bounds[row]} in row {row}"
        expected = "bounds that never descend"
        raise errors.wrong("value", f"{op}: indptr", expected, got)
    most = int(pages.max(initial=0))
    width = most if width is None else contract.integer(op, "width", width, 0)
    if width < most:
        expected = f"at least {most}, the blocks of the longest sequence"
        raise errors.wrong("value", f"{op}: width", expected, width)
    last = np.where(pages > 0, last, block_size)
    _in_range(op, "last_page_len", last, 1, block_size)
    lens = np.where(pages > 0, (pages - 1) * block_size + last, 0)
    _in_range(op, "indptr", lens, 0, LARGEST)
    used = blocks[bounds[0] : bounds[-1]]
    _in_range(op, "indices", used, 0, LARGEST)
    table = np.full((len(pages), width), -1, np.int64)
    table[np.arange(width) < pages[:, None]] = used
    return _as_arrays(op, like, table, lens)


def _block_size(op, block_size):
    found = contract.integer(op, "block_size", block_size, 1)
    if found > LARGEST:  # times numbers of blocks it would not fit 64 bits
        raise errors.wrong("value", f"{op}: block_size", f"1..{LARGEST}", block_size)
    return found


def _host(check, name, array, pattern):
    """Numbers in host memory as an int64 NumPy array, and what describes them."""
    if arrays.is_torch(array):
        tracing.refuse(f"{check.op}: {name}")
    # What owns an export lives until the numbers are copied.
    metadata = arrays.read(array, f"{check.op}: {name}", dlpack.LOOK)
    view = arrays.describe(metadata, f"{check.op}: {name}")
    check.shape(name, view, pattern)
    check.dtype(name, view, *formats.INDICES)
    if view.device.kind != "cpu":
        way_out = "how many blocks there are decides how large the result is: copy it to the host"
        got = str(view.device)
        raise errors.wrong("device", f"{check.op}: {name}", "host memory", got, way_out)
    found = arrays.as_numpy(view.ptr, view.shape, view.strides, view.dtype.numpy)
    return found.astype(np.int64), view


def _in_range(op, name, values, least, most):
    bad = (values < least) | (values > most)
    if bad.any():
        row = int(np.argmax(bad.reshape(len(values), -1).any(axis=1)))
        got = f"{values[bad][0]} in row {row}"
        raise errors.wrong("value", f"{op}: {name}", f"{least}..{most}", got)


def _as_arrays(op, like, *results):
    """New int32 arrays of the framework of ``like``."""
    made = []
    for result in results:
        array = making.empty(like.framework, like.device, result.shape, formats.INT32)
        view = arrays.view(array, f"{op}: result")
        arrays.as_numpy(view.ptr, view.shape, view.strides, np.dtype(np.int32))[...] = result
        made.append(array)
    return tuple(made)
