# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Each promise of docs/promises.md is held by tests that exist."""

import ast
import functools
import re
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = (CHECKOUT / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith(("| Promise", "| ---"))
]


@functools.cache
def names_in(path):
    """The tests of a file, those of classes as ``Class::test``."""
    found = set()
    for node in ast.parse((CHECKOUT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def test_every_promise_names_tests_that_exist():
    assert len(ROWS) > 25
    missing = []
    for row in ROWS:
        assert len(row) == 2, row
        promise, held_by = row
        named = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", held_by)
        assert named and len(named) == held_by.count("`") / 2, promise
        missing += [
            f"{path}::{name}"
            for path, name in named
            if not (CHECKOUT / path).is_file() or name not in names_in(path)
        ]
    assert not missing


def test_promises_are_of_every_kind():
    kinds = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert kinds[-1] == "What is left to you" and len(kinds) == len(set(kinds)) == 7
