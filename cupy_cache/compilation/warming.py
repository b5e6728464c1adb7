# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Compiling and loading kernels before they are needed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import sys
import time
from collections.abc import Sequence

from .. import errors
from ..errors import CupyCacheError, DeviceError
from ..runtime import contract, driver, modules
from ..runtime.log import logger
from ..types import DeviceLike, DTypeLike, Rotation
from .specialisations import specialisations

MAX_WORKERS = 16


def warmup(
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: DTypeLike = "bfloat16",
    *,
    layouts: Sequence[str] = ("NHD",),
    head_size_v: int | None = None,
    kv_cache_dtype: str = "auto",
    device: DeviceLike | None = None,
    index_dtypes: Sequence[DTypeLike] | None = None,
    num_heads: int | None = None,
    rotary: Rotation | None = None,
    alibi: bool = False,
    soft_cap: bool = False,
    ops: Sequence[str] | None = None,
    progress: bool = True,
) -> int:
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
        Cache layouts among "NHD", "HND", "packed" (views of pages that hold K|V), "x-packed",
        "rows" (multi-head latent attention: entries of ``head_size`` elements, of which the
        first ``head_size_v`` are latent, with one head) and "indexer" (quantised keys of
        ``head_size`` elements and their scales, one for 128 elements, or one for the whole key
        where 128 does not divide it).
    head_size_v : int, optional
        Head size of the values, where it differs.
    kv_cache_dtype : str
        As for the operations that write. "int8_per_token_head" and "fp8_per_token_head" are for
        attention over caches with a scale for each token and head.
    device : int, str, torch.device or cupy.cuda.Device, optional
        The GPU; by default the current one.
    index_dtypes : sequence of str, NumPy or torch dtypes, optional
        Element types, int32 or int64, of indices: kernels for all combinations of these are
        loaded. By default they are those of engines: int64 for slots, positions, and blocks that
        are chosen on the GPU, int32 for block tables, lengths, bounds, starts and numbers of
        requests.
    num_heads : int, optional
        Query heads on this GPU, for attention; by default as many as ``num_kv_heads``.
    rotary : dict, optional
        How queries and keys are rotated, see `cupy_cache.types.Rotation`, such as ``{"is_neox":
        True, "rotary_dim": 64, "norm_eps": 1e-6, "out": True}``. By default whole heads, not
        normalised, in both styles, with tables of both dtypes, and queries in place.
    alibi, soft_cap : bool
        Whether the model's `paged_attention` has ``alibi_slopes``, as BLOOM's, and a ``soft_cap``,
        as Gemma 2's: then kernels with these are loaded instead of those without.
    ops : sequence of str, optional
        Only these operations; by default all that the layouts apply to. One that refuses the shape
        does not stop the others: it is logged as a warning or, if it was named here, raised when
        all others are ready. `PagedKVCache.gather` comes with "gather_and_maybe_dequant_cache".
    progress : bool
        Show progress on standard error: a bar where that is a terminal, one line at the end where
        it is not.

    Returns
    -------
    int
        How many kernels are ready.

    Raises
    ------
    CupyCacheError
        One of its kinds, such as `DeviceError` where there is no GPU.
    MissingDependencyError, UnsupportedArchitectureError, KernelError
        Kernels could not be compiled or loaded: the first error that was met, when all others are
        ready.

    Notes
    -----
    NVRTC compiles in parallel in the threads of one process. With CUDA 13.5, 20 kernels take 1.31 s
    by one thread, and 0.75 s by two on two cores. So there is a thread for each core, 16 at most.
    """
    num_kv_heads, head_size, block_size = (
        contract.integer("warmup", name, value, 1)
        for name, value in (
            ("num_kv_heads", num_kv_heads), ("head_size", head_size), ("block_size", block_size),
        )
    )  # fmt: skip
    if head_size_v is not None:
        head_size_v = contract.integer("warmup", "head_size_v", head_size_v, 1)
    if num_heads is not None:
        num_heads = contract.integer("warmup", "num_heads", num_heads, 1)
    alibi, soft_cap = (
        contract.flag("warmup", name, value)
        for name, value in (("alibi", alibi), ("soft_cap", soft_cap))
    )
    place = driver.device_named(device, "warmup: device")
    if place.kind == "cpu":
        got = "the CPU, where nothing is compiled"
        way_out = driver.way_to_a_gpu() if device is None else ""
        raise errors.wrong("value", "warmup: device", "a GPU", got, way_out, error=DeviceError)
    refused: list[CupyCacheError] = []
    capability = driver.active.capability(place.index)
    shared_bytes = driver.active.shared_memory(place.index)
    kernels = [
        kernel
        for kernel in specialisations(
            num_kv_heads, head_size, block_size, dtype, layouts=layouts, head_size_v=head_size_v,
            kv_cache_dtype=kv_cache_dtype, index_dtypes=index_dtypes, num_heads=num_heads,
            rotary=rotary, alibi=alibi, soft_cap=soft_cap, ops=ops, refused=refused,
        )
        if kernel.runs_on(capability) and kernel.shared_bytes <= shared_bytes
    ]  # fmt: skip
    failed = _load_all(kernels, place.index, progress)
    for error in refused:
        logger.warning("warmup: left out: %s", error)
    if failed:
        first = failed[0]
        raise type(first)(
            f"warmup: {len(failed)} of {errors.counted(len(kernels), 'kernel')} could not be "
            f"loaded, the first: {first}"
        ) from first
    if refused and ops is not None:
        raise refused[0]
    return len(kernels)


def _load_all(kernels, device, progress):
    """Load kernels in parallel; the errors of those that could not be."""
    failed = []
    with _Progress(len(kernels), progress) as shown:
        workers = max(1, min(len(kernels), os.cpu_count() or 1, MAX_WORKERS))
        pool = concurrent.futures.ThreadPoolExecutor(workers, "cupy_cache warmup")
        try:
            futures = [pool.submit(_load, kernel, device) for kernel in kernels]
            for future in concurrent.futures.as_completed(futures):
                try:
                    future.result()
                except CupyCacheError as error:
                    failed.append(error)
                shown.step()
        finally:
            pool.shutdown(cancel_futures=True)
    return failed


def _load(kernel, device):
    with modules.warming():
        return modules.load(kernel, device)


# --- progress -------------------------------------------------------------------------------------


class _Progress:
    """A line on standard error, if ``shown``."""

    WIDTH = 30

    def __init__(self, count, shown):
        self._count, self._done = count, 0
        self._stream = sys.stderr if shown else None  # it may be None itself
        self._redraw = self._stream is not None and self._stream.isatty()

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
        done, seconds = f"{self._done}/{self._count}", time.monotonic() - self._start
        with contextlib.suppress(OSError):  # a broken standard error is no reason to stop
            self._stream.write(f"{start}cupy_cache: kernels [{bar}] {done} {seconds:.1f} s{end}")
            self._stream.flush()

    def __exit__(self, *exc):
        if self._stream is not None:
            self._write("\r" if self._redraw else "", "\n")
