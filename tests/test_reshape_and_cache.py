# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import formats, launch


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
    (2, 40, 24, 16, 2, "int64", 0),  # raw copies take every dtype
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


@pytest.mark.parametrize("slots", ["random", "consecutive", "random-then-consecutive"])
@pytest.mark.parametrize("deep", [False, True])
def test_many_tokens(world, rng, slots, deep, monkeypatch):
    """From 8,192 on the order of the work depends on what the slots look like. The tiles may take
    more than one dimension of the grid, which then has room for more than there are."""
    if deep:
        monkeypatch.setattr(launch, "MAX_GRID_YZ", 30)
    tokens, num_blocks = int(rng.integers(8192, 8300)), 600
    mapping = rng.permutation(num_blocks * 16)
    if slots == "consecutive":
        mapping.sort()
    elif slots == "random-then-consecutive":
        mapping = np.concatenate([rng.permutation(4000), np.arange(4000, num_blocks * 16)])
    mapping[rng.integers(0, tokens, 50)] = -1
    check(
        world,
        *(worlds.array(rng, (tokens, 3, 2), "float16") for _ in range(2)),
        *caches(rng, num_blocks, 3, 2, 2, 16, 2, "float16"),
        worlds.of_values(mapping[:tokens]),
    )


@pytest.mark.parametrize("shared", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("stored", [None, "float8_e4m3fn"])
def test_sources_whose_rows_are_all_one(rng, shared, stored):
    """Broadcast views, on NumPy, with padding among the slots."""
    tokens, heads, size, num_blocks, block_size, x = 60, 3, 8, 5, 16, 4
    rows = [worlds.broadcast(rng, (tokens, heads, size), shared) for _ in range(2)]
    slots = rng.permutation(num_blocks * block_size)[:tokens]
    slots[rng.integers(0, tokens, 5)] = -1
    dtype = np.uint8 if stored else np.float16
    made = (
        np.zeros((num_blocks, heads, size // x, block_size, x), dtype),
        np.zeros((num_blocks, heads, size, block_size), dtype),
    )
    expected = [cache.copy() for cache in made]
    cc.reshape_and_cache(*rows, *made, slots, "fp8" if stored else "auto", 0.5, 0.25)
    scales = (0.5, 0.25, stored) if stored else ()
    oracle.reshape_and_cache(*rows, *expected, slots, *scales)
    for got, wanted in zip(made, expected):
        np.testing.assert_array_equal(got, wanted)


# --- interleaved values, quantised caches ---------------------------------------------------------


def run(world, specs, kv_cache_dtype="auto", k_scale=None, v_scale=None, interleaved=False):
    """Like `check`. Scales are numbers, None or specs."""
    scales = [world.put(s) if isinstance(s, worlds.Spec) else s for s in (k_scale, v_scale)]
    put = [world.put(s) for s in specs]
    cc.reshape_and_cache(*put, kv_cache_dtype, *scales, interleaved)
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    views = [s.on(expected[id(s.buffer)]) for s in specs]
    stored = oracle.STORED.get(kv_cache_dtype)
    if stored:
        views[2:4] = (view.view(np.uint8) for view in views[2:4])
    numbers = [
        s.on(s.buffer.bytes) if isinstance(s, worlds.Spec) else 1.0 if s is None else s
        for s in (k_scale, v_scale)
    ]
    oracle.reshape_and_cache(*views, *numbers, stored)
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


def interleaved_caches(rng, num_blocks, heads, key_size, value_size, block_size, x, dtype, pad=0):
    return (
        worlds.array(rng, (num_blocks, heads, key_size // x, block_size, x), dtype, pad),
        worlds.array(rng, (num_blocks, heads, block_size // x, value_size, x), dtype, pad),
    )


def mapping_of(rng, slots, num_slots, tokens):
    """Slots at random or one after the other, with padding among them."""
    mapping = np.arange(num_slots) if slots == "consecutive" else rng.permutation(num_slots)
    mapping = mapping[:tokens]
    mapping[rng.random(len(mapping)) < 0.05] = -5
    return worlds.of_values(mapping.astype(rng.choice(["int32", "int64"])))


@pytest.mark.parametrize("slots", ["random", "consecutive"])
@pytest.mark.parametrize(
    "heads, key_size, value_size, block_size, x, dtype, pad",
    [
        (4, 128, 128, 16, 8, "bfloat16", 0),
        (3, 40, 24, 32, 4, "float32", 0),
        (2, 24, 17, 24, 8, "float16", 0),
        (5, 15, 9, 10, 5, "float16", 2),  # an odd x, unaligned
        (2, 32, 300, 64, 16, "int8", 0),
        (1, 1, 1, 1, 1, "float32", 4),
    ],
)
def test_interleaved_values(
    world, rng, slots, heads, key_size, value_size, block_size, x, dtype, pad
):  # fmt: skip
    num_blocks = -(-64 // block_size)
    tokens = int(rng.integers(1, 40))
    specs = (
        worlds.array(rng, (tokens, heads, key_size), dtype, pad),
        worlds.array(rng, (tokens, heads, value_size), dtype, pad),
        *interleaved_caches(
            rng, num_blocks, heads, key_size, value_size, block_size, x, dtype, pad
        ),
        mapping_of(rng, slots, num_blocks * block_size, tokens),
    )
    run(world, specs, interleaved=True)


# kv_cache_dtype, interleaved, heads, key size, value size, block size, x, source dtype, pad
QUANTISED = (
    ("fp8", False, 4, 128, 128, 16, 16, "bfloat16", 0),
    ("fp8_e5m2", True, 4, 64, 128, 32, 16, "float16", 0),
    ("int8", False, 3, 32, 17, 7, 16, "float32", 0),  # no group of slots divides the block
    ("int8", True, 3, 48, 33, 16, 16, "bfloat16", 0),
    ("fp8", True, 2, 15, 9, 10, 5, "float16", 1),  # an odd x, unaligned
    ("fp8_e5m2", False, 1, 1, 1, 1, 1, "float32", 3),
    ("fp8_e4m3", False, 2, 1040, 528, 16, 16, "bfloat16", 0),  # more than one chunk
)


@pytest.mark.parametrize("slots", ["random", "consecutive"])
@pytest.mark.parametrize(
    "kv_cache_dtype, interleaved, heads, key_size, value_size, block_size, x, dtype, pad", QUANTISED
)
def test_quantised(
    world, rng, slots, kv_cache_dtype, interleaved, heads, key_size, value_size, block_size, x,
    dtype, pad,
):  # fmt: skip
    num_blocks = -(-64 // block_size)
    tokens = int(rng.integers(1, 20)) if key_size > 200 else int(rng.integers(1, 40))
    stored = str(rng.choice([oracle.STORED[kv_cache_dtype], "uint8"]))
    sources = [
        worlds.array(rng, (tokens, heads, n), dtype, pad * formats.DTYPES[dtype].bytes)
        for n in (key_size, value_size)
    ]
    for source in sources:  # rows of ordinary numbers among those of random bits
        view = source.on(source.buffer.bytes)
        view[::2] = rng.normal(size=view[::2].shape) * 2.0 ** rng.integers(-9, 9)
    make = interleaved_caches if interleaved else caches
    specs = (
        *sources,
        *make(rng, num_blocks, heads, key_size, value_size, block_size, x, stored, pad),
        mapping_of(rng, slots, num_blocks * block_size, tokens),
    )
    per_head = worlds.of_values((2.0 ** rng.uniform(-8, 8, heads)).astype(np.float32))
    scales = [per_head, float(2.0 ** rng.uniform(-8, 8)), None, per_head[:1]]
    chosen = [scales[i] for i in rng.integers(0, len(scales), 2)]
    run(world, specs, kv_cache_dtype, *chosen, interleaved)


def test_already_quantised(world, rng):
    """Elements of the stored type are copied; scales mean nothing to them."""
    mapping = worlds.of_values(np.arange(20))
    specs = (
        *(worlds.array(rng, (20, 2, 32), "float8_e4m3fn") for _ in range(2)),
        *caches(rng, 2, 2, 32, 32, 16, 16, "uint8"),
        mapping,
    )
    cc.reshape_and_cache(*(world.put(s) for s in specs), "fp8", 0.3, 0.3)
    expected = [s.buffer.bytes.copy() for s in specs]
    views = [s.on(b) for s, b in zip(specs, expected)]
    oracle.reshape_and_cache(*(v.view(np.uint8) for v in views[:4]), views[4])
    for spec, want in zip(specs, expected):
        np.testing.assert_array_equal(world.bytes_of(spec), want)


def test_interleaved_blocks_that_x_does_not_divide_are_refused(world, rng):
    """D2: block_size % x slots of each block would have no place."""
    key = worlds.array(rng, (2, 3, 16), "float16")
    specs = (
        key, key,
        worlds.array(rng, (2, 3, 2, 12, 8), "float16"),
        worlds.array(rng, (2, 3, 1, 16, 8), "float16"),
        worlds.of_values(np.arange(2)),
    )  # fmt: skip
    with pytest.raises(cc.ShapeError, match="value_cache.*block_size / x = 12 / 8"):
        cc.reshape_and_cache(*(world.put(s) for s in specs), interleaved_v=True)
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)


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


@pytest.mark.parametrize("slots", ["random", "consecutive"])
@pytest.mark.parametrize("dtype, block_size", [("float16", 4), ("bfloat16", 2), ("int8", 8)])
def test_values_that_are_aligned_but_narrow(world, rng, dtype, block_size, slots):
    """All strides of the values allow vectors of 16 bytes, which are more than a block's slots."""
    element = formats.DTYPES[dtype].bytes
    key_cache, _ = caches(rng, 9, 3, 16, 1, block_size, 16 // element, dtype)
    value_cache = worlds.array(rng, (9, 3, 20, 16 // element), dtype)[..., :block_size]
    check(
        world,
        worlds.array(rng, (17, 3, 16), dtype),
        worlds.array(rng, (17, 3, 20), dtype),
        key_cache,
        value_cache,
        mapping_of(rng, slots, 9 * block_size, 17),
    )


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
