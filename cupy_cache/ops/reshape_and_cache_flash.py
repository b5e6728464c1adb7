# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into a cache indexed [block, offset, head, element]."""

from .. import contract, cpu, dispatch, formats, launch, modules, params

PARAMS = params.Struct(
    per_call="key:ptr value:ptr key_cache:ptr value_cache:ptr slot_mapping:ptr tokens:i64",
    constant="num_blocks:i64 slot_stride:i64 "
    "key_token_stride:i64 key_head_stride:i64 value_token_stride:i64 value_head_stride:i64 "
    "key_block_stride:i64 key_offset_stride:i64 key_cache_head_stride:i64 "
    "value_block_stride:i64 value_offset_stride:i64 value_cache_head_stride:i64",
)
MAX_THREADS = 256


def reshape_and_cache_flash(
    key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype="auto",
    k_scale=None, v_scale=None, *, stream=None,
):  # fmt: skip
    """Write one step's keys and values into their slots of a paged cache.

    Token ``t`` goes to block ``slot_mapping[t] // block_size`` at offset ``slot_mapping[t] %
    block_size``. The number of tokens is ``slot_mapping.shape[0]``; ``key`` and ``value`` may have
    more rows (padding of a CUDA graph), which are ignored.

    Parameters
    ----------
    key : array [num_tokens, num_kv_heads, head_size]
        float16, bfloat16 or float32; the last dimension contiguous.
    value : array [num_tokens, num_kv_heads, head_size_v]
        Like ``key``; its head size may differ.
    key_cache : array [num_blocks, block_size, num_kv_heads, head_size]
        Written in place; same dtype as ``key``. Strides are free except the last: NHD, HND as a
        permuted view, and views of one packed K|V page all work.
    value_cache : array [num_blocks, block_size, num_kv_heads, head_size_v]
        Likewise, with strides of its own.
    slot_mapping : int64 or int32 array [num_slots]
        Negative slots are padding and skipped. Slots past the cache are skipped and recorded (see
        `raise_faults`). Where a slot occurs twice, which token stays is not defined.
    kv_cache_dtype : str
        "auto", "float16", "bfloat16" or "float32": a raw copy.
    k_scale, v_scale : None
        Used by quantised caches only; a raw copy ignores them.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``key_cache``.

    Raises
    ------
    ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Names, order and meaning are those of vLLM's cache operation of the same name.
    """
    del k_scale, v_scale
    OP((key, value, key_cache, value_cache, slot_mapping), (kv_cache_dtype,), stream)


def _plan(op, described, options):
    key, value, key_cache, value_cache, slot_mapping = described
    formats.require_raw(op.name, options[0])
    check = contract.Contract(op.name)
    check.shape("key", key, "_ num_kv_heads head_size")
    check.shape("value", value, "_ num_kv_heads head_size_v")
    check.shape("key_cache", key_cache, "num_blocks block_size num_kv_heads head_size")
    check.shape("value_cache", value_cache, "num_blocks block_size num_kv_heads head_size_v")
    check.shape("slot_mapping", slot_mapping, "_")
    named = {arg.name: array for arg, array in zip(op.args, described)}
    check.writes(named, formats.INDICES, formats.FLOATS)

    bits = key.dtype.bits
    if key_cache.device.kind == "cpu":
        dtypes = (bits, bits, bits, bits, slot_mapping.dtype.numpy)
        return dispatch.CpuPlan(cpu.reshape_and_cache_flash, dtypes)

    size = check.sizes
    heads, key_bytes = contract.merge_segments(
        size["num_kv_heads"], size["head_size"] * key.dtype.bytes, key.strides[1], key_cache.strides[2]
    )
    value_heads, value_bytes = contract.merge_segments(
        size["num_kv_heads"], size["head_size_v"] * key.dtype.bytes,
        value.strides[1], value_cache.strides[2],
    )  # fmt: skip
    if heads != value_heads:  # only one side's heads are adjacent: keep both apart
        heads = size["num_kv_heads"]
        key_bytes = size["head_size"] * key.dtype.bytes
        value_bytes = size["head_size_v"] * key.dtype.bytes
    vector = contract.vector_bytes(
        key_bytes, value_bytes,
        *(a.ptr for a in (key, value, key_cache, value_cache)),
        *(s for a in (key, value, key_cache, value_cache) for s in a.strides[:-1]),
    )  # fmt: skip
    index = formats.INDEX_NAMES[slot_mapping.dtype.name]
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"reshape_and_cache_flash<{vector}, {heads}, {key_bytes}, {value_bytes}, "
        f"{size['block_size']}, {index}, {MAX_THREADS}>",
        PARAMS,
        guarded=("slot_mapping",),
    )
    device = key_cache.device.index
    launcher = launch.Launcher(
        kernel,
        device,
        (size["num_blocks"], slot_mapping.strides[0], *key.strides[:2], *value.strides[:2],
         *key_cache.strides[:3], *value_cache.strides[:3]),
    )  # fmt: skip
    items = heads * max(key_bytes, value_bytes) // vector
    return dispatch.GpuPlan(launcher, launch.FlatShape(items, device, MAX_THREADS))


OP = dispatch.Op(
    "reshape_and_cache_flash",
    args=(
        dispatch.Arg("key", rows=True),
        dispatch.Arg("value", rows=True),
        dispatch.Arg("key_cache"),
        dispatch.Arg("value_cache"),
        dispatch.Arg("slot_mapping", rows=True),
    ),
    plan=_plan,
    destination=2,
    count=contract.slot_count("reshape_and_cache_flash"),
)
