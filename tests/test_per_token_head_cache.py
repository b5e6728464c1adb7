# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A `PagedKVCache` whose tokens and heads have scales of their own."""

import numpy as np
import pytest
from test_allocate import HOMES, Home

import cupy_cache as cc

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, SIZE_V = 2, 6, 4, 3, 16, 7
PAGED = "NHD", "HND"
FORMATS = {"int8_per_token_head": (127, 0.51 / 127), "fp8_per_token_head": (448, 0.07)}


@pytest.fixture(params=HOMES)
def home(request):
    return Home(*request.param)


def made(home, kv_cache_dtype, layout="NHD", size_v=SIZE_V, **options):
    return cc.PagedKVCache.allocate(
        LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, head_size_v=size_v, dtype="float32",
        kv_cache_dtype=kv_cache_dtype, layout=layout, framework=home.framework,
        device=home.device, **options,
    )  # fmt: skip


def filled(home, rng, cache, sizes=(SIZE, SIZE_V)):
    """Ten tokens in the blocks 4, 1 and 3, of other magnitudes in each layer."""
    rows = [
        [rng.standard_normal((10, HEADS, size)).astype(np.float32) * 10**layer for size in sizes]
        for layer in range(LAYERS)
    ]
    slots = np.array([4, 1, 3]).repeat(4)[:10] * BLOCK_SIZE + np.arange(10) % 4
    for layer, sides in enumerate(rows):
        cache.write(layer, *map(home.array, sides), home.array(slots))
    return rows


def check(home, cache, rows, blocks, error):
    table = home.array(np.array([blocks], np.int32))
    bounds = home.array(np.array([0, 10], np.int32))
    for layer, sides in enumerate(rows):
        found = cache.gather(layer, table, bounds, num_tokens=10, dtype="float32")
        for side, one in zip(sides, found, strict=True):
            largest = np.abs(side).max(-1, keepdims=True)
            assert (np.abs(home.numpy(one) - side) <= error * largest).all()


@pytest.mark.whole
@pytest.mark.parametrize("layout", PAGED)
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_written_read_and_moved(home, rng, kv_cache_dtype, layout):
    largest, error = FORMATS[kv_cache_dtype]
    cache = made(home, kv_cache_dtype, layout)
    rows = filled(home, rng, cache)
    check(home, cache, rows, [4, 1, 3], error)
    for scales, side in ((cache.k_scale_caches, 0), (cache.v_scale_caches, 1)):
        for layer in range(LAYERS):
            assert tuple(scales[layer].shape) == (BLOCKS, BLOCK_SIZE, HEADS)
            found = home.numpy(scales[layer])[4]
            wanted = np.abs(rows[layer][side][:4]).max(-1) / largest
            np.testing.assert_allclose(found, wanted, rtol=1e-6)

    cache.copy_blocks([(4, 0), (1, 2)])
    check(home, cache, rows, [0, 2, 3], error)

    other = made(home, kv_cache_dtype, layout)
    cache.swap_blocks(other, [(0, 5), (2, 1), (3, 0)])
    check(home, other, rows, [5, 1, 0], error)

    packed = home.array(np.zeros(3 * cache.bytes_per_block, np.uint8))
    cache.pack_blocks([4, 1, 3], packed)
    other = made(home, kv_cache_dtype, layout)
    other.unpack_blocks(packed, [2, 3, 4])
    check(home, other, rows, [2, 3, 4], error)

    cache.zero_blocks([4])
    for side in (cache.key_caches, cache.value_caches, cache.k_scale_caches, cache.v_scale_caches):
        assert not any(home.numpy(one[4]).any() for one in side)
    cc.raise_faults()


