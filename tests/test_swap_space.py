# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""`SwapSpace`: what was swapped out comes back, whatever moves meanwhile."""

import contextlib
import copy
import gc
import itertools
import pickle
import types

import late_swaps
import numpy as np
import pytest
import recording
import worlds

import cupy_cache as cc
from cupy_cache.kv_cache import swap_space
from cupy_cache.runtime import allocations, cuda, driver, env, making, streams

BLOCKS, PLACES, BLOCK_SIZE = 12, 9, 4


def new_caches(framework, device):
    """Two kinds of layers."""
    where = {"framework": framework, "device": device}
    return [
        cc.PagedKVCache.allocate(2, BLOCKS, BLOCK_SIZE, 2, 8, dtype="float16", **where),
        cc.PagedKVCache.allocate(1, BLOCKS, BLOCK_SIZE, 1, 16, layout="rows", dtype="float16",
                                 **where),
    ]  # fmt: skip


class Blocks:
    """Caches, and what each of their blocks holds: one number, in all its elements."""

    def __init__(self, caches):
        self.caches, self.held = caches, np.zeros(BLOCKS, int)

    def arrays(self):
        lists = (cache.key_caches + (cache.value_caches or []) for cache in self.caches)
        return list(itertools.chain.from_iterable(lists))

    def fill(self, block, number):
        """As the next step would."""
        for array in self.arrays():
            array[block] = number
        self.held[block] = number

    def check(self):
        expected = self.held.reshape(-1, 1, 1)
        for array in self.arrays():
            on_host = array.cpu().numpy() if hasattr(array, "cpu") else array
            on_host = on_host.get() if hasattr(on_host, "get") else on_host
            assert (on_host.reshape(BLOCKS, BLOCK_SIZE, -1) == expected).all()


def history(rng, space, blocks, steps):
    """What random sequences of calls do. Places are used again as soon as they may."""
    there = np.zeros(PLACES, int)  # what each place holds, or is going to
    numbers, coming, seen = iter(range(1, 2048)), [], {"in": 0, "late": 0}
    for block in range(BLOCKS):
        blocks.fill(block, next(numbers))
    for place in range(PLACES):
        blocks.fill(0, next(numbers))
        space.swap_out([(0, place)])
        there[place] = blocks.held[0]
    for _ in range(steps):
        match int(rng.integers(4)):
            case 0:
                count = int(rng.integers(1, 5))
                some = rng.choice(BLOCKS, count, replace=False)
                places = rng.choice(PLACES, count, replace=False)
                pairs = np.stack([some, places], 1)
                space.swap_out(pairs if rng.integers(2) else pairs.tolist())
                there[places] = blocks.held[some]
                for block in some.tolist():
                    blocks.fill(block, next(numbers))
            case 1:
                places = rng.integers(PLACES, size=int(rng.integers(1, 5)))
                coming.append((space.prefetch(places.tolist()), places, there[places]))
            case 2:
                space.advance()
        if coming and rng.integers(2):
            prefetch, places, expected = coming[0]
            if rng.integers(4) == 0:
                prefetch.wait()
            if not prefetch.is_done():
                seen["late"] += 1
                continue
            coming.pop(0)
            _, first = np.unique(places, return_index=True)
            rows = rng.permutation(first)[: int(rng.integers(0, len(first) + 1))]
            to = rng.choice(BLOCKS, len(rows), replace=False)
            prefetch.swap_in(list(zip(places[rows].tolist(), to.tolist())))
            blocks.held[to] = expected[rows]
            seen["in"] += len(rows)
            blocks.check()
    assert seen["in"] and seen["late"]


@pytest.mark.whole
@pytest.mark.parametrize("bytes_per_step", [1, 3000, 1 << 20])
@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_any_history(rng, framework, bytes_per_step):
    """Copies are made later than they are begun."""
    pytest.importorskip(framework)
    caches = new_caches(framework, "cpu")
    space = late_swaps.LateSpace(rng, caches, PLACES, bytes_per_step=bytes_per_step)
    history(rng, space, Blocks(caches), 300)


