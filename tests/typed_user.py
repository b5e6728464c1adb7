# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A user's module that calls everything public, for type checkers; see test_typing.py.

What it calls with arrays is checked, and run, once for each kind of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

import cupy_cache as cc
from cupy_cache.types import ArrayLike, Indices, Pairs, Scale, StreamLike, Writer

if TYPE_CHECKING:
    import torch


class Own:
    """An array that offers no more than DLPack."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class Declared:
    """An array that says what the methods of DLPack take."""

    def __dlpack__(
        self, *, stream: int | None = None, max_version: tuple[int, int] | None = None
    ) -> object:
        raise NotImplementedError

    def __dlpack_device__(self) -> tuple[int, int]:
        raise NotImplementedError


class OnGPU:
    """An array that offers no more than the CUDA array interface."""

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        raise NotImplementedError


Array = TypeVar("Array", "npt.NDArray[Any]", "torch.Tensor", Own)
Make = Callable[["npt.NDArray[Any]"], Array]

BLOCKS, BLOCK_SIZE, HEADS, SIZE, TOKENS = 4, 4, 2, 16, 3


def numbers(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


def zeros(*shape: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    return np.zeros(shape, dtype)


# --- with each kind of array ----------------------------------------------------------------------


def writes(make: Make[Array]) -> None:
    key, slots = make(zeros(TOKENS, HEADS, SIZE)), make(numbers(0, 5, -1))
    cache, value_cache = (make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE)) for _ in range(2))
    cc.reshape_and_cache_flash(key, key, cache, value_cache, slots)
    eighth = make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype=np.uint8))
    scale = make(np.ones(HEADS, np.float32))
    cc.reshape_and_cache_flash(
        key, key, eighth, make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype=np.uint8)), slots,
        "fp8", scale, v_scale=np.float32(0.5), stream=None,
    )  # fmt: skip
    cc.reshape_and_cache(
        key, key, make(zeros(BLOCKS, HEADS, SIZE // 4, BLOCK_SIZE, 4)),
        make(zeros(BLOCKS, HEADS, SIZE, BLOCK_SIZE)), slots, "auto", 1.0, None, interleaved_v=False,
    )  # fmt: skip
    cc.rotary_and_cache(
        make(zeros(3, TOKENS, dtype=np.int64)), key, key, key, make(zeros(1, SIZE)), cache,
        value_cache, slots, True, "auto", None, 1.0, rope_dim_offset=0,
        mrope_section=[4, np.int64(2), 2], mrope_interleaved=False, norm_eps=1e-6,
        q_norm_weight=make(zeros(SIZE)), norm_weight_bias=1.0, out=key,
        out_dtype="auto", q_scale=scale, rounding="steps", stream=None,
    )  # fmt: skip
    scales = [make(zeros(BLOCKS, BLOCK_SIZE, HEADS)) for _ in range(2)]
    cc.reshape_and_cache_flash_per_token_head(
        key, key, eighth, make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype=np.uint8)),
        scales[0], scales[1], slots, "int8",
    )  # fmt: skip
    latent, rope = make(zeros(TOKENS, 24)), make(zeros(TOKENS, 8))
    rows = make(zeros(BLOCKS, BLOCK_SIZE, 32))
    cc.concat_and_cache_mla(latent, rope, rows, slots, scale=2, scale_rule="amax")
    cc.concat_and_cache_mla_grouped(
        make(zeros(1, TOKENS, 24)), make(zeros(1, TOKENS, 8)), [rows],
        make(numbers(0, 5, -1).reshape(1, 3)), BLOCK_SIZE, num_blocks=BLOCKS,
    )  # fmt: skip
    indexed = make(zeros(BLOCKS, BLOCK_SIZE, 132, dtype=np.uint8))
    cc.indexer_k_quant_and_cache(make(zeros(TOKENS, 128)), indexed, slots, 128, "ue8m0")


def copies(make: Make[Array]) -> None:
    caches = [make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE)) for _ in range(4)]
    keys, values = caches[:2], tuple(caches[2:])
    cc.copy_blocks(keys, values, [(0, 1), (np.int64(2), 3)])
    cc.copy_blocks(keys, values, make(numbers(0, 1).reshape(1, 2)))
    cc.copy_blocks_mla(caches, ((0, 1), (2, 3)))
    cc.swap_blocks(caches[0], caches[1], [(0, 1)])
    cc.swap_blocks(caches[0], caches[1], 64, [(0, 1)])
    cc.swap_blocks(keys, values, make(numbers(0, 1).reshape(1, 2)), block_size_in_bytes=None)
    pairs = list(zip(keys, values))
    buffer = make(zeros(cc.packed_size(pairs, num_blocks=2), dtype=np.uint8))
    cc.pack_blocks(pairs, [0, np.int32(2)], buffer, layout="page_first")
    cc.unpack_blocks(buffer, pairs, range(2), layout="page_first")
    cc.pack_tokens(caches, make(numbers(3, -1)), buffer)
    cc.unpack_tokens(buffer, caches, (3, -1))
    cc.zero_blocks(pairs, make(numbers(1)))
    kept = [zeros(8), zeros(8)]
    source, destination = (make(numbers(array.ctypes.data)) for array in kept)
    cc.swap_blocks_batch(source, destination, make(numbers(32)), True)


def reads(make: Make[Array]) -> None:
    table, bounds = make(numbers(3, 1).reshape(1, 2)), make(numbers(0, 3))
    cache = make(zeros(BLOCKS, BLOCK_SIZE, SIZE))
    rows, starts = make(zeros(TOKENS, SIZE)), make(numbers(1))
    cc.gather_cache(cache, rows, table, bounds, starts, layout="NHD")
    cc.cp_gather_cache(cache, rows, table, bounds, 1, seq_starts=starts)
    stored = make(zeros(BLOCKS, BLOCK_SIZE, SIZE, dtype=np.uint8))
    one = make(np.ones(1, np.float32))
    cc.gather_and_maybe_dequant_cache(stored, rows, table, bounds, None, 3, "fp8", one, starts)
    cc.gather_slots(stored, rows, make(numbers(3, -1)), "fp8", one, layout="rows")
    entries = make(zeros(BLOCKS, BLOCK_SIZE, 656, dtype=np.uint8))
    wide = make(zeros(TOKENS, 576))
    cc.cp_gather_and_upconvert_fp8_kv_cache(
        entries, wide, table, make(numbers(0)), 1, rope_dtype="float16"
    )
    indexed = make(zeros(BLOCKS, BLOCK_SIZE, 132, dtype=np.uint8))
    keys, scales = make(zeros(TOKENS, 128, dtype=np.uint8)), make(zeros(TOKENS, 1))
    cc.cp_gather_indexer_k_quant_cache(indexed, keys, scales, table, bounds)
    cc.convert_fp8(stored, cache)
    cc.convert_fp8(cache, stored, one, "fp8_e5m2")


def attention(make: Make[Array]) -> None:
    query = make(zeros(1, 2 * HEADS, SIZE))
    caches = [make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE)) for _ in range(2)]
    table, lens = make(numbers(3, 1).reshape(1, 2)), make(numbers(3))
    attended = cc.paged_attention(query, caches[0], caches[1], table, lens, scale=0.5)
    assert attended.shape == (1, 2 * HEADS, SIZE)
    cc.paged_attention(
        query, caches[0], caches[1], table, lens, query_start_loc=make(numbers(0, 1)), scale=None,
        alibi_slopes=make(zeros(2 * HEADS)), sliding_window=2, soft_cap=np.float64(30), out=query,
        lse=make(zeros(1, 2 * HEADS)),
    )  # fmt: skip
    entries = make(zeros(BLOCKS, BLOCK_SIZE, SIZE))
    latent = cc.paged_attention_mla(query, entries, table, lens, scale=0.5, kv_lora_rank=SIZE - 1)
    assert latent.shape == (1, 2 * HEADS, SIZE - 1)
    cc.paged_attention_mla(
        query, entries, table, lens, scale=np.float64(0.5), kv_lora_rank=SIZE, out=query,
        query_start_loc=make(numbers(0, 1)), causal=False, kv_cache_dtype="auto", kv_scale=None,
        lse=make(zeros(1, 2 * HEADS)),
    )  # fmt: skip
    # Its arrays are of frameworks that it knows.
    one = zeros(1, 1, HEADS, SIZE)
    keys, values = (zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE) for _ in range(2))
    pair = cc.flash_attn.flash_attn_with_kvcache(
        one, keys, values, one, one, cache_seqlens=numbers(3), block_table=numbers(3).reshape(1, 1),
        causal=True, window_size=(2, 0), return_softmax_lse=True,
    )  # fmt: skip
    assert pair[0].shape == one.shape and pair[1].shape == (1, HEADS, 1)
    bounds = numbers(0, 1)
    cc.flash_attn.flash_attn_varlen_func(one[0], one[0], one[0], bounds, bounds, 1, 1)


def helpers(make: Make[Array]) -> None:
    table, bounds = make(numbers(3, 1).reshape(1, 2)), make(numbers(0, 3))
    positions = make(numbers(0, 1, 2))
    # A new array may be passed on as it is, and used as what it is.
    slots = cc.slot_mapping(table, positions, bounds, BLOCK_SIZE, cp_world_size=2, cp_interleave=2)
    row = make(zeros(TOKENS, SIZE))
    cc.concat_and_cache_mla(row, row, make(zeros(BLOCKS, BLOCK_SIZE, 2 * SIZE)), slots)
    assert slots.shape == (TOKENS,)
    cc.slot_mapping(table, positions, bounds, BLOCK_SIZE, out=make(numbers(0, 0, 0)))
    groups = cc.slot_mapping_groups(
        [table, table], None, positions, bounds, (4, 8), enabled=[True, False], sharded=None
    )
    assert groups.shape == (2, TOKENS)
    slopes = cc.alibi_slopes(HEADS, device="cpu", framework="numpy")
    placed = cc.place_slopes(slopes, out=make(zeros(HEADS)))
    cc.place_slopes([0.5, 0.25], device="cpu")
    bias = cc.alibi_bias(placed, positions, positions, dtype="float16", causal=True)
    assert bias.shape == (HEADS, TOKENS, TOKENS)
    cc.alibi_bias(placed, positions, positions, query_start_loc=bounds, cu_seq_lens=bounds)


def objects(make: Make[Array]) -> None:
    keys, values, others, more = (
        [make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE)) for _ in range(2)] for _ in range(4)
    )
    key, slots = make(zeros(TOKENS, HEADS, SIZE)), make(numbers(0, 5, -1))
    cache = cc.PagedKVCache(keys, values)
    cache.write(0, key, key, slots)
    write: Writer = cache.writer(1)
    write(key, key, slots, stream=None)
    positions, table = make(numbers(0, 1, 2)), make(zeros(9, SIZE))
    cache.rotary_write(0, positions, key, key, key, table, slots, False, norm_eps=1e-6)
    attended = cache.attend(
        0, key, make(numbers(0, 1, 2).reshape(3, 1)), make(numbers(1, 0, 4)), sliding_window=2
    )
    assert attended.shape == (TOKENS, HEADS, SIZE)
    cache.copy_blocks([(0, 1)])
    cache.swap_blocks(cc.PagedKVCache(others, more), [(1, 2)])
    assert len(cache) == len(cache.key_caches) == 2
    if cache.value_caches is not None:
        assert cache.value_caches[0] is values[0]
    eighth = [make(zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype=np.uint8)) for _ in range(2)]
    one = make(np.ones(1, np.float32))
    cc.PagedKVCache(eighth[:1], eighth[1:], "fp8", k_scales=[0.5], v_scales=one)
    table, bounds = make(numbers(0, 1).reshape(1, 2)), make(numbers(0, TOKENS))
    gathered = cache.gather(0, table, bounds, num_tokens=TOKENS, seq_starts=make(numbers(2)))
    assert gathered[0].shape == (TOKENS, HEADS, SIZE)
    cache.gather(1, table, bounds, out=(key, make(zeros(TOKENS, HEADS, SIZE))), stream=None)
    packed = make(zeros(2 * cache.bytes_per_block, dtype=np.uint8))
    cache.pack_blocks([0, 2], packed, layout="page_first")
    cache.unpack_blocks(packed, (1, 3), layout="page_first")
    cache.zero_blocks(range(cache.num_blocks))
    print(cache.layout.lower(), repr(cache))


def allocated(make: Make[Array]) -> None:
    cache: cc.PagedKVCache = cc.PagedKVCache.allocate(
        2, BLOCKS, BLOCK_SIZE, HEADS, SIZE, head_size_v=8, dtype=np.float32, layout="HND",
        framework="numpy", device="cpu", pinned=False,
    )  # fmt: skip
    assert len(cache) == 2 and make(zeros(1)) is not None
    cc.PagedKVCache.allocate(
        1, BLOCKS, BLOCK_SIZE, 1, SIZE, kv_cache_dtype="fp8", k_scales=0.5, layout="rows",
        framework="numpy",
    )  # fmt: skip
    entries = cc.PagedKVCache([make(zeros(BLOCKS, BLOCK_SIZE, SIZE))])
    attended = entries.attend_mla(
        0, make(zeros(1, HEADS, SIZE)), make(numbers(0).reshape(1, 1)), make(numbers(1)),
        scale=0.5, kv_lora_rank=8,
    )  # fmt: skip
    assert attended.shape == (1, HEADS, 8)


def bookkeeping(make: Make[Array]) -> None:
    tables = cc.BlockTables(
        8, np.int64(BLOCK_SIZE).item(), max_sequences=2, max_tokens=16, max_length=16,
        host_blocks=4, reuse_prefixes=True, framework="numpy", device="cpu",
    )  # fmt: skip
    known: int = tables.add("a", numbers(1, 2, 3, 4, 5).tolist(), salt=b"adapter")
    tables.append("a", 6)
    tables.append("a", [7, np.int32(8)])
    tables.fork("a", ("b", 1))
    needed: int = tables.blocks_needed(["a"], [5 - known])
    step: cc.Step = tables.step(["a", ("b", 1)], (5, 1), num_sequences=2, num_tokens=8, stream=None)
    assert step.slot_mapping.shape == step.positions.shape == step.token_ids.shape == (8,)
    told: list[int] = tables.tokens("a")
    pending: int = tables.num_pending("a")
    print(told, pending)
    copies: list[tuple[int, int]] = step.copies + tables.extend(["a"], [1])
    space = cc.SwapSpace([cc.PagedKVCache.allocate(1, 8, BLOCK_SIZE, 1, 8, framework="numpy")], 4)
    pairs: list[tuple[int, int]] = tables.swap_out("a")
    space.swap_out(pairs)
    pairs += tables.swap_in("a")
    print(copies, pairs, needed + step.num_tokens + step.num_sequences + step.max_seq_len)
    print(step.block_table, step.seq_lens, step.query_start_loc, step.max_query_len)
    space.swap_out(tables.swap_out("a", ("b", 1)), stream=None)
    coming: cc.Prefetch = space.prefetch(tables.blocks("a") + tables.blocks(("b", 1)))
    while not coming.is_done():
        space.advance()
    coming.wait()
    coming.swap_in(tables.swap_in("a", ("b", 1)))
    print(space.num_moving, space.num_blocks, space.bytes_per_block, space.bytes_per_step)
    tables.reorder(["a", "c"], ("a", ("b", 1)))
    tables.free("c")
    fed: dict[Hashable, int] = tables.schedule(["a", ("b", 1)], max_tokens=3)
    print(list(fed))
    tables.truncate("a", 2)
    assert tables.length("a") == 2 and len(tables.blocks("a")) == 1
    assert not tables.is_swapped_out("a") and "a" in tables and len(list(tables)) == len(tables)
    tables.free("a")
    pool: cc.BlockPool = tables.pool
    print(tables, pool, tables.host_pool.num_free, pool.num_blocks, tables.max_sequences)
    block: int = pool.take(1)[0]
    held: bool = pool.hold(block, b"content")
    found: int | None = pool.find(b"content")
    pool.share(block)
    assert held and found == block and pool.users(block) == 2
    pool.forget(block)
    pool.drop(block)
    table, lens = make(numbers(3, 1).reshape(1, 2)), make(numbers(6))
    indptr, indices, last = cc.block_table_to_csr(table, lens, BLOCK_SIZE)
    cc.csr_to_block_table(indptr, indices, last, BLOCK_SIZE, width=3)


EVERYTHING = (writes, copies, reads, attention, helpers, objects, allocated, bookkeeping)


# --- annotations of one's own ---------------------------------------------------------------------


def wrapped(array: ArrayLike, chosen: Indices, mapping: Pairs, stream: StreamLike) -> None:
    cc.zero_blocks([array], chosen, stream=stream)
    cc.copy_blocks([array], [array], mapping, stream=stream)


def scaled(array: ArrayLike, scale: Scale) -> None:
    cc.convert_fp8(array, array, scale)


def overlapping(array: ArrayLike) -> None:
    cc.overlap(False)
    with cc.overlap():
        cc.convert_fp8(array, array)


# --- errors ---------------------------------------------------------------------------------------


def errors() -> tuple[type[cc.CupyCacheError], ...]:
    try:
        cc.raise_faults("cpu")
    except cc.FaultError as error:
        fault: cc.Fault = error.faults[0]
        text: str = fault.op + fault.argument + fault.device + str(fault)
        count: int = fault.row + fault.value + fault.limit
        print(text, count)
    except cc.OutOfBlocksError as error:
        print(error.op + str(error), error.needed + error.free + error.num_blocks)
    print(cc.__version__.upper(), cc.FaultError([cc.Fault("op", "slots", 0, 9, 8, "cpu")]))
    return (
        cc.ArgumentError,
        cc.CaptureError,
        cc.CopyError,
        cc.DTypeError,
        cc.DeviceError,
        cc.KernelError,
        cc.MissingDependencyError,
        cc.NotWritableError,
        cc.OutOfBlocksError,
        cc.ShapeError,
        cc.StrideError,
        cc.UnsupportedArchitectureError,
    )


# --- for a GPU: not run ---------------------------------------------------------------------------


def on_gpu(
    array: OnGPU, declared: Declared, tensor: torch.Tensor, stream: torch.cuda.Stream
) -> None:
    cc.zero_blocks([array], [0], stream=stream)
    cc.zero_blocks([declared], [0], stream=1)
    cc.zero_blocks([tensor], [0], stream=stream.cuda_stream)
    cc.alibi_slopes(8, device=tensor.device, stream=stream)
    cc.raise_faults(tensor.device)
    cc.raise_faults(0)
    ready: int = cc.warmup(
        HEADS, SIZE, BLOCK_SIZE, tensor.dtype, layouts=["NHD", "rows"], device="cuda:0",
        ops=("copy_blocks",), progress=False,
    )  # fmt: skip
    cc.warmup(HEADS, SIZE, BLOCK_SIZE, np.dtype(np.float16))
    cc.warmup(HEADS, SIZE, BLOCK_SIZE, np.float16)
    print(ready)


# --- mistakes, which checkers find: not run -------------------------------------------------------


def mistakes(array: npt.NDArray[Any]) -> None:
    cc.zero_blocks(array, [0])  # type: ignore[arg-type]
    cc.zero_blocks([array], 0)  # type: ignore[arg-type]
    cc.zero_blocks([array], [0.5])  # type: ignore[list-item]
    cc.zero_blocks([array], [0], stream="legacy")  # type: ignore[arg-type]
    cc.copy_blocks([array], [array], [(0, 1, 2)])  # type: ignore[list-item]
    cc.copy_blocks([array], array, [(0, 1)])  # type: ignore[arg-type]
    cc.convert_fp8(array, [1.0])  # type: ignore[arg-type]
    cc.convert_fp8(array, array, "fp8")  # type: ignore[arg-type]
    cc.pack_blocks([array], [0], array, layout="tokens")  # type: ignore[arg-type]
    cc.alibi_slopes(8, framework="jax")  # type: ignore[arg-type]
    cc.PagedKVCache.allocate(1, 2, 4, 2, 8, layout="NDH")  # type: ignore[arg-type]
    cc.BlockPool(2).hold(0, "content")  # type: ignore[arg-type]
    cc.raise_faults(1.5)  # type: ignore[arg-type]
    cc.swap_blocks(array, array)  # type: ignore[call-overload]
    size: str = cc.packed_size([array], num_blocks=1)  # type: ignore[assignment]
    print(size)
