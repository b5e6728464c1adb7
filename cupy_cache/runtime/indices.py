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
# Up to so many numbers, or pairs, are checked as Python's integers: that takes less time than a few
# calls of NumPy's.
FEW = 48


class Chosen:
    """Numbers chosen in host memory, or pairs of them.

    count : how many.
    words : the numbers as kernels take them, the bytes of int32 [n], or of uint32 [n, 2] for pairs;
        None where an array gave them, or one has more bits.
    few : if they are at most `FEW`, and ``words`` are known: the numbers as Python's integers, those
        of a pair one behind the other. Else None.
    """

    __slots__ = ("_numbers", "_pairs", "count", "few", "words")

    def __init__(self, numbers, words=None, few=None, pairs=False):
        self._numbers, self._pairs, self.words, self.few = numbers, pairs, words, few
        self.count = len(words) // (8 if pairs else 4) if numbers is None else len(numbers)

    @property
    def unsigned(self):
        """The numbers, [n] or [n, 2], with negative ones as large unsigned ones."""
        if self.words is None:
            return self._numbers.view(np.uint64)
        found = np.frombuffer(self.words, np.uint32)
        return found.reshape(-1, 2) if self._pairs else found

    @property
    def numbers(self):
        """The numbers, int64 [n] or [n, 2]; objects where one has more than 64 bits."""
        if self._numbers is None:
            words = self.unsigned
            self._numbers = (words if self._pairs else words.view(np.int32)).astype(np.int64)
        return self._numbers


def _of(values, pairs):
    """`Chosen` of a list of integers, those of a pair one behind the other; None where one does not
    fit a kernel's words."""
    try:
        words = struct.pack(f"<{len(values)}{'I' if pairs else 'i'}", *values)
    except struct.error:
        return None
    return Chosen(None, words, values if len(values) >> pairs <= FEW else None, pairs)


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
        few = _of(array.ravel().tolist(), arg.pairs)
        if few is not None:
            return few
    return Chosen(array.astype(np.int64, order="C"))


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
    """A sequence of (source, destination) pairs."""
    if not value:
        return Chosen(np.empty((0, 2), np.int64))
    try:
        sources, destinations = zip(*value, strict=True)
        flat = [*sources, *destinations]
        flat[::2], flat[1::2] = sources, destinations
        if len(sources) <= FEW and set(map(type, flat)) != _INT:
            flat = list(map(contract.index, flat))
        # A third of the time of np.array, and it takes nothing but what has `__index__`.
        found = _of(flat, True)
        if found is None:
            flat = list(map(contract.index, flat))
            return Chosen(_wide(flat).reshape(-1, 2))
        if found.few is None:
            # Booleans have it too, and are 0 or 1: what is more need not be looked at.
            for at in (found.unsigned.reshape(-1) < 2).nonzero()[0].tolist():
                contract.index(flat[at])
    except Exception as error:  # whatever an `__index__` raises
        expected = "(source, destination) pairs of integers"
        raise errors.wrong("shape", f"{op}: {name}", expected, errors.shown(value)) from error
    return found


def _wide(values):
    """Integers of any size as an array: int64, objects where that is not enough."""
    try:
        return np.frombuffer(struct.pack(f"{len(values)}q", *values), np.int64)
    except struct.error:
        return np.array(values, object)


def _numbers(op, name, value):
    values = [*value]
    if set(map(type, values)) == _INT:
        found = _of(values, False)
        if found is not None:
            return found
    try:
        table = _as_integers(values)
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
