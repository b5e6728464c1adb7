# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Launch shapes, and enqueueing: the only place that talks to the driver.

Shapes are whole warps, chosen from the work to do and the machine's multiprocessors. Enqueueing
fills a prepared record of the kernel's parameter struct and launches it on the caller's stream and
the array's device; it never synchronises and never allocates on the device.
"""

import ctypes
import functools

from . import arrays, env, modules
from .errors import CaptureError, Fault, FaultError, KernelError, ShapeError

WARP = 32
MAX_THREADS = 1024
MAX_GRID_X = 2**31 - 1
MAX_GRID_YZ = 65535

# Whether to wait and raise after every call; asking the environment each time would cost 0.5 us.
debug = env.flag(env.DEBUG)


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def block_threads(items, processors, most=256):
    """Threads of a block for ``items`` independent work items: whole warps, at most ``most``.

    Few items are spread over all multiprocessors rather than packed into few blocks; many fill
    blocks of ``most`` threads. Never fewer than one warp, never a partial one: a partial warp costs
    a full warp's issue slots.
    """
    wanted = ceil_div(items, max(processors, 1))
    return min(most, max(WARP, ceil_div(wanted, WARP) * WARP), MAX_THREADS)


def flat_grid(items, threads, op):
    """The 1-D grid of ``threads``-wide blocks that covers ``items``."""
    blocks = ceil_div(items, threads)
    if blocks > MAX_GRID_X:
        raise ShapeError(f"{op}: {items} work items are more than one launch can take; split the call")
    return (blocks, 1, 1)


class FlatShape:
    """Launch shapes for ``rows * items`` independent work items, consecutive threads taking
    consecutive items. Called with the rows, it gives (grid, threads)."""

    __slots__ = ("op", "items", "device", "most")

    def __init__(self, op, items, device, most):
        self.op, self.items, self.device, self.most = op, items, device, most

    def __call__(self, rows):
        items = rows * self.items
        threads = block_threads(items, processors(self.device), self.most)
        return flat_grid(items, threads, self.op), threads


@functools.lru_cache(maxsize=64)
def processors(device):
    """How many multiprocessors GPU ``device`` has."""
    return driver.processors(device)


class Launcher:
    """A kernel with its constant parameters packed: what a plan keeps, ready to enqueue.

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
        self._loaded = None

    def enqueue(self, grid, threads, stream, *values, tail=b""):
        """Launch with the per-call fields ``values`` and the bytes ``tail`` at the start of the
        struct's tail; zero work launches nothing."""
        if not (grid[0] and grid[1] and grid[2]):
            # CuPy would round an empty grid up to one block.
            return
        if grid[1] > MAX_GRID_YZ or grid[2] > MAX_GRID_YZ or grid[0] > MAX_GRID_X:
            raise ShapeError(f"{self.kernel.op}: grid {grid} exceeds the hardware's limits")
        if self._loaded is None:
            self._loaded = driver.load(self.kernel, self.device, stream)
        # A record in use by one thread must not be repacked by another: take one, put it back.
        # The driver copies it before launching returns.
        try:
            record = self._free.pop()
        except IndexError:
            record = _Record(self._template)
        self._pack(record.buffer, 0, *values)
        if tail:
            at = self.kernel.params.tail_at
            record.buffer[at : at + len(tail)] = tail
        try:
            driver.launch(self._loaded, grid, threads, stream, record)
        finally:
            self._free.append(record)
        if debug:
            raise_faults(self.device)


class _Record:
    """A parameter struct's bytes and the array of one pointer that the driver wants."""

    __slots__ = ("buffer", "address", "_pointers")

    def __init__(self, template):
        self.buffer = ctypes.create_string_buffer(template, len(template))
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._pointers)


