# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import itertools
import logging

import numpy as np
import oracle
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st
from layers import KINDS, WHERE, Storages, entries, given_as, layers_of, refused

import cupy_cache as cc
from cupy_cache.ops.shared import blocks, packing

LAYOUTS = ("layer_first", "page_first")


def specs_of(layers, *others):
    return [spec for layer in layers for spec in layer] + list(others)


def item_shape(spec, by_slot):
    return spec.shape[1 + by_slot :]


def size_of(layers, count, by_slot):
    return count * sum(
        int(np.prod(item_shape(spec, by_slot), dtype=np.int64)) * spec.numpy_dtype.itemsize
        for layer in layers
        for spec in layer
    )


def buffer_for(rng, layers, count, by_slot, spare=5, pad=0):
    """A buffer of bytes with poison, larger than needed."""
    return worlds.array(rng, (size_of(layers, count, by_slot) + spare,), "uint8", pad)


def chosen(rng, limit, count, by_slot):
    """Distinct numbers; padding among slots."""
    numbers = rng.permutation(limit)[:count].astype(np.int64)
    if by_slot:
        numbers[rng.random(count) < 0.2] = -rng.integers(1, 2**31)
    return numbers


def limit_of(layers, by_slot):
    spec = layers[0][0]
    return spec.shape[0] * (spec.shape[1] if by_slot else 1)


def check_pack(world, layers, numbers, given, buffer, layout, by_slot, put=None):
    out = world.put(buffer) if put is None else put
    (cc.pack_tokens if by_slot else cc.pack_blocks)(
        entries(world, layers), given, out, layout=layout
    )
    expected = Storages(*specs_of(layers, buffer))
    views = [[expected(spec) for spec in layer] for layer in layers]
    oracle.pack(views, numbers, expected(buffer), layout, by_slot)
    expected.check(world)


def check_unpack(world, layers, numbers, given, buffer, layout, by_slot, put=None):
    packed = world.put(buffer) if put is None else put
    (cc.unpack_tokens if by_slot else cc.unpack_blocks)(
        packed, entries(world, layers), given, layout=layout
    )
    expected = Storages(*specs_of(layers, buffer))
    views = [[expected(spec) for spec in layer] for layer in layers]
    oracle.unpack(expected(buffer), views, numbers, layout, by_slot)
    expected.check(world)


CHECKS = (check_pack, check_unpack)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("by_slot", [False, True], ids=["blocks", "tokens"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout(world, rng, kind, layout, by_slot, check):
    layers = layers_of(rng, kind)
    if by_slot and max(len(spec.shape) for layer in layers for spec in layer) > 4:
        pytest.skip("tokens of x-packed caches are refused")
    limit = limit_of(layers, by_slot)
    numbers = chosen(rng, limit, int(rng.integers(1, min(limit, 9) + 1)), by_slot)
    buffer = buffer_for(rng, layers, len(numbers), by_slot, pad=int(rng.choice([0, 0, 8, 3])))
    check(world, layers, numbers, numbers, buffer, layout, by_slot)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("by_slot", [False, True], ids=["blocks", "tokens"])
@pytest.mark.parametrize("where", WHERE)
def test_numbers_everywhere(world, rng, where, by_slot, check):
    layers = layers_of(rng, "NHD", num_layers=2)
    numbers = chosen(rng, limit_of(layers, by_slot), 5, by_slot)
    buffer = buffer_for(rng, layers, 5, by_slot)
    check(world, layers, numbers, given_as(world, numbers, where), buffer, LAYOUTS[0], by_slot)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "uint8", "float32", "float64", "int8"])
