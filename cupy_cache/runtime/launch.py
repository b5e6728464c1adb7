# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Launch shapes, and enqueueing a kernel with its parameters.

Shapes are whole warps, chosen from the work to do and the machine's multiprocessors. Enqueueing
fills a prepared record of the kernel's parameter struct and launches it on the caller's stream and
the array's device; it never synchronises and never allocates on the device.
"""

import concurrent.futures
import ctypes
import functools

from .. import errors
from . import driver, overlap
from .devices import NOWHERE

WARP = 32
MAX_THREADS_X = 2**32 - 1  # the kernels number them in 32 bits
MAX_GRID_YZ = 65535
MAX_KNOWN = 256  # sizes of launches that are prepared


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def lanes(items):
    """A power of two that has a lane for each item, if a warp has as many."""
    return min(WARP, 1 << (items - 1).bit_length())


def evenly(segments, rows):
    """A kernel's ``even`` (sequences.cuh): (segments for each row, rows of a segment) if all
    segments were equally long. A search for a row's segment begins at this guess."""
    return (segments / rows, rows / segments) if segments and rows else (0.0, 0.0)


def divisor(number):
    """(factor, shift) of a kernel's `Divisor` (divide.cuh) by ``number``, below 2^31."""
    shift = 31 + (number - 1).bit_length()
    return ceil_div(1 << shift, number), shift


def block_threads(items, processors, most):
    """Threads of a block for ``items`` independent work items: whole warps, at most ``most``.

    Few items are spread over all multiprocessors; many fill blocks of ``most`` threads. A partial
    warp would take as many issue slots as a whole one.
    """
    if items >= most * processors:
        return most
    wanted = ceil_div(items, max(processors, 1))
    return min(most, max(WARP, ceil_div(wanted, WARP) * WARP))


