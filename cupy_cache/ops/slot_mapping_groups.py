# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""From tokens' positions to their slots in the caches of several groups of layers, at once."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from .. import cpu, errors
from ..runtime import (
    arrays,
    contract,
    dispatch,
    formats,
    launch,
    lists,
    making,
    modules,
    params,
    spelling,
    streams,
)
from ..types import ArrayLike, Layers, StreamLike
from .shared import slots

NAME = "slot_mapping_groups"
MAX_GROUPS = 48  # kMaxGroups of the kernel
TABLE_WORDS = 2 + len(slots.FIELDS)
PARAMS = params.Struct(
    per_call="idx_mapping:ptr positions:ptr query_start_loc:ptr out:ptr slots:i64 requests:i64 "
    "tokens:i64 first:i64 out_stride:i64 even.segments:f32 even.rows:f32",
    constant="idx_stride:i64 position_stride:i64",
    tail=f"groups:i64[{MAX_GROUPS * TABLE_WORDS}]",
)
MAX_THREADS = 256
RANKS = ("cp_world_size", "cp_rank", "cp_interleave")
# A disabled group's `FIELDS`.
DISABLED = (0,) * len(slots.FIELDS)


def slot_mapping_groups(
    block_tables: Layers,
    idx_mapping: ArrayLike | None,
    positions: ArrayLike,
    query_start_loc: ArrayLike,
    block_sizes: Sequence[int],
    *,
    out: ArrayLike | None = None,
    enabled: Sequence[bool] | None = None,
    sharded: Sequence[bool] | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    stream: StreamLike | None = None,
) -> Any:
    """Compute the slot of each token of a step for every group of layers, in one launch.

    Models with several kinds of attention keep a block table for each group of layers that are
    alike. Row ``g`` of the result is what `slot_mapping` computes for group ``g``, with row
    ``idx_mapping[b]`` of its table for request ``b``. More than 48 groups take a launch for every
    48.

    Parameters
    ----------
    block_tables : list of int32 or int64 arrays [rows, W]
        One for each of G groups, all of the same dtype; numbers of rows and W may differ. The last
        dimension contiguous. Their addresses travel inside the kernel's parameters: a CUDA graph
        keeps them.
    idx_mapping : int32 or int64 array [B], or None
        The row of the tables that belongs to each request; any stride. Negative: a request without
        one (padding), whose tokens get -1. None: request ``b`` has row ``b``.
    positions : int32 or int64 array [num_tokens]
        The position of each token in its sequence; any stride.
    query_start_loc : int32 or int64 array [B + 1]
        Where each request's tokens start, and where the last one's end; never descending;
        contiguous.
    block_sizes : sequence of int
        The slots of a block on one rank, for each group.
    out : int64 array [G, at least num_tokens], optional
        Written in place, all of it: -1 where there is no token. Rows contiguous, any distance
        apart.
    enabled : sequence of bool, optional
        The slots of groups that are not enabled are all -1; by default all are.
    sharded : sequence of bool, optional
        Groups that are not sharded keep every token on every rank, as if there were only one; by
        default all are sharded.
    cp_world_size, cp_rank, cp_interleave : int
        As for `slot_mapping`; the interleave must divide the block size of every sharded group.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``out``, or else
        ``positions``.

    Returns
    -------
    int64 array [G, num_tokens]
        ``out`` where it was given; otherwise a new array of the framework of ``positions``, on its
        device (of CuPy or NumPy where that framework's arrays cannot be written).

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Nothing synchronises. What is out of range gives -1 and a fault, as in `slot_mapping`, under the
    number ``g * num_tokens + t`` (arguments ``positions``, ``block_tables`` and, for rows that a
    table does not have, ``idx_mapping``).

    The formulas are those of vLLM's block tables.
    """
    block_tables = lists.plain(NAME, "block_tables", block_tables)
    groups = len(block_tables)
    if not groups:
        raise errors.wrong("length", f"{NAME}: block_tables", "tables", "none")
    all_of_them = (True,) * groups
    options = (
        _each("block_sizes", block_sizes, groups, int, contract.integer),
        all_of_them if enabled is None else _each("enabled", enabled, groups, bool, contract.flag),
        all_of_them if sharded is None else _each("sharded", sharded, groups, bool, contract.flag),
        contract.integers(NAME, RANKS, (cp_world_size, cp_rank, cp_interleave)),
    )
    if stream is not None:
        stream = streams.pointer(NAME, stream)
    made = OP((block_tables, idx_mapping, positions, query_start_loc, out), options, stream)
    return out if made is None else made


