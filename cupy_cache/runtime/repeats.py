# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Calls that come again with torch tensors on a GPU: what an engine does at every layer and step.

There are two ways past an operation's plans. A call whose arguments differ from an earlier one's in
nothing but addresses and numbers of rows is compared with it in C++, and asked only for those
(`Repeats.run`). If the numbers of rows come again too, addresses are all that is left to ask, and
they are written into a record that is otherwise complete (`Repeats.calls`).
"""

import functools
import operator
import sys
from typing import NamedTuple

from . import launch, torch_tensors

MAX_REPEATS = 4  # signatures, of one number of arguments and one choice of options
MAX_LAUNCHES = 256  # of one signature: combinations of extents whose launch shape is remembered
MAX_CALLS = 4
USES = 2  # of one combination of extents, before it gets a call of its own
MORE_USES = 64  # before something new takes the place of what is known: making it takes longer


class _Repeat(NamedTuple):
    """A signature of torch tensors on a GPU that came again.

    same : see `torch_tensors.same_as`. alignment : the addresses' low bits.
    plan, current_stream : as in the plans' memory.
    launches : {(*elements of each tensor, *numbers): `_Launch`, or None for nothing to do}.
    """

    same: object
    alignment: int
    plan: object
    current_stream: object
    launches: dict


class _Launch:
    """A combination of extents: its grid, threads and counts, and how many uses are left before it
    gets a call of its own."""

    __slots__ = ("counts", "grid", "threads", "uses")

    def __init__(self, grid, threads, counts):
        self.grid, self.threads, self.counts = grid, threads, counts
        self.uses = USES


class Repeats:
    """The latest signatures that came again, for some of an operation's arguments.

    Parameters
    ----------
    op : dispatch.Op
    given : sequence of int
        The indices of the arguments that are given at each call.
    fixed : dict, optional
        {index: address} of the other ones that are present.

    Attributes
    ----------
    calls : tuple of ``call(tensors, numbers, stream)``
        The quickest way for what came last: each runs, or returns False with nothing done.
    """

    def __init__(self, op, given, fixed=None):
        self._op, self._given, self._fixed = op, tuple(given), fixed or {}
        self._rows = [place for place, index in enumerate(self._given) if op.args[index].rows]
        self._masks = tuple(op.masks[index] for index in self._given)
        self._known = ()
        self._to_wait = 0
        self.calls = ()
        kind = sys.modules["torch"].Tensor
        self._address, self._elements = kind.data_ptr, kind.numel

    def run(self, tensors, numbers, stream):
        """Run on ``tensors``, those given; False, with nothing done, if they fit no signature."""
        for call in self.calls:
            if call(tensors, numbers, stream):
                return True
        for repeat in self._known:
            if repeat.same(*tensors):
                addresses = list(map(self._address, tensors))
                if repeat.alignment == alignment(addresses, self._masks):
                    break
        else:
            return False
        if stream is None:
            stream = repeat.current_stream()
        key = (*map(self._elements, tensors), *numbers)
        try:
            found = repeat.launches[key]
        except KeyError:
            found = self._find_launch(repeat, key, tensors, numbers)
        if found is not None:
            values = self._parameters(addresses, found.counts)
            repeat.plan.launcher.enqueue(found.grid, found.threads, stream, *values)
            found.uses -= 1
            if found.uses <= 0:
                found.uses = MORE_USES
                self._shorten(repeat, found, tensors, numbers)
        return True

    def _parameters(self, addresses, counts):
        """The kernel's per-call fields, given the addresses of those given."""
        pointers = [0] * len(self._op.args)
        for index, address in self._fixed.items():
            pointers[index] = address
        for index, address in zip(self._given, addresses):
            pointers[index] = address
        return (*pointers, *counts)

    def _find_launch(self, repeat, key, tensors, numbers):
        """The launch for a new combination of extents, remembered."""
        op, plan = self._op, repeat.plan
        rows, counts = 1, ()
        if op.count is not None:
            extents = [tensors[place].shape[0] for place in self._rows]
            extents += [None] * (sum(arg.rows for arg in op.args) - len(extents))
            counts = op.count(extents, *numbers)
            rows = counts[0]
        found = None
        if rows:
            grid, threads = plan.shape(rows)
            if plan.launcher.has_work(grid, threads):
                found = _Launch(grid, threads, counts)
        if len(repeat.launches) >= MAX_LAUNCHES:
            repeat.launches.clear()
        repeat.launches[key] = found
        return found

    def _shorten(self, repeat, found, tensors, numbers):
        """Have a call of its own for these tensors' shapes and numbers."""
        if repeat.alignment:
            return
        same = torch_tensors.same_as(tensors)
        if same is None:
            return
        values = self._parameters([0] * len(tensors), found.counts)
        parts = repeat.plan.launcher.parts(found.grid, found.threads, values)
        call = _call_maker(self._given, self._masks)(
            same, numbers, self._address, repeat.current_stream, *parts
        )
        self.calls = (call, *self.calls[: MAX_CALLS - 1])

    def learn(self, tensors, plan, current_stream):
        """Know the signature of ``tensors`` from now on."""
        if len(self._known) == MAX_REPEATS:
            # More than are known come in turns: knowing each at once would cost more than it saves.
            self._to_wait -= 1
            if self._to_wait > 0:
                return
            self._to_wait = MORE_USES
        # Where rows have no elements, how many there are does not show in their number.
        if not all(map(self._elements, tensors)):
            return
        same = torch_tensors.same_as(tensors, self._rows)
        if same is None:
            return
        bits = alignment(list(map(self._address, tensors)), self._masks)
        repeat = _Repeat(same, bits, plan, current_stream, {})
        self._known = (repeat, *self._known[: MAX_REPEATS - 1])


def alignment(addresses, masks):
    """The addresses' low bits that count, which decide how wide a vector may be."""
    if not functools.reduce(operator.or_, addresses, 0) & 15:
        return 0
    bits = 0
    for address, mask in zip(addresses, masks):
        bits = bits << 4 | address & mask
    return bits


# The body of a call, written out for its number of tensors: loops over them would take as long as
# all else that is left. `words` are a record's parameters, eight bytes each, of which the first are
# the pointers.
_CALL = """
def make(same, known_numbers, address, current_stream, launch, failed, slowly, new, device):
    records = []

    def call(tensors, numbers, stream):
        if numbers != known_numbers or not same(*tensors):
            return False
        {tensors} = tensors
        {addresses}
        if {odd}:
            return False
        if stream is None:
            stream = current_stream()
        try:
            record = records.pop()
        except IndexError:
            record = new()
        words = record.words
        {stores}
        try:
            launch(stream, record.address, 0)
        except failed:
            slowly(stream, record)
        records.append(record)
        if launching.debug:
            launching.raise_faults(device)
        return True

    return call
"""


@functools.cache
def _call_maker(places, masks):
    """What makes calls that write the tensors' addresses to these words of the parameters; their
    low bits under the masks must be 0."""
    numbers = range(len(places))
    line = "\n        "
    by_mask = [
        (mask, [f"a{i}" for i in numbers if masks[i] == mask]) for mask in sorted(set(masks))
    ]
    source = _CALL.format(
        tensors="".join(f"t{i}, " for i in numbers),
        addresses=line.join(f"a{i} = address(t{i})" for i in numbers),
        odd=" or ".join(f"({' | '.join(names)}) & {mask}" for mask, names in by_mask),
        stores=line.join(f"words[{place}] = a{i}" for i, place in enumerate(places)),
    )
    namespace = {"launching": launch}
    exec(source, namespace)
    return namespace["make"]
