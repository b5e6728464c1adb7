# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The GPUs: loading kernels, launches, copies, events. Everything is enqueued through here."""

import contextlib
import ctypes
import functools
import operator
import re
import sys

import numpy as np

from .. import errors
from ..errors import CaptureError, DeviceError, KernelError, MissingDependencyError
from . import allocations, cuda, formats, locks, modules, overlap
from .devices import CPU, Device

# The default stream that waits for all others. It is never captured.
_LEGACY = (0, 1)

# cudaDevAttrComputeCapabilityMajor and Minor, for which CuPy has no names.
_CAPABILITY = (75, 76)

_UNPINNED = "host memory that is not pinned cannot be copied while a CUDA graph is captured; pin it"


# The driver's statuses (CUresult), and their usual causes.
_NOT_INITIALIZED, _INVALID_CONTEXT = 3, 201
_RESET = (
    "if the device was reset, the kernels loaded before are gone, and all arrays: start a new "
    "process"
)
_MEANINGS = {
    _NOT_INITIALIZED: cuda.FORKED,
    4: _RESET,  # CUDA_ERROR_DEINITIALIZED
    _INVALID_CONTEXT: _RESET,
    400: _RESET,  # CUDA_ERROR_INVALID_HANDLE
    709: _RESET,  # CUDA_ERROR_CONTEXT_IS_DESTROYED
    700: "a kernel, of this library or another, has read or written at an address that is not "
    "mapped, and the process's CUDA context is lost: CUDA_LAUNCH_BLOCKING=1 shows which",
}


def _not_launched(loaded, error):
    """The error of a launch that the driver refused."""
    meaning = _MEANINGS.get(error.status)
    return KernelError(
        f"{loaded.kernel.op} on cuda:{loaded.device}: {loaded.kernel!r} could not be launched: "
        f"{error}{'' if meaning is None else f'; {meaning}'}"
    )


_taking = locks.Lock()


class _AnotherGPU(Exception):
    """The current GPU is not that of the launch."""


