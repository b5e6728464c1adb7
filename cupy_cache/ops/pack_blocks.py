# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Chosen blocks or tokens of all layers to and from one contiguous buffer: for sending a sequence
to another machine, or storing it."""

from __future__ import annotations

from .. import errors
from ..runtime import contract
from ..types import ArrayLike, Indices, LayersOrPairs, PackedLayout, StreamLike
from .shared import packing


def pack_blocks(
    caches: LayersOrPairs,
    block_ids: Indices,
    out: ArrayLike,
    *,
    layout: PackedLayout = "layer_first",
    stream: StreamLike | None = None,
) -> None:
    """Copy chosen blocks of every layer into one contiguous buffer.

    On a GPU it is one launch, into GPU memory or directly into pinned host memory. Block numbers in
    host memory travel inside the kernel's parameters: nothing is uploaded, nothing waits, and the
    call can be captured in a CUDA graph. What does not fit one launch's parameters (with 32 layers
    of keys and values, more than 832 numbers) takes several. Into host memory that is not pinned
    the bytes go through a buffer on the GPU, and the call may wait.

    Parameters
    ----------
    caches : list of arrays [num_blocks, ...], or list of (key_cache, value_cache)
        One entry for each layer, all alike in shape, strides, dtype (any) and device; keys and
        values may differ from each other. Blocks may have gaps between and inside them.
    block_ids : sequence of int, or int32 or int64 array [n]
        In host memory they are checked before anything is written. On the caches' GPU they are used
        where they are: numbers out of range are skipped, so that the buffer keeps its bytes there,
        and recorded (see `raise_faults`).
    out : contiguous array
        Of any dtype and any shape with at least one dimension, on the caches' device or in host
        memory, apart from the caches. Its first bytes are written: `packed_size` tells how many.
    layout : {"layer_first", "page_first"}
        The order in the buffer. With B the bytes of a layer's block, Bk of its key and Bv of its
        value block (B = Bk + Bv; without values Bv = 0), L layers and n block numbers, block i of
        layer l starts at byte

        * "layer_first", [L, 2, n, block]: ``l*n*B + i*Bk`` (key), ``l*n*B + n*Bk + i*Bv`` (value)
        * "page_first", [n, L, 2, block]: ``i*L*B + l*B`` (key), ``i*L*B + l*B + Bk`` (value)

        Inside a block elements are in the order of the view's dimensions, whatever its strides are:
        NHD and HND caches, viewed as [num_blocks, block_size, heads, head_size], give the same
        bytes.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``out``, if that
        is on a GPU, else of the one that owns the caches.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.

    See Also
    --------
    unpack_blocks, pack_tokens, packed_size

    Notes
    -----
    Buffers with keys and values outermost, [2, L, n, block] or [2, n, L, block], are made by two
    calls with half of the buffer each.

    Examples
    --------
    >>> key_cache = np.arange(32, dtype=np.float32).reshape(4, 2, 1, 4)  # 4 blocks of 2 tokens
    >>> layers = [(key_cache, -key_cache)]
    >>> buffer = np.empty(packed_size(layers, num_blocks=2), np.uint8)
    >>> pack_blocks(layers, [2, 0], buffer)
    >>> buffer.view(np.float32)[:4]  # of block 2
    array([16., 17., 18., 19.], dtype=float32)
    """
    PACK_BLOCKS(caches, block_ids, stream, out, layout=layout)


def unpack_blocks(
    packed: ArrayLike,
    caches: LayersOrPairs,
    block_ids: Indices,
    *,
    layout: PackedLayout = "layer_first",
    stream: StreamLike | None = None,
) -> None:
    """Copy blocks out of one contiguous buffer into every layer: the reverse of `pack_blocks`.

    Parameters
    ----------
    packed : contiguous array
        As ``out`` of `pack_blocks`; only read.
    caches, layout, stream
        As for `pack_blocks`; the caches are written, only in the elements of the chosen blocks, and
        their stream is the default.
    block_ids : sequence of int, or int32 or int64 array [n]
        As for `pack_blocks`, and as many as were packed: of fewer, only "page_first" finds the
        first ones. Numbers in host memory must be distinct; of one that occurs twice on the GPU
        nothing is defined: parts of each block may stay.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    UNPACK_BLOCKS(caches, block_ids, stream, packed, layout=layout)


