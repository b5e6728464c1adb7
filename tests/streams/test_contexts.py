# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Which GPU is current, and which has a context, on real ones."""

import pytest
import worlds
from pending import CASES, FRAMEWORKS, framework_named, hide, run, seed, side_stream, warm

# All operations obey the same rules, so by default each of them is tried.
pytestmark = [pytest.mark.gpu, pytest.mark.whole]


# --- contexts and the current GPU -----------------------------------------------------------------

# A new thread's current GPU is cuda:0, as long as it has not chosen another, and there is no
# context on that yet. In this process only cuda:1 is ever chosen.
_WORKER = """
import sys
import threading
import numpy as np
from streams.ways_in import has_context as active

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
    case.check(world, calls=6)

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
cache = cc.PagedKVCache.allocate(
    1, 4, 16, 2, 32, dtype="float16", framework=framework, device=1
)


def swap():
    "Makes a stream and pinned memory, and drops them."
    space = cc.SwapSpace(cache, 2)
    space.swap_out([(1, 0)])
    arriving = space.prefetch([0])
    arriving.wait()
    arriving.swap_in([(0, 2)])


cache.zero_blocks([0])
in_a_new_thread("SwapSpace", swap, times=2)
in_a_new_thread("raise_faults", cc.raise_faults)
cc.raise_faults()
assert not active(0), "raise_faults left a context on cuda:0"
assert active(1), "it cannot be told whether there are contexts"
"""

_WARMUP = """
from streams.ways_in import has_context as active
import cupy_cache as cc

assert not active(0) and not active(1), "there are contexts before anything has run"
assert cc.warmup(2, 64, 16, "float16", device=1, ops=("reshape_and_cache_flash",), progress=False)
assert active(1), "nothing was loaded on cuda:1"
assert not active(0), "warmup left a context on cuda:0"
"""


@pytest.mark.multi_gpu
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_worker_thread_leaves_no_context_on_another_gpu(two_gpus, name, rng):
    framework_named(name)  # or skip
    run(_WORKER, name, seed(rng))


@pytest.mark.multi_gpu
def test_warmup_leaves_no_context_on_another_gpu(two_gpus):
    run(_WARMUP)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    "name", [*FRAMEWORKS, pytest.param("transformers", marks=pytest.mark.extra)]
)
def test_every_way_in_from_threads_that_chose_no_gpu(two_gpus, name):
    """Right bytes on cuda:1, and no context on cuda:0."""
    pytest.importorskip(name)
    run("import sys; from streams import ways_in; ways_in.alone(sys.argv[1])", name)


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
        case.check(world, calls=6)


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
