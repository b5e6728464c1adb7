# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import formats

NAME = "reshape_and_cache_flash_per_token_head"
STORED = {
    "int8": "int8",
    "int8_per_token_head": "int8",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_per_token_head": "float8_e4m3fn",
}


def values(rng, shape, dtype, pad=0):
    """Rows of ordinary numbers of many magnitudes, rows of random bits (infinities, NaN and
    subnormals among them), and rows of zeros."""
    spec = worlds.array(rng, shape, dtype, pad)
    view = spec.on(spec.buffer.bytes)
    ordinary = (rng.normal(size=shape) * 2.0 ** rng.integers(-14, 12, (*shape[:2], 1))).astype(
        view.dtype
    )
    kind = rng.random((*shape[:2], 1))
    view[...] = np.where(kind < 0.7, ordinary, np.where(kind < 0.9, view, np.zeros_like(view)))
    return spec


def separate(rng, num_blocks, block_size, heads, key_size, value_size, stored, pad=0):
    """Caches of elements and caches of scales, each in memory of its own."""
    shape = num_blocks, block_size, heads
    return (
        worlds.array(rng, (*shape, key_size), stored, pad),
        worlds.array(rng, (*shape, value_size), stored, pad),
        worlds.array(rng, shape, "float32"),
        worlds.array(rng, shape, "float32", 4),
    )


def pages(rng, num_blocks, block_size, heads, key_size, value_size, stored, pad=0):
    """Views of pages whose every (head, slot) has [keys | scale | values | scale], with a gap
    before each page."""
    assert key_size % 4 == value_size % 4 == pad % 4 == 0
    width = key_size + value_size + 8
    page = heads * block_size * width
    buffer = worlds.Buffer(num_blocks * (page + 12) + pad, rng)
    strides = page + 12, width, block_size * width  # of block, slot, head

    def view(offset, dtype, *inner):
        shape = num_blocks, block_size, heads, *inner
        return buffer.view(shape, dtype, 12 + offset, (*strides, *[1] * len(inner)))

    return (
        view(0, stored, key_size),
        view(key_size + 4, stored, value_size),
        view(key_size, "float32"),
        view(key_size + 4 + value_size, "float32"),
    )


def own_strides(rng, num_blocks, block_size, heads, key_size, value_size, stored, pad=0):
    """Caches of which each has strides of its own, in every dimension."""

    def view(gap, dtype, *inner):
        shape = num_blocks + gap, heads + gap, block_size + 2 * gap, *inner
        whole = worlds.array(rng, shape, dtype, pad)
        part = whole[1 : num_blocks + 1, :heads, gap : block_size + gap]
        return part.permuted(0, 2, 1, *range(3, 3 + len(inner)))

    return (
        view(1, stored, key_size), view(2, stored, value_size), view(3, "float32"),
        view(4, "float32"),
    )  # fmt: skip


def check(world, specs, kv_cache_dtype):
    """Run on ``world`` and compare all storages with the oracle's."""
    cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), kv_cache_dtype)
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    views = [s.on(expected[id(s.buffer)]) for s in specs]
    views[2:4] = (view.view(np.uint8) for view in views[2:4])
    oracle.reshape_and_cache_flash_per_token_head(*views, STORED[kv_cache_dtype])
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


def slots_for(rng, num_slots, tokens):
    """Distinct random slots with padding among them."""
    slots = rng.permutation(num_slots)[:tokens].astype(rng.choice(["int32", "int64"]))
    slots[rng.random(len(slots)) < 0.2] = -rng.integers(1, 2**31)
    return worlds.of_values(slots)


# kv_cache_dtype, layout, heads, key head size, value head size, block size, source dtype, pad
SHAPES = (
    ("int8", separate, 8, 128, 128, 16, "bfloat16", 0),
    ("fp8", pages, 8, 128, 128, 16, "bfloat16", 0),  # scales of 4 bytes between the rows
    ("int8_per_token_head", pages, 4, 64, 32, 7, "float16", 4),
    ("fp8_per_token_head", separate, 3, 46, 80, 16, "float32", 0),
    ("fp8_e4m3", separate, 1, 1, 1, 1, "float32", 1),
    ("int8", separate, 5, 3, 17, 9, "float16", 1),  # odd, and no address is aligned
    ("fp8", separate, 2, 255, 512, 4, "bfloat16", 3),  # several vectors for a lane
    ("int8", separate, 2, 512, 256, 4, "float32", 0),
    ("fp8", separate, 128, 8, 16, 2, "bfloat16", 0),
    ("int8", own_strides, 3, 16, 32, 4, "bfloat16", 0),
    ("fp8", own_strides, 2, 24, 8, 5, "float16", 0),
)


