# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The house rules, read from the sources: who imports whom, and what every file has."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import cupy_cache
from cupy_cache import modules

PACKAGE = Path(cupy_cache.__file__).resolve().parent
TESTS = Path(__file__).resolve().parent
CHECKOUT = TESTS.parent

# A module imports only from lower floors, and on its own floor from those that stand before it.
# "ops.*" are the operations, which never import each other; __init__ is what users import.
FLOORS = (
    ("errors", "env", "log", "_version"),
    ("formats", "params"),
    ("torch_tensors", "arrays", "contract"),
    ("allocations", "modules", "launch", "conversions", "cpu"),
    ("repeats", "dispatch", "block_numbers", "blocks", "block_pairs", "mla", "packing",
     "gathering", "indexer", "slots"),
    ("ops.*", "attention"),
    ("specialisations", "warmup", "kv_cache", "__init__", "torch_ops"),
    ("info", "demo", "__main__"),
)  # fmt: skip
SHARED_ROOMS = FLOORS[4]
RANK = {name: rank for rank, name in enumerate(name for floor in FLOORS for name in floor)}
MAY_IMPORT_TORCH = {"torch_ops"}
MAX_LINES = 500
LICENCE = (
    "SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors",
    "SPDX-License-Identifier: Apache-2.0",
)


def module_name(path):
    """A file of the package as it is called in `FLOORS` (operations by their own names)."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = [name for name in SOURCES if name != "ops.__init__"]
OPERATIONS = [name for name in MODULES if name.startswith("ops.")]
KERNELS = sorted(modules.kernel_dir().glob("*.cu"))


def text_of(name):
    return SOURCES[name].read_text(encoding="utf-8")


@functools.cache
def tree(name):
    return ast.parse(text_of(name))


def nodes(name, at_import=False):
    """The syntax nodes of a module; only those outside functions if ``at_import``."""
    todo = [tree(name)]
    while todo:
        node = todo.pop()
        yield node
        if not (at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            todo += ast.iter_child_nodes(node)


def outside_packages(name, at_import=False):
    """The top-level packages, other than this one, that a module imports."""
    for node in nodes(name, at_import):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def own_imports(name):
    """The modules of this package that a module imports."""
    for node in nodes(name):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = name.split(".")[: -node.level]
            parts = [*above, *(node.module.split(".") if node.module else ())]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "cupy_cache":
            parts = node.module.split(".")[1:]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first, *parts = alias.name.split(".")
                if first == "cupy_cache":
                    yield ".".join(parts) or "__init__"
            continue
        else:
            continue
        for alias in node.names:
            inner = ".".join([*parts, alias.name])
            yield inner if inner in SOURCES else ".".join(parts) or "__init__"


def rank(name):
    key = "ops.*" if name in OPERATIONS else name
    assert key in RANK, f"module {name} has no floor: give it one in FLOORS"
    return RANK[key]


def test_imports_go_downwards():
    assert not [
        f"{name} imports {other}, which does not stand below it"
        for name in MODULES
        for other in own_imports(name)
        if rank(other) >= rank(name)
    ]


def test_imports_are_seen():
    """The rule above would hold for anything if no import were found."""
    assert set(own_imports("specialisations")) >= {"arrays", "errors", "ops.copy_blocks"}
    assert set(own_imports("ops.copy_blocks")) >= {"arrays", "blocks", "errors"}
    assert "ops.swap_blocks" in set(own_imports("__init__"))


def test_only_env_reads_the_environment():
    def reads(node):
        if isinstance(node, ast.ImportFrom):
            return node.module == "os"
        return isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")

    assert [name for name in MODULES if any(map(reads, nodes(name)))] == ["env"]


def test_frameworks_are_not_imported_for_the_user():
    """torch by nobody but torch_ops; CuPy only inside functions, when a GPU is about to be used."""
    frameworks = {"torch", "jax", "cupy", "cupyx", "cupy_backends", "cuda"}
    for name in MODULES:
        allowed = {"torch"} if name in MAY_IMPORT_TORCH else set()
        assert not frameworks & set(outside_packages(name, at_import=True)) - allowed, name
        assert not {"torch", "jax"} & set(outside_packages(name)) - allowed, name
        calls = {node.func.id for node in nodes(name)
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert not calls & {"__import__", "import_module"}, name


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, cupy_cache\n"
        "frameworks = {'torch', 'cupy', 'cupyx', 'cupy_backends', 'jax'}\n"
        "print(*sorted(frameworks & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert not done.stdout.split()


def test_an_operation_has_its_kernel_and_its_test():
    """A kernel of the same stem, or one that a room shares among operations; and a test."""
    stems = {path.stem for path in KERNELS}
    rooms = {room for room in SHARED_ROOMS if "modules.Kernel(" in text_of(room)}
    for name in OPERATIONS:
        stem = name.removeprefix("ops.")
        assert stem in stems or rooms & set(own_imports(name)), f"{name} has no kernel"
        assert (TESTS / f"test_{stem}.py").is_file(), f"{name} has no test of its name"


def test_a_kernel_is_used_and_has_one_struct():
    """By the operation of its stem or, by name, by another module."""
    for path in KERNELS:
        assert [
            name
            for name in SOURCES
            if "modules.Kernel(" in text_of(name)
            and (name == f"ops.{path.stem}" or f'"{path.stem}"' in text_of(name))
        ], f"{path.name} is not used"
        text = path.read_text(encoding="utf-8")
        assert len(re.findall(r"^struct Params \{", text, re.MULTILINE)) == 1, path.name


def test_every_file_has_its_licence():
    folders = ("cupy_cache", "kernels_cu", "tests", "benchmarks", "examples", "docs")
    wanted = {".py": "# ", ".cu": "// ", ".cuh": "// ", ".cpp": "// ", ".h": "// "}
    files = [
        path
        for folder in folders
        for path in (CHECKOUT / folder).rglob("*")
        if path.suffix in wanted
    ]
    assert len(files) > len(SOURCES)
    without = [
        str(path.relative_to(CHECKOUT))
        for path in files
        if path.read_text(encoding="utf-8").split("\n")[:2]
        != [wanted[path.suffix] + line for line in LICENCE]
    ]
    assert not without


def test_no_file_is_too_long():
    files = [*SOURCES.values(), *modules.kernel_dir().rglob("*.cu*")]
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}