@pytest.mark.parametrize("check", CHECKS)
def test_any_dtype(world, rng, dtype, check):
    layers = layers_of(rng, "odd", dtype=dtype)
    if dtype == "float64":
        for layer in layers:
            layer[0] = worlds.array(rng, layer[0].shape, dtype, pad=8)
    numbers = chosen(rng, 6, 3, False)
    check(world, layers, numbers, numbers, buffer_for(rng, layers, 3, False), LAYOUTS[1], False)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("by_slot", [False, True], ids=["blocks", "tokens"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("where", ["list", "device-int64"])
def test_buffer_in_host_memory(
    world, rng, monkeypatch, caplog, pinned, by_slot, layout, check, where
):
    """Pageable memory is staged piece by piece: in pieces of several layers, of several items, of
    one item. What is skipped keeps its bytes."""
    layers = layers_of(rng, "sizes-differ", num_layers=3)
    numbers = chosen(rng, limit_of(layers, by_slot), 4, by_slot)
    buffer = buffer_for(rng, layers, 4, by_slot)
    whole = size_of(layers, 4, by_slot)
    piece = int(rng.choice([whole, whole // 2, whole // 3, whole // 4, whole // 7, 1]))
    monkeypatch.setattr(packing, "STAGE_BYTES", piece)
    with caplog.at_level(logging.WARNING, "cupy_cache"):
        put = world.put_on_host(buffer, pinned)
        given = given_as(world, numbers, where)
        check(world, layers, numbers, given, buffer, layout, by_slot, put)
    warned = "not pinned" in caplog.text
    assert warned == (world.on_gpu and not pinned)


@pytest.mark.parametrize("check", CHECKS)
def test_more_work_than_a_small_grid_takes_at_once(world, rng, check):
    """Over the bus few thread blocks run, each of which takes many turns."""
    layers = [[worlds.array(rng, (6, 4, n), "float64") for n in (256, 128)] for _ in range(2)]
    numbers = rng.permutation(6)
    buffer = buffer_for(rng, layers, 6, False)
    put = world.put_on_host(buffer)
    check(world, layers, numbers, numbers, buffer, LAYOUTS[0], False, put)


def test_round_trip_between_layouts_of_memory(world, rng):
    """Bytes packed from an HND cache unpack into an NHD one."""
    for by_slot in (False, True):
        one, other = layers_of(rng, "HND"), layers_of(rng, "packed-NHD")
        numbers = rng.permutation(limit_of(one, by_slot))[:4]
        to = rng.permutation(limit_of(one, by_slot))[:4]
        buffer = buffer_for(rng, one, 4, by_slot)
        names = ("pack_tokens", "unpack_tokens") if by_slot else ("pack_blocks", "unpack_blocks")
        pack, unpack = (getattr(cc, name) for name in names)
        pack(entries(world, one), numbers, world.put(buffer))
        unpack(world.put(buffer), entries(world, other), to)
        for first, second in zip(one, other):
            for source, destination in zip(first, second):
                got = destination.on(world.bytes_of(destination)).view("u2")
                want = source.on(source.buffer.bytes).view("u2")
                if by_slot:
                    got, want = (a.reshape(-1, *a.shape[2:]) for a in (got, want))
                np.testing.assert_array_equal(got[to], want[numbers])


def test_more_than_one_launch_takes(world, rng, monkeypatch):
    """The parameter block holds `TABLE_WORDS` words: 5 layers and 60 numbers do not fit 12, nor 250
    layers and 500 numbers 480."""
    if world.on_gpu and world.name != "emulated":
        num_layers, count = 250, 500
    else:
        monkeypatch.setattr(blocks, "TABLE_WORDS", 12)
        num_layers, count = 5, 60
    for layout in LAYOUTS:
        layers = [[worlds.array(rng, (count, 2, 4), "int16") for _ in range(2)]
                  for _ in range(num_layers)]  # fmt: skip
        numbers = rng.permutation(count)[: count - 3]
        buffer = buffer_for(rng, layers, len(numbers), False)
        check_pack(world, layers, numbers, numbers, buffer, layout, False)
        buffer = buffer_for(rng, layers, len(numbers), False)
        check_unpack(world, layers, numbers, numbers, buffer, layout, False)


def test_one_launch(emulated_world, rng, monkeypatch):
    """All layers, keys and values, and 832 numbers in host memory: nothing but one launch."""
    world = emulated_world()
    try:
        launches = []
        launched = world.driver.launch
        monkeypatch.setattr(
            world.driver, "launch", lambda *a: (launches.append(a[1]), launched(*a))
        )
        layers = [[worlds.array(rng, (832, 1, 4), "uint8") for _ in range(2)] for _ in range(32)]
        buffer = worlds.array(rng, (size_of(layers, 832, False),), "uint8")
        caches, out = entries(world, layers), world.put(buffer)
        cc.pack_blocks(caches, range(832), out)
        cc.unpack_blocks(out, caches, range(832))
        assert [grid[1] for grid in launches] == [32, 32]
        cc.pack_blocks(caches, [*range(832), 0], world.put(buffer_for(rng, layers, 833, False)))
        assert len(launches) == 4
    finally:
        world.close()


def test_keys_and_values_of_different_widths_are_moved_whole(world, rng):
    """S7: a peer counts tiles by the first tensor, and truncates wider ones."""
    for widths in ((8, 512), (512, 8)):
        for check in CHECKS:
            for by_slot in (False, True):
                layers = [
                    [worlds.array(rng, (5, 2, 1, n), "float16") for n in widths] for _ in range(2)
                ]
                numbers = chosen(rng, limit_of(layers, by_slot), 5, by_slot)
                buffer = buffer_for(rng, layers, 5, by_slot)
                check(world, layers, numbers, numbers, buffer, LAYOUTS[0], by_slot)


@pytest.mark.parametrize("shape", [(3, 4, 576), (3, 4, 656), (3, 2, 132), (2, 3, 41, 24)])
def test_rows_of_any_width(world, rng, shape):
    """S10: a peer's rows must be multiples of 128 bytes, so that 576-byte rows do not work, and it
    reads before the cache for negative slots. L3, L4: others drop what is beyond a multiple of 8
    bytes, and refuse more than 32 heads. L5: nothing is aligned here."""
    layers = [[worlds.array(rng, shape, "uint8", pad=1)] for _ in range(2)]
    numbers = chosen(rng, shape[0] * shape[1], 5, True)
    for check in CHECKS:
        buffer = buffer_for(rng, layers, 5, True, pad=3)
        check(world, layers, numbers, numbers, buffer, LAYOUTS[1], True)


def test_offsets_beyond_32_bits(emulated_world, rng):
    """L1: products of slots, rows and planes are 64-bit. The view starts far below the storage, in
    which only its last block lies."""
    from emulator import EmulatedArray

    world = emulated_world()
    try:
        first, second = (world.upload(rng.integers(0, 256, 96, np.uint8)) for _ in range(2))
        storage, buffer = sorted((first, second), key=lambda s: s.ptr)
        block, last = 2**31 + 48, 5
        content = storage.bytes.copy()
        for name, by_slot, number in (("blocks", False, last), ("tokens", True, 2 * last + 1)):
            shape, strides = (last + 1, 2, 24), (block, 24, 1)
            cache = EmulatedArray(storage, -block * last, shape, strides, "uint8")
            out = EmulatedArray(buffer, 0, (96,), (1,), "uint8")
            for numbers in ([number], world.put(worlds.of_values(np.array([number])))):
                buffer.bytes[:], storage.bytes[:] = 7, content
                getattr(cc, f"pack_{name}")([cache], numbers, out)
                expected = np.full(96, 7, np.uint8)
                part = content[24:48] if by_slot else content[:48]
                expected[: len(part)] = part
                np.testing.assert_array_equal(buffer.bytes, expected)
                expected = content.copy()
                expected[24 if by_slot else 0 : 48] = 7
                buffer.bytes[:] = 7
                getattr(cc, f"unpack_{name}")(out, [cache], numbers)
                np.testing.assert_array_equal(storage.bytes, expected)
    finally:
        world.close()


@pytest.mark.gpu
@pytest.mark.slow
def test_caches_beyond_4_gib(large_caches, rng):
    """L1 on real memory: in the cache, and in the buffer."""
    import cupy

    num_blocks, row = 2**21 + 3, 2051  # 4 GiB of odd rows
    cache = cupy.zeros((num_blocks, 1, row), cupy.uint8)
    chosen = [num_blocks - 1, 5, num_blocks - 2, 2**20 + 7]
    content = cupy.asarray(rng.integers(0, 256, (4, 1, row), np.uint8))
    cache[cupy.asarray(chosen)] = content
    out = cupy.zeros((4, 1, row), cupy.uint8)
    cc.pack_blocks([cache], chosen, out)
    assert bool((out == content).all())
    cache[cupy.asarray(chosen)] = 0
    cc.unpack_tokens(out, [cache], cupy.asarray(chosen))
    assert bool((cache[cupy.asarray(chosen)] == content).all())
    everything = cupy.arange(num_blocks)
    buffer = cupy.full((2, *cache.shape), 7, cupy.uint8)
    cc.pack_blocks([cache, cache], everything, buffer)
    assert bool((buffer[0] == cache).all()) and bool((buffer[1] == cache).all())
    cc.zero_blocks([cache], everything)
    assert not bool(cache.any())
    cc.unpack_blocks(buffer[1], [cache], everything)
    assert bool((buffer[0] == cache).all())


def test_nothing_to_do(world, rng):
    layers = layers_of(rng, "NHD")
    buffer = worlds.array(rng, (0,), "uint8")
    for none in ([], np.empty(0, np.int64), world.put(worlds.of_values(np.empty(0, np.int32)))):
        cc.pack_blocks(entries(world, layers), none, world.put(buffer))
        cc.unpack_blocks(world.put(buffer), entries(world, layers), none)
        cc.pack_tokens(entries(world, layers), none, world.put(buffer))
        cc.unpack_tokens(world.put(buffer), entries(world, layers), none)
    cc.pack_blocks([], [0, 1], world.put(buffer))
    empty = [[worlds.array(rng, (4, 2, 0), "float16")]]
    cc.pack_blocks(entries(world, empty), [0, 1], world.put(buffer))
    Storages(*specs_of(layers)).check(world)


def test_packed_size(world, rng):
    for kind in KINDS:
        layers = layers_of(rng, kind)
        for count in (0, 1, 7):
            put = entries(world, layers)
            assert cc.packed_size(put, num_blocks=count) == size_of(layers, count, False)
            if max(len(spec.shape) for layer in layers for spec in layer) <= 4:
                assert cc.packed_size(put, num_tokens=count) == size_of(layers, count, True)
                continue
            with pytest.raises(cc.ShapeError, match="packed_size: Invalid shape of caches"):
                cc.packed_size(put, num_tokens=count)  # a slot is not one place there
    assert cc.packed_size([], num_blocks=3) == 0
    for wrong in ({}, {"num_blocks": 1, "num_tokens": 1}, {"num_blocks": -1}, {"num_tokens": 1.5}):
        with pytest.raises(cc.ArgumentError, match=r"packed_size.*num_"):
            cc.packed_size(put, **wrong)


@pytest.mark.parametrize("by_slot", [False, True], ids=["blocks", "tokens"])
@pytest.mark.parametrize("check", CHECKS)
def test_numbers_on_the_device_out_of_range(world, rng, by_slot, check):
    """They are skipped, and the first one is recorded with its row."""
    if not world.on_gpu:
        pytest.skip("numbers in host memory are refused before anything is written")
    layers = layers_of(rng, "NHD", num_layers=2)
    limit = limit_of(layers, by_slot)
    bad = int(rng.choice([limit, limit + 1, 2**31, 2**33, 2**62] + [-1, -(2**63)] * (not by_slot)))
    numbers = np.array([3, bad, 1, 0], np.int64)
    buffer = buffer_for(rng, layers, 4, by_slot)
    given = given_as(world, numbers, "device-int64")
    check(world, layers, numbers, given, buffer, LAYOUTS[0], by_slot)
    with pytest.raises(cc.FaultError) as caught:
        cc.raise_faults()
    (fault,) = caught.value.faults
    assert fault.argument == ("slot_mapping" if by_slot else "block_ids")
    assert (fault.row, fault.value, fault.limit) == (1, bad, limit)


def test_a_fault_in_a_later_piece_has_its_row(world, rng, monkeypatch):
    """Rows count from the start of the list, not of the launch."""
    if not world.on_gpu:
        pytest.skip("numbers in host memory are refused before anything is written")
    monkeypatch.setattr(packing, "STAGE_BYTES", 1)
    layers = layers_of(rng, "NHD", num_layers=2)
    numbers = np.array([3, 1, 6, 0], np.int64)
    buffer = buffer_for(rng, layers, 4, False)
    given, put = given_as(world, numbers, "device-int64"), world.put_on_host(buffer, False)
    check_pack(world, layers, numbers, given, buffer, LAYOUTS[0], False, put)
    with pytest.raises(cc.FaultError, match="block_ids: expected 0..5, got 6 in row 2"):
        cc.raise_faults()


@pytest.mark.parametrize(
    "numbers, error, words",
    [
        ([0, 6], cc.ArgumentError, ("0..5", "6 in row 1")),
        ([-1], cc.ArgumentError, ("0..5", "-1 in row 0")),
        ([0, 2**63], cc.DTypeError, ("integers",)),
        ([0.5], cc.DTypeError, ("integers",)),
        (["0"], cc.DTypeError, ("integers",)),
        ([[0], [1]], cc.ShapeError, ("one dimension",)),
        (np.zeros((2, 2), np.int64), cc.ShapeError, ("[2, 2]",)),
        (np.zeros(2, np.float32), cc.DTypeError, ("float32",)),
        (7, cc.DTypeError, ("int",)),
    ],
)
@pytest.mark.parametrize("unpack", [False, True])
def test_bad_numbers_are_refused(world, rng, numbers, error, words, unpack):
    layers = layers_of(rng, "NHD")
    buffer = buffer_for(rng, layers, 4, False)
    put, out = entries(world, layers), world.put(buffer)

    def call():
        if unpack:
            cc.unpack_blocks(out, put, numbers)
        else:
            cc.pack_blocks(put, numbers, out)

    refused(world, specs_of(layers, buffer), call, error, "pack_blocks", "block_ids", *words)


def test_slots_past_the_cache_are_refused(world, rng):
    layers = layers_of(rng, "NHD")
    buffer = buffer_for(rng, layers, 4, True)
    put, out = entries(world, layers), world.put(buffer)
    words = ("slot_mapping", "0..23", "24 in row 2")
    refused(world, specs_of(layers, buffer), lambda: cc.pack_tokens(put, [-5, 0, 24], out),
            cc.ArgumentError, *words)  # fmt: skip
    refused(world, specs_of(layers, buffer), lambda: cc.unpack_tokens(out, put, [-5, 0, 24]),
            cc.ArgumentError, *words)  # fmt: skip


def test_a_destination_named_twice_is_refused(world, rng):
    """D13: which of two writers of one block wins would be a race. Reading twice is no matter."""
    layers = layers_of(rng, "NHD")
    buffer = buffer_for(rng, layers, 4, False)
    put, out = entries(world, layers), world.put(buffer)
    refused(world, specs_of(layers, buffer), lambda: cc.unpack_blocks(out, put, [3, 1, 3]),
            cc.ArgumentError, "block_ids", "distinct", "3 twice")  # fmt: skip
    refused(world, specs_of(layers, buffer), lambda: cc.unpack_tokens(out, put, [3, -1, 9, -1, 9]),
            cc.ArgumentError, "slot_mapping", "9 twice")  # fmt: skip
    numbers = [3, 1, 3]
    check_pack(world, layers, numbers, numbers, buffer, LAYOUTS[0], False)


class TestRefusals:
    @pytest.fixture
    def made(self, world, rng):
        layers = layers_of(rng, "NHD")
        return layers, buffer_for(rng, layers, 4, False)

    def refused(self, world, made, call, error, *words):
        layers, buffer = made
        refused(world, specs_of(layers, buffer), call, error, "pack_blocks", *words)

    def test_too_small(self, world, made, rng):
        layers, _ = made
        need = size_of(layers, 4, False)
        small = worlds.array(rng, (need - 1,), "uint8")
        for call in (
            lambda: cc.pack_blocks(entries(world, layers), range(4), world.put(small)),
            lambda: cc.unpack_blocks(world.put(small), entries(world, layers), range(4)),
        ):
            self.refused(world, made, call, cc.ShapeError, f"at least {need} bytes", str(need - 1))

    def test_layout(self, world, made):
        layers, buffer = made
        self.refused(
            world, made,
            lambda: cc.pack_blocks(entries(world, layers), [0], world.put(buffer), layout="2LTD"),
            cc.ArgumentError, "layout", "layer_first or page_first", "2LTD",
        )  # fmt: skip

    def test_gaps_in_the_buffer(self, world, made):
        layers, buffer = made
        self.refused(
            world, made,
            lambda: cc.pack_blocks(entries(world, layers), [0], world.put(buffer[::2])),
            cc.StrideError, "out",
        )  # fmt: skip

    def test_shared_memory(self, world, made, rng):
        layers, _ = made
        for spec in (layers[1][0], layers[2][1]):
            self.refused(
                world, made,
                lambda s=spec: cc.pack_blocks(entries(world, layers), [0], world.put(s)),
                cc.ArgumentError, "out", "memory of its own",
            )  # fmt: skip

    def test_none(self, world, made):
        layers, _ = made
        self.refused(
            world, made, lambda: cc.pack_blocks(entries(world, layers), [0], None),
            cc.DTypeError, "out",
        )  # fmt: skip

    def test_layers_that_differ(self, world, made, rng):
        """S7: rows of another width in one layer are refused, never truncated."""
        layers, buffer = made
        layers[2][1] = worlds.array(rng, (6, 4, 3, 9), "bfloat16")
        self.refused(
            world, made, lambda: cc.pack_blocks(entries(world, layers), [0], world.put(buffer)),
            cc.ShapeError, "caches[2][1]", "caches[0][1]",
        )  # fmt: skip

    def test_tuples_that_differ(self, world, made):
        layers, buffer = made
        put = entries(world, layers)
        for caches in ([put[0], put[1][:1]], [put[0], put[1][0]], [(*put[0], put[1][0])], [()]):
            self.refused(
                world, made, lambda c=caches: cc.pack_blocks(c, [0], world.put(buffer)),
                cc.ShapeError, "caches[",
            )  # fmt: skip

    def test_a_stacked_array(self, world, made):
        _, buffer = made
        for caches in (np.zeros((2, 3, 4)), None):
            self.refused(
                world, made, lambda c=caches: cc.pack_blocks(c, [0], world.put(buffer)),
                cc.DTypeError, "caches", "list",
            )  # fmt: skip

    def test_numbers_of_blocks_differ(self, world, made, rng):
        layers, buffer = made
        for layer in layers:
            layer[1] = worlds.array(rng, (7, 4, 3, 8), "bfloat16")
        self.refused(
            world, made, lambda: cc.pack_blocks(entries(world, layers), [0], world.put(buffer)),
            cc.ShapeError, "caches[0][1]", "num_blocks",
        )  # fmt: skip

    def test_tokens_need_slots(self, world, made, rng):
        _, buffer = made
        layers = [[worlds.array(rng, (5,), "bfloat16")]]
        with pytest.raises(cc.ShapeError, match=r"pack_tokens.*block_size"):
            cc.pack_tokens(entries(world, layers), [0], world.put(buffer))
        numbers = [4, 0]
        check_pack(world, layers, numbers, numbers, buffer, LAYOUTS[0], False)

    def test_read_only(self, world, made):
        if world.name != "numpy":
            pytest.skip("only NumPy's arrays are read-only")
        layers, buffer = made
        frozen = world.put(buffer)
        frozen.flags.writeable = False
        put = entries(world, layers)
        self.refused(
            world, made, lambda: cc.pack_blocks(put, [0], frozen), cc.NotWritableError, "out"
        )
        cc.unpack_blocks(frozen, put, [0])

    def test_devices(self, world, made, rng):
        if not world.on_gpu:
            pytest.skip("there is only one device")
        layers, buffer = made
        on_host = [tuple(world.put_on_host(s, False) for s in layer) for layer in layers]
        host = world.put_on_host(buffer, False)
        ids = world.put(worlds.of_values(np.array([1])))
        self.refused(
            world, made, lambda: cc.pack_blocks(on_host, ids, host), cc.DeviceError, "block_ids"
        )
        device = world.put(buffer_for(rng, layers, 4, False))
        self.refused(
            world, made, lambda: cc.pack_blocks(on_host, [0], device), cc.DeviceError, "out"
        )


@st.composite
def cases(draw):
    """Views of one buffer: [blocks, layers, ..., rows with gaps], in either memory order."""
    dtype = draw(st.sampled_from(["uint8", "int16", "float32"]))
    size = {"uint8": 1, "int16": 2, "float32": 4}[dtype]
    block_size, heads = draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([1, 2]))
    widths = draw(st.sampled_from([(4,), (8, 8), (3, 5)]))
    gap = draw(st.sampled_from([0, 0, 2]))
    return {
        "dtype": dtype, "size": size, "block_size": block_size, "heads": heads, "widths": widths,
        "gap": gap, "heads_first": draw(st.booleans()), "num_blocks": draw(st.integers(1, 5)),
        "num_layers": draw(st.integers(1, 4)), "layout": draw(st.sampled_from(LAYOUTS)),
        "by_slot": draw(st.booleans()), "unpack": draw(st.booleans()),
        "on_device": draw(st.booleans()), "seed": draw(st.integers(0, 2**32 - 1)),
        "pad": draw(st.sampled_from([0, 0, 4, 1])), "words": draw(st.sampled_from([4, 8, 480])),
    }  # fmt: skip


@pytest.mark.extra
@given(case=cases())
def test_any_case_emulated(emulated_world, case):
    """Memory orders, gaps, alignments, splits into launches and numbers, good and bad."""
    rng = np.random.default_rng(case["seed"])
    world = emulated_world()
    world.driver.seed = case["seed"]
    by_slot, unpack = case["by_slot"], case["unpack"]
    words, blocks.TABLE_WORDS = blocks.TABLE_WORDS, case["words"]
    try:
        inner = case["block_size"], case["heads"]
        if case["heads_first"]:
            inner = inner[::-1]
        width = sum(case["widths"]) + case["gap"]
        pool = worlds.array(
            rng, (case["num_blocks"], case["num_layers"], *inner, width), case["dtype"]
        )
        layers = []
        for layer in range(case["num_layers"]):
            page = pool[:, layer]
            page = page.permuted(0, 2, 1, 3) if case["heads_first"] else page
            starts = np.cumsum([0, *case["widths"]])
            layers.append([page[..., a:b] for a, b in itertools.pairwise(starts)])
        limit = limit_of(layers, by_slot)
        numbers = chosen(rng, limit, int(rng.integers(0, limit + 1)), by_slot)
        bad = case["on_device"] and len(numbers) and rng.random() < 0.3
        if bad:
            numbers[rng.integers(len(numbers))] = limit + rng.integers(0, 2**40)
        buffer = buffer_for(rng, layers, len(numbers), by_slot, pad=case["pad"])
        check = check_unpack if unpack else check_pack
        where = "device-int64" if case["on_device"] else "list"
        given = given_as(world, numbers, where)
        check(world, layers, numbers, given, buffer, case["layout"], by_slot)
        if bad:
            with pytest.raises(cc.FaultError):
                cc.raise_faults()
        cc.raise_faults()
    finally:
        blocks.TABLE_WORDS = words
        world.close()