def _new_out(op, objects, options, stream):
    """A new array for the result."""
    del options
    like = arrays.view(objects[2], f"{op}: positions")
    shape = len(objects[0]), *like.shape[:1]
    return making.empty(like.framework, like.device, shape, formats.INT64, stream)


def _each(name, given, groups, kind, normal):
    """A value for each group, in its normal form: of type ``kind``, as ``normal`` makes it."""
    values = lists.plain_or_none(given)
    if values is None or len(values) != groups:
        expected = f"a list of {errors.counted(groups, 'value')}, one for each of block_tables"
        raise errors.wrong("value", f"{NAME}: {name}", expected, errors.shown(given))
    if set(map(type, values)) == {kind} and -(2**63) <= min(values) <= max(values) < 2**63:
        return tuple(values)
    return tuple([normal(NAME, f"{name}[{at}]", value) for at, value in enumerate(values)])


class _Plan:
    """How the slots of all groups are computed."""

    def __init__(self, op, described, options):
        block_sizes, enabled, sharded, ranks = options
        groups = len(block_sizes)
        check = contract.Contract(NAME)
        slots.check_ranks(check, *ranks)
        named = {arg.name: array for arg, array in zip(op.args, described)}
        table, out = named["block_tables"], named["out"]
        patterns = {"block_tables": "_ _", "out": f"{groups} _"}
        for name, array in named.items():
            if array is None:
                continue
            check.shape(name, array, patterns.get(name, "_"))
            check.dtype(name, array, *((formats.INT64,) if name == "out" else formats.INDICES))
            check.readable(name, array)
        check.contiguous("block_tables", table)
        check.contiguous_rows("query_start_loc", named["query_start_loc"])
        arrays.require_writable(out, NAME, "out")
        if 0 not in out.shape and out.strides[1] != formats.INT64.bytes:
            got = f"byte strides {list(out.strides)}"
            raise errors.wrong("strides", f"{NAME}: out", "contiguous rows", got)
        self._groups = []  # of each, what each of its rows means; None where disabled
        for index, (size, on, shared) in enumerate(zip(block_sizes, enabled, sharded)):
            own = ranks if shared else (1, 0, 1)
            slots.check_block_size(check, f"block_sizes[{index}]", size, own[0], own[2])
            self._groups.append((size, *own) if on else None)
        self._named = named
        self._device = None
        self._latest = None, ()  # (addresses and shapes of tables; what `_words` gave)
        if out.device.kind == "cuda":
            self._specialise(out.device.index)

    def _specialise(self, device):
        self._device = device
        table, idx, positions, bounds, _ = self._named.values()
        types = spelling.indices(table, idx or table, positions, bounds)
        parallel = any(group is not None and group[1] > 1 for group in self._groups)
        kernel = modules.Kernel(
            NAME,
            NAME,
            spelling.instance(NAME, parallel, types, MAX_THREADS),
            PARAMS,
            guarded=("positions", "block_tables", "idx_mapping"),
        )
        constants = (idx.strides[0] if idx else 0, positions.strides[0])
        self._launcher = launch.Launcher(kernel, device, constants)
        self._launches = launch.Launches(self._launch_for)

    def run(self, call):
        """Compute the slots: a launch for every `MAX_GROUPS` groups, or a group at a time."""
        tables, idx, positions, bounds, out = call.values
        geometries, requests, tokens, stride = call.fields
        if self._device is None:
            self._run_cpu(call, geometries, requests, tokens)
            return
        count, even = call.rows, launch.evenly(requests, tokens)
        for first, groups, words in self._words(tables, geometries):
            values = (
                idx, positions, bounds, out + first * stride, count, requests, tokens, first,
                stride, *even,
            )  # fmt: skip
            self._launches.enqueue((count, groups), call.stream, values, words)

    def _launch_for(self, size):
        """(Launcher, grid, threads) of a launch for so many slots and groups."""
        count, groups = size
        processors = launch.processors(self._device)
        threads = launch.block_threads(count * groups, processors, MAX_THREADS)
        return self._launcher, (launch.ceil_div(count, threads), groups, 1), threads

    def _words(self, tables, geometries):
        """For each launch its first group, how many it has, and their tables as the kernel wants
        them."""
        known, made = self._latest
        if known == (tables, geometries):
            return made
        made = []
        for first in range(0, len(tables), MAX_GROUPS):
            words = []
            for index in range(first, min(first + MAX_GROUPS, len(tables))):
                (shape, strides), group = geometries[index], self._groups[index]
                fields = DISABLED
                if group is not None:
                    fields = slots.geometry(shape, strides, *group)
                words += (tables[index], shape[0], *fields)
            made.append((first, len(words) // TABLE_WORDS, struct.pack(f"<{len(words)}q", *words)))
        self._latest = (tables, geometries), made
        return made

    def _run_cpu(self, call, geometries, requests, tokens):
        tables, *addresses = call.values
        _, *named = self._named.values()
        idx, positions, bounds, out = (
            array and arrays.as_numpy(address, shape, strides, array.dtype.numpy)
            for array, address, shape, strides in zip(
                named, addresses, call.shapes[1:], call.strides[1:]
            )
        )
        out[...] = -1
        dtype = self._named["block_tables"].dtype.numpy
        for index, group in enumerate(self._groups):
            if group is None:
                continue
            size, world, rank, interleave = group
            table = arrays.as_numpy(tables[index], *geometries[index], dtype)
            cpu.slot_mapping(
                table, positions, bounds, out[index], call.rows, requests, tokens, block_size=size,
                world=world, rank=rank, interleave=interleave, op=NAME, table_name="block_tables",
                idx_mapping=idx, first_row=index * tokens,
            )  # fmt: skip


def _count(extents, options, scalars):
    """(Slots, (shapes and strides of the tables, requests, tokens, bytes between the rows of
    out))."""
    del options, scalars
    tables, idx, tokens, bounds, ((groups, count), (stride, _)) = extents
    requests = bounds - 1
    contract.check_sequence_count(NAME, "query_start_loc", requests)
    if requests < 0 or (idx is not None and idx != requests):
        wanted = "at least 1" if idx is None else idx + 1
        expected = (
            f"[{wanted}], one more than there are "
            f"requests{'' if idx is None else ' in idx_mapping'}"
        )
        raise errors.wrong("shape", f"{NAME}: query_start_loc", expected, f"[{bounds}]")
    if idx is None:
        for index, ((rows, _), _) in enumerate(tables):
            if rows < requests:
                least = errors.counted(requests, "row")
                expected = f"at least {least}, one for each request of query_start_loc"
                raise errors.wrong("shape", f"{NAME}: block_tables[{index}]", expected, rows)
    if count < tokens:
        expected = f"at least {errors.counted(tokens, 'column')}, as many as positions"
        raise errors.wrong("shape", f"{NAME}: out", expected, f"[{groups}, {count}]")
    if groups > 1 and count and abs(stride) < count * formats.INT64.bytes:
        got = f"rows of {count * formats.INT64.bytes} bytes every {stride} bytes"
        raise errors.wrong("strides", f"{NAME}: out", "rows that do not share memory", got)
    return count, (tables, requests, tokens, stride)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("block_tables", layers=True, varies=(0, 1), index=True),
        dispatch.Arg("idx_mapping", varies=dispatch.ROWS, optional=True, index=True),
        dispatch.Arg("positions", varies=dispatch.ROWS, index=True),
        dispatch.Arg("query_start_loc", varies=dispatch.ROWS, index=True),
        dispatch.Arg("out", varies=(1,), index=True, written=True),
    ),
    plan=_Plan,
    destination=4,
    count=_count,
    result=dispatch.Result(4, (2,), _new_out),
)
