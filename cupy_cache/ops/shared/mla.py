# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Entries of multi-head latent attention, [kv_c | k_pe]: their checks and their kernel.

Shared by the operations that write one layer and many.
"""

from ... import errors
from ...runtime import contract, formats, modules, params, spelling

MAX_LAYERS = 128  # kMaxLayers of the kernel
MAX_THREADS = 128
STEM = "concat_and_cache_mla"

_EACH_CALL = "kv_c:ptr k_pe:ptr kv_cache:ptr slot_mapping:ptr scale:ptr tokens:i64 scale_value:f32"
_LAYERS = (
    "unused:u32 first_layer:i64 kv_c_layer_stride:i64 k_pe_layer_stride:i64 slot_layer_stride:i64"
)
_CONSTANTS = (
    "num_blocks:i64 kv_c_stride:i64 k_pe_stride:i64 slot_stride:i64 block_stride:i64 "
    "offset_stride:i64"
)
_CACHES = f"caches:u64[{MAX_LAYERS}]"
# Both structs are the kernel's Params. Only calls for many layers have the first layer and the
# distance between layers.
ONE_LAYER = params.Struct(_EACH_CALL, f"{_LAYERS} {_CONSTANTS}", _CACHES)
MANY_LAYERS = params.Struct(f"{_EACH_CALL} {_LAYERS}", _CONSTANTS, _CACHES)


def check_entries(check, described, storage):
    """The checks of a write's arrays, whose shapes were checked.

    ``described`` has kv_c, k_pe, the cache and slot_mapping by their names, in this order.
    ``storage``: the dtypes that the cache may have; empty for that of ``kv_c``.
    """
    kv_c, k_pe, kv_cache, _ = described.values()
    cache_name = list(described)[2]
    entry = kv_c.shape[-1] + k_pe.shape[-1]
    if kv_cache.shape[-1] != entry:
        expected = f"entries of {kv_c.shape[-1]} + {k_pe.shape[-1]} elements like kv_c and k_pe"
        raise errors.wrong("shape", f"{check.op}: {cache_name}", expected, list(kv_cache.shape))
    check.dtype("kv_c", kv_c, *formats.FLOATS)
    way_out = "" if storage else formats.way_to_convert(formats.RAW_FORMAT, kv_cache.dtype, "kv_c")
    check.dtype(cache_name, kv_cache, *(storage or (kv_c.dtype,)), way_out=way_out)
    check_arrays(check, described)


def check_arrays(check, described):
    """The checks of every entry format: devices and memory layout."""
    kv_c, k_pe, kv_cache, slot_mapping = described.values()
    *_, cache_name, slots_name = described
    check.positive("block_size", kv_cache.shape[-2])
    check.dtype("k_pe", k_pe, kv_c.dtype)
    check.dtype(slots_name, slot_mapping, *formats.INDICES)
    for name, array in described.items():
        check.readable(name, array)
        if name != slots_name:
            check.contiguous(name, array)
    check.writable(cache_name, kv_cache)


def entry_kernel(op, caches, kv_c, k_pe, kv_cache, stored, slots, params_struct):
    """(The kernel that writes entries, its work items for each entry.)

    ``caches``: an enumerator of the kernel's ``Caches``. ``stored``: the cache's element type, None
    where elements are copied.
    """
    size = kv_cache.dtype.bytes
    latent, rope = kv_c.shape[-1] * size, k_pe.shape[-1] * size
    sources = [a for a in (kv_c, k_pe) if a.shape[-1]]
    vector = contract.converting_vector_bytes(
        kv_c.dtype.bytes // size,
        contract.row_starts(*sources),
        (latent, rope, *contract.row_starts(kv_cache)),
    )
    converter = spelling.quantiser(kv_c.dtype, stored, vector)
    kernel = modules.Kernel(
        op,
        STEM,
        f"concat_and_cache_mla<{converter}, cupy_cache::Caches::{caches}, {vector}, {latent}, "
        f"{rope}, {kv_cache.shape[-2]}, {spelling.indices(slots)}, {MAX_THREADS}>",
        params_struct,
        guarded=("slot_mapping",),
        converts=stored is not None,
    )
    return kernel, (latent + rope) // vector
