# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The main operations measured on this machine, each beside a copy that moves as many bytes.

On a GPU: the calls of a round are one captured graph, replayed between two events, the median of
`ROUNDS`. Before each, the L2 is filled with other lines, and the calls use different layers and
slots in turn. On the CPU: the fastest of `ROUNDS` batches. Either takes well under a minute.
"""

import itertools
import statistics
import time
from typing import NamedTuple

import numpy as np

import cupy_cache as cc

from .. import errors

ROUNDS = 9
IN_TURN = 24  # calls of a round
HOST_CALLS = 192  # of a batch that is only enqueued: the queue has room for them
BATCH_SECONDS = 0.05  # of a batch on the CPU, at least
HEADS, QUERY_HEADS, HEAD_SIZE, BLOCK_SIZE, ENTRY, LATENT = 8, 32, 128, 16, 576, 512
ELEMENT = 2  # bytes: everything is float16


class Size(NamedTuple):
    """How much is measured: less on a CPU."""

    layers: int
    blocks: int
    tokens: int  # of a large write
    pairs: int  # of blocks to copy
    sequences: int  # that attend
    length: int  # tokens of each
    swapped: int  # blocks


GPU = Size(8, 2048, 16384, 64, 32, 1024, 256)
CPU = Size(2, 128, 1024, 16, 2, 256, 64)


class Case(NamedTuple):
    """``calls`` are made in turn; ``moved``: the bytes that each must read and write; ``copy``
    makes a copy of as many, or is None where there is nothing to compare with."""

    name: str
    calls: list
    moved: int
    copy: object


def measure(gpu, told):
    """Measure all cases, on the current GPU or on the CPU; ``told`` gets each row, a dictionary, as
    it is done: times in microseconds."""
    xp, timer = np, _Clock()
    if gpu:
        import cupy as xp

        timer = _Events(xp)
    for case in _cases(xp, GPU if gpu else CPU):
        us, host = timer(case.calls)
        copy = None if case.copy is None else timer(case.copy(case.moved))[0]
        told({"case": case.name, "bytes": case.moved, "us": us, "copy_us": copy, "host_us": host})


# --- what is measured -----------------------------------------------------------------------------


def _cases(xp, size):
    given = _Given(xp, size)
    return itertools.chain(_writes(given), _reads(given), _moves(given), _attention(given))


class _Given:
    """The caches and the random numbers of all cases."""

    def __init__(self, xp, size):
        self.xp, self.size, self.rng = xp, size, np.random.default_rng(0)
        where = {"framework": xp.__name__, "device": "cpu" if xp is np else None}
        shape = size.layers, size.blocks, BLOCK_SIZE, HEADS, HEAD_SIZE
        self.cache = cc.PagedKVCache.allocate(*shape, dtype="float16", **where)
        self.quantised = cc.PagedKVCache.allocate(
            *shape, dtype="float16", kv_cache_dtype="fp8", k_scales=0.5, v_scales=0.5, **where
        )
        self.latent = cc.PagedKVCache.allocate(
            size.layers, size.blocks, BLOCK_SIZE, 1, ENTRY, dtype="float16", layout="rows", **where
        )
        table = self.rng.permutation(size.blocks)[: size.sequences * size.length // BLOCK_SIZE]
        self.table = xp.asarray(table.reshape(size.sequences, -1).astype(np.int32))
        self.copy = _copies(xp)

    def random(self, *shape):
        """Normal numbers in float16."""
        numbers = self.rng.standard_normal(shape, dtype=np.float32)
        return self.xp.asarray(numbers.astype(np.float16))

    def in_turn(self, make):
        """The calls ``make(layer)`` of a round."""
        return [make(turn % self.size.layers) for turn in range(IN_TURN)]

    def write(self, to, count, *arrays):
        """The writes of a round, each to other slots."""

        def make(layer):
            slots = self.rng.permutation(self.size.blocks * BLOCK_SIZE)[:count]
            slots = self.xp.asarray(slots)
            return lambda: to.write(layer, *arrays, slots)

        return self.in_turn(make)


_ROW = HEADS * HEAD_SIZE * ELEMENT  # bytes of a token's key, or value


def _writes(given):
    for count in (1, 256, given.size.tokens):
        key, value = (given.random(count, HEADS, HEAD_SIZE) for _ in "kv")
        name = f"write {count:,} token{'s' if count > 1 else ''}"
        calls = given.write(given.cache, count, key, value)
        yield Case(name, calls, 4 * count * _ROW, given.copy)
    calls = given.write(given.quantised, count, key, value)
    yield Case(f"write {count:,} tokens to fp8", calls, 3 * count * _ROW, given.copy)
    kv_c, k_pe = given.random(count, LATENT), given.random(count, ENTRY - LATENT)
    calls = given.write(given.latent, count, kv_c, k_pe)
    yield Case(f"write {count:,} latent entries", calls, 2 * count * ENTRY * ELEMENT, given.copy)


def _reads(given):
    """A gather, and the slots of a step."""
    xp, size, cache, table = given.xp, given.size, given.cache, given.table
    bounds = xp.arange(size.sequences + 1, dtype=xp.int32) * size.length
    tokens = size.sequences * size.length
    rows = [xp.empty((tokens, HEADS, HEAD_SIZE), xp.float16) for _ in ("keys", "values")]
    calls = given.in_turn(lambda layer: lambda: cache.gather(layer, table, bounds, out=rows))
    yield Case(f"gather {tokens:,} tokens", calls, 4 * tokens * _ROW, given.copy)
    positions = xp.arange(256, dtype=xp.int64) % size.length
    starts, wide = xp.arange(257, dtype=xp.int32), xp.tile(table, (256 // size.sequences, 1))
    found = xp.empty(256, xp.int64)
    calls = [lambda: cc.slot_mapping(wide, positions, starts, BLOCK_SIZE, out=found)] * IN_TURN
    yield Case("slots of 256 sequences", calls, 0, None)


def _moves(given):
    """Copies of blocks, and a swap."""
    xp, size, cache, rng = given.xp, given.size, given.cache, given.rng
    calls = []
    for _ in range(4):
        pairs = rng.permutation(size.blocks)[: 2 * size.pairs].reshape(-1, 2).tolist()
        calls.append(lambda pairs=pairs: cache.copy_blocks(pairs))
    name = f"copy {size.pairs} blocks of {errors.counted(size.layers, 'layer')}"
    yield Case(name, calls, 2 * size.pairs * cache.bytes_per_block, given.copy)

    host = cc.PagedKVCache.allocate(
        1, size.swapped, BLOCK_SIZE, HEADS, HEAD_SIZE, dtype="float16", device="cpu",
        pinned=xp is not np,
    )  # fmt: skip
    first = cc.PagedKVCache(cache.key_caches[:1], cache.value_caches[:1])
    chosen = list(zip(rng.permutation(size.blocks)[: size.swapped].tolist(), range(size.swapped)))
    calls = [lambda: first.swap_blocks(host, chosen)] * 2
    moved = 2 * size.swapped * first.bytes_per_block
    name = f"swap {size.swapped} blocks to the host"
    yield Case(name, calls, moved, _copies(xp, to_host=True))


def _attention(given):
    xp, size, cache = given.xp, given.size, given.cache
    lengths = xp.full(size.sequences, size.length, xp.int32)
    query = given.random(size.sequences, QUERY_HEADS, HEAD_SIZE)
    out = xp.empty_like(query)
    for some in (1, size.sequences):
        arrays = query[:some], given.table[:some], lengths[:some]

        def attend(layer, arrays=arrays, out=out[:some]):
            return lambda: cache.attend(layer, *arrays, out=out)

        name = f"attend to {size.length:,} tokens"
        if some > 1:
            name += f", {errors.counted(some, 'sequence')}"
        moved = 2 * some * (size.length * _ROW + QUERY_HEADS * HEAD_SIZE * ELEMENT)
        yield Case(name, given.in_turn(attend), moved, given.copy)


def _copies(xp, to_host=False):
    """A function of the bytes that are to be read and written: calls that copy so."""

    def calls(moved):
        half = max(moved // 2, 1)
        if xp is np:
            arrays = np.ones((2, half), np.uint8), np.ones((2, half), np.uint8)
            return [lambda one=one: np.copyto(arrays[0][one], arrays[1][one]) for one in range(2)]
        sets = max(2, min(IN_TURN, (1 << 29) // half))
        source = xp.ones((sets, half), xp.uint8)
        if to_host:
            memory, way = xp.cuda.alloc_pinned_memory(half), xp.cuda.runtime.memcpyDeviceToHost
            enqueue, here = xp.cuda.runtime.memcpyAsync, xp.cuda.get_current_stream
            return [lambda: enqueue(memory.ptr, source.data.ptr, half, way, here().ptr)] * 2
        destination = xp.empty_like(source)
        places = [(destination[one].data, source[one].data) for one in range(sets)]
        return [lambda to=to, of=of: to.copy_from_device_async(of, half) for to, of in places]

    return calls


# --- time -----------------------------------------------------------------------------------------


class _Clock:
    """(Microseconds of a call, None) on the CPU."""

    def __call__(self, calls):
        def batch(count):
            start = time.perf_counter()
            for turn in range(count):
                calls[turn % len(calls)]()
            return time.perf_counter() - start

        batch(len(calls))
        once = batch(len(calls)) / len(calls)
        count = max(1, min(1000, int(BATCH_SECONDS / max(once, 1e-9))))
        return min(batch(count) for _ in range(ROUNDS)) * 1e6 / count, None


class _Events:
    """(Microseconds of a call on the device, of the host to enqueue one) on a GPU."""

    def __init__(self, cupy):
        self.cupy, self.stream = cupy, cupy.cuda.Stream(non_blocking=True)
        l2 = int(cupy.cuda.Device().attributes["L2CacheSize"])
        self.others = cupy.zeros(3 * l2, cupy.uint8)

    def __call__(self, calls):
        self.cupy.cuda.Device().synchronize()  # the arrays were made on another stream
        with self.stream:
            return self._device(calls), self._host(calls)

    def _device(self, calls):
        stream = self.stream
        for call in calls:
            call()
        stream.synchronize()
        stream.begin_capture()
        for call in calls:
            call()
        graph = stream.end_capture()
        start, end = (self.cupy.cuda.Event() for _ in range(2))
        times = []
        for _ in range(ROUNDS):
            self.others.fill(1)
            graph.launch(stream)  # not measured: the host enqueues meanwhile
            start.record(stream)
            graph.launch(stream)
            end.record(stream)
            end.synchronize()
            times.append(self.cupy.cuda.get_elapsed_time(start, end) * 1e3 / len(calls))
        return statistics.median(times)

    def _host(self, calls):
        calls = calls * (HOST_CALLS // len(calls))
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for call in calls:
                call()
            times.append((time.perf_counter() - start) * 1e6 / len(calls))
            self.stream.synchronize()
        return min(times)
