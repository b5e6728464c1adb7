# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying many ranges of bytes, given by raw addresses."""

import ctypes
from typing import NamedTuple

import numpy as np

from ..errors import ArgumentError, DeviceError, MissingDependencyError
from ..runtime import arrays, contract, formats, launch, modules, params
from ..runtime.log import logger
from .shared import blocks

MAX_RANGES = 160  # kRanges of the kernel: what the 4 KiB of kernel parameters hold
CHUNK_BYTES = 8192  # that one thread block copies at a time
MAX_THREADS = 256
# Sizes are 32-bit in the kernel: longer ranges are cut.
MAX_RANGE_BYTES = 1 << 30
PARAMS = params.Struct(per_call="ranges:i64 chunks:i64", tail=f"table:u64[{3 * MAX_RANGES}]")
KERNEL = modules.Kernel(
    "swap_blocks_batch", "swap_blocks_batch", f"swap_blocks_batch<{CHUNK_BYTES}, {MAX_THREADS}>",
    PARAMS,
)  # fmt: skip
_ROW = np.dtype([("source", "<u8"), ("destination", "<u8"), ("end", "<u4"), ("bytes", "<u4")])


def swap_blocks_batch(src_ptrs, dst_ptrs, sizes, is_src_access_order_any=False, *, stream=None):
    """Copy ``sizes[i]`` bytes from address ``src_ptrs[i]`` to ``dst_ptrs[i]``, for every i.

    Addresses may be on GPUs, in pinned and in other host memory, in any mixture. What a GPU reaches
    is copied by a kernel, whose parameters hold the addresses, except for runs of 2 MiB and more
    over the bus, which go to the copy engines; both are enqueued and can be captured in a CUDA
    graph. Neighbouring ranges are joined. Everything else is copied by the driver, one range after
    the other, and the call may wait. Where all the memory is on the host, it is copied at once.

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
    ArgumentError
        Or one of its kinds, before anything is written: arrays that do not match, a null address, a
        negative size, a range that leaves the allocation it starts in (of memory that CUDA knows),
        or one that overlaps a destination. Nothing else can be told from an address: it is the
        caller who keeps the memory alive.

    Notes
    -----
    Names, order and meaning are those of vLLM's cache operation of the same name, which copies
    ranges that overlap in no defined order.
    """
    del is_src_access_order_any
    op = "swap_blocks_batch"
    if stream is not None:
        stream = arrays.stream_pointer(stream)
    framework, (sources, destinations, counts) = _read(
        op, {"src_ptrs": src_ptrs, "dst_ptrs": dst_ptrs, "sizes": sizes}
    )
    if not len(counts):
        return
    _check_apart(op, sources, destinations, counts)
    if not _gpus():
        _copy_on_host(sources, destinations, counts)
        return
    from_sides = _locate(op, "src_ptrs", sources, counts)
    to_sides = _locate(op, "dst_ptrs", destinations, counts)
    on_gpu = [s.device for s in (*to_sides.all, *from_sides.all) if s.device.kind == "cuda"]
    if not on_gpu:
        _copy_on_host(sources, destinations, counts)
        return
    device = on_gpu[0]
    if stream is None:
        stream = launch.driver.current_stream(framework, device)
    if _PAGEABLE in (*from_sides.all, *to_sides.all):
        logger.warning(
            "%s: host memory is not pinned; the driver stages each copy, and may wait", op
        )
    joined = _join(sources, destinations, counts, from_sides, to_sides)
    _copy(device, stream, from_sides, to_sides, *joined)


# --- the arguments --------------------------------------------------------------------------------


