# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Launches that begin before the earlier work of their stream is done (programmatic dependent
launch). This module alone makes them; CuPy has no binding.

It is safe because each kernel first waits for all earlier work (overlap.cuh).
"""

import ctypes
import functools
import weakref

import numpy as np

from .. import errors
from . import cuda, env

OLDEST_DRIVER = (12, 3)  # the first whose graphs keep such launches apart from others
OLDEST_CAPABILITY = 90

on = env.flag(env.OVERLAP)  # reading the environment at each launch would take 0.5 us
# Objects with launches that were prepared for the present value of `on`. Each has a method
# ``forget``.
prepared: weakref.WeakSet = weakref.WeakSet()


class overlap:
    """Let launches overlap, or no longer: a setting of the whole process.

    A kernel of this library then begins while the kernel before it in its stream still runs, if
    that is this library's too: when the earlier one is done, the next is on the multiprocessors
    already, and no time is lost to its launch. It waits for all earlier work before it reads or
    writes anything, so results are the same. Other libraries' work in the stream waits for ours as
    ever.

    Nothing overlaps on GPUs older than compute capability 9.0 and with drivers older than CUDA
    12.3. A captured graph keeps the setting of its capture. Off by default;
    ``CUPYCACHE_OVERLAP=1`` turns it on from the start. Set it once, or around a capture, not at
    each call: the calls after a change take longer.

    Parameters
    ----------
    on : bool, optional
        Whether launches overlap from now on, or until the end of a ``with`` statement.

    Raises
    ------
    ArgumentError
        For what is neither True nor False.

    Examples
    --------
    >>> import cupy_cache as cc
    >>> setting = cc.overlap()  # from now on
    >>> with cc.overlap(False):  # until its end
    ...     pass
    >>> setting = cc.overlap(False)
    """

    def __init__(self, on: bool = True) -> None:
        if not issubclass(type(on), (bool, np.bool_)):
            expected, error = "True or False", errors.ArgumentError
            raise errors.wrong("type", "overlap: on", expected, type(on).__name__, error=error)
        self._before = _set(bool(on))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        _set(self._before)


def _set(wanted):
    """Set `on`, and return what it was."""
    global on
    before, on = on, wanted
    if before != wanted:
        forget_prepared()
    return before


def forget_prepared():
    """Have all launches prepared anew."""
    for one in list(prepared):
        one.forget()


class Refused(Exception):
    """The driver did not take a launch."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


def available(capability):
    """Whether launches may overlap on a GPU of this compute capability, such as 90."""
    version = cuda.driver_version()
    return (
        capability >= OLDEST_CAPABILITY
        and version is not None
        and version >= OLDEST_DRIVER
        and _entry() is not None
    )


@functools.cache
def _entry():
    """``cuLaunchKernelEx``; None where the driver has none."""
    entry = getattr(cuda.load_library(), "cuLaunchKernelEx", None)
    if entry is None:
        return None
    # Half a microsecond a call, with integers; the library's own function takes twice as long.
    kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    return kind(ctypes.cast(entry, ctypes.c_void_p).value)


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``: the number 6 lets a launch overlap."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]
    OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


_ALLOWED = _Attribute(_Attribute.OVERLAP, 0, (1,))
MAX_STREAMS = 64


@functools.lru_cache(maxsize=512)
def prepare(handle, grid, threads, shared_bytes):
    """A launch that may overlap, ``enqueue(stream, address of the parameters' address, 0)``, which
    raises `Refused`."""
    # {stream: (address, configuration)}. None is changed: another thread may be using it.
    launch, known = _entry(), {}

    def enqueue(stream, address, zero):
        config = known.get(stream)
        if config is None:
            if len(known) >= MAX_STREAMS:
                known.clear()
            made = _Config(grid, (threads, 1, 1), shared_bytes, stream, ctypes.pointer(_ALLOWED), 1)
            config = known[stream] = ctypes.addressof(made), made
        status = launch(config[0], handle, address, zero)
        if status:
            raise Refused(status)

    return enqueue
