# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the pages of sequences into contiguous rows."""

from .. import contract, cpu, dispatch, formats, launch, modules, params
from ..errors import ShapeError, StrideError

PARAMS = params.Struct(
    per_call="src_cache:ptr dst:ptr block_table:ptr cu_seq_lens:ptr seq_starts:ptr "
    "rows:i64 sequences:i64",
    constant="num_blocks:i64 table_width:i64 table_tokens:i64 table_stride:i64 start_stride:i64 "
    "src_block_stride:i64 src_offset_stride:i64 src_head_stride:i64 "
    "dst_row_stride:i64 dst_head_stride:i64",
)
MAX_THREADS = 256
VECTORS = 2  # that a thread moves


def gather_cache(src_cache, dst, block_table, cu_seq_lens, seq_starts=None, *, stream=None):
    """Copy the tokens of several sequences out of a paged cache into contiguous rows.

    Sequence ``b`` owns the rows ``cu_seq_lens[b] <= r < cu_seq_lens[b + 1]`` of ``dst``. With
    ``p = seq_starts[b] + r - cu_seq_lens[b]``, row ``r`` becomes
    ``src_cache[block_table[b, p // block_size], p % block_size]``. Rows below ``cu_seq_lens[0]``
    and from ``cu_seq_lens[B]`` on are left as they are.

    Parameters
    ----------
    src_cache : array [num_blocks, block_size, ...]
        Of any supported dtype; the bytes are copied as they are. One or more dimensions follow the
        first two: [head size] for multi-head latent attention, [heads, head size] for the others.
        Strides are free except the last dimension's, which is contiguous: NHD, HND as a permuted
        view, and views of packed pages all work.
    dst : array [num_rows, ...]
        Written in place; dtype and inner dimensions of ``src_cache``; strides as free as there.
        Of the inner dimensions, all that are adjacent in both arrays count as one; one more is
        allowed.
    block_table : int32 or int64 array [B, W]
        Block numbers of each sequence; the last dimension contiguous.
    cu_seq_lens : int32 or int64 array [B + 1]
        Where each sequence's rows start in ``dst``, and where the last one's end; never
        descending; contiguous.
    seq_starts : int32 or int64 array [B], optional
        The position in its sequence, in tokens, from which each sequence is read; any value, not
        only multiples of the block size. By default 0.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``dst``.

    Raises
    ------
    ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    A row that would be read from outside the table or the cache is skipped and recorded (see
    `raise_faults`) under its number: with the argument ``seq_starts`` where the start is outside
    0..W * block_size - 1, and with ``block_table`` where the page is not below W (the value
    recorded is the page) or the block number is outside 0..num_blocks - 1.

    The mapping is that of vLLM's ``cp_gather_cache``.
    """
    OP((src_cache, dst, block_table, cu_seq_lens, seq_starts), (), stream)


