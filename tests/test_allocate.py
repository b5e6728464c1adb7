# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""New caches, what they tell of themselves, and the methods that whole blocks and rows have."""

import copy
import itertools
import pickle
import re

import attending
import numpy as np
import oracle
import pytest
import worlds
from gathers import sequences
from layers import KINDS, Storages, layers_of

import cupy_cache as cc
from cupy_cache.runtime import driver, making

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, SIZE, SIZE_V = 2, 7, 4, 3, 16, 8
LAYOUTS = ("NHD", "HND", "packed", "x-packed", "rows")


def made(layout, **options):
    heads, options = (1 if layout == "rows" else HEADS), {"head_size_v": SIZE_V} | options
    return cc.PagedKVCache.allocate(
        LAYERS, BLOCKS, BLOCK_SIZE, heads, SIZE, layout=layout, **options
    )


# --- on the CPU, and where there is one on a GPU, by each framework -------------------------------


class Home:
    """A framework and a device."""

    def __init__(self, framework, device):
        self.framework, self.device = framework, device
        self.module = pytest.importorskip(framework)

    def array(self, values):
        if self.framework == "torch":
            return self.module.from_numpy(np.ascontiguousarray(values)).to(self.device)
        return self.module.asarray(values)

    def numpy(self, array):
        if self.framework == "torch":
            return array.cpu().numpy()
        return array.get() if self.framework == "cupy" else array


HOMES = [
    pytest.param(("numpy", "cpu"), id="numpy"),
    pytest.param(("torch", "cpu"), id="torch"),
    pytest.param(("cupy", "cuda"), id="cupy", marks=pytest.mark.gpu),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=HOMES)
def home(request):
    return Home(*request.param)


