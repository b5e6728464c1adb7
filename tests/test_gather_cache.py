# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib
import functools

import hypothesis
import numpy as np
import oracle
import pytest
import worlds
from gathers import (
    as_on_numpy,
    batches,
    bounds_out_of_order,
    cache,
    check,
    descents,
    refused,
    sequences,
    typed,
)
from guards import BAD, check_faults

import cupy_cache as cc


def gather(world, *specs):
    """Run on ``world``; compare the whole storages and the recorded faults with the oracle's."""
    check(world, specs, cc.gather_cache, oracle.gather_cache)


# layout, inner dimensions, block size, dtype, pad, types of table, lengths and starts
CASES = (
    ("NHD", (576,), 64, "bfloat16", 0, "int32", "int32", "int32"),
    ("NHD", (656,), 16, "uint8", 0, "int32", "int32", None),
    ("NHD", (132,), 8, "uint8", 4, "int64", "int32", None),
    ("NHD", (5,), 3, "int8", 1, "int64", "int64", "int64"),  # single bytes, an odd number of them
    ("NHD", (1,), 1, "float16", 0, "int32", "int64", "int32"),
    ("NHD", (8, 128), 16, "float16", 0, "int32", "int32", "int64"),
    ("HND", (8, 128), 16, "bfloat16", 0, "int32", "int32", None),
    ("HND", (3, 46), 7, "float16", 2, "int64", "int32", "int32"),
    ("HND", (2, 3, 4, 5), 4, "float32", 0, "int32", "int32", "int32"),
    ("packed", (4, 24), 8, "float8_e4m3fn", 0, "int32", "int32", None),
    ("pool", (12,), 8, "float64", 0, "int32", "int32", "int32"),
    ("pool", (40,), 5, "float8_e5m2", 0, "int32", "int32", None),
)


@pytest.mark.parametrize("layout, inner, block_size, dtype, pad, table, lengths, starts", CASES)
def test_every_layout(
    world, rng, layout, inner, block_size, dtype, pad, table, lengths, starts
):  # fmt: skip
    num_blocks, width = 6, 3
    numbers = sequences(rng, 5, width, block_size, num_blocks, starts is not None)
    rows = int(numbers[1][-1]) + 3  # three more than the sequences fill
    gather(
        world,
        cache(rng, layout, num_blocks, block_size, inner, dtype, pad),
        worlds.array(rng, (rows, *inner), dtype, pad),
        *typed(numbers, (table, lengths, starts)),
    )


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_strided_rows_tables_and_starts(world, rng, layout):
    """Rows and heads cut from a wider workspace, a table in a wider one, starts in a column."""
    table, bounds, starts = sequences(rng, 4, 2, 8, 5, True)
    wide = worlds.array(rng, (int(bounds[-1]) + 1, 6, 16), "bfloat16")
    gather(
        world,
        cache(rng, layout, 5, 8, (4, 16), "bfloat16"),
        wide[:, 1:5],
        worlds.of_values(np.hstack([table, np.full((4, 3), 2**62)]))[:, :2],
        worlds.of_values(bounds),
        worlds.of_values(np.stack([starts, np.full(4, -1)], axis=1))[:, 0],
    )


def test_two_dimensions_with_gaps(world, rng):
    table, bounds, starts = sequences(rng, 3, 2, 4, 4, True)
    wide = worlds.array(rng, (int(bounds[-1]) + 1, 3, 5, 16), "bfloat16")
    gather(
        world,
        cache(rng, "NHD", 4, 4, (3, 2, 8), "bfloat16"),
        wide[:, :, 1::2, :8],
        *(worlds.of_values(n) for n in (table, bounds, starts)),
    )


def test_the_stride_of_a_single_start_is_kept(world, rng):
    """One sequence and then several with the same strides, which share a plan."""
    src = cache(rng, "NHD", 4, 4, (8,), "float32")
    for count in (1, 3):
        columns = np.full((count, 2), -5)
        columns[:, 0] = np.arange(count)
        gather(
            world,
            src,
            worlds.array(rng, (2 * count, 8), "float32"),
            worlds.of_values(rng.integers(0, 4, (count, 2))),
            worlds.of_values(2 * np.arange(count + 1)),
            worlds.of_values(columns)[:, 0],
        )


