# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""One workload, several contenders, one record.

A `Workload` is one case of one operation: buffer sets, what must move, and for each contender
(ours, torch indexing, a Triton kernel, other libraries) how to make a call on a set.
`measure_device` and `measure_host` check a contender's output against ours, measure it, and fill
the workload's record, which every benchmark of that workload carries as its ``extra_info``.
"""

import contextlib
import statistics
from typing import NamedTuple

import pytest

import cupy_cache as cc

from . import timing

OURS = "cupy_cache"
POISON = 0x5A
SLOTS = 65536  # of a paged cache, at least


class Contender(NamedTuple):
    """How a contender is called.

    make : buffer set number -> a call without arguments; skips where something is missing.
    capture : whether a CUDA graph can hold it. batch : calls of one host batch; None chooses.
    kernels : like ``make``, what to measure as device time where that is not the whole call.
    launches : whether the GPU has anything to do. host : whether its host time tells anything.
    """

    make: object
    capture: bool = True
    batch: int | None = None
    kernels: object = None
    launches: bool = True
    host: bool = True


class Workload:
    """One case of one operation, on the current machine.

    Parameters
    ----------
    op, case : str
    contenders : dict of name -> `Contender` or its ``make``
        `OURS` among them.
    outputs : list of torch tensors
        What the calls on set 0 write, as whole contiguous storages.
    moved : int
        Bytes that must be read plus bytes that must be written.
    footprint : int, optional
        Bytes touched by one call; ``moved`` if not given.
    sets : int
    tokens : int, optional
    dtype, layout : str
    ceiling : callable, optional
        Microseconds of the copy that ``moved`` is compared with; the device-to-device copy if not
        given.
    ops : int
        Calls in a graph, at least.
    extra : dict, optional
        More fields for the record.
    """

    def __init__(
        self, op, case, contenders, outputs, moved, sets, *, tokens=None, dtype="", layout="",
        footprint=None, ceiling=None, ops=timing.OPS_IN_GRAPH, extra=None,
    ):  # fmt: skip
        self.contenders = {
            name: c if isinstance(c, Contender) else Contender(c) for name, c in contenders.items()
        }
        self.outputs, self.sets, self.ops = outputs, sets, ops
        self._expected = None
        footprint = moved if footprint is None else footprint
        self.cold = timing.on_gpu() and not timing.exceeds_l2(footprint, sets)
        self._ceiling = ceiling or (timing.copy_us if timing.on_gpu() else timing.memcpy_us)
        self.record = record_of(
            op, case, dtype=dtype, layout=layout, tokens=tokens, bytes=moved, **(extra or {})
        )
        self.record["rotation"] = {
            "sets": sets,
            "bytes": footprint * sets,
            "exceeds_l2": not self.cold if timing.on_gpu() else None,
        }

    def calls(self, who, kernels=False):
        """``who``'s calls, one for each buffer set; only their device work if ``kernels``."""
        contender = self.contenders[who]
        make = (kernels and contender.kernels) or contender.make
        return [make(index) for index in range(self.sets)]

    def check(self, who, calls):
        """Compare what ``calls`` writes with what ours writes, whole storages byte by byte."""
        if who == OURS or not self.outputs:
            return
        if self._expected is None:
            self._expected = self._run_poisoned(self.contenders[OURS].make(0))
        for index, (got, expected) in enumerate(zip(self._run_poisoned(calls[0]), self._expected)):
            if not timing.torch_module().equal(got, expected):
                wrong = int((got != expected).sum())
                raise AssertionError(
                    f"{who} differs from {OURS} in {wrong} of {got.numel()} bytes of output {index}"
                )

    def _run_poisoned(self, call):
        raw = [_as_bytes(output) for output in self.outputs]
        for output in raw:
            output.fill_(POISON)
        _wait()  # outputs may be pinned host memory, which the two sides write without order
        call()
        _wait()
        return [output.clone() for output in raw]

    def note(self, who, **fields):
        """Put figures into the record: ours at its top, a peer's under its name."""
        place = self.record if who == OURS else self.record["peers"].setdefault(who, {})
        place.update(fields)

    @contextlib.contextmanager
    def attempt(self, who):
        """Record why a contender was skipped, or how it failed; the test still skips or fails."""
        if who not in self.contenders:
            pytest.skip("a contender that has no part in this case")
        try:
            yield
        except pytest.skip.Exception as skip:
            self.record.setdefault("skipped", {})[who] = str(skip)
            raise
        except Exception as error:
            self.record.setdefault("failed", {})[who] = f"{type(error).__name__}: {error}"[:300]
            raise

    def ceiling(self):
        """Fill in the copy ceiling."""
        if self.record["copy_us"] is None and self.record["bytes"]:
            self.record["copy_us"] = self._ceiling(self.record["bytes"])

    def close(self):
        """Give the memory back."""
        self.contenders, self.outputs, self._expected = {}, [], None
        _wait()
        if timing.on_gpu():
            timing.torch_module().cuda.empty_cache()


