# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""CuPy, imported when it is needed, and calls of the CUDA driver for which it has no binding."""

import contextlib
import ctypes
import errno
import functools
import os
import re
import sys
import threading

from .. import errors
from ..errors import CupyCacheError, KernelError, MissingDependencyError
from . import env

CUPY_NEEDED = "14.2"  # the first whose disk cache serves name expressions
OLDEST, NEWEST = 12, 13  # CUDA versions of the package's extras, cuda12x and cuda13x

_cupy = None  # the module, once it was found to work
_ROCM = "{}: CUDA is needed, and {} is built for ROCm, whose GPUs are not served"


def import_cupy(why):
    """The cupy module. `MissingDependencyError`, beginning with ``why``, where it is missing or
    cannot use CUDA."""
    global _cupy
    cupy = sys.modules.get("cupy")
    if cupy is not None and cupy is _cupy:
        return cupy
    cupy = find_cupy(why)
    try:
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise _without_cuda(why, error) from error
    _cupy = cupy
    return cupy


def find_cupy(why):
    """The cupy module, even if it cannot use CUDA."""
    if _lost_by_fork:
        raise KernelError(f"{why}: {FORKED}")
    if _cut_off:
        raise MissingDependencyError(f"{why}: {_CUT_OFF}")
    try:
        with _noted_import():
            import cupy

        is_hip = cupy.cuda.runtime.is_hip
    except Exception as error:
        raise _without_cupy(why, error) from error
    if is_hip:
        raise MissingDependencyError(_ROCM.format(why, "CuPy"))
    return cupy


_importing: set[int] = set()  # threads that import CuPy here for the first time
_cut_off = False  # whether another thread imported it when this process was forked
_CUT_OFF = (
    "this process was forked while CuPy was imported, which can be neither ended nor begun again "
    "here; start processes with multiprocessing's method 'spawn'"
)


@contextlib.contextmanager
def _noted_import():
    """Inside, this thread is among those that import CuPy, unless that was done before."""
    if "cupy" in sys.modules and not _is_half_imported():
        yield
        return
    thread = threading.get_ident()
    _importing.add(thread)
    try:
        yield
    finally:
        _importing.discard(thread)


def _is_half_imported():
    """Whether a thread, of whoever, is in the middle of CuPy's import."""
    spec = getattr(sys.modules.get("cupy"), "__spec__", None)
    return getattr(spec, "_initializing", False)


def _after_fork():
    """In a forked child, the parent's other threads do not exist. Python's lock of a module stays
    with the thread that imported it, and whoever imports it would wait for ever."""
    global _cut_off
    mine = {threading.get_ident()} & _importing  # what this thread began it goes on with
    _cut_off = _cut_off or _importing != mine or (not mine and _is_half_imported())


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_after_fork)


FORKED = (
    "CUDA cannot be used in a process that was forked from one that used it; start processes with "
    "multiprocessing's method 'spawn'"
)
_lost_by_fork = False


def lose():
    """Refuse to use CUDA from now on: this process was forked from one that used it."""
    global _cupy, _lost_by_fork
    _cupy, _lost_by_fork = None, True


# Of cudaError_t; of the last one CUresult has the same number.
_NOT_INITIALIZED, _INSUFFICIENT_DRIVER, NO_DEVICE = 3, 35, 100
NOT_SHOWN = "no GPU is shown: see CUDA_VISIBLE_DEVICES, and whether this container was given one"


def _without_cuda(why, error):
    """The error where CuPy finds no CUDA."""
    if getattr(error, "status", None) == _NOT_INITIALIZED:
        return KernelError(f"{why}: {FORKED}")
    if torchs_rocm():
        return MissingDependencyError(_ROCM.format(why, "torch"))
    told, way_out = f"{why}: CuPy cannot use CUDA here: {named(error)}", _way_to_cuda(error)
    return MissingDependencyError(f"{told}; {way_out}" if way_out else told)


def _way_to_cuda(error):
    """The way out where CuPy finds no CUDA, for errors; "" where CUDA's own text has to do."""
    status = getattr(error, "status", None)
    if status == NO_DEVICE:
        return NOT_SHOWN
    if status == _INSUFFICIENT_DRIVER and driver_version() is None:
        return "there is no NVIDIA driver here"
    if status in (None, _INSUFFICIENT_DRIVER):
        # The driver may be older than CuPy needs, and new enough for torch, which has the arrays.
        return (
            f"the CuPy that fits this driver comes with {install_hint()}, once the other is "
            "uninstalled"
        )
    return ""


