# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Write a step's keys and values into a paged cache and read them back, with torch tensors.

Two requests of 20 and 7 tokens, whose blocks lie anywhere in the cache. Runs on the GPU if torch
sees one, else on the CPU.
"""

import torch

import cupy_cache as cc

device = "cuda" if torch.cuda.is_available() else "cpu"
num_blocks, block_size, heads, head_size = 16, 8, 4, 64
lengths = [20, 7]

key_cache = torch.zeros(
    num_blocks, block_size, heads, head_size, dtype=torch.bfloat16, device=device
)
value_cache = torch.zeros_like(key_cache)

# A request's block table says which blocks hold its tokens, in order; -1 fills the rows up.
block_table = torch.tensor([[9, 2, 14], [5, -1, -1]], dtype=torch.int32, device=device)
query_start_loc = torch.tensor([0, 20, 27], dtype=torch.int32, device=device)
positions = torch.cat([torch.arange(n) for n in lengths]).to(device)

# Where each token goes: block * block_size + offset.
slots = cc.slot_mapping(block_table, positions, query_start_loc, block_size)

key = torch.randn(27, heads, head_size, device=device).to(torch.bfloat16)
value = torch.randn(27, heads, head_size, device=device).to(torch.bfloat16)
cc.reshape_and_cache_flash(key, value, key_cache, value_cache, slots)

# All tokens of both requests as contiguous rows again, here those of the keys.
rows = torch.empty_like(key)
cc.gather_cache(key_cache, rows, block_table, query_start_loc)

cc.raise_faults()  # were there slots or blocks outside the cache? This waits for the device
assert torch.equal(rows, key)
assert torch.equal(value_cache[14, 3], value[19])  # the first request's last token
print(f"27 tokens of 2 requests written and read back on {key_cache.device}")
