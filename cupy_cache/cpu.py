# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The operations on NumPy arrays: what runs where there is no GPU, and what the kernels mean.

Every function gets checked arguments and views of the caller's memory. Elements that are only
moved are viewed as unsigned integers of their size. Values outside their bounds are skipped and
recorded, exactly as on the GPU.
"""

import numpy as np

from . import launch


def guarded_rows(op, argument, values, limit, padding=True):
    """Which ``values`` may be used as indices below ``limit``: a boolean mask.

    Negative ones are padding (skipped silently) if ``padding``; the others that are out of range
    are recorded as faults.
    """
    good = (values >= 0) & (values < limit)
    bad = values >= limit if padding else ~good
    if bad.any():
        row = int(np.argmax(bad.reshape(-1)))
        launch.record_host_fault(op, argument, row, values.reshape(-1)[row], limit)
    return good


def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, rows):
    """Write ``rows`` tokens into caches indexed [block, offset, head, element]."""
    num_blocks, block_size = key_cache.shape[:2]
    slots = slot_mapping[:rows].astype(np.int64)
    good = guarded_rows(
        "reshape_and_cache_flash", "slot_mapping", slots, num_blocks * block_size
    )
    whole = bool(good.all())
    block, offset = np.divmod(slots if whole else slots[good], block_size)
    for source, cache in ((key, key_cache), (value, value_cache)):
        source = source[:rows]
        cache[block, offset] = source if whole else source[good]


def copy_blocks(source, destination, pairs):
    """Copy whole blocks between caches indexed [block, …]; pairs are checked and independent."""
    if pairs.sources:
        destination[pairs.destinations] = source[pairs.sources]
