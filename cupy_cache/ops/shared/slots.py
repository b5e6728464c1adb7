# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What a block table's entries stand for: shared by the operations that turn positions into slots.

Under context parallelism an entry stands for one block on each rank, and runs of tokens are dealt
to the ranks in turn.
"""

from ...errors import ArgumentError

LARGEST = 2**63 - 1
# `Table` of slots.cuh, from `stride` on; see `geometry`.
FIELDS = ("stride", "position_limit", "block_limit", "block_size", "cp_world_size", "cp_rank",
          "cp_interleave")  # fmt: skip


def check_ranks(check, world, rank, interleave):
    """Refuse ranks that make no sense; ``check`` is the call's `contract.Contract`."""
    check.positive("cp_world_size", world)
    check.positive("cp_interleave", interleave)
    if not 0 <= rank < world:
        raise ArgumentError(
            f"{check.op}: Invalid value of cp_rank: expected an integer in 0..{world - 1}, got "
            f"{rank!r}"
        )


def check_block_size(check, name, block_size, world, interleave):
    """Refuse a block size, the argument ``name``, that the ranks cannot share."""
    check.positive(name, block_size)
    if world > 1 and block_size % interleave:
        raise ArgumentError(
            f"{check.op}: Invalid value of cp_interleave: expected a divisor of {name} = "
            f"{block_size}, got {interleave}"
        )
    if block_size * world > LARGEST:
        raise ArgumentError(
            f"{check.op}: Invalid value of {name}: expected {name} * cp_world_size below 2**63, "
            f"got {block_size} * {world}"
        )


def position_limit(width, block_size, world):
    """The positions that a table of so many columns has entries for."""
    return min(width * block_size * world, LARGEST)


def geometry(shape, strides, block_size, world, rank, interleave):
    """The values of `FIELDS` for a table of block numbers [rows, W]; strides in bytes."""
    limit = position_limit(shape[1], block_size, world)
    return strides[0], limit, LARGEST // block_size, block_size, world, rank, interleave
