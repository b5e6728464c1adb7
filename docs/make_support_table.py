# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writes docs/support.md: operation x layout x dtype x framework x backend.

Nothing is listed here by hand. Whether an operation takes a combination is asked of the operation
itself, which gets the calls that `warmup` makes of it (`cupy_cache.compilation`). Which kinds
of arrays it takes is what the tests run its common case on (tests/cases.py, tests/conftest.py).
tests/test_support_table.py compares the file with what this makes, and makes each marked call with
real arrays.

    python docs/make_support_table.py
"""

import functools
import importlib
import inspect
import sys
from pathlib import Path

import cupy_cache as cc
from cupy_cache import errors
from cupy_cache.compilation.calls import OPERATIONS
from cupy_cache.compilation.specialisations import specialisations
from cupy_cache.runtime import formats

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "support.md"
# Heads, head size, block size, head size of the values: like those of models with the layout, and
# small.
SHAPE, SHAPES = (2, 64, 16, 64), {"rows": (1, 576, 16, 512), "indexer": (1, 128, 16, 128)}


def cache_formats():
    """The names of each format that caches may have, the alias to show first."""
    named = {}
    for name, fmt in formats.CACHE_FORMATS.items():
        named.setdefault(fmt, []).append(name)
    by_token = formats.PER_TOKEN_HEAD_FORMATS.keys() - formats.CACHE_FORMATS
    return [*named.values(), [formats.FP8_DS_MLA], *([name] for name in sorted(by_token))]


def arguments(layout, dtype, kv_cache_dtype):
    """What `specialisations` takes for a model with such caches; ``layout`` None: for none."""
    heads, size, block_size, value_size = SHAPES.get(layout, SHAPE)
    named = {"head_size_v": value_size, "kv_cache_dtype": kv_cache_dtype}
    return (heads, size, block_size, dtype), {**named, "layouts": [layout] if layout else []}


def takes(op, layout, dtype, kv_cache_dtype):
    """Whether the operation has kernels for this."""
    shape, named = arguments(layout, dtype, kv_cache_dtype)
    try:
        return bool(list(specialisations(*shape, **named, ops=[op])))
    except errors.CupyCacheError:
        return False


def operations():
    """The public functions that are operations on arrays."""
    return sorted(name for name in _cases() if name in cc.__all__)


def needs_no_layout(op):
    """Whether the operation has no cache among its arguments, or does not mind what it is."""
    return op not in OPERATIONS or takes(op, None, "bfloat16", "auto")


@functools.cache
def combinations():
    """(Operation, layout, names of the format, dtypes of the keys and values) that are marked."""
    found = []
    for op in operations():
        for layout in () if needs_no_layout(op) else formats.LAYOUTS:
            for names in cache_formats():
                dtypes = [d for d in formats.DTYPES if takes(op, layout, d, names[0])]
                if dtypes:
                    found.append((op, layout, names, dtypes))
    return found


def test_module(op):
    """The file of tests of the operation, from the checkout's root."""
    module = inspect.getmodule(getattr(cc, op)).__name__.rpartition(".")[2]
    return f"tests/test_{module}.py"


def worlds():
    """The kinds of arrays that every test runs on, by their names in tests/conftest.py."""
    return tuple(_from_tests("conftest")._WORLDS)


def _cases():
    """The operations that have a common case."""
    return {name.partition("-")[0] for name in _from_tests("cases").CASES}


def _from_tests(name):
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module(name)


# --- the page -------------------------------------------------------------------------------------

TEXT = """\
# What is supported

Written by `docs/make_support_table.py` from the code's own tables; a test compares the two, and
makes every marked call with real arrays.

## Layouts and dtypes

{layouts}

A cell names the dtypes of the model's keys and values with which the operation takes the caches;
"any" is every dtype of `cupy_cache.runtime.formats.DTYPES`: booleans, and integers and floats of 8
to 64 bits. On the CPU attention takes float32, too. Every marked call runs in a test by NumPy on
the CPU; on machines with a GPU, also by the CUDA kernel there, with a dtype of each size for "any".

### Operations that have to know the kv_cache_dtype

{formats}

{converting}

### Operations to which it makes no difference

They move bytes, or have formats of their own.

{moving}

## Frameworks and backends

The kinds of arrays that the tests run every operation on. On CPU arrays NumPy does the work;
`emulated` runs the CUDA kernels on the CPU; the last three are on real GPUs. `dlpack` is an object
with nothing but DLPack, as which the arrays of any framework can come.

{frameworks}
"""


def page():
    """The text of the file."""
    families = cache_formats()
    found = {(op, layout, names[0]): dtypes for op, layout, names, dtypes in combinations()}
    pairs = dict.fromkeys((op, layout) for op, layout, _ in found)
    cells = {pair: [_dtypes(found.get((*pair, n[0]))) for n in families] for pair in pairs}
    knowing = {op for (op, _), row in cells.items() if len(set(row)) > 1}
    moving = [op for op in dict.fromkeys(op for op, _ in pairs) if op not in knowing]
    kinds = worlds()
    return TEXT.format(
        formats=_table(
            ["Column", "kv_cache_dtype"],
            [[names[0], ", ".join(f"`{name}`" for name in names)] for names in families],
        ),
        layouts=_table(
            ["Layout", "Key cache", "Value cache", "In memory", "Used by"],
            [[cell.replace("|", "\\|") for cell in layout] for layout in formats.LAYOUTS.values()],
        ),
        converting=_table(
            ["Operation", "Layout", *(names[0] for names in families)],
            [[f"`{op}`", layout, *row] for (op, layout), row in cells.items() if op in knowing],
        ),
        moving=_table(
            ["Operation", *formats.LAYOUTS],
            [
                [f"`{op}`", *(cells.get((op, layout), [""])[0] for layout in formats.LAYOUTS)]
                for op in moving
            ],
        ),
        frameworks=_table(
            ["Operation", *kinds, "Tests"],
            [
                [f"`{op}`", *["yes"] * len(kinds), f"[{test_module(op)}](../{test_module(op)})"]
                for op in operations()
            ],
        ),
    )


def _dtypes(dtypes):
    if dtypes is None:
        return ""
    return "any" if len(dtypes) == len(formats.DTYPES) else ", ".join(dtypes)


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(f"{FILE.relative_to(ROOT)}: {len(operations())} operations")
