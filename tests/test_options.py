# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What is no array: options of every type, errors by their classes, arguments by their names."""

import enum
import inspect

import cases
import numpy as np
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import formats

pytestmark = pytest.mark.usefixtures("nothing_remembered")


def write(kv_cache_dtype="auto", **others):
    tokens = np.ones((1, 2, 8), np.float32)
    caches = {f"{n}_cache": np.zeros((2, 4, 2, 8), np.float32) for n in ("key", "value")}
    cc.reshape_and_cache_flash(
        tokens,
        tokens,
        **caches,
        slot_mapping=np.array([0]),
        kv_cache_dtype=kv_cache_dtype,
        **others,
    )


@pytest.mark.whole
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(
    "value", [["auto"], {"auto": 1}, {"auto"}, np.array(["auto"]), None, 8, b"auto", ("auto",)]
)
def test_what_is_no_name(value, used):
    """Of a format, a layout, a rule: whether it can be hashed or not."""
    if used:
        write()
    caches = [np.zeros((2, 4, 8), np.float32)]
    entry = np.zeros((1, 4), np.float32)
    table = np.zeros((1, 1), int), np.array([0, 1])
    calls = {
        "reshape_and_cache_flash": lambda: write(value),
        "concat_and_cache_mla": lambda: cc.concat_and_cache_mla(
            entry, entry, caches[0], np.array([0]), value
        ),
        "gather_cache": lambda: cc.gather_cache(caches[0], entry, *table, layout=value),
        "pack_blocks": lambda: cc.pack_blocks(caches, [0], np.zeros(128, np.uint8), layout=value),
        "convert_fp8": lambda: cc.convert_fp8(np.zeros(3, np.uint8), np.ones(3, "f4"), 1.0, value),
        "alibi_slopes": lambda: value is None or cc.alibi_slopes(8, framework=value),
        "PagedKVCache": lambda: cc.PagedKVCache(caches, [caches[0].copy()], value).write(
            0, entry, entry, np.array([0])
        ),
    }
    for name, call in calls.items():
        if (name, value) == ("alibi_slopes", None):
            continue
        with pytest.raises(cc.CupyCacheError, match="Invalid .* expected"):
            call()
    assert not caches[0].any()


def test_documented_names_work(rng, monkeypatch):
    """Every argument of an ordinary call of every function, by its name."""
    for name in {name.partition("-")[0] for name in cases.CASES}:
        public = getattr(cc, name)

        def by_name(*args, function=public, **options):
            given = inspect.signature(function).bind(*args, **options).arguments
            if "size_and_mapping" in given:
                (given["block_mapping"],) = given.pop("size_and_mapping")
            return function(**given)

        monkeypatch.setattr(cc, name, by_name)
    for make in cases.CASES.values():
        case, world = make(rng), worlds.NumPyWorld()
        case.call(world)
        case.check(world)


class Name(str, enum.Enum):
    """Names as programs keep them; by ``str`` they show their class."""

    HALF, WIDE, FP8, HND, HOST = "half", "bfloat16", "fp8", "HND", "cpu"


def test_names_from_an_enum():
    made = cc.PagedKVCache.allocate(
        1, 2, 4, 1, 8, dtype=Name.HALF, kv_cache_dtype=Name.FP8, layout=Name.HND, device=Name.HOST
    )
    assert "fp8 in uint8, HND, numpy on cpu" in repr(made)
    assert formats.dtype_named(Name.HALF).name == "float16"
    assert formats.dtype_named(Name.WIDE).name == "bfloat16"


def test_swap_blocks_in_every_form(rng):
    source = rng.integers(0, 256, (4, 8), np.uint8)
    pairs = [(0, 3), (2, 1)]
    for args, options in (
        ((pairs,), {}),
        ((), {"block_mapping": pairs}),
        ((8, pairs), {}),
        ((None, pairs), {}),
        ((8,), {"block_mapping": pairs}),
        ((pairs,), {"block_size_in_bytes": 8}),
        ((), {"block_mapping": pairs, "block_size_in_bytes": np.int64(8)}),
    ):
        destination = np.zeros_like(source)
        cc.swap_blocks(source, destination, *args, **options)
        assert (destination[[3, 1]] == source[[0, 2]]).all() and not destination[[0, 2]].any()
    for args, options in (
        ((), {}),
        ((8, pairs), {"block_mapping": pairs}),
        ((8, pairs, 1), {}),
        ((8, pairs), {"block_size_in_bytes": 8}),
    ):
        with pytest.raises(cc.CupyCacheError, match="swap_blocks: Invalid .*block_mapping"):
            cc.swap_blocks(source, destination, *args, **options)


