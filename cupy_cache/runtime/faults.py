# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What kernels, and NumPy, met outside its bounds and skipped."""

from __future__ import annotations

from ..errors import Fault, FaultError
from ..types import DeviceLike
from . import driver, env

# Whether to wait and raise after every call; asking the environment each time would cost 0.5 us.
debug = env.flag(env.DEBUG)

_on_host: list[Fault] = []


def record(op, argument, row, value, limit):
    """Record a violation met by the CPU backend, first one of each operation wins."""
    if not any(fault.op == op for fault in _on_host):
        _on_host.append(Fault(op, argument, int(row), int(value), int(limit), "cpu"))
    if debug:
        raise_faults()


def after_launch(stream, device):
    """What CUPYCACHE_DEBUG=1 asks for: raise what was recorded on GPU ``device``, unless ``stream``
    is being captured, where nothing runs and nothing may wait."""
    if not driver.active.capturing(stream, device):
        raise_faults(device)


def raise_faults(device: DeviceLike | None = None) -> None:
    """Raise if kernels met slots, block numbers or table entries outside their bounds.

    Waits for the device, reads the records and clears them. Such values are never dereferenced:
    they are skipped, and the first one that each kernel meets is recorded. ``CUPYCACHE_DEBUG=1``
    does this after every call, but not while a CUDA graph is captured.

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
    index = None
    if device is not None:
        kind, index = driver.device_named(device, "raise_faults: device")
        index = None if kind == "cpu" else index
    faults = [] if device is not None and index is None else list(driver.active.take_faults(index))
    if index is None:
        faults += _on_host
        _on_host.clear()
    if faults:
        raise FaultError(faults)
