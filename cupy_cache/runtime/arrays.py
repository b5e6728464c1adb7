# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Any framework's array -> pointer, shape, strides, dtype, device, whether it can be written.

In two steps, because the first one runs at every call without a fast path:

* a *reader* (`reader_for`) gives an array's `Metadata` in the framework's own types, as cheaply as
  that framework allows. Without the pointer these are hashable, and part of a signature;
* `describe` makes an `Array` of them, once for each signature.

torch, CuPy and NumPy arrays are read through their attributes (a few tenths of a microsecond each,
against 19 for ``cupy.from_dlpack``), all others through DLPack (dlpack.py) or
``__cuda_array_interface__``. Nothing is copied.

A ``name`` is "operation: argument" throughout, for errors.
"""

import functools
import operator
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import errors
from ..errors import CupyCacheError, MissingDependencyError
from . import dlpack, formats
from .devices import CPU, Device

# The way out where a call would write an array of JAX.
OF_JAX = "JAX arrays are immutable: keep the cache in torch, CuPy or NumPy, and give JAX a view"


class Metadata(NamedTuple):
    """An array as its reader gives it, in the framework's own types and units; see `describe`.
    ``keep`` owns the memory of an export: it must live until the work is enqueued."""

    ptr: int
    shape: tuple
    strides: tuple
    dtype: Any
    place: Any
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
    def alignment(self) -> int:
        """The largest power of two, at most 16, that divides the address."""
        return (self.ptr | 16) & -(self.ptr | 16)

    @property
    def span(self) -> tuple[int, int]:
        """(First byte, byte behind the last), counted from the address, of what is not empty."""
        ends = [stride * (count - 1) for stride, count in zip(self.strides, self.shape)]
        high = sum(max(end, 0) for end in ends) + self.dtype.bytes
        return sum(min(end, 0) for end in ends), high

    @property
    def row_span(self) -> tuple[int, int]:
        """`span` of one row, along the first dimension: of a cache, a block."""
        return self._replace(shape=(1, *self.shape[1:])).span


class Place(NamedTuple):
    """The location of a registered framework's array; see `register_framework`."""

    framework: str
    device: Device
    writable: bool


class Framework(NamedTuple):
    """What `register_framework` needs of a further framework with arrays on a GPU.

    read : ``read(array)`` -> the fields of `Metadata`: tuples, strides in bytes, a dtype's name, a
        `Place`.
    current_stream : ``current_stream(device index)`` -> the address of its current stream.
    empty : ``empty(device, shape, dtype)`` -> an uninitialised, contiguous array.
    """

    read: Callable
    current_stream: Callable[[int], int]
    empty: Callable


FRAMEWORKS: dict[str, Framework] = {}
MAX_READERS = 256  # types of arrays that are remembered
# An array without memory gives its offset for an address. No GPU's memory is below `LOWEST`, and
# none of a process's on the host below `LOWEST_ON_HOST`. No offset reaches `ABOVE_OFFSETS`; what is
# below may be either, and a tensor is asked for its offset (`doubtful`).
LOWEST, LOWEST_ON_HOST, ABOVE_OFFSETS = 1 << 33, 1 << 16, 1 << 42


# --- readers ------------------------------------------------------------------------------------


def torch_address(tensor):
    """A torch tensor's address; 0 where it has no memory."""
    ptr = tensor.data_ptr()
    if ptr < ABOVE_OFFSETS and ptr == tensor.storage_offset() * tensor.element_size():
        return 0  # its storage begins at 0
    return ptr


def doubtful(addresses, tensors):
    """Whether one of ``addresses`` may be none of a GPU's memory; those of torch's ``tensors`` are
    among them. For fast paths, which ask where one is below their kind's `Kind.above`: some
    allocators give such addresses to all that they have, so this is quick."""
    if min(addresses) < LOWEST:
        return True
    far = max([tensor.storage_offset() for tensor in tensors], default=0)
    # An element has 16 bytes at most.
    return far >= LOWEST >> 4 and not all(map(torch_address, tensors))