class CudaDriver:
    """CUDA, through CuPy. The tests have another driver, which runs kernels on the CPU."""

    def __init__(self):
        self._launch = None
        self._overlaps = {}  # {GPU: whether launches may overlap there}

    @property  # cached, it would have a lock on Python 3.11, which stays locked in a forked child
    def _runtime(self):
        return cuda.import_cupy("a CUDA device").cuda.runtime

    # --- kernels

    def load(self, kernel, device, stream):
        """The kernel on the device; a failure during a graph capture names ``warmup``."""
        try:
            return modules.load(kernel, device)
        except KernelError as error:
            if self._capture_is_in_the_way(stream, device):
                raise CaptureError(
                    f"{kernel.op} on cuda:{device}: {kernel!r} was met for the first time while a "
                    f"CUDA graph is captured, and could not be loaded there: {error}; call "
                    "warmup() for this shape before"
                ) from error
            raise

    def launch(self, loaded, grid, threads, stream, record):
        """Enqueue on ``stream`` of the kernel's device, whatever device is current."""
        if self._launch is None:
            self._find_entries()
        if self._several and self._current_device() != loaded.device:
            try:
                with cuda.on_device(loaded.device):
                    self._enqueue(loaded, grid, threads, stream, record)
            except self._driver_error as error:
                raise _not_launched(loaded, error) from error
            return
        try:
            if overlap.on:
                self._enqueue(loaded, grid, threads, stream, record)
            else:  # `_enqueue`, inlined
                shared = loaded.kernel.shared_bytes
                self._launch(loaded.handle, *grid, threads, 1, 1, shared, stream, record.address, 0)
        except self._driver_error as error:
            if error.status != _INVALID_CONTEXT:
                raise _not_launched(loaded, error) from error
            # A thread that never touched CUDA has no context yet: make one, try again.
            try:
                with cuda.on_device(loaded.device):
                    self._enqueue(loaded, grid, threads, stream, record)
            except self._driver_error as again:
                raise _not_launched(loaded, again) from again

    def _enqueue(self, loaded, grid, threads, stream, record):
        refused, shared = False, loaded.kernel.shared_bytes
        if overlap.on and self._may_overlap(loaded.device):
            try:
                overlap.prepare(loaded.handle, grid, threads, shared)(stream, record.address, 0)
                return
            except overlap.Refused as error:  # an ordinary launch works, or raises the cause
                refused = error.status != _INVALID_CONTEXT
        # The driver binding takes the prepared pointer array as it is: 4.0 to 4.5 us, against 5.1
        # for RawKernel.__call__ with a struct (and 7 to 8 with loose arguments).
        self._launch(loaded.handle, *grid, threads, 1, 1, shared, stream, record.address, 0)
        if refused:
            self._overlaps[loaded.device] = False
            overlap.forget_prepared()

    def _may_overlap(self, device):
        """Whether launches may overlap on a GPU."""
        known = self._overlaps.get(device)
        if known is None:
            known = self._overlaps[device] = overlap.available(self.capability(device))
        return known

    def prepare(self, loaded, grid, threads):
        """(``enqueue(stream, record's address, 0)``, errors): a launch that takes 0.6 us less than
        `launch`, and the errors at which `launch` must be called instead."""
        if self._launch is None:
            self._find_entries()
        shared = loaded.kernel.shared_bytes
        entry = functools.partial(self._launch, loaded.handle, *grid, threads, 1, 1, shared)
        failed = (self._driver_error,)
        if overlap.on and self._may_overlap(loaded.device):
            entry = overlap.prepare(loaded.handle, grid, threads, shared)
            failed = (overlap.Refused,)
        if not self._several:
            return entry, failed
        current_device, device = self._current_device, loaded.device

        def entry_on_device(stream, address, zero):
            if current_device() != device:
                raise _AnotherGPU
            entry(stream, address, zero)

        return entry_on_device, (*failed, _AnotherGPU)

    def _find_entries(self):
        from cupy_backends.cuda.api import driver as binding

        cupy = cuda.import_cupy("a launch")
        self._current_device = cupy.cuda.runtime.getDevice
        self._driver_error = binding.CUDADriverError
        self._several = self.device_count() > 1
        self._launch = binding.launchKernel

    # --- devices and memory

    def device_count(self):
        """How many GPUs there are; `MissingDependencyError` without CuPy."""
        cupy = cuda.find_cupy("a CUDA device")
        return cupy.cuda.runtime.getDeviceCount() if cupy.cuda.is_available() else 0

    def current_device(self):
        """The index of this thread's current GPU."""
        return self._runtime.getDevice()

    def on_device(self, device):
        """A context manager, to be entered at once: inside, GPU ``device`` is current."""
        return cuda.on_device(device)

    def processors(self, device):
        """How many multiprocessors a GPU has."""
        cupy = cuda.import_cupy(f"cuda:{device}")
        return cupy.cuda.Device(device).attributes["MultiProcessorCount"]

    def capability(self, device):
        """The compute capability of a GPU, such as 90."""
        # CuPy's ``Device.compute_capability`` makes a context on the GPU that is current.
        get = cuda.import_cupy(f"cuda:{device}").cuda.runtime.deviceGetAttribute
        major, minor = (get(attribute, device) for attribute in _CAPABILITY)
        return 10 * major + minor

    def has_clusters(self, device):
        """Whether thread blocks of a GPU can read each other's shared memory."""
        return self.capability(device) >= 90

    def has_warpgroups(self, device):
        """Whether a GPU has the matrix instructions of warpgroups (wgmma). Newer GPUs have others
        instead."""
        return self.capability(device) == 90

    def shared_memory(self, device):
        """Bytes of shared memory that a thread block of a GPU can have."""
        cupy = cuda.import_cupy(f"cuda:{device}")
        return cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]

    def device_at(self, address):
        """The index of the GPU whose memory is at ``address``; the current one's for null."""
        runtime = cuda.import_cupy("an array with __cuda_array_interface__").cuda.runtime
        if not address:
            return runtime.getDevice()
        with cuda.in_a_context():
            return runtime.pointerGetAttributes(address).device

    def allocation(self, address):
        """The `allocations.Allocation` that holds ``address``; None where CUDA knows of none."""
        return allocations.at(address)

    # --- streams

    def current_stream(self, device):
        """The address of CuPy's current stream on a GPU."""
        return cuda.import_cupy(f"cuda:{device}").cuda.get_current_stream(device).ptr

    def new_stream(self, device):
        """A new stream object of CuPy on GPU ``device``, which does not wait for the default
        stream."""
        with cuda.on_device(device):
            kind = cuda.freed_on_its_gpu(cuda.import_cupy("a stream").cuda.Stream)
            return kind(non_blocking=True)

    def capturing(self, stream, device):
        """Whether ``stream`` of GPU ``device`` is being captured into a CUDA graph."""
        if stream in _LEGACY:
            return False
        with cuda.on_device(device):
            return bool(self._runtime.streamIsCapturing(stream))

    def capture(self, stream, device):
        """The unique number of the capture of ``stream`` of GPU ``device``; 0 where there is
        none."""
        with cuda.on_device(device):
            return cuda.capture_of(stream)

    def _capture_is_in_the_way(self, stream, device):
        """Whether ``stream``, or a stream that it would wait for, is being captured."""
        with cuda.on_device(device):
            try:
                return bool(self._runtime.streamIsCapturing(stream))
            except Exception as error:
                return "capture" in str(error).lower()

    def event(self, stream, device):
        """An `Event` behind everything enqueued so far on ``stream`` of GPU ``device``."""
        return Event(stream, device)

    def order(self, before, after, device):
        """Have stream ``after`` wait, from now on, for the work now on stream ``before``, both of
        GPU ``device``. Does nothing if either is being captured."""
        if before == after or self.capturing(before, device) or self.capturing(after, device):
            return
        self.event(before, device).hold(after)

    # --- copies

    def copy(self, destination, source, size, stream, device):
        """Enqueue a copy by the driver; a copy engine does it if the host memory is pinned."""
        runtime = cuda.import_cupy("a copy").cuda.runtime
        try:
            with cuda.on_device(device):
                runtime.memcpyAsync(destination, source, size, runtime.memcpyDefault, stream)
        except runtime.CUDARuntimeError as error:
            if self._capture_is_in_the_way(stream, device):
                raise CaptureError(f"a copy on cuda:{device}: {_UNPINNED} ({error})") from error
            raise KernelError(
                f"a copy on cuda:{device}: {errors.counted(size, 'byte')} could not be "
                f"copied: {error}"
            ) from error

    def staging(self, size, stream, device):
        """`_memory`; `CaptureError` where ``stream`` is being captured."""
        if self._capture_is_in_the_way(stream, device):
            raise CaptureError(f"a copy on cuda:{device}: {_UNPINNED}")
        return self._memory("staging memory", size, stream, device)

    @contextlib.contextmanager
    def scratch(self, size, stream, device):
        """`_memory`, from CuPy's memory pool if ``stream`` is CuPy's current stream and not being
        captured. In a capture it belongs to the graph."""
        cupy = cuda.import_cupy("scratch memory")
        with cuda.on_device(device):
            # The pool gives freed memory again to the same stream only.
            if stream == self.current_stream(device) and not self.capturing(stream, device):
                memory = cupy.cuda.alloc(size)
                yield memory.ptr
                return
        with self._memory("scratch memory", size, stream, device) as address:
            yield address

    @contextlib.contextmanager
    def _memory(self, what, size, stream, device):
        """The address of ``size`` bytes on GPU ``device``, for the work enqueued on ``stream``
        while this is entered. They are freed behind that work, in the stream's order."""
        runtime = cuda.import_cupy(what).cuda.runtime
        with cuda.on_device(device):
            try:
                address = runtime.mallocAsync(size, stream)
            except runtime.CUDARuntimeError as error:
                raise KernelError(f"{what} on cuda:{device}: no {size} bytes: {error}") from error
        try:
            yield address
        finally:
            with cuda.on_device(device):
                runtime.freeAsync(address, stream)

    # --- faults

    def take_faults(self, device=None, stream=None):
        """Wait for ``device``, by default for all GPUs, and take the faults recorded since the last
        time: they are cleared. With ``stream``, one of that GPU that is not being captured, wait
        for that alone: this is allowed while others are captured."""
        guarded = [m for m in modules.loaded() if m.kernel.guarded]
        return [
            fault
            for index in sorted({m.device for m in guarded})
            if device in (None, index)
            for fault in self._faults_on(index, [m for m in guarded if m.device == index], stream)
        ]

    def _faults_on(self, index, guarded, stream):
        runtime = cuda.import_cupy("raise_faults").cuda.runtime
        try:
            if stream is None:
                return self._take_faults(index, guarded, runtime, 0, runtime.deviceSynchronize)
            wait = functools.partial(runtime.streamSynchronize, stream)
            with cuda.on_device(index), cuda.during_captures():
                return self._take_faults(index, guarded, runtime, stream, wait)
        except Exception as error:  # CUDA's, of the runtime or of the driver
            if not hasattr(error, "status"):
                raise
            meaning = _MEANINGS.get(error.status)
            raise KernelError(
                f"raise_faults on cuda:{index}: the records could not be read: {error}"
                f"{'' if meaning is None else f'; {meaning}'}"
            ) from error

    def _take_faults(self, index, guarded, runtime, stream, wait):
        taken = []
        # One thread at a time: a second one could clear a record made after the first one's read.
        with _taking, cuda.on_device(index):
            wait()
            for loaded in guarded:
                address = loaded.module.get_global(modules.FAULT_SYMBOL).ptr
                if not self._fault_at(address, runtime, stream, wait).is_published:
                    continue  # none, or one that another thread's kernel is still filling in
                # Again: the first read may have seen half of it.
                record = self._fault_at(address, runtime, stream, wait)
                # Clear the first word alone: a kernel may fill in the others at once.
                runtime.memsetAsync(address, 0, ctypes.sizeof(ctypes.c_uint32), stream)
                wait()
                taken.append(record.fault(loaded.kernel, f"cuda:{index}"))
        return taken

    def _fault_at(self, address, runtime, stream, wait):
        record = modules.FaultRecord()
        at, size = ctypes.addressof(record), ctypes.sizeof(record)
        runtime.memcpyAsync(at, address, size, runtime.memcpyDeviceToHost, stream)
        wait()
        return record


