# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The operations on NumPy arrays: what runs where there is no GPU, and what the kernels mean.

Every function gets checked arguments and views of the caller's memory. Elements that are only
moved are viewed as unsigned integers of their size. Values outside their bounds are skipped and
recorded, exactly as on the GPU. Arithmetic on the caller's numbers ignores floating-point errors,
whatever np.seterr says: a GPU has none either, and a mere cast raises one for a signalling NaN.
"""

import math

import numpy as np

from ..runtime import faults, formats, launch
from .conversions import decode, dequantise, encode, quantise

MAX_WORD = 2**31  # bytes that an element of NumPy's cannot have
MANY_ROWS = 1024  # what makes writes of many rows quick takes longer than it saves with fewer


def guarded_rows(op, argument, values, limit, padding=True, rows=None):
    """Which ``values`` may be used as indices below ``limit``: a boolean mask.

    Negative ones are padding (skipped silently) if ``padding``; the others that are out of range
    are recorded as faults, under the numbers ``rows``, or else their place in ``values``.
    """
    good = (values >= 0) & (values < limit)
    _record_first(op, argument, values >= limit if padding else ~good, values, limit, rows)
    return good


def _record_first(op, argument, bad, values, limit, rows):
    """Record the first of the ``bad`` ones (a mask) among ``values``; see `guarded_rows`."""
    if bad.any():
        first = int(np.argmax(bad.reshape(-1)))
        row = first if rows is None else rows[first]
        faults.record(op, argument, row, values.reshape(-1)[first], limit)


def quantised_rows(rows, source, stored, scale, number):
    """``rows`` [token, head, element] of dtype ``source`` as they are stored: divided by ``scale``
    (one, or one for each head) or else by ``number``; as they are where ``stored`` is None."""
    if stored is not None:
        rows = quantise(rows, source, number if scale is None else scale.reshape(-1, 1), stored)
    return _dense(rows)


def _dense(rows):
    """``rows`` that were taken from an array, with their last dimension contiguous: of an array
    whose tokens or heads are all one NumPy makes one that has them innermost."""
    return rows if rows.strides[-1] == rows.itemsize else np.ascontiguousarray(rows)


def reshape_and_cache_flash(
    key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, rows, *numbers,
    source, stored,
):  # fmt: skip
    """Write ``rows`` tokens into caches indexed [block, offset, head, element]."""
    num_blocks, block_size = key_cache.shape[:2]
    tokens, slots = _kept("reshape_and_cache_flash", slot_mapping[:rows], num_blocks * block_size)

    def written(data, scale, number):
        return quantised_rows(data[tokens], source, stored, scale, number)

    # Values are made when keys are written and gone: the memory serves twice.
    if len(slots) < MANY_ROWS:
        places = np.divmod(slots, block_size)
        key_cache[places] = written(key, k_scale, numbers[0])
        value_cache[places] = written(value, v_scale, numbers[1])
    else:
        whole = _whole_blocks(slots, block_size)
        _put_many(key_cache, slots, whole, written(key, k_scale, numbers[0]))
        _put_many(value_cache, slots, whole, written(value, v_scale, numbers[1]))


def _whole_blocks(slots, block_size):
    """(first, end): the tokens between the end of a block begun earlier and the beginning of the
    last one, if their ``slots`` are whole blocks, each in order; else None."""
    first = -int(slots[0]) % block_size
    end = len(slots) - (len(slots) - first) % block_size
    if first >= end:
        return None
    blocks = slots[first:end].reshape(-1, block_size)
    starts = blocks[:, :1]
    if (starts % block_size).any() or (blocks != starts + np.arange(block_size)).any():
        return None
    return first, end


def _put_many(cache, slots, whole, rows):
    """Write ``rows`` [token, head, element] to ``slots`` of a cache [block, offset, head, element].
    ``whole`` is what `_whole_blocks` says of them."""
    block_size = cache.shape[1]
    if not rows.size:
        return
    if _has_adjacent_heads(cache) and _has_adjacent_heads(rows):
        cache = cache.reshape(*cache.shape[:2], 1, -1)
        rows = rows.reshape(len(rows), 1, -1)
    cache, rows = _words(cache), _words(rows)
    dense = cache[0].flags.c_contiguous and rows.flags.c_contiguous
    if whole is None or not dense or cache[0].nbytes >= MAX_WORD:
        _put_words(cache, slots, rows)
        return
    first, end = whole
    numbers = slots[first:end:block_size] // block_size
    blocks = rows[first:end].reshape(len(numbers), -1)
    _words(cache.reshape(len(cache), -1))[numbers] = _words(blocks)
    for part in (slice(0, first), slice(end, None)):
        _put_words(cache, slots[part], rows[part])


def _put_words(cache, slots, rows):
    """Write ``rows`` [token, word] to ``slots`` of a cache [block, offset, word]."""
    if cache.flags.c_contiguous:
        cache.reshape(-1, cache.shape[2])[slots] = rows
    else:
        cache[np.divmod(slots, cache.shape[1])] = rows


def _has_adjacent_heads(array):
    """Whether each head of ``array`` [..., head, element] begins where the one before it ends."""
    return array.shape[-2] == 1 or array.strides[-2] == array.shape[-1] * array.itemsize


def _words(array):
    """``array`` with its last dimension, which is contiguous, as one element of all its bytes:
    NumPy moves an element of any size at once, but several in a loop."""
    return array.view(f"V{array.shape[-1] * array.itemsize}")[..., 0]


def reshape_and_cache_flash_per_token_head(
    key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, rows, *,
    source, stored,
):  # fmt: skip
    """Write ``rows`` tokens into caches indexed [block, offset, head, element], and the scale that
    each row was given."""
    tokens, block, offset = _places(
        "reshape_and_cache_flash_per_token_head", slot_mapping[:rows], *key_cache.shape[:2]
    )
    sides = (key, key_cache, k_scale_cache), (value, value_cache, v_scale_cache)
    for data, cache, scale_cache in sides:
        with np.errstate(all="ignore"):
            values = decode(data[tokens], source)
        put_scaled(cache, scale_cache, (block, offset), values, stored)


def put_scaled(cache, scale_cache, places, values, stored):
    """Write float32 rows, and the scale that each is given, to ``places`` (block, offset)."""
    with np.errstate(all="ignore"):
        scales = _largest(values) / np.float32(formats.LARGEST[stored.name])
        scales = np.maximum(scales, np.float32(1e-6))
        inverses = np.float32(1.0) / scales
        cache[places] = encode(values * inverses[..., np.newaxis], stored)
    scale_cache[places] = scales


def reshape_and_cache(
    key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale, rows, *numbers,
    source, stored,
):  # fmt: skip
    """Write ``rows`` tokens into x-packed caches: keys [block, head, d / x, offset, d % x], values
    [block, head, d, offset] or, interleaved, [block, head, offset / x, d, offset % x]."""
    num_blocks, block_size = key_cache.shape[0], key_cache.shape[3]
    tokens, block, offset = _places(
        "reshape_and_cache", slot_mapping[:rows], num_blocks, block_size
    )
    keys = quantised_rows(key[tokens], source, stored, k_scale, numbers[0])
    values = quantised_rows(value[tokens], source, stored, v_scale, numbers[1])
    put_x_packed(key_cache, value_cache, block, offset, keys, values)


def put_x_packed(key_cache, value_cache, block, offset, keys, values):
    """Write rows [token, head, element] to x-packed caches."""
    x = key_cache.shape[4]
    # Indices split by slices put the token first: [token, head, pack], [token, head, d].
    _words(key_cache)[block, :, :, offset] = keys.view(f"V{x * keys.itemsize}")
    if value_cache.ndim == 5:
        value_cache[block, :, offset // x, :, offset % x] = values
    else:
        value_cache[block, :, :, offset] = values


def concat_and_cache_mla(
    kv_c, k_pe, kv_cache, slot_mapping, scale, rows, number, *,
    source, stored, op="concat_and_cache_mla", first_row=0,
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
    kv_c, k_pe, kv_cache, slot_mapping, scale, rows, number, *, source, power_of_two
):
    """Write ``rows`` entries of 656 bytes; see kernels_cu/concat_and_cache_mla.cu."""
    del scale, number
    tokens, block, offset = _places(
        "concat_and_cache_mla", slot_mapping[:rows], *kv_cache.shape[:2]
    )
    tiles = np.ascontiguousarray(kv_c[tokens]).reshape(-1, 4, 128)
    with np.errstate(all="ignore"):
        scales = _largest(decode(tiles, source)) / np.float32(448.0)
    if power_of_two:
        scales = _power_of_two_from(np.maximum(scales, np.float32(1e-4)))
    else:
        scales = np.maximum(scales, np.finfo(np.float32).tiny)
    codes = quantise(tiles, source, scales[..., np.newaxis], formats.E4M3)
    kv_cache[block, offset, :512] = codes.reshape(-1, 512)
    kv_cache[block, offset, 512:528] = scales.astype("<f4").view(np.uint8)
    kv_cache[block, offset, 528:] = _dense(k_pe[tokens]).view(np.uint8) if k_pe.shape[-1] else 0


def indexer_k_quant_and_cache(
    k, kv_cache, slot_mapping, rows, *, source, quant_block_size, power_of_two, exponents
):
    """Write ``rows`` keys and their scales; see kernels_cu/indexer_k_quant_and_cache.cu."""
    tokens, block, offset = _places(
        "indexer_k_quant_and_cache", slot_mapping[:rows], *kv_cache.shape[:2]
    )
    keys = np.ascontiguousarray(k[tokens])
    keys = keys.reshape(-1, k.shape[1] // quant_block_size, quant_block_size)
    with np.errstate(all="ignore"):
        largest = np.maximum(_largest(decode(keys, source)), np.float32(1e-4))
        scales = largest / np.float32(448.0)
    if power_of_two:
        scales = _power_of_two_from(scales)
    words = scales.view(np.uint32)
    if exponents:
        words = (words >> np.uint32(23)) * np.uint32(0x01010101)
    values, scale_bytes = _indexer_parts(kv_cache, k.shape[1])
    codes = quantise(keys, source, scales[..., np.newaxis], formats.E4M3)
    values[block, offset] = codes.reshape(-1, k.shape[1])
    scale_bytes[block, offset] = words.astype("<u4").view(np.uint8)


def cp_gather_indexer_k_quant_cache(kv_cache, dst_k, dst_scale, block_table, cu_seq_lens, rows, *_):
    """Copy keys and scales of the cache that the operation above writes to the ``rows``."""
    row, block, offset = _gathered(
        "cp_gather_indexer_k_quant_cache", kv_cache.shape[:2], block_table, cu_seq_lens, None, rows
    )
    values, scale_bytes = _indexer_parts(kv_cache, dst_k.shape[1])
    dst_k[row] = values[block, offset]
    dst_scale[row] = np.ascontiguousarray(scale_bytes[block, offset]).view(dst_scale.dtype)


def _indexer_parts(kv_cache, head_size):
    """The keys and the scales of an indexer's cache, both [block, offset, byte]."""
    num_blocks, block_size, width = kv_cache.shape
    pages = kv_cache.reshape(num_blocks, block_size * width)  # a view: pages have no gaps inside
    keys, scales = np.split(pages, [block_size * head_size], axis=1)
    return (
        keys.reshape(num_blocks, block_size, head_size),
        scales.reshape(num_blocks, block_size, width - head_size),
    )


