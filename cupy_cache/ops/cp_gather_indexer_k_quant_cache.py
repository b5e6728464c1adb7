# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the quantised keys of sequences, and their scales, from an indexer's cache."""

from __future__ import annotations

from .. import cpu, errors
from ..runtime import (
    contract,
    dispatch,
    formats,
    launch,
    modules,
    params,
    plans,
    spelling,
)
from ..types import ArrayLike, StreamLike
from .shared import gathering, indexer

NAME = "cp_gather_indexer_k_quant_cache"
PARAMS = params.Struct(
    per_call="kv_cache:ptr dst_k:ptr dst_scale:ptr block_table:ptr cu_seq_lens:ptr "
    "rows:i64 sequences:i64 table_width:i64 table_stride:i64 even.segments:f32 even.rows:f32",
    constant="num_blocks:i64 block_stride:i64 k_stride:i64 scale_stride:i64",
)
INDICES = "block_table", "cu_seq_lens", None  # there are no starts
VECTORS = 2  # of a key and of its scales that a thread moves: they pay for its search


def cp_gather_indexer_k_quant_cache(
    kv_cache: ArrayLike,
    dst_k: ArrayLike,
    dst_scale: ArrayLike,
    block_table: ArrayLike,
    cu_seq_lens: ArrayLike,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Copy the quantised keys and the scales of several sequences into contiguous rows.

    Sequence ``b`` owns the rows ``cu_seq_lens[b] <= r < cu_seq_lens[b + 1]``. With ``p = r -
    cu_seq_lens[b]``, row ``r`` gets the key and the scales at block ``block_table[b, p //
    block_size]`` and offset ``p % block_size``. Rows below ``cu_seq_lens[0]`` and from
    ``cu_seq_lens[B]`` on are left as they are.

    Parameters
    ----------
    kv_cache : array [num_blocks, block_size, head_size + 4 * head_size / quant_block_size]
        As `indexer_k_quant_and_cache` writes it; of uint8 or any other 8-bit dtype.
    dst_k : array [num_rows, head_size]
        Written in place; of any 8-bit dtype. The last dimension contiguous, the stride of the rows
        free.
    dst_scale : array [num_rows, 4 * head_size / quant_block_size]
        Likewise; or [num_rows, head_size / quant_block_size] of float32. The bytes of the scales
        are copied as they are, whatever their format. The quant block size follows from this shape.
    block_table : int32 or int64 array [B, W]
        Block numbers of each sequence; the last dimension contiguous.
    cu_seq_lens : int32 or int64 array [B + 1]
        Where each sequence's rows start, and where the last one's end; never descending;
        contiguous.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``dst_k``.

    Raises
    ------
    ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    A row that would be read from outside the table or the cache is skipped, and recorded under its
    number, with the argument ``block_table`` (see `raise_faults`). That is so where the page is not
    below W, and the value recorded is then the page; or where the block number is outside
    0..num_blocks - 1. Numbers of ``cu_seq_lens`` that descend are treated as by `gather_cache`.

    Names, order and bytes are those of vLLM's operation of the same name.
    """
    OP((kv_cache, dst_k, dst_scale, block_table, cu_seq_lens), (), stream)


def _plan(op, described, options):
    del options
    kv_cache, dst_k, dst_scale, table, lengths = described
    check = contract.Contract(op.name)
    check.shape("dst_k", dst_k, "_ head_size")
    check.shape("dst_scale", dst_scale, "_ _")
    check.dtype("dst_k", dst_k, *formats.BYTES)
    check.dtype("dst_scale", dst_scale, *formats.BYTES, formats.FLOAT32)
    head_size, scale_bytes = dst_k.shape[1], dst_scale.shape[1] * dst_scale.dtype.bytes
    check.positive("head_size", head_size)
    scales, rest = divmod(scale_bytes, indexer.SCALE_BYTES)
    if rest or not scales or head_size % scales:
        expected = (
            f"scales of {indexer.SCALE_BYTES} bytes, as many as a divisor of the head size "
            f"{head_size}"
        )
        got = f"{list(dst_scale.shape)} of {dst_scale.dtype.name}"
        raise errors.wrong("shape", f"{op.name}: dst_scale", expected, got)
    indexer.check_cache(check, kv_cache, head_size, scales)
    for name, array in (("dst_k", dst_k), ("dst_scale", dst_scale)):
        gathering.check_rows(check, array, name)
        check.aligned(name, array)
    gathering.check_indices(check, INDICES, (table, lengths, None))

    if kv_cache.device.kind == "cpu":
        run, bits = cpu.cp_gather_indexer_k_quant_cache, ("kv_cache", "dst_k", "dst_scale")
        return plans.NumPyPlan(run, op.args, described, bits)

    num_blocks, block_size, _ = kv_cache.shape
    block_stride = kv_cache.strides[0]
    vector = contract.vector_bytes(
        head_size, kv_cache.ptr, block_stride, dst_k.ptr, dst_k.strides[0]
    )
    scale_vector = contract.vector_bytes(
        scale_bytes, kv_cache.ptr, block_stride, block_size * head_size, dst_scale.ptr,
        dst_scale.strides[0],
    )  # fmt: skip
    most = max(head_size // vector, scale_bytes // scale_vector)
    threads = launch.ceil_div(most, VECTORS)
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"{NAME}<{vector}, {scale_vector}, {head_size}, {scale_bytes}, "
        f"{threads}, {block_size}, {spelling.indices(table, lengths)}, {indexer.MAX_THREADS}>",
        PARAMS,
        guarded=("block_table", "cu_seq_lens"),
    )
    constants = num_blocks, block_stride, dst_k.strides[0], dst_scale.strides[0]
    return plans.flat(kernel, kv_cache.device.index, constants, threads, indexer.MAX_THREADS)


def _count(extents, options, scalars):
    del options, scalars
    rows, scale_rows, ((sequences, width), (step, _)), bounds = extents
    contract.check_sequence_count(NAME, "block_table", sequences)
    if scale_rows != rows:
        expected = f"{errors.counted(rows, 'row')}, as many as dst_k has"
        raise errors.wrong("shape", f"{NAME}: dst_scale", expected, scale_rows)
    if bounds != sequences + 1:
        expected = f"[{sequences + 1}], one more than the rows of block_table"
        raise errors.wrong("shape", f"{NAME}: cu_seq_lens", expected, f"[{bounds}]")
    return rows, (rows, sequences, width, step, *launch.evenly(sequences, rows))


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("kv_cache"),
        dispatch.Arg("dst_k", varies=dispatch.ROWS, written=True),
        dispatch.Arg("dst_scale", varies=dispatch.ROWS, written=True),
        dispatch.Arg("block_table", varies=(0, 1), index=True),
        dispatch.Arg("cu_seq_lens", varies=dispatch.ROWS, index=True),
    ),
    plan=_plan,
    destination=(1, 2),
    count=_count,
)
