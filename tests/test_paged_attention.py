# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import itertools
import re
import types

import attending
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import worlds
from attending import (
    LAYOUTS,
    NOT_FINITE,
    ODD_STARTS,
    Problem,
    check_not_finite,
    garbage_starts,
    with_starts,
)
from guards import BAD, check_faults

import cupy_cache as cc
from cupy_cache.attention import paged_attention as module
from cupy_cache.compilation.specialisations import specialisations
from cupy_cache.runtime import dispatch, driver, formats, launch, modules

DTYPES = ("float16", "bfloat16", "float32")


def borders(block_size):
    """Lengths at which something may go wrong."""
    return [0, 1, block_size - 1, block_size, block_size + 1, 5 * block_size, 5 * block_size + 3]


# --- one query for each sequence ------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(world, rng, layout, dtype):
    Problem(rng, borders(16), layout=layout, dtype=dtype).solve(world)


@pytest.mark.kernels_later
@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 64])
def test_block_sizes(world, rng, block_size):
    Problem(rng, [*borders(block_size), 70], block_size=block_size).solve(world)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1), (16, 2), (20, 1), (34, 2)])
def test_ratios(world, rng, heads):
    Problem(rng, [33, 0, 7], heads=heads).solve(world)


@pytest.mark.parametrize("sizes", [(16, 16), (64, 128), (192, 128), (24, 40), (256, 256), (7, 3)])
def test_head_sizes(world, rng, sizes):
    Problem(rng, [33, 16, 7], sizes=sizes, heads=(2, 1)).solve(world)


@pytest.mark.parametrize("queries", [None, [3, 1, 7]])
@pytest.mark.parametrize("sizes, kv_cache_dtype", [((512, 512), "auto"), ((512, 264), "fp8")])
def test_large_heads(world, rng, sizes, kv_cache_dtype, queries):
    """Of which few rows fit a unit."""
    named = {"sizes": sizes, "kv_cache_dtype": kv_cache_dtype, "heads": (18, 2)}
    Problem(rng, [33, 90, 7], queries, **named).solve(world)


@pytest.mark.parametrize("types", list(itertools.product(["int32", "int64"], repeat=3)))
def test_index_types(world, rng, types):
    Problem(rng, [33, 0, 7], [2, 0, 3], types=types).solve(world)


@pytest.mark.parametrize("scales", ["number", "array", "heads"])
@pytest.mark.parametrize("kv_cache_dtype", attending.STORED)
@pytest.mark.parametrize("layout", ["NHD", "HND", "x-packed", "interleaved"])
def test_quantised_caches(world, rng, layout, kv_cache_dtype, scales):
    dtype = str(rng.choice(["float16", "bfloat16"]))
    problem = Problem(
        rng, [33, 0, 16, 7], dtype=dtype, kv_cache_dtype=kv_cache_dtype, scales=scales,
        layout=layout,
    )  # fmt: skip
    problem.solve(world)


@pytest.mark.parametrize("kv_cache_dtype", attending.TOKEN_SCALED)
@pytest.mark.parametrize("layout", LAYOUTS[:5])
def test_scales_of_tokens(world, rng, layout, kv_cache_dtype):
    """Scales of rows that no query sees are garbage."""
    dtype = str(rng.choice(["float16", "bfloat16"]))
    problem = Problem(
        rng, [33, 0, 16, 7, 90], dtype=dtype, kv_cache_dtype=kv_cache_dtype, scales="tokens",
        layout=layout,
    )  # fmt: skip
    problem.solve(world)


@pytest.mark.kernels_later
@pytest.mark.parametrize("block_size", [1, 5, 8, 32])
def test_scales_of_tokens_and_blocks(world, rng, block_size):
    problem = Problem(
        rng, borders(block_size), block_size=block_size, kv_cache_dtype="int8", scales="tokens",
        sizes=(24, 40),
    )  # fmt: skip
    problem.solve(world)


@pytest.mark.parametrize("queries", [None, [1, 4, 0, 18]])
@pytest.mark.parametrize("heads", [(4, 2), (20, 1), (70, 1)])
def test_scales_of_tokens_and_everything_else(world, rng, heads, queries):
    problem = Problem(
        rng, [1, 37, 5, 20], queries, heads=heads, kv_cache_dtype="fp8_per_token_head",
        scales="tokens", slopes=True, sliding_window=30, soft_cap=2.0, sinks="float32", scale=0.3,
        bad={(1, 0): 99},
    )  # fmt: skip
    problem.solve(world)


@pytest.mark.kernels_later
@pytest.mark.parametrize("largest", [1e-6, 1e-3, 1.0, 1e9, 1e30])
@pytest.mark.parametrize("smallest", [1.0, 1e-5, 0.0])
def test_values_of_any_magnitude(world, rng, largest, smallest):
    """The token that counts has the smallest scale of all, or the largest: the result is as
    precise. Scales of 0 do no harm."""
    problem = Problem(
        rng, [40, 40], heads=(1, 1), dtype="bfloat16", kv_cache_dtype="int8",
        scales="tokens", scale=1.0,
    )  # fmt: skip
    scales = problem.scales["v_scale_cache"]
    view = scales.on(scales.buffer.bytes)
    keys = problem.caches[0].on(problem.caches[0].buffer.bytes).view(np.int8)
    values = problem.caches[1].on(problem.caches[1].buffer.bytes).view(np.int8)
    k_scales = problem.scales["k_scale_cache"]
    k_view = k_scales.on(k_scales.buffer.bytes)
    query = problem.query.on(problem.query.buffer.bytes)
    query[...] = 0
    query[:, :, 0] = 1
    for row in range(2):
        for token, block, offset in problem.seen[row][2]:
            alone = token == 23  # it has nearly all of the weight
            k_view[block, offset] = 1.0
            keys[block, offset, 0, 0] = 60 if alone else 0
            view[block, offset] = np.float32(largest) * np.float32(smallest if alone ^ row else 1)
            problem.numbers[0][block, offset] = keys[block, offset]
            wide = values[block, offset].astype(np.float64)
            problem.numbers[1][block, offset] = wide * float(view[block, offset, 0])
    problem.run(world)
    got = problem.out.on(world.bytes_of(problem.out)).astype(np.float64)
    lse = problem.lse.on(world.bytes_of(problem.lse))
    for row, (wanted, logarithms) in problem.exact().items():
        # What has a weight of exp(-60) may be lost.
        allowed = 2**-8 * np.abs(wanted).max() + 1e-15 * largest
        np.testing.assert_allclose(got[row], wanted, rtol=2**-7, atol=allowed)
        np.testing.assert_allclose(lse[row], logarithms, rtol=1e-5)


