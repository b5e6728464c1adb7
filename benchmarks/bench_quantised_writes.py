# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Quantising tokens into a cache [block, offset, head, element]: 8 bits of 16."""

import functools
from typing import NamedTuple

from . import peers, suite, timing

pytestmark = suite.marks
BLOCK_SIZE = 16
HEADS, SIZE = 8, 128
ONE, PER_HEAD, PER_TOKEN_HEAD = "one scale", "a scale per head", "a scale per token and head"


class Case(NamedTuple):
    tokens: int
    stored: str = "fp8"
    layout: str = "NHD"
    scales: str = ONE

    def __str__(self):
        return (
            f"{self.tokens} tokens, {HEADS}x{SIZE} bfloat16 to {self.stored} {self.layout}, "
            f"{self.scales}"
        )


if timing.on_gpu():
    CASES = [
        *(Case(n) for n in (1, 256, 4096, 16384, 65536)),
        *(Case(n, stored) for stored in ("fp8_e5m2", "int8") for n in (256, 16384, 65536)),
        Case(16384, layout="HND"),
        Case(16384, scales=PER_HEAD),
        *(Case(16384, stored, scales=PER_TOKEN_HEAD) for stored in ("fp8", "int8")),
    ]
else:
    CASES = [Case(1), Case(1024), Case(1024, "fp8_e5m2"), Case(1024, "int8"),
             Case(1024, layout="HND"), Case(1024, scales=PER_HEAD),
             Case(1024, scales=PER_TOKEN_HEAD)]  # fmt: skip


def make(case):
    own_scales = case.scales == PER_TOKEN_HEAD
    name = "reshape_and_cache_flash" + "_per_token_head" * own_scales
    op = suite.require(name)
    import torch

    device = timing.device()
    moved = 2 * case.tokens * HEADS * (SIZE * (2 + 1) + 4 * own_scales)
    sets = timing.sets_for(moved)
    num_blocks, slots = suite.slots_for(sets, case.tokens, BLOCK_SIZE)
    shape = (sets, case.tokens, HEADS, SIZE)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    storages, caches = suite.caches(num_blocks, BLOCK_SIZE, HEADS, SIZE, torch.uint8, case.layout)
    if own_scales:
        scales = [torch.empty((num_blocks, BLOCK_SIZE, HEADS), device=device) for _ in range(2)]

        def ours(i):
            return functools.partial(
                op, keys[i], values[i], *caches, *scales, slots[i], case.stored
            )

    else:
        count = HEADS if case.scales == PER_HEAD else 1
        scales = [torch.linspace(first, 2 * first, count, device=device) for first in (0.03, 0.04)]

        def ours(i):
            return functools.partial(
                op, keys[i], values[i], *caches, slots[i], case.stored, *scales
            )

    contenders = {suite.OURS: ours}
    if case.stored != "int8" and not own_scales:  # torch rounds ties to even, our int8 away from 0
        # Ten launches a call: a batch of 50 calls fits the launch queue.
        contenders["torch"] = suite.Contender(
            lambda i: torch_write(keys[i], values[i], *caches, slots[i], case.stored, scales),
            batch=50,
        )
    if case.stored == "fp8" and case.scales == ONE:
        contenders["triton"] = lambda i: peers.triton_write_fp8(
            keys[i], values[i], *caches, slots[i], *scales
        )
    return suite.Workload(
        name if own_scales else f"{name}, quantised", str(case), contenders, storages, moved, sets,
        tokens=case.tokens, dtype="bfloat16", layout=case.layout,
        extra={"heads": HEADS, "head_size": SIZE, "stored": case.stored, "scales": case.scales},
    )  # fmt: skip


def torch_write(key, value, key_cache, value_cache, slots, stored, scales):
    """Composed of torch's operations: ``cache[slots] = quantised``."""
    (key_cache, value_cache), index = peers.torch_index(slots, key_cache, value_cache)
    dtype = peers.torch_fp8(stored)
    k_scale, v_scale = (scale.view(-1, 1) for scale in scales)

    def call():
        key_cache[index] = peers.torch_quantise(key, k_scale, dtype)
        value_cache[index] = peers.torch_quantise(value, v_scale, dtype)

    return call


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders("torch", "triton"))
