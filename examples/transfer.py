# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Two processes: one reads the prompts and sends the blocks, the other decodes; then both together,
each with half of the heads.

`torch.distributed` moves the bytes: NCCL between two GPUs, Gloo on the CPU.

    python examples/transfer.py

The tokens are compared with those of one process that does everything.
"""

import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

import cupy_cache as cc

HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 8, 2, 64, 256
WIDTH = HEADS * HEAD_SIZE


class Decoder:
    """A small transformer with ALiBi, random weights and its keys and values in pages.

    Parameters
    ----------
    device, dtype
        Of the caches; all else is computed in float32.
    shards : sequence of int
        Which parts of the heads this process has, of ``num_shards``. Parts that others have are
        added by an all-reduce.
    """

    def __init__(self, device, dtype, layers, max_tokens, shards=(0,), num_shards=1):
        self.device, self.dtype, self.layers = device, dtype, layers
        self.together = len(shards) < num_shards
        drawn = torch.Generator().manual_seed(1)  # the same weights in every process

        def matrix(rows, columns):
            return torch.randn(rows, columns, generator=drawn) / rows**0.5

        def part(weight, shard, dim):
            return weight.chunk(num_shards, dim)[shard].to(device)

        self.embedding, self.head = (
            matrix(*shape).to(device) for shape in ((VOCABULARY, WIDTH), (WIDTH, VOCABULARY))
        )
        self.weights, self.shards = [], []
        for _ in range(layers):
            heads = [matrix(WIDTH, heads * HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
            out, up = matrix(WIDTH, WIDTH), matrix(WIDTH, 4 * WIDTH)
            down = matrix(4 * WIDTH, WIDTH)
            parts = [
                (*(part(weight, shard, 1) for weight in heads), part(out, shard, 0))
                for shard in shards
            ]
            self.weights.append((parts, up.to(device), down.to(device)))
        blocks = max_tokens // 16 + 16
        for shard in shards:
            cache = cc.PagedKVCache.allocate(
                layers, blocks, 16, KV_HEADS // num_shards, HEAD_SIZE, dtype=dtype, device=device
            )
            # Slopes are those of the whole model: a part has those of its heads.
            slopes = cc.alibi_slopes(HEADS, tp_rank=shard, tp_size=num_shards, device=device)
            self.shards.append((cache, slopes))
        self.tables = cc.BlockTables(
            blocks, 16, max_sequences=8, max_tokens=max_tokens, max_length=max_tokens,
            framework="torch", device=device,
        )  # fmt: skip

    @torch.no_grad()
    def forward(self, names, tokens, written=None):
        """Feed each sequence its tokens; returns the token that follows each. ``written(layer)`` is
        called as soon as keys and values of a layer are in their pages."""
        step = self.tables.step(names, [len(some) for some in tokens])
        flat = torch.tensor([token for some in tokens for token in some], device=self.device)
        x = self.embedding[flat]
        for layer, (parts, up, down) in enumerate(self.weights):
            rows, attended = normalised(x), 0
            for (*projections, out), (cache, slopes) in zip(parts, self.shards):
                query, key, value = (
                    (rows @ weight).view(len(x), -1, HEAD_SIZE).to(self.dtype)
                    for weight in projections
                )
                cache.write(layer, key, value, step.slot_mapping)
                if written is not None:
                    written(layer)
                part = cache.attend(
                    layer, query, step.block_table, step.seq_lens,
                    query_start_loc=step.query_start_loc, alibi_slopes=slopes,
                )  # fmt: skip
                attended = attended + part.float().reshape(len(x), -1) @ out
            if self.together:
                dist.all_reduce(attended)
            x = x + attended
            x = x + (normalised(x) @ up).relu() @ down
        last = step.query_start_loc[1:].long() - 1
        return (normalised(x[last]) @ self.head).argmax(-1).tolist()

    def add(self, prompts):
        """Sequences 0, 1, … with these prompts; returns their names."""
        for name, prompt in enumerate(prompts):
            self.tables.add(name, prompt)
        return list(range(len(prompts)))

    def decode(self, names, new, count):
        """``count`` tokens of each sequence, of which ``new`` are the first."""
        made = [[token] for token in new]
        for _ in range(count - 1):
            for name, token in zip(names, new):
                self.tables.append(name, token)
            new = self.forward(names, [[token] for token in new])
            for tokens, token in zip(made, new):
                tokens.append(token)
        return made

    def blocks(self, names):
        return [block for name in names for block in self.tables.blocks(name)]

    def buffers(self, count):
        """One for ``count`` blocks of each layer."""
        ((cache, _),) = self.shards
        size = count * cache.bytes_per_block // self.layers
        return torch.empty(self.layers, size, dtype=torch.uint8, device=self.device)

    def pages(self, layer):
        """What `pack_blocks` takes, of one layer."""
        ((cache, _),) = self.shards
        return [(cache.key_caches[layer], cache.value_caches[layer])]


def normalised(x):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


# --- the three ways -------------------------------------------------------------------------------


def alone(decoder, prompts, count):
    """Everything in one process."""
    names = decoder.add(prompts)
    return decoder.decode(names, decoder.forward(names, prompts), count)


def prefill(decoder, prompts, to, overlapped=True):
    """Read the prompts, and send each layer's blocks while the rest is computed, or before."""
    names, sent = decoder.add(prompts), []
    ids, packed = [], None

    def send(layer):
        nonlocal packed
        if not layer:
            ids.extend(decoder.blocks(names))
            packed = decoder.buffers(len(ids))
        cc.pack_blocks(decoder.pages(layer), ids, packed[layer])
        sent.append(dist.isend(packed[layer], to))
        if not overlapped:
            sent.pop().wait()

    new = decoder.forward(names, prompts, send)
    new = torch.tensor(new, device=decoder.device)
    sent.append(dist.isend(new, to))
    for work in sent:  # the buffers must stay until all is sent
        work.wait()


