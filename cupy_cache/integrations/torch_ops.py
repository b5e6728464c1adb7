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
* `slot_mapping`, `slot_mapping_groups`, `alibi_bias`, `paged_attention` and `paged_attention_mla`
  return a new tensor. With ``out``, which follows the arguments that are needed, they write it and
  return nothing. Attention that is given a tensor as ``lse`` is an overload of its own.
* `pack_blocks`, `unpack_blocks`, `pack_tokens`, `unpack_tokens`, `zero_blocks` and `copy_tokens`
  take ``caches`` as one list; with ``with_values=True`` it holds each layer's key cache and value
  cache in turn.
* `swap_blocks` takes two tensors, with ``block_size_in_bytes`` before the mapping or without it,
  or two lists of tensors.
* `concat_and_cache_mla_grouped` takes the caches as tensors, not their addresses: torch must know
  what is written.

For the same reason there is no `swap_blocks_batch`. `alibi_slopes` and `place_slopes`, whose
results are remembered, `packed_size`, which is a number, `block_table_to_csr`,
`csr_to_block_table`, `warmup` and `raise_faults` are no operations on tensors.
`paged_attention_v1`, `paged_attention_v2` and `cupy_cache.flash_attn` are other names. A
`PagedKVCache` holds addresses. Make and call all of these outside of what is compiled, or where it
may be interrupted (docs/compiled_code.md).

What can be told from shapes, strides, dtypes, devices and options is checked while a function is
traced, with the public function's error, which torch puts into one of its own. Numbers in tensors,
and sizes that depend on data, are checked by the call.

Caches that are views of the same pages, K|V say, are given as these pages, and the function that is
compiled takes the views: with ``dynamic=True`` torch itself is wrong about two arguments that share
memory. Inductor is also wrong about one view that begins where dynamic sizes say, as ``pages[1]``
does: mark the pages as static; and about a copy, made in the function, of which a view of another
dtype is written. docs/compiled_code.md has the versions, and what helps.

