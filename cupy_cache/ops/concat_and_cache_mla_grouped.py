# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into the caches of all layers of multi-head latent attention at once."""

import struct

from .. import cpu
from ..errors import ArgumentError, ShapeError
from ..runtime import arrays, contract, dispatch, formats, launch
from .shared import blocks, mla

NAME = "concat_and_cache_mla_grouped"
INT64 = formats.DTYPES["int64"]
UINT8 = formats.DTYPES["uint8"]

_plans = {}


def concat_and_cache_mla_grouped(
    kv_c, k_pe, kv_cache_ptrs, slot_mapping, block_size=None, block_stride=None, entry_stride=None,
    kv_scales=None, kv_cache_dtype="auto", *, num_blocks=None, stream=None,
):  # fmt: skip
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

        Or the addresses of such caches, in an array on the device. They cannot be checked.
    slot_mapping : int64 or int32 array [num_layers, at least num_tokens]
        Any strides; that of the layers may be 0. Negative slots are padding and skipped. Slots past
        a cache are skipped and recorded as row ``l * num_tokens + t`` (see `raise_faults`). Where a
        layer has a slot twice, which token stays is not defined.
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
    listed = isinstance(kv_cache_ptrs, (list, tuple))
    if stream is not None:
        stream = arrays.stream_pointer(stream)
    elif not listed:
        stream = blocks.stream_of(NAME, "kv_cache_ptrs", kv_cache_ptrs)
    elif kv_cache_ptrs:
        stream = blocks.stream_of(NAME, "kv_cache_ptrs[0]", kv_cache_ptrs[0])

    facts = {"kv_c": kv_c, "k_pe": k_pe, "kv_cache_ptrs": kv_cache_ptrs,
             "slot_mapping": slot_mapping, "kv_scales": kv_scales}  # fmt: skip
    addresses = None
    for name, value in facts.items():
        if name == "kv_cache_ptrs" and listed:
            layers = blocks.read_layers(NAME, name, value, stream)
            if layers is None:
                raise ShapeError(f"{NAME}: Invalid length of {name}: expected caches, got none")
            facts[name], addresses = layers
        elif name != "kv_scales" or value is not None:
            facts[name] = arrays.read(value, f"{NAME}: {name}", stream)

    geometry = block_size, block_stride, entry_stride, num_blocks
    options = kv_cache_dtype, addresses and len(addresses), geometry
    key = (options, *map(_signature, facts.items()))
    known = _plans.get(key)
    plan = known or _plan(
        {name: fact and arrays.describe(fact, f"{NAME}: {name}") for name, fact in facts.items()},
        *options,
    )
    tokens = _token_count(facts)
    if not tokens:  # the strides of arrays without tokens were not checked: this is not remembered
        return
    if known is None:
        if len(_plans) >= dispatch.MAX_PLANS:
            _plans.clear()
        _plans[key] = plan
    plan.run(facts, addresses, tokens, stream)


def _signature(item):
    """What of an argument a plan depends on: all but its tokens, and where it is."""
    name, fact = item
    if fact is None:
        return None
    shape = tuple(fact.shape)
    if name in ("kv_c", "k_pe", "slot_mapping"):
        shape = (len(shape), *shape[:1], *shape[2:])
    return shape, fact.strides, fact.dtype, fact.place, fact.ptr & 15


def _token_count(facts):
    tokens = facts["kv_c"].shape[1]
    if facts["k_pe"].shape[1] != tokens:
        raise ShapeError(
            f"{NAME}: Invalid shape of k_pe: expected {tokens} tokens like kv_c, got "
            f"{list(facts['k_pe'].shape)}"
        )
    if facts["slot_mapping"].shape[1] < tokens:
        raise ShapeError(
            f"{NAME}: Invalid shape of slot_mapping: expected at least {tokens} slots for each "
            f"layer, the tokens of kv_c, got {list(facts['slot_mapping'].shape)}"
        )
    return tokens


def _plan(described, kv_cache_dtype, listed, geometry):
    """The plan for arrays by their names (None where absent); ``listed`` is the number of caches of
    a list, described by the first, and None where the array holds their addresses."""
    kv_c, k_pe, caches, slot_mapping, scales = described.values()
    fmt = formats.cache_format(NAME, kv_cache_dtype)
    check = contract.Contract(NAME)
    check.shape("kv_c", kv_c, "num_layers _ kv_lora_rank")
    check.shape("k_pe", k_pe, "num_layers _ qk_rope_head_dim")
    check.shape("slot_mapping", slot_mapping, "num_layers _")
    num_layers = check.sizes["num_layers"]
    if listed is None:
        check.shape("kv_cache_ptrs", caches, "num_layers")
        check.dtype("kv_cache_ptrs", caches, INT64)
        check.contiguous("kv_cache_ptrs", caches)
        check.aligned("kv_cache_ptrs", caches)
        kv_cache = _behind_addresses(check, caches, kv_c, k_pe, fmt, geometry)
    else:
        check.shape("kv_cache_ptrs", caches, "num_blocks block_size _")
        if listed != num_layers:
            raise ShapeError(
                f"{NAME}: Invalid length of kv_cache_ptrs: expected {num_layers}, the layers of "
                f"kv_c, got {listed}"
            )
        kv_cache = caches
        _compare(kv_cache, geometry)
    writes = {name: described[name] for name in described if name != "kv_scales"}
    mla.check_entries(check, {**writes, "kv_cache_ptrs": kv_cache}, fmt.storage)
    if fmt.stored is None and scales is not None:
        raise ArgumentError(
            f"{NAME}: Invalid value of kv_scales: expected None for kv_cache_dtype "
            f"{kv_cache_dtype!r}, which is a raw copy, got an array"
        )
    if fmt.stored is not None:
        dispatch.require_array(NAME, "kv_scales", scales)
        check.scale("kv_scales", scales, num_layers)
    if kv_cache.device.kind == "cpu":
        return _CpuPlan(kv_cache, fmt.stored)
    return _GpuPlan(described, kv_cache, fmt.stored, listed is not None)


