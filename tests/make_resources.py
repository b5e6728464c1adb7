# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/resources/<stem>.txt: what each kernel of ordinary models uses, by its machine code.

tests/test_resources.py compares the files with what this makes, so that a review sees a spill more
or a vector access less. Needs no GPU.

    python tests/make_resources.py [STEM ...]

The columns, for each architecture; a dot is none:

- reg: registers of a thread
- stack: bytes of stack and other local memory of a thread
- spill: instructions that access local memory
- shared: bytes of static shared memory of a block
- early: loads of global memory before the first branch behind one. These are under way together; a
  load less may be one that waits for another's result
- ld16, st16: instructions that load or store 16 bytes of global memory
- ld32, st32: the same for 32 bytes, where there are any
"""

import concurrent.futures
import functools
import importlib.metadata
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

from machine_code import (
    CONVERTING,
    INDEXER_SHAPE,
    MLA_SHAPE,
    ONE_SHAPE,
    compile_cubins,
    instructions,
    resources,
    template_parameters,
)

from cupy_cache.compilation.specialisations import specialisations

FOLDER = Path(__file__).resolve().parent / "resources"
COMMAND = "python tests/make_resources.py"
ARCHITECTURES = (80, 90, 100)
PAIRS = {"layouts": ["NHD", "HND", "x-packed"]}
LATENTS = {"layouts": ["rows"], "head_size_v": 512}
MODELS = (
    (ONE_SHAPE, PAIRS),
    (ONE_SHAPE, {**PAIRS, "kv_cache_dtype": "fp8", "ops": CONVERTING}),
    (ONE_SHAPE, {**PAIRS, "kv_cache_dtype": "int8", "ops": CONVERTING}),
    *(
        (ONE_SHAPE, {**PAIRS, "kv_cache_dtype": name, "ops": ["paged_attention"]})
        for name in ("fp8", "int8", "fp8_per_token_head", "int8_per_token_head")
    ),
    (MLA_SHAPE, LATENTS),
    (MLA_SHAPE, {**LATENTS, "num_heads": 128, "ops": ["paged_attention_mla"]}),
    (MLA_SHAPE, {**LATENTS, "kv_cache_dtype": "fp8"}),
    (MLA_SHAPE, {**LATENTS, "kv_cache_dtype": "fp8_ds_mla"}),
    (INDEXER_SHAPE, {"layouts": ["indexer"]}),
)
# Columns that are left out where they would be empty.
WIDEST = ("ld32", "st32")
SEPARATOR = " | "


@functools.cache
def families():
    """{stem: its kernels, each once, in the order of their expressions}."""
    found = {}
    for shape, named in MODELS:
        for kernel in specialisations(*shape, **named):
            found.setdefault(kernel.stem, {})[kernel.expression] = kernel
    return {
        stem: [kernels[expression] for expression in sorted(kernels)]
        for stem, kernels in sorted(found.items())
    }


def path(stem):
    return FOLDER / f"{stem}.txt"


def nvrtc():
    """The version of the compiler in use, as precisely as it is known. Registers depend on it."""
    from cupy.cuda import nvrtc

    version = "{}.{}".format(*nvrtc.getVersion())
    try:
        wheel = importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return version
    # Another than the wheel's may have been found, such as the system's.
    return wheel if minor(wheel) == version else version


def minor(version):
    """The major and minor version of a full one."""
    return ".".join(version.split(".")[:2])


def made_with(text):
    """The version of NVRTC that a file names."""
    return re.match(r"NVRTC (\S+)\n", text)[1]


def measured(usage, text):
    """A kernel's columns, from its resources and its instructions."""

    def count(pattern):
        return len(re.findall(pattern, text))

    return {
        "reg": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "spill": count(r"\b(?:LDL|STL)\b"),
        "shared": usage["SHARED"],
        "early": early_loads(text),
        "ld16": count(r"\bLDG\S*\.128\b"),
        "st16": count(r"\bSTG\S*\.128\b"),
        "ld32": count(r"\bLDG\S*\.256\b"),
        "st32": count(r"\bSTG\S*\.256\b"),
    }