Nothing has a gradient. What is written counts as changed, so autograd refuses to go back through
what it has saved of it; of a compiled function it does so while that is compiled, but not in torch
2.4. Needs torch 2.4, for ``torch.library.register_fake``. Tried with 2.4, which
compiles no operation that writes a list of tensors, 2.5, 2.7, 2.11 and 2.13, whose Inductor writes
caches in place, views and lists of them too; older ones may copy them.
"""

import inspect
import re

import numpy as np

import cupy_cache

from .. import errors
from ..errors import CupyCacheError, MissingDependencyError
from ..runtime import devices, dispatch, formats, launch
from ..runtime.descriptions import ABSENT_GPU, Described

_NEEDED = "cupy_cache.integrations.torch_ops needs torch 2.4 or newer (pip install 'torch>=2.4')"
try:
    import torch
except ImportError as error:
    raise MissingDependencyError(f"{_NEEDED}: {error}") from error
if not hasattr(torch.library, "register_fake"):
    raise MissingDependencyError(f"{_NEEDED}, got {torch.__version__}")

# Public functions that are no operations on tensors, or cannot be, and why.
NOT_REGISTERED = {
    "swap_blocks_batch": "it gets addresses: torch could not know what is written",
    "alibi_slopes": "it takes no tensor, and what it returns is remembered",
    "place_slopes": "likewise",
    "packed_size": "a number, of shapes alone",
    "raise_faults": "it waits for the device and returns nothing",
    "paged_attention_v1": "another name of paged_attention",
    "paged_attention_v2": "likewise",
    "warmup": "it compiles, and takes no tensor",
    "block_table_to_csr": "it reads numbers on the host, which decide how large its results are",
    "csr_to_block_table": "likewise",
}
# Of the functions whose signature does not say all; `_schema_of` has the others'. Numbers that are
# read off shapes are SymInt: compiled code stays valid where they change.
SCHEMAS = (
    'concat_and_cache_mla_grouped(Tensor kv_c, Tensor k_pe, Tensor(a!)[] kv_cache_ptrs, '
    'Tensor slot_mapping, SymInt? block_size=None, SymInt? block_stride=None, '
    'SymInt? entry_stride=None, Tensor? kv_scales=None, str kv_cache_dtype="auto", *, '
    'SymInt? num_blocks=None) -> ()',

    'swap_blocks(Tensor src, Tensor(a!) dst, Tensor block_mapping) -> ()',

    'swap_blocks.sized(Tensor src, Tensor(a!) dst, SymInt block_size_in_bytes, '
    'Tensor block_mapping) -> ()',

    'swap_blocks.layers(Tensor[] src, Tensor(a!)[] dst, Tensor block_mapping) -> ()',

    'slot_mapping(Tensor block_table, Tensor positions, Tensor query_start_loc, '
    'SymInt block_size, *, int cp_world_size=1, int cp_rank=0, int cp_interleave=1) -> Tensor',

    'slot_mapping_groups(Tensor[] block_tables, Tensor? idx_mapping, Tensor positions, '
    'Tensor query_start_loc, SymInt[] block_sizes, *, bool[]? enabled=None, '
    'bool[]? sharded=None, int cp_world_size=1, int cp_rank=0, int cp_interleave=1) -> Tensor',

    'alibi_bias(Tensor slopes, Tensor query_positions, Tensor key_positions, *, '
    'str? dtype=None, bool sqrt=False, bool causal=False, Tensor? query_start_loc=None, '
    'Tensor? cu_seq_lens=None) -> Tensor',

    'paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, '
    'Tensor seq_lens, *, Tensor? query_start_loc=None, float? scale=None, '
    'Tensor? alibi_slopes=None, int? sliding_window=None, float? soft_cap=None, '
    'Tensor? sinks=None, bool causal=True, str kv_cache_dtype="auto", Tensor? k_scale=None, '
    'Tensor? v_scale=None, Tensor? k_scale_cache=None, Tensor? v_scale_cache=None, '
    'bool? lse=None) -> Tensor',

    'paged_attention_mla(Tensor query, Tensor kv_cache, Tensor block_table, Tensor seq_lens, *, '
    'float scale, SymInt kv_lora_rank=512, Tensor? query_start_loc=None, bool causal=True, '
    'str kv_cache_dtype="auto", Tensor? kv_scale=None, bool? lse=None) -> Tensor',
)  # fmt: skip
# What writes logarithms too, where it is given them. The operations that make a result are two:
# torch 2.13's Inductor fails at a result beside another that is None, which what may be written
# becomes. That without logarithms takes None for them: a schema has no type of None alone.
WITH_LSE = ("paged_attention", "paged_attention_mla")
_NO_LSE = ", bool? lse=None"


# What torch calls an argument of an annotation; an object is what is ignored.
_TYPES = {
    "ArrayLike": "Tensor", "Layers": "Tensor[]", "LayersOrPairs": "Tensor[]", "Indices": "Tensor",
    "Pairs": "Tensor", "Scale": "Tensor?", "object": "Tensor?", "int": "SymInt",
    "SupportsIndex": "SymInt", "Sequence[SupportsIndex]": "SymInt[]", "float": "float",
    "bool": "bool", "str": "str", "PackedLayout": "str",
}  # fmt: skip


def _schema_of(name):
    """The schema of a public function that returns nothing, from its signature and from what its
    operation writes."""
    written, marks, words = dispatch.written_by(name), iter("abcdefgh"), []
    parameters = inspect.signature(getattr(cupy_cache, name)).parameters.values()
    for parameter in parameters:
        if parameter.name == "stream":
            continue
        annotation = re.sub(r"^Literal\[[^\[\]]*\]", "str", parameter.annotation)
        plain = annotation.removesuffix(" | None")
        if plain not in _TYPES:
            raise TypeError(f"{name}: torch has no type for {parameter}: write a schema in SCHEMAS")
        kind, default = _TYPES[plain], parameter.default
        if parameter.name in written:
            kind = kind.replace("Tensor", f"Tensor({next(marks)}!)")
        if plain != annotation:
            kind += "?"
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        if default is parameter.empty:
            words.append(f"{kind} {parameter.name}")
            continue
        if plain == "Scale":  # numbers would have to be part of the graph, and None means 1.0
            default = None
        shown = f'"{default}"' if isinstance(default, str) else default
        words.append(f"{kind} {parameter.name}={shown}")
    if any(parameter.annotation == "LayersOrPairs" for parameter in parameters):
        words += ["bool with_values=False"] if "*" in words else ["*", "bool with_values=False"]
    return f"{name}({', '.join(words)}) -> ()"


def _derived():
    """The schemas with ``out``, and with ``lse``, of functions that return a tensor, and those of
    all other public functions."""
    for schema in SCHEMAS:
        if schema.endswith("-> Tensor"):
            name, _, rest = schema.removesuffix(") -> Tensor").partition("(")
            lse = ""
            if name in WITH_LSE:
                rest = rest.removesuffix(_NO_LSE)
                yield f"{name}.lse({rest}, Tensor(a!) lse) -> Tensor"
                lse = ", Tensor(b!)? lse=None"
            yield f"{name}.out({rest.replace(', *,', ', Tensor(a!) out, *,')}{lse}) -> ()"
    written_out = {re.match(r"\w+", schema)[0] for schema in SCHEMAS}
    for name in dir(cupy_cache):  # the public ones
        function = getattr(cupy_cache, name)
        if inspect.isfunction(function) and name not in written_out | NOT_REGISTERED.keys():
            yield _schema_of(name)


SCHEMAS += tuple(_derived())


# --- what runs ------------------------------------------------------------------------------------


def _implementation(schema):
    """The public function; around it, what its schema has otherwise."""
    name = schema.partition("(")[0]
    packet, _, overload = name.partition(".")
    function = getattr(cupy_cache, packet)
    if overload == "out":
        return _writing_out(function)
    if overload == "lse":
        return _needing_lse(function)
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


def _needing_lse(function):
    """torch takes None for any tensor."""

    def run(*args, lse, **options):
        dispatch.require_array(function.__name__, "lse", lse)
        return function(*args, lse=lse, **options)

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


def _counting(run, arguments):
    """Around ``run``: it counts as a change of what it writes, as torch's own operations do.
    Autograd then refuses what it has saved of that."""
    written = [at for at, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    if not written:
        return run
    first, end = written[0], written[-1] + 1
    if isinstance(arguments[first].type, torch.ListType):

        def of_lists(*args, **options):
            for tensors in args[first:end]:
                _count_change(tensors)
            return run(*args, **options)

        return of_lists

    if end - first == len(written) and not any(
        arguments[at].kwarg_only or isinstance(arguments[at].type, torch.OptionalType)
        for at in written
    ):

        def of_neighbours(*args, **options):
            _count_change(args[first:end])
            return run(*args, **options)

        return of_neighbours

    names = [(at, arguments[at].name) for at in written]

    def of_any(*args, **options):
        tensors = [args[at] if at < len(args) else options.get(name) for at, name in names]
        _count_change([tensor for tensor in tensors if tensor is not None])
        return run(*args, **options)

    return of_any


def _counter():
    """What counts a change of each of several tensors."""
    count = torch.autograd.graph.increment_version
    quick = getattr(torch._C, "_increment_version", None)  # not documented: it is tried
    for several in (quick, count):
        try:
            several(())
        except (TypeError, RuntimeError):
            continue
        return several
    return lambda tensors: [count(tensor) for tensor in tensors]  # torch 2.4: one at a time


_count_change = _counter()


def _counting_while_compiled(arguments):
    """A rule of `_AUTOGRAD_TRACES`: it counts a change of what an operation writes, as `_counting`
    does, but of the tensors that stand for those of a call to come. torch's autograd has saved
    them, and would else give the backward pass what was overwritten."""
    at = {a.name: at for at, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write}

    def rule(mode, operation, types, args=(), options=None):
        options = options or {}
        written = [args[i] if i < len(args) else options.get(name) for name, i in at.items()]
        _count_change([*_flat(written)])
        return mode.__torch_dispatch__(operation, types, args, options)

    return rule


def _autograd_traces():
    """What operations are given to while torch.compile traces them with their gradients; None where
    no rule can be added, as in torch 2.4."""
    functional = getattr(torch._subclasses, "functional_tensor", None)  # not documented
    known = hasattr(torch.library, "register_torch_dispatch")
    return getattr(functional, "FunctionalTensorMode", None) if known else None


_AUTOGRAD_TRACES = _autograd_traces()


# --- what tracing sees ----------------------------------------------------------------------------


class _SizeUnknownError(Exception):
    """A size depends on data, so nothing can be checked."""


def _number(size):
    """A size as a number, without making what is traced depend on it."""
    if isinstance(size, int):
        return size
    known = size.node.hint if size.node.has_hint() else None
    if not isinstance(known, int):
        raise _SizeUnknownError
    return known


def _flat(values):
    """All tensors among arguments."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


