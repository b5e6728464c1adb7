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
from cupy_cache.runtime import formats


def caches(rng, layout, num_blocks, block_size, heads, key_size, value_size, dtype, pad=0):
    """Key and value cache views [NB, BS, H, D] in the memory order of ``layout``."""
    if layout == "NHD":
        return (
            worlds.array(rng, (num_blocks, block_size, heads, key_size), dtype, pad),
            worlds.array(rng, (num_blocks, block_size, heads, value_size), dtype, pad),
        )
    if layout == "HND":
        return (
            worlds.array(rng, (num_blocks, heads, block_size, key_size), dtype, pad).permuted(
                0, 2, 1, 3
            ),
            worlds.array(rng, (num_blocks, heads, block_size, value_size), dtype, pad).permuted(
                0, 2, 1, 3
            ),
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
    oracle.reshape_and_cache_flash(*(s.on(expected[id(s.buffer)]) for s in specs))
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


@pytest.mark.each("layout")
@pytest.mark.parametrize("num_blocks, block_size", [(75, 16), (2, 600), (1, 1200)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_tokens(world, rng, layout, num_blocks, block_size):
    """So many that NumPy moves rows, and blocks where all are whole, as one element each."""
    tokens, heads, sizes = 1100, 2, (3, 5)
    every = np.arange(num_blocks * block_size)
    run = every[5 : 5 + tokens]  # begins and ends inside blocks
    exchanged = run.copy()
    exchanged[[200, 300]] = exchanged[[300, 200]]
    mappings = (
        rng.permutation(every)[:tokens],
        run,
        rng.permutation(every.reshape(num_blocks, block_size)).reshape(-1)[:tokens],
        exchanged,
        np.delete(every, np.s_[block_size : block_size + 8])[:tokens],  # then inside blocks
        np.where(rng.random(tokens) < 0.1, -1, run),
    )
    for slots in mappings:
        stores = caches(rng, layout, num_blocks, block_size, heads, *sizes, "float16")
        mapping = worlds.of_values(slots)
        rows = [worlds.array(rng, (tokens, heads, size), "float16") for size in sizes]
        check(world, *rows, *stores, mapping)
        rows = [worlds.array(rng, (heads, tokens, size), "float16") for size in sizes]
        check(world, *(spec.permuted(1, 0, 2) for spec in rows), *stores, mapping)


@pytest.mark.parametrize("tokens", [40, 1100])
@pytest.mark.parametrize("shared", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("stored", [None, "float8_e4m3fn"])
def test_sources_whose_rows_are_all_one(rng, tokens, shared, stored):
    """Broadcast views, on NumPy, with padding among the slots."""
    heads, size, num_blocks, block_size = 3, 8, 80, 16
    rows = [worlds.broadcast(rng, (tokens, heads, size), shared) for _ in range(2)]
    slots = rng.permutation(num_blocks * block_size)[:tokens]
    slots[rng.random(tokens) < 0.05] = -1
    dtype = np.uint8 if stored else np.float16
    made = np.zeros((2, num_blocks, block_size, heads, size), dtype)
    expected = made.copy()
    cc.reshape_and_cache_flash(*rows, *made, slots, "fp8" if stored else "auto", 0.5, 0.25)
    scales = (0.5, 0.25, stored) if stored else ()
    oracle.reshape_and_cache_flash(*rows, *expected, slots, *scales)
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("tokens", [4, 1100])
def test_no_heads(world, rng, tokens):
    check(
        world,
        *(worlds.array(rng, (tokens, 0, 8), "float16") for _ in range(2)),
        *caches(rng, "NHD", 75, 16, 0, 8, 8, "float16"),
        worlds.of_values(np.arange(tokens)),
    )


# --- quantised caches -----------------------------------------------------------------------------


def check_quantised(world, specs, kv_cache_dtype, k_scale=None, v_scale=None):
    """Like `check`. Scales are numbers, None or specs."""
    scales = [world.put(s) if isinstance(s, worlds.Spec) else s for s in (k_scale, v_scale)]
    cc.reshape_and_cache_flash(*(world.put(s) for s in specs), kv_cache_dtype, *scales)
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    views = [s.on(expected[id(s.buffer)]) for s in specs]
    views[2:4] = (view.view(np.uint8) for view in views[2:4])
    oracle.reshape_and_cache_flash(
        *views, *map(scale_values, (k_scale, v_scale)), oracle.STORED[kv_cache_dtype]
    )
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


def scale_values(scale):
    """A scale argument as the oracle takes it."""
    if isinstance(scale, worlds.Spec):
        return scale.on(scale.buffer.bytes)
    return 1.0 if scale is None else scale


def values(rng, shape, dtype, pad=0):
    """Rows of ordinary numbers of many magnitudes, and rows of random bits: infinities, NaN and
    subnormals among them."""
    spec = worlds.array(rng, shape, dtype, pad)
    view = spec.on(spec.buffer.bytes)
    ordinary = rng.normal(size=shape) * 2.0 ** rng.integers(-12, 12, (*shape[:2], 1))
    view[...] = np.where(rng.random((*shape[:2], 1)) < 0.7, ordinary.astype(view.dtype), view)
    return spec


def scale(rng, heads):
    """A scale in each of the forms in which it may be given."""
    numbers = (2.0 ** rng.uniform(-8, 8, heads)).astype(np.float32)
    kind = rng.integers(5)
    if kind == 0:
        return float(numbers[0])
    if kind == 1:
        return worlds.of_values(numbers[:1])
    if kind == 2:
        return worlds.of_values(numbers[:1])[0, ...]
    if kind == 3:
        return worlds.of_values(np.repeat(numbers, 3))[::3]
    return worlds.of_values(numbers)


# heads, key head size, value head size, block size, source dtype, pad in the cache and the sources
QUANTISED = (
    (8, 128, 128, 16, "bfloat16", 0),
    (1, 1, 1, 1, "float32", 0),  # D4: fewer than 32 elements in a row
    (3, 7, 10, 5, "float16", 1),  # D4 too, and no address is aligned
    (13, 46, 46, 16, "bfloat16", 0),  # rows that are not a multiple of 16 bytes
    (2, 24, 40, 8, "float16", 0),  # D5: key and value head sizes differ
    (4, 512, 64, 3, "float32", 0),
    (128, 64, 64, 4, "bfloat16", 0),  # more vectors than a block has threads
)


# Not every format with each of them, but every one with each shape and with each layout.
SOME_FORMATS = [
    (("fp8", "fp8_e5m2", "int8")[(i + j) % 3], layout, *shape)
    for i, shape in enumerate(QUANTISED)
    for j, layout in enumerate(LAYOUTS)
]


@pytest.mark.parametrize(
    "kv_cache_dtype, layout, heads, key_size, value_size, block_size, dtype, pad", SOME_FORMATS
)
def test_quantised_layouts(
    world, rng, kv_cache_dtype, layout, heads, key_size, value_size, block_size, dtype, pad
):  # fmt: skip
    """D3: the caches' strides are their own. D5, D6: so are head sizes, and e5m2 is e5m2."""
    num_blocks, tokens = 5, int(min(4 * block_size, rng.integers(1, 6)))
    bytes_of_source = formats.DTYPES[dtype].bytes
    stored = str(rng.choice([oracle.STORED[kv_cache_dtype], "uint8"]))
    specs = (
        values(rng, (tokens + 2, heads, key_size), dtype, pad * bytes_of_source),
        values(rng, (tokens, heads, value_size), dtype, pad * bytes_of_source),
        *caches(rng, layout, num_blocks, block_size, heads, key_size, value_size, stored, pad),
        worlds.of_values(slots_for(rng, num_blocks * block_size, tokens)),
    )
    check_quantised(world, specs, kv_cache_dtype, scale(rng, heads), scale(rng, heads))


def one_row(rng, rows, stored="uint8"):
    """The arguments of a call that writes ``rows`` (each [heads, elements]) to slots in order."""
    rows = worlds.of_values(rows, None if rows.dtype.name in formats.DTYPES else "bfloat16")
    tokens, heads, size = rows.shape
    caches = [worlds.array(rng, (tokens, 1, heads, size), stored) for _ in range(2)]
    return rows, rows, *caches, worlds.of_values(np.arange(tokens))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_every_bit_pattern(world, rng, dtype, kv_cache_dtype):
    """All values of 16 bits, with one scale a head, extreme ones too."""
    scales = np.concatenate([
        [1.0, 0.1, 1.0 - 2.0**-24, 3e4, 2.0**-149, 2.0**-126, 2.0**-64, 2.0**64, 3e38, np.inf],
        [0.0, -1.5, np.nan, 1e-6], 2.0 ** rng.uniform(-20, 20, 18),
    ]).astype(np.float32)  # fmt: skip
    every = np.arange(2**16, dtype=np.uint16)
    rows = every.reshape(128, 1, 512).repeat(len(scales), axis=1)
    specs = one_row(rng, rows.view(formats.DTYPES[dtype].numpy))
    put = [world.put(worlds.of_values(s)) for s in (scales, scales[::-1].copy())]
    cc.reshape_and_cache_flash(*(world.put(s) for s in specs), kv_cache_dtype, *put)
    for spec, order in ((specs[2], scales), (specs[3], scales[::-1])):
        got = world.bytes_of(spec).reshape(128, len(scales), 512)
        for head, number in enumerate(order):
            expected = oracle.codes(
                every.view(formats.DTYPES[dtype].numpy), number, oracle.STORED[kv_cache_dtype]
            )
            np.testing.assert_array_equal(got[:, head].reshape(-1), expected)


@pytest.mark.parametrize(
    "significands",
    [(2**24 - 1, 2**23 + 1), (14 * 2**20 - 3, 9568255), (11665407, 15859711)],
)
def test_float32_values(world, rng, significands):
    """Neighbours of the boundaries between codes, with scales whose quotients round there."""
    boundaries = np.concatenate([
        (np.arange(16, 32) * 2.0 ** np.arange(-21, 12)[:, np.newaxis]).ravel(),
        np.arange(256) - 127.5, np.arange(64, 128) / 4096,
    ])  # fmt: skip
    scales = np.array([s * 2.0**-26 for s in significands], np.float32)
    near = (boundaries * scales[:, None]).astype(np.float32)
    steps = np.arange(-3, 4, dtype=np.int32)
    rows = (near.view(np.int32)[..., None] + steps).astype(np.int32).view(np.float32)
    extremes = rng.integers(0, 2**32, (len(scales), 200), np.uint32).view(np.float32)
    rows = np.concatenate([rows.reshape(len(scales), -1), extremes], axis=1)
    for kv_cache_dtype in ("fp8", "fp8_e5m2", "int8"):
        specs = one_row(rng, rows[np.newaxis])
        check_quantised(world, specs, kv_cache_dtype, worlds.of_values(scales), 1e30)


def test_worked_bytes(world, rng):
    """Bytes that were worked out elsewhere."""
    tie = [17.0, 18.0, 2.0**-10, 3 * 2.0**-10, 0.5, 1000.0, -np.inf, np.nan, -0.0]
    cases = (
        ("fp8", 1.0, tie, [0x58, 0x59, 0x00, 0x02, 0x30, 0x7E, 0xFE, 0x7F, 0x80]),
        ("fp8_e4m3", 0.1, [1.0], [0x52]),
        ("fp8", 0.25, [-3.0], [0xD4]),
        ("fp8_e5m2", 1.0, [10.0, 61440.0, np.inf], [0x49, 0x7B, 0x7B]),
        ("int8", 2.0, [5.0, -5.0, 1e9, -255.0, -1e9, np.nan], [3, 0xFD, 0x7F, 0x80, 0x80, 0]),
    )
    for kv_cache_dtype, number, numbers, expected in cases:
        specs = one_row(rng, np.array([[numbers]], np.float32))
        put = [world.put(s) for s in specs]
        cc.reshape_and_cache_flash(*put, kv_cache_dtype, number, v_scale=number)
        assert world.bytes_of(specs[2]).tolist() == expected
        assert world.bytes_of(specs[3]).tolist() == expected


def test_scales_left_out(world, rng):
    """None is 1.0, for each of the two."""
    specs = one_row(rng, rng.normal(size=(3, 2, 16)).astype(np.float32))
    check_quantised(world, specs, "fp8")
    check_quantised(world, specs, "int8", v_scale=worlds.of_values(np.array([0.01], np.float32)))


def test_one_scale_array_for_all_heads(world, rng):
    """An array may have one element in memory for all heads."""
    number = worlds.of_values(np.array([0.37], np.float32))
    number.shape, number.strides = (2,), (0,)
    specs = one_row(rng, rng.normal(size=(3, 2, 16)).astype(np.float16))
    check_quantised(world, specs, "fp8", number, number)


@pytest.mark.parametrize(
    "dtype, cache_dtype, kv_cache_dtype",
    [
        ("float8_e4m3fn", "float8_e4m3fn", "auto"),
        ("float8_e5m2", "uint8", "auto"),
        ("uint8", "int8", "bfloat16"),
        ("int8", "int8", "auto"),
        ("int64", "int64", "auto"),
        ("bool", "bool", "auto"),
        ("float8_e4m3fn", "uint8", "fp8"),  # already what is stored
        ("float8_e5m2", "float8_e5m2", "fp8_e5m2"),
        ("int8", "uint8", "int8"),
    ],
)
def test_raw_copies_of_other_dtypes(world, rng, dtype, cache_dtype, kv_cache_dtype):
    """Bytes are copied as they are; the scales of these calls mean nothing."""
    specs = (
        worlds.array(rng, (6, 3, 10), dtype),
        worlds.array(rng, (6, 3, 32), dtype),
        *caches(rng, "NHD", 4, 4, 3, 10, 32, cache_dtype),
        worlds.of_values(slots_for(rng, 16, 5)),
    )
    if dtype == "bool":  # two bytes are no bool
        for spec in specs[:4]:
            spec.buffer.bytes[:] &= 1
    cc.reshape_and_cache_flash(*(world.put(s) for s in specs), kv_cache_dtype, 0.5, 0.5)
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    views = [s.on(expected[id(s.buffer)]) for s in specs]
    oracle.reshape_and_cache_flash(*(v.view(f"u{v.itemsize}") for v in views[:4]), views[4])
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


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

    def test_source_of_a_quantised_cache(self, world, arguments, rng):
        for name in ("key", "value"):
            arguments[name] = worlds.array(rng, (5, 2, 8), "int16")
        self.refused(world, arguments, cc.DTypeError, "key", "bfloat16", "int16",
                     kv_cache_dtype="fp8")  # fmt: skip

    def test_dtype_of_a_quantised_cache(self, world, arguments, rng):
        self.refused(world, arguments, cc.DTypeError, "key_cache", "float8_e4m3fn", "uint8",
                     "float32", kv_cache_dtype="fp8")  # fmt: skip
        for name in ("key_cache", "value_cache"):
            arguments[name] = worlds.array(rng, (3, 4, 2, 8), "float8_e5m2")
        self.refused(world, arguments, cc.DTypeError, "key_cache", "float8_e4m3fn", "float8_e5m2",
                     kv_cache_dtype="fp8_e4m3")  # fmt: skip

    @pytest.mark.parametrize("number", [0.0, -1.0, float("nan"), float("inf"), 1e-46, 1e39, True])
    def test_scale_numbers(self, world, arguments, number):
        self.refused(world, arguments, cc.ArgumentError, "v_scale", kv_cache_dtype="fp8",
                     v_scale=number)  # fmt: skip

    @pytest.mark.parametrize(
        "shape, dtype, error",
        [
            ((3,), "float32", cc.ShapeError),
            ((1, 1), "float32", cc.ShapeError),
            ((0,), "float32", cc.ShapeError),
            ((2,), "float64", cc.DTypeError),
        ],
    )
    def test_scale_arrays(self, world, arguments, rng, shape, dtype, error):
        for name in ("key_cache", "value_cache"):
            arguments[name] = worlds.array(rng, (3, 4, 2, 8), "int8")
        self.refused(world, arguments, error, "k_scale", kv_cache_dtype="int8",
                     k_scale=world.put(worlds.array(rng, shape, dtype)))  # fmt: skip

    def test_scale_on_the_host(self, world, arguments, rng):
        if not world.on_gpu:
            pytest.skip("everything is on the host")
        for name in ("key_cache", "value_cache"):
            arguments[name] = worlds.array(rng, (3, 4, 2, 8), "int8")
        self.refused(world, arguments, cc.DeviceError, "k_scale", "cpu", kv_cache_dtype="int8",
                     k_scale=np.ones(1, np.float32))  # fmt: skip

    @pytest.mark.parametrize("empty", ["block_size", "head_size"])
    def test_empty_dimensions(self, world, arguments, rng, empty):
        size, block_size = (0, 4) if empty == "head_size" else (8, 0)
        for name in ("key", "value"):
            arguments[name] = worlds.array(rng, (5, 2, size), "float32")
        for name in ("key_cache", "value_cache"):
            arguments[name] = worlds.array(rng, (3, block_size, 2, size), "float32")
        self.refused(world, arguments, cc.ArgumentError, empty)

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
