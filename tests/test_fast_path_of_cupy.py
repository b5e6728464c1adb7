# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path of CuPy's arrays, without a GPU: what a kernel would get."""

import types

import numpy as np
import pytest
from test_dispatch import (
    KNOWN,
    counting,
    expect_copy,
    expected_fields,
    fields,
    gather_fields,
    long_way,
    tensors,
)

import cupy_cache as cc
from cupy_cache.runtime import arrays, fastpath, guards, launch

cupy = pytest.importorskip("cupy")
torch = pytest.importorskip("torch")


class Array:
    """What is asked of a CuPy array, of a torch tensor's memory."""

    def __init__(self, tensor, device=0):
        self.tensor, self.dtype = tensor, np.dtype(str(tensor.dtype).removeprefix("torch."))
        self.itemsize, self.shape, self.ndim = (
            tensor.element_size(),
            tuple(tensor.shape),
            tensor.ndim,
        )
        self.strides = tuple(stride * self.itemsize for stride in tensor.stride())
        self.size = tensor.numel()
        self.data = types.SimpleNamespace(ptr=tensor.data_ptr(), device_id=device)


@pytest.fixture(params=[1, fastpath.calls.SETTLED], ids=["settled at once", "settled later"])
def recorder(monkeypatch, request):
    """`counting`'s; `Array` is CuPy's."""
    monkeypatch.setattr(fastpath.calls, "SETTLED", request.param)
    recorder = counting(monkeypatch)
    monkeypatch.setattr(cupy, "ndarray", Array)
    monkeypatch.setattr(arrays, "_READERS", dict(arrays._REGISTERED))
    yield recorder
    launch.processors.cache_clear()


def both(*given, **options):
    """Tensors, and the arrays that are they."""
    made = tensors(*given, **options)
    return made, tuple(map(Array, made))


@pytest.mark.parametrize("bound", [False, True])
def test_other_arrays_of_a_known_signature(recorder, monkeypatch, bound):
    """Whatever their numbers of rows, one fast path serves them, and no allocator is told."""
    _, (_, _, *caches, _) = both()
    cache = cc.PagedKVCache(*([one] for one in caches))
    for count in (5, 5, 5, 7, 1, 300, 2, 1):
        made, given = both(count)
        if bound:
            made = *made[:2], *(one.tensor for one in caches), made[4]
            cache.write(0, *given[:2], given[4])
            (sent,) = recorder.take()
        else:
            cc.reshape_and_cache_flash(*given)
            (sent,) = recorder.take()
            before = recorder.long
            again = long_way(recorder, lambda g=given: cc.reshape_and_cache_flash(*g), monkeypatch)
            assert again == [sent]
            recorder.long = before
        assert fields(sent[-1]) == expected_fields(made)
    assert recorder.long == KNOWN
    assert not recorder.lent


OTHERS = {
    "heads": lambda: both(heads=2),
    "size": lambda: both(size=16),
    "shift": lambda: both(shift=1),
}


@pytest.mark.parametrize("other", ["heads", "size", "shift"])
def test_another_signature_after_a_known_one(recorder, monkeypatch, other):
    for _ in range(KNOWN + 1):
        cc.reshape_and_cache_flash(*both()[1])
    made, given = OTHERS[other]()
    recorder.take()
    before = recorder.long
    cc.reshape_and_cache_flash(*given)
    (sent,) = recorder.take()
    assert recorder.long == before + 1
    assert fields(sent[-1]) == expected_fields(made)
    call = lambda: cc.reshape_and_cache_flash(*given)  # noqa: E731
    assert long_way(recorder, call, monkeypatch) == [sent]


@pytest.mark.parametrize("change", ["dtype", "device", "rank", "strides", "kind"])
def test_what_is_not_the_same(change):
    """Each thing that a plan depends on is compared."""
    tensor = torch.zeros((4, 6, 8), dtype=torch.float16)
    given = [Array(tensor), Array(tensor[:, 1])]
    same = guards._same_cupy(given, [(0,), ()])
    assert same(*given) and same(Array(tensor[:3]), given[1])
    other = Array(tensor[:3])
    if change == "dtype":
        other = Array(tensor.view(torch.int16))
    elif change == "device":
        other = Array(tensor, device=1)
    elif change == "rank":
        other = Array(tensor[0])
    elif change == "strides":
        other = Array(torch.zeros((4, 7, 8), dtype=torch.float16)[:, :6])
    else:
        other = tensor
    assert not same(other, given[1])
    assert not same(given[0], Array(tensor[:, 2:3]))


def test_tables_that_widen(recorder):
    src, big = torch.zeros((6, 4, 8), dtype=torch.float16), torch.zeros((2, 99), dtype=torch.int32)
    bounds = Array(torch.tensor([0, 4, 9], dtype=torch.int32))
    for width in (3, 3, 4, 7, 5, 64, 3):
        dst = torch.zeros((9, 8), dtype=torch.float16)
        cc.gather_cache(Array(src), Array(dst), Array(big[:, :width]), bounds)
        (sent,) = recorder.take()
        assert gather_fields(sent[-1]) == [9, 2, width, 99 * 4]
    assert recorder.long == KNOWN


def test_a_table_whose_rows_are_not_at_multiples_of_its_numbers(recorder):
    """Byte strides may be anything: what the long way refuses must not be launched."""
    src, dst = torch.zeros((6, 4, 8), dtype=torch.float16), torch.zeros((9, 8), dtype=torch.float16)
    table, bounds = torch.zeros((2, 3), dtype=torch.int32), torch.tensor([0, 4, 9])
    given = [Array(one) for one in (src, dst, table, bounds)]
    for _ in range(KNOWN + 1):
        cc.gather_cache(*given)
    recorder.take()
    for stride in (13, 14, 18):
        given[2].strides = stride, 4
        with pytest.raises(cc.StrideError, match="block_table"):
            cc.gather_cache(*given)
        assert not recorder.take()


def test_lists_of_layers(recorder):
    layers = [both()[1][2:4] for _ in range(3)]
    keys, values = map(list, zip(*layers))
    memory = [[one.tensor for one in side] for side in (keys, values)]
    for pairs in ([(0, 1)], [(0, 1)], [(2, 3), (4, 5)], [(1, 0)]):
        cc.copy_blocks(keys, values, pairs)
        expect_copy(recorder, *memory, pairs)
    assert recorder.long == KNOWN


def test_torch_beside_cupy_has_none():
    made, given = both()
    assert guards.kind_of(given[:4] + made[4:]) is None
