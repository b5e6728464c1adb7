# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The house rules, read from the sources: who imports whom, and what every file has."""

import ast
import configparser
import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path

import cupy_cache
from cupy_cache.runtime import modules

PACKAGE = Path(cupy_cache.__file__).resolve().parent
TESTS = Path(__file__).resolve().parent
CHECKOUT = TESTS.parent

# The rooms, from the ground up: a module imports from its own room and from those below it. A
# module of the package's own folder is a room by itself.
FLOORS = (
    ("errors", "_version", "types"),
    ("runtime",),
    ("cpu",),
    ("ops", "attention"),
    ("kv_cache", "bookkeeping", "compilation", "flash_attn", "vllm_names"),
    ("__init__",),
    ("integrations", "cli"),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms whose face, the package itself, is all that others import. Of `runtime`, `ops` and
# `attention` it is the modules.
FACES = ("cpu", "kv_cache", "bookkeeping", "compilation", "cli")
MAY_IMPORT_TORCH = {
    "integrations.torch_graphs",
    "integrations.torch_ops",
    "integrations.transformers.__init__",
    "integrations.transformers.attention",
    "integrations.transformers.cache",
}
LICENCE = (
    "SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors",
    "SPDX-License-Identifier: Apache-2.0",
)


def module_name(path):
    """A file of the package as it is called in `FLOORS` (operations by their own names)."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
OPERATIONS = [name for name in SOURCES if re.fullmatch(r"(ops|attention)\.(?!__init__)\w+", name)]
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


@functools.cache
def own_imports(name):
    """The modules of this package that a module imports; a package's own is its ``__init__``."""
    return tuple(_own_imports(name))


def _own_imports(name):
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
                    yield _module(parts)
            continue
        else:
            continue
        for alias in node.names:
            inner = _module([*parts, alias.name])
            yield inner if inner in SOURCES else _module(parts)


def _module(parts):
    name = ".".join(parts)
    return name if name in SOURCES else ".".join([*parts, "__init__"])


def room(name):
    first = name.partition(".")[0]
    assert first in FLOOR, f"{first} has no floor: give it one in FLOORS"
    return first


def test_imports_go_downwards():
    assert not [
        f"{name} imports {other}, which does not stand below it"
        for name in SOURCES
        for other in own_imports(name)
        if room(other) != room(name) and FLOOR[room(other)] >= FLOOR[room(name)]
    ]


def test_no_module_imports_itself_by_way_of_others():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"imports in a circle: {' -> '.join([*path, name])}"
        if name in done:
            return
        path.append(name)
        for other in own_imports(name):
            if other != name:
                visit(other)
        done.add(path.pop())

    for name in SOURCES:
        visit(name)


def test_a_room_lists_its_modules_in_their_order():
    """In its docstring, each above those that it imports."""
    for folder in ("runtime", "runtime.fastpath", "ops.shared"):
        text = ast.get_docstring(tree(f"{folder}.__init__"))
        listed = re.findall(r"^(\w+)(?:\.py|/) : ", text, re.MULTILINE)
        inside = (name.removeprefix(f"{folder}.") for name in SOURCES if name.startswith(folder))
        there = {name.partition(".")[0] for name in inside} - {"__init__"}
        assert sorted(listed) == sorted(there), f"in the docstring of {folder}"
        place = {name: at for at, name in enumerate(listed)}
        for name in SOURCES:
            if not name.startswith(f"{folder}.") or name == f"{folder}.__init__":
                continue
            mine = name.split(".")[folder.count(".") + 1]
            for other in own_imports(name):
                if other.startswith(f"{folder}.") and not other.endswith(f"{folder}.__init__"):
                    theirs = other.split(".")[folder.count(".") + 1]
                    assert place[mine] <= place[theirs], f"{mine} imports {theirs}: list it above"


def test_rooms_are_entered_by_their_faces():
    assert not [
        f"{name} imports {other}, past the face of its room"
        for name in SOURCES
        for other in own_imports(name)
        if room(other) in FACES and room(other) != room(name) and other != f"{room(other)}.__init__"
    ]


def test_operations_do_not_import_each_other():
    assert not [
        f"{name} imports {other}"
        for name in OPERATIONS
        for other in own_imports(name)
        if other in OPERATIONS
    ]


def test_imports_are_seen():
    """The rules above would hold for anything if no import were found."""
    assert set(own_imports("compilation.specialisations")) >= {"runtime.launch", "errors"}
    assert set(own_imports("ops.reshape_and_cache")) >= {"cpu.__init__", "runtime.plans"}
    assert "ops.shared.blocks" in set(own_imports("ops.copy_blocks"))
    assert "ops.swap_blocks" in set(own_imports("__init__"))


def test_only_env_reads_the_environment():
    def reads(node):
        if isinstance(node, ast.ImportFrom):
            return node.module == "os"
        return isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")

    assert [name for name in SOURCES if any(map(reads, nodes(name)))] == ["runtime.env"]


def test_frameworks_are_not_imported_for_the_user():
    """torch by integrations alone; CuPy only inside functions, when a GPU is about to be used."""
    frameworks = {"torch", "jax", "cupy", "cupyx", "cupy_backends", "cuda"}
    for name in SOURCES:
        allowed = {"torch"} if name in MAY_IMPORT_TORCH else set()
        assert not frameworks & set(outside_packages(name, at_import=True)) - allowed, name
        assert not {"torch", "jax"} & set(outside_packages(name)) - allowed, name
        calls = {node.func.id for node in nodes(name)
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
        assert not calls & {"__import__", "import_module"}, name


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, cupy_cache\n"
        "frameworks = {'torch', 'cupy', 'cupyx', 'cupy_backends', 'jax', 'transformers'}\n"
        "print(*sorted(frameworks & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert not done.stdout.split()


def test_an_operation_has_its_kernel_and_its_test():
    """A kernel of the same stem, or one that a room shares among operations; and a test."""
    stems = {path.stem for path in KERNELS}
    shared = {name for name in SOURCES if name.startswith("ops.shared.")}
    shared = {name for name in shared if "modules.Kernel(" in text_of(name)}
    for name in OPERATIONS:
        stem = name.rpartition(".")[2]
        assert stem in stems or shared & set(own_imports(name)), f"{name} has no kernel"
        assert (TESTS / f"test_{stem}.py").is_file(), f"{name} has no test of its name"


def test_the_package_offers_every_operation():
    """What takes a stream is one."""
    functions = [
        node
        for name in OPERATIONS
        for node in tree(name).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    offered = {f.name for f in functions if any(a.arg == "stream" for a in f.args.kwonlyargs)}
    assert len(offered) >= len(OPERATIONS)
    missing = sorted(offered - set(cupy_cache.__all__))
    assert not missing, f"import {missing} in cupy_cache/__init__.py, and name them in __all__"


def test_every_room_is_installed():
    """setup.cfg names each folder of the package."""
    config = configparser.ConfigParser()
    config.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    folders = [path.parent.relative_to(CHECKOUT) for path in PACKAGE.rglob("__init__.py")]
    expected = sorted(".".join(folder.parts) for folder in folders)
    assert config["options"]["packages"].split() == expected, "in setup.cfg"


def test_a_kernel_is_used_and_has_one_struct():
    """By the operation of its stem or, by name, by another module."""
    for path in KERNELS:
        assert [
            name
            for name in SOURCES
            if "modules.Kernel(" in text_of(name)
            and (name.rpartition(".")[2] == path.stem or f'"{path.stem}"' in text_of(name))
        ], f"{path.name} is not used"
        text = modules.expanded_source(path.stem)
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


# --- documents ------------------------------------------------------------------------------------

DOCUMENTS = [*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")]
PATH = re.compile(r"(?:[\w.-]+/)*[\w.-]+\.(?:py|cu|cuh|h|cpp|md|sh|cfg|txt|json)|(?:[\w.-]+/)+")


def documents():
    """(Name, text) of each."""
    return [(str(path.relative_to(CHECKOUT)), path.read_text("utf-8")) for path in DOCUMENTS]


def test_links_lead_to_files():
    missing = []
    for path in DOCUMENTS:
        links = re.findall(r"\]\(([^()\s]+)\)", path.read_text(encoding="utf-8"))
        for link in (link.partition("#")[0] for link in links if "://" not in link):
            if link and not (path.parent / link).exists():
                missing.append(f"{path.name}: {link}")
    assert not missing


def test_documents_name_files_that_exist():
    """X stands for an operation, such as copy_blocks."""
    missing = []
    for path, text in documents():
        for name in re.findall(r"`([^`\s]+)`", text):
            if not PATH.fullmatch(name):
                continue
            name = re.sub(r"\bX\b|(?<=_)X\b", "copy_blocks", name)
            if not any((folder / name).exists() for folder in (CHECKOUT, PACKAGE)):
                missing.append(f"{path}: {name}")
    assert not missing


def test_texts_name_what_there_is():
    """`cupy_cache.a.b` is a module or something in one; so is `a.b` for modules of `runtime`."""
    missing = []
    texts = itertools.chain(documents(), ((name, text_of(name)) for name in SOURCES))
    for where, text in texts:
        if where == "CHANGELOG.md":  # names what there was
            continue
        for name in re.findall(r"(?<![\w.])cupy_cache\.([a-z]\w*(?:\.\w+)*)", text):
            if not _is_defined(name):
                missing.append(f"{where}: cupy_cache.{name}")
    for where, text in documents():
        for first, second in re.findall(r"`(\w+)\.(\w+)[`(]", text):
            if f"runtime.{first}" in SOURCES and not _is_defined(f"runtime.{first}.{second}"):
                missing.append(f"{where}: {first}.{second}")
    assert not missing


def _is_defined(name):
    """Whether dotted names lead to a module, or to a word in the text of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = _module(parts[:length])
        if module in SOURCES:
            return all(re.search(rf"\b{part}\b", text_of(module)) for part in parts[length:])
    return parts[0] in cupy_cache.__all__


def test_the_page_of_operations_names_functions_that_exist():
    """In its table. The pages of each kind list them, as the package's docstring does."""
    rows = [line for line in dict(documents())["docs/api/index.md"].splitlines() if "| " in line]
    named = set(re.findall(r"`([a-z]\w+)`", "\n".join(rows)))
    assert named and not named - set(cupy_cache.__all__)
