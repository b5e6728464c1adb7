# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""An operation's reads and writes by kernels that do nothing else: what memory alone takes."""

import functools

from cupy_cache.runtime import launch, params

from . import Kernel, current_stream

PARAMS = params.Struct(per_call="from_0:ptr from_1:ptr to_0:ptr to_1:ptr slots:ptr rows:i64")
THREADS = 128


@functools.cache
def _launcher(expression):
    return launch.Launcher(Kernel("bare_accesses", expression, PARAMS), 0)


def _call(expression, items, sources, destinations, slots):
    pointers = [
        address
        for arrays in (sources, destinations)
        for address in ([array.data_ptr() for array in arrays] * 2)[:2]
    ]
    rows = slots.shape[0]
    grid, threads = launch.FlatShape(items, 0, THREADS)(rows)

    def call():
        _launcher(expression).enqueue(
            grid, threads, current_stream(), *pointers, slots.data_ptr(), rows
        )

    return call


def move_rows(sources, destinations, slots, gather=False):
    """A call that moves the rows of one or two contiguous arrays to their slots of as many, or from
    there if ``gather``."""
    row = (destinations if gather else sources)[0][0]
    vectors = row.numel() * row.element_size() // 16
    expression = f"move_rows<{vectors}, {len(sources)}, {'true' if gather else 'false'}>"
    return _call(expression, vectors, sources, destinations, slots)


def write_packed(key, value, key_cache, value_cache, slots):
    """A call that writes 2-byte elements into contiguous x-packed caches."""
    _, heads, size = key.shape
    expression = f"write_packed<{heads}, {size}, {value_cache.shape[3]}>"
    items = heads * size // 8
    return _call(expression, items, (key, value), (key_cache, value_cache), slots)
