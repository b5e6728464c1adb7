# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the shipped kernels without a GPU, and sees what they must not do.

The library is used as it is: `EmulatedWorld` puts an `EmulatedDriver` where `launch` has its CUDA
driver, and hands out arrays that say they are on cuda:0. A kernel's source, the very text that
NVRTC would get, is compiled by g++ behind ``shim.h`` into a shared object, once for each
instantiation, and cached on disk. Another process (``runner.cpp``) runs it. An access outside the
storages, two threads that touch a byte with no barrier between, a misaligned vector, an overflow or
a deadlock ends that process and is raised as `EmulationError`. Copies that run on while a thread
computes are done at once in some launches, and in others only when they are waited for: where a
wait is missing, what is read is not there.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import re
import signal
import struct
import subprocess
import tempfile
import threading
import time
import weakref
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import worlds

from cupy_cache.runtime import (
    allocations,
    arrays,
    devices,
    dispatch,
    driver,
    formats,
    launch,
    modules,
)

from . import ptx

HERE = Path(__file__).resolve().parent
COMPILE = (
    # -O0: a kernel runs a few times, and compiles in two thirds of the time of -Og. In DWARF 5
    # addr2line takes the file of some lines for the temporary one.
    *("g++", "-std=c++17", "-O0", "-g1", "-gdwarf-4", "-w"),
    *("-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-exceptions"),
    # What is called before each access, ThreadSanitizer's functions, is in runner.cpp.
    "-fsanitize=thread,undefined",
    # These take a third of the time. What comes of such a pointer is seen where it is used: it is
    # outside the storages.
    "-fno-sanitize=null,pointer-overflow",
    *("--param", "tsan-instrument-func-entry-exit=0"),
)
# What is undefined ends the process by a signal, or by a report. To make what a report says takes a
# fifth of a kernel's time, so that is compiled where it is needed.
BY_SIGNAL = "-fsanitize-undefined-trap-on-error"
BY_REPORT = "-fno-sanitize-recover=all"
SANITIZER_OPTIONS = {"UBSAN_OPTIONS": "print_stacktrace=1:handle_segv=1:handle_abort=1"}
KEEP_UNUSED_DAYS = 14
# Each kernel is compiled for one of them: with the instructions of newer GPUs, and without.
ARCHITECTURES = (75, 90)
# Kernels with one of these in their names write one value: the same block may be given to them
# twice.
ONE_VALUE = ("Direction::kZero",)


class EmulationError(AssertionError):
    """A kernel did what it must not; the text is the sanitizer's report."""


class UndefinedError(EmulationError):
    """It did what C++ does not define; no report says what."""


# --- the device's memory --------------------------------------------------------------------------


class Storage:
    """One allocation on the emulated device, alive as long as this object. ``bytes`` shows its
    content, and does not keep it alive."""

    def __init__(self, ptr, nbytes):
        self.ptr, self.nbytes = ptr, nbytes
        self.bytes = np.frombuffer((ctypes.c_uint8 * nbytes).from_address(ptr), np.uint8)

    def holds(self, address, size):
        """Whether the bytes from ``address`` on are this storage's."""
        return self.ptr <= address and address + size <= self.ptr + self.nbytes


