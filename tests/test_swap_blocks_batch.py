# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import contextlib
import ctypes
import logging
import subprocess
import sys
import types

import numpy as np
import pytest
import worlds
from hypothesis import given
from hypothesis import strategies as st

import cupy_cache as cc
from cupy_cache.ops import swap_blocks_batch as module
from cupy_cache.ops.shared import blocks
from cupy_cache.runtime import arrays, cuda, driver


def put(world, spec, where):
    if where == "device":
        return world.put(spec)
    return world.put_on_host(spec, pinned=where == "pinned")


def address_of(array):
    return arrays.view(array, "array").ptr


def columns(*lists):
    return [np.array(column, np.int64) for column in lists]


def ranges(rng, count, most, room_between=0):
    """``count`` sizes, and the places in a source and a destination where such ranges fit, each in
    an order of its own, at any alignment. Also how many bytes each side needs."""
    sizes = rng.integers(0, most + 1, count)
    places, needed = [], []
    for _ in range(2):
        order = rng.permutation(count)
        gaps = rng.integers(0, room_between + 1, count)
        ends = np.cumsum(sizes[order] + gaps)
        place = np.empty(count, np.int64)
        place[order] = ends - sizes[order]
        places.append(place)
        needed.append(int(ends[-1]) + 8 if count else 8)
    return sizes, places, needed


def check(world, source, destination, sizes, starts, at, **options):
    """Copy, and compare both storages whole with what single bytes copied one by one give."""
    made = [put(world, spec, where) for spec, where in zip((source, destination), at)]
    src, dst = (address_of(m) + start for m, start in zip(made, starts))
    cc.swap_blocks_batch(*columns(src, dst, sizes), **options)
    expected = destination.buffer.bytes.copy()
    for size, of, to in zip(sizes, *starts):
        for byte in range(size):
            expected[to + byte] = source.buffer.bytes[of + byte]
    np.testing.assert_array_equal(world.bytes_of(destination), expected)
    np.testing.assert_array_equal(world.bytes_of(source), source.buffer.bytes)


PLACES = ("device", "pinned", "pageable")


@pytest.mark.parametrize("source_at", PLACES)
@pytest.mark.parametrize("destination_at", PLACES)
@pytest.mark.parametrize("most", [1, 40, 3000])
def test_every_direction(world, rng, caplog, source_at, destination_at, most):
    sizes, starts, needed = ranges(rng, int(rng.integers(1, 30)), most, int(rng.choice([0, 16, 5])))
    source, destination = (worlds.array(rng, (n,), "uint8") for n in needed)
    with caplog.at_level(logging.WARNING, "cupy_cache"):
        check(world, source, destination, sizes, starts, (source_at, destination_at))
    sides = {source_at, destination_at}
    mixed = world.on_gpu and sides == {"device", "pageable"} and sizes.any()
    assert ("not pinned" in caplog.text) == mixed


@pytest.mark.parametrize("alignment", [16, 8, 4, 2, 1])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 8191, 8192, 8193, 20000])
def test_alignments_and_chunks(world, rng, alignment, size):
    starts = np.array([65536 + alignment, 0]), np.array([0, 65536 + alignment])
    source, destination = (worlds.array(rng, (2**17,), "uint8") for _ in range(2))
    check(world, source, destination, np.array([size, size]), starts, ("device", "device"))


def test_runs_go_to_the_copy_engines(world, rng, monkeypatch):
    """Neighbours are joined before that is decided; scattered ranges are the kernel's."""
    monkeypatch.setattr(blocks, "RUN_BYTES", 256)
    sizes = np.array([64] * 8 + [300, 64, 64])
    of = np.array([*range(0, 512, 64), 600, 1000, 1064])
    to = np.array([*range(128, 640, 64), 700, 64, 1100])
    copies = []
    if world.name == "emulated":
        copy = world.driver.copy
        monkeypatch.setattr(world.driver, "copy", lambda *a: (copies.append(a[2]), copy(*a)))
    for at in (("device", "pinned"), ("pinned", "device")):
        source, destination = (worlds.array(rng, (2000,), "uint8") for _ in range(2))
        check(world, source, destination, sizes, (of, to), at)
        if world.name == "emulated":
            assert sorted(copies) == [300, 512]
            copies.clear()


