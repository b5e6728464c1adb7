# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Rotating queries and keys and writing keys and values, 32 query heads and 8 of keys and values;
beside it the write alone, and the same in two launches."""

import functools
from typing import NamedTuple

import cupy_cache as cc

from . import suite, timing

pytestmark = suite.marks
BLOCK_SIZE, HEADS, KV_HEADS, SIZE, POSITIONS = 16, 32, 8, 128, 8192


class Case(NamedTuple):
    tokens: int
    kv_cache_dtype: str = "auto"
    layout: str = "NHD"
    slots: str = "random"
    is_neox: bool = True
    table: str = "float32"
    to_out: bool = True
    norm: bool = False
    sections: tuple | None = None
    interleaved: bool = False
    rotary: int = SIZE
    out_dtype: str = "auto"
    dtype: str = "bfloat16"

    def __str__(self):
        kinds = [
            "NeoX" if self.is_neox else "GPT-J",
            "" if self.dtype == "bfloat16" else self.dtype,
            f"{self.layout}, {self.slots} slots",
            "" if self.kv_cache_dtype == "auto" else f"caches in {self.kv_cache_dtype}",
            "" if self.table == "float32" else f"tables in {self.table}",
            "" if self.rotary == SIZE else f"{self.rotary} elements",
            "normalised" if self.norm else "",
            "" if self.to_out else "in place",
            "" if self.out_dtype == "auto" else f"queries in {self.out_dtype}",
            "" if self.sections is None else ("turns" if self.interleaved else "sections"),
        ]
        return f"{self.tokens} tokens, {', '.join(filter(None, kinds))}"


KINDS = (
    {"is_neox": False}, {"to_out": False}, {"is_neox": False, "to_out": False},
    {"table": "bfloat16"}, {"norm": True}, {"dtype": "float16"}, {"dtype": "float32"},
    {"rotary": SIZE // 2}, {"layout": "HND"}, {"kv_cache_dtype": "fp8"},
    {"kv_cache_dtype": "fp8", "out_dtype": "fp8"}, {"kv_cache_dtype": "int8_per_token_head"},
    {"sections": (16, 24, 24)}, {"sections": (24, 20, 20), "interleaved": True},
    {"layout": "x-packed"}, {"layout": "x-packed", "slots": "consecutive"},
)  # fmt: skip
if timing.on_gpu():
    CASES = [
        *(Case(n) for n in (1, 32, 256, 1024, 4096, 16384)),
        *(Case(n, **kind) for kind in KINDS for n in (256, 16384)),
    ]
else:
    CASES = [*(Case(n) for n in (1, 64, 256)), *(Case(64, **kind) for kind in KINDS)]


def make(case):
    op = suite.require("rotary_and_cache")
    import torch

    device, raw = timing.device(), case.kv_cache_dtype == "auto"
    dtype = getattr(torch, case.dtype)
    element = dtype if raw else torch.uint8
    # As all layers of a step, the sets have the same positions. Each row of the table moves once.
    axes = () if case.sections is None else (3,)
    positions = torch.randint(0, POSITIONS, (*axes, case.tokens), device=device)
    table = torch.randn((POSITIONS, case.rotary), device=device).to(getattr(torch, case.table))
    turned = case.rotary / SIZE if not (case.to_out or case.norm) else 1
    queries = dtype.itemsize + (dtype.itemsize if case.out_dtype == "auto" else 1)
    others = 2 * KV_HEADS * (dtype.itemsize + element.itemsize)
    moved = int(case.tokens * SIZE * (HEADS * turned * queries + others))
    moved += positions.unique().numel() * table[0].nbytes
    sets = timing.sets_for(moved)
    num_blocks, slots = suite.slots_for(sets, case.tokens, BLOCK_SIZE, case.slots)
    query, key, value = (
        torch.randn((sets, case.tokens, heads, SIZE), device=device).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    named = {}
    if case.layout == "x-packed":
        x = 16 // element.itemsize
        shapes = (KV_HEADS, SIZE // x, BLOCK_SIZE, x), (KV_HEADS, SIZE, BLOCK_SIZE)
        caches = [torch.empty((num_blocks, *s), dtype=element, device=device) for s in shapes]
        write = cc.reshape_and_cache
    else:
        _, caches = suite.caches(num_blocks, BLOCK_SIZE, KV_HEADS, SIZE, element, case.layout)
        write = cc.reshape_and_cache_flash
    scales = (0.05, 0.05)
    if "head" in case.kv_cache_dtype:
        shape = num_blocks, BLOCK_SIZE, KV_HEADS
        beside = [torch.empty(shape, device=device) for _ in "kv"]
        named |= dict(zip(("k_scale_cache", "v_scale_cache"), beside))
    if case.norm:
        weights = [torch.randn(SIZE, device=device).to(dtype) for _ in "qk"]
        named |= {"norm_eps": 1e-6, "q_norm_weight": weights[0], "k_norm_weight": weights[1]}
    if case.sections is not None:
        named |= {"mrope_section": case.sections, "mrope_interleaved": case.interleaved}
    outs = None
    if case.to_out:
        out_dtype = dtype if case.out_dtype == "auto" else torch.uint8
        outs = torch.empty(query.shape, dtype=out_dtype, device=device)
        named |= {"out_dtype": case.out_dtype, "q_scale": 0.05}

    def fused(i):
        step = positions, query[i], key[i], value[i], table, *caches, slots[i], case.is_neox
        out = {} if outs is None else {"out": outs[i]}
        return functools.partial(op, *step, case.kv_cache_dtype, *scales, **named, **out)

    def write_alone(i):
        step = key[i], value[i], *caches
        if "head" in case.kv_cache_dtype:
            step += *beside, slots[i], case.kv_cache_dtype
            return functools.partial(cc.reshape_and_cache_flash_per_token_head, *step)
        return functools.partial(write, *step, slots[i], case.kv_cache_dtype, *scales)

    contenders = {suite.OURS: fused, "write alone": write_alone}
    return suite.Workload(
        "rotary_and_cache", str(case), contenders, [], moved, sets, tokens=case.tokens,
        dtype=case.dtype, layout=case.layout,
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(CASES, make, (suite.OURS, "write alone"))
