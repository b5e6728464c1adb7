# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, with or without writing what was rotated into a cache: the checks, the
plan and the kernel of the operations that have it."""

import functools

from ... import cpu, errors
from ...runtime import contract, dispatch, formats, launch, modules, params, plans, spelling
from ...runtime.devices import NOWHERE
from . import mla, transposed

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
MAX_HEAD_SIZE = 2048  # that one warp holds in its registers
LANE_BYTES = 32  # of values, that a lane moves at least
FEW_TOKENS = 4  # that go one way, where there is one: `rotary_few`
TOGETHER = 4  # the kernel's kTogether: tokens whose keys are written side by side
ROUNDINGS = ("once", "steps")

# The arguments, of which an operation may lack some or call them otherwise.
ROLES = (
    "positions", "query", "key", "value", "cos_sin_cache", "key_cache", "value_cache",
    "slot_mapping", "out", "q_norm_weight", "k_norm_weight", "q_scale", "k_scale", "v_scale",
    "k_scale_cache", "v_scale_cache",
)  # fmt: skip
_ROWS = ("query", "key", "value", "slot_mapping", "out")
_WRITTEN = ("query", "key_cache", "value_cache", "out", "k_scale_cache", "v_scale_cache")


class Call:
    """One of the operations, of arrays in the order of `ROLES`.

    Parameters
    ----------
    name : str
        Of the public function.
    needed : tuple
        The roles of what may not be absent.
    key_in_place : bool
        Keys are rotated where they are.
    entries : bool
        There is one cache, the role key_cache, whose entries are [value | key].
    called : dict, optional
        What roles are called that are not called so.

    Attributes
    ----------
    ops : dict
        {1, or 3 where positions have axes: `dispatch.Op`}.
    """

    def __init__(self, name, needed, key_in_place=False, entries=False, called=None):
        called = called or {}
        written = (*_WRITTEN, "key") if key_in_place else _WRITTEN
        # Positions of several axes vary along another dimension: that is another operation to the
        # machinery of calls.
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
        """(The `dispatch.Op`, the options and the scalars of a call.) The scales are floats."""
        name = self.name
        axes, epsilon = 1, 0.0
        if sections is not None:
            axes, sections = 3, three_sections(name, sections)
        if norm_eps is not None:
            epsilon = contract.number(name, "norm_eps", norm_eps)
            if epsilon != 0 and epsilon < contract.SMALLEST_NORMAL:  # which kernels take for 0
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
        found = tuple(sections)
    except TypeError:
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
            expected = f"at least {tokens} rows, as many as positions"
            raise errors.wrong("shape", f"{op}: {called.get(role, role)}", expected, extent)
    if slots is not None:
        rows = {"positions": tokens, "key": key, "value": value}
        least = min(rows, key=rows.get)
        if slots > rows[least]:
            expected = f"at most {rows[least]} slots, the rows of {called.get(least, least)}"
            raise errors.wrong("shape", f"{op}: slot_mapping", expected, slots)
    return tokens, (tokens, slots or 0, axis_stride, *scalars, 0)


# --- the plan -------------------------------------------------------------------------------------


class _Checked:
    """The arguments of a signature, after all checks: an attribute for each of `ROLES`, with the
    heads of rows [token, head, element] apart; and one for each option."""

    def __init__(self, op, described, options, key_in_place, entries):
        self.op, self.key_in_place, self.entries = op.name, key_in_place, entries
        self.names = {role: arg.name for role, arg in zip(ROLES, op.args)}
        self.given = {role: a for role, a in zip(ROLES, described) if a is not None}
        (
            self.positions, self.query, self.key, self.value, self.cos_sin_cache, self.key_cache,
            self.value_cache, self.slot_mapping, self.out, self.q_norm_weight, self.k_norm_weight,
            self.q_scale, self.k_scale, self.v_scale, self.k_scale_cache, self.v_scale_cache,
        ) = described  # fmt: skip
        (
            self.kv_cache_dtype, self.out_dtype, self.rounding, self.is_neox, self.offset,
            self.sections, self.interleaved, self.norm, self.inverse, self.head_size,
        ) = options  # fmt: skip
        self.check = contract.Contract(op.name)
        self.cached = self.key_cache is not None
        self.scaled = self.k_scale_cache is not None
        self.stored = self.out_stored = None
        self._check_options()
        self._check_caches()
        self._check_rows()
        self._check_table()
        self._check_norm()
        self._check_out()
        if self.scaled or self.norm:
            for size in (self.size, self.value_size if self.scaled else 0):
                if size > MAX_HEAD_SIZE:
                    self.refuse("shape", "query", f"a head size of at most {MAX_HEAD_SIZE}", size)

    def refuse(self, what, role, expected, got):
        """Raise for the argument of ``role``."""
        name = self.names.get(role, role)
        raise errors.wrong(what, f"{self.op}: {name}", expected, got)

    def _check_options(self):
        contract.choice(self.op, "rounding", self.rounding, ROUNDINGS)
        if self.scaled != (self.v_scale_cache is not None):
            absent = "v_scale_cache" if self.scaled else "k_scale_cache"
            self.refuse("value", absent, "an array like the other one", "None")

    def _check_caches(self):
        """Find the sizes of heads, and check whatever is as for the operations that write."""
        check, given = self.check, self.given
        self.value_size, self.block_size, self.num_blocks = 0, 0, 0
        self.steps = {"k_scale": 0, "v_scale": 0, "q_scale": 0}
        if not self.cached:
            self.size = self.head_size
            return
        table = formats.PER_TOKEN_HEAD_FORMATS if self.scaled else formats.CACHE_FORMATS
        fmt = formats.cache_format(self.op, self.kv_cache_dtype, table=table)
        check.shape(self.names["slot_mapping"], self.slot_mapping, "_")
        if self.entries:
            self._check_entries(fmt)
            return
        self.packed = len(self.key_cache.shape) == 5
        if self.packed and self.scaled:
            self.refuse("shape", "key_cache", "four dimensions beside scale caches", "five")
        if self.packed:
            self.size = self.key_cache.shape[2] * self.key_cache.shape[4]
            check.sizes["head_size"] = self.size
            interleaved = len(self.value_cache.shape) == 5
            check.x_packed_caches(self.key_cache, self.value_cache, interleaved)
        else:
            pattern = "num_blocks block_size num_kv_heads"
            check.shape("key_cache", self.key_cache, f"{pattern} head_size")
            check.shape("value_cache", self.value_cache, f"{pattern} head_size_v")
            self.size = self.key_cache.shape[3]
        sizes = check.sizes
        self.value_size, self.block_size = sizes["head_size_v"], sizes["block_size"]
        self.num_blocks = sizes["num_blocks"]
        check.dtype("key", self.key, *formats.FLOATS)
        named = ("key", "value", "key_cache", "value_cache", "slot_mapping")
        self.stored = check.writes({role: given[role] for role in named}, fmt)
        for role in ("k_scale", "v_scale"):
            self.steps[role] = check.head_scale(role, given.get(role), sizes["num_kv_heads"])
        for role in ("k_scale_cache", "v_scale_cache") if self.scaled else ():
            check.shape(role, given[role], "num_blocks block_size num_kv_heads")
            check.dtype(role, given[role], formats.FLOAT32)
            check.readable(role, given[role])
            check.writable(role, given[role])

    def _check_entries(self, fmt):
        check, names = self.check, self.names
        check.shape(names["value"], self.value, "_ kv_lora_rank")
        check.shape(names["key"], self.key, "_ qk_rope_head_dim")
        check.shape(names["key_cache"], self.key_cache, "num_blocks block_size _")
        roles = ("value", "key", "key_cache", "slot_mapping")
        mla.check_entries(check, {names[role]: self.given[role] for role in roles}, fmt.storage)
        self.stored = fmt.stored
        self.num_blocks, self.block_size, _ = self.key_cache.shape
        self.value_size, self.size = self.value.shape[1], self.key.shape[1]
        for name, size in (("kv_lora_rank", self.value_size), ("qk_rope_head_dim", self.size)):
            check.positive(name, size)
        if self.k_scale is not None:
            check.scale(names["k_scale"], self.k_scale)

    def _check_rows(self):
        check, names = self.check, self.names
        check.dtype(names["query"], self.query, *formats.FLOATS)
        if self.key is not None:
            check.dtype(names["key"], self.key, self.query.dtype)
        self.query, self.key = self._by_head("query", self.size), self._by_head("key", self.size)
        self.value = self._by_head("value", self.value_size)
        self.out = self._by_head("out", self.size)
        self.heads = self.query.shape[1]
        self.key_heads = 0 if self.key is None else self.key.shape[1]
        self.check.positive("num_heads", self.heads)
        if not self.entries:
            for role, array in (("key", self.key), ("value", self.value)) if self.cached else ():
                expected = self.check.sizes["num_kv_heads"]
                if array.shape[1] != expected:
                    got = f"{list(self.given[role].shape)}, {array.shape[1]} heads"
                    self.refuse("shape", role, f"{expected} heads like key_cache", got)
        if self.out is None:
            self.check.writable(names["query"], self.query, rows=True)
        if self.key is not None and self.key_in_place:
            self.check.writable(names["key"], self.key, rows=True)

    def _by_head(self, role, size):
        """Rows as [token, head, element], after their checks: the heads may be one dimension with
        the elements. None where they are absent."""
        name, array = self.names[role], self.given.get(role)
        if array is None:
            return None
        self.check.readable(name, array)
        self.check.contiguous(name, array)
        *_, last = array.shape
        if len(array.shape) == 2 and size and last % size == 0:
            strides = array.strides[0], size * array.dtype.bytes, array.dtype.bytes
            return array._replace(shape=(array.shape[0], last // size, size), strides=strides)
        if len(array.shape) != 3 or last != size:
            expected = f"[_, heads, {size}] or [_, heads * {size}]"
            self.refuse("shape", role, expected, list(array.shape))
        return array

    def _check_table(self):
        check, table = self.check, self.cos_sin_cache
        name, positions = self.names["positions"], self.positions
        check.shape(name, positions, "_" if self.sections is None else "3 _")
        check.dtype(name, positions, *formats.INDICES)
        check.readable(name, positions)
        name = self.names["cos_sin_cache"]
        check.shape(name, table, "max_position rotary_dim")
        check.dtype(name, table, *dict.fromkeys((self.query.dtype, formats.FLOAT32)))
        check.readable(name, table)
        check.contiguous(name, table)
        self.rotary = table.shape[1]
        room = self.size - self.offset
        if not table.shape[0]:
            self.refuse("shape", "cos_sin_cache", "at least one position", list(table.shape))
        if self.rotary % 2 or not 0 < self.rotary <= room:
            expected = f"an even rotary_dim in 2..{room}, the elements of a head from {self.offset}"
            self.refuse("shape", "cos_sin_cache", expected, list(table.shape))
        if self.sections is not None and sum(self.sections) != self.rotary // 2:
            expected = f"three sections of {self.rotary // 2} pairs in all"
            self.refuse("value", "mrope_section", expected, list(self.sections))

    def _check_norm(self):
        for role in ("q_norm_weight", "k_norm_weight"):
            weight = self.given.get(role)
            if weight is None:
                continue
            if not self.norm:
                self.refuse("value", role, "None without norm_eps", "an array")
            if weight.shape != (self.size,):
                self.refuse("shape", role, [self.size], list(weight.shape))
            self.check.dtype(role, weight, *dict.fromkeys((self.query.dtype, formats.FLOAT32)))
            self.check.readable(role, weight)
            self.check.contiguous(role, weight)
        weights = [w for w in (self.q_norm_weight, self.k_norm_weight) if w is not None]
        if len(weights) == 2:
            self.check.dtype("k_norm_weight", weights[1], weights[0].dtype)
        self.weight_dtype = weights[0].dtype if weights else self.query.dtype

    def _check_out(self):
        fmt = formats.cache_format(self.op, self.out_dtype, argument="out_dtype")
        if self.out is None:
            if fmt.stored is not None:
                self.refuse("value", "out", f"an array for out_dtype={self.out_dtype!r}", "None")
            return
        self.out_stored = fmt.stored
        self.check.dtype("out", self.out, *(fmt.storage or (self.query.dtype,)))
        if self.out.shape[1] != self.heads:
            got = list(self.given["out"].shape)
            self.refuse("shape", "out", f"{self.heads} heads like {self.names['query']}", got)
        self.check.writable("out", self.out, rows=True)
        self.steps["q_scale"] = self.check.head_scale("q_scale", self.q_scale, self.heads)


def _plan(op, described, options, *, key_in_place, entries):
    found = _Checked(op, described, options, key_in_place, entries)
    if found.query.device.kind == "cpu":
        return _cpu_plan(op, found, described)
    return _gpu_plan(found)


def _cpu_plan(op, found, described):
    run = functools.partial(
        cpu.rotary, op=found.op, source=found.query.dtype, table=found.cos_sin_cache.dtype,
        weight=found.weight_dtype, stored=found.stored, out_stored=found.out_stored,
        head_size=found.size, value_size=found.value_size, offset=found.offset,
        neox=found.is_neox, inverse=found.inverse, sections=found.sections,
        interleaved=found.interleaved, norm=found.norm, steps=found.rounding == "steps",
        key_in_place=found.key_in_place, names=found.names,
    )  # fmt: skip
    kept = {"positions", "slot_mapping", "q_scale", "k_scale", "v_scale", "k_scale_cache",
            "v_scale_cache"}  # fmt: skip
    bits = [found.names[role] for role in ROLES if role not in kept]
    return plans.NumPyPlan(run, op.args, described, bits)


def _gpu_plan(found):
    query, key, value, table = found.query, found.key, found.value, found.cos_sin_cache
    element = query.dtype.bytes
    key_strides, pack = _key_strides(found)
    value_strides, slots, scattered = _value_strides(found)
    elements = _elements(found, key_strides, pack)
    across = found.is_neox or elements == 1
    items = _items(found, elements, across)

    stored = found.stored or query.dtype
    vector, vectors, value_lanes = 1, 0, 1
    value_bytes, vector_values = found.value_size * stored.bytes, False
    if found.cached and scattered:
        vector = transposed.vector_bytes(element // stored.bytes, value, value_bytes)
        block, groups, _, head, step = value_strides
        vector_values = transposed.stores_vectors(found.value_cache.ptr, block, groups, head, step)
    elif found.cached:
        vector = contract.converting_vector_bytes(
            element // stored.bytes,
            (value.ptr, *value.strides[:2]),
            (value_bytes, _value_cache(found).ptr, *value_strides),
        )
        vectors = value_bytes // vector
        width = max(1, LANE_BYTES * stored.bytes // (vector * element))
        value_lanes = launch.ceil_div(vectors, width)
    lanes = items
    if found.norm or found.scaled:
        lanes = launch.lanes(max(items, vectors if found.scaled else 0))
        if found.scaled or (not scattered and found.key_heads * value_lanes % lanes):
            value_lanes = lanes

    dense = not scattered and _is_dense(found)
    name = spelling.ELEMENT_NAMES.get
    flag = spelling.boolean
    index = spelling.INDEX_NAMES
    largest = formats.LARGEST[stored.name] if found.scaled else 0
    slot_dtype = "int64" if found.slot_mapping is None else found.slot_mapping.dtype.name
    quantiser = spelling.quantiser(query.dtype, found.stored, vector)
    kernel = _kernel(
        found,
        f"rotary<{name(query.dtype.name)}, {name(table.dtype.name)}, "
        f"{name(found.weight_dtype.name)}, {name((found.out_stored or query.dtype).name)}, "
        f"{name(stored.name)}, {quantiser}, {elements * element}, {vector}, {lanes}, "
        f"{value_lanes}, {found.heads}, {found.key_heads}, {found.size}, "
        f"{found.value_size}, {found.rotary}, {found.offset}, {pack}, {slots}, "
        f"{found.block_size}, {flag(scattered)}, {flag(vector_values)}, {largest}, "
        f"{flag(found.is_neox)}, {flag(found.inverse)}, "
        f"cupy_cache::Sections::{_sections_kind(found, elements, across)}, "
        f"{flag(found.norm)}, {flag(found.rounding == 'steps')}, {flag(found.out is not None)}, "
        f"{flag(found.key_in_place)}, {flag(found.cached)}, {flag(found.entries)}, {flag(dense)}, "
        f"{index[found.positions.dtype.name]}, {index[slot_dtype]}, {MAX_THREADS}>",
    )

    def rows(array):
        return (0, 0) if array is None else array.strides[:2]

    def strides(array):
        return (0, 0, 0) if array is None else array.strides

    device = query.device.index
    ends = _section_ends(found)
    tokens, heads = zip(*(rows(array) for array in (query, found.out, key, value)))
    key_block, *key_strides = key_strides
    value_block, *value_strides = value_strides
    constants = (
        table.shape[0], found.num_blocks, *tokens, key_block, value_block,
        found.positions.strides[-1],
        0 if found.slot_mapping is None else found.slot_mapping.strides[0], table.strides[0],
        *heads, *key_strides, *value_strides,
        *(found.steps[role] for role in ("q_scale", "k_scale", "v_scale")),
        *strides(found.k_scale_cache), *strides(found.v_scale_cache), *ends,
    )  # fmt: skip
    launcher = launch.Launcher(kernel, device, constants)
    queries, keys = found.heads * lanes, found.key_heads * lanes
    values = found.cached * found.key_heads * value_lanes
    parts = transposed.parts(found.key_heads, value_bytes)

    if not scattered:
        many = plans.KernelPlan(launcher, launch.FullShape(queries + keys + values, MAX_THREADS))
        few = _few(found, min(elements, 2), vector, dense)
        if few is None:
            return many
        kernel, items = few
        return _FewOrMany(plans.full(kernel, device, constants, items, MAX_THREADS), many)

    def shape(tokens):
        rotated = tokens * queries + launch.ceil_div(tokens, TOGETHER) * TOGETHER * keys
        blocks = launch.ceil_div(rotated, MAX_THREADS)
        return (blocks + transposed.tiles(tokens) * parts, 1, 1), MAX_THREADS

    return plans.KernelPlan(launcher, shape)


def _kernel(found, expression):
    """A kernel of rotary.cu."""
    guarded = found.names["positions"], found.names["slot_mapping"]
    return modules.Kernel(found.op, STEM, expression, PARAMS, guarded=guarded, converts=True)


class _FewOrMany(plans.KernelPlan):
    """A launch by one of two plans: up to `FEW_TOKENS`, and more. The first call loads the kernels
    of both: a step's tokens may be few for the first time where a graph is captured."""

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


