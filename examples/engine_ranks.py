# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""`engine.py` in two processes, each with half of the heads of every layer, and their pages.

What comes of the heads is added up by `torch.distributed`: NCCL between two GPUs, Gloo on the CPU.
Each process has all the requests, and decides as the other does.

    python examples/engine_ranks.py

The tokens are those of one process that has both halves, one after the other: it adds up the same
numbers in the same order. On the CPU they are those of one process with all heads at once, too; in
16 bits that one rounds other sums, and some of its tokens differ.
"""

import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from engine import Engine
from engine_models import paged, small_models
from engine_requests import random_requests

import cupy_cache as cc


class InStep(Engine):
    """An engine that decides nothing by the clock, so that others decide alike: it waits for blocks
    that come back."""

    def turn_over(self, wait=True):
        super().turn_over(wait)


def served(which, model, requests):
    """The tokens of each request, and what was counted. ``which`` model it is, is told."""
    begun = time.monotonic()
    sizes = {"block_size": 4, "max_sequences": 6, "max_tokens": 48, "max_length": 256}
    engine = InStep(model, num_blocks=48, host_blocks=60, **sizes)
    for number, request in enumerate(requests):
        engine.submit(number, *request)
    found = engine.run()
    # NCCL does not end before the graphs that it is part of: destroy_process_group would wait.
    engine.graphs.graphs.clear()
    print(f"{which} is done after {time.monotonic() - begun:.1f} s", flush=True)
    return [found[number] for number in range(len(requests))], dict(engine.counts)


def process(rank, size, folder, requests):
    """What each process does: its heads of all models, beside the others. Then, by itself, what
    that is compared with: the first process all shards, the others all heads at once."""
    on_gpus = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{folder}/meeting", rank=rank,
        world_size=size, **({"device_id": device} if on_gpus else {}),
    )  # fmt: skip
    print(f"process {rank} of {size} has met the others, on {device}", flush=True)
    models = {}
    for name, config in small_models().items():
        config.eos_token_id = None  # all go on to the end, so there is not room for all
        torch.manual_seed(1)  # the same weights in every process
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        models[name] = model.to(device, torch.bfloat16) if on_gpus else model

    def made(heads, **shards):
        return {
            name: served(f"process {rank}: {name}, {heads},", paged(model, 256, **shards), requests)
            for name, model in models.items()
        }

    ranks = made("its heads", shards=[rank], num_shards=size)
    dist.destroy_process_group()
    if rank == 0:
        alone = made("all shards", shards=range(size), num_shards=size)
    else:
        alone = made("all heads at once")
    cc.raise_faults()
    torch.save((ranks, alone), os.path.join(folder, str(rank)))


def main(size=2):
    torch.manual_seed(1)
    requests = random_requests()[:6]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (size, folder, requests), nprocs=size)
        made = [torch.load(os.path.join(folder, str(rank))) for rank in range(size)]
    on_gpus, right = torch.cuda.device_count() >= size, True
    (_, all_shards), *_, (_, at_once) = made
    for name in all_shards:
        (tokens, counts), *others = (ranks[name] for ranks, _ in made)
        shards, whole = all_shards[name][0], at_once[name][0]
        alike = [sum(map(list.__eq__, tokens, expected)) for expected in (shards, whole)]
        print(
            f"{name}: of {len(requests)} requests {alike[0]} as by one process with both halves, "
            f"{alike[1]} as by one with all heads at once; {counts}"
        )
        right &= tokens == shards and (on_gpus or tokens == whole)
        right &= all(theirs == tokens for theirs, _ in others)
    if not right:
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
