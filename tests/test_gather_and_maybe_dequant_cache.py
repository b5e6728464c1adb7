# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import hypothesis
import machine_code
import numpy as np
import oracle
import pytest
import worlds
from gathers import batches, cache, check, refused, sequences, typed

import cupy_cache as cc
from cupy_cache.compilation.specialisations import specialisations
from cupy_cache.ops import gather_and_maybe_dequant_cache as module
from cupy_cache.runtime import formats

TARGETS = ("float16", "bfloat16", "float32")


def gather(world, specs, kv_cache_dtype, scale, num_tokens):
    """Run with ``scale``, a number or a spec, and compare with the loops."""
    stored = oracle.STORED.get(kv_cache_dtype)
    dst = specs[1]

    def call(src, dst, table, bounds, starts):
        given = world.put(scale) if isinstance(scale, worlds.Spec) else scale
        cc.gather_and_maybe_dequant_cache(
            src, dst, table, bounds, "not looked at", num_tokens, kv_cache_dtype, given, starts
        )

    def expect(src, dst, table, bounds, starts):
        value, bits = scale, src.view(np.uint8) if stored else src
        if isinstance(scale, worlds.Spec):
            (value,) = scale.on(scale.buffer.bytes).reshape(-1)

        def token(block, offset):
            entry = bits[block, offset]
            if stored is None:
                return entry
            return oracle.dequantise(entry, value, stored, dst.dtype)

        return oracle.gather_cache(src, dst, table, bounds, starts, rows=num_tokens, token=token)

    check(world, specs, call, expect, module.NAME, converted=dst if stored else None)


# layout, inner dimensions, block size, stored, kv_cache_dtype, dtype of dst, pad of src and of dst
SHAPES = (
    ("NHD", (576,), 16, "uint8", "fp8", "bfloat16", 0, 0),
    ("NHD", (5,), 3, "float8_e5m2", "fp8_e5m2", "float16", 1, 2),  # odd and unaligned
    ("pool", (40,), 5, "int8", "int8", "float32", 3, 4),  # entries 43 bytes apart
    ("HND", (3, 16), 4, "float8_e4m3fn", "fp8_e4m3", "float32", 4, 0),
    ("packed", (2, 8), 8, "uint8", "fp8_e5m2", "bfloat16", 8, 0),
    ("HND", (2, 3, 4), 2, "uint8", "int8", "float16", 0, 8),
    ("NHD", (1,), 1, "float8_e4m3fn", "fp8", "bfloat16", 0, 2),
)


@pytest.mark.parametrize(
    "layout, inner, block_size, storage, kv_cache_dtype, dtype, src_pad, dst_pad", SHAPES
)
@pytest.mark.parametrize("scaled_by", ["number", "array", "scalar"])
@pytest.mark.parametrize("with_starts", [False, True])
def test_dequantised_rows(
    world, rng, layout, inner, block_size, storage, kv_cache_dtype, dtype, src_pad, dst_pad,
    scaled_by, with_starts,
):  # fmt: skip
    numbers = sequences(rng, 3, 2, block_size, 4, with_starts)
    rows = int(numbers[1][-1])
    scale = float(np.float32(10.0 ** rng.uniform(-3, 3)))
    if scaled_by != "number":
        scale = worlds.of_values(np.full(1 if scaled_by == "array" else (), scale, np.float32))
    specs = (
        cache(rng, layout, 4, block_size, inner, storage, src_pad),
        worlds.array(rng, (rows + 2, *inner), dtype, dst_pad),
        *typed(numbers, rng.choice(["int32", "int64"], 3)),
    )
    gather(world, specs, kv_cache_dtype, scale, rows + int(rng.integers(-2, 3)) if rows > 1 else 1)


