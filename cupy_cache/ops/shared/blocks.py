# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Moving whole blocks: lists of layers, the geometry of blocks, and the copy kernel's plan.

Shared by the operations that copy and swap blocks.
"""

import functools
import operator
import struct
from typing import NamedTuple

from ...errors import DeviceError, DTypeError, ShapeError, StrideError
from ...runtime import arrays, contract, formats, launch, modules, params, torch_tensors

TABLE_WORDS = 480  # with the fields before, what the 4 KiB of kernel parameters hold
MAX_THREADS = 256
# Thread blocks of a copy over the bus: enough to fill it (8 to 16 writing, more reading, because
# reads wait), few enough to leave the GPU to others. Within one GPU blocks are copied at the
# memory's speed, by a full grid.
TO_HOST_BLOCKS = 16
FROM_HOST_BLOCKS = 48
# What is contiguous on both sides and has at least this many bytes goes over the bus by the copy
# engines, which alone reach its ceiling, but pause 2 us between copies. On an H200's host they had
# 91 and 88 % of it (to the host, from there) in runs of 1 MiB, and 98 and 97 % in runs of 4 MiB;
# the kernel has 95 and 92 % whatever the length.
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
    "chunks:u32 unused:u32",
    tail=f"table:u64[{TABLE_WORDS}]",
)


# --- a list of layers -----------------------------------------------------------------------------


class Layers(NamedTuple):
    """One tensor of each layer, all alike: the facts of the first (its address replaced by the
    alignment common to all), and every address."""

    facts: arrays.Facts
    addresses: tuple

    def describe(self, name):
        """The `arrays.Array` that stands for all of them."""
        return arrays.describe(self.facts, name)


def require_list(op, name, caches):
    """Refuse anything but a list of arrays."""
    if not isinstance(caches, (list, tuple)):
        raise DTypeError(
            f"{op}: Invalid type of {name}: expected a list of arrays, one for each layer, got "
            f"{type(caches).__name__}"
        )


# {layers: the latest lists of as many torch tensors, as ((what tells such a list), (its facts))}
_known_lists = {}
_MAX_KNOWN_LISTS = 4


def read_layers(op, name, caches, stream, suffix=""):
    """Read a list of equally shaped, equally laid out arrays; None where it is empty. For errors,
    array i is called ``name[i]`` and the ``suffix``."""
    if not caches:
        return None
    for same, facts in _known_lists.get(len(caches), ()):
        if same(*caches):
            return _layers(facts, tuple(torch_tensors.addresses(caches)))
    first = arrays.read(caches[0], f"{op}: {name}[0]{suffix}", stream)._replace(keep=None)
    kinds = set(map(type, caches))
    if len(kinds) == 1 and arrays.all_torch([arrays.reader_for(caches[0], name)]):
        addresses, strides, metas = torch_tensors.read(caches)
        alike = strides.count(strides[0]) == metas.count(metas[0]) == len(caches)
        if alike:
            _know_list(caches, first)
    else:
        others = [
            arrays.read(cache, f"{op}: {name}[{index}]{suffix}", stream)
            for index, cache in enumerate(caches[1:], 1)
        ]
        addresses = [first.ptr, *(fact.ptr for fact in others)]
        alike = all(fact[1:5] == first[1:5] for fact in others)
    if not alike:
        for index, cache in enumerate(caches):
            fact = arrays.read(cache, name, stream)
            _refuse_layer(op, f"{name}[{index}]{suffix}", f"{name}[0]{suffix}", fact, first)
    return _layers(first, tuple(addresses))


@functools.lru_cache(maxsize=64)
def _layers(facts, addresses):
    common = functools.reduce(operator.or_, addresses, 16)
    return Layers(facts._replace(ptr=common & -common), addresses)


def _know_list(tensors, facts):
    same = torch_tensors.same_as(tensors)
    if same is not None:
        others = _known_lists.get(len(tensors), ())[: _MAX_KNOWN_LISTS - 1]
        _known_lists[len(tensors)] = ((same, facts), *others)


def _refuse_layer(op, name, first_name, fact, first):
    for what, error, index in (
        ("shape", ShapeError, 1),
        ("dtype", DTypeError, 3),
        ("device", DeviceError, 4),
        ("strides", StrideError, 2),
    ):
        if fact[index] != first[index]:
            raise error(
                f"{op}: Invalid {what} of {name}: expected {first[index]} like {first_name}, got "
                f"{fact[index]}"
            )


def stream_of(op, name, array):
    """The stream to work on for ``array`` before it is read: the current one of its framework; None
    on the CPU."""
    name = f"{op}: {name}"
    facts = arrays.read(array, name)._replace(ptr=0, shape=(), strides=(), keep=None)
    current_stream = current_stream_for(facts, name)
    return None if current_stream is None else current_stream()


@functools.lru_cache(maxsize=256)
def current_stream_for(facts, name):
    """What tells the current stream of an array's framework and device; None on the CPU."""
    array = arrays.describe(facts, name)
    return None if array.device.kind == "cpu" else arrays.current_stream_of(array)


