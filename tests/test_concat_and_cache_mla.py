# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib
import functools
import math

import ml_dtypes
import numpy as np
import oracle
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st

import cupy_cache as cc
from cupy_cache.runtime import formats

RULES = ("power_of_two", "amax")


def cache(rng, layout, num_blocks, block_size, entry, dtype, pad=0):
    """A cache view [NB, BS, entry]."""
    if layout == "contiguous":
        return worlds.array(rng, (num_blocks, block_size, entry), dtype, pad)
    # The second of three layers that share the blocks of a pool, with a gap after each entry.
    return worlds.array(rng, (num_blocks, 3, block_size, entry + 4), dtype, pad)[:, 1, :, :entry]


def sources(rng, tokens, latent, rope, dtype, pad=0, values=False):
    """kv_c and k_pe cut from one projection's output, with more rows than ``tokens``."""
    fused = worlds.array(rng, (tokens + 2, 3 + latent + rope), dtype, pad)
    if values:  # ordinary numbers, where random bits would be infinite or tiny
        view = fused.on(fused.buffer.bytes)
        view[...] = rng.normal(size=view.shape) * 2.0 ** rng.integers(-9, 9, (len(view), 1))
    return fused[:, 3 : 3 + latent], fused[: tokens + 1, 3 + latent :]


def slots_for(rng, num_slots, tokens):
    """Distinct random slots with padding among them."""
    slots = rng.permutation(num_slots)[:tokens].astype(rng.choice(["int32", "int64"]))
    slots[rng.random(tokens) < 0.2] = -rng.integers(1, 2**31)
    return worlds.of_values(slots)


def check(world, specs, *args, run, **options):
    """Call on ``world`` and compare all storages with what ``run`` makes of copies of them."""
    cc.concat_and_cache_mla(*(world.put(s) for s in specs), *args, **options)
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    result = run(*(s.on(expected[id(s.buffer)]) for s in specs))
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])
    return result


# latent size, rope size, block size, dtype, pad
SHAPES = (
    (512, 64, 64, "bfloat16", 0),
    (512, 0, 7, "float16", 0),
    (512, 1, 16, "bfloat16", 0),
    (256, 64, 5, "float32", 0),
    (256, 0, 16, "bfloat16", 2),
    (256, 1, 1, "float32", 4),
    (37, 64, 3, "float16", 0),
    (37, 0, 16, "float32", 0),
    (37, 1, 100, "bfloat16", 2),
    (1, 64, 9, "bfloat16", 0),
    (1, 0, 2, "float16", 6),
    (1, 1, 1, "float32", 8),
)


