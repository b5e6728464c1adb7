# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The inline PTX of the kernels is what tests/emulator/ptx.py lists, and becomes the machine code
that is told there. What it does is tested with everything that the emulator runs."""

import re
import shutil

import machine_code
import numpy as np
import pytest
from emulator import ptx
from test_resources import require_the_compiler_of_resources, skip

from cupy_cache.runtime import env, launch, modules, params

SOURCES = {
    str(path.relative_to(modules.kernel_dir())): path.read_text(encoding="utf-8")
    for path in sorted(modules.kernel_dir().rglob("*.cu*"))
}
WITH_PTX = [name for name, text in SOURCES.items() if "asm" in text]


def test_every_statement_is_listed():
    """And nothing else is. `with_calls` compares the whole statement."""
    found = set()
    for text in SOURCES.values():
        assert not list(ptx.statements(ptx.with_calls(text)))
        found.update(statement.text for statement in ptx.statements(text))
    assert found == set(ptx.INSTRUCTIONS)


@pytest.mark.parametrize("name", WITH_PTX)
def test_any_other_statement_is_refused(name):
    text = SOURCES[name]
    for statement in ptx.statements(text):
        whole = text[statement.start : statement.end]
        stays = ("asm volatile", "asm") if statement.stays else ("asm", "asm volatile")
        changes = (
            stays, ('"memory"', ""), ("rn.", "rz."), ("rn.", "rn.ftz."), (".satfinite", ""),
            (".sat.", "."), ("global.", "global.L1::no_allocate."), (".L2::cache_hint", ""),
            ("s32", "u32"), ("s64", "u64"), ("setp.ne", "setp.eq"), ("@when", "@!when"),
            ("%0", "%1"), ('"h"', '"r"'), ('"r"', '"h"'), (".ftz", ""), (".approx", ""),
            ("_group", "_all"), (".aligned", ""), (".x4", ".x2"), ("f16", "tf32"),
            ("cluster", "cta"), ("async", "bulk"), ("griddep", "dep"),
        )  # fmt: skip
        others = {whole.replace(*change, 1) for change in changes} - {whole}
        assert len(others) > 2
        for other in others:
            with pytest.raises(ptx.UnknownPTX, match=r"ptx\.py"):
                ptx.with_calls(text.replace(whole, other))


TYPES = {"l": "u64", "r": "u32", "h": "u16", "f": "float"}
STRUCT = params.Struct("to:ptr from:ptr")
KERNELS = """\
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

struct Params {
  char* to;
  const char* from;
};

