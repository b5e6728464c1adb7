# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""How long memory lives under work that is enqueued, on a real GPU."""

import functools
import gc
import inspect

import attending
import numpy as np
import pytest
import worlds
from pending import (
    CASES,
    KNOWN,
    PAGED,
    PATTERN,
    READING,
    ROUNDS,
    WRITING,
    destinations,
    framework_named,
    side_stream,
    sources,
    storages,
    warm,
)

import cupy_cache as cc
from cupy_cache.runtime import env, streams

# All operations obey the same rules, so by default each of them is tried.
pytestmark = [pytest.mark.gpu, pytest.mark.whole]


# --- memory that is dropped while work on it is pending -------------------------------------------

BLOCKS, SLOTS = 8, 16
BLOCK_BYTES = 1 << 19  # four make a run that is long enough for the copy engines
CACHE_BYTES = BLOCKS * BLOCK_BYTES
PINNED = ("torch", "cupyx")


def as_blocks(memory):
    return memory.reshape(BLOCKS, BLOCK_BYTES)


def as_tokens(memory):
    return memory.reshape(BLOCKS, SLOTS, -1)


def pinned(kind):
    """Pinned host memory as large as a cache."""
    if kind == "torch":
        module = framework_named("torch").module
        return module.empty(CACHE_BYTES, dtype=module.uint8, pin_memory=True)
    return pytest.importorskip("cupyx").empty_pinned(CACHE_BYTES, np.uint8)


def on_host(memory):
    """What `pinned` made, as NumPy."""
    return memory if isinstance(memory, np.ndarray) else memory.numpy()


def take_again(kind):
    """New pinned memory, which is overwritten at once; enough to have what was dropped last."""
    taken = []
    for _ in range(8):
        taken.append(pinned(kind))
        on_host(taken[-1])[:] = PATTERN
    return taken


_FEW, _RUN = [(5, 0), (0, 7), (3, 2)], [(i, i) for i in range(BLOCKS)]
# Of (cache on the GPU, host memory).
TO_HOST = {
    "swap_blocks": lambda cache, host: cc.swap_blocks(as_blocks(cache), as_blocks(host), _FEW),
    "swap_blocks-run": lambda cache, host: cc.swap_blocks(as_blocks(cache), as_blocks(host), _RUN),
    "pack_blocks": lambda cache, host: cc.pack_blocks([as_blocks(cache)], [4, 0, 4], host),
    "pack_tokens": lambda cache, host: cc.pack_tokens([as_tokens(cache)], range(9, 64), host),
    "PagedKVCache.swap_blocks": lambda cache, host: cc.PagedKVCache([as_tokens(cache)]).swap_blocks(
        cc.PagedKVCache([as_tokens(host)]), _FEW
    ),
}
# Likewise, and the blocks of the cache that are written.
FROM_HOST = {
    "swap_blocks": (
        lambda cache, host: cc.swap_blocks(as_blocks(host), as_blocks(cache), _FEW),
        [0, 7, 2],
    ),
    "swap_blocks-run": (
        lambda cache, host: cc.swap_blocks(as_blocks(host), as_blocks(cache), _RUN[:4]),
        [0, 1, 2, 3],
    ),
    "unpack_blocks": (
        lambda cache, host: cc.unpack_blocks(host, [as_blocks(cache)], [4, 0]),
        [4, 0],
    ),
    "unpack_tokens": (
        lambda cache, host: cc.unpack_tokens(host, [as_tokens(cache)], range(SLOTS, 2 * SLOTS)),
        [1],
    ),
    "PagedKVCache.swap_blocks": (
        lambda cache, host: cc.PagedKVCache([as_tokens(host)]).swap_blocks(
            cc.PagedKVCache([as_tokens(cache)]), _FEW
        ),
        [0, 7, 2],
    ),
}


@pytest.mark.parametrize("kind", PINNED)
@pytest.mark.parametrize("name", TO_HOST)
def test_host_destination_dropped_at_once(framework, kind, name):
    """What has its memory next must not be overwritten by the copy that is still pending."""
    cache = framework.bytes(CACHE_BYTES, KNOWN)
    for _ in range(ROUNDS):
        host = pinned(kind)
        framework.synchronize()
        framework.busy()
        TO_HOST[name](cache, host)
        del host
        gc.collect()
        taken = take_again(kind)
        framework.synchronize()
        for memory in taken:
            assert (on_host(memory) == PATTERN).all(), "a copy went to memory of somebody else"


@pytest.mark.parametrize("kind", PINNED)
@pytest.mark.parametrize("name", FROM_HOST)
def test_host_source_dropped_at_once(framework, kind, name):
    """The copy that is still pending must get what was there at the call."""
    call, written = FROM_HOST[name]
    expected = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
    expected[written] = KNOWN
    for _ in range(ROUNDS):
        cache = framework.bytes(CACHE_BYTES, 0)
        host = pinned(kind)
        on_host(host)[:] = KNOWN
        framework.synchronize()
        framework.busy()
        call(cache, host)
        del host
        gc.collect()
        taken = take_again(kind)
        framework.synchronize()
        del taken
        np.testing.assert_array_equal(as_blocks(framework.numpy(cache)), expected)


def every_call_on(monkeypatch, stream):
    """From now on, all operations get this ``stream``."""
    for name in cc.__all__:
        function = getattr(cc, name)
        if inspect.isfunction(function) and "stream" in inspect.signature(function).parameters:
            monkeypatch.setattr(cc, name, functools.partial(function, stream=stream))


AS_STREAM, AS_ADDRESS = "stream", "address"


