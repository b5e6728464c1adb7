# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What earlier calls, or other arguments, must not change."""

import contextlib
import gc
import threading
import types
import weakref

import numpy as np
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.ops import copy_blocks, reshape_and_cache_flash
from cupy_cache.runtime import dispatch, driver, env, streams

PAIRS = [(0, 1)]


pytestmark = pytest.mark.usefixtures("nothing_remembered")


def tensor(*shape, dtype="float16"):
    """Zeros, 16-byte aligned."""
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    flat = torch.zeros(nbytes + 16, dtype=torch.uint8)
    start = -flat.data_ptr() % 16
    return flat[start : start + nbytes].view(dtype).view(shape)


def is_among(wanted, lent):
    return any(wanted is found for found in lent)


def counted_plans(monkeypatch, op):
    """A list that grows with every plan that ``op`` makes."""
    made, make = [], op.make_plan
    monkeypatch.setattr(op, "make_plan", lambda *given: made.append(1) or make(*given))
    return made


# --- other arguments ------------------------------------------------------------------------------


def test_scales_in_different_arguments(recorder):
    """An array for the keys and a number for the values, then the other way round."""
    one, other = tensor(1, dtype="float32"), tensor(1, dtype="float32")
    step = tensor(5, 3, 16), tensor(5, 3, 16), tensor(5, dtype="int64")

    def cache(k_scale, v_scale):
        layer = [[tensor(6, 4, 3, 16, dtype="uint8")] for _ in range(2)]
        return cc.PagedKVCache(*layer, "fp8", k_scale, v_scale)

    def sent(cache):
        cache.write(0, *step)
        ((*_, record),) = recorder.take()
        fields = reshape_and_cache_flash.PARAMS.per_call.unpack_from(record)
        return fields[5:7], fields[8:]

    first, second = cache(one, 2.0), cache(3.0, other)
    for _ in range(4):
        addresses, (_, number) = sent(first)
        assert addresses == (one.data_ptr(), 0) and number == 2.0
    for _ in range(4):
        addresses, (number, _) = sent(second)
        assert addresses == (0, other.data_ptr()) and number == 3.0
        addresses, (_, number) = sent(first)
        assert addresses == (one.data_ptr(), 0) and number == 2.0


def test_one_row_does_not_vouch_for_the_alignment_of_more(emulated_world):
    """Of one query the rows are 16-byte aligned, of four they are not."""
    world = emulated_world()
    try:
        buffer = worlds.Buffer(4096, None, fill=0)
        one = buffer.view((3, 1, 16), "float32", strides=(64, 8, 4))
        four = buffer.view((3, 4, 16), "float32", strides=(288, 72, 4))
        slopes = np.array([1, 0.5, 2], np.float32)
        for out in (one, four):
            queries = out.shape[1]
            given = (slopes, np.arange(queries), np.arange(16))
            cc.alibi_bias(
                *(world.put(worlds.of_values(values)) for values in given), out=world.put(out)
            )
            distance = np.arange(16) - np.arange(queries)[:, None]
            assert (out.on(world.bytes_of(out)) == slopes[:, None, None] * distance).all()
    finally:
        world.close()


def test_one_row_does_not_vouch_for_the_addresses_of_more():
    """Rows 22 bytes apart of 4-byte numbers."""
    raw = worlds.aligned_bytes(64)
    raw[:] = 0

    def compute(rows):
        table = np.lib.stride_tricks.as_strided(raw.view(np.int32), (rows, 2), (22, 4))
        return cc.slot_mapping(table, np.arange(rows), np.arange(rows + 1), 4)

    for _ in range(3):
        with pytest.raises(cc.StrideError, match="block_table"):
            compute(2)
        with contextlib.suppress(cc.StrideError):  # either way, it must not change the other
            compute(1)


def with_tables(world, tables):
    """`slot_mapping_groups` of two requests, at position 0 and 5, in blocks of 4."""
    step = (np.array([0, 5]), np.array([0, 1, 2], np.int32))
    positions, bounds = (world.put(worlds.of_values(values)) for values in step)
    result = cc.slot_mapping_groups(tables, None, positions, bounds, [4] * len(tables))
    world.synchronize()
    return world.numpy(result)


