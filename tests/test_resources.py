# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The files in tests/resources say what the kernels use. Needs no GPU, but the NVRTC that the files
were made with, which is the one that setup.cfg names for tests."""

import difflib
import importlib.util
import os

import make_resources
import pytest
from machine_code import NOT_READ, cuobjdump

from cupy_cache.runtime import modules

STEMS = sorted(path.stem for path in modules.kernel_dir().glob("*.cu"))
# Sources whose kernels take long.
PARTS = {
    "paged_attention": 16, "paged_attention_mla": 6, "paged_attention_mla_warpgroups": 4,
    "rotary": 8, "gather_both": 3, "gather_cache": 6, "gather_slots": 2, "pack_blocks": 2,
}  # fmt: skip
TABLES = [
    (stem, architecture, part)
    for stem in STEMS
    for architecture in make_resources.architectures(stem)
    for part in range(PARTS.get(stem, 1))
]


def skip(reason):
    """Skip; fail with CUPYCACHE_TEST_RESOURCES=1, so that CI does not miss the comparison."""
    strict = os.environ.get("CUPYCACHE_TEST_RESOURCES") == "1"
    (pytest.fail if strict else pytest.skip)(reason)


def require_the_compiler_of_resources(stem=STEMS[0]):
    """Skip where NVRTC is not the one that the file of ``stem`` was made with."""
    if importlib.util.find_spec("cupy") is None:
        skip("NVRTC was not called: CuPy is not installed")
    file = make_resources.path(stem)
    made_with = make_resources.made_with(file.read_text(encoding="utf-8"))
    installed = make_resources.nvrtc()
    if make_resources.minor(made_with) != make_resources.minor(installed):
        skip(f"{file.name} is of NVRTC {made_with}; {installed}, which is in use, differs")


@pytest.mark.extra
@pytest.mark.parametrize("stem, architecture, part", TABLES)
def test_the_file_is_up_to_date(stem, architecture, part):
    require_the_compiler_of_resources(stem)
    if cuobjdump() is None:
        skip(NOT_READ)
    file = make_resources.path(stem)
    rows = slice(part, None, PARTS.get(stem, 1))
    now = make_resources.table(make_resources.families()[stem], [architecture], rows)
    before = make_resources.only(file.read_text(encoding="utf-8"), [architecture], rows)
    before, now = before.splitlines(), now.splitlines()
    if before[1:] != now[1:]:  # the first line is the version
        names = f"tests/resources/{file.name}", "made from the kernels"
        diff = "\n".join(difflib.unified_diff(before, now, *names, n=0, lineterm=""))
        pytest.fail(f"If this is meant, run {make_resources.COMMAND} {stem}\n{diff}", pytrace=False)


def test_every_source_has_a_file():
    assert sorted(make_resources.families()) == STEMS
    files = sorted(file.stem for file in make_resources.FOLDER.glob("*.txt"))
    assert files == STEMS, f"run {make_resources.COMMAND}"


def test_what_is_counted():
    usage = {"REG": 32, "STACK": 8, "LOCAL": 16, "SHARED": 1024}
    text = """
        @P0 BRA 0x40 ;
        LDG.E.EF.128 R4, desc[UR6][R2.64] ;
        @P0 LDG.E.128.CONSTANT R4, [R2.64] ;
        @P1 EXIT ;
        LDG.E.64 R4, [R2.64] ;
        @!P0 BRA P1, 0x80 ;
        LDG.E R4, [R2.64] ;
        LDS.128 R4, [R2] ;
        STG.E.ENL2.256 [R2.64], R4, R8 ;
        STG.E.128 [R2.64], R4 ;
        STL.64 [R1+0x8], R4 ;
        LDL R4, [R1+0x8] ;
        LDL.LU R4, [R1+0x8] ;
    """
    assert make_resources.measured(usage, text) == {
        "reg": 32, "stack": 24, "spill": 3, "shared": 1024, "early": 3,
        "ld16": 2, "st16": 1, "ld32": 0, "st32": 1,
    }  # fmt: skip
