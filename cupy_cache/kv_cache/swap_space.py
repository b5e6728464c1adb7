# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Swapping blocks to host memory and back while an engine's steps go on."""

from __future__ import annotations

import collections
import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import errors
from ..errors import CaptureError, CopyError
from ..ops.shared import mappings
from ..runtime import (
    allocations,
    arrays,
    contract,
    dispatch,
    driver,
    formats,
    indices,
    lists,
    making,
    streams,
)
from ..types import Indices, Pairs, StreamLike
from .paged_kv_cache import PagedKVCache

NAME = "SwapSpace"
PARTS = 4  # the copies of a step are cut into at least so many, and so exceed the limit by less
PAIRS = dispatch.Arg("block_mapping", chosen=True, pairs=True)
PLACES = dispatch.Arg("host_blocks", chosen=True)


class SwapSpace:
    """Host memory for blocks that are swapped out, and the copies to it and from it, beside an
    engine's steps.

    `PagedKVCache.swap_blocks` is in the order of the steps, which wait for the bus meanwhile. Here
    blocks are packed, in that order, into a buffer on the GPU, which takes microseconds. Between
    the buffer and host memory the GPU's copy engines work on a stream of their own; they need no
    multiprocessors. Beside a step no more copies begin than the bus carries meanwhile: the few
    numbers that a step sends and reads would wait behind them.

    `BlockTables` with as many ``host_blocks`` says which blocks go where::

        space.swap_out(tables.swap_out("a"))  # its blocks are free for the next step
        ...
        coming = space.prefetch(tables.blocks("a"))
        ...
        if coming.is_done():
            coming.swap_in(tables.swap_in("a"))

    Call `advance` once beside each step. Copies are made in the order of these calls, so blocks may
    be fetched that are still on their way out, and blocks of host memory may be used again at once.
    On the CPU it is the same, but the copies are done when `advance` returns.

    It is not thread-safe, and cannot be copied or pickled.

    Parameters
    ----------
    caches : PagedKVCache, or list of them
        Several where layers differ; all have the same number of blocks, on one device, and are of
        one framework.
    num_blocks : int
        Blocks in host memory, which is pinned for caches on a GPU.
    bytes_per_step : int
        The bytes that `advance` copies each way, or up to a quarter or a block more. Give less than
        the bus carries during a step.

    Attributes
    ----------
    num_blocks, bytes_per_step : int
    bytes_per_block : int
        In all layers of all caches.

    Raises
    ------
    CupyCacheError
        One of its kinds, from all methods, before anything is changed.

    Examples
    --------
    >>> cache = PagedKVCache.allocate(2, 8, 4, 1, 16, dtype="float32", device="cpu")
    >>> space = SwapSpace(cache, 4)
    >>> space.swap_out([(5, 0), (2, 1)])  # blocks 5 and 2 to places 0 and 1
    >>> coming = space.prefetch([0, 1])
    >>> space.advance()
    >>> coming.is_done()
    True
    >>> coming.swap_in([(0, 7), (1, 3)])
    """

    num_blocks: int
    bytes_per_block: int
    bytes_per_step: int

    def __init__(
        self,
        caches: PagedKVCache | Sequence[PagedKVCache],
        num_blocks: int,
        *,
        bytes_per_step: int = 64 << 20,
    ) -> None:
        self._caches = _plain(caches)
        first = _first_of(self._caches)
        self.num_blocks = contract.integer(NAME, "num_blocks", num_blocks, 0)
        self.bytes_per_step = contract.integer(NAME, "bytes_per_step", bytes_per_step, 1)
        self.bytes_per_block = sum(cache.bytes_per_block for cache in self._caches)
        self._framework, self._device = first.framework, first.device
        self._bus = self._new_bus()
        self._host = [
            self._bus.zeros((self.num_blocks, cache.bytes_per_block)) for cache in self._caches
        ]
        self._filled = np.zeros(self.num_blocks, bool)  # blocks that were swapped out, ever
        self._moves: collections.deque[_Move] = collections.deque()  # not known to be done

    def _new_bus(self):
        return _Memory() if self._device.kind == "cpu" else _CopyEngines(self._device.index)

    def __reduce__(self) -> Any:
        raise CopyError(f"{NAME}: it cannot be copied or pickled: copies may be on their way")

    def __repr__(self) -> str:
        size = self.num_blocks * self.bytes_per_block / 2**20
        return (
            f"<{NAME} of {errors.counted(self.num_blocks, 'block')} in host memory, "
            f"{size:.2f} MiB, for blocks on {self._device}: {self.num_moving} on their way>"
        )

    @property
    def num_moving(self) -> int:
        """How many blocks are on their way, out or in."""
        self._let_go()
        return sum(len(move.places) for move in self._moves)

    def swap_out(self, block_mapping: Pairs, *, stream: StreamLike | None = None) -> None:
        """Begin to move blocks to host memory. Work that is enqueued on the steps' stream from now
        on may overwrite them.

        Parameters
        ----------
        block_mapping : sequence of (block of the caches, block in host memory), or array [n, 2]
            What `BlockTables.swap_out` returns. In host memory.
        stream : optional
            Of the steps; by default the current one of the caches' framework.
        """
        op = f"{NAME}.swap_out"
        pairs = _in_host_memory(op, PAIRS, block_mapping)
        mappings.check(op, pairs, self._caches[0].num_blocks, self.num_blocks)
        if not pairs.count:
            return
        steps = self._stream_of_steps(op, stream)
        blocks, places = pairs.numbers[pairs.numbers[:, 1].argsort()].T
        make = functools.partial(making.empty, stream=steps)
        packed = [self._buffer(make, len(places), cache) for cache in self._caches]
        for cache, buffer in zip(self._caches, packed):
            cache.pack_blocks(blocks, buffer, layout="page_first", stream=stream)
        self._moves.append(_Move(self, True, places.tolist(), packed, self._bus.point(steps)))
        self._filled[places] = True

    def prefetch(self, host_blocks: Indices) -> Prefetch:
        """Begin to copy blocks back to the GPU, as they are now. The caches are not written before
        `Prefetch.swap_in`.

        Forget it where the sequence ends, or other sequences' blocks are swapped out to these: it
        would bring what they held at this call.

        Parameters
        ----------
        host_blocks : sequence of int, or array [n]
            Blocks in host memory, in any order: `BlockTables.blocks` of sequences that are swapped
            out. One that is given twice is copied once.
        """
        op = f"{NAME}.prefetch"
        places = np.unique(_in_host_memory(op, PLACES, host_blocks).numbers).tolist()
        for place in places:
            if not 0 <= place < self.num_blocks:
                expected = f"blocks in 0..{self.num_blocks - 1}"
                raise errors.wrong("value", f"{op}: host_blocks", expected, place)
            if not self._filled[place]:
                expected = "blocks that were swapped out"
                raise errors.wrong("value", f"{op}: host_blocks", expected, place)
        self._stream_of_steps(op, None)
        packed = [self._buffer(self._bus.empty, len(places), cache) for cache in self._caches]
        self._moves.append(_Move(self, False, places, packed))
        return Prefetch(self, self._moves[-1])

    def advance(self) -> None:
        """Begin the next copies, of about `bytes_per_step` each way. Call it once beside each step,
        when the step's own copies are enqueued. Nothing waits."""
        self._let_go()
        left = {True: self.bytes_per_step, False: self.bytes_per_step}  # bytes out, and in
        for move in self._moves:
            if not move.may_begin():
                break
            while move.pieces and left[move.out] > 0:
                left[move.out] -= move.copy_next()
            if move.pieces:
                break  # in order: blocks that are fetched may still be on their way out
        if self._moves:
            self._bus.keep((self._host, self._moves), self._bus.stream)

    def _let_go(self):
        """Drop the buffers of copies that are done."""
        while self._moves and self._moves[0].is_done():
            self._moves.popleft()

    def _finish(self, last):
        """Wait until a move is done, and those before it."""
        for move in list(self._moves):
            move.finish()
            if move is last:
                break
        self._let_go()

    def _buffer(self, make, count, cache):
        """Memory for packed blocks, on a cache's device."""
        shape = count, cache.bytes_per_block
        return make(self._framework, self._device, shape, formats.UINT8)

    def _stream_of_steps(self, op, stream):
        """The address of the steps' stream; None on the CPU."""
        if stream is not None:
            stream = streams.pointer(op, stream)
        if self._device.kind == "cpu":
            return None
        index = self._device.index
        if stream is None:
            stream = streams.current(self._framework, index)()
        if driver.active.capturing(stream, index):
            raise CaptureError(
                f"{op} on {self._device}: a graph would move the same blocks at every replay; call "
                "it outside the capture"
            )
        return stream