def _read(op, named):
    """The framework of the second array, and all as int64 columns without ranges of no bytes."""
    check = contract.Contract(op)
    columns = []
    for name, value in named.items():
        array = arrays.view(value, f"{op}: {name}")
        check.shape(name, array, "n")
        check.dtype(name, array, formats.DTYPES["int64"])
        if array.device.kind != "cpu":
            raise DeviceError(
                f"{op}: Invalid device of {name}: expected host memory, got {array.device}"
            )
        if name == "dst_ptrs":
            framework = array.framework
        columns.append(arrays.as_numpy(array.ptr, array.shape, array.strides, array.dtype.numpy))
    *addresses, sizes = columns
    _require(op, "sizes", sizes, sizes >= 0, "0 bytes or more")
    for name, column in zip(named, addresses):
        _require(op, name, column, (column > 0) | (sizes == 0), "an address that is not null")
        most = np.iinfo(np.int64).max - sizes
        _require(op, name, column, column <= most, "an address of that many bytes")
    used = sizes > 0
    return framework, [column[used] for column in columns]


def _require(op, name, column, good, expected):
    if not good.all():
        row = int(np.argmin(good))
        raise ArgumentError(
            f"{op}: Invalid value of {name}: expected {expected}, got {column[row]} in row {row}"
        )


def _check_apart(op, sources, destinations, sizes):
    """Refuse ranges that overlap where one of them is written: they are copied all at once."""
    order = np.argsort(destinations, kind="stable")
    starts, ends = destinations[order], (destinations + sizes)[order]
    twice = starts[1:] < ends[:-1]
    if twice.any():
        at = int(np.argmax(twice))
        _refuse_overlap(op, "dst_ptrs", starts[at + 1], starts[at], ends[at])
    # The first destination that ends behind each source's start.
    near = np.minimum(np.searchsorted(ends, sources, side="right"), len(ends) - 1)
    shared = (starts[near] < sources + sizes) & (ends[near] > sources)
    if shared.any():
        row = int(np.argmax(shared))
        _refuse_overlap(op, "src_ptrs", sources[row], starts[near[row]], ends[near[row]])


def _refuse_overlap(op, name, address, start, end):
    raise ArgumentError(
        f"{op}: Invalid value of {name}: expected ranges that overlap no other destination, got "
        f"{address:#x} where {start:#x} to {end:#x} is written; copy in two calls"
    )


# --- where the memory is --------------------------------------------------------------------------


class _Side(NamedTuple):
    """A kind of memory that ranges are in. A GPU reaches it at the address plus ``shift``; None if
    none does."""

    device: arrays.Device
    shift: int | None


class _Sides(NamedTuple):
    """Of every range, an index into ``all``, and the number of its allocation."""

    all: list
    index: np.ndarray
    allocation: np.ndarray


_PAGEABLE = _Side(arrays.CPU, None)


def _gpus():
    try:
        return launch.driver.device_count()
    except MissingDependencyError:
        return 0


def _locate(op, name, addresses, sizes):
    """Where each range is, asking once for each allocation."""
    order = np.argsort(addresses, kind="stable")
    starts, ends = addresses[order], (addresses + sizes)[order]
    sides, index, allocation = [], np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    at = asked = 0
    while at < len(order):
        found = launch.driver.allocation(int(starts[at]))
        side = _PAGEABLE if found is None else _Side(found.device, found.shift)
        behind = at + 1
        if found is not None and found.end > starts[at]:
            behind = int(np.searchsorted(starts, found.end))
            _check_inside(op, name, found, int(ends[at:behind].max()))
        if side not in sides:
            sides.append(side)
        index[order[at:behind]] = sides.index(side)
        allocation[order[at:behind]] = asked
        at, asked = behind, asked + 1
    return _Sides(sides, index, allocation)


def _check_inside(op, name, found, end):
    """Require the memory up to ``end`` to be there. Allocations that are mapped piece by piece go
    on in the next one."""
    while found.end < end:
        following = launch.driver.allocation(found.end)
        if following is None or following[2:] != found[2:]:
            raise ArgumentError(
                f"{op}: Invalid value of {name}: expected ranges inside their allocations, got one "
                f"up to {end:#x} where {found.device} memory ends at {found.end:#x}"
            )
        found = following


