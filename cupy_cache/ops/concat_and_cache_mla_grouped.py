# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into the caches of all layers of multi-head latent attention at once."""

from __future__ import annotations

import struct

from .. import cpu, errors
from ..runtime import apart, arrays, contract, dispatch, formats, launch, lists
from ..types import ArrayLike, Layers, StreamLike
from .shared import mla

NAME = "concat_and_cache_mla_grouped"
GEOMETRY = ("block_size", "block_stride", "entry_stride", "num_blocks")


def concat_and_cache_mla_grouped(
    kv_c: ArrayLike,
    k_pe: ArrayLike,
    kv_cache_ptrs: Layers | ArrayLike,
    slot_mapping: ArrayLike,
    block_size: int | None = None,
    block_stride: int | None = None,
    entry_stride: int | None = None,
    kv_scales: ArrayLike | None = None,
    kv_cache_dtype: str = "auto",
    *,
    num_blocks: int | None = None,
    stream: StreamLike | None = None,
) -> None:
    """Write one step's compressed keys and values of all layers into their caches, in one launch.

    The entry of token ``t`` of layer ``l`` is ``kv_c[l, t]`` followed by ``k_pe[l, t]``. With
    ``slot = slot_mapping[l, t]``, it goes to block ``slot // block_size`` of the layer's cache, at
    offset ``slot % block_size``. A list of more than 128 caches takes a launch for every 128.

    Parameters
    ----------
    kv_c : array [num_layers, num_tokens, kv_lora_rank]
        float16, bfloat16 or float32; the last dimension contiguous, other strides free.
    k_pe : array [num_layers, num_tokens, qk_rope_head_dim]
        Like ``kv_c``. May have no columns.
    kv_cache_ptrs : list of arrays, or int64 array [num_layers]
        The layers' caches, each [num_blocks, block_size, kv_lora_rank + qk_rope_head_dim], all with
        the same strides, dtype and device; written in place. Of the same dtype as ``kv_c`` for a
        raw copy; otherwise of the 8-bit dtype stored, or uint8. Their addresses travel inside the
        kernel's parameters: a CUDA graph keeps them.

        Or the addresses of such caches, in an array on the device. They cannot be checked but for
        what no cache has: on the CPU null, an address that is no multiple of the element size, and
        memory of another layer are refused.
    slot_mapping : int64 or int32 array [num_layers, at least num_tokens]
        Any strides; that of the layers may be 0. Negative slots are padding and skipped. Slots past
        a cache are skipped and recorded as row ``l * num_tokens + t`` (see `raise_faults`). Of a
        slot that a layer has twice nothing is defined: parts of each token may stay.
    block_size, block_stride, entry_stride : int
        Slots of a block, and the distances of blocks and of entries in elements of the cache.
        Needed with addresses; a list tells them, and what is given must agree.
    kv_scales : float32 array [num_layers], optional
        What the stored elements of each layer are multiplied with to give the values; read on its
        device. For the 8-bit dtypes, and only for them.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw copy. "fp8" or "fp8_e4m3", "fp8_e5m2",
        "int8": value / scale, rounded and saturated.
    num_blocks : int
        Blocks of each cache; needed with addresses, because slots have no bound without it.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns the caches, or
        the array of their addresses.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Names, order and bytes are those of vLLM's cache operation of the same name, which takes
    addresses alone and does not bound slots.
    """
    caches, addresses = None, kv_cache_ptrs
    if issubclass(type(kv_cache_ptrs), lists.LISTS):
        caches, addresses = lists.plain(NAME, "kv_cache_ptrs", kv_cache_ptrs), None
    if caches is not None and not caches:
        raise errors.wrong("length", f"{NAME}: kv_cache_ptrs", "caches", "none")
    geometry = block_size, block_stride, entry_stride, num_blocks
    sizes = tuple(
        None if size is None else contract.integer(NAME, name, size)
        for name, size in zip(GEOMETRY, geometry)
    )
    options = kv_cache_dtype, sizes
    OP((kv_c, k_pe, caches, addresses, slot_mapping, kv_scales), options, stream)