def _wait():
    if timing.on_gpu():
        timing.torch_module().cuda.synchronize()


def _as_bytes(tensor):
    torch = timing.torch_module()
    return tensor.view(-1).view(torch.uint8)


# --- what bench files use -------------------------------------------------------------------------

# pytest-benchmark reads `timing.clock`, which moves by what was measured.
marks = pytest.mark.benchmark(timer=timing.clock)


def ids(cases):
    """Test ids that sort as the cases are listed."""
    return [f"{number:02} {case}" for number, case in enumerate(cases)]


def contenders(*peers):
    """Names to parametrise with: ours and ``peers`` on a GPU, what runs anywhere on the CPU."""
    if timing.on_gpu():
        return [OURS, *peers]
    return [OURS, *(p for p in peers if p == "torch")]


def require(name):
    """The public function ``name``; skips where torch or the function is missing."""
    pytest.importorskip("torch", reason="the benchmarks hold their arrays in torch")
    if not hasattr(cc, name):
        pytest.skip(f"cupy_cache has no {name} yet")
    return getattr(cc, name)


def gpu_only():
    """Skip where there is no GPU."""
    if not timing.on_gpu():
        pytest.skip("no GPU: device time needs CUDA, torch and CuPy")


def opened(workload):
    """Yield a workload to the tests of one fixture parameter, then close it."""
    try:
        yield workload
    finally:
        workload.close()


def benchmarks(cases, make, who):
    """What pytest collects from a bench file: ``load, test_device, test_host``.

    Parameters
    ----------
    cases : list of objects whose ``str`` names them
    make : callable
        Case -> `Workload`, when its first benchmark begins.
    who : list of str
        Contenders, each with a test of its own.
    """

    @pytest.fixture(scope="module", params=cases, ids=ids(cases))
    def load(request):
        yield from opened(make(request.param))

    @pytest.mark.parametrize("who", who)
    def test_device(benchmark, load, who):
        measure_device(benchmark, load, who)

    @pytest.mark.parametrize("who", who)
    def test_host(benchmark, load, who):
        measure_host(benchmark, load, who)

    return load, test_device, test_host


def caches(num_blocks, block_size, heads, size, dtype, layout="NHD"):
    """Two storages, of keys and of values, and their views [block, offset, head, element]."""
    torch = timing.torch_module()
    inner = (heads, block_size) if layout == "HND" else (block_size, heads)
    storages = [
        torch.empty((num_blocks, *inner, size), dtype=dtype, device=timing.device())
        for _ in range(2)
    ]
    return storages, [s.permute(0, 2, 1, 3) for s in storages] if layout == "HND" else storages


def slots_for(sets, tokens, block_size, order="random", num_blocks=None):
    """How many blocks a cache has, and slots for each set, no slot twice: scattered over the whole
    cache, or "consecutive"."""
    torch = timing.torch_module()
    num_blocks = num_blocks or _blocks(sets * tokens, block_size)
    ordered = torch.randperm if order == "random" else torch.arange
    slots = ordered(num_blocks * block_size, device=timing.device())[: sets * tokens]
    return num_blocks, slots.view(sets, tokens)


