# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""CuPy, found when it is needed, and what the CUDA driver tells and does that CuPy has no binding
for."""

import contextlib
import ctypes
import functools
import os
from typing import NamedTuple

from ..errors import KernelError, MissingDependencyError
from .devices import CPU, Device


def import_cupy(why):
    """The cupy module, or `MissingDependencyError` saying what needs it."""
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            f"{why} needs CuPy 14.2 or newer, which could not be imported ({error}): "
            "pip install 'cupy-cache[cuda13x]' (or [cuda12x] for CUDA 12 drivers)"
        ) from error
    return cupy


@functools.cache
def _library():
    """The driver's library, initialised."""
    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    _check(library.cuInit(0), "cuInit")
    return library


def _check(status, what):
    if status:
        raise KernelError(f"{what} failed: CUDA error {status}")


@functools.cache
def _primary_context(index):
    """The context of GPU ``index`` that all frameworks share."""
    library, device, context = _library(), ctypes.c_int(), ctypes.c_void_p()
    _check(library.cuDeviceGet(ctypes.byref(device), index), f"cuDeviceGet({index})")
    status = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    _check(status, f"cuDevicePrimaryCtxRetain({index})")
    return context


class on_device:
    """Where this is entered, GPU ``index`` is current in this thread; afterwards what was before.

    CuPy's ``Device`` sets the GPU that was current again, and setting a GPU makes a context there,
    of half a gigabyte, also where nobody has used it. Pushing a context and popping it makes none.
    """

    __slots__ = ("_index", "_pushed")

    # A generator would take three times as long, and a swap enters this five times.
    def __init__(self, index):
        self._index, self._pushed = index, False

    def __enter__(self):
        get_device, get_context, set_device = _current()
        if get_device() == self._index:
            if not get_context():  # a thread that has not used CUDA yet
                set_device(self._index)
            return
        _check(_library().cuCtxPushCurrent_v2(_primary_context(self._index)), "cuCtxPushCurrent")
        self._pushed = True

    def __exit__(self, *error):
        if self._pushed:
            popped = ctypes.c_void_p()
            _check(_library().cuCtxPopCurrent_v2(ctypes.byref(popped)), "cuCtxPopCurrent")


@functools.cache
def _current():
    """What tells this thread's current GPU, its context, and sets the GPU."""
    cuda = import_cupy("a CUDA device").cuda
    return cuda.runtime.getDevice, cuda.driver.ctxGetCurrent, cuda.runtime.setDevice


@contextlib.contextmanager
def during_captures():
    """Where this is entered, the thread may ask what a capture of any thread would forbid."""
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    _library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        _library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@contextlib.contextmanager
def in_a_context():
    """Where this is entered, the thread has a context: the driver does not answer without one. Any
    GPU's will do, so one that is in use serves, and no GPU gets one that nobody else asked for."""
    cuda = import_cupy("a raw address").cuda
    if cuda.driver.ctxGetCurrent():
        yield
        return
    in_use = filter(_has_context, range(cuda.runtime.getDeviceCount()))
    with on_device(next(in_use, 0)):
        yield


def _has_context(index):
    """Whether GPU ``index`` has the context that all frameworks share."""
    library, device = _library(), ctypes.c_int()
    flags, active = ctypes.c_uint(), ctypes.c_int()
    _check(library.cuDeviceGet(ctypes.byref(device), index), f"cuDeviceGet({index})")
    status = library.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    _check(status, f"cuDevicePrimaryCtxGetState({index})")
    return bool(active.value)


def allocation_at(address):
    """The `Allocation` that holds ``address``; None where CUDA knows of none."""
    found = _PointerAttributes()
    with in_a_context():
        status = _library().cuPointerGetAttributes(
            len(found.IDS), found.IDS, found.places(), ctypes.c_uint64(address)
        )
    _check(status, f"asking for what is at {address:#x}")
    return found.allocation(address)


class Allocation(NamedTuple):
    """Memory that CUDA knows, ``start <= address < end``: on a GPU, or pinned where ``device`` is
    the CPU. A GPU reaches it at the address plus ``shift``. Where CUDA does not tell how much
    memory there is, both ends are the address that was asked for."""

    start: int
    end: int
    device: Device
    shift: int


class _PointerAttributes(ctypes.Structure):
    """What ``cuPointerGetAttributes`` tells, by the numbers of ``CUpointer_attribute``. CuPy has no
    binding that tells where an allocation ends."""

    _fields_ = [
        ("memory_type", ctypes.c_uint32),
        ("ordinal", ctypes.c_int32),
        ("device_pointer", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("size", ctypes.c_size_t),
    ]
    IDS = (ctypes.c_int * 5)(2, 9, 3, 11, 12)
    _HOST = 1

    def places(self):
        """The fields' addresses, in the order of the numbers."""
        at = ctypes.addressof(self)
        return _FivePointers(*(at + offset for offset in _OFFSETS))

    def allocation(self, address):
        """The `Allocation`, if there is one."""
        start, end = self.start, self.start + self.size
        if not start <= address < end:
            start = end = address
        if self.memory_type == self._HOST and self.device_pointer:
            return Allocation(start, end, CPU, self.device_pointer - address)
        if self.memory_type in (0, self._HOST):
            return None
        return Allocation(start, end, Device("cuda", self.ordinal), 0)


_FivePointers = ctypes.c_void_p * 5
_OFFSETS = tuple(
    getattr(_PointerAttributes, name).offset for name, _ in _PointerAttributes._fields_
)
