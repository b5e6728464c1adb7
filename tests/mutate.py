# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Makes small mistakes in the kernels and in the package, and looks whether the tests see them.

    python tests/mutate.py --seed 7 --count 60 --paths kernels_cu
    python tests/mutate.py --seed 7 --count 40 --paths cupy_cache/ops cupy_cache/runtime

A mutant is one changed line of a copy of the checkout: an operator swapped, a number off by one, a
condition that always or never holds, a statement or a barrier left out, two arguments exchanged.
The tests that concern its file, which imports and includes tell, run on it until one fails: first
the default sample, then every combination that CI runs on NumPy and the emulated kernels, then what
reads the machine code. A mutant that survives all of them takes five minutes, most others one.

tests/mutants_that_survive.txt lists mutants that no test can or need see, each with the reason;
they are not run again. It also says which seeds were judged.
"""

import argparse
import ast
import collections
import functools
import importlib.util
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KNOWN = ROOT / "tests" / "mutants_that_survive.txt"
KERNELS, PACKAGE = "kernels_cu", "cupy_cache"
# The command line, on which no result depends; and what talks to CUDA, which only a GPU can test.
NOT_MUTATED = (
    f"{PACKAGE}/cli/", f"{PACKAGE}/_version.py", f"{PACKAGE}/__main__.py",
    f"{PACKAGE}/runtime/driver.py", f"{PACKAGE}/runtime/cuda.py",
    f"{PACKAGE}/runtime/allocations.py",
)  # fmt: skip


class Mutant(NamedTuple):
    """One change: in ``file`` at ``offset``, ``before`` becomes ``after``."""

    file: str
    offset: int
    before: str
    after: str

    def applied(self, text):
        """The file's text with the change."""
        end = self.offset + len(self.before)
        assert text[self.offset : end] == self.before
        return text[: self.offset] + self.after + text[end:]

    def lines(self, text):
        """The changed lines, before and after, without what surrounds them: what the mutant is
        known by wherever it moves."""
        start = text.rfind("\n", 0, self.offset) + 1
        end = text.find("\n", self.offset + len(self.before))
        before = text[start : end if end >= 0 else len(text)]
        at = self.offset - start
        after = before[:at] + self.after + before[at + len(self.before) :]
        return " ".join(before.split()), " ".join(after.split())


# --- mistakes -------------------------------------------------------------------------------------

NO_CODE = ("#", "static_assert", "template", "asm", '"', ":", "using")  # beginnings of lines
STATEMENT = re.compile(
    r"[\w.:>\[\]()-]+(?:<[^;]*>)?\(|[\w.:>\[\]()-]+ [-+*/|&]?= |\+\+|continue;|break;|return;"
)

SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
    "*": "+", "/": "*", "//": "*", "%": "/", "&&": "||", "||": "&&", "&": "|", "|": "&",
    "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+=", "and": "or", "or": "and", "in": "not in",
    "not in": "in", "is": "is not", "is not": "is",
}  # fmt: skip


def mutants_of(file, text):
    """All `Mutant`\\ s of a file."""
    found = _of_python(text) if file.endswith(".py") else _of_kernel(text)
    return sorted({Mutant(file, *change) for change in found if change[1] != change[2]})


def _of_kernel(text):
    """(offset, before, after) of each change of a CUDA source. Its style is taken for granted:
    spaces on both sides of operators, and none inside template arguments."""
    start = 0
    before = ""
    for line in text.splitlines(keepends=True):
        code = line.partition("//")[0]
        bare = code.strip()
        if bare and not bare.startswith(NO_CODE):
            for at, old, new in (*_of_code(code), *_statement(code, before)):
                yield start + at, old, new
        if bare:
            before = bare
        start += len(line)


