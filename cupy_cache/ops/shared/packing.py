# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Packing chosen items of all layers, whole blocks or the tokens of single slots, into one
contiguous buffer; unpacking and zeroing them. The operations share one plan.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ... import errors
from ...runtime import (
    arrays,
    contract,
    dispatch,
    dlpack,
    driver,
    launch,
    modules,
    params,
    spelling,
)
from ...runtime.bound import Bound
from ...runtime.devices import NOWHERE
from ...runtime.log import logger
from . import blocks, layered

# A packed buffer in host memory that is not pinned goes through a buffer of this size on the GPU.
STAGE_BYTES = 32 << 20
LAYOUTS = ("layer_first", "page_first")
MAX_THREADS = 256
ITEMS = 2  # vectors of each tensor that a thread has in flight
_WHOLE_BLOCKS = "of a cache whose blocks are x-packed pack whole blocks"
_MAX_WORKS = 2**31 - 1  # work indices are 32-bit in the kernel
_MAX_PACKED_INDEX = 2**31  # indices in the parameters are 32-bit; negative ones are padding

_TENSOR = "cache.block:i64 cache.outer:i64 cache.middle:i64 slot:i64 vectors:u32 middle_count:u32"
PARAMS = params.Struct(
    per_call="packed[0]:ptr packed[1]:ptr index:ptr index_stride:i64 items:i64 first:i64 "
    "layer_stride:i64 item_stride[0]:i64 item_stride[1]:i64",
    constant="limit:i64 vectors:i64 "
    + " ".join(f"tensors[{t}].{field}" for t in (0, 1) for field in _TENSOR.split()),
    tail=f"table:u64[{blocks.TABLE_WORDS}]",
)


class Direction(NamedTuple):
    """What an operation does with the items: its name in the kernel, whether it writes the caches,
    and the name of its argument for the buffer (None: it has none)."""

    name: str
    writes_cache: bool
    buffer: str | None


PACK = Direction("kPack", False, "out")
UNPACK = Direction("kUnpack", True, "packed")
ZERO = Direction("kZero", True, None)
SIZE = Direction("kPack", False, None)  # for `Operation.item_bytes`: nothing is moved


class Operation:
    """An operation on chosen items of all layers.

    Parameters
    ----------
    name : str
    direction : Direction
    by_slot : bool
        Items are the tokens of slots, in caches [num_blocks, block_size, ...]; else blocks, in
        caches [num_blocks, ...].
    """

    def __init__(self, name, direction, by_slot=False):
        self.name, self.direction, self.by_slot = name, direction, by_slot
        self._ops = {tensors: self._op(tensors) for tensors in (1, 2)}

    def _op(self, tensors):
        """The `dispatch.Op` for layers of ``tensors`` tensors each."""
        suffixes = ("",) if tensors == 1 else ("[0]", "[1]")
        index = "slot_mapping" if self.by_slot else "block_ids"
        written = self.direction.writes_cache
        args = [
            dispatch.Arg("caches", layers=True, suffix=suffix, written=written)
            for suffix in suffixes
        ]
        args.append(dispatch.Arg(index, varies=dispatch.ROWS, chosen=True))
        destination = 0
        if self.direction.buffer is not None:
            args.append(
                dispatch.Arg(self.direction.buffer, varies=dispatch.ROWS, written=not written)
            )
            if self.direction is PACK:
                destination = (len(args) - 1, 0)
        return dispatch.Op(
            self.name, args, self._plan, self._count, destination, options=("layout",)
        )

    def _plan(self, op, described, options):
        return Plan(op, self.direction, self.by_slot, described, *options)

    @staticmethod
    def _count(extents, options, scalars):
        del options, scalars
        count, *rows = extents
        return count, tuple(rows)

    def __call__(self, caches, chosen, stream, *buffer, layout=None):
        """Check everything, then run. ``layout``: that of ``buffer``, if there is one."""
        tensors = layered.tensor_lists(self.name, caches)
        objects = (*tensors, chosen, *buffer)
        self._ops[len(tensors)](objects, (layout,) if buffer else (), stream)

    def bound(self, name, tensors, layout=None):
        """The operation as a `bound.Bound`, whose name in errors is ``name``. ``tensors``: for
        each tensor of a layer, all layers' arrays. ``layout``: that of the buffer, if any."""
        op = self._ops[len(tensors)]
        fixed = {arg.name + arg.suffix: caches for arg, caches in zip(op.args, tensors)}
        options = (layout,) if self.direction.buffer is not None else ()
        return Bound(op, name, fixed, options)

    def item_bytes(self, caches):
        """The bytes of one item in all layers together."""
        tensors = layered.tensor_lists(self.name, caches)
        if not tensors[0]:
            return 0
        op = self._ops[len(tensors)]
        described = op.describe(op.read((*tensors, []), dlpack.LOOK).found)
        return len(tensors[0]) * sum(Plan(op, self.direction, self.by_slot, described).sizes)


