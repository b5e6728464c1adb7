# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What is installed, what operations on a GPU need, and what is missing.

Nothing here needs CuPy, nothing is left behind, and nothing that is broken stops it. The driver,
NVRTC and the CUDA runtime are asked directly. CuPy, whose import creates its kernel cache, is tried
in another process, with the folders that a call would use.
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys

from .. import errors
from .._version import __version__
from ..errors import KernelError
from ..runtime import cuda, env, modules

OTHER_VARIABLES = ("CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY", "CUDA_PATH", "CUDA_VISIBLE_DEVICES")
# What is printed last is a JSON object. Folders that importing CuPy made are removed again.
_TRY_CUPY = """
import json, os, sys, tempfile
folder, made = sys.argv[1], []
at = os.path.abspath(folder) if folder else ""
while at and not os.path.lexists(at):
    made.append(at)
    at = os.path.dirname(at)
told = {"version": None, "sees_gpu": False, "no_gpu": None, "problem": None, "cache": None}
try:
    import cupy
    told["version"], told["sees_gpu"] = cupy.__version__, cupy.cuda.is_available()
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        told["no_gpu"] = f"{type(error).__name__}: {error}"
except BaseException as error:
    told["problem"] = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno is not None:  # else of a library
        told["cache"] = told["problem"]
else:
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") in ("", "0"):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            told["cache"] = f"{type(error).__name__}: {error}"
for at in made:
    try:
        os.rmdir(at)
    except OSError:
        break
print()
print(json.dumps(told))
"""


def collect():
    """All there is to tell, as a dictionary that JSON can take. Its keys are stable; a version or
    path is None where the thing is missing, and its ``problem`` then says why."""
    tried = _told(_try_cupy, {"version": None, "sees_gpu": False, "cache": None})
    library = {"version": None, "path": None}
    facts = {
        "cupy_cache": __version__,
        "python": platform.python_version(),
        "platform": _platform(),
        "packages": {name: _version(name) for name in ("numpy", "ml_dtypes", "torch")},
        "cupy": {
            "installed": tried.get("installed", []),
            **{name: tried[name] for name in ("version", "sees_gpu", "problem")},
            "no_gpu": tried.get("no_gpu"),
        },
        "driver": _told(_driver, {"cuda": None, "devices": []}),
        "nvrtc": _told(_nvrtc, {**library, "architectures": []}),
        "cuda_runtime": _told(_cuda_runtime, library),
        "cuda_headers": _told(_cuda_headers, {"path": None}),
        "kernel_sources": _told(_kernel_sources, {"path": None}),
        "kernel_cache": _told(_kernel_cache, {"path": None, "files": None, "bytes": 0}),
        "environment": {variable.name: env.text(variable) for variable in env.TABLE}
        | {name: env.other(name) for name in OTHER_VARIABLES},
    }
    if tried["cache"] is not None:
        facts["kernel_cache"]["problem"] = tried["cache"]
    facts["missing"] = missing(facts)
    usable = facts["cupy"]["sees_gpu"] and not facts["missing"]
    facts["backend"] = "cupy" if usable else "numpy"
    return facts


# --- the parts ------------------------------------------------------------------------------------


def _told(part, otherwise):
    """What ``part()`` tells; ``otherwise``, with what is the matter, where it fails."""
    try:
        return part()
    except Exception as error:  # of what is broken here, nothing is known
        return {**otherwise, "problem": cuda.named(error)}


def _platform():
    try:
        return platform.platform()
    except Exception:
        return sys.platform


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except Exception:  # not installed, or its metadata is broken
        return None


def _try_cupy():
    """Which CuPy packages are installed, whether the module can be imported, and what is the matter
    with its ``cache``, if anything."""
    names = (distribution.name for distribution in importlib.metadata.distributions())
    installed = sorted({n for n in names if n and re.fullmatch(r"cupy(-cuda\w+|-rocm[\w-]+)?", n)})
    told = {"installed": installed, "version": None, "sees_gpu": False, "cache": None}
    if not installed:
        return {**told, "problem": "not installed"}
    if not sys.executable:
        return {**told, "problem": "not tried, since Python does not know its own path"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY_CUPY, cuda.cache_folder()],
            capture_output=True, encoding="utf-8", errors="replace", timeout=120, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {**told, "problem": "importing it did not end within 120 s"}
    try:
        told |= json.loads(done.stdout.strip().rpartition("\n")[2])
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        told["problem"] = lines[-1]
    if told["problem"] is not None:
        told["problem"] = f"it cannot be imported: {told['problem']}"
    return told


def _driver():
    """The newest CUDA that the driver serves, and its GPUs."""
    facts = {"cuda": None, "devices": [], "problem": None}
    try:
        library = cuda.load_library()
    except OSError as error:
        facts["problem"] = f"no NVIDIA driver ({error})"
        return facts
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) == 0:
        facts["cuda"] = _dotted(number.value)
    status = library.cuInit(0)
    if status == cuda.NO_DEVICE:
        facts["problem"] = cuda.NOT_SHOWN
    elif status:
        name = ctypes.c_char_p()
        library.cuGetErrorName(status, ctypes.byref(name))
        facts["problem"] = f"cuInit failed: {(name.value or b'').decode()} ({status})"
    if status:
        return facts
    library.cuDeviceGetCount(ctypes.byref(number))
    facts["devices"] = [_device(library, index) for index in range(number.value)]
    return facts


