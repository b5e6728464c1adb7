# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The plain functions in code that torch.compile compiles: they do what they do outside."""

import subprocess
import sys
import types

import cases
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.attention import alibi_slopes
from cupy_cache.integrations import vllm

torch = pytest.importorskip("torch")
torch_graphs = pytest.importorskip("cupy_cache.integrations.torch_graphs")

# Where there is a GPU, torch 2.11's compiler imports parts of torch that warn of other parts.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")

# Before it compiles anything, inductor has g++ read torch's headers: twenty seconds.
INDUCTOR = pytest.param("inductor", marks=pytest.mark.extra)
BACKENDS = ("eager", "aot_eager", INDUCTOR)

only_torch = pytest.mark.parametrize(
    "world",
    ["torch-cpu", pytest.param("torch-cuda", marks=pytest.mark.gpu)],
    indirect=True,
)


@pytest.mark.each("backend")
@only_torch
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases.CASES)
def test_every_function(world, rng, name, backend, dynamic):
    """Between two graphs, whose sizes are fixed or are not."""
    before = torch.arange(4)

    def step(run, number):
        more = number + 1
        run()
        return more * 2

    case = cases.CASES[name](rng)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, dynamic=dynamic)
    assert compiled(case.bind(world), before).tolist() == [2, 4, 6, 8]
    case.check(world)


def test_every_function_has_a_case():
    named = {name.partition("-")[0] for name in cases.CASES}
    functions = {n for n in cc.__all__ if isinstance(getattr(cc, n), types.FunctionType)}
    others = {"packed_size", "raise_faults", "warmup", "block_table_to_csr", "csr_to_block_table"}
    assert functions - named == others | {"paged_attention_v1", "paged_attention_v2"}


# --- one step of an engine, with what the graphs compute ------------------------------------------


def step(key, value, key_cache, value_cache, table, positions, starts, slopes):
    """Find slots, write tokens there, copy a block, read the keys back: each is made of what a
    graph computed, and a graph uses what it made."""
    slots = cc.slot_mapping(table + 1, positions, starts, key_cache.shape[1])
    cc.reshape_and_cache_flash(key * 2, value + 1, key_cache, value_cache, slots + 0)
    cc.copy_blocks([key_cache], [value_cache], [(1, 4), (2, 0)])
    rows = torch.zeros_like(key)
    cc.gather_cache(key_cache, rows, table + 1, starts)
    bias = cc.alibi_bias(place(slopes, key) * 2, positions, positions)
    return slots * 2, rows + 1, bias - 1


def place(slopes, like):
    return cc.place_slopes(slopes, framework="torch", device=str(like.device))


def numbers_of(rng, tokens):
    """NumPy arrays for `step`: two requests, the second one with two tokens."""
    key, value = rng.integers(-9, 9, (2, tokens, 2, 8)).astype(np.float32)
    pages = rng.integers(-9, 9, (5, 4, 2, 16)).astype(np.float32)
    table = np.array([[0, 2], [1, 0]], np.int32)
    positions = np.array([*range(tokens - 2), 0, 1])
    return key, value, pages, table, positions, np.array([0, tokens - 2, tokens], np.int32)


def expected_step(slopes, key, value, pages, table, positions, starts):
    pages, rows, slots = pages.copy(), np.zeros_like(key), np.empty(len(key), np.int64)
    bias = np.empty((len(slopes), len(key), len(key)), np.float32)
    keys, values = pages[..., :8], pages[..., 8:]
    oracle.slot_mapping(table + 1, positions, starts, 4, slots)
    oracle.reshape_and_cache_flash(key * 2, value + 1, keys, values, slots)
    oracle.copy_blocks([keys, values], [(1, 4), (2, 0)])
    oracle.gather_cache(keys, rows, table + 1, starts, None)
    oracle.alibi_bias(slopes * 2, positions, positions, bias)
    return slots * 2, rows + 1, bias - 1, pages


def run_step(function, world, values, slopes):
    """What ``function`` returns for the world's arrays, and the pages, as NumPy."""
    specs = [worlds.of_values(value) for value in values]
    key, value, pages, *others = map(world.put, specs)
    made = function(key, value, pages[..., :8], pages[..., 8:], *others, slopes)
    return *(result.cpu().numpy() for result in made), specs[2].on(world.bytes_of(specs[2]))


