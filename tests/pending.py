# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Work that is still pending on a GPU: streams that are kept busy for a while, memory that comes
late, and the cases that are tried with them.

What an operation enqueues behind a busy stream is still pending when the test goes on; what it must
wait for is not there yet. Two streams of which neither waits for the other are needed for that: the
current ones of torch and of CuPy are CUDA's legacy stream unless a test says otherwise, and the
others here are created non-blocking.
"""

import functools
import os
import subprocess
import sys

import cases
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc

BUSY_CYCLES = 200_000_000  # 0.1 s on an H100 at 1.98 GHz
ROUNDS = 3  # the first may compile while the stream is busy, which then proves nothing
KNOWN, PATTERN = 0x11, 0x5A  # bytes


# --- frameworks -----------------------------------------------------------------------------------


class Torch:
    """torch, as far as it is needed here. What is enqueued goes to its current stream."""

    name, world = "torch", worlds.TorchCudaWorld

    def __init__(self):
        self.module = pytest.importorskip("torch")

    def stream(self):
        """A stream that does not wait for the legacy one, nor that for it."""
        return self.module.cuda.Stream()

    def on(self, stream):
        return self.module.cuda.stream(stream)

    def device(self, index):
        return self.module.cuda.device(index)

    def busy(self):
        self.module.cuda._sleep(BUSY_CYCLES)

    def pending(self):
        """A function that tells whether what is enqueued now has yet to be done."""
        event = self.module.cuda.Event()
        event.record()
        return lambda: not event.query()

    def synchronize(self):
        self.module.cuda.synchronize()

    def release(self):
        """Give the driver back what is free."""
        self.module.cuda.empty_cache()

    def bytes(self, count, value):
        return self.module.full((count,), value, dtype=self.module.uint8, device="cuda")

    def address(self, array):
        return array.data_ptr()

    def copy(self, to, of):
        to.copy_(of)

    def numpy(self, array):
        return array.cpu().numpy()


class CuPy:
    """CuPy, likewise."""

    name, world = "cupy", worlds.CuPyWorld

    def __init__(self):
        self.module = pytest.importorskip("cupy")
        self._spin = self.module.RawKernel(
            'extern "C" __global__ void spin(long long cycles) '
            "{ long long from = clock64(); while (clock64() - from < cycles) {} }",
            "spin",
        )

    def stream(self):
        return self.module.cuda.Stream(non_blocking=True)

    def on(self, stream):
        return stream

    def device(self, index):
        return self.module.cuda.Device(index)

    def busy(self):
        self._spin((1,), (1,), (np.int64(BUSY_CYCLES),))

    def pending(self):
        event = self.module.cuda.Event(disable_timing=True)
        event.record()
        return lambda: not event.done

    def synchronize(self):
        self.module.cuda.Device().synchronize()

    def release(self):
        self.module.get_default_memory_pool().free_all_blocks()

    def bytes(self, count, value):
        array = self.module.empty(count, np.uint8)
        array.data.memset_async(value, count)  # no kernel: under a sanitizer CuPy keeps its arrays
        return array

    def address(self, array):
        return array.data.ptr

    def copy(self, to, of):
        to.data.copy_from_device_async(of.data, of.nbytes)

    def numpy(self, array):
        return array.get()


FRAMEWORKS = {kind.name: kind for kind in (Torch, CuPy)}


@functools.cache
def framework_named(name):
    return FRAMEWORKS[name]()


@functools.cache
def side_stream(framework, device=0):
    """A stream of GPU ``device`` that really runs beside the current one. Streams share a few
    queues, and what is in one queue may wait for each other."""
    with framework.device(device):
        probe, tried = framework.bytes(16, 0), []  # those that were tried keep their queues
        source = framework.bytes(16, 0)
        for _ in range(16):
            stream = framework.stream()
            tried.append(stream)
            framework.synchronize()
            framework.busy()
            pending = framework.pending()
            with framework.on(stream):
                framework.copy(probe, source)
            stream.synchronize()
            beside = pending()
            framework.synchronize()
            if beside:
                return stream
    raise AssertionError("no stream runs beside the current one")


# --- cases ----------------------------------------------------------------------------------------


def _swap_layers(rng):
    """`swap_blocks` with a list of layers."""
    specs = [worlds.array(rng, (n, 16, 72), "bfloat16") for n in (6, 6, 6, 8, 8, 8)]
    pairs = [(5, 0), (0, 7)]

    def expected(*layers):
        for source, destination in zip(layers[:3], layers[3:]):
            oracle.swap_blocks(source, destination, pairs)

    return cases.Case(
        specs, specs[3:], lambda *args: cc.swap_blocks(args[:3], args[3:], pairs), expected
    )


def _layers(specs):
    return [(specs[0], specs[1]), (specs[2], specs[3])]


def _pack_by_device_numbers(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "uint16") for _ in range(4)]
    out = worlds.array(rng, (2 * 2 * 3 * 16 * 256,), "uint8")
    numbers = worlds.of_values(np.array([4, 1, 4]))
    return cases.Case(
        [*specs, out, numbers],
        [out],
        lambda *args: cc.pack_blocks(_layers(args), args[5], args[4]),
        lambda *args: oracle.pack(_layers(args), args[5], args[4], "layer_first"),
    )


def _zero_by_device_numbers(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    numbers = worlds.of_values(np.array([4, 1]))
    return cases.Case(
        [*specs, numbers],
        specs,
        lambda *args: cc.zero_blocks(_layers(args), args[4]),
        lambda *args: oracle.zero_blocks(args[:4], args[4]),
    )


def _paged_write(rng):
    flash = cases.CASES["reshape_and_cache_flash"](rng)

    def run(key, value, key_cache, value_cache, slots):
        cc.PagedKVCache([key_cache], [value_cache]).write(0, key, value, slots)

    return cases.Case(flash.specs, flash.written, run, oracle.reshape_and_cache_flash)


PAGED = "PagedKVCache.write"
ADDRESSES = "swap_blocks_batch"  # takes no arrays, and so knows nothing of their frameworks
CASES = {
    **cases.CASES,
    "swap_blocks-layers": _swap_layers,
    "pack_blocks-device": _pack_by_device_numbers,
    "zero_blocks-device": _zero_by_device_numbers,
    PAGED: _paged_write,
}


def sources(case):
    """Of the arrays on the GPU, those that are only read."""
    apart = {id(spec.buffer) for spec in (*case.written, *case.on_host)}
    return [spec for spec in case.specs if id(spec.buffer) not in apart]


def destinations(case):
    """Of the arrays on the GPU, those that are written."""
    return [spec for spec in case.written if spec not in case.on_host]


def names_where(condition):
    """The cases for which ``condition(case)`` holds, without the one that takes addresses."""
    made = {name: make(np.random.default_rng(0)) for name, make in CASES.items()}
    return [name for name, case in made.items() if name != ADDRESSES and condition(case)]


READING = names_where(sources)
WRITING = names_where(destinations)


def storages(world, specs):
    """The memory that ``specs`` lie in, each once."""
    return [world._made[key][1] for key in dict.fromkeys(id(spec.buffer) for spec in specs)]


def hide(framework, world, specs):
    """Zero the memory of ``specs``, which are then valid but wrong; returns a function that
    enqueues what was there."""
    held = []
    for storage in storages(world, specs):
        size = storage.nbytes
        held.append((storage, framework.bytes(size, 0)))
        framework.copy(held[-1][1], storage)
        framework.copy(storage, framework.bytes(size, 0))

    def show():
        for storage, content in held:
            framework.copy(storage, content)

    return show


def warm(case, make_world, calls):
    """Call with new arrays each time, until an operation knows them well."""
    for _ in range(calls):
        world = make_world()
        case.call(world)
        world.synchronize()


class Mixed:
    """A world for ``case`` in which what is only read is of another kind than what is written."""

    def __init__(self, case, read, written):
        self.read, self._written = read, written
        self._buffers = {id(spec.buffer) for spec in case.written}
        self.put_on_host, self.bytes_of = written.put_on_host, written.bytes_of

    def put(self, spec):
        written = id(spec.buffer) in self._buffers
        return (self._written if written else self.read).put(spec)

    def synchronize(self):
        self._written.synchronize()


def run(script, *arguments, **environment):
    """Run ``script`` in a process of its own. Returns its output; it must end well."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert not done.returncode, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def seed(rng):
    return int(rng.integers(2**32))