class Prefetch:
    """Blocks on their way from host memory to the GPU: see `SwapSpace.prefetch`."""

    def __init__(self, space: SwapSpace, move: Any) -> None:
        self._space, self._move = space, move

    def is_done(self) -> bool:
        """Whether the blocks have arrived. `SwapSpace.advance` brings them."""
        return self._move.is_done()

    def wait(self) -> None:
        """Copy at once, without regard for steps, and wait until the blocks have arrived."""
        self._space._finish(self._move)

    def swap_in(self, block_mapping: Pairs, *, stream: StreamLike | None = None) -> None:
        """Write the arrived blocks into blocks of the caches, in the order of the steps.

        Parameters
        ----------
        block_mapping : sequence of (block in host memory, block of the caches), or array [n, 2]
            What `BlockTables.swap_in` returns: some or all of the prefetched blocks.
        stream : optional
            Of the steps; by default the current one of the caches' framework.
        """
        op, space = "Prefetch.swap_in", self._space
        steps = space._stream_of_steps(op, stream)
        pairs = _in_host_memory(op, PAIRS, block_mapping)
        mappings.check(op, pairs, space.num_blocks, space._caches[0].num_blocks)
        if not self.is_done():
            name, way_out = f"{op}: block_mapping", "ask is_done(), or wait()"
            expected = "blocks that are there"
            raise errors.wrong("order", name, expected, "some on their way", way_out)
        places, blocks = pairs.numbers[pairs.numbers[:, 0].argsort()].T.tolist()
        known = {place: row for row, place in enumerate(self._move.places)}
        for place in places:
            if place not in known:
                name, expected = f"{op}: block_mapping", "blocks that were asked for"
                raise errors.wrong("value", name, expected, place)
        for at, row, count in _runs([known[place] for place in places], len(places)):
            ids = blocks[at : at + count]
            for cache, packed in zip(space._caches, self._move.packed):
                part = packed[row : row + count]
                cache.unpack_blocks(part, ids, layout="page_first", stream=stream)
        space._bus.keep(self._move.packed, steps)