class Memory:
    """A file mapped at one address in this process and in the runner's, so that pointers mean the
    same in both. Storages never share a page, and lie far apart."""

    BASE, SIZE = 0x3000_0000_0000, 2**36  # free on Linux
    PAGE, START = 4096, 256  # a storage starts as cudaMalloc's do, after a red zone
    GAP = 16 * PAGE

    def __init__(self):
        self.fd = os.memfd_create("emulated device")
        os.ftruncate(self.fd, self.SIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        read_write, shared_at_this_address = 3, 0x1 | 0x100000
        if self.BASE != libc.mmap(
            self.BASE, self.SIZE, read_write, shared_at_this_address, self.fd, 0
        ):
            raise MemoryError(f"the emulated device's addresses are taken: {ctypes.get_errno()}")
        self._storages = weakref.WeakSet()

    def allocate(self, nbytes):
        """A `Storage` in the first gap that is wide enough, with unlikely content."""
        page = self.BASE
        for storage in self.storages():
            if storage.ptr - page >= nbytes + self.GAP:
                break
            end = storage.ptr + storage.nbytes
            page = (end + self.GAP) // self.PAGE * self.PAGE
        if page + self.START + nbytes > self.BASE + self.SIZE:
            raise MemoryError(f"the emulated device has no room for {nbytes} bytes")
        storage = Storage(page + self.START, nbytes)
        storage.bytes[:] = 0xA5
        self._storages.add(storage)
        return storage

    def contains(self, address):
        """Whether ``address`` belongs to the device."""
        return self.BASE <= address < self.BASE + self.SIZE

    def storages(self):
        """Those alive, by address."""
        return sorted(self._storages, key=lambda storage: storage.ptr)


@functools.cache
def memory():
    return Memory()


class EmulatedArray:
    """An array on the emulated device: byte strides, a dtype's name, and nothing else."""

    def __init__(self, storage, offset, shape, strides, dtype):
        self.storage, self.offset, self.dtype = storage, offset, dtype
        self.shape, self.strides = tuple(shape), tuple(strides)

    def numpy(self):
        """A copy of its elements."""
        numpy = formats.DTYPES[self.dtype].numpy
        raw = self.storage.bytes.data
        return np.ndarray(self.shape, numpy, raw, self.offset, self.strides).copy()


_PLACE = arrays.Place("emulated", devices.Device("cuda", 0), True)


def _describe(array):
    ptr = array.storage.ptr + array.offset
    return ptr, array.shape, array.strides, array.dtype, _PLACE, None


def _empty(device, shape, dtype):
    like = np.empty(shape, dtype.numpy)
    return EmulatedArray(memory().allocate(like.nbytes), 0, like.shape, like.strides, dtype.name)


arrays.register_framework(
    "emulated", EmulatedArray, arrays.Framework(_describe, lambda index: 0, _empty)
)


# --- compiling ------------------------------------------------------------------------------------


class Built(NamedTuple):
    """A kernel's shared object, and its __shared__ variables: (offset in it, size, name)s."""

    path: Path
    shared: tuple


def build(kernel, undefined=BY_SIGNAL):
    """``kernel`` as `Built`; from the cache if the same text was compiled before."""
    return _build(*_decisive(kernel), undefined)


@functools.lru_cache(maxsize=128)  # of 200 KB each
def _build(source, expression, architecture, alone, undefined):
    header, entry = _parts(source, expression, architecture, alone)
    path = _compile((*COMPILE, undefined), entry, ".so", header)
    return Built(path, _find_shared(path) if "__shared__" in source else ())


def check_syntax(kernel):
    """Raise where the text of ``kernel`` is not C++."""
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as file:
        file.write(whole_text(kernel))
        file.flush()
        _run(*COMPILE, "-fsyntax-only", file.name)


def whole_text(kernel):
    """What g++ gets to compile."""
    return "".join(_parts(*_decisive(kernel)))


def _decisive(kernel):
    """What decides the text of ``kernel``: its source, which of its kernels, the architecture, and
    whether it is for that one alone."""
    which = zlib.crc32(kernel.expression.encode()) % len(ARCHITECTURES)
    architecture = ARCHITECTURES[which]
    return kernel.source(), kernel.expression, architecture, kernel.only == architecture


def _parts(source, expression, architecture, alone):
    """What is the same for all kernels of a source, and what is for one of them."""
    source = ptx.with_calls(source)
    # The parameters are read where they are, and not in a copy: what is read behind them is seen.
    source = source.replace("const __grid_constant__ Params p", "const Params& p")
    # Where functions are called, and not inlined, attention compiles in four fifths of the time.
    header = f"""{prelude(architecture, alone)}
#undef __forceinline__
#define __forceinline__ inline
namespace {{
{source}
}}
"""
    entry = f"""#line 1 "entry"
#pragma GCC visibility push(default)
extern "C" void emulator_kernel(const void* record) {{
  ({expression})(*static_cast<const cupy_cache::Params*>(record));
}}
"""
    if modules.FAULT_SYMBOL in source:
        entry += f'extern "C" {{ void* emulator_fault = &{modules.FAULT_SYMBOL}; }}\n'
    return header, entry


def prelude(architecture=None, alone=False):
    """What a source needs before it. Without an architecture it is not taken to be for a GPU.
    ``alone``: with the instructions that this architecture alone has."""
    headers = (
        f'#line 1 "tests/emulator/{name}"\n{_read(name)}'
        for name in ("shim.h", "numbers.h", "ptx.h")
    )
    defined = f"#define __CUDA_ARCH__ {architecture}0\n" if architecture else ""
    if alone:
        defined += f"#define __CUDA_ARCH_FEAT_SM{architecture}_ALL\n"
    return defined + "\n".join(headers)


@functools.cache
def _read(name):
    return (HERE / name).read_text(encoding="utf-8")


# Of the ELF-64 object file format: the header of a section, and an entry of a table of symbols.
_SECTION = np.dtype(
    [("name", "u4"), ("type", "u4"), ("flags", "u8"), ("address", "u8"), ("offset", "u8"),
     ("size", "u8"), ("link", "u4"), ("info", "u4"), ("alignment", "u8"), ("of_entry", "u8")]
)  # fmt: skip
_SYMBOL = np.dtype(
    [("name", "u4"), ("info", "u1"), ("other", "u1"), ("section", "u2"), ("value", "u8"),
     ("size", "u8")]
)  # fmt: skip
_SYMBOLS, _WRITABLE, _LOCAL_VARIABLE = 2, 1, 1  # a section's type and flag, a symbol's info


def _find_shared(path):
    """Its variables that are local to a function. nm would take ten times as long."""
    library = path.read_bytes()
    (at,), (count,) = struct.unpack_from("<Q", library, 40), struct.unpack_from("<H", library, 60)
    sections = np.frombuffer(library, _SECTION, count, at)
    (table,) = sections[sections["type"] == _SYMBOLS]
    # As Python's integers: NumPy 1 divides unsigned ones to floats.
    begin, size = int(table["offset"]), int(table["size"])
    symbols = np.frombuffer(library, _SYMBOL, size // _SYMBOL.itemsize, begin)
    names = int(sections[table["link"]]["offset"])
    found = []
    for symbol in symbols[symbols["info"] == _LOCAL_VARIABLE]:
        begin = names + int(symbol["name"])
        name = library[begin : library.index(b"\0", begin)].decode()
        # A name that starts with _ZZ is local to a function.
        if name.startswith("_ZZ") and int(sections[symbol["section"]]["flags"]) & _WRITABLE:
            found.append((int(symbol["value"]), int(symbol["size"]), _variable(name)))
    return tuple(found)


def _variable(mangled):
    """The name of a variable: what has as many letters as the number before it says, at the end."""
    found = re.search(r"E(\d+)(\w+?)(?:_\d+|__\d+_)?$", mangled)
    return found[2][: int(found[1])] if found else mangled


@functools.cache
def build_runner():
    """The runner's path. It brings the sanitizer's code, but only kernels are instrumented."""
    command = ("g++", "-std=c++17", "-O2", "-rdynamic")
    libraries = ("-Wl,--no-as-needed", "-lubsan", "-lm", "-ldl")
    text = "\n".join(map(_read, ("numbers.h", "runner.cpp")))
    return _compile(command, text, ".runner", libraries=libraries)


ALONE = "-shared", "-nostdlib"  # a kernel's: the runner has it all


def _compile(command, text, suffix, header="", libraries=ALONE):
    """The path of what is made of ``header`` and ``text``. The header is compiled by itself first,
    once for all texts that begin with it."""
    path = _place(suffix, *command, *libraries, header, text)
    if path.exists():
        os.utime(path)  # still in use
        return path
    if header:
        text = f'#include "{_precompiled(command, header)}"\n{text}'
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder) / "source", Path(folder) / "made"
        source.write_text(text)
        _run(*command, "-x", "c++", source, "-x", "none", "-o", made, *libraries)
        made.replace(path)
    return path


def _precompiled(command, header):
    """The path of a header that g++ finds compiled. Reading it anew for each kernel would take a
    quarter of their time. Where g++ cannot use what was compiled, it reads the header."""
    path = _place(".h", *command, header)
    compiled = path.with_suffix(".h.gch")
    if compiled.exists():
        os.utime(path)
        os.utime(compiled)
        return path
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, made = Path(folder) / "source.h", Path(folder) / "made"
        source.write_text(header)
        _run(*command, "-x", "c++-header", source, "-o", made)
        source.replace(path)
        made.replace(compiled)
    return path


def _place(suffix, *texts):
    """The path in the cache of what these decide."""
    key = "\0".join((_gxx_version(), *map(str, texts)))
    return _cache() / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)


