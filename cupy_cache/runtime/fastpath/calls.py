# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Of the calls of one signature: their extents, and what was made of these, which is remembered."""

import abc
import math
import operator

from ...errors import CupyCacheError
from .. import arrays, dlpack, making

MAX_COUNTS = 256  # combinations of extents and scalars, of one signature
# Calls with the same extents, after which one comparison recognises them: it takes 6 us to make,
# and saves a write 0.4, and attention 2.
SETTLED = 4


class Results(abc.ABC):
    """Of one signature, what `make` gave for each combination of extents and scalars.

    settled : (alike, scalars, result) of the latest call, if its like came many times, as at every
        layer of a step. ``alike(*tensors)`` tells whether tensors have this call's shapes and
        strides: one comparison, instead of the signature's and a question to each tensor. ``alike``
        is None where no call is settled.

    Parameters
    ----------
    kind : guards.Kind
    same : callable
        ``same(*tensors)``: whether they have the signature; made by `guards.same_as`.
    extents : Extents
    new : New or None
    """

    def __init__(self, kind, same, extents, new):
        self._new = new
        self._same, self._exactly, self._elements = same, kind.exactly, kind.elements
        self._extents, self._sized, self._free = extents, extents.sized, extents.free
        self._telling = extents.telling
        # By numbers of elements, scalars, shapes and strides: [result, calls, settled].
        self._known = {}
        # By one tensor's number of elements: the latest ``settled``, for sizes that take turns.
        self._often = {}
        self.settled = _NOT_SETTLED

    @abc.abstractmethod
    def make(self, extents, scalars, sizes, new):
        """The result for a call; None where it must take the slow path. ``sizes``: the numbers of
        elements, shapes and strides that the extents were computed from. ``new``: a function that
        makes the operation's result; None where calls give it."""

    def forget(self):
        """Forget all results."""
        self._known.clear()
        self._often.clear()
        self.settled = _NOT_SETTLED

    def find(self, tensors, scalars):
        """The result for a call; None where it has no fast path, as with another signature."""
        try:
            size = tensors and self._elements(tensors[self._telling])
            settled = self._often.get(size)
        except Exception:  # no array of this framework: None, say; or one that cannot be asked
            return None
        if settled is not None:
            alike, known_scalars, found = settled
            if scalars == known_scalars and alike(*tensors):
                self.settled = settled
                return found
        if not self._same(*tensors):
            return None
        sized, free, freed = self._sized, self._free, ()
        key = sizes = tuple(map(self._elements, tensors if sized is None else sized(tensors)))
        if scalars:
            key += scalars
        if free is not None:
            freed = free(tensors)
            key += freed
        known = self._known.get(key)
        if known is None:
            extents, new = self._extents.find(sizes, freed), None
            if self._new is not None and extents is not None:
                extents, new = self._new.of(extents)
            try:
                found = None
                if extents is not None:
                    found = self.make(extents, scalars, sizes + freed, new)
            except CupyCacheError:  # the slow path raises it, with the name that was called
                found = None
            if found is None:
                return None
            if len(self._known) >= MAX_COUNTS:
                self._known.clear()
                self._often.clear()
            self._known[key] = [found, 0, None]
            return found
        found, calls, settled = known
        if settled is None:
            known[1] = calls = calls + 1
            if calls != SETTLED:
                return found
            alike = self._exactly(tensors)
            if alike is None:
                return found
            known[2] = settled = alike, scalars, found
        self.settled = self._often[size] = settled
        return found


_NOT_SETTLED = None, None, None


class New:
    """The new result of calls that give none: contiguous, and each extent that varies is another
    argument's number of rows, see `dispatch.Result`.

    Parameters
    ----------
    op : dispatch.Op
    kind : guards.Kind
    made : array
        The result of a call.
    """

    def __init__(self, op, kind, made):
        self._arg, self._shape, self._unit = op.args[op.result.at], made.shape, kind.unit(made)
        self._step = kind.step(made) * self._unit
        varying = [index for index, arg in enumerate(op.args) if arg.varies]
        self._at = varying.index(op.result.at)
        self._rows = [
            (dim, varying.index(index)) for dim, index in zip(self._arg.varies, op.result.rows)
        ]
        self._empty = making.like(made)
        self._mask = 0 if self._arg.index or self._arg.varies == arrays.ROWS else 15
        self._low = self._low_bits(self._shape)

    def _low_bits(self, shape):
        """The alignment of the strides that vary."""
        strides = dlpack.contiguous_strides(shape, self._step)
        return arrays.any_bits(strides[: max(self._arg.varies)]) & self._mask

    def of(self, extents):
        """``extents`` with those of the result, and a function that makes it; None and None where
        its strides have another alignment than the plan was made for."""
        shape = list(self._shape)
        for dim, at in self._rows:
            shape[dim] = extents[at]
        if self._low_bits(shape) != self._low:
            return None, None
        strides = dlpack.contiguous_strides(shape, self._step)
        extents[self._at] = arrays.extent(self._arg.varies, shape, strides, 1)
        return extents, self._empty(tuple(shape))


