# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.ops.shared import blocks

BLOCKS = 9


def one_layer(rng, kind, dtype):
    """The caches of a layer."""
    if kind == "NHD":
        return [worlds.array(rng, (BLOCKS, 4, 3, 8), dtype) for _ in "kv"]
    if kind == "HND":
        caches = [worlds.array(rng, (BLOCKS, 3, 4, size), dtype) for size in (8, 24)]
        return [cache.permuted(0, 2, 1, 3) for cache in caches]
    if kind == "entries":
        return [worlds.array(rng, (BLOCKS, 5, 37), dtype)]
    if kind == "odd":  # nothing is aligned to a vector
        return [worlds.array(rng, (BLOCKS, 5, 3, 7), dtype, pad=4) for _ in "kv"]
    if kind == "scales":
        return [worlds.array(rng, (BLOCKS, 4, 3), dtype)]
    page = worlds.array(rng, (BLOCKS, 2, 3, 4, 24), dtype)[:, 1].permuted(0, 2, 1, 3)
    if kind == "pages-HND":
        return [page[..., :8], page[..., 8:]]
    assert kind == "pages-NHD"
    page = worlds.array(rng, (BLOCKS, 2, 4, 3, 24), dtype)[:, 1]
    return [page[..., :16], page[..., 16:]]


KINDS = ("NHD", "HND", "entries", "odd", "scales", "pages-HND", "pages-NHD")


def slots_of(caches):
    return caches[0].shape[0] * caches[0].shape[1]


def pairs_for(rng, slots, count):
    """Disjoint ones, with padding among them."""
    numbers = rng.permutation(slots)
    pairs = np.stack([rng.choice(numbers[count:], count), numbers[:count]], axis=1)
    pairs[rng.random(count) < 0.2, rng.integers(0, 2)] = -rng.integers(1, 2**30)
    return pairs


def given(world, pairs, where):
    if where == "list":
        return [tuple(map(int, pair)) for pair in pairs]
    if where == "host":
        return pairs
    return world.put(worlds.of_values(pairs.astype(where.removeprefix("device-"))))


def copy(world, layers, pairs):
    tensors = [[world.put(cache) for cache in caches] for caches in layers]
    cc.copy_tokens([t if len(t) > 1 else t[0] for t in tensors], pairs)


def check(world, layers, pairs):
    """Compare whole storages with the loops'; the faults to expect."""
    caches = [cache for layer in layers for cache in layer]
    expected = {id(c.buffer): c.buffer.bytes.copy() for c in caches}
    views = [c.on(expected[id(c.buffer)]) for c in caches]
    faults = oracle.copy_tokens(views, pairs.tolist())
    for cache in caches:
        np.testing.assert_array_equal(world.bytes_of(cache), expected[id(cache.buffer)])
    return set(faults)


@pytest.mark.parametrize("wave", [False, True])
@pytest.mark.parametrize("where", ["list", "host", "device-int64", "device-int32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(world, rng, kind, dtype, where, wave, monkeypatch):
    if wave:  # the kernel for more work than this
        monkeypatch.setattr(blocks, "WAVE", range(100_000))
    layers = [one_layer(rng, kind, dtype) for _ in range(3)]
    pairs = pairs_for(rng, slots_of(layers[0]), 12)
    copy(world, layers, given(world, pairs, where))
    assert not check(world, layers, pairs)


def test_no_pairs_and_padding_alone(world, rng):
    layers = [one_layer(rng, "NHD", "float16")]
    for pairs in (np.empty((0, 2), np.int64), np.array([[-1, 3], [5, -(2**62)]])):
        copy(world, layers, pairs)
        check(world, layers, pairs)


def test_more_than_one_launch_takes(world, rng, monkeypatch):
    monkeypatch.setattr(blocks, "TABLE_WORDS", 24)
    layers = [one_layer(rng, "HND", "float16") for _ in range(5)]
    pairs = pairs_for(rng, 36, 16)
    copy(world, layers, pairs)
    check(world, layers, pairs)


@pytest.mark.parametrize("kind", ["NHD", "HND"])
def test_pairs_on_the_device_out_of_range(world, rng, kind):
    if not world.on_gpu:
        pytest.skip("numbers in host memory are refused")
    layers = [one_layer(rng, kind, "float16")]
    pairs = np.array([[0, 9], [36, 3], [5, -1], [7, 2**62], [1, 35]])
    copy(world, layers, given(world, pairs, "device-int64"))
    expected = check(world, layers, pairs)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    found = {(f.op, f.argument, f.row, f.value, f.limit) for f in caught.value.faults}
    assert found and found <= {("copy_tokens", "pairs", *fault) for fault in expected}


class TestRefusals:
    """Named errors, and nothing is written."""

    @pytest.mark.parametrize(
        "pairs, words",
        [
            ([(0, 36)], "destination slots in 0..35, got 36 in row 0"),
            ([(-1, 0), (37, 1)], "numbers in 0..35, got 37 in row 1"),
            ([(0, 3), (1, 3)], "distinct destinations, got slot 3 twice"),
            ([(0, 3), (3, 4)], "slot 3 as both; pack_tokens and unpack_tokens"),
            ([(5, 5)], "slot 5 as both"),
            ([(i, i + 1) for i in range(35)], "as both; pack_tokens"),  # a chain
            ([(0, 1, 2)], "pairs"),
            ([(0.5, 1)], "pairs"),
        ],
    )
    def test_pairs(self, world, rng, pairs, words):
        layers = [one_layer(rng, "NHD", "float16") for _ in range(2)]
        with pytest.raises(cc.CupyCacheError, match=words) as caught:
            copy(world, layers, pairs)
        assert str(caught.value).startswith("copy_tokens: Invalid ")
        check(world, layers, np.empty((0, 2), np.int64))

    def test_caches(self, world, rng):
        packed = world.put(worlds.array(rng, (4, 2, 8, 16, 8), "float16"))
        short = world.put(worlds.array(rng, (4,), "float16"))
        plain = world.put(worlds.array(rng, (4, 2, 8), "float16"))
        other = world.put(worlds.array(rng, (5, 2, 8), "float16"))
        for caches, words in (
            ([packed], "at most 4 dimensions"),
            ([short], "(1 dimension)"),
            ([(plain, other)], r"caches\[0\]\[1\]"),
            ([plain, other], r"caches\[1\]"),
            ([(plain, plain)], "memory"),
            (plain, "caches"),
        ):
            with pytest.raises(cc.CupyCacheError, match=words) as caught:
                cc.copy_tokens(caches, [(0, 1)])
            assert str(caught.value).startswith("copy_tokens: Invalid ")