def _few(found, elements, value_vector, dense):
    """(The kernel of few tokens, the items of one), in units of so many elements; None where heads
    are not stored as they come, and where positions have sections, which gains nothing."""
    bytes_each = found.query.dtype.bytes
    if (
        not found.cached or found.entries or found.scaled or found.norm or found.key_in_place
        or found.stored or found.out_stored or found.sections or found.value_size != found.size
        or elements < 2 or value_vector % (elements * bytes_each)
    ):  # fmt: skip
        return None
    name, flag, index = spelling.ELEMENT_NAMES.get, spelling.boolean, spelling.INDEX_NAMES
    kernel = _kernel(
        found,
        f"rotary_few<{name(found.query.dtype.name)}, {name(found.cos_sin_cache.dtype.name)}, "
        f"{elements * bytes_each}, {found.heads}, {found.key_heads}, {found.size}, "
        f"{found.rotary}, {found.offset}, {found.block_size}, {flag(found.is_neox)}, "
        f"{flag(found.out is not None)}, {flag(dense)}, "
        f"{index[found.positions.dtype.name]}, {index[found.slot_mapping.dtype.name]}, "
        f"{MAX_THREADS}>",
    )
    heads = found.heads + 2 * found.key_heads
    return kernel, heads * _items(found, elements, found.is_neox)


