# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of queries over the pages of a cache."""

from __future__ import annotations

import functools
import math
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
from ..types import ArrayLike, Scale, StreamLike
from .shared import steps

NAME = "paged_attention"
PARAMS = params.Struct(
    per_call="query:ptr key_cache:ptr value_cache:ptr block_table:ptr seq_lens:ptr "
    "query_start_loc:ptr alibi_slopes:ptr sinks:ptr k_scale:ptr v_scale:ptr out:ptr lse:ptr "
    "k_scale_cache:ptr v_scale_cache:ptr sequence_slopes:ptr "
    "tokens:i64 sequences:i64 table_width:i64 table_stride:i64 window:i64 "
    "scale:f32 soft_cap:f32 k_scale_value:f32 v_scale_value:f32",
    constant="num_blocks:i64 query_stride:i64 query_head_stride:i64 out_stride:i64 "
    "out_head_stride:i64 lse_stride:i64 lse_head_stride:i64 key_block_stride:i64 "
    "key_head_stride:i64 key_slot_stride:i64 key_pack_stride:i64 value_block_stride:i64 "
    "value_head_stride:i64 value_slot_stride:i64 value_pack_stride:i64 slope_stride:i64 "
    "slope_sequence_stride:i64 sink_stride:i64 k_scale_stride:i64 v_scale_stride:i64 "
    "k_scale_block_stride:i64 k_scale_slot_stride:i64 k_scale_head_stride:i64 "
    "v_scale_block_stride:i64 v_scale_slot_stride:i64 v_scale_head_stride:i64 scratch_tag:u64 "
    "tall_tokens:i64 "
    "base_scale:f32 block_size:u32 kv_heads:u32 group:u32 row_tokens:u32 head_parts:u32 "
    "part_rows:u32 causal:u32 float_sinks:u32 key_pack:u32 slot_bytes:u32 value_pack:u32 "
    "pairs_in:u32 pairs_out:u32 by_block_size:u32[2] by_heads:u32[2]",
    tail="scratch:ptr slots_at:u64 slots:u32",
)
NO_WINDOW = 1 << 62  # more tokens than there are
# The arguments that belong to a layer. Slopes are one of two: for all sequences, or for each.
LAYERS = (
    "key_cache", "value_cache", "alibi_slopes", "sinks", "k_scale", "v_scale", "k_scale_cache",
    "v_scale_cache", "sequence_slopes",
)  # fmt: skip


