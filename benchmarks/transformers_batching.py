# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""transformers with our attention and cache, and with its own (SDPA): continuous batching, and
``generate``. The model has Llama-3-8B's shape but 8 layers, and random weights.

    python -m benchmarks.transformers_batching [--out FILE] [--only "stock, 64 x 2048" ...]

Of continuous batching are told: new tokens a second of all requests, prompts included, and the
median time between two tokens of a request once all prompts are read. Of ``generate``: the time of
a step, as the difference of two runs, and that up to the first token. Before that our kernels are
compiled. "stock, graphs" captures CUDA graphs of all steps; "stock, no cuDNN" is SDPA with what is
left: cuDNN's attention takes its time for each new length. "ratio" is ours over the best of the
others. The result is JSON, written anew after each measurement, ours first, so that something is
told where the time runs out.
Without a GPU the model is tiny, and the numbers mean nothing."""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

import cupy_cache.integrations.transformers as integration
from benchmarks import timing
from benchmarks.engine_decode import CASES, llama

ON_GPU = timing.on_gpu()
# Attention, settings of continuous batching, and whether cuDNN's attention is among torch's.
WAYS = {
    # Fewer graphs than by default: of prompts each size would be captured by itself.
    "ours": (integration.BATCHING, {"use_cuda_graph": (False, True)}, True),
    "stock": ("sdpa", {}, True),
    "stock, graphs": ("sdpa", {"use_cuda_graph": True}, True),
    "stock, no cuDNN": ("sdpa", {}, False),
}
WARM, STEPS = 4, 24 if ON_GPU else 3  # of generate


def tiny():
    """A model for the CPU."""
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def prompts(model, sequences, context):
    generator = torch.Generator().manual_seed(sequences)
    return torch.randint(1, model.config.vocab_size, (sequences, context), generator=generator)


def batching(model, way, given, new_tokens):
    """(What was measured, tokens) of continuous batching."""
    implementation, settings, cudnn = WAYS[way]
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    model.set_attn_implementation(implementation)
    if not ON_GPU:
        settings = {"num_blocks": 64, "max_batch_tokens": 256, "use_cuda_graph": False}
    manager = model.continuous_batching_context_manager(
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
    found = {
        "tokens_per_second": len(given) * new_tokens / seconds,
        "step_ms": 1e3 * statistics.median(steps) if steps else None,
        "seconds": seconds,
    }
    return found, [done[name].generated_tokens for name in names]


def _hints(given, new_tokens):
    from transformers.generation.continuous_batching.utils import WorkloadHints

    return WorkloadHints(
        max_prompt_length=given.shape[1], max_generated_length=new_tokens, num_requests=len(given)
    )


def generating(model, way, given):
    """What was measured of ``generate``."""
    _, _, cudnn = WAYS[way]
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    model.set_attn_implementation(integration.ATTENTION if way == "ours" else "sdpa")
    given = given.to(model.device)
    times = []
    for count in (1 + WARM, 1 + WARM, 1 + WARM + STEPS):  # in the first one kernels are compiled
        cache = integration.PagedCache(model.config) if way == "ours" else None
        began = time.perf_counter()
        model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count,
            past_key_values=cache,
        )  # fmt: skip
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    step = (times[2] - times[1]) / STEPS
    return {"step_ms": step, "first_token_ms": times[1] - WARM * step}


# What tells how good a way is, and whether more of it is better.
MEASURES = {"batching": ("tokens_per_second", 1), "generate": ("step_ms", -1)}


def ratio(what, record):
    """How many times as fast ours is as the best of the others; None where either is missing."""
    key, sign = MEASURES[what]
    speeds = {way: record[way][key] ** sign for way in WAYS if key in record.get(way, {})}
    ours = speeds.pop("ours", None)
    return ours / max(speeds.values()) if ours and speeds else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--out", help="where the JSON goes; by default it is printed at the end")
    parser.add_argument("--only", nargs="*", help="parts of the names of what is to be measured")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--new-tokens", type=int, default=64 if ON_GPU else 4)
    options = parser.parse_args()
    cases = CASES if ON_GPU else ((3, 20), (2, 10))
    model = llama(options.layers, options.vocabulary) if ON_GPU else tiny()
    records = {
        what: [{"sequences": sequences, "context": context} for sequences, context in cases]
        for what in ("batching", "generate")
    }
    found = {
        "machine": timing.machine(), "transformers": transformers.__version__,
        "layers": model.config.num_hidden_layers, "vocabulary": model.config.vocab_size,
        "new_tokens": options.new_tokens, **records,
    }  # fmt: skip
    tokens = {}

    def measure(what, way, case):
        given = prompts(model, *case)
        if what == "generate":
            return generating(model, way, given)
        if way == "ours":
            batching(model, way, given, 4)  # kernels are compiled
        made, written = batching(model, way, given, options.new_tokens)
        tokens.setdefault(case, written)
        pairs = [pair for both in zip(tokens[case], written) for pair in zip(*both)]
        return made | {"same_tokens": sum(one == other for one, other in pairs) / len(pairs)}

    jobs = [
        *(("batching", "ours", case) for case in cases),
        *(("generate", way, case) for way in ("ours", "stock") for case in cases),
        *(("batching", way, case) for way in WAYS if way != "ours" for case in cases[1:]),
        *(("generate", "stock, no cuDNN", case) for case in cases),
        *(("batching", way, cases[0]) for way in WAYS if way != "ours"),
    ]
    for what, way, case in jobs:
        name = f"{what}, {way}, {case[0]} x {case[1]}"
        if options.only and not any(part in name for part in options.only):
            continue
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
        try:
            made = measure(what, way, case)
        except Exception as error:  # out of memory, say: the others follow
            made = {"error": f"{type(error).__name__}: {error}"[:300]}
        record = records[what][cases.index(case)]
        record[way] = made
        record["ratio"] = ratio(what, record)
        print(json.dumps({name: made}), file=sys.stderr, flush=True)
        if options.out:
            text = json.dumps(found, indent=1)
            Path(options.out).write_text(text + "\n", encoding="utf-8")
    if not options.out:
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
