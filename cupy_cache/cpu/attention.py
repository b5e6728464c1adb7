# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Attention over pages on NumPy arrays: what runs where there is no GPU, and what the kernels mean.

All arithmetic is in float32. Keys are taken a few blocks at a time, with a running maximum, so that
little is held at once however long a sequence is. How a sequence is cut depends on that sequence
alone: its result has the same bits in any batch.
"""

import numpy as np

from ..runtime import faults, formats
from ..runtime.formats import DS_LATENT, DS_ROPE_AT
from .conversions import decode, encode

OP = "paged_attention"
NO_WINDOW = 1 << 62  # more tokens than there are
KEYS = 512  # tokens whose keys and values are held as float32
SCORES = 1 << 22  # of all heads, that are held
ELEMENTS = 1 << 20  # that are merged at once

# Where a cache has its heads, blocks, offsets and elements.
_SLOTS_FIRST = (2, 0, 1, 3)
_PACKED_KEYS = (1, 0, 3, 2, 4)
_PACKED_VALUES = {4: (1, 0, 3, 2), 5: (1, 0, 2, 4, 3)}


def paged_attention(
    query, key_cache, value_cache, block_table, seq_lens, query_start_loc, alibi_slopes, sinks,
    k_scale, v_scale, out, lse, k_scale_cache, v_scale_cache, sequence_slopes, tokens, sequences,
    width, _, window, scale, soft_cap, k_number, v_number, *, dtype, stored, sink_type, block_size,
    causal, op=OP,
):  # fmt: skip
    """Write the attention of ``tokens`` queries to ``out``, and its logarithms to ``lse``.

    ``query`` and ``out`` are bits of ``dtype``, the caches of ``stored`` (None: they are read as
    `_Pages` are), ``sinks`` of ``sink_type``. ``soft_cap`` 0 is none. ``op``: whose faults these
    are.
    """
    if stored is None:
        keys, values = key_cache, value_cache
    else:
        packed = key_cache.ndim == 5
        keys = _Pages(key_cache, stored, _PACKED_KEYS if packed else _SLOTS_FIRST, k_scale_cache)
        values = _Pages(
            value_cache, stored, _PACKED_VALUES[value_cache.ndim] if packed else _SLOTS_FIRST,
            v_scale_cache,
        )  # fmt: skip
    kv_heads, heads = keys.heads, query.shape[1]
    by_head = (kv_heads, heads // kv_heads, 1)
    with np.errstate(all="ignore"):
        logits = _Logits(
            np.float32(scale) * _factors(k_scale, k_number), np.float32(soft_cap),
            None if alibi_slopes is None else alibi_slopes.reshape(*by_head, 1),
            None if sinks is None else decode(sinks, sink_type).reshape(by_head),
        )  # fmt: skip
        v_factors = _factors(v_scale, v_number)
        starts = range(tokens + 1)
        if query_start_loc is not None:
            starts = _starts(op, query_start_loc, tokens)
        lengths = seq_lens.tolist()
        most = max(1, SCORES // (heads * KEYS))
        for sequence in range(sequences):
            begin, end = starts[sequence], starts[sequence + 1]
            if begin == end:
                continue
            if sequence_slopes is not None:
                logits.slopes = sequence_slopes[sequence].reshape(*by_head, 1)
            length = min(max(lengths[sequence], 0), width * block_size)
            if length != lengths[sequence]:
                limit = width * block_size + 1
                faults.record(op, "seq_lens", sequence, lengths[sequence], limit)
            for first in range(begin, end, most):
                part = slice(first, min(first + most, end))
                positions = np.arange(part.start, part.stop) + (length - end)
                seen = _seen(positions, length, window, causal)
                pages = _pages(op, block_table, sequence, seen, block_size, len(key_cache))
                attended, logarithms = _attend(
                    decode(query[part], dtype), positions, seen, keys, values, block_size, *pages,
                    logits,
                )  # fmt: skip
                attended *= v_factors[..., np.newaxis]
                out[part] = encode(_by_token(attended), dtype)
                if lse is not None:
                    lse[part] = _by_token(logarithms)


def _starts(op, found, tokens):
    """The starts that those ``found`` count as: from 0 to ``tokens``, and not descending."""
    starts = np.minimum(np.maximum.accumulate(np.maximum(found, 0)), tokens)
    for index in np.flatnonzero(starts != found)[:1]:
        faults.record(op, "query_start_loc", index, found[index], tokens + 1)
    return starts.tolist()


class _Pages:
    """A cache whose blocks are read as float32 [head, token, element].

    scales : [block, offset, head], or None
    """

    def __init__(self, cache, stored, axes, scales):
        self.heads, self.elements = cache.shape[axes[0]], cache.shape[axes[-1]]
        if axes == _PACKED_KEYS:
            self.elements *= cache.shape[2]
        self._cache, self._stored, self._axes, self._scales = cache, stored, axes, scales
        # The slots that lie together along the first of the dimensions of the offsets.
        self._run = cache.shape[4] if axes == _PACKED_VALUES[5] else 1

    def read(self, blocks, start, stop):
        """Slots ``start`` to ``stop`` of each block; not all only of a single one."""
        first = start // self._run
        part = [slice(None)] * self._cache.ndim
        part[self._axes[2]] = slice(first, -(-stop // self._run))
        tokens = decode(self._cache[tuple(part)][blocks], self._stored).transpose(self._axes)
        tokens = tokens.reshape(self.heads, -1, self.elements)
        skipped = start - first * self._run
        return tokens[:, skipped : skipped + len(blocks) * (stop - start)]

    def scaled(self, numbers, blocks, start, stop, used):
        """``numbers`` [head, group, query, token], in place, times the scales of these tokens of
        the same slots, if there are any."""
        if self._scales is not None:
            scales = self._scales[:, start:stop][blocks].reshape(-1, self.heads)[used]
            numbers *= scales.T[:, np.newaxis, np.newaxis]
        return numbers


class _Logits:
    """What becomes of the products of queries and keys.

    factors : what they are multiplied with [head or 1, 1, 1]. soft_cap : 0 is none.
    slopes : [head, group, 1, 1] or None. sinks : [head, group, 1] or None.
    """

    def __init__(self, factors, soft_cap, slopes, sinks):
        self.factors, self.soft_cap, self.slopes = factors[..., np.newaxis], soft_cap, slopes
        self.sinks = sinks

    def of(self, products, distance):
        """``products`` [head, group, query, key]; ``distance`` [query, key] from the query."""
        products *= self.factors
        if self.soft_cap:
            products /= self.soft_cap
            np.tanh(products, out=products)
            products *= self.soft_cap
        if self.slopes is not None:
            products += self.slopes * distance.astype(np.float32)
        return products


def _factors(scale, number):
    """Scales [head, 1, 1], or [1, 1, 1] for all heads."""
    if scale is None or scale.size == 1:
        return np.float32(number if scale is None else scale.reshape(())) * np.ones((1, 1, 1), "f4")
    return scale.reshape(-1, 1, 1)


def _seen(positions, length, window, causal):
    """(first, last) key that each query sees; first > last where it sees none."""
    last = np.minimum(positions, length - 1) if causal else np.full_like(positions, length - 1)
    before = window - 1
    return np.maximum(positions, before) - before, last  # of any positions, without overflow


def _pages(op, block_table, sequence, seen, block_size, num_blocks):
    """(page, block) of all pages that any of the queries sees a token of, without those whose block
    number is out of range, which is recorded; the tokens of which any is seen."""
    first, last = seen
    some = first <= last
    if not some.any():
        return np.empty((2, 0), np.int64), (0, 0)
    tokens = int(first[some].min()), int(last[some].max()) + 1
    page = np.arange(tokens[0] // block_size, -(-tokens[1] // block_size))
    block = block_table[sequence, page].astype(np.int64)
    good = (block >= 0) & (block < num_blocks)
    if not good.all():
        faults.record(op, "block_table", sequence, block[~good][0], num_blocks)
    return np.stack([page[good], block[good]]), tokens


def _parts(pages, block_size):
    """What is read at once: (which of the pages, first slot, end)."""
    if block_size <= KEYS:
        step = KEYS // block_size
        return [(slice(at, at + step), 0, block_size) for at in range(0, pages, step)]
    return [
        (slice(at, at + 1), start, min(start + KEYS, block_size))
        for at in range(pages)
        for start in range(0, block_size, KEYS)
    ]


def _attend(query, positions, seen, keys, values, block_size, pages, tokens, logits):
    """(Attended [head, group, query, element], logarithms [head, group, query]) of queries [query,
    head, element] at these positions, to these ``pages`` (page, block)."""
    (page, block), (first, last) = pages, seen
    heads, count = keys.heads, len(query)
    query = query.reshape(count, heads, -1, query.shape[2]).transpose(1, 2, 0, 3)
    group = query.shape[1]
    rows = query.reshape(heads, group * count, -1)
    largest = np.full((heads, group, count), -np.inf, np.float32)
    total = np.zeros((heads, group, count), np.float32)
    sums = np.zeros((heads, group, count, values.elements), np.float32)
    for index, start, stop in _parts(len(page), block_size):
        token = page[index, np.newaxis] * block_size + np.arange(start, stop)
        # What no query sees may be anything, and zero times that is not always zero.
        used = slice(*np.searchsorted(token.reshape(-1), tokens))
        token = token.reshape(-1)[used]
        if not token.size:
            continue
        where = block[index], start, stop
        products = rows @ keys.read(*where)[:, used].swapaxes(1, 2)
        products = keys.scaled(products.reshape(heads, group, count, -1), *where, used)
        scores = logits.of(products, token - positions[:, np.newaxis])
        hidden = (token < first[:, np.newaxis]) | (token > last[:, np.newaxis])
        if hidden.any():
            np.copyto(scores, -np.inf, where=hidden)
        before, largest = largest, np.maximum(largest, scores.max(axis=-1))
        shift = np.where(np.isneginf(largest), np.float32(0), largest)
        scores -= shift[..., np.newaxis]
        weights = np.exp(scores, out=scores)
        shrink = np.exp(before - shift)
        total = total * shrink + weights.sum(axis=-1)
        weights = values.scaled(weights, *where, used).reshape(heads, group * count, -1)
        added = weights @ values.read(*where)[:, used]
        sums = sums * shrink[..., np.newaxis] + added.reshape(sums.shape)
    none = total == 0
    if logits.sinks is not None:
        before, largest = largest, np.maximum(largest, logits.sinks)
        shift = np.where(np.isneginf(largest), np.float32(0), largest)
        shrink = np.exp(before - shift)
        total = total * shrink + np.exp(logits.sinks - shift)
        sums *= shrink[..., np.newaxis]
    sums /= np.where(none, np.float32(1), total)[..., np.newaxis]
    sums[none] = 0
    return sums, np.where(none, np.float32(-np.inf), largest + np.log(total))


class _Entries:
    """A cache of entries of multi-head latent attention, read as `_Pages` of a single head are:
    the first ``elements`` elements of each. ``dtype``: of the rope part of "fp8_ds_mla" entries."""

    heads = 1

    def __init__(self, cache, dtype, elements):
        self._cache, self._dtype, self.elements = cache, dtype, elements

    def __len__(self):
        return len(self._cache)

    def read(self, blocks, start, stop):
        """Slots ``start`` to ``stop`` of each block."""
        entries = np.ascontiguousarray(self._cache[:, start:stop][blocks])
        entries = entries.reshape(1, -1, entries.shape[2])
        latent = decode(entries[..., :DS_LATENT], formats.E4M3)
        scales = entries[..., DS_LATENT:DS_ROPE_AT].view(np.float32)
        latent *= np.repeat(scales, DS_LATENT // scales.shape[2], axis=2)
        if self.elements == DS_LATENT:
            return latent
        rope = decode(entries[..., DS_ROPE_AT:].view(self._dtype.bits), self._dtype)
        return np.concatenate([latent, rope], axis=2)

    @staticmethod
    def scaled(numbers, *where):
        """``numbers``: what is read is scaled."""
        del where
        return numbers


def paged_attention_mla(
    query, kv_cache, block_table, seq_lens, query_start_loc, kv_scale, out, lse, tokens, sequences,
    width, step, scale, kv_number, *, dtype, stored, latent, block_size, causal,
):  # fmt: skip
    """The same over one cache of entries, of which the first ``latent`` elements are the values.
    ``stored`` None: "fp8_ds_mla"."""
    if stored is None:
        pair = (_Entries(kv_cache, dtype, size) for size in (query.shape[2], latent))
    else:
        heads_third = kv_cache[:, :, np.newaxis]
        pair = heads_third, heads_third[..., :latent]
    paged_attention(
        query, *pair, block_table, seq_lens, query_start_loc, None, None, kv_scale, kv_scale, out,
        lse, None, None, None, tokens, sequences, width, step, NO_WINDOW, scale, 0.0, kv_number,
        kv_number, dtype=dtype, stored=stored, sink_type=None, block_size=block_size,
        causal=causal, op="paged_attention_mla",
    )  # fmt: skip


def _by_token(array):
    """[head, group, query, …] as [query, query head, …]."""
    moved = np.moveaxis(array, 2, 0)
    return np.ascontiguousarray(moved).reshape(len(moved), -1, *array.shape[3:])


def merge_attn_states(
    output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse, tokens, *_, dtype
):
    """Merge attentions of ``tokens`` queries, bits of ``dtype``, into ``output``, and their
    logarithms into ``output_lse``."""
    step = max(1, ELEMENTS // output[0].size)
    with np.errstate(all="ignore"):
        for first in range(0, tokens, step):
            part = slice(first, min(first + step, tokens))
            # [token, head, 1], as what they weigh.
            logarithms = [
                np.where(np.isposinf(lse[:, part]), -np.inf, lse[:, part]).T[..., np.newaxis]
                for lse in (prefix_lse, suffix_lse)
            ]
            largest = np.maximum(*logarithms)
            none = np.isneginf(largest)
            weights = [np.exp(lse - np.where(none, 0, largest)) for lse in logarithms]
            total = weights[0] + weights[1]
            sides = prefix_output[part], suffix_output[part]
            merged = sum(
                np.where(weight == 0, 0, decode(rows, dtype)) * (weight / total)
                for weight, rows in zip(weights, sides)
            )
            output[part] = np.where(none, sides[0], encode(merged, dtype))
            if output_lse is not None:
                merged = np.where(none, -np.inf, largest + np.log(total))
                output_lse[:, part] = merged[..., 0].T