def pages_for(sets, rows, sequences, block_size, lengths="equal"):
    """How many blocks a cache has, a block table for each set, no block twice, and the bounds of
    the sequences, all equally long, or of "random" lengths."""
    torch, device = timing.torch_module(), timing.device()
    if lengths == "equal":
        bounds = torch.arange(sequences + 1) * (rows // sequences)
    else:
        inner = torch.randint(0, rows + 1, (sequences - 1,)).sort().values
        bounds = torch.cat((torch.tensor([0]), inner, torch.tensor([rows])))
    pages = -(-bounds.diff() // block_size)
    used = int(pages.sum())
    num_blocks = _blocks(sets * used * block_size, block_size)
    # Each sequence's pages, which are all different, at the start of its row.
    tables = torch.zeros((sets, sequences, int(pages.max())), dtype=torch.int32)
    tables[:, torch.arange(tables.shape[2]) < pages[:, None]] = (
        torch.randperm(num_blocks)[: sets * used].to(torch.int32).view(sets, used)
    )
    return num_blocks, tables.to(device), bounds.to(device, torch.int32)


def _blocks(slots, block_size):
    least = SLOTS if timing.on_gpu() else SLOTS // 16
    return -(-max(slots, least) // block_size)


def measure_device(benchmark, load, who):
    """Device time per call; each round of the benchmark replays the graph once."""
    gpu_only()
    with load.attempt(who):
        if not load.contenders[who].launches:
            load.note(who, device_us=0.0, how="launches nothing")
            pytest.skip("launches nothing, so there is no device time")
        calls = load.calls(who, kernels=True)
        load.check(who, calls)
        timer = timing.DeviceTimer(calls, load.contenders[who].capture, load.ops)
        samples = _run(benchmark, load.record, "device", timer.round, timer.rounds())
        load.note(who, device_us=statistics.median(samples), how=timer.how)
        if load.cold and "graph" in timer.how:
            load.note(who, device_cold_us=timer.cold())
        if who == OURS:
            load.ceiling()
            if load.record["copy_us"]:
                load.note(OURS, of_copy=load.record["copy_us"] / load.record["device_us"])


def measure_host(benchmark, load, who):
    """Host time per call, without a GPU all there is; each round is one batch of calls."""
    with load.attempt(who):
        if not load.contenders[who].host:
            pytest.skip("only its device time is of interest")
        calls = load.calls(who)
        batch = load.contenders[who].batch
        if timing.on_gpu():
            timer = timing.enqueue_timer(calls, batch or _host_batch(load, who))
            samples = _run(benchmark, load.record, "host", timer.round, timing.HOST_BATCHES)
        else:
            load.check(who, calls)
            estimate = timing.HostTimer(calls, 1).best(2)
            batch = max(1, min(timing.HOST_BATCH, int(20_000 / max(estimate, 1))))
            timer = timing.HostTimer(calls, batch)
            # More batches where they are quick: other processes disturb these figures.
            rounds = max(timing.HOST_BATCHES, min(20, int(300_000 / max(estimate * batch, 1))))
            samples = _run(benchmark, load.record, "cpu", timer.round, rounds)
        load.note(who, host_us=min(samples))
        if who == OURS and not timing.on_gpu():
            load.ceiling()
        _note_ratios(load)


def _host_batch(load, who):
    """Fewer calls where each keeps the GPU busy for long, which the wait after a batch sits out."""
    place = load.record if who == OURS else load.record["peers"].get(who, {})
    busy = place.get("device_us") or 1
    return max(20, min(timing.HOST_BATCH, int(100_000 / busy)))


def measure_wall(benchmark, load, who):
    """Time per call until the GPU is done, which for calls that wait is what they cost."""
    gpu_only()
    with load.attempt(who):
        calls = load.calls(who)
        timing.wall_us(calls, 5)
        samples = _run(benchmark, load.record, "wall", lambda: timing.wall_us(calls), 3)
        load.note(who, wall_us=min(samples))


def measure_plain(benchmark, op, case, kind, measure, rounds, moved=None):
    """A figure without contenders: ``measure`` gives microseconds; ``kind`` is device or host."""
    record = record_of(op, case, bytes=moved)
    samples = _run(benchmark, record, kind, measure, rounds)
    record[f"{kind}_us"] = statistics.median(samples) if kind == "device" else min(samples)


def record_of(op, case, **fields):
    """A record with every field that all records have."""
    empty = dict.fromkeys(("dtype", "layout", "tokens", "bytes", "device_us", "host_us", "copy_us"))
    return {"op": op, "case": case, **empty, "peers": {}, **timing.machine(), **fields}


def measure_host_in_turns(benchmark, load, names, rounds=40):
    """Host time of several contenders, a batch of each in turn, so that all of them meet the same
    spells of a host that others use too; the fastest batch of each."""
    gpu_only()
    timers = {name: timing.enqueue_timer(load.calls(name)) for name in names}
    fastest = dict.fromkeys(names, float("inf"))

    def measure():
        for name, timer in timers.items():
            fastest[name] = min(fastest[name], timer.round())
        return fastest[OURS]

    _run(benchmark, load.record, "host, in turns", measure, rounds)
    for name, us in fastest.items():
        load.note(name, host_us=us)


def _run(benchmark, record, kind, measure, rounds):
    """Let pytest-benchmark run ``rounds`` rounds of ``measure``, and give its samples."""
    samples = []

    def one_round():
        us = measure()
        samples.append(us)
        timing.advance(us)

    benchmark.group = f"{record['op']} {kind}"
    benchmark.extra_info = record
    benchmark.pedantic(one_round, rounds=rounds)
    return samples


def _note_ratios(load):
    """On the CPU: our time over each peer's, and over a plain copy of the same bytes."""
    record = load.record
    if timing.on_gpu() or record["host_us"] is None:
        return
    others = {name: peer.get("host_us") for name, peer in record["peers"].items()}
    others["memcpy"] = record["copy_us"]
    record["ratios"] = {name: record["host_us"] / us for name, us in others.items() if us}
