# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying blocks inside paged caches, all layers and pairs in one launch."""

import functools

from .. import arrays, blocks, contract, cpu
from ..errors import ShapeError


def copy_blocks(key_caches, value_caches, block_mapping, *, stream=None):
    """Copy blocks within every layer's key and value cache.

    For each layer and each pair ``(source, destination)`` the whole block ``source`` is copied over
    block ``destination``. All pairs are copied at once. Pointers and pairs in host memory travel
    inside the kernel's parameters: nothing is uploaded, nothing waits, and the call can be captured
    in a CUDA graph. What does not fit one launch's parameters takes several.

    Parameters
    ----------
    key_caches : list of arrays [num_blocks, ...]
        One for each layer, all of the same shape, strides, dtype (any) and device. Blocks may have
        gaps between and inside them (views of packed pages); only their elements are copied.
    value_caches : list of arrays [num_blocks, ...]
        Likewise, as many; their blocks may be shaped differently from the keys'.
    block_mapping : sequence of (source, destination), or int32 or int64 array [num_pairs, 2]
        In host memory it is checked before anything is written: numbers in range, no destination
        twice, no block both source and destination. On the device it is used where it is: pairs
        out of range are skipped and recorded (see `raise_faults`), and repeated destinations or
        chains give undefined contents of the blocks concerned.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns the caches.

    Raises
    ------
    ArgumentError
        Or one of its kinds, before anything is written.
    """
    lists = {"key_caches": key_caches, "value_caches": value_caches}
    stream = None if stream is None else arrays.stream_pointer(stream)
    Copier("copy_blocks", lists, stream).copy(block_mapping, stream)


def copy_blocks_mla(kv_caches, block_mapping, *, stream=None):
    """Copy blocks within every layer's cache, where a layer has only one (multi-head latent
    attention): `copy_blocks` with a single list.

    Parameters
    ----------
    kv_caches : list of arrays [num_blocks, block_size, entry_size]
        One for each layer.
    block_mapping, stream
        As for `copy_blocks`.
    """
    stream = None if stream is None else arrays.stream_pointer(stream)
    Copier("copy_blocks_mla", {"kv_caches": kv_caches}, stream).copy(block_mapping, stream)


class Copier:
    """Copying within the caches of all layers, which are read once: what `copy_blocks` makes for
    one call, a `PagedKVCache` keeps.

    Parameters
    ----------
    op : str
        The operation's name, for messages.
    lists : dict
        {name: list of arrays}: one list for each tensor of a layer.
    stream : int, optional
        See `copy_blocks`.
    """

    def __init__(self, op, lists, stream=None):
        for name, caches in lists.items():
            blocks.require_list(op, name, caches)
        self._op, self._lists = op, lists
        self._first, caches = next(iter(lists.items()))
        if caches and stream is None and arrays.is_foreign(caches[0], f"{op}: {self._first}[0]"):
            stream = blocks.stream_of(op, f"{self._first}[0]", caches[0])
        layers = [blocks.read_layers(op, name, caches, stream) for name, caches in lists.items()]
        counts = {len(x.addresses) if x else 0 for x in layers}
        if len(counts) > 1:
            raise ShapeError(
                f"{op}: Invalid length of value_caches: expected as many layers as key_caches, got "
                f"{len(lists['value_caches'])} where there are {len(lists['key_caches'])}"
            )
        self.count = counts.pop()
        self._facts = tuple(x.facts for x in layers) if self.count else ()
        addresses = [a for layer in zip(*(x.addresses for x in layers if x)) for a in layer]
        self._addresses, self._table, self._plans = addresses, None, {}
        self._current_stream = _current_stream(self._facts[0]) if self.count else None

    @property
    def dimensions(self):
        """Of the first list's arrays."""
        return len(self._facts[0].shape)

    def check(self):
        """Raise what copying would raise, whatever the pairs."""
        if self.count:
            self._plan(None)

    def _plan(self, mapping_dtype):
        if mapping_dtype not in self._plans:
            plan = _plan(self._op, tuple(self._lists), self._facts, mapping_dtype)
            self._plans[mapping_dtype] = plan
        return self._plans[mapping_dtype]

    def copy(self, block_mapping, stream=None):
        """Copy the blocks of ``block_mapping`` within every layer."""
        op = self._op
        if stream is not None:
            stream = arrays.stream_pointer(stream)
        elif self._current_stream is not None:
            stream = self._current_stream()
        mapping = blocks.read_mapping(op, block_mapping, stream)
        if not self.count:
            return
        on_host = isinstance(mapping, blocks.Pairs)
        dtype = None if on_host else mapping.dtype
        num_blocks, device, plan = self._plan(dtype)
        if on_host:
            blocks.check_pairs(op, mapping, num_blocks, num_blocks)
            blocks.check_disjoint(op, mapping)
        else:
            contract.same_device(op, "block_mapping", mapping.device, self._first, device)
        if plan is None:
            self._copy_on_cpu(mapping)
            return
        if self._table is None:
            self._table = plan.table(self._addresses, self._addresses)
        plan.enqueue(stream, self._table, *((mapping,) if on_host else (None, mapping)))

    def _copy_on_cpu(self, mapping):
        for name, caches in self._lists.items():
            for index, cache in enumerate(caches):
                view = blocks.as_numpy(cache, f"{self._op}: {name}[{index}]")
                cpu.copy_blocks(view, view, mapping)


@functools.lru_cache(maxsize=256)
def _current_stream(facts):
    array = arrays.describe(facts, "the first layer")
    return None if array.device.kind == "cpu" else arrays.current_stream_of(array)


@functools.lru_cache(maxsize=256)
def _plan(op, names, facts, mapping_dtype):
    """(number of blocks, device, `blocks.CopyPlan` or None on the CPU) of a signature."""
    check = contract.Contract(op)
    tensors = []
    for name, fact in zip(names, facts):
        array = arrays.describe(fact, f"{op}: {name}")
        check.shape(name, array, "num_blocks ...")
        check.device(name, array)
        check.writable(name, array)
        tensors.append((blocks.geometry(op, name, array, array), fact.ptr))
    num_blocks = check.sizes["num_blocks"]
    if array.device.kind == "cpu":
        return num_blocks, array.device, None
    plan = blocks.CopyPlan(
        op, tensors, True, num_blocks, num_blocks, mapping_dtype, array.device.index
    )
    return num_blocks, array.device, plan