class CudaDriver:
    """Loading and launching through CuPy."""

    def __init__(self):
        self._launch = None

    def load(self, kernel, device, stream):
        """The kernel on the device; a failure during a graph capture names ``warmup``."""
        try:
            return modules.load(kernel, device)
        except KernelError as error:
            if self._capturing(stream):
                raise CaptureError(
                    f"{kernel!r} was met for the first time while a CUDA graph is captured, and "
                    f"could not be loaded there: call warmup() for this shape before ({error})"
                ) from error
            raise

    def launch(self, loaded, grid, threads, stream, record):
        """Enqueue on ``stream`` of the kernel's device, whatever device is current."""
        if self._launch is None:
            self._find_entries()
        if self._current_device() != loaded.device:
            with arrays.import_cupy("a launch").cuda.Device(loaded.device):
                self._launch_here(loaded, grid, threads, stream, record)
        else:
            self._launch_here(loaded, grid, threads, stream, record)

    def _launch_here(self, loaded, grid, threads, stream, record):
        # The driver binding takes the prepared pointer array as it is: 4.0 to 4.5 us, against 5.1
        # for RawKernel.__call__ with a struct (and 7 to 8 with loose arguments).
        try:
            self._launch(
                loaded.handle, *grid, threads, 1, 1, 0, stream, record.address, 0
            )
        except self._driver_error as error:
            # A thread that never touched CUDA has no context yet: make one, try again.
            if "INVALID_CONTEXT" not in str(error):
                raise KernelError(f"{loaded!r} could not be launched: {error}") from error
            arrays.import_cupy("a launch").cuda.runtime.setDevice(loaded.device)
            self._launch(loaded.handle, *grid, threads, 1, 1, 0, stream, record.address, 0)

    def _find_entries(self):
        from cupy_backends.cuda.api import driver as binding

        cupy = arrays.import_cupy("a launch")
        self._current_device = cupy.cuda.runtime.getDevice
        self._driver_error = binding.CUDADriverError
        self._launch = binding.launchKernel

    def processors(self, device):
        cupy = arrays.import_cupy(f"cuda:{device}")
        return cupy.cuda.Device(device).attributes["MultiProcessorCount"]

    def capturing(self, stream):
        """Whether ``stream`` is being captured into a CUDA graph."""
        cupy = arrays.import_cupy("a stream")
        return bool(cupy.cuda.runtime.streamIsCapturing(stream)) if stream else False

    def mapped_address(self, address, device):
        """The address at which GPU ``device`` reaches this host memory; None if it is not pinned."""
        runtime = arrays.import_cupy("host memory").cuda.runtime
        attributes = runtime.pointerGetAttributes(address)
        return attributes.devicePointer or None

    def copy(self, destination, source, size, stream, device):
        """Enqueue a copy by the driver: one of the copy engines, if the host memory is pinned."""
        cupy = arrays.import_cupy("a copy")
        runtime = cupy.cuda.runtime
        try:
            with cupy.cuda.Device(device):
                runtime.memcpyAsync(destination, source, size, runtime.memcpyDefault, stream)
        except runtime.CUDARuntimeError as error:
            if self._capturing(stream):
                raise CaptureError(
                    "swap_blocks: host memory that is not pinned cannot be copied while a CUDA "
                    f"graph is captured: pin it ({error})"
                ) from error
            raise KernelError(f"a copy of {size} bytes failed on cuda:{device}: {error}") from error

    def _capturing(self, stream):
        try:
            return self.capturing(stream)
        except Exception as error:
            # Asking about the legacy stream while another captures is itself an error of capture.
            return "capture" in str(error).lower()

    def take_faults(self, device=None):
        """The faults recorded on ``device`` (all GPUs by default) since the last time, after
        waiting for it; clears them."""
        guarded = [m for m in modules.loaded() if m.kernel.guarded]
        return [
            fault
            for index in sorted({m.device for m in guarded})
            if device in (None, index)
            for fault in self._take_faults(index, [m for m in guarded if m.device == index])
        ]

    def _take_faults(self, index, guarded):
        runtime = arrays.import_cupy("raise_faults").cuda.runtime
        with arrays.import_cupy("raise_faults").cuda.Device(index) as current:
            current.synchronize()
            for loaded in guarded:
                raw = loaded.module.get_global(modules.FAULT_SYMBOL)
                record = FaultRecord()
                size = ctypes.sizeof(record)
                runtime.memcpy(
                    ctypes.addressof(record), raw.ptr, size, runtime.memcpyDeviceToHost
                )
                if record.taken:
                    runtime.memset(raw.ptr, 0, size)
                    runtime.deviceSynchronize()
                    yield record.fault(loaded.kernel, f"cuda:{index}")


class FaultRecord(ctypes.Structure):
    """`Fault` of paging.cuh."""

    _fields_ = [
        ("taken", ctypes.c_uint32),
        ("argument", ctypes.c_uint32),
        ("row", ctypes.c_int64),
        ("value", ctypes.c_int64),
        ("limit", ctypes.c_int64),
    ]

    def fault(self, kernel, device):
        argument = kernel.guarded[self.argument - 1]
        return Fault(kernel.op, argument, self.row, self.value, self.limit, device)


# What loads and launches. The tests put an emulator here that runs the same sources on the CPU.
driver = CudaDriver()

_host_faults = []


def record_host_fault(op, argument, row, value, limit):
    """Record a violation met by the CPU backend, first one of each operation wins."""
    if not any(f.op == op for f in _host_faults):
        _host_faults.append(Fault(op, argument, int(row), int(value), int(limit), "cpu"))
    if debug:
        raise_faults()


def raise_faults(device=None):
    """Raise if kernels met slots, block numbers or table entries outside their bounds.

    Waits for the device, reads the records and clears them. Such values are never dereferenced:
    they are skipped, and the first one that each kernel meets is recorded. ``CUPYCACHE_DEBUG=1``
    does this after every call.

    Parameters
    ----------
    device : int, optional
        Only this GPU; by default all GPUs used so far, and the CPU.

    Raises
    ------
    FaultError
        With the operation, the argument, the row, the value and the limit of each record.
    """
    faults = list(driver.take_faults(device))
    if device is None:
        faults += _host_faults
        _host_faults.clear()
    if faults:
        raise FaultError(faults)
