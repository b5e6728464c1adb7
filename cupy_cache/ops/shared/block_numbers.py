# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks or slots that a caller chose: integers in host memory, or an array on a GPU."""

from typing import NamedTuple

import numpy as np

from ...errors import ArgumentError, DTypeError, ShapeError
from ...runtime import arrays, contract, formats


class Numbers(NamedTuple):
    """Blocks or slots chosen: ``host`` is NumPy's int64 array, or ``device`` an `arrays.Array`."""

    name: str
    host: np.ndarray | None
    device: arrays.Array | None

    @property
    def count(self):
        return len(self.host) if self.device is None else self.device.shape[0]


def read(op, name, numbers, stream):
    """A sequence of integers, or an int32 or int64 array [n] anywhere, as `Numbers`."""
    if isinstance(numbers, (list, tuple, range)):
        try:
            table = as_integers(numbers)
        except (ValueError, TypeError, OverflowError) as error:
            raise DTypeError(
                f"{op}: Invalid type of {name}: expected integers, got {numbers!r:.80}"
            ) from error
        if table.ndim != 1:
            raise ShapeError(
                f"{op}: Invalid shape of {name}: expected one dimension, got {list(table.shape)}"
            )
        return Numbers(name, table, None)
    array = arrays.describe(arrays.read(numbers, f"{op}: {name}", stream), f"{op}: {name}")
    check = contract.Contract(op)
    check.shape(name, array, "_")
    check.dtype(name, array, *formats.INDICES)
    if array.device.kind == "cpu":
        view = arrays.as_numpy(array.ptr, array.shape, array.strides, array.dtype.numpy)
        return Numbers(name, view.astype(np.int64), None)
    check.aligned(name, array)
    return Numbers(name, None, array)


def check(op, numbers, limit, *, padding, distinct):
    """Refuse numbers in host memory that are out of range or, if ``distinct``, repeated. Negative
    ones are allowed if they are ``padding``."""
    host = numbers.host
    if not len(host):
        return
    if int(host.max()) >= limit or (int(host.min()) < 0 and not padding):
        bad = (host >= limit) | ((host < 0) & (not padding))
        row = int(np.argmax(bad))
        raise ArgumentError(
            f"{op}: Invalid value of {numbers.name}: expected "
            f"{'padding or ' if padding else ''}numbers in 0..{limit - 1}, got {host[row]} in row "
            f"{row}"
        )
    if distinct:
        used = np.sort(host[host >= 0]) if padding else np.sort(host)
        again = used[1:][used[1:] == used[:-1]]
        if len(again):
            raise ArgumentError(
                f"{op}: Invalid value of {numbers.name}: expected distinct destinations, got "
                f"{again[0]} twice"
            )


def as_integers(values):
    """A sequence of integers, nested or not, as an int64 array; `TypeError`, `ValueError` or
    `OverflowError` where it is something else."""
    table = np.array(values)
    if not table.size:
        return table.astype(np.int64)
    if table.dtype.kind not in "iu":
        raise TypeError(f"no integers: {table.dtype}")
    if table.dtype.kind == "u" and int(table.max()) > np.iinfo(np.int64).max:
        raise OverflowError(f"more than 63 bits: {table.max()}")
    return table.astype(np.int64, copy=False)
