# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The calls of each operation that a model's engine makes, on arrays without memory.

`OPERATIONS` has a function for each operation, which yields the calls of a `Model`: each a function
without arguments. Where an operation does not take the model's layouts or formats, it yields none.
There is a call for each kernel that a step may need; what no kernel depends on is left out.
"""

import itertools
import math
from functools import partial as call

from ..attention import alibi_slopes as attention
from ..attention.alibi_bias import alibi_bias
from ..attention.merge_attn_states import merge_attn_states
from ..attention.paged_attention import paged_attention
from ..attention.paged_attention_mla import paged_attention_mla
from ..ops import gather_both
from ..ops.concat_and_cache_mla import SCALE_RULES, concat_and_cache_mla
from ..ops.concat_and_cache_mla_grouped import GEOMETRY, concat_and_cache_mla_grouped
from ..ops.concat_and_cache_mla_rope_fused import concat_and_cache_mla_rope_fused
from ..ops.convert_fp8 import convert_fp8
from ..ops.copy_blocks import copy_blocks, copy_blocks_mla
from ..ops.copy_tokens import copy_tokens
from ..ops.cp_gather_and_upconvert_fp8_kv_cache import cp_gather_and_upconvert_fp8_kv_cache
from ..ops.cp_gather_cache import cp_gather_cache
from ..ops.cp_gather_indexer_k_quant_cache import cp_gather_indexer_k_quant_cache
from ..ops.gather_and_maybe_dequant_cache import gather_and_maybe_dequant_cache
from ..ops.gather_cache import gather_cache
from ..ops.gather_slots import gather_slots
from ..ops.indexer_k_quant_and_cache import indexer_k_quant_and_cache
from ..ops.pack_blocks import pack_blocks, pack_tokens, unpack_blocks, unpack_tokens
from ..ops.reshape_and_cache import reshape_and_cache
from ..ops.reshape_and_cache_flash import reshape_and_cache_flash
from ..ops.reshape_and_cache_flash_per_token_head import reshape_and_cache_flash_per_token_head
from ..ops.rotary_and_cache import rotary_and_cache
from ..ops.rotary_embedding import rotary_embedding
from ..ops.slot_mapping import slot_mapping
from ..ops.slot_mapping_groups import slot_mapping_groups
from ..ops.swap_blocks import swap_blocks
from ..ops.swap_blocks_batch import KERNEL as SWAP_BLOCKS_BATCH
from ..ops.zero_blocks import zero_blocks
from ..runtime import formats, launch
from ..runtime.descriptions import described
from .model import BLOCKS, ROWS

# --- writes ---------------------------------------------------------------------------------------


def _flash(model):
    if model.by_token:
        return
    for caches in model.pairs():
        for slots, scales in itertools.product(model.indices("slots", ROWS), model.scales()):
            step = *model.tokens(), *caches, slots
            yield call(reshape_and_cache_flash, *step, model.kv_cache_dtype, *scales)


def _per_token_head(model):
    if model.kv_cache_dtype not in formats.PER_TOKEN_HEAD_FORMATS:
        return
    for caches, slots in itertools.product(model.pairs(), model.indices("slots", ROWS)):
        step = *model.tokens(), *caches, *model.token_scales(), slots
        yield call(reshape_and_cache_flash_per_token_head, *step, model.kv_cache_dtype)


def _x_packed(model):
    if model.by_token:
        return
    for *caches, interleaved in model.x_packed():
        for slots, scales in itertools.product(model.indices("slots", ROWS), model.scales()):
            step = *model.tokens(), *caches, slots
            yield call(reshape_and_cache, *step, model.kv_cache_dtype, *scales, interleaved)


def _mla(model):
    if model.by_token:
        return
    for cache, slots in itertools.product(model.rows(), model.indices("slots", ROWS)):
        for rule in SCALE_RULES:
            step = *model.entries(), cache, slots
            yield call(concat_and_cache_mla, *step, model.kv_cache_dtype, 1.0, scale_rule=rule)


def _mla_grouped(model):
    """Caches in a list, and by their addresses."""
    if model.by_token or model.kv_cache_dtype == formats.FP8_DS_MLA:
        return
    scales = described((1,), formats.FLOAT32) if formats.is_scaled(model.kv_cache_dtype) else None
    named = {"kv_scales": scales, "kv_cache_dtype": model.kv_cache_dtype}
    for cache, slots in itertools.product(model.rows(), model.indices("slots", 1, ROWS)):
        yield call(concat_and_cache_mla_grouped, *model.entries(1), [cache], slots, **named)
        strides = model.block_size * cache.shape[2], cache.shape[2]
        geometry = dict(zip(GEOMETRY, (model.block_size, *strides, BLOCKS)))
        step = *model.entries(1), described((1,), formats.INT64), slots
        yield call(concat_and_cache_mla_grouped, *step, **geometry, **named)


def _indexer(model):
    keys = described((ROWS, model.key_size), model.dtype)
    for (cache, quant), slots in itertools.product(model.indexer(), model.indices("slots", ROWS)):
        for scales in ("fp8", "ue8m0", "mxfp8"):
            yield call(indexer_k_quant_and_cache, keys, cache, slots, quant, scales)


# --- rotary embeddings ----------------------------------------------------------------------------


def _tables(model, size):
    """(Table of cosines and sines, whether in NeoX's style), for each table dtype and style that
    `warmup` names, by default all. ``size`` elements of a head rotate."""
    if model.dtype in formats.FLOATS and size > 0 and size % 2 == 0:
        dtype, style = model.rotation.cos_sin_dtype, model.rotation.is_neox
        dtypes = dict.fromkeys((model.dtype, formats.FLOAT32)) if dtype is None else (dtype,)
        for one, is_neox in itertools.product(dtypes, (True, False) if style is None else (style,)):
            yield described((ROWS, size), one), is_neox


def _positions(model):
    """A step's positions, of three axes where there are sections."""
    axes = () if model.rotation.mrope_section is None else (3,)
    return model.indices("positions", *axes, ROWS)


def _turns(model, *names):
    """Keyword arguments from the model's rotation: those that all rotating operations have, and
    ``names``."""
    names = "rope_dim_offset", "mrope_section", "mrope_interleaved", *names
    return {name: getattr(model.rotation, name) for name in names}


def _rotary_write(model):
    rotation, named = model.rotation, _turns(model, "norm_eps", "rounding", "out_dtype")
    query = described((ROWS, model.query_heads, model.key_size), model.dtype)
    if rotation.norm_eps is not None:
        dtype = rotation.norm_dtype or model.dtype
        weights = [described((model.key_size,), dtype) for _ in "qk"]
        named |= zip(("q_norm_weight", "k_norm_weight"), weights)
    if rotation.out or rotation.out_dtype != "auto":
        raw = rotation.out_dtype in formats.RAW
        named["out"] = described(query.shape, model.dtype if raw else formats.UINT8)
    packed = [] if model.by_token else [(keys, values) for keys, values, _ in model.x_packed()]
    if model.by_token:
        named |= zip(("k_scale_cache", "v_scale_cache"), model.token_scales())
    tables = _tables(model, rotation.rotary_dim or model.key_size)
    for (table, is_neox), pair in itertools.product(tables, [*model.pairs(), *packed]):
        for positions, slots, scales in itertools.product(
            _positions(model), model.indices("slots", ROWS), model.scales()
        ):
            step = positions, query, *model.tokens(), table, *pair, slots, is_neox
            yield call(rotary_and_cache, *step, model.kv_cache_dtype, *scales, **named)


def _rotary(model):
    size, named = model.rotation.rotary_dim or model.key_size, _turns(model)
    for (table, is_neox), positions in itertools.product(_tables(model, size), _positions(model)):
        query, key = (
            described((ROWS, heads, model.key_size), model.dtype)
            for heads in (model.query_heads, model.heads)
        )
        step = positions, query, key, model.key_size, table, is_neox
        yield call(rotary_embedding, *step, **named)


def _mla_rotary(model):
    if model.kv_cache_dtype == formats.FP8_DS_MLA:
        return
    kv_c, k_pe = model.entries()
    q_pe = described((ROWS, model.query_heads, k_pe.shape[1]), model.dtype)
    tables = _tables(model, k_pe.shape[1])
    for (table, is_neox), cache in itertools.product(tables, list(model.rows())):
        for positions, slots in itertools.product(
            model.indices("positions", ROWS), model.indices("slots", ROWS)
        ):
            step = positions, q_pe, k_pe, kv_c, table, is_neox, slots, cache
            yield call(concat_and_cache_mla_rope_fused, *step, model.kv_cache_dtype, 1.0)


# --- reads ----------------------------------------------------------------------------------------


def _sequences(model):
    """Block table and bounds, in all combinations of their types."""
    return itertools.product(model.indices("tables", ROWS, ROWS), model.indices("bounds", ROWS + 1))


def _read_sequences(model):
    """The same with starts: None, to read whole sequences, or given."""
    for table, bounds in _sequences(model):
        for starts in (None, *model.indices("starts", ROWS)):
            yield table, bounds, starts


def _gathers(model):
    """Caches whose tokens are rows of elements, and such rows."""
    for cache in (*itertools.chain(*model.pairs()), *model.rows()):
        yield cache, described((ROWS, *cache.shape[2:]), model.stored)


def _packed_layouts(interleaved):
    """Gathering's names for the layouts of x-packed keys and values."""
    return "x-packed-key", "interleaved-value" if interleaved else "x-packed-value"


def _packed_gathers(model):
    """X-packed caches, rows of their elements, and the caches' layouts."""
    sizes = model.key_size, model.value_size
    for *caches, interleaved in model.x_packed():
        for cache, size, layout in zip(caches, sizes, _packed_layouts(interleaved)):
            yield cache, described((ROWS, model.heads, size), model.stored), layout


def _gather(model):
    for (cache, rows), sequences in itertools.product(_gathers(model), _read_sequences(model)):
        yield call(gather_cache, cache, rows, *sequences)
    for cache, rows, layout in _packed_gathers(model):
        for sequences in _read_sequences(model):
            yield call(gather_cache, cache, rows, *sequences, layout=layout)


def _cp_gather(model):
    for (cache, rows), sequences in itertools.product(_gathers(model), _read_sequences(model)):
        table, bounds, starts = sequences
        yield call(cp_gather_cache, cache, rows, table, bounds, ROWS, starts)


def _dequant_gather(model):
    if model.kv_cache_dtype == formats.FP8_DS_MLA:
        return
    yield from _both_gathers(model)
    for read, sequences in itertools.product(_dequantised(model), _read_sequences(model)):
        (cache, rows, named), (table, bounds, starts) = read, sequences
        step = cache, rows, table, bounds, None, ROWS, model.kv_cache_dtype
        yield call(gather_and_maybe_dequant_cache, *step, seq_starts=starts, **named)


def _slot_gather(model):
    if model.kv_cache_dtype == formats.FP8_DS_MLA:
        return
    for read, slots in itertools.product(_dequantised(model), model.indices("slots", ROWS)):
        cache, rows, named = read
        yield call(gather_slots, cache, rows, slots, model.kv_cache_dtype, **named)


def _dequantised(model):
    """Caches, rows of the model's dtype, and gathering's keyword arguments."""
    if model.by_token:
        name, every_scale = "scale_cache", model.token_scales()[:1]
        caches = [(cache, rows, "NHD") for cache, rows in _gathers(model) if len(rows.shape) == 3]
    else:
        name, every_scale = "scale", [keys for keys, _ in model.scales()]
        caches = [(cache, rows, "NHD") for cache, rows in _gathers(model)]
        caches += _packed_gathers(model)
    for (cache, rows, layout), scale in itertools.product(caches, every_scale):
        if len(rows.shape) == 2 and not isinstance(scale, float) and scale is not None:
            continue  # entries of latent attention have no heads
        named = {"scale": None, name: scale, "layout": layout}
        yield cache, described(rows.shape, model.dtype), named


def _both_gathers(model):
    """Keys and values at once: `PagedKVCache.gather`."""
    pairs = [(pair, ("NHD", "NHD")) for pair in model.pairs()]
    every_scale = model.scales()
    if model.by_token:
        every_scale = [model.token_scales()]
    else:
        pairs += [(pair, _packed_layouts(interleaved)) for *pair, interleaved in model.x_packed()]
    sizes = model.key_size, model.value_size
    for (caches, layouts), scales in itertools.product(pairs, every_scale):
        rows = [described((ROWS, model.heads, size), model.dtype) for size in sizes]
        given = [None if isinstance(one, float) else one for one in scales]
        options = layouts, model.kv_cache_dtype, model.by_token
        for sequences in _read_sequences(model):
            objects = *rows, *sequences, *caches, *given
            yield call(gather_both.OP, objects, options, None, (1.0, 1.0, None))


def _upconvert(model):
    if model.kv_cache_dtype != formats.FP8_DS_MLA:
        return
    rows = described((ROWS, sum(part.shape[1] for part in model.entries())), model.dtype)
    for cache in model.rows():
        for table, bounds, starts in _read_sequences(model):
            first_rows = described((ROWS,), bounds.dtype)
            step = cache, rows, table, first_rows, ROWS, starts
            yield call(cp_gather_and_upconvert_fp8_kv_cache, *step)


def _converts(model):
    """Conversions of whole caches without gaps, there and back."""
    if model.stored.name.startswith("float8") and not model.by_token:
        values, stored = (described((ROWS, 16), dtype) for dtype in (model.dtype, model.stored))
        yield call(convert_fp8, stored, values, 1.0, model.kv_cache_dtype)
        yield call(convert_fp8, values, stored, 1.0, model.kv_cache_dtype)


def _indexer_gather(model):
    for (cache, _), sequences in itertools.product(model.indexer(), _sequences(model)):
        keys = described((ROWS, model.key_size), formats.UINT8)
        scales = described((ROWS, cache.shape[2] - model.key_size), formats.UINT8)
        yield call(cp_gather_indexer_k_quant_cache, cache, keys, scales, *sequences)


# --- what a step needs besides --------------------------------------------------------------------


def _slots(model):
    for table, bounds in _sequences(model):
        for ranks, positions in itertools.product((1, 2), model.indices("positions", ROWS)):
            step = table, positions, bounds, model.block_size
            yield call(slot_mapping, *step, cp_world_size=ranks)


def _slot_groups(model):
    for table, bounds in _sequences(model):
        for ranks, positions in itertools.product((1, 2), model.indices("positions", ROWS)):
            # Without requests their type is the table's.
            for idx in (None, *model.indices("requests", ROWS)):
                step = [table], idx, positions, bounds, [model.block_size]
                yield call(slot_mapping_groups, *step, cp_world_size=ranks)


def _biases(model):
    slopes = described((model.heads,), formats.FLOAT32)
    every_bounds = model.indices("bounds", ROWS + 1)
    for dtype, queries in itertools.product(formats.FLOATS, model.indices("positions", ROWS)):
        for count in (ROWS, ROWS + 1):  # rows that are multiples of 16 bytes, and others
            step = slopes, queries, described((count,), queries.dtype)
            yield call(alibi_bias, *step, dtype=dtype.name)
            for starts, bounds in itertools.product(every_bounds, every_bounds):
                named = {"query_start_loc": starts, "cu_seq_lens": bounds}
                yield call(alibi_bias, *step, dtype=dtype.name, **named)


# --- attention ------------------------------------------------------------------------------------


def _attended(model):
    """Block table, lengths, and query starts: None, for one query of each sequence, or given."""
    return itertools.product(
        model.indices("tables", ROWS, ROWS), model.indices("requests", ROWS),
        (None, *model.indices("bounds", ROWS + 1)),
    )  # fmt: skip


def _attention(model):
    if model.dtype == formats.FLOAT32:
        return
    names = ("k_scale_cache", "v_scale_cache") if model.by_token else ("k_scale", "v_scale")
    options = {
        "kv_cache_dtype": model.kv_cache_dtype,
        "alibi_slopes": described((model.query_heads,), formats.FLOAT32) if model.alibi else None,
        "soft_cap": 50.0 if model.soft_cap else None,
    }
    packed = () if model.by_token else model.x_packed()
    every_scale = [model.token_scales()] if model.by_token else model.scales()
    for caches in itertools.chain(model.pairs(), (pair for *pair, _ in packed)):
        query = described((ROWS, model.query_heads, model.key_size), model.dtype)
        for (table, lens, starts), scales in itertools.product(_attended(model), every_scale):
            named = {"query_start_loc": starts, **dict(zip(names, scales)), **options}
            yield call(paged_attention, query, *caches, table, lens, **named)


def _latent_attention(model):
    if model.dtype == formats.FLOAT32:
        return
    options = {
        "scale": 1.0, "kv_lora_rank": model.value_size, "kv_cache_dtype": model.kv_cache_dtype
    }  # fmt: skip
    for cache in model.rows():
        query = described((ROWS, model.query_heads, model.key_size), model.dtype)
        for table, lens, starts in _attended(model):
            step = query, cache, table, lens
            yield call(paged_attention_mla, *step, query_start_loc=starts, **options)


def _merges(model):
    if model.dtype in formats.FLOATS:
        rows = [described((ROWS, model.query_heads, model.value_size), model.dtype) for _ in "ops"]
        lses = [described((model.query_heads, ROWS), formats.FLOAT32) for _ in "ps"]
        yield call(merge_attn_states, rows[0], rows[1], lses[0], rows[2], lses[1])


# --- copies and moves -----------------------------------------------------------------------------


def _pairs():
    """Mappings of several lengths: the amount to copy decides between two kernels."""
    half = BLOCKS // 2
    return [[(n, half + n) for n in range(min(count, half))] for count in (1, 16, 256)]


def _mappings(model):
    """The same, and mappings on the device."""
    for pairs in _pairs():
        yield from (pairs, *model.indices("blocks", len(pairs), 2))


def _copies(model):
    for caches in model.layers():
        if len(caches) == 2:
            for mapping in _mappings(model):
                yield call(copy_blocks, *([cache] for cache in caches), mapping)


def _mla_copies(model):
    for cache in model.single():
        for mapping in _mappings(model):
            yield call(copy_blocks_mla, [cache], mapping)


def _token_copies(model):
    for caches in model.layers(by_slot=True):
        for pairs in _mappings(model):
            yield call(copy_tokens, [caches], pairs)


def _swaps(model):
    """Swaps. To host memory and back, and within the GPU, the kernel is the same. The other side
    has no gaps, and its dimensions in the cache's memory order or as written."""
    for cache in itertools.chain(*model.layers()):
        for other in (cache.dense(), described(cache.shape, cache.dtype)):
            yield from (call(swap_blocks, cache, other, pairs) for pairs in _pairs())


def _moves(call_of, by_slot=False):
    """The calls of an operation that packs, unpacks or zeroes: ``call_of(caches, chosen,
    buffer)``."""

    def calls(model):
        for caches in model.layers(by_slot):
            size = sum(ROWS * math.prod(cache.shape[1:]) * cache.dtype.bytes for cache in caches)
            buffer = described((size,), formats.UINT8)
            for chosen in ([0], *model.indices("slots" if by_slot else "blocks", ROWS)):
                yield call_of([caches], chosen, buffer)

    return calls


def _packs(function, by_slot=False):
    return _moves(lambda caches, chosen, out: call(function, caches, chosen, out), by_slot)


def _unpacks(function, by_slot=False):
    return _moves(lambda caches, chosen, packed: call(function, packed, caches, chosen), by_slot)


def _needs(kernel):
    """The calls of an operation that needs the same kernel whatever the model."""

    def launch_it():
        raise launch.KernelNeeded(kernel)

    return lambda model: (launch_it,)


OPERATIONS = {
    "alibi_bias": _biases,
    "alibi_slopes": _needs(attention.ALIBI),
    "concat_and_cache_mla": _mla,
    "concat_and_cache_mla_grouped": _mla_grouped,
    "concat_and_cache_mla_rope_fused": _mla_rotary,
    "convert_fp8": _converts,
    "copy_blocks": _copies,
    "copy_blocks_mla": _mla_copies,
    "copy_tokens": _token_copies,
    "cp_gather_and_upconvert_fp8_kv_cache": _upconvert,
    "cp_gather_cache": _cp_gather,
    "cp_gather_indexer_k_quant_cache": _indexer_gather,
    "gather_and_maybe_dequant_cache": _dequant_gather,
    "gather_cache": _gather,
    "gather_slots": _slot_gather,
    "indexer_k_quant_and_cache": _indexer,
    "merge_attn_states": _merges,
    "pack_blocks": _packs(pack_blocks),
    "pack_tokens": _packs(pack_tokens, by_slot=True),
    "paged_attention": _attention,
    "paged_attention_mla": _latent_attention,
    "place_slopes": _needs(attention.PLACE),
    "reshape_and_cache": _x_packed,
    "reshape_and_cache_flash": _flash,
    "reshape_and_cache_flash_per_token_head": _per_token_head,
    "rotary_and_cache": _rotary_write,
    "rotary_embedding": _rotary,
    "slot_mapping": _slots,
    "slot_mapping_groups": _slot_groups,
    "swap_blocks": _swaps,
    "swap_blocks_batch": _needs(SWAP_BLOCKS_BATCH),
    "unpack_blocks": _unpacks(unpack_blocks),
    "unpack_tokens": _unpacks(unpack_tokens, by_slot=True),
    "zero_blocks": _moves(lambda caches, chosen, _: call(zero_blocks, caches, chosen)),
}