@pytest.mark.gpu
@pytest.mark.whole
@pytest.mark.parametrize("bytes_per_step", [1, 1 << 20])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_any_history_on_a_gpu(rng, framework, bytes_per_step):
    pytest.importorskip(framework)
    caches = new_caches(framework, "cuda")
    space = cc.SwapSpace(caches, PLACES, bytes_per_step=bytes_per_step)
    history(rng, space, Blocks(caches), 300)
    cc.raise_faults()


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_dropped_while_blocks_move(framework):
    """Memory that is used again right after holds what its next owner wrote."""
    pytest.importorskip(framework)
    cupy = pytest.importorskip("cupy")
    cache = cc.PagedKVCache.allocate(
        4, 64, 16, 8, 128, dtype="float16", framework=framework, device="cuda"
    )
    space = cc.SwapSpace(cache, 64)
    space.swap_out([(block, block) for block in range(64)])
    coming = space.prefetch(range(64))
    cupy.cuda.runtime.deviceSynchronize()
    space.advance()
    del space, coming
    gc.collect()
    taken = [cupy.full(64 * cache.bytes_per_block, 7, cupy.uint8) for _ in range(3)]
    cupy.cuda.runtime.deviceSynchronize()
    assert all((one == 7).all() for one in taken)


def test_what_it_owns_is_freed_on_its_gpu(monkeypatch):
    """In a thread that has another one, where CuPy would make a context."""
    gpu, freed = types.SimpleNamespace(current=1), []

    class Owned:
        def __init__(self, size):
            self.size = size

        def __del__(self):
            freed.append((self.size, gpu.current))

    @contextlib.contextmanager
    def on_device(index):
        before, gpu.current = gpu.current, index
        yield
        gpu.current = before

    monkeypatch.setattr(cuda, "_current", lambda *asked: (lambda: gpu.current, None, None))
    monkeypatch.setattr(cuda, "on_device", on_device)
    runtime = types.SimpleNamespace(
        eventDisableTiming=2, eventCreateWithFlags=lambda flags: 7,
        eventRecord=lambda event, stream: None,
        eventDestroy=lambda event: freed.append((event, gpu.current)),
    )  # fmt: skip
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cuda, "import_cupy", lambda why: cupy)
    owned, event = cuda.freed_on_its_gpu(Owned)(5), driver.Event(0, 1)
    gpu.current = 0
    del owned, event
    assert freed == [(5, 1), (7, 1)] and gpu.current == 0
    ended = []
    cuda.free_on(1, lambda: ended.append(gpu.current), is_finalizing=lambda: True)
    assert not ended


def test_memory_of_a_stream_leaves_no_context(monkeypatch):
    """torch goes back to the stream of the GPU that it took for current, and setting a GPU that is
    not makes a context there."""
    torch = pytest.importorskip("torch")
    gpu, contexts = types.SimpleNamespace(current=0), {1}

    @contextlib.contextmanager
    def device(index):
        before, gpu.current = gpu.current, index
        yield
        gpu.current = before

    @contextlib.contextmanager
    def stream(its):
        before, gpu.current = gpu.current, its[1]
        yield
        contexts.update({before, its[1]})
        gpu.current = before

    def made(framework, device, shape, dtype):
        assert gpu.current == 1
        return framework, shape

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda ptr: (ptr, gpu.current))
    monkeypatch.setattr(cuda, "on_device", contextlib.nullcontext)
    monkeypatch.setattr(making, "empty", made)
    on = types.SimpleNamespace(index=1)
    of_stream = types.SimpleNamespace(ptr=9)
    assert making.empty_of_stream("torch", on, (3,), None, of_stream) == ("torch", (3,))
    assert gpu.current == 0 and contexts == {1}


