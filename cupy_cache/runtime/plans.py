# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Plans, each of which runs the calls of one signature, and the memory that keeps them."""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from . import arrays, launch, locks, streams
from .devices import NOWHERE

MAX_PLANS = 1024  # of one operation
# In scratch memory, which comes with any bytes in it, a word is a count only if its upper bits are
# this tag; see scratch.cuh.
SCRATCH_TAG = (secrets.randbits(47) << 1 | 1) << 16


class Scratch(NamedTuple):
    """The scratch memory of a launch.

    framework : whose allocator gives it.
    size : in bytes.
    rest : the bytes behind its address in the tail of the kernel's parameters.
    """

    framework: str
    size: int
    rest: bytes

    def tail(self, address):
        """The tail of the parameters, for scratch memory at ``address``."""
        return address.to_bytes(8, "little") + self.rest


class Call(NamedTuple):
    """One call, as a plan gets it.

    values : for each argument of the operation: its address, 0 where it is absent; a list's
        addresses; or the `indices.Chosen` in host memory.
    rows, fields : the results of the operation's count.
    tables : the result of the plan's method ``tables(values)``, which depends on nothing but the
        addresses in lists and is kept while these stay the same; None where the plan has no such
        method.
    stream : the address of a stream; None on the CPU.
    shapes, strides : of each array, for plans on NumPy; strides in bytes.
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
        Its per-call fields are the addresses of all arguments, in order, then the fields from the
        operation's count.
    shape : callable
        rows -> (grid, threads).
    """

    __slots__ = ("launcher", "shape")

    def __init__(self, launcher: launch.Launcher, shape: Callable):
        self.launcher, self.shape = launcher, shape

    def launch_for(self, rows):
        """(Launcher, grid, threads) for so many rows. All launchers of a plan take the same
        parameters."""
        return self.launcher, *self.shape(rows)

    def scratch_for(self, rows):
        """The `Scratch` of the launch for so many rows; None where it needs none."""
        del rows

    def launchers(self):
        """All launchers that calls may use."""
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
    """A `KernelPlan` whose work is ``items`` independent items for each row, in blocks of at most
    ``threads`` threads."""
    launcher = launch.Launcher(kernel, device, constants)
    return KernelPlan(launcher, launch.FlatShape(items, device, threads))


def full(kernel, device, constants, items, threads):
    """`flat`, in blocks of exactly ``threads`` threads."""
    return KernelPlan(launch.Launcher(kernel, device, constants), launch.FullShape(items, threads))


class NumPyPlan:
    """A function on NumPy arrays.

    Parameters
    ----------
    function : callable
        ``function(*views, *fields)``; the view of an absent argument is None.
    args, described
        The operation's `Arg`\\ s, and its arrays, as a plan function gets them.
    bits : sequence of str
        The names of arguments that are viewed as unsigned integers: their elements are only moved,
        or have types that NumPy lacks. The others are viewed in their own dtype.
    """

    __slots__ = ("dtypes", "function")

    def __init__(self, function: Callable, args, described, bits=()):
        self.function = function
        self.dtypes = tuple(
            array and (array.dtype.bits if arg.name in bits else array.dtype.numpy)
            for arg, array in zip(args, described)
        )

    def run(self, call):
        """Run the function."""
        views = [
            None if shape is None else arrays.as_numpy(address, shape, strides, dtype)
            for address, shape, strides, dtype in zip(
                call.values, call.shapes, call.strides, self.dtypes
            )
        ]
        self.function(*views, *call.fields)


class Entry(NamedTuple):
    """A signature's plan, and what else its calls need.

    plan : an object with ``run(call)``. tables : its method of that name, or None.
    apart : the `apart.Apart` of the written arrays, where there are several; else None.
    device : index of the GPU it runs on; None for the CPU.
    current_stream : a function that gives the current stream of the destination's framework.
    others : the same function of each other framework that owns arguments, or
        `streams.of_host_memory`.
    torchs : the same function of torch, if any argument on the GPU is torch's; else None.
    hosted : the indices of arrays in host memory, if the plan runs on a GPU.
    strides : of each argument, in bytes.
    most_rows : (index, rows that were checked) of each destination whose rows interleave: more rows
        may overlap, and need a new check.
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
    """Entries by their signatures, `MAX_PLANS` at most; a new one replaces the oldest."""

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
