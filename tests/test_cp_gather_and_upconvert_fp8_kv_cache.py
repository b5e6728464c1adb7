# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib

import hypothesis
import machine_code
import numpy as np
import oracle
import pytest
import worlds
from gathers import as_on_numpy, batches, bounds_out_of_order, check, refused, sequences, typed
from guards import BAD

import cupy_cache as cc
from cupy_cache.compilation.specialisations import specialisations
from cupy_cache.runtime import formats

OP = "cp_gather_and_upconvert_fp8_kv_cache"
TARGETS = ("bfloat16", "float16", "float32")


def entries(rng, layout, num_blocks, block_size, dtype="uint8", pad=0):
    """Entries of random bits, the scales among them mostly ordinary numbers."""
    if layout == "contiguous":
        cache = worlds.array(rng, (num_blocks, block_size, 656), dtype, pad)
    else:  # pages of a pool of several layers, with a gap after each entry
        gap = {"pool": 16, "odd": 3}[layout]
        pool = worlds.array(rng, (num_blocks, 3, block_size, 656 + gap), dtype, pad)
        cache = pool[:, 1, :, :656]
    scales = (2.0 ** rng.uniform(-14, 6, (num_blocks, block_size, 4))).astype(np.float32)
    scales[rng.random(scales.shape) < 0.1] = rng.choice([np.inf, np.nan, 1e-40, -0.5])
    cache.on(cache.buffer.bytes).view(np.uint8)[..., 512:528] = scales.view(np.uint8)
    return cache


def gather(world, specs, batch_size, rope_dtype=None):
    """Run and compare with the loops."""
    dst = specs[1]
    rope = rope_dtype or (dst.dtype if dst.dtype != "float32" else "bfloat16")

    def call(src, dst, table, bounds, starts):
        cc.cp_gather_and_upconvert_fp8_kv_cache(
            src, dst, table, bounds, batch_size, starts, rope_dtype=rope_dtype
        )

    def expect(src, dst, table, bounds, starts):
        def token(block, offset):
            entry = src[block, offset].view(np.uint8)
            return oracle.fp8_ds_mla_token(entry, dst.dtype, formats.DTYPES[rope].numpy)

        bounds = [*map(int, bounds), len(dst)]  # the last sequence has all rows that are left
        rows = len(dst) if batch_size else 0
        return oracle.gather_cache(src, dst, table, bounds, starts, rows=rows, token=token)

    check(world, specs, call, expect, OP, converted=dst)


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize(
    "layout, block_size, storage, src_pad, dst_pad, gap, table, bounds, starts",
    [
        ("contiguous", 64, "uint8", 0, 0, 0, "int32", "int32", "int32"),
        ("pool", 3, "float8_e4m3fn", 0, 0, 8, "int64", "int32", None),
        ("odd", 5, "uint8", 0, 4, 0, "int32", "int64", "int64"),  # entries 659 bytes apart
        ("contiguous", 1, "int8", 4, 8, 4, "int64", "int64", "int32"),
        ("contiguous", 7, "float8_e5m2", 8, 0, 2, "int32", "int32", "int64"),
    ],
)
def test_every_layout(
    world, rng, layout, block_size, storage, src_pad, dst_pad, gap, table, bounds, starts, dtype
):  # fmt: skip
    """``gap``: elements between rows."""
    numbers = sequences(rng, 3, 2 if block_size < 20 else 1, block_size, 3, starts is not None)
    rows = worlds.array(rng, (int(numbers[1][-1]), 576 + gap), dtype, dst_pad)[:, :576]
    specs = (
        entries(rng, layout, 3, block_size, storage, src_pad),
        rows,
        *typed((numbers[0], numbers[1][:-1], numbers[2]), (table, bounds, starts)),
    )
    gather(world, specs, 3)


