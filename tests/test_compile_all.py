# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Every shipped instantiation as machine code, made and read without a GPU."""

import functools
import itertools
import os
import re
import shutil
import zlib

import pytest
from machine_code import (
    CONVERTING,
    INDEXER_SHAPE,
    MLA_SHAPE,
    NOT_READ,
    ONE_SHAPE,
    compile_cubin,
    compile_cubins,
    cuobjdump,
    instructions,
    resources,
    template_parameters,
)

from cupy_cache import errors
from cupy_cache.attention import alibi_slopes as attention
from cupy_cache.compilation.calls import OPERATIONS
from cupy_cache.compilation.specialisations import specialisations
from cupy_cache.runtime import formats, modules, overlap, params

pytest.importorskip("cupy")

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
ONLY = {"paged_attention_mla_warpgroups": 90}
COMPLETE = 90  # the architecture for which the whole table is compiled; for the others one shape
# heads, head size, block size, dtype
SHAPES = tuple(
    (*shape, block_size, dtype)
    for shape, block_size, dtype in itertools.product(
        ((8, 128), (1, 128), (32, 64), (4, 256), (64, 128), (128, 256)),
        (1, 16, 64, 256),
        ("bfloat16", "float32"),
    )
)
# What packs, unpacks and zeroes comes in many kinds from one source, hardly depending on the shape.
# Attention takes a second a kernel.
FEW = [
    op
    for op in OPERATIONS
    if not op.startswith(("pack_tokens", "unpack_", "zero_", "paged_attention"))
]
PAIRS = [name for name in formats.LAYOUTS if name not in ("rows", "indexer")]
# The instructions are read for the plain copies of these alone, except of ordinary kernels on the
# complete architecture: starting the disassembler takes longer than compiling a dozen kernels.
READ_EVERYWHERE = ("copy_blocks", "reshape_and_cache_flash", "gather_cache")
# The vectors of these are of what is written, as where their width is called kStoreVec: they read
# less, or nothing.
READ_LESS = ("Dequantise", "Direction::kZero")
# Kernels that may spill, and so many bytes: those of attention for 64 rows, more where units are
# taken two at a time, and of latent attention over 8-bit entries, have no register left.
SPILLS = {
    r"::paged_attention(_clustered)?<\S+, \S+, 128, 128, 16, 16, 64, .* [18], false, ": 56,
    r"::paged_attention<\S+, \S+, 128, 128, 16, 16, 64, .* 1, true, ": 208,
    r"::paged_attention_mla<\S+, cupy_cache::(?:E4M3|E5M2|I8), 512, 64, ": 32,
}
WRITE_LESS = ("paged_attention",)  # its vectors are of what is read
TOGETHER = 64  # kernels of one source that are compiled and read at a time
STEMS = sorted(path.stem for path in modules.kernel_dir().glob("*.cu"))
# Template parameters whose values make kernels that have little in common.
KINDS = ("kRows", "kTall")


def chosen(architecture, extent="ordinary"):
    """Kernels that `warmup` loads: "few": for one shape; "ordinary": on the complete architecture
    for some; "every_shape": for all others."""
    if extent == "every_shape":
        for shape in SHAPES:
            if shape not in SHAPES[::16]:
                yield from specialisations(*shape, layouts=PAIRS, ops=FEW)
        return
    complete = architecture == COMPLETE and extent == "ordinary"
    if complete:
        for shape in SHAPES[::16]:
            yield from specialisations(*shape, layouts=PAIRS, ops=FEW)
        yield from specialisations(*ONE_SHAPE, layouts=PAIRS, index_dtypes=["int32", "int64"])
    yield from specialisations(*ONE_SHAPE, layouts=["HND", "x-packed"], ops=FEW)
    for name, heads in (("auto", 32), ("fp8", 32)):
        yield from specialisations(
            *ONE_SHAPE, layouts=["NHD"], kv_cache_dtype=name, num_heads=heads,
            ops=["paged_attention"],
        )  # fmt: skip
    # Products of bfloat16 are not for sm_75: so many without the instruction take a minute.
    for name in ("auto", "fp8", "fp8_ds_mla") if complete else ("auto",):
        yield from specialisations(
            *MLA_SHAPE[:3], "bfloat16" if complete else "float16", layouts=["rows"],
            head_size_v=512, kv_cache_dtype=name, ops=["paged_attention_mla"],
        )  # fmt: skip
    for name in ("fp8", "fp8_e5m2", "int8") if complete else ("fp8",):
        yield from specialisations(*ONE_SHAPE, layouts=PAIRS, kv_cache_dtype=name, ops=CONVERTING)
    for name in ("auto", "fp8", "int8", "fp8_ds_mla") if complete else ("fp8_ds_mla",):
        mla = {"layouts": ["rows"], "head_size_v": 512, "kv_cache_dtype": name}
        yield from specialisations(*MLA_SHAPE, **mla, ops=FEW)
    yield from specialisations(*INDEXER_SHAPE, layouts=["indexer"], ops=FEW)


