# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Pinned host memory, and what CUDA knows of the memory at an address."""

import ctypes
import math
import struct
from typing import NamedTuple

import numpy as np

from . import cuda
from .devices import CPU, Device


def pinned(size):
    """``size`` bytes of CuPy's pool of pinned memory, as a NumPy array. They go back to the pool
    when the array is dropped."""
    allocate = cuda.import_cupy("pinned host memory").cuda.alloc_pinned_memory
    with cuda.in_a_context():
        memory = allocate(size)
    return np.frombuffer(memory, np.uint8, size)


def pinned_zeros(shape, dtype):
    """A NumPy array of zeros in pinned memory, allocated at its size: CuPy's pool would round that
    up to a power of two."""
    of_cupy, size = cuda.import_cupy("pinned host memory").cuda, math.prod(shape) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    with cuda.in_a_context():
        owner = cuda.freed_on_its_gpu(of_cupy.PinnedMemory)(size)
    memory = of_cupy.PinnedMemoryPointer(owner, 0)
    array = np.frombuffer(memory, np.uint8, size)
    array[...] = 0
    return array.view(dtype).reshape(shape)


def at(address):
    """The `Allocation` that holds ``address``; None where CUDA knows of none."""
    try:
        found = _free.pop()  # another thread must not fill the same
    except IndexError:
        found = _PointerAttributes()
    with cuda.in_a_context():
        status = cuda.library().cuPointerGetAttributes(
            len(found.IDS), found.IDS, found.places, ctypes.c_uint64(address)
        )
    if status:
        cuda.check(status, f"asking for what is at {address:#x}")
    allocation = found.allocation(address)
    _free.append(found)
    return allocation


_free: list = []


class Allocation(NamedTuple):
    """Memory that CUDA knows, ``start <= address < end``: on a GPU, or pinned where ``device`` is
    the CPU. A GPU reaches it at the address plus ``shift``. Where CUDA does not know its size, both
    ends are the address in question."""

    start: int
    end: int
    device: Device
    shift: int


class _PointerAttributes(ctypes.Structure):
    """The results of ``cuPointerGetAttributes``, by the numbers of ``CUpointer_attribute``. No
    binding of CuPy's gives the end of an allocation."""

    _fields_ = [
        ("memory_type", ctypes.c_uint32),
        ("ordinal", ctypes.c_int32),
        ("device_pointer", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("size", ctypes.c_size_t),
    ]
    IDS = (ctypes.c_int * 5)(2, 9, 3, 11, 12)
    _HOST = 1
    _UNPACK = struct.Struct("=IiQQQ").unpack_from

    def __init__(self):
        super().__init__()
        at = ctypes.addressof(self)
        # The fields' addresses, in the order of the numbers: made once, which takes a microsecond.
        self.places = _FivePointers(*[at + offset for offset in _OFFSETS])

    def allocation(self, address):
        """The `Allocation`, if there is one."""
        # Each field by its name would take as long as asking.
        memory_type, ordinal, device_pointer, start, size = self._UNPACK(self)
        end = start + size
        if not start <= address < end:
            start = end = address
        if memory_type == self._HOST and device_pointer:
            return Allocation(start, end, CPU, device_pointer - address)
        if memory_type in (0, self._HOST):
            return None
        return Allocation(start, end, Device("cuda", ordinal), 0)


_FivePointers = ctypes.c_void_p * 5
_OFFSETS = tuple(
    getattr(_PointerAttributes, name).offset for name, _ in _PointerAttributes._fields_
)
