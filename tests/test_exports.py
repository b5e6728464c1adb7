# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Memory that other libraries lend: by DLPack or the CUDA array interface. What is said of it is
checked, and what owns it lives as long as it is used."""

import contextlib
import ctypes
import sys
import types
import weakref

import numpy as np
import pytest
import recording
import worlds
from refusing import asleep_behind_others, refused

import cupy_cache as cc
from cupy_cache.integrations import vllm
from cupy_cache.runtime import (
    arrays,
    devices,
    dlpack,
    formats,
    making,
    streams,
)

pytestmark = pytest.mark.usefixtures("nothing_remembered")


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


@pytest.mark.parametrize("stream, named", [(None, 1), (0, 1), (1, 1), (2, 2), (7, 7)])
def test_the_null_stream_has_a_name(recorder, stream, named):
    """The protocol's 1 is the legacy default stream, whose handle is 0; its 0 means nothing."""
    given = []
    assert dlpack.read(OfGPU(given), stream)[1] == (2, 3)
    assert given == [named]


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
        what = shown.format("a test_exports.Array of shape [2, 3], float32")
        with refused("PagedKVCache.allocate", "block_size", what):
            cc.PagedKVCache.allocate(1, 4, given, 1, 8, dtype="float16", device="cpu")


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


def test_states_behind_dlpack_alone():
    """vLLM's function slices them, which needs a framework."""
    states, weights = (
        [np.zeros((4, 2, 4), np.float32) for _ in range(2)],
        np.zeros((2, 4), np.float32),
    )
    with refused("merge_attn_states", "output", "test_exports"):
        vllm.merge_attn_states(Capsules(), states[0], weights, states[1], weights.copy(), None, 2)