def test_empty_first_table(emulated_world):
    """It has no strides that the others could be like."""
    numbers = np.arange(24, dtype=np.int32).reshape(2, 12)
    plain = worlds.NumPyWorld()
    emulated = emulated_world()
    try:
        spec = worlds.of_values(numbers)

        def view(width):
            return emulated.put(worlds.Spec(spec.buffer, 0, (2, width), (48, 8), "int32"))

        for world, tables in (
            (plain, [numbers[:, 0:0:2], numbers[:, 0:6:2]]),
            (emulated, [view(0), view(3)]),
        ):
            for _ in range(2):
                with pytest.raises(cc.StrideError, match="block_tables"):
                    with_tables(world, tables)
    finally:
        emulated.close()


@pytest.mark.whole
@pytest.mark.parametrize("name", ["copy_blocks", "swap_blocks", "PagedKVCache"])
@pytest.mark.parametrize("lengths", [(1, 0), (0, 1)])
def test_one_list_is_empty(name, lengths):
    lists = [[np.zeros((8, 4, 2, 8), np.float32)] * length for length in lengths]
    pairs = () if name == "PagedKVCache" else (PAIRS,)
    with pytest.raises(cc.ShapeError, match="Invalid length"):
        getattr(cc, name)(*lists, *pairs)


def test_an_empty_tensor_before_one_that_overlaps_the_buffer():
    base = np.arange(256, dtype=np.uint8)
    layer = np.zeros((4, 2, 0), np.uint8), base[64:128].reshape(4, 2, 8)
    with pytest.raises(cc.ArgumentError, match="memory"):
        cc.pack_blocks([layer], [0, 1], base[72:136])
    assert (base == np.arange(256)).all()


def test_calls_without_work_come_first(recorder):
    """What the first launch needs is made then."""
    source, table = tensor(6, 4, 8), tensor(2, 3, dtype="int32")
    bounds, destination = tensor(3, dtype="int32"), tensor(9, 8)
    for tokens in (0, 0, 0, 9, 0, 9):
        cc.gather_and_maybe_dequant_cache(
            source, destination, table, bounds, None, tokens, "auto", None
        )
        sent = recorder.take()
        assert len(sent) == (1 if tokens else 0)
        assert all("gather" in expression for expression, *_ in sent)  # of a loaded kernel


def test_a_stream_means_nothing_on_the_cpu():
    table = np.array([[5, 2], [0, 7]], np.int32)
    step = [table], None, np.array([1, 5]), np.array([0, 1, 2]), [4]
    for _ in range(3):
        for stream in (0, None):
            assert cc.slot_mapping_groups(*step, stream=stream).tolist() == [[21, 29]]


def test_a_stream_means_nothing_on_the_cpu_for_layers(rng):
    latent, rope = rng.random((2, 4, 8), np.float32), rng.random((2, 4, 4), np.float32)
    slots = np.stack([np.arange(4), np.arange(4) + 7])
    for stream in (0, None, 0):
        caches = [np.zeros((6, 4, 12), np.float32) for _ in range(2)]
        cc.concat_and_cache_mla_grouped(latent, rope, caches, slots, stream=stream)
        for layer, cache in enumerate(caches):
            rows = cache.reshape(24, 12)
            assert (rows[slots[layer]] == np.concatenate([latent[layer], rope[layer]], 1)).all()
            assert np.count_nonzero(rows) == np.count_nonzero(rows[slots[layer]])


def test_one_row_of_permuted_dimensions(rng):
    """The stride of a single row says nothing about where the next one would be."""
    source = rng.random((6, 4, 3, 5, 8), np.float32)
    for rows in (1, 2, 1):
        destination = np.zeros((rows, 5, 3, 8), np.float32).transpose(0, 2, 1, 3)
        cc.gather_cache(source, destination, np.array([[2]]), np.array([0, rows]))
        assert (destination == source[2, :rows]).all()


def test_one_column_of_another_stride():
    """Tables of two and of three rows; the first, a transposed row, has one column."""
    column = np.array([[3, 6]], np.int32).T
    wide = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]], np.int32)
    step = None, np.array([1, 2]), np.array([0, 1, 2]), [4, 4]
    for _ in range(3):
        assert cc.slot_mapping_groups([column, wide], *step).tolist() == [[13, 26], [5, 22]]
        assert cc.slot_mapping_groups([wide, column], *step).tolist() == [[5, 22], [13, 26]]