def _device(library, index):
    device, number, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    return {
        "index": index,
        "name": name.value.decode(errors="replace"),
        "compute_capability": ".".join(map(str, capability)),
        "memory_bytes": memory.value,
    }


def _library(name):
    """(Its ctypes handle, facts): CUDA's library ``name``, from wherever CuPy would take it."""
    facts = {"version": None, "path": None, "problem": None}
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        facts["path"] = load_nvidia_dynamic_lib(name).abs_path
        return ctypes.CDLL(facts["path"]), facts
    except (ImportError, OSError, RuntimeError) as error:
        facts["problem"] = _not_found(error)
        return None, facts


def _not_found(error):
    """Why cuda.pathfinder, which CuPy brings along, did not find something, in one line."""
    if isinstance(error, ImportError):
        return "not found, for want of cuda-pathfinder"
    return str(error).strip().partition("\n")[0]


def _nvrtc():
    library, facts = _library("nvrtc")
    facts["architectures"] = []
    if library is not None:
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        facts["version"] = f"{major.value}.{minor.value}"
        library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        library.nvrtcGetSupportedArchs(numbers)
        facts["architectures"] = list(numbers)
    return facts


def _cuda_runtime():
    library, facts = _library("cudart")
    if library is not None:
        number = ctypes.c_int()
        library.cudaRuntimeGetVersion(ctypes.byref(number))
        facts["version"] = _dotted(number.value)
    return facts


