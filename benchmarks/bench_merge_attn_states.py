# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Merging two attentions of the same queries."""

import functools
from typing import NamedTuple

from . import peers, suite, timing

pytestmark = suite.marks


class Case(NamedTuple):
    tokens: int
    heads: int = 32
    size: int = 128
    dtype: str = "bfloat16"

    def __str__(self):
        return f"{self.tokens} tokens, {self.heads}x{self.size} {self.dtype}"


if timing.on_gpu():
    CASES = [
        *(Case(n) for n in (1, 64, 1024, 16384)),
        *(Case(n, 16, 512) for n in (64, 16384)),  # latent attention
        Case(4096, dtype="float32"),
    ]
else:
    CASES = [Case(1), Case(256), Case(256, dtype="float32")]


def make(case):
    op = suite.require("merge_attn_states")
    import torch

    device, dtype = timing.device(), getattr(torch, case.dtype)
    moved = case.tokens * case.heads * 3 * (case.size * dtype.itemsize + 4)
    sets = timing.sets_for(moved)
    shape = (sets, case.tokens, case.heads, case.size)
    prefixes, suffixes = (torch.randn(shape, dtype=dtype, device=device) for _ in "ps")
    lses = [torch.randn((sets, case.heads, case.tokens), device=device) for _ in "ps"]
    output = torch.empty(shape, dtype=dtype, device=device)
    merged = torch.empty_like(lses[0])

    def arguments(i):
        return output[i], prefixes[i], lses[0][i], suffixes[i], lses[1][i], merged[i]

    contenders = {
        suite.OURS: lambda i: functools.partial(op, *arguments(i)),
        # Sums of another rounding: checked here, not byte by byte.
        "torch": suite.Contender(lambda i: torch_merge(*arguments(i)), batch=50),
        "vllm": lambda i: functools.partial(peers.vllm_ops().merge_attn_states, *arguments(i)),
    }
    check(op, arguments(0))
    return suite.Workload(
        "merge_attn_states", str(case), contenders, [], moved, sets, tokens=case.tokens,
        dtype=case.dtype, extra={"heads": case.heads, "head_size": case.size},
    )  # fmt: skip


def check(op, arguments):
    """Ours is what torch finds."""
    torch = timing.torch_module()
    output, *others, merged = arguments
    op(*arguments)
    found = output.clone(), merged.clone()
    torch_merge(output, *others, merged)()
    torch.testing.assert_close(found[0], output, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[1], merged)


def torch_merge(output, prefix, prefix_lse, suffix, suffix_lse, merged):
    """Composed of torch's operations."""
    torch = timing.torch_module()

    def call():
        torch.logaddexp(prefix_lse, suffix_lse, out=merged)
        weights = torch.sigmoid(prefix_lse - suffix_lse).t().unsqueeze(-1)
        output.copy_(torch.lerp(suffix.float(), prefix.float(), weights))

    return call


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders("torch", "vllm"))
