# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""From tokens' positions to their slots in the caches of several groups of layers, at once."""

import struct

from .. import cpu
from ..errors import ArgumentError, DTypeError, ShapeError, StrideError
from ..runtime import arrays, contract, dispatch, formats, launch, modules, params
from .shared import blocks, slots

NAME = "slot_mapping_groups"
MAX_GROUPS = 48  # kMaxGroups of the kernel
TABLE_WORDS = 2 + len(slots.FIELDS)
PARAMS = params.Struct(
    per_call="idx_mapping:ptr positions:ptr query_start_loc:ptr out:ptr slots:i64 requests:i64 "
    "tokens:i64 first:i64 out_stride:i64",
    constant="idx_stride:i64 position_stride:i64",
    tail=f"groups:i64[{MAX_GROUPS * TABLE_WORDS}]",
)
MAX_THREADS = 256
INT64 = formats.DTYPES["int64"]
# A disabled group's `FIELDS`.
DISABLED = (0,) * len(slots.FIELDS)

_plans = {}


def slot_mapping_groups(
    block_tables, idx_mapping, positions, query_start_loc, block_sizes, *, out=None, enabled=None,
    sharded=None, cp_world_size=1, cp_rank=0, cp_interleave=1, stream=None,
):  # fmt: skip
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
    owner = ("positions", positions) if out is None else ("out", out)
    stream = blocks.stream_of(NAME, *owner) if stream is None else arrays.stream_pointer(stream)
    if not isinstance(block_tables, (list, tuple)):
        raise DTypeError(
            f"{NAME}: Invalid type of block_tables: expected a list of arrays, one for each group, "
            f"got {type(block_tables).__name__}"
        )
    groups = len(block_tables)
    if not groups:
        raise ShapeError(f"{NAME}: Invalid length of block_tables: expected tables, got none")
    if out is None:
        array = arrays.view(positions, f"{NAME}: positions")
        shape = groups, *array.shape[:1]
        out = arrays.empty(array.framework, array.device, shape, INT64)
    # The facts keep views through DLPack alive until all is enqueued.
    facts = {f"block_tables[{i}]": table for i, table in enumerate(block_tables)}
    facts |= {"positions": positions, "query_start_loc": query_start_loc, "out": out}
    facts = {name: arrays.read(value, f"{NAME}: {name}", stream) for name, value in facts.items()}
    facts["idx_mapping"] = None
    if idx_mapping is not None:
        facts["idx_mapping"] = arrays.read(idx_mapping, f"{NAME}: idx_mapping", stream)

    options = (
        _each("block_sizes", block_sizes, groups),
        _each("enabled", (True,) * groups if enabled is None else enabled, groups),
        _each("sharded", (True,) * groups if sharded is None else sharded, groups),
        (cp_world_size, cp_rank, cp_interleave),
    )
    key = (options, *(_signature(name, fact) for name, fact in facts.items()))
    plan = _plans.get(key)
    if plan is None:
        described = {
            name: fact and arrays.describe(fact, f"{NAME}: {name}") for name, fact in facts.items()
        }
        plan = _Plan(described, *options)
        if not any(fact and 0 in fact.shape for fact in facts.values()):
            # The strides of empty arrays were not checked: they must not vouch for full ones.
            if len(_plans) >= dispatch.MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    plan.run(facts, *_counts(facts), stream)
    return out


def _each(name, values, groups):
    """A value for each group, as a tuple."""
    if not isinstance(values, (list, tuple)) or len(values) != groups:
        raise ArgumentError(
            f"{NAME}: Invalid value of {name}: expected a list of {groups} values, one for each of "
            f"block_tables, got {values!r}"
        )
    return tuple(values)


def _signature(name, fact):
    """What of an argument a plan depends on: not its address, requests and tokens."""
    if fact is None:
        return None
    shape = (len(fact.shape), *fact.shape[1:])
    if name == "out":
        return (len(shape), *fact.shape[:1]), fact.strides[1:], fact.dtype, fact.place, fact.ptr & 7
    return shape, fact.strides, fact.dtype, fact.place, fact.ptr & 7


def _counts(facts):
    """Slots, requests and tokens of a call, and the bytes from row to row of the result."""
    (groups, count), (tokens,) = facts["out"].shape, facts["positions"].shape
    requests = facts["query_start_loc"].shape[0] - 1
    contract.check_sequence_count(NAME, "query_start_loc", requests)
    idx = facts["idx_mapping"]
    if requests < 0 or (idx is not None and idx.shape[0] != requests):
        wanted = "at least 1" if idx is None else idx.shape[0] + 1
        raise ShapeError(
            f"{NAME}: Invalid shape of query_start_loc: expected [{wanted}], one more than there "
            f"are requests{'' if idx is None else ' in idx_mapping'}, got [{requests + 1}]"
        )
    if idx is None:
        for index in range(groups):
            rows = facts[f"block_tables[{index}]"].shape[0]
            if rows < requests:
                raise ShapeError(
                    f"{NAME}: Invalid shape of block_tables[{index}]: expected at least {requests} "
                    f"rows, one for each request of query_start_loc, got {rows}"
                )
    if count < tokens:
        raise ShapeError(
            f"{NAME}: Invalid shape of out: expected at least {tokens} columns, as many as "
            f"positions, got [{groups}, {count}]"
        )
    if not count:
        return 0, requests, tokens, 0
    row, column = facts["out"].strides
    stride = row * INT64.bytes // column  # frameworks count in elements or in bytes
    if groups > 1 and abs(stride) < count * INT64.bytes:
        raise StrideError(
            f"{NAME}: Invalid strides of out: expected rows that do not share memory, got rows of "
            f"{count * INT64.bytes} bytes every {stride} bytes"
        )
    return count, requests, tokens, stride