# --- copying --------------------------------------------------------------------------------------


def _copy_on_host(sources, destinations, sizes):
    for source, destination, size in zip(*(c.tolist() for c in (sources, destinations, sizes))):
        ctypes.memmove(destination, source, size)


def _join(sources, destinations, sizes, from_sides, to_sides):
    """One range for each run of neighbours: (sources, destinations, sizes, index of the first)."""
    joined = (
        (sources[1:] == sources[:-1] + sizes[:-1])
        & (destinations[1:] == destinations[:-1] + sizes[:-1])
        & (from_sides.allocation[1:] == from_sides.allocation[:-1])
        & (to_sides.allocation[1:] == to_sides.allocation[:-1])
    )
    first = np.flatnonzero(np.concatenate(([True], ~joined)))
    return sources[first], destinations[first], np.add.reduceat(sizes, first), first


def _copy(device, stream, from_sides, to_sides, sources, destinations, sizes, first):
    """Enqueue the copies, those between one pair of sides after the other."""
    from_index, to_index = from_sides.index[first], to_sides.index[first]
    for i, source in enumerate(from_sides.all):
        for j, destination in enumerate(to_sides.all):
            chosen = (from_index == i) & (to_index == j)
            if not chosen.any():
                continue
            by_kernel = chosen & _kernel_takes(device, source, destination, sizes)
            if by_kernel.any():
                limit = None
                if destination.device.kind == "cpu":
                    limit = blocks.TO_HOST_BLOCKS
                elif source.device.kind == "cpu":
                    limit = blocks.FROM_HOST_BLOCKS
                _launch(
                    device, stream, sources[by_kernel] + source.shift,
                    destinations[by_kernel] + destination.shift, sizes[by_kernel], limit,
                )  # fmt: skip
            for row in np.flatnonzero(chosen & ~by_kernel).tolist():
                launch.driver.copy(
                    int(destinations[row]), int(sources[row]), int(sizes[row]), stream, device.index
                )


def _kernel_takes(device, source, destination, sizes):
    """Whether ranges between these sides are the kernel's: what ``device`` reaches, short of what
    the copy engines do faster."""
    if source.device == destination.device == device:
        return np.True_
    sides = (source, destination)
    reached = None not in (source.shift, destination.shift)
    if not reached or {s.device for s in sides} != {device, arrays.CPU}:
        return np.False_
    return sizes < blocks.RUN_BYTES


def _launch(device, stream, sources, destinations, sizes, limit):
    pieces = -(-sizes // MAX_RANGE_BYTES)
    if (pieces > 1).any():
        sources, destinations, sizes = _cut(sources, destinations, sizes, pieces)
    for first in range(0, len(sizes), MAX_RANGES):
        part = slice(first, first + MAX_RANGES)
        ends = np.cumsum(-(-sizes[part] // CHUNK_BYTES))
        table = np.empty(len(ends), _ROW)
        table["source"], table["destination"] = sources[part], destinations[part]
        table["end"], table["bytes"] = ends, sizes[part]
        chunks = int(ends[-1])
        grid = chunks if limit is None else min(chunks, limit)
        _launcher(device.index).enqueue(
            (grid, 1, 1), MAX_THREADS, stream, len(ends), chunks, tail=table.tobytes()
        )


def _cut(sources, destinations, sizes, pieces):
    """The same ranges in pieces of at most `MAX_RANGE_BYTES`."""
    of = np.repeat(np.arange(len(sizes)), pieces)
    number = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = number * MAX_RANGE_BYTES
    return (
        sources[of] + offset,
        destinations[of] + offset,
        np.minimum(sizes[of] - offset, MAX_RANGE_BYTES),
    )


_launchers = {}


def _launcher(device):
    if device not in _launchers:
        _launchers[device] = launch.Launcher(KERNEL, device)
    return _launchers[device]
