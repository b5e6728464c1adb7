# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A small engine with continuous batching, for a stock Llama of Hugging Face's transformers.

Keys and values live in a `PagedKVCache`, and `BlockTables` says who has which blocks: prompts are
read in chunks beside the decoding of others, prompts that begin alike share blocks, and sequences
are swapped out to the host when blocks run out. On a GPU steps that only decode are captured
graphs. The weights are random, and the tokens are those of ``generate``:

    python examples/engine.py
"""

import collections

import torch
import transformers

import cupy_cache as cc


def attention(module, query, key, value, mask, scaling, *, paged, **others):
    """What transformers calls in each layer: keys and values [1, heads, tokens, head size] go to
    their pages, and queries attend to what is there."""
    del mask, others  # a sequence sees its own pages alone
    cache, step, starts = paged
    query, key, value = (one[0].transpose(0, 1).contiguous() for one in (query, key, value))
    cache.write(module.layer_idx, key, value, step.slot_mapping)
    attended = cache.attend(
        module.layer_idx, query, step.block_table, step.seq_lens, query_start_loc=starts,
        scale=scaling,
    )  # fmt: skip
    return attended[None], None


transformers.AttentionInterface.register("cupy_cache", attention)


class Engine:
    """Feeds requests to a model, as many at a time as there is room for.

    Parameters
    ----------
    model : transformers.LlamaForCausalLM
        Its attention is replaced.
    num_blocks, host_blocks, block_size
        Of the cache, and of the one in host memory.
    max_sequences, max_tokens, max_length
        Of a step, and of a sequence: see `BlockTables`.
    """

    def __init__(
        self, model, num_blocks, host_blocks, *, block_size=16, max_sequences=16, max_tokens=256,
        max_length=1024,
    ):  # fmt: skip
        model.set_attn_implementation("cupy_cache")
        config, self.device = model.config, model.device
        self.model, self.on_gpu = model, model.device.type == "cuda"

        def caches(blocks, **where):
            return cc.PagedKVCache.allocate(
                config.num_hidden_layers, blocks, block_size, config.num_key_value_heads,
                config.head_dim, dtype=model.dtype, **where,
            )  # fmt: skip

        self.cache = caches(num_blocks, device=self.device)
        self.host = caches(host_blocks, device="cpu", pinned=self.on_gpu)
        self.tables = cc.BlockTables(
            num_blocks, block_size, max_sequences=max_sequences, max_tokens=max_tokens,
            max_length=max_length, host_blocks=host_blocks, framework="torch", device=self.device,
        )  # fmt: skip
        self.requests, self.waiting = {}, collections.deque()
        self.running, self.swapped = [], collections.deque()
        self.graphs, self.counts = {}, collections.Counter()

    def submit(self, name, prompt, max_new_tokens):
        """Queue a request: token numbers, and how many are to follow."""
        self.requests[name] = list(prompt), len(prompt) + max_new_tokens
        self.waiting.append(name)

    def run(self):
        """Work until all requests are done; returns {name: prompt and new tokens}."""
        while self.waiting or self.swapped or self.running:
            self.admit()
            self.step()
        return {name: tokens for name, (tokens, _) in self.requests.items()}

    # --- who takes part

    def admit(self):
        """Bring back who was swapped out, and then let new ones begin."""
        tables = self.tables
        while self.swapped and len(self.running) < tables.max_sequences:
            # Who returns needs a block besides, and so may all others.
            needed = len(tables.blocks(self.swapped[0])) + len(self.running) + 1
            if self.running and tables.pool.num_free < needed:
                break
            name = self.swapped.popleft()
            self.host.swap_blocks(self.cache, tables.swap_in(name))
            self.running.append(name)
        while self.waiting and not self.swapped and len(self.running) < tables.max_sequences:
            name = self.waiting.popleft()
            self.counts["tokens shared"] += tables.add(name, self.requests[name][0])
            self.running.append(name)

    def preempt(self):
        """Swap out who came last."""
        name = self.running.pop()
        self.cache.swap_blocks(self.host, self.tables.swap_out(name))
        self.swapped.appendleft(name)
        self.counts["swaps"] += 1

    def batch(self):
        """(Names, new tokens of each) of the next step: who decodes first, then parts of prompts,
        as long as they fit."""
        left, chunks = self.tables.max_tokens, {}
        missing = {n: len(self.requests[n][0]) - self.tables.length(n) for n in self.running}
        for name in sorted(self.running, key=lambda name: missing[name] > 1):
            chunks[name] = min(missing[name], left)
            left -= chunks[name]
        return [name for name in self.running if chunks[name]], chunks

    # --- a step

    def step(self):
        """Feed the next tokens of all that run, and append what the model makes of the last."""
        while True:
            names, chunks = self.batch()
            decodes = self.on_gpu and max(chunks.values()) == 1
            padded = 1 << (len(names) - 1).bit_length() if decodes else len(names)
            padded = min(padded, self.tables.max_sequences)
            try:
                step = self.tables.step(
                    names, [chunks[name] for name in names], num_sequences=padded,
                    num_tokens=padded if decodes else None,
                )  # fmt: skip
                break
            except cc.OutOfBlocksError:
                if len(self.running) == 1:
                    raise  # one sequence alone is too long
                self.preempt()
        self.cache.copy_blocks(step.copies)
        fed = []
        for name in names:
            end = self.tables.length(name)
            fed += self.requests[name][0][end - chunks[name] : end]
        self.counts["steps"] += 1
        new = self.replay(fed, step) if decodes else self.forward(self.upload(fed), step)
        for name, token in zip(names, new.tolist()):
            tokens, end = self.requests[name]
            if self.tables.length(name) < len(tokens):
                continue  # the prompt goes on
            tokens.append(token)
            self.tables.append(name, token)
            if len(tokens) == end:
                self.tables.free(name)
                self.running.remove(name)

    def upload(self, numbers):
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def forward(self, tokens, step, decodes=False):
        """The token that follows each sequence's last one."""
        starts = None if decodes else step.query_start_loc
        last = slice(None) if decodes else step.query_start_loc[1:].long() - 1
        hidden = self.model.model(
            tokens[None], position_ids=step.positions[None], use_cache=False,
            paged=(self.cache, step, starts),
        ).last_hidden_state  # fmt: skip
        return self.model.lm_head(hidden[0, last]).argmax(-1)

    def replay(self, fed, step):
        """`forward` for one token of each sequence, by a graph for this number of sequences."""
        size = len(step.seq_lens)
        if size not in self.graphs:
            tokens, graph = self.upload([0] * size), torch.cuda.CUDAGraph()
            tokens[: len(fed)] = self.upload(fed)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are loaded before the capture
                self.forward(tokens, step, decodes=True)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                out = self.forward(tokens, step, decodes=True)
            self.graphs[size] = tokens, graph, out
        tokens, graph, out = self.graphs[size]
        tokens[: len(fed)] = self.upload(fed)
        graph.replay()
        self.counts["replays"] += 1
        return out


