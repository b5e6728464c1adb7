# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import worlds
from guards import BAD, draw_numbers
from slot_mappings import compare, values

import cupy_cache as cc
from cupy_cache.ops.slot_mapping_groups import MAX_GROUPS


def compute(world, tables, idx, positions, bounds, sizes, out=None, **options):
    """Run on ``world``, into ``out`` or a new array, and compare. Returns the slots."""
    step = idx, positions, bounds
    named = {f"cp_{n}" if n in ("world_size", "rank", "interleave") else n: v
             for n, v in options.items()}  # fmt: skip
    result = cc.slot_mapping_groups(
        [world.put(table) for table in tables], *map(world.put, step), sizes,
        out=world.put(out), **named,
    )  # fmt: skip
    options = {"world": options.pop("world_size", 1), **options}

    def expect(on, slots):
        return oracle.slot_mapping_groups(
            [on(table) for table in tables], *map(on, step), sizes, slots, **options
        )

    shape = len(tables), *positions.shape
    return compare(world, "slot_mapping_groups", (*tables, *step), out, shape, result, expect)


def batch(rng, widths, rows, count, span, types):
    """Tables, the rows of requests (some have none), positions below ``span`` and bounds."""
    lengths = rng.integers(0, 7, count) * (rng.random(count) < 0.7)
    bounds = np.cumsum([0, *lengths])
    tables = [rng.integers(0, 2**31 - 1, (rows, width)).astype(types[0]) for width in widths]
    idx = rng.permutation(rows)[:count]
    idx[rng.random(count) < 0.2] = -1
    step = idx, rng.integers(0, span, bounds[-1]), bounds
    return [values(t, types[0]) for t in tables], *(values(n, t) for n, t in zip(step, types[1:]))


def test_worked_values(world):
    """Three requests, the second a dummy; blocks of 4 and of 2; two tokens of padding."""
    slots = compute(
        world, [values([[5, 2], [0, 7], [9, 9]], "int32"), values([[3, 8, 1]] * 3, "int32")],
        values([0, -1, 1], "int32"), values([0, 3, 4, 0, 5, 99, -99]),
        values([0, 3, 4, 5], "int32"), [4, 2],
    )  # fmt: skip
    assert slots.tolist() == [[20, 23, 8, -1, 29, -1, -1], [6, 17, 2, -1, 3, -1, -1]]


def test_worked_values_with_two_ranks(world):
    """A sharded group, one that every rank keeps whole, and a disabled one."""
    slots = compute(
        world, [values([[7, 3, 5]], "int32")] * 3, values([0]), values(range(12)),
        values([0, 12], "int32"), [4, 4, 4], enabled=[True, True, False],
        sharded=[True, False, True], world_size=2, rank=1, interleave=2,
    )  # fmt: skip
    assert slots.tolist() == [
        [-1, -1, 28, 29, -1, -1, 30, 31, -1, -1, 12, 13],
        [28, 29, 30, 31, 12, 13, 14, 15, 20, 21, 22, 23],
        [-1] * 12,
    ]


@pytest.mark.parametrize(
    "types",
    [("int32", "int32", "int64", "int32"), ("int64", "int32", "int32", "int64"),
     ("int64",) * 4, ("int32", "int64", "int32", "int64")],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [[16], [1, 7], [16, 262144, 3, 128]])
