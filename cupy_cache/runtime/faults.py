# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Records of slots, block numbers and table entries that kernels, or NumPy, found out of bounds."""

from __future__ import annotations

import contextlib
import os
import threading

from ..errors import Fault, FaultError
from ..types import DeviceLike
from . import driver, env
from .devices import CPU

# Whether to wait and raise after every call. Reading the environment each time would take 0.5 us.
debug = env.flag(env.DEBUG)

_on_host: dict[str, Fault] = {}  # by operation
_of_thread = threading.local()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_on_host.clear)  # the parent reports its own


def record(op, argument, row, value, limit):
    """Record a violation on the CPU, unless one of this operation is recorded."""
    _on_host.setdefault(op, Fault(op, argument, int(row), int(value), int(limit), "cpu"))


def _take_from_host():
    # One by one, which needs no lock: whoever is quicker takes a record, and new ones stay.
    taken = [_on_host.pop(op, None) for op in list(_on_host)]
    return [fault for fault in taken if fault is not None]


def after_call(stream, device):
    """At the end of a call with CUPYCACHE_DEBUG=1: raise what was recorded on GPU ``device``, or on
    the CPU if that is None, after waiting for ``stream``. Nothing is raised while that is being
    captured: nothing runs then, and nothing may wait."""
    later = getattr(_of_thread, "later", None)
    if later is not None:
        later[stream, device] = None
    elif device is None:
        _raise(_take_from_host())
    elif not driver.active.capturing(stream, device):
        _raise(driver.active.take_faults(device, stream))


@contextlib.contextmanager
def together():
    """For operations that are one call to the user: debug mode raises their faults after all of
    them, so that what they write does not depend on it."""
    if not debug or getattr(_of_thread, "later", None) is not None:
        yield
        return
    _of_thread.later = later = {}  # (stream, GPU), in order
    try:
        yield
    finally:
        _of_thread.later = None
    for stream, device in later:
        after_call(stream, device)


def _raise(faults):
    faults = list(faults)
    if faults:
        raise FaultError(faults)


def raise_faults(device: DeviceLike | None = None) -> None:
    """Raise if kernels met slots, block numbers or table entries outside their bounds.

    Waits for the device, reads the records and clears them. Such values are never followed, and the
    first one that each kernel meets is recorded. ``CUPYCACHE_DEBUG=1`` does this after every call,
    but not while a CUDA graph is captured.

    Parameters
    ----------
    device : int, str, torch.device or cupy.cuda.Device, optional
        Only this GPU, or "cpu"; by default all GPUs used so far, and the CPU.

    Raises
    ------
    FaultError
        With the operation, the argument, the row, the value and the limit of each record.
    DeviceError
        For a device that is not there.
    """
    asked = None if device is None else driver.device_named(device, "raise_faults: device")
    faults = []
    if asked != CPU:
        faults += driver.active.take_faults(None if asked is None else asked.index)
    if asked in (None, CPU):
        faults += _take_from_host()
    _raise(faults)
