# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the pages of sequences into contiguous rows."""

import functools
from typing import NamedTuple

import pytest

from . import peers, suite, timing

pytestmark = suite.marks
BLOCK_SIZE = 16


class Case(NamedTuple):
    rows: int
    sequences: int
    row: tuple = (576,)  # MLA: 512 + 64; or (heads, head size)
    layout: str = "rows"

    def __str__(self):
        shape = "x".join(map(str, self.row))
        return f"{self.rows} rows of {shape} bfloat16 {self.layout}, {self.sequences} sequences"


if timing.on_gpu():
    CASES = [
        *(Case(n, 1) for n in (64, 4096, 32768)),
        *(Case(n, s) for n, s in ((4096, 64), (32768, 256), (131072, 8), (131072, 512))),
        *(Case(n, s, (8, 128), layout) for layout in ("NHD", "HND")
          for n, s in ((256, 8), (32768, 256))),
    ]  # fmt: skip
else:
    CASES = [Case(64, 1), Case(4096, 64), Case(1024, 8, (8, 128), "NHD"),
             Case(1024, 8, (8, 128), "HND")]  # fmt: skip


def _make(case):
    op = suite.require("gather_cache")
    import torch

    device = timing.device()
    moved = 2 * case.rows * torch.Size(case.row).numel() * 2
    sets = timing.sets_for(moved)
    length = case.rows // case.sequences
    width = -(-length // BLOCK_SIZE)
    num_blocks = max(sets * case.sequences * width, 4096 if timing.on_gpu() else 1024)
    if case.layout == "HND":
        heads, size = case.row
        storage = torch.randn((num_blocks, heads, BLOCK_SIZE, size), device=device,
                              dtype=torch.bfloat16)  # fmt: skip
        source = storage.permute(0, 2, 1, 3)
    else:
        source = torch.randn((num_blocks, BLOCK_SIZE, *case.row), device=device,
                             dtype=torch.bfloat16)  # fmt: skip
    results = torch.empty((sets, case.rows, *case.row), device=device, dtype=torch.bfloat16)
    tables = torch.randperm(num_blocks, device=device)[: sets * case.sequences * width]
    tables = tables.to(torch.int32).view(sets, case.sequences, width)
    starts = torch.arange(case.sequences + 1, device=device, dtype=torch.int32) * length

    def arguments(i):
        return source, results[i], tables[i], starts

    def torch_gather(i):
        position = torch.arange(length, device=device)
        block = tables[i].long()[:, position // BLOCK_SIZE].flatten()
        offset = (position % BLOCK_SIZE).repeat(case.sequences)
        if case.layout != "HND":
            flat = source.flatten(0, 1)
            slots = block * BLOCK_SIZE + offset
            return functools.partial(torch.index_select, flat, 0, slots, out=results[i])
        result = results[i]

        def call():
            result.copy_(source[block, offset])

        return call

    contenders = {
        suite.OURS: lambda i: functools.partial(op, *arguments(i)),
        "torch": torch_gather,
        "triton": lambda i: peers.triton_gather(*arguments(i)),
        "vllm": lambda i: peers.vllm_gather(*arguments(i)),
    }
    return suite.Workload(
        "gather_cache", str(case), contenders, [results[0]], moved, sets,
        tokens=case.rows, dtype="bfloat16", layout=case.layout, extra={"sequences": case.sequences},
    )  # fmt: skip


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