@pytest.mark.parametrize(
    "name, given",
    [
        *((name, AS_STREAM) for name in READING if name != PAGED),
        *((name, AS_ADDRESS) for name in ("reshape_and_cache_flash", "pack_blocks")),
    ],
)
def test_sources_dropped_at_once_on_another_stream(torch, monkeypatch, name, given, rng):
    """Their memory is given to others on the current stream, and overwritten there, while the
    stream that reads them has not come to it."""
    framework = framework_named("torch")
    side = side_stream(framework)
    every_call_on(monkeypatch, side if given == AS_STREAM else side.cuda_stream)
    case = CASES[name](rng)
    for calls in (1, 5):
        warm(case, worlds.TorchCudaWorld, calls)
        framework.release()
        world = worlds.TorchCudaWorld()
        call = case.bind(world)
        sizes = [storage.nbytes for storage in storages(world, sources(case))]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            framework.busy()
        call()
        del call
        for spec in sources(case):
            world._made.pop(id(spec.buffer), None)
        taken = [
            torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes for _ in range(32)
        ]
        torch.cuda.synchronize()
        del taken
        case.check(world)


@pytest.mark.parametrize("name", [name for name in WRITING if name != PAGED])
def test_destinations_dropped_at_once_on_another_stream(torch, monkeypatch, name, rng):
    """What has their memory next, on the current stream, must not be overwritten by the stream
    that comes to write them later."""
    framework = framework_named("torch")
    side = side_stream(framework)
    every_call_on(monkeypatch, side)
    case = CASES[name](rng)
    pattern = torch.from_numpy(rng.integers(0, 256, 1 << 20, np.uint8)).cuda()
    for calls in (1, 5):
        warm(case, worlds.TorchCudaWorld, calls)
        framework.release()
        world = worlds.TorchCudaWorld()
        call = case.bind(world)
        sizes = [storage.nbytes for storage in storages(world, destinations(case))]
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            framework.busy()
        call()
        del call
        for spec in destinations(case):
            world._made.pop(id(spec.buffer), None)
        taken = [pattern[:size].clone() for size in sizes for _ in range(32)]
        torch.cuda.synchronize()
        for memory in taken:
            assert torch.equal(memory, pattern[: memory.nbytes]), "memory of others was written"


def test_tables_dropped_at_once_on_another_stream(torch):
    """What has their memory next, on the current stream, must not be overwritten by the upload."""
    framework = framework_named("torch")
    side, sizes = side_stream(framework), {"max_sequences": 64, "max_tokens": 4096}
    options = {**sizes, "max_length": 1024, "framework": "torch", "device": "cuda"}
    for _ in range(ROUNDS):
        tables = cc.BlockTables(64, 16, **options)
        tables.add("a", range(9))
        count = tables._buffers._memory.nbytes
        framework.synchronize()
        with framework.on(side):
            framework.busy()
        tables.step(["a"], [9], num_sequences=64, num_tokens=4096, stream=side)
        del tables
        taken = [framework.bytes(count, PATTERN) for _ in range(32)]
        framework.synchronize()
        assert all((memory == PATTERN).all() for memory in taken)


# --- graphs that torch does not know --------------------------------------------------------------


def captured(stream, call):
    """The graph of what ``call`` does on a stream of CuPy's."""
    stream.begin_capture()
    try:
        call()
    finally:
        graph = stream.end_capture()
    return graph


@pytest.fixture
def stream(cupy):
    """Of CuPy's, which must be there when torch frees what was used on it."""
    return cupy.cuda.Stream(non_blocking=True)


@pytest.mark.parametrize("is_current", [False, True])
@pytest.mark.parametrize("kind", [attending.Problem, attending.Latent])
def test_scratch_of_a_graph_that_torch_does_not_know(torch, stream, rng, kind, is_current):
    """torch's arrays on a stream that CuPy captures, torch's current one or not: what has scratch
    memory next must not be overwritten by replays."""
    world = worlds.TorchCudaWorld()
    problem = kind(rng, [900], dtype="float16", width=2000)
    problem.run(world)  # its arrays are there
    torch.cuda.synchronize()
    shown = torch.cuda.ExternalStream(stream.ptr)
    with torch.cuda.stream(shown if is_current else None):
        for _ in range(3):
            problem.run(world, stream=stream)
        torch.cuda.synchronize()
        graph = captured(stream, lambda: problem.run(world, stream=stream))
        taken = [torch.ones(1 << n, device="cuda") for n in range(6, 24) for _ in range(4)]
        torch.cuda.synchronize()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
        assert all(bool((memory == 1).all()) for memory in taken), "memory of others was written"
    problem.judge(world)


@pytest.mark.skipif(env.torch_is_uncached(), reason="torch captures nothing without its cache")
def test_torch_knows_its_own_captures(torch, cupy, stream):
    """Of each it is asked once."""
    device, shown, side = 0, torch.cuda.ExternalStream(stream.ptr), torch.cuda.Stream()
    graph, found = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        torch.ones(1, device="cuda")  # torch warns of graphs without anything
        for one in (current, side):
            found.append(streams._torch_allocates(one.cuda_stream, device))
        found.append(streams._torch_allocates(stream.ptr, device))  # is not captured
        current.wait_stream(side)
    assert found == [True, True, True]
    with torch.cuda.stream(shown):
        stream.begin_capture()
        try:
            found = [streams._torch_allocates(stream.ptr, device) for _ in range(2)]
        finally:
            stream.end_capture()
        assert found == [False, False]
        assert streams._torch_allocates(stream.ptr, device)
