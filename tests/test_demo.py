# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import builtins
import contextlib
import ctypes
import importlib.metadata
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import installed

import cupy_cache as cc
from cupy_cache.cli import command_line, demo

SMALL = ("--tokens", "6", "--beams", "3", "--layers", "2", "--block-size", "4")


@pytest.fixture(autouse=True)
def no_faults_left():
    """A run that is meant to fail may leave some behind."""
    yield
    with contextlib.suppress(cc.FaultError):
        cc.raise_faults()


@pytest.fixture
def file(tmp_path, rng):
    """Any bytes; a length that ends inside a block, so that forks have something to copy."""
    path = tmp_path / "input"
    path.write_bytes(rng.integers(0, 256, 23, np.uint8).tobytes())
    return path


def run(*arguments, backend="numpy"):
    return command_line.main(["demo", "--backend", backend, *map(str, arguments)])


# --- it agrees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_pages_agree_with_a_dense_cache(file, capsys, layout, dtype):
    assert run(file, *SMALL, "--layout", layout, "--dtype", dtype) == 0
    check_report(capsys, dtype, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_pages_agree_on_a_gpu(file, capsys, layout, dtype):
    assert run(file, *SMALL, "--layout", layout, "--dtype", dtype, backend="cupy") == 0
    # On a GPU float32 queries attend to gathered rows.
    check_report(capsys, dtype, layout, reads_pages=dtype != "float32")


def check_report(capsys, dtype, layout, reads_pages=True):
    report = capsys.readouterr().out
    size = np.dtype(demo.DTYPES[dtype]).itemsize
    layers, block_size, tokens, beams = 2, 4, 6, 3
    row = layers * 2 * 2 * 32 * size  # bytes of a token: keys and values, 2 heads of 32
    lines = {line.split()[0]: line.split()[1:3] for line in report.splitlines() if line}
    written = 23 + tokens + beams * tokens
    steps = 1 + tokens + tokens
    assert lines["reshape_and_cache_flash"] == [f"{steps * layers:,}", f"{written * row:,}"]
    if reads_pages:
        assert lines["paged_attention"][0] == f"{steps * layers:,}"
    assert lines["slot_mapping"] == [f"{steps:,}", f"{written * 8:,}"]
    swapped = -(-(23 + tokens // 2) // block_size)
    assert lines["swap_blocks"] == ["2", f"{2 * swapped * block_size * row:,}"]
    moved = re.search(rf"swapped out and in: {swapped} blocks, (\d+) of them into other", report)
    assert 0 < int(moved[1]) <= swapped
    assert int(lines["copy_blocks"][0]) >= 2  # for the greedy sequence and for the beams
    assert f"{dtype}, {layout}" in report
    assert report.count("\nbeam, ") == beams
    assert f"OK: {steps} steps" in report


@pytest.mark.parametrize(
    "options",
    [
        ("--block-size", "1", "--tokens", "3"),
        ("--block-size", "7", "--beams", "1"),
        ("--block-size", "500", "--tokens", "1"),
        ("--beams", "300", "--tokens", "2", "--layers", "1"),
        ("--seed", "7", "--tokens", "5"),
    ],
)
def test_other_sizes(file, options):
    assert run(file, *SMALL, *options) == 0


def test_one_byte_is_enough(tmp_path):
    path = tmp_path / "input"
    path.write_bytes(b"\x00")
    assert run(path, *SMALL) == 0


def test_a_long_file_is_read_in_chunks(tmp_path, rng, capsys):
    path = tmp_path / "input"
    path.write_bytes(rng.integers(0, 256, 5000, np.uint8).tobytes())
    assert run(path, *SMALL, "--tokens", "2") == 0
    captured = capsys.readouterr()
    assert f"prompt: {command_line.PROMPT} bytes of" in captured.out
    assert f"prompt: {command_line.PROMPT} of {command_line.PROMPT} tokens" in captured.err


def test_as_a_command_on_the_readme(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cupy_cache", "demo", "--backend", "numpy", "--tokens", "2"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "README" in done.stdout and "\nOK: " in done.stdout


# --- the shipped kernels do the main job too ------------------------------------------------------


@pytest.fixture
def kernels(emulated_world, monkeypatch):
    """Every operation that the demo calls runs its kernel, on copies in the emulated memory."""
    from emulator import EmulatedArray, memory

    def put(value, copies):
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            return [put(array, copies) for array in value]
        if not isinstance(value, np.ndarray):
            return value
        steps = sum((extent - 1) * step for extent, step in zip(value.shape, value.strides))
        span = (ctypes.c_uint8 * (steps + value.itemsize)).from_address(value.ctypes.data)
        storage = memory().allocate(len(span))
        storage.bytes[:] = span
        copies.append((span, storage))
        return EmulatedArray(storage, 0, value.shape, value.strides, value.dtype.name)

    def emulated(operation):
        def call(*arguments, **named):
            copies = []
            given = {name: put(value, copies) for name, value in named.items()}
            result = operation(*(put(argument, copies) for argument in arguments), **given)
            if "out" in named:
                result = None
            for span, storage in copies:
                span[:] = storage.bytes.tobytes()
            called.add(operation.__name__)
            return None if result is None else result.numpy()

        return call

    called, world = set(), emulated_world()
    slopes = cc.alibi_slopes
    for name in ("reshape_and_cache_flash", "copy_blocks", "swap_blocks", "gather_cache",
                 "slot_mapping", "paged_attention"):  # fmt: skip
        monkeypatch.setattr(cc, name, emulated(getattr(cc, name)))
    monkeypatch.setattr(
        cc, "alibi_slopes", lambda heads, framework: slopes(heads, framework="emulated").numpy()
    )
    yield called
    world.close()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_pages_agree_with_emulated_kernels(file, kernels, layout):
    assert run(file, "--tokens", 3, "--beams", 2, "--layers", 1, "--block-size", 4,
               "--layout", layout) == 0  # fmt: skip
    assert len(kernels) == 6


# --- it tells a broken cache ----------------------------------------------------------------------


def nothing(*arguments, **named):
    """An operation that does not do its work."""


def only_keys(copy_blocks):
    return lambda keys, values, pairs: copy_blocks(keys, [key.copy() for key in values], pairs)


def not_the_last_layer(copy_blocks):
    return lambda keys, values, pairs: copy_blocks(keys[:-1], values[:-1], pairs)


def one_off(slot_mapping):
    return lambda *arguments: slot_mapping(*arguments) + 1


def far_off(slot_mapping):
    return lambda *arguments: slot_mapping(*arguments) + 2**40


def backwards(slot_mapping):
    return lambda *arguments: slot_mapping(*arguments)[::-1].copy()


def in_other_order(swap_blocks):
    def swap(sources, destinations, pairs):
        old, new = zip(*pairs)
        return swap_blocks(sources, destinations, list(zip(old, new[1:] + new[:1])))

    return swap


def keys_for_values(write):
    return lambda key, value, keys, values, slots: write(value, key, keys, values, slots)


def without_the_last(write):
    return lambda key, value, keys, values, slots: write(key, value, keys, values, slots[:-1])


def from_the_next_token(gather):
    def read(cache, rows, table, lengths):
        gather(cache, rows, table, lengths)
        rows[:] = np.roll(rows, 1, axis=0)

    return read


def in_other_dtype(gather):
    def read(cache, rows, table, lengths):
        gather(cache, rows, table, lengths)
        rows.view(np.int16)[0, 0, 0] ^= 1  # the last bit of one number

    return read


def with_other_heads(attend):
    return lambda query, *arguments, **named: attend(query[:, ::-1], *arguments, **named)


def without_the_last_token(attend):
    return lambda *arguments, **named: attend(*arguments[:4], arguments[4] - 1, **named)


def reversed_slopes(alibi_slopes):
    return lambda heads, framework: alibi_slopes(heads, framework=framework)[::-1]


@pytest.mark.parametrize(
    "operation, broken, words",
    [
        ("copy_blocks", lambda op: nothing, ("step 2 (greedy)", "keys", "nan")),
        ("copy_blocks", only_keys, ("step 2 (greedy)", "values", "nan")),
        ("copy_blocks", not_the_last_layer, ("step 2 (greedy)", "layer 1", "keys", "nan")),
        ("slot_mapping", one_off, ("step 1 (prompt)", "layer 0", "(0, 0, 0)", "nan")),
        ("slot_mapping", far_off, ("step 1 (prompt)", "reshape_and_cache_flash", "slot_mapping")),
        ("slot_mapping", backwards, ("step 1 (prompt)", "keys")),
        ("swap_blocks", lambda op: nothing, ("greedy", "keys", "nan")),
        ("swap_blocks", in_other_order, ("greedy", "keys")),
        ("reshape_and_cache_flash", lambda op: nothing, ("step 1 (prompt)", "nan")),
        ("reshape_and_cache_flash", keys_for_values, ("step 1 (prompt)", "keys")),
        ("reshape_and_cache_flash", without_the_last, ("step 1 (prompt)", "(22, 0, 0)", "nan")),
        ("gather_cache", lambda op: nothing, ("step 1 (prompt)", "nan")),
        ("gather_cache", from_the_next_token, ("step 1 (prompt)", "keys")),
        ("gather_cache", in_other_dtype, ("step 1 (prompt)", "1 of 1472 elements", "(0, 0, 0)")),
        ("paged_attention", lambda op: nothing, ("step 1 (prompt)", "logits differ by nan")),
        ("paged_attention", with_other_heads, ("step 1 (prompt)", "logits differ")),
        ("paged_attention", without_the_last_token, ("step 1 (prompt)", "logits differ")),
        ("alibi_slopes", reversed_slopes, ("step 1 (prompt)", "logits differ")),
    ],
)
def test_a_broken_operation_is_found(file, capsys, monkeypatch, operation, broken, words):
    monkeypatch.setattr(cc, operation, broken(getattr(cc, operation)))
    assert run(file, *SMALL) == 1
    captured = capsys.readouterr()
    assert "DIFFERENCE: step " in captured.err
    for word in words:
        assert word in captured.err
    assert "OK" not in captured.out


def test_a_block_that_is_still_shared_is_found(file, capsys, monkeypatch):
    """Beams that write into one block, because nobody counts who uses it."""
    monkeypatch.setattr(cc.BlockPool, "share", nothing)
    assert run(file, *SMALL) == 1
    assert "DIFFERENCE: step" in capsys.readouterr().err


def test_another_choice_is_found(file, capsys, monkeypatch):
    """Nothing but the choice differs: scores that the check of the logits lets pass."""
    monkeypatch.setattr(demo.Run, "_require_close", nothing)
    monkeypatch.setattr(cc, "alibi_slopes", reversed_slopes(cc.alibi_slopes))
    assert run(file, *SMALL) == 1
    error = capsys.readouterr().err
    assert "DIFFERENCE: after step" in error and "chose" in error


# --- the model and the search are what they say ---------------------------------------------------


def test_attention_is_grouped_causal_and_biased(rng):
    """Against plain loops in float64."""
    n, total, size = 3, 7, demo.HEAD_SIZE
    query = rng.standard_normal((n, 8, size), np.float32)
    keys, values = rng.standard_normal((2, total, 2, size), np.float32)
    slopes = rng.random(8, np.float32)
    got = demo.attention(np, query, keys, values, slopes)
    for i in range(n):
        position = total - n + i
        for head in range(8):
            scores = [
                float(query[i, head].astype(np.float64) @ keys[t, head // 4]) / size**0.5
                - float(slopes[head]) * (position - t)
                for t in range(position + 1)
            ]
            weights = np.exp(scores) / np.exp(scores).sum()
            expected = weights @ values[: position + 1, head // 4].astype(np.float64)
            np.testing.assert_allclose(got[i, head], expected, rtol=1e-4, atol=1e-5)


def test_logits_do_not_depend_on_the_chunks(rng):
    decoder = demo.Decoder(np, layers=2, seed=1, dtype=np.float32)
    tokens = rng.integers(0, 256, 20).tolist()
    logits = []
    for chunks in ([tokens], [tokens[:1], tokens[1:13], tokens[13:]]):
        cache = demo.DenseCache(np, 2, np.float32)
        for chunk in chunks:
            last, _ = decoder.forward(cache, cc.alibi_slopes(8, framework="numpy"), [0], [chunk])
        logits.append(last)
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-4)


class TableRun:
    """A run whose logits depend on the last token alone."""

    steps, tolerance = 0, 0.0

    def __init__(self, table):
        self.table, self.live, self.made = table, {0}, 0

    def fork(self, parent):
        assert parent in self.live
        self.made += 1
        self.live.add(self.made)
        return self.made

    def free(self, sequence):
        self.live.remove(sequence)

    def step(self, phase, batch, chunks):
        return (self.table[[chunk[-1] for chunk in chunks]],) * 2


def test_beam_search_finds_the_best(rng):
    """With as many beams as there are tokens nothing is missed within two tokens."""
    table = rng.standard_normal((256, 256))
    run = TableRun(table)
    start = table[:1], table[:1]
    beams, _ = demo.search(run, "", [demo.Beam(0.0, run.fork(0), [])], start, 256, 2)
    logs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    totals = logs[0][:, None] + logs
    best = np.unravel_index(totals.argmax(), totals.shape)
    assert beams[0].tokens == list(best)
    assert beams[0].score == pytest.approx(totals.max())
    assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    assert run.live == {0, *(beam.sequence for beam in beams)}


def test_a_beam_of_one_is_greedy(rng):
    table = rng.standard_normal((256, 256))
    run = TableRun(table)
    (beam,), _ = demo.search(
        run, "", [demo.Beam(0.0, run.fork(0), [])], (table[:1], table[:1]), 1, 5
    )
    token, expected = 0, []
    for _ in range(5):
        token = int(table[token].argmax())
        expected.append(token)
    assert beam.tokens == expected


def test_all_blocks_come_back(rng):
    prompt = rng.integers(0, 256, 37, np.uint8).tobytes()
    done, greedy, _, _, _ = demo.demo(
        np, prompt, 9, 3, 1, 0, 5, "NHD", "float16", lambda phase, tokens: None
    )
    done.free(greedy.sequence)
    for pool in (done.paged.tables.pool, done.paged.tables.host_pool):
        assert pool.num_free == pool.num_blocks


# --- the command line -----------------------------------------------------------------------------


def refused(capsys, *arguments, backend="numpy"):
    assert run(*arguments, backend=backend) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("cupy-cache: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_an_empty_file_is_refused(tmp_path, capsys):
    path = tmp_path / "nothing"
    path.touch()
    assert "nothing: it is empty" in refused(capsys, path)


def test_a_missing_file_is_refused(tmp_path, capsys):
    assert "none: No such file" in refused(capsys, tmp_path / "none")


def test_a_directory_is_refused(tmp_path, capsys):
    assert "Is a directory" in refused(capsys, tmp_path)


def test_cupy_without_cupy_is_refused(file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "cupy_cache info" in refused(capsys, file, backend="cupy")


def test_auto_without_cupy_is_numpy(file):
    # A process of its own: in this one other tests may have used a GPU.
    code = (
        "import sys; sys.modules['cupy'] = None; from cupy_cache.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--backend", "auto", str(file), *SMALL],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first = done.stdout.partition("\n")[0]
    assert "backend numpy on CPU" in first and "; CuPy is not installed" in first


def test_a_broken_cupy_is_told(file, capsys, monkeypatch):
    def torn(name, *args, **more):
        if name == "cupy":
            raise ImportError("its library is torn")
        return real(name, *args, **more)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", torn)
    assert "CuPy cannot be imported: its library is torn" in refused(capsys, file, backend="cupy")


def test_without_a_checkout_the_metadata_has_the_readme(tmp_path, capsys, monkeypatch):
    if not installed():
        pytest.skip("the package is not installed")
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "cupy_cache" / "__main__.py"))
    (tmp_path / "README.md").write_text("another's")
    _, prompt = command_line._prompt(None)
    assert prompt.startswith(b"# cupy_cache")

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", not_installed)
    assert command_line.main(["demo"]) == 2
    assert "name a FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("demo", "--tokens", "0"), ("--tokens", "1 or more, got 0")),
        (("demo", "--beams", "-1"), ("--beams", "1 or more, got -1")),
        (("demo", "--seed", "-1"), ("--seed", "0 or more")),
        (("demo", "--layers", "two"), ("--layers", "'two'")),
        (("demo", "--dtype", "int8"), ("--dtype", "float16")),
        (("demo", "one", "two"), ("two",)),
        (("nonsense",), ("nonsense",)),
        ((), ("COMMAND",)),
    ],
)
def test_usage(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_version_and_help(capsys):
    for arguments, words in (
        (["--version"], [cc.__version__]),
        (["--help"], ["demo", "info", "exit codes"]),
        (["demo", "--help"], ["--block-size", "default: 16", "FILE"]),
        (["info", "--help"], ["--json"]),
        (["warmup", "--help"], ["--num-kv-heads", "--layout", "--json"]),
        (["bench", "--help"], ["--backend", "--json"]),
        (["clear-cache", "--help"], ["CUPY_CACHE_DIR"]),
    ):
        with pytest.raises(SystemExit) as caught:
            command_line.main(arguments)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        for word in words:
            assert word in shown


def test_an_interruption_is_no_traceback(file, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "demo", interrupted)
    assert run(file) == 130
    assert "interrupted" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_on_a_terminal_and_lines_elsewhere():
    totals = {"prompt": 4, "greedy": 2}
    shown = {}
    for stream in (Terminal(), io.StringIO()):
        with command_line.Progress(totals, stream) as progress:
            for phase in ("prompt", "prompt", "greedy", "greedy"):
                progress(phase, 2 if phase == "prompt" else 1)
        shown[type(stream)] = stream.getvalue()
    assert shown[Terminal].count("\r") == 5 and "\n" not in shown[Terminal]
    assert "100% greedy: 2 of 2 tokens" in shown[Terminal]
    assert shown[io.StringIO] == "prompt: 4 of 4 tokens\ngreedy: 2 of 2 tokens\n"


# --- the examples run -----------------------------------------------------------------------------

FOLDER = Path(__file__).resolve().parent.parent / "examples"
PARTS = "engine_models", "engine_requests"  # of `engine.py`
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem not in PARTS)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    for package in ("torch", "transformers"):
        if f"import {package}" in path.read_text(encoding="utf-8"):
            pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.extra
def test_the_code_of_the_page_about_engines(tmp_path):
    pytest.importorskip("torch")
    page = FOLDER.parent / "docs" / "engine.md"
    parts = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(parts) > 5
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(parts)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
