# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The operations as ``torch.ops.cupy_cache.*``, for `torch.compile`.

``import cupy_cache.integrations.torch_ops`` registers them, once a process. Calls outside compiled
code need none of this: the public functions take torch tensors, and less time.

Each has the name of its public function, and of its arguments, in their order and with their
defaults, and does what that function's docstring says, errors included. A schema declares every
argument that is written; an operation returns nothing, or a new tensor. What a schema cannot
express is otherwise:

* There is no ``stream``: it is torch's current one.
* A mapping or a list of numbers is a tensor, where the function takes it in either form: pairs
  [num_pairs, 2], blocks and slots [n].
* A scale is a tensor or None, which means 1.0: numbers would have to be part of the graph.
* `slot_mapping`, `slot_mapping_groups` and `alibi_bias` return a new tensor. With ``out``, which
  follows the arguments that are needed, they write it and return nothing.
* `pack_blocks`, `unpack_blocks`, `pack_tokens`, `unpack_tokens` and `zero_blocks` take ``caches``
  as one list; with ``with_values=True`` it holds each layer's key cache and value cache in turn.
* `swap_blocks` takes two tensors, with ``block_size_in_bytes`` before the mapping or without it,
  or two lists of tensors.
* `concat_and_cache_mla_grouped` takes the caches as tensors, not their addresses: torch must know
  what is written.

For the same reason there is no `swap_blocks_batch`. `alibi_slopes` and `place_slopes`, whose
results are remembered, `packed_size`, which is a number, `warmup` and `raise_faults` are no
operations on tensors, and a `PagedKVCache` holds addresses: make and call them outside of what is
compiled.

