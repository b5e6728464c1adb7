# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib

import ml_dtypes
import numpy as np
import oracle
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st

import cupy_cache as cc
from cupy_cache.ops.shared import mla
from cupy_cache.runtime import arrays, formats


def caches(rng, layout, layers, num_blocks, block_size, entry, dtype, pad=0):
    """Cache views [NB, BS, entry] of all layers."""
    shape = num_blocks, block_size, entry
    if layout == "apart":
        return [worlds.array(rng, shape, dtype, pad) for _ in range(layers)]
    # All layers share the blocks of one pool; there is a gap after each entry.
    pool = worlds.array(rng, (num_blocks, layers, block_size, entry + 4), dtype, pad)
    return [pool[:, layer, :, :entry] for layer in range(layers)]


def sources(rng, layers, tokens, latent, rope, dtype, pad=0):
    """kv_c and k_pe [L, NT, …] cut from buffers that hold more rows and columns."""
    made = []
    for size in (latent, rope):
        spec = worlds.array(rng, (layers, tokens + 2, 3 + size), dtype, pad)
        view = spec.on(spec.buffer.bytes)
        view[...] = rng.normal(size=view.shape) * 20
        made.append(spec[:, 1 : tokens + 1, 3:])
    return made


def slots_for(rng, layers, num_slots, tokens):
    """Distinct random slots for each layer, with padding among them, and one more column."""
    slots = np.stack([rng.permutation(num_slots)[: tokens + 1] for _ in range(layers)])
    slots[rng.random(slots.shape) < 0.2] = -rng.integers(1, 2**31)
    return worlds.of_values(slots.astype(rng.choice(["int32", "int64"])))


class Call:
    """Arguments of a call as specs, and what it must do."""

    def __init__(self, kv_c, k_pe, layers, slots, scales=None, kv_cache_dtype="auto"):
        self.kv_c, self.k_pe, self.layers, self.slots = kv_c, k_pe, layers, slots
        self.scales, self.kv_cache_dtype = scales, kv_cache_dtype

    def specs(self):
        return [s for s in (self.kv_c, self.k_pe, *self.layers, self.slots, self.scales) if s]

    def geometry(self):
        """block_size, block_stride and entry_stride of the caches."""
        first = self.layers[0]
        size = formats.DTYPES[first.dtype].bytes
        return first.shape[1], first.strides[0] // size, first.strides[1] // size

    def run(self, world, form="list"):
        """Call on ``world``, with a list of caches or with their addresses."""
        listed = [world.put(layer) for layer in self.layers]
        arguments, options = [], {}
        if form == "addresses":
            addresses = np.array([arrays.view(layer, "").ptr for layer in listed])
            listed = world.put(worlds.of_values(addresses))
            arguments, options = self.geometry(), {"num_blocks": self.layers[0].shape[0]}
        cc.concat_and_cache_mla_grouped(
            world.put(self.kv_c), world.put(self.k_pe), listed, world.put(self.slots), *arguments,
            kv_scales=world.put(self.scales), kv_cache_dtype=self.kv_cache_dtype, **options,
        )  # fmt: skip

    def check(self, world, form="list"):
        """Run; compare all storages with the oracle's. Returns faults to expect: (row, slot)."""
        self.run(world, form)
        expected = {id(s.buffer): s.buffer.bytes.copy() for s in self.specs()}
        kv_c, k_pe, slots = (
            s.on(expected[id(s.buffer)]) for s in (self.kv_c, self.k_pe, self.slots)
        )
        tokens, stored = kv_c.shape[1], oracle.STORED.get(self.kv_cache_dtype)
        faults = []
        for index, layer in enumerate(self.layers):
            cache = layer.on(expected[id(layer.buffer)])
            scale = self.scales.on(self.scales.buffer.bytes)[index] if self.scales else 1.0
            found = oracle.concat_and_cache_mla(
                kv_c[index], k_pe[index], cache.view(np.uint8) if stored else cache,
                slots[index, :tokens], scale, stored,
            )  # fmt: skip
            faults += [(index * tokens + token, slot) for token, slot in found]
        for spec in self.specs():
            np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])
        return faults


