# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Chosen items, whole blocks or the tokens of single slots, of all layers: where each lies in one
contiguous buffer, and the plan that moves them.

Shared by the operations that pack, unpack and zero.
"""

import functools
import math
import struct
from typing import NamedTuple

import numpy as np

from ... import cpu
from ...errors import ArgumentError, ShapeError
from ...runtime import arrays, contract, formats, launch, modules, params
from ...runtime.log import logger
from . import block_numbers, blocks

# A packed buffer in host memory that is not pinned goes through a buffer of this size on the GPU.
STAGE_BYTES = 32 << 20
LAYOUTS = ("layer_first", "page_first")
MAX_THREADS = 256
ITEMS = 2  # vectors of each tensor that a thread has in flight
_MAX_WORKS = 2**31 - 1  # work indices are 32-bit in the kernel
_MAX_PACKED_NUMBER = 2**31  # numbers in the parameters are 32-bit, negative ones padding

_TENSOR = (
    "cache.block:i64 cache.outer:i64 cache.middle:i64 slot:i64 packed:i64 vectors:u32 "
    "middle_count:u32"
)
PARAMS = params.Struct(
    per_call="packed[0]:ptr packed[1]:ptr index:ptr index_stride:i64 items:i64 first:i64 "
    "layer_stride:i64",
    constant="limit:i64 vectors:i64 "
    + " ".join(f"tensors[{t}].{field}" for t in (0, 1) for field in _TENSOR.split()),
    tail=f"table:u64[{blocks.TABLE_WORDS}]",
)


class Move(NamedTuple):
    """What is done with the items: its spelling in the kernel, whether it writes the caches, and
    what the operation's argument for the buffer is called (None: there is no buffer)."""

    name: str
    writes_cache: bool
    buffer: str | None


PACK = Move("kPack", False, "out")
UNPACK = Move("kUnpack", True, "packed")
ZERO = Move("kZero", True, None)


def run(op, move, caches, numbers, stream, buffer=None, layout="layer_first", *, by_slot=False):
    """Check everything, then do it: what the operations are.

    ``numbers`` are slots if ``by_slot``, else blocks.
    """
    lists = _tensor_lists(op, caches)
    if stream is not None:
        stream = arrays.stream_pointer(stream)
    else:
        stream = blocks.stream_of(op, move.buffer, buffer) if move is PACK else None
        if stream is None and lists:
            stream = blocks.stream_of(op, "caches[0]", lists[0][0])
    tensors = _read_tensors(op, lists, stream)
    numbers = block_numbers.read(op, "slot_mapping" if by_slot else "block_ids", numbers, stream)
    if move.buffer is not None:
        buffer = _read_buffer(op, move.buffer, buffer, stream, written=move is PACK)
    if not tensors:
        return
    plan = plan_of(
        op, move, tuple(t.facts for t in tensors), len(tensors[0].addresses), by_slot, layout,
        None if numbers.device is None else numbers.device.dtype,
        16 if buffer is None else buffer.array.alignment,
        buffer is not None and buffer.device.kind == "cpu",
    )  # fmt: skip
    if numbers.device is not None:
        contract.same_device(op, numbers.name, numbers.device.device, "caches", plan.device)
    else:
        block_numbers.check(op, numbers, plan.limit, padding=by_slot, distinct=move is UNPACK)
    addresses = [layer.addresses for layer in tensors]
    if buffer is not None:
        _check_buffer(op, buffer, numbers.count, plan, addresses)
    plan.run([a for layer in zip(*addresses) for a in layer], numbers, stream, buffer)


def item_bytes(op, caches, by_slot):
    """The bytes of one block, or token, in all layers together."""
    lists = _tensor_lists(op, caches)
    if not lists:
        return 0
    tensors = _read_tensors(op, lists, blocks.stream_of(op, "caches[0]", lists[0][0]))
    facts, layers = tuple(t.facts for t in tensors), len(tensors[0].addresses)
    return plan_of(op, PACK, facts, layers, by_slot, LAYOUTS[0], None, 1, False).item_bytes


