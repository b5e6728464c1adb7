# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Problems of attention over pages, and how their solutions are judged.

Every slot that no query sees holds NaN, every table entry that no query needs a number that is out
of range, and results are poisoned. An error may be at most twice that of the plain computation in
the same precision: products, logits, weights and sums rounded to the dtype of the query.
"""

import math

import ml_dtypes
import numpy as np
import oracle
import pytest
import worlds
from guards import BAD, check_faults

import cupy_cache as cc
from cupy_cache.runtime import formats

LAYOUTS = ("NHD", "HND", "packed-NHD", "packed-HND", "gaps", "x-packed", "interleaved")
STORED = {
    "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "int8": "int8"
}  # fmt: skip
# Of caches with a scale for each token and head.
TOKEN_SCALED = {
    "int8": "int8", "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
    "int8_per_token_head": "int8", "fp8_per_token_head": "float8_e4m3fn",
}  # fmt: skip
UNUSED = -7  # in tables


def caches(rng, layout, num_blocks, block_size, heads, sizes, dtype, pad=0):
    """Specs of a key and a value cache."""
    if layout in ("x-packed", "interleaved"):
        x = math.gcd(16 // formats.DTYPES[dtype].bytes, sizes[0])
        if layout == "interleaved":
            x = math.gcd(x, block_size)
        key = worlds.array(rng, (num_blocks, heads, sizes[0] // x, block_size, x), dtype, pad)
        shape = num_blocks, heads, sizes[1], block_size
        if layout == "interleaved":
            shape = num_blocks, heads, block_size // x, sizes[1], x
        return key, worlds.array(rng, shape, dtype, pad)
    inner = (heads, block_size) if "HND" in layout else (block_size, heads)
    if "packed" in layout:
        page = worlds.array(rng, (num_blocks, *inner, sum(sizes)), dtype, pad)
        pair = page[..., : sizes[0]], page[..., sizes[0] :]
    elif layout == "gaps":  # of a pool of several layers, with something else between heads
        pool = worlds.array(rng, (num_blocks, 3, *inner, sum(sizes) + 3), dtype, pad)
        pair = pool[:, 1, ..., : sizes[0]], pool[:, 2, ..., 3 : 3 + sizes[1]]
    else:
        pair = [worlds.array(rng, (num_blocks, *inner, size), dtype, pad) for size in sizes]
    return [cache.permuted(0, 2, 1, 3) for cache in pair] if "HND" in layout else pair


def fill(spec, elements, layout, is_key):
    """Put ``elements`` [block, offset, head, element] where ``layout`` has them."""
    view = spec.on(spec.buffer.bytes)
    if layout not in ("x-packed", "interleaved"):
        view[...] = elements
        return
    blocks, size, heads, elements_of_head = elements.shape
    x = view.shape[-1]
    if is_key:
        packs = elements.reshape(blocks, size, heads, elements_of_head // x, x)
        view[...] = packs.transpose(0, 2, 3, 1, 4)
    elif layout == "interleaved":
        packs = elements.reshape(blocks, size // x, x, heads, elements_of_head)
        view[...] = packs.transpose(0, 3, 1, 4, 2)
    else:
        view[...] = elements.transpose(0, 2, 3, 1)


class Problem:
    """Arguments of one call.

    Parameters
    ----------
    rng : numpy.random.Generator
    lengths : sequence of int
        Tokens of each sequence; what is out of range stands in the array as it is.
    queries : sequence of int, optional
        Rows of each sequence; None: one each, without query_start_loc.
    heads : (query heads, KV heads)
    sizes : (of keys, of values)
    scales : "number", "array", "heads" or "tokens": one for each token and head
    types : of table, lengths and starts
    width : of the table; by default what the lengths need
    spare : rows of the query behind those of all sequences, and further ones of the results
    bad : {(sequence, page): block number}
    lse : None, "rows" or "heads first"
    slopes : True, of all sequences; "sequences", of each
    sinks : None or a dtype
    storage : dtype of the arrays of 8-bit caches; by default one of those that may be
    scale, sliding_window, soft_cap, causal, kv_cache_dtype : as of `paged_attention`
    """

    op = "paged_attention"

    def __init__(
        self, rng, lengths, queries=None, *, heads=(4, 2), sizes=(32, 32), block_size=16,
        layout="NHD", dtype="bfloat16", kv_cache_dtype="auto", scales="number",
        types=("int32", "int32", "int32"), width=None, spare=0, bad=None, lse="rows",
        slopes=False, sinks=None, scale=None, sliding_window=None, soft_cap=None, causal=True,
        pad=0, strided=False, storage=None,
    ):  # fmt: skip
        self.rng, self.dtype = rng, dtype
        self.stored = (TOKEN_SCALED if scales == "tokens" else STORED).get(kv_cache_dtype)
        if storage is None and self.stored:
            storage = str(rng.choice(["uint8", self.stored]))
        self.storage = storage or dtype
        counts = np.ones(len(lengths), int) if queries is None else np.array(queries, int)
        tokens = int(counts.sum()) + (spare if queries is not None else 0)
        numbers = [int(n) for n in lengths]
        if width is None:
            width = max([1, *(-(-n // block_size) for n in numbers if 0 <= n < 2**20)])
        self.block_size = block_size

        # A block for each page that could be needed, in random order, and some more.
        num_blocks = len(numbers) * width + 2
        table = rng.permutation(num_blocks)[: len(numbers) * width].reshape(len(numbers), width)
        for place, block in (bad or {}).items():
            table[place] = block
        starts = np.concatenate([[0], np.cumsum(counts)])
        lens = np.array(numbers, types[1])
        self.seen, self.faults = oracle.tokens_seen(
            table, lens, starts, tokens, num_blocks, block_size, sliding_window, causal
        )
        used = np.zeros((num_blocks, block_size), bool)
        needed = np.zeros(table.shape, bool)
        for sequence, _, found in self.seen.values():
            for token, block, offset in found:
                used[block, offset] = needed[sequence, token // block_size] = True
        for place in bad or {}:
            needed[place] = True
        table[~needed] = UNUSED

        self.options = {
            name: value
            for name, value in (
                ("scale", scale), ("sliding_window", sliding_window), ("soft_cap", soft_cap),
            )
            if value is not None
        } | ({} if causal else {"causal": False})  # fmt: skip
        if kv_cache_dtype != "auto":
            self.options["kv_cache_dtype"] = kv_cache_dtype
        self.query = self._query(tokens, heads[0], sizes[0], pad, strided)
        self._make_caches(layout, num_blocks, heads[1], sizes, used, pad, scales)
        self.table = worlds.of_values(table.astype(types[0]))
        self.lens = worlds.of_values(lens)
        self.starts = None if queries is None else worlds.of_values(starts.astype(types[2]))
        self.slopes = self.sinks = self.lse = None
        if slopes:
            shape = heads[0]
            if slopes == "sequences":  # in memory head by head, and one row more
                shape = heads[0], len(numbers) + 1
            self.slopes = worlds.of_values(rng.uniform(-0.5, 0.5, shape).astype(np.float32))
            if slopes == "sequences":
                self.slopes = self.slopes.permuted(1, 0)
        if sinks:
            kind = formats.DTYPES[sinks].numpy
            self.sinks = worlds.of_values(rng.standard_normal(heads[0]).astype(kind))
        self.out = worlds.array(
            rng, (tokens + 1, heads[0] + strided, sizes[1] + 8 * strided), dtype
        )
        self.out = self.out[: tokens + spare, : heads[0], : sizes[1]]
        if lse == "rows":
            self.lse = worlds.array(rng, (tokens + 1, heads[0]), "float32")[:tokens]
        elif lse:
            self.lse = worlds.array(rng, (heads[0], tokens), "float32").permuted(1, 0)

    def _query(self, tokens, heads, size, pad, strided):
        spec = worlds.array(
            self.rng, (tokens, heads + 2 * strided, size + 8 * strided), self.dtype, pad
        )
        spec = spec[:, strided : heads + strided, :size]
        spec.on(spec.buffer.bytes)[...] = self.rng.standard_normal(spec.shape)
        return spec

    def _make_caches(self, layout, num_blocks, heads, sizes, used, pad, scales):
        rng, stored = self.rng, self.stored
        kind = formats.DTYPES[stored or self.dtype].numpy
        self.caches = caches(
            rng, layout, num_blocks, self.block_size, heads, sizes, self.storage, pad
        )
        self.scales, self.numbers = {}, []
        for name, spec, size in zip(("k_scale", "v_scale"), self.caches, sizes):
            values = rng.standard_normal((num_blocks, self.block_size, heads, size))
            scale = np.ones(1, np.float32)
            if stored is not None and scales == "tokens":
                scale = self._token_scales(name, values, used)
                values = values / scale[..., np.newaxis]
                if stored == "int8":
                    values = np.rint(values)
            elif stored is not None:
                scale = rng.uniform(0.02, 0.05, heads if scales == "heads" else 1)
                scale = scale.astype(np.float32)
                self.scales[name] = float(scale[0])
                if scales != "number":
                    shape = () if rng.random() < 0.5 and len(scale) == 1 else scale.shape
                    self.scales[name] = worlds.of_values(scale).buffer.view(shape, "float32")
                values = values / scale[:, np.newaxis]
                if stored == "int8":
                    values = np.clip(np.rint(values), -128, 127)
            elements = values.astype(kind)
            elements[~used] = -128 if stored == "int8" else np.nan
            bits = formats.DTYPES[self.storage].numpy
            fill(spec, elements.view(bits), layout, name == "k_scale")
            self.numbers.append(
                elements.astype(np.float64) * scale[..., np.newaxis].astype(np.float64)
            )

    def _token_scales(self, name, values, used):
        """Scales [block, offset, head] of ``values`` [block, offset, head, element], which are
        made larger and smaller by orders of magnitude. Unused ones are garbage."""
        rng = self.rng
        if name == "v_scale":
            values *= 10 ** rng.uniform(-3, 1, (*values.shape[:3], 1))
        largest = 127 if self.stored == "int8" else 448
        scale = np.maximum(np.abs(values).max(axis=-1) / largest, 1e-6).astype(np.float32)
        shape = [*scale.shape, 3]  # a page has something else between scales
        order = [0, *(1 + rng.permutation(2)), 3]
        page = worlds.array(rng, [shape[axis] for axis in order], "float32")
        spec = page.permuted(*np.argsort(order))[..., int(rng.integers(3))]
        if rng.random() < 0.5:
            spec = worlds.array(rng, scale.shape, "float32")
        self.scales[f"{name}_cache"] = spec
        garbage = np.array([np.nan, np.inf, -np.inf, 3e38, 0], np.float32)
        shown = np.where(used[..., np.newaxis], scale, rng.choice(garbage, scale.shape))
        spec.on(spec.buffer.bytes)[...] = shown
        return scale

    # --- running

    @property
    def specs(self):
        return [
            self.query, *self.caches, self.table, self.lens, self.starts, self.slopes, self.sinks,
            *(s for s in self.scales.values() if isinstance(s, worlds.Spec)), self.out, self.lse,
        ]  # fmt: skip

    def run(self, world, **changes):
        """Call `paged_attention`; ``changes`` are further keyword arguments, or others."""
        named = {
            "query_start_loc": self.starts, "alibi_slopes": self.slopes, "sinks": self.sinks,
            "out": self.out, "lse": self.lse, **self.scales, **self.options, **changes,
        }  # fmt: skip
        put = {n: world.put(v) if isinstance(v, worlds.Spec) else v for n, v in named.items()}
        where = (self.query, *self.caches, self.table, self.lens)
        return cc.paged_attention(*map(world.put, where), **put)

    def solve(self, world):
        """Run, and judge all there is to judge."""
        if world.on_gpu and self.dtype == "float32":  # a warp's products take 16-bit factors
            words = "query: expected float16 or bfloat16, got float32;", "use gather_cache"
            self.refused(world, cc.DTypeError, *words)
            return
        self.run(world)
        check_faults(self.op, self.faults)
        self.judge(world)

    def refused(self, world, error, *words, **changes):
        """Require a call to be refused in these words, with nothing written. ``changes`` are
        further keyword arguments, or others."""
        with pytest.raises(error) as caught:
            self.run(world, **changes)
        assert issubclass(error, cc.CupyCacheError)
        for word in (f"{self.op}: Invalid", *words):
            assert word in str(caught.value)
        for spec in filter(None, self.specs):
            self._check_bytes(world, spec, [])

    def judge(self, world):
        """Compare what is in the memory of ``world`` with what must be there."""
        exact = self.exact()
        rows = sorted(exact)
        for spec in self.specs:
            if spec is not None:
                self._check_bytes(world, spec, rows if spec in (self.out, self.lse) else [])
        if not rows:
            return
        got = self.out.on(world.bytes_of(self.out))[rows].astype(np.float64)
        wanted = np.stack([exact[row][0] for row in rows])
        # NumPy's products of float32 once told of an invalid value, and not when the same numbers
        # were multiplied again. A NaN in the result is seen by the comparison.
        with np.errstate(invalid="ignore"):
            plain = np.stack([self._plain(row) for row in rows])
        check_numbers(got, wanted, plain, self.dtype)
        nothing = [at for at, row in enumerate(rows) if not self.seen[row][2]]
        assert not got[nothing].any()
        if self.lse is not None:
            got = self.lse.on(world.bytes_of(self.lse))[rows]
            wanted = np.stack([exact[row][1] for row in rows])
            np.testing.assert_array_equal(np.isneginf(got), np.isneginf(wanted))
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-4)

    def _check_bytes(self, world, spec, rows):
        """Nothing but these rows of a view was written."""
        got, expected = world.bytes_of(spec), spec.buffer.bytes.copy()
        if rows:
            size = formats.DTYPES[spec.dtype].bytes
            bits = worlds.Spec(
                spec.buffer, spec.offset, spec.shape, spec.strides, f"uint{8 * size}"
            )
            bits.on(expected)[rows] = bits.on(got)[rows]
        np.testing.assert_array_equal(got, expected)

    # --- what is right

    def _values(self, spec):
        return None if spec is None else spec.on(spec.buffer.bytes).astype(np.float64)

    def exact(self):
        """{row: (attended, logarithms)}."""
        return oracle.paged_attention(
            self._values(self.query), *self.numbers, self.seen,
            scale=self.options.get("scale"), soft_cap=self.options.get("soft_cap"),
            alibi_slopes=self._values(self.slopes), sinks=self._values(self.sinks),
        )  # fmt: skip

    def _plain(self, row):
        """A row's result where everything is rounded to the dtype of the query."""
        kind = formats.DTYPES[self.dtype].numpy
        largest = float(ml_dtypes.finfo(kind).max)  # which products of float16 may exceed

        def rounded(values):
            return np.clip(values, -largest, largest).astype(kind).astype(np.float32)

        query, slopes, sinks = map(self._values, (self.query, self.slopes, self.sinks))
        sequence, position, tokens = self.seen[row]
        if slopes is not None and slopes.ndim == 2:
            slopes = slopes[sequence]
        heads, scale = query.shape[1], self.options.get("scale", 1 / math.sqrt(query.shape[2]))
        keys, values = (rounded(numbers) for numbers in self.numbers)
        group = heads // keys.shape[2]
        result = np.zeros((heads, values.shape[3]))
        if not tokens:
            return result
        token, block, offset = np.array(tokens).T
        for head in range(heads):
            one = keys[block, offset, head // group]
            logits = rounded(rounded(one @ query[row, head].astype(np.float32)) * np.float32(scale))
            cap = self.options.get("soft_cap")
            if cap is not None:
                logits = rounded(cap * rounded(np.tanh(rounded(logits / np.float32(cap)))))
            if slopes is not None:
                logits = rounded(logits + rounded(slopes[head] * (token - position)))
            if sinks is not None:
                logits = np.append(logits, rounded(sinks[head]))
            weights = np.exp(logits - logits.max())
            weights = rounded(weights / weights.sum())[: len(token)]
            result[head] = rounded(weights @ values[block, offset, head // group])
        return result


class Latent(Problem):
    """Arguments of one call of `paged_attention_mla`: ``sizes`` are those of an entry and of its
    latent part. Further parameters are as of `Problem`."""

    op = "paged_attention_mla"

    def __init__(self, rng, lengths, queries=None, *, heads=4, sizes=(48, 32), **named):
        self.rank = sizes[1]
        named = {"scale": 0.2, **named}
        super().__init__(rng, lengths, queries, heads=(heads, 1), sizes=sizes, **named)

    def _make_caches(self, layout, num_blocks, heads, sizes, used, pad, scales):
        rng, size = self.rng, self.block_size
        values = rng.standard_normal((num_blocks, size, sizes[0]))
        self.scales = {}
        if self.options.get("kv_cache_dtype") == "fp8_ds_mla":
            elements, numbers = self._entries(values)
            self.storage = str(rng.choice(["uint8", "float8_e4m3fn"]))
        else:
            elements, numbers = self._elements(values, scales)
        elements[~used] = 0xFF if self.stored != "int8" else 0x80
        shape = num_blocks, size, elements.shape[2] // formats.DTYPES[self.storage].bytes
        if layout == "gaps":  # a layer of a pool, with something else between entries
            pool = worlds.array(rng, (num_blocks, 3, size, shape[2] + 8), self.storage, pad)
            cache = pool[:, 1, :, 8:]
        else:
            cache = worlds.array(rng, shape, self.storage, pad)
        view = cache.on(cache.buffer.bytes)
        view[...] = elements.view(formats.DTYPES[self.storage].numpy)
        self.caches = [cache]
        numbers = numbers[:, :, np.newaxis]
        numbers[~used] = np.nan
        self.numbers = [numbers, numbers[..., : self.rank]]

    def _elements(self, values, scales):
        """Bytes of elements of one type, and what they mean."""
        scale = np.float32(1)
        if self.stored is not None:
            scale = np.float32(self.rng.uniform(0.02, 0.05))
            self.scales["kv_scale"] = float(scale)
            if scales != "number":
                shape = () if self.rng.random() < 0.5 else (1,)
                array = worlds.of_values(np.array([scale]))
                self.scales["kv_scale"] = array.buffer.view(shape, "float32")
            values = values / scale
            if self.stored == "int8":
                values = np.clip(np.rint(values), -128, 127)
        elements = values.astype(formats.DTYPES[self.stored or self.dtype].numpy)
        return elements.view(np.uint8), elements.astype(np.float64) * float(scale)

    def _entries(self, values):
        """Bytes of fp8_ds_mla entries, of scales that differ by much, and what they mean."""
        blocks, size, _ = values.shape
        scales = np.exp2(self.rng.integers(-20, 4, (blocks, size, 4))).astype(np.float32)
        scales *= self.rng.uniform(1, 2, scales.shape).astype(np.float32)
        latent = np.clip(values[..., :512] * 100, -448, 448)  # more is NaN there
        latent = latent.astype(formats.DTYPES["float8_e4m3fn"].numpy)
        rope = values[..., 512:].astype(formats.DTYPES[self.dtype].numpy)
        entries = np.concatenate(
            [latent.view(np.uint8), scales.view(np.uint8), rope.view(np.uint8)], axis=2
        )
        latent = latent.astype(np.float64).reshape(blocks, size, 4, 128) * scales[..., np.newaxis]
        return entries, np.concatenate(
            [latent.reshape(blocks, size, 512), rope.astype(np.float64)], axis=2
        )

    def run(self, world, **changes):
        """Call `paged_attention_mla`; ``changes`` are further keyword arguments, or others."""
        named = {
            "kv_lora_rank": self.rank, "query_start_loc": self.starts, "out": self.out,
            "lse": self.lse, **self.scales, **self.options, **changes,
        }  # fmt: skip
        put = {n: world.put(v) if isinstance(v, worlds.Spec) else v for n, v in named.items()}
        where = (self.query, *self.caches, self.table, self.lens)
        return cc.paged_attention_mla(*map(world.put, where), **put)


def with_starts(kind, rng, starts, lengths, rows, causal=True, **named):
    """A problem of this kind whose starts are these, whatever they are, for so many rows of the
    query."""
    whole = kind(rng, [48] * len(lengths), [48] * len(lengths), lse=None, **named)
    step = kind(rng, lengths, [rows, *[0] * (len(lengths) - 1)], causal=causal, **named)
    # Caches that hold numbers throughout.
    step.caches, step.numbers, step.table = whole.caches, whole.numbers, whole.table
    step.starts = worlds.of_values(np.array(starts, np.int64))
    table, lens = (spec.on(spec.buffer.bytes) for spec in (step.table, step.lens))
    step.seen, step.faults = oracle.tokens_seen(
        table, lens, starts, rows, len(step.numbers[0]), 16, causal=causal
    )
    return step


ODD_STARTS = (
    [-3, 2, 5], [0, 2, 99], [2, 3, 4], [7, 9, 20], [8, 9, 9], [-9, -4, 0], [0, 2, 2**63 - 1],
    [-(2**63), 1, 5], [4, 1, 5], [0, 5, 1], [5, 3, 1],
)  # fmt: skip


def garbage_starts(rng):
    """(Starts, lengths, rows of the query), of sequences of which some have more rows than are
    taken together, and of many."""
    for count, rows in ((1, 7), (4, 90), (9, 50), (150, 40)):
        for kind in range(3):
            starts = np.sort(rng.integers(0, rows + 1, count + 1))
            odd = rng.random(count + 1) < (0.3, 0.05, 1)[kind]
            wild = rng.choice([*BAD, *range(-3, rows + 3)], count + 1)
            starts[odd] = wild[odd]
            yield starts, rng.integers(0, 49, count), rows


def check_numbers(got, wanted, plain, dtype):
    """Require errors of at most twice those of the plain computation, but for the last bit."""
    assert np.isfinite(got).all()
    allowed = 2 * np.abs(plain - wanted).max(initial=0)
    # Of few numbers the plain computation's error may be small by chance.
    places = 16 if dtype == "float32" else 1
    eps = float(ml_dtypes.finfo(formats.DTYPES[dtype].numpy).eps)
    allowed += places * eps * np.abs(wanted).max(initial=0)
    assert np.abs(got - wanted).max(initial=0) <= allowed


# Where a logit is made no number, and of what.
NOT_FINITE = (("query", np.nan), ("query", np.inf), ("key", np.nan))


def check_not_finite(problem, world, where, number):
    """Put ``number``, of which a logit cannot be a number, where the query or the key of the first
    sequence has its first element, and require NaN of the heads that read it; of one query for each
    sequence, others as ever."""
    _, _, ((_, block, offset), *_) = problem.seen[0]
    spec, at, heads = problem.query, (0, 0, 0), 1
    if where == "key":
        spec, kv_heads = problem.caches[0], problem.numbers[0].shape[2]
        at = (block, offset, *(0,) * (len(spec.shape) - 2))
        heads = problem.query.shape[1] // kv_heads
    spec.on(spec.buffer.bytes)[at] = number
    problem.run(world)
    out, lse = (s.on(world.bytes_of(s)).astype(np.float64) for s in (problem.out, problem.lse))
    assert np.isnan(out[0, :heads]).all() and np.isnan(lse[0, :heads]).all()
    for row, (attended, logarithms) in problem.exact().items():
        first = heads if row == 0 else 0
        np.testing.assert_allclose(out[row, first:], attended[first:], rtol=0.05, atol=0.05)
        np.testing.assert_allclose(lse[row, first:], logarithms[first:], rtol=0.05, atol=0.05)