def _largest(values):
    """The largest absolute value along the last dimension; NaN does not count."""
    # A signalling NaN would win in np.fmax.
    return np.max(np.abs(values), axis=-1, initial=0.0, where=~np.isnan(values))


def _power_of_two_from(values):
    """The smallest powers of two that are not below positive normal float32 ``values``."""
    # A mantissa that is not zero carries into the exponent. Infinity stays what it is.
    bits = values.view(np.uint32) + np.uint32(0x007FFFFF)
    return (bits & np.uint32(0xFF800000)).view(np.float32)


def _places(op, slot_mapping, num_blocks, block_size, first_row=0):
    """The tokens to write and, for each, its block and offset. Rows are counted from ``first_row``
    in faults."""
    tokens, slots = _kept(op, slot_mapping, num_blocks * block_size, first_row)
    return tokens, *np.divmod(slots, block_size)


def _kept(op, slot_mapping, num_slots, first_row=0):
    """The tokens to write and the slot of each. Rows are counted from ``first_row`` in faults."""
    slots = slot_mapping.astype(np.int64, copy=False)
    good = slots.view(np.uint64) < num_slots  # negative ones become the largest
    if good.all():
        return slice(0, len(slots)), slots
    rows = range(first_row, first_row + len(slots))
    _record_first(op, "slot_mapping", slots >= num_slots, slots, num_slots, rows)
    return good.nonzero()[0], slots[good]


