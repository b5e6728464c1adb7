# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying tokens from slot to slot in all layers: as much as compaction after eviction moves."""

import functools
from typing import NamedTuple

from . import suite, timing

pytestmark = suite.marks
BLOCK_SIZE, HEADS, SIZE = 16, 8, 128


class Case(NamedTuple):
    pairs: int
    layers: int
    slots: int  # of a cache
    layout: str = "NHD"
    where: str = "device"

    def __str__(self):
        return (
            f"{self.pairs} of {self.slots} tokens, {self.layers} layers, {self.layout}, pairs on "
            f"the {self.where}"
        )


if timing.on_gpu():
    CASES = [
        Case(32768, 32, 65536),
        Case(32768, 32, 65536, "HND"),
        Case(1024, 32, 65536),
        Case(8, 32, 65536),
        Case(8, 32, 65536, where="host"),
    ]
else:
    CASES = [Case(512, 2, 2048), Case(512, 2, 2048, "HND")]


def make(case):
    op = suite.require("copy_tokens")
    import torch

    device = timing.device()
    pairs = torch.randperm(case.slots)[: 2 * case.pairs].view(-1, 2)
    if case.where == "device":
        pairs = pairs.to(device)
    blocks = case.slots // BLOCK_SIZE
    made = [
        suite.caches(blocks, BLOCK_SIZE, HEADS, SIZE, torch.bfloat16, case.layout)[1]
        for _ in range(case.layers)
    ]
    moved = 2 * 2 * case.pairs * case.layers * HEADS * SIZE * 2  # keys, values; read, written
    call = {suite.OURS: lambda i: functools.partial(op, list(map(tuple, made)), pairs)}
    return suite.Workload(
        "copy_tokens", str(case), call, [], moved, 1, tokens=case.pairs, dtype="bfloat16",
        layout=case.layout,
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(CASES, make, [suite.OURS])
