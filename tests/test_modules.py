# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a source and a loaded kernel has a name and a way out. It is decided by
what failed and how, never by words in a message, which may be names of folders."""

import contextlib
import os
import subprocess
import sys
import threading
import types

import machine_code
import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.attention import alibi_slopes as attention
from cupy_cache.runtime import allocations, arrays, cuda, driver, launch, modules

pytestmark = pytest.mark.whole
KERNEL = attention.ALIBI
# What each kind of error may quote: words that other kinds are about.
EVERYTHING = (
    "/research/arch invalid/libnvrtc.so/gpu-architecture/CUDA headers/capture/INVALID_CONTEXT"
)


class FakeModule:
    def __init__(self, error):
        self.error = error

    def get_function(self, expression):
        raise self.error


class Device:
    """As CuPy's: what it is asked at first, it asks on its GPU."""

    def __init__(self, cupy):
        self._cupy = cupy

    @property
    def compute_capability(self):
        self._cupy.asked.append(threading.get_ident())
        return self._cupy.capability


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy of a GPU of capability 9.0, an NVRTC and a driver, whose loading fails as told."""
    real = pytest.importorskip("cupy")
    from cupy_backends.cuda.libs import nvrtc

    made = types.SimpleNamespace(
        __version__="14.2.0",
        capability="90",
        asked=[],  # by which threads
        error=None,
        cuda=types.SimpleNamespace(
            Device=lambda index: Device(made),
            runtime=types.SimpleNamespace(is_hip=False),
        ),
        RawModule=lambda **options: FakeModule(made.error),
        architectures=(75, 80, 90, 100),
        nvrtc_version=(12, 4),
        nvrtc=nvrtc,
        real=real,
    )
    monkeypatch.setitem(sys.modules, "cupy", made)
    monkeypatch.setattr(cuda, "_cupy", made)
    monkeypatch.setattr(cuda, "on_device", contextlib.nullcontext)
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 4))
    monkeypatch.setattr(modules, "_loaded", {})
    monkeypatch.setattr(nvrtc, "getSupportedArchs", lambda: made.architectures)
    monkeypatch.setattr(nvrtc, "getVersion", lambda: made.nvrtc_version)
    modules._capability.cache_clear()
    yield made
    modules._capability.cache_clear()


def test_no_thread_that_loads_a_kernel_asks_for_the_capability(cupy):
    """Without a context it would keep the GPU that CuPy sets for that."""
    cupy.error = RuntimeError("far enough")
    for _ in range(2):
        with pytest.raises(cc.KernelError):
            modules.load(KERNEL, 1)
    assert len(cupy.asked) == 1 and threading.get_ident() not in cupy.asked


def refused(status, text):
    """The driver's error of this code, without a driver that would name it."""
    from cupy_backends.cuda.api.driver import CUDADriverError

    class Refused(CUDADriverError):
        def __init__(self):
            self.status = status

        def __str__(self):
            return text

    return Refused()


def failure(cupy, error):
    """What loading a kernel raises where CuPy raises ``error``."""
    cupy.error = error
    with pytest.raises(cc.CupyCacheError) as caught:
        modules.load(KERNEL, 1)
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith("alibi_slopes on cuda:1: ")
    return caught.value


@pytest.mark.parametrize("kind", [OSError, PermissionError, FileNotFoundError, NotADirectoryError])
def test_a_kernel_cache_that_cannot_be_used(cupy, monkeypatch, kind):
    monkeypatch.setenv("CUPY_CACHE_DIR", "/the/folder")
    named = failure(cupy, kind(28, "No space left on device", EVERYTHING))
    assert type(named) is cc.KernelError
    for word in ("No space left on device", EVERYTHING, "/the/folder", "CUPY_CACHE_DIR"):
        assert word in str(named)
    assert "pip" not in str(named)


@pytest.mark.parametrize("error, kind, words", [
    (OSError(24, "Too many open files"), cc.KernelError, "kept or found: OSError: "),
    (OSError("libnvrtc.so.12: cannot open"), cc.MissingDependencyError, "pip install"),
])  # fmt: skip
def test_what_no_other_folder_mends(cupy, error, kind, words):
    """A library that cannot be loaded, and files of which too many are open."""
    named = failure(cupy, error)
    assert type(named) is kind and words in str(named) and "CUPY_CACHE_DIR" not in str(named)