def convert_fp8(output, input, scale, number, *, source, target):
    """Convert ``source`` elements to ``target`` ones, one of which is an fp8 type."""
    scale = number if scale is None else scale.reshape(())
    convert = quantise if target.bytes == 1 else dequantise
    output[...] = convert(input, source, scale, target)


def alibi_slopes(out, count, first, power, step):
    """Write the slopes of heads ``first`` to ``first + count``; see kernels_cu/alibi_slopes.cu."""
    head = np.arange(first, first + count)
    steps = np.where(head < power, 2 * (head + 1), 2 * (head - power) + 1)
    out[...] = np.exp2(-step * steps)


def alibi_bias(
    slopes, query_positions, key_positions, out, query_start_loc, cu_seq_lens, *_, dtype, sqrt,
    causal,
):  # fmt: skip
    """Write the bits of the bias of ``dtype`` to ``out``; see kernels_cu/alibi_bias.cu."""
    hidden = None if query_start_loc is None else _of_others(query_start_loc, cu_seq_lens, out)
    queries, keys = (p.astype(np.int64) for p in (query_positions, key_positions))
    canonical = dtype.bits.type((1 << 8 * dtype.bytes - 1) - 1)
    with np.errstate(all="ignore"):
        ahead = keys - queries[:, np.newaxis]
        offset = ahead.astype(np.float32)
        if sqrt:
            offset = np.where(ahead > 0, np.float32(0), -np.sqrt(np.abs(offset)))
        for head, slope in enumerate(slopes):  # one at a time: temporaries stay small
            values = slope * offset
            if causal:
                values = np.where(ahead > 0, np.float32(-np.inf), values)
            if hidden is not None:
                values = np.where(hidden, np.float32(-np.inf), values)
            out[head] = np.where(np.isnan(values), canonical, encode(values, dtype))


