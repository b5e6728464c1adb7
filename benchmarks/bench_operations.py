# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The ordinary call of every operation, as the tests make it (tests/cases.py), so that none is
without a figure: mostly what a call costs, for little is moved. Many bytes, and peers, are the
business of an operation's own file."""

import sys
from pathlib import Path

import numpy as np
import pytest

from . import suite, timing

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import cases
import worlds

pytestmark = suite.marks


def make(name):
    pytest.importorskip("torch", reason="the benchmarks hold their arrays in torch")
    world = worlds.TorchCudaWorld if timing.on_gpu() else worlds.TorchWorld
    buffers = {id(spec.buffer): spec.buffer for spec in case(name, 0).specs}
    footprint = sum(buffer.bytes.size for buffer in buffers.values())
    return suite.Workload(
        "ordinary calls", name, {suite.OURS: lambda i: case(name, i).bind(world())}, [], None,
        timing.sets_for(footprint), footprint=footprint,
    )  # fmt: skip


def case(name, number):
    return cases.CASES[name](np.random.default_rng(number))


load, test_device, test_host = suite.benchmarks(list(cases.CASES), make, [suite.OURS])
