# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A sparse-attention indexer's keys: quantised into its cache, gathered with their scales."""

import functools
from typing import NamedTuple

from . import suite, timing

pytestmark = suite.marks
BLOCK_SIZE = 64
SIZE, SCALE = 128, 4  # bytes of a stored key, and of its one scale


class Write(NamedTuple):
    tokens: int

    def __str__(self):
        return f"{self.tokens} keys of {SIZE} bfloat16"


class Gather(NamedTuple):
    rows: int
    sequences: int

    def __str__(self):
        return f"{self.rows} rows of {SIZE}+{SCALE} bytes, {self.sequences} sequences"


if timing.on_gpu():
    CASES = [Write(4096), Write(32768), Gather(4096, 64), Gather(32768, 256)]
else:
    CASES = [Write(1024), Gather(1024, 8)]


def make(case):
    return (_write if isinstance(case, Write) else _gather)(case)


def _write(case):
    op = suite.require("indexer_k_quant_and_cache")
    import torch

    device = timing.device()
    moved = case.tokens * (2 * SIZE + SIZE + SCALE)
    sets = timing.sets_for(moved)
    num_blocks, slots = suite.slots_for(sets, case.tokens, BLOCK_SIZE)
    keys = torch.randn((sets, case.tokens, SIZE), dtype=torch.bfloat16, device=device)
    cache = torch.empty((num_blocks, BLOCK_SIZE, SIZE + SCALE), dtype=torch.uint8, device=device)
    ours = {
        suite.OURS: lambda i: functools.partial(op, keys[i], cache, slots[i], SIZE, "ue8m0"),
    }
    return suite.Workload(
        "indexer_k_quant_and_cache", str(case), ours, [cache], moved, sets, tokens=case.tokens,
        dtype="bfloat16",
    )  # fmt: skip


def _gather(case):
    op = suite.require("cp_gather_indexer_k_quant_cache")
    import torch

    device = timing.device()
    moved = 2 * case.rows * (SIZE + SCALE)
    sets = timing.sets_for(moved)
    num_blocks, tables, bounds = suite.pages_for(sets, case.rows, case.sequences, BLOCK_SIZE)

    def random_bytes(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    cache = random_bytes(num_blocks, BLOCK_SIZE, SIZE + SCALE)
    keys, scales = (random_bytes(sets, case.rows, n) for n in (SIZE, SCALE))
    ours = {
        suite.OURS: lambda i: functools.partial(op, cache, keys[i], scales[i], tables[i], bounds),
    }
    return suite.Workload(
        "cp_gather_indexer_k_quant_cache", str(case), ours, [keys[0], scales[0]], moved, sets,
        tokens=case.rows, dtype="uint8", extra={"sequences": case.sequences},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders())
