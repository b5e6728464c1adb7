# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The operations on NumPy: what runs where there is no GPU, and what the kernels mean."""

from .attention import merge_attn_states, paged_attention, paged_attention_mla
from .operations import (
    alibi_bias,
    alibi_slopes,
    concat_and_cache_fp8_ds_mla,
    concat_and_cache_mla,
    convert_fp8,
    cp_gather_indexer_k_quant_cache,
    gather_both,
    gather_cache,
    gather_fp8_ds_mla,
    gather_slots,
    indexer_k_quant_and_cache,
    reshape_and_cache,
    reshape_and_cache_flash,
    reshape_and_cache_flash_per_token_head,
    slot_mapping,
)
from .rotary import rotary

__all__ = [
    "alibi_bias",
    "alibi_slopes",
    "concat_and_cache_fp8_ds_mla",
    "concat_and_cache_mla",
    "convert_fp8",
    "cp_gather_indexer_k_quant_cache",
    "gather_both",
    "gather_cache",
    "gather_fp8_ds_mla",
    "gather_slots",
    "indexer_k_quant_and_cache",
    "merge_attn_states",
    "paged_attention",
    "paged_attention_mla",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "reshape_and_cache_flash_per_token_head",
    "rotary",
    "slot_mapping",
]
