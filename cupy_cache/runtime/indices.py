# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Numbers of blocks or slots, or pairs of blocks, that a caller chooses: in host memory, or in an
array on a GPU.

There may be thousands in host memory, so nothing here loops over them in Python.
"""

import marshal
import struct

import numpy as np

from .. import errors
from . import arrays, contract, formats

_INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))
_INT = {int}
_SEQUENCES = list, tuple, range
_PAIRS = {tuple, list}  # types that most pairs have
# Up to so many numbers, or pairs, are checked as Python's integers: that takes less time than a few
# calls of NumPy's.
FEW = 48


class Chosen:
    """Numbers chosen in host memory, or pairs of them.

    count : how many.
    words : the bytes of the numbers as int32, those of a pair one behind the other, as kernels take
        them; None where an array gave them, or one has more bits.
    few : the same numbers as Python's integers, if they are at most `FEW`. Else None.
    """

    __slots__ = ("_numbers", "_pairs", "count", "few", "words")

    def __init__(self, numbers, words=None, few=None, pairs=False):
        self._numbers, self._pairs, self.words, self.few = numbers, pairs, words, few
        self.count = len(words) // (8 if pairs else 4) if numbers is None else len(numbers)

    @property
    def integers(self):
        """The numbers, [n] or [n, 2], int32 or int64; objects where one has more than 64 bits."""
        if self._numbers is not None:
            return self._numbers
        found = np.frombuffer(self.words, np.int32)
        return found.reshape(-1, 2) if self._pairs else found

    @property
    def numbers(self):
        """`integers` as int64, or objects."""
        if self._numbers is None:
            self._numbers = self.integers.astype(np.int64)
        return self._numbers


def _of(values, pairs):
    """`Chosen` of a list of integers, those of a pair one behind the other; None where one has more
    than 32 bits."""
    try:
        words = struct.pack(f"<{len(values)}i", *values)
    except struct.error:
        return None
    return Chosen(None, words, values if len(values) >> pairs <= FEW else None, pairs)


def read_host(op, arg, value):
    """``value`` as `Chosen` if it is in host memory; ``value`` itself if it is not, or if that is
    not known without an export."""
    if issubclass(type(value), _SEQUENCES):
        return (_pairs if arg.pairs else _numbers)(op, arg.name, value)
    if arrays.is_torch(value):
        try:
            if value.is_cuda or value.is_floating_point() or not arrays.torch_address(value):
                return value
            value = value.numpy()
        except Exception:  # on another device, say, or sparse: `arrays.read` refuses it later
            return value
    if issubclass(type(value), np.ndarray):
        if type(value) is not np.ndarray:
            name = f"{op}: {arg.name}"
            arrays.read(value, name)  # refuses masked ones, and what its class does not show
            value = np.asarray(value)
        if (
            value.dtype not in _INTEGERS
            or value.ndim != 1 + arg.pairs
            or value.shape[1:] != (2,) * arg.pairs
        ):
            name = f"{op}: {arg.name}"
            check(op, arg, arrays.describe(arrays.read(value, name), name))  # says what is wrong
        return _copied(arg, value)
    if contract.is_unordered(value):
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
    return _copied(arg, arrays.as_numpy(array.ptr, array.shape, array.strides, array.dtype.numpy))


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
    try:
        if not value:
            return Chosen(np.empty((0, 2), np.int64))
        if _marshal_is_known and len(value) > FEW:
            words = _marshalled(value)
            if words is not None:
                return Chosen(None, words, pairs=True)
        if not _PAIRS.issuperset(map(type, value)):
            for pair in value:
                contract.refuse_unordered(pair)
        sources, destinations = zip(*value, strict=True)
        flat = [*sources, *destinations]
        flat[::2], flat[1::2] = sources, destinations
        if set(map(type, flat)) != _INT:
            flat = [contract.index(number) for number in flat]  # `map` would end at a StopIteration
        return _of(flat, True) or Chosen(_wide(flat).reshape(-1, 2))
    except Exception as error:  # whatever an `__index__` raises
        expected = "(source, destination) pairs of integers"
        raise errors.wrong("shape", f"{op}: {name}", expected, errors.shown(value)) from error


def _marshalled(pairs):
    """The words of many pairs, found in what marshal writes of them; None unless all are tuples, or
    all lists, of two integers of 32 bits, and nothing else. To unpack each pair makes an iterator
    of it, and takes two to three times as long.

    Of such a pair version 2 writes 15 bytes: "(" or "[" and the length, then "i" and four bytes for
    each number. The kind, the lowest byte of the length and both "i" of each pair are compared. It
    is enough: each has two numbers then, and one that held more would hold other pairs, which would
    be missing in the list.
    """
    count = len(pairs)
    try:
        data = marshal.dumps(pairs, 2)
    except ValueError:  # it knows none but Python's own types
        return None
    kind, integers = data[5:6], b"i" * count
    if (
        len(data) != 5 + 15 * count
        or kind not in (b"(", b"[")
        or data[5::15] != kind * count
        or data[6::15] != b"\2" * count
        or data[10::15] != integers
        or data[15::15] != integers
    ):
        return None
    return np.ndarray((count, 2), _INT32, data, 11, (15, 5)).tobytes()


_INT32 = np.dtype("<i4")
# The format is Python's own, so it is tried before it is used.
_marshal_is_known = _marshalled([(1, -2), (2**31 - 1, 258)]) == struct.pack(
    "<4i", 1, -2, 2**31 - 1, 258
)


def _wide(values):
    """Integers of any size as an array: int64, objects where that is not enough."""
    try:
        return np.frombuffer(struct.pack(f"{len(values)}q", *values), np.int64)
    except struct.error:
        return np.array(values, object)


def _numbers(op, name, value):
    try:
        values = [*value]
        if set(map(type, values)) == _INT:
            found = _of(values, False)
            if found is not None:
                return found
        table = _as_integers(values)
    except Exception as error:  # also whatever an object raises that is to be a number
        raise errors.wrong("type", f"{op}: {name}", "integers", errors.shown(value)) from error
    if table.ndim != 1:
        raise errors.wrong("shape", f"{op}: {name}", "one dimension", list(table.shape))
    return Chosen(table)


def _as_integers(values):
    """A sequence of integers, nested or not, as an int64 array; raises where it is something
    else."""
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
