# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Memory that two arrays have: refused where both are written, whatever their strides."""

import itertools

import numpy as np
import pytest
from refusing import learnt, refused, step

import cupy_cache as cc
from cupy_cache.integrations import vllm
from cupy_cache.runtime import arrays

pytestmark = pytest.mark.usefixtures("nothing_remembered")


def strided(memory, at, shape, strides):
    return np.ndarray(shape, np.uint8, memory, at, strides)


def bytes_of(at, shape, strides):
    """Which bytes an array of bytes has."""
    return {
        at + sum(i * s for i, s in zip(index, strides))
        for index in itertools.product(*map(range, shape))
    }


def test_caches_of_a_write_that_share_bytes(rng):
    """Against the bytes themselves, of strides of every kind: refused if and only if one is
    shared."""
    counted = {True: 0, False: 0}
    while min(counted.values()) < 60:
        memory = np.zeros(700, np.uint8)
        shape = tuple(int(n) for n in rng.integers(1, 4, 4))
        places = []
        for _ in range(2):
            order, step, strides = rng.permutation(3), 1, [0, 0, 0, 1]
            step = shape[3] * int(rng.choice([1, 2, 3]))
            for axis in order:
                strides[axis] = step
                step *= shape[axis] * int(rng.choice([1, 1, 2]))
            places.append((int(rng.integers(0, 40)), shape, tuple(strides)))
        if any(max(bytes_of(*place)) >= 700 for place in places):
            continue
        shared = not bytes_of(*places[0]).isdisjoint(bytes_of(*places[1]))
        counted[shared] += 1
        caches = [strided(memory, *place) for place in places]
        tokens = np.full((1, *shape[2:]), 7, np.uint8)
        step = tokens, tokens, *caches, np.array([shape[0] * shape[1] - 1])
        for _ in range(2):
            if shared:
                with refused("reshape_and_cache_flash", "value_cache", "key_cache"):
                    cc.reshape_and_cache_flash(*step)
                assert not memory.any()
            else:
                cc.reshape_and_cache_flash(*step)
                assert (memory == 7).sum() == 2 * tokens.size


@pytest.mark.whole
@pytest.mark.parametrize("name", ["copy_blocks", "zero_blocks", "unpack_blocks", "swap_blocks",
                                  "PagedKVCache", "concat_and_cache_mla_grouped"])  # fmt: skip
def test_one_array_given_twice(name):
    cache, other = (np.zeros((4, 4, 8), np.float32) for _ in range(2))
    source = np.ones((4, 4, 8), np.float32)
    calls = {
        "copy_blocks": lambda a, b: cc.copy_blocks([a], [b], [(0, 1)]),
        "zero_blocks": lambda a, b: cc.zero_blocks([a, b], [1]),
        "unpack_blocks": lambda a, b: cc.unpack_blocks(source, [(a, b)], [1]),
        "swap_blocks": lambda a, b: cc.swap_blocks([source, source], [a, b], [(0, 1)]),
        "PagedKVCache": lambda a, b: cc.PagedKVCache([a], [b]),
        "concat_and_cache_mla_grouped": lambda a, b: cc.concat_and_cache_mla_grouped(
            source[:2, :, :6], source[:2, :, 6:], [a, b], np.zeros((2, 4), int)
        ),
    }
    for _ in range(3):
        calls[name](other, cache)
        cache[:] = 0
        for same in (cache, cache[:3], cache[::-1], cache[1:]):
            with pytest.raises(cc.CupyCacheError):
                calls[name](cache, same)
        with pytest.raises(cc.ArgumentError, match="Invalid memory of .* has too"):
            calls[name](cache, cache)
        assert not cache.any()


def test_addresses_that_no_caches_have(rng):
    """Those of a grouped write, on the CPU: nothing is written in the layers before."""
    pool = np.zeros((3, 2, 2, 6), np.float32)  # block, layer, slot, element
    kv_c, k_pe = rng.random((2, 1, 4), np.float32), rng.random((2, 1, 2), np.float32)
    first, slots = pool.ctypes.data, np.full((2, 1), 3)

    def write(second):
        given = np.array([first, second])
        cc.concat_and_cache_mla_grouped(kv_c, k_pe, given, slots, 2, 24, 6, num_blocks=3)

    for second in (0, 1, -1, -(2**63), first + 49, first, first + 4, first + 24, first - 96):
        with refused("concat_and_cache_mla_grouped", "kv_cache_ptrs" + (
            "[1]" if abs(second - first) < 97 and second % 4 == 0 else ""
        )):  # fmt: skip
            write(second)
        assert not pool.any()
    write(first + 48)
    assert (pool[1, :, 1] == np.concatenate([kv_c, k_pe], axis=2)[:, 0]).all()
    assert np.count_nonzero(pool) == 12


