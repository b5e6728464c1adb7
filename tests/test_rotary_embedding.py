# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import rotating
import worlds

import cupy_cache as cc

NAME = "rotary_embedding"
# heads, of keys, head size, rotary_dim, offset, dtype, of the table, NeoX
SHAPES = (
    (4, 2, 64, 64, 0, "bfloat16", "float32", True),
    (4, 2, 64, 64, 0, "bfloat16", "bfloat16", False),
    (3, 1, 64, 32, 0, "float16", "float32", True),
    (2, 2, 64, 32, 32, "bfloat16", "float32", False),
    (3, 0, 128, 128, 0, "float32", "float32", True),
    (1, 1, 46, 10, 3, "bfloat16", "float32", True),
    (2, 1, 23, 6, 5, "float16", "float16", False),
    (5, 3, 2, 2, 0, "float32", "float32", False),
    (1, 1, 512, 256, 256, "bfloat16", "bfloat16", True),
)


def case(rng, heads, kv_heads, size, rotary, dtype="bfloat16", table="float32", tokens=5, axes=()):
    """Positions, queries, keys (None where there are no heads of them) and a table, as specs."""
    kinds = [(heads, size)] + [(kv_heads, size)] * (kv_heads > 0)
    rows = rotating.packed_projection(rng, tokens + 1, kinds, dtype)
    positions = rng.integers(0, rotating.POSITIONS, (*axes, tokens))
    positions = positions.astype(rng.choice(["int32", "int64"]))
    table = rotating.table(rng, rotary, table)
    return worlds.of_values(positions), rows[0], rows[1] if kv_heads else None, table


def check(world, specs, is_neox, offset=0, inverse=False, sections=None, interleaved=False):
    """Run on ``world``, and compare whole storages with loops, and with NumPy's."""
    _, query, key, table = specs
    size = query.shape[2]

    def run(world):
        put = [None if s is None else world.put(s) for s in specs]
        cc.rotary_embedding(
            *put[:3], size, put[3], is_neox, offset, inverse, mrope_section=sections,
            mrope_interleaved=interleaved,
        )  # fmt: skip

    run(world)
    numpy = worlds.NumPyWorld()
    run(numpy)
    before = [None if s is None else s.on(s.buffer.bytes) for s in specs]
    expected, got = query.buffer.bytes.copy(), world.bytes_of(query)
    end = offset + table.shape[1]
    for spec, array in ((query, before[1]), (key, before[2])):
        if spec is None:
            continue
        was, now = spec.on(expected), spec.on(got)
        heads = rotating.heads_of(
            array, before[3], before[0], is_neox, offset, sections, interleaved, inverse
        )
        for (token, head), row in heads.items():
            rotating.check_row(now[token, head, offset:end], row[offset:end])
            was[token, head, offset:end] = now[token, head, offset:end]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got, numpy.bytes_of(query))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(
    "heads, kv_heads, size, rotary, offset, dtype, table, is_neox", SHAPES
)  # fmt: skip
def test_every_shape(
    world, rng, heads, kv_heads, size, rotary, offset, dtype, table, is_neox, inverse
):
    specs = case(rng, heads, kv_heads, size, rotary, dtype, table)
    check(world, specs, is_neox, offset, inverse)


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sections", [(16, 8, 8), (5, 12, 15), (32, 0, 0)])
def test_sections(world, rng, sections, interleaved, is_neox):
    specs = case(rng, 3, 1, 64, 64, axes=(3,))
    check(world, specs, is_neox, sections=sections, interleaved=interleaved)


def test_back_and_forth(world, rng):
    """Quarters of turns: back is exactly where it was."""
    rows = [worlds.of_values(rng.integers(1, 99, (4, 2, 8)).astype(np.float16)) for _ in "qk"]
    table = np.array([[0, -1, 0, 1, 1, 0, -1, 0]], np.float16)
    positions = worlds.of_values(np.zeros(4, np.int64))
    put = [world.put(s) for s in (positions, *rows)]
    for inverse in (False, True):
        cc.rotary_embedding(*put, 8, world.put(worlds.of_values(table)), True, inverse=inverse)
        same = [np.array_equal(world.bytes_of(s), s.buffer.bytes) for s in rows]
        assert same == [inverse, inverse]


@pytest.mark.parametrize("is_neox", [True, False])
def test_worked_rotation(world, is_neox):
    """By hand: angles with cosine 3/5, sine 4/5, and -4/5, 3/5; turned back, (5, 15) becomes (3 +
    12, 9 - 4) and (10, 20) becomes (-8 + 12, -16 - 6); or (5, 10) becomes (3 + 8, 6 - 4) and (15,
    20) becomes (-12 + 12, -16 - 9)."""
    query = worlds.of_values(np.array([[5, 10, 15, 20]], np.float16))
    table = worlds.of_values(np.array([[0.6, -0.8, 0.8, 0.6]], np.float32))
    position = worlds.of_values(np.array([0], np.int32))
    cc.rotary_embedding(
        world.put(position), world.put(query), None, 4, world.put(table), is_neox, inverse=True
    )
    expected = [15, 4, 5, -22] if is_neox else [11, 2, 0, -25]
    found = query.on(world.bytes_of(query))[0]
    np.testing.assert_allclose(found.astype(float), expected, atol=2.0**-20)


@pytest.mark.parametrize("bad", [-1, rotating.POSITIONS, 2**62])
def test_positions_outside_the_table(world, rng, bad):
    specs = case(rng, 2, 1, 64, 64)
    specs = worlds.of_values(np.array([3, bad, 4, 0, 1])), *specs[1:]
    check(world, specs, True)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    faults = {(f.op, f.argument, f.row, f.value, f.limit) for f in caught.value.faults}
    assert faults == {(NAME, "positions", 1, bad, rotating.POSITIONS)}


def test_refusals(world, rng):
    positions, query, key, table = map(world.put, case(rng, 2, 1, 64, 64))
    short = world.put(worlds.array(rng, (5,), "int16"))
    for error, word, args in (
        (cc.ArgumentError, "head_size", (positions, query, key, 0, table)),
        (cc.ShapeError, "query", (positions, query, key, 32, table)),
        (cc.ShapeError, "rotary_dim", (positions, query, key, 64, table, True, 2)),
        (cc.ShapeError, "cos_sin_cache", (positions, query, key, 64, query)),
        (cc.DTypeError, "positions", (short, query, key, 64, table)),
        (cc.ArgumentError, "rope_dim_offset", (positions, query, key, 64, table, True, -2)),
    ):
        with pytest.raises(error, match=word) as caught:
            cc.rotary_embedding(*args)
        assert str(caught.value).startswith(f"{NAME}: Invalid ")
    empty = world.put(worlds.array(rng, (0, 64), "float32"))
    with pytest.raises(cc.ShapeError, match="cos_sin_cache: expected at least one position"):
        cc.rotary_embedding(positions, query, key, 64, empty)


def test_rows_that_are_missing(world, rng):
    positions, query, key, table = case(rng, 2, 1, 64, 64)
    for name, given in (("query", (query[:4], key)), ("key", (query, key[:4]))):
        with pytest.raises(cc.ShapeError, match=f"{name}: expected at least 5 rows"):
            cc.rotary_embedding(
                world.put(positions), *map(world.put, given), 64, world.put(table)
            )  # fmt: skip
