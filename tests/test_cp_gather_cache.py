# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What `gather_cache` does is tested with it; here is what differs."""

import functools

import hypothesis
import numpy as np
import oracle
import pytest
import worlds
from gathers import batches, cache, check, refused, sequences, typed

import cupy_cache as cc


def call(batch_size):
    """The operation, for the arguments of `gather_cache`."""

    def gather(src, dst, table, bounds, starts=None):
        cc.cp_gather_cache(src, dst, table, bounds, batch_size, starts)

    return gather


@pytest.mark.parametrize(
    "layout, inner, block_size, dtype, pad, table, lengths, starts",
    [
        ("NHD", (576,), 16, "bfloat16", 0, "int32", "int32", "int32"),
        ("HND", (3, 10), 7, "float16", 2, "int64", "int32", None),
        ("packed", (4, 24), 8, "float8_e4m3fn", 0, "int32", "int64", "int64"),
        ("pool", (5,), 8, "float64", 0, "int64", "int64", "int32"),  # elements of 8 bytes
        ("NHD", (5,), 3, "uint8", 1, "int32", "int32", None),
    ],
)
@pytest.mark.parametrize("spare", [0, 2])
def test_every_layout(
    world, rng, layout, inner, block_size, dtype, pad, table, lengths, starts, spare
):  # fmt: skip
    """Also with ``spare`` rows of the table, and starts, that no sequence uses."""
    count = 4
    numbers = sequences(rng, count + spare, 3, block_size, 6, starts is not None)
    bounds = numbers[1][: count + 1]
    specs = (
        cache(rng, layout, 6, block_size, inner, dtype, pad),
        worlds.array(rng, (int(bounds[-1]) + 3, *inner), dtype, pad),
        *typed((numbers[0], bounds, numbers[2]), (table, lengths, starts)),
    )
    check(world, specs, call(np.int64(count)), oracle.gather_cache, "cp_gather_cache")


@pytest.mark.parametrize("rows, count", [(0, 2), (5, 0), (5, 2)])
def test_nothing_to_do(world, rng, rows, count):
    """No rows, no sequences, or only sequences of length zero."""
    specs = (
        cache(rng, "NHD", 4, 4, (8,), "float32"),
        worlds.array(rng, (rows, 8), "float32"),
        worlds.array(rng, (count, 2), "int32"),
        worlds.of_values(np.zeros(count + 1, np.int32)),
        None,
    )
    check(world, specs, call(count), oracle.gather_cache, "cp_gather_cache")


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_values_out_of_range_are_skipped_and_recorded(world, rng, bad):
    table = rng.integers(0, 4, (2, 2)).astype(np.int32)
    table[1, 1] = bad
    specs = (
        cache(rng, "NHD", 4, 4, (8,), "float32"),
        worlds.array(rng, (16, 8), "float32"),
        worlds.of_values(table),
        worlds.of_values(np.array([0, 7, 16], np.int32)),  # one row more than the table has
        worlds.of_values(np.array([min(bad, 0), 0], np.int32)),
    )
    check(world, specs, call(2), oracle.gather_cache, "cp_gather_cache")


@pytest.fixture
def arguments(rng):
    return [
        cache(rng, "NHD", 4, 4, (2, 8), "float32"),
        worlds.array(rng, (5, 2, 8), "float32"),
        worlds.of_values(rng.integers(0, 4, (2, 2))),
        worlds.of_values(np.array([0, 3, 5])),
        worlds.of_values(np.array([1, 2])),
    ]


@pytest.mark.parametrize("batch_size", [0, 1, 3, -1, 2.0, True, None])
def test_other_batch_sizes_are_refused(world, arguments, batch_size):
    words = "cp_gather_cache", "batch_size", str(batch_size)
    refused(world, call(batch_size), arguments, cc.ArgumentError, *words)


@pytest.mark.parametrize(
    "index, shape, dtype, error, words",
    [
        (2, (1, 2), "int64", cc.ShapeError, ("block_table", "2 sequences", "1")),
        (4, (1,), "int64", cc.ShapeError, ("seq_starts", "2 sequences", "1")),
        (1, (5, 16), "float32", cc.ShapeError, ("dst",)),
        (1, (5, 2, 8), "float16", cc.DTypeError, ("dst", "float32")),
        (2, (2, 2), "int16", cc.DTypeError, ("block_table", "int16")),
    ],
)
def test_arguments_that_do_not_match_are_refused(
    world, rng, arguments, index, shape, dtype, error, words
):  # fmt: skip
    arguments[index] = worlds.array(rng, shape, dtype)
    refused(world, call(2), arguments, error, "cp_gather_cache", *words)


# layout, inner dimensions, dtype, pad, block size, types of table, lengths and starts
POOL = (
    ("NHD", (24,), "bfloat16", 0, 4, "int64", "int64", "int64"),
    ("packed", (2, 8), "float16", 2, 1, "int32", "int32", None),
)


@hypothesis.given(batch=batches(POOL))
def test_any_batch(emulated_world, batch):
    (layout, inner, dtype, pad, block_size, *_), num_blocks, *numbers, rows, seed = batch
    rng = np.random.default_rng(seed)
    world = emulated_world()
    try:
        specs = (
            cache(rng, layout, num_blocks, block_size, inner, dtype, pad),
            worlds.array(rng, (rows, *inner), dtype, pad),
            *(None if n is None else worlds.of_values(n) for n in numbers),
        )
        check(world, specs, call(len(numbers[0])), oracle.gather_cache, "cp_gather_cache")
    finally:
        world.close()


@pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_rows_past_2_gib(rng, library):
    """D17: the offset of a row in ``dst`` is not a product of 32-bit integers."""
    xp = pytest.importorskip(library)
    src = xp.asarray(rng.integers(0, 256, (1, 8, 1152), np.uint8))
    dst = xp.zeros((2**31 // 1152 + 10, 1152), np.uint8)
    row = dst.shape[0] - 9
    indices = map(xp.asarray, ([[0]], [row, row + 8]))
    functools.partial(cc.cp_gather_cache, src, dst)(*indices, 1)
    assert (dst[row : row + 8] == src[0]).all()
    assert not dst[row - 100 : row].any() and not dst[row + 8 :].any()
