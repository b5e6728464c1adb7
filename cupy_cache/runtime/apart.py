# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Whether the arrays that a call writes share memory: then the result would depend on the order in
which they are written."""

import functools
import itertools
from typing import NamedTuple

import numpy as np

from .. import errors
from . import arrays

# What an exact answer may cost, in steps of NumPy's solver: caches' strides take a few hundred.
# What would cost more counts as shared.
MOST_WORK = 100_000
MAX_KNOWN = 256  # combinations of addresses
_BASE = 1 << 40  # an address that an array can have; nothing is read there


class _Layout:
    """Where the elements of an array lie, from its address on.

    rows, step : the extent and the stride of the first dimension.
    low, high : the first byte of one row, and the byte behind its last.
    """

    def __init__(self, shape, strides, dtype):
        self.elements = shape, strides, dtype.bits
        self.rows, self.step = (*shape, 1)[0], (*strides, 0)[0]
        ends = [stride * (count - 1) for stride, count in zip(strides[1:], shape[1:])]
        self.low = sum(min(end, 0) for end in ends)
        self.high = sum(max(end, 0) for end in ends) + dtype.bytes


class _Placed(NamedTuple):
    """An array of a call: the bytes that it lies within, whose it is, and where it is."""

    begin: int
    end: int
    argument: int
    layer: int
    address: int
    layout: _Layout


class Apart:
    """What a call writes, where that may be several arrays.

    Parameters
    ----------
    op : dispatch.Op
    described : list of arrays.Array
        Of each argument, as for a plan.

    Attributes
    ----------
    needed : bool
        Whether there are several.
    varies : bool
        Whether their shapes change from call to call, and strides with them.
    """

    def __init__(self, op, described):
        self._op = op
        given = {
            index: array
            for index, (arg, array) in enumerate(zip(op.args, described))
            if arg.written and array is not None
        }
        self.varies = any(op.args[index].varies for index in given)
        self._dtypes = {index: array.dtype for index, array in given.items()}
        # Of those whose shapes stay as they are.
        self._layouts = {
            index: _Layout(array.shape, array.strides, array.dtype)
            for index, array in given.items()
            if not op.args[index].varies and 0 not in array.shape
        }
        varying = [index for index in given if op.args[index].varies]
        self._written = sorted((*self._layouts, *varying))
        self.needed = len(self._written) > 1 or any(op.args[i].layers for i in self._written)
        self._known = set()

    def check(self, values, shapes=None, strides=None):
        """Refuse addresses, the ``values`` of a call, at which arrays share memory. ``shapes`` and
        ``strides``, in bytes: of each argument, where they vary."""
        addresses = tuple([values[index] for index in self._written])
        if addresses in self._known:
            return
        placed = list(self._placed(addresses, shapes, strides))
        placed.sort()
        if not _one_behind_the_other(placed) and not _in_turn(placed):
            self._compare(placed)
        if shapes is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known.add(addresses)

    def _placed(self, addresses, shapes, strides):
        for index, given in zip(self._written, addresses):
            layout = self._layouts.get(index)
            if layout is None:
                if 0 in shapes[index]:
                    continue
                layout = _Layout(shapes[index], strides[index], self._dtypes[index])
            last = layout.step * (layout.rows - 1)
            low, high = layout.low + min(last, 0), layout.high + max(last, 0)
            for layer, address in enumerate((given,) if isinstance(given, int) else given):
                if address:  # what has no memory is refused elsewhere
                    yield _Placed(address + low, address + high, index, layer, address, layout)

    def _compare(self, placed):
        for at, one in enumerate(placed):
            for other in itertools.islice(placed, at + 1, None):
                if other.begin >= one.end:
                    break
                distance = other.address - one.address
                if _share(one.layout.elements, other.layout.elements, distance):
                    self._refuse(*sorted((one, other), key=lambda placed: placed[2:4]))

    def _refuse(self, first, second):
        names = [
            arg.item(placed.layer) if arg.layers else arg.name
            for arg, placed in ((self._op.args[p.argument], p) for p in (first, second))
        ]
        _refuse(self._op.name, *names)


def _refuse(op, first, second):
    expected, got = "memory of its own, since it is written", f"some that {first} has too"
    raise errors.wrong("memory", f"{op}: {second}", expected, got)


def refuse_shared(op, **written):
    """Refuse two arrays, by their names, that share memory."""
    (first, one), (second, other) = (
        (name, arrays.view(array, f"{op}: {name}")) for name, array in written.items()
    )
    layouts = (_Layout(array.shape, array.strides, array.dtype) for array in (one, other))
    if _share(*(layout.elements for layout in layouts), other.ptr - one.ptr):
        _refuse(op, first, second)


def _one_behind_the_other(placed):
    return all(one.end <= other.begin for one, other in itertools.pairwise(placed))


def _in_turn(placed):
    """Whether blocks, one every so many bytes, surely lie between those of the other arrays, as in
    a pool of layers."""
    step = placed[0].layout.step
    if step <= 0 or any(one.layout.step != step for one in placed):
        return False
    inside = sorted(
        ((one.address + one.layout.low) % step, one.layout.high - one.layout.low) for one in placed
    )
    behind = itertools.chain(inside[1:], [(inside[0][0] + step, 0)])
    return all(at + size <= next_at for (at, size), (next_at, _) in zip(inside, behind))


@functools.lru_cache(maxsize=4096)
def _share(one, other, distance):
    """Whether arrays of these (shape, strides, dtype), the other ``distance`` bytes behind the one,
    share any byte: exact, for strides of any kind."""
    views = (arrays.as_numpy(_BASE, *one), arrays.as_numpy(_BASE + distance, *other))
    try:
        return np.shares_memory(*views, max_work=MOST_WORK)
    except Exception:  # NumPy's TooHardError, whose place depends on the version
        return True
