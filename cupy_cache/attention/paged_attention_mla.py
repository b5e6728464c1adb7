# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention of queries over the pages of a cache."""

from __future__ import annotations

import functools
from typing import Any

from .. import cpu
from ..errors import ShapeError
from ..runtime import (
    arrays,
    contract,
    dispatch,
    formats,
    launch,
    modules,
    params,
    plans,
    spelling,
    streams,
)
from ..runtime.devices import NOWHERE, Device
from ..runtime.formats import DS_ENTRY_BYTES, DS_LATENT, DS_ROPE, FP8_DS_MLA
from ..types import ArrayLike, Scale, StreamLike
from .shared import steps

NAME = "paged_attention_mla"
PARAMS = params.Struct(
    per_call="query:ptr kv_cache:ptr block_table:ptr seq_lens:ptr query_start_loc:ptr "
    "kv_scale:ptr partial:ptr out:ptr lse:ptr tokens:i64 sequences:i64 table_width:i64 "
    "table_stride:i64 places:i64 scale:f32 kv_scale_value:f32",
    constant="num_blocks:i64 query_stride:i64 query_head_stride:i64 out_stride:i64 "
    "out_head_stride:i64 lse_stride:i64 lse_head_stride:i64 block_stride:i64 slot_stride:i64 "
    "block_size:u32 heads:u32 processors:u32 causal:u32 chunks_in:u32 pairs_out:u32",
)
FLOAT32 = formats.DTYPES["float32"]


