# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the operations with rotary position embedding have in common: a call's arrays,
what each head becomes by loops (intervals, see `oracle.turned`), and comparisons with these."""

import numpy as np
import oracle
import worlds

from cupy_cache.runtime import formats

POSITIONS = 12  # rows of tables


def numbers(rng, shape, dtype):
    """Ordinary numbers, of several magnitudes, as a NumPy array."""
    values = rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 4, (*shape[:-1], 1))
    return values.astype(formats.DTYPES[dtype].numpy)


def rows(rng, tokens, heads, size, dtype, gap=0):
    """Rows [token, head, element], ``gap`` elements behind each token's."""
    spec = worlds.of_values(numbers(rng, (tokens, heads * size + gap), dtype))
    spec.shape = tokens, heads, size
    spec.strides = spec.strides[0], size * spec.strides[1], spec.strides[1]
    return spec


def packed_projection(rng, tokens, sizes, dtype):
    """Rows of several kinds, (heads, elements of one), beside one another in one array."""
    whole = worlds.of_values(numbers(rng, (tokens, sum(h * d for h, d in sizes)), dtype))
    views, at = [], 0
    for heads, size in sizes:
        view = whole[:, at : at + heads * size]
        at += heads * size
        view.shape = tokens, heads, size
        view.strides = view.strides[0], size * view.strides[1], view.strides[1]
        views.append(view)
    return views


def table(rng, rotary, dtype="float32"):
    """Cosines and sines of angles of any size."""
    angles = rng.uniform(-np.pi, np.pi, (POSITIONS, rotary // 2))
    both = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return worlds.of_values(both.astype(formats.DTYPES[dtype].numpy))


def heads_of(
    array, table, positions, is_neox, offset=0, sections=None, interleaved=False, inverse=False,
    norm=None, rounding="once",
):  # fmt: skip
    """{(token, head): what each element becomes, as intervals}, of the rows whose positions are in
    the table. ``norm``: (weights or None, epsilon, bias). ``positions`` [token] or [3, token]."""
    positions, found = np.atleast_2d(positions), {}
    for token, head in np.ndindex(min(positions.shape[1], len(array)), array.shape[1]):
        axes = positions[:, token].tolist()
        if not all(0 <= position < len(table) for position in axes):
            continue
        row = [(float(x), float(x)) for x in array[token, head]]
        if norm is not None:
            row = oracle.normalised(array[token, head], *norm)
            if rounding == "steps":
                row = [oracle.rounded(x, array.dtype) for x in row]
        sign = -1 if inverse else 1
        row = oracle.turned(row, table, axes, is_neox, offset, sections, interleaved, sign)
        if rounding == "steps":
            row = [oracle.rounded(x, array.dtype) for x in row]
        found[token, head] = row
    return found


def check_row(got, row, stored=None, scale=1.0):
    """Compare elements with intervals: ``got`` are numbers, or the bytes of elements of the 8-bit
    type ``stored``, times ``scale``."""
    for element, (low, high) in zip(got, row):
        if stored is None:
            low, high = oracle.rounded((low, high), got.dtype)
            found = float(element)
        else:
            low, high = (
                oracle.stored_value(oracle.quantise(np.float32(end), scale, stored), stored)
                for end in (low, high)
            )
            found = oracle.stored_value(element, stored)
        assert low <= found <= high, (got, row)


def place(cache, slot):
    """The rows [head][element] of a slot in a key cache of four or five dimensions, or in one of
    scales, as a view that can be written."""
    if cache.ndim == 5:  # [block, head, pack, offset, element]
        found = cache[slot // cache.shape[3], :, :, slot % cache.shape[3]]
    else:
        found = cache[slot // cache.shape[1], slot % cache.shape[1]]
    return found
