# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying blocks between two caches: within a GPU, between a GPU and the host, within the host."""

import functools
import math

import numpy as np

from .. import cpu
from ..errors import ArgumentError, DeviceError, ShapeError
from ..runtime import arrays, contract, formats, launch
from ..runtime.log import logger
from .shared import block_pairs, blocks


def swap_blocks(src, dst, *block_mapping, block_size_in_bytes=None, stream=None):
    """Copy blocks ``src[i]`` -> ``dst[j]`` for each pair (i, j) of the mapping (not an exchange).

    Called ``swap_blocks(src, dst, block_mapping)``, or ``swap_blocks(src, dst,
    block_size_in_bytes, block_mapping)`` with the size in bytes of a block of two contiguous
    arrays of any shape.

    Between a GPU and pinned host memory, scattered blocks are moved by a kernel that accesses the
    host memory itself, and runs of neighbouring blocks of 2 MiB or more by the copy engines; both
    are enqueued and can be captured. Host memory that is not pinned works too, slower: the driver
    stages it, and the call may wait.

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
    ArgumentError
        Or one of its kinds, before anything is written.
    """
    op = "swap_blocks"
    if len(block_mapping) == 2:
        block_size_in_bytes, block_mapping = block_mapping
    elif len(block_mapping) == 1:
        (block_mapping,) = block_mapping
    else:
        raise TypeError(f"{op}() takes block_mapping, or block_size_in_bytes and block_mapping")
    checked(src, dst, block_mapping, block_size_in_bytes, stream)()


def checked(src, dst, block_mapping, block_size_in_bytes=None, stream=None):
    """`swap_blocks` as a function without arguments that copies; whatever there is to refuse is
    refused here."""
    op = "swap_blocks"
    sources, destinations = _as_list(src), _as_list(dst)
    if len(sources) != len(destinations):
        raise ShapeError(
            f"{op}: Invalid length of dst: expected as many layers as src, {len(sources)}, got "
            f"{len(destinations)}"
        )
    if not sources:
        return _nothing
    if stream is not None:
        stream = arrays.stream_pointer(stream)
    else:
        stream = blocks.stream_of(op, "dst", destinations[0])
        if stream is None:
            stream = blocks.stream_of(op, "src", sources[0])
    source = blocks.read_layers(op, "src", sources, stream)
    destination = blocks.read_layers(op, "dst", destinations, stream)
    pairs = block_pairs.read(op, block_mapping, stream)
    if not isinstance(pairs, block_pairs.Pairs):
        raise DeviceError(
            f"{op}: Invalid device of block_mapping: expected host memory, got {pairs.device}"
        )
    plan = _plan(source.facts, destination.facts, block_size_in_bytes)
    block_pairs.check(op, pairs, plan.source.shape[0], plan.destination.shape[0])
    _check_written_once(op, source.addresses, destination.addresses)
    if plan.may_share and pairs.count:
        block_pairs.check_apart(
            op, pairs, plan.source, plan.destination, source.addresses, destination.addresses
        )
    return functools.partial(plan.run, source.addresses, destination.addresses, pairs, stream)


def _nothing():
    """No layers, nothing to copy."""


def _check_written_once(op, sources, destinations):
    """Refuse an array that two different layers are to be copied to."""
    if len(set(zip(sources, destinations))) != len(set(destinations)):
        layer = next(i for i, to in enumerate(destinations) if to in destinations[:i])
        raise ArgumentError(
            f"{op}: Invalid value of dst: expected every array once, got one twice, again in layer "
            f"{layer}"
        )


def _as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


@functools.lru_cache(maxsize=256)
def _plan(source_facts, destination_facts, block_size_in_bytes):
    op = "swap_blocks"
    source = arrays.describe(source_facts, f"{op}: src")
    destination = arrays.describe(destination_facts, f"{op}: dst")
    check = contract.Contract(op)
    if block_size_in_bytes is not None:
        check.positive("block_size_in_bytes", block_size_in_bytes)
        for name, array in (("src", source), ("dst", destination)):
            check.contiguous(name, array, len(array.shape))
        source, destination = (
            _as_blocks_of_bytes(array, block_size_in_bytes) for array in (source, destination)
        )
    check.shape("src", source, "_ ...")
    check.shape("dst", destination, " ".join(["_", *map(str, source.shape[1:])]))
    check.dtype("dst", destination, source.dtype)
    check.writable("dst", destination)
    gpus = {a.device for a in (source, destination) if a.device.kind == "cuda"}
    if len(gpus) > 1:
        raise DeviceError(
            f"{op}: Invalid device of dst: expected host memory or {source.device}, got "
            f"{destination.device}"
        )
    return _SwapPlan(source, destination, gpus.pop().index if gpus else None)


