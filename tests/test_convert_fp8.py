# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import ml_dtypes
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import formats

KINDS = {name: oracle.STORED[name] for name in ("fp8", "fp8_e4m3", "fp8_e5m2")}
FLOATS = ("float16", "bfloat16", "float32")
SCALES = (1.0, 0.1, 3e4, 1e-6)


def convert(world, output, source, scale=1.0, kind="fp8"):
    """Run on ``world`` and compare both whole storages with what the loops make of them."""
    given = world.put(scale) if isinstance(scale, worlds.Spec) else scale
    cc.convert_fp8(world.put(output), world.put(source), given, kind)
    number = scale.on(scale.buffer.bytes).reshape(-1)[0] if given is not scale else scale
    expected = output.buffer.bytes.copy()
    to, at = output.on(expected), source.on(source.buffer.bytes)
    to = to.view(f"u{to.itemsize}")
    target = output.numpy_dtype
    if target.itemsize == 1:
        to[...] = oracle.quantise(at, number, KINDS[kind])
    else:
        values = oracle.dequantise(at.view(np.uint8), number, KINDS[kind], target)
        nan = to.dtype.type(2 ** (8 * target.itemsize - 1) - 1)
        to[...] = np.where(np.isnan(values), nan, values.view(to.dtype))
    np.testing.assert_array_equal(world.bytes_of(output), expected)
    np.testing.assert_array_equal(world.bytes_of(source), source.buffer.bytes)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte(world, rng, dtype, kind):
    """NaN among them, and products that are subnormal or too large in float16."""
    source = worlds.of_values(
        np.arange(256, dtype=np.uint8), str(rng.choice(["uint8", KINDS[kind]]))
    )
    for scale in (*SCALES, worlds.of_values(np.array([2.0**-17], np.float32))):
        convert(world, worlds.array(rng, (256,), dtype), source, scale, kind)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_every_bit_pattern(world, rng, dtype, kind):
    patterns = np.arange(2**16, dtype=np.uint16)
    # With one element more than there are different ones NumPy goes another way.
    for every in (patterns, np.append(patterns, patterns[:1])):
        source = worlds.of_values(every, dtype)
        for scale in (*SCALES, float(2.0 ** rng.uniform(-20, 20))):
            output = worlds.array(rng, every.shape, str(rng.choice(["uint8", KINDS[kind]])))
            cc.convert_fp8(world.put(output), world.put(source), scale, kind)
            values = every.view(formats.DTYPES[dtype].numpy)
            np.testing.assert_array_equal(
                world.bytes_of(output), oracle.codes(values, scale, KINDS[kind])
            )


@pytest.mark.parametrize("kind", KINDS)
def test_float32(world, rng, kind):
    bits = rng.integers(0, 2**32, 997, np.uint32)
    source = worlds.of_values(bits.view(np.float32))
    for scale in (1.0, worlds.of_values(np.array(2.0 ** rng.uniform(-8, 8), np.float32))):
        convert(world, worlds.array(rng, (997,), KINDS[kind]), source, scale, kind)


