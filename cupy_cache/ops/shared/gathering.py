# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Reading the pages of sequences back into rows: the checks, the kernel and the counts of all
operations that gather.
"""

import functools
import math
from typing import NamedTuple

from ... import cpu, errors
from ...runtime import (
    contract,
    dispatch,
    formats,
    launch,
    modules,
    params,
    plans,
    spelling,
)
from . import blocks

STEM = "gather_cache"


def sides(name):
    """The fields of `Sides` of gathered.cuh, whose member of a parameter struct is ``name``."""
    fields = (
        "src_block_stride", "src_group_stride", "src_offset_stride", "src_outer_stride",
        "src_head_stride", "dst_row_stride", "dst_outer_stride", "dst_head_stride",
        "scale_block_stride", "scale_offset_stride", "scale_head_stride",
    )  # fmt: skip
    return " ".join(f"{name}.{field}:i64" for field in fields)


# One struct of both kernels: the arguments are those of `op`, in order.
PARAMS = params.Struct(
    per_call="src_cache:ptr dst:ptr block_table:ptr cu_seq_lens:ptr seq_starts:ptr scale:ptr "
    "rows:i64 sequences:i64 table_width:i64 table_stride:i64 scale_value:f32 first_guarded:u32 "
    "even.segments:f32 even.rows:f32",
    constant=f"num_blocks:i64 start_stride:i64 {sides('sides')}",
)
GUARDED = ("seq_starts", "block_table")  # and the bounds, by the operation's name for them
# Several operations share the kernel of a raw copy, so faults name the operation.
RAW_ONLY, CONVERTING = ("gather_cache", "cp_gather_cache"), "gather_and_maybe_dequant_cache"
SHARING = (*RAW_ONLY, CONVERTING)
MAX_THREADS = 128


def op(name, plan, count, bounds="cu_seq_lens", options=()):
    """The `dispatch.Op` of an operation.

    Parameters
    ----------
    name : str
    plan : callable
        As of `dispatch.Op`.
    count : callable
        ``count(counts, *scalars)`` -> (rows to process, sequences). ``counts`` are the rows of dst,
        block_table, the bounds and seq_starts; ``scalars`` those of the call, without the first,
        the scale.
    bounds : str
        The name of the argument with each sequence's first row.
    options : tuple of str
        As of `dispatch.Op`.
    """
    # The fault number of seq_starts.
    first_guarded = 1 + (1 + len(GUARDED)) * SHARING.index(name) if name in SHARING else 1

    def fields(extents, options, scalars):
        del options
        rows, ((sequences, width), (step, _)), first_rows, starts = extents
        scale, *others = scalars or (0.0,)
        rows, sequences = count((rows, sequences, first_rows, starts), *others)
        even = launch.evenly(sequences, rows)
        return rows, (rows, sequences, width, step, scale, first_guarded, *even)

    return dispatch.Op(
        name,
        args=(
            dispatch.Arg("src_cache"),
            dispatch.Arg("dst", varies=dispatch.ROWS, written=True),
            dispatch.Arg("block_table", varies=(0, 1), index=True),
            dispatch.Arg(bounds, varies=dispatch.ROWS, index=True),
            dispatch.Arg("seq_starts", varies=dispatch.ROWS, optional=True, index=True),
            dispatch.Arg("scale", optional=True),
        ),
        plan=plan,
        destination=1,
        count=fields,
        options=options,
    )


# --- checks ---------------------------------------------------------------------------------------


def check_rows(check, dst, name="dst"):
    """The checks of dst, for every operation."""
    check.device(name, dst)
    check.contiguous(name, dst)
    check.writable(name, dst, rows=True)


def check_indices(check, names, indices):
    """The checks of block table, bounds and starts, by the operation's names for them."""
    table, bounds, starts = indices
    check.shape(names[0], table, "_ _")
    check.indices(names[1], bounds)
    if starts is not None:
        check.shape(names[2], starts, "_")
    for name, array in ((names[0], table), (names[2], starts)):
        if array is not None:
            check.dtype(name, array, *formats.INDICES)
            check.readable(name, array)
    check.contiguous(names[0], table)