def no_gpu():
    """(Why there is no GPU to use, the way out), for errors."""
    if torchs_rocm():
        return "torch is built for ROCm, whose GPUs are not served", ""
    try:
        find_cupy("").cuda.runtime.getDeviceCount()
    except CupyCacheError as error:
        why, _, way_out = str(error).removeprefix(": ").partition("; ")
        return why, way_out
    except Exception as error:
        return f"CuPy sees no CUDA GPU ({named(error)})", _way_to_cuda(error)
    return "CuPy sees no CUDA GPU", ""


def in_use_without_cupy():
    """Whether a GPU is used in this process where CuPy sees none. The driver is asked, and not
    initialised for that: a forked child could not use it any more."""
    driver, count = _driver_if_there(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)):  # not initialised
        return False
    return any(map(_has_context, range(count.value)))


@functools.cache
def _driver_if_there():
    """The driver's library, as it is; None where there is none."""
    try:
        return load_library()
    except OSError:
        return None


def torchs_rocm():
    """The version of ROCm that torch is built for; None if it is not."""
    return getattr(getattr(sys.modules.get("torch"), "version", None), "hip", None)


def _without_cupy(why, error):
    """The error where importing CuPy raised ``error``."""
    if torchs_rocm():
        return MissingDependencyError(_ROCM.format(why, "torch"))
    if is_of_files(error):  # its import makes the folder of its kernel cache
        return MissingDependencyError(
            f"{why}: CuPy is installed, but importing it failed: {with_cache_hint(error)}"
        )
    folders = getattr(sys.modules.get("cupy"), "__path__", None)
    if folders and getattr(sys.modules["cupy"], "__file__", None) is None:
        return MissingDependencyError(
            f"{why}: CuPy is needed, and the folder {folders[0]} is imported in its place: rename "
            f"it, or take it off the path; {install_hint()}"
        )
    if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
        return MissingDependencyError(
            f"{why}: CuPy {CUPY_NEEDED} or newer is needed, and is not installed; {install_hint()}"
        )
    return MissingDependencyError(
        f"{why}: CuPy could not be imported: {named(error)}; {install_hint()}"
    )


def is_too_old(version):
    """Whether this version of CuPy is older than what is needed."""
    found, needed = (re.findall(r"\d+", text)[:2] for text in (version, CUPY_NEEDED))
    return [*map(int, found)] < [*map(int, needed)]


