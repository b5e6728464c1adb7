# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.ops.shared import blocks
from cupy_cache.runtime import driver


def layers(rng, count, kind, num_blocks, dtype):
    """Key and value caches of ``count`` layers."""
    keys, values = [], []
    for _ in range(count):
        if kind == "contiguous":
            keys.append(worlds.array(rng, (num_blocks, 4, 3, 8), dtype))
            values.append(worlds.array(rng, (num_blocks, 4, 3, 8), dtype))
        elif kind == "sizes-differ":
            keys.append(worlds.array(rng, (num_blocks, 4, 3, 24), dtype))
            values.append(worlds.array(rng, (num_blocks, 4, 3, 8), dtype))
        elif kind == "odd":  # a block of 105 elements at an odd address
            keys.append(worlds.array(rng, (num_blocks, 5, 3, 7), dtype, pad=4))
            values.append(worlds.array(rng, (num_blocks, 5, 3, 7), dtype))
        elif kind == "packed-NHD":
            page = worlds.array(rng, (num_blocks, 4, 3, 16), dtype)
            keys.append(page[..., :8])
            values.append(page[..., 8:])
        elif kind.startswith("packed-widths-differ"):
            key, value = (16, 8) if kind.endswith("keys") else (8, 24)
            page = worlds.array(rng, (num_blocks, 4, 3, key + value), dtype)
            keys.append(page[..., :key])
            values.append(page[..., key:])
        elif kind == "packed-HND-with-gaps":
            page = worlds.array(rng, (num_blocks, 2, 3, 4, 16), dtype)[:, 1].permuted(0, 2, 1, 3)
            keys.append(page[..., :8])
            values.append(page[..., 8:])
        elif kind == "some-heads":  # two dimensions of runs
            page = worlds.array(rng, (num_blocks, 4, 3, 16), dtype)
            keys.append(page[:, :, :2, :8])
            values.append(page[:, :, :2, 8:])
        elif kind == "kv-outermost":  # K and V planes of one tensor [2, NB, ...]
            both = worlds.array(rng, (2, num_blocks, 4, 3, 8), dtype)
            keys.append(both[0])
            values.append(both[1])
    return keys, values


KINDS = (
    "contiguous", "sizes-differ", "odd", "packed-NHD", "packed-widths-differ-keys",
    "packed-widths-differ-values", "packed-HND-with-gaps", "some-heads", "kv-outermost",
)  # fmt: skip


def expect_copied(world, caches, pairs):
    expected = {id(c.buffer): c.buffer.bytes.copy() for c in caches}
    oracle.copy_blocks([c.on(expected[id(c.buffer)]) for c in caches], pairs)
    for cache in caches:
        np.testing.assert_array_equal(world.bytes_of(cache), expected[id(cache.buffer)])