def _is_dense(found):
    """The kernel's kDense: whether nothing is converted, and what is usually contiguous is."""
    if not found.cached or found.entries or found.scaled or found.stored or found.out_stored:
        return False
    given = found.query, found.out, found.key, found.value
    rows = [array for array in given if array is not None]
    caches, indices = (found.key_cache, found.value_cache), (found.positions, found.slot_mapping)
    return (
        all(a.strides[1] == a.shape[2] * a.dtype.bytes for a in rows)
        and all(c.strides[1] == c.shape[2] * c.strides[2] for c in caches)
        and all(c.strides[2] == c.shape[3] * c.dtype.bytes for c in caches)
        and all(i.strides[-1] == i.dtype.bytes for i in indices)
        and found.cos_sin_cache.strides[0] == found.rotary * found.cos_sin_cache.dtype.bytes
    )


def _value_cache(found):
    return found.key_cache if found.entries else found.value_cache


def _key_strides(found):
    """The strides of a key cache: blocks, offsets, heads, packs; and the elements of a pack."""
    if not found.cached:
        return (0, 0, 0, 0), found.size
    if found.entries:
        return (*found.key_cache.strides[:2], 0, 0), found.size
    if found.packed:
        block, head, packs, offset, _ = found.key_cache.strides
        return (block, offset, head, packs), found.key_cache.shape[4]
    return (*found.key_cache.strides[:3], 0), found.size


