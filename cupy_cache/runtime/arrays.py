# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Any framework's array -> pointer, shape, strides, dtype, device, whether it can be written.

Two steps, because one of them runs on every call:

* a *reader* (`reader_for`) tells an array's `Facts` in the framework's own terms, as cheaply as
  that framework allows; facts without the pointer are hashable and make a plan's signature;
* `describe` turns facts into an `Array`, once per signature.

torch, CuPy and NumPy arrays are read through their attributes (a few tenths of a microsecond each,
against 19 for ``cupy.from_dlpack``). Everything else comes through DLPack, whose capsule is read
here: CuPy's importer refuses fp8 and forgets the read-only flag. Nothing is ever copied.
"""

import ctypes
import functools
import sys
from typing import NamedTuple

import numpy as np

from ..errors import DeviceError, DTypeError, MissingDependencyError, NotWritableError
from . import formats


class Device(NamedTuple):
    """Where memory is: kind is "cpu" or "cuda"."""

    kind: str
    index: int

    def __str__(self):
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


CPU = Device("cpu", 0)


class Facts(NamedTuple):
    """What a reader tells, in the framework's own units; see `describe`."""

    ptr: int
    shape: tuple
    strides: tuple
    dtype: object
    place: object
    keep: object = None


class Array(NamedTuple):
    """An array in this library's terms: strides in bytes, dtype a `formats.DType`."""

    ptr: int
    shape: tuple
    strides: tuple
    dtype: formats.DType
    device: Device
    writable: bool
    framework: str

    @property
    def alignment(self):
        """The largest power of two, at most 16, that divides the address."""
        return (self.ptr | 16) & -(self.ptr | 16)


class Place(NamedTuple):
    """Where an array of a registered framework is; see `register_framework`."""

    framework: str
    device: Device
    writable: bool


class Framework(NamedTuple):
    """What a further framework with arrays on a GPU brings along.

    read : ``read(array)`` -> `Facts` fields: tuples, strides in bytes, a dtype's name, a `Place`.
    current_stream : ``current_stream(device index)`` -> the address of its current stream.
    empty : ``empty(device, shape, dtype)`` -> an uninitialised, contiguous array.
    """

    read: object
    current_stream: object
    empty: object


_FRAMEWORKS = {}


# --- readers ------------------------------------------------------------------------------------


def _read_torch(tensor):
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, None


def all_torch(readers):
    """Whether `torch_tensors.read` can do the work of all these readers."""
    return all(reader is _read_torch for reader in readers)


def _read_cupy(array):
    data = array.data
    return data.ptr, array.shape, array.strides, array.dtype, data.device_id, None


def _read_numpy(array):
    writable = array.flags.writeable
    place = "numpy, writable" if writable else "numpy, read-only"
    return array.ctypes.data, array.shape, array.strides, array.dtype, place, None


class _DLPackPlace(NamedTuple):
    device_type: int
    device_id: int
    read_only: bool
    framework: str


def _read_dlpack(array, stream=None):
    kind, _ = array.__dlpack_device__()
    options = {}
    if int(kind) in (_DL_CUDA, _DL_CUDA_MANAGED):
        # 0 would be ambiguous in the protocol: 1 names the legacy default stream.
        options["stream"] = stream or 1
    framework = type(array).__module__.partition(".")[0]
    try:
        capsule = array.__dlpack__(max_version=(1, 0), **options)
    except TypeError:  # a producer from before DLPack 1.0
        capsule = array.__dlpack__(**options)
    return _parse_capsule(capsule, framework)


def _read_cuda_interface(array, stream=None):
    interface = array.__cuda_array_interface__
    ptr, read_only = interface["data"]
    dtype = np.dtype(interface["typestr"])
    shape = tuple(interface["shape"])
    strides = interface.get("strides")
    if strides is None:
        strides = _contiguous(shape, dtype.itemsize)
    _wait_for(interface.get("stream"), stream)
    index = _pointer_device(ptr)
    framework = type(array).__module__.partition(".")[0]
    place = _DLPackPlace(_DL_CUDA, index, bool(read_only), framework)
    return ptr, shape, tuple(strides), dtype, place, None


_READERS = {np.ndarray: _read_numpy}
# Readers that must know the stream the data will be used on.
FOREIGN = (_read_dlpack, _read_cuda_interface)


def reader_for(value, name):
    """The reader for ``value``'s type, remembered; ``name`` is the argument's, for the error."""
    kind = type(value)
    reader = _READERS.get(kind)
    if reader is None:
        reader = _READERS[kind] = _find_reader(value, name)
    return reader


