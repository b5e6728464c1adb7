# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path: runs a call whose signature came before, with torch or CuPy arrays on a GPU, as at
every layer and step of an engine. Both kinds of arrays are called tensors here.

The slow path, `dispatch.Op.run`, reads each array, builds the signature and looks up its plan. A
fast path is made for one signature that came again. It compares the tensors with those of that
signature (guards.py), and asks them for nothing but their addresses and numbers of elements.

A fast path is a function ``path(tensors, scalars, stream, caller)``. It runs the call and returns
the new result, or None where the call gives one; or it does nothing and returns False, and the slow
path runs the call or raises. ``caller`` is the `bound.Bound` that was called, or else the call's
objects. A signature has one path, whatever the extents; the layers of a `PagedKVCache` share it.

kernels.py : paths of operations on single arrays, which launch one kernel.
layers.py : paths of operations on lists of arrays, which run any plan.
calls.py : what a call's extents come to: computed once, then remembered.
"""

from .. import plans
from . import kernels, layers

MAX_PATHS = 8  # signatures of calls of one form
MAX_FORMS = 256
# Making a path takes long. Once a form has so many, only each 64th slow call makes a new one.
PATIENCE = 64


class FastPaths:
    """The fast paths of an operation, by the *form* of a call: what can be seen without looking at
    any array. That is its options and how many arguments it has; of operations on lists, which
    arguments are given and how long each list is."""

    def __init__(self, op):
        self._op = op
        self.forms = {}

    def of(self, form):
        """The fast paths for calls of this form, the latest first. Later ones are added to the same
        list."""
        found = self.forms.get(form)
        if found is None:
            if len(self.forms) >= MAX_FORMS:
                self.forms.clear()
            found = self.forms[form] = Recent()
        return found

    def clear(self):
        """Forget all paths."""
        for paths in self.forms.values():
            paths.clear()

    def learn(self, paths, entry, objects, options, made, given=None):
        """Make the fast path of these objects' signature, if it can have one, and add it to
        ``paths``. ``made``: the new result, where the call gave none. ``given``: the indices of the
        arguments that a call gives, where a `bound.Bound` has the others."""
        on_cpu = entry.device is None and any(entry.strides)
        if on_cpu or entry.most_rows or not paths.may_learn():
            return
        if made is not None:
            objects = [*objects]
            objects[self._op.result.at] = None
        if self._op.has_lists:
            path = layers.path_of(self._op, entry, objects, options, made, given)
        elif isinstance(entry.plan, plans.KernelPlan):
            path = kernels.path_of(self._op, entry, objects, options, made, given)
        else:
            path = None
        if path is not None:
            paths.learn(path)


class Recent(list):
    """The fast paths of the latest signatures of one form, the latest first."""

    _patience = 0

    def may_learn(self):
        """Whether another path may be made now."""
        if len(self) < MAX_PATHS:
            return True
        self._patience -= 1
        if self._patience > 0:
            return False
        self._patience = PATIENCE
        return True

    def learn(self, path):
        """Add a path; the oldest goes where there are too many."""
        self[:] = [path, *self[: MAX_PATHS - 1]]
