# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What is out of bounds is recorded once and told once, to whoever asks, in whatever thread or
process; asking after every call changes nothing that is written."""

import contextlib
import copy
import ctypes
import os
import pickle
import subprocess
import sys
import threading
import time
import types
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cases
import numpy as np
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.ops import slot_mapping_groups
from cupy_cache.runtime import cuda, dispatch, driver, faults, locks, modules

FIELDS = ("op", "argument", "row", "value", "limit", "device")


def fields(error):
    return [tuple(getattr(fault, name) for name in FIELDS) for fault in error.faults]


def taken(device=None):
    """The faults recorded on ``device``."""
    try:
        cc.raise_faults(device)
    except cc.FaultError as error:
        return fields(error)
    return []


@pytest.fixture
def often():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


# --- whom they are told ---------------------------------------------------------------------------


class TwoDevices:
    """A driver with a fault on each of two GPUs, the second of which is current."""

    def __init__(self):
        self.there = [0, 1]

    def device_count(self):
        return 2

    def current_device(self):
        return 1

    def take_faults(self, device=None, stream=None):
        found = [index for index in self.there if device in (None, index)]
        self.there = [index for index in self.there if index not in found]
        return (cc.Fault("op", "slots", 0, 9, 8, f"cuda:{index}") for index in found)


class OfCuPy:
    """``cupy.cuda.Device``."""

    def __init__(self, index):
        self.id = index


OfCuPy.__module__ = "cupy.cuda.device"


def torch_device(name):
    return lambda: pytest.importorskip("torch").device(name)


DEVICES = {
    None: ["cuda:0", "cuda:1", "cpu"],
    "cpu": ["cpu"],
    "cuda": ["cuda:1"],
    "cuda:0": ["cuda:0"],
    1: ["cuda:1"],
    np.int64(0): ["cuda:0"],
    OfCuPy(0): ["cuda:0"],
    torch_device("cpu"): ["cpu"],
    torch_device("cuda"): ["cuda:1"],
    torch_device("cuda:0"): ["cuda:0"],
}


@pytest.mark.whole
@pytest.mark.parametrize("device", DEVICES)
def test_every_form_of_device(monkeypatch, device):
    given = device() if callable(device) else device
    monkeypatch.setattr(driver, "active", TwoDevices())
    if callable(device):  # torch, if it has GPUs, knows which is current
        monkeypatch.setattr(sys.modules["torch"].cuda, "is_available", lambda: False)
    faults.record("op", "slots", 0, 9, 8)
    expected = DEVICES[device]
    assert [fault[-1] for fault in taken(given)] == expected
    assert taken(given) == []
    rest = [fault[-1] for fault in taken()]
    assert sorted(rest + expected) == ["cpu", "cuda:0", "cuda:1"]


class NoDevice:
    id = 0  # as jax's devices have


@pytest.mark.whole
@pytest.mark.parametrize(
    "device",
    ["cuda:2", 2, -1, True, np.True_, 0.0, "gpu", "cuda:", "CPU", "", b"cpu", NoDevice(), [0],
     torch_device("meta")],
)  # fmt: skip
def test_anything_else_is_refused(monkeypatch, device):
    given = device() if callable(device) else device
    monkeypatch.setattr(driver, "active", TwoDevices())
    with pytest.raises(cc.DeviceError, match="raise_faults: Invalid value of device: expected"):
        cc.raise_faults(given)
    assert len(taken()) == 2


# --- what a GPU records while it is asked ---------------------------------------------------------


class Memory:
    """CUDA's runtime over a record of `modules.FaultRecord`. ``then(step)`` is what a kernel of
    another thread does after each copy or clearing."""

    memcpyDeviceToHost = 2

    def __init__(self, then):
        self.record, self.then, self.steps = modules.FaultRecord(), then, 0
        self.used = set()  # streams, "device" where all of them are waited for
        self.ptr = ctypes.addressof(self.record)

    def _done(self):
        self.steps += 1
        self.then(self.record, self.steps)

    def deviceSynchronize(self):
        self.used.add("device")

    def streamSynchronize(self, stream):
        self.used.add(stream)

    def memcpyAsync(self, to, at, size, kind, stream):
        self.used.add(stream)
        ctypes.memmove(to, at, size)
        self._done()

    def memsetAsync(self, at, value, size, stream):
        self.used.add(stream)
        # Not by memset, which may store four bytes twice: what was recorded in between would go.
        assert size == ctypes.sizeof(ctypes.c_uint32)
        ctypes.c_uint32.from_address(at).value = value
        self._done()


def fill(record, row):
    record.argument, record.row, record.value, record.limit = 1, row, 10 + row, 8


@pytest.fixture
def device(monkeypatch):
    """Makes a GPU with one kernel loaded that guards an argument, and this `Memory`."""

    def make(then=lambda record, step: None):
        memory = Memory(then)
        kernel = modules.Kernel("op", "stem", "kernel", None, guarded=("slots",))
        module = types.SimpleNamespace(get_global=lambda name: memory)
        loaded = types.SimpleNamespace(kernel=kernel, device=3, module=module)
        cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=memory))
        monkeypatch.setattr(modules, "loaded", lambda: (loaded,))
        monkeypatch.setattr(cuda, "import_cupy", lambda why: cupy)
        monkeypatch.setattr(cuda, "on_device", contextlib.nullcontext)
        return memory

    return make


def test_what_is_only_claimed_is_told_when_it_is_published(device):
    memory = device()
    memory.record.taken = 1
    fill(memory.record, 3)
    assert taken() == [] and memory.record.taken == 1
    memory.record.taken = 2
    assert taken() == [("op", "slots", 3, 13, 8, "cuda:3")] and memory.record.taken == 0
    assert taken() == []


def test_debug_mode_touches_no_stream_but_that_of_the_call(device, monkeypatch):
    """Others may be captured, which what concerns all streams would break."""
    modes = []
    relaxed = contextlib.nullcontext()
    monkeypatch.setattr(cuda, "during_captures", lambda: modes.append(1) or relaxed)
    monkeypatch.setattr(driver, "active", driver.CudaDriver())
    memory = device()
    monkeypatch.setattr(driver.active, "capturing", lambda stream, device: False)
    fill(memory.record, 3)
    memory.record.taken = 2
    with pytest.raises(cc.FaultError):
        faults.after_call(7, 3)
    assert memory.used == {7} and modes
    faults.after_call(7, 3)


def test_what_is_half_read_is_read_again(device):
    """The first copy may have met the fields before they were there, and the word afterwards."""

    def then(record, step):
        if step == 1:
            fill(record, 5)

    memory = device(then)
    memory.record.taken = 2
    assert taken() == [("op", "slots", 5, 15, 8, "cuda:3")]


@pytest.mark.whole
@pytest.mark.parametrize("status, words", [(400, "reset"), (700, "not mapped"), (2, "")])
def test_a_device_that_cannot_be_asked(device, monkeypatch, status, words):
    """It was reset, or its context is lost: CUDA says so, and what that mostly means is told."""
    memory = device()
    lost = RuntimeError("cudaErrorSomething")
    lost.status = status

    def fails():
        raise lost

    monkeypatch.setattr(memory, "deviceSynchronize", fails)
    with pytest.raises(cc.KernelError) as caught:
        driver.CudaDriver().take_faults()
    told = str(caught.value)
    assert told.startswith("raise_faults on cuda:3: ") and "cudaErrorSomething" in told
    assert words in told and caught.value.__cause__ is lost


def test_what_comes_after_the_clearing_is_kept(device):
    def then(record, step):
        if record.taken == 0 and step < 4:  # free again: the next fault
            fill(record, 7)
            record.taken = 2

    memory = device(then)
    fill(memory.record, 6)
    memory.record.taken = 2
    assert taken() == [("op", "slots", 6, 16, 8, "cuda:3")]
    assert taken() == [("op", "slots", 7, 17, 8, "cuda:3")]
    assert taken() == []


def test_two_who_ask_clear_once(device, often):
    """Every fault of a kernel that records the next as soon as it may is told once."""
    count, told, lock = 300, [], threading.Lock()
    memory, recording = device(), True

    def record():
        for row in range(count):
            while memory.record.taken:
                time.sleep(0)
            memory.record.taken = 1
            fill(memory.record, row)
            memory.record.taken = 2

    def ask():
        while recording:
            found = [fault[2] for fault in taken()]
            with lock:
                told.extend(found)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    writer = threading.Thread(target=record)
    for thread in (*asking, writer):
        thread.start()
    writer.join()
    recording = False
    for thread in asking:
        thread.join()
    told += [fault[2] for fault in taken()]
    assert sorted(told) == list(range(count))


# Operations with kernels of their own, and the argument of each that gets a bad number.
EIGHT = {
    "reshape_and_cache_flash": 4, "reshape_and_cache_flash_per_token_head": 6,
    "reshape_and_cache": 4, "concat_and_cache_mla": 3, "concat_and_cache_mla_grouped": 2,
    "gather_cache": 2, "indexer_k_quant_and_cache": 2, "slot_mapping": 1,
}  # fmt: skip


def broken(name, rng):
    """An ordinary call of an operation, but for the last number of one argument."""
    case = cases.CASES[name](rng)
    spec = case.specs[EIGHT[name]]
    numbers = spec.on(spec.buffer.bytes)
    numbers[tuple(extent - 1 for extent in numbers.shape)] = np.iinfo(numbers.dtype).max // 2
    return case


@pytest.mark.parametrize("name", EIGHT)
def test_a_broken_call_tells_its_own_name(world, rng, name):
    broken(name, rng).call(world)
    (fault,) = taken()
    assert fault[0] == name and fault[1] in ("slot_mapping", "block_table", "positions")


@pytest.fixture
def eight(rng):
    """(Name, call, stream) of each, ready to run on a GPU."""
    torch = pytest.importorskip("torch")
    made = [
        (name, broken(name, rng).bind(worlds.TorchCudaWorld()), torch.cuda.Stream())
        for name in EIGHT
    ]
    for _, call, _ in made:  # kernels are loaded, and known
        for _ in range(6):
            call()
    torch.cuda.synchronize()
    assert {fault[0] for fault in taken()} == set(EIGHT)

    def run(call, stream):
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()

    return [(name, lambda c=call, s=stream: run(c, s)) for name, call, stream in made]


@pytest.mark.gpu
def test_eight_streams_at_once(eight):
    """Each is told once, under its own name, every time."""
    rounds, told, ready = 200, Counter(), threading.Barrier(len(eight) + 1)

    def work(call):
        for _ in range(rounds):
            ready.wait(60)
            call()
            ready.wait(60)

    threads = [threading.Thread(target=work, args=(call,)) for _, call in eight]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        ready.wait(60)
        ready.wait(60)
        found = taken()
        assert len(found) == len(eight)
        told.update(fault[0] for fault in found)
    for thread in threads:
        thread.join()
    assert told == dict.fromkeys(EIGHT, rounds)


@pytest.mark.gpu
def test_eight_streams_while_another_thread_asks(eight):
    """Whoever has a fault is told it, however the asking falls together with others' work."""
    rounds, told, deadline = 200, Counter(), time.monotonic() + 120

    def work(name, call):
        for _ in range(rounds):
            before = told[name]
            call()
            while told[name] == before:
                assert time.monotonic() < deadline, f"a fault of {name} was lost"
                time.sleep(0)
            done[name] += 1

    done = Counter()
    threads = [threading.Thread(target=work, args=pair) for pair in eight]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        told.update(fault[0] for fault in taken())
    for thread in threads:
        thread.join()
    assert done == dict.fromkeys(EIGHT, rounds) and set(told) == set(EIGHT)