def _read_torch(tensor):
    ptr = torch_address(tensor)
    if tensor.is_neg():
        raise ValueError("its negative bit is set: give what resolve_neg() returns")
    return ptr, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, None


def _read_cupy(array):
    data = array.data
    return data.ptr, array.shape, array.strides, array.dtype, data.device_id, None


def _read_numpy(array):
    writable = array.flags.writeable
    place = "numpy, writable" if writable else "numpy, read-only"
    return array.ctypes.data, array.shape, array.strides, array.dtype, place, None


_REGISTERED: dict[type, Callable] = {np.ndarray: _read_numpy}
_READERS: dict[type, Callable] = dict(_REGISTERED)  # and those of types that were met
_NAMES = {_read_torch: "torch", _read_cupy: "cupy", _read_numpy: "numpy"}
# Readers of protocols. They must know the stream that the data will be used on.
_FOREIGN = (dlpack.read, dlpack.read_cuda_interface)


def reader_for(value, name):
    """The reader for ``value``'s type, which is remembered."""
    kind = type(value)
    reader = _READERS.get(kind)
    if reader is None:
        try:
            reader = _find_reader(value, name)
        except Exception as error:  # of an attribute that is asked for, too
            raise unreadable(value, name, error) from error
        if reader in _FOREIGN and not _is_of_class(reader, kind):
            return reader
        if len(_READERS) >= MAX_READERS:
            _READERS.clear()
            _READERS.update(_REGISTERED)
        _READERS[kind] = reader
    return reader


def _is_of_class(reader, kind):
    """Whether all of a class have the protocol of a reader, and none the one that goes before it.
    Of a class that forwards to what it wraps, each may have another."""
    if reader is dlpack.read:
        return hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__")
    return hasattr(kind, "__cuda_array_interface__") and not hasattr(kind, "__getattr__")


def register_framework(name, kind, framework):
    """Have ``framework``, a `Framework`, serve arrays of type ``kind``, under ``name``."""
    _READERS[kind] = _REGISTERED[kind] = framework.read
    FRAMEWORKS[name] = framework


def class_of(module, name):
    """A module's class of arrays; () where it is not imported, or not yet: another thread may be at
    it, and a folder of its name counts as a module too."""
    return getattr(sys.modules.get(module), name, ())


def _find_reader(value, name):
    # By the type alone, as it is remembered: a stand-in says that it is what it stands for, and the
    # next one of its type may stand for something else.
    kind = type(value)
    if issubclass(kind, class_of("torch", "Tensor")):
        return _read_torch
    if issubclass(kind, class_of("cupy", "ndarray")):
        return _read_cupy
    if issubclass(kind, np.ma.MaskedArray):
        expected = "an array whose every element counts"
        got = "a MaskedArray: give its data, or what filled() returns"
        raise errors.wrong("type", name, expected, got)
    if issubclass(kind, np.ndarray):
        return _read_numpy
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        return dlpack.read
    if hasattr(value, "__cuda_array_interface__"):
        return dlpack.read_cuda_interface
    way_out = ""
    if type(value).__module__.partition(".")[0] == "jax":  # JAX's arrays were read by DLPack
        way_out = (
            "JAX is tracing, and there are no numbers yet: call this between jitted functions, "
            "or through jax.experimental.io_callback"
        )
    expected = (
        "an array (torch, CuPy, NumPy, or anything with __dlpack__ or __cuda_array_interface__)"
    )
    raise errors.wrong("type", name, expected, type(value).__name__, way_out)


def is_foreign(value, name):
    """Whether ``value`` is read through a protocol, whose reader must know the stream."""
    return reader_for(value, name) in _FOREIGN


def is_torch(value):
    """Whether ``value`` is a torch tensor."""
    reader = _READERS.get(type(value))
    if reader is None:
        return issubclass(type(value), class_of("torch", "Tensor"))
    return reader is _read_torch


