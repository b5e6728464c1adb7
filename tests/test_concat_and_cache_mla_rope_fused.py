# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import numpy as np
import oracle
import pytest
import rotating
import worlds

import cupy_cache as cc

NAME = "concat_and_cache_mla_rope_fused"
# heads, latent, rope, rotary_dim, block size, dtype, of the table, NeoX, format
SHAPES = (
    (8, 512, 64, 64, 16, "bfloat16", "bfloat16", False, "auto"),
    (4, 512, 64, 64, 64, "bfloat16", "float32", True, "fp8"),
    (3, 128, 64, 64, 16, "float16", "float16", False, "fp8_e5m2"),
    (2, 24, 8, 4, 3, "float32", "float32", True, "auto"),
    (1, 17, 6, 6, 5, "bfloat16", "float32", False, "int8"),
    (2, 9, 10, 2, 1, "float16", "float32", True, "auto"),
    (16, 256, 32, 32, 4, "float32", "float32", False, "int8"),
)


def case(rng, heads, latent, rope, rotary, block_size, dtype, table, stored, tokens=6, slots=5):
    """q_pe is a part of wider heads, as in a model."""
    wide = worlds.of_values(rotating.numbers(rng, (tokens, heads, rope + 16), dtype))
    compressed = worlds.of_values(rotating.numbers(rng, (tokens, latent + rope), dtype))
    positions = rng.integers(0, rotating.POSITIONS, tokens)
    mapping = rng.permutation(8 * block_size)[:slots]
    mapping[1] = -1
    return (
        worlds.of_values(positions), wide[..., 16:], compressed[:, latent:],
        compressed[:slots, :latent], rotating.table(rng, rotary, table), worlds.of_values(mapping),
        worlds.array(rng, (8, block_size, latent + rope), "uint8" if stored else dtype),
    )  # fmt: skip


def run(world, specs, is_neox, kv_cache_dtype="auto", scale=None):
    scale = world.put(scale) if isinstance(scale, worlds.Spec) else scale
    positions, q_pe, k_pe, kv_c, table, slots, cache = map(world.put, specs)
    cc.concat_and_cache_mla_rope_fused(
        positions, q_pe, k_pe, kv_c, table, is_neox, slots, cache, kv_cache_dtype, scale
    )


def check(world, specs, is_neox, kv_cache_dtype="auto", scale=None):
    """Run on ``world``; compare whole storages with loops, and with NumPy's."""
    run(world, specs, is_neox, kv_cache_dtype, scale)
    numpy = worlds.NumPyWorld()
    run(numpy, specs, is_neox, kv_cache_dtype, scale)
    q_pe, k_pe, kv_c, table, _, cache = specs[1:]
    got = {id(s.buffer): world.bytes_of(s) for s in specs}
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    before = [s.on(s.buffer.bytes) for s in specs]
    stored = oracle.STORED.get(kv_cache_dtype)
    number = 1.0
    if stored:
        number = scale.on(scale.buffer.bytes)[0] if isinstance(scale, worlds.Spec) else scale
    rotary, latent = table.shape[1], kv_c.shape[1]
    turned = rotating.heads_of(before[2][:, np.newaxis], before[4], before[0], is_neox)
    queries = rotating.heads_of(before[1], before[4], before[0], is_neox)
    mapping = before[5].copy()
    tokens = {token for token, _ in turned}
    mapping[[token not in tokens for token in range(len(mapping))]] = -1
    entries = [s.on(expected[id(s.buffer)]) for s in (kv_c, k_pe, cache)]
    oracle.concat_and_cache_mla(*entries, mapping, number, stored)
    was, now = (q_pe.on(kept[id(q_pe.buffer)]) for kept in (expected, got))
    for (token, head), row in queries.items():
        rotating.check_row(now[token, head, :rotary], row[:rotary])
        was[token, head, :rotary] = now[token, head, :rotary]
    was, now = (k_pe.on(kept[id(k_pe.buffer)]) for kept in (expected, got))
    places = [cache.on(kept[id(cache.buffer)]) for kept in (expected, got)]
    for (token, _), row in turned.items():
        rotating.check_row(now[token, :rotary], row[:rotary])
        was[token, :rotary] = now[token, :rotary]
        if token < len(mapping) and 0 <= mapping[token] < 8 * cache.shape[1]:
            at = np.divmod(mapping[token], cache.shape[1])
            rotating.check_row(places[1][at][latent:], row, stored, number)
            places[0][at][latent:] = places[1][at][latent:]
    for spec in specs:
        np.testing.assert_array_equal(got[id(spec.buffer)], expected[id(spec.buffer)])
        np.testing.assert_array_equal(got[id(spec.buffer)], numpy.bytes_of(spec))


