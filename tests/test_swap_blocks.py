# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.ops.shared import blocks


def put(world, spec, where):
    if where == "device":
        return world.put(spec)
    return world.put_on_host(spec, pinned=where == "pinned")


def expect_swapped(world, source, destination, pairs):
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in (source, destination)}
    oracle.swap_blocks(*(s.on(expected[id(s.buffer)]) for s in (source, destination)), pairs)
    for spec in (source, destination):
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


def random_pairs(rng, source_blocks, destination_blocks, count):
    """Any sources, distinct destinations."""
    return np.stack(
        [rng.integers(0, source_blocks, count), rng.permutation(destination_blocks)[:count]], axis=1
    )


DIRECTIONS = (
    ("device", "device"), ("device", "pinned"), ("pinned", "device"), ("device", "pageable"),
    ("pageable", "device"), ("pinned", "pageable"),
)  # fmt: skip


@pytest.mark.parametrize("source_at, destination_at", DIRECTIONS)
@pytest.mark.parametrize("kind", ["contiguous", "odd", "packed-source", "packed-both"])
def test_every_direction(world, rng, source_at, destination_at, kind):
    shape, dtype = ((7, 4, 3, 8), "bfloat16") if kind != "odd" else ((7, 5, 3, 7), "float16")
    source = worlds.array(rng, shape, dtype)
    destination = worlds.array(rng, (10, *shape[1:]), dtype, pad=2 if kind == "odd" else 0)
    if kind.startswith("packed"):
        source = worlds.array(rng, (7, 3, 4, 16), dtype).permuted(0, 2, 1, 3)[..., :8]
    if kind == "packed-both":
        destination = worlds.array(rng, (10, 4, 3, 16), dtype)[..., 8:]
    pairs = random_pairs(rng, 7, 10, 5)
    cc.swap_blocks(put(world, source, source_at), put(world, destination, destination_at), pairs)
    expect_swapped(world, source, destination, pairs)


@pytest.mark.parametrize("source_at, destination_at", DIRECTIONS[1:3])
def test_runs_of_neighbours(world, rng, monkeypatch, source_at, destination_at):
    """Long runs take another path than scattered blocks; both in one call."""
    monkeypatch.setattr(blocks, "RUN_BYTES", 4 * 256)
    source = worlds.array(rng, (40, 256), "uint8")
    destination = worlds.array(rng, (50, 256), "uint8")
    pairs = [(3, 20), (4, 21), (5, 22), (6, 23), (7, 24), (0, 1), (30, 2), (31, 3), (32, 5)]
    cc.swap_blocks(put(world, source, source_at), put(world, destination, destination_at), pairs)
    expect_swapped(world, source, destination, pairs)


@pytest.mark.parametrize("source_at, destination_at", DIRECTIONS[1:])
def test_many_runs_among_scattered_blocks(world, rng, monkeypatch, source_at, destination_at):
    """Of random lengths, in random order; those of three blocks and more are long."""
    monkeypatch.setattr(blocks, "RUN_BYTES", 3 * 24)
    lengths = rng.integers(1, 6, 100)
    ends = np.cumsum(lengths + 1)  # with a block between two runs
    starts = zip(rng.permutation(400), rng.permutation(np.stack([ends - lengths, lengths], 1)))
    pairs = np.array([(first + i, to + i) for first, (to, length) in starts for i in range(length)])
    source = worlds.array(rng, (410, 24), "uint8")
    destination = worlds.array(rng, (ends[-1] + 1, 24), "uint8")
    cc.swap_blocks(put(world, source, source_at), put(world, destination, destination_at), pairs)
    expect_swapped(world, source, destination, pairs)


@pytest.mark.parametrize("source_at, destination_at", DIRECTIONS[:3])
def test_more_blocks_than_thread_blocks(world, rng, source_at, destination_at):
    """Over the bus few thread blocks run, each of which takes many turns."""
    source = worlds.array(rng, (150, 24), "uint8")
    destination = worlds.array(rng, (160, 24), "uint8")
    pairs = random_pairs(rng, 150, 160, 130)
    cc.swap_blocks(put(world, source, source_at), put(world, destination, destination_at), pairs)
    expect_swapped(world, source, destination, pairs)