def paged_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike,
    block_table: ArrayLike,
    seq_lens: ArrayLike,
    *,
    query_start_loc: ArrayLike | None = None,
    scale: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    causal: bool = True,
    kv_cache_dtype: str = "auto",
    k_scale: Scale = None,
    v_scale: Scale = None,
    k_scale_cache: ArrayLike | None = None,
    v_scale_cache: ArrayLike | None = None,
    out: ArrayLike | None = None,
    lse: ArrayLike | None = None,
    stream: StreamLike | None = None,
) -> Any:
    """Attend from a step's queries to the keys and values of their sequences, in their pages.

    Sequence ``b`` has ``L = seq_lens[b]`` tokens in the cache, those of this step included; token
    ``p`` is in block ``block_table[b, p // block_size]`` at offset ``p % block_size``. It owns the
    rows ``query_start_loc[b] <= t < query_start_loc[b + 1]`` of ``query``, or row ``b`` alone where
    there is no ``query_start_loc``. Of ``n`` rows, row ``i`` stands at position ``p = L - n + i``
    and sees the tokens 0 to ``p``. Query head ``h`` reads the key and value head ``h // (num_heads
    / num_kv_heads)``.

    The logit of token ``k`` is, in this order: ``s = scale * query . key``; ``s = soft_cap * tanh(s
    / soft_cap)``; ``s + alibi_slopes[h] * (k - p)``; -infinity where the query does not see the
    token. ``out`` is the softmax of the logits, times the values.

    Parameters
    ----------
    query : array [num_tokens, num_heads, head_size]
        float16, bfloat16 or, on the CPU alone, float32; the last dimension contiguous. For float32
        on a GPU, whose products take 16 bits, use `gather_cache` and the framework's attention. On
        a GPU heads, and those of values, have at most 512 elements.
    key_cache, value_cache : array [num_blocks, block_size, num_kv_heads, head_size or head_size_v]
        As `reshape_and_cache_flash` writes them; or, of five dimensions, the key cache [num_blocks,
        num_kv_heads, head_size / x, block_size, x] with the value cache [num_blocks, num_kv_heads,
        head_size_v, block_size] or [num_blocks, num_kv_heads, block_size / x, head_size_v, x], as
        `reshape_and_cache` does. Of the dtype of ``query`` where they are raw; otherwise of the
        8-bit dtype stored, or uint8. Last dimension contiguous, other strides free, so that views
        of pages in which heads come first, or which hold K|V, work. ``num_heads`` is any multiple
        of ``num_kv_heads``, and the head sizes of keys and values may differ.
    block_table : int32 or int64 array [at least num_seqs, width]
        Block numbers of each sequence; the last dimension contiguous. What is after a sequence's
        last page, or before all that its window reaches, has no effect.
    seq_lens : int32 or int64 array [num_seqs]
        Tokens of each sequence in the cache. Contiguous.
    query_start_loc : int32 or int64 array [num_seqs + 1], optional
        Where each sequence's rows of ``query`` start, and where the last one's end; never
        descending, and inside ``query``; contiguous. Rows of no sequence are left as they are in
        ``out`` and ``lse``. By default each sequence has one row, so ``num_seqs`` is
        ``num_tokens``.
    scale : float, optional
        By default ``1 / sqrt(head_size)``.
    alibi_slopes : float32 array [num_heads] or [at least num_seqs, num_heads], optional
        Such as `alibi_slopes` returns, of all sequences or of each; any strides.
    sliding_window : int, optional
        How many tokens a query sees at most, itself included: the ``sliding_window - 1`` before it
        and its own. With ``causal=False`` also all that follow.
    soft_cap : float, optional
        Above 0.
    sinks : array [num_heads], optional
        A further logit of each head, whose value is 0. float32 or of the dtype of ``query``; any
        stride.
    causal : bool
        False: every query of a sequence sees all its tokens, except what ``sliding_window`` hides.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": raw caches. "fp8" or "fp8_e4m3", "fp8_e5m2",
        "int8": a key or value is what is stored, times its scale. With ``k_scale_cache`` and
        ``v_scale_cache`` what `reshape_and_cache_flash_per_token_head` takes: "int8", "fp8" or
        "fp8_e4m3", or "int8_per_token_head" or "fp8_per_token_head".
    k_scale, v_scale : float, or float32 array [1], [num_kv_heads] or of no dimensions, optional
        One number, or one for each head. An array is read on its device. None is 1.0. Raw caches
        ignore them.
    k_scale_cache, v_scale_cache : float32 array [num_blocks, block_size, num_kv_heads], optional
        Both or neither, and then no ``k_scale`` and ``v_scale``: a scale for each token and head,
        as `reshape_and_cache_flash_per_token_head` writes them; any strides. Caches have four
        dimensions then.
    out : array [at least num_tokens, num_heads, head_size_v], optional
        Written in place; of the dtype of ``query``; the last dimension contiguous.
    lse : float32 array [at least num_tokens, num_heads], optional
        Written in place: the natural logarithm of the sum of the exponentials of a query's logits,
        a sink included. Any strides, so that it may be the transpose of what `merge_attn_states`
        takes.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``out``, or else
        ``query``.

    Returns
    -------
    array [num_tokens, num_heads, head_size_v]
        ``out`` where it was given; otherwise a new array of the framework of ``query``, on its
        device (of CuPy or NumPy where that framework's arrays cannot be written).

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Nothing synchronises: tables and lengths are read on the device. There is no plan on the host
    and no workspace to give.

    A query that sees no token, as in an empty sequence or before the first token of one, gets zeros
    in ``out`` and -infinity in ``lse``, with sinks too. What a cache holds where no query of a
    sequence looks, as in the unwritten rows of its last block, has no effect, NaN included. A query
    of which a logit is NaN, or infinity, gets NaN in both. A value that is not finite may reach
    further queries of its sequence than those that see it.

    A length below 0 or above ``width * block_size`` counts as the nearer of the two, and tokens in
    blocks that the cache does not have count as not there. Both are recorded under the number of
    the sequence (see `raise_faults`), arguments ``seq_lens`` and ``block_table``. A start below an
    earlier one, below 0 or above ``num_tokens`` counts as the nearest number that is neither, and
    is recorded under its own number, argument ``query_start_loc``.

    A sequence's result has the same bits whatever else is in the batch. Logits, softmax and sums
    are float32; on a GPU the weights are rounded to the dtype of ``query`` before they multiply
    values, and to float16 where caches have 8 bits.

    On a GPU there is one launch. A thread block takes 16 query heads of a KV head of a sequence.
    With ``query_start_loc`` it takes 64 rows of these, and of heads of more than 256 elements
    always 8. It takes two KV heads where their rows follow one another, are longer than 128 bytes,
    and are no multiples of 256. Where these are too few thread blocks for the GPU, a cluster of
    eight shares the work of one, on sm_90 and newer. Without ``query_start_loc``, where tables are
    wide or there are no clusters, all thread blocks share all of the work through scratch memory.
    That is some MiB of the allocator of the result's framework, free again after the kernel, in the
    stream's order; during a capture it is the graph's. Caches whose addresses and strides are
    multiples of 16 bytes are read fastest.
    """
    if stream is not None:
        stream = streams.pointer(NAME, stream)
    heads, others, options, scalars = arguments(
        NAME, scale, alibi_slopes, sliding_window, soft_cap, sinks, causal, kv_cache_dtype, k_scale,
        v_scale, k_scale_cache, v_scale_cache,
    )  # fmt: skip
    # Arguments that are rarely given come last, where they cost other calls nothing.
    objects = (
        query, key_cache, value_cache, block_table, seq_lens, query_start_loc, *heads, out, lse,
        *others,
    )  # fmt: skip
    made = OP(objects, options, stream, scalars)
    return out if made is None else made