FORMS = ("list", "addresses")
# latent size, rope size, block size, dtype, pad
SHAPES = (
    (512, 64, 64, "bfloat16", 0),
    (256, 0, 5, "float32", 0),
    (37, 1, 16, "float16", 2),
    (1, 64, 1, "bfloat16", 6),
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["apart", "pool"])
@pytest.mark.parametrize("latent, rope, block_size, dtype, pad", SHAPES)
def test_every_shape(world, rng, form, layout, latent, rope, block_size, dtype, pad):
    layers, tokens = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    num_blocks = -(-20 // block_size)
    Call(
        *sources(rng, layers, tokens, latent, rope, dtype, pad),
        caches(rng, layout, layers, num_blocks, block_size, latent + rope, dtype, pad),
        slots_for(rng, layers, num_blocks * block_size, tokens),
    ).check(world, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("latent, rope, block_size, dtype, pad", SHAPES[:3])
def test_scales_of_layers(world, rng, form, stored, latent, rope, block_size, dtype, pad):
    layers, tokens = 3, int(rng.integers(1, 5))
    num_blocks = -(-20 // block_size)
    name = str(rng.choice([name for name in oracle.STORED if oracle.STORED[name] == stored]))
    storage = str(rng.choice([stored, "uint8"]))
    Call(
        *sources(rng, layers, tokens, latent, rope, dtype, pad),
        caches(rng, "pool", layers, num_blocks, block_size, latent + rope, storage, pad),
        slots_for(rng, layers, num_blocks * block_size, tokens),
        worlds.of_values((10.0 ** rng.uniform(-2, 2, layers)).astype(np.float32)),
        name,
    ).check(world, form)


@pytest.mark.parametrize("form", FORMS)
def test_contiguous_sources_and_one_mapping_for_all_layers(world, rng, form):
    """The widest vectors; the mapping's layers share their memory."""
    kv_c, k_pe = (worlds.array(rng, (3, 7, size), "bfloat16") for size in (512, 64))
    mapping = worlds.of_values(rng.permutation(64)[:7])
    mapping.shape, mapping.strides = (3, 7), (0, *mapping.strides)
    Call(kv_c, k_pe, caches(rng, "apart", 3, 4, 16, 576, "bfloat16"), mapping).check(world, form)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_addresses_that_are_not_aligned(world, rng, kv_cache_dtype):
    """The host cannot see them, so the kernel must."""
    layers = [
        worlds.array(rng, (2, 8, 48), "uint8" if kv_cache_dtype == "fp8" else "bfloat16", pad=pad)
        for pad in (0, 2, 8, 14)
    ]
    kv_c, k_pe = (
        worlds.of_values(rng.normal(size=(4, 5, n)).astype(ml_dtypes.bfloat16)) for n in (32, 16)
    )
    scales = worlds.of_values(np.ones(4, np.float32)) if kv_cache_dtype == "fp8" else None
    call = Call(kv_c, k_pe, layers, slots_for(rng, 4, 16, 5), scales, kv_cache_dtype)
    call.check(world, "addresses")


@pytest.mark.parametrize("form", FORMS)
def test_more_layers_than_one_launch_takes(world, rng, form):
    """The parameter block holds `MAX_LAYERS` addresses. Rows of faults count all layers."""
    count = 2 * mla.MAX_LAYERS + 3
    slots = np.stack([rng.permutation(8)[:3] for _ in range(count)])
    slots[mla.MAX_LAYERS + 4, 1] = 8
    call = Call(
        *(worlds.array(rng, (count, 3, size), "float16") for size in (8, 4)),
        caches(rng, "pool", count, 2, 4, 12, "float16"),
        worlds.of_values(slots),
    )
    ((row, _),) = call.check(world, form)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.op, fault.argument) == ("concat_and_cache_mla_grouped", "slot_mapping")
    assert (fault.row, fault.value, fault.limit) == (row, 8, 8)
    assert row == (mla.MAX_LAYERS + 4) * 3 + 1
    cc.raise_faults()


@pytest.mark.parametrize("form", FORMS)
def test_slots_past_a_cache_are_skipped_and_recorded(world, rng, form):
    slots = np.stack([rng.permutation(12)[:4] for _ in range(2)])
    slots[1, 2] = bad = int(rng.choice([12, 13, 2**31, 2**62]))
    slots[0, 1] = -(2**63)
    call = Call(
        *sources(rng, 2, 4, 24, 8, "bfloat16"),
        caches(rng, "pool", 2, 3, 4, 32, "bfloat16"),
        worlds.of_values(slots),
    )
    assert call.check(world, form) == [(6, bad)]
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.row, fault.value, fault.limit) == (6, bad, 12)
    cc.raise_faults()


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(world, rng, form):
    """Strides of arrays without tokens mean nothing, now or later."""
    call = small_call(rng)
    call.kv_c = call.kv_c[:, :0]
    call.k_pe = call.k_pe[:, :0]
    call.k_pe.strides = (3, 1, 1)
    call.check(world, form)


def test_the_number_of_tokens_is_no_part_of_the_plan(world, rng):
    """Slices of the same buffers are planned once."""
    from cupy_cache.ops import concat_and_cache_mla_grouped as module

    call = small_call(rng)
    kv_c, k_pe = call.kv_c, call.k_pe
    call.kv_c, call.k_pe = kv_c[:, :3], k_pe[:, :3]
    call.run(world)
    plans = len(module.OP.memory)
    call.kv_c, call.k_pe = kv_c[:, :5], k_pe[:, :5]
    call.run(world)
    assert len(module.OP.memory) == plans > 0
    call.check(world)


def small_call(rng, kv_cache_dtype="auto"):
    scaled = kv_cache_dtype in oracle.STORED
    return Call(
        *(worlds.array(rng, (2, 5, size), "bfloat16") for size in (32, 8)),
        caches(rng, "apart", 2, 3, 4, 40, "uint8" if scaled else "bfloat16"),
        worlds.of_values(np.stack([rng.permutation(12)[:5] for _ in range(2)])),
        worlds.of_values(np.ones(2, np.float32)) if scaled else None,
        kv_cache_dtype,
    )


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    def refused(self, world, call, error, *words, **options):
        put = {
            "kv_c": world.put(call.kv_c),
            "k_pe": world.put(call.k_pe),
            "kv_cache_ptrs": [world.put(layer) for layer in call.layers],
            "slot_mapping": world.put(call.slots),
            "kv_scales": world.put(call.scales),
            "kv_cache_dtype": call.kv_cache_dtype,
        }
        with pytest.raises(error) as caught:
            cc.concat_and_cache_mla_grouped(**{**put, **options})
        for word in ("concat_and_cache_mla_grouped", *words):
            assert word in str(caught.value)
        for spec in call.specs():
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("kv_c", (5, 32), "bfloat16", cc.ShapeError, ("kv_c", "2 dimensions")),
            ("kv_c", (2, 5, 31), "bfloat16", cc.ShapeError, ("kv_cache_ptrs", "31 + 8")),
            ("kv_c", (2, 5, 32), "int16", cc.DTypeError, ("kv_c", "int16")),
            ("kv_c", (2, 6, 32), "bfloat16", cc.ShapeError, ("k_pe", "6 tokens")),
            ("kv_c", (3, 5, 32), "bfloat16", cc.ShapeError, ("k_pe", "num_layers")),
            ("k_pe", (2, 5, 8), "float16", cc.DTypeError, ("k_pe", "float16")),
            ("slots", (5,), "int64", cc.ShapeError, ("slot_mapping", "(1 dimension)")),
            ("slots", (2, 4), "int64", cc.ShapeError, ("slot_mapping", "at least 5")),
            ("slots", (1, 5), "int64", cc.ShapeError, ("slot_mapping", "num_layers")),
            ("slots", (2, 5), "float32", cc.DTypeError, ("slot_mapping", "float32")),
        ],
    )
    def test_arrays(self, world, rng, name, shape, dtype, error, words):
        call = small_call(rng)
        setattr(call, name, worlds.array(rng, shape, dtype))
        self.refused(world, call, error, *words)

    @pytest.mark.parametrize(
        "shape, dtype, error, words",
        [
            ((3, 4, 5, 8), "bfloat16", cc.ShapeError, ("kv_cache_ptrs", "4 dimensions")),
            ((3, 4, 41), "bfloat16", cc.ShapeError, ("kv_cache_ptrs", "32 + 8")),
            ((3, 0, 40), "bfloat16", cc.ArgumentError, ("block_size", "0")),
            ((3, 4, 40), "uint8", cc.DTypeError, ("kv_cache_ptrs", "uint8")),
        ],
    )
    def test_caches(self, world, rng, shape, dtype, error, words):
        call = small_call(rng)
        call.layers = [worlds.array(rng, shape, dtype) for _ in range(2)]
        self.refused(world, call, error, *words)

    def test_caches_that_differ(self, world, rng):
        call = small_call(rng)
        call.layers[1] = worlds.array(rng, (4, 4, 40), "bfloat16")
        self.refused(world, call, cc.ShapeError, "kv_cache_ptrs[1]", "kv_cache_ptrs[0]")

    @pytest.mark.parametrize("count", [0, 1])
    def test_number_of_caches(self, world, rng, count):
        call = small_call(rng)
        call.layers = call.layers[:count]
        self.refused(world, call, cc.ShapeError, "kv_cache_ptrs")

    @pytest.mark.parametrize(
        "name, value",
        [("block_size", 5), ("block_stride", 161), ("entry_stride", 48), ("num_blocks", 4)],
    )
    def test_a_geometry_that_is_not_the_caches(self, world, rng, name, value):
        self.refused(world, small_call(rng), cc.ArgumentError, name, str(value), **{name: value})

    def test_scales_are_missing(self, world, rng):
        call = small_call(rng, "fp8")
        call.scales = None
        self.refused(world, call, cc.DTypeError, "kv_scales")

    @pytest.mark.parametrize(
        "shape, dtype, error",
        [
            ((3,), "float32", cc.ShapeError),
            ((), "float32", cc.ShapeError),
            ((2,), "float16", cc.DTypeError),
        ],
    )
    def test_scales(self, world, rng, shape, dtype, error):
        call = small_call(rng, "fp8")
        call.scales = worlds.array(rng, shape, dtype)
        self.refused(world, call, error, "kv_scales")

    def test_strided_scales(self, world, rng):
        call = small_call(rng, "fp8")
        call.scales = worlds.of_values(np.ones(4, np.float32))[::2]
        self.refused(world, call, cc.StrideError, "kv_scales")

    def test_scales_of_a_raw_copy(self, world, rng):
        call = small_call(rng)
        call.scales = worlds.of_values(np.ones(2, np.float32))
        self.refused(world, call, cc.ArgumentError, "kv_scales", "None")

    def test_kv_cache_dtype(self, world, rng):
        for name in ("fp9", "fp8_ds_mla"):
            call = small_call(rng)
            call.kv_cache_dtype = name
            self.refused(world, call, cc.ArgumentError, "kv_cache_dtype", name)

    @pytest.mark.parametrize(
        "name, value, error",
        [
            ("num_blocks", None, cc.ArgumentError),
            ("block_size", None, cc.ArgumentError),
            ("block_stride", None, cc.ArgumentError),
            ("entry_stride", None, cc.ArgumentError),
            ("num_blocks", 0, cc.ArgumentError),
            ("num_blocks", 2**60, cc.ArgumentError),
            ("block_size", -4, cc.ArgumentError),
            ("entry_stride", 39, cc.StrideError),
            ("block_stride", 159, cc.StrideError),
        ],
    )
    def test_addresses(self, world, rng, name, value, error):
        """Without the number of blocks, a slot could be written anywhere."""
        call = small_call(rng)
        addresses = [arrays.view(world.put(layer), "").ptr for layer in call.layers]
        geometry = dict(zip(("block_size", "block_stride", "entry_stride"), call.geometry()))
        options = {"num_blocks": 3, **geometry, name: value}
        put = world.put(worlds.of_values(np.array(addresses)))
        word = name if error is cc.ArgumentError else "kv_cache_ptrs"
        self.refused(world, call, error, word, kv_cache_ptrs=put, **options)

    @pytest.mark.parametrize(
        "shape, dtype, error",
        [
            ((3,), "int64", cc.ShapeError),
            ((2, 1), "int64", cc.ShapeError),
            ((2,), "int32", cc.DTypeError),
        ],
    )
    def test_arrays_of_addresses(self, world, rng, shape, dtype, error):
        put = world.put(worlds.array(rng, shape, dtype))
        geometry = {"block_size": 4, "block_stride": 160, "entry_stride": 40, "num_blocks": 3}
        self.refused(world, small_call(rng), error, "kv_cache_ptrs", kv_cache_ptrs=put, **geometry)

    def test_not_an_array(self, world, rng):
        options = {"kv_cache_ptrs": 1 << 20}
        self.refused(world, small_call(rng), cc.DTypeError, "kv_cache_ptrs", "int", **options)