@pytest.mark.whole
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_gathered(home, rng, layout, kv_cache_dtype):
    """Small integers, which every format has, and a scale that is a power of two."""
    scale = 0.5 if kv_cache_dtype != "auto" else None
    cache = made(
        layout, dtype="float32", kv_cache_dtype=kv_cache_dtype, framework=home.framework,
        device=home.device, k_scales=scale,
    )  # fmt: skip
    lengths, width = [9, 0, 4], 3
    table = rng.permutation(BLOCKS)[: 2 * width].reshape(2, width).astype(np.int32)
    table = np.insert(table, 1, -1, axis=0)
    sides = [(24,), (8,)] if layout == "rows" else [(HEADS, SIZE), (HEADS, SIZE_V)]
    if layout == "rows":
        sides = [(SIZE - 4,), (4,)]
    rows = [
        [rng.integers(-4, 5, (sum(lengths), *side)).astype(np.float32) for side in sides]
        for _ in range(LAYERS)
    ]
    places = [(b, i) for b, length in enumerate(lengths) for i in range(length)]
    slots = [table[b, i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for b, i in places]
    order = rng.permutation(len(slots))
    for layer in range(LAYERS):
        given = [home.array(side[order]) for side in rows[layer]]
        cache.write(layer, *given, home.array(np.array(slots, np.int64)[order]))
    bounds = home.array(np.cumsum([0, *lengths]).astype(np.int32))
    table = home.array(table)
    for layer in range(LAYERS):
        expected = rows[layer]
        if layout == "rows":
            expected = [np.concatenate(expected, axis=1)]
        new = cache.gather(layer, table, bounds, num_tokens=sum(lengths))
        out = [home.array(np.full_like(side, np.nan)) for side in expected]
        given = cache.gather(layer, table, bounds, out=out[0] if layout == "rows" else out)
        for found in (new, given):
            found = [found] if layout == "rows" else found
            for one, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(home.numpy(one), wanted)
        assert (given if layout == "rows" else given[0]) is out[0]
    cc.raise_faults()


MEMORY = {  # of the keys: which of [num_blocks, BS, H, D] is how far from the last in memory
    "NHD": (HEADS * SIZE, SIZE), "HND": (SIZE, BLOCK_SIZE * SIZE),
    "packed": (HEADS * (SIZE + SIZE_V), SIZE + SIZE_V),
}  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_they_lie(home, layout, dtype):
    cache = made(layout, dtype=dtype, framework=home.framework, device=home.device)
    size = np.dtype(np.float32).itemsize // (1 if dtype == "float32" else 2)
    x = 16 // size
    shapes = {
        "x-packed": [(BLOCKS, HEADS, SIZE // x, BLOCK_SIZE, x), (BLOCKS, HEADS, 8, BLOCK_SIZE)],
        "rows": [(BLOCKS, BLOCK_SIZE, SIZE)],
    }.get(layout, [(BLOCKS, BLOCK_SIZE, HEADS, n) for n in (SIZE, SIZE_V)])
    sides = [cache.key_caches, cache.value_caches][: len(shapes)]
    assert (cache.value_caches is None) == (layout == "rows")
    for arrays, shape in zip(sides, shapes):
        assert [tuple(array.shape) for array in arrays] == [shape] * LAYERS
        assert {str(array.dtype).removeprefix("torch.") for array in arrays} == {dtype}
        assert not any(bool((array != 0).any()) for array in arrays)
    if layout in MEMORY:
        strides = (
            cache.key_caches[0].strides
            if home.framework != "torch"
            else [n * size for n in cache.key_caches[0].stride()]
        )
        assert tuple(strides[1:3]) == tuple(n * size for n in MEMORY[layout])
    token = SIZE if layout == "rows" else HEADS * (SIZE + SIZE_V)
    assert cache.bytes_per_block == LAYERS * BLOCK_SIZE * token * size
    assert cache.num_blocks == BLOCKS and len(cache) == LAYERS and cache.layout == layout
    where = f"{home.framework} on {home.device}"
    assert re.search(rf"2 layers: .*{dtype}, {layout}, {where}", repr(cache)), repr(cache)
    again = cc.PagedKVCache(cache.key_caches, cache.value_caches)
    assert again.layout == layout and repr(again) == repr(cache)
    if home.framework == "numpy":  # JAX has views of such memory
        assert not any(array.ctypes.data % 64 for array in cache.key_caches)


@pytest.mark.parametrize("kv_cache_dtype, stored", [
    ("fp8", "uint8"), ("fp8_e4m3", "uint8"), ("fp8_e5m2", "uint8"), ("int8", "int8"),
    ("bfloat16", "float16"),
])  # fmt: skip
def test_what_is_stored(kv_cache_dtype, stored):
    cache = made("NHD", dtype="float16", kv_cache_dtype=kv_cache_dtype, framework="numpy")
    assert cache.key_caches[0].dtype == cache.value_caches[0].dtype == stored
    shown = stored if stored in (kv_cache_dtype, "float16") else f"{kv_cache_dtype} in {stored}"
    assert f", {shown}, NHD, numpy on cpu" in repr(cache)


def test_entries_of_sparse_attention():
    cache = cc.PagedKVCache.allocate(
        1, 2, 4, 1, 656, kv_cache_dtype="fp8_ds_mla", layout="rows", framework="numpy"
    )
    latent, rope = (np.ones((1, n), np.float16) for n in (512, 64))
    cache.write(0, latent, rope, np.array([5]))
    assert cache.bytes_per_block == 4 * 656
    assert cache.key_caches[0].reshape(8, 656).any(axis=1).tolist() == [n == 5 for n in range(8)]
    with pytest.raises(cc.ArgumentError, match="gather: Invalid value of kv_cache_dtype"):
        cache.gather(0, np.array([[1]]), np.array([0, 1]), num_tokens=1)


def test_torchs_dtype_and_device_mean_torch():
    torch = pytest.importorskip("torch")
    by_dtype = made("NHD", dtype=torch.float16, device="cpu")
    by_device = made("NHD", device=torch.device("cpu"))
    assert by_dtype.key_caches[0].dtype == torch.float16
    assert by_device.key_caches[0].dtype == torch.bfloat16
    assert isinstance(made("NHD", dtype=np.float16, device="cpu").key_caches[0], np.ndarray)


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pinned(rng, layout, framework):
    """The GPU reaches the blocks; so it is not said that the driver stages them."""
    host = made(layout, dtype="float16", framework=framework, pinned=True)
    gpu = made(layout, dtype="float16", framework="cupy")
    back = made(layout, dtype="float16", framework="cupy")
    (cache,) = gpu.key_caches[:1]
    cache[...] = cc_random(rng, cache)
    gpu.swap_blocks(host, [(1, 5), (2, 0)])
    host.swap_blocks(back, [(5, 2), (0, 1)])
    assert (back.key_caches[0][2] == cache[1]).all() and (back.key_caches[0][1] == cache[2]).all()
    from cupy_cache.runtime import devices, driver

    address = host.key_caches[0]
    address = address.data_ptr() if framework == "torch" else address.ctypes.data
    assert driver.active.allocation(address).device == devices.CPU


def cc_random(rng, cache):
    import cupy

    return cupy.asarray(rng.standard_normal(cache.shape).astype(np.float16))


@pytest.mark.parametrize("given, error, named", [
    ({"num_layers": -1}, cc.ArgumentError, "num_layers"),
    ({"num_blocks": 1.5}, cc.ArgumentError, "num_blocks"),
    ({"block_size": 0}, cc.ArgumentError, "block_size"),
    ({"num_kv_heads": True}, cc.ArgumentError, "num_kv_heads"),
    ({"head_size_v": 0}, cc.ArgumentError, "head_size_v"),
    ({"layout": "NDH"}, cc.ArgumentError, "layout"),
    ({"layout": ["NHD"]}, cc.ArgumentError, "layout"),
    ({"layout": "rows"}, cc.ArgumentError, "num_kv_heads"),
    ({"layout": "x-packed", "head_size": 12}, cc.ArgumentError, "head_size"),
    ({"dtype": "float12"}, cc.ArgumentError, "dtype"),
    ({"kv_cache_dtype": "fp9"}, cc.ArgumentError, "kv_cache_dtype"),
    ({"kv_cache_dtype": np.array(["fp8", "int8"])}, cc.ArgumentError, "kv_cache_dtype"),
    ({"kv_cache_dtype": "fp8_ds_mla"}, cc.ArgumentError, "kv_cache_dtype"),
    ({"framework": "jax"}, cc.ArgumentError, "framework"),
    ({"device": "gpu"}, cc.DeviceError, "device"),
    ({"kv_cache_dtype": "fp8", "k_scales": -1.0}, cc.ArgumentError, "k_scales"),
])  # fmt: skip
def test_refusals(given, error, named):
    sizes = {"num_layers": 1, "num_blocks": 2, "block_size": 4, "num_kv_heads": 3, "head_size": 16}
    options = sizes | ({} if {"framework", "device"} & given.keys() else {"framework": "numpy"})
    with pytest.raises(error, match=rf"^PagedKVCache(\.allocate)?: Invalid \w+ of {named}: "):
        cc.PagedKVCache.allocate(**(options | given))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("layout", "kv_cache_dtype"),
    [*((layout, "auto") for layout in LAYOUTS), ("HND", "int8_per_token_head")],
)
def test_made_in_inference_mode(layout, kv_cache_dtype):
    """They are kept, and autograd, or another mode, may use them later."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        cache = made(layout, kv_cache_dtype=kv_cache_dtype, framework="torch", device="cpu")
    lists = cache.key_caches, cache.value_caches, cache.k_scale_caches, cache.v_scale_caches
    assert not any(array.is_inference() for one in lists for array in one or ())


def test_pinned_memory_without_a_gpu(monkeypatch):
    monkeypatch.setattr(driver.active, "device_count", lambda: 0)
    with pytest.raises(cc.DeviceError, match="pinned: expected False"):
        made("NHD", pinned=True)
    monkeypatch.setattr(driver.active, "device_count", lambda: 1)
    monkeypatch.setattr(driver.active, "current_device", lambda: 0)
    with pytest.raises(cc.DeviceError, match="only host memory is pinned"):
        made("NHD", pinned=True, framework="cupy", device="cuda")


@pytest.mark.whole
@pytest.mark.parametrize("framework, device, index", [
    ("torch", None, 0), ("torch", "cuda", 0), (None, "torch", 0), ("torch", "torch", 0),
    ("torch", "cuda:1", 1), ("cupy", "cuda", 1), (None, "cuda", 1), ("cupy", None, 1),
])  # fmt: skip
def test_the_current_gpu_is_the_frameworks(monkeypatch, framework, device, index):
    """CUDA may have another one: torch goes back to a GPU without a context at its next use."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(driver.active, "device_count", lambda: 2)
    monkeypatch.setattr(driver.active, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = torch.device("cuda") if device == "torch" else device
    assert making.home("test", framework, device)[1] == ("cuda", index)


def test_nothing_to_allocate():
    empty = cc.PagedKVCache.allocate(0, 4, 4, 2, 8, framework="numpy")
    assert len(empty) == empty.num_blocks == empty.bytes_per_block == 0
    assert repr(empty) == "<PagedKVCache of 0 layers>"
    none = cc.PagedKVCache.allocate(1, 0, 4, 2, 8, framework="numpy", layout="HND")
    assert none.num_blocks == 0 and none.layout == "HND"


@pytest.mark.parametrize("make", [
    copy.copy, copy.deepcopy, pickle.dumps, lambda cache: copy.deepcopy({"engine": [cache]}),
])  # fmt: skip
def test_copies_are_refused(make):
    cache = made("NHD", framework="numpy")
    with pytest.raises(cc.CopyError, match="writes to memory by its address") as caught:
        make(cache)
    assert isinstance(caught.value, TypeError)
    with pytest.raises(cc.CopyError, match=r"PagedKVCache\.write: it cannot be copied"):
        make(cache.writer(0))


# --- of arrays that are there ---------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e5m2", "int8"])
@pytest.mark.parametrize("layout", attending.LAYOUTS)
def test_rows_of_every_layout(world, rng, layout, kv_cache_dtype):
    """With gaps and starts, into rows of one's own, of which those of no sequence stay."""
    stored = None if kv_cache_dtype == "auto" else attending.STORED[kv_cache_dtype]
    scales = [None, None] if stored is None else [0.25, float(np.float32(3.7))]
    sizes, dtype = (16, 32), "bfloat16"
    caches = attending.caches(rng, layout, BLOCKS, 8, HEADS, sizes, stored or dtype)
    elements = [rng.integers(-8, 9, (BLOCKS, 8, HEADS, size)) for size in sizes]
    for at, spec in enumerate(caches):
        attending.fill(spec, elements[at].astype(spec.numpy_dtype), layout, at == 0)
    table, bounds, starts = sequences(rng, 3, 2, 8, BLOCKS, True)
    count = int(bounds[-1])
    out = [worlds.array(rng, (count + 3, HEADS, size), dtype) for size in sizes]
    cache = cc.PagedKVCache(*([world.put(spec)] for spec in caches), kv_cache_dtype, *scales)
    given = [world.put(worlds.of_values(n.astype(np.int32))) for n in (table, bounds, starts)]
    cache.gather(0, *given[:2], seq_starts=given[2], out=[world.put(spec) for spec in out])
    for spec, numbers, scale in zip(out, elements, scales):
        expected = spec.on(spec.buffer.bytes.copy())
        for b, (first, end) in enumerate(itertools.pairwise(bounds)):
            for row in range(first, end):
                position = starts[b] + row - first
                value = numbers[table[b, position // 8], position % 8].astype(np.float32)
                expected[row] = value * np.float32(1.0 if scale is None else scale)
        found = spec.on(world.bytes_of(spec))
        np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    cc.raise_faults()


@pytest.mark.parametrize("row", [0, 2])
def test_gathers_into_memory_that_is_shared(world, rng, row):
    """The values would be written over the keys. Interleaved heads are apart."""
    caches = attending.caches(rng, "NHD", BLOCKS, 8, HEADS, (16, 16), "float16")
    cache = cc.PagedKVCache(*([world.put(spec)] for spec in caches))
    spec = worlds.array(rng, (8, 2 * HEADS, 16), "float16")
    table, bounds = (world.put(worlds.of_values(np.array(n))) for n in ([[3, 1]], [0, 5]))
    pair = spec[:5, :HEADS], spec[row : 5 + row, :HEADS]
    expected = r"PagedKVCache\.gather: Invalid memory of out\[1\]: .* that out\[0\] has too"
    with pytest.raises(cc.ArgumentError, match=expected):
        cache.gather(0, table, bounds, out=[world.put(one) for one in pair])
    np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    apart = spec[:5, ::2], spec[:5, 1::2]
    cache.gather(0, table, bounds, out=[world.put(one) for one in apart])
    rows = np.arange(5)
    for one, side in zip(apart, caches):
        wanted = side.on(side.buffer.bytes)[np.array([3, 1])[rows // 8], rows % 8]
        got = one.on(world.bytes_of(one))
        np.testing.assert_array_equal(
            got.copy().view(np.uint16), np.ascontiguousarray(wanted).view(np.uint16)
        )


def test_gathers_that_are_refused_write_nothing(world, rng):
    caches = attending.caches(rng, "NHD", BLOCKS, 8, HEADS, (16, 32), "uint8")
    cache = cc.PagedKVCache(*([world.put(spec)] for spec in caches), "fp8", 1.0, 2.0)
    out = [worlds.array(rng, (5, HEADS, size), "float16") for size in (16, 31)]
    table, bounds = (
        world.put(worlds.of_values(np.array(n))) for n in ([[3, 1]], [0, 5])
    )  # fmt: skip
    rows = [world.put(spec) for spec in out]
    with pytest.raises(cc.ShapeError, match=r"PagedKVCache\.gather: Invalid shape of out"):
        cache.gather(0, table, bounds, out=rows)
    with pytest.raises(cc.DTypeError, match="gather: Invalid type of out: expected a pair"):
        cache.gather(0, table, bounds, out=rows[0])
    with pytest.raises(cc.ArgumentError, match="gather: Invalid value of num_tokens: .*None"):
        cache.gather(0, table, bounds)
    short = [rows[0], world.put(worlds.array(rng, (4, HEADS, 32), "float16"))]
    with pytest.raises(cc.ArgumentError, match="gather: Invalid value of num_tokens: .*at most 4"):
        cache.gather(0, table, bounds, out=short, num_tokens=5)
    with pytest.raises(cc.ArgumentError, match="gather: Invalid value of dtype: .*None"):
        cache.gather(0, table, bounds, num_tokens=5)
    with pytest.raises(cc.ArgumentError, match="gather: Invalid value of layer"):
        cache.gather(1, table, bounds, num_tokens=5)
    for spec in out:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    keys, values = cache.gather(0, table, bounds, num_tokens=5, dtype="float32")
    assert tuple(keys.shape) == (5, HEADS, 16) and tuple(values.shape) == (5, HEADS, 32)


def bound(world, layers):
    """A `PagedKVCache` of `layers_of`'s."""
    return cc.PagedKVCache(*(list(map(world.put, side)) for side in zip(*layers)))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("scalars", "cross-layer")])
def test_whole_blocks_of_every_layout(world, rng, kind):
    layers = layers_of(rng, kind)
    specs = [spec for layer in layers for spec in layer]
    cache, expected = bound(world, layers), Storages(*specs)
    cache.zero_blocks([3, 1])
    oracle.zero_blocks([expected(spec) for spec in specs], [3, 1])
    buffer = worlds.Buffer(2 * cache.bytes_per_block, rng).view(
        (2 * cache.bytes_per_block,), "uint8"
    )
    cache.pack_blocks([5, 3], world.put(buffer), layout="page_first")
    cache.unpack_blocks(world.put(buffer), [0, 2], layout="page_first")
    for spec in specs:
        view = expected(spec)
        view[0], view[2] = view[5], view[3]
    expected.check(world)
    assert cache.bytes_per_block == cc.packed_size(
        [tuple(map(world.put, layer)) for layer in layers], num_blocks=1
    )


def test_errors_about_whole_blocks_name_the_method(world, rng):
    cache = bound(world, layers_of(rng, "NHD"))
    short = world.put(worlds.array(rng, (3,), "uint8"))
    with pytest.raises(cc.ArgumentError, match=r"^PagedKVCache\.zero_blocks: .* of block_ids"):
        cache.zero_blocks([6])
    with pytest.raises(cc.ArgumentError, match=r"^PagedKVCache\.pack_blocks: .* of out"):
        cache.pack_blocks([1], short)
    with pytest.raises(cc.ArgumentError, match=r"^PagedKVCache\.unpack_blocks: .* of packed"):
        cache.unpack_blocks(short, [1])