def disjoint_pairs(rng, num_blocks, count):
    numbers = rng.permutation(num_blocks)
    destinations = numbers[:count]
    sources = rng.choice(numbers[count:], count)  # one source may have several destinations
    return np.stack([sources, destinations], axis=1).astype(np.int64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8", "float8_e4m3fn"])
@pytest.mark.parametrize("where", ["list", "host", "device-int64", "device-int32"])
@pytest.mark.parametrize("wave", [False, True])
def test_every_layout(world, rng, kind, dtype, where, wave, monkeypatch):
    if wave:  # the kernel for more blocks than these
        monkeypatch.setattr(blocks, "WAVE", range(100_000))
    keys, values = layers(rng, 3, kind, 11, dtype)
    pairs = disjoint_pairs(rng, 11, 4)
    cc.copy_blocks(
        [world.put(k) for k in keys], [world.put(v) for v in values], mapping(world, pairs, where)
    )
    expect_copied(world, keys + values, pairs)


def mapping(world, pairs, where):
    if where == "list":
        return [tuple(map(int, pair)) for pair in pairs]
    if where == "host":
        return pairs
    return world.put(worlds.of_values(pairs.astype(where.removeprefix("device-"))))


def test_mla_takes_one_list(world, rng):
    caches = [worlds.array(rng, (9, 4, 37), "bfloat16") for _ in range(2)]
    pairs = disjoint_pairs(rng, 9, 3)
    cc.copy_blocks_mla([world.put(c) for c in caches], pairs)
    expect_copied(world, caches, pairs)


def test_more_pairs_and_layers_than_one_launch_takes(world, rng, monkeypatch):
    """The parameter block holds `TABLE_WORDS` words: 5 layers and 60 pairs do not fit 24."""
    if world.on_gpu and world.name != "emulated":
        count, num_layers = 700, 250
    else:
        monkeypatch.setattr(blocks, "TABLE_WORDS", 24)
        count, num_layers = 60, 5 if world.on_gpu else 2
    keys = [worlds.array(rng, (2 * count, 3, 8), "float16") for _ in range(num_layers)]
    values = [worlds.array(rng, (2 * count, 3, 8), "float16") for _ in range(num_layers)]
    pairs = disjoint_pairs(rng, 2 * count, count)
    cc.copy_blocks([world.put(k) for k in keys], [world.put(v) for v in values], pairs)
    expect_copied(world, keys + values, pairs)


@pytest.mark.extra
@pytest.mark.parametrize("where", ["host", "device-int32"])
def test_more_than_65535_pairs(emulated_world, rng, where):
    """D14: a peer has the pairs in a grid dimension that ends at 65535."""
    world, count = emulated_world(), 65536 + 11
    try:
        cache = worlds.array(rng, (2 * count, 1), "uint8")
        pairs = disjoint_pairs(rng, 2 * count, count)
        cc.copy_blocks_mla([world.put(cache)], mapping(world, pairs, where))
        expect_copied(world, [cache], pairs)
    finally:
        world.close()


def test_nothing_but_launches(emulated_world, rng, monkeypatch):
    """D15: no table is uploaded and nothing waits, wherever the mapping is."""
    world = emulated_world()
    used = set()

    class Watched:
        def __getattr__(self, name):
            used.add(name)
            return getattr(world.driver, name)

    try:
        monkeypatch.setattr(driver, "active", Watched())
        keys, values = layers(rng, 20, "contiguous", 9, "float16")
        pairs = disjoint_pairs(rng, 9, 4)
        for where in ("list", "device-int64"):
            given = mapping(world, pairs, where)
            cc.copy_blocks([world.put(k) for k in keys], [world.put(v) for v in values], given)
        expect_copied(world, keys + values, pairs)
        assert used <= {"load", "launch", "prepare", "processors"}
    finally:
        monkeypatch.undo()
        world.close()


def test_offsets_beyond_32_bits(emulated_world, rng):
    """Of a view that starts 2**33 bytes below the storages that hold the two blocks it is used
    for."""
    from emulator import EmulatedArray

    world = emulated_world()
    try:
        made = [world.upload(rng.integers(0, 256, 40, np.uint8)) for _ in range(2)]
        source, destination = sorted(made, key=lambda storage: storage.ptr)
        step = destination.ptr - source.ptr
        first = 2**33 // step
        cache = EmulatedArray(source, -first * step, (first + 2, 40), (step, 1), "uint8")
        pair = np.array([[first, first + 1]])
        for given in (pair, world.put(worlds.of_values(pair))):
            destination.bytes[:] = 0
            cc.copy_blocks_mla([cache], given)
            np.testing.assert_array_equal(destination.bytes, source.bytes)
    finally:
        world.close()


def test_values_wider_than_keys_are_copied_whole(world, rng):
    """S7: a peer counts tiles by the first tensor, and truncates wider ones."""
    for widths in ((8, 1024), (1024, 8)):
        keys, values = ([worlds.array(rng, (6, 2, n), "float16") for _ in range(2)] for n in widths)
        pairs = disjoint_pairs(rng, 6, 3)
        cc.copy_blocks([world.put(k) for k in keys], [world.put(v) for v in values], pairs)
        expect_copied(world, keys + values, pairs)


def test_nothing_to_copy(world, rng):
    keys, values = layers(rng, 2, "contiguous", 4, "float16")
    cc.copy_blocks([world.put(k) for k in keys], [world.put(v) for v in values], [])
    cc.copy_blocks([], [], [(0, 1)])
    empty = worlds.array(rng, (4, 0, 8), "float16")
    cc.copy_blocks_mla([world.put(empty)], [(0, 1)])
    expect_copied(world, keys + values, [])


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_unaligned_device_mapping_is_refused(emulated_world, rng, dtype):
    world = emulated_world()
    try:
        keys, values = layers(rng, 1, "contiguous", 4, "float16")
        pairs = worlds.Buffer(64, None, fill=0).view((2, 2), dtype, offset=2)
        for _ in range(2):
            with pytest.raises(cc.StrideError, match="block_mapping.*multiples"):
                cc.copy_blocks([world.put(keys[0])], [world.put(values[0])], world.put(pairs))
        expect_copied(world, keys + values, [])
    finally:
        world.close()


def test_device_mapping_out_of_range_is_skipped_and_recorded(world, rng):
    if not world.on_gpu:
        pytest.skip("a mapping in host memory is refused before anything is written")
    keys, values = layers(rng, 2, "contiguous", 6, "float16")
    bad = int(rng.choice([6, -1, 2**33, -(2**63)]))
    pairs = np.array([[0, 3], [bad, 1], [2, 4], [5, bad]])
    put = world.put(worlds.of_values(pairs))
    cc.copy_blocks([world.put(k) for k in keys], [world.put(v) for v in values], put)
    expect_copied(world, keys + values, pairs.tolist())
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.argument, fault.value, fault.limit) == ("block_mapping", bad, 6)
    assert fault.row in (1, 3)


