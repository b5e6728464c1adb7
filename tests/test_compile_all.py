# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Every shipped instantiation as machine code, made and read without a GPU."""

import concurrent.futures
import functools
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess

import pytest

from cupy_cache import attention, errors, formats, modules, params
from cupy_cache.warmup import specialisations

pytest.importorskip("cupy")

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
COMPLETE = 90  # the architecture for which the whole list is compiled
# heads, head size, block size, dtype
SHAPES = tuple(
    (*shape, block_size, dtype)
    for shape, block_size, dtype in itertools.product(
        ((8, 128), (1, 128), (32, 64), (4, 256), (64, 128), (128, 256)),
        (1, 16, 64, 256),
        ("bfloat16", "float32"),
    )
)
THINNED = ((8, 128, 16, "bfloat16"), (128, 256, 1, "float32"))
NOT_READ = "THE MACHINE CODE WAS NOT READ: the wheel nvidia-cuda-cuobjdump is not installed"
TOGETHER = 40  # kernels of one source that are compiled and read at a time


def shipped(shapes):
    """The kernels that `warmup` loads for ``shapes``, in lists of one source each."""
    kernels = {}
    every = {"layouts": formats.LAYOUTS, "index_dtypes": formats.INDEX_NAMES}
    for shape in shapes:
        for kernel in specialisations(*shape, **every):
            kernels.setdefault((kernel.stem, kernel.converts), {})[kernel.key] = kernel
    for group in kernels.values():
        group = list(group.values())
        for start in range(0, len(group), TOGETHER):
            yield group[start : start + TOGETHER]


# --- reading --------------------------------------------------------------------------------------


@functools.cache
def cuobjdump():
    """The tool that reads machine code, from its wheel; None where that is not installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((f.locate() for f in files if f.stem == "cuobjdump"), None)


def read(cubin, folder):
    """{mangled name: (resources as {name: number}, instructions as text)} of a cubin's kernels."""
    path = folder / "kernels.cubin"
    path.write_bytes(cubin)
    done = subprocess.run(
        [cuobjdump(), "-res-usage", "-sass", path], capture_output=True, text=True, check=True
    )
    path.unlink()
    usage, code = done.stdout.split("code for sm_", 1)
    resources = {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\S+):\s*\n(.*)", usage)
    }
    functions = code.split("Function : ")[1:]
    instructions = {text.split(None, 1)[0]: text for text in functions}
    return {name: (resources[name], instructions[name]) for name in resources}


@functools.cache
def parameter_names(stem):
    """The template parameters of the kernel called like its file."""
    text = modules.expanded_source(stem)
    found = re.search(rf"template <([^<>]*)>\s*__global__[^;{{]*?\b{stem}\(", text)
    return [item.split()[-1] for item in found[1].split(",")]


def vector_widths(kernel):
    """The values of a kernel's template parameters that are widths of vectors in bytes."""
    arguments = re.search(r"<(.*)>", kernel.expression)[1].split(", ")
    names = parameter_names(kernel.stem)
    assert len(names) == len(arguments)
    return [int(value) for name, value in zip(names, arguments) if name.endswith("Vec")]


def objections(kernel, resources, instructions):
    """What is wrong with a kernel's machine code."""
    for name in ("STACK", "LOCAL"):
        if resources[name]:
            yield f"{resources[name]} bytes of {name}"
    if re.search(r"\b(LDL|STL)\b", instructions):
        yield "local memory is accessed"
    if 16 in vector_widths(kernel):
        for mnemonic, what in (("LDG", "loads"), ("STG", "stores")):
            if not re.search(rf"\b{mnemonic}\S*\.128\b", instructions):
                yield f"no 16-byte {what}"


def check(kernels, architecture, folder):
    """Compile kernels of one source and read them; returns (how many, a list of objections)."""
    cubin, names = modules.compile_cubins(kernels, architecture)
    assert cubin[:4] == b"\x7fELF"
    if cuobjdump() is None:
        return len(kernels), []
    found = read(cubin, folder)
    return len(kernels), [
        f"{kernel!r} for sm_{architecture}: {objection}"
        for kernel in kernels
        for objection in objections(kernel, *found[names[kernel.expression]])
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instantiation(architecture, tmp_path):
    """Compiles, uses neither stack nor local memory, and moves 16 bytes where it says so."""
    groups = list(shipped(SHAPES if architecture == COMPLETE else THINNED))
    folders = [tmp_path / str(number) for number in range(len(groups))]
    for folder in folders:
        folder.mkdir()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(check, groups, itertools.repeat(architecture), folders))
    print(f"sm_{architecture}: {sum(count for count, _ in done)} kernels")
    wrong = [objection for _, found in done for objection in found]
    assert not wrong, "\n".join(wrong)
    if cuobjdump() is None:
        pytest.skip(NOT_READ)