class _Move:
    """Packed blocks, and the copies between them and host memory.

    out : whether they go to host memory, or come from there.
    places : the blocks in host memory, ascending; row i of each buffer in ``packed`` belongs to
        ``places[i]``.
    pieces : copies that have not begun, (destination, source, bytes).
    ready : an event behind the packing; None where there is nothing to wait for.
    """

    def __init__(self, space, out, places, packed, ready=None):
        self.out, self.places, self.packed, self._ready = out, places, packed, ready
        self._bus, self._done, self.pieces = space._bus, None, collections.deque()
        most = max(1, space.bytes_per_step // PARTS // max(1, space.bytes_per_block))
        for buffer, host in zip(packed, space._host):
            here, there = arrays.view(buffer, f"{NAME}: buffer").ptr, host.ctypes.data
            size = host.shape[1]
            for row, place, count in _runs(places, most):
                ends = there + place * size, here + row * size
                self.pieces.append((*(ends if out else ends[::-1]), count * size))

    def may_begin(self):
        """Whether all is packed. A copy that began earlier would begin in the middle of a step."""
        return self._ready is None or self._ready.done()

    def copy_next(self):
        """Begin the next copy; returns its bytes."""
        destination, source, size = self.pieces.popleft()
        self._bus.copy(destination, source, size)
        if not self.pieces:
            self._done = self._bus.point(self._bus.stream)
        return size

    def is_done(self):
        return not self.pieces and (self._done is None or self._done.done())

    def finish(self):
        """Make all copies, and wait for them."""
        if self._ready is not None:
            self._ready.wait()
        while self.pieces:
            self.copy_next()
        if self._done is not None:
            self._done.wait()


class _CopyEngines:
    """Copies beside a GPU's steps: on a stream of their own, with pinned memory."""

    def __init__(self, device):
        self._device, self._owner = device, driver.active.new_stream(device)
        self.stream = self._owner.ptr

    def zeros(self, shape):
        return allocations.pinned_zeros(shape, np.dtype(np.uint8))

    def copy(self, destination, source, size):
        driver.active.copy(destination, source, size, self.stream, self._device)

    def empty(self, framework, device, shape, dtype):
        """A new array, which only these copies write."""
        return making.empty_of_stream(framework, device, shape, dtype, self._owner)

    def keep(self, objects, stream):
        """Keep objects until the work now on ``stream`` is done, even if the space is dropped."""
        streams.keep_until_done(objects, stream, self._device)

    def point(self, stream):
        """An event behind the work now on ``stream``."""
        return driver.active.event(stream, self._device)


class _Memory:
    """The same for caches in host memory: copies are made at once."""

    stream = None

    def zeros(self, shape):
        return np.zeros(shape, np.uint8)

    def copy(self, destination, source, size):
        ctypes.memmove(destination, source, size)

    def empty(self, framework, device, shape, dtype):
        return making.empty(framework, device, shape, dtype)

    def keep(self, objects, stream):
        del objects, stream

    def point(self, stream):
        del stream


def _plain(caches):
    """The caches in a list."""
    found = [caches] if issubclass(type(caches), PagedKVCache) else lists.plain_or_none(caches)
    if not found:
        expected, got = "a PagedKVCache, or a list of them", errors.shown(caches)
        raise errors.wrong("type", f"{NAME}: caches", expected, got)
    return list(found)


def _first_of(caches):
    """The first cache's description. Refuses caches with other numbers of blocks, on another device
    or of another framework."""
    for at, cache in enumerate(caches):
        name = f"{NAME}: caches[{at}]"
        if not issubclass(type(cache), PagedKVCache):
            got = type(cache).__name__
            raise errors.wrong("type", name, "a PagedKVCache", got)
        if not len(cache):
            raise errors.wrong("value", name, "one with layers", "one without")
        one, first = cache._described[0], caches[0]._described[0]
        contract.same_device(NAME, f"caches[{at}]", one.device, "caches[0]", first.device)
        if one.framework != first.framework:  # whose streams would be others
            expected = f"{first.framework} like caches[0]"
            raise errors.wrong("framework", name, expected, one.framework)
        if cache.num_blocks != caches[0].num_blocks:
            expected = f"{errors.counted(caches[0].num_blocks, 'block')}, as caches[0] has"
            raise errors.wrong("value", name, expected, cache.num_blocks)
    return first


def _in_host_memory(op, arg, chosen):
    """What is chosen, as `indices.Chosen`."""
    found = indices.read(op, arg, chosen, None)
    if type(found) is not indices.Chosen:
        raise errors.wrong("device", f"{op}: {arg.name}", "host memory", "a GPU")
    return found


def _runs(numbers, most):
    """(Index, number, count) of each run of at most ``most`` consecutive numbers."""
    at = 0
    while at < len(numbers):
        end = at + 1
        while end < min(len(numbers), at + most) and numbers[end] == numbers[end - 1] + 1:
            end += 1
        yield at, numbers[at], end - at
        at = end