# --- what is kept, lent and forgotten -------------------------------------------------------------


def test_host_memory_of_a_list_that_is_cleared(recorder):
    """It is kept until the copy is done, whatever the caller does with the list."""
    recorder.host = ("dst",)
    source, host = [tensor(4, 4, 8)], [tensor(4, 4, 8)]
    cc.swap_blocks(source, host, PAIRS)
    kept = weakref.ref(host[0])
    host.clear()
    gc.collect()
    assert kept() is not None
    recorder.event_made.is_done = True
    streams.let_go()
    gc.collect()
    assert kept() is None


class Work:
    """What swaps enqueue, of which a test decides how much is done; makes its events."""

    def __init__(self):
        self.enqueued = self.done = 0

    def event(self, stream, device):
        del device
        return Point(self, stream)


class Point:
    """What `driver.Event` is."""

    def __init__(self, work, stream):
        self._work = work
        self.move(stream)

    def move(self, stream):
        del stream
        self._at = self._work.enqueued

    def done(self):
        return self._work.done >= self._at


@pytest.fixture
def work(recorder, monkeypatch):
    made = Work()
    monkeypatch.setattr(recorder, "event", made.event)
    recorder.host = ("dst",)
    return made


@pytest.mark.parametrize("uses", [(0, 0, 0), (0, 0, 1, 0), (1, 0, 0)])
def test_host_memory_that_is_used_again_is_kept_for_the_last_copy(work, uses):
    source, hosts = tensor(4, 4, 8), [tensor(4, 4, 8) for _ in range(2)]
    kept = weakref.ref(hosts[0])
    for which in uses:
        work.enqueued += 1
        cc.swap_blocks(source, hosts[which], PAIRS)
    del hosts
    for done in range(len(uses) + 1):
        work.done = done
        streams.let_go()
        gc.collect()
        assert (kept() is not None) == (done < len(uses))


def test_host_memory_that_two_threads_use_on_the_stream_that_each_has(work):
    """Handle 2 is another stream in each thread: the later copy does not vouch for the earlier."""
    source, host = tensor(4, 4, 8), tensor(4, 4, 8)
    for _ in range(2):
        work.enqueued += 1
        thread = threading.Thread(target=cc.swap_blocks, args=(source, host, PAIRS),
                                  kwargs={"stream": 2})  # fmt: skip
        thread.start()
        cc.swap_blocks(source, host, PAIRS, stream=2)
        thread.join()
    assert len(streams._kept) > 1


def test_bound_caches_are_lent_at_every_call(recorder):
    """Also where the fast path is taken."""
    keys, values = tensor(4, 4, 2, 8), tensor(4, 4, 2, 8)
    cache = cc.PagedKVCache([keys], [values])
    step = tensor(3, 2, 8), tensor(3, 2, 8), tensor(3, dtype="int64")
    for _ in range(6):
        recorder.lent.clear()
        cache.write(0, *step, stream=5)
        assert {stream for _, stream, _ in recorder.lent} == {5}
        lent = [array for arrays_lent, _, _ in recorder.lent for array in arrays_lent]
        assert all(is_among(array, lent) for array in (keys, values, *step))


def test_clearing_the_lists_that_were_given(recorder):
    keys, values = [tensor(4, 4, 2, 8)], [tensor(4, 4, 2, 8)]
    caches = *keys, *values
    cache = cc.PagedKVCache(keys, values)
    keys.clear()
    values.clear()
    for _ in range(3):
        recorder.lent.clear()
        cache.copy_blocks(PAIRS, stream=5)
        assert {stream for _, stream, _ in recorder.lent} == {5}
        lent = [array for arrays_lent, _, _ in recorder.lent for array in arrays_lent]
        assert all(is_among(array, lent) for array in caches)


