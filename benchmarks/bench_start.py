# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What a process pays once: importing the package, and the first call of a specialisation with an
empty and with a filled kernel cache. Each figure comes from a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import suite, timing

pytestmark = suite.marks
ROOT = Path(__file__).resolve().parent.parent

IMPORT = """
import json, sys, time
start = time.perf_counter()
import cupy_cache
us = (time.perf_counter() - start) * 1e6
print(json.dumps({"us": us, "torch": "torch" in sys.modules, "cupy": "cupy" in sys.modules}))
"""

# Everything that is not ours is started before: CUDA, torch's allocator, CuPy and its NVRTC.
FIRST_CALLS = """
import json, time
import torch, cupy
import cupy_cache as cc
cupy.RawKernel('extern "C" __global__ void started() {}', "started")((1,), (1,), ())
def arguments(heads):
    key = torch.randn((4, heads, 64), device="cuda", dtype=torch.float16)
    cache = torch.zeros((8, 16, heads, 64), device="cuda", dtype=torch.float16)
    return key, key, cache, cache.clone(), torch.arange(4, device="cuda")
def timed(*args):
    torch.cuda.synchronize()
    start = time.perf_counter()
    cc.reshape_and_cache_flash(*args)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6
first, second = arguments(3), arguments(5)
print(json.dumps({"first": timed(*first), "second": timed(*second), "again": timed(*second)}))
"""


def _run(code, **environment):
    environment = {
        **os.environ, **environment,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise RuntimeError(f"the process exited with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def test_import(benchmark):
    """``import cupy_cache`` must not bring torch or CuPy along."""
    loaded = []

    def measure():
        found = _run(IMPORT)
        loaded.append(found)
        return found["us"]

    suite.measure_plain(benchmark, "start", "import cupy_cache", "host", measure, 3)
    assert not any(found["torch"] or found["cupy"] for found in loaded)


@pytest.fixture(scope="module")
def first_calls(tmp_path_factory):
    """Figures with an empty kernel cache, then with the one that was filled."""
    suite.gpu_only()
    folder = str(tmp_path_factory.mktemp("kernel_cache"))
    cold = _run(FIRST_CALLS, CUPY_CACHE_DIR=folder)
    warm = _run(FIRST_CALLS, CUPY_CACHE_DIR=folder)
    return {"cold": cold, "warm": warm}


@pytest.mark.parametrize("which", ("first", "second", "again"))
@pytest.mark.parametrize("state", ("cold", "warm"))
def test_first_call(benchmark, first_calls, state, which):
    names = {"first": "first call of the process", "second": "first call of a specialisation",
             "again": "the same call again"}  # fmt: skip
    us = first_calls[state][which]
    case = f"{names[which]}, {state} kernel cache"
    suite.measure_plain(benchmark, "start", case, "host", lambda: us, 1)


def test_empty_call(benchmark):
    """A call with no tokens: what the checks and the look-up of a plan cost by themselves."""
    op = suite.require("reshape_and_cache_flash")
    import torch

    key = torch.empty((0, 8, 128), device=timing.device())
    caches = [torch.empty((4, 16, 8, 128), device=timing.device()) for _ in range(2)]
    slots = torch.empty(0, dtype=torch.int64, device=timing.device())
    calls = [lambda: op(key, key, *caches, slots)]
    timer = timing.HostTimer(calls)
    case = "reshape_and_cache_flash of no tokens"
    suite.measure_plain(benchmark, "start", case, "host", timer.round, timing.HOST_BATCHES)