def _behind_addresses(check, addresses, kv_c, k_pe, fmt, geometry):
    """The description of the caches whose addresses an array holds."""
    for name, value in zip(("block_size", "block_stride", "entry_stride", "num_blocks"), geometry):
        if value is None:
            raise ArgumentError(
                f"{NAME}: Invalid value of {name}: expected a positive integer, got None; caches "
                "given by their addresses do not tell it, and without it slots could be written to "
                "any place: name it, or give a list of the caches"
            )
        check.positive(name, value)
    block_size, block_stride, entry_stride, num_blocks = geometry
    dtype = UINT8 if fmt.stored is not None else kv_c.dtype
    if num_blocks * block_stride * dtype.bytes >= 2**63:
        raise ArgumentError(
            f"{NAME}: Invalid value of num_blocks: expected caches of less than 2**63 bytes, got "
            f"{num_blocks} blocks of {block_stride * dtype.bytes}"
        )
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
        "block_stride": kv_cache.strides[0] // size,
        "entry_stride": kv_cache.strides[1] // size,
        "num_blocks": num_blocks,
    }
    for (name, expected), value in zip(found.items(), geometry):
        if value is not None and value != expected:
            raise ArgumentError(
                f"{NAME}: Invalid value of {name}: expected {expected} like kv_cache_ptrs[0], got "
                f"{value!r}"
            )


class _CpuPlan:
    """Layer after layer on NumPy."""

    def __init__(self, kv_cache, stored):
        self.kv_cache, self.stored = kv_cache, stored

    def run(self, facts, addresses, tokens, stream):
        """Write ``tokens`` of each layer; ``addresses`` are the caches', if not in an array."""
        del stream
        kv_c, k_pe, caches, slots, scales = (
            fact and arrays.describe(fact, NAME) for fact in facts.values()
        )
        if addresses is None:
            addresses = _view(caches, INT64.numpy).tolist()
        kv_c_view, k_pe_view = (_view(a, a.dtype.bits) for a in (kv_c, k_pe))
        slots = _view(slots, slots.dtype.numpy)
        scales = scales and _view(scales, scales.dtype.numpy)
        for layer, address in enumerate(addresses):
            cpu.concat_and_cache_mla(
                kv_c_view[layer],
                k_pe_view[layer],
                _view(self.kv_cache._replace(ptr=address), self.kv_cache.dtype.bits),
                slots[layer],
                None if scales is None else scales[layer],
                tokens,
                source=kv_c.dtype,
                stored=self.stored,
                number=None,
                op=NAME,
                first_row=layer * tokens,
            )


def _view(array, dtype):
    return arrays.as_numpy(array.ptr, array.shape, array.strides, dtype)


class _GpuPlan:
    """One launch for `mla.MAX_LAYERS` layers; for all where the kernel reads the addresses."""

    def __init__(self, described, kv_cache, stored, listed):
        kv_c, k_pe, _, slots, _ = described.values()
        self.device = kv_cache.device.index
        self.layers = kv_c.shape[0]
        self.group = mla.MAX_LAYERS if listed else launch.MAX_GRID_YZ
        kernel, self.items = mla.entry_kernel(
            NAME, "kTable" if listed else "kPointers", kv_c, k_pe, kv_cache, stored, slots.dtype,
            mla.MANY_LAYERS,
        )  # fmt: skip
        self.launcher = launch.Launcher(
            kernel,
            self.device,
            (kv_cache.shape[0], kv_c.strides[0], k_pe.strides[0], slots.strides[0], kv_c.strides[1],
             k_pe.strides[1], slots.strides[1], *kv_cache.strides[:2], 0.0, 0),
        )  # fmt: skip

    def run(self, facts, addresses, tokens, stream):
        """Enqueue; the arguments are those of `_CpuPlan`."""
        kv_c, k_pe, caches, slots, scales = (fact.ptr if fact else 0 for fact in facts.values())
        items = tokens * self.items
        for first in range(0, self.layers, self.group):
            count = min(self.group, self.layers - first)
            threads = launch.block_threads(
                items * count, launch.processors(self.device), mla.MAX_THREADS
            )
            grid = (launch.ceil_div(items, threads), count, 1)
            tail = b""
            if addresses is not None:
                tail = struct.pack(f"<{count}Q", *addresses[first : first + count])
            self.launcher.enqueue(
                grid, threads, stream, kv_c, k_pe, caches, slots, scales, tokens, first, tail=tail
            )