def test_a_source_that_does_not_compile(cupy):
    from cupy.cuda.compiler import CompileException

    named = failure(cupy, CompileException(f"kernels_cu/vec.cuh(7): {EVERYTHING}", "", "", ()))
    assert type(named) is cc.KernelError and "vec.cuh(7)" in str(named)


def test_an_nvrtc_without_its_second_library(cupy):
    """CuPy tells it as an error of the source."""
    from cupy.cuda.compiler import CompileException

    error = CompileException("failed to open libnvrtc-builtins.so.12.4.", "", "", ())
    error.__context__ = refused(7, "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE")
    named = failure(cupy, error)
    assert type(named) is cc.MissingDependencyError and "libnvrtc-builtins" in str(named)
    assert str(named).endswith("--force-reinstall --no-deps nvidia-cuda-nvrtc-cu12")


@pytest.mark.parametrize(
    "status, kind, word",
    [
        (209, cc.UnsupportedArchitectureError, "driver is too old"),
        (222, cc.UnsupportedArchitectureError, "driver is too old"),
        (200, cc.KernelError, "damaged"),
        (2, cc.KernelError, "OUT_OF_MEMORY"),
        (700, cc.KernelError, "ILLEGAL_ADDRESS"),
    ],
)
def test_what_the_driver_says_goes_by_its_code(cupy, status, kind, word):
    named = failure(cupy, refused(status, f"CUDA_ERROR_{word}"))
    assert type(named) is kind and word in str(named)


def test_missing_headers(cupy, monkeypatch):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    error = RuntimeError("Failed to find them")
    assert type(failure(cupy, error)) is cc.KernelError  # they are there
    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda name: None)
    named = failure(cupy, error)
    assert isinstance(named, cc.MissingDependencyError) and "headers" in str(named)
    assert "pip install -U 'cupy-cache[cuda12x]'" in str(named)


@pytest.mark.parametrize("error", [RuntimeError(EVERYTHING), OSError("torn"), ImportError("none")])
def test_an_nvrtc_that_cannot_be_loaded(cupy, monkeypatch, error):
    def torn():
        raise error

    monkeypatch.setattr(cupy.nvrtc, "getSupportedArchs", torn)
    with pytest.raises(cc.MissingDependencyError, match="NVRTC could not be loaded") as caught:
        modules.load(KERNEL, 1)
    assert "pip install -U 'cupy-cache[cuda12x]'" in str(caught.value)


@pytest.mark.parametrize(
    "capability, word",
    [("120", "a newer one"), ("70", "an older one"), ("110", "a newer one"), ("87", "a newer one")],
)
def test_an_architecture_that_nvrtc_does_not_know(cupy, capability, word):
    """Compared before compiling: CuPy asks for the newest that it knows instead, and the driver
    refuses the code."""
    cupy.capability = capability
    with pytest.raises(cc.UnsupportedArchitectureError) as caught:
        modules.load(KERNEL, 1)
    number = f"{capability[:-1]}.{capability[-1]}"
    for part in ("alibi_slopes on cuda:1", number, "sm_75, 80, 90, 100", word):
        assert part in str(caught.value)


@pytest.mark.parametrize("major, package", [(12, "nvidia-cuda-nvrtc-cu12 "), (13, "nvrtc ")])
def test_a_newer_nvrtc_is_for_the_same_cuda(cupy, major, package):
    """Each major version of CUDA has a package of its own, and CuPy is for one."""
    cupy.capability, cupy.nvrtc_version = "120", (major, 1)
    with pytest.raises(cc.UnsupportedArchitectureError, match=f"pip install -U [a-z-]*{package}"):
        modules.load(KERNEL, 1)


@pytest.mark.parametrize("capability", ["75", "80", "90", "100", "103"])
def test_an_architecture_that_nvrtc_serves(cupy, capability):
    """The newest that it knows runs on GPUs of the same first digits."""
    cupy.capability = capability
    assert isinstance(failure(cupy, ValueError("got there")), cc.KernelError)


