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


def as_many(some, others):
    """For how many requests the tokens are the same."""
    return sum(tokens == expected for tokens, expected in zip(some, others))


def process(rank, size, meeting, requests, results):
    """What each process does."""
    on_gpus = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size,
        **({"device_id": device} if on_gpus else {}),
    )  # fmt: skip
    for name, config in small_models().items():
        config.eos_token_id = None  # all go on to the end, so there is not room for all
        torch.manual_seed(1)  # the same weights in every process
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model = model.to(device, torch.bfloat16) if on_gpus else model
        whole, _ = served(paged(model, 256), requests)
        halves, _ = served(paged(model, 256, shards=range(size), num_shards=size), requests)
        ranks, counts = served(paged(model, 256, shards=[rank], num_shards=size), requests)
        results.put((name, as_many(ranks, halves), as_many(ranks, whole), counts))
    cc.raise_faults()
    dist.destroy_process_group()


def main(size=2):
    torch.manual_seed(1)
    requests = random_requests()
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = size, os.path.join(folder, "meeting"), requests, results
        torch.multiprocessing.spawn(process, given, nprocs=size)
    on_gpus, right = torch.cuda.device_count() >= size, True
    for _ in range(size * len(small_models())):
        name, as_halves, as_whole, counts = results.get()
        print(
            f"{name}: of {len(requests)} requests {as_halves} as by one process with both halves, "
            f"{as_whole} as by one with all heads at once; {counts}"
        )
        right &= as_halves == len(requests) and (on_gpus or as_whole == len(requests))
    if not right:
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