def extent(array):
    """The bytes from the address of ``array``, which is not empty, to its first byte in memory and
    to behind its last one."""
    steps = [stride * (count - 1) for stride, count in zip(array.strides, array.shape)]
    low, high = sum(min(step, 0) for step in steps), sum(max(step, 0) for step in steps)
    return low, high + array.dtype.bytes


def mapped_range(address, size, device):
    """The address at which GPU ``device`` reaches these bytes of host memory; None if they are not
    pinned from the first to the last."""
    first, last = (launch.driver.mapped_address(a, device) for a in (address, address + size - 1))
    return first if None not in (first, last) and last - first == size - 1 else None


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


def geometry(op, name, source, destination):
    """The `Geometry` of the blocks (everything below dimension 0) of two `arrays.Array`.

    Dimensions are taken in the destination's memory order and merged where they are adjacent on
    both sides. At most two dimensions may remain around the contiguous run.
    """
    size = source.dtype.bytes
    dims = [
        (extent, s, d)
        for extent, s, d in zip(source.shape[1:], source.strides[1:], destination.strides[1:])
        if extent != 1
    ]
    dims.sort(key=lambda dim: -abs(dim[2]))
    merged = []
    for extent, s, d in dims:
        if merged and merged[-1][1] == s * extent and merged[-1][2] == d * extent:
            merged[-1] = (merged[-1][0] * extent, s, d)
        else:
            merged.append((extent, s, d))
    run = size
    if merged and merged[-1][1:] == (size, size):
        run *= merged.pop()[0]
    if len(merged) > 2:
        raise StrideError(
            f"{op}: Invalid strides of {name}: expected blocks of at most two dimensions around a "
            f"contiguous run, got byte strides {list(source.strides)} and "
            f"{list(destination.strides)} for shape {list(source.shape)}"
        )
    (outer, *outer_strides), (middle, *middle_strides) = [(1, 0, 0)] * (2 - len(merged)) + merged
    return Geometry(
        run,
        outer,
        middle,
        (source.strides[0], outer_strides[0], middle_strides[0]),
        (destination.strides[0], outer_strides[1], middle_strides[1]),
    )


# --- the kernel -----------------------------------------------------------------------------------


class _Way(NamedTuple):
    """A way to copy: threads of a thread block, how many of these a block of a cache takes, and the
    kernel."""

    threads: int
    chunks: int
    launcher: launch.Launcher


