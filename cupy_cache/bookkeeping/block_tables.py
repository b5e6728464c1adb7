# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Which blocks hold the tokens of which sequence."""

from __future__ import annotations

import array
import hashlib
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np

from .. import errors
from ..errors import CopyError, OutOfBlocksError
from ..runtime import contract, streams, tracing
from ..types import DeviceLike, FrameworkName, StreamLike
from .block_pool import BlockPool
from .step import Buffers, Step, fill

NAME = "BlockTables"
NO_ROW = -1  # of a sequence that is swapped out


class _Sequence:
    """What is known of a sequence.

    row : its row in the array of all tables; `NO_ROW` while it is swapped out.
    blocks : of its tokens, in order, in the pool or, while it is swapped out, in the host's; as
        many as the tokens need.
    length : tokens that have a slot.
    tokens : the tokens' numbers from the first one on, as far as they were told: may be fewer than
        ``length``, or more.
    contents : what the full blocks hold, from the first one on, as far as tokens are known.
    salt : what stands before the first block's tokens in its content.
    """

    __slots__ = ("blocks", "contents", "length", "row", "salt", "tokens")

    def __init__(self, row, tokens, salt):
        self.row, self.tokens, self.salt = row, tokens, salt
        self.blocks: list[int] = []
        self.contents: list[bytes] = []
        self.length = 0


