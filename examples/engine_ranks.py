# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""`engine.py` in two processes, each with half of the heads of every layer, and their pages.

What comes of the heads is added up by `torch.distributed`: NCCL between two GPUs, Gloo on the CPU.
Each process has all the requests, and decides as the other does.

    python examples/engine_ranks.py

The tokens are compared with those of one process: on the CPU they are the same. On GPUs, in 16
bits, they may differ, and it is told how far from the likeliest they are by the model in 32.
"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from engine import Engine
from engine_models import small_models

import cupy_cache as cc

SIZES = {"block_size": 4, "max_sequences": 6, "max_tokens": 48, "max_length": 256}


def served(model, requests, **options):
    """The tokens of each request, and what was counted."""
    engine = Engine(model, num_blocks=48, host_blocks=60, **SIZES, **options)
    for number, request in enumerate(requests):
        engine.submit(number, *request)
    found = engine.run()
    return [found[number] for number in range(len(requests))], dict(engine.counts)


def stock(config):
    """A model with random weights, always the same."""
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def shortfall(model, requests, found):
    """By how much the logits of tokens, but for those of beams, are below the largest: on average,
    in standard deviations of all logits. Of any other tokens it is about 3."""
    short = []
    for (prompt, _, beams), tokens in zip(requests, found):
        if beams == 1:
            tokens = torch.tensor([tokens])
            with torch.no_grad():
                logits = model(tokens[:, :-1]).logits[0, len(prompt) - 1 :]
            chosen = logits.gather(1, tokens[0, len(prompt) :, None])
            short.append((logits.amax(1, keepdim=True) - chosen) / logits.std(1, keepdim=True))
    return float(torch.cat(short).mean())


def process(rank, size, meeting, requests, results):
    """What each process does."""
    on_gpus = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(  # Gloo for numbers on the host, too
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo", init_method=f"file://{meeting}", rank=rank,
        world_size=size,
    )  # fmt: skip
    for name, config in small_models().items():
        config.eos_token_id = None  # all go on to the end, so there is not room for all
        made = []
        for ranks in ((0, 1), (rank, size)):
            model = stock(config)  # of which the engine keeps a part
            model = model.to(device, torch.bfloat16) if on_gpus else model
            made.append(served(model, requests, ranks=ranks))
        results.put((rank, name, *made, shortfall(stock(config), requests, made[-1][0])))
    cc.raise_faults()
    dist.destroy_process_group()


def main(size=2):
    torch.manual_seed(1)
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (5, 70, 33, 1, 100, 18)]
    requests = [(prompt, 24, 1 + 2 * (n % 3 == 1)) for n, prompt in enumerate(prompts)]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = size, os.path.join(folder, "meeting"), requests, results
        torch.multiprocessing.spawn(process, given, nprocs=size)
    found = {}
    for _ in range(size * len(small_models())):
        rank, name, *made = results.get()
        found.setdefault(name, {})[rank] = made
    on_gpus, right = torch.cuda.device_count() >= size, True
    for name, by_rank in found.items():
        (alone, _), (together, counts), short = by_rank[0]
        of_each = [tokens for _, (tokens, _), _ in by_rank.values()]
        alike = sum(one == other for one, other in zip(alone, together))
        print(
            f"{name}: {alike} of {len(alone)} requests as by one process; {short:.3f} standard "
            f"deviations below the likeliest; {counts}"
        )
        # In 16 bits the order of a sum may decide otherwise.
        right &= all(tokens == together for tokens in of_each)
        right &= short < 0.3 if on_gpus else together == alone
    if not right:
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