class _Plan:
    """What a signature decides."""

    def __init__(self, described, block_sizes, enabled, sharded, ranks):
        groups = len(block_sizes)
        check = contract.Contract(NAME)
        slots.check_ranks(check, *ranks)
        out = described["out"]
        tables = [described[f"block_tables[{index}]"] for index in range(groups)]
        for name, array in described.items():
            if array is None:
                continue
            is_table = name.startswith("block_tables")
            check.shape(name, array, "_ _" if is_table else f"{groups} _" if name == "out" else "_")
            allowed = (tables[0].dtype,) if is_table and array is not tables[0] else formats.INDICES
            check.dtype(name, array, *((INT64,) if name == "out" else allowed))
            check.device(name, array)
            check.aligned(name, array)
            if is_table:
                check.contiguous(name, array)
        check.contiguous_rows("query_start_loc", described["query_start_loc"])
        arrays.require_writable(out, NAME, "out")
        if 0 not in out.shape and out.strides[1] != INT64.bytes:
            raise StrideError(
                f"{NAME}: Invalid strides of out: expected contiguous rows, got byte strides "
                f"{list(out.strides)}"
            )
        self.groups = []  # of each, what each of its rows means; None where disabled
        for index, (size, on, shared) in enumerate(zip(block_sizes, enabled, sharded)):
            own = ranks if shared else (1, 0, 1)
            slots.check_block_size(check, f"block_sizes[{index}]", size, own[0], own[2])
            self.groups.append((size, *own) if on else None)
        self.on_cpu = out.device.kind == "cpu"
        if not self.on_cpu:
            self._specialise(described, tables, out.device.index)

    def _specialise(self, described, tables, device):
        self.device = device
        self.fields = [
            DISABLED if group is None else slots.geometry(table, *group)
            for table, group in zip(tables, self.groups)
        ]
        idx = described["idx_mapping"] or tables[0]
        positions, bounds = described["positions"], described["query_start_loc"]
        types = (formats.INDEX_NAMES[a.dtype.name] for a in (tables[0], idx, positions, bounds))
        parallel = str(any(group is not None and group[1] > 1 for group in self.groups)).lower()
        kernel = modules.Kernel(
            NAME,
            NAME,
            f"{NAME}<{parallel}, {', '.join(types)}, {MAX_THREADS}>",
            PARAMS,
            guarded=("positions", "block_tables", "idx_mapping"),
        )
        self.launcher = launch.Launcher(kernel, device, (idx.strides[0], positions.strides[0]))

    def run(self, facts, count, requests, tokens, stride, stream):
        if not count:
            return
        if self.on_cpu:
            self._run_cpu(facts, count, requests, tokens)
            return
        idx, positions, bounds, out = (
            fact.ptr if fact else 0
            for fact in map(facts.get, ("idx_mapping", "positions", "query_start_loc", "out"))
        )
        for first in range(0, len(self.fields), MAX_GROUPS):
            words = []
            for index, fields in enumerate(self.fields[first : first + MAX_GROUPS], first):
                table = facts[f"block_tables[{index}]"]
                words += (table.ptr, table.shape[0], *fields)
            groups = len(words) // TABLE_WORDS
            threads = launch.block_threads(
                count * groups, launch.processors(self.device), MAX_THREADS
            )
            self.launcher.enqueue(
                (launch.ceil_div(count, threads), groups, 1), threads, stream, idx, positions,
                bounds, out + first * stride, count, requests, tokens, first, stride,
                tail=struct.pack(f"<{len(words)}Q", *(word & 2**64 - 1 for word in words)),
            )  # fmt: skip

    def _run_cpu(self, facts, count, requests, tokens):
        views = {name: fact and _view(name, fact) for name, fact in facts.items()}
        views["out"][...] = -1
        for index, group in enumerate(self.groups):
            if group is None:
                continue
            size, world, rank, interleave = group
            cpu.slot_mapping(
                views[f"block_tables[{index}]"], views["positions"], views["query_start_loc"],
                views["out"][index], count, requests, tokens, block_size=size, world=world,
                rank=rank, interleave=interleave, op=NAME, table_name="block_tables",
                idx_mapping=views["idx_mapping"], first_row=index * tokens,
            )  # fmt: skip


def _view(name, fact):
    array = arrays.describe(fact, f"{NAME}: {name}")
    return arrays.as_numpy(array.ptr, array.shape, array.strides, array.dtype.numpy)
