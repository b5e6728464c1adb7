# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Reading arrays through DLPack and ``__cuda_array_interface__``.

CuPy's importer refuses fp8 and drops the read-only flag, so the capsule is read here. It is not
consumed: it stays the owner, and its destructor returns the tensor to the producer when the caller
drops it.

Layout of the structs: https://dmlc.github.io/dlpack/latest/c_api.html (DLPack 1.0).
"""

import contextlib
import ctypes
import math
import operator
import sys
from typing import NamedTuple

import numpy as np

from .. import errors
from . import driver

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
ON_GPU = CUDA, CUDA_MANAGED
MAJOR = 1  # version of the protocol
LARGEST = 2**64 - 1  # address
LOOK = -1  # in place of a stream: nothing will be enqueued
_READ_ONLY, _IS_COPIED = 1, 2  # flags


class Place(NamedTuple):
    """The location of an exported array, in DLPack's terms, and the package of its type."""

    device_type: int
    device_id: int
    read_only: bool
    framework: str


def device_of(array):
    """(Device type, device id) of an array, as integers, without exporting it."""
    kind, index = array.__dlpack_device__()
    return int(kind), int(index)


def read(array, stream=None):
    """The fields of `arrays.Metadata`; strides in elements, the dtype as DLPack's triple. The
    producer has ``stream`` wait for its own work, unless ``stream`` is `LOOK`."""
    kind, index = device_of(array)
    if kind in ON_GPU:
        # Producers refuse others than the current GPU, take streams to be of it, or go back to it,
        # which makes a context.
        with driver.active.on_device(index), _on_torchs_device(index):
            # 0 would be ambiguous in the protocol: 1 names the legacy default stream.
            capsule = _export(array, stream=int(stream or 1))
    else:
        capsule = _export(array)
    found = _parse(capsule, type(array).__module__.partition(".")[0])
    place = found[4]
    # Else its work would be ordered on another GPU's stream, or on none.
    if (place.device_type in ON_GPU or kind in ON_GPU) and (
        place.device_type not in ON_GPU or kind not in ON_GPU or place.device_id != index
    ):
        told, got = (kind, index), (place.device_type, place.device_id)
        raise ValueError(f"its __dlpack_device__ is {told}, and that of its export {got}")
    return found


def _on_torchs_device(index):
    """A context manager: inside, GPU ``index`` is torch's current one, too, if torch has used
    any."""
    of_torch = getattr(sys.modules.get("torch"), "cuda", None)
    if of_torch is not None and of_torch.is_initialized():
        return of_torch.device(index)
    return contextlib.nullcontext()


def _export(array, **options):
    try:
        return array.__dlpack__(max_version=(MAJOR, 0), **options)
    except TypeError:  # a producer from before DLPack 1.0
        return array.__dlpack__(**options)


def read_cuda_interface(array, stream=None):
    """The fields of `arrays.Metadata`; strides in bytes, the dtype NumPy's."""
    interface = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise ValueError("its __cuda_array_interface__ has a mask")
    ptr, read_only = interface["data"]
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        strides = contiguous_strides(shape, dtype.itemsize)
    ptr, shape, strides = _sound(ptr, shape, strides, dtype.itemsize)
    index = _gpu_at(ptr)
    producer = interface.get("stream")
    if producer is not None and not 0 <= operator.index(producer) <= LARGEST:
        raise ValueError(f"its stream is {producer}")
    if producer is not None and stream != LOOK:
        driver.active.order(producer, stream or 1, index)
    framework = type(array).__module__.partition(".")[0]
    place = Place(CUDA, index, bool(read_only), framework)
    return ptr, shape, strides, dtype, place, None


def interface_device(array):
    """The index of the GPU that an array with ``__cuda_array_interface__`` is on."""
    return _gpu_at(array.__cuda_array_interface__["data"][0])


def _gpu_at(address):
    index = driver.active.device_at(address)
    if index < 0:  # CUDA does not know this memory
        raise ValueError(f"its memory at {address:#x} is on no GPU")
    return index


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _ManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _parse(capsule, framework):
    read_only = False
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _ManagedTensorVersioned.from_address(
            _capsule_pointer(capsule, b"dltensor_versioned")
        )
        if managed.major != MAJOR:  # the fields may lie elsewhere
            raise ValueError(f"its DLPack version is {managed.major}.{managed.minor}, not {MAJOR}")
        tensor = managed.tensor
        read_only = bool(managed.flags & (_READ_ONLY | _IS_COPIED))
    else:
        tensor = _Tensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = (
        tuple(tensor.strides[: tensor.ndim]) if tensor.strides else contiguous_strides(shape, 1)
    )
    place = Place(tensor.device_type, tensor.device_id, read_only, framework)
    dtype = (tensor.code, tensor.bits, tensor.lanes)
    ptr = tensor.data + tensor.byte_offset if tensor.data else 0
    ptr, shape, strides = _sound(ptr, shape, strides, max(1, tensor.bits * tensor.lanes // 8))
    return ptr, shape, strides, dtype, place, capsule


def _sound(ptr, shape, strides, size):
    """Address, shape and strides as integers; `ValueError` where no array can have them. ``size``:
    the bytes of an element. Strides may be in elements or bytes."""
    ptr, shape, strides = operator.index(ptr), _integers(shape), _integers(strides)
    if len(strides) != len(shape):
        rank = errors.counted(len(shape), "dimension")
        raise ValueError(f"it has {errors.counted(len(strides), 'stride')} for {rank}")
    if min(shape, default=0) < 0:
        raise ValueError(f"its shape is {list(shape)}")
    span = sum([abs(step) * (n - 1) for n, step in zip(shape, strides) if n > 1])
    reach = 0 if 0 in shape else max(span, math.prod(shape)) * size
    if not 0 <= ptr <= LARGEST or reach >= 2**63:
        raise ValueError(
            f"shape {list(shape)} with strides {list(strides)} at {ptr} is no place in memory"
        )
    return ptr, shape, strides


def _integers(values):
    return tuple([operator.index(value) for value in values])


def contiguous_strides(shape, itemsize):
    """The strides of an array of this shape without gaps; extents of 0 count as 1."""
    strides, step = [], itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))
