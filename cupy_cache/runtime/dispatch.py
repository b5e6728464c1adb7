# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""One call path for every operation, on the GPU and on the CPU.

Everything about a call that depends only on its *signature* (shapes, strides, dtypes, devices,
alignment, options) is decided once, in the operation's plan function, and remembered. The extents
of dimensions declared as rows (the tokens of a step) are not part of the signature: they change at
every step and are checked at every call.
"""

import threading
from collections import OrderedDict
from typing import NamedTuple

from ..errors import DTypeError, ShapeError
from . import arrays, contract, launch, repeats, torch_tensors

MAX_PLANS = 1024


# The facts of an optional argument that is absent.
_NOTHING = (0, (None,), None, None, None, None)
# In place of readers: `torch_tensors.read` reads them all.
_TORCH = object()


def _read_nothing(value):
    del value
    return _NOTHING


class Arg(NamedTuple):
    """An array argument of an operation.

    name : the argument's name. rows : its first dimension varies from call to call. optional : may
    be None. index : it holds indices, read one by one: that it is aligned to more than their size
    means nothing to the plan.
    """

    name: str
    rows: bool = False
    optional: bool = False
    index: bool = False


class GpuPlan(NamedTuple):
    """How a signature runs on a GPU.

    launcher : `launch.Launcher` whose per-call fields are all array pointers in order of the
    operation's arguments, then what `Op`'s count gave, as i64.
    shape : row count -> (grid, threads).
    """

    launcher: launch.Launcher
    shape: object


class CpuPlan(NamedTuple):
    """How a signature runs on the CPU: ``run(*numpy views, *what Op's count gave)``; a missing
    optional argument is None. ``dtypes`` are the NumPy dtypes to view each argument as."""

    run: object
    dtypes: tuple


def _views(plan, pointers, metas, steps):
    """The arrays of a `CpuPlan` as NumPy sees them; None where absent."""
    views = [
        None if step is None else arrays.as_numpy(pointer, meta[0], step, dtype)
        for pointer, meta, step, dtype in zip(pointers, metas, steps, plan.dtypes)
    ]
    return views + [None] * (len(plan.dtypes) - len(views))


class Op:
    """An operation on arrays.

    Parameters
    ----------
    name : str
        The public function's name.
    args : tuple of Arg
        Its array arguments, in the order of the kernel's pointers.
    plan : callable
        ``plan(op, arrays, options)`` -> `GpuPlan` or `CpuPlan`; ``arrays`` are `arrays.Array` or
        None. Checks everything that the signature decides and raises before anything is written.
    destination : int
        Index of the argument that decides device and stream.
    count : callable, optional
        ``count(extents, *numbers)`` -> a tuple of integers that the kernel gets at every call: the
        rows to process, then whatever else it needs of the call's numbers and of the first extents
        of the ``rows`` arguments, which come in order (None where absent); raises where they do not
        fit each other. None where the plan decides everything: the shape is then asked for one row.
    """

    def __init__(self, name, args, plan, destination, count=None):
        self.name, self.args, self.destination, self.count = name, args, destination, count
        self._make = plan
        self.masks = [7 if arg.index else 15 for arg in args]  # indices have at most 8 bytes
        self._rows = tuple(index for index, arg in enumerate(args) if arg.rows)
        self._readers = {}
        self._plans = OrderedDict()
        self._repeats = {}
        self._lock = threading.Lock()

    def __call__(self, objects, options=(), stream=None, numbers=()):
        """Run on ``objects``, one for each `Arg`; ``options`` is hashable and given to the plan.
        Optional arguments at the end may be left out, which costs less than None. ``numbers``
        change from call to call and go to ``count``."""
        if stream is not None and type(stream) is not int:
            stream = arrays.stream_pointer(stream)
        objects = self._without_absent(objects) if objects[-1] is None else objects
        # From here to the launch every statement runs at every call: a microsecond is ten of them.
        known = self._repeats.get((options, len(objects)))
        if known is not None and known.run(objects, numbers, stream):
            return
        learnt = self.run(objects, options, stream, numbers)
        if learnt is not None:
            self._learn(known, objects, options, learnt)

    def run(self, objects, options, stream, numbers):
        """Run by reading every array. Returns what the plan's memory holds, (plan, current stream),
        where the signature is not new and all arrays are torch's on a GPU; else None."""
        try:
            readers = self._readers[tuple(map(type, objects))]
        except KeyError:
            readers = self._find_readers(objects)
        if readers is _TORCH:
            pointers, strides, metas = torch_tensors.read(objects)
        else:
            facts, stream = self._read(readers, objects, stream)
            pointers = [fact[0] for fact in facts]
            strides = [fact[2] for fact in facts]
            metas = [(fact[1], fact[3], fact[4]) for fact in facts]
        whole, extents = metas.copy(), []
        for index in self._rows:
            if index >= len(metas):
                extents.append(None)
                continue
            shape, dtype, place = metas[index]
            if not shape:
                self._refuse_scalar(index)
            extents.append(shape[0])
            metas[index] = shape[1:], dtype, place
        key = (options, repeats.alignment(pointers, self.masks), *strides, *metas)
        known = entry = self._plans.get(key)
        if entry is None or (entry[3] is not None and whole[self.destination][0][0] > entry[3]):
            entry = self._remember(key, pointers, whole, strides, options)
        plan, current_stream, steps, most_rows = entry
        if self.count is None:
            rows, counts = 1, ()
        else:
            counts = self.count(extents, *numbers)
            rows = counts[0]
        if not rows:
            return None
        if current_stream is None:
            plan.run(*_views(plan, pointers, whole, steps), *counts)
            return None
        if stream is None:
            stream = current_stream()
        grid, threads = plan.shape(rows)
        if len(pointers) < len(self.args):
            pointers += [0] * (len(self.args) - len(pointers))
        plan.launcher.enqueue(grid, threads, stream, *pointers, *counts)
        again = known is not None and most_rows is None and readers is _TORCH
        return (plan, current_stream) if again else None

    def _learn(self, known, objects, options, learnt):
        if known is None:
            if len(self._repeats) >= MAX_PLANS:
                self._repeats.clear()
            known = repeats.Repeats(self, range(len(objects)))
            self._repeats[options, len(objects)] = known
        known.learn(objects, *learnt)

    def _without_absent(self, objects):
        """``objects`` without the optional ones at the end that are None."""
        count = len(objects)
        while count and objects[count - 1] is None and self.args[count - 1].optional:
            count -= 1
        return tuple(objects[:count])

    def _read(self, readers, objects, stream):
        """The facts of all arguments, and the stream, which protocols must know."""
        if readers is not None:
            return [read(value) for read, value in zip(readers, objects)], stream
        if stream is None:
            stream = self._stream_for(objects[self.destination])
        facts = [
            _NOTHING if value is None and arg.optional else arrays.read(value, arg.name, stream)
            for value, arg in zip(objects, self.args)
        ]
        return facts, stream

    def _find_readers(self, objects):
        """One reader for each argument, remembered by the arguments' types; `_TORCH` where all are
        torch's, None where one of them must be read through a protocol."""
        readers = tuple(
            _read_nothing if value is None and arg.optional else arrays.reader_for(value, arg.name)
            for value, arg in zip(objects, self.args)
        )
        if any(reader in arrays.FOREIGN for reader in readers):
            readers = None
        elif arrays.all_torch(readers):
            readers = _TORCH
        self._readers[tuple(map(type, objects))] = readers
        return readers

    def _refuse_scalar(self, index):
        raise ShapeError(
            f"{self.name}: Invalid shape of {self.args[index].name}: expected at least one "
            "dimension, got a scalar"
        )

    def plan(self, described, options=()):
        """The plan for `arrays.Array` descriptions (None where absent), not remembered."""
        return self._make(self, described, options)

    def _describe(self, pointers, metas, strides):
        absent = (None,) * (len(self.args) - len(pointers))
        described = tuple(
            None
            if place is None
            else arrays.describe(
                arrays.Facts(ptr, shape, step, dtype, place), f"{self.name}: {arg.name}"
            )
            for arg, ptr, (shape, dtype, place), step in zip(self.args, pointers, metas, strides)
        )
        return described + absent

    def _remember(self, key, pointers, metas, strides, options):
        """What the plans' memory holds: (plan, what gives the current stream or None on the CPU,
        byte strides of each argument or None where it is absent, the most rows of the destination
        that the plan has been checked for or None where their number does not matter)."""
        described = self._describe(pointers, metas, strides)
        plan = self.plan(described, options)
        stream = None
        if isinstance(plan, GpuPlan):
            stream = arrays.current_stream_of(described[self.destination])
        steps = [None if array is None else array.strides for array in described]
        most_rows = None
        destination = described[self.destination]
        if self.args[self.destination].rows and contract.rows_interleave(destination):
            most_rows = destination.shape[0]  # more may run into one another
        entry = plan, stream, steps, most_rows
        if any(described[i] is not None and described[i].shape[0] == 0 for i in self._rows):
            # The strides of an empty array were not checked: they must not vouch for a full one,
            # which has the same signature if only its rows are missing.
            return entry
        with self._lock:
            while len(self._plans) >= MAX_PLANS:
                self._plans.popitem(last=False)
            self._plans[key] = entry
        return entry

    def _stream_for(self, destination):
        array = arrays.view(destination, self.args[self.destination].name)
        if array.device.kind == "cpu":
            return None
        return arrays.current_stream_of(array)()


class Bound:
    """An operation with some arrays and its options given once: an engine's caches.

    The arrays are kept alive. Their memory must stay where it is, and their shapes as they are: of
    torch tensors on a GPU, the addresses that they had at first are used.

    Parameters
    ----------
    op : Op
    fixed : dict
        {name of an argument: array}.
    options : tuple
        As for a call of ``op``.
    """

    def __init__(self, op, fixed, options=()):
        self._op, self._options = op, options
        names = [arg.name for arg in op.args]
        count = 1 + max(
            index for index, arg in enumerate(op.args) if arg.name in fixed or not arg.optional
        )
        self._objects = [fixed.get(name) for name in names[:count]]
        self._given = [
            index
            for index, arg in enumerate(op.args[:count])
            if arg.name not in fixed and not arg.optional
        ]
        self._known = None

    def __call__(self, *objects, stream=None):
        """Run on the other arrays, in the order of the operation's arguments."""
        if len(objects) != len(self._given):
            names = ", ".join(self._op.args[index].name for index in self._given)
            raise TypeError(f"{self._op.name}: expected {names}, got {len(objects)} arrays")
        if stream is not None and type(stream) is not int:
            stream = arrays.stream_pointer(stream)
        known = self._known
        if known is not None and known.run(objects, (), stream):
            return
        everything = self._objects.copy()
        for index, value in zip(self._given, objects):
            everything[index] = value
        learnt = self._op.run(everything, self._options, stream, ())
        if learnt is None:
            return
        if known is None:
            addresses = torch_tensors.addresses(everything)
            fixed = {i: a for i, a in enumerate(addresses) if i not in self._given}
            known = self._known = repeats.Repeats(self._op, self._given, fixed)
        known.learn(objects, *learnt)


def require_array(op, name, value):
    """Refuse None where an array is needed."""
    if value is None:
        raise DTypeError(f"{op}: Invalid type of {name}: expected an array, got None")