# --- the caches -----------------------------------------------------------------------------------


def _tensor_lists(op, caches):
    """``caches``, a list with one array or one tuple of arrays for each layer, as a list with all
    layers' arrays for each tensor of a layer. Empty where there are no layers."""
    blocks.require_list(op, "caches", caches)
    if not caches:
        return []
    first = caches[0]
    if not isinstance(first, (list, tuple)):
        return [caches]
    for index, layer in enumerate(caches):
        if not isinstance(layer, (list, tuple)) or not 1 <= len(layer) == len(first) <= 2:
            got = f"{len(layer)}" if isinstance(layer, (list, tuple)) else type(layer).__name__
            raise ShapeError(
                f"{op}: Invalid length of caches[{index}]: expected an array, or one or two of "
                f"them like caches[0], got {got}"
            )
    return list(zip(*caches))


def _read_tensors(op, lists, stream):
    """`_tensor_lists` as a tuple of `blocks.Layers`."""
    suffixes = ("",) if len(lists) == 1 else ("[0]", "[1]")
    return tuple(
        blocks.read_layers(op, "caches", tensors, stream, suffix)
        for tensors, suffix in zip(lists, suffixes)
    )


# --- the buffer -----------------------------------------------------------------------------------


class Buffer(NamedTuple):
    """A contiguous array as bytes."""

    name: str
    address: int
    size: int
    array: arrays.Array

    @property
    def device(self):
        return self.array.device


def _read_buffer(op, name, buffer, stream, written):
    """``buffer`` as a `Buffer`."""
    array = arrays.describe(arrays.read(buffer, f"{op}: {name}", stream), f"{op}: {name}")
    check = contract.Contract(op)
    check.contiguous(name, array, len(array.shape))
    if written:
        check.writable(name, array)
    return Buffer(name, array.ptr, math.prod(array.shape) * array.dtype.bytes, array)


def _check_buffer(op, buffer, count, plan, addresses):
    """Require a buffer that the plan's device reaches, with room for ``count`` items, and none of
    the caches' bytes in it. ``addresses`` are those of each tensor."""
    size = count * plan.item_bytes
    if buffer.device.kind != "cpu" or plan.device.kind == "cpu":
        contract.same_device(op, buffer.name, buffer.device, "caches", plan.device)
    if size > buffer.size:
        raise ShapeError(
            f"{op}: Invalid size of {buffer.name}: expected at least {size} bytes for {count} "
            f"items of {plan.item_bytes} bytes in all layers, got {buffer.size}"
        )
    if not size or buffer.device != plan.device:
        return
    for tensor, places in zip(plan.tensors, addresses):
        if 0 in tensor.shape:
            continue
        low, high = blocks.extent(tensor)
        begin, end = buffer.address - high, buffer.address + size - low
        if min(places) < end and begin < max(places):
            for layer, address in enumerate(places):
                if begin < address < end:
                    raise ArgumentError(
                        f"{op}: Invalid memory of {buffer.name}: expected memory of its own, got "
                        f"some that layer {layer} of caches lies in"
                    )


class Places(NamedTuple):
    """Where the items are in a buffer: the address of item 0 of layer 0 of each tensor, and the
    bytes from layer to layer. From item to item it is `Plan.packed_strides`."""

    starts: tuple
    layer: int

    def of_layer(self, layer, item=0, strides=(0, 0)):
        """The addresses of ``item`` of ``layer``."""
        return [s + layer * self.layer + item * stride for s, stride in zip(self.starts, strides)]


# --- the plan -------------------------------------------------------------------------------------


