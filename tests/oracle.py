# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What every operation must do, as plain loops over single elements, written from the docstrings.

Nothing here is shared with the library, and nothing is fast.
"""

import math
import struct

import ml_dtypes
import numpy as np


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping):
    num_blocks, block_size = key_cache.shape[:2]
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        for source, cache in ((key, key_cache), (value, value_cache)):
            for head in range(source.shape[1]):
                for element in range(source.shape[2]):
                    cache[slot // block_size, slot % block_size, head, element] = source[
                        token, head, element
                    ]


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping):
    num_blocks, _, _, block_size, x = key_cache.shape
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(key.shape[1]):
            for d in range(key.shape[2]):
                key_cache[block, head, d // x, offset, d % x] = key[token, head, d]
            for d in range(value.shape[2]):
                value_cache[block, head, d, offset] = value[token, head, d]


def copy_blocks(caches, pairs):
    """``caches``: any list of caches. ``pairs`` are applied from a snapshot, all at once."""
    for cache in caches:
        before = cache.copy()
        for source, destination in pairs:
            if 0 <= source < cache.shape[0] and 0 <= destination < cache.shape[0]:
                cache[destination] = before[source]


def swap_blocks(source, destination, pairs):
    before = source.copy()
    for first, second in pairs:
        destination[second] = before[first]


def gather_cache(src_cache, dst, block_table, cu_seq_lens, seq_starts=None):
    """Returns the faults to expect: (row, argument, value, limit)."""
    num_blocks, block_size = src_cache.shape[:2]
    width = block_table.shape[1]
    faults = []
    for row in range(dst.shape[0]):
        for b in range(block_table.shape[0]):
            if not int(cu_seq_lens[b]) <= row < int(cu_seq_lens[b + 1]):
                continue
            start = 0 if seq_starts is None else int(seq_starts[b])
            page, offset = divmod(start + row - int(cu_seq_lens[b]), block_size)
            if seq_starts is not None and not 0 <= start < width * block_size:
                faults.append((row, "seq_starts", start, width * block_size))
            elif page >= width:
                faults.append((row, "block_table", page, width))
            elif not 0 <= int(block_table[b, page]) < num_blocks:
                faults.append((row, "block_table", int(block_table[b, page]), num_blocks))
            else:
                dst[row] = src_cache[int(block_table[b, page]), offset]
    return faults


def slot_mapping(
    block_table, positions, query_start_loc, block_size, out, world=1, rank=0, interleave=1
):
    """Returns the faults to expect: (token, argument, value, limit)."""
    faults = []
    for token in range(out.shape[0]):
        out[token] = -1
    for b in range(block_table.shape[0]):
        for token in range(positions.shape[0]):
            if not int(query_start_loc[b]) <= token < int(query_start_loc[b + 1]):
                continue
            position = int(positions[token])
            limit = block_table.shape[1] * block_size * world
            if not 0 <= position < limit:
                faults.append((token, "positions", position, min(limit, 2**63 - 1)))
                continue
            inside = position % (block_size * world)
            if inside // interleave % world != rank:
                continue
            block = int(block_table[b, position // (block_size * world)])
            limit = (2**63 - 1) // block_size
            if not 0 <= block < limit:
                faults.append((token, "block_table", block, limit))
                continue
            offset = inside // (world * interleave) * interleave + inside % interleave
            out[token] = block * block_size + offset
    return faults


def alibi_slopes(num_heads, max_bias=8.0):
    """The rule published with the ALiBi paper: a geometric series for a power of two of heads; for
    others that of the power of two below, then every other one of the series for twice as many."""

    def series(heads):
        return [2.0 ** (-max_bias * i / heads) for i in range(1, heads + 1)]

    below = 1
    while 2 * below <= num_heads:
        below *= 2
    return series(below) + series(2 * below)[0::2][: num_heads - below]


def mpt_slopes(num_heads, max_bias=8.0):
    """MPT's rule: the series for the power of two above; where that is more than ``num_heads``, its
    second, fourth, ... then its first, third, ..., as many as there are heads."""
    above = 1
    while above < num_heads:
        above *= 2
    slopes = [2.0 ** (-i * (max_bias / above)) for i in range(1, above + 1)]
    if above != num_heads:
        slopes = (slopes[1::2] + slopes[0::2])[:num_heads]
    return slopes


def concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, scale=1.0, stored=None):
    """``stored`` is the name of the cache's element type; None: the values as they are. Returns the
    slots past the cache to expect as faults: (token, slot)."""
    num_blocks, block_size = kv_cache.shape[:2]
    faults = []
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot >= num_blocks * block_size:
            faults.append((token, slot))
        elif slot >= 0:
            entry = kv_cache[slot // block_size, slot % block_size]
            for at, value in enumerate([*kv_c[token], *k_pe[token]]):
                entry[at] = value if stored is None else quantise(value, scale, stored)
    return faults


def quantise(value, scale, stored):
    """``value / scale`` as an element of the 8-bit type ``stored``, as its byte."""
    with np.errstate(all="ignore"):
        quotient = np.float32(value) / np.float32(scale)
    if stored == "int8":
        if np.isnan(quotient):
            return 0
        magnitude = math.floor(min(abs(float(quotient)), 1000.0) + 0.5)  # ties away from zero
        return min(magnitude, 127) if quotient > 0 else max(-magnitude, -128) % 256
    if np.isnan(quotient):
        return 0x7F
    largest = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[stored]
    clamped = np.float32(max(-largest, min(largest, float(quotient))))
    return int(clamped.astype(getattr(ml_dtypes, stored)).view(np.uint8))


def fp8_ds_mla_scale(largest, rule):
    """The float32 scale of a tile with this largest absolute value."""
    wanted = np.float32(largest) / np.float32(448)
    if rule == "amax":
        return max(wanted, np.float32(2.0**-126))
    mantissa, exponent = math.frexp(max(wanted, np.float32(1e-4)))  # 0.5 <= mantissa < 1
    if math.isinf(mantissa):
        return np.float32(np.inf)
    return np.float32(math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent))


def concat_and_cache_fp8_ds_mla(kv_c, k_pe, kv_cache, slot_mapping, rule):
    """``kv_cache`` is uint8."""
    num_blocks, block_size = kv_cache.shape[:2]
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if not 0 <= slot < num_blocks * block_size:
            continue
        entry = kv_cache[slot // block_size, slot % block_size]
        for tile in range(4):
            values = kv_c[token, tile * 128 : (tile + 1) * 128]
            largest = max([abs(float(v)) for v in values if not np.isnan(v)], default=0.0)
            scale = fp8_ds_mla_scale(largest, rule)
            for at, value in enumerate(values):
                entry[tile * 128 + at] = quantise(value, scale, "float8_e4m3fn")
            entry[512 + 4 * tile : 516 + 4 * tile] = list(struct.pack("<f", scale))
        raw = k_pe[token].tobytes()
        entry[528:656] = list(raw) if raw else [0] * 128


def packed_order(num_layers, num_tensors, count, layout):
    """(layer, tensor, item) one after the other as a packed buffer has them."""
    if layout == "layer_first":
        for layer in range(num_layers):
            for tensor in range(num_tensors):
                for item in range(count):
                    yield layer, tensor, item
    else:
        for item in range(count):
            for layer in range(num_layers):
                for tensor in range(num_tensors):
                    yield layer, tensor, item


def _elements(array):
    """The indices of every element, last dimension fastest."""
    indices = [()]
    for extent in array.shape:
        indices = [(*index, i) for index in indices for i in range(extent)]
    return indices


def _chosen(tensor, number, by_slot):
    """The view of a block, or of a slot's token; None where it is padding or there is none."""
    if by_slot:
        block, offset = int(number) // tensor.shape[1], int(number) % tensor.shape[1]
        return tensor[block, offset] if 0 <= int(number) < tensor.shape[0] * tensor.shape[1] else None
    return tensor[int(number)] if 0 <= int(number) < tensor.shape[0] else None


