# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The example of two processes: as a command, and its decoder against one without pages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "transfer.py"

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="without torch.distributed"),
]


@pytest.fixture(scope="module")
def transfer():
    spec = importlib.util.spec_from_file_location("transfer_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.extra
def test_two_processes():
    """By Gloo on the CPU; by NCCL where there are two GPUs."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prompts read and sent") == 2
    assert "5 sequences: the same tokens" in done.stdout


def dense(transfer, decoder, prompt, count):
    """The tokens of the same weights, all of the sequence anew for each."""
    heads, group = transfer.HEADS, transfer.HEADS // transfer.KV_HEADS
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)])
    tokens = list(prompt)
    for _ in range(count):
        n = len(tokens)
        distance = torch.arange(n) - torch.arange(n)[:, None]
        x = decoder.embedding[tokens]
        for (part,), up, down in decoder.weights:
            query, key, value = (
                (transfer.normalised(x) @ weight).view(n, -1, transfer.HEAD_SIZE).transpose(0, 1)
                for weight in part[:3]
            )
            key, value = (rows.repeat_interleave(group, 0) for rows in (key, value))
            scores = query @ key.transpose(1, 2) * transfer.HEAD_SIZE**-0.5
            scores = scores + slopes[:, None, None] * distance
            weights = scores.masked_fill(distance > 0, -torch.inf).softmax(-1)
            x = x + (weights @ value).transpose(0, 1).reshape(n, -1) @ part[3]
            x = x + (transfer.normalised(x) @ up).relu() @ down
        tokens.append(int((transfer.normalised(x[-1]) @ decoder.head).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("shards", [(0,), (0, 1)])
def test_one_process(transfer, rng, shards):
    prompts = [rng.integers(0, 256, length).tolist() for length in (1, 20, 33)]
    made = [
        transfer.Decoder(torch.device("cpu"), torch.float32, 2, 99, numbers, len(numbers))
        for numbers in ((0,), shards)
    ]
    found = transfer.alone(made[1], prompts, 4)
    assert found == [dense(transfer, made[0], prompt, 4) for prompt in prompts]
