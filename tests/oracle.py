# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What every operation must do, as plain loops, written from the docstrings: over single elements,
or over rows where the same is done with each element of one.

Nothing here is shared with the library.
"""

import functools
import math
import struct

import ml_dtypes
import numpy as np


def written(values, token, head, scale, stored):
    """What is stored of a row: for ``stored`` None the elements, else the bytes of each value
    divided by ``scale`` (one number, or one for each head)."""
    row = values[token, head]
    if stored is None:
        return row
    scale = np.asarray(scale, np.float32).reshape(-1)
    return quantise(row, scale[head % len(scale)], stored)


def reshape_and_cache_flash(
    key, value, key_cache, value_cache, slot_mapping, k_scale=1.0, v_scale=1.0, stored=None
):
    """The caches are uint8 if ``stored`` (the name of an 8-bit type) is given."""
    num_blocks, block_size = key_cache.shape[:2]
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        for source, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
            for head in range(source.shape[1]):
                row = written(source, token, head, scale, stored)
                cache[slot // block_size, slot % block_size, head, : len(row)] = row


def reshape_and_cache_flash_per_token_head(
    key, value, key_cache, value_cache, k_scale_cache, v_scale_cache, slot_mapping, stored
):
    """The caches of elements are uint8."""
    num_blocks, block_size = key_cache.shape[:2]
    largest_code = np.float32({"int8": 127, "float8_e4m3fn": 448}[stored])
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        place = slot // block_size, slot % block_size
        for source, cache, scale_cache in (
            (key, key_cache, k_scale_cache), (value, value_cache, v_scale_cache)
        ):  # fmt: skip
            for head in range(source.shape[1]):
                with np.errstate(all="ignore"):
                    row = [np.float32(x) for x in source[token, head]]
                    largest = max([abs(x) for x in row if x == x], default=np.float32(0))
                    scale = max(largest / largest_code, np.float32(1e-6))
                    inverse = np.float32(1) / scale
                    products = [x * inverse for x in row]
                scale_cache[(*place, head)] = scale
                cache[(*place, head)] = quantise(products, 1.0, stored)


def turned(row, table, positions, is_neox, offset=0, sections=None, interleaved=False, sign=1):
    """A head's elements, each an interval (least, greatest) of numbers, after its pairs were turned
    by the angles of ``table`` [position, cosines | sines]: intervals, widened by what float32
    arithmetic may lose. ``positions``: one, or three with ``sections``."""
    row, pairs = list(row), table.shape[1] // 2
    for pair in range(pairs):
        axis = 0
        if sections is not None and interleaved:
            if pair % 3 and pair < 3 * sections[pair % 3]:
                axis = pair % 3
        elif sections is not None:
            axis = 0 if pair < sections[0] else 1 if pair < sections[0] + sections[1] else 2
        angles = table[int(positions[axis])]
        cosine, sine = float(angles[pair]), sign * float(angles[pairs + pair])
        at = (pair, pair + pairs) if is_neox else (2 * pair, 2 * pair + 1)
        x, y = (row[offset + i] for i in at)
        row[offset + at[0]] = _sum_of_products((x, cosine), (y, -sine))
        row[offset + at[1]] = _sum_of_products((y, cosine), (x, sine))
    return row


def _sum_of_products(*products):
    ends = [sorted((interval[0] * f, interval[1] * f)) for interval, f in products]
    lost = 2.0**-22 * sum(max(abs(low), abs(high)) for low, high in ends) + 2.0**-140
    return sum(low for low, _ in ends) - lost, sum(high for _, high in ends) + lost


def normalised(row, weights, epsilon, bias):
    """A head's numbers over the root of their mean square, times its weights (None: without), as
    intervals; see `turned`."""
    mean = sum(float(x) ** 2 for x in row) / len(row)
    factor = 1 / math.sqrt(mean + epsilon)
    found = []
    for at, x in enumerate(row):
        exact = float(x) * factor
        lost = 2.0**-20 * abs(exact)
        if weights is not None:
            weight = float(weights[at]) + bias
            lost *= abs(weight) + abs(bias)
            exact *= weight
        found.append((exact - lost, exact + lost))
    return found


def rounded(interval, dtype):
    """An interval of numbers, each rounded to float32 and then to the NumPy dtype."""
    with np.errstate(all="ignore"):
        return tuple(float(np.float32(end).astype(dtype)) for end in interval)


def reshape_and_cache(
    key, value, key_cache, value_cache, slot_mapping, k_scale=1.0, v_scale=1.0, stored=None
):
    """The caches are uint8 if ``stored`` is given; the values interleaved if their cache has five
    dimensions."""
    num_blocks, _, _, block_size, x = key_cache.shape
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(key.shape[1]):
            for d, element in enumerate(written(key, token, head, k_scale, stored)):
                key_cache[block, head, d // x, offset, d % x] = element
            for d, element in enumerate(written(value, token, head, v_scale, stored)):
                if value_cache.ndim == 5:
                    value_cache[block, head, offset // x, d, offset % x] = element
                else:
                    value_cache[block, head, d, offset] = element


def copy_blocks(caches, pairs):
    """``caches``: any list of caches. ``pairs`` are applied from a snapshot, all at once."""
    for cache in caches:
        before = cache.copy()
        for source, destination in pairs:
            if 0 <= source < cache.shape[0] and 0 <= destination < cache.shape[0]:
                cache[destination] = before[source]


def copy_tokens(caches, pairs):
    """Likewise, of slots. Returns the faults to expect: (row, value, limit)."""
    faults = []
    for cache in caches:
        before = cache.copy()
        slots, block_size = cache.shape[0] * cache.shape[1], cache.shape[1]
        for row, (source, destination) in enumerate(pairs):
            if source < 0 or destination < 0:
                continue
            bad = [slot for slot in (source, destination) if slot >= slots]
            if bad:
                faults.append((row, bad[0], slots))
                continue
            of, to = divmod(source, block_size), divmod(destination, block_size)
            cache[to] = before[of]
    return faults


def swap_blocks(source, destination, pairs):
    before = source.copy()
    for first, second in pairs:
        destination[second] = before[first]


def gather_cache(
    src_cache, dst, block_table, cu_seq_lens, seq_starts=None, *,
    rows=None, block_size=None, token=None,
):  # fmt: skip
    """``rows``: only the first; ``token(block, offset)``: what a row becomes. Returns the faults to
    expect: (row, argument, value, limit)."""
    num_blocks = src_cache.shape[0]
    block_size = block_size or src_cache.shape[1]
    token = token or (lambda block, offset: src_cache[block, offset])
    width = block_table.shape[1]
    faults = []
    for row in range(dst.shape[0] if rows is None else rows):
        for b in range(len(cu_seq_lens) - 1):
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
                dst[row] = token(int(block_table[b, page]), offset)
    return faults


def gather_slots(src_cache, dst, slot_mapping, *, block_size=None, token=None):
    """As `gather_cache`, by slots."""
    block_size = block_size or src_cache.shape[1]
    token = token or (lambda block, offset: src_cache[block, offset])
    limit, faults = src_cache.shape[0] * block_size, []
    for row, slot in enumerate(map(int, slot_mapping)):
        if slot >= limit:
            faults.append((row, "slot_mapping", slot, limit))
        elif slot >= 0:
            dst[row] = token(*divmod(slot, block_size))
    return faults


def packed_token(cache, block, offset, layout):
    """The token [head][element] of a single cache whose slots are not its second dimension."""
    if layout == "x-packed-key":
        _, heads, packs, _, x = cache.shape
        return [
            [cache[block, h, d // x, offset, d % x] for d in range(packs * x)] for h in range(heads)
        ]
    if layout == "x-packed-value":
        _, heads, size, _ = cache.shape
        return [[cache[block, h, d, offset] for d in range(size)] for h in range(heads)]
    _, heads, _, size, x = cache.shape  # interleaved-value
    return [
        [cache[block, h, offset // x, d, offset % x] for d in range(size)] for h in range(heads)
    ]


def stored_value(byte, stored):
    """What the byte of an 8-bit element means, by the definitions of its type."""
    byte = int(byte)
    if stored == "int8":
        return float(byte - 256 if byte > 127 else byte)
    exponents, mantissas = {"float8_e4m3fn": (4, 3), "float8_e5m2": (5, 2)}[stored]
    sign = -1.0 if byte > 127 else 1.0
    exponent, mantissa = byte >> mantissas & (1 << exponents) - 1, byte & (1 << mantissas) - 1
    bias = (1 << exponents - 1) - 1
    if stored == "float8_e4m3fn" and byte & 0x7F == 0x7F:
        return math.nan
    if stored == "float8_e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissas)
    return sign * math.ldexp((1 << mantissas) + mantissa, exponent - bias - mantissas)


@functools.cache
def _every_value(stored):
    """What each of the 256 bytes means."""
    return np.array([stored_value(byte, stored) for byte in range(256)])


def dequantise(stored_bytes, scale, stored, target):
    """``stored * scale``, of a row or of one byte, as elements of the NumPy dtype ``target``."""
    numbers = _every_value(stored)[stored_bytes].astype(np.float32)
    with np.errstate(all="ignore"):
        return (numbers * np.float32(scale)).astype(target)


def fp8_ds_mla_token(entry, target, rope):
    """The 576 numbers of an entry of 656 bytes."""
    scales = struct.unpack("<4f", entry[512:528].tobytes())
    tiles = [
        dequantise(entry[128 * i : 128 * i + 128], scales[i], "float8_e4m3fn", target)
        for i in range(4)
    ]
    numbers = np.frombuffer(entry[528:656].tobytes(), rope)
    with np.errstate(all="ignore"):
        return np.concatenate([*tiles, numbers.astype(target)])


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
            limit = min(block_table.shape[1] * block_size * world, 2**63 - 1)  # it has 64 bits
            if not 0 <= position < limit:
                faults.append((token, "positions", position, limit))
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


def slot_mapping_groups(
    block_tables, idx_mapping, positions, query_start_loc, block_sizes, out, enabled=None,
    sharded=None, world=1, rank=0, interleave=1,
):  # fmt: skip
    """Group by group and token by token. Returns the faults to expect: (row, argument, value,
    limit)."""
    faults = []
    for g, table in enumerate(block_tables):
        out[g] = -1
        if enabled is not None and not enabled[g]:
            continue
        ranks = (world, rank, interleave) if sharded is None or sharded[g] else (1, 0, 1)
        for b in range(len(query_start_loc) - 1):
            row = b if idx_mapping is None else int(idx_mapping[b])
            for token in range(positions.shape[0]):
                if row < 0 or not query_start_loc[b] <= token < query_start_loc[b + 1]:
                    continue
                number = g * positions.shape[0] + token
                if row >= len(table):
                    faults.append((number, "idx_mapping", row, len(table)))
                    continue
                slot = np.zeros(1, np.int64)
                found = slot_mapping(
                    table[row : row + 1], positions[token : token + 1], [0, 1], block_sizes[g],
                    slot, *ranks,
                )  # fmt: skip
                faults += [(number, name.replace("block_table", "block_tables"), *rest)
                           for _, name, *rest in found]  # fmt: skip
                out[g, token] = slot[0]
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


def alibi_bias(
    slopes, query_positions, key_positions, out, sqrt=False, causal=False, query_start_loc=None,
    cu_seq_lens=None,
):  # fmt: skip
    """float64 holds the products of two float32 exactly, so each step rounds once. Returns the
    faults to expect; where there are some, the starts that descend leave open whose a query is."""
    with np.errstate(all="ignore"):
        for head in range(len(slopes)):
            for i in range(len(query_positions)):
                for j in range(len(key_positions)):
                    ahead = int(key_positions[j]) - int(query_positions[i])
                    offset = np.float32(ahead)
                    if sqrt:
                        offset = np.float32(0.0 if ahead > 0 else -math.sqrt(abs(float(offset))))
                    bias = np.float32(float(slopes[head]) * float(offset))
                    if causal and ahead > 0:
                        bias = np.float32(-math.inf)
                    if query_start_loc is not None and not any(
                        int(query_start_loc[b]) <= i < int(query_start_loc[b + 1])
                        and int(cu_seq_lens[b]) <= j < int(cu_seq_lens[b + 1])
                        for b in range(len(cu_seq_lens) - 1)
                    ):
                        bias = np.float32(-math.inf)
                    out[head, i, j] = bias.astype(out.dtype)
    return [
        (b, name, int(starts[b]), rows + 1)
        for name, starts, rows in (
            ("query_start_loc", query_start_loc, len(query_positions)),
            ("cu_seq_lens", cu_seq_lens, len(key_positions)),
        )
        for b in range(1, 0 if starts is None else len(starts))
        if int(starts[b]) < int(starts[b - 1])
    ]


# What the names of 8-bit cache formats store.
STORED = {
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "int8": "int8",
}


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
            entry, split = kv_cache[slot // block_size, slot % block_size], kv_c.shape[1]
            for part, row in ((entry[:split], kv_c[token]), (entry[split:], k_pe[token])):
                part[: len(row)] = row if stored is None else quantise(row, scale, stored)
    return faults


def quantise(values, scale, stored):
    """``values / scale``, of a row or of one number, as elements of the 8-bit type ``stored``, as
    their bytes."""
    with np.errstate(all="ignore"):
        quotients = np.asarray(values).astype(np.float32) / np.float32(scale)
    numbers = np.where(np.isnan(quotients), 0, quotients.astype(np.float64))
    if stored == "int8":
        magnitudes = np.floor(np.abs(np.clip(numbers, -1000, 1000)) + 0.5)  # ties away from zero
        return np.clip(np.copysign(magnitudes, numbers), -128, 127).astype(np.int8).view(np.uint8)
    largest = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}[stored]
    clamped = np.clip(numbers, -largest, largest).astype(np.float32)
    made = clamped.astype(getattr(ml_dtypes, stored)).view(np.uint8)
    return np.where(np.isnan(quotients), np.uint8(0x7F), made)


def codes(values, scale, stored):
    """`quantise` of a whole array, another way: the code of the nearest number that the type has;
    half way between two that with the even code, or in int8 the larger one."""
    with np.errstate(all="ignore"):
        quotients = np.asarray(values).astype(np.float32) / np.float32(scale)
    numbers = _every_value(stored)[:128]
    numbers = np.append(numbers[np.isfinite(numbers)], [128.0] * (stored == "int8"))
    middles = (numbers[1:] + numbers[:-1]) / 2
    magnitudes = np.minimum(np.abs(np.nan_to_num(quotients).astype(np.float64)), numbers[-1])
    below = np.searchsorted(middles, magnitudes)
    tied = np.append(middles, np.inf)[below] == magnitudes
    nearest = below + tied * (1 if stored == "int8" else below % 2)
    negative = np.signbit(quotients)
    if stored == "int8":
        nearest = np.where(negative, -nearest, np.minimum(nearest, 127))
        return np.where(np.isnan(quotients), 0, nearest).astype(np.uint8)
    return np.where(np.isnan(quotients), 0x7F, nearest | negative << 7).astype(np.uint8)


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
    """``kv_cache`` is uint8. Returns faults, as `concat_and_cache_mla`."""
    num_blocks, block_size = kv_cache.shape[:2]
    faults = []
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot >= num_blocks * block_size:
            faults.append((token, slot))
        if not 0 <= slot < num_blocks * block_size:
            continue
        entry = kv_cache[slot // block_size, slot % block_size]
        for tile in range(4):
            values = kv_c[token, tile * 128 : (tile + 1) * 128]
            largest = max([abs(float(v)) for v in values if v == v], default=0.0)
            scale = fp8_ds_mla_scale(largest, rule)
            entry[tile * 128 : (tile + 1) * 128] = quantise(values, scale, "float8_e4m3fn")
            entry[512 + 4 * tile : 516 + 4 * tile] = list(struct.pack("<f", scale))
        raw = k_pe[token].tobytes()
        entry[528:656] = list(raw) if raw else [0] * 128
    return faults


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


def _elements(shape):
    """The indices of every element, last dimension fastest."""
    indices = [()]
    for extent in shape:
        indices = [(*index, i) for index in indices for i in range(extent)]
    return indices


def _chosen(tensor, number, by_slot):
    """The index of a block, or of a slot's token; None where it is padding or there is none."""
    if by_slot:
        if not 0 <= int(number) < tensor.shape[0] * tensor.shape[1]:
            return None
        return int(number) // tensor.shape[1], int(number) % tensor.shape[1]
    return (int(number),) if 0 <= int(number) < tensor.shape[0] else None