def test_every_source_is_among_them():
    stems = {path.stem for path in modules.kernel_dir().glob("*.cu")}
    assert stems == {group[0].stem for group in shipped(THINNED)}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the kernel folder, in use."""
    folder = tmp_path / "kernels_cu"
    shutil.copytree(modules.kernel_dir(), folder)
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", str(folder))
    return folder


# A kernel that indexes an array of its own, and one that moves single bytes.
BAD = """
#include "cupy_cache/ints.cuh"
namespace cupy_cache {
struct Params {
  char* out;
  i64 count;
};
template <int kVec, bool kBytes>
__global__ void bad(const __grid_constant__ Params p) {
  if constexpr (kBytes) {
    p.out[threadIdx.x] = p.out[threadIdx.x + p.count];
  } else {
    uint4* const all = reinterpret_cast<uint4*>(p.out);
    uint4 held[8];
    for (int i = 0; i < 8; ++i) held[(i * p.count) & 7] = all[i];
    all[8] = held[threadIdx.x & 7];
  }
}
}  // namespace cupy_cache
"""


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("16, true", ["no 16-byte loads", "no 16-byte stores"]),
        ("1, true", []),
        ("16, false", ["128 bytes of STACK", "local memory is accessed"]),
    ],
)
def test_reading_sees_what_is_wrong(sources, tmp_path, arguments, expected):
    if cuobjdump() is None:
        pytest.skip(NOT_READ)
    (sources / "bad.cu").write_text(BAD)
    struct = params.Struct("out:ptr count:i64")
    kernel = modules.Kernel("bad", "bad", f"bad<{arguments}>", struct)
    parameter_names.cache_clear()
    _, found = check([kernel], COMPLETE, tmp_path)
    assert [objection.partition(": ")[2] for objection in found] == expected


# --- sources --------------------------------------------------------------------------------------


@pytest.fixture
def kernel():
    (kernel,) = specialisations(8, 128, 16, ops=["reshape_and_cache_flash"])
    return kernel


@pytest.mark.parametrize("name", ("vec.cuh", "ints.cuh"))  # included, and by an include
def test_editing_a_header_changes_the_source(sources, kernel, name):
    before = kernel.source()
    assert kernel.source() == before
    header = sources / "include" / "cupy_cache" / name
    header.write_text(header.read_text() + "// edited\n")
    os.utime(header, ns=(1, 1))  # a clock may be too coarse to tell two edits apart
    assert kernel.source() != before
    assert "// edited" in kernel.source()


def test_sources_name_no_folder(sources, kernel):
    """CuPy's cache key covers the text: a moved installation must find its kernels again."""
    assert str(sources) not in kernel.source()


def test_each_header_is_expanded_once(kernel):
    assert kernel.source().count('#line 1 "kernels_cu/include/cupy_cache/ints.cuh"') == 1
    assert '#include "cupy_cache/' not in kernel.source()


@pytest.mark.parametrize(
    "file, after",
    [
        ("reshape_and_cache_flash.cu", "namespace cupy_cache {"),
        ("reshape_and_cache_flash.cu", "  if (token >= p.tokens) return;"),
        ("include/cupy_cache/vec.cuh", "namespace cupy_cache {"),
    ],
)
def test_an_error_names_file_and_line(sources, kernel, file, after):
    path = sources / file
    lines = path.read_text().splitlines()
    line = lines.index(after) + 1
    lines.insert(line, "no_such_name x;")
    path.write_text("\n".join(lines))
    with pytest.raises(errors.KernelError) as caught:
        modules.compile_cubin(kernel, COMPLETE)
    assert re.search(rf"kernels_cu/{re.escape(file)}[(:]{line + 1}\b", str(caught.value))
    assert "no_such_name" in str(caught.value)


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ("out:ptr count:i64 stride:i64 first:i64 power:i64 step:f64", "offset of .*stride"),
        ("out:ptr stride:i64 count:i64 first:i64 step:f64", "size of"),
        ("out:ptr stride:i64 count:i64 first:i64 power:i64 step:f64 more:i32", "size of"),
    ],
)
def test_a_struct_that_differs_stops_the_compile(fields, complaint):
    expression = attention.ALIBI.expression.removeprefix("cupy_cache::")
    wrong = modules.Kernel("alibi_slopes", "alibi_slopes", expression, params.Struct(fields))
    with pytest.raises(errors.KernelError, match=complaint):
        modules.compile_cubin(wrong, COMPLETE)


def test_an_architecture_that_nvrtc_does_not_know(kernel):
    with pytest.raises(errors.KernelError, match="sm_999"):
        modules.compile_cubin(kernel, 999)
