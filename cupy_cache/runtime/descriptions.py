# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Arrays without memory, on a GPU that does not exist, for `warmup`: a call with them is checked as
any other, and raises `launch.KernelNeeded` instead of launching."""

import itertools
import math

from . import arrays, devices

ABSENT_GPU = devices.Device("cuda", devices.NOWHERE)
# Far apart, aligned as an allocator's are, and above all addresses that callers give.
_addresses = itertools.count(1 << 60, 1 << 40)


class Described:
    """Shape, strides, dtype and device of an array. ``dtype`` is a `formats.DType` or any name."""

    def __init__(self, shape, strides, dtype, device=ABSENT_GPU, address=None):
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), dtype
        self.device, self.address = device, next(_addresses) if address is None else address

    def permuted(self, *axes):
        """The same memory with its dimensions in another order."""
        shape, strides = ([x[axis] for axis in axes] for x in (self.shape, self.strides))
        return type(self)(shape, strides, self.dtype, self.device, self.address)

    def split(self, size):
        """The first ``size`` and the other elements of the last dimension."""
        *outer, last = self.shape
        offset = size * self.dtype.bytes
        return tuple(
            type(self)((*outer, part), self.strides, self.dtype, self.device, self.address + start)
            for part, start in ((size, 0), (last - size, offset))
        )

    def dense(self):
        """An array of the same shape and order of dimensions without gaps."""
        strides, step = {}, self.dtype.bytes
        for axis in sorted(range(len(self.shape)), key=lambda axis: self.strides[axis]):
            strides[axis] = step
            step *= self.shape[axis]
        strides = [strides[axis] for axis in sorted(strides)]
        return type(self)(self.shape, strides, self.dtype, self.device)


def described(shape, dtype, device=ABSENT_GPU):
    """A contiguous `Described`."""
    strides = [dtype.bytes * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return Described(shape, strides, dtype, device)


def _read(array):
    place = arrays.Place("described", array.device, True)
    dtype = getattr(array.dtype, "name", array.dtype)
    return array.address, array.shape, array.strides, dtype, place, None


arrays.register_framework(
    "described",
    Described,
    arrays.Framework(
        _read, lambda index: 0, lambda device, shape, dtype: described(shape, dtype, device)
    ),
)
