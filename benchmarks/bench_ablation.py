# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What each founding optimisation is worth: each alone switched off, and all together.

Three figures: the kernels' device time (tables uploaded beforehand where a version uploads), the
caller's time per call, and the time per call from the first of many calls to the end of the GPU's
work. "control" is the baselines' code with nothing switched off; beside the library's own call it
shows what else differs. GPU only.
"""

import functools

import pytest

import cupy_cache as cc

from . import baselines, suite, timing

pytestmark = suite.marks

LAYERS = 32
BLOCK = (16, 8, 128)  # bfloat16: 32 KiB
SLOPES = 32
STEP_PAIRS, STEP_TOKENS = 8, 256
OFF = {
    "1 off: synchronising uploads": {"upload": True},
    "2 off: two scalar loops": {"two_loops": True},
    "3 off: min(n, 512) threads": {"capped": True},
}
ALL_OFF = {"upload": True, "two_loops": True, "capped": True}
CONTROL, SLOPES_OFF, ALL = "control", "4 off: slopes through the CPU", "all off"
BOUND = "cupy_cache, bound"
COPY_VERSIONS = {CONTROL: {}, **OFF, ALL: ALL_OFF}

CASES = [
    *(("copy_blocks", n) for n in (1, 8, 64, 256)),
    *(("write", shape) for shape in ((256, 1, 80), (4096, 1, 80), (4096, 5, 40), (4096, 8, 128))),
    ("slopes", SLOPES),
    ("step", None),
]


class _Copies:
    """Caches of all layers, and for each buffer set a list of pairs."""

    def __init__(self, pairs):
        import torch

        self.moved = 4 * LAYERS * pairs * torch.Size(BLOCK).numel() * 2
        self.sets = timing.sets_for(self.moved)
        half = max(self.sets * pairs, 256)
        caches = torch.randn((LAYERS, 2, 2 * half, *BLOCK), device="cuda", dtype=torch.bfloat16)
        self.caches = list(caches[:, 0]), list(caches[:, 1])
        self.cache = cc.PagedKVCache(*self.caches)
        self.written = [
            caches[layer, tensor, half:] for layer in range(LAYERS) for tensor in range(2)
        ]
        table = torch.stack([torch.randperm(half)[: self.sets * pairs] for _ in range(2)], 1)
        table[:, 1] += half
        self.pairs = [[tuple(p) for p in part] for part in table.view(self.sets, pairs, 2).tolist()]

    def library(self, i):
        return functools.partial(cc.copy_blocks, *self.caches, self.pairs[i])

    def bound(self, i):
        return functools.partial(self.cache.copy_blocks, self.pairs[i])

    def version(self, i, **off):
        return functools.partial(baselines.copy_blocks, *self.caches, self.pairs[i], **off)

    def kernels(self, i, **off):
        """The kernel alone: what it reads is on the device already."""
        tables = baselines.upload_tables(*self.caches, self.pairs[i]) if off.get("upload") else None
        return self.version(i, **off, tables=tables)

    def contender(self, off):
        return suite.Contender(
            lambda i: self.version(i, **off), kernels=lambda i: self.kernels(i, **off)
        )


class _Writes:
    """Rows for random slots of one cache."""

    def __init__(self, tokens, heads, size):
        import torch

        self.moved = 4 * tokens * heads * size * 2
        self.sets = timing.sets_for(self.moved)
        num_blocks = max(self.sets * tokens, 65536) // 16
        self.rows = torch.randn(
            (2, self.sets, tokens, heads, size), device="cuda", dtype=torch.bfloat16
        )
        self.caches = [
            torch.empty((num_blocks, 16, heads, size), device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        ]
        slots = torch.randperm(num_blocks * 16, device="cuda")[: self.sets * tokens]
        self.slots = slots.view(self.sets, tokens)

    def arguments(self, i):
        return self.rows[0, i], self.rows[1, i], *self.caches, self.slots[i]

    def library(self, i):
        return functools.partial(cc.reshape_and_cache_flash, *self.arguments(i))

    def version(self, i, **off):
        return functools.partial(baselines.write_rows, *self.arguments(i), **off)


class _Slopes:
    """The slopes of an ALiBi model, ours and from a list."""

    def __init__(self):
        self.list = [2.0 ** (-8 * (i + 1) / SLOPES) for i in range(SLOPES)]

        for _ in range(2):  # the second call finds the kernel finished, and remembers
            self.library()()
            timing.torch_module().cuda.synchronize()

    def library(self):
        return functools.partial(cc.alibi_slopes, SLOPES, framework="torch", device="cuda")

    def version(self):
        return functools.partial(baselines.slopes_through_cpu, self.list, "cuda")


def _copy_workload(pairs):
    copies = _Copies(pairs)
    contenders = {suite.OURS: copies.library, BOUND: copies.bound}
    contenders |= {name: copies.contender(off) for name, off in COPY_VERSIONS.items()}
    case = f"copy_blocks, {LAYERS} layers, {pairs} pairs of 2x32 KiB"
    return suite.Workload(
        "ablation", case, contenders, copies.written, copies.moved, copies.sets, dtype="bfloat16"
    )


def _write_workload(shape):
    writes = _Writes(*shape)
    contenders = {
        suite.OURS: writes.library,
        CONTROL: writes.version,
        "3 off: min(n, 512) threads": lambda i: writes.version(i, capped=True),
    }
    case = "write, {} tokens, {}x{}".format(*shape)
    return suite.Workload(
        "ablation", case, contenders, writes.caches, writes.moved, writes.sets, tokens=shape[0],
        dtype="bfloat16",
    )  # fmt: skip


def _slopes_workload(heads):
    suite.require("alibi_slopes")
    slopes = _Slopes()
    contenders = {
        suite.OURS: suite.Contender(lambda i: slopes.library(), launches=False),
        SLOPES_OFF: suite.Contender(lambda i: slopes.version(), capture=False),
    }
    case = f"slopes of {heads} heads"
    return suite.Workload("ablation", case, contenders, [], 0, 1, dtype="float32")


def _step_workload(_):
    """One decoding step of an ALiBi model: forked beams are copied (bound to their caches, as an
    engine would), new tokens written, slopes asked for."""
    suite.require("alibi_slopes")
    copies, writes, slopes = _Copies(STEP_PAIRS), _Writes(STEP_TOKENS, *BLOCK[1:]), _Slopes()

    def step(*parts):
        def call():
            for part in parts:
                part()

        return call

    def library(i):
        return step(copies.bound(i), writes.library(i % writes.sets), slopes.library())

    def without(i, slopes_off=False, **off):
        """Only what an optimisation concerns is the baseline's; the rest is the library's."""
        copied = copies.version(i, **off) if off else copies.bound(i)
        capped = off.get("capped", False)
        j = i % writes.sets
        written = writes.version(j, capped=True) if capped else writes.library(j)
        return step(copied, written, slopes.version() if slopes_off else slopes.library())

    waits = {"capture": False}
    contenders = {
        suite.OURS: library,
        "1 off: synchronising uploads": suite.Contender(lambda i: without(i, upload=True), **waits),
        "2 off: two scalar loops": lambda i: without(i, two_loops=True),
        "3 off: min(n, 512) threads": lambda i: without(i, capped=True),
        SLOPES_OFF: suite.Contender(lambda i: without(i, slopes_off=True), **waits),
        ALL: suite.Contender(lambda i: without(i, slopes_off=True, **ALL_OFF), **waits),
    }
    case = f"step: {STEP_PAIRS} pairs copied, {STEP_TOKENS} tokens written, {SLOPES} slopes"
    return suite.Workload(
        "ablation", case, contenders, [*copies.written, *writes.caches],
        copies.moved + writes.moved, copies.sets, tokens=STEP_TOKENS, dtype="bfloat16",
    )  # fmt: skip


MAKERS = {
    "copy_blocks": _copy_workload,
    "write": _write_workload,
    "slopes": _slopes_workload,
    "step": _step_workload,
}


@pytest.fixture(scope="module", params=CASES, ids=suite.ids(f"{k} {v}" for k, v in CASES))
def load(request):
    suite.require("copy_blocks")
    suite.gpu_only()
    kind, value = request.param
    yield from suite.opened(MAKERS[kind](value))


WHO = [suite.OURS, BOUND, *COPY_VERSIONS, SLOPES_OFF]


@pytest.mark.parametrize("who", WHO)
def test_device(benchmark, load, who):
    suite.measure_device(benchmark, load, who)


@pytest.mark.parametrize("who", WHO)
def test_host(benchmark, load, who):
    suite.measure_host(benchmark, load, who)


@pytest.mark.parametrize("who", WHO)
def test_wall(benchmark, load, who):
    suite.measure_wall(benchmark, load, who)
