# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""`PagedKVCache.gather`: keys and values in one launch."""

import attending
import hypothesis
import numpy as np
import oracle
import pytest
import worlds
from gathers import batches, check, sequences, typed

import cupy_cache as cc
from cupy_cache.ops import gather_both

NAME, BLOCKS = "PagedKVCache.gather", 4
# What the layouts of `attending.caches` are called where single tokens are read; else as NHD.
PACKED = {
    "x-packed": ("x-packed-key", "x-packed-value"),
    "interleaved": ("x-packed-key", "interleaved-value"),
}


def token_of(layout, side, cache, scale, stored, target):
    """``token(block, offset)`` of `oracle.gather_cache`: elements times ``scale``, a number, one
    for each head, or one for each token and head."""
    bits = cache.view(np.uint8) if stored else cache

    def token(block, offset):
        if layout in PACKED:
            entry = np.array(oracle.packed_token(bits, block, offset, PACKED[layout][side]))
        else:
            entry = bits[block, offset]
        if stored is None:
            return entry
        by = np.broadcast_to(scale[block, offset] if np.ndim(scale) == 3 else scale, len(entry))
        return [oracle.dequantise(row, one, stored, target) for row, one in zip(entry, by)]

    return token


def gather(world, specs, layout, kv_cache_dtype, scales, num_tokens=None, block_size=None):
    """``specs``: rows of keys and of values, table, bounds, starts, both caches. ``scales`` are
    numbers or specs. Two calls, of which the second finds all remembered."""
    stored = attending.STORED.get(kv_cache_dtype)
    *_, keys, values = specs
    put = [world.put(one) if isinstance(one, worlds.Spec) else one for one in scales]
    cache = cc.PagedKVCache([world.put(keys)], [world.put(values)], kv_cache_dtype, *put)

    def call(key_rows, value_rows, table, bounds, starts, *caches):
        out = key_rows, value_rows
        for _ in range(2):
            found = cache.gather(
                0, table, bounds, num_tokens=num_tokens, seq_starts=starts, out=out
            )
            assert found == out

    def expect(key_rows, value_rows, table, bounds, starts, *caches):
        faults = []
        for side, (rows, one) in enumerate(zip((key_rows, value_rows), caches)):
            scale = scales[side]
            if isinstance(scale, worlds.Spec):
                scale = scale.on(scale.buffer.bytes)
            faults += oracle.gather_cache(
                one, rows, table, bounds, starts, rows=num_tokens, block_size=block_size,
                token=token_of(layout, side, one, scale, stored, rows.dtype),
            )  # fmt: skip
        return faults

    check(world, specs, call, expect, NAME)


# layout, heads, head sizes, block size, kv_cache_dtype, dtype of rows, pad
CASES = (
    ("NHD", 4, (64, 64), 16, "auto", "bfloat16", 0),  # one code for both
    ("NHD", 3, (10, 7), 5, "auto", "float32", 4),
    ("HND", 2, (192, 128), 8, "auto", "float16", 0),
    ("packed-NHD", 2, (8, 24), 4, "fp8", "bfloat16", 8),
    ("packed-HND", 5, (16, 16), 8, "int8", "float32", 0),
    ("gaps", 2, (9, 4), 3, "fp8_e5m2", "float16", 1),
    ("x-packed", 2, (32, 32), 8, "auto", "bfloat16", 0),
    ("x-packed", 3, (16, 10), 4, "int8", "float32", 0),
    ("interleaved", 2, (16, 12), 32, "fp8", "float16", 0),
)


@pytest.mark.parametrize("layout, heads, sizes, block_size, kv_cache_dtype, dtype, pad", CASES)
@pytest.mark.parametrize("scaled_by", ["number", "array", "heads"])
@pytest.mark.parametrize("with_starts", [False, True])
def test_keys_and_values(
    world, rng, layout, heads, sizes, block_size, kv_cache_dtype, dtype, pad, scaled_by,
    with_starts,
):  # fmt: skip
    stored = attending.STORED.get(kv_cache_dtype)
    numbers = sequences(rng, 3, 2, block_size, BLOCKS, with_starts)
    count = int(numbers[1][-1])
    caches = attending.caches(
        rng, layout, BLOCKS, block_size, heads, sizes, "uint8" if stored else dtype, pad
    )
    for spec in caches if stored else ():  # no NaN: its bits are not defined
        view = spec.on(spec.buffer.bytes)
        view[...] = rng.integers(0, 0x7B, view.shape)
    scales = [None, None]
    if stored and scaled_by == "number":
        scales = [float(np.float32(10.0 ** rng.uniform(-3, 3))) for _ in "kv"]
    elif stored:
        number = 1 if scaled_by == "array" else heads
        scales = [
            worlds.of_values(np.float32(10.0 ** rng.uniform(-3, 3, number))) for _ in "kv"
        ]  # fmt: skip
    size = worlds.formats.DTYPES[dtype].bytes
    specs = (
        *(worlds.array(rng, (count + 2, heads, n), dtype, size * bool(pad)) for n in sizes),
        *typed(numbers, rng.choice(["int32", "int64"], 3)),
        *caches,
    )
    num_tokens = int(rng.choice([count, max(count - 1, 0), count + 2]))
    gather(
        world, specs, layout, kv_cache_dtype, scales, num_tokens,
        block_size if layout in PACKED else None,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["int8", "fp8_per_token_head"])