@functools.cache
def shipped(architecture, extent="ordinary"):
    """{stem: the same, each once, in lists that are compiled together}. Of a few, one of each kind
    that a source makes: on each architecture another."""
    kernels = {}
    for kernel in chosen(architecture, extent):
        if not kernel.runs_on(architecture):
            continue
        kernels.setdefault((kernel.stem, kernel.converts), {})[kernel.key] = kernel
    found = {}
    for (stem, _), group in kernels.items():
        group = one_of_each(architecture, group) if extent == "few" else list(group.values())
        lists = [group[start : start + TOGETHER] for start in range(0, len(group), TOGETHER)]
        found.setdefault(stem, []).extend(lists)
    return found


def one_of_each(architecture, kernels):
    """One of the kernels of each kind, by chance, but always the same."""
    kinds = {}
    for key, kernel in kernels.items():
        values = arguments(kernel)
        place = zlib.crc32(f"{kernel.expression} {architecture}".encode())
        kind = template_parameters(kernel)[0], *(values.get(name) for name in KINDS)
        kinds[kind] = min(kinds.get(kind, (place, key)), (place, key))
    return [kernels[key] for _, key in kinds.values()]


# --- reading --------------------------------------------------------------------------------------


def arguments(kernel):
    """{name of a template parameter: its argument} of a kernel."""
    name, names = template_parameters(kernel)
    text = re.fullmatch(rf"cupy_cache::{name}<(.*)>", kernel.expression)[1]
    while "<" in text:  # commas inside an argument are no separators
        text = re.sub(r"<[^<>]*>", "", text)
    values = text.split(", ")
    assert len(names) == len(values)
    return dict(zip(names, values))


def vector_widths(kernel):
    """A kernel's template parameters that are widths of vectors in bytes, {name: value}."""
    return {name: int(value) for name, value in arguments(kernel).items() if name.endswith("Vec")}


def may_spill(kernel):
    """How many bytes."""
    return sum(most for kind, most in SPILLS.items() if re.search(kind, kernel.expression))


def used_too_much(kernel, numbers):
    """What is wrong with a kernel's resources."""
    for name in ("STACK", "LOCAL"):
        if numbers[name] > may_spill(kernel):
            yield f"{numbers[name]} bytes of {name}"


def moved_too_little(kernel, text):
    """What is wrong with a kernel's accesses to memory."""
    if not may_spill(kernel) and re.search(r"\b(LDL|STL)\b", text):
        yield "local memory is accessed"
    whole = {name for name, width in vector_widths(kernel).items() if width == 16}
    if not whole:
        return
    reads = not all(name.endswith("StoreVec") for name in whole)
    reads &= not any(word in kernel.expression for word in READ_LESS)
    writes = not any(word in kernel.expression for word in WRITE_LESS)
    for mnemonic, what in (("LDG", "loads"),) * reads + (("STG", "stores"),) * writes:
        if not re.search(rf"\b{mnemonic}\S*\.128\b", text):
            yield f"no 16-byte {what}"


# What may not come before a kernel has waited: accesses to memory, but for its parameters (LDC),
# and what may lead past the wait.
BEFORE_WAITING = re.compile(
    r"LD(?!C)|ST|U?ATOM|U?RED|CCTL|UBLK|UTMA|SU|TEX|TLD|SYNCS|BRA|BRX|JM|EXIT|CALL|RET|WARPSYNC"
)


def waits_too_late(text):
    """What is wrong with how a kernel begins: it waits for earlier launches before all else."""
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", text)
    if "ACQBULK" not in names:
        yield "it does not wait for earlier launches"
        return
    waits = names.index("ACQBULK")
    yield from (f"{name} before it waits" for name in names[:waits] if BEFORE_WAITING.match(name))
    if re.search(r"@!?U?P\w+ +ACQBULK", text):
        yield "it may wait or not"
    if "PREEXIT" not in names[waits:]:
        yield "it lets no later launch begin"


def check(kernels, architecture, path, few=False):
    """Compile kernels of one source and read them, by way of a file; returns objections. Of a few
    the instructions are another test's, but for those that are read everywhere, and for how they
    begin."""
    cubin, names = compile_cubins(kernels, architecture)
    assert cubin[:4] == b"\x7fELF"
    if cuobjdump() is None:
        return []
    path.write_bytes(cubin)
    usage = resources(path)
    found = {
        kernel: list(used_too_much(kernel, usage[names[kernel.expression]])) for kernel in kernels
    }
    copies = not kernels[0].converts
    complete = architecture == COMPLETE
    all_read = (complete and not few) or (copies and kernels[0].stem in READ_EVERYWHERE)
    if complete or all_read:
        text = instructions(path)
        for kernel, objections in found.items():
            if all_read:
                objections += moved_too_little(kernel, text[names[kernel.expression]])
            if architecture >= overlap.OLDEST_CAPABILITY:
                objections += waits_too_late(text[names[kernel.expression]])
    path.unlink()
    return [
        f"{kernel!r} for sm_{architecture}: {objection}"
        for kernel, objections in found.items()
        for objection in objections
    ]


