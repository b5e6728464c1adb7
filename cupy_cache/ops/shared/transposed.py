# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The split of x-packed caches' values over thread blocks (transposed.cuh)."""

from ...runtime import contract, launch

TILE = 16  # kTile: tokens of a thread block
PART_BYTES = 128  # the part of a head that a thread block takes


def parts(heads, head_bytes):
    """The thread blocks of each tile."""
    return heads * launch.ceil_div(head_bytes, PART_BYTES)


def tiles(tokens):
    """The tiles of ``tokens`` tokens."""
    return launch.ceil_div(tokens, TILE)


def vector_bytes(ratio, value, value_bytes):
    """The bytes of a cache's vector that a thread makes of ``value``, whose elements have ``ratio``
    times as many bytes. A head has ``value_bytes`` in the cache."""
    return contract.converting_vector_bytes(ratio, (value.ptr, *value.strides[:2]), (value_bytes,))


def stores_vectors(address, *strides):
    """Whether an address and strides allow stores of 16 bytes."""
    return contract.vector_bytes(address, *strides) == 16
