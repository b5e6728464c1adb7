# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What is sent to the driver where a signature of torch tensors comes again: the fast path must
send what the slow path sends, and refuse what it refuses."""

import contextlib
import functools
import gc
import itertools
import struct
import sys
import types
import weakref

import numpy as np
import pytest
import recording

import cupy_cache as cc
from cupy_cache.attention import alibi_bias, paged_attention, paged_attention_mla
from cupy_cache.ops import (
    concat_and_cache_mla,
    concat_and_cache_mla_grouped,
    copy_blocks,
    cp_gather_indexer_k_quant_cache,
    gather_and_maybe_dequant_cache,
    gather_cache,
    reshape_and_cache_flash,
    rotary_and_cache,
    slot_mapping,
    slot_mapping_groups,
    swap_blocks,
)
from cupy_cache.ops.shared import blocks, packing
from cupy_cache.runtime import (
    apart,
    bound,
    devices,
    dispatch,
    driver,
    fastpath,
    faults,
    formats,
    guards,
    launch,
    making,
    modules,
    overlap,
    params,
    plans,
    streams,
)

torch = pytest.importorskip("torch")
KNOWN = 2  # calls after which a signature has a fast path
flash = reshape_and_cache_flash


OPS = (
    flash.OP, concat_and_cache_mla.OP, concat_and_cache_mla_grouped.OP, copy_blocks.OP,
    copy_blocks.MLA_OP, swap_blocks.OP, slot_mapping.OP,
    gather_and_maybe_dequant_cache.OP, gather_cache.OP, alibi_bias.OP, slot_mapping_groups.OP,
    paged_attention.OP, paged_attention_mla.OP, *rotary_and_cache.CALL.ops.values(),
)  # fmt: skip


def forget(patch):
    """Nothing is remembered from here on, and what is will be forgotten again."""
    for op in OPS:
        patch.setattr(op, "memory", plans.Memory())
        patch.setattr(op, "fast_paths", fastpath.FastPaths(op))


def counting(patch):
    """A recorder whose ``long`` counts the calls that take the slow path; nothing is remembered."""
    recorder = recording.recorder(patch)
    forget(patch)
    run = dispatch.Op.run
    recorder.long = 0

    def counted(*arguments):
        recorder.long += 1
        return run(*arguments)

    patch.setattr(dispatch.Op, "run", counted)
    return recorder


@pytest.fixture(params=[1, fastpath.calls.SETTLED], ids=["settled at once", "settled later"])
def recorder(monkeypatch, request):
    """What sizes are compared with may be known from the first call with them that comes again."""
    monkeypatch.setattr(fastpath.calls, "SETTLED", request.param)
    yield counting(monkeypatch)
    launch.processors.cache_clear()


def tensors(tokens=5, slots=None, heads=3, size=8, dtype=torch.float16, shift=0):
    """key, value, key_cache, value_cache, slot_mapping; rows start ``shift`` elements late."""

    def rows(count):
        flat = torch.zeros(count * heads * size + 64, dtype=dtype)
        start = -(flat.data_ptr() // flat.element_size()) % 8 + shift
        return flat[start : start + count * heads * size].view(count, heads, size)

    def cache():
        flat = torch.zeros(6 * 4 * heads * size + 64, dtype=dtype)
        start = -(flat.data_ptr() // flat.element_size()) % 8
        return flat[start : start + 24 * heads * size].view(6, 4, heads, size)

    return rows(tokens), rows(tokens), cache(), cache(), torch.arange(slots or tokens)


def fields(record):
    """The per-call fields of the kernel's parameters."""
    return flash.PARAMS.per_call.unpack_from(record)


def expected_fields(given):
    return (*(t.data_ptr() for t in given), 0, 0, len(given[4]), 0.0, 0.0)


def long_way(recorder, call, monkeypatch):
    """What is sent where nothing is remembered."""
    with monkeypatch.context() as patch:
        forget(patch)
        recorder.take()
        call()
        return recorder.take()


def test_other_tensors_of_a_known_signature(recorder, monkeypatch):
    """Whatever their numbers of rows, one fast path serves them."""
    made = [tensors(*n) for n in ((5,), (5,), (5,), (7,), (1,), (300, 6), (300,), (7,), (2,), (1,))]
    for given in made:
        stream = given[0].data_ptr() % 1000
        for call in (
            lambda g=given: cc.reshape_and_cache_flash(*g),
            lambda g=given, s=stream: cc.reshape_and_cache_flash(*g, stream=s),
        ):
            call()
            (sent,) = recorder.take()
            assert fields(sent[-1]) == expected_fields(given)
            before = recorder.long
            assert long_way(recorder, call, monkeypatch) == [sent]
            recorder.long = before
    assert recorder.long == KNOWN
    assert {sent for _, sent, _ in recorder.lent} == {g[0].data_ptr() % 1000 for g in made}


def test_caches_that_are_bound(recorder):
    """Each has its own addresses, and each call its buffer and its numbers, though caches that are
    alike share a fast path; only calls with a buffer that are new take the slow path."""
    layers = [[tensors()[2:4] for _ in range(2)] for _ in range(2)]
    caches = [cc.PagedKVCache(*map(list, zip(*pairs))) for pairs in layers]
    memory = torch.zeros(1 << 14, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :]
    for step in range(8):
        cache, pairs = caches[step % 2], layers[step % 2]
        numbers, buffer = [step % 6, (step + 1) % 6], memory[4096 * (step % 3) :][:4096]
        cache.pack_blocks(numbers, buffer)
        cache.unpack_blocks(buffer, numbers)
        cache.zero_blocks(numbers)
        addresses = [cache.data_ptr() for pair in pairs for cache in pair]
        for *_, sent in recorder.take():
            first, *_ = packing.PARAMS.per_call.unpack_from(sent)
            tail = sent[packing.PARAMS.tail_at :]
            assert np.frombuffer(tail[:32], np.uint64).tolist() == addresses
            assert np.frombuffer(tail[32:40], np.int32).tolist() == numbers
            assert first in (buffer.data_ptr(), 0)
        if step == 1:
            known = recorder.long
    assert recorder.long == known
    with pytest.raises(cc.ArgumentError, match="numbers in 0..5, got 6"):
        caches[0].pack_blocks([6], memory[:4096])
    with pytest.raises(cc.ShapeError, match="PagedKVCache.pack_blocks: Invalid size of out"):
        caches[0].pack_blocks([1], memory[:16])
    with pytest.raises(cc.ArgumentError, match="PagedKVCache.pack_blocks: Invalid memory of out"):
        caches[0].pack_blocks([1], layers[0][0][0].view(-1).view(torch.uint8))
    with pytest.raises(cc.ArgumentError, match="PagedKVCache.pack_blocks: Invalid value of layout"):
        caches[0].pack_blocks([1], memory[:4096], layout=["layer_first"])
    assert not recorder.take()


def settled(patch, call):
    """Repeat ``call`` until one comparison serves it. Returns a list that grows at each later call
    that it does not serve."""
    searched, find = [], fastpath.calls.Results.find
    patch.setattr(fastpath.calls.Results, "find", lambda *a: searched.append(a) or find(*a))
    for _ in range(KNOWN + fastpath.calls.SETTLED + 1):
        call()
    assert len(searched) == fastpath.calls.SETTLED + 1
    searched.clear()
    call()
    assert not searched
    return searched


