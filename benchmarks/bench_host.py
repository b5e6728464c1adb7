# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What calls cost on the host, made as an engine makes them: at each step one call, or one for each
layer, with tensors, lists and numbers that are new objects and often of new sizes.

A batch is a few steps of one contender, which only enqueue; the contenders take turns. The figure
is the fastest batch of each. What a step's calls are given is made before its batch is timed. Every
case has a bare launch of an empty kernel beside it, which tells how quick the host was. GPU only.
"""

import functools
import itertools
import random
import time
from typing import NamedTuple

import pytest

import cupy_cache as cc

from . import bench_limits, suite, timing
from .baselines import compiled_op

pytestmark = suite.marks

LAYERS = 32
BLOCKS, BLOCK_SIZE = 1024, 16
ROW = (8, 128)  # heads, head size
LATENT, ROPE, LATENT_HEADS = 512, 64, 16
QUERY_HEADS = 32
INDEXER, SCALE = 128, 4  # bytes of a stored key, and of its one scale
TOKENS = 64
SEVEN = (1, 8, 17, 32, 64, 100, 256)  # tokens of steps
MOST_TOKENS = 512
REQUESTS, WIDTH = 256, 64  # of block tables
GROUPS = 4
QUERIES, FIRST_KEYS, MORE_KEYS = 16, 1024, 8192
SEQUENCES, EACH, WIDEST = 8, 32, 8192  # what is gathered: rows of a sequence, blocks of its table
COPIED = 16  # blocks packed or zeroed at once
KIB4 = 4 << 10

# Steps of a batch. Its launches must fit the launch queue, and the wait after it is not measured.
OF_LAYERS = 7  # 224 calls
OF_ONE = 100
OF_LONG = 20  # calls that keep the GPU busy for long, or launch several kernels
SECONDS = 1  # of a case, or the fewest rounds
FEWEST, MOST = 5, 40  # rounds
BARE = "bare launch"


class Case(NamedTuple):
    """``make`` gives the contenders: {name: step number -> a list of that step's calls}. ``steps``
    are those of a batch."""

    name: str
    make: object
    steps: int = OF_ONE

    def __str__(self):
        return self.name


# --- writes ---------------------------------------------------------------------------------------


def _caches(dtype):
    """Key caches and value caches of all layers."""
    torch = timing.torch_module()
    shape = (LAYERS, 2, BLOCKS, BLOCK_SIZE, *ROW)
    caches = torch.empty(shape, dtype=dtype, device=timing.device())
    return list(caches[:, 0]), list(caches[:, 1])


def _slots():
    torch = timing.torch_module()
    return torch.randperm(BLOCKS * BLOCK_SIZE, device=timing.device())[:MOST_TOKENS]


def _rows(*inner):
    """Rows for each layer."""
    torch = timing.torch_module()
    shape = (LAYERS, MOST_TOKENS, *inner)
    return torch.randn(shape, dtype=torch.bfloat16, device=timing.device())


class _Writes:
    """What each layer writes at a step: as many tokens as is the step's turn, to slots that the
    layers share."""

    def __init__(self, counts):
        self.counts = counts
        self.keys, self.values, self.slots = _rows(*ROW), _rows(*ROW), _slots()

    def calls(self, call):
        """Step number -> ``call(layer, key, value, slots)`` for every layer."""

        def calls_of(number):
            tokens = self.counts[number % len(self.counts)]
            slots = self.slots[:tokens]
            rows = enumerate(zip(self.keys, self.values))
            return [call(i, key[:tokens], value[:tokens], slots) for i, (key, value) in rows]

        return calls_of

    def bound(self, cache):
        """The same for a `PagedKVCache`."""
        return self.calls(functools.partial(functools.partial, cache.write))


def write(counts):
    op = suite.require("reshape_and_cache_flash")
    import torch

    writes, caches = _Writes(counts), _caches(torch.bfloat16)
    layers = list(zip(*caches))
    scales = [torch.ones(1, device=timing.device()) for _ in range(2)]

    def ours(layer, key, value, slots):
        return functools.partial(op, key, value, *layers[layer], slots, "auto")

    def compiled(layer, key, value, slots):
        call = compiled_op.write()
        return functools.partial(call, key, value, *layers[layer], slots, "auto", *scales)

    return {
        suite.OURS: writes.calls(ours),
        "bound": writes.bound(cc.PagedKVCache(*caches)),
        "compiled": writes.calls(compiled),
    }


def _write_fp8(scales, for_bound=None):
    """``scales(layer)`` are those of a call; ``for_bound`` those of all layers, where they stay."""
    op = suite.require("reshape_and_cache_flash")
    import torch

    writes, caches = _Writes((TOKENS,)), _caches(torch.uint8)
    layers = list(zip(*caches))

    def ours(layer, key, value, slots):
        return functools.partial(op, key, value, *layers[layer], slots, "fp8", *scales(layer))

    contenders = {suite.OURS: writes.calls(ours)}
    if for_bound is not None:
        contenders["bound"] = writes.bound(cc.PagedKVCache(*caches, "fp8", *for_bound))
    return contenders


def _scale_tensors():
    """One for each layer, each an allocation of its own."""
    torch = timing.torch_module()
    return [torch.full((1,), 0.03, device=timing.device()) for _ in range(LAYERS)]


def write_fp8_one_tensor():
    scales = _scale_tensors()
    return _write_fp8(lambda layer: (scales[layer], scales[layer]), (scales, scales))


def write_fp8_two_tensors():
    k_scales, v_scales = _scale_tensors(), _scale_tensors()
    return _write_fp8(lambda layer: (k_scales[layer], v_scales[layer]), (k_scales, v_scales))


def write_fp8_floats():
    return _write_fp8(lambda _: (0.03, 0.04), (0.03, 0.04))


def write_fp8_new_floats():
    numbers = itertools.count()

    def scales(_):
        more = 1e-7 * next(numbers)
        return 0.03 + more, 0.04 + more

    return _write_fp8(scales)


def write_mla():
    op = suite.require("concat_and_cache_mla")
    import torch

    shape = (LAYERS, BLOCKS, BLOCK_SIZE, LATENT + ROPE)
    caches = list(torch.empty(shape, dtype=torch.bfloat16, device=timing.device()))
    latents, ropes, slots = _rows(LATENT), _rows(ROPE), _slots()

    def ours(_):
        now = slots[:TOKENS]
        return [
            functools.partial(op, latent[:TOKENS], rope[:TOKENS], cache, now, "auto")
            for latent, rope, cache in zip(latents, ropes, caches)
        ]

    return {suite.OURS: ours}


def write_indexer():
    op = suite.require("indexer_k_quant_and_cache")
    import torch

    shape = (LAYERS, BLOCKS, BLOCK_SIZE, INDEXER + SCALE)
    caches = list(torch.empty(shape, dtype=torch.uint8, device=timing.device()))
    keys, slots = _rows(INDEXER), _slots()

    def ours(_):
        now = slots[:TOKENS]
        return [
            functools.partial(op, key[:TOKENS], cache, now, INDEXER, "ue8m0")
            for key, cache in zip(keys, caches)
        ]

    return {suite.OURS: ours}


# --- what a step asks for once --------------------------------------------------------------------


class _Requests:
    """Requests of one token each."""

    def __init__(self):
        torch, device = timing.torch_module(), timing.device()
        whole = {"dtype": torch.int32, "device": device}
        self.tables = list(torch.randint(0, BLOCKS, (GROUPS, REQUESTS, WIDTH), **whole))
        self.rows = torch.arange(REQUESTS, **whole)
        self.positions = torch.randint(0, WIDTH * BLOCK_SIZE, (REQUESTS,), device=device)
        self.starts = torch.arange(REQUESTS + 1, **whole)
        self.slots = torch.empty((GROUPS, REQUESTS), dtype=torch.int64, device=device)


def slot_mapping():
    op, step = suite.require("slot_mapping"), _Requests()

    def ours(_):
        arguments = step.tables[0][:], step.positions[:], step.starts[:], BLOCK_SIZE
        return [functools.partial(op, *arguments, out=step.slots[0])]

    return {suite.OURS: ours}


def slot_mapping_groups():
    op, step = suite.require("slot_mapping_groups"), _Requests()

    def ours(_):
        tables, sizes = [table[:] for table in step.tables], [BLOCK_SIZE] * GROUPS
        arguments = tables, step.rows[:], step.positions[:], step.starts[:], sizes
        return [functools.partial(op, *arguments, out=step.slots[:])]

    return {suite.OURS: ours}


def alibi_bias():
    """The keys become more by one at each step, and ``out`` is a view of one buffer."""
    op = suite.require("alibi_bias")
    import torch

    device, most = timing.device(), FIRST_KEYS + MORE_KEYS
    slopes = 2.0 ** -torch.arange(1.0, ROW[0] + 1, device=device)
    queries, keys = torch.arange(QUERIES, device=device), torch.arange(most, device=device)
    buffer = torch.empty((ROW[0], QUERIES, most), dtype=torch.bfloat16, device=device)

    def ours(number):
        count = FIRST_KEYS + number % MORE_KEYS
        arguments = slopes[:], queries[:], keys[:count]
        return [functools.partial(op, *arguments, out=buffer[:, :, :count])]

    return {suite.OURS: ours}


def gather(contiguous):
    """The block table becomes wider at each step: a part of a wide one's columns, or contiguous."""
    op = suite.require("gather_cache")
    import torch

    device = timing.device()
    shape = (BLOCKS, BLOCK_SIZE, *ROW)
    cache = torch.empty(shape, dtype=torch.bfloat16, device=device)
    result = torch.empty((SEQUENCES * EACH, *ROW), dtype=torch.bfloat16, device=device)
    starts = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=device) * EACH
    wide = torch.randint(0, BLOCKS, (SEQUENCES, WIDEST), dtype=torch.int32, device=device)
    least = EACH // BLOCK_SIZE

    def ours(number):
        width = least + number % (WIDEST - least)
        table = wide[:, :width]
        if contiguous:
            table = wide.view(-1)[: SEQUENCES * width].view(SEQUENCES, width)
        return [functools.partial(op, cache, result[:], table, starts[:])]

    return {suite.OURS: ours}


