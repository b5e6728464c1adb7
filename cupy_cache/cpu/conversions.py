# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Element types and numbers, on NumPy arrays: what the converters of the kernels mean."""

import functools

import ml_dtypes
import numpy as np


def encode(values, dtype):
    """float32 ``values`` as ``dtype`` (a `formats.DType`), returned as its bits. They are rounded
    to nearest, ties to even, in int8 away from zero. 8-bit types saturate. A NaN has all bits but
    the sign set, whatever its own are, and is 0 in int8. For callers that ignore floating-point
    errors."""
    if dtype.name == "int8":
        # In float64 the half can be added exactly.
        wide = np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), -128, 127)
        return (np.sign(wide) * np.floor(np.abs(wide) + 0.5)).astype(np.int8).view(np.uint8)
    if dtype.bytes > 1:
        bits = values.astype(dtype.numpy).view(dtype.bits)
        return np.where(np.isnan(values), dtype.bits.type(2 ** (8 * dtype.bytes - 1) - 1), bits)
    # The upper half of a float has several bits more than a code. All that rounding asks of the
    # lower half is whether it is 0.
    bits = values.view(np.uint32)
    upper = (bits >> 16).astype(np.uint16)
    upper |= (bits & 0xFFFF) != 0
    return np.take(_codes_of_upper_halves(dtype), upper)


@functools.cache
def _codes_of_upper_halves(dtype):
    """The code of every float32 whose last 16 bits are 0, by its first ones."""
    values = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    largest = float(ml_dtypes.finfo(dtype.numpy).max)
    with np.errstate(all="ignore"):
        codes = np.clip(values, -largest, largest).astype(dtype.numpy).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), codes)


def decode(bits, dtype):
    """The float32 values of ``dtype``'s ``bits``. For callers that ignore floating-point errors."""
    return bits.view(dtype.numpy).astype(np.float32)


def quantise(bits, source, scale, stored):
    """``bits`` of dtype ``source`` divided by ``scale`` (float32, broadcast) as ``stored`` bits."""
    return _scaled(np.divide, bits, source, scale, stored)


def dequantise(bits, stored, scale, target):
    """``bits`` of dtype ``stored`` times ``scale`` (float32, broadcast) as ``target`` bits."""
    return _scaled(np.multiply, bits, stored, scale, target)


def _scaled(arithmetic, bits, source, scale, target):
    scale = np.asarray(scale, np.float32)
    patterns = 2 ** (8 * source.bytes)
    with np.errstate(all="ignore"):
        if source.bytes <= 2 and scale.size == 1 and bits.size > patterns:
            # More elements than there are different ones: each of those is converted once.
            return np.take(_every_scaled(arithmetic, source, scale.tobytes(), target), bits)
        by_head = bits.ndim == 3 and scale.shape == (bits.shape[1], 1)
        if source.bytes <= 2 and by_head and bits.size > patterns * len(scale):
            scaled = np.empty(bits.shape, target.bits)
            for head, one in enumerate(scale):
                codes = _every_scaled(arithmetic, source, one.tobytes(), target)
                np.take(codes, bits[:, head], out=scaled[:, head], mode="clip")
            return scaled
        return encode(arithmetic(decode(bits, source), scale), target)


@functools.lru_cache(maxsize=128)  # of 64 KiB, where 16-bit elements become 8-bit ones
def _every_scaled(arithmetic, source, scale, target):
    """What `_scaled` makes of all bit patterns; ``scale`` is its bytes: two zeros are equal."""
    every = decode(np.arange(2 ** (8 * source.bytes)).astype(source.bits), source)
    return encode(arithmetic(every, np.frombuffer(scale, np.float32)), target)
