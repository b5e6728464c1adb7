# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Paged key/value cache operations for any framework's arrays, on the GPU and on the CPU.

Modules, in dependency order (there are no cycles):

* ``errors``, ``env``, ``log``
* ``formats``, ``params``
* ``arrays``, ``contract``
* ``modules``, ``launch``, ``cpu``
* ``dispatch``
* ``ops``, ``attention``
* everything a user calls, here
"""

from . import log
from ._version import __version__
from .errors import (
    ArgumentError,
    CaptureError,
    CupyCacheError,
    DeviceError,
    DTypeError,
    Fault,
    FaultError,
    KernelError,
    MissingDependencyError,
    NotWritableError,
    ShapeError,
    StrideError,
    UnsupportedArchitectureError,
)
from .launch import raise_faults
from .ops.copy_blocks import copy_blocks, copy_blocks_mla
from .ops.reshape_and_cache import reshape_and_cache
from .ops.reshape_and_cache_flash import reshape_and_cache_flash
from .ops.swap_blocks import swap_blocks

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CupyCacheError",
    "DTypeError",
    "DeviceError",
    "Fault",
    "FaultError",
    "KernelError",
    "MissingDependencyError",
    "NotWritableError",
    "ShapeError",
    "StrideError",
    "UnsupportedArchitectureError",
    "__version__",
    "copy_blocks",
    "copy_blocks_mla",
    "raise_faults",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "swap_blocks",
]

log.configure()
