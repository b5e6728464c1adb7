# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import attending
import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import worlds
from gathers import refused

import cupy_cache as cc
from cupy_cache.attention import merge_attn_states as module
from cupy_cache.runtime import formats

NAMES = "output", "prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output_lse"
# Pairs of logarithms of every kind.
PAIRS = [
    (0.0, 0.0), (1.5, -2.0), (-3.0, 4.0), (100.0, -100.0), (-1000.0, 1000.0), (-200.0, -199.0),
    (-np.inf, 0.3), (0.3, -np.inf), (np.inf, 0.3), (0.3, np.inf), (-np.inf, -np.inf),
    (np.inf, np.inf), (np.inf, -np.inf),
]  # fmt: skip


def rows_of(rng, shape, dtype, pad=0, strided=False):
    """A view of rows of numbers."""
    tokens, heads, size = shape
    spec = worlds.array(rng, (tokens, heads + strided, size + 8 * strided), dtype, pad)
    spec = spec[:, strided:, :size]
    spec.on(spec.buffer.bytes)[...] = rng.standard_normal(shape)
    return spec


def lse_of(values, transposed=False):
    """A view of logarithms [head, token]."""
    spec = worlds.of_values((values.T if transposed else values).astype(np.float32))
    return spec.permuted(1, 0) if transposed else spec


def problem(
    rng, tokens, heads, size, dtype, *, spare=0, with_lse=True, pads=(0, 0, 0), strided=False,
    transposed=False,
):  # fmt: skip
    """Specs of the arguments. A row whose logarithm is infinite holds NaN, but not where both
    are."""
    pairs = np.array(PAIRS)[rng.integers(0, len(PAIRS), (heads, tokens + spare))]
    close = rng.random((heads, tokens + spare)) < 0.5
    pairs[close] = rng.normal(0, 2, pairs.shape)[close]
    rows = [
        rows_of(rng, (tokens + more, heads, size), dtype, pad, strided)
        for pad, more in zip(pads, (0, spare, spare))
    ]
    unused = np.isinf(pairs)
    unused[unused.all(axis=-1)] = False
    for side, spec in enumerate(rows[1:]):
        spec.on(spec.buffer.bytes)[unused[..., side].T] = np.nan
    lses = [lse_of(pairs[..., side], transposed) for side in (0, 1)]
    out_lse = worlds.array(rng, (heads, tokens + spare), "float32") if with_lse else None
    return [rows[0], rows[1], lses[0], rows[2], lses[1], out_lse]


def merge(world, specs):
    """Run, and compare whole storages with the loops."""
    cc.merge_attn_states(*map(world.put, specs))
    compare(world, specs)


def compare(world, specs):
    present = [s for s in specs if s is not None]
    copies = {id(s.buffer): s.buffer.bytes.copy() for s in present}
    inputs = {id(s.buffer): s.buffer.bytes for s in present}
    output, lse = specs[0], specs[5]
    exact = np.full(output.shape, 7.0)
    exact_lse = np.full((output.shape[1], output.shape[0]), 7.0)
    values = [s and s.on(inputs[id(s.buffer)]) for s in specs]
    oracle.merge_attn_states(exact, *values[1:5], exact_lse)
    for spec in present:
        got, expected = world.bytes_of(spec), copies[id(spec.buffer)]
        if spec.buffer in (output.buffer, lse and lse.buffer):
            merged = output if spec.buffer is output.buffer else lse
            size = formats.DTYPES[merged.dtype].bytes
            bits = worlds.Spec(
                merged.buffer, merged.offset, merged.shape, merged.strides, f"uint{8 * size}"
            )
            written = np.s_[:] if merged is output else np.s_[:, : output.shape[0]]
            numbers = merged.on(got)[written]
            if merged is output:
                # An ulp of what is summed; where that is float32, more: so are the weights.
                eps = float(attending.ml_dtypes.finfo(numbers.dtype).eps)
                eps *= 4 if numbers.dtype == np.float32 else 1
                sides = [
                    np.nan_to_num(np.abs(values[i][: len(exact)].astype(float))) for i in (1, 3)
                ]
                allowed = eps * np.maximum(*sides) + 1e-7
                assert (np.abs(numbers.astype(np.float64) - exact) <= allowed).all()
            else:
                np.testing.assert_allclose(numbers, exact_lse, rtol=1e-6, atol=1e-6)
            bits.on(expected)[written] = bits.on(got)[written]
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [1, 3, 24, 64, 96, 128, 256, 512, 999, 2400])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sizes(world, rng, dtype, size):
    merge(world, problem(rng, 7, 3, size, dtype))


