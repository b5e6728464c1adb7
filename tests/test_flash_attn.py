# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""`cupy_cache.flash_attn`, compared with loops over whole sequences without pages."""

import contextlib
import inspect
import math

import numpy as np
import pytest
import recording
import worlds
from guards import check_faults

import cupy_cache as cc
from cupy_cache import flash_attn
from cupy_cache.runtime import faults

whole_arrays = pytest.mark.parametrize(
    "world",
    [
        "numpy",
        "torch-cpu",
        pytest.param("cupy", marks=pytest.mark.gpu),
        pytest.param("torch-cuda", marks=pytest.mark.gpu),
    ],
    indirect=True,
)

# Of flash-attn 2.8.
WITH_KVCACHE = {
    "q": None, "k_cache": None, "v_cache": None, "k": None, "v": None, "rotary_cos": None,
    "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None,
    "block_table": None, "softmax_scale": None, "causal": False, "window_size": (-1, -1),
    "softcap": 0.0, "rotary_interleaved": True, "alibi_slopes": None, "num_splits": 0,
    "return_softmax_lse": False,
}  # fmt: skip
VARLEN = {
    "q": None, "k": None, "v": None, "cu_seqlens_q": None, "cu_seqlens_k": None,
    "max_seqlen_q": None, "max_seqlen_k": None, "dropout_p": 0.0, "softmax_scale": None,
    "causal": False, "window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None,
    "deterministic": False, "return_attn_probs": False, "block_table": None,
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize(
    "function, expected",
    [
        (flash_attn.flash_attn_with_kvcache, WITH_KVCACHE),
        (flash_attn.flash_attn_varlen_func, VARLEN),
    ],
)
def test_names_and_order(function, expected):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == list(expected)
    for name, parameter in parameters.items():
        assert parameter.default in (parameter.empty, expected[name])


def attention(q, k, v, causal, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """FlashAttention's definition for one sequence, by loops in float64: (attended [query, head,
    element], logarithms [head, query])."""
    queries, heads, size = q.shape
    tokens, kv_heads, _ = k.shape
    left, right = window
    if causal:
        right = 0
    out = np.zeros((queries, heads, v.shape[2]))
    lse = np.full((heads, queries), -math.inf)
    for i in range(queries):
        for head in range(heads):
            of, logits = head * kv_heads // heads, {}
            position = i + tokens - queries
            for j in range(tokens):
                if (right >= 0 and j > position + right) or (left >= 0 and j < position - left):
                    continue
                s = float(q[i, head] @ k[j, of]) * (size**-0.5 if scale is None else scale)
                if softcap:
                    s = softcap * math.tanh(s / softcap)
                if slopes is not None:
                    s -= slopes[head] * abs(position - j)
                logits[j] = s
            if logits:
                largest = max(logits.values())
                total = sum(math.exp(s - largest) for s in logits.values())
                lse[head, i] = largest + math.log(total)
                for j, s in logits.items():
                    out[i, head] += math.exp(s - largest) / total * v[j, of]
    return out, lse


class Case:
    """A batch: ``k`` and ``v`` hold each sequence's tokens, in ``pages`` as far as they are not
    added. ``paged`` False: caches are [batch, 40, ...]."""

    def __init__(
        self, world, rng, lengths, queries, added=0, paged=True, sizes=(16, 8), block_size=5
    ):
        self.rng, self.lengths, self.added = rng, np.array(lengths), added
        # Of the query and what it sees. A GPU's kernel takes none of 32 bits.
        self.dtype = np.float16 if world.on_gpu else np.float32
        self.allowed = dict.fromkeys(("rtol", "atol"), 4e-3 if world.on_gpu else 1e-5)
        self.block_size = block_size if paged else 40
        batch, width = len(lengths), 8 if paged else 1
        blocks = batch * width + 2
        table = rng.permutation(blocks)[: batch * width].reshape(batch, width)
        self.table = table.astype(np.int32)
        self.q = rng.standard_normal((batch, queries, 4, sizes[0])).astype(self.dtype)
        total = self.lengths + added
        self.k, self.v = (
            [rng.standard_normal((n, 2, size)).astype(self.dtype) for n in total] for size in sizes
        )
        self.caches = [
            np.full((blocks, self.block_size, 2, size), np.nan, self.dtype) for size in sizes
        ]
        self.put_in(self.caches, self.lengths)
        self.new = [
            np.array([x[n:] for x, n in zip(xs, self.lengths)]).reshape(batch, added, 2, size)
            for xs, size in zip((self.k, self.v), sizes)
        ]

    def put_in(self, caches, lengths):
        for tokens, cache in zip((self.k, self.v), caches):
            for b, length in enumerate(lengths):
                for j in range(length):
                    place = self.table[b, j // self.block_size], j % self.block_size
                    cache[place] = tokens[b][j]

    def check(self, world, specs, result, lse, causal, **options):
        out = world.numpy(result)
        for b in range(len(self.lengths)):
            given = (x[b].astype(np.float64) for x in (self.q, self.k, self.v))
            also = dict(options)
            if np.ndim(also.get("slopes")) == 2:
                also["slopes"] = also["slopes"][b]
            wanted, wanted_lse = attention(*given, causal, **also)
            np.testing.assert_allclose(out[b], wanted, **self.allowed)
            if lse is not None:
                # As documented: [batch, heads, queries], float32.
                assert world.numpy(lse).shape == (len(self.lengths), 4, self.q.shape[1])
                assert world.numpy(lse).dtype == np.float32
                np.testing.assert_allclose(world.numpy(lse)[b], wanted_lse, rtol=1e-5, atol=1e-5)
        full = [cache.copy() for cache in self.caches]
        self.put_in(full, self.lengths + self.added)
        for spec, cache in zip(specs, full):
            np.testing.assert_array_equal(spec.on(world.bytes_of(spec)), cache)

    def specs(self):
        return [worlds.of_values(cache) for cache in self.caches]


@whole_arrays
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("queries, added", [(1, 0), (1, 1), (3, 3), (4, 0), (2, 5)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_with_kvcache(world, rng, queries, added, causal, paged, lse):
    case = Case(world, rng, [9, 0, 20, 31], queries, added, paged)
    specs = case.specs()
    put = [world.put(worlds.of_values(x)) for x in (case.q, case.table, case.lengths)]
    new = [world.put(worlds.of_values(x)) for x in case.new] if added else (None, None)
    where = {"block_table": put[1]}
    if not paged:
        where = {"cache_batch_idx": put[1].reshape(-1)}
    result = flash_attn.flash_attn_with_kvcache(
        put[0], *map(world.put, specs), *new, cache_seqlens=put[2], causal=causal,
        return_softmax_lse=lse, **where,
    )  # fmt: skip
    result, logarithms = result if lse else (result, None)
    case.check(world, specs, result, logarithms, causal)


@whole_arrays
@pytest.mark.parametrize(
    "causal, options, also",
    [
        (True, {"window_size": (4, 0)}, {"window": (4, 0)}),
        (True, {"window_size": (4, -1)}, {"window": (4, 0)}),
        (False, {"window_size": (4, -1)}, {"window": (4, -1)}),
        (False, {"window_size": (4, 0)}, {"window": (4, 0)}),
        (False, {"window_size": (-1, 0)}, {"window": (-1, 0)}),
        (True, {"window_size": [0, 0]}, {"window": (0, 0)}),
        (True, {"window_size": (2**63 - 1, 0)}, {}),
        (True, {"window_size": (np.int64(4), np.int32(0))}, {"window": (4, 0)}),
        (True, {"softcap": 2.0, "softmax_scale": 0.7}, {"softcap": 2.0, "scale": 0.7}),
    ],
)
def test_options(world, rng, causal, options, also):
    case = Case(world, rng, [9, 3, 20], 3)
    put = [world.put(worlds.of_values(x)) for x in (case.q, *case.caches, case.table)]
    result, lse = flash_attn.flash_attn_with_kvcache(
        *put[:3], cache_seqlens=world.put(worlds.of_values(case.lengths)), block_table=put[3],
        causal=causal, return_softmax_lse=True, num_splits=7, rotary_interleaved=False, **options,
    )  # fmt: skip
    case.check(world, (), result, lse, causal, **also)


@whole_arrays
@pytest.mark.parametrize("causal, queries", [(True, 3), (True, 1), (False, 1)])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_slopes(world, rng, causal, queries, shape):
    """Of all sequences, and of each."""
    case, slopes = Case(world, rng, [9, 3, 20], queries), rng.uniform(0, 1, shape)
    slopes = slopes.astype(np.float32)
    put = [world.put(worlds.of_values(x)) for x in (case.q, *case.caches, case.table)]
    result = flash_attn.flash_attn_with_kvcache(
        *put[:3], cache_seqlens=world.put(worlds.of_values(case.lengths)), block_table=put[3],
        causal=causal, alibi_slopes=world.put(worlds.of_values(slopes)),
    )  # fmt: skip
    case.check(world, (), result, None, causal, slopes=slopes)


@whole_arrays
@pytest.mark.parametrize("given", ["number", "nothing"])
def test_one_length(world, rng, given):
    """Of all sequences: a number, or all there is."""
    length = 12 if given == "number" else 40
    case = Case(world, rng, [length] * 3, 2)
    put = [world.put(worlds.of_values(x)) for x in (case.q, *case.caches, case.table)]
    lengths = {"cache_seqlens": length} if given == "number" else {}
    result = flash_attn.flash_attn_with_kvcache(*put[:3], block_table=put[3], **lengths)
    case.check(world, (), result, None, False)


@whole_arrays
def test_caches_in_order(world, rng):
    """Neither a table nor rows: each sequence's cache is at its place."""
    case = Case(world, rng, [9, 3, 20], 2, paged=False)
    put = [world.put(worlds.of_values(case.q))]
    put += [world.put(worlds.of_values(cache[case.table[:, 0]])) for cache in case.caches]
    lengths = world.put(worlds.of_values(case.lengths))
    result = flash_attn.flash_attn_with_kvcache(*put, cache_seqlens=lengths, causal=True)
    case.check(world, (), result, None, True)


@whole_arrays
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("slopes", [None, (4,), (4, 4)])
def test_varlen(world, rng, causal, paged, lse, slopes):
    if slopes is not None and not causal:
        slopes = None  # refused
    if slopes is not None:
        slopes = rng.uniform(0, 1, slopes).astype(np.float32)
    case, counts = Case(world, rng, [9, 0, 20, 3], 1), [4, 2, 0, 3]
    queries = [rng.standard_normal((n, 4, 16)).astype(case.dtype) for n in counts]
    bounds = [np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (counts, case.lengths)]
    keys, values = case.caches if paged else map(np.concatenate, (case.k, case.v))
    put = [world.put(worlds.of_values(x)) for x in (np.concatenate(queries), keys, values, *bounds)]
    table = {"block_table": world.put(worlds.of_values(case.table))} if paged else {}
    given = None if slopes is None else world.put(worlds.of_values(slopes))
    result = flash_attn.flash_attn_varlen_func(
        *put, max(counts), 20, causal=causal, alibi_slopes=given, return_attn_probs=lse, **table
    )
    if lse:
        result, logarithms, nothing = result
        assert nothing is None
    for b, q in enumerate(queries):
        rows = slice(bounds[0][b], bounds[0][b + 1])
        given = (x.astype(np.float64) for x in (q, case.k[b], case.v[b]))
        own = slopes if np.ndim(slopes) < 2 else slopes[b]
        wanted, wanted_lse = attention(*given, causal, slopes=own)
        np.testing.assert_allclose(world.numpy(result)[rows], wanted, **case.allowed)
        if lse:
            # As documented: [heads, all queries], float32.
            assert world.numpy(logarithms).shape == (4, sum(counts))
            assert world.numpy(logarithms).dtype == np.float32
            got = world.numpy(logarithms)[:, rows]
            np.testing.assert_allclose(got, wanted_lse, rtol=1e-5, atol=1e-5)


@whole_arrays
def test_varlen_without_keys(world, rng):
    """What attends to nothing is 0."""
    query = rng.standard_normal((3, 4, 16)).astype(np.float16)
    none = np.zeros((0, 2, 16), np.float16)
    bounds = [np.array(ends, np.int32) for ends in ((0, 2, 3), (0, 0, 0))]
    put = [world.put(worlds.of_values(x)) for x in (query, none, none, *bounds)]
    found = world.numpy(flash_attn.flash_attn_varlen_func(*put, 2, 0))
    assert found.shape == query.shape and not found.any()


@whole_arrays
def test_no_room_for_what_is_added(world, rng):
    """Tokens behind the last page are left out, and recorded."""
    case = Case(world, rng, [39, 3], 1, 2)
    arrays = case.q, *case.caches, *case.new
    put = [world.put(worlds.of_values(x)) for x in (*arrays, case.table, case.lengths)]
    flash_attn.flash_attn_with_kvcache(*put[:5], cache_seqlens=put[6], block_table=put[5])
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    found = {(f.op, f.argument, f.row, f.value) for f in caught.value.faults}
    assert found == {("slot_mapping", "positions", 1, 40), ("paged_attention", "seq_lens", 0, 41)}
    check_faults("", ())


@whole_arrays
@pytest.mark.parametrize(
    "dtype, sizes, heads",
    [("float32", (16, 16), 4), ("float16", (16, 528), 4), ("float16", (16, 16), 0)],
)
def test_nothing_is_added_where_there_is_no_attention(world, rng, dtype, sizes, heads):
    """To what a GPU's kernel does not take, and to no heads."""
    taken = heads and not world.on_gpu

    def put(*shape):
        return worlds.of_values(np.ones(shape, dtype))

    specs = [put(2, 1, heads, 16), *(put(6, 4, 2, size) for size in sizes)]
    specs += [put(2, 1, 2, size) for size in sizes]
    specs.append(worlds.of_values(np.array([[0, 1], [2, 3]], np.int32)))
    for spec in specs[3:5]:
        spec.on(spec.buffer.bytes)[...] = 2
    q, *caches, k, v, table = map(world.put, specs)
    lengths = world.put(worlds.of_values(np.array([1, 2], np.int32)))
    arguments = q, *caches, k, v, None, None, lengths
    if taken:
        flash_attn.flash_attn_with_kvcache(*arguments, block_table=table)
        return
    with pytest.raises(cc.CupyCacheError, match="flash_attn_with_kvcache: Invalid"):
        flash_attn.flash_attn_with_kvcache(*arguments, block_table=table)
    for spec in specs[1:3]:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)


class TestRefusals:
    def call(self, rng, **changes):
        case = Case(worlds.NumPyWorld(), rng, [9, 3], 2, 1)
        named = {
            "q": case.q, "k_cache": case.caches[0], "v_cache": case.caches[1], "k": case.new[0],
            "v": case.new[1], "cache_seqlens": case.lengths, "block_table": case.table, **changes,
        }  # fmt: skip
        before = [cache.copy() for cache in case.caches]
        try:
            flash_attn.flash_attn_with_kvcache(**named)
        finally:
            for cache, was in zip(case.caches, before):
                np.testing.assert_array_equal(cache, was)

    @pytest.mark.parametrize(
        "name, value",
        [
            ("rotary_cos", np.ones((40, 4), np.float32)),
            ("rotary_sin", np.ones((40, 4), np.float32)),
            ("cache_leftpad", np.zeros(2, np.int32)),
            ("cache_batch_idx", np.zeros(2, np.int32)),
            ("cache_seqlens", None),
            ("v", None),
            ("window_size", (-1, 2)),
            ("window_size", 3),
            ("window_size", (True, 0)),
            ("window_size", (4.0, 0)),
            ("window_size", (1, 2, 3)),
            ("alibi_slopes", np.ones(4, np.float32)),
            ("alibi_slopes", np.ones((2, 4), np.float32)),
            ("softcap", -1.0),
            ("softmax_scale", "1"),
            ("cache_seqlens", True),
            ("cache_seqlens", 2**31),
            ("causal", np.array([True, False])),
            ("softcap", np.array([1.0, 2.0])),
            ("softcap", 1e-60),
            ("return_softmax_lse", np.array([True, False])),
        ],
    )
    def test_values(self, rng, name, value):
        with pytest.raises(
            cc.ArgumentError, match=f"flash_attn_with_kvcache: Invalid value of {name}"
        ):
            self.call(rng, **{name: value})

    @pytest.mark.parametrize(
        "name, value, error",
        [
            ("q", np.ones((2, 2, 4, 15), np.float32), cc.ShapeError),
            ("q", np.ones((2, 2, 3, 16), np.float32), cc.ShapeError),
            ("q", np.ones((2, 2, 4, 16), np.float16), cc.DTypeError),
            ("q", np.ones((2, 4, 16), np.float32), cc.ShapeError),
            ("q", np.ones((2, 2, 4, 32), np.float32)[..., ::2], cc.StrideError),
            ("k", np.ones((3, 1, 2, 16), np.float32), cc.ShapeError),
            ("v", np.ones((2, 2, 2, 8), np.float32), cc.ShapeError),
            ("cache_seqlens", np.ones(3, np.int32), cc.ShapeError),
            ("cache_seqlens", np.ones(2, np.float32), cc.DTypeError),
            ("block_table", np.ones((3, 8), np.int32), cc.ShapeError),
            ("alibi_slopes", np.ones((3, 4), np.float32), cc.ShapeError),
            ("alibi_slopes", np.ones((1, 2, 4), np.float32), cc.ShapeError),
            ("alibi_slopes", np.zeros(17, np.uint8)[1:].view(np.float32), cc.StrideError),
            (
                "q",
                np.zeros(1025, np.uint8)[1:].view(np.float32).reshape(2, 2, 4, 16),
                cc.StrideError,
            ),
            ("block_table", np.ones((8, 2), np.int32).T, cc.StrideError),
            ("q", [1.0], cc.DTypeError),
            ("q", None, cc.DTypeError),
        ],
    )
    def test_arrays(self, rng, name, value, error):
        with pytest.raises(error, match="flash_attn_with_kvcache: Invalid|Invalid type of flash"):
            self.call(rng, **{name: value})

    def test_arrays_without_methods_of_their_own(self, rng):
        pytest.importorskip("torch")
        world = worlds.DLPackWorld()
        q = world.put(worlds.of_values(np.ones((2, 2, 4, 16), np.float32)))
        with pytest.raises(cc.DTypeError, match="an array of torch, CuPy or NumPy"):
            self.call(rng, q=q)

    def test_dropout(self, rng):
        rows, bounds = np.ones((3, 2, 16), np.float32), np.array([0, 3], np.int32)
        with pytest.raises(cc.ArgumentError, match=r"dropout_p: expected 0.0, got 0.1"):
            flash_attn.flash_attn_varlen_func(rows, rows, rows, bounds, bounds, 3, 3, 0.1)


@pytest.mark.whole
@pytest.mark.parametrize("call", [
    lambda rows, ends: flash_attn.flash_attn_with_kvcache(
        *(rows(1, n, 2, 8) for n in (2, 4, 4, 1, 1)), cache_seqlens=2, causal=True
    ),
    lambda rows, ends: flash_attn.flash_attn_varlen_func(
        *(rows(2, 2, 8) for _ in range(3)), ends, ends, 2, 2, return_attn_probs=True
    ),
])  # fmt: skip
def test_all_is_computed_on_the_arrays_gpu(monkeypatch, call):
    """Of CuPy's arrays, whichever GPU is current: what CuPy computes too."""

    class OnGPU(np.ndarray):
        def __array_finalize__(self, made_of):
            assert inside == [1] or made_of is None or type(made_of) is np.ndarray

    inside = recording.as_cupys_on_gpu_1(monkeypatch, OnGPU)
    ends = np.array([0, 2], np.int32).view(OnGPU)
    call(lambda *shape: np.ones(shape, np.float32).view(OnGPU), ends)
    assert inside == []


def test_debug_mode_writes_the_same(rng, monkeypatch):
    """One sequence is longer than its table: the other one's token is written before that is
    raised."""
    q, k, v = (rng.random((2, 1, 2, 8), np.float32) for _ in range(3))
    table, lengths = np.array([[3], [1]], np.int32), np.array([9, 2], np.int32)

    def caches_after():
        caches = np.zeros((2, 4, 4, 2, 8), np.float32)
        arguments = {"cache_seqlens": lengths, "block_table": table}
        with pytest.raises(cc.FaultError) as told:
            flash_attn.flash_attn_with_kvcache(q, *caches, k, v, **arguments)
            cc.raise_faults()
        assert {fault.row for fault in told.value.faults} == {0}
        with contextlib.suppress(cc.FaultError):
            cc.raise_faults()
        return caches

    expected = caches_after()
    assert (expected[:, 1, 2] == np.stack([k[1, 0], v[1, 0]])).all()
    monkeypatch.setattr(faults, "debug", True)
    assert (caches_after() == expected).all()
