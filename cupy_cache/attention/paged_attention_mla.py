# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention of queries over the pages of a cache."""

from __future__ import annotations

import functools
import struct
from typing import Any, NamedTuple

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
from ..runtime.devices import NOWHERE
from ..runtime.formats import DS_ENTRY_BYTES, DS_LATENT, DS_ROPE, FP8_DS_MLA
from ..types import ArrayLike, Scale, StreamLike
from .shared import steps

NAME, WARPGROUPS = "paged_attention_mla", "paged_attention_mla_warpgroups"  # stems of the kernels
PARAMS = params.Struct(
    per_call="query:ptr kv_cache:ptr block_table:ptr seq_lens:ptr query_start_loc:ptr "
    "kv_scale:ptr out:ptr lse:ptr tokens:i64 sequences:i64 table_width:i64 table_stride:i64 "
    "scale:f32 kv_scale_value:f32",
    constant="num_blocks:i64 query_stride:i64 query_head_stride:i64 out_stride:i64 "
    "out_head_stride:i64 lse_stride:i64 lse_head_stride:i64 block_stride:i64 slot_stride:i64 "
    "scratch_tag:u64 block_size:u32 heads:u32 causal:u32 aligned:u32 "
    "by_block_size:u32[2]",
    tail="scratch:ptr slots_at:u64 slots:u32 lanes:u32 blocks:u32 joins:u32",
)


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
        descending; contiguous. Rows of no sequence are left as they are in ``out`` and ``lse``. By
        default each sequence has one row, so ``num_seqs`` is ``num_tokens``.
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
    NaN included. A query of which a logit is NaN, or infinity, gets NaN in both. A value that is
    not finite may reach further queries of its sequence than those that see it.

    A length below 0 or above ``width * block_size`` counts as the nearer of the two, and tokens in
    blocks that the cache does not have count as not there. Both are recorded under the number of
    the sequence (see `raise_faults`), arguments ``seq_lens`` and ``block_table``. A start below an
    earlier one, below 0 or above ``num_tokens`` counts as the nearest number that is neither, and
    is recorded under its own number, argument ``query_start_loc``.

    A sequence's result has the same bits whatever else is in the batch. Logits, softmax and sums
    are float32; on a GPU the weights are rounded to the dtype of ``query`` before they multiply
    values, and to float16 where entries have 8 bits.

    On a GPU there are as many thread blocks as run at once. A sequence is cut into parts by its own
    length alone, and all blocks share all parts equally. What several have of a sequence is joined
    through scratch memory. That is some MiB of the allocator of the result's framework, at most
    about 120 for 512 values, or 240 of 32 heads and more. It is free again after the kernel, in the
    stream's order; during a capture it is the graph's. Where many share one, a second launch joins.
    Caches whose addresses and strides are multiples of 16 bytes are read fastest.
    """
    if stream is not None:
        stream = streams.pointer(NAME, stream)
    rank = contract.integer(NAME, "kv_lora_rank", kv_lora_rank, 1)
    options = kv_cache_dtype, rank, contract.flag(NAME, "causal", causal)
    kv_array, kv_number = None, 1.0
    if formats.is_scaled(kv_cache_dtype):
        kv_array, kv_number = contract.split_scale(NAME, "kv_scale", kv_scale)
    number = contract.number(NAME, "scale", scale, kind="")
    objects = query, kv_cache, block_table, seq_lens, query_start_loc, kv_array, out, lse
    made = OP(objects, options, stream, (number, kv_number))
    return out if made is None else made


def _new_out(op, objects, options, stream):
    """A new array for the result."""
    _, rank, _ = options
    like = arrays.view(objects[0], f"{op}: query")
    check = contract.Contract(op)
    check.shape("query", like, "_ num_heads entry_size")
    check.dtype("query", like, *formats.FLOATS)
    _check_rank(op, check.sizes["entry_size"], rank)  # memory for more may not even be there
    shape = *like.shape[:2], rank
    return making.empty(like.framework, like.device, shape, like.dtype, stream)


def _plan(op, described, options):
    kv_cache_dtype, rank, causal = options
    named = {arg.name: array for arg, array in zip(op.args, described)}
    query, kv_cache, _, _, _, kv_scale, out, _ = described
    entries = formats.text_of(kv_cache_dtype) == FP8_DS_MLA
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

    if entries:
        check.dtype("query", query, *formats.FLOATS[:2])
        check.dtype("kv_cache", kv_cache, *formats.BYTES)
    else:
        steps.check_query(check, query, fmt, "kv_cache", kv_cache)
        way_out = formats.way_to_convert(fmt, kv_cache.dtype, "query")
        check.dtype("kv_cache", kv_cache, *(fmt.storage or (query.dtype,)), way_out=way_out)
    steps.check_arrays(check, named, ("kv_cache",))
    if kv_scale is not None:
        check.scale("kv_scale", kv_scale)

    if out.device.kind == "cpu":
        run = functools.partial(
            cpu.paged_attention_mla, dtype=query.dtype, latent=rank, causal=causal,
            stored=None if entries else fmt.stored or query.dtype, block_size=size["block_size"],
        )  # fmt: skip
        return plans.NumPyPlan(run, op.args, described, ("query", "kv_cache", "out"))

    return _gpu_plan(check, named, fmt.stored, rank, causal, entries)


def _check_rank(op, entry_size, rank):
    if rank > entry_size:
        expected = f"at least kv_lora_rank = {rank}, the elements of the latent part"
        raise errors.wrong("shape", f"{op}: query", expected, entry_size)


def _check_sizes(op, entry_size, kv_cache, out, rank, entries):
    """Refuse sizes of entries, queries and results that do not fit each other."""
    if entries and (entry_size, rank) != (DS_LATENT + DS_ROPE, DS_LATENT):
        expected = (
            f"{DS_LATENT + DS_ROPE} elements, of them kv_lora_rank = {DS_LATENT}, for {FP8_DS_MLA}"
        )
        raise errors.wrong("shape", f"{op}: query", expected, f"{entry_size}, of them {rank}")
    _check_rank(op, entry_size, rank)
    for name, array, expected in (
        ("kv_cache", kv_cache, DS_ENTRY_BYTES if entries else entry_size), ("out", out, rank),
    ):  # fmt: skip
        if array.shape[2] != expected:
            expected = f"{errors.counted(expected, 'element')} in the last dimension"
            raise errors.wrong("shape", f"{op}: {name}", expected, list(array.shape))


# --- the kernels: constants of paged_attention_mla.cu

ROWS = 16  # of a unit: query heads of neighbouring tokens of a sequence
TEAM = 4  # warps
LARGEST_RANK, LARGEST_ENTRY = 512, 640
LEAST_STAGES, MOST_STAGES = 3, 5
# Bytes of shared memory of a thread block where a multiprocessor of sm_90 runs two, and the most
# that its arrays of fixed sizes take of them.
HALF_OF_SHARED, FIXED_SHARED = 112 << 10, 1 << 10
TURN = 64  # tokens: the unit of work
PANEL, SPAN = 64, 128  # contiguous elements of a row: of a factor, of a result
JOINING_THREADS = 256
MOST_JOINED = 16  # thread blocks whose results one of them joins; of more, a second launch does


class _Plan(plans.KernelPlan):
    """One launch: as many thread blocks as the GPU runs at once share all units equally.

    Parameters
    ----------
    launcher : launch.Launcher
    framework : str
        That of the results.
    heads, block_size : int
    several : bool
        Whether a sequence has several tokens.
    shape : _Shape
    instead : _Plan, optional
        For the GPU that does not exist: the plan for another compute capability.
    """

    __slots__ = (
        "_block_size", "_framework", "_heads", "_instead", "_joining", "_several", "_shape"
    )  # fmt: skip

    def __init__(
        self, launcher, joining, framework, heads, block_size, several, shape, instead=None
    ):
        super().__init__(launcher, None)
        self._joining, self._framework = joining, framework
        self._heads, self._block_size = heads, block_size
        self._several, self._shape, self._instead = several, shape, instead

    def launchers(self):
        also = () if self._instead is None else self._instead.launchers()
        return self.launcher, self._joining, *also

    def launch_for(self, rows):
        blocks, lanes, joins = self._blocks(rows)
        first = (blocks, 1, 1), self._shape.threads
        if joins:
            return self.launcher, *first
        tokens, sequences, _ = rows
        grid = lanes * self._of_lane(tokens, sequences, lanes), self._shape.of_lanes, 1
        return _Two(self.launcher, self._joining, grid, JOINING_THREADS), *first

    def scratch_for(self, rows):
        tokens, sequences, width = rows
        blocks, lanes, joins = self._blocks(rows)
        # A word for each unit. Then slots for each thread block: two, and as many as it may have
        # results of a unit that another one begins.
        units = self._units(tokens, sequences)
        words = launch.ceil_div(8 * units, 16) * 16
        longest = max(launch.ceil_div(width * self._block_size, TURN), 1)  # turns
        of_lane = self._of_lane(tokens, sequences, lanes)
        each = launch.ceil_div(of_lane * longest, blocks // lanes)
        slots = min(_most_results(longest), each) + 2
        size = words + blocks * slots * self._shape.slot_bytes
        return plans.Scratch(
            self._framework,
            size,
            struct.pack("<QIIII", words, slots, lanes, blocks // lanes, joins),
        )

    def _blocks(self, rows):
        """(Thread blocks, lanes of them to which a sequence's units are dealt, whether they join
        the parts of a unit themselves)."""
        tokens, sequences, width = rows
        most = self._shape.resident * launch.processors(self.launcher.device)
        rows = self._shape.rows
        units = launch.ceil_div(tokens * self._heads, rows * sequences)  # of a sequence, about
        if not self._several:
            units = launch.ceil_div(self._heads, rows)
        lanes = min(max(units, 1), most)
        blocks = most // lanes * lanes
        # About the most thread blocks that share a unit.
        parts = launch.ceil_div(width * self._block_size, TURN)
        shared_by = min(parts, launch.ceil_div(blocks, self._units(tokens, sequences)))
        return blocks, lanes, shared_by <= MOST_JOINED

    def _units(self, tokens, sequences):
        """The most units."""
        if self._several:
            return tokens * self._heads // self._shape.rows + sequences
        return sequences * launch.ceil_div(self._heads, self._shape.rows)

    def _of_lane(self, tokens, sequences, lanes):
        """The most units of a lane."""
        if self._several:
            return tokens * self._heads // (self._shape.rows * lanes) + sequences
        units = launch.ceil_div(self._heads, self._shape.rows)
        return sequences * launch.ceil_div(units, lanes)


def _most_results(turns):
    """The most results that a thread block may have of a sequence of up to ``turns`` turns: single
    parts of one group, and groups. `Cut` of paged_attention_mla.cu."""
    parts = min(launch.ceil_div(turns, 4), 128)
    return max(16, launch.ceil_div(parts, 8) + 8)


class _Two:
    """Two launches with the same parameters, one behind the other, with the interface of a
    `launch.Launcher`. ``grid`` and ``threads`` are the second one's."""

    __slots__ = ("_first", "_grid", "_second", "_threads")

    def __init__(self, first, second, grid, threads):
        self._first, self._second, self._grid, self._threads = first, second, grid, threads

    @property
    def device(self):
        """The GPU's number."""
        return self._first.device

    @property
    def loaded(self):
        """Whether both kernels are loaded."""
        return self._first.loaded and self._second.loaded

    def load(self, stream):
        """Load both kernels."""
        launch.load_together((self._first, self._second), stream)

    def has_work(self, grid, threads):
        """Whether the first grid has blocks."""
        return self._first.has_work(grid, threads) and self._second.has_work(
            self._grid, self._threads
        )

    def enqueue(self, grid, threads, stream, *values, tail):
        """Launch both."""
        self._first.enqueue(grid, threads, stream, *values, tail=tail)
        self._second.enqueue(self._grid, self._threads, stream, *values, tail=tail)

    def prepare(self, grid, threads):
        """As of a `launch.Launcher`."""
        first, failed = self._first.prepare(grid, threads)
        second, _ = self._second.prepare(self._grid, self._threads)

        def enqueue(stream, address, zero):
            first(stream, address, zero)
            second(stream, address, zero)

        return enqueue, failed

    def launch(self, grid, threads, stream, record):
        """Launch both with a filled record."""
        self._first.launch(grid, threads, stream, record)
        self._second.launch(self._grid, self._threads, stream, record)