def test_forgetting_everything_reaches_bound_caches(recorder, monkeypatch):
    """More of them than an operation remembers signatures."""
    made = counted_plans(monkeypatch, copy_blocks.OP)
    step = tensor(3, 2, 8), tensor(3, 2, 8), tensor(3, dtype="int64")
    caches = [
        cc.PagedKVCache([tensor(4 + n, 4, 2, 8)], [tensor(4 + n, 4, 2, 8)]) for n in range(300)
    ]
    for cache in caches:
        for _ in range(3):
            cache.write(0, *step)
    assert any(cache.writer(0).fast_paths for cache in caches)  # else nothing here was tested
    held = [cache.writer(0).fast_paths for cache in caches]
    dispatch.forget_everything()
    assert not any(held)
    assert not any(cache.writer(0).fast_paths for cache in caches)
    made.clear()
    recorder.take()
    for cache in caches:
        cache.copy_blocks(PAIRS)
        cache.write(0, *step)
    assert len(made) == len(caches) and len(recorder.take()) == 2 * len(caches)


def test_a_buffer_with_more_rows_than_blocks(recorder, monkeypatch):
    """It is in host memory; the caches' blocks interleave, the buffer's rows do not."""
    recorder.host = ("out",)
    made = []
    remember = dispatch.Op.remember
    monkeypatch.setattr(dispatch.Op, "remember", lambda *a: made.append(1) or remember(*a))
    cache = tensor(2, 4, 8).transpose(0, 1)
    out = tensor(64, 64, dtype="uint8")
    for _ in range(6):
        cc.pack_blocks([cache], [0], out)
        (_,) = recorder.take()
    assert len(made) == 1


# --- what is no array that can be read ------------------------------------------------------------


