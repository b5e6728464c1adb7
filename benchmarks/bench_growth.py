# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""How the cost of a call grows with the work: its device time with the bytes that move, from 1 MiB
to 4 GiB, and its host time with tokens, heads, blocks, layers and pairs, of which it should depend
on the last two alone. The workloads are those of the operations' own files."""

import functools
from typing import NamedTuple

from . import bench_copy_blocks, bench_gather_cache, bench_reshape_and_cache_flash, suite, timing

pytestmark = suite.marks
MIB = 1 << 20
ROW = (8, 128)  # heads, head size: 2 KiB in bfloat16
BYTES, HOST = "growth", "growth, host"


class Case(NamedTuple):
    op: str
    name: str
    make: object  # -> `Workload`

    def __str__(self):
        return self.name


def _write(mib):
    tokens = mib * MIB // (8 << 10)  # keys and values, read and written
    case = bench_reshape_and_cache_flash.Case(tokens)
    make = functools.partial(bench_reshape_and_cache_flash.make, case)
    return Case(BYTES, f"reshape_and_cache_flash, {mib} MiB", make)


def _copy(mib):
    layers = 8 if timing.on_gpu() else 2
    case = bench_copy_blocks.Case(mib * MIB // (layers * (128 << 10)), layers)
    make = functools.partial(bench_copy_blocks.make, case)
    return Case(BYTES, f"copy_blocks, {mib} MiB", make)


def _gather(mib):
    case = bench_gather_cache.Case(mib * MIB // (4 << 10), 8, ROW, "NHD")
    make = functools.partial(bench_gather_cache.make, case)
    return Case(BYTES, f"gather_cache, {mib} MiB", make)


def _host_of_write(tokens=256, heads=8, blocks=1024):
    case = bench_reshape_and_cache_flash.Case(tokens, heads, blocks=blocks)
    make = functools.partial(bench_reshape_and_cache_flash.make, case)
    name = f"reshape_and_cache_flash, {tokens} tokens, {heads} heads, {blocks} blocks"
    return Case(HOST, name, make)


def _host_of_copy(layers=32, pairs=8):
    make = functools.partial(bench_copy_blocks.make, bench_copy_blocks.Case(pairs, layers))
    return Case(HOST, f"copy_blocks, {layers} layers, {pairs} pairs", make)


if timing.on_gpu():
    SIZES = (1, 16, 64, 256, 1024, 4096)
    CASES = [
        *(make(mib) for make in (_write, _copy, _gather) for mib in SIZES),
        *(_host_of_write(tokens=n) for n in (1, 256, 4096)),
        *(_host_of_write(heads=n) for n in (1, 64)),
        _host_of_write(blocks=64 << 10),
        *(_host_of_copy(layers=n) for n in (1, 8, 32, 64)),
        *(_host_of_copy(pairs=n) for n in (1, 64, 256)),
    ]
else:
    CASES = [*(make(mib) for make in (_write, _copy, _gather) for mib in (1, 16)),
             *(_host_of_write(n) for n in (1, 256)),
             *(_host_of_copy(n, 1) for n in (1, 8))]  # fmt: skip


def make(case):
    load = case.make()
    load.record.update(op=case.op, case=case.name)
    return load


load, test_device, test_host = suite.benchmarks(CASES, make, suite.contenders("bound"))
