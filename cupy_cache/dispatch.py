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

from . import arrays, launch
from .errors import DTypeError, ShapeError

MAX_PLANS = 1024


# The facts of an optional argument that is absent.
_NOTHING = (0, (None,), None, None, None, None)


def _read_nothing(value):
    del value
    return _NOTHING


class Arg(NamedTuple):
    """An array argument of an operation.

    name : the argument's name. rows : its first dimension varies from call to call. optional : may
    be None.
    """

    name: str
    rows: bool = False
    optional: bool = False


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
    count : callable
        ``count(extents)`` -> a tuple of integers that the kernel gets at every call: the rows to
        process, then whatever else it needs of the first extents of the ``rows`` arguments, which
        come in order (None where absent); raises where they do not fit each other.
    """

    def __init__(self, name, args, plan, destination, count):
        self.name, self.args, self.destination = name, args, destination
        self._make, self._count = plan, count
        self._rows = tuple(arg.rows for arg in args)
        self._readers = {}
        self._plans = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, objects, options=(), stream=None):
        """Run on ``objects``, one for each `Arg`; ``options`` is hashable and given to the plan."""
        if stream is not None and type(stream) is not int:
            stream = arrays.stream_pointer(stream)
        # From here to the launch every statement runs at every call: a microsecond is ten of them.
        try:
            readers = self._readers[tuple(map(type, objects))]
        except KeyError:
            readers = self._find_readers(objects)
        if readers is None:  # some array comes through a protocol that must know the stream
            if stream is None:
                stream = self._stream_for(objects[self.destination])
            facts = [arrays.read(v, a.name, stream) if v is not None else _NOTHING
                     for v, a in zip(objects, self.args)]  # fmt: skip
        else:
            facts = [read(value) for read, value in zip(readers, objects)]
        key, extents, alignment = [options], [], 0
        for (ptr, shape, strides, dtype, place, _), rows in zip(facts, self._rows):
            if rows:
                if not shape:
                    self._refuse_scalar(facts)
                extents.append(shape[0])
                shape = shape[1:]
            alignment = alignment << 4 | ptr & 15
            key += shape, strides, dtype, place
        key.append(alignment)
        key = tuple(key)
        entry = self._plans.get(key)
        if entry is None:
            entry = self._remember(key, facts, options)
        plan, current_stream = entry
        counts = self._count(extents)
        if not counts[0]:
            return
        if current_stream is None:
            self._run_cpu(plan, facts, counts)
            return
        if stream is None:
            stream = current_stream()
        grid, threads = plan.shape(counts[0])
        plan.launcher.enqueue(grid, threads, stream, *[fact[0] for fact in facts], *counts)

    def _find_readers(self, objects):
        """One reader for each argument, remembered by the arguments' types; None where one of them
        must be read through a protocol."""
        readers = tuple(
            _read_nothing if value is None and arg.optional else arrays.reader_for(value, arg.name)
            for value, arg in zip(objects, self.args)
        )
        if any(reader in arrays.FOREIGN for reader in readers):
            readers = None
        self._readers[tuple(map(type, objects))] = readers
        return readers

    def _refuse_scalar(self, facts):
        name = next(a.name for a, fact in zip(self.args, facts) if a.rows and not fact[1])
        raise ShapeError(
            f"{self.name}: Invalid shape of {name}: expected at least one dimension, got a scalar"
        )

    def plan(self, described, options=()):
        """The plan for `arrays.Array` descriptions (None where absent), not remembered."""
        return self._make(self, described, options)

    def _remember(self, key, facts, options):
        described = tuple(
            None
            if fact is _NOTHING
            else arrays.describe(arrays.Facts(*fact), f"{self.name}: {arg.name}")
            for fact, arg in zip(facts, self.args)
        )
        plan = self.plan(described, options)
        stream = None
        if isinstance(plan, GpuPlan):
            stream = arrays.current_stream_of(described[self.destination])
        rows = [array for arg, array in zip(self.args, described) if arg.rows and array is not None]
        if any(array.shape[:1] == (0,) for array in rows):
            # The strides of an array without rows were not checked: they must not vouch for one
            # that has rows, and else the same signature.
            return plan, stream
        with self._lock:
            while len(self._plans) >= MAX_PLANS:
                self._plans.popitem(last=False)
            self._plans[key] = plan, stream
        return plan, stream

    def _run_cpu(self, plan, facts, counts):
        views = [
            None if fact is _NOTHING else arrays.as_numpy(fact[0], fact[1], _byte_strides(fact), dtype)
            for fact, dtype in zip(facts, plan.dtypes)
        ]
        plan.run(*views, *counts)

    def _stream_for(self, destination):
        array = arrays.view(destination, self.args[self.destination].name)
        if array.device.kind == "cpu":
            return None
        return arrays.current_stream_of(array)()


def _byte_strides(fact):
    return arrays.describe(arrays.Facts(*fact), "").strides


def require_array(op, name, value):
    """Refuse None where an array is needed."""
    if value is None:
        raise DTypeError(f"{op}: Invalid type of {name}: expected an array, got None")