class CopyPlan:
    """How blocks of one or two tensors per layer are copied by the kernel on one GPU.

    Parameters
    ----------
    op : str
    tensors : list of (Geometry, alignment)
        One for each tensor of a layer; ``alignment`` covers all layers' addresses.
    in_place : bool
        Source and destination are the same tensors.
    source_blocks, destination_blocks : int
    mapping_dtype : formats.DType or None
        None: pairs travel in the parameters. Else they are read on the device.
    device : int
    max_blocks : int or None
        At most this many thread blocks (for copies that the bus limits, so that the other
        multiprocessors stay free).
    """

    def __init__(
        self, op, tensors, in_place, source_blocks, destination_blocks, mapping_dtype, device,
        max_blocks=None,
    ):  # fmt: skip
        geometries = [g for g, _ in tensors]
        vector = contract.vector_bytes(
            *(a for _, a in tensors),
            *(n for g in geometries for n in (g.run, *g.source, *g.destination)),
        )
        runs = [0 if g.contiguous else g.run // vector for g in geometries]
        nested = any(g.outer > 1 for g in geometries)
        vectors = [g.bytes // vector for g in geometries]
        if max(vectors) > _MAX_WORKS:
            raise ShapeError(
                f"{op}: blocks of {max(g.bytes for g in geometries)} bytes are too large"
            )
        self.op, self.count, self.in_place = op, len(tensors), in_place
        self.max_blocks = max_blocks
        self._most_blocks = max(source_blocks, destination_blocks)
        index = "void" if mapping_dtype is None else formats.INDEX_NAMES[mapping_dtype.name]
        second = (runs * 2)[1]
        constants = [source_blocks, destination_blocks]
        for g, n in (list(zip(geometries, vectors)) * 2)[:2]:
            constants += [*g.source, *g.destination, n, g.middle]

        def way(items):
            threads = launch.block_threads(launch.ceil_div(max(vectors), items), 1, MAX_THREADS)
            chunks = launch.ceil_div(max(vectors), threads * items)
            kernel = modules.Kernel(
                op,
                "copy_blocks",
                f"copy_blocks<{len(tensors)}, {str(in_place).lower()}, {vector}, {runs[0]}, "
                f"{second}, {str(nested).lower()}, {items}, {index}, {MAX_THREADS}>",
                PARAMS,
                guarded=() if mapping_dtype is None else ("block_mapping",),
            )
            return _Way(threads, chunks, launch.Launcher(kernel, device, (*constants, chunks, 0)))

        on_bus = max_blocks is not None
        self._usual = way(BUS_ITEMS if on_bus else ITEMS)
        self._wave = self._usual if on_bus else way(WAVE_ITEMS)

    def table(self, sources, destinations):
        """What `enqueue` needs of the layers: for each launch (layers, packed pointers, how many
        pairs fit beside them). ``sources`` and ``destinations`` are addresses, layer by layer, a
        layer's tensors together."""
        words = self.count * (1 if self.in_place else 2)
        layers = len(sources) // self.count
        # Room for at least half a table of pairs; more layers than that take another launch.
        group = min(layers, TABLE_WORDS // 2 // words)
        launches = []
        for first in range(0, layers, group):
            size = min(group, layers - first)
            table = sources[first * self.count : (first + size) * self.count]
            if not self.in_place:
                table = []
                for layer in range(first, first + size):
                    part = slice(layer * self.count, (layer + 1) * self.count)
                    table += sources[part] + destinations[part]
            room = TABLE_WORDS - len(table)
            launches.append((size, struct.pack(f"<{len(table)}Q", *table), room))
        return launches

    def enqueue(self, stream, table, pairs=None, mapping=None):
        """Launch for the layers of a `table`; ``pairs`` are `block_pairs.Pairs`, or ``mapping`` is
        an `arrays.Array` on the device."""
        if not self._usual.chunks:
            return
        packed = None if pairs is None else self._packed(pairs)
        for layers, pointers, room in table:
            if packed is None:
                self._enqueue_mapped(stream, pointers, layers, mapping)
            else:
                self._enqueue_pairs(stream, pointers, layers, room, packed)

    def _packed(self, pairs):
        if self._most_blocks > 2**32 <= pairs.numbers.max(initial=0):
            raise ShapeError(
                f"{self.op}: Invalid value of block_mapping: expected numbers below {2**32} in "
                f"host memory, got {pairs.numbers.max()}"
            )
        return pairs.packed()

    def _enqueue_pairs(self, stream, pointers, layers, room, packed):
        room = min(room, _MAX_WORKS // self._usual.chunks)
        for first in range(0, len(packed), 8 * room):
            part = packed[first : first + 8 * room]
            self._launch(stream, layers, len(part) // 8, 0, pointers + part)

    def _enqueue_mapped(self, stream, pointers, layers, mapping):
        room = _MAX_WORKS // self._usual.chunks
        step = 2 * mapping.dtype.bytes
        for first in range(0, mapping.shape[0], room):
            count = min(room, mapping.shape[0] - first)
            self._launch(stream, layers, count, mapping.ptr + first * step, pointers)

    def _launch(self, stream, layers, pairs, mapping, tail):
        way = self._wave if layers * pairs * self._usual.chunks in WAVE else self._usual
        blocks = pairs * way.chunks
        if self.max_blocks is not None:
            blocks = min(blocks, max(1, self.max_blocks // layers))
        way.launcher.enqueue((blocks, layers, 1), way.threads, stream, pairs, mapping, tail=tail)