Nothing has a gradient. Needs torch 2.4, for ``torch.library.register_fake``; the rest
(``torch.library.Library``, its ``define`` and ``impl``, ``torch.Tag``) is older. Tried with 2.4,
which compiles no operation that writes a list of tensors, 2.5, 2.11 and 2.13, whose Inductor writes
caches in place, views and lists of them too; older ones may copy them.
"""

import inspect

import cupy_cache

from ..errors import MissingDependencyError
from ..runtime import formats

_NEEDED = "cupy_cache.integrations.torch_ops needs torch 2.4 or newer (pip install 'torch>=2.4')"
try:
    import torch
except ImportError as error:
    raise MissingDependencyError(f"{_NEEDED}: {error}") from error
if not hasattr(torch.library, "register_fake"):
    raise MissingDependencyError(f"{_NEEDED}, got {torch.__version__}")

# Numbers that are read off shapes are SymInt: compiled code stays valid where they change.
SCHEMAS = (
    'reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, '
    'Tensor slot_mapping, str kv_cache_dtype="auto", Tensor? k_scale=None, Tensor? v_scale=None, '
    'bool interleaved_v=False) -> ()',

    'reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, '
    'Tensor(b!) value_cache, Tensor slot_mapping, str kv_cache_dtype="auto", '
    'Tensor? k_scale=None, Tensor? v_scale=None) -> ()',

    'reshape_and_cache_flash_per_token_head(Tensor key, Tensor value, Tensor(a!) key_cache, '
    'Tensor(b!) value_cache, Tensor(c!) k_scale_cache, Tensor(d!) v_scale_cache, '
    'Tensor slot_mapping, str kv_cache_dtype) -> ()',

    'concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, '
    'str kv_cache_dtype="auto", Tensor? scale=None, bool skip_scale=False, *, '
    'str scale_rule="power_of_two") -> ()',

    'concat_and_cache_mla_grouped(Tensor kv_c, Tensor k_pe, Tensor(a!)[] kv_cache_ptrs, '
    'Tensor slot_mapping, SymInt? block_size=None, SymInt? block_stride=None, '
    'SymInt? entry_stride=None, Tensor? kv_scales=None, str kv_cache_dtype="auto", *, '
    'SymInt? num_blocks=None) -> ()',

    'indexer_k_quant_and_cache(Tensor k, Tensor(a!) kv_cache, Tensor slot_mapping, '
    'SymInt quant_block_size, str kv_cache_dtype) -> ()',

    'copy_blocks(Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, Tensor block_mapping) -> ()',

    'copy_blocks_mla(Tensor(a!)[] kv_caches, Tensor block_mapping) -> ()',

    'swap_blocks(Tensor src, Tensor(a!) dst, Tensor block_mapping) -> ()',

    'swap_blocks.sized(Tensor src, Tensor(a!) dst, SymInt block_size_in_bytes, '
    'Tensor block_mapping) -> ()',

    'swap_blocks.layers(Tensor[] src, Tensor(a!)[] dst, Tensor block_mapping) -> ()',

    'pack_blocks(Tensor[] caches, Tensor block_ids, Tensor(a!) out, *, '
    'str layout="layer_first", bool with_values=False) -> ()',

    'unpack_blocks(Tensor packed, Tensor(a!)[] caches, Tensor block_ids, *, '
    'str layout="layer_first", bool with_values=False) -> ()',

    'pack_tokens(Tensor[] caches, Tensor slot_mapping, Tensor(a!) out, *, '
    'str layout="layer_first", bool with_values=False) -> ()',

    'unpack_tokens(Tensor packed, Tensor(a!)[] caches, Tensor slot_mapping, *, '
    'str layout="layer_first", bool with_values=False) -> ()',

    'zero_blocks(Tensor(a!)[] caches, Tensor block_ids, *, bool with_values=False) -> ()',

    'gather_cache(Tensor src_cache, Tensor(a!) dst, Tensor block_table, Tensor cu_seq_lens, '
    'Tensor? seq_starts=None, *, str layout="NHD") -> ()',

    'cp_gather_cache(Tensor src_cache, Tensor(a!) dst, Tensor block_table, Tensor cu_seq_lens, '
    'SymInt batch_size, Tensor? seq_starts=None) -> ()',

    'gather_and_maybe_dequant_cache(Tensor src_cache, Tensor(a!) dst, Tensor block_table, '
    'Tensor cu_seq_lens, Tensor? token_to_seq, SymInt num_tokens, str kv_cache_dtype, '
    'Tensor? scale, Tensor? seq_starts=None) -> ()',

    'cp_gather_and_upconvert_fp8_kv_cache(Tensor src_cache, Tensor(a!) dst, Tensor block_table, '
    'Tensor workspace_starts, SymInt batch_size, Tensor? seq_starts=None, *, '
    'str? rope_dtype=None) -> ()',

    'cp_gather_indexer_k_quant_cache(Tensor kv_cache, Tensor(a!) dst_k, Tensor(b!) dst_scale, '
    'Tensor block_table, Tensor cu_seq_lens) -> ()',

    'convert_fp8(Tensor(a!) output, Tensor input, Tensor? scale=None, str kv_dtype="fp8") -> ()',

    'slot_mapping(Tensor block_table, Tensor positions, Tensor query_start_loc, '
    'SymInt block_size, *, int cp_world_size=1, int cp_rank=0, int cp_interleave=1) -> Tensor',

    'slot_mapping.out(Tensor block_table, Tensor positions, Tensor query_start_loc, '
    'SymInt block_size, Tensor(a!) out, *, int cp_world_size=1, int cp_rank=0, '
    'int cp_interleave=1) -> ()',

    'slot_mapping_groups(Tensor[] block_tables, Tensor? idx_mapping, Tensor positions, '
    'Tensor query_start_loc, SymInt[] block_sizes, *, bool[]? enabled=None, '
    'bool[]? sharded=None, int cp_world_size=1, int cp_rank=0, int cp_interleave=1) -> Tensor',

    'slot_mapping_groups.out(Tensor[] block_tables, Tensor? idx_mapping, Tensor positions, '
    'Tensor query_start_loc, SymInt[] block_sizes, Tensor(a!) out, *, bool[]? enabled=None, '
    'bool[]? sharded=None, int cp_world_size=1, int cp_rank=0, int cp_interleave=1) -> ()',

    'alibi_bias(Tensor slopes, Tensor query_positions, Tensor key_positions, *, '
    'str? dtype=None, bool sqrt=False, bool causal=False) -> Tensor',

    'alibi_bias.out(Tensor slopes, Tensor query_positions, Tensor key_positions, Tensor(a!) out, '
    '*, str? dtype=None, bool sqrt=False, bool causal=False) -> ()',
)  # fmt: skip


# --- what runs ------------------------------------------------------------------------------------


def _implementation(schema):
    """The public function; around it, what its schema has otherwise."""
    name = schema.partition("(")[0]
    packet, _, overload = name.partition(".")
    function = getattr(cupy_cache, packet)
    if overload == "out":
        return _writing_out(function)
    if "bool with_values" in schema:
        parameters = list(inspect.signature(function).parameters)
        return _taking_one_list(function, parameters.index("caches"))
    return function


def _writing_out(function):
    """``out`` is the last of the positional arguments, and not returned: a result must be new."""

    def run(*args, **options):
        *args, out = args
        function(*args, out=out, **options)

    return run


def _taking_one_list(function, place):
    """The caches, argument number ``place``, are one list."""

    def run(*args, with_values=False, **options):
        if with_values:
            args = list(args)
            caches = args[place]
            args[place] = [caches[i : i + 2] for i in range(0, len(caches), 2)]
        function(*args, **options)

    return run


# --- what tracing sees ----------------------------------------------------------------------------


def _no_result(*args, **options):
    del args, options


def _new_slots(block_table, positions, *args, **options):
    del block_table, args, options
    return positions.new_empty(positions.shape, dtype=torch.int64)


def _new_slots_of_groups(block_tables, idx_mapping, positions, *args, **options):
    del idx_mapping, args, options
    return positions.new_empty((len(block_tables), *positions.shape), dtype=torch.int64)


def _new_bias(slopes, query_positions, key_positions, *, dtype=None, **options):
    del options
    shape = (slopes.shape[0], query_positions.shape[0], key_positions.shape[0])
    dtype = getattr(torch, formats.dtype_named(dtype or "float32").name)
    return query_positions.new_empty(shape, dtype=dtype)


_RESULTS = {
    "slot_mapping": _new_slots,
    "slot_mapping_groups": _new_slots_of_groups,
    "alibi_bias": _new_bias,
}


# --- registration ---------------------------------------------------------------------------------


def _register():
    """Define everything; the library that comes back must be kept, or all of it goes."""
    library = torch.library.Library("cupy_cache", "FRAGMENT")
    # Inductor must not choose other strides for what it computes: they are part of an operation's
    # contract (a contiguous last dimension), and of its plan.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=tags)
        implementation = _implementation(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, implementation, key)
        fake = _RESULTS.get(name, _no_result)
        torch.library.register_fake(f"cupy_cache::{name}", fake, lib=library)
    return library


# Names can be defined once in a process. Kept there, they outlive a module that is reloaded, or
# taken from sys.modules and imported again, which finds them.
if not hasattr(torch.ops.cupy_cache, "_library"):
    torch.ops.cupy_cache._library = _register()
