# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Scales in arrays with other values than ordinary ones: nobody looks at them, so bytes are those
of the quotient or the product, and the same on every kind of array."""

import ml_dtypes
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import contract

# Zeros, NaNs, infinities, negative numbers, and the ends of what a float32 can hold.
ODD = np.array(
    [0.0, -0.0, np.nan, np.inf, -np.inf, -1.5, -(2.0**-149), 2.0**-149, 2.0**-127, 3e38],
    np.float32,
)
VALUES = np.array([0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, 2.0**-14, -1000.0, 0.37] * 2)
KINDS = ("fp8", "fp8_e5m2", "int8")
SIZE = len(VALUES)


def row_of(*shape):
    return worlds.of_values(VALUES.astype(np.float32).reshape(*shape, SIZE))


def flash(world, rng, scale, kind):
    caches = [worlds.array(rng, (1, 1, 1, SIZE), "uint8") for _ in "kv"]
    row, slots = row_of(1, 1), worlds.of_values(np.array([0]))
    cc.reshape_and_cache_flash(
        *map(world.put, (row, row, *caches, slots)), kind, *map(world.put, (scale, scale))
    )
    return caches


def x_packed(world, rng, scale, kind):
    key = worlds.array(rng, (1, 1, SIZE // 4, 1, 4), "uint8")
    caches = key, worlds.array(rng, (1, 1, SIZE, 1), "uint8")
    row, slots = row_of(1, 1), worlds.of_values(np.array([0]))
    cc.reshape_and_cache(
        *map(world.put, (row, row, *caches, slots)), kind, *map(world.put, (scale, scale))
    )
    return caches


def entries(world, rng, scale, kind):
    cache = worlds.array(rng, (1, 1, SIZE), "uint8")
    row, slots = row_of(1), worlds.of_values(np.array([0]))
    nothing = worlds.array(rng, (1, 0), "float32")
    cc.concat_and_cache_mla(*map(world.put, (row, nothing, cache, slots)), kind, world.put(scale))
    return [cache]


def layers_of_entries(world, rng, scale, kind):
    caches = [worlds.array(rng, (1, 1, SIZE), "uint8") for _ in range(1)]
    row, slots = row_of(1, 1), worlds.of_values(np.array([[0]]))
    nothing = worlds.array(rng, (1, 1, 0), "float32")
    cc.concat_and_cache_mla_grouped(
        world.put(row), world.put(nothing), [world.put(c) for c in caches], world.put(slots),
        kv_scales=world.put(scale), kv_cache_dtype=kind,
    )  # fmt: skip
    return caches


def converted(world, rng, scale, kind):
    del kind
    out = worlds.array(rng, (1, SIZE), "uint8")
    cc.convert_fp8(world.put(out), world.put(row_of(1)), world.put(scale))
    return [out]


WRITES = [
    *((write, kind) for write in (flash, x_packed, entries, layers_of_entries) for kind in KINDS),
    (converted, "fp8"),
]


@pytest.mark.each("write")
@pytest.mark.parametrize("write, kind", WRITES)
def test_quotients(world, rng, write, kind):
    """Value / scale, as in every write: a NaN is 0x7f, in int8 0, what is too large the largest."""
    for number in ODD:
        made = write(world, rng, worlds.of_values(np.array([number])), kind)
        expected = oracle.codes(VALUES, number, oracle.STORED[kind])
        for spec in made:
            np.testing.assert_array_equal(world.bytes_of(spec)[:SIZE], expected, str(number))


def products(kind, number, dtype):
    """What every code becomes: [256], and which are NaN."""
    stored = [oracle.stored_value(code, oracle.STORED[kind]) for code in range(256)]
    with np.errstate(all="ignore"):
        made = (np.array(stored, np.float32) * number).astype(dtype)
    return made, np.isnan(made.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name, kind", [("gather", kind) for kind in KINDS] + [("convert", "fp8")])
def test_products(world, rng, name, kind, dtype):
    """Stored * scale: a NaN has all bits but the sign set."""
    codes = worlds.of_values(np.arange(256, dtype=np.uint8).reshape(1, 1, 256))
    bits = np.dtype(f"u{np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize}")
    for number in ODD:
        scale, rows = worlds.of_values(np.array([number])), worlds.array(rng, (1, 256), dtype)
        if name == "convert":
            cc.convert_fp8(world.put(rows), world.put(codes[0]), world.put(scale))
        else:
            table, bounds = worlds.of_values(np.array([[0]])), worlds.of_values(np.array([0, 1]))
            cc.gather_and_maybe_dequant_cache(
                *map(world.put, (codes, rows, table, bounds)), None, 1, kind, world.put(scale)
            )
        made, missing = products(kind, number, getattr(ml_dtypes, dtype, dtype))
        expected = np.where(missing, np.iinfo(bits).max >> 1, made.view(bits))
        got = world.bytes_of(rows)[: 256 * bits.itemsize].view(bits)
        np.testing.assert_array_equal(got, expected, str(number))


def misaligned(rng):
    return worlds.array(rng, (8,), "uint8").buffer.view((1,), "float32", 2)


WRONG = {
    "two": (lambda rng: worlds.array(rng, (2,), "float32"), cc.ShapeError),
    "none": (lambda rng: worlds.array(rng, (0,), "float32"), cc.ShapeError),
    "nested": (lambda rng: worlds.array(rng, (1, 1), "float32"), cc.ShapeError),
    "half": (lambda rng: worlds.array(rng, (1,), "float16"), cc.DTypeError),
    "double": (lambda rng: worlds.array(rng, (1,), "float64"), cc.DTypeError),
    "integer": (lambda rng: worlds.array(rng, (1,), "int32"), cc.DTypeError),
    "misaligned": (misaligned, cc.StrideError),
    "elsewhere": (lambda rng: np.ones(1, np.float32), cc.DeviceError),
}


def gather(world, rng, scale, kind):
    codes, rows = worlds.array(rng, (1, 1, SIZE), "uint8"), worlds.array(rng, (1, SIZE), "float32")
    table, bounds = worlds.of_values(np.array([[0]])), worlds.of_values(np.array([0, 1]))
    put = map(world.put, (codes, rows, table, bounds))
    cc.gather_and_maybe_dequant_cache(*put, None, 1, kind, world.put(scale))
    return [rows]


def attention(world, rng, scale, kind):
    query, out = (worlds.array(rng, (1, 1, 16), "float16") for _ in range(2))
    caches = [worlds.array(rng, (1, 16, 1, 16), "uint8") for _ in "kv"]
    table, lens = worlds.of_values(np.array([[0]])), worlds.of_values(np.array([1]))
    cc.paged_attention(
        *map(world.put, (query, *caches, table, lens)), out=world.put(out), kv_cache_dtype=kind,
        k_scale=1.0, v_scale=world.put(scale),
    )  # fmt: skip
    return [out]


class Kept:
    """A world that gives what is no spec as it is, and knows what it put."""

    def __init__(self, world):
        self.world, self.put_specs = world, []

    def put(self, spec):
        if not isinstance(spec, worlds.Spec):
            return spec
        self.put_specs.append(spec)
        return self.world.put(spec)


@pytest.mark.each("wrong")
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "call", [flash, x_packed, entries, layers_of_entries, converted, gather, attention]
)
def test_other_arrays_are_refused(world, rng, call, wrong):
    make, error = WRONG[wrong]
    if wrong == "elsewhere" and not world.on_gpu:
        pytest.skip("this machine's memory is the world's")
    if wrong == "misaligned" and world.name not in ("numpy", "emulated", "cupy"):
        pytest.skip("torch has no such tensors")
    kept = Kept(world)
    with pytest.raises(error, match=r"\w+: Invalid .* of \w*scales?: expected"):
        call(kept, rng, make(rng), "fp8")
    for spec in kept.put_specs:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)


# What a float32 can hold: the smallest and the largest number, and of those that kernels' sums and
# products do not take for 0.
LARGEST, SMALLEST, SMALLEST_NORMAL = (2 - 2.0**-23) * 2.0**127, 2.0**-149, 2.0**-126


@pytest.mark.parametrize(
    "name, least, no_less",
    [("k_scale", SMALLEST, 2.0**-150), ("v_scale", SMALLEST, SMALLEST * (1 - 2.0**-53)),
     ("soft_cap", SMALLEST_NORMAL, SMALLEST_NORMAL - SMALLEST), ("scale", -LARGEST, -(2.0**128))],
)  # fmt: skip
def test_numbers_at_the_ends_of_float32(name, least, no_less):
    query, caches = np.ones((1, 1, 16), np.float16), np.zeros((2, 1, 16, 1, 16), np.uint8)
    table, lens = np.array([[0]]), np.array([1])
    options = {"kv_cache_dtype": "fp8", "k_scale": 1.0, "v_scale": 1.0}
    for number in (least, LARGEST):
        attended = cc.paged_attention(query, *caches, table, lens, **{**options, name: number})
        assert not attended.any()  # of values that are 0
    kind = {
        "scale": "None or a finite float32", "soft_cap": "None or a positive, normal float32",
    }.get(name, "a positive, finite float32")  # fmt: skip
    message = f"^paged_attention: Invalid value of {name}: expected {kind}, got"
    for number in (no_less, np.nextafter(LARGEST, np.inf), np.nextafter(least, -np.inf)):
        with pytest.raises(cc.ArgumentError, match=message):
            cc.paged_attention(query, *caches, table, lens, **{**options, name: float(number)})


@pytest.mark.whole
@pytest.mark.parametrize(
    "scale", [[0.5], (), "0.5", b"1", ml_dtypes.bfloat16(0.5), np.complex64(1), np.True_]
)
def test_a_scale_may_be_a_number(scale):
    """What is neither that nor an array is told so."""
    expected = "expected None, a number or a float32 array, got "
    with pytest.raises(cc.DTypeError, match=expected + type(scale).__name__):
        contract.split_scale("op", "k_scale", scale)
