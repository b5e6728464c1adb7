# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The engine of `examples/`: its tokens are those of transformers' ``generate``, whatever room
there is."""

import copy
import gc
import importlib
import subprocess
import sys
import weakref
from pathlib import Path

import late_swaps
import pytest

import cupy_cache as cc
from cupy_cache.runtime import env

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LENGTHS = 5, 61, 33, 1, 47, 18
VOCABULARY = 512
NEW = 17
ROOM = {"max_sequences": 6, "max_tokens": 24, "max_length": 128, "block_size": 4}


@pytest.fixture(scope="module")
def example():
    """The module of the engine."""
    sys.path.insert(0, str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield importlib.import_module("engine")
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(params=["llama", "bloom", "deepseek_v3"])
def model(request, example, seed):
    torch.manual_seed(seed)
    config = example.small_models()[request.param]
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def requests(rng):
    """(Prompt, new tokens, beams); some prompts begin alike."""
    prompts = [rng.integers(3, VOCABULARY, length).tolist() for length in LENGTHS]
    prompts += [prompts[1][:40] + prompt[:9] for prompt in prompts[2:4]]
    return [(prompt, NEW + at, (1, 3, 1, 2)[at % 4]) for at, prompt in enumerate(prompts)]


def served(example, model, requests, num_blocks, host_blocks, **room):
    room = ROOM | room
    model = example.paged(model, room["max_length"])
    engine = example.Engine(model, num_blocks, host_blocks, **room)
    for number, request in enumerate(requests):
        engine.submit(number, *request)
    found = engine.run()
    assert engine.tables.pool.num_free == num_blocks and not len(engine.tables)
    assert engine.tables.host_pool.num_free == host_blocks
    return [found[number] for number in range(len(requests))], engine.counts


def test_tokens_are_those_of_generate(example, model, requests):
    """With room for all; by turns, through host memory; and where there is none, too."""
    expected = [example.generated(model, *request) for request in requests]
    found, roomy = served(example, model, requests, 300, 0)
    assert found == expected
    found, by_turns = served(example, model, requests, 36, 60)
    assert found == expected
    found, anew = served(example, model, requests, 36, 0)
    assert found == expected
    for counts in roomy, by_turns, anew:
        assert counts["steps with prompts"] and counts["steps that decode"]
    assert roomy["tokens shared"] >= 40 and not roomy["blocks moved"]
    assert by_turns["blocks moved"] and anew["begun anew"]


def test_moves_that_take_their_time(example, model, requests, monkeypatch, rng):
    """Whole requests at once, and a block at each step; copies are done later than begun."""
    spaces = []

    def late(*given, **options):
        spaces.append(late_swaps.LateSpace(rng, *given, **options))
        return spaces[-1]

    monkeypatch.setattr(cc, "SwapSpace", late)
    requests = [(prompt, new + 20, beams) for prompt, new, beams in requests]
    expected = [example.generated(model, *request) for request in requests]
    for bytes_per_step in (1 << 20, 1):
        found, counts = served(example, model, requests, 40, 60, bytes_per_step=bytes_per_step)
        assert found == expected and counts["blocks moved"] and spaces.pop().late.made


def test_sequences_end_early(example, model, requests):
    """The token that ends is one that is generated; beams end at different lengths."""
    for prompt, new, beams in requests[:2]:
        made = example.generated(model, prompt, new, beams)[len(prompt) :]
        for end in (made[0], made[len(made) // 2], made[:2]):
            model.generation_config.eos_token_id = end
            some = [(prompt, new, n) for n in (1, 2, 3)]
            expected = [example.generated(model, *request) for request in some]
            assert len(expected[0]) < len(prompt) + new or beams > 1
            assert served(example, model, some, 120, 0)[0] == expected


def test_one_request_that_is_too_long(example, model):
    model.generation_config.eos_token_id = None  # else it may be the first token
    engine = example.Engine(example.paged(model, 128), 4, 8, **ROOM)
    engine.submit("a", range(3, 19), 4)
    with pytest.raises(cc.OutOfBlocksError, match=r"step: out of blocks: 1 are needed, and 0 of 4"):
        engine.run()


def test_it_goes_when_nobody_has_it(example):
    """Its graphs too, at once: NCCL waits for those that it is part of."""
    model = transformers.AutoModelForCausalLM.from_config(example.small_models()["llama"]).eval()
    engine = example.Engine(example.paged(model, 128), 20, 0, **ROOM)
    engine.submit("a", range(3, 9), 3)
    gc.disable()
    try:
        assert len(engine.run()["a"]) in range(7, 10)
        there = [weakref.ref(one) for one in (engine, engine.graphs, engine.space, engine.tables)]
        del engine
        assert [one() for one in there] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.extra
def test_two_processes():
    """Each with half of the heads: by Gloo on the CPU; by NCCL in 16 bits where there are two GPUs.
    The tokens are those of both halves in one process."""
    if not torch.distributed.is_available():
        pytest.skip("without torch.distributed")
    example = str(EXAMPLES / "engine_ranks.py")
    done = subprocess.run(
        [sys.executable, example], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 6 requests 6 as by one process with both halves") == 3
    assert done.stdout.count("blocks moved") == 3
    if torch.cuda.device_count() < 2:
        assert done.stdout.count("6 as by one with all heads at once") == 3


@pytest.mark.gpu
@pytest.mark.skipif(env.torch_is_uncached(), reason="torch captures nothing without its cache")
def test_on_a_gpu(example, model, requests):
    """In 16 bits tokens may differ; but by the stock model in 32 each is nearly the likeliest.
    Steps that decode are replays, and sequences are moved beside them."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    stock = copy.deepcopy(model)
    requests = [(prompt, new + 20, 1) for prompt, new, _ in requests]
    found, counts = served(example, model.to("cuda", torch.bfloat16), requests, 40, 60)
    cc.raise_faults()
    assert counts["steps that decode"] and counts["blocks moved"]
    for (prompt, *_), tokens in zip(requests, found):
        tokens = torch.tensor([tokens])
        with torch.no_grad():
            logits = stock(tokens[:, :-1]).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, tokens[0, len(prompt) :, None])
        short = (logits.max(1, keepdim=True).values - chosen) / logits.std(1, keepdim=True)
        assert short.mean() < 0.3, short  # of any other token about 3
