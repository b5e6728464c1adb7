# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of operations on chosen blocks of all layers share."""

import numpy as np
import pytest
import worlds

import cupy_cache as cc


def layers_of(rng, kind, num_layers=3, num_blocks=6, dtype="bfloat16"):
    """Layers of (key, value) or (cache,) views [num_blocks, block_size, ...]."""
    made = []
    for _ in range(num_layers):
        if kind == "NHD":
            layer = [worlds.array(rng, (num_blocks, 4, 3, 8), dtype) for _ in range(2)]
        elif kind == "HND":
            layer = [
                worlds.array(rng, (num_blocks, 3, 4, 8), dtype).permuted(0, 2, 1, 3)
                for _ in range(2)
            ]
        elif kind == "packed-NHD":
            page = worlds.array(rng, (num_blocks, 4, 3, 16), dtype)
            layer = [page[..., :8], page[..., 8:]]
        elif kind == "packed-widths-differ":
            page = worlds.array(rng, (num_blocks, 4, 3, 24), dtype)
            layer = [page[..., :16], page[..., 16:]]
        elif kind == "packed-HND-with-gaps":
            page = worlds.array(rng, (num_blocks, 2, 3, 4, 16), dtype)[:, 1].permuted(0, 2, 1, 3)
            layer = [page[..., :8], page[..., 8:]]
        elif kind == "sizes-differ":
            layer = [worlds.array(rng, (num_blocks, 5, 2, n), dtype) for n in (24, 8)]
        elif kind == "values-wider":
            layer = [worlds.array(rng, (num_blocks, 5, 2, n), dtype) for n in (8, 20)]
        elif kind == "odd":  # 7-element rows at odd addresses
            layer = [worlds.array(rng, (num_blocks, 5, 3, 7), dtype, pad=p) for p in (4, 0)]
        elif kind == "x-packed":  # permuted to [num_blocks, block_size, ...]
            layer = [
                worlds.array(rng, (num_blocks, 3, 2, 4, 8), dtype).permuted(0, 3, 1, 2, 4),
                worlds.array(rng, (num_blocks, 3, 16, 4), dtype).permuted(0, 3, 1, 2),
            ]
        elif kind == "some-heads":
            page = worlds.array(rng, (num_blocks, 4, 3, 16), dtype)
            layer = [page[:, :, :2, :8], page[:, :, :2, 8:]]
        elif kind == "rows":
            layer = [worlds.array(rng, (num_blocks, 4, 24), dtype)]
        elif kind == "cross-layer":  # all layers in one pool [num_blocks, layers, ...]
            if not made:
                pool = worlds.array(rng, (num_blocks, num_layers, 4, 3, 8), dtype)
            layer = [pool[:, len(made)]]
        elif kind == "scalars":  # one element for each slot
            layer = [worlds.array(rng, (num_blocks, 6), dtype)]
        made.append(layer)
    return made


KINDS = (
    "NHD", "HND", "packed-NHD", "packed-widths-differ", "packed-HND-with-gaps", "sizes-differ",
    "values-wider", "odd", "x-packed", "some-heads", "rows", "cross-layer", "scalars",
)  # fmt: skip


def entries(world, layers):
    """What a user passes: arrays, or tuples of two."""
    put = [[world.put(spec) for spec in layer] for layer in layers]
    return [layer[0] if len(layer) == 1 else tuple(layer) for layer in put]


class Storages:
    """Copies of all buffers, to run the oracle on: views as unsigned integers, since elements are
    only moved."""

    def __init__(self, *specs):
        self.bytes = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
        self.specs = specs

    def __call__(self, spec):
        size = spec.numpy_dtype.itemsize
        return spec.on(self.bytes[id(spec.buffer)]).view(f"u{size}")

    def check(self, world):
        for spec in self.specs:
            np.testing.assert_array_equal(world.bytes_of(spec), self.bytes[id(spec.buffer)])


def given_as(world, numbers, where):
    if where == "list":
        return [int(n) for n in numbers]
    if where == "host":
        return np.asarray(numbers, np.int64)
    if where == "host-strided":
        return np.repeat(np.asarray(numbers, np.int32), 2)[::2]
    if where == "device-strided":
        return world.put(worlds.of_values(np.repeat(np.asarray(numbers, np.int64), 3))[::3])
    dtype = where.removeprefix("device-")
    return world.put(worlds.of_values(np.asarray(numbers, dtype)))


WHERE = ("list", "host", "host-strided", "device-int64", "device-int32", "device-strided")


def refused(world, specs, call, error, *words):
    """The call raises, and nothing was written to ``specs`` that are in use."""
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, cc.CupyCacheError)
    for word in words:
        assert word in str(caught.value)
    for spec in specs:
        if id(spec.buffer) in world._made:
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