class Event:
    """A point in the work of a stream of GPU ``device``. Not for a stream that is being captured.

    Each method makes that GPU current: a default stream is the current GPU's, and a thread that has
    no current GPU would get a context on the first one.
    """

    _event = None

    def __init__(self, stream, device):
        self._runtime, self._device = cuda.import_cupy("a stream").cuda.runtime, device
        with cuda.on_device(device):
            self._event = self._runtime.eventCreateWithFlags(self._runtime.eventDisableTiming)
            self._runtime.eventRecord(self._event, stream)

    def move(self, stream):
        """Move behind everything enqueued so far on ``stream``, of the same GPU. That takes a third
        of the time of a new event."""
        with cuda.on_device(self._device):
            self._runtime.eventRecord(self._event, stream)

    def __del__(self):
        if self._event is not None:
            cuda.free_on(self._device, self._runtime.eventDestroy, self._event)

    def done(self):
        """Whether the GPU has reached it."""
        with cuda.on_device(self._device), cuda.during_captures():
            return self._runtime.eventQuery(self._event) == 0

    def wait(self):
        """Wait until the GPU has reached it."""
        with cuda.on_device(self._device):
            self._runtime.eventSynchronize(self._event)

    def hold(self, stream):
        """Have ``stream``, of the same GPU, wait for it from now on. Does not wait here."""
        with cuda.on_device(self._device):
            self._runtime.streamWaitEvent(stream, self._event)


