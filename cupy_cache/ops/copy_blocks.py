# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying blocks inside paged caches, all layers and pairs in one launch."""

import functools

from .. import cpu
from ..errors import ShapeError
from ..runtime import arrays, contract
from .shared import block_pairs, blocks


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
        gaps between and inside them (views of packed pages); only their elements are copied, of
        which no two arrays may share any.
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
    copier("copy_blocks", lists, stream).copy(block_mapping, stream)


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
    copier("copy_blocks_mla", {"kv_caches": kv_caches}, stream).copy(block_mapping, stream)


def copier(op, lists, stream=None):
    """The `Copier` for caches, which are read here: what `copy_blocks` gets for one call, and a
    `PagedKVCache` keeps.

    Parameters
    ----------
    op : str
        The operation's name, for messages.
    lists : dict
        {name: list of arrays}: one list for each tensor of a layer.
    stream : int, optional
        See `copy_blocks`.
    """
    for name, caches in lists.items():
        blocks.require_list(op, name, caches)
    first, caches = next(iter(lists.items()))
    if caches and stream is None and arrays.is_foreign(caches[0], f"{op}: {first}[0]"):
        stream = blocks.stream_of(op, f"{first}[0]", caches[0])
    layers = [blocks.read_layers(op, name, caches, stream) for name, caches in lists.items()]
    if len(set(map(len, lists.values()))) > 1:
        raise ShapeError(
            f"{op}: Invalid length of value_caches: expected as many layers as key_caches, got "
            f"{len(lists['value_caches'])} where there are {len(lists['key_caches'])}"
        )
    return _copier_of(op, tuple(lists), tuple(layers))


class Copier:
    """Copying within the caches of all layers. It knows their addresses, and keeps none alive.

    Parameters
    ----------
    op : str
    names : tuple of str
        What the lists of arrays are called.
    layers : tuple of blocks.Layers
        The lists; None where they are empty.
    """

    def __init__(self, op, names, layers):
        self._op, self._names = op, names
        self._layers = () if None in layers else layers
        self._facts = tuple(x.facts for x in self._layers)
        # Layer by layer, a layer's tensors together.
        self._addresses = [a for layer in zip(*(x.addresses for x in self._layers)) for a in layer]
        self._table, self._plans, self._current_stream = None, {}, None
        if self._facts:
            name = f"{op}: {names[0]}[0]"
            self._current_stream = blocks.current_stream_for(self._facts[0], name)

    @property
    def dimensions(self):
        """Of the first list's arrays."""
        return len(self._facts[0].shape)

    def check(self):
        """Raise what copying would raise, whatever the pairs."""
        if self._facts:
            self._plan(None)

    def _plan(self, mapping_dtype):
        if mapping_dtype not in self._plans:
            plan = _plan(self._op, self._names, self._facts, mapping_dtype)
            self._plans[mapping_dtype] = plan
        return self._plans[mapping_dtype]

    def copy(self, block_mapping, stream=None):
        """Copy the blocks of ``block_mapping`` within every layer."""
        op = self._op
        if stream is not None:
            stream = arrays.stream_pointer(stream)
        elif self._current_stream is not None:
            stream = self._current_stream()
        mapping = block_pairs.read(op, block_mapping, stream)
        if not self._facts:
            return
        pairs = None
        if isinstance(mapping, block_pairs.Pairs):
            pairs, mapping = mapping, None
        num_blocks, device, plan = self._plan(mapping and mapping.dtype)
        if pairs is not None:
            block_pairs.check(op, pairs, num_blocks, num_blocks)
            block_pairs.check_disjoint(op, pairs, num_blocks)
        else:
            contract.same_device(op, "block_mapping", mapping.device, self._names[0], device)
        if plan is None:
            self._copy_on_cpu(pairs)
            return
        if self._table is None:
            self._table = plan.table(self._addresses, self._addresses)
        plan.enqueue(stream, self._table, pairs, mapping)

    def _copy_on_cpu(self, pairs):
        for name, layers in zip(self._names, self._layers):
            array = layers.describe(f"{self._op}: {name}")
            for address in layers.addresses:
                view = arrays.as_numpy(address, array.shape, array.strides, array.dtype.bits)
                cpu.copy_blocks(view, view, pairs)


# Remembered by all that a `Copier` depends on, the addresses included; none of it is an array.
_copier_of = functools.lru_cache(maxsize=16)(Copier)


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
