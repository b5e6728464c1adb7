# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The commands end quietly, and with the right status, whatever becomes of their output; the
environment's variables are said to be wrong once, and stop nothing."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.cli import bench, command_line, demo
from cupy_cache.runtime import log

DEMO = "demo --backend numpy --tokens 2 --layers 1 --beams 1"
QUIET = "2>/dev/null"


def shell(command, unbuffered="", **variables):
    """(Status of the first of the pipe, output, errors) of a command line of bash, in which
    ``cupy-cache`` is this package's."""
    lines = f'cupy-cache() {{ "{sys.executable}" -m cupy_cache "$@"; }}; {command}; '
    done = subprocess.run(
        ["bash", "-c", lines + 'echo "status ${PIPESTATUS[0]}"'],
        env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": unbuffered, **variables},
        capture_output=True, check=True,
    )  # fmt: skip
    out = done.stdout.decode(errors="replace")
    text, _, status = out.rpartition("status ")
    return int(status), text, done.stderr.decode(errors="replace")


# Where the output is not buffered, errors come at the first write, else at the last.
BUFFERING = pytest.mark.parametrize("unbuffered", ["", "1"])
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


@pytest.mark.extra
@BUFFERING
@pytest.mark.parametrize("command", [DEMO, "info", "clear-cache", "--help"])
def test_a_reader_that_goes(command, unbuffered):
    # The reader is gone before anything is written.
    status, _, errors = shell(f"cupy-cache {command} 2> >(grep -v tokens >&2) | true", unbuffered)
    assert status == command_line.READER_GONE and not errors
    if command == DEMO:
        status, text, errors = shell(f"cupy-cache {command} {QUIET} | head -1", unbuffered)
        assert status in (0, command_line.READER_GONE)
        assert text.count("\n") == 1 and not errors


@pytest.mark.extra
@needs_dev_full
@BUFFERING
@pytest.mark.parametrize("command", [DEMO, "info --json", "--help"])
def test_a_full_disk(command, unbuffered):
    status, _, errors = shell(f"cupy-cache {command} > /dev/full", unbuffered)
    assert status == command_line.CANNOT_RUN
    *_, last = errors.splitlines()
    assert last == "cupy-cache: error: cannot write the output: No space left on device"
    assert "Traceback" not in errors


@pytest.mark.extra
@pytest.mark.parametrize(
    "where",
    ["2>&-", "2>/dev/full" if os.path.exists("/dev/full") else "2>&-", ">&-", ">&- 2>&-"],
)
def test_standard_error_or_output_that_is_not_there(where):
    status, text, errors = shell(f"cupy-cache {DEMO} {where} | cat")
    assert status == 0
    assert "Traceback" not in errors
    if ">&- " not in where and where != ">&-":
        assert "OK: " in text


@pytest.mark.extra
def test_bytes_are_shown_as_such():
    """Python's option -bb refuses to take them for text."""
    done = subprocess.run([sys.executable, "-bb", "-m", "cupy_cache", *DEMO.split()], check=False)
    assert done.returncode == 0


@pytest.mark.extra
def test_a_refusal_nobody_can_read():
    for command, status in (("demo none/there", 2), ("nonsense", 2)):
        assert shell(f"cupy-cache {command} 2>&-")[0] == status


@pytest.mark.extra
def test_a_name_that_the_terminal_cannot_show(tmp_path):
    path = os.fsencode(tmp_path) + b"/na\xff\xefve-\xc3\xa4\xe2\x82\xac"
    with open(path, "wb") as file:
        file.write(b"some text")
    command = f"cupy-cache {DEMO} '{os.fsdecode(path)}' {QUIET}"
    for encoding in ("ascii", "latin-1", "utf-8"):
        status, text, _ = shell(command, PYTHONIOENCODING=encoding)
        assert status == 0 and "OK: " in text and "9 bytes of" in text and "\\udcff" in text


