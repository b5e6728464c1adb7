# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import worlds
from gathers import as_on_numpy, bounds_out_of_order
from guards import BAD, check_faults, draw_numbers

import cupy_cache as cc


def cache(rng, num_blocks, block_size, head, quant, dtype="uint8", pool=False, pad=0):
    """A cache view [NB, BS, D + 4 D/Q]; ``pool``: the second of three layers that share blocks."""
    width = head + 4 * (head // quant)
    if not pool:
        return worlds.array(rng, (num_blocks, block_size, width), dtype, pad)
    return worlds.array(rng, (num_blocks, 3, block_size, width), dtype, pad)[:, 1]


def rows_for(rng, rows, head_size, quant_block_size, scale_dtype="uint8", wide=False, pad=0):
    """dst_k and dst_scale; ``wide``: rows cut from wider ones."""
    scales = head_size // quant_block_size * (1 if scale_dtype == "float32" else 4)
    k = worlds.array(rng, (rows, head_size + 5 * wide), "uint8", pad)
    scale = worlds.array(rng, (rows, scales + wide), scale_dtype)
    return k[:, :head_size], scale[:, wide:]


def gather(world, *specs):
    """Run on ``world``; compare the whole storages and the recorded faults with the oracle's."""
    cc.cp_gather_indexer_k_quant_cache(*map(world.put, specs))
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    views = [s.on(expected[id(s.buffer)]) for s in specs]
    head_size, scales = views[1].shape[1], views[2].view(np.uint8).shape[1] // 4
    faults = oracle.cp_gather_indexer_k_quant_cache(
        *(v.view(np.uint8) for v in views[:3]), *views[3:], head_size // scales
    )
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])
    named = [(row, "block_table", value, limit) for row, value, limit in faults]
    check_faults("cp_gather_indexer_k_quant_cache", named)