def _of_others(query_start_loc, cu_seq_lens, out):
    """Which keys are of other sequences than the query: [queries, keys]."""
    _, queries, keys = out.shape
    for name, starts, rows in (
        ("query_start_loc", query_start_loc, queries), ("cu_seq_lens", cu_seq_lens, keys)
    ):  # fmt: skip
        later, places = starts[1:], np.arange(1, len(starts))
        _record_first("alibi_bias", name, later < starts[:-1], later, rows + 1, places)
    hidden, key = np.ones((queries, keys), bool), np.arange(keys)
    row, sequence = _owners(query_start_loc, queries)
    begin, end = (cu_seq_lens[sequence + more][:, np.newaxis] for more in (0, 1))
    hidden[row] = (key < begin) | (key >= end)
    return hidden


def gather_cache(
    src_cache, dst, block_table, cu_seq_lens, seq_starts, scale, rows, sequences, width, step,
    number, *_, op, axes, stored, target,
):  # fmt: skip
    """Copy tokens of a cache to the ``rows`` of ``dst``; ``axes`` say where they are.

    ``stored`` is None where bytes are copied; else elements are multiplied by ``scale``, or by
    ``number`` where that is None. A scale for each head is [heads], one for each token and head
    [blocks, slots, heads].
    """
    del sequences, width, step
    slots = src_cache.shape[0], math.prod(src_cache.shape[axis] for axis in axes.slots)
    tokens = _gathered(op, slots, block_table, cu_seq_lens, seq_starts, rows)
    _read_tokens(src_cache, dst, scale, number, rows, *tokens, axes, stored, target)


