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

SCALES = {
    "auto": "float32", "fp8": "float32", "fp8_e4m3": "float32", "ue8m0": "ue8m0", "mxfp8": "mxfp8",
}  # fmt: skip


def width_of(head_size, quant_block_size):
    return head_size + 4 * (head_size // quant_block_size)


def cache(rng, num_blocks, block_size, width, dtype="uint8", pool=False, pad=0):
    """A cache view [NB, BS, width]; ``pool``: the second of three layers that share blocks."""
    if not pool:
        return worlds.array(rng, (num_blocks, block_size, width), dtype, pad)
    stored = worlds.array(rng, (num_blocks, 3, block_size, width), dtype, pad)
    return stored[:, 1]


def keys(rng, tokens, head_size, dtype, pad=0):
    """Numbers of many magnitudes, in rows cut from wider ones, two rows more than ``tokens``."""
    wide = worlds.array(rng, (tokens + 2, 3 + head_size), dtype, pad)
    view = wide.on(wide.buffer.bytes)
    view[...] = rng.normal(size=view.shape) * 2.0 ** rng.integers(-9, 9, (len(view), 1))
    return wide[:, 3:]


def slots_for(rng, num_slots, tokens):
    """Distinct random slots with padding among them."""
    slots = rng.permutation(num_slots)[:tokens].astype(rng.choice(["int32", "int64"]))
    slots[rng.random(tokens) < 0.2] = -rng.integers(1, 2**31)
    return worlds.of_values(slots)


def check(world, specs, quant_block_size, kv_cache_dtype):
    """Call on ``world`` and compare all storages with the oracle's; returns its faults."""
    cc.indexer_k_quant_and_cache(*(world.put(s) for s in specs), quant_block_size, kv_cache_dtype)
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}
    k, kv_cache, slots = (s.on(expected[id(s.buffer)]) for s in specs)
    faults = oracle.indexer_k_quant_and_cache(
        k, kv_cache.view(np.uint8), slots, quant_block_size, SCALES[kv_cache_dtype]
    )
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])
    return faults