@pytest.mark.parametrize("bound", [False, True])
def test_calls_that_are_settled(recorder, monkeypatch, bound):
    """As long as sizes stay, one comparison tells that a call is like those before; what is not is
    found as ever, and refused as ever."""
    given = tensors()
    cache = cc.PagedKVCache(*([one] for one in given[2:4]))

    def call(given):
        if bound:
            cache.write(0, *given[:2], given[4])
        else:
            cc.reshape_and_cache_flash(*given)

    searched = settled(monkeypatch, lambda: call(given))
    recorder.take()
    for tokens in (5, 3, 5, 5, 1, 1, 5):
        now = [*tensors(tokens)[:2], *given[2:4], torch.arange(tokens)]
        call(now)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(now)
    assert searched
    wide = torch.zeros((5, 3, 16), dtype=torch.float16)[..., :8]
    short = torch.arange(10)[::2]
    for at, other in ((0, wide), (1, wide), (4, short), (4, torch.arange(5).int()), (0, given[1])):
        for _ in range(fastpath.calls.SETTLED + 1):
            call(given)
        recorder.take()
        now = list(given)
        now[at] = other
        call(now)
        (sent,) = recorder.take()
        assert fields(sent[-1])[:5] == expected_fields(now)[:5]
        assert long_way(recorder, lambda n=now: cc.reshape_and_cache_flash(*n), monkeypatch) == [
            sent
        ]
    for _ in range(fastpath.calls.SETTLED + 1):
        call(given)
    recorder.take()
    with pytest.raises(cc.ShapeError, match="slot_mapping"):
        call([*given[:4], torch.arange(6)])
    with pytest.raises(cc.DTypeError, match="slot_mapping"):
        call([*given[:4], given[4].float()])
    assert not recorder.take()


def test_scalars_of_calls_that_are_settled(recorder, monkeypatch):
    key, value, *caches, slots = tensors(size=16)
    given = key, value, *(c.view(torch.uint8)[..., :16] for c in caches), slots
    settled(monkeypatch, lambda: scaled(recorder, given, 1.5, 0.25))
    for scales in ((1.5, 0.5), (1.5, 0.25), (2.0, 0.5), (2.0, 0.5), (1.5, 0.25)):
        assert scaled(recorder, given, *scales) == ([0, 0], list(scales))


def test_settled_launches_are_prepared_anew(recorder, monkeypatch):
    """Where launches are to overlap from now on, or no longer."""
    given, prepared, prepare = tensors(), [], recorder.prepare
    monkeypatch.setattr(recorder, "prepare", lambda *a: prepared.append(1) or prepare(*a))
    settled(monkeypatch, lambda: cc.reshape_and_cache_flash(*given))
    for now in range(1, 4):
        assert len(prepared) == now
        overlap.forget_prepared()
        for _ in range(fastpath.calls.SETTLED + 2):
            cc.reshape_and_cache_flash(*given)


def test_calls_in_turns_are_settled(recorder, monkeypatch):
    """Each size of several that take turns has one comparison, whatever else is called between; a
    size of a single call has none, as to make one takes longer than it saves."""
    made, exactly = [], guards.exactly
    guards._torch.cache_clear()
    monkeypatch.setattr(guards, "exactly", lambda tensors: made.append(1) or exactly(tensors))
    others = set(overlap.prepared)
    for tokens in range(10, 20):
        cc.reshape_and_cache_flash(*tensors(tokens))
    assert not made
    steps = [tensors(5), tensors(7), tensors(9)]
    launches = next(one for one in overlap.prepared - others if hasattr(one, "settled"))
    same, compared = launches._same, []
    launches._same = lambda *given: compared.append(1) or same(*given)
    for step in range(60):
        cc.reshape_and_cache_flash(*steps[step % 3])
        (sent,) = recorder.take()[-1:]
        assert fields(sent[-1]) == expected_fields(steps[step % 3])
    assert len(made) == 3
    assert len(compared) == 3 * (1 + fastpath.calls.SETTLED)  # none since there are comparisons
    for tokens in (7, 5):  # as many slots, of more or fewer tokens than before: other sizes
        given = *tensors(tokens + 2)[:2], *steps[0][2:4], torch.arange(tokens)
        cc.reshape_and_cache_flash(*given)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(given)
    guards._torch.cache_clear()


def test_more_counts_than_are_remembered(recorder, monkeypatch):
    monkeypatch.setattr(fastpath.calls, "MAX_COUNTS", 3)
    monkeypatch.setattr(launch, "MAX_KNOWN", 3)
    others = set(overlap.prepared)
    for _ in range(3):
        for tokens in range(1, 9):
            given = tensors(tokens)
            cc.reshape_and_cache_flash(*given)
            (sent,) = recorder.take()
            assert fields(sent[-1]) == expected_fields(given)
            assert all(len(launches._known) <= 3 for launches in overlap.prepared - others)
    assert recorder.long == KNOWN and overlap.prepared - others


def test_numbers_of_a_call_that_came_again(recorder):
    """They are no array's, and go to the kernel."""
    op = gather_and_maybe_dequant_cache.OP
    src, table = torch.zeros((6, 4, 8), dtype=torch.float16), torch.zeros((2, 3), dtype=torch.int32)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    for tokens in (9, 9, 9, 4, 9, 9, 4):
        dst = torch.zeros((9, 8), dtype=torch.float16)
        cc.gather_and_maybe_dequant_cache(src, dst, table, bounds, None, tokens, "auto", None)
        (sent,) = recorder.take()
        count = len(op.args)
        words = np.frombuffer(sent[-1], np.int64)
        assert words[1] == dst.data_ptr() and words[count] == tokens
    assert recorder.long == KNOWN


def gather_fields(record):
    """Rows, sequences, width and stride of the table."""
    words = np.frombuffer(record, np.int64)
    return words[6:10].tolist()


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("starts", [None, torch.zeros(2, dtype=torch.int32)], ids=["none", "given"])
def test_tables_that_widen(recorder, monkeypatch, contiguous, starts):
    """Their width is no part of the signature; nor is an argument that is absent in the middle a
    reason for the slow path."""
    src, big = torch.zeros((6, 4, 8), dtype=torch.float16), torch.zeros((2, 99), dtype=torch.int32)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    for width in (3, 3, 4, 7, 5, 64, 3):
        dst = torch.zeros((9, 8), dtype=torch.float16)
        table = big[:, :width].contiguous() if contiguous else big[:, :width]
        call = lambda t=table, d=dst: cc.gather_cache(src, d, t, bounds, starts)  # noqa: E731
        call()
        (sent,) = recorder.take()
        assert gather_fields(sent[-1]) == [9, 2, width, 4 * (width if contiguous else 99)]
        before = recorder.long
        assert long_way(recorder, call, monkeypatch) == [sent]
        recorder.long = before
    assert recorder.long == KNOWN