@pytest.mark.parametrize("seconds, told", [(0.1, False), (2.4, True)])
def test_a_call_that_waits_for_a_compiler_says_so(cupy, monkeypatch, caplog, seconds, told):
    cupy.RawModule = lambda **options: types.SimpleNamespace(
        get_function=lambda expression: types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=1))
    )
    clock = iter((5.0, 5.0 + seconds))
    monkeypatch.setattr(modules, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level("INFO", "cupy_cache"):
        modules.load(KERNEL, 1)
    assert ["waited 2.4 s" in message for message in caplog.messages] == [True] * told
    assert all("warmup()" in message for message in caplog.messages)


def test_the_architectures_are_nvrtcs_own():
    """Those that it refuses are those that it does not name."""
    pytest.importorskip("cupy")
    known = modules._nvrtc_architectures("test")
    assert {75, 90} <= set(known) and 999 not in known
    with pytest.raises(cc.KernelError, match="sm_999"):
        machine_code.compile_cubin(KERNEL, 999)


def test_no_kernel_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", str(tmp_path))
    with pytest.raises(cc.KernelError, match="CUPYCACHE_KERNEL_DIR"):
        modules.kernel_dir()
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", "x" * 5000)  # no folder can be asked for
    with pytest.raises(cc.KernelError, match="OSError: .*; reinstall cupy-cache, or name"):
        modules.expanded_source("alibi_slopes")


def test_a_kernel_source_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "include" / "cupy_cache").mkdir(parents=True)
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", str(tmp_path))
    with pytest.raises(cc.KernelError, match="alibi_slopes: its source could not be read"):
        modules.expanded_source("alibi_slopes")
    (tmp_path / "alibi_slopes.cu").write_bytes(b"\xff")  # no text
    with pytest.raises(cc.KernelError, match="could not be read: UnicodeDecodeError"):
        modules.expanded_source("alibi_slopes")


@pytest.mark.parametrize(
    "size, all_shared, asked",
    [
        (0, False, {}),
        (70_000, False, {"max_dynamic_shared_size_bytes": 70_000}),
        (
            30_000,
            True,
            {"max_dynamic_shared_size_bytes": 30_000, "preferred_shared_memory_carveout": 100},
        ),
    ],
)
def test_room_for_shared_memory_is_asked_for(cupy, size, all_shared, asked):
    function = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=1))
    cupy.RawModule = lambda **options: types.SimpleNamespace(
        get_function=lambda expression: function
    )
    kernel = modules.Kernel(
        KERNEL.op, KERNEL.stem, KERNEL.expression, KERNEL.params, shared_bytes=size,
        all_shared=all_shared,
    )  # fmt: skip
    assert modules.load(kernel, 0).function is function
    assert vars(function) == {"kernel": function.kernel, **asked}


def test_an_old_cupy_is_refused(cupy):
    cupy.__version__ = "14.1.3"
    with pytest.raises(cc.MissingDependencyError, match=r"14\.2.*14\.1\.3"):
        modules.load(KERNEL, 1)
    modules._require_cupy_version("test", types.SimpleNamespace(__version__="15.0.0a1"))


# --- the current GPU ------------------------------------------------------------------------------


class GPUs:
    """CUDA of two GPUs, for one thread: which have a context, and which one is current."""

    def __init__(self):
        self.with_context, self.stack = set(), []

    def current(self):
        return self.getDevice, lambda: self.stack[-1] + 1 if self.stack else 0, self.setDevice

    def getDevice(self):
        return self.stack[-1] if self.stack else 0

    def setDevice(self, index):
        self.with_context.add(index)
        self.stack[-1:] = [index]

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        self.with_context.add(device.value)
        context._obj.value = device.value + 1
        return 0

    def cuCtxPushCurrent_v2(self, context):
        self.stack.append(context.value - 1)
        return 0

    def cuCtxPopCurrent_v2(self, context):
        context._obj.value = self.stack.pop() + 1
        return 0

    def cuDevicePrimaryCtxGetState(self, device, flags, active):
        active._obj.value = device.value in self.with_context
        return 0

    def use(self):
        """What most calls of CUDA's runtime do first."""
        if not self.stack:
            self.setDevice(0)


@pytest.fixture
def gpus(monkeypatch):
    made = GPUs()
    monkeypatch.setattr(cuda, "_current", lambda *asked: made.current())
    monkeypatch.setattr(cuda, "library", lambda: made)
    cuda._primary_context.cache_clear()
    yield made
    cuda._primary_context.cache_clear()


@pytest.mark.parametrize("before, wanted", [([], 0), ([], 1), ([1], 1), ([1], 0), ([0], 1)])
def test_no_gpu_gets_a_context_that_nobody_asked_for(gpus, before, wanted):
    """In a thread that has used no GPU, or one, which stays the current one."""
    gpus.stack[:], gpus.with_context = before, set(before)
    for _ in range(2):
        with cuda.on_device(wanted):
            assert gpus.getDevice() == wanted and wanted in gpus.with_context
    assert gpus.with_context == {*before, wanted}
    assert gpus.stack == (before or ([0] if wanted == 0 else []))