def arguments(
    op, scale, alibi_slopes, sliding_window, soft_cap, sinks, causal, kv_cache_dtype, k_scale,
    v_scale, k_scale_cache=None, v_scale_cache=None,
):  # fmt: skip
    """A layer's arguments beside its caches, checked: (arrays, in the order of `LAYERS`; the rest
    of these, if any is given; options; scalars). ``op``: the caller, for errors."""
    window, scaled_by, cap = NO_WINDOW, 1.0, 0.0
    if sliding_window is not None:
        no_window = "None is no window"  # elsewhere 0 and -1 are
        window = contract.integer(op, "sliding_window", sliding_window, 1, no_window)
        window = min(window, NO_WINDOW)
    if scale is not None:
        scaled_by = contract.number(op, "scale", scale)
    if soft_cap is not None:
        cap = contract.number(op, "soft_cap", soft_cap, positive=True, way_out="None is no cap")
    options = (
        kv_cache_dtype,
        contract.flag(op, "causal", causal),
        scale is None,
        sliding_window is not None,
        soft_cap is not None,
    )
    scales, scalars = contract.split_scales(op, kv_cache_dtype, k_scale, v_scale)
    others = ()
    if k_scale_cache is not None or v_scale_cache is not None:
        _check_scales(op, k_scale, v_scale, k_scale_cache, v_scale_cache)
        scales = scalars = ()
        others = k_scale_cache, v_scale_cache
    if alibi_slopes is not None and _is_of_sequences(op, alibi_slopes):
        others = k_scale_cache, v_scale_cache, alibi_slopes
        alibi_slopes = None
    heads = alibi_slopes, sinks, *(scales or (None, None))
    return heads, others, options, (window, scaled_by, cap, *(scalars or (1.0, 1.0)))


def _is_of_sequences(op, slopes):
    """Whether each sequence has slopes of its own."""
    try:
        return len(slopes.shape) == 2
    except Exception:  # no array, or one without a shape: `arrays.view` refuses it
        return len(arrays.view(slopes, f"{op}: alibi_slopes").shape) == 2


def _check_scales(op, k_scale, v_scale, k_scale_cache, v_scale_cache):
    """Refuse one cache of scales without the other, or beside ``k_scale`` or ``v_scale``."""
    for name, cache in (("k_scale_cache", k_scale_cache), ("v_scale_cache", v_scale_cache)):
        if cache is None:
            other = "both k_scale_cache and v_scale_cache, or neither"
            raise errors.wrong("value", f"{op}: {name}", other, "None")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            expected, got = f"None beside {name}_cache", errors.shown(scale)
            raise errors.wrong("value", f"{op}: {name}", expected, got)


def _new_out(op, objects, options, stream):
    """A new array for the result."""
    del options
    query, *caches = objects[:3]
    like = arrays.view(query, f"{op}: query")
    keys, values = (
        cache if type(cache) is arrays.Array else arrays.view(cache, f"{op}: {name}")
        for name, cache in zip(("key_cache", "value_cache"), caches)
    )
    check = contract.Contract(op)
    check.shape("query", like, "_ num_heads head_size")
    check.dtype("query", like, *formats.FLOATS)
    _check_caches(check, keys, values)
    shape = *like.shape[:2], check.sizes["head_size_v"]
    return making.empty(like.framework, like.device, shape, like.dtype, stream)


def _check_caches(check, key_cache, value_cache):
    """Check the shapes of both caches. An x-packed key cache has five dimensions."""
    if len(key_cache.shape) != 5:
        check.shape("key_cache", key_cache, "num_blocks block_size num_kv_heads head_size")
        check.shape("value_cache", value_cache, "num_blocks block_size num_kv_heads head_size_v")
        return
    check.x_packed_caches(key_cache, value_cache, interleaved=len(value_cache.shape) == 5)


