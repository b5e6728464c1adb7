# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""docs/support.md is what its generator makes, and marks nothing that does not run."""

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.compilation import calls, model, specialisations
from cupy_cache.runtime import arrays, descriptions, formats

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def table():
    path = ROOT / "docs" / "make_support_table.py"
    spec = importlib.util.spec_from_file_location("make_support_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.extra
def test_the_file_is_up_to_date(table):
    expected = table.page()
    assert table.FILE.read_text(encoding="utf-8") == expected, (
        "run python docs/make_support_table.py"
    )


def test_every_operation_is_in_the_table(table):
    missing = {op for op in calls.OPERATIONS if op in cc.__all__} - {*table.operations()}
    assert not missing, f"give {missing} a case in tests/cases.py"
    text = table.FILE.read_text(encoding="utf-8")
    missing = [op for op in table.operations() if f"`{op}`" not in text]
    assert not missing, f"run python docs/make_support_table.py, which writes rows for {missing}"


def test_every_operation_has_the_tests_that_it_names(table):
    for op in table.operations():
        path = ROOT / table.test_module(op)
        assert op in path.read_text(encoding="utf-8"), f"{path.name} does not name {op}"


class Memory:
    """Gives the arrays that the calls only describe real memory, full of random bytes, by
    NumPy or CuPy. Numbers of blocks, slots and the like count up."""

    SIZE = 600_000
    FEW = 8  # elements: caches and keys of integers have more

    def __init__(self, xp, rng, device):
        self.xp, self.place = xp, arrays.Place("real", device, True)
        self._random = rng.integers(0, 256, self.SIZE, np.uint8)
        self.buffers = {}

    def forget(self):
        """Start anew."""
        self.buffers.clear()

    def written(self):
        """Whether any byte is no longer what it was."""
        pairs = reversed(self.buffers.values())  # destinations come late
        return any(not np.array_equal(self._host(buffer), was) for buffer, was in pairs)

    def _host(self, buffer):
        return buffer if self.xp is np else buffer.get()

    def read(self, array):
        number, offset = divmod(array.address, 1 << 40)
        steps = sum(s * (n - 1) for s, n in zip(array.strides, array.shape))
        assert 0 <= offset and offset + steps + array.dtype.bytes <= self.SIZE
        if number not in self.buffers:
            self.buffers[number] = self._filled(number, array)
        buffer = self.buffers[number][0]
        address = buffer.ctypes.data if self.xp is np else buffer.data.ptr
        dtype = array.dtype.name
        return address + offset, array.shape, array.strides, dtype, self.place, None

    def _filled(self, number, array):
        content = np.roll(self._random, number % 1009)
        few = np.prod(array.shape) <= self.FEW
        if few and array.dtype.name in ("int32", "int64"):
            dtype = array.dtype.numpy
            view = np.ndarray(array.shape, dtype, content.data, 0, array.strides)
            view[...] = np.arange(view.size).reshape(view.shape)
            if view.size == 1:  # of what has addresses
                scratch = self.xp.array(self._random)  # a copy
                self.buffers[-number] = scratch, self._random
                view[...] = scratch.ctypes.data if self.xp is np else scratch.data.ptr
        buffer = content.copy() if self.xp is np else self.xp.asarray(content)
        return buffer, content


PARTS = 2  # each process that runs one must find out what is marked
PARTS_ON_A_GPU = 12  # each kernel is compiled


def few(dtypes):
    """Where every dtype is taken, one of each size: bytes are moved."""
    return [d for d in dtypes if len(dtypes) <= 4 or d in ("uint8", "bfloat16", "float32", "int64")]


@pytest.fixture
def marked(table):
    """What is marked; made before anything is replaced."""
    return table.combinations()


def run_all(table, marked, monkeypatch, memory, dtypes_of):
    """Make these calls; for the first name of a raw copy with each of ``dtypes_of(dtypes)``, for
    the others with a few."""

    class Real(descriptions.Described):
        """A type of its own, for a framework of its own."""

    framework = arrays.Framework(
        memory.read,
        lambda index: 0,
        lambda device, shape, dtype: descriptions.described(shape, dtype),
    )
    monkeypatch.setattr(arrays, "_READERS", dict(arrays._READERS))
    monkeypatch.setattr(arrays, "FRAMEWORKS", dict(arrays.FRAMEWORKS))
    arrays.register_framework("real", Real, framework)
    monkeypatch.setattr(descriptions, "Described", Real)
    for module in (model, calls):
        monkeypatch.setattr(module, "BLOCKS", 8)
        monkeypatch.setattr(module, "ROWS", 2)
    keys = itertools.count()
    called = set()

    def run(call):
        memory.forget()
        call()
        called.add(current)
        assert memory.written(), f"nothing was written: {current}"
        cc.raise_faults()
        return [SimpleNamespace(key=next(keys))]

    monkeypatch.setattr(specialisations, "_kernels_of", run)
    for op, layout, names, dtypes in marked:
        for name in names:
            for dtype in dtypes_of(dtypes) if name == "auto" else few(dtypes):
                current = op, layout, name, dtype
                shape, named = table.arguments(layout, dtype, name)
                list(specialisations.specialisations(*shape, **named, ops=[op]))
                assert current in called
    return called


@pytest.mark.slow
@pytest.mark.extra
@pytest.mark.parametrize("part", range(PARTS))
def test_every_marked_call_runs_on_the_cpu(table, marked, monkeypatch, rng, part):
    memory = Memory(np, rng, arrays.CPU)
    called = run_all(table, marked[part::PARTS], monkeypatch, memory, lambda dtypes: dtypes)
    assert len({op for op, *_ in called}) > 5


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS_ON_A_GPU))
def test_every_marked_call_runs_on_a_gpu(table, marked, monkeypatch, rng, part):
    import cupy

    memory = Memory(cupy, rng, arrays.Device("cuda", cupy.cuda.Device().id))
    run_all(table, marked[part::PARTS_ON_A_GPU], monkeypatch, memory, few)


