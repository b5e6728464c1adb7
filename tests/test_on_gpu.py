# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What only a real GPU shows: graph capture, streams, threads, no waiting, large caches, the binary
cache."""

import gc
import os
import re
import shutil
import subprocess
import sys
import threading

import cases
import numpy as np
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import dispatch, driver, fastpath, faults, modules, streams

pytestmark = pytest.mark.gpu


@pytest.fixture
def cupy():
    return pytest.importorskip("cupy")


@pytest.fixture(params=cases.CASES)
def case(request, rng):
    return cases.CASES[request.param](rng)


def test_torch_graph(torch, case):
    """Captured once, nothing runs; replayed, everything does."""
    warm, world = worlds.TorchCudaWorld(), worlds.TorchCudaWorld()
    case.call(warm)
    call = case.bind(world)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for spec in case.written:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    graph.replay()
    case.check(world)
    cc.raise_faults()


def test_l2_policies(cupy):
    """The numbers in vec.cuh are what the instruction makes on this GPU."""
    if int(cupy.cuda.Device().compute_capability) < 80:
        pytest.skip("the instruction needs compute capability 8.0")
    header = modules.kernel_dir() / "include" / "cupy_cache" / "vec.cuh"
    text = header.read_text()
    first = re.search(r"\? (0x[0-9a-f]{16}) : kNormalPolicy;", text)
    normal = re.search(r"kNormalPolicy = (0x[0-9a-f]{16});", text)
    kernel = cupy.RawKernel(
        r"""
        extern "C" __global__ void policies(unsigned long long* out) {
          asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(out[0]));
          asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(out[1]));
        }
        """,
        "policies",
    )
    made = cupy.zeros(2, cupy.uint64)
    kernel((1,), (1,), (made,))
    assert made.tolist() == [int(number[1], 16) for number in (first, normal)]


def test_again_and_again(torch, case):
    """From the third call on, a known signature of torch tensors goes a shorter way, and from the
    fifth on the shortest."""
    for _ in range(6):
        world = worlds.TorchCudaWorld()
        case.call(world)
        case.check(world)
    cc.raise_faults()


@pytest.mark.parametrize("before", (3, 5))
def test_known_signature_in_a_new_thread(torch, case, before):
    """A thread that has never touched CUDA has no context."""
    for _ in range(before):
        case.call(worlds.TorchCudaWorld())
    world = worlds.TorchCudaWorld()
    call = case.bind(world)
    torch.cuda.synchronize()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    case.check(world)


def test_known_signature_among_several_gpus(torch, case, monkeypatch):
    """Then each launch looks at the current GPU first."""
    # Not isinstance, which asks strange objects what they are, and some of them warn.
    ops = [op for op in gc.get_objects() if type(op) is dispatch.Op]
    for op in ops:
        monkeypatch.setattr(op, "fast_paths", fastpath.FastPaths(op))  # those are for one GPU
    monkeypatch.setattr(driver, "active", driver.CudaDriver())
    monkeypatch.setattr(driver.active, "device_count", lambda: 2)
    test_again_and_again(torch, case)


@pytest.mark.multi_gpu
def test_known_signature_on_a_gpu_that_is_not_current(torch, case):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    for _ in range(6):
        world = worlds.TorchCudaWorld()
        call = case.bind(world)
        torch.cuda.synchronize()
        with torch.cuda.device(1):
            call()
        torch.cuda.synchronize(0)
        case.check(world)


def test_cupy_graph(cupy, case):
    warm, world = worlds.CuPyWorld(), worlds.CuPyWorld()
    case.call(warm)
    call = case.bind(world)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        call()
        graph = stream.end_capture()
    for spec in case.written:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    graph.launch(stream)
    stream.synchronize()
    case.check(world)


def test_nothing_waits(torch, case):
    """The call returns while the stream is still busy with what came before."""
    world = worlds.TorchCudaWorld()
    case.call(worlds.TorchCudaWorld())  # compiled and loaded
    call = case.bind(world)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    done = torch.cuda.Event()
    done.record()
    call()
    assert not done.query(), "the call waited for the device"
    torch.cuda.synchronize()
    case.check(world)


def test_current_stream_of_the_framework(torch, case):
    """Work goes behind what the caller's own stream holds: here, the data's arrival."""
    world = worlds.TorchCudaWorld()
    case.call(worlds.TorchCudaWorld())
    call = case.bind(world)
    device_specs = [s for s in case.specs if s not in case.on_host]
    first = device_specs[0]
    storage = world._made[id(first.buffer)][1]
    good = storage.clone()
    storage.fill_(0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        storage.copy_(good)
        call()
    side.synchronize()
    case.check(world)


def test_stream_argument(cupy, rng):
    """``stream=`` takes CuPy's and torch's streams and addresses."""
    torch = pytest.importorskip("torch")
    for stream in (cupy.cuda.Stream(non_blocking=True), torch.cuda.Stream()):
        for given in (stream, streams.pointer("test", stream)):
            world, case = worlds.CuPyWorld(), cases.CASES["reshape_and_cache_flash"](rng)
            put = case.put(world)
            cupy.cuda.Device().synchronize()
            cc.reshape_and_cache_flash(*put, stream=given)
            stream.synchronize()
            case.check(world)


def test_from_a_new_thread(case):
    """A thread that never touched CUDA has no context of its own yet."""
    world, failure = worlds.CuPyWorld(), []

    def run():
        try:
            case.call(world)
        except BaseException as error:
            failure.append(error)

    case.put(world)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failure, failure
    case.check(world)


def test_many_threads_share_plans(torch, rng):
    """Threads that launch the same plan must not mix up their parameters. No call writes what
    another does, so each one that went elsewhere is missed."""
    workers, calls, tokens = 8, 200, 4
    made = []
    for _ in range(workers):
        key, value = torch.randn(2, calls, tokens, 4, 64, device="cuda").half()
        caches = torch.full((2, calls * tokens // 16, 16, 4, 64), -99, device="cuda").half()
        slots = torch.from_numpy(rng.permutation(calls * tokens)).cuda().view(calls, tokens)
        made.append((key, value, *caches, slots))
    torch.cuda.synchronize()

    def write(key, value, key_cache, value_cache, slots):
        for step in zip(key, value, slots):
            cc.reshape_and_cache_flash(*step[:2], key_cache, value_cache, step[2])

    threads = [threading.Thread(target=write, args=step) for step in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for key, value, key_cache, value_cache, slots in made:
        for source, cache in ((key, key_cache), (value, value_cache)):
            assert torch.equal(cache.view(-1, 4, 64)[slots.view(-1)], source.view(-1, 4, 64))


@pytest.mark.multi_gpu
def test_device_of_the_array(cupy, case):
    """Work goes to the array's device, whatever device is current."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")
    world = worlds.CuPyWorld()
    with cupy.cuda.Device(1):
        put = case.bind(world)
    with cupy.cuda.Device(0):
        put()
    with cupy.cuda.Device(1):
        case.check(world)