class BlockTables:
    """The block tables of an engine's sequences: who has which blocks, and each step's arrays.

    A sequence begins with `add` or `fork`, gets room for new tokens at each `step`, may be moved to
    host memory and back with `swap_out` and `swap_in`, and ends with `free`. Sequences have names,
    which are anything hashable. All of this is pure Python, on the host, whatever the number of
    layers. Nothing is copied: methods return pairs of blocks, with which `copy_blocks` and
    `swap_blocks` are to be called before the next step's work, on the same stream. Only `step`
    makes one upload, on a GPU.

    A method that needs more blocks than are free raises `OutOfBlocksError`, and has changed
    nothing: swap a sequence out, or free one, and call again.

    It is not thread-safe. Copies by `copy.deepcopy` and `pickle` have arrays of their own; a
    shallow one would give out the same blocks, and is refused.

    Parameters
    ----------
    num_blocks, block_size : int
        Of the cache.
    max_sequences, max_tokens : int
        Sequences, and tokens, of a step at most.
    max_length : int
        Tokens of a sequence at most, its prompt and what follows: the tables are as wide as it
        needs.
    host_blocks : int
        Blocks of the cache in host memory that sequences are swapped out to.
    reuse_prefixes : bool
        Whether `add` finds blocks that hold the same tokens after the same tokens.
    framework, device
        Of a step's arrays: as of `PagedKVCache.allocate`.

    Attributes
    ----------
    pool, host_pool : BlockPool
        Of the cache, and of host memory.
    block_size, max_sequences, max_tokens, max_length : int

    Raises
    ------
    CupyCacheError
        One of its kinds, from all methods, before anything is changed.

    Examples
    --------
    >>> tables = BlockTables(64, 16, max_sequences=8, max_tokens=512, max_length=1024)
    >>> prompt = list(range(40))
    >>> known = tables.add("a", prompt)  # the tokens that the cache has: none
    >>> step = tables.step(["a"], [40 - known])
    >>> step.num_tokens, step.max_seq_len
    (40, 40)
    >>> tables.fork("a", "b")  # b shares all blocks of a
    >>> step = tables.step(["a", "b"], [1, 1])
    >>> step.copies  # of the last one each needs its own
    [(2, 3)]
    >>> tables.add("c", prompt)  # two blocks are full, so these tokens are there
    32
    """

    pool: BlockPool
    host_pool: BlockPool
    block_size: int
    max_sequences: int
    max_tokens: int
    max_length: int

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        max_sequences: int,
        max_tokens: int,
        max_length: int,
        host_blocks: int = 0,
        reuse_prefixes: bool = True,
        framework: FrameworkName | None = None,
        device: DeviceLike | None = None,
    ) -> None:
        self.block_size = contract.integer(NAME, "block_size", block_size, 1)
        self.max_sequences = contract.integer(NAME, "max_sequences", max_sequences, 1)
        self.max_tokens = contract.integer(NAME, "max_tokens", max_tokens, 1)
        self.max_length = contract.integer(NAME, "max_length", max_length, 1)
        self._reuse = contract.flag(NAME, "reuse_prefixes", reuse_prefixes)
        self.pool = BlockPool(contract.integer(NAME, "num_blocks", num_blocks, 0))
        self.host_pool = BlockPool(contract.integer(NAME, "host_blocks", host_blocks, 0))
        width = self._blocks_of(self.max_length)
        self._buffers = Buffers(NAME, self.max_sequences, self.max_tokens, width, framework, device)
        self._sequences: dict[Hashable, _Sequence] = {}
        # Rows of all sequences that are not swapped out; -1 where there is no block. They repeat
        # what the sequences' lists say, so that a step copies them whole.
        self._table = np.full((self.max_sequences, width), -1, np.int32)
        self._free_rows = list(range(self.max_sequences))

    def _blocks_of(self, tokens):
        return -(-tokens // self.block_size)

    def __copy__(self) -> Any:
        raise CopyError(f"{NAME}: a shallow copy would give out the same blocks; use copy.deepcopy")

    # --- what there is

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self._sequences)

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._sequences

    def __iter__(self) -> Iterator[Hashable]:
        """The names of all sequences, in the order in which they came."""
        return iter(self._sequences)

    def length(self, sequence: Hashable) -> int:
        """How many tokens of a sequence have a slot."""
        return self._found("length", sequence).length

    def tokens(self, sequence: Hashable) -> list[int]:
        """The tokens of a sequence, in order, as far as `add` and `append` gave them."""
        return self._found("tokens", sequence).tokens.tolist()

    def num_pending(self, sequence: Hashable) -> int:
        """How many tokens of a sequence are known, but have no slot: what the next steps feed."""
        found = self._found("num_pending", sequence)
        return max(len(found.tokens) - found.length, 0)

    def blocks(self, sequence: Hashable) -> list[int]:
        """The blocks of a sequence, in order: those of host memory, if it is swapped out."""
        return list(self._found("blocks", sequence).blocks)

    def is_swapped_out(self, sequence: Hashable) -> bool:
        """Whether a sequence is in host memory."""
        return self._found("is_swapped_out", sequence).row == NO_ROW

    def __repr__(self) -> str:
        out = sum(found.row == NO_ROW for found in self._sequences.values())
        text = (
            f"<BlockTables of {errors.counted(len(self), 'sequence')}, {out} swapped out: "
            f"{self.pool.num_free} of {self.pool.num_blocks} blocks of "
            f"{errors.counted(self.block_size, 'token')} are free"
        )
        if self.host_pool.num_blocks:
            text += f", {self.host_pool.num_free} of {self.host_pool.num_blocks} on the host"
        return f"{text}>"

    # --- sequences that begin and end

    def add(
        self, sequence: Hashable, tokens: Sequence[SupportsIndex] = (), *, salt: bytes = b""
    ) -> int:
        """Begin a sequence.

        Parameters
        ----------
        sequence : hashable
            Its name, which no other has.
        tokens : sequence of int
            Of its prompt, as far as it is known; at most ``max_length``. Full blocks that hold the
            same tokens after the same tokens are shared.
        salt : bytes
            Blocks are shared only among sequences of the same salt: what else decides keys and
            values, such as an adapter's name or a picture's digest, or whose prompt it is.

        Returns
        -------
        int
            How many tokens, from the first one on, are in the cache already; fewer than there are,
            so that one is left to be fed to the model. The others are for `step`.
        """
        self._require_new("add", sequence)
        if not issubclass(type(salt), bytes):
            got = errors.shown(salt)
            raise errors.wrong("type", f"{NAME}.add: salt", "bytes", got)
        known = _numbers("add", tokens)
        if len(known) > self.max_length:  # no step could feed the last ones
            expected = f"at most max_length = {errors.counted(self.max_length, 'token')}"
            raise errors.wrong("length", f"{NAME}.add: tokens", expected, len(known))
        found = _Sequence(self._new_row(), known, salt)
        full = (len(known) - 1) // self.block_size if self._reuse else 0
        while len(found.blocks) < full:
            content = self._content(found, len(found.blocks))
            block = self.pool.find(content)
            if block is None:
                break
            self.pool.share(block)
            found.blocks.append(block)
            found.contents.append(content)
        self._table[found.row, : len(found.blocks)] = found.blocks
        found.length = len(found.blocks) * self.block_size
        self._sequences[sequence] = found
        return found.length

    def append(self, sequence: Hashable, tokens: SupportsIndex | Sequence[SupportsIndex]) -> None:
        """Add the next tokens of a sequence, such as the one that was sampled, before the step
        that writes their keys and values. No room is made for them: that is `step`'s.

        Full blocks of known tokens are found by `add` when their sequence goes on, by this or by
        another step: only then is it sure that a step's work was done. So append the last token of
        a sequence, too, before it is freed.

        Parameters
        ----------
        sequence : hashable
            Its name.
        tokens : int, or sequence of int
            Arrays count as one or the other: of no dimensions, or of one.
        """
        found = self._found("append", sequence)
        known = (tokens,) if type(tokens) is int else _numbers("append", tokens)
        if len(found.tokens) < found.length:
            name = f"{NAME}.append: tokens"
            expected = "them before the step that writes their keys and values"
            got = f"some behind token {len(found.tokens)}, of which {found.length} are written"
            raise errors.wrong("order", name, expected, got)
        if found.row != NO_ROW:
            self._hold(found)
        try:
            found.tokens.extend(known)
        except OverflowError:
            _numbers("append", tokens)  # refuses what does not fit 64 bits
            raise

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Begin a sequence as ``parent`` is now, swapped out or not. They share all blocks; whoever
        writes into a block that others share gets a copy of it, from `step`."""
        found = self._found("fork", parent, "parent")
        self._require_new("fork", child, "child")
        self._sequences[child] = self._shared(found)

    def reorder(self, sequences: Sequence[Hashable], parents: Sequence[Hashable]) -> None:
        """Have each sequence be what its parent is now: a step of a beam search.

        Parameters
        ----------
        sequences : sequence of names
            Each once. Those that there are end as what they were; others begin.
        parents : sequence of names
            One for each sequence, of sequences that there are. Who has the same parent shares
            blocks, as after `fork`. A parent that is not among ``sequences`` stays as it is.
        """
        name = f"{NAME}.reorder"
        sequences, parents = self._alike(name, sequences, "parents", parents)
        found = [self._found("reorder", parent, "parents") for parent in parents]
        old = {}  # of these names; a child takes its parent over, where it is one of them
        for sequence in sequences:
            if self._is_there("reorder", sequence, "sequences"):
                one = self._sequences[sequence]
                old[id(one)] = one
        if len(set(sequences)) < len(sequences):
            self._refuse_twice(name, sequences)
        new = [old.pop(id(one), None) or self._shared(one) for one in found]
        for one in old.values():
            self._end(one)
        self._sequences.update(zip(sequences, new))

    def _shared(self, found):
        """A sequence like ``found``, with the same blocks."""
        made = _Sequence(NO_ROW, found.tokens[:], found.salt)
        made.blocks, made.contents = found.blocks.copy(), found.contents.copy()
        made.length, pool = found.length, self.host_pool
        if found.row != NO_ROW:
            made.row, pool = self._new_row(), self.pool
            self._table[made.row] = self._table[found.row]
        for block in made.blocks:
            pool.share(block)
        return made

    def free(self, sequence: Hashable) -> None:
        """End a sequence. Blocks that nobody else shares are free; those that `add` can find are
        found until they are taken."""
        found = self._found("free", sequence)
        del self._sequences[sequence]
        self._end(found)

    def _end(self, found):
        if found.row == NO_ROW:
            self._drop(self.host_pool, found.blocks)
        else:
            self._drop(self.pool, found.blocks)
            self._give_row_back(found)

    def truncate(self, sequence: Hashable, length: int) -> None:
        """Forget all tokens of a sequence but the first ``length``, such as guesses that were
        wrong."""
        found = self._resident("truncate", sequence)
        length = contract.integer(f"{NAME}.truncate", "length", length, 0)
        if length > found.length:
            expected = f"at most {found.length}, the tokens that were fed"
            name = f"{NAME}.truncate: length"
            raise errors.wrong("value", name, expected, length)
        kept = self._blocks_of(length)
        self._drop(self.pool, found.blocks[kept:])
        del found.blocks[kept:], found.contents[length // self.block_size :]
        del found.tokens[length:]
        self._table[found.row, kept:] = -1
        found.length = length

    # --- room for tokens

    def schedule(
        self, sequences: Iterable[Hashable], *, max_tokens: int | None = None
    ) -> dict[Hashable, int]:
        """How many of their pending tokens sequences can be fed in one step: those first that have
        one, which decode, and then prompts, as much of them as fits.

        Parameters
        ----------
        sequences : iterable of names
            Who is to take part; there may be more than a step takes. Of those that have one token
            to be fed the first ones go first, and so of the others. Beams of one search are not
            kept together: let no more sequences run than ``max_sequences`` and ``max_tokens``.
        max_tokens : int, optional
            Of the step; at most, and by default, that of the tables.

        Returns
        -------
        dict
            {name: how many}, in the order of the step, of at most ``max_sequences`` names; without
            those that have to wait.
        """
        name, left, places = f"{NAME}.schedule: max_tokens", self.max_tokens, self.max_sequences
        if max_tokens is not None:
            left = contract.integer(f"{NAME}.schedule", "max_tokens", max_tokens, 0)
            if left > self.max_tokens:
                expected = f"at most {self.max_tokens}, those of the tables"
                raise errors.wrong("value", name, expected, str(left))
        names = _listed(sequences, sized=False)
        if names is None:
            name = f"{NAME}.schedule: sequences"
            raise errors.wrong("type", name, "a list of names", errors.shown(sequences))
        counts, prompts = {}, []
        for sequence in names:
            found = self._resident("schedule", sequence, "sequences")
            pending = len(found.tokens) - found.length
            if pending > 1:
                prompts.append((sequence, pending))
            elif pending > 0 and left and len(counts) < places:
                counts[sequence] = 1
                left -= 1
        for sequence, pending in prompts:
            if left and len(counts) < places:
                counts[sequence] = min(pending, left)
                left -= counts[sequence]
        return counts

    def blocks_needed(self, sequences: Sequence[Hashable], counts: Sequence[SupportsIndex]) -> int:
        """How many free blocks `step` would take for these sequences and counts of new tokens. None
        of them is swapped out: to come back, sequences take as many as there are different numbers
        in their `blocks`, or fewer."""
        return self._planned("blocks_needed", sequences, counts)[2]

    def extend(
        self, sequences: Sequence[Hashable], counts: Sequence[SupportsIndex]
    ) -> list[tuple[int, int]]:
        """Make room for new tokens without a step: for blocks that come from elsewhere.

        Parameters
        ----------
        sequences : sequence of names
            Each once, none swapped out.
        counts : sequence of int
            New tokens of each.

        Returns
        -------
        list of (source, destination)
            Blocks to be copied before anything is written, by `copy_blocks`.

        Raises
        ------
        OutOfBlocksError
            Where too few blocks are free; then nothing was changed.
        """
        found, numbers, needed = self._planned("extend", sequences, counts)
        self._require_free("extend", needed, self.pool)
        return self._extend(found, numbers)

    def step(
        self,
        sequences: Sequence[Hashable],
        counts: Sequence[SupportsIndex],
        *,
        num_sequences: int | None = None,
        num_tokens: int | None = None,
        stream: StreamLike | None = None,
    ) -> Step:
        """Make room for new tokens of some sequences, and tell where everything is.

        Parameters
        ----------
        sequences : sequence of names
            Each once, none swapped out: in this order they are in the arrays.
        counts : sequence of int
            New tokens of each: 1 to decode, more to prefill.
        num_sequences, num_tokens : int, optional
            How many the arrays are for, if there are to be more than there are: the others are
            padding. Of the same two numbers, the arrays have the same addresses at every step, so a
            graph that was captured with them can be replayed.
        stream : optional
            Where the upload to a GPU is enqueued; by default the framework's current stream.

        Returns
        -------
        Step
            Call `copy_blocks` with its ``copies`` before anything is written.

        Raises
        ------
        OutOfBlocksError
            Where too few blocks are free; then nothing was changed.
        CaptureError
            In a stream that is being captured.
        """
        if stream is not None:
            stream = streams.pointer(f"{NAME}.step", stream)
        if self._buffers.framework == "torch":
            tracing.refuse(f"{NAME}.step: result")
        found, numbers, needed = self._planned("step", sequences, counts)
        total = sum(numbers)
        rows = self._padded("num_sequences", num_sequences, len(found), self.max_sequences)
        tokens = self._padded("num_tokens", num_tokens, total, self.max_tokens)
        self._require_free("step", needed, self.pool)
        views, filled, upload = self._buffers.begin(rows, tokens, stream)
        copies = self._extend(found, numbers)
        places, lengths = [one.row for one in found], [one.length for one in found]
        fed = _fed(found, numbers)
        fill(filled, self._table, self.block_size, places, lengths, numbers, fed)
        self._buffers.end(upload)
        sizes = len(found), total, max(lengths, default=0), max(numbers, default=0)
        return Step(views, copies, sizes)

    def _padded(self, name, given, least, most):
        """How many the arrays are for."""
        if given is None:
            given = least
        given = contract.integer(f"{NAME}.step", name, given)
        if not least <= given <= most:
            if least > most:
                expected, got = f"at most max_{name[4:]} = {most}", str(least)
            else:
                expected, got = f"a number in {least}..{most}", str(given)
            raise errors.wrong("value", f"{NAME}.step: {name}", expected, got)
        return given

    def _planned(self, method, sequences, counts):
        """(The sequences, the counts as integers, how many blocks that takes)."""
        name = f"{NAME}.{method}"
        sequences, counts = self._alike(name, sequences, "counts", counts)
        try:
            distinct = len(set(sequences)) == len(sequences)
        except Exception:
            for sequence in sequences:  # refuses the one that cannot be hashed
                self._found(method, sequence, "sequences")
            raise
        # Every statement of these loops runs for each sequence, at each step.
        block_size, max_length, users = self.block_size, self.max_length, self.pool._users
        known = self._sequences.get
        all_found, numbers, needed = [], [], 0
        writers: dict[int, int] = {}  # block that is shared -> who gets a copy of it
        for sequence, count in zip(sequences, counts):
            found = known(sequence)
            if found is None or found.row == NO_ROW:
                found = self._resident(method, sequence, "sequences")
            if type(count) is not int or not 0 <= count < 2**63:
                count = contract.integer(name, "counts", count, 0)
            length = found.length
            end = length + count
            if end > max_length:
                most = errors.counted(max_length, "token")
                expected = f"at most max_length = {most} of a sequence"
                got = f"{end} of {errors.shown(sequence)}"
                raise errors.wrong("value", f"{name}: counts", expected, got)
            needed += -(-end // block_size) - len(found.blocks)
            if count and length % block_size:
                last = found.blocks[-1]
                if users[last] > 1:
                    others = writers.get(last, 0)
                    if users[last] - others > 1:  # the last one to write keeps it
                        writers[last] = others + 1
                        needed += 1
            all_found.append(found)
            numbers.append(count)
        if not distinct:
            self._refuse_twice(name, sequences)
        return all_found, numbers, needed

    @staticmethod
    def _refuse_twice(name, sequences):
        again = next(s for at, s in enumerate(sequences) if s in sequences[:at])
        got = f"{errors.shown(again)} twice"
        raise errors.wrong("value", f"{name}: sequences", "each sequence once", got)

    @staticmethod
    def _alike(name, sequences, argument, others):
        """A list of names, and one of as many of what ``argument`` calls."""
        both = []
        for called, given in (("sequences", sequences), (argument, others)):
            found = _listed(given)
            if found is None:
                got = errors.shown(given)
                raise errors.wrong("type", f"{name}: {called}", "a list", got)
            both.append(found)
        names, numbers = both
        if len(names) != len(numbers):
            expected = f"one {argument[:-1]} for each of {errors.counted(len(names), 'sequence')}"
            raise errors.wrong("length", f"{name}: {argument}", expected, len(numbers))
        return both

    def _require_free(self, method, needed, pool):
        if needed > pool.num_free:
            sizes = needed, pool.num_free, pool.num_blocks
            if pool is self.host_pool:
                way_out = "bring a sequence back, or free one: host_blocks= says how many there are"
                raise OutOfBlocksError(f"{NAME}.{method}", *sizes, way_out)
            raise OutOfBlocksError(f"{NAME}.{method}", *sizes)

    def _extend(self, all_found, counts):
        """Make room, for which there are blocks enough; returns the copies."""
        pool, block_size, table = self.pool, self.block_size, self._table
        copies = []
        for found, count in zip(all_found, counts):
            if not count:
                continue
            self._hold(found)
            blocks, length = found.blocks, found.length
            if length % block_size:
                last = blocks[-1]
                if pool._users[last] > 1:
                    (own,) = pool.take()
                    copies.append((last, own))
                    pool.drop(last)
                    blocks[-1] = own
                    table[found.row, len(blocks) - 1] = own
                elif pool._contents[last] is not None:  # it was full, and was truncated
                    pool.forget(last)
            found.length = length = length + count
            missing = -(-length // block_size) - len(blocks)
            if missing:
                taken, at = pool.take(missing), len(blocks)
                table[found.row, at : at + missing] = taken
                blocks += taken
        return copies

    # --- to the host and back

    def swap_out(self, *sequences: Hashable) -> list[tuple[int, int]]:
        """Move sequences to host memory, so that others can have their blocks. Full blocks that
        host memory has already, of a sequence that began alike, are shared, and not copied; what
        the sequences share, such as beams do, they share there.

        Returns
        -------
        list of (block of the cache, block in host memory)
            For ``cache.swap_blocks(host_cache, pairs)`` or `SwapSpace.swap_out`.

        Raises
        ------
        OutOfBlocksError
            Where too few blocks are free in host memory for all of them; then nothing was changed.
        """
        group = [self._resident("swap_out", sequence) for sequence in sequences]
        pairs, blocks = self._moved("swap_out", sequences, group, self.pool, self.host_pool)
        for found, there in zip(group, blocks):
            self._give_row_back(found)
            found.row, found.blocks = NO_ROW, there
        return pairs

    def swap_in(self, *sequences: Hashable) -> list[tuple[int, int]]:
        """Bring sequences back, into whatever blocks are free. Full blocks that the cache still has
        are shared, and not copied.

        Returns
        -------
        list of (block in host memory, block of the cache)
            For ``host_cache.swap_blocks(cache, pairs)`` or `Prefetch.swap_in`.

        Raises
        ------
        OutOfBlocksError
            Where too few blocks are free for all of them; then nothing was changed.
        """
        group = [self._found("swap_in", sequence) for sequence in sequences]
        for sequence, found in zip(sequences, group):
            if found.row != NO_ROW:
                self._refuse("swap_in", sequence, "a sequence that is swapped out", "is not")
        pairs, blocks = self._moved("swap_in", sequences, group, self.host_pool, self.pool)
        for found, there in zip(group, blocks):
            found.row, found.blocks = self._new_row(), there
            self._table[found.row, : len(there)] = there
        return pairs

    def _moved(self, method, names, group, here, there):
        """(Pairs to be copied, each sequence's blocks of the pool ``there``) of sequences with
        blocks of the pool ``here``."""
        if len(set(names)) < len(names):
            self._refuse_twice(f"{NAME}.{method}", names)
        known: dict[int, int | None] = {}  # block here -> the one there that has its content
        for found in group:
            for block, content in itertools.zip_longest(found.blocks, found.contents):
                known[block] = None if content is None else there.find(content)
        missing = [block for block, other in known.items() if other is None]
        idle = {other for other in known.values() if other is not None and not there.users(other)}
        where = ", in host memory" if there is self.host_pool else ""
        self._require_free(method + where, len(missing) + len(idle), there)
        for found in group:
            for block in found.blocks:
                if known[block] is not None:
                    there.share(known[block])
        pairs = list(zip(missing, there.take(len(missing))))
        new, all_blocks = dict(pairs), []
        for found in group:
            for block in found.blocks:
                if block in new:
                    there.share(new[block])
            all_blocks.append([new.get(block, known[block]) for block in found.blocks])
            for block, content in zip(all_blocks[-1], found.contents):
                there.hold(block, content)
            self._drop(here, found.blocks)
        for block in new.values():
            there.drop(block)
        return pairs, all_blocks

    # --- what blocks hold

    def _hold(self, found):
        """Say what blocks hold that are full of known tokens. This is done when a sequence goes on:
        then the work of its last step was not given up."""
        if not self._reuse or found.length < self.block_size * (len(found.contents) + 1):
            return
        full = min(found.length, len(found.tokens)) // self.block_size
        for index in range(len(found.contents), full):
            content = self._content(found, index)
            found.contents.append(content)
            self.pool.hold(found.blocks[index], content)

    def _content(self, found, index):
        """What stands for the tokens of a full block and for all before them: a digest, so that
        prompts that are chosen to collide do not."""
        before = found.contents[index - 1] if index else _digest(found.salt, b"salt")
        first = index * self.block_size
        tokens = found.tokens[first : first + self.block_size].tobytes()
        return _digest(before + tokens, b"block")

    # --- rows and checks

    def _new_row(self):
        if not self._free_rows:
            old = len(self._table)
            more = np.full_like(self._table, -1)
            self._table = np.concatenate([self._table, more])
            self._free_rows = list(range(old, 2 * old))
        return self._free_rows.pop()

    def _give_row_back(self, found):
        self._table[found.row] = -1
        self._free_rows.append(found.row)

    @staticmethod
    def _drop(pool, blocks):
        """The last one first: it is the first to lose its content, of which the others are the
        beginning."""
        for block in reversed(blocks):
            pool.drop(block)

    def _found(self, method, sequence, argument="sequence"):
        try:
            found = self._sequences.get(sequence)
        except Exception as error:  # it cannot be hashed, or compared
            name, got = f"{NAME}.{method}: {argument}", errors.shown(sequence)
            raise errors.wrong("type", name, "something hashable", got) from error
        if found is None:
            self._refuse(method, sequence, "a sequence that was added", "was not", argument)
        return found

    def _resident(self, method, sequence, argument="sequence"):
        found = self._found(method, sequence, argument)
        if found.row == NO_ROW:
            self._refuse(method, sequence, "a sequence that is not swapped out", "is", argument)
        return found

    def _is_there(self, method, sequence, argument):
        try:
            return sequence in self._sequences
        except Exception:
            return self._found(method, sequence, argument)  # refuses what cannot be hashed

    def _require_new(self, method, sequence, argument="sequence"):
        if self._is_there(method, sequence, argument):
            self._refuse(method, sequence, "a new name", "is taken", argument)

    def _refuse(self, method, sequence, expected, verb, argument="sequence"):
        name = f"{NAME}.{method}: {argument}"
        got = f"{errors.shown(sequence)}, which {verb}"
        raise errors.wrong("value", name, expected, got)


def _listed(given, sized=True):
    """What was given in an order, in a list or tuple; None for anything else. ``sized``: something
    that has a length, too."""
    if type(given) in (list, tuple):
        return given
    # Letters are no names, and sets have no order.
    if issubclass(type(given), (str, bytes, set, frozenset)):
        return None
    try:
        if sized:
            len(given)  # which an array without dimensions has not, though it has the method
        return [*given]
    except Exception:  # whatever its class raises
        return None


def _fed(all_found, counts):
    """The last so many tokens that have a slot, of all sequences; 0 for those that were not
    told."""
    fed = array.array("q")
    for found, count in zip(all_found, counts):
        tokens, end = found.tokens, found.length
        if len(tokens) < end:
            told = tokens[end - count :]
            fed += told
            fed.frombytes(bytes(fed.itemsize * (count - len(told))))
        elif count == 1:
            fed.append(tokens[end - 1])
        else:
            fed += tokens[end - count : end]
    return fed


def _digest(data, kind):
    return hashlib.blake2b(data, digest_size=32, person=kind).digest()


def _numbers(method, tokens):
    """Tokens, or one, as an array of 64-bit integers."""
    given = tokens
    try:
        given = [contract.index(tokens)]
    except Exception:  # it is no single one
        pass
    try:
        if "bool" in str(getattr(given, "dtype", "")):
            raise TypeError("booleans")
        if not isinstance(given, (list, tuple)):
            contract.refuse_unordered(given)
            given = list(given)
        numbers = array.array("q", given)
        # Booleans are 0 or 1: what is neither need not be looked at.
        small = np.frombuffer(numbers.tobytes(), np.uint64) < 2
        for at in small.nonzero()[0].tolist():
            contract.index(given[at])
        return numbers
    except Exception as error:  # also whatever an object raises that is to be a number
        name, got = f"{NAME}.{method}: tokens", errors.shown(tokens)
        raise errors.wrong("value", name, "integers in one list", f"{got} ({error})") from error