def _dotted(number):
    """CUDA's 13050 as 13.5."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cuda_headers():
    facts = {"path": None, "problem": None}
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        facts["path"] = find_nvidia_header_directory("cudart")
    except (ImportError, RuntimeError) as error:
        facts["problem"] = _not_found(error)
    else:
        if facts["path"] is None:
            facts["problem"] = "the headers of the CUDA runtime were not found"
    return facts


def _kernel_sources():
    try:
        folder = modules.kernel_dir()
        for stem in sorted(path.stem for path in folder.glob("*.cu")) or ["copy_blocks"]:
            modules.expanded_source(stem)  # raises where it cannot be read
        return {"path": str(folder), "problem": None}
    except KernelError as error:
        return {"path": None, "problem": str(error)}


def _kernel_cache():
    """CuPy's folder of compiled kernels; ``files`` is None where there is none that can be
    listed."""
    folder = cuda.cache_folder()
    facts = {"path": folder, "files": None, "bytes": 0, "problem": None}
    try:
        with os.scandir(folder) as entries:
            sizes = [entry.stat().st_size for entry in entries if entry.is_file()]
    except FileNotFoundError:  # it is made at the first import of CuPy
        return facts
    except OSError as error:
        return {**facts, "problem": cuda.named(error)}
    return {**facts, "files": len(sizes), "bytes": sum(sizes)}


# --- what is missing ------------------------------------------------------------------------------


def missing(facts):
    """What a machine with these facts (of `collect`) lacks to use its GPUs: a list of
    ``{"what": …, "command": …}``, the command None where none can help."""
    found = []
    if facts["kernel_sources"]["path"] is None:
        command = "pip install --force-reinstall --no-deps cupy-cache"
        found.append({"what": facts["kernel_sources"]["problem"], "command": command})
    driver = facts["driver"]
    if driver["cuda"] is None:
        return found  # without a driver there is no GPU to serve
    if driver["problem"] is not None:
        what = "a GPU" if driver["problem"] == cuda.NOT_SHOWN else "a working driver"
        return [*found, {"what": f"{what}: {driver['problem']}", "command": None}]
    major = int(driver["cuda"].partition(".")[0])
    if major < cuda.OLDEST:
        what = f"a driver for CUDA {cuda.OLDEST} or newer; this one serves {driver['cuda']}"
        return [*found, {"what": what, "command": None}]
    found += _missing_packages(facts, major)
    known = facts["nvrtc"]["architectures"]
    for device in driver["devices"]:
        architecture = int(device["compute_capability"].replace(".", ""))
        if known and not modules.compiles_for(architecture, known):
            what = (
                f"an NVRTC that compiles for {device['name']} (sm_{architecture}); "
                f"{facts['nvrtc']['version']} knows sm_{min(known)} to sm_{max(known)}"
            )
            nvrtc = int(facts["nvrtc"]["version"].partition(".")[0])
            command = f"pip install -U {cuda.nvrtc_package(nvrtc)}"
            if architecture < min(known):
                installed = facts["cupy"]["installed"]
                others = [name for name in installed if name != f"cupy-cuda{cuda.OLDEST}x"]
                command = _instead_of(others, f"cuda{cuda.OLDEST}x")
            found.append({"what": what, "command": command})
    problem = facts["kernel_cache"]["problem"]
    if problem is not None:
        what = f"a folder for compiled kernels that can be used: {problem}"
        found.append({"what": what, "command": "export CUPY_CACHE_DIR=/a/folder/of/yours"})
    return found


def _missing_packages(facts, major):
    """One entry for all Python packages that a driver for CUDA ``major`` needs and lacks."""
    cupy, what = facts["cupy"], []
    installed, extra, unfit = cupy["installed"], f"cuda{min(major, cuda.NEWEST)}x", False
    if len(installed) > 1:
        unfit = True
        what.append(f"a single CuPy: {' and '.join(installed)} exclude each other")
    elif installed and installed != ["cupy"]:  # that one was built here, for this machine
        built_for = re.fullmatch(r"cupy-cuda(\d+)x", installed[0])
        unfit = built_for is None or not cuda.OLDEST <= int(built_for[1]) <= major
        if unfit:
            what.append(f"CuPy for CUDA {major}: {installed[0]} is for another")
        elif int(built_for[1]) <= cuda.NEWEST:
            extra = f"cuda{built_for[1]}x"  # newer drivers serve older CUDA versions too
    if cupy["problem"] is not None and facts["kernel_cache"]["problem"] is None:
        what.append(f"CuPy: {cupy['problem']}")
    elif cupy["version"] is not None and cuda.is_too_old(cupy["version"]):
        what.append(f"CuPy {cuda.CUPY_NEEDED} or newer: {cupy['version']} is installed")
    elif cupy["version"] is not None and not cupy["sees_gpu"] and not what:
        unfit = True
        what.append(f"a CuPy that sees the GPU: {cupy['no_gpu']}")
    for name, part in (("NVRTC", "nvrtc"), ("CUDA runtime headers", "cuda_headers")):
        if facts[part]["path"] is None:
            what.append(f"{name}: {facts[part]['problem']}")
    if not what:
        return []
    others = installed if unfit or installed == ["cupy"] else []  # the extra brings another
    return [{"what": "; ".join(what), "command": _instead_of(others, extra)}]


def _instead_of(others, extra):
    """The command that installs the CuPy of ``extra``. There must be only one: the packages
    ``others`` go before."""
    command = f"pip install -U 'cupy-cache[{extra}]'"
    return f"pip uninstall -y {' '.join(others)} && {command}" if others else command


# --- showing it -----------------------------------------------------------------------------------


def as_text(facts):
    """``facts`` for a reader, aligned."""
    packages, cupy, driver = facts["packages"], facts["cupy"], facts["driver"]
    rows = [
        ("cupy_cache", facts["cupy_cache"]),
        ("Python", f"{facts['python']} on {facts['platform']}"),
        *((name, packages[name] or "not installed") for name in packages),
        ("CuPy", cupy["problem"] or f"{cupy['version']} ({', '.join(cupy['installed'])})"),
        ("CUDA driver", f"for CUDA {driver['cuda']}" if driver["cuda"] else driver["problem"]),
    ]
    if driver["cuda"] and driver["problem"]:
        rows.append(("", driver["problem"]))
    rows += [
        (
            f"GPU {device['index']}",
            f"{device['name']}, compute capability {device['compute_capability']}, "
            f"{device['memory_bytes'] / 2**30:.1f} GiB",
        )
        for device in driver["devices"]
    ]
    for name, part in (("CUDA runtime", "cuda_runtime"), ("NVRTC", "nvrtc")):
        library = facts[part]
        rows.append((name, library["problem"] or f"{library['version']}, {library['path']}"))
    if facts["nvrtc"]["architectures"]:
        rows.append(("", "compiles for sm_" + ", ".join(map(str, facts["nvrtc"]["architectures"]))))
    for name, part in (("CUDA headers", "cuda_headers"), ("kernel sources", "kernel_sources")):
        rows.append((name, facts[part]["path"] or facts[part]["problem"]))
    cache = facts["kernel_cache"]
    size = "does not exist yet"
    if cache["files"] is not None:
        size = f"{errors.counted(cache['files'], 'file')}, {cache['bytes'] / 2**20:.1f} MiB"
    elif cache["problem"] is not None:
        size = "cannot be used"
    rows.append(("kernel cache", f"{'(empty)' if cache['path'] == '' else cache['path']}: {size}"))
    if cache["problem"] is not None:
        rows.append(("", cache["problem"]))
    meanings = {variable.name: variable.meaning for variable in env.TABLE}
    rows += [
        (name, f"{value or '(empty)':<9} {meanings.get(name, '')}".rstrip())
        for name, value in facts["environment"].items()
        if value is not None
    ]
    rows.append(("operations run", "on the GPU" if facts["backend"] == "cupy" else "on the CPU"))
    for entry in facts["missing"]:
        rows.append(("missing", entry["what"]))
        if entry["command"]:
            rows.append(("", f"bring it with: {entry['command']}"))
    if not facts["missing"]:
        lacking = "nothing" if driver["cuda"] else "nothing, for a machine without an NVIDIA driver"
        rows.append(("missing", lacking))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in rows)
