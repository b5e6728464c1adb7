# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the pages of sequences into contiguous rows."""

import functools
from typing import NamedTuple

import pytest

from . import peers, suite, timing
from .baselines import bare_accesses

pytestmark = suite.marks
BLOCK_SIZE = 16


class Case(NamedTuple):
    rows: int
    sequences: int
    row: tuple = (576,)  # MLA: 512 + 64; or (heads, head size)
    layout: str = "rows"
    lengths: str = "equal"

    def __str__(self):
        shape = "x".join(map(str, self.row))
        return (
            f"{self.rows} rows of {shape} bfloat16 {self.layout}, {self.sequences} sequences"
            f"{'' if self.lengths == 'equal' else f' of {self.lengths} lengths'}"
        )


if timing.on_gpu():
    CASES = [
        *(Case(n, 1) for n in (64, 4096, 32768)),
        *(Case(n, s) for n, s in ((4096, 64), (32768, 256), (131072, 8), (131072, 512))),
        *(Case(n, s, (8, 128), layout) for layout in ("NHD", "HND")
          for n, s in ((256, 8), (32768, 256))),
        *(Case(n, s, lengths="random") for n, s in ((4096, 64), (131072, 512))),
        *(Case(n, s, (8, 128), "NHD", "random") for n, s in ((256, 8), (32768, 256))),
    ]  # fmt: skip
else:
    CASES = [Case(64, 1), Case(4096, 64), Case(1024, 8, (8, 128), "NHD"),
             Case(1024, 8, (8, 128), "HND")]  # fmt: skip


def make(case):
    op = suite.require("gather_cache")
    import torch

    device = timing.device()
    moved = 2 * case.rows * torch.Size(case.row).numel() * 2
    sets = timing.sets_for(moved)
    num_blocks, tables, starts = suite.pages_for(
        sets, case.rows, case.sequences, BLOCK_SIZE, case.lengths
    )
    if case.layout == "HND":
        heads, size = case.row
        storage = torch.randn((num_blocks, heads, BLOCK_SIZE, size), device=device,
                              dtype=torch.bfloat16)  # fmt: skip
        source = storage.permute(0, 2, 1, 3)
    else:
        source = torch.randn((num_blocks, BLOCK_SIZE, *case.row), device=device,
                             dtype=torch.bfloat16)  # fmt: skip
    results = torch.empty((sets, case.rows, *case.row), device=device, dtype=torch.bfloat16)

    def arguments(i):
        return source, results[i], tables[i], starts

    def slots_of_rows(i):
        return peers.torch_slots_of_rows(tables[i], starts, BLOCK_SIZE)

    def bare(i):
        if case.layout == "HND":
            pytest.skip("bare accesses: only for contiguous caches")
        return bare_accesses.move_rows((source,), (results[i],), slots_of_rows(i), gather=True)

    def torch_gather(i):
        slots, result = slots_of_rows(i), results[i]
        if case.layout != "HND":
            return functools.partial(torch.index_select, source.flatten(0, 1), 0, slots, out=result)
        _, index = peers.torch_index(slots, source)

        def call():
            result.copy_(source[index])

        return call

    contenders = {
        suite.OURS: lambda i: functools.partial(op, *arguments(i)),
        "bare": suite.Contender(bare, host=False),
        "torch": torch_gather,
        "triton": lambda i: peers.triton_gather(*arguments(i)),
        "vllm": lambda i: peers.vllm_gather(*arguments(i)),
    }
    return suite.Workload(
        "gather_cache", str(case), contenders, [results[0]], moved, sets,
        tokens=case.rows, dtype="bfloat16", layout=case.layout,
        extra={"sequences": case.sequences, "lengths": case.lengths},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(
    CASES, make, suite.contenders("bare", "torch", "triton", "vllm")
)
