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
_INT = {int}
# Up to so many numbers, or pairs, stay Python's integers: they are read, checked and written into a
# kernel's parameters in less time than a few calls of NumPy's take.
FEW = 48


class Chosen:
    """Numbers chosen in host memory, or pairs of them.

    count : how many.
    few : the numbers, as Python's integers, those of a pair one behind the other; None where they
        are more than `FEW`, or one has not 32 bits.
    words : the bytes of ``few`` as kernels take them, int32, or uint32 of pairs; else None.
    """

    __slots__ = ("_numbers", "_pairs", "count", "few", "words")

    def __init__(self, numbers, few=None, words=None, pairs=False):
        self._numbers, self._pairs, self.few, self.words = numbers, pairs, few, words
        self.count = len(few) >> pairs if numbers is None else numbers.shape[-1]

    @property
    def numbers(self):
        """All of them, int64 [n] or, for pairs, [2, n]."""
        if self._numbers is None:
            few = self.few
            self._numbers = np.array([few[::2], few[1::2]] if self._pairs else few, np.int64)
        return self._numbers


def of_numbers(values):
    """`Chosen` of a list of exact integers, at most `FEW`; None where one has not 32 bits."""
    try:
        return Chosen(None, values, struct.pack(f"<{len(values)}i", *values))
    except struct.error:
        return None


def of_pairs(values):
    """The same of pairs, one behind the other; None where one is negative, too."""
    try:
        return Chosen(None, values, struct.pack(f"<{len(values)}I", *values), pairs=True)
    except struct.error:
        return None


def read_host(op, arg, value):
    """``value`` as `Chosen` if it is in host memory; ``value`` itself if it is not, or if that is
    not known without an export."""
    if isinstance(value, (list, tuple, range)):
        return (_pairs if arg.pairs else _numbers)(op, arg.name, value)
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
        return _copied(arg, value)
    if isinstance(value, (dict, set)):
        items = "(source, destination) pairs" if arg.pairs else "integers"
        expected = f"a list or an array of {items}"
        got = f"a {type(value).__name__}"
        raise errors.wrong("type", f"{op}: {arg.name}", expected, got)
    return value


def _copied(arg, array):
    """`Chosen` of a NumPy array: a copy, so that the numbers cannot change between their check and
    their use."""
    if 0 < len(array) <= FEW:
        numbers = array.ravel().tolist()
        few = of_pairs(numbers) if arg.pairs else of_numbers(numbers)
        if few is not None:
            return few
    return Chosen((array.T if arg.pairs else array).astype(np.int64, order="C"))


def read(op, arg, value, stream):
    """`Chosen` for numbers in host memory, `arrays.Metadata` for an array on a GPU."""
    value = read_host(op, arg, value)
    if type(value) is Chosen:
        return value
    metadata = arrays.read(value, f"{op}: {arg.name}", stream)
    array = arrays.describe(metadata, f"{op}: {arg.name}")
    if array.device.kind != "cpu":
        return metadata
    check(op, arg, array)
    return _copied(
        arg, arrays.as_numpy(array.ptr, array.shape, array.strides, array.dtype.numpy)
    )


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
        return Chosen(np.empty((2, 0), np.int64))
    try:
        sources, destinations = zip(*value, strict=True)
        count = len(sources)
        if count <= FEW:
            flat = [*sources, *destinations]
            flat[::2], flat[1::2] = sources, destinations
            few = of_pairs(flat) if set(map(type, flat)) == _INT else None
            if few is not None:
                return few
        try:
            # A third of the time of np.array, and it takes nothing but what has `__index__`.
            flat = struct.pack(f"{2 * count}q", *sources, *destinations)
        except struct.error:
            sides = [list(map(contract.index, side)) for side in (sources, destinations)]
            return Chosen(np.array(sides, object))
        table = np.frombuffer(flat, np.int64)
        # Booleans have it too, and are 0 or 1: what is more need not be looked at.
        for at in (table < 2).nonzero()[0].tolist():
            contract.index(sources[at] if at < count else destinations[at - count])
    except Exception as error:  # whatever an `__index__` raises
        expected = "(source, destination) pairs of integers"
        raise errors.wrong("shape", f"{op}: {name}", expected, errors.shown(value)) from error
    return Chosen(table.reshape(2, -1))


def _numbers(op, name, value):
    if len(value) <= FEW:
        numbers = [*value]
        few = of_numbers(numbers) if set(map(type, numbers)) == _INT else None
        if few is not None:
            return few
    try:
        table = _as_integers(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise errors.wrong("type", f"{op}: {name}", "integers", errors.shown(value)) from error
    if table.ndim != 1:
        raise errors.wrong("shape", f"{op}: {name}", "one dimension", list(table.shape))
    return Chosen(table)


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
