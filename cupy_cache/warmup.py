# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Compiling and loading kernels before they are needed.

Which kernel a call needs is decided by its operation's plan alone. So warming up describes the
calls that a model's shape leads to, with arrays that do not exist, and asks the operations for
their plans. To add an operation, write a generator beside the others here and name it in
`_KERNELS`.
"""

import concurrent.futures
import math
import os
import sys
import time
from typing import NamedTuple

from . import arrays, attention, contract, formats, launch, modules, packing
from .errors import ArgumentError, DeviceError
from .ops import (
    concat_and_cache_mla,
    concat_and_cache_mla_grouped,
    copy_blocks,
    gather_cache,
    reshape_and_cache,
    reshape_and_cache_flash,
    slot_mapping,
    swap_blocks,
    swap_blocks_batch,
)

MAX_WORKERS = 16
_BLOCKS, _ROWS = 1024, 4096  # extents that no plan depends on
_ADDRESS = 1 << 20  # aligned as an allocator's addresses are


def warmup(
    num_kv_heads, head_size, block_size, dtype="bfloat16", *, layouts=("NHD",), head_size_v=None,
    kv_cache_dtype="auto", device=None, index_dtypes=("int64",), ops=None, progress=True,
):  # fmt: skip
    """Compile and load every kernel that a model's shape needs, in parallel.

    Later calls then neither compile nor read the disk cache, a CUDA graph can be captured from the
    first call on, and the library can run with ``CUPYCACHE_NO_COMPILE=1``. Kernels depend on none
    of the numbers of tokens, blocks, layers and sequences. They do depend on alignment: arrays are
    taken to start, and to have strides, at multiples of 16 bytes where the shape allows it.

    Parameters
    ----------
    num_kv_heads, head_size, block_size : int
        Of the caches on this GPU.
    dtype : str, NumPy or torch dtype
        Element type of keys and values.
    layouts : sequence of str
        Cache layouts among "NHD", "HND", "packed" (views of pages that hold K|V), "x-packed"
        and "rows" (multi-head latent attention: entries of ``head_size`` elements, of which the
        first ``head_size_v`` are latent, with one head).
    head_size_v : int, optional
        Head size of the values, where it differs.
    kv_cache_dtype : str
        As for the operations that write.
    device : int, str, torch.device or cupy.cuda.Device, optional
        The GPU; by default the current one.
    index_dtypes : sequence of str
        Element types, "int32" or "int64", of slot mappings, block tables and other indices.
    ops : sequence of str, optional
        Only these operations; by default all that the layouts apply to.
    progress : bool
        Show progress on standard error: a bar where that is a terminal, one line at the end where
        it is not.

    Returns
    -------
    int
        How many kernels are ready.

    Raises
    ------
    ArgumentError
        Or one of its kinds, such as `DeviceError` where there is no GPU.
    MissingDependencyError, UnsupportedArchitectureError, KernelError
        A kernel could not be compiled or loaded; the first error that was met.

    Notes
    -----
    NVRTC compiles in parallel in the threads of one process (CUDA 13.5: 20 kernels in 1.31 s by one
    thread, in 0.75 s by two on two cores), so there is a thread for each core, 16 at most.
    """
    check = contract.Contract("warmup")
    for name, value in (
        ("num_kv_heads", num_kv_heads), ("head_size", head_size), ("block_size", block_size),
        ("head_size_v", head_size if head_size_v is None else head_size_v),
    ):  # fmt: skip
        check.positive(name, value)
    place = launch.device_named(device, "warmup: device")
    if place.kind == "cpu":
        raise DeviceError(
            "warmup: Invalid value of device: expected a GPU, got the CPU, where nothing is "
            "compiled"
        )
    kernels = list(
        specialisations(
            num_kv_heads, head_size, block_size, dtype, layouts=layouts, head_size_v=head_size_v,
            kv_cache_dtype=kv_cache_dtype, device=place.index, index_dtypes=index_dtypes, ops=ops,
        )
    )  # fmt: skip
    with _Progress(len(kernels), progress) as shown:
        workers = max(1, min(len(kernels), os.cpu_count() or 1, MAX_WORKERS))
        pool = concurrent.futures.ThreadPoolExecutor(workers, "cupy_cache warmup")
        try:
            futures = [pool.submit(_load, kernel, place.index) for kernel in kernels]
            for future in concurrent.futures.as_completed(futures):
                future.result()
                shown.step()
        finally:
            pool.shutdown(cancel_futures=True)
    return len(kernels)


def _load(kernel, device):
    with modules.warming():
        return modules.load(kernel, device)


def specialisations(
    num_kv_heads, head_size, block_size, dtype="bfloat16", *, layouts=("NHD",), head_size_v=None,
    kv_cache_dtype="auto", device=0, index_dtypes=("int64",), ops=None,
):  # fmt: skip
    """The kernels that `warmup` loads for the same arguments, each once, as `modules.Kernel`\\ s.

    Needs no GPU. ``device`` is the index that the arrays are described to be on.
    """
    for name, given, allowed in (
        ("layouts", layouts, formats.LAYOUTS),
        ("index_dtypes", index_dtypes, formats.INDEX_NAMES),
        ("ops", _KERNELS if ops is None else ops, _KERNELS),
    ):
        whole = isinstance(given, str)  # its items would be letters
        unknown = [given] if whole else [item for item in given if item not in allowed]
        if unknown:
            raise ArgumentError(
                f"warmup: Invalid value of {name}: expected a sequence of some of "
                f"{', '.join(allowed)}, got {unknown[0]!r}"
            )
    dtype = formats.dtype_named(dtype)
    if kv_cache_dtype == concat_and_cache_mla.FP8_DS_MLA:
        stored = formats.DTYPES["uint8"]
    else:
        stored = formats.cache_format("warmup", kv_cache_dtype).stored or dtype
    model = _Model(
        num_kv_heads, head_size, head_size if head_size_v is None else head_size_v, block_size,
        dtype, kv_cache_dtype, stored, tuple(layouts), arrays.Device("cuda", device),
        tuple(formats.DTYPES[name] for name in index_dtypes),
    )  # fmt: skip
    seen = set()
    for name in _KERNELS if ops is None else ops:
        for kernel in _KERNELS[name](model):
            if kernel.key not in seen:
                seen.add(kernel.key)
                yield kernel


# --- arrays that do not exist ---------------------------------------------------------------------


class _Model(NamedTuple):
    """What the calls of a model are like."""

    heads: int
    key_size: int
    value_size: int
    block_size: int
    dtype: formats.DType
    kv_cache_dtype: str
    stored: formats.DType
    layouts: tuple
    device: arrays.Device
    indices: tuple

    def array(self, *shape, dtype=None):
        """The description of a contiguous array, by default of the caches' element type."""
        dtype = dtype or self.stored
        strides = [dtype.bytes * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return arrays.Array(_ADDRESS, shape, tuple(strides), dtype, self.device, True, "cupy")

    def tokens(self):
        """A step's keys and values."""
        sizes = self.key_size, self.value_size
        return tuple(self.array(_ROWS, self.heads, size, dtype=self.dtype) for size in sizes)

    def caches(self):
        """Key and value cache [NB, BS, H, D] in each of the layouts with these dimensions."""
        sizes = self.key_size, self.value_size
        if "NHD" in self.layouts:
            yield tuple(self.array(_BLOCKS, self.block_size, self.heads, size) for size in sizes)
        if "HND" in self.layouts:
            by_head = (self.array(_BLOCKS, self.heads, self.block_size, size) for size in sizes)
            yield tuple(_slots_first(cache) for cache in by_head)
        if "packed" in self.layouts:
            page = self.array(_BLOCKS, self.block_size, self.heads, sum(sizes))
            yield _split(page, self.key_size)
            page = self.array(_BLOCKS, self.heads, self.block_size, sum(sizes))
            yield _split(_slots_first(page), self.key_size)

    def x_packed(self):
        """Key cache [NB, H, D/x, BS, x] and value cache [NB, H, D, BS] of the x-packed layout."""
        x = 16 // self.stored.bytes
        if "x-packed" in self.layouts and self.key_size % x == 0:
            yield (
                self.array(_BLOCKS, self.heads, self.key_size // x, self.block_size, x),
                self.array(_BLOCKS, self.heads, self.value_size, self.block_size),
            )

    def rows(self):
        """A cache [NB, BS, E] that keeps one entry for each token."""
        if "rows" in self.layouts:
            size = self.key_size
            if self.kv_cache_dtype == concat_and_cache_mla.FP8_DS_MLA:
                size = concat_and_cache_mla.DS_ENTRY_BYTES
            yield self.array(_BLOCKS, self.block_size, size)

    def entries(self):
        """A step's latent and rope parts of entries."""
        sizes = self.value_size, max(self.key_size - self.value_size, 0)
        return tuple(self.array(_ROWS, size, dtype=self.dtype) for size in sizes)

    def whole(self):
        """A cache whose blocks have no gaps, whatever is in them."""
        width = self.heads * (self.key_size + self.value_size)
        return self.array(_BLOCKS, self.block_size, width)


def _slots_first(cache):
    """[NB, H, BS, D] as a view [NB, BS, H, D]."""
    shape, strides = ((x[0], x[2], x[1], x[3]) for x in (cache.shape, cache.strides))
    return cache._replace(shape=shape, strides=strides)


def _layers_first(array):
    """The same for one layer of many."""
    return array._replace(shape=(1, *array.shape), strides=(0, *array.strides))


def _split(page, size):
    """Views of the first ``size`` and of the other elements of the last dimension."""
    return (
        page._replace(shape=(*page.shape[:-1], size)),
        page._replace(
            ptr=page.ptr + size * page.dtype.bytes,
            shape=(*page.shape[:-1], page.shape[-1] - size),
        ),
    )


def _dense(array):
    """An array of the same shape and order of dimensions without gaps."""
    strides, step = {}, array.dtype.bytes
    for axis in sorted(range(len(array.shape)), key=lambda axis: array.strides[axis]):
        strides[axis] = step
        step *= array.shape[axis]
    return array._replace(ptr=_ADDRESS, strides=tuple(strides[a] for a in range(len(array.shape))))


# --- the operations' calls ------------------------------------------------------------------------


def _flash(model):
    for caches in model.caches():
        for index in model.indices:
            slots = model.array(_ROWS, dtype=index)
            arguments = (*model.tokens(), *caches, slots)
            yield _of_plan(reshape_and_cache_flash, arguments, (model.kv_cache_dtype,))


def _x_packed(model):
    for caches in model.x_packed():
        for index in model.indices:
            slots = model.array(_ROWS, dtype=index)
            arguments = (*model.tokens(), *caches, slots)
            yield _of_plan(reshape_and_cache, arguments, (model.kv_cache_dtype,))


def _mla(model):
    for cache in model.rows():
        for index in model.indices:
            slots = model.array(_ROWS, dtype=index)
            for rule in concat_and_cache_mla.SCALE_RULES:
                options = model.kv_cache_dtype, 1.0, rule
                arguments = (*model.entries(), cache, slots, None)
                yield _of_plan(concat_and_cache_mla, arguments, options)


def _mla_grouped(model):
    if model.kv_cache_dtype == concat_and_cache_mla.FP8_DS_MLA:
        return
    for cache in model.rows():
        scales = None
        if formats.is_scaled(model.kv_cache_dtype):
            scales = model.array(1, dtype=formats.DTYPES["float32"])
        for index in model.indices:
            described = {
                "kv_c": _layers_first(model.entries()[0]),
                "k_pe": _layers_first(model.entries()[1]),
                "kv_cache_ptrs": cache,
                "slot_mapping": model.array(1, _ROWS, dtype=index),
                "kv_scales": scales,
            }
            addresses = model.array(1, dtype=formats.DTYPES["int64"])
            geometry = model.block_size, *(s // cache.dtype.bytes for s in cache.strides[:2]), _BLOCKS
            for caches, listed in ((cache, 1), (addresses, None)):
                described["kv_cache_ptrs"] = caches
                plan = concat_and_cache_mla_grouped._plan(
                    described, model.kv_cache_dtype, listed, geometry
                )
                yield plan.launcher.kernel


def _gather(model):
    caches = [cache for pair in model.caches() for cache in pair]
    for cache in (*caches, *model.rows()):
        rows = model.array(_ROWS, *cache.shape[2:])
        for index in model.indices:
            table = model.array(_ROWS, _ROWS, dtype=index)
            bounds = model.array(_ROWS + 1, dtype=index)
            yield _of_plan(gather_cache, (cache, rows, table, bounds, None))


def _slots(model):
    out = model.array(_ROWS, dtype=formats.DTYPES["int64"])
    for table_dtype in model.indices:
        table = model.array(_ROWS, _ROWS, dtype=table_dtype)
        bounds = model.array(_ROWS + 1, dtype=table_dtype)
        for index in model.indices:
            positions = model.array(_ROWS, dtype=index)
            for ranks in (1, 2):
                options = model.block_size, ranks, 0, 1
                yield _of_plan(slot_mapping, (table, positions, bounds, out), options)


def _copies(model):
    for caches in (*model.caches(), *model.x_packed()):
        for mapping in (None, *model.indices):
            yield _copy_kernel("copy_blocks", ("key_caches", "value_caches"), caches, mapping)


def _mla_copies(model):
    for cache in (model.whole(), *model.rows()):
        for mapping in (None, *model.indices):
            yield _copy_kernel("copy_blocks_mla", ("kv_caches",), (cache,), mapping)


def _swaps(model):
    pairs = [cache for pair in (*model.caches(), *model.x_packed()) for cache in pair]
    for cache in (model.whole(), *pairs, *model.rows()):
        # To host memory and back, and within the GPU, it is the same kernel. The other side has no
        # gaps, and its dimensions in the cache's order or as they are written.
        for other in (_dense(cache), model.array(*cache.shape)):
            facts = _facts(cache, model.device.index), _facts(other, "numpy, writable")
            yield swap_blocks._plan(*facts, None).copy.kernel


def _moves(op, move, by_slot=False):
    """The generator for an operation of `packing`."""

    def kernels(model):
        layers = [*model.caches(), *((cache,) for cache in model.rows())]
        if not by_slot:
            layers += [(model.whole(),), *model.x_packed()]
        for tensors in layers:
            facts = tuple(_facts(tensor, model.device.index) for tensor in tensors)
            for index in (None, *model.indices):
                plan = packing.Plan(
                    op, move, facts, 1, by_slot, packing.LAYOUTS[0], index, 16, False
                )
                yield plan.kernel

    return kernels


def _of_plan(module, described, options=()):
    return module.OP.plan(described, options).launcher.kernel


def _copy_kernel(op, names, caches, mapping):
    facts = tuple(_facts(cache, cache.device.index) for cache in caches)
    _, _, plan = copy_blocks._plan(op, names, facts, mapping)
    return plan.kernel


def _facts(array, place):
    return arrays.Facts(array.alignment, array.shape, array.strides, array.dtype.numpy, place)


_KERNELS = {
    "alibi_slopes": lambda model: (attention.ALIBI,),
    "concat_and_cache_mla": _mla,
    "concat_and_cache_mla_grouped": _mla_grouped,
    "copy_blocks": _copies,
    "copy_blocks_mla": _mla_copies,
    "gather_cache": _gather,
    "pack_blocks": _moves("pack_blocks", packing.PACK),
    "pack_tokens": _moves("pack_tokens", packing.PACK, by_slot=True),
    "place_slopes": lambda model: (attention.PLACE,),
    "reshape_and_cache": _x_packed,
    "reshape_and_cache_flash": _flash,
    "slot_mapping": _slots,
    "swap_blocks": _swaps,
    "swap_blocks_batch": lambda model: (swap_blocks_batch.KERNEL,),
    "unpack_blocks": _moves("unpack_blocks", packing.UNPACK),
    "unpack_tokens": _moves("unpack_tokens", packing.UNPACK, by_slot=True),
    "zero_blocks": _moves("zero_blocks", packing.ZERO),
}


# --- progress -------------------------------------------------------------------------------------


class _Progress:
    """One line on standard error; ``shown`` says whether."""

    WIDTH = 30

    def __init__(self, count, shown):
        self._count, self._done = count, 0
        self._stream = sys.stderr if shown else None
        self._redraw = bool(shown) and sys.stderr.isatty()

    def __enter__(self):
        self._start = time.monotonic()
        if self._redraw:
            self._write("\r")
        return self

    def step(self):
        self._done += 1
        if self._redraw:
            self._write("\r")

    def _write(self, start, end=""):
        filled = self.WIDTH * self._done // max(self._count, 1)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        seconds = time.monotonic() - self._start
        self._stream.write(
            f"{start}cupy_cache: kernels [{bar}] {self._done}/{self._count} {seconds:.1f} s{end}"
        )
        self._stream.flush()

    def __exit__(self, *exc):
        if self._stream is not None:
            self._write("\r" if self._redraw else "", "\n")