# --- copies, and other processes ------------------------------------------------------------------


def every_error():
    """One of each class; faults with fields that are all different."""
    made = [
        cc.FaultError([cc.Fault("a", "b", 1, -2, 3, "cuda:4"), cc.Fault("c", "d", 5, 6, 7, "")])
    ]
    todo = [cc.CupyCacheError]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind is cc.OutOfBlocksError:
            made.append(kind("BlockTables.step", 3, 2, 8))
        elif kind is not cc.FaultError:
            made.append(kind("op: Invalid value of x: expected 1, got 2"))
    return made


@pytest.mark.parametrize("again", [
    copy.copy, copy.deepcopy,
    *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
])  # fmt: skip
@pytest.mark.whole
def test_errors_survive_copies(again):
    for error in every_error():
        error.__notes__ = ["of a user"]
        copied = again(error)
        assert type(copied) is type(error) and str(copied) == str(error)
        assert copied.args == error.args and copied.__notes__ == ["of a user"]
        if type(error) is cc.FaultError:
            assert fields(copied) == fields(error) and copied.faults == error.faults
            assert str(copied.faults[0]) in repr(copied.faults)


def make_a_fault():
    key, cache = np.ones((2, 1, 4), np.float32), np.zeros((1, 2, 1, 4), np.float32)
    cc.reshape_and_cache_flash(key, key, cache, cache.copy(), np.array([0, 7]))
    cc.raise_faults()


