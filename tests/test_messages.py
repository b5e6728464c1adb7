# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Every error about an argument says the same things in the same form: the operation that was
called, what is wrong with which argument, what was expected and what came, and the way out where
there is a usual one. Nothing is written."""

import ast
import functools
import inspect
import itertools
import re
import types
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from surface import attention, calls

import cupy_cache as cc
from cupy_cache import errors
from cupy_cache.runtime import cuda, env, log

pytestmark = pytest.mark.whole

FORM = re.compile(
    r"(?P<op>[A-Za-z_][\w.]*): Invalid (?P<what>[a-z ]+) of (?P<argument>[\w.\[\]]+): "
    r"expected (?P<expected>.+?), got (?P<got>.+?)(?:; (?P<way_out>.+))?"
)
BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def write(op=cc.reshape_and_cache_flash, **change):
    """A call of a write with some arguments changed."""
    arguments = {
        "key": zeros(3, 2, 8), "value": zeros(3, 2, 8), "key_cache": zeros(5, 4, 2, 8),
        "value_cache": zeros(5, 4, 2, 8), "slot_mapping": np.arange(3),
    }  # fmt: skip
    if op is cc.reshape_and_cache:
        arguments |= {"key_cache": zeros(5, 2, 2, 4, 4), "value_cache": zeros(5, 2, 8, 4)}
    return lambda: op(**(arguments | change))


def mla(**change):
    arguments = {
        "kv_c": zeros(3, 8), "k_pe": zeros(3, 4), "kv_cache": zeros(5, 4, 12),
        "slot_mapping": np.arange(3),
    }  # fmt: skip
    return lambda: cc.concat_and_cache_mla(**(arguments | change))


STEP = zeros(1, 2, dtype=np.int32), np.array([6], np.int32)  # a block table, and lengths


def attend(dtype=np.float32, **options):
    """A call of attention, with caches of ``dtype``."""
    pages = zeros(5, 4, 2, 8, dtype=dtype)
    return lambda: cc.paged_attention(zeros(1, 2, 8), pages, pages, *STEP, **options)


def gather(op=cc.gather_cache, **change):
    arguments = {
        "src_cache": zeros(5, 4, 2, 8), "dst": zeros(6, 2, 8),
        "block_table": np.zeros((1, 2), int), "cu_seq_lens": np.array([0, 6]),
    }  # fmt: skip
    if op is cc.cp_gather_cache:
        arguments["batch_size"] = 1
    return lambda: op(**(arguments | change))


def copy(*arguments, keys=1, values=1):
    return lambda: cc.copy_blocks([zeros(5, 8)] * 0 + [zeros(5, 8) for _ in range(keys)],
                                  [zeros(5, 8) for _ in range(values)], *arguments)  # fmt: skip


def swap(*arguments, src=None, **options):
    return lambda: cc.swap_blocks(
        zeros(5, 8) if src is None else src, zeros(6, 8), *arguments, **options
    )


def caches(count=2, *shape, **options):
    shape = shape or (5, 4, 2, 8)
    sides = [[zeros(*shape) for _ in range(count)] for _ in "kv"]
    return cc.PagedKVCache(*sides, **options)


def allocate(**change):
    return lambda: cc.PagedKVCache.allocate(1, 5, 4, 2, 8, device="cpu", **change)


def tables():
    return cc.BlockTables(5, 4, max_sequences=2, max_tokens=8, max_length=8)


def slots(**change):
    arguments = {
        "block_table": np.zeros((1, 2), int), "positions": np.arange(3),
        "query_start_loc": np.array([0, 3]), "block_size": 4,
    }  # fmt: skip
    return lambda: cc.slot_mapping(**(arguments | change))


def groups(**change):
    arguments = {
        "block_tables": [np.zeros((1, 2), int)], "idx_mapping": None, "positions": np.arange(3),
        "query_start_loc": np.array([0, 3]), "block_sizes": [4],
    }  # fmt: skip
    return lambda: cc.slot_mapping_groups(**(arguments | change))


def readonly(array):
    array.flags.writeable = False
    return array


class OfNobody:
    """Of no framework."""


OfJax = type("DynamicJaxprTracer", (), {"__module__": "jax._src.interpreters.partial_eval"})


READ_ONLY = readonly(zeros(5, 4, 2, 8))
WIDE = zeros(3, 2, 16)[..., ::2]
SHARED = np.lib.stride_tricks.as_strided(zeros(80), (5, 4, 2, 8), (64, 32, 32, 4), writeable=True)

# (the call, operation, what, argument, words of the way out): a row for each kind of error.
TABLE = [
    # arrays
    (write(key=None), "reshape_and_cache_flash", "type", "key", ""),
    (write(key=[1.0]), "reshape_and_cache_flash", "type", "key", ""),
    (write(key=OfJax()), "reshape_and_cache_flash", "type", "key", "io_callback"),
    (
        write(key=zeros(3, 2, 8, dtype=BF16), value=zeros(3, 2, 8, dtype=BF16)),
        "reshape_and_cache_flash", "dtype", "key_cache", "has the dtype of key",
    ),
    (write(key_cache=OfNobody()), "reshape_and_cache_flash", "type", "key_cache", ""),
    (write(key=zeros(3, 2, 8, dtype=np.complex64)), "reshape_and_cache_flash", "dtype", "key", ""),
    (write(key=zeros(3, 2)), "reshape_and_cache_flash", "shape", "key", ""),
    (write(value=zeros(3, 4, 8)), "reshape_and_cache_flash", "shape", "value", ""),
    (write(key_cache=READ_ONLY), "reshape_and_cache_flash", "access", "key_cache", "in place"),
    (write(key=WIDE), "reshape_and_cache_flash", "strides", "key", ""),
    (write(key_cache=SHARED), "reshape_and_cache_flash", "strides", "key_cache", ""),
    (write(slot_mapping=np.arange(4)), "reshape_and_cache_flash", "shape", "slot_mapping", ""),
    (write(slot_mapping=zeros(3)), "reshape_and_cache_flash", "dtype", "slot_mapping", ""),
    (write(slot_mapping=np.array(3)), "reshape_and_cache_flash", "shape", "slot_mapping", ""),
    (write(stream="s"), "reshape_and_cache_flash", "type", "stream", ""),
    (write(stream=True), "reshape_and_cache_flash", "type", "stream", ""),
    (write(stream=-1), "reshape_and_cache_flash", "value", "stream", ""),
    (write(stream=2**64), "reshape_and_cache_flash", "value", "stream", ""),
    (slots(stream=-(2**70)), "slot_mapping", "value", "stream", ""),
    # options
    (write(kv_cache_dtype="fp9"), "reshape_and_cache_flash", "value", "kv_cache_dtype", ""),
    (
        write(kv_cache_dtype=np.dtype(FP8)),
        "reshape_and_cache_flash", "value", "kv_cache_dtype", "'fp8' is it",
    ),
    (
        mla(kv_cache_dtype="half"), "concat_and_cache_mla", "value", "kv_cache_dtype",
        "'float16' is it",
    ),
    (
        write(kv_cache_dtype="int8_per_token_head"),
        "reshape_and_cache_flash", "value", "kv_cache_dtype",
        "reshape_and_cache_flash_per_token_head writes such caches",
    ),
    (write(kv_cache_dtype="fp8", k_scale=0.0), "reshape_and_cache_flash", "value", "k_scale", ""),
    (write(kv_cache_dtype="fp8", k_scale=True), "reshape_and_cache_flash", "value", "k_scale", ""),
    (write(kv_cache_dtype="fp8", v_scale=[0.5]), "reshape_and_cache_flash", "type", "v_scale", ""),
    (mla(kv_cache_dtype="fp8", scale="0.5"), "concat_and_cache_mla", "type", "scale", ""),
    (mla(kv_cache_dtype="fp8", scale=-1.0), "concat_and_cache_mla", "value", "scale", ""),
    (mla(scale_rule="most"), "concat_and_cache_mla", "value", "scale_rule", ""),
    # what is right for another operation, or another option
    (
        write(key_cache=zeros(5, 2, 4, 8), value_cache=zeros(5, 2, 4, 8)),
        "reshape_and_cache_flash", "shape", "key_cache", "HND cache give the view",
    ),
    (
        write(key_cache=zeros(5, 2, 2, 4, 4)),
        "reshape_and_cache_flash", "shape", "key_cache", "reshape_and_cache",
    ),
    (
        write(cc.reshape_and_cache, key_cache=zeros(5, 4, 2, 8)),
        "reshape_and_cache", "shape", "key_cache", "reshape_and_cache_flash",
    ),
    (
        write(key=zeros(3, 2, 8, dtype=BF16), value=zeros(3, 2, 8, dtype=BF16),
              key_cache=zeros(5, 4, 2, 8, dtype=FP8)),
        "reshape_and_cache_flash", "dtype", "key_cache", "kv_cache_dtype='fp8'",
    ),
    (
        write(key=zeros(3, 2, 8, dtype=BF16), value=zeros(3, 2, 8, dtype=BF16),
              key_cache=zeros(5, 4, 2, 8, dtype=np.int8)),
        "reshape_and_cache_flash", "dtype", "key_cache", "kv_cache_dtype='int8'",
    ),
    (
        write(key_cache=zeros(5, 4, 2, 8, dtype=np.uint8)),
        "reshape_and_cache_flash", "dtype", "key_cache", "kv_cache_dtype says",
    ),
    (
        mla(kv_cache=zeros(5, 4, 12, dtype=ml_dtypes.float8_e5m2)),
        "concat_and_cache_mla", "dtype", "kv_cache", "kv_cache_dtype='fp8_e5m2'",
    ),
    # reads, too
    (attend(dtype=FP8), "paged_attention", "dtype", "key_cache", "kv_cache_dtype='fp8'"),
    (attend(dtype=np.uint8), "paged_attention", "dtype", "key_cache", "kv_cache_dtype says"),
    (attend(dtype=BF16), "paged_attention", "dtype", "query", "that of a raw key_cache"),
    (
        lambda: cc.paged_attention_mla(
            zeros(1, 2, 576), zeros(5, 4, 576, dtype=BF16), *STEP, scale=1.0
        ),
        "paged_attention_mla", "dtype", "query", "that of a raw kv_cache",
    ),
    (
        lambda: cc.paged_attention_mla(
            zeros(1, 2, 576), zeros(5, 4, 576, dtype=FP8), *STEP, scale=1.0
        ),
        "paged_attention_mla", "dtype", "kv_cache", "kv_cache_dtype='fp8'",
    ),
    (
        gather(src_cache=zeros(5, 4, 2, 8, dtype=FP8)),
        "gather_cache", "dtype", "dst", "gather_and_maybe_dequant_cache",
    ),
    (
        lambda: cc.gather_slots(
            zeros(5, 4, 2, 8, dtype=np.int8), zeros(3, 2, 8), np.arange(3)
        ),
        "gather_slots", "dtype", "dst", "kv_cache_dtype='int8'",
    ),
    (gather(src_cache=zeros(5, 4, 2, 8, dtype=BF16)), "gather_cache", "dtype", "dst", ""),
    # other operations
    (mla(kv_cache=zeros(5, 4, 13)), "concat_and_cache_mla", "shape", "kv_cache", ""),
    (gather(layout="NDH"), "gather_cache", "value", "layout", ""),
    (gather(cu_seq_lens=np.array([0, 3, 6])), "gather_cache", "shape", "cu_seq_lens", ""),
    (gather(src_cache=zeros(5, 0, 2, 8)), "gather_cache", "shape", "src_cache", ""),
    (gather(cc.cp_gather_cache, batch_size=True), "cp_gather_cache", "value", "batch_size", ""),
    (gather(cc.cp_gather_cache, batch_size=2), "cp_gather_cache", "value", "batch_size", ""),
    (copy([(0, 5)]), "copy_blocks", "value", "block_mapping", ""),
    (copy([(0, 1), (2, 1)]), "copy_blocks", "value", "block_mapping", ""),
    (copy([(0, 1), (1, 2)]), "copy_blocks", "value", "block_mapping", "two calls"),
    (copy([(0, 1, 2)]), "copy_blocks", "shape", "block_mapping", ""),
    (copy([(0.5, 1)]), "copy_blocks", "shape", "block_mapping", ""),
    (copy({0: [1]}), "copy_blocks", "type", "block_mapping", ""),
    (copy([(0, 1)], values=2), "copy_blocks", "length", "value_caches", ""),
    (lambda: cc.copy_blocks(zeros(5, 8), [], []), "copy_blocks", "type", "key_caches", ""),
    (
        lambda: cc.copy_blocks([zeros(5, 8), zeros(5, 9)], [zeros(5, 8)] * 2, [(0, 1)]),
        "copy_blocks", "shape", "key_caches[1]", "",
    ),
    (swap([(0, 6)]), "swap_blocks", "value", "block_mapping", ""),
    (swap([(0, 1)], block_size_in_bytes=0), "swap_blocks", "value", "block_size_in_bytes", ""),
    (swap([(0, 1)], src=zeros(5, 9)), "swap_blocks", "shape", "dst", ""),
    (lambda: cc.zero_blocks([zeros(5, 8)], [5]), "zero_blocks", "value", "block_ids", ""),
    (lambda: cc.zero_blocks([zeros(5, 8)], ["a"]), "zero_blocks", "type", "block_ids", ""),
    (lambda: cc.zero_blocks([zeros(5, 8)], [[1]]), "zero_blocks", "shape", "block_ids", ""),
    (
        lambda: cc.pack_blocks([zeros(5, 8)], [1], zeros(31, dtype=np.uint8)),
        "pack_blocks", "size", "out", "",
    ),
    (
        lambda: cc.unpack_blocks(zeros(64, dtype=np.uint8), [zeros(5, 8)], [1, 1]),
        "unpack_blocks", "value", "block_ids", "",
    ),
    (lambda: cc.packed_size([zeros(5, 8)]), "packed_size", "value", "num_blocks", ""),
    (
        lambda: cc.packed_size([zeros(5, 8)], num_blocks=-1),
        "packed_size", "value", "num_blocks", "",
    ),
    (
        lambda: cc.swap_blocks_batch(*np.array([[1], [2], [-3]])),
        "swap_blocks_batch", "value", "sizes", "",
    ),
    (
        lambda: cc.convert_fp8(zeros(4, dtype=np.uint8), zeros(5), 1.0, "fp8"),
        "convert_fp8", "shape", "input", "",
    ),
    (slots(block_size=0), "slot_mapping", "value", "block_size", ""),
    (slots(cp_rank=1), "slot_mapping", "value", "cp_rank", ""),
    (slots(stream=object()), "slot_mapping", "type", "stream", ""),
    (groups(block_tables=[]), "slot_mapping_groups", "length", "block_tables", ""),
    (groups(block_sizes=4), "slot_mapping_groups", "value", "block_sizes", ""),
    (groups(stream=1.5), "slot_mapping_groups", "type", "stream", ""),
    (
        lambda: cc.alibi_bias(zeros(2), np.arange(2), np.arange(2), dtype="float12"),
        "alibi_bias", "value", "dtype", "",
    ),
    (
        lambda: cc.alibi_bias(zeros(2), np.arange(2), np.arange(2), stream="s"),
        "alibi_bias", "type", "stream", "",
    ),
    (allocate(dtype="bf16"), "PagedKVCache.allocate", "value", "dtype", "'bfloat16' is it"),
    (allocate(dtype=np.float32(1)), "PagedKVCache.allocate", "value", "dtype", ""),
    (attend(soft_cap=0), "paged_attention", "value", "soft_cap", "None is no cap"),
    (attend(soft_cap=-1.0), "paged_attention", "value", "soft_cap", ""),
    (attend(sliding_window=-1), "paged_attention", "value", "sliding_window", "no window"),
    (lambda: cc.alibi_slopes(0), "alibi_slopes", "value", "num_heads", ""),
    (lambda: cc.alibi_slopes(8, device="gpu"), "alibi_slopes", "value", "device", ""),
    (
        lambda: cc.alibi_slopes(8, framework="jax"),
        "alibi_slopes", "value", "framework", "give JAX a view",
    ),
    (lambda: cc.alibi_slopes(8, framework="mlx"), "alibi_slopes", "value", "framework", ""),
    (lambda: cc.place_slopes(["a"]), "place_slopes", "value", "slopes", ""),
    (lambda: cc.raise_faults("gpu"), "raise_faults", "value", "device", ""),
    (lambda: cc.warmup(0, 8, 4), "warmup", "value", "num_kv_heads", ""),
    (lambda: cc.warmup(2, 8, 4, device="cpu"), "warmup", "value", "device", ""),
    (allocate(dtype="fp8"), "PagedKVCache.allocate", "value", "dtype", "kv_cache_dtype='fp8'"),
    (allocate(kv_cache_dtype="nvfp4"), "PagedKVCache.allocate", "value", "kv_cache_dtype", ""),
    # the bookkeeping
    (lambda: tables().step(["a"], 1), "BlockTables.step", "type", "counts", ""),
    (lambda: tables().step(["a"], [1]), "BlockTables.step", "value", "sequences", ""),
    (lambda: tables().step("request", [1]), "BlockTables.step", "type", "sequences", ""),
    (lambda: tables().step(["a"], []), "BlockTables.step", "length", "counts", ""),
    (lambda: tables().append("a", 1), "BlockTables.append", "value", "sequence", ""),
    # the object of all layers: its own name, its methods', and its arguments'
    (lambda: caches(v_scales=[1.0]), "PagedKVCache", "length", "v_scales", ""),
    (
        lambda: caches(kv_cache_dtype="fp8", k_scales=-1.0),
        "PagedKVCache", "value", "k_scales", "",
    ),
    (lambda: cc.PagedKVCache(zeros(5, 8), []), "PagedKVCache", "type", "key_caches", ""),
    (lambda: cc.PagedKVCache([zeros(5, 8)], []), "PagedKVCache", "length", "value_caches", ""),
    (
        lambda: cc.PagedKVCache([READ_ONLY], [READ_ONLY]),
        "PagedKVCache", "access", "key_caches", "in place",
    ),
    (
        lambda: cc.PagedKVCache([zeros(5, 4, 12)], v_scales=1.0),
        "PagedKVCache", "value", "v_scales", "",
    ),
    (
        lambda: caches().copy_blocks([(0, 5)]),
        "PagedKVCache.copy_blocks", "value", "block_mapping", "",
    ),
    (
        lambda: caches().write(0, zeros(3, 2, 8), zeros(3, 2, 9), np.arange(3)),
        "PagedKVCache.write", "shape", "value_cache", "",
    ),
    (
        lambda: caches().writer(1)(zeros(3, 2, 8), zeros(3, 2, 8), np.arange(4)),
        "PagedKVCache.write", "shape", "slot_mapping", "",
    ),
    (
        lambda: caches().write(2, zeros(3, 2, 8), zeros(3, 2, 8), np.arange(3)),
        "PagedKVCache.write", "value", "layer", "",
    ),
    (
        lambda: caches().write(-1, zeros(3, 2, 8), zeros(3, 2, 8), np.arange(3)),
        "PagedKVCache.write", "value", "layer", "",
    ),
    (lambda: caches().writer([0]), "PagedKVCache.writer", "value", "layer", ""),
    (lambda: cc.PagedKVCache([], []).writer(0), "PagedKVCache.writer", "value", "layer", ""),
    (
        lambda: caches().swap_blocks(caches(2, 5, 4, 2, 9), [(0, 1)]),
        "PagedKVCache.swap_blocks", "shape", "other.key_caches", "",
    ),
    (
        lambda: caches().swap_blocks(caches(3), [(0, 1)]),
        "PagedKVCache.swap_blocks", "length", "other.key_caches", "",
    ),
    (
        lambda: caches().swap_blocks(cc.PagedKVCache([zeros(5, 4, 12)] * 1), [(0, 1)]),
        "PagedKVCache.swap_blocks", "kind", "other", "",
    ),
    (lambda: caches().swap_blocks([], [(0, 1)]), "PagedKVCache.swap_blocks", "type", "other", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    "call, op, what, argument, way_out", TABLE,
    ids=[f"{at}-{row[1]}-{row[2]}-{row[3]}" for at, row in enumerate(TABLE)],
)  # fmt: skip
def test_form(call, op, what, argument, way_out):
    with pytest.raises(cc.CupyCacheError) as caught:
        call()
    text = str(caught.value)
    found = FORM.fullmatch(text)
    assert found is not None, text
    assert (found["op"], found["what"], found["argument"]) == (op, what, argument), text
    assert way_out in (found["way_out"] or ""), text
    assert bool(way_out) == bool(found["way_out"]), text


def test_shapes_that_do_not_agree():
    """What is known of the sizes is said, and which argument has the other."""
    for change, expected in (
        ({"key_cache": zeros(5, 4, 2, 9)},
         "key_cache: expected [num_blocks=5, block_size=4, num_kv_heads=2, head_size=8], got "
         "[5, 4, 2, 9] (head_size = 9 where key has 8)"),
        ({"value": zeros(3, 1, 8)},
         "value: expected [_, num_kv_heads=2, head_size_v], got [3, 1, 8] (num_kv_heads = 1 where "
         "key has 2)"),
        ({"value_cache": zeros(6, 4, 2, 8)},
         "value_cache: expected [num_blocks=5, block_size=4, num_kv_heads=2, head_size_v=8], got "
         "[6, 4, 2, 8] (num_blocks = 6 where key_cache has 5)"),
        ({"key": zeros(3, 2, 8, 1)},
         "key: expected [_, num_kv_heads, head_size], got [3, 2, 8, 1] (4 dimensions)"),
    ):  # fmt: skip
        with pytest.raises(cc.ShapeError) as raised:
            write(**change)()
        assert str(raised.value) == f"reshape_and_cache_flash: Invalid shape of {expected}"


def test_every_fault_has_the_form():
    fault = cc.Fault("gather_cache", "block_table", 3, -7, 12, "cuda:1")
    found = FORM.fullmatch(str(fault))
    assert found["op"] == "gather_cache" and found["argument"] == "block_table"
    assert found["expected"] == "0..11" and found["got"] == "-7 in row 3 on cuda:1"


@pytest.mark.whole
@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cc.zero_blocks([cache], [0]),
        lambda cache: cc.pack_tokens([cache], [-1, 2], np.zeros(64, np.uint8)),
        lambda cache: cc.copy_blocks([cache], [cache.copy()], [(0, 1)]),
        lambda cache: cc.swap_blocks(np.zeros((2, 4, 8)), cache, np.array([[1, 0]])),
        lambda cache: (cc.gather_slots(cache, np.zeros((1, 8)), np.array([0])), cc.raise_faults()),
    ],
    ids=["zero_blocks", "pack_tokens", "copy_blocks", "swap_blocks", "gather_slots"],
)
def test_numbers_of_what_there_is_none_of(call):
    """A cache without blocks: nothing is expected in 0..-1."""
    with pytest.raises(cc.CupyCacheError, match="expected .*no .*, as there are none, got") as told:
        call(np.zeros((0, 4, 8)))
    assert "..-1" not in str(told.value)


def test_every_message_of_the_sources_has_the_form():
    """Also those that no row above provokes: `errors.wrong` alone makes errors about arguments."""
    kinds = {kind.__name__ for kind in errors._CLASSES.values()}
    package, found, others = Path(inspect.getfile(cc)).parent, 0, []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in kinds:
                others.append(f"{path.name}:{node.lineno}")
            elif called == "wrong" and isinstance(node.args[0], ast.Constant):
                found += 1
                assert node.args[0].value in errors._CLASSES, f"{path.name}:{node.lineno}"
    assert found > 200 and not others, "\n".join(others)


def test_numbers_of_things_are_counted():
    """No message says "1 rows": `errors.counted` writes a number and what it counts."""
    package, uncounted = Path(inspect.getfile(cc)).parent, []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else ()
            for number, behind in itertools.pairwise(parts):
                if _is_number(number) and isinstance(behind, ast.Constant):
                    noun = re.match(r" (?:new )?(\w+s)\b", behind.value)
                    if noun and noun[1] in NOUNS:
                        uncounted.append(f"{path.name}:{node.lineno}: {noun[1]}")
    assert not uncounted, "\n".join(uncounted)


NOUNS = {
    "columns", "entries", "heads", "items", "kernels", "lanes", "layers", "pairs", "rows",
    "sequences", "slots", "tokens",
}  # fmt: skip


def _is_number(part):
    """Whether a part of an f-string is a number that may be 1: no constant, and not formatted."""
    if not isinstance(part, ast.FormattedValue) or part.format_spec:
        return False
    name = getattr(part.value, "attr", getattr(part.value, "id", ""))
    return not name.strip("_").isupper()


def test_what_is_expected_of_numbers():
    assert [errors.below(limit) for limit in (2, 1)] == ["0..1", "0..0"]
    of_blocks = [errors.below(limit, "blocks") for limit in (2, 1)]
    assert of_blocks == ["blocks in 0..1", "blocks in 0..0"]
    assert [errors.below(limit) for limit in (0, -1)] == ["no number, as there are none"] * 2
    assert errors.below(0, "blocks") == "no blocks, as there are none"


class Unwilling:
    """Whatever it is asked, it raises."""

    def __repr__(self):
        raise RuntimeError("no")

    __str__ = __bool__ = __index__ = __len__ = __eq__ = __hash__ = __iter__ = __getitem__ = __repr__
    __float__ = __array__ = __getattribute__ = __repr__


class UnwillingList(list):
    __repr__ = __len__ = __iter__ = __getitem__ = __bool__ = Unwilling.__repr__


class UnwillingText(str):
    __repr__ = __eq__ = __hash__ = Unwilling.__repr__


GONE = weakref.proxy(Unwilling())
UNWILLING = {
    "unwilling": Unwilling(), "gone": GONE, "digits": 10**5000, "list": UnwillingList([1]),
    "text": UnwillingText("fp9"),
}  # fmt: skip


def told(call):
    """The message of a call that is refused; None where it is not."""
    try:
        call()
    except cc.FaultError:  # of what was given as it should be
        return None
    except cc.CupyCacheError as error:
        return str(error)
    return None


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k == "unwilling" else pytest.mark.extra) for k in UNWILLING],
)
def test_what_refuses_to_be_looked_at(kind):
    """As any argument of any function, and within a list."""
    rng = np.random.default_rng(0)
    for make in (*calls.ORDINARY, *attention.MAKERS):
        made = make(rng)
        function = getattr(cc, made.name)
        for name in inspect.signature(function).parameters:
            if name == "size_and_mapping":
                continue
            for value in (UNWILLING[kind], [UNWILLING[kind]]):
                given = made.objects() | {name: value}
                text = told(functools.partial(function, **given))
                if text is not None and "is needed" not in text:  # CuPy, where a framework is asked
                    assert FORM.fullmatch(text), (made.name, name, text)
                    assert "\n" not in text
    told(cc.raise_faults)


def of_tables(method, *arguments):
    """A call of a method of new `BlockTables`."""

    def call():
        made = cc.BlockTables(5, 2, max_sequences=2, max_tokens=8, max_length=8)
        made.add("a", [1])
        getattr(made, method)(*arguments)

    return call


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["unwilling", "gone"])
def test_what_refuses_to_be_looked_at_by_objects(kind):
    value, pages = UNWILLING[kind], caches()
    attend = functools.partial(pages.attend, 0, zeros(1, 2, 8), *STEP)
    for call in (
        of_tables("add", value), of_tables("length", value), of_tables("fork", "a", value),
        of_tables("step", value, [1]), of_tables("step", ["a"], value),
        of_tables("reorder", [value], ["a"]), of_tables("schedule", value),
        of_tables("append", "a", value), of_tables("swap_out", value),
        lambda: attend(scale=value), lambda: attend(soft_cap=value),
        lambda: attend(sinks=value), lambda: attend(alibi_slopes=value),
        lambda: pages.gather(0, STEP[0], np.array([0, 6]), out=value),
        lambda: pages.swap_blocks(value, [(0, 1)]),
        lambda: pages.pack_blocks([0], zeros(2**12), layout=value),
        lambda: cc.PagedKVCache(value), lambda: cc.PagedKVCache([zeros(5, 8)], v_scales=value),
        lambda: caches(k_scales=[value] * 2, kv_cache_dtype="fp8"),
        lambda: cc.SwapSpace(value, 1), lambda: cc.BlockPool(value), lambda: cc.overlap(value),
        allocate(layout=value), allocate(kv_cache_dtype=value), allocate(framework=value),
        lambda: cc.packed_size([zeros(5, 8)], num_blocks=1, num_tokens=value),
        lambda: cc.flash_attn.flash_attn_with_kvcache(
            zeros(1, 1, 2, 8), zeros(5, 4, 2, 8), zeros(5, 4, 2, 8), window_size=value
        ),
    ):  # fmt: skip
        text = told(call)
        assert text is not None and FORM.fullmatch(text), text


def test_numbers_of_thousands_of_digits():
    """Python itself does not show them."""
    many = 10**5000
    assert "got an object of type int" in told(lambda: cc.alibi_slopes(many))
    assert "got an object of type int in row 0" in told(copy([(many, 1)]))
    for call in (lambda: cc.BlockPool(2).take(many), of_tables("step", ["a"], [many])):
        assert FORM.fullmatch(told(call))
    # A negative slot is padding, however negative.
    cache = np.arange(12.0).reshape(3, 4)
    cc.copy_tokens([cache], [(-many, -many), (0, 3)])
    np.testing.assert_array_equal(cache, [[0, 1, 2, 0], [4, 5, 6, 7], [8, 9, 10, 11]])


def test_variables_of_thousands_of_digits(monkeypatch):
    """Nobody could catch what would be raised at import."""
    for variable, read in ((env.DEBUG, lambda: env.flag(env.DEBUG)), (env.LOGLEVEL, log.configure)):
        monkeypatch.setenv(variable.name, "9" * 5000)
        monkeypatch.setattr(env, "_said", set())
        with pytest.warns(RuntimeWarning, match=f"{variable.name}: expected .* got '999"):
            assert not read()


def test_an_index_that_ends_an_iteration():
    """A StopIteration would end `map` early, and the rest would be dropped without a word."""

    class Ends:
        def __index__(self):
            raise StopIteration

    cache, other = np.arange(8.0).reshape(4, 2), np.zeros((4, 2))
    for pairs in ([(0, 1), (2, Ends())], [(0, 1), (Ends(), Ends())]):
        text = told(lambda pairs=pairs: cc.copy_blocks([cache], [other], pairs))
        assert "(source, destination) pairs of integers" in text
    np.testing.assert_array_equal(cache, np.arange(8.0).reshape(4, 2))


def test_stand_ins_of_arrays():
    """They are read by what they offer, whatever others of their type stand for."""
    torch = pytest.importorskip("torch")
    first, second = np.ones((3, 4)), torch.ones(3, 4)
    for array in (first, second, np.ones((3, 4))):
        cc.zero_blocks([weakref.proxy(array)], [1])
        assert array.tolist() == [[1] * 4, [0] * 4, [1] * 4]


def test_messages_are_of_one_line():
    text = told(lambda: cc.alibi_slopes(np.zeros((3, 3))))
    assert FORM.fullmatch(text) and text.endswith("[0., 0., 0.]])")
    mute = type("Mute", (Exception,), {"__str__": Unwilling.__repr__})()
    assert cuda.named(mute) == "Mute: an object of type Mute"
    broken = types.SimpleNamespace(__dlpack__=lambda **_: 1 // 0, __dlpack_device__=lambda: 1 // 0)
    assert FORM.fullmatch(told(lambda: cc.zero_blocks([broken], [1])))


def test_without_an_operation():
    assert str(errors.wrong("value", "axis", 1, 2)) == "Invalid value of axis: expected 1, got 2"


def test_what_is_no_stream():
    of = types.SimpleNamespace
    for stream, kind in (
        ("s", "str"), (of(ptr="5"), "SimpleNamespace"), (of(ptr=5.0), "SimpleNamespace"),
        (of(cuda_stream=True), "SimpleNamespace"),
        (of(__cuda_stream__=(0, b"5")), "SimpleNamespace"),
    ):  # fmt: skip
        with pytest.raises(cc.DTypeError) as raised:
            write(stream=stream)()
        assert str(raised.value) == (
            "reshape_and_cache_flash: Invalid type of stream: expected an integer address or an "
            f"object with __cuda_stream__, ptr or cuda_stream, got {kind}"
        )
    for stream in (-1, 2**64):
        with pytest.raises(cc.ArgumentError) as raised:
            write(stream=stream)()
        assert str(raised.value) == (
            "reshape_and_cache_flash: Invalid value of stream: expected the address of a stream, "
            f"of at most 64 bits, got {stream}"
        )
    for stream in (0, 2**64 - 1):
        write(stream=types.SimpleNamespace(ptr=stream))()


def test_other_arguments_have_their_callers_names():
    """What an error expects, or what came, may be told of another argument."""
    pages, query = zeros(3, 4, 2, 8), zeros(2, 1, 2, 8)
    table, lens = zeros(2, 1, dtype=np.int32), np.array([1, 2], np.int32)
    with pytest.raises(cc.ArgumentError, match="of v_cache: .* got some that k_cache has too$"):
        cc.flash_attn.flash_attn_with_kvcache(
            query, pages, pages, query, query, cache_seqlens=lens, block_table=table, causal=True
        )
    one, two = (
        cc.PagedKVCache(*([pages.copy() for _ in range(layers)] for _ in range(2)))
        for layers in (1, 2)
    )
    expected = "of other.key_caches: expected as many layers as key_caches, 2, got 1"
    with pytest.raises(cc.ArgumentError, match=re.escape(expected)):
        two.swap_blocks(one, [(0, 1)])
