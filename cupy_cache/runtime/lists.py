# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Arguments that are lists of arrays, one for each layer."""

import contextlib
from typing import NamedTuple

from .. import errors
from . import arrays


class Layers(NamedTuple):
    """A list of arrays that differ only in the dimensions that vary.

    metadata : of the first array that has elements; its address is the alignment common to all, at
        most 16. None for an empty list.
    addresses : one for each array.
    shapes, strides : one for each array, where dimensions vary, strides in bytes; else None.
    """

    metadata: arrays.Metadata | None
    addresses: tuple
    shapes: tuple | None = None
    strides: tuple | None = None


LISTS = list, tuple


def plain(op, name, value):
    """A list of arrays as a list or tuple of Python's own, whose length is that of what it has.
    Refuses anything else."""
    found = plain_or_none(value)
    if found is None:
        expected = "a list of arrays, one for each layer"
        raise errors.wrong("type", f"{op}: {name}", expected, type(value).__name__)
    return found


def plain_or_none(value):
    """A list or tuple without what its class adds to it; None for anything else, and where its
    class does not let it be read."""
    if type(value) in LISTS:
        return value
    if issubclass(type(value), LISTS):
        with contextlib.suppress(Exception):
            return [*value]
    return None


def read(op, arg, values, stream):
    """(`Layers`, owners of exported memory) of a list of arrays."""
    if not values:
        return Layers(None, (), (), ()), ()
    metadata = [
        arrays.read(value, f"{op}: {arg.item(index)}", stream) for index, value in enumerate(values)
    ]
    first = metadata[0]
    wanted = _alike(arg, first)
    if any(_alike(arg, meta) != wanted for meta in metadata):
        for index, meta in enumerate(metadata):
            _compare(op, arg, index, meta, first)
    addresses = tuple(meta.ptr for meta in metadata)
    common = 16 | arrays.any_bits(addresses)
    if arg.varies:  # each array has strides of its own, whose alignment counts too
        bits = (
            arrays.any_bits(_varying(arg, meta)) * arrays.stride_unit(meta) for meta in metadata
        )
        common |= arrays.any_bits(bits)
    described = next((meta for meta in metadata if 0 not in meta.shape), first)
    common = described._replace(ptr=common & -common, keep=None)
    keep = [meta.keep for meta in metadata]
    if not arg.varies:
        return Layers(common, addresses), keep
    strides = []
    for meta in metadata:
        unit = arrays.stride_unit(meta)
        strides.append(tuple([stride * unit for stride in meta.strides]))
    return Layers(common, addresses, tuple(meta.shape for meta in metadata), strides), keep


def _alike(arg, meta):
    """What must be equal for all arrays of a list."""
    _, shape, strides, dtype, place, _ = meta
    return *_fixed(arg, shape, strides, arrays.element_step(meta)), dtype, place


def _varying(arg, meta):
    """The strides that vary, but for those that mean nothing."""
    if len(meta.shape) <= max(arg.varies):
        return ()
    step = arrays.element_step(meta)
    return arrays.regular(meta.shape, meta.strides, step)[: max(arg.varies)]


def _fixed(arg, shape, strides, size):
    """(Shape, strides), None where they vary. ``size``: the stride of elements without gaps."""
    strides = arrays.regular(shape, strides, size)
    if not arg.varies:
        return tuple(shape), strides
    last = max(arg.varies)
    shape = tuple(None if at in arg.varies else n for at, n in enumerate(shape))
    return shape, (*(None for _ in strides[:last]), *strides[last:])


def _compare(op, arg, index, meta, first):
    """Refuse an array that is not like the first one. That includes its framework: another one's
    arrays are ordered by another stream."""
    name, first_name = arg.item(index), arg.item(0)
    got, wanted = (arrays.describe(f, f"{op}: {n}") for f, n in ((meta, name), (first, first_name)))
    unlike = [
        (what, one, other)
        for what, one, other in zip(_COMPARED, _shown(arg, got), _shown(arg, wanted))
        if one != other
    ]
    if not unlike and got.framework != wanted.framework:
        unlike = [("framework", got.framework, wanted.framework)]
    if arg.written:
        arrays.require_writable(got, op, name)
    if unlike:
        what, one, other = unlike[0]
        raise errors.wrong(what, f"{op}: {name}", f"{other} like {first_name}", one)


_COMPARED = "shape", "dtype", "device", "strides"


def _shown(arg, array):
    """What must be equal for all arrays of a list, as errors show it."""
    if len(array.shape) <= max(arg.varies, default=-1):
        rank = errors.counted(len(array.shape), "dimension")
        return f"{list(array.shape)} ({rank})", None, None, None
    fixed = _fixed(arg, array.shape, array.strides, array.dtype.bytes)
    shape, strides = (", ".join("_" if n is None else str(n) for n in part) for part in fixed)
    return f"[{shape}]", array.dtype.name, array.device, f"[{strides}]"
