# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The kinds of arrays that tests run an operation on, behind one small interface.

A test builds its case on `Buffer`\\ s: plain byte storages in which views are described by offset,
shape, byte strides and dtype name. A world turns a buffer's views into arrays of a framework (or
of the emulator that runs the kernels on the CPU), and afterwards gives the bytes back. Because
whole storages are compared, a byte written outside a view is seen as well.
"""

import numpy as np

from cupy_cache.runtime import formats


class Spec:
    """A view of a buffer: offset in bytes, shape, strides in bytes, dtype name."""

    def __init__(self, buffer, offset, shape, strides, dtype):
        self.buffer, self.offset = buffer, offset
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), dtype

    def __repr__(self):
        return (
            f"<{self.dtype} {list(self.shape)}, byte strides {list(self.strides)}, at byte "
            f"{self.offset} of {self.buffer.bytes.size}>"
        )

    @property
    def numpy_dtype(self):
        return formats.DTYPES[self.dtype].numpy

    def on(self, storage):
        """A NumPy view of ``storage`` (a byte array like the buffer's)."""
        if 0 in self.shape:
            return np.empty(self.shape, self.numpy_dtype)
        size = self.numpy_dtype.itemsize
        raw = np.ndarray(self.shape, np.dtype(f"u{size}"), storage.data, self.offset, self.strides)
        return raw.view(self.numpy_dtype)

    def permuted(self, *axes):
        """The same memory with its dimensions in another order."""
        return Spec(
            self.buffer,
            self.offset,
            [self.shape[a] for a in axes],
            [self.strides[a] for a in axes],
            self.dtype,
        )

    def __getitem__(self, index):
        """A basic-indexing view, as NumPy would make it."""
        base = self.on(self.buffer.bytes)
        view = base[index]
        offset = self.offset  # of no meaning where there is no element
        if view.size:
            offset = view.__array_interface__["data"][0] - self.buffer.bytes.ctypes.data
        return Spec(self.buffer, offset, view.shape, view.strides, self.dtype)


def aligned_bytes(nbytes):
    """An uninitialised byte array, 16-byte aligned."""
    padded = np.empty(nbytes + 16, np.uint8)
    start = -padded.ctypes.data % 16
    return padded[start : start + nbytes]


class Buffer:
    """Bytes with a fixed seed's random content, 16-byte aligned."""

    def __init__(self, nbytes, rng, fill=None):
        self.bytes = aligned_bytes(nbytes)
        self.bytes[:] = rng.integers(0, 256, nbytes, np.uint8) if fill is None else fill

    def view(self, shape, dtype, offset=0, strides=None):
        """A `Spec`; contiguous unless byte ``strides`` are given."""
        if strides is None:
            size = formats.DTYPES[dtype].bytes
            strides = [
                size * int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))
            ]
        return Spec(self, offset, shape, strides, dtype)


def array(rng, shape, dtype, pad=0):
    """A contiguous view in a fresh buffer of random bytes, ``pad`` bytes from its start (which
    decides the alignment). Float contents are random bit patterns, NaN and infinity included:
    moving bytes must not care."""
    nbytes = int(np.prod(shape, dtype=np.int64)) * formats.DTYPES[dtype].bytes
    return Buffer(nbytes + pad, rng).view(shape, dtype, offset=pad)


def of_values(values, dtype=None):
    """A contiguous view in a fresh buffer that holds ``values`` (a NumPy array)."""
    values = np.ascontiguousarray(values)
    buffer = Buffer(values.nbytes, None, fill=0)
    buffer.bytes[:] = values.reshape(-1).view(np.uint8)
    return buffer.view(values.shape, dtype or values.dtype.name)


def broadcast(rng, shape, axes):
    """A NumPy view of float16 values that are all one along ``axes``."""
    kept = [1 if axis in axes else extent for axis, extent in enumerate(shape)]
    return np.broadcast_to(rng.standard_normal(kept).astype(np.float16), shape)


