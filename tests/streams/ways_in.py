# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What users call that is no case of tests/cases.py, in threads that never chose a GPU, with arrays
on one that is not current; and what comes out, which a few numbers tell.

Of each function that is decorated by `way` a fresh thread calls it twice, and one that has computed
with torch on that GPU once: there torch takes cuda:0 for current, and CUDA the other one.
"""

import ctypes
import sys
import threading

import numpy as np
import worlds

import cupy_cache as cc
from cupy_cache.runtime import cuda, faults, overlap

BLOCKS, SIZE, HEADS, HEAD_SIZE = 8, 4, 2, 32
WAYS = []


def way(function):
    WAYS.append(function)
    return function


class Place:
    """Arrays of torch, CuPy or NumPy on a GPU, which is not made the current one; or on the CPU."""

    def __init__(self, framework, device):
        self.framework, self.device = framework, device
        self.on_gpu = device != "cpu"
        self.where = {"framework": framework, "device": device}
        self.sizes = {"dtype": "float16" if self.on_gpu else "float32", **self.where}

    def put(self, values, dtype=None):
        values = np.asarray(values, dtype)
        if self.framework == "numpy":
            return values.copy()
        if self.framework == "torch":
            torch = sys.modules["torch"]
            return torch.from_numpy(values.copy()).to(torch.device(self.device))
        return self.copied(values)

    def rows(self, *values):
        """Keys, values or queries: all elements of a row are one number."""
        rows = np.array(values, np.float32)[:, None, None] * np.ones((HEADS, HEAD_SIZE))
        return self.put(rows, self.sizes["dtype"])

    def numbers(self, *values):
        return self.put(values, np.int32)

    def numpy(self, array):
        if self.framework != "cupy":
            return array.cpu().numpy() if self.framework == "torch" else array
        return self.copied(array)

    def copied(self, array):
        """CuPy's array for NumPy's, or NumPy's for CuPy's contiguous one. CuPy's own way sets the
        GPU, which a thread without a context keeps."""
        cupy = sys.modules["cupy"]
        with cuda.on_device(self.device):
            if isinstance(array, cupy.ndarray):
                assert array.flags.c_contiguous
                made = np.empty(array.shape, array.dtype)
                ends = made.ctypes.data, array.data.ptr
            else:
                array = np.ascontiguousarray(array)
                made = cupy.empty(array.shape, array.dtype)
                ends = made.data.ptr, array.ctypes.data
            cupy.cuda.runtime.memcpy(*ends, array.nbytes, cupy.cuda.runtime.memcpyDefault)
        return made

    def of_rows(self, array):
        """The number of each row, in all of whose elements it must be."""
        rows = self.numpy(array).reshape(-1, HEADS * HEAD_SIZE).astype(np.float32)
        assert np.ptp(rows, axis=1).max(initial=0) < 2e-2
        return rows.mean(axis=1).round(1).tolist()

    @staticmethod
    def address(array):
        if isinstance(array, np.ndarray):
            return array.ctypes.data
        return array.data.ptr if hasattr(array, "get") else array.data_ptr()

    def stream(self):
        """(A stream of that GPU beside the current one, a function that waits for it)."""
        if not self.on_gpu:
            return None, lambda: None
        if self.framework == "torch":
            stream = sys.modules["torch"].cuda.Stream(device=self.device)
            return stream, stream.synchronize
        with cuda.on_device(self.device):
            # Destroyed in a thread without a context it would make one on cuda:0.
            kind = cuda.freed_on_its_gpu(sys.modules["cupy"].cuda.Stream)
            stream = kind(non_blocking=True)

        def wait():
            with cuda.on_device(self.device):
                stream.synchronize()

        return stream, wait


def written(place, tokens=6):
    """A cache of two layers whose first tokens have the values 1, 2, ...; keys are 0."""
    cache = cc.PagedKVCache.allocate(2, BLOCKS, SIZE, HEADS, HEAD_SIZE, **place.sizes)
    values = place.rows(*range(1, tokens + 1))
    slots = place.put(np.arange(tokens))
    for layer in range(2):
        cache.write(layer, place.rows(*[0] * tokens), values, slots)
    return cache


def values_of(place, cache, *blocks, layer=1):
    """The values of the slots of these blocks."""
    table, tokens = place.numbers(list(blocks)), SIZE * len(blocks)
    found = cache.gather(layer, table, place.numbers(0, tokens), num_tokens=tokens)
    return place.of_rows(found[1])


@way
def methods_of_caches(place):
    cache = written(place)
    assert values_of(place, cache, 1, 0) == [5, 6, 0, 0, 1, 2, 3, 4]
    cache.copy_blocks([(0, 5), (1, 6)])
    cache.zero_blocks([0])
    cache.copy_blocks(place.put(np.array([[5, 2]])))
    assert values_of(place, cache, 0, 2, layer=0) == [0, 0, 0, 0, 1, 2, 3, 4]
    packed = place.put(np.zeros(2 * cache.bytes_per_block, np.uint8))
    cache.pack_blocks([6, 5], packed)
    cache.unpack_blocks(packed, [3, 4])
    assert values_of(place, cache, 3, 4) == [5, 6, 0, 0, 1, 2, 3, 4]
    out = cache.attend(0, place.rows(1), place.numbers([6, 0]), place.numbers(2))
    assert place.of_rows(out) == [5.5]
    lse = place.put(np.zeros((1, HEADS), np.float32))
    cache.attend(0, place.rows(1), place.numbers([6, 0]), place.numbers(1), out=out, lse=lse)
    assert place.of_rows(out) == [5] and not place.numpy(lse).any()


@way
def swaps(place):
    """With host memory that is pinned, that is not, and that is a `SwapSpace`'s."""
    cache = written(place)
    of_host = {"framework": "torch" if place.framework == "torch" else "numpy", "device": "cpu"}
    for pinned in {False, place.on_gpu}:
        options = {**place.sizes, **of_host, "pinned": pinned}
        host = cc.PagedKVCache.allocate(2, 3, SIZE, HEADS, HEAD_SIZE, **options)
        cache.swap_blocks(host, [(0, 2), (1, 0)])
        cache.zero_blocks([3, 4])
        host.swap_blocks(cache, [(0, 3), (2, 4)])
        assert values_of(place, cache, 3, 4) == [5, 6, 0, 0, 1, 2, 3, 4]
        first = cache.bytes_per_block // 4  # of the keys of a layer; it becomes the second one
        ends = (place.address(x.value_caches[1]) for x in (cache, host))
        cc.swap_blocks_batch(*(np.array([n]) for n in (*ends, first)))
        host.swap_blocks(cache, [(0, 4)])
        assert values_of(place, cache, 4) == [1, 2, 3, 4]
    space = cc.SwapSpace(cache, 2)
    space.swap_out([(1, 0), (0, 1)])
    cache.zero_blocks([0, 1])
    arriving = space.prefetch([1, 0])
    space.advance()
    arriving.wait()
    assert arriving.is_done() and space.num_moving == 0
    arriving.swap_in([(0, 6), (1, 7)])
    assert values_of(place, cache, 0, 6, 7) == [0, 0, 0, 0, 5, 6, 0, 0, 1, 2, 3, 4]


