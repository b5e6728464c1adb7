# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What waits for what, on a real GPU."""

import importlib.util

import numpy as np
import pytest
import worlds
from pending import (
    CASES,
    FRAMEWORKS,
    KNOWN,
    PAGED,
    READING,
    ROUNDS,
    Mixed,
    destinations,
    framework_named,
    hide,
    names_where,
    run,
    seed,
    side_stream,
    sources,
    warm,
)

import cupy_cache as cc

# All operations obey the same rules, so by default each of them is tried.
pytestmark = [pytest.mark.gpu, pytest.mark.whole]


# --- results that the library makes ---------------------------------------------------------------
# Each maker returns a function of the stream that makes a new result, and the result to expect, of
# at least 2 MiB: smaller ones share their memory with others.


def _new_slot_mapping(framework, put, rng):
    table = rng.integers(0, 1000, (1, 64)).astype(np.int32)
    positions = rng.integers(0, 64 * 16, 1 << 21)
    arrays = [put(values) for values in (table, positions, np.array([0, positions.size]))]
    expected = table[0, positions // 16].astype(np.int64) * 16 + positions % 16
    return lambda stream: cc.slot_mapping(*arrays, 16, stream=stream), expected


def _new_slot_mapping_groups(framework, put, rng):
    tables = [rng.integers(0, 1000, (1, 64)).astype(np.int32) for _ in range(2)]
    sizes = [16, 8]
    positions = rng.integers(0, 64 * 8, 1 << 20)
    made = [put(table) for table in tables]
    step = [put(positions), put(np.array([0, positions.size]))]
    expected = np.stack(
        [
            table[0, positions // size].astype(np.int64) * size + positions % size
            for table, size in zip(tables, sizes)
        ]
    )

    def call(stream):
        return cc.slot_mapping_groups(made, None, *step, sizes, stream=stream)

    return call, expected


def _new_bias(framework, put, rng):
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    queries, keys = (rng.integers(0, 1 << 16, 1024) for _ in range(2))
    arrays = [put(values) for values in (slopes, queries, keys)]
    expected = slopes[:, None, None] * (keys - queries[:, None]).astype(np.float32)
    return lambda stream: cc.alibi_bias(*arrays, stream=stream), expected


def _new_slopes(framework, put, rng):
    heads, bias = 1 << 20, float(rng.uniform(1, 100))  # others each time: they are remembered

    def call(stream):
        return cc.alibi_slopes(heads, max_bias=bias, framework=framework.name, stream=stream)

    return call, (2.0 ** (-bias * np.arange(1, heads + 1) / heads)).astype(np.float32)


def _placed_slopes(framework, put, rng):
    values = rng.standard_normal(1 << 19).astype(np.float32)

    def call(stream):
        return cc.place_slopes(values, framework=framework.name, stream=stream)

    return call, values


def _of_the_first_tokens(put, rng, heads, size):
    """Queries of sequences of one token: (the queries, the block that each one's token is in, the
    block table and the lengths)."""
    query = rng.standard_normal((128, heads, size)).astype(np.float16)
    table = rng.integers(0, 16, (128, 1)).astype(np.int32)
    return put(query), table[:, 0], [put(table), put(np.ones(128, np.int32))]


def _new_attention(framework, put, rng):
    keys, values = (rng.standard_normal((16, 16, 8, 128)).astype(np.float16) for _ in range(2))
    query, seen, step = _of_the_first_tokens(put, rng, 64, 128)
    arrays = query, put(keys), put(values), *step
    expected = np.repeat(values[seen, 0], 8, axis=1)
    return lambda stream: cc.paged_attention(*arrays, stream=stream), expected


def _new_latent_attention(framework, put, rng):
    entries = rng.standard_normal((16, 16, 576)).astype(np.float16)
    query, seen, step = _of_the_first_tokens(put, rng, 16, 576)
    arrays = query, put(entries), *step
    expected = np.repeat(entries[seen, :1, :512], 16, axis=1)
    return lambda stream: cc.paged_attention_mla(*arrays, scale=0.1, stream=stream), expected


NEW_RESULTS = {
    "slot_mapping": _new_slot_mapping,
    "slot_mapping_groups": _new_slot_mapping_groups,
    "alibi_bias": _new_bias,
    "alibi_slopes": _new_slopes,
    "place_slopes": _placed_slopes,
    "paged_attention": _new_attention,
    "paged_attention_mla": _new_latent_attention,
}


@pytest.mark.parametrize("name", NEW_RESULTS)
def test_new_result_spares_what_is_still_read(framework, name, rng):
    """Memory freed on the current stream, under a read that is pending there, becomes the result,
    which is written on another stream."""
    side, kept = side_stream(framework), []
    for _ in range(ROUNDS):
        world = framework.world()
        call, expected = NEW_RESULTS[name](
            framework, lambda values, world=world: world.put(worlds.of_values(values)), rng
        )
        framework.synchronize()
        framework.release()  # so that no other memory of the result's size is free
        reader = framework.bytes(expected.nbytes, 0)
        freed = framework.bytes(expected.nbytes, KNOWN)
        address = framework.address(freed)
        del freed
        freed = framework.bytes(expected.nbytes, KNOWN)
        assert framework.address(freed) == address, "freed memory is not given again"
        framework.synchronize()
        framework.busy()
        framework.copy(reader, freed)
        del freed
        made = call(side)
        kept.append((world, reader, made))
        framework.synchronize()
        assert (framework.numpy(reader) == KNOWN).all(), "the result overwrote what was still read"
        tolerance = 1e-6 if name == "alibi_slopes" else 0
        np.testing.assert_allclose(framework.numpy(made), expected, rtol=tolerance, atol=0)


# --- sources of another framework -----------------------------------------------------------------

MIXTURES = {
    "torch-cupy": ("torch", worlds.TorchCudaWorld, worlds.CuPyWorld),
    "cupy-torch": ("cupy", worlds.CuPyWorld, worlds.TorchCudaWorld),
    "dlpack-cupy": ("torch", worlds.DLPackCudaWorld, worlds.CuPyWorld),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", names_where(lambda case: sources(case) and destinations(case)))
def test_sources_of_another_framework_are_waited_for(torch, cupy, mixture, name, rng):
    """They are computed on that framework's current stream, and not there yet."""
    producer, read, written = MIXTURES[mixture]
    producer = framework_named(producer)
    case = CASES[name](rng)

    def make():
        return Mixed(case, read(), written())

    warm(case, make, 5)
    world = make()
    call = case.bind(world)
    show = hide(producer, world.read, sources(case))
    side = side_stream(producer)
    producer.synchronize()
    with producer.on(side):
        producer.busy()
        show()
        call()
    producer.synchronize()
    case.check(world)


@pytest.mark.parametrize("unpacks", [False, True])
def test_pinned_memory_that_another_framework_fills(torch, cupy, unpacks):
    """torch's copy to it is pending on torch's current stream."""
    framework = framework_named("torch")
    side, filled = side_stream(framework), framework.bytes(1 << 12, KNOWN).view(8, 512)
    host, cache = (
        torch.empty(8, 512, dtype=torch.uint8, pin_memory=True),
        cupy.empty((8, 512), "u1"),
    )
    for _ in range(ROUNDS):
        host.zero_()
        cache[:] = 0
        framework.synchronize()
        with framework.on(side):
            framework.busy()
            host.copy_(filled, non_blocking=True)
            if unpacks:
                cc.unpack_blocks(host, [cache], [0, 3])
            else:
                cc.swap_blocks(host, cache, [(1, 0), (7, 3)])
        framework.synchronize()
        assert (cache.get()[[0, 3]] == KNOWN).all()


_JAX = """
import sys
import numpy as np
import jax
import jax.numpy as jnp
import cupy
import cupy_cache as cc

if jax.default_backend() != "gpu":
    print("JAX has no GPU")
    raise SystemExit
cupy.cuda.Device(0).use()  # JAX has made the last GPU current

@jax.jit
def late(values):
    "The same values, but not for a while."
    begin = jnp.full((4096, 4096), 0.01) * values[0, 0, 0]
    busy = jax.lax.fori_loop(0, 200, lambda i, a: jnp.tanh(a @ a), begin)
    return jnp.where(busy[0, 0] > 2, -1, values)  # which it is not

rng = np.random.default_rng(int(sys.argv[1]))
slots = cupy.arange(9)
for _ in range(3):
    made = [rng.standard_normal((9, 4, 64)).astype(np.float32) for _ in range(2)]
    caches = [cupy.zeros((5, 16, 4, 64), cupy.float32) for _ in made]
    cupy.cuda.Device().synchronize()
    cc.reshape_and_cache_flash(*map(late, made), *caches, slots)
    cupy.cuda.Device().synchronize()
    for cache, values in zip(caches, made):
        np.testing.assert_array_equal(cache.get().reshape(80, 4, 64)[:9], values)
"""


def test_sources_of_jax_are_waited_for(rng):
    """In a process of its own, where JAX must not take most of the GPU's memory."""
    if importlib.util.find_spec("jax") is None:
        pytest.skip("JAX is not installed")
    if "JAX has no GPU" in run(_JAX, seed(rng), XLA_PYTHON_CLIENT_PREALLOCATE="false"):
        pytest.skip("JAX has no GPU")


# --- arrays behind DLPack -------------------------------------------------------------------------


class Logged(worlds.Opaque):
    """Offers nothing but DLPack, and notes the stream of each export."""

    def __init__(self, array):
        super().__init__(array)
        self.streams = []

    def __dlpack__(self, **options):
        self.streams.append(options.get("stream"))
        return super().__dlpack__(**options)


class LoggedWorld(worlds.TorchCudaWorld):
    """`Logged` tensors, kept in a list."""

    def __init__(self):
        super().__init__()
        self.logged = []

    def array(self, storage, spec):
        self.logged.append(Logged(super().array(storage, spec)))
        return self.logged[-1]


# A PagedKVCache reads its caches once, and again when it is made.
@pytest.mark.parametrize("name", names_where(lambda case: True))
def test_exports_through_dlpack(torch, cupy, name, rng):
    """One for each array at most, but for calls that need shapes before, and none for a stream that
    the work has nothing to do with: the legacy stream, 1, waits for all others."""
    case = CASES[name](rng)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        world = LoggedWorld()
        call = case.bind(world)
        torch.cuda.synchronize()
        for _ in range(5):
            for array in world.logged:
                array.streams.clear()
            call()
            exports = [array.streams for array in world.logged]
            assert {s for streams in exports for s in streams} <= {-1, stream.ptr}, exports
            twice = name == PAGED or name.startswith("paged_attention_mla")
            assert max(map(len, exports), default=0) <= (2 if twice else 1), exports
    case.check(world)


class Lent:
    """A copy of a tensor's memory that somebody else overwrites as soon as nobody holds it."""

    def __init__(self, storage):
        self._storage = storage.clone()
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes,),
            "typestr": "|u1",
            "data": (self._storage.data_ptr(), False),
            "version": 2,
        }

    def __del__(self):
        self._storage.zero_()


class Copied:
    """Offers nothing but DLPack, and exports a copy, of which it keeps nothing."""

    def __init__(self, copy):
        self._copy = copy

    def __dlpack__(self, **options):
        return self._copy().__dlpack__(**options)

    def __dlpack_device__(self):
        return 2, 0  # CUDA, the first GPU


class CopiedWorld(worlds.TorchCudaWorld):
    """Of ``case``, what is only read is `Copied`, and what is written `worlds.Opaque`."""

    def __init__(self, case):
        super().__init__()
        self._written = {id(spec.buffer) for spec in case.written}

    def array(self, storage, spec):
        view = super().array
        if id(spec.buffer) in self._written:
            return worlds.Opaque(view(storage, spec))
        as_tensor = framework_named("torch").module.as_tensor
        return Copied(lambda: view(as_tensor(Lent(storage), device="cuda"), spec))


@pytest.mark.parametrize("name", READING)
def test_exported_copies_live_until_the_work_is_enqueued(torch, cupy, name, rng):
    """All is on one stream, so memory that is overwritten after the call is not overwritten before
    the work."""
    case = CASES[name](rng)
    for _ in range(3):
        world = CopiedWorld(case)
        call = case.bind(world)
        torch.cuda.synchronize()
        call()
        case.check(world)


# --- __cuda_array_interface__ names a stream ------------------------------------------------------


class Interface:
    """Offers nothing but ``__cuda_array_interface__``, which names the stream that produces it."""

    def __init__(self, array, stream):
        self._array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": stream.ptr}


class InterfaceWorld(worlds.CuPyWorld):
    def __init__(self, stream):
        super().__init__()
        self._stream = stream

    def array(self, storage, spec):
        return Interface(super().array(storage, spec), self._stream)


def _described(case):
    """Whether ``__cuda_array_interface__`` knows the types of all that is read: not bfloat16."""
    return (
        sources(case)
        and destinations(case)
        and all(spec.dtype != "bfloat16" for spec in sources(case))
    )


@pytest.mark.parametrize("device", [0, pytest.param(1, marks=pytest.mark.multi_gpu)])
@pytest.mark.parametrize("name", names_where(_described))
def test_stream_of_a_cuda_array_interface(cupy, request, device, name, rng):
    """It is waited for, on its own GPU, which need not be current."""
    if device:
        request.getfixturevalue("two_gpus")
    framework, case = framework_named("cupy"), CASES[name](rng)
    side = side_stream(framework, device)
    with framework.device(device):
        world = Mixed(case, InterfaceWorld(side), worlds.CuPyWorld())
        call = case.bind(world)
        call()  # loaded
        framework.synchronize()
        show = hide(framework, world.read, sources(case))
        again = Mixed(case, world.read, worlds.CuPyWorld())
        call = case.bind(again)
        framework.synchronize()
        with framework.on(side):
            framework.busy()
            show()
    with framework.device(0):
        call()
        assert cupy.cuda.runtime.getDevice() == 0
    with framework.device(device):
        case.check(again)


# --- faults are not asked for where a graph is captured -------------------------------------------

_DEBUG = """
import sys
import numpy as np
import cases
import worlds
import cupy_cache as cc

framework, seed = sys.argv[1:]
rng = np.random.default_rng(int(seed))
if framework == "torch":
    import torch

    make_world = worlds.TorchCudaWorld

    def capture(call):
        "Returns what replays the call."
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
else:
    import cupy

    make_world = worlds.CuPyWorld

    def capture(call):
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
            call()
            graph = stream.end_capture()
        return lambda: graph.launch(stream)


def captured(case):
    "The case's world and what replays its call."
    world = make_world()
    call = case.bind(world)
    world.synchronize()
    replay = capture(call)
    for spec in case.written:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    return world, replay


def expect_fault(call):
    try:
        call()
    except cc.FaultError as error:
        (fault,) = error.faults
        assert (fault.argument, fault.row, fault.value) == ("slot_mapping", 3, 80), fault
    else:
        raise AssertionError("no fault was raised")


for name, make in cases.CASES.items():
    for calls in (1, 5):
        print(name, "after", calls, "calls", flush=True)
        case = make(rng)
        for _ in range(calls):
            case.call(make_world())
        world, replay = captured(case)
        replay()
        case.check(world)

case = cases.CASES["reshape_and_cache_flash"](rng)
case.specs[4].on(case.specs[4].buffer.bytes)[3] = 80
expect_fault(lambda: case.call(make_world()))
world, replay = captured(case)
replay()
expect_fault(cc.raise_faults)
case.check(world)
"""


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_debug_mode_while_a_graph_is_captured(name, rng):
    """The capture works, and so does its replay; outside, faults are raised by the call."""
    framework_named(name)  # or skip
    run(_DEBUG, name, seed(rng), CUPYCACHE_DEBUG="1")


_DEBUG_BESIDE = """
import threading

import torch

import cupy_cache as cc

key = torch.zeros(4, 2, 8, device="cuda", dtype=torch.float16)
caches = [torch.zeros(5, 16, 2, 8, device="cuda", dtype=torch.float16) for _ in range(2)]
good, bad = (torch.tensor([0, 1, 2, last], device="cuda") for last in (3, 80))


def write(slots):
    "On a stream of its own. Whether a fault was raised."
    try:
        cc.reshape_and_cache_flash(key, key, *caches, slots, stream=beside)
    except cc.FaultError as error:
        assert [fault.value for fault in error.faults] == [80]
        return True
    return False


beside, told = torch.cuda.Stream(), []
for _ in range(5):
    assert not write(good) and write(bad)
for mode in ("global", "thread_local", "relaxed"):
    for elsewhere in (False, True):
        graph, out = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda")
        told.clear()
        work = lambda: told.extend([write(good), write(bad), write(good)])
        with torch.cuda.graph(graph, capture_error_mode=mode):
            out.add_(1)
            if elsewhere:
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
            else:
                work()
        assert told == [False, True, False], (mode, elsewhere, told)
        graph.replay()
        torch.cuda.synchronize()
        assert (out == 1).all()
"""


def test_debug_mode_while_another_stream_is_captured():
    """By the same thread or by another: faults are raised, and the capture goes on."""
    framework_named("torch")  # or skip
    run(_DEBUG_BESIDE, CUPYCACHE_DEBUG="1")
