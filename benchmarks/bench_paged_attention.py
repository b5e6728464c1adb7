# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Attention of a step's queries over the pages of their sequences.

Beside it: ``read``, a kernel that only reads as many contiguous bytes; and ``dense``, torch's
attention on contiguous keys and values, without pages.
"""

import functools
import random
from typing import NamedTuple

import pytest

from . import suite, timing
from .baselines import bare_read

pytestmark = suite.marks
BY_TOKEN = "_per_token_head"  # there is a scale for each token and head
STORED = {
    "fp8": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "int8": "int8",
    f"fp8{BY_TOKEN}": "float8_e4m3fn", f"int8{BY_TOKEN}": "int8",
}  # fmt: skip
RAGGED = (128, 8192)  # tokens of the shortest and the longest sequence


class Case(NamedTuple):
    sequences: int
    tokens: int  # of each sequence; 0: ragged
    heads: tuple = (32, 8)  # of queries, of keys and values
    size: int = 128
    block_size: int = 16
    stored: str = "auto"
    queries: int = 1  # of each sequence
    layout: str = "NHD"
    option: str = ""

    def __str__(self):
        tokens = self.tokens or f"{RAGGED[0]} to {RAGGED[1]}"
        parts = [f"{self.sequences} x {tokens}", f"{self.heads[0]}/{self.heads[1]} x {self.size}"]
        parts += [f"blocks of {self.block_size}"] * (self.block_size != 16)
        parts += [self.layout] * (self.layout != "NHD")
        parts += [self.stored if self.stored != "auto" else "bfloat16"]
        parts += [f"{self.queries} queries"] * (self.queries != 1)
        return ", ".join([*parts, *([self.option] if self.option else [])])


if timing.on_gpu():
    CASES = [
        *(Case(1, n) for n in (512, 4096, 32768)),
        *(Case(8, n) for n in (1024, 8192)),
        *(Case(64, n) for n in (1024, 4096, 0)),
        Case(256, 512),
        *(Case(64, 4096, heads) for heads in ((8, 8), (24, 8), (64, 8), (128, 8))),
        Case(64, 1024, (8, 8)),
        *(Case(64, 4096, size=size) for size in (64, 80, 96)),
        *(Case(32, 4096, size=size) for size in (192, 256)),
        *(Case(64, 4096, block_size=size) for size in (8, 32, 64, 128)),
        *(Case(64, 4096, layout=layout) for layout in ("HND", "x-packed")),
        *(Case(n, 4096, stored="fp8") for n in (1, 64)),
        *(Case(64, n, stored="fp8") for n in (1024, 8192, 0)),
        *(Case(64, 4096, stored=stored) for stored in ("fp8_e5m2", "int8")),
        *(Case(64, n, stored=f"fp8{BY_TOKEN}") for n in (1024, 4096, 0)),
        *(Case(64, 4096, stored=f"int8{BY_TOKEN}", layout=name) for name in ("NHD", "HND", "page")),
        *(Case(64, 4096, queries=n) for n in (2, 4, 16)),
        Case(1, 4096, queries=2048),
        *(Case(64, 4096, option=option) for option in ("slopes", "soft cap", "sinks", "lse")),
        Case(64, 4096, option="window of 4096"),
    ]  # fmt: skip
else:
    CASES = [Case(2, 64, (8, 2), 64, stored=stored) for stored in ("auto", f"int8{BY_TOKEN}")]


def lengths_of(case):
    """Tokens of each sequence; ragged ones are the same at every run."""
    if case.tokens:
        return [case.tokens] * case.sequences
    generator = random.Random(0)
    return [generator.randint(*RAGGED) for _ in range(case.sequences)]


def make(case):
    op = suite.require("paged_attention")
    torch, device = timing.torch_module(), timing.device()
    lengths = lengths_of(case)
    query_heads, heads = case.heads
    head_bytes = case.size * (2 if case.stored == "auto" else 1)
    head_bytes += 4 if case.stored.endswith(BY_TOKEN) else 0
    read = 2 * sum(lengths) * heads * head_bytes
    sets = timing.sets_for(read)
    blocks, tables, _ = _pages(lengths, sets, case.block_size)
    keys, values, scales = _caches(case, blocks)
    tokens = case.sequences * case.queries
    query = torch.randn((tokens, query_heads, case.size), device=device).to(torch.bfloat16)
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    out = torch.empty_like(query)
    options = {"out": out, "kv_cache_dtype": case.stored, **scales}
    if case.queries != 1:
        starts = torch.arange(case.sequences + 1, dtype=torch.int32, device=device)
        options["query_start_loc"] = starts * case.queries
    if case.option == "slopes":
        options["alibi_slopes"] = torch.rand(query_heads, device=device)
    elif case.option == "soft cap":
        options["soft_cap"] = 50.0
    elif case.option == "sinks":
        options["sinks"] = torch.randn(query_heads, device=device)
    elif case.option == "lse":
        options["lse"] = torch.empty((tokens, query_heads), device=device)
    elif case.option:
        options["sliding_window"] = int(case.option.split()[-1])

    def ours(i):
        return functools.partial(op, query, keys, values, tables[i], lens, **options)

    def dense(i):
        if case.stored != "auto" or not case.tokens or case.option or not timing.on_gpu():
            pytest.skip("dense: equally long sequences in the query's dtype, without options")
        # All sets share one memory: it is longer than the L2 all the same.
        shape = case.sequences, heads, case.tokens, case.size
        pair = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
        queries = query.view(case.sequences, case.queries, query_heads, case.size).transpose(1, 2)
        mask = None
        if case.queries != 1:
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(case.queries, case.tokens)
        return functools.partial(
            torch.nn.functional.scaled_dot_product_attention, queries, *pair, attn_mask=mask,
            enable_gqa=query_heads != heads,
        )  # fmt: skip

    contenders = {suite.OURS: ours, "dense": suite.Contender(dense, host=False)}
    load = Load(
        "paged_attention", str(case), contenders, [], read, sets, tokens=tokens,
        dtype="bfloat16", layout=case.layout,
        extra={
            "sequences": case.sequences, "lengths": case.tokens or "ragged", "stored": case.stored,
            "heads": query_heads, "kv_heads": heads, "head_size": case.size,
            "block_size": case.block_size, "queries": case.queries, "option": case.option,
        },
    )  # fmt: skip
    if case.layout != "x-packed":
        _check(case, ours(0), query, keys, values, tables[0], lengths, options)
    return load


class Load(suite.Workload):
    """A workload that is held against the bare read of its bytes too."""

    def ceiling(self):
        super().ceiling()
        if not timing.on_gpu():
            return
        self.record["read_us"] = bare_read.read_us(self.record["bytes"])
        self.record["of_read"] = self.record["read_us"] / self.record["device_us"]


def _pages(lengths, sets, block_size):
    torch = timing.torch_module()
    pages = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sets * sum(pages)).to(torch.int32)
    tables = torch.zeros((sets, len(lengths), max(pages)), dtype=torch.int32)
    at = 0
    for table in tables:
        for row, count in zip(table, pages):
            row[:count] = order[at : at + count]
            at += count
    return len(order), tables.to(timing.device()), pages


def _caches(case, blocks):
    """(Keys, values, the caches of their scales by argument)."""
    torch, device = timing.torch_module(), timing.device()
    heads, size = case.heads[1], case.size
    pair = []
    for shape in ((size, case.block_size), (case.block_size, size)):
        cache = torch.empty((blocks, heads, *shape), device=device, dtype=torch.bfloat16)
        cache.normal_()
        if case.stored != "auto":
            scaled = cache * 30 if case.stored == "int8" else cache
            cache = scaled.to(getattr(torch, STORED[case.stored]))
        pair.append(cache)
    if case.layout == "x-packed":
        x = 16 // pair[0].element_size()
        keys = pair[0].view(blocks, heads, size // x, case.block_size, x)
        return keys, pair[1].view(blocks, heads, size, case.block_size), {}
    by_head = case.layout in ("HND", "page")
    inner = (heads, case.block_size) if by_head else (case.block_size, heads)
    pair = [cache.view(blocks, *inner, size) for cache in pair]
    scales = []
    if case.stored.endswith(BY_TOKEN):
        scales = [torch.rand((blocks, *inner), device=device) / 64 + 1 / 64 for _ in "kv"]
    if case.layout == "page":  # of each head and slot: key, its scale, value, its scale
        page = torch.empty((blocks, *inner, 2 * (size + 4)), device=device, dtype=torch.uint8)
        numbers = page.view(torch.float32)
        for at, side in enumerate((0, size + 4)):
            page[..., side : side + size] = pair[at].view(torch.uint8)
            numbers[..., (side + size) // 4] = scales[at]
            pair[at], scales[at] = page[..., side : side + size], numbers[..., (side + size) // 4]
    pair, scales = (
        [cache.transpose(1, 2) if by_head else cache for cache in caches]
        for caches in (pair, scales)
    )
    return *pair, dict(zip(("k_scale_cache", "v_scale_cache"), scales))


def _numbers(case, elements, scales, pages):
    """What these ``pages`` of a cache, and of its scales if there are any, mean."""
    torch = timing.torch_module()
    if case.stored != "auto":
        elements = elements.view(getattr(torch, STORED[case.stored]))
    return elements.float() if scales is None else elements.float() * scales[pages][..., None]


def _check(case, call, query, keys, values, table, lengths, options):
    """Compare a few sequences with the plain computation in float32."""
    torch = timing.torch_module()
    out = options["out"]
    out.fill_(float("nan"))
    call()
    group = case.heads[0] // case.heads[1]
    for b in {0, len(lengths) - 1}:
        length, first = lengths[b], b * case.queries
        pages = table[b, : -(-length // case.block_size)].long()
        k, v = (
            _numbers(case, cache[pages], options.get(name), pages)
            .flatten(0, 1)[:length]
            .repeat_interleave(group, 1)
            for cache, name in ((keys, "k_scale_cache"), (values, "v_scale_cache"))
        )
        q = query[first : first + case.queries].float()
        logits = torch.einsum("qhd,khd->hqk", q, k) * case.size**-0.5
        if "soft_cap" in options:
            logits = options["soft_cap"] * torch.tanh(logits / options["soft_cap"])
        k_at = torch.arange(length, device=q.device)
        q_at = torch.arange(length - case.queries, length, device=q.device)[:, None]
        if "alibi_slopes" in options:
            logits += options["alibi_slopes"][:, None, None] * (k_at - q_at)
        logits.masked_fill_(k_at > q_at, float("-inf"))
        if "sinks" in options:
            sinks = options["sinks"][:, None, None].expand(-1, case.queries, 1)
            logits = torch.cat((logits, sinks), -1)
        weights = torch.softmax(logits, -1)[..., :length]
        wanted = torch.einsum("hqk,khd->qhd", weights, v)
        got = out[first : first + case.queries].float()
        error = (got - wanted).norm() / wanted.norm()
        assert error < 0.01, f"relative error {error:.4f} in sequence {b}"


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders("dense"))
