# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import itertools
import re

import machine_code
import numpy as np
import oracle
import pytest
import rotating
import worlds

import cupy_cache as cc
from cupy_cache.ops.shared import rotary
from cupy_cache.runtime import formats, modules

NAME = "rotary_and_cache"
PER_TOKEN_HEAD = {"int8_per_token_head": "int8", "fp8_per_token_head": "float8_e4m3fn"}
STORED = {**oracle.STORED, **PER_TOKEN_HEAD}


class Model:
    """Shapes and kinds of a call; what is not given is the ordinary one."""

    def __init__(
        self, *, heads=4, kv_heads=2, size=64, value_size=None, rotary=None, offset=0, block_size=4,
        dtype="bfloat16", table="float32", layout="NHD", kv_cache_dtype="auto", is_neox=True,
        sections=None, interleaved=False, norm=None, bias=0.0, weights="both", weight="float32",
        rounding="once", out=None, packed=False, positions="int64", slots="int64", blocks=5,
    ):  # fmt: skip
        self.__dict__.update(locals())
        self.value_size = size if value_size is None else value_size
        self.rotary = size if rotary is None else rotary
        self.stored = STORED.get(kv_cache_dtype)

    def caches(self, rng):
        """Of keys, of values, and of their scales."""
        dtype = "uint8" if self.stored else self.dtype
        shape, slots = (self.blocks, self.block_size, self.kv_heads), self.block_size
        sizes = self.size, self.value_size
        if self.layout == "NHD":
            pair = [worlds.array(rng, (*shape, size), dtype) for size in sizes]
        elif self.layout == "HND":
            by_head = self.blocks, self.kv_heads, slots
            pair = [worlds.array(rng, (*by_head, n), dtype).permuted(0, 2, 1, 3) for n in sizes]
        elif self.layout == "packed":
            page = worlds.array(rng, (*shape, sum(sizes)), dtype)
            pair = [page[..., : self.size], page[..., self.size :]]
        else:
            x = 16 // formats.DTYPES[dtype].bytes
            by_head = self.blocks, self.kv_heads
            pair = [worlds.array(rng, (*by_head, self.size // x, slots, x), dtype)]
            values = (self.value_size, slots)
            if self.layout == "interleaved":
                values = slots // x, self.value_size, x
            pair.append(worlds.array(rng, (*by_head, *values), dtype))
        if self.kv_cache_dtype in PER_TOKEN_HEAD:
            return pair, [worlds.array(rng, shape, "float32") for _ in "kv"]
        return pair, [None, None]

    def case(self, rng, tokens=5):
        """Specs of a call: its positional arguments, and the named ones."""
        sizes = (self.heads, self.size), (self.kv_heads, self.size), (
            self.kv_heads, self.value_size
        )  # fmt: skip
        if self.packed:
            projected = rotating.packed_projection(rng, tokens + 1, sizes, self.dtype)
        else:
            projected = [rotating.rows(rng, tokens + 1, *shape, self.dtype) for shape in sizes]
        axes = (tokens,) if self.sections is None else (3, tokens)
        positions = rng.integers(0, rotating.POSITIONS, axes).astype(self.positions)
        slots = rng.permutation(self.blocks * self.block_size)[:tokens].astype(self.slots)
        slots[1] = -1
        pair, scales = self.caches(rng)
        step = [
            worlds.of_values(positions), *projected,
            rotating.table(rng, self.rotary, self.table), *pair, worlds.of_values(slots),
        ]  # fmt: skip
        named = {"rope_dim_offset": self.offset, "rounding": self.rounding}
        if self.sections is not None:
            named |= {"mrope_section": self.sections, "mrope_interleaved": self.interleaved}
        if self.norm is not None:
            named |= {"norm_eps": self.norm, "norm_weight_bias": self.bias}
            for name in ("q_norm_weight", "k_norm_weight") if self.weights == "both" else ():
                values = rotating.numbers(rng, (self.size,), self.weight)
                named[name] = worlds.of_values(values)
        if self.stored and scales[0] is None:
            named |= {"k_scale": self.scale(rng, self.kv_heads), "v_scale": 0.25}
        if self.out is not None:
            stored = STORED.get(self.out)
            dtype = "uint8" if stored else self.dtype
            named |= {"out_dtype": self.out, "q_scale": self.scale(rng, self.heads)}
            named["out"] = worlds.array(rng, (tokens + 2, self.heads, self.size), dtype)
        if scales[0] is not None:
            named |= dict(zip(("k_scale_cache", "v_scale_cache"), scales))
        return step, named

    @staticmethod
    def scale(rng, heads):
        return worlds.of_values((2.0 ** rng.uniform(-6, -4, heads)).astype(np.float32))


def call(world, model, step, named):
    """Run on ``world``."""
    put = {n: world.put(v) if isinstance(v, worlds.Spec) else v for n, v in named.items()}
    cc.rotary_and_cache(*map(world.put, step), model.is_neox, model.kv_cache_dtype, **put)


def check(world, model, step, named):
    """Run on ``world``. What is rotated must be within the intervals of loops; of the others every
    byte of every storage must be what the loops of the writers make of it."""
    call(world, model, step, named)
    specs = [*step, *(v for v in named.values() if isinstance(v, worlds.Spec))]
    got = {id(s.buffer): world.bytes_of(s) for s in specs}
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}

    def before(spec):
        return spec if spec is None or not isinstance(spec, worlds.Spec) else spec.on(
            spec.buffer.bytes
        )  # fmt: skip

    positions, query, key, _, table = map(before, step[:5])
    options = {
        "is_neox": model.is_neox, "offset": model.offset, "sections": model.sections,
        "interleaved": model.interleaved, "rounding": model.rounding,
    }  # fmt: skip

    def heads_of(array, weights):
        norm = None
        if model.norm is not None:
            norm = before(named.get(weights)), model.norm, model.bias
        return rotating.heads_of(array, table, positions, norm=norm, **options)

    check_queries(model, step[1], named, heads_of(query, "q_norm_weight"), got, expected)
    rotated = heads_of(key, "k_norm_weight")
    check_caches(model, step, named, rotated, got, expected)
    for spec in specs:
        np.testing.assert_array_equal(got[id(spec.buffer)], expected[id(spec.buffer)])
    if model.norm is None and not isinstance(world, worlds.NumPyWorld):
        numpy = worlds.NumPyWorld()
        call(numpy, model, step, named)
        for spec in specs:
            np.testing.assert_array_equal(got[id(spec.buffer)], numpy.bytes_of(spec))


def check_queries(model, query, named, rotated, got, expected):
    spec, stored = query, None
    if model.out is not None:
        spec, stored = named["out"], STORED.get(model.out)
    was, now = spec.on(expected[id(spec.buffer)]), spec.on(got[id(spec.buffer)])
    scales = named["q_scale"].on(named["q_scale"].buffer.bytes) if stored else None
    first, end = (0, model.size)
    if model.out is None and model.norm is None:
        first, end = model.offset, model.offset + model.rotary
    for (token, head), row in rotated.items():
        scale = scales[head] if stored else 1.0
        rotating.check_row(now[token, head, first:end], row[first:end], stored, scale)
        was[token, head, first:end] = now[token, head, first:end]


def check_caches(model, step, named, rotated, got, expected):
    """First the writers' loops with the keys as they are, then the keys, as they were found."""
    key, value, key_cache, value_cache, slots = step[2], step[3], *step[5:]
    kept = slots.on(slots.buffer.bytes).astype(np.int64)
    tokens = {token for token, _ in rotated}
    kept[[token not in tokens for token in range(len(kept))]] = -1
    views = [s.on(s.buffer.bytes) for s in (key, value)]
    views += [s.on(expected[id(s.buffer)]) for s in (key_cache, value_cache)]
    scales = [named.get(name) for name in ("k_scale_cache", "v_scale_cache")]
    scaled = scales[0] is not None
    if scaled:
        views += [s.on(expected[id(s.buffer)]) for s in scales]
        oracle.reshape_and_cache_flash_per_token_head(*views, kept, model.stored)
    else:
        numbers = [named.get("k_scale"), named.get("v_scale", 1.0)]
        if numbers[0] is not None:
            numbers[0] = numbers[0].on(numbers[0].buffer.bytes)
        packed = len(key_cache.shape) == 5
        write = oracle.reshape_and_cache if packed else oracle.reshape_and_cache_flash
        write(*views, kept, *numbers, model.stored)
    was, now = views[2], key_cache.on(got[id(key_cache.buffer)])
    for (token, head), row in rotated.items():
        if token >= len(kept) or not 0 <= kept[token] < model.blocks * model.block_size:
            continue
        found, before = (rotating.place(cache, kept[token])[head] for cache in (now, was))
        scale = numbers[0][head] if model.stored and not scaled else 1.0
        if scaled:
            spec = scales[0]
            found_scale = rotating.place(spec.on(got[id(spec.buffer)]), kept[token])[head]
            check_scale(found_scale, row, model.stored)
            rotating.place(spec.on(expected[id(spec.buffer)]), kept[token])[head] = found_scale
            inverse = np.float32(1) / found_scale
            row = [tuple(np.float32(end) * inverse for end in interval) for interval in row]
        rotating.check_row(found.reshape(-1), row, model.stored, scale)
        before[...] = found


def check_scale(found, row, stored):
    largest = [max(abs(end) for end in interval) for interval in row]
    least = [0 if low <= 0 <= high else min(abs(low), abs(high)) for low, high in row]
    code = {"int8": 127, "float8_e4m3fn": 448}[stored]
    low, high = (max(max(ends) / code, 1e-6) for ends in (least, largest))
    assert low * (1 - 2.0**-22) <= found <= high * (1 + 2.0**-22)


KINDS = {
    "ordinary": Model(),
    "GPT-J": Model(is_neox=False, packed=True),
    "table of the keys' type": Model(table="bfloat16", dtype="bfloat16"),
    "float16": Model(dtype="float16", table="float16", is_neox=False, positions="int32"),
    "float32": Model(dtype="float32", size=24, value_size=40, slots="int32"),
    "partial": Model(rotary=32, packed=True),
    "partial, behind": Model(rotary=32, offset=32, is_neox=False),
    "partial, between, GPT-J, to out": Model(rotary=16, offset=8, is_neox=False, out="auto"),
    "odd sizes": Model(size=46, value_size=17, rotary=10, offset=3, block_size=3, kv_heads=3),
    "odd sizes, GPT-J": Model(size=23, rotary=6, offset=5, is_neox=False, dtype="float16"),
    "one head": Model(heads=1, kv_heads=1, size=2, value_size=1, dtype="float32"),
    "large heads": Model(heads=1, kv_heads=1, size=512, value_size=256, blocks=2),
    "HND": Model(layout="HND", heads=6, kv_heads=3),
    "pages, fp8": Model(layout="packed", kv_cache_dtype="fp8", value_size=32),
    "int8, queries in fp8": Model(kv_cache_dtype="int8", out="fp8", dtype="float16"),
    "e5m2, queries in int8": Model(kv_cache_dtype="fp8_e5m2", out="int8", dtype="float32"),
    "x-packed": Model(layout="x-packed", dtype="float16", value_size=24),
    "x-packed, int8": Model(layout="x-packed", kv_cache_dtype="int8", is_neox=False),
    "interleaved values": Model(layout="interleaved", block_size=16, rotary=48),
    "scales of heads": Model(kv_cache_dtype="fp8_per_token_head", packed=True),
    "scales of heads, int8": Model(
        kv_cache_dtype="int8_per_token_head", size=40, value_size=24, rotary=16, norm=1e-5
    ),
    "sections": Model(sections=(16, 8, 8)),
    "sections inside a load": Model(sections=(5, 12, 15), is_neox=False),
    "sections that take turns": Model(sections=(12, 10, 10), interleaved=True),
    "turns that a warp shares": Model(
        sections=(12, 10, 10), interleaved=True, heads=8, kv_heads=8, positions="int32"
    ),
    "turns of 128 that a warp shares": Model(
        sections=(24, 20, 20), interleaved=True, size=128, kv_heads=4, table="bfloat16"
    ),
    "turns of float32 that a warp shares": Model(
        sections=(24, 20, 20), interleaved=True, size=128, dtype="float32", out="auto"
    ),
    "turns, few": Model(sections=(20, 6, 6), interleaved=True, is_neox=False, rotary=64, size=72),
    "normalised": Model(norm=1e-6),
    "normalised, weights less one": Model(norm=1e-5, bias=1.0, weight="bfloat16", packed=True),
    "normalised, without weights": Model(norm=1e-5, weights="none", is_neox=False, out="fp8"),
    "normalised, odd": Model(norm=1e-2, size=46, rotary=10, offset=3, heads=3, kv_heads=1),
    "normalised, large": Model(norm=1e-6, size=512, heads=2, kv_heads=1, dtype="float32", blocks=2),
    "in steps": Model(norm=1e-6, rounding="steps"),
    "in steps, fp8": Model(norm=1e-6, rounding="steps", kv_cache_dtype="fp8", dtype="float16"),
}


# Few tokens may go another way than more.
few_and_more = pytest.mark.parametrize("tokens", [rotary.FEW_TOKENS, rotary.FEW_TOKENS + 3])


@few_and_more
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(world, rng, kind, tokens):
    model = KINDS[kind]
    check(world, model, *model.case(rng, tokens))


@pytest.mark.parametrize("tokens", [1, 2, rotary.FEW_TOKENS, rotary.FEW_TOKENS + 1])
def test_numbers_of_tokens(world, rng, tokens):
    model = Model(heads=7, kv_heads=1, size=80, rotary=32, offset=16, out="auto")
    step, named = model.case(rng, max(tokens, 2))
    step[0], step[7] = step[0][:tokens], step[7][:tokens]
    check(world, model, step, named)


def test_arguments_are_in_the_order_of_the_template():
    given = {"rotary": rotary.TemplateArguments._fields, "rotary_few": rotary.OF_FEW}
    for name, fields in given.items():
        kernel = modules.Kernel("any", rotary.STEM, f"{name}<>", rotary.PARAMS)
        _, parameters = machine_code.template_parameters(kernel)
        words = [re.findall("[A-Z][a-z]*", parameter) for parameter in parameters]
        assert ["_".join(word).lower() for word in words] == list(fields)


@few_and_more
def test_strides_of_their_own(world, rng, tokens):
    """No array has the strides of another: of tokens, blocks, slots or heads."""
    model = Model(heads=3, kv_heads=2, size=32, dtype="float16", out="auto")
    step, named = model.case(rng, tokens)
    pads = iter(range(8, 80, 8))

    def spaced(spec):
        """The same shape, with elements behind each of its heads and so many rows of them."""
        *outer, heads, size = spec.shape
        pad = next(pads)
        shape = *(n + 1 for n in outer), heads + pad // 8, size + pad
        values = worlds.of_values(rotating.numbers(rng, shape, spec.dtype))
        return values[(*map(slice, outer), slice(heads), slice(size))]

    for at in (1, 2, 3, 5, 6):
        step[at] = spaced(step[at])
    named["out"] = spaced(named["out"])
    check(world, model, step, named)


def test_few_tokens_have_a_kernel_of_their_own(recorder, nothing_remembered):
    """In each call of a signature, whichever numbers of tokens came before."""
    torch = pytest.importorskip("torch")
    table = torch.zeros(9, 64)
    caches = [torch.zeros(9, 16, 2, 64) for _ in "kv"]
    for tokens in (20, 1, 20, rotary.FEW_TOKENS, rotary.FEW_TOKENS + 1, 3):
        positions, slots = torch.zeros(2, tokens, dtype=torch.int64)
        query, key, value = (torch.zeros(tokens, heads, 64) for heads in (4, 2, 2))
        cc.rotary_and_cache(positions, query, key, value, table, *caches, slots)
        ((expression, *_),) = recorder.take()
        assert ("rotary_few<" in expression) == (tokens <= rotary.FEW_TOKENS)


@few_and_more
@pytest.mark.parametrize("kind", ["ordinary", "normalised", "scales of heads", "x-packed"])
def test_tokens_beyond_the_slots(world, rng, kind, tokens):
    """As in a captured graph: their queries are rotated, and of their keys there may be no rows."""
    model = KINDS[kind]
    step, named = model.case(rng, tokens)
    step[2:4] = step[2][:-2], step[3][:-2]
    step[7] = step[7][:-2]
    check(world, model, step, named)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("slots", ["random", "consecutive", "random, few"])
def test_many_tokens_in_x_packed_caches(world, rng, slots, interleaved):
    """From 8,192 on the order of the work depends on what the slots look like. Angles are 0, so
    that keys stay as they are."""
    tokens, heads, size, blocks = int(rng.integers(8192, 8300)), 3, 16, 600
    tokens = 37 if "few" in slots else tokens
    rows = [rotating.rows(rng, tokens, heads, size, "float16") for _ in "qkv"]
    table = np.zeros((1, size), np.float32)
    table[:, : size // 2] = 1
    values = (2, size, 8) if interleaved else (size, 16)
    caches = [
        worlds.array(rng, (blocks, heads, *shape), "float16")
        for shape in ((size // 8, 16, 8), values)
    ]
    mapping = rng.permutation(blocks * 16)[: tokens - 3]
    if slots == "consecutive":
        mapping = np.arange(7, tokens + 4)
    mapping[rng.integers(2, tokens - 3, 20)] = -1
    positions = worlds.of_values(np.zeros(tokens, np.int64))
    step = positions, *rows, worlds.of_values(table), *caches, worlds.of_values(mapping)
    cc.rotary_and_cache(*map(world.put, step))

    query, key, value = (spec.on(spec.buffer.bytes) for spec in rows)
    expected = [spec.on(spec.buffer.bytes.copy()) for spec in caches]
    block, offset = mapping[mapping >= 0] // 16, mapping[mapping >= 0] % 16
    key, value = (array[: tokens - 3][mapping >= 0] for array in (key, value))
    expected[0][block, :, :, offset] = key.reshape(-1, heads, size // 8, 8)
    if interleaved:
        expected[1][block, :, offset // 8, :, offset % 8] = value
    else:
        expected[1][block, :, :, offset] = value
    for spec, wanted in zip((rows[0], *caches), (query, *expected)):
        np.testing.assert_array_equal(spec.on(world.bytes_of(spec)), wanted)


@pytest.mark.parametrize("layout", ["x-packed", "interleaved"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_several_parts_of_heads_in_x_packed_caches(world, rng, layout, kv_cache_dtype):
    """Heads of more bytes than a thread block takes, and tokens of more than one tile."""
    sizes = {"heads": 2, "kv_heads": 3, "size": 160, "value_size": 272, "rotary": 96}
    model = Model(
        **sizes, layout=layout, kv_cache_dtype=kv_cache_dtype, block_size=16, blocks=3, norm=1e-6
    )
    step, named = model.case(rng, tokens=21)
    slots = step[7].on(step[7].buffer.bytes)
    slots[:] = np.arange(9, 30)  # a group of slots that are neighbours, and others
    slots[18:] = [3, 40, -1]
    check(world, model, step, named)


@few_and_more
@pytest.mark.parametrize(
    "bad, sections, layout",
    [
        *itertools.product(
            [-1, rotating.POSITIONS, 2**31, 2**62, -(2**63)], [None, (8, 12, 12)], ["NHD"]
        ),
        (-1, (8, 12, 12), "x-packed"),
    ],
)
def test_positions_outside_the_table(world, rng, bad, sections, layout, tokens):
    """The token is skipped, in every array, and recorded."""
    model = Model(sections=sections, layout=layout)
    step, named = model.case(rng, tokens)
    step[0].on(step[0].buffer.bytes)[..., 2] = bad if sections is None else [3, bad, 5]
    check(world, model, step, named)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    assert {
        (f.op, f.argument, f.row, f.value, f.limit) for f in caught.value.faults
    } == {(NAME, "positions", 2, bad, rotating.POSITIONS)}  # fmt: skip


@few_and_more
@pytest.mark.parametrize("kind", ["ordinary", "x-packed"])
def test_slots_past_the_cache(world, rng, kind, tokens):
    model = KINDS[kind]
    step, named = model.case(rng, tokens)
    step[7].on(step[7].buffer.bytes)[3] = 20
    check(world, model, step, named)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    faults = {(f.op, f.argument, f.row, f.value, f.limit) for f in caught.value.faults}
    assert faults == {(NAME, "slot_mapping", 3, 20, 20)}


@pytest.mark.parametrize("is_neox", [True, False])
def test_worked_rotation(world, is_neox):
    """By hand: cosines and sines of the pairs are (3/5, 4/5) and (-4/5, 3/5), the head (5, 10, 15,
    20). In NeoX's style (5, 15) turns to (3 - 12, 9 + 4) and (10, 20) to (-8 - 12, -16 + 6); in
    GPT-J's (5, 10) to (3 - 8, 6 + 4) and (15, 20) to (-12 - 12, -16 + 9)."""
    expected = [-9, -20, 13, -10] if is_neox else [-5, 10, -24, -7]
    head = np.array([[[5, 10, 15, 20]]], np.float16)
    table = np.zeros((3, 4), np.float32)
    table[1] = 0.6, -0.8, 0.8, 0.6
    caches = [worlds.of_values(np.zeros((1, 2, 1, 4), np.float16)) for _ in "kv"]
    rows = [worlds.of_values(head) for _ in "qkv"]
    position, slot = (worlds.of_values(np.array([1])) for _ in "ps")
    specs = [position, *rows, worlds.of_values(table), *caches, slot]
    cc.rotary_and_cache(*map(world.put, specs), is_neox)

    def numbers(spec):
        return spec.on(world.bytes_of(spec)).reshape(-1).tolist()

    assert numbers(specs[1]) == expected
    assert numbers(specs[2]) == numbers(specs[3]) == head.reshape(-1).tolist()
    assert numbers(specs[5]) == [0] * 4 + expected
    assert numbers(specs[6]) == [0] * 4 + head.reshape(-1).tolist()


def test_worked_norm(world):
    """By hand: the mean square of (3, 4) is 12.5, with epsilon 12.5 it is 25; so (3, 4) / 5, times
    weights of 5 / 2 and 1 / 4 with 2.5 and 1 added; then turned by a quarter."""
    head = np.array([[[3, 4]]], np.float32)
    specs = [
        worlds.of_values(np.array([0])), *(worlds.of_values(head) for _ in "qkv"),
        worlds.of_values(np.array([[0, 1]], np.float32)),
        *(worlds.of_values(np.zeros((1, 1, 1, 2), np.float32)) for _ in "kv"),
        worlds.of_values(np.array([0])),
    ]  # fmt: skip
    weights = [worlds.of_values(np.array(w, np.float32)) for w in ([1.5, 4.0], [0.25, -1.25])]
    cc.rotary_and_cache(
        *map(world.put, specs), norm_eps=12.5, norm_weight_bias=1.0,
        q_norm_weight=world.put(weights[0]), k_norm_weight=world.put(weights[1]),
    )  # fmt: skip
    for spec, expected in ((specs[1], [-4.0, 1.5]), (specs[5], [0.2, 0.75])):
        found = spec.on(world.bytes_of(spec)).reshape(-1)
        np.testing.assert_allclose(found, expected, rtol=2.0**-21)


@pytest.mark.parametrize("flat", [True, False])
def test_heads_in_one_dimension(world, rng, flat):
    """Queries, keys and values as a projection gives them, [token, heads * element]."""
    model = KINDS["GPT-J"]
    step, named = model.case(rng)
    if not flat:
        check(world, model, step, named)
        return
    shaped = worlds.NumPyWorld()
    call(shaped, model, step, named)
    flattened = []
    for spec in step[1:4]:
        tokens, heads, size = spec.shape
        strides = spec.strides[::2]
        flattened.append(
            worlds.Spec(spec.buffer, spec.offset, (tokens, heads * size), strides, spec.dtype)
        )
    call(world, model, [step[0], *flattened, *step[4:]], named)
    for spec in step:
        np.testing.assert_array_equal(world.bytes_of(spec), shaped.bytes_of(spec))


@pytest.mark.parametrize("kind", ["ordinary", "in steps", "x-packed"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8"])
def test_the_same_as_one_after_the_other(world, rng, kind, kv_cache_dtype):
    """In steps it is, byte for byte, `rotary_embedding` and then the write; raw in either way."""
    layout = "x-packed" if kind == "x-packed" else "NHD"
    rounding = "once" if kind == "ordinary" and kv_cache_dtype == "auto" else "steps"
    model = Model(kv_cache_dtype=kv_cache_dtype, layout=layout, rounding=rounding, packed=True)
    step, named = model.case(rng)
    call(world, model, step, named)
    apart = worlds.NumPyWorld()
    positions, query, key, value, table, *caches, slots = map(apart.put, step)
    cc.rotary_embedding(positions, query, key, 64, table)
    scales = [apart.put(s) if isinstance(s, worlds.Spec) else s
              for s in map(named.get, ("k_scale", "v_scale"))]  # fmt: skip
    write = cc.reshape_and_cache if kind == "x-packed" else cc.reshape_and_cache_flash
    write(key, value, *caches, slots, kv_cache_dtype, *scales)
    for spec in step[5:7]:
        np.testing.assert_array_equal(world.bytes_of(spec), apart.bytes_of(spec))
    found, expected = (w.bytes_of(step[1]) for w in (world, apart))
    queries = [step[1].on(storage)[:5] for storage in (found, expected)]
    np.testing.assert_array_equal(*(q.view(np.uint16) for q in queries))


@few_and_more
def test_special_numbers_go_through(world, rng, tokens):
    """Infinities, NaN, subnormals and zeros of either sign in queries, keys and tables are the same
    on every backend."""
    model = Model(dtype="float32", out="auto", size=64)
    step, named = model.case(rng, tokens)
    for spec in step[1:5]:
        view = spec.on(spec.buffer.bytes)
        bits = rng.integers(0, 2**32, view.shape, np.uint32).view(np.float32)
        tiny = rng.integers(0, 2**24, view.shape, np.uint32).view(np.float32)
        special = rng.choice(np.array([0.0, -0.0, np.inf, -np.inf, np.nan], np.float32), view.shape)
        kind = rng.integers(0, 4, view.shape)
        view[...] = np.select([kind == 0, kind == 1, kind == 2], [bits, tiny, special], view)
    numpy = worlds.NumPyWorld()
    for one in (numpy, world):
        call(one, model, step, named)
    for spec in (*step, named["out"]):
        np.testing.assert_array_equal(world.bytes_of(spec), numpy.bytes_of(spec))


def test_nothing_to_do(world, rng):
    model = KINDS["ordinary"]
    step, named = model.case(rng)
    step[0], step[7] = (
        worlds.of_values(np.empty(0, np.int64)),
        worlds.of_values(np.empty(0, np.int64)),
    )
    check(world, model, step, named)


class TestRefusals:
    """Each mistake raises a named error that tells the argument, and writes nothing."""

    def refused(self, world, rng, error, *words, change=None, model=None, **options):
        model = model or KINDS["ordinary"]
        step, named = model.case(rng)
        for index, spec in (change or {}).items():
            step[index] = spec(step[index]) if callable(spec) else spec
        named |= options
        with pytest.raises(error) as caught:
            call(world, model, step, named)
        assert issubclass(error, cc.CupyCacheError)
        for word in (NAME, *words):
            assert word in str(caught.value)
        for spec in [s for s in (*step, *named.values()) if isinstance(s, worlds.Spec)]:
            world.put(spec)
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    def test_shapes(self, world, rng):
        def short(spec):
            return spec[:3]

        self.refused(world, rng, cc.ShapeError, "query", "5 rows", change={1: short})
        self.refused(world, rng, cc.ShapeError, "slot_mapping", "key", "3", change={2: short})
        self.refused(world, rng, cc.ShapeError, "slot_mapping", "positions", change={0: short})
        self.refused(world, rng, cc.ShapeError, "key", "2 heads", change={2: lambda s: s[:, :1]})
        self.refused(world, rng, cc.ShapeError, "query", "64", change={1: lambda s: s[..., :32]})
        self.refused(world, rng, cc.ShapeError, "positions", change={0: lambda s: s[:, None]})
        self.refused(world, rng, cc.ShapeError, "positions", "2 dim", mrope_section=(8, 12, 12))

    def test_tables(self, world, rng):
        for size in (0, 3, 66):
            spec = worlds.array(rng, (4, size), "float32")
            self.refused(world, rng, cc.ShapeError, "cos_sin_cache", "rotary_dim", change={4: spec})
        self.refused(world, rng, cc.ShapeError, "cos_sin_cache", rope_dim_offset=1)
        spec = worlds.array(rng, (4, 64), "float16")
        self.refused(world, rng, cc.DTypeError, "cos_sin_cache", "float16", change={4: spec})

    def test_dtypes(self, world, rng):
        spec = worlds.array(rng, (6, 4, 64), "float32")
        self.refused(world, rng, cc.DTypeError, "key", "float32", change={1: spec})
        spec = worlds.array(rng, (5,), "int16")
        self.refused(world, rng, cc.DTypeError, "positions", "int16", change={0: spec})
        self.refused(
            world, rng, cc.ArgumentError, "kv_cache_dtype", model=Model(kv_cache_dtype="x")
        )

    def test_options(self, world, rng):
        refuse = self.refused
        refuse(world, rng, cc.ArgumentError, "rounding", rounding="twice")
        refuse(world, rng, cc.ArgumentError, "rope_dim_offset", rope_dim_offset=-1)
        refuse(world, rng, cc.ArgumentError, "norm_eps", norm_eps=float("nan"))
        refuse(world, rng, cc.ArgumentError, "norm_eps", norm_eps=-1e-6)
        refuse(world, rng, cc.ArgumentError, "norm_eps", "0 or", norm_eps=1e-40)  # 0 to a GPU
        refuse(world, rng, cc.ArgumentError, "norm_eps", norm_eps=1e300)  # float32 has none such
        refuse(world, rng, cc.ArgumentError, "norm_weight_bias", norm_weight_bias="1")
        refuse(world, rng, cc.ArgumentError, "out", "fp8", out_dtype="fp8")
        refuse(world, rng, cc.ArgumentError, "out_dtype", out_dtype="fp4")
        refuse(world, rng, cc.ArgumentError, "k_norm_weight", "norm_eps",
               k_norm_weight=worlds.array(rng, (64,), "float32"))  # fmt: skip
        refuse(world, rng, cc.DTypeError, "k_norm_weight", norm_eps=1e-6, **{
            name: worlds.array(rng, (64,), dtype)
            for name, dtype in (("q_norm_weight", "float32"), ("k_norm_weight", "bfloat16"))
        })  # fmt: skip
        model = KINDS["sections"]
        refuse(world, rng, cc.ArgumentError, "mrope_section", "32", model=model,
               mrope_section=(16, 8, 9))  # fmt: skip
        refuse(world, rng, cc.ArgumentError, "mrope_section", "three", mrope_section=7)

    def test_weights(self, world, rng):
        spec = worlds.array(rng, (63,), "float32")
        self.refused(world, rng, cc.ShapeError, "q_norm_weight", norm_eps=1e-6, q_norm_weight=spec)

    def test_scale_caches(self, world, rng):
        pair = [worlds.array(rng, (5, 4, 2), "float32") for _ in "kv"]
        self.refused(world, rng, cc.ArgumentError, "v_scale_cache", k_scale_cache=pair[0])
        self.refused(world, rng, cc.ArgumentError, "kv_cache_dtype", "fp8_per_token_head",
                     k_scale_cache=pair[0], v_scale_cache=pair[1])  # fmt: skip
        model = Model(kv_cache_dtype="fp8_per_token_head")
        right = model.case(rng)[1]["v_scale_cache"]
        wrong = worlds.array(rng, right.shape, "float16")
        self.refused(world, rng, cc.DTypeError, "v_scale_cache", model=model, v_scale_cache=wrong)
        shared = worlds.Spec(right.buffer, 0, right.shape, (0, *right.strides[1:]), right.dtype)
        self.refused(world, rng, cc.StrideError, "v_scale_cache", "share", model=model,
                     v_scale_cache=shared)  # fmt: skip
        for layout in ("x-packed", "interleaved"):
            model = Model(layout=layout, kv_cache_dtype="fp8_per_token_head", block_size=16)
            self.refused(world, rng, cc.ShapeError, "key_cache", "four dimensions", model=model)

    def test_memory(self, world, rng):
        def overlapping(spec):
            return worlds.Spec(spec.buffer, 0, spec.shape, (0, *spec.strides[1:]), spec.dtype)

        self.refused(world, rng, cc.StrideError, "query", "share", change={1: overlapping})
        step, _ = KINDS["ordinary"].case(rng)
        self.refused(world, rng, cc.ArgumentError, "out", "query", change={1: step[1]},
                     out=step[1][:5])  # fmt: skip