def receive(decoder, prompts, source):
    """Take blocks of one's own for the prompts, and fill them as they come. Returns the sequences'
    names, and the token that follows each."""
    names = decoder.add(prompts)
    decoder.tables.step(names, [len(prompt) for prompt in prompts])
    ids = decoder.blocks(names)
    packed = decoder.buffers(len(ids))
    coming = [dist.irecv(layer, source) for layer in packed]
    new = torch.empty(len(prompts), dtype=torch.int64, device=decoder.device)
    coming.append(dist.irecv(new, source))
    for layer, work in enumerate(coming[:-1]):
        work.wait()
        cc.unpack_blocks(packed[layer], decoder.pages(layer), ids)
    coming[-1].wait()
    return names, new.tolist()


# --- two processes --------------------------------------------------------------------------------


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def process(rank, meeting, prompts, count, layers, results):
    """What each of both does."""
    on_gpus = torch.cuda.device_count() > 1
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    dtype = torch.float16 if on_gpus else torch.float32
    if on_gpus:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2,
        **({"device_id": device} if on_gpus else {}),
    )  # fmt: skip
    total = sum(map(len, prompts)) + len(prompts) * count + 40

    def decoder(**sharding):
        return Decoder(device, dtype, layers, total, **sharding)

    expected = alone(decoder(), prompts, count)
    # One process with both parts has the same sums in the same order.
    parts = alone(decoder(shards=(0, 1), num_shards=2), prompts, count)
    found, taken = {}, {}
    for way in ("at first", "one by one", "overlapped"):
        made = decoder()
        made.tables.add("others", range(rank * 40))  # so that blocks have other numbers there
        made.tables.step(["others"], [rank * 40])
        synchronise(device)
        start = time.perf_counter()
        if rank == 0:
            prefill(made, prompts, 1, overlapped=way != "one by one")
        else:
            names, new = receive(made, prompts, 0)
        synchronise(device)
        taken[way] = (time.perf_counter() - start) * 1e3
        if rank == 1:
            found[way] = made.decode(names, new, count)
    halves = alone(decoder(shards=(rank,), num_shards=2), prompts, count)
    cc.raise_faults()
    dist.destroy_process_group()
    results.put((str(device), found, expected, halves, parts, taken))


def alike(some, others):
    """How many tokens are the same, of how many."""
    pairs = [pair for rows in zip(some, others) for pair in zip(*rows)]
    return sum(one == other for one, other in pairs), len(pairs)


def main(lengths=(5, 70, 33, 1, 100), count=16, layers=4):
    """Do it all for prompts of these lengths, and ``count`` new tokens of each."""
    prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in lengths]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = os.path.join(folder, "meeting")
        torch.multiprocessing.spawn(process, (meeting, prompts, count, layers, results), nprocs=2)
    right = True
    for _ in range(2):
        device, found, expected, halves, parts, taken = results.get()
        right &= halves == parts and all(tokens == expected for tokens in found.values())
        same, of = alike(halves, expected)
        times = ", ".join(f"{way} {ms:.2f} ms" for way, ms in taken.items())
        print(
            f"{device}: prompts read and sent {times}; with half of the heads {same} of {of} tokens"
        )
    print(f"{len(prompts)} sequences: {'the same tokens' if right else 'THE TOKENS DIFFER'}")
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