@pytest.mark.parametrize(
    "heads, latent, rope, rotary, block_size, dtype, table, is_neox, fmt", SHAPES
)
def test_every_shape(
    world, rng, heads, latent, rope, rotary, block_size, dtype, table, is_neox, fmt
):  # fmt: skip
    specs = case(rng, heads, latent, rope, rotary, block_size, dtype, table, fmt != "auto")
    scale = worlds.of_values(np.array([0.125 + rng.random()], np.float32))
    check(world, specs, is_neox, fmt, scale if rng.random() < 0.5 else 0.375)


def test_padding_is_rotated(world, rng):
    """Of a step without any slot, queries and keys are rotated, and nothing is written."""
    for slots in (5, 0):
        specs = list(case(rng, 2, 24, 8, 8, 4, "bfloat16", "float32", False))
        specs[3], specs[5] = specs[3][:slots], worlds.of_values(np.full(slots, -1))
        check(world, specs, True)
        for spec, changed in ((specs[1], True), (specs[2], True), (specs[6], False)):
            assert np.array_equal(world.bytes_of(spec), spec.buffer.bytes) != changed


def test_worked_entry(world):
    """By hand: (3, 4) turned by the angle with cosine 0.6 and sine 0.8 is (1.8 - 3.2, 2.4 + 2.4);
    in e4m3 with a scale of 2, 1, -1.4 / 2 and 4.8 / 2 are 0x30, 0xB3 (-0.6875) and 0x42 (2.5)."""
    specs = [
        worlds.of_values(np.array([0])), worlds.of_values(np.array([[[3, 4]]], np.float32)),
        worlds.of_values(np.array([[3, 4]], np.float32)),
        worlds.of_values(np.ones((1, 1), np.float32)),
        worlds.of_values(np.array([[0.6, 0.8]], np.float32)), worlds.of_values(np.array([1])),
        worlds.of_values(np.zeros((1, 2, 3), np.uint8)),
    ]  # fmt: skip
    run(world, specs, True, "fp8", 2.0)
    assert world.bytes_of(specs[6]).tolist() == [0, 0, 0, 0x30, 0xB3, 0x42]
    for spec in specs[1:3]:
        found = spec.on(world.bytes_of(spec)).reshape(-1)
        np.testing.assert_allclose(found, [-1.4, 4.8], rtol=2.0**-21)


def test_numbers_outside_their_bounds(world, rng):
    specs = case(rng, 2, 24, 8, 8, 4, "bfloat16", "float32", False)
    specs[0].on(specs[0].buffer.bytes)[2] = rotating.POSITIONS
    specs[5].on(specs[5].buffer.bytes)[3] = 32
    check(world, specs, False)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    found = {(f.op, f.argument, f.row, f.value, f.limit) for f in caught.value.faults}
    assert found and found <= {
        (NAME, "positions", 2, rotating.POSITIONS, rotating.POSITIONS),
        (NAME, "slot_mapping", 3, 32, 32),
    }


def test_refusals(world, rng):
    made = case(rng, 2, 24, 8, 8, 4, "bfloat16", "float32", False)
    positions, q_pe, k_pe, kv_c, table, slots, cache = map(world.put, made)
    narrow, other = (world.put(worlds.array(rng, (8, 4, n), "bfloat16")) for n in (31, 32))
    for error, word, args in (
        (cc.ShapeError, "kv_cache", (positions, q_pe, k_pe, kv_c, table, True, slots, narrow)),
        (cc.ShapeError, "q_pe", (positions, other, k_pe, kv_c, table, True, slots, cache)),
        (cc.ShapeError, "k_pe", (positions, q_pe, q_pe, kv_c, table, True, slots, cache)),
        (cc.DTypeError, "cos_sin_cache", (positions, q_pe, k_pe, kv_c, slots, True, slots, cache)),
        (cc.ArgumentError, "kv_cache_dtype",
         (positions, q_pe, k_pe, kv_c, table, True, slots, cache, "fp8_ds_mla")),
    ):  # fmt: skip
        if word == "cos_sin_cache":
            args = (*args[:4], world.put(worlds.array(rng, (4, 8), "float16")), *args[5:])
        with pytest.raises(error, match=word) as caught:
            cc.concat_and_cache_mla_rope_fused(*args)
        assert str(caught.value).startswith(f"{NAME}: Invalid ")
    for spec in made:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
