# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Other implementations of the same operations, as their users call them.

Triton kernels here are what one writes without tuning. Other libraries are imported by their
Python entry points where installed, else the benchmark is skipped with the reason.
"""

import ctypes
import functools
import inspect

import pytest

from . import timing

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

POWER_OF_TWO_SIZES = (64, 128, 256)  # head sizes that FlashInfer's append is built for


def _next_power_of_two(n):
    return 1 << max(n - 1, 0).bit_length()


def require_triton():
    """Skip where Triton is missing."""
    if triton is None:
        pytest.skip("triton is not installed")


# --- torch ----------------------------------------------------------------------------------------


def torch_index(slots, *caches):
    """The caches and the index by which ``cache[index]`` are the slots: of flat caches where their
    memory allows."""
    if all(cache.is_contiguous() for cache in caches):
        return [cache.flatten(0, 1) for cache in caches], slots
    block_size = caches[0].shape[1]
    return caches, (slots // block_size, slots % block_size)


def torch_slots_of_rows(table, starts, block_size):
    """The slot of each row of a gather, given where the sequences start and the last one ends."""
    torch = timing.torch_module()
    lengths = starts.diff().long()
    sequence = torch.arange(len(lengths), device=table.device).repeat_interleave(lengths)
    position = torch.arange(len(sequence), device=table.device) - starts.long()[sequence]
    return table.long()[sequence, position // block_size] * block_size + position % block_size


def torch_fp8(name):
    """The dtype that a cache of ``name`` stores."""
    torch = timing.torch_module()
    return {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]


def torch_quantise(numbers, scale, dtype):
    """Bytes of an fp8 ``dtype``. ``scale`` is on the device: torch would multiply by the reciprocal
    of a number, which rounds otherwise."""
    torch = timing.torch_module()
    largest = torch.finfo(dtype).max
    quotients = (numbers.float() / scale).clamp(-largest, largest)
    return quotients.to(dtype).view(torch.uint8)


# --- Triton ---------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _cache_offsets(
        slot, at, block_stride, offset_stride, head_stride,
        BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr,
    ):  # fmt: skip
        return (
            slot // BLOCK_SIZE * block_stride
            + slot % BLOCK_SIZE * offset_stride
            + at // HEAD_SIZE * head_stride
            + at % HEAD_SIZE
        )

    @triton.jit
    def _write_kernel(
        key, value, key_cache, value_cache, slots,
        block_stride, offset_stride, head_stride,
        BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token)
        if slot < 0:
            return
        at = tl.arange(0, WIDTH)
        mask = at < ROW
        to = _cache_offsets(
            slot, at, block_stride, offset_stride, head_stride, BLOCK_SIZE, HEAD_SIZE
        )
        tl.store(key_cache + to, tl.load(key + token * ROW + at, mask=mask), mask=mask)
        tl.store(value_cache + to, tl.load(value + token * ROW + at, mask=mask), mask=mask)

    @triton.jit
    def _e4m3(numbers, scale):
        # An ordinary division would be the approximate one.
        quotients = tl.div_rn(numbers.to(tl.float32), tl.load(scale))
        return tl.clamp(quotients, -448.0, 448.0).to(tl.float8e4nv)

    @triton.jit
    def _write_fp8_kernel(
        key, value, key_cache, value_cache, slots, k_scale, v_scale,
        block_stride, offset_stride, head_stride,
        BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token)
        if slot < 0:
            return
        at = tl.arange(0, WIDTH)
        mask = at < ROW
        to = _cache_offsets(
            slot, at, block_stride, offset_stride, head_stride, BLOCK_SIZE, HEAD_SIZE
        )
        keys = tl.load(key + token * ROW + at, mask=mask)
        values = tl.load(value + token * ROW + at, mask=mask)
        tl.store(key_cache + to, _e4m3(keys, k_scale), mask=mask)
        tl.store(value_cache + to, _e4m3(values, v_scale), mask=mask)

    @triton.jit
    def _write_mla_kernel(
        kv_c, k_pe, kv_cache, slots, LATENT: tl.constexpr, ROPE: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token)
        if slot < 0:
            return
        entry = kv_cache + slot * (LATENT + ROPE)
        latent, rope = tl.arange(0, LATENT), tl.arange(0, ROPE)
        tl.store(entry + latent, tl.load(kv_c + token * LATENT + latent))
        tl.store(entry + LATENT + rope, tl.load(k_pe + token * ROPE + rope))

    @triton.jit
    def _write_packed_kernel(
        key, value, key_cache, value_cache, slots,
        BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr,
        X: tl.constexpr,
    ):  # fmt: skip
        token = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + token)
        if slot < 0:
            return
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        at = tl.arange(0, WIDTH)
        mask = at < ROW
        head = at // HEAD_SIZE
        d = at % HEAD_SIZE
        first = block * ROW * BLOCK_SIZE + head * HEAD_SIZE * BLOCK_SIZE
        key_to = first + d // X * BLOCK_SIZE * X + offset * X + d % X
        value_to = first + d * BLOCK_SIZE + offset
        tl.store(key_cache + key_to, tl.load(key + token * ROW + at, mask=mask), mask=mask)
        tl.store(value_cache + value_to, tl.load(value + token * ROW + at, mask=mask), mask=mask)

    @triton.jit
    def _copy_blocks_kernel(
        key_caches, value_caches, mapping, like, numel, WIDTH: tl.constexpr,
    ):  # fmt: skip
        pair = tl.program_id(0)
        layer = tl.program_id(1)
        at = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        mask = at < numel
        source = tl.load(mapping + 2 * pair) * numel
        destination = tl.load(mapping + 2 * pair + 1) * numel
        keys = tl.load(key_caches + layer).to(like.dtype)
        values = tl.load(value_caches + layer).to(like.dtype)
        key = tl.load(keys + source + at, mask=mask)
        value = tl.load(values + source + at, mask=mask)
        tl.store(keys + destination + at, key, mask=mask)
        tl.store(values + destination + at, value, mask=mask)

    @triton.jit
    def _gather_kernel(
        source, destination, block_table, starts, sequences, table_width,
        block_stride, offset_stride, head_stride,
        STEPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, ROW: tl.constexpr,
        WIDTH: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        low = row * 0
        high = low + sequences
        for _ in range(STEPS):
            middle = (low + high) // 2
            below = tl.load(starts + middle) <= row
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle)
        position = row - tl.load(starts + low)
        block = tl.load(block_table + low * table_width + position // BLOCK_SIZE).to(tl.int64)
        at = tl.arange(0, WIDTH)
        mask = at < ROW
        of = (
            block * block_stride
            + position % BLOCK_SIZE * offset_stride
            + at // HEAD_SIZE * head_stride
            + at % HEAD_SIZE
        )
        tl.store(destination + row * ROW + at, tl.load(source + of, mask=mask), mask=mask)

    @triton.jit
    def _slot_mapping_kernel(
        block_table, table_width, positions, query_start_loc, slots,
        BLOCK_SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        request = tl.program_id(0)
        start = tl.load(query_start_loc + request).to(tl.int64)
        end = tl.load(query_start_loc + request + 1).to(tl.int64)
        for first in range(start, end, WIDTH):
            token = first + tl.arange(0, WIDTH)
            mask = token < end
            position = tl.load(positions + token, mask=mask, other=0)
            row = block_table + request.to(tl.int64) * table_width
            block = tl.load(row + position // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
            tl.store(slots + token, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=mask)


def triton_write(key, value, key_cache, value_cache, slots):
    """``reshape_and_cache_flash``: one program a token."""
    require_triton()
    tokens, heads, size = key.shape
    row = heads * size
    block_stride, offset_stride, head_stride, _ = key_cache.stride()
    return functools.partial(
        _write_kernel[(tokens,)], key, value, key_cache, value_cache, slots,
        block_stride, offset_stride, head_stride, BLOCK_SIZE=key_cache.shape[1], HEAD_SIZE=size,
        ROW=row, WIDTH=_next_power_of_two(row),
    )  # fmt: skip


def triton_write_fp8(key, value, key_cache, value_cache, slots, k_scale, v_scale):
    """``reshape_and_cache_flash`` to e4m3 with one scale: one program a token."""
    require_triton()
    dtype = torch_fp8("fp8")
    tokens, heads, size = key.shape
    row = heads * size
    block_stride, offset_stride, head_stride, _ = key_cache.stride()
    return functools.partial(
        _write_fp8_kernel[(tokens,)], key, value, key_cache.view(dtype), value_cache.view(dtype),
        slots, k_scale, v_scale, block_stride, offset_stride, head_stride,
        BLOCK_SIZE=key_cache.shape[1], HEAD_SIZE=size, ROW=row, WIDTH=_next_power_of_two(row),
    )  # fmt: skip


def triton_write_mla(kv_c, k_pe, kv_cache, slots):
    """``concat_and_cache_mla``, raw, into a contiguous cache: one program a token."""
    require_triton()
    return functools.partial(
        _write_mla_kernel[(slots.shape[0],)], kv_c, k_pe, kv_cache, slots,
        LATENT=kv_c.shape[1], ROPE=k_pe.shape[1],
    )  # fmt: skip


def triton_write_packed(key, value, key_cache, value_cache, slots):
    """``reshape_and_cache``: one program a token, element stores for values."""
    require_triton()
    tokens, heads, size = key.shape
    row = heads * size
    return functools.partial(
        _write_packed_kernel[(tokens,)], key, value, key_cache, value_cache, slots,
        BLOCK_SIZE=key_cache.shape[3], HEAD_SIZE=size, ROW=row, WIDTH=_next_power_of_two(row),
        X=key_cache.shape[4],
    )  # fmt: skip


def triton_copy_blocks(key_caches, value_caches, mapping):
    """``copy_blocks``; pointer tables and ``mapping`` are on the device beforehand."""
    require_triton()
    torch = timing.torch_module()
    tables = [
        torch.tensor([c.data_ptr() for c in caches], dtype=torch.int64, device=mapping.device)
        for caches in (key_caches, value_caches)
    ]
    words = key_caches[0].view(torch.int32)  # its type tells the kernel what the pointers point to
    numel = words[0].numel()
    width = min(2048, _next_power_of_two(numel))
    grid = (mapping.shape[0], len(key_caches), -(-numel // width))
    return functools.partial(_copy_blocks_kernel[grid], *tables, mapping, words, numel, WIDTH=width)


def triton_gather(source, destination, block_table, starts):
    """``gather_cache``: one program a row, which finds its sequence by bisection."""
    require_triton()
    sequences = block_table.shape[0]
    row = destination[0].numel()
    size = destination.shape[-1]
    strides = source.stride()
    return functools.partial(
        _gather_kernel[(destination.shape[0],)], source, destination, block_table, starts,
        sequences, block_table.shape[1], strides[0], strides[1],
        strides[2] if source.ndim == 4 else 0, STEPS=max(sequences - 1, 0).bit_length(),
        BLOCK_SIZE=source.shape[1], HEAD_SIZE=size, ROW=row, WIDTH=_next_power_of_two(row),
    )  # fmt: skip


def triton_slot_mapping(block_table, positions, query_start_loc, block_size, slots):
    """``slot_mapping``: one program a request."""
    require_triton()
    return functools.partial(
        _slot_mapping_kernel[(block_table.shape[0],)], block_table, block_table.shape[1],
        positions, query_start_loc, slots, BLOCK_SIZE=block_size, WIDTH=1024,
    )  # fmt: skip


# --- vLLM -----------------------------------------------------------------------------------------


@functools.cache
def vllm_ops():
    """vLLM's compiled cache operations; skips where not installed."""
    pytest.importorskip("vllm", reason="vllm is not installed")
    from vllm import _custom_ops

    return _custom_ops


