# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying tokens from slot to slot inside paged caches, all layers and pairs in one launch."""

from __future__ import annotations

import numpy as np

from ..runtime import contract, dispatch, indices
from ..types import LayersOrPairs, Pairs, StreamLike
from .shared import blocks, copying, layered, mappings

NAME = "copy_tokens"
WORDS = mappings.Words("pairs", "slot", "pack_tokens and unpack_tokens go through a buffer")


def copy_tokens(caches: LayersOrPairs, pairs: Pairs, *, stream: StreamLike | None = None) -> None:
    """Copy tokens from slot to slot within every layer's caches: what compaction moves, or what
    speculation accepted.

    For each layer and each pair ``(source, destination)`` the token in slot ``source`` is copied
    over that in slot ``destination``. All pairs are copied at once. Pointers and pairs in host
    memory travel inside the kernel's parameters: nothing is uploaded, nothing waits, and the call
    can be captured in a CUDA graph. What does not fit one launch's parameters takes several.

    Parameters
    ----------
    caches : list of arrays [num_blocks, block_size, ...], or list of (key_cache, value_cache)
        One entry for each layer, all alike in shape, strides, dtype (any) and device; keys and
        values may differ from each other. At most 4 dimensions; permuted views will do. Caches that
        are x-packed, or an indexer's, keep a token in several places, and cannot be given.
    pairs : sequence of (source, destination), or int32 or int64 array [num_pairs, 2]
        A token's slot is ``block * block_size + offset``. A pair with a negative slot is padding
        and skipped. In host memory pairs are checked before anything is written: slots in range, no
        destination twice, no slot both source and destination. On the device they are used where
        they are: pairs out of range are skipped and recorded (see `raise_faults`), and repeated
        destinations or chains give undefined contents of the slots concerned. Chains, such as those
        of tokens that move up by less than their number, go through a buffer: `pack_tokens`, then
        `unpack_tokens`.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns the caches.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    tensors = layered.tensor_lists(NAME, caches)
    _OPS[len(tensors)]((*tensors, pairs), (), stream)


def _plan(op, described, options):
    del options
    *tensors, pairs = described
    check = contract.Contract(op.name)
    named = [(arg.item(0), array) for arg, array in zip(op.args, tensors)]
    for name, array in named:
        layered.check_tokens(check, name, array)
        check.device(name, array)
        check.writable(name, array)
    if pairs is not None:
        check.device("pairs", pairs)
    block_size = check.sizes["block_size"]
    slots = check.sizes["num_blocks"] * block_size
    copy = None
    if tensors[0].device.kind == "cuda":
        copy = _copy_plan(op.name, named, pairs, block_size, slots)

    def checked(pairs):
        least = pairs.integers.min() if pairs.few is None else min(pairs.few)
        if least < 0:
            numbers = pairs.numbers
            for side in map(indices.Chosen, numbers.T):  # tells the row that the caller knows
                layered.check_range(NAME, "pairs", side, slots, padding=True, distinct=False)
            kept = numbers[(numbers >= 0).all(axis=1)]
            pairs = indices.Chosen(kept.astype(np.int64))  # what had more bits was negative
        mappings.check(NAME, pairs, slots, slots, disjoint=True, words=WORDS)
        return pairs

    return copying.InPlace(tensors, copy, checked, lambda numbers: np.divmod(numbers, block_size))


def _copy_plan(op, named, pairs, block_size, slots):
    # Slots at one stride throughout are blocks of one slot.
    dense = all(array.strides[0] == block_size * array.strides[1] for _, array in named)
    geometries = []
    for name, array in named:
        step = array.strides[1] if dense else array.strides[0]
        shape, strides = (array.shape[0], *array.shape[2:]), (step, *array.strides[2:])
        token = array._replace(shape=shape, strides=strides)
        geometries.append((blocks.geometry(op, name, token, token), array.ptr))
    return blocks.CopyPlan(
        op, geometries, True, slots, slots, pairs, named[0][1].device.index,
        argument="pairs", block_size=1 if dense else max(block_size, 1),
        slot_strides=[0 if dense else array.strides[1] for _, array in named],
    )  # fmt: skip


_OPS = {
    len(suffixes): dispatch.Op(
        NAME,
        args=(
            *(dispatch.Arg("caches", layers=True, suffix=s, written=True) for s in suffixes),
            dispatch.Arg("pairs", varies=dispatch.ROWS, chosen=True, pairs=True),
        ),
        plan=_plan,
        count=copying.count,
    )
    for suffixes in (("",), ("[0]", "[1]"))
}
