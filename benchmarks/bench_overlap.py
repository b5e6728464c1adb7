# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Launches one behind the other, with and without overlap: single operations, and a decode layer's
work on the cache, in fused launches and in separate ones."""

import functools
from typing import NamedTuple

import pytest

import cupy_cache as cc

from . import suite, timing

pytestmark = suite.marks
OVERLAPPING = "overlapping"
SEPARATE = "separate launches"
WHO = suite.OURS, OVERLAPPING, SEPARATE, f"{SEPARATE}, {OVERLAPPING}"
BLOCK_SIZE, HEADS, KV_HEADS, SIZE, LATENT, ROPE, POSITIONS = 16, 32, 8, 128, 512, 64, 8192
BLOCKS = 8192


class Case(NamedTuple):
    kind: str
    tokens: int
    length: int = 0  # of each sequence, where there is attention

    def __str__(self):
        return f"{self.kind}, {self.tokens}" + (f" x {self.length}" if self.length else " tokens")


if timing.on_gpu():
    CASES = [
        *(Case("NHD write", n) for n in (1, 32, 256, 4096)),
        *(Case("MLA write", n) for n in (1, 64, 4096)),
        *(Case("rotary and write", n) for n in (1, 32, 256)),
        *(Case("slot mapping", n) for n in (1, 256)),
        *(Case("attention", n, length) for n, length in ((1, 512), (1, 4096), (64, 1024))),
        *(Case("decode layer", n, length) for n, length in ((1, 512), (1, 4096), (64, 1024))),
    ]
else:
    CASES = [Case("NHD write", 4), Case("decode layer", 2, 32)]


def make(case):
    torch = timing.torch_module() or pytest.skip("the benchmarks hold their arrays in torch")
    device, n = timing.device(), case.tokens
    sets = 60 if timing.on_gpu() and not case.length else 2

    def random(*shape):
        return torch.randn(shape, device=device).to(torch.bfloat16)

    query, key, value = (random(sets, n, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS))
    turned, attended = torch.empty_like(query), torch.empty_like(query)
    caches = [random(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE) for _ in "kv"]
    latents, ropes = random(sets, n, LATENT), random(sets, n, ROPE)
    entries = random(BLOCKS, BLOCK_SIZE, LATENT + ROPE)
    slots = torch.randint(0, BLOCKS * BLOCK_SIZE, (sets, n), device=device)
    positions = torch.full((n,), max(case.length - 1, 0), device=device)
    angles = torch.randn((POSITIONS, SIZE), device=device).cos()
    pages = -(-max(case.length, 1) // BLOCK_SIZE)
    tables = torch.randint(0, BLOCKS, (sets, n, pages), dtype=torch.int32, device=device)
    lengths = torch.full((n,), case.length, dtype=torch.int32, device=device)
    starts = torch.arange(n + 1, dtype=torch.int32, device=device)

    def rotary_and_write(i):
        step = positions, query[i], key[i], value[i], angles, *caches, slots[i]
        cc.rotary_and_cache(*step, out=turned[i])

    def separate_rotary(i):
        cc.rotary_embedding(positions, query[i], key[i], SIZE, angles)
        write(i)

    def write(i):
        cc.reshape_and_cache_flash(key[i], value[i], *caches, slots[i])

    def write_latents(i):
        cc.concat_and_cache_mla(latents[i], ropes[i], entries, slots[i])

    def map_slots(i):
        cc.slot_mapping(tables[i], positions, starts, BLOCK_SIZE, out=slots[i])

    def attend(i):
        cc.paged_attention(turned[i], *caches, tables[i], lengths, out=attended[i])

    def layer(i):
        rotary_and_write(i)
        attend(i)

    def separate_layer(i):
        separate_rotary(i)
        cc.paged_attention(query[i], *caches, tables[i], lengths, out=attended[i])

    call, apart = {
        "NHD write": (write, None),
        "MLA write": (write_latents, None),
        "rotary and write": (rotary_and_write, separate_rotary),
        "slot mapping": (map_slots, None),
        "attention": (attend, None),
        "decode layer": (layer, separate_layer),
    }[case.kind]
    called = {suite.OURS: call, OVERLAPPING: call}
    if apart is not None:
        called |= {SEPARATE: apart, f"{SEPARATE}, {OVERLAPPING}": apart}
    contenders = {
        name: functools.partial(functools.partial, function) for name, function in called.items()
    }
    return suite.Workload(
        "overlap", str(case), contenders, [], 0, sets, tokens=n, dtype="bfloat16", ops=200
    )


@pytest.fixture(scope="module", params=CASES, ids=suite.ids(CASES))
def load(request):
    yield from suite.opened(make(request.param))


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("measure", [suite.measure_device, suite.measure_host])
def test_overlap(benchmark, load, who, measure):
    with cc.overlap(OVERLAPPING in who):
        measure(benchmark, load, who)