def test_chosen_blocks_without_memory():
    torch = pytest.importorskip("torch")
    caches = [torch.zeros(8, 4, 2, 8)]
    with pytest.raises(cc.CupyCacheError, match="block_mapping"):
        cc.copy_blocks(caches, caches, torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    with pytest.raises(cc.CupyCacheError, match="block_ids"):
        cc.zero_blocks(caches, torch.zeros(1, dtype=torch.int64, device="meta"))


class Forwards:
    """Has the attributes of what it wraps."""

    def __init__(self, wrapped):
        self._wrapped = wrapped

    def __getattr__(self, name):
        return getattr(self._wrapped, name)


@pytest.mark.parametrize("protocol", ["__cuda_array_interface__", "__dlpack__"])
def test_one_class_does_not_mean_one_protocol(protocol):
    """How one array is read is not how another one of its class is."""
    cache = np.ones((2, 8), np.float32)
    first = types.SimpleNamespace(__cuda_array_interface__={}) if "cuda" in protocol else cache
    with contextlib.suppress(cc.CupyCacheError):
        cc.zero_blocks([Forwards(first)], [0])
    with pytest.raises(cc.DTypeError, match=r"zero_blocks: Invalid type of caches: .* Forwards"):
        cc.zero_blocks([Forwards(object())], [1])
    cc.zero_blocks([Forwards(cache)], [1])
    assert not cache[1].any()


@pytest.mark.parametrize("order", [1, -1])
def test_one_class_does_not_mean_one_framework(order):
    """What `weakref.proxy` makes is of one class, and says that it is of the array's."""
    torch = pytest.importorskip("torch")
    for cache in (np.ones((2, 8), np.float32), torch.ones(2, 8), np.ones((2, 8)))[::order]:
        cc.zero_blocks([weakref.proxy(cache)], [1])
        assert cache[0].all() and not cache[1].any()


class Gone:
    """A number whose memory is gone, as a deleted array of JAX."""

    def __index__(self):
        raise RuntimeError("it was deleted")


@pytest.mark.parametrize("numbers", [[Gone()], [(0, Gone())], [(Gone(), 1)]])
def test_chosen_numbers_that_cannot_be_read(numbers):
    caches = [np.zeros((8, 4))]
    with pytest.raises(cc.CupyCacheError, match=r"expected .*integers") as told:
        if isinstance(numbers[0], tuple):
            cc.copy_blocks_mla(caches, numbers)
        else:
            cc.zero_blocks(caches, numbers)
    causes = []
    while (error := (causes or [told.value])[-1].__cause__) is not None:
        causes.append(error)
    assert isinstance(causes[-1], RuntimeError)


def test_chosen_blocks_with_the_negative_bit():
    """The right blocks or none."""
    torch = pytest.importorskip("torch")
    cache, touched = torch.ones(8, 4), {1, 2}
    try:
        cc.zero_blocks([cache], torch._neg_view(torch.tensor([-1, -2])))
    except cc.CupyCacheError:
        touched = set()
    assert {n for n in range(8) if not cache[n].any()} == touched


@pytest.mark.parametrize("tokens", [1, 2])
def test_complex_keys(tokens):
    """Of one row as of several."""
    keys, values = np.zeros((tokens, 2, 8), np.complex64), np.zeros((tokens, 2, 8), np.float32)
    caches = [np.zeros((4, 4, 2, 8), np.float32) for _ in range(2)]
    with pytest.raises(cc.DTypeError, match="reshape_and_cache_flash: .*key"):
        cc.reshape_and_cache_flash(keys, values, *caches, np.arange(tokens))


def test_size_of_caches_that_cannot_be_written():
    """Nothing is written: two blocks, or tokens, of 4 * 8 floats in each of two layers."""
    fixed = np.zeros((8, 4, 8), np.float32)
    fixed.flags.writeable = False
    assert cc.packed_size([fixed, fixed], num_blocks=2) == 2 * 2 * 4 * 8 * 4
    shared = np.broadcast_to(np.zeros((1, 4, 8), np.float32), (8, 4, 8))
    assert cc.packed_size([shared, shared], num_blocks=2) == 2 * 2 * 4 * 8 * 4
    assert cc.packed_size([fixed, fixed], num_tokens=2) == 2 * 2 * 8 * 4


@pytest.mark.parametrize("name", ["pack_blocks", "unpack_blocks", "pack_tokens", "unpack_tokens"])
def test_no_layout(name):
    caches, buffer = [np.zeros((8, 4, 8), np.float32)], np.zeros(128, np.uint8)
    first, *rest = (buffer, caches, [0]) if name.startswith("un") else (caches, [0], buffer)
    for _ in range(2):
        with pytest.raises(cc.ArgumentError, match="layout"):
            getattr(cc, name)(first, *rest, layout=None)


def test_buffer_without_dimensions():
    with pytest.raises(cc.ShapeError, match="out"):
        cc.pack_blocks([np.zeros((8, 1), np.uint8)], [1], np.zeros((), np.uint8))


@pytest.mark.parametrize("skip", [True, False])
def test_skip_scale_in_other_forms(skip):
    """1.0 in E4M3 is 0x38, and 1.0 / 4.0 is 0x28."""
    for given in (skip, np.bool_(skip), int(skip), skip):
        cache = np.zeros((2, 4, 12), np.uint8)
        step = np.ones((2, 8), np.float32), np.ones((2, 4), np.float32)
        cc.concat_and_cache_mla(*step, cache, np.arange(2), "fp8", 4.0, given)
        assert (cache[0, :2] == (0x38 if skip else 0x28)).all()


# --- numbers that equal others --------------------------------------------------------------------

STEP = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(2), np.arange(3)


@pytest.mark.parametrize("other", [True, 1.0])
def test_block_size_that_equals_a_known_one(other):
    """True == 1 == 1.0, but only one of them is an integer."""
    for _ in range(3):
        cc.slot_mapping(*STEP, block_size=1)
        with pytest.raises(cc.ArgumentError, match="block_size"):
            cc.slot_mapping(*STEP, block_size=other)


@pytest.mark.parametrize(
    ("name", "known", "other"),
    [("cp_rank", 0, 0.0), ("cp_interleave", 1, 1.0), ("cp_interleave", 1, True)],
)
def test_ranks_that_equal_known_ones(name, known, other):
    table, *step = STEP
    for _ in range(3):
        cc.slot_mapping(*STEP, 2, cp_world_size=2, **{name: known})
        with pytest.raises(cc.ArgumentError, match=name):
            cc.slot_mapping(*STEP, 2, cp_world_size=2, **{name: other})
        cc.slot_mapping_groups([table], None, *step, [2], cp_world_size=2, **{name: known})
        with pytest.raises(cc.ArgumentError, match=name):
            cc.slot_mapping_groups([table], None, *step, [2], cp_world_size=2, **{name: other})


@pytest.mark.parametrize("other", [True, 1.0])
def test_block_sizes_that_equal_known_ones(other):
    table, *step = STEP
    for _ in range(3):
        cc.slot_mapping_groups([table], None, *step, [1])
        with pytest.raises(cc.ArgumentError, match="block_sizes"):
            cc.slot_mapping_groups([table], None, *step, [other])


@pytest.mark.parametrize("other", [True, 1.0])
def test_block_bytes_that_equal_known_ones(other):
    source, destination = np.zeros((8, 1), np.uint8), np.zeros((8, 1), np.uint8)
    for _ in range(3):
        cc.swap_blocks(source, destination, PAIRS, block_size_in_bytes=1)
        with pytest.raises(cc.ArgumentError, match="block_size_in_bytes"):
            cc.swap_blocks(source, destination, PAIRS, block_size_in_bytes=other)


# --- captures -------------------------------------------------------------------------------------


class Capturing:
    """A driver on which some streams are being captured."""

    def __init__(self, *captured):
        self.captured, self.given = captured, []

    def capturing(self, stream, device):
        return stream in self.captured

    def capture(self, stream, device):
        return stream

    def order(self, *streams):
        """No stream waits for another here."""

    @contextlib.contextmanager
    def scratch(self, size, stream, device):
        self.given.append((size, stream, device))
        yield 4096


CURRENT, OTHER = 5, 7


@pytest.mark.parametrize(
    "captured, by_torch", [((), True), ((CURRENT, OTHER), True), ((OTHER,), False)]
)
def test_torchs_allocator_is_told_of_no_capture_but_its_own(monkeypatch, captured, by_torch):
    """It would give the memory of a graph to others, and record events in a stream that is being
    captured by others."""
    torch = pytest.importorskip("torch")
    asked = Capturing(*captured)
    monkeypatch.setattr(driver, "active", asked)
    monkeypatch.setattr(streams, "current", lambda framework, device: lambda: CURRENT)
    lent, made = [], []
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *where, **named: lent.append(where))
    allocator = lambda *asked: made.append(asked) or 64, lambda address: None
    monkeypatch.setattr(streams, "_torch_allocator", lambda: allocator)
    monkeypatch.setattr(streams, "_torch_knows", lambda capture, stream, device: True)
    streams.lend([], OTHER, 0)
    assert bool(lent) == by_torch
    with streams.scratch("torch", 0, 64, OTHER) as address:
        assert address == (64 if by_torch else 4096)
    assert made == [(64, OTHER, 0)] * by_torch and asked.given == [(64, OTHER, 0)] * (not by_torch)
    with streams.scratch("torch", 0, 64, CURRENT) as address:
        assert address == 64


