# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a cache are free, and who may read the others."""

from __future__ import annotations

import collections
from typing import Any

from .. import errors
from ..errors import CopyError, OutOfBlocksError
from ..runtime import contract


class BlockPool:
    """The blocks 0 to ``num_blocks - 1``, with how many users each has.

    A block without users is free. What a free block holds may be wanted again: a block can have a
    *content*, bytes that stand for what was written into it, by which it is found. Blocks without a
    content are given out first, then those with one, of which the one that has been free the
    longest goes first and loses its content.

    It is pure Python: it knows no array, and copies or clears nothing. It is not thread-safe.

    Parameters
    ----------
    num_blocks : int

    Attributes
    ----------
    num_blocks : int
    num_free : int
        How many can be taken, free blocks with a content included.

    Raises
    ------
    CupyCacheError
        One of its kinds, from all methods, before anything is changed: `ArgumentError` for a number
        that is no block, or for a block that is free where one with users is needed.
    """

    num_blocks: int

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = contract.integer("BlockPool", "num_blocks", num_blocks, 0)
        self._users = [0] * self.num_blocks
        self._contents: list[bytes | None] = [None] * self.num_blocks
        self._holders: dict[bytes, int] = {}  # content -> block
        # Free blocks without a content, and with one; first those that were free first.
        self._blank = collections.deque(range(self.num_blocks))
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    def __copy__(self) -> Any:
        raise CopyError(
            "BlockPool: a shallow copy would give out the same blocks; use copy.deepcopy"
        )

    @property
    def num_free(self) -> int:
        """How many can be taken, free blocks with a content included."""
        return len(self._blank) + len(self._kept)

    def take(self, count: int = 1) -> list[int]:
        """Take free blocks. Each has one user then, and no content.

        Raises
        ------
        OutOfBlocksError
            Where fewer are free; then none is taken.
        """
        if type(count) is not int or not 0 <= count < 2**63:
            count = contract.integer("BlockPool.take", "count", count, 0)
        if count > self.num_free:
            raise OutOfBlocksError("BlockPool.take", count, self.num_free, self.num_blocks)
        taken = []
        for _ in range(count):
            if self._blank:
                block = self._blank.popleft()
            else:
                block, _ = self._kept.popitem(last=False)
                self.forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def share(self, block: int) -> None:
        """Add a user to a block that has users or, if it is free, a content."""
        block = self._number(block)
        users = self._users[block]
        if not users:
            if block not in self._kept:
                self._refuse("share", block, "a block with users or a content")
            del self._kept[block]
        self._users[block] = users + 1

    def drop(self, block: int) -> None:
        """Remove a user of a block; without any it is free."""
        block = self._number(block)
        users = self._users[block]
        if not users:
            self._refuse("drop", block, "a block with users")
        self._users[block] = users - 1
        if users == 1:
            if self._contents[block] is None:
                self._blank.append(block)
            else:
                self._kept[block] = None

    def users(self, block: int) -> int:
        """How many users a block has."""
        return self._users[self._number(block)]

    def hold(self, block: int, content: bytes) -> bool:
        """Say what a block that has users holds. It is given up where another block holds it
        already.

        Returns
        -------
        bool
            Whether this block is the one that `find` tells.
        """
        block = self._number(block)
        self._require_content("hold", content)
        if not self._users[block]:
            self._refuse("hold", block, "a block with users")
        holder = self._holders.get(content)
        if holder is not None:
            return holder == block
        self.forget(block)
        self._contents[block], self._holders[content] = content, block
        return True

    def find(self, content: bytes) -> int | None:
        """The block that holds ``content``; it is not taken: see `share`."""
        self._require_content("find", content)
        return self._holders.get(content)

    def forget(self, block: int) -> None:
        """Say that a block no longer holds its content, if it has one."""
        block = self._number(block)
        content = self._contents[block]
        if content is None:
            return
        self._contents[block] = None
        del self._holders[content]
        if block in self._kept:
            del self._kept[block]
            self._blank.append(block)

    def __repr__(self) -> str:
        return f"<BlockPool: {self.num_free} of {self.num_blocks} blocks are free>"

    def _number(self, block: int) -> int:
        """``block``, which must be one."""
        if type(block) is not int:
            block = contract.integer("BlockPool", "block", block)
        if not 0 <= block < self.num_blocks:
            expected = f"a block in 0..{self.num_blocks - 1}" if self.num_blocks else "no block"
            raise errors.wrong("value", "BlockPool: block", expected, block)
        return block

    @staticmethod
    def _require_content(method: str, content: Any) -> None:
        if type(content) is not bytes:
            name, got = f"BlockPool.{method}: content", errors.shown(content)
            raise errors.wrong("type", name, "bytes", got)

    def _refuse(self, method: str, block: Any, expected: str) -> None:
        name = f"BlockPool.{method}: block"
        raise errors.wrong("value", name, expected, f"{block}, which is free")