def _run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"{command[0]} failed:\n{done.stderr[:8000]}")
    return done.stdout


@functools.cache
def _gxx_version():
    return _run("g++", "--version").partition("\n")[0] + os.uname().machine


@functools.cache
def _cache():
    """The folder of compiled kernels, rid of those that no run has used for a while."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "cupy_cache_emulator"
    folder.mkdir(parents=True, exist_ok=True)
    oldest = time.time() - KEEP_UNUSED_DAYS * 86400
    for path in folder.glob("*.*"):
        with contextlib.suppress(FileNotFoundError):  # another process may do the same
            if path.stat().st_mtime < oldest:
                path.unlink()
    return folder


# --- running --------------------------------------------------------------------------------------


class Runner:
    """The process that runs kernels; started at need, and again after a report ended it."""

    TIMEOUT = 120  # seconds of one launch

    def __init__(self):
        self._process = None
        self._lock = threading.Lock()

    def run(self, built, grid, threads, record, seed, one_value=False):
        """Run one launch to its end; returns the module's fault record, cleared there.
        ``one_value``: all that it writes is alike, and a byte may be written by several threads."""
        with self._lock:
            if self._process is None:
                self._start()
            storages = [(s.ptr, s.nbytes) for s in memory().storages()]
            path = os.fsencode(built.path)
            request = struct.pack(
                "<10IQ", len(path), len(storages), len(built.shared), len(record),
                *grid, threads, self.TIMEOUT, one_value, seed,
            )  # fmt: skip
            pairs = [number for pair in (*storages, *built.shared) for number in pair[:2]]
            fault = modules.FaultRecord()
            with contextlib.suppress(BrokenPipeError):  # it died; the report says why
                self._process.stdin.write(
                    request + path + struct.pack(f"<{len(pairs)}Q", *pairs) + record
                )
                self._process.stdin.flush()
            if self._process.stdout.readinto(fault) != ctypes.sizeof(fault):
                raise EmulationError(self.stop(built.path))
            return fault

    def _start(self):
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [str(n) for n in (build_runner(), memory().fd, Memory.BASE, Memory.SIZE)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            pass_fds=(memory().fd,), env={**os.environ, **SANITIZER_OPTIONS},
        )  # fmt: skip
        atexit.register(self.stop)

    def stop(self, path=None):
        """End the process; returns what it reported of the kernel in ``path``."""
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        process.communicate()
        self._stderr.seek(0)
        report = self._stderr.read().decode(errors="replace")
        self._stderr.close()
        if process.returncode == -signal.SIGALRM:
            return f"the launch did not end within {self.TIMEOUT} s"
        if process.returncode == -signal.SIGILL:
            raise UndefinedError("undefined behaviour, which was not met when run again")
        return _readable(report, path) or f"the process ended with status {process.returncode}"


_runner = Runner()


def _readable(report, path):
    """A report with the lines of source for the addresses in ``path``."""
    offsets = re.findall(r"^at (0x[0-9a-f]+)$", report, re.M)
    if offsets:
        functions = _run("addr2line", "-Cfipe", path, *offsets)
        report = re.sub(r"^at .*\n", "", report, flags=re.M) + functions
    report = report.replace("(anonymous namespace)::", "")
    noise = (".runner+0x", "libc.so", "libubsan", " entry:")
    lines = [line for line in report.splitlines() if not any(word in line for word in noise)]
    return "\n".join(lines).strip()


def _where(report, kernel, built, record):
    """What is at the address that a report tells of, in the caller's words."""
    names = [f"__shared__ {name}" for *_, name in built.shared]
    names += ["the fault record", "the kernel's parameters"]
    for byte, number in re.findall(r"byte (-?\d+) of variable (\d+)", report):
        yield f"That is byte {byte} of {names[int(number)]}."
    found = re.search(r"address (0x[0-9a-f]+)", report)
    at = int(found[1], 16) if found else 0
    for storage in memory().storages():
        byte = at - storage.ptr
        if -Memory.PAGE < byte < storage.nbytes + Memory.PAGE:
            fields = ", ".join(_fields_that_point_to(storage, kernel, record))
            yield (
                f"That is byte {byte} of a storage of {storage.nbytes} bytes, to which points: "
                f"{fields or 'no parameter'}."
            )