def register_framework(name, kind, framework):
    """Serve arrays of type ``kind`` as ``framework`` (a `Framework` called ``name``) says."""
    _READERS[kind] = framework.read
    _FRAMEWORKS[name] = framework


def _find_reader(value, name):
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _read_torch
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(value, cupy.ndarray):
        return _read_cupy
    if isinstance(value, np.ndarray):
        return _read_numpy
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return _read_dlpack
    if hasattr(value, "__cuda_array_interface__"):
        return _read_cuda_interface
    raise DTypeError(
        f"Invalid type of {name}: expected an array (torch, CuPy, NumPy, or anything with "
        f"__dlpack__ or __cuda_array_interface__), got {type(value).__name__}"
    )


def is_foreign(value, name):
    """Whether ``value`` is read through a protocol, which must know the stream."""
    return reader_for(value, name) in FOREIGN


def read(value, name, stream=None):
    """``value``'s `Facts`."""
    reader = reader_for(value, name)
    return Facts(*(reader(value, stream) if reader in FOREIGN else reader(value)))


def describe(facts, name):
    """Turn `Facts` into an `Array`; ``name`` is the argument's, for errors."""
    place = facts.place
    if isinstance(place, _DLPackPlace):
        dtype = facts.dtype
        if isinstance(dtype, tuple):
            dtype, strides = _dlpack_dtype(dtype, name), facts.strides
            strides = tuple(s * dtype.bytes for s in strides)
        else:
            dtype, strides = formats.dtype_named(dtype), facts.strides
        device = _dlpack_device(place, name)
        # JAX arrays are immutable, but do not say so through DLPack.
        writable = not place.read_only and place.framework not in ("jax", "jaxlib")
        return Array(facts.ptr, facts.shape, strides, dtype, device, writable, place.framework)
    if isinstance(place, Place):
        shape, strides, dtype = facts.shape, facts.strides, _named(facts.dtype, name)
        device, writable, framework = place.device, place.writable, place.framework
        return Array(facts.ptr, shape, strides, dtype, device, writable, framework)
    if isinstance(place, int):
        dtype = _named(facts.dtype, name)
        device = Device("cuda", place)
        return Array(facts.ptr, tuple(facts.shape), facts.strides, dtype, device, True, "cupy")
    if isinstance(place, str):
        dtype = _named(facts.dtype, name)
        writable = place == "numpy, writable"
        return Array(facts.ptr, facts.shape, facts.strides, dtype, CPU, writable, "numpy")
    dtype = _named(facts.dtype, name)
    strides = tuple(s * dtype.bytes for s in facts.strides)
    if place.type not in ("cpu", "cuda"):
        raise DeviceError(f"Invalid device of {name}: expected cpu or cuda, got {place}")
    device = CPU if place.type == "cpu" else Device("cuda", place.index)
    return Array(facts.ptr, tuple(facts.shape), strides, dtype, device, True, "torch")


def view(value, name):
    """``value`` as an `Array`."""
    return describe(read(value, name), name)


def as_numpy(ptr, shape, strides, dtype):
    """A NumPy view of host memory; the caller keeps the memory alive. ``dtype`` is NumPy's."""
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.asarray(_HostMemory(ptr, shape, strides, dtype)).view(dtype)


class _HostMemory:
    def __init__(self, ptr, shape, strides, dtype):
        self.__array_interface__ = {
            "data": (ptr, False),
            "shape": tuple(shape),
            "strides": tuple(strides),
            "typestr": f"<u{dtype.itemsize}" if dtype.itemsize > 1 else "|u1",
            "version": 3,
        }


def _named(dtype, name):
    try:
        return formats.dtype_named(dtype)
    except ValueError:
        raise DTypeError(
            f"Invalid dtype of {name}: expected one of {', '.join(formats.DTYPES)}, got {dtype}"
        ) from None


def _contiguous(shape, itemsize):
    strides, step = [], itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


# --- streams and new arrays -----------------------------------------------------------------------


