# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks of all layers to and from one buffer, blocks filled with zeros, whole arrays to and from
fp8."""

import functools
from typing import NamedTuple

from . import peers, suite, timing

pytestmark = suite.marks
BLOCK = (16, 8, 128)  # block size, heads, head size; bfloat16: 32 KiB
BLOCK_BYTES = 32 << 10
LAYERS = 32 if timing.on_gpu() else 2


class Blocks(NamedTuple):
    op: str
    count: int

    def __str__(self):
        return f"{LAYERS} layers, {self.count} blocks of 2x32 KiB"


class Convert(NamedTuple):
    source: str
    elements: int

    def __str__(self):
        to = "bfloat16" if self.source == "fp8" else "fp8"
        return f"{self.elements} elements, {self.source} to {to}"


BLOCK_OPS = ("pack_blocks", "unpack_blocks", "zero_blocks")
if timing.on_gpu():
    CASES = [
        *(Blocks(op, n) for op in BLOCK_OPS for n in (1, 64)),
        *(Convert("bfloat16", n) for n in (1 << 16, 1 << 25)),
        Convert("fp8", 1 << 25),
    ]
else:
    CASES = [*(Blocks(op, 8) for op in BLOCK_OPS), Convert("bfloat16", 1 << 16),
             Convert("fp8", 1 << 16)]  # fmt: skip


def make(case):
    return (_convert if isinstance(case, Convert) else _blocks)(case)


def _blocks(case):
    op = suite.require(case.op)
    import torch

    device, dtype = timing.device(), torch.bfloat16
    packed_bytes = LAYERS * 2 * case.count * BLOCK_BYTES
    moved = packed_bytes if case.op == "zero_blocks" else 2 * packed_bytes
    sets = timing.sets_for(moved)
    num_blocks = max(sets * case.count, 256 if timing.on_gpu() else 32)
    caches = torch.randn((LAYERS, 2, num_blocks, *BLOCK), dtype=dtype, device=device)
    layers = [(key, value) for key, value in caches]
    chosen = torch.randperm(num_blocks)[: sets * case.count].view(sets, case.count)
    on_device, ids = chosen.to(device), chosen.tolist()
    packed = None
    if case.op != "zero_blocks":
        packed = torch.randn((sets, LAYERS, 2, case.count, *BLOCK), dtype=dtype, device=device)

    def ours(i):
        arguments = {
            "pack_blocks": lambda: (layers, ids[i], packed[i]),
            "unpack_blocks": lambda: (packed[i], layers, ids[i]),
            "zero_blocks": lambda: (layers, ids[i]),
        }
        return functools.partial(op, *arguments[case.op]())

    def torch_blocks(i):
        index = on_device[i]
        tensors = list(caches.flatten(0, 1))
        parts = [None] * len(tensors) if packed is None else list(packed[i].flatten(0, 1))
        step = {
            "pack_blocks": lambda cache, part: torch.index_select(cache, 0, index, out=part),
            "unpack_blocks": lambda cache, part: cache.index_copy_(0, index, part),
            "zero_blocks": lambda cache, part: cache.index_fill_(0, index, 0),
        }[case.op]

        def call():
            for cache, part in zip(tensors, parts):
                step(cache, part)

        return call

    contenders = {
        suite.OURS: ours,
        # 64 launches a call: eight calls fit the launch queue.
        "torch": suite.Contender(torch_blocks, batch=8),
    }
    return suite.Workload(
        case.op, str(case), contenders, [packed[0] if case.op == "pack_blocks" else caches],
        moved, sets, dtype="bfloat16", extra={"layers": LAYERS, "blocks": case.count},
    )  # fmt: skip


def _convert(case):
    op = suite.require("convert_fp8")
    import torch

    device, dtype = timing.device(), peers.torch_fp8("fp8")
    moved = case.elements * (2 + 1)
    sets = timing.sets_for(moved)
    shape = (sets, case.elements)
    numbers = torch.randn(shape, dtype=torch.bfloat16, device=device)
    stored = torch.randint(0, 64, shape, dtype=torch.uint8, device=device)
    scale = torch.full((1,), 0.03, device=device)
    output, source = (numbers, stored) if case.source == "fp8" else (stored, numbers)

    def torch_convert(i):
        to, of = output[i], source[i]
        if case.source == "fp8":
            return lambda: to.copy_(of.view(dtype).float() * scale)
        return lambda: to.copy_(peers.torch_quantise(of, scale, dtype))

    contenders = {
        suite.OURS: lambda i: functools.partial(op, output[i], source[i], scale),
        "torch": suite.Contender(torch_convert, batch=50),
    }
    return suite.Workload(
        "convert_fp8", str(case), contenders, [output[0]], moved, sets, dtype=case.source,
        extra={"elements": case.elements},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders("torch"))