def _of_code(code):
    for found in re.finditer(r" ([-+*/%&|<>=!]{1,2}) (?=\S)", code):
        if found[1] in SWAPS:
            yield found.start(1), found[1], SWAPS[found[1]]
    for found in re.finditer(r"(?<![\w.])(\d+)(?![\w.])", code):
        number = int(found[1])
        yield found.start(), found[1], str(number + 1)
        if number > 1:
            yield found.start(), found[1], str(number - 1)
    for found in re.finditer(r"(?<![\w.])(\d+\.\d+)(?=f)", code):
        yield found.start(), found[1], str(float(found[1]) + 1)
    for found in re.finditer(r"\b(true|false)\b", code):
        yield found.start(), found[1], "false" if found[1] == "true" else "true"
    for found in re.finditer(r"\bif (?:constexpr )?\(", code):
        end = _closing(code, found.end())
        if end:
            for value in ("true", "false"):
                yield found.end(), code[found.end() : end], value
    for found in re.finditer(r"[\w>]\(([^()]*, [^()]*)\)", code):
        if "__device__" not in code:  # where a function begins
            yield from _exchanged(found.start(1), found[1].split(", "))
    for found in re.finditer(r"(?<=[=(,?:&|] )!(?=\w)|(?<=\()!(?=\w)", code):
        yield found.start(), "!", ""


def _statement(code, before):
    """A statement that stands on one line by itself, and is no declaration."""
    bare = code.strip()
    alone = before.endswith((";", "{", "}", "unroll", ")")) and bare.endswith(";")
    declares = bare.startswith(("return ", "static", "if ", "for "))
    if alone and STATEMENT.match(bare) and not declares:
        yield code.index(bare), bare, ";"


def _closing(code, start):
    """Where the parenthesis that opens before ``start`` closes; None if on another line."""
    depth = 1
    for at in range(start, len(code)):
        depth += (code[at] == "(") - (code[at] == ")")
        if not depth:
            return at
    return None


def _exchanged(start, items):
    """Neighbouring arguments, which ", " separates, exchanged."""
    for index in range(len(items) - 1):
        at = start + sum(len(item) + 2 for item in items[:index])
        one, other = items[index : index + 2]
        yield at, f"{one}, {other}", f"{other}, {one}"


def _of_python(text):
    """(offset, before, after) of each change of a module. Messages, annotations, docstrings and
    representations stay as they are."""
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))
    raw = text.encode()

    def place(line, column):
        return len(raw[: lines[line - 1] + column].decode())

    def span(node):
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    def between(left, right, old):
        start, end = span(left)[1], span(right)[0]
        at = text.find(old, start, end)
        if at >= 0:
            yield at, old, SWAPS[old]

    def visit(node):
        if isinstance(node, (ast.Raise, ast.JoinedStr, ast.AnnAssign, ast.arg, ast.Import)):
            return
        if isinstance(node, ast.FunctionDef) and node.name == "__repr__":
            return
        start, end = span(node) if hasattr(node, "lineno") else (0, 0)
        source = text[start:end]
        match node:
            case ast.BinOp(left=left, right=right, op=op):
                yield from between(left, right, SYMBOLS.get(type(op), "\0"))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield from between(left, right, SYMBOLS.get(type(op), "\0"))
            case ast.BoolOp(values=values, op=op):
                for left, right in itertools.pairwise(values):
                    yield from between(left, right, SYMBOLS[type(op)])
            case ast.Constant(value=bool(value)):
                yield start, source, str(not value)
            case ast.Constant(value=int(value)) if source.isdigit():
                yield start, source, str(value + 1)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield start, source, text[span(operand)[0] : end]
            case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Constant):
                at, stop = span(test)
                for value in ("True", "False"):
                    yield at, text[at:stop], value
            case ast.Call(args=args) if "\n" not in source:
                for one, other in itertools.pairwise(args):
                    (a, b), (c, d) = span(one), span(other)
                    yield a, text[a:d], text[c:d] + text[b:c] + text[a:b]
            case ast.Expr(value=ast.Call()) | ast.AugAssign() if "\n" not in source:
                yield start, source, "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) if "\n" not in source:
                yield start, source, "pass"
        for child in _children(node):
            yield from visit(child)

    yield from visit(ast.parse(text))