@pytest.mark.parametrize("first, rows", [(3, 9), (0, 4), (20, 9), (-2, 9)])
def test_rows_outside_the_sequences_are_untouched(world, rng, first, rows):
    """Sequences that start after the first row, or end after the last, or begin before it."""
    gather(
        world,
        cache(rng, "NHD", 4, 4, (8,), "float32"),
        worlds.array(rng, (rows, 8), "float32"),
        worlds.of_values(rng.integers(0, 4, (2, 2))),
        worlds.of_values(np.array([first, first + 4, first + 5])),
    )


@pytest.mark.parametrize("rows, count", [(0, 2), (5, 0), (0, 0)])
def test_nothing_to_do(world, rng, rows, count):
    gather(
        world,
        cache(rng, "NHD", 4, 4, (8,), "float32"),
        worlds.array(rng, (rows, 8), "float32"),
        worlds.array(rng, (count, 2), "int32"),
        worlds.of_values(np.zeros(count + 1, np.int32)),
        worlds.of_values(np.zeros(count, np.int32)),
    )


@pytest.mark.whole
@pytest.mark.parametrize("rows, blocks", [(0, 3), (2, 0), (0, 0)])
def test_strides_of_what_is_empty_mean_nothing(rows, blocks):
    """NumPy's are all 0."""
    inner = (2, 3, 2, 8)
    dst = np.ones((rows, *inner), np.float32)
    table, bounds = np.zeros((1, 1), np.int32), np.array([0, rows])
    for gathered in (cc.gather_cache, functools.partial(cc.cp_gather_cache, batch_size=1)):
        gathered(np.zeros((blocks, 4, *inner), np.float32), dst, table, bounds)
        with contextlib.suppress(cc.FaultError):
            cc.raise_faults()
    assert (dst == 1).all()


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 4, 0)])
def test_empty_caches(world, rng, shape):
    """No blocks: every block number is out of range. No bytes in a row: nothing is moved."""
    table = np.zeros((1, 1), np.int64)
    gather(
        world,
        worlds.array(rng, shape, "float32"),
        worlds.array(rng, (3, shape[2]), "float32"),
        worlds.of_values(table),
        worlds.of_values(np.array([0, 2])),
    )


@pytest.mark.parametrize("kind", ["block", "page", "start"])
def test_values_out_of_range_are_skipped_and_recorded(world, rng, kind):
    table, bounds, starts = rng.integers(0, 4, (3, 2)), np.array([0, 5, 8, 16]), np.zeros(3, int)
    bad = int(rng.choice(BAD))
    if kind == "block":
        table[1, 0] = rng.choice([4, bad])
    elif kind == "start":
        starts[1] = rng.choice([8, bad])
    else:  # one page more than the table has
        bounds[2:] += 6
    src = cache(rng, "NHD", 4, 4, (8,), "float32")
    dst = worlds.array(rng, (int(bounds[-1]), 8), "float32")
    gather(world, src, dst, *map(worlds.of_values, (table, bounds, starts)))


@pytest.mark.parametrize("bad", [-(2**31), -1, 4, 2**31 - 1])
def test_int32_values_out_of_range(world, rng, bad):
    table = rng.integers(0, 4, (2, 2)).astype(np.int32)
    table[1, 1] = bad
    gather(
        world,
        cache(rng, "NHD", 4, 4, (8,), "float32"),
        worlds.array(rng, (14, 8), "float32"),
        worlds.of_values(table),
        worlds.of_values(np.array([0, 7, 14], np.int32)),
        worlds.of_values(np.array([min(bad, 0), 1], np.int32)),
    )