@way
def steps(place):
    tables = cc.BlockTables(
        BLOCKS, SIZE, max_sequences=4, max_tokens=32, max_length=32, **place.where
    )
    for count in (6, 1, 1):
        if count == 6:
            tables.add("a", range(6))
        step = tables.step(["a"], [count])
        length = tables.length("a")
        assert place.numpy(step.slot_mapping).tolist() == list(range(length - count, length))
        assert place.numpy(step.seq_lens).tolist() == [length]
    tables.step(["a"], [1], stream=place.stream()[0])


@way
def new_results(place):
    table, starts = place.numbers([3, 5]), place.numbers(0, 3)
    positions = place.put(np.array([0, 5, 2]))
    slots = cc.slot_mapping(table, positions, starts, SIZE)
    assert place.numpy(slots).tolist() == [12, 21, 14]
    slots = cc.slot_mapping_groups([table, table], None, positions, starts, [SIZE, SIZE])
    assert place.numpy(slots).tolist() == [[12, 21, 14]] * 2
    slopes = cc.alibi_slopes(8, **place.where)
    assert place.numpy(slopes).tolist() == [2.0**-n for n in range(1, 9)]
    placed = cc.place_slopes([0.5, 3.0], **place.where)
    bias = cc.alibi_bias(placed, positions, positions)
    assert place.numpy(bias)[1].tolist() == [[0, 15, 6], [-15, 0, -9], [-6, 9, 0]]


@way
def on_another_stream(place):
    """New results, memory that is handed over, and events."""
    stream, wait = place.stream()
    table, starts = place.numbers([3, 5]), place.numbers(0, 2)
    slots = cc.slot_mapping(table, place.put(np.array([0, 5])), starts, SIZE, stream=stream)
    wait()
    assert place.numpy(slots).tolist() == [12, 21]
    cache = written(place)
    out = cache.attend(1, place.rows(1), place.numbers([0]), place.numbers(3), stream=stream)
    wait()
    assert place.of_rows(out) == [2]
    slopes = cc.place_slopes([0.5, 3.0], **place.where, stream=stream)
    wait()
    assert place.numpy(slopes).tolist() == [0.5, 3]


