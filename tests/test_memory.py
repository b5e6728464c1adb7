# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Memory that is not what it seems: arrays without any, with other bits than they say, or with some
that another array has too. All of it is refused by name, with nothing written."""

import contextlib
import ctypes
import functools
import gc
import itertools
import re
import sys
import types
import weakref

import numpy as np
import oracle
import pytest
import recording
import worlds

import cupy_cache as cc
from cupy_cache.compilation import specialisations
from cupy_cache.integrations import vllm
from cupy_cache.runtime import (
    allocations,
    arrays,
    devices,
    dispatch,
    dlpack,
    formats,
    making,
    streams,
)

pytestmark = pytest.mark.usefixtures("nothing_remembered")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def refused(op, argument, *words):
    """A context in which an error of the one form must be raised."""
    pattern = rf"^{op}: Invalid [a-z]+ of {re.escape(argument)}: expected .*, got .*"
    return pytest.raises(cc.CupyCacheError, match=pattern + ".*".join(map(re.escape, words)))


# --- tensors without memory -----------------------------------------------------------------------


def wrapper(torch, tensor):
    """What distributed tensors and the like are: a shape, and another tensor inside."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
            )

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    return Wrapper(tensor)


def fake(torch, tensor):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def asleep(torch, tensor):
    """A tensor whose storage was resized to nothing."""
    made = torch.empty_like(tensor)
    made.untyped_storage().resize_(0)
    return made


def asleep_behind_others(torch, tensor):
    """The same, of which the address is an offset that counts from nothing."""
    made = torch.empty(2, *tensor.shape, dtype=tensor.dtype)[1]
    made.untyped_storage().resize_(0)
    return made


def meta(torch, tensor):
    return tensor.to("meta")


def functional(torch, tensor):
    return torch._to_functional_tensor(tensor)


def sparse(torch, tensor):
    return tensor.to_sparse()


def sparse_rows(torch, tensor):
    if tensor.ndim < 2:
        return tensor.to_sparse()
    return tensor.reshape(len(tensor), -1).to_sparse_csr()


def nested(torch, tensor):
    return torch.nested.nested_tensor(list(tensor.reshape(len(tensor), -1)))


def jagged(torch, tensor):
    return torch.nested.nested_tensor(list(tensor.reshape(len(tensor), -1)), layout=torch.jagged)


def mkldnn(torch, tensor):
    return tensor.to_mkldnn() if tensor.dtype == torch.float32 else tensor.to_sparse()


def no_values(torch, tensor):
    return torch._efficientzerotensor(tuple(tensor.shape), dtype=tensor.dtype)


def uninitialised(torch, tensor):
    return torch.nn.UninitializedParameter(dtype=tensor.dtype, requires_grad=False)


KINDS = (
    wrapper, fake, asleep, asleep_behind_others, meta, functional, sparse, sparse_rows, nested,
    jagged, mkldnn, no_values, uninitialised,
)  # fmt: skip


def step(torch):
    """A write's tensors, by their names."""
    return {
        "key": torch.ones(3, 2, 8),
        "value": torch.ones(3, 2, 8),
        "key_cache": torch.zeros(6, 4, 2, 8),
        "value_cache": torch.zeros(6, 4, 2, 8),
        "slot_mapping": torch.arange(3),
    }


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_tensors_without_memory(torch, kind, used):
    """Each argument of a write in turn, in a fresh process and behind calls of the same shapes."""
    for name in step(torch):
        given = step(torch)
        if used:
            for _ in range(3):
                cc.reshape_and_cache_flash(**step(torch))
        given[name] = kind(torch, given[name])
        with refused("reshape_and_cache_flash", name):
            cc.reshape_and_cache_flash(**given)
        written = [given[n] for n in ("key_cache", "value_cache") if n != name]
        assert not any(cache.any() for cache in written)


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_layers_without_memory(torch, kind):
    """Nothing is copied in the layers before."""
    caches = [torch.arange(6.0)[:, None].expand(6, 4).clone() for _ in range(3)]
    bad = kind(torch, caches[0])
    before = [cache.clone() for cache in caches]
    with refused("copy_blocks", "value_caches[1]"):
        cc.copy_blocks(caches[:2], [caches[2], bad], [(0, 1)])
    with refused("zero_blocks", "caches[1]"):
        cc.zero_blocks([caches[0], bad], [0])
    with refused("swap_blocks", "dst[1]"):
        cc.swap_blocks(caches[:2], [caches[2], bad], [(0, 1)])
    assert all(torch.equal(cache, was) for cache, was in zip(caches, before))


def makers_of_results(torch):
    """{operation that makes its result: (its arrays by name, other arguments)}"""
    rows, table, lengths = torch.ones(2, 4, 8), torch.zeros(2, 1).int(), torch.ones(2).int()
    positions, starts = torch.arange(2), torch.tensor([0, 1, 2])
    step = {"query": rows, "block_table": table, "seq_lens": lengths}
    return {
        "paged_attention": (
            {
                "key_cache": torch.ones(3, 4, 2, 8), "value_cache": torch.ones(3, 4, 2, 8), **step,
                "alibi_slopes": torch.ones(4), "sinks": torch.ones(4),
            },
            {},
        ),
        "paged_attention_mla": (
            {"kv_cache": torch.ones(3, 4, 8), **step}, {"scale": 1.0, "kv_lora_rank": 4},
        ),
        "slot_mapping": (
            {"block_table": table, "positions": positions, "query_start_loc": starts},
            {"block_size": 4},
        ),
        "alibi_bias": (
            {
                "slopes": torch.ones(4), "query_positions": positions,
                "key_positions": positions,
            },
            {},
        ),
    }  # fmt: skip


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "op", ["paged_attention", "paged_attention_mla", "slot_mapping", "alibi_bias"]
)
def test_results_of_tensors_without_memory(torch, op, kind):
    """They are refused by name also where a new result takes their shape."""
    given, others = makers_of_results(torch)[op]
    getattr(cc, op)(**given, **others)
    for name, tensor in given.items():
        with refused(op, name):
            getattr(cc, op)(**{**given, name: kind(torch, tensor)}, **others)
    if op == "paged_attention":  # slopes of each sequence are another argument of its kernels
        slopes = kind(torch, torch.ones(2, 4))
        with refused(op, "alibi_slopes"):
            cc.paged_attention(**{**given, "alibi_slopes": slopes})


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_numbers_without_memory(torch, kind):
    numbers = kind(torch, torch.arange(2))
    cache = torch.ones(6, 4)
    with refused("zero_blocks", "block_ids"):
        cc.zero_blocks([cache], numbers)
    assert cache.all()


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_scale_without_memory_is_no_scale_of_1(torch, used):
    given = step(torch)
    caches = [torch.zeros(6, 4, 2, 8, dtype=torch.uint8) for _ in range(2)]

    def write(scale):
        cc.reshape_and_cache_flash(
            given["key"], given["value"], *caches, given["slot_mapping"], "fp8", scale, scale
        )

    for _ in range(3 * used):
        write(torch.ones(1))
    for cache in caches:
        cache.zero_()
    with refused("reshape_and_cache_flash", "k_scale"):
        write(asleep(torch, torch.full((1,), 0.5)))
    assert not any(cache.any() for cache in caches)


