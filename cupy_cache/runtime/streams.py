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
  for that one first: the memory may have been freed under work that is still to come (making.py).
* Scratch memory that a kernel needs beside its arguments is free again behind it, in its stream's
  order (`scratch`).
* torch tensors used on another stream than torch's current one are told to torch's allocator
  (`lend`), so that dropping them early does no harm. Host memory under a copy that is enqueued is
  kept until the copy is done (`keep_until_done`).
* A stream that is being captured into a graph can neither wait for work outside the graph nor be
  asked. There the caller orders the streams, and what the graph uses must live as long as it.
"""

import functools
import operator
import sys
import threading

from .. import errors
from . import arrays, contract, driver, env, locks

LARGEST = 2**64 - 1  # address


def pointer(op, stream):
    """The address of a stream: an integer, or any object with ``__cuda_stream__``, ``ptr`` or
    ``cuda_stream``."""
    found = stream if type(stream) is int else _address(op, stream)
    if not 0 <= found <= LARGEST:
        name, expected = f"{op}: stream", "the address of a stream, of at most 64 bits"
        raise errors.wrong("value", name, expected, found)
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
    expected = "an integer address or an object with __cuda_stream__, ptr or cuda_stream"
    return errors.wrong("type", f"{op}: stream", expected, type(stream).__name__)


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


def scratch(framework, device, size, stream):
    """A context manager for ``size`` bytes on GPU ``device``, whose address, a multiple of 16, it
    gives: for what is enqueued on ``stream`` while it is entered. They are free again behind that,
    in the stream's order, and hold anything. torch's allocator gives them where ``framework`` is
    "torch", otherwise, and in a capture that it does not know, `driver.CudaDriver.scratch`. In a
    stream that is captured they belong to the graph."""
    if framework == "torch" and _torch_allocates(stream, device):
        return _TorchScratch(size, stream, device)
    return driver.active.scratch(size, stream, device)


def _torch_allocates(stream, device):
    """Whether torch's allocator is to give memory for a stream: not while others than torch capture
    it, since that memory would be another tensor's at the next replay."""
    capturing = driver.active.capturing
    if not capturing(stream, device):
        return True
    # Where torch's own stream is not captured, its allocator may do what breaks the capture.
    if not capturing(current("torch", device)(), device):
        return False
    return _torch_knows(driver.active.capture(stream, device), stream, device)


@functools.lru_cache(maxsize=16)
def _torch_knows(capture, stream, device):
    """Whether torch's allocator knows of a capture of ``stream``, which CUDA numbers ``capture``.
    Then, and only then, what it gives is of a pool of the graph's own; nothing else tells. It takes
    a millisecond."""
    del capture
    if env.torch_is_uncached():  # what a graph goes on to use would be freed at once
        return False
    with _TorchScratch(1, stream, device) as address:
        try:
            segments = sys.modules["torch"].cuda.memory_snapshot()
        except RuntimeError:  # of an allocator whose memory is the graph's by itself
            return True
    for segment in segments:
        if 0 <= address - segment["address"] < segment["total_size"]:
            return tuple(segment.get("segment_pool_id", ())) != (0, 0)
    return False


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