def paged_attention_mla(
    query: ArrayLike,
    kv_cache: ArrayLike,
    block_table: ArrayLike,
    seq_lens: ArrayLike,
    *,
    scale: float,
    kv_lora_rank: int = 512,
    query_start_loc: ArrayLike | None = None,
    causal: bool = True,
    kv_cache_dtype: str = "auto",
    kv_scale: Scale = None,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    stream: StreamLike | None = None,
) -> Any:
    """Attend from a step's queries to the latent entries of their sequences, in their pages.

    Each token has one entry, which all query heads share: the whole of it is the key, its first
    ``kv_lora_rank`` elements are the value. The queries are those that the weights of the keys'
    up-projection were absorbed into; those of the values' are applied to what comes back.

    Sequence ``b`` has ``L = seq_lens[b]`` tokens in the cache, those of this step included; token
    ``p`` is in block ``block_table[b, p // block_size]`` at offset ``p % block_size``. It owns the
    rows ``query_start_loc[b] <= t < query_start_loc[b + 1]`` of ``query``, or row ``b`` alone where
    there is no ``query_start_loc``. Of ``n`` rows, row ``i`` stands at position ``p = L - n + i``
    and sees the tokens 0 to ``p``. ``out`` is the softmax of ``scale * query . entry`` over these,
    times the values.

    Parameters
    ----------
    query : array [num_tokens, num_heads, entry_size]
        The latent part first, then the rope part, as in an entry. float16, bfloat16 or, on the CPU
        alone, float32; the last dimension contiguous. Any number of heads.
    kv_cache : array [num_blocks, block_size, entry_size]
        As `concat_and_cache_mla` writes it; strides are free except the last. Of the dtype of
        ``query`` where it is raw; otherwise of the 8-bit dtype stored, or uint8. For "fp8_ds_mla"
        [num_blocks, block_size, 656] of any 8-bit dtype, where ``query`` has 576 elements and
        ``kv_lora_rank`` is 512.
    block_table : int32 or int64 array [at least num_seqs, width]
        Block numbers of each sequence; the last dimension contiguous. What is behind a sequence's
        last page is not read.
    seq_lens : int32 or int64 array [num_seqs]
        Tokens of each sequence in the cache. Contiguous.
    scale : float
        What products of queries and entries are multiplied with. It has no default: models take
        the size of a head before absorption, not that of an entry, such as ``1 / sqrt(128 + 64)``,
        and often a factor of their rope scaling.
    kv_lora_rank : int
        Elements of the latent part, the values. On a GPU at most 512, and entries have at most 640.
    query_start_loc : int32 or int64 array [num_seqs + 1], optional
        Where each sequence's rows of ``query`` start, and where the last one's end; never
        descending, and inside ``query``; contiguous. Others are not followed, but which
        rows their sequences have is then not the same on CPU and GPU. Rows of no sequence are left
        as they are in ``out`` and ``lse``. By default each sequence has one row, so ``num_seqs`` is
        ``num_tokens``.
    causal : bool
        False: every query of a sequence sees all its tokens.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw cache. "fp8" or "fp8_e4m3", "fp8_e5m2",
        "int8": an element is what is stored, times ``kv_scale``. "fp8_ds_mla": see
        `concat_and_cache_mla`; its rope part is taken to be of the dtype of ``query``.
    kv_scale : float, or float32 array [1] or of no dimensions, optional
        The ``scale`` that `concat_and_cache_mla` wrote with. An array is read on its device. None
        is 1.0. Raw and "fp8_ds_mla" caches ignore it.
    out : array [at least num_tokens, num_heads, kv_lora_rank], optional
        Written in place; of the dtype of ``query``; the last dimension contiguous.
    lse : float32 array [at least num_tokens, num_heads], optional
        Written in place: the natural logarithm of the sum of the exponentials of a query's logits.
        Any strides, so that it may be the transpose of what `merge_attn_states` takes.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``out``, or else
        ``query``.

    Returns
    -------
    array [num_tokens, num_heads, kv_lora_rank]
        ``out`` where it was given; otherwise a new array of the framework of ``query``, on its
        device (of CuPy or NumPy where that framework's arrays cannot be written).

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Nothing synchronises: tables and lengths are read on the device, so a captured graph serves all
    lengths that its table has room for. There is no plan on the host and no workspace to give.

    A query that sees no token gets zeros in ``out`` and -infinity in ``lse``. What a cache holds
    where no query of a sequence looks, as in the unwritten rows of its last block, has no effect,
    NaN included. A value that is not finite may reach further queries of its sequence than those
    that see it.

    A length below 0 or above ``width * block_size`` counts as the nearer of the two, and tokens in
    blocks that the cache does not have count as not there. Both are recorded under the number of
    the sequence (see `raise_faults`), arguments ``seq_lens`` and ``block_table``.

    A sequence's result has the same bits whatever else is in the batch. Logits, softmax and sums
    are float32; on a GPU the weights are rounded to the dtype of ``query`` before they multiply
    values, and to float16 where entries have 8 bits.

    On a GPU a sequence is cut into parts by its own length alone. How many of them a thread block
    takes is decided on the device, by what there is to do in the whole batch. If several may share
    a sequence, their results go through memory that the framework of ``query`` allocates for the
    call, in the order of its stream (at most some 70 MiB for 512 values), and a second launch joins
    them. Caches whose addresses and strides are multiples of 16 bytes are read fastest.
    """
    if stream is not None:
        stream = streams.pointer(NAME, stream)
    rank = contract.integer(NAME, "kv_lora_rank", kv_lora_rank, 1)
    options = kv_cache_dtype, rank, contract.flag(NAME, "causal", causal)
    kv_array, kv_number = None, 1.0
    if formats.is_scaled(kv_cache_dtype):
        kv_array, kv_number = contract.split_scale(NAME, "kv_scale", kv_scale)
    number = contract.number(NAME, "scale", scale, kind="")
    like = None
    if out is None:
        like = arrays.view(query, f"{NAME}: query")
        out = _new_out(like, rank, stream)
    framework, device, query_shape = _place(query, like)
    cut, partial = False, None
    if device.kind == "cuda":
        shapes = (
            query_shape, _shape("kv_cache", kv_cache),
            _shape("block_table", block_table), _shape("seq_lens", seq_lens),
        )  # fmt: skip
        cut, most = _results(device.index, *shapes, rank, query_start_loc is not None)
        if most:
            shape = most, ROWS * (_columns(rank) + 2)
            partial = streams.empty(framework, device, shape, FLOAT32, stream)
    objects = (
        query, kv_cache, block_table, seq_lens, query_start_loc, kv_array, partial, out, lse,
    )  # fmt: skip
    OP(objects, options, stream, (cut, number, kv_number))
    return out


def _place(query, like):
    """(Framework, device, shape) of the query; ``like`` is its view, if there is one."""
    if like is None:
        if arrays.is_torch(query) and query.device.type in ("cpu", "cuda"):  # what an engine gives
            return "torch", Device(query.device.type, query.device.index or 0), query.shape
        like = arrays.view(query, f"{NAME}: query")
    return like.framework, like.device, like.shape


def _shape(name, array):
    """The shape of an argument."""
    shape = getattr(array, "shape", None)
    return shape if isinstance(shape, tuple) else arrays.view(array, f"{NAME}: {name}").shape


def _new_out(query, rank, stream):
    """A new array for the result."""
    check = contract.Contract(NAME)
    check.shape("query", query, "_ num_heads entry_size")
    check.dtype("query", query, *formats.FLOATS)
    shape = *query.shape[:2], rank
    return streams.empty(query.framework, query.device, shape, query.dtype, stream)


