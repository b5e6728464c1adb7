# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The element types and the division of convert.cuh, compiled for this machine: what would take too
many launches to go through."""

import ctypes
import shutil
import subprocess

import emulator
import numpy as np
import oracle
import pytest
from emulator import ptx

from cupy_cache.runtime import env, formats, modules

SOURCE = """
#define CUPY_CACHE_CONVERTS
#include "cupy_cache/convert.cuh"
using namespace cupy_cache;

template <typename T>
void decode(int count, const void* bits, float* values) {
  const auto* from = static_cast<const typename T::Bits*>(bits);
  for (int i = 0; i < count; ++i) values[i] = T::decode(from[i]);
}
template <typename T>
void encode(int count, const float* values, void* bits) {
  auto* to = static_cast<typename T::Bits*>(bits);
  for (int i = 0; i < count; ++i) to[i] = T::encode(values[i]);
}
template <typename T>
void encode_pairs(int count, const float* values, void* bits) {
  auto* to = static_cast<u16*>(bits);
  for (int i = 0; i < count / 2; ++i) to[i] = T::encode_pair(values[2 * i], values[2 * i + 1]);
}
template <typename T>
void decode_pairs(int count, const void* bits, float* values) {
  const auto* from = static_cast<const u16*>(bits);
  for (int i = 0; i < count / 2; ++i) T::decode_pair(from[i], values[2 * i], values[2 * i + 1]);
}

