# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The commands end quietly, and with the right status, whatever becomes of their output; the
environment's variables are said to be wrong once, and stop nothing."""

import os
import subprocess
import sys

import pytest

import cupy_cache as cc
from cupy_cache.cli import command_line, demo

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


@BUFFERING
@pytest.mark.parametrize("command", [DEMO, "info", "--help"])
def test_a_reader_that_goes(command, unbuffered):
    # The reader is gone before anything is written.
    status, _, errors = shell(f"cupy-cache {command} 2> >(grep -v tokens >&2) | true", unbuffered)
    assert status == command_line.READER_GONE and not errors
    if command == DEMO:
        status, text, errors = shell(f"cupy-cache {command} {QUIET} | head -1", unbuffered)
        assert status in (0, command_line.READER_GONE)
        assert text.count("\n") == 1 and not errors


@needs_dev_full
@BUFFERING
@pytest.mark.parametrize("command", [DEMO, "info --json", "--help"])
def test_a_full_disk(command, unbuffered):
    status, _, errors = shell(f"cupy-cache {command} > /dev/full", unbuffered)
    assert status == command_line.CANNOT_RUN
    *_, last = errors.splitlines()
    assert last == "cupy-cache: error: cannot write the output: No space left on device"
    assert "Traceback" not in errors


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


def test_a_refusal_nobody_can_read():
    for command, status in (("demo none/there", 2), ("nonsense", 2)):
        assert shell(f"cupy-cache {command} 2>&-")[0] == status


def test_a_name_that_the_terminal_cannot_show(tmp_path):
    path = os.fsencode(tmp_path) + b"/na\xff\xefve-\xc3\xa4\xe2\x82\xac"
    with open(path, "wb") as file:
        file.write(b"some text")
    command = f"cupy-cache {DEMO} '{os.fsdecode(path)}' {QUIET}"
    for encoding in ("ascii", "latin-1", "utf-8"):
        status, text, _ = shell(command, PYTHONIOENCODING=encoding)
        assert status == 0 and "OK: " in text and "9 bytes of" in text and "\\udcff" in text


def test_what_nobody_foresaw(monkeypatch, capsys):
    """It is no difference."""

    def fail(*arguments):
        raise ZeroDivisionError("so it is")

    monkeypatch.setattr(demo, "demo", fail)
    assert command_line.main(DEMO.split()) == command_line.FAILED
    assert "ZeroDivisionError: so it is" in capsys.readouterr().err


def test_the_output_is_as_before_afterwards(capsys):
    before = sys.stdout.errors
    with pytest.raises(SystemExit):
        command_line.main(["--version"])
    assert sys.stdout.errors == before and cc.__version__ in capsys.readouterr().out


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