def test_scales_of_tokens_and_heads(world, rng, kind):
    """As `PagedKVCache.allocate` gives them; there with everything else, see its tests."""
    pages = [worlds.array(rng, (BLOCKS, 8, 2, size), "uint8") for size in (32, 24)]
    for spec in pages:
        spec.on(spec.buffer.bytes)[...] = rng.integers(0, 0x7B, spec.shape)
    scales = [worlds.of_values(np.float32(rng.uniform(0.1, 9, (BLOCKS, 8, 2)))) for _ in "kv"]
    numbers = typed(sequences(rng, 3, 2, 8, BLOCKS, True), ("int32",) * 3)
    rows = [worlds.array(rng, (48, 2, size), "bfloat16") for size in (32, 24)]
    specs = *rows, *numbers, *pages, *scales

    def call(*arrays):
        options = ("NHD", "NHD"), kind, True
        gather_both.OP(arrays, options, None, (0.0, 0.0, None))

    def expect(key_rows, value_rows, table, bounds, starts, *caches_and_scales):
        for side, out in enumerate((key_rows, value_rows)):
            cache, scale = caches_and_scales[side::2]
            stored = attending.TOKEN_SCALED[kind]
            token = token_of("NHD", side, cache, scale, stored, out.dtype)
            oracle.gather_cache(cache, out, table, bounds, starts, token=token)
        return []

    check(world, specs, call, expect, NAME)


# heads, sizes, kv_cache_dtype, dtype, block size, index types
POOL = (
    (2, (8, 8), "auto", "bfloat16", 4, "int64", "int64", "int64"),
    (3, (5, 2), "int8", "float32", 3, "int32", "int32", "int32"),
    (1, (16, 8), "fp8", "float16", 1, "int32", "int64", None),
)


@hypothesis.given(batch=batches(POOL))
def test_any_batch(emulated_world, batch):
    (heads, sizes, kv_cache_dtype, dtype, block_size, *_), num_blocks, *numbers, rows, seed = batch
    rng = np.random.default_rng(seed)
    world, stored = emulated_world(), kv_cache_dtype != "auto"
    try:
        caches = [
            worlds.array(rng, (num_blocks, block_size, heads, n), "uint8" if stored else dtype)
            for n in sizes
        ]
        for spec in caches if stored else ():
            view = spec.on(spec.buffer.bytes)
            view[...] = rng.integers(0, 0x7B, view.shape)
        specs = (
            *(worlds.array(rng, (rows, heads, n), dtype) for n in sizes),
            *(None if n is None else worlds.of_values(n) for n in numbers),
            *caches,
        )
        scales = [0.3, 2.0] if stored else [None, None]
        gather(world, specs, "NHD", kv_cache_dtype, scales, int(rng.integers(0, rows + 1)))
    finally:
        world.close()


def tensors(torch, dtype=None):
    dtype = dtype or torch.bfloat16
    caches = [torch.zeros(BLOCKS, 8, 2, size, dtype=dtype) for size in (64, 32)]
    out = [torch.zeros(6, 2, size, dtype=dtype) for size in (64, 32)]
    return caches, out, torch.zeros(2, 3, dtype=torch.int32), torch.tensor([0, 2, 6])


def test_one_launch(recorder):
    """For every layer, also where it is remembered; the layers share what is known of a call."""
    torch = pytest.importorskip("torch")
    caches, out, table, bounds = tensors(torch)
    others = [cache.clone() for cache in caches]
    cache = cc.PagedKVCache([caches[0], others[0]], [caches[1], others[1]])
    for layer in (0, 0, 0, 1, 1):
        cache.gather(layer, table, bounds, out=out)
        ((expression, (_, sides, _), *_),) = recorder.take()
        assert expression.startswith("cupy_cache::gather_both<") and sides == 2
    starts = torch.zeros(2, dtype=torch.int32)
    cache.gather(0, table, bounds, num_tokens=5, seq_starts=starts, out=out)
    assert len(recorder.take()) == 1
    cache.gather(0, table, bounds, num_tokens=0, out=out)
    assert not recorder.take()