@pytest.mark.parametrize("bounds", ["wild", "past the table"])
@pytest.mark.parametrize("with_starts", [False, True])
def test_lengths_that_make_no_sense_stay_inside(world, rng, with_starts, bounds):
    """What is written is not defined, but nothing outside the arrays is touched."""
    wild = [*BAD, 0, 3, 9, 12]
    lengths, starts = rng.choice(wild, 6), rng.choice(wild, 5)
    if bounds == "past the table":  # the last sequence, behind whose row of the table is nothing
        lengths, starts[-1] = np.array([0, 1, 1, 2, 3, 12]), 7 * with_starts
    specs = [
        cache(rng, "NHD", 4, 4, (8,), "float32"),
        worlds.array(rng, (12, 8), "float32"),
        worlds.of_values(rng.integers(0, 4, (5, 2))),
        worlds.of_values(lengths),
        worlds.of_values(starts) if with_starts else None,
    ]
    cc.gather_cache(*map(world.put, specs))
    for spec in specs:
        if spec is not None and spec is not specs[1]:
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    # Compared above; whether such numbers count as faults depends on what they hold.
    with contextlib.suppress(cc.FaultError):
        cc.raise_faults()


# layout, inner dimensions, dtype, pad, block size, types of table, lengths and starts
POOL = (
    ("NHD", (24,), "bfloat16", 0, 4, "int64", "int64", "int64"),
    ("HND", (3, 5), "uint8", 0, 3, "int32", "int32", "int32"),
    ("packed", (2, 8), "float16", 2, 1, "int64", "int32", None),
)


@hypothesis.given(batch=batches(POOL))
def test_any_batch(emulated_world, batch):
    (layout, inner, dtype, pad, block_size, *_), num_blocks, *numbers, rows, seed = batch
    rng = np.random.default_rng(seed)
    world = emulated_world()
    try:
        gather(
            world,
            cache(rng, layout, num_blocks, block_size, inner, dtype, pad),
            worlds.array(rng, (rows, *inner), dtype, pad),
            *(None if n is None else worlds.of_values(n) for n in numbers),
        )
    finally:
        world.close()


@pytest.mark.parametrize("types", [("int32", "int64"), ("int64", "int32")])
def test_bounds_out_of_order(world, rng, types):
    """A row is that of one of the sequences between whose bounds it lies, the same one as on
    NumPy, or it is left as it is. Bounds below those before them are recorded."""
    for count in (1, 2, 5, 40, 150):
        for rows in (1, 7, 60):
            tokens = np.arange(24).reshape(6, 4, 1).astype(np.int16)
            table = rng.integers(0, 6, (count, 5))
            bounds = bounds_out_of_order(rng, count, rows)
            odd = (np.diff(bounds) < 0).any()
            specs = [
                worlds.of_values(tokens),
                worlds.of_values(np.full((rows, 1), -1, np.int16)),
                *typed((table, bounds), types),
            ]
            (got,) = as_on_numpy(
                world, specs, cc.gather_cache, specs[1:2], ["block_table", "cu_seq_lens"],
                must=odd,
            )  # fmt: skip
            for row in range(rows):
                allowed = set()
                for b in range(count):
                    position = row - int(bounds[b])
                    if 0 <= position and row < bounds[b + 1]:
                        page, offset = divmod(position, 4)
                        allowed.add(tokens[table[b, page], offset, 0] if page < 5 else -1)
                assert got[row, 0] in allowed or (got[row, 0] == -1 and (odd or not allowed))


def test_bounds_that_descend_are_recorded(world, rng):
    """All of them could be; rows that no sequence has are left as they are."""
    tokens, bounds = worlds.array(rng, (6, 4, 8), "float16"), np.array([2, 1, 4, 4, 3, 2])
    rows = worlds.array(rng, (6, 8), "float16")
    table = worlds.of_values(np.zeros((5, 1), np.int32))
    put = [world.put(spec) for spec in (tokens, rows, table, worlds.of_values(bounds))]
    cc.gather_cache(*put)
    check_faults("gather_cache", descents(bounds, "cu_seq_lens", 6))
    got, was = (rows.on(x).view(np.uint16) for x in (world.bytes_of(rows), rows.buffer.bytes))
    np.testing.assert_array_equal(got[[0, 4, 5]], was[[0, 4, 5]])