def named(error):
    """The text of an error with its class, in one line."""
    text = " ".join(errors.in_a_line(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def cache_folder():
    """The folder that CuPy uses for its kernel cache. It need not exist."""
    chosen = env.other("CUPY_CACHE_DIR")
    return os.path.expanduser("~/.cupy/kernel_cache") if chosen is None else chosen


def is_of_files(error):
    """Whether this is the system's error about a file or folder. That of a library which cannot be
    loaded is of the same class, and has no number."""
    return isinstance(error, OSError) and error.errno is not None


def with_cache_hint(error):
    """The text of the system's error at CuPy's kernel cache, and the way out where another folder
    is one."""
    if error.errno in _OF_NO_FOLDER:
        return named(error)
    return (
        f"{named(error)}; CuPy keeps compiled kernels in {cache_folder()}: name a folder that this "
        "user can write in CUPY_CACHE_DIR"
    )


_OF_NO_FOLDER = errno.EMFILE, errno.ENFILE, errno.ENOMEM


def install_hint():
    """The command that installs CuPy and what it needs, for this driver."""
    version = driver_version()
    if version is None:
        extra = f"cuda{NEWEST}x"
        others = f" (for a driver of CUDA {OLDEST}: cuda{OLDEST}x)"
    else:
        extra, others = f"cuda{max(OLDEST, min(version[0], NEWEST))}x", ""
    return f"pip install -U 'cupy-cache[{extra}]'{others}"


def nvrtc_package(major):
    """The package that has NVRTC for this major version of CUDA."""
    return "nvidia-cuda-nvrtc" if major > 12 else f"nvidia-cuda-nvrtc-cu{major}"


def driver_version():
    """(major, minor) of the newest CUDA that the driver serves; None without a driver."""
    number = ctypes.c_int()
    try:
        if load_library().cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def load_library():
    """The driver's library; `OSError` where there is none."""
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


@functools.cache
def library():
    """The driver's library, initialised."""
    library = load_library()
    check(library.cuInit(0), "cuInit")
    return library


def check(status, what):
    """Raise where the driver's call ``what`` returned an error."""
    if status:
        raise KernelError(f"{what} failed: CUDA error {status}")


def capture_of(stream):
    """The unique number of the capture of a stream of the current GPU; 0 where there is none."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    found = ctypes.byref(status), ctypes.byref(number), None, None, None
    name = "cuStreamGetCaptureInfo_v2"
    check(getattr(library(), name)(ctypes.c_void_p(stream), *found), name)
    return number.value if status.value else 0


@functools.cache
def _primary_context(index):
    """The context of GPU ``index`` that all frameworks share."""
    driver, device, context = library(), ctypes.c_int(), ctypes.c_void_p()
    check(driver.cuDeviceGet(ctypes.byref(device), index), f"cuDeviceGet({index})")
    status = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    check(status, f"cuDevicePrimaryCtxRetain({index})")
    return context


def on_device(index):
    """A context manager, to be entered at once: inside, GPU ``index`` is current in this thread;
    afterwards the earlier one is.

    CuPy's ``Device`` goes back by setting the earlier GPU, and setting a GPU makes a context there,
    of half a gigabyte, even if nobody uses that GPU. Pushing a context and popping it makes none.
    """
    get_device, get_context, set_device = _current(index)
    if get_device() != index:
        return _Pushed(index)
    if not get_context():  # a thread that has not used CUDA yet
        set_device(index)
    return _HERE


class _Here:
    """Nothing: the GPU is current already. As a generator it would take six times as long."""

    __slots__ = ()

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


_HERE = _Here()


class _Pushed:
    """GPU ``index`` is current inside."""

    __slots__ = ("_index",)

    def __init__(self, index):
        self._index = index

    def __enter__(self):
        check(library().cuCtxPushCurrent_v2(_primary_context(self._index)), "cuCtxPushCurrent")

    def __exit__(self, *error):
        popped = ctypes.c_void_p()
        check(library().cuCtxPopCurrent_v2(ctypes.byref(popped)), "cuCtxPopCurrent")


@functools.cache
def _current(index=None):
    """Functions that get this thread's current GPU, get its context, and set the GPU. ``index``:
    of the GPU that they are asked for, for errors."""
    cuda = import_cupy("a CUDA device" if index is None else f"cuda:{index}").cuda
    return cuda.runtime.getDevice, cuda.driver.ctxGetCurrent, cuda.runtime.setDevice


def free_on(index, free, *given, is_finalizing=sys.is_finalizing):
    """Call ``free(*given)``, which gives something of GPU ``index`` back to CUDA, with that GPU
    current: on another one it would make a context, and whichever thread drops an object last frees
    it. At the interpreter's end nothing is called: the process's memory goes anyway."""
    if not is_finalizing():
        with on_device(index):
            free(*given)


@functools.cache
def freed_on_its_gpu(kind):
    """A class like CuPy's class ``kind``, whose objects are freed on the GPU on which they were
    made (`free_on`)."""
    current_device, *_ = _current()

    class OnItsGpu(kind):
        def __init__(self, *given, **options):
            self._made_on = current_device()
            super().__init__(*given, **options)

        def __del__(self, free_on=free_on):
            free_on(self._made_on, super().__del__)

    return OnItsGpu


@contextlib.contextmanager
def during_captures():
    """A context manager: inside, this thread may make calls that a capture in any thread would
    otherwise forbid."""
    mode = ctypes.c_int(2)  # CU_STREAM_CAPTURE_MODE_RELAXED
    library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def in_a_context():
    """A context manager, to be entered at once: inside, the thread has a CUDA context, which the
    driver's queries and pinned memory need. Any GPU's context will do: one that is in use is taken,
    so that no GPU gets a context that nobody else asked for."""
    _, get_context, _ = _current()
    if get_context():
        return _HERE
    count = import_cupy("a raw address").cuda.runtime.getDeviceCount()
    return on_device(next(filter(_has_context, range(count)), 0))


def _has_context(index):
    """Whether GPU ``index`` has the context that all frameworks share."""
    driver, device = library(), ctypes.c_int()
    flags, active = ctypes.c_uint(), ctypes.c_int()
    check(driver.cuDeviceGet(ctypes.byref(device), index), f"cuDeviceGet({index})")
    status = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    check(status, f"cuDevicePrimaryCtxGetState({index})")
    return bool(active.value)