def test_errors_come_back_from_other_processes():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        error = pool.submit(make_a_fault).exception(timeout=60)
    assert type(error) is cc.FaultError
    assert fields(error) == [("reshape_and_cache_flash", "slot_mapping", 1, 7, 2, "cpu")]


# --- threads and forks ----------------------------------------------------------------------------


def test_none_is_lost_among_threads(often):
    """Each operation of each thread once, while others ask."""
    each, told, lock = 2000, [], threading.Lock()
    ready = threading.Barrier(6)

    def record(thread):
        ready.wait()
        for number in range(each):
            for _ in range(2):
                faults.record(f"{thread} {number}", "slots", 0, 9, 8)

    def ask():
        ready.wait()
        while any(thread.is_alive() for thread in threads[:4]):
            found = taken("cpu")
            with lock:
                told.extend(found)

    threads = [threading.Thread(target=record, args=(number,)) for number in range(4)]
    threads += [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told += taken("cpu")
    # Asked between its two violations an operation is told of twice.
    assert {fault[0] for fault in told} == {f"{t} {n}" for t in range(4) for n in range(each)}
    assert len(told) <= 2 * 4 * each


FORK = """
import os, signal, threading
import numpy as np
import cupy_cache as cc
from cupy_cache.runtime import locks

cc.slot_mapping(np.array([[0]]), np.array([0]), np.array([0, 1]), 4)
held, done = threading.Event(), threading.Event()

def hold():
    every = list(locks._locks)
    assert len(every) > 20  # of each operation's plans, of faults, of kernels
    for lock in every:
        lock.__enter__()
    held.set()
    done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(20)
    table, bounds = np.array([[0, 9]]), np.array([0, 3])  # a signature of its own, and a fault
    got = cc.slot_mapping(table, np.array([0, 1, 99], np.int32), bounds, 4)
    try:
        cc.raise_faults()
    except cc.FaultError as error:
        os._exit(0 if got.tolist() == [0, 1, -1] and error.faults[0].value == 99 else 3)
    os._exit(4)
status = os.waitpid(child, 0)[1]
done.set()
print(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_locks_are_free_in_a_forked_child():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0"


@pytest.mark.whole
def test_a_call_in_the_middle_of_another():
    """As of a signal handler, or at an object's end: the thread itself holds the locks."""
    told = []

    def in_the_middle():
        with contextlib.ExitStack() as held:
            for lock in list(locks._locks):
                held.enter_context(lock)
            dispatch.forget_everything()
            cc.gather_slots(np.zeros((2, 2, 8)), np.zeros((1, 8)), np.array([9]))
            try:
                cc.raise_faults()
            except cc.FaultError as error:
                told.extend(error.faults)

    thread = threading.Thread(target=in_the_middle, daemon=True)
    thread.start()
    thread.join(20)
    locks._renew_all()  # else a thread that waits would keep them
    assert [fault.value for fault in told] == [9]


def output_of(script, *arguments):
    """What ``script`` prints in a process of its own, which must end well."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


FORK_AT_THE_FIRST_USE = """
import os, signal, threading, types
from cupy_cache.runtime import cuda, driver

begun = threading.Event()


def slow(why):
    begun.set()
    threading.Event().wait()


cuda.import_cupy = slow
threading.Thread(target=lambda: driver.active.current_device(), daemon=True).start()
begun.wait()
child = os.fork()
if not child:
    signal.alarm(3)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace())
    cupy.cuda.runtime = types.SimpleNamespace(getDevice=lambda: 5)
    cuda.import_cupy = lambda why: cupy
    os._exit(driver.active.current_device())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_that_is_forked_while_a_thread_finds_cuda():
    assert output_of(FORK_AT_THE_FIRST_USE) == "5\n"


