# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Block mappings: the (source, destination) pairs that a caller chose, read and checked.

Shared by the operations that copy and swap blocks. Those in host memory may be thousands: nothing
here loops over them in Python, except to say what is wrong with them.
"""

import functools
import itertools
import operator
import struct
from typing import NamedTuple

import numpy as np

from ...errors import ArgumentError, ShapeError
from ...runtime import arrays, contract, formats
from . import blocks

# Up to so many pairs are checked as Python's integers: NumPy's calls take 9 us however few there
# are, as long as these take for 48.
FEW = 48
# A table of more blocks (8 MiB) may have to be mapped anew at every call, page by page: half a
# millisecond for one of 32 MiB, where sorting a thousand pairs takes 0.2.
MOST_IN_TABLE = 1 << 20


class Pairs(NamedTuple):
    """A mapping in host memory: the sources and the destinations, int64 [2, count]. Objects only
    where one of them has more bits, and so is out of any range."""

    numbers: np.ndarray

    @property
    def count(self):
        return self.numbers.shape[1]

    @property
    def sources(self):
        return self.numbers[0]

    @property
    def destinations(self):
        return self.numbers[1]

    def packed(self):
        """What the kernel reads: source, destination, 32 bits each."""
        return self.numbers.T.astype("<u4").tobytes()

    def runs(self):
        """Consecutive pairs whose sources and destinations both ascend by one: the first source and
        destination, and how many, as three arrays."""
        edge = np.ones(self.count + 1, bool)
        edge[1:-1] = (self.numbers[:, 1:] != self.numbers[:, :-1] + 1).any(axis=0)
        edges = edge.nonzero()[0]
        return *self.numbers[:, edges[:-1]], edges[1:] - edges[:-1]


def read(op, mapping, stream=None):
    """``block_mapping`` as `Pairs`, or as an `arrays.Array` where it is on a GPU.

    A sequence of (source, destination) pairs, or an int32/int64 array [n, 2].
    """
    if isinstance(mapping, (list, tuple)):
        return Pairs(_numbers(op, mapping))
    facts = arrays.read(mapping, f"{op}: block_mapping", stream)
    low = facts.ptr | 16
    array = _describe(op, facts._replace(ptr=low & -low, keep=None))  # of the address its alignment
    if array.device.kind == "cpu":
        view = arrays.as_numpy(facts.ptr, array.shape, array.strides, array.dtype.numpy)
        # A copy: what has been checked must not change before it is used.
        return Pairs(view.T.astype(np.int64, order="C"))
    return array._replace(ptr=facts.ptr)


@functools.lru_cache(maxsize=256)
def _describe(op, facts):
    """The `arrays.Array` of a mapping's facts, checked; its address is the alignment of the real
    one."""
    array = arrays.describe(facts, f"{op}: block_mapping")
    check = contract.Contract(op)
    check.shape("block_mapping", array, "_ 2")
    check.dtype("block_mapping", array, *formats.INDICES)
    if array.device.kind != "cpu":
        check.contiguous("block_mapping", array, 2)
        check.aligned("block_mapping", array)
    return array


def _numbers(op, mapping):
    """`Pairs.numbers` of a sequence."""
    if not mapping:
        return np.empty((2, 0), np.int64)
    try:
        sources, destinations = zip(*mapping, strict=True)
        try:
            # A third of the time of np.array, and it takes nothing but integers.
            flat = struct.pack(f"{2 * len(mapping)}q", *sources, *destinations)
        except struct.error:
            sides = [list(map(operator.index, side)) for side in (sources, destinations)]
            return np.array(sides, object)
    except (ValueError, TypeError) as error:
        raise ShapeError(
            f"{op}: Invalid shape of block_mapping: expected (source, destination) pairs of "
            f"integers, got {mapping!r:.80}"
        ) from error
    return np.ndarray((2, len(mapping)), np.int64, flat)


# --- the checks -----------------------------------------------------------------------------------


def check(op, pairs, source_blocks, destination_blocks):
    """Refuse numbers out of range and a destination named twice."""
    numbers = pairs.numbers
    if numbers.shape[1] <= FEW:
        sources, destinations = numbers.tolist()
        good = not sources or (
            min(sources) >= 0
            and max(sources) < source_blocks
            and min(destinations) >= 0
            and max(destinations) < destination_blocks
            and len(set(destinations)) == len(destinations)
        )
    else:
        from_high, to_high = numbers.max(axis=1)
        good = (
            numbers.min() >= 0
            and from_high < source_blocks
            and to_high < destination_blocks
            and _distinct(pairs.destinations, destination_blocks)
        )
    if not good:
        _refuse(op, *numbers.tolist(), source_blocks, destination_blocks)


def _refuse(op, sources, destinations, source_blocks, destination_blocks):
    for side, numbers, limit in (
        ("source", sources, source_blocks),
        ("destination", destinations, destination_blocks),
    ):
        for row, number in enumerate(numbers):
            if not 0 <= number < limit:
                raise ArgumentError(
                    f"{op}: Invalid value of block_mapping: expected {side} blocks in "
                    f"0..{limit - 1}, got {number} in row {row}"
                )
    seen = set()
    repeated = next(b for b in destinations if b in seen or seen.add(b))
    raise ArgumentError(
        f"{op}: Invalid value of block_mapping: expected distinct destinations, got block "
        f"{repeated} twice"
    )


def check_disjoint(op, pairs, num_blocks):
    """Refuse a block that is both source and destination: pairs are copied all at once. They have
    been checked to be below ``num_blocks``."""
    if pairs.numbers.shape[1] <= FEW:
        sources, destinations = pairs.numbers.tolist()
        good = set(destinations).isdisjoint(sources)
    else:
        good = _disjoint(pairs.sources, pairs.destinations, num_blocks)
    if not good:
        both = np.intersect1d(pairs.sources, pairs.destinations)
        raise ArgumentError(
            f"{op}: Invalid value of block_mapping: expected blocks to be either source or "
            f"destination, got block {both[0]} as both; copy in two calls"
        )


def _distinct(numbers, num_blocks):
    """Whether none of ``numbers`` is there twice."""
    if num_blocks > MOST_IN_TABLE:
        return len(np.unique(numbers)) == len(numbers)
    # Of two with the same number, one does not find its own row in the table, of which only the
    # entries written here are ever read.
    rows = np.arange(len(numbers))
    table = np.empty(num_blocks, rows.dtype)
    table[numbers] = rows
    return bool((table[numbers] == rows).all())


def _disjoint(sources, destinations, num_blocks):
    """Whether no number is on both sides."""
    if num_blocks > MOST_IN_TABLE:
        return not np.isin(sources, destinations).any()
    written = np.empty(num_blocks, bool)
    written[sources] = False
    written[destinations] = True
    return not written[sources].any()


def check_apart(op, pairs, source, destination, sources, destinations):
    """`check_disjoint` for layers, at the addresses ``sources`` and ``destinations``, each of which
    may share memory with any other, whole or in part."""
    if 0 in source.shape:
        return
    alike = source.strides == destination.strides
    num_blocks = max(source.shape[0], destination.shape[0])
    (from_low, from_high), (to_low, to_high) = map(blocks.extent, (source, destination))
    if alike and sources == destinations:
        low, high = _block_extent(source)
        if _apart(sources, from_high - from_low, abs(source.strides[0]), high - low):
            check_disjoint(op, pairs, num_blocks)
            return
    if max(sources) + from_high <= min(destinations) + to_low:
        return
    if max(destinations) + to_high <= min(sources) + from_low:
        return
    of, to = np.array(sources)[:, None], np.array(destinations)
    near = (to + to_low < of + from_high) & (of + from_low < to + to_high)
    reads, read_size = _places(source, pairs.sources)
    writes, write_size = _places(destination, pairs.destinations)
    for layer in np.flatnonzero(near.any(axis=1)):
        others = to[near[layer]]
        if alike and (others == of[layer]).any():
            check_disjoint(op, pairs, num_blocks)
            others = others[others != of[layer]]
        starts = np.sort((others[:, None] + writes).reshape(-1))
        ends = np.append(starts + write_size, np.iinfo(np.int64).max)
        at = np.searchsorted(ends, of[layer] + reads, side="right")
        hit = np.append(starts, np.iinfo(np.int64).max)[at] < of[layer] + reads + read_size
        if hit.any():
            raise ArgumentError(
                f"{op}: Invalid value of block_mapping: expected blocks to be either source or "
                f"destination, got source block {pairs.sources[int(np.argmax(hit))]} of layer "
                f"{layer} in memory that a destination block shares"
            )


@functools.lru_cache(maxsize=64)
def _apart(addresses, size, step, block_size):
    """Whether arrays of ``size`` bytes at these addresses surely share none: one lies behind the
    other or, as in a pool of layers, their blocks, one every ``step`` bytes, lie between those of
    the others."""
    ordered = sorted(addresses)
    if all(after - before >= size for before, after in itertools.pairwise(ordered)):
        return True
    inside = sorted(address % step for address in addresses) if step else [0, 0]
    around = (*inside[1:], inside[0] + step)
    return all(after - before >= block_size for before, after in zip(inside, around))


def _block_extent(array):
    """`blocks.extent` of a block of ``array``."""
    return blocks.extent(array._replace(shape=(1, *array.shape[1:])))


def _places(array, numbers):
    """Where blocks lie from the address of ``array`` on, and how many bytes one spans."""
    low, high = _block_extent(array)
    return numbers * array.strides[0] + low, high - low
