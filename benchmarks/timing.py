# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Measuring tools: device time, host time, and the ceilings they are held against.

*Device time*: N calls are captured into one CUDA graph; a round replays it once, right after an
unmeasured replay that keeps the GPU busy while the host enqueues, between two CUDA events; the
figure is the median of the rounds, per call. Before each round the L2 is filled with other lines,
as a model's other kernels leave it: lines that leave the L2 first would else have it to themselves.
Calls that cannot be captured are enqueued one by one between the events instead, which includes
their gaps; ``how`` says which.

*Host time*: the fastest of five batches of enqueue-only calls, with a wait between the batches and
none inside.

Inputs rotate among several buffer sets, as many as make their total exceed three times the L2, at
most `MAX_SETS`. Where even those fit the L2, a second figure is measured with the L2 overwritten
before each replay.
"""

import contextlib
import datetime
import functools
import gc
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

OPS_IN_GRAPH = 20
MAX_SETS = 200
L2_FACTOR = 3
HOST_BATCH = 200
HOST_BATCHES = 5
WARM_UP = 0.02  # seconds

_now = 0.0


def clock():
    """A timer for pytest-benchmark that moves only by what has been measured (`advance`): its
    tables then show seconds per call as the GPU's events, or a batch of calls, gave them."""
    return _now


def advance(us):
    """Move `clock` on by ``us`` microseconds."""
    global _now
    _now += us * 1e-6


# --- the machine ----------------------------------------------------------------------------------


@functools.cache
def torch_module():
    """torch, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch


@functools.cache
def on_gpu():
    """Whether GPU cases can run: torch sees a CUDA device and CuPy can be imported."""
    torch = torch_module()
    if torch is None or not torch.cuda.is_available():
        return False
    try:
        import cupy
    except ImportError:
        return False
    return cupy.cuda.is_available()


def device():
    """The name of the device that the cases run on, for torch."""
    return "cuda" if on_gpu() else "cpu"


@functools.cache
def l2_bytes():
    """Size of the GPU's L2."""
    import cupy

    return int(cupy.cuda.Device().attributes["L2CacheSize"])


