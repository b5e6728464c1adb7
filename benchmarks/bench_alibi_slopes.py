# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""ALiBi slopes: remembered, as a model asks for them at every step, and computed anew."""

import functools
from typing import NamedTuple

from . import suite, timing

pytestmark = suite.marks


class Case(NamedTuple):
    heads: int
    remembered: bool

    def __str__(self):
        return f"{self.heads} heads, {'remembered' if self.remembered else 'computed'}"


CASES = [Case(heads, remembered) for remembered in (True, False) for heads in (32, 112)]


def make(case):
    op = suite.require("alibi_slopes")
    import torch

    device = timing.device()
    out = torch.empty(case.heads, dtype=torch.float32, device=device)
    if case.remembered:
        call = functools.partial(op, case.heads, framework="torch", device=device)
    else:
        call = functools.partial(op, case.heads, out=out)
    slopes = call().tolist()
    power = 1 << (case.heads.bit_length() - 1)
    expected = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    expected += [2.0 ** (-4 * j / power) for j in range(1, 2 * (case.heads - power), 2)]
    torch.testing.assert_close(
        torch.tensor(slopes), torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=0
    )

    def through_cpu(_):
        return lambda: torch.tensor(slopes, dtype=torch.float32).to(device)

    def directly(_):
        return lambda: torch.tensor(slopes, dtype=torch.float32, device=device)

    contenders = {
        suite.OURS: suite.Contender(lambda _: call, launches=not case.remembered),
        "torch": suite.Contender(directly, capture=False),
        "torch through the CPU": suite.Contender(through_cpu, capture=False),
    }
    return suite.Workload(
        "alibi_slopes", str(case), contenders, [], 0, 1, dtype="float32",
        extra={"heads": case.heads},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(
    CASES, make, suite.contenders("torch", "torch through the CPU")
)