class _Shape(NamedTuple):
    """Thread blocks: each has ``teams`` of `TEAM` warps, and ``stages`` tiles in ``shared`` bytes
    of shared memory; a multiprocessor runs ``resident`` of them; a unit has ``rows`` rows, and its
    results take ``slot_bytes``."""

    teams: int
    stages: int
    shared: int
    resident: int
    rows: int
    slot_bytes: int

    @property
    def threads(self):
        return self.teams * TEAM * launch.WARP

    @property
    def of_lanes(self):
        """How many times four numbers each of a warp's lanes holds of a result, which has two
        further numbers for each row."""
        return (self.slot_bytes - self.rows * 8) // (launch.WARP * 16)


def _check_on_gpu(check, query, rank):
    """Refuse what the kernels cannot do."""
    with errors.on_gpus_alone():
        steps.check_query_on_gpu(check, query)
        for name, extent, most in (
            ("kv_lora_rank", rank, LARGEST_RANK),
            ("entry_size", check.sizes["entry_size"], LARGEST_ENTRY),
        ):
            if extent > most:
                expected = f"{name} of at most {most} on a GPU"
                raise errors.wrong("shape", f"{check.op}: query", expected, extent)


def _constants(size, named, causal):
    """The values of the constant fields of `PARAMS`."""
    query, out, cache, lse = (named[name] for name in ("query", "out", "kv_cache", "lse"))
    reads_vectors = contract.vector_bytes(query.ptr, *query.strides[:2]) == 16
    writes_pairs = contract.vector_bytes(out.ptr, *out.strides[:2]) >= 4
    return PARAMS.constants(
        {
            "num_blocks": cache.shape[0],
            "query_stride": query.strides[0],
            "query_head_stride": query.strides[1],
            "out_stride": out.strides[0],
            "out_head_stride": out.strides[1],
            "lse_stride": 0 if lse is None else lse.strides[0],
            "lse_head_stride": 0 if lse is None else lse.strides[1],
            "block_stride": cache.strides[0],
            "slot_stride": cache.strides[1],
            "scratch_tag": plans.SCRATCH_TAG,
            "block_size": size["block_size"],
            "heads": size["num_heads"],
            "causal": causal,
            "aligned": reads_vectors + 2 * writes_pairs,
            "by_block_size": launch.divisor(size["block_size"]),
        }
    )