FORK_DURING_THE_IMPORT = """
import importlib.machinery, os, signal, sys, threading
import cupy_cache as cc

begun = threading.Event()


class Slow:
    def find_spec(name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Slow) if name == "cupy" else None

    def create_module(spec):
        return None

    def exec_module(module):
        begun.set()
        threading.Event().wait()


sys.meta_path.insert(0, Slow)
sys.modules.pop("cupy", None)
threading.Thread(target=eval, args=(sys.argv[1], globals()), daemon=True).start()
begun.wait()
child = os.fork()
if not child:
    signal.alarm(3)
    if cc.alibi_slopes(2).tolist() != [2**-4, 2**-8]:
        os._exit(4)
    try:
        cc.alibi_slopes(2, device=0)
    except cc.MissingDependencyError as error:
        os._exit(5 if "forked while CuPy was imported" in str(error) else 6)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.parametrize(
    "first", ["cc.alibi_slopes(2)", pytest.param("__import__('cupy')", marks=pytest.mark.extra)]
)
def test_a_child_that_is_forked_while_a_thread_imports_cupy(first):
    """Whoever began it: the user may have."""
    assert output_of(FORK_DURING_THE_IMPORT, first) == "5\n"


def test_a_lock_that_is_renewed_while_it_is_held():
    """As in a child that a signal handler forked in the middle of a call: the call goes on."""
    lock = locks.Lock()
    with lock:
        lock.renew()
    held = []

    def hold():
        with lock:
            held.append(True)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    thread.join(20)
    assert held


FORK_WITH_A_FAULT = """
import os
from cupy_cache.runtime import faults

