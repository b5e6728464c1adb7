# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/frameworks.md do what they say, each in a process of its own."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "frameworks.md"
ON_GPU = " on a GPU"
BLOCKS = re.findall(
    r"<!-- needs: ?(.*?) ?-->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
)


def recipes():
    for number, (needs, code) in enumerate(BLOCKS):
        packages = [one for one in needs.split(", ") if one]
        marks = [pytest.mark.gpu] * any(one.endswith(ON_GPU) for one in packages)
        packages = [one.removesuffix(ON_GPU) for one in packages]
        name = "-".join([*packages, str(number)])
        yield pytest.param(packages, code, id=name, marks=marks)


def test_every_block_is_run():
    assert PAGE.read_text(encoding="utf-8").count("```python") == len(BLOCKS) > 5


@pytest.mark.whole
@pytest.mark.parametrize("packages, code", list(recipes()))
def test_recipe(packages, code):
    missing = [one for one in packages if importlib.util.find_spec(one) is None]
    if missing:
        pytest.skip(f"without {' and '.join(missing)}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
