# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import itertools
import threading
import types
from pathlib import Path

import attending
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import worlds
from attending import (
    NOT_FINITE,
    ODD_STARTS,
    Latent,
    check_not_finite,
    garbage_starts,
    with_starts,
)
from guards import BAD

import cupy_cache as cc
from cupy_cache.attention import paged_attention_mla as module
from cupy_cache.runtime import formats, launch

DTYPES = ("float16", "bfloat16", "float32")
MODEL = (576, 512)  # elements of an entry, and of its latent part


def borders(block_size):
    """Lengths at which something may go wrong."""
    return [0, 1, block_size - 1, block_size, block_size + 1, 5 * block_size, 5 * block_size + 3]


# --- one query for each sequence ------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(world, rng, layout, dtype):
    Latent(rng, borders(16), layout=layout, dtype=dtype).solve(world)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_models_entries(world, rng, dtype):
    Latent(rng, [33, 0, 7], sizes=MODEL, dtype=dtype, scale=192**-0.5).solve(world)


@pytest.mark.parametrize("block_size", [1, 5, 8, 16, 32, 64])
def test_block_sizes(world, rng, block_size):
    Latent(rng, [*borders(block_size), 70], block_size=block_size).solve(world)


@pytest.mark.parametrize("heads", [1, 3, 8, 16, 17, 40])
def test_heads(world, rng, heads):
    Latent(rng, [33, 0, 7], heads=heads).solve(world)