@pytest.mark.whole
@pytest.mark.parametrize(
    "uncached, snapshot, known",
    [
        (False, [{"address": 0, "total_size": 512, "segment_pool_id": (3, 0)}], True),
        (False, [{"address": 0, "total_size": 512, "segment_pool_id": (0, 0)}], False),
        (False, [{"address": 512, "total_size": 512, "segment_pool_id": (3, 0)}], False),
        (False, [{"address": 64, "total_size": 1, "segment_pool_id": (3, 0)}], True),
        (False, [{"address": 0, "total_size": 64, "segment_pool_id": (3, 0)}], False),
        (False, [], False),
        (False, RuntimeError("of another allocator"), True),
        (True, [{"address": 0, "total_size": 512, "segment_pool_id": (3, 0)}], False),
    ],
)
def test_torchs_allocator_serves_captures_whose_memory_it_keeps(
    monkeypatch, nothing_remembered, uncached, snapshot, known
):
    """Memory that it does not hold for the graph is another's when the graph is replayed."""
    torch = pytest.importorskip("torch")
    streams._torch_knows.cache_clear()
    monkeypatch.delenv(env.TORCH_UNCACHED, raising=False)
    if uncached:
        monkeypatch.setenv(env.TORCH_UNCACHED, "1")
    made = []
    allocator = lambda *asked: made.append(asked) or 64, lambda address: None
    monkeypatch.setattr(streams, "_torch_allocator", lambda: allocator)

    def memory_snapshot():
        if isinstance(snapshot, Exception):
            raise snapshot
        return snapshot

    monkeypatch.setattr(torch.cuda, "memory_snapshot", memory_snapshot)
    assert streams._torch_knows(1, OTHER, 0) is known
    assert made == [(1, OTHER, 0)] * (not uncached)  # nothing is that would end the capture
    streams._torch_knows.cache_clear()
