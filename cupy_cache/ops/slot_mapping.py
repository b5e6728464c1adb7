# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""From tokens' positions to their slots in a paged cache."""

from __future__ import annotations

import functools
from typing import Any

from .. import cpu, errors
from ..runtime import (
    arrays,
    contract,
    dispatch,
    formats,
    launch,
    making,
    modules,
    params,
    plans,
    spelling,
    streams,
)
from ..types import ArrayLike, StreamLike
from .shared import slots

NAME = "slot_mapping"
PARAMS = params.Struct(
    per_call="block_table:ptr positions:ptr query_start_loc:ptr out:ptr "
    "slots:i64 requests:i64 tokens:i64 table_stride:i64 position_limit:i64 "
    "even.segments:f32 even.rows:f32",
    constant="position_stride:i64 block_limit:i64 block_size:i64 "
    "cp_world_size:i64 cp_rank:i64 cp_interleave:i64",
)
OPTIONS = ("block_size", "cp_world_size", "cp_rank", "cp_interleave")
MAX_THREADS = 256


def slot_mapping(
    block_table: ArrayLike,
    positions: ArrayLike,
    query_start_loc: ArrayLike,
    block_size: int,
    *,
    out: ArrayLike | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    stream: StreamLike | None = None,
) -> Any:
    """Compute the slot of each token of a step.

    Token ``t`` belongs to the request ``b`` with ``query_start_loc[b] <= t < query_start_loc[b +
    1]``. With ``p = positions[t]``, its slot is ``block_table[b, p // block_size] * block_size +
    p % block_size``. Tokens that no request owns get -1, which writing operations take as padding.

    Under context parallelism a table entry stands for one block on each of ``cp_world_size`` ranks,
    and runs of ``cp_interleave`` tokens are dealt to the ranks in turn. With ``V = block_size *
    cp_world_size`` and ``v = p % V``, the token is this rank's where ``v // cp_interleave %
    cp_world_size == cp_rank``; its slot is then ``block_table[b, p // V] * block_size + v //
    (cp_world_size * cp_interleave) * cp_interleave + v % cp_interleave``. Other ranks' tokens
    get -1.

    Parameters
    ----------
    block_table : int32 or int64 array [B, W]
        Block numbers of each request; the last dimension contiguous.
    positions : int32 or int64 array [num_tokens]
        The position of each token in its sequence; any stride.
    query_start_loc : int32 or int64 array [B + 1]
        Where each request's tokens start, and where the last one's end; never descending;
        contiguous.
    block_size : int
        Slots of a block on one rank.
    out : int64 array [at least num_tokens], optional
        Written in place, all of it: -1 where there is no token. Contiguous.
    cp_world_size, cp_rank, cp_interleave : int
        The number of context-parallel ranks, this one's, and the tokens of a run, which must divide
        ``block_size`` where there is more than one rank.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``out``, or else
        ``positions``.

    Returns
    -------
    int64 array [num_tokens]
        ``out`` where it was given; otherwise a new array of the framework of ``positions``, on its
        device (of CuPy or NumPy where that framework's arrays cannot be written).

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Nothing synchronises. What is out of range gives the slot -1, and a fault under the token's
    number (see `raise_faults`). It has the argument ``positions`` where a position is negative, or
    its page not below W. It has ``block_table`` where a table entry that is used is negative, or so
    large that its slots might not fit 64 bits. Where ``query_start_loc`` descends, a token between
    the bounds of several requests is of one of them, or of none: the same one on CPU and GPU.

    The formulas are those of vLLM's block tables.
    """
    given = block_size, cp_world_size, cp_rank, cp_interleave
    options = contract.integers(NAME, OPTIONS, given)
    if stream is not None:
        stream = streams.pointer(NAME, stream)
    made = OP((block_table, positions, query_start_loc, out), options, stream)
    return out if made is None else made


def _new_out(op, objects, options, stream):
    """A new array for the result."""
    del options
    like = arrays.view(objects[1], f"{op}: positions")
    return making.empty(like.framework, like.device, like.shape[:1], formats.INT64, stream)


def _plan(op, described, options):
    table, positions, starts, out = described
    block_size, world, rank, interleave = options
    check = contract.Contract(op.name)
    slots.check_ranks(check, world, rank, interleave)
    slots.check_block_size(check, "block_size", block_size, world, interleave)
    check.shape("block_table", table, "_ _")
    named = {arg.name: array for arg, array in zip(op.args, described)}
    for name in ("positions", "query_start_loc", "out"):
        check.shape(name, named[name], "_")
    check.dtype("out", out, formats.INT64)
    for name, array in named.items():
        check.dtype(name, array, *formats.INDICES)
        check.readable(name, array)
    check.contiguous("block_table", table)
    check.contiguous_rows("query_start_loc", starts)
    check.contiguous_rows("out", out)
    check.writable("out", out)

    if out.device.kind == "cpu":
        run = functools.partial(
            cpu.slot_mapping, block_size=block_size, world=world, rank=rank, interleave=interleave
        )
        return plans.NumPyPlan(run, op.args, described)

    index = spelling.indices(table, positions, starts)
    kernel = modules.Kernel(
        op.name,
        op.name,
        spelling.instance(NAME, world > 1, index, MAX_THREADS),
        PARAMS,
        guarded=("positions", "block_table"),
    )
    limit = slots.LARGEST // block_size
    constants = positions.strides[0], limit, block_size, world, rank, interleave
    return plans.flat(kernel, out.device.index, constants, 1, MAX_THREADS)


def _count(extents, options, scalars):
    del scalars
    ((requests, width), (step, _)), tokens, bounds, count = extents
    contract.check_sequence_count(NAME, "block_table", requests)
    if bounds != requests + 1:
        expected = f"[{requests + 1}], one more than the rows of block_table"
        raise errors.wrong("shape", f"{NAME}: query_start_loc", expected, f"[{bounds}]")
    if count < tokens:
        expected = f"at least {errors.counted(tokens, 'entry', 'entries')}, as many as positions"
        raise errors.wrong("shape", f"{NAME}: out", expected, f"[{count}]")
    block_size, world, *_ = options
    limit = slots.position_limit(width, block_size, world)
    return count, (count, requests, tokens, step, limit, *launch.evenly(requests, tokens))


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("block_table", varies=(0, 1), index=True),
        dispatch.Arg("positions", varies=dispatch.ROWS, index=True),
        dispatch.Arg("query_start_loc", varies=dispatch.ROWS, index=True),
        dispatch.Arg("out", varies=dispatch.ROWS, index=True, written=True),
    ),
    plan=_plan,
    destination=3,
    count=_count,
    result=dispatch.Result(3, (1,), _new_out),
)
