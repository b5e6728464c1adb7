# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Mappings in host memory, few and many pairs, against plain loops."""

import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.ops.shared import mappings
from cupy_cache.runtime import dispatch, indices

SOURCES, DESTINATIONS = 900, 1100  # blocks on either side
MAPPING = dispatch.Arg("block_mapping", varies=dispatch.ROWS, chosen=True, pairs=True)


def read(mapping):
    found = indices.read("an_op", MAPPING, mapping, None)
    assert type(found) is indices.Chosen
    return found


@pytest.fixture(params=["integers", "table", "sorted", "by-number"])
def way(request, monkeypatch):
    """How pairs are checked: always as Python's integers, by a table, by sorting; or as usual."""
    if request.param == "by-number":
        return
    few, most = {"integers": (10**9, 0), "table": (-1, 10**9), "sorted": (-1, 0)}[request.param]
    monkeypatch.setattr(indices, "FEW", few)
    monkeypatch.setattr(mappings, "MOST_IN_TABLE", most)
    monkeypatch.setattr(mappings, "MOST_IN_CLEAR_TABLE", most)


def random_pairs(rng, count):
    """Of different blocks, on whichever side."""
    numbers = rng.permutation(SOURCES)[: 2 * count].tolist()
    return list(zip(numbers[::2], numbers[1::2]))


def given_as(pairs, kind):
    if kind == "tuples":
        return pairs
    if kind == "lists":
        return tuple(map(list, pairs))
    if kind == "numpy-integers":
        return [tuple(map(np.int32, pair)) for pair in pairs]
    table = np.array(pairs, np.int64).reshape(-1, 2)
    if kind == "int64":
        return table
    if kind == "int32":
        return table.astype(np.int32)
    if kind == "strided":
        wide = np.full((2 * len(pairs), 5), 77, np.int32)
        wide[::2, 1:4:2] = table
        return wide[::2, 1:4:2]
    if kind == "transposed":
        return np.ascontiguousarray(table.T).T
    return pytest.importorskip("torch").tensor(table)


KINDS = (
    "tuples", "lists", "numpy-integers", "int64", "int32", "strided", "transposed", "torch",
)  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 7, indices.FEW, indices.FEW + 1, 400])
def test_what_is_read(rng, kind, count):
    pairs = random_pairs(rng, count)
    found = read(given_as(pairs, kind))
    assert found.count == count
    assert found.numbers.dtype == np.int64 and found.numbers.shape == (count, 2)
    assert list(map(tuple, found.numbers.tolist())) == pairs
    if found.words is not None:
        assert found.words == np.array(pairs, np.int32).tobytes()
    if found.few is not None:
        assert list(zip(found.few[::2], found.few[1::2])) == pairs


@pytest.mark.parametrize("count", [5, 400])
def test_an_array_is_copied(rng, count):
    """What changes it after the checks must not matter."""
    table = np.array(random_pairs(rng, count))
    found, before = read(table), table.copy()
    table[:] = -1
    np.testing.assert_array_equal(found.numbers, before)


def test_runs(rng):
    for _ in range(30):
        steps = rng.choice([1, 1, 1, 2, -1, 0], (2, 300))
        pairs = np.cumsum(steps, axis=1).T[: rng.integers(0, 301)].tolist()
        expected = []
        for source, destination in pairs:
            first, to, length = expected[-1] if expected else (None, None, 0)
            if length and (source, destination) == (first + length, to + length):
                expected[-1][2] += 1
            else:
                expected.append([source, destination, 1])
        runs = mappings.runs(read(pairs).numbers)
        assert np.stack(runs, 1).tolist() == expected
    assert [run.tolist() for run in mappings.runs(read([]).numbers)] == [[], [], []]


def complaint(pairs, source_blocks, destination_blocks, disjoint):
    """What is wrong with pairs, as words of the message; None where nothing is."""
    for side, name, limit in ((0, "source", source_blocks), (1, "destination", destination_blocks)):
        for row, pair in enumerate(pairs):
            if not 0 <= pair[side] < limit:
                return f"expected {name} blocks in 0..{limit - 1}, got {pair[side]} in row {row}"
    seen = set()
    for _, destination in pairs:
        if destination in seen:
            return f"expected distinct destinations, got block {destination} twice"
        seen.add(destination)
    both = sorted(seen.intersection(source for source, _ in pairs))
    if disjoint and both:
        return f"expected blocks to be either source or destination, got block {both[0]} as both"
    return None


def check(pairs, disjoint, together=False):
    mappings.check("an_op", pairs, SOURCES, DESTINATIONS, disjoint and together)
    if disjoint:
        mappings.check_disjoint("an_op", pairs, max(SOURCES, DESTINATIONS))