@st.composite
def calls(draw):
    """Calls in which everything that does not need another compile is free."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(("bfloat16", "float32")))
    latent, rope = (n // formats.DTYPES[dtype].bytes for n in (32, 16))
    layers, num_blocks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    num_slots = num_blocks * 4
    tokens = draw(st.integers(0, 9))
    bad = (-1, num_slots, 2**31 - 1, -(2**31))
    slot = st.integers(0, num_slots - 1) | st.sampled_from(bad)

    def identity(n):
        return n if 0 <= n < num_slots else object()  # only slots that are written must differ

    row = st.lists(slot, min_size=tokens, max_size=tokens, unique_by=identity)
    slots = [draw(row) for _ in range(layers)]
    slot_type = draw(st.sampled_from((np.int32, np.int64)))
    layout = draw(st.sampled_from(("apart", "pool")))
    return Call(
        *sources(rng, layers, tokens, latent, rope, dtype),
        caches(rng, layout, layers, num_blocks, 4, latent + rope, dtype),
        worlds.of_values(np.array(slots, slot_type).reshape(layers, tokens)),
    )


@given(calls(), st.sampled_from(FORMS))
def test_any_call(emulated_world, call, form):
    with contextlib.closing(emulated_world()) as world:
        faults = call.check(world, form)
        if faults:
            with pytest.raises(cc.FaultError) as caught:
                cc.raise_faults()
            (fault,) = caught.value.faults
            assert (fault.row, fault.value) in faults
        cc.raise_faults()