def test_results_that_are_merged_in_part():
    """vLLM's function: what is copied behind the merged tokens counts too."""
    memory = np.zeros(60, np.float32)
    output = memory[:32].reshape(4, 2, 4)
    prefix, suffix = (np.full((4, 2, 4), n, np.float32) for n in (1, 2))
    weights = np.zeros((2, 4), np.float32)
    given = output, prefix, weights, suffix, weights.copy()
    for merged in (0, 1, 2, 4, None):
        for at in (24, 28, 31):
            with refused("merge_attn_states", "output_lse", "output has too"):
                vllm.merge_attn_states(*given, memory[at : at + 8].reshape(2, 4), merged)
            assert not memory.any()
    vllm.merge_attn_states(*given, memory[32:40].reshape(2, 4), 2)
    assert (output[:2] == 1.5).all() and (output[2:] == 2).all() and not memory[40:].any()


def test_swaps_between_keys_and_values_of_the_same_pages(rng):
    """Where one side's keys are the other's values, a block of either may not be on both sides."""
    pages = rng.random((3, 2, 4, 1, 8), np.float32)  # block, keys and values, slot, head
    before = pages.copy()
    here, there = (cc.PagedKVCache([pages[:, at]], [pages[:, 1 - at]]) for at in (0, 1))
    for pairs in ([(0, 1), (1, 0)], [(0, 1), (2, 0)], [(1, 1)], [(n, n) for n in range(3)]):
        with refused("PagedKVCache.swap_blocks", "block_mapping"):
            here.swap_blocks(there, pairs)
        assert (pages == before).all()
    here.swap_blocks(there, [(0, 1)])
    assert (pages[1] == before[0, ::-1]).all() and (pages[::2] == before[::2]).all()


def test_layers_of_a_pool_are_apart(rng):
    """Views of one page for all layers, keys and values, in either order of their dimensions."""
    pool = np.zeros((4, 3, 2, 2, 16), np.float32)  # block, layer, head, slot, K|V
    keys = [pool[:, layer, ..., :8].transpose(0, 2, 1, 3) for layer in range(3)]
    values = [pool[:, layer, ..., 8:].transpose(0, 2, 1, 3) for layer in range(3)]
    pool[0] = 1
    cc.copy_blocks(keys, values, [(0, 2)])
    assert pool[2].all() and not pool[1].any() and not pool[3].any()
    with refused("copy_blocks", "value_caches[2]", "key_caches[1]"):
        cc.copy_blocks(keys, [*values[:2], keys[1]], [(0, 3)])
    nearly = [pool[:, layer, ..., 7:15].transpose(0, 2, 1, 3) for layer in range(3)]
    with refused("copy_blocks", "value_caches[0]", "key_caches[0]"):
        cc.copy_blocks(keys, nearly, [(0, 3)])
    assert not pool[3].any()


def test_rows_of_an_indexer_that_share_bytes():
    """Where the rows end decides."""
    cache = np.zeros((4, 4, 20), np.uint8)
    memory = np.zeros(200, np.uint8)
    for rows, apart in ((2, True), (3, True), (4, False), (2, True), (5, False)):
        keys, scales = memory[: 16 * rows].reshape(rows, 16), memory[48 : 48 + 4 * rows]
        given = cache, keys, scales.reshape(rows, 4), np.zeros((1, 4), int), np.array([0, rows])
        if apart:
            cc.cp_gather_indexer_k_quant_cache(*given)
        else:
            with refused("cp_gather_indexer_k_quant_cache", "dst_scale", "dst_k"):
                cc.cp_gather_indexer_k_quant_cache(*given)


@pytest.fixture(params=["numpy", "fast path"])
def framework(request):
    """What makes an array of NumPy's memory: nothing, or torch, whose tensors are taken for a
    GPU's."""
    if request.param == "numpy":
        return lambda array: array
    torch = request.getfixturevalue("torch")
    request.getfixturevalue("recorder")
    return torch.from_numpy


