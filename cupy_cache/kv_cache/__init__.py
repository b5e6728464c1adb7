# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The caches of all layers as one object, and host memory for blocks that are swapped out."""

from .paged_kv_cache import PagedKVCache
from .swap_space import Prefetch, SwapSpace

__all__ = ["PagedKVCache", "Prefetch", "SwapSpace"]