def _plan(op, described, options):
    src, dst, table, lengths, starts = described
    check = contract.Contract(op.name)
    check.shape("src_cache", src, "num_blocks block_size _ ...")
    inner = " ".join(f"inner_{i}" for i in range(1, len(src.shape) - 1))
    check.shape("src_cache", src, f"num_blocks block_size {inner}")
    check.shape("dst", dst, f"_ {inner}")
    check.shape("block_table", table, "_ table_width")
    check.shape("cu_seq_lens", lengths, "_")
    num_blocks, block_size = src.shape[:2]
    if not block_size:
        raise ShapeError(
            f"{op.name}: Invalid shape of src_cache: expected blocks of at least one slot, got "
            f"{list(src.shape)}"
        )
    check.dtype("dst", dst, src.dtype)
    indices = {"block_table": table, "cu_seq_lens": lengths}
    if starts is not None:
        check.shape("seq_starts", starts, "_")
        indices["seq_starts"] = starts
    for name, array in {"src_cache": src, "dst": dst, **indices}.items():
        check.device(name, array)
    for name, array in indices.items():
        check.dtype(name, array, *formats.INDICES)
        check.aligned(name, array)
    for name, array in (("src_cache", src), ("dst", dst), ("block_table", table)):
        check.contiguous(name, array)
    check.contiguous_rows("cu_seq_lens", lengths)
    check.writable("dst", dst, rows=True)
    heads, length, src_head_stride, dst_head_stride = _segments(op.name, src, dst)

    bits = src.dtype.bits
    if dst.device.kind == "cpu":
        dtypes = (bits, bits, *(a and a.dtype.numpy for a in (table, lengths, starts)))
        return dispatch.CpuPlan(cpu.gather_cache, dtypes)

    vector = contract.vector_bytes(
        length, src.ptr, dst.ptr, *src.strides[:2], dst.strides[0], src_head_stride, dst_head_stride
    )
    row_vectors = heads * length // vector
    per_thread = min(VECTORS, max(row_vectors, 1))
    index = [formats.INDEX_NAMES[(a or lengths).dtype.name] for a in (table, lengths, starts)]
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"gather_cache<{vector}, {heads}, {length}, {block_size}, {', '.join(index)}, "
        f"{per_thread}, {MAX_THREADS}>",
        PARAMS,
        guarded=("seq_starts", "block_table"),
    )
    width = check.sizes["table_width"]
    device = dst.device.index
    launcher = launch.Launcher(
        kernel,
        device,
        (num_blocks, width, min(width * block_size, 2**63 - 1), table.strides[0],
         starts.strides[0] if starts else 0, *src.strides[:2], src_head_stride, dst.strides[0],
         dst_head_stride),
    )  # fmt: skip
    items = launch.ceil_div(row_vectors, per_thread)
    return dispatch.GpuPlan(launcher, launch.FlatShape(items, device, MAX_THREADS))


def _segments(op, src, dst):
    """A row as (segments, bytes of a segment, their stride in ``src``, their stride in ``dst``).

    Inner dimensions are merged, from the last on, where they are adjacent on both sides.
    """
    if 0 in src.shape[2:]:
        return 1, 0, 0, 0
    merged = [(src.dtype.bytes, 1, 1)]  # (extent, stride in src, stride in dst), bytes first
    for extent, s, d in zip(*(reversed(x) for x in (src.shape[2:], src.strides, dst.strides))):
        count, s_inner, d_inner = merged[-1]
        if extent == 1:
            continue
        if (s, d) == (s_inner * count, d_inner * count):
            merged[-1] = (count * extent, s_inner, d_inner)
        else:
            merged.append((extent, s, d))
    if len(merged) > 2:
        raise StrideError(
            f"{op}: Invalid strides of dst: expected at most one inner dimension around a "
            f"contiguous run, got byte strides {list(src.strides)} of src_cache and "
            f"{list(dst.strides)} for shape {list(dst.shape)}"
        )
    (length, _, _), (heads, *strides) = (*merged, (1, 0, 0))[:2]
    return heads, length, *strides


def _count(extents):
    rows, sequences, bounds, starts = extents
    if bounds != sequences + 1:
        raise ShapeError(
            f"gather_cache: Invalid shape of cu_seq_lens: expected [{sequences + 1}], one more "
            f"than the rows of block_table, got [{bounds}]"
        )
    if starts not in (None, sequences):
        raise ShapeError(
            f"gather_cache: Invalid shape of seq_starts: expected [{sequences}], the rows of "
            f"block_table, got [{starts}]"
        )
    return rows, sequences


OP = dispatch.Op(
    "gather_cache",
    args=(
        dispatch.Arg("src_cache"),
        dispatch.Arg("dst", rows=True),
        dispatch.Arg("block_table", rows=True),
        dispatch.Arg("cu_seq_lens", rows=True),
        dispatch.Arg("seq_starts", rows=True, optional=True),
    ),
    plan=_plan,
    destination=1,
    count=_count,
)
