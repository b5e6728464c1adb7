# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What tests/mutate.py makes and runs. It is run by hand: see its docstring."""

import mutate
import pytest

KERNEL = """\
#include "cupy_cache/ints.cuh"
namespace cupy_cache {
template <int kVec, int kCount>
__device__ int some(const Params& p, int a) {
  static_assert(kVec < 17, "few");
  __shared__ int held[4];
  if (a < p.tokens && !p.none) return a + 1;  // not this < that
  held[a] = other<4>(a, p.tokens);
  __syncthreads();
  return held[a % 2];
}
"""
PYTHON = '''\
"""A module < of no use."""
LIMIT = 3
def some(a: int = 5, *rest):
    """At least 1 and 2."""
    if a <= LIMIT and not rest:
        raise ValueError(f"some: {a + 1} < 3", 1)
    rest[0] = a // 2
    rest.sort()
    return other(a, True)
'''


def changes(file, text):
    return {mutant.lines(text) for mutant in mutate.mutants_of(file, text)}


def test_mutants_of_a_kernel():
    found = changes("x.cu", KERNEL)
    condition = "if (a < p.tokens && !p.none) return a + 1; // not this < that"
    call = "held[a] = other<4>(a, p.tokens);"
    assert found == {
        *((condition, condition.replace(*change, 1)) for change in (
            (" < ", " <= "), ("&&", "||"), ("!p", "p"), (" + 1", " - 1"), ("+ 1", "+ 2"),
            ("a < p.tokens && !p.none", "true"), ("a < p.tokens && !p.none", "false"),
        )),
        *((call, call.replace(*change)) for change in (
            ("<4>", "<5>"), ("<4>", "<3>"), ("a, p.tokens", "p.tokens, a"), (call, ";"),
        )),
        ("__shared__ int held[4];", "__shared__ int held[5];"),
        ("__shared__ int held[4];", "__shared__ int held[3];"),
        ("__syncthreads();", ";"),
        ("return held[a % 2];", "return held[a / 2];"),
        ("return held[a % 2];", "return held[a % 3];"),
        ("return held[a % 2];", "return held[a % 1];"),
    }  # fmt: skip


def test_mutants_of_a_module():
    condition, stored = "if a <= LIMIT and not rest:", "rest[0] = a // 2"
    assert changes("x.py", PYTHON) == {
        ("LIMIT = 3", "LIMIT = 4"),
        *((condition, condition.replace(*change)) for change in (
            ("<=", "<"), ("and", "or"), ("not ", ""), ("a <= LIMIT and not rest", "True"),
            ("a <= LIMIT and not rest", "False"),
        )),
        *((stored, stored.replace(*change)) for change in (
            ("[0]", "[1]"), ("//", "*"), ("2", "3"), (stored, "pass"),
        )),
        ("rest.sort()", "pass"),
        ("return other(a, True)", "return other(True, a)"),
        ("return other(a, True)", "return other(a, False)"),
    }  # fmt: skip


@pytest.mark.parametrize("file, text", [("x.cu", KERNEL), ("x.py", PYTHON)])
def test_a_mutant_changes_one_place(file, text):
    for mutant in mutate.mutants_of(file, text):
        changed = mutant.applied(text)
        assert changed != text and changed.count("\n") == text.count("\n")
        before, after = mutant.lines(text)
        assert before in [" ".join(line.split()) for line in text.splitlines()]
        assert after in [" ".join(line.split()) for line in changed.splitlines()]


def test_every_file_has_tests():
    for file in mutate.files():
        tests = mutate.tests_for(file)
        assert len(tests) > 1 and "test_cases.py" in tests, file
        for arguments in mutate.stages(file):
            for name in arguments:
                assert not name.startswith("tests/") or (mutate.ROOT / name).exists()


@pytest.mark.parametrize(
    "file, tests",
    [
        ("kernels_cu/copy_blocks.cu", ["copy_blocks", "swap_blocks"]),
        ("kernels_cu/slot_mapping.cu", ["slot_mapping"]),
        ("kernels_cu/include/cupy_cache/warp.cuh", [
            "indexer_k_quant_and_cache", "reshape_and_cache_flash_per_token_head",
            "concat_and_cache_mla",
        ]),
        ("kernels_cu/include/cupy_cache/ints.cuh", ["slot_mapping", "pack_blocks", "alibi_slopes"]),
        ("cupy_cache/ops/shared/gathering.py", ["gather_cache", "cp_gather_cache"]),
        ("cupy_cache/ops/gather_cache.py", ["gather_cache"]),
        ("cupy_cache/cpu/operations.py", ["gather_cache", "convert_fp8", "slot_mapping"]),
        ("cupy_cache/runtime/dispatch.py", ["dispatch", "histories", "pack_blocks"]),
        ("cupy_cache/integrations/torch_ops.py", ["torch_ops"]),
    ],
)  # fmt: skip
def test_tests_that_concern_a_file(file, tests):
    assert {f"test_{name}.py" for name in tests} <= set(mutate.tests_for(file))


def test_what_is_listed_is_still_made():
    """Each mutant that is said to survive can be made of the present sources, and has a reason."""
    made = {}
    for file, before, after in mutate.known():
        if file not in made:
            made[file] = changes(file, (mutate.ROOT / file).read_text(encoding="utf-8"))
        assert (before, after) in made[file], f"{file}: {before}"
    assert all(len(why) > 10 for why in mutate.known().values())