def pack(layers, numbers, buffer, layout, by_slot=False):
    """``layers``: a list of tensors for each layer. ``buffer``: bytes."""
    at = 0
    for layer, t, item in packed_order(len(layers), len(layers[0]), len(numbers), layout):
        tensor = layers[layer][t]
        view = _chosen(tensor, numbers[item], by_slot)
        for index in _elements(tensor[0, 0] if by_slot else tensor[0]):
            size = tensor.dtype.itemsize
            if view is not None:
                buffer[at : at + size] = list(view[index].tobytes())
            at += size
    return at


def unpack(buffer, layers, numbers, layout, by_slot=False):
    at = 0
    for layer, t, item in packed_order(len(layers), len(layers[0]), len(numbers), layout):
        tensor = layers[layer][t]
        view = _chosen(tensor, numbers[item], by_slot)
        for index in _elements(tensor[0, 0] if by_slot else tensor[0]):
            size = tensor.dtype.itemsize
            if view is not None:
                element = view[(*index, ...)]  # a view, of no dimensions
                element[()] = buffer[at : at + size].view(tensor.dtype)[0]
            at += size
    return at


def zero_blocks(caches, numbers):
    for cache in caches:
        for number in numbers:
            if 0 <= int(number) < cache.shape[0]:
                for index in _elements(cache[0]):
                    cache[(int(number), *index)] = 0