def _gpu_plan(check, named, stored, rank, causal, entries):
    size, query, out, cache = check.sizes, named["query"], named["out"], named["kv_cache"]
    _check_on_gpu(check, query, rank)
    stored = formats.E4M3 if entries else stored or query.dtype
    device = out.device.index
    vector = contract.vector_bytes(
        cache.ptr, *cache.strides[:2], cache.shape[2] * cache.dtype.bytes
    )
    indices = [named[name] for name in ("block_table", "seq_lens", "query_start_loc")]
    index, of_lengths = spelling.indices(*indices), spelling.indices(*indices[1:])
    elements = [spelling.element(dtype) for dtype in (query.dtype, stored)]
    constants, rope = _constants(size, named, causal), size["entry_size"] - rank

    def made(stem, shape, arguments, join, join_arguments, only=None, **also):
        """A `_Plan` of the kernel ``stem``, and of the kernel ``join``, which joins its results."""
        launchers = [
            launch.Launcher(
                modules.Kernel(
                    check.op, stem, spelling.instance(name, *its), PARAMS,
                    guarded=("block_table", "seq_lens", "query_start_loc"), shared_bytes=shared,
                    only=only,
                ),
                device, constants,
            )
            for name, its, shared in ((stem, arguments, shape.shared), (join, join_arguments, 0))
        ]  # fmt: skip
        return _Plan(
            *launchers, out.framework, size["num_heads"], size["block_size"],
            named["query_start_loc"] is not None, shape, **also,
        )  # fmt: skip

    instead = None
    if stored.bytes == 2 and vector == 16 and launch.has_warpgroups(device):
        shape = _warpgroups_shape(size["num_heads"], size["entry_size"], rank)
        instead = made(
            WARPGROUPS, shape,
            (elements[0], rank, rope, shape.rows, shape.teams, shape.shared, index),
            "join_rows", (elements[0], rank, shape.rows, of_lengths), only=90,
        )  # fmt: skip
        if device != NOWHERE:
            return instead
    shape = _shape(check.op, device, size["entry_size"], rank, stored.bytes, entries)
    flags = stored.bytes == 1, stored.bytes == 1 and not entries
    return made(
        NAME, shape,
        (*elements, rank, rope, entries, vector, shape.teams, shape.stages, shape.shared, index),
        "join_parts", (elements[0], rank, *flags, shape.teams, of_lengths),
        instead=instead,
    )  # fmt: skip


