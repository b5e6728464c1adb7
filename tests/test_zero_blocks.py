# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st
from layers import KINDS, WHERE, Storages, entries, given_as, layers_of, refused

import cupy_cache as cc
from cupy_cache.ops.shared import blocks


def check(world, layers, numbers, given):
    specs = [spec for layer in layers for spec in layer]
    cc.zero_blocks(entries(world, layers), given)
    expected = Storages(*specs)
    oracle.zero_blocks([expected(spec) for spec in specs], numbers)
    expected.check(world)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(world, rng, kind, where):
    """Only the elements of the views: what lies between them keeps its bytes."""
    layers = layers_of(rng, kind, dtype=str(rng.choice(["bfloat16", "float32"])))
    numbers = rng.integers(0, 6, int(rng.integers(1, 8)))  # with repetitions
    check(world, layers, numbers, given_as(world, numbers, where))


@pytest.mark.parametrize("dtype", ["uint8", "float8_e5m2", "int8", "float64"])
def test_any_dtype(world, rng, dtype):
    layers = layers_of(rng, "packed-HND-with-gaps", dtype=dtype)
    check(world, layers, [4, 0], [4, 0])


def test_every_block_of_more_layers_than_one_launch_takes(world, rng, monkeypatch):
    monkeypatch.setattr(blocks, "TABLE_WORDS", 12)
    layers = [[worlds.array(rng, (60, 3), "uint8") for _ in range(2)] for _ in range(5)]
    check(world, layers, range(60), range(60))


def test_wider_values_are_zeroed_whole(world, rng):
    """S7: a peer counts tiles by the first tensor, and truncates wider ones."""
    layers = [[worlds.array(rng, (4, 2, n), "float16") for n in (8, 1024)] for _ in range(2)]
    check(world, layers, [2], [2])


def test_nothing_to_do(world, rng):
    layers = layers_of(rng, "NHD")
    for none in ([], np.empty(0, np.int32), world.put(worlds.of_values(np.empty(0, np.int64)))):
        check(world, layers, [], none)
    cc.zero_blocks([], [1])
    cc.zero_blocks(entries(world, [[worlds.array(rng, (3, 0, 4), "int16")]]), [1])


def test_numbers_on_the_device_out_of_range(world, rng):
    if not world.on_gpu:
        pytest.skip("numbers in host memory are refused before anything is written")
    layers = layers_of(rng, "NHD")
    bad = int(rng.choice([6, -1, 2**32 + 1, -(2**63)]))
    numbers = np.array([5, 2, bad], np.int64)
    check(world, layers, numbers, given_as(world, numbers, "device-int64"))
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.op, fault.argument) == ("zero_blocks", "block_ids")
    assert (fault.row, fault.value, fault.limit) == (2, bad, 6)


@pytest.mark.parametrize(
    "numbers, error, words",
    [
        ([0, 6], cc.ArgumentError, ("block_ids", "0..5", "6 in row 1")),
        (np.array([3, -1]), cc.ArgumentError, ("block_ids", "-1 in row 1")),
        ([True, False], cc.DTypeError, ("block_ids", "integers")),
        (None, cc.DTypeError, ("block_ids",)),
    ],
)
def test_bad_numbers_are_refused(world, rng, numbers, error, words):
    layers = layers_of(rng, "NHD")
    specs, put = [s for layer in layers for s in layer], entries(world, layers)
    refused(world, specs, lambda: cc.zero_blocks(put, numbers), error, "zero_blocks", *words)


def test_caches_that_share_memory_with_themselves_are_refused(world, rng):
    spec = worlds.array(rng, (4, 2, 8), "float16")
    spec.strides = (0, *spec.strides[1:])
    put = [world.put(spec)]
    refused(world, [spec], lambda: cc.zero_blocks(put, [1]), cc.StrideError, "caches", "share")


@pytest.mark.extra
@given(
    kind=st.sampled_from(["packed-NHD", "some-heads", "odd", "rows"]),
    seed=st.integers(0, 2**32 - 1),
    where=st.sampled_from(["list", "device-int32"]),
    words=st.sampled_from([4, 10, 480]),
)
def test_any_case_emulated(emulated_world, kind, seed, where, words):
    rng, world = np.random.default_rng(seed), emulated_world()
    world.driver.seed = seed
    held, blocks.TABLE_WORDS = blocks.TABLE_WORDS, words
    try:
        num_blocks, num_layers = (int(n) for n in rng.integers(1, 6, 2))
        layers = layers_of(rng, kind, num_layers, num_blocks)
        numbers = rng.integers(0, num_blocks, int(rng.integers(0, 9)))
        check(world, layers, numbers, given_as(world, numbers, where))
        cc.raise_faults()
    finally:
        blocks.TABLE_WORDS = held
        world.close()
