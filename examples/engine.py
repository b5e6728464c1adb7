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
import torch.distributed as dist
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


@dataclasses.dataclass(eq=False)
class Move:
    """Packed blocks on their way: their places in host memory, and the pieces (to, of) that are
    still to be copied. ``ready`` is the event behind the packing, ``done`` that behind the last
    piece, and ``request`` who returns."""

    packed: torch.Tensor
    places: list
    pieces: collections.deque
    ready: object
    request: Request | None
    done: object = None


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
    bus_bytes
        What moves beside a step, each way: less than the bus carries while one decodes. The step's
        own copies, of a few numbers, would wait behind more.
    fuse
        ``torch.compile``, for fewer kernels; then the first steps take some seconds.
    ranks
        Which of how many processes of `torch.distributed` this is: each has a part of the heads,
        and gets the same requests in the same order. See `engine_ranks.py`.
    """

    def __init__(
        self, model, num_blocks, host_blocks, *, block_size=16, max_sequences=16, max_tokens=256,
        max_length=1024, bus_bytes=64 << 20, fuse=lambda function: function, ranks=(0, 1),
    ):  # fmt: skip
        end = model.generation_config.eos_token_id
        self.model, self.ends = model, {end} if isinstance(end, int) else set(end or ())
        self.layers = MODELS[model.config.model_type](model, max_length, fuse, ranks)
        self.ranks = ranks
        self.on_gpu = model.device.type == "cuda"
        self.cache = self.layers.allocate(num_blocks, block_size, device=model.device)
        self.host = self.new_rows(host_blocks, device="cpu", pin_memory=self.on_gpu)
        self.tables = cc.BlockTables(
            num_blocks, block_size, max_sequences=max_sequences, max_tokens=max_tokens,
            max_length=max_length, host_blocks=host_blocks, framework="torch", device=model.device,
        )  # fmt: skip
        # A request waits, runs, and may leave, be swapped out, and be moved back to run again.
        self.waiting, self.running, self.leaving = collections.deque(), [], []
        self.swapped = collections.deque()
        self.moves, self.bus_bytes = collections.deque(), bus_bytes
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
        while self.waiting or self.running or self.leaving or self.swapped or self.moves:
            self.step()
        return self.results

    # --- who takes part

    def turn_over(self):
        """Who leaves moves to the host, who was swapped out comes back, and new ones begin. This is
        done while the GPU works on a step of those that stay, so one request at a time: there is no
        time for more."""
        self.move_out()
        self.settle()
        self.admit()
        self.push()

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
        """Who leaves first is packed, so that its blocks are free for the next step. What was
        packed goes over the bus meanwhile."""
        if not self.leaving:
            return
        request = self.leaving.pop(0)
        pairs = [pair for one in request.sequences for pair in self.tables.swap_out(one)]
        if pairs:
            blocks, places = zip(*sorted(pairs, key=lambda pair: pair[1]))
            packed = self.new_rows(len(blocks), device=self.model.device)
            self.cache.pack_blocks(blocks, packed, layout="page_first")
            self.move(packed, places)
        self.swapped.append(request)

    def move(self, packed, places, request=None):
        """Have packed blocks copied to their places in host memory, or from there for a request
        that returns."""
        pieces = collections.deque()
        most = max(1, self.bus_bytes // 4 // self.cache.bytes_per_block)
        for at, place, count in runs(places, most):
            here, there = packed[at : at + count], self.host[place : place + count]
            pieces.append((here, there) if request else (there, here))
        ready = None if request else self.event()  # memory for who returns is the other stream's
        self.moves.append(Move(packed, places, pieces, ready, request))
        self.counts["blocks moved"] += len(places)

    def push(self):
        """Begin the copies that go over the bus beside a step, on a stream of their own."""
        left = {True: self.bus_bytes, False: self.bus_bytes}  # to the GPU, and from it
        with torch.cuda.stream(self.bus):
            for move in self.moves:
                returns = move.request is not None
                if move.ready and not move.ready.query():
                    break  # from the next step's beginning on, when there is time
                while move.pieces and left[returns] > 0:
                    to, of = move.pieces.popleft()
                    to.copy_(of, non_blocking=True)
                    left[returns] -= to.nbytes
                if move.pieces:
                    break  # in order: what returns may still be on its way out
                if self.bus and not move.done:
                    move.done = self.bus.record_event()

    def settle(self, wait=False):
        """Take note of the moves that are done; with ``wait``, of the first one at least. Who
        returns gets blocks, and runs."""
        tables = self.tables
        while self.moves:
            move = self.moves[0]
            if move.done and wait:
                move.done.synchronize()
            request, packed, places = move.request, move.packed, move.places
            if not self.is_over(move) or (request and len(places) > tables.pool.num_free):
                return
            wait = False
            self.moves.popleft()
            if not request:
                continue
            pairs = [pair for one in request.sequences for pair in tables.swap_in(one)]
            rows, pairs = dict(zip(places, range(len(places)))), sorted(pairs)
            if len(pairs) < len(places):  # the cache has the others
                packed = packed[[rows[place] for place, _ in pairs]]
            self.cache.unpack_blocks(packed, [block for _, block in pairs], layout="page_first")
            if self.bus:
                move.packed.record_stream(torch.cuda.current_stream())
            self.running.append(request)
            return

    def is_over(self, move):
        """Whether all is copied, in every process: all must decide alike."""
        over = not (move.pieces or (move.done and not move.done.query()))
        if self.ranks[1] > 1:
            agreed = torch.tensor(int(over))
            dist.all_reduce(agreed, dist.ReduceOp.MIN)
            over = bool(agreed)
        return over

    def admit(self):
        """As many as there is room for."""
        tables = self.tables
        if self.swapped:
            request = self.swapped[0]
            places = {block for one in request.sequences for block in tables.blocks(one)}
            if self.has_room(request, len(places)):
                self.swapped.popleft()
                with torch.cuda.stream(self.bus):
                    packed = self.new_rows(len(places), device=self.model.device)
                self.move(packed, sorted(places), request)
            return
        while self.waiting:
            request = self.waiting[0]
            if not self.has_room(request, -(-len(request.prompt) // tables.block_size)):
                return
            self.waiting.popleft()
            request.begin(next(self.numbers))
            self.counts["tokens shared"] += tables.add(request.sequences[0], request.prompt)
            self.running.append(request)

    def has_room(self, request, blocks):
        """Whether a request may run: with so many blocks, and two for each sequence to go on."""
        moving = [move for move in self.moves if move.request]
        others = self.running + [move.request for move in moving]
        sequences = request.num_beams + sum(other.num_beams for other in others)
        needed = blocks + sum(len(move.places) for move in moving) + 2 * sequences
        fits = sequences <= self.tables.max_sequences and needed <= self.tables.pool.num_free
        return fits or not (others or self.leaving)

    def new_rows(self, count, **where):
        """Memory for packed blocks of all layers."""
        return torch.empty(count, self.cache.bytes_per_block, dtype=torch.uint8, **where)

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
        best, there = best.to("cpu", non_blocking=True), self.event()
        self.turn_over()
        best = self.read(best, there)
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
            if token in self.ends or request.new_tokens == request.max_new_tokens:
                self.results[request.name] = tables.tokens(sequence)
                self.end(request)
        if len(self.running) > 1 and tables.pool.num_free < len(counts):
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
                if not self.leaving:
                    if len(self.running) == 1:
                        raise  # one request alone is too long
                    self.preempt()
                self.move_out()

    def search(self, request, logits):
        """A step of a beam search: which beams go on, with which tokens. As in ``generate``, the
        beams that have ended compete by their scores over their numbers of new tokens."""
        tables, beams, length = self.tables, request.num_beams, request.new_tokens
        scores = torch.tensor(request.scores, device=logits.device)[:, None]
        scores = (logits.log_softmax(-1) + scores).flatten()
        scores, places = scores.topk((1 + max(len(self.ends), 1)) * beams)
        going_on = []
        for rank, (score, place) in enumerate(zip(scores.tolist(), places.tolist())):
            at, token = divmod(place, logits.shape[1])
            parent = request.sequences[at]
            if token not in self.ends and length < request.max_new_tokens:
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

    def event(self):
        """An event behind what the GPU was told so far; None on the CPU."""
        return torch.cuda.current_stream().record_event() if self.on_gpu else None

    def read(self, best, there):
        """Tokens as integers, once they are there."""
        if there:
            there.synchronize()
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
            # Other threads, such as those of torch.distributed, may go on meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.graphs[size] = graph, self.forward(step, None)
        graph, results = self.graphs[size]
        graph.replay()
        return results


def runs(numbers, most):
    """(Index, number, count) of each run of consecutive numbers, of at most so many."""
    numbers, at = list(numbers), 0
    while at < len(numbers):
        end = at + 1
        while end < min(len(numbers), at + most) and numbers[end] == numbers[end - 1] + 1:
            end += 1
        yield at, numbers[at], end - at
        at = end


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
