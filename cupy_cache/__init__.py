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
from .attention import alibi_slopes, place_slopes
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
from .ops.concat_and_cache_mla import concat_and_cache_mla
from .ops.concat_and_cache_mla_grouped import concat_and_cache_mla_grouped
from .ops.copy_blocks import copy_blocks, copy_blocks_mla
from .ops.gather_cache import gather_cache
from .ops.pack_blocks import (
    pack_blocks,
    pack_tokens,
    packed_size,
    unpack_blocks,
    unpack_tokens,
)
from .ops.reshape_and_cache import reshape_and_cache
from .ops.reshape_and_cache_flash import reshape_and_cache_flash
from .ops.slot_mapping import slot_mapping
from .ops.swap_blocks import swap_blocks
from .ops.swap_blocks_batch import swap_blocks_batch
from .ops.zero_blocks import zero_blocks
from .warmup import warmup

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
    "alibi_slopes",
    "concat_and_cache_mla",
    "concat_and_cache_mla_grouped",
    "copy_blocks",
    "copy_blocks_mla",
    "gather_cache",
    "pack_blocks",
    "pack_tokens",
    "packed_size",
    "place_slopes",
    "raise_faults",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "slot_mapping",
    "swap_blocks",
    "swap_blocks_batch",
    "unpack_blocks",
    "unpack_tokens",
    "warmup",
    "zero_blocks",
]

log.configure()
