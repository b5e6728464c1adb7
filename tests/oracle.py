# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What every operation must do, as plain loops over single elements, written from the docstrings.

Nothing here is shared with the library, and nothing is fast.
"""


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping):
    num_blocks, block_size = key_cache.shape[:2]
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        for source, cache in ((key, key_cache), (value, value_cache)):
            for head in range(source.shape[1]):
                for element in range(source.shape[2]):
                    cache[slot // block_size, slot % block_size, head, element] = source[
                        token, head, element
                    ]


def reshape_and_cache(key, value, key_cache, value_cache, slot_mapping):
    num_blocks, _, _, block_size, x = key_cache.shape
    for token in range(slot_mapping.shape[0]):
        slot = int(slot_mapping[token])
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        block, offset = slot // block_size, slot % block_size
        for head in range(key.shape[1]):
            for d in range(key.shape[2]):
                key_cache[block, head, d // x, offset, d % x] = key[token, head, d]
            for d in range(value.shape[2]):
                value_cache[block, head, d, offset] = value[token, head, d]


def copy_blocks(caches, pairs):
    """``caches``: any list of caches. ``pairs`` are applied from a snapshot, all at once."""
    for cache in caches:
        before = cache.copy()
        for source, destination in pairs:
            if 0 <= source < cache.shape[0] and 0 <= destination < cache.shape[0]:
                cache[destination] = before[source]


def swap_blocks(source, destination, pairs):
    before = source.copy()
    for first, second in pairs:
        destination[second] = before[first]
