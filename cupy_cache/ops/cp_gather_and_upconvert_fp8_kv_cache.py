# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Reading fp8_ds_mla entries of sequences back into rows of numbers."""

from __future__ import annotations

import functools
from typing import Literal

from .. import cpu, errors
from ..runtime import contract, formats, modules, plans, spelling
from ..types import ArrayLike, StreamLike
from .shared import gathering

NAME = "cp_gather_and_upconvert_fp8_kv_cache"
ROPE_DTYPES = ("bfloat16", "float16")


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: ArrayLike,
    dst: ArrayLike,
    block_table: ArrayLike,
    workspace_starts: ArrayLike,
    batch_size: int,
    seq_starts: ArrayLike | None = None,
    *,
    rope_dtype: Literal["bfloat16", "float16"] | None = None,
    stream: StreamLike | None = None,
) -> None:
    """Read the fp8_ds_mla entries of several sequences out of a paged cache, as numbers, into rows.

    Sequence ``b < batch_size`` owns the rows ``workspace_starts[b] <= r < workspace_starts[b + 1]``
    of ``dst``; the last one those up to the end of ``dst``. Rows below ``workspace_starts[0]`` are
    left as they are. With ``p = seq_starts[b] + r - workspace_starts[b]``, row ``r`` is made of the
    entry ``src_cache[block_table[b, p // block_size], p % block_size]``.

    Parameters
    ----------
    src_cache : array [num_blocks, block_size, 656]
        Of uint8 or any other 8-bit dtype; strides are free except the last dimension's.
    dst : array [num_rows, 576]
        Written in place; bfloat16, float16 or float32. The last dimension contiguous, the stride of
        the rows free.
    block_table : int32 or int64 array [at least batch_size, W]
        Block numbers of each sequence; the last dimension contiguous.
    workspace_starts : int32 or int64 array [batch_size]
        Where each sequence's rows start in ``dst``; never descending; contiguous.
    batch_size : int
        The number of sequences.
    seq_starts : int32 or int64 array [at least batch_size], optional
        The position in its sequence, in tokens, from which each sequence is read; any value. By
        default 0.
    rope_dtype : {"bfloat16", "float16"}, optional
        What the entries were written from, which decides what the 16 bits of their rope part mean.
        By default the dtype of ``dst``, or bfloat16 where that is float32.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``dst``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    The entry is that of `concat_and_cache_mla` with "fp8_ds_mla". Columns 0 to 511 of a row are its
    e4m3 elements times the float32 scale of their tile of 128, rounded to nearest even. Columns 512
    to 575 are the rope part, whose bits are copied where ``dst`` has ``rope_dtype``. Where a number
    is converted, a NaN stays a NaN; which one is not defined.

    A row that would be read from outside the table or the cache is skipped and recorded (see
    `raise_faults`) as by `gather_cache`, and so are numbers of ``workspace_starts`` that descend.

    Names, order and meaning are those of vLLM's cache operation of the same name, except its
    reading of rows from host memory (the arguments ``host_cache``, ``host_row_ids`` and
    ``device_row_ids``), which is not offered.
    """
    batch_size = contract.integer(NAME, "batch_size", batch_size, 0)
    arrays = src_cache, dst, block_table, workspace_starts, seq_starts
    OP(arrays, (rope_dtype,), stream, (0.0, batch_size))


def _plan(op, described, options):
    src, dst, *indices, _ = described
    (rope_dtype,) = options
    check = contract.Contract(op.name)
    check.shape("src_cache", src, f"num_blocks block_size {formats.DS_ENTRY_BYTES}")
    check.shape("dst", dst, f"_ {formats.DS_LATENT + formats.DS_ROPE}")
    block_size = src.shape[1]
    gathering.check_block_size(check, src, block_size)
    check.dtype("src_cache", src, *formats.BYTES)
    check.dtype("dst", dst, *formats.FLOATS)
    check.device("src_cache", src)
    gathering.check_rows(check, dst)
    gathering.check_indices(check, [arg.name for arg in op.args[2:5]], indices)
    check.contiguous("src_cache", src)
    check.aligned("dst", dst)
    if rope_dtype is None:
        rope_dtype = dst.dtype.name if dst.dtype.bytes == 2 else "bfloat16"
    contract.choice(op.name, "rope_dtype", rope_dtype, ROPE_DTYPES)
    if dst.device.kind == "cpu":
        run = functools.partial(
            cpu.gather_fp8_ds_mla, op=op.name, rope=formats.DTYPES[rope_dtype], target=dst.dtype
        )
        return plans.NumPyPlan(run, op.args, described, ("src_cache", "dst"))

    vector = contract.vector_bytes(dst.ptr, dst.strides[0])
    source_vector = contract.vector_bytes(src.ptr, *src.strides[:2])
    rope = None if rope_dtype == dst.dtype.name else formats.DTYPES[rope_dtype]
    converters = [
        spelling.dequantiser(stored, dst.dtype, vector) for stored in (formats.E4M3, rope)
    ]
    row_vectors = dst.shape[1] * dst.dtype.bytes // vector
    per_thread = gathering.vectors_of_thread(row_vectors)
    kernel = modules.Kernel(
        op.name,
        gathering.STEM,
        f"gather_fp8_ds_mla<{', '.join(converters)}, {vector}, {source_vector}, {block_size}, "
        f"{spelling.indices(*indices)}, {per_thread}, {gathering.MAX_THREADS}>",
        gathering.PARAMS,
        guarded=(*gathering.GUARDED, "workspace_starts"),
        converts=True,
    )
    strides = (src.strides[0], 0, src.strides[1], 0, 0, dst.strides[0], 0, 0, 0, 0, 0)
    return gathering.gpu_plan(kernel, row_vectors // per_thread, described, strides)


def _count(extents, batch_size):
    rows, table_rows, starts_of_rows, starts = extents
    if starts_of_rows != batch_size:
        expected = f"{starts_of_rows}, the length of workspace_starts"
        raise errors.wrong("value", f"{NAME}: batch_size", expected, batch_size)
    gathering.check_sequences(NAME, batch_size, table_rows, starts)
    return rows if batch_size else 0, batch_size


OP = gathering.op(NAME, _plan, _count, bounds="workspace_starts", options=("rope_dtype",))