def _as_blocks_of_bytes(array, size):
    total = math.prod(array.shape) * array.dtype.bytes
    return array._replace(
        shape=(total // size, size), strides=(size, 1), dtype=formats.DTYPES["uint8"]
    )


class _SwapPlan:
    """How blocks of one signature travel; ``gpu`` is None where both sides are in host memory."""

    def __init__(self, source, destination, gpu):
        self.source, self.destination, self.gpu = source, destination, gpu
        self.geometry = blocks.geometry("swap_blocks", "dst", source, destination)
        self.may_share = source.device == destination.device
        # Blocks that touch their neighbours on both sides can be copied several at a time.
        self.dense = self.geometry.contiguous and (
            self.geometry.source[0] == self.geometry.destination[0] == self.geometry.bytes
        )
        if gpu is not None:
            limit = None
            if destination.device.kind == "cpu":
                limit = blocks.TO_HOST_BLOCKS
            elif source.device.kind == "cpu":
                limit = blocks.FROM_HOST_BLOCKS
            common = (source.ptr | destination.ptr) & -(source.ptr | destination.ptr)
            self.copy = blocks.CopyPlan(
                "swap_blocks", [(self.geometry, common)], False, source.shape[0],
                destination.shape[0], None, gpu, max_blocks=limit,
            )  # fmt: skip
            self._table = functools.lru_cache(maxsize=8)(self.copy.table)

    def run(self, sources, destinations, pairs, stream):
        """Copy for every layer."""
        if not self.geometry.bytes or not pairs.count:
            return
        if self.gpu is None:
            for addresses in zip(sources, destinations):
                cpu.copy_blocks(
                    *map(self._numpy, (self.source, self.destination), addresses), pairs
                )
        elif self.source.device == self.destination.device:
            self.copy.enqueue(stream, self._table(sources, destinations), pairs)
        else:
            self._over_the_bus(sources, destinations, pairs, stream)

    def _numpy(self, array, address):
        return arrays.as_numpy(address, array.shape, array.strides, array.dtype.bits)

    def _over_the_bus(self, sources, destinations, pairs, stream):
        to_host = self.destination.device.kind == "cpu"
        host = destinations if to_host else sources
        mapped = tuple(launch.driver.mapped_address(address, self.gpu) for address in host)
        if None in mapped:
            logger.warning(
                "swap_blocks: host memory is not pinned; the driver stages each copy, and may wait"
            )
            self._by_driver(sources, destinations, pairs, stream)
            return
        runs, scattered = self._split(pairs)
        if scattered.count:
            sides = (sources, mapped) if to_host else (mapped, destinations)
            self.copy.enqueue(stream, self._table(*sides), scattered)
        for layer in zip(sources, destinations):
            for run in runs:
                self._copy_run(*layer, *run, stream)

    def _split(self, pairs):
        """Runs (source, destination, blocks) long enough for the copy engines, and the rest."""
        least = launch.ceil_div(blocks.RUN_BYTES, self.geometry.bytes)
        if not self.dense or pairs.count < least:
            return [], pairs
        *sides, counts = pairs.runs()
        long = counts >= least
        if not long.any():
            return [], pairs
        runs = zip(*(numbers[long].tolist() for numbers in (*sides, counts)))
        return list(runs), block_pairs.Pairs(pairs.numbers[:, ~np.repeat(long, counts)])

    def _copy_run(self, source, destination, first, to, count, stream):
        size = self.geometry.bytes
        launch.driver.copy(
            destination + to * size, source + first * size, count * size, stream, self.gpu
        )

    def _by_driver(self, sources, destinations, pairs, stream):
        g = self.geometry
        for layer in zip(sources, destinations):
            if self.dense:
                for run in zip(*(numbers.tolist() for numbers in pairs.runs())):
                    self._copy_run(*layer, *run, stream)
                continue
            for first, to in zip(*pairs.numbers.tolist()):
                for outer in range(g.outer):
                    for middle in range(g.middle):
                        at = [
                            base + block * s[0] + outer * s[1] + middle * s[2]
                            for base, block, s in zip(layer, (first, to), (g.source, g.destination))
                        ]
                        launch.driver.copy(at[1], at[0], g.run, stream, self.gpu)