class _Plan:
    """How the entries of all layers are written."""

    def __init__(self, op, described, options):
        kv_cache_dtype, geometry = options
        kv_c, k_pe, caches, addresses, slot_mapping, scales = described
        fmt = formats.cache_format(NAME, kv_cache_dtype)
        check = contract.Contract(NAME)
        check.shape("kv_c", kv_c, "num_layers _ kv_lora_rank")
        check.shape("k_pe", k_pe, "num_layers _ qk_rope_head_dim")
        check.shape("slot_mapping", slot_mapping, "num_layers _")
        self._layers = check.sizes["num_layers"]
        if caches is None:
            dispatch.require_array(NAME, "kv_cache_ptrs", addresses)
            check.shape("kv_cache_ptrs", addresses, "num_layers")
            check.dtype("kv_cache_ptrs", addresses, formats.INT64)
            check.contiguous("kv_cache_ptrs", addresses)
            check.aligned("kv_cache_ptrs", addresses)
            kv_cache = _behind_addresses(check, addresses, kv_c, k_pe, fmt, geometry)
        else:
            check.shape("kv_cache_ptrs", caches, "num_blocks block_size _")
            kv_cache = caches
            _compare(kv_cache, geometry)
        writes = {"kv_c": kv_c, "k_pe": k_pe, "kv_cache_ptrs": kv_cache,
                  "slot_mapping": slot_mapping}  # fmt: skip
        mla.check_entries(check, writes, fmt.storage)
        if fmt.stored is None and scales is not None:
            expected = f"None for kv_cache_dtype {kv_cache_dtype!r}, which is a raw copy"
            raise errors.wrong("value", f"{NAME}: kv_scales", expected, "an array")
        if fmt.stored is not None:
            dispatch.require_array(NAME, "kv_scales", scales)
            check.shape("kv_scales", scales, "num_layers")
            check.scale("kv_scales", scales, self._layers)
        self._described, self._kv_cache, self._stored = described, kv_cache, fmt.stored
        self._listed = caches is not None
        self._apart = None  # of a list it is asked by `dispatch.Op`
        if not self._listed:
            self._apart = apart.Apart(op, (None, None, kv_cache))
        self._device = None
        if kv_cache.device.kind == "cuda":
            self._make_kernel(writes)

    def _make_kernel(self, writes):
        kv_c, k_pe, kv_cache, slots = writes.values()
        self._device = kv_cache.device.index
        kernel, self._items = mla.entry_kernel(
            NAME, "kTable" if self._listed else "kPointers", kv_c, k_pe, kv_cache, self._stored,
            slots, mla.MANY_LAYERS,
        )  # fmt: skip
        constants = kv_cache.shape[0], *(a.strides[1] for a in (kv_c, k_pe, slots))
        self._launcher = launch.Launcher(kernel, self._device, (*constants, *kv_cache.strides[:2]))

    def run(self, call):
        """Write: a launch for `mla.MAX_LAYERS` layers, or for all where the kernel reads the
        addresses; on the CPU layer after layer."""
        kv_c, k_pe, caches, addresses, slots, scales = call.values
        if self._listed and len(caches) != self._layers:
            expected = f"{self._layers}, the layers of kv_c"
            raise errors.wrong("length", f"{NAME}: kv_cache_ptrs", expected, len(caches))
        if self._device is None:
            self._run_cpu(call)
            return
        group = mla.MAX_LAYERS if self._listed else launch.MAX_GRID_YZ
        items = call.rows * self._items
        for first in range(0, self._layers, group):
            count = min(group, self._layers - first)
            threads = launch.block_threads(
                items * count, launch.processors(self._device), mla.MAX_THREADS
            )
            tail = struct.pack(f"<{count}Q", *caches[first : first + count]) if caches else b""
            self._launcher.enqueue(
                (launch.ceil_div(items, threads), count, 1), threads, call.stream, kv_c, k_pe,
                addresses, slots, scales, call.rows, 0.0, 0, first, *call.fields, tail=tail,
            )  # fmt: skip

    def _run_cpu(self, call):
        kv_c, k_pe, _, pointers, slots, scales = (
            None if shape is None else arrays.as_numpy(address, shape, strides, dtype)
            for address, shape, strides, dtype in zip(
                call.values, call.shapes, call.strides, self._numpy_dtypes()
            )
        )
        kv_cache, caches = self._kv_cache, call.values[2]
        if not self._listed:
            caches = pointers.tolist()
            self._check_addresses(caches)
        for layer, address in enumerate(caches):
            cpu.concat_and_cache_mla(
                kv_c[layer],
                k_pe[layer],
                arrays.as_numpy(address, kv_cache.shape, kv_cache.strides, kv_cache.dtype.bits),
                slots[layer],
                None if scales is None else scales[layer],
                call.rows,
                1.0,
                source=self._described[0].dtype,
                stored=self._stored,
                op=NAME,
                first_row=layer * call.rows,
            )

    def _check_addresses(self, caches):
        """Refuse addresses that no caches have, before anything is written."""
        size = self._kv_cache.dtype.bytes
        for layer, address in enumerate(caches):
            if address < arrays.LOWEST_ON_HOST or address % size:
                expected = f"addresses of memory, multiples of the element size {size}"
                got = f"{address:#x} in row {layer}"
                raise errors.wrong("value", f"{NAME}: kv_cache_ptrs", expected, got)
        self._apart.check((0, 0, tuple(caches)))

    def _numpy_dtypes(self):
        moved, numbers = self._described[:2], self._described[2:]
        return [a.dtype.bits for a in moved] + [a and a.dtype.numpy for a in numbers]