def early_loads(text):
    """How many loads are issued before the first branch that follows a load."""
    found = re.findall(r"\b(LDG|BRA|CALL|BRX)\b", text)
    first = found.index("LDG") if "LDG" in found else len(found)
    return len(list(itertools.takewhile(lambda name: name == "LDG", found[first:])))


def read(kernels, architecture):
    """{expression: its columns}. Kernels with one source text are compiled and read together."""
    groups = {}
    for kernel in kernels:
        groups.setdefault(kernel.source(), []).append(kernel)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        for group in groups.values():
            content, names = compile_cubins(group, architecture)
            cubin.write_bytes(content)
            usage, code = resources(cubin), instructions(cubin)
            for expression, name in names.items():
                found[expression] = measured(usage[name], code[name])
    return found


EVERY = slice(None)


def table(kernels, architectures=ARCHITECTURES, rows=EVERY):
    """The text of a file; ``rows``: of these kernels alone."""
    heading, kernels = signatures(kernels), kernels[rows]
    architectures = [a for a in architectures if all(kernel.runs_on(a) for kernel in kernels)]
    blocks = [block(kernels, architecture) for architecture in architectures]
    # The numbers come first: a longer expression moves none of them.
    blocks.append(["", "", *(readable(kernel.expression) for kernel in kernels)])
    lines = map(SEPARATOR.join, zip(*blocks))
    lines = [f"NVRTC {nvrtc()}", "", *heading, "", *lines]
    return "".join(f"{line.rstrip(SEPARATOR)}\n" for line in lines)


def block(kernels, architecture):
    """The columns of an architecture: two lines of headings, and one for each kernel."""
    found = read(kernels, architecture)
    rows = [found[kernel.expression] for kernel in kernels]
    shown = [name for name in rows[0] if name not in WIDEST or any(row[name] for row in rows)]
    widths = {name: max(len(name), 4) for name in shown}
    heading = " ".join(f"{name:>{width}}" for name, width in widths.items())
    return [
        f"sm_{architecture}".ljust(len(heading)),
        heading,
        *(" ".join(f"{row[name] or '.':>{widths[name]}}" for name in shown) for row in rows),
    ]


def in_columns(text):
    """The architectures that a file tells of."""
    return [int(number) for number in re.findall(r"\bsm_(\d+) *(?:\||$)", text, re.MULTILINE)]


def architectures(stem):
    """Those that the file of ``stem`` tells of; where there is none yet, all."""
    file = path(stem)
    return in_columns(file.read_text(encoding="utf-8")) if file.exists() else ARCHITECTURES


def only(text, architectures, rows=EVERY):
    """The text of a file with the columns of these architectures, and these rows, alone."""
    kept = [*(architecture in architectures for architecture in in_columns(text)), True]
    lines = []
    for line in text.splitlines():
        if SEPARATOR in line:
            line = SEPARATOR.join(itertools.compress(line.split(SEPARATOR), kept))
        lines.append(line.rstrip())
    first = 2 + max(at for at, line in enumerate(lines) if line.startswith("sm_"))
    lines[first:] = lines[first:][rows]
    return "".join(f"{line}\n" for line in lines)


def signatures(kernels):
    """What the template arguments of the functions among these mean."""
    functions = dict(template_parameters(kernel) for kernel in kernels)
    return [f"{name}<{', '.join(names)}>" for name, names in functions.items()]


def readable(expression):
    return expression.replace("cupy_cache::", "").replace("long long", "i64")


def main(stems):
    chosen = stems or list(families())
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = list(pool.map(table, (families()[stem] for stem in chosen)))
    FOLDER.mkdir(exist_ok=True)
    for stem, text in zip(chosen, tables):
        path(stem).write_text(text, encoding="utf-8")
    if not stems:
        for file in FOLDER.glob("*.txt"):
            if file.stem not in families():
                file.unlink()
    print(f"{FOLDER.name}: {len(chosen)} files, NVRTC {nvrtc()}")


if __name__ == "__main__":
    main(sys.argv[1:])