@pytest.mark.whole
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_tensors_of_a_transformation(torch, transform):
    cache = torch.zeros(6, 4, 2, 8)

    def write(key):
        with refused("reshape_and_cache_flash", "key"):
            cc.reshape_and_cache_flash(key, torch.ones(3, 2, 8), cache, cache + 0, torch.arange(3))
        return key.sum()

    getattr(torch.func, transform)(write)(
        torch.ones(*([2] if transform == "vmap" else []), 3, 2, 8)
    )
    assert not cache.any()


# --- after a signature is known, on the fast path -------------------------------------------------


def learnt(recorder, call):
    """Make a call until it takes the fast path."""
    for _ in range(4):
        call()
    assert len(recorder.take()) == 4


def put_to_sleep(torch, tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def negative(torch, tensor):
    return torch._neg_view(tensor)


LATER = (
    put_to_sleep, asleep_behind_others, wrapper, fake, functional, negative, no_values,
    uninitialised,
)  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("kind", LATER, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["key", "value", "key_cache", "value_cache", "slot_mapping"])
def test_a_write_that_is_known(torch, recorder, kind, name):
    """The very tensors of the calls before, of which one has lost its memory."""
    given = step(torch)
    learnt(recorder, lambda: cc.reshape_and_cache_flash(**given))
    given[name] = kind(torch, given[name])
    for _ in range(3):
        with refused("reshape_and_cache_flash", name):
            cc.reshape_and_cache_flash(**given)
    assert not recorder.take()


@pytest.mark.whole
@pytest.mark.parametrize("kind", LATER, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["key", "value", "slot_mapping"])
def test_a_bound_write_that_is_known(torch, recorder, kind, name):
    given = step(torch)
    cache = cc.PagedKVCache([given.pop("key_cache")], [given.pop("value_cache")])
    learnt(recorder, lambda: cache.write(0, *given.values()))
    given[name] = kind(torch, given[name])
    for _ in range(3):
        with refused("PagedKVCache.write", name):
            cache.write(0, *given.values())
    assert not recorder.take()


@pytest.mark.whole
@pytest.mark.parametrize("kind", LATER, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["src_cache", "dst", "block_table", "cu_seq_lens", "seq_starts"])
def test_a_gather_that_is_known(torch, recorder, kind, name):
    """A kernel's other path."""
    given = {
        "src_cache": torch.ones(6, 4, 8),
        "dst": torch.zeros(5, 8),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "cu_seq_lens": torch.tensor([0, 2, 5], dtype=torch.int32),
        "seq_starts": torch.zeros(2, dtype=torch.int32),
    }
    learnt(recorder, lambda: cc.gather_cache(**given))
    given[name] = kind(torch, given[name])
    for _ in range(3):
        with refused("gather_cache", name):
            cc.gather_cache(**given)
    assert not recorder.take()


@pytest.mark.whole
@pytest.mark.parametrize("kind", LATER, ids=lambda kind: kind.__name__)
def test_a_copy_that_is_known(torch, recorder, kind):
    """The path of operations with lists."""
    keys, values = ([torch.ones(6, 4, 8) for _ in range(2)] for _ in range(2))
    learnt(recorder, lambda: cc.copy_blocks(keys, values, [(0, 1)]))
    values[1] = kind(torch, values[1])
    for _ in range(3):
        with refused("copy_blocks", "value_caches[1]"):
            cc.copy_blocks(keys, values, [(0, 1)])
    assert not recorder.take()


@pytest.mark.whole
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_far_into_a_storage_without_memory(torch, recorder, monkeypatch, used):
    """An address that is an offset may be as large as a GPU's, of a storage of many gigabytes."""
    monkeypatch.setattr(arrays, "LOWEST", 64)
    given = step(torch)
    cache = cc.PagedKVCache([given["key_cache"]], [given["value_cache"]])
    bound = [given[name] for name in ("key", "value", "slot_mapping")]
    table, bounds, rows = torch.zeros(2, 3).int(), torch.tensor([0, 2, 5]).int(), torch.zeros(5, 16)
    entries, layers = torch.ones(6, 4, 16), [torch.ones(6, 4, 8) for _ in range(2)]
    calls = (
        (cc.reshape_and_cache_flash, [*given.values()]),
        (functools.partial(cache.write, 0), bound),
        (cc.gather_cache, [entries, rows, table, bounds]),
        (lambda *caches: cc.copy_blocks_mla(caches, [(0, 1)]), layers),
        (lambda *caches: cc.zero_blocks(caches, [0]), layers),
    )
    for call, tensors in calls:
        for _ in range(4 * used):
            call(*tensors)
        recorder.take()
        for at, tensor in enumerate(tensors):
            asleep = asleep_behind_others(torch, tensor)
            if asleep.data_ptr() < 64:  # of a few numbers
                continue
            for _ in range(3):
                with pytest.raises(cc.ArgumentError, match="at address 0"):
                    call(*tensors[:at], asleep, *tensors[at + 1 :])
        assert not recorder.take()
        for _ in range(2):
            call(*tensors)
        assert len(recorder.take()) == 2


def test_addresses_below_all_others_are_looked_at(torch, recorder, monkeypatch):
    """Memory may be there."""
    monkeypatch.setattr(arrays, "ABOVE_OFFSETS", 1 << 62)
    given = step(torch)
    learnt(recorder, lambda: cc.reshape_and_cache_flash(**given))
    monkeypatch.setattr(arrays, "LOWEST", 1 << 62)
    learnt(recorder, lambda: cc.reshape_and_cache_flash(**given))


def test_empty_tensors_need_no_memory(torch):
    cache = torch.zeros(6, 4, 2, 8)
    nothing = torch.empty(0, 2, 8)
    assert nothing.data_ptr() == 0
    cc.reshape_and_cache_flash(nothing, nothing, cache, cache + 0, torch.empty(0).long())
    cc.copy_blocks([torch.empty(0, 4)], [torch.empty(0, 4)], [])


# --- bits that mean something else ----------------------------------------------------------------


def test_the_negative_bit(torch):
    """Of a number that a caller sees as 1 memory holds -1."""
    for name in step(torch):
        given = step(torch)
        given[name] = torch._neg_view(given[name])
        with refused("reshape_and_cache_flash", name, "negative bit"):
            cc.reshape_and_cache_flash(**given)
    imaginary = torch.ones(3, 2, 8, dtype=torch.complex64).conj().imag
    with refused("reshape_and_cache_flash", "key", "negative bit"):
        cc.reshape_and_cache_flash(**{**step(torch), "key": imaginary})


def test_the_other_byte_order():
    """1 << 24 in the other order reads as 1."""
    keys = np.ones((1, 2, 8), np.float32)

    def write(**others):
        given = {"key": keys, "value": keys, "slot_mapping": np.array([1 << 24])}
        caches = {f"{n}_cache": np.zeros((6, 4, 2, 8), np.float32) for n in ("key", "value")}
        name = next(iter(others))
        given |= caches | others
        with refused("reshape_and_cache_flash", name, ">"):
            cc.reshape_and_cache_flash(**given)
        assert not any(cache.any() for cache in caches.values())

    for dtype in (">i4", ">i8"):
        write(slot_mapping=np.array([1 << 24], dtype))
    write(key=keys.astype(">f4"))
    write(value_cache=np.zeros((6, 4, 2, 8), ">f4"))
    cache = np.ones((6, 4), np.float32)
    with refused("zero_blocks", "block_ids", ">i4"):
        cc.zero_blocks([cache], np.array([1], ">i4"))
    with refused("copy_blocks", "block_mapping", ">i8"):
        cc.copy_blocks([cache], [cache + 0], np.array([[0, 1]], ">i8"))
    assert cache.all()


class Interface:
    """What offers `__cuda_array_interface__` alone."""

    def __init__(self, array, **others):
        described = array.__array_interface__
        self.array = array
        self.__cuda_array_interface__ = {
            "data": (array.ctypes.data, False), "shape": described["shape"],
            "typestr": described["typestr"], "version": 3, **others,
        }  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"typestr": ">i8"}, ">i8"),
        ({"mask": np.ones(3, bool)}, "mask"),
        ({"data": (0, False)}, "address 0"),
        ({"data": None}, ""),
        ({"typestr": "no type"}, ""),
        ({"shape": None}, ""),
        ({"shape": (3.0,)}, "interpreted as an integer"),
        ({"shape": (-3,)}, "shape is [-3]"),
        ({"strides": (8, 8)}, "2 strides for 1 dimension"),
        ({"strides": "8"}, "interpreted as an integer"),
        ({"strides": (2**63,)}, "no place in memory"),
        ({"data": ("x", False)}, "interpreted as an integer"),
        ({"data": (-8, False)}, "no place in memory"),
        ({"data": (2**64, False)}, "no place in memory"),
        ({"stream": -5}, "stream is -5"),
    ],
)
def test_cuda_array_interface(recorder, wrong, word):
    recorder.device_at = lambda address: 0
    keys = np.ones((3, 2, 8), np.float32)
    given = {name: Interface(keys) for name in ("key", "value")}
    given |= {f"{name}_cache": Interface(np.zeros((6, 4, 2, 8), np.float32)) for name in given}
    given["slot_mapping"] = Interface(np.arange(3), **wrong)
    with refused("reshape_and_cache_flash", "slot_mapping", word):
        cc.reshape_and_cache_flash(**given)
    assert not recorder.take()