@pytest.mark.parametrize("rope_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", TARGETS)
def test_the_rope_part_is_of_the_dtype_written(world, rng, dtype, rope_dtype):
    specs = (
        entries(rng, "contiguous", 2, 4),
        worlds.array(rng, (6, 576), dtype),
        worlds.of_values(np.array([[1, 0]])),
        worlds.of_values(np.array([0])),
        None,
    )
    gather(world, specs, 1, rope_dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rope_bits_are_copied(world, rng, dtype):
    """NaN and all."""
    src, dst = entries(rng, "contiguous", 1, 4), worlds.array(rng, (4, 576), dtype)
    indices = worlds.of_values(np.array([[0]])), worlds.of_values(np.array([0]))
    cc.cp_gather_and_upconvert_fp8_kv_cache(*(world.put(s) for s in (src, dst, *indices)), 1)
    rows = world.bytes_of(dst).reshape(4, 1152)
    np.testing.assert_array_equal(rows[:, 1024:], src.on(src.buffer.bytes)[0, :, 528:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rule", ["power_of_two", "amax"])
def test_what_a_write_stored(world, rng, dtype, rule):
    """Multiples of a power of two with four significant bits survive both ways."""
    numpy = formats.DTYPES[dtype].numpy
    kv_c = rng.integers(-15, 16, (11, 512)) * 2.0 ** rng.integers(-3, 1, (11, 1))
    kv_c[:, ::128] = 28.0  # an amax for which amax / 448 is a power of two
    k_pe = rng.normal(size=(11, 64)).astype(numpy)
    tokens = [worlds.of_values(a.astype(numpy)) for a in (kv_c, k_pe)]
    cache = worlds.array(rng, (3, 8, 656), "uint8")
    blocks = rng.permutation(3)[:2]
    slots = blocks[np.arange(11) // 8] * 8 + np.arange(11) % 8
    put = [world.put(s) for s in (*tokens, cache, worlds.of_values(slots))]
    cc.concat_and_cache_mla(*put, "fp8_ds_mla", scale_rule=rule)
    dst = worlds.array(rng, (11, 576), dtype)
    indices = worlds.of_values(blocks[None]), worlds.of_values(np.array([0]))
    cc.cp_gather_and_upconvert_fp8_kv_cache(put[2], *(world.put(s) for s in (dst, *indices)), 1)
    rows = dst.on(world.bytes_of(dst)).astype(np.float32)
    np.testing.assert_array_equal(rows[:, :512], kv_c)
    np.testing.assert_array_equal(rows[:, 512:], k_pe.astype(np.float32))


def test_literal_numbers(world):
    """e4m3 1, 448, -2^-9 and 10 times the published scales of amax 1, 0, 449 and 448."""
    entry = np.zeros(656, np.uint8)
    for tile, (code, scale) in enumerate(
        [(0x38, "0000803b"), (0x7E, "00000039"), (0x81, "00000040"), (0x52, "0000803f")]
    ):
        entry[128 * tile : 128 * (tile + 1)] = code
        entry[512 + 4 * tile : 516 + 4 * tile] = list(bytes.fromhex(scale))
    entry[528::2], entry[529::2] = 0x80, 0x3F
    dst = worlds.of_values(np.zeros((1, 576), np.uint16), "bfloat16")
    arrays = (
        worlds.of_values(entry[None, None]), dst, worlds.of_values(np.array([[0]])),
        worlds.of_values(np.array([0])),
    )  # fmt: skip
    cc.cp_gather_and_upconvert_fp8_kv_cache(*map(world.put, arrays), 1)
    wanted = [0x3B80] * 128 + [0x3D60] * 128 + [0xBB80] * 128 + [0x4120] * 128 + [0x3F80] * 64
    assert world.bytes_of(dst).view(np.uint16).tolist() == wanted


@pytest.mark.parametrize(
    "rows, bounds", [(9, [3, 5, 5]), (4, [0, 4, 6]), (5, [-2, 1, 1]), (3, [0])]
)
def test_the_last_sequence_runs_to_the_end(world, rng, rows, bounds):
    """Rows before the first are left as they are; a sequence may be empty or past the end."""
    specs = (
        entries(rng, "contiguous", 3, 4),
        worlds.array(rng, (rows, 576), "bfloat16"),
        worlds.of_values(rng.integers(0, 3, (len(bounds) + 1, 2))),
        worlds.of_values(np.array(bounds)),
        None,
    )
    gather(world, specs, len(bounds))


@pytest.mark.parametrize("rows, count", [(0, 2), (5, 0), (0, 0)])
def test_nothing_to_do(world, rng, rows, count):
    specs = (
        entries(rng, "contiguous", 3, 4),
        worlds.array(rng, (rows, 576), "bfloat16"),
        worlds.array(rng, (count, 2), "int32"),
        worlds.of_values(np.zeros(count, np.int32)),
        worlds.of_values(np.zeros(count, np.int32)),
    )
    gather(world, specs, count)


@pytest.mark.parametrize("kind", ["block", "page", "start"])
def test_values_out_of_range_are_skipped_and_recorded(world, rng, kind):
    table, bounds, starts = rng.integers(0, 4, (3, 2)), np.array([0, 5, 8]), np.zeros(3, int)
    rows, bad = 12, int(rng.choice(BAD))
    if kind == "block":
        table[1, 0] = bad
    elif kind == "start":
        starts[1] = bad
    else:  # the last sequence gets one row more than its table has
        rows = 17
    specs = (
        entries(rng, "contiguous", 4, 4),
        worlds.array(rng, (rows, 576), "bfloat16"),
        *map(worlds.of_values, (table, bounds, starts)),
    )
    gather(world, specs, 3)


def test_starts_that_make_no_sense_stay_inside(world, rng):
    """What is written is not defined, but nothing outside the arrays is touched."""
    wild = [*BAD, 0, 3, 9, 12]
    specs = [
        entries(rng, "contiguous", 4, 4),
        worlds.array(rng, (12, 576), "bfloat16"),
        worlds.of_values(rng.integers(0, 4, (5, 2))),
        worlds.of_values(rng.choice(wild, 5)),
        worlds.of_values(rng.choice(wild, 5)),
    ]
    *put, starts = map(world.put, specs)
    cc.cp_gather_and_upconvert_fp8_kv_cache(*put, 5, starts)
    for spec in (specs[0], *specs[2:]):
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    # Compared above; whether such numbers count as faults depends on what they hold.
    with contextlib.suppress(cc.FaultError):
        cc.raise_faults()


# dtype of dst, layout, block size, types of table, bounds and starts
POOL = (
    ("bfloat16", "contiguous", 4, "int64", "int64", "int64"),
    ("float32", "odd", 3, "int32", "int32", None),
)


def test_no_sequences(emulated_world, rng, monkeypatch):
    """Nothing is launched, and no row is written."""
    world = emulated_world()
    try:
        specs = (
            worlds.array(rng, (3, 4, 656), "uint8"), worlds.array(rng, (5, 576), "bfloat16"),
            worlds.array(rng, (2, 3), "int32"), worlds.of_values(np.zeros(0, np.int32)),
        )  # fmt: skip
        monkeypatch.setattr(world.driver, "launch", None)
        cc.cp_gather_and_upconvert_fp8_kv_cache(*(world.put(s) for s in specs), 0)
        for spec in specs:
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    finally:
        world.close()


@hypothesis.settings(max_examples=20)
@hypothesis.given(batch=batches(POOL))
def test_any_batch(emulated_world, batch):
    (dtype, layout, block_size, *_), num_blocks, table, bounds, starts, rows, seed = batch
    rng = np.random.default_rng(seed)
    world = emulated_world()
    try:
        specs = (
            entries(rng, layout, num_blocks, block_size),
            worlds.array(rng, (min(rows, 9), 576), dtype),
            *(None if n is None else worlds.of_values(n) for n in (table, bounds[:-1], starts)),
        )
        gather(world, specs, len(table))
    finally:
        world.close()


def test_starts_out_of_order(world, rng):
    """Rows are those of the same sequences as on NumPy; starts below those before them are
    recorded."""
    for count in (1, 3, 40):
        rows = 30
        starts = bounds_out_of_order(rng, count, rows)[:count]
        numbers = rng.integers(0, 0x3C, (6, 4, 656), np.uint8)  # in every format: no NaN
        specs = [
            worlds.of_values(numbers),
            worlds.array(rng, (rows, 576), "bfloat16"),
            *typed((rng.integers(0, 6, (count, 8)), starts), ("int32", "int32")),
        ]
        as_on_numpy(
            world, specs,
            lambda *step, count=count: cc.cp_gather_and_upconvert_fp8_kv_cache(*step, count),
            specs[1:2], ["block_table", "workspace_starts"], must=(np.diff(starts) < 0).any(),
        )  # fmt: skip


class TestRefusals:
    @pytest.fixture
    def arguments(self, rng):
        return [
            worlds.array(rng, (4, 4, 656), "uint8"),
            worlds.array(rng, (5, 576), "bfloat16"),
            worlds.of_values(rng.integers(0, 4, (2, 2))),
            worlds.of_values(np.array([0, 3])),
            worlds.of_values(np.array([1, 2])),
        ]

    def refused(self, world, arguments, error, *words, batch_size=2, **options):
        def call(src, dst, table, bounds, starts):
            cc.cp_gather_and_upconvert_fp8_kv_cache(
                src, dst, table, bounds, batch_size, starts, **options
            )

        refused(world, call, arguments, error, OP, *words)

    @pytest.mark.parametrize(
        "index, shape, dtype, error, words",
        [
            (0, (4, 4, 640), "uint8", cc.ShapeError, ("src_cache", "656", "640")),
            (0, (4, 0, 656), "uint8", cc.ShapeError, ("src_cache", "at least one slot")),
            (0, (4, 4, 656), "float16", cc.DTypeError, ("src_cache", "float16")),
            (1, (5, 512), "bfloat16", cc.ShapeError, ("dst", "576", "512")),
            (1, (5, 576), "uint16", cc.DTypeError, ("dst", "bfloat16")),
            (2, (1, 2), "int64", cc.ShapeError, ("block_table", "2 sequences")),
            (3, (2,), "int16", cc.DTypeError, ("workspace_starts", "int16")),
            (3, (2, 1), "int64", cc.ShapeError, ("workspace_starts", "2 dimensions")),
            (4, (1,), "int64", cc.ShapeError, ("seq_starts", "2 sequences")),
        ],
    )
    def test_arguments_that_do_not_match(
        self, world, rng, arguments, index, shape, dtype, error, words
    ):  # fmt: skip
        arguments[index] = worlds.array(rng, shape, dtype)
        self.refused(world, arguments, error, *words)

    @pytest.mark.parametrize("batch_size", [-1, 1, 3, None, 2.0, True])
    def test_batch_size(self, world, arguments, batch_size):
        words = "batch_size", str(batch_size)
        self.refused(world, arguments, cc.ArgumentError, *words, batch_size=batch_size)

    def test_rope_dtype(self, world, arguments):
        words = "rope_dtype", "bfloat16 or float16", "'float32'"
        self.refused(world, arguments, cc.ArgumentError, *words, rope_dtype="float32")


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("architecture", [75, 90, 120])
def test_compiles(architecture, dtype):
    pytest.importorskip("cupy")
    kernels = specialisations(
        1, 576, 64, dtype, layouts=("rows",), kv_cache_dtype="fp8_ds_mla", ops=[OP]
    )
    assert [len(machine_code.compile_cubin(k, architecture)[0]) > 0 for k in kernels] == [True] * 2