@pytest.mark.gpu
def test_in_a_captured_graph(rng):
    """Replays read anew what the arrays hold."""
    torch = pytest.importorskip("torch")
    caches, out, table, bounds = ([one.cuda() for one in side] if isinstance(side, list)
                                  else side.cuda() for side in tensors(torch))  # fmt: skip
    cache = cc.PagedKVCache(*([one] for one in caches))
    cache.gather(0, table, bounds, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.gather(0, table, bounds, out=out)
    for _ in range(3):
        table.copy_(torch.from_numpy(rng.integers(0, BLOCKS, (2, 3)).astype(np.int32)))
        for one in caches:
            one.normal_()
        graph.replay()
        pages = table.tolist()
        places = [(pages[0][0], 0), (pages[0][0], 1), *((pages[1][0], at) for at in range(4))]
        for rows, one in zip(out, caches):
            assert all(torch.equal(row, one[place]) for row, place in zip(rows, places))
    cc.raise_faults()


class TestRefusals:
    @pytest.fixture
    def cache(self, rng):
        return cc.PagedKVCache(*([np.zeros((4, 4, 2, size), "f4")] for size in (8, 6)))

    def refused(self, cache, error, words, **changed):
        out = [np.full((5, 2, size), 7, "f4") for size in (8, 6)]
        given = {"block_table": np.zeros((2, 2), int), "cu_seq_lens": np.array([0, 3, 5])}
        given |= {"seq_starts": np.array([1, 2]), "out": out} | changed
        for _ in range(2):
            with pytest.raises(error, match=rf"^{NAME}: Invalid {words}"):
                cache.gather(0, **given)
        assert all((side == 7).all() for side in out)

    @pytest.mark.parametrize(
        "error, words, changed",
        [
            (cc.ShapeError, "shape of block_table", {"block_table": np.zeros((1, 2), int)}),
            (cc.DTypeError, "dtype of block_table", {"block_table": np.zeros((2, 2))}),
            (cc.ShapeError, r"shape of cu_seq_lens: .*\[0\]", {"cu_seq_lens": np.zeros(0, int)}),
            (cc.ShapeError, "shape of seq_starts", {"seq_starts": np.zeros(1, int)}),
            (cc.ArgumentError, "value of num_tokens: .*at most 5", {"num_tokens": 6}),
            (cc.ArgumentError, "value of num_tokens: .*True", {"num_tokens": True}),
            (cc.DTypeError, "type of out", {"out": np.zeros((5, 2, 8), "f4")}),
        ],
    )  # fmt: skip
    def test_arguments(self, cache, error, words, changed):
        self.refused(cache, error, words, **changed)

    def test_rows(self, cache):
        right = [np.full((5, 2, size), 7, "f4") for size in (8, 6)]
        for error, words, side, rows in (
            (cc.ShapeError, r"shape of out\[0\]", 0, np.zeros((5, 2, 6), "f4")),
            (cc.ShapeError, r"shape of out\[1\]", 1, np.zeros((5, 1, 6), "f4")),
            (cc.DTypeError, r"dtype of out\[1\]", 1, np.zeros((5, 2, 6), "f2")),
            (cc.StrideError, r"strides of out\[0\]", 0, np.zeros((5, 2, 16), "f4")[..., ::2]),
        ):
            self.refused(
                cache, error, words, out=[rows if at == side else right[at] for at in (0, 1)]
            )
        assert all((side == 7).all() for side in right)

    def test_rows_that_share_memory(self):
        cache = cc.PagedKVCache(*([np.zeros((4, 4, 2, 8), "f4")] for _ in "kv"))
        rows = np.zeros((5, 2, 8), "f4")
        self.refused(cache, cc.ArgumentError, r"\w+ of out\[1\]", out=(rows, rows))

    def test_scales(self):
        scales = np.ones(3, "f4"), np.ones(2, "f4")
        cache = cc.PagedKVCache(
            *([np.zeros((4, 4, 2, n), np.uint8)] for n in (8, 6)), "fp8", *scales
        )
        self.refused(cache, cc.ShapeError, "shape of k_scales")
