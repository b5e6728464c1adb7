# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The dtype table and the layout table.

Legend of the layouts: NB blocks, BS slots of a block, H key/value heads, D head size, NT tokens,
x elements in 16 bytes of the cache, E entry size, Q elements that share a scale. A *slot* is
``block * BS + offset``: one token's place.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from .. import errors


class DType(NamedTuple):
    """An element type: its name (NumPy's, ml_dtypes' and torch's agree), its size in bytes, its
    DLPack (code, bits), the NumPy dtype that computes with it and the unsigned integer dtype that
    only carries its bits."""

    name: str
    bytes: int
    dlpack: tuple
    numpy: np.dtype
    bits: np.dtype


def _dtype(name, dlpack_code, numpy):
    numpy = np.dtype(numpy)
    size = numpy.itemsize
    return DType(name, size, (dlpack_code, 8 * size), numpy, np.dtype(f"u{size}"))


# DLPack 1.1 type codes: 0 int, 1 uint, 2 float, 4 bfloat, 6 bool, 10 float8_e4m3fn, 12 float8_e5m2.
DTYPES = {
    d.name: d
    for d in (
        _dtype("bool", 6, np.bool_),
        _dtype("int8", 0, np.int8),
        _dtype("int16", 0, np.int16),
        _dtype("int32", 0, np.int32),
        _dtype("int64", 0, np.int64),
        _dtype("uint8", 1, np.uint8),
        _dtype("uint16", 1, np.uint16),
        _dtype("uint32", 1, np.uint32),
        _dtype("uint64", 1, np.uint64),
        _dtype("float16", 2, np.float16),
        _dtype("float32", 2, np.float32),
        _dtype("float64", 2, np.float64),
        _dtype("bfloat16", 4, ml_dtypes.bfloat16),
        _dtype("float8_e4m3fn", 10, ml_dtypes.float8_e4m3fn),
        _dtype("float8_e5m2", 12, ml_dtypes.float8_e5m2),
    )
}
BY_DLPACK = {d.dlpack: d for d in DTYPES.values()}
FLOAT32, INT32, INT64 = (DTYPES[n] for n in ("float32", "int32", "int64"))
UINT8, E4M3 = DTYPES["uint8"], DTYPES["float8_e4m3fn"]
FLOATS = tuple(DTYPES[n] for n in ("float16", "bfloat16", "float32"))
INDICES = tuple(DTYPES[n] for n in ("int32", "int64"))
# The dtypes of caches that hold bytes of several types.
BYTES = tuple(d for d in DTYPES.values() if d.bytes == 1 and d.name != "bool")


class Layout(NamedTuple):
    """A cache layout: its name, the logical dimensions of key and value caches, the order of those
    dimensions in memory where it differs, and who uses it."""

    name: str
    key: str
    value: str
    memory: str
    used_by: str


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("NHD", "NB BS H D", "NB BS H D", "as written", "vLLM, FlashInfer, SGLang"),
        Layout("HND", "NB BS H D", "NB BS H D", "NB H BS D", "vLLM, FlashInfer, SGLang"),
        Layout(
            "packed",
            "NB BS H D",
            "NB BS H D",
            "NB, BS, H in any order, then K|V",
            "vLLM 0.33 pages",
        ),
        Layout("x-packed", "NB H D/x BS x", "NB H D BS", "as written", "vLLM paged attention"),
        Layout("rows", "NB BS E", "", "as written", "MLA caches"),
        Layout(
            "indexer",
            "NB BS D+4D/Q",
            "",
            "NB, BS D, BS 4D/Q: a block's keys, then its scales",
            "vLLM, SGLang: sparse attention",
        ),
    )
}


class CacheAxes(NamedTuple):
    """The axes of one cache: the names of its dimensions, the axes that together run over the slots
    of a block, and those of a token's elements (None: all others). The first axis is the blocks."""

    dims: str
    slots: tuple
    token: tuple | None


_SLOTS_FIRST = CacheAxes("num_blocks block_size ...", (1,), None)
CACHE_AXES = {
    "NHD": _SLOTS_FIRST,
    "HND": _SLOTS_FIRST,
    "packed": _SLOTS_FIRST,
    "rows": _SLOTS_FIRST,
    "x-packed-key": CacheAxes("num_blocks num_kv_heads _ block_size x", (3,), (1, 2, 4)),
    "x-packed-value": CacheAxes("num_blocks num_kv_heads head_size block_size", (3,), (1, 2)),
    "interleaved-value": CacheAxes("num_blocks num_kv_heads _ head_size x", (2, 4), (1, 3)),
}


# Entries of "fp8_ds_mla": elements of the latent and the rope part, bytes of an entry, and the byte
# where the rope part begins.
FP8_DS_MLA = "fp8_ds_mla"
DS_LATENT, DS_ROPE, DS_ENTRY_BYTES, DS_ROPE_AT = 512, 64, 656, 528


class CacheFormat(NamedTuple):
    """What a ``kv_cache_dtype`` string means: the element type that is stored (None: elements are
    copied as they are), and the dtypes that such a cache may have."""

    stored: DType | None
    storage: tuple


def _stored(name):
    return CacheFormat(DTYPES[name], (DTYPES[name], UINT8))


