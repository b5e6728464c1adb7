# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The arrays of a step: always at the same place, so that a captured graph may read them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import errors
from ..errors import CaptureError
from ..runtime import allocations, arrays, driver, formats, making, streams

MAX_KNOWN = 256  # pairs of (sequences, tokens) whose views are remembered
ALIGNMENT = 16


class Step:
    """What the operations of one step read; see `BlockTables.step`.

    The arrays are of the tables' framework, on their device, and hold these numbers until the next
    step. S is ``num_sequences`` and T ``num_tokens`` of the call, or as many as there are.

    Attributes
    ----------
    block_table : int32 array [S, width]
        Block numbers of each sequence; -1 after its last block, and in rows of no sequence.
    seq_lens : int32 array [S]
        Tokens of each sequence, those of this step included; 0 where there is none.
    query_start_loc : int32 array [S + 1]
        Where each sequence's tokens start; after the last sequence the end of all.
    positions : int64 array [T]
        Of each token in its sequence; 0 for padding.
    slot_mapping : int64 array [T]
        Where each token is written; -1 for padding.
    token_ids : int64 array [T]
        The tokens themselves, as `add` and `append` gave them: what the model is fed. 0 for
        padding, and for tokens that were not given.
    copies : list of (source, destination)
        Blocks to be copied before anything is written, by `copy_blocks`: sequences that shared
        their last block get one of their own.
    num_sequences, num_tokens : int
        How many there are, padding not counted.
    max_seq_len, max_query_len : int
        The largest of ``seq_lens``, and of the counts.
    """

    __slots__ = (
        "block_table", "copies", "max_query_len", "max_seq_len", "num_sequences", "num_tokens",
        "positions", "query_start_loc", "seq_lens", "slot_mapping", "token_ids",
    )  # fmt: skip

    block_table: Any
    seq_lens: Any
    query_start_loc: Any
    positions: Any
    slot_mapping: Any
    token_ids: Any
    copies: list[tuple[int, int]]
    num_sequences: int
    num_tokens: int
    max_seq_len: int
    max_query_len: int

    def __init__(
        self, views: tuple[Any, ...], copies: list[tuple[int, int]], sizes: tuple[int, ...]
    ) -> None:
        self.slot_mapping, self.positions, self.token_ids, self.query_start_loc = views[:4]
        self.seq_lens, self.block_table, self.copies = *views[4:], copies
        self.num_sequences, self.num_tokens, self.max_seq_len, self.max_query_len = sizes

    def __repr__(self) -> str:
        text = (
            f"<Step of {errors.counted(self.num_tokens, 'new token')} of "
            f"{errors.counted(self.num_sequences, 'sequence')}, the longest {self.max_seq_len}, "
            f"in arrays for {len(self.slot_mapping)} and {len(self.seq_lens)}"
        )
        if self.copies:
            text += f", {errors.counted(len(self.copies), 'block')} to copy"
        return f"{text}>"