@only_torch
@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("eager", False),
        ("eager", True),
        ("aot_eager", True),
        pytest.param("inductor", None, marks=pytest.mark.extra),
    ],
)
def test_step(world, rng, backend, dynamic):
    """Of different lengths; the second one compiles for any, or finds that done."""
    slopes = cc.alibi_slopes(2, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, dynamic=dynamic)
    for tokens in (5, 4, 6):
        values = numbers_of(rng, tokens)
        wanted = expected_step(slopes, *values)
        for one, other in zip(run_step(compiled, world, values, slopes), wanted):
            np.testing.assert_array_equal(one, other)


def tensors(rng, *shape):
    return [torch.from_numpy(rng.normal(size=shape).astype(np.float32)) for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_kv_cache(rng, backend):
    """Made outside or inside, bound or not."""

    def use(cache, write, key, value, slots):
        cache.write(0, key * 2, value, slots)
        write(key * 3, value, slots)
        key = key + 1
        other = cc.PagedKVCache(tensors(rng, 5, 4, 2, 8), tensors(rng, 5, 4, 2, 8))
        cache.swap_blocks(other, [(0, 4)])
        cache.copy_blocks([(0, 2)])
        return key * 2, other.key_caches[len(other) - 1][4] + 1

    keys, values = tensors(rng, 5, 4, 2, 8), tensors(rng, 5, 4, 2, 8)
    key, value = tensors(rng, 2, 2, 8)
    cache = cc.PagedKVCache(keys, values)
    torch._dynamo.reset()
    made = torch.compile(use, backend=backend)(
        cache, cache.writer(1), key, value, torch.tensor([3, 0])
    )
    for times, written in zip((2, 3), keys):
        for block in (0, 2):
            np.testing.assert_array_equal(written[block, [3, 0]], key * times)
    np.testing.assert_array_equal(values[1][2, [3, 0]], value)
    np.testing.assert_array_equal(made[0], (key + 1) * 2)
    np.testing.assert_array_equal(made[1], keys[1][0] + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_keep_their_class(rng, backend):
    pages, wrong = torch.zeros(5, 4, 2, 8), torch.zeros(3, 2, 7)
    torch._dynamo.reset()
    compiled = torch.compile(cc_write, backend=backend)
    with pytest.raises(cc.ShapeError, match="reshape_and_cache_flash: Invalid shape of key_cache"):
        compiled(wrong, pages, torch.arange(3))
    assert not pages.any()


def cc_write(key, pages, slots):
    cc.reshape_and_cache_flash(key + 1, key, pages, pages + 1, slots)


# --- what cannot be -------------------------------------------------------------------------------

FUNCTIONS = {name: value for name in cc.__all__
             if isinstance(value := getattr(cc, name), types.FunctionType)}  # fmt: skip
METHODS = (
    "write", "writer", "attend", "gather", "copy_blocks", "swap_blocks", "zero_blocks",
    "pack_blocks", "unpack_blocks", "allocate",
)  # fmt: skip


# Of the same, those that go under other names.
UNDER_OTHER_NAMES = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (cc.flash_attn, vllm)
    for name in module.__all__
    if isinstance(getattr(module, name), types.FunctionType)
} | {"StepGraphs": torch_graphs.StepGraphs(len, 2).__call__}


@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS, *UNDER_OTHER_NAMES])
def test_fullgraph_says_what_to_call(name):
    pages, others = ([torch.zeros(2, 4, 2, 8)] for _ in range(2))
    function = (FUNCTIONS | UNDER_OTHER_NAMES).get(name)
    function = function or getattr(cc.PagedKVCache(pages, others), name)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
        torch.compile(lambda tensor: function(tensor), fullgraph=True, backend="eager")(pages[0])
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert function.__name__ in str(raised.value)
    assert version < (2, 8) or "see cupy_cache.integrations.torch_ops" in str(raised.value)


def called(call):
    """A function, as torch.jit wants one with a name, that calls and goes on."""

    def run(x):
        call(x)
        return x + 1

    return run


# What a tracer that notes torch's own operations makes of a function.
def by_torch_jit(function, *args):
    return torch.jit.trace(function, args, check_trace=False)


def by_make_fx(function, *args):
    return torch.fx.experimental.proxy_tensor.make_fx(function)(*args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [by_torch_jit, by_make_fx])
