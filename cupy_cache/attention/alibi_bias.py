# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The bias of attention with linear biases (ALiBi), for attention that takes it as a tensor."""

from __future__ import annotations

import functools
from typing import Any, Literal

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

NAME = "alibi_bias"
PARAMS = params.Struct(
    "slopes:ptr query_positions:ptr key_positions:ptr out:ptr query_start_loc:ptr cu_seq_lens:ptr "
    "heads:i64 queries:i64 keys:i64 out_head_stride:i64 out_query_stride:i64 sequences:i64 "
    "even.segments:f32 even.rows:f32",
    "slope_stride:i64 query_stride:i64 key_stride:i64 causal:u32 root:u32",
)
MAX_THREADS = 256
VECTOR = 16
BLOCKS_PER_PROCESSOR = 8  # with fewer, the heads are spread over blocks too


def alibi_bias(
    slopes: ArrayLike,
    query_positions: ArrayLike,
    key_positions: ArrayLike,
    *,
    out: ArrayLike | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    sqrt: bool = False,
    causal: bool = False,
    query_start_loc: ArrayLike | None = None,
    cu_seq_lens: ArrayLike | None = None,
    stream: StreamLike | None = None,
) -> Any:
    """Compute what ALiBi adds to the scaled attention scores: for head ``h``, query ``i`` and key
    ``j``, ``slopes[h] * (key_positions[j] - query_positions[i])``.

    Attention that adds ``slope * k`` instead, for the key's position ``k`` alone, differs by a
    constant for each row, which the softmax removes. A query position of 0 gives that form, and the
    length of the sequence less 1 the one that ends with 0.

    Parameters
    ----------
    slopes : float32 array [num_heads]
        Such as `alibi_slopes` returns; any stride.
    query_positions : int32 or int64 array [num_queries]
        Positions in the sequence; any stride.
    key_positions : int32 or int64 array [num_keys]
        Likewise.
    out : array [num_heads, num_queries, num_keys], optional
        Written in place. The last dimension contiguous; the other strides are free, so that it may
        be a view of rows that are padded, as some attention needs them.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Of the result: by default that of ``out``, or else float32.
    sqrt : bool
        The bias is ``-slopes[h] * sqrt(query position - key position)``, and 0 where the key is
        ahead of the query, as in Step1.
    causal : bool
        Keys ahead of the query get -infinity.
    query_start_loc, cu_seq_lens : int32 or int64 arrays [num_sequences + 1], optional
        Both, or neither: queries and keys are those of a ragged batch, one sequence after the
        other. Sequence ``b`` has the queries from ``query_start_loc[b]`` to before
        ``query_start_loc[b + 1]``, as for `paged_attention`, and the keys from ``cu_seq_lens[b]``
        to before ``cu_seq_lens[b + 1]``, as `gather_cache` puts them; never descending, contiguous.
        Keys of other sequences than the query's get -infinity, and so do all keys for a query that
        belongs to none. Positions are those in their own sequences.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``out``, or else
        ``query_positions``.

    Returns
    -------
    array [num_heads, num_queries, num_keys]
        ``out`` where it was given; otherwise a new array of the framework of ``query_positions``,
        on its device (of CuPy or NumPy where that framework's arrays cannot be written).

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Nothing synchronises, and nothing is uploaded. The difference of the positions is taken in 64
    bits and rounded to float32, which holds it exactly up to 2**24; for ``sqrt`` the correctly
    rounded root follows. The float32 product with the slope is rounded to ``dtype`` to nearest,
    ties to even. CPU and GPU agree in every bit.

    A number of ``query_start_loc`` or ``cu_seq_lens`` below the one before is recorded (see
    `raise_faults`) under its place. A query that lies between the starts of several sequences is
    then one of them's, or none's; the same on CPU and GPU.

    The formulas are those of Press, Smith, Lewis: "Train Short, Test Long" (2022), and, for
    ``sqrt``, of vLLM's attention kernels.
    """
    if stream is not None:
        stream = streams.pointer(NAME, stream)
    wanted = _dtype(dtype)
    options = (
        wanted and wanted.name,
        contract.flag(NAME, "sqrt", sqrt),
        contract.flag(NAME, "causal", causal),
    )
    given = slopes, query_positions, key_positions, out
    if query_start_loc is not None or cu_seq_lens is not None:
        for name, array in (("query_start_loc", query_start_loc), ("cu_seq_lens", cu_seq_lens)):
            if array is None:
                expected = "an array beside the other starts"
                raise errors.wrong("type", f"{NAME}: {name}", expected, "None")
        given = *given, query_start_loc, cu_seq_lens
    made = OP(given, options, stream)
    return out if made is None else made


