# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What is part of a call's signature, by which its plan is found, and what is not.

Of each array the signature has the dtype, the place, the alignment of its address, and the shape
and strides except what a `dispatch.Arg` says varies. What varies goes to the operation's count.
"""

from .. import errors
from . import arrays, indices, lists


def of(op, found, options):
    """(Signature, values of `plans.Call`, extents for the operation's count) of a call of ``op``, a
    `dispatch.Op`, for which `dispatch.Op.read` ``found`` this. The signature is None where a list
    is empty."""
    signature, values, extents = [options], [], []
    lengths, empty = {}, False
    for arg, meta in zip(op.args, found):
        varies = arg.varies
        if meta is None:
            signature.append(None)
            values.append(0)
            if varies:
                extents.append(None)
            continue
        if type(meta) is indices.Chosen:
            signature.append("host")
            values.append(meta)
            extents.append(meta.count)
            continue
        if type(meta) is lists.Layers:
            values.append(meta.addresses)
            lengths[arg.name + arg.suffix] = len(meta.addresses)
            if meta.metadata is None:
                empty = True
                signature.append(None)
                if varies:
                    extents.append([])
                continue
            if varies:
                pairs = zip(meta.shapes, meta.strides)
                extents.append([arrays.extent(varies, *pair, 1) for pair in pairs])
            meta = meta.metadata
        else:
            values.append(meta.ptr)
            if varies:
                _refuse_rank(op.name, arg, meta.shape, max(varies))
                extents.append(
                    arrays.extent(varies, meta.shape, meta.strides, arrays.stride_unit(meta))
                )
        ptr, shape, strides, dtype, place, _ = meta
        low = ptr  # its low bits tell the alignment, also that of strides that vary
        if 1 in shape:
            strides = arrays.regular(shape, strides, arrays.element_step(meta))
        if varies:
            last, unit = max(varies), arrays.stride_unit(meta)
            if not arg.index or unit == 1:
                low |= arrays.any_bits(strides[:last]) * unit
            strides = strides[last:]
            shape = (len(shape), *(n for at, n in enumerate(shape) if at not in varies))
        signature.append((shape, strides, dtype, place, low & arg.mask))
    if len(set(lengths.values())) > 1:
        _refuse_lengths(op.name, lengths)
    return None if empty else tuple(signature), values, extents


def _refuse_rank(op, arg, shape, last):
    if len(shape) > last:
        return
    expected = f"at least {errors.counted(last + 1, 'dimension')}"
    got = f"{list(shape)} ({errors.counted(len(shape), 'dimension')})"
    raise errors.wrong("shape", f"{op}: {arg.name}", expected, got)


def _refuse_lengths(op, lengths):
    (first, expected), *others = lengths.items()
    name, got = next(item for item in others if item[1] != expected)
    expected = f"as many layers as {first}, {expected}"
    raise errors.wrong("length", f"{op}: {name}", expected, got)
