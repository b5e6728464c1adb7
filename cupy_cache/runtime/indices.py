# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers of blocks or slots, or pairs of blocks, that a caller chooses: in host memory, or in an
array on a GPU.

There may be thousands in host memory, so nothing here loops over them in Python.
"""

import struct

import numpy as np

from .. import errors
from . import arrays, contract, formats

_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


class Chosen:
    """Numbers chosen in host memory: int64 [n] or, for pairs, [2, n]."""

    __slots__ = ("numbers",)

    def __init__(self, numbers):
        self.numbers = numbers


def read_host(op, arg, value):
    """``value`` as `Chosen` if it is in host memory; ``value`` itself if it is not, or if that is
    not known without an export."""
    if isinstance(value, (list, tuple, range)):
        return Chosen((_pairs if arg.pairs else _numbers)(op, arg.name, value))
    if arrays.is_torch(value):
        try:
            if value.is_cuda or value.is_floating_point() or not arrays.torch_address(value):
                return value
            value = value.numpy()
        except Exception:  # on another device, say, or sparse: `arrays.read` refuses it later
            return value
    if isinstance(value, np.ndarray):
        if type(value) is not np.ndarray:
            arrays.reader_for(value, f"{op}: {arg.name}")  # refuses masked ones
        if (
            value.dtype not in _INTEGERS
            or value.ndim != 1 + arg.pairs
            or value.shape[1:] != (2,) * arg.pairs
        ):
            name = f"{op}: {arg.name}"
            check(op, arg, arrays.describe(arrays.read(value, name), name))  # says what is wrong
        # A copy, so that the numbers cannot change between their check and their use.
        return Chosen((value.T if arg.pairs else value).astype(np.int64, order="C"))
    if isinstance(value, (dict, set)):
        items = "(source, destination) pairs" if arg.pairs else "integers"
        expected = f"a list or an array of {items}"
        got = f"a {type(value).__name__}"
        raise errors.wrong("type", f"{op}: {arg.name}", expected, got)
    return value


def read(op, arg, value, stream):
    """(int64 NumPy array, None) for numbers in host memory, [n] or, for pairs, [2, n]; (None,
    `arrays.Metadata`) for an array on a GPU."""
    value = read_host(op, arg, value)
    if type(value) is Chosen:
        return value.numbers, None
    return _read_array(op, arg, value, stream)


def _read_array(op, arg, value, stream):
    metadata = arrays.read(value, f"{op}: {arg.name}", stream)
    array = arrays.describe(metadata, f"{op}: {arg.name}")
    if array.device.kind != "cpu":
        return None, metadata
    check(op, arg, array)
    # A copy, so that the numbers cannot change between their check and their use.
    view = arrays.as_numpy(array.ptr, array.shape, array.strides, array.dtype.numpy)
    return (view.T if arg.pairs else view).astype(np.int64, order="C"), None


def check(op, arg, array):
    """Refuse an array of another shape or dtype, or one on a GPU that the kernels cannot read."""
    contracted = contract.Contract(op)
    contracted.shape(arg.name, array, "_ 2" if arg.pairs else "_")
    contracted.dtype(arg.name, array, *formats.INDICES)
    if array.device.kind != "cpu":
        contracted.aligned(arg.name, array)
        if arg.pairs:
            contracted.contiguous(arg.name, array, 2)


def _pairs(op, name, value):
    """A sequence of (source, destination) pairs; of objects where one has more than 64 bits."""
    if not value:
        return np.empty((2, 0), np.int64)
    try:
        sources, destinations = zip(*value, strict=True)
        try:
            # A third of the time of np.array, and it takes nothing but what has `__index__`.
            flat = struct.pack(f"{2 * len(value)}q", *sources, *destinations)
        except struct.error:
            sides = [list(map(contract.index, side)) for side in (sources, destinations)]
            return np.array(sides, object)
        table = np.frombuffer(flat, np.int64)
        # Booleans have it too, and are 0 or 1: what is more need not be looked at.
        for at in (table < 2).nonzero()[0].tolist():
            contract.index(sources[at] if at < len(value) else destinations[at - len(value)])
    except Exception as error:  # whatever an `__index__` raises
        expected = "(source, destination) pairs of integers"
        raise errors.wrong("shape", f"{op}: {name}", expected, errors.shown(value)) from error
    return table.reshape(2, -1)


def _numbers(op, name, value):
    try:
        table = _as_integers(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise errors.wrong("type", f"{op}: {name}", "integers", errors.shown(value)) from error
    if table.ndim != 1:
        raise errors.wrong("shape", f"{op}: {name}", "one dimension", list(table.shape))
    return table


def _as_integers(values):
    """A sequence of integers, nested or not, as an int64 array; `TypeError`, `ValueError` or
    `OverflowError` where it is something else."""
    kinds = set(map(type, values))
    if not kinds <= {int, list, tuple}:  # NumPy would take booleans, and not all that is an integer
        values = [contract.integer("", "", value) for value in values]
    table = np.array(values)
    if not table.size:
        return table.astype(np.int64)
    if table.dtype.kind not in "iu":
        raise TypeError(f"no integers: {table.dtype}")
    if table.dtype.kind == "u" and int(table.max()) > np.iinfo(np.int64).max:
        raise OverflowError(f"more than 63 bits: {table.max()}")
    return table.astype(np.int64, copy=False)
