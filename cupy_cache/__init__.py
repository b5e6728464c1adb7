# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Paged key/value cache operations for any framework's arrays, on the GPU and on the CPU.

Modules, in dependency order (there are no cycles):

* ``errors``, ``env``, ``log``
* ``formats``, ``params``
* ``torch_tensors``, ``arrays``, ``contract``
* ``allocations``, ``modules``, ``launch``, ``conversions``, ``cpu``
* ``repeats``, ``dispatch``, and what several operations share: ``block_numbers``, ``blocks``,
  ``block_pairs``, ``mla``, ``packing``, ``gathering``, ``indexer``, ``slots``
* ``ops``, ``attention``
* ``specialisations``, ``warmup``, ``kv_cache``
* everything a user calls, here
* ``torch_ops``, which a user imports for ``torch.compile``
"""

from ._version import __version__
from .attention.alibi_bias import alibi_bias
from .attention.alibi_slopes import alibi_slopes, place_slopes
from .compilation import warmup
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
from .kv_cache import PagedKVCache
from .ops.concat_and_cache_mla import concat_and_cache_mla
from .ops.concat_and_cache_mla_grouped import concat_and_cache_mla_grouped
from .ops.convert_fp8 import convert_fp8
from .ops.copy_blocks import copy_blocks, copy_blocks_mla
from .ops.cp_gather_and_upconvert_fp8_kv_cache import cp_gather_and_upconvert_fp8_kv_cache
from .ops.cp_gather_cache import cp_gather_cache
from .ops.cp_gather_indexer_k_quant_cache import cp_gather_indexer_k_quant_cache
from .ops.gather_and_maybe_dequant_cache import gather_and_maybe_dequant_cache
from .ops.gather_cache import gather_cache
from .ops.indexer_k_quant_and_cache import indexer_k_quant_and_cache
from .ops.pack_blocks import pack_blocks, pack_tokens, packed_size, unpack_blocks, unpack_tokens
from .ops.reshape_and_cache import reshape_and_cache
from .ops.reshape_and_cache_flash import reshape_and_cache_flash
from .ops.reshape_and_cache_flash_per_token_head import reshape_and_cache_flash_per_token_head
from .ops.slot_mapping import slot_mapping
from .ops.slot_mapping_groups import slot_mapping_groups
from .ops.swap_blocks import swap_blocks
from .ops.swap_blocks_batch import swap_blocks_batch
from .ops.zero_blocks import zero_blocks
from .runtime import log
from .runtime.launch import raise_faults

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
    "PagedKVCache",
    "ShapeError",
    "StrideError",
    "UnsupportedArchitectureError",
    "__version__",
    "alibi_bias",
    "alibi_slopes",
    "concat_and_cache_mla",
    "concat_and_cache_mla_grouped",
    "convert_fp8",
    "copy_blocks",
    "copy_blocks_mla",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "gather_and_maybe_dequant_cache",
    "gather_cache",
    "indexer_k_quant_and_cache",
    "pack_blocks",
    "pack_tokens",
    "packed_size",
    "place_slopes",
    "raise_faults",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_per_token_head",
    "slot_mapping",
    "slot_mapping_groups",
    "swap_blocks",
    "swap_blocks_batch",
    "unpack_blocks",
    "unpack_tokens",
    "warmup",
    "zero_blocks",
]

log.configure()