faults.record("op", "slots", 0, 9, 8)
child = os.fork()
told = []
try:
    faults.raise_faults()
except faults.FaultError as error:
    told = error.faults
if not child:
    os._exit(len(told))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(told))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_does_not_tell_its_parents_faults():
    assert output_of(FORK_WITH_A_FAULT) == "0 1\n"


FORK_WITH_KERNELS = """
import os, signal
import numpy as np
import cupy_cache as cc
from cupy_cache.runtime import faults, modules

modules._loaded["a kernel"] = None  # as if there were a GPU
child = os.fork()
if not child:
    signal.alarm(20)
    faults.record("op", "slots", 0, 9, 8)
    try:
        cc.raise_faults()
        os._exit(5)
    except cc.FaultError as error:
        assert [fault.argument for fault in error.faults] == ["slots"]
    assert cc.place_slopes([1.0], device="cpu").tolist() == [1.0]
    try:
        cc.place_slopes([1.0], device="cuda")
    except cc.KernelError as error:
        os._exit(0 if "spawn" in str(error) else 3)
    os._exit(4)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_has_the_cpu_alone():
    """Where the parent used CUDA, that is said."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK_WITH_KERNELS],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0"


# --- asking after every call ----------------------------------------------------------------------

# Their numbers are addresses.
_WITHOUT_BOUNDS = {"swap_blocks_batch"}


def run(made, case):
    """The bytes that a call leaves in all that it may write, and the faults it records."""
    told = []
    try:
        case.call(made)
    except cc.FaultError as error:
        told = fields(error)
    except cc.ArgumentError as error:  # numbers in host memory are checked before
        told = [str(error)]
    return [made.bytes_of(spec) for spec in case.written], told + taken()


@pytest.mark.parametrize("name", sorted(set(cases.CASES) - _WITHOUT_BOUNDS))
def test_debug_mode_writes_the_same(world, rng, monkeypatch, name):
    case, other = cases.CASES[name](rng), type(world)()
    broken = 0
    for spec in case.specs:
        if spec.dtype in ("int32", "int64") and spec not in case.written and 0 not in spec.shape:
            numbers = spec.on(spec.buffer.bytes)
            at = tuple(int(rng.integers(0, extent)) for extent in numbers.shape)
            numbers[at] = np.iinfo(numbers.dtype).max // 2
            broken += 1
    expected, recorded = run(world, case)
    monkeypatch.setattr(faults, "debug", True)
    try:
        got, told = run(other, case)
    finally:
        other.close()
    for one, two in zip(got, expected):
        np.testing.assert_array_equal(one, two)
    assert bool(told) == bool(recorded) and {fault[0] for fault in told} == {
        fault[0] for fault in recorded
    }


def test_debug_mode_finishes_calls_of_several_launches(world, rng, monkeypatch):
    monkeypatch.setattr(faults, "debug", True)
    groups = slot_mapping_groups.MAX_GROUPS + 2
    numbers = rng.integers(0, 100, (groups, 1, 2))
    tables = [world.put(worlds.of_values(table)) for table in numbers]
    positions = np.array([0, 5, 8])  # the last one is past every table
    out = worlds.of_values(np.full((groups, 3), 77))
    bounds = world.put(worlds.of_values(np.array([0, 3])))
    put = world.put(out), world.put(worlds.of_values(positions))
    with pytest.raises(cc.FaultError, match="slot_mapping_groups"):
        cc.slot_mapping_groups(tables, None, put[1], bounds, [4] * groups, out=put[0])
    expected = np.stack([numbers[:, 0, 0] * 4, numbers[:, 0, 1] * 4 + 1, [-1] * groups], 1)
    np.testing.assert_array_equal(out.on(world.bytes_of(out)), expected)