def test_what_cuda_is_told(nothing_remembered, recorder, monkeypatch):
    """Blocks are packed on the stream of the steps, and copied on another one once they are; memory
    is kept for both. A stream that is captured is told nothing."""
    torch = pytest.importorskip("torch")
    steps, beside = 5, types.SimpleNamespace(ptr=9)
    host, copies, events, kept, captured = [], [], [], [], []

    def pinned_zeros(shape, dtype):
        host.append(np.zeros(shape, dtype))
        return host[-1]

    def empty(framework, device, shape, dtype, stream):
        made.append((framework, device.index, shape, dtype.name, stream))
        return torch.empty(shape, dtype=torch.uint8)

    made = []
    recorder.new_stream = lambda device: beside
    recorder.copy = lambda *given: copies.append(given)
    recorder.event = lambda *given: events.append(given) or recorder.event_made
    recorder.capturing = lambda stream, device: (stream, device) in captured
    monkeypatch.setattr(cuda, "on_device", contextlib.nullcontext)
    monkeypatch.setattr(allocations, "pinned_zeros", pinned_zeros)
    monkeypatch.setattr(making, "empty", empty)
    monkeypatch.setattr(making, "empty_of_stream", empty)
    monkeypatch.setattr(streams, "keep_until_done", lambda *given: kept.append(given))
    cache = cc.PagedKVCache(*([torch.zeros(6, 4, 1, 8)] for _ in "kv"))
    size = cache.bytes_per_block
    space = cc.SwapSpace(cache, 4)
    (places,) = host
    assert places.shape == (4, size) and places.dtype == np.uint8

    space.swap_out([(2, 2), (3, 1)], stream=steps)
    assert made == [("torch", 0, (2, size), "uint8", steps)] and events == [(steps, 0)]
    assert [stream for *_, stream, _ in recorder.take()] == [steps]
    space.advance()
    assert not copies  # they are being packed
    recorder.event_made.is_done = True
    space.advance()
    ((to, _, count, *where),) = copies
    assert (to, count, where) == (places.ctypes.data + size, 2 * size, [9, 0])
    assert events.pop() == (9, 0)
    assert [(objects[0][0] is places, *of) for objects, *of in kept] == [(True, 9, 0)] * 2

    coming = space.prefetch([2, 1])
    assert made.pop() == ("torch", 0, (2, size), "uint8", beside)
    copies.clear()
    space.advance()
    ((_, source, count, *where),) = copies
    assert (source, count, where) == (places.ctypes.data + size, 2 * size, [9, 0])
    kept.clear()
    coming.swap_in([(2, 0), (1, 1)], stream=steps)  # one launch, as they are neighbours
    coming.swap_in([(2, 1)])
    assert [stream for *_, stream, _ in recorder.take()] == [steps, recording.STREAM]
    assert [of for _, *of in kept] == [[steps, 0], [recording.STREAM, 0]]

    captured.append((recording.STREAM, 0))
    refused_in_a_capture(space, coming, 2)
    captured.clear()
    with pytest.raises(cc.DeviceError, match="Invalid device of host_blocks: expected host memory"):
        space.prefetch(worlds.Opaque(np.array([0])))
    assert not recorder.take()


@pytest.mark.gpu
@pytest.mark.skipif(env.torch_is_uncached(), reason="torch captures nothing without its cache")
def test_what_a_capture_refuses():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    cache = cc.PagedKVCache.allocate(1, 4, 4, 1, 8, dtype=torch.float16, device="cuda")
    space = cc.SwapSpace(cache, 4)
    space.swap_out([(0, 0)])
    coming = space.prefetch([0])
    coming.wait()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.empty(1, device="cuda").zero_()
        refused_in_a_capture(space, coming, 0)


def refused_in_a_capture(space, coming, block):
    """All that moves blocks; ``coming`` has this block."""
    for call in (
        lambda: space.swap_out([(0, 1)]), lambda: space.prefetch([block]),
        lambda: coming.swap_in([(block, 1)]),
    ):  # fmt: skip
        with pytest.raises(cc.CaptureError, match="a graph would move the same blocks"):
            call()


def cache_of(blocks=6, **options):
    return cc.PagedKVCache.allocate(1, blocks, 4, 1, 8, dtype="float32", device="cpu", **options)


def test_how_much_moves_beside_a_step(rng):
    """Each way a block, where bytes_per_step is less than one; in the order of the calls."""
    cache = cache_of()
    space = late_swaps.LateSpace(rng, cache, 6, bytes_per_step=1)
    space.swap_out([(0, 4), (1, 1), (2, 2)])
    coming = space.prefetch([2, 4])
    assert space.num_moving == 5
    while not space.late.copies:  # not before all is packed
        space.advance()
    for begun in (2, 4, 5):  # the last one out, and the first one in
        space.advance()
        assert len(space.late.copies) == begun
    coming.wait()
    assert space.num_moving == 0 and coming.is_done()
    all_at_once = late_swaps.LateSpace(rng, cache, 6)
    all_at_once.swap_out([(0, 4), (1, 1), (2, 2), (3, 3)])
    all_at_once.prefetch([1, 2, 3]).wait()
    sizes = [size for *_, size in all_at_once.late.copies]
    assert sizes == [4 * cache.bytes_per_block, 3 * cache.bytes_per_block]  # runs


def test_text_and_copies():
    space = cc.SwapSpace(cache_of(), 4)
    assert space.bytes_per_block == 256 and space.num_blocks == 4
    space.swap_out([(5, 0)])
    assert repr(space) == (
        "<SwapSpace of 4 blocks in host memory, 0.00 MiB, for blocks on cpu: 1 on their way>"
    )
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(cc.CopyError, match="SwapSpace: it cannot be copied"):
            copied(space)


def test_the_list_of_caches_stays_the_callers():
    caches = [cache_of()]
    space = cc.SwapSpace(caches, 2)
    caches.append(cache_of())
    caches[0].key_caches[0][3] = 7
    space.swap_out([(3, 0)])
    coming = space.prefetch([0])
    coming.wait()
    coming.swap_in([(0, 5)])
    assert (caches[0].key_caches[0][5] == 7).all() and not caches[1].key_caches[0].any()