def gather_both():
    """Keys and values of a layer, beside the operation that reads one of the two."""
    op = suite.require("gather_and_maybe_dequant_cache")
    import torch

    device, count = timing.device(), SEQUENCES * EACH
    caches = _caches(torch.bfloat16)
    bound = cc.PagedKVCache(*caches)
    rows = torch.empty((2, count, *ROW), dtype=torch.bfloat16, device=device)
    starts = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=device) * EACH
    table = torch.randint(0, BLOCKS, (SEQUENCES, WIDTH), dtype=torch.int32, device=device)

    def ours(_):
        out = rows[0][:], rows[1][:]
        return [
            functools.partial(bound.gather, layer, table[:], starts[:], out=out)
            for layer in range(LAYERS)
        ]

    def one(_):
        step = rows[0], table[:], starts[:], None, count, "auto", None
        return [functools.partial(op, cache, *step) for cache in caches[0]]

    return {"bound": ours, suite.OURS: one}


def convert_fp8():
    """As much as 16 blocks hold."""
    op = suite.require("convert_fp8")
    import torch

    device, shape = timing.device(), (COPIED, BLOCK_SIZE, *ROW)
    numbers = torch.randn(shape, dtype=torch.bfloat16, device=device)
    stored = torch.empty(shape, dtype=torch.uint8, device=device)
    scale = torch.full((1,), 0.03, device=device)
    return {suite.OURS: lambda _: [functools.partial(op, stored[:], numbers[:], scale)]}


