# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Block mappings in host memory: their checks, and their runs. Pairs are `indices.Chosen`, or int64
[n, 2] of (source, destination).

There may be thousands of pairs, so nothing here loops over them in Python, but for errors.
"""

from typing import NamedTuple

import numpy as np

from ... import errors

# A table of more blocks (8 MiB) may have to be mapped anew at every call, page by page: half a
# millisecond for one of 32 MiB, where sorting a thousand pairs takes 0.2.
MOST_IN_TABLE = 1 << 20
# A table of so many that is cleared and looked through takes as long as sorting 256 numbers.
MOST_IN_CLEAR_TABLE = 1 << 16


def runs(pairs):
    """Consecutive pairs whose sources and destinations both ascend by one: the first source and
    destination, and how many, as three arrays."""
    edge = np.ones(len(pairs) + 1, bool)
    edge[1:-1] = (pairs[1:] != pairs[:-1] + 1).any(axis=1)
    edges = edge.nonzero()[0]
    return *pairs[edges[:-1]].T, edges[1:] - edges[:-1]


def may_have_runs(pairs, least):
    """Whether there may be a run of so many pairs, at most as many as there are: False for most
    mappings, in a third of the time that finding the runs takes."""
    steps = least - 1
    sources, destinations = pairs.T
    ends = destinations[steps:] - destinations[: len(destinations) - steps] == steps
    ends &= sources[steps:] - sources[: len(sources) - steps] == steps
    return bool(ends.any())


class Words(NamedTuple):
    """An operation's words for errors: the pairs, what they are pairs of, and the way out where one
    is both source and destination."""

    argument: str
    item: str
    way_out: str


BLOCKS = Words("block_mapping", "block", "copy in two calls")


def check(op, chosen, source_blocks, destination_blocks, disjoint=False, words=BLOCKS):
    """Refuse numbers out of range and a destination named twice; if ``disjoint``, also a block that
    is both source and destination. ``chosen``: `indices.Chosen`."""
    if chosen.few is not None:
        good = _few_are_good(chosen.few, source_blocks, destination_blocks, disjoint)
    else:
        good = _are_good(chosen, source_blocks, destination_blocks, disjoint)
    if not good:
        _refuse(op, *chosen.numbers.T.tolist(), source_blocks, destination_blocks, words)


def _few_are_good(few, source_blocks, destination_blocks, disjoint):
    sources, destinations = few[::2], few[1::2]
    if min(few) < 0 or max(sources) >= source_blocks or max(destinations) >= destination_blocks:
        return False
    written = set(destinations)
    return len(written) == len(destinations) and not (disjoint and written.intersection(sources))


def _are_good(chosen, source_blocks, destination_blocks, disjoint):
    if not chosen.count:
        return True
    pairs = chosen.integers
    if pairs.dtype.hasobject:  # they have more than 64 bits
        return False
    # What is negative is large as an unsigned number.
    unsigned = pairs.view(np.uint32 if pairs.itemsize == 4 else np.uint64)
    if unsigned.max() >= min(source_blocks, destination_blocks):
        most_source, most_destination = unsigned.max(axis=0).tolist()
        if most_source >= source_blocks or most_destination >= destination_blocks:
            return False
    sources, destinations = pairs.T
    num_blocks = max(source_blocks, destination_blocks)
    if num_blocks > MOST_IN_CLEAR_TABLE:
        ordered = np.sort(destinations)
        if (ordered[1:] == ordered[:-1]).any():
            return False
        return not disjoint or _disjoint(sources, destinations, num_blocks)
    written = np.zeros(num_blocks, bool)
    written[destinations] = True
    if np.count_nonzero(written) != len(destinations):
        return False
    return not (disjoint and written[sources].any())


def _refuse(op, sources, destinations, source_blocks, destination_blocks, words):
    """Raise what is wrong with pairs that are not good."""
    for side, numbers, limit in (
        ("source", sources, source_blocks),
        ("destination", destinations, destination_blocks),
    ):
        for row, number in enumerate(numbers):
            if not 0 <= number < limit:
                expected = errors.below(limit, f"{side} {words.item}s")
                got = f"{errors.shown(number)} in row {row}"
                raise errors.wrong("value", f"{op}: {words.argument}", expected, got)
    seen = set()
    repeated = [number for number in destinations if number in seen or seen.add(number)]
    if repeated:
        got = f"{words.item} {repeated[0]} twice"
        raise errors.wrong("value", f"{op}: {words.argument}", "distinct destinations", got)
    _refuse_both(op, sources, destinations, words)


def _refuse_both(op, sources, destinations, words):
    expected = f"{words.item}s to be either source or destination"
    got = f"{words.item} {min(set(sources).intersection(destinations))} as both"
    raise errors.wrong("value", f"{op}: {words.argument}", expected, got, words.way_out)


def check_disjoint(op, chosen, num_blocks):
    """Refuse a block that is both source and destination: pairs are copied all at once. They have
    been checked to be below ``num_blocks``."""
    if chosen.few is not None:
        good = set(chosen.few[1::2]).isdisjoint(chosen.few[::2])
    else:
        good = _disjoint(*chosen.numbers.T, num_blocks)
    if not good:
        _refuse_both(op, *chosen.numbers.T.tolist(), BLOCKS)


def _disjoint(sources, destinations, num_blocks):
    """Whether no number is on both sides."""
    if num_blocks > MOST_IN_TABLE:
        return not np.isin(sources, destinations).any()
    written = np.empty(num_blocks, bool)
    written[sources] = False
    written[destinations] = True
    return not written[sources].any()


def check_apart(op, chosen, source, destination, sources, destinations):
    """`check_disjoint` for layers, at the addresses ``sources`` and ``destinations``, each source
    of which may share memory with any destination, whole or in part; the latter do not with one
    another."""
    if 0 in source.shape:
        return
    alike = source.strides == destination.strides
    num_blocks = max(source.shape[0], destination.shape[0])
    if alike and sources == destinations and num_blocks == destination.shape[0]:
        check_disjoint(op, chosen, num_blocks)
        return
    (from_low, from_high), (to_low, to_high) = source.span, destination.span
    if max(sources) + from_high <= min(destinations) + to_low:
        return
    if max(destinations) + to_high <= min(sources) + from_low:
        return
    pairs = chosen.numbers.T
    of, to = np.array(sources)[:, None], np.array(destinations)
    near = (to + to_low < of + from_high) & (of + from_low < to + to_high)
    reads, read_size = _spans(source, pairs[0])
    writes, write_size = _spans(destination, pairs[1])
    for layer in np.flatnonzero(near.any(axis=1)):
        others = to[near[layer]]
        if alike and (others == of[layer]).any():
            check_disjoint(op, chosen, num_blocks)
            others = others[others != of[layer]]
        starts = np.sort((others[:, None] + writes).reshape(-1))
        ends = np.append(starts + write_size, np.iinfo(np.int64).max)
        at = np.searchsorted(ends, of[layer] + reads, side="right")
        hit = np.append(starts, np.iinfo(np.int64).max)[at] < of[layer] + reads + read_size
        if hit.any():
            expected = "blocks to be either source or destination"
            got = (
                f"source block {pairs[0][int(np.argmax(hit))]} of layer {layer} in memory that a "
                "destination block shares"
            )
            raise errors.wrong("value", f"{op}: block_mapping", expected, got)


def _spans(array, numbers):
    """The offsets of blocks from the address of ``array``, and how many bytes one spans."""
    low, high = array.row_span
    return numbers * array.strides[0] + low, high - low
