# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What the annotations of this library mean, for annotations of your own.

They say what an argument may be; its shape, dtype and device are in the docstrings. A result that
is an array has the type ``Any``: it is one of the caller's framework, and needs no cast.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, SupportsIndex, TypeAlias, TypedDict

import numpy as np

# --- arrays ---------------------------------------------------------------------------------------

# Libraries declare the parameters of these methods differently, and older ones have fewer. Such
# loose signatures accept them all.


class SupportsDLPack(Protocol):
    """An object that shares its memory through DLPack."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


class SupportsCudaArrayInterface(Protocol):
    """An object that shares its memory through the CUDA array interface."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


#: An array of any framework: of torch, CuPy, NumPy, JAX or Numba, or an object of your own with the
#: two methods of DLPack or with ``__cuda_array_interface__``.
ArrayLike: TypeAlias = SupportsDLPack | SupportsCudaArrayInterface

#: An array for each layer, in a list or a tuple.
Layers: TypeAlias = Sequence[ArrayLike]

#: An array for each layer, or a pair (key cache, value cache) for each layer, in a list or a tuple.
LayersOrPairs: TypeAlias = Layers | Sequence[Sequence[ArrayLike]]

# --- numbers --------------------------------------------------------------------------------------

#: Block numbers or slots: in a list, a tuple or a range, or in an array [n].
Indices: TypeAlias = Sequence[SupportsIndex] | ArrayLike

#: Pairs (source, destination) of block numbers: in a list or a tuple, or in an array [n, 2].
Pairs: TypeAlias = Sequence[tuple[SupportsIndex, SupportsIndex]] | ArrayLike

#: A number, or an array that is read on its device. None means 1.0.
Scale: TypeAlias = float | np.floating[Any] | ArrayLike | None

# --- streams, devices, dtypes ---------------------------------------------------------------------


class SupportsCudaStream(Protocol):
    """A stream that tells its address as those of cuda.core do, by a method or by a pair."""

    @property
    def __cuda_stream__(self) -> Any: ...


class CuPyStream(Protocol):
    """A stream that tells its address as CuPy's do."""

    @property
    def ptr(self) -> int: ...


class TorchStream(Protocol):
    """A stream that tells its address as torch's do."""

    @property
    def cuda_stream(self) -> int: ...


#: The address of a CUDA stream, or a stream object of cuda.core, CuPy, torch or others like these.
StreamLike: TypeAlias = int | SupportsCudaStream | CuPyStream | TorchStream


class CuPyDevice(Protocol):
    """A GPU, as ``cupy.cuda.Device`` tells its index."""

    @property
    def id(self) -> int: ...


class TorchDevice(Protocol):
    """A device, as ``torch.device`` tells what it is."""

    @property
    def type(self) -> str: ...

    @property
    def index(self) -> Any: ...


#: The index of a GPU, "cpu", "cuda", "cuda:1", or a device object of torch or CuPy.
DeviceLike: TypeAlias = int | str | CuPyDevice | TorchDevice


class SupportsItemsize(Protocol):
    """A dtype of NumPy or torch."""

    @property
    def itemsize(self) -> int: ...


#: The name of a dtype such as "bfloat16", or a dtype of NumPy or torch.
DTypeLike: TypeAlias = str | type[Any] | SupportsItemsize

# --- names ----------------------------------------------------------------------------------------

#: Whose array a function returns.
FrameworkName: TypeAlias = Literal["torch", "cupy", "numpy"]

#: The order of the bytes that `pack_blocks` writes.
PackedLayout: TypeAlias = Literal["layer_first", "page_first"]

#: How the caches of `PagedKVCache.allocate` lie in memory.
CacheLayout: TypeAlias = Literal["NHD", "HND", "packed", "x-packed", "rows"]

# --- functions ------------------------------------------------------------------------------------


class Writer(Protocol):
    """What `PagedKVCache.writer` returns: `PagedKVCache.write` for one layer."""

    def __call__(
        self,
        key: ArrayLike,
        value: ArrayLike,
        slot_mapping: ArrayLike,
        /,
        *,
        stream: StreamLike | None = None,
    ) -> None: ...


# --- what a model does ----------------------------------------------------------------------------


class Rotation(TypedDict, total=False):
    """How a model rotates queries and keys, for `cupy_cache.warmup`. What has the name of an
    argument of `cupy_cache.rotary_and_cache` means that; all may be left out.

    rotary_dim : elements of a head that are rotated; by default all.
    cos_sin_dtype : of the table; by default that of the keys, and float32.
    is_neox : by default both.
    norm_dtype : of both weights where ``norm_eps`` is given; by default that of the keys.
    out : whether rotated queries go to another array; by default they stay where they are.
    """

    rotary_dim: SupportsIndex
    rope_dim_offset: SupportsIndex
    cos_sin_dtype: DTypeLike
    is_neox: bool
    mrope_section: Sequence[SupportsIndex]
    mrope_interleaved: bool
    norm_eps: float
    norm_dtype: DTypeLike
    rounding: Literal["once", "steps"]
    out: bool
    out_dtype: str