def _behind_addresses(check, addresses, kv_c, k_pe, fmt, geometry):
    """The description of the caches whose addresses an array holds."""
    for name, value in zip(GEOMETRY, geometry):
        if value is None:
            way_out = (
                "caches given by their addresses do not tell it, and without it slots could be "
                "written to any place: name it, or give a list of the caches"
            )
            raise errors.wrong("value", f"{NAME}: {name}", "a positive integer", "None", way_out)
        check.positive(name, value)
    block_size, block_stride, entry_stride, num_blocks = geometry
    dtype = formats.UINT8 if fmt.stored is not None else kv_c.dtype
    if num_blocks * block_stride * dtype.bytes >= 2**63:
        got = f"{errors.counted(num_blocks, 'block')} of {block_stride * dtype.bytes}"
        raise errors.wrong("value", f"{NAME}: num_blocks", "caches of less than 2**63 bytes", got)
    return addresses._replace(
        ptr=0,
        shape=(num_blocks, block_size, kv_c.shape[2] + k_pe.shape[2]),
        strides=(block_stride * dtype.bytes, entry_stride * dtype.bytes, dtype.bytes),
        dtype=dtype,
        writable=True,
    )


def _compare(kv_cache, geometry):
    """Refuse a geometry that is not the caches'."""
    size = kv_cache.dtype.bytes
    num_blocks, block_size, _ = kv_cache.shape
    found = {
        "block_size": block_size,
        "block_stride": kv_cache.strides[0] // size if num_blocks > 1 else None,
        "entry_stride": kv_cache.strides[1] // size if block_size > 1 else None,
        "num_blocks": num_blocks,
    }
    for (name, expected), value in zip(found.items(), geometry):
        if value is not None and expected is not None and value != expected:
            expected = f"{expected} like kv_cache_ptrs[0]"
            raise errors.wrong("value", f"{NAME}: {name}", expected, repr(value))


def _count(extents, options, scalars):
    """(Tokens, bytes from layer to layer of kv_c, k_pe and slot_mapping)."""
    del options, scalars
    (kv_c, of_kv_c), (k_pe, of_k_pe), (slots, of_slots) = extents
    tokens = kv_c[1]
    if k_pe[1] != tokens:
        expected = f"{errors.counted(tokens, 'token')} like kv_c"
        raise errors.wrong("shape", f"{NAME}: k_pe", expected, list(k_pe))
    if slots[1] < tokens:
        expected = f"at least {errors.counted(tokens, 'slot')} for each layer, the tokens of kv_c"
        raise errors.wrong("shape", f"{NAME}: slot_mapping", expected, list(slots))
    return tokens, (of_kv_c[0], of_k_pe[0], of_slots[0])


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("kv_c", varies=(1,)),
        dispatch.Arg("k_pe", varies=(1,)),
        dispatch.Arg("kv_cache_ptrs", layers=True, optional=True, written=True),
        dispatch.Arg("kv_cache_ptrs", optional=True, index=True),
        dispatch.Arg("slot_mapping", varies=(1,), index=True),
        dispatch.Arg("kv_scales", optional=True),
    ),
    plan=_Plan,
    destination=(2, 3),
    count=_count,
    options=("kv_cache_dtype",),
)