def check_block_size(check, src, block_size, name="src_cache"):
    """Refuse blocks without slots."""
    if not block_size:
        expected = "blocks of at least one slot"
        raise errors.wrong("shape", f"{check.op}: {name}", expected, list(src.shape))


def count_rows(op, rows, num_tokens, bounds, table_rows, starts, name):
    """(Rows to process, sequences). ``num_tokens``: the rows that the caller wants; None for all
    ``rows`` of the argument ``name``. ``bounds``: the length of cu_seq_lens."""
    if not bounds:
        raise errors.wrong("shape", f"{op}: cu_seq_lens", "at least the end of the rows", "[0]")
    if num_tokens is None:
        num_tokens = rows
    if num_tokens > rows:
        expected = f"at most {rows}, the rows of {name}"
        raise errors.wrong("value", f"{op}: num_tokens", expected, num_tokens)
    check_sequences(op, bounds - 1, table_rows, starts)
    return num_tokens, bounds - 1


def check_sequences(op, sequences, table_rows, starts):
    """Require a row of block_table for each sequence, and a start if starts are given."""
    contract.check_sequence_count(op, "block_table", table_rows)
    for name, got in (("block_table", table_rows), ("seq_starts", starts)):
        if got is not None and got < sequences:
            expected = f"rows for {errors.counted(sequences, 'sequence')}"
            raise errors.wrong("shape", f"{op}: {name}", expected, got)


def _check_layout(check, src, dst, layout, names):
    """The `formats.CacheAxes` of ``layout``. Checks that the shapes of cache and rows fit it."""
    axes = formats.CACHE_AXES[contract.choice(check.op, "layout", layout, formats.CACHE_AXES)]
    if axes.token is None:
        check.shape(names.cache, src, "num_blocks block_size _ ...")
        inner = " ".join(f"inner_{i}" for i in range(1, len(src.shape) - 1))
        check.shape(names.cache, src, f"num_blocks block_size {inner}")
        check.shape(names.rows, dst, f"_ {inner}")
        return axes._replace(token=tuple(range(2, len(src.shape))))
    check.shape(names.cache, src, axes.dims)
    check.shape(names.rows, dst, "_ num_kv_heads head_size")
    got = math.prod(src.shape[axis] for axis in axes.token[1:])
    if got != dst.shape[2]:
        expected = (
            f"head_size / x = {dst.shape[2]} / {src.shape[-1]} in dimension 2 like {names.rows}"
        )
        raise errors.wrong("shape", f"{check.op}: {names.cache}", expected, src.shape[2])
    return axes


# --- rows of tokens -------------------------------------------------------------------------------


def scales(op, kv_cache_dtype, scale, scale_cache):
    """The scale of the elements as (array or None, float); the float counts where it is None."""
    if scale_cache is not None:
        if scale is not None:
            raise errors.wrong("value", f"{op}: scale", "None beside scale_cache", "another")
        return scale_cache, 0.0
    if formats.is_scaled(kv_cache_dtype):
        return contract.split_scale(op, "scale", scale)
    return None, 0.0


class Names(NamedTuple):
    """An operation's names for a cache, for the rows that it is read into, and for its scales."""

    cache: str = "src_cache"
    rows: str = "dst"
    scale: str = "scale"
    scale_cache: str = "scale_cache"


NAMES = Names()


