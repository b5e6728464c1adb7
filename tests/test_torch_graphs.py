# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""`StepGraphs`: a graph for each of some numbers of sequences."""

import contextlib
import weakref

import pytest

import cupy_cache as cc
from cupy_cache.runtime import env

torch = pytest.importorskip("torch")
torch_graphs = pytest.importorskip("cupy_cache.integrations.torch_graphs")


def ignored(step):
    return step


@pytest.mark.whole
@pytest.mark.parametrize(
    "options, sizes",
    [
        ((1,), [1]), ((6,), [1, 2, 4, 6]), ((40,), [1, 2, 4, 8, 16, 32, 40]),
        ((64,), [1, 2, 4, 8, 16, 32, 48, 64]), ((8, [3, 3, 12]), [3, 8]), ((8, [8, 2]), [2, 8]),
    ],
)  # fmt: skip
def test_sizes(options, sizes):
    graphs = torch_graphs.StepGraphs(ignored, *options)
    assert graphs.sizes == sizes and not graphs.graphs
    padded = [graphs.padded(count) for count in range(1, sizes[-1] + 1)]
    assert padded == [min(s for s in sizes if s >= n) for n in range(1, sizes[-1] + 1)]
    with pytest.raises(cc.ArgumentError, match="StepGraphs.padded: Invalid value of num_seq"):
        graphs.padded(sizes[-1] + 1)


def test_refusals():
    for options in ((0,), (4, [0]), (4, [1.5])):
        with pytest.raises(cc.ArgumentError, match="^StepGraphs: Invalid value of"):
            torch_graphs.StepGraphs(ignored, *options)
    tables = cc.BlockTables(
        8, 4, max_sequences=2, max_tokens=4, max_length=8, framework="torch", device="cpu"
    )
    tables.add("a", range(3))
    graphs = torch_graphs.StepGraphs(ignored, 2)
    with pytest.raises(cc.ArgumentError, match="StepGraphs: Invalid length of step.positions"):
        graphs(tables.step(["a"], [3]))
    tables.append("a", 5)
    step = tables.step(["a"], [1], num_sequences=2, num_tokens=2)
    seen = graphs(step)  # on the CPU
    assert not graphs.graphs
    for name in ("slot_mapping", "seq_lens", "block_table", "token_ids", "query_start_loc"):
        assert getattr(seen, name) is getattr(step, name)
    for size in (2, [1], True):
        with pytest.raises(cc.ArgumentError, match="StepGraphs.replay: Invalid value of size: "):
            graphs.replay(size)
    with pytest.raises(cc.DTypeError, match="StepGraphs: Invalid type of sizes: .* got 5"):
        torch_graphs.StepGraphs(ignored, 4, 5)
    for count in (1.5, True, -1, "2", None):
        with pytest.raises(cc.ArgumentError, match="StepGraphs.padded: Invalid value of num_seq"):
            graphs.padded(count)


@pytest.mark.parametrize("counts", [[2, 0], [0, 2], [1, 0], [0, 0], [1, 1, 0], [2, 1, 0]])
def test_each_sequence_has_one_new_token(counts):
    """Where one has none, or two, the arrays may fit all the same; rows would not."""
    tables = cc.BlockTables(
        8, 4, max_sequences=4, max_tokens=4, max_length=8, framework="torch", device="cpu"
    )
    for name in "abc":
        tables.add(name, range(3))
    graphs, names = torch_graphs.StepGraphs(ignored, 4), "abc"[: len(counts)]
    with pytest.raises(cc.ArgumentError, match="StepGraphs: Invalid value of step: .*one new tok"):
        graphs(tables.step(list(names), counts, num_sequences=4, num_tokens=4))


def test_steps_of_other_frameworks():
    tables = cc.BlockTables(8, 4, max_sequences=2, max_tokens=4, max_length=8, framework="numpy")
    tables.add("a", range(3))
    for step in (tables.step(["a"], [1]), None, "step", [1]):
        with pytest.raises(cc.DTypeError, match="StepGraphs: Invalid type of step: "):
            torch_graphs.StepGraphs(ignored, 2)(step)