def test_errors_that_engines_catch():
    """Devices and contiguity: peers raise `RuntimeError` for them."""
    torch = pytest.importorskip("torch")
    caches = [np.zeros((2, 4, 2, 8), np.float32) for _ in range(2)]
    tokens = np.ones((1, 2, 8, 2), np.float32)
    for error in (RuntimeError, ValueError, cc.StrideError):
        with pytest.raises(error):
            cc.reshape_and_cache_flash(tokens[..., 0], tokens[..., 1], *caches, np.array([0]))
    there = torch.ones(1, 2, 8)
    for error in (RuntimeError, ValueError, cc.DeviceError):
        with pytest.raises(error):
            cc.reshape_and_cache_flash(
                there.to("meta"), there, *map(torch.from_numpy, caches), torch.zeros(1).long()
            )


def test_counts_may_be_tensors():
    """vLLM's tests give the number of tokens as a tensor of no dimensions."""
    torch = pytest.importorskip("torch")
    source = torch.arange(8.0).reshape(2, 2, 2)
    table, bounds = torch.tensor([[1, 0]]), torch.tensor([0, 3])
    for count in (torch.tensor(2), torch.tensor(2, dtype=torch.int32), np.int64(2), np.array(2)):
        rows = torch.zeros(3, 2)
        cc.gather_and_maybe_dequant_cache(source, rows, table, bounds, None, count, "auto", None)
        assert rows.tolist() == [[4, 5], [6, 7], [0, 0]]
    for count in (torch.tensor(2.0), torch.tensor(True), torch.tensor([2, 2]), 2.0):
        with pytest.raises(cc.ArgumentError, match="num_tokens"):
            cc.gather_and_maybe_dequant_cache(
                source, rows, table, bounds, None, count, "auto", None
            )


@pytest.mark.whole
@pytest.mark.parametrize(
    "slopes",
    [["0.5"], "0.5", [1j], np.array([1j]), [None], [True], [0.5, True], [0.5, np.True_],
     np.array([True]), [[0.5]], [b"1"],
     np.ma.masked_array([0.5, 1.0], [True, False]), np.array(["2"]), object(), {0.5: 1}, 0.5],
)  # fmt: skip
def test_slopes_that_are_no_numbers(slopes):
    out = np.zeros(1, np.float32)
    with pytest.raises(cc.CupyCacheError, match="place_slopes: Invalid .* of slopes: expected"):
        cc.place_slopes(slopes, out=out)
    assert not out.any()


def test_scales_of_layers_have_one_dimension():
    entries = np.ones((1, 2, 4), np.float32)
    cache = np.zeros((2, 4, 8), np.uint8)
    for scales in (np.array(1, np.float32), np.ones((1, 1), np.float32), np.ones(2, np.float32)):
        with pytest.raises(cc.ShapeError, match="kv_scales"):
            cc.concat_and_cache_mla_grouped(
                entries, entries, [cache], np.array([[0, 1]]), kv_scales=scales,
                kv_cache_dtype="fp8",
            )  # fmt: skip
    assert not cache.any()


