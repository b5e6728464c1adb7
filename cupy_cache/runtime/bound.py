# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""An operation with some of its arguments fixed, as a `PagedKVCache` calls it."""

import numpy as np

from .. import errors
from ..errors import CopyError, CupyCacheError
from . import arrays, dispatch, fastpath, indices, lists, signatures, streams
from .fastpath.layers import flattened


class Bound:
    """An operation with some arguments fixed, such as an engine's caches, and its options.

    The fixed arrays are read once and kept alive; of lists a copy is kept. Their memory must stay
    where it is, and their shapes as they are.

    Parameters
    ----------
    op : Op
    name : str
        The name in errors, instead of the operation's.
    fixed : dict
        {name of an argument, with its suffix: array or list of arrays}.
    options, scalars : tuple
        As for a call of ``op``.
    also : sequence of str
        Names of the optional arguments that each call gives.
    """

    def __init__(self, op, name, fixed, options=(), scalars=(), also=()):
        self.op, self.name, self.options, self.scalars = op, name, options, scalars
        names = [arg.name + arg.suffix for arg in op.args]
        self._objects = [
            list(value) if issubclass(type(value), lists.LISTS) else value
            for value in map(fixed.get, names)
        ]
        self.given = tuple(
            index
            for index, arg in enumerate(op.args)
            if names[index] not in fixed and (not arg.optional or arg.name in also)
        )
        self._count, self._args = len(self.given), [op.args[index] for index in self.given]
        self._form_in_host_memory = (options, *[indices.Chosen] * self._count)
        # For calls whose arguments are all chosen in host memory: (entry, values, tables); () where
        # the lists are empty; None before `check`.
        self._in_host_memory = None
        others = [index for index, value in enumerate(self._objects) if value is not None]
        # `fastpath.kernels` asks a fixed array for its number of rows and for nothing else.
        assert all(op.args[index].varies in ((), arrays.ROWS) for index in others), name
        with errors.renamed(self.name, {}):
            # What owns exported memory lives as long as its address is known.
            self.found, self._keep = op.read(self._objects, None, others)
            self._form = "bound", options, self.given, self._signature()
            try:
                self.fast_paths = op.fast_paths.of(self._form)
            except Exception as error:
                raise op.unhashable(options) from error
        # Fast paths of operations on lists, by the form of the arguments that calls give.
        self._paths_of: dict[tuple, fastpath.Recent] = {}
        # The two attributes that fast paths read.
        self.addresses = tuple(
            found.addresses if type(found) is lists.Layers else found.ptr
            for found in map(self.found.__getitem__, others)
        )
        self.tensors = [value for value in self._objects if arrays.is_torch(value)]
        op.bound.add(self)

    def _signature(self):
        """The fixed arguments' part of the signature."""
        signature = []
        for arg, meta in zip(self.op.args, self.found):
            meta = meta.metadata if type(meta) is lists.Layers else meta
            if meta is not None:
                meta = meta._replace(ptr=meta.ptr & arg.mask, keep=None)
            signature.append(meta)
        return tuple(signature)

    def __reduce__(self):
        reason = "it writes to memory by its address"
        raise CopyError(f"{self.name}: it cannot be copied or pickled: {reason}")

    def forget(self):
        """Forget fast paths and plans."""
        self.fast_paths.clear()
        for paths in self._paths_of.values():
            paths.clear()
        self._in_host_memory = None

    def check(self):
        """Raise what is wrong with the fixed arguments alone: make the plan for calls whose other
        arguments are in host memory."""
        if self._in_host_memory is not None:
            return
        found = self.found.copy()
        for index in self.given:
            found[index] = indices.Chosen(np.empty(0, np.int64))
        signature, values, _ = signatures.of(self.op, found, self.options)
        if signature is None:
            self._in_host_memory = ()
            return
        entry = self.op.memory.get(signature) or self.op.remember(signature, found, self.options)
        if entry.apart is not None:
            entry.apart.check(values)
        tables = None if entry.tables is None else entry.tables(values)
        self._in_host_memory = entry, values, tables

    def __call__(self, *given, stream=None, scalars=None):
        """Run on the other arguments, in the operation's order. ``scalars``: for this call, instead
        of the fixed ones."""
        if len(given) != self._count:
            names = ", ".join(self.op.args[index].name for index in self.given)
            raise TypeError(  # as of a function
                f"{self.name}: Invalid number of arguments: expected {names}, got {len(given)}"
            )
        if stream is not None and not (type(stream) is int and 0 <= stream <= streams.LARGEST):
            stream = streams.pointer(self.name, stream)
        if scalars is None:
            scalars = self.scalars
        for path in self.fast_paths:
            made = path(given, scalars, stream, self)
            if made is not False:
                return made
        try:
            return self._run(given, stream, scalars)
        except CupyCacheError as error:
            errors.rename(error, self.name, {})
            raise

    def _run(self, given, stream, scalars):
        op, objects, paths = self.op, self._objects.copy(), self.fast_paths
        if op.has_lists:
            given, tensors, form = flattened(op, self._args, given, self.options)
        for index, value in zip(self.given, given):
            objects[index] = value
        if op.has_lists:
            if form == self._form_in_host_memory:
                self._run_chosen(objects, stream, scalars)
                return None
            paths = self._paths_of.get(form)
            if paths is None:
                paths = self._paths_of[form] = op.fast_paths.of((self._form, form))
            for path in paths:
                made = path(tensors, scalars, stream, objects, self.addresses)
                if made is not False:
                    return made
        known = objects
        if op.result is not None:
            known = [found or value for found, value in zip(op.describe(self.found), objects)]
        objects, made = op.with_result(objects, known, self.options, stream)
        read = op.read(objects, stream, self.given)
        found = [read.found[i] if i in self.given else meta for i, meta in enumerate(self.found)]
        entry = op.run(dispatch.Read(found, read.keep), objects, self.options, scalars, stream)
        if entry is not None:
            op.fast_paths.learn(paths, entry, objects, self.options, made, self.given)
        return made

    def _run_chosen(self, objects, stream, scalars):
        """Run a call whose arguments are all chosen in host memory: its plan is known."""
        self.check()
        if not self._in_host_memory:
            return
        self.op.refuse_traced(objects, range(len(objects)))
        entry, values, tables = self._in_host_memory
        values, extents = values.copy(), []
        for index in self.given:
            values[index] = numbers = objects[index]
            extents.append(numbers.count)
        work = self.op.count(extents, self.options, scalars)
        self.op.finish(entry, values, tables, stream, work, objects)
