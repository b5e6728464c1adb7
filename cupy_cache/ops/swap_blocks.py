# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying blocks between two caches: within a GPU, between a GPU and the host, within the host."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple, overload

import numpy as np

from .. import errors
from ..runtime import arrays, contract, dispatch, driver, formats, indices, launch, lists
from ..runtime.log import logger
from ..types import ArrayLike, Layers, Pairs, StreamLike
from .shared import blocks, copying, mappings

NAME = "swap_blocks"


@overload
def swap_blocks(
    src: ArrayLike | Layers,
    dst: ArrayLike | Layers,
    block_mapping: Pairs,
    *,
    block_size_in_bytes: int | None = None,
    stream: StreamLike | None = None,
) -> None: ...
@overload
def swap_blocks(
    src: ArrayLike | Layers,
    dst: ArrayLike | Layers,
    block_size_in_bytes: int | None,
    block_mapping: Pairs,
    *,
    stream: StreamLike | None = None,
) -> None: ...
def swap_blocks(
    src: ArrayLike | Layers,
    dst: ArrayLike | Layers,
    *size_and_mapping: Any,
    block_mapping: Pairs | None = None,
    block_size_in_bytes: Any = None,
    stream: StreamLike | None = None,
) -> None:
    """Copy blocks ``src[i]`` -> ``dst[j]`` for each pair (i, j) of the mapping (not an exchange).

    Called ``swap_blocks(src, dst, block_mapping)``, or ``swap_blocks(src, dst,
    block_size_in_bytes, block_mapping)`` with the size in bytes of a block of two contiguous
    arrays of any shape.

    Between a GPU and pinned host memory, scattered blocks are moved by a kernel that accesses the
    host memory itself. Runs of neighbouring blocks of 2 MiB or more are moved by the copy engines.
    Both are enqueued and can be captured. Host memory that is not pinned works too, slower: the
    driver stages it, and the call may wait.

    Parameters
    ----------
    src, dst : array [num_blocks, ...], or lists of such arrays, one for each layer
        Equal dtype and block shape; each on a GPU or in host memory, at most one GPU in all.
        Blocks may have gaps between and inside them.
    block_mapping : sequence of (source, destination), or int32 or int64 array [num_pairs, 2]
        In host memory. Checked before anything is written: numbers in range, no destination twice
        and, where ``src`` and ``dst`` share memory, no block both source and destination, in
        whichever layers.
    block_size_in_bytes : int, optional
        See above; may also be given by name.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns the GPU array.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    size, block_mapping = _size_and_mapping(*size_and_mapping, block_size_in_bytes, block_mapping)
    if size is not None:
        size = contract.integer(NAME, "block_size_in_bytes", size, 1)
    if not issubclass(type(src), lists.LISTS):
        src = [src]
    if not issubclass(type(dst), lists.LISTS):
        dst = [dst]
    OP((src, dst, None, None, block_mapping), (size,), stream)


def _size_and_mapping(*given):
    """Of what was given by place and, last, the two by name: (block_size_in_bytes,
    block_mapping)."""
    *by_place, size, mapping = given
    if len(by_place) == 1 and mapping is not None and size is None:
        return by_place[0], mapping
    if len(by_place) == 1 and mapping is None:
        return size, by_place[0]
    if len(by_place) == 2 and size is mapping is None:
        return by_place
    if by_place:
        expected = "it once, with block_size_in_bytes or without"
        raise errors.wrong("value", f"{NAME}: block_mapping", expected, "more arguments than that")
    return size, mapping


class _Tensor:
    """One array of each layer, from and to."""

    def __init__(self, check, names, source, destination, block_size_in_bytes):
        if block_size_in_bytes is not None:
            for name, array in zip(names, (source, destination)):
                check.contiguous(name, array, len(array.shape))
            source = _as_blocks_of_bytes(source, block_size_in_bytes)
            destination = _as_blocks_of_bytes(destination, block_size_in_bytes)
        check.shape(names[0], source, "_ ...")
        check.shape(names[1], destination, " ".join(["_", *map(str, source.shape[1:])]))
        check.dtype(names[1], destination, source.dtype)
        check.writable(names[1], destination)
        self.source, self.destination = source, destination
        self.geometry = blocks.geometry(check.op, names[1], source, destination)
        # Blocks that touch their neighbours on both sides can be copied several at a time.
        self.dense = self.geometry.contiguous and (
            self.geometry.source[0] == self.geometry.destination[0] == self.geometry.bytes
        )

    def numpy(self, source, destination):
        """Views of both sides of a layer."""
        sides = (self.source, source), (self.destination, destination)
        return [
            arrays.as_numpy(address, array.shape, array.strides, array.dtype.bits)
            for array, address in sides
        ]


def _as_blocks_of_bytes(array, size):
    total = math.prod(array.shape) * array.dtype.bytes
    return array._replace(shape=(total // size, size), strides=(size, 1), dtype=formats.UINT8)


class _Layers:
    """The addresses of a call.

    sources, destinations : of each tensor, those of all layers. sides : both, layer by layer.
    pointers : both as the kernel wants them, where all are on one GPU.
    reached : the `_Reached` of the last call.
    """

    __slots__ = ("destinations", "pointers", "reached", "sides", "sources")

    def __init__(self, sources, destinations):
        self.sources, self.destinations = sources, destinations
        self.sides = blocks.interleaved(sources), blocks.interleaved(destinations)
        self.pointers, self.reached = None, _Reached(None, None, [], 0, None)


class _Reached(NamedTuple):
    """Where a GPU reached arrays in host memory.

    span : the first byte of all of them, and the byte behind the last, if ``memory`` is known.
    memory : the `blocks.Mapped`, of one piece, that they all lie in; None where they do not.
    addresses : what the GPU accesses, layer by layer.
    pieces : in how many one array was at most.
    pointers : both sides as the kernel wants them.
    """

    span: tuple | None
    memory: blocks.Mapped | None
    addresses: list
    pieces: int
    pointers: list | None


class _Plan:
    """How blocks of one signature travel."""

    def __init__(self, op, described, options):
        del op
        *sides, mapping = described
        (block_size_in_bytes,) = options
        if mapping is not None:
            raise errors.wrong("device", f"{NAME}: block_mapping", "host memory", mapping.device)
        check = contract.Contract(NAME)
        self._tensors = [
            _Tensor(check, names, source, destination, block_size_in_bytes)
            for names, source, destination in zip(_NAMES, sides[::2], sides[1::2])
            if source is not None
        ]
        first = self._tensors[0]
        self._source_blocks = first.source.shape[0]
        self._destination_blocks = first.destination.shape[0]
        self._check_devices(sides)
        self._from, self._to = first.source.device, first.destination.device
        self._within = self._from == self._to  # one device
        gpus = [device.index for device in (self._from, self._to) if device.kind == "cuda"]
        self._gpu = gpus[0] if gpus else None
        sizes = [tensor.geometry.bytes for tensor in self._tensors]
        self._has_bytes = any(sizes)
        # Blocks of a run for the copy engines; None where they cannot be copied several at a time.
        self._least_run = None
        if all(tensor.dense for tensor in self._tensors):
            self._least_run = launch.ceil_div(blocks.RUN_BYTES, max(min(sizes), 1))
        if self._gpu is not None:
            self._make_kernel()

    def _check_devices(self, sides):
        source, destination, *values = sides
        if {source.device.kind, destination.device.kind} == {"cuda"}:
            contract.same_device(NAME, "dst", destination.device, "src", source.device)
        for name, array, other in zip(_NAMES[1], values, (source, destination)):
            if array is not None:
                contract.same_device(NAME, name, array.device, name, other.device)
                if array.shape[0] != other.shape[0]:
                    expected = f"{errors.counted(other.shape[0], 'block')} like those of keys"
                    raise errors.wrong("shape", f"{NAME}: {name}", expected, list(array.shape))

    def _make_kernel(self):
        tensors = [(t.geometry, t.source.ptr | t.destination.ptr) for t in self._tensors]
        self._copy = blocks.CopyPlan(
            NAME, tensors, False, self._source_blocks, self._destination_blocks, None, self._gpu,
            max_blocks=blocks.most_blocks(self._from, self._to),
        )  # fmt: skip

    def tables(self, values):
        """The addresses as `_Layers`."""
        given = [side for side in values[:-1] if side]
        made = _Layers(given[::2], given[1::2])
        if self._gpu is not None and self._within:
            made.pointers = self._copy.tables(*made.sides)
        return made

    def run(self, call):
        """Check the pairs, and copy."""
        pairs, layers = call.values[-1], call.tables
        mappings.check(NAME, pairs, self._source_blocks, self._destination_blocks)
        if self._within:  # keys may lie where the other side has values
            reads, writes = (
                [(getattr(tensor, side), each) for tensor, each in zip(self._tensors, addresses)]
                for side, addresses in (
                    ("source", layers.sources),
                    ("destination", layers.destinations),
                )
            )
            for (source, of), (destination, to) in itertools.product(reads, writes):
                mappings.check_apart(NAME, pairs, source, destination, of, to)
        if not self._has_bytes:
            return
        if self._gpu is None:
            for tensor, *given in zip(self._tensors, layers.sources, layers.destinations):
                of, to = pairs.numbers.T
                for addresses in zip(*given):
                    source, destination = tensor.numpy(*addresses)
                    destination[to] = source[of]
        elif self._within:
            self._copy.enqueue_pairs(call.stream, layers.pointers, pairs)
        else:
            self._over_the_bus(layers, pairs, call.stream)

    def _over_the_bus(self, layers, pairs, stream):
        reached = self._reached(layers)
        if reached is None:
            logger.warning(
                "%s: host memory is not pinned; the driver stages each copy, and may wait", NAME
            )
            self._by_driver(*layers.sides, pairs, stream)
            return
        runs, scattered = self._split(pairs)
        if scattered.count:
            self._copy.enqueue_pairs(stream, reached.pointers, scattered)
        for run in runs:
            for at, layer in enumerate(zip(*layers.sides)):
                tensor = self._tensors[at % len(self._tensors)]
                self._copy_run(tensor, *layer, *run, reached.pieces, stream)

    def _reached(self, layers):
        """The `_Reached` of a call; None unless all arrays in host memory are pinned, each as a
        whole. Asked at each call: memory can be pinned otherwise and stay where it is. One question
        is enough where all of it was one piece, and is the same again."""
        known = layers.reached
        if known.memory is not None and blocks.mapped(*known.span) == known.memory:
            return known
        to_host = self._to.kind == "cpu"
        sides = [tensor.destination if to_host else tensor.source for tensor in self._tensors]
        spans = [None if 0 in side.shape else side.span for side in sides]
        memory, addresses, ends, pieces = None, [], [], 0
        for address, span in zip(layers.sides[to_host], itertools.cycle(spans)):
            if span is None:
                addresses.append(address)
                continue
            first, behind = address + span[0], address + span[1]
            if memory is None or not memory.start <= first or behind > memory.end:
                memory = blocks.mapped(first, behind)
                if memory is None:
                    return None
                pieces = max(pieces, memory.pieces)
            addresses.append(address + memory.shift)
            ends += first, behind
        span = (min(ends), max(ends)) if pieces == 1 else None
        if span is None or not memory.start <= span[0] or span[1] > memory.end:
            memory = None
        pointers = known.pointers
        if addresses != known.addresses:
            there = layers.sides[not to_host]
            pointers = self._copy.tables(*((there, addresses) if to_host else (addresses, there)))
        layers.reached = _Reached(span, memory, addresses, pieces, pointers)
        return layers.reached

    def _split(self, pairs):
        """Runs (source, destination, blocks) long enough for the copy engines, and the rest."""
        least = self._least_run
        if least is None or least > pairs.count or not mappings.may_have_runs(pairs.numbers, least):
            return [], pairs
        *sides, counts = mappings.runs(pairs.numbers)
        long = counts >= least
        if not long.any():
            return [], pairs
        runs = zip(*(numbers[long].tolist() for numbers in (*sides, counts)))
        return list(runs), indices.Chosen(pairs.numbers[~np.repeat(long, counts)])

    def _copy_run(self, tensor, source, destination, first, to, count, pieces, stream):
        size = tensor.geometry.bytes
        of, onto = source + first * size, destination + to * size
        if pieces > 1:
            blocks.copy(onto, of, count * size, size, stream, self._gpu)
        else:  # there is no edge to look for
            driver.active.copy(onto, of, count * size, stream, self._gpu)

    def _by_driver(self, sources, destinations, pairs, stream):
        for at, layer in enumerate(zip(sources, destinations)):
            tensor = self._tensors[at % len(self._tensors)]
            g = tensor.geometry
            if tensor.dense:
                size = g.bytes
                for first, to, count in zip(*(n.tolist() for n in mappings.runs(pairs.numbers))):
                    of, onto = layer[0] + first * size, layer[1] + to * size
                    blocks.copy(onto, of, count * size, size, stream, self._gpu)
                continue
            for first, to in pairs.numbers.tolist():
                for outer in range(g.outer):
                    for middle in range(g.middle):
                        of, onto = (
                            base + block * s[0] + outer * s[1] + middle * s[2]
                            for base, block, s in zip(layer, (first, to), (g.source, g.destination))
                        )
                        blocks.copy(onto, of, g.run, g.run, stream, self._gpu)


_NAMES = ("src", "dst"), ("src_values", "dst_values")
# The second two lists are a `PagedKVCache`'s.
OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("src", layers=True),
        dispatch.Arg("dst", layers=True, written=True),
        dispatch.Arg("src_values", layers=True, optional=True),
        dispatch.Arg("dst_values", layers=True, optional=True, written=True),
        dispatch.Arg("block_mapping", varies=dispatch.ROWS, chosen=True, pairs=True),
    ),
    plan=_Plan,
    destination=(1, 0),
    count=copying.count,
)
