# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""From a ``.cu`` file and a name expression to a loaded kernel.

The key of CuPy's disk cache is the source text and the options, without the files that ``-I``
reaches: after an edit of a header on an include path, the old binary would still be served. So our
own includes are expanded into the source, once each, with ``#line`` directives. The key then has
all of our text and no absolute path, and compile errors still name ``kernels_cu/X.cu:LINE``.

One name expression per module: about 35 ms to a first kernel, against half a second for 32.
"""

import concurrent.futures
import ctypes
import functools
import os
import re
import stat
import threading
import time
from pathlib import Path

from ..errors import Fault, KernelError, MissingDependencyError, UnsupportedArchitectureError
from . import cuda, env, locks
from .log import logger

# Options of every compile. CuPy adds the architecture, its own include paths and -ftz=true.
OPTIONS = ("-std=c++17",)
FAULT_SYMBOL = "cupy_cache_fault"
LONG = 0.3  # seconds: a kernel that took longer to load was compiled

_INCLUDE = re.compile(r'^\s*#\s*include\s+"(cupy_cache/[\w./]+)"')


class Kernel:
    """One specialisation: a source, a name expression, and the struct it takes.

    Parameters
    ----------
    op : str
        The operation it belongs to, for fault reports.
    stem : str
        ``kernels_cu/<stem>.cu``.
    expression : str
        The template instantiation, without its namespace.
    params : params.Struct
        Its ``Params``.
    guarded : tuple
        The arguments whose values the kernel checks, in the order of its fault numbers: names, or
        (operation, name) where several operations share the kernel.
    converts : bool
        Whether it needs the element types (elements.cuh).
    shared_bytes : int
        Bytes of dynamic shared memory.
    all_shared : bool
        Whether to make shared memory of as much of the L1 cache as possible, so that more thread
        blocks fit: the kernel does not use that cache. Else the driver chooses.
    only : int, optional
        The one compute capability, such as 90, that has the kernel's instructions.
    """

    __slots__ = (
        "all_shared", "converts", "expression", "guarded", "only", "op", "params", "shared_bytes",
        "stem",
    )  # fmt: skip

    def __init__(
        self, op, stem, expression, params, guarded=(), converts=False, shared_bytes=0,
        all_shared=False, only=None,
    ):  # fmt: skip
        self.op, self.stem, self.params = op, stem, params
        self.guarded = tuple((op, arg) if isinstance(arg, str) else arg for arg in guarded)
        self.expression = f"cupy_cache::{expression}"
        self.converts, self.only = converts, only
        self.shared_bytes, self.all_shared = shared_bytes, all_shared

    def runs_on(self, capability):
        """Whether GPUs of this compute capability, such as 90, run it."""
        return self.only in (None, capability)

    def options(self):
        """Compile options beside `OPTIONS` and CuPy's own for the architecture. NVRTC lets
        ``-arch=sm_90a`` override CuPy's sm_90."""
        return () if self.only is None else (f"-arch=sm_{self.only}a",)

    def source(self):
        """The complete text to compile: headers expanded, struct checks appended."""
        return (
            ("#define CUPY_CACHE_CONVERTS\n" if self.converts else "")
            + expanded_source(self.stem)
            + f'#line 1 "checks of {self.stem}"\n'
            + self.params.asserts("cupy_cache::Params")
        )

    @property
    def key(self):
        """What makes two kernels the same."""
        return self.stem, self.expression

    def __repr__(self):
        return f"<Kernel {self.stem}.cu {self.expression}>"


class FaultRecord(ctypes.Structure):
    """`Fault` of paging.cuh: the global `FAULT_SYMBOL` in the module of a guarded kernel."""

    _fields_ = [
        ("taken", ctypes.c_uint32),
        ("argument", ctypes.c_uint32),
        ("row", ctypes.c_int64),
        ("value", ctypes.c_int64),
        ("limit", ctypes.c_int64),
    ]

    @property
    def is_published(self):
        """Whether a fault is recorded: kPublished of paging.cuh."""
        return self.taken == 2

    def fault(self, kernel, device):
        """The recorded `Fault`."""
        op, argument = kernel.guarded[self.argument - 1]
        return Fault(op, argument, self.row, self.value, self.limit, device)


def kernel_dir():
    """The folder that holds the ``.cu`` sources: CUPYCACHE_KERNEL_DIR, else the installed one (in
    the package), else the checkout's (beside the package)."""
    chosen = env.text(env.KERNEL_DIR)
    package = Path(__file__).resolve().parent.parent
    candidates = (
        [Path(chosen)] if chosen else [package / "kernels_cu", package.parent / "kernels_cu"]
    )
    why = ""
    for folder in candidates:
        try:
            if stat.S_ISDIR((folder / "include" / "cupy_cache").stat().st_mode):
                return folder
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # it may not be looked into, say
            why = f" ({cuda.named(error)})"
    raise KernelError(
        f"cupy_cache: no kernel sources in {' or '.join(map(str, candidates))}{why}; reinstall "
        f"cupy-cache, or name a kernels_cu folder in {env.KERNEL_DIR.name}"
    )


