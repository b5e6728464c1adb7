# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, with or without writing the rotated keys into a cache: the calls, the
plan and the kernels of all operations that rotate."""

import functools
from typing import NamedTuple

from ... import cpu, errors
from ...runtime import contract, dispatch, formats, launch, modules, params, plans, spelling
from ...runtime.devices import NOWHERE
from . import transposed
from .rotary_arguments import ROLES, Arguments

STEM = "rotary"
PARAMS = params.Struct(
    per_call="positions:ptr query:ptr key:ptr value:ptr cos_sin:ptr key_cache:ptr value_cache:ptr "
    "slot_mapping:ptr out:ptr q_weight:ptr k_weight:ptr q_scale:ptr k_scale:ptr v_scale:ptr "
    "k_scale_cache:ptr v_scale_cache:ptr tokens:i64 slots:i64 position_axis_stride:i64 "
    "epsilon:f32 weight_bias:f32 q_scale_value:f32 k_scale_value:f32 v_scale_value:f32 unused:u32",
    constant="max_position:i64 num_blocks:i64 query_token_stride:i64 out_token_stride:i64 "
    "key_token_stride:i64 value_token_stride:i64 key_block_stride:i64 value_block_stride:i64 "
    "position_stride:i64 slot_stride:i64 cos_sin_stride:i64 query_head_stride:i64 "
    "out_head_stride:i64 key_head_stride:i64 value_head_stride:i64 key_offset_stride:i64 "
    "key_cache_head_stride:i64 key_pack_stride:i64 value_slots_stride:i64 value_offset_stride:i64 "
    "value_cache_head_stride:i64 value_element_stride:i64 q_scale_stride:i64 k_scale_stride:i64 "
    "v_scale_stride:i64 k_scale_block_stride:i64 k_scale_offset_stride:i64 "
    "k_scale_head_stride:i64 v_scale_block_stride:i64 v_scale_offset_stride:i64 "
    "v_scale_head_stride:i64 section_ends:u32[2]",
)
MAX_THREADS = 128
LANE_BYTES = 32  # a lane moves at least so many bytes of values
FEW_TOKENS = 4  # the most for which `rotary_few` runs, where there is one
FEW_ELEMENTS = 2  # a unit of `rotary_few`
TOGETHER = 4  # the kernel's kTogether: tokens whose keys are written side by side
_ROWS = ("query", "key", "value", "slot_mapping", "out")
_WRITTEN = ("query", "key_cache", "value_cache", "out", "k_scale_cache", "v_scale_cache")


class Call:
    """One of the operations. Its arrays are in the order of `ROLES`.

    Parameters
    ----------
    name : str
        The public function's.
    needed : tuple
        The roles that must be given.
    key_in_place : bool
        Keys are rotated where they are.
    entries : bool
        There is one cache, in the role key_cache, whose entries are [value | key].
    called : dict, optional
        {role: name of the argument}, where they differ.

    Attributes
    ----------
    ops : dict
        The `dispatch.Op`, by the number of axes of positions, 1 or 3.
    """

    def __init__(self, name, needed, key_in_place=False, entries=False, called=None):
        called = called or {}
        written = (*_WRITTEN, "key") if key_in_place else _WRITTEN
        # An `Op` fixes the dimension in which positions vary: the first, or behind axes the second.
        self.ops = {
            axes: dispatch.Op(
                name,
                args=[
                    dispatch.Arg(
                        called.get(role, role),
                        varies=((1,) if axes == 3 else dispatch.ROWS)
                        if role == "positions"
                        else (dispatch.ROWS if role in _ROWS else ()),
                        optional=role not in needed,
                        index=role in ("positions", "slot_mapping"),
                        written=role in written,
                    )
                    for role in ROLES
                ],
                plan=functools.partial(_plan, key_in_place=key_in_place, entries=entries),
                destination=tuple(map(ROLES.index, ("key_cache", "query", "key", "out"))),
                count=functools.partial(_count, name, called, axes == 3, key_in_place),
                options=("kv_cache_dtype", "out_dtype", "rounding"),
            )
            for axes in (1, 3)
        }
        self.name = name

    def settle(
        self, *, is_neox, kv_cache_dtype="auto", out_dtype="auto", rounding="once", offset=0,
        sections=None, interleaved=False, norm_eps=None, norm_weight_bias=0.0, inverse=False,
        head_size=None, q_scale=1.0, k_scale=1.0, v_scale=1.0,
    ):  # fmt: skip
        """(`dispatch.Op`, options, scalars) of a call. The scales are floats."""
        name = self.name
        axes, epsilon = 1, 0.0
        if sections is not None:
            axes, sections = 3, three_sections(name, sections)
        if norm_eps is not None:
            epsilon = contract.number(name, "norm_eps", norm_eps)
            if epsilon != 0 and epsilon < contract.SMALLEST_NORMAL:  # kernels take it for 0
                expected = "0 or a positive, normal float32"
                raise errors.wrong("value", f"{name}: norm_eps", expected, epsilon)
        options = (
            kv_cache_dtype, out_dtype, rounding, contract.flag(name, "is_neox", is_neox),
            contract.integer(name, "rope_dim_offset", offset, least=0), sections,
            contract.flag(name, "mrope_interleaved", interleaved), norm_eps is not None,
            contract.flag(name, "inverse", inverse), head_size,
        )  # fmt: skip
        bias = contract.number(name, "norm_weight_bias", norm_weight_bias, kind="")
        scalars = epsilon, bias, q_scale, k_scale, v_scale
        return self.ops[axes], options, scalars


def three_sections(op, sections):
    """The three sections, as a tuple of integers."""
    try:
        contract.refuse_unordered(sections)
        found = tuple(sections)
    except Exception:  # whatever its class raises
        found = ()
    if len(found) != 3:
        got = errors.shown(sections)
        raise errors.wrong("value", f"{op}: mrope_section", "three integers", got)
    return tuple(contract.integer(op, "mrope_section", size, least=0) for size in found)


def _count(op, called, has_axes, key_in_place, extents, options, scalars):
    del options
    positions, query, key, value, slots, out = extents
    tokens, axis_stride = (positions[0][1], positions[1][0]) if has_axes else (positions, 0)
    rows = {"query": query, "out": out, "key": key if key_in_place else None}
    for role, extent in rows.items():
        if extent is not None and extent < tokens:
            expected = f"at least {errors.counted(tokens, 'row')}, as many as positions"
            raise errors.wrong("shape", f"{op}: {called.get(role, role)}", expected, extent)
    if slots is not None:
        rows = {"positions": tokens, "key": key, "value": value}
        least = min(rows, key=rows.get)
        if slots > rows[least]:
            most = errors.counted(rows[least], "slot")
            expected = f"at most {most}, the rows of {called.get(least, least)}"
            raise errors.wrong("shape", f"{op}: slot_mapping", expected, slots)
    return tokens, (tokens, slots or 0, axis_stride, *scalars, 0)


# --- the plan -------------------------------------------------------------------------------------


def _plan(op, described, options, *, key_in_place, entries):
    args = Arguments(op, described, options, key_in_place, entries)
    if args.query.device.kind == "cpu":
        return _cpu_plan(op, args, described)
    return _gpu_plan(args)


def _cpu_plan(op, args, described):
    run = functools.partial(
        cpu.rotary, op=args.op, source=args.query.dtype, table=args.cos_sin_cache.dtype,
        weight=args.weight_dtype, stored=args.stored, out_stored=args.out_stored,
        head_size=args.size, value_size=args.value_size, offset=args.offset,
        neox=args.is_neox, inverse=args.inverse, sections=args.sections,
        interleaved=args.interleaved, norm=args.norm, steps=args.rounding == "steps",
        key_in_place=args.key_in_place, names=args.names,
    )  # fmt: skip
    kept = {"positions", "slot_mapping", "q_scale", "k_scale", "v_scale", "k_scale_cache",
            "v_scale_cache"}  # fmt: skip
    bits = [args.names[role] for role in ROLES if role not in kept]
    return plans.NumPyPlan(run, op.args, described, bits)


# --- the kernels ----------------------------------------------------------------------------------


class TemplateArguments(NamedTuple):
    """The template arguments of `rotary`, by their names there: kValueVec is ``value_vec``.
    rotary.cu says what they mean. Types and enumerators are C++ text."""

    # Element types, and the converter of values.
    element: str
    table: str
    weight: str
    out: str
    stored: str
    values: str
    # Bytes of a vector, and lanes of a head.
    vec: int
    value_vec: int
    lanes: int
    value_lanes: int
    # Heads of a token, and elements of a head.
    heads: int
    key_heads: int
    size: int
    value_size: int
    rotary: int
    offset: int
    # The layout of the caches.
    pack: int
    slots: int
    block_size: int
    scattered: bool
    vector_values: bool
    # What the kernel does.
    largest: int
    neox: bool
    inverse: bool
    sections: str
    norm: bool
    steps: bool
    to_out: bool
    keys: bool
    cached: bool
    entries: bool
    # How it loads and is launched.
    dense: bool
    position: str
    slot: str
    max_threads: int


# The template arguments of `rotary_few`, in their order.
OF_FEW = (
    "element", "table", "vec", "heads", "key_heads", "size", "rotary", "offset", "block_size",
    "neox", "to_out", "dense", "position", "slot", "max_threads",
)  # fmt: skip


def _gpu_plan(args):
    keys, values = _key_layout(args), _value_layout(args)
    many = _template_arguments(args, keys, values)
    kernel, device = _kernel(args, "rotary", many), args.query.device.index
    constants = _constants(args, keys, values)
    if many.scattered:
        launcher = launch.Launcher(kernel, device, constants)
        return plans.KernelPlan(launcher, _shape_of_tiles(args, many))
    items = (many.heads + many.key_heads) * many.lanes
    if many.cached:
        items += many.key_heads * many.value_lanes
    plan = plans.full(kernel, device, constants, items, MAX_THREADS)
    few = _of_few(args, many)
    if few is None:
        return plan
    kernel = _kernel(args, "rotary_few", [getattr(few, name) for name in OF_FEW])
    items = (few.heads + 2 * few.key_heads) * few.lanes
    return _FewOrMany(plans.full(kernel, device, constants, items, MAX_THREADS), plan)


def _template_arguments(args, keys, values):
    query, table, stored = args.query.dtype, args.cos_sin_cache, args.stored or args.query.dtype
    elements = _elements(args, keys)
    value_vec = _value_vector(args, values, stored)
    lanes, value_lanes = _lanes(args, values, elements, value_vec, stored)
    slot = formats.INT64 if args.slot_mapping is None else args.slot_mapping.dtype
    return TemplateArguments(
        element=spelling.element(query), table=spelling.element(table.dtype),
        weight=spelling.element(args.weight_dtype),
        out=spelling.element(args.out_stored or query), stored=spelling.element(stored),
        values=spelling.quantiser(query, args.stored, value_vec),
        vec=elements * query.bytes, value_vec=value_vec, lanes=lanes, value_lanes=value_lanes,
        heads=args.heads, key_heads=args.key_heads, size=args.size, value_size=args.value_size,
        rotary=args.rotary, offset=args.offset,
        pack=keys.pack, slots=values.slots, block_size=args.block_size, scattered=values.scattered,
        vector_values=values.scattered and _stores_vectors(args, values),
        largest=formats.LARGEST[stored.name] if args.scaled else 0,
        neox=args.is_neox, inverse=args.inverse,
        sections=f"cupy_cache::Sections::{_sections_kind(args, elements)}", norm=args.norm,
        steps=args.rounding == "steps", to_out=args.out is not None, keys=args.key_in_place,
        cached=args.cached, entries=args.entries,
        dense=not values.scattered and _is_dense(args),
        position=spelling.INDEX_NAMES[args.positions.dtype.name],
        slot=spelling.INDEX_NAMES[slot.name], max_threads=MAX_THREADS,
    )  # fmt: skip


def _of_few(args, many):
    """The `TemplateArguments` for few tokens: with smaller units. None where there is no such
    kernel: it stores heads as they come, and gains nothing where positions have sections."""
    vec = FEW_ELEMENTS * args.query.dtype.bytes
    if (
        not args.cached or args.entries or args.scaled or args.norm or args.key_in_place
        or args.stored or args.out_stored or args.sections or args.value_size != args.size
        or many.vec < vec or many.value_vec % vec
    ):  # fmt: skip
        return None
    return many._replace(vec=vec, lanes=_items(args, FEW_ELEMENTS))


def _kernel(args, name, arguments):
    """An instance of template ``name`` of rotary.cu."""
    return modules.Kernel(
        args.op, STEM, spelling.instance(name, *arguments), PARAMS,
        guarded=(args.names["positions"], args.names["slot_mapping"]), converts=True,
    )  # fmt: skip


def _constants(args, keys, values):
    """The values of the constant fields of `PARAMS`."""
    table, slots = args.cos_sin_cache, args.slot_mapping
    fields = {
        "max_position": table.shape[0],
        "num_blocks": args.num_blocks,
        "key_block_stride": keys.block,
        "key_offset_stride": keys.offset,
        "key_cache_head_stride": keys.head,
        "key_pack_stride": keys.packs,
        "value_block_stride": values.block,
        "value_slots_stride": values.group,
        "value_offset_stride": values.offset,
        "value_cache_head_stride": values.head,
        "value_element_stride": values.element,
        "position_stride": args.positions.strides[-1],
        "slot_stride": 0 if slots is None else slots.strides[0],
        "cos_sin_stride": table.strides[0],
        "section_ends": _section_ends(args),
    }
    for role in ("query", "out", "key", "value"):
        rows = getattr(args, role)
        token, head = (0, 0) if rows is None else rows.strides[:2]
        fields |= {f"{role}_token_stride": token, f"{role}_head_stride": head}
    for role in ("q_scale", "k_scale", "v_scale"):
        fields[f"{role}_stride"] = args.steps[role]
    for role, cache in (("k_scale", args.k_scale_cache), ("v_scale", args.v_scale_cache)):
        strides = (0, 0, 0) if cache is None else cache.strides
        for axis, stride in zip(("block", "offset", "head"), strides):
            fields[f"{role}_{axis}_stride"] = stride
    return PARAMS.constants(fields)


def _shape_of_tiles(args, many):
    """The launch shape where values have thread blocks of their own, behind those of queries and
    keys. Keys are dealt to threads in tiles of `TOGETHER` tokens."""
    queries, keys = many.heads * many.lanes, many.key_heads * many.lanes
    parts = transposed.parts(many.key_heads, args.value_size * args.value_cache.dtype.bytes)

    def shape(tokens):
        rotated = tokens * queries + launch.ceil_div(tokens, TOGETHER) * TOGETHER * keys
        blocks = launch.ceil_div(rotated, MAX_THREADS)
        return (blocks + transposed.tiles(tokens) * parts, 1, 1), MAX_THREADS

    return shape


class _FewOrMany(plans.KernelPlan):
    """One of two launches: for up to `FEW_TOKENS` tokens, and for more. The first call loads both
    kernels: the first step with few tokens may be one that is being captured."""

    __slots__ = ("_few",)

    def __init__(self, few, many):
        super().__init__(many.launcher, many.shape)
        self._few = few

    def launch_for(self, rows):
        return self._few.launch_for(rows) if rows <= FEW_TOKENS else super().launch_for(rows)

    def launchers(self):
        return (*self._few.launchers(), *super().launchers())

    def run(self, call):
        if self.launcher.device != NOWHERE:
            launch.load_together(self.launchers(), call.stream)
        super().run(call)


def _is_dense(args):
    """The kernel's kDense: whether nothing is converted, and nothing has unusual gaps."""
    if not args.cached or args.entries or args.scaled or args.stored or args.out_stored:
        return False
    given = args.query, args.out, args.key, args.value
    rows = [array for array in given if array is not None]
    caches, indices = (args.key_cache, args.value_cache), (args.positions, args.slot_mapping)
    return (
        all(a.strides[1] == a.shape[2] * a.dtype.bytes for a in rows)
        and all(c.strides[1] == c.shape[2] * c.strides[2] for c in caches)
        and all(c.strides[2] == c.shape[3] * c.dtype.bytes for c in caches)
        and all(i.strides[-1] == i.dtype.bytes for i in indices)
        and args.cos_sin_cache.strides[0] == args.rotary * args.cos_sin_cache.dtype.bytes
    )


