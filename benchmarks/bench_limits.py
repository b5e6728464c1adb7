# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What nothing can beat here: an empty kernel, plain copies, a bare launch. GPU only."""

import functools

import pytest

from . import suite, timing

pytestmark = suite.marks
MIB = 1 << 20


def _empty_kernel():
    import cupy

    kernel = cupy.RawKernel('extern "C" __global__ void empty() {}', "empty")
    kernel.compile()
    return kernel


class _TorchStream:
    """torch's current stream for CuPy, which reads nothing but ``ptr``."""

    @property
    def ptr(self):
        import torch

        return torch._C._cuda_getCurrentRawStream(0)


def _documented_launch():
    return functools.partial(_empty_kernel(), (1, 1, 1), (32, 1, 1), (), stream=_TorchStream())


def _bare_launch():
    """The entry that the library uses, with nothing before it."""
    from cupy_backends.cuda.api import driver

    handle, stream = _empty_kernel().kernel.ptr, _TorchStream()
    return lambda: driver.launchKernel(handle, 1, 1, 1, 32, 1, 1, 0, stream.ptr, 0, 0)


COPIES = [(f"device copy, {n // MIB} MiB moved", n) for n in (16 * MIB, 256 * MIB, 4096 * MIB)]
BUS = [(f"pinned copy, 32 MiB, {way}", way == "device to host")
       for way in ("device to host", "host to device")]  # fmt: skip
# (case, kind of figure, its timer)
LAUNCHES = [
    ("empty kernel in a graph", "device", lambda: timing.DeviceTimer([_bare_launch()], ops=200)),
    ("empty kernel, RawKernel call", "host", lambda: timing.enqueue_timer([_documented_launch()])),
    ("empty kernel, bare launch", "host", lambda: timing.enqueue_timer([_bare_launch()])),
]


@pytest.mark.parametrize("case, kind, make", LAUNCHES, ids=[case for case, *_ in LAUNCHES])
def test_launch(benchmark, case, kind, make):
    suite.gpu_only()
    suite.measure_plain(benchmark, "limits", case, kind, make().round, 10)


@pytest.mark.parametrize("case, moved", COPIES, ids=[case for case, _ in COPIES])
def test_copy(benchmark, case, moved):
    suite.gpu_only()
    us = timing.copy_us(moved)
    suite.measure_plain(benchmark, "limits", case, "device", lambda: us, 1, moved=moved)


@pytest.mark.parametrize("case, to_host", BUS, ids=[case for case, _ in BUS])
def test_bus(benchmark, case, to_host):
    suite.gpu_only()
    moved = 64 * MIB
    us = timing.pinned_copy_us(moved, to_host)
    suite.measure_plain(benchmark, "limits", case, "device", lambda: us, 1, moved=moved)
