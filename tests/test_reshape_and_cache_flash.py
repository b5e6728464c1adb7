# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib

import numpy as np
import oracle
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st

import cupy_cache as cc
from cupy_cache import formats


def caches(rng, layout, num_blocks, block_size, heads, key_size, value_size, dtype, pad=0):
    """Key and value cache views [NB, BS, H, D] in the memory order of ``layout``."""
    if layout == "NHD":
        return (
            worlds.array(rng, (num_blocks, block_size, heads, key_size), dtype, pad),
            worlds.array(rng, (num_blocks, block_size, heads, value_size), dtype, pad),
        )
    if layout == "HND":
        return (
            worlds.array(rng, (num_blocks, heads, block_size, key_size), dtype, pad).permuted(0, 2, 1, 3),
            worlds.array(rng, (num_blocks, heads, block_size, value_size), dtype, pad).permuted(0, 2, 1, 3),
        )
    # One page holds K|V of each (slot, head); a gap between pages stands for other layers.
    inner = (block_size, heads) if layout == "packed-NHD" else (heads, block_size)
    page = worlds.array(rng, (num_blocks, 2, *inner, key_size + value_size), dtype, pad)[:, 0]
    if layout == "packed-HND":
        page = page.permuted(0, 2, 1, 3)
    return page[..., :key_size], page[..., key_size:]


LAYOUTS = ("NHD", "HND", "packed-NHD", "packed-HND")
# heads, key head size, value head size, block size, dtype, pad
SHAPES = (
    (8, 128, 128, 16, "bfloat16", 0),
    (1, 1, 1, 1, "float32", 0),
    (3, 46, 46, 7, "float16", 0),  # rows that are not a multiple of 16 bytes
    (2, 24, 40, 8, "bfloat16", 0),  # key and value head sizes differ
    (5, 17, 9, 3, "float16", 2),  # odd sizes, unaligned start
    (128, 256, 256, 4, "float32", 0),  # far more vectors than any block has threads
)


def slots_for(rng, num_slots, tokens):
    """Distinct random slots with padding among them."""
    slots = rng.permutation(num_slots)[:tokens].astype(np.int64)
    slots[rng.random(tokens) < 0.2] = -rng.integers(1, 2**40)
    return slots


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads, key_size, value_size, block_size, dtype, pad", SHAPES)
def test_every_layout(
    world, rng, layout, heads, key_size, value_size, block_size, dtype, pad
):  # fmt: skip
    num_blocks, tokens = 5, int(min(4 * block_size, rng.integers(1, 12)))
    key = worlds.array(rng, (tokens + 2, heads, key_size), dtype, pad)  # rows beyond the slots
    value = worlds.array(rng, (tokens + 1, heads, value_size), dtype, pad)
    key_cache, value_cache = caches(
        rng, layout, num_blocks, block_size, heads, key_size, value_size, dtype, pad
    )
    slots = slots_for(rng, num_blocks * block_size, tokens)
    slot_dtype = rng.choice(["int32", "int64"])
    slot_mapping = worlds.of_values(np.maximum(slots, -(2**31)).astype(slot_dtype))
    check(world, key, value, key_cache, value_cache, slot_mapping)


def check(world, key, value, key_cache, value_cache, slot_mapping):
    """Run on ``world`` and compare the caches' whole storages with the oracle's."""
    specs = (key, value, key_cache, value_cache, slot_mapping)
    cc.reshape_and_cache_flash(*(world.put(s) for s in specs))
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    oracle.reshape_and_cache_flash(
        *(s.on(expected[id(s.buffer)]) for s in specs)
    )
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


def test_slots_past_the_cache_are_skipped_and_recorded(world, rng):
    key = worlds.array(rng, (6, 2, 8), "float16")
    value = worlds.array(rng, (6, 2, 8), "float16")
    key_cache, value_cache = caches(rng, "NHD", 3, 4, 2, 8, 8, "float16")
    bad = int(rng.choice([12, 13, 2**31, 2**62]))
    slot_mapping = worlds.of_values(np.array([3, -1, 0, bad, 11, -(2**63)], np.int64))
    check(world, key, value, key_cache, value_cache, slot_mapping)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.op, fault.argument) == ("reshape_and_cache_flash", "slot_mapping")
    assert (fault.row, fault.value, fault.limit) == (3, bad, 12)
    cc.raise_faults()


def test_strided_sources_and_slots(world, rng):
    """Key and value cut from one fused projection; every second entry of a slot tensor."""
    tokens, heads, size = 5, 4, 16
    fused = worlds.array(rng, (tokens, 3 * heads, size), "bfloat16")
    key, value = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    slots = worlds.of_values(np.repeat(slots_for(rng, 32, tokens), 2))[::2]
    key_cache, value_cache = caches(rng, "NHD", 4, 8, heads, size, size, "bfloat16")
    check(world, key, value, key_cache, value_cache, slots)


def test_no_tokens(world, rng):
    key = worlds.array(rng, (0, 2, 8), "float32")
    key_cache, value_cache = caches(rng, "NHD", 2, 4, 2, 8, 8, "float32")
    check(world, key, key, key_cache, value_cache, worlds.of_values(np.empty(0, np.int64)))


# heads, bytes of a key head, bytes of a value head, block size: few, since each is compiled.
SPECIALISATIONS = ((1, 32, 32, 4), (3, 24, 40, 5))


