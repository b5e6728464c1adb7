# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing tokens into a cache [block, offset, head, element]."""

import functools
from typing import NamedTuple

import pytest

from . import peers, suite, timing

pytestmark = suite.marks
BLOCK_SIZE = 16


class Case(NamedTuple):
    tokens: int
    heads: int = 8
    size: int = 128
    dtype: str = "bfloat16"
    layout: str = "NHD"
    slots: str = "random"

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


def _make(case):
    op = suite.require("reshape_and_cache_flash")
    import torch

    dtype, device = getattr(torch, case.dtype), timing.device()
    moved = 4 * case.tokens * case.heads * case.size * dtype.itemsize  # keys, values; read, written
    sets = timing.sets_for(moved)
    # One large cache: each set writes slots of its own, scattered over it.
    least = 65536 if timing.on_gpu() else 4096
    num_blocks = max(sets * case.tokens, least) // BLOCK_SIZE
    shape = (sets, case.tokens, case.heads, case.size)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    if case.layout == "NHD":
        storages = [
            torch.empty((num_blocks, BLOCK_SIZE, *shape[2:]), dtype=dtype, device=device)
            for _ in range(2)
        ]
        key_cache, value_cache = storages
    else:
        storages = [
            torch.empty((num_blocks, case.heads, BLOCK_SIZE, case.size), dtype=dtype, device=device)
            for _ in range(2)
        ]
        key_cache, value_cache = (s.permute(0, 2, 1, 3) for s in storages)
    order = torch.randperm if case.slots == "random" else torch.arange
    slots = order(num_blocks * BLOCK_SIZE, device=device)[: sets * case.tokens]
    slots = slots.view(sets, case.tokens)

    def arguments(i):
        return keys[i], values[i], key_cache, value_cache, slots[i]

    contenders = {
        suite.OURS: lambda i: functools.partial(op, *arguments(i)),
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
    if key_cache.is_contiguous():
        index = (slots,)
        key_cache, value_cache = key_cache.flatten(0, 1), value_cache.flatten(0, 1)
    else:
        index = (slots // BLOCK_SIZE, slots % BLOCK_SIZE)

    def call():
        key_cache[index] = key
        value_cache[index] = value

    return call


@pytest.fixture(scope="module", params=CASES, ids=suite.ids(CASES))
def load(request):
    yield from suite.opened(_make(request.param))


WHO = suite.contenders("torch", "triton", "vllm", "flashinfer", "sglang")


@pytest.mark.parametrize("who", WHO)
def test_device(benchmark, load, who):
    suite.measure_device(benchmark, load, who)


@pytest.mark.parametrize("who", WHO)
def test_host(benchmark, load, who):
    suite.measure_host(benchmark, load, who)
