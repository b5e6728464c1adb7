# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Streams: where work is enqueued, behind what it must wait, and how long memory must live.

The rules, of which this module is the one owner:

* Work goes to the current stream of the framework that owns the destination, on its device, or to
  the stream that the caller names.
* Arrays of that framework are in that stream's order. What another framework owns may have been
  written on that framework's current stream, so the work waits for it, on the device.
  Arrays behind a protocol are ordered by their producer, which is told the stream.
* A result is made by its framework, on the framework's current stream. Work on another stream waits
  for that one first: the memory may have been freed under work that is still to come (`empty`).
* Scratch memory that a kernel needs beside its arguments is free again behind it, in its stream's
  order (`scratch`).
* torch tensors used on another stream than torch's current one are told to torch's allocator
  (`lend`), so that dropping them early does no harm. Host memory under a copy that is enqueued is
  kept until the copy is done (`keep_until_done`).
* A stream that is being captured into a graph can neither wait for work outside the graph nor be
  asked. There the caller orders the streams, and what the graph uses must live as long as it.
"""

import functools
import math
import operator
import sys
import threading

import numpy as np

from .. import errors
from ..errors import ArgumentError, DeviceError, DTypeError, MissingDependencyError
from . import arrays, contract, cuda, devices, driver, locks

HOST_ALIGNMENT = 64  # of NumPy's zeros: JAX has a view of no other memory on the CPU

LARGEST = 2**64 - 1  # address


def pointer(op, stream):
    """The address of a stream: an integer, or any object with ``__cuda_stream__``, ``ptr`` or
    ``cuda_stream``."""
    found = stream if type(stream) is int else _address(op, stream)
    if not 0 <= found <= LARGEST:
        name, expected = f"{op}: stream", "the address of a stream, of at most 64 bits"
        raise ArgumentError(errors.wrong("value", name, expected, str(found)))
    return found


def _address(op, stream):
    try:
        protocol = getattr(stream, "__cuda_stream__", None)
        if protocol is not None:
            return int(protocol()[1] if callable(protocol) else protocol[1])
        for attribute in ("ptr", "cuda_stream"):
            if hasattr(stream, attribute):
                return int(getattr(stream, attribute))
        return contract.index(stream)
    except Exception as error:
        raise _no_stream(op, stream) from error


def _no_stream(op, stream):
    return DTypeError(
        f"{op}: Invalid type of stream: expected an integer address or an object with "
        f"__cuda_stream__, ptr or cuda_stream, got {type(stream).__name__}"
    )


def current(framework, device):
    """A function that returns the address of a framework's current stream on GPU ``device``, an
    index. Of a framework that is not known it is CuPy's."""
    if framework in arrays.FRAMEWORKS:
        return functools.partial(arrays.FRAMEWORKS[framework].current_stream, device)
    torch = sys.modules["torch"] if framework == "torch" else None
    if torch is not None and torch.version.cuda is not None:
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        if raw is not None:  # 0.1 us, against 4.6 for the documented call
            return functools.partial(raw, device)
        return lambda: torch.cuda.current_stream(device).cuda_stream
    return functools.partial(driver.active.current_stream, device)


def knows(framework):
    """Whether `current` tells the stream of ``framework`` itself."""
    return framework in ("torch", "cupy") or framework in arrays.FRAMEWORKS


def lend(tensors, stream, device):
    """Tell torch's allocator that those of ``tensors`` that are torch's on a GPU are used on
    ``stream``, which is not torch's current one there. It is not told of a capture that it does not
    know: it would record events there when they are dropped, and could not ask for them."""
    if _is_captured_by_others(stream, device):
        return
    torch = sys.modules["torch"]
    shown = torch.cuda.ExternalStream(stream, device=device)
    for tensor in tensors:
        if arrays.is_torch(tensor) and tensor.is_cuda:
            tensor.record_stream(shown)


def _is_captured_by_others(stream, device):
    """Whether a stream is being captured, and torch's current one is not: then torch's allocator
    knows of no capture."""
    capturing = driver.active.capturing
    return capturing(stream, device) and not capturing(current("torch", device)(), device)


_PER_THREAD = 2  # the handle that is another stream in each thread
# {(stream, GPU, thread): [(event, objects)]}, in the order of that stream.
_kept: dict[tuple, list] = {}
_keeping = locks.Lock()


def keep_until_done(objects, stream, device):
    """Keep ``objects``, which own host memory, until what ``stream`` holds now is done. After that
    the next call of this, or of `let_go`, lets them go."""
    if driver.active.capturing(stream, device):
        return
    place = stream, device, threading.get_ident() if stream == _PER_THREAD else None
    with _keeping:
        known = _kept.get(place)
        if known is not None and len(_kept) == len(known) == 1:
            ((event, latest),) = known
            if _same(latest, objects):  # as mostly: swaps go to and from one host cache
                event.move(stream)
                return
    let_go()
    made = driver.active.event(stream, device), objects
    with _keeping:
        _kept.setdefault(place, []).append(made)


