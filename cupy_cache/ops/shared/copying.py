# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The plan of operations that copy within caches, by pairs of (source, destination)."""

from ...runtime import arrays
from . import blocks


class InPlace:
    """Copies blocks or slots, by pairs of numbers, within caches of one signature.

    Parameters
    ----------
    tensors : list of arrays.Array
        Of a layer.
    copy : blocks.CopyPlan or None
        None on the CPU.
    check : callable
        Pairs in host memory, `indices.Chosen` -> the pairs to copy; raises for wrong ones.
    index : callable
        For the CPU: an array of numbers -> NumPy's index into a cache.
    """

    def __init__(self, tensors, copy, check, index):
        self._tensors, self._copy, self._check, self._index = tensors, copy, check, index

    def tables(self, values):
        """The addresses as the kernel wants them."""
        *layers, _ = values
        if self._copy is None:
            return layers
        addresses = blocks.interleaved(layers)
        return self._copy.tables(addresses, addresses)

    def run(self, call):
        """Check pairs in host memory, and copy."""
        pairs = call.values[-1]
        if type(pairs) is int:  # their address on the GPU
            self._copy.enqueue_mapping(call.stream, call.tables, pairs, call.rows)
            return
        pairs = self._check(pairs)
        if self._copy is None:
            self._run_cpu(call.tables, pairs.numbers.T)
        else:
            self._copy.enqueue_pairs(call.stream, call.tables, pairs)

    def _run_cpu(self, layers, pairs):
        of, to = map(self._index, pairs)
        for array, addresses in zip(self._tensors, layers):
            for address in addresses:
                view = arrays.as_numpy(address, array.shape, array.strides, array.dtype.bits)
                view[to] = view[of]


def count(extents, options, scalars):
    """The `dispatch.Op` count of such operations: (pairs, no fields)."""
    del options, scalars
    (pairs,) = extents
    return pairs, ()