def small_llama(device, dtype):
    """A Llama with random weights, in which heads share keys and values."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
        eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return model.to(device=device, dtype=dtype).eval()


def main():
    on_gpu = torch.cuda.is_available()
    model = small_llama("cuda" if on_gpu else "cpu", torch.float16 if on_gpu else torch.float32)
    shared = torch.randint(512, (40,)).tolist()
    prompts = [torch.randint(512, (length,)).tolist() for length in (5, 70, 33, 1, 100, 18)]
    prompts += [shared + prompt[:9] for prompt in prompts[:3]]
    expected = []
    for prompt in prompts:
        given = torch.tensor([prompt], device=model.device)
        # Without a mask, generate takes one of the tokens for padding.
        made = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=24
        )
        expected.append(made[0].tolist())
    engine = Engine(
        model, num_blocks=20, host_blocks=40, max_sequences=4, max_tokens=48, max_length=256
    )
    for name, prompt in enumerate(prompts):
        engine.submit(name, prompt, 24)
    found = engine.run()
    cc.raise_faults()
    alike = sum(found[name] == tokens for name, tokens in enumerate(expected))
    print(f"{len(expected)} requests, {alike} as by generate; {dict(engine.counts)}")
    if not on_gpu and alike < len(expected):  # on a GPU float16 may decide otherwise
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
