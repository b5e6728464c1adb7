# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Order between streams, how long memory must live, and which GPU is current: on a real GPU.

A stream is kept busy for a while, so that what an operation enqueues behind it is still pending
when the test goes on; or so that what an operation must wait for is not there yet. Two streams of
which neither waits for the other are needed for that: the current ones of torch and of CuPy are
CUDA's legacy stream unless a test says otherwise, and the others here are created non-blocking.
"""

import functools
import gc
import importlib.util
import inspect
import os
import subprocess
import sys

import cases
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc

# All operations obey the same rules, so by default each of them is tried.
pytestmark = [pytest.mark.gpu, pytest.mark.whole]

BUSY_CYCLES = 200_000_000  # 0.1 s on an H100 at 1.98 GHz
ROUNDS = 3  # the first may compile while the stream is busy, which then proves nothing
KNOWN, PATTERN = 0x11, 0x5A  # bytes


# --- frameworks -----------------------------------------------------------------------------------


class Torch:
    """torch, as far as it is needed here. What is enqueued goes to its current stream."""

    name, world = "torch", worlds.TorchCudaWorld

    def __init__(self):
        self.module = pytest.importorskip("torch")

    def stream(self):
        """A stream that does not wait for the legacy one, nor that for it."""
        return self.module.cuda.Stream()

    def on(self, stream):
        return self.module.cuda.stream(stream)

    def device(self, index):
        return self.module.cuda.device(index)

    def busy(self):
        self.module.cuda._sleep(BUSY_CYCLES)

    def pending(self):
        """A function that tells whether what is enqueued now has yet to be done."""
        event = self.module.cuda.Event()
        event.record()
        return lambda: not event.query()

    def synchronize(self):
        self.module.cuda.synchronize()

    def release(self):
        """Give the driver back what is free."""
        self.module.cuda.empty_cache()

    def bytes(self, count, value):
        return self.module.full((count,), value, dtype=self.module.uint8, device="cuda")

    def address(self, array):
        return array.data_ptr()

    def copy(self, to, of):
        to.copy_(of)

    def numpy(self, array):
        return array.cpu().numpy()


class CuPy:
    """CuPy, likewise."""

    name, world = "cupy", worlds.CuPyWorld

    def __init__(self):
        self.module = pytest.importorskip("cupy")
        self._spin = self.module.RawKernel(
            'extern "C" __global__ void spin(long long cycles) '
            "{ long long from = clock64(); while (clock64() - from < cycles) {} }",
            "spin",
        )

    def stream(self):
        return self.module.cuda.Stream(non_blocking=True)

    def on(self, stream):
        return stream

    def device(self, index):
        return self.module.cuda.Device(index)

    def busy(self):
        self._spin((1,), (1,), (np.int64(BUSY_CYCLES),))

    def pending(self):
        event = self.module.cuda.Event(disable_timing=True)
        event.record()
        return lambda: not event.done

    def synchronize(self):
        self.module.cuda.Device().synchronize()

    def release(self):
        self.module.get_default_memory_pool().free_all_blocks()

    def bytes(self, count, value):
        return self.module.full((count,), value, np.uint8)

    def address(self, array):
        return array.data.ptr

    def copy(self, to, of):
        to.data.copy_from_device_async(of.data, of.nbytes)

    def numpy(self, array):
        return array.get()


FRAMEWORKS = {kind.name: kind for kind in (Torch, CuPy)}


@functools.cache
def framework_named(name):
    return FRAMEWORKS[name]()


@functools.cache
def side_stream(framework, device=0):
    """A stream of GPU ``device`` that really runs beside the current one. Streams share a few
    queues, and what is in one queue may wait for each other."""
    with framework.device(device):
        probe, tried = framework.bytes(16, 0), []  # those that were tried keep their queues
        source = framework.bytes(16, 0)
        for _ in range(16):
            stream = framework.stream()
            tried.append(stream)
            framework.synchronize()
            framework.busy()
            pending = framework.pending()
            with framework.on(stream):
                framework.copy(probe, source)
            stream.synchronize()
            beside = pending()
            framework.synchronize()
            if beside:
                return stream
    raise AssertionError("no stream runs beside the current one")


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return framework_named(request.param)


@pytest.fixture
def torch():
    return framework_named("torch").module


@pytest.fixture
def cupy():
    return framework_named("cupy").module


@pytest.fixture
def two_gpus(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")


@pytest.fixture(autouse=True)
def no_faults():
    """Those that a test leaves are its own, not those of a later one."""
    yield
    cc.raise_faults()


# --- cases ----------------------------------------------------------------------------------------


def _swap_layers(rng):
    """`swap_blocks` with a list of layers."""
    specs = [worlds.array(rng, (n, 16, 72), "bfloat16") for n in (6, 6, 6, 8, 8, 8)]
    pairs = [(5, 0), (0, 7)]

    def expected(*layers):
        for source, destination in zip(layers[:3], layers[3:]):
            oracle.swap_blocks(source, destination, pairs)

    return cases.Case(
        specs, specs[3:], lambda *args: cc.swap_blocks(args[:3], args[3:], pairs), expected
    )


def _layers(specs):
    return [(specs[0], specs[1]), (specs[2], specs[3])]


def _pack_by_device_numbers(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "uint16") for _ in range(4)]
    out = worlds.array(rng, (2 * 2 * 3 * 16 * 256,), "uint8")
    numbers = worlds.of_values(np.array([4, 1, 4]))
    return cases.Case(
        [*specs, out, numbers],
        [out],
        lambda *args: cc.pack_blocks(_layers(args), args[5], args[4]),
        lambda *args: oracle.pack(_layers(args), args[5], args[4], "layer_first"),
    )


def _zero_by_device_numbers(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    numbers = worlds.of_values(np.array([4, 1]))
    return cases.Case(
        [*specs, numbers],
        specs,
        lambda *args: cc.zero_blocks(_layers(args), args[4]),
        lambda *args: oracle.zero_blocks(args[:4], args[4]),
    )


def _paged_write(rng):
    flash = cases.CASES["reshape_and_cache_flash"](rng)

    def run(key, value, key_cache, value_cache, slots):
        cc.PagedKVCache([key_cache], [value_cache]).write(0, key, value, slots)

    return cases.Case(flash.specs, flash.written, run, oracle.reshape_and_cache_flash)


PAGED = "PagedKVCache.write"
ADDRESSES = "swap_blocks_batch"  # takes no arrays, and so knows nothing of their frameworks
CASES = {
    **cases.CASES,
    "swap_blocks-layers": _swap_layers,
    "pack_blocks-device": _pack_by_device_numbers,
    "zero_blocks-device": _zero_by_device_numbers,
    PAGED: _paged_write,
}


def sources(case):
    """Of the arrays on the GPU, those that are only read."""
    apart = {id(spec.buffer) for spec in (*case.written, *case.on_host)}
    return [spec for spec in case.specs if id(spec.buffer) not in apart]


def destinations(case):
    """Of the arrays on the GPU, those that are written."""
    return [spec for spec in case.written if spec not in case.on_host]


def names_where(condition):
    """The cases for which ``condition(case)`` holds, without the one that takes addresses."""
    made = {name: make(np.random.default_rng(0)) for name, make in CASES.items()}
    return [name for name, case in made.items() if name != ADDRESSES and condition(case)]


READING = names_where(sources)
WRITING = names_where(destinations)


def storages(world, specs):
    """The memory that ``specs`` lie in, each once."""
    return [world._made[key][1] for key in dict.fromkeys(id(spec.buffer) for spec in specs)]


def hide(framework, world, specs):
    """Zero the memory of ``specs``, which are then valid but wrong; returns a function that
    enqueues what was there."""
    held = []
    for storage in storages(world, specs):
        size = storage.nbytes
        held.append((storage, framework.bytes(size, 0)))
        framework.copy(held[-1][1], storage)
        framework.copy(storage, framework.bytes(size, 0))

    def show():
        for storage, content in held:
            framework.copy(storage, content)

    return show


def warm(case, make_world, calls):
    """Call with new arrays each time, until an operation knows them well."""
    for _ in range(calls):
        world = make_world()
        case.call(world)
        world.synchronize()


class Mixed:
    """A world for ``case`` in which what is only read is of another kind than what is written."""

    def __init__(self, case, read, written):
        self.read, self._written = read, written
        self._buffers = {id(spec.buffer) for spec in case.written}
        self.put_on_host, self.bytes_of = written.put_on_host, written.bytes_of

    def put(self, spec):
        written = id(spec.buffer) in self._buffers
        return (self._written if written else self.read).put(spec)

    def synchronize(self):
        self._written.synchronize()


def run(script, *arguments, **environment):
    """Run ``script`` in a process of its own. Returns its output; it must end well."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert not done.returncode, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def seed(rng):
    return int(rng.integers(2**32))


