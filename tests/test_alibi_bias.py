# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import worlds
from gathers import bounds_out_of_order
from guards import check_faults

import cupy_cache as cc
from cupy_cache.runtime import launch

DTYPES = ("float32", "float16", "bfloat16")


def values(numbers, dtype="int64"):
    return worlds.of_values(np.asarray(numbers, dtype))


def compute(world, slopes, queries, keys, out=None, **options):
    """Run on ``world``, into ``out`` or a new array; compare with the oracle bit for bit (where the
    slopes are numbers). Returns the bias."""
    specs = [s for s in (slopes, queries, keys, out) if s is not None]
    result = cc.alibi_bias(*map(world.put, (slopes, queries, keys)), out=world.put(out), **options)
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    given = [s.on(expected[id(s.buffer)]) for s in (slopes, queries, keys)]
    wanted = options.pop("dtype", None)
    if out is None:
        dtype = worlds.formats.DTYPES[wanted or "float32"].numpy
        bias = np.zeros([len(g) for g in given], dtype)
    else:
        bias = out.on(expected[id(out.buffer)])
    oracle.alibi_bias(*given, bias, **options)
    if out is None:
        world.synchronize()
        result = as_numpy(world, result)
        assert result.dtype == bias.dtype and result.shape == bias.shape
        np.testing.assert_array_equal(bits(result), bits(bias))
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])
    return bias


def as_numpy(world, result):
    """NumPy has no bfloat16 of its own for torch to convert to."""
    if str(result.dtype) == "torch.bfloat16":
        import torch

        return world.numpy(result.view(torch.uint16)).view(worlds.formats.DTYPES["bfloat16"].numpy)
    return world.numpy(result)


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sqrt", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_worked_values(world, sqrt, causal, dtype):
    """Slopes 1/2 and 1/4, a query at 4, keys at 0, 3, 4 and 8; squares, so that roots are exact."""
    out = worlds.of_values(np.zeros((2, 1, 4), worlds.formats.DTYPES[dtype].numpy))
    options = {"sqrt": sqrt, "causal": causal}
    bias = compute(
        world, values([0.5, 0.25], "float32"), values([4]), values([0, 3, 4, 8]), out, **options
    )
    ahead = -np.inf if causal else 0.0 if sqrt else 4.0
    row = np.array([-2.0 if sqrt else -4.0, -1.0, 0.0, ahead])
    assert bias[:, 0].astype(float).tolist() == [(0.5 * row).tolist(), (0.25 * row).tolist()]


@pytest.mark.kernels_later
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [("int32", "int64"), ("int64", "int32"), ("int64", "int64")])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 40), (2, 3, 33), (5, 2, 300), (4, 9, 7)])
def test_every_dtype(world, rng, dtype, index, shape):
    heads, rows, columns = shape
    slopes = (2.0 ** -rng.uniform(0, 8, heads)).astype(np.float32)
    queries, keys = (rng.integers(0, 10**6, n).astype(t) for n, t in zip((rows, columns), index))
    specs = worlds.of_values(slopes), worlds.of_values(queries), worlds.of_values(keys)
    for options in ({}, {"sqrt": True}, {"causal": True}, {"sqrt": True, "causal": True}):
        compute(world, *specs, worlds.array(rng, shape, dtype), **options)


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_a_new_array(world, rng, dtype):
    slopes = values(rng.normal(size=3), "float32")
    compute(world, slopes, values(range(4)), values(range(9)), dtype=dtype)


def test_out_is_returned(world):
    slopes, queries, keys = map(world.put, (values([1], "float32"), values([0]), values([0, 1])))
    out = world.put(values(np.zeros((1, 1, 2)), "float32"))
    assert cc.alibi_bias(slopes, queries, keys, out=out) is out
    assert cc.alibi_bias(slopes, queries, keys, out=out, dtype="float32") is out