def test_one_rank(world, rng, sizes, types):
    """Slots past 31 bits, from tables of 32 bits too."""
    widths = [-(-48 // size) for size in sizes]
    compute(world, *batch(rng, widths, 9, 6, 48, types), sizes)


@pytest.mark.parametrize("size, interleave", [(2, 1), (3, 4), (4, 128)])
def test_several_ranks(world, rng, size, interleave):
    sizes = [interleave, 2 * interleave, 3 * interleave]
    given = batch(rng, [24, 12, 8], 5, 4, 24 * interleave, ("int32", "int32", "int64", "int32"))
    for rank in range(size):
        compute(
            world, *given, sizes, sharded=[True, False, True], world_size=size, rank=rank,
            interleave=interleave,
        )  # fmt: skip


def test_block_size_262144_on_four_ranks_with_a_disabled_group(world, rng):
    given = batch(rng, [2, 2], 4, 3, 2**20, ("int32", "int32", "int64", "int32"))
    compute(
        world, *given, [262144, 262144], enabled=[True, False], world_size=4, rank=2,
        interleave=128,
    )  # fmt: skip


def test_groups_are_as_slot_mapping_has_them(world, rng):
    tables, idx, positions, bounds = batch(rng, [3, 6], 6, 4, 48, ["int64"] * 4)
    rows = idx.on(idx.buffer.bytes)
    rows[:] = np.abs(rows)
    slots = compute(world, tables, idx, positions, bounds, [16, 8])
    for table, size, row in zip(tables, [16, 8], slots):
        chosen = table.on(table.buffer.bytes)[rows]
        single = cc.slot_mapping(chosen, *(s.on(s.buffer.bytes) for s in (positions, bounds)), size)
        np.testing.assert_array_equal(single, row)


@pytest.mark.parametrize("extra", [0, 3])
def test_requests_in_order(world, rng, extra):
    """Without idx_mapping; tables may have more rows than there are requests."""
    tables, _, positions, bounds = batch(rng, [3, 4], 4 + extra, 4, 48, ["int64"] * 4)
    compute(world, tables, None, positions, bounds, [16, 16])


@pytest.mark.parametrize("extra", [0, 1, 300])
def test_all_of_out_is_written(world, rng, extra):
    """Positions beyond the last request, an ``out`` beyond those, in rows far apart."""
    tables, idx, positions, bounds = batch(rng, [3, 3], 6, 4, 48, ["int32", *["int64"] * 3])
    positions = values([*positions.on(positions.buffer.bytes), 2**62, -5, 0])
    count = positions.shape[0] + extra
    for out in (
        worlds.array(rng, (2, count), "int64"),
        worlds.array(rng, (4, count + 5), "int64")[1:3, 2 : 2 + count],
    ):
        compute(world, tables, idx, positions, bounds, [16, 16], out)


def test_out_is_returned(world):
    arguments = map(world.put, (values([0]), values([0]), values([0, 1])))
    out = world.put(values([[9]]))
    assert cc.slot_mapping_groups([world.put(values([[3]]))], *arguments, [4], out=out) is out


def test_the_result_is_of_the_framework_of_positions():
    torch = pytest.importorskip("torch")
    for world, kind in (
        (worlds.NumPyWorld(), np.ndarray),
        (worlds.TorchWorld(), torch.Tensor),
        (worlds.DLPackWorld(), np.ndarray),
    ):
        step = map(world.put, (values([0]), values([0, 5]), values([0, 2])))
        result = cc.slot_mapping_groups([world.put(values([[3, 4]]))], *step, [4])
        assert type(result) is kind
        assert result.tolist() == [[12, 17]]


def test_steps_of_many_sizes_share_a_plan(world, rng):
    """A step's requests and tokens, and what was sliced for them, are no part of a signature."""
    table = worlds.array(rng, (8, 4), "int32")
    table.on(table.buffer.bytes)[:] = rng.integers(0, 99, (8, 4))
    for count in (1, 5, 3, 8):
        bounds = np.arange(count + 1) * 2
        positions = values(rng.integers(0, 16, 2 * count))
        out = worlds.Buffer(64 * 8, rng).view((1, 64), "int64")[:, : 2 * count]
        compute(world, [table], values(np.arange(count)), positions, values(bounds), [4], out)
        compute(world, [table[:count]], None, positions, values(bounds), [4])


def test_strided_inputs(world, rng):
    tables, idx, positions, bounds = batch(rng, [3, 3], 6, 4, 48, ["int64"] * 4)
    on = [s.on(s.buffer.bytes) for s in (*tables, idx, positions)]
    wide = values(np.hstack(on[:2]))
    idx, positions = (values(np.repeat(a, 2))[::2] for a in on[2:])
    compute(world, [wide[:, :3], wide[:, 3:]], idx, positions, bounds, [16, 16])


@pytest.mark.parametrize("groups", [MAX_GROUPS, MAX_GROUPS + 1, 2 * MAX_GROUPS + 3])
def test_more_groups_than_one_launch_holds(world, rng, groups):
    given = batch(rng, [3] * groups, 4, 3, 24, ["int32"] * 4)
    enabled = (rng.random(groups) < 0.8).tolist()
    out = worlds.array(rng, (groups, 40), "int64")[:, :30]
    compute(world, *given, [8] * groups, out, enabled=enabled)


def test_a_fault_behind_the_first_launch(world):
    groups = MAX_GROUPS + 2
    tables = [values([[1]])] * (groups - 1) + [values([[-7]])]
    compute(world, tables, None, values([0, 1]), values([0, 2]), [4] * groups)


@pytest.mark.parametrize("tokens, count, rows", [(0, 2, 3), (3, 0, 3), (0, 0, 0), (3, 2, 3)])
def test_nothing_to_do(world, rng, tokens, count, rows):
    tables = [worlds.array(rng, (rows, 2), "int32")]
    step = values(np.full(count, -1)), values(np.zeros(tokens)), values(np.zeros(count + 1))
    compute(world, tables, *step, [16])
    compute(world, tables, *step, [16], worlds.array(rng, (1, tokens + 2), "int64"))


@pytest.mark.parametrize("kind", ["position", "page", "block", "row"])
@pytest.mark.parametrize("parallel", [{}, {"world_size": 2, "rank": 1, "interleave": 2}])
def test_values_out_of_range_give_no_slot_and_are_recorded(world, rng, kind, parallel):
    tables = [rng.integers(0, 9, (3, 2)) for _ in range(2)]
    positions, idx = rng.integers(0, 8, 12), np.array([2, 0, 1])
    if kind == "block":
        tables[1][1, :] = rng.choice([-1, -(2**31), -(2**63), 2**61, 2**62, 2**63 - 1])
    elif kind == "position":
        positions[5] = rng.choice(BAD)
    elif kind == "row":
        idx[1] = rng.choice([b for b in BAD if b > 0] + [3])
    else:
        positions[5] = 8 * parallel.get("world_size", 1)
    compute(
        world, [values(t) for t in tables], values(idx), values(positions),
        values([0, 4, 8, 12]), [4, 4], **parallel,
    )  # fmt: skip


def test_disabled_groups_and_dummy_requests_record_nothing(world):
    """Whatever stands in what belongs to them."""
    compute(
        world, [values([[1], [1]]), values([[-9], [2**62]])], values([0, -5]),
        values([0, 0, 2**40]), values([0, 2, 3]), [4, 4], enabled=[True, False],
    )  # fmt: skip


def test_bounds_that_make_no_sense_stay_inside(world, rng):
    """Which slots come out is not defined, but nothing outside the arrays is touched."""
    bounds = values(rng.choice([*BAD, 0, 3, 9, 12], 6))
    tables = [values(rng.integers(0, 9, (5, 2)))] * 2
    out = worlds.array(rng, (2, 14), "int64")
    step = values(rng.integers(0, 5, 5)), values(rng.integers(0, 8, 12)), bounds
    put = [world.put(s) for s in step]
    cc.slot_mapping_groups([world.put(t) for t in tables], *put, [4, 4], out=world.put(out))
    for spec in (*tables, *step):
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    assert (world.bytes_of(out).view(np.int64).reshape(2, 14)[:, 12:] == -1).all()


@st.composite
def batches(draw):
    groups, rows, count = draw(st.integers(1, 3)), draw(st.integers(0, 4)), draw(st.integers(0, 4))
    interleave, size = draw(st.sampled_from([(1, 1), (1, 3), (4, 2)]))
    index = st.sampled_from(["int32", "int64"])

    sizes = [interleave * draw(st.integers(1, 4)) for _ in range(groups)]
    dtype = draw(index)
    tables = [
        draw_numbers(draw, (rows, draw(st.integers(0, 3))), st.integers(0, 2**31 - 1), dtype)
        for _ in sizes
    ]
    idx = draw_numbers(draw, (count,), st.integers(-1, rows), draw(index))
    lengths = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    bounds = np.cumsum([draw(st.integers(-2, 3)), *lengths]).astype(draw(index))
    tokens = max(int(bounds[-1]) + draw(st.integers(-2, 3)), 0)
    positions = draw_numbers(draw, (tokens,), st.integers(0, 2 * max(sizes) * size), draw(index))
    flags = st.lists(st.booleans(), min_size=groups, max_size=groups)
    options = {
        "world_size": size, "rank": draw(st.integers(0, size - 1)), "interleave": interleave,
        "enabled": draw(st.none() | flags), "sharded": draw(st.none() | flags),
    }  # fmt: skip
    return tables, (idx, positions, bounds), sizes, options, draw(st.sampled_from([None, 0, 3]))


@hypothesis.given(batch=batches())
def test_any_batch(emulated_world, batch):
    tables, step, sizes, options, extra = batch
    out = None
    if extra is not None:
        out = values(np.full((len(tables), len(step[1]) + extra), 77))
    world = emulated_world()
    try:
        compute(world, [values(t, t.dtype) for t in tables], *map(worlds.of_values, step), sizes,
                out, **options)  # fmt: skip
    finally:
        world.close()


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self):
        return {
            "block_tables": [values([[1, 2], [3, 4]]), values([[5], [6], [7]])],
            "idx_mapping": values([0, 1]),
            "positions": values([0, 1, 2, 3, 4]),
            "query_start_loc": values([0, 3, 5]),
            "out": values(np.full((2, 6), 7)),
        }

    def refused(self, world, arguments, error, *words, block_sizes=(4, 8), **options):
        def put(value):
            return [world.put(v) for v in value] if isinstance(value, list) else world.put(value)

        given = {n: put(s) for n, s in arguments.items()}
        with pytest.raises(error) as caught:
            cc.slot_mapping_groups(**given, block_sizes=block_sizes, **options)
        assert issubclass(error, cc.CupyCacheError)
        for word in ("slot_mapping_groups", *words):
            assert word in str(caught.value)
        out = arguments["out"]
        if out is not None:
            np.testing.assert_array_equal(world.bytes_of(out), out.buffer.bytes)

    @pytest.mark.parametrize(
        "name, shape, words",
        [
            ("idx_mapping", (2, 1), ("2 dimensions",)),
            ("idx_mapping", (3,), ("query_start_loc", "[4]", "[3]")),
            ("positions", (5, 1), ("2 dimensions",)),
            ("positions", (), ()),
            ("query_start_loc", (3, 1), ("2 dimensions",)),
            ("query_start_loc", (2,), ("[3]", "[2]")),
            ("query_start_loc", (0,), ("[3]", "[0]")),
            ("out", (12,), ("(1 dimension)",)),
            ("out", (3, 6), ("[3, 6]",)),
            ("out", (2, 4), ("at least 5", "[2, 4]")),
        ],
    )
    @pytest.mark.parametrize("new", [False, True])
    def test_shape(self, world, arguments, rng, name, shape, words, new):
        arguments[name] = worlds.array(rng, shape, "int64")
        if new and name != "out":
            arguments["out"] = None
        self.refused(world, arguments, cc.ShapeError, name, *words)

    def test_shape_of_a_table(self, world, arguments, rng):
        arguments["block_tables"][1] = worlds.array(rng, (3,), "int64")
        self.refused(world, arguments, cc.ShapeError, "block_tables[1]", "(1 dimension)")

    def test_fewer_rows_than_requests(self, world, arguments, rng):
        arguments["idx_mapping"] = None
        arguments["block_tables"][1] = worlds.array(rng, (1, 2), "int64")
        self.refused(world, arguments, cc.ShapeError, "block_tables[1]", "at least 2", "got 1")

    def test_no_bounds(self, world, arguments, rng):
        arguments["idx_mapping"] = None
        arguments["query_start_loc"] = worlds.array(rng, (0,), "int64")
        self.refused(world, arguments, cc.ShapeError, "query_start_loc", "at least 1")

    @pytest.mark.parametrize("tables, error", [([], cc.ShapeError), (None, cc.DTypeError)])
    def test_no_list_of_tables(self, world, arguments, tables, error):
        arguments["block_tables"] = tables
        self.refused(world, arguments, error, "block_tables")

    @pytest.mark.parametrize(
        "name, dtype, expected",
        [
            ("idx_mapping", "int16", "int32 or int64"),
            ("positions", "float32", "int32 or int64"),
            ("query_start_loc", "uint8", "int32 or int64"),
            ("out", "int32", "int64"),
        ],
    )
    def test_dtype(self, world, arguments, rng, name, dtype, expected):
        arguments[name] = worlds.array(rng, arguments[name].shape, dtype)
        self.refused(world, arguments, cc.DTypeError, name, dtype, expected)

    @pytest.mark.parametrize("index, dtype", [(0, "int16"), (1, "int32")])
    def test_dtype_of_a_table(self, world, arguments, rng, index, dtype):
        """Of all tables the first one's."""
        arguments["block_tables"][index] = worlds.array(rng, (3, 2), dtype)
        self.refused(world, arguments, cc.DTypeError, f"block_tables[{index}]", dtype, "int64")

    def test_gaps(self, world, arguments, rng):
        kept = dict(arguments)
        for name in ("out", "query_start_loc"):
            shape = kept[name].shape
            wide = worlds.array(rng, (*shape[:-1], 2 * shape[-1]), "int64")[..., ::2]
            self.refused(world, {**kept, name: wide}, cc.StrideError, name, "contiguous")
        tables = [kept["block_tables"][0], worlds.array(rng, (3, 4), "int64")[:, ::2]]
        self.refused(world, {**kept, "block_tables": tables}, cc.StrideError, "block_tables[1]")

    @pytest.mark.parametrize("stride", [0, 40])
    def test_rows_of_out_that_share_memory(self, world, arguments, stride):
        arguments["out"].strides = (stride, 8)
        self.refused(world, arguments, cc.StrideError, "out", "share")

    @pytest.mark.parametrize("bad", [0, -4, 1.5, "16", None])
    def test_block_size(self, world, arguments, bad):
        self.refused(world, arguments, cc.ArgumentError, "block_sizes[1]", block_sizes=[4, bad])

    @pytest.mark.parametrize(
        "name, options",
        [
            ("block_sizes", {"block_sizes": [4]}),
            ("block_sizes", {"block_sizes": 4}),
            ("enabled", {"enabled": [True]}),
            ("sharded", {"sharded": [True] * 3}),
            ("cp_world_size", {"cp_world_size": 0}),
            ("cp_rank", {"cp_rank": 1}),
            ("cp_rank", {"cp_world_size": 2, "cp_rank": -1}),
            ("cp_interleave", {"cp_world_size": 2, "cp_interleave": 0}),
            ("cp_interleave", {"cp_world_size": 2, "cp_interleave": 8}),
            ("block_sizes[1]", {"block_sizes": [4, 2**62], "cp_world_size": 2}),
        ],
    )
    def test_options(self, world, arguments, name, options):
        self.refused(world, arguments, cc.ArgumentError, name, **options)

    def test_an_interleave_matters_to_sharded_groups_alone(self, world):
        compute(
            world, [values([[1, 2]]), values([[3, 4]])], None, values([0, 3]), values([0, 2]),
            [8, 3], sharded=[True, False], world_size=2, rank=0, interleave=8,
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["positions", "query_start_loc"])
    def test_none(self, world, arguments, name):
        arguments[name] = None
        self.refused(world, arguments, cc.DTypeError, name)


def test_read_only_out_is_refused():
    out = np.zeros((1, 1), np.int64)
    out.flags.writeable = False
    with pytest.raises(cc.NotWritableError, match="out"):
        cc.slot_mapping_groups(
            [np.zeros((1, 1), int)], None, np.array([0]), np.array([0, 1]), [4], out=out
        )


def test_devices_must_agree(emulated_world):
    world = emulated_world()
    try:
        tables = [world.put(values([[1]])), np.array([[1]])]
        step = map(world.put, (values([0]), values([0, 1])))
        with pytest.raises(cc.DeviceError, match="block_tables"):
            cc.slot_mapping_groups(tables, None, *step, [4, 4])
    finally:
        world.close()
