# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""One small, ordinary call of every operation: for tests of what all have in common (graph capture,
streams, threads). What each operation does is tested in its own file.

A case is made by ``CASES[name](rng)``: a `Case` whose `call(world)` runs the operation on the world's
arrays and whose `expect(storages)` does the same with plain loops on NumPy copies.
"""

import numpy as np
import oracle
import worlds

import cupy_cache as cc


class Case:
    """``specs``: every view involved. ``written``: those whose buffers the call changes."""

    def __init__(self, specs, written, run, expected, on_host=()):
        self.specs, self.written, self.on_host = specs, written, on_host
        self._run, self._expected = run, expected

    def call(self, world):
        """Run the operation on arrays of ``world``."""
        self._run(*self.put(world))

    def bind(self, world):
        """The call as a function of nothing, with all arrays made beforehand."""
        put = self.put(world)
        return lambda: self._run(*put)

    def put(self, world):
        """The world's arrays for ``specs``."""
        return [world.put_on_host(s) if s in self.on_host else world.put(s) for s in self.specs]

    def expected(self):
        """The bytes of each written spec's buffer afterwards, by `id` of the buffer."""
        copies = {id(s.buffer): s.buffer.bytes.copy() for s in self.specs}
        self._expected(*(s.on(copies[id(s.buffer)]) for s in self.specs))
        return {id(s.buffer): copies[id(s.buffer)] for s in self.written}

    def check(self, world):
        """Compare the world's memory with the loops' result."""
        for buffer, expected in self.expected().items():
            spec = next(s for s in self.written if id(s.buffer) == buffer)
            np.testing.assert_array_equal(world.bytes_of(spec), expected)


def _flash(rng):
    specs = [
        worlds.array(rng, (9, 4, 64), "bfloat16"),
        worlds.array(rng, (9, 4, 64), "bfloat16"),
        worlds.array(rng, (5, 16, 4, 64), "bfloat16"),
        worlds.array(rng, (5, 16, 4, 64), "bfloat16"),
        worlds.of_values(rng.permutation(80)[:9]),
    ]
    return Case(specs, specs[2:4], cc.reshape_and_cache_flash, oracle.reshape_and_cache_flash)


def _x_packed(rng):
    specs = [
        worlds.array(rng, (19, 4, 64), "float16"),
        worlds.array(rng, (19, 4, 64), "float16"),
        worlds.array(rng, (5, 4, 8, 16, 8), "float16"),
        worlds.array(rng, (5, 4, 64, 16), "float16"),
        worlds.of_values(np.arange(19)),
    ]
    return Case(specs, specs[2:4], cc.reshape_and_cache, oracle.reshape_and_cache)


_PAIRS = [(0, 4), (2, 5), (0, 1)]


def _copy(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    return Case(
        specs,
        specs,
        lambda *caches: cc.copy_blocks(caches[:2], caches[2:], _PAIRS),
        lambda *caches: oracle.copy_blocks(caches, _PAIRS),
    )


def _copy_by_device_mapping(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    mapping = worlds.of_values(np.array(_PAIRS))
    return Case(
        [*specs, mapping],
        specs,
        lambda *args: cc.copy_blocks(args[:2], args[2:4], args[4]),
        lambda *args: oracle.copy_blocks(args[:4], args[4].tolist()),
    )


def _copy_mla(rng):
    specs = [worlds.array(rng, (6, 16, 72), "bfloat16") for _ in range(2)]
    return Case(
        specs,
        specs,
        lambda *caches: cc.copy_blocks_mla(caches, _PAIRS),
        lambda *caches: oracle.copy_blocks(caches, _PAIRS),
    )


def _swap_out(rng):
    source, destination = (worlds.array(rng, (n, 16, 72), "bfloat16") for n in (6, 8))
    return Case(
        [source, destination],
        [destination],
        lambda src, dst: cc.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        lambda src, dst: oracle.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        on_host=[destination],
    )


def _swap_in(rng):
    source, destination = (worlds.array(rng, (n, 16, 72), "bfloat16") for n in (6, 8))
    return Case(
        [source, destination],
        [destination],
        lambda src, dst: cc.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        lambda src, dst: oracle.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        on_host=[source],
    )


def _gather(rng):
    specs = [
        worlds.array(rng, (6, 16, 2, 64), "bfloat16"),
        worlds.array(rng, (40, 2, 64), "bfloat16"),
        worlds.of_values(rng.integers(0, 6, (3, 2)).astype(np.int32)),
        worlds.of_values(np.array([0, 17, 17, 35], np.int32)),
        worlds.of_values(np.array([3, 0, 14], np.int32)),
    ]
    return Case(specs, specs[1:2], cc.gather_cache, oracle.gather_cache)


def _slot_mapping(rng):
    specs = [
        worlds.of_values(rng.integers(0, 1000, (3, 2)).astype(np.int32)),
        worlds.of_values(rng.integers(0, 32, 9)),
        worlds.of_values(np.array([0, 4, 4, 9], np.int32)),
        worlds.array(rng, (12,), "int64"),
    ]
    return Case(
        specs,
        specs[3:],
        lambda table, positions, starts, out: cc.slot_mapping(table, positions, starts, 16, out=out),
        lambda table, positions, starts, out: oracle.slot_mapping(table, positions, starts, 16, out),
    )


def _slopes(rng):
    spec = worlds.array(rng, (8,), "float32")

    def expected(out):
        out[:] = oracle.alibi_slopes(8)  # powers of two, exact in float32

    return Case([spec], [spec], lambda out: cc.alibi_slopes(8, out=out), expected)


def _placed(rng):
    spec = worlds.array(rng, (5,), "float32")
    slopes = [0.5, 0.25, -1.5, 3.0, 0.0]

    def expected(out):
        out[:] = slopes

    return Case([spec], [spec], lambda out: cc.place_slopes(slopes, out=out), expected)


CASES = {
    "reshape_and_cache_flash": _flash,
    "reshape_and_cache": _x_packed,
    "copy_blocks": _copy,
    "copy_blocks-device": _copy_by_device_mapping,
    "copy_blocks_mla": _copy_mla,
    "swap_blocks-out": _swap_out,
    "swap_blocks-in": _swap_in,
    "gather_cache": _gather,
    "slot_mapping": _slot_mapping,
    "alibi_slopes": _slopes,
    "place_slopes": _placed,
}