REFUSALS = [
    (lambda s, c: s.swap_out([(6, 0)]), "SwapSpace.swap_out: Invalid value of block_mapping"),
    (lambda s, c: s.swap_out([(0, 4)]), "SwapSpace.swap_out: Invalid value of block_mapping"),
    (lambda s, c: s.swap_out([(0, 1), (2, 1)]), "SwapSpace.swap_out: Invalid value of block_ma"),
    (lambda s, c: s.swap_out([(0,)]), "SwapSpace.swap_out: Invalid shape of block_mapping"),
    (lambda s, c: s.swap_out([(0, 1)], stream="s"), "SwapSpace.swap_out: Invalid type of stream"),
    (lambda s, c: s.prefetch([4]), "SwapSpace.prefetch: Invalid value of host_blocks"),
    (lambda s, c: s.prefetch([-1]), "SwapSpace.prefetch: Invalid value of host_blocks"),
    (lambda s, c: s.prefetch([0.5]), "SwapSpace.prefetch: Invalid type of host_blocks"),
    (
        lambda s, c: s.prefetch([1, 2, 0]),
        "SwapSpace.prefetch: Invalid value of host_blocks: expected "
        "blocks that were swapped out, got 2",
    ),
    (lambda s, c: c.swap_in([(0, 1)]), "Prefetch.swap_in: Invalid order of block_mapping"),
    (lambda s, c: c.swap_in([(4, 1)]), "Prefetch.swap_in: Invalid value of block_mapping"),
    (lambda s, c: (c.wait(), c.swap_in([(2, 1)])), "Prefetch.swap_in: Invalid value of block_m"),
    (lambda s, c: (c.wait(), c.swap_in([(0, 6)])), "Prefetch.swap_in: Invalid value of block_m"),
    (lambda s, c: (c.wait(), c.swap_in([(0, 5), (1, 5)])), "Prefetch.swap_in: Invalid value of b"),
    (lambda s, c: cc.SwapSpace([], 4), "SwapSpace: Invalid type of caches"),
    (lambda s, c: cc.SwapSpace("cache", 4), "SwapSpace: Invalid type of caches"),
    (lambda s, c: cc.SwapSpace([1], 4), "SwapSpace: Invalid type of caches"),
    (lambda s, c: cc.SwapSpace([cache_of(), cache_of(7)], 4), "SwapSpace: Invalid value of cach"),
    (lambda s, c: cc.SwapSpace(cc.PagedKVCache([], []), 4), "SwapSpace: Invalid value of caches"),
    (lambda s, c: cc.SwapSpace(cache_of(), -1), "SwapSpace: Invalid value of num_blocks"),
    (lambda s, c: cc.SwapSpace(cache_of(), 1, bytes_per_step=0), "SwapSpace: Invalid value of by"),
]


@pytest.mark.whole
@pytest.mark.parametrize("call, message", REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(call, message):
    cache = cache_of()
    space = cc.SwapSpace(cache, 4)
    space.swap_out([(0, 0), (1, 1)])
    coming = space.prefetch([0, 1])
    cache.key_caches[0][...] = 3
    with pytest.raises(cc.CupyCacheError) as raised:
        call(space, coming)
    assert str(raised.value).startswith(message)
    assert (cache.key_caches[0] == 3).all() and space.num_moving in (0, 4)


def test_caches_of_two_frameworks():
    """Each has a current stream of its own."""
    pytest.importorskip("torch")
    with pytest.raises(cc.CupyCacheError, match="^SwapSpace: Invalid framework of "):
        cc.SwapSpace([cache_of(), cache_of(framework="torch")], 4)


def test_copies_begin_when_all_is_packed(rng):
    """A move that is finished at once waits for the packing, then copies, then waits for it."""
    done, host, packed = [], np.zeros((6, 8), np.uint8), rng.integers(1, 99, (3, 8), np.uint8)

    def event(name):
        return types.SimpleNamespace(wait=lambda: done.append(name))

    bus = types.SimpleNamespace(
        stream=5, copy=lambda *piece: done.append(piece), point=lambda stream: event(stream)
    )
    space = types.SimpleNamespace(_bus=bus, _host=[host], bytes_per_step=64, bytes_per_block=8)
    swap_space._Move(space, True, [1, 2, 5], [packed], event("packed")).finish()
    there, here = host.ctypes.data, packed.ctypes.data
    assert done == ["packed", (there + 8, here, 16), (there + 40, here + 16, 8), 5]
