# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing tokens into the x-packed cache: keys [block, head, element / x, offset, x], values
[block, head, element, offset]."""

import functools
from typing import NamedTuple

import pytest

from . import peers, suite, timing
from .baselines import bare_accesses

pytestmark = suite.marks
BLOCK_SIZE = 16
HEADS, SIZE = 8, 128


class Case(NamedTuple):
    tokens: int
    slots: str
    dtype: str = "bfloat16"
    stored: str = "auto"

    def __str__(self):
        to = "" if self.stored == "auto" else f" to {self.stored}"
        return f"{self.tokens} tokens, {HEADS}x{SIZE} {self.dtype}{to}, {self.slots} slots"


if timing.on_gpu():
    CASES = [
        *(Case(n, "random") for n in (1, 64, 256, 1024, 16384)),
        *(Case(n, "consecutive") for n in (256, 4096, 16384, 65536)),
        *(Case(n, "consecutive", "float32") for n in (16384, 65536)),
        *(Case(n, "consecutive", stored="fp8") for n in (16384, 65536)),
    ]
else:
    CASES = [Case(1, "random"), Case(1024, "random"), Case(1024, "consecutive"),
             Case(1024, "consecutive", stored="fp8")]  # fmt: skip


def make(case):
    op = suite.require("reshape_and_cache")
    import torch

    dtype, device = getattr(torch, case.dtype), timing.device()
    raw = case.stored == "auto"
    kept = dtype if raw else torch.uint8
    x = 16 // kept.itemsize
    moved = 2 * case.tokens * HEADS * SIZE * (dtype.itemsize + kept.itemsize)
    sets = timing.sets_for(moved)
    num_blocks, slots = suite.slots_for(sets, case.tokens, BLOCK_SIZE, case.slots)
    shape = (sets, case.tokens, HEADS, SIZE)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    caches = [
        torch.empty((num_blocks, HEADS, SIZE // x, BLOCK_SIZE, x), dtype=kept, device=device),
        torch.empty((num_blocks, HEADS, SIZE, BLOCK_SIZE), dtype=kept, device=device),
    ]
    scales = [torch.full((1,), scale, device=device) for scale in (0.03, 0.04)]
    stored = () if raw else (case.stored, *scales)

    def arguments(i):
        return keys[i], values[i], *caches, slots[i]

    def bare(i):
        if kept.itemsize != 2:
            pytest.skip("bare accesses: only for elements of two bytes")
        return bare_accesses.write_packed(*arguments(i))

    contenders = {suite.OURS: lambda i: functools.partial(op, *arguments(i), *stored)}
    if raw:
        contenders |= {
            "torch": lambda i: torch_write(*arguments(i)),
            "bare": suite.Contender(bare, host=False),
            "triton": lambda i: peers.triton_write_packed(*arguments(i)),
            "vllm": lambda i: peers.vllm_write_packed(*arguments(i)),
        }
    return suite.Workload(
        "reshape_and_cache", str(case), contenders, caches, moved, sets,
        tokens=case.tokens, dtype=case.dtype, layout="x-packed",
        extra={"heads": HEADS, "head_size": SIZE, "slots": case.slots, "stored": case.stored},
    )  # fmt: skip


def torch_write(key, value, key_cache, value_cache, slots):
    """Indexed assignment, with block and offset of each slot made beforehand."""
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    packed = key.unflatten(2, (-1, key_cache.shape[4]))

    def call():
        key_cache[block, :, :, offset] = packed
        value_cache[block, :, :, offset] = value

    return call


load, test_device, test_host = suite.benchmarks(
    CASES, make, suite.contenders("bare", "torch", "triton", "vllm")
)