def read(value, name, stream=None):
    """``value``'s `Metadata`. A protocol exports it for use on ``stream``, behind its producer's
    work. An array with elements but without memory is refused."""
    reader = reader_for(value, name)
    try:
        found = Metadata(*(reader(value, stream) if reader in _FOREIGN else reader(value)))
    except Exception as error:
        raise unreadable(value, name, error) from error
    if found.ptr < LOWEST and 0 not in found.shape and _is_nowhere(found):
        describe(found, name)  # refuses an array on another kind of device by that name
        got = f"{_type_name(value)} of shape {list(found.shape)} at address {found.ptr:#x}"
        raise errors.wrong("memory", name, "an array with memory", got)
    return found


def _is_nowhere(metadata):
    """Whether there can be no memory at an address below `LOWEST`. A protocol tells no offset."""
    ptr, place = metadata.ptr, metadata.place
    if isinstance(place, dlpack.Place):
        return place.device_type in dlpack.ON_GPU or ptr < LOWEST_ON_HOST
    return not ptr


def unreadable(value, name, error):
    """The error to raise where reading an array failed."""
    if type(error) is MissingDependencyError:  # it says only what is missing
        return MissingDependencyError(f"{name}, {error}")
    if isinstance(error, CupyCacheError):
        return error
    told = errors.in_a_line(error) or type(error).__name__
    if isinstance(error, KeyError):
        told = f"{told} is missing"
    got = f"{_type_name(value)} that cannot: {told}"
    return errors.wrong("memory", name, "memory that can be read where it is", got)


def _type_name(value):
    """``value``'s type as errors show it, with the layout of torch's sparse tensors."""
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    if not is_torch(value):
        return kind
    layout = errors.in_a_line(value, lambda tensor: str(tensor.layout))
    return kind if layout == "torch.strided" else f"{kind} ({layout})"


def device_of(value, name):
    """The `Device` of an array. Nothing is exported."""
    reader = reader_for(value, name)
    try:
        if reader is dlpack.read:
            kind, index = dlpack.device_of(value)
        elif reader is dlpack.read_cuda_interface:
            kind, index = dlpack.CUDA, dlpack.interface_device(value)
        else:
            return describe(Metadata(*reader(value)), name).device
    except Exception as error:
        raise unreadable(value, name, error) from error
    return _device(kind, index, name)


def describe(metadata, name):
    """Turn `Metadata` into an `Array`."""
    ptr, shape, strides, dtype, place, _ = metadata
    if isinstance(place, dlpack.Place):
        framework = place.framework
        device = _device(place.device_type, place.device_id, name)
        if isinstance(dtype, tuple):
            dtype = _dlpack_dtype(dtype, name)
            strides = tuple(s * dtype.bytes for s in strides)
        else:
            dtype = _named(dtype, name)
        # JAX arrays are immutable, but do not say so through DLPack.
        writable = not place.read_only and framework not in ("jax", "jaxlib")
        return Array(ptr, shape, strides, dtype, device, writable, framework)
    dtype = _named(dtype, name)
    if isinstance(place, Place):
        return Array(ptr, shape, strides, dtype, place.device, place.writable, place.framework)
    if isinstance(place, int):
        return Array(ptr, tuple(shape), strides, dtype, Device("cuda", place), True, "cupy")
    if isinstance(place, str):
        return Array(ptr, shape, strides, dtype, CPU, place == "numpy, writable", "numpy")
    strides = tuple(s * dtype.bytes for s in strides)
    if place.type not in ("cpu", "cuda"):
        raise errors.wrong("device", name, "cpu or cuda", place)
    device = CPU if place.type == "cpu" else Device("cuda", place.index)
    return Array(ptr, tuple(shape), strides, dtype, device, True, "torch")


def stride_unit(metadata):
    """The bytes that the strides count in: an element's for torch and DLPack, else 1."""
    place, dtype = metadata.place, metadata.dtype
    if isinstance(place, (Place, int, str)):
        return 1
    if isinstance(place, dlpack.Place):
        return dtype[1] * dtype[2] // 8 if isinstance(dtype, tuple) else 1
    return dtype.itemsize  # torch's


