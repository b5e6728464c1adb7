# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of what operations get: the caches of all layers, and blocks or slots chosen in them."""

import numpy as np

from ... import errors
from ...runtime import lists

# Caches with more dimensions scatter a slot: [num_blocks, heads, head_size / x, slots, x].
MAX_TOKEN_DIMS = 4


def tensor_lists(op, caches):
    """``caches``, a list with one array or one tuple of arrays for each layer, as a list with all
    layers' arrays for each tensor of a layer."""
    caches = lists.plain(op, "caches", caches)
    if not caches or not issubclass(type(caches[0]), lists.LISTS):
        return [caches]
    if not (set(map(type, caches)) <= {tuple, list} and 1 <= len(caches[0]) <= 2):
        caches = [_layer(op, index, layer) for index, layer in enumerate(caches)]
        _check_layers(op, caches)
    try:
        return list(zip(*caches, strict=True))
    except ValueError:  # they differ in length
        _check_layers(op, caches)
        raise


_OF_A_LAYER = "an array, or one or two of them like caches[0]"


def _layer(op, index, layer):
    """A layer's arrays, in a plain list or tuple."""
    if type(layer) in lists.LISTS:
        return layer
    if issubclass(type(layer), lists.LISTS):
        return lists.plain(op, f"caches[{index}]", layer)
    raise errors.wrong("length", f"{op}: caches[{index}]", _OF_A_LAYER, type(layer).__name__)


def _check_layers(op, caches):
    for index, layer in enumerate(caches):
        if not 1 <= len(layer) == len(caches[0]) <= 2:
            raise errors.wrong("length", f"{op}: caches[{index}]", _OF_A_LAYER, len(layer))


def check_tokens(check, name, cache, way_out=""):
    """Require a cache in which a slot's elements are not scattered."""
    check.shape(name, cache, "num_blocks block_size ...")
    if len(cache.shape) > MAX_TOKEN_DIMS:
        expected = f"[num_blocks, block_size, ...] of at most {MAX_TOKEN_DIMS} dimensions"
        raise errors.wrong("shape", f"{check.op}: {name}", expected, list(cache.shape), way_out)


def check_range(op, name, chosen, limit, padding, distinct):
    """Refuse `indices.Chosen` that are out of range or, if ``distinct``, repeated. Negative ones
    are allowed if they are ``padding``."""
    few = chosen.few
    if few is not None and max(few) < limit and (padding or min(few) >= 0):
        if not distinct or len(set(few)) == len(few):
            return
    numbers = chosen.numbers
    if not len(numbers):
        return
    if int(numbers.max()) >= limit or (int(numbers.min()) < 0 and not padding):
        bad = (numbers >= limit) | ((numbers < 0) & (not padding))
        row = int(np.argmax(bad))
        expected = f"{'padding or ' if padding else ''}{errors.below(limit, 'numbers')}"
        got = f"{errors.shown(int(numbers[row]))} in row {row}"
        raise errors.wrong("value", f"{op}: {name}", expected, got)
    if distinct:
        used = np.sort(numbers[numbers >= 0]) if padding else np.sort(numbers)
        again = used[1:][used[1:] == used[:-1]]
        if len(again):
            expected = "distinct destinations"
            raise errors.wrong("value", f"{op}: {name}", expected, f"{again[0]} twice")
