# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import ctypes
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.cli import command_line, info
from cupy_cache.runtime import env

KEYS = {
    "cupy_cache", "python", "platform", "packages", "cupy", "driver", "nvrtc", "cuda_runtime",
    "cuda_headers", "kernel_sources", "kernel_cache", "environment", "missing", "backend",
}  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    return info.collect()


def test_json(capsys, facts):
    assert command_line.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == KEYS
    # Other tests may be compiling.
    cache = told["kernel_cache"]
    assert set(cache) == set(facts["kernel_cache"])
    assert cache["path"] == facts["kernel_cache"]["path"]
    assert {**told, "kernel_cache": None} == {**facts, "kernel_cache": None}
    assert told["cupy_cache"] == cc.__version__
    assert told["packages"]["numpy"] == np.__version__
    assert set(told["environment"]) >= {variable.name for variable in env.TABLE}


def test_text(capsys, facts):
    assert command_line.main(["info"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert f"numpy {np.__version__}".split() in [line.split() for line in lines]
    for word in ("NVRTC", "CUDA headers", "kernel cache", facts["kernel_sources"]["path"]):
        assert word in shown
    # Aligned: every value starts in the same column.
    column = lines[0].index(cc.__version__)
    assert all(line[column - 1] == " " and line[column] != " " for line in lines)


def test_no_framework_is_imported():
    """Not CuPy either: importing it creates its kernel cache."""
    code = (
        "import sys; from cupy_cache.cli import info; info.collect(); "
        "print(sorted({'torch', 'cupy', 'cupyx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment(monkeypatch):
    monkeypatch.setenv("CUPYCACHE_DEBUG", "1")
    monkeypatch.setenv("CUPY_CACHE_DIR", "somewhere")
    told = info.collect()
    assert told["environment"]["CUPYCACHE_DEBUG"] == "1"
    assert told["environment"]["CUPY_CACHE_DIR"] == told["kernel_cache"]["path"] == "somewhere"
    shown = info.as_text(told)
    assert env.DEBUG.meaning in shown and "CUPY_CACHE_DIR" in shown


def test_the_kernel_cache_is_measured_and_not_made(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    monkeypatch.setenv("CUPY_CACHE_DIR", str(folder))
    told = info.collect()
    cache = {"path": str(folder), "files": None, "bytes": 0, "problem": None}
    assert told["kernel_cache"] == cache
    assert not folder.exists()
    assert "does not exist yet" in info.as_text(told)
    folder.mkdir()
    for name, size in (("a.cubin", 10), ("b.cubin", 32)):
        (folder / name).write_bytes(bytes(size))
    assert info.collect()["kernel_cache"] == {**cache, "files": 2, "bytes": 42}
    assert len(list(folder.iterdir())) == 2


def test_no_kernel_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", str(tmp_path))
    told = info.collect()
    assert told["kernel_sources"]["path"] is None
    assert str(tmp_path) in told["missing"][0]["what"]


def test_kernel_sources_that_cannot_be_read(tmp_path, monkeypatch):
    """As a call would read them."""
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", str(tmp_path))
    (tmp_path / "include" / "cupy_cache").mkdir(parents=True)
    for make in (
        lambda: None,  # there are none
        lambda: (tmp_path / "a.cu").write_text('#include "cupy_cache/none.cuh"'),
        lambda: (tmp_path / "a.cu").write_bytes(b"\xff"),
    ):
        make()
        told = info._kernel_sources()
        assert told["path"] is None and "its source could not be read" in told["problem"]
    (tmp_path / "a.cu").write_text("")
    assert info._kernel_sources() == {"path": str(tmp_path), "problem": None}


# --- nothing that is broken stops it --------------------------------------------------------------


def command(code=None, **variables):
    """(Output, facts) of the command, as a user runs it; a variable that is None is not there."""
    environment = {**os.environ, "PYTHONWARNINGS": "error", **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    start = ["-m", "cupy_cache"] if code is None else ["-c", code]
    shown = []
    for more in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, *start, "info", *more], env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, done.stderr
        shown.append(done.stdout)
    return shown[0], json.loads(shown[1])


MAIN = "import sys\nfrom cupy_cache.cli import main\n{}\nsys.exit(main(sys.argv[1:]))"


@pytest.mark.extra
def test_a_home_that_nobody_knows():
    """No variable names it, and the user has no entry."""
    patch = "import pwd; pwd.getpwuid = lambda uid: {}[uid]"
    shown, facts = command(code=MAIN.format(patch), HOME=None, CUPY_CACHE_DIR=None)
    assert facts["kernel_cache"]["path"].startswith("~") and "kernel cache" in shown


@pytest.mark.slow
@pytest.mark.extra
def test_a_file_where_the_kernel_cache_should_be(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "inside"):
        shown, facts = command(CUPY_CACHE_DIR=str(folder))
        assert "cannot be used" in shown and "does not exist yet" not in shown
        assert facts["kernel_cache"]["files"] is None
        assert "Error" in facts["kernel_cache"]["problem"] and facts["backend"] == "numpy"
    assert file.is_file() and file.stat().st_size == 0


# The user that runs the tests may be one that may do anything.
DENIED = """
import os
def scandir(path):
    raise PermissionError(13, 'Permission denied', path)
os.scandir = scandir"""


@pytest.mark.extra
def test_a_folder_that_may_not_be_listed():
    shown, facts = command(code=MAIN.format(DENIED))
    assert "PermissionError" in facts["kernel_cache"]["problem"]
    assert "PermissionError" in shown and "cannot be used" in shown


@pytest.mark.slow
@pytest.mark.extra
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A call would compile, and then fail to keep what it made. A user that may do anything can
    write in every folder, but not in those of /proc."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no folder here in which nobody can write")
    pytest.importorskip("cupy")
    shown, facts = command(CUPY_CACHE_DIR="/proc/self/task")
    assert facts["kernel_cache"]["problem"] is not None and "cannot be used" not in shown
    assert facts["cupy"]["problem"] is None
    assert (
        command(CUPY_CACHE_DIR="/proc/self/task", CUPY_CACHE_IN_MEMORY="1")[1]["kernel_cache"][
            "problem"
        ]
        is None
    )


@pytest.mark.extra
def test_a_python_that_wants_every_encoding_named():
    strict = ["-X", "warn_default_encoding", "-W", "error"]
    done = subprocess.run(
        [sys.executable, *strict, "-m", "cupy_cache", "info"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "EncodingWarning" not in done.stdout + done.stderr


@pytest.mark.extra
def test_a_python_that_does_not_know_its_path():
    _, facts = command(code=MAIN.format("sys.executable = ''"))
    assert facts["cupy"]["installed"] == [] or "its own path" in facts["cupy"]["problem"]


@pytest.mark.extra
@pytest.mark.parametrize("raised", ["OSError(5, 'torn')", "RuntimeError()", "SystemExit(3)"])
def test_a_cupy_that_raises_anything(tmp_path, raised):
    (tmp_path / "cupy.py").write_text(f"print('hello')\nraise {raised}")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    shown, facts = command(PYTHONPATH=path)
    if facts["cupy"]["installed"]:
        assert raised.partition("(")[0] in facts["cupy"]["problem"]
        assert facts["cupy"]["problem"] in shown
        cache = facts["kernel_cache"]["problem"]
        assert (cache is not None) == raised.startswith("OSError")


@pytest.mark.extra
def test_a_cupy_that_ends_the_process(tmp_path):
    (tmp_path / "cupy.py").write_text("import os\nos._exit(9)")
    _, facts = command(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    if facts["cupy"]["installed"]:
        assert "exit status 9" in facts["cupy"]["problem"]


@pytest.mark.parametrize("part", ["_try_cupy", "_driver", "_nvrtc", "_cuda_runtime",
                                  "_cuda_headers", "_kernel_sources", "_kernel_cache"])  # fmt: skip
@pytest.mark.whole
def test_a_part_that_fails(monkeypatch, capsys, part):
    def fail():
        raise AttributeError("no such function")

    monkeypatch.setattr(info, part, fail)
    monkeypatch.setattr(platform, "platform", fail)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: fail())
    if part != "_try_cupy":  # it takes long
        monkeypatch.setattr(info, "_try_cupy", lambda: {**machine()["cupy"], "cache": None})
    assert command_line.main(["info"]) == 0
    assert "AttributeError: no such function" in capsys.readouterr().out
    assert command_line.main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == KEYS and told["packages"] == dict.fromkeys(told["packages"])


@pytest.mark.extra
def test_what_a_call_would_use_is_tried_and_nothing_left(tmp_path):
    pytest.importorskip("cupy")
    folder = tmp_path / "one" / "two"
    _, facts = command(CUPY_CACHE_DIR=str(folder))
    assert facts["cupy"]["version"] and facts["kernel_cache"]["problem"] is None
    assert not list(tmp_path.iterdir())


def test_a_kernel_cache_that_cannot_be_used_is_missing():
    facts = machine()
    facts["kernel_cache"]["problem"] = "PermissionError: not yours"
    assert commands(facts) == ["export CUPY_CACHE_DIR=/a/folder/of/yours"]
    facts["cupy"] |= {
        "version": None,
        "problem": "it cannot be imported: PermissionError: not yours",
    }
    assert commands(facts) == ["export CUPY_CACHE_DIR=/a/folder/of/yours"]
    assert "PermissionError: not yours" in facts["missing"][0]["what"]


# --- the parts, where something is missing or broken ----------------------------------------------


class Distribution:
    def __init__(self, name):
        self.name = name


def test_without_cupy(monkeypatch, capsys):
    names = ["numpy", "cupy-cache", None]  # None: what a broken installation is called
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: map(Distribution, names))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    told = info.collect()
    assert told["cupy"]["problem"] == "not installed" and told["cupy"]["version"] is None
    for part in ("nvrtc", "cuda_runtime", "cuda_headers"):
        assert told[part]["path"] is None and "cuda-pathfinder" in told[part]["problem"]
    assert told["backend"] == "numpy"
    assert "not installed" in info.as_text(told)


def test_cupy_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "cupy.py").write_text("raise OSError('its library is torn')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["cupy-cuda13x"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: map(Distribution, names))
    told = info._try_cupy()
    assert told["installed"] == names and told["version"] is None
    assert told["problem"] == "it cannot be imported: OSError: its library is torn"
    assert told["cache"] is None  # the system's errors of folders have a number


def test_cupy_that_does_not_end(monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    names = ["cupy-cuda13x"]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: map(Distribution, names))
    assert "did not end" in info._try_cupy()["problem"]


def test_libraries_that_cannot_be_found(monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")

    def not_found(name):
        raise pathfinder.DynamicLibNotFoundError(f"no lib{name}.so\nlooked here\nand there")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", not_found)
    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda name: None)
    assert info._nvrtc() == {
        "version": None, "path": None, "problem": "no libnvrtc.so", "architectures": [],
    }  # fmt: skip
    assert info._cuda_runtime()["problem"] == "no libcudart.so"
    assert "not found" in info._cuda_headers()["problem"]


def test_libraries_that_are_there():
    """Those that the test extra brings."""
    pytest.importorskip("cuda.pathfinder")
    nvrtc, runtime = info._nvrtc(), info._cuda_runtime()
    assert 90 in nvrtc["architectures"]
    assert nvrtc["version"].split(".")[0] == runtime["version"].split(".")[0]
    assert info._cuda_headers()["path"]


def test_no_driver(monkeypatch):
    def cannot(name):
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(ctypes, "CDLL", cannot)
    told = info._driver()
    assert told["cuda"] is None and told["devices"] == []
    assert "no NVIDIA driver" in told["problem"]


# With the real functions' types: a wrong call from Python would be seen.
DRIVER = """
#include <cstdio>
#include <cstring>
extern "C" {
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuInit(unsigned flags) { return flags ? 1 : STATUS; }
int cuGetErrorName(int status, const char** name) { *name = "CUDA_ERROR_TORN"; return 0; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int index) { *device = 70 + index; return 0; }
int cuDeviceGetName(char* name, int size, int device) {
  std::snprintf(name, size, "GPU called %d", device);
  return 0;
}
int cuDeviceTotalMem_v2(std::size_t* bytes, int device) {
  *bytes = static_cast<std::size_t>(device) << 30;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? device - 61 : -1;
  return 0;
}
}
"""


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Builds a driver library whose initialisation gives ``status``."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing: no driver can be built")

    def build(status):
        path = tmp_path / "driver.so"
        command = [
            "g++",
            f"-DSTATUS={status}",
            "-shared",
            "-fPIC",
            "-x",
            "c++",
            "-",
            "-o",
            str(path),
        ]
        subprocess.run(command, input=DRIVER, text=True, check=True)
        real = ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", lambda name: real(str(path)))

    return build


def test_driver_and_devices(driver):
    driver(status=0)
    assert info._driver() == {
        "cuda": "12.8",
        "problem": None,
        "devices": [
            {
                "index": index,
                "name": f"GPU called {70 + index}",
                "compute_capability": f"8.{9 + index}",
                "memory_bytes": (70 + index) << 30,
            }
            for index in (0, 1)
        ],
    }


def test_a_driver_that_does_not_start(driver):
    driver(status=999)
    told = info._driver()
    assert told["devices"] == [] and told["cuda"] == "12.8"
    assert told["problem"] == "cuInit failed: CUDA_ERROR_TORN (999)"


def test_a_driver_that_shows_no_gpu(driver):
    """As in a container that was given none."""
    driver(status=100)
    facts = machine()
    facts["driver"] = info._driver()
    assert commands(facts) == [None]
    assert "a GPU: no GPU is shown: see CUDA_VISIBLE" in facts["missing"][0]["what"]


# --- what is missing ------------------------------------------------------------------------------


def machine(cuda="13.0", capability="9.0", cupy=("cupy-cuda13x",), version="14.2.0", nvrtc="13.0"):
    """The facts of a machine that lacks nothing, unless the arguments say otherwise."""
    device = {"index": 0, "name": "GPU", "compute_capability": capability, "memory_bytes": 2**36}
    there = {"version": "13.0", "path": "there", "problem": None}
    return {
        "cupy_cache": "1", "python": "3", "platform": "Linux",
        "packages": {"numpy": "2", "ml_dtypes": "1", "torch": None},
        "cupy": {
            "installed": list(cupy),
            "version": version if cupy else None,
            "sees_gpu": bool(cupy),
            "no_gpu": None,
            "problem": None if cupy else "not installed",
        },
        "driver": {"cuda": cuda, "devices": [device], "problem": None},
        "nvrtc": {**there, "version": nvrtc, "architectures": [75, 90, 100]},
        "cuda_runtime": there, "cuda_headers": there, "kernel_sources": there,
        "kernel_cache": {"path": "cache", "files": 3, "bytes": 2**20, "problem": None},
        "environment": {"CUPYCACHE_DEBUG": "0", "CUDA_PATH": None},
        "backend": "cupy",
    }  # fmt: skip


def commands(facts):
    facts["missing"] = info.missing(facts)
    shown = info.as_text(facts)
    for entry in facts["missing"]:
        assert entry["what"] in shown and (entry["command"] or "") in shown
    is_nothing = re.match(r"missing +nothing\b", shown.splitlines()[-1]) is not None
    assert is_nothing == (not facts["missing"])
    return [entry["command"] for entry in facts["missing"]]


@pytest.mark.parametrize(
    "cuda, cupy",
    [
        ("13.0", ["cupy-cuda13x"]),
        ("13.2", ["cupy-cuda12x"]),
        ("12.4", ["cupy-cuda12x"]),
        ("14.1", ["cupy-cuda13x"]),
        ("14.1", ["cupy-cuda14x"]),
        ("12.4", ["cupy"]),
    ],
)
def test_nothing_is_missing(cuda, cupy):
    facts = machine(cuda, cupy=cupy)
    assert commands(facts) == []
    shown = info.as_text(facts)
    assert shown.split()[-2:] == ["missing", "nothing"] and "on the GPU" in shown
    assert "GPU, compute capability 9.0, 64.0 GiB" in shown


@pytest.mark.whole
@pytest.mark.parametrize(
    "facts, command",
    [
        (machine("13.0", cupy=[]), "pip install -U 'cupy-cache[cuda13x]'"),
        (machine("12.9", cupy=[]), "pip install -U 'cupy-cache[cuda12x]'"),
        (machine("14.0", cupy=[]), "pip install -U 'cupy-cache[cuda13x]'"),
        (machine("12.9"), "pip uninstall -y cupy-cuda13x && pip install -U 'cupy-cache[cuda12x]'"),
        (
            machine(cupy=["cupy-cuda11x"]),
            "pip uninstall -y cupy-cuda11x && pip install -U 'cupy-cache[cuda13x]'",
        ),
        (
            machine(cupy=["cupy-rocm-7-0"]),
            "pip uninstall -y cupy-rocm-7-0 && pip install -U 'cupy-cache[cuda13x]'",
        ),
        (
            machine(cupy=["cupy-cuda12x", "cupy-cuda13x"]),
            "pip uninstall -y cupy-cuda12x cupy-cuda13x && pip install -U 'cupy-cache[cuda13x]'",
        ),
        (machine(version="14.1.0"), "pip install -U 'cupy-cache[cuda13x]'"),
        (machine(cupy=["cupy-cuda12x"], version="13.6.0"), "pip install -U 'cupy-cache[cuda12x]'"),
        (
            machine(cupy=["cupy"], version="13.0.0b1"),
            "pip uninstall -y cupy && pip install -U 'cupy-cache[cuda13x]'",
        ),
        (machine(capability="12.0"), "pip install -U nvidia-cuda-nvrtc"),
        (
            machine(capability="12.0", cupy=["cupy-cuda12x"], nvrtc="12.4"),
            "pip install -U nvidia-cuda-nvrtc-cu12",
        ),
        (
            machine(capability="7.0"),
            "pip uninstall -y cupy-cuda13x && pip install -U 'cupy-cache[cuda12x]'",
        ),
        (
            machine(capability="7.0", cupy=["cupy-cuda12x"]),
            "pip install -U 'cupy-cache[cuda12x]'",
        ),
        (machine(cuda="11.8"), None),
    ],
)
def test_one_command_brings_what_is_missing(facts, command):
    assert commands(facts) == [command]


def test_a_cupy_that_sees_no_gpu():
    """As one that was built for a newer CUDA, whatever it is called."""
    facts = machine("12.4", cupy=["cupy"])
    facts["cupy"] |= {"sees_gpu": False, "no_gpu": "CUDARuntimeError: insufficient driver"}
    facts["backend"] = "numpy"
    assert commands(facts) == ["pip uninstall -y cupy && pip install -U 'cupy-cache[cuda12x]'"]
    assert "sees the GPU: CUDARuntimeError: insufficient driver" in facts["missing"][0]["what"]


@pytest.mark.parametrize("part", ["nvrtc", "cuda_headers"])
def test_nvrtc_or_headers_are_missing(part):
    facts = machine()
    facts[part] = {
        "path": None,
        "version": None,
        "problem": "not where it was",
        "architectures": [],
    }
    assert commands(facts) == ["pip install -U 'cupy-cache[cuda13x]'"]
    assert "not where it was" in facts["missing"][0]["what"]


def test_several_things_take_one_command():
    facts = machine("12.2", cupy=[])
    for part in ("nvrtc", "cuda_headers"):
        facts[part] = {"path": None, "version": None, "problem": "absent", "architectures": []}
    assert commands(facts) == ["pip install -U 'cupy-cache[cuda12x]'"]
    what = facts["missing"][0]["what"]
    assert "CuPy: not installed" in what and "NVRTC" in what and "headers" in what


def test_without_a_driver_nothing_is_missing():
    facts = machine(cupy=[])
    facts["driver"] = {"cuda": None, "devices": [], "problem": "no NVIDIA driver"}
    assert commands(facts) == []
    assert "nothing, for a machine without an NVIDIA driver" in info.as_text(facts)


def test_a_driver_that_does_not_start_is_told():
    facts = machine()
    facts["driver"] = {"cuda": "13.0", "devices": [], "problem": "cuInit failed"}
    assert commands(facts) == [None]
    assert "cuInit failed" in facts["missing"][0]["what"]