def _plan(op, described, options):
    kv_cache_dtype, causal, default_scale, *_ = options
    named = {arg.name: array for arg, array in zip(op.args, described)}
    of_sequences = named.pop("sequence_slopes")
    if of_sequences is not None:
        named["alibi_slopes"] = of_sequences
    query, key_cache, value_cache, _, _, _, _, sinks, *scales, out, _ = described[:12]
    scale_caches = {name: named[name] for name in ("k_scale_cache", "v_scale_cache")}
    by_token = scale_caches["k_scale_cache"] is not None
    fmt = _format(op.name, kv_cache_dtype, by_token)
    check = contract.Contract(op.name)
    check.shape("query", query, "_ num_heads head_size")
    if by_token:
        check.shape("key_cache", key_cache, "num_blocks block_size num_kv_heads head_size")
    _check_caches(check, key_cache, value_cache)
    for name, array in scale_caches.items():
        if array is not None:
            check.shape(name, array, "num_blocks block_size num_kv_heads")
            check.dtype(name, array, formats.FLOAT32)
    steps.check_shapes(check, named, "head_size_v")
    slopes = "num_heads" if of_sequences is None else "_ num_heads"
    for name, pattern in (("sinks", "num_heads"), ("alibi_slopes", slopes)):
        if named[name] is not None:
            check.shape(name, named[name], pattern)
    size = check.sizes
    for name in ("num_heads", "num_kv_heads", "head_size", "head_size_v", "block_size"):
        check.positive(name, size[name])
    if size["num_heads"] % size["num_kv_heads"]:
        expected = f"a multiple of the {errors.counted(size['num_kv_heads'], 'head')} of key_cache"
        got = errors.counted(size["num_heads"], "head")
        raise errors.wrong("shape", f"{op.name}: query", expected, got)

    steps.check_query(check, query, fmt, "key_cache", key_cache)
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        way_out = formats.way_to_convert(fmt, cache.dtype, "query")
        check.dtype(name, cache, *(fmt.storage or (query.dtype,)), way_out=way_out)
    float32 = formats.FLOAT32
    for name, allowed in (("alibi_slopes", {float32}), ("sinks", {float32, query.dtype})):
        if named[name] is not None:
            check.dtype(name, named[name], *allowed)
    steps.check_arrays(check, named, ("key_cache", "value_cache"))
    scale_strides = [
        check.head_scale(name, scale, size["num_kv_heads"])
        for name, scale in zip(("k_scale", "v_scale"), scales)
    ]
    # A factor of `scale`: the default, which needs the head size, is decided here.
    base_scale = 1 / math.sqrt(size["head_size"]) if default_scale else 1.0

    if out.device.kind == "cpu":
        run = functools.partial(
            _on_numpy, base_scale=base_scale, dtype=query.dtype, stored=fmt.stored or query.dtype,
            sink_type=sinks and sinks.dtype, block_size=size["block_size"], causal=causal,
        )  # fmt: skip
        bits = "query", "key_cache", "value_cache", "sinks", "out"
        return plans.NumPyPlan(run, op.args, described, bits)

    return _gpu_plan(check, named, fmt.stored or query.dtype, options, scale_strides, base_scale)


def _format(op, kv_cache_dtype, by_token):
    """The `formats.CacheFormat` of caches, with a scale for each token and head or without."""
    if by_token:
        return formats.cache_format(op, kv_cache_dtype, table=formats.PER_TOKEN_HEAD_FORMATS)
    if kv_cache_dtype in {*formats.PER_TOKEN_HEAD_FORMATS} - {*formats.CACHE_FORMATS}:
        expected = f"float32 scales, with kv_cache_dtype={kv_cache_dtype!r}"
        raise errors.wrong("value", f"{op}: k_scale_cache", expected, "None")
    return formats.cache_format(op, kv_cache_dtype)


# --- the kernel: constants of paged_attention.cu

KEYS = 16  # of a tile
WARPS = 4
TILE_ROWS = 16  # rows of a unit: query heads of a token that share a KV head
MOST_ROWS = 64  # where a sequence has several tokens: also those of neighbouring tokens
FEW_ROWS = 8  # where heads are large: registers then hold more elements of each
CLUSTER = 8  # thread blocks that share a unit, where there are few units
MANY_UNITS = 640  # of a sequence: more than run at once, and enough even if taken in pairs
COST_OF_SHARING = 1300  # see `_Plan._sharing_pays`; measured on an H100
MOST_SHARED = 1024  # the most sequences for equal shares: each thread block reads all lengths
# Bytes of a multiprocessor of sm_90, for one thread block or for two.
ALL_OF_SHARED, HALF_OF_SHARED = 227 << 10, 113 << 10
MOST_STAGES = 4
SMALL_ROW = 128  # bytes
# Where rows are no multiple of so many bytes, thread blocks take pairs of heads: that is faster.
# At most so many stages, and bytes on their way to a multiprocessor, are best for them.
PIECE, STAGES_OF_PAIRS, ON_THEIR_WAY = 256, 3, 100 << 10
LARGE_HEAD, LARGEST_HEAD = 256, 512
SMALL_HEADS = 128  # elements of a key and a value
HALF_TURNED = 192  # of larger heads of 16-bit elements, products are transposed
LARGEST_TALL = 128  # the largest heads of values whose units are taken two at a time


class _Caches(NamedTuple):
    """A cache of keys or values, for the kernel: strides in bytes of blocks, heads, slots and
    packs; the bytes of a pack, and of a vector that can be read. ``slots_adjacent``, the kernel's
    kByToken: neighbouring slots are side by side, and ``slot`` is the stride of elements."""

    block: int
    head: int
    slot: int
    pack_stride: int
    pack: int
    vector: int
    slots_adjacent: bool = False


def _key_layout(cache):
    block, *strides = cache.strides
    if len(cache.shape) == 5:
        head, pack_stride, slot, _ = strides
        pack = cache.shape[4] * cache.dtype.bytes
    else:
        slot, head, _ = strides
        pack_stride, pack = 0, cache.shape[3] * cache.dtype.bytes
    vector = contract.vector_bytes(*contract.row_starts(cache), pack)
    return _Caches(block, head, slot, pack_stride, pack, vector)


