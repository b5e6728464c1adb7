# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Paged key/value cache operations for the arrays of any framework, on the GPU and on the CPU.

The functions take arrays of torch, CuPy, NumPy and of anything else that offers DLPack or
``__cuda_array_interface__``, and write in place. Most have the names and the arguments of vLLM's
cache operations.

Writing new tokens
    `reshape_and_cache_flash`, `reshape_and_cache`, `reshape_and_cache_flash_per_token_head`,
    `concat_and_cache_mla`, `concat_and_cache_mla_grouped`, `indexer_k_quant_and_cache`
Rotating queries and keys, and writing what was rotated
    `rotary_and_cache`, `rotary_embedding`, `concat_and_cache_mla_rope_fused`
Copying, moving and clearing blocks and tokens
    `copy_blocks`, `copy_blocks_mla`, `copy_tokens`, `swap_blocks`, `swap_blocks_batch`,
    `pack_blocks`, `unpack_blocks`, `pack_tokens`, `unpack_tokens`, `packed_size`, `zero_blocks`
Reading and converting
    `gather_cache`, `gather_slots`, `cp_gather_cache`, `gather_and_maybe_dequant_cache`,
    `cp_gather_and_upconvert_fp8_kv_cache`, `cp_gather_indexer_k_quant_cache`, `convert_fp8`
Attention over the pages
    `paged_attention`, `paged_attention_mla`, `merge_attn_states`
Attention under other names
    `paged_attention_v1`, `paged_attention_v2`; in `cupy_cache.flash_attn` also
    ``flash_attn_with_kvcache`` and ``flash_attn_varlen_func``
What a step needs besides
    `slot_mapping`, `slot_mapping_groups`, `alibi_slopes`, `place_slopes`, `alibi_bias`
The caches of all layers as one object, for the cheapest calls
    `PagedKVCache`, and `PagedKVCache.allocate` which makes them; `SwapSpace`, to which blocks go
    when others need theirs
Who has which blocks: sequences, prefixes that are shared, swaps, and the arrays of each step
    `BlockTables`, `BlockPool`; tables in FlashInfer's form: `block_table_to_csr`,
    `csr_to_block_table`
Compiling ahead, asking for what was out of bounds, and launches that overlap
    `warmup`, `raise_faults`, `overlap`

Every error is a `CupyCacheError`, and also of the built-in kind that fits, such as `ValueError`. A
wrong argument raises one before anything is written.

A captured CUDA graph keeps what each call was given, not the objects: the addresses and shapes of
arrays, and the numbers in host memory. Keep the arrays, and leave them where they are, as long as
the graph. What arrays on the GPU hold is read anew at each replay.

The functions' docstrings give shapes, dtypes, units and errors. `cupy_cache.types` has the types of
the arguments, `cupy_cache.integrations.torch_ops` the operations for ``torch.compile``. What is
installed and what is missing: ``python -m cupy_cache info``.
"""

from . import flash_attn
from ._version import __version__
from .attention.alibi_bias import alibi_bias
from .attention.alibi_slopes import alibi_slopes, place_slopes
from .attention.merge_attn_states import merge_attn_states
from .attention.paged_attention import paged_attention
from .attention.paged_attention_mla import paged_attention_mla
from .bookkeeping import (
    BlockPool,
    BlockTables,
    Step,
    block_table_to_csr,
    csr_to_block_table,
)
from .compilation import warmup
from .errors import (
    ArgumentError,
    CaptureError,
    CopyError,
    CupyCacheError,
    DeviceError,
    DTypeError,
    Fault,
    FaultError,
    KernelError,
    MissingDependencyError,
    NotWritableError,
    OutOfBlocksError,
    ShapeError,
    StrideError,
    UnsupportedArchitectureError,
)
from .kv_cache import PagedKVCache, Prefetch, SwapSpace
from .ops.concat_and_cache_mla import concat_and_cache_mla
from .ops.concat_and_cache_mla_grouped import concat_and_cache_mla_grouped
from .ops.concat_and_cache_mla_rope_fused import concat_and_cache_mla_rope_fused
from .ops.convert_fp8 import convert_fp8
from .ops.copy_blocks import copy_blocks, copy_blocks_mla
from .ops.copy_tokens import copy_tokens
from .ops.cp_gather_and_upconvert_fp8_kv_cache import cp_gather_and_upconvert_fp8_kv_cache
from .ops.cp_gather_cache import cp_gather_cache
from .ops.cp_gather_indexer_k_quant_cache import cp_gather_indexer_k_quant_cache
from .ops.gather_and_maybe_dequant_cache import gather_and_maybe_dequant_cache
from .ops.gather_cache import gather_cache
from .ops.gather_slots import gather_slots
from .ops.indexer_k_quant_and_cache import indexer_k_quant_and_cache
from .ops.pack_blocks import pack_blocks, pack_tokens, packed_size, unpack_blocks, unpack_tokens
from .ops.reshape_and_cache import reshape_and_cache
from .ops.reshape_and_cache_flash import reshape_and_cache_flash
from .ops.reshape_and_cache_flash_per_token_head import reshape_and_cache_flash_per_token_head
from .ops.rotary_and_cache import rotary_and_cache
from .ops.rotary_embedding import rotary_embedding
from .ops.slot_mapping import slot_mapping
from .ops.slot_mapping_groups import slot_mapping_groups
from .ops.swap_blocks import swap_blocks
from .ops.swap_blocks_batch import swap_blocks_batch
from .ops.zero_blocks import zero_blocks
from .runtime import log, tracing
from .runtime.faults import raise_faults
from .runtime.overlap import overlap
from .vllm_names import paged_attention_v1, paged_attention_v2

__all__ = [
    "ArgumentError",
    "BlockPool",
    "BlockTables",
    "CaptureError",
    "CopyError",
    "CupyCacheError",
    "DTypeError",
    "DeviceError",
    "Fault",
    "FaultError",
    "KernelError",
    "MissingDependencyError",
    "NotWritableError",
    "OutOfBlocksError",
    "PagedKVCache",
    "Prefetch",
    "ShapeError",
    "Step",
    "StrideError",
    "SwapSpace",
    "UnsupportedArchitectureError",
    "__version__",
    "alibi_bias",
    "alibi_slopes",
    "block_table_to_csr",
    "concat_and_cache_mla",
    "concat_and_cache_mla_grouped",
    "concat_and_cache_mla_rope_fused",
    "convert_fp8",
    "copy_blocks",
    "copy_blocks_mla",
    "copy_tokens",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "csr_to_block_table",
    "flash_attn",
    "gather_and_maybe_dequant_cache",
    "gather_cache",
    "gather_slots",
    "indexer_k_quant_and_cache",
    "merge_attn_states",
    "overlap",
    "pack_blocks",
    "pack_tokens",
    "packed_size",
    "paged_attention",
    "paged_attention_mla",
    "paged_attention_v1",
    "paged_attention_v2",
    "place_slopes",
    "raise_faults",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_per_token_head",
    "rotary_and_cache",
    "rotary_embedding",
    "slot_mapping",
    "slot_mapping_groups",
    "swap_blocks",
    "swap_blocks_batch",
    "unpack_blocks",
    "unpack_tokens",
    "warmup",
    "zero_blocks",
]


def __dir__() -> list[str]:
    """What is offered here, without the folders it comes from."""
    return sorted(__all__)


log.configure()
tracing.keep_out({name: globals()[name] for name in __all__})