# head size, quant block size, block size, dtype, pad
SHAPES = (
    (128, 128, 64, "bfloat16", 0),  # what models have
    (128, 128, 1, "float16", 0),
    (128, 128, 7, "float32", 4),
    (128, 32, 16, "bfloat16", 2),
    (24, 8, 7, "float16", 0),
    (24, 24, 16, "bfloat16", 0),  # three vectors in four lanes
    (96, 32, 16, "float32", 0),
    (512, 128, 256, "bfloat16", 0),
    (512, 512, 5, "float16", 2),
    (1024, 1024, 2, "bfloat16", 0),  # two vectors a lane
    (640, 640, 3, "float32", 0),  # one, and a second for some lanes
    (37, 37, 9, "bfloat16", 0),
    (3, 1, 5, "float32", 0),
    (1, 1, 1, "bfloat16", 2),
)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("head_size, quant_block_size, block_size, dtype, pad", SHAPES)
def test_every_shape(world, rng, head_size, quant_block_size, block_size, dtype, pad, pool):
    """D18: any quant block that divides any head size. D19: float16 and float32."""
    num_blocks = -(-12 // block_size)
    tokens = int(rng.integers(1, 8))
    width = width_of(head_size, quant_block_size)
    storage = str(rng.choice(["uint8", "float8_e4m3fn", "int8"]))
    specs = (
        keys(rng, tokens, head_size, dtype, pad),
        cache(rng, num_blocks, block_size, width, storage, pool, pad),
        slots_for(rng, num_blocks * block_size, tokens),
    )
    view = specs[0].on(specs[0].buffer.bytes)
    view[0] = rng.choice([0.0, -0.0])  # a row of zeros
    check(world, specs, quant_block_size, str(rng.choice(list(SCALES))))


@pytest.mark.parametrize("kv_cache_dtype", SCALES)
def test_contiguous_keys(world, rng, kv_cache_dtype):
    """Rows without gaps, as most callers have them: the widest vectors."""
    specs = (
        worlds.of_values(rng.normal(size=(9, 128)).astype(formats.DTYPES["bfloat16"].numpy)),
        cache(rng, 3, 64, 132),
        slots_for(rng, 192, 9),
    )
    check(world, specs, 128, kv_cache_dtype)


def one_token(world, values, quant_block_size, kv_cache_dtype, dtype="float32"):
    """The stored codes and the scales' bytes of a single key."""
    k = np.array([values], np.float32).astype(formats.DTYPES[dtype].numpy)
    size = k.shape[1]
    kv_cache = worlds.of_values(np.full((1, 1, width_of(size, quant_block_size)), 0xAA, np.uint8))
    put = [world.put(s) for s in (worlds.of_values(k), kv_cache, worlds.of_values(np.array([0])))]
    cc.indexer_k_quant_and_cache(*put, quant_block_size, kv_cache_dtype)
    entry = world.bytes_of(kv_cache)
    return entry[:size].tolist(), entry[size:].tobytes()


@pytest.mark.parametrize(
    "largest, scale, power, exponent",
    [
        (0.0, 1e-4 / 448, -22, 105),
        (1.0, 0.0022321429, -8, 119),
        (3.5, 0.0078125, -7, 120),
        (448.0, 1.0, 0, 127),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_published_scales(world, dtype, largest, scale, power, exponent):
    values = [0.0, -largest, 0.0, 0.0]
    codes, scales = one_token(world, values, 4, "fp8", dtype)
    assert np.frombuffer(scales, "<f4").tolist() == [np.float32(scale)]
    assert codes == [0x00, 0xFE if largest else 0x80, 0x00, 0x00]
    codes, scales = one_token(world, values, 4, "ue8m0", dtype)
    assert np.frombuffer(scales, "<f4").tolist() == [2.0**power]
    other_codes, scales = one_token(world, values, 4, "mxfp8", dtype)
    assert scales == bytes([exponent] * 4)
    assert codes == other_codes


def test_published_codes(world):
    """With a largest value of 448 the scale is 1."""
    values = [448.0, 17.0, 18.0, 2.0**-10, 3 * 2.0**-10, 0.5, -12.0, 1.0]
    for kv_cache_dtype in SCALES:
        codes, _ = one_token(world, values, 8, kv_cache_dtype)
        assert codes == [0x7E, 0x58, 0x59, 0x00, 0x02, 0x30, 0xD4, 0x38]


@pytest.mark.parametrize(
    "kv_cache_dtype, ordinary, floor, infinite",
    [
        ("auto", np.float32(1) / np.float32(448), np.float32(1e-4) / np.float32(448), np.inf),
        ("ue8m0", 2.0**-8, 2.0**-22, np.inf),
        ("mxfp8", 119, 105, 255),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_infinities_nan_and_zeros(world, dtype, kv_cache_dtype, ordinary, floor, infinite):
    """NaN does not count; an infinity takes its quant block with it, and no other."""
    values = np.ones((5, 4), np.float32)
    values[0, 1] = np.nan
    values[1, 2] = -np.inf
    values[2] = -np.nan
    values[3] = 0.0, -0.0, 0.0, -0.0
    codes, scales = one_token(world, values.reshape(-1), 4, kv_cache_dtype, dtype)
    expected = [ordinary, infinite, floor, floor, ordinary]
    if kv_cache_dtype == "mxfp8":
        assert list(scales) == np.repeat(expected, 4).tolist()
    else:
        assert np.frombuffer(scales, "<f4").tolist() == [float(np.float32(e)) for e in expected]
    one = 0x7E if kv_cache_dtype == "auto" else 0x78  # 1 / (1 / 448), 1 / 2 ** -8
    assert codes == [
        one, 0x7F, one, one,
        0, 0, 0x7F, 0,
        0x7F, 0x7F, 0x7F, 0x7F,
        0, 0x80, 0, 0x80,
        one, one, one, one,
    ]  # fmt: skip


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "ue8m0", "mxfp8"])
@pytest.mark.extra
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_value(world, rng, dtype, kv_cache_dtype):
    """As the largest of its quant block, whose other elements are 1, its negative and small. The
    exact power of two and the published formula, taken in float32, agree on all of them."""
    values = np.arange(1 << 16, dtype=np.uint16).view(formats.DTYPES[dtype].numpy)
    with np.errstate(all="ignore"):
        k = np.stack([values, np.ones_like(values), -values, values / values.dtype.type(3)], axis=1)
    k = k.reshape(-1, 64)
    tokens = len(k)
    specs = (
        worlds.of_values(k, dtype),
        worlds.array(rng, (1, tokens, 128), "uint8"),
        worlds.of_values(np.arange(tokens)),
    )
    cc.indexer_k_quant_and_cache(*(world.put(s) for s in specs), 4, kv_cache_dtype)
    stored = world.bytes_of(specs[1])
    codes, words = expected_of_all(dtype, SCALES[kv_cache_dtype], k)
    np.testing.assert_array_equal(stored[: 64 * tokens], codes)
    np.testing.assert_array_equal(stored[64 * tokens :], words)
    if kv_cache_dtype == "ue8m0":
        with np.errstate(all="ignore"):  # a signalling NaN makes some NumPy versions warn
            largest = np.abs(k.reshape(-1, 4).astype(np.float32)).max(axis=1)
        finite = np.isfinite(largest)
        scales = stored[64 * tokens :].view("<f4")[finite]
        wanted = np.maximum(largest[finite], np.float32(1e-4)) / np.float32(448)
        np.testing.assert_array_equal(scales, np.exp2(np.ceil(np.log2(wanted))))


_EXPECTED = {}


def expected_of_all(dtype, scales, k):
    """The codes and scale bytes of ``k``, made once for all worlds."""
    if (dtype, scales) not in _EXPECTED:
        blocks = k.reshape(-1, 4)
        with np.errstate(all="ignore"):  # signalling NaN
            magnitudes = np.abs(blocks.astype(np.float64))
        largest = np.nan_to_num(magnitudes, posinf=np.inf).max(axis=1)
        made = {one: oracle.indexer_scale(one, scales) for one in set(largest.tolist())}
        factors, words = zip(*(made[one] for one in largest.tolist()))
        codes = oracle.quantise(blocks, np.array(factors)[:, None], "float8_e4m3fn")
        _EXPECTED[dtype, scales] = codes.reshape(-1), np.array(words, np.uint8).reshape(-1)
    return _EXPECTED[dtype, scales]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "ue8m0", "mxfp8"])
def test_float32_bits(world, rng, kv_cache_dtype):
    """Random bits, subnormals among them, and scales next to powers of two."""
    bits = rng.integers(0, 2**32, (24, 16), np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        small = bits * np.float32(1e-30)
    power = np.float32(448) * np.exp2(rng.integers(-20, 20, (24, 1))).astype(np.float32)
    edge = rng.uniform(-1, 1, (24, 16)).astype(np.float32) * power
    edge[:, :1] = [power, np.nextafter(power, np.float32(np.inf)), np.nextafter(power, 0)][
        rng.integers(3)
    ]
    k = np.concatenate([bits, small, edge])
    specs = (
        worlds.of_values(k),
        cache(rng, 5, 15, width_of(16, 8)),
        worlds.of_values(rng.permutation(75)[: len(k)]),
    )
    check(world, specs, 8, kv_cache_dtype)


def test_the_number_of_tokens_is_that_of_slots(world, rng):
    """D20: a shorter slot_mapping is no over-read, and rows beyond it are not looked at."""
    specs = (
        keys(rng, 6, 32, "bfloat16"),
        cache(rng, 3, 4, 36, pool=True),
        worlds.of_values(np.array([7, -1, 2])),
    )
    check(world, specs, 32, "ue8m0")


def test_a_column_of_slots(world, rng):
    slots = np.stack([rng.permutation(12)[:5], np.full(5, 10**9)], axis=1)
    specs = (
        keys(rng, 5, 32, "float16"),
        cache(rng, 3, 4, 36),
        worlds.of_values(slots)[:, 0],
    )
    check(world, specs, 32, "auto")


def test_calls_with_one_and_with_more_tokens(world, rng):
    """They may share a plan."""
    for tokens in (1, 5):
        specs = keys(rng, tokens, 32, "float16"), cache(rng, 3, 4, 36), slots_for(rng, 12, tokens)
        check(world, specs, 32, "auto")


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "mxfp8"])
def test_slots_past_the_cache_are_skipped_and_recorded(world, rng, kv_cache_dtype):
    bad = int(rng.choice([12, 13, 2**31, 2**62]))
    specs = (
        keys(rng, 6, 64, "bfloat16"),
        cache(rng, 3, 4, 72, pool=True),
        worlds.of_values(np.array([3, -1, 0, bad, 11, -(2**63)])),
    )
    assert check(world, specs, 32, kv_cache_dtype) == [(3, bad)]
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert (fault.op, fault.argument) == ("indexer_k_quant_and_cache", "slot_mapping")
    assert (fault.row, fault.value, fault.limit) == (3, bad, 12)
    cc.raise_faults()