class Plan:
    """How chosen items of caches of one signature are moved.

    Parameters
    ----------
    op : str
    move : Move
    facts : tuple of arrays.Facts
        For each tensor of a layer, its ``ptr`` the alignment common to all layers.
    layers : int
    by_slot : bool
        Items are the tokens of slots, in caches [num_blocks, block_size, ...]; else blocks, in
        caches [num_blocks, ...].
    layout : str
        Of the buffer, one of `LAYOUTS`.
    index_dtype : formats.DType or None
        None: numbers travel in the parameters. Else they are read on the device.
    buffer_alignment : int
    on_host : bool
        There is a buffer, and it is in host memory.
    """

    def __init__(
        self, op, move, facts, layers, by_slot, layout, index_dtype, buffer_alignment, on_host
    ):
        if layout not in LAYOUTS:
            raise ArgumentError(
                f"{op}: Invalid value of layout: expected {' or '.join(LAYOUTS)}, got {layout!r}"
            )
        self.op, self.move, self.layers, self.by_slot = op, move, layers, by_slot
        names = ["caches"] if len(facts) == 1 else [f"caches[0][{t}]" for t in range(len(facts))]
        self.tensors = [arrays.describe(f, f"{op}: {n}") for f, n in zip(facts, names)]
        check = contract.Contract(op)
        pattern = "num_blocks block_size ..." if by_slot else "num_blocks ..."
        for name, tensor in zip(names, self.tensors):
            check.shape(name, tensor, pattern)
            check.device(name, tensor)
            if move.writes_cache:
                check.writable(name, tensor)
        self.device = self.tensors[0].device
        self.block_size = check.sizes["block_size"] if by_slot else None
        self.limit = check.sizes["num_blocks"] * (self.block_size if by_slot else 1)
        self.geometries = [
            _item_geometry(op, name, tensor, by_slot) for name, tensor in zip(names, self.tensors)
        ]
        self.sizes = [g.bytes for g in self.geometries]
        # Of one item in all layers.
        self.item_bytes = layers * sum(self.sizes)
        self.page_first = layout == "page_first"
        whole = [self.item_bytes] * len(self.sizes)
        self.packed_strides = tuple(whole if self.page_first else self.sizes)
        self.max_blocks = None
        if on_host:
            self.max_blocks = blocks.FROM_HOST_BLOCKS if move is UNPACK else blocks.TO_HOST_BLOCKS
        if self.device.kind == "cuda" and self.item_bytes:
            self._make_kernel(facts, index_dtype, buffer_alignment)

    def _make_kernel(self, facts, index_dtype, buffer_alignment):
        dense = self.by_slot and all(
            tensor.strides[0] == self.block_size * tensor.strides[1] for tensor in self.tensors
        )
        # Of (block, slot). Slots at one stride throughout are blocks of one slot.
        strides = [
            (tensor.strides[dense], tensor.strides[1] if self.by_slot else 0)
            for tensor in self.tensors
        ]
        block_size = 0 if not self.by_slot else 1 if dense else max(self.block_size, 1)
        vector = contract.vector_bytes(
            buffer_alignment,
            *(fact.ptr for fact in facts),
            *(n for pair in strides for n in pair),
            *(n for g in self.geometries for n in (g.run, *g.source[1:])),
        )
        runs = [0 if g.contiguous else g.run // vector for g in self.geometries]
        vectors = [size // vector for size in self.sizes]
        nested = any(g.outer > 1 for g in self.geometries)
        self.vectors = max(vectors)
        if self.vectors > _MAX_WORKS:
            raise ShapeError(f"{self.op}: items of {max(self.sizes)} bytes are too large")
        argument = "slot_mapping" if self.by_slot else "block_ids"
        index = "void" if index_dtype is None else formats.INDEX_NAMES[index_dtype.name]
        self.kernel = modules.Kernel(
            self.op,
            "pack_blocks",
            f"pack_blocks<cupy_cache::Move::{self.move.name}, {len(vectors)}, {vector}, {runs[0]}, "
            f"{runs[-1]}, {str(nested).lower()}, {block_size}, {ITEMS}, {index}, "
            f"{MAX_THREADS}>",
            PARAMS,
            guarded=() if index_dtype is None else (argument,),
        )
        constants = [
            (block, *g.source[1:], slot, packed, count, g.middle)
            for (block, slot), g, packed, count in zip(
                strides, self.geometries, self.packed_strides, vectors
            )
        ]
        first, second = (constants * 2)[:2]
        self._launcher = launch.Launcher(
            self.kernel, self.device.index, (self.limit, self.vectors, *first, *second)
        )

    def places(self, address, count):
        """The `Places` of ``count`` items in a buffer at ``address``."""
        if self.page_first:
            return Places((address, address + self.sizes[0]), sum(self.sizes))
        return Places((address, address + count * self.sizes[0]), count * sum(self.sizes))

    # --- running

    def run(self, addresses, numbers, stream, buffer=None):
        """Move the items ``numbers``, a checked `Numbers`.

        ``addresses`` are the caches', layer by layer, a layer's tensors together; ``buffer`` is a
        `Buffer` of sufficient size.
        """
        count = numbers.count
        if not count or not self.item_bytes:
            return
        if self.device.kind == "cpu":
            places = None if buffer is None else self.places(buffer.address, count)
            self._run_cpu(addresses, numbers.host, places)
            return
        if numbers.device is None and self.limit > _MAX_PACKED_NUMBER:
            raise ShapeError(
                f"{self.op}: Invalid device of {numbers.name}: expected the caches' GPU, since "
                f"there are more than {_MAX_PACKED_NUMBER} blocks or slots"
            )
        if buffer is None:
            self._enqueue(stream, addresses, Places((0, 0), 0), numbers, 0, count)
            return
        address = buffer.address
        if buffer.device.kind == "cpu":
            address = blocks.mapped_range(address, count * self.item_bytes, self.device.index)
            if address is None:
                self._run_staged(stream, addresses, buffer, numbers)
                return
        self._enqueue(stream, addresses, self.places(address, count), numbers, 0, count)

    def _enqueue(self, stream, addresses, places, numbers, begin, end):
        """Launch for items ``begin`` to ``end`` of the list; the first of them is at ``places``."""
        tensors = len(self.sizes)
        layers = len(addresses) // tensors
        # Room for at least half a table of numbers; more layers than that take another launch.
        group = min(layers, blocks.TABLE_WORDS // 2 // tensors)
        for layer in range(0, layers, group):
            pointers = addresses[layer * tensors : (layer + group) * tensors]
            table = struct.pack(f"<{len(pointers)}Q", *pointers)
            room = _MAX_WORKS // self.vectors
            if numbers.device is None:
                room = min(room, 2 * (blocks.TABLE_WORDS - len(pointers)))
            for first in range(begin, end, room):
                packed = places.of_layer(layer, first - begin, self.packed_strides * 2)
                items = min(room, end - first)
                index, stride, tail = 0, 0, table
                if numbers.device is None:
                    part = numbers.host[first : first + items]
                    tail += np.maximum(part, -1).astype("<i4").tobytes()
                else:
                    stride = numbers.device.strides[0]
                    index = numbers.device.ptr + first * stride
                self._launch(
                    stream, len(pointers) // tensors, items, tail, *packed, index, stride, items,
                    first, places.layer,
                )  # fmt: skip

    def _launch(self, stream, layers, items, tail, *values):
        works = items * self.vectors
        work_threads = launch.ceil_div(works * layers, ITEMS)
        threads = launch.block_threads(
            work_threads, launch.processors(self.device.index), MAX_THREADS
        )
        grid = launch.ceil_div(works, threads * ITEMS)
        if self.max_blocks is not None:
            grid = min(grid, max(1, self.max_blocks // layers))
        self._launcher.enqueue((grid, layers, 1), threads, stream, *values, tail=tail)

    # --- a buffer in host memory that is not pinned

    def _run_staged(self, stream, addresses, buffer, numbers):
        logger.warning(
            "%s: %s is not pinned; the driver stages its bytes, and may wait", self.op, buffer.name
        )
        count, tensors = numbers.count, len(self.sizes)
        host = self.places(buffer.address, count)
        pieces = list(self._pieces(count))
        largest = max(layers * items * sum(self.sizes) for _, layers, _, items in pieces)
        device = self.device.index
        # What is skipped keeps its bytes, so they have to make the round trip.
        skips = self.move is PACK and (numbers.device is not None or (numbers.host < 0).any())
        with launch.driver.staging(largest, stream, device) as address:
            for layer, layers, first, items in pieces:
                part = addresses[layer * tensors : (layer + layers) * tensors]
                staged = self.places(address, items)
                outside = host.of_layer(layer, first, self.packed_strides)
                if self.page_first or items == count:  # one stretch of the buffer
                    spans = [(outside[0], address, layers * items * sum(self.sizes))]
                else:
                    sizes = [items * size for size in self.sizes]
                    spans = list(zip(outside, staged.starts, sizes))
                if self.move is UNPACK or skips:
                    for at, inside, size in spans:
                        launch.driver.copy(inside, at, size, stream, device)
                self._enqueue(stream, part, staged, numbers, first, first + items)
                if self.move is PACK:
                    for at, inside, size in spans:
                        launch.driver.copy(at, inside, size, stream, device)

    def _pieces(self, count):
        """Cuts the work into parts of at most `STAGE_BYTES`, if an item of a layer has no more:
        yields (first layer, layers, first item, items)."""
        row = sum(self.sizes)
        if self.page_first:
            layers = group = self.layers
            items = max(1, STAGE_BYTES // self.item_bytes)
        else:
            layers = self.layers
            group = max(1, STAGE_BYTES // (count * row))
            items = count if count * row <= STAGE_BYTES else max(1, STAGE_BYTES // row)
        for layer in range(0, layers, group):
            for first in range(0, count, items):
                yield layer, min(group, layers - layer), first, min(items, count - first)

    # --- the CPU

    def _run_cpu(self, addresses, numbers, places):
        rows = slice(None)
        if self.by_slot and (numbers < 0).any():
            rows = np.flatnonzero(numbers >= 0)
        chosen = numbers[rows]
        index = np.divmod(chosen, self.block_size) if self.by_slot else (chosen,)
        for at, address in enumerate(addresses):
            layer, t = divmod(at, len(self.sizes))
            tensor = self.tensors[t]
            cache = arrays.as_numpy(address, tensor.shape, tensor.strides, tensor.dtype.bits)
            if places is None:
                cpu.zero(cache, index)
                continue
            packed = arrays.as_numpy(
                places.of_layer(layer)[t],
                (len(numbers), *tensor.shape[1 + self.by_slot :]),
                (self.packed_strides[t], *_dense_strides(tensor, 1 + self.by_slot)),
                tensor.dtype.bits,
            )
            if self.move is PACK:
                cpu.pack(cache, index, packed, rows)
            else:
                cpu.unpack(packed, rows, cache, index)


def _item_geometry(op, name, tensor, by_slot):
    """The `blocks.Geometry` from the cache's items to the buffer's, whose bytes are in the order of
    the dimensions."""
    lead = 1 + by_slot
    item = tensor._replace(
        shape=(tensor.shape[0], *tensor.shape[lead:]),
        strides=(tensor.strides[0], *tensor.strides[lead:]),
    )
    packed = item._replace(strides=(0, *_dense_strides(tensor, lead)))
    return blocks.geometry(op, name, item, packed)


def _dense_strides(tensor, lead):
    shape = tensor.shape[lead:]
    return [tensor.dtype.bytes * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


# A plan for each signature, remembered.
plan_of = functools.lru_cache(maxsize=256)(Plan)