def _plan(op, described, options):
    kv_cache_dtype, rank, causal = options
    named = {arg.name: array for arg, array in zip(op.args, described)}
    query, kv_cache, _, _, _, kv_scale, _, out, _ = described
    entries = kv_cache_dtype == FP8_DS_MLA
    fmt = formats.RAW_FORMAT
    if not entries:
        names = (*formats.CACHE_FORMATS, FP8_DS_MLA)
        fmt = formats.cache_format(op.name, kv_cache_dtype, names)
    check = contract.Contract(op.name)
    check.shape("query", query, "_ num_heads entry_size")
    check.shape("kv_cache", kv_cache, "num_blocks block_size _")
    steps.check_shapes(check, named, "_")
    size = check.sizes
    for name in ("num_heads", "entry_size", "block_size"):
        check.positive(name, size[name])
    _check_sizes(op.name, size["entry_size"], kv_cache, out, rank, entries)

    check.dtype("query", query, *formats.FLOATS[: 2 if entries else 3])
    stored = formats.BYTES if entries else fmt.storage or (query.dtype,)
    check.dtype("kv_cache", kv_cache, *stored)
    steps.check_arrays(check, named, ("kv_cache",))
    if kv_scale is not None:
        check.scale("kv_scale", kv_scale)

    if out.device.kind == "cpu":
        run = functools.partial(
            cpu.paged_attention_mla, dtype=query.dtype, latent=rank, causal=causal,
            stored=None if entries else fmt.stored or query.dtype, block_size=size["block_size"],
        )  # fmt: skip
        bits = {"query", "kv_cache", "out"}
        dtypes = [
            array and (array.dtype.bits if name in bits else array.dtype.numpy)
            for name, array in named.items()
        ]
        return plans.NumPyPlan(run, dtypes)

    return _gpu_plan(check, named, fmt.stored, rank, causal, entries)


def _check_sizes(op, entry_size, kv_cache, out, rank, entries):
    """Whether entries, queries and results are of sizes that belong together."""
    if entries and (entry_size, rank) != (DS_LATENT + DS_ROPE, DS_LATENT):
        raise ShapeError(
            f"{op}: Invalid shape of query: expected {DS_LATENT + DS_ROPE} elements, of them "
            f"kv_lora_rank = {DS_LATENT}, for {FP8_DS_MLA}, got {entry_size}, of them {rank}"
        )
    if rank > entry_size:
        raise ShapeError(
            f"{op}: Invalid shape of query: expected at least the kv_lora_rank = {rank} elements "
            f"of the latent part, got {entry_size}"
        )
    for name, array, expected in (
        ("kv_cache", kv_cache, DS_ENTRY_BYTES if entries else entry_size), ("out", out, rank),
    ):  # fmt: skip
        if array.shape[2] != expected:
            raise ShapeError(
                f"{op}: Invalid shape of {name}: expected {expected} elements in the last "
                f"dimension, got {list(array.shape)}"
            )


# --- the kernels: constants of paged_attention_mla.cu

ROWS = 16  # of a unit: query heads of neighbouring tokens of a sequence
THREADS = 128
JOINING_THREADS = 256
WARPS = THREADS // launch.WARP
LARGEST_RANK, LARGEST_ENTRY = 512, 640
LEAST_STAGES, MOST_STAGES = 3, 5
# Bytes of shared memory of a thread block, where a multiprocessor of sm_90 has two.
HALF_OF_SHARED = 112 << 10
GROUP = 1024  # tokens, of which one thread block takes care, unless there are few
MOST_GROUPS, MOST_PARTS = 32, 128  # of a sequence
SMALLEST_PART = 64  # tokens
# For each multiprocessor: units from which on none is cut; results that are kept at the same time;
# thread blocks that share the work, where it is cut; and those of a round of groups.
UNCUT, KEPT, BLOCKS, ROUND = 8, 16, 8, 1


def _units(tokens, sequences, heads, several):
    """At most so many units."""
    if several:
        return tokens * heads // ROWS + sequences
    return sequences * launch.ceil_div(heads, ROWS)


def _columns(rank):
    """Columns of a result: so many that each warp has whole tiles of them."""
    return launch.ceil_div(rank, 16 * WARPS) * 16 * WARPS