@pytest.mark.parametrize("before", [[], [1]])
@pytest.mark.parametrize("make", [
    lambda: allocations.pinned(5), lambda: allocations.pinned_zeros((5,), np.dtype(np.uint8)),
])  # fmt: skip
def test_pinned_memory_leaves_no_context(gpus, monkeypatch, make, before):
    """It is all GPUs': one that is in use is asked for it, in a thread that has used none too."""
    gpus.stack[:], gpus.with_context = before, {1}
    freed = []

    class PinnedMemory:
        def __init__(self, size):
            gpus.use()
            self.memory = bytearray(size)

        def __del__(self):
            gpus.use()
            freed.append(gpus.getDevice())

    fake = types.SimpleNamespace(
        PinnedMemory=PinnedMemory,
        PinnedMemoryPointer=lambda memory, offset: memory.memory,
        alloc_pinned_memory=lambda size: PinnedMemory(size).memory,
        runtime=types.SimpleNamespace(getDeviceCount=lambda: 2),
    )
    monkeypatch.setattr(cuda, "import_cupy", lambda why: types.SimpleNamespace(cuda=fake))
    assert make().shape == (5,)
    assert gpus.with_context == {1} and gpus.stack == before and freed == [1]


def test_a_guard_is_left_where_what_is_in_it_fails(gpus):
    with pytest.raises(KeyError), cuda.on_device(1):
        raise KeyError
    assert gpus.stack == [] and gpus.with_context == {1}


# --- launching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, words", [(3, "spawn"), (400, "reset"), (709, "reset"), (1, "")])
def test_a_launch_that_the_driver_refuses(status, words):
    """By the code: a process that was forked, a device that was reset."""
    pytest.importorskip("cupy")
    error = refused(status, "CUDA_ERROR_INVALID_CONTEXT")  # what the code does not say

    def launch(*arguments):
        raise error

    made = driver.CudaDriver()
    made._launch, made._several, made._driver_error = launch, False, type(error)
    loaded = types.SimpleNamespace(kernel=KERNEL, device=1, handle=0)
    with pytest.raises(cc.KernelError) as caught:
        made.launch(loaded, (1, 1, 1), 32, 0, types.SimpleNamespace(address=0))
    assert str(caught.value).startswith("alibi_slopes on cuda:1: ") and words in str(caught.value)


# --- importing CuPy -------------------------------------------------------------------------------

ON_THE_CPU = """
import sys
import numpy as np
import cupy_cache as cc

assert cc.alibi_slopes(8).tolist() == [2.0 ** -n for n in range(1, 9)]
assert cc.place_slopes([0.25, 3.0]).tolist() == [0.25, 3.0]
a, b = np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
cc.swap_blocks_batch(*np.array([[a.ctypes.data], [b.ctypes.data + 2], [4]]))
assert b.tolist() == [0, 0, 0, 1, 2, 3, 0, 0]
key, cache = np.ones((1, 1, 4), np.float32), np.zeros((1, 2, 1, 4), np.float32)
cc.reshape_and_cache_flash(key, key, cache, cache.copy(), np.array([1]))
assert cache.sum() == 4
cc.raise_faults()
try:
    cc.alibi_slopes(8, device="cuda")
except cc.MissingDependencyError as error:
    print(error)
"""


def run_with(cupy, tmp_path, code=ON_THE_CPU, **variables):
    """Run ``code`` where importing CuPy runs the text ``cupy``; its output."""
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "cupy.py").write_text(cupy)
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "raised, words",
    [
        ("PermissionError(13, 'Permission denied', '/home/.cupy')", ("Permission", "CUPY_CACHE_D")),
        ("OSError(30, 'Read-only file system')", ("Read-only", "CUPY_CACHE_DIR")),
        ("ImportError('libtorn.so: cannot open')", ("libtorn.so", "pip install -U 'cupy-cache[")),
        ("OSError('libtorn.so: cannot open')", ("libtorn.so", "pip install -U 'cupy-cache[")),
        ("ModuleNotFoundError('No cupy', name='cupy')", ("not installed", "pip install")),
        ("RuntimeError('half updated')", ("half updated",)),
        ("AttributeError('half updated')", ("half updated",)),
    ],
)
def test_the_cpu_needs_no_cupy(tmp_path, raised, words):
    """Whatever importing it raises; for a GPU that is told."""
    told = run_with(f"raise {raised}", tmp_path)
    for word in words:
        assert word in told