@functools.cache
def _one():
    torch = timing.torch_module()
    return torch.ones(1, dtype=torch.float32, device="cuda")


def vllm_write(key, value, key_cache, value_cache, slots):
    """``reshape_and_cache_flash``."""
    return functools.partial(
        vllm_ops().reshape_and_cache_flash, key, value, key_cache, value_cache, slots, "auto",
        _one(), _one(),
    )  # fmt: skip


def vllm_write_packed(key, value, key_cache, value_cache, slots):
    """``reshape_and_cache``."""
    return functools.partial(
        vllm_ops().reshape_and_cache, key, value, key_cache, value_cache, slots, "auto",
        _one(), _one(),
    )  # fmt: skip


def vllm_copy_blocks(key_caches, value_caches, mapping):
    """``copy_blocks``, which vLLM had until 0.11."""
    ops = vllm_ops()
    if not hasattr(ops, "copy_blocks"):
        pytest.skip("this vllm has no copy_blocks")
    return functools.partial(ops.copy_blocks, key_caches, value_caches, mapping)


def vllm_swap_blocks(source, destination, mapping):
    """``swap_blocks``, whose arguments differ between versions."""
    function = vllm_ops().swap_blocks
    if len(inspect.signature(function).parameters) == 4:
        size = source[0].numel() * source.element_size()
        return functools.partial(function, source, destination, size, mapping)
    return functools.partial(function, source, destination, mapping)