def test_tracers_that_would_leave_calls_out(trace, monkeypatch):
    """They return what is not written, and write nothing. Refused, whatever is remembered."""
    monkeypatch.setattr(alibi_slopes, "_remembered", {})
    keys, values = ([torch.zeros(2, 4, 2, 8)] for _ in range(2))
    cache, slots, key = cc.PagedKVCache(keys, values), torch.tensor([3]), torch.ones(1, 2, 8)
    keys[0][1] = 1
    pages = *keys, *values
    table, starts = torch.tensor([[1, 0]]), torch.tensor([0, 1])
    places = torch.tensor([key.data_ptr()]), torch.tensor([values[0].data_ptr()]), starts[1:] * 4
    limits = {"max_sequences": 1, "max_tokens": 4, "max_length": 4}
    tables = cc.BlockTables(2, 4, **limits, framework="torch", device="cpu")
    tables.add("a", [5])
    calls = {
        "reshape_and_cache_flash": lambda x: cc.reshape_and_cache_flash(x, x, *pages, slots),
        "PagedKVCache.write": lambda x: cache.write(0, x, x, slots),
        "PagedKVCache.zero_blocks": lambda x: cache.zero_blocks([1]),
        "zero_blocks": lambda x: cc.zero_blocks([x], [0]),
        "slot_mapping": lambda x: cc.slot_mapping(table, slots, starts, x.shape[-1] // 2),
        "swap_blocks_batch": lambda x: cc.swap_blocks_batch(*places),
        "block_table_to_csr": lambda x: cc.block_table_to_csr(table, slots, 4),
        "csr_to_block_table": lambda x: cc.csr_to_block_table(starts, slots, slots, 4),
        "BlockTables.step": lambda x: tables.step(["a"], [1]),
        "alibi_slopes": lambda x: cc.alibi_slopes(8, framework="torch", device="cpu"),
    }
    for _ in range(2):
        for name, call in calls.items():
            message = f"^{name}: Invalid memory of .* got one that .* traces; call it outside"
            with pytest.raises(cc.ArgumentError, match=message):
                trace(called(call), key)
        assert tables.length("a") == 0
        assert key.all() and keys[0].sum() == 64 and not keys[0][0].any() and not values[0].any()
        assert len(calls["alibi_slopes"](None)) == 8
    cc.zero_blocks([key], [0])
    assert not key.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("trace", [by_torch_jit, by_make_fx])
def test_tracers_note_registered_operations(trace, rng):
    pytest.importorskip("cupy_cache.integrations.torch_ops")

    def write(key, cache, slots):
        torch.ops.cupy_cache.reshape_and_cache_flash(key * 2, key, cache, cache + 0, slots)
        return cache + 1

    (key, other), slots = tensors(rng, 2, 2, 8), torch.tensor([3, 6])
    traced, cache = trace(write, key, torch.zeros(2, 4, 2, 8), slots), torch.zeros(2, 4, 2, 8)
    made = traced(other, cache, slots + 1)
    expected = np.zeros((8, 2, 8), np.float32)
    expected[[4, 7]] = other * 2
    np.testing.assert_array_equal(cache.view(8, 2, 8), expected)
    assert torch.equal(made, cache + 1)


# --- Dynamo's list --------------------------------------------------------------------------------

FIRST = """
table, positions = torch.tensor([[1, 2], [3, 0]]), torch.tensor([0, 5])
args = table, positions, torch.tensor([0, 1, 2]), 4
print(cc.slot_mapping(*args).tolist(), "torch._dynamo.trace_rules" in sys.modules, len(waiting()))
print(torch.compile(cc.slot_mapping, backend="eager")(*args).tolist(), len(waiting()))
cc.raise_faults()
"""
WAITING = "waiting = lambda: [f for f in sys.meta_path if type(f).__module__.startswith('cupy_c')]"


def run_python(*lines):
    code = "\n".join(lines)
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True,
                          text=True, check=True).stdout.splitlines()  # fmt: skip


@pytest.mark.slow
@pytest.mark.extra
def test_dynamo_comes_later():
    """Nobody here imports it, and nothing waits for it any longer once it is there."""
    lines = run_python("import sys, cupy_cache as cc, torch", WAITING, FIRST)
    assert lines == ["[4, 1] False 1", "[4, 1] 0"]


@pytest.mark.slow
@pytest.mark.extra
def test_dynamo_is_there_first():
    lines = run_python("import sys, torch, torch._dynamo, cupy_cache as cc", WAITING, FIRST)
    assert lines == ["[4, 1] True 0", "[4, 1] 0"]


def test_a_torch_without_such_a_list():
    """Its import works, with a warning."""
    from cupy_cache.runtime import tracing

    with pytest.warns(RuntimeWarning, match="cannot be told to leave cupy_cache alone"):
        tracing.skip(types.ModuleType("trace_rules"))
