# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Moving whole blocks: their geometry, and the copy kernel."""

import struct
from typing import NamedTuple

import numpy as np

from ... import errors
from ...runtime import contract, driver, launch, modules, params, spelling

TABLE_WORDS = 480  # of 8 bytes: what 4 KiB of kernel parameters hold beside the other fields
MAX_THREADS = 256
# Thread blocks of a copy over the bus: enough to fill it (8 to 16 writing, more reading, because
# reads wait), few enough to leave the GPU to others. Within one GPU blocks are copied at the
# memory's speed, by a full grid.
_TO_HOST_BLOCKS = 16
_FROM_HOST_BLOCKS = 48
# Runs that are contiguous on both sides and have at least so many bytes go over the bus by the
# copy engines, which alone reach its ceiling, but pause 2 us between copies. To the host and from
# there they had, beside an H200, 91 and 88 % of it in runs of 1 MiB, and 98 and 97 % in runs of
# 4 MiB; the kernel has 95 and 92 % whatever the length.
RUN_BYTES = 2 << 20
# Vectors of each tensor that a thread has in flight. One; but more where that would take no more
# than a few waves of thread blocks, of which each waits for memory anew. With one and four, 64
# pairs of 32 layers take 95.4 and 95.9 us on an H100 (70.6 and 73.6 on an H200), 8 pairs 14.3 and
# 13.7, 1 pair 3.55 and 3.46; but 8 pairs of 1 layer, too few for four, 2.2 and 2.5.
ITEMS, WAVE_ITEMS = 1, 4
WAVE = range(256, 4097)  # thread blocks that `ITEMS` would take
BUS_ITEMS = 4  # gains a percent over two
# Pairs of one launch: block numbers are packed in 32 bits, work indices are 32-bit in the kernel.
_MAX_WORKS = 2**31 - 1


def _tensor_fields(index):
    sides = (f"tensors[{index}].{side}.{step}:i64" for side in ("from", "to") for step in
             ("block", "outer", "middle"))  # fmt: skip
    return " ".join((*sides, f"tensors[{index}].vectors:u32", f"tensors[{index}].middle_count:u32"))


PARAMS = params.Struct(
    per_call="pairs:i64 mapping:ptr",
    constant=f"from_blocks:i64 to_blocks:i64 {_tensor_fields(0)} {_tensor_fields(1)} "
    "slot_strides:i64[2] chunks:u32 unused:u32",
    tail=f"table:u64[{TABLE_WORDS}]",
)


def most_blocks(source, destination):
    """The most thread blocks of a copy between these devices; None: any number."""
    if source.kind == destination.kind:
        return None
    return _TO_HOST_BLOCKS if destination.kind == "cpu" else _FROM_HOST_BLOCKS


def interleaved(lists):
    """The addresses in several lists, in one: layer by layer, a layer's tensors together."""
    return [address for layer in zip(*lists) for address in layer]


class PointerTable(NamedTuple):
    """The layers of one launch: the first one, how many, the addresses of their tensors as bytes
    for the kernel's table, and the words that are left in it."""

    first: int
    layers: int
    pointers: bytes
    room: int