def _same(some, others):
    """Whether two lists have the very same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def let_go():
    """Drop what was kept for work that is done."""
    dropped = []
    with _keeping:
        for place, kept in list(_kept.items()):
            while kept and kept[0][0].done():
                dropped.append(kept.pop(0))
            if not kept:
                del _kept[place]
    # Outside the lock: whoever owned the memory may have code that runs when it goes.
    dropped.clear()


def can_make(framework):
    """Whether `empty` knows ``framework`` by name."""
    return framework in ("torch", "cupy", "numpy") or framework in arrays.FRAMEWORKS


def home(op, framework, device):
    """The framework and the `devices.Device` of a new array, of which ``op`` was told either, both
    or neither."""
    if framework is None and type(device).__module__.partition(".")[0] == "torch":
        framework = "torch"
    if framework == "torch" and "torch" not in sys.modules:
        raise MissingDependencyError(f"{op}: framework 'torch' was asked for: import torch before")
    if device is None and framework == "numpy":
        place = devices.CPU
    elif device is None and framework == "torch":
        gpu = sys.modules["torch"].cuda.is_available()
        place = driver.device_named("cuda" if gpu else "cpu", f"{op}: device")
    else:
        place = driver.device_named(device, f"{op}: device")
    if framework is None:
        framework = "numpy" if place.kind == "cpu" else "cupy"
    if not isinstance(framework, str) or not can_make(framework):
        way_out = arrays.OF_JAX if framework == "jax" else ""
        expected, got = "'torch', 'cupy' or 'numpy'", contract.shown(framework)
        raise ArgumentError(errors.wrong("value", f"{op}: framework", expected, got, way_out))
    if framework != "torch" and (framework == "numpy") != (place.kind == "cpu"):
        expected = "the CPU" if framework == "numpy" else "a GPU"
        raise DeviceError(
            f"{op}: Invalid value of device: expected {expected} for framework {framework!r}, got "
            f"{place}"
        )
    return framework, place


def empty(framework, device, shape, dtype, stream=None):
    """An uninitialised, contiguous array of ``framework`` ("torch", "cupy", "numpy" or a registered
    one; anything else means CuPy on a GPU and NumPy elsewhere), to be written on ``stream``, by
    default the framework's current one."""
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
        _hand_over(made, framework, device.index, stream)
    return made


@functools.lru_cache(maxsize=64)
def _torch_empty(device, dtype):
    """torch's maker of arrays on a `devices.Device`, as a function of their shape."""
    torch = sys.modules["torch"]
    place = torch.device(str(device))
    return functools.partial(torch.empty, dtype=getattr(torch, dtype), device=place)


def _hand_over(made, framework, device, stream):
    """Let ``stream`` write an array that was made on the current stream of its framework."""
    made_on = current(framework, device)()
    if stream != made_on:
        driver.active.order(made_on, stream, device)
        if framework == "torch":
            lend([made], stream, device)


def empty_beside(tensor, shape, stream=None):
    """`empty`, of the dtype and on the device of a torch tensor."""
    made = tensor.new_empty(shape)
    if stream is not None and made.is_cuda:
        _hand_over(made, "torch", made.get_device(), stream)
    return made


def zeros(framework, device, shape, dtype, pinned=False):
    """A contiguous array of zeros of "torch", "cupy" or "numpy", enqueued on the framework's
    current stream. ``pinned``: in host memory that GPUs reach by themselves."""
    if framework == "torch":
        torch = sys.modules["torch"]
        dtype = getattr(torch, dtype.name)
        return torch.zeros(shape, dtype=dtype, device=str(device), pin_memory=pinned)
    if pinned:
        return cuda.pinned_zeros(shape, dtype.numpy)
    if device.kind == "cpu":
        size = math.prod(shape) * dtype.bytes
        memory = np.zeros(size + HOST_ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % HOST_ALIGNMENT
        return np.ndarray(shape, dtype.numpy, memory, start)
    with cuda.on_device(device.index):
        return cuda.import_cupy(f"an array on {device}").zeros(shape, dtype.numpy)


def scratch(framework, device, size, stream):
    """A context manager for ``size`` bytes on GPU ``device``, whose address, a multiple of 16, it
    gives: for what is enqueued on ``stream`` while it is entered. They are free again behind that,
    in the stream's order, and hold anything. torch's allocator gives them where ``framework`` is
    "torch", otherwise, and in a capture that it does not know, `driver.CudaDriver.scratch`. In a
    stream that is captured they belong to the graph."""
    if framework == "torch":
        others = stream != current(framework, device)()
        if not (others and _is_captured_by_others(stream, device)):
            return _TorchScratch(size, stream, device)
    return driver.active.scratch(size, stream, device)


class _TorchScratch:
    """`scratch` as ``torch.cuda.caching_allocator_alloc`` gives it, for one stream. The functions
    behind that take a third of the time of a new tensor."""

    __slots__ = ("_address",)

    def __init__(self, size, stream, device):
        allocate, _ = _torch_allocator()
        self._address = allocate(size, stream, device)

    def __enter__(self):
        return self._address

    def __exit__(self, *error):
        _, free = _torch_allocator()
        free(self._address)


@functools.cache
def _torch_allocator():
    """(``allocate(size, stream, device)``, ``free(address)``) of torch."""
    torch = sys.modules["torch"]
    names = (f"_cuda_cudaCachingAllocator_raw_{name}" for name in ("alloc", "delete"))
    allocate_here, free = (getattr(torch._C, name, None) for name in names)
    if allocate_here is None or free is None:
        free = torch.cuda.caching_allocator_delete

        def allocate_here(size, stream):
            return torch.cuda.caching_allocator_alloc(size, stream=stream)

    current_device = getattr(torch._C, "_cuda_getDevice", lambda: None)

    def allocate(size, stream, device):
        if current_device() == device:  # a microsecond less
            return allocate_here(size, stream)
        # torch has a current GPU of its own where CUDA's would need a context that nobody uses.
        with torch.cuda.device(device):
            return allocate_here(size, stream)

    return allocate, free