def test_strides_and_spare_rows(world, rng):
    """Query and results are cut from wider arrays and have more rows than there are queries."""
    problem = Problem(
        rng, [33, 0, 7], [3, 0, 2], layout="gaps", strided=True, spare=2, lse="heads first"
    )
    problem.solve(world)


def test_long_sequences(world, rng):
    """Longer than what is done at once."""
    Problem(rng, [2111, 511, 513, 1025], heads=(2, 1), sizes=(16, 16)).solve(world)


@pytest.mark.kernels_later
def test_long_sequences_in_short_blocks(world, rng, monkeypatch):
    """A warp has the blocks of 16 tiles at once, and takes more."""
    monkeypatch.setattr(module, "COST_OF_SHARING", 1 << 30)  # one thread block takes all
    Problem(rng, [1030], heads=(1, 1), block_size=8).solve(world)


@pytest.mark.parametrize("layout", ["NHD", "HND", "x-packed", "interleaved"])
def test_large_blocks(world, rng, layout):
    """Larger than what is done at once."""
    problem = Problem(
        rng, [1300, 511, 513, 1, 0], heads=(2, 1), sizes=(16, 16), block_size=1050, layout=layout
    )
    problem.solve(world)


# --- several queries for each sequence ------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_several_queries(world, rng, causal):
    """The whole sequence, its end, one token, none, and more queries than tokens."""
    problem = Problem(rng, [9, 40, 17, 33, 2, 0], [9, 5, 1, 0, 4, 2], causal=causal)
    problem.solve(world)


@pytest.mark.parametrize("sizes", [(16, 16), (200, 256)])
def test_prefill(world, rng, sizes):
    Problem(rng, [130, 64], [130, 40], heads=(2, 1), sizes=sizes).solve(world)


PAIRS_OF_UNITS = {
    "plain": {},
    "all options": {
        "slopes": "sequences", "sliding_window": 90, "soft_cap": 2.0, "sinks": "float32",
        "scale": 0.3,
    },
    "not causal": {"causal": False, "slopes": True},
    "fp8": {"kv_cache_dtype": "fp8", "sizes": (64, 64)},
    "int8, x-packed": {"kv_cache_dtype": "int8", "layout": "x-packed", "scales": "heads"},
    "x-packed": {"layout": "x-packed", "sizes": (24, 40), "dtype": "float16"},
    "scales of tokens": {"kv_cache_dtype": "fp8", "scales": "tokens", "block_size": 5},
    "odd sizes": {"sizes": (7, 19), "block_size": 8},
    # Tiles are taken two at a time: both are missing, and one.
    "blocks that are not there": {"bad": {(1, 2): 99, (1, 3): 10**6, (1, 5): -1, (3, 0): -5}},
}  # fmt: skip


@pytest.mark.parametrize("named", PAIRS_OF_UNITS.values(), ids=PAIRS_OF_UNITS)
def test_units_in_pairs(world, rng, monkeypatch, named):
    """Of sequences that have many tokens; the others are taken as ever."""
    monkeypatch.setattr(module, "MANY_UNITS", 4)
    lengths, queries = [75, 200, 0, 130, 30], [75, 67, 0, 9, 33]
    Problem(rng, lengths, queries, heads=(6, 2), **named).solve(world)


# --- options --------------------------------------------------------------------------------------

