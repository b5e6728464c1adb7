# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""One small, ordinary call of every operation: for tests of what all have in common (graph capture,
streams, threads). What each operation does is tested in its own file.

A case is made by ``CASES[name](rng)``: a `Case` whose `call(world)` runs the operation on the
world's arrays and whose `expected()` does the same with plain loops on NumPy copies.
"""

import functools
import sys

import ml_dtypes
import numpy as np
import oracle
import worlds

import cupy_cache as cc
from cupy_cache.runtime import arrays


class Case:
    """``specs``: every view involved. ``written``: those whose buffers the call changes."""

    def __init__(self, specs, written, run, expected, on_host=()):
        self.specs, self.written, self.on_host = specs, written, on_host
        self._run, self._expected = run, expected

    def call(self, world):
        """Run the operation on arrays of ``world``."""
        self._run(*self.put(world))

    def bind(self, world):
        """The call as a function of nothing, with all arrays made beforehand."""
        put = self.put(world)
        return lambda: self._run(*put)

    def put(self, world):
        """The world's arrays for ``specs``."""
        return [world.put_on_host(s) if s in self.on_host else world.put(s) for s in self.specs]

    def expected(self, calls=1):
        """The bytes of each written spec's buffer after so many calls, by `id` of the buffer."""
        copies = {id(s.buffer): s.buffer.bytes.copy() for s in self.specs}
        for _ in range(calls):  # some rotate in place
            self._expected(*(s.on(copies[id(s.buffer)]) for s in self.specs))
        return {id(s.buffer): copies[id(s.buffer)] for s in self.written}

    def check(self, world, calls=1):
        """Compare the world's memory with the loops' result."""
        for buffer, expected in self.expected(calls).items():
            spec = next(s for s in self.written if id(s.buffer) == buffer)
            np.testing.assert_array_equal(world.bytes_of(spec), expected)


def _flash(rng):
    specs = [
        worlds.array(rng, (9, 4, 64), "bfloat16"),
        worlds.array(rng, (9, 4, 64), "bfloat16"),
        worlds.array(rng, (5, 16, 4, 64), "bfloat16"),
        worlds.array(rng, (5, 16, 4, 64), "bfloat16"),
        worlds.of_values(rng.permutation(80)[:9]),
    ]
    return Case(specs, specs[2:4], cc.reshape_and_cache_flash, oracle.reshape_and_cache_flash)


def _x_packed(rng):
    specs = [
        worlds.array(rng, (19, 4, 64), "float16"),
        worlds.array(rng, (19, 4, 64), "float16"),
        worlds.array(rng, (5, 4, 8, 16, 8), "float16"),
        worlds.array(rng, (5, 4, 64, 16), "float16"),
        worlds.of_values(np.arange(19)),
    ]
    return Case(specs, specs[2:4], cc.reshape_and_cache, oracle.reshape_and_cache)


def _mla_write(rng, kv_cache_dtype="auto"):
    entries = kv_cache_dtype == "fp8_ds_mla"
    dtype = "bfloat16" if kv_cache_dtype == "auto" else "uint8"
    specs = [
        worlds.of_values(rng.normal(size=(9, 512)).astype(ml_dtypes.bfloat16)),
        worlds.of_values(rng.normal(size=(9, 64)).astype(ml_dtypes.bfloat16)),
        worlds.array(rng, (5, 16, 656 if entries else 576), dtype),
        worlds.of_values(rng.permutation(80)[:9]),
        worlds.of_values(np.array([0.25], np.float32)),
    ]

    def run(kv_c, k_pe, kv_cache, slots, scale):
        cc.concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, kv_cache_dtype, scale)

    def expected(kv_c, k_pe, kv_cache, slots, scale):
        if entries:
            oracle.concat_and_cache_fp8_ds_mla(kv_c, k_pe, kv_cache, slots, "power_of_two")
        else:
            stored = oracle.STORED.get(kv_cache_dtype)
            oracle.concat_and_cache_mla(kv_c, k_pe, kv_cache, slots, scale[0], stored)

    return Case(specs, specs[2:3], run, expected)


