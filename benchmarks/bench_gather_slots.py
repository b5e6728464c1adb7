# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Gathering the tokens in given slots, as they are stored and as numbers."""

import functools
from typing import NamedTuple

from . import suite, timing
from .baselines import bare_accesses

pytestmark = suite.marks
BLOCK_SIZE = 16


class Case(NamedTuple):
    rows: int
    row: tuple = (576,)  # MLA: 512 + 64; or (heads, head size)
    kv_cache_dtype: str = "auto"

    def __str__(self):
        shape, stored = "x".join(map(str, self.row)), self.kv_cache_dtype
        return f"{self.rows} rows of {shape} bfloat16{'' if stored == 'auto' else f' of {stored}'}"


if timing.on_gpu():
    CASES = [
        *(Case(rows) for rows in (64, 4096, 131072)),
        *(Case(rows, (8, 128)) for rows in (64, 4096, 32768)),
        *(Case(rows, (8, 128), "fp8") for rows in (64, 32768)),
    ]
else:
    CASES = [Case(64), Case(1024, (8, 128)), Case(1024, (8, 128), "fp8")]


def make(case):
    op = suite.require("gather_slots")
    import torch

    device, elements = timing.device(), torch.Size(case.row).numel()
    raw = case.kv_cache_dtype == "auto"
    moved = case.rows * elements * (4 if raw else 3)
    sets = timing.sets_for(moved)
    num_blocks = max(64, -(-sets * case.rows // BLOCK_SIZE))
    source = torch.randn((num_blocks, BLOCK_SIZE, *case.row), device=device, dtype=torch.bfloat16)
    if not raw:
        source = source.to(torch.float8_e4m3fn)
    slots = torch.randperm(num_blocks * BLOCK_SIZE, device=device)
    slots = slots[: sets * case.rows].view(sets, case.rows)
    results = torch.empty((sets, case.rows, *case.row), device=device, dtype=torch.bfloat16)

    def ours(i):
        return functools.partial(op, source, results[i], slots[i], case.kv_cache_dtype, 1.0)

    def bare(i):
        return bare_accesses.move_rows((source,), (results[i],), slots[i], gather=True)

    def torch_gather(i):
        flat, result = source.flatten(0, 1), results[i]
        if raw:
            return functools.partial(torch.index_select, flat, 0, slots[i], out=result)
        return lambda: result.copy_(flat.view(torch.uint8)[slots[i]].view(flat.dtype))

    contenders = {suite.OURS: ours, "torch": torch_gather}
    if raw:
        contenders["bare"] = suite.Contender(bare, host=False)
    return suite.Workload(
        "gather_slots", str(case), contenders, [results[0]], moved, sets, tokens=case.rows,
        dtype="bfloat16", layout="rows" if len(case.row) == 1 else "NHD",
        extra={"kv_cache_dtype": case.kv_cache_dtype},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders("torch", "bare"))