# --- A1: results that the library makes -----------------------------------------------------------
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


NEW_RESULTS = {
    "slot_mapping": _new_slot_mapping,
    "slot_mapping_groups": _new_slot_mapping_groups,
    "alibi_bias": _new_bias,
    "alibi_slopes": _new_slopes,
    "place_slopes": _placed_slopes,
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


# --- A2: sources of another framework -------------------------------------------------------------

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


# --- A3: memory that is dropped while work on it is pending ---------------------------------------

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


# --- A4: contexts and the current GPU -------------------------------------------------------------

_ACTIVE = """
import ctypes

def active(index):
    "Whether this process has a context on that GPU, by the driver's own account."
    driver, device, flags, on = ctypes.CDLL("libcuda.so.1"), *(ctypes.c_int() for _ in range(3))
    assert driver.cuInit(0) == 0
    assert driver.cuDeviceGet(ctypes.byref(device), index) == 0
    state = driver.cuDevicePrimaryCtxGetState
    assert state(device, ctypes.byref(flags), ctypes.byref(on)) == 0
    return bool(on.value)
"""

# A new thread's current GPU is cuda:0, as long as it has not chosen another, and there is no
# context on that yet. In this process only cuda:1 is ever chosen.
_WORKER = (
    _ACTIVE
    + """
import sys
import threading
import numpy as np

framework, seed = sys.argv[1:]
if framework == "torch":
    import torch
    torch.cuda.set_device(1)
else:
    import cupy
    cupy.cuda.Device(1).use()

import cases
import worlds
import cupy_cache as cc

make_world = worlds.TorchCudaWorld if framework == "torch" else worlds.CuPyWorld
rng = np.random.default_rng(int(seed))


def in_a_new_thread(name, call, times=1):
    "What the last of the calls returned."
    assert not active(0), f"there is a context on cuda:0 before {name} has run"
    results, failures = [], []

    def work():
        try:
            results.extend([call() for _ in range(times)])
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    assert not active(0), f"{name} left a context on cuda:0"
    return results[-1]


for name, make in cases.CASES.items():
    case, world = make(rng), make_world()
    call = case.bind(world)
    world.synchronize()
    in_a_new_thread(name, call, times=6)
    case.check(world)

world = make_world()
table, positions, starts = (
    world.put(worlds.of_values(np.array(values)))
    for values in ([[3, 5]], [0, 17, 2], [0, 3])
)
world.synchronize()
made = in_a_new_thread(
    "slot_mapping without out", lambda: cc.slot_mapping(table, positions, starts, 16)
)
world.synchronize()
np.testing.assert_array_equal(world.numpy(made), [48, 81, 50])
made = in_a_new_thread(
    "alibi_slopes", lambda: cc.alibi_slopes(8, framework=framework, device=1)
)
world.synchronize()
np.testing.assert_array_equal(world.numpy(made), 2.0 ** -np.arange(1, 9))
in_a_new_thread("raise_faults", cc.raise_faults)
cc.raise_faults()
assert not active(0), "raise_faults left a context on cuda:0"
assert active(1), "it cannot be told whether there are contexts"
"""
)

_WARMUP = (
    _ACTIVE
    + """
import cupy_cache as cc

assert not active(0) and not active(1), "there are contexts before anything has run"
assert cc.warmup(2, 64, 16, "float16", device=1, ops=("reshape_and_cache_flash",), progress=False)
assert active(1), "nothing was loaded on cuda:1"
assert not active(0), "warmup left a context on cuda:0"
"""
)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_worker_thread_leaves_no_context_on_another_gpu(two_gpus, name, rng):
    framework_named(name)  # or skip
    run(_WORKER, name, seed(rng))


@pytest.mark.multi_gpu
def test_warmup_leaves_no_context_on_another_gpu(two_gpus):
    run(_WARMUP)


class SecondGPU(worlds.TorchCudaWorld):
    """torch's tensors on cuda:1."""

    device = "cuda:1"

    def synchronize(self):
        with framework_named("cupy").device(1):
            super().synchronize()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", CASES)
def test_current_gpu_stays(two_gpus, framework, name, rng):
    """A call that works on cuda:1 leaves cuda:0 current."""
    case = CASES[name](rng)
    runtime = framework_named("cupy").module.cuda.runtime
    with framework.device(1):
        world = framework.world()
        call = case.bind(world)
        framework.synchronize()
    for _ in range(6):
        with framework.device(0):
            call()
            assert runtime.getDevice() == 0
            if framework.name == "torch":
                assert framework.module.cuda.current_device() == 0
    with framework.device(1):
        case.check(world)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", CASES)
def test_side_stream_of_a_gpu_that_is_not_current(torch, two_gpus, name, rng):
    """The arrays come late, on torch's current stream of cuda:1, while cuda:0 is current."""
    framework, case = framework_named("torch"), CASES[name](rng)
    warm(case, SecondGPU, 5)
    world = SecondGPU()
    call = case.bind(world)
    side = side_stream(framework, 1)
    with torch.cuda.device(1):
        show = hide(framework, world, [spec for spec in case.specs if spec not in case.on_host])
        framework.synchronize()
    with torch.cuda.device(1), torch.cuda.stream(side):
        framework.busy()
        show()
        with torch.cuda.device(0):
            call()
            assert torch.cuda.current_device() == 0
    case.check(world)


# --- A5: faults are not asked for where a graph is captured ---------------------------------------

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


# --- A6 and A7: arrays behind DLPack --------------------------------------------------------------


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
    """One for each array at most, and none for a stream that the work has nothing to do with: the
    legacy stream, 1, waits for all others."""
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
            assert max(map(len, exports), default=0) <= (2 if name == PAGED else 1), exports
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


# --- A8: __cuda_array_interface__ names a stream --------------------------------------------------


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
