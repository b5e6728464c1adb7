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
from .errors import DTypeError

MAX_PLANS = 1024


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
    operation's arguments, then the row count as i64. shape : row count -> (grid, threads).
    """

    launcher: launch.Launcher
    shape: object


class CpuPlan(NamedTuple):
    """How a signature runs on the CPU: ``run(*numpy views, rows)``; a missing optional argument is
    None. ``dtypes`` are the NumPy dtypes to view each argument as."""

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
        ``count(extents)`` -> rows to process, from the first extents of the ``rows`` arguments in
        order (None where absent); raises where they do not fit each other.
    """

    def __init__(self, name, args, plan, destination, count):
        self.name, self.args, self.destination = name, args, destination
        self._make, self._count = plan, count
        self._plans = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, objects, options=(), stream=None):
        """Run on ``objects`` (one for each `Arg`); ``options`` is hashable and given to the plan."""
        key, pointers, extents, facts = [options], [], [], []
        for value, arg in zip(objects, self.args):
            if value is None and arg.optional:
                key.append(None)
                pointers.append(0)
                facts.append(None)
                if arg.rows:
                    extents.append(None)
                continue
            reader = arrays.reader_for(value, arg.name)
            if reader in arrays.FOREIGN:
                if stream is None:
                    stream = self._stream_for(objects[self.destination])
                fact = reader(value, stream)
            else:
                fact = reader(value)
            ptr, shape, strides, dtype, place, _ = fact
            if arg.rows:
                extents.append(shape[0] if shape else None)
                shape = shape[1:] if shape else None
            key.append((shape, strides, dtype, place, ptr & 15))
            pointers.append(ptr)
            facts.append(fact)
        key = tuple(key)
        entry = self._plans.get(key)
        if entry is None:
            entry = self._remember(key, facts, options)
        plan, current_stream = entry
        rows = self._count(extents)
        if not rows:
            return
        if current_stream is None:
            self._run_cpu(plan, facts, rows)
            return
        if stream is None:
            stream = current_stream()
        elif type(stream) is not int:
            stream = arrays.stream_pointer(stream)
        grid, threads = plan.shape(rows)
        plan.launcher.enqueue(grid, threads, stream, *pointers, rows)

    def plan(self, described, options=()):
        """The plan for `arrays.Array` descriptions (None where absent), not remembered."""
        return self._make(self, described, options)

    def _remember(self, key, facts, options):
        described = tuple(
            None if fact is None else arrays.describe(arrays.Facts(*fact), f"{self.name}: {arg.name}")
            for fact, arg in zip(facts, self.args)
        )
        plan = self.plan(described, options)
        stream = None
        if isinstance(plan, GpuPlan):
            stream = arrays.current_stream_of(described[self.destination])
        if any(array is not None and 0 in array.shape for array in described):
            # The strides of an empty array were not checked: they must not vouch for a full one.
            return plan, stream
        with self._lock:
            while len(self._plans) >= MAX_PLANS:
                self._plans.popitem(last=False)
            self._plans[key] = plan, stream
        return plan, stream

    def _run_cpu(self, plan, facts, rows):
        views = [
            None if fact is None else arrays.as_numpy(fact[0], fact[1], _byte_strides(fact), dtype)
            for fact, dtype in zip(facts, plan.dtypes)
        ]
        plan.run(*views, rows)

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