def getter(places):
    """A function that gives a sequence's items at ``places``, as a tuple."""
    if len(places) == 1:
        return lambda items: (items[places[0]],)
    return operator.itemgetter(*places) if places else lambda items: ()


class Extents:
    """Computes a call's extents: of tensors whose first dimension alone varies, from their numbers
    of elements; of the others from shapes and strides.

    Parameters
    ----------
    kind : guards.Kind
    parts : list of (dispatch.Arg, at, count)
        Of each argument, where its first tensor is among ``tensors``, and how many it has, None
        where it is no list. Of an argument that calls do not give, None and its extent, if any.
    tensors : list
        Those of a call.

    Attributes
    ----------
    sized : callable
        tensors -> those that are asked for their number of elements; None where all are.
    telling : int
        Which of the tensors is likely to have another number of elements in another call.
    free : callable
        tensors -> (shape, strides) of each whose other dimensions vary; None where there are none.
    """

    def __init__(self, kind, parts, tensors):
        # (at, count, row elements) of each argument that varies: where its first tensor is among
        # those of `sized` or of `free`, or None; how many it has; and how many elements one row
        # has, 0 where it is of `free`.
        self._parts = []
        sized, free = [], []
        for arg, at, count in parts:
            if not arg.varies:
                continue
            if at is None:
                self._parts.append((None, count, 0))
                continue
            rows = arg.varies == arrays.ROWS
            into = sized if rows else free
            self._parts.append((len(into), count, math.prod(tensors[at].shape[1:]) if rows else 0))
            into += [(arg, place) for place in range(at, at + (1 if count is None else count))]
        places = [at for _, at in sized]
        self.telling = places[-1] if places else 0
        self.sized = None if places == list(range(len(tensors))) else getter(places)
        self.free = _shapes_and_strides(kind, [at for _, at in free]) if free else None
        self._units = [kind.unit(tensors[at]) for _, at in free]
        # (at, step, last, mask, low bits) of each of `free` whose strides' alignment matters: the
        # bytes from element to element, how many strides vary, which bits, and what they were.
        # Indices are read one by one: strides in bytes must only be multiples of their size.
        self._low = []
        freed = () if self.free is None else self._in_bytes(self.free(tensors))
        for at, (arg, place) in enumerate(free):
            unit = self._units[at]
            step, last = kind.step(tensors[place]) * unit, max(arg.varies)
            if not arg.index or unit == 1:
                mask = step - 1 if arg.index else 15
                self._low.append((at, step, last, mask, _low_bits(*freed[at], step, last) & mask))

    def find(self, sizes, freed):
        """The extents that the operation's count gets, from the numbers of elements of `sized` and
        from what `free` gives; None where strides have another alignment than the plan was made
        for."""
        freed = freed and self._in_bytes(freed)
        for at, step, last, mask, low in self._low:
            if _low_bits(*freed[at], step, last) & mask != low:
                return None
        extents = []
        for at, count, elements in self._parts:
            if at is None:
                extents.append(count)
            elif elements:  # of no list: what lists vary in are several dimensions
                extents.append(sizes[at] // elements)
            elif count is None:
                extents.append(freed[at])
            else:
                extents.append(freed[at : at + count])
        return extents

    def _in_bytes(self, freed):
        """What `free` gives, with strides in bytes."""
        return [
            (shape, arrays.meant(shape, strides, unit))
            for (shape, strides), unit in zip(freed, self._units)
        ]


def _low_bits(shape, strides, step, last):
    """All bits of the first ``last`` strides; the low ones tell their alignment."""
    return arrays.any_bits(arrays.regular(shape, strides, step)[:last])


def _shapes_and_strides(kind, places):
    """A function that gives (shape, strides) of each of the tensors at ``places``."""
    strides = kind.strides
    if len(places) > 1:
        return lambda tensors: tuple([(tensors[at].shape, strides(tensors[at])) for at in places])
    (one,) = places  # most often: a block table

    def shape_and_strides(tensors):
        tensor = tensors[one]
        return ((tensor.shape, strides(tensor)),)

    return shape_and_strides