OPTIONS = {
    "slopes": {"slopes": True},
    "slopes of each sequence": {"slopes": "sequences"},
    "window": {"sliding_window": 20},
    "window of one": {"sliding_window": 1},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": "float32"},
    "sinks of the query's dtype": {"sinks": "bfloat16"},
    "scale": {"scale": 0.4},
    "all": {
        "slopes": True, "sliding_window": 30, "soft_cap": 2.0, "sinks": "float32", "scale": 0.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [None, [1, 4, 0, 18]])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(world, rng, options, queries, causal):
    Problem(rng, [1, 37, 5, 20], queries, causal=causal, **options).solve(world)


def test_logarithms_are_optional(world, rng):
    Problem(rng, [9, 0, 20], lse=None).solve(world)


@pytest.mark.kernels_later
def test_new_result(world, rng):
    problem = Problem(rng, [9, 0, 20], sizes=(32, 16), dtype="float16")
    problem.run(world)
    written = problem.out.on(world.bytes_of(problem.out))[:3]
    for _ in range(2):  # the shapes are known the second time
        new = world.numpy(problem.run(world, out=None, lse=None))
        np.testing.assert_array_equal(new, written)
    other = Problem(rng, [9, 0, 20], sizes=(16, 16), dtype="float16")
    problem.query = other.query
    with pytest.raises(cc.ShapeError, match="shape of key_cache"):
        problem.run(world, out=None, lse=None)


# --- logits that are not ordinary -----------------------------------------------------------------


def logits_of(world, rng, logits, **options):
    """A sequence whose keys give these logits for one head, by their first element."""
    problem = Problem(rng, [len(logits)], heads=(1, 1), sizes=(16, 16), dtype="float16",
                      scale=1.0, **options)  # fmt: skip
    query = problem.query.on(problem.query.buffer.bytes)
    query[...] = 0
    query[0, 0, 0] = 1
    keys = problem.caches[0].on(problem.caches[0].buffer.bytes)
    for (_, block, offset), logit in zip(problem.seen[0][2], logits):
        problem.numbers[0][block, offset, 0, 0] = keys[block, offset, 0, 0] = logit
    problem.solve(world)


@pytest.mark.kernels_later
@pytest.mark.parametrize(
    "logits",
    [
        [0.0] * 50,
        [1.0, 2.0, 60000.0, *[3.0] * 40],
        [60000.0, *[-60000.0] * 40],
        [*[-60000.0] * 40, 60000.0],
        [-60000.0] * 33,
        [*np.linspace(-80, 80, 40)],
        [*np.linspace(80, -80, 40)],
    ],
)
def test_logits(world, rng, logits):
    """All equal, one huge, ascending, descending."""
    logits_of(world, rng, [float(np.float16(x)) for x in logits])


@pytest.mark.parametrize("where, number", NOT_FINITE)
@pytest.mark.parametrize("lengths", [[40, 7], [900], [40] * 40])
def test_what_is_no_number_stays_none(world, rng, where, number, lengths):
    """Whoever has computed it finds out: zeros would pass for the attention to no tokens."""
    width = 2000 if len(lengths) == 1 else None  # shared by all thread blocks, too
    problem = Problem(rng, lengths, dtype="float16", width=width)
    check_not_finite(problem, world, where, number)


@pytest.mark.kernels_later
@pytest.mark.parametrize("cap", [0.01, 50.0, 1e4, 1e6, 1e9, 3.4e38])
def test_caps_of_any_size(world, rng, cap):
    """Logits are as near to the exact ones as without a cap: a large one bends none."""
    problem = Problem(rng, [33, 90], dtype="float16", soft_cap=cap, scale=1.0, spare=1)
    problem.solve(world)
    lse = problem.lse.on(world.bytes_of(problem.lse))
    exact = problem.exact()
    for row, (_, logarithms) in exact.items():
        np.testing.assert_allclose(lse[row], logarithms, rtol=3e-6, atol=3e-6 * min(cap, 100))


def test_all_hidden_but_one(world, rng):
    logits_of(world, rng, [60000.0] * 40 + [-60000.0], sliding_window=1)


@pytest.mark.kernels_later
@pytest.mark.parametrize("sinks", [None, "float32"])
def test_queries_without_tokens(world, rng, sinks):
    Problem(rng, [0, 2, 0], [3, 4, 1], sinks=sinks, slopes=True).solve(world)


# --- what is out of range -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [b for b in BAD if -(2**31) <= b] + [6 * 3 + 2])
def test_blocks_out_of_range_are_recorded(world, rng, bad):
    problem = Problem(
        rng, [90, 40, 3], [2, 20, 1], width=6, types=("int64", "int32", "int64"), bad={(0, 1): bad}
    )
    problem.solve(world)


@pytest.mark.kernels_later
def test_a_sequence_of_which_no_block_is_there(world, rng):
    Problem(rng, [40, 20], bad={(0, page): 1000 + page for page in range(3)}).solve(world)


@pytest.mark.parametrize("bad", [*BAD, 97])
def test_lengths_out_of_range_are_recorded(world, rng, bad):
    problem = Problem(rng, [90, bad, 3], [2, 4, 1], width=6, types=("int32", "int64", "int32"))
    problem.solve(world)


def test_a_table_without_width(world, rng):
    problem = Problem(rng, [3, 0], width=0)
    assert problem.faults == {(0, "seq_lens", 3, 1)}
    problem.solve(world)


def test_sequences_without_queries_are_not_looked_at(world, rng):
    Problem(rng, [20, -5, 2**31 - 1], [1, 0, 0], width=2).solve(world)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("starts", ODD_STARTS)
def test_starts_out_of_order(world, rng, starts, causal):
    """Those outside the query, or below an earlier one, count as the nearest that is neither."""
    with_starts(Problem, rng, starts, [40, 30], 5, causal).solve(world)


@pytest.mark.extra
def test_starts_that_are_garbage(world, rng):
    for starts, lengths, rows in garbage_starts(rng):
        named = {"heads": (5, 1), "sizes": (16, 16)}
        with_starts(Problem, rng, starts, lengths, rows, **named).solve(world)


def test_starts_of_many_sequences(world, rng):
    """More than a thread block has threads."""
    counts = rng.integers(0, 3, 300)
    lengths = rng.integers(0, 20, 300)
    Problem(rng, lengths, counts, heads=(1, 1), sizes=(16, 16), types=["int64"] * 3).solve(world)


def test_nothing_to_do(world, rng):
    for problem in (Problem(rng, []), Problem(rng, [], [], spare=3), Problem(rng, [5], [0])):
        problem.solve(world)


def test_clusters_are_asked_of_the_driver_in_use(monkeypatch):
    """What one driver says of a GPU's number is not taken for another's."""
    for answer in (True, False):
        monkeypatch.setattr(driver, "active", types.SimpleNamespace(has_clusters={0: answer}.get))
        assert launch.has_clusters(0) is answer


# --- the same bits in any batch -------------------------------------------------------------------


def rows_of(world, problem):
    """The bits of what is written, by row."""
    problem.run(world)
    out = problem.out.on(world.bytes_of(problem.out))
    lse = problem.lse.on(world.bytes_of(problem.lse))
    return [(o.tobytes(), one.tobytes()) for o, one in zip(out, lse)]


@pytest.mark.parametrize("queries", [None, [1, 3, 1, 2, 4, 1], [75, 33, 1, 67, 9, 1]])
def test_same_bits_in_any_batch(world, rng, monkeypatch, queries):
    """A batch in another order, padded with empty sequences, and one sequence at a time. Of the
    queries two sequences may have enough for units to be taken in pairs, by another kernel."""
    monkeypatch.setattr(module, "MANY_UNITS", 4)
    # Both kernels are emulated as for one GPU: for others products are summed differently.
    monkeypatch.setattr("emulator.ARCHITECTURES", (90,))
    lengths = [700, 33, 1, 130, 64, 15]
    problem = Problem(rng, lengths, queries, slopes=True, heads=(6, 3))
    counts = queries or [1] * len(lengths)
    starts = np.concatenate([[0], np.cumsum(counts)])
    whole = rows_of(world, problem)
    table = problem.table.on(problem.table.buffer.bytes)
    bits = worlds.Spec(
        problem.query.buffer, 0, problem.query.shape, problem.query.strides, "uint16"
    )
    query = bits.on(problem.query.buffer.bytes)

    def part(order, padding, width):
        """The same sequences in this order, then empty ones."""
        rows = [r for b in order for r in range(starts[b], starts[b + 1])]
        other = Problem(rng, [lengths[b] for b in order] + [0] * padding,
                        queries and [counts[b] for b in order] + [1] * padding,
                        slopes=True, heads=(6, 3), width=width)  # fmt: skip
        other.caches, other.slopes = problem.caches, problem.slopes
        entries = np.full((len(order) + padding, width), 10**6, np.int32)
        entries[: len(order), : table.shape[1]] = table[order]
        other.table = worlds.of_values(entries)
        other.query = worlds.of_values(
            np.concatenate(
                [query[rows], query[: len(other.query.on(other.query.buffer.bytes)) - len(rows)]]
            ),
            "bfloat16",
        )
        assert rows_of(world, other)[: len(rows)] == [whole[r] for r in rows]

    width = table.shape[1]
    part(list(rng.permutation(len(lengths))), 3, width)
    part([1, 0, 5], 0, width + 30)
    for sequence in range(len(lengths)):
        part([sequence], 0, width)


SHARED = {
    "ragged": (
        [1300, 33, 1, 130, 0, 15, 700], {"sizes": (16, 16), "sinks": "float32"}
    ),
    "one head": ([2111, 513], {"heads": (3, 1), "sizes": (16, 16), "slopes": True}),
    "one sequence": ([9000], {"heads": (2, 1), "sizes": (16, 16), "soft_cap": 3.0}),
    "16 rows, fp8": ([300, 900], {"heads": (16, 1), "kv_cache_dtype": "fp8"}),
    "odd sizes, a window": (
        [300, 900], {"heads": (12, 1), "sizes": (24, 40), "sliding_window": 300}
    ),
    "x-packed": ([300, 900], {"heads": (5, 1), "sizes": (64, 64), "layout": "x-packed"}),
    "blocks of 8": ([300, 40], {"heads": (2, 2), "block_size": 8, "dtype": "float16"}),
    "nothing there": ([300, 200], {"bad": {(0, page): 10**6 for page in range(10)}}),
    "pairs of heads": (
        [700, 33, 1, 0],
        {"heads": (8, 4), "sizes": (80, 96), "block_size": 8, "sliding_window": 600},
    ),
    "pairs, int8": (
        [300, 520], {"heads": (4, 4), "sizes": (144, 160), "kv_cache_dtype": "int8"}
    ),
}  # fmt: skip


class TestWhoComputes:
    """One thread block takes a sequence and head, or two heads, or a cluster does, or all blocks
    take equal shares: the bits are the same."""

    @pytest.fixture
    def whole(self, monkeypatch):
        """All kernels are emulated as for one GPU: for others products are summed differently."""
        monkeypatch.setattr("emulator.ARCHITECTURES", (90,))

    def rows(self, world, problem, monkeypatch, how, blocks=None):
        def choose(plan, tokens, sequences, width):
            units = sequences
            if plan._row_tokens is not None:
                units += tokens // plan._row_tokens
            units *= plan._heads
            if blocks is not None:
                units = max(blocks // plan._heads, 1) * plan._heads
            if how == "paired":
                return (how, units // 2) if how in plan._launchers else ("plain", units)
            return how, units * (module.CLUSTER if how == "clustered" else 1)

        with monkeypatch.context() as changed:
            changed.setattr(module._Plan, "_choose", choose)
            dispatch.forget_everything()
            found = rows_of(world, problem)
        dispatch.forget_everything()
        check_faults("paged_attention", problem.faults)
        return found

    @pytest.mark.parametrize("name", SHARED)
    def test_emulated(self, whole, emulated_world, rng, monkeypatch, name):
        lengths, named = SHARED[name]
        problem = Problem(rng, lengths, **named)
        found = []
        shared = (("shared", n) for n in (1, 2, 7, 33, 264))
        for how, blocks in (("plain", None), ("paired", None), *shared):
            world = emulated_world(seed=blocks or 0)
            try:
                found.append(self.rows(world, problem, monkeypatch, how, blocks))
                if how != "shared" or blocks == 7:
                    problem.judge(world)
            finally:
                world.close()
        assert found == found[:1] * len(found)

    @pytest.mark.gpu
    @pytest.mark.parametrize("name", SHARED)
    def test_on_gpu(self, rng, monkeypatch, name):
        lengths, named = SHARED[name]
        problem = Problem(rng, lengths, **named)
        world = worlds.CuPyWorld()
        found = [
            self.rows(world, problem, monkeypatch, how, blocks)
            for how, blocks in (
                ("plain", None), ("paired", None),
                *(("shared", n) for n in (1, 2, 7, 33, 132, 264, 500)),
                *((("clustered", None),) if launch.has_clusters(0) else ()),
            )
        ]  # fmt: skip
        problem.judge(world)
        assert found == found[:1] * len(found)

    @pytest.mark.gpu
    @pytest.mark.parametrize("queries", [[1, 3, 40, 1], [2, 2, 2, 2]])
    def test_several_queries_on_gpu(self, rng, monkeypatch, queries):
        problem = Problem(rng, [700, 33, 1300, 64], queries, sizes=(64, 64))
        world = worlds.CuPyWorld()
        if not launch.has_clusters(0):
            pytest.skip("clusters need compute capability 9.0")
        found = [self.rows(world, problem, monkeypatch, how) for how in ("plain", "clustered")]
        problem.judge(world)
        assert found[0] == found[1]


class TestScratch:
    """Where blocks share parts through scratch memory, on a GPU: nothing comes in between."""

    pytestmark = pytest.mark.gpu
    BLOCKS = 264

    @pytest.fixture(autouse=True)
    def shared(self, monkeypatch):
        def choose(plan, tokens, sequences, width):
            return "shared", max(self.BLOCKS // plan._heads, 1) * plan._heads

        monkeypatch.setattr(module._Plan, "_choose", choose)
        dispatch.forget_everything()
        yield
        dispatch.forget_everything()

    def problem(self, rng):
        return Problem(rng, [3000, 700, 5, 1500], heads=(8, 2), sizes=(64, 64), lse=None)

    def arguments(self, world, problem):
        where = (problem.query, *problem.caches, problem.table, problem.lens)
        return [world.put(spec) for spec in where]

    def test_torch_graph(self, rng):
        """The graph's scratch memory is no other tensor's, and it may hold anything."""
        torch = pytest.importorskip("torch")
        problem, world = self.problem(rng), worlds.TorchCudaWorld()
        arguments, out = self.arguments(world, problem), world.put(problem.out)
        cc.paged_attention(*arguments, out=out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                cc.paged_attention(*arguments, out=out)
        others = []
        for turn in range(5):
            others.append(torch.full((1 << 20,), turn, dtype=torch.int32, device="cuda"))
            out.fill_(float("nan"))
            graph.replay()
            problem.judge(world)
            assert all((other == at).all() for at, other in enumerate(others))

    def test_cupy_graph(self, rng):
        cupy = pytest.importorskip("cupy")
        problem, world = self.problem(rng), worlds.CuPyWorld()
        arguments, out = self.arguments(world, problem), world.put(problem.out)
        cc.paged_attention(*arguments, out=out)
        cupy.cuda.Device().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            for _ in range(3):
                cc.paged_attention(*arguments, out=out)
            graph = stream.end_capture()
        others = []
        for turn in range(5):
            others.append(cupy.full(1 << 20, turn, cupy.int32))
            out.fill(-1.0)
            cupy.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            problem.judge(world)
            assert all((other == at).all() for at, other in enumerate(others))

    def test_streams_side_by_side(self, rng):
        torch = pytest.importorskip("torch")
        problem, world = self.problem(rng), worlds.TorchCudaWorld()
        arguments, wanted = self.arguments(world, problem), world.put(problem.out)
        cc.paged_attention(*arguments, out=wanted)
        problem.judge(world)
        streams = [torch.cuda.Stream() for _ in range(4)]
        outs = [torch.full_like(wanted, float("nan")) for _ in range(40)]
        torch.cuda.synchronize()
        for turn, out in enumerate(outs):
            if turn % 3:
                with torch.cuda.stream(streams[turn % 4]):
                    cc.paged_attention(*arguments, out=out)
            else:
                cc.paged_attention(*arguments, out=out, stream=streams[turn % 4])
        torch.cuda.synchronize()
        rows = len(problem.seen)
        assert all(torch.equal(out[:rows], wanted[:rows]) for out in outs)

    def test_cupy_on_a_stream_that_is_not_current(self, rng):
        cupy = pytest.importorskip("cupy")
        problem, world = self.problem(rng), worlds.CuPyWorld()
        arguments, out = self.arguments(world, problem), world.put(problem.out)
        cupy.cuda.Device().synchronize()
        stream = cupy.cuda.Stream(non_blocking=True)
        for _ in range(3):
            cc.paged_attention(*arguments, out=out, stream=stream)
        stream.synchronize()
        problem.judge(world)


def plan_of(heads, *names, tall_tokens=None):
    """A plan of launchers of these names, for units of ``heads`` each sequence, or of 16 tokens."""
    launchers = {name: types.SimpleNamespace(device=0) for name in names}
    row_tokens = None if tall_tokens is None else 16
    return module._Plan(launchers, "cupy", heads, row_tokens, tall_tokens, 16, 2, 4160)


@pytest.mark.parametrize(
    "sequences, heads, tokens, how, blocks",
    [
        (1, 8, 512, "clustered", 64),
        (4, 8, 2048, "clustered", 256),
        (1, 8, 32768, "clustered", 64),
        (1, 1, 32768, "shared", 264),
        (5, 8, 8192, "shared", 264),
        (8, 8, 1024, "plain", 64),
        (8, 8, 8192, "shared", 264),
        (64, 8, 4096, "plain", 512),
        (2000, 1, 128, "plain", 2000),
        (1, 300, 32768, "plain", 300),
    ],
)
def test_who_computes_is_chosen_by_shapes(monkeypatch, sequences, heads, tokens, how, blocks):
    """As it was measured on a GPU of 132 multiprocessors; without clusters, and without room for
    equal shares, too."""
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    step = sequences, sequences, tokens // 16

    def chosen(*names):
        return plan_of(heads, *names)._choose(*step)

    plan = plan_of(heads, "plain", "shared", "clustered")
    assert plan._choose(*step) == (how, blocks)
    scratch = plan.scratch_for(step)
    assert (scratch is None) == (how != "shared")
    if scratch is not None:
        assert scratch.size < 64 << 20
    assert chosen("plain") == ("plain", sequences * heads)
    assert chosen("plain", "shared")[0] != "clustered"
    assert chosen("plain", "clustered")[0] != "shared"


@pytest.mark.parametrize(
    "sequences, heads, tokens, how, blocks",
    [
        (64, 8, 4096, "paired", 256),
        (31, 8, 4096, "paired", 124),
        (30, 8, 4096, "plain", 240),
        (1, 8, 512, "clustered", 64),
        (8, 8, 8192, "shared", 264),
    ],
)
def test_pairs_are_for_a_full_gpu(monkeypatch, sequences, heads, tokens, how, blocks):
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    plan = plan_of(heads, "plain", "paired", "shared", "clustered")
    assert plan._choose(sequences, sequences, tokens // 16) == (how, blocks)
    assert plan.scratch_for((64, 64, 256)) is None


@pytest.mark.parametrize(
    "paired, named",
    [
        (True, {"size": 96}),
        (True, {"size": 192}),
        (True, {"size": 80, "block_size": 8}),
        (True, {"size": 192, "kv_cache_dtype": "fp8"}),
        (False, {"size": 128, "kv_cache_dtype": "fp8"}),
        (True, {"size": 96, "num_heads": 64}),
        (False, {"size": 96, "num_heads": 72}),  # too many rows
        (False, {"size": 64}),
        (False, {"size": 128}),
        (False, {"size": 256}),
        (False, {"size": 72}),
        (False, {"size": 96, "num_kv_heads": 7, "num_heads": 28}),
        (False, {"size": 96, "block_size": 4}),
        (False, {"size": 96, "layout": "HND"}),
        (False, {"size": 64, "layout": "x-packed"}),
    ],
)
def test_which_heads_are_paired(paired, named):
    """Those whose rows, of 16-byte vectors and more than 128 bytes, are side by side and fill no
    multiples of 256 bytes."""
    shape = {"num_kv_heads": 8, "num_heads": 32, "block_size": 16, "layout": "NHD", **named}
    layout, size = shape.pop("layout"), shape.pop("size")
    kernels = specialisations(
        shape.pop("num_kv_heads"), size, shape.pop("block_size"), "bfloat16", layouts=[layout],
        ops=["paged_attention"], **shape,
    )  # fmt: skip
    teams = {re.search(r", (\d), \w[\w ]*, \w[\w ]*, [\w ]+>$", k.expression)[1] for k in kernels}
    assert teams == ({"1", "2"} if paired else {"1"})


@pytest.mark.parametrize(
    "size, kv_cache_dtype, small",
    [
        (64, "auto", True),
        (32, "fp8", True),
        (64, "fp8_per_token_head", False),
        (72, "auto", False),
        (52, "auto", False),
    ],
)
def test_which_heads_have_no_l1(size, kv_cache_dtype, small):
    """Small ones that are copied in 16-byte vectors alone, where a thread block takes a unit."""
    kernels = specialisations(
        8, size, 16, "bfloat16", layouts=["NHD"], num_heads=32, kv_cache_dtype=kv_cache_dtype,
        ops=["paged_attention"],
    )  # fmt: skip
    found = [k.expression for k in kernels if k.all_shared]
    assert bool(found) == small
    assert all(re.search(r", 1, false, 1, [\w ]+, [\w ]+, void>$", name) for name in found)


def test_many_tokens_are_for_another_kernel(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    plan = plan_of(8, "plain", "tall", "clustered", tall_tokens=1280)
    assert plan._choose(1279, 64, 256) == ("plain", (1279 // 16 + 64) * 8)
    assert plan._choose(1280, 1, 256) == ("tall", (1280 // 16 + 1) * 8)
    assert plan._choose(16, 1, 256)[0] == "clustered"


def test_divisors():
    """A multiplication and a shift are a division: divide.cuh."""
    rng = np.random.default_rng(0)
    powers = [2**k + d for k in range(1, 31) for d in (-1, 0, 1)]
    for number in {*range(1, 70), *powers, 2**31 - 1}:
        factor, shift = launch.divisor(number)
        assert 0 < factor < 2**32
        dividends = [0, 1, number - 1, number, number + 1, 2**31 - 1, *rng.integers(0, 2**31, 50)]
        dividends += [number * int(k) - 1 for k in rng.integers(1, 2**31 // number + 1, 50)]
        for dividend in map(int, dividends):
            if dividend < 2**31:
                assert dividend * factor >> shift == dividend // number
                assert dividend * factor < 2**64


def test_constants_that_the_host_has_too():
    """A GPU alone shows that a cluster has a thread block for each group of parts."""
    source = (modules.kernel_dir() / "paged_attention.cu").read_text(encoding="utf-8")
    constants = dict(re.findall(r"^constexpr int (k\w+) = (\d+);", source, re.M))
    host = {
        "kWide": module.MOST_ROWS, "kWarps": module.WARPS, "kGroups": module.CLUSTER,
        "kMaxParts": module._most_parts(10**9),
    }  # fmt: skip
    assert constants == {name: str(number) for name, number in host.items()}


@pytest.mark.parametrize(
    "tokens", [0, 1, 63, 64, 65, 512, 513, 1024, 1025, 8192, 8193, 32768, 10**6]
)
def test_no_sequence_has_more_parts_than_there_is_room_for(tokens):
    """`Cut` of the kernel, written out."""
    most, all_tiles = module._most_parts(tokens), -(-tokens // 16)
    for tiles in (*range(min(all_tiles, 2048) + 1), all_tiles):
        limits = ((32, 1), (64, 2), (128, 4), (1024, 8), (4096, 16))
        turns = next((turns for limit, turns in limits if tiles <= limit), None)
        if turns is None:
            turns = 1 << ((tiles - 1) // 256).bit_length()
        assert max(1, -(-tiles // (4 * turns))) <= most <= 64


# --- any problem ----------------------------------------------------------------------------------


@st.composite
def problems(draw, **fixed):
    """Arguments of `Problem`; ``fixed`` ones, and the others drawn. Sizes are small."""
    named = {
        "block_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "sizes": draw(st.sampled_from([(16, 16), (8, 24), (32, 16), (5, 5)])),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "kv_cache_dtype": draw(st.sampled_from(["auto", *attending.STORED])),
        "heads": draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2), (5, 1), (8, 2)])),
    } | fixed  # fmt: skip
    scales = ["number", "array", "heads"]
    if named["kv_cache_dtype"] in attending.TOKEN_SCALED and named["layout"] in LAYOUTS[:5]:
        scales.append("tokens")
    scales = draw(st.sampled_from(scales))
    size = named["block_size"]
    length = st.one_of(st.sampled_from([0, 1, size - 1, size, size + 1]), st.integers(0, 6 * size))
    lengths = draw(st.lists(length, max_size=5))
    named["queries"] = draw(
        st.none() | st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths))
    )
    types = fixed.get("types") or [draw(st.sampled_from(["int32", "int64"])) for _ in range(3)]
    width = max([1, *(-(-n // size) for n in lengths)]) + draw(st.integers(0, 2))
    bad = {}
    if lengths and draw(st.booleans()):
        limits = [np.iinfo(t) for t in types]
        for _ in range(draw(st.integers(0, 3))):
            place = draw(st.integers(0, len(lengths) - 1)), draw(st.integers(0, width - 1))
            bad[place] = draw(
                st.sampled_from([b for b in BAD if limits[0].min <= b <= limits[0].max])
            )
        if draw(st.booleans()):
            lengths[draw(st.integers(0, len(lengths) - 1))] = draw(
                st.sampled_from([b for b in BAD if limits[1].min <= b <= limits[1].max])
            )
    maybe = st.sampled_from
    return np.random.default_rng(draw(st.integers(0, 2**32))), lengths, {
        **named, "types": types, "width": width, "bad": bad,
        "scales": scales,
        "spare": draw(maybe([0, 0, 2])), "lse": draw(maybe([None, "rows", "heads first"])),
        "slopes": draw(maybe([False, True, "sequences"])),
        "sinks": draw(maybe([None, "float32", named["dtype"]])),
        "scale": draw(maybe([None, 0.2, 1.0])), "sliding_window": draw(maybe([None, 1, 3, 17])),
        "soft_cap": draw(maybe([None, 0.5, 30.0])), "causal": draw(st.booleans()),
        "strided": draw(st.booleans()), "pad": draw(maybe([0, 0, 16])),
    }  # fmt: skip


@hypothesis.settings(max_examples=100)
@hypothesis.given(drawn=problems())
def test_any_problem(drawn):
    rng, lengths, named = drawn
    Problem(rng, lengths, **named).solve(worlds.NumPyWorld())


# What the kernels are compiled for.
POOL = (
    {"block_size": 16, "sizes": (32, 32), "layout": "NHD", "dtype": "bfloat16",
     "kv_cache_dtype": "auto", "heads": (4, 2)},
    {"block_size": 8, "sizes": (64, 32), "layout": "HND", "dtype": "float16",
     "kv_cache_dtype": "auto", "heads": (5, 1)},
    {"block_size": 16, "sizes": (32, 32), "layout": "NHD", "dtype": "bfloat16",
     "kv_cache_dtype": "fp8", "heads": (4, 2)},
    {"block_size": 16, "sizes": (32, 32), "layout": "x-packed", "dtype": "float16",
     "kv_cache_dtype": "auto", "heads": (4, 2)},
)  # fmt: skip


# Of the indices, where not all: every further combination is five kernels more.
TYPES = (
    ("int32", "int32", "int32"), ("int64", "int32", "int64"), ("int32", "int64", "int32"),
    ("int64", "int64", "int32"),
)  # fmt: skip


@pytest.mark.extra
@pytest.mark.parametrize("types", ["one", "all"])
@pytest.mark.parametrize("number", range(len(POOL)))
def test_any_problem_on_the_kernels(emulated_world, number, types):
    fixed = {"types": TYPES[number]} if types == "one" else {}

    @hypothesis.given(drawn=problems(**POOL[number], **fixed))
    def solve(drawn):
        rng, lengths, named = drawn
        world = emulated_world()
        try:
            Problem(rng, lengths, **named).solve(world)
        finally:
            world.close()

    solve()


# --- plans ----------------------------------------------------------------------------------------


def test_other_numbers_need_no_other_plan(rng):
    """Lengths, widths, scales and sizes of windows change with steps and layers."""
    many, world = Problem(rng, [20] * 9), worlds.NumPyWorld()
    many.run(world, scale=1.0, sliding_window=3, soft_cap=2.0)
    before = len(module.OP.memory)
    for number in range(2, 9):
        step = Problem(rng, [20] * number, width=2)
        step.caches, step.table = many.caches, many.table[:, : 1 + number % 2]
        step.lens = worlds.of_values(np.full(number, 16, np.int32))
        step.run(world, scale=1 / number, sliding_window=number, soft_cap=0.5 * number)
    assert len(module.OP.memory) == before


def test_more_rows_of_results_that_interleave(world, rng):
    """With the head's stride of so many rows, further ones would run into the next head's."""
    problem = Problem(rng, [9] * 4, lse="heads first")
    problem.solve(world)
    more = Problem(rng, [9] * 5, lse=None)
    more.caches = problem.caches
    storage = worlds.array(rng, (20,), "float32").buffer
    more.lse = worlds.Spec(storage, 0, (5, 4), (4, 16), "float32")
    with pytest.raises(cc.StrideError, match="lse"):
        more.run(world)


# --- refusals -------------------------------------------------------------------------------------


class TestRefusals:
    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("query", (3, 4), "bfloat16", cc.ShapeError, ("query", "2 dimensions")),
            ("query", (3, 4, 31), "bfloat16", cc.ShapeError, ("key_cache", "head_size")),
            ("query", (3, 3, 32), "bfloat16", cc.ShapeError, ("out",)),
            (
                "query", (3, 4, 32), "float16", cc.DTypeError,
                ("of query: expected bfloat16, got float16", "that of a raw key_cache"),
            ),
            ("query", (3, 4, 32), "int16", cc.DTypeError, ("query", "float32", "int16")),
            ("query", (2, 4, 32), "bfloat16", cc.ShapeError, ("seq_lens", "query_start_loc")),
            ("table", (2, 3), "int32", cc.ShapeError, ("block_table", "3 sequences")),
            ("table", (9,), "int32", cc.ShapeError, ("block_table",)),
            ("table", (3, 3), "int16", cc.DTypeError, ("block_table", "int32 or int64")),
            ("lens", (3,), "uint64", cc.DTypeError, ("seq_lens", "uint64")),
            ("lens", (3, 1), "int32", cc.ShapeError, ("seq_lens",)),
            ("starts", (3,), "int32", cc.ShapeError, ("query_start_loc", "[4]", "[3]")),
            ("starts", (4,), "float32", cc.DTypeError, ("query_start_loc",)),
            ("slopes", (2,), "float32", cc.ShapeError, ("alibi_slopes", "num_heads")),
            ("slopes", (4,), "bfloat16", cc.DTypeError, ("alibi_slopes", "float32")),
            ("slopes", (3, 2), "float32", cc.ShapeError, ("alibi_slopes", "num_heads")),
            ("slopes", (2, 4), "float32", cc.ShapeError, ("alibi_slopes", "3 sequences")),
            ("slopes", (3, 4), "float16", cc.DTypeError, ("alibi_slopes", "float32")),
            ("slopes", (1, 3, 4), "float32", cc.ShapeError, ("alibi_slopes", "num_heads")),
            ("sinks", (4, 1), "float32", cc.ShapeError, ("sinks",)),
            ("sinks", (4,), "float16", cc.DTypeError, ("sinks", "float32", "bfloat16")),
            ("out", (3, 4, 31), "bfloat16", cc.ShapeError, ("out", "head_size_v")),
            ("out", (2, 4, 32), "bfloat16", cc.ShapeError, ("out", "at least 3")),
            ("out", (3, 4, 32), "float32", cc.DTypeError, ("out", "bfloat16")),
            ("lse", (4, 3), "float32", cc.ShapeError, ("lse", "num_heads")),
            ("lse", (2, 4), "float32", cc.ShapeError, ("lse", "at least 3")),
            ("lse", (3, 4), "float64", cc.DTypeError, ("lse", "float32")),
        ],
    )  # fmt: skip
    def test_arguments(self, world, rng, name, shape, dtype, error, words):
        problem = Problem(rng, [20, 9, 3])
        setattr(problem, name, worlds.array(rng, shape, dtype))
        problem.refused(world, error, *words)

    @pytest.mark.parametrize(
        "index, shape, dtype, error, words",
        [
            (0, (9, 16, 3, 32), "bfloat16", cc.ShapeError, ("value_cache", "num_kv_heads")),
            (0, (9, 16, 64), "bfloat16", cc.ShapeError, ("key_cache", "3 dimensions")),
            (0, (9, 16, 2, 32), "uint8", cc.DTypeError, ("key_cache", "bfloat16")),
            (1, (9, 16, 2, 32), "float16", cc.DTypeError, ("value_cache", "bfloat16")),
            (1, (7, 16, 2, 32), "bfloat16", cc.ShapeError, ("value_cache", "num_blocks")),
            (1, (9, 8, 2, 32), "bfloat16", cc.ShapeError, ("value_cache", "block_size")),
        ],
    )
    def test_caches(self, world, rng, index, shape, dtype, error, words):
        problem = Problem(rng, [20, 9, 3])
        problem.caches = list(problem.caches)
        shape = problem.caches[0].shape[:1] + shape[1:] if shape[0] == 9 else shape
        problem.caches[index] = worlds.array(rng, shape, dtype)
        problem.refused(world, error, *words)

    def test_a_ratio_that_is_not_whole(self, world, rng):
        problem = Problem(rng, [20], heads=(3, 3), lse=None)
        problem.query = worlds.array(rng, (1, 4, 32), "bfloat16")
        problem.out = worlds.array(rng, (1, 4, 32), "bfloat16")
        problem.refused(world, cc.ShapeError, "query", "multiple")

    def test_x_packed_caches_that_do_not_fit(self, world, rng):
        problem = Problem(rng, [20], layout="x-packed")
        blocks, heads, packs, size, x = problem.caches[0].shape
        key = worlds.array(rng, (blocks, heads, packs + 1, size, x), "bfloat16")
        problem.caches = key, problem.caches[1]
        problem.refused(world, cc.ShapeError, "key_cache", "head_size / x")

    @pytest.mark.parametrize(
        "name, value",
        [
            ("scale", float("nan")), ("scale", float("inf")), ("scale", "1"), ("scale", True),
            ("soft_cap", 0.0), ("soft_cap", -1.0), ("soft_cap", float("inf")), ("soft_cap", True),
            ("soft_cap", 1e-60), ("soft_cap", 1e-40),
            ("sliding_window", 0), ("sliding_window", -1), ("sliding_window", 2.0),
            ("sliding_window", True), ("kv_cache_dtype", "fp9"), ("kv_cache_dtype", None),
            ("kv_cache_dtype", "fp8_ds_mla"),
        ],
    )  # fmt: skip
    def test_values(self, world, rng, name, value):
        problem = Problem(rng, [20])
        problem.refused(world, cc.ArgumentError, name, str(value), **{name: value})

    @pytest.mark.parametrize("name", ["k_scale", "v_scale"])
    def test_scales(self, world, rng, name):
        problem = Problem(rng, [20], kv_cache_dtype="fp8")
        for value in (0.0, -1.0, float("nan"), True):
            problem.refused(world, cc.ArgumentError, name, str(value), **{name: value})
        for shape, dtype, error in (
            ((3,), "float32", cc.ShapeError),
            ((2,), "float16", cc.DTypeError),
        ):
            scale = worlds.array(rng, shape, dtype)
            problem.refused(world, error, name, **{name: scale})

    @pytest.mark.parametrize("name", ["k_scale_cache", "v_scale_cache"])
    def test_scales_of_tokens(self, world, rng, name):
        problem = Problem(rng, [20], kv_cache_dtype="int8_per_token_head", scales="tokens")
        for spec in problem.scales.values():
            world.put(spec)
        problem.refused(world, cc.ArgumentError, name, "both", **{name: None})
        scale = name.removesuffix("_cache")
        problem.refused(world, cc.ArgumentError, scale, "None", **{scale: 1.0})
        blocks, *inner = problem.scales[name].shape
        for shape, dtype, error in (
            ((blocks, *inner[::-1]), "float32", cc.ShapeError),
            ((blocks, *inner, 1), "float32", cc.ShapeError),
            ((blocks, *inner), "float16", cc.DTypeError),
        ):
            problem.refused(world, error, name, **{name: worlds.array(rng, shape, dtype)})
        for dtype in ("auto", "fp8_e5m2", "fp9"):
            words = "kv_cache_dtype", "int8_per_token_head", dtype
            problem.refused(world, cc.ArgumentError, *words, kv_cache_dtype=dtype)

    def test_formats_that_need_scales_of_tokens(self, world, rng):
        problem = Problem(rng, [20], kv_cache_dtype="int8", storage="int8")
        name = "int8_per_token_head"
        problem.refused(world, cc.ArgumentError, "k_scale_cache", name, kv_cache_dtype=name)

    def test_x_packed_caches_have_no_scales_of_tokens(self, world, rng):
        problem = Problem(rng, [20], kv_cache_dtype="int8", layout="x-packed", storage="int8")
        blocks, heads, _, size, _ = problem.caches[0].shape
        scales = [worlds.array(rng, (blocks, size, heads), "float32") for _ in "kv"]
        problem.scales = dict(zip(("k_scale_cache", "v_scale_cache"), scales))
        problem.refused(world, cc.ShapeError, "key_cache", "num_kv_heads, head_size")

    def test_strides(self, world, rng):
        problem = Problem(rng, [20, 9])
        wide = worlds.array(rng, (2, 4, 64), "bfloat16")
        problem.query = wide[..., ::2]
        problem.refused(world, cc.StrideError, "query", "contiguous")
        problem = Problem(rng, [20, 9])
        problem.out = wide[..., ::2]
        problem.refused(world, cc.StrideError, "out", "contiguous")
        problem = Problem(rng, [20, 9])
        problem.lens = worlds.array(rng, (4,), "int32")[::2]
        problem.refused(world, cc.StrideError, "seq_lens", "contiguous")
        problem = Problem(rng, [20, 9], lse=None)
        problem.out = worlds.Spec(wide.buffer, 0, (2, 4, 32), (0, 64, 2), "bfloat16")
        problem.refused(world, cc.StrideError, "out", "share memory")

    def test_a_result_that_cannot_be_written(self, rng):
        problem, world = Problem(rng, [20]), worlds.NumPyWorld()
        world.put(problem.out)
        made = world.put(problem.out)
        made.flags.writeable = False
        with pytest.raises(cc.NotWritableError, match="out"):
            problem.run(world, out=made)

    @pytest.mark.parametrize("name", ["query", "caches", "table", "lens"])
    def test_no_array(self, rng, name):
        problem = Problem(rng, [20])
        setattr(problem, name, (None, None) if name == "caches" else None)
        with pytest.raises(cc.DTypeError, match="paged_attention: "):
            problem.run(worlds.NumPyWorld())


def test_every_storage_of_a_format_is_taken(rng):
    """The 8-bit dtype itself, or bytes."""
    for name, stored in attending.STORED.items():
        for dtype in ("uint8", stored):
            caches = [np.zeros((1, 4, 1, 8), formats.DTYPES[dtype].numpy) for _ in "kv"]
            made = cc.paged_attention(
                np.ones((1, 1, 8), np.float16), *caches, np.zeros((1, 1), np.int32),
                np.ones(1, np.int32), kv_cache_dtype=name,
            )  # fmt: skip
            assert made.shape == (1, 1, 8) and not made.any()
    check_faults("paged_attention", ())
