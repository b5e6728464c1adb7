# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc


def caches(rng, num_blocks, heads, key_size, value_size, block_size, x, dtype, pad=0):
    return (
        worlds.array(rng, (num_blocks, heads, key_size // x, block_size, x), dtype, pad),
        worlds.array(rng, (num_blocks, heads, value_size, block_size), dtype, pad),
    )


def check(world, *specs):
    """Run on ``world`` and compare the whole storages with the oracle's."""
    cc.reshape_and_cache(*(world.put(s) for s in specs))
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    oracle.reshape_and_cache(*(s.on(expected[id(s.buffer)]) for s in specs))
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


# heads, key head size, value head size, block size, x, dtype, pad
SHAPES = (
    (4, 128, 128, 16, 8, "bfloat16", 0),
    (3, 40, 24, 32, 4, "float32", 0),
    (2, 24, 17, 7, 8, "float16", 0),  # a block size no group of slots divides, odd value size
    (5, 15, 9, 8, 5, "float16", 2),  # an odd x, unaligned
    (1, 1, 1, 1, 1, "float32", 4),
    (2, 520, 264, 16, 8, "bfloat16", 0),  # a head of more than one chunk, keys longer than values
    (40, 128, 128, 16, 8, "bfloat16", 0),  # D1: more groups of x than 512 threads
)


@pytest.mark.parametrize("slots", ["random", "consecutive", "consecutive-unaligned", "mixed"])
@pytest.mark.parametrize("heads, key_size, value_size, block_size, x, dtype, pad", SHAPES)
def test_every_shape(
    world, rng, slots, heads, key_size, value_size, block_size, x, dtype, pad
):  # fmt: skip
    num_blocks = -(-64 // block_size)
    tokens = int(rng.integers(1, 40)) if heads < 40 else 18
    num_slots = num_blocks * block_size
    mapping = rng.permutation(num_slots)[:tokens].astype(np.int64)
    if slots.startswith("consecutive"):
        mapping = np.arange(tokens) + (5 if slots.endswith("unaligned") else 0)
    elif slots == "mixed":  # runs broken by padding
        mapping = np.arange(tokens)
        mapping[rng.random(tokens) < 0.1] = -1
    mapping = mapping[mapping < num_slots].astype(rng.choice(["int32", "int64"]))
    check(
        world,
        worlds.array(rng, (tokens + 1, heads, key_size), dtype, pad),
        worlds.array(rng, (tokens, heads, value_size), dtype, pad),
        *caches(rng, num_blocks, heads, key_size, value_size, block_size, x, dtype, pad),
        worlds.of_values(mapping),
    )


def test_slots_past_the_cache_are_skipped_and_recorded(world, rng):
    bad = int(rng.choice([64, 2**31 + 3, 2**62]))
    check(
        world,
        worlds.array(rng, (20, 4, 128), "bfloat16"),
        worlds.array(rng, (20, 4, 128), "bfloat16"),
        *caches(rng, 4, 4, 128, 128, 16, 8, "bfloat16"),
        worlds.of_values(np.array([*range(16), -1, bad, 63, -(2**63)])),
    )
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.op, fault.argument) == ("reshape_and_cache", "slot_mapping")
    assert (fault.row, fault.value, fault.limit) == (17, bad, 64)


def test_strided_sources_and_caches(world, rng):
    """Sources cut from a fused projection, caches that are every second block of a larger pool."""
    fused = worlds.array(rng, (9, 12, 128), "bfloat16")
    key_cache, value_cache = caches(rng, 8, 4, 128, 128, 16, 8, "bfloat16")
    mapping = worlds.of_values(rng.permutation(64)[:9])
    check(world, fused[:, 4:8], fused[:, 8:], key_cache[::2], value_cache[1::2], mapping)


def test_no_tokens(world, rng):
    key = worlds.array(rng, (0, 4, 128), "bfloat16")
    stores = caches(rng, 2, 4, 128, 128, 16, 8, "bfloat16")
    check(world, key, key, *stores, worlds.of_values(np.empty(0, np.int64)))


def test_head_sizes_that_x_does_not_divide_are_refused(world, rng):
    """D2: a tail of head_size % x elements would be lost."""
    key = worlds.array(rng, (2, 3, 20), "float16")
    stores = caches(rng, 2, 3, 16, 20, 4, 8, "float16")
    with pytest.raises(cc.ShapeError, match="key_cache.*20 / 8"):
        cc.reshape_and_cache(
            *(world.put(s) for s in (key, key, *stores, worlds.of_values(np.arange(2))))
        )


@pytest.mark.parametrize(
    "index, shape, dtype, error, words",
    [
        (1, (5, 3, 16), "float16", cc.ShapeError, ("value", "num_kv_heads")),
        (3, (2, 4, 16, 5), "float16", cc.ShapeError, ("value_cache", "block_size")),
        (3, (3, 4, 16, 4), "float16", cc.ShapeError, ("value_cache", "num_blocks")),
        (2, (2, 4, 2, 4, 8), "bfloat16", cc.DTypeError, ("key_cache", "float16")),
        (4, (5,), "int16", cc.DTypeError, ("slot_mapping", "int16")),
        (4, (6,), "int64", cc.ShapeError, ("slot_mapping", "6")),
    ],
)
def test_arguments_that_do_not_match_are_refused(world, rng, index, shape, dtype, error, words):
    specs = [
        worlds.array(rng, (5, 4, 16), "float16"),
        worlds.array(rng, (5, 4, 16), "float16"),
        *caches(rng, 2, 4, 16, 16, 4, 8, "float16"),
        worlds.of_values(np.arange(5)),
    ]
    specs[index] = worlds.array(rng, shape, dtype)
    with pytest.raises(error) as caught:
        cc.reshape_and_cache(*(world.put(s) for s in specs))
    for word in ("reshape_and_cache", *words):
        assert word in str(caught.value)
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
