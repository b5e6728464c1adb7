# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""How values of x-packed caches are dealt to thread blocks (transposed.cuh)."""

from ...runtime import contract, launch

TILE = 16  # kTile: tokens of a thread block
PART_BYTES = 128  # of a head, that a thread block takes


def parts(heads, head_bytes):
    """Thread blocks for each tile."""
    return heads * launch.ceil_div(head_bytes, PART_BYTES)


def tiles(tokens):
    """Tiles of so many tokens."""
    return launch.ceil_div(tokens, TILE)


def vector_bytes(ratio, value, value_bytes):
    """The bytes of a vector of the cache that a thread makes of ``value``, whose elements take
    ``ratio`` times as many bytes; a head has ``value_bytes`` in the cache."""
    return contract.converting_vector_bytes(ratio, (value.ptr, *value.strides[:2]), (value_bytes,))


def stores_vectors(address, *strides):
    """Whether an address and strides allow stores of 16 bytes."""
    return contract.vector_bytes(address, *strides) == 16