# The driver in use. The tests put an emulator here, which runs the same sources on the CPU.
active = CudaDriver()


def gpus():
    """How many GPUs there are; none where there is no CuPy."""
    try:
        return active.device_count()
    except MissingDependencyError:
        return 0


def way_to_a_gpu():
    """The way out where a GPU is needed, for errors: why there is none, and what to do."""
    return "" if gpus() else "; ".join(filter(None, cuda.no_gpu()))


def device_named(device, name, framework=None):
    """``device`` as a `Device` that exists.

    An index of a GPU, "cpu", "cuda", "cuda:1", or torch's or CuPy's device object. "cuda" and None
    mean the current GPU, torch's where the device object or ``framework`` is; None where there is
    no GPU, or no CuPy, means the CPU. ``name``: "operation: argument", for errors.
    """
    if device is None:
        device = "cuda" if gpus() else "cpu"
    found = re.fullmatch(r"(cpu|cuda)(?::([0-9]+))?", _spelled(device))
    if found is None:
        expected = "a GPU's index, 'cpu', 'cuda', 'cuda:N' or a device of torch or CuPy"
        raise errors.wrong("value", name, expected, errors.shown(device), error=DeviceError)
    if found[1] == "cpu":
        return CPU
    try:
        count = active.device_count()
    except MissingDependencyError as error:  # it says only what is missing
        why = str(error).partition(": ")[2]
        raise MissingDependencyError(f"{name} {errors.shown(device)}: {why}") from error
    index = int(found[2] or _current_device(device, framework)) if count else 0
    if index >= count:
        there, way_out = f"a GPU below {count}", ""
        if not count:
            why, way_out = cuda.no_gpu()
            there = f"cpu, since {why}"
        raise errors.wrong("value", name, there, errors.shown(device), way_out, error=DeviceError)
    return Device("cuda", index)


def _current_device(device, framework):
    """The current GPU. CUDA's may be another than torch's, which has told CUDA nothing yet where it
    went back to a GPU without a context."""
    if framework == "torch" or _package(device) == "torch":
        of_torch = sys.modules["torch"].cuda
        if of_torch.is_available():
            return of_torch.current_device()
    return active.current_device()


def _package(value):
    """The package of an object's type."""
    return str(type(value).__module__).partition(".")[0]


def _spelled(device):
    """A device in any of its forms as text, such as "cuda:1"; "" for anything else."""
    text = formats.text_of(device)
    if text is not None:
        return text
    package = _package(device)
    try:
        if package == "torch":
            return str(device)
        if package == "cupy":
            device = getattr(device, "id", "")
        elif type(device) in (bool, np.bool_):
            return ""
        return f"cuda:{operator.index(device)}"
    except Exception:  # it is no device
        return ""