def test_all_layers_in_one_call(world, rng):
    sources = [worlds.array(rng, (6, 4, 16), "float16") for _ in range(4)]
    destinations = [worlds.array(rng, (8, 4, 16), "float16") for _ in range(4)]
    pairs = random_pairs(rng, 6, 8, 3)
    cc.swap_blocks(
        [world.put(s) for s in sources], [world.put_on_host(d) for d in destinations], pairs
    )
    for source, destination in zip(sources, destinations):
        expect_swapped(world, source, destination, pairs)


@pytest.mark.parametrize("by_name", [False, True])
def test_block_size_in_bytes(world, rng, by_name):
    """Arrays of any shape as rows of bytes."""
    source = worlds.array(rng, (10, 12), "float32")  # 480 bytes: 5 blocks of 96
    destination = worlds.array(rng, (300,), "uint8")  # 3 blocks and a rest
    pairs = [(4, 0), (1, 2)]
    arrays = world.put(source), world.put(destination)
    if by_name:
        cc.swap_blocks(*arrays, pairs, block_size_in_bytes=96)
    else:
        cc.swap_blocks(*arrays, 96, pairs)
    expected = destination.buffer.bytes.copy()
    for first, second in pairs:
        expected[96 * second : 96 * (second + 1)] = source.buffer.bytes[
            96 * first : 96 * (first + 1)
        ]
    np.testing.assert_array_equal(world.bytes_of(destination), expected)


def test_within_one_array(world, rng):
    cache = worlds.array(rng, (6, 4, 8), "float16")
    pairs = [(0, 3), (1, 5)]
    cc.swap_blocks(world.put(cache), world.put(cache), pairs)
    expect_swapped(world, cache, cache, pairs)


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([(5, 0)], ("source", "0..4", "5")),
        ([(0, 8)], ("destination", "0..7", "8")),
        ([(0, 1), (2, 1)], ("1 twice",)),
    ],
)
def test_bad_mappings_are_refused(world, rng, pairs, words):
    source, destination = worlds.array(rng, (5, 8), "float32"), worlds.array(rng, (8, 8), "float32")
    with pytest.raises(cc.ArgumentError) as caught:
        cc.swap_blocks(world.put(source), world.put_on_host(destination), pairs)
    for word in ("swap_blocks", *words):
        assert word in str(caught.value)
    expect_swapped(world, source, destination, [])


def test_overlapping_views_are_refused(world, rng):
    cache = worlds.array(rng, (6, 4, 8), "float16")
    front, back = cache[:4], cache[2:]
    with pytest.raises(cc.ArgumentError, match="shares"):
        cc.swap_blocks(world.put(front), world.put(back), [(3, 1)])
    with pytest.raises(cc.ArgumentError, match="block 1 as both"):
        cc.swap_blocks(world.put(cache), world.put(cache), [(1, 2), (3, 1)])
    cc.swap_blocks(world.put(front), world.put(back), [(0, 1)])  # block 0 over block 3: apart
    expected = cache.buffer.bytes.copy()
    oracle.swap_blocks(cache.on(expected), cache.on(expected), [(0, 3)])
    np.testing.assert_array_equal(world.bytes_of(cache), expected)


