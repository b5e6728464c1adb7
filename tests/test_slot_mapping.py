# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import worlds
from gathers import as_on_numpy, bounds_out_of_order
from guards import BAD, draw_numbers
from slot_mappings import compare, values

import cupy_cache as cc


def compute(world, table, positions, bounds, block_size, out=None, **parallel):
    """Run on ``world``, into ``out`` or a new array, and compare. Returns the slots."""
    specs = table, positions, bounds
    options = {f"cp_{name}": value for name, value in parallel.items()}
    result = cc.slot_mapping(*map(world.put, specs), block_size, out=world.put(out), **options)
    parallel = {"world": parallel.pop("world_size", 1), **parallel}

    def expect(on, slots):
        return oracle.slot_mapping(*map(on, specs), block_size, slots, **parallel)

    return compare(world, "slot_mapping", specs, out, positions.shape, result, expect)


@pytest.mark.parametrize(
    "rank, expected",
    [
        (0, [28, 29, -1, -1, 30, 31, -1, -1, 12, 13, -1, -1]),
        (1, [-1, -1, 28, 29, -1, -1, 30, 31, -1, -1, 12, 13]),
    ],
)
def test_worked_values_with_two_ranks(world, rank, expected):
    slots = compute(
        world, values([[7, 3]], "int32"), values(range(12)), values([0, 12], "int32"), 4,
        world_size=2, rank=rank, interleave=2,
    )  # fmt: skip
    assert slots.tolist() == expected


def test_worked_values(world):
    """Three requests; the second has no tokens; the last two tokens are padding."""
    slots = compute(
        world, values([[5, 2], [9, 9], [0, 7]], "int32"), values([0, 3, 4, 6, 7, 99, -99]),
        values([0, 3, 3, 5], "int32"), 4,
    )  # fmt: skip
    assert slots.tolist() == [20, 23, 8, 30, 31, -1, -1]


def batch(rng, count, width, span, types):
    """Tables with no sensible bound, positions below ``width * span``, and bounds."""
    lengths = rng.integers(0, 7, count) * (rng.random(count) < 0.7)
    bounds = np.cumsum([0, *lengths])
    table = rng.integers(0, 2**31 - 1, (count, width))
    positions = rng.integers(0, min(width * span, 2**31 - 1), bounds[-1])
    return [n.astype(t) for n, t in zip((table, positions, bounds), types)]


@pytest.mark.parametrize(
    "types", [("int32", "int64", "int32"), ("int64", "int32", "int64"), ("int64", "int64", "int64")]
)
@pytest.mark.parametrize("block_size", [1, 7, 16, 262144])
def test_one_rank(world, rng, block_size, types):
    """Slots past 31 bits, from tables of 32 bits too."""
    table, positions, bounds = batch(rng, 6, 5, block_size, types)
    compute(world, *map(worlds.of_values, (table, positions, bounds)), block_size)


@pytest.mark.parametrize("size, interleave", [(2, 1), (3, 4), (4, 128), (8, 16)])
def test_several_ranks(world, rng, size, interleave):
    """Dealing runs of tokens to the ranks in turn: each token is on one rank, and the tokens of a
    rank fill its blocks one after the other."""
    block_size = 256 if interleave != 4 else 12
    tokens = int(rng.integers(1, 3 * block_size * size))
    table = rng.integers(0, 1000, (1, 3))
    first = int(rng.integers(0, 3))  # tokens before those of the request
    specs = values(table), values([*[0] * first, *range(tokens)]), values([first, first + tokens])
    expected = np.full((size, first + tokens), -1)
    dealt = [0] * size
    for token in range(tokens):
        rank = token // interleave % size
        block, offset = divmod(dealt[rank], block_size)
        expected[rank, first + token] = table[0, block] * block_size + offset
        dealt[rank] += 1
    for rank in range(size):
        slots = compute(
            world, *specs, block_size, world_size=size, rank=rank, interleave=interleave
        )
        np.testing.assert_array_equal(slots, expected[rank])