@pytest.mark.whole
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_attention(home, rng, kv_cache_dtype):
    """As by plain numbers that are read back."""
    cache = made(home, kv_cache_dtype, size_v=SIZE)
    filled(home, rng, cache, (SIZE, SIZE))
    table, lens = (home.array(np.array(n, np.int32)) for n in ([[4, 1, 3]], [10]))
    bounds = home.array(np.array([0, 10], np.int32))
    query = rng.standard_normal((1, 2 * HEADS, SIZE)).astype(np.float16)
    for layer in range(LAYERS):
        keys, values = (
            home.numpy(side).astype(np.float64)
            for side in cache.gather(layer, table, bounds, num_tokens=10, dtype="float32")
        )
        found = home.numpy(cache.attend(layer, home.array(query), table, lens))
        for head in range(2 * HEADS):
            scores = keys[:, head // 2] @ query[0, head].astype(np.float64) * SIZE**-0.5
            weights = np.exp(scores - scores.max())
            wanted = weights / weights.sum() @ values[:, head // 2]
            np.testing.assert_allclose(found[0, head], wanted, atol=0.01 * 10**layer)


@pytest.mark.whole
@pytest.mark.parametrize("kv_cache_dtype", FORMATS)
def test_rotary_write(home, rng, kv_cache_dtype):
    """With angles of 0 it writes what `write` writes."""
    caches = [made(home, kv_cache_dtype, size_v=SIZE) for _ in range(2)]
    key, value = (
        home.array(rng.standard_normal((5, HEADS, SIZE)).astype(np.float16)) for _ in "kv"
    )
    query = home.array(rng.standard_normal((5, 2 * HEADS, SIZE)).astype(np.float16))
    slots = home.array(rng.permutation(BLOCKS * BLOCK_SIZE)[:5])
    table = home.array(np.repeat([[1.0, 0.0]], SIZE // 2, 1).astype(np.float32))
    caches[0].write(1, key, value, slots)
    caches[1].rotary_write(1, home.array(np.zeros(5, int)), query, key, value, table, slots)
    for name in ("key_caches", "value_caches", "k_scale_caches", "v_scale_caches"):
        one, other = (home.numpy(getattr(cache, name)[1]) for cache in caches)
        np.testing.assert_array_equal(one, other)
        assert one.any()


def test_other_layouts_are_not_swapped_with():
    cache, other = (made(Home("numpy", "cpu"), "int8_per_token_head", one) for one in PAGED)
    with pytest.raises(cc.ShapeError, match="layout of other: expected NHD, got HND"):
        cache.swap_blocks(other, [(0, 1)])
    plain = cc.PagedKVCache.allocate(LAYERS, 4, 4, 1, 8, dtype="int8", device="cpu")
    with pytest.raises(cc.ShapeError):
        cache.swap_blocks(plain, [(0, 1)])


def test_what_it_tells():
    cache = made(Home("numpy", "cpu"), "int8_per_token_head")
    size = BLOCK_SIZE * HEADS * np.array([SIZE, SIZE_V]) + BLOCK_SIZE * HEADS * 4
    assert cache.bytes_per_block == LAYERS * sum(-(-one // 16) * 16 for one in size)
    assert cache.num_blocks == BLOCKS and cache.layout == "NHD"
    assert "int8_per_token_head in int8, NHD, numpy on cpu" in repr(cache)
    plain = cc.PagedKVCache.allocate(1, 2, 4, 1, 8, dtype="float32", device="cpu")
    assert plain.k_scale_caches is plain.v_scale_caches is None


@pytest.mark.whole
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layout": "packed"}, ("layout", "NHD or HND", "packed")),
        ({"layout": "rows"}, ("layout", "rows")),
        ({"k_scales": 1.0}, ("k_scales", "None", "1.0")),
        ({"v_scales": [1.0, 1.0]}, ("v_scales", "None")),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(cc.ArgumentError) as caught:
        made(Home("numpy", "cpu"), **{"kv_cache_dtype": "fp8_per_token_head"} | changes)
    for word in words:
        assert word in str(caught.value)


def test_the_dtype_of_rows_must_be_known():
    cache = made(Home("numpy", "cpu"), "fp8_per_token_head")
    found, _ = cache.gather(0, np.array([[1]]), np.array([0, 1]), num_tokens=1)
    assert found.dtype == np.float32  # that of `allocate`
