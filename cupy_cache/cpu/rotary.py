# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding on NumPy arrays."""

import numpy as np

from ..runtime import formats
from .conversions import decode, encode, quantise
from .operations import guarded_rows, put_scaled, put_x_packed, quantised_rows


def rotary(
    positions, query, key, value, cos_sin, key_cache, value_cache, slot_mapping, out, q_weight,
    k_weight, q_scale, k_scale, v_scale, k_scale_cache, v_scale_cache, tokens, slots, axis_stride,
    epsilon, weight_bias, q_number, k_number, v_number, _, *,
    op, source, table, weight, stored, out_stored, head_size, value_size, offset, neox, inverse,
    sections, interleaved, norm, steps, key_in_place, names,
):  # fmt: skip
    """Rotate, and write to caches; see kernels_cu/rotary.cu."""
    del axis_stride
    query, key, out = (_by_head(a, head_size) for a in (query, key, out))
    positions = np.atleast_2d(positions)[:, :tokens].astype(np.int64)
    good = np.ones(tokens, np.bool_)
    for axis in positions:  # all, so that each is looked at
        rows = good.nonzero()[0]
        good[rows] = guarded_rows(
            op, names["positions"], axis[rows], len(cos_sin), padding=False, rows=rows
        )
    rows = good.nonzero()[0]
    angles = _angles(decode(cos_sin, table), positions[:, rows], sections, interleaved)
    angles = angles[0], -angles[1] if inverse else angles[1]

    def rotated(array, weights, which):
        """Rows of ``array`` as float32, whose angles are those of ``which`` of `rows`."""
        with np.errstate(all="ignore"):
            values = decode(np.ascontiguousarray(array), source)
            if norm:
                values = _normalised(values, weights, weight, epsilon, weight_bias)
                values = _rounded(values, source) if steps else values
            _turn(values, offset, neox, *(a[which, np.newaxis] for a in angles))
            return _rounded(values, source) if steps else values

    # Before anything is written: views of one projection may share memory.
    queries = rotated(query[rows], q_weight, slice(None))
    keys = None if key is None or not key_in_place else rotated(key[rows], k_weight, slice(None))
    if key_cache is not None:
        slot = slot_mapping[:slots].astype(np.int64)
        block_size = key_cache.shape[3 if key_cache.ndim == 5 else 1]
        limit = key_cache.shape[0] * block_size
        has_slot = guarded_rows(op, names["slot_mapping"], slot, limit) & good[:slots]
        kept = has_slot.nonzero()[0]
        which = np.searchsorted(rows, kept)
        cached = rotated(key[kept], k_weight, which)
        places = np.divmod(slot[kept], block_size)
        given = _by_head(value, value_size)[kept]
        if k_scale_cache is not None:
            put_scaled(key_cache, k_scale_cache, places, cached, stored)
            with np.errstate(all="ignore"):
                values = decode(np.ascontiguousarray(given), source)
            put_scaled(value_cache, v_scale_cache, places, values, stored)
        else:
            values = quantised_rows(given, source, stored, v_scale, v_number)
            cached = _stored(cached, source, stored, k_scale, k_number)
            _write(key_cache, value_cache, places, cached, values, value_size)
    if out is not None:
        out[rows] = _stored(queries, source, out_stored, q_scale, q_number)
    # In place only what changes is written.
    changed = slice(None) if norm else slice(offset, offset + cos_sin.shape[1])
    if out is None:
        query[rows, :, changed] = _stored(queries, source, None, None, None)[..., changed]
    if keys is not None:
        key[rows, :, changed] = _stored(keys, source, None, None, None)[..., changed]


def _by_head(array, size):
    """``array`` as [token, head, element]."""
    if array is None or array.ndim == 3:
        return array
    return array.reshape(len(array), array.shape[1] // size, size)


def _angles(table, positions, sections, interleaved):
    """Cosines and sines [token, pair]."""
    pairs = table.shape[1] // 2
    axis = np.zeros(pairs, np.int64)
    pair = np.arange(pairs)
    if sections is not None:
        time, height, width = sections
        if interleaved:
            axis[(pair % 3 == 1) & (pair < 3 * height)] = 1
            axis[(pair % 3 == 2) & (pair < 3 * width)] = 2
        else:
            axis[time : time + height] = 1
            axis[time + height :] = 2
    row = positions[axis].T
    return table[row, pair], table[row, pairs + pair]


def _normalised(values, weights, dtype, epsilon, bias):
    mean = np.mean(values * values, axis=-1, keepdims=True, dtype=np.float32)
    factor = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
    if weights is None:
        return values * factor
    return values * (factor * (decode(weights, dtype) + np.float32(bias)))


def _turn(values, offset, neox, cosine, sine):
    """Turn the pairs of ``values`` [token, head, element], in place."""
    pairs = cosine.shape[-1]
    if neox:
        first = values[..., offset : offset + pairs]
        second = values[..., offset + pairs : offset + 2 * pairs]
    else:
        first, second = (values[..., offset + i : offset + 2 * pairs : 2] for i in (0, 1))
    turned = first * cosine - second * sine, second * cosine + first * sine
    first[...], second[...] = turned


def _rounded(values, dtype):
    return decode(encode(values, dtype), dtype)


def _stored(values, source, stored, scale, number):
    """float32 ``values`` as the bits that are stored."""
    if stored is not None:
        scale = number if scale is None else scale.reshape(-1, 1)
        return quantise(values.view(np.uint32), formats.FLOAT32, scale, stored)
    with np.errstate(all="ignore"):
        return encode(values, source)


def _write(key_cache, value_cache, places, keys, values, value_size):
    block, offset = places
    if key_cache.ndim == 5:
        put_x_packed(key_cache, value_cache, block, offset, keys, values)
    elif value_cache is None:  # entries of one head
        key_cache[block, offset, :value_size] = values[:, 0]
        key_cache[block, offset, value_size:] = keys[:, 0]
    else:
        key_cache[block, offset] = keys
        value_cache[block, offset] = values
