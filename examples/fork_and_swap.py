# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Fork a sequence by copying its last block, then move it to host memory and back elsewhere.

On the GPU with CuPy if there is one, else with NumPy: the calls are the same.
"""

import numpy as np

import cupy_cache as cc

try:
    import cupy

    on_gpu = cupy.cuda.is_available()
except ImportError:
    on_gpu = False
if on_gpu:
    from cupyx import empty_pinned  # pinned host memory, which the GPU reaches by itself

    xp, host_array = cupy, empty_pinned
else:
    xp, host_array = np, np.empty

layers, num_blocks, block_size, heads, head_size = 2, 12, 4, 2, 32
shape = num_blocks, block_size, heads, head_size
key_caches = [xp.zeros(shape, np.float16) for _ in range(layers)]
value_caches = [xp.zeros(shape, np.float16) for _ in range(layers)]
rng = np.random.default_rng()


def random_rows(count):
    return xp.asarray(rng.standard_normal((count, heads, head_size)).astype(np.float16))


# A sequence of 6 tokens in the blocks 3 and 7; the second has room for two more.
slots = xp.asarray(np.array([12, 13, 14, 15, 28, 29]))
keys = [random_rows(6) for _ in range(layers)]
values = [random_rows(6) for _ in range(layers)]
for layer in range(layers):
    cc.reshape_and_cache_flash(
        keys[layer], values[layer], key_caches[layer], value_caches[layer], slots
    )

# Fork it: the full block 3 is shared, block 7 is copied to 1 in all layers by one call, and the two
# sequences go on separately.
cc.copy_blocks(key_caches, value_caches, [(7, 1)])
new_keys = random_rows(2)
for layer in range(layers):
    cc.reshape_and_cache_flash(
        new_keys, new_keys, key_caches[layer], value_caches[layer],
        xp.asarray(np.array([7 * block_size + 2, 1 * block_size + 2])),
    )  # fmt: skip

# Preempt the fork (blocks 3 and 1) to host memory, and bring it back into the blocks 10 and 4.
host_keys = [host_array((2, *shape[1:]), np.float16) for _ in range(layers)]
host_values = [host_array((2, *shape[1:]), np.float16) for _ in range(layers)]
cc.swap_blocks(key_caches + value_caches, host_keys + host_values, [(3, 0), (1, 1)])
cc.swap_blocks(host_keys + host_values, key_caches + value_caches, [(0, 10), (1, 4)])

# Read both sequences back: 7 tokens each.
tables = xp.asarray(np.array([[3, 7], [10, 4]], np.int32))
bounds = xp.asarray(np.array([0, 7, 14], np.int32))
for layer in range(layers):
    rows = xp.empty((14, heads, head_size), np.float16)
    cc.gather_cache(key_caches[layer], rows, tables, bounds)
    expected = xp.concatenate((keys[layer], new_keys[:1], keys[layer], new_keys[1:]))
    assert bool((rows == expected).all())
cc.raise_faults()
print(f"a sequence forked, swapped out and in, and read back with {xp.__name__}")
