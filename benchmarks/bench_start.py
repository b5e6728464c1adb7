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

# The same of attention, whose kernels take longest to compile; each call has its own. Latent
# attention over long tables has two, of which the second joins what the first has left.
ATTENTION = """
import json, time
import torch, cupy
import cupy_cache as cc
cupy.RawKernel('extern "C" __global__ void started() {}', "started")((1,), (1,), ())
def numbers(*values):
    return torch.tensor(values, device="cuda", dtype=torch.int32)
def random(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
def attend(tokens, **more):
    sequences, length = 8, 4096
    caches = random(8, 16, 8, 128), random(8, 16, 8, 128)
    table = torch.zeros((sequences, length // 16), device="cuda", dtype=torch.int32)
    query, lengths = random(sequences * tokens, 32, 128), numbers(*[length] * sequences)
    if tokens > 1:
        more["query_start_loc"] = numbers(*range(0, sequences * tokens + 1, tokens))
    return lambda: cc.paged_attention(query, *caches, table, lengths, **more)
def attend_latent(sequences, length, heads):
    cache, query = random(8, 16, 576), random(sequences, heads, 576)
    table = torch.zeros((sequences, length // 16), device="cuda", dtype=torch.int32)
    lengths = numbers(*[length] * sequences)
    return lambda: cc.paged_attention_mla(query, cache, table, lengths, scale=0.1)
calls = {
    "paged_attention, one token each": attend(1),
    "paged_attention, 4 tokens each": attend(4),
    "paged_attention, 1,024 tokens each": attend(1024),
    "paged_attention_mla, 16 heads": attend_latent(128, 4096, 16),
    "paged_attention_mla, 128 heads, a long table": attend_latent(1, 32768, 128),
}
found = {}
for name, call in calls.items():
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    found[name] = (time.perf_counter() - start) * 1e6
print(json.dumps(found))
"""
ATTENDING = (
    "paged_attention, one token each", "paged_attention, 4 tokens each",
    "paged_attention, 1,024 tokens each", "paged_attention_mla, 16 heads",
    "paged_attention_mla, 128 heads, a long table",
)  # fmt: skip


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


def _cold_and_warm(code, tmp_path_factory):
    """Figures with an empty kernel cache, then with the one that was filled."""
    suite.gpu_only()
    folder = str(tmp_path_factory.mktemp("kernel_cache"))
    cold = _run(code, CUPY_CACHE_DIR=folder)
    warm = _run(code, CUPY_CACHE_DIR=folder)
    return {"cold": cold, "warm": warm}


@pytest.fixture(scope="module")
def first_calls(tmp_path_factory):
    return _cold_and_warm(FIRST_CALLS, tmp_path_factory)


@pytest.fixture(scope="module")
def first_attentions(tmp_path_factory):
    return _cold_and_warm(ATTENTION, tmp_path_factory)


@pytest.mark.parametrize("which", ("first", "second", "again"))
@pytest.mark.parametrize("state", ("cold", "warm"))
def test_first_call(benchmark, first_calls, state, which):
    names = {"first": "first call of the process", "second": "first call of a specialisation",
             "again": "the same call again"}  # fmt: skip
    us = first_calls[state][which]
    case = f"{names[which]}, {state} kernel cache"
    suite.measure_plain(benchmark, "start", case, "host", lambda: us, 1)


@pytest.mark.parametrize("name", ATTENDING)
@pytest.mark.parametrize("state", ("cold", "warm"))
def test_first_attention(benchmark, first_attentions, state, name):
    """The first call of a specialisation of attention."""
    us = first_attentions[state][name]
    case = f"first call of {name}, {state} kernel cache"
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