def expanded_source(stem):
    """The text of ``<stem>.cu`` with our own headers in place of their includes."""
    folder = kernel_dir()
    path = folder / f"{stem}.cu"
    try:
        stamp = tuple(sorted((str(f), f.stat().st_mtime_ns) for f in _files_of(folder, path)))
        return _expand(folder, stem, stamp)
    except (OSError, UnicodeDecodeError) as error:
        raise KernelError(
            f"{stem}: its source could not be read: {cuda.named(error)}; reinstall cupy-cache, or "
            f"name a kernels_cu folder in {env.KERNEL_DIR.name}"
        ) from error


def _files_of(folder, path):
    return [path, *(folder / "include" / "cupy_cache").glob("*.cuh")]


@functools.lru_cache(maxsize=64)
def _expand(folder, stem, stamp):
    del stamp  # only there so that an edited file is read again
    return "".join(_expand_file(folder / f"{stem}.cu", f"kernels_cu/{stem}.cu", folder, set()))


def _expand_file(path, shown, folder, seen):
    yield f'#line 1 "{shown}"\n'
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = _INCLUDE.match(line)
        if found is None:
            if line.strip() != "#pragma once":
                yield line + "\n"
            else:
                yield "\n"
            continue
        header = found[1]
        if header not in seen:
            seen.add(header)
            yield from _expand_file(
                folder / "include" / header, f"kernels_cu/include/{header}", folder, seen
            )
        yield f'#line {number + 1} "{shown}"\n'


class Loaded:
    """A kernel on one device: the driver's function handle, and where its fault record is."""

    __slots__ = ("device", "function", "handle", "kernel", "module")

    def __init__(self, kernel, device, function, module):
        self.kernel, self.device, self.function, self.module = kernel, device, function, module
        self.handle = function.kernel.ptr

    def __repr__(self):
        return f"<Loaded {self.kernel!r} on cuda:{self.device}>"


_loaded = {}
_locks = {}
_guard = locks.Lock()
_warming = threading.local()


def loaded():
    """All kernels loaded so far, as `Loaded`."""
    return tuple(_loaded.values())


def load(kernel, device):
    """``kernel`` on GPU ``device``, compiling it, or reading CuPy's disk cache, at first use."""
    key = (*kernel.key, device)
    found = _loaded.get(key)
    if found is not None:
        return found
    with _guard:
        lock = _locks.setdefault(key, locks.Lock())
    with lock:
        found = _loaded.get(key)
        if found is None:
            if env.flag(env.NO_COMPILE) and not getattr(_warming, "on", False):
                raise KernelError(
                    f"{kernel.op} on cuda:{device}: {kernel!r} is not loaded, and "
                    f"{env.NO_COMPILE.name} is set; name this shape in warmup()"
                )
            found = _loaded[key] = _load(kernel, device)
    return found


def _after_fork():
    """Forget, in a forked child, the parent's kernels: they cannot be used there."""
    if _loaded:
        _loaded.clear()
        cuda.lose()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)


class warming:
    """A context manager: inside, this thread loads kernels even with CUPYCACHE_NO_COMPILE=1."""

    def __enter__(self):
        _warming.on = True

    def __exit__(self, *exc):
        _warming.on = False


def _load(kernel, device):
    why = f"{kernel.op} on cuda:{device}"
    cupy = cuda.import_cupy(why)
    _require_cupy_version(why, cupy)
    supported = _nvrtc_architectures(why)
    options = OPTIONS + kernel.options() + (("-lineinfo",) if env.flag(env.LINEINFO) else ())
    logger.debug("loading %s on cuda:%d", kernel, device)
    start = time.monotonic()
    capability = _capability(device)
    with cuda.on_device(device):
        _require_architecture(why, capability, supported)
        source = kernel.source()
        try:
            module = cupy.RawModule(
                code=source, options=options, name_expressions=(kernel.expression,)
            )
            function = module.get_function(kernel.expression)
            if kernel.shared_bytes:  # more than 48 KiB must be asked for
                function.max_dynamic_shared_size_bytes = kernel.shared_bytes
            if kernel.all_shared:
                function.preferred_shared_memory_carveout = 100  # per cent
            took = time.monotonic() - start
            if took > LONG and not getattr(_warming, "on", False):
                logger.info(
                    "%s waited %.1f s for %s to be compiled; warmup() compiles ahead and in "
                    "parallel", kernel.op, took, kernel,
                )  # fmt: skip
            return Loaded(kernel, device, function, module)
        except Exception as error:
            raise _explain(error, kernel, why) from error