def test_one_rank_ignores_the_interleave(world, rng):
    table, positions, bounds = map(worlds.of_values, batch(rng, 3, 4, 8, ["int32"] * 3))
    compute(world, table, positions, bounds, 8, world_size=1, rank=0, interleave=5)


@pytest.mark.parametrize("extra", [0, 1, 300])
def test_all_of_out_is_written(world, rng, extra):
    """Positions beyond the last request (padding of a CUDA graph), and an ``out`` beyond those."""
    table, positions, bounds = batch(rng, 4, 3, 16, ("int32", "int64", "int32"))
    positions = np.concatenate([positions, [2**62, -5, 0]])
    out = worlds.array(rng, (3 + len(positions) + extra,), "int64")[3:]
    compute(world, *map(worlds.of_values, (table, positions, bounds)), 16, out)


def test_out_is_returned(world, rng):
    table, positions, bounds = map(world.put, (values([[3]]), values([0]), values([0, 1])))
    out = world.put(values([9]))
    assert cc.slot_mapping(table, positions, bounds, 4, out=out) is out


def test_the_result_is_of_the_framework_of_positions(rng):
    torch = pytest.importorskip("torch")
    arguments = values([[3, 4]]), values([0, 5]), values([0, 2])
    for world, kind in (
        (worlds.NumPyWorld(), np.ndarray),
        (worlds.TorchWorld(), torch.Tensor),
        (worlds.DLPackWorld(), np.ndarray),
    ):
        result = cc.slot_mapping(*map(world.put, arguments), 4)
        assert type(result) is kind
        assert result.tolist() == [12, 17]


def test_strided_positions_and_tables(world, rng):
    """A row of positions in three dimensions, laid out either way, and a table in a wider one."""
    table, positions, bounds = batch(rng, 4, 3, 16, ["int64"] * 3)
    stacked = np.stack([positions, positions + 1, positions + 2])
    wide = np.hstack([table, np.full_like(table, -9)])
    for spec in (values(stacked)[0], values(stacked.T)[:, 0]):
        compute(world, values(wide)[:, :3], spec, values(bounds), 16)


@pytest.mark.parametrize("first", [-2, 0, 2])
def test_tokens_that_no_request_owns(world, first):
    """Before the first request, and requests that begin before the first token."""
    compute(world, values([[1], [2]]), values([0, 1, 2, 3, 0]), values([first, first + 2, 4]), 4)


@pytest.mark.parametrize("tokens, count", [(0, 2), (3, 0), (0, 0)])
def test_nothing_to_do(world, rng, tokens, count):
    specs = (
        worlds.array(rng, (count, 2), "int32"),
        worlds.array(rng, (tokens,), "int64"),
        values(np.zeros(count + 1), "int32"),
        16,
    )
    compute(world, *specs)
    compute(world, *specs, worlds.array(rng, (tokens + 2,), "int64"))


@pytest.mark.parametrize("parallel", [{}, {"world_size": 2, "rank": 1, "interleave": 2}])
@pytest.mark.parametrize("kind", ["position", "page", "block"])
def test_values_out_of_range_give_no_slot_and_are_recorded(world, rng, kind, parallel):
    table, positions = rng.integers(0, 9, (3, 2)), rng.integers(0, 8, 12)
    if kind == "block":
        table[1, :] = rng.choice([-1, -(2**31), -(2**63), 2**61, 2**62, 2**63 - 1])
    elif kind == "position":
        positions[5] = rng.choice(BAD)
    else:
        positions[5] = 8 * parallel.get("world_size", 1)
    compute(world, values(table), values(positions), values([0, 4, 8, 12]), 4, **parallel)


@pytest.mark.parametrize("block_size", [1, 3, 2**20, 2**61 + 1, 2**63 - 1])
def test_the_largest_slots(world, block_size):
    """Entries whose slots just fit 64 bits, and the first that might not; and the last position."""
    limit, last = (2**63 - 1) // block_size, block_size - 1
    compute(
        world, values([[limit - 1, 0], [limit, 0], [0, 0]]), values([last, last, 2**63 - 1]),
        values([0, 1, 2, 3]), block_size,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [-(2**31), -1, 8, 2**31 - 1])