@pytest.mark.parametrize("num_blocks", [0, 2])
def test_no_tokens(world, rng, num_blocks):
    specs = (
        worlds.array(rng, (0, 128), "bfloat16"),
        cache(rng, num_blocks, 4, 132),
        worlds.of_values(np.empty(0, np.int64)),
    )
    check(world, specs, 128, "auto")


def test_a_cache_without_blocks(world, rng):
    specs = (
        keys(rng, 2, 128, "bfloat16"),
        cache(rng, 0, 4, 132),
        worlds.of_values(np.array([-1, 0])),
    )
    assert check(world, specs, 128, "auto") == [(1, 0)]
    with pytest.raises(cc.FaultError):
        cc.raise_faults()


@pytest.mark.parametrize("library", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def test_offsets_past_32_bits(rng, library):
    """Both ways, through a block beyond 4 GiB of the cache."""
    xp = pytest.importorskip(library)
    kv_cache = xp.zeros((2**32 // (64 * 132) + 2, 64, 132), np.uint8)
    block = kv_cache.shape[0] - 1
    k = rng.normal(size=(8, 128)).astype(np.float32)
    cc.indexer_k_quant_and_cache(
        xp.asarray(k), kv_cache, xp.arange(8) + 64 * block + 50, 128, "auto"
    )
    expected = np.zeros((1, 64, 132), np.uint8)
    oracle.indexer_k_quant_and_cache(k, expected, np.arange(8) + 50, 128, "float32")
    assert (kv_cache[block] == xp.asarray(expected[0])).all()
    assert not kv_cache[:200].any() and not kv_cache[-200:-1].any()
    dst_k, dst_scale = xp.zeros((58, 128), np.uint8), xp.zeros((58, 1), np.float32)
    cc.cp_gather_indexer_k_quant_cache(
        kv_cache, dst_k, dst_scale, xp.asarray([[block]]), xp.asarray([0, 58])
    )
    codes = expected.reshape(-1)[50 * 128 : 58 * 128].reshape(8, 128)
    assert (dst_k[50:] == xp.asarray(codes)).all()
    assert (dst_scale[50:] > 0).all() and not dst_scale[:50].any()


# head size, quant block size, block size: few, since each is compiled.
SPECIALISATIONS = ((32, 16, 4), (24, 24, 3))


@st.composite
def calls(draw):
    """Specs and options of a call: everything that does not need another compile is free."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    head_size, quant_block_size, block_size = draw(st.sampled_from(SPECIALISATIONS))
    dtype = draw(st.sampled_from(("bfloat16", "float32")))
    kv_cache_dtype = draw(st.sampled_from(("auto", "mxfp8")))
    num_blocks = draw(st.integers(0, 6))
    num_slots = num_blocks * block_size
    bad = (-1, -num_slots, num_slots, num_slots + 1, 2**31 - 1, -(2**31))
    good = st.integers(0, num_slots - 1) if num_slots else st.nothing()
    slots = draw(st.lists(good | st.sampled_from(bad), max_size=20, unique=True))
    every = draw(st.integers(1, 3))
    specs = (
        keys(rng, len(slots), head_size, dtype, draw(st.sampled_from((0, 4)))),
        cache(rng, num_blocks, block_size, width_of(head_size, quant_block_size),
              pool=draw(st.booleans())),
        worlds.of_values(np.repeat(np.array(slots, np.int64), every))[::every],
    )  # fmt: skip
    view = specs[0].on(specs[0].buffer.bytes)
    if draw(st.booleans()):  # any bits at all
        raw = rng.integers(0, 256, (*view.shape, view.dtype.itemsize), np.uint8)
        view[...] = raw.view(view.dtype)[..., 0]
    return specs, quant_block_size, kv_cache_dtype


@given(calls())
def test_any_call(emulated_world, call):
    with contextlib.closing(emulated_world()) as world:
        faults = check(world, *call)
        if faults:
            with pytest.raises(cc.FaultError) as caught:
                cc.raise_faults()
            (fault,) = caught.value.faults
            assert (fault.row, fault.value) in faults
        cc.raise_faults()


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    @pytest.fixture
    def arguments(self, rng):
        return {
            "k": worlds.array(rng, (5, 64), "bfloat16"),
            "kv_cache": worlds.array(rng, (3, 4, 72), "uint8"),
            "slot_mapping": worlds.of_values(np.arange(5)),
        }

    def refused(self, world, arguments, error, *words, quant_block_size=32, kv_cache_dtype="auto"):
        with pytest.raises(error) as caught:
            cc.indexer_k_quant_and_cache(
                *map(world.put, arguments.values()), quant_block_size, kv_cache_dtype
            )
        for word in ("indexer_k_quant_and_cache", *words):
            assert word in str(caught.value)
        for spec in arguments.values():
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize(
        "name, shape, dtype, error, words",
        [
            ("k", (5, 2, 32), "bfloat16", cc.ShapeError, ("k", "3 dimensions")),
            ("k", (5, 0), "bfloat16", cc.ArgumentError, ("head_size", "0")),
            ("k", (5, 96), "bfloat16", cc.ShapeError, ("kv_cache", "96 + 4 * 3", "72")),
            ("k", (4, 64), "bfloat16", cc.ShapeError, ("slot_mapping", "k", "4", "5")),
            ("k", (5, 64), "uint8", cc.DTypeError, ("k", "uint8", "bfloat16")),
            ("kv_cache", (3, 4, 68), "uint8", cc.ShapeError, ("kv_cache", "64 + 4 * 2", "68")),
            ("kv_cache", (3, 4, 9, 8), "uint8", cc.ShapeError, ("kv_cache", "4 dimensions")),
            ("kv_cache", (3, 0, 72), "uint8", cc.ArgumentError, ("block_size", "0")),
            ("kv_cache", (3, 4, 72), "bfloat16", cc.DTypeError, ("kv_cache", "uint8")),
            ("kv_cache", (3, 4, 72), "bool", cc.DTypeError, ("kv_cache", "bool")),
            ("slot_mapping", (5,), "int16", cc.DTypeError, ("slot_mapping", "int16")),
            ("slot_mapping", (5, 1), "int64", cc.ShapeError, ("slot_mapping",)),
        ],
    )
    def test_arrays(self, world, rng, arguments, name, shape, dtype, error, words):
        arguments[name] = worlds.array(rng, shape, dtype)
        self.refused(world, arguments, error, *words)

    @pytest.mark.parametrize("size", [0, -32, 16.5, True, None, 48, 128])
    def test_quant_block_size(self, world, arguments, size):
        words = "quant_block_size", str(size)
        self.refused(world, arguments, cc.ArgumentError, *words, quant_block_size=size)

    @pytest.mark.parametrize("name", ["fp8_e5m2", "bfloat16", "int8", "e8m0", "", None])
    def test_kv_cache_dtype(self, world, arguments, name):
        """What e4m3 codes would not be is refused, rather than stored as e4m3 all the same."""
        words = "kv_cache_dtype", "ue8m0", repr(name)
        self.refused(world, arguments, cc.ArgumentError, *words, kv_cache_dtype=name)

    def test_gaps_in_a_key(self, world, rng, arguments):
        arguments["k"] = worlds.array(rng, (5, 128), "bfloat16")[:, ::2]
        self.refused(world, arguments, cc.StrideError, "k", "contiguous")

    def test_gaps_in_a_block(self, world, rng, arguments):
        arguments["kv_cache"] = worlds.array(rng, (3, 4, 80), "uint8")[..., :72]
        self.refused(world, arguments, cc.StrideError, "kv_cache", "2 dimensions")

    def test_overlapping_blocks(self, world, rng, arguments):
        arguments["kv_cache"].strides = (280, 72, 1)
        self.refused(world, arguments, cc.StrideError, "kv_cache", "share")

    def test_none(self, world, arguments):
        put = {k: world.put(v) for k, v in arguments.items()} | {"kv_cache": None}
        with pytest.raises(cc.DTypeError, match="kv_cache"):
            cc.indexer_k_quant_and_cache(**put, quant_block_size=32, kv_cache_dtype="auto")


def test_read_only_cache_is_refused():
    kv_cache = np.zeros((1, 1, 12), np.uint8)
    kv_cache.flags.writeable = False
    k, slots = np.zeros((1, 8), np.float32), np.zeros(1, np.int64)
    with pytest.raises(cc.NotWritableError, match="kv_cache"):
        cc.indexer_k_quant_and_cache(k, kv_cache, slots, 8, "auto")