def test_more_ranges_than_one_launch_takes(world, rng):
    """D14: the number of ranges is not limited by a grid's dimension."""
    sizes, starts, needed = ranges(rng, 2 * module.MAX_RANGES + 7, 33, 3)
    source, destination = (worlds.array(rng, (n,), "uint8") for n in needed)
    check(world, source, destination, sizes, starts, ("device", "device"))


def test_long_ranges_are_cut(world, rng, monkeypatch):
    monkeypatch.setattr(module, "MAX_RANGE_BYTES", 8192)
    sizes = np.array([30000, 8192, 5])
    starts = np.array([0, 30001, 40000]), np.array([7, 40000, 1])
    source, destination = (worlds.array(rng, (50000,), "uint8") for _ in range(2))
    check(world, source, destination, sizes, starts, ("device", "device"))


def test_several_allocations_and_directions_in_one_call(world, rng):
    """Each range between another pair of arrays."""
    specs = [worlds.array(rng, (100,), "uint8") for _ in range(8)]
    wheres = ["device", "pinned", "pageable", "device"]
    made = [put(world, spec, wheres[i % 4]) for i, spec in enumerate(specs)]
    base = [address_of(m) for m in made]
    pairs = [(0, 4), (1, 5), (2, 6), (3, 7), (0, 5), (1, 4), (2, 7), (3, 6)]
    sizes = rng.integers(1, 40, len(pairs))
    src = [base[of] + 2 * i for i, (of, _) in enumerate(pairs)]
    dst = [base[to] + 50 * (i >= 4) for i, (_, to) in enumerate(pairs)]
    cc.swap_blocks_batch(*columns(src, dst, sizes))
    for number in (4, 5, 6, 7):
        expected = specs[number].buffer.bytes.copy()
        for i, (of, to) in enumerate(pairs):
            if to == number:
                start = 50 * (i >= 4)
                for byte in range(sizes[i]):
                    expected[start + byte] = specs[of].buffer.bytes[2 * i + byte]
        np.testing.assert_array_equal(world.bytes_of(specs[number]), expected)


def test_allocations_of_unknown_size(emulated_world, rng):
    """CUDA may tell where memory is, but not how much there is."""
    world = emulated_world()
    try:
        known = world.driver.allocation
        world.driver.allocation = lambda a: (f := known(a)) and f._replace(start=a, end=a)
        sizes, starts, needed = ranges(rng, 20, 50, 3)
        for at in (("device", "pinned"), ("pageable", "device"), ("device", "device")):
            source, destination = (worlds.array(rng, (n,), "uint8") for n in needed)
            check(world, source, destination, sizes, starts, at)
    finally:
        world.close()


@pytest.mark.parametrize(
    "memory_type, ordinal, device_pointer, start, size, expected",
    [
        (2, 1, 5000, 4096, 8192, (4096, 12288, arrays.Device("cuda", 1), 0)),
        (2, 1, 0, 4096, 8192, (4096, 12288, arrays.Device("cuda", 1), 0)),  # no peer access
        (1, 0, 5000, 4096, 8192, (4096, 12288, arrays.CPU, 0)),
        (1, 0, 7000, 4096, 8192, (4096, 12288, arrays.CPU, 2000)),
        (1, 0, 5000, 0, 0, (5000, 5000, arrays.CPU, 0)),
        (1, 0, 0, 4096, 8192, None),  # pinned, but not mapped
        (0, 0, 0, 0, 0, None),
    ],
)
def test_what_the_driver_tells(
    monkeypatch, memory_type, ordinal, device_pointer, start, size, expected
):
    """The driver's function stood in for; numbers and widths are those of CUpointer_attribute."""
    told = {
        2: ctypes.c_uint32(memory_type), 3: ctypes.c_uint64(device_pointer),
        9: ctypes.c_int32(ordinal), 11: ctypes.c_uint64(start), 12: ctypes.c_uint64(size),
    }  # fmt: skip

    def attributes(count, ids, places, address):
        assert address.value == 5000
        for number, place in zip(ids[:count], places[:count]):
            value = told[number]
            ctypes.memmove(place, ctypes.addressof(value), ctypes.sizeof(value))
        return 0

    library = types.SimpleNamespace(cuPointerGetAttributes=attributes)
    monkeypatch.setattr(cuda, "library", lambda: library)
    monkeypatch.setattr(cuda, "in_a_context", contextlib.nullcontext)
    assert driver.CudaDriver().allocation(5000) == expected
    library.cuPointerGetAttributes = lambda *a: 201
    with pytest.raises(cc.KernelError, match=r"0x1388.*201"):
        driver.CudaDriver().allocation(5000)


