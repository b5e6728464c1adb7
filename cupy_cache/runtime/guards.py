# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Comparing arrays with earlier ones: torch's in C++, CuPy's by their attributes."""

import functools
import operator
import sys
from collections.abc import Callable
from typing import NamedTuple

from . import arrays


class Kind(NamedTuple):
    """How to ask one framework's arrays for what changes from call to call.

    address, elements, strides : ``f(array)``: its address, number of elements and strides.
    unit : ``unit(array)`` -> the bytes that these strides count in.
    step : ``step(array)`` -> the stride, in these units, of elements without gaps.
    same_as : ``same_as(arrays, varies)``, as `same_as`.
    exactly : ``exactly(arrays)``, as `exactly`.
    framework : its name.
    above : an address that no array without memory gives. A lower one may be an offset: see
        `arrays.doubtful`.
    """

    address: Callable
    elements: Callable
    strides: Callable
    unit: Callable
    step: Callable
    same_as: Callable
    exactly: Callable
    framework: str
    above: int

    def laid_out(self, array):
        """(Shape, strides in bytes)."""
        unit = self.unit(array)
        return array.shape, tuple([stride * unit for stride in self.strides(array)])


def kind_of(objects):
    """The `Kind` of GPU arrays that all belong to one framework, or of no arrays; else None."""
    if not objects:  # all that a call gives is in host memory
        return _NO_ARRAYS
    if all(map(arrays.is_torch, objects)):
        return _torch()
    cupys = arrays.class_of("cupy", "ndarray")
    if all(type(array) is cupys for array in objects):
        return _CUPY
    return None


@functools.cache
def _torch():
    tensor = sys.modules["torch"].Tensor
    return Kind(
        tensor.data_ptr, tensor.numel, tensor.stride, tensor.element_size, lambda tensor: 1,
        same_as, exactly, "torch", arrays.ABOVE_OFFSETS,
    )  # fmt: skip


def _same_cupy(given, varies):
    """`same_as` of CuPy's arrays; None where other dimensions than the first ones vary."""
    expected = []
    for array, dims in zip(given, varies):
        if tuple(dims) != tuple(range(len(dims))):
            return None
        last = max(dims, default=0)
        strides = arrays.regular(array.shape, array.strides, array.itemsize)
        if strides != array.strides:
            return None
        expected.append(
            (array.dtype, array.data.device_id, array.ndim, len(dims), array.shape[len(dims) :],
             last, strides[last:])
        )  # fmt: skip
    kind, expected = type(given[0]), tuple(expected)

    def same(*given):
        for array, (dtype, device, rank, first, shape, last, strides) in zip(given, expected):
            if (
                type(array) is not kind
                or array.shape[first:] != shape
                or array.strides[last:] != strides
                or array.dtype != dtype
                or array.data.device_id != device
                or array.ndim != rank
            ):
                return False
        return True

    return same


_CUPY = Kind(
    operator.attrgetter("data.ptr"), operator.attrgetter("size"), operator.attrgetter("strides"),
    lambda array: 1, operator.attrgetter("itemsize"), _same_cupy,
    lambda given: _same_cupy(given, [()] * len(given)), "cupy", arrays.LOWEST,
)  # fmt: skip
_NO_ARRAYS = _CUPY._replace(
    same_as=lambda given, varies: lambda: True, exactly=lambda given: lambda: True
)


def same_as(tensors, varies):
    """A function ``same(*objects)``: whether these are torch tensors of the same types, dtypes,
    devices, shapes and strides as ``tensors``. It leaves out the extents of the dimensions that
    ``varies`` has for each tensor, and the strides of all dimensions before the last of these. None
    where this torch has no such comparison.

    It is the guard of torch.compile: one call into C++, 0.1 us a tensor; reading each tensor's
    attributes takes four times as long. It keeps no tensor alive. It refuses an object that is
    given twice: None for such ``tensors``.
    """
    guards = _tensor_guards()
    if guards is None or len(set(map(id, tensors))) < len(tensors):
        return None
    shapes, strides = [], []
    for tensor, dims in zip(tensors, varies):
        shape = list(tensor.shape)
        # The stride of an extent of 1 means nothing. Where the extent varies, the plan assumed the
        # stride that a larger extent would have without gaps.
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
    return _guard_or_none(guards, tensors, shapes, strides)


def exactly(tensors):
    """`same_as` where nothing varies. Strides of an extent of 1 are compared too."""
    shapes = [list(tensor.shape) for tensor in tensors]
    strides = [list(tensor.stride()) for tensor in tensors]
    return _guard_or_none(_tensor_guards(), tensors, shapes, strides)


def _guard_or_none(guards, tensors, shapes, strides):
    try:
        return _guard_of(guards, tensors, shapes, strides)
    except Exception:  # some kinds of tensors cannot be guarded
        return None


def _guard_of(guards, tensors, shapes, strides):
    return guards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check


@functools.cache
def _tensor_guards():
    """torch's class of such comparisons; None where it is missing or answers wrongly. It is not
    documented, so it is tried before it is used."""
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