def test_int32_values_out_of_range(world, rng, bad):
    compute(
        world, values([[1, min(bad, 5)], [2, 3]], "int32"), values([4, 0, bad], "int32"),
        values([0, 2, 3], "int32"), 4,
    )  # fmt: skip


def test_bounds_that_make_no_sense_stay_inside(world, rng):
    """Which slots come out is not defined, but nothing outside the arrays is touched."""
    bounds = values(rng.choice([*BAD, 0, 3, 9, 12], 6))
    specs = values(rng.integers(0, 9, (5, 2))), values(rng.integers(0, 8, 12)), bounds
    out = worlds.array(rng, (14,), "int64")
    cc.slot_mapping(*map(world.put, specs), 4, out=world.put(out))
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    assert world.bytes_of(out).view(np.int64)[12:].tolist() == [-1, -1]


@st.composite
def batches(draw):
    """Table, positions, bounds, block size, context-parallel options, and entries of out more than
    positions."""
    types = draw(st.sampled_from([("int32", "int64", "int32"), ("int64", "int64", "int64")]))
    count, width = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    interleave, size = draw(st.sampled_from([(1, 1), (1, 1), (1, 3), (4, 2), (3, 4)]))
    block_size = interleave * draw(st.integers(1, 6))

    table = draw_numbers(draw, (count, width), st.integers(0, 2**31 - 1), types[0])
    lengths = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    bounds = np.cumsum([draw(st.integers(-2, 3)), *lengths]).astype(types[2])
    tokens = max(int(bounds[-1]) + draw(st.integers(-2, 3)), 0)
    positions = draw_numbers(draw, (tokens,), st.integers(0, width * block_size * size), types[1])
    rank = draw(st.integers(0, size - 1))
    parallel = {"world_size": size, "rank": rank, "interleave": interleave}
    return (table, positions, bounds), block_size, parallel, draw(st.sampled_from([None, 0, 3]))


@hypothesis.given(batch=batches())
def test_any_batch(emulated_world, batch):
    numbers, block_size, parallel, extra = batch
    out = None
    if extra is not None:
        out = values(np.full(len(numbers[1]) + extra, 77))
    world = emulated_world()
    try:
        compute(world, *map(worlds.of_values, numbers), block_size, out, **parallel)
    finally:
        world.close()