class _Describe:
    """Makes arguments of which the library can check everything but the numbers in them.

    Parameters
    ----------
    given : dict
        All arguments of the call, by name.
    chosen : dict
        For the arguments that hold blocks or slots, which are read where they are in host memory,
        whether those are pairs.
    """

    def __init__(self, given, chosen):
        self._chosen = chosen
        self._gpus = sorted({t.device for t in _flat(given.values()) if t.is_cuda}, key=str)
        self._storages = {}

    @property
    def on_cpu(self):
        """Whether all tensors are: what kernels refuse is no error then."""
        return not self._gpus

    def __call__(self, name, value):
        """An argument."""
        if isinstance(value, (list, tuple)):
            return [self(None, item) for item in value]
        if isinstance(value, torch.SymInt):
            return _number(value)
        if not isinstance(value, torch.Tensor):
            return value
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(map(_number, value.shape))
        if name in self._chosen and not value.is_cuda and dtype in formats.DTYPES:
            # Read on the GPU, indices would be checked there. Pairs may have to be in host memory:
            # none of them is the only number of pairs that all checks let pass.
            if self._chosen[name]:
                return np.empty((0, *shape[1:]) if shape else (), formats.DTYPES[dtype].numpy)
            return self._described(value, dtype, shape, ABSENT_GPU)
        return self._described(value, dtype, shape, self._device(value.device))

    def _described(self, value, dtype, shape, device):
        size = value.element_size()
        storage = self._storages.setdefault(
            value.untyped_storage()._cdata, (1 + len(self._storages)) << 48
        )
        address = storage + _number(value.storage_offset()) * size
        strides = [_number(stride) * size for stride in value.stride()]
        return Described(shape, strides, dtype, device, address)

    def _device(self, device):
        """Where an argument counts as being: on the GPU, also where none is used, for only there
        calls end before they read memory; and on any further device."""
        if device in self._gpus[1:]:
            return devices.Device("cuda", device.index)
        return devices.CPU if self._gpus and device.type == "cpu" else ABSENT_GPU

    def with_its_device(self, message):
        """A message, of an error, that names the GPU in the place of the one that is not there."""
        return message.replace(str(ABSENT_GPU), str(self._gpus[0]) if self._gpus else "cpu")