@functools.cache
def _capability(device):
    """CuPy's account of a GPU's compute capability, such as 90, which CuPy remembers and asks for
    again when it compiles. At first it sets the GPU to ask, and a thread without a context would
    keep that for its current one: so another thread does it."""

    def ask():
        with cuda.on_device(device):
            return int(cuda.import_cupy("a kernel").cuda.Device(device).compute_capability)

    with concurrent.futures.ThreadPoolExecutor(1, "cupy_cache capability") as pool:
        return pool.submit(ask).result()


def _require_cupy_version(why, cupy):
    if cuda.is_too_old(cupy.__version__):
        raise MissingDependencyError(
            f"{why}: CuPy {cuda.CUPY_NEEDED} or newer is needed, {cupy.__version__} is installed; "
            f"{cuda.install_hint()}"
        )


def _nvrtc_architectures(why):
    """The compute capabilities, such as 90, that NVRTC compiles for."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        return nvrtc.getSupportedArchs()
    except Exception as error:  # CuPy finds the library at its first use, and raises what it likes
        raise MissingDependencyError(
            f"{why}: NVRTC could not be loaded: {cuda.named(error)}; {cuda.install_hint()}"
        ) from error


def _nvrtc_package():
    """The package of the NVRTC that is loaded."""
    from cupy_backends.cuda.libs import nvrtc

    return cuda.nvrtc_package(nvrtc.getVersion()[0])


def compiles_for(capability, supported):
    """Whether code from an NVRTC that knows the compute capabilities ``supported`` runs on a GPU of
    ``capability``, such as 90. For a newer GPU CuPy has it compile for the newest that it knows;
    such code runs if the major version is the GPU's."""
    asked = min(capability, max(supported))
    return asked in supported and asked // 10 == capability // 10


def _require_architecture(why, capability, supported):
    if compiles_for(capability, supported):
        return
    known = ", ".join(map(str, supported))
    way_out = f"pip install -U {_nvrtc_package()} brings a newer one"
    if capability < min(supported):
        way_out = (
            f"an older one is needed: pip install 'cupy-cache[cuda{cuda.OLDEST}x]', once the other "
            "CuPy is uninstalled"
        )
    raise UnsupportedArchitectureError(
        f"{why}: NVRTC does not compile for compute capability {capability / 10}, but for sm_"
        f"{known}; {way_out}"
    )


# The driver's statuses for machine code that it cannot load (CUresult).
_INVALID_IMAGE, _NO_BINARY_FOR_GPU, _UNSUPPORTED_PTX = 200, 209, 222
# NVRTC's where its second library is missing, libnvrtc-builtins.
_NO_BUILTINS = 7


def _explain(error, kernel, why):
    """Our error for what CuPy raised while compiling or loading. Its class and status decide; its
    text may quote anything, such as names of folders."""
    from cupy.cuda.compiler import CompileException
    from cupy_backends.cuda.api.driver import CUDADriverError

    failed, told = f"{why}: {kernel!r} could not be", cuda.named(error)
    if cuda.is_of_files(error):
        return KernelError(f"{failed} kept or found: {cuda.with_cache_hint(error)}")
    if isinstance(error, OSError):
        return MissingDependencyError(f"{failed} loaded: {told}; {cuda.install_hint()}")
    if isinstance(error, CompileException):
        if getattr(error.__context__, "status", None) == _NO_BUILTINS:
            return MissingDependencyError(
                f"{why}: NVRTC is not whole: {error}; pip install --force-reinstall --no-deps "
                f"{_nvrtc_package()}"
            )
        return KernelError(f"{failed} compiled: {error}")
    if isinstance(error, CUDADriverError):
        if error.status in (_NO_BINARY_FOR_GPU, _UNSUPPORTED_PTX):
            return UnsupportedArchitectureError(
                f"{failed} loaded: {told}; the driver is too old for this NVRTC: "
                f"{cuda.install_hint()}"
            )
        if error.status == _INVALID_IMAGE:
            return KernelError(
                f"{failed} loaded: {told}; if a file of the kernel cache is damaged, empty "
                f"{cuda.cache_folder()}"
            )
        return KernelError(f"{failed} loaded: {told}")
    if not _has_headers():
        # No kernel includes CUDA's headers, but CuPy compiles nothing where it cannot find them.
        return MissingDependencyError(
            f"{why}: the CUDA runtime headers are missing: {told}; {cuda.install_hint()}"
        )
    return KernelError(f"{failed} compiled or loaded: {told}")


def _has_headers():
    """Whether the CUDA runtime headers are where CuPy looks."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        return find_nvidia_header_directory("cudart") is not None
    except Exception:  # whatever it does not find
        return False
