# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A driver that only notes what it is told: what would be launched, lent and waited for."""

import contextlib
import sys
import types

from cupy_cache.runtime import allocations, arrays, devices, driver, guards, launch, streams

STREAM = 77  # every framework's current one


class Event:
    """Work whose end the test decides."""

    is_done = False

    def move(self, stream):
        del stream

    def done(self):
        return self.is_done


class Recorder:
    """The driver.

    launches : (expression, grid, threads, stream, bytes of the parameters) of each.
    lent : (tensors, stream, device) of each time that torch's allocator is told.
    host : words; arguments with one of them in their name count as in host memory.
    event_made : the only event.
    pinned : (begin, end) of each piece of pinned memory.
    copies : (destination, source, bytes) of each copy by the driver.
    ordered : (stream, the one that waits for it, device) of each time that one does.
    """

    def __init__(self):
        self.pinned, self.copies, self.ordered = [(0, 1 << 63)], [], []
        self.launches, self.lent, self.host, self.event_made = [], [], (), Event()

    def load(self, kernel, device, stream):
        del device, stream
        return kernel

    def launch(self, loaded, grid, threads, stream, record):
        self.launches.append((loaded.expression, grid, threads, stream, bytes(record.buffer)))

    def prepare(self, loaded, grid, threads):
        """Nothing quicker than `launch`."""
        del loaded, grid, threads
        return self._refuse, NotImplementedError

    def _refuse(self, *arguments):
        raise NotImplementedError(arguments)

    def on_device(self, device):
        return contextlib.nullcontext(device)

    def processors(self, device):
        del device
        return 132

    def has_clusters(self, device):
        del device
        return True

    def has_warpgroups(self, device):
        return False

    def shared_memory(self, device):
        del device
        return 227 << 10

    def capturing(self, stream, device):
        del stream, device
        return False

    def event(self, stream, device):
        del stream, device
        return self.event_made

    def order(self, before, after, device):
        self.ordered.append((before, after, device))

    def allocation(self, address):
        """The piece of pinned memory at an address: all of it is one, or ``pinned`` are."""
        for begin, end in self.pinned:
            if begin <= address < end:
                return allocations.Allocation(begin, end, devices.CPU, 0)
        return None

    def copy(self, destination, source, size, stream, device):
        """A copy by the driver, which does not cross the edges of pinned memory."""
        del stream, device
        for at in (destination, source):
            pieces = {self.allocation(byte) for byte in (at, at + size - 1)}
            assert len(pieces) == 1, "invalid argument"
        self.copies.append((destination, source, size))

    def take(self):
        """The launches since the last time."""
        taken, self.launches = self.launches, []
        return taken


def recorder(monkeypatch):
    """A `Recorder` in the place of CUDA: CPU tensors count as on a GPU. What is remembered of
    launches is the caller's business."""
    describe, made = arrays.describe, Recorder()

    def on_gpu(metadata, name):
        array = describe(metadata, name)
        if any(word in name for word in made.host):
            return array
        return array._replace(device=arrays.Device("cuda", 0))

    def lend(tensors, stream, device):
        made.lent.append((list(tensors), stream, device))

    @contextlib.contextmanager
    def scratch(framework, device, size, stream):
        del framework, device, size, stream
        yield 1 << 44

    # Tensors of the host have addresses which those of a GPU have not.
    monkeypatch.setattr(arrays, "LOWEST", arrays.LOWEST_ON_HOST)
    cupys = guards._CUPY._replace(above=arrays.LOWEST_ON_HOST)
    monkeypatch.setattr(guards, "_CUPY", cupys)
    monkeypatch.setattr(arrays, "describe", on_gpu)
    monkeypatch.setattr(streams, "current", lambda framework, device: lambda: STREAM)
    monkeypatch.setattr(streams, "lend", lend)
    monkeypatch.setattr(streams, "scratch", scratch)
    monkeypatch.setattr(streams, "_kept", {})
    monkeypatch.setattr(driver, "active", made)
    launch.processors.cache_clear()
    return made


def as_cupys_on_gpu_1(monkeypatch, kind):
    """Let ``kind``, a class of NumPy's arrays, stand for CuPy's, with memory on GPU 1. Returns a
    list: of the GPUs that are made current, those that are at the moment."""
    inside = []

    @contextlib.contextmanager
    def on_device(index):
        inside.append(index)
        yield
        inside.pop()

    kind.data = types.SimpleNamespace(device_id=1)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=kind))
    monkeypatch.setattr(driver.active, "on_device", on_device)
    monkeypatch.setattr(arrays, "_READERS", {**arrays._REGISTERED, kind: arrays._read_numpy})
    return inside
