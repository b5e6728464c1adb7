# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Launch shapes, and enqueueing: the only place that talks to the driver.

Shapes are whole warps, chosen from the work to do and the machine's multiprocessors. Enqueueing
fills a prepared record of the kernel's parameter struct and launches it on the caller's stream and
the array's device; it never synchronises and never allocates on the device.
"""

import contextlib
import ctypes
import functools
import os
import re

from ..errors import (
    CaptureError,
    DeviceError,
    Fault,
    FaultError,
    KernelError,
    MissingDependencyError,
    ShapeError,
)
from . import arrays, env, modules
from .allocations import PointerAttributes

WARP = 32
MAX_THREADS = 1024
MAX_THREADS_X = 2**32 - 1  # the kernels number them in 32 bits
MAX_GRID_YZ = 65535
# The index of a GPU that is not there: arrays on it are only described, launches raise `Noted`.
NOWHERE = -1

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


class FlatShape:
    """Launch shapes for ``rows * items`` independent work items, consecutive threads taking
    consecutive items. Called with the rows, it gives (grid, threads)."""

    __slots__ = ("device", "enough", "items", "most")

    def __init__(self, items, device, most):
        self.items, self.device, self.most = items, device, most
        self.enough = None  # items for which all blocks have the most threads

    def __call__(self, rows):
        items, threads = rows * self.items, self.most
        if self.enough is None:  # asked late: a plan can be made for a GPU that is not there
            self.enough = threads * processors(self.device)
        if items < self.enough:
            threads = block_threads(items, processors(self.device), threads)
        return (-(-items // threads), 1, 1), threads


@functools.lru_cache(maxsize=64)
def processors(device):
    """How many multiprocessors GPU ``device`` has."""
    return 1 if device == NOWHERE else driver.processors(device)


class Noted(Exception):
    """A launch on the GPU that is not there: ``kernel`` is the one that it needs."""

    def __init__(self, kernel):
        super().__init__(kernel)
        self.kernel = kernel


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
        if self.has_work(grid, threads):
            if self._loaded is None:
                self._load(stream)
            # One in use by a thread must not be repacked by another: each takes one and puts it
            # back. The driver copies it before launching returns.
            try:
                record = self._free.pop()
            except IndexError:
                record = self._new_record()
            self._pack(record.buffer, 0, *values)
            if tail:
                ctypes.memmove(record.tail, tail, len(tail))
            driver.launch(self._loaded, grid, threads, stream, record)
            self._free.append(record)
            if debug:
                raise_faults(self.device)

    def has_work(self, grid, threads):
        """Whether there is anything to launch; raises where it is more than one launch takes."""
        x, y, z = grid
        if x * threads > MAX_THREADS_X or y > MAX_GRID_YZ or z > MAX_GRID_YZ:
            raise ShapeError(
                f"{self.kernel.op}: the work needs a grid of {x} x {y} x {z} blocks of {threads} "
                "threads, more than one launch can take; split the call"
            )
        return bool(x and y and z)

    def parts(self, grid, threads, values):
        """What `enqueue` does once the kernel is loaded, for callers that write a record's
        ``words`` themselves: (launch, the errors at which to call the next: in a thread without a
        context, or with another GPU's; the same for any thread; a maker of records that hold
        ``values``; device)."""

        def new():
            record = self._new_record()
            self._pack(record.buffer, 0, *values)
            record.words = memoryview(record.buffer).cast("B").cast("Q")
            return record

        launch, failed = driver.prepare(self._loaded, grid, threads)
        slowly = functools.partial(driver.launch, self._loaded, grid, threads)
        return launch, failed, slowly, new, self.device

    def _load(self, stream):
        if self.device == NOWHERE:
            raise Noted(self.kernel)
        self._loaded = driver.load(self.kernel, self.device, stream)

    def _new_record(self):
        return _Record(self._template, self.kernel.params.tail_at)


class _Record:
    """A parameter struct's bytes and the array of one pointer that the driver wants. ``words`` are
    the bytes by eights, where somebody made them."""

    __slots__ = ("_pointers", "address", "buffer", "tail", "words")

    def __init__(self, template, tail_at):
        self.buffer = ctypes.create_string_buffer(template, len(template))
        self.tail = ctypes.addressof(self.buffer) + tail_at
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._pointers)


_UNPINNED = "host memory that is not pinned cannot be copied while a CUDA graph is captured: pin it"


class _AnotherGPU(Exception):
    """The current GPU is not that of the launch."""


class CudaDriver:
    """Loading and launching through CuPy."""

    def __init__(self):
        self._launch = self._attributes = None

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
                self.launch(loaded, grid, threads, stream, record)
            return
        # The driver binding takes the prepared pointer array as it is: 4.0 to 4.5 us, against 5.1
        # for RawKernel.__call__ with a struct (and 7 to 8 with loose arguments).
        try:
            self._launch(loaded.handle, *grid, threads, 1, 1, 0, stream, record.address, 0)
        except self._driver_error as error:
            # A thread that never touched CUDA has no context yet: make one, try again.
            if "INVALID_CONTEXT" not in str(error):
                raise KernelError(f"{loaded!r} could not be launched: {error}") from error
            arrays.import_cupy("a launch").cuda.runtime.setDevice(loaded.device)
            self._launch(loaded.handle, *grid, threads, 1, 1, 0, stream, record.address, 0)

    def prepare(self, loaded, grid, threads):
        """`launch` for these, in 0.6 us less, as a function of the stream, the record's address and
        0; and the errors at which `launch` itself must be called."""
        if self._launch is None:
            self._find_entries()
        entry = functools.partial(self._launch, loaded.handle, *grid, threads, 1, 1, 0)
        if self.device_count() == 1:
            return entry, self._driver_error
        current_device, device = self._current_device, loaded.device

        def entry_on_device(stream, address, zero):
            if current_device() != device:
                raise _AnotherGPU
            entry(stream, address, zero)

        return entry_on_device, (self._driver_error, _AnotherGPU)

    def _find_entries(self):
        from cupy_backends.cuda.api import driver as binding

        cupy = arrays.import_cupy("a launch")
        self._current_device = cupy.cuda.runtime.getDevice
        self._driver_error = binding.CUDADriverError
        self._launch = binding.launchKernel

    def device_count(self):
        """How many GPUs there are; `MissingDependencyError` without CuPy."""
        cupy = arrays.import_cupy("a CUDA device")
        return cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0

    def current_device(self):
        return arrays.import_cupy("a CUDA device").cuda.runtime.getDevice()

    def processors(self, device):
        cupy = arrays.import_cupy(f"cuda:{device}")
        return cupy.cuda.Device(device).attributes["MultiProcessorCount"]

    def current_stream(self, framework, device):
        """The current stream of a framework on an `arrays.Device`, where no array on it tells."""
        return arrays.current_stream_of(arrays.Array(0, (), (), None, device, True, framework))()

    def capturing(self, stream):
        """Whether ``stream`` is being captured into a CUDA graph."""
        cupy = arrays.import_cupy("a stream")
        return bool(cupy.cuda.runtime.streamIsCapturing(stream)) if stream else False

    def mark(self, stream, device):
        """A `Mark` behind everything enqueued so far on ``stream`` of GPU ``device``."""
        return Mark(stream, device)

    def mapped_address(self, address, device):
        """The address at which GPU ``device`` reaches this host memory; None if not pinned."""
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
                raise CaptureError(f"{_UNPINNED} ({error})") from error
            raise KernelError(f"a copy of {size} bytes failed on cuda:{device}: {error}") from error

    @contextlib.contextmanager
    def staging(self, size, stream, device):
        """The address of ``size`` bytes on GPU ``device`` for the work enqueued on ``stream`` while
        this is entered: they are freed behind it, in the stream's order."""
        cuda = arrays.import_cupy("a copy").cuda
        if self._capturing(stream):
            raise CaptureError(_UNPINNED)
        with cuda.Device(device):
            try:
                address = cuda.runtime.mallocAsync(size, stream)
            except cuda.runtime.CUDARuntimeError as error:
                raise KernelError(
                    f"no {size} bytes for staging on cuda:{device}: {error}"
                ) from error
        try:
            yield address
        finally:
            with cuda.Device(device):
                cuda.runtime.freeAsync(address, stream)

    def allocation(self, address):
        """The `Allocation` that holds ``address``; None where CUDA knows of none."""
        if self._attributes is None:
            runtime = arrays.import_cupy("a raw address").cuda.runtime
            runtime.setDevice(runtime.getDevice())  # asking needs a context
            library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
            self._attributes = library.cuPointerGetAttributes
        found = PointerAttributes()
        status = self._attributes(
            len(found.IDS), found.IDS, found.places(), ctypes.c_uint64(address)
        )
        if status:
            raise KernelError(f"CUDA could not tell what is at {address:#x}: error {status}")
        return found.allocation(address)

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
                runtime.memcpy(ctypes.addressof(record), raw.ptr, size, runtime.memcpyDeviceToHost)
                if record.taken:
                    runtime.memset(raw.ptr, 0, size)
                    runtime.deviceSynchronize()
                    yield record.fault(loaded.kernel, f"cuda:{index}")