def gather_both(
    key_rows, value_rows, block_table, cu_seq_lens, seq_starts, key_cache, value_cache, k_scale,
    v_scale, rows, sequences, width, step, k_number, v_number, *_, op, sides,
):  # fmt: skip
    """The same of key and value cache; ``sides`` have the ``axes``, ``stored`` and ``target`` of
    both."""
    del sequences, width, step
    slots = key_cache.shape[0], sides[0].block_size
    tokens = _gathered(op, slots, block_table, cu_seq_lens, seq_starts, rows)
    given = (key_cache, key_rows, k_scale, k_number), (value_cache, value_rows, v_scale, v_number)
    for side, arrays in zip(sides, given):
        _read_tokens(*arrays, rows, *tokens, side.axes, side.stored, side.target)


def gather_slots(src_cache, dst, slot_mapping, scale, rows, number, *, op, side):
    """Copy tokens as `gather_cache`, by their slots; ``side`` has ``axes``, ``stored`` and
    ``target``."""
    places = _places(op, slot_mapping[:rows], src_cache.shape[0], side.block_size)
    tokens = side.axes, side.stored, side.target
    _read_tokens(src_cache, dst, scale, number, rows, *places, *tokens)


def _read_tokens(cache, dst, scale, number, rows, row, block, offset, axes, stored, target):
    """Write the tokens at these blocks and offsets to the rows ``row`` of ``dst``, of which there
    are ``rows``; see `gather_cache`."""
    cache = cache.transpose(0, *axes.slots, *axes.token)
    slots = cache.shape[1 : 1 + len(axes.slots)]
    dense = len(slots) == 1 and cache.flags.c_contiguous and dst.flags.c_contiguous
    if stored is None and dense and len(block) == rows and dst.size:
        # All rows, each in one piece. Nothing is clipped, but the other modes need a buffer.
        flat, out = cache.reshape(-1, dst[0].size), dst[:rows].reshape(rows, -1)
        np.take(flat, block * slots[0] + offset, axis=0, out=out, mode="clip")
        return
    tokens = cache[(block, *np.unravel_index(offset, slots))].reshape(len(block), *dst.shape[1:])
    if stored is not None:
        by = np.float32(number) if scale is None else scale
        if by.ndim == 3:
            by = by[block, offset]
        if by.size > 1 or by.ndim == 2:
            by = by.reshape(*by.shape, *(1,) * (tokens.ndim - 2))
        tokens = dequantise(tokens, stored, by, target)
    dst[row] = tokens


def gather_fp8_ds_mla(
    src_cache, dst, block_table, workspace_starts, seq_starts, scale, rows, *_, op, rope, target,
):  # fmt: skip
    """Convert entries of 656 bytes; see kernels_cu/gather_cache.cu."""
    del scale
    bounds = np.append(workspace_starts.astype(np.int64), np.iinfo(np.int64).max)
    row, block, offset = _gathered(
        op, src_cache.shape[:2], block_table, bounds, seq_starts, rows, "workspace_starts"
    )
    latent, scales, rope_bytes = np.split(src_cache[block, offset], (512, 528), axis=1)
    scales = np.ascontiguousarray(scales).view("<f4")[..., np.newaxis]
    tiles = latent.reshape(-1, 4, 128)
    dst[row, :512] = dequantise(tiles, formats.E4M3, scales, target).reshape(-1, 512)
    bits = np.ascontiguousarray(rope_bytes).view(rope.bits)
    dst[row, 512:] = bits if rope is target else dequantise(bits, rope, 1.0, target)