def test_layers_that_share_memory_with_other_layers_are_refused(world, rng):
    """D13: all layers are copied at once, so one may not be read where another is written."""
    first, second = (worlds.array(rng, (6, 4, 8), "float16") for _ in range(2))
    one, other = world.put(first), world.put(second)
    with pytest.raises(cc.ArgumentError, match="block 3 as both"):
        cc.swap_blocks([one, other], [other, one], [(3, 1), (2, 3)])
    with pytest.raises(cc.ArgumentError, match=r"memory of dst\[1\].*dst\[0\]"):
        cc.swap_blocks([one, other], [one, one], [(3, 1)])
    for spec in (first, second):
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    # An exchange of different blocks shares nothing, nor do the layers of one pool.
    cc.swap_blocks([one, other], [other, one], [(3, 1), (2, 5)])
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in (first, second)}
    views = [s.on(expected[id(s.buffer)]) for s in (first, second)]
    before = [view.copy() for view in views]
    for source, destination in zip(before, reversed(views)):
        oracle.swap_blocks(source, destination, [(3, 1), (2, 5)])
    for spec in (first, second):
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


def test_layers_that_overlap_one_another(rng):
    """Any two layers of one list, against what their bytes say: blocks of 4 bytes, one every 6."""
    refused = 0
    for _ in range(300):
        memory = np.zeros(128, np.uint8)
        at = [int(n) for n in rng.integers(0, 60, 2)]
        layers = [np.ndarray((7, 4), np.uint8, memory, n, (6, 1)) for n in at]
        numbers = rng.permutation(7)
        pairs = [(int(a), int(b)) for a, b in (numbers[:2], numbers[2:4])]
        read, written = (
            [n + 6 * pair[side] + byte for n in at for pair in pairs for byte in range(4)]
            for side in range(2)
        )
        one, other = ({n + 6 * block + byte for block in range(7) for byte in range(4)} for n in at)
        try:
            cc.swap_blocks(layers, layers, pairs)
            assert one.isdisjoint(other) and set(read).isdisjoint(written)
        except cc.ArgumentError:
            refused += 1
            assert not one.isdisjoint(other) or not set(read).isdisjoint(written)
            assert not memory.any()
    assert 0 < refused < 300


def test_layers_of_one_pool(world, rng):
    """Blocks of different layers lie between each other."""
    pool = worlds.array(rng, (6, 3, 4, 8), "float16")
    layers = [world.put(pool[:, layer]) for layer in range(3)]
    cc.swap_blocks(layers, layers, [(0, 3), (4, 1)])
    expected = pool.buffer.bytes.copy()
    oracle.swap_blocks(pool.on(expected), pool.on(expected), [(0, 3), (4, 1)])
    np.testing.assert_array_equal(world.bytes_of(pool), expected)
    cc.swap_blocks(layers[:2], layers[1:], [(5, 0)])  # layers 1 and 2 are written, 0 and 1 read
    view = pool.on(expected)
    view[0, 1:] = view[5, :2].copy()
    np.testing.assert_array_equal(world.bytes_of(pool), expected)
    with pytest.raises(cc.ArgumentError, match="block 5 as both"):
        cc.swap_blocks(layers[:2], layers[1:], [(5, 0), (2, 5)])
    halves = [world.put(pool[:4, layer]) for layer in (0, 1)]
    others = [world.put(pool[2:, layer]) for layer in (2, 1)]
    with pytest.raises(cc.ArgumentError, match="source block 3 of layer 1 in memory"):
        cc.swap_blocks(halves, others, [(0, 3), (3, 1)])
    np.testing.assert_array_equal(world.bytes_of(pool), expected)


@pytest.mark.parametrize(
    "shape, dtype, error, words",
    [
        ((8, 9), "float32", cc.ShapeError, ("dst", "8", "9")),
        ((8, 8), "int32", cc.DTypeError, ("dst", "float32", "int32")),
    ],
)
def test_arrays_that_do_not_match_are_refused(world, rng, shape, dtype, error, words):
    source, destination = worlds.array(rng, (5, 8), "float32"), worlds.array(rng, shape, dtype)
    with pytest.raises(error) as caught:
        cc.swap_blocks(world.put(source), world.put_on_host(destination), [(0, 0)])
    for word in words:
        assert word in str(caught.value)


def test_too_few_arguments():
    with pytest.raises(TypeError, match="block_mapping"):
        cc.swap_blocks(np.zeros((2, 2)), np.zeros((2, 2)))
