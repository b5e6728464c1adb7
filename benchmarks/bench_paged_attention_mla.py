# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention of a step's queries over the pages of their sequences.

Entries have 512 + 64 elements. Beside it ``read``, a kernel that only reads as many contiguous
bytes.
"""

import functools
from typing import NamedTuple

from . import bench_paged_attention as attention
from . import suite, timing

pytestmark = suite.marks
LATENT, ROPE = 512, 64
ENTRY_BYTES = {"auto": 1152, "fp8": 576, "int8": 576, "fp8_ds_mla": 656}
SCALE = 192**-0.5


class Case(NamedTuple):
    sequences: int
    tokens: int  # of each sequence; 0: ragged
    heads: int = 16
    block_size: int = 64
    stored: str = "auto"
    queries: int = 1  # of each sequence

    def __str__(self):
        least, most = attention.RAGGED
        tokens = self.tokens or f"{least} to {most}"
        parts = [f"{self.sequences} x {tokens}", f"{self.heads} heads"]
        parts += [f"blocks of {self.block_size}"] * (self.block_size != 64)
        parts += [self.stored if self.stored != "auto" else "bfloat16"]
        parts += [f"{self.queries} queries"] * (self.queries != 1)
        return ", ".join(parts)


if timing.on_gpu():
    CASES = [
        *(Case(1, n) for n in (512, 4096, 32768)),
        *(Case(n, 8192) for n in (8, 16, 128, 132)),
        *(Case(n, 4096) for n in (32, 64, 128)),
        *(Case(n, 0) for n in (64, 256)),
        Case(256, 512),
        *(Case(128, 4096, block_size=size) for size in (1, 16)),
        *(Case(128, 4096, heads) for heads in (1, 8, 32, 64, 128)),
        Case(16, 4096, 128),
        *(Case(n, 8192, stored=s) for s in ("fp8", "int8", "fp8_ds_mla") for n in (1, 128)),
        *(Case(256, 0, stored=s) for s in ("fp8", "fp8_ds_mla")),
        *(Case(128, 4096, queries=n) for n in (2, 4)),
    ]  # fmt: skip
else:
    CASES = [Case(2, 64, 4)]


def make(case):
    op = suite.require("paged_attention_mla")
    torch, device = timing.torch_module(), timing.device()
    lengths = attention.lengths_of(case)
    read = sum(lengths) * ENTRY_BYTES[case.stored]
    sets = timing.sets_for(read)
    blocks, tables, _ = attention._pages(lengths, sets, case.block_size)
    cache = _cache(case, blocks)
    tokens = case.sequences * case.queries
    query = torch.randn((tokens, case.heads, LATENT + ROPE), device=device).to(torch.bfloat16)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = torch.empty((tokens, case.heads, LATENT), device=device, dtype=torch.bfloat16)
    options = {"scale": SCALE, "out": out, "kv_cache_dtype": case.stored}
    if case.stored in ("fp8", "int8"):
        options["kv_scale"] = 1.0 if case.stored == "fp8" else 1 / 30
    if case.queries != 1:
        starts = torch.arange(case.sequences + 1, dtype=torch.int32, device=device)
        options["query_start_loc"] = starts * case.queries

    def ours(i):
        return functools.partial(op, query, cache, tables[i], lens, **options)

    load = attention.Load(
        "paged_attention_mla", str(case), {suite.OURS: ours}, [], read, sets, tokens=tokens,
        dtype="bfloat16", layout="rows",
        extra={
            "sequences": case.sequences, "lengths": case.tokens or "ragged", "stored": case.stored,
            "heads": case.heads, "block_size": case.block_size, "queries": case.queries,
        },
    )  # fmt: skip
    _check(case, ours(0), query, cache, tables[0], lengths, out)
    return load


def _cache(case, blocks):
    """Entries of standard normal numbers."""
    torch, device = timing.torch_module(), timing.device()
    shape = blocks, case.block_size
    if case.stored == "fp8_ds_mla":
        cache = torch.empty((*shape, 656), device=device, dtype=torch.uint8)
        step = max(1, (1 << 18) // case.block_size)
        for first in range(0, blocks, step):
            part = cache[first : first + step]
            slots = torch.arange(part.shape[0] * case.block_size, device=device)
            rows = torch.randn((len(slots), LATENT + ROPE), device=device).to(torch.bfloat16)
            write = suite.require("concat_and_cache_mla")
            write(rows[:, :LATENT], rows[:, LATENT:], part, slots, "fp8_ds_mla")
        return cache
    cache = torch.empty((*shape, LATENT + ROPE), device=device, dtype=torch.bfloat16).normal_()
    if case.stored == "int8":
        return (cache * 30).to(torch.int8)
    return cache.to(torch.float8_e4m3fn) if case.stored == "fp8" else cache


def _numbers(case, entries):
    """Entries as float32."""
    torch = timing.torch_module()
    if case.stored != "fp8_ds_mla":
        return entries.float() * (1 / 30 if case.stored == "int8" else 1)
    latent = entries[:, :512].contiguous().view(torch.float8_e4m3fn).float().view(-1, 4, 128)
    scales = entries[:, 512:528].contiguous().view(torch.float32)[..., None]
    rope = entries[:, 528:].contiguous().view(torch.bfloat16).float()
    return torch.cat(((latent * scales).flatten(1), rope), 1)


def _check(case, call, query, cache, table, lengths, out):
    """Compare a few sequences with the plain computation in float32."""
    torch = timing.torch_module()
    out.fill_(float("nan"))
    call()
    for b in {0, len(lengths) - 1}:
        length, first = lengths[b], b * case.queries
        pages = table[b, : -(-length // case.block_size)].long()
        entries = _numbers(case, cache[pages].flatten(0, 1)[:length])
        logits = query[first : first + case.queries].float() @ entries.T * SCALE
        if case.queries != 1:
            k_at = torch.arange(length, device=logits.device)
            q_at = torch.arange(length - case.queries, length, device=logits.device)
            logits.masked_fill_(k_at > q_at[:, None, None], float("-inf"))
        wanted = torch.softmax(logits, -1) @ entries[:, :LATENT]
        error = (out[first : first + case.queries].float() - wanted).norm() / wanted.norm()
        assert error < 0.01, f"relative error {error:.4f} in sequence {b}"


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders())