class Buffers:
    """Memory for the arrays of steps of any size up to a largest one, one after the other from its
    beginning on: of a size, the arrays are always the same.

    Numbers are written in host memory, and uploaded by a single copy from pinned memory, which
    nothing waits for. Where the arrays are in host memory, they are written there.
    """

    def __init__(self, op, max_sequences, max_tokens, width, framework, device):
        self._op, self._width = op, width
        self._sizes = max_sequences, max_tokens, width
        self.framework, self.device = making.home(op, framework, device)
        *_, end = self._layout(max_sequences, max_tokens)
        with making.outside_inference_mode(self.framework):
            self._memory = making.empty(self.framework, self.device, (end,), formats.UINT8)
        view = arrays.view(self._memory, f"{op}: memory")
        self._address, self._host = view.ptr, None
        if self.device.kind == "cpu":
            self._host = arrays.as_numpy(view.ptr, (end,), (1,), formats.UINT8.numpy)
        else:
            self._current = streams.current(self.framework, self.device.index)
        self._known: dict[tuple[int, int], tuple] = {}

    def __reduce__(self):
        """A copy has memory of its own: the views of the one would be no views of the other."""
        return type(self), (self._op, *self._sizes, self.framework, str(self.device))

    def _layout(self, sequences, tokens):
        """(Offset, shape, dtype) of each array, and where they end."""
        at, layout = 0, []
        long, short = formats.INT64, formats.INT32
        for shape, dtype in (
            ((tokens,), long), ((tokens,), long), ((tokens,), long), ((sequences + 1,), short),
            ((sequences,), short), ((sequences, self._width), short),
        ):  # fmt: skip
            layout.append((at, shape, dtype))
            at += math.prod(shape) * dtype.bytes
            at += -at % ALIGNMENT
        return *layout, max(at, ALIGNMENT)

    def begin(self, sequences, tokens, stream):
        """(The arrays, NumPy arrays to be filled, what `end` wants)."""
        known = self._known.get((sequences, tokens))
        if known is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[sequences, tokens] = self._new(sequences, tokens)
        views, layout, size, filled = known
        if self._host is not None:
            return views, filled, None
        if stream is None:
            stream = self._current()
        elif stream != self._current():
            driver.active.order(self._current(), stream, self.device.index)
        if driver.active.capturing(stream, self.device.index):
            raise CaptureError(
                f"{self._op} on {self.device}: a graph that is captured would upload the same "
                "numbers at every replay; call it before the capture and before each replay"
            )
        pinned = allocations.pinned(size)
        return views, _parts(pinned, layout), (stream, pinned)

    def _new(self, sequences, tokens):
        *layout, size = self._layout(sequences, tokens)
        views = tuple(_typed(self._memory, self.framework, *place) for place in layout)
        return views, layout, size, self._host is not None and _parts(self._host, layout)

    def end(self, upload):
        """Have the arrays hold what was filled."""
        if upload is None:
            return
        stream, pinned = upload
        index = self.device.index
        driver.active.copy(self._address, pinned.ctypes.data, pinned.nbytes, stream, index)
        # On a stream that is not the framework's, its allocator would give the memory to others.
        streams.keep_until_done((pinned, self._memory), stream, index)


def _parts(memory, layout):
    return [
        memory[at : at + math.prod(shape) * dtype.bytes].view(dtype.numpy).reshape(shape)
        for at, shape, dtype in layout
    ]


def _typed(memory, framework, at, shape, dtype):
    """A view of bytes of ``framework``."""
    part = memory[at : at + math.prod(shape) * dtype.bytes]
    return making.viewed(part, framework, dtype).reshape(shape)


def fill(filled, table, block_size, rows, lengths, counts, token_ids):
    """Write the numbers of a step.

    Parameters
    ----------
    filled : list
        Of the arrays slot_mapping, positions, token_ids, query_start_loc, seq_lens and
        block_table.
    table : int32 array [at least max(rows) + 1, width]
        The block tables of all sequences.
    rows, lengths, counts : list of int
        Of each sequence of the step: its row of ``table``, its tokens and the new ones among them.
    token_ids : sequence of int
        Of all new tokens, in order.
    """
    slots, positions, tokens, starts, lens, tables = filled
    n, total = len(rows), len(token_ids)
    np.take(table, np.array(rows, np.intp), axis=0, out=tables[:n], mode="clip")
    tables[n:] = -1
    lens[:n], lens[n:] = lengths, 0
    starts[0], starts[n + 1 :] = 0, total
    np.cumsum(np.array(counts, np.int32), out=starts[1 : n + 1])
    if total == n and 0 not in counts:
        owners = np.arange(n)
        np.subtract(lens[:n], 1, out=positions[:n])
    else:
        owners = np.repeat(np.arange(n), counts)
        first = (lens[:n] - starts[1 : n + 1]).astype(np.int64)
        np.add(np.arange(total), first[owners], out=positions[:total])
    tokens[:total], tokens[total:] = token_ids, 0
    positions[total:], slots[total:] = 0, -1
    pages, offsets = np.divmod(positions[:total], block_size)
    slots[:total] = tables[owners, pages]
    slots[:total] *= block_size
    slots[:total] += offsets