@pytest.mark.parametrize("tokens, heads", [(1, 1), (2, 33), (70, 8), (300, 1)])
def test_counts(world, rng, tokens, heads):
    merge(world, problem(rng, tokens, heads, 32, "bfloat16", with_lse=False))


@pytest.mark.parametrize("pads", [(0, 0, 0), (16, 0, 16), (0, 8, 0), (2, 0, 0), (0, 0, 6)])
def test_alignment(world, rng, pads):
    merge(world, problem(rng, 5, 2, 48, "float16", pads=pads))


@pytest.mark.parametrize("transposed", [False, True])
def test_strides_and_spare_rows(world, rng, transposed):
    """Rows are cut from wider arrays, and the sides have more than there are to merge."""
    specs = problem(rng, 5, 3, 40, "bfloat16", strided=True, spare=3, transposed=transposed)
    merge(world, specs)


@pytest.mark.kernels_later
@pytest.mark.parametrize("pair", PAIRS)
def test_kinds_of_logarithms(world, rng, pair):
    specs = problem(rng, 4, 2, 16, "float32")
    for spec, value in zip((specs[2], specs[4]), pair):
        spec.on(spec.buffer.bytes)[...] = value
    for spec in (specs[1], specs[3]):
        spec.on(spec.buffer.bytes)[...] = rng.standard_normal(spec.shape)
    merge(world, specs)
    if pair[0] in (np.inf, -np.inf) and pair[1] in (np.inf, -np.inf):
        got, prefix = specs[0].on(world.bytes_of(specs[0])), specs[1].on(specs[1].buffer.bytes)
        np.testing.assert_array_equal(got, prefix)
        assert np.isneginf(specs[5].on(world.bytes_of(specs[5]))).all()


def test_a_row_is_copied_whatever_it_holds(world, rng):
    """Where neither side weighs anything: bit patterns of every kind."""
    specs = [
        worlds.array(rng, (5, 2, 64), "bfloat16"), worlds.array(rng, (5, 2, 64), "bfloat16"),
        lse_of(np.full((2, 5), -np.inf)), worlds.array(rng, (5, 2, 64), "bfloat16"),
        lse_of(np.full((2, 5), np.inf)), None,
    ]  # fmt: skip
    cc.merge_attn_states(*map(world.put, specs))
    np.testing.assert_array_equal(world.bytes_of(specs[0]), specs[1].buffer.bytes)


def test_not_a_number(world, rng):
    """Of a logarithm: it makes its row and its logarithm NaN, whichever side's it is."""
    specs = problem(rng, 2, 1, 8, "float32")
    for side, spec in enumerate((specs[2], specs[4])):
        lse = spec.on(spec.buffer.bytes)
        lse[...] = 0.5
        lse[0, side] = np.nan
    cc.merge_attn_states(*map(world.put, specs))
    assert np.isnan(specs[0].on(world.bytes_of(specs[0]))).all()
    assert np.isnan(specs[5].on(world.bytes_of(specs[5]))).all()


@pytest.mark.parametrize("side", [0, 1])
def test_in_place(world, rng, side):
    """The results take a side's place."""
    specs = problem(rng, 40, 3, 256, "float16")
    apart = worlds.NumPyWorld()
    cc.merge_attn_states(*map(apart.put, specs))
    wanted = [specs[i].on(apart.bytes_of(specs[i])) for i in (0, 5)]
    specs[0], specs[5] = specs[1 + 2 * side], specs[2 + 2 * side]
    cc.merge_attn_states(*map(world.put, specs))
    for i, values in zip((0, 5), wanted):
        got = specs[i].on(world.bytes_of(specs[i])).astype(np.float64)
        np.testing.assert_allclose(got, values.astype(np.float64), rtol=2e-3, atol=1e-3)


