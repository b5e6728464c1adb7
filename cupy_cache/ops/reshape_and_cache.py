# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Writing new tokens into an x-packed cache."""

from .. import contract, cpu, dispatch, formats, launch, modules, params
from ..errors import ShapeError

PARAMS = params.Struct(
    per_call="key:ptr value:ptr key_cache:ptr value_cache:ptr slot_mapping:ptr tokens:i64",
    constant="num_blocks:i64 slot_stride:i64 "
    "key_token_stride:i64 key_head_stride:i64 value_token_stride:i64 value_head_stride:i64 "
    "key_block_stride:i64 key_cache_head_stride:i64 key_pack_stride:i64 key_offset_stride:i64 "
    "value_block_stride:i64 value_cache_head_stride:i64 value_element_stride:i64",
)
TILE = 16  # kTile of the kernel
THREADS = 256


def reshape_and_cache(
    key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype="auto",
    k_scale=None, v_scale=None, *, stream=None,
):  # fmt: skip
    """Write one step's keys and values into their slots of an x-packed paged cache.

    The layout of vLLM's first paged-attention kernels: with x elements in 16 bytes, element ``d``
    of head ``h`` of the token in slot ``b * block_size + o`` is at ``key_cache[b, h, d // x, o,
    d % x]`` and ``value_cache[b, h, d, o]``.

    Parameters
    ----------
    key : array [num_tokens, num_kv_heads, head_size]
        float16, bfloat16 or float32; the last dimension contiguous. Rows beyond the slots are
        ignored.
    value : array [num_tokens, num_kv_heads, head_size_v]
        Like ``key``; its head size may differ.
    key_cache : array [num_blocks, num_kv_heads, head_size / x, block_size, x]
        Written in place; same dtype as ``key``; last dimension contiguous, other strides free. x is
        whatever the array says.
    value_cache : array [num_blocks, num_kv_heads, head_size_v, block_size]
        Likewise.
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
    check.shape("key_cache", key_cache, "num_blocks num_kv_heads _ block_size x")
    check.shape("value_cache", value_cache, "num_blocks num_kv_heads head_size_v block_size")
    check.shape("slot_mapping", slot_mapping, "_")
    size = check.sizes
    if key_cache.shape[2] * size["x"] != size["head_size"]:
        raise ShapeError(
            f"{op.name}: Invalid shape of key_cache: expected head_size / x = "
            f"{size['head_size']} / {size['x']} in dimension 2, got {key_cache.shape[2]}"
        )
    named = {arg.name: array for arg, array in zip(op.args, described)}
    check.writes(named, formats.INDICES, formats.FLOATS)

    bits = key.dtype.bits
    if key_cache.device.kind == "cpu":
        dtypes = (bits, bits, bits, bits, slot_mapping.dtype.numpy)
        return dispatch.CpuPlan(cpu.reshape_and_cache, dtypes)

    element = key.dtype.bytes
    key_bytes, value_bytes = size["head_size"] * element, size["head_size_v"] * element
    pack = size["x"] * element
    key_vector = contract.vector_bytes(
        pack, key.ptr, key_cache.ptr, *key.strides[:2], *key_cache.strides[:4]
    )
    value_vector = contract.vector_bytes(value_bytes, value.ptr, *value.strides[:2])
    vector_values = contract.vector_bytes(value_cache.ptr, *value_cache.strides[:3]) == 16
    index = formats.INDEX_NAMES[slot_mapping.dtype.name]
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"reshape_and_cache<{element}, {pack}, {key_vector}, {value_vector}, {key_bytes}, "
        f"{value_bytes}, {size['block_size']}, {str(vector_values).lower()}, {index}, {THREADS}>",
        PARAMS,
        guarded=("slot_mapping",),
    )
    launcher = launch.Launcher(
        kernel,
        key_cache.device.index,
        (size["num_blocks"], slot_mapping.strides[0], *key.strides[:2], *value.strides[:2],
         *key_cache.strides[:4], *value_cache.strides[:3]),
    )  # fmt: skip
    heads = size["num_kv_heads"]
    return dispatch.GpuPlan(
        launcher, lambda tokens: ((launch.ceil_div(tokens, TILE), heads, 1), THREADS)
    )


OP = dispatch.Op(
    "reshape_and_cache",
    args=(
        dispatch.Arg("key", rows=True),
        dispatch.Arg("value", rows=True),
        dispatch.Arg("key_cache"),
        dispatch.Arg("value_cache"),
        dispatch.Arg("slot_mapping", rows=True),
    ),
    plan=_plan,
    destination=2,
    count=contract.slot_count("reshape_and_cache"),
)