def test_the_cpu_needs_no_folder_for_cupys_kernels(tmp_path):
    """The real CuPy, whose import fails where it cannot make one."""
    pytest.importorskip("cupy")
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_CPU],
        env={**os.environ, "CUPY_CACHE_DIR": str(tmp_path / "file" / "folder")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "NotADirectoryError" in done.stdout and "CUPY_CACHE_DIR" in done.stdout


def test_the_cpu_does_not_care_for_a_folder_called_cupy(tmp_path):
    """It counts as a module: CuPy's sources, say, beside the program."""
    (tmp_path / "cupy").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
         "class Away:\n"
         "    def find_spec(name, path=None, target=None):\n"
         "        if name == 'cupy':\n"
         "            import importlib.machinery as m\n"
         "            return m.PathFinder.find_spec(name, [sys.path[0]])\n"
         f"sys.meta_path.insert(0, Away)\n{ON_THE_CPU}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "cupy") in done.stdout


ROCM = "import types\ncuda = types.SimpleNamespace(runtime=types.SimpleNamespace(is_hip={}))\n"


def test_rocm_is_not_told_to_install_cuda(tmp_path):
    told = run_with(ROCM.format(True), tmp_path)
    assert "CuPy is built for ROCm" in told and "pip" not in told


def test_torch_for_rocm_is_not_told_to_install_cuda(tmp_path):
    fake = (
        "import sys, types\n"
        "sys.modules['torch'] = types.SimpleNamespace(\n"
        "    version=types.SimpleNamespace(hip='7.0', cuda=None), Tensor=type('Tensor', (), {}))\n"
    )
    told = run_with("raise ImportError('none')", tmp_path, fake + ON_THE_CPU)
    assert "torch is built for ROCm" in told and "pip" not in told


class OfStatus(RuntimeError):
    """As CuPy raises it."""

    status = 35


@pytest.mark.parametrize(
    "status, hip, error, words",
    [
        (
            35,
            None,
            cc.MissingDependencyError,
            ("sufficient", "pip install -U 'cupy-cache[cuda12x]"),
        ),
        (100, None, cc.MissingDependencyError, ("CuPy cannot use CUDA here", "CUDA_VISIBLE_DEV")),
        (35, "7.0", cc.MissingDependencyError, ("torch is built for ROCm",)),
        (3, None, cc.KernelError, ("forked", "spawn")),
    ],
    ids=["old driver", "no GPU", "ROCm", "forked"],
)
def test_a_cupy_that_finds_no_cuda(monkeypatch, status, hip, error, words):
    """torch has arrays on a GPU, and CuPy is for a newer driver, or the GPU is not NVIDIA's."""
    torch = pytest.importorskip("torch")
    raised = OfStatus("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
    raised.status = status

    def count():
        raise raised

    runtime = types.SimpleNamespace(is_hip=False, getDeviceCount=count)
    found = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(cuda, "_cupy", None)
    monkeypatch.setattr(cuda, "_current", cuda._current.__wrapped__)  # a GPU may be known here
    monkeypatch.setattr(cuda, "driver_version", lambda: (12, 4))
    monkeypatch.setattr(torch.version, "hip", hip)
    with pytest.raises(error, match="^cuda:3: "):
        cuda.on_device(3)
    launch.processors.cache_clear()
    describe = arrays.describe

    def on_gpu(metadata, name):
        return describe(metadata, name)._replace(device=arrays.Device("cuda", 0))

    monkeypatch.setattr(arrays, "describe", on_gpu)
    monkeypatch.setattr(arrays, "LOWEST", 1)
    cache = torch.zeros(2, 4, 1, 8)
    with pytest.raises(error) as caught:
        cc.reshape_and_cache_flash(
            cache[0, :1], cache[0, :1], cache, cache.clone(), torch.zeros(1, dtype=torch.int64)
        )
    assert type(caught.value) is error and caught.value.__cause__ is raised
    assert str(caught.value).startswith("reshape_and_cache_flash on cuda:0: ")
    for word in words:
        assert word in str(caught.value)
    assert "pip" not in str(caught.value) or hip is None


@pytest.mark.parametrize("status, driver_is, words", [
    (35, None, "there is no NVIDIA driver here"), (100, (13, 0), "whether this container"),
    (802, (13, 0), ""), (None, (12, 2), "pip install -U 'cupy-cache[cuda12x]'"),
])  # fmt: skip
def test_the_way_to_cuda(monkeypatch, status, driver_is, words):
    """Another CuPy is no way out where the driver itself is not ready."""
    monkeypatch.setattr(cuda, "driver_version", lambda: driver_is)
    error = OfStatus("torn")
    error.status = status
    way_out = cuda._way_to_cuda(error)
    assert words in way_out and ("pip" in way_out) == (status is None)


def without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cuda, "_cupy", None)
    monkeypatch.setattr(cuda, "torchs_rocm", lambda: None)


@pytest.mark.parametrize("call, words", [
    (lambda: cc.warmup(2, 64, 16), "warmup: Invalid value of device: expected a GPU, got the CPU"),
    (lambda: cc.PagedKVCache.allocate(1, 2, 4, 1, 8, framework="cupy"), "allocate: .* of device: "),
    (lambda: cc.PagedKVCache.allocate(1, 2, 4, 1, 8, pinned=True), "allocate: .* of pinned: "),
    (lambda: cc.alibi_slopes(4, device="cuda"), "alibi_slopes: device 'cuda': "),
])  # fmt: skip
def test_without_cupy_the_command_is_told(monkeypatch, call, words):
    """With the operation and the argument, wherever a GPU is asked for."""
    without_cupy(monkeypatch)
    with pytest.raises(cc.CupyCacheError, match=f"{words}.*; pip install -U 'cupy-cache"):
        call()


@pytest.mark.parametrize("status, active", [(3, 0), (0, 0), (0, 1)])
def test_addresses_of_a_gpu_without_cupy(monkeypatch, status, active):
    """torch may use a GPU where there is no CuPy: its memory is none of the host's. The driver is
    not initialised to find out."""
    without_cupy(monkeypatch)

    class Driver:
        def cuDeviceGetCount(self, count):
            count._obj.value = 2
            return status

        def cuDeviceGet(self, device, index):
            device._obj.value = index
            return 0

        def cuDevicePrimaryCtxGetState(self, device, flags, found):
            found._obj.value = active and device.value
            return 0

    monkeypatch.setattr(cuda, "_driver_if_there", Driver)
    monkeypatch.setattr(cuda, "library", lambda: Driver() if not status else 1 / 0)
    a, b = np.arange(8, dtype=np.uint8), np.zeros(8, np.uint8)
    columns = np.array([[a.ctypes.data], [b.ctypes.data], [8]])
    if active:
        with pytest.raises(cc.MissingDependencyError, match="swap_blocks_batch: .* GPU.*; pip"):
            cc.swap_blocks_batch(*columns)
    else:
        cc.swap_blocks_batch(*columns)
    assert (a == b).all() != bool(active)


def test_a_gpu_of_rocm_is_told_as_one(monkeypatch):
    """Beside a CuPy that could use CUDA, if there were any."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(driver.active, "device_count", lambda: 0, raising=False)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for options in ({"framework": "torch"}, {"device": "cuda"}, {"device": torch.device("cuda:0")}):
        with pytest.raises(cc.DeviceError, match="cpu, since torch is built for ROCm, whose GPUs"):
            cc.PagedKVCache.allocate(1, 2, 4, 1, 8, **options)


def test_what_is_missing_is_told_of_the_argument(monkeypatch):
    def none():
        raise cc.MissingDependencyError("a CUDA device: CuPy is not installed; pip install it")

    monkeypatch.setattr(driver.active, "device_count", none, raising=False)
    with pytest.raises(cc.MissingDependencyError) as caught:
        cc.BlockTables(4, 2, max_sequences=1, max_tokens=2, max_length=4, device=2)
    expected = "BlockTables: device 2: CuPy is not installed; pip install it"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "version, extra",
    [(None, "cuda13x"), ((11, 8), "cuda12x"), ((12, 9), "cuda12x"), ((13, 0), "cuda13x"),
     ((14, 1), "cuda13x")],
)  # fmt: skip
def test_the_command_is_for_the_driver(monkeypatch, version, extra):
    monkeypatch.setattr(cuda, "driver_version", lambda: version)
    hint = cuda.install_hint()
    assert hint.startswith(f"pip install -U 'cupy-cache[{extra}]'")
    assert ("cuda12x" in hint) == (version is None or extra == "cuda12x")