def pack(layers, numbers, buffer, layout, by_slot=False):
    """``layers``: a list of tensors for each layer. ``buffer``: bytes."""
    at = 0
    for layer, t, item in packed_order(len(layers), len(layers[0]), len(numbers), layout):
        tensor = layers[layer][t]
        where = _chosen(tensor, numbers[item], by_slot)
        for index in _elements(tensor.shape[1 + by_slot :]):
            size = tensor.dtype.itemsize
            if where is not None:
                buffer[at : at + size] = list(tensor[(*where, *index)].tobytes())
            at += size


def unpack(buffer, layers, numbers, layout, by_slot=False):
    at = 0
    for layer, t, item in packed_order(len(layers), len(layers[0]), len(numbers), layout):
        tensor = layers[layer][t]
        where = _chosen(tensor, numbers[item], by_slot)
        for index in _elements(tensor.shape[1 + by_slot :]):
            size = tensor.dtype.itemsize
            if where is not None:
                (tensor[(*where, *index)],) = buffer[at : at + size].view(tensor.dtype)
            at += size


def zero_blocks(caches, numbers):
    for cache in caches:
        for number in numbers:
            if 0 <= int(number) < cache.shape[0]:
                for index in _elements(cache.shape[1:]):
                    cache[(int(number), *index)] = 0