@pytest.mark.parametrize(
    "sizes",
    [
        (288, 256), (192, 128), (64, 64), (40, 24), (24, 7), (640, 512), (640, 100), (7, 5),
        (384, 320), (330, 321), (460, 441),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_sizes(world, rng, sizes, kv_cache_dtype):
    problem = Latent(rng, [33, 7], sizes=sizes, heads=2, kv_cache_dtype=kv_cache_dtype)
    problem.solve(world)


@pytest.mark.parametrize("shared", [64 << 10, 99 << 10, 163 << 10])
@pytest.mark.parametrize("sizes", [(508, 500), (300, 290), (448, 384), (64, 48)])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_gpus_with_less_shared_memory(
    emulated_world, rng, monkeypatch, nothing_remembered, shared, sizes, kv_cache_dtype
):
    """Those of sm_75, sm_89 and sm_80: fewer tiles are on their way, and fewer results at a time
    are joined."""
    world = emulated_world()
    try:
        monkeypatch.setattr(launch.driver.active, "shared_memory", lambda device: shared)
        problem = Latent(
            rng, [33, 7, 400], sizes=sizes, heads=2, kv_cache_dtype=kv_cache_dtype, dtype="float16"
        )
        if (shared, kv_cache_dtype) == (64 << 10, "fp8") and sizes[0] > 300:
            with pytest.raises(cc.ShapeError, match="65536 bytes of shared memory that this GPU"):
                problem.run(world)
        else:
            problem.solve(world)
        cc.raise_faults()
    finally:
        world.close()


@pytest.mark.kernels_later
@pytest.mark.parametrize("types", list(itertools.product(["int32", "int64"], repeat=3)))
def test_index_types(world, rng, types):
    Latent(rng, [33, 0, 7], [2, 0, 3], types=types).solve(world)


@pytest.mark.parametrize("scales", ["number", "array"])
@pytest.mark.parametrize("kv_cache_dtype", attending.STORED)
def test_quantised_caches(world, rng, kv_cache_dtype, scales):
    dtype = str(rng.choice(["float16", "bfloat16"]))
    Latent(rng, [33, 0, 16, 70], dtype=dtype, kv_cache_dtype=kv_cache_dtype, scales=scales).solve(
        world
    )


@pytest.mark.parametrize("layout", ["rows", "gaps"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fp8_ds_mla(world, rng, dtype, layout):
    Latent(
        rng, [33, 0, 7, 90], sizes=MODEL, dtype=dtype, kv_cache_dtype="fp8_ds_mla", layout=layout,
        pad=0 if layout == "rows" else 8,
    ).solve(world)  # fmt: skip


def test_what_was_written_is_read(world, rng):
    """By `concat_and_cache_mla`, in each of its formats. Elements of 8 bits are as far off as they
    are: what is read wrongly is further."""
    kv_c, k_pe = (rng.standard_normal((40, size)).astype(np.float16) for size in (512, 64))
    query = worlds.of_values(rng.standard_normal((1, 4, 576)).astype(np.float16))
    exact = None
    for name, bound in (("auto", 2e-3), ("fp8", 0.5), ("int8", 0.5), ("fp8_ds_mla", 0.5)):
        size, dtype = (656, "uint8") if name == "fp8_ds_mla" else (576, "uint8")
        cache = worlds.array(rng, (3, 16, size), "float16" if name == "auto" else dtype)
        scale = 0.03 if name == "int8" else 0.5
        sources = [world.put(worlds.of_values(part)) for part in (kv_c, k_pe)]
        slots = world.put(worlds.of_values(np.arange(40)))
        cc.concat_and_cache_mla(*sources, world.put(cache), slots, name, scale)
        table = world.put(worlds.of_values(np.arange(3, dtype=np.int32)[np.newaxis]))
        lens = world.put(worlds.of_values(np.array([40], np.int32)))
        out = worlds.array(rng, (1, 4, 512), "float16")
        cc.paged_attention_mla(
            world.put(query), world.put(cache), table, lens, scale=0.1, kv_cache_dtype=name,
            kv_scale=scale, out=world.put(out),
        )  # fmt: skip
        got = out.on(world.bytes_of(out)).astype(np.float64)
        if exact is None:
            entries = np.concatenate([kv_c, k_pe], axis=1).astype(np.float64)
            logits = 0.1 * query.on(query.buffer.bytes)[0].astype(np.float64) @ entries.T
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            exact = weights / weights.sum(axis=1, keepdims=True) @ entries[:, :512]
        assert np.abs(got[0] - exact).max() < bound * np.abs(exact).max()


@pytest.mark.kernels_later
def test_strides_and_spare_rows(world, rng):
    """Query and results are cut from wider arrays and have more rows than there are queries."""
    Latent(
        rng, [33, 0, 7], [3, 0, 2], layout="gaps", strided=True, spare=2, lse="heads first"
    ).solve(world)


@pytest.mark.kernels_later
@pytest.mark.parametrize("pad", [2, 4, 8])
def test_alignment(world, rng, pad):
    """Caches at addresses that are no multiples of 16."""
    Latent(rng, [33, 16, 7], pad=pad).solve(world)


# --- sequences that are cut -----------------------------------------------------------------------

# Small enough for long sequences; rows are copied as wholes.
CUT = {"heads": 2, "sizes": (64, 16)}


@pytest.mark.kernels_later
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_long_sequences(world, rng, kv_cache_dtype):
    """Of several groups, the last of which is not whole; of one; and around their borders."""
    lengths = [2100, 1024, 1025, 64, 65, 1, 0]
    Latent(rng, lengths, kv_cache_dtype=kv_cache_dtype, **CUT).solve(world)


@pytest.mark.extra
@pytest.mark.parametrize("processors", [1, 3, 132])
@pytest.mark.parametrize("queries", [None, [1, 0, 9]])
def test_however_the_work_is_shared(emulated_world, rng, processors, queries):
    """Many groups for few processors, few for many, and both in one call."""
    world = emulated_world(processors=processors)
    try:
        Latent(rng, [300, 2100, 1030], queries, **CUT).solve(world)
    finally:
        world.close()


@pytest.mark.extra
@pytest.mark.parametrize("processors", [3, 20])
def test_sequences_of_one_query_and_of_many(emulated_world, rng, processors):
    """Then some lanes of thread blocks have more to do than others."""
    world = emulated_world(processors=processors)
    try:
        Latent(rng, [70, 3, 90, 200, 5, 65], [1, 1, 1, 30, 0, 1], heads=8, sizes=(32, 16)).solve(
            world
        )
    finally:
        world.close()


@hypothesis.given(
    st.integers(1, 1000), st.integers(1, 1000), st.integers(0, 128), st.integers(1, 99)
)
def test_room_for_results(turns, longer, begin, parts):
    """A thread block has some neighbouring parts of a sequence, and a result of each until a group
    begins, and then of each group. There is room for all, whatever the table has room for."""
    log = 0 if turns <= 16 else 1 if turns <= 64 else 2 if turns <= 512 else 3
    of_sequence = -(-turns // (1 << log))
    group = max(16 >> log, -(-of_sequence // 8))
    begin = min(begin, of_sequence)
    end = min(begin + parts, of_sequence)
    whole = min(-(-begin // group) * group, end)
    results = whole - begin + -(-(end - whole) // group)
    assert results <= module._most_results(turns + longer - 1)


# Where a GPU multiplies by warpgroups, units have 16 rows or 32, by the number of heads.
MANY_ROWS = {"sizes": (264, 264), "block_size": 16}


@pytest.mark.extra
@pytest.mark.each("heads", "warpgroups")
@pytest.mark.parametrize("warpgroups", [True, False])
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("heads, lengths", [(16, [130, 7, 0]), (40, [70, 3]), (70, [70, 3])])
def test_units_of_many_rows(emulated_world, rng, heads, lengths, processors, warpgroups):
    dtype = str(rng.choice(["float16", "bfloat16"]))
    world = emulated_world(processors=processors, warpgroups=warpgroups)
    try:
        Latent(rng, lengths, heads=heads, dtype=dtype, **MANY_ROWS).solve(world)
    finally:
        world.close()


@pytest.mark.extra
@pytest.mark.parametrize("queries", [None, [2, 1]])
def test_long_sequences_of_many_rows(emulated_world, rng, queries):
    """Cut into several parts, which one thread block computes, or several."""
    found = []
    problem = Latent(rng, [70, 330], queries, heads=34, **MANY_ROWS)
    for processors in (1, 3, 132):
        world = emulated_world(processors=processors, warpgroups=True)
        try:
            problem.solve(world)
            found.append(rows_of(world, problem))
        finally:
            world.close()
    assert found.count(found[0]) == len(found)


@pytest.mark.extra
def test_more_sequences_than_threads(world, rng):
    """That look for what there is to do."""
    Latent(rng, [int(n) for n in rng.integers(0, 70, 300)], heads=1, sizes=(16, 16)).solve(world)


# --- several queries for each sequence ------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_several_queries(world, rng, causal):
    """The whole sequence, its end, one token, none, and more queries than tokens."""
    Latent(rng, [9, 40, 17, 33, 2, 0], [9, 5, 1, 0, 4, 2], causal=causal).solve(world)


def test_prefill(world, rng):
    Latent(rng, [130, 64], [130, 40], **CUT).solve(world)


@pytest.mark.kernels_later
def test_logarithms_are_optional(world, rng):
    Latent(rng, [9, 0, 20], lse=None).solve(world)


def test_new_result(world, rng):
    problem = Latent(rng, [9, 0, 20], dtype="float16")
    problem.run(world)
    written = problem.out.on(world.bytes_of(problem.out))[:3]
    new = world.numpy(problem.run(world, out=None, lse=None))
    np.testing.assert_array_equal(new, written)


# --- logits that are not ordinary -----------------------------------------------------------------


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
    """All equal, one huge, ascending, descending. They are the last element of the entries, which
    is no value."""
    logits = [float(np.float16(x)) for x in logits]
    problem = Latent(rng, [len(logits)], heads=1, dtype="float16", scale=1.0)
    query = problem.query.on(problem.query.buffer.bytes)
    query[...] = 0
    query[0, 0, -1] = 1
    (cache,) = problem.caches
    entries = cache.on(cache.buffer.bytes)
    for (_, block, offset), logit in zip(problem.seen[0][2], logits):
        problem.numbers[0][block, offset, 0, -1] = entries[block, offset, -1] = logit
    problem.solve(world)


@pytest.mark.kernels_later
@pytest.mark.parametrize("where, number", NOT_FINITE)
@pytest.mark.parametrize("lengths", [[40, 7], [900], [40] * 40])
def test_what_is_no_number_stays_none(world, rng, where, number, lengths):
    check_not_finite(Latent(rng, lengths, dtype="float16"), world, where, number)


# --- what is out of range -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [b for b in BAD if -(2**31) <= b] + [6 * 3 + 2])
def test_blocks_out_of_range_are_recorded(world, rng, bad):
    Latent(
        rng, [90, 40, 3], [2, 20, 1], width=6, types=("int64", "int32", "int64"), bad={(0, 1): bad}
    ).solve(world)


@pytest.mark.kernels_later
def test_a_sequence_of_which_no_block_is_there(world, rng):
    Latent(rng, [40, 20], bad={(0, page): 1000 + page for page in range(3)}).solve(world)


@pytest.mark.parametrize("bad", [*BAD, 97])
def test_lengths_out_of_range_are_recorded(world, rng, bad):
    problem = Latent(rng, [90, bad, 3], [2, 4, 1], width=6, types=("int32", "int64", "int32"))
    problem.solve(world)


def test_a_table_without_width(world, rng):
    problem = Latent(rng, [3, 0], width=0)
    assert problem.faults == {(0, "seq_lens", 3, 1)}
    problem.solve(world)


def test_sequences_without_queries_are_not_looked_at(world, rng):
    Latent(rng, [20, -5, 2**31 - 1], [1, 0, 0], width=2).solve(world)


@pytest.mark.kernels_later
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("starts", ODD_STARTS)
def test_starts_out_of_order(world, rng, starts, causal):
    """Those outside the query, or below an earlier one, count as the nearest that is neither."""
    with_starts(Latent, rng, starts, [40, 30], 5, causal).solve(world)


@pytest.mark.extra
def test_starts_that_are_garbage(world, rng):
    for starts, lengths, rows in garbage_starts(rng):
        named = {"heads": 5, "sizes": (16, 16)}
        with_starts(Latent, rng, starts, lengths, rows, **named).solve(world)


def test_nothing_to_do(world, rng):
    for problem in (Latent(rng, []), Latent(rng, [], [], spare=3), Latent(rng, [5], [0])):
        problem.solve(world)


# --- the same bits in any batch -------------------------------------------------------------------


def rows_of(world, problem):
    """The bits of what is written, by row."""
    problem.run(world)
    out = problem.out.on(world.bytes_of(problem.out))
    lse = problem.lse.on(world.bytes_of(problem.lse))
    return [(o.tobytes(), one.tobytes()) for o, one in zip(out, lse)]


@pytest.mark.parametrize("queries", [None, [1, 3, 1, 2]])
@pytest.mark.parametrize(
    "shape",
    [
        CUT,
        pytest.param(MANY_ROWS | {"heads": 32}, marks=pytest.mark.extra),
        pytest.param(MANY_ROWS | {"heads": 66}, marks=pytest.mark.extra),
    ],
)
def test_same_bits_in_any_batch(world, rng, queries, shape):
    """A batch in another order, padded with empty sequences, and one sequence at a time."""
    if shape is not CUT and world.name == "emulated":
        pytest.skip("takes minutes; test_long_sequences_of_many_rows is the like of it")
    lengths = [1100, 33, 130, 64]
    problem = Latent(rng, lengths, queries, **shape)
    counts = queries or [1] * len(lengths)
    starts = np.concatenate([[0], np.cumsum(counts)])
    whole = rows_of(world, problem)
    table = problem.table.on(problem.table.buffer.bytes)
    query = problem.query.on(problem.query.buffer.bytes).view(np.uint16)

    def part(order, padding, width):
        """The same sequences in this order, then empty ones."""
        rows = [r for b in order for r in range(starts[b], starts[b + 1])]
        rows += [0] * padding
        other = Latent(rng, [lengths[b] for b in order] + [0] * padding,
                       queries and [counts[b] for b in order] + [1] * padding,
                       width=width, **shape)  # fmt: skip
        other.caches = problem.caches
        entries = np.full((len(order) + padding, width), 10**6, np.int32)
        entries[: len(order), : table.shape[1]] = table[order]
        other.table = worlds.of_values(entries)
        other.query = worlds.of_values(query[rows], "bfloat16")
        count = len(rows) - padding
        assert rows_of(world, other)[:count] == [whole[r] for r in rows[:count]]

    width = table.shape[1]
    part(list(rng.permutation(len(lengths))), 3, width)
    part([1, 0, 2], 0, width + 30)
    part([0], 150, width)
    for sequence in range(len(lengths)):
        part([sequence], 0, width)


@pytest.mark.extra
@pytest.mark.parametrize("kv_cache_dtype, warpgroups", [("auto", 0), ("auto", 1), ("fp8", 0)])
def test_same_bits_however_the_work_is_shared(emulated_world, rng, kv_cache_dtype, warpgroups):
    problem = Latent(rng, [70, 2100, 300], kv_cache_dtype=kv_cache_dtype, heads=16, sizes=(64, 16))
    found = []
    for processors in (1, 3, 20, 132):
        world = emulated_world(processors=processors, warpgroups=bool(warpgroups))
        try:
            found.append(rows_of(world, problem))
        finally:
            world.close()
    assert found.count(found[0]) == len(found)


# --- any problem ----------------------------------------------------------------------------------


@st.composite
def problems(draw, **fixed):
    """Arguments of `Latent`; ``fixed`` ones, and the others drawn. Sizes are small."""
    named = {
        "block_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
        "sizes": draw(st.sampled_from([(16, 16), (24, 8), (48, 32), (5, 3)])),
        "layout": draw(st.sampled_from(["rows", "gaps"])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "kv_cache_dtype": draw(st.sampled_from(["auto", *attending.STORED])),
        "heads": draw(st.sampled_from([1, 2, 5, 16, 18])),
    } | fixed  # fmt: skip
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
        "scales": draw(maybe(["number", "array"])), "spare": draw(maybe([0, 0, 2])),
        "lse": draw(maybe([None, "rows", "heads first"])), "scale": draw(maybe([0.0, 0.2, -1.0])),
        "causal": draw(st.booleans()), "strided": draw(st.booleans()),
        "pad": draw(maybe([0, 0, 16])),
    }  # fmt: skip


@hypothesis.settings(max_examples=100)
@hypothesis.given(drawn=problems())
def test_any_problem(drawn):
    rng, lengths, named = drawn
    Latent(rng, lengths, **named).solve(worlds.NumPyWorld())


# What the kernels are compiled for.
POOL = (
    {"block_size": 16, "sizes": (48, 32), "layout": "rows", "dtype": "bfloat16",
     "kv_cache_dtype": "auto", "heads": 5},
    {"block_size": 3, "sizes": (24, 8), "layout": "gaps", "dtype": "float16",
     "kv_cache_dtype": "fp8", "heads": 18},
)  # fmt: skip


# Of the indices, where not all: every further combination is two kernels more.
TYPES = (("int64", "int32", "int64"), ("int32", "int64", "int32"))


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
            Latent(rng, lengths, **named).solve(world)
        finally:
            world.close()

    solve()


# --- plans ----------------------------------------------------------------------------------------


def test_other_numbers_need_no_other_plan(rng):
    """Lengths, widths and scales change with steps and layers."""
    many, world = Latent(rng, [20] * 9), worlds.NumPyWorld()
    many.run(world, scale=1.0)
    before = len(module.OP.memory)
    for number in range(2, 9):
        step = Latent(rng, [20] * number, width=2)
        step.caches, step.table = many.caches, many.table[:, : 1 + number % 2]
        step.lens = worlds.of_values(np.full(number, 16, np.int32))
        step.run(world, scale=1 / number)
    assert len(module.OP.memory) == before


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("element_bytes", [1, 2])
@pytest.mark.parametrize("sizes", [(640, 512), (640, 128), MODEL, (512, 128), (256, 256), (48, 32)])
def test_shared_memory(sizes, element_bytes):
    """Of sm_90's 228 KiB each thread block takes one for itself. What the kernels' arrays of fixed
    sizes take is what the compiler says on sm_80, which reserves none."""
    text = (Path(__file__).parent / "resources" / "paged_attention_mla.txt").read_text("utf-8")
    kernels = [line for line in text.splitlines() if "| paged_attention_mla<" in line]
    fixed = max(int(line.partition("|")[0].split()[3]) for line in kernels)
    shape = module._shape("", launch.NOWHERE, *sizes, element_bytes, False)
    assert shape.resident * (1024 + fixed + shape.shared) <= 228 << 10
    assert fixed <= module.FIXED_SHARED


class TestRefusals:
    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("query", (3, 4), "bfloat16", cc.ShapeError, ("query", "2 dimensions")),
            ("query", (3, 4, 47), "bfloat16", cc.ShapeError, ("kv_cache", "47 elements")),
            ("query", (3, 4, 31), "bfloat16", cc.ShapeError, ("query", "kv_lora_rank = 32")),
            ("query", (3, 3, 48), "bfloat16", cc.ShapeError, ("out",)),
            ("query", (3, 4, 48), "float16", cc.DTypeError, ("kv_cache", "float16")),
            ("query", (3, 4, 48), "int16", cc.DTypeError, ("query", "float32", "int16")),
            ("query", (2, 4, 48), "bfloat16", cc.ShapeError, ("seq_lens", "query_start_loc")),
            ("table", (2, 3), "int32", cc.ShapeError, ("block_table", "3 sequences")),
            ("table", (9,), "int32", cc.ShapeError, ("block_table",)),
            ("table", (3, 3), "int16", cc.DTypeError, ("block_table", "int32 or int64")),
            ("lens", (3,), "uint64", cc.DTypeError, ("seq_lens", "uint64")),
            ("lens", (3, 1), "int32", cc.ShapeError, ("seq_lens",)),
            ("starts", (3,), "int32", cc.ShapeError, ("query_start_loc", "[4]", "[3]")),
            ("starts", (4,), "float32", cc.DTypeError, ("query_start_loc",)),
            ("out", (3, 4, 31), "bfloat16", cc.ShapeError, ("out", "32 elements")),
            ("out", (2, 4, 32), "bfloat16", cc.ShapeError, ("out", "at least 3")),
            ("out", (3, 4, 32), "float32", cc.DTypeError, ("out", "bfloat16")),
            ("lse", (4, 3), "float32", cc.ShapeError, ("lse", "num_heads")),
            ("lse", (2, 4), "float32", cc.ShapeError, ("lse", "at least 3")),
            ("lse", (3, 4), "float64", cc.DTypeError, ("lse", "float32")),
        ],
    )  # fmt: skip
    def test_arguments(self, world, rng, name, shape, dtype, error, words):
        problem = Latent(rng, [20, 9, 3])
        setattr(problem, name, worlds.array(rng, shape, dtype))
        problem.refused(world, error, *words)

    def test_a_rank_that_no_memory_has(self):
        """It is looked at before the result is made."""
        query, cache = np.zeros((1, 4, 48), np.float32), np.zeros((9, 16, 48), np.float32)
        step = np.zeros((1, 1), np.int32), np.ones(1, np.int32)
        with pytest.raises(cc.ShapeError, match="paged_attention_mla: .*query.*kv_lora_rank"):
            cc.paged_attention_mla(query, cache, *step, scale=1.0, kv_lora_rank=1 << 60)

    @pytest.mark.parametrize(
        "shape, dtype, error, words",
        [
            ((9, 16, 1, 48), "bfloat16", cc.ShapeError, ("kv_cache", "4 dimensions")),
            ((9, 16, 40), "bfloat16", cc.ShapeError, ("kv_cache", "48 elements")),
            ((9, 16, 48), "uint8", cc.DTypeError, ("kv_cache", "bfloat16")),
        ],
    )
    def test_caches(self, world, rng, shape, dtype, error, words):
        problem = Latent(rng, [20, 9, 3])
        problem.caches = [worlds.array(rng, shape, dtype)]
        problem.refused(world, error, *words)

    def test_entries_of_another_size(self, world, rng):
        problem = Latent(rng, [20])
        problem.refused(world, cc.ShapeError, "query", "576 elements", kv_cache_dtype="fp8_ds_mla")
        problem = Latent(rng, [20], sizes=MODEL, kv_cache_dtype="fp8_ds_mla")
        problem.caches = [worlds.array(rng, (4, 16, 576), "uint8")]
        problem.refused(world, cc.ShapeError, "kv_cache", "656 elements")
        problem = Latent(rng, [20], sizes=MODEL, kv_cache_dtype="fp8_ds_mla")
        problem.query = worlds.array(rng, (1, 4, 576), "float32")
        problem.refused(world, cc.DTypeError, "query", "float16 or bfloat16")

    @pytest.mark.parametrize("sizes", [(641, 512), (600, 513)])
    def test_sizes_beyond_the_kernels(self, world, rng, sizes):
        problem = Latent(rng, [20], sizes=sizes)
        if world.on_gpu:
            problem.refused(world, cc.ShapeError, "query", "at most")
        else:
            problem.solve(world)

    @pytest.mark.parametrize(
        "name, value",
        [
            ("scale", float("nan")), ("scale", float("inf")), ("scale", "1"), ("scale", True),
            ("scale", None), ("kv_lora_rank", 0), ("kv_lora_rank", 32.0), ("kv_lora_rank", True),
            ("kv_cache_dtype", "fp9"), ("kv_cache_dtype", None),
        ],
    )  # fmt: skip
    def test_values(self, world, rng, name, value):
        problem = Latent(rng, [20])
        problem.refused(world, cc.ArgumentError, name, str(value), **{name: value})

    def test_scale_of_the_cache(self, world, rng):
        problem = Latent(rng, [20], kv_cache_dtype="fp8")
        for value in (0.0, -1.0, float("nan"), True):
            problem.refused(world, cc.ArgumentError, "kv_scale", str(value), kv_scale=value)
        for shape, dtype, error in (
            ((3,), "float32", cc.ShapeError),
            ((1,), "float16", cc.DTypeError),
        ):
            scale = worlds.array(rng, shape, dtype)
            problem.refused(world, error, "kv_scale", kv_scale=scale)

    def test_strides(self, world, rng):
        problem = Latent(rng, [20, 9])
        wide = worlds.array(rng, (2, 4, 96), "bfloat16")
        problem.query = wide[..., ::2]
        problem.refused(world, cc.StrideError, "query", "contiguous")
        problem = Latent(rng, [20, 9])
        problem.out = worlds.array(rng, (2, 4, 64), "bfloat16")[..., ::2]
        problem.refused(world, cc.StrideError, "out", "contiguous")
        problem = Latent(rng, [20, 9])
        problem.lens = worlds.array(rng, (4,), "int32")[::2]
        problem.refused(world, cc.StrideError, "seq_lens", "contiguous")
        problem = Latent(rng, [20, 9], lse=None)
        problem.out = worlds.Spec(wide.buffer, 0, (2, 4, 32), (0, 64, 2), "bfloat16")
        problem.refused(world, cc.StrideError, "out", "share memory")

    def test_a_result_that_cannot_be_written(self, rng):
        problem, world = Latent(rng, [20]), worlds.NumPyWorld()
        made = world.put(problem.out)
        made.flags.writeable = False
        with pytest.raises(cc.NotWritableError, match="out"):
            problem.run(world, out=made)

    @pytest.mark.parametrize("name", ["query", "caches", "table", "lens"])
    def test_no_array(self, rng, name):
        problem = Latent(rng, [20])
        setattr(problem, name, (None,) if name == "caches" else None)
        with pytest.raises(cc.DTypeError, match="paged_attention_mla: "):
            problem.run(worlds.NumPyWorld())


def test_every_storage_of_a_format_is_taken():
    """The 8-bit dtype itself, or bytes."""
    for name, stored in attending.STORED.items():
        for dtype in ("uint8", stored):
            cache = np.zeros((1, 4, 8), formats.DTYPES[dtype].numpy)
            made = cc.paged_attention_mla(
                np.ones((1, 1, 8), np.float16), cache, np.zeros((1, 1), np.int32),
                np.ones(1, np.int32), scale=1.0, kv_lora_rank=6, kv_cache_dtype=name,
            )  # fmt: skip
            assert made.shape == (1, 1, 6) and not made.any()


def test_both_kernels_of_a_first_call_are_loaded_at_the_same_time():
    """Each may take long to compile."""
    meeting = threading.Barrier(2, timeout=60)

    def fake():
        made = types.SimpleNamespace(loaded=False, streams=[])

        def load(stream):
            meeting.wait()
            made.loaded = True
            made.streams.append(stream)

        made.load = load
        return made

    first, second = fake(), fake()
    two = module._Two(first, second, (1, 1, 1), 32)
    for _ in range(2):
        two.load(7)
    assert two.loaded
    assert first.streams == second.streams == [7]