def _value_layout(cache, packed, block_size):
    if not packed:
        return _key_layout(cache)
    size = cache.dtype.bytes
    if len(cache.shape) == 5:
        block, head, pack_stride, slot, _ = cache.strides
        pack = cache.shape[4] * size
    else:
        block, head, slot, _ = cache.strides
        pack_stride, pack = 0, block_size * size
    vector = contract.vector_bytes(*contract.row_starts(cache), pack, KEYS * size)
    return _Caches(block, head, slot, pack_stride, pack, vector, slots_adjacent=True)


class _Plan(plans.KernelPlan):
    """One launch, of one of several kernels. A thread block takes one unit of work, or those of two
    neighbouring KV heads, or an equal share of all units, through scratch memory; or a cluster of
    thread blocks takes one unit. The result is the same.

    Parameters
    ----------
    launchers : {"plain", "paired", "tall", "shared" or "clustered": launch.Launcher}
        "paired" where pairs are quicker, "shared" where each sequence has one token, "clustered"
        where the GPU has clusters. "tall": like "plain", for calls of ``tall_tokens`` tokens or
        more.
    framework : str
        That of the results.
    heads : int
        Units of a sequence; where it has several tokens, of ``row_tokens`` of them.
    row_tokens : int or None
        None where each sequence has one token.
    tall_tokens : int or None
        None where there is no "tall".
    block_size : int
    resident : int
        Thread blocks that a multiprocessor runs at once.
    slot_bytes : int
        Bytes of a part's results.
    """

    __slots__ = (
        "_block_size", "_framework", "_heads", "_launchers", "_resident", "_row_tokens",
        "_slot_bytes", "_tall_tokens",
    )  # fmt: skip

    def __init__(
        self, launchers, framework, heads, row_tokens, tall_tokens, block_size, resident,
        slot_bytes,
    ):  # fmt: skip
        super().__init__(launchers["plain"], None)
        self._launchers, self._framework = launchers, framework
        self._heads, self._row_tokens, self._tall_tokens = heads, row_tokens, tall_tokens
        self._block_size, self._resident, self._slot_bytes = block_size, resident, slot_bytes

    def launchers(self):
        return tuple(self._launchers.values())

    def launch_for(self, rows):
        how, blocks = self._choose(*rows)
        warps = 2 * WARPS if how == "paired" else WARPS
        return self._launchers[how], (blocks, 1, 1), warps * launch.WARP

    def scratch_for(self, rows):
        how, blocks = self._choose(*rows)
        if how != "shared":
            return None
        _, sequences, width = rows
        # A word for each sequence and head. Then slots for each thread block: two, and as many as
        # it may have parts of a unit that another one begins.
        words = launch.ceil_div(8 * sequences * self._heads, 16) * 16
        tokens = width * self._block_size
        turns = max(launch.ceil_div(tokens, WARPS * KEYS), 1)  # of a sequence
        each = launch.ceil_div(sequences * turns, blocks // self._heads)
        slots = min(_most_parts(tokens), each) + 2
        size = words + blocks * slots * self._slot_bytes
        return plans.Scratch(self._framework, size, struct.pack("<QI", words, slots))

    def _choose(self, tokens, sequences, width):
        """(Key of the launcher, thread blocks)."""
        units = sequences
        if self._row_tokens is not None:
            units = tokens // self._row_tokens + sequences
        units *= self._heads
        if self._tall_tokens is not None and tokens >= self._tall_tokens:
            return "tall", units
        processors = launch.processors(self.launcher.device)
        at_once = self._resident * processors
        everyone = max(at_once // self._heads, 1) * self._heads
        turns = launch.ceil_div(width * self._block_size, WARPS * KEYS)  # of a sequence
        if "clustered" in self._launchers and units * CLUSTER <= at_once:
            if self._sharing_pays(sequences, units, turns, CLUSTER):
                return "shared", everyone
            return "clustered", units * CLUSTER
        if self._sharing_pays(sequences, units, turns, at_once // 3):
            return "shared", everyone
        # Then nearly every multiprocessor has a pair.
        if "paired" in self._launchers and 8 * units >= 15 * processors:
            return "paired", units // 2
        return "plain", units

    def _sharing_pays(self, sequences, units, turns, units_that_fill_memory):
        """Whether equal shares are quicker. A turn takes the same time for any number of units
        below ``units_that_fill_memory``, so equal shares gain the missing units at each turn.
        Joining parts through scratch memory costs as much as `COST_OF_SHARING` turns of one."""
        gained = turns * (units_that_fill_memory - units)
        return "shared" in self._launchers and sequences <= MOST_SHARED and gained > COST_OF_SHARING


def _most_parts(tokens):
    """The most parts of a sequence of up to ``tokens`` tokens: `Cut` of paged_attention.cu."""
    tiles = launch.ceil_div(tokens, KEYS)
    most = next((most for most, least in ((8, 256), (16, 512), (32, 2048)) if tiles <= least), 64)
    return max(min(most, launch.ceil_div(tiles, WARPS)), 1)


class _Units(NamedTuple):
    """How the query heads of a KV head, its ``group``, are cut into units of work.

    row_tokens : tokens of a sequence whose heads are in one unit.
    head_parts : units of a token's group.
    part_rows : the most rows of a unit.
    used_rows : those that a unit has.
    rows : those that the kernel computes.
    """

    row_tokens: int
    head_parts: int
    part_rows: int
    used_rows: int
    rows: int


def _units(group, several, largest):
    """The `_Units`. ``several``: sequences may have several tokens; ``largest``: elements of the
    larger of a key and a value."""
    # With one token, query heads beyond a tile's rows are units of their own: more thread blocks
    # then read keys at the same time.
    part_rows = MOST_ROWS if several else TILE_ROWS
    if largest > LARGE_HEAD:
        part_rows = FEW_ROWS
    row_tokens = max(1, part_rows // group) if several else 1
    used = min(group, part_rows)
    rows = next(most for most in (FEW_ROWS, TILE_ROWS, MOST_ROWS) if row_tokens * used <= most)
    return _Units(row_tokens, launch.ceil_div(group, part_rows), part_rows, used, rows)


class _Memory(NamedTuple):
    """What a thread block has in shared memory, in bytes.

    tile : the keys and values of a tile.
    of_warp : what a warp keeps for each of its tiles.
    results : the results of a warp.
    sent : what the thread blocks of a cluster send each other, in the tiles' place.
    stages : tiles of a warp that are under way.
    stages_of_pairs : the same where a thread block takes a pair of heads.
    turned : whether the products of keys and queries are transposed.
    """

    tile: int
    of_warp: int
    results: int
    sent: int
    stages: int
    stages_of_pairs: int
    turned: bool

    def with_stages(self, stages):
        """Bytes of a thread block that has so many stages."""
        return WARPS * (stages * (self.tile + self.of_warp) + self.results)


def _memory(size, rows, stored, by_token):
    """The `_Memory` of units with so many ``rows``. ``size``: of heads; ``by_token``: each token
    and head has a scale."""
    largest = max(size["head_size"], size["head_size_v"])
    key_bytes = launch.ceil_div(size["head_size"], 16) * 16 * stored.bytes
    value_size = launch.ceil_div(size["head_size_v"], 16) * 16
    tile = KEYS * (key_bytes + value_size * stored.bytes)
    of_warp = 4 + 2 * KEYS * formats.FLOAT32.bytes * by_token
    tile_rows = min(rows, TILE_ROWS)
    turned = rows == FEW_ROWS and largest > (HALF_TURNED if stored.bytes == 2 else LARGE_HEAD)
    results = tile_rows * (value_size // 2 + (0 if turned else 4)) * 8
    if rows < MOST_ROWS and tile_rows * value_size // 2 * 8 <= tile:
        results = 0  # they take the place of a tile
    results += tile_rows * 8
    # Column pairs and totals, and only where units have few rows.
    in_turn = CLUSTER * WARPS * launch.WARP
    sent = launch.ceil_div(tile_rows * value_size // 2, in_turn) * in_turn + CLUSTER * tile_rows
    sent = 8 * sent if rows < MOST_ROWS else 0
    ahead = ON_THEIR_WAY // (2 * WARPS * tile)
    stages_of_pairs = max(2, min(STAGES_OF_PAIRS, ahead + 1))
    # With small rows, two tiles ahead is slower than one.
    stages = 2 if key_bytes <= SMALL_ROW else MOST_STAGES
    made = _Memory(tile, of_warp, results, sent, stages, stages_of_pairs, turned)
    while stages > 2 and made.with_stages(stages) > HALF_OF_SHARED:
        stages -= 1
    if made.with_stages(stages) > ALL_OF_SHARED:
        stages = 1
    return made._replace(stages=stages)


class _Shape(NamedTuple):
    """What all kernels of a signature have in common.

    keys, values : the caches.
    units, memory : the work of a thread block, and its shared memory.
    tall_tokens, slot_bytes : see `_Plan`.
    """

    keys: _Caches
    values: _Caches
    units: _Units
    memory: _Memory
    tall_tokens: int | None
    slot_bytes: int


def _shape(size, named, stored):
    """The `_Shape`. ``size``: of the call's `contract.Contract`."""
    key_cache = named["key_cache"]
    several, by_token = named["query_start_loc"] is not None, named["k_scale_cache"] is not None
    group = size["num_heads"] // size["num_kv_heads"]
    units = _units(group, several, max(size["head_size"], size["head_size_v"]))
    # The results of a part: for each row float32 pairs of columns, a maximum and a sum.
    columns = launch.ceil_div(size["head_size_v"], 16) * 16 // 2
    return _Shape(
        _key_layout(key_cache),
        _value_layout(named["value_cache"], len(key_cache.shape) == 5, size["block_size"]),
        units,
        _memory(size, units.rows, stored, by_token),
        _tall_tokens(size, units) if several else None,
        launch.ceil_div(units.used_rows * (columns + 1) * 8, 16) * 16,
    )


def _gpu_plan(check, named, stored, options, scale_strides, base_scale):
    _, causal, _, _, capped = options
    size, out = check.sizes, named["out"]
    _check_on_gpu(check, named["query"])
    shape = _shape(size, named, stored)
    constants = {
        **_constants(size, named, shape, causal),
        **_strides(named, shape.keys, shape.values, scale_strides),
        "base_scale": base_scale,
    }
    launchers = _launchers(check, named, stored, shape, capped, PARAMS.constants(constants))
    resident = 1 if size["head_size"] + size["head_size_v"] > LARGE_HEAD else 2
    several, units = named["query_start_loc"] is not None, shape.units
    return _Plan(
        launchers, out.framework, size["num_kv_heads"] * units.head_parts,
        units.row_tokens if several else None, shape.tall_tokens, size["block_size"], resident,
        shape.slot_bytes,
    )  # fmt: skip


def _constants(size, named, shape, causal):
    """The constant fields of `PARAMS`, by their names, but for `_strides` and the scale."""
    query, out, sinks, units = named["query"], named["out"], named["sinks"], shape.units
    return {
        "num_blocks": named["key_cache"].shape[0],
        "scratch_tag": plans.SCRATCH_TAG,
        "tall_tokens": shape.tall_tokens or 0,
        "block_size": size["block_size"],
        "kv_heads": size["num_kv_heads"],
        "group": size["num_heads"] // size["num_kv_heads"],
        "row_tokens": units.row_tokens,
        "head_parts": units.head_parts,
        "part_rows": units.part_rows,
        "causal": causal,
        "float_sinks": sinks is not None and sinks.dtype == formats.FLOAT32,
        "key_pack": shape.keys.pack,
        "slot_bytes": shape.slot_bytes,
        "value_pack": shape.values.pack,
        "pairs_in": contract.vector_bytes(query.ptr, *query.strides[:2]) >= 4,
        "pairs_out": contract.vector_bytes(out.ptr, *out.strides[:2]) >= 4,
        "by_block_size": launch.divisor(size["block_size"]),
        "by_heads": launch.divisor(size["num_kv_heads"] * units.head_parts),
    }


def _launchers(check, named, stored, shape, capped, constants):
    """The launchers of a `_Plan`. ``capped``: whether there is a soft cap."""
    size, (keys, values, units, memory, tall_tokens, _) = check.sizes, shape
    several, by_token = named["query_start_loc"] is not None, named["k_scale_cache"] is not None
    device = named["out"].device.index
    # Keys of a tile that are surely in one block.
    run = next(keys for keys in (KEYS, KEYS // 2, 1) if size["block_size"] % keys == 0)
    cached = spelling.element(stored)
    if by_token:
        cached = f"cupy_cache::TokenScaled<{cached}>"
    indices = [named[name] for name in ("block_table", "seq_lens", "query_start_loc")]
    flags = (values.slots_adjacent, capped, named["alibi_slopes"] is not None)
    # Four of these thread blocks are to fit on a multiprocessor; 16-byte copies bypass the L1.
    small_heads = units.rows == FEW_ROWS and size["head_size"] + size["head_size_v"] <= SMALL_HEADS
    small_heads = small_heads and keys.vector == values.vector == 16 and not by_token

    def launcher(cluster, tall=False, teams=1):
        stages = memory.stages if teams == 1 else memory.stages_of_pairs
        shared = max(memory.with_stages(stages), memory.sent if cluster > 1 else 0)
        arguments = (
            spelling.element(named["query"].dtype), cached,
            size["head_size"], size["head_size_v"], keys.vector, values.vector, units.rows,
            memory.turned, run, *flags, stages, shared, cluster, tall, teams,
            spelling.indices(*indices),
        )  # fmt: skip
        entry = NAME if cluster <= 1 else f"{NAME}_clustered"
        kernel = modules.Kernel(
            check.op, NAME, spelling.instance(entry, *arguments), PARAMS,
            guarded=("block_table", "seq_lens", "query_start_loc"),
            shared_bytes=shared if teams == 1 else teams * launch.ceil_div(shared, 128) * 128,
            all_shared=small_heads and cluster == teams == 1,
        )  # fmt: skip
        return launch.Launcher(kernel, device, constants)

    launchers = {"plain": launcher(1)}
    if tall_tokens is not None:
        launchers["tall"] = launcher(1, tall=True)
    if launch.has_clusters(device):
        launchers["clustered"] = launcher(CLUSTER)
    if not several:
        launchers["shared"] = launcher(0)
        if run > 1 and _pairs_are_quicker(size, stored, keys, values, units, memory, device):
            launchers["paired"] = launcher(1, teams=2)
    return launchers


def _check_on_gpu(check, query):
    """Refuse what the kernels cannot do."""
    with errors.on_gpus_alone():
        steps.check_query_on_gpu(check, query)
        for name, size in (("query", "head_size"), ("value_cache", "head_size_v")):
            extent = check.sizes[size]
            if extent > LARGEST_HEAD:
                expected = f"heads of at most {LARGEST_HEAD} elements on a GPU"
                raise errors.wrong("shape", f"{check.op}: {name}", expected, extent)


def _strides(named, keys, values, scale_strides):
    """The strides among the constant fields of `PARAMS`, by their names; 0 of what is absent."""
    lse, sinks, slopes = named["lse"], named["sinks"], named["alibi_slopes"]
    fields = {
        "lse_stride": 0 if lse is None else lse.strides[0],
        "lse_head_stride": 0 if lse is None else lse.strides[1],
        "slope_stride": 0 if slopes is None else slopes.strides[-1],
        "slope_sequence_stride": 0,
        "sink_stride": 0 if sinks is None else sinks.strides[0],
        "k_scale_stride": scale_strides[0],
        "v_scale_stride": scale_strides[1],
    }
    if slopes is not None and len(slopes.strides) == 2:
        fields["slope_sequence_stride"] = slopes.strides[0]
    for name in ("query", "out"):
        token, head = named[name].strides[:2]
        fields |= {f"{name}_stride": token, f"{name}_head_stride": head}
    for name, cache in (("key", keys), ("value", values)):
        fields |= {
            f"{name}_block_stride": cache.block,
            f"{name}_head_stride": cache.head,
            f"{name}_slot_stride": cache.slot,
            f"{name}_pack_stride": cache.pack_stride,
        }
    for name in ("k_scale", "v_scale"):
        cache = named[f"{name}_cache"]
        strides = (0, 0, 0) if cache is None else cache.strides
        for axis, stride in zip(("block", "slot", "head"), strides):
            fields[f"{name}_{axis}_stride"] = stride
    return fields


def _tall_tokens(size, units):
    """The fewest tokens of calls for which the kernel "tall" is quicker; None where it never is."""
    if units.head_parts > 1 or not size["head_size"] <= size["head_size_v"] <= LARGEST_TALL:
        return None
    return launch.ceil_div(MANY_UNITS, size["num_kv_heads"]) * units.row_tokens


def _pairs_are_quicker(size, stored, keys, values, units, memory, device):
    """Whether thread blocks that take the same unit of two neighbouring KV heads read at a higher
    rate than those of one. They must have room, and rows of the two that are side by side, in
    16-byte vectors."""
    room = min(ALL_OF_SHARED, launch.shared_memory(device))
    if (
        units.rows != FEW_ROWS or units.head_parts != 1 or size["num_kv_heads"] % 2
        or memory.turned or values.slots_adjacent
        or 2 * memory.with_stages(memory.stages_of_pairs) >= room
    ):  # fmt: skip
        return False
    caches = (keys, size["head_size"]), (values, size["head_size_v"])
    for cache, elements in caches:
        adjacent = cache.head == elements * stored.bytes and elements % 16 == 0
        # With small rows, ragged and short sequences lose more than others gain.
        if cache.vector != 16 or not adjacent or cache.head <= SMALL_ROW:
            return False
    return any(cache.head % PIECE for cache, _ in caches)


def _on_numpy(*arguments, base_scale, **options):
    *views_and_counts, scale, soft_cap, k_number, v_number = arguments
    cpu.paged_attention(
        *views_and_counts, scale * base_scale, soft_cap, k_number, v_number, **options
    )


def _count(extents, options, scalars):
    """(Tokens and sequences, or 0; the fields of `PARAMS` behind the pointers)."""
    del options
    tokens, ((table_rows, width), (step, _)), sequences, starts, *written, slopes = extents
    steps.check_counts(
        NAME, tokens, sequences, table_rows, starts, dict(zip(("out", "lse"), written))
    )  # fmt: skip
    if slopes is not None and slopes < sequences:
        expected = f"rows for the {errors.counted(sequences, 'sequence')} of seq_lens"
        raise errors.wrong("shape", f"{NAME}: alibi_slopes", expected, slopes)
    work = (tokens, sequences, width) if tokens and sequences else 0
    return work, (tokens, sequences, width, step, *scalars)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("query", varies=dispatch.ROWS),
        dispatch.Arg("key_cache"),
        dispatch.Arg("value_cache"),
        dispatch.Arg("block_table", varies=(0, 1), index=True),
        dispatch.Arg("seq_lens", varies=dispatch.ROWS, index=True),
        dispatch.Arg("query_start_loc", varies=dispatch.ROWS, optional=True, index=True),
        dispatch.Arg("alibi_slopes", optional=True),
        dispatch.Arg("sinks", optional=True),
        dispatch.Arg("k_scale", optional=True),
        dispatch.Arg("v_scale", optional=True),
        dispatch.Arg("out", varies=dispatch.ROWS, written=True),
        dispatch.Arg("lse", varies=dispatch.ROWS, optional=True, written=True),
        dispatch.Arg("k_scale_cache", optional=True),
        dispatch.Arg("v_scale_cache", optional=True),
        dispatch.Arg("sequence_slopes", varies=dispatch.ROWS, optional=True, called="alibi_slopes"),
    ),
    plan=_plan,
    destination=(10, 11),
    count=_count,
    options=("kv_cache_dtype",),
    result=dispatch.Result(10, (0,), _new_out),
)