def test_parts_of_an_attention_are_the_whole(world, rng):
    """Of 50 tokens, seen in two parts."""
    whole = attending.Problem(rng, [50, 50], heads=(2, 1), dtype="float32", block_size=10)
    wanted = whole.exact()
    table = whole.table.on(whole.table.buffer.bytes)
    specs = [worlds.array(rng, (2, 2, 32), "float32"), *[None] * 4]
    for side, (pages, length) in enumerate(((slice(0, 3), 30), (slice(3, 5), 20))):
        made = worlds.NumPyWorld()
        part = attending.Problem(
            rng, [length, length], heads=(2, 1), dtype="float32", block_size=10
        )
        part.query, part.caches = whole.query, whole.caches
        part.table = worlds.of_values(np.ascontiguousarray(table[:, pages]))
        part.run(made)
        specs[1 + 2 * side] = worlds.of_values(part.out.on(made.bytes_of(part.out))[:2])
        lse = part.lse.on(made.bytes_of(part.lse))
        specs[2 + 2 * side] = lse_of(lse.T, transposed=True)
    specs.append(worlds.array(rng, (2, 2), "float32"))
    cc.merge_attn_states(*map(world.put, specs))
    got, lse = (specs[i].on(world.bytes_of(specs[i])) for i in (0, 5))
    for row in range(2):
        np.testing.assert_allclose(got[row], wanted[row][0], atol=1e-5)
        np.testing.assert_allclose(lse[:, row], wanted[row][1], atol=1e-5)


def test_no_tokens(world, rng):
    merge(world, problem(rng, 0, 3, 16, "float16", spare=2))


# tokens vary; what is compiled does not
POOL = [(3, 48, "float16"), (2, 20, "float32"), (1, 576, "bfloat16")]


@hypothesis.given(
    shape=st.sampled_from(POOL), tokens=st.integers(0, 40), spare=st.integers(0, 3),
    with_lse=st.booleans(), strided=st.booleans(), transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any(emulated_world, shape, tokens, seed, **named):
    heads, size, dtype = shape
    world = emulated_world()
    try:
        merge(world, problem(np.random.default_rng(seed), tokens, heads, size, dtype, **named))
    finally:
        world.close()


def test_other_numbers_of_tokens_need_no_other_plan(rng):
    world = worlds.NumPyWorld()
    merge(world, problem(rng, 9, 3, 16, "float16"))
    before = len(module.OP.memory)
    for tokens in range(1, 9):
        merge(world, problem(rng, tokens, 3, 16, "float16"))
    assert len(module.OP.memory) <= before + 1  # of logarithms at odd multiples of 4 bytes


class TestRefusals:
    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("output", (5, 3, 15), "float16", cc.ShapeError, ("prefix_output", "head_size")),
            ("output", (5, 48), "float16", cc.ShapeError, ("output", "2 dimensions")),
            ("output", (5, 3, 16), "int16", cc.DTypeError, ("output", "float32", "int16")),
            ("prefix_output", (5, 3, 16), "float32", cc.DTypeError, ("prefix_output", "float16")),
            ("prefix_output", (4, 3, 16), "float16", cc.ShapeError, ("prefix_output", "least 5")),
            ("suffix_output", (5, 4, 16), "float16", cc.ShapeError, ("suffix_output", "num_heads")),
            ("prefix_lse", (3, 4), "float32", cc.ShapeError, ("prefix_lse", "at least 5")),
            ("prefix_lse", (5, 3), "float32", cc.ShapeError, ("prefix_lse", "num_heads")),
            ("suffix_lse", (3, 5), "float16", cc.DTypeError, ("suffix_lse", "float32")),
            ("suffix_lse", (15,), "float32", cc.ShapeError, ("suffix_lse",)),
            ("output_lse", (3, 4), "float32", cc.ShapeError, ("output_lse", "at least 5")),
        ],
    )  # fmt: skip
    def test_arguments(self, world, rng, name, shape, dtype, error, words):
        specs = problem(rng, 5, 3, 16, "float16")
        specs[NAMES.index(name)] = worlds.array(rng, shape, dtype)
        refused(world, cc.merge_attn_states, specs, error, "merge_attn_states: Invalid", *words)

    @pytest.mark.parametrize("index", [0, 1, 3])
    def test_elements_that_are_not_contiguous(self, world, rng, index):
        specs = problem(rng, 5, 3, 16, "float16")
        specs[index] = worlds.array(rng, (5, 3, 32), "float16")[..., ::2]
        refused(world, cc.merge_attn_states, specs, cc.StrideError, NAMES[index], "contiguous")

    def test_logarithms_that_share_memory(self, world, rng):
        specs = problem(rng, 5, 3, 16, "float16")
        storage = worlds.array(rng, (16,), "float32").buffer
        specs[5] = worlds.Spec(storage, 0, (3, 5), (4, 4), "float32")
        refused(world, cc.merge_attn_states, specs, cc.StrideError, "output_lse", "share")