def _shape(op, device, entry_size, rank, element_bytes, entries):
    """The `_Shape` of thread blocks for entries of this size."""
    shared = launch.shared_memory(device)
    # A thread block of two teams has a multiprocessor to itself.
    teams = 2 if shared >= 2 * HALF_OF_SHARED and element_bytes == 2 and rank > 256 else 1
    warps = teams * TEAM
    columns = launch.ceil_div(rank, 16 * warps) * 16 * warps
    keys = teams * (16 if element_bytes == 2 else 32)  # of a tile
    if entries:
        chunks = launch.ceil_div(DS_ENTRY_BYTES, 16)
    else:
        steps = launch.ceil_div(entry_size, 16 * TEAM) * TEAM
        chunks = max(steps, columns // 16) * element_bytes
    # And flags of the tile's missing tokens, and the barrier of its copies.
    tile = keys * (chunks | 1) * 16 + 16
    # For each of a team's warps the scores of two tiles, and for each thread two totals.
    rest = 2 * TEAM * ROWS * keys * 4 + 2 * warps * launch.WARP * 16
    halves = shared >= 2 * HALF_OF_SHARED and teams == 1
    room = HALF_OF_SHARED if halves else shared - FIXED_SHARED
    stages = min(MOST_STAGES, (room - rest) // tile)
    if stages < LEAST_STAGES:
        expected = (
            f"entries of which {LEAST_STAGES} tiles fit into the {shared} bytes of shared memory "
            "that this GPU has"
        )
        got = f"entries of {entry_size} elements, {rank} of them latent"
        raise errors.wrong("shape", f"{op}: query", expected, got)
    resident = 2 if halves else 1
    slot_bytes = ROWS * (columns + 2) * 4
    return _Shape(teams, stages, stages * tile + rest, resident, ROWS, slot_bytes)


def _warpgroups_shape(heads, entry_size, rank):
    """The `_Shape` of thread blocks that multiply by warpgroups. With many heads, units have twice
    as many rows, so that tokens are read half as often."""
    groups = 2 if rank > 256 else 1
    rows, stages = ROWS * (2 if groups == 2 and heads >= 2 * ROWS else 1), 2
    panels = launch.ceil_div(launch.ceil_div(entry_size, 16) * 16, PANEL)
    # Tiles, the queries, and a tile's weights.
    shared = PANEL * 2 * (panels * (stages * TURN + rows) + rows)
    if groups == 2:  # and the scores that the groups exchange
        shared += TEAM * launch.WARP * rows * 2
    slot_bytes = rows * (launch.ceil_div(rank, SPAN) * SPAN + 2) * 4
    return _Shape(groups, stages, shared, 1, rows, slot_bytes)


def _count(extents, options, scalars):
    """(Tokens, sequences and a table's width, or 0; the fields of `PARAMS` behind the pointers)."""
    del options
    tokens, ((table_rows, width), (step, _)), sequences, starts, *written = extents
    steps.check_counts(
        NAME, tokens, sequences, table_rows, starts, dict(zip(("out", "lse"), written))
    )  # fmt: skip
    work = (tokens, sequences, width) if tokens and sequences else 0
    return work, (tokens, sequences, width, step, *scalars)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("query", varies=dispatch.ROWS),
        dispatch.Arg("kv_cache"),
        dispatch.Arg("block_table", varies=(0, 1), index=True),
        dispatch.Arg("seq_lens", varies=dispatch.ROWS, index=True),
        dispatch.Arg("query_start_loc", varies=dispatch.ROWS, optional=True, index=True),
        dispatch.Arg("kv_scale", optional=True),
        dispatch.Arg("out", varies=dispatch.ROWS, written=True),
        dispatch.Arg("lse", varies=dispatch.ROWS, optional=True, written=True),
    ),
    plan=_plan,
    destination=(6, 7),
    count=_count,
    options=("kv_cache_dtype",),
    result=dispatch.Result(6, (0,), _new_out),
)