@st.composite
def calls(draw):
    """The arguments of a call, as specs: everything that does not need another compile is free."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    heads, key_bytes, value_bytes, block_size = draw(st.sampled_from(SPECIALISATIONS))
    dtype = draw(st.sampled_from([d.name for d in formats.FLOATS]))
    key_size, value_size = (n // formats.DTYPES[dtype].bytes for n in (key_bytes, value_bytes))
    num_blocks = draw(st.integers(1, 6))
    layout = draw(st.sampled_from(LAYOUTS))
    pad = draw(st.sampled_from((0, 0, 4)))  # 4: nothing is aligned to a vector
    key_cache, value_cache = caches(
        rng, layout, num_blocks, block_size, heads, key_size, value_size, dtype, pad
    )

    num_slots = num_blocks * block_size
    slot_type = draw(st.sampled_from((np.int32, np.int64)))
    limits = np.iinfo(slot_type)
    bad = (-1, -num_slots, num_slots, num_slots + 1, 2**31, 2**62, limits.max, limits.min)
    slot = st.integers(0, num_slots - 1) | st.sampled_from([n for n in bad if n <= limits.max])
    slots = draw(st.lists(slot, max_size=20, unique=True))
    every = draw(st.integers(1, 3))
    slot_mapping = worlds.of_values(np.repeat(np.array(slots, slot_type), every))[::every]

    # Rows that are not used, and other heads beside these, as in a fused projection.
    spare, before, after = (draw(st.integers(0, 2)) for _ in range(3))
    sources = [
        worlds.array(rng, (len(slots) + spare, before + heads + after, size), dtype, pad)
        for size in (key_size, value_size)
    ]
    key, value = (source[:, before : before + heads] for source in sources)
    return key, value, key_cache, value_cache, slot_mapping


@given(calls())
def test_any_call(emulated_world, call):
    with contextlib.closing(emulated_world()) as world:
        check(world, *call)
        key_cache, slot_mapping = call[2], call[4]
        limit = key_cache.shape[0] * key_cache.shape[1]
        slots = slot_mapping.on(slot_mapping.buffer.bytes).tolist()
        if any(slot >= limit for slot in slots):
            with pytest.raises(cc.FaultError) as caught:
                cc.raise_faults()
            (fault,) = caught.value.faults
            assert fault.value == slots[fault.row] >= limit == fault.limit
        cc.raise_faults()


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self, rng):
        key_cache, value_cache = caches(rng, "NHD", 3, 4, 2, 8, 8, "float32")
        return {
            "key": worlds.array(rng, (5, 2, 8), "float32"),
            "value": worlds.array(rng, (5, 2, 8), "float32"),
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": worlds.of_values(np.arange(5)),
        }

    def refused(self, world, arguments, error, *words, **options):
        put = {k: world.put(v) if isinstance(v, worlds.Spec) else v for k, v in arguments.items()}
        with pytest.raises(error) as caught:
            cc.reshape_and_cache_flash(*put.values(), **options)
        assert issubclass(error, cc.CupyCacheError)
        for word in ("reshape_and_cache_flash", *words):
            assert word in str(caught.value)
        for spec in arguments.values():
            if isinstance(spec, worlds.Spec):
                np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    def test_more_slots_than_rows(self, world, arguments):
        arguments["slot_mapping"] = worlds.of_values(np.arange(6))
        self.refused(world, arguments, cc.ShapeError, "slot_mapping", "6", "5")

    def test_heads_differ(self, world, arguments, rng):
        arguments["value"] = worlds.array(rng, (5, 3, 8), "float32")
        self.refused(world, arguments, cc.ShapeError, "value", "num_kv_heads")

    def test_rank(self, world, arguments, rng):
        arguments["key"] = worlds.array(rng, (5, 16), "float32")
        self.refused(world, arguments, cc.ShapeError, "key", "2 dimensions")

    def test_dtypes_differ(self, world, arguments, rng):
        arguments["value_cache"] = worlds.array(rng, (3, 4, 2, 8), "float16")
        self.refused(world, arguments, cc.DTypeError, "value_cache", "float32", "float16")

    def test_slot_dtype(self, world, arguments):
        arguments["slot_mapping"] = worlds.of_values(np.arange(5, dtype=np.int16))
        self.refused(world, arguments, cc.DTypeError, "slot_mapping", "int64", "int16")

    def test_inner_stride(self, world, arguments, rng):
        arguments["key"] = worlds.array(rng, (5, 2, 16), "float32")[:, :, ::2]
        self.refused(world, arguments, cc.StrideError, "key", "contiguous")

    def test_overlapping_cache(self, world, arguments, rng):
        cache = arguments["key_cache"]
        cache.strides = (0, *cache.strides[1:])
        self.refused(world, arguments, cc.StrideError, "key_cache", "share")

    def test_kv_cache_dtype(self, world, arguments):
        self.refused(world, arguments, cc.ArgumentError, "kv_cache_dtype", kv_cache_dtype="fp9")

    def test_not_an_array(self, world, arguments):
        arguments["key"] = [[1.0]]
        with pytest.raises(cc.DTypeError, match="key.*list"):
            put = [world.put(v) if isinstance(v, worlds.Spec) else v for v in arguments.values()]
            cc.reshape_and_cache_flash(*put)


def test_read_only_cache_is_refused(rng):
    key = np.zeros((1, 1, 4), np.float32)
    cache = np.zeros((1, 1, 1, 4), np.float32)
    frozen = cache.copy()
    frozen.flags.writeable = False
    with pytest.raises(cc.NotWritableError, match="value_cache"):
        cc.reshape_and_cache_flash(key, key, cache, frozen, np.zeros(1, np.int64))