@pytest.mark.parametrize("layout", ["contiguous", "pool"])
@pytest.mark.parametrize("latent, rope, block_size, dtype, pad", SHAPES)
def test_every_shape(world, rng, layout, latent, rope, block_size, dtype, pad):
    num_blocks = -(-20 // block_size)
    tokens = int(rng.integers(1, 12))
    specs = (
        *sources(rng, tokens, latent, rope, dtype, pad),
        cache(rng, layout, num_blocks, block_size, latent + rope, dtype, pad),
        slots_for(rng, num_blocks * block_size, tokens),
    )
    name = rng.choice(["auto", "float16", "bfloat16", "float32"])  # all mean a raw copy
    check(world, specs, str(name), run=oracle.concat_and_cache_mla)


def test_contiguous_sources(world, rng):
    """Rows without gaps, as most callers have them: the widest vectors."""
    specs = (
        worlds.array(rng, (9, 512), "bfloat16"),
        worlds.array(rng, (9, 64), "bfloat16"),
        cache(rng, "contiguous", 3, 64, 576, "bfloat16"),
        slots_for(rng, 192, 9),
    )
    check(world, specs, run=oracle.concat_and_cache_mla)


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize(
    "latent, rope, block_size, dtype, pad",
    [
        (512, 64, 64, "bfloat16", 0),
        (256, 1, 5, "float32", 0),
        (37, 64, 16, "float16", 2),
        (1, 0, 1, "bfloat16", 0),
    ],
)
def test_scaled_entries(world, rng, stored, latent, rope, block_size, dtype, pad):
    num_blocks = -(-20 // block_size)
    tokens = int(rng.integers(1, 6))
    names = [name for name, element in oracle.STORED.items() if element == stored]
    kv_cache_dtype = str(rng.choice(names))
    layout = str(rng.choice(["contiguous", "pool"]))
    storage = str(rng.choice([stored, "uint8"]))
    specs = (
        *sources(rng, tokens, latent, rope, dtype, pad, values=True),
        cache(rng, layout, num_blocks, block_size, latent + rope, storage, pad),
        slots_for(rng, num_blocks * block_size, tokens),
    )
    scale = float(np.float32(10.0 ** rng.uniform(-2, 2)))
    put = scale
    if rng.random() < 0.7:  # an array, which is read on the device
        shape = () if rng.random() < 0.5 else (1,)
        put = world.put(worlds.of_values(np.full(shape, scale, np.float32)))

    def run(kv_c, k_pe, kv_cache, slot_mapping):
        bits = kv_cache.view(np.uint8)
        oracle.concat_and_cache_mla(kv_c, k_pe, bits, slot_mapping, scale, stored)

    check(world, specs, kv_cache_dtype, put, run=run)


@functools.cache
def bytes_of_all(dtype, scale, stored):
    """What each of the 65536 elements of a 16-bit type is stored as."""
    values = np.arange(1 << 16, dtype=np.uint16).view(formats.DTYPES[dtype].numpy)
    return oracle.quantise(values, scale, stored)


@pytest.mark.parametrize("scale", [1.0, float(np.float32(0.1)), 2.0**-40, 3.0e38])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_every_16_bit_value(world, rng, kv_cache_dtype, dtype, scale):
    """Subnormals, infinities, NaN, signed zeros, ties and saturation included."""
    order = rng.permutation(1 << 16).astype(np.uint16)
    kv_c = worlds.of_values(order.reshape(128, 512), dtype)
    k_pe = worlds.array(rng, (128, 0), dtype)
    kv_cache = worlds.array(rng, (2, 64, 512), "uint8")
    cc.concat_and_cache_mla(
        *(world.put(s) for s in (kv_c, k_pe, kv_cache, worlds.of_values(np.arange(128)))),
        kv_cache_dtype,
        scale,
    )
    expected = bytes_of_all(dtype, scale, oracle.STORED[kv_cache_dtype])[order]
    np.testing.assert_array_equal(world.bytes_of(kv_cache), expected)


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2", "int8"])
def test_float32_values(world, rng, kv_cache_dtype):
    """Random bits, subnormals among them, and the neighbours of ties."""
    stored = oracle.STORED[kv_cache_dtype]
    every = np.arange(256, dtype=np.uint8).view(formats.DTYPES[stored].numpy).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    ties = (every[1:] + every[:-1]) / 2
    near = [np.nextafter(ties, np.float32(x)) for x in (-np.inf, np.inf)]
    bits = rng.integers(0, 2**32, 1024, np.uint32)
    subnormal = bits & 0x807FFFFF
    values = np.concatenate(
        [bits.view(np.float32), subnormal.view(np.float32), every, ties, *near, -ties]
    )
    values = values[: values.size // 16 * 16].reshape(-1, 16)
    kv_c, k_pe = worlds.of_values(values[:, :12].copy()), worlds.of_values(values[:, 12:].copy())
    kv_cache = worlds.array(rng, (1, len(values), 16), "uint8")
    specs = (kv_c, k_pe, kv_cache, worlds.of_values(np.arange(len(values))))
    run = functools.partial(oracle.concat_and_cache_mla, scale=1.0, stored=stored)
    check(world, specs, kv_cache_dtype, 1.0, run=run)


@pytest.mark.parametrize(
    "kv_cache_dtype, value, scale, byte",
    [
        ("fp8", 1.0, 0.1, 0x52), ("fp8", 0.5, 1, 0x30), ("fp8", -3.0, 0.25, 0xD4),
        ("fp8_e4m3", 1000.0, 1, 0x7E), ("fp8_e4m3", 17.0, 1, 0x58), ("fp8_e4m3", 18.0, 1, 0x59),
        ("fp8", 2.0**-10, 1, 0x00), ("fp8", 3 * 2.0**-10, 1, 0x02), ("fp8_e5m2", 10.0, 1, 0x49),
        ("fp8", -np.inf, 1, 0xFE), ("fp8_e5m2", np.inf, 1, 0x7B), ("fp8", -np.nan, 1, 0x7F),
        ("int8", 2.5, 1, 0x03), ("int8", -2.5, 1, 0xFD), ("int8", -300.0, 2, 0x80),
        ("int8", np.nan, 1, 0x00),
    ],
)  # fmt: skip
def test_published_bytes(world, kv_cache_dtype, value, scale, byte):
    kv_c, k_pe = (worlds.of_values(np.full((1, n), value, np.float32)) for n in (3, 2))
    kv_cache = worlds.of_values(np.full((1, 2, 5), 0xAA, np.uint8))
    slots = worlds.of_values(np.array([1]))
    put = [world.put(s) for s in (kv_c, k_pe, kv_cache, slots)]
    cc.concat_and_cache_mla(*put, kv_cache_dtype, scale)
    assert world.bytes_of(kv_cache).tolist() == [0xAA] * 5 + [byte] * 5


def test_skip_scale(world, rng):
    """The scale is not used, whatever it is."""
    specs = (
        *sources(rng, 5, 32, 8, "bfloat16", values=True),
        cache(rng, "contiguous", 2, 4, 40, "uint8"),
        worlds.of_values(np.arange(5)),
    )
    run = functools.partial(oracle.concat_and_cache_mla, scale=1.0, stored="float8_e4m3fn")
    for scale in (None, 0.1, world.put(worlds.of_values(np.full(1, 0.1, np.float32)))):
        check(world, specs, "fp8", scale, True, run=run)


def test_no_scale(world, rng):
    """None is 1.0."""
    specs = (
        *sources(rng, 5, 32, 8, "bfloat16", values=True),
        cache(rng, "contiguous", 2, 4, 40, "uint8"),
        worlds.of_values(np.arange(5)),
    )
    run = functools.partial(oracle.concat_and_cache_mla, scale=1.0, stored="float8_e4m3fn")
    check(world, specs, "fp8", run=run)


def test_a_raw_copy_ignores_the_scale(world, rng):
    specs = (
        *sources(rng, 5, 32, 8, "bfloat16"),
        cache(rng, "contiguous", 2, 4, 40, "bfloat16"),
        worlds.of_values(np.arange(5)),
    )
    scale = world.put(worlds.of_values(np.full(1, 0.1, np.float32)))
    check(world, specs, "auto", scale, run=oracle.concat_and_cache_mla)


@pytest.mark.parametrize(
    "kv_cache_dtype, dtype", [("auto", "bfloat16"), ("fp8", "uint8"), ("fp8_ds_mla", "uint8")]
)
def test_slots_past_the_cache_are_skipped_and_recorded(world, rng, kv_cache_dtype, dtype):
    bad = int(rng.choice([12, 13, 2**31, 2**62]))
    specs = (
        *sources(rng, 6, 512, 64, "bfloat16", values=True),
        cache(rng, "pool", 3, 4, 656 if kv_cache_dtype == "fp8_ds_mla" else 576, dtype),
        worlds.of_values(np.array([3, -1, 0, bad, 11, -(2**63)])),
    )
    run = {
        "auto": oracle.concat_and_cache_mla,
        "fp8": functools.partial(oracle.concat_and_cache_mla, scale=0.5, stored="float8_e4m3fn"),
        "fp8_ds_mla": functools.partial(oracle.concat_and_cache_fp8_ds_mla, rule="power_of_two"),
    }[kv_cache_dtype]
    check(world, specs, kv_cache_dtype, 0.5, run=run)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.op, fault.argument) == ("concat_and_cache_mla", "slot_mapping")
    assert (fault.row, fault.value, fault.limit) == (3, bad, 12)
    cc.raise_faults()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_ds_mla"])
def test_no_tokens(world, rng, kv_cache_dtype):
    """Nothing is launched for an empty step."""
    entry = 656 if kv_cache_dtype == "fp8_ds_mla" else 576
    specs = (
        worlds.array(rng, (0, 512), "bfloat16"),
        worlds.array(rng, (0, 64), "bfloat16"),
        cache(rng, "contiguous", 2, 4, entry, "bfloat16" if kv_cache_dtype == "auto" else "uint8"),
        worlds.of_values(np.empty(0, np.int64)),
    )
    check(world, specs, kv_cache_dtype, 1.0, run=oracle.concat_and_cache_mla)


def test_no_rope_is_planned_once(world, rng):
    """An array without columns is an ordinary signature, not an empty call."""
    from cupy_cache.ops.concat_and_cache_mla import OP

    specs = (
        *sources(rng, 5, 40, 0, "float16"),
        cache(rng, "contiguous", 2, 3, 40, "float16"),
        worlds.of_values(np.arange(5)),
    )
    check(world, specs, run=oracle.concat_and_cache_mla)
    plans = len(OP.memory)
    check(world, specs, run=oracle.concat_and_cache_mla)
    assert len(OP.memory) == plans > 0


class TestFp8DsMla:
    """The entry of 656 bytes."""

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize(
        "rope, layout, block_size, storage, pad",
        [
            (64, "contiguous", 64, "uint8", 0),
            (64, "pool", 5, "float8_e4m3fn", 0),
            (0, "contiguous", 256, "int8", 0),
            (0, "pool", 1, "uint8", 2),
            (64, "contiguous", 16, "uint8", 2),  # nothing aligned
        ],
    )
    def test_entries(self, world, rng, rule, dtype, rope, layout, block_size, storage, pad):
        """D10: float16 is right too."""
        num_blocks = -(-16 // block_size)
        values = bool(rng.random() < 0.7)  # else any bits: infinities, NaN, subnormals
        specs = (
            *sources(rng, 7, 512, rope, dtype, pad, values),
            cache(rng, layout, num_blocks, block_size, 656, storage, pad),
            slots_for(rng, num_blocks * block_size, 7),
        )
        kv_c = specs[0].on(specs[0].buffer.bytes)
        kv_c[0, 128:256] = 0.0
        kv_c[1, 384:] = -0.0

        def run(kv_c, k_pe, kv_cache, slot_mapping):
            bits = kv_cache.view(np.uint8)
            oracle.concat_and_cache_fp8_ds_mla(kv_c, k_pe, bits, slot_mapping, rule)

        check(world, specs, "fp8_ds_mla", run=run, scale_rule=rule)

    def test_aligned_sources(self, world, rng):
        """Rows without gaps, as most callers have them: the widest vectors."""
        kv_c, k_pe = (
            worlds.of_values(rng.normal(size=(9, n)).astype(ml_dtypes.bfloat16)) for n in (512, 64)
        )
        specs = (kv_c, k_pe, cache(rng, "contiguous", 3, 64, 656, "uint8"), slots_for(rng, 192, 9))
        run = functools.partial(oracle.concat_and_cache_fp8_ds_mla, rule="power_of_two")
        check(world, specs, "fp8_ds_mla", run=run)

    @pytest.mark.parametrize("processors", [132, 1])
    @pytest.mark.parametrize("rope", [64, 0])
    def test_many_tokens(self, emulated_world, rng, processors, rope):
        """More than four for each processor: thread blocks of several warps, of which the last
        block lacks some. The sources end where their memory does."""
        tokens = 529 + 4 * int(rng.integers(0, 40)) + int(rng.integers(0, 3))
        rows = [rng.normal(size=(5, n)).astype(ml_dtypes.bfloat16) for n in (512, rope)]
        chosen = rng.integers(0, 5, tokens)
        block_size, num_slots = 64, tokens + 100
        slots = rng.permutation(num_slots)[:tokens]
        slots[rng.random(tokens) < 0.1] = -1
        num_blocks = -(-num_slots // block_size)
        specs = (
            *(worlds.of_values(row[chosen]) for row in rows),
            worlds.array(rng, (num_blocks, block_size, 656), "uint8"),
            worlds.of_values(slots),
        )
        entries = np.zeros((1, 5, 656), np.uint8)
        oracle.concat_and_cache_fp8_ds_mla(*rows, entries, np.arange(5), "power_of_two")
        expected = specs[2].buffer.bytes.reshape(-1, 656).copy()
        for slot, row in zip(slots, chosen):
            if slot >= 0:
                expected[slot] = entries[0, row]
        with contextlib.closing(emulated_world(processors=processors)) as world:
            cc.concat_and_cache_mla(*(world.put(s) for s in specs), "fp8_ds_mla")
            got = world.bytes_of(specs[2])
        np.testing.assert_array_equal(got.reshape(-1, 656), expected)

    def one_entry(self, world, kv_c, rule, dtype="bfloat16"):
        """The entry of a token with these 512 values and a rope of ones."""
        specs = (
            worlds.of_values(np.array([kv_c], np.float32).astype(formats.DTYPES[dtype].numpy)),
            worlds.of_values(np.ones((1, 64), formats.DTYPES[dtype].numpy)),
            worlds.of_values(np.full((1, 1, 656), 0xAA, np.uint8)),
            worlds.of_values(np.array([0])),
        )
        cc.concat_and_cache_mla(*(world.put(s) for s in specs), "fp8_ds_mla", scale_rule=rule)
        return world.bytes_of(specs[2])

    @pytest.mark.parametrize(
        "dtype, largest, scale_bytes",
        [
            ("bfloat16", 0.0, "00 00 00 39"),
            ("bfloat16", 0.05, "00 00 00 39"),
            ("float16", 1.0, "00 00 80 3b"),
            ("bfloat16", 1.0, "00 00 80 3b"),
            ("float16", 3.5, "00 00 00 3c"),
            ("bfloat16", 448.0, "00 00 80 3f"),
            ("float16", 449.0, "00 00 00 40"),
        ],
    )
    def test_published_scales(self, world, dtype, largest, scale_bytes):
        entry = self.one_entry(world, [-largest] * 128 + [0.0] * 384, "power_of_two", dtype)
        assert entry[512:516].tobytes() == bytes.fromhex(scale_bytes)
        assert entry[516:528].tobytes() == bytes.fromhex("00 00 00 39") * 3

    @pytest.mark.parametrize("largest, scale", [(1.0, 0.002232143), (449.0, 1.0022322)])
    def test_published_scales_of_the_older_rule(self, world, largest, scale):
        entry = self.one_entry(world, [largest] * 512, "amax", "float16")
        np.testing.assert_array_equal(entry[512:528].view("<f4"), np.float32(scale))
        assert set(entry[:512]) == {0x7E}

    @pytest.mark.parametrize("rule", RULES)
    def test_zero_tiles_are_zeros(self, world, rule):
        """D11: 0 divided by a scale of 0 would be NaN."""
        entry = self.one_entry(world, [0.0] * 512, rule)
        assert not entry[:512].any()
        assert (entry[512:528].view("<f4") > 0).all()

    @pytest.mark.parametrize("rule", RULES)
    def test_infinities_and_nan(self, world, rule):
        kv_c = np.ones(512, np.float32)
        kv_c[3], kv_c[130] = -np.inf, np.nan
        kv_c[256:384] = np.nan
        entry = self.one_entry(world, kv_c, rule)
        scales = entry[512:528].view("<f4")
        ordinary = oracle.fp8_ds_mla_scale(1.0, rule)
        floor = oracle.fp8_ds_mla_scale(0.0, rule)
        np.testing.assert_array_equal(scales, [np.inf, ordinary, floor, ordinary])
        assert entry[3] == 0x7F and not np.delete(entry[:128], 3).any()
        assert entry[130] == 0x7F and len(set(np.delete(entry[128:256], 2))) == 1
        assert set(entry[256:384]) == {0x7F}

    @pytest.mark.extra
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_every_largest_value(self, world, rng, dtype, rule):
        """Each finite 16-bit magnitude as the largest of a tile. The exact rule and the published
        formula, taken in float32, agree on all of them."""
        values = np.arange(1 << 15, dtype=np.uint16).view(formats.DTYPES[dtype].numpy)
        with np.errstate(invalid="ignore"):
            values = values[np.isfinite(values)]
        values = np.concatenate([values, values[: -values.size % 4]])
        kv_c = np.zeros((values.size // 4, 4, 128), values.dtype)
        kv_c[:, :, 77] = values.reshape(-1, 4)
        tokens = len(kv_c)
        specs = (
            worlds.of_values(kv_c.reshape(tokens, 512)),
            worlds.array(rng, (tokens, 0), dtype),
            worlds.array(rng, (1, tokens, 656), "uint8"),
            worlds.of_values(np.arange(tokens)),
        )
        cc.concat_and_cache_mla(*(world.put(s) for s in specs), "fp8_ds_mla", scale_rule=rule)
        entries = world.bytes_of(specs[2]).reshape(tokens, 656)
        scales = entries[:, 512:528].copy().view("<f4").reshape(-1)
        expected = np.array([oracle.fp8_ds_mla_scale(v, rule) for v in values], np.float32)
        np.testing.assert_array_equal(scales, expected)
        stored = entries[:, :512].reshape(-1, 128)
        assert not np.delete(stored, 77, 1).any()
        largest = [oracle.quantise(v, s, "float8_e4m3fn") for v, s in zip(values, expected)]
        np.testing.assert_array_equal(stored[:, 77], largest)
        if rule == "power_of_two":
            wanted = np.maximum(values.astype(np.float32) / np.float32(448), np.float32(1e-4))
            np.testing.assert_array_equal(scales, np.exp2(np.ceil(np.log2(wanted))))

    def refused(self, world, specs, error, *words, **options):
        with pytest.raises(error) as caught:
            cc.concat_and_cache_mla(*(world.put(s) for s in specs), "fp8_ds_mla", **options)
        for word in ("concat_and_cache_mla", *words):
            assert word in str(caught.value)
        for spec in specs:
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize(
        "latent, rope, dtype, entry, storage, error, words",
        [
            (256, 64, "bfloat16", 656, "uint8", cc.ShapeError, ("kv_c", "512")),
            (512, 32, "bfloat16", 656, "uint8", cc.ShapeError, ("k_pe", "64")),
            (512, 64, "float32", 656, "uint8", cc.DTypeError, ("kv_c", "float32")),
            (512, 64, "bfloat16", 576, "uint8", cc.ShapeError, ("kv_cache", "656")),
            (512, 64, "bfloat16", 328, "bfloat16", cc.ShapeError, ("kv_cache", "656")),
            (512, 64, "bfloat16", 656, "bfloat16", cc.DTypeError, ("kv_cache", "bfloat16")),
        ],
    )
    def test_refusals(self, world, rng, latent, rope, dtype, entry, storage, error, words):
        specs = (
            *sources(rng, 3, latent, rope, dtype),
            worlds.array(rng, (2, 4, entry), storage),
            worlds.of_values(np.arange(3)),
        )
        self.refused(world, specs, error, *words)

    def test_unknown_rule(self, world, rng):
        specs = (
            *sources(rng, 3, 512, 64, "bfloat16"),
            worlds.array(rng, (2, 4, 656), "uint8"),
            worlds.of_values(np.arange(3)),
        )
        self.refused(world, specs, cc.ArgumentError, "scale_rule", "max", scale_rule="max")


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self, rng):
        return {
            "kv_c": worlds.array(rng, (5, 32), "bfloat16"),
            "k_pe": worlds.array(rng, (5, 8), "bfloat16"),
            "kv_cache": worlds.array(rng, (3, 4, 40), "bfloat16"),
            "slot_mapping": worlds.of_values(np.arange(5)),
        }

    def refused(self, world, arguments, error, *words, **options):
        put = {k: world.put(v) for k, v in arguments.items()}
        with pytest.raises(error) as caught:
            cc.concat_and_cache_mla(**put, **options)
        for word in ("concat_and_cache_mla", *words):
            assert word in str(caught.value)
        for spec in arguments.values():
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("kv_c", (5, 4, 8), "bfloat16", cc.ShapeError, ("kv_c", "3 dimensions")),
            ("kv_c", (5, 31), "bfloat16", cc.ShapeError, ("kv_cache", "31 + 8")),
            ("kv_c", (4, 32), "bfloat16", cc.ShapeError, ("slot_mapping", "kv_c", "4")),
            ("kv_c", (5, 32), "int16", cc.DTypeError, ("kv_c", "int16")),
            ("k_pe", (4, 8), "bfloat16", cc.ShapeError, ("slot_mapping", "k_pe", "4")),
            ("k_pe", (5, 8), "float16", cc.DTypeError, ("k_pe", "float16")),
            ("kv_cache", (3, 4, 5, 8), "bfloat16", cc.ShapeError, ("kv_cache", "4 dimensions")),
            ("kv_cache", (3, 0, 40), "bfloat16", cc.ArgumentError, ("block_size", "0")),
            ("kv_cache", (3, 4, 40), "uint8", cc.DTypeError, ("kv_cache", "bfloat16", "uint8")),
            ("slot_mapping", (5,), "int16", cc.DTypeError, ("slot_mapping", "int16")),
            ("slot_mapping", (5, 1), "int64", cc.ShapeError, ("slot_mapping",)),
        ],
    )
    def test_arrays(self, world, rng, arguments, name, shape, dtype, error, words):
        arguments[name] = worlds.array(rng, shape, dtype)
        self.refused(world, arguments, error, *words)

    def test_inner_stride(self, world, rng, arguments):
        arguments["k_pe"] = worlds.array(rng, (5, 16), "bfloat16")[:, ::2]
        self.refused(world, arguments, cc.StrideError, "k_pe", "contiguous")

    def test_overlapping_entries(self, world, rng, arguments):
        cache = arguments["kv_cache"]
        cache.strides = (cache.strides[0], cache.strides[1] // 2, cache.strides[2])
        self.refused(world, arguments, cc.StrideError, "kv_cache", "share")

    def test_kv_cache_dtype(self, world, arguments):
        words = "kv_cache_dtype", "fp8_ds_mla", "fp9"
        self.refused(world, arguments, cc.ArgumentError, *words, kv_cache_dtype="fp9")

    def test_scaled_cache_of_16_bits(self, world, arguments):
        words, options = ("kv_cache", "float8_e4m3fn"), {"kv_cache_dtype": "fp8", "scale": 1.0}
        self.refused(world, arguments, cc.DTypeError, *words, **options)

    @pytest.mark.parametrize("scale", [True, 0.0, -1.0, math.nan, math.inf, 1e-60, 1e39])
    def test_scales(self, world, rng, arguments, scale):
        arguments["kv_cache"] = worlds.array(rng, (3, 4, 40), "uint8")
        self.refused(world, arguments, cc.ArgumentError, "scale", kv_cache_dtype="fp8", scale=scale)

    @pytest.mark.parametrize(
        "shape, dtype, error",
        [
            ((2,), "float32", cc.ShapeError),
            ((1, 1), "float32", cc.ShapeError),
            ((1,), "float16", cc.DTypeError),
        ],
    )
    def test_scale_arrays(self, world, rng, arguments, shape, dtype, error):
        arguments["kv_cache"] = worlds.array(rng, (3, 4, 40), "uint8")
        arguments["scale"] = worlds.array(rng, shape, dtype)
        self.refused(world, arguments, error, "scale", kv_cache_dtype="fp8")

    def test_not_an_array(self, world, arguments):
        put = {k: world.put(v) for k, v in arguments.items()}
        with pytest.raises(cc.DTypeError, match=r"kv_cache.*list"):
            cc.concat_and_cache_mla(**{**put, "kv_cache": [[1.0]]})


def test_read_only_cache_is_refused():
    kv_c, cache = np.zeros((1, 4), np.float32), np.zeros((1, 1, 8), np.float32)
    cache.flags.writeable = False
    with pytest.raises(cc.NotWritableError, match="kv_cache"):
        cc.concat_and_cache_mla(kv_c, kv_c, cache, np.zeros(1, np.int64))


# latent and rope bytes of the cache, block size: few, since each is compiled.
SPECIALISATIONS = ((32, 16, 4), (24, 0, 3))


@st.composite
def calls(draw):
    """Specs and options of a call: everything that does not need another compile is free."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    latent, rope, block_size = draw(st.sampled_from(SPECIALISATIONS))
    stored = draw(st.sampled_from((None, "float8_e4m3fn")))
    dtype = "bfloat16" if stored else draw(st.sampled_from([d.name for d in formats.FLOATS]))
    element = 1 if stored else formats.DTYPES[dtype].bytes
    latent, rope = latent // element, rope // element
    num_blocks = draw(st.integers(1, 6))
    layout = draw(st.sampled_from(("contiguous", "pool")))
    pad = draw(st.sampled_from((0, 0, 4)))
    num_slots = num_blocks * block_size
    bad = (-1, -num_slots, num_slots, num_slots + 1, 2**31 - 1, -(2**31))
    slot = st.integers(0, num_slots - 1) | st.sampled_from(bad)
    slots = draw(st.lists(slot, max_size=20, unique=True))
    every = draw(st.integers(1, 3))
    slot_type = draw(st.sampled_from((np.int32, np.int64)))
    storage = "uint8" if stored else dtype
    specs = (
        *sources(rng, len(slots), latent, rope, dtype, pad, values=True),
        cache(rng, layout, num_blocks, block_size, latent + rope, storage, pad),
        worlds.of_values(np.repeat(np.array(slots, slot_type), every))[::every],
    )
    return specs, stored


@given(calls())
def test_any_call(emulated_world, call):
    specs, stored = call
    with contextlib.closing(emulated_world()) as world:
        run = functools.partial(oracle.concat_and_cache_mla, scale=0.5, stored=stored)
        faults = check(world, specs, "fp8" if stored else "auto", 0.5, run=run)
        if faults:
            with pytest.raises(cc.FaultError) as caught:
                cc.raise_faults()
            (fault,) = caught.value.faults
            assert (fault.row, fault.value) in faults
        cc.raise_faults()