@pytest.mark.whole
@pytest.mark.parametrize("missing", ["data", "shape", "typestr"])
def test_cuda_array_interface_without_a_field(recorder, missing):
    recorder.device_at = lambda address: 0
    keys, cache = np.ones((3, 2, 8), np.float32), np.zeros((6, 4, 2, 8), np.float32)
    given = Interface(keys)
    del given.__cuda_array_interface__[missing]
    with refused("reshape_and_cache_flash", "key", f"'{missing}' is missing"):
        cc.reshape_and_cache_flash(given, keys, cache, cache.copy(), np.arange(3))


@pytest.mark.parametrize("stream", [0, 1, 2**64 - 1, None])
def test_streams_of_cuda_array_interface(recorder, stream):
    recorder.device_at = lambda address: 0
    given = Interface(np.ones(3), stream=stream)
    for used, after in ((5, 5), (None, 1), (dlpack.LOOK, None)):
        assert dlpack.read_cuda_interface(given, used)[0] == given.array.ctypes.data
        waits = stream is not None and after is not None
        assert recorder.ordered == [(stream, after, 0)] * waits
        recorder.ordered.clear()


def test_masked_arrays():
    keys = np.ma.masked_array(np.ones((3, 2, 8), np.float32), mask=True)
    caches = [np.zeros((6, 4, 2, 8), np.float32) for _ in range(2)]
    with refused("reshape_and_cache_flash", "key", "MaskedArray"):
        cc.reshape_and_cache_flash(keys, keys, *caches, np.arange(3))


# --- DLPack ---------------------------------------------------------------------------------------


class Capsules:
    """Exports that are made by hand, of float32 [2, 3]."""

    def __init__(
        self, version=(1, 0), code=2, bits=32, lanes=1, data=True, name=None, ndim=2, shape=(2, 3),
        strides=(3, 1), device=(1, 0),
    ):  # fmt: skip
        self.content = np.arange(6, dtype=np.float32)
        self._extents = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = (ctypes.c_int64 * len(strides))(*strides)
        managed = dlpack._ManagedTensorVersioned()
        managed.major, managed.minor = version
        tensor = managed.tensor
        tensor.data = self.content.ctypes.data if data else None
        (tensor.device_type, tensor.device_id), tensor.ndim = device, ndim
        tensor.code, tensor.bits, tensor.lanes = code, bits, lanes
        tensor.shape = ctypes.cast(self._extents, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(self._strides, ctypes.POINTER(ctypes.c_int64))
        self._managed, self._name = managed, name or b"dltensor_versioned"

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self._managed), self._name, None)


@pytest.mark.parametrize("stream", [7, dlpack.LOOK])
def test_exports_are_made_on_their_gpu(recorder, monkeypatch, stream):
    """torch and CuPy take the current GPU's stream for the array's, or refuse it, and going back to
    a GPU makes a context there. torch's current GPU may be another than CUDA's."""
    current, given, torchs = [0], [], [0]

    class OfSecondGPU(Capsules):
        def __dlpack_device__(self):
            return dlpack.CUDA, 1

        def __dlpack__(self, **options):
            given.append((current[-1], torchs[-1], options.pop("stream")))
            assert type(given[-1][-1]) is int
            if options:
                raise TypeError(options)
            return super().__dlpack__()

    @contextlib.contextmanager
    def on_device(index, kept=current):
        kept.append(index)
        yield
        kept.pop()

    of_torch = types.SimpleNamespace(
        is_initialized=lambda: used, device=lambda index: on_device(index, torchs)
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=of_torch))
    recorder.on_device = on_device
    for used in (False, True):
        its = stream if stream == dlpack.LOOK else streams.pointer("test", np.array(stream))
        assert dlpack.read(OfSecondGPU(device=(dlpack.CUDA, 1)), its)[1] == (2, 3)
        assert given == [(1, int(used), stream)] * 2 and current == torchs == [0]
        given.clear()


class OfGPU(Capsules):
    """On the GPU, as it says. ``given``: gets the stream of each export."""

    def __init__(self, given, device=(dlpack.CUDA, 0), **others):
        super().__init__(device=device, **others)
        self.given = given

    def __dlpack_device__(self):
        return dlpack.CUDA, 0

    def __dlpack__(self, stream, **options):
        self.given.append(stream)
        return super().__dlpack__()


@pytest.mark.whole
@pytest.mark.parametrize("told", [(1, 0), (3, 0), (2, 0), (2, 1), (13, 1)])
@pytest.mark.parametrize("is_there", [(1, 0), (2, 0), (2, 1), (13, 0)])
def test_exports_from_another_place_than_was_told(recorder, told, is_there):
    """There the stream that it was made for means another one, or nothing."""

    class Moving(Capsules):
        def __dlpack_device__(self):
            return told

    made = Moving(device=is_there)
    on_gpu = [place[0] in dlpack.ON_GPU for place in (told, is_there)]
    if on_gpu[0] == on_gpu[1] and (not on_gpu[0] or told[1] == is_there[1]):
        assert dlpack.read(made, 5)[1] == (2, 3)
        return
    converted = np.zeros((2, 3), np.uint8)
    recorder.host = ("output",)
    with refused("convert_fp8", "input", f"is {told}", f"export {is_there}"):
        cc.convert_fp8(converted, made)
    assert not converted.any() and not recorder.take()