def element_step(metadata):
    """The stride of elements without gaps, in the units of the strides."""
    place, dtype = metadata.place, metadata.dtype
    if isinstance(place, Place):
        return formats.DTYPES[dtype].bytes if dtype in formats.DTYPES else 1
    return dtype.itemsize if isinstance(dtype, np.dtype) else 1


def regular(shape, strides, size):
    """``strides``, but for dimensions of extent 1, whose strides mean nothing: these get the stride
    that a larger extent would have without gaps. ``size``: the stride of elements without gaps."""
    if 1 not in shape:
        return strides
    strides = list(strides)
    span = size  # of the dimensions behind
    for at in range(len(shape) - 1, -1, -1):
        if shape[at] == 1:
            strides[at] = span
        span = max(span, abs(strides[at]) * shape[at])
    return tuple(strides)


ROWS = (0,)  # an `Arg`'s ``varies`` where the first dimension is the tokens of a step


def extent(varies, shape, strides, unit):
    """An array's extent, for an operation's count. Its strides count in ``unit`` bytes."""
    if varies == ROWS:
        return shape[0]
    return tuple(shape), meant(shape, strides, unit)


def meant(shape, strides, unit):
    """Strides in bytes, and 0 for each that means nothing, as of an extent of 1."""
    if 0 in shape:
        return (0,) * len(shape)
    return tuple([stride * unit if n > 1 else 0 for n, stride in zip(shape, strides)])


def any_bits(numbers):
    """All bits that are set in any of ``numbers``."""
    return functools.reduce(operator.or_, numbers, 0)


def framework_of(value, name):
    """The name of the framework that owns an array."""
    known = _NAMES.get(reader_for(value, name))
    return view(value, name).framework if known is None else known


def view(value, name):
    """``value`` as an `Array`, to look at its shape and the like: no stream waits for it."""
    return describe(read(value, name, dlpack.LOOK), name)


def as_numpy(ptr, shape, strides, dtype):
    """A NumPy view of host memory; the caller keeps the memory alive. ``dtype`` is NumPy's."""
    if 0 in shape:
        return np.empty(shape, dtype)
    if 1 in shape:
        strides = meant(shape, strides, 1)
    return np.asarray(_HostMemory(ptr, shape, strides, dtype)).view(dtype)


class _HostMemory:
    def __init__(self, ptr, shape, strides, dtype):
        self.__array_interface__ = {
            "data": (ptr, False),
            "shape": tuple(shape),
            "strides": tuple(strides),
            "typestr": f"<u{dtype.itemsize}",
            "version": 3,
        }


def _named(dtype, name):
    try:
        return formats.dtype_named(dtype)
    except ValueError:
        expected = f"one of {', '.join(formats.DTYPES)}"
        raise errors.wrong("dtype", name, expected, dtype) from None


def _dlpack_dtype(code, name):
    found = formats.BY_DLPACK.get(code[:2])
    if found is None or code[2] != 1:
        expected = f"one of {', '.join(formats.DTYPES)}"
        bits, lanes = errors.counted(code[1], "bit"), errors.counted(code[2], "lane")
        got = f"the DLPack type with code {code[0]}, {bits} and {lanes}"
        raise errors.wrong("dtype", name, expected, got)
    return found


def _device(device_type, device_id, name):
    if device_type in (dlpack.CPU, dlpack.CUDA_HOST):
        return CPU
    if device_type in dlpack.ON_GPU:
        return Device("cuda", device_id)
    got = f"DLPack device type {errors.shown(device_type)}"
    expected = "CPU, pinned or CUDA memory"
    raise errors.wrong("device", name, expected, got)


def require_writable(array, op, name):
    """Raise unless ``array`` can be written in place."""
    if not array.writable:
        hint = (
            OF_JAX
            if array.framework in ("jax", "jaxlib")
            else "give an array that can be written in place"
        )
        got = f"a read-only one or a copy from {array.framework}"
        raise errors.wrong("access", f"{op}: {name}", "a writable array", got, hint)