def test_what_a_gpu_is_called(monkeypatch):
    """With CuPy and a GPU, that is where the demo runs, and says so."""
    properties = {"name": b"Some GPU", "major": 9, "minor": 0}
    runtime = types.SimpleNamespace(getDevice=lambda: 4, getDeviceProperties=lambda at: properties)
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(is_available=lambda: True, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert command_line._machine("auto") == (cupy, "cuda:4, Some GPU (sm_90)")
    assert command_line._machine("cupy") == command_line._machine("auto")
    assert command_line._machine("numpy")[0] is np
    cupy.cuda.is_available = lambda: False
    assert command_line._machine("auto")[0] is np


def test_without_a_command(capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.main([])
    assert ended.value.code == 2 and "COMMAND" in capsys.readouterr().err


def test_numbers_of_a_measurement(capsys):
    """Four digits, or the whole number."""
    row = {"case": "x", "bytes": 2e6, "us": 12345.67, "copy_us": 3.14159, "host_us": None}
    command_line._print_row(row)
    assert capsys.readouterr().out.split() == ["x", "2", "12346", "3.142", "0%"]


def test_what_nobody_foresaw(monkeypatch, capsys):
    """It is no difference."""

    def fail(*arguments):
        raise ZeroDivisionError("so it is")

    monkeypatch.setattr(demo, "demo", fail)
    assert command_line.main(DEMO.split()) == command_line.FAILED == 3
    assert "ZeroDivisionError: so it is" in capsys.readouterr().err


def test_the_output_is_as_before_afterwards(capsys):
    before = sys.stdout.errors
    with pytest.raises(SystemExit):
        command_line.main(["--version"])
    assert sys.stdout.errors == before and cc.__version__ in capsys.readouterr().out


# --- warmup, bench, clear-cache -------------------------------------------------------------------


def run(capsys, line):
    """(Status, output, errors) of a command."""
    status = command_line.main(line.split())
    told = capsys.readouterr()
    return status, told.out, told.err


def test_warmup_passes_on_what_it_is_told(capsys, monkeypatch):
    given = []
    monkeypatch.setattr(command_line, "warmup", lambda *a, **k: given.append((a, k)) or 7)
    line = "warmup --num-kv-heads 8 --head-size 128 --block-size 32 --layout HND --layout packed"
    line += " --dtype float16 --op copy_blocks --num-heads 32 --kv-cache-dtype fp8 --device 1"
    line += " --alibi"
    status, out, _ = run(capsys, line)
    assert status == 0 and "7 kernels are ready" in out
    shape, named = given.pop()
    assert shape == (8, 128, 32, "float16")
    assert {name: value for name, value in named.items() if value is not None} == {
        "layouts": ["HND", "packed"], "kv_cache_dtype": "fp8", "device": 1, "num_heads": 32,
        "ops": ["copy_blocks"], "alibi": True, "soft_cap": False,
    }  # fmt: skip
    status, out, _ = run(capsys, "warmup --num-kv-heads 8 --head-size 128 --json")
    assert status == 0 and json.loads(out)["kernels"] == 7
    assert given.pop()[1]["layouts"] == ["NHD"]


def test_a_demo_that_is_too_large(capsys, monkeypatch):
    def too_large(*sizes):
        raise MemoryError("Unable to allocate 2.5 TiB")

    monkeypatch.setattr(command_line.demo, "demo", too_large)
    status, _, errors = run(capsys, "demo --backend numpy --block-size 2147483647")
    assert status == command_line.CANNOT_RUN and "Traceback" not in errors
    assert "too little memory for these sizes: MemoryError: Unable to allocate" in errors
    with pytest.raises(SystemExit) as left:
        run(capsys, f"demo --block-size {2**64}")
    assert left.value.code == command_line.CANNOT_RUN
    assert "argument --block-size: expected a number below 2**31" in capsys.readouterr().err


@pytest.mark.whole
@pytest.mark.parametrize("option", ["--tokens 1.5", "--seed x", f"--beams {'9' * 5000}"])
def test_numbers_that_are_none(capsys, option):
    """In the words of a user, not of the source."""
    with pytest.raises(SystemExit) as left:
        run(capsys, f"demo {option}")
    assert left.value.code == command_line.CANNOT_RUN
    told = capsys.readouterr().err
    name, _, text = option.partition(" ")
    assert f"argument {name}: expected a whole number, got '{text[:3]}" in told


def test_warmup_that_is_refused(capsys):
    line = "warmup --num-kv-heads 8 --head-size 128 --dtype complex64"
    status, out, errors = run(capsys, line)
    assert status == command_line.CANNOT_RUN and not out
    assert errors.startswith("cupy-cache: error: ") and "Traceback" not in errors


TINY = bench.Size(1, 32, 8, 2, 2, 16, 4)
ROW = {"case", "bytes", "us", "copy_us", "host_us"}


@pytest.fixture
def quick(monkeypatch):
    """Measuring takes no time."""
    monkeypatch.setattr(bench, "CPU", TINY)
    monkeypatch.setattr(bench, "BATCH_SECONDS", 1e-6)


def test_bench(capsys, quick):
    status, out, errors = run(capsys, "bench --backend numpy --json")
    told = json.loads(out)
    assert status == 0 and told["backend"] == "numpy"
    assert len(told["rows"]) >= 10 and all(set(row) == ROW for row in told["rows"])
    names = [row["case"] for row in told["rows"]]
    assert errors.splitlines() == names and len(set(names)) == len(names)
    for row in told["rows"]:
        assert row["us"] > 0 and row["host_us"] is None
        assert (row["copy_us"] is None) == (row["bytes"] == 0)
    # 8 tokens of 8 heads of 128, keys and values, float16, read and written
    by_name = {row["case"]: row["bytes"] for row in told["rows"]}
    assert by_name["write 8 tokens"] == 8 * 8 * 128 * 2 * 2 * 2
    status, out, _ = run(capsys, "bench --backend numpy")
    assert status == 0 and all(name in out for name in names)


@pytest.mark.gpu
def test_bench_on_a_gpu(capsys):
    status, out, _ = run(capsys, "bench --json")
    rows = json.loads(out)["rows"]
    assert status == 0 and len(rows) >= 10
    assert all(row["us"] > 0 and row["host_us"] > 0 for row in rows)


def test_clear_cache(capsys, monkeypatch, tmp_path):
    files = {
        "a.cubin": b"\x7fELF .text._ZN10cupy_cache11copy_blocksILi1EEEvv" + bytes(3 << 19),
        "a.cubin.cu": b"namespace cupy_cache {}",
        "b.cubin": b"\x7fELF .text._Z4copyv",
        "b.cubin.cu": b"void copy();",
        "c.tmp": b"10cupy_cache",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert run(capsys, "clear-cache")[:2] == (
        0, f"deleted 1 kernel, 1.5 MiB, of {tmp_path}; 3 files stay\n",
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"b.cubin", "b.cubin.cu", "c.tmp"}
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "none"))
    status, out, _ = run(capsys, "clear-cache")
    assert status == 0 and out.startswith("deleted 0 kernels")
    (tmp_path / "a.cubin").write_bytes(files["a.cubin"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUPY_CACHE_DIR", "")  # CuPy finds no such folder
    status, out, _ = run(capsys, "clear-cache")
    assert status == 0 and out.startswith("deleted 0 kernels") and Path("a.cubin").exists()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "c.tmp"))
    status, _, errors = run(capsys, "clear-cache")
    assert status == command_line.CANNOT_RUN and "cannot clear" in errors


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_clear_cache_leaves_what_is_no_file(tmp_path):
    """A pipe of a kernel's name, which nobody writes to, and a folder."""
    os.mkfifo(tmp_path / "a.cubin")
    (tmp_path / "b.cubin").mkdir()
    (tmp_path / "c.cubin").symlink_to("nowhere")
    (tmp_path / "d.cubin").write_bytes(b"\x7fELF .text._ZN10cupy_cache11copy_blocksILi1EEEvv")
    status, out, _ = shell("cupy-cache clear-cache", CUPY_CACHE_DIR=str(tmp_path))
    assert status == 0 and out.startswith("deleted 1 kernel") and out.endswith("3 files stay\n")


@pytest.mark.gpu
def test_kernels_are_warmed_up_and_cleared(tmp_path):
    line = "warmup --num-kv-heads 2 --head-size 64 --op copy_blocks --op slot_mapping --json"
    status, out, _ = shell(f"cupy-cache {line}", CUPY_CACHE_DIR=str(tmp_path))
    kernels = json.loads(out)["kernels"]
    assert status == 0 and len(list(tmp_path.glob("*.cubin"))) == kernels > 1
    status, out, _ = shell("cupy-cache clear-cache", CUPY_CACHE_DIR=str(tmp_path))
    assert status == 0 and f"deleted {kernels} kernels" in out
    assert not list(tmp_path.glob("*.cubin"))


# --- the environment ------------------------------------------------------------------------------

CHECK = (
    "import cupy_cache; from cupy_cache.runtime import env, faults, log; "
    "[env.flag(env.DEBUG) for _ in range(3)]; "
    "print(faults.debug, log.logger.level, len(log.logger.handlers), cupy_cache.alibi_slopes(1))"
)


@pytest.mark.parametrize(
    "variable, value, told, said",
    [
        ("CUPYCACHE_LOGLEVEL", "LOUD", "False 0 1", "expected a logging level"),
        ("CUPYCACHE_LOGLEVEL", "1.5", "False 0 1", "expected a logging level"),
        ("CUPYCACHE_LOGLEVEL", "10", "False 10 2", ""),
        ("CUPYCACHE_LOGLEVEL", "debug", "False 10 2", ""),
        ("CUPYCACHE_LOGLEVEL", "", "False 0 1", ""),
        ("CUPYCACHE_DEBUG", "2", "True 0 1", ""),
        ("CUPYCACHE_DEBUG", "Yes", "True 0 1", ""),
        ("CUPYCACHE_DEBUG", "00", "False 0 1", ""),
        ("CUPYCACHE_DEBUG", "off", "False 0 1", ""),
        ("CUPYCACHE_DEBUG", "maybe", "False 0 1", "expected 1 or 0, got 'maybe'"),
        ("CUPYCACHE_DEBUG", "-1", "False 0 1", "expected 1 or 0, got '-1'"),
    ],
)
def test_variables(variable, value, told, said):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUPYCACHE_")}
    environment.pop("PYTHONWARNINGS", None)
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env={**environment, variable: value},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{told} [0.00390625]\n"
    assert done.stderr.count(variable) == bool(said) and said in done.stderr


def test_the_log_goes_to_standard_error_once(monkeypatch):
    """To that of the moment, and in one line, also where the package was imported anew."""
    before = log.logger.level
    monkeypatch.setenv("CUPYCACHE_LOGLEVEL", "INFO")
    try:
        log.configure()
        log.configure()
        for _ in range(2):
            monkeypatch.setattr(sys, "stderr", io.StringIO())
            log.logger.info("so it is")
            assert sys.stderr.getvalue() == "INFO cupy_cache: so it is\n"
        monkeypatch.setattr(sys, "stderr", None)
        log.logger.info("nobody is told")
    finally:
        log.logger.removeHandler(log._printed)
        log.logger.setLevel(before)