def _children(node):
    for name, value in ast.iter_fields(node):
        if name in ("returns", "annotation", "decorator_list", "defaults"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


SYMBOLS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%",
    ast.BitAnd: "&", ast.BitOr: "|", ast.LShift: "<<", ast.RShift: ">>", ast.And: "and",
    ast.Or: "or", ast.In: "in", ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not",
}  # fmt: skip


# --- which tests ----------------------------------------------------------------------------------


@functools.cache
def files():
    """All files that can be mutated."""
    found = (
        path.relative_to(ROOT).as_posix()
        for folder, pattern in ((KERNELS, "*.cu*"), (PACKAGE, "*.py"))
        for path in sorted((ROOT / folder).rglob(pattern))
    )
    return [f for f in found if not f.startswith(NOT_MUTATED) and not f.endswith("__init__.py")]


@functools.cache
def _users():
    """{file: those that include it, import it, or launch its kernel}."""
    users = collections.defaultdict(set)
    stems = {Path(f).stem: f for f in files() if f.endswith(".cu")}
    for file in files():
        text = (ROOT / file).read_text(encoding="utf-8")
        for header in re.findall(r'#include "(cupy_cache/[\w./]+)"', text):
            users[f"{KERNELS}/include/{header}"].add(file)
        if not file.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = Path(file).parents[node.level - 1] / (node.module or "").replace(".", "/")
                for name in (base, *(base / alias.name for alias in node.names)):
                    users[f"{name.as_posix()}.py"].add(file)
                    if name.name == "cpu":  # a package that stands for its modules
                        called = set(re.findall(r"\bcpu\.(\w+)", text))
                        for module in (ROOT / name).glob("*.py"):
                            if called & _functions(module):
                                users[module.relative_to(ROOT).as_posix()].add(file)
        # A kernel's file is named as the module that launches it is, or as a template in it, or is
        # what it calls by name.
        for stem, kernel in stems.items():
            named = Path(file).stem == stem or f'"{stem}<' in text or f'"{stem}"' in text
            if "modules.Kernel(" in text and named:
                users[kernel].add(file)
    return users


def _functions(path):
    """Names of a module's functions."""
    return set(re.findall(r"^def (\w+)", path.read_text(encoding="utf-8"), re.M))


def _reach(file, rooms=("",)):
    """``file`` and all that use it, the nearest first, as far as they are in these ``rooms``."""
    seen, queue = [], collections.deque([file])
    while queue:
        one = queue.popleft()
        if one not in seen:
            seen.append(one)
            queue.extend(sorted(user for user in _users()[one] if user.startswith(rooms)))
    return seen


# Beyond these, what runs is no longer about one kernel.
ROOMS_OF_KERNELS = (KERNELS, f"{PACKAGE}/ops/", f"{PACKAGE}/attention/")
OTHERWISE_NAMED = {"paged_kv_cache": "test_kv_cache.py"}
LONG = ("test_compile_all.py", "test_surface.py")
# Tests of what everything is made of, beside those that are named after a module.
MORE_TESTS = {
    "runtime": (
        "test_histories.py", "test_threads.py", "streams", "test_dispatch.py", "test_torch_ops.py",
        "test_error_state.py", "test_warmup.py", "test_memory.py", "test_exports.py",
        "test_shared_memory.py",
    ),
    "ops": ("test_exact_ends.py", "test_histories.py", "test_threads.py", "test_warmup.py"),
    "attention": ("test_histories.py", "test_warmup.py"),
    "bookkeeping": ("test_block_pool.py", "test_block_tables.py", "test_csr.py"),
    "integrations/transformers": ("test_transformers.py", "test_engine.py"),
    "compilation": ("test_warmup.py", "test_compile_all.py"),
    "cpu": (),
    "integrations": ("test_torch_ops.py", "test_compiled_code.py", "test_vllm.py"),
    "kv_cache": (
        "test_kv_cache.py", "test_allocate.py", "test_per_token_head_cache.py", "test_options.py",
        "test_histories.py",
    ),
}  # fmt: skip