@pytest.mark.gpu
def test_what_cuda_tells_of_an_address():
    import cupy
    import cupyx

    on_gpu = cupy.empty(5000, cupy.uint8)
    pinned = cupyx.empty_pinned(5000, np.uint8)
    for array, base, kind in (
        (on_gpu, on_gpu.data.ptr, "cuda"), (pinned, pinned.ctypes.data, "cpu"),
    ):  # fmt: skip
        for address in (base, base + 4999):
            found = driver.active.allocation(address)
            assert found.device.kind == kind and found.shift == 0
            assert found.start <= base and base + array.size <= found.end
    assert driver.active.allocation(np.empty(5000, np.uint8).ctypes.data) is None


def test_arguments_of_torch_and_order_hint(world, rng):
    torch = pytest.importorskip("torch")
    source, destination = (worlds.array(rng, (64,), "uint8") for _ in range(2))
    src, dst = (address_of(world.put(spec)) for spec in (source, destination))
    cc.swap_blocks_batch(
        torch.tensor([src, src + 32]), torch.tensor([dst + 40, dst]), torch.tensor([24, 32]), True
    )
    expected = destination.buffer.bytes.copy()
    expected[40:64], expected[:32] = source.buffer.bytes[:24], source.buffer.bytes[32:]
    np.testing.assert_array_equal(world.bytes_of(destination), expected)


def test_nothing_to_copy(world):
    cc.swap_blocks_batch(*columns([], [], []))
    cc.swap_blocks_batch(*columns([0, 5], [0, 7], [0, 0]))


