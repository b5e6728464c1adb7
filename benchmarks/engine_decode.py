# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Steps of `examples/engine.py`, with a model of Llama-3-8B's shape but fewer layers:

    python -m benchmarks.engine_decode [--out FILE] [--stock]

For each number of sequences and length of context: the time of a step that decodes, what the host
does between two replays of its graph, and the time that reading the weights and the pages once
takes at the bandwidth given. Then a swap of a quarter of the sequences out and in: the steps of the
others while it goes on, beside their steps before it. ``--stock`` measures transformers' own
``generate`` as well. Weights and prompts are random. The result is JSON; times are milliseconds.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from engine import Engine
from engine_models import paged

from benchmarks import timing

CASES = (64, 2048), (32, 1024), (8, 512)
WARM, STEPS = 4, 32
BLOCK_SIZE = 16


def llama(layers, vocabulary):
    """A model with random weights, made on the GPU."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    with torch.device(timing.device()):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made.eval()


class Watched(Engine):
    """An engine that notes how long after a step's tokens were there the next step was ready."""

    def __init__(self, *given, **options):
        super().__init__(*given, **options)
        self.back, self.between, self.back_in = time.perf_counter(), [], False

        self.replay, self.graphs.replay = self.graphs.replay, self.noted

    def move_in(self, wait):
        if self.back_in:
            super().move_in(wait)  # who was swapped out comes back when told

    def noted(self, size):
        self.between.append(time.perf_counter() - self.back)
        return self.replay(size)

    def read(self, *given):
        made = super().read(*given)
        self.back = time.perf_counter()
        return made

    def timed(self, steps):
        """Milliseconds of each of so many steps, and of the host between two."""
        self.between.clear()
        times = []
        for _ in range(steps):
            begun = time.perf_counter()
            self.step()
            times.append(1e3 * (time.perf_counter() - begun))
        return times, [1e3 * one for one in self.between]


def filled(model, sequences, context, more, host_blocks=0):
    """An engine whose sequences have so many tokens, and may get as many more."""
    length = context + more
    blocks = sequences * (-(-length // BLOCK_SIZE) + 3)
    most = length + BLOCK_SIZE
    engine = Watched(
        paged(model, most, fuse=functools.partial(torch.compile, dynamic=True)), blocks,
        host_blocks, max_sequences=sequences, max_tokens=4096, max_length=most,
        block_size=BLOCK_SIZE,
    )  # fmt: skip
    vocabulary = model.config.vocab_size
    for name, prompt in enumerate(torch.randint(vocabulary, (sequences, context)).tolist()):
        engine.submit(name, prompt, more)
    while engine.waiting or any(engine.tables.length(one) < context for one in engine.tables):
        engine.step()
    return engine


def on_device(engine):
    """Milliseconds of a replay alone, one right after the other."""
    ((graph, _),) = engine.graphs.graphs.values()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(STEPS):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / STEPS


def to_read(engine):
    """Bytes of the weights, but for the table of embeddings, and of the pages."""
    model, tables = engine.model.model, engine.tables
    weights = sum(one.nbytes for one in model.parameters()) - model.model.embed_tokens.weight.nbytes
    tokens = sum(tables.length(one) for one in tables)
    return weights + tokens * engine.space.bytes_per_block // BLOCK_SIZE


def decoding(model, sequences, context, bandwidth):
    engine = filled(model, sequences, context, 4 * STEPS)
    engine.timed(WARM)
    times, between = engine.timed(STEPS)
    size = to_read(engine)
    step, least = statistics.median(times), size / bandwidth * 1e3
    record = {
        "sequences": sequences, "context": context, "step_ms": step,
        "host_between_replays_ms": statistics.median(between), "bytes_to_read": size,
        "least_ms": least, "step_over_least": step / least,
        "tokens_per_second": sequences / step * 1e3,
    }  # fmt: skip
    record["replay_ms"] = on_device(engine)
    return record


def swapping(model, sequences, context):
    """Steps of three quarters of the sequences: alone, and while the others move."""
    quarter, more = sequences // 4, 12 * STEPS
    host_blocks = quarter * ((context + more) // BLOCK_SIZE + 1)
    engine = filled(model, sequences, context, more, host_blocks)
    record = {"sequences": sequences, "moved": quarter, "context": context}
    pools = engine.tables.pool, engine.tables.host_pool
    for _ in range(2):  # the first time kernels are loaded, and a graph captured
        engine.timed(WARM)
        all_there = statistics.median(engine.timed(STEPS)[0])
        engine.leaving.extend(engine.running[:quarter])
        del engine.running[:quarter]
        out = moving(engine)
        for pool in pools:  # as if others had had the blocks, so that all are copied
            for block in pool.take(pool.num_free):
                pool.drop(block)
        engine.timed(WARM)
        alone = statistics.median(engine.timed(STEPS)[0])
        engine.back_in = True
        back = moving(engine)
        engine.back_in = False
    # Who is back decodes too: beside what a step of as many takes.
    slope = (all_there - alone) / quarter
    for way, steps in (("out", out), ("in", back)):
        expected = [alone + slope * (count - sequences + quarter) for count, _ in steps]
        record[f"steps_{way}_ms"] = [took for _, took in steps]
        record[f"{way}_over_alone"] = sum(record[f"steps_{way}_ms"]) / sum(expected)
    return record | {"alone_ms": alone, "all_ms": all_there}


def moving(engine):
    """(Sequences, milliseconds) of the steps while others move, the first one included."""
    steps = []
    while (
        not steps
        or engine.space.num_moving
        or engine.leaving
        or (engine.back_in and engine.swapped)
    ):
        count = len(engine.running)
        steps.append((count, engine.timed(1)[0][0]))
    return steps


@torch.no_grad()
def stock(model, sequences, context):
    """A step of ``generate``: the difference between many new tokens and few."""
    prompts = torch.randint(model.config.vocab_size, (sequences, context), device=model.device)
    times = {}
    for new in (2, 2, 10):
        begun = time.perf_counter()
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=new
        )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times[new] = 1e3 * (time.perf_counter() - begun)
    step = (times[10] - times[2]) / 8
    return {"stock_step_ms": step, "stock_tokens_per_second": sequences / step * 1e3}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="where the JSON goes; by default it is printed")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--bandwidth", type=float, default=3.1e12, help="bytes a second")
    parser.add_argument("--stock", action="store_true")
    options = parser.parse_args()
    if not timing.on_gpu():
        raise SystemExit("there is no GPU")
    model = llama(options.layers, options.vocabulary)
    found = {
        "machine": timing.machine(), "transformers": transformers.__version__,
        "layers": options.layers, "vocabulary": options.vocabulary,
        "bandwidth": options.bandwidth, "decoding": [],
    }  # fmt: skip
    for case in CASES:
        record = decoding(model, *case, options.bandwidth)
        if options.stock:
            record |= stock(model, *case)
        found["decoding"].append(record)
        print(record, file=sys.stderr, flush=True)
    found["swapping"] = swapping(model, *CASES[0])
    print(found["swapping"], file=sys.stderr, flush=True)
    text = json.dumps(found, indent=1)
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
