# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""New arrays of a framework, on a device, in the order of a stream."""

import contextlib
import functools
import math
import sys

import numpy as np

from .. import errors
from ..errors import DeviceError, MissingDependencyError
from . import allocations, arrays, cuda, devices, dlpack, driver, formats, streams

HOST_ALIGNMENT = 64  # of NumPy's zeros: without it JAX makes no view of memory on the CPU


def home(op, framework, device):
    """The framework and the `devices.Device` of a new array, for a caller of ``op`` who may give
    either, both or neither."""
    if framework is None and type(device).__module__.partition(".")[0] == "torch":
        framework = "torch"
    if framework is not None:
        given, framework = framework, formats.text_of(framework)
        if framework is None:
            raise _no_framework(op, given)
    if framework == "torch" and "torch" not in sys.modules:
        raise MissingDependencyError(f"{op}: framework 'torch' was asked for; import torch before")
    if device is None and framework == "numpy":
        place = devices.CPU
    elif device is None and framework == "torch":
        gpu = sys.modules["torch"].cuda.is_available()
        place = driver.device_named("cuda" if gpu else "cpu", f"{op}: device", framework)
    else:
        place = driver.device_named(device, f"{op}: device", framework)
    if framework is None:
        framework = "numpy" if place.kind == "cpu" else "cupy"
    if framework not in ("torch", "cupy", "numpy", *arrays.FRAMEWORKS):
        raise _no_framework(op, framework)
    if framework != "torch" and (framework == "numpy") != (place.kind == "cpu"):
        expected = "the CPU" if framework == "numpy" else "a GPU"
        expected, name = f"{expected} for framework {framework!r}", f"{op}: device"
        way_out = driver.way_to_a_gpu() if framework != "numpy" and device is None else ""
        raise errors.wrong("value", name, expected, place, way_out, error=DeviceError)
    return framework, place


def _no_framework(op, framework):
    way_out = arrays.OF_JAX if formats.text_of(framework) == "jax" else ""
    expected, got = "'torch', 'cupy' or 'numpy'", errors.shown(framework)
    return errors.wrong("value", f"{op}: framework", expected, got, way_out)


def empty(framework, device, shape, dtype, stream=None):
    """An uninitialised, contiguous array of ``framework``: "torch", "cupy", "numpy" or a registered
    one; for any other name, CuPy's on a GPU and NumPy's elsewhere. It may be written on ``stream``,
    by default the framework's current one."""
    if framework in arrays.FRAMEWORKS:
        made = arrays.FRAMEWORKS[framework].empty(device, shape, dtype)
    elif framework == "torch":
        made = _torch_empty(device, dtype.name)(shape)
    elif device.kind == "cpu":
        return np.empty(shape, dtype.numpy)
    else:
        with cuda.on_device(device.index):
            made = cuda.import_cupy(f"an array on {device}").empty(shape, dtype.numpy)
    if stream is not None and device.kind == "cuda":
        hand_over(made, framework, device.index, stream)
    return made


@functools.lru_cache(maxsize=64)
def _torch_empty(device, dtype):
    """A function that makes torch tensors of a shape on a `devices.Device`."""
    torch = sys.modules["torch"]
    place = torch.device(str(device))
    return functools.partial(torch.empty, dtype=getattr(torch, dtype), device=place)


def hand_over(made, framework, device, stream):
    """Let ``stream`` write an array that was made on the current stream of its framework."""
    made_on = streams.current(framework, device)()
    if stream != made_on:
        driver.active.order(made_on, stream, device)
        if framework == "torch":
            streams.lend([made], stream, device)


def outside_inference_mode(framework):
    """A context manager: inside, torch makes ordinary tensors, for what outlives a call. Of those
    that its inference mode makes, autograd takes none, whenever they are used."""
    return sys.modules["torch"].inference_mode(False) if framework == "torch" else _NOTHING


_NOTHING = contextlib.nullcontext()


