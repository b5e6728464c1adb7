# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Fixtures and the rules of the three tiers: CPU backend, emulated kernels, real GPU."""

import gc
import importlib.metadata
import os
import shutil
import sys
import zlib

import hypothesis
import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(__file__))

import recording
import worlds

import cupy_cache as cc
from cupy_cache.runtime import dispatch, env, launch


def installed():
    """Whether the package is, and not only found in the checkout."""
    try:
        return bool(importlib.metadata.version("cupy-cache"))
    except importlib.metadata.PackageNotFoundError:
        return False


if not installed():  # then the processes that tests start must find it too
    checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = checkout, os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


# Else torch's inductor starts a process for each core, beside those that run the tests.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _gpu_missing():
    """Why GPU tests cannot run here; None where they can."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported: {error}"
    if not cupy.cuda.is_available():
        return "CuPy sees no CUDA GPU"
    return None


# Examples compile kernels, so they have no deadline; and a run depends on no other run's findings.
# --hypothesis-profile=thorough looks longer.
for profile, examples in (("default", 25), ("thorough", 2000)):
    hypothesis.settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        derandomize="CUPYCACHE_TEST_SEED" in os.environ,
    )
hypothesis.settings.load_profile("default")

GPU_MISSING = _gpu_missing()
# Without one the tests that need it are not even made: there are as many as of all else.
WITH_GPU = GPU_MISSING is None or env.flag(env.REQUIRE_GPU)
GXX = shutil.which("g++")


# Of each test's parameter combinations, this many run by default on NumPy, on each of a GPU's kinds
# of arrays, and on one of the other kinds: chosen by their names, so always the same. --everything
# runs all, --rest the others. A single combination is quick, but there are more than ten thousand.
# Of tests marked whole all run, of those marked each() one for each value of the parameters that
# are named there. What is marked extra takes long, and is never among them; of what is marked
# kernels_later, no emulated kernels are.
SAMPLE = 1
IN_TURNS = dict.fromkeys(("torch-cpu", "dlpack", "emulated"), "other")
WITHOUT_ARRAYS = 1  # of the tests that are not about kinds of arrays


def pytest_addoption(parser):
    parser.addoption(
        "--everything", action="store_true", help="run every combination of test parameters"
    )
    parser.addoption(
        "--rest", action="store_true", help="run every combination that does not run by default"
    )
    parser.addoption(
        "--surface-calls", type=int, default=10_000, help="how many random calls are made"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Processes take tests from each other: a few take a hundred times as long as most. Each
    computes with one thread, as do those that it starts: all cores are busy as it is."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        if config.option.dist == "no":
            config.option.dist = "worksteal"


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is collected stays: to look for garbage there at each time would take long."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--everything"):
        _keep(config, items, rest=config.getoption("--rest"))
    if not WITH_GPU:
        _leave_out(config, items, [item for item in items if item.get_closest_marker("gpu")])


def _leave_out(config, items, left_out):
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


class Combination:
    """Of a test's parameters, before pytest makes an item of it: what `_sample` asks of items."""

    def __init__(self, definition, callspec):
        self._definition, self.callspec = definition, callspec
        self.nodeid = f"{definition.nodeid}[{callspec.id}]"

    def get_closest_marker(self, name):
        own = (mark for mark in self.callspec.marks if mark.name == name)
        return next(own, None) or self._definition.get_closest_marker(name)


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc):
    """Combinations that are not in the sample are not even made: there are five times as many. For
    --rest all are, and it is `pytest_collection_modifyitems` that leaves the sample out."""
    yield
    asked = metafunc.config.getoption
    if not (asked("--everything") or asked("--rest") or _named(metafunc.config)):
        made = [Combination(metafunc.definition, call) for call in metafunc._calls]
        sample = _sample(made)
        # One at least, to be left out later: a test without any would be made without parameters.
        kept = [one for one in made if one in sample] or made[:1]
        metafunc._calls = [one.callspec for one in kept]


def _named(config):
    """Whether tests are named: they run whole."""
    return any("::" in argument for argument in config.args)


def _keep(config, items, rest):
    """Leave the sample, or what is not in it."""
    if _named(config):
        return
    sample = _sample(items)
    _leave_out(config, items, [item for item in items if (item in sample) == rest])


