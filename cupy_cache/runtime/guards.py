# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Comparing torch tensors with earlier ones, in C++."""

import functools
import sys

from . import arrays


def readers():
    """What tells the address of a torch tensor, and its number of elements."""
    kind = sys.modules["torch"].Tensor
    return kind.data_ptr, kind.numel


def same_as(tensors, varies):
    """A function that tells whether as many objects are torch tensors of the same types, dtypes,
    devices, shapes and strides as ``tensors``, but for the dimensions that each of ``varies``
    names, and the strides of those before the last of them; None where this torch has no such
    comparison.

    It is what guards the results of torch.compile: one call into C++, 0.1 us a tensor, where asking
    each tensor for its attributes takes four times as long. It keeps no tensor alive. It always
    refuses one object given twice, so then there is None.
    """
    guards = _tensor_guards()
    if guards is None or len(set(map(id, tensors))) < len(tensors):
        return None
    shapes, strides = [], []
    for tensor, dims in zip(tensors, varies):
        shape = list(tensor.shape)
        # Of an extent of 1 that varies, the stride that more would need: the plan is made for that
        # one. If it does not vary, its stride means nothing.
        steps = list(arrays.regular(shape, tensor.stride(), 1))
        for dim, extent in enumerate(shape):
            if extent == 1 and dim not in dims:
                steps[dim] = None
        for dim in dims:
            shape[dim] = None
        for dim in range(max(dims, default=0)):
            steps[dim] = None
        shapes.append(shape)
        strides.append(steps)
    try:
        return _guard_of(guards, tensors, shapes, strides)
    except Exception:  # of a kind of tensor that cannot be guarded
        return None


def _guard_of(guards, tensors, shapes, strides):
    return guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check


@functools.cache
def _tensor_guards():
    """torch's class of such comparisons. It is not documented, so it is tried before it is trusted:
    None where it is missing, or answers otherwise than it should."""
    torch = sys.modules["torch"]
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        empty = functools.partial(torch.empty, device="cpu", dtype=torch.float32)
        same = _guard_of(guards, (empty((3, 4)),), [[None, 4]], [[4, 1]])
        others = (
            empty((3, 4), dtype=torch.float16), empty((3, 4), device="meta"), empty((3, 2)),
            empty((3, 4, 1)), empty((3, 5))[:, :4], empty((4, 4)).t()[:3], None,
        )  # fmt: skip
        works = same(empty((3, 4))) and same(empty((2, 4))) and not any(map(same, others))
        wide = _guard_of(guards, (empty((3, 4)),), [[None, None]], [[None, 1]])
        works = works and wide(empty((2, 9))) and not wide(empty((4, 4)).t())
    except Exception:
        return None
    return guards if works else None