def pack_tokens(
    caches: LayersOrPairs,
    slot_mapping: Indices,
    out: ArrayLike,
    *,
    layout: PackedLayout = "layer_first",
    stream: StreamLike | None = None,
) -> None:
    """Copy the tokens of chosen slots of every layer into one contiguous buffer.

    `pack_blocks` with slots instead of blocks: sequences that start or end inside a block, ranges
    of tokens, single tokens.

    Parameters
    ----------
    caches : list of arrays [num_blocks, block_size, ...], or list of (key_cache, value_cache)
        As for `pack_blocks`, with the offset in a block as dimension 1, and at most 4 dimensions;
        permuted views will do. Caches that are x-packed, or an indexer's, keep a token in several
        places: pack whole blocks of them.
    slot_mapping : sequence of int, or int32 or int64 array [n]
        A token's slot is ``block * block_size + offset``. As ``block_ids`` of `pack_blocks`, and
        negative slots are padding: their rows of the buffer keep their bytes.
    out, layout, stream
        As for `pack_blocks`, with B, Bk and Bv the bytes of one token: [L, 2, n, token] and
        [n, L, 2, token].

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    PACK_TOKENS(caches, slot_mapping, stream, out, layout=layout)


def unpack_tokens(
    packed: ArrayLike,
    caches: LayersOrPairs,
    slot_mapping: Indices,
    *,
    layout: PackedLayout = "layer_first",
    stream: StreamLike | None = None,
) -> None:
    """Copy tokens out of one contiguous buffer into their slots of every layer: the reverse of
    `pack_tokens`.

    Parameters
    ----------
    packed : contiguous array
        As ``out`` of `pack_tokens`; only read.
    caches, layout, stream
        As for `pack_tokens`; the caches are written, and their stream is the default.
    slot_mapping : sequence of int, or int32 or int64 array [n]
        As for `pack_tokens`; negative slots are skipped. Slots in host memory must be distinct; of
        one that occurs twice on the GPU nothing is defined: parts of each token may stay.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    UNPACK_TOKENS(caches, slot_mapping, stream, packed, layout=layout)


def packed_size(
    caches: LayersOrPairs, *, num_blocks: int | None = None, num_tokens: int | None = None
) -> int:
    """How many bytes `pack_blocks` or `pack_tokens` write, in either layout.

    Parameters
    ----------
    caches
        As for the operation.
    num_blocks : int
        How many blocks are packed; or else
    num_tokens : int
        how many slots.

    Returns
    -------
    int

    Raises
    ------
    CupyCacheError
        One of its kinds.
    """
    op = "packed_size"
    if (num_blocks is None) == (num_tokens is None):
        expected = "either num_blocks or num_tokens"
        got = " and ".join(map(errors.shown, (num_blocks, num_tokens)))
        raise errors.wrong("value", f"{op}: num_blocks", expected, got)
    name, count = ("num_blocks", num_blocks) if num_tokens is None else ("num_tokens", num_tokens)
    count = contract.integer(op, name, count, 0)
    operation = SIZE_OF_BLOCKS if num_tokens is None else SIZE_OF_TOKENS
    return count * operation.item_bytes(caches)


PACK_BLOCKS = packing.Operation("pack_blocks", packing.PACK)
UNPACK_BLOCKS = packing.Operation("unpack_blocks", packing.UNPACK)
PACK_TOKENS = packing.Operation("pack_tokens", packing.PACK, by_slot=True)
UNPACK_TOKENS = packing.Operation("unpack_tokens", packing.UNPACK, by_slot=True)
# Of these only the plans are made.
SIZE_OF_BLOCKS = packing.Operation("packed_size", packing.SIZE)
SIZE_OF_TOKENS = packing.Operation("packed_size", packing.SIZE, by_slot=True)