def test_an_interface_of_memory_that_is_on_no_gpu(recorder):
    recorder.device_at = lambda address: -2
    keys, cache = np.ones((3, 2, 8), np.float32), np.zeros((6, 4, 2, 8), np.float32)
    with refused("reshape_and_cache_flash", "key", "is on no GPU"):
        cc.reshape_and_cache_flash(Interface(keys), keys, cache, cache.copy(), np.arange(3))
    with refused("zero_blocks", "caches", "is on no GPU"):
        cc.zero_blocks([Interface(cache)], [0])
    assert not recorder.take()


@pytest.mark.usefixtures("recorder")
def test_a_size_is_no_use():
    """What only looks at shapes lets no stream wait."""
    given = []
    assert cc.packed_size([OfGPU(given), OfGPU(given)], num_blocks=2) == 48
    assert cc.packed_size([(OfGPU(given), OfGPU(given))], num_blocks=2) == 48
    assert given == [dlpack.LOOK] * 4


def test_caches_that_are_only_read_are_exported_for_a_stream(recorder):
    """Without one it would be the legacy stream, which waits for all others."""
    given = []
    layout = {"ndim": 4, "shape": (1, 2, 1, 3), "strides": (6, 3, 3, 1)}
    cache = cc.PagedKVCache(*([OfGPU(given, **layout)] for _ in "kv"))
    table, bounds = np.zeros((1, 1), np.int32), np.array([0, 2], np.int32)
    cache.gather(0, table, bounds, out=[np.zeros((2, 1, 3), np.float32) for _ in "kv"])
    assert recorder.take() and given and set(given) == {recording.STREAM}


@pytest.mark.usefixtures("recorder")
def test_what_is_missing_is_told_with_the_operation(monkeypatch):
    def missing(*given):
        raise cc.MissingDependencyError("cuda:0: there is no CuPy")

    monkeypatch.setattr(streams, "current", missing)
    monkeypatch.setattr(making, "empty", missing)
    with pytest.raises(cc.MissingDependencyError, match="^zero_blocks: caches, cuda:0: there is"):
        cc.zero_blocks([OfGPU([])], [0])
    with pytest.raises(cc.MissingDependencyError, match="^slot_mapping, cuda:0: there is"):
        cc.slot_mapping(np.zeros((1, 1), int), np.arange(1), np.array([0, 1]), 4)


@pytest.mark.parametrize("strides", [(3, 1), None])
def test_a_capsule_made_by_hand(strides):
    """Also one that leaves out its strides, which are those without gaps."""
    converted = np.zeros((2, 3), np.uint8)
    made = Capsules()
    if strides is None:
        made._managed.tensor.strides = None
    cc.convert_fp8(converted, made)
    assert converted[0, 1] == 0x38  # 1.0 in E4M3


@pytest.mark.whole
@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"version": (2, 0)}, "version is 2.0"),
        ({"version": (0, 9)}, "version is 0.9"),
        ({"bits": 4, "code": 0}, "4 bits"),
        ({"bits": 4, "code": 17}, "4 bits"),
        ({"lanes": 4}, "4 lanes"),
        ({"data": False}, "address 0"),
        ({"name": b"used_dltensor"}, ""),
        ({"ndim": -1}, ""),
        ({"shape": (-2, 3)}, "shape is [-2, 3]"),
        ({"shape": (2, -3)}, "shape is [2, -3]"),
        ({"shape": (2**62, 3)}, "no place in memory"),
        ({"strides": (2**62, 1)}, "no place in memory"),
        ({"strides": (-(2**63), 1)}, "no place in memory"),
    ],
)
def test_exports_that_cannot_be_read(wrong, word):
    converted = np.zeros((2, 3), np.uint8)
    with refused("convert_fp8", "input", word):
        cc.convert_fp8(converted, Capsules(**wrong))
    assert not converted.any()


@pytest.mark.whole
@pytest.mark.parametrize("address", [1, 24, 65_535])
def test_exports_at_addresses_without_memory(torch, recorder, address):
    """What torch exports of a storage of which nothing is left: its offset."""
    converted = np.zeros((2, 3), np.uint8)
    made = Capsules()
    made._managed.tensor.data = address
    recorder.host = ("convert_fp8", "zero_blocks")
    with refused("convert_fp8", "input", f"of shape [2, 3] at address {address:#x}"):
        cc.convert_fp8(converted, made)
    with refused("zero_blocks", "caches[1]", f"at address {address:#x}"):
        cc.zero_blocks([Capsules(), made], [1])
    asleep = asleep_behind_others(torch, torch.arange(3))
    with refused("zero_blocks", "block_ids", "at address 0x18"):
        cc.zero_blocks([converted], worlds.Opaque(asleep))
    made = OfGPU([])
    made._managed.tensor.data = arrays.LOWEST - address
    recorder.host, recorder.device_at = (), lambda address: 0
    of_gpu = Interface(np.ones((2, 3), np.float32), data=(arrays.LOWEST - 64, False))
    for given in (made, of_gpu):
        with refused("convert_fp8", "input", "at address 0x"):
            cc.convert_fp8(converted, given)
    assert not converted.any() and not recorder.take()


def test_an_interface_that_changes(recorder):
    """It is read once: what is there, and on which GPU."""
    asked = []
    recorder.device_at = lambda address: asked.append(address) or 0
    keys = np.ones((2, 3), np.float32)

    class Changing:
        reads = 0

        @property
        def __cuda_array_interface__(self):
            self.reads += 1
            at = keys.ctypes.data if self.reads == 1 else 1 << 45
            return {"data": (at, False), "shape": (2, 3), "typestr": "<f4", "version": 3}

    given = Changing()
    assert dlpack.read_cuda_interface(given)[0] == keys.ctypes.data
    assert asked == [keys.ctypes.data] and given.reads == 1


