# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The operations on NumPy arrays: what runs where there is no GPU, and what the kernels mean.

Every function gets checked arguments and views of the caller's memory. Elements that are only
moved are viewed as unsigned integers of their size. Values outside their bounds are skipped and
recorded, exactly as on the GPU.
"""

import ml_dtypes
import numpy as np

from . import formats, launch


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


def guarded_rows(op, argument, values, limit, padding=True, rows=None):
    """Which ``values`` may be used as indices below ``limit``: a boolean mask.

    Negative ones are padding (skipped silently) if ``padding``; the others that are out of range
    are recorded as faults, under the numbers ``rows``, or else their place in ``values``.
    """
    good = (values >= 0) & (values < limit)
    bad = values >= limit if padding else ~good
    if bad.any():
        first = int(np.argmax(bad.reshape(-1)))
        row = first if rows is None else rows[first]
        launch.record_host_fault(op, argument, row, values.reshape(-1)[first], limit)
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


def concat_and_cache_mla(
    kv_c, k_pe, kv_cache, slot_mapping, scale, rows, *,
    source, stored, number, op="concat_and_cache_mla", first_row=0,
):  # fmt: skip
    """Write ``rows`` entries [kv_c | k_pe] into a cache indexed [block, offset, element].

    ``stored`` is None where bytes are copied; else ``source`` elements are divided by ``scale``, or
    by ``number`` where that is None. Rows are counted from ``first_row`` in faults.
    """
    tokens, block, offset = _places(op, slot_mapping[:rows], *kv_cache.shape[:2], first_row)
    latent = kv_c.shape[-1]
    for part, place in ((kv_c, slice(0, latent)), (k_pe, slice(latent, None))):
        entries = part[tokens]
        if stored is not None:
            entries = quantise(entries, source, number if scale is None else scale, stored)
        kv_cache[block, offset, place] = entries


def concat_and_cache_fp8_ds_mla(
    kv_c, k_pe, kv_cache, slot_mapping, scale, rows, *, source, power_of_two
):
    """Write ``rows`` entries of 656 bytes; see kernels_cu/concat_and_cache_mla.cu."""
    del scale
    tokens, block, offset = _places(
        "concat_and_cache_mla", slot_mapping[:rows], *kv_cache.shape[:2]
    )
    tiles = decode(kv_c[tokens], source).reshape(-1, 4, 128)
    scales = np.fmax.reduce(np.abs(tiles), axis=-1, initial=0.0) / np.float32(448.0)
    if power_of_two:
        # The smallest power of two that is not below: a mantissa that is not zero carries into the
        # exponent. Infinity stays what it is.
        bits = np.maximum(scales, np.float32(1e-4)).view(np.uint32)
        scales = ((bits + np.uint32(0x007FFFFF)) & np.uint32(0xFF800000)).view(np.float32)
    else:
        scales = np.maximum(scales, np.finfo(np.float32).tiny)
    with np.errstate(all="ignore"):
        values = encode(tiles / scales[..., np.newaxis], formats.DTYPES["float8_e4m3fn"])
    kv_cache[block, offset, :512] = values.reshape(-1, 512)
    kv_cache[block, offset, 512:528] = scales.astype("<f4").view(np.uint8)
    kv_cache[block, offset, 528:] = k_pe[tokens].view(np.uint8) if k_pe.shape[-1] else 0


def _places(op, slot_mapping, num_blocks, block_size, first_row=0):
    """The tokens to write and, for each, its block and offset. Rows are counted from ``first_row``
    in faults."""
    slots = slot_mapping.astype(np.int64, copy=False)
    rows = range(first_row, first_row + len(slots))
    good = guarded_rows(op, "slot_mapping", slots, num_blocks * block_size, rows=rows)
    if good.all():
        return slice(0, len(slots)), *np.divmod(slots, block_size)
    return good.nonzero()[0], *np.divmod(slots[good], block_size)


def pack(cache, index, packed, rows):
    """Copy the items ``index`` of a cache to ``rows`` of a packed buffer; all are in range."""
    packed[rows] = cache[index]


def unpack(packed, rows, cache, index):
    """Copy ``rows`` of a packed buffer to the items ``index`` of a cache; all are in range."""
    cache[index] = packed[rows]


def zero(cache, index):
    """Fill the items ``index`` of a cache with zeros; all are in range."""
    cache[index] = 0


def copy_blocks(source, destination, pairs):
    """Copy whole blocks between caches indexed [block, …]; pairs are checked and independent."""
    if pairs.sources:
        destination[pairs.destinations] = source[pairs.sources]


def alibi_slopes(first, count, power, step):
    """float32 slopes of heads ``first`` to ``first + count``; see kernels_cu/alibi_slopes.cu."""
    head = np.arange(first, first + count)
    steps = np.where(head < power, 2 * (head + 1), 2 * (head - power) + 1)
    return np.exp2(-step * steps).astype(np.float32)


def gather_cache(src_cache, dst, block_table, cu_seq_lens, seq_starts, rows, sequences):
    """Copy tokens of a cache indexed [block, offset, ...] to the ``rows`` of ``dst``."""
    op = "gather_cache"
    num_blocks, block_size = src_cache.shape[:2]
    width = block_table.shape[1]
    row, sequence = _owners(cu_seq_lens, rows)
    position = row - cu_seq_lens[sequence]
    if seq_starts is not None:
        start = seq_starts[sequence].astype(np.int64)
        good = guarded_rows(op, "seq_starts", start, width * block_size, padding=False, rows=row)
        row, sequence, position = row[good], sequence[good], (position + start)[good]
    page, offset = np.divmod(position, block_size)
    good = guarded_rows(op, "block_table", page, width, padding=False, rows=row)
    row, sequence, page, offset = row[good], sequence[good], page[good], offset[good]
    block = block_table[sequence, page].astype(np.int64)
    good = guarded_rows(op, "block_table", block, num_blocks, padding=False, rows=row)
    dst[row[good]] = src_cache[block[good], offset[good]]


def slot_mapping(
    block_table, positions, query_start_loc, out, slots, requests, tokens, *,
    block_size, world, rank, interleave,
):  # fmt: skip
    """Write the slot of each token to ``out``, and -1 where there is none."""
    op = "slot_mapping"
    out[...] = -1
    token, request = _owners(query_start_loc, tokens)
    position = positions[token].astype(np.int64)
    limit = min(block_table.shape[1] * block_size * world, 2**63 - 1)
    good = guarded_rows(op, "positions", position, limit, padding=False, rows=token)
    page, inside = np.divmod(position, block_size * world)
    run, of_run = np.divmod(inside, interleave)
    good &= run % world == rank
    token, request, page = token[good], request[good], page[good]
    offset = (run // world * interleave + of_run)[good]
    block = block_table[request, page].astype(np.int64)
    limit = (2**63 - 1) // block_size  # the slots of blocks below fit 64 bits
    good = guarded_rows(op, "block_table", block, limit, padding=False, rows=token)
    out[token[good]] = block[good] * block_size + offset[good]


def _owners(starts, rows):
    """The rows below ``rows`` that belong to a segment, starts[i] <= row < starts[i + 1], and the
    index i of each; arbitrary valid ones where ``starts`` descend."""
    starts = starts.astype(np.int64, copy=False)
    row = np.arange(max(int(starts[0]), 0), min(int(starts[-1]), rows))
    owner = np.searchsorted(starts, row, side="right") - 1
    owned = (owner >= 0) & (owner < len(starts) - 1)
    return row[owned], owner[owned]
