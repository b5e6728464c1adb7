# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Plans: how calls of one signature run, and the memory of them."""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from . import arrays, launch, locks, streams
from .devices import NOWHERE

MAX_PLANS = 1024  # of one operation
# Tells counts in scratch memory, which holds anything before, from what was there: `arrive` of
# scratch.cuh.
SCRATCH_TAG = (secrets.randbits(47) << 1 | 1) << 16


class Scratch(NamedTuple):
    """What a launch needs of scratch memory.

    framework : whose allocator gives it.
    size : in bytes.
    rest : what follows its address in the tail of the kernel's parameters.
    """

    framework: str
    size: int
    rest: bytes

    def tail(self, address):
        """The tail of the parameters."""
        return address.to_bytes(8, "little") + self.rest


class Call(NamedTuple):
    """What a plan gets of one call.

    values : for each argument of the operation its address, 0 where it is absent; the addresses of
        a list of layers; or what is chosen in host memory, as NumPy's int64.
    rows, fields : what the operation's count gave.
    tables : what the plan's own ``tables(values)`` made of the addresses in lists, which is kept
        for as long as they stay the same; None where the plan has no such method.
    stream : the address of a stream; None on the CPU.
    shapes, strides : of each array, where the plan is for NumPy; strides in bytes.
    """

    values: list
    rows: int
    fields: tuple
    tables: Any
    stream: int | None
    shapes: list
    strides: list


class KernelPlan:
    """One launch.

    Parameters
    ----------
    launcher : launch.Launcher
        Its per-call fields are the addresses of all arguments, in order, then the fields that the
        operation's count gave.
    shape : callable
        rows -> (grid, threads).
    """

    __slots__ = ("launcher", "shape")

    def __init__(self, launcher: launch.Launcher, shape: Callable):
        self.launcher, self.shape = launcher, shape

    def launch_for(self, rows):
        """(Launcher, grid, threads) for so much to do. All launchers of one plan take the same
        parameters."""
        return self.launcher, *self.shape(rows)

    def scratch_for(self, rows):
        """The `Scratch` of the launch for so much to do; None where it needs none."""
        del rows

    def launchers(self):
        """All launchers that calls may come to."""
        return (self.launcher,)

    def run(self, call):
        """Enqueue."""
        launcher, grid, threads = self.launch_for(call.rows)
        if launcher.device == NOWHERE and launcher.has_work(grid, threads):
            raise launch.KernelNeeded(*(one.kernel for one in self.launchers()))
        values, scratch = (*call.values, *call.fields), self.scratch_for(call.rows)
        if scratch is None:
            launcher.enqueue(grid, threads, call.stream, *values)
            return
        launcher.load(call.stream)
        held = streams.scratch(scratch.framework, launcher.device, scratch.size, call.stream)
        with held as address:
            tail = scratch.tail(address)
            launcher.enqueue(grid, threads, call.stream, *values, tail=tail)


def flat(kernel, device, constants, items, threads):
    """The `KernelPlan` of a `launch.Launcher` whose work is so many independent ``items`` for each
    row, in blocks of at most so many ``threads``."""
    launcher = launch.Launcher(kernel, device, constants)
    return KernelPlan(launcher, launch.FlatShape(items, device, threads))


def full(kernel, device, constants, items, threads):
    """`flat`, in blocks of just so many ``threads``."""
    return KernelPlan(launch.Launcher(kernel, device, constants), launch.FullShape(items, threads))


class NumPyPlan:
    """A function on NumPy arrays.

    Parameters
    ----------
    function : callable
        ``function(*views, *fields)``; the view of a missing argument is None.
    args, described
        Those of the operation, and the arrays, as for its plan.
    bits : sequence of str
        The names of the arguments that are viewed as bits: whose elements are only moved, or are of
        types that NumPy has not. The others are viewed as the numbers that they are.
    """

    __slots__ = ("dtypes", "function")

    def __init__(self, function: Callable, args, described, bits=()):
        self.function = function
        self.dtypes = tuple(
            array and (array.dtype.bits if arg.name in bits else array.dtype.numpy)
            for arg, array in zip(args, described)
        )

    def run(self, call):
        """Run it, here and now."""
        views = [
            None if shape is None else arrays.as_numpy(address, shape, strides, dtype)
            for address, shape, strides, dtype in zip(
                call.values, call.shapes, call.strides, self.dtypes
            )
        ]
        self.function(*views, *call.fields)


class Entry(NamedTuple):
    """What is remembered of a signature.

    plan : an object with ``run(call)``. tables : its method of that name, or None.
    apart : the `apart.Apart` of the arrays that are written, where there are several; else None.
    device : index of the GPU it runs on; None for the CPU.
    current_stream : a function that gives the current stream of the destination's framework.
    others : the like of other frameworks that own arguments.
    torchs : the like of torch, if any argument on the GPU is torch's; else None.
    hosted : the indices of arrays in host memory, if the plan runs on a GPU.
    strides : of each argument, in bytes.
    most_rows : (index, the most rows that were checked) of each destination of which not any number
        will do.
    """

    plan: Any
    tables: Callable | None
    apart: Any
    device: int | None
    current_stream: Callable | None
    others: tuple
    torchs: Callable | None
    hosted: tuple
    strides: list
    most_rows: tuple


class Memory:
    """Entries by their signatures; the oldest goes where a new one finds no room."""

    def __init__(self):
        self._entries: OrderedDict[tuple, Entry] = OrderedDict()
        self._lock = locks.Lock()
        self.get = self._entries.get

    def __len__(self):
        return len(self._entries)

    def add(self, signature, entry):
        """Remember an entry."""
        with self._lock:
            while len(self._entries) >= MAX_PLANS:
                self._entries.popitem(last=False)
            self._entries[signature] = entry

    def clear(self):
        """Forget all."""
        with self._lock:
            self._entries.clear()
