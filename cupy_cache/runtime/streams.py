# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Streams: where work is enqueued, behind what it must wait, and how long memory must live.

The rules, of which this module is the one owner:

* Work goes to the current stream of the framework that owns the destination, on its device, or to
  the stream that the caller names.
* Arrays of that framework are in that stream's order. Another framework may have written its arrays
  on its own current stream, so the work waits for that stream, on the device. Arrays that come
  through a protocol are ordered by their producer, which gets the stream's address.
* A result is made by its framework, on the framework's current stream. Work on another stream waits
  for that one first: the memory may have been freed while enqueued work still uses it (making.py).
* Scratch memory of a kernel is freed behind it, in its stream's order (`scratch`).
* torch's allocator learns of torch tensors that are used on another stream than torch's current one
  (`lend`), so that they may be dropped early. Host memory of an enqueued copy is kept until the
  copy is done (`keep_until_done`).
* A stream that is being captured into a graph can neither wait for work outside the graph nor be
  queried. There the caller orders the streams, and arrays must live as long as the graph.
"""

import functools
import operator
import sys
import threading

from .. import errors
from . import arrays, contract, driver, env, locks

LARGEST = 2**64 - 1  # address


class Address(int):
    """The address of a stream, which keeps its object: where that is dropped, the stream may be
    destroyed, and a caller need not keep what it gives to a call."""

    owner: object = None


def pointer(op, stream):
    """The address of a stream: an integer, or any object with ``__cuda_stream__``, ``ptr`` or
    ``cuda_stream``, of which it is an `Address`."""
    if type(stream) is Address:
        return stream
    found = stream if type(stream) is int else _address(op, stream)
    if not 0 <= found <= LARGEST:
        name, expected = f"{op}: stream", "the address of a stream, of at most 64 bits"
        raise errors.wrong("value", name, expected, found)
    if found is not stream:
        found = Address(found)
        found.owner = stream
    return found


def _address(op, stream):
    try:
        protocol = getattr(stream, "__cuda_stream__", None)
        if protocol is not None:
            return _integer(protocol()[1] if callable(protocol) else protocol[1])
        for attribute in ("ptr", "cuda_stream"):
            if hasattr(stream, attribute):
                return _integer(getattr(stream, attribute))
        return contract.index(stream)
    except Exception as error:
        raise _no_stream(op, stream) from error


def _integer(handle):
    """A handle as an integer. Those of some bindings are objects that only ``int`` takes."""
    if isinstance(handle, (bool, float, str, bytes)):
        raise TypeError("no handle of a stream")
    return int(handle)


def _no_stream(op, stream):
    expected = "an integer address or an object with __cuda_stream__, ptr or cuda_stream"
    return errors.wrong("type", f"{op}: stream", expected, type(stream).__name__)


def current(framework, device):
    """A function that returns the address of a framework's current stream on GPU ``device``, an
    index. An unknown framework's is taken to be CuPy's."""
    if framework in arrays.FRAMEWORKS:
        return functools.partial(arrays.FRAMEWORKS[framework].current_stream, device)
    torch = sys.modules["torch"] if framework == "torch" else None
    if torch is not None and torch.version.cuda is not None:
        raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        if raw is not None:  # 0.1 us, against 4.6 for the documented call
            return functools.partial(raw, device)
        return lambda: torch.cuda.current_stream(device).cuda_stream
    return functools.partial(driver.active.current_stream, device)


def of_host_memory(framework, device):
    """`current` of a framework whose arrays are all in host memory; None while there is nothing to
    wait for. torch may have used no GPU yet, and to ask it for its stream could make a context on
    whichever GPU is current."""
    ask = current(framework, device)
    if framework != "torch":
        return ask
    of_torch = sys.modules["torch"].cuda
    return lambda: ask() if of_torch.is_initialized() else None


def knows(framework):
    """Whether `current` knows the stream of ``framework`` itself."""
    return framework in ("torch", "cupy") or framework in arrays.FRAMEWORKS


def lend(tensors, stream, device):
    """Tell torch's allocator that the torch tensors on a GPU among ``tensors`` are used on
    ``stream``, which is not torch's current one.

    Not in a capture that torch did not begin: when such a tensor is dropped, the allocator would
    record an event in the capture, and could not query it."""
    if _is_captured_by_others(stream, device):
        return
    torch = sys.modules["torch"]
    shown = torch.cuda.ExternalStream(stream, device=device)
    for tensor in tensors:
        if arrays.is_torch(tensor) and tensor.is_cuda:
            tensor.record_stream(shown)


def _is_captured_by_others(stream, device):
    """Whether a stream is being captured, but torch's current one is not, so that torch's allocator
    knows of no capture."""
    capturing = driver.active.capturing
    return capturing(stream, device) and not capturing(current("torch", device)(), device)


_PER_THREAD = 2  # the handle cudaStreamPerThread, a different stream in each thread
# {(stream, GPU, thread): [(event, objects)]}, in the order of that stream.
_kept: dict[tuple, list] = {}
_keeping = locks.Lock()


def keep_until_done(objects, stream, device):
    """Keep ``objects``, which own host memory, until the work now on ``stream`` is done. The next
    call of this function, or of `let_go`, after that drops them."""
    if driver.active.capturing(stream, device):
        return
    place = stream, device, threading.get_ident() if stream == _PER_THREAD else None
    with _keeping:
        known = _kept.get(place)
        if known is not None and len(_kept) == len(known) == 1:
            ((event, latest),) = known
            if _same(latest, objects):  # most swaps go to and from one host cache
                event.move(stream)
                return
    let_go()
    made = driver.active.event(stream, device), objects
    with _keeping:
        _kept.setdefault(place, []).append(made)


def _same(some, others):
    """Whether two lists hold the same objects."""
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
    # Outside the lock: objects that are dropped may run code of their own.
    dropped.clear()


def scratch(framework, device, size, stream):
    """A context manager that gives the address, a multiple of 16, of ``size`` uninitialised bytes
    on GPU ``device``, for the work that is enqueued on ``stream`` while it is entered.

    They are freed behind that work, in the stream's order; in a capture they belong to the graph.
    They come from torch's allocator where ``framework`` is "torch", unless it does not know of the
    capture; else from `driver.CudaDriver.scratch`."""
    if framework == "torch" and _torch_allocates(stream, device):
        return _TorchScratch(size, stream, device)
    return driver.active.scratch(size, stream, device)


def _torch_allocates(stream, device):
    """Whether torch's allocator may give scratch memory for a stream. Not while another library
    captures it: at the next replay that memory would belong to another tensor."""
    capturing = driver.active.capturing
    if not capturing(stream, device):
        return True
    # Where torch's current stream is not captured, its allocator may make calls that break the
    # capture.
    if not capturing(current("torch", device)(), device):
        return False
    return _torch_knows(driver.active.capture(stream, device), stream, device)


@functools.lru_cache(maxsize=16)
def _torch_knows(capture, stream, device):
    """Whether torch's allocator knows of a capture of ``stream``, CUDA's number ``capture``. If so,
    its memory is from a pool of the graph's own; there is no other way to find out. It takes a
    millisecond."""
    del capture
    if env.torch_is_uncached():  # it would free at once what the graph goes on to use
        return False
    with _TorchScratch(1, stream, device) as address:
        try:
            segments = sys.modules["torch"].cuda.memory_snapshot()
        except RuntimeError:  # an allocator without snapshots, whose memory the graph owns anyway
            return True
    for segment in segments:
        if 0 <= address - segment["address"] < segment["total_size"]:
            return tuple(segment.get("segment_pool_id", ())) != (0, 0)
    return False


class _TorchScratch:
    """`scratch` from torch's caching allocator, as ``torch.cuda.caching_allocator_alloc`` gives it.
    The private functions below that take a third of the time of a new tensor."""

    __slots__ = ("_address", "_free")

    def __init__(self, size, stream, device):
        allocate, self._free = _torch_allocator()
        self._address = allocate(size, stream, device)

    def __enter__(self):
        return self._address

    def __exit__(self, *error):
        self._free(self._address)


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
        # torch's current GPU is not always CUDA's: where it went back to one without a context, it
        # has not told CUDA yet. What follows takes a microsecond less.
        if current_device() == device == driver.active.current_device():
            return allocate_here(size, stream)
        # torch.cuda.device goes back to the earlier GPU without making a context there.
        with torch.cuda.device(device):
            return allocate_here(size, stream)

    return allocate, free