def vllm_gather(source, destination, block_table, starts):
    """``cp_gather_cache``."""
    return functools.partial(
        vllm_ops().cp_gather_cache, source, destination, block_table, starts, block_table.shape[0]
    )


# --- FlashInfer -----------------------------------------------------------------------------------


def flashinfer_write(key, value, key_cache, value_cache, slots, layout):
    """``append_paged_kv_cache``: one request whose pages are the whole cache, so that a token's
    position is its slot."""
    flashinfer = pytest.importorskip("flashinfer", reason="flashinfer is not installed")
    torch = timing.torch_module()
    if key.dtype not in (torch.float16, torch.bfloat16) or key.shape[2] not in POWER_OF_TWO_SIZES:
        pytest.skip("FlashInfer appends float16 and bfloat16 of head size 64, 128 and 256")
    num_blocks, block_size = key_cache.shape[:2]

    def ints(values):
        return torch.as_tensor(values, dtype=torch.int32, device=key.device)

    if layout == "HND":  # FlashInfer takes the memory order
        key_cache, value_cache = key_cache.permute(0, 2, 1, 3), value_cache.permute(0, 2, 1, 3)
    return functools.partial(
        flashinfer.append_paged_kv_cache, key, value, ints(slots * 0), ints(slots),
        (key_cache, value_cache), ints(range(num_blocks)), ints([0, num_blocks]),
        ints([block_size]), kv_layout=layout,
    )  # fmt: skip