class Mark:
    """A point in a stream's work. Not for a stream that is being captured."""

    def __init__(self, stream, device):
        cuda = arrays.import_cupy("a stream").cuda
        self._runtime = cuda.runtime
        with cuda.Device(device):
            self._event = cuda.Event(disable_timing=True)
            self._runtime.eventRecord(self._event.ptr, stream)

    def reached(self):
        """Whether the GPU has got there."""
        return self._event.done

    def hold(self, stream):
        """Make what is enqueued on ``stream`` from now on wait for it, without waiting here."""
        self._runtime.streamWaitEvent(stream, self._event.ptr)


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
        op, argument = kernel.guarded[self.argument - 1]
        return Fault(op, argument, self.row, self.value, self.limit, device)


# What loads and launches. The tests put an emulator here that runs the same sources on the CPU.
driver = CudaDriver()


def device_named(device, name):
    """``device`` as an `arrays.Device` that exists.

    An index of a GPU, "cpu", "cuda", "cuda:1", or torch's or CuPy's device object. "cuda" and None
    mean the current GPU; None where there is no GPU, or no CuPy, means the CPU. ``name`` is the
    argument's, for errors.
    """
    if device is None:
        try:
            if not driver.device_count():
                return arrays.CPU
        except MissingDependencyError:
            return arrays.CPU
        device = "cuda"
    # A CuPy device has its index in id; torch's is spelled "cuda:1".
    index = device if type(device) is int else getattr(device, "id", None)
    text = str(device) if index is None else f"cuda:{index}"
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", text)
    if found is None:
        raise DeviceError(
            f"Invalid value of {name}: expected a GPU's index, 'cpu', 'cuda', 'cuda:N' or a device "
            f"of torch or CuPy, got {device!r}"
        )
    if found[1] == "cpu":
        return arrays.CPU
    count = driver.device_count()
    index = int(found[2] or driver.current_device()) if count else 0
    if index >= count:
        there = f"a GPU below {count}" if count else "cpu, since CuPy sees no CUDA GPU"
        raise DeviceError(f"Invalid value of {name}: expected {there}, got {device!r}")
    return arrays.Device("cuda", index)


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