@pytest.mark.parametrize(
    "kv_cache_dtype, layout, heads, key_size, value_size, block_size, dtype, pad", SHAPES
)
def test_every_shape(
    world, rng, kv_cache_dtype, layout, heads, key_size, value_size, block_size, dtype, pad
):  # fmt: skip
    num_blocks = -(-12 // block_size)
    tokens = int(rng.integers(1, 9))
    stored = str(rng.choice([STORED[kv_cache_dtype], "uint8"]))
    in_source = pad * formats.DTYPES[dtype].bytes
    specs = (
        values(rng, (tokens + 2, heads, key_size), dtype, in_source),
        values(rng, (tokens + 1, heads, value_size), dtype, in_source),
        *layout(rng, num_blocks, block_size, heads, key_size, value_size, stored, pad),
        slots_for(rng, num_blocks * block_size, tokens),
    )
    check(world, specs, kv_cache_dtype)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_bit_pattern(world, rng, kv_cache_dtype, dtype):
    """All values of 16 bits: each row has neighbours of one magnitude, or infinities and NaN."""
    every = np.arange(2**16, dtype=np.uint16).reshape(64, 4, 256)
    source = worlds.of_values(every, dtype)
    stored, rows = STORED[kv_cache_dtype], every.view(formats.DTYPES[dtype].numpy)
    specs = (
        source, source,
        *separate(rng, 8, 8, 4, 256, 256, stored),
        worlds.of_values(np.arange(64)),
    )  # fmt: skip
    cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), kv_cache_dtype)
    with np.errstate(all="ignore"):
        numbers = rows.astype(np.float32)
        largest = np.where(np.isnan(numbers), 0, np.abs(numbers)).max(axis=-1)
        scales = np.maximum(
            largest / np.float32(127 if stored == "int8" else 448), np.float32(1e-6)
        )
        products = numbers * (np.float32(1) / scales)[..., np.newaxis]
    expected = oracle.codes(products, 1.0, stored).reshape(-1)
    for spec in specs[2:4]:
        np.testing.assert_array_equal(world.bytes_of(spec), expected)
    for spec, pad in zip(specs[4:6], (0, 4)):
        got = world.bytes_of(spec)[pad:].view(np.float32)
        np.testing.assert_array_equal(got, scales.reshape(-1))


def test_worked_rows(world, rng):
    """Rows whose scale is a power of two, or the smallest one, worked out by hand."""
    rows = np.array(
        [[[127.0, -63.5, 2.5, -2.5, 0.49]], [[0.0, -0.0, 5e-7, -1e-9, 1e-30]]], np.float32
    )
    specs = (
        worlds.of_values(rows), worlds.of_values(rows * 2),
        *separate(rng, 2, 1, 1, 5, 5, "int8"),
        worlds.of_values(np.arange(2)),
    )  # fmt: skip
    cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), "int8")
    for spec in specs[2:4]:
        assert world.bytes_of(spec).view(np.int8)[:5].tolist() == [127, -64, 3, -3, 0]
    assert world.bytes_of(specs[2]).view(np.int8)[5:].tolist() == [0, 0, 1, 0, 0]
    scales = [world.bytes_of(specs[4]), world.bytes_of(specs[5])[4:]]
    assert [s.view(np.float32).tolist() for s in scales] == [
        [1.0, float(np.float32(1e-6))], [2.0, float(np.float32(1e-6))]
    ]  # fmt: skip


def test_values_come_back(world, rng):
    """A stored element times its scale is within half a step of the value."""
    source = worlds.of_values(rng.normal(size=(6, 4, 64)).astype(np.float32) * 100)
    specs = (
        source,
        source,
        *separate(rng, 6, 1, 4, 64, 64, "int8"),
        worlds.of_values(np.arange(6)),
    )
    cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), "int8")
    codes = world.bytes_of(specs[2]).view(np.int8).reshape(6, 4, 64)
    scales = world.bytes_of(specs[4]).view(np.float32).reshape(6, 4, 1)
    given = source.on(source.buffer.bytes)
    assert (np.abs(codes * scales - given) <= scales * 0.5001).all()
    assert (np.abs(codes).max(axis=-1) == 127).all()