def _fields_that_point_to(storage, kernel, record):
    fields = kernel.params._call + kernel.params._constant + kernel.params._tail
    for field in fields:
        numbers = struct.unpack_from("<" + field.letters, record, field.offset)
        for index, number in enumerate(numbers):
            if field.letters[index] == "Q" and storage.holds(number, 1):
                yield field.name + (f"[{index}]" if len(numbers) > 1 else "")


class Done:
    """What `driver.Event` is, for a device whose work is done when enqueueing returns."""

    def move(self, stream):
        """It stays done."""

    def done(self):
        return True

    def hold(self, stream):
        """Nothing is left to wait for."""


class EmulatedDriver:
    """What `driver.CudaDriver` is, for the emulated device.

    Parameters
    ----------
    seed : int
        Decides the order in which a block's threads run.
    processors : int
        How many there are. Few items are spread over all of them: with many, small tests have
        thread blocks of one warp.
    warpgroups : bool
        Whether it has products of warpgroups.
    """

    def __init__(self, seed=0, processors=132, warpgroups=False):
        self.seed, self.count, self.warpgroups = seed, processors, warpgroups
        self.pinned = []  # storages that count as host memory
        self._faults = {}

    def load(self, kernel, device, stream):
        return kernel, build(kernel)

    def launch(self, loaded, grid, threads, stream, record):
        kernel, built = loaded
        self.seed += 1
        one_value = any(name in kernel.expression for name in ONE_VALUE)
        launched = grid, threads, record.buffer.raw, self.seed, one_value
        try:
            try:
                fault = _runner.run(built, *launched)
            except UndefinedError:
                _runner.run(build(kernel, BY_REPORT), *launched)
                raise
        except EmulationError as error:
            lines = (
                f"{kernel!r}, grid {grid}, {threads} threads, seed {self.seed}:",
                str(error),
                *_where(str(error), kernel, built, record.buffer.raw),
            )
            raise EmulationError("\n".join(lines)) from None
        if fault.taken:
            self._faults.setdefault(kernel.key, fault.fault(kernel, "cuda:0"))

    def prepare(self, loaded, grid, threads):
        """Nothing quicker than `launch`."""
        del loaded, grid, threads
        return self._refuse, NotImplementedError

    def _refuse(self, *arguments):
        raise NotImplementedError(arguments)

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def on_device(self, device):
        return contextlib.nullcontext(device)

    def processors(self, device):
        return self.count

    def has_clusters(self, device):
        return False

    def has_warpgroups(self, device):
        return self.warpgroups

    def shared_memory(self, device):
        return 227 << 10

    def current_stream(self, device):
        return 0

    def device_at(self, address):
        return 0

    def capturing(self, stream, device):
        return False

    def event(self, stream, device):
        return Done()

    def order(self, before, after, device):
        """All that came before is done."""

    def copy(self, destination, source, size, stream, device):
        """What the copy engines do."""
        for at in (destination, source):
            if memory().contains(at) and not any(s.holds(at, size) for s in memory().storages()):
                raise EmulationError(f"a copy of {size} bytes at {at:#x} leaves its storage")
        ctypes.memmove(destination, source, size)

    @contextlib.contextmanager
    def staging(self, size, stream, device):
        storage = memory().allocate(size)
        yield storage.ptr

    scratch = staging

    def allocation(self, address):
        for storage in memory().storages():
            if storage.holds(address, 1):
                device = devices.CPU if storage in self.pinned else devices.Device("cuda", 0)
                return allocations.Allocation(storage.ptr, storage.ptr + storage.nbytes, device, 0)
        return None

    def take_faults(self, device=None, stream=None):
        faults, self._faults = self._faults, {}
        return faults.values()


class EmulatedWorld(worlds.World):
    """Arrays on the emulated device. While it is open, kernels run there."""

    name = "emulated"
    on_gpu = True

    def __init__(self, seed=0, processors=132, warpgroups=False):
        super().__init__()
        self.driver = EmulatedDriver(seed, processors, warpgroups)
        self._replaced = driver.active
        self._use(self.driver)

    def close(self):
        self._use(self._replaced)

    def _use(self, used):
        driver.active = used
        # What is remembered by a GPU's index alone.
        launch.processors.cache_clear()
        dispatch.forget_everything()

    def upload(self, raw):
        storage = memory().allocate(raw.size)
        storage.bytes[:] = raw
        return storage

    def host_storage(self, nbytes, pinned):
        if not pinned:
            return super().host_storage(nbytes, pinned)
        storage = memory().allocate(nbytes)
        self.driver.pinned.append(storage)  # its NumPy array does not keep it alive
        return storage.bytes

    def array(self, storage, spec):
        return EmulatedArray(storage, spec.offset, spec.shape, spec.strides, spec.dtype)

    def download(self, storage):
        return storage.bytes.copy()

    def numpy(self, result):
        return result.numpy()