def test_a_bias_whose_every_extent_changes(recorder, monkeypatch):
    for heads, queries, keys in ((3, 2, 16), (3, 2, 16), (3, 2, 24), (5, 1, 40), (3, 9, 16)):
        step = [torch.zeros(heads), torch.arange(queries), torch.arange(keys)]
        out = torch.zeros((heads, queries, keys + 8))[..., :keys]
        call = lambda s=step, o=out: cc.alibi_bias(*s, out=o)  # noqa: E731
        call()
        (sent,) = recorder.take()
        words = np.frombuffer(sent[-1], np.int64)
        steps = [4 * s if n > 1 else 0 for s, n in zip(out.stride()[:2], out.shape)]
        assert words[6:11].tolist() == [heads, queries, keys, *steps]
        before = recorder.long
        assert long_way(recorder, call, monkeypatch) == [sent]
        recorder.long = before
    assert recorder.long == KNOWN
    for keys in (17, 18):  # of another alignment: another kernel
        odd = torch.zeros((3, 2, keys))
        cc.alibi_bias(torch.zeros(3), torch.arange(2), torch.arange(keys), out=odd)
        assert recorder.take()[0][0] != sent[0]
    with pytest.raises(cc.StrideError, match="out"):
        shared = torch.zeros(64).as_strided((3, 2, 16), (0, 16, 1))
        cc.alibi_bias(torch.zeros(3), torch.arange(2), torch.arange(16), out=shared)


def scaled(recorder, given, k_scale, v_scale):
    """What is sent for these scales: (addresses, numbers)."""
    cc.reshape_and_cache_flash(*given, "fp8", k_scale, v_scale)
    (sent,) = recorder.take()
    found = list(fields(sent[-1]))
    return found[5:7], found[8:]


@pytest.mark.parametrize("kind", ["numbers", "one array twice", "two arrays", "values alone"])
def test_scales(recorder, kind):
    key, value, *caches, slots = tensors(size=16)
    given = key, value, *(c.view(torch.uint8)[..., :16] for c in caches), slots
    for step in range(6):
        one, other = torch.ones(1), torch.ones(1)
        if kind == "numbers":
            expected = [0, 0], [1.5 + step, 0.25 + step]
            assert scaled(recorder, given, 1.5 + step, 0.25 + step) == expected
        elif kind == "one array twice":
            assert scaled(recorder, given, one, one)[0] == [one.data_ptr()] * 2
        elif kind == "two arrays":
            addresses = [one.data_ptr(), other.data_ptr()]
            assert scaled(recorder, given, one, other)[0] == addresses
        else:
            found = scaled(recorder, given, None, other)
            assert found == ([0, other.data_ptr()], [1.0, 0.0])
    assert recorder.long == KNOWN
    if kind == "one array twice":  # and then are two
        addresses = [one.data_ptr(), other.data_ptr()]
        assert scaled(recorder, given, one, other)[0] == addresses


def test_scales_do_not_decide_where_arrays_lie(recorder, monkeypatch):
    """Whether arrays share memory is asked again where their rows change, not where numbers do."""
    asked = []
    check = apart.Apart.check
    monkeypatch.setattr(
        apart.Apart, "check", lambda self, *where: asked.append(1) or check(self, *where)
    )
    query, key, value = torch.zeros(3, 6, 2, 8).unbind()
    caches = torch.zeros(2, 4, 4, 2, 8, dtype=torch.uint8)
    table, slots, counts = torch.zeros(5, 8), torch.arange(6), []
    for step in range(8):
        rows = 6 if step < 6 else 5
        given = torch.arange(6)[:rows] % 5, query[:rows], key, value, table, *caches
        scales = 0.5 + step, 1.5 + step
        cc.rotary_and_cache(*given, slots[:rows], True, "fp8", *scales)
        (sent,) = recorder.take()
        assert scales == struct.unpack_from("<2f", sent[-1], sent[-1].index(pack_floats(*scales)))
        counts.append(len(asked))
    assert counts[KNOWN:6] == [counts[KNOWN]] * 4
    assert counts[6:] == [counts[5] + 1] * 2


def pack_floats(*numbers):
    return struct.pack(f"<{len(numbers)}f", *numbers)


def test_layers_share_one_quick_way(recorder):
    """New numbers of tokens at every step: of many layers none learns by itself."""
    key, value, *_ = tensors(40)
    layers_of = [tensors()[2:4] for _ in range(7)]
    cache = cc.PagedKVCache(*(list(side) for side in zip(*layers_of)))
    slots = torch.arange(40)
    for tokens in (5, 9, 2, 40, 1, 5):
        for layer, caches in enumerate(layers_of):
            given = key[:tokens], value[:tokens], *caches, slots[:tokens]
            cache.write(layer, *given[:2], given[-1])
            (sent,) = recorder.take()
            assert fields(sent[-1]) == expected_fields(given)
    assert recorder.long == KNOWN


def test_caches_that_differ_do_not_share_it(recorder):
    """Only the caches' block size tells two of the same keys apart."""
    key, value, *caches, slots = tensors()
    others = [cache.view(3, 8, 3, 8) for cache in caches]
    first, second = (cc.PagedKVCache(*([c] for c in pair)) for pair in (caches, others))
    sent = []
    for _ in range(4):
        for cache in (first, second):
            cache.write(0, key, value, slots)
            sent += recorder.take()
    assert len({expression for expression, *_ in sent}) == 2
    assert sent[:2] == sent[2:4] == sent[4:6] == sent[6:]


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32}, {"heads": 4}, {"size": 16}, {"shift": 1}, {"slots": 3},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)  # fmt: skip
def test_another_signature_after_a_known_one(recorder, monkeypatch, other):
    given, changed = tensors(), tensors(**other)
    for _ in range(KNOWN):
        cc.reshape_and_cache_flash(*given)
    for _ in range(KNOWN):
        recorder.take()
        cc.reshape_and_cache_flash(*changed)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(changed)
        call = lambda: cc.reshape_and_cache_flash(*changed)  # noqa: E731
        assert long_way(recorder, call, monkeypatch) == [sent]