def sequences(rng, count, width, block_size, num_blocks):
    """A table and row bounds of ``count`` sequences that fit; some are empty, and the entries that
    no row needs are poisoned."""
    lengths = rng.integers(0, width * block_size + 1, count)
    lengths[rng.random(count) < 0.3] = 0
    table = rng.integers(0, num_blocks, (count, width))
    table[np.arange(width) >= -(-lengths // block_size)[:, None]] = -7
    return table, np.concatenate([[0], np.cumsum(lengths)])


# head size, quant block size, block size, dtypes of the cache, the scales, the table and the bounds
CASES = (
    (128, 128, 64, "uint8", "uint8", "int32", "int32"),  # what models have
    (128, 128, 64, "uint8", "float32", "int32", "int32"),
    (128, 32, 16, "float8_e4m3fn", "uint8", "int64", "int32"),
    (24, 8, 7, "uint8", "int8", "int32", "int64"),
    (96, 32, 1, "int8", "float32", "int64", "int64"),
    (512, 128, 16, "uint8", "float32", "int32", "int32"),
    (8, 1, 5, "uint8", "uint8", "int32", "int32"),  # more bytes of scales than of the key
    (37, 37, 9, "uint8", "float32", "int32", "int32"),
    (1, 1, 1, "uint8", "uint8", "int32", "int32"),
)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("head, quant, block_size, dtype, scales, table, bounds", CASES)
def test_every_shape(
    world, rng, head, quant, block_size, dtype, scales, table, bounds, strided
):  # fmt: skip
    """Contiguous and aligned; in a pool, with rows of a wider workspace, aligned to bytes."""
    numbers = sequences(rng, 4, 2, block_size, 5)
    rows = int(numbers[1][-1]) + 3  # three more than the sequences fill
    gather(
        world,
        cache(rng, 5, block_size, head, quant, dtype, strided, 3 * strided),
        *rows_for(rng, rows, head, quant, scales, strided, 1 * strided),
        *(worlds.of_values(n.astype(t)) for n, t in zip(numbers, (table, bounds))),
    )


def test_a_table_in_a_wider_one(world, rng):
    table, bounds = sequences(rng, 3, 2, 8, 5)
    gather(
        world,
        cache(rng, 5, 8, 32, 16),
        *rows_for(rng, int(bounds[-1]), 32, 16),
        worlds.of_values(np.hstack([table, np.full((3, 3), 2**62)]))[:, :2],
        worlds.of_values(bounds),
    )


def test_calls_of_one_shape(world, rng):
    """A single row and then several with the same strides, which share a plan."""
    src = cache(rng, 4, 4, 32, 32)
    for count in (1, 3):
        gather(
            world,
            src,
            *rows_for(rng, count, 32, 32),
            worlds.of_values(rng.integers(0, 4, (count, 1))),
            worlds.of_values(np.arange(count + 1)),
        )


@pytest.mark.parametrize("first, rows", [(3, 9), (0, 4), (20, 9), (-2, 9)])
def test_rows_outside_the_sequences_are_untouched(world, rng, first, rows):
    """Sequences that start after the first row, or end after the last, or begin before it."""
    gather(
        world,
        cache(rng, 4, 4, 32, 32),
        *rows_for(rng, rows, 32, 32),
        worlds.of_values(rng.integers(0, 4, (2, 2))),
        worlds.of_values(np.array([first, first + 4, first + 5])),
    )


@pytest.mark.parametrize("rows, count", [(0, 2), (5, 0), (0, 0)])
def test_nothing_to_do(world, rng, rows, count):
    gather(
        world,
        cache(rng, 4, 4, 32, 32),
        *rows_for(rng, rows, 32, 32),
        worlds.array(rng, (count, 2), "int32"),
        worlds.of_values(np.zeros(count + 1, np.int32)),
    )


def test_a_cache_without_blocks(world, rng):
    gather(
        world,
        cache(rng, 0, 4, 32, 32),
        *rows_for(rng, 3, 32, 32),
        worlds.of_values(np.zeros((1, 1), np.int64)),
        worlds.of_values(np.array([0, 2])),
    )


@pytest.mark.parametrize("kind", ["block", "page"])
def test_values_out_of_range_are_skipped_and_recorded(world, rng, kind):
    table, bounds = rng.integers(0, 4, (3, 2)), np.array([0, 5, 8, 16])
    if kind == "block":
        table[1, 0] = rng.choice([4, *BAD])
    else:  # one page more than the table has
        bounds[2:] += 6
    gather(
        world,
        cache(rng, 4, 4, 32, 32, pool=True),
        *rows_for(rng, int(bounds[-1]), 32, 32),
        worlds.of_values(table),
        worlds.of_values(bounds),
    )


def test_lengths_that_make_no_sense_stay_inside(world, rng):
    """What is written is not defined, but nothing outside the arrays is touched."""
    specs = [
        cache(rng, 4, 4, 32, 32),
        *rows_for(rng, 12, 32, 32),
        worlds.of_values(rng.integers(0, 4, (5, 2))),
        worlds.of_values(rng.choice([*BAD, 0, 3, 9, 12], 6)),
    ]
    cc.cp_gather_indexer_k_quant_cache(*map(world.put, specs))
    for spec in (specs[0], *specs[3:]):
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    with contextlib.suppress(cc.FaultError):
        cc.raise_faults()


@pytest.mark.parametrize("kv_cache_dtype, format", [("fp8", "float32"), ("ue8m0", "ue8m0")])
@pytest.mark.parametrize("head, quant, block_size", [(128, 128, 16), (96, 32, 5)])
def test_what_was_written_is_read(world, rng, kv_cache_dtype, format, head, quant, block_size):
    """Keys of two sequences, through both operations: e4m3 times scale is near what went in."""
    k = (rng.normal(size=(27, head)) * 2.0 ** rng.integers(-6, 6, (27, 1))).astype(np.float16)
    pages = -(-14 // block_size)
    table = rng.permutation(2 * pages + 1)[: 2 * pages].reshape(2, pages)
    lengths = 14, 13
    slots = [
        table[b, p // block_size] * block_size + p % block_size
        for b in range(2)
        for p in range(lengths[b])
    ]
    kv_cache = cache(rng, 2 * pages + 1, block_size, head, quant, pool=True)
    dst_k, dst_scale = rows_for(rng, 27, head, quant, "float32")
    put = world.put(kv_cache)
    cc.indexer_k_quant_and_cache(
        world.put(worlds.of_values(k)), put, world.put(worlds.of_values(np.array(slots))), quant,
        kv_cache_dtype,
    )  # fmt: skip
    cc.cp_gather_indexer_k_quant_cache(
        put,
        world.put(dst_k),
        world.put(dst_scale),
        world.put(worlds.of_values(table)),
        world.put(worlds.of_values(np.array([0, 14, 27]))),
    )
    scales = world.bytes_of(dst_scale).view("<f4").reshape(27, -1)
    largest = np.abs(k.astype(np.float32)).reshape(27, -1, quant).max(axis=2)
    expected = [[oracle.indexer_scale(v, format)[0] for v in row] for row in largest]
    np.testing.assert_array_equal(scales, expected)
    codes = world.bytes_of(dst_k).reshape(27, head)
    each = np.repeat(scales, quant, axis=1)
    stored = oracle.quantise(k, each, "float8_e4m3fn")
    np.testing.assert_array_equal(codes, stored)


# head size, quant block size, block size, dtype of the scales, types of table and bounds
POOL = (
    (32, 16, 4, "uint8", "int64", "int64"),
    (24, 24, 3, "float32", "int32", "int32"),
)


@st.composite
def batches(draw):
    """A specialisation, the table and the bounds of a batch, more rows than that, and a seed."""
    case = draw(st.sampled_from(POOL))
    *_, table_type, bounds_type = case
    block_size = case[2]
    count, width, num_blocks = (draw(st.integers(0, most)) for most in (5, 4, 6))
    good = st.integers(0, max(num_blocks - 1, 0))
    table = draw_numbers(draw, (count, width), good, table_type)
    lengths = draw(st.lists(st.integers(0, 3 * block_size), min_size=count, max_size=count))
    bounds = np.cumsum([draw(st.integers(-2, 4)), *lengths]).astype(bounds_type)
    rows = max(int(bounds[-1]) + draw(st.integers(-2, 3)), 0)
    return case, num_blocks, table, bounds, rows, draw(st.booleans()), draw(st.integers(0, 2**32))


@hypothesis.given(batch=batches())
def test_any_batch(emulated_world, batch):
    (head, quant, block_size, scales, *_), num_blocks, table, bounds, rows, strided, seed = batch
    rng = np.random.default_rng(seed)
    with contextlib.closing(emulated_world()) as world:
        gather(
            world,
            cache(rng, num_blocks, block_size, head, quant, pool=strided),
            *rows_for(rng, rows, head, quant, scales),
            worlds.of_values(table),
            worlds.of_values(bounds),
        )


def test_bounds_out_of_order(world, rng):
    """Rows are those of the same sequences as on NumPy; bounds below those before them are
    recorded."""
    for count in (1, 3, 40):
        bounds = bounds_out_of_order(rng, count, 30)
        specs = [
            cache(rng, 6, 4, 64, 32),
            *rows_for(rng, 30, 64, 32, "uint8"),
            worlds.of_values(rng.integers(0, 6, (count, 8))),
            worlds.of_values(bounds),
        ]
        as_on_numpy(
            world, specs, cc.cp_gather_indexer_k_quant_cache, specs[1:3],
            ["block_table", "cu_seq_lens"], must=(np.diff(bounds) < 0).any(),
        )  # fmt: skip


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self, rng):
        return {
            "kv_cache": worlds.array(rng, (3, 4, 72), "uint8"),
            "dst_k": worlds.array(rng, (5, 64), "uint8"),
            "dst_scale": worlds.array(rng, (5, 8), "uint8"),
            "block_table": worlds.of_values(rng.integers(0, 3, (2, 2))),
            "cu_seq_lens": worlds.of_values(np.array([0, 3, 5])),
        }

    def refused(self, world, arguments, error, *words):
        with pytest.raises(error) as caught:
            cc.cp_gather_indexer_k_quant_cache(*map(world.put, arguments.values()))
        for word in ("cp_gather_indexer_k_quant_cache", *words):
            assert word in str(caught.value)
        for spec in arguments.values():
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("kv_cache", (3, 4, 68), "uint8", cc.ShapeError, ("64 + 4 * 2", "68")),
            ("kv_cache", (3, 288), "uint8", cc.ShapeError, ("2 dimensions",)),
            ("kv_cache", (3, 0, 72), "uint8", cc.ArgumentError, ("block_size", "0")),
            ("kv_cache", (3, 4, 72), "float16", cc.DTypeError, ("float16",)),
            ("dst_k", (5, 60), "uint8", cc.ShapeError, ("kv_cache", "60 + 4 * 2", "72")),
            ("dst_k", (5, 0), "uint8", cc.ArgumentError, ("head_size", "0")),
            ("dst_k", (5, 64), "bfloat16", cc.DTypeError, ("bfloat16",)),
            ("dst_k", (4, 64), "uint8", cc.ShapeError, ("dst_scale", "4 rows", "5")),
            ("dst_scale", (5, 4), "uint8", cc.ShapeError, ("kv_cache", "64 + 4 * 1")),
            ("dst_scale", (5, 7), "uint8", cc.ShapeError, ("dst_scale", "divisor")),
            ("dst_scale", (5, 12), "uint8", cc.ShapeError, ("dst_scale", "divisor")),
            ("dst_scale", (5, 0), "uint8", cc.ShapeError, ("dst_scale", "divisor")),
            ("dst_scale", (5, 8), "float32", cc.ShapeError, ("kv_cache", "64 + 4 * 8")),
            ("dst_scale", (5, 2), "int32", cc.DTypeError, ("int32", "float32")),
            ("dst_scale", (8,), "uint8", cc.ShapeError, ("(1 dimension)",)),
            ("block_table", (2,), "int32", cc.ShapeError, ("(1 dimension)",)),
            ("block_table", (3, 2), "int32", cc.ShapeError, ("cu_seq_lens", "[4]", "[3]")),
            ("block_table", (2, 2), "int16", cc.DTypeError, ("int16",)),
            ("cu_seq_lens", (2,), "int32", cc.ShapeError, ("[3]", "[2]")),
            ("cu_seq_lens", (3,), "float32", cc.DTypeError, ("float32",)),
        ],
    )
    def test_arrays(self, world, arguments, rng, name, shape, dtype, error, words):
        arguments[name] = worlds.array(rng, shape, dtype)
        self.refused(world, arguments, error, *words)

    @pytest.mark.parametrize("name", ["dst_k", "dst_scale", "block_table", "cu_seq_lens"])
    def test_gaps_in_the_last_dimension(self, world, arguments, rng, name):
        spec = arguments[name]
        wide = worlds.array(rng, (*spec.shape[:-1], 2 * spec.shape[-1]), spec.dtype)
        arguments[name] = wide[..., ::2]
        self.refused(world, arguments, cc.StrideError, name, "contiguous")

    def test_gaps_in_a_block(self, world, arguments, rng):
        arguments["kv_cache"] = worlds.array(rng, (3, 4, 80), "uint8")[..., :72]
        self.refused(world, arguments, cc.StrideError, "kv_cache", "2 dimensions")

    @pytest.mark.parametrize("name", ["dst_k", "dst_scale"])
    def test_overlapping_rows(self, world, arguments, name):
        arguments[name].strides = (0, 1)
        self.refused(world, arguments, cc.StrideError, name, "share")

    def test_none(self, world, arguments):
        put = {n: world.put(s) for n, s in arguments.items()} | {"dst_scale": None}
        with pytest.raises(cc.DTypeError, match="dst_scale"):
            cc.cp_gather_indexer_k_quant_cache(**put)


@pytest.mark.parametrize("name", ["dst_k", "dst_scale"])
def test_read_only_rows_are_refused(name):
    arguments = {
        "kv_cache": np.zeros((1, 1, 12), np.uint8),
        "dst_k": np.zeros((1, 8), np.uint8),
        "dst_scale": np.zeros((1, 1), np.float32),
    }
    arguments[name].flags.writeable = False
    table = np.zeros((1, 1), np.int32)
    with pytest.raises(cc.NotWritableError, match=name):
        cc.cp_gather_indexer_k_quant_cache(*arguments.values(), table, np.array([0, 1]))


def test_unaligned_float32_scales_are_refused(rng):
    kv_cache, dst_k = np.zeros((1, 1, 12), np.uint8), np.zeros((1, 8), np.uint8)
    scale = worlds.aligned_bytes(8)[2:6].view(np.float32).reshape(1, 1)
    with pytest.raises(cc.StrideError, match="dst_scale"):
        cc.cp_gather_indexer_k_quant_cache(
            kv_cache, dst_k, scale, np.zeros((1, 1), np.int32), np.array([0, 1])
        )