def _sample(items):
    groups, kept = {}, set()
    for item in items:
        if item.get_closest_marker("extra"):
            continue
        if item.get_closest_marker("whole"):
            kept.add(item)
            continue
        call = getattr(item, "callspec", None)
        world = call and call.params.get("world")
        if world == "emulated" and item.get_closest_marker("kernels_later"):
            continue
        each = item.get_closest_marker("each")
        world = IN_TURNS.get(world, world)
        values = tuple(repr(call.params[name]) for name in each.args) if each else ()
        size = SAMPLE if world or each else WITHOUT_ARRAYS
        groups.setdefault((item.nodeid.partition("[")[0], world, values, size), []).append(item)
    for (*_, size), group in groups.items():
        kept.update(sorted(group, key=lambda item: zlib.crc32(item.nodeid.encode()))[:size])
    return kept


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def nothing_remembered():
    """The test has a history of its own, and leaves none."""
    dispatch.forget_everything()
    yield
    dispatch.forget_everything()


@pytest.fixture
def large_caches():
    """20 GB of GPU memory: the test is skipped where other processes have it."""

    import cupy

    def give_back():
        cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    give_back()
    if cupy.cuda.runtime.memGetInfo()[0] < 20e9:
        pytest.skip("less than 20 GB of GPU memory are free")
    yield
    give_back()


@pytest.fixture
def recorder(monkeypatch):
    """`recording.recorder`, with nothing left behind."""
    yield recording.recorder(monkeypatch)
    launch.processors.cache_clear()


def pytest_terminal_summary(terminalreporter):
    if not WITH_GPU:
        terminalreporter.write_line(f"GPU tests were left out: {GPU_MISSING}", yellow=True)
    if GXX is None:
        terminalreporter.write_line(
            "THE KERNELS WERE NOT RUN: g++ is missing, so the emulated tier was skipped", red=True
        )


@pytest.fixture
def seed():
    """It changes from run to run; printed, so that a failure can be repeated with
    CUPYCACHE_TEST_SEED."""
    seed = int(os.environ.get("CUPYCACHE_TEST_SEED", np.random.SeedSequence().entropy % 2**32))
    print(f"CUPYCACHE_TEST_SEED={seed}")
    return seed


@pytest.fixture
def rng(request, seed):
    """A generator of the test's own."""
    return np.random.default_rng([seed, zlib.crc32(request.node.name.encode())])


def _emulated(seed=0, processors=132, warpgroups=False):
    if GXX is None:
        pytest.skip("g++ is missing: the kernels cannot be emulated")
    from emulator import EmulatedWorld

    return EmulatedWorld(seed, processors, warpgroups)


_WORLDS = {
    "numpy": worlds.NumPyWorld,
    "torch-cpu": worlds.TorchWorld,
    "dlpack": worlds.DLPackWorld,
    "emulated": _emulated,
    "cupy": worlds.CuPyWorld,
    "torch-cuda": worlds.TorchCudaWorld,
    "dlpack-cuda": worlds.DLPackCudaWorld,
}
GPU_WORLDS = ("cupy", "torch-cuda", "dlpack-cuda")


def _made(request):
    make = _WORLDS[request.param]
    if make is _emulated:
        # Half of the tests run on a GPU with a single processor, and half on one with products of
        # warpgroups: always the same halves.
        seed = zlib.crc32(request.node.nodeid.encode())
        return make(seed, (132, 1)[seed >> 8 & 1], bool(seed >> 9 & 1))
    return make()


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.gpu) if name in GPU_WORLDS else name
        for name in _WORLDS
        if WITH_GPU or name not in GPU_WORLDS
    ]
)
def world(request):
    """Each kind of array in turn; faults left by a test fail it."""
    if "torch" in request.param or "dlpack" in request.param:
        pytest.importorskip("torch")
    made = _made(request)
    try:
        yield made
        cc.raise_faults()
    finally:
        made.close()


@pytest.fixture(scope="session")
def emulated_world():
    """Makes a new emulated world, to be closed after use: for tests in which Hypothesis runs many
    examples."""
    _emulated().close()  # skips where kernels cannot be emulated
    return _emulated