def shifted(tensor, elements):
    """A copy that begins so many elements behind a multiple of 16 bytes."""
    flat = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    start = -(flat.data_ptr() // flat.element_size()) % 8 + elements
    return flat[start : start + tensor.numel()].view(tensor.shape)


def test_alignment_of_known_calls(recorder, monkeypatch):
    """Of sources, of caches, and of several results: each has the launch of its own alignment,
    whichever came first."""
    keys, values = (torch.zeros((6, 4, 2, 16), dtype=torch.float16) for _ in range(2))
    table, lens = torch.zeros((3, 3), dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    query, lse = torch.zeros((3, 4, 16), dtype=torch.float16), torch.zeros((3, 4))

    def write(at, elements):
        now = [shifted(tensor, elements if i == at else 0) for i, tensor in enumerate(given)]
        return lambda: cc.reshape_and_cache_flash(*now)

    def attend(elements):
        out = shifted(query, elements)
        return lambda: cc.paged_attention(query, keys, values, table, lens, out=out, lse=lse)

    for at, first in itertools.product((0, 1, 2, 3, "attention"), (0, 1)):
        given = tensors()
        with monkeypatch.context() as patch:
            forget(patch)
            for elements in (first, first, first, 1 - first, 1 - first, 1 - first, first):
                call = attend(elements) if at == "attention" else write(at, elements)
                call()
                sent = recorder.take()
                assert long_way(recorder, call, monkeypatch) == sent


def test_strides_of_a_known_shape(recorder, monkeypatch):
    """The same shapes as a view of wider rows."""
    given = tensors()
    for _ in range(KNOWN):
        cc.reshape_and_cache_flash(*given)
    wide = torch.zeros((5, 3, 16), dtype=torch.float16)
    for _ in range(KNOWN):
        recorder.take()
        call = lambda: cc.reshape_and_cache_flash(wide[..., :8], *given[1:])  # noqa: E731
        call()
        (sent,) = recorder.take()
        assert long_way(recorder, call, monkeypatch) == [sent]


def test_what_is_refused_stays_refused(recorder):
    given = tensors()
    for _ in range(KNOWN):
        cc.reshape_and_cache_flash(*given)
    recorder.take()
    for _ in range(fastpath.calls.SETTLED + 3):
        with pytest.raises(cc.ShapeError, match="slot_mapping"):
            cc.reshape_and_cache_flash(*given[:4], torch.arange(6))
    with pytest.raises(cc.DTypeError, match="slot_mapping"):
        cc.reshape_and_cache_flash(*given[:4], given[4].float())
    with pytest.raises(cc.ShapeError, match="value"):
        cc.reshape_and_cache_flash(given[0], given[1][..., :4], *given[2:])
    for at in (0, 1, 4):
        without_memory = given[at].clone()
        without_memory.untyped_storage().resize_(0)
        with pytest.raises(cc.ArgumentError, match="at address 0"):
            cc.reshape_and_cache_flash(*given[:at], without_memory, *given[at + 1 :])
    assert not recorder.take()


def test_where_slots_lie_does_not_matter(recorder):
    """A step's slots are often a slice of a longer array: 8-byte numbers, which lie anywhere."""
    key, value, *caches, _ = tensors()
    many = torch.arange(10)
    for start in (0, 1, 2, 3, 4, 5, 0, 0, 1, 2, 0, 5):
        given = key, value, *caches, many[start : start + 5]
        cc.reshape_and_cache_flash(*given)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(given)
    assert len(flash.OP.memory) == 1 and recorder.long == KNOWN


def test_no_tokens_and_streams(recorder):
    given = tensors()
    for _ in range(KNOWN):
        cc.reshape_and_cache_flash(*given)
    recorder.take()
    cc.reshape_and_cache_flash(*given[:4], torch.arange(0))
    assert not recorder.take()
    for _ in range(fastpath.calls.SETTLED + 2):  # what is wrong is refused all the same
        with pytest.raises(cc.ArgumentError, match="memory of value_cache"):
            cc.reshape_and_cache_flash(*given[:3], given[2][:], torch.arange(0))
    cc.reshape_and_cache_flash(*given)
    cc.reshape_and_cache_flash(*given, stream=5)
    assert [sent[3] for sent in recorder.take()] == [77, 5]


def test_no_tokens_and_scales(recorder):
    """Caches that share memory are refused then too."""
    key, value, *caches, slots = tensors(size=16)
    caches = [cache.view(torch.uint8)[..., :16] for cache in caches]
    scales = torch.ones(1), torch.ones(1)
    for end in (5, 5, 5, 0, 0):
        cc.reshape_and_cache_flash(key, value, *caches, slots[:end], "fp8", *scales)
        assert len(recorder.take()) == (end > 0)
    assert recorder.long == KNOWN
    for _ in range(fastpath.calls.SETTLED + 2):
        for end in (0, 5):
            with pytest.raises(cc.ArgumentError, match="memory of value_cache"):
                cc.reshape_and_cache_flash(
                    key, value, caches[0], caches[0][:], slots[:end], "fp8", *scales
                )  # fmt: skip
    assert not recorder.take()
    for cache in caches:  # without memory, what they share is not what is wrong
        cache.untyped_storage().resize_(0)
    with pytest.raises(cc.CupyCacheError, match="expected an array with memory"):
        cc.reshape_and_cache_flash(key, value, *caches, slots, "fp8", *scales)


class Allocator:
    """Scratch memory: how much there is, and was."""

    ADDRESS = 0x123456789A0

    def __init__(self):
        self.given, self.held = [], 0

    def __call__(self, *given):
        self.given.append(given)
        return self

    def __enter__(self):
        self.held += 1
        return self.ADDRESS

    def __exit__(self, *error):
        self.held -= 1


def test_scratch_memory(recorder, monkeypatch):
    """It is there for the launch, and goes back also where that fails."""
    allocator = Allocator()
    monkeypatch.setattr(streams, "scratch", allocator)
    query, cache = torch.zeros(3, 16, 576, dtype=torch.float16), torch.zeros(4, 16, 576).half()
    table, lengths = torch.zeros(3, 8, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    out, held, long = torch.empty(3, 16, 512).half(), [], []
    launched = recorder.launch

    def launch(*given):
        held.append(allocator.held)
        launched(*given)

    def fail(*given):
        raise cc.KernelError("no")

    for error in (None, None, None, cc.KernelError, None):
        monkeypatch.setattr(recorder, "launch", fail if error else launch)
        with pytest.raises(error) if error else contextlib.nullcontext():
            cc.paged_attention_mla(query, cache, table, lengths, scale=0.1, out=out)
        assert not allocator.held
        long.append(recorder.long)
    assert held == [1] * 4 and long == [1, 2, 2, 2, 2]
    sent = recorder.take()
    assert len(set(sent)) == 1 and len(set(allocator.given)) == 1
    at = paged_attention_mla.PARAMS.tail_at
    assert int.from_bytes(sent[0][-1][at : at + 8], "little") == allocator.ADDRESS


@pytest.mark.whole
@pytest.mark.parametrize("current, in_cuda", [(None, 1), (0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("private", ["alloc delete", "alloc", "delete", ""])
def test_scratch_memory_is_torchs_for_the_stream(monkeypatch, private, current, in_cuda):
    """On the GPU that was asked for, by whichever functions this torch has. torch may take another
    GPU for current than CUDA does: where it went back to one without a context, it has not told
    CUDA yet."""
    told = []

    @contextlib.contextmanager
    def device(index):
        told.append(("enter", index))
        yield
        told.append(("exit", index))

    def allocate(size, stream):
        told.append(("allocate", size, stream))
        return Allocator.ADDRESS

    def free(address):
        told.append(("free", address))

    names = ["caching_allocator_alloc", "caching_allocator_delete"]
    private = [f"_cuda_cudaCachingAllocator_raw_{name}" for name in private.split()]
    functions = types.SimpleNamespace(**dict.fromkeys(private, told.append))
    names = private if len(private) == 2 else names  # of one alone no use is made
    functions.__dict__.update(zip(names, (allocate, free)))
    fake = types.SimpleNamespace(_C=functions, cuda=functions)
    functions.device = device
    if current is not None:
        functions._cuda_getDevice = lambda: current
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(driver.active, "capturing", lambda stream, device: False, raising=False)
    monkeypatch.setattr(driver.active, "current_device", lambda: in_cuda, raising=False)
    streams._torch_allocator.cache_clear()
    try:
        with streams.scratch("torch", 1, 5000, 77) as address:
            assert address == Allocator.ADDRESS
            expected = [("allocate", 5000, 77)]
            if (current, in_cuda) != (1, 1):
                expected = [("enter", 1), *expected, ("exit", 1)]
            assert told == expected
        assert told == [*expected, ("free", address)]
    finally:
        streams._torch_allocator.cache_clear()


def test_threads_of_a_block():
    """Whole warps, no more than it takes for all multiprocessors to have some."""
    for processors, each in itertools.product((1, 3, 132), (0, 1, 31, 32, 33, 100, 255, 256, 9999)):
        for items in (each * processors, each * processors + 1):
            enough = [n for n in range(32, 257, 32) if n * processors >= items]
            assert launch.block_threads(items, processors, 256) == (enough or [256])[0]


def test_what_is_loaded_together():
    """All that is missing, one alone too; and an error of any is told."""
    log = []

    class Launcher:
        def __init__(self, name, loaded=False):
            self.name, self.loaded = name, loaded

        def load(self, stream):
            log.append((self.name, stream))
            if self.name == "wrong":
                raise KeyError(self.name)

    for names in ("", "a", "ab", "abc"):
        made = [Launcher("there", True), *map(Launcher, names), Launcher("there too", True)]
        launch.load_together(made, 7)
        assert sorted(log) == [(name, 7) for name in names]
        log.clear()
    for names in (["wrong"], ["wrong", "a"], ["a", "wrong"]):
        with pytest.raises(KeyError, match="wrong"):
            launch.load_together(list(map(Launcher, names)), 7)


def test_one_object_given_twice(recorder):
    """torch's comparison always refuses it, so it gets each tensor once."""
    key, _, *rest = tensors()
    for _ in range(KNOWN + 3):
        cc.reshape_and_cache_flash(key, key, *rest)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields((key, key, *rest))
    assert recorder.long == KNOWN
    other = key.clone()
    cc.reshape_and_cache_flash(key, other, *rest)
    (sent,) = recorder.take()
    assert fields(sent[-1]) == expected_fields((key, other, *rest))


def test_more_signatures_than_are_known(recorder, monkeypatch):
    """Where many come in turns, few of them are learnt anew."""
    made, same_as = [], guards.same_as
    monkeypatch.setattr(guards, "same_as", lambda *a: made.append(a) or same_as(*a))
    signatures = [tensors(heads=n) for n in range(1, fastpath.MAX_PATHS + 3)]
    for given in signatures[: fastpath.MAX_PATHS]:  # so many are learnt at once
        for _ in range(KNOWN + 1):
            cc.reshape_and_cache_flash(*given)
    assert recorder.long == KNOWN * fastpath.MAX_PATHS
    recorder.take()
    for _ in range(30):
        for given in signatures:
            cc.reshape_and_cache_flash(*given)
            (sent,) = recorder.take()
            assert fields(sent[-1]) == expected_fields(given)
    assert len(made) <= fastpath.MAX_PATHS + 2 + 30 * len(signatures) / fastpath.PATIENCE
    for _ in range(3 * fastpath.PATIENCE):  # but what stays is learnt
        cc.reshape_and_cache_flash(*given)
    recorder.long = 0
    cc.reshape_and_cache_flash(*given)
    assert not recorder.long


def test_what_is_forgotten_is_learnt_anew(recorder):
    given = tensors()
    for _ in range(3):
        for _ in range(KNOWN + 1):
            cc.reshape_and_cache_flash(*given)
        assert recorder.long == KNOWN
        recorder.long = 0
        dispatch.forget_everything()
    recorder.take()


def test_bound_to_its_caches(recorder):
    key, value, *caches, slots = tensors()
    cache = cc.PagedKVCache(*([c] for c in caches))
    for tokens in (5, 5, 5, 2, 5, 5, 2, 5):
        given = key[:tokens], value[:tokens], *caches, slots[:tokens]
        cache.write(0, *given[:2], given[-1])
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(given)


@pytest.mark.parametrize("in_place", [False, True])
def test_bound_beside_what_a_call_writes(recorder, monkeypatch, in_place):
    """Rotated queries: other tensors at each call, one quick way for both layers. Queries that lie
    in a cache are refused by it, too."""
    layers = [tensors()[2:4] for _ in range(2)]
    cache = cc.PagedKVCache(*(list(side) for side in zip(*layers)))
    table = torch.zeros(9, 8)

    def step(tokens):
        rows = [tensors(tokens)[0] for _ in "qkvo"]
        return torch.zeros(tokens, dtype=torch.int64), rows, torch.arange(tokens)

    def write(layer, positions, rows, slots):
        query, key, value, out = rows
        out = {} if in_place else {"out": out}
        cache.rotary_write(layer, positions, query, key, value, table, slots, **out)

    def plain(layer, positions, rows, slots):
        query, key, value, out = rows
        named = {} if in_place else {"out": out}
        pair = layers[layer]
        cc.rotary_and_cache(positions, query, key, value, table, *pair, slots, **named)

    for call in range(8):
        given = call % 2, *step(5 + call)
        expected = long_way(recorder, functools.partial(plain, *given), monkeypatch)
        before = recorder.long
        write(*given)
        assert recorder.take() == expected
        assert (recorder.long > before) == (call < 2)
    inside = layers[0][0].view(-1, 3, 8)[:5]
    positions, rows, slots = step(5)
    rows[0 if in_place else 3] = inside
    with pytest.raises(cc.ArgumentError, match="rotary_write: Invalid memory of"):
        write(0, positions, rows, slots)


def test_errors_of_known_calls_name_what_was_called(recorder):
    """They are the same whether a signature came before or not, once and after many calls."""
    key, value, *caches, slots = tensors()
    cache = cc.PagedKVCache(*([one] for one in caches))
    told = set()
    for calls in (0, *range(1, fastpath.calls.SETTLED + 3)):
        for write in (functools.partial(cache.write, 0), cache.writer(0)):
            for _ in range(calls and 1):
                write(key, value, slots)
            recorder.take()
            with pytest.raises(cc.ShapeError) as caught:
                write(key, value, torch.arange(6))
            told.add(str(caught.value))
    (one,) = told
    assert one.startswith("PagedKVCache.write: Invalid shape of slot_mapping: expected at most 5")
    assert not recorder.take()


def test_bound_with_too_few_or_too_many(recorder):
    key, value, *caches, slots = tensors()
    write = cc.PagedKVCache(*([c] for c in caches)).writer(0)
    for _ in range(KNOWN):
        write(key, value, slots)
        recorder.take()
        for given in ((key, value), (key, value, slots, slots)):
            with pytest.raises(TypeError, match="expected key, value, slot_mapping, got "):
                write(*given)
        assert not recorder.take()


def test_without_the_comparison(recorder, monkeypatch):
    """A torch that has none, or changed it."""
    monkeypatch.setattr(guards, "_tensor_guards", lambda: None)
    given = tensors()
    for _ in range(KNOWN):
        cc.reshape_and_cache_flash(*given)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(given)
    keys, values = layers(), layers()
    for _ in range(KNOWN + 1):
        cc.copy_blocks(keys, values, [(1, 3)])
        expect_copy(recorder, keys, values, [(1, 3)])


@pytest.mark.parametrize("extent", [1, 2])
def test_strides_that_mean_something(extent):
    """Those of an extent of 1 do not; others belong to the signature."""
    flat = torch.zeros(1000)
    same = guards.same_as([flat.as_strided((4, extent, 8), (64, 16, 1))], [(0,)])
    assert same(flat.as_strided((3, extent, 8), (64, 16, 1)))
    assert same(flat.as_strided((3, extent, 8), (64, 32, 1))) == (extent == 1)


def test_a_comparison_that_lies_is_not_used(monkeypatch):
    class Lies:
        def __init__(self, *tensors, **shapes):
            del tensors, shapes

        def check(self, *tensors):
            del tensors
            return True

    guards._tensor_guards.cache_clear()
    assert guards._tensor_guards() is not None  # else nothing here was tested
    guards._tensor_guards.cache_clear()
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Lies)
    assert guards._tensor_guards() is None
    guards._tensor_guards.cache_clear()


def test_more_than_one_launch_takes():
    """Kernels number the threads along x in 32 bits."""
    launcher = launch.Launcher(modules.Kernel("an_op", "stem", "k<1>", params.Struct("a:ptr")), 0)
    assert launcher.has_work((2**25 - 1, 65535, 1), 128)
    assert not launcher.has_work((0, 1, 1), 128)
    for grid, threads in (((2**25, 1, 1), 128), ((2**22, 1, 1), 1024), ((1, 65536, 1), 32)):
        with pytest.raises(cc.ShapeError, match="an_op: .* split the call"):
            launcher.has_work(grid, threads)


def test_known_calls_of_more_than_one_launch_takes(recorder, monkeypatch):
    """They are refused as ever, and as those that are not known."""
    for _ in range(KNOWN + 1):
        cc.reshape_and_cache_flash(*tensors())
    recorder.take()
    monkeypatch.setattr(launch, "MAX_THREADS_X", 2000)
    with pytest.raises(cc.ShapeError, match="reshape_and_cache_flash: .* split the call"):
        cc.reshape_and_cache_flash(*tensors(2000))
    assert not recorder.take()


def test_known_calls_in_debug_mode(recorder, monkeypatch):
    """Each asks for the faults of its stream and GPU."""
    asked = []
    monkeypatch.setattr(faults, "debug", True)
    monkeypatch.setattr(faults, "after_call", lambda *where: asked.append(where))
    src, dst = torch.zeros((6, 4, 8), dtype=torch.float16), torch.zeros((9, 8), dtype=torch.float16)
    table, bounds = torch.zeros((2, 3), dtype=torch.int32), torch.tensor([0, 4, 9]).int()
    for _ in range(KNOWN + 1):
        cc.reshape_and_cache_flash(*tensors(), stream=9)
        cc.gather_cache(src, dst, table, bounds, stream=9)
    assert recorder.long == 2 * KNOWN and asked == [(9, 0)] * (2 * KNOWN + 2)
    recorder.take()


def layers(count=3, shape=(8, 4, 3, 8)):
    return [torch.zeros(shape, dtype=torch.float16) for _ in range(count)]


def expect_copy(recorder, keys, values, pairs):
    """One launch with these layers' addresses and these pairs."""
    (sent,) = recorder.take()
    words = np.frombuffer(sent[-1], np.uint64)[blocks.PARAMS.tail_at // 8 :]
    pointers = [t.data_ptr() for layer in zip(keys, values) for t in layer]
    packed = [to << 32 | of for of, to in pairs]
    assert words[: len(pointers) + len(pairs)].tolist() == pointers + packed


def test_lists_of_layers(recorder):
    """`copy_blocks` with a known list, a changed layer in it, and other tensors of its kind."""
    pairs = [(1, 3), (2, 7)]
    for keys, values in [(layers(), layers()) for _ in range(3)]:
        for _ in range(3):
            cc.copy_blocks(keys, values, pairs)
            expect_copy(recorder, keys, values, pairs)
    with pytest.raises(cc.ShapeError, match=r"key_caches\[1\]"):
        cc.copy_blocks([keys[0], torch.zeros((8, 4, 3, 16)).half(), keys[2]], values, pairs)


def test_lists_that_are_settled(recorder, monkeypatch):
    keys, values = layers(), layers()
    settled(monkeypatch, lambda: cc.copy_blocks(keys, values, [(1, 3)]))
    recorder.take()


def test_blocks_of_no_bytes(recorder):
    """However often they come, nothing is launched."""
    caches, buffer = layers(shape=(8, 4, 0, 8)), torch.zeros((2, 0), dtype=torch.uint8)
    for _ in range(KNOWN + 2):
        cc.pack_blocks(caches, [1, 2], buffer)
    assert not recorder.take()


def test_known_layers_that_share_memory(recorder):
    keys, values = layers(), layers()
    for _ in range(KNOWN + 1):
        cc.copy_blocks(keys, values, [(1, 3)])
    recorder.take()
    with pytest.raises(cc.ArgumentError, match=r"value_caches\[2\].*memory of its own"):
        cc.copy_blocks(keys, [*values[:2], keys[0][:]], [(1, 3)])
    assert not recorder.take()


def placed(*views):
    """What `apart` looks at, of NumPy arrays of 2-byte numbers."""
    found = []
    for at, one in enumerate(views):
        layout = apart._Layout(one.shape, one.strides, formats.dtype_named("int16", "x"))
        begin = one.ctypes.data + layout.low
        found.append(apart._Placed(begin, begin + one.nbytes, 0, at, one.ctypes.data, layout))
    return sorted(found)


def test_blocks_in_turn():
    """Of a pool, whose layers' blocks alternate, no byte need be compared; whatever the order
    within a block."""
    pool = np.zeros((5, 3, 4, 6), np.int16)
    for flip in (slice(None), slice(None, None, -1)):
        sides = [pool[:, at, ::1, flip] for at in range(3)]
        assert apart._in_turn(placed(*sides)) and apart._in_turn(placed(*sides[1:]))
        assert apart._in_turn(placed(sides[2], sides[0][:, :1], sides[1][:, :, :1]))
        assert not apart._in_turn(placed(*sides, pool[:, 1, 1:2, flip]))
        assert not apart._in_turn(placed(sides[0], pool[:, 0, 3:, 5:]))
        assert not apart._in_turn(placed(sides[1], pool[::2, 2]))
    assert apart._in_turn(placed(pool[:, 0], pool[:, 1, :, ::-1], pool[:, 2]))
    rows = np.zeros((5, 4), np.int16)
    assert apart._in_turn(placed(*(rows[:, at : at + 1, None] for at in range(4))))
    # The last block reaches into the next row of the first.
    wide = np.lib.stride_tricks.as_strided(rows[:, 3:], (4, 2), (8, 2))
    assert not apart._in_turn(placed(rows[:, :1], wide))


def test_layers_in_other_places(recorder):
    """What is remembered of layers is used for their addresses alone: not after one of them got
    other memory or another shape, nor for the same ones in another order."""
    pairs = [(1, 3), (2, 7)]
    keys, values = layers(), layers()

    def copied():
        cc.copy_blocks(keys, values, pairs)
        expect_copy(recorder, keys, values, pairs)

    copied()
    copied()
    before = keys[1].data_ptr()
    keys[1].set_(torch.zeros((8, 4, 3, 8), dtype=torch.float16))
    assert keys[1].data_ptr() != before
    copied()
    keys.reverse()
    copied()
    keys, values = values, keys
    copied()
    values[2].resize_(7, 4, 3, 8)  # at the same address
    with pytest.raises(cc.ShapeError, match=r"value_caches\[2\]"):
        cc.copy_blocks(keys, values, pairs)
    for tensor in values:
        tensor.resize_(7, 4, 3, 8)
    with pytest.raises(cc.ShapeError, match="num_blocks"):
        cc.copy_blocks(keys, values, pairs)
    for tensor in keys:
        tensor.resize_(7, 4, 3, 8)
    with pytest.raises(cc.ArgumentError, match="0..6, got 7 in row 1"):
        cc.copy_blocks(keys, values, pairs)
    assert not recorder.take()


def test_layers_whose_distance_changes(recorder, monkeypatch):
    """With its alignment the kernel changes; without, nothing is learnt anew."""
    caches = [torch.zeros((9, 4, 24), dtype=torch.float16) for _ in range(2)]
    sent = []
    for tokens in (4, 4, 8, 12, 4, 5, 6, 8):
        wide = torch.zeros((2, 16, 24), dtype=torch.float16)
        flat = wide.view(-1)
        step = [flat.as_strided((2, tokens, n), (tokens * 24 + 8 * (tokens % 4), 24, 1))
                for n in (16, 8)]  # fmt: skip
        if tokens % 2:
            step = [flat.as_strided(part.shape, (tokens * 24 + 1, 24, 1)) for part in step]
        slots = torch.zeros((2, tokens), dtype=torch.int64)
        call = lambda s=step, n=slots: cc.concat_and_cache_mla_grouped(*s, caches, n)  # noqa: E731
        call()
        sent += recorder.take()
        before = recorder.long
        assert long_way(recorder, call, monkeypatch) == [sent[-1]]
        recorder.long = before
        words = np.frombuffer(sent[-1][-1], np.int64)
        assert words[8:11].tolist() == [2 * step[0].stride(0), 2 * step[1].stride(0), 8 * tokens]
    assert sent[0][0] == sent[3][0] != sent[5][0]
    assert recorder.long == KNOWN + 1


def test_views_of_the_same_memory(recorder):
    """One address, several layouts: each has its own plan."""
    flat = [torch.zeros(8 * 128, dtype=torch.float16) for _ in range(2)]
    sent = []
    for _ in range(2):
        for shape, strides in (((8, 64), (128, 1)), ((8, 128), (128, 1)), ((16, 64), (64, 1))):
            cc.copy_blocks_mla([t.as_strided(shape, strides) for t in flat], [(1, 3)])
            sent += recorder.take()
    assert sent[:3] == sent[3:] and len({record for *_, record in sent}) == 3


def test_the_oldest_plans_are_forgotten(monkeypatch):
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    memory = plans.Memory()
    for number in (1, 2, 3, 4, 5):
        memory.add(number, -number)
        assert len(memory) == min(number, 3)
    assert [memory.get(number) for number in (1, 2, 3, 4, 5)] == [None, None, -3, -4, -5]
    memory.clear()
    assert len(memory) == 0 and memory.get(5) is None


def test_layers_are_not_kept_alive(recorder):
    """By the functions; a `PagedKVCache` keeps its own."""
    keys, values = layers(), layers()
    watched = [weakref.ref(tensor) for tensor in (*keys, *values)]
    for _ in range(3):
        cc.copy_blocks(keys, values, [(1, 3)])
        cc.swap_blocks(keys, values, [(1, 3)])
    cache = cc.PagedKVCache(keys, values)
    keys = values = None
    gc.collect()
    assert all(tensor() is not None for tensor in watched)
    cache.copy_blocks([(1, 3)])
    cache = None
    gc.collect()
    assert all(tensor() is None for tensor in watched)
    recorder.take()


def attention(heads):
    """Functions of a number of tokens, queries and out, for attention with that many heads."""
    keys, values = (torch.zeros((6, 4, 2, size), dtype=torch.float16) for size in (16, 8))
    entries = torch.zeros((6, 4, 24), dtype=torch.float16)
    cache = cc.PagedKVCache([keys], [values])
    table, lens = torch.zeros((9, 3), dtype=torch.int32), torch.ones(9, dtype=torch.int32)
    query = torch.zeros((9, heads, 24), dtype=torch.float16)
    lse = torch.zeros((9, heads))
    plain = query[..., :16].contiguous()
    return {
        "attention": lambda n, out: cc.paged_attention(
            plain[:n], keys, values, table[:n], lens[:n], out=out
        ),
        "attention and sums": lambda n, out: cc.paged_attention(
            plain[:n], keys, values, table[:n], lens[:n], out=out, lse=lse[:n]
        ),
        "bound attention": lambda n, out: cache.attend(0, plain[:n], table[:n], lens[:n], out=out),
        "latent attention": lambda n, out: cc.paged_attention_mla(
            query[:n], entries, table[:n], lens[:n], scale=0.1, kv_lora_rank=16, out=out
        ),
    }


def others_with_results():
    """The same of operations without heads."""
    slopes, positions, table = torch.ones(3), torch.arange(9), torch.zeros((4, 3)).int()
    starts = torch.tensor([0, 2, 5, 5, 9])
    return {
        "bias": lambda n, out: cc.alibi_bias(
            slopes, positions[:4], positions[:n], dtype="float16", out=out
        ),
        "slots": lambda n, out: cc.slot_mapping(table, positions[:n], starts, 4, out=out),
        "slots of groups": lambda n, out: cc.slot_mapping_groups(
            [table, table[:]], None, positions[:n], starts, [4, 8], out=out
        ),
    }


RESULTS = (*attention(2), *others_with_results())


@pytest.fixture
def made_here(monkeypatch):
    """New results are CPU tensors, as all are that the recorder takes for those of a GPU."""

    def empty(device, dtype):
        return functools.partial(torch.empty, dtype=getattr(torch, dtype))

    monkeypatch.setattr(making, "_torch_empty", empty)


@pytest.mark.parametrize("name", RESULTS)
def test_new_results_of_known_calls(recorder, monkeypatch, made_here, name):
    """They are what a call that gives them would send, whatever the numbers of rows, and no call
    gets another's."""
    call = (attention(4) | others_with_results())[name]
    kept, sizes = [], (8, 1, 5, 8, 7, 0)
    if name == "slots of groups":  # beside lists, empty arrays always go the long way
        sizes = sizes[:-1]
    for step, n in enumerate(sizes * 4):
        if step == KNOWN * len(sizes):
            known = recorder.long
        made = call(n, None)
        sent = recorder.take()
        kept.append(made)
        before = recorder.long
        assert long_way(recorder, lambda n=n, out=made: call(n, out), monkeypatch) == sent
        recorder.long = before
        assert len(sent) == (n > 0) and made.is_contiguous()
        given = torch.empty_like(made)
        assert call(n, given) is given  # nothing was made
        recorder.take()
    assert recorder.long == known and (name == "bias" or known <= KNOWN + 1)
    addresses = [made.data_ptr() for made in kept if made.numel()]
    assert len(set(addresses)) == len(addresses)


@pytest.mark.parametrize("name", RESULTS)
def test_new_results_of_known_calls_for_another_stream(recorder, monkeypatch, made_here, name):
    """It waits for the one on which they are made, and torch is told, as in calls that are new."""
    call = (attention(4) | others_with_results())[name]
    for _ in range(KNOWN):
        call(8, None)
    known = recorder.long
    for _ in range(2):
        with stream_of(monkeypatch, name, 5):
            recorder.ordered.clear()
            recorder.lent.clear()
            made = call(8, None)
        assert recorder.long == known and recorder.take()[-1][3] == 5
        assert recorder.ordered == [(recording.STREAM, 5, 0)]
        assert [made.data_ptr()] in [[t.data_ptr() for t in lent] for lent, *_ in recorder.lent]


@contextlib.contextmanager
def stream_of(monkeypatch, name, stream):
    """Calls of the operation get this stream."""
    owner = bound.Bound if name == "bound attention" else dispatch.Op
    call = owner.__call__
    with monkeypatch.context() as patch:
        if owner is bound.Bound:
            patch.setattr(owner, "__call__", lambda *a, **kw: call(*a, **kw | {"stream": stream}))
        else:
            patch.setattr(
                owner, "__call__",
                lambda op, given, options=(), _=None, scalars=(): call(
                    op, given, options, stream, scalars
                ),
            )  # fmt: skip
        yield


def test_what_cannot_be_made_in_known_calls(recorder, made_here):
    """Calls of the form of a known one: what their arrays lack is told as ever."""
    keys, values = (torch.zeros((6, 4, 2, 16), dtype=torch.float16) for _ in range(2))
    table, lens = torch.zeros((3, 3), dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    query = torch.zeros((3, 4, 16), dtype=torch.float16)
    given, out = (query, keys, values, table, lens), torch.empty_like(query)
    for _ in range(fastpath.calls.SETTLED + KNOWN + 1):
        cc.paged_attention(*given)
        cc.paged_attention(*given, out=out)
    recorder.take()
    for at in range(len(given)):
        for wrong, match in ((None, "None"), (3, "int"), ([1], "list")):
            for result in (None, out):
                with pytest.raises(cc.CupyCacheError, match=match):
                    cc.paged_attention(*given[:at], wrong, *given[at + 1 :], out=result)
    with pytest.raises(cc.CupyCacheError, match="seq_lens"):
        cc.paged_attention(*given[:4], torch.ones(4, dtype=torch.int32))
    with pytest.raises(cc.CupyCacheError, match="query"):
        cc.paged_attention(query[0], *given[1:])
    assert not recorder.take()
    cc.paged_attention(*given[:4], lens.numpy())  # of another framework, a signature of its own
    assert len(recorder.take()) == 1


def test_functions_that_make_tensors(monkeypatch):
    """What torch does not document is used where it answers as it should, and on the GPU that is
    current."""
    like, tensor = torch.zeros((2, 3), dtype=torch.int16), torch.zeros(2)
    used, make = [], torch.empty
    for count, current, quick in ((0, 0, True), (2, None, True), (2, 1, False)):
        used.clear()
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=count: n)
        monkeypatch.setattr(torch.cuda, "current_device", lambda n=current: n)
        monkeypatch.setattr(torch, "empty", lambda *a, **kw: used.append(1) or make(*a, **kw))
        made = making.like(like)((4, 0, 5))()
        monkeypatch.undo()
        assert (made.shape, made.stride(), made.dtype) == ((4, 0, 5), (5, 5, 1), torch.int16)
        assert bool(used) != quick
    guards_of_torch = torch._C._dynamo.guards
    for strange in (None, lambda *given: tensor, lambda shape: None):
        making._quick_empty.cache_clear()
        monkeypatch.setattr(guards_of_torch, "_empty_strided_cpu", strange)
        assert making._quick_empty("cpu") is None
        assert making.like(like)((4, 5))().shape == (4, 5)
    monkeypatch.undo()
    making._quick_empty.cache_clear()
    assert making._quick_empty("no such kind") is None


def test_new_results_for_another_stream(recorder, monkeypatch):
    """They are made on torch's current one: the other waits for it, and torch is told."""
    make, lent = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: make(shape, dtype=dtype))
    # What this test puts in torch's place must not be remembered for others.
    monkeypatch.setattr(making, "_torch_empty", making._torch_empty.__wrapped__)
    monkeypatch.setattr(streams, "lend", lambda *given: lent.append(given))
    gpu, dtype = devices.Device("cuda", 0), formats.DTYPES["float32"]
    for stream in (None, recording.STREAM):
        making.empty("torch", gpu, (3,), dtype, stream)
        assert not recorder.ordered and not lent
    made = making.empty("torch", gpu, (3,), dtype, 5)
    assert recorder.ordered == [(recording.STREAM, 5, 0)]
    assert lent == [([made], 5, 0)]

    keys, values = (torch.zeros(4, 16, 2, 8, dtype=torch.float16) for _ in range(2))
    table, bounds = (torch.tensor(n, dtype=torch.int32) for n in ([[1, 2]], [0, 5]))
    other = types.SimpleNamespace(ptr=6)
    cc.PagedKVCache([keys], [values]).gather(0, table, bounds, num_tokens=5, stream=other)
    assert recorder.ordered[1:] == [(recording.STREAM, 6, 0)] * 2
    assert {launched[3] for launched in recorder.launches} == {6}
    recorder.take()


# --- declarations ---------------------------------------------------------------------------------


def test_what_is_written_is_a_destination():
    """Where rows vary: then it is seen that more of them may run into one another."""
    assert len(dispatch._ops) > 25
    for op in dispatch._ops:
        for index, arg in enumerate(op.args):
            if arg.written and arg.varies == dispatch.ROWS:
                assert index in op.destination, f"{op.name}: {arg.name}"


def test_a_bound_array_of_which_the_rows_count(recorder):
    """Slopes of each sequence are kept, as the caches are; how many there are is asked."""
    _, _, *caches, _ = tensors(heads=2, size=16)
    cache, slopes = cc.PagedKVCache(*([one] for one in caches)), torch.zeros(3, 4)

    def attend(sequences):
        query, out = torch.zeros(2, sequences, 4, 16, dtype=torch.float16)
        table = torch.zeros(sequences, 2, dtype=torch.int32)
        lens = torch.ones(sequences, dtype=torch.int32)
        cache.attend(0, query, table, lens, alibi_slopes=slopes, out=out)
        (sent,) = recorder.take()
        return sent[-1], slopes.data_ptr()

    for sequences in (3, 2, 3, 1, 2):
        record, address = attend(sequences)
        assert address in struct.unpack_from("<15Q", record)
    assert recorder.long == KNOWN
    with pytest.raises(cc.ShapeError, match="alibi_slopes: expected rows for the 4 sequences"):
        attend(4)


@pytest.mark.parametrize("rows", [1, 42, 43, 128, 1000])
def test_blocks_of_threads_that_are_all_full(rows):
    """As few as have three threads for each row, and no others."""
    (blocks, *others), threads = launch.FullShape(3, 128)(rows)
    assert others == [1, 1] and threads == 128
    assert blocks * threads >= 3 * rows > (blocks - 1) * threads


def test_more_sequences_than_kernels_can_number():
    """Refused by shapes alone; of such a table there is no test that could be run."""
    many = 2**31
    table = (many, 1), (1, 1)  # shape, strides
    for op, extents, scalars in (
        (slot_mapping.OP, (table, 0, many + 1, 0), ()),
        (slot_mapping_groups.OP, ([table], None, 0, many + 1, ((1, 0), (1, 1))), ()),
        (gather_cache.OP, (0, table, many + 1, None), ()),
        (gather_and_maybe_dequant_cache.OP, (0, table, many + 1, None), (1.0, 0)),
        (cp_gather_indexer_k_quant_cache.OP, (0, 0, table, many + 1), ()),
        (paged_attention.OP, (many, table, many, None, many, None, None), ()),
        (paged_attention_mla.OP, (many, table, many, None, many, None), ()),
    ):
        told = rf"{op.name}: Invalid shape of \w+: expected less than 2\^31 sequences, got {many}"
        with pytest.raises(cc.ShapeError, match=told):
            op.count(extents, (), scalars)
