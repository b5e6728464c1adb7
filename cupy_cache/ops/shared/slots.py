# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Block tables for the operations that turn positions into slots.

Under context parallelism a table's entry stands for one block on each rank, and runs of tokens go
to the ranks in turn.
"""

from ... import errors

LARGEST = 2**63 - 1
# `Table` of slots.cuh, from `stride` on; see `geometry`.
FIELDS = ("stride", "position_limit", "block_limit", "block_size", "cp_world_size", "cp_rank",
          "cp_interleave")  # fmt: skip


def check_ranks(check, world, rank, interleave):
    """Refuse ranks that make no sense; ``check`` is the call's `contract.Contract`."""
    check.positive("cp_world_size", world)
    check.positive("cp_interleave", interleave)
    if not 0 <= rank < world:
        expected = f"an integer in 0..{world - 1}"
        raise errors.wrong("value", f"{check.op}: cp_rank", expected, repr(rank))


def check_block_size(check, name, block_size, world, interleave):
    """Refuse a block size, the argument ``name``, that the ranks cannot share."""
    check.positive(name, block_size)
    if world > 1 and block_size % interleave:
        expected = f"a divisor of {name} = {block_size}"
        raise errors.wrong("value", f"{check.op}: cp_interleave", expected, interleave)
    if block_size * world > LARGEST:
        expected = f"{name} * cp_world_size below 2**63"
        raise errors.wrong("value", f"{check.op}: {name}", expected, f"{block_size} * {world}")


def position_limit(width, block_size, world):
    """The number of positions for which a table of ``width`` columns has entries."""
    return min(width * block_size * world, LARGEST)


def geometry(shape, strides, block_size, world, rank, interleave):
    """The values of `FIELDS` for a table of block numbers [rows, W]; strides in bytes."""
    limit = position_limit(shape[1], block_size, world)
    return strides[0], limit, LARGEST // block_size, block_size, world, rank, interleave
