# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Computing a step's slots from block tables and positions."""

import functools
from typing import NamedTuple

from . import peers, suite, timing

pytestmark = suite.marks
BLOCK_SIZE = 16
WIDTH = 1024  # blocks of a request's table


class Case(NamedTuple):
    requests: int
    each: int  # tokens of a request

    def __str__(self):
        return f"{self.requests} requests of {self.each} tokens"


if timing.on_gpu():
    CASES = [Case(1, 1), Case(256, 1), Case(1024, 1), Case(8, 2048), Case(1, 16384)]
else:
    CASES = [Case(1, 1), Case(256, 1), Case(8, 2048)]


def make(case):
    op = suite.require("slot_mapping")
    import torch

    device = timing.device()
    tokens = case.requests * case.each
    # Positions and slots are 8 bytes; of the table, the entries that are used.
    moved = 16 * tokens + 4 * case.requests * -(-case.each // BLOCK_SIZE)
    sets = timing.sets_for(moved)
    table = torch.randperm(case.requests * WIDTH, device=device).to(torch.int32)
    table = table.view(case.requests, WIDTH)
    starts = torch.arange(case.requests + 1, device=device, dtype=torch.int32) * case.each
    first = torch.randint(
        0, WIDTH * BLOCK_SIZE - case.each + 1, (sets, case.requests, 1), device=device
    )
    positions = (first + torch.arange(case.each, device=device)).view(sets, tokens)
    slots = torch.empty((sets, tokens), dtype=torch.int64, device=device)

    def torch_slots(i):
        rows, out = torch.arange(case.requests, device=device), slots[i]
        position = positions[i]

        def call():
            counts = starts[1:] - starts[:-1]
            request = torch.repeat_interleave(rows, counts, output_size=tokens)
            block = table[request, position // BLOCK_SIZE]
            torch.add(block * BLOCK_SIZE, position % BLOCK_SIZE, out=out)

        return call

    def ours(i):
        return functools.partial(op, table, positions[i], starts, BLOCK_SIZE, out=slots[i])

    def triton(i):
        return peers.triton_slot_mapping(table, positions[i], starts, BLOCK_SIZE, slots[i])

    contenders = {
        suite.OURS: ours,
        # Ten launches a call: a batch of 50 calls fits the launch queue.
        "torch": suite.Contender(torch_slots, batch=50 if timing.on_gpu() else None),
        "triton": triton,
    }
    return suite.Workload(
        "slot_mapping", str(case), contenders, [slots[0]], moved, sets, tokens=tokens,
        dtype="int64", extra={"requests": case.requests},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders("torch", "triton"))
