# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Steps that decode, as CUDA graphs of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .. import Step, errors
from ..errors import MissingDependencyError
from ..runtime import contract, tracing

try:
    import torch
except ImportError as error:
    raise MissingDependencyError(
        f"cupy_cache.integrations.torch_graphs needs torch (pip install torch): {error}"
    ) from error

NAME = "StepGraphs"


class StepGraphs:
    """What a model does with a step in which each sequence has one new token, captured once for
    each of some numbers of sequences and then replayed.

    A step's arrays are padded to the next of these numbers by ``num_sequences`` and ``num_tokens``
    of `BlockTables.step`, and of one number they are always in the same place. All steps are of one
    `BlockTables`::

        graphs = StepGraphs(decode, 64)
        size = graphs.padded(len(names))
        step = tables.step(names, [1] * len(names), num_sequences=size, num_tokens=size)
        cache.copy_blocks(step.copies)
        made = graphs(step)

    Of CPU tensors nothing is captured: the function is called.

    A graph keeps every number that is no array's. So the function sees of a step the arrays and
    ``max_query_len``, which is 1; anything else is refused when it is read.

    Collectives of NCCL may be part of it, in the same order in all processes. Let the graphs go by
    ``graphs.graphs.clear()`` before ``torch.distributed.destroy_process_group``: it waits for that.

    Parameters
    ----------
    function : callable
        Takes a `Step`; returns what is to be read after each replay: tensors, which stay in their
        place, and are overwritten by the next replay of any of the graphs.
    max_sequences : int
        The largest number.
    sizes : sequence of int, optional
        All numbers; by default 1, 2, 4, 8, multiples of 16, and the largest.

    Attributes
    ----------
    sizes : list of int
        Ascending.
    graphs : dict
        {number of sequences: (torch.cuda.CUDAGraph, what the function returned)} of those that were
        captured. They share memory, so they are replayed one after the other.

    Raises
    ------
    CupyCacheError
        One of its kinds.
    """

    sizes: list[int]
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any]]

    def __init__(
        self,
        function: Callable[[Step], Any],
        max_sequences: int,
        sizes: Iterable[int] | None = None,
    ) -> None:
        most = contract.integer(NAME, "max_sequences", max_sequences, 1)
        given = (1, 2, 4, 8, *range(16, most, 16), most) if sizes is None else sizes
        if not isinstance(given, Iterable):
            raise errors.wrong("type", f"{NAME}: sizes", "integers", errors.shown(sizes))
        found = {contract.integer(NAME, "sizes", size, 1) for size in given}
        self.sizes = sorted(size for size in found if size <= most)
        if not self.sizes or self.sizes[-1] < most:
            self.sizes.append(most)
        self.graphs, self._function = {}, function
        # Of each number the step that was captured. It keeps the memory: another's arrays cannot
        # come to lie there.
        self._captured: dict[int, Step] = {}
        self._pool = self._stream = None

    def padded(self, num_sequences: int) -> int:
        """The number of sequences that a step of so many is padded to."""
        num_sequences = contract.integer(f"{NAME}.padded", "num_sequences", num_sequences, 0)
        for size in self.sizes:
            if num_sequences <= size:
                return size
        expected, name = f"at most {self.sizes[-1]}", f"{NAME}.padded: num_sequences"
        raise errors.wrong("value", name, expected, num_sequences)

    def __call__(self, step: Step) -> Any:
        """What the function makes of a step, whose arrays are for one of ``sizes``, and in which
        each sequence has one new token."""
        if not isinstance(step, Step) or not isinstance(step.seq_lens, torch.Tensor):
            name, expected = f"{NAME}: step", "a Step with torch's tensors"
            got = type(getattr(step, "seq_lens", step)).__name__
            raise errors.wrong("type", name, expected, got)
        size = len(step.seq_lens)
        if len(step.positions) != size:
            expected, got = f"as many as sequences, {size}", len(step.positions)
            raise errors.wrong("length", f"{NAME}: step.positions", expected, got)
        if step.num_tokens != step.num_sequences or step.max_query_len > 1:
            expected = "one new token of each sequence"
            got = f"{step.num_tokens} of {step.num_sequences}, at most {step.max_query_len} of one"
            raise errors.wrong("value", f"{NAME}: step", expected, got)
        if not step.seq_lens.is_cuda:
            return self._function(_Arrays(step))
        if size not in self.graphs:
            self._capture(step, size)
        elif step.seq_lens.data_ptr() != self._captured[size].seq_lens.data_ptr():
            expected = "of the `BlockTables` whose steps were captured"
            raise errors.wrong("value", f"{NAME}: step", expected, "one whose arrays lie elsewhere")
        return self.replay(size)

    def replay(self, size: int) -> Any:
        """What the graph for so many sequences makes of what is in a step's arrays now."""
        size = contract.integer(f"{NAME}.replay", "size", size)
        if size not in self.graphs:
            expected = f"one that was captured, of {sorted(self.graphs)}"
            raise errors.wrong("value", f"{NAME}.replay: size", expected, errors.shown(size))
        graph, results = self.graphs[size]
        graph.replay()
        return results

    def _capture(self, step, size):
        shown = _Arrays(step)
        self._function(shown)  # loads kernels, of which none may be met first inside the capture
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Captured is a stream of the current GPU, which may be another than the step's.
        with torch.cuda.device(step.seq_lens.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those of torch.distributed, may go on meanwhile.
            captured = torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            )
            with captured:
                results = self._function(shown)
        self.graphs[size], self._captured[size] = (graph, results), step


class _Arrays(Step):
    """Of a step what a captured function may read."""

    __slots__ = ()

    def __init__(self, step: Step) -> None:
        self.block_table, self.seq_lens = step.block_table, step.seq_lens
        self.query_start_loc, self.positions = step.query_start_loc, step.positions
        self.slot_mapping, self.token_ids = step.slot_mapping, step.token_ids
        self.max_query_len = step.max_query_len

    def __getattr__(self, name: str) -> Any:
        """What is not there; of a step, a number that every replay would take for its own."""
        if name not in Step.__slots__:
            raise AttributeError(f"a Step has no attribute {name!r}")
        expected, way_out = "arrays alone in what is captured", "read it outside of the function"
        raise errors.wrong("value", f"{NAME}: step.{name}", expected, "what is no array", way_out)

    def __repr__(self) -> str:
        return f"<Step in arrays for {len(self.seq_lens)}, to be captured>"


tracing.hint({NAME: StepGraphs})