def test_a_shape_met_first_inside_a_capture(torch, rng):
    """It is loaded there, or the error says what to do; either way nothing is written wrongly."""
    world = worlds.TorchCudaWorld()
    heads, size = 3, int(rng.integers(200, 300)) * 2  # a specialisation nobody else asks for
    specs = [
        worlds.array(rng, (4, heads, size), "float16"),
        worlds.array(rng, (4, heads, size), "float16"),
        worlds.array(rng, (2, 4, heads, size), "float16"),
        worlds.array(rng, (2, 4, heads, size), "float16"),
        worlds.of_values(np.array([7, 0, 3, 5])),
    ]
    case = cases.Case(
        specs, specs[2:4], cc.reshape_and_cache_flash, cases.oracle.reshape_and_cache_flash
    )
    call = case.bind(world)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except cc.CaptureError as error:
        assert "warmup" in str(error)
        return
    graph.replay()
    case.check(world)


def test_caches_above_four_gigabytes(torch, large_caches, rng):
    """2^31 elements and 2^32 bytes are passed by the blocks used here."""
    block_size, heads, size = 16, 8, 128
    num_blocks = (5 << 30) // (block_size * heads * size * 2)
    shape = (num_blocks, block_size, heads, size)
    key_cache, value_cache = (
        torch.full(shape, -1.0, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    slots = [num_blocks * block_size - 1, 0, (num_blocks - 2) * block_size + 5]
    key, value = (
        torch.randn(3, heads, size, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    mapping = torch.tensor(slots, device="cuda")
    cc.reshape_and_cache_flash(key, value, key_cache, value_cache, mapping)
    for cache, source in ((key_cache, key), (value_cache, value)):
        rows = cache.view(-1, heads, size)
        assert torch.equal(rows[slots], source)
        assert int((rows != -1).any(-1).any(-1).sum()) == 3
    first, last = 1, num_blocks - 1
    cc.copy_blocks([key_cache], [value_cache], [(last, first)])
    for cache in (key_cache, value_cache):
        assert torch.equal(cache[first], cache[last])
    host = torch.empty(2, *shape[1:], dtype=torch.bfloat16, pin_memory=True)
    cc.swap_blocks(key_cache, host, [(last, 0), (num_blocks - 2, 1)])
    torch.cuda.synchronize()
    assert torch.equal(host, key_cache[[last, num_blocks - 2]].cpu())
    cc.raise_faults()


@pytest.mark.slow
def test_ten_thousand_replays_with_new_data(torch, rng):
    """A graph reads anew what is in its arrays: tokens, tables and positions."""
    blocks, block, heads, size, tokens = 64, 16, 2, 64, 32
    torch.manual_seed(int(rng.integers(2**31)))

    def rows(*shape):
        return torch.randn(*shape, device="cuda").to(torch.bfloat16)

    caches = [rows(blocks, block, heads, size) for _ in "kv"]
    expected = [cache.clone().view(-1, heads, size) for cache in caches]
    given, out = [rows(tokens, heads, size) for _ in "kv"], rows(tokens, heads, size)
    table = torch.zeros(1, 4, dtype=torch.int32, device="cuda")
    positions = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    slots = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    first = torch.zeros(1, dtype=torch.int32, device="cuda")

    def step():
        cc.slot_mapping(table, positions, bounds, block, out=slots)
        cc.reshape_and_cache_flash(*given, *caches, slots)
        cc.gather_cache(caches[0], out, table, bounds, first)

    step()
    for cache, kept in zip(caches, expected):
        kept.copy_(cache.view(-1, heads, size))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    offsets = torch.arange(tokens, device="cuda")
    for _ in range(10_000):
        table.copy_(torch.randperm(blocks, device="cuda")[:4].view(1, 4))
        first.copy_(torch.randint(0, 4 * block - tokens, (1,), device="cuda"))
        positions.copy_(first + offsets)
        for source in given:
            source.copy_(rows(tokens, heads, size))
        graph.replay()
        where = table[0].long()[positions // block] * block + positions % block
        wrong += (slots != where).any() | (out != given[0]).any()
        for cache, kept, source in zip(caches, expected, given):
            kept[where] = source
            wrong += (cache.view(-1, heads, size) != kept).any()
    assert int(wrong) == 0
    cc.raise_faults()


_EDITED = """
import numpy as np, cupy, cupy_cache as cc
key = cupy.ones((1, 1, 8), np.float32)
key_cache, value_cache = cupy.zeros((1, 1, 1, 8), np.float32), cupy.zeros((1, 1, 1, 8), np.float32)
cc.reshape_and_cache_flash(key, key, key_cache, value_cache, cupy.zeros(1, np.int64))
print(float(key_cache.sum()))
"""


def test_an_edited_header_is_compiled_again(tmp_path):
    """CuPy's disk cache does not look into included files: ours must be in the key."""
    folder = tmp_path / "kernels_cu"
    shutil.copytree(modules.kernel_dir(), folder)

    def run():
        done = subprocess.run(
            [sys.executable, "-c", _EDITED],
            env={
                **os.environ,
                "CUPYCACHE_KERNEL_DIR": str(folder),
                "CUPY_CACHE_DIR": str(tmp_path / "cache"),
            },
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return float(done.stdout)

    assert run() == 8.0
    header = folder / "include" / "cupy_cache" / "vec.cuh"
    text = header.read_text()
    begins = "void store_vector(char* at, Vec<kBytes> vector, bool when = true) {"
    edited = text.replace(begins, f"{begins} return;")
    assert edited != text
    header.write_text(edited)
    assert run() == 0.0


def test_debug_mode_raises_after_the_call(monkeypatch, rng):
    monkeypatch.setattr(faults, "debug", True)
    case = cases.CASES["reshape_and_cache_flash"](rng)
    case.specs[4].on(case.specs[4].buffer.bytes)[3] = 80
    with pytest.raises(cc.FaultError, match="slot_mapping: expected 0..79, got 80 in row 3"):
        case.call(worlds.CuPyWorld())


def test_no_compile_refuses_new_shapes(monkeypatch, cupy):
    monkeypatch.setenv("CUPYCACHE_NO_COMPILE", "1")
    key = cupy.ones((1, 3, 18), np.float32)
    cache = cupy.zeros((1, 5, 3, 18), np.float32)
    with pytest.raises(cc.KernelError, match="warmup"):
        cc.reshape_and_cache_flash(key, key, cache, cache.copy(), cupy.zeros(1, np.int64))


AFTER_A_RESET = """
import ctypes
import os
import sys
import cupy
import cupy_cache as cc

def rows(count):
    return cupy.zeros((count, 2, 16), "float16")

caches = [cupy.zeros((4, 4, 2, 16), "float16") for _ in range(2)]
given = rows(5), rows(5), *caches, cupy.arange(5)
for _ in range(7):  # so many that it is known
    cc.reshape_and_cache_flash(*given)
cc.raise_faults()
assert ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxReset_v2(0) == 0
fewer = [array[:3] if at in (0, 1, 4) else array for at, array in enumerate(given)]
calls = (
    lambda: cc.reshape_and_cache_flash(*given),
    cc.raise_faults,
    lambda: cc.reshape_and_cache_flash(*fewer),
)
for call in calls:
    try:
        call()
    except cc.KernelError as error:
        print(error)
sys.stdout.flush()
os._exit(0)  # CuPy's own arrays cannot be freed any more
"""


def test_after_a_device_reset():
    """What was loaded is gone, and each use of it says so."""
    done = subprocess.run(
        [sys.executable, "-c", AFTER_A_RESET], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 3 and all("if the device was reset" in line for line in told), told