def _mla_writes(rng):
    caches = [worlds.array(rng, (5, 16, 40), "bfloat16") for _ in range(3)]
    sources = [worlds.array(rng, (3, 9, size), "bfloat16") for size in (32, 8)]
    slots = worlds.of_values(np.stack([rng.permutation(80)[:9] for _ in caches]))

    def run(kv_c, k_pe, slots, *caches):
        cc.concat_and_cache_mla_grouped(kv_c, k_pe, list(caches), slots)

    def expected(kv_c, k_pe, slots, *caches):
        for layer in zip(kv_c, k_pe, caches, slots):
            oracle.concat_and_cache_mla(*layer)

    return Case([*sources, slots, *caches], caches, run, expected)


_PAIRS = [(0, 4), (2, 5), (0, 1)]


def _copy(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    return Case(
        specs,
        specs,
        lambda *caches: cc.copy_blocks(caches[:2], caches[2:], _PAIRS),
        lambda *caches: oracle.copy_blocks(caches, _PAIRS),
    )


def _copy_by_device_mapping(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    mapping = worlds.of_values(np.array(_PAIRS))
    return Case(
        [*specs, mapping],
        specs,
        lambda *args: cc.copy_blocks(args[:2], args[2:4], args[4]),
        lambda *args: oracle.copy_blocks(args[:4], args[4].tolist()),
    )


def _copy_mla(rng):
    specs = [worlds.array(rng, (6, 16, 72), "bfloat16") for _ in range(2)]
    return Case(
        specs,
        specs,
        lambda *caches: cc.copy_blocks_mla(caches, _PAIRS),
        lambda *caches: oracle.copy_blocks(caches, _PAIRS),
    )


def _copy_tokens(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    pairs = [(3, 70), (90, 4), (3, 5), (-1, 2)]
    return Case(
        specs,
        specs,
        lambda *caches: cc.copy_tokens(_layers(caches), pairs),
        lambda *caches: oracle.copy_tokens(caches, pairs),
    )


def _swap_out(rng):
    source, destination = (worlds.array(rng, (n, 16, 72), "bfloat16") for n in (6, 8))
    return Case(
        [source, destination],
        [destination],
        lambda src, dst: cc.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        lambda src, dst: oracle.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        on_host=[destination],
    )


def _swap_in(rng):
    source, destination = (worlds.array(rng, (n, 16, 72), "bfloat16") for n in (6, 8))
    return Case(
        [source, destination],
        [destination],
        lambda src, dst: cc.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        lambda src, dst: oracle.swap_blocks(src, dst, [(5, 0), (0, 7)]),
        on_host=[source],
    )


def _gather(rng):
    specs = [
        worlds.array(rng, (6, 16, 2, 64), "bfloat16"),
        worlds.array(rng, (40, 2, 64), "bfloat16"),
        worlds.of_values(rng.integers(0, 6, (3, 2)).astype(np.int32)),
        worlds.of_values(np.array([0, 17, 17, 35], np.int32)),
        worlds.of_values(np.array([3, 0, 14], np.int32)),
    ]
    return Case(specs, specs[1:2], cc.gather_cache, oracle.gather_cache)


def _sequences(rng):
    return [
        worlds.of_values(rng.integers(0, 6, (3, 2)).astype(np.int32)),
        worlds.of_values(np.array([0, 17, 17, 35], np.int32)),
        worlds.of_values(np.array([3, 0, 14], np.int32)),
    ]


def _cp_gather(rng):
    specs = [
        worlds.array(rng, (6, 16, 576), "bfloat16"),
        worlds.array(rng, (40, 576), "bfloat16"),
        *_sequences(rng),
    ]

    def run(src, dst, table, bounds, starts):
        cc.cp_gather_cache(src, dst, table, bounds, 3, starts)

    return Case(specs, specs[1:2], run, oracle.gather_cache)


def _gather_numbers(rng):
    codes = rng.integers(0, 0x7F, (6, 16, 48)).astype(np.uint8)  # none is NaN
    specs = [
        worlds.of_values(codes),
        worlds.array(rng, (40, 48), "bfloat16"),
        *_sequences(rng),
        worlds.of_values(np.array([0.75], np.float32)),
    ]

    def run(src, dst, table, bounds, starts, scale):
        cc.gather_and_maybe_dequant_cache(src, dst, table, bounds, None, 33, "fp8", scale, starts)

    def expected(src, dst, table, bounds, starts, scale):
        def token(block, offset):
            return oracle.dequantise(src[block, offset], scale[0], "float8_e4m3fn", dst.dtype)

        oracle.gather_cache(src, dst, table, bounds, starts, rows=33, token=token)

    return Case(specs, specs[1:2], run, expected)


def _gather_slots(rng):
    codes = rng.integers(0, 0x7F, (6, 16, 2, 24)).astype(np.uint8)  # none is NaN
    slots = rng.permutation(96)[:33].astype(np.int64)
    slots[[3, 17]] = -1
    specs = [
        worlds.of_values(codes),
        worlds.array(rng, (40, 2, 24), "bfloat16"),
        worlds.of_values(slots),
        worlds.of_values(np.array([0.75], np.float32)),
    ]

    def run(src, dst, slots, scale):
        cc.gather_slots(src, dst, slots, "fp8", scale)

    def expected(src, dst, slots, scale):
        def token(block, offset):
            return oracle.dequantise(src[block, offset], scale[0], "float8_e4m3fn", dst.dtype)

        oracle.gather_slots(src, dst, slots, token=token)

    return Case(specs, specs[1:2], run, expected)


def _gather_entries(rng):
    entries = rng.integers(0, 0x7F, (6, 16, 656)).astype(np.uint8)  # none is NaN
    scales = np.array([0.5, 1.0, 0.1, 3.0], np.float32)
    entries[..., 512:528] = scales.view(np.uint8)
    table, bounds, starts = _sequences(rng)
    bounds = worlds.of_values(np.array([0, 17, 17], np.int32))
    specs = [
        worlds.of_values(entries), worlds.array(rng, (35, 576), "bfloat16"), table, bounds, starts
    ]  # fmt: skip

    def run(src, dst, table, bounds, starts):
        cc.cp_gather_and_upconvert_fp8_kv_cache(src, dst, table, bounds, 3, starts)

    def expected(src, dst, table, bounds, starts):
        def token(block, offset):
            return oracle.fp8_ds_mla_token(src[block, offset], dst.dtype, dst.dtype)

        bounds = [*bounds, len(dst)]
        oracle.gather_cache(src, dst, table, bounds, starts, token=token)

    return Case(specs, specs[1:2], run, expected)


def _indexer_write(rng):
    specs = [
        worlds.of_values(rng.normal(size=(19, 128)).astype(np.float16)),
        worlds.array(rng, (5, 16, 132), "uint8"),
        worlds.of_values(rng.permutation(80)[:19]),
    ]
    return Case(
        specs,
        specs[1:2],
        lambda *args: cc.indexer_k_quant_and_cache(*args, 128, "ue8m0"),
        lambda *args: oracle.indexer_k_quant_and_cache(*args, 128, "ue8m0"),
    )


def _indexer_gather(rng):
    specs = [
        worlds.array(rng, (6, 16, 132), "uint8"),
        worlds.array(rng, (40, 128), "uint8"),
        worlds.array(rng, (40, 4), "uint8"),
        worlds.of_values(rng.integers(0, 6, (3, 2)).astype(np.int32)),
        worlds.of_values(np.array([0, 17, 17, 35], np.int32)),
    ]
    return Case(
        specs,
        specs[1:3],
        cc.cp_gather_indexer_k_quant_cache,
        lambda *args: oracle.cp_gather_indexer_k_quant_cache(*args, 128),
    )


def _slot_mapping(rng):
    specs = [
        worlds.of_values(rng.integers(0, 1000, (3, 2)).astype(np.int32)),
        worlds.of_values(rng.integers(0, 32, 9)),
        worlds.of_values(np.array([0, 4, 4, 9], np.int32)),
        worlds.array(rng, (12,), "int64"),
    ]
    return Case(
        specs,
        specs[3:],
        lambda table, positions, starts, out: cc.slot_mapping(
            table, positions, starts, 16, out=out
        ),
        lambda table, positions, starts, out: oracle.slot_mapping(
            table, positions, starts, 16, out
        ),
    )


def _slot_groups(rng):
    specs = [
        *(worlds.of_values(rng.integers(0, 1000, (4, n)).astype(np.int32)) for n in (2, 4)),
        worlds.of_values(np.array([3, -1, 0], np.int32)),
        worlds.of_values(rng.integers(0, 32, 9)),
        worlds.of_values(np.array([0, 4, 5, 9], np.int32)),
        worlds.array(rng, (2, 12), "int64"),
    ]

    def run(first, second, *step):
        cc.slot_mapping_groups([first, second], *step[:3], [16, 8], out=step[3])

    def expected(first, second, *step):
        oracle.slot_mapping_groups([first, second], *step[:3], [16, 8], step[3])

    return Case(specs, specs[5:], run, expected)


def _slopes(rng):
    spec = worlds.array(rng, (8,), "float32")

    def expected(out):
        out[:] = oracle.alibi_slopes(8)  # powers of two, exact in float32

    return Case([spec], [spec], lambda out: cc.alibi_slopes(8, out=out), expected)


def _placed(rng):
    spec = worlds.array(rng, (5,), "float32")
    slopes = [0.5, 0.25, -1.5, 3.0, 0.0]

    def expected(out):
        out[:] = slopes

    return Case([spec], [spec], lambda out: cc.place_slopes(slopes, out=out), expected)


def _bias(rng):
    specs = [
        worlds.of_values(np.array([0.5, 0.25, 0.75], np.float32)),
        worlds.of_values(rng.integers(0, 99, 4)),
        worlds.of_values(rng.integers(0, 99, 24)),
        worlds.array(rng, (3, 4, 24), "bfloat16"),
    ]
    return Case(
        specs,
        specs[3:],
        lambda *args: cc.alibi_bias(*args[:3], out=args[3], causal=True),
        lambda *args: oracle.alibi_bias(*args, causal=True),
    )


def _paged_attention(rng):
    """Each query is 32 times the key of one token, which alone counts: the results are exact."""
    keys = rng.choice([-1.0, 1.0], (6, 16, 2, 64))
    table, lens = np.array([[4, 1], [0, 3], [5, 2]], np.int32), np.array([20, 16, 1], np.int32)
    query = np.empty((3, 4, 64))
    for sequence, head in np.ndindex(3, 4):
        token = rng.integers(0, lens[sequence])
        query[sequence, head] = 32 * keys[table[sequence, token // 16], token % 16, head // 2]
    specs = [
        worlds.of_values(query.astype(ml_dtypes.bfloat16)),
        worlds.of_values(keys.astype(ml_dtypes.bfloat16)),
        worlds.of_values(rng.standard_normal((6, 16, 2, 64)).astype(ml_dtypes.bfloat16)),
        worlds.of_values(table),
        worlds.of_values(lens),
        worlds.array(rng, (3, 4, 64), "bfloat16"),
    ]

    def run(*args):
        cc.paged_attention(*args[:5], scale=1.0, out=args[5])

    def expected(query, keys, values, table, lens, out):
        seen, _ = oracle.tokens_seen(table, lens, None, 3, 6, 16)
        exact = oracle.paged_attention(query, keys, values, seen, scale=1.0)
        for row, (attended, _) in exact.items():
            out[row] = attended

    return Case(specs, specs[5:], run, expected)


def _paged_attention_mla(rng, kv_cache_dtype="auto"):
    """Each query is 32 times the rope part of one token, which alone counts: the results are
    exact."""
    entries = rng.choice([-1.0, 1.0], (6, 16, 576))
    table, lens = np.array([[4, 1], [0, 3], [5, 2]], np.int32), np.array([20, 16, 1], np.int32)
    query = np.zeros((3, 4, 576))
    for sequence, head in np.ndindex(3, 4):
        token = rng.integers(0, lens[sequence])
        query[sequence, head, 512:] = 32 * entries[table[sequence, token // 16], token % 16, 512:]
    raw = kv_cache_dtype == "auto"
    stored = entries.astype(ml_dtypes.bfloat16 if raw else ml_dtypes.float8_e4m3fn)
    specs = [
        worlds.of_values(query.astype(ml_dtypes.bfloat16)),
        worlds.of_values(stored if raw else stored.view(np.uint8)),
        worlds.of_values(table),
        worlds.of_values(lens),
        worlds.array(rng, (3, 4, 512), "bfloat16"),
    ]

    def run(*args):
        cc.paged_attention_mla(*args[:4], scale=1.0, out=args[4], kv_cache_dtype=kv_cache_dtype)

    def expected(query, entries, table, lens, out):
        seen, _ = oracle.tokens_seen(table, lens, None, 3, 6, 16)
        numbers = entries if raw else entries.view(ml_dtypes.float8_e4m3fn)
        keys = numbers[:, :, np.newaxis].astype(np.float64)
        exact = oracle.paged_attention(query, keys, keys[..., :512], seen, scale=1.0)
        for row, (attended, _) in exact.items():
            out[row] = attended

    return Case(specs, specs[4:], run, expected)


def _merge(rng):
    """One side alone counts, or both the same, or none: the results are exact."""
    rows = [rng.integers(-99, 99, (5, 3, 24)).astype(np.float16) for _ in "ps"]
    kinds = np.array([[0, 0], [0.5, -np.inf], [np.inf, 2], [-np.inf, -np.inf]], np.float32)
    lses = kinds[rng.integers(0, len(kinds), (3, 5))]
    specs = [
        worlds.array(rng, (5, 3, 24), "float16"),
        worlds.of_values(rows[0]),
        worlds.of_values(lses[..., 0]),
        worlds.of_values(rows[1]),
        worlds.of_values(lses[..., 1]),
        worlds.array(rng, (3, 5), "float32"),
    ]
    return Case(specs, [specs[0], specs[5]], cc.merge_attn_states, oracle.merge_attn_states)


def _layers(specs):
    """Two layers of keys and values."""
    return [(specs[0], specs[1]), (specs[2], specs[3])]


def _pack(rng, by_slot=False, layout="layer_first", on_host=False):
    specs = [worlds.array(rng, (6, 16, 2, 64), "uint16") for _ in range(4)]
    out = worlds.array(rng, (2 * 2 * 3 * 16 * 256,), "uint8")
    numbers = [70, -1, 3] if by_slot else [4, 0, 4]
    pack = cc.pack_tokens if by_slot else cc.pack_blocks
    return Case(
        [*specs, out],
        [out],
        lambda *args: pack(_layers(args), numbers, args[4], layout=layout),
        lambda *args: oracle.pack(_layers(args), numbers, args[4], layout, by_slot),
        on_host=[out] if on_host else (),
    )


def _unpack(rng, by_slot=False, layout="layer_first", on_host=False):
    specs = [worlds.array(rng, (6, 16, 2, 64), "uint16") for _ in range(4)]
    packed = worlds.array(rng, (2 * 2 * 3 * 16 * 256,), "uint8")
    numbers = worlds.of_values(np.array([70, -1, 3] if by_slot else [4, 0, 5]))
    unpack = cc.unpack_tokens if by_slot else cc.unpack_blocks
    return Case(
        [*specs, packed, numbers],
        specs,
        lambda *args: unpack(args[4], _layers(args), args[5], layout=layout),
        lambda *args: oracle.unpack(args[4], _layers(args), args[5], layout, by_slot),
        on_host=[packed] if on_host else (),
    )


def _zero(rng):
    specs = [worlds.array(rng, (6, 16, 2, 64), "bfloat16") for _ in range(4)]
    return Case(
        specs,
        specs,
        lambda *args: cc.zero_blocks(_layers(args), [4, 1]),
        lambda *args: oracle.zero_blocks(args, [4, 1]),
    )


def _ranges(rng):
    specs = [worlds.array(rng, (20000,), "uint8") for _ in range(2)]
    starts, sizes = np.array([[0, 9000, 17], [10000, 1, 9500]]), np.array([8192, 5000, 16])

    def call(*made):
        addresses = (arrays.view(array, "array").ptr for array in made)
        numbers = [*(a + s for a, s in zip(addresses, starts)), sizes]
        if type(made[0]).__module__ == "torch":  # whose current stream is taken
            numbers = [sys.modules["torch"].from_numpy(n) for n in numbers]
        cc.swap_blocks_batch(*numbers)

    def expected(source, destination):
        for of, to, size in zip(*starts, sizes):
            for byte in range(size):
                destination[to + byte] = source[of + byte]

    return Case(specs, specs[1:], call, expected)


def _convert(rng):
    specs = [
        worlds.array(rng, (7, 33), "uint8"),
        worlds.of_values(rng.standard_normal((7, 33)).astype(np.float16)),
    ]

    def expected(output, source):
        output[...] = oracle.quantise(source, 0.25, "float8_e4m3fn")

    return Case(specs, specs[:1], lambda out, source: cc.convert_fp8(out, source, 0.25), expected)


def _per_token_head(rng):
    specs = [
        worlds.of_values(rng.standard_normal((9, 4, 64)).astype(np.float16)),
        worlds.of_values(rng.standard_normal((9, 4, 64)).astype(np.float16)),
        worlds.array(rng, (5, 16, 4, 64), "uint8"),
        worlds.array(rng, (5, 16, 4, 64), "uint8"),
        worlds.array(rng, (5, 16, 4), "float32"),
        worlds.array(rng, (5, 16, 4), "float32"),
        worlds.of_values(rng.permutation(80)[:9]),
    ]
    return Case(
        specs,
        specs[2:6],
        lambda *args: cc.reshape_and_cache_flash_per_token_head(*args, "fp8"),
        lambda *args: oracle.reshape_and_cache_flash_per_token_head(*args, "float8_e4m3fn"),
    )


def _quarters(rng, size):
    """A table of angles that are quarters of a turn: what is made of small numbers is exact."""
    turns = rng.integers(0, 4, (12, size // 2))
    cosines, sines = np.array([[1, 0, -1, 0], [0, 1, 0, -1]], np.float32)[:, turns]
    return worlds.of_values(np.concatenate([cosines, sines], axis=1))


def _turn(arrays, table, positions, is_neox):
    for rows in arrays:
        for token, head in np.ndindex(*rows.shape[:2]):
            row = [(float(x), float(x)) for x in rows[token, head]]
            row = oracle.turned(row, table, [positions[token]], is_neox)
            rows[token, head] = [round((low + high) / 2) for low, high in row]


def _integers(rng, *shape):
    """None is 0, whose sign is lost."""
    return worlds.of_values(rng.integers(1, 99, shape).astype(ml_dtypes.bfloat16))


def _rotary(rng):
    specs = [
        worlds.of_values(rng.integers(0, 12, 9)), _integers(rng, 9, 4, 64),
        _integers(rng, 9, 2, 64), _quarters(rng, 64),
    ]  # fmt: skip

    def expected(positions, query, key, table):
        _turn((query, key), table, positions, is_neox=True)

    def run(positions, query, key, table):
        cc.rotary_embedding(positions, query, key, 64, table)

    return Case(specs, specs[1:3], run, expected)


def _mla_rotary(rng):
    specs = [
        worlds.of_values(rng.integers(0, 12, 9)), _integers(rng, 9, 4, 64), _integers(rng, 9, 64),
        worlds.array(rng, (9, 512), "bfloat16"), _quarters(rng, 64),
        worlds.of_values(rng.permutation(80)[:9]), worlds.array(rng, (5, 16, 576), "bfloat16"),
    ]  # fmt: skip

    def run(positions, q_pe, k_pe, kv_c, table, slots, kv_cache):
        cc.concat_and_cache_mla_rope_fused(
            positions, q_pe, k_pe, kv_c, table, False, slots, kv_cache
        )

    def expected(positions, q_pe, k_pe, kv_c, table, slots, kv_cache):
        _turn((q_pe, k_pe[:, np.newaxis]), table, positions, is_neox=False)
        oracle.concat_and_cache_mla(kv_c, k_pe, kv_cache, slots)

    return Case(specs, [specs[1], specs[2], specs[6]], run, expected)


def _rotary_write(rng):
    specs = [
        worlds.of_values(rng.integers(0, 12, 9)),
        *(_integers(rng, 9, heads, 64) for heads in (4, 2, 2)),
        _quarters(rng, 64),
        worlds.array(rng, (5, 16, 2, 64), "bfloat16"),
        worlds.array(rng, (5, 16, 2, 64), "bfloat16"),
        worlds.of_values(rng.permutation(80)[:9]),
    ]

    def expected(positions, query, key, value, table, key_cache, value_cache, slots):
        key = key.copy()
        _turn((query, key), table, positions, is_neox=True)
        oracle.reshape_and_cache_flash(key, value, key_cache, value_cache, slots)

    return Case(specs, [specs[1], *specs[5:7]], cc.rotary_and_cache, expected)


CASES = {
    "rotary_and_cache": _rotary_write,
    "rotary_embedding": _rotary,
    "concat_and_cache_mla_rope_fused": _mla_rotary,
    "reshape_and_cache_flash": _flash,
    "convert_fp8": _convert,
    "reshape_and_cache_flash_per_token_head": _per_token_head,
    "reshape_and_cache": _x_packed,
    "concat_and_cache_mla": _mla_write,
    "concat_and_cache_mla-fp8": functools.partial(_mla_write, kv_cache_dtype="fp8"),
    "concat_and_cache_mla-fp8_ds_mla": functools.partial(_mla_write, kv_cache_dtype="fp8_ds_mla"),
    "concat_and_cache_mla_grouped": _mla_writes,
    "copy_blocks": _copy,
    "copy_blocks-device": _copy_by_device_mapping,
    "copy_blocks_mla": _copy_mla,
    "copy_tokens": _copy_tokens,
    "swap_blocks-out": _swap_out,
    "swap_blocks-in": _swap_in,
    "swap_blocks_batch": _ranges,
    "pack_blocks": _pack,
    "pack_blocks-out": functools.partial(_pack, layout="page_first", on_host=True),
    "pack_tokens": functools.partial(_pack, by_slot=True, layout="page_first"),
    "unpack_blocks": _unpack,
    "unpack_blocks-in": functools.partial(_unpack, layout="page_first", on_host=True),
    "unpack_tokens": functools.partial(_unpack, by_slot=True, layout="page_first"),
    "zero_blocks": _zero,
    "gather_cache": _gather,
    "gather_slots": _gather_slots,
    "cp_gather_cache": _cp_gather,
    "gather_and_maybe_dequant_cache": _gather_numbers,
    "cp_gather_and_upconvert_fp8_kv_cache": _gather_entries,
    "indexer_k_quant_and_cache": _indexer_write,
    "cp_gather_indexer_k_quant_cache": _indexer_gather,
    "slot_mapping": _slot_mapping,
    "slot_mapping_groups": _slot_groups,
    "alibi_bias": _bias,
    "merge_attn_states": _merge,
    "paged_attention": _paged_attention,
    "paged_attention_mla": _paged_attention_mla,
    "paged_attention_mla-fp8": functools.partial(_paged_attention_mla, kv_cache_dtype="fp8"),
    "alibi_slopes": _slopes,
    "place_slopes": _placed,
}
