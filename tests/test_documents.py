# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The documents: their code runs, their names exist, and their pictures are what is there.

The Python blocks of a page run one after the other, as one program. A line before a block may say
otherwise: ``<!-- needs a GPU -->`` and ``<!-- a fragment -->``, which is only compiled.
"""

import doctest
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import cupy_cache as cc

CHECKOUT = Path(__file__).resolve().parent.parent
DOCS = CHECKOUT / "docs"
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]+) -->\n)?^```python\n(?P<code>.*?)^```$", re.M | re.S)
MARKS = {None, "needs a GPU", "a fragment"}
# Each part of the page on frameworks has a process of its own, in test_frameworks.py.
PAGES = [
    path
    for path in [*CHECKOUT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]
    if path.name != "frameworks.md" and "\n```python\n" in path.read_text(encoding="utf-8")
]


def blocks(path):
    """(Mark, code) of each, its lines counted as in the file."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        mark = found["mark"] if found["mark"] in MARKS else None  # others are no business of ours
        code = "\n" * text.count("\n", 0, found.start("code")) + found["code"]
        yield mark, compile(code, str(path), "exec", dont_inherit=True)


def run(path, gpu):
    """Run a page; with ``gpu`` all of it."""
    names = {"__name__": "page"}
    for mark, code in blocks(path):
        if mark == "a fragment" or (mark == "needs a GPU" and not gpu):
            continue
        try:
            exec(code, names)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] == "cupy_cache":
                raise
            pytest.skip(f"{error.name} is not installed")


# transformers 5.24 takes an argument by the name that 5.17 has for it, and warns.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.whole
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_code_runs(path):
    assert list(blocks(path))
    if path.name == "transformers.md":
        pytest.importorskip("psutil")  # by which transformers knows of the CPU's memory
    run(path, gpu=False)


@pytest.mark.gpu
@pytest.mark.whole
@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if "<!-- needs a GPU -->" in path.read_text(encoding="utf-8")],
    ids=lambda path: path.name,
)
def test_code_that_needs_a_gpu_runs(path):
    run(path, gpu=True)


def test_the_readme_is_short():
    """It is read in two minutes, and its code is what runs."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) < 900
    (code,) = BLOCK.findall(text)
    assert len(code[1].splitlines()) <= 20


def test_the_long_description_links_to_nothing_in_the_checkout():
    try:
        about = importlib.metadata.metadata("cupy-cache")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    if about["Version"] != cc.__version__:
        pytest.skip("another version is installed")
    text = about["Description"]
    assert "# cupy_cache" in text and "## Speed" in text
    assert all("://" in link for link in re.findall(r"\]\(([^)]*)\)", text))


def exists(name):
    """Whether the package has this, which may be inside of something."""
    thing = cc
    for part in name.split("."):
        thing = getattr(thing, part, None)
    return thing is not None


def test_names_to_switch_to_exist():
    page = (DOCS / "from_others.md").read_text(encoding="utf-8")
    _, *tables = page.split("\n## ")
    rows = [
        line.split(" | ") for table in tables for line in table.splitlines() if line[:3] == "| `"
    ]
    ours = [name for _, cell, *_ in rows for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(tables) == 5 and len(ours) > 50
    assert not [name for name in ours if not exists(name)]


def test_the_reference_has_everything():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    listed = re.findall(r"^\.\. auto(?:function|class|exception|module):: ([\w.]+)$", text, re.M)
    for title in re.findall(r"^\.\. operations:: (.+)$", text, re.M):  # see docs/conf.py
        _, _, rest = cc.__doc__.partition(f"\n{title}\n")
        listed += re.findall(r"`(\w+)`", re.match(r"(?: {4}.*\n)+", rest)[0])
    listed = [name.removeprefix("cupy_cache.") for name in listed]
    assert len(set(listed)) == len(listed)
    missing = set(cc.__all__) - {"__version__"} - set(listed)
    assert not missing, f"list {sorted(missing)} in docs/api, or in the docstring of the package"


def test_every_command_and_variable_is_told():
    from cupy_cache.cli import command_line
    from cupy_cache.runtime import env

    page = (DOCS / "command_line.md").read_text(encoding="utf-8")
    usage = command_line._parser().format_help()
    commands = re.findall(r"^    ([a-z-]+)", usage, re.M)
    assert {"info", "demo", "warmup", "bench", "clear-cache"} <= set(commands)
    assert not [command for command in commands if f"| `{command}` |" not in page]
    ours = {variable.name for variable in env.TABLE} - {env.REQUIRE_GPU.name}  # it is for tests
    assert not [name for name in ours if f"| `{name}" not in page]


def test_pictures_and_times_are_up_to_date():
    path = DOCS / "make_pictures.py"
    spec = importlib.util.spec_from_file_location("make_pictures", path)
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    old = [
        path.name
        for path, text in pictures.files().items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert not old, "run python docs/make_pictures.py"


def test_pictures_are_small():
    assert all(path.stat().st_size < 16_000 for path in (DOCS / "images").glob("*.svg"))


def test_examples_of_docstrings_run():
    finder, names = doctest.DocTestFinder(exclude_empty=True), {**vars(cc), "np": np}
    examples = 0
    for name in set(cc.__all__) - {"__version__", "flash_attn"}:
        for test in finder.find(getattr(cc, name), name, module=False, globs=names):
            outcome = doctest.DocTestRunner(verbose=False).run(test)
            assert not outcome.failed, test.name
            examples += outcome.attempted
    assert examples > 10