def pointer_tables(addresses, tensors):
    """A list of `PointerTable`, one for each launch, of addresses as `interleaved` gives them, with
    ``tensors`` for each layer."""
    tables, layers = [], len(addresses) // tensors
    # At least half of a table is left for block numbers; further layers take another launch.
    size = max(1, min(layers, TABLE_WORDS // 2 // tensors))
    for first in range(0, layers, size):
        part = addresses[first * tensors : (first + size) * tensors]
        pointers = struct.pack(f"<{len(part)}Q", *part)
        tables.append(PointerTable(first, len(part) // tensors, pointers, TABLE_WORDS - len(part)))
    return tables


class Mapped(NamedTuple):
    """Pinned memory from ``start`` to ``end``, in so many ``pieces`` one behind the other. GPUs
    reach it at its addresses plus ``shift``."""

    start: int
    end: int
    shift: int
    pieces: int


def mapped(begin, end):
    """The `Mapped` memory that these bytes of the host lie in; None if they are not pinned from the
    first to the last, or not reached in one range."""
    start, shift, at, pieces = begin, None, begin, 0
    while at < end:
        found = driver.active.allocation(at)
        if found is None or found.device.kind != "cpu" or shift not in (None, found.shift):
            return None
        if at == begin:
            start = found.start
        shift, at, pieces = found.shift, max(found.end, at + 1), pieces + 1
    return Mapped(start, at, shift or 0, pieces)


def pieces(address, size, block):
    """Cut ``size`` bytes of host memory, blocks of ``block`` bytes, where pinned memory begins or
    ends: a copy by the driver must not cross such an edge. Yields (offset, length). The first and
    the last byte of each block, or of its rest, are looked up."""
    begin = at = address
    while at < address + size:
        found = driver.active.allocation(at)
        if found is not None:
            if begin < at:
                yield begin - address, at - begin
            begin, at = at, min(max(found.end, at + 1), address + size)
            yield begin - address, at - begin
            begin = at
            continue
        end = min(at + block - (at - address) % block, address + size)
        while (last := driver.active.allocation(end - 1)) is not None and last.start > at:
            end = last.start
        at = end
    if begin < at:
        yield begin - address, at - begin


def copy(destination, source, size, block, stream, device):
    """Enqueue a copy by the driver, cut on both sides where `pieces` says."""
    for at, length in pieces(destination, size, block):
        for more, part in pieces(source + at, length, block):
            driver.active.copy(destination + at + more, source + at + more, part, stream, device)


# --- what a block looks like ----------------------------------------------------------------------


class Geometry(NamedTuple):
    """One tensor's blocks on two sides: ``outer * middle`` runs of ``run`` contiguous bytes, with
    (block, outer, middle) strides in bytes for each side."""

    run: int
    outer: int
    middle: int
    source: tuple
    destination: tuple

    @property
    def bytes(self):
        """Bytes of one block."""
        return self.run * self.outer * self.middle

    @property
    def contiguous(self):
        """Whether a block is one run on both sides."""
        return self.outer == self.middle == 1


def merge(dims, sizes):
    """Merge dimensions (extent, stride, stride on the other side), given from the innermost out,
    where they are adjacent on both sides. ``sizes``: the bytes of an element on each side. Returns
    a run without gaps, which may be a single element, and two dimensions around it, with an extent
    of 1 where there are fewer; None where more remain.
    """
    merged = [(1, *sizes)]
    for extent, *strides in dims:
        count, *inner = merged[-1]
        if extent == 1:
            continue
        if strides == [count * stride for stride in inner]:
            merged[-1] = (count * extent, *inner)
        else:
            merged.append((extent, *strides))
    if len(merged) > 3:
        return None
    return (*merged, (1, 0, 0), (1, 0, 0))[:3]


def geometry(op, name, source, destination):
    """The `Geometry` of the blocks (everything below dimension 0) of two `arrays.Array`.

    Dimensions are taken in the destination's memory order and merged where they are adjacent on
    both sides. At most two dimensions may remain around the contiguous run.
    """
    size = source.dtype.bytes
    dims = [*zip(source.shape[1:], source.strides[1:], destination.strides[1:])]
    merged = merge(sorted(reversed(dims), key=lambda dim: abs(dim[2])), (size, size))
    if merged is None:
        expected = "blocks of at most two dimensions around a contiguous run"
        got = (
            f"byte strides {list(source.strides)} and {list(destination.strides)} for shape "
            f"{list(source.shape)}"
        )
        raise errors.wrong("strides", f"{op}: {name}", expected, got)
    (run, _, _), middle, outer = merged
    return Geometry(
        run * size,
        outer[0],
        middle[0],
        (source.strides[0], outer[1], middle[1]),
        (destination.strides[0], outer[2], middle[2]),
    )


# --- the kernel -----------------------------------------------------------------------------------


class _Variant(NamedTuple):
    """A kernel, the threads of its thread blocks, and how many thread blocks copy one block of a
    cache."""

    threads: int
    chunks: int
    launcher: launch.Launcher


class CopyPlan:
    """Copies blocks of one or two tensors per layer, by the kernel on one GPU.

    Parameters
    ----------
    op : str
    tensors : list of (Geometry, alignment)
        One for each tensor of a layer; ``alignment`` covers all layers' addresses.
    in_place : bool
        Source and destination are the same tensors.
    source_blocks, destination_blocks : int
    mapping : arrays.Array or None
        None: pairs are in the kernel's parameters. Else the kernel reads them from this array.
    device : int
    max_blocks : int or None
        At most this many thread blocks, for copies that the bus limits: the other multiprocessors
        stay free.
    argument : str
        The operation's name for the pairs.
    block_size : int
        0 for pairs of blocks. Else pairs are of slots, in blocks of so many: ``source_blocks`` is
        the number of slots, and a Geometry describes one slot, but for its stride from block to
        block.
    slot_strides : tuple
        The bytes from slot to slot in a block, for each tensor.
    """

    def __init__(
        self, op, tensors, in_place, source_blocks, destination_blocks, mapping, device,
        max_blocks=None, argument="block_mapping", block_size=0, slot_strides=(0,),
    ):  # fmt: skip
        geometries = [g for g, _ in tensors]
        vector = contract.vector_bytes(
            *(a for _, a in tensors),
            *(n for g in geometries for n in (g.run, *g.source, *g.destination)),
            *slot_strides,
        )
        runs = [0 if g.contiguous else g.run // vector for g in geometries]
        nested = any(g.outer > 1 for g in geometries)
        vectors = [g.bytes // vector for g in geometries]
        if max(vectors) > _MAX_WORKS:
            expected = f"at most {_MAX_WORKS * vector} bytes at this alignment"
            got = max(g.bytes for g in geometries)
            raise errors.wrong("size", f"{op}: blocks", expected, got)
        self.op, self.count, self.in_place, self.argument = op, len(tensors), in_place, argument
        self.max_blocks = max_blocks
        self._most_blocks = max(source_blocks, destination_blocks)
        self._index_bytes = 0 if mapping is None else mapping.dtype.bytes
        second = (runs * 2)[1]
        constants = [source_blocks, destination_blocks]
        for g, n in (list(zip(geometries, vectors)) * 2)[:2]:
            constants += [*g.source, *g.destination, n, g.middle]
        constants += (*slot_strides, *slot_strides)[:2]

        def variant(items):
            threads = launch.block_threads(launch.ceil_div(max(vectors), items), 1, MAX_THREADS)
            chunks = launch.ceil_div(max(vectors), threads * items)
            arguments = (
                "copy_blocks", len(tensors), in_place, vector, runs[0], second, nested, items,
                block_size, spelling.indices(mapping), MAX_THREADS,
            )  # fmt: skip
            kernel = modules.Kernel(
                op,
                "copy_blocks",
                spelling.instance(*arguments),
                PARAMS,
                guarded=() if mapping is None else (argument,),
            )
            return _Variant(
                threads, chunks, launch.Launcher(kernel, device, (*constants, chunks, 0))
            )

        on_bus = max_blocks is not None
        self._usual = variant(BUS_ITEMS if on_bus else ITEMS)
        self._wave = self._usual if on_bus else variant(WAVE_ITEMS)
        self._launches = launch.Launches(self._launch_for)

    def tables(self, sources, destinations):
        """`pointer_tables` of addresses as `interleaved` gives them. In the kernel's tables a layer
        has its sources, then its destinations."""
        if self.in_place:
            return pointer_tables(sources, self.count)
        addresses = []
        for at in range(0, len(sources), self.count):
            part = slice(at, at + self.count)
            addresses += sources[part] + destinations[part]
        return pointer_tables(addresses, 2 * self.count)

    def enqueue_pairs(self, stream, tables, pairs):
        """Launch for ``pairs`` of blocks, `indices.Chosen`, in the layers of `tables`."""
        if not self._usual.chunks:
            return
        packed = pairs.words
        if packed is None:
            numbers = pairs.numbers
            if self._most_blocks > 2**32 <= numbers.max(initial=0):
                expected = f"numbers below {2**32} in host memory"
                raise errors.wrong("value", f"{self.op}: {self.argument}", expected, numbers.max())
            packed = numbers.astype(np.uint32).tobytes()
        for _, layers, pointers, room in tables:
            room = min(room, _MAX_WORKS // self._usual.chunks)
            for first in range(0, len(packed), 8 * room):
                part = packed[first : first + 8 * room]
                count = len(part) // 8
                self._launches.enqueue((count, layers), stream, (count, 0), pointers + part)

    def enqueue_mapping(self, stream, tables, mapping, count):
        """The same for ``count`` pairs in an array on the device, at the address ``mapping``."""
        if not self._usual.chunks:
            return
        room = _MAX_WORKS // self._usual.chunks
        step = 2 * self._index_bytes
        for _, layers, pointers, _ in tables:
            for first in range(0, count, room):
                pairs = min(room, count - first)
                values = pairs, mapping + first * step
                self._launches.enqueue((pairs, layers), stream, values, pointers)

    def _launch_for(self, size):
        """(Launcher, grid, threads) of a launch."""
        pairs, layers = size
        variant = self._wave if layers * pairs * self._usual.chunks in WAVE else self._usual
        blocks = pairs * variant.chunks
        if self.max_blocks is not None:
            blocks = min(blocks, max(1, self.max_blocks // layers))
        return variant.launcher, (blocks, layers, 1), variant.threads