class _KeyLayout(NamedTuple):
    """The strides of a key cache in bytes, and how many elements of a key are contiguous."""

    pack: int
    block: int = 0
    offset: int = 0
    head: int = 0
    packs: int = 0


def _key_layout(args):
    cache = args.key_cache
    if not args.cached:
        return _KeyLayout(args.size)
    if args.entries:
        return _KeyLayout(args.size, *cache.strides[:2])
    if args.packed:
        block, head, packs, offset, _ = cache.strides
        return _KeyLayout(cache.shape[4], block, offset, head, packs)
    return _KeyLayout(args.size, *cache.strides[:3])


class _ValueLayout(NamedTuple):
    """The strides of a value cache in bytes, how many slots of a block are a group, and whether the
    elements of one value are scattered."""

    slots: int = 1
    scattered: bool = False
    block: int = 0
    group: int = 0
    offset: int = 0
    head: int = 0
    element: int = 0


def _value_layout(args):
    if not args.cached:
        return _ValueLayout()
    if args.entries:
        block, offset, _ = args.key_cache.strides
        return _ValueLayout(args.block_size, block=block, offset=offset)
    cache = args.value_cache
    if args.packed and len(cache.shape) == 5:
        block, head, group, element, offset = cache.strides
        return _ValueLayout(cache.shape[4], True, block, group, offset, head, element)
    if args.packed:
        block, head, element, offset = cache.strides
        return _ValueLayout(args.block_size, True, block, 0, offset, head, element)
    block, offset, head, _ = cache.strides
    return _ValueLayout(args.block_size, block=block, offset=offset, head=head)