extern "C" {
#define EXPORT(T)                                                                          \\
  void decode_##T(int n, const void* bits, float* to) { decode<T>(n, bits, to); }          \\
  void encode_##T(int n, const float* values, void* to) { encode<T>(n, values, to); }
EXPORT(F16) EXPORT(BF16) EXPORT(E4M3) EXPORT(E5M2) EXPORT(I8)
#define EXPORT_PAIRS(T) \\
  void encode_pairs_##T(int n, const float* values, void* to) { encode_pairs<T>(n, values, to); } \\
  void decode_pairs_##T(int n, const void* bits, float* to) { decode_pairs<T>(n, bits, to); }
EXPORT_PAIRS(E4M3) EXPORT_PAIRS(E5M2) EXPORT_PAIRS(I8)

// With scales of these significands and values of 11 bits: how many quotients are not the IEEE ones
// while one of the two has at most 8 significant bits, as boundaries of codes have.
long wrong_for_short_values(int count, const int* significands) {
  long wrong = 0;
  for (int i = 0; i < count; ++i) {
    const float scale = static_cast<float>(significands[i]);
    const DivideToCode divide(scale);
    int found = 0;
    for (int value = 1 << 10; value < 1 << 11; ++value) {
      const float numerator = static_cast<float>(value);
      const u32 quick = __float_as_uint(divide(numerator));
      const u32 exact = __float_as_uint(numerator / scale);
      found += (quick != exact) & (((quick & 0xffff) == 0) | ((exact & 0xffff) == 0));
    }
    wrong += found;
  }
  return wrong;
}

void quotients(int count, const float* values, const float* scales, float* made) {
  for (int i = 0; i < count; ++i) made[i] = DivideToCode(scales[i])(values[i]);
}
}
"""
BITS = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "E4M3", "float8_e5m2": "E5M2",
        "int8": "I8"}  # fmt: skip


@pytest.fixture(scope="module", params=[None, 75, 90], ids=["integers", "sm_75", "sm_90"])
def native(request, tmp_path_factory):
    """The functions above: with integer arithmetic alone, and as they are for GPUs without and with
    instructions for fp8."""
    return compiled(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def integers(tmp_path_factory):
    """The functions above with integer arithmetic alone, the quickest."""
    return compiled(tmp_path_factory, None)


def compiled(tmp_path_factory, architecture):
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    folder = tmp_path_factory.mktemp("native")
    shutil.copytree(modules.kernel_dir() / "include", folder / "include")
    (folder / "native.cu").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.KERNEL_DIR.name, str(folder))
        text = modules.expanded_source("native")
    (folder / "native.cpp").write_text(emulator.prelude(architecture) + ptx.with_calls(text))
    command = "g++ -std=c++17 -O3 -march=native -ffp-contract=off -fPIC -shared -w".split()
    subprocess.run([*command, "native.cpp", "-o", "native.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "native.so"))


def run(function, count, given, made):
    """``function(count, given, made)``; returns ``made``."""
    function(count, *(ctypes.c_void_p(a.ctypes.data) for a in (given, made)))
    return made


@pytest.mark.parametrize("name", BITS)
def test_every_code_is_decoded(native, name):
    dtype = formats.DTYPES[name]
    codes = np.arange(2 ** (8 * dtype.bytes)).astype(dtype.bits)
    values = run(
        native[f"decode_{BITS[name]}"], codes.size, codes, np.empty(codes.size, np.float32)
    )
    if dtype.bytes == 1:
        expected = np.array([oracle.stored_value(code, name) for code in codes], np.float32)
    else:
        expected = codes.view(dtype.numpy).astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(values), nan)
    np.testing.assert_array_equal(values[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    if dtype.bytes == 1:
        pairs = np.arange(2**16, dtype=np.uint16)
        decode_pairs, made = native[f"decode_pairs_{BITS[name]}"], np.empty((2**16, 2), np.float32)
        run(decode_pairs, made.size, pairs, made)
        each = np.stack((pairs & 0xFF, pairs >> 8), axis=1)
        np.testing.assert_array_equal(made.view(np.uint32), values[each].view(np.uint32))


def floats(rng, name):
    """Random floats, and all boundaries between the codes of ``name`` with their neighbours."""
    dtype = formats.DTYPES[name]
    codes = np.arange(2 ** (8 * dtype.bytes)).astype(dtype.bits).view(dtype.numpy)
    with np.errstate(all="ignore"):
        numbers = np.unique(codes.astype(np.float64))
        numbers = numbers[np.isfinite(numbers)]
        middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
        last = 2 * numbers[-1] - numbers[-2]
        edges = np.concatenate([numbers, middles, [last, -last], -middles]).astype(np.float32)
    near = (edges.view(np.int32)[:, np.newaxis] + np.arange(-2, 3)).astype(np.int32)
    bits = rng.integers(0, 2**32, 10**6, np.uint32)
    return np.concatenate([near.reshape(-1).view(np.float32), bits.view(np.float32)])


@pytest.mark.parametrize("name", BITS)
def test_floats_are_encoded(native, rng, name):
    dtype, values = formats.DTYPES[name], floats(rng, name)
    values = values[: values.size // 2 * 2]
    made = run(
        native[f"encode_{BITS[name]}"], values.size, values, np.empty(values.size, dtype.bits)
    )
    if dtype.bytes == 1:
        expected = oracle.codes(values, 1.0, name)
        pairs = run(native[f"encode_pairs_{BITS[name]}"], values.size, values, np.empty_like(made))
        np.testing.assert_array_equal(pairs, expected)
    else:
        with np.errstate(all="ignore"):
            expected = values.astype(dtype.numpy).view(dtype.bits)
        expected[np.isnan(values)] = 0x7FFF
    np.testing.assert_array_equal(made, expected)


def wrong_for_short_values(native, significands):
    significands = np.ascontiguousarray(significands, np.int32)
    native.wrong_for_short_values.restype = ctypes.c_long
    return native.wrong_for_short_values(
        significands.size, ctypes.c_void_p(significands.ctypes.data)
    )


def close_to_multiples(power):
    """Significands of 24 bits within 64 of a multiple of ``2**power``."""
    close = np.arange(2**23, 2**24 + 1, 2**power)[:, np.newaxis] + np.arange(-64, 65)
    return close[(close >= 2**23) & (close < 2**24)]


def test_division_of_short_values_where_it_is_hardest(integers):
    assert wrong_for_short_values(integers, close_to_multiples(17)) == 0


@pytest.mark.extra
@pytest.mark.slow
def test_division_of_every_short_value(integers):
    """With the exponents, which only shift, this is every scale and every 16-bit value."""
    for first in range(2**23, 2**24, 2**20):
        assert wrong_for_short_values(integers, np.arange(first, first + 2**20)) == 0


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_division_of_float32_where_it_is_hardest(integers, name):
    """A quotient next to the middle of two floats, one of them a boundary t * 2**k of codes with
    16 <= t <= 32, needs a scale this close to a multiple of 2**20."""
    scales = close_to_multiples(20).astype(np.float32)[:, np.newaxis]
    near = (scales * np.arange(16, 33, dtype=np.float32)).view(np.int32)
    values = (near[..., np.newaxis] + np.arange(-4, 5)).astype(np.int32).view(np.float32)
    scales = np.broadcast_to(scales[..., np.newaxis], values.shape).copy()
    made = np.empty_like(values)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (values, scales, made))
    integers.quotients(values.size, *pointers)
    exact = values / scales
    close = made != exact
    assert 0 < close.sum() < values.size / 1000
    for exponent in range(-23, 14):
        factor = np.float32(2.0**exponent)
        got, expected = (oracle.codes(x[close] * factor, 1.0, name) for x in (made, exact))
        np.testing.assert_array_equal(got, expected)
