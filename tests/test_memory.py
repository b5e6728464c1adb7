# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Memory that is not what it seems: arrays without any, with other bits than they say, with strides
that mean nothing, or pinned in pieces. All of it is refused by name, with nothing written, or taken
for what it is."""

import contextlib
import ctypes
import functools
import gc
import weakref

import numpy as np
import oracle
import pytest
from refusing import asleep, asleep_behind_others, learnt, refused, step

import cupy_cache as cc
from cupy_cache.compilation import specialisations
from cupy_cache.runtime import (
    allocations,
    arrays,
    devices,
    dispatch,
)

pytestmark = pytest.mark.usefixtures("nothing_remembered")


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


# --- after a signature is known, on the fast path -------------------------------------------------


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