def _results(device, query, kv_cache, table, lens, rank, several):
    """(Whether sequences may be cut, the results that must be kept at the same time) for arguments
    of these shapes; none where they are wrong."""
    if (len(query), len(kv_cache), len(table), len(lens)) != (3, 3, 2, 1) or rank > LARGEST_RANK:
        return False, 0
    longest, processors = table[1] * kv_cache[1], launch.processors(device)
    units = _units(query[0], lens[0], query[1], several)
    # On the GPU that is not there all kernels are asked for.
    if longest > SMALLEST_PART and (units < UNCUT * processors or device == NOWHERE):
        groups = min(launch.ceil_div(longest, GROUP), MOST_GROUPS)
        parts = min(launch.ceil_div(longest, SMALLEST_PART), MOST_PARTS)
        most = min(units * parts, units * groups + 16 * processors, KEPT * processors)
        return most > 0, most
    return False, min(units, BLOCKS * processors) if longest > GROUP else 0


class _Plan(plans.KernelPlan):
    """One launch, or two where sequences may be cut."""

    __slots__ = ("_columns", "_device", "_heads", "_joining", "_several")

    def __init__(self, launcher, joining, device, heads, columns, several):
        super().__init__(launcher, None)
        self._joining, self._device = joining, device
        self._heads, self._columns, self._several = heads, columns, several

    def launch_for(self, rows):
        tokens, sequences, kept, cut = rows
        units = _units(tokens, sequences, self._heads, self._several)
        processors = launch.processors(self._device)
        blocks = min(kept, BLOCKS * processors) if kept else units
        if not cut:
            return self.launcher, (blocks, 1, 1), THREADS
        # Few units are joined by several threads each, of many each by one.
        lanes = 8 if units * self._columns // 8 <= 16 * processors else 1
        grid = units, self._columns * 4 * lanes // JOINING_THREADS, 1
        return _Two(self.launcher, self._joining, grid, JOINING_THREADS), (blocks, 1, 1), THREADS


class _Two:
    """A launch and one behind it, of the same parameters: a `launch.Launcher` of which the second's
    grid and threads are known."""

    __slots__ = ("_first", "_grid", "_second", "_threads")

    def __init__(self, first, second, grid, threads):
        self._first, self._second, self._grid, self._threads = first, second, grid, threads

    @property
    def loaded(self):
        """Whether both kernels are."""
        return self._first.loaded and self._second.loaded

    def has_work(self, grid, threads):
        """Whether there is anything to launch."""
        return self._first.has_work(grid, threads) and self._second.has_work(
            self._grid, self._threads
        )

    def enqueue(self, grid, threads, stream, *values):
        """Launch both."""
        try:
            self._first.enqueue(grid, threads, stream, *values)
        except launch.KernelNeeded as noted:
            raise launch.KernelNeeded(*noted.kernels, self._second.kernel) from None
        self._second.enqueue(self._grid, self._threads, stream, *values)

    def prepare(self, grid, threads):
        """As of a `launch.Launcher`."""
        first, failed = self._first.prepare(grid, threads)
        second, _ = self._second.prepare(self._grid, self._threads)

        def enqueue(stream, address, zero):
            first(stream, address, zero)
            second(stream, address, zero)

        return enqueue, failed

    def launch(self, grid, threads, stream, record):
        """Launch both with a record that is filled."""
        self._first.launch(grid, threads, stream, record)
        self._second.launch(self._grid, self._threads, stream, record)


