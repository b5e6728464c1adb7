# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import functools
import io
import os
import re
import subprocess
import sys
import threading

import cases
import numpy as np
import pytest
import worlds
from machine_code import CONVERTING

import cupy_cache as cc
from cupy_cache.attention import alibi_slopes as attention
from cupy_cache.compilation.calls import OPERATIONS
from cupy_cache.compilation.model import Rotation
from cupy_cache.compilation.specialisations import specialisations
from cupy_cache.ops.shared import blocks
from cupy_cache.runtime import arrays, driver, modules

HEADS, SIZE, BLOCK = 4, 64, 16
LAYOUTS = ("NHD", "HND", "packed", "x-packed", "rows", "indexer")


class Calls:
    """Every operation as a model would call it, on whatever arrays ``world`` makes."""

    TOKENS, BLOCKS = 5, 6

    def __init__(self, world, rng, layout, index, value_size, kv_cache_dtype):
        self.world, self.rng, self.layout, self.index = world, rng, layout, index
        self.value_size, self.kv_cache_dtype = value_size, kv_cache_dtype
        self.stored = "uint8" if kv_cache_dtype == "fp8" else "bfloat16"

    def make(self, *shape, dtype="bfloat16"):
        return self.world.put(worlds.array(self.rng, shape, dtype))

    def numbers(self, values, role="slots"):
        index = self.index if isinstance(self.index, str) else self.index[role]
        return self.world.put(worlds.of_values(np.array(values, index)))

    def caches(self):
        """Of one layer, as specs."""
        sizes = SIZE, self.value_size
        shapes = {
            "rows": [(BLOCK, SIZE)],
            "x-packed": [(HEADS, SIZE // 8, BLOCK, 8), (HEADS, self.value_size, BLOCK)],
            "NHD": [(BLOCK, HEADS, size) for size in sizes],
            "HND": [(HEADS, BLOCK, size) for size in sizes],
            "packed-NHD": [(BLOCK, HEADS, sum(sizes))],
            "packed-HND": [(HEADS, BLOCK, sum(sizes))],
        }[self.layout]
        if self.layout == "x-packed" and self.stored == "uint8":
            shapes[0] = (HEADS, SIZE // 16, BLOCK, 16)
        caches = [worlds.array(self.rng, (self.BLOCKS, *s), self.stored) for s in shapes]
        if "HND" in self.layout:
            caches = [cache.permuted(0, 2, 1, 3) for cache in caches]
        if "packed-" in self.layout:
            caches = [caches[0][..., :SIZE], caches[0][..., SIZE:]]
        return caches

    def run(self):
        specs = self.caches()
        caches = [self.world.put(spec) for spec in specs]
        slots = self.numbers(range(self.TOKENS))
        self.write(caches, slots)
        self.copy(specs, caches)
        self.read(specs, caches)
        self.move([tuple(caches)], None if self.layout == "x-packed" else slots)
        slopes = cc.alibi_slopes(HEADS, framework="emulated")
        cc.place_slopes([0.5], framework="emulated")
        for dtype in ("float32", "bfloat16"):
            for keys in (16, 5):
                positions = (self.numbers(n, "positions") for n in ([3], range(keys)))
                cc.alibi_bias(slopes, *positions, dtype=dtype)
        rows = [self.make(self.TOKENS, HEADS, self.value_size) for _ in "ops"]
        lse = self.make(HEADS, self.TOKENS, dtype="float32")
        cc.merge_attn_states(rows[0], rows[1], lse, rows[2], lse)

    def write(self, caches, slots):
        key, value = (self.make(self.TOKENS, HEADS, size) for size in (SIZE, self.value_size))
        step = *caches, slots, self.kv_cache_dtype
        if self.layout == "rows":
            self.write_entries(*caches, slots)
            return
        write = cc.reshape_and_cache if self.layout == "x-packed" else cc.reshape_and_cache_flash
        write(key, value, *step, 0.5, 0.5)
        write(key, value, *step, *(self.make(HEADS, dtype="float32") for _ in "kv"))
        if self.layout != "x-packed" and self.stored == "uint8":
            shape = self.BLOCKS, BLOCK, HEADS
            scales = [self.make(*shape, dtype="float32") for _ in "kv"]
            step = *caches, *scales, slots, self.kv_cache_dtype
            cc.reshape_and_cache_flash_per_token_head(key, value, *step)

    def write_entries(self, cache, slots):
        def entries(*layers):
            sizes = self.value_size, SIZE - self.value_size
            return [self.make(*layers, self.TOKENS, size) for size in sizes]

        cc.concat_and_cache_mla(*entries(), cache, slots, self.kv_cache_dtype, 0.5)
        addresses = self.world.put(worlds.of_values(np.array([arrays.view(cache, "").ptr])))
        scales = self.make(1, dtype="float32") if self.kv_cache_dtype == "fp8" else None
        geometry = BLOCK, BLOCK * SIZE, SIZE
        for where in ([cache], addresses):
            cc.concat_and_cache_mla_grouped(
                *entries(1), where, self.numbers([range(self.TOKENS)]), *geometry, scales,
                self.kv_cache_dtype, num_blocks=self.BLOCKS,
            )  # fmt: skip

    def copy(self, specs, caches):
        for mapping in ([(0, 1)], self.numbers([[0, 1]], "blocks")):
            if self.layout == "rows":
                cc.copy_blocks_mla(caches, mapping)
            else:
                cc.copy_blocks(caches[:1], caches[1:], mapping)
        for spec, cache in zip(specs, caches):
            cc.swap_blocks(cache, self.make(*spec.shape, dtype=self.stored), [(0, 1)])

    def read(self, specs, caches):
        table = self.numbers([[0, 1]], "tables")
        bounds = self.numbers([0, self.TOKENS], "bounds")
        positions = self.numbers(range(self.TOKENS), "positions")
        cc.slot_mapping(table, positions, bounds, BLOCK)
        for rows in (None, self.numbers([0], "requests")):
            step = rows, positions, bounds, [BLOCK, BLOCK]
            cc.slot_mapping_groups([table, table], *step)
        if len(caches) == 2:
            bound = cc.PagedKVCache(*([cache] for cache in caches), self.kv_cache_dtype, 0.5, 0.5)
            out = [self.make(self.TOKENS, HEADS, size) for size in (SIZE, self.value_size)]
            for starts in (None, self.numbers([3], "starts")):
                bound.gather(0, table, bounds, seq_starts=starts, out=out)
        if self.layout == "x-packed":
            for cache, size, side in zip(caches, (SIZE, self.value_size), ("key", "value")):
                rows = self.make(self.TOKENS, HEADS, size, dtype=self.stored)
                cc.gather_cache(cache, rows, table, bounds, layout=f"x-packed-{side}")
            return
        for spec, cache in zip(specs, caches):
            rows, numbers = (
                self.make(self.TOKENS, *spec.shape[2:], dtype=dtype)
                for dtype in (self.stored, "bfloat16")
            )
            cc.gather_cache(cache, rows, table, bounds, self.numbers([3], "starts"))
            cc.cp_gather_cache(cache, rows, table, bounds, 1)
            step = table, bounds, None, self.TOKENS, self.kv_cache_dtype, 0.5
            cc.gather_and_maybe_dequant_cache(cache, numbers, *step)

    def move(self, caches, slots):
        """``slots`` None: whole blocks only."""
        buffer = self.make(6 * BLOCK * HEADS * SIZE * 4, dtype="uint8")
        for chosen in ([1], self.numbers([1], "blocks")):
            cc.pack_blocks(caches, chosen, buffer)
            cc.unpack_blocks(buffer, caches, chosen)
            cc.zero_blocks(caches, chosen)
        for chosen in () if slots is None else ([1, 2], slots):
            cc.pack_tokens(caches, chosen, buffer)
            cc.unpack_tokens(buffer, caches, chosen)


@pytest.mark.parametrize("kv_cache_dtype", ("auto", "fp8"))
@pytest.mark.parametrize("value_size", (SIZE, 48))
def test_calls_find_all_their_kernels_warm(emulated_world, rng, value_size, kv_cache_dtype):
    """What real calls load is among what is warmed up for their shape."""
    for layout in ("NHD", "HND", "packed-NHD", "packed-HND", "x-packed", "rows"):
        for index in ("int32", "int64"):
            arguments = layout, index, value_size, kv_cache_dtype
            needed = needed_by(
                emulated_world, lambda world, given=arguments: Calls(world, rng, *given).run()
            )
            named = [layout.partition("-")[0] if "packed-" in layout else layout]
            warm = specialisations(
                HEADS, SIZE, BLOCK, layouts=named, head_size_v=value_size, index_dtypes=[index],
                kv_cache_dtype=kv_cache_dtype,
            )  # fmt: skip
            missing = {kernel.key for kernel in needed} - {kernel.key for kernel in warm}
            assert not missing, arguments
            assert {kernel.stem for kernel in needed} >= {"copy_blocks", "slot_mapping"}


ROLES = ("slots", "positions", "tables", "bounds", "starts", "requests", "blocks")
# What vLLM's engine has.
ENGINE = dict.fromkeys(ROLES, "int32") | dict.fromkeys(("slots", "positions", "blocks"), "int64")


@pytest.mark.whole
@pytest.mark.parametrize("layout", ["NHD", "HND", "packed-NHD", "x-packed", "rows"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_an_engine_runs_after_warmup(gpu, emulated_world, rng, layout, kv_cache_dtype):
    """By default, and where no kernel may be loaded any more."""
    named = [layout.partition("-")[0] if "packed-" in layout else layout]
    assert cc.warmup(HEADS, SIZE, BLOCK, layouts=named, kv_cache_dtype=kv_cache_dtype,
                     head_size_v=48, progress=False)  # fmt: skip
    before = len(gpu)
    arguments = layout, ENGINE, 48, kv_cache_dtype
    needed = needed_by(
        emulated_world, lambda world: Calls(world, rng, *arguments).run(),
        load=lambda kernel: modules.load(kernel, 1),
    )  # fmt: skip
    assert len(needed) > 10 and len(gpu) == before


@pytest.mark.parametrize("number", range(6))
def test_every_mixture_that_is_named(emulated_world, rng, number):
    """Each role has a type of its own."""
    mixture = {role: str(rng.choice(["int32", "int64"])) for role in ROLES}
    if number == 0:
        mixture |= {"tables": "int32", "bounds": "int32", "starts": "int64"}
    # Without requests their type is the table's; what is given for both, they have.
    warm = specialisations(HEADS, SIZE, BLOCK, index_dtypes=["int32", "int64"])
    needed = needed_by(
        emulated_world, lambda world: Calls(world, rng, "NHD", mixture, SIZE, "auto").run()
    )
    missing = {kernel.key for kernel in needed} - {kernel.key for kernel in warm}
    assert not missing, mixture


def needed_by(emulated_world, run, load=None):
    """The kernels that ``run(world)`` loads, each with ``load``."""
    world, needed = emulated_world(), set()

    class Driver(type(world.driver)):
        def load(self, kernel, device, stream):
            needed.add(kernel)
            if load is not None:
                load(kernel)

        def launch(self, loaded, grid, threads, stream, record):
            """Only what is loaded counts."""

        def capturing(self, stream, device):
            return True

    noting = Driver()
    noting.pinned = world.driver.pinned
    driver.active = noting  # until the world is closed
    try:
        run(world)
    finally:
        world.close()
    return needed


def function_of(kernel):
    return re.match(r"cupy_cache::(\w+)", kernel.expression)[1]


@pytest.mark.whole
@pytest.mark.parametrize("op", sorted({name.partition("-")[0] for name in cases.CASES}))
def test_every_operation_can_be_warmed(emulated_world, rng, op):
    """What its ordinary calls launch is among what it needs for the one or the other model."""
    assert op in OPERATIONS, "write its calls in cupy_cache/compilation/calls.py"
    size = 128 if op in ("paged_attention", "rotary_and_cache") else 576  # of latent attention
    warm = {
        function_of(kernel)
        for kv_cache_dtype, layouts in (
            ("auto", LAYOUTS),
            ("fp8", LAYOUTS),
            ("fp8_ds_mla", ["rows"]),
        )
        for kernel in specialisations(
            1,
            size,
            16,
            layouts=layouts,
            head_size_v=min(size, 512),
            kv_cache_dtype=kv_cache_dtype,
            ops=[op],
        )
    }
    for name in cases.CASES:
        if name.partition("-")[0] == op:
            needed = needed_by(emulated_world, cases.CASES[name](rng).call)
            assert needed and {function_of(kernel) for kernel in needed} <= warm


def test_operations_that_convert_are_compiled_as_such():
    """tests/machine_code.py names them."""

    def kernels(op, name):
        layouts = ("NHD", "HND", "packed", "x-packed")
        return specialisations(8, 128, 16, layouts=layouts, kv_cache_dtype=name, ops=[op])

    converting = {
        op
        for op in OPERATIONS
        for name in ("fp8", "int8")
        if any(kernel.converts for kernel in kernels(op, name))
    }
    assert converting == set(CONVERTING)


def test_each_kernel_once():
    kernels = list(specialisations(8, 128, 16, layouts=LAYOUTS, index_dtypes=("int32", "int64")))
    assert len({kernel.key for kernel in kernels}) == len(kernels)


@pytest.mark.parametrize("heads", (1, 8, 64, 1024))
def test_copies_of_more_and_less(heads):
    for op in ("copy_blocks", "swap_blocks"):
        items = {
            int(kernel.expression.split(", ")[6])
            for kernel in specialisations(heads, 128, 16, ops=[op])
        }
        assert items == {blocks.ITEMS, blocks.WAVE_ITEMS}


def test_sparse_attention():
    """Entries of DeepSeek V3.2, and its indexer's keys."""
    kernels = list(
        specialisations(
            1, 576, 64, layouts=("rows",), head_size_v=512, kv_cache_dtype="fp8_ds_mla",
            ops=("concat_and_cache_mla", "cp_gather_and_upconvert_fp8_kv_cache"),
        )
    )  # fmt: skip
    found = {re.match(r"cupy_cache::(\w+)", kernel.expression)[1] for kernel in kernels}
    assert found == {"concat_and_cache_fp8_ds_mla", "gather_fp8_ds_mla"}
    indexer = specialisations(1, 128, 64, layouts=("indexer",))
    assert {kernel.stem for kernel in indexer} >= {
        "indexer_k_quant_and_cache", "cp_gather_indexer_k_quant_cache"
    }  # fmt: skip


def test_dtypes_of_one_width_share_their_kernels():
    """Where bytes are moved."""
    computing = "merge_attn", "paged_attention", "rotary", "concat_and_cache_mla_rope"
    moving = [op for op in OPERATIONS if not op.startswith(computing)]
    half, other_half, single = (
        {kernel.key for kernel in specialisations(8, 128, 16, dtype, ops=moving)}
        for dtype in ("float16", "bfloat16", "float32")
    )
    assert half == other_half != single


ROTATIONS = [
    {},
    {"is_neox": False, "rotary_dim": 32, "rope_dim_offset": 16, "cos_sin_dtype": "bfloat16"},
    {"is_neox": True, "norm_eps": 1e-6, "out": True, "rounding": "steps"},
    {"is_neox": True, "norm_eps": 1e-6, "norm_dtype": "float32", "out_dtype": "fp8"},
    {"is_neox": True, "mrope_section": (8, 12, 12), "cos_sin_dtype": "float32"},
    {"is_neox": True, "mrope_section": (12, 10, 10), "mrope_interleaved": True, "out": True},
]


def test_a_rotation_is_what_users_are_told():
    assert Rotation._fields == tuple(cc.types.Rotation.__annotations__)


@pytest.mark.each("rotation")
@pytest.mark.parametrize("stored", ["auto", "int8_per_token_head"])
@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_rotations(rng, emulated_world, rotation, stored):
    """What a model that rotates so calls is loaded."""
    names = "rotary_and_cache", "rotary_embedding"
    ready = {
        kernel.key
        for kernel in specialisations(
            HEADS, SIZE, BLOCK, index_dtypes=None, num_heads=8, kv_cache_dtype=stored,
            rotary=rotation, ops=names,
        )
    }  # fmt: skip
    needed = needed_by(emulated_world, functools.partial(rotate, rng, rotation, stored))
    found = {kernel.key for kernel in needed}
    plain = stored == "auto" and not {"norm_eps", "mrope_section"} & set(rotation)
    assert len(found) == 2 + plain and found <= ready  # few tokens may have a kernel of their own
    if {"is_neox", "cos_sin_dtype"} <= set(rotation) and stored != "auto":
        assert found == ready  # and nothing else


@pytest.mark.whole
@pytest.mark.parametrize("stored", ["auto", "fp8", "fp8_per_token_head", "int8_per_token_head"])
def test_attention_has_the_scales_that_the_cache_has(stored):
    """One for each array, or one for each token and head."""
    ready = list(
        specialisations(8, 128, 16, "bfloat16", kv_cache_dtype=stored, ops=["paged_attention"])
    )
    by_token = stored.endswith("per_token_head")
    assert ready and all(("TokenScaled" in kernel.expression) == by_token for kernel in ready)


def rotate(rng, rotation, stored, world):
    """A step of a model that rotates so."""

    def put(*shape, dtype="bfloat16"):
        return world.put(worlds.array(rng, shape, dtype))

    given = dict(rotation)
    table = put(9, given.pop("rotary_dim", SIZE), dtype=given.pop("cos_sin_dtype", "float32"))
    axes = (3,) if "mrope_section" in given else ()
    positions = world.put(worlds.of_values(np.zeros((*axes, 5), np.int64)))
    is_neox = given.pop("is_neox", True)
    query, key, value = put(5, 8, SIZE), put(5, HEADS, SIZE), put(5, HEADS, SIZE)
    turns = {name: given[name] for name in given if name.startswith(("rope", "mrope"))}
    cc.rotary_embedding(positions, query, key, SIZE, table, is_neox, **turns)
    weights = given.pop("norm_dtype", "bfloat16")
    if "norm_eps" in given:
        given |= {f"{side}_norm_weight": put(SIZE, dtype=weights) for side in "qk"}
    if given.pop("out", "out_dtype" in given):
        given["out"] = put(5, 8, SIZE, dtype="uint8" if "out_dtype" in given else "bfloat16")
    element = "bfloat16" if stored == "auto" else "uint8"
    caches = [put(4, BLOCK, HEADS, SIZE, dtype=element) for _ in "kv"]
    if stored != "auto":
        given |= {f"{side}_scale_cache": put(4, BLOCK, HEADS, dtype="float32") for side in "kv"}
    slots = world.put(worlds.of_values(np.arange(5)))
    step = positions, query, key, value, table, *caches, slots, is_neox, stored
    cc.rotary_and_cache(*step, **given)


@pytest.mark.parametrize(
    "rotation, words",
    [
        ({"heads": 8}, ("rotary", "rotary_dim", "'heads'")),
        ({"rotary_dim": 0}, ("rotary[rotary_dim]", "positive")),
        ({"cos_sin_dtype": "float31"}, ("rotary[cos_sin_dtype]", "float31")),
        ({"mrope_section": (1, 2)}, ("mrope_section", "three integers")),
        ({"rotary_dim": 128}, ("rotary_and_cache", "cos_sin_cache")),
    ],
)
def test_rotations_that_are_refused(rotation, words):
    with pytest.raises(cc.CupyCacheError) as caught:
        list(specialisations(HEADS, SIZE, BLOCK, rotary=rotation, ops=["rotary_and_cache"]))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.whole
@pytest.mark.parametrize("soft_cap", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_with_slopes_and_caps(rng, emulated_world, alibi, soft_cap):
    """The kernels of a model that attends so, and none of one that does not."""

    def ready(alibi, soft_cap):
        warm = specialisations(
            HEADS, SIZE, BLOCK, index_dtypes=None, num_heads=8, ops=["paged_attention"],
            alibi=alibi, soft_cap=soft_cap,
        )  # fmt: skip
        return {kernel.key for kernel in warm}

    def attend(world):
        query, *caches = (
            world.put(worlds.array(rng, shape, "bfloat16"))
            for shape in ((5, 8, SIZE), *[(4, BLOCK, HEADS, SIZE)] * 2)
        )
        numbers = np.zeros((5, 2), np.int32), np.ones(5, np.int32), np.arange(6, dtype=np.int32)
        table, lengths, starts = (world.put(worlds.of_values(array)) for array in numbers)
        slopes = world.put(worlds.array(rng, (8,), "float32")) if alibi else None
        for named in ({}, {"query_start_loc": starts}):
            cc.paged_attention(
                query, *caches, table, lengths, alibi_slopes=slopes,
                soft_cap=30.0 if soft_cap else None, **named,
            )  # fmt: skip

    found = {kernel.key for kernel in needed_by(emulated_world, attend)}
    assert found and found <= ready(alibi, soft_cap)
    assert not found & (ready(not alibi, soft_cap) | ready(alibi, not soft_cap))


def test_query_heads():
    """By default as many as there are of keys and values."""
    for named, heads in (({}, 8), ({"num_heads": 32}, 32)):
        (kernel,) = specialisations(8, 128, 16, ops=["merge_attn_states"], **named)
        assert f", {heads}, 256>" in kernel.expression


def test_only_the_operations_asked_for():
    kernels = list(specialisations(8, 128, 16, ops=("reshape_and_cache_flash",)))
    assert [kernel.op for kernel in kernels] == ["reshape_and_cache_flash"]
    assert not list(specialisations(8, 128, 16, ops=("reshape_and_cache",)))  # not for NHD


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have two GPUs, and a loader that notes what it is given."""
    pair = driver.CudaDriver()
    monkeypatch.setattr(pair, "device_count", lambda: 2, raising=False)
    monkeypatch.setattr(pair, "current_device", lambda: 1, raising=False)
    monkeypatch.setattr(pair, "capability", lambda device: (80, 90)[device])
    monkeypatch.setattr(pair, "shared_memory", lambda device: (163 << 10, 227 << 10)[device])
    monkeypatch.setattr(driver, "active", pair)
    monkeypatch.setattr(modules, "_loaded", {})
    monkeypatch.setenv("CUPYCACHE_NO_COMPILE", "1")
    notes = []

    def load(kernel, device):
        notes.append((kernel, device, threading.current_thread().name))
        return kernel

    monkeypatch.setattr(modules, "_load", load)
    return notes


def test_loads_all_on_the_device_even_where_nothing_else_may(gpu):
    expected = {kernel.key for kernel in specialisations(8, 128, 16, index_dtypes=None)}
    assert cc.warmup(8, 128, 16, progress=False) == len(expected)
    assert {kernel.key for kernel, _, _ in gpu} == expected
    assert {device for _, device, _ in gpu} == {1}
    assert threading.current_thread().name not in {thread for _, _, thread in gpu}
    before = len(gpu)
    assert cc.warmup(8, 128, 16, progress=False) == before
    assert len(gpu) == before  # all were loaded
    cc.warmup(8, 128, 16, device="cuda:0", ops=["alibi_slopes"], progress=False)
    assert [(kernel, device) for kernel, device, _ in gpu[before:]] == [(attention.ALIBI, 0)]
    with pytest.raises(cc.KernelError, match="NO_COMPILE"):
        modules.load(attention.PLACE, 0)


def test_each_gpu_gets_the_kernels_that_run_there(gpu):
    """Some are for one compute capability alone."""
    latent = {"layouts": ["rows"], "head_size_v": 512, "ops": ["paged_attention_mla"]}
    counts = [
        cc.warmup(1, 576, 16, **latent, device=device, progress=False)
        for device in ("cuda:0", "cuda:1")
    ]
    of_each = [{kernel.only for kernel, its, _ in gpu if its == device} for device in (0, 1)]
    assert of_each == [{None}, {None, 90}] and counts[0] < counts[1] == len(gpu) - counts[0]


def test_kernels_that_need_more_shared_memory_than_a_gpu_has_are_left_out(gpu):
    """Such as two heads of 192 elements together: calls do not take them there."""
    for device in ("cuda:0", "cuda:1"):
        cc.warmup(4, 192, 16, ops=["paged_attention"], device=device, progress=False)
    most = [max(kernel.shared_bytes for kernel, its, _ in gpu if its == at) for at in (0, 1)]
    assert most[0] <= 163 << 10 < most[1] <= 227 << 10


def test_the_first_error_is_raised_when_all_others_are_ready(gpu, monkeypatch):
    load, count = modules._load, len(list(specialisations(8, 128, 16, index_dtypes=None)))

    def sometimes(kernel, device):
        if kernel.stem == "slot_mapping":
            raise cc.UnsupportedArchitectureError(f"{kernel!r} on {device}")
        return load(kernel, device)

    monkeypatch.setattr(modules, "_load", sometimes)
    with pytest.raises(cc.UnsupportedArchitectureError, match="warmup: [1-9] of .*on 1") as caught:
        cc.warmup(8, 128, 16, progress=False)
    failed = int(re.match(r"warmup: (\d+) of", str(caught.value))[1])
    assert len(gpu) == count - failed > 0


def test_an_operation_that_refuses_the_shape_stops_no_other(gpu, caplog):
    """One, of keys that are too long for it."""
    shape, options = (2, 65536, 16), {"kv_cache_dtype": "fp8", "progress": False}
    assert cc.warmup(*shape, **options) == len(gpu) > 10
    records = {record.getMessage(): record.levelname for record in caplog.records}
    assert set(records.values()) == {"WARNING"} and len(records) == 2
    for op in ("paged_attention", "reshape_and_cache_flash_per_token_head"):
        assert any(f"{op}: Invalid shape" in message for message in records)
    before = len(gpu)
    refused = ("reshape_and_cache_flash_per_token_head", "place_slopes")
    with pytest.raises(cc.ShapeError, match="at most 2048, got 65536"):
        cc.warmup(*shape, device=0, ops=refused, **options)
    assert [kernel.stem for kernel, _, _ in gpu[before:]] == ["place_slopes"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(gpu, monkeypatch):
    count = len(list(specialisations(8, 128, 16, index_dtypes=None)))
    for stream, lines in ((Terminal(), count + 2), (io.StringIO(), 1)):
        monkeypatch.setattr("sys.stderr", stream)
        cc.warmup(8, 128, 16)
        text = stream.getvalue()
        assert text.endswith(" s\n") and text.count("\n") == 1
        assert text.count("cupy_cache: kernels [") == lines
        assert f"{'#' * 30}] {count}/{count}" in text
    monkeypatch.setattr("sys.stderr", quiet := Terminal())
    cc.warmup(8, 128, 16, progress=False)
    assert not quiet.getvalue()


@pytest.mark.whole
@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"num_kv_heads": 0}, cc.ArgumentError, ("num_kv_heads", "positive")),
        ({"num_kv_heads": True}, cc.ArgumentError, ("num_kv_heads", "True")),
        ({"num_heads": "8"}, cc.ArgumentError, ("num_heads", "'8'")),
        ({"head_size_v": [64]}, cc.ArgumentError, ("head_size_v", "[64]")),
        ({"head_size": 64.0}, cc.ArgumentError, ("head_size", "64.0")),
        ({"block_size": -1}, cc.ArgumentError, ("block_size", "-1")),
        ({"head_size_v": 0}, cc.ArgumentError, ("head_size_v",)),
        ({"num_heads": 0}, cc.ArgumentError, ("num_heads",)),
        ({"dtype": "float12"}, cc.ArgumentError, ("dtype", "float12")),
        ({"kv_cache_dtype": "fp9"}, cc.ArgumentError, ("kv_cache_dtype", "'fp9'", "fp8_e5m2")),
        ({"layouts": ("NHD", "NDH")}, cc.ArgumentError, ("layouts", "'NDH'", "HND")),
        ({"layouts": "NHD"}, cc.ArgumentError, ("layouts", "sequence", "'NHD'")),
        ({"dtype": "fp8"}, cc.ArgumentError, ("dtype", "kv_cache_dtype='fp8' is it")),
        ({"index_dtypes": ("int16",)}, cc.ArgumentError, ("index_dtypes", "'int16'")),
        ({"ops": ("copy",)}, cc.ArgumentError, ("ops", "'copy'", "copy_blocks")),
        ({"device": 2}, cc.DeviceError, ("device", "2")),
        ({"device": "cpu"}, cc.DeviceError, ("device", "GPU")),
    ],
)
def test_bad_arguments_are_refused(gpu, change, error, words):
    arguments = {"num_kv_heads": 8, "head_size": 128, "block_size": 16, **change}
    with pytest.raises(error) as caught:
        cc.warmup(**arguments, progress=False)
    assert str(caught.value).startswith("warmup: ")
    for word in words:
        assert word in str(caught.value)
    assert not gpu


def test_refused_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(driver.active, "device_count", lambda: 0, raising=False)
    with pytest.raises(cc.DeviceError, match="expected a GPU"):
        cc.warmup(8, 128, 16)


# An engine's first step, in a process where nothing but warmup() may load a kernel.
STEP = """
import os
import torch
import cupy_cache as cc

layers, blocks, block, heads, size, tokens = 3, 8, 16, 4, 64, 5
cc.warmup(heads, size, block, "bfloat16", progress=False)
os.environ["CUPYCACHE_NO_COMPILE"] = "1"

def rows(*shape):
    return torch.randn(*shape, device="cuda").to(torch.bfloat16)

keys, values = ([rows(blocks, block, heads, size) for _ in range(layers)] for _ in "kv")
host = [torch.empty_like(cache, device="cpu").pin_memory() for cache in keys]
table = torch.tensor([[3, 1], [6, 2]], dtype=torch.int32, device="cuda")
starts = torch.tensor([0, 3, 5], dtype=torch.int32, device="cuda")
positions = torch.tensor([0, 1, 2, 17, 18], device="cuda")
lengths = torch.tensor([0, 3, 22], dtype=torch.int32, device="cuda")
mapping = torch.tensor([[1, 5]], device="cuda")
cleared = torch.tensor([7], device="cuda")
step = [(rows(tokens, heads, size), rows(tokens, heads, size)) for _ in range(layers)]
slots, out = torch.empty(tokens, dtype=torch.int64, device="cuda"), rows(layers, 22, heads, size)
expected = [[cache.clone() for cache in side] for side in (keys, values)]
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    cc.zero_blocks(list(zip(keys, values)), cleared)
    cc.copy_blocks(keys, values, mapping)
    cc.slot_mapping(table, positions, starts, block, out=slots)
    for layer, (key, value) in enumerate(step):
        cc.reshape_and_cache_flash(key, value, keys[layer], values[layer], slots)
        cc.gather_cache(keys[layer], out[layer], table, lengths)
    cc.swap_blocks(keys, host, [(2, 0), (6, 4)])
graph.replay()
torch.cuda.synchronize()
cc.raise_faults()
where = [3 * block, 3 * block + 1, 3 * block + 2, 2 * block + 1, 2 * block + 2]
assert slots.tolist() == where
for layer, written in enumerate(step):
    for side, source in zip(expected, written):
        side[layer][7] = 0
        side[layer][5] = side[layer][1]
        side[layer].view(-1, heads, size)[where] = source
    assert torch.equal(keys[layer], expected[0][layer])
    assert torch.equal(values[layer], expected[1][layer])
    cache = keys[layer].view(-1, heads, size)
    read = [3 * block + n for n in range(3)]
    read += [6 * block + n for n in range(16)] + [2 * block + n for n in range(3)]
    assert torch.equal(out[layer], cache[read])
    assert torch.equal(host[layer][[0, 4]], keys[layer][[2, 6]].cpu())
print("ran")
"""


@pytest.mark.gpu
def test_a_step_is_captured_after_warmup(tmp_path):
    """With an empty kernel cache: warmup compiled all that it needs."""
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        env={**os.environ, "CUPY_CACHE_DIR": str(tmp_path / "kernels")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "ran\n", done.stderr


@pytest.mark.gpu
def test_a_real_gpu_is_warm_afterwards(monkeypatch):
    import cupy

    cc.warmup(2, 32, 8, "float16", progress=False)
    monkeypatch.setenv("CUPYCACHE_NO_COMPILE", "1")
    key = cupy.ones((3, 2, 32), cupy.float16)
    caches = [cupy.zeros((4, 8, 2, 32), cupy.float16) for _ in range(2)]
    cc.reshape_and_cache_flash(key, key, *caches, cupy.arange(3))
    assert caches[0][0, :3].all() and not caches[0][0, 3:].any()
    assert arrays.view(caches[1], "cache").device.index == cupy.cuda.Device().id


NO_NAMES = [None, 3, [["NHD"]], [np.zeros(2)], {1}, "NHD", [None], np.array([1, 2])]


@pytest.mark.whole
@pytest.mark.parametrize("name", ["layouts", "ops", "index_dtypes"])
def test_names_in_any_sequence(name):
    """An iterator's, too; what has none is refused, whatever it is."""
    names = {"layouts": "NHD", "ops": "copy_blocks", "index_dtypes": "int32"}
    given = {n: [one] for n, one in names.items()}
    expected = [kernel.key for kernel in specialisations(2, 64, 16, **given)]
    assert expected
    for found in (iter([names[name]]), {names[name]: 1}, np.array([names[name]])):
        kernels = specialisations(2, 64, 16, **(given | {name: found}))
        assert [kernel.key for kernel in kernels] == expected
    for wrong in NO_NAMES[1 if name != "layouts" else 0 :]:
        with pytest.raises(cc.ArgumentError, match=f"warmup: Invalid value of {name}: expected"):
            list(specialisations(2, 64, 16, **(given | {name: wrong})))


def test_index_dtypes_in_every_form():
    torch = pytest.importorskip("torch")
    expected = [kernel.key for kernel in specialisations(2, 64, 16, index_dtypes=["int32"])]
    for dtype in (torch.int32, np.int32, np.dtype("i4"), "torch.int32"):
        kernels = specialisations(2, 64, 16, index_dtypes=[dtype])
        assert [kernel.key for kernel in kernels] == expected
    with pytest.raises(cc.ArgumentError, match=r"of index_dtypes: .*, got torch.float32"):
        list(specialisations(2, 64, 16, index_dtypes=[torch.float32]))


def test_a_rotation_that_is_no_dict():
    with pytest.raises(cc.DTypeError, match="warmup: Invalid type of rotary: expected a dict"):
        list(specialisations(2, 64, 16, rotary=np.zeros(2)))