def stream_pointer(stream):
    """The address of a stream: an integer, or any object with ``__cuda_stream__``, ``ptr`` or
    ``cuda_stream``."""
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int(protocol()[1] if callable(protocol) else protocol[1])
    for attribute in ("ptr", "cuda_stream"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise DTypeError(
        "Invalid type of stream: expected an integer address or an object with __cuda_stream__, "
        f"ptr or cuda_stream, got {type(stream).__name__}"
    )


def current_stream_of(array):
    """A function that returns the current stream's address of the framework that owns ``array``
    (an `Array` on a GPU), on its device."""
    index = array.device.index
    registered = _FRAMEWORKS.get(array.framework)
    if registered is not None:
        return lambda: registered.current_stream(index)
    if array.framework == "torch":
        torch = sys.modules["torch"]
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        if raw is not None:  # 0.1 us, against 4.6 for the documented call
            return functools.partial(raw, index)
        return lambda: torch.cuda.current_stream(index).cuda_stream
    cupy = import_cupy(f"an array on {array.device}")
    return lambda: cupy.cuda.get_current_stream(index).ptr


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


def makes(framework):
    """Whether `empty` knows ``framework`` by name."""
    return framework in ("torch", "cupy", "numpy") or framework in _FRAMEWORKS


def empty(framework, device, shape, dtype):
    """An uninitialised, contiguous array of ``framework`` ("torch", "cupy", "numpy" or a registered
    one; anything else means CuPy on a GPU and NumPy elsewhere)."""
    if framework in _FRAMEWORKS:
        return _FRAMEWORKS[framework].empty(device, shape, dtype)
    if framework == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype.name), device=str(device))
    if device.kind == "cpu":
        return np.empty(shape, dtype.numpy)
    cupy = import_cupy(f"an array on {device}")
    with cupy.cuda.Device(device.index):
        return cupy.empty(shape, dtype.numpy)


def _wait_for(producer, stream):
    if producer is None or producer == stream or producer == (stream or 1):
        return
    cupy = import_cupy("an array with __cuda_array_interface__")
    event = cupy.cuda.Event(disable_timing=True)
    cupy.cuda.Stream.from_external(_RawStream(producer)).record(event)
    cupy.cuda.Stream.from_external(_RawStream(stream or 1)).wait_event(event)


class _RawStream:
    def __init__(self, ptr):
        self.ptr = ptr

    def __cuda_stream__(self):
        return 0, self.ptr


def _pointer_device(ptr):
    cupy = import_cupy("an array with __cuda_array_interface__")
    if not ptr:
        return cupy.cuda.runtime.getDevice()
    return cupy.cuda.runtime.pointerGetAttributes(ptr).device


# --- DLPack ---------------------------------------------------------------------------------------
# Layout of the structs: https://dmlc.github.io/dlpack/latest/c_api.html (DLPack 1.0).

_DL_CPU, _DL_CUDA, _DL_CUDA_HOST, _DL_CUDA_MANAGED = 1, 2, 3, 13
_DL_FLAG_READ_ONLY, _DL_FLAG_IS_COPIED = 1, 2


class _DLTensor(ctypes.Structure):
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


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _parse_capsule(capsule, framework):
    # The capsule is only looked into, never consumed: it stays the owner, and its destructor
    # returns the tensor to the producer when the caller drops it.
    read_only = False
    if _capsule_is(capsule, b"dltensor_versioned"):
        managed = _DLManagedTensorVersioned.from_address(
            _capsule_pointer(capsule, b"dltensor_versioned")
        )
        tensor = managed.tensor
        read_only = bool(managed.flags & (_DL_FLAG_READ_ONLY | _DL_FLAG_IS_COPIED))
    else:
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else _contiguous(shape, 1)
    place = _DLPackPlace(tensor.device_type, tensor.device_id, read_only, framework)
    dtype = (tensor.code, tensor.bits, tensor.lanes)
    return (tensor.data or 0) + tensor.byte_offset, shape, strides, dtype, place, capsule


def _dlpack_dtype(code, name):
    found = formats.BY_DLPACK.get(code[:2])
    if found is None or code[2] != 1:
        raise DTypeError(
            f"Invalid dtype of {name}: expected one of {', '.join(formats.DTYPES)}, got the DLPack "
            f"type with code {code[0]}, {code[1]} bits and {code[2]} lanes"
        )
    return found


def _dlpack_device(place, name):
    if place.device_type in (_DL_CPU, _DL_CUDA_HOST):
        return CPU
    if place.device_type in (_DL_CUDA, _DL_CUDA_MANAGED):
        return Device("cuda", place.device_id)
    raise DeviceError(
        f"Invalid device of {name}: expected CPU, pinned or CUDA memory, got DLPack device type "
        f"{place.device_type}"
    )


def require_writable(array, op, name):
    """Raise unless ``array`` can be written in place."""
    if not array.writable:
        hint = (
            "JAX arrays are immutable: keep the cache in CuPy or torch and give JAX a view of it"
            if array.framework in ("jax", "jaxlib")
            else "give an array that can be written in place"
        )
        raise NotWritableError(
            f"{op}: Invalid access of {name}: expected a writable array, got a read-only one or a "
            f"copy from {array.framework}; {hint}"
        )
