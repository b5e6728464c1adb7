# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import io
import threading

import numpy as np
import pytest
import worlds

import cupy_cache as cc
from cupy_cache import arrays, attention, launch, modules
from cupy_cache.warmup import specialisations

HEADS, SIZE, BLOCK = 4, 64, 16
LAYOUTS = ("NHD", "HND", "packed", "x-packed", "rows")


def call_everything(world, rng, layout, index, value_size):
    """Every operation once, as a model would, on whatever arrays ``world`` makes."""

    def make(*shape, dtype="bfloat16"):
        return worlds.array(rng, shape, dtype)

    def numbers(*values):
        return world.put(worlds.of_values(np.array(values, index)))

    tokens, blocks = 5, 6
    key, value = make(tokens, HEADS, SIZE), make(tokens, HEADS, value_size)
    slots = numbers(*range(tokens))
    if layout == "rows":
        caches = [make(blocks, BLOCK, HEADS * SIZE)]
    elif layout == "x-packed":
        caches = [make(blocks, HEADS, SIZE // 8, BLOCK, 8), make(blocks, HEADS, value_size, BLOCK)]
    elif layout == "NHD":
        caches = [make(blocks, BLOCK, HEADS, size) for size in (SIZE, value_size)]
    elif layout == "HND":
        by_head = [make(blocks, HEADS, BLOCK, size) for size in (SIZE, value_size)]
        caches = [cache.permuted(0, 2, 1, 3) for cache in by_head]
    else:
        inner = (HEADS, BLOCK) if layout == "packed-HND" else (BLOCK, HEADS)
        pages = make(blocks, *inner, SIZE + value_size)
        if layout == "packed-HND":
            pages = pages.permuted(0, 2, 1, 3)
        caches = [pages[..., :SIZE], pages[..., SIZE:]]
    put = [world.put(cache) for cache in caches]
    if layout == "x-packed":
        cc.reshape_and_cache(world.put(key), world.put(value), *put, slots)
    elif layout != "rows":
        cc.reshape_and_cache_flash(world.put(key), world.put(value), *put, slots)
    for mapping in ([(0, 1)], world.put(worlds.of_values(np.array([[0, 1]], index)))):
        if layout == "rows":
            cc.copy_blocks_mla(put, mapping)
        else:
            cc.copy_blocks(put[:1], put[1:], mapping)
    table, bounds = world.put(worlds.of_values(np.array([[0, 1]], index))), numbers(0, tokens)
    if layout != "x-packed":
        for cache, given in zip(caches, put):
            rows = world.put(make(tokens, *cache.shape[2:]))
            cc.gather_cache(given, rows, table, bounds, numbers(3))
    out = world.put(worlds.array(rng, (tokens,), "int64"))
    cc.slot_mapping(table, numbers(*range(tokens)), bounds, BLOCK, out=out)
    for cache, given in zip(caches, put):
        cc.swap_blocks(given, world.put(make(*cache.shape)), [(0, 1)])
    cc.alibi_slopes(HEADS, framework="emulated")
    cc.place_slopes([0.5], framework="emulated")


@pytest.mark.parametrize("value_size", (SIZE, 48))
@pytest.mark.parametrize("index", ("int32", "int64"))
@pytest.mark.parametrize("layout", ("NHD", "HND", "packed-NHD", "packed-HND", "x-packed", "rows"))
def test_calls_find_all_their_kernels_warm(
    emulated_world, monkeypatch, rng, layout, index, value_size
):
    """What real calls load is among what is warmed up for their shape."""
    needed = set()

    class Driver(launch.CudaDriver):
        def load(self, kernel, device, stream):
            needed.add(kernel)

        def launch(self, loaded, grid, threads, stream, record):
            pass

        def capturing(self, stream):
            return True

        def device_count(self):
            return 1

        def current_device(self):
            return 0

        def processors(self, device):
            return 132

    world = emulated_world()
    monkeypatch.setattr(launch, "driver", Driver())
    try:
        call_everything(world, rng, layout, index, value_size)
    finally:
        world.close()
    named = [layout.partition("-")[0] if "packed-" in layout else layout]
    warm = specialisations(
        HEADS, SIZE, BLOCK, layouts=named, head_size_v=value_size, index_dtypes=[index]
    )
    missing = {kernel.key for kernel in needed} - {kernel.key for kernel in warm}
    assert not missing
    assert {kernel.stem for kernel in needed} >= {"copy_blocks", "slot_mapping", "alibi_slopes"}


def test_each_kernel_once():
    kernels = list(specialisations(8, 128, 16, layouts=LAYOUTS, index_dtypes=("int32", "int64")))
    assert len({kernel.key for kernel in kernels}) == len(kernels)


def test_dtypes_of_one_width_share_their_kernels():
    half, other_half, single = (
        {kernel.key for kernel in specialisations(8, 128, 16, dtype)}
        for dtype in ("float16", "bfloat16", "float32")
    )
    assert half == other_half != single


def test_only_the_operations_asked_for():
    kernels = list(specialisations(8, 128, 16, ops=("reshape_and_cache_flash",)))
    assert [kernel.op for kernel in kernels] == ["reshape_and_cache_flash"]
    assert not list(specialisations(8, 128, 16, ops=("reshape_and_cache",)))  # not for NHD


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have two GPUs, and a loader that notes what it is given."""
    driver = launch.CudaDriver()
    monkeypatch.setattr(driver, "device_count", lambda: 2, raising=False)
    monkeypatch.setattr(driver, "current_device", lambda: 1, raising=False)
    monkeypatch.setattr(launch, "driver", driver)
    monkeypatch.setattr(modules, "_loaded", {})
    monkeypatch.setenv("CUPYCACHE_NO_COMPILE", "1")
    notes = []

    def load(kernel, device):
        notes.append((kernel, device, threading.current_thread().name))
        return kernel

    monkeypatch.setattr(modules, "_load", load)
    return notes


def test_loads_all_on_the_device_even_where_nothing_else_may(gpu):
    expected = {kernel.key for kernel in specialisations(8, 128, 16)}
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


def test_the_first_error_is_raised(gpu, monkeypatch):
    def load(kernel, device):
        raise cc.UnsupportedArchitectureError(f"{kernel!r} on {device}")

    monkeypatch.setattr(modules, "_load", load)
    with pytest.raises(cc.UnsupportedArchitectureError, match="on 1"):
        cc.warmup(8, 128, 16, progress=False)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(gpu, monkeypatch):
    count = len(list(specialisations(8, 128, 16)))
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


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"num_kv_heads": 0}, cc.ArgumentError, ("num_kv_heads", "positive")),
        ({"head_size": 64.0}, cc.ArgumentError, ("head_size", "64.0")),
        ({"block_size": -1}, cc.ArgumentError, ("block_size", "-1")),
        ({"head_size_v": 0}, cc.ArgumentError, ("head_size_v",)),
        ({"dtype": "float12"}, cc.ArgumentError, ("dtype", "float12")),
        ({"dtype": "int32"}, cc.DTypeError, ("dtype", "int32")),
        ({"layouts": ("NHD", "NDH")}, cc.ArgumentError, ("layouts", "'NDH'", "HND")),
        ({"layouts": "NHD"}, cc.ArgumentError, ("layouts", "sequence", "'NHD'")),
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
    for word in words:
        assert word in str(caught.value)
    assert not gpu


def test_refused_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(launch.driver, "device_count", lambda: 0, raising=False)
    with pytest.raises(cc.DeviceError, match="expected a GPU"):
        cc.warmup(8, 128, 16)


def test_no_specialisation_depends_on_the_device():
    keys = [[k.key for k in specialisations(8, 128, 16, device=device)] for device in (0, 3)]
    assert keys[0] == keys[1]


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
