# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying many ranges of bytes, given by raw addresses."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import numpy as np

from .. import errors
from ..errors import MissingDependencyError
from ..runtime import (
    arrays,
    cuda,
    devices,
    dispatch,
    driver,
    launch,
    modules,
    params,
    streams,
    tracing,
)
from ..runtime.log import logger
from ..types import ArrayLike, StreamLike
from .shared import blocks

# kRanges of the kernel: 12 KiB of parameters. CUDA takes more than 4 since 12.1, the driver too. A
# launch with them takes 6 us, one with few takes 5.
MAX_RANGES = 512
CHUNK_BYTES = 8192  # that one thread block copies at a time
MAX_THREADS = 256
# Sizes are 32-bit in the kernel: longer ranges are cut.
MAX_RANGE_BYTES = 1 << 30
NAME = "swap_blocks_batch"
PARAMS = params.Struct(per_call="ranges:i64 chunks:i64", tail=f"table:u64[{3 * MAX_RANGES}]")
KERNEL = modules.Kernel(NAME, NAME, f"{NAME}<{CHUNK_BYTES}, {MAX_THREADS}>", PARAMS)
_ROW = np.dtype([("source", "<u8"), ("destination", "<u8"), ("end", "<u4"), ("bytes", "<u4")])


def swap_blocks_batch(
    src_ptrs: ArrayLike,
    dst_ptrs: ArrayLike,
    sizes: ArrayLike,
    is_src_access_order_any: bool = False,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Copy ``sizes[i]`` bytes from address ``src_ptrs[i]`` to ``dst_ptrs[i]``, for every i.

    Addresses may be on GPUs, in pinned and in other host memory, in any mixture. What a GPU reaches
    is copied by a kernel, whose parameters hold the addresses. Runs of 2 MiB and more over the bus
    go to the copy engines. Both are enqueued and can be captured in a CUDA graph. Neighbouring
    ranges are joined. Everything else is copied by the driver, one range after the other, and the
    call may wait. Where all the memory is on the host, it is copied at once.

    Parameters
    ----------
    src_ptrs, dst_ptrs : int64 array [n]
        Addresses, in host memory.
    sizes : int64 array [n]
        Bytes, likewise. A range of no bytes is ignored.
    is_src_access_order_any : bool
        Taken for compatibility: sources are read in the stream's order, as if it were False.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``dst_ptrs``
        (CuPy's for NumPy arrays), on a GPU that has a destination, or else a source.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written: arrays that do not match, a null address, a
        negative size, a range that ends where CUDA knows of no more memory like that it starts in,
        or one that overlaps a destination. Nothing else can be told from an address: it is the
        caller who keeps the memory alive, and who knows where one allocation ends if another
        follows without a gap. Of ordinary host memory CUDA knows nothing.

    Notes
    -----
    Names, order and meaning are those of vLLM's cache operation of the same name, which copies
    ranges that overlap in no defined order.
    """
    del is_src_access_order_any
    for name, column in (("src_ptrs", src_ptrs), ("dst_ptrs", dst_ptrs), ("sizes", sizes)):
        arrays.reader_for(column, f"{NAME}: {name}")  # a list would be taken too
        if arrays.is_torch(column):
            tracing.refuse(f"{NAME}: {name}")
    framework = arrays.framework_of(dst_ptrs, f"{NAME}: dst_ptrs")
    OP((src_ptrs, dst_ptrs, sizes), (framework,), stream)


class _Plan:
    """Copies of ranges; where they are is found at each call."""

    def __init__(self, framework):
        self._framework = framework
        self._launchers = {}  # by GPU

    def run(self, call):
        """Check the ranges, and copy them."""
        given = [column.numbers for column in call.values]
        sources, destinations, sizes = given
        if sizes.min() <= 0:
            _check_ranges(*given)
            used = sizes > 0
            sources, destinations, sizes = (column[used] for column in given)
            if not len(sizes):
                return
        largest, ordered = int(sizes.max()), np.sort(destinations)
        of = _Ranges(sources, sizes, sources.min(), sources.max(), largest)
        to = _Ranges(destinations, sizes, ordered[0], ordered[-1], largest)
        if min(of.low, to.low) <= 0 or max(of.high, to.high) > _MOST:
            _check_ranges(*given)
        _check_apart(of, to, ordered[1:] - ordered[:-1])
        if not driver.gpus():
            if cuda.in_use_without_cupy():  # whose memory it is cannot be told
                why, way_out = cuda.no_gpu()
                raise MissingDependencyError(
                    f"{NAME}: the addresses may be those of a GPU, which this process uses, and "
                    f"{why}; {way_out}"
                )
            _copy_on_host(sources, destinations, sizes)
            return
        from_sides, to_sides = _locate("src_ptrs", of), _locate("dst_ptrs", to)
        on_gpu = [s.device for s in (*to_sides.all, *from_sides.all) if s.device.kind == "cuda"]
        if not on_gpu:
            _copy_on_host(sources, destinations, sizes)
            return
        device, stream = on_gpu[0], call.stream
        if stream is None:
            stream = streams.current(self._framework, device.index)()
        if _PAGEABLE in (*from_sides.all, *to_sides.all):
            logger.warning(
                "%s: host memory is not pinned; the driver stages each copy, and may wait", NAME
            )
        joined = _join(sources, destinations, sizes, from_sides, to_sides)
        _copy(self._launcher(device.index), device, stream, from_sides, to_sides, *joined)

    def _launcher(self, gpu):
        if gpu not in self._launchers:
            self._launchers[gpu] = launch.Launcher(KERNEL, gpu)
        return self._launchers[gpu]


# --- the arguments --------------------------------------------------------------------------------


def _plan(op, described, options):
    for arg, array in zip(op.args, described):
        if array is not None:
            raise errors.wrong("device", f"{NAME}: {arg.name}", "host memory", array.device)
    return _Plan(*options)


def _count(extents, options, scalars):
    del options, scalars
    if len(set(extents)) > 1:
        name, got = ("dst_ptrs", extents[1]) if extents[1] != extents[0] else ("sizes", extents[2])
        got = f"[{got}] (n = {got} where src_ptrs has {extents[0]})"
        raise errors.wrong("shape", f"{NAME}: {name}", f"[n={extents[0]}]", got)
    return extents[0], ()


_MOST = np.iinfo(np.int64).max


class _Ranges:
    """The ranges of one side. ``low``: the first start. ``high``: no range reaches further."""

    __slots__ = ("high", "largest", "low", "sizes", "starts")

    def __init__(self, starts, sizes, first, last, largest):
        self.starts, self.sizes, self.largest = starts, sizes, largest
        self.low, self.high = int(first), int(last) + largest

    def end(self):
        """How far they reach."""
        return int((self.starts + self.sizes).max())


def _check_ranges(sources, destinations, sizes):
    _require("sizes", sizes, sizes >= 0, "0 bytes or more")
    most = _MOST - sizes
    for name, column in (("src_ptrs", sources), ("dst_ptrs", destinations)):
        _require(name, column, (column > 0) | (sizes == 0), "an address that is not null")
        _require(name, column, column <= most, "an address of that many bytes")


def _require(name, column, good, expected):
    if not good.all():
        row = int(np.argmin(good))
        raise errors.wrong("value", f"{NAME}: {name}", expected, f"{column[row]} in row {row}")


def _check_apart(of, to, steps):
    """Refuse ranges that overlap where one of them is written: they are copied all at once.
    ``steps``: from each destination to the next."""
    if of.low >= to.high or of.high <= to.low:
        if steps.min(initial=to.largest) >= to.largest:  # as at most calls
            return
    sources, destinations, sizes = of.starts, to.starts, to.sizes
    order = np.argsort(destinations)
    starts = destinations[order]
    ends = starts + sizes[order]
    twice = starts[1:] < ends[:-1]
    if twice.any():
        at = int(np.argmax(twice))
        _refuse_overlap("dst_ptrs", starts[at + 1], starts[at], ends[at])
    if sources.min() >= ends[-1] or (sources + sizes).max() <= starts[0]:
        return
    # The first destination that ends behind each source's start.
    near = np.minimum(np.searchsorted(ends, sources, side="right"), len(ends) - 1)
    shared = (starts[near] < sources + sizes) & (ends[near] > sources)
    if shared.any():
        row = int(np.argmax(shared))
        _refuse_overlap("src_ptrs", sources[row], starts[near[row]], ends[near[row]])


def _refuse_overlap(name, address, start, end):
    expected = "ranges that overlap no other destination"
    got = f"{address:#x} where {start:#x} to {end:#x} is written"
    raise errors.wrong("value", f"{NAME}: {name}", expected, got, "copy in two calls")


# --- where the memory is --------------------------------------------------------------------------


class _Side(NamedTuple):
    """A kind of memory that ranges are in. A GPU reaches it at the address plus ``shift``; None if
    none does."""

    device: devices.Device
    shift: int | None


class _Sides(NamedTuple):
    """Of every range, an index into ``all``, and the number of its allocation; None where there is
    only one."""

    all: list
    index: np.ndarray | None
    allocation: np.ndarray | None

    def are(self, number, which):
        """Whether each of the ranges ``which`` is in the memory of this number."""
        return True if self.index is None else self.index[which] == number


_PAGEABLE = _Side(devices.CPU, None)


def _locate(name, ranges):
    """Where each range is, asking once for each allocation."""
    found = driver.active.allocation(ranges.low)
    if (
        found is not None
        and found.start < found.end
        and (found.end >= ranges.high or found.end >= ranges.end())
    ):  # one allocation holds them all
        return _Sides([_Side(found.device, found.shift)], None, None)
    addresses, sizes = ranges.starts, ranges.sizes
    order = np.argsort(addresses)
    starts, ends = addresses[order], (addresses + sizes)[order]
    sides, index, allocation = [], np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    at = asked = 0
    while at < len(order):
        found = driver.active.allocation(int(starts[at]))
        side = _PAGEABLE if found is None else _Side(found.device, found.shift)
        behind = at + 1
        if found is not None and found.end > starts[at]:
            behind = int(np.searchsorted(starts, found.end))
            _check_inside(name, found, int(ends[at:behind].max()))
        if side not in sides:
            sides.append(side)
        index[order[at:behind]] = sides.index(side)
        allocation[order[at:behind]] = asked
        at, asked = behind, asked + 1
    return _Sides(sides, index, allocation)


def _check_inside(name, found, end):
    """Require the memory up to ``end`` to be there. Allocations that are mapped piece by piece go
    on in the next one."""
    while found.end < end:
        following = driver.active.allocation(found.end)
        if following is None or following[2:] != found[2:]:
            got = f"one up to {end:#x} where {found.device} memory ends at {found.end:#x}"
            raise errors.wrong("value", f"{NAME}: {name}", "ranges inside their allocations", got)
        found = following


# --- copying --------------------------------------------------------------------------------------


def _copy_on_host(sources, destinations, sizes):
    for source, destination, size in zip(*(c.tolist() for c in (sources, destinations, sizes))):
        ctypes.memmove(destination, source, size)


def _join(sources, destinations, sizes, from_sides, to_sides):
    """One range for each run of neighbours: (sources, destinations, sizes, index of the first)."""
    joined = destinations[1:] - destinations[:-1] == sizes[:-1]
    if not np.count_nonzero(joined):
        return sources, destinations, sizes, slice(None)
    joined &= sources[1:] == sources[:-1] + sizes[:-1]
    for sides in (from_sides, to_sides):
        if sides.allocation is not None:
            joined &= sides.allocation[1:] == sides.allocation[:-1]
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    return sources[first], destinations[first], np.add.reduceat(sizes, first), first


def _copy(launcher, device, stream, from_sides, to_sides, sources, destinations, sizes, first):
    """Enqueue the copies, those between one pair of sides after the other."""
    for i, source in enumerate(from_sides.all):
        for j, destination in enumerate(to_sides.all):
            columns = sources, destinations, sizes
            if len(from_sides.all) > 1 or len(to_sides.all) > 1:
                chosen = from_sides.are(i, first) & to_sides.are(j, first)
                columns = [column[chosen] for column in columns]
            if len(columns[0]):
                _copy_between(launcher, device, stream, source, destination, *columns)


def _copy_between(launcher, device, stream, source, destination, sources, destinations, sizes):
    least, largest = _least_for_engines(device, source, destination), int(sizes.max())
    by_kernel, others = slice(None), ()
    if largest >= least:
        by_kernel = sizes < least
        others = np.flatnonzero(~by_kernel).tolist()
    if len(others) < len(sizes):
        _launch(
            launcher, stream, sources[by_kernel] + source.shift,
            destinations[by_kernel] + destination.shift, sizes[by_kernel],
            blocks.most_blocks(source.device, destination.device), largest > MAX_RANGE_BYTES,
        )  # fmt: skip
    for row in others:
        size = int(sizes[row])
        blocks.copy(int(destinations[row]), int(sources[row]), size, size, stream, device.index)


def _least_for_engines(device, source, destination):
    """The bytes from which on a range between these sides is the copy engines': the kernel takes
    what ``device`` reaches, short of what they do faster."""
    if source.device == destination.device == device:
        return math.inf
    sides = (source, destination)
    reached = None not in (source.shift, destination.shift)
    if not reached or {s.device for s in sides} != {device, devices.CPU}:
        return 0
    return blocks.RUN_BYTES


def _launch(launcher, stream, sources, destinations, sizes, limit, has_long):
    if has_long:
        sources, destinations, sizes = _cut(sources, destinations, sizes)
    rows = np.empty(len(sizes), _ROW)
    rows["source"], rows["destination"], rows["bytes"] = sources, destinations, sizes
    ends = (-(-sizes // CHUNK_BYTES)).cumsum()
    before = 0
    for first in range(0, len(sizes), MAX_RANGES):
        part, its_ends = rows[first : first + MAX_RANGES], ends[first : first + MAX_RANGES]
        part["end"] = its_ends - before
        count = int(its_ends[-1]) - before
        before += count
        grid = count if limit is None else min(count, limit)
        launcher.enqueue((grid, 1, 1), MAX_THREADS, stream, len(part), count, tail=part.tobytes())


def _cut(sources, destinations, sizes):
    """The same ranges in pieces of at most `MAX_RANGE_BYTES`."""
    pieces = -(-sizes // MAX_RANGE_BYTES)
    of = np.repeat(np.arange(len(sizes)), pieces)
    number = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = number * MAX_RANGE_BYTES
    return (
        sources[of] + offset,
        destinations[of] + offset,
        np.minimum(sizes[of] - offset, MAX_RANGE_BYTES),
    )


OP = dispatch.Op(
    NAME,
    args=[
        dispatch.Arg(name, varies=dispatch.ROWS, chosen=True)
        for name in ("src_ptrs", "dst_ptrs", "sizes")
    ],
    plan=_plan,
    destination=1,
    count=_count,
)