@pytest.mark.whole
@pytest.mark.usefixtures("nothing_remembered")
@pytest.mark.parametrize("named", ["output", "prefix_lse", None])
def test_states_whose_numbers_of_tokens_change(framework, named, rng):
    """merge_attn_states: against the bytes themselves, whatever the calls before were. Of what is
    merged in place, one of both is an input too."""
    memory = np.zeros(250, np.float32)
    counted = {True: 0, False: 0}
    while min(counted.values()) < 15:
        tokens = int(rng.integers(1, 10))
        at, behind = (int(n) for n in rng.integers(100, size=2))
        output = memory[behind : behind + 12 * tokens].reshape(tokens, 3, 4)
        width = tokens + int(rng.integers(5))  # of the memory that each head's logarithms are in
        logarithms = memory[at : at + 3 * width].reshape(3, width)[:, :tokens]
        states = [np.zeros((tokens, 3, 4), np.float32) for _ in range(2)]
        lses = [np.zeros((3, tokens), np.float32) for _ in range(2)]
        if named == "output":
            states[0] = output
        if named == "prefix_lse":
            lses[0] = logarithms
        given = output, states[0], lses[0], states[1], lses[1], logarithms
        made = {id(array): framework(array) for array in given}
        given = [made[id(array)] for array in given]
        shared = np.shares_memory(output, logarithms)
        counted[shared] += 1
        for _ in range(3):
            if not shared:
                cc.merge_attn_states(*given)
                continue
            with refused("merge_attn_states", "output_lse", "output has too"):
                cc.merge_attn_states(*given)


def test_shared_memory_at_low_addresses_is_found(monkeypatch):
    """Where Python's own memory lies decides nothing."""
    cache = np.zeros((6, 4, 2, 8), np.float32)
    token = np.ones((1, 2, 8), np.float32)
    monkeypatch.setattr(arrays, "LOWEST", 1 << 62)
    with refused("reshape_and_cache_flash", "value_cache", "key_cache"):
        cc.reshape_and_cache_flash(token, token, cache, cache[:], np.array([3]))
    assert not cache.any()


def test_known_signatures_do_not_vouch_for_other_caches(torch, recorder):
    """On every fast path."""
    given = step(torch)
    learnt(recorder, lambda: cc.reshape_and_cache_flash(**given))
    given["value_cache"] = given["key_cache"].view(given["key_cache"].shape)
    for _ in range(3):
        with refused("reshape_and_cache_flash", "value_cache", "key_cache"):
            cc.reshape_and_cache_flash(**given)
    keys, values = ([torch.ones(6, 4, 8) for _ in range(2)] for _ in range(2))
    learnt(recorder, lambda: cc.copy_blocks(keys, values, [(0, 1)]))
    values[1] = keys[0].view(6, 4, 8)
    for _ in range(3):
        with refused("copy_blocks", "value_caches[1]", "key_caches[0]"):
            cc.copy_blocks(keys, values, [(0, 1)])
    cache = torch.zeros(6, 4, 2, 8, dtype=torch.uint8), torch.zeros(6, 4, 2, 8, dtype=torch.uint8)
    scales = torch.zeros(6, 4, 2), torch.zeros(6, 4, 2)
    tokens = torch.ones(3, 2, 8), torch.ones(3, 2, 8)

    def quantise():
        cc.reshape_and_cache_flash_per_token_head(*tokens, *cache, *scales, torch.arange(3), "int8")

    learnt(recorder, quantise)
    scales = scales[0], scales[0].view(6, 4, 2)
    for _ in range(3):
        with refused("reshape_and_cache_flash_per_token_head", "v_scale_cache", "k_scale_cache"):
            quantise()
    rows = torch.zeros(5, 16, dtype=torch.uint8), torch.zeros(5, 4, dtype=torch.uint8)
    table, bounds = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    entries = torch.zeros(4, 4, 20, dtype=torch.uint8)
    learnt(recorder, lambda: cc.cp_gather_indexer_k_quant_cache(entries, *rows, table, bounds))
    rows = rows[0], rows[0].view(-1)[:20].view(5, 4)
    for _ in range(3):
        with refused("cp_gather_indexer_k_quant_cache", "dst_scale", "dst_k"):
            cc.cp_gather_indexer_k_quant_cache(entries, *rows, table, bounds)
    assert not recorder.take()