def tests_for(file):
    """The files of tests that concern a file: first those named after it, or after what uses it."""
    tests = ROOT / "tests"
    rooms = ROOMS_OF_KERNELS if file.startswith(KERNELS) else ("",)
    stems = [Path(one).stem for one in _reach(file, rooms)]
    names = [OTHERWISE_NAMED.get(stem, f"test_{stem}.py") for stem in stems]
    found = [name for name in names if (tests / name).exists()]
    if file.startswith(KERNELS):
        more = ("test_exact_ends.py", "test_cases.py", "test_ptx.py", "test_overlap.py")
        including = [
            path.name
            for path in sorted(tests.glob("test_e*.py"))  # not those of compiling
            if f"cupy_cache/{Path(file).name}" in path.read_text(encoding="utf-8")
        ]
        return list(dict.fromkeys([*found, *including, *more]))
    rooms = Path(file).relative_to(PACKAGE).parents
    room = next((r for r in map(Path.as_posix, rooms) if r in MORE_TESTS), "runtime")
    more = [name for name in MORE_TESTS[room] if (tests / name).exists()]
    importing = [path.name for path in sorted(tests.glob("test_*.py")) if _imports(path, file)]
    importing = [name for name in importing if name not in LONG]
    return list(dict.fromkeys([*found[:1], "test_cases.py", *importing, *more, *found[1:]]))


def _imports(path, file):
    """Whether a file of tests imports a module by its name."""
    package, name = str(Path(file).parent).replace("/", "."), Path(file).stem
    return name in _imported(path)[package]


@functools.cache
def _imported(path):
    """{package: the names that a file of tests imports from it}."""
    found = collections.defaultdict(set)
    text = path.read_text("utf-8")
    for package, names in re.findall(r"^ *from (\S+) import (\([^)]*|.*)", text, re.M):
        found[package].update(re.findall(r"\w+", names))
    return found


def stages(file):
    """What pytest gets, one after the other until a test fails."""
    tests = [f"tests/{name}" for name in tests_for(file)]
    if file.startswith(KERNELS):
        # Kernels are not run on arrays of the CPU.
        only = ["-k", "not (numpy or torch-cpu or dlpack)"]
        stems = [Path(f).stem for f in _reach(file) if f.endswith(".cu")]
        return [*tests, *only], [*tests, *only, "--everything"], _code(stems)
    slow = ["-k", "not (torch-cpu or dlpack or every_16_bit or test_torch_ops)"]
    nearest = [*tests[:12], "tests/test_messages.py", "tests/test_surface.py"]
    found = tests, [*nearest, *slow, "--everything"]
    # A plan that chooses another kernel may give the same bytes.
    stems = [Path(f).stem for f, users in _users().items() if f.endswith(".cu") and file in users]
    return (*found, _code(stems)) if stems else found


def _code(stems):
    """What pytest gets to read the machine code of these sources, on one architecture."""
    chosen = " or ".join(f"[{stem}-90- or [90-{stem}-few" for stem in stems)
    return ["tests/test_compile_all.py", "tests/test_resources.py", "-k", chosen, "--everything"]


# --- running --------------------------------------------------------------------------------------