@pytest.mark.parametrize("name", ["copies", "num_sequences", "num_tokens", "max_seq_len"])
def test_what_a_graph_would_keep_is_not_shown(name):
    """Every replay would copy the same blocks, and count the same tokens."""
    tables = cc.BlockTables(
        8, 4, max_sequences=2, max_tokens=4, max_length=8, framework="torch", device="cpu"
    )
    tables.add("a", range(3))
    graphs = torch_graphs.StepGraphs(lambda step: getattr(step, name), 2)
    with pytest.raises(cc.ArgumentError, match=rf"StepGraphs: Invalid value of step.{name}: "):
        graphs(tables.step(["a"], [1]))


class OnGPU(torch.Tensor):
    is_cuda, device = True, torch.device("cuda:3")


def step_of(size):
    arrays = (torch.zeros(size, 1).as_subclass(OnGPU) for _ in range(6))
    return cc.Step(tuple(arrays), [], (size, size, 4, 1))


def test_what_is_captured(monkeypatch):
    """Each number of sequences once, after a call that loads its kernels, on a stream of the step's
    GPU, whichever is current; all share memory."""
    log, pools, current = [], iter("PQ"), [0]

    def function(step):
        log.append(("call", len(step.seq_lens)))
        return "results", len(step.seq_lens)

    @contextlib.contextmanager
    def device(its):
        current.append(its.index)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(made, pool, stream, capture_error_mode):
        log.append(("begin", made.at, pool, stream, current[-1], capture_error_mode))
        yield
        log.append("end")

    class Graph:
        def __init__(self):
            self.at = len(log)

        def replay(self):
            log.append(("replay", self.at))

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: f"of GPU {current[-1]}")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    steps = {size: step_of(size) for size in (1, 2)}
    graphs = torch_graphs.StepGraphs(function, 2)
    for size in (2, 1, 2):
        assert graphs(steps[size]) == ("results", size)
    two, one = ("call", 2), ("call", 1)
    assert log == [
        two, ("begin", 1, "P", "of GPU 3", 3, "thread_local"), two, "end", ("replay", 1),
        one, ("begin", 6, "P", "of GPU 3", 3, "thread_local"), one, "end", ("replay", 6),
        ("replay", 1),
    ]  # fmt: skip
    assert graphs.replay(1) == ("results", 1) and log[-1] == ("replay", 6)
    assert list(graphs.graphs) == [2, 1]
    others = step_of(1)
    with pytest.raises(cc.ArgumentError, match="^StepGraphs: Invalid value of step: "):
        graphs(others)
    assert log[-1] == ("replay", 6)
    memory = weakref.ref(steps[2].seq_lens)
    steps.clear()
    assert memory() is not None  # no other tables get it while there is a graph


@pytest.mark.gpu
@pytest.mark.skipif(env.torch_is_uncached(), reason="torch captures nothing without its cache")
@pytest.mark.parametrize("gpu", [0, pytest.param(1, marks=pytest.mark.multi_gpu)])
def test_replays(gpu):
    """Each step's own numbers, in graphs that were captured once, also of a GPU that is not
    current."""
    if torch.cuda.device_count() <= gpu:
        pytest.skip(f"torch sees no GPU {gpu}")
    tables = cc.BlockTables(
        64, 4, max_sequences=4, max_tokens=64, max_length=40, framework="torch",
        device=f"cuda:{gpu}",
    )  # fmt: skip
    calls = []

    def function(step):
        calls.append(len(step.seq_lens))
        return step.seq_lens * 2, step.token_ids + step.positions

    torch.cuda.set_device(0)
    graphs = torch_graphs.StepGraphs(function, 4)
    for name, length in zip("abc", (5, 9, 2)):
        tables.add(name, range(length))
        tables.step([name], [length])
    for token in range(8):
        names = list("abc"[: 1 + token % 3])
        for name in names:
            tables.append(name, token)
        size = graphs.padded(len(names))
        step = tables.step(names, [1] * len(names), num_sequences=size, num_tokens=size)
        lengths, places = graphs(step)
        expected = [tables.length(name) for name in names]
        assert lengths.tolist() == [2 * n for n in expected] + [0] * (size - len(names))
        assert places.tolist()[: len(names)] == [token + n - 1 for n in expected]
    assert sorted(calls) == [1, 1, 2, 2, 4, 4] and sorted(graphs.graphs) == [1, 2, 4]
    assert torch.cuda.current_device() == 0
