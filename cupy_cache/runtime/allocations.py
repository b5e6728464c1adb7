# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What CUDA knows of the memory at an address."""

import ctypes
from typing import NamedTuple

from . import arrays


class Allocation(NamedTuple):
    """Memory that CUDA knows, ``start <= address < end``: on a GPU, or pinned where ``device`` is
    the CPU. A GPU reaches it at the address plus ``shift``. Where CUDA does not tell how much
    memory there is, both ends are the address that was asked for."""

    start: int
    end: int
    device: arrays.Device
    shift: int


class PointerAttributes(ctypes.Structure):
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
        offsets = (getattr(type(self), name).offset for name, _ in self._fields_)
        return (ctypes.c_void_p * 5)(*(at + offset for offset in offsets))

    def allocation(self, address):
        """The `Allocation`, if there is one."""
        start, end = self.start, self.start + self.size
        if not start <= address < end:
            start = end = address
        if self.memory_type == self._HOST and self.device_pointer:
            return Allocation(start, end, arrays.CPU, self.device_pointer - address)
        if self.memory_type in (0, self._HOST):
            return None
        return Allocation(start, end, arrays.Device("cuda", self.ordinal), 0)
