# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What users see without reading code: names, annotations, and what type checkers make of them."""

import ast
import builtins
import collections.abc
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


def has_overloads(function):
    """Whether it is declared more than once."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(function)))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return names.count(function.__name__) > 1


OVERLOADED = {name for name, function in FUNCTIONS.items() if has_overloads(function)}


def test_names():
    assert dir(cc) == sorted(cc.__all__)


@pytest.mark.whole
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_package_tells_of_every_function(name):
    assert f"`{name}`" in cc.__doc__, "name it in the docstring of cupy_cache/__init__.py"


@pytest.mark.whole
@pytest.mark.parametrize("name", [*FUNCTIONS, *METHODS])
def test_annotations_are_complete(name):
    function = (FUNCTIONS | METHODS)[name]
    parameters = list(inspect.signature(function).parameters)
    if name in METHODS:
        assert parameters.pop(0) == "self"
    assert set(typing.get_type_hints(function)) == {*parameters, "return"}


# --- a user's module ------------------------------------------------------------------------------


def kinds(functions):
    """The annotations of their parameters."""
    return {
        text
        for function in functions
        for name, text in function.__annotations__.items()
        if name != "return"
    }


def test_the_user_uses_everything():
    """Every class, method and function with overloads, and every kind of argument. What else is
    called as it is declared (`passing_on`)."""
    nodes = list(ast.walk(ast.parse(USER.read_text(encoding="utf-8"))))
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]

    def attributes(nodes, of_package):
        """Names after a dot: of the package, or of anything else."""
        return {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and (ast.unparse(node.value) == "cc") == of_package
        }

    methods = {name.partition(".")[2] for name in METHODS if "__" not in name}
    called = attributes(calls, of_package=True)
    tried = kinds(FUNCTIONS[name] for name in called & FUNCTIONS.keys())
    where = f"nowhere in {USER.name}"
    assert methods and OVERLOADED and tried
    assert not PUBLIC.keys() - FUNCTIONS.keys() - attributes(nodes, of_package=True), where
    assert not OVERLOADED - called, where
    assert not methods - attributes(calls, of_package=False), where
    assert not kinds(FUNCTIONS.values()) - tried, where


def passing_on():
    """The text of a user's module that calls each function by way of one that is declared alike."""
    imports, functions = {"import cupy_cache as cc"}, []
    for name in sorted(FUNCTIONS.keys() - OVERLOADED):
        function = FUNCTIONS[name]
        signature = inspect.signature(function)
        for node in ast.walk(ast.parse("; ".join(function.__annotations__.values()))):
            if isinstance(node, ast.Name) and not hasattr(builtins, node.id):
                imports.add(import_of(node.id, function))
        given = [
            f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name
            for p in signature.parameters.values()
        ]
        result = "" if function.__annotations__["return"] == "None" else "return "
        functions.append(f"def {name}{signature}:\n    {result}cc.{name}({', '.join(given)})\n")
    return "\n".join(["from __future__ import annotations", *sorted(imports), "", *functions])


def import_of(name, function):
    """The line that imports what the annotations of ``function`` call ``name``."""
    value = function.__globals__[name]
    if inspect.ismodule(value):
        return f"import {value.__name__} as {name}"
    home = next(home for home in (collections.abc, typing, cc.types) if hasattr(home, name))
    return f"from {home.__name__} import {name}"


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
    modules = {USER.name: USER.read_text(encoding="utf-8"), "passing_on.py": passing_on()}
    for name, text in modules.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    found = run(*CHECKERS[checker], *modules)
    assert not found.returncode, found.stdout + found.stderr