RAW_FORMAT = CacheFormat(None, ())
# "auto" and the names of the float types mean a raw copy: no conversion is made even where the name
# and the element type differ, as in vLLM.
CACHE_FORMATS = {
    "auto": RAW_FORMAT,
    "float16": RAW_FORMAT,
    "bfloat16": RAW_FORMAT,
    "float32": RAW_FORMAT,
    "fp8": _stored("float8_e4m3fn"),
    "fp8_e4m3": _stored("float8_e4m3fn"),
    "fp8_e5m2": _stored("float8_e5m2"),
    "int8": _stored("int8"),
}
# The same for caches with a scale of each token and head, kept beside the cache: first our names,
# then vLLM's.
PER_TOKEN_HEAD_FORMATS = {
    "int8": _stored("int8"),
    "fp8": _stored("float8_e4m3fn"),
    "fp8_e4m3": _stored("float8_e4m3fn"),
    "int8_per_token_head": _stored("int8"),
    "fp8_per_token_head": _stored("float8_e4m3fn"),
}
# The names that mean nothing but these.
BY_TOKEN = ("int8_per_token_head", "fp8_per_token_head")
# Where a scale is computed from the elements: what the largest magnitude becomes.
LARGEST = {"int8": 127, "float8_e4m3fn": 448}


def text_of(value):
    """A string without what its class adds to it; None for anything else."""
    return str.__str__(value) if issubclass(type(value), str) else None


def dtype_named(name, argument="dtype"):
    """The `DType` called ``name`` (a string, NumPy dtype or torch dtype). ``argument``: "operation:
    argument", for the error."""
    given = text_of(name) or name  # an item of an enum, too
    try:
        text = str(given).removeprefix("torch.")
    except Exception:  # it cannot show itself
        text = ""
    # None means float64 to NumPy, and what has a dtype means that one.
    if text not in DTYPES and not issubclass(type(given), _NO_DTYPES):
        try:
            found = np.dtype(given)
            text = found.name if found.isnative else str(found)  # of the other byte order
        except Exception:  # a SyntaxError, too
            pass
    if text not in DTYPES:
        expected = f"one of {', '.join(DTYPES)}"
        way_out = f"{_SHORT[text]!r} is it" if text in _SHORT else ""
        raise errors.wrong("value", argument, expected, errors.shown(name), way_out)
    return DTYPES[text]


_NO_DTYPES = type(None), np.generic, np.ndarray
# What dtypes are called elsewhere.
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def model_dtype(op, dtype):
    """The `DType` of a model's keys and values, which the caches may hold in another."""
    text = text_of(dtype) or ""
    if text.startswith("fp8"):
        expected, way_out = "the model's own, such as 'bfloat16'", f"kv_cache_dtype={text!r} is it"
        raise errors.wrong("value", f"{op}: dtype", expected, repr(text), way_out)
    return dtype_named(dtype, f"{op}: dtype")


def cache_format(
    op, kv_cache_dtype, names=None, argument="kv_cache_dtype", table=CACHE_FORMATS
):  # fmt: skip
    """The `CacheFormat` called ``kv_cache_dtype`` in ``table``. The name must be among ``names``,
    by default all of the table's. ``argument``: the argument's name, for the error."""
    names = tuple(table) if names is None else names
    text = text_of(kv_cache_dtype)
    if text not in names:
        expected, got = f"one of {', '.join(names)}", errors.shown(kv_cache_dtype)
        way_out = _way_to_format(kv_cache_dtype, names, table)
        raise errors.wrong("value", f"{op}: {argument}", expected, got, way_out)
    return table[text]


def _way_to_format(kv_cache_dtype, names, table):
    """For an error: the way out where ``kv_cache_dtype`` is the dtype of a format among ``names``,
    or means scales that are kept elsewhere; "" where it means nothing."""
    if text_of(kv_cache_dtype) in BY_TOKEN:
        return "reshape_and_cache_flash_per_token_head writes such caches"
    try:
        found = dtype_named(kv_cache_dtype)
    except errors.ArgumentError:
        return ""
    for name in names:
        if name == found.name or table.get(name, RAW_FORMAT).stored == found:
            return f"{name!r} is it"
    return ""


def conversion(fmt, source):
    """How ``source`` elements go into a cache of format ``fmt``.

    Returns
    -------
    stored : DType or None
        The type that they are converted to; None where they are copied, as elements of the stored
        type are too.
    storage : tuple of DType
        The dtypes that the cache may have.
    """
    if fmt.stored is not None:
        return (None if source == fmt.stored else fmt.stored), fmt.storage
    if source not in BYTES:
        return None, (source,)
    return None, (BYTES if source == UINT8 else (source, UINT8))


def way_to_convert(fmt, dtype, like=None):
    """For an error: the way out where ``fmt`` is a raw copy and the cache's ``dtype`` is not that
    of the elements, which are those of the argument ``like``; "" where there is no usual one."""
    names = [name for name, other in CACHE_FORMATS.items() if other.stored == dtype]
    if fmt.stored is not None:
        return ""
    if dtype == UINT8:
        return "kv_cache_dtype says what is stored in bytes, such as 'fp8'"
    if names:
        return f"kv_cache_dtype={names[0]!r} converts"
    return "" if like is None else f"a raw cache has the dtype of {like}"


RAW = frozenset(name for name, fmt in CACHE_FORMATS.items() if fmt.stored is None)
_SCALED = frozenset(name for name, fmt in CACHE_FORMATS.items() if fmt.stored is not None)


def is_scaled(kv_cache_dtype):
    """Whether ``kv_cache_dtype`` names a format whose elements are converted with a scale."""
    return text_of(kv_cache_dtype) in _SCALED