def indexer_scale(largest, scales):
    """The float32 scale of a quant block with this largest absolute value, and its four bytes;
    ``scales`` is "float32", "ue8m0" or "mxfp8"."""
    scale = max(np.float32(largest), np.float32(1e-4)) / np.float32(448)
    if scales != "float32" and not math.isinf(scale):
        power = 0
        while math.ldexp(1.0, power) < scale:
            power += 1
        while math.ldexp(1.0, power - 1) >= scale:
            power -= 1
        scale = np.float32(math.ldexp(1.0, power))
        if scales == "mxfp8":
            return scale, [power + 127] * 4
    if scales == "mxfp8":
        return scale, [255] * 4  # UE8M0 has no infinity, only NaN
    return scale, list(struct.pack("<f", scale))


def indexer_places(kv_cache, block, offset, head_size, quant_block_size):
    """Where, inside ``kv_cache[block]`` as flat bytes, the key and the scales of a slot begin, and
    how many bytes of scales there are."""
    block_size = kv_cache.shape[1]
    scale_bytes = 4 * (head_size // quant_block_size)
    return offset * head_size, block_size * head_size + offset * scale_bytes, scale_bytes


def indexer_k_quant_and_cache(k, kv_cache, slot_mapping, quant_block_size, scales):
    """``kv_cache`` is uint8. Returns the slots past the cache, faults to expect: (token, slot)."""
    num_blocks, block_size, width = kv_cache.shape
    faults = []
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot >= num_blocks * block_size:
            faults.append((token, slot))
        if not 0 <= slot < num_blocks * block_size:
            continue
        block, offset = slot // block_size, slot % block_size
        size = k.shape[1]
        key_at, scale_at, _ = indexer_places(kv_cache, block, offset, size, quant_block_size)
        for first in range(0, size, quant_block_size):
            values = k[token, first : first + quant_block_size]
            largest = max([abs(float(v)) for v in values if v == v], default=0.0)
            scale, scale_bytes = indexer_scale(largest, scales)
            for i, code in enumerate(quantise(values, scale, "float8_e4m3fn")):
                at = key_at + first + i
                kv_cache[block, at // width, at % width] = code
            for i, byte in enumerate(scale_bytes):
                at = scale_at + first // quant_block_size * 4 + i
                kv_cache[block, at // width, at % width] = byte
    return faults


def cp_gather_indexer_k_quant_cache(
    kv_cache, dst_k, dst_scale, block_table, cu_seq_lens, quant_block_size
):
    """All of bytes but the indices. Returns the faults to expect: (row, value, limit)."""
    num_blocks, block_size, width = kv_cache.shape
    faults = []
    for row in range(dst_k.shape[0]):
        for b in range(block_table.shape[0]):
            if not int(cu_seq_lens[b]) <= row < int(cu_seq_lens[b + 1]):
                continue
            page, offset = divmod(row - int(cu_seq_lens[b]), block_size)
            if page >= block_table.shape[1]:
                faults.append((row, page, block_table.shape[1]))
                continue
            block = int(block_table[b, page])
            if not 0 <= block < num_blocks:
                faults.append((row, block, num_blocks))
                continue
            key_at, scale_at, scale_bytes = indexer_places(
                kv_cache, block, offset, dst_k.shape[1], quant_block_size
            )
            for i in range(dst_k.shape[1]):
                dst_k[row, i] = kv_cache[block, (key_at + i) // width, (key_at + i) % width]
            for i in range(scale_bytes):
                at = scale_at + i
                dst_scale[row, i] = kv_cache[block, at // width, at % width]
    return faults


def starts_that_count(starts, rows):
    """The starts of neighbouring segments of so many ``rows``: no less than those before, from 0 to
    ``rows``; and the faults to expect: (index, value, limit)."""
    counted, faults = [], set()
    for index, start in enumerate(map(int, starts)):
        counts = min(max([start, 0, *counted[-1:]]), rows)
        if counts != start:
            faults.add((index, start, rows + 1))
        counted.append(counts)
    return counted, faults


def tokens_seen(
    block_table, seq_lens, query_start_loc, tokens, num_blocks, block_size, window=None,
    causal=True,
):  # fmt: skip
    """What each query of `paged_attention` sees: {row: (sequence, position, [(token, block,
    offset), …])}; and the faults to expect: (row, argument, value, limit)."""
    longest = block_table.shape[1] * block_size
    seen, faults, starts = {}, set(), list(range(len(seq_lens) + 1))
    if query_start_loc is not None:
        starts, faults = starts_that_count(query_start_loc, tokens)
        faults = {(row, "query_start_loc", value, limit) for row, value, limit in faults}
    for b in range(len(seq_lens)):
        begin, end = starts[b], starts[b + 1]
        for row in range(begin, end):
            length = int(seq_lens[b])
            if not 0 <= length <= longest:
                faults.add((b, "seq_lens", length, longest + 1))
                length = 0 if length < 0 else longest
            position = length - (end - begin) + (row - begin)
            found = []
            for token in range(length):
                if causal and token > position:
                    continue
                if window is not None and position - token >= window:
                    continue
                block = int(block_table[b, token // block_size])
                if 0 <= block < num_blocks:
                    found.append((token, block, token % block_size))
                else:
                    faults.add((b, "block_table", block, num_blocks))
            seen[row] = b, position, found
    return seen, faults


def paged_attention(
    query, keys, values, seen, *, scale=None, alibi_slopes=None, soft_cap=None, sinks=None
):
    """``keys`` and ``values`` are numbers [block, offset, head, element]; ``seen`` is of
    `tokens_seen`. {row: (attended [head, element], logarithms [head])}, all in float64."""
    heads, group = query.shape[1], query.shape[1] // keys.shape[2]
    if scale is None:
        scale = 1 / math.sqrt(query.shape[2])
    result = {}
    for row, (sequence, position, tokens) in seen.items():
        slopes = alibi_slopes
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[sequence]
        attended, logarithms = np.zeros((heads, values.shape[3])), np.full(heads, -math.inf)
        numbers, blocks, offsets = np.array(tokens, np.int64).reshape(-1, 3).T
        for head in range(heads) if tokens else ():
            place = blocks, offsets, head // group
            logits = scale * (keys[place].astype(np.float64) @ query[row, head].astype(np.float64))
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            if slopes is not None:
                logits += float(slopes[head]) * (numbers - position)
            everything = logits if sinks is None else np.append(logits, float(sinks[head]))
            largest = float(everything.max())
            with np.errstate(invalid="ignore"):  # an infinite query makes none of these a number
                total = math.fsum(np.exp(everything - largest))
                weights = np.exp(logits - largest) / total
            attended[head] = weights @ values[place].astype(np.float64)
            logarithms[head] = largest + math.log(total)
        result[row] = attended, logarithms
    return result


def merge_attn_states(
    output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None
):
    """Written in float64, then rounded."""
    for token, head in np.ndindex(*output.shape[:2]):
        ones = float(prefix_lse[head, token]), float(suffix_lse[head, token])
        ones = [-math.inf if one == math.inf else one for one in ones]
        rows = prefix_output[token, head], suffix_output[token, head]
        largest = max(ones)
        if largest == -math.inf:
            output[token, head] = rows[0]
            logarithm = largest
        else:
            weights = [math.exp(one - largest) for one in ones]
            merged = np.zeros(output.shape[2])
            for weight, row in zip(weights, rows):
                if weight:
                    merged += weight / sum(weights) * row.astype(np.float64)
            output[token, head] = merged
            logarithm = largest + math.log(sum(weights))
        if output_lse is not None:
            output_lse[head, token] = logarithm