def work():
    """Parameters of the test: by default a few kernels of one source for one architecture; the
    others, and attention's, with --rest."""
    for architecture, stem in itertools.product(ARCHITECTURES, STEMS):
        if architecture != ONLY.get(stem, architecture):
            continue
        long = [pytest.mark.extra] * (stem == "paged_attention")
        yield pytest.param(architecture, stem, "few", marks=long)
        yield pytest.param(architecture, stem, "ordinary", marks=pytest.mark.extra)
    for stem in STEMS:
        yield pytest.param(COMPLETE, stem, "every_shape", marks=pytest.mark.extra)


@pytest.mark.parametrize("architecture, stem, extent", [*work()])
def test_every_instantiation(architecture, stem, extent, tmp_path):
    """Compiles, uses neither stack nor local memory, and moves 16 bytes where it says so."""
    groups = shipped(architecture, extent).get(stem, [])
    assert groups or extent == "every_shape"
    print(f"{sum(map(len, groups))} kernels")
    few, path = extent == "few", tmp_path / "made.cubin"
    wrong = [o for group in groups for o in check(group, architecture, path, few)]
    assert not wrong, f"{len(wrong)} objections, such as\n" + "\n".join(wrong[:10])
    if cuobjdump() is None:
        pytest.skip(NOT_READ)


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the kernel folder, in use."""
    folder = tmp_path / "kernels_cu"
    shutil.copytree(modules.kernel_dir(), folder)
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", str(folder))
    return folder


# A kernel that indexes an array of its own, and one that moves single bytes; which waits for
# earlier launches as it must, or not at all, or after a load, or not where there is nothing to do.
BAD = """
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
namespace cupy_cache {
struct Params {
  char* out;
  i64 count;
};
template <int kVec, bool kBytes, int kWait>
__global__ void bad(const __grid_constant__ Params p) {
  if (kWait == 2 && threadIdx.x >= p.count) return;
  const char first = kWait == 1 ? p.out[blockIdx.x] : 0;
  if constexpr (kWait != 3) await_earlier_launches();
  if constexpr (kWait != 4) release_next_launch();
  p.out[-1] = first;
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
        ("16, true, 0", ["no 16-byte loads", "no 16-byte stores"]),
        ("1, true, 0", []),
        ("16, false, 0", ["128 bytes of STACK", "local memory is accessed"]),
        ("1, true, 1", ["LDG before it waits"]),
        ("1, true, 2", ["EXIT before it waits"]),
        ("1, true, 3", ["it does not wait for earlier launches"]),
        ("1, true, 4", ["it lets no later launch begin"]),
    ],
)
def test_reading_sees_what_is_wrong(sources, tmp_path, arguments, expected):
    if cuobjdump() is None:
        pytest.skip(NOT_READ)
    (sources / "bad.cu").write_text(BAD)
    struct = params.Struct("out:ptr count:i64")
    kernel = modules.Kernel("bad", "bad", f"bad<{arguments}>", struct)
    found = check([kernel], COMPLETE, tmp_path / "bad.cubin")
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
        compile_cubin(kernel, COMPLETE)
    assert re.search(rf"kernels_cu/{re.escape(file)}[(:]{line + 1}\b", str(caught.value))
    assert "no_such_name" in str(caught.value)


def knows_offsetof():
    """Whether NVRTC has `__builtin_offsetof`, which it has from some 13.x on."""
    from cupy.cuda import nvrtc

    source = "#if !__has_builtin(__builtin_offsetof)\n#error none\n#endif\n"
    program = nvrtc.createProgram(source, "probe.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch=sm_{COMPLETE}",))
    except nvrtc.NVRTCError:
        return False
    finally:
        nvrtc.destroyProgram(program)
    return True


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ("out:ptr count:i64 stride:i64 first:i64 power:i64 step:f64", "offset of .*stride"),
        ("out:ptr stride:i64 count:i64 first:i64 step:f64", "size of"),
        ("out:ptr stride:i64 count:i64 first:i64 power:i64 step:f64 more:i32", "size of"),
    ],
)
def test_a_struct_that_differs_stops_the_compile(fields, complaint):
    if "offset" in complaint and not knows_offsetof():
        pytest.skip("this NVRTC has no offsetof: sizes alone are compared")
    expression = attention.ALIBI.expression.removeprefix("cupy_cache::")
    wrong = modules.Kernel("alibi_slopes", "alibi_slopes", expression, params.Struct(fields))
    with pytest.raises(errors.KernelError, match=complaint):
        compile_cubin(wrong, COMPLETE)


def test_an_architecture_that_nvrtc_does_not_know(kernel):
    with pytest.raises(errors.KernelError, match="sm_999"):
        compile_cubin(kernel, 999)
