# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of transformers, with its own attention (SDPA) and with ours: continuous
batching, and ``generate``. The model has Llama-3-8B's shape but 8 layers, and random weights.

    python -m benchmarks.transformers_batching [--out results.json] [--only "stock, 64 x 2048"]

Of continuous batching are told: new tokens a second of all requests, prompts included, and the
median time between two tokens of a request once all prompts are read. Of ``generate``: the time of
a step, as the difference of two runs. Ours comes first, so that something is told where the time
for the others runs out. "stock without cuDNN" is SDPA with what is left: cuDNN's attention takes
its time for each new length. Without a GPU the model is tiny, and the numbers mean nothing."""

import argparse
import itertools
import json
import statistics
import time

import torch
import transformers

import cupy_cache.integrations.transformers as integration

CASES = ((64, 2048), (32, 1024), (8, 512))  # sequences, tokens of each prompt
ON_GPU = torch.cuda.is_available()
# Fewer graphs than by default: of prompts each size would be captured by itself.
OURS = {"use_cuda_graph": (False, True)} if ON_GPU else {}
WAYS = {
    "ours": (integration.BATCHING, OURS),
    "stock": ("sdpa", {}),
    "stock without cuDNN": ("sdpa", {}),
}


def model():
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=8,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        rope_theta=500000.0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    if not ON_GPU:
        config.update({
            "vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        })  # fmt: skip
    with torch.device("cuda" if ON_GPU else "cpu"):
        made = transformers.LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16 if ON_GPU else torch.float32
        )
    return made.eval()


def prompts(made, sequences, length):
    generator = torch.Generator().manual_seed(sequences)
    return torch.randint(1, made.config.vocab_size, (sequences, length), generator=generator)


def batching(made, way, given, new_tokens):
    """(Seconds of all, median seconds of a step, tokens) of continuous batching."""
    implementation, settings = WAYS[way]
    torch.backends.cuda.enable_cudnn_sdp("without" not in way)
    made.set_attn_implementation(implementation)
    if not ON_GPU:
        settings = settings | {"num_blocks": 64, "max_batch_tokens": 256}
    manager = made.continuous_batching_context_manager(
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**settings),
        workload_hints=_hints(given, new_tokens),
    )
    with manager as running:
        began = time.perf_counter()
        names = running.add_requests(
            inputs=given.tolist(), max_new_tokens=new_tokens, record_timestamps=True
        )
        done = {}
        while len(done) < len(names):
            result = running.get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = result
            elif result is None and not running.is_running():
                raise RuntimeError("the manager stopped")
        seconds = time.perf_counter() - began
    errors = {result.error for result in done.values()} - {None}
    if errors:
        raise RuntimeError(errors.pop())
    times = [done[name].timestamps for name in names]
    ready = max(own[0] for own in times)
    steps = [
        after - before
        for own in times
        for before, after in itertools.pairwise(own)
        if before >= ready
    ]
    tokens = [done[name].generated_tokens for name in names]
    return seconds, statistics.median(steps) if steps else None, tokens


def _hints(given, new_tokens):
    from transformers.generation.continuous_batching.utils import WorkloadHints

    return WorkloadHints(
        max_prompt_length=given.shape[1], max_generated_length=new_tokens, num_requests=len(given)
    )


def generating(made, way, given, steps):
    """(Seconds of a step, and up to the first token) of ``generate``."""
    stock = way.startswith("stock")
    torch.backends.cuda.enable_cudnn_sdp("without" not in way)
    made.set_attn_implementation("sdpa" if stock else integration.ATTENTION)
    given = given.to(made.device)
    times = []
    for count in (1, 1, 1 + steps):
        cache = None if stock else integration.PagedCache(made.config)
        began = time.perf_counter()
        made.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count,
            past_key_values=cache,
        )  # fmt: skip
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return (times[2] - times[1]) / steps, times[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(".")[0])
    parser.add_argument("--out", help="a file for the results, as JSON")
    parser.add_argument("--only", nargs="*", help="parts of the names of what is to be measured")
    parser.add_argument("--new-tokens", type=int, default=64 if ON_GPU else 4)
    options = parser.parse_args()
    cases = CASES if ON_GPU else ((3, 20), (2, 10))
    made, results, found = model(), [], {}

    def tell(**record):
        results.append(record)
        print(json.dumps(record), flush=True)
        if options.out:
            with open(options.out, "w", encoding="utf-8") as file:
                json.dump(results, file, indent=1)

    def measure_batching(way, case):
        sequences = case[0]
        seconds, step, tokens = batching(made, way, prompts(made, *case), options.new_tokens)
        found.setdefault(case, tokens)
        pairs = (pair for both in zip(found[case], tokens) for pair in zip(*both))
        return {
            "seconds": seconds,
            "tokens_per_second": sequences * options.new_tokens / seconds,
            "step_ms": step and step * 1000,
            "decoded_per_second": step and sequences / step,
            "tokens_as_the_first": sum(one == other for one, other in pairs),
        }

    def measure_generate(way, case):
        step, first = generating(made, way, prompts(made, *case), 24 if ON_GPU else 3)
        return {"step_ms": step * 1000, "first_token_ms": first * 1000}

    tell(
        device=torch.cuda.get_device_name() if ON_GPU else "cpu", torch=torch.__version__,
        transformers=transformers.__version__, new_tokens=options.new_tokens,
    )  # fmt: skip
    batching(made, "ours", prompts(made, *cases[-1]), 4)  # kernels are compiled
    jobs = [
        *(("batching", "ours", case) for case in cases),
        *(("generate", way, case) for way in ("ours", "stock") for case in cases),
        *(("batching", "stock", case) for case in reversed(cases)),
        *(("generate", "stock without cuDNN", case) for case in cases),
        *(("batching", "stock without cuDNN", case) for case in reversed(cases)),
    ]
    for what, way, case in jobs:
        name = f"{what}, {way}, {case[0]} x {case[1]}"
        if options.only and not any(part in name for part in options.only):
            continue
        measure = measure_batching if what == "batching" else measure_generate
        try:
            tell(what=name, **measure(way, case))
        except Exception as error:  # out of memory, say: the others follow
            tell(what=name, error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main()