class TestRefusals:
    """Nothing is written where anything is wrong."""

    @pytest.fixture
    def made(self, world, rng):
        specs = [worlds.array(rng, (256,), "uint8") for _ in range(2)]
        return specs, [address_of(world.put(spec)) for spec in specs]

    def refused(self, world, made, arguments, error, *words):
        with pytest.raises(error) as caught:
            cc.swap_blocks_batch(*arguments)
        for word in ("swap_blocks_batch", *words):
            assert word in str(caught.value)
        for spec in made[0]:
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)

    @pytest.mark.parametrize("shift", [0, 1, 15, -15, 8])
    def test_destinations_that_overlap(self, world, made, shift):
        _, (src, dst) = made
        given = columns([src, src + 32, src + 64], [dst + 64, dst, dst + 64 + shift], [16, 8, 16])
        self.refused(world, made, given, cc.ArgumentError, "dst_ptrs", "overlap")

    @pytest.mark.parametrize("of, to", [(0, 0), (0, 15), (15, 0), (4, 2)])
    def test_a_source_that_is_written(self, world, made, of, to):
        """D13: copied all at once, a range that is read and written races."""
        _, (src, _) = made
        given = columns([src + 100, src + of], [src + 200, src + to], [16, 16])
        self.refused(world, made, given, cc.ArgumentError, "src_ptrs", "overlap")

    def test_neighbours_are_apart(self, world, made):
        (source, _), (src, _) = made
        cc.swap_blocks_batch(*columns([src, src + 32], [src + 16, src + 48], [16, 16]))
        expected = source.buffer.bytes.copy()
        expected[16:32], expected[48:64] = expected[:16], expected[32:48]
        np.testing.assert_array_equal(world.bytes_of(source), expected)

    def test_one_source_for_two(self, world, made):
        (source, destination), (src, dst) = made
        cc.swap_blocks_batch(*columns([src, src + 3], [dst, dst + 100], [40, 40]))
        expected = destination.buffer.bytes.copy()
        expected[:40], expected[100:140] = source.buffer.bytes[:40], source.buffer.bytes[3:43]
        np.testing.assert_array_equal(world.bytes_of(destination), expected)

    @pytest.mark.parametrize(
        "change, words",
        [
            (lambda src, dst: ([src, 0], [dst, dst + 8], [8, 8]), ("src_ptrs", "null", "row 1")),
            (lambda src, dst: ([src, src], [0, dst + 8], [8, 8]), ("dst_ptrs", "null", "row 0")),
            (lambda src, dst: ([src, -5], [dst, dst + 8], [8, 8]), ("src_ptrs", "-5")),
            (lambda src, dst: ([src, src], [dst, dst + 8], [8, -1]), ("sizes", "-1 in row 1")),
            (lambda src, dst: ([src], [dst], [2**63 - 1]), ("src_ptrs", "that many bytes")),
        ],
    )
    def test_values(self, world, made, change, words):
        given = columns(*change(*made[1]))
        self.refused(world, made, given, cc.ArgumentError, *words)

    def test_lengths(self, world, made):
        given = columns([made[1][0]], [made[1][1]], [8, 8])
        self.refused(world, made, given, cc.ShapeError, "sizes", "n = 2", "src_ptrs has 1")

    def test_rank(self, world, made):
        given = [np.array([column]) for column in columns([made[1][0]], [made[1][1]], [8])]
        self.refused(world, made, given, cc.ShapeError, "src_ptrs")

    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_dtypes(self, world, made, position):
        given = columns([made[1][0]], [made[1][1]], [8])
        given[position] = given[position].astype(np.uint64)
        name = ("src_ptrs", "dst_ptrs", "sizes")[position]
        self.refused(world, made, given, cc.DTypeError, name, "int64", "uint64")

    def test_a_list(self, world, made):
        self.refused(world, made, ([1], [2], [3]), cc.DTypeError, "src_ptrs", "list")

    def test_on_the_device(self, world, made):
        if not world.on_gpu:
            pytest.skip("there is only host memory")
        given = columns([made[1][0]], [made[1][1]], [8])
        given[1] = world.put(worlds.of_values(given[1]))
        self.refused(world, made, given, cc.DeviceError, "dst_ptrs", "host memory")

    @pytest.mark.parametrize("side", [0, 1])
    def test_past_the_end_of_an_allocation(self, world, made, side, rng):
        if world.name != "emulated":
            pytest.skip("allocations are not bounded by arrays elsewhere")
        given = columns([made[1][0]], [made[1][1]], [8])
        given[side] += 249
        name = ("src_ptrs", "dst_ptrs")[side]
        self.refused(world, made, given, cc.ArgumentError, name, "inside their allocations")


@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(0, 200),
    most=st.sampled_from([1, 16, 100, 9000]), gap=st.sampled_from([0, 1, 16]),
    at=st.tuples(st.sampled_from(PLACES), st.sampled_from(PLACES)),
    run=st.sampled_from([64, 1 << 20]),
)  # fmt: skip
def test_any_ranges_emulated(emulated_world, seed, count, most, gap, at, run):
    rng, world = np.random.default_rng(seed), emulated_world()
    world.driver.seed = seed
    held, blocks.RUN_BYTES = blocks.RUN_BYTES, run
    try:
        sizes, starts, needed = ranges(rng, min(count, 400_000 // most), most, gap)
        source, destination = (worlds.array(rng, (n,), "uint8") for n in needed)
        check(world, source, destination, sizes, starts, at)
    finally:
        blocks.RUN_BYTES = held
        world.close()


def test_no_framework_is_needed_for_numbers_in_host_memory():
    """However often it is called."""
    code = (
        "import sys, numpy as np, cupy_cache as cc\n"
        "source = np.arange(1, 9, dtype=np.uint8)\n"
        "for size in (8, 3, 5, 8):\n"
        "    to = np.zeros(8, np.uint8)\n"
        "    numbers = source.ctypes.data, to.ctypes.data, size\n"
        "    cc.swap_blocks_batch(*(np.array([n]) for n in numbers))\n"
        "    assert to.tolist() == [*range(1, size + 1), *[0] * (8 - size)]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