def _new_out(op, objects, options, stream):
    """A new array for the result."""
    sizes = {"slopes": "num_heads", "query_positions": "num_queries", "key_positions": "num_keys"}
    views = [arrays.view(array, f"{op}: {name}") for name, array in zip(sizes, objects)]
    check = contract.Contract(op)
    for (name, size), array in zip(sizes.items(), views):
        check.shape(name, array, size)
    like, dtype = views[1], formats.DTYPES[options[0] or formats.FLOAT32.name]
    shape = tuple([check.sizes[size] for size in sizes.values()])
    return making.empty(like.framework, like.device, shape, dtype, stream)


def _dtype(dtype):
    """The `formats.DType` asked for, if any."""
    if dtype is None:
        return None
    try:
        found = formats.dtype_named(dtype, f"{NAME}: dtype")
    except Exception:  # of an object that cannot even be shown, too
        found = None
    if found not in formats.FLOATS:
        expected = f"one of {', '.join(d.name for d in formats.FLOATS)}"
        raise errors.wrong("value", f"{NAME}: dtype", expected, errors.shown(dtype))
    return found


def _plan(op, described, options):
    wanted, sqrt, causal = options
    check = contract.Contract(NAME)
    slopes, queries, keys, out, *starts = described
    for arg, array in zip(op.args[:3], described):
        check.shape(arg.name, array, "_")
        indices = (formats.FLOAT32,) if array is slopes else formats.INDICES
        check.dtype(arg.name, array, *indices)
    check.shape("out", out, "_ _ _")
    check.dtype("out", out, *([formats.DTYPES[wanted]] if wanted else formats.FLOATS))
    for arg, array in zip(op.args, described[:4]):
        check.readable(arg.name, array)
    for arg, array in zip(op.args[4:], starts):
        if array is not None:
            check.indices(arg.name, array)
    check.contiguous("out", out)
    arrays.require_writable(out, NAME, "out")
    if out.device.kind == "cpu":
        run = functools.partial(cpu.alibi_bias, dtype=out.dtype, sqrt=sqrt, causal=causal)
        return plans.NumPyPlan(run, op.args, described, ("out",))

    device = out.device.index
    wide = contract.vector_bytes(out.ptr, *out.strides[:2]) == VECTOR
    vector = VECTOR if wide else out.dtype.bytes
    types = spelling.indices(queries, keys, *starts)
    element = spelling.element(out.dtype)
    kernel = modules.Kernel(
        NAME,
        NAME,
        f"{NAME}<{element}, {vector}, {types}, {MAX_THREADS}>",
        PARAMS,
        guarded=("query_start_loc", "cu_seq_lens"),
    )
    strides = slopes.strides[0], queries.strides[0], keys.strides[0]
    launcher = launch.Launcher(kernel, device, (*strides, causal, sqrt))
    of_vector = vector // out.dtype.bytes

    def shape(work):
        heads, rows, columns = work
        vectors = launch.ceil_div(columns, of_vector)
        threads = min(MAX_THREADS, launch.ceil_div(vectors, launch.WARP) * launch.WARP)
        x, y = launch.ceil_div(vectors, threads), min(rows, launch.MAX_GRID_YZ)
        enough = BLOCKS_PER_PROCESSOR * launch.processors(device)
        z = min(heads, launch.ceil_div(enough, x * y), launch.MAX_GRID_YZ)
        return (x, y, z), threads

    return plans.KernelPlan(launcher, shape)


def _count(extents, options, scalars):
    """(Heads, queries and keys, or 0; these and the strides of heads and queries)."""
    del options, scalars
    *counts, (shape, strides), starts, bounds = extents
    if (*shape,) != (*counts,):
        expected = f"[num_heads={counts[0]}, num_queries={counts[1]}, num_keys={counts[2]}]"
        raise errors.wrong("shape", f"{NAME}: out", expected, list(shape))
    contract.check_elements_apart(NAME, "out", shape, strides, strides[-1] if shape[-1] > 1 else 1)
    if starts != bounds or starts == 0:
        expected = f"[{starts}] like query_start_loc" if starts else "one more than sequences"
        raise errors.wrong("shape", f"{NAME}: cu_seq_lens", expected, f"[{bounds}]")
    sequences = starts - 1 if starts else 0
    contract.check_sequence_count(NAME, "query_start_loc", sequences)
    fields = *shape, *strides[:2], sequences, *launch.evenly(sequences, shape[1])
    return tuple(shape) if 0 not in shape else 0, fields


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("slopes", varies=dispatch.ROWS),
        dispatch.Arg("query_positions", varies=dispatch.ROWS, index=True),
        dispatch.Arg("key_positions", varies=dispatch.ROWS, index=True),
        dispatch.Arg("out", varies=(0, 1, 2), written=True),
        dispatch.Arg("query_start_loc", varies=dispatch.ROWS, optional=True, index=True),
        dispatch.Arg("cu_seq_lens", varies=dispatch.ROWS, optional=True, index=True),
    ),
    plan=_plan,
    destination=3,
    count=_count,
    result=dispatch.Result(3, (0, 1, 2), _new_out),
)