def viewed(array, framework, dtype):
    """An array of ``framework`` that is kept, as elements of another `formats.DType`. In inference
    mode torch makes such a view another kind of tensor, unlike all other views."""
    if framework != "torch":
        return array.view(dtype.numpy)
    with outside_inference_mode(framework):
        return array.view(getattr(sys.modules["torch"], dtype.name))


def empty_of_stream(framework, device, shape, dtype, stream):
    """`empty` on a GPU, with memory allocated on ``stream``, a stream object of CuPy. It waits for
    no other stream; while another stream uses the array, the caller must keep it."""
    if framework in arrays.FRAMEWORKS:
        return empty(framework, device, shape, dtype, stream.ptr)
    if framework == "torch":
        of_torch = sys.modules["torch"].cuda
        # torch goes back to the stream of the GPU that was current before it, which makes a context
        # there; from inside its own device it goes back without.
        with of_torch.device(device.index), of_torch.stream(of_torch.ExternalStream(stream.ptr)):
            return empty(framework, device, shape, dtype)
    with cuda.on_device(device.index), stream:
        return empty(framework, device, shape, dtype)


def like(made):
    """Of an array of torch or CuPy on a GPU, a function ``shape -> make``: ``make()`` is a new
    array of its dtype and on its device, as `empty` makes it without a stream."""
    if not arrays.is_torch(made):
        array = arrays.view(made, "made")
        return lambda shape: functools.partial(
            empty, array.framework, array.device, shape, array.dtype
        )
    torch, dtype, device = sys.modules["torch"], made.dtype, made.device
    quick = _quick_empty(device.type)
    usual = functools.partial(torch.empty, dtype=dtype, device=device)
    if quick is None:
        return lambda shape: functools.partial(usual, shape)
    if torch.cuda.device_count() < 2:
        return lambda shape: functools.partial(
            quick, shape, dlpack.contiguous_strides(shape, 1), dtype
        )
    current, index = torch.cuda.current_device, device.index

    def make(shape, strides):
        return quick(shape, strides, dtype) if current() == index else usual(shape)

    return lambda shape: functools.partial(make, shape, dlpack.contiguous_strides(shape, 1))


@functools.cache
def _quick_empty(kind):
    """What torch.compile's code calls for new tensors, ``f(shape, strides, dtype)``, on the current
    device of this kind: it takes a third of the time of ``torch.empty``. None where it is missing
    or answers wrongly. It is not documented, so it is tried before it is used."""
    torch = sys.modules["torch"]
    try:
        make = getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}")
        made = make((2, 0, 3), (3, 3, 1), torch.int16)
        known = made.shape, made.stride(), made.dtype, made.device.type, type(made)
        works = known == ((2, 0, 3), (3, 3, 1), torch.int16, kind, torch.Tensor)
    except Exception:
        return None
    return make if works else None


def on_device_of(array):
    """A context manager, to be entered at once: inside, what its framework computes with ``array``
    is computed on its GPU, and on the stream that is current there. torch does so by itself; CuPy
    would take the current GPU."""
    if issubclass(type(array), arrays.class_of("cupy", "ndarray")):
        return driver.active.on_device(array.data.device_id)
    return contextlib.nullcontext()


def zeros(framework, device, shape, dtype, pinned=False):
    """A contiguous array of zeros of "torch", "cupy" or "numpy", to be kept, written on the
    framework's current stream. ``pinned``: in pinned host memory."""
    if framework == "torch":
        torch = sys.modules["torch"]
        dtype = getattr(torch, dtype.name)
        with outside_inference_mode(framework):
            return torch.zeros(shape, dtype=dtype, device=str(device), pin_memory=pinned)
    if pinned:
        return allocations.pinned_zeros(shape, dtype.numpy)
    if device.kind == "cpu":
        size = math.prod(shape) * dtype.bytes
        memory = np.zeros(size + HOST_ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % HOST_ALIGNMENT
        return np.ndarray(shape, dtype.numpy, memory, start)
    with cuda.on_device(device.index):
        return cuda.import_cupy(f"an array on {device}").zeros(shape, dtype.numpy)
