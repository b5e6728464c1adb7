# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing and reading the entries of multi-head latent attention, 512 + 64 elements, bfloat16 or
stored as 8 bits. The raw gather is among those of `bench_gather_cache`."""

import functools
from typing import NamedTuple

from . import peers, suite, timing
from .baselines import bare_accesses

pytestmark = suite.marks
BLOCK_SIZE = 64
LATENT, ROPE = 512, 64
# Bytes of an entry, by what `concat_and_cache_mla` calls the format.
ENTRY = {"auto": 2 * (LATENT + ROPE), "fp8": LATENT + ROPE, "fp8_ds_mla": 656}


class Write(NamedTuple):
    tokens: int
    stored: str = "auto"
    slots: str = "random"

    def __str__(self):
        to = "" if self.stored == "auto" else f" to {self.stored}"
        return f"{self.tokens} tokens of {LATENT}+{ROPE} bfloat16{to}, {self.slots} slots"


class Gather(NamedTuple):
    rows: int
    sequences: int
    stored: str

    def __str__(self):
        return (
            f"{self.rows} rows of {LATENT}+{ROPE} from {self.stored} to bfloat16, "
            f"{self.sequences} sequences"
        )


STORED = ("fp8_ds_mla", "fp8")
if timing.on_gpu():
    CASES = [
        *(Write(n) for n in (64, 4096, 32768, 131072)),
        Write(131072, slots="consecutive"),
        *(Write(n, stored) for stored in STORED for n in (4096, 32768)),
        *(Gather(n, s, stored) for stored in STORED for n, s in ((4096, 64), (65536, 256))),
    ]
else:
    CASES = [
        *(Write(n) for n in (64, 1024)),
        *(Write(256, stored) for stored in STORED),
        *(Gather(512, 8, stored) for stored in STORED),
    ]


def make(case):
    return (_write if isinstance(case, Write) else _gather)(case)


def _write(case):
    op = suite.require("concat_and_cache_mla")
    import torch

    device, raw = timing.device(), case.stored == "auto"
    moved = case.tokens * (ENTRY["auto"] + ENTRY[case.stored])
    sets = timing.sets_for(moved)
    num_blocks, slots = suite.slots_for(sets, case.tokens, BLOCK_SIZE, case.slots)
    latents, ropes = (
        torch.randn((sets, case.tokens, n), dtype=torch.bfloat16, device=device)
        for n in (LATENT, ROPE)
    )
    cache = torch.empty(
        (num_blocks, BLOCK_SIZE, LATENT + ROPE if raw else ENTRY[case.stored]),
        dtype=torch.bfloat16 if raw else torch.uint8, device=device,
    )  # fmt: skip
    scale = torch.full((1,), 0.03, device=device)
    stored = {"auto": (), "fp8": ("fp8", scale), "fp8_ds_mla": ("fp8_ds_mla",)}[case.stored]

    def arguments(i):
        return latents[i], ropes[i], cache, slots[i]

    contenders = {suite.OURS: lambda i: functools.partial(op, *arguments(i), *stored)}
    if raw:
        rows = torch.cat((latents, ropes), -1)
        contenders |= {
            "bare": suite.Contender(
                lambda i: bare_accesses.move_rows((rows[i],), (cache,), slots[i]), host=False
            ),
            "torch": lambda i: torch_write(*arguments(i)),
            "triton": lambda i: peers.triton_write_mla(*arguments(i)),
        }
    return suite.Workload(
        "concat_and_cache_mla", str(case), contenders, [cache], moved, sets,
        tokens=case.tokens, dtype="bfloat16", extra={"stored": case.stored, "slots": case.slots},
    )  # fmt: skip


def torch_write(kv_c, k_pe, kv_cache, slots):
    """Indexed assignment to both parts of the entries."""
    latent, rope = kv_cache.flatten(0, 1).split((LATENT, ROPE), dim=1)

    def call():
        latent[slots] = kv_c
        rope[slots] = k_pe

    return call


def _gather(case):
    fp8 = case.stored == "fp8"
    name = "gather_and_maybe_dequant_cache" if fp8 else "cp_gather_and_upconvert_fp8_kv_cache"
    op = suite.require(name)
    import torch

    device = timing.device()
    moved = case.rows * (ENTRY[case.stored] + ENTRY["auto"])
    sets = timing.sets_for(moved)
    num_blocks, tables, bounds = suite.pages_for(sets, case.rows, case.sequences, BLOCK_SIZE)
    # Bytes so small are finite numbers wherever they stand.
    source = torch.randint(
        0, 64, (num_blocks, BLOCK_SIZE, ENTRY[case.stored]), dtype=torch.uint8, device=device
    )
    results = torch.empty((sets, case.rows, LATENT + ROPE), dtype=torch.bfloat16, device=device)
    scale = torch.full((1,), 0.03, device=device)

    def ours(i):
        arguments = source, results[i], tables[i]
        if fp8:
            return functools.partial(op, *arguments, bounds, None, case.rows, "fp8", scale)
        return functools.partial(op, *arguments, bounds[:-1], case.sequences)

    def torch_gather(i):
        slots, result = peers.torch_slots_of_rows(tables[i], bounds, BLOCK_SIZE), results[i]
        flat, dtype = source.flatten(0, 1), peers.torch_fp8("fp8")

        def call():
            result.copy_(flat[slots].view(dtype).float() * scale)

        return call

    contenders = {suite.OURS: ours}
    if fp8:
        contenders["torch"] = suite.Contender(torch_gather, batch=50)
    return suite.Workload(
        name, str(case), contenders, [results[0]], moved, sets, tokens=case.rows,
        dtype="bfloat16", extra={"sequences": case.sequences, "stored": case.stored},
    )  # fmt: skip


load, test_device, test_host = suite.benchmarks(
    CASES, make, suite.contenders("bare", "torch", "triton")
)
