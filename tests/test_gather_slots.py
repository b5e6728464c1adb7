# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import worlds
from gathers import cache, check, refused
from guards import draw_numbers

import cupy_cache as cc
from cupy_cache.ops import gather_slots as module

PACKED = ("x-packed-key", "x-packed-value", "interleaved-value")
BLOCKS = 4


def pages(rng, layout, block_size, inner, dtype, pad=0):
    """A cache; of 8 bits with no NaN, whose bits are not defined."""
    if layout in PACKED:
        heads, size = inner
        shapes = (
            (BLOCKS, heads, size // 4, block_size, 4),
            (BLOCKS, heads, size, block_size),
            (BLOCKS, heads, block_size // 4, size, 4),
        )
        spec = worlds.array(rng, shapes[PACKED.index(layout)], dtype, pad)
    else:
        spec = cache(rng, layout, BLOCKS, block_size, inner, dtype, pad)
    if spec.numpy_dtype.itemsize == 1:
        view = spec.on(spec.buffer.bytes)
        view.view(np.uint8)[...] = rng.integers(0, 0x7B, view.shape)
    return spec


def gather(world, specs, kv_cache_dtype="auto", scale=None, by_token=None, layout="NHD",
           block_size=None):  # fmt: skip
    """``specs``: the cache, the rows and the slots. Scales are numbers or specs."""
    names = {"int8_per_token_head": "int8", "fp8_per_token_head": "float8_e4m3fn"}
    stored = (oracle.STORED | names).get(kv_cache_dtype)

    def call(src, dst, slots):
        given = [
            world.put(one) if isinstance(one, worlds.Spec) else one for one in (scale, by_token)
        ]
        cc.gather_slots(
            src, dst, slots, kv_cache_dtype, given[0], scale_cache=given[1], layout=layout
        )  # fmt: skip

    def expect(src, dst, slots):
        bits = src.view(np.uint8) if stored else src

        def token(block, offset):
            if layout in PACKED:
                entry = np.array(oracle.packed_token(bits, block, offset, layout))
            else:
                entry = bits[block, offset]
            if stored is None:
                return entry
            by = scale
            if by_token is not None:
                by = by_token.on(by_token.buffer.bytes)[block, offset]
            elif isinstance(scale, worlds.Spec):
                by = scale.on(scale.buffer.bytes)
            by = np.broadcast_to(by, entry.shape[:1]) if entry.ndim > 1 else [np.ravel(by)[0]]
            heads = entry.reshape(len(by), -1)
            rows = [oracle.dequantise(*head, stored, dst.dtype) for head in zip(heads, by)]
            return np.array(rows, dst.dtype).reshape(entry.shape)

        return oracle.gather_slots(src, dst, slots, block_size=block_size, token=token)

    check(world, specs, call, expect, module.NAME)


# layout, inner dimensions, block size, stored as, kv_cache_dtype, dtype of dst, pads
SHAPES = (
    ("NHD", (576,), 16, "bfloat16", "auto", "bfloat16", 0, 0),
    ("NHD", (2, 9), 3, "float64", "float32", "float64", 0, 8),
    ("pool", (40,), 5, "int8", "int8", "float32", 3, 4),
    ("HND", (3, 16), 4, "float8_e4m3fn", "fp8_e4m3", "float32", 4, 0),
    ("packed", (2, 8), 8, "uint8", "fp8_e5m2", "bfloat16", 8, 0),
    ("x-packed-key", (2, 16), 8, "uint8", "fp8", "float16", 0, 0),
    ("x-packed-value", (3, 10), 4, "float16", "auto", "float16", 0, 0),
    ("interleaved-value", (2, 12), 16, "int8", "int8", "bfloat16", 0, 2),
)


@pytest.mark.parametrize(
    "layout, inner, block_size, storage, kind, dtype, src_pad, dst_pad", SHAPES
)
@pytest.mark.parametrize("scaled_by", ["number", "array", "heads"])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_rows(
    world, rng, layout, inner, block_size, storage, kind, dtype, src_pad, dst_pad, scaled_by, index
):
    """Slots in any order, some twice, some that are padding or past the cache; more rows than
    slots."""
    limit = BLOCKS * block_size
    slots = rng.integers(0, limit, 11)
    slots[rng.integers(0, 11, 3)] = [-1, -7, slots[0]]
    if rng.integers(2):
        slots[rng.integers(11)] = limit + rng.choice([0, 1, 2**20])
    scale = None
    if kind in oracle.STORED:
        scale = float(np.float32(10.0 ** rng.uniform(-3, 3)))
        if scaled_by != "number":
            count = inner[0] if scaled_by == "heads" and len(inner) > 1 else 1
            scale = worlds.of_values(np.float32(10.0 ** rng.uniform(-3, 3, count)))
    specs = (
        pages(rng, layout, block_size, inner, storage, src_pad),
        worlds.array(rng, (13, *inner), dtype, dst_pad),
        worlds.of_values(slots.astype(index)),
    )
    plain = layout if layout in PACKED else "NHD"
    size = block_size if layout in PACKED else None
    gather(world, specs, kind, scale, layout=plain, block_size=size)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int8_per_token_head", "fp8_per_token_head"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_scales_of_tokens_and_heads(world, rng, layout, kind):
    scales = np.float32(10.0 ** rng.uniform(-3, 3, (BLOCKS, 8, 3, 2)))
    specs = (
        pages(rng, layout, 8, (3, 20), "uint8"),
        worlds.array(rng, (9, 3, 20), "float32"),
        worlds.of_values(rng.integers(-2, BLOCKS * 8, 9)),
    )
    gather(world, specs, kind, by_token=worlds.of_values(scales)[..., 1])


def test_whole_blocks_in_order(world, rng):
    """All slots of a contiguous cache: the quick way of NumPy's."""
    specs = (
        pages(rng, "NHD", 8, (2, 4), "float32"),
        worlds.array(rng, (BLOCKS * 8 + 1, 2, 4), "float32"),
        worlds.of_values(rng.permutation(BLOCKS * 8)),
    )
    gather(world, specs)


def test_it_reads_what_was_written(world, rng):
    """To the same slots."""
    rows = [rng.standard_normal((7, 2, 16)).astype(np.float32) for _ in "kv"]
    caches = [worlds.array(rng, (BLOCKS, 8, 2, 16), "float32") for _ in "kv"]
    slots = worlds.of_values(rng.permutation(BLOCKS * 8)[:7])
    put = [world.put(spec) for spec in caches]
    cc.reshape_and_cache_flash(
        *(world.put(worlds.of_values(one)) for one in rows), *put, world.put(slots), "auto"
    )
    for one, cache_of_it in zip(rows, put):
        out = worlds.array(rng, (7, 2, 16), "float32")
        cc.gather_slots(cache_of_it, world.put(out), world.put(slots))
        np.testing.assert_array_equal(out.on(world.bytes_of(out)), one)


@st.composite
def calls(draw):
    kind = draw(st.sampled_from(["auto", "int8", "fp8"]))
    index = draw(st.sampled_from(["int32", "int64"]))
    count = draw(st.integers(0, 9))
    slots = draw_numbers(draw, (count,), st.integers(-2, BLOCKS * 3 - 1), index)
    return kind, slots, draw(st.integers(0, 3)), draw(st.integers(0, 2**32))


@hypothesis.given(given=calls())
def test_any_call(emulated_world, given):
    kind, slots, more, seed = given
    rng = np.random.default_rng(seed)
    world = emulated_world()
    try:
        storage, dtype = ("float16", "float16") if kind == "auto" else ("uint8", "float32")
        specs = (
            pages(rng, "NHD", 3, (2, 5), storage),
            worlds.array(rng, (len(slots) + more, 2, 5), dtype),
            worlds.of_values(slots),
        )
        gather(world, specs, kind, 0.3)
    finally:
        world.close()


def test_no_blocks(world, rng):
    """Then every slot is past the cache."""
    specs = (
        worlds.array(rng, (0, 4, 2, 8), "float32"),
        worlds.array(rng, (3, 2, 8), "float32"),
        worlds.of_values(np.array([0, -1, 5])),
    )
    gather(world, specs)


class TestRefusals:
    def refused(self, world, rng, error, *words, kind="auto", scale=None, layout="NHD", **changed):
        specs = {
            "src_cache": worlds.array(rng, (4, 4, 2, 8), "uint8"),
            "dst": worlds.array(rng, (5, 2, 8), "uint8" if kind == "auto" else "float16"),
            "slot_mapping": worlds.of_values(np.arange(5)),
        } | changed  # fmt: skip

        def call(src, dst, slots):
            given = world.put(scale) if isinstance(scale, worlds.Spec) else scale
            cc.gather_slots(src, dst, slots, kind, given, layout=layout)

        refused(world, call, [*specs.values()], error, "gather_slots", *words)

    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("src_cache", (4, 0, 2, 8), "uint8", cc.ShapeError, "at least one slot"),
            ("src_cache", (4, 4), "uint8", cc.ShapeError, "2 dimensions"),
            ("dst", (5, 2, 9), "uint8", cc.ShapeError, "inner_2"),
            ("dst", (4, 2, 8), "uint8", cc.ShapeError, "at most 4 slots"),
            ("dst", (5, 2, 8), "float32", cc.DTypeError, "uint8"),
            ("slot_mapping", (5, 1), "int64", cc.ShapeError, "2 dimensions"),
            ("slot_mapping", (5,), "int16", cc.DTypeError, "int32"),
        ],
    )
    def test_arrays(self, world, rng, name, shape, dtype, error, words):
        self.refused(world, rng, error, words, **{name: worlds.array(rng, shape, dtype)})

    def test_slots_with_gaps(self, world, rng):
        slots = worlds.of_values(np.arange(10))[::2]
        self.refused(world, rng, cc.StrideError, "slot_mapping", slot_mapping=slots)

    @pytest.mark.parametrize("kind", ["fp8_ds_mla", "int4", None])
    def test_kv_cache_dtype(self, world, rng, kind):
        self.refused(world, rng, cc.ArgumentError, "kv_cache_dtype", str(kind), kind=kind)

    @pytest.mark.parametrize("layout", ["nhd", None])
    def test_layout(self, world, rng, layout):
        self.refused(world, rng, cc.ArgumentError, "layout", str(layout), layout=layout)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), True])
    def test_scale(self, world, rng, scale):
        self.refused(world, rng, cc.ArgumentError, "scale", str(scale), kind="fp8", scale=scale)

    def test_scales_of_too_many_heads(self, world, rng):
        scale = worlds.of_values(np.ones(3, np.float32))
        self.refused(world, rng, cc.ShapeError, "scale", "[3]", kind="fp8", scale=scale)