# --- SGLang ---------------------------------------------------------------------------------------


@functools.cache
def _sglang_store():
    pytest.importorskip("sglang", reason="sglang is not installed")
    for module in ("sglang.kernels.ops.kvcache.kvcache", "sglang.jit_kernel.kvcache"):
        try:
            return __import__(module, fromlist=["store_cache"]).store_cache
        except (ImportError, AttributeError):
            continue
    pytest.skip("this sglang has no store_cache where it was looked for")


def sglang_write(key, value, key_cache, value_cache, slots):
    """``store_cache`` on flat slots."""
    store = _sglang_store()
    if not key_cache.is_contiguous():
        pytest.skip("SGLang's store_cache writes NHD only")
    tokens = key.shape[0]
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    return functools.partial(
        store, key.view(tokens, -1), value.view(tokens, -1), key_cache.view(num_slots, -1),
        value_cache.view(num_slots, -1), slots, reserved_skip_index=-1,
    )  # fmt: skip


# --- the driver -----------------------------------------------------------------------------------

_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _CopyAttributes(ctypes.Structure):
    """``CUmemcpyAttributes``: source access order, two location hints, flags."""

    _fields_ = [("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint)]


@functools.cache
def _batch_copy():
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyBatchAsync_v2
    except (OSError, AttributeError):
        pytest.skip("this driver has no cuMemcpyBatchAsync_v2 (CUDA 13)")
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    function.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer]
    return function


def driver_batch_copy(source, destination, pairs):
    """``swap_blocks`` as one ``cuMemcpyBatchAsync`` with arrays made beforehand. The driver refuses
    it on the legacy default stream and in captures: it has a stream of its own, which waits for
    the current one and is waited for."""
    function = _batch_copy()
    torch = timing.torch_module()
    size, count = source[0].numel() * source.element_size(), len(pairs)
    sources = (ctypes.c_uint64 * count)(*(source.data_ptr() + s * size for s, _ in pairs))
    destinations = (ctypes.c_uint64 * count)(*(destination.data_ptr() + d * size for _, d in pairs))
    sizes = (ctypes.c_size_t * count)(*[size] * count)
    attributes = _CopyAttributes(order=_IN_STREAM_ORDER)
    first = ctypes.c_size_t(0)
    side = torch.cuda.Stream()

    def call():
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        status = function(
            destinations, sources, sizes, count, ctypes.byref(attributes), ctypes.byref(first), 1,
            side.cuda_stream,
        )  # fmt: skip
        if status:
            raise RuntimeError(f"cuMemcpyBatchAsync: CUDA error {status}")
        current.wait_stream(side)

    return call
