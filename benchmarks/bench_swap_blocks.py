# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying blocks between the GPU and pinned host memory. The ceiling is one long copy over the bus
of the same bytes, in the same direction."""

import functools
from typing import NamedTuple

from . import peers, suite, timing

pytestmark = suite.marks
KIB = 1024


class Case(NamedTuple):
    direction: str
    block: int  # bytes
    count: int
    run: int = 1  # neighbouring blocks

    def __str__(self):
        runs = f"runs of {self.run * self.block // KIB} KiB" if self.run > 1 else "scattered"
        return f"{self.direction}, {self.count} blocks of {self.block // KIB} KiB, {runs}"


TO_HOST, TO_DEVICE = "device to host", "host to device"
if timing.on_gpu():
    CASES = [
        *(Case(d, 32 * KIB, 256) for d in (TO_HOST, TO_DEVICE)),
        *(Case(d, 4 * KIB, 2048) for d in (TO_HOST, TO_DEVICE)),
        *(Case(d, 128 * KIB, 64) for d in (TO_HOST, TO_DEVICE)),
        *(Case(d, 32 * KIB, 1024, 32) for d in (TO_HOST, TO_DEVICE)),  # runs of 1 MiB
        *(Case(d, 32 * KIB, 1024, 1024) for d in (TO_HOST, TO_DEVICE)),
    ]
else:
    CASES = [Case("host to host", 32 * KIB, n) for n in (16, 256)]


def make(case):
    op = suite.require("swap_blocks")
    import torch

    gpu = timing.on_gpu()
    moved = 2 * case.block * case.count
    sets = 2
    num_blocks = 2 * sets * case.count
    shape = (num_blocks, case.block // 2)
    on_host = torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)
    if gpu:
        on_host = on_host.pin_memory()
    other = torch.randn(shape, dtype=torch.bfloat16, device=timing.device())
    to_host = case.direction == TO_HOST
    source, destination = (other, on_host) if to_host else (on_host, other)
    # Random places for whole runs, on both sides.
    places = (torch.randperm(num_blocks // case.run)[: sets * case.count // case.run]
              for _ in range(2))  # fmt: skip
    inside = torch.arange(case.run)
    sides = [(p[:, None] * case.run + inside).view(sets, case.count) for p in places]
    table = torch.stack(sides, -1)
    pairs = [[tuple(pair) for pair in part] for part in table.tolist()]

    def torch_copy(i):
        views = [(destination[d], source[s]) for s, d in pairs[i]]

        def call():
            for to, of in views:
                to.copy_(of, non_blocking=True)

        return call

    contenders = {
        suite.OURS: suite.Contender(lambda i: functools.partial(op, source, destination, pairs[i]),
                                    batch=20 if gpu else None),
        "torch": suite.Contender(torch_copy, batch=2 if gpu else None),
        "driver batch": suite.Contender(
            lambda i: peers.driver_batch_copy(source, destination, pairs[i]), capture=False, batch=2
        ),
        "vllm": suite.Contender(
            lambda i: peers.vllm_swap_blocks(source, destination, table[i]), capture=False, batch=2
        ),
    }  # fmt: skip
    ceiling = functools.partial(timing.pinned_copy_us, to_host=to_host) if gpu else None
    return suite.Workload(
        "swap_blocks", str(case), contenders, [destination], moved, sets, ceiling=ceiling,
        footprint=moved // 2, ops=4, dtype="bfloat16",
        extra={"path": "bus" if gpu else "memory", "pairs": case.count},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(
    CASES, make, suite.contenders("torch", "driver batch", "vllm")
)