# --- attention, one layer -------------------------------------------------------------------------


def _sequences():
    """A block table, and the lengths of its sequences."""
    torch, device = timing.torch_module(), timing.device()
    whole = {"dtype": torch.int32, "device": device}
    table = torch.randint(0, BLOCKS, (REQUESTS, WIDTH), **whole)
    return table, torch.full((REQUESTS,), WIDTH * BLOCK_SIZE // 4, **whole)


def paged_attention(new_result=False):
    op = suite.require("paged_attention")
    torch, (keys, values) = timing.torch_module(), _caches(timing.torch_module().bfloat16)
    query = torch.randn((QUERY_HEADS, ROW[1]), dtype=torch.bfloat16, device=timing.device())
    query, (table, lengths) = query.expand(REQUESTS, -1, -1).contiguous(), _sequences()
    out, cache = torch.empty_like(query), cc.PagedKVCache(keys, values)

    def ours(number):
        batch = 1 + number % 8
        given = query[:batch], keys[0], values[0], table[:batch], lengths[:batch]
        return [functools.partial(op, *given, out=None if new_result else out[:batch])]

    def bound(number):
        batch = 1 + number % 8
        given = 0, query[:batch], table[:batch], lengths[:batch]
        return [functools.partial(cache.attend, *given, out=None if new_result else out[:batch])]

    return {suite.OURS: ours, "bound": bound}


def paged_attention_mla():
    op = suite.require("paged_attention_mla")
    torch, device = timing.torch_module(), timing.device()
    sizes = {"dtype": torch.bfloat16, "device": device}
    cache = torch.zeros((BLOCKS, BLOCK_SIZE, LATENT + ROPE), **sizes)
    query = torch.randn((REQUESTS, LATENT_HEADS, LATENT + ROPE), **sizes)
    out, (table, lengths) = torch.empty((REQUESTS, LATENT_HEADS, LATENT), **sizes), _sequences()

    def ours(number):
        batch = 1 + number % 8
        given = query[:batch], cache, table[:batch], lengths[:batch]
        return [functools.partial(op, *given, scale=0.1, out=out[:batch])]

    return {suite.OURS: ours}


def rotary_and_cache():
    op = suite.require("rotary_and_cache")
    import torch

    device, writes, caches = timing.device(), _Writes((TOKENS,)), _caches(torch.bfloat16)
    layers, cache = list(zip(*caches)), cc.PagedKVCache(*caches)
    query = torch.randn((LAYERS, MOST_TOKENS, QUERY_HEADS, ROW[1]), dtype=torch.bfloat16).to(device)
    angles = torch.randn((WIDTH * BLOCK_SIZE, ROW[1]), device=device)
    positions = torch.arange(MOST_TOKENS, device=device)

    def ours(layer, key, value, slots):
        of_step = positions[: len(slots)], query[layer, : len(slots)], key, value, angles
        return functools.partial(op, *of_step, *layers[layer], slots)

    def bound(layer, key, value, slots):
        of_step = positions[: len(slots)], query[layer, : len(slots)], key, value, angles
        return functools.partial(cache.rotary_write, layer, *of_step, slots)

    return {suite.OURS: writes.calls(ours), "bound": writes.calls(bound)}


# --- blocks ---------------------------------------------------------------------------------------


def _pairs(count):
    """New pairs: no block is both source and destination."""
    half = BLOCKS // 2
    sources, destinations = (random.sample(range(half), count) for _ in range(2))
    return [(source, half + destination) for source, destination in zip(sources, destinations)]


def copy_blocks(count):
    op = suite.require("copy_blocks")
    import torch

    caches = _caches(torch.bfloat16)
    bound = cc.PagedKVCache(*caches)
    return {
        suite.OURS: lambda _: [functools.partial(op, *caches, _pairs(count))],
        "bound": lambda _: [functools.partial(bound.copy_blocks, _pairs(count))],
    }


def copy_tokens():
    op = suite.require("copy_tokens")
    import torch

    layers = list(zip(*_caches(torch.bfloat16)))
    return {suite.OURS: lambda _: [functools.partial(op, layers, _pairs(8))]}


def pack_blocks():
    op = suite.require("pack_blocks")
    import torch

    caches = _caches(torch.bfloat16)
    layers, bound = list(zip(*caches)), cc.PagedKVCache(*caches)
    size = cc.packed_size(layers, num_blocks=COPIED)
    buffer = torch.empty(size, dtype=torch.uint8, device=timing.device())

    def ours(_):
        return [functools.partial(op, layers, random.sample(range(BLOCKS), COPIED), buffer[:])]

    def ours_bound(_):
        chosen = random.sample(range(BLOCKS), COPIED)
        return [functools.partial(bound.pack_blocks, chosen, buffer[:])]

    return {suite.OURS: ours, "bound": ours_bound}


def zero_blocks():
    op = suite.require("zero_blocks")
    import torch

    caches = _caches(torch.bfloat16)
    layers, bound = list(zip(*caches)), cc.PagedKVCache(*caches)

    def ours(_):
        return [functools.partial(op, layers, random.sample(range(BLOCKS), COPIED))]

    def ours_bound(_):
        return [functools.partial(bound.zero_blocks, random.sample(range(BLOCKS), COPIED))]

    return {suite.OURS: ours, "bound": ours_bound}


def _to_pinned():
    """Blocks of 4 KiB, on the GPU and in pinned host memory."""
    torch = timing.torch_module()
    source = torch.empty((BLOCKS, KIB4), dtype=torch.uint8, device=timing.device())
    on_host = torch.empty((BLOCKS, KIB4), dtype=torch.uint8, pin_memory=timing.on_gpu())
    return source, on_host


def swap_blocks(count, as_list):
    op, sides = suite.require("swap_blocks"), _to_pinned()
    torch = timing.torch_module()

    def ours(_):
        pairs = list(zip(*(random.sample(range(BLOCKS), count) for _ in range(2))))
        return [functools.partial(op, *sides, pairs if as_list else torch.tensor(pairs))]

    return {suite.OURS: ours}


def swap_blocks_batch(count, framework):
    op, sides = suite.require("swap_blocks_batch"), _to_pinned()
    torch = timing.torch_module()

    def ours(_):
        columns = [side.data_ptr() + torch.randperm(BLOCKS)[:count] * KIB4 for side in sides]
        columns.append(torch.full((count,), KIB4))
        if framework == "numpy":
            columns = [column.numpy() for column in columns]
        return [functools.partial(op, *columns)]

    return {suite.OURS: ours}


# --- the cases ------------------------------------------------------------------------------------

# More than there are steps, so that none comes again.
NEW_COUNTS = tuple(random.Random(0).sample(range(1, MOST_TOKENS + 1), MOST_TOKENS))

CASES = [
    *(
        Case(f"reshape_and_cache_flash, {LAYERS} layers, {name}", functools.partial(write, counts),
             OF_LAYERS)
        for name, counts in (
            (f"{TOKENS} tokens at every step", (TOKENS,)),
            ("seven numbers of tokens in turns", SEVEN),
            ("a new number of tokens at every step", NEW_COUNTS),
        )
    ),
    *(
        Case(f"reshape_and_cache_flash to fp8, {LAYERS} layers, {name}", make, OF_LAYERS)
        for name, make in (
            ("one scale tensor given twice", write_fp8_one_tensor),
            ("two scale tensors", write_fp8_two_tensors),
            ("the same floats", write_fp8_floats),
            ("new floats at every call", write_fp8_new_floats),
        )
    ),
    Case(f"concat_and_cache_mla, {LAYERS} layers, {TOKENS} tokens", write_mla, OF_LAYERS),
    Case(f"indexer_k_quant_and_cache, {LAYERS} layers, {TOKENS} tokens", write_indexer, OF_LAYERS),
    Case(f"slot_mapping, {REQUESTS} requests", slot_mapping),
    Case(f"slot_mapping_groups, {GROUPS} groups, {REQUESTS} requests", slot_mapping_groups),
    Case(f"alibi_bias, {ROW[0]} heads, {QUERIES} queries, one key more at every call", alibi_bias),
    *(
        Case(f"gather_cache, a wider {name} table at every call", functools.partial(gather, whole))
        for name, whole in (("sliced", False), ("contiguous", True))
    ),
    Case(f"PagedKVCache.gather, {LAYERS} layers, {SEQUENCES} sequences", gather_both, OF_LAYERS),
    Case("convert_fp8, bfloat16 to fp8, scale tensor", convert_fp8),
    Case(f"rotary_and_cache, {LAYERS} layers, {TOKENS} tokens", rotary_and_cache, OF_LAYERS),
    Case("paged_attention, 1 to 8 sequences", paged_attention),
    Case("paged_attention, 1 to 8 sequences, a new result",
         functools.partial(paged_attention, new_result=True)),
    Case("paged_attention_mla, 1 to 8 sequences", paged_attention_mla),
    Case(f"copy_tokens, {LAYERS} layers, 8 pairs", copy_tokens),
    Case(f"pack_blocks, {LAYERS} layers, {COPIED} blocks", pack_blocks),
    Case(f"zero_blocks, {LAYERS} layers, {COPIED} blocks", zero_blocks),
    *(
        Case(f"copy_blocks, {LAYERS} layers, {pairs} pairs", functools.partial(copy_blocks, pairs),
             steps)
        for pairs, steps in ((8, OF_ONE), (256, OF_LONG))
    ),
    *(
        Case(f"swap_blocks, device to host, 256 scattered blocks of 4 KiB{pairs}",
             functools.partial(swap_blocks, 256, as_list=not pairs), OF_LONG)
        for pairs in ("", ", pairs in a tensor")
    ),
    *(
        Case(f"swap_blocks_batch, device to host, 512 ranges of 4 KiB, {framework} arrays",
             functools.partial(swap_blocks_batch, 512, framework), OF_LONG)
        for framework in ("torch", "numpy")
    ),
]  # fmt: skip


# --- measuring ------------------------------------------------------------------------------------


class _Timer:
    """Batches of steps, each of which goes on where the last one ended."""

    def __init__(self, calls_of, steps):
        self._calls_of, self._steps, self._next = calls_of, steps, 0
        self._wait = timing.torch_module().cuda.synchronize

    def round(self):
        """Microseconds per call of one batch."""
        numbers = range(self._next, self._next + self._steps)
        self._next = numbers.stop
        calls = list(itertools.chain.from_iterable(map(self._calls_of, numbers)))
        self._wait()
        start = time.perf_counter()
        for call in calls:
            call()
        end = time.perf_counter()
        self._wait()
        return (end - start) * 1e6 / len(calls)


def _timers(case):
    """A timer for each contender, which has run a batch, and why others were skipped."""
    contenders = case.make()
    calls = [bench_limits._bare_launch()] * len(contenders[suite.OURS](0))
    contenders[BARE] = lambda _: calls
    timers, skipped = {}, {}
    for name, calls_of in contenders.items():
        timer = _Timer(calls_of, case.steps)
        try:
            timer.round()  # compiles
        except pytest.skip.Exception as skip:
            skipped[name] = str(skip)
        else:
            timers[name] = timer
    return timers, skipped


def _measure(benchmark, case):
    timers, skipped = _timers(case)
    fastest = dict.fromkeys(timers, float("inf"))

    def measure():
        us = {name: timer.round() for name, timer in timers.items()}
        fastest.update((name, min(us[name], fastest[name])) for name in us)
        return us[suite.OURS]

    start = time.perf_counter()
    measure()
    rounds = int(SECONDS / (time.perf_counter() - start))
    rounds = max(FEWEST, min(MOST, rounds))
    suite.measure_plain(benchmark, "host", case.name, "host", measure, rounds)
    record = benchmark.extra_info
    record["host_us"] = fastest.pop(suite.OURS)
    record["peers"] = {name: {"host_us": us} for name, us in fastest.items()}
    record["how"] = f"fastest of {rounds + 1} batches of {case.steps} steps"
    if skipped:
        record["skipped"] = skipped


@pytest.mark.parametrize("case", CASES, ids=suite.ids(CASES))
def test_host(benchmark, case):
    suite.gpu_only()
    _measure(benchmark, case)
    timing.torch_module().cuda.empty_cache()
    cc.raise_faults()  # no argument was out of bounds
