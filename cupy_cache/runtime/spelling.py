# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""C++ spelling of dtypes and other template arguments of the kernels."""

# Index types.
INDEX_NAMES = {"int32": "int", "int64": "long long"}

# Element types (elements.cuh).
ELEMENT_NAMES = {
    "float32": "cupy_cache::F32",
    "float16": "cupy_cache::F16",
    "bfloat16": "cupy_cache::BF16",
    "float8_e4m3fn": "cupy_cache::E4M3",
    "float8_e5m2": "cupy_cache::E5M2",
    "int8": "cupy_cache::I8",
}


def indices(*arrays):
    """The types of index arrays, as template arguments; ``void`` for None."""
    return ", ".join("void" if a is None else INDEX_NAMES[a.dtype.name] for a in arrays)


def element(dtype):
    """The element type of a `formats.DType`."""
    return ELEMENT_NAMES[dtype.name]


def instance(name, *arguments):
    """An instance of the template ``name``, with numbers, bools, and C++ text as arguments."""
    return f"{name}<{', '.join(map(_argument, arguments))}>"


def _argument(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def quantiser(source, stored, vector_bytes):
    """The converter (convert.cuh) from ``source`` elements to vectors of ``vector_bytes`` with
    ``stored`` elements; the one that copies, where ``stored`` is None."""
    if stored is None:
        return f"cupy_cache::Copy<{vector_bytes}>"
    types = f"{ELEMENT_NAMES[source.name]}, {ELEMENT_NAMES[stored.name]}"
    return f"cupy_cache::Quantise<{types}, {vector_bytes}>"


def dequantiser(stored, target, vector_bytes):
    """The converter from ``stored`` elements to vectors of ``vector_bytes`` with ``target``
    elements; the one that copies, where ``stored`` is None."""
    if stored is None:
        return f"cupy_cache::Copy<{vector_bytes}>"
    types = f"{ELEMENT_NAMES[stored.name]}, {ELEMENT_NAMES[target.name]}"
    return f"cupy_cache::Dequantise<{types}, {vector_bytes}>"