class FlatShape:
    """Launch shapes for ``rows * items`` independent work items, consecutive threads taking
    consecutive items. Called with the rows, it gives (grid, threads)."""

    __slots__ = ("device", "items", "most")

    def __init__(self, items, device, most):
        self.items, self.device, self.most = items, device, most

    def __call__(self, rows):
        items = rows * self.items
        threads = block_threads(items, processors(self.device), self.most)
        return (-(-items // threads), 1, 1), threads


class FullShape:
    """`FlatShape` with ``threads`` in every block, however few items there are.

    On an H100 this writes up to 128 tokens in up to 0.1 us less than a spread over all
    multiprocessors: a launch with fewer blocks ends sooner.
    """

    __slots__ = ("items", "threads")

    def __init__(self, items, threads):
        self.items, self.threads = items, threads

    def __call__(self, rows):
        return (-(-rows * self.items // self.threads), 1, 1), self.threads


@functools.lru_cache(maxsize=64)
def processors(device):
    """How many multiprocessors GPU ``device`` has."""
    return 1 if device == NOWHERE else driver.active.processors(device)


def has_clusters(device):
    """Whether thread blocks of GPU ``device`` can read each other's shared memory. Not remembered,
    as another driver may take the place of this one, and only plans ask."""
    return device == NOWHERE or driver.active.has_clusters(device)


def has_warpgroups(device):
    """Whether GPU ``device`` has the matrix instructions of warpgroups: compute capability 9.0 has.
    Not remembered, as `has_clusters`."""
    return device == NOWHERE or driver.active.has_warpgroups(device)


def shared_memory(device):
    """Bytes of shared memory that a thread block of GPU ``device`` can have. Not remembered, as
    `has_clusters`."""
    return 227 << 10 if device == NOWHERE else driver.active.shared_memory(device)


class KernelNeeded(Exception):
    """A launch on the GPU that does not exist. It, and the call's later launches, need
    ``kernels``."""

    def __init__(self, *kernels):
        super().__init__(*kernels)
        self.kernels = kernels


def load_together(launchers, stream):
    """Load the kernels that are not loaded, at the same time: each may take long to compile."""
    missing = [launcher for launcher in launchers if not launcher.loaded]
    if len(missing) < 2:
        for launcher in missing:
            launcher.load(stream)
        return
    first, *others = missing
    with concurrent.futures.ThreadPoolExecutor(len(others), "cupy_cache load") as pool:
        futures = [pool.submit(other.load, stream) for other in others]
        first.load(stream)
        for future in futures:
            future.result()


class Launcher:
    """A kernel with its constant parameters packed, ready to enqueue. Plans keep it.

    Parameters
    ----------
    kernel : modules.Kernel
    device : int
    constants : tuple
        Values of the struct's constant fields.
    """

    def __init__(self, kernel, device, constants=()):
        self.kernel, self.device = kernel, device
        self._template = kernel.params.record(*constants)
        self._pack = kernel.params.per_call.pack_into
        self._free = []
        self.put_back = self._free.append
        self._loaded = None

    def enqueue(self, grid, threads, stream, *values, tail=b""):
        """Launch with the per-call fields ``values`` and the bytes ``tail`` at the start of the
        struct's tail. An empty grid launches nothing."""
        if self.has_work(grid, threads):
            self.load(stream)
            record = self.take(values, tail)
            driver.active.launch(self._loaded, grid, threads, stream, record)
            self.put_back(record)

    def take(self, values, tail):
        """A record with these values and tail. Each thread takes one of its own, and puts it back
        when the launch returns: the driver has copied it then."""
        try:
            record = self._free.pop()
        except IndexError:
            record = self.new_record()
        self._pack(record.buffer, 0, *values)
        if tail:
            record.tail[: len(tail)] = tail
        return record

    def has_work(self, grid, threads):
        """Whether the grid has blocks; raises where it has more than one launch takes."""
        x, y, z = grid
        if x * threads > MAX_THREADS_X or y > MAX_GRID_YZ or z > MAX_GRID_YZ:
            expected = (
                f"less than 2^32 threads and {MAX_GRID_YZ} rows of blocks, what one launch takes"
            )
            got = f"a grid of {x} x {y} x {z} blocks of {threads} threads"
            raise errors.wrong(
                "size", f"{self.kernel.op}: the work", expected, got, "split the call"
            )
        return bool(x and y and z)

    @property
    def loaded(self):
        """Whether the kernel is loaded."""
        return self._loaded is not None

    def prepare(self, grid, threads):
        """(``enqueue(stream, record's address, 0)``, errors) for launches of this shape; the kernel
        must be loaded. At these errors `launch` must be called instead: the thread has no context,
        or another current GPU."""
        return driver.active.prepare(self._loaded, grid, threads)

    def launch(self, grid, threads, stream, record):
        """Launch with a filled record."""
        driver.active.launch(self._loaded, grid, threads, stream, record)

    def load(self, stream):
        """Load the kernel, unless it is; ``stream`` is that of the launch."""
        if self._loaded is not None:
            return
        if self.device == NOWHERE:
            raise KernelNeeded(self.kernel)
        self._loaded = driver.active.load(self.kernel, self.device, stream)

    def new_record(self):
        """Parameters with the constant fields filled in, to launch with."""
        return Record(self._template, self.kernel.params.tail_at)


class Launches:
    """Launches that differ in their size, each prepared once: a tuple (enqueue, failed, shape).
    ``enqueue(stream, record's address, 0)`` launches; it is None where there is nothing to do. At
    the errors ``failed`` `launch_again` must launch ``shape``, (launcher, grid, threads), instead.

    Parameters
    ----------
    launch_for : callable
        ``launch_for(size)`` -> (launcher, grid, threads).
    """

    def __init__(self, launch_for):
        self._launch_for, self._known = launch_for, {}
        self.known = self._known.get
        overlap.prepared.add(self)

    def forget(self):
        """Forget them all."""
        self._known.clear()

    def prepare(self, size, stream=None):
        """Prepare a launch of this size, which then is `known`. Its kernel is loaded if need be,
        for a launch on ``stream``; without one the result is None."""
        shape = launcher, grid, threads = self._launch_for(size)
        if not launcher.has_work(grid, threads):
            return None, (), shape
        if stream is not None:
            launcher.load(stream)
        elif not launcher.loaded:
            return None
        made = *launcher.prepare(grid, threads), shape
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        # The result is not looked up again: another thread may clear the dictionary at any time.
        self._known[size] = made
        return made

    def enqueue(self, size, stream, values, tail=b""):
        """`Launcher.enqueue`, for a launch of this size."""
        enqueue, failed, shape = self.known(size) or self.prepare(size, stream)
        if enqueue is None:
            return
        launcher = shape[0]
        record = launcher.take(values, tail)
        try:
            enqueue(stream, record.address, 0)
        except failed:
            launch_again(shape, stream, record)
        launcher.put_back(record)


def launch_again(shape, stream, record):
    """Launch where the prepared launch failed."""
    launcher, grid, threads = shape
    launcher.launch(grid, threads, stream, record)


class Record:
    """The bytes of a parameter struct, and the array of one pointer to them that the driver wants.
    Whoever fills it may note in ``fields`` with what."""

    __slots__ = ("_pointers", "address", "buffer", "bytes", "fields", "tail")

    def __init__(self, template, tail_at):
        self.buffer = ctypes.create_string_buffer(template, len(template))
        self.bytes = memoryview(self.buffer).cast("B")
        self.tail = self.bytes[tail_at:]
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._pointers)