def _gpu_plan(check, named, stored, rank, causal, entries):
    size, query, out, cache = check.sizes, named["query"], named["out"], named["kv_cache"]
    check.dtype(
        "query", query, *formats.FLOATS[:2],
        way_out="for float32 on a GPU use gather_cache and the framework's attention",
    )  # fmt: skip
    for name, extent, most in (
        ("kv_lora_rank", rank, LARGEST_RANK), ("entry_size", size["entry_size"], LARGEST_ENTRY),
    ):  # fmt: skip
        if extent > most:
            raise ShapeError(
                f"{check.op}: Invalid shape of query: expected {name} of at most {most} on a GPU, "
                f"got {extent}"
            )
    stored = formats.DTYPES["float8_e4m3fn"] if entries else stored or query.dtype
    device = out.device.index
    stages, shared = _stages(check.op, device, size["entry_size"], rank, stored.bytes, entries)
    vector = contract.vector_bytes(
        cache.ptr, *cache.strides[:2], cache.shape[2] * cache.dtype.bytes
    )
    indices = (named[name] for name in ("block_table", "seq_lens", "query_start_loc"))
    index = [(array and spelling.INDEX_NAMES[array.dtype.name]) or "void" for array in indices]
    elements = [spelling.ELEMENT_NAMES[dtype.name] for dtype in (query.dtype, stored)]
    arguments = (
        *elements, rank, size["entry_size"] - rank, spelling.boolean(entries), vector, stages,
        shared, *index,
    )  # fmt: skip
    kernel = modules.Kernel(
        check.op, NAME, f"{NAME}<{', '.join(map(str, arguments))}>", PARAMS,
        guarded=("block_table", "seq_lens"), shared_bytes=shared,
    )  # fmt: skip
    lse = named["lse"]
    constants = (
        cache.shape[0], *query.strides[:2], *out.strides[:2],
        *((0, 0) if lse is None else lse.strides), *cache.strides[:2], size["block_size"],
        size["num_heads"], ROUND * launch.processors(device), causal,
        contract.vector_bytes(query.ptr, *query.strides[:2]) == 16,
        contract.vector_bytes(out.ptr, *out.strides[:2]) >= 4,
    )  # fmt: skip
    scaled = stored.bytes == 1 and not entries
    joining = joining_kernel(query.dtype, stored, scaled, rank, index[1:])
    return _Plan(
        launch.Launcher(kernel, device, constants), launch.Launcher(joining, device, constants),
        device, size["num_heads"], _columns(rank), named["query_start_loc"] is not None,
    )  # fmt: skip


def joining_kernel(dtype, stored, scaled, rank, index):
    """The kernel of the second launch. ``scaled``: elements have the scale ``kv_scale``. ``index``
    are the C++ names of the types of ``seq_lens`` and ``query_start_loc``."""
    flags = map(spelling.boolean, (stored.bytes == 1, scaled))
    arguments = spelling.ELEMENT_NAMES[dtype.name], rank, *flags, *index
    return modules.Kernel(NAME, NAME, f"join_parts<{', '.join(map(str, arguments))}>", PARAMS)


def _stages(op, device, entry_size, rank, element_bytes, entries):
    """(How many tiles are in shared memory, its bytes)."""
    columns = _columns(rank)
    keys = 16 if element_bytes == 2 else 32  # of a tile
    if entries:
        chunks = launch.ceil_div(DS_ENTRY_BYTES, 16)
    else:
        steps = launch.ceil_div(entry_size, 16 * WARPS) * WARPS
        chunks = max(steps, columns // 16) * element_bytes
    tile = keys * (chunks | 1) * 16 + 4  # and which of its tokens are missing
    # Scores of each warp for two tiles, and two totals of each thread.
    rest = 2 * WARPS * ROWS * keys * 4 + 2 * THREADS * 16
    shared = launch.shared_memory(device)
    room = HALF_OF_SHARED if shared >= 2 * HALF_OF_SHARED else shared
    stages = min(MOST_STAGES, (room - rest) // tile)
    if stages < LEAST_STAGES:
        raise ShapeError(
            f"{op}: Invalid shape of query: expected entries of which {LEAST_STAGES} tiles fit "
            f"into the {shared} bytes of shared memory that this GPU has, got entries of "
            f"{entry_size} elements, {rank} of them latent"
        )
    return stages, stages * tile + rest


def _count(extents, options, scalars):
    """(Tokens, sequences, places for results that are kept and whether sequences may be cut, or 0;
    the fields of `PARAMS` behind the pointers)."""
    del options
    tokens, ((table_rows, width), (step, _)), sequences, starts, kept, *written = extents
    cut, *numbers_of_call = scalars
    steps.check_counts(
        NAME, tokens, sequences, table_rows, starts, dict(zip(("out", "lse"), written))
    )  # fmt: skip
    work = (tokens, sequences, kept, cut) if tokens and sequences else 0
    return work, (tokens, sequences, width, step, kept if cut else 0, *numbers_of_call)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("query", varies=dispatch.ROWS),
        dispatch.Arg("kv_cache"),
        dispatch.Arg("block_table", varies=(0, 1), index=True),
        dispatch.Arg("seq_lens", varies=dispatch.ROWS, index=True),
        dispatch.Arg("query_start_loc", varies=dispatch.ROWS, optional=True, index=True),
        dispatch.Arg("kv_scale", optional=True),
        dispatch.Arg("partial", varies=dispatch.ROWS, optional=True),
        dispatch.Arg("out", varies=dispatch.ROWS, written=True),
        dispatch.Arg("lse", varies=dispatch.ROWS, optional=True, written=True),
    ),
    plan=_plan,
    destination=(7, 8),
    count=_count,
    options=("kv_cache_dtype",),
)
