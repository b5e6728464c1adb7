# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What users see without reading code: names, annotations, and what type checkers make of them."""

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typed_user

import cupy_cache as cc

USER = Path(typed_user.__file__)
PUBLIC = {name: getattr(cc, name) for name in cc.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = {
    f"{name}.{attribute}": method
    for name, kind in CLASSES.items()
    for attribute, method in vars(kind).items()
    if inspect.isfunction(method) and (attribute.startswith("__") or attribute[0] != "_")
}


def test_names():
    assert dir(cc) == sorted(cc.__all__)


@pytest.mark.whole
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_package_tells_of_every_function(name):
    assert f"`{name}`" in cc.__doc__


@pytest.mark.whole
@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_annotations_are_complete(name):
    function = (FUNCTIONS | METHODS)[name]
    parameters = list(inspect.signature(function).parameters)
    if name in METHODS:
        assert parameters.pop(0) == "self"
    assert set(typing.get_type_hints(function)) == {*parameters, "return"}


# --- a user's module ------------------------------------------------------------------------------


def test_the_user_uses_everything():
    nodes = list(ast.walk(ast.parse(USER.read_text(encoding="utf-8"))))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]

    def attributes(nodes, of_package):
        """Names after a dot: of the package, or of anything else."""
        return {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and (ast.unparse(node.value) == "cc") == of_package
        }

    methods = {name.partition(".")[2] for name in METHODS if "__" not in name}
    assert methods
    assert sorted(set(PUBLIC) - attributes(nodes, of_package=True)) == []
    assert sorted(set(FUNCTIONS) - attributes(called, of_package=True)) == []
    assert sorted(methods - attributes(called, of_package=False)) == []


@pytest.mark.whole
@pytest.mark.parametrize("part", typed_user.EVERYTHING, ids=lambda part: part.__name__)
@pytest.mark.parametrize("kind", ["numpy", "torch", "own"])
def test_what_is_checked_runs(kind, part):
    if kind == "torch":
        make = pytest.importorskip("torch").from_numpy
    else:
        make = {"numpy": lambda array: array, "own": typed_user.Own}[kind]
    part(make)
    cc.raise_faults()


def test_errors():
    kinds = typed_user.errors()
    assert all(issubclass(kind, cc.CupyCacheError) for kind in kinds)


# --- type checkers --------------------------------------------------------------------------------


def skip(reason):
    """Skip; fail with CUPYCACHE_TEST_TYPES=1, so that CI does not miss the check."""
    strict = os.environ.get("CUPYCACHE_TEST_TYPES") == "1"
    (pytest.fail if strict else pytest.skip)(reason)


CHECKERS = {
    "mypy": ("--config-file=", "--strict", "--cache-dir=cache"),
    # What kinds of errors there are, the module itself says.
    "pyright": ("--pythonpath", sys.executable),
}


@pytest.mark.whole
@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_the_user_is_without_errors(checker, tmp_path):
    """As an installed package is seen: in a folder of the user's, with no configuration of ours."""
    for package in (checker, "torch"):
        if importlib.util.find_spec(package) is None:
            skip(f"{package} is not installed")
    # Asking whether there is a newer pyright takes a network.
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    environment.pop("MYPYPATH", None)

    def run(*arguments):
        return subprocess.run([sys.executable, "-m", checker, *arguments], capture_output=True,
                              text=True, cwd=tmp_path, env=environment)  # fmt: skip

    started = run("--version")
    if started.returncode:
        skip(f"{checker} does not start: {started.stderr[-500:]}")
    module = tmp_path / USER.name
    module.write_text(USER.read_text(encoding="utf-8"), encoding="utf-8")
    found = run(*CHECKERS[checker], module.name)
    assert not found.returncode, found.stdout + found.stderr
