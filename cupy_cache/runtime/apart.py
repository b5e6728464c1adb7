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

    rows, step : the extent and the stride of the first dimension. low, high : a row's
    `arrays.Array.row_span`.
    """

    def __init__(self, array):
        self.shape, self.strides, self.bits = array.shape, array.strides, array.dtype.bits
        self.rows, self.step = (*array.shape, 1)[0], (*array.strides, 0)[0]
        self.low, self.high = array.row_span


class _Placed(NamedTuple):
    """An array of a call: the bytes that it lies within, whose it is, and where it is."""

    begin: int
    end: int
    argument: int
    layer: int
    address: int
    rows: int


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
        Whether their numbers of rows change from call to call.
    """

    def __init__(self, op, described):
        self._op = op
        given = {
            index: array
            for index, (arg, array) in enumerate(zip(op.args, described))
            if arg.written and array is not None
        }
        self.varies = any(op.args[index].varies for index in given)
        self._layouts = {
            index: _Layout(array)
            for index, array in given.items()
            if 0 not in array.shape[self.varies :]
        }
        self.needed = len(self._layouts) > 1 or any(op.args[i].layers for i in self._layouts)
        self._known = set()

    def check(self, values, shapes=None):
        """Refuse addresses, the ``values`` of a call, at which arrays share memory. ``shapes``: of
        each argument, where the rows vary."""
        addresses = tuple([values[index] for index in self._layouts])
        if addresses in self._known:
            return
        placed = list(self._places(addresses, shapes))
        placed.sort()
        if not _one_behind_the_other(placed) and not self._in_turn(placed):
            self._compare(placed)
        if shapes is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known.add(addresses)

    def _places(self, addresses, shapes):
        for (index, layout), given in zip(self._layouts.items(), addresses):
            rows = layout.rows if shapes is None else shapes[index][0]
            if not rows:
                continue
            last = layout.step * (rows - 1)
            low, high = layout.low + min(last, 0), layout.high + max(last, 0)
            if isinstance(given, int):
                if given >= arrays.LOWEST:  # what has no memory is refused elsewhere
                    yield _Placed(given + low, given + high, index, 0, given, rows)
                continue
            for layer, address in enumerate(given):
                yield _Placed(address + low, address + high, index, layer, address, rows)

    def _in_turn(self, placed):
        """Whether blocks, one every so many bytes, surely lie between those of the other arrays, as
        in a pool of layers."""
        layouts = [self._layouts[one.argument] for one in placed]
        step = layouts[0].step
        if step <= 0 or any(layout.step != step for layout in layouts):
            return False
        inside = sorted(
            ((one.address + layout.low) % step, layout.high - layout.low)
            for one, layout in zip(placed, layouts)
        )
        behind = itertools.chain(inside[1:], [(inside[0][0] + step, 0)])
        return all(at + size <= next_at for (at, size), (next_at, _) in zip(inside, behind))

    def _compare(self, placed):
        for at, one in enumerate(placed):
            for other in itertools.islice(placed, at + 1, None):
                if other.begin >= one.end:
                    break
                if _share(*map(self._elements, (one, other)), other.address - one.address):
                    self._refuse(*sorted((one, other), key=lambda placed: placed[2:4]))

    def _elements(self, placed):
        layout = self._layouts[placed.argument]
        shape = (placed.rows, *layout.shape[1:]) if layout.shape else ()
        return shape, layout.strides, layout.bits

    def _refuse(self, first, second):
        names = [
            arg.item(placed.layer) if arg.layers else arg.name
            for arg, placed in ((self._op.args[p.argument], p) for p in (first, second))
        ]
        expected, got = "memory of its own, since it is written", f"some that {names[0]} has too"
        raise errors.wrong("memory", f"{self._op.name}: {names[1]}", expected, got)


def _one_behind_the_other(placed):
    return all(one.end <= other.begin for one, other in itertools.pairwise(placed))


@functools.lru_cache(maxsize=4096)
def _share(one, other, distance):
    """Whether arrays of these (shape, strides, dtype), the other ``distance`` bytes behind the one,
    share any byte: exact, for strides of any kind."""
    views = (arrays.as_numpy(_BASE, *one), arrays.as_numpy(_BASE + distance, *other))
    try:
        return np.shares_memory(*views, max_work=MOST_WORK)
    except Exception:  # NumPy's TooHardError, whose place depends on the version
        return True