class World:
    """Makes arrays of one kind. ``on_gpu`` says which code path they take."""

    name = "?"
    on_gpu = False

    def __init__(self):
        self._made = {}

    def put(self, spec):
        """The framework's array for ``spec``; views of one buffer share memory."""
        if spec is None:
            return None
        key = id(spec.buffer)
        if key not in self._made:
            self._made[key] = (spec.buffer, self.upload(spec.buffer.bytes))
        return self.array(self._made[key][1], spec)

    def close(self):
        """Undo what making this world changed elsewhere."""

    def bytes_of(self, spec):
        """The present content of ``spec``'s whole buffer, as a fresh NumPy byte array."""
        self.synchronize()
        storage = self._made[id(spec.buffer)][1]
        return storage.copy() if isinstance(storage, np.ndarray) else self.download(storage)

    def put_on_host(self, spec, pinned=True):
        """A NumPy array in host memory for ``spec``, pinned where this world has a GPU."""
        key = id(spec.buffer)
        if key not in self._made:
            storage = self.host_storage(spec.buffer.bytes.size, pinned)
            storage[:] = spec.buffer.bytes
            self._made[key] = (spec.buffer, storage)
        return spec.on(self._made[key][1])

    def host_storage(self, nbytes, pinned):
        """An uninitialised byte array in host memory."""
        del pinned
        return aligned_bytes(nbytes)

    def synchronize(self):
        """Wait for everything enqueued."""

    def numpy(self, result):
        """An array that an operation returned, as NumPy."""
        return np.asarray(result)


class NumPyWorld(World):
    name = "numpy"

    def upload(self, raw):
        storage = aligned_bytes(raw.size)
        storage[:] = raw
        return storage

    def array(self, storage, spec):
        return spec.on(storage)


class TorchWorld(World):
    name = "torch-cpu"
    device = "cpu"

    def upload(self, raw):
        import torch

        storage = torch.empty(raw.size, dtype=torch.uint8, device=self.device)
        storage.copy_(torch.from_numpy(raw))
        return storage

    def array(self, storage, spec):
        import torch

        dtype = getattr(torch, spec.dtype)
        size = formats.DTYPES[spec.dtype].bytes
        # torch strides and offsets are in elements, so the view starts where the spec does.
        flat = storage[spec.offset :]
        flat = flat[: flat.numel() // size * size].view(dtype)
        return flat.as_strided(spec.shape, [s // size for s in spec.strides])

    def download(self, storage):
        return storage.cpu().numpy().copy()

    def numpy(self, result):
        return result.cpu().numpy()


class _PinnedHost:
    """Pinned host memory for the worlds on a real GPU."""

    def host_storage(self, nbytes, pinned):
        import cupyx

        return cupyx.empty_pinned(nbytes, np.uint8) if pinned else aligned_bytes(nbytes)

    def synchronize(self):
        import cupy

        cupy.cuda.Device().synchronize()


class TorchCudaWorld(_PinnedHost, TorchWorld):
    name = "torch-cuda"
    device = "cuda"
    on_gpu = True


class Opaque:
    """An object that offers nothing but DLPack."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class DLPackWorld(TorchWorld):
    name = "dlpack"

    def array(self, storage, spec):
        return Opaque(super().array(storage, spec))

    def numpy(self, result):
        return np.asarray(result)  # of a framework that is not known, operations return NumPy's


class DLPackCudaWorld(TorchCudaWorld):
    name = "dlpack-cuda"

    def array(self, storage, spec):
        return Opaque(super().array(storage, spec))

    def numpy(self, result):
        return result.get()  # CuPy's


class CuPyWorld(_PinnedHost, World):
    name = "cupy"
    on_gpu = True

    def upload(self, raw):
        import cupy

        return cupy.asarray(raw)

    def array(self, storage, spec):
        import cupy

        memory = storage.data + spec.offset
        return cupy.ndarray(spec.shape, spec.numpy_dtype, memory, spec.strides)

    def download(self, storage):
        return storage.get()

    def numpy(self, result):
        return result.get()