def test_caches_of_each_layout():
    """Their shapes, from what the layouts are; no layout has another's."""
    for block_size in (16, 12):
        check_layouts(block_size)


def check_layouts(block_size):
    heads, size, value_size, blocks = 3, 128, 48, model.BLOCKS
    shapes = {
        "NHD": [(blocks, block_size, heads, n) for n in (size, value_size)],
        "packed": [(blocks, block_size, heads * (size + value_size))],
        "x-packed": [(blocks, heads, size // 8, block_size, 8)] * 2,
        "rows": [(blocks, block_size, size)],
        "indexer": [(blocks, block_size, size + 4)],
    }
    dtype = formats.dtype_named("bfloat16", "x")
    for layout in (*shapes, "HND"):
        one = model.Model(
            heads, size, value_size, block_size, dtype, "auto", dtype, (layout,), {}, heads,
            model.Rotation(), False, False,
        )  # fmt: skip
        pairs, x_packed = list(one.pairs()), list(one.x_packed())
        assert len(pairs) == {"NHD": 1, "HND": 1, "packed": 2}.get(layout, 0)
        for pair in pairs:
            assert [cache.shape for cache in pair] == shapes["NHD"]
        values = [(blocks, heads, value_size, block_size)]
        if block_size == 16:
            values.append((blocks, heads, 2, value_size, 8))
        found = [(keys.shape, of_values.shape, more) for keys, of_values, more in x_packed]
        expected = list(zip(shapes["x-packed"], values, (False, True)))
        assert found == (expected if layout == "x-packed" else [])
        indexer = [cache for cache, _ in one.indexer()]
        others = {"packed": one.pages(), "rows": one.rows(), "indexer": indexer}
        for name, caches in others.items():
            assert [c.shape for c in caches] == (shapes[name] if layout == name else [])