@pytest.mark.parametrize(
    "layout, inner, block_size, dtype, pad",
    [
        ("NHD", (576,), 16, "bfloat16", 0),
        ("HND", (3, 10), 7, "float32", 4),
        ("pool", (7,), 8, "float16", 2),
        ("NHD", (9,), 4, "float8_e4m3fn", 1),
        ("NHD", (3,), 4, "float64", 0),
    ],
)
def test_raw_rows(world, rng, layout, inner, block_size, dtype, pad):
    """Bit patterns of every kind stay what they are; the scale is not used."""
    numbers = sequences(rng, 4, 3, block_size, 5, True)
    rows = int(numbers[1][-1]) + 1
    name = str(rng.choice(["auto", "float16", "bfloat16", "float32"]))
    specs = (
        cache(rng, layout, 5, block_size, inner, dtype, pad),
        worlds.array(rng, (rows, *inner), dtype, pad),
        *typed(numbers, ("int32",) * 3),
    )
    gather(world, specs, name, None, rows // 2)


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_every_code(world, rng, kv_cache_dtype, dtype):
    """All 256, to where they become subnormal, zero or infinite."""
    codes = np.stack([rng.permutation(256) for _ in range(4)]).astype(np.uint8)
    indices = worlds.of_values(np.array([[0]])), worlds.of_values(np.array([0, 4])), None
    for scale in (1.0, 0.1, 2.0**-14, 2.0**-130, 1.7e38):
        specs = worlds.of_values(codes[None]), worlds.array(rng, (4, 256), dtype), *indices
        gather(world, specs, kv_cache_dtype, float(np.float32(scale)), 4)


@pytest.mark.parametrize(
    "kv_cache_dtype, code, scale, dtype, bits",
    [
        ("fp8", 0x52, 0.1, "float32", 0x3F800000),  # 10 * float32(0.1) is 1
        ("fp8", 0x7E, 1.0, "float16", 0x5F00),  # 448
        ("fp8_e4m3", 0x01, 1.0, "bfloat16", 0x3B00),  # 2^-9
        ("fp8", 0x80, 3.0, "bfloat16", 0x8000),
        ("fp8_e5m2", 0x49, 1.0, "float16", 0x4900),  # 10
        ("fp8_e5m2", 0x7C, 0.5, "bfloat16", 0x7F80),  # infinity
        ("fp8_e5m2", 0x7B, 2.0, "float16", 0x7C00),  # 114688 is past float16
        ("int8", 0x80, 0.5, "float32", 0xC2800000),  # -64
        ("int8", 0x80, None, "float32", 0xC3000000),  # -128: None is 1.0
        ("int8", 0xFF, 2.0**-149, "float32", 0x80000001),  # the smallest number
    ],
)
def test_literal_numbers(world, kv_cache_dtype, code, scale, dtype, bits):
    size = formats.DTYPES[dtype].bytes
    dst = worlds.of_values(np.zeros((1, 3), f"u{size}"), dtype)
    arrays = (
        worlds.of_values(np.full((1, 1, 3), code, np.uint8)), dst,
        worlds.of_values(np.array([[0]])), worlds.of_values(np.array([0, 1])),
    )  # fmt: skip
    put = map(world.put, arrays)
    cc.gather_and_maybe_dequant_cache(*put, None, 1, kv_cache_dtype, scale)
    assert world.bytes_of(dst).view(f"u{size}").tolist() == [bits] * 3


@pytest.mark.parametrize("num_tokens", [0, 1, 6, 7])
def test_rows_from_num_tokens_on_are_left(world, rng, num_tokens):
    specs = (
        worlds.array(rng, (3, 4, 8), "uint8"),
        worlds.array(rng, (7, 8), "float16"),
        worlds.of_values(rng.integers(0, 3, (2, 1))),
        worlds.of_values(np.array([0, 3, 7])),
        None,
    )
    gather(world, specs, "fp8", 0.25, num_tokens)


def test_another_number_of_tokens_needs_no_other_plan(rng):
    """It changes with every step of an engine."""
    src, dst = rng.integers(0, 99, (3, 4, 24), np.uint8), np.zeros((12, 24), np.float32)
    table, bounds = np.array([[0, 1, 2]]), np.array([0, 12])
    before = len(module.OP.memory)
    for num_tokens in range(1, 13):
        cc.gather_and_maybe_dequant_cache(src, dst, table, bounds, None, num_tokens, "fp8", 1.0)
    assert len(module.OP.memory) <= before + 1


def test_strided_rows(world, rng):
    """Rows and heads cut from a wider workspace."""
    numbers = sequences(rng, 3, 2, 4, 4, True)
    wide = worlds.array(rng, (int(numbers[1][-1]) + 1, 6, 16), "bfloat16")
    specs = (
        cache(rng, "HND", 4, 4, (4, 8), "uint8"),
        wide[:, 1:5, 8:],
        *typed(numbers, ("int64",) * 3),
    )
    gather(world, specs, "fp8", 0.5, wide.shape[0])


@pytest.mark.parametrize("kind", ["block", "page", "start"])
def test_values_out_of_range_are_skipped_and_recorded(world, rng, kind):
    table, bounds, starts = rng.integers(0, 4, (3, 2)), np.array([0, 5, 8, 16]), np.zeros(3, int)
    bad = int(rng.choice([-1, 2**31, -(2**63), 2**63 - 1]))
    if kind == "block":
        table[1, 0] = bad
    elif kind == "start":
        starts[1] = bad
    else:
        bounds[2:] += 6
    specs = (
        worlds.array(rng, (4, 4, 8), "uint8"),
        worlds.array(rng, (int(bounds[-1]), 8), "float32"),
        *map(worlds.of_values, (table, bounds, starts)),
    )
    gather(world, specs, "fp8", 2.0, int(bounds[-1]))


# --- scales of heads, and of tokens and heads -----------------------------------------------------

# layout, heads, head size, block size, stored as, kv_cache_dtype, dtype of dst, pad
OF_HEADS = (
    ("NHD", 8, 64, 16, "uint8", "fp8", "bfloat16", 0),
    ("HND", 3, 20, 5, "int8", "int8", "float32", 4),
    ("packed", 5, 7, 4, "float8_e4m3fn", "fp8_e4m3", "float16", 1),
    ("NHD", 1, 16, 2, "uint8", "int8", "float16", 0),
    ("x-packed-key", 4, 32, 8, "uint8", "fp8", "bfloat16", 0),
    ("x-packed-value", 3, 10, 4, "int8", "int8", "float32", 0),
    ("interleaved-value", 2, 12, 32, "uint8", "fp8", "float16", 0),
)


def cache_of(rng, layout, num_blocks, block_size, heads, size, dtype, pad):
    shapes = {
        "x-packed-key": (num_blocks, heads, size // 4, block_size, 4),
        "x-packed-value": (num_blocks, heads, size, block_size),
        "interleaved-value": (num_blocks, heads, block_size // 16, size, 16),
    }
    if layout in shapes:
        return worlds.array(rng, shapes[layout], dtype, pad)
    return cache(rng, layout, num_blocks, block_size, (heads, size), dtype, pad)


@pytest.mark.parametrize(
    "layout, heads, size, block_size, storage, kv_cache_dtype, dtype, pad", OF_HEADS
)
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_scales_of_heads(
    world, rng, layout, heads, size, block_size, storage, kv_cache_dtype, dtype, pad, by_token,
    strided,
):  # fmt: skip
    """One for each head, or for each token and head."""
    numbers = sequences(rng, 3, 2, block_size, 4, bool(rng.integers(2)))
    rows = int(numbers[1][-1])
    shape = (4, block_size, heads) if by_token else (heads,)
    values = np.float32(10.0 ** rng.uniform(-3, 3, (*shape, 2)))
    scale = worlds.of_values(values)[..., 1] if strided else worlds.of_values(values[..., 1])
    specs = (
        cache_of(rng, layout, 4, block_size, heads, size, storage, pad),
        worlds.array(rng, (rows + 2, heads, size), dtype, 4 * bool(pad)),
        *typed(numbers, rng.choice(["int32", "int64"], 3)),
    )
    count, plain = max(rows - 1, 0), "NHD" if layout in ("HND", "packed") else layout
    kind = kv_cache_dtype
    if by_token and rng.integers(2):
        kind = "int8_per_token_head" if kind == "int8" else "fp8_per_token_head"

    def call(src, dst, table, bounds, starts):
        scales = {"scale": None, "scale_cache" if by_token else "scale": world.put(scale)}
        cc.gather_and_maybe_dequant_cache(
            src, dst, table, bounds, None, count, kind, seq_starts=starts, layout=plain, **scales
        )

    def expect(src, dst, table, bounds, starts):
        bits, given = src.view(np.uint8), scale.on(scale.buffer.bytes)

        def token(block, offset):
            entry = bits[block, offset] if plain == "NHD" else None
            if entry is None:
                entry = np.array(oracle.packed_token(bits, block, offset, plain))
            by = given[block, offset] if by_token else given
            kind = oracle.STORED[kv_cache_dtype]
            return [oracle.dequantise(*row, kind, dst.dtype) for row in zip(entry, by)]

        return oracle.gather_cache(
            src, dst, table, bounds, starts, rows=count, block_size=block_size, token=token
        )

    check(world, specs, call, expect, module.NAME, converted=specs[1])


def test_what_was_written_comes_back(world, rng):
    """Scales that the writer found for each token and head."""
    rows = rng.standard_normal((9, 4, 32)).astype(np.float32)
    written = [worlds.of_values(rows) for _ in "kv"]
    caches = [worlds.array(rng, (3, 8, 4, 32), "int8") for _ in "kv"]
    scales = [worlds.array(rng, (3, 8, 4), "float32") for _ in "kv"]
    slots = worlds.of_values(np.arange(9) + 8)
    cc.reshape_and_cache_flash_per_token_head(
        *map(world.put, (*written, *caches, *scales, slots)), "int8"
    )
    out = worlds.array(rng, (9, 4, 32), "float32")
    table, bounds = worlds.of_values(np.array([[1, 2]])), worlds.of_values(np.array([0, 9]))
    cc.gather_and_maybe_dequant_cache(
        *map(world.put, (caches[1], out, table, bounds)), None, 9, "int8", None,
        scale_cache=world.put(scales[1]),
    )  # fmt: skip
    read = out.on(world.bytes_of(out))
    largest = np.abs(rows).max(-1, keepdims=True)
    assert (np.abs(read - rows) <= 0.51 * largest / 127).all()


# inner dimensions, kv_cache_dtype, dtype of dst, pad, block size, index types
POOL = (
    ((24,), "fp8", "bfloat16", 0, 4, "int64", "int64", "int64"),
    ((3, 5), "int8", "float32", 4, 3, "int32", "int32", "int32"),
    ((7,), "fp8_e5m2", "float16", 2, 1, "int32", "int64", None),
)


@hypothesis.given(batch=batches(POOL))
def test_any_batch(emulated_world, batch):
    (inner, kv_cache_dtype, dtype, pad, block_size, *_), num_blocks, *numbers, rows, seed = batch
    rng = np.random.default_rng(seed)
    world = emulated_world()
    try:
        specs = (
            cache(rng, "NHD", num_blocks, block_size, inner, "uint8", pad),
            worlds.array(rng, (rows, *inner), dtype, pad),
            *(None if n is None else worlds.of_values(n) for n in numbers),
        )
        gather(world, specs, kv_cache_dtype, 0.3, int(rng.integers(0, rows + 1)))
    finally:
        world.close()


class TestRefusals:
    @pytest.fixture
    def arguments(self, rng):
        return [
            worlds.array(rng, (4, 4, 2, 8), "uint8"),
            worlds.array(rng, (5, 2, 8), "float16"),
            worlds.of_values(rng.integers(0, 4, (2, 2))),
            worlds.of_values(np.array([0, 3, 5])),
            worlds.of_values(np.array([1, 2])),
        ]

    def refused(self, world, arguments, error, *words, num_tokens=5, kind="fp8", scale=1.0):
        def call(src, dst, table, bounds, starts):
            given = world.put(scale) if isinstance(scale, worlds.Spec) else scale
            cc.gather_and_maybe_dequant_cache(
                src, dst, table, bounds, None, num_tokens, kind, given, starts
            )

        refused(world, call, arguments, error, "gather_and_maybe_dequant_cache", *words)

    @pytest.mark.parametrize(
        "index, shape, dtype, error, words",
        [
            (0, (4, 4, 2, 8), "float16", cc.DTypeError, ("src_cache", "float8_e4m3fn or uint8")),
            (0, (4, 0, 2, 8), "uint8", cc.ShapeError, ("src_cache", "at least one slot")),
            (1, (5, 2, 8), "uint8", cc.DTypeError, ("dst", "float16 or bfloat16 or float32")),
            (1, (5, 2, 9), "float16", cc.ShapeError, ("dst", "inner_2")),
            (2, (1, 2), "int64", cc.ShapeError, ("block_table", "2 sequences")),
            (3, (0,), "int64", cc.ShapeError, ("cu_seq_lens", "[0]")),
            (4, (1,), "int64", cc.ShapeError, ("seq_starts", "2 sequences")),
        ],
    )
    def test_arguments_that_do_not_match(
        self, world, rng, arguments, index, shape, dtype, error, words
    ):  # fmt: skip
        arguments[index] = worlds.array(rng, shape, dtype)
        self.refused(world, arguments, error, *words)

    @pytest.mark.parametrize("num_tokens", [-1, 6, 1.0, None, True])
    def test_num_tokens(self, world, arguments, num_tokens):
        words = "num_tokens", str(num_tokens)
        self.refused(world, arguments, cc.ArgumentError, *words, num_tokens=num_tokens)

    @pytest.mark.parametrize("kind", ["fp8_ds_mla", "int4", "FP8", None])
    def test_kv_cache_dtype(self, world, arguments, kind):
        self.refused(world, arguments, cc.ArgumentError, "kv_cache_dtype", str(kind), kind=kind)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), True])
    def test_scale(self, world, arguments, scale):
        self.refused(world, arguments, cc.ArgumentError, "scale", str(scale), scale=scale)

    @pytest.mark.parametrize(
        "values, error",
        [(np.ones(3, np.float32), cc.ShapeError), (np.ones(1, np.float16), cc.DTypeError)],
    )
    def test_scale_arrays(self, world, arguments, values, error):
        scale = worlds.of_values(values)
        self.refused(world, arguments, error, "scale", scale=scale)

    @pytest.mark.parametrize(
        "shape, dtype, kind, scale, error, words",
        [
            ((4, 4), "float32", "fp8", None, cc.ShapeError, ("scale_cache",)),
            ((4, 4, 3), "float32", "fp8", None, cc.ShapeError, ("scale_cache", "[4, 4, 3]")),
            ((4, 4, 2), "float16", "fp8", None, cc.DTypeError, ("scale_cache", "float32")),
            ((4, 4, 2), "float32", "fp8", 1.0, cc.ArgumentError, ("scale", "scale_cache")),
            ((4, 4, 2), "float32", "auto", None, cc.ArgumentError, ("kv_cache_dtype", "auto")),
            ((4, 4, 2), "float32", "fp8_e5m2", None, cc.ArgumentError, ("kv_cache_dtype",)),
        ],
    )
    def test_scale_caches(self, world, rng, arguments, shape, dtype, kind, scale, error, words):
        scales = worlds.array(rng, shape, dtype)

        def call(src, dst, table, bounds, starts):
            cc.gather_and_maybe_dequant_cache(
                src, dst, table, bounds, None, 5, kind, scale, starts,
                scale_cache=world.put(scales),
            )  # fmt: skip

        refused(world, call, arguments, error, "gather_and_maybe_dequant_cache", *words)

    def test_entries_have_no_heads(self, world, rng, arguments):
        arguments[0] = worlds.array(rng, (4, 4, 8), "uint8")
        arguments[1] = worlds.array(rng, (5, 8), "float16")
        scale = worlds.of_values(np.ones(8, np.float32))
        self.refused(world, arguments, cc.ShapeError, "scale", "[1]", scale=scale)

    def test_a_raw_copy_changes_no_dtype(self, world, arguments):
        self.refused(world, arguments, cc.DTypeError, "dst", "uint8", "float16", kind="auto")

    def test_unaligned_rows(self, rng, emulated_world):
        """Rows of numbers start where their elements may."""
        world = emulated_world()
        arguments = [
            worlds.array(rng, (4, 4, 8), "uint8"), worlds.array(rng, (5, 8), "float32", pad=2),
            worlds.of_values(rng.integers(0, 4, (1, 2))), worlds.of_values(np.array([0, 5])), None,
        ]  # fmt: skip
        try:
            self.refused(world, arguments, cc.StrideError, "dst", "multiples")
        finally:
            world.close()


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("architecture", [75, 90, 120])
def test_compiles(architecture, kv_cache_dtype, dtype):
    pytest.importorskip("cupy")
    kernels = specialisations(
        1, 576, 64, dtype, layouts=("rows",), kv_cache_dtype=kv_cache_dtype,
        ops=["gather_and_maybe_dequant_cache"],
    )  # fmt: skip
    assert [len(machine_code.compile_cubin(k, architecture)[0]) > 0 for k in kernels] == [True] * 2