def test_the_result_is_of_the_framework_of_the_query_positions():
    torch = pytest.importorskip("torch")
    slopes, *positions = values([0.5], "float32"), values([2]), values([0])
    for world, kind in (
        (worlds.NumPyWorld(), np.ndarray),
        (worlds.TorchWorld(), torch.Tensor),
        (worlds.DLPackWorld(), np.ndarray),
    ):
        result = cc.alibi_bias(
            slopes.on(slopes.buffer.bytes), *map(world.put, positions), dtype="bfloat16"
        )
        assert type(result) is kind
        assert result.tolist() == [[[-1.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", [0, 4, 16])
def test_views_of_a_larger_array(world, rng, dtype, pad):
    """Rows padded to a multiple, as attention needs them; heads in the middle; unaligned starts."""
    padded, shifted = (worlds.array(rng, (6, 9, 40), dtype, pad) for _ in range(2))
    slopes = values(rng.normal(size=3), "float32")
    queries, keys = values(rng.integers(0, 50, 7)), values(rng.integers(0, 50, 33))
    compute(world, slopes, queries, keys, padded[2:5, 1:8, :33], causal=True)
    compute(world, slopes, queries, keys, shifted[::2, :7, 7:], sqrt=True)
    by_query = worlds.array(rng, (7, 3, 33), dtype, pad).permuted(1, 0, 2)
    compute(world, slopes, queries, keys, by_query)


def test_strided_inputs(world, rng):
    slopes = values(rng.normal(size=(4, 3)), "float32")[:, 1]
    queries, keys = values(rng.integers(0, 50, 12))[::3], values(rng.integers(0, 50, (9, 2)))[:, 0]
    compute(world, slopes, queries, keys, causal=True)
    compute(world, slopes[::-1] if isinstance(world, worlds.NumPyWorld) else slopes, queries, keys)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_edges(world, rng, dtype):
    """Slopes that are subnormal, huge, infinite or zero of either sign; differences that float32
    rounds; products that overflow, underflow and lie between two numbers of the dtype."""
    slopes = [0.0, -0.0, 1e-45, -1e-40, 2.0**-149, 1e-38, 3e38, -3e38, 1.0, -1.0, 1 / 3, 2.0**-24]
    queries = [0, 2**24, 2**24 + 1, -(2**31), 2**62, 5, 16843555]
    keys = [1, 2**24 + 1, 2**31, 2**62, -(2**62), 2**25 + 1, 65519, 65520, 0, 5, 2049, 257]
    specs = values(slopes, "float32"), values(queries), values(keys)
    for options in ({}, {"sqrt": True}, {"causal": True}, {"sqrt": True, "causal": True}):
        shape = len(slopes), len(queries), len(keys)
        compute(world, *specs, worlds.array(rng, shape, dtype), **options)


@pytest.mark.parametrize("dtype, one", [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_nan_and_infinite_slopes(world, dtype, one):
    """NaN has all bits but the sign set, whatever NaN the slope is; infinity times 0 is one."""
    specs = values([np.nan, -np.nan, np.inf], "float32"), values([1]), values([0, 1, 2])
    bias = as_numpy(world, cc.alibi_bias(*map(world.put, specs), dtype=dtype, causal=True))
    nan = 2 ** (8 * one - 1) - 1
    assert (bits(bias)[:2, 0, :2] == nan).all() and bits(bias)[2, 0, 1] == nan
    assert bias[2, 0, 0] == -np.inf and (bias[:, 0, 2] == -np.inf).all()


def test_forms_of_other_attention(world):
    """slope * k_pos, and the form that ends with 0."""
    slopes, keys = values([0.5], "float32"), values(range(5))
    for query, row in ((0, [0, 0.5, 1, 1.5, 2]), (4, [-2, -1.5, -1, -0.5, 0])):
        bias = compute(world, slopes, values([query]), keys)
        assert bias.tolist() == [[row]]


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_do(world, rng, shape):
    specs = [worlds.array(rng, (n,), t) for n, t in zip(shape, ("float32", "int64", "int32"))]
    compute(world, *specs)
    compute(world, *specs, worlds.array(rng, shape, "float16"))


@pytest.mark.parametrize("shape", [(1, 70000, 1), (70000, 1, 1)])
def test_more_than_one_dimension_of_a_grid_holds(rng, shape):
    """On NumPy only in size; the emulated kernel's grid is checked by its strides below."""
    slopes, queries, keys = np.ones(shape[0], np.float32), np.arange(shape[1]), np.zeros(1, int)
    bias = cc.alibi_bias(slopes, queries, keys)
    np.testing.assert_array_equal(bias[0, :, 0], -np.arange(shape[1], dtype=np.float32))


def test_a_grid_that_must_stride(world, rng, monkeypatch):
    """Queries and heads beyond what one launch's grid has, were the grid that small."""
    monkeypatch.setattr(launch, "MAX_GRID_YZ", 2)
    specs = values(rng.normal(size=5), "float32"), values(range(7)), values(range(40))
    compute(world, *specs, worlds.array(rng, (5, 7, 40), "float16"), causal=True)


# --- ragged batches -------------------------------------------------------------------------------


def ragged(rng, counts, contexts, spare=(0, 0), types=("int64",) * 4):
    """Specs of positions of queries and keys, and of the starts of both: sequences of so many
    queries, which are the last of so many keys. ``spare``: further queries and keys."""
    queries = [np.arange(n - count, n) for count, n in zip(counts, contexts)]
    numbers = (
        np.concatenate([*queries, np.arange(spare[0])]),
        np.concatenate([*map(np.arange, contexts), np.arange(spare[1])]),
        np.cumsum([0, *counts]),
        np.cumsum([0, *contexts]),
    )
    return [worlds.of_values(n.astype(t)) for n, t in zip(numbers, types)]


def compute_ragged(world, slopes, specs, out, **options):
    """Run into ``out``, and compare with the oracle bit for bit."""
    given = [slopes, *specs]
    put = [world.put(spec) for spec in given]
    cc.alibi_bias(
        *put[:3], out=world.put(out), query_start_loc=put[3], cu_seq_lens=put[4], **options
    )
    expected = out.buffer.bytes.copy()
    slopes, queries, keys, starts, bounds = (spec.on(spec.buffer.bytes) for spec in given)
    faults = oracle.alibi_bias(
        slopes, queries, keys, out.on(expected), query_start_loc=starts, cu_seq_lens=bounds,
        **options,
    )  # fmt: skip
    if not faults:
        np.testing.assert_array_equal(world.bytes_of(out), expected)
    check_faults("alibi_bias", faults)


def test_a_worked_batch(world):
    """Two queries at 2 and 3 of four keys; one at 0 of one key; a query and a key of nobody's."""
    specs = values([2, 3, 0, 9]), values([0, 1, 2, 3, 0, 7]), values([0, 2, 3]), values([0, 4, 5])
    put = [world.put(spec) for spec in (values([0.5], "float32"), *specs)]
    bias = as_numpy(
        world,
        cc.alibi_bias(*put[:3], query_start_loc=put[3], cu_seq_lens=put[4], causal=True),
    )
    no = -np.inf
    assert bias.tolist() == [[
        [-1.0, -0.5, 0.0, no, no, no], [-1.5, -1.0, -0.5, 0.0, no, no],
        [no, no, no, no, 0.0, no], [no] * 6,
    ]]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("types", [("int64",) * 4, ("int32", "int64", "int32", "int64")])
@pytest.mark.parametrize(
    "counts, contexts",
    [
        ([1, 1, 1], [5, 1, 9]),
        ([3, 0, 2], [7, 4, 2]),
        ([0, 0], [3, 0]),
        ([2], [40]),
        ([1] * 9, [4] * 9),
        ([], []),
    ],
)
def test_ragged_batches(world, rng, dtype, types, counts, contexts):
    spare = rng.integers(0, 3, 2)
    slopes = values(rng.normal(size=3), "float32")
    specs = ragged(rng, counts, contexts, spare, types)
    shape = 3, *(spec.shape[0] for spec in specs[:2])
    for options in ({}, {"sqrt": True, "causal": True}):
        compute_ragged(world, slopes, specs, worlds.array(rng, shape, dtype), **options)


def test_ragged_rows_of_a_wider_array(world, rng):
    """Keys padded to a multiple, more queries and heads than fill a grid's row."""
    slopes = values(rng.normal(size=2), "float32")
    specs = ragged(rng, [4, 3], [20, 13])
    wide = worlds.array(rng, (4, 9, 40), "float16")
    compute_ragged(world, slopes, specs, wide[1:3, 1:8, :33], causal=True)


def test_as_attention_by_sequence(rng):
    """What it is for: one call of attention over all sequences gives what each alone does."""
    counts, contexts, heads = [3, 1], [6, 4], 2
    specs = ragged(rng, counts, contexts)
    queries, keys, starts, bounds = (spec.on(spec.buffer.bytes) for spec in specs)
    slopes = np.array([0.5, 0.25], np.float32)
    bias = cc.alibi_bias(
        slopes, queries, keys, causal=True, query_start_loc=starts, cu_seq_lens=bounds
    )
    scores, numbers = rng.normal(size=bias.shape), rng.normal(size=(heads, len(keys)))

    def attend(scores, numbers):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True) * numbers[:, None]).sum(-1)

    together = attend(scores + bias, numbers)
    for b, (count, context) in enumerate(zip(counts, contexts)):
        rows, columns = slice(starts[b], starts[b + 1]), slice(bounds[b], bounds[b + 1])
        own = cc.alibi_bias(slopes, np.arange(context - count, context), np.arange(context),
                            causal=True)  # fmt: skip
        alone = attend(scores[:, rows, columns] + own, numbers[:, columns])
        np.testing.assert_allclose(together[:, rows], alone, rtol=1e-12)


def test_starts_that_are_garbage(world, rng):
    """Nothing is read for them, they are recorded, and GPUs decide as NumPy does."""
    for _ in range(3):
        starts, bounds = (bounds_out_of_order(rng, 4, rows) for rows in (6, 20))
        specs = values(rng.integers(0, 9, 6)), values(rng.integers(0, 9, 20))
        specs = *specs, worlds.of_values(starts), worlds.of_values(bounds)
        out = worlds.array(rng, (2, 6, 20), "bfloat16")
        slopes = values([0.5, 2.0], "float32")
        compute_ragged(world, slopes, specs, out)
        given = [spec.on(spec.buffer.bytes) for spec in (slopes, *specs)]
        as_numpys = cc.alibi_bias(
            *given[:3], dtype="bfloat16", query_start_loc=given[3], cu_seq_lens=given[4]
        )
        with contextlib.suppress(cc.FaultError):
            cc.raise_faults()
        np.testing.assert_array_equal(bits(out.on(world.bytes_of(out))), bits(as_numpys))


@st.composite
def biases(draw):
    index = st.sampled_from(["int32", "int64"])
    position = st.one_of(st.integers(0, 100), st.integers(-(2**31), 2**31 - 1))
    slope = st.floats(width=32, allow_nan=False, allow_infinity=False)
    slopes = np.array(draw(st.lists(slope, max_size=4)), np.float32)
    queries, keys = (np.array(draw(st.lists(position, max_size=n)), draw(index)) for n in (4, 20))
    flags = {"sqrt": draw(st.booleans()), "causal": draw(st.booleans())}
    padding = draw(st.tuples(*[st.integers(0, 2)] * 3))
    return (slopes, queries, keys), padding, draw(st.sampled_from(DTYPES)), flags


@hypothesis.given(drawn=biases())
def test_any_bias(emulated_world, drawn):
    numbers, padding, dtype, flags = drawn
    shape = [len(n) for n in numbers]
    whole = [n + p for n, p in zip(shape, padding)]
    out = worlds.array(np.random.default_rng(0), whole, dtype)
    out = out[tuple(slice(p, p + n) for n, p in zip(shape, padding))]
    world = emulated_world()
    try:
        compute(world, *map(worlds.of_values, numbers), out, **flags)
    finally:
        world.close()


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self):
        return {
            "slopes": values([0.5, 0.25], "float32"),
            "query_positions": values([0, 1, 2]),
            "key_positions": values([0, 1, 2, 3]),
            "out": values(np.full((2, 3, 4), 7), "float32"),
        }

    def refused(self, world, arguments, error, *words, **options):
        put = {n: world.put(s) for n, s in arguments.items()}
        with pytest.raises(error) as caught:
            cc.alibi_bias(**put, **options)
        assert issubclass(error, cc.CupyCacheError)
        for word in ("alibi_bias", *words):
            assert word in str(caught.value)
        for spec in arguments.values():
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize(
        "name, shape, words",
        [
            ("slopes", (2, 1), ("2 dimensions",)),
            ("slopes", (3,), ("num_heads",)),
            ("query_positions", (), ("0 dimensions",)),
            ("key_positions", (4, 1), ("2 dimensions",)),
            ("out", (2, 3), ("2 dimensions",)),
            ("out", (3, 3, 4), ("num_heads",)),
            ("out", (2, 4, 4), ("num_queries",)),
            ("out", (2, 3, 5), ("num_keys",)),
        ],
    )
    def test_shape(self, world, arguments, rng, name, shape, words):
        arguments[name] = worlds.array(rng, shape, arguments[name].dtype)
        self.refused(world, arguments, cc.ShapeError, *words)

    @pytest.mark.parametrize(
        "name, dtype, expected",
        [
            ("slopes", "float16", "float32"),
            ("query_positions", "float32", "int32 or int64"),
            ("key_positions", "int16", "int32 or int64"),
            ("out", "int32", "float16 or bfloat16 or float32"),
            ("out", "float64", "float32"),
        ],
    )
    def test_dtype(self, world, arguments, rng, name, dtype, expected):
        arguments[name] = worlds.array(rng, arguments[name].shape, dtype)
        self.refused(world, arguments, cc.DTypeError, name, dtype, expected)

    @pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn", "nonsense", 3])
    def test_dtype_of_the_result(self, world, arguments, dtype):
        put = {n: world.put(s) for n, s in arguments.items() if n != "out"}
        with pytest.raises(cc.ArgumentError, match="dtype"):
            cc.alibi_bias(**put, dtype=dtype)

    def test_dtype_other_than_that_of_out(self, world, arguments):
        self.refused(world, arguments, cc.DTypeError, "out", "float16", "float32", dtype="float16")

    def test_gaps_in_rows(self, world, arguments, rng):
        arguments["out"] = worlds.array(rng, (2, 3, 8), "float32")[..., ::2]
        self.refused(world, arguments, cc.StrideError, "out", "contiguous")

    def test_shared_elements_of_out(self, world, arguments):
        arguments["out"].strides = (0, 16, 4)
        self.refused(world, arguments, cc.StrideError, "out")

    @pytest.mark.parametrize(
        "starts, bounds, error, words",
        [
            ([0, 3], None, cc.DTypeError, "cu_seq_lens"),
            (None, [0, 4], cc.DTypeError, "query_start_loc"),
            ([0, 1, 3], [0, 4], cc.ShapeError, "[3] like query_start_loc"),
            ([], [], cc.ShapeError, "cu_seq_lens"),
            ([[0, 3]], [0, 4], cc.ShapeError, "query_start_loc"),
            ([0.0, 3.0], [0, 4], cc.DTypeError, "query_start_loc"),
        ],
    )
    def test_starts(self, world, arguments, starts, bounds, error, words):
        named = {"query_start_loc": starts, "cu_seq_lens": bounds}
        for name, given in named.items():
            if given is not None:
                kind = np.float32 if given and isinstance(given[0], float) else np.int64
                arguments[name] = worlds.of_values(np.array(given, kind))
        self.refused(world, arguments, error, words)

    @pytest.mark.parametrize("name", ["slopes", "query_positions", "key_positions"])
    def test_none(self, world, arguments, name):
        put = {n: world.put(s) for n, s in arguments.items()} | {name: None}
        with pytest.raises(cc.DTypeError, match=name):
            cc.alibi_bias(**put)


def test_read_only_out_is_refused():
    out = np.zeros((1, 1, 1), np.float32)
    out.flags.writeable = False
    with pytest.raises(cc.NotWritableError, match="out"):
        cc.alibi_bias(np.ones(1, np.float32), np.array([0]), np.array([0]), out=out)


def test_devices_must_agree(emulated_world):
    world = emulated_world()
    try:
        with pytest.raises(cc.DeviceError, match="key_positions"):
            cc.alibi_bias(world.put(values([1], "float32")), world.put(values([0])), np.array([0]))
    finally:
        world.close()