def copied(folder):
    """A copy of the checkout's tracked files, and of new ones that are not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def compiles(folder, file):
    """Whether a mutated kernel source still is one, for an instance of each that includes it."""
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import emulator, make_resources\n"
        "for stem in sys.argv[1:]:\n"
        "    for kernel in make_resources.families()[stem][:1]:\n"
        "        emulator.check_syntax(kernel)\n"
    )
    stems = [Path(f).stem for f in _reach(file) if f.endswith(".cu")]
    return _run([sys.executable, "-c", program, *stems], folder, 300) == 0


def _run(command, folder, limit, own_kernels=True):
    """A command's status, or None where it took longer than ``limit`` seconds. ``own_kernels``:
    those that are compiled are kept apart from the user's."""
    environment = {
        **os.environ, "PYTHONPATH": str(folder),
        "CUPYCACHE_TEST_SEED": os.environ.get("CUPYCACHE_TEST_SEED", "20261123"),
        "CUPYCACHE_TEST_RESOURCES": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    if own_kernels:
        environment["XDG_CACHE_HOME"] = str(folder.parent / "cache")
    with (folder.parent / "output").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=lambda: os.nice(10),
        )  # fmt: skip
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def outcome(folder, mutant, limit, workers):
    """What became of it: "killed by" a test, "survived", "undecided", or "invalid": no source."""
    in_transformers = f"{PACKAGE}/integrations/transformers/"
    if mutant.file.startswith(in_transformers) and not importlib.util.find_spec("transformers"):
        return "undecided: transformers is not installed"
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutant.applied(text), encoding="utf-8")
    try:
        if mutant.file.startswith(KERNELS) and not compiles(folder, mutant.file):
            refused = "UnknownPTX" in (folder.parent / "output").read_text(errors="replace")
            return "killed by tests/test_ptx.py" if refused else "invalid"
        parallel = ["-n", str(workers)] if workers > 1 else []
        for arguments in stages(mutant.file):
            pytest = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *parallel]
            own_kernels = mutant.file.startswith(KERNELS)
            status = _run([*pytest, *arguments], folder, limit, own_kernels)
            if status is None:
                return "undecided: it took too long"
            if status not in (0, 5):  # 5: nothing was selected
                said = (folder.parent / "output").read_text(errors="replace")
                failed = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
                return f"killed by {failed[1] if failed else said[-200:]}"
        return "survived"
    finally:
        path.write_text(text, encoding="utf-8")


def known():
    """{(file, line before, line after): why the tests do not see it}."""
    found = {}
    for entry in KNOWN.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in entry.splitlines() if line and not line.startswith("#")]
        if lines:
            file, before, after, why = (line.partition(": ")[2] for line in lines)
            found[file, before, after] = why
    return found


def sample(seed, count, paths):
    """``count`` mutants of the files under ``paths``, each file's as likely as it has many."""
    texts = {
        file: (ROOT / file).read_text(encoding="utf-8")
        for file in files()
        if any(file == path or file.startswith(path.rstrip("/") + "/") for path in paths)
    }
    everything = [mutant for file, text in texts.items() for mutant in mutants_of(file, text)]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    return [(mutant, mutant.lines(texts[mutant.file])) for mutant in chosen]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--paths", nargs="+", default=[KERNELS, PACKAGE])
    parser.add_argument("--limit", type=float, default=600, help="seconds of one run of pytest")
    parser.add_argument("--workers", type=int, default=1, help="processes of one run of pytest")
    parser.add_argument("--list", action="store_true", help="show the mutants, run nothing")
    options = parser.parse_args()
    listed, counts, survivors = known(), collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "checkout"
        if not options.list:
            copied(folder)
        for mutant, (before, after) in sample(options.seed, options.count, options.paths):
            begin = time.monotonic()
            result = "listed" if (mutant.file, before, after) in listed else None
            result = result or ("-" if options.list else None)
            result = result or outcome(folder, mutant, options.limit, options.workers)
            counts[re.match(r"\w+|-", result)[0]] += 1
            taken = f"{time.monotonic() - begin:.0f} s"
            print(f"file: {mutant.file}\nbefore: {before}\nafter: {after}\n= {result}, {taken}\n")
            sys.stdout.flush()
            if result == "survived":
                survivors.append((mutant, before, after))
    print(", ".join(f"{number} {name}" for name, number in sorted(counts.items())))
    judged = counts["killed"] + counts["survived"]
    if judged:
        print(f"{100 * counts['killed'] / judged:.1f} % of {judged} were killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
