# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Use the cache from a framework that this library has never heard of: DLPack is enough.

The cache is CuPy's or NumPy's, and ``Tensor`` stands for another framework's array: it offers no
more than ``__dlpack__`` and ``__dlpack_device__``. Nothing is copied on the way in.
"""

import numpy as np

import cupy_cache as cc

try:
    import cupy

    xp = cupy if cupy.cuda.is_available() else np
except ImportError:
    xp = np


class Tensor:
    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


tokens, heads, head_size = 5, 2, 16
key = xp.arange(tokens * heads * head_size, dtype=np.float32).reshape(tokens, heads, head_size)
slots = xp.asarray(np.array([3, 0, -1, 9, 4]))  # the third token is padding: it is skipped

# HND: a block holds one head's slots after the other's. The view has the usual order of dimensions,
# and the operations follow its strides.
memory = xp.zeros((2, heads, 8, head_size), np.float32)
key_cache, value_cache = memory.transpose(0, 2, 1, 3), memory.transpose(0, 2, 1, 3).copy()

cc.reshape_and_cache_flash(
    Tensor(key), Tensor(-key), Tensor(key_cache), Tensor(value_cache), Tensor(slots)
)
cc.raise_faults()

for token, slot in enumerate([3, 0, None, 9, 4]):
    if slot is not None:
        assert bool((memory[slot // 8, :, slot % 8] == key[token]).all())
        assert bool((value_cache[slot // 8, slot % 8] == -key[token]).all())
assert int((memory != 0).any(axis=-1).sum()) == 4 * heads
print(f"4 tokens written through DLPack into {xp.__name__}'s memory")