@pytest.mark.parametrize(
    "pairs, words",
    [
        ([(0, 1), (6, 2)], ("source", "0..5", "6", "row 1")),
        ([(0, -1)], ("destination", "-1")),
        ([(0, 1), (2, 1)], ("distinct", "1 twice")),
        ([(0, 1), (1, 2)], ("block 1 as both",)),
        ([(3, 3)], ("block 3 as both",)),
        ([(0, 1, 2)], ("pairs",)),
        ([0, 1], ("pairs",)),
        ([(0, "x")], ("pairs",)),
        ([(0, 1.5)], ("pairs",)),
        ([(0, 2**63)], ("destination", "9223372036854775808")),
        (np.zeros((2, 3), np.int64), ("block_mapping", "[2, 3]")),
        (np.zeros((2, 2), np.float32), ("block_mapping", "float32")),
    ],
)
def test_bad_host_mappings_are_refused(world, rng, pairs, words):
    """D13, among others: pairs are copied all at once, so a block that is both source and
    destination would race."""
    keys, values = layers(rng, 2, "contiguous", 6, "float32")
    with pytest.raises(cc.CupyCacheError) as caught:
        cc.copy_blocks([world.put(k) for k in keys], [world.put(v) for v in values], pairs)
    for word in ("copy_blocks", *words):
        assert word in str(caught.value)
    expect_copied(world, keys + values, [])


@pytest.mark.parametrize("where", ["list", "host"])
@pytest.mark.parametrize("layers_on", [1, 3])
def test_one_fault_in_a_long_mapping(world, rng, where, layers_on):
    """Nothing of it is copied; without the fault all of it is."""
    caches = [worlds.array(rng, (1000, 24), "uint8") for _ in range(layers_on)]
    given = [world.put(cache) for cache in caches]
    pairs = disjoint_pairs(rng, 1000, 400)
    row, other = rng.permutation(400)[:2]
    for side, bad, words in (
        (0, 1000, f"source blocks in 0..999, got 1000 in row {row}"),
        (1, -1, f"destination blocks in 0..999, got -1 in row {row}"),
        (1, pairs[other, 1], f"got block {pairs[other, 1]} twice"),
        (0, pairs[other, 1], f"got block {pairs[other, 1]} as both"),
    ):
        faulty = pairs.copy()
        faulty[row, side] = bad
        with pytest.raises(cc.ArgumentError, match=f"copy_blocks_mla: .*{words}"):
            cc.copy_blocks_mla(given, mapping(world, faulty, where))
        expect_copied(world, caches, [])
    cc.copy_blocks_mla(given, mapping(world, pairs, where))
    expect_copied(world, caches, pairs)


def test_numbers_of_more_than_32_bits(emulated_world, rng):
    """In the kernel's parameters they would be cut."""
    from emulator import EmulatedArray

    world = emulated_world()
    try:
        storage = world.upload(rng.integers(0, 256, 40, np.uint8))
        cache = EmulatedArray(storage, 0, (2**32 + 9, 40), (40, 1), "uint8")
        with pytest.raises(cc.ArgumentError, match=f"copy_blocks_mla: .*got {2**32 + 8}"):
            cc.copy_blocks_mla([cache], [(0, 1), (3, 2**32 + 8)])
    finally:
        world.close()


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda rng, k, v: (k, v[:1]), cc.ShapeError, ("value_caches", "2", "1")),
        (
            lambda rng, k, v: ([k[0], worlds.array(rng, (6, 4, 3, 9), "float32")], v),
            cc.ShapeError,
            ("key_caches[1]", "key_caches[0]"),
        ),
        (
            lambda rng, k, v: ([k[0], worlds.array(rng, (6, 4, 3, 8), "float16")], v),
            cc.DTypeError,
            ("key_caches[1]",),
        ),
        (
            lambda rng, k, v: (
                [k[0], worlds.array(rng, (6, 4, 8, 3), "float32").permuted(0, 1, 3, 2)],
                v,
            ),
            cc.StrideError,
            ("key_caches[1]",),
        ),
        (
            lambda rng, k, v: (k, [worlds.array(rng, (7, 4, 3, 8), "float32") for _ in v]),
            cc.ShapeError,
            ("value_caches", "num_blocks"),
        ),
    ],
)  # fmt: skip
def test_layers_that_do_not_match_are_refused(world, rng, change, error, words):
    """S7: among others, rows of another width in one layer."""
    keys, values = change(rng, *layers(rng, 2, "contiguous", 6, "float32"))
    with pytest.raises(error) as caught:
        cc.copy_blocks([world.put(k) for k in keys], [world.put(v) for v in values], [(0, 1)])
    for word in words:
        assert word in str(caught.value)
    expect_copied(world, list(keys) + list(values), [])


def test_a_stacked_array_is_no_list():
    with pytest.raises(cc.DTypeError, match=r"key_caches.*list.*ndarray"):
        cc.copy_blocks(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), [(0, 1)])