def _value_vector(args, values, stored):
    """The bytes of values that a lane stores at a time; 1 where there is no cache."""
    if not args.cached:
        return 1
    ratio, head_bytes = args.query.dtype.bytes // stored.bytes, args.value_size * stored.bytes
    if values.scattered:
        return transposed.vector_bytes(ratio, args.value, head_bytes)
    cache = args.key_cache if args.entries else args.value_cache
    return contract.converting_vector_bytes(
        ratio,
        (args.value.ptr, *args.value.strides[:2]),
        (head_bytes, cache.ptr, values.block, values.offset, values.head),
    )


def _stores_vectors(args, values):
    strides = values.block, values.group, values.head, values.element
    return transposed.stores_vectors(args.value_cache.ptr, *strides)


def _elements(args, keys):
    """The elements of a unit: as many of 16 bytes as all sizes, addresses and strides allow."""
    elements = 16 // args.query.dtype.bytes
    while elements > 1 and not _fit(args, keys, elements):
        elements //= 2
    return elements


def _fit(args, keys, elements):
    """Whether heads, and their rotated parts, are whole units of ``elements``, all aligned."""
    turning = args.rotary // 2 if args.is_neox else args.rotary
    if any(size % elements for size in (args.size, args.offset, turning, keys.pack)):
        return False
    table, cache = args.cos_sin_cache, args.key_cache
    angles = elements if args.is_neox else elements // 2
    sines = args.rotary // 2 * table.dtype.bytes
    # (Bytes of an access, addresses and strides that must be multiples of these, or of 16.)
    accesses = [(angles * table.dtype.bytes, (table.ptr, table.strides[0], sines))]
    for rows in (args.query, args.key, args.out):
        if rows is not None:
            accesses.append((elements * rows.dtype.bytes, (rows.ptr, *rows.strides[:2])))
    for weight in (args.q_norm_weight, args.k_norm_weight):
        if weight is not None:
            accesses.append((elements * weight.dtype.bytes, (weight.ptr,)))
    if args.cached:
        start = args.value_size * cache.dtype.bytes if args.entries else 0
        strides = keys.block, keys.offset, keys.head, keys.packs
        accesses.append((elements * cache.dtype.bytes, (cache.ptr, start, *strides)))
    return not any(n % min(16, size) for size, numbers in accesses for n in numbers)


