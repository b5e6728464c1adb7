# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The layout of a layer's arrays, from their dimensions and strides."""

import math

from ..runtime import formats


def of_arrays(described, addresses):
    """The layout of a layer's arrays, in the words of `PagedKVCache.layout`. ``addresses``: of all
    layers' keys, and of their values."""
    dims = [len(one.shape) for one in described]
    if dims == [3]:
        return "rows"
    if dims in ([5, 4], [5, 5]):
        return "x-packed"
    if dims != [4, 4]:
        return ""
    keys, values = described
    row = keys.shape[3] * keys.dtype.bytes
    behind = addresses[1][0] - addresses[0][0] == row
    if behind and keys.strides == values.strides and row < min(keys.strides[:3]):
        return "packed"
    return "HND" if keys.strides[1] < keys.strides[2] else "NHD"


def of_rows(described):
    """The layouts of a layer's caches, by gathering's names for them."""
    if len(described[0].shape) != 5:
        return ["NHD"] * len(described)
    values = "interleaved-value" if len(described[1].shape) == 5 else "x-packed-value"
    return ["x-packed-key", values]


def token(layout, array):
    """The shape of a token's row."""
    axes = formats.CACHE_AXES[layout].token
    if axes is None:
        return array.shape[2:]
    heads, *elements = (array.shape[axis] for axis in axes)
    return heads, math.prod(elements)
