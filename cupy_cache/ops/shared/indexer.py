# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The cache of a sparse-attention indexer: quantised keys and their scales.

Its shape is [NB, BS, D + 4 D/Q], which gives only the size of a block. A block's bytes are [BS, D]
of e4m3, then [BS, D/Q] scales of four bytes, where Q elements share a scale.
"""

from ... import errors
from ...runtime import formats

SCALE_BYTES = 4
MAX_THREADS = 256


def check_cache(check, kv_cache, head_size, scales):
    """Check a cache of keys of ``head_size`` elements, each with ``scales`` scales."""
    check.shape("kv_cache", kv_cache, "num_blocks block_size _")
    expected = head_size + SCALE_BYTES * scales
    if kv_cache.shape[2] != expected:
        expected = (
            f"entries of {head_size} + {SCALE_BYTES} * {scales} bytes, the head size and its scales"
        )
        raise errors.wrong("shape", f"{check.op}: kv_cache", expected, list(kv_cache.shape))
    check.positive("block_size", kv_cache.shape[1])
    check.dtype("kv_cache", kv_cache, *formats.BYTES)
    check.device("kv_cache", kv_cache)
    check.contiguous("kv_cache", kv_cache, dims=2)
