# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The operations on NumPy arrays: what runs where there is no GPU, and what the kernels mean.

Every function gets checked arguments and views of the caller's memory. Elements that are only
moved are viewed as unsigned integers of their size. Values outside their bounds are skipped and
recorded, exactly as on the GPU.
"""

import ml_dtypes
import numpy as np

from . import launch


def encode(values, dtype):
    """float32 ``values`` as ``dtype`` (a `formats.DType`), returned as its bits: round to nearest,
    ties to even, except int8, where ties go away from zero; 8-bit types saturate; an 8-bit NaN is
    0x7f whatever its sign, and 0 in int8."""
    if dtype.name == "int8":
        # In float64 the half can be added exactly.
        wide = np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0), -128, 127)
        return (np.sign(wide) * np.floor(np.abs(wide) + 0.5)).astype(np.int8).view(np.uint8)
    if dtype.bytes > 1:
        with np.errstate(over="ignore"):
            return values.astype(dtype.numpy).view(dtype.bits)
    largest = float(ml_dtypes.finfo(dtype.numpy).max)
    bits = np.clip(values, -largest, largest).astype(dtype.numpy).view(np.uint8)
    return np.where(np.isnan(values), np.uint8(0x7F), bits)


def decode(bits, dtype):
    """The float32 values of ``dtype``'s ``bits``."""
    return bits.view(dtype.numpy).astype(np.float32)


def quantise(bits, source, scale, stored):
    """``bits`` of dtype ``source`` divided by ``scale`` (float32, broadcast) as ``stored`` bits."""
    with np.errstate(all="ignore"):
        return encode(decode(bits, source) / np.asarray(scale, np.float32), stored)


def dequantise(bits, stored, scale, target):
    """``bits`` of dtype ``stored`` times ``scale`` (float32, broadcast) as ``target`` bits."""
    with np.errstate(all="ignore"):
        return encode(decode(bits, stored) * np.asarray(scale, np.float32), target)


def guarded_rows(op, argument, values, limit, padding=True):
    """Which ``values`` may be used as indices below ``limit``: a boolean mask.

    Negative ones are padding (skipped silently) if ``padding``; the others that are out of range
    are recorded as faults.
    """
    good = (values >= 0) & (values < limit)
    bad = values >= limit if padding else ~good
    if bad.any():
        row = int(np.argmax(bad.reshape(-1)))
        launch.record_host_fault(op, argument, row, values.reshape(-1)[row], limit)
    return good


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, rows):
    """Write ``rows`` tokens into caches indexed [block, offset, head, element]."""
    num_blocks, block_size = key_cache.shape[:2]
    tokens, block, offset = _places(
        "reshape_and_cache_flash", slot_mapping[:rows], num_blocks, block_size
    )
    key_cache[block, offset] = key[tokens]
    value_cache[block, offset] = value[tokens]


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, rows):
    """Write ``rows`` tokens into x-packed caches: keys [block, head, d / x, offset, d % x], values
    [block, head, d, offset]."""
    num_blocks, heads, packs, block_size, x = key_cache.shape
    tokens, block, offset = _places(
        "reshape_and_cache", slot_mapping[:rows], num_blocks, block_size
    )
    # Indices split by slices put the token dimension first: [token, head, pack, x], [token, head, d].
    key_cache[block, :, :, offset] = key[tokens].reshape(-1, heads, packs, x)
    value_cache[block, :, :, offset] = value[tokens]


def _places(op, slot_mapping, num_blocks, block_size):
    """The tokens to write and, for each, its block and offset."""
    slots = slot_mapping.astype(np.int64, copy=False)
    good = guarded_rows(op, "slot_mapping", slots, num_blocks * block_size)
    if good.all():
        return slice(0, len(slots)), *np.divmod(slots, block_size)
    return good.nonzero()[0], *np.divmod(slots[good], block_size)


def copy_blocks(source, destination, pairs):
    """Copy whole blocks between caches indexed [block, …]; pairs are checked and independent."""
    if pairs.sources:
        destination[pairs.destinations] = source[pairs.sources]
