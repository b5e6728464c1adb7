# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying blocks inside the caches of all layers: 32 KiB of keys and of values a block."""

import functools
from typing import NamedTuple

import cupy_cache as cc

from . import peers, suite, timing

pytestmark = suite.marks
BLOCK = (16, 8, 128)  # block size, heads, head size; bfloat16: 32 KiB


class Case(NamedTuple):
    pairs: int
    layers: int = 32
    mapping: str = "host"
    blocks: str = "random"
    same: bool = False  # pairs at each call: what is copied can stay in the L2

    def __str__(self):
        return (
            f"{self.layers} layers, {self.pairs} pairs of 2x32 KiB, {self.blocks} blocks, "
            f"mapping on the {self.mapping}{', the same at each call' if self.same else ''}"
        )


if timing.on_gpu():
    CASES = [*(Case(n) for n in (1, 8, 64, 256)), *(Case(n, mapping="device") for n in (8, 256)),
             Case(64, blocks="consecutive"), Case(1, same=True), Case(8, same=True)]  # fmt: skip
else:
    CASES = [Case(1, 2), Case(8, 2), Case(64, 2)]


def make(case):
    op = suite.require("copy_blocks")
    import torch

    device = timing.device()
    moved = 4 * case.layers * case.pairs * torch.Size(BLOCK).numel() * 2
    sets = 1 if case.same else timing.sets_for(moved)
    num_blocks = max(2 * sets * case.pairs, 1024 if timing.on_gpu() else 256)
    caches = torch.randn((case.layers, 2, num_blocks, *BLOCK), dtype=torch.bfloat16, device=device)
    key_caches, value_caches = list(caches[:, 0]), list(caches[:, 1])
    # Sources are below all destinations, so that repeated calls copy the same bytes.
    half = num_blocks // 2
    ordered = torch.randperm if case.blocks == "random" else torch.arange
    sources, destinations = (ordered(half)[: sets * case.pairs] for _ in range(2))
    table = torch.stack((sources, destinations + half), 1).view(sets, case.pairs, 2)
    on_device = table.to(device)
    pairs = [[tuple(pair) for pair in part] for part in table.tolist()]

    def ours(i):
        mapping = pairs[i] if case.mapping == "host" else on_device[i]
        return functools.partial(op, key_caches, value_caches, mapping)

    bound = cc.PagedKVCache(key_caches, value_caches)

    def torch_copy(i):
        source, destination = on_device[i, :, 0].clone(), on_device[i, :, 1].clone()

        def call():
            for cache in key_caches:
                cache[destination] = cache[source]
            for cache in value_caches:
                cache[destination] = cache[source]

        return call

    contenders = {
        suite.OURS: ours,
        "bound": lambda i: functools.partial(bound.copy_blocks, *ours(i).args[2:]),
        # 128 launches a call: four calls still fit the launch queue.
        "torch": suite.Contender(torch_copy, batch=4 if timing.on_gpu() else None),
        "triton": lambda i: peers.triton_copy_blocks(key_caches, value_caches, on_device[i]),
        "vllm": suite.Contender(
            lambda i: peers.vllm_copy_blocks(key_caches, value_caches, on_device[i]), capture=False
        ),
    }
    written = [caches[layer, tensor, half:] for layer in range(case.layers) for tensor in range(2)]
    return suite.Workload(
        "copy_blocks", str(case), contenders, written, moved, sets,
        dtype="bfloat16", layout="NHD",
        extra={
            "layers": case.layers, "pairs": case.pairs, "blocks": case.blocks,
            "same_pairs": case.same,
        },
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(
    CASES, make, suite.contenders("bound", "torch", "triton", "vllm")
)