def numbered_calls():
    """{name: a function of the number of a block, a slot or a layer}: all that takes one from host
    memory."""
    made = [np.zeros((300, 2, 1, 8), np.float32) for _ in range(4)]
    keys, values = made[:2], made[2:]
    one, other = (cc.PagedKVCache([k], [v]) for k, v in zip(keys, values))
    both = cc.PagedKVCache(keys, values)
    row, slot = np.ones((1, 1, 8), np.float32), np.array([1])
    step = row, np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    packed = np.zeros(10_000, np.uint8)
    many = [(number, number + 100) for number in range(2, 100)]
    latents = [k[:, :, 0] for k in keys]
    return {
        "copy_blocks": lambda n: cc.copy_blocks(keys, values, [(n, 2)]),
        "copy_blocks, second": lambda n: cc.copy_blocks(keys, values, ((0, 2), [0, n])),
        "copy_blocks, many": lambda n: cc.copy_blocks(keys, values, [*many, (n, 299)]),
        "copy_blocks_mla": lambda n: cc.copy_blocks_mla(latents, [(n, 2)]),
        "swap_blocks": lambda n: cc.swap_blocks(keys[0], keys[1], [(2, n)]),
        "swap_blocks, many": lambda n: cc.swap_blocks(keys[0], keys[1], [(299, n), *many]),
        "zero_blocks": lambda n: cc.zero_blocks(keys, [n, 2]),
        "pack_blocks": lambda n: cc.pack_blocks(keys, [2, n], packed),
        "unpack_blocks": lambda n: cc.unpack_blocks(packed, keys, (n, 2)),
        "pack_tokens": lambda n: cc.pack_tokens(keys, [n], packed),
        "unpack_tokens": lambda n: cc.unpack_tokens(packed, keys, [n]),
        "PagedKVCache.copy_blocks": lambda n: one.copy_blocks([(n, 2)]),
        "PagedKVCache.swap_blocks": lambda n: one.swap_blocks(other, [(n, n)]),
        "PagedKVCache.write": lambda n: both.write(n, row, row, slot),
        "PagedKVCache.writer": lambda n: both.writer(n)(row, row, slot),
        "PagedKVCache.attend": lambda n: both.attend(n, *step),
    }


def ones(boolean):
    """1 in every form that counts as an integer, or True in every form that could."""
    torch = pytest.importorskip("torch")
    kind = (bool, np.bool_, torch.bool) if boolean else (int, np.int64, torch.int32)
    return [kind[0](1), kind[1](1), np.array(1, kind[1]), torch.tensor(1, dtype=kind[2])]


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore:In future, it will be an error")  # NumPy 1, of its booleans
@pytest.mark.parametrize("name", numbered_calls())
def test_booleans_are_no_numbers(name):
    """True is 1, False is 0, and neither is the number of a block, a slot or a layer."""
    call = numbered_calls()[name]
    for number in ones(boolean=False):
        call(number)
    for _ in range(2):
        for number in (*ones(boolean=True), False, np.False_):
            with pytest.raises(cc.CupyCacheError, match=f"^{name.partition(',')[0]}: .* integer"):
                call(number)


def flagged_calls():
    """{name: a function of the argument that is a flag}; the name is of operation and argument."""
    row, cache = np.ones((1, 1, 8), np.float32), np.zeros((2, 4, 1, 8), np.float32)
    slots, table, lens = np.array([1]), np.zeros((1, 1), np.int32), np.ones(1, np.int32)
    angles, slopes = np.ones((4, 8), np.float32), np.ones(1, np.float32)
    rotate = slots, row, row, row, angles, cache, cache.copy(), slots
    attend = row, cache, cache.copy(), table, lens
    return {
        "alibi_bias: causal": lambda f: cc.alibi_bias(slopes, slots, slots, causal=f),
        "alibi_bias: sqrt": lambda f: cc.alibi_bias(slopes, slots, slots, sqrt=f),
        "paged_attention: causal": lambda f: cc.paged_attention(*attend, causal=f),
        "rotary_and_cache: is_neox": lambda f: cc.rotary_and_cache(*rotate, f),
        "BlockTables: reuse_prefixes": lambda f: cc.BlockTables(
            2, 4, max_sequences=1, max_tokens=4, max_length=4, framework="numpy", device="cpu",
            reuse_prefixes=f,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", flagged_calls())
def test_flags_are_true_or_false(name):
    """In silence, "False" would be true, and a tensor on a GPU would be waited for."""
    torch = pytest.importorskip("torch")
    call = flagged_calls()[name]
    for flag in (True, False, np.True_, np.False_, 0, 1, np.int64(0)):
        call(flag)
    for flag in ("False", "", None, [], [0], 2, -1, 0.0, 1.0, torch.tensor(False), np.array(True)):
        with pytest.raises(
            cc.ArgumentError, match=f"^{name.replace(': ', ': Invalid value of ')}: "
        ):
            call(flag)