def _gathered(op, slots, block_table, cu_seq_lens, seq_starts, rows, bounds="cu_seq_lens"):
    """The rows that are written and, for each, the block and the offset that it is read from.
    ``bounds`` is what the caller calls ``cu_seq_lens``.
    ``slots`` are the number of blocks and the size of one."""
    num_blocks, block_size = slots
    width = block_table.shape[1]
    later = cu_seq_lens[1:]
    _record_first(
        op, bounds, later < cu_seq_lens[:-1], later, rows + 1, np.arange(1, len(cu_seq_lens))
    )
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
    return row[good], block[good], offset[good]


def slot_mapping(
    block_table, positions, query_start_loc, out, slots, requests, tokens, *_,
    block_size, world, rank, interleave, op="slot_mapping", table_name="block_table",
    idx_mapping=None, first_row=0,
):  # fmt: skip
    """Write the slot of each token to ``out``, and -1 where there is none. Tokens are counted from
    ``first_row`` in faults."""
    del slots, requests
    out[...] = -1
    token, request = _owners(query_start_loc, tokens)
    if idx_mapping is not None:
        request = idx_mapping[request].astype(np.int64)
        good = guarded_rows(
            op, "idx_mapping", request, block_table.shape[0], rows=token + first_row
        )
        token, request = token[good], request[good]
    position = positions[token].astype(np.int64)
    limit = min(block_table.shape[1] * block_size * world, 2**63 - 1)
    good = guarded_rows(op, "positions", position, limit, padding=False, rows=token + first_row)
    page, inside = np.divmod(position, block_size * world)
    run, of_run = np.divmod(inside, interleave)
    good &= run % world == rank
    token, request, page = token[good], request[good], page[good]
    offset = (run // world * interleave + of_run)[good]
    block = block_table[request, page].astype(np.int64)
    limit = (2**63 - 1) // block_size  # the slots of blocks below fit 64 bits
    good = guarded_rows(op, table_name, block, limit, padding=False, rows=token + first_row)
    out[token[good]] = block[good] * block_size + offset[good]


def _owners(starts, rows):
    """The rows below ``rows`` that belong to a segment, starts[i] <= row < starts[i + 1], and the
    index i of each."""
    starts = starts.astype(np.int64, copy=False)
    if (starts[1:] < starts[:-1]).any():
        return _owners_out_of_order(starts, rows)
    end = max(min(int(starts[-1]), rows), 0)
    row = np.arange(min(max(int(starts[0]), 0), end), end)
    owner = np.searchsorted(starts, row, side="right") - 1
    owned = (owner >= 0) & (owner < len(starts) - 1)
    return row[owned], owner[owned]


def _owners_out_of_order(starts, rows):
    """The same where ``starts`` descend: of several segments the one that a kernel finds, see
    kernels_cu/include/cupy_cache/sequences.cuh."""
    count, row = len(starts) - 1, np.arange(rows)
    even = np.float32(launch.evenly(count, rows)[0])
    guess = np.minimum((row.astype(np.float32) * even).astype(np.int64), count - 1)
    owner = np.where((starts[guess] <= row) & (row < starts[guess + 1]), guess, -1)
    first, last, reach = starts[0], starts[count], 2 + (count >> 4)
    for at in np.flatnonzero((owner < 0) & (first <= row) & (row < last)):
        one, begin = row[at], guess[at]
        below = max(begin - reach, 0)
        above = begin + 1 + reach if reach < count - begin - 1 else count
        if one < starts[begin]:
            low, high = (below, begin) if starts[below] <= one else (0, below)
        else:
            low, high = (begin + 1, above) if one < starts[above] else (above, count)
        while high - low > 1:
            middle = low + (high - low) // 2
            low, high = (middle, high) if starts[middle] <= one else (low, middle)
        owner[at] = low
    return row[owner >= 0], owner[owner >= 0]