def _items(args, elements):
    """The kItems of the kernel's Deal, in units of so many elements."""
    across = _turns_across(args, elements)
    others = args.out is not None or args.norm or args.cached
    pairs = args.rotary // 2 // elements if across else 0
    singles = ((args.size if others else args.rotary) - across * args.rotary) // elements
    return pairs + (singles + 1) // 2


def _turns_across(args, elements):
    """The kAcross of the kernel's Deal: whether the two of a pair are in different units."""
    return args.is_neox or elements == 1


def _lanes(args, values, elements, value_vec, stored):
    """(Lanes of a head of queries or keys, lanes of a head of values)."""
    lanes, vectors, value_lanes = _items(args, elements), 0, 1
    if args.cached and not values.scattered:
        vectors = args.value_size * stored.bytes // value_vec
        read = value_vec * args.query.dtype.bytes // stored.bytes  # bytes of its source
        value_lanes = launch.ceil_div(vectors, max(1, LANE_BYTES // read))
    # Sums and maxima of a head are taken over neighbouring lanes of one warp.
    if args.norm or args.scaled:
        lanes = launch.lanes(max(lanes, vectors if args.scaled else 0))
        if args.scaled or (not values.scattered and args.key_heads * value_lanes % lanes):
            value_lanes = lanes
    return lanes, value_lanes


def _section_ends(args):
    """The kernel's section_ends."""
    if args.sections is None:
        return 0, 0
    time, height, width = args.sections
    return (3 * height, 3 * width) if args.interleaved else (time, time + height)


def _sections_kind(args, elements):
    """The kernel's Sections."""
    if args.sections is None:
        return "kNone"
    if args.interleaved:
        return "kInterleaved"
    angles = elements if _turns_across(args, elements) else elements // 2
    whole = not any(end % angles for end in _section_ends(args))
    return "kWhole" if whole else "kRuns"
