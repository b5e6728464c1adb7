# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The arguments of the operations that rotate, and their checks."""

from ... import errors
from ...runtime import contract, formats
from . import mla

MAX_HEAD_SIZE = 2048  # the largest that one warp holds in its registers
ROUNDINGS = ("once", "steps")

# All arguments. An operation may lack some, or have other names for them.
ROLES = (
    "positions", "query", "key", "value", "cos_sin_cache", "key_cache", "value_cache",
    "slot_mapping", "out", "q_norm_weight", "k_norm_weight", "q_scale", "k_scale", "v_scale",
    "k_scale_cache", "v_scale_cache",
)  # fmt: skip


class Arguments:
    """The checked arguments of a signature: an attribute for each of `ROLES`, and one for each
    option. Rows are [token, head, element]."""

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
        """Find the sizes of heads, and make the checks of operations that write caches."""
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
                    got = (
                        f"{list(self.given[role].shape)}, {errors.counted(array.shape[1], 'head')}"
                    )
                    expected = f"{errors.counted(expected, 'head')} like key_cache"
                    self.refuse("shape", role, expected, got)
        if self.out is None:
            self.check.writable(names["query"], self.query, rows=True)
        if self.key is not None and self.key_in_place:
            self.check.writable(names["key"], self.key, rows=True)

    def _by_head(self, role, size):
        """The checked rows of ``role`` as [token, head, element]; the argument may have heads and
        elements in one dimension. None where it is absent."""
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
            expected = f"three sections of {errors.counted(self.rotary // 2, 'pair')} in all"
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
            expected = f"{errors.counted(self.heads, 'head')} like {self.names['query']}"
            self.refuse("shape", "out", expected, got)
        self.check.writable("out", self.out, rows=True)
        self.steps["q_scale"] = self.check.head_scale("q_scale", self.q_scale, self.heads)
