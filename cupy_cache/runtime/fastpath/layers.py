# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Fast paths of operations whose arguments are lists of arrays, or chosen blocks and slots."""

from .. import arrays, guards, indices, lists, making
from . import calls


def flattened(op, args, objects, options):
    """(Objects, tensors, form) of a call of ``op`` that gives ``args``: the ``objects``, of which
    those in host memory are read; all their tensors in one list; the form of the call."""
    read, tensors, form = [], [], [options]
    for arg, value in zip(args, objects):
        if value is None:
            form.append(type(value))
        elif arg.layers:
            if type(value) is not list:
                value = lists.plain(op.name, arg.name, value)
            tensors += value
            form.append(len(value))
        elif arg.chosen and type(value := indices.read_host(op.name, arg, value)) is indices.Chosen:
            form.append(indices.Chosen)
        else:
            tensors.append(value)
            form.append(True)
        read.append(value)
    return read, tensors, tuple(form)


def path_of(op, entry, objects, options, made, given):
    """The fast path of an operation on lists; None where there is none. See `FastPaths.learn`.

    Only lists may be bound. The path's last argument, ``fixed``, is their addresses.
    """
    bound = []
    if given is None:
        given = range(len(objects))
    else:
        bound = [i for i, value in enumerate(objects) if value is not None and i not in given]
    if entry.others or not all(op.args[index].layers for index in bound):
        return None
    given_args = [op.args[index] for index in given]
    _, tensors, form = flattened(op, given_args, [objects[index] for index in given], options)
    kind = guards.kind_of(tensors if made is None else [*tensors, made])
    if kind is None:
        return None
    # (index, at, count) of each argument: where its first tensor is among ``tensors``, and how many
    # it lists; None where it has no tensor, or is no list.
    parts, args = [], []
    for index, arg, length in zip(given, given_args, form[1:]):
        if type(length) is type:  # absent, or in host memory
            parts.append((index, None, None))
        else:
            parts.append((index, len(args), None if length is True else length))
            args += [arg] * int(length)
    address = kind.address
    same = kind.same_as(tensors, [arg.varies for arg in args])
    if same is None or arrays.any_bits(map(address, tensors)) & 15:
        return None
    extents = calls.Extents(
        kind, [(op.args[index], at, count) for index, at, count in parts], tensors
    )
    sized = extents.sized
    if any(0 in tensor.shape[1:] for tensor in (tensors if sized is None else sized(tensors))):
        return None  # no rows can be computed from 0 elements
    varying = [index for index, _, _ in parts if op.args[index].varies]
    # (index of the argument, place of its extent) of each that is chosen in host memory.
    chosen = [
        (index, varying.index(index))
        for index, length in zip(given, form[1:])
        if length is indices.Chosen
    ]
    addressed = _Addressed(op, entry, kind.above, parts, bound)
    new = None if made is None else calls.New(op, kind, made)
    works = _Works(kind, same, extents, new, op, options, bool(chosen))
    find, work_of, finish = works.find, op.count, op.finish
    framework, device, place = kind.framework, entry.device, op.result and op.result.at

    def run(tensors, scalars, stream, objects, fixed=()):
        alike, settled_scalars, found = works.settled
        if alike is None or scalars != settled_scalars or not alike(*tensors):
            found = find(tensors, scalars)
            if found is None:
                return False
        addresses = list(map(address, tensors))
        known, known_fixed, values, tables = addressed.latest
        if addresses != known or fixed != known_fixed:
            values, tables = addressed.make(addresses, fixed, tensors)
            if values is None:
                return False
        extents, work, new = found
        made = None
        if new is not None:
            values, made = values.copy(), new()
            if stream is not None:
                making.hand_over(made, framework, device, stream)
            values[place] = address(made)
        if chosen:
            values, extents = values.copy(), extents.copy()
            for index, at in chosen:
                values[index] = numbers = objects[index]
                extents[at] = numbers.count
            work = work_of(extents, options, scalars)
        finish(entry, values, tables, stream, work, objects)
        return made

    return run


class _Addressed:
    """What is made of a call's addresses, and kept as long as these stay.

    latest : (addresses, those of bound lists, values, tables) of the latest call: the last two as
        in `plans.Call`, but for what is chosen in host memory and for a new result.

    Parameters
    ----------
    op : dispatch.Op
    entry : plans.Entry
    above : int
        `guards.Kind.above` of the arrays.
    parts : list of (index, at, count)
        Of each argument that calls give, where its first address is, and how many it lists; None
        where it has no address, or is no list.
    bound : list of int
        The arguments that calls do not give.
    """

    def __init__(self, op, entry, above, parts, bound):
        self._entry, self._above, self._parts, self._bound = entry, above, parts, bound
        self._count = len(op.args)
        self._lists = [index for index, arg in enumerate(op.args) if arg.layers]
        self.latest = None, None, None, None

    def make(self, addresses, fixed, tensors):
        """(Values, tables) for these addresses; None and None where the plan was not made for their
        alignment, or one is none of a GPU."""
        if arrays.any_bits(addresses) & 15:
            return None, None
        above = self._above
        if min(addresses, default=above) < above and arrays.doubtful(addresses, tensors):
            return None, None
        values = [0] * self._count
        for index, at, count in self._parts:
            if count is not None:
                values[index] = tuple(addresses[at : at + count])
            elif at is not None:
                values[index] = addresses[at]
        for index, kept in zip(self._bound, fixed):
            values[index] = kept
        if self._entry.apart is not None:
            self._entry.apart.check(values)
        _, _, known, tables = self.latest
        if self._entry.tables is None:
            tables = None
        elif known is None or any(known[index] != values[index] for index in self._lists):
            tables = self._entry.tables(values)
        self.latest = addresses, fixed, values, tables
        return values, tables


class _Works(calls.Results):
    """A result is (extents, work, new): what the operation made of the extents, None where that
    also depends on what is chosen in host memory; and a function that makes the operation's result,
    None where calls give it."""

    def __init__(self, kind, same, extents, new, op, options, chosen):
        super().__init__(kind, same, extents, new)
        self._op, self._options, self._chosen = op, options, chosen

    def make(self, extents, scalars, sizes, new):
        work = None if self._chosen else self._op.count(extents, self._options, scalars)
        return extents, work, new