def test_there_and_back(world, rng):
    """Every code but those of NaN and infinity comes back from its own value."""
    for kind, stored in (("fp8", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")):
        codes = np.arange(256, dtype=np.uint8)
        codes = codes[np.isfinite(codes.view(getattr(ml_dtypes, stored)).astype(np.float32))]
        first, wide, last = worlds.of_values(codes), *(
            worlds.array(rng, codes.shape, dtype) for dtype in (str(rng.choice(FLOATS)), stored)
        )  # fmt: skip
        put = [world.put(spec) for spec in (first, wide, last)]
        cc.convert_fp8(put[1], put[0], 0.25, kind)
        cc.convert_fp8(put[2], put[1], 0.25, kind)
        np.testing.assert_array_equal(world.bytes_of(last), codes)


def test_worked_bytes(world, rng):
    """Bytes that were worked out elsewhere."""
    source = worlds.of_values(np.array([1.0, 44.8, 1.7, 1.8], np.float32))
    output = worlds.array(rng, (4,), "uint8")
    cc.convert_fp8(world.put(output), world.put(source), 0.1)
    assert world.bytes_of(output).tolist() == [0x52, 0x7E, 0x58, 0x59]
    cc.convert_fp8(world.put(output), world.put(source), None)  # 1.0
    assert world.bytes_of(output).tolist() == [0x38, 0x63, 0x3E, 0x3E]
    source = worlds.of_values(np.array([1.0, -1.5], np.float32))
    output = worlds.array(rng, (2,), "uint8")
    cc.convert_fp8(world.put(output), world.put(source), 0.1, "fp8_e5m2")
    assert world.bytes_of(output).tolist() == [0x49, 0xCC]  # 15 is half way: 16 is even
    back = worlds.array(rng, (2,), "float16")
    cc.convert_fp8(world.put(back), world.put(output), 0.5, "fp8_e5m2")
    assert world.bytes_of(back).view(np.float16).tolist() == [5.0, -8.0]


# --- strides --------------------------------------------------------------------------------------


def _contiguous(rng, dtype):
    return worlds.array(rng, (6, 5, 32), dtype)


def _half_of_pages(rng, dtype):
    return worlds.array(rng, (6, 5, 64), dtype)[..., 32:]


def _turned(rng, dtype):
    return worlds.array(rng, (32, 6, 5), dtype).permuted(1, 2, 0)


def _slots_last(rng, dtype):
    return worlds.array(rng, (5, 6, 32), dtype).permuted(1, 0, 2)


def _every_second(rng, dtype):
    return worlds.array(rng, (6, 10, 64), dtype, pad=formats.DTYPES[dtype].bytes)[:, 1::2, ::2]


def _repeated(rng, dtype):
    spec = worlds.array(rng, (6, 1, 32), dtype)
    spec.shape, spec.strides = (6, 5, 32), (spec.strides[0], 0, spec.strides[2])
    return spec


VIEWS = (_contiguous, _half_of_pages, _turned, _slots_last, _every_second)


@pytest.mark.parametrize("pair", [("uint8", "bfloat16"), ("float32", "float8_e5m2")])
@pytest.mark.parametrize("output", VIEWS)
@pytest.mark.parametrize("source", (*VIEWS, _repeated))
def test_every_pair_of_strides(world, rng, output, source, pair):
    """D16: the output's strides are its own."""
    dtypes = pair
    kind = "fp8_e5m2" if "float8_e5m2" in dtypes else "fp8"
    convert(world, output(rng, dtypes[0]), source(rng, dtypes[1]), 0.7, kind)


@pytest.mark.parametrize(
    "shape, axes",
    [
        ((), ()),
        ((0,), (0,)),
        ((3, 0, 4), (0, 1, 2)),
        ((1, 1, 1), (2, 1, 0)),
        ((7, 1, 9), (2, 1, 0)),
        ((2, 3, 4, 5), (3, 2, 1, 0)),
        ((2, 3, 1, 4, 2, 5), (3, 5, 1, 2, 4, 0)),
    ],
)
def test_other_shapes(world, rng, shape, axes):
    source = worlds.array(rng, shape, "float16")
    turned = worlds.array(rng, [shape[a] for a in axes], "float8_e4m3fn")
    output = turned.permuted(*np.argsort(axes).astype(int)) if shape else turned
    convert(world, output, source, 3.0)


def test_reversed_dimensions(rng):
    """NumPy's strides may be negative."""
    world = worlds.NumPyWorld()
    source = worlds.array(rng, (6, 8), "float32")[::-1, ::-1]
    convert(world, worlds.array(rng, (6, 16), "uint8")[::-1, ::2], source)


# --- refusals -------------------------------------------------------------------------------------


def refused(world, output, source, error, *words, **options):
    with pytest.raises(error) as caught:
        cc.convert_fp8(world.put(output), world.put(source), **options)
    for word in ("convert_fp8", *words):
        assert word in str(caught.value)
    for spec in (output, source):
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)


@pytest.mark.parametrize("kind", ["auto", "int8", "bfloat16", "fp8_e3m4"])
def test_other_kinds_are_refused(world, rng, kind):
    """D16: "auto" names no conversion."""
    specs = worlds.array(rng, (4,), "uint8"), worlds.array(rng, (4,), "float32")
    refused(world, *specs, cc.ArgumentError, "kv_dtype", "fp8_e5m2", kv_dtype=kind)


@pytest.mark.parametrize(
    "output, source, kind, word",
    [
        ("float16", "float32", "fp8", "output"),
        ("uint8", "float8_e4m3fn", "fp8", "output"),
        ("float8_e5m2", "float32", "fp8", "output"),
        ("float32", "float8_e5m2", "fp8_e4m3", "input"),
        ("int8", "float16", "fp8", "output"),
        ("uint8", "int32", "fp8", "input"),
        ("float64", "uint8", "fp8", "output"),
    ],
)
def test_other_dtypes_are_refused(world, rng, output, source, kind, word):
    """D16: a pair of dtypes that is no conversion is an error."""
    specs = worlds.array(rng, (4,), output), worlds.array(rng, (4,), source)
    refused(world, *specs, cc.DTypeError, word, kv_dtype=kind)


def test_other_arguments_are_refused(world, rng):
    output, source = worlds.array(rng, (4, 6), "uint8"), worlds.array(rng, (4, 6), "float32")
    refused(world, output, source[:, :5], cc.ShapeError, "input", "[4, 5]")
    refused(world, output, source, cc.ArgumentError, "scale", scale=0.0)
    refused(world, output, source, cc.ArgumentError, "scale", scale=True)
    two = world.put(worlds.array(rng, (2,), "float32"))
    refused(world, output, source, cc.ShapeError, "scale", scale=two)
    wide = world.put(worlds.array(rng, (1,), "float64"))
    refused(world, output, source, cc.DTypeError, "scale", scale=wide)
    output.strides = (0, 1)
    refused(world, output, source, cc.StrideError, "output", "share")


def test_too_many_dimensions_are_refused(world, rng):
    shape = (2, 3, 2, 3, 2, 3)
    output, source = worlds.array(rng, shape, "uint8"), worlds.array(rng, shape, "float16")
    refused(world, output.permuted(5, 4, 3, 2, 1, 0), source.permuted(5, 3, 4, 2, 0, 1),
            cc.ShapeError, "input")  # fmt: skip
    turned = worlds.array(rng, shape[::-1], "float16").permuted(5, 4, 3, 2, 1, 0)
    refused(world, output, turned, cc.StrideError, "output", "at most 5")


def test_read_only_output_is_refused():
    output = np.zeros(3, np.uint8)
    output.flags.writeable = False
    with pytest.raises(cc.NotWritableError, match="output"):
        cc.convert_fp8(output, np.zeros(3, np.float32))
