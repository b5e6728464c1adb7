# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A small engine with continuous batching, for stock models of Hugging Face's transformers.

Prompts are read in chunks beside the decoding of others, and those that begin alike share blocks;
so do the beams of a search, until they write. When blocks run out, sequences move to host memory,
while the others go on. On a GPU, steps that only decode are captured graphs. `engine_requests.py`
says how a request goes on; `engine_models.py` has the models: Llama, BLOOM and DeepSeek-V3. Here
they are small, their weights are random, and the tokens are those of ``generate``:

    python examples/engine.py
"""

import collections
import functools

import torch
import transformers
from engine_models import generated, paged, small_models
from engine_requests import Request, random_requests

import cupy_cache as cc
from cupy_cache.integrations.torch_graphs import StepGraphs


class Engine:
    """Feeds requests to an `engine_models.Model`, as many at a time as there is room for. What it
    takes is as of `BlockTables` and `SwapSpace`; max_tokens is at least max_sequences."""

    def __init__(
        self, model, num_blocks, host_blocks, *, block_size=16, max_sequences=16, max_tokens=256,
        max_length=1024, bytes_per_step=64 << 20,
    ):  # fmt: skip
        self.model, self.caches = model, model.allocate(num_blocks, block_size)
        self.tables = cc.BlockTables(
            num_blocks, block_size, max_sequences=max_sequences, max_tokens=max_tokens,
            max_length=max_length, host_blocks=host_blocks, framework="torch", device=model.device,
        )  # fmt: skip
        self.space = cc.SwapSpace(self.caches, host_blocks, bytes_per_step=bytes_per_step)
        # Not a method: graphs that held the engine would stay until Python looks for such circles.
        self.forward = functools.partial(forward, model, self.caches)
        self.graphs = StepGraphs(functools.partial(self.forward, starts=None), max_sequences)
        # A request waits, runs, and may leave, be in host memory, and run again.
        self.waiting, self.running, self.leaving = collections.deque(), [], collections.deque()
        self.swapped, self.coming = collections.deque(), None  # the blocks of the first of them
        self.results, self.counts = {}, collections.Counter()

    def submit(self, name, prompt, max_new_tokens, num_beams=1):
        """Queue a request: token numbers, how many are to follow at most, and whether the best of
        several continuations is looked for."""
        self.waiting.append(Request(name, list(prompt), max_new_tokens, num_beams))

    def run(self):
        """Work until all requests are done; returns {name: prompt and new tokens}."""
        while self.waiting or self.running or self.leaving or self.swapped:
            self.step()
        return self.results

    # --- a step

    def step(self):
        """Feed the next tokens of all that run, and append what the model makes of the last."""
        counts, step = self.plan()
        if not counts:
            self.turn_over(wait=True)
            return
        for cache in self.caches:
            cache.copy_blocks(step.copies)
        decodes = step.max_query_len == 1
        best, logits = self.graphs(step) if decodes else self.forward(step, step.query_start_loc)
        best = best.to("cpu", non_blocking=True)
        there = None
        if logits.is_cuda:
            there = torch.cuda.current_stream(logits.device).record_event()
        self.turn_over()  # while the GPU works
        best = self.read(best, there)
        self.counts["steps that decode" if decodes else "steps with prompts"] += 1
        rows = {sequence: row for row, sequence in enumerate(counts)}
        for request in self.running[:]:
            first = request.sequences[0]
            if first not in rows or self.tables.num_pending(first):
                continue  # it begins with the next step, or its prompt goes on
            request.go_on(self.tables, rows, best, logits, self.model.ends)
            if request.result:
                self.end(request)
        if len(self.running) > 1 and self.tables.pool.num_free < len(counts):
            self.leaving.append(self.running.pop())  # in time to move beside the others' steps

    def plan(self):
        """{sequence: how many of its tokens are fed}, and the step: those that decode, and then
        parts of prompts, as far as they fit."""
        while True:
            sequences = [one for request in self.running for one in request.sequences]
            counts = self.tables.schedule(sequences)
            names, numbers, size = list(counts), list(counts.values()), None
            if max(numbers, default=0) == 1:
                size = self.graphs.padded(len(names))
            try:
                return counts, self.tables.step(names, numbers, num_sequences=size, num_tokens=size)
            except cc.OutOfBlocksError:
                if not self.leaving:
                    if len(self.running) == 1:
                        raise  # one request alone is too long
                    self.leaving.append(self.running.pop())  # who came last
                self.move_out()

    def read(self, best, there):
        """Tokens as integers, once they are there."""
        if there:
            there.synchronize()
        return best.tolist()

    def end(self, request):
        self.results[request.name] = request.result
        for sequence in request.sequences:
            self.tables.free(sequence)
        self.running.remove(request)

    # --- who takes part

    def turn_over(self, wait=False):
        """Who leaves moves to host memory, who was there comes back, and new ones begin: one at a
        time, since the GPU works meanwhile on a step of those that stay."""
        if self.leaving:
            self.move_out()
        if self.swapped:
            self.move_in(wait)
        else:
            self.admit()
        self.space.advance()

    def move_out(self):
        """Have the blocks of who leaves free for the next step. Where host memory is full, the
        request begins anew later."""
        request = self.leaving.popleft()
        try:
            pairs = self.tables.swap_out(*request.sequences)
        except cc.OutOfBlocksError:
            for sequence in request.sequences:
                self.tables.free(sequence)
            self.waiting.appendleft(request)
            self.counts["begun anew"] += 1
            return
        self.space.swap_out(pairs)
        self.swapped.append(request)
        self.counts["blocks moved"] += len(pairs)

    def move_in(self, wait):
        """Who was swapped out first comes back, if there is room, and runs once all is there."""
        if self.coming and wait:
            self.coming.wait()
        if self.coming and self.coming.is_done():
            try:
                self.coming.swap_in(self.tables.swap_in(*self.swapped[0].sequences))
            except cc.OutOfBlocksError:
                return  # the others took what there was
            self.running.append(self.swapped.popleft())
            self.coming = None
        if self.swapped and not self.coming:
            request = self.swapped[0]
            blocks = {block for one in request.sequences for block in self.tables.blocks(one)}
            if self.has_room(request, len(blocks)):
                self.coming = self.space.prefetch(list(blocks))

    def admit(self):
        """New ones begin, as many as there is room for."""
        while self.waiting:
            request = self.waiting[0]
            if not self.has_room(request, -(-len(request.prompt) // self.tables.block_size)):
                return
            self.waiting.popleft()
            self.counts["tokens shared"] += request.begin(self.tables)
            self.running.append(request)

    def has_room(self, request, blocks):
        """Whether a request may run: with so many blocks, and two for each sequence to go on."""
        if not self.running and not self.leaving:
            return True
        sequences = request.num_beams + sum(one.num_beams for one in self.running)
        needed = blocks + 2 * sequences
        return sequences <= self.tables.max_sequences and needed <= self.tables.pool.num_free


@torch.no_grad()
def forward(model, caches, step, starts):
    """The likeliest token behind each sequence, and the logits of all."""
    hidden = model.forward(caches, step, starts)
    if starts is not None:
        hidden = hidden[starts[1:].long() - 1]
    logits = model.head(hidden)
    return logits.argmax(-1), logits


def main():
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)  # matrices this small are not worth waiting for other threads
    requests = random_requests()
    for name, config in small_models().items():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model = model.to("cuda", torch.bfloat16) if on_gpu else model
        expected = [generated(model, *request) for request in requests]
        engine = Engine(
            paged(model, 256), 56, 60, block_size=4, max_sequences=6, max_tokens=48, max_length=256
        )
        for number, request in enumerate(requests):
            engine.submit(number, *request)
        found = engine.run()
        cc.raise_faults()
        alike = sum(found[number] == tokens for number, tokens in enumerate(expected))
        print(f"{name}: {alike} of {len(expected)} requests as by generate; {dict(engine.counts)}")
        if not on_gpu and alike < len(expected):  # on a GPU bfloat16 may decide otherwise
            raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