template <int kNumber>
__global__ void one(const __grid_constant__ Params p) {
%s
}

}  // namespace cupy_cache
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of sources, with the shipped headers."""
    shutil.copytree(modules.kernel_dir() / "include", tmp_path / "include")
    monkeypatch.setenv(env.KERNEL_DIR.name, str(tmp_path))
    return tmp_path


def with_one_instruction(number, text, instruction):
    """What loads the operands of an instruction, carries it out and stores its results."""
    constraints = instruction.constraints.split()
    results = [c for c in constraints if c[0] in "=+"]
    given = [c for c in constraints if c[0] not in "=+n"]
    outputs = ", ".join(f'"{c}"(result{i})' for i, c in enumerate(results))
    inputs = ", ".join(
        [f'"{c}"(given{i})' for i, c in enumerate(given)] + ['"n"(1)'] * constraints.count("n")
    )
    from_memory = "*reinterpret_cast<const {}*>(p.from + {})"
    clobbers = f" : {instruction.clobbers}" if instruction.clobbers else ""
    lines = [
        *(
            f"{TYPES[c[1]]} result{i}"
            + (f" = {from_memory.format(TYPES[c[1]], 4 * i)};" if c[0] == "+" else ";")
            for i, c in enumerate(results)
        ),
        *(
            f"const {TYPES[c]} given{i} = {from_memory.format(TYPES[c], 64 * i)};"
            for i, c in enumerate(given)
        ),
        f'asm {"volatile" * instruction.stays}("{text}" : {outputs} : {inputs}{clobbers});',
        *(
            f"*reinterpret_cast<{TYPES[c[1]]}*>(p.to + {64 * i}) = result{i};"
            for i, c in enumerate(results)
        ),
    ]
    return "\n    ".join((f"  if constexpr (kNumber == {number}) {{", *lines)) + "\n  }"


def machine_code_of(folder, bodies):
    """The instructions for sm_90 of kernels with these bodies, compiled by NVRTC."""
    if machine_code.cuobjdump() is None:
        skip(machine_code.NOT_READ)
    require_the_compiler_of_resources()
    (folder / "one.cu").write_text(KERNELS % "\n".join(bodies))
    kernels = [
        modules.Kernel("one", "one", f"one<{n}>", STRUCT, only=90) for n in range(len(bodies))
    ]
    cubin, names = machine_code.compile_cubins(kernels, 90)
    path = folder / "one.cubin"
    path.write_bytes(cubin)
    code = machine_code.instructions(path)
    return [" ".join(re.sub(r"/\*.*?\*/", "", code[names[k.expression]]).split()) for k in kernels]


def test_machine_instructions(folder):
    bodies = [
        with_one_instruction(number, text, instruction)
        for number, (text, instruction) in enumerate(ptx.INSTRUCTIONS.items())
    ]
    for text, found in zip(ptx.INSTRUCTIONS, machine_code_of(folder, bodies)):
        assert re.search(ptx.INSTRUCTIONS[text].machine, found), f"{text} became {found}"


def test_policies_of_vectors(folder):
    """The policy's halves, and how many threads are many; of loads, also how many are few."""
    sizes, bodies = (16, 8, 4, 2, 1), []
    for number, size in enumerate(sizes):
        to, source = f"reinterpret_cast<Vec<{size}>*>(p.to)", f"load_vector<{size}>(p.from)"
        bodies.append(f"  if constexpr (kNumber == {2 * number}) *{to} = {source};")
        source = f"*reinterpret_cast<const Vec<{size}>*>(p.from)"
        store = f"store_vector<{size}>(p.to, {source})"
        bodies.append(f"  if constexpr (kNumber == {2 * number + 1}) {store};")
    code = machine_code_of(folder, bodies)
    # The threads less the few that are too few, below the many less those.
    for load in code[::2]:
        assert "-0x1800 " in load
        assert re.search(r"ISETP.GE.U32.AND \S+ \S+ U?R\d+, 0x1e800,", load)
    for store in code[1::2]:
        assert re.search(r"ISETP.GE.U32.AND \S+ \S+ U?R\d+, 0x20000,", store)
    for text in code:
        assert "0x12f00000 " in text and re.search(r"SEL U?R\d+, U?R\d+, 0x16f00000, !", text)


def test_policy_by_the_number_of_threads(folder, emulated_world):
    """Counted in thread blocks of two dimensions; see vec.cuh."""
    few, many = 6 << 10, 128 << 10
    (folder / "one.cu").write_text(
        KERNELS
        % """  if (threadIdx.x || blockIdx.x || blockIdx.y) return;
  u64* const to = reinterpret_cast<u64*>(p.to);
  to[0] = l2_policy(6 << 10);
  to[1] = l2_policy(0);"""
    )
    first, normal = 0x12F0000000000000, 0x16F0000000000000
    world = emulated_world()
    try:
        kernel = modules.Kernel("one", "one", "one<0>", STRUCT)
        for grid, threads, expected in (
            ((few // 32 - 1, 1, 1), 32, [normal, first]),
            ((few // 64, 1, 1), 64, [first, first]),
            ((few // 96, 3, 1), 32, [first, first]),
            ((many // 1024 - 1, 1, 1), 1024, [first, first]),
            ((2, many // 512, 1), 256, [normal, normal]),
            ((many // 1024, 1, 1), 1024, [normal, normal]),
        ):
            to = world.upload(np.zeros(16, np.uint8))
            launch.Launcher(kernel, 0).enqueue(grid, threads, 0, to.ptr, to.ptr)
            assert to.bytes.view(np.uint64).tolist() == expected
    finally:
        world.close()
