# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing tokens into a cache [block, offset, head, element]."""

import functools
from typing import NamedTuple

import pytest

import cupy_cache as cc

from . import peers, suite, timing
from .baselines import bare_accesses, compiled_op

pytestmark = suite.marks
BLOCK_SIZE = 16


class Case(NamedTuple):
    tokens: int
    heads: int = 8
    size: int = 128
    dtype: str = "bfloat16"
    layout: str = "NHD"
    slots: str = "random"
    blocks: int | None = None  # of the cache; None: enough for all sets

    def __str__(self):
        return (
            f"{self.tokens} tokens, {self.heads}x{self.size} {self.dtype} {self.layout}, "
            f"{self.slots} slots"
        )


if timing.on_gpu():
    CASES = [
        *(Case(n) for n in (1, 8, 64, 256, 1024, 4096, 16384, 65536, 524288)),
        Case(16384, slots="consecutive"),
        *(
            Case(n, h, d)
            for h, d in ((1, 128), (32, 64), (4, 256), (64, 128))
            for n in (256, 16384)
        ),
        *(Case(n, dtype="float32") for n in (256, 16384)),
        *(Case(n, layout="HND") for n in (1, 256, 16384)),
    ]
else:
    CASES = [*(Case(n) for n in (1, 64, 1024, 4096)), Case(1024, dtype="float32"),
             Case(1024, layout="HND"), Case(1024, slots="consecutive")]  # fmt: skip


def make(case):
    op = suite.require("reshape_and_cache_flash")
    import torch

    dtype, device = getattr(torch, case.dtype), timing.device()
    moved = 4 * case.tokens * case.heads * case.size * dtype.itemsize  # keys, values; read, written
    sets = timing.sets_for(moved)
    if case.blocks is not None:
        sets = min(sets, case.blocks * BLOCK_SIZE // case.tokens)
    num_blocks, slots = suite.slots_for(sets, case.tokens, BLOCK_SIZE, case.slots, case.blocks)
    shape = (sets, case.tokens, case.heads, case.size)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    storages, caches = suite.caches(
        num_blocks, BLOCK_SIZE, case.heads, case.size, dtype, case.layout
    )

    def arguments(i):
        return keys[i], values[i], *caches, slots[i]

    bound = cc.PagedKVCache(*([cache] for cache in caches)).writer(0)
    scales = [torch.ones(1, device=device) for _ in range(2)]

    def compiled(i):
        if case.layout != "NHD":
            pytest.skip("compiled torch op: only for contiguous caches")
        return functools.partial(compiled_op.write(), *arguments(i), "auto", *scales)

    def bare(i):
        if case.layout != "NHD":
            pytest.skip("bare accesses: only for contiguous caches")
        return bare_accesses.move_rows((keys[i], values[i]), storages, slots[i])

    contenders = {
        suite.OURS: lambda i: functools.partial(op, *arguments(i)),
        "bare": suite.Contender(bare, host=False),
        "bound": lambda i: functools.partial(bound, keys[i], values[i], slots[i]),
        "compiled": compiled,
        "torch": lambda i: torch_write(*arguments(i)),
        "triton": lambda i: peers.triton_write(*arguments(i)),
        "vllm": lambda i: peers.vllm_write(*arguments(i)),
        "flashinfer": lambda i: peers.flashinfer_write(*arguments(i), case.layout),
        "sglang": lambda i: peers.sglang_write(*arguments(i)),
    }
    return suite.Workload(
        "reshape_and_cache_flash", str(case), contenders, storages, moved, sets,
        tokens=case.tokens, dtype=case.dtype, layout=case.layout,
        extra={"heads": case.heads, "head_size": case.size, "slots": case.slots},
    )  # fmt: skip


def torch_write(key, value, key_cache, value_cache, slots):
    """``cache[slots] = key``, with the indices that the layout needs made beforehand."""
    (key_cache, value_cache), index = peers.torch_index(slots, key_cache, value_cache)

    def call():
        key_cache[index] = key
        value_cache[index] = value

    return call


WHO = suite.contenders(
    "bare", "bound", "compiled", "torch", "triton", "vllm", "flashinfer", "sglang"
)  # fmt: skip
load, test_device, test_host = suite.benchmarks(CASES, make, WHO)


@pytest.mark.parametrize("tokens", (1, 256))
def test_host_in_turns(benchmark, tokens):
    """The library's calls beside a compiled operation that checks nothing."""
    load = make(Case(tokens))
    load.record.update(op="host time, in turns", case=f"reshape_and_cache_flash, {tokens} tokens")
    suite.measure_host_in_turns(benchmark, load, (suite.OURS, "bound", "compiled"))
    load.close()
