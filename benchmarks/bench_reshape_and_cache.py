# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing tokens into the x-packed cache: keys [block, head, element / x, offset, x], values
[block, head, element, offset]."""

import functools
from typing import NamedTuple

import pytest

from . import peers, suite, timing

pytestmark = suite.marks
BLOCK_SIZE = 16
HEADS, SIZE = 8, 128


class Case(NamedTuple):
    tokens: int
    slots: str
    dtype: str = "bfloat16"

    def __str__(self):
        return f"{self.tokens} tokens, {HEADS}x{SIZE} {self.dtype}, {self.slots} slots"


if timing.on_gpu():
    CASES = [
        *(Case(n, "random") for n in (1, 64, 256, 1024, 16384)),
        *(Case(n, "consecutive") for n in (256, 4096, 16384, 65536)),
        Case(16384, "consecutive", "float32"),
    ]
else:
    CASES = [Case(1, "random"), Case(1024, "random"), Case(1024, "consecutive")]


def _make(case):
    op = suite.require("reshape_and_cache")
    import torch

    dtype, device = getattr(torch, case.dtype), timing.device()
    x = 16 // dtype.itemsize
    moved = 4 * case.tokens * HEADS * SIZE * dtype.itemsize
    sets = timing.sets_for(moved)
    least = 65536 if timing.on_gpu() else 4096
    num_blocks = max(sets * case.tokens, least) // BLOCK_SIZE
    shape = (sets, case.tokens, HEADS, SIZE)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    caches = [
        torch.empty((num_blocks, HEADS, SIZE // x, BLOCK_SIZE, x), dtype=dtype, device=device),
        torch.empty((num_blocks, HEADS, SIZE, BLOCK_SIZE), dtype=dtype, device=device),
    ]
    order = torch.randperm if case.slots == "random" else torch.arange
    slots = order(num_blocks * BLOCK_SIZE, device=device)[: sets * case.tokens]
    slots = slots.view(sets, case.tokens)

    def arguments(i):
        return keys[i], values[i], *caches, slots[i]

    contenders = {
        suite.OURS: lambda i: functools.partial(op, *arguments(i)),
        "torch": lambda i: torch_write(*arguments(i)),
        "triton": lambda i: peers.triton_write_packed(*arguments(i)),
        "vllm": lambda i: peers.vllm_write_packed(*arguments(i)),
    }
    return suite.Workload(
        "reshape_and_cache", str(case), contenders, caches, moved, sets,
        tokens=case.tokens, dtype=case.dtype, layout="x-packed",
        extra={"heads": HEADS, "head_size": SIZE, "slots": case.slots},
    )  # fmt: skip


def torch_write(key, value, key_cache, value_cache, slots):
    """Indexed assignment, with block and offset of each slot made beforehand."""
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    packed = key.unflatten(2, (-1, key_cache.shape[4]))

    def call():
        key_cache[block, :, :, offset] = packed
        value_cache[block, :, :, offset] = value

    return call


@pytest.fixture(scope="module", params=CASES, ids=suite.ids(CASES))
def load(request):
    yield from suite.opened(_make(request.param))


WHO = suite.contenders("torch", "triton", "vllm")


@pytest.mark.parametrize("who", WHO)
def test_device(benchmark, load, who):
    suite.measure_device(benchmark, load, who)


@pytest.mark.parametrize("who", WHO)
def test_host(benchmark, load, who):
    suite.measure_host(benchmark, load, who)