class Movement(NamedTuple):
    """How a cache's tokens become rows.

    axes, stored, target : for `cpu`.
    block_size : slots of a block.
    converter, vector, outer, heads, length, scale_heads, group, per_thread : for the kernels, see
        gathered.cuh.
    threads : of a row.
    strides : the values of `sides`.
    """

    axes: formats.CacheAxes
    stored: formats.DType | None
    target: formats.DType
    block_size: int
    converter: str
    vector: int
    outer: int
    heads: int
    length: int
    scale_heads: int
    group: int
    per_thread: int
    threads: int
    strides: tuple

    @property
    def shape(self):
        """The kernels' `RowShape`."""
        return (
            f"cupy_cache::RowShape<{self.converter}, {self.outer}, {self.heads}, {self.length}, "
            f"{self.scale_heads}, {self.group}, {self.per_thread}>"
        )


def movement(check, src, dst, scale, layout, kv_cache_dtype, by_token, names=NAMES):
    """The `Movement` of a cache's tokens to rows, after all checks of these two arrays. Elements
    are copied, or multiplied by a scale; with ``by_token`` each token and head has its own."""
    table = formats.PER_TOKEN_HEAD_FORMATS if by_token else formats.CACHE_FORMATS
    fmt = formats.cache_format(check.op, kv_cache_dtype, table=table)
    axes = _check_layout(check, src, dst, layout, names)
    block_size = math.prod(src.shape[axis] for axis in axes.slots)
    check_block_size(check, src, block_size, names.cache)
    if fmt.stored is None:
        way_out = formats.way_to_convert(fmt, src.dtype) if dst.dtype in formats.FLOATS else ""
        if way_out and check.op in RAW_ONLY:
            way_out = f"{CONVERTING} converts"
        check.dtype(names.rows, dst, src.dtype, way_out=way_out)
    else:
        check.dtype(names.cache, src, *fmt.storage)
        check.dtype(names.rows, dst, *formats.FLOATS)
    check.device(names.cache, src)
    check_rows(check, dst, names.rows)
    if axes.token[-1] == len(src.shape) - 1:
        check.contiguous(names.cache, src)
    if fmt.stored is not None:
        check.aligned(names.rows, dst)
    scale_heads, scale_strides = _scales(check, src, axes, block_size, scale, by_token, names)
    shape = _row_shape(check, src, dst, axes, names)

    group = src.shape[axes.slots[-1]]
    group_stride, offset_stride = (src.strides[axes.slots[0]], src.strides[axes.slots[-1]])
    if len(axes.slots) == 1:
        group_stride = 0
    # Where heads have scales of their own, a vector must not span two heads.
    piece, scale_heads = shape.length, scale_heads if shape.length else 0
    if scale_heads:
        piece = math.gcd(piece, shape.outer * shape.heads * shape.length // scale_heads)
    vector = contract.converting_vector_bytes(
        src.dtype.bytes / dst.dtype.bytes,
        (piece * src.dtype.bytes, src.ptr, src.strides[0], group_stride, offset_stride,
         *shape.src_strides),
        (piece * dst.dtype.bytes, dst.ptr, dst.strides[0], *shape.dst_strides),
    )  # fmt: skip
    length = shape.length * dst.dtype.bytes
    row_vectors = shape.outer * shape.heads * length // vector
    per_thread = vectors_of_thread(row_vectors)
    return Movement(
        axes, fmt.stored, dst.dtype, block_size,
        spelling.dequantiser(fmt.stored, dst.dtype, vector), vector, shape.outer, shape.heads,
        length, scale_heads, group, per_thread, launch.ceil_div(row_vectors, per_thread),
        (src.strides[0], group_stride, offset_stride, *shape.src_strides,
         dst.strides[0], *shape.dst_strides, *scale_strides),
    )  # fmt: skip


def plan(op, described, layout="NHD", kv_cache_dtype="auto", by_token=False):
    """The plan of an operation whose rows are one cache's tokens."""
    src, dst, *indices, scale = described
    check = contract.Contract(op.name)
    moved = movement(check, src, dst, scale, layout, kv_cache_dtype, by_token)
    check_indices(check, [arg.name for arg in op.args[2:5]], indices)
    if dst.device.kind == "cpu":
        run = functools.partial(
            cpu.gather_cache, op=op.name, axes=moved.axes, stored=moved.stored, target=moved.target
        )
        return plans.NumPyPlan(run, op.args, described, ("src_cache", "dst"))
    kernel = modules.Kernel(
        op.name,
        STEM,
        f"gather_cache<{moved.converter}, {moved.vector}, {moved.outer}, {moved.heads}, "
        f"{moved.length}, {moved.scale_heads}, {moved.block_size}, {moved.group}, "
        f"{spelling.indices(*indices)}, {moved.per_thread}, {MAX_THREADS}>",
        PARAMS,
        guarded=[(name, argument) for name in SHARING for argument in (*GUARDED, "cu_seq_lens")],
        converts=moved.stored is not None,
    )
    return gpu_plan(kernel, moved.threads, described, moved.strides)


def _scales(check, src, axes, block_size, scale, by_token, names):
    """(Heads with a scale of their own, 0 for one scale for all; the scales' byte strides of
    blocks, slots and heads)."""
    has_heads = len(axes.token) > 1
    heads = src.shape[axes.token[0]] if has_heads else 1
    if by_token:
        if not has_heads:
            expected = (
                f"[num_blocks, block_size, num_kv_heads, head_size] beside {names.scale_cache}"
            )
            raise errors.wrong("shape", f"{check.op}: {names.cache}", expected, list(src.shape))
        name = names.scale_cache
        check.shape(name, scale, f"{src.shape[0]} {block_size} {heads}")
        check.dtype(name, scale, formats.FLOAT32)
        check.readable(name, scale)
        return heads, scale.strides
    if scale is None:
        return 0, (0, 0, 0)
    if not has_heads:
        check.scale(names.scale, scale)
        return 0, (0, 0, 0)
    step = check.head_scale(names.scale, scale, heads)
    return (heads, (0, 0, step)) if step else (0, (0, 0, 0))


def vectors_of_thread(row_vectors):
    """The vectors of a row that each thread moves: three where that divides the row, else two.
    Several share the cost of finding the row's sequence."""
    return 3 if row_vectors % 3 == 0 else min(2, row_vectors)


class _RowShape(NamedTuple):
    """A row as ``outer * heads`` segments of ``length`` elements without gaps, and the byte strides
    of these two dimensions on both sides."""

    outer: int
    heads: int
    length: int
    src_strides: tuple
    dst_strides: tuple


def _row_shape(check, src, dst, axes, names):
    """Inner dimensions are merged, from the last on, where they are adjacent on both sides."""
    extents = [src.shape[axis] for axis in axes.token]
    if 0 in extents:
        return _RowShape(1, 1, 0, (0, 0), (0, 0))
    src_strides, dst_strides = [src.strides[axis] for axis in axes.token], [*dst.strides[1:]]
    if len(dst_strides) < len(extents):  # the cache splits the rows' last dimension
        dst_strides.insert(-1, extents[-1] * dst_strides[-1])
    dims = zip(*map(reversed, (extents, src_strides, dst_strides)))
    merged = blocks.merge(dims, (src.dtype.bytes, dst.dtype.bytes))
    if merged is None:
        expected = "at most two inner dimensions around a contiguous run"
        got = (
            f"byte strides {list(src.strides)} of {names.cache} and {list(dst.strides)} for shape "
            f"{list(dst.shape)}"
        )
        raise errors.wrong("strides", f"{check.op}: {names.rows}", expected, got)
    (length, _, _), heads, outer = merged
    return _RowShape(outer[0], heads[0], length, (outer[1], heads[1]), (outer[2], heads[2]))


# --- plans ----------------------------------------------------------------------------------------


def gpu_plan(kernel, items, described, strides):
    """The plan of a kernel with ``items`` threads for each row. ``strides``: the struct's fields
    from src_block_stride on."""
    src, dst, _, _, starts, _ = described
    constants = src.shape[0], starts.strides[0] if starts else 0, *strides
    return plans.flat(kernel, dst.device.index, constants, items, MAX_THREADS)