def _checking(run, function, arguments, result):
    """The fake implementation: ``run``, with its checks and errors, on arguments that have no
    memory, and then ``result``."""
    names = [argument.name for argument in arguments]
    single = {a.name for a in arguments if not isinstance(a.type, torch.ListType)}
    chosen = {
        name: "Pairs" in parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if name in single and re.search(r"Indices|Pairs", parameter.annotation)
    }

    def fake(*args, **options):
        given = dict(zip(names, args)) | options
        describe = _Describe(given, chosen)
        _refuse_some_meta(function.__name__, given)
        try:
            shown = {name: describe(name, value) for name, value in given.items()}
            run(*list(shown.values())[: len(args)], **{name: shown[name] for name in options})
        except (_SizeUnknownError, launch.KernelNeeded):
            pass
        except CupyCacheError as error:
            if not (error._on_gpus_alone and describe.on_cpu):
                error.args = describe.with_its_device(str(error)), *error.args[1:]
                raise
        return result(*args, **options)

    return fake


def _refuse_some_meta(op, given):
    """Refuse tensors of "meta" beside others: torch takes the call for one without memory, and what
    has some would stay as it is, in silence."""
    types = {tensor.device.type for tensor in _flat(given.values())}
    if "meta" not in types or len(types) == 1:
        return
    name = next(
        name
        for name, value in given.items()
        if any(t.device.type == "meta" for t in _flat((value,)))
    )
    expected = " or ".join(sorted(types - {"meta"})) + " like the others"
    raise errors.wrong("device", f"{op}: {name}", expected, "meta")


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
    dtype = getattr(torch, formats.dtype_named(dtype or "float32", "alibi_bias: dtype").name)
    return query_positions.new_empty(shape, dtype=dtype)


def _attended(query, key_cache, value_cache, *args, **options):
    del args, options
    x_packed = key_cache.dim() == 5
    head_size = value_cache.shape[value_cache.dim() - 2 if x_packed else 3]
    return query.new_empty((*query.shape[:2], head_size))


def _attended_mla(query, *args, kv_lora_rank=512, **options):
    del args, options
    return query.new_empty((*query.shape[:2], kv_lora_rank))


_RESULTS = {
    "slot_mapping": _new_slots,
    "slot_mapping_groups": _new_slots_of_groups,
    "alibi_bias": _new_bias,
    "paged_attention": _attended,
    "paged_attention.lse": _attended,
    "paged_attention_mla": _attended_mla,
    "paged_attention_mla.lse": _attended_mla,
}


# --- registration ---------------------------------------------------------------------------------


def _register():
    """Define everything; the library that comes back must be kept, or all of it goes."""
    library = torch.library.Library("cupy_cache", "FRAGMENT")
    # Inductor must not choose other strides for what it computes: they are part of an operation's
    # contract (a contiguous last dimension), and of its plan. Strides of 0, of what is expanded,
    # are kept by needs_exact_strides alone. But with that torch 2.13 does not compile what writes
    # to a view of a copy, where sizes are dynamic.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for schema in SCHEMAS:
        library.define(schema, tags=tags)
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.cupy_cache, packet), overload or "default")
        function, arguments = getattr(cupy_cache, packet), operation._schema.arguments
        run = _implementation(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, _counting(run, arguments), key)
        fake = _checking(run, function, arguments, _RESULTS.get(name, _no_result))
        torch.library.register_fake(f"cupy_cache::{name}", fake, lib=library)
        if _AUTOGRAD_TRACES is not None:
            rule = _counting_while_compiled(arguments)
            torch.library.register_torch_dispatch(
                f"cupy_cache::{name}", _AUTOGRAD_TRACES, rule, lib=library
            )
    return library


# Names can be defined once in a process. Kept there, they outlive a module that is reloaded, or
# taken from sys.modules and imported again, which finds them.
if not hasattr(torch.ops.cupy_cache, "_library"):
    torch.ops.cupy_cache._library = _register()