def test_slots_past_the_cache_are_skipped_and_recorded(world, rng):
    bad = int(rng.choice([8, 2**31 + 3, 2**62]))
    specs = (
        values(rng, (6, 2, 32), "bfloat16"), values(rng, (6, 2, 32), "bfloat16"),
        *pages(rng, 2, 4, 2, 32, 32, "int8"),
        worlds.of_values(np.array([3, -1, 0, bad, 7, -(2**63)])),
    )  # fmt: skip
    check(world, specs, "int8")
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.op, fault.argument) == (NAME, "slot_mapping")
    assert (fault.row, fault.value, fault.limit) == (3, bad, 8)


def test_slot_mapping_decides_the_number_of_tokens(world, rng):
    """D8: rows beyond the slots are neither read nor written, more slots than rows are refused."""
    specs = [
        values(rng, (9, 2, 16), "float16"), values(rng, (7, 2, 16), "float16"),
        *separate(rng, 4, 4, 2, 16, 16, "uint8"),
        worlds.of_values(rng.permutation(16)[:5]),
    ]  # fmt: skip
    check(world, specs, "fp8")
    specs[6] = worlds.of_values(np.arange(8))
    with pytest.raises(cc.ShapeError, match="slot_mapping.*at most 7.*value"):
        cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), "fp8")


def test_no_tokens(world, rng):
    specs = (
        worlds.array(rng, (0, 2, 16), "float16"), worlds.array(rng, (0, 2, 16), "float16"),
        *separate(rng, 4, 4, 2, 16, 16, "uint8"),
        worlds.of_values(np.empty(0, np.int64)),
    )  # fmt: skip
    check(world, specs, "fp8")


@pytest.mark.parametrize(
    "index, shape, dtype, error, words",
    [
        (0, (5, 4, 16), "int8", cc.DTypeError, ("key", "bfloat16", "int8")),
        (1, (5, 4, 16), "bfloat16", cc.DTypeError, ("value", "float16")),
        (1, (5, 3, 16), "float16", cc.ShapeError, ("value", "num_kv_heads")),
        (2, (2, 4, 4, 16), "float8_e5m2", cc.DTypeError, ("key_cache", "float8_e4m3fn", "uint8")),
        (3, (2, 4, 4, 16), "int8", cc.DTypeError, ("value_cache", "float8_e4m3fn")),
        (4, (2, 4, 3), "float32", cc.ShapeError, ("k_scale_cache", "num_kv_heads")),
        (5, (2, 4, 4, 1), "float32", cc.ShapeError, ("v_scale_cache", "dimensions")),
        (5, (2, 4, 4), "float16", cc.DTypeError, ("v_scale_cache", "float32")),
        (6, (5,), "int16", cc.DTypeError, ("slot_mapping", "int16")),
        (None, None, "int4", cc.ArgumentError, ("kv_cache_dtype", "int8_per_token_head")),
        (None, None, "auto", cc.ArgumentError, ("kv_cache_dtype",)),
        (None, None, "fp8_e5m2", cc.ArgumentError, ("kv_cache_dtype",)),
    ],
)
def test_arguments_that_do_not_match_are_refused(world, rng, index, shape, dtype, error, words):
    specs = [
        worlds.array(rng, (5, 4, 16), "float16"), worlds.array(rng, (5, 4, 16), "float16"),
        *separate(rng, 2, 4, 4, 16, 16, "float8_e4m3fn"),
        worlds.of_values(np.arange(5)),
    ]  # fmt: skip
    kv_cache_dtype = "fp8"
    if index is None:
        kv_cache_dtype = dtype
    else:
        specs[index] = worlds.array(rng, shape, dtype)
    with pytest.raises(error) as caught:
        cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), kv_cache_dtype)
    for word in (NAME, *words):
        assert word in str(caught.value)
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)


def test_memory_that_cannot_be_written_is_refused(world, rng):
    specs = [
        worlds.array(rng, (5, 4, 16), "float16"), worlds.array(rng, (5, 4, 16), "float16"),
        *separate(rng, 2, 4, 4, 16, 16, "uint8"),
        worlds.of_values(np.arange(5)),
    ]  # fmt: skip
    specs[5].strides = (0, 16, 4)
    with pytest.raises(cc.StrideError, match="v_scale_cache.*share"):
        cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), "int8")


def test_head_sizes_past_the_limit_are_refused(world, rng):
    specs = (
        worlds.array(rng, (1, 1, 2049), "float16"), worlds.array(rng, (1, 1, 16), "float16"),
        *separate(rng, 1, 1, 1, 2049, 16, "uint8"),
        worlds.of_values(np.arange(1)),
    )  # fmt: skip
    with pytest.raises(cc.ShapeError, match="key.*2048.*2049"):
        cc.reshape_and_cache_flash_per_token_head(*(world.put(s) for s in specs), "int8")