@pytest.mark.parametrize("count", [1, 2, 30, indices.FEW + 1, 400])
@pytest.mark.parametrize("kind", ["tuples", "int64"])
@pytest.mark.parametrize("disjoint", [False, True])
def test_what_is_wrong_is_found(rng, way, kind, count, disjoint):
    """One or two faults anywhere in otherwise good pairs, or none."""
    del way
    found = set()
    for faults in (0, 1, 1, 1, 2) * 12:
        pairs = random_pairs(rng, count)
        for row in rng.integers(0, count, faults):
            source, destination = pairs[row]
            other = pairs[rng.integers(0, count)]
            pairs[row] = [
                (source, other[1]), (source, other[0]), (other[1], destination),
                (-1, destination), (source, -(2**63)), (SOURCES, destination),
                (source, DESTINATIONS), (source, 2**63 - 1), (DESTINATIONS - 1, destination),
                (source, SOURCES),
            ][rng.integers(0, 10)]  # fmt: skip
        expected = complaint(pairs, SOURCES, DESTINATIONS, disjoint)
        found.add(expected and expected[:20])
        given = read(given_as(pairs, kind)), disjoint, rng.random() < 0.5
        if expected is None:
            check(*given)
            continue
        with pytest.raises(cc.ArgumentError) as caught:
            check(*given)
        assert f"an_op: Invalid value of block_mapping: {expected}" in str(caught.value)
    assert len(found) > 1


@pytest.mark.parametrize("count", [1, 400])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 2**64, 2**64 + 3, 10**30])
def test_more_bits_than_int64(rng, way, count, side, number):
    """They are named as they are, not as what is left of them."""
    del way
    pairs = random_pairs(rng, count)
    row = int(rng.integers(0, count))
    pairs[row] = (number, pairs[row][1]) if side == 0 else (pairs[row][0], number)
    with pytest.raises(cc.ArgumentError, match=f"got {number} in row {row}"):
        check(read(pairs), True)


@pytest.mark.whole
@pytest.mark.parametrize("count", [1, 400])
@pytest.mark.parametrize(
    "bad",
    [
        (1, 2.0), (np.float32(1), 2), (1, "2"), (1, None), (np.bool_(True), 2), (True, 2),
        (1, False), (1,), (1, 2, 3), (), 5, "abc", (1, (2,)),
        (b"", 2), (1, []),  # marshal writes as many bytes of these as of an integer
    ],
    ids=repr,
)  # fmt: skip
def test_no_pairs_of_integers(rng, count, bad):
    pairs = random_pairs(rng, count)
    pairs[rng.integers(0, count)] = bad
    with pytest.raises(cc.ShapeError, match="block_mapping: expected .* pairs of integers, got"):
        read(pairs)


@pytest.mark.whole
@pytest.mark.parametrize("count", [1, 400])
@pytest.mark.parametrize(
    "kind", [set, frozenset, dict.fromkeys, lambda pair: dict.fromkeys(pair).keys()]
)
def test_what_has_no_order_is_no_pair(rng, count, kind):
    """Of {5, 3} nobody knows which of the two is the source: Python lists 3 first."""
    pairs = random_pairs(rng, count)
    pairs[rng.integers(0, count)] = kind((5, 3))
    with pytest.raises(cc.ShapeError, match="block_mapping: expected .* pairs of integers, got"):
        read(pairs)


@pytest.mark.parametrize("more", [0, indices.FEW])
@pytest.mark.parametrize("bad", [[(1, 2, (3,)), 4], [(1,), 2, (3, 4, (5, 6))], [[1, 2, (3,)], 4]])
def test_as_many_tuples_and_integers_as_pairs(rng, bad, more):
    """What marshal writes of them is as long as of pairs."""
    with pytest.raises(cc.ShapeError, match="block_mapping: expected .* pairs of integers, got"):
        read(random_pairs(rng, more) + bad)
    with pytest.raises(cc.ShapeError, match="block_mapping: expected .* pairs of integers, got"):
        read(bad + random_pairs(rng, more))


@pytest.mark.parametrize("times", [1, 256])
def test_a_pair_that_holds_all_later_ones(rng, times):
    """The lowest byte of its length is that of a pair's."""
    pairs = random_pairs(rng, 256 * times)
    for bad in ((1, 2, *pairs), [1, 2, *pairs]):
        for others in ([], pairs, [None] * len(pairs)):
            for given in ([bad, *others], [*others, bad]):
                with pytest.raises(cc.ShapeError, match="block_mapping: expected .* pairs of int"):
                    read(given)


def test_pairs_of_both_kinds(rng):
    pairs = random_pairs(rng, 200)
    found = read([list(pair) if row % 3 else pair for row, pair in enumerate(pairs)])
    assert list(map(tuple, found.numbers.tolist())) == pairs


def test_where_marshal_is_another(rng, monkeypatch):
    pairs = random_pairs(rng, 200)
    expected = read(pairs)
    monkeypatch.setattr(indices.marshal, "dumps", lambda *given: b"")
    found = read(pairs)
    assert found.words == expected.words == np.array(pairs, np.int32).tobytes()


@pytest.mark.parametrize("dtype", [np.bool_, np.uint64, np.float64, np.int16])
def test_arrays_of_other_dtypes(dtype):
    with pytest.raises(cc.DTypeError, match="block_mapping"):
        read(np.ones((200, 2), dtype))