def packed_cache(rng, layout, num_blocks, heads, size, block_size, x, dtype, pad=0):
    """One cache of an x-packed pair."""
    shape = {
        "x-packed-key": (num_blocks, heads, size // x, block_size, x),
        "x-packed-value": (num_blocks, heads, size, block_size),
        "interleaved-value": (num_blocks, heads, block_size // x, size, x),
    }[layout]
    return worlds.array(rng, shape, dtype, pad)


def gather_packed(world, layout, block_size, *specs):
    def expect(src, *arrays):
        def token(block, offset):
            return oracle.packed_token(src, block, offset, layout)

        return oracle.gather_cache(src, *arrays, block_size=block_size, token=token)

    def call(*arrays):
        cc.gather_cache(*arrays, layout=layout)

    check(world, specs, call, expect)


PACKED = ("x-packed-key", "x-packed-value", "interleaved-value")


class TestPackedLayouts:
    """The caches of `reshape_and_cache`, read back."""

    @pytest.mark.parametrize("layout", PACKED)
    @pytest.mark.parametrize(
        "heads, size, block_size, x, dtype, pad, table, lengths, starts",
        [
            (4, 32, 16, 8, "bfloat16", 0, "int32", "int32", "int32"),
            (3, 12, 8, 4, "float32", 4, "int64", "int32", None),
            (2, 9, 15, 3, "float16", 2, "int64", "int64", "int64"),  # an odd x, unaligned
            (1, 32, 32, 16, "float8_e4m3fn", 0, "int32", "int64", "int32"),
            (2, 1, 1, 1, "int8", 1, "int32", "int32", "int64"),
            (1, 3, 4, 1, "float64", 0, "int32", "int32", None),
        ],
    )
    def test_every_shape(
        self, world, rng, layout, heads, size, block_size, x, dtype, pad, table, lengths, starts
    ):  # fmt: skip
        numbers = sequences(rng, 4, 2, block_size, 5, starts is not None)
        gather_packed(
            world,
            layout,
            block_size,
            packed_cache(rng, layout, 5, heads, size, block_size, x, dtype, pad),
            worlds.array(rng, (int(numbers[1][-1]) + 2, heads, size), dtype, pad),
            *typed(numbers, (table, lengths, starts)),
        )

    @pytest.mark.parametrize("layout", PACKED)
    def test_strided_caches_and_rows(self, world, rng, layout):
        """Every second block and some heads of a larger cache; keys or values of K|V rows."""
        numbers = sequences(rng, 3, 2, 8, 4, True)
        wide = packed_cache(rng, layout, 8, 5, 16, 8, 4, "bfloat16")
        rows = worlds.array(rng, (int(numbers[1][-1]) + 1, 2, 32), "bfloat16")
        indices = typed(numbers, ("int32",) * 3)
        gather_packed(world, layout, 8, wide[::2, 1:3], rows[:, :, 16:], *indices)

    def test_values_without_adjacent_elements(self, world, rng):
        """No dimension of a value cache has to be contiguous."""
        numbers = sequences(rng, 3, 2, 8, 4, True)
        wide = packed_cache(rng, "x-packed-value", 4, 2, 6, 16, 1, "float16")
        rows = worlds.array(rng, (int(numbers[1][-1]), 2, 6), "float16")
        gather_packed(world, "x-packed-value", 8, wide[..., ::2], rows,
                      *typed(numbers, ("int64",) * 3))  # fmt: skip

    def test_what_a_write_stored(self, world, rng):
        """Tokens of one sequence, there and back."""
        heads, size, block_size, x = 2, 16, 8, 8
        key, value = (worlds.array(rng, (13, heads, size), "float16") for _ in range(2))
        keys = packed_cache(rng, "x-packed-key", 4, heads, size, block_size, x, "float16")
        values = packed_cache(rng, "x-packed-value", 4, heads, size, block_size, x, "float16")
        blocks = rng.permutation(4)[:2]
        token = np.arange(13)
        slots = worlds.of_values(blocks[token // block_size] * block_size + token % block_size)
        put = [world.put(s) for s in (key, value, keys, values, slots)]
        cc.reshape_and_cache(*put)
        indices = [world.put(worlds.of_values(n)) for n in (blocks[None], np.array([0, 13]))]
        for src, wanted, layout in (
            (put[2], key, "x-packed-key"), (put[3], value, "x-packed-value")
        ):  # fmt: skip
            rows = worlds.array(rng, (13, heads, size), "float16")
            cc.gather_cache(src, world.put(rows), *indices, layout=layout)
            np.testing.assert_array_equal(world.bytes_of(rows), wanted.buffer.bytes)

    # layout, dtype, pad, block size, types of table, lengths and starts
    POOL = (
        ("x-packed-key", "bfloat16", 0, 4, "int64", "int64", "int64"),
        ("x-packed-value", "uint8", 0, 6, "int32", "int32", "int32"),
        ("interleaved-value", "float16", 2, 6, "int64", "int32", None),
    )

    @hypothesis.given(batch=batches(POOL))
    def test_any_batch(self, emulated_world, batch):
        (layout, dtype, pad, block_size, *_), num_blocks, *numbers, rows, seed = batch
        rng = np.random.default_rng(seed)
        world = emulated_world()
        try:
            gather_packed(
                world,
                layout,
                block_size,
                packed_cache(rng, layout, num_blocks, 2, 6, block_size, 2, dtype, pad),
                worlds.array(rng, (rows, 2, 6), dtype, pad),
                *(None if n is None else worlds.of_values(n) for n in numbers),
            )
        finally:
            world.close()

    @pytest.mark.parametrize(
        "layout, shape, words",
        [
            ("x-packed-key", (4, 2, 2, 8), ("4 dimensions",)),
            ("x-packed-key", (4, 3, 2, 8, 8), ("num_kv_heads", "dst")),
            ("x-packed-key", (4, 2, 3, 8, 8), ("16 / 8", "3")),
            ("x-packed-key", (4, 2, 2, 0, 8), ("at least one slot",)),
            ("x-packed-value", (4, 2, 2, 8, 8), ("5 dimensions",)),
            ("x-packed-value", (4, 2, 15, 8), ("head_size",)),
            ("interleaved-value", (4, 2, 1, 15, 8), ("head_size",)),
            ("interleaved-value", (4, 2, 0, 16, 8), ("at least one slot",)),
        ],
    )
    def test_shapes_that_do_not_fit(self, world, rng, layout, shape, words):
        specs = [
            worlds.array(rng, shape, "float16"),
            worlds.array(rng, (5, 2, 16), "float16"),
            worlds.of_values(np.zeros((1, 1), np.int64)),
            worlds.of_values(np.array([0, 5])),
        ]
        refused(
            world, lambda *a: cc.gather_cache(*a, layout=layout), specs, cc.ShapeError,
            "gather_cache", *words,
        )  # fmt: skip

    def test_packs_with_gaps(self, world, rng):
        specs = [
            worlds.array(rng, (4, 2, 2, 8, 16), "float16")[..., ::2],
            worlds.array(rng, (5, 2, 16), "float16"),
            worlds.of_values(np.zeros((1, 1), np.int64)),
            worlds.of_values(np.array([0, 5])),
        ]
        call = functools.partial(cc.gather_cache, layout="x-packed-key")
        refused(world, call, specs, cc.StrideError, "src_cache", "contiguous")

    def test_names(self, rng):
        """All layouts in which a block's slots are the second dimension are one."""
        src = rng.integers(0, 256, (3, 4, 5), np.uint8)
        arguments = np.array([[2, 0]]), np.array([0, 6])
        for name in ("NHD", "HND", "packed", "rows"):
            dst = np.zeros((6, 5), np.uint8)
            cc.gather_cache(src, dst, *arguments, layout=name)
            np.testing.assert_array_equal(dst, np.concatenate([src[2], src[0, :2]]))
        with pytest.raises(cc.ArgumentError, match=r"layout.*x-packed-key.*'x-packed'"):
            cc.gather_cache(src, dst, *arguments, layout="x-packed")


@pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_offsets_past_32_bits(rng, library):
    """D17: rows beyond 2 GiB of dst, read from a block beyond 4 GiB of the cache."""
    xp = pytest.importorskip(library)
    src = xp.zeros((2**32 // (64 * 1152) + 2, 64, 1152), np.uint8)
    dst = xp.zeros((2**31 // 1152 + 10, 1152), np.uint8)
    block, row = src.shape[0] - 1, dst.shape[0] - 9
    tokens = xp.asarray(rng.integers(0, 256, (8, 1152), np.uint8))
    src[block, 56:] = tokens
    cc.gather_cache(src, dst, xp.asarray([[block]]), xp.asarray([row, row + 8]), xp.asarray([56]))
    assert (dst[row : row + 8] == tokens).all()
    assert not dst[row - 100 : row].any() and not dst[row + 8 :].any()


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self, rng):
        return {
            "src_cache": cache(rng, "NHD", 4, 4, (2, 8), "float32"),
            "dst": worlds.array(rng, (5, 2, 8), "float32"),
            "block_table": worlds.of_values(rng.integers(0, 4, (2, 2))),
            "cu_seq_lens": worlds.of_values(np.array([0, 3, 5])),
            "seq_starts": worlds.of_values(np.array([1, 2])),
        }

    def refused(self, world, arguments, error, *words):
        refused(world, cc.gather_cache, arguments.values(), error, "gather_cache", *words)

    @pytest.mark.parametrize(
        "name, shape, words",
        [
            ("src_cache", (4, 4), ("2 dimensions",)),
            ("src_cache", (4, 0, 2, 8), ("at least one slot",)),
            ("dst", (5, 16), ("2 dimensions",)),
            ("dst", (5, 2, 9), ("inner_2 = 9", "src_cache", "8")),
            ("dst", (5, 2, 8, 1), ("4 dimensions",)),
            ("block_table", (2,), ("(1 dimension)",)),
            ("block_table", (3, 2), ("cu_seq_lens",)),
            ("cu_seq_lens", (2, 1), ("2 dimensions",)),
            ("cu_seq_lens", (), ()),
            ("cu_seq_lens", (2,), ("[3]", "[2]")),
            ("cu_seq_lens", (0,), ("[3]", "[0]")),
            ("seq_starts", (2, 1), ("2 dimensions",)),
            ("seq_starts", (3,), ("[2]", "[3]")),
        ],
    )
    def test_shape(self, world, arguments, rng, name, shape, words):
        arguments[name] = worlds.array(rng, shape, arguments[name].dtype)
        self.refused(world, arguments, cc.ShapeError, name, *words)

    @pytest.mark.parametrize(
        "name, dtype, expected",
        [
            ("dst", "float16", "float32"),
            ("block_table", "int16", "int32 or int64"),
            ("cu_seq_lens", "float32", "int32 or int64"),
            ("seq_starts", "uint8", "int32 or int64"),
        ],
    )
    def test_dtype(self, world, arguments, rng, name, dtype, expected):
        arguments[name] = worlds.array(rng, arguments[name].shape, dtype)
        self.refused(world, arguments, cc.DTypeError, name, dtype, expected)

    @pytest.mark.parametrize("name", ["src_cache", "dst", "block_table", "cu_seq_lens"])
    def test_gaps_in_the_last_dimension(self, world, arguments, rng, name):
        spec = arguments[name]
        wide = worlds.array(rng, (*spec.shape[:-1], 2 * spec.shape[-1]), spec.dtype)
        arguments[name] = wide[..., ::2]
        self.refused(world, arguments, cc.StrideError, name, "contiguous")

    def test_bounds_with_gaps(self, world, arguments, rng):
        """Of a single one the stride means nothing; with more of the same stride it does."""
        arguments["block_table"] = worlds.of_values(np.zeros((1, 2), np.int64))
        arguments["seq_starts"] = worlds.of_values(np.zeros(1, np.int64))
        arguments["cu_seq_lens"] = worlds.of_values(np.zeros(4, np.int64))
        bounds = arguments["cu_seq_lens"]
        bounds.strides = (16,)
        for count in (1, 1, 1, 2, 1, 2):
            bounds.shape = (count,)
            arguments["block_table"].shape = (count - 1, 2)
            arguments["seq_starts"].shape = (count - 1,)
            if count == 1:
                check(world, list(arguments.values()), cc.gather_cache, oracle.gather_cache)
            else:
                self.refused(world, arguments, cc.StrideError, "cu_seq_lens", "contiguous")

    def test_more_than_two_dimensions_with_gaps(self, world, arguments, rng):
        arguments["src_cache"] = worlds.array(rng, (4, 4, 2, 3, 2, 8), "float32")
        arguments["dst"] = worlds.array(rng, (5, 2, 4, 5, 16), "float32")[:, :, 1:, 1::2, :8]
        self.refused(world, arguments, cc.StrideError, "dst", "two inner dimensions")

    def test_overlapping_rows(self, world, arguments):
        arguments["dst"].strides = (0, *arguments["dst"].strides[1:])
        self.refused(world, arguments, cc.StrideError, "dst", "share")

    def test_rows_that_overlap_from_some_number_on(self, world, arguments, rng):
        """Heads around rows: more rows of the same strides would run into the next head, also
        where fewer were seen before."""
        dst = worlds.array(rng, (3, 5, 8), "float32")[:2].permuted(1, 0, 2)
        arguments["dst"] = dst
        for rows in (4, 4, 4, 5, 6, 5, 6):
            dst.shape = (rows, 2, 8)
            if rows <= 5:
                check(world, list(arguments.values()), cc.gather_cache, oracle.gather_cache)
            else:
                with pytest.raises(cc.StrideError, match="dst.*share"):
                    cc.gather_cache(*map(world.put, arguments.values()))

    @pytest.mark.parametrize("name", ["src_cache", "dst", "block_table", "cu_seq_lens"])
    def test_none(self, world, arguments, name):
        put = {n: world.put(s) for n, s in arguments.items()} | {name: None}
        with pytest.raises(cc.DTypeError, match=name):
            cc.gather_cache(**put)


def unaligned(values, by):
    """The same numbers, ``by`` bytes after an aligned address."""
    values = np.ascontiguousarray(values)
    buffer = worlds.Buffer(values.nbytes + by, None, fill=0)
    buffer.bytes[by:] = values.reshape(-1).view(np.uint8)
    return buffer.view(values.shape, values.dtype.name, offset=by)


@pytest.mark.parametrize("kind", ["numpy", "emulated"])
@pytest.mark.parametrize("name", ["block_table", "cu_seq_lens", "seq_starts"])
def test_unaligned_indices_are_refused(rng, emulated_world, kind, name):
    world = worlds.NumPyWorld() if kind == "numpy" else emulated_world()
    arguments = {
        "src_cache": cache(rng, "NHD", 4, 4, (8,), "float32"),
        "dst": worlds.array(rng, (5, 8), "float32"),
        "block_table": unaligned(rng.integers(0, 4, (2, 2)), 4 * (name == "block_table")),
        "cu_seq_lens": unaligned(np.array([0, 3, 5]), 4 * (name == "cu_seq_lens")),
        "seq_starts": unaligned(np.array([1, 2]), 4 * (name == "seq_starts")),
    }
    try:
        with pytest.raises(cc.StrideError, match=f"{name}.*multiples"):
            cc.gather_cache(*map(world.put, arguments.values()))
    finally:
        world.close()


def test_more_sequences_than_kernels_number():
    src, dst = np.zeros((1, 4, 8), np.float32), np.zeros((2, 8), np.float32)
    table = np.broadcast_to(np.int32(0), (2**31, 1))
    for call in (
        lambda: cc.gather_cache(src, dst, table, np.array([0, 2])),
        lambda: cc.slot_mapping(table, np.array([0]), np.array([0, 1]), 4),
    ):
        with pytest.raises(cc.ShapeError, match=r"block_table.*2\^31 sequences, got 2147483648"):
            call()


def test_read_only_rows_are_refused(rng):
    frozen = np.zeros((2, 8), np.float32)
    frozen.flags.writeable = False
    src, table = np.zeros((1, 4, 8), np.float32), np.zeros((1, 1), np.int32)
    with pytest.raises(cc.NotWritableError, match="dst"):
        cc.gather_cache(src, frozen, table, np.array([0, 2]))


@pytest.mark.gpu
def test_arrays_on_different_devices_are_refused(rng):
    import cupy

    src = cupy.zeros((1, 4, 8), np.float32)
    table, bounds = cupy.zeros((1, 1), np.int32), cupy.array([0, 2])
    with pytest.raises(cc.DeviceError, match=r"dst.*cuda:0.*cpu"):
        cc.gather_cache(src, np.zeros((2, 8), np.float32), table, bounds)
    with pytest.raises(cc.DeviceError, match="block_table"):
        cc.gather_cache(src, cupy.zeros((2, 8), np.float32), table.get(), bounds)