@functools.cache
def machine():
    """What every record says of where and when it was measured."""
    torch = torch_module()
    facts = {
        "gpu": None,
        "cuda": None,
        "driver": None,
        "cupy": None,
        "l2_bytes": None,
        "torch": None if torch is None else str(torch.__version__),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
    }
    if on_gpu():
        import cupy

        runtime = cupy.cuda.runtime.runtimeGetVersion()
        driver = cupy.cuda.runtime.driverGetVersion()
        facts |= {
            "gpu": torch.cuda.get_device_name(0),
            "cuda": f"{runtime // 1000}.{runtime % 1000 // 10}",
            "driver": f"{driver // 1000}.{driver % 1000 // 10}",
            "cupy": cupy.__version__,
            "l2_bytes": l2_bytes(),
        }
    return facts


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit():
    given = os.environ.get("BENCHMARK_COMMIT")
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def sets_for(footprint):
    """How many buffer sets of ``footprint`` bytes rotate."""
    if not on_gpu():
        return 2
    wanted = -(-L2_FACTOR * l2_bytes() // max(footprint, 1))
    return min(MAX_SETS, max(2, wanted) if footprint < 1 << 30 else 1)


def exceeds_l2(footprint, sets):
    """Whether ``sets`` sets of ``footprint`` bytes cannot stay in the L2."""
    return footprint * sets >= L2_FACTOR * l2_bytes()


# --- device time ----------------------------------------------------------------------------------


class DeviceTimer:
    """Calls captured as one CUDA graph, or enqueued one by one.

    Parameters
    ----------
    calls : list of callables
        One for each buffer set; they are used in turn.
    capture : bool
        False for calls that synchronise, which a capture would refuse.
    ops : int
        At least so many calls in a graph.
    """

    def __init__(self, calls, capture=True, ops=OPS_IN_GRAPH):
        self.torch = torch_module()
        self.calls = calls
        self.ops = len(calls) * -(-ops // len(calls))
        for call in calls:  # compile, allocate, fail: before anything is captured or timed
            call()
        self.torch.cuda.synchronize()
        self._graph, self.how = None, "events around single calls"
        if capture:
            try:
                self._graph = self._captured()
                self.how = f"graph of {self.ops} calls"
            except Exception as error:
                self.torch.cuda.synchronize()
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.how += f" (capture failed: {first:.120})"

    def _captured(self):
        graph = self.torch.cuda.CUDAGraph()
        gc.disable()  # memory that is freed meanwhile could end the capture
        try:
            with self.torch.cuda.graph(graph):
                self._enqueue_all()
        finally:
            gc.enable()
        graph.replay()
        self.torch.cuda.synchronize()
        return graph

    def _enqueue_all(self):
        for turn in range(self.ops):
            self.calls[turn % len(self.calls)]()

    def _run(self):
        if self._graph is None:
            self._enqueue_all()
        else:
            self._graph.replay()

    def round(self, before=None):
        """Microseconds per call of one replay; ``before`` runs first in place of a replay."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before is None:
            _l2_sized().add_(1)
        (before or self._run)()
        start.record()
        self._run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1000 / self.ops

    def rounds(self):
        """How many rounds are worth their time: 5 to 20, about a tenth of a second. Runs some, by
        which an idle GPU's clock has risen."""
        until = time.perf_counter() + WARM_UP
        estimate = self.round()
        while time.perf_counter() < until:
            estimate = self.round()
        return max(5, min(20, int(50_000 / max(estimate * self.ops, 1))))

    def median(self, rounds=None):
        """Microseconds per call, the median of ``rounds``."""
        count = rounds or self.rounds()
        return statistics.median(self.round() for _ in range(count))

    def cold(self, rounds=7):
        """Microseconds per call when nothing of the inputs is in the L2."""
        flush = _l2_sized()
        self.round(flush.zero_)
        return statistics.median(self.round(flush.zero_) for _ in range(rounds))


@functools.cache
def _l2_sized():
    return torch_module().empty(L2_FACTOR * l2_bytes(), dtype=torch_module().uint8, device="cuda")


# --- host time ------------------------------------------------------------------------------------


class HostTimer:
    """Batches of calls timed by the host's clock; on a GPU the calls only enqueue.

    A batch must fit the launch queue (about a thousand launches), or the host waits for the GPU
    and its speed is measured instead.
    """

    def __init__(self, calls, batch=HOST_BATCH, synchronise=None):
        self._sequence = [calls[i % len(calls)] for i in range(batch)]
        self._synchronise = synchronise or (lambda: None)
        for call in calls:
            call()
        self._synchronise()

    def round(self):
        """Microseconds per call of one batch."""
        sequence = self._sequence
        start = time.perf_counter()
        for call in sequence:
            call()
        end = time.perf_counter()
        self._synchronise()
        return (end - start) * 1e6 / len(sequence)

    def best(self, batches=HOST_BATCHES):
        """Microseconds per call, the fastest of ``batches``."""
        return min(self.round() for _ in range(batches))


def enqueue_timer(calls, batch=HOST_BATCH):
    """A `HostTimer` of calls that enqueue on the GPU."""
    return HostTimer(calls, batch, torch_module().cuda.synchronize)


def wall_us(calls, count=50):
    """Microseconds per call from the first of ``count`` calls to the end of the GPU's work: what
    calls that wait really cost. The best of three."""
    torch = torch_module()
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for turn in range(count):
            calls[turn % len(calls)]()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) * 1e6 / count)
    return best


# --- ceilings -------------------------------------------------------------------------------------


@functools.cache
def copy_us(moved):
    """Microseconds of a device-to-device copy that reads and writes ``moved`` bytes in all,
    measured as the operations are: the ceiling for an operation that must move as many. The report
    levels these times, which for some sizes are longer than for larger ones."""
    torch = torch_module()
    half = -(-moved // 512) * 256  # whole, aligned rows: others are copied more slowly
    sets = sets_for(moved)
    source = torch.randint(0, 256, (sets, half), dtype=torch.uint8, device="cuda")
    destination = torch.empty_like(source)
    # Whole contiguous arrays of equal type: torch issues one cudaMemcpyAsync.
    timer = DeviceTimer([functools.partial(destination[i].copy_, source[i]) for i in range(sets)])
    try:
        return timer.median()
    finally:
        del timer, source, destination
        torch.cuda.empty_cache()


@functools.cache
def pinned_copy_us(moved, to_host):
    """The same for a copy between pinned host memory and the GPU: the bus's ceiling."""
    torch = torch_module()
    half = max(moved // 2, 1)
    gpu = torch.randint(0, 256, (half,), dtype=torch.uint8, device="cuda")
    host = torch.empty(half, dtype=torch.uint8, pin_memory=True)
    source, destination = (gpu, host) if to_host else (host, gpu)
    call = functools.partial(destination.copy_, source, non_blocking=True)
    return DeviceTimer([call], ops=4).median()


def memcpy_us(moved):
    """Microseconds of a plain copy in host memory that reads and writes ``moved`` bytes in all."""
    import numpy as np

    half = max(moved // 2, 1)
    source = np.random.default_rng().integers(0, 256, half, np.uint8)
    destination = np.zeros_like(source)
    batch = max(3, min(HOST_BATCH, (1 << 28) // half))
    return HostTimer([functools.partial(np.copyto, destination, source)], batch).best()
