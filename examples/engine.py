# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A small engine with continuous batching, for stock models of Hugging Face's transformers.

Keys and values live in a `PagedKVCache`, and `BlockTables` says who has which blocks. Prompts are
read in chunks beside the decoding of others, and those that begin alike share blocks; so do the
beams of a search, until they write. When blocks run out, sequences move to host memory, while the
others go on. On a GPU, steps that only decode are captured graphs. `engine_models.py` has the
models: Llama, BLOOM and DeepSeek-V3. Here they are small, their weights are random, and the tokens
are those of ``generate``:

    python examples/engine.py
"""

import collections
import dataclasses
import itertools

import torch
import transformers
from engine_models import MODELS, small_models

import cupy_cache as cc


@dataclasses.dataclass(eq=False)
class Request:
    """What was asked for, and what there is of it: one sequence, or those of a beam search, the
    best one first, and the beams that have ended, as (score, tokens)."""

    name: object
    prompt: list
    max_new_tokens: int
    num_beams: int

    def begin(self, sequence):
        self.sequences, self.new_tokens, self.scores, self.finished = [sequence], 0, [0.0], []


class Engine:
    """Feeds requests to a model, as many at a time as there is room for.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One of `engine_models.MODELS`.
    num_blocks, host_blocks, block_size
        Of the cache, and of the one in host memory.
    max_sequences, max_tokens, max_length
        Of a step, and of a sequence: see `BlockTables`. ``max_tokens`` is at least
        ``max_sequences``.
    fuse
        ``torch.compile``, for fewer kernels; then the first steps take some seconds.
    """

    def __init__(
        self, model, num_blocks, host_blocks, *, block_size=16, max_sequences=16, max_tokens=256,
        max_length=1024, fuse=lambda function: function,
    ):  # fmt: skip
        self.model, self.eos = model, model.generation_config.eos_token_id
        self.layers = MODELS[model.config.model_type](model, max_length, fuse)
        self.on_gpu = model.device.type == "cuda"
        self.cache = self.layers.allocate(num_blocks, block_size, device=model.device)
        self.host = self.layers.allocate(host_blocks, block_size, device="cpu", pinned=self.on_gpu)
        self.tables = cc.BlockTables(
            num_blocks, block_size, max_sequences=max_sequences, max_tokens=max_tokens,
            max_length=max_length, host_blocks=host_blocks, framework="torch", device=model.device,
        )  # fmt: skip
        # A request waits, runs, and may leave, be swapped out, arrive, and run again.
        self.waiting, self.running, self.leaving = collections.deque(), [], []
        self.swapped, self.arriving = collections.deque(), []
        self.moves = collections.deque()  # between the caches: (event, blocks held, who arrives)
        self.bus = torch.cuda.Stream() if self.on_gpu else None
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle() if self.on_gpu else None
        self.numbers, self.results = itertools.count(), {}
        self.counts = collections.Counter()

    def submit(self, name, prompt, max_new_tokens, num_beams=1):
        """Queue a request: token numbers, how many are to follow at most, and whether the best of
        several continuations is looked for."""
        self.waiting.append(Request(name, list(prompt), max_new_tokens, num_beams))

    def run(self):
        """Work until all requests are done; returns {name: prompt and new tokens}."""
        while self.waiting or self.running or self.leaving or self.swapped or self.arriving:
            self.step()
        return self.results

    # --- who takes part

    def turn_over(self):
        """Who left moves to the host, who was swapped out comes back, and new ones begin. This is
        done while the GPU works on a step, of those that stay."""
        self.settle()
        self.move_out()
        self.admit()

    def preempt(self):
        """Have who came last leave for the host or, where that is full, begin anew later."""
        request, tables = self.running.pop(), self.tables
        blocks = {block for sequence in request.sequences for block in tables.blocks(sequence)}
        if len(blocks) <= tables.host_pool.num_free:
            self.leaving.append(request)
            return
        for sequence in request.sequences:
            tables.free(sequence)
        self.waiting.appendleft(request)
        self.counts["begun anew"] += 1

    def move_out(self):
        pairs, held = [], []
        for sequence in (sequence for request in self.leaving for sequence in request.sequences):
            blocks = self.tables.blocks(sequence)
            for block in blocks:
                self.tables.pool.share(block)  # nobody else's before they were read
            held += blocks
            pairs += self.tables.swap_out(sequence)
        if held:
            self.move(self.cache, self.host, pairs, held, [])
        self.swapped += self.leaving
        self.leaving = []

    def admit(self):
        tables, pairs, back = self.tables, [], []
        while self.swapped:
            blocks = sum(len(tables.blocks(sequence)) for sequence in self.swapped[0].sequences)
            if not self.has_room(self.swapped[0], blocks):
                break
            back.append(self.swapped.popleft())
            self.arriving.append(back[-1])
            pairs += (pair for one in back[-1].sequences for pair in tables.swap_in(one))
        if back:
            self.move(self.host, self.cache, pairs, [], back)
        while self.waiting and not self.swapped:
            request = self.waiting[0]
            if not self.has_room(request, -(-len(request.prompt) // tables.block_size)):
                break
            self.waiting.popleft()
            request.begin(next(self.numbers))
            shared = tables.add(request.sequences[0], request.prompt)
            if shared and self.on_gpu:  # by blocks that may be on their way
                torch.cuda.current_stream().wait_stream(self.bus)
            self.counts["tokens shared"] += shared
            self.running.append(request)

    def has_room(self, request, blocks):
        """Whether a request may run: with so many blocks, and two for each sequence to go on."""
        others = self.running + self.arriving
        sequences = request.num_beams + sum(other.num_beams for other in others)
        free = self.tables.pool.num_free - 2 * sequences
        fits = sequences <= self.tables.max_sequences and blocks <= free
        return fits or not (others or self.moves)

    def move(self, source, destination, pairs, held, back):
        """Copy blocks over the bus, on a stream of its own: all moves are in order, and behind
        what was enqueued so far."""
        if self.on_gpu:
            self.bus.wait_stream(torch.cuda.current_stream())
        source.swap_blocks(destination, pairs, stream=self.bus)
        self.moves.append((self.bus.record_event() if self.on_gpu else None, held, back))
        self.counts["blocks moved"] += len(pairs)

    def settle(self, wait=False):
        """Take note of the moves that are done; with ``wait``, of the first one at least."""
        while self.moves:
            done, held, back = self.moves[0]
            if done and wait:
                done.synchronize()
            elif done and not done.query():
                return
            wait = False
            self.moves.popleft()
            for block in reversed(held):
                self.tables.pool.drop(block)
            for request in back:
                self.arriving.remove(request)
                self.running.append(request)

    # --- a step

    def batch(self):
        """{sequence: its new tokens}: who decodes, and then parts of prompts, as far as they fit;
        and who has all its tokens fed by that."""
        pending = {s: self.tables.num_pending(s) for one in self.running for s in one.sequences}
        left, counts, ready = self.tables.max_tokens, {}, set()
        for sequence in sorted(pending, key=lambda sequence: pending[sequence] > 1):
            counts[sequence] = min(pending[sequence], left)
            left -= counts[sequence]
            if counts[sequence] == pending[sequence]:
                ready.add(sequence)
            if not left:
                break
        return counts, ready

    def step(self):
        """Feed the next tokens of all that run, and append what the model makes of the last."""
        tables = self.tables
        counts, ready, step = self.plan()
        if not counts:
            self.turn_over()
            if not self.running:
                self.settle(wait=True)
            return
        decodes = self.on_gpu and step.max_query_len == 1
        self.cache.copy_blocks(step.copies)
        best, logits = self.replay(step) if decodes else self.forward(step, step.query_start_loc)
        self.turn_over()
        best = self.read(best)
        self.counts["replays" if decodes else "steps"] += 1
        rows = dict(zip(counts, range(len(counts))))
        for request in self.running[:]:
            sequence = request.sequences[0]
            if sequence not in ready:
                continue
            request.new_tokens += 1
            if request.num_beams > 1:
                self.search(request, logits[[rows[one] for one in request.sequences]].float())
                continue
            token = best[rows[sequence]]
            tables.append(sequence, token)
            if token == self.eos or request.new_tokens == request.max_new_tokens:
                self.results[request.name] = tables.tokens(sequence)
                self.end(request)
        if not self.moves and len(self.running) > 1 and tables.pool.num_free < len(counts):
            self.preempt()  # before it is too late to do so beside the others

    def plan(self):
        """Whose tokens are fed, as of `batch`, and the step."""
        while True:
            counts, ready = self.batch()
            size = None
            if self.on_gpu and max(counts.values(), default=0) == 1:
                size = self.padded(len(counts))
            try:
                names, numbers = list(counts), list(counts.values())
                step = self.tables.step(names, numbers, num_sequences=size, num_tokens=size)
                return counts, ready, step
            except cc.OutOfBlocksError:
                if not (self.leaving or self.moves):
                    if len(self.running) == 1:
                        raise  # one request alone is too long
                    self.preempt()
                self.move_out()
                self.settle(wait=True)

    def search(self, request, logits):
        """A step of a beam search: which beams go on, with which tokens. As in ``generate``, the
        beams that have ended compete by their scores over their numbers of new tokens."""
        tables, beams, length = self.tables, request.num_beams, request.new_tokens
        scores = torch.tensor(request.scores, device=logits.device)[:, None]
        scores, places = (logits.log_softmax(-1) + scores).flatten().topk(2 * beams)
        going_on = []
        for rank, (score, place) in enumerate(zip(scores.tolist(), places.tolist())):
            at, token = divmod(place, logits.shape[1])
            parent = request.sequences[at]
            if token != self.eos and length < request.max_new_tokens:
                going_on.append((score, parent, token))
            elif rank < beams:
                request.finished.append((score / length, [*tables.tokens(parent), token]))
        going_on = going_on[:beams]
        request.finished = sorted(request.finished, reverse=True)[:beams]
        full = len(request.finished) == beams
        if not going_on or (full and going_on[0][0] / length <= request.finished[-1][0]):
            self.results[request.name] = request.finished[0][1]
            self.end(request)
            return
        names = []
        for _, parent, _ in going_on:
            name = parent if parent not in names else next(self.numbers)
            if name != parent:
                tables.fork(parent, name)
            names.append(name)
        for sequence in set(request.sequences).difference(names):
            tables.free(sequence)
        for name, (_, _, token) in zip(names, going_on):
            tables.append(name, token)
        request.sequences, request.scores = names, [score for score, _, _ in going_on]

    def end(self, request):
        for sequence in request.sequences:
            self.tables.free(sequence)
        self.running.remove(request)

    # --- the model

    def read(self, best):
        """Tokens as integers: this waits for the GPU."""
        return best.tolist()

    @torch.no_grad()
    def forward(self, step, starts):
        """The likeliest token behind each sequence, and the logits of all."""
        hidden = self.layers.forward(self.cache, step, starts)
        if starts is not None:
            hidden = hidden[starts[1:].long() - 1]
        logits = self.model.lm_head(hidden)
        return logits.argmax(-1), logits

    def padded(self, size):
        """For how many sequences there is a graph: 1, 2, 4, 8, and multiples of 16."""
        size = min(1 << (size - 1).bit_length(), -(-size // 16) * 16)
        return min(size, self.tables.max_sequences)

    def replay(self, step):
        """`forward` for one token of each sequence, by a graph for this number of sequences."""
        size = len(step.seq_lens)
        if size not in self.graphs:
            self.forward(step, None)  # kernels are loaded before the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.graphs[size] = graph, self.forward(step, None)
        graph, results = self.graphs[size]
        graph.replay()
        return results


def generated(model, prompt, max_new_tokens, num_beams=1):
    """The tokens of ``generate``."""
    given = torch.tensor([prompt], device=model.device)
    # Without a mask, generate takes one of the tokens for padding.
    options = {"attention_mask": torch.ones_like(given), "do_sample": False}
    made = model.generate(given, **options, max_new_tokens=max_new_tokens, num_beams=num_beams)
    return made[0].tolist()


def main():
    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(1)  # matrices this small are not worth waiting for other threads
    shared = torch.randint(3, 512, (40,)).tolist()
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (5, 70, 33, 1, 100, 18)]
    prompts += [shared + prompt[:9] for prompt in prompts[:3]]
    for name, config in small_models().items():
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model = model.to("cuda", torch.bfloat16) if on_gpu else model
        requests = [(prompt, 24, 1 + 2 * (n % 3 == 1)) for n, prompt in enumerate(prompts)]
        expected = [generated(model, *request) for request in requests]
        engine = Engine(
            model, num_blocks=56, host_blocks=60, block_size=4, max_sequences=6, max_tokens=48,
            max_length=256,
        )  # fmt: skip
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
