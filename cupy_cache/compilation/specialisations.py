# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The kernels that a model's shape needs.

Only an operation itself knows which kernel a call needs. So the calls of a model's engine
(calls.py) are made with arrays without memory, on a GPU that does not exist: there a launch raises
its kernel (`launch.KernelNeeded`).
"""

import itertools

from .. import errors
from ..errors import CupyCacheError
from ..runtime import formats, launch, spelling
from .calls import OPERATIONS
from .model import ENGINES, Model, rotation_of

FORMATS = {**formats.PER_TOKEN_HEAD_FORMATS, **formats.CACHE_FORMATS}


def specialisations(
    num_kv_heads, head_size, block_size, dtype="bfloat16", *, layouts=("NHD",), head_size_v=None,
    kv_cache_dtype="auto", index_dtypes=("int64",), num_heads=None, rotary=None,
    alibi=False, soft_cap=False, ops=None, refused=None,
):  # fmt: skip
    """The kernels that `warmup` loads for the same arguments, each once, as `modules.Kernel`\\ s.

    Needs no GPU. ``index_dtypes`` None: those of `ENGINES`. ``refused``: a list, to which the first
    error of each operation that refuses the shape is added; without it the error is raised.
    """
    layouts, index_dtypes, ops, (kv_cache_dtype,) = (
        None if given is None and name != "layouts" else _names(name, given, allowed, read)
        for name, given, allowed, read in (
            ("layouts", layouts, formats.LAYOUTS, formats.text_of),
            ("index_dtypes", index_dtypes, spelling.INDEX_NAMES, _dtype_name),
            ("ops", ops, OPERATIONS, formats.text_of),
            (
                "kv_cache_dtype",
                [kv_cache_dtype],
                [*FORMATS, formats.FP8_DS_MLA],
                formats.text_of,
            ),
        )
    )
    if rotary is not None and not issubclass(type(rotary), dict):
        raise errors.wrong("type", "warmup: rotary", "a dict", errors.shown(rotary))
    dtype = formats.model_dtype("warmup", dtype)
    stored = formats.UINT8
    if kv_cache_dtype != formats.FP8_DS_MLA:
        stored = FORMATS[kv_cache_dtype].stored or dtype
    model = Model(
        num_kv_heads, head_size, head_size if head_size_v is None else head_size_v, block_size,
        dtype, kv_cache_dtype, stored, tuple(layouts),
        {
            role: tuple(formats.DTYPES[name] for name in (index_dtypes or names))
            for role, names in ENGINES.items()
        },
        num_kv_heads if num_heads is None else num_heads, rotation_of(rotary or {}), alibi,
        soft_cap,
    )  # fmt: skip
    seen = set()
    for name in OPERATIONS if ops is None else ops:
        try:
            for kernel in itertools.chain.from_iterable(map(_kernels_of, OPERATIONS[name](model))):
                if kernel.key not in seen:
                    seen.add(kernel.key)
                    yield kernel
        except CupyCacheError as error:
            if refused is None:
                raise
            refused.append(error)


def _names(name, given, allowed, read):
    """Names that must be among ``allowed``, given in anything but a string, in a list. ``read``
    makes a name of each item, or None."""
    try:
        items = None if formats.text_of(given) is not None else [*given]
    except Exception:  # there is nothing to go through, or its class raises
        items = None
    whole = items is None  # a string's items would be letters
    names = [read(item) for item in items or ()]
    unknown = [given] if whole else [item for item, n in zip(items, names) if n not in allowed]
    if unknown:
        got = f"{errors.shown(unknown[0])}{' instead of a sequence' if whole else ''}"
        raise errors.wrong("value", f"warmup: {name}", f"some of {', '.join(allowed)}", got)
    return names


def _dtype_name(dtype):
    """The name of a dtype, by whichever of its forms it is given; None for anything else."""
    try:
        return formats.dtype_named(dtype).name
    except errors.ArgumentError:
        return None


def _kernels_of(call):
    """The kernels that a call launches."""
    try:
        call()
    except launch.KernelNeeded as needed:
        return needed.kernels
    raise AssertionError(f"{call} launched nothing")