def _value_strides(found):
    """The strides of a value cache: blocks, groups of slots, slots in them, heads, elements; the
    slots of a group; and whether elements do not lie together."""
    if not found.cached:
        return (0, 0, 0, 0, 0), 1, False
    cache = _value_cache(found)
    if found.entries:
        return (cache.strides[0], 0, cache.strides[1], 0, 0), found.block_size, False
    if found.packed and len(cache.shape) == 5:
        block, head, groups, elements, slot = cache.strides
        return (block, groups, slot, head, elements), cache.shape[4], True
    if found.packed:
        block, head, elements, slot = cache.strides
        return (block, 0, slot, head, elements), found.block_size, True
    block, offset, head, _ = cache.strides
    return (block, 0, offset, head, 0), found.block_size, False


def _elements(found, key_strides, pack):
    """The elements of a unit: the most, of 16 bytes, that everything is a multiple of."""
    bytes_each, table = found.query.dtype.bytes, found.cos_sin_cache
    elements = 16 // bytes_each
    while elements > 1:
        in_pairs = found.rotary // 2 if found.is_neox else found.rotary
        angles = elements if found.is_neox else elements // 2
        sizes = [found.size, found.offset, in_pairs, pack]
        moved = [(found.query, bytes_each), (found.key, bytes_each)]
        if found.out is not None:
            moved.append((found.out, found.out.dtype.bytes))
        fits = not any(size % elements for size in sizes) and all(
            n % (elements * size) == 0
            for array, size in moved
            if array is not None
            for n in (array.ptr, *array.strides[:2])
        )
        if found.cached:
            size = found.key_cache.dtype.bytes
            start = found.value_size * size if found.entries else 0
            where = found.key_cache.ptr, start, *key_strides
            fits = fits and not any(n % (elements * size) for n in where)
        read = [(table.dtype.bytes * angles, (table.ptr, table.strides[0],
                 found.rotary // 2 * table.dtype.bytes))]  # fmt: skip
        for weight in (found.q_norm_weight, found.k_norm_weight):
            if weight is not None:
                read.append((weight.dtype.bytes * elements, (weight.ptr,)))
        if fits and not any(n % min(16, width) for width, several in read for n in several):
            return elements
        elements //= 2
    return 1


def _items(found, elements, across):
    """The kItems of the kernel's Deal."""
    others = found.out is not None or found.norm or found.cached
    pairs = found.rotary // 2 // elements if across else 0
    singles = ((found.size if others else found.rotary) - across * found.rotary) // elements
    return pairs + (singles + 1) // 2


def _section_ends(found):
    if found.sections is None:
        return 0, 0
    time, height, width = found.sections
    return (3 * height, 3 * width) if found.interleaved else (time, time + height)


def _sections_kind(found, elements, across):
    if found.sections is None:
        return "kNone"
    if found.interleaved:
        return "kInterleaved"
    angles = elements if across else elements // 2
    whole = not any(end % angles for end in _section_ends(found))
    return "kWhole" if whole else "kRuns"