def test_starts_out_of_order(world, rng):
    """A token is of the same request as on NumPy."""
    for count in (1, 3, 40):
        starts = bounds_out_of_order(rng, count, 30)
        specs = [
            worlds.of_values(rng.integers(0, 99, (count, 8)).astype(np.int32)),
            worlds.of_values(rng.integers(0, 32, 30)),
            worlds.of_values(starts.astype(np.int32)),
            worlds.array(rng, (33,), "int64"),
        ]
        as_on_numpy(
            world, specs, lambda *step: cc.slot_mapping(*step[:3], 4, out=step[3]), specs[3:], (),
            must=False,
        )  # fmt: skip


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self):
        return {
            "block_table": values([[1, 2], [3, 4]]),
            "positions": values([0, 1, 2, 3, 4]),
            "query_start_loc": values([0, 3, 5]),
            "out": values([70, 71, 72, 73, 74]),
        }

    def refused(self, world, arguments, error, *words, block_size=4, **options):
        put = {n: world.put(s) for n, s in arguments.items()}
        with pytest.raises(error) as caught:
            cc.slot_mapping(**put, block_size=block_size, **options)
        assert issubclass(error, cc.CupyCacheError)
        for word in ("slot_mapping", *words):
            assert word in str(caught.value)
        for spec in arguments.values():
            if spec is not None:
                np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize(
        "name, shape, words",
        [
            ("block_table", (2,), ("(1 dimension)",)),
            ("block_table", (3, 2), ("query_start_loc",)),
            ("positions", (5, 1), ("2 dimensions",)),
            ("positions", (), ()),
            ("query_start_loc", (3, 1), ("2 dimensions",)),
            ("query_start_loc", (2,), ("[3]", "[2]")),
            ("query_start_loc", (0,), ("[3]", "[0]")),
            ("out", (5, 1), ("2 dimensions",)),
            ("out", (4,), ("at least 5", "[4]")),
        ],
    )
    @pytest.mark.parametrize("new", [False, True])
    def test_shape(self, world, arguments, rng, name, shape, words, new):
        arguments[name] = worlds.array(rng, shape, "int64")
        if new and name != "out":
            arguments["out"] = None
        self.refused(world, arguments, cc.ShapeError, name, *words)

    @pytest.mark.parametrize(
        "name, dtype, expected",
        [
            ("block_table", "int16", "int32 or int64"),
            ("positions", "float32", "int32 or int64"),
            ("query_start_loc", "uint8", "int32 or int64"),
            ("out", "int32", "int64"),
        ],
    )
    def test_dtype(self, world, arguments, rng, name, dtype, expected):
        arguments[name] = worlds.array(rng, arguments[name].shape, dtype)
        self.refused(world, arguments, cc.DTypeError, name, dtype, expected)

    @pytest.mark.parametrize("name", ["block_table", "query_start_loc", "out"])
    def test_gaps(self, world, arguments, rng, name):
        shape = arguments[name].shape
        arguments[name] = worlds.array(rng, (*shape[:-1], 2 * shape[-1]), "int64")[..., ::2]
        self.refused(world, arguments, cc.StrideError, name, "contiguous")

    def test_shared_entries_of_out(self, world, arguments):
        arguments["out"].strides = (0,)
        self.refused(world, arguments, cc.StrideError, "out")

    @pytest.mark.parametrize("block_size", [0, -4, 1.5, "16", None, True])
    def test_block_size(self, world, arguments, block_size):
        self.refused(world, arguments, cc.ArgumentError, "block_size", block_size=block_size)

    @pytest.mark.parametrize(
        "name, options",
        [
            ("cp_world_size", {"cp_world_size": 0}),
            ("cp_rank", {"cp_rank": 1}),
            ("cp_rank", {"cp_world_size": 2, "cp_rank": 2}),
            ("cp_rank", {"cp_world_size": 2, "cp_rank": -1}),
            ("cp_rank", {"cp_world_size": 2, "cp_rank": 0.5}),
            ("cp_interleave", {"cp_world_size": 2, "cp_interleave": 0}),
            ("cp_interleave", {"cp_world_size": 2, "cp_interleave": 3}),
            ("block_size", {"block_size": 2**62, "cp_world_size": 2}),
        ],
    )
    def test_context_parallel_options(self, world, arguments, name, options):
        self.refused(world, arguments, cc.ArgumentError, name, **options)

    @pytest.mark.parametrize("name", ["block_table", "positions", "query_start_loc"])
    @pytest.mark.parametrize("new", [False, True])
    def test_none(self, world, arguments, name, new):
        put = {n: world.put(s) for n, s in arguments.items()} | {name: None}
        if new:
            put["out"] = None
        with pytest.raises(cc.DTypeError, match=name):
            cc.slot_mapping(**put, block_size=4)


def test_read_only_out_is_refused():
    out = np.zeros(1, np.int64)
    out.flags.writeable = False
    with pytest.raises(cc.NotWritableError, match="out"):
        cc.slot_mapping(np.zeros((1, 1), np.int64), np.array([0]), np.array([0, 1]), 4, out=out)


def test_the_alignment_of_positions_makes_no_plan(world, rng):
    """They are read one by one."""
    from cupy_cache.ops.slot_mapping import OP

    counts = []
    for pad in (0, 8):
        positions = worlds.Buffer(9 * 8 + pad, None, fill=0).view((9,), "int64", pad)
        table = worlds.of_values(rng.integers(0, 99, (2, 4)).astype(np.int32))
        bounds = worlds.of_values(np.array([0, 4, 9], np.int32))
        put = [world.put(spec) for spec in (table, positions, bounds)]
        cc.slot_mapping(*put, 8, out=world.put(worlds.array(rng, (9,), "int64")))
        counts.append(len(OP.memory))
    assert counts[0] == counts[1] > 0
