# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What an engine owns: the caches of all layers as one object."""

from .paged_kv_cache import PagedKVCache

__all__ = ["PagedKVCache"]