def test_how_far_exports_reach():
    """Less than half of the addresses, counted in bytes; what leads nowhere may be of any size."""
    sound = dlpack._sound
    for shape, strides, size in (
        ((2, 3), (2**61 - 3, 1), 4), ((2, 3), (3 - 2**61, 1), 4), ((2**61 - 1,), (0,), 4),
        ((1, 3), (2**63 - 1, 1), 8), ((0, 3), (2**63 - 1, 1), 8), ((2, 1), (2**60 - 1, 2**62), 8),
        ((0, 2**63 - 1), (1, 1), 8), ((), (), 8),
    ):  # fmt: skip
        assert sound(2**64 - 1, shape, strides, size) == (2**64 - 1, shape, strides)
        assert sound(0, shape, strides, size) == (0, shape, strides)
        for ptr in (-1, 2**64):
            with pytest.raises(ValueError, match="no place in memory"):
                sound(ptr, shape, strides, size)
    for shape, strides, size in (
        ((2, 3), (2**61 - 2, 1), 4), ((2, 3), (2 - 2**61, -1), 4), ((2**61,), (0,), 4),
        ((2**31, 2**30), (0, 0), 4), ((3, 1), (2**59, 0), 8),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no place in memory"):
            sound(64, shape, strides, size)
    for bits, lanes, most in ((32, 1, 2**61), (16, 4, 2**60), (4, 1, 2**63), (16, 1, 2**62)):
        reaches = {"bits": bits, "lanes": lanes, "ndim": 1, "shape": (2, 0)}
        dlpack.read(Capsules(strides=(most - 1, 1), **reaches))
        with pytest.raises(ValueError, match="no place in memory"):
            dlpack.read(Capsules(strides=(-most, 1), **reaches))


@pytest.mark.parametrize("strides", [(40, 12, 2), (-40, 12, -2), (0, -12, 2), (2, 40, 8)])
def test_bytes_that_an_array_spans(strides):
    shape, dtype = (3, 2, 4), formats.DTYPES["float16"]
    made = arrays.Array(64, shape, strides, dtype, devices.CPU, True, "numpy")
    places = np.array([np.dot(at, strides) for at in np.ndindex(shape)])
    assert made.span == (places.min(), places.max() + 2)
    assert made.row_span == (places[:8].min(), places[:8].max() + 2)


def test_strides_of_one_row_may_be_of_any_size():
    """More than 64 bits, in bytes: they lead nowhere."""
    content = np.arange(3.0)
    view = arrays.as_numpy(content.ctypes.data, (1, 3), (2**66, 8), content.dtype)
    np.testing.assert_array_equal(view, content[None])
    assert arrays.meant((1, 3), (2**62, 1), 8) == (0, 8)
    assert arrays.meant((0, 3), (2**62, 1), 8) == (0, 0)
    converted = np.zeros((1, 3), np.uint8)
    cc.convert_fp8(converted, Capsules(shape=(1, 3), strides=(2**62, 1)))
    assert converted.tolist() == [[0, 0x38, 0x40]]  # 0.0, 1.0 and 2.0 in E4M3


class Failing:
    """A producer that refuses, as JAX does for sharded and deleted arrays."""

    def __init__(self, error, early=False):
        self._error, self._early = error, early

    def __dlpack_device__(self):
        if self._early:
            raise self._error
        return 1, 0

    def __dlpack__(self, **options):
        raise self._error


@pytest.mark.whole
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        BufferError("__dlpack__ only supported for unsharded arrays."),
        RuntimeError("Array has been deleted with shape=float32[2,3]."),
        TypeError("no such dtype"),
        KeyError("what"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_producer_says_is_told(error, early):
    converted = np.zeros((2, 3), np.uint8)
    said = error.args[0]
    with refused("convert_fp8", "input", said) as caught:
        cc.convert_fp8(converted, Failing(error, early))
    assert caught.value.__cause__ is error
    with refused("zero_blocks", "block_ids", said):
        cc.zero_blocks([np.ones((4, 4))], Failing(error, early))
    with refused("convert_fp8", "output", said):
        cc.convert_fp8(Failing(error, early), converted)


class Raising:
    """Whatever it is asked for."""

    def __getattr__(self, name):
        raise RuntimeError(f"there is no {name}")


def test_objects_that_cannot_even_be_asked(torch):
    class Tensor(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            raise RuntimeError("there is no function")

    cache, other = np.ones((4, 4), np.float32), torch.ones(4, 4)
    for bad, at in ((Raising(), ("", "")), (Tensor([1, 2]), ("[1]", "[0]"))):
        with refused("zero_blocks", f"caches{at[0]}", "there is no"):
            cc.zero_blocks([cache, bad], [0])
        with refused("zero_blocks", "block_ids", "there is no"):
            cc.zero_blocks([cache], bad)
        with refused("convert_fp8", "input", "there is no"):
            cc.convert_fp8(cache, bad)
        with refused("PagedKVCache", f"value_caches{at[1]}", "there is no"):
            cc.PagedKVCache([other], [bad])
    assert cache.all()


def test_numbers_that_cannot_be_asked():
    class Number:
        def __array__(self, *given, **options):
            raise RuntimeError("no array")

    cache = np.ones((4, 4), np.float32)
    for bad in ([[Number()]], [Number()], [1, [Number()]]):
        with refused("zero_blocks", "block_ids"):
            cc.zero_blocks([cache], bad)
    assert cache.all()


def test_arrays_in_errors_are_not_read():
    """That would wait for the GPU that they may be on."""

    class Array:
        shape, dtype = (2, 3), "float32"

        def __dlpack__(self):
            raise NotImplementedError

        def __repr__(self):
            raise AssertionError

    for given, shown in ((Array(), "{}"), ([1, Array()], "[1, {}]")):
        what = shown.format("a test_memory.Array of shape [2, 3], float32")
        with refused("PagedKVCache.allocate", "block_size", what):
            cc.PagedKVCache.allocate(1, 4, given, 1, 8, dtype="float16", device="cpu")


@pytest.mark.whole
@pytest.mark.parametrize("kind", [asleep, asleep_behind_others])
def test_plain_numbers_without_memory(torch, kind):
    """torch and NumPy would read there, and so would what shows them."""
    number, slopes = kind(torch, torch.tensor(8)), kind(torch, torch.ones(4))
    with refused("alibi_slopes", "num_heads"):
        cc.alibi_slopes(number)
    for given in (slopes, [0.5, kind(torch, torch.tensor(0.5))]):
        with refused("place_slopes", "slopes", "without memory"):
            cc.place_slopes(given)
    cache = torch.ones(4, 4)
    for given in (slopes, (slopes,), (0, (1, slopes))):
        with refused("pack_blocks", "layout", "torch.Tensor of shape [4], torch.float32"):
            cc.pack_blocks([cache], [0], cache, layout=given)
    assert cc.place_slopes(torch.tensor([0.5, 2])).tolist() == [0.5, 2]
    assert cc.place_slopes([torch.tensor(0.5), 2]).tolist() == [0.5, 2]


def test_tensors_with_gradients_behind_dlpack(torch):
    converted = np.zeros((2, 3), np.uint8)
    with refused("convert_fp8", "input", "gradient"):
        cc.convert_fp8(converted, worlds.Opaque(torch.ones(2, 3, requires_grad=True)))


def test_small_integers_of_torch(torch):
    if not hasattr(torch, "int4"):
        pytest.skip("this torch has no int4")
    cache = torch.zeros(4, 4)
    with refused("zero_blocks", "caches[0]", "int4"):
        cc.zero_blocks([torch.empty(4, 4, dtype=torch.int4)], [1])
    with refused("zero_blocks", "block_ids", "int4"):
        cc.zero_blocks([cache], torch.empty(4, dtype=torch.int4))


@contextlib.contextmanager
def current_gpu_stays():
    """JAX, when it is first used, makes the last GPU current in this thread."""
    try:
        import cupy

        before = cupy.cuda.runtime.getDevice()
    except Exception:  # there is no CuPy, or no GPU
        yield
        return
    try:
        yield
    finally:
        cupy.cuda.runtime.setDevice(before)


def test_jax_arrays():
    jax = pytest.importorskip("jax")
    converted = np.zeros((2, 3), np.uint8)
    with current_gpu_stays():
        on_cpu = jax.default_device(jax.devices("cpu")[0])
    with on_cpu:
        source = jax.numpy.ones((2, 3))
    cc.convert_fp8(converted, source)
    assert (converted == 0x38).all()
    with refused("convert_fp8", "output", "JAX arrays are immutable"):
        with on_cpu:
            cc.convert_fp8(jax.numpy.zeros((2, 3), "uint8"), source)
    source.delete()
    with refused("convert_fp8", "input", "jax"):  # what it says of it differs
        cc.convert_fp8(converted, source)


# --- what owns an export, and lists that are not what they seem -----------------------------------


class Lent:
    """Each export is an array of its own, which nothing owns but the capsule. ``freed``: of which
    exports it is gone."""

    def __init__(self, before=lambda: None):
        self.exports, self.freed, self._before = [], [], before

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        self._before()
        made = np.ones((4, 8), np.float32)
        weakref.finalize(made, self.freed.append, len(self.exports))
        self.exports.append(made.ctypes.data)
        return made.__dlpack__(**options)


def test_exports_of_caches_live_as_long_as_their_addresses_are_known():
    sides = Lent(), Lent()
    cache = cc.PagedKVCache(*([side] for side in sides))
    out = np.zeros(64, np.float32)
    for call in (
        len, lambda cache: cache.copy_blocks([(0, 1)]), lambda cache: cache.zero_blocks([2]),
        lambda cache: cache.pack_blocks([1], out),
    ):  # fmt: skip
        call(cache)
        bound = (cache._copy, *cache._bound.values())
        known = {lists.addresses[0] for one in bound for lists in one.found if lists is not None}
        for side in sides:
            assert not known & {side.exports[at] for at in side.freed}
    del cache, bound
    assert all(len(side.freed) == len(side.exports) for side in sides)


@pytest.mark.whole
@pytest.mark.parametrize("listed", [True, False])
def test_exports_in_host_memory_live_until_the_work_is_done(torch, recorder, listed):
    recorder.host, given, cache = ("src", "packed"), Lent(), torch.zeros(4, 8)
    if listed:
        cc.swap_blocks([given], [cache], [(0, 1)])
    else:
        cc.unpack_blocks(given, [cache], [1])
    assert recorder.take() and given.exports and not given.freed
    recorder.event_made.is_done = True
    streams.let_go()
    assert len(given.freed) == len(given.exports)


def test_host_memory_of_another_framework_is_waited_for(torch, recorder, monkeypatch):
    """A copy to pinned memory may be pending on its stream. Not if it has used no GPU: to ask for
    its stream would make a context on the one that is current."""
    kind = type("OnGPU", (np.ndarray,), {})
    recording.as_cupys_on_gpu_1(monkeypatch, kind)
    monkeypatch.setattr(arrays, "_NAMES", arrays._NAMES | {arrays._read_numpy: "cupy"})
    monkeypatch.setattr(streams, "current", lambda framework, device: lambda: framework)
    described = arrays.describe

    def describe(metadata, name):
        array = described(metadata, name)
        return array._replace(framework="cupy") if array.framework == "numpy" else array

    monkeypatch.setattr(arrays, "describe", describe)
    cache, host = np.zeros((4, 8), np.float32).view(kind), torch.ones(4, 8)
    for words, call in (
        (("src",), lambda: cc.swap_blocks(host, cache, [(0, 1)])),
        (("dst",), lambda: cc.swap_blocks(cache, host, [(0, 1)])),
        (("packed",), lambda: cc.unpack_blocks(host, [cache], [0])),
        (("out",), lambda: cc.pack_blocks([cache], [0], host)),
    ):
        recorder.host = words
        for used in (True, False):
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda used=used: used)
            recorder.ordered.clear()
            call()
            assert recorder.ordered == [("torch", "cupy", 0)] * used and not recorder.lent


def test_lists_of_a_cache_are_its_own():
    one, two, three = (np.full((4, 8), n, np.float32) for n in (1, 2, 3))
    keys, values = [one], [two]
    cache = cc.PagedKVCache(keys, values)
    other = cc.PagedKVCache([np.zeros_like(one)], [np.zeros_like(one)])
    keys[0] = three
    values.clear()
    cache.swap_blocks(other, [(0, 1)])
    assert (other.key_caches[0][1] == 1).all() and (other.value_caches[0][1] == 2).all()


class Short(list):
    def __len__(self):
        return 1


class Hidden(list):
    def __iter__(self):
        return iter(())


class Doubled(tuple):
    def __len__(self):
        return 2 * super().__len__()


@pytest.mark.whole
@pytest.mark.parametrize("kind", [Short, Hidden, Doubled])
def test_lists_that_lie_about_what_they_have(kind):
    """What they give one after the other counts."""
    layers = [np.ones((4, 8), np.float32) for _ in range(4)]
    keys, values = kind(layers[:2]), kind(layers[2:])
    there = list(keys)
    out, count = np.zeros(64, np.float32), len(there)
    cc.zero_blocks(keys, [1])
    cc.zero_blocks(kind([(layer,) for layer in there]), [2])
    assert [int(layer.sum()) for layer in layers[:2]] == [16] * count + [32] * (2 - count)
    cc.copy_blocks(keys, values, [(0, 1)])
    assert all(layer[1].all() for layer in layers[:count])
    cc.pack_blocks(keys, [1], out)
    assert out.sum() == 8 * count and len(cc.PagedKVCache(keys, values)) == count
    assert cc.packed_size(keys, num_blocks=2) == 2 * 32 * count
    tables, sizes = kind([np.zeros((1, 2), int)] * 2), kind([4, 4])
    pairs, window, scales = [kind(layers[:2])], kind([-1, 0]), kind([2.0])
    spaces = kind([cc.PagedKVCache(layers[:1])])
    names = cc.BlockTables(9, 2, max_sequences=2, max_tokens=9, max_length=9)
    q, rows = np.ones((1, 1, 2, 4), np.float32), [np.zeros((1, 1, 4), np.float32)] * 2
    pages = np.ones((4, 2, 1, 4), np.float32)
    names.add("a")
    names.add("b")
    calls = (
        lambda: cc.slot_mapping_groups(tables, None, np.arange(2), np.array([0, 2]), sizes),
        lambda: cc.zero_blocks(pairs, [0]),
        lambda: cc.flash_attn.flash_attn_with_kvcache(q, pages, pages, window_size=window),
        lambda: cc.PagedKVCache([pages], [pages + 0], k_scales=scales),
        lambda: cc.SwapSpace(spaces, 1),
        lambda: names.step(kind(["a", "b"]), kind([1, 1])),
        lambda: names.reorder(kind(["a", "b"]), kind(["b", "b"])),
        lambda: cc.PagedKVCache([pages], [pages + 0]).gather(
            0, np.zeros((1, 1), int), np.array([0, 1]), out=kind([rows[0], rows[0] + 0])
        ),
    )
    for at, call in enumerate(calls):
        if count or at in (5, 6):  # no sequences are a step, too
            call()
        else:
            with pytest.raises(cc.CupyCacheError, match=": Invalid "):
                call()


def changed_when_exported(change):
    """A list of two arrays of which the first one changes it."""
    layers = []
    layers += [Lent(lambda: change(layers)), Lent()]
    return layers


def test_lists_that_an_export_changes():
    """What was given at first counts."""
    last = np.ones((4, 8), np.float32)
    for change in (
        lambda layers: layers.clear(),
        lambda layers: layers.append(last),
        lambda layers: layers.__setitem__(1, last),
    ):
        layers = changed_when_exported(change)
        given = layers.copy()
        cc.zero_blocks(layers, [0])
        assert [len(one.exports) for one in given] == [1, 1] and last.all()


# --- memory that two arrays have ------------------------------------------------------------------


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
    exported = Capsules()
    with refused("merge_attn_states", "output", "test_memory"):
        vllm.merge_attn_states(exported, *given[1:], None, 2)


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


# --- strides that mean nothing --------------------------------------------------------------------


def loose(torch, shape, dtype="float16"):
    """A tensor whose extents of 1 have odd strides; the others have no gaps."""
    made = tensor(torch, *shape, dtype=dtype)
    strides = [7 if extent == 1 else step for extent, step in zip(shape, made.stride())]
    return made.as_strided(shape, strides)


def tensor(torch, *shape, dtype="float16"):
    """16-byte aligned, with room behind."""
    dtype = getattr(torch, dtype)
    flat = torch.zeros(4096 + 16, dtype=torch.uint8)
    start = -flat.data_ptr() % 16
    return flat[start : start + 4096].view(dtype)[: int(np.prod(shape))].view(shape)


@pytest.fixture
def ready():
    """What `warmup` loads for one head and for two."""
    ops = ["reshape_and_cache_flash", "gather_cache"]
    found = {
        heads: {
            kernel.expression
            for kernel in specialisations.specialisations(heads, 8, 1, "float16", ops=ops)
        }
        for heads in (1, 2)
    }
    dispatch.forget_everything()
    return found


@pytest.mark.whole
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("tokens", [1, 2])
def test_strides_of_extents_of_1_choose_no_kernel(torch, ready, recorder, heads, blocks, tokens):
    """What `warmup` loads serves them, and so does what was remembered."""
    index = {"dtype": "int64"}
    shapes = {
        "key": (tokens, heads, 8), "value": (tokens, heads, 8),
        "key_cache": (blocks, 1, heads, 8), "value_cache": (blocks, 1, heads, 8),
    }  # fmt: skip
    for make in (tensor, loose, tensor, loose, loose):
        given = {name: make(torch, shape) if make is loose else make(torch, *shape)
                 for name, shape in shapes.items()}  # fmt: skip
        slots = tensor(torch, tokens, **index)
        cc.reshape_and_cache_flash(**given, slot_mapping=slots)
        dst = loose(torch, (tokens, heads, 8))
        cc.gather_cache(
            given["key_cache"], dst, loose(torch, (1, 3), **index), tensor(torch, 2, **index)
        )
        cc.copy_blocks([given["key_cache"]], [given["value_cache"]], loose(torch, (0, 2), **index))
    expressions = {expression for expression, *_ in recorder.take()}
    assert len(expressions) == 2
    assert expressions <= ready[heads]


def test_strides_of_extents_of_1_on_the_cpu(rng):
    """One row of a transposed buffer, as two rows of it."""
    source = rng.random((3, 1, 16), np.float32)
    for rows in (2, 1):
        destination = np.zeros((16, rows), np.float32).T
        given = np.array([[2, 1]]), np.array([0, rows])
        if rows == 1:
            cc.gather_cache(source, destination, *given)
            assert (destination == source[[2], 0]).all()
        else:
            with refused("gather_cache", "dst"):
                cc.gather_cache(source, destination, *given)
    row = np.lib.stride_tricks.as_strided(np.zeros(16, np.float32), (1, 16), (1, 4))
    cc.gather_cache(source, row, np.array([[2]]), np.array([0, 1]))
    assert (row == source[2]).all()


@pytest.mark.parametrize("rows", [np.broadcast_to, np.lib.stride_tricks.sliding_window_view])
def test_keys_that_share_memory(rng, rows):
    """Of the operations that quantise whole rows: all tokens are one, or lie one element apart."""

    def keys(size, dtype):
        content = rng.standard_normal(size + 2).astype(dtype)
        return rows(content[:size], (3, size)) if rows is np.broadcast_to else rows(content, size)

    k = keys(8, np.float32)
    results = []
    for given in (k, k.copy()):
        cache = np.zeros((2, 2, 16), np.uint8)
        cc.indexer_k_quant_and_cache(given, cache, np.array([0, 3, 1]), 4, "ue8m0")
        results.append(cache)
    expected = np.zeros((2, 2, 16), np.uint8)
    oracle.indexer_k_quant_and_cache(k, expected, np.array([0, 3, 1]), 4, "ue8m0")
    assert all((result == expected).all() for result in results)
    kv_c, k_pe = keys(512, np.float16), keys(64, np.float16)
    cache, expected = (np.zeros((2, 2, 656), np.uint8) for _ in range(2))
    cc.concat_and_cache_mla(kv_c, k_pe, cache, np.array([0, 3, 1]), "fp8_ds_mla")
    oracle.concat_and_cache_fp8_ds_mla(kv_c, k_pe, expected, np.array([0, 3, 1]), "power_of_two")
    assert (cache == expected).all()


def test_layers_of_several_frameworks(torch):
    """Their strides count differently, and their streams are others."""
    tables = [torch.tensor([[7], [3]]), np.array([[1], [4]])]
    with refused("slot_mapping_groups", "block_tables[1]", "numpy"):
        cc.slot_mapping_groups(tables, None, np.zeros(2, int), np.array([0, 1, 2]), [1, 4])
    caches = [np.zeros((4, 4), np.float32) for _ in range(2)]
    caches[1].flags.writeable = False
    with pytest.raises(cc.NotWritableError, match=r"zero_blocks: .*caches\[1\]"):
        cc.zero_blocks(caches, [0])


def test_tokens_of_x_packed_caches():
    """A slot is not one place there."""
    keys, values = np.zeros((4, 2, 2, 8, 4), np.float32), np.zeros((4, 2, 8, 8), np.float32)
    out = np.zeros(10_000, np.uint8)
    with refused("pack_tokens", "caches[0][0]", "[4, 2, 2, 8, 4]"):
        cc.pack_tokens([(keys, values)], [0], out)
    with refused("unpack_tokens", "caches[0][0]", "[4, 2, 2, 8, 4]"):
        cc.unpack_tokens(out, [(keys, values)], [0])
    cc.pack_blocks([(keys, values)], [0], out)


# --- host memory that is pinned in pieces ---------------------------------------------------------


def run_copies(recorder):
    """Do what the driver was told."""
    for destination, source, size in recorder.copies:
        ctypes.memmove(destination, source, size)
    recorder.copies.clear()


@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_swaps_of_memory_that_is_pinned_in_pieces(torch, recorder, rng, to_host, dense):
    """Blocks that the GPU does not reach never go to the kernel, and no copy crosses an edge."""
    recorder.host = ("dst",) if to_host else ("src",)
    for _ in range(60):
        layers = [torch.from_numpy(rng.integers(0, 256, (8, 2, 48), np.uint8)) for _ in range(4)]
        if not dense:
            layers = [layer[:, :, :32] for layer in layers]
        sources, destinations = layers[:2], layers[2:]
        host = destinations if to_host else sources
        recorder.pinned = []
        for array in host:
            begin, size = array.data_ptr(), array.untyped_storage().nbytes()
            edges = np.sort(rng.choice(np.arange(1, size // 16), 3, replace=False)) * 16
            cuts = begin + np.array([0, *edges, size])
            kept = rng.random(4) < [0.9, 0.6, 0.6, 0.9]
            recorder.pinned += [tuple(map(int, cuts[i : i + 2])) for i in range(4) if kept[i]]
        whole = True
        for array in host:
            begin = array.data_ptr()
            end = begin + 8 * 2 * 48 - (0 if dense else 16)
            pinned = [min(end, last) - first for first, last in recorder.pinned
                      if begin <= first < end]  # fmt: skip
            whole &= sum(pinned) == end - begin
        pairs = list(zip(rng.permutation(8).tolist(), rng.permutation(8).tolist()))[:5]
        expected = [layer.clone() for layer in destinations]
        for before, layer in zip(sources, expected):
            for of, to in pairs:
                layer[to] = before[of]
        cc.swap_blocks(sources, destinations, pairs)
        if recorder.take():
            assert whole and not recorder.copies
            continue
        run_copies(recorder)
        assert all(map(torch.equal, destinations, expected))


@pytest.mark.parametrize("left", [(), [(0, 512)], [(0, 256), (512, 1024)], [(256, 1024)]])
def test_memory_that_is_no_longer_pinned(torch, recorder, left):
    """Wholly or in part. What was found out once is not believed for ever."""
    recorder.host = ("dst",)
    source, host = torch.ones(4, 64), torch.zeros(4, 64)
    begin = host.data_ptr()
    recorder.pinned = [(begin, begin + 1024)]
    for _ in range(3):
        cc.swap_blocks(source, host, [(0, 1)])
        assert recorder.take() and not recorder.copies
    recorder.pinned = [(begin + first, begin + last) for first, last in left]
    cc.swap_blocks(source, host, [(0, 1)])
    assert not recorder.take() and recorder.copies


def test_long_runs_in_memory_that_is_pinned_in_pieces(torch, recorder, monkeypatch):
    """All of it is reached, but a copy by the driver must not cross an edge."""
    monkeypatch.setattr("cupy_cache.ops.shared.blocks.RUN_BYTES", 1024)
    recorder.host = ("dst",)
    source, host = torch.arange(512.0).view(8, 64), torch.zeros(8, 64)
    begin = host.data_ptr()
    recorder.pinned = [(begin, begin + 768), (begin + 768, begin + 2048)]
    cc.swap_blocks(source, host, [(n, n) for n in range(8)])
    assert not recorder.take() and len(recorder.copies) > 1
    run_copies(recorder)
    assert torch.equal(source, host)


@pytest.mark.parametrize("to_host", [True, False])
@pytest.mark.parametrize("pieces", [[(0, 96), (96, 256)], [(96, 256)]])
def test_ranges_over_the_edges_of_pinned_memory(torch, recorder, monkeypatch, to_host, pieces):
    """They are cut there for the driver."""
    monkeypatch.setattr("cupy_cache.runtime.driver.gpus", lambda: 1)
    monkeypatch.setattr("cupy_cache.ops.shared.blocks.RUN_BYTES", 64)
    source = torch.arange(256, dtype=torch.uint8)
    destination = torch.zeros_like(source)
    gpu, host = (side.data_ptr() for side in (source, destination)[:: 1 if to_host else -1])
    recorder.host = ("_ptrs", "sizes")
    recorder.pinned = [(host + first, host + last) for first, last in pieces]
    of_host = recorder.allocation

    def allocation(address):
        if gpu <= address < gpu + 256:
            return allocations.Allocation(gpu, gpu + 256, devices.Device("cuda", 0), 0)
        return of_host(address)

    monkeypatch.setattr(recorder, "allocation", allocation)
    columns = ([tensor.data_ptr()] for tensor in (source, destination))
    cc.swap_blocks_batch(*map(np.array, (*columns, [256])))
    assert not recorder.take() and len(recorder.copies) > 1
    run_copies(recorder)
    assert torch.equal(source, destination)


def test_a_buffer_that_is_pinned_in_pieces(torch, recorder, monkeypatch):
    """All its pieces, or it is staged."""
    recorder.host = ("out",)
    staged = []
    monkeypatch.setattr(
        "cupy_cache.ops.shared.packing.Plan._run_staged", lambda *given: staged.append(1)
    )
    cache, out = torch.ones(8, 64), torch.zeros(4 * 64)
    begin, size = out.data_ptr(), 4 * 4 * 64
    for pieces, whole in (
        ([(0, 512), (512, 1024)], True),
        ([(0, 256), (512, 1024)], False),
        ([(0, 512)], False),
        ([(0, 256), (256, 512), (512, 1024)], True),
    ):
        recorder.pinned = [(begin + first, begin + last) for first, last in pieces]
        staged.clear()
        cc.pack_blocks([cache], [1, 3, 5, 7], out)
        assert size == 1024
        assert bool(recorder.take()) == whole and bool(staged) != whole


@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
@pytest.mark.parametrize("unpacks", [False, True])
def test_a_staged_buffer_of_which_parts_are_pinned(
    torch, recorder, rng, monkeypatch, layout, unpacks
):
    """No copy crosses an edge, and together they are all of the buffer."""
    recorder.host = ("out", "packed")
    stage = torch.zeros(2048, dtype=torch.uint8)
    monkeypatch.setattr(
        recorder, "staging", lambda *given: contextlib.nullcontext(stage.data_ptr()), raising=False
    )
    cache, out = torch.zeros(8, 64), torch.zeros(2 * 4 * 64)
    begin, size = out.data_ptr(), 2048
    for _ in range(20):
        first, last = np.sort(rng.choice(np.arange(1, size), 2, replace=False)).tolist()
        recorder.pinned = [(begin, begin + first), (begin + last, begin + size)]
        if unpacks:
            cc.unpack_blocks(out, [cache, cache.clone()], [1, 3, 5, 7], layout=layout)
        else:
            cc.pack_blocks([cache, cache], [1, 3, 5, 7], out, layout=layout)
        assert recorder.take()
        covered = sorted((copy[1 if unpacks else 0] - begin, copy[2]) for copy in recorder.copies)
        assert [at for at, _ in covered] == [0, *np.cumsum([n for _, n in covered])[:-1]]
        assert sum(n for _, n in covered) == size
        recorder.copies.clear()


# --- what is remembered of types ------------------------------------------------------------------


def test_types_of_arrays_are_not_kept_without_end():
    """A new class each time, as functions that define one make it."""
    cache = np.zeros((4, 4), np.uint8)
    first = None
    for _ in range(3 * arrays.MAX_READERS):
        kind = type("Array", (np.ndarray,), {})
        first = first or weakref.ref(kind)
        cc.zero_blocks([cache.view(kind)], [0])
    assert len(arrays._READERS) <= arrays.MAX_READERS
    del kind
    gc.collect()
    assert first() is None


def test_a_full_table_of_types_changes_nothing(torch, recorder, monkeypatch):
    """Tensors on another stream are still told to their allocator."""
    monkeypatch.setattr(arrays, "_READERS", {n: None for n in range(arrays.MAX_READERS)})
    given = step(torch)
    cc.reshape_and_cache_flash(**given, stream=5)
    lent = [tensor for tensors, *_ in recorder.lent for tensor in tensors]
    assert all(any(tensor is one for one in lent) for tensor in given.values())