# --- the buffer -----------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Items in a buffer: for each tensor the address of item 0 of layer 0, and the bytes
    from layer to layer. The bytes from item to item are the ``strides`` of `_Caches`."""

    starts: tuple
    layer: int

    def of_layer(self, layer, item=0, strides=(0, 0)):
        """The addresses of ``item`` of ``layer``."""
        return [s + layer * self.layer + item * stride for s, stride in zip(self.starts, strides)]


_NO_BUFFER = Packed((0, 0), 0)


# --- the plan -------------------------------------------------------------------------------------


class Plan:
    """Moves chosen items of caches of one signature.

    Parameters
    ----------
    op : dispatch.Op
    direction : Direction
    by_slot : bool
        See `Operation`.
    described : list of arrays.Array
        The tensors of a layer, each with the alignment common to all layers as its address; the
        chosen numbers, None where they are in host memory; and the buffer, if there is one.
    layout : str
        Of the buffer, one of `LAYOUTS`.
    """

    def __init__(self, op, direction, by_slot, described, layout="layer_first"):
        contract.choice(op.name, "layout", layout, LAYOUTS)
        self.op, self.direction, self.by_slot = op.name, direction, by_slot
        count = sum(arg.layers for arg in op.args)
        self.tensors, (chosen, *buffer) = described[:count], described[count:]
        self.argument, *self.buffer_name = (arg.name for arg in op.args[count:])
        check = contract.Contract(op.name)
        names = [arg.item(0) if count > 1 else arg.name for arg in op.args[:count]]
        for name, tensor in zip(names, self.tensors):
            if by_slot:
                layered.check_tokens(check, name, tensor, _WHOLE_BLOCKS)
            else:
                check.shape(name, tensor, "num_blocks ...")
            check.device(name, tensor)
            if direction.writes_cache:
                check.writable(name, tensor)
        self.device = self.tensors[0].device
        if chosen is not None:
            contract.same_device(op.name, self.argument, chosen.device, "caches", self.device)
        self.chosen = chosen
        self.block_size = check.sizes["block_size"] if by_slot else None
        self.limit = check.sizes["num_blocks"] * (self.block_size if by_slot else 1)
        self.geometries = [
            _item_geometry(op.name, name, tensor, by_slot)
            for name, tensor in zip(names, self.tensors)
        ]
        self.sizes = [g.bytes for g in self.geometries]
        self.layer_bytes = sum(self.sizes)  # of an item
        self._spans = [None if 0 in t.shape else t.span for t in self.tensors]
        self.page_first = layout == "page_first"
        self.buffer = buffer[0] if buffer else None
        self.max_blocks = None
        if self.buffer is not None:
            self._check_buffer(check)
        if self.device.kind == "cuda" and sum(self.sizes):
            self._make_kernel()

    def _check_buffer(self, check):
        (name,), buffer = self.buffer_name, self.buffer
        check.contiguous(name, buffer, len(buffer.shape))
        self._row_bytes = math.prod(buffer.shape[1:]) * buffer.dtype.bytes
        if self.direction is PACK:
            check.writable(name, buffer)
        if buffer.device.kind != "cpu" or self.device.kind == "cpu":
            contract.same_device(self.op, name, buffer.device, "caches", self.device)
        sides = self.device, buffer.device
        self.max_blocks = blocks.most_blocks(*(sides if self.direction is PACK else sides[::-1]))

    def _make_kernel(self):
        dense = self.by_slot and all(
            tensor.strides[0] == self.block_size * tensor.strides[1] for tensor in self.tensors
        )
        # (Block stride, slot stride). Where slots have one stride through all blocks, they count as
        # blocks of one slot.
        strides = [
            (tensor.strides[dense], tensor.strides[1] if self.by_slot else 0)
            for tensor in self.tensors
        ]
        block_size = 0 if not self.by_slot else 1 if dense else max(self.block_size, 1)
        vector = contract.vector_bytes(
            16 if self.buffer is None else self.buffer.alignment,
            *(tensor.ptr for tensor in self.tensors),
            *(n for pair in strides for n in pair),
            *(n for g in self.geometries for n in (g.run, *g.source[1:])),
        )
        runs = [0 if g.contiguous else g.run // vector for g in self.geometries]
        vectors = [size // vector for size in self.sizes]
        nested = any(g.outer > 1 for g in self.geometries)
        self.vectors = max(vectors)
        if self.vectors > _MAX_WORKS:
            expected = f"at most {_MAX_WORKS * vector} bytes at this alignment"
            raise errors.wrong("size", f"{self.op}: items of caches", expected, max(self.sizes))
        arguments = (
            "pack_blocks", f"cupy_cache::Direction::{self.direction.name}", len(vectors), vector,
            runs[0], runs[-1], nested, block_size, ITEMS, spelling.indices(self.chosen),
            MAX_THREADS,
        )  # fmt: skip
        kernel = modules.Kernel(
            self.op,
            "pack_blocks",
            spelling.instance(*arguments),
            PARAMS,
            guarded=() if self.chosen is None else (self.argument,),
        )
        constants = [
            (block, *g.source[1:], slot, count, g.middle)
            for (block, slot), g, count in zip(strides, self.geometries, vectors)
        ]
        first, second = (constants * 2)[:2]
        self._launcher = launch.Launcher(
            kernel, self.device.index, (self.limit, self.vectors, *first, *second)
        )
        self._most_items = _MAX_WORKS // self.vectors
        self._launches = launch.Launches(self._launch_for)

    # --- running

    def tables(self, values):
        """The `_Caches` at these addresses."""
        by_tensor, tensors = values[: len(self.tensors)], len(self.tensors)
        addresses, layers = blocks.interleaved(by_tensor), len(by_tensor[0])
        strides = [layers * self.layer_bytes] * tensors if self.page_first else self.sizes
        ends = [
            None if span is None else (min(each) + span[0], max(each) + span[1])
            for span, each in zip(self._spans, by_tensor)
        ]
        return _Caches(
            by_tensor, ends, layers, layers * self.layer_bytes, tuple(strides * 2)[:2], addresses,
            blocks.pointer_tables(addresses, tensors),
        )  # fmt: skip

    def run(self, call):
        """Check what the signature does not decide, then move."""
        chosen, *buffer = call.values[len(self.tensors) :]
        caches, items = call.tables, call.rows
        if self.chosen is None:
            distinct = self.direction is UNPACK
            layered.check_range(self.op, self.argument, chosen, self.limit, self.by_slot, distinct)
        work = _Work(self, caches, items, chosen, call.stream)
        if self.buffer is not None:
            self._check_room(buffer[0], call.fields[0], work)
        if not caches.item_bytes:
            return
        if self.device.kind == "cpu":
            self._run_cpu(work, buffer)
            return
        if self.chosen is None and self.limit > _MAX_PACKED_INDEX:
            expected = (
                f"the caches' GPU, since there are more than {_MAX_PACKED_INDEX} blocks or slots"
            )
            raise errors.wrong("device", f"{self.op}: {self.argument}", expected, "host memory")
        if self.buffer is None:
            self._enqueue(work, caches.pointers, _NO_BUFFER, 0, items)
            return
        (address,) = buffer
        if self.buffer.device.kind == "cpu" and self.device.index != NOWHERE:
            mapped = blocks.mapped(address, address + items * caches.item_bytes)
            if mapped is None:
                self._run_staged(work, address)
                return
            address += mapped.shift
        self._enqueue(work, caches.pointers, work.packed_at(address, items), 0, items)

    def _check_room(self, address, rows, work):
        """Require room for all items in the buffer, and none of the caches' bytes in it."""
        room, caches = rows * self._row_bytes, work.caches
        size = work.items * caches.item_bytes
        if size > room:
            expected = (
                f"at least {errors.counted(size, 'byte')} for {errors.counted(work.items, 'item')} "
                f"of {errors.counted(caches.item_bytes, 'byte')} in all layers"
            )
            raise errors.wrong("size", f"{self.op}: {self.buffer_name[0]}", expected, room)
        if not size or self.buffer.device.kind != self.device.kind:
            return
        for ends, span, addresses in zip(caches.ends, self._spans, caches.by_tensor):
            if ends is None or address + size <= ends[0] or ends[1] <= address:
                continue
            low, high = span
            for layer, cache in enumerate(addresses):
                if cache + low < address + size and address < cache + high:
                    got = f"some that layer {layer} of caches lies in"
                    raise errors.wrong(
                        "memory", f"{self.op}: {self.buffer_name[0]}", "memory of its own", got
                    )

    def _enqueue(self, work, tables, packed, begin, end):
        """Launch for items ``begin`` to ``end`` of the list, which are ``packed`` or to be."""
        strides, words = work.caches.strides, work.words()
        for table in tables:
            room = self._most_items
            if words is not None:
                room = min(room, 2 * table.room)  # 32 bits each
            for first in range(begin, end, room):
                starts = packed.of_layer(table.first, first - begin, strides)
                items = min(room, end - first)
                index, stride, tail = 0, 0, table.pointers
                if words is not None:
                    tail += words[4 * first : 4 * (first + items)]
                else:
                    stride = self.chosen.strides[0]
                    index = work.chosen + first * stride
                values = (*starts, index, stride, items, first, packed.layer, *strides)
                self._launches.enqueue((items, table.layers), work.stream, values, tail)

    def _launch_for(self, size):
        """(Launcher, grid, threads) of a launch."""
        items, layers = size
        works, processors = items * self.vectors, launch.processors(self.device.index)
        threads = launch.block_threads(-(-works * layers // ITEMS), processors, MAX_THREADS)
        grid = -(-works // (threads * ITEMS))
        if self.max_blocks is not None:
            grid = min(grid, max(1, self.max_blocks // layers))
        return self._launcher, (grid, layers, 1), threads

    # --- a buffer in host memory that is not pinned

    def _run_staged(self, work, buffer):
        logger.warning(
            "%s: %s is not pinned; the driver stages its bytes, and may wait",
            self.op, self.buffer_name[0],
        )  # fmt: skip
        count, tensors, strides = work.items, len(self.sizes), work.caches.strides
        host = work.packed_at(buffer, count)
        pieces = list(work.pieces())
        largest = max(layers * items * self.layer_bytes for _, layers, _, items in pieces)
        device, stream = self.device.index, work.stream
        # Skipped items keep their bytes in the buffer, so these are copied to the GPU and back.
        skips = self.direction is PACK and (
            self.chosen is not None or (work.chosen.numbers < 0).any()
        )
        with driver.active.staging(largest, stream, device) as address:
            for layer, layers, first, items in pieces:
                part = work.caches.addresses[layer * tensors : (layer + layers) * tensors]
                part = blocks.pointer_tables(part, tensors)
                staged = work.packed_at(address, items)
                outside = host.of_layer(layer, first, strides)
                if self.page_first or items == count:  # one stretch of the buffer
                    spans = [(outside[0], address, layers * items * self.layer_bytes)]
                else:
                    sizes = [items * size for size in self.sizes]
                    spans = list(zip(outside, staged.starts, sizes))
                if self.direction is UNPACK or skips:
                    for at, inside, size in spans:
                        blocks.copy(inside, at, size, size, stream, device)
                self._enqueue(work, part, staged, first, first + items)
                if self.direction is PACK:
                    for at, inside, size in spans:
                        blocks.copy(at, inside, size, size, stream, device)

    # --- the CPU

    def _run_cpu(self, work, buffer):
        chosen, rows = work.chosen.numbers, slice(None)
        if self.by_slot and (chosen < 0).any():
            rows = np.flatnonzero(chosen >= 0)
        kept = chosen[rows]
        index = np.divmod(kept, self.block_size) if self.by_slot else (kept,)
        packed = work.packed_at(buffer[0], work.items) if buffer else None
        for at, address in enumerate(work.caches.addresses):
            layer, t = divmod(at, len(self.sizes))
            tensor = self.tensors[t]
            cache = arrays.as_numpy(address, tensor.shape, tensor.strides, tensor.dtype.bits)
            if packed is None:
                cache[index] = 0
                continue
            items = arrays.as_numpy(
                packed.of_layer(layer)[t],
                (work.items, *tensor.shape[1 + self.by_slot :]),
                (work.caches.strides[t], *_dense_strides(tensor, 1 + self.by_slot)),
                tensor.dtype.bits,
            )
            if self.direction is PACK:
                items[rows] = cache[index]
            else:
                cache[index] = items[rows]


class _Caches(NamedTuple):
    """The caches of a call of a `Plan`.

    by_tensor : of each tensor of a layer, its addresses in all layers.
    ends : of each tensor, the address of the first byte, and of the byte behind the last, of all
        layers; None where it is empty.
    layers : how many.
    item_bytes : of an item in all layers.
    strides : of each tensor, the bytes from item to item in the buffer.
    addresses : layer by layer.
    pointers : their `blocks.PointerTable`s.
    """

    by_tensor: list
    ends: list
    layers: int
    item_bytes: int
    strides: tuple
    addresses: list
    pointers: list


class _Work(NamedTuple):
    """The work of one call of a `Plan`.

    ``chosen``: indices in host memory, or the address of indices on the device.
    """

    plan: Plan
    caches: _Caches
    items: int
    chosen: Any
    stream: int | None

    def words(self):
        """The indices in host memory as the kernel takes them, int32; None for those on the
        device."""
        if self.plan.chosen is not None:
            return None
        if self.chosen.words is not None:
            return self.chosen.words
        numbers = self.chosen.numbers
        return (np.maximum(numbers, -1) if self.plan.by_slot else numbers).astype("<i4").tobytes()

    def packed_at(self, address, count):
        """`Packed` items, ``count`` of them, in a buffer at ``address``."""
        first, layer = self.plan.sizes[0], self.plan.layer_bytes
        if self.plan.page_first:
            return Packed((address, address + first), layer)
        return Packed((address, address + count * first), count * layer)

    def pieces(self):
        """Cut the work into parts of at most `STAGE_BYTES`, or of one item of one layer if that is
        larger. Yields (first layer, layers, first item, items)."""
        row, all_layers = self.plan.layer_bytes, self.caches.layers
        if self.plan.page_first:
            group, items = all_layers, max(1, STAGE_BYTES // self.caches.item_bytes)
        else:
            group = max(1, STAGE_BYTES // (self.items * row))
            items = self.items if self.items * row <= STAGE_BYTES else max(1, STAGE_BYTES // row)
        for layer in range(0, all_layers, group):
            for first in range(0, self.items, items):
                yield layer, min(group, all_layers - layer), first, min(items, self.items - first)


def _item_geometry(op, name, tensor, by_slot):
    """The `blocks.Geometry` from the cache's items to the buffer's, whose elements are in the order
    of the dimensions."""
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