@way
def attention_with_scratch_memory(place):
    """Few sequences that are long are cut, and their parts need memory."""
    tokens = 4096
    pages = place.put(np.ones((tokens // 16, 16, HEADS, HEAD_SIZE)), place.sizes["dtype"])
    table = place.put(np.arange(tokens // 16, dtype=np.int32)[None])
    for _ in range(2):
        out = cc.paged_attention(place.rows(1), pages, pages, table, place.numbers(tokens))
        assert place.of_rows(out) == [1]
    entries = place.put(np.ones((tokens // 64, 64, 576)), place.sizes["dtype"])
    query = place.put(np.ones((1, 16, 576)), place.sizes["dtype"])
    table = place.put(np.arange(tokens // 64, dtype=np.int32)[None])
    out = cc.paged_attention_mla(query, entries, table, place.numbers(tokens), scale=0.1)
    assert (place.numpy(out).round(2) == 1).all()


@way
def names_of_others(place):
    """Those that compute with the arrays before and after the operations."""
    pages = [place.put(np.zeros((3, 4, HEADS, HEAD_SIZE)), place.sizes["dtype"]) for _ in range(2)]
    for added in (5, 7):
        new = place.rows(added)[None]
        out = cc.flash_attn.flash_attn_with_kvcache(
            new, *pages, place.rows(0)[None], new, cache_seqlens=place.numbers(added - 5)
        )
    assert place.of_rows(out) == [4]  # of 5, 0 and 7
    ends = place.numbers(0, 1, 3)
    rows = place.rows(2, 3, 4)
    out = cc.flash_attn.flash_attn_varlen_func(rows, rows, rows, ends, ends, 2, 2)
    made = place.of_rows(out)
    assert made[0] == 2 and 3 < min(made[1:]) <= max(made) <= 4
    from cupy_cache.integrations import vllm

    weights = place.put(np.zeros((HEADS, 3), np.float32))
    vllm.merge_attn_states(out, place.rows(2, 2, 2), weights, rows, weights, None, 2)
    assert place.of_rows(out) == [2, 2.5, 4]
    query, out, lengths = place.rows(0), place.rows(0), place.numbers(3)
    cc.paged_attention_v1(
        out, query, *(p.reshape(3, 4, HEADS, HEAD_SIZE) for p in pages), HEADS, 1.0,
        place.numbers([0]), lengths, 4, 4, None, "auto", None, None,
    )  # fmt: skip
    assert place.of_rows(out) == [4]


@way
def arrays_behind_protocols(place):
    if place.framework == "numpy":
        return
    slots = np.array([3, 1])
    for kind in (worlds.Opaque, Interface) if place.on_gpu else (worlds.Opaque,):
        caches = [
            place.put(np.zeros((2, 4, HEADS, HEAD_SIZE)), place.sizes["dtype"]) for _ in range(2)
        ]
        rows = place.rows(5, 6)
        given = [kind(x) for x in (rows, rows, *caches, place.put(slots))]
        cc.reshape_and_cache_flash(*given)
        if place.on_gpu:
            with cuda.on_device(place.device):  # without a framework it is CuPy's current stream
                sys.modules["cupy"].cuda.runtime.deviceSynchronize()
        assert place.of_rows(caches[1]) == [0, 6, 0, 5, 0, 0, 0, 0]


class Interface:
    """An object that offers nothing but ``__cuda_array_interface__``."""

    def __init__(self, array):
        self.__cuda_array_interface__, self._array = array.__cuda_array_interface__, array


@way
def registered_operations(place):
    if place.framework != "torch":
        return
    import cupy_cache.integrations.torch_ops  # noqa: F401

    torch = sys.modules["torch"]
    operations = torch.ops.cupy_cache
    caches = [place.put(np.zeros((3, 4, HEADS, HEAD_SIZE)), place.sizes["dtype"]) for _ in "kv"]
    table, starts = place.numbers([2, 1]), place.numbers(0, 2)
    slots = operations.slot_mapping(table, place.put(np.array([0, 5])), starts, 4)
    operations.reshape_and_cache_flash(place.rows(0, 0), place.rows(8, 9), *caches, slots)
    operations.copy_blocks(caches[:1], caches[1:], torch.tensor([[2, 0]]))
    out = operations.paged_attention(place.rows(1), *caches, table[:, :1], place.numbers(1))
    assert place.of_rows(out) == [8]
    assert place.of_rows(caches[1]) == [8, 0, 0, 0, 0, 9, 0, 0, 8, 0, 0, 0]


@way
def graphs(place):
    if place.framework != "torch":
        return
    from cupy_cache.integrations.torch_graphs import StepGraphs

    tables = cc.BlockTables(
        BLOCKS, SIZE, max_sequences=4, max_tokens=32, max_length=32, **place.where
    )
    cache = cc.PagedKVCache.allocate(1, BLOCKS, SIZE, HEADS, HEAD_SIZE, **place.sizes)
    values = place.rows(1, 1)

    def decode(step):
        cache.write(0, values * 0, values, step.slot_mapping)
        return cache.attend(0, values, step.block_table, step.seq_lens), step.seq_lens * 2

    made = StepGraphs(decode, 2, [2])
    for name in "ab":
        tables.add(name)
    for number in range(1, 4):
        values.fill_(number)
        step = tables.step(["a", "b"], [1, 1])
        out, lengths = made(step)
        assert lengths.tolist() == [2 * number] * 2
    same, _ = made(tables.step(["a", "b"], [1, 1]))
    assert (same is out) == place.on_gpu and 2.1 < place.of_rows(same)[0] < 2.4  # (1+2+3+3) / 4


@way
def faults_and_warmup(place):
    cache = written(place)
    cc.raise_faults(place.device)
    rows = place.rows(1)
    for debug in (False, True):
        faults.debug = debug
        try:
            cache.write(0, rows, rows, place.put(np.array([99])))
            cc.raise_faults(place.device)
        except cc.FaultError as error:
            assert error.faults[0].value == 99
        else:
            raise AssertionError("the fault was not told")
        finally:
            faults.debug = False
    cc.raise_faults()
    if place.on_gpu:
        cc.warmup(2, 64, 16, "float16", device=place.device, ops=("zero_blocks",), progress=False)


@way
def launches_that_overlap(place):
    was = overlap.on
    cc.overlap()
    try:
        assert values_of(place, written(place), 0) == [1, 2, 3, 4]
    finally:
        cc.overlap(was)


def transformers(place):
    import transformers

    from cupy_cache.integrations import transformers as hf

    sizes = {"vocab_size": 8, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 8}  # fmt: skip
    config = transformers.LlamaConfig(**sizes)
    states = place.rows(1, 2, 3).transpose(0, 1)[None]
    for attends in (False, True):
        config._attn_implementation = "cupy_cache" if attends else "sdpa"
        cache = hf.PagedCache(config)
        for tokens in (slice(0, 2), slice(2, 3)):
            key, value = (states[:, :, tokens] for _ in "kv")
            key, value = cache.update(key * 0, value, 0)
            if attends:
                out, _ = hf.attention(
                    sys.modules["torch"].nn.Module(), states[:, :, tokens], key, value, None
                )
        assert place.of_rows(out if attends else value.transpose(1, 2)) == (
            [2] if attends else [1, 2, 3]
        )


def main(framework, device, active=lambda: False, ways=WAYS):
    """Call all. ``active()``: whether another GPU than theirs has a context."""
    place = Place(framework, device)
    runtime = cuda.import_cupy("a test").cuda.runtime if place.on_gpu else None
    for number, function in enumerate(ways * 2):
        failures, times = [], 2 if number < len(ways) else 1

        def work(times=times, function=function, failures=failures):
            try:
                if times == 1 and framework == "torch":
                    sys.modules["torch"].zeros(3, device=sys.modules["torch"].device(device)).sum()
                for _ in range(times):
                    function(place)
                    assert not active(), f"{function.__name__} left a context on another GPU"
                    if place.on_gpu and framework == "cupy":
                        assert runtime.getDevice() == 0, f"{function.__name__} changed the GPU"
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failures:
            raise AssertionError(function.__name__) from failures[0]


def has_context(index):
    """Whether this process has a context on GPU ``index``, by the driver's own account."""
    driver, device, flags, on = ctypes.CDLL("libcuda.so.1"), *(ctypes.c_int() for _ in range(3))
    assert driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0
    state = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(on))
    assert state == 0
    return bool(on.value)


def alone(name):
    """The test, in a process of its own, of arrays on cuda:1."""
    framework = "torch" if name == "transformers" else name
    __import__(framework)
    ways = [transformers] if name == "transformers" else WAYS
    main(framework, 1, lambda: has_context(0), ways)
    assert not has_context(0)
