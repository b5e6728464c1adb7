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


def served(model, requests):
    """The tokens of each request, and what was counted."""
    sizes = {"block_size": 4, "max_sequences": 6, "max_tokens": 48, "max_length": 256}
    engine = InStep(model, num_blocks=48, host_blocks=60, **sizes)
    for number, request in enumerate(requests):
        engine.submit(number, *request)
    found = engine.run()
    return [found[number] for number in range(len(requests))], dict(engine.counts)


def process(rank, size, folder, requests):
    """What each process does. The first one does all of it by itself, too."""
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
    made = {}
    for name, config in small_models().items():
        config.eos_token_id = None  # all go on to the end, so there is not room for all
        torch.manual_seed(1)  # the same weights in every process
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model = model.to(device, torch.bfloat16) if on_gpus else model
        ways = {"ranks": {"shards": [rank], "num_shards": size}}
        if rank == 0:
            ways |= {"halves": {"shards": range(size), "num_shards": size}, "whole": {}}
        made[name] = {way: served(paged(model, 256, **how), requests) for way, how in ways.items()}
    cc.raise_faults()
    torch.save(made, os.path.join(folder, str(rank)))
    dist.destroy_process_group()


def main(size=2):
    torch.manual_seed(1)
    requests = random_requests()[:6]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (size, folder, requests), nprocs=size)
        first, *others = (torch.load(os.path.join(folder, str(rank))) for rank in range(size))
    on_gpus, right = torch.cuda.device_count() >= size, True
    for name, made in first.items():
        (ranks, counts), (halves, _), (whole, _) = made.values()
        alike = [sum(map(list.__eq__, ranks, expected)) for expected in (halves, whole)]
        print(
            f"{name}: of {len(requests)} requests {alike[0]} as by one process with both halves, "
            f"{alike[1]} as by one with all heads at once; {counts}"
        )
        right &= ranks == halves and (on_gpus or ranks == whole)
        right &= all(other[name]["ranks"][0] == ranks for other in others)
    if not right:
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
