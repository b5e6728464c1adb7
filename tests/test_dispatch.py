# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What is sent to the driver where a signature of torch tensors comes again: the short way past the
plans must send what the long way sends, and refuse what it refuses."""

import gc
import weakref

import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.ops import reshape_and_cache_flash as flash
from cupy_cache.ops.shared import block_pairs, blocks
from cupy_cache.runtime import arrays, launch, modules, params, repeats, torch_tensors

torch = pytest.importorskip("torch")
KNOWN = 2  # calls after which a signature is known


class Recorder:
    """A driver that notes launches: (grid, threads, stream, bytes of the parameters)."""

    def __init__(self):
        self.launches = []

    def load(self, kernel, device, stream):
        del device, stream
        return kernel

    def launch(self, loaded, grid, threads, stream, record):
        self.launches.append((loaded.expression, grid, threads, stream, bytes(record.buffer)))

    def prepare(self, loaded, grid, threads):
        """Nothing quicker than `launch`."""
        del loaded, grid, threads
        return self.refuse, NotImplementedError

    def refuse(self, *arguments):
        raise NotImplementedError(arguments)

    def processors(self, device):
        del device
        return 132

    def take(self):
        taken, self.launches = self.launches, []
        return taken


@pytest.fixture(params=(KNOWN, KNOWN + repeats.USES), ids=("known", "quickest"))
def warm(request):
    """Calls after which the next one goes a short way, or the shortest."""
    return request.param


@pytest.fixture
def recorder(monkeypatch):
    """CPU tensors count as on a GPU, whose driver only notes what it is told."""
    describe, recorder = arrays.describe, Recorder()

    def on_gpu(facts, name):
        return describe(facts, name)._replace(device=arrays.Device("cuda", 0))

    monkeypatch.setattr(arrays, "describe", on_gpu)
    monkeypatch.setattr(arrays, "current_stream_of", lambda array: lambda: 77)
    monkeypatch.setattr(launch, "driver", recorder)
    # Plans made for this GPU must not outlive it.
    monkeypatch.setattr(flash.OP, "_plans", type(flash.OP._plans)())
    monkeypatch.setattr(flash.OP, "_repeats", {})
    monkeypatch.setattr(blocks, "_known_lists", {})
    cached = (
        launch.processors, cc.ops.copy_blocks._plan, cc.ops.copy_blocks._copier_of,
        cc.ops.swap_blocks._plan, blocks.current_stream_for, block_pairs._describe,
    )  # fmt: skip
    for function in cached:
        function.cache_clear()
    yield recorder
    for function in cached:
        function.cache_clear()


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
    return (*(t.data_ptr() for t in given), 0, 0, len(given[4]))


def long_way(recorder, call, monkeypatch):
    """What is sent where nothing is remembered."""
    with monkeypatch.context() as patch:
        patch.setattr(flash.OP, "_plans", type(flash.OP._plans)())
        patch.setattr(flash.OP, "_repeats", {})
        recorder.take()
        call()
        return recorder.take()


def test_other_tensors_of_a_known_signature(recorder, monkeypatch):
    made = [tensors(n) for n in (5, 5, 5, 7, 1, 300, 7)]
    for given in made:
        cc.reshape_and_cache_flash(*given)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(given)
        again = long_way(recorder, lambda g=given: cc.reshape_and_cache_flash(*g), monkeypatch)
        assert again == [sent]
    (known,) = flash.OP._repeats.values()
    assert len(known._known) == 1  # else this test has shown nothing


def test_the_quickest_way(recorder, monkeypatch):
    """Shapes that come again and again with other addresses and streams."""
    cases = (5, None), (7, None), (300, 6)
    for _ in range(KNOWN + repeats.USES + 2):
        for tokens, slots in cases:
            given = tensors(tokens, slots)
            stream = given[0].data_ptr() % 1000
            call = lambda g=given, s=stream: cc.reshape_and_cache_flash(*g, stream=s)  # noqa: E731
            call()
            (sent,) = recorder.take()
            assert fields(sent[-1]) == expected_fields(given) and sent[3] == stream
            assert long_way(recorder, call, monkeypatch) == [sent]
    (known,) = flash.OP._repeats.values()
    assert len(known.calls) == len(cases)


def test_more_shapes_than_have_calls_of_their_own(recorder, monkeypatch):
    """In turns, they do not push each other out all the time."""
    made, same_as = [], torch_tensors.same_as
    monkeypatch.setattr(torch_tensors, "same_as", lambda *a: made.append(a) or same_as(*a))
    given = [tensors(tokens) for tokens in range(1, repeats.MAX_CALLS + 3)]
    for _ in range(20):
        for case in given:
            cc.reshape_and_cache_flash(*case)
            (sent,) = recorder.take()
            assert fields(sent[-1]) == expected_fields(case)
    assert len(made) == 1 + len(given)  # the signature, and once each combination of extents


def test_numbers_of_a_call_that_came_again(recorder, monkeypatch):
    """They are no array's, and go to the kernel."""
    op = cc.ops.gather_and_maybe_dequant_cache.OP
    monkeypatch.setattr(op, "_plans", type(op._plans)())
    monkeypatch.setattr(op, "_repeats", {})
    src, table = torch.zeros((6, 4, 8), dtype=torch.float16), torch.zeros((2, 3), dtype=torch.int32)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    for tokens in (*[9] * (KNOWN + repeats.USES + 1), 4, 9, 9, 4):
        dst = torch.zeros((9, 8), dtype=torch.float16)
        cc.gather_and_maybe_dequant_cache(src, dst, table, bounds, None, tokens, "auto", None)
        (sent,) = recorder.take()
        count = len(op.args)
        words = np.frombuffer(sent[-1], np.int64)
        assert words[1] == dst.data_ptr() and words[count] == tokens
    (known,) = op._repeats.values()
    assert len(known.calls) == 2  # one for each number


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32}, {"heads": 4}, {"size": 16}, {"shift": 1}, {"slots": 3},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)  # fmt: skip
def test_another_signature_after_a_known_one(recorder, monkeypatch, other, warm):
    given, changed = tensors(), tensors(**other)
    for _ in range(warm):
        cc.reshape_and_cache_flash(*given)
    for _ in range(warm):
        recorder.take()
        cc.reshape_and_cache_flash(*changed)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(changed)
        call = lambda: cc.reshape_and_cache_flash(*changed)  # noqa: E731
        assert long_way(recorder, call, monkeypatch) == [sent]


def test_strides_of_a_known_shape(recorder, monkeypatch, warm):
    """The same shapes as a view of wider rows."""
    given = tensors()
    for _ in range(warm):
        cc.reshape_and_cache_flash(*given)
    wide = torch.zeros((5, 3, 16), dtype=torch.float16)
    for _ in range(warm):
        recorder.take()
        call = lambda: cc.reshape_and_cache_flash(wide[..., :8], *given[1:])  # noqa: E731
        call()
        (sent,) = recorder.take()
        assert long_way(recorder, call, monkeypatch) == [sent]


def test_what_is_refused_stays_refused(recorder, warm):
    given = tensors()
    for _ in range(warm):
        cc.reshape_and_cache_flash(*given)
    recorder.take()
    with pytest.raises(cc.ShapeError, match="slot_mapping"):
        cc.reshape_and_cache_flash(*given[:4], torch.arange(6))
    with pytest.raises(cc.DTypeError, match="slot_mapping"):
        cc.reshape_and_cache_flash(*given[:4], given[4].float())
    with pytest.raises(cc.ShapeError, match="value"):
        cc.reshape_and_cache_flash(given[0], given[1][..., :4], *given[2:])
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
    (known,) = flash.OP._repeats.values()
    assert len(known._known) == 1 and len(flash.OP._plans) == 1 and len(known.calls) == 1


def test_no_tokens_and_streams(recorder, warm):
    given = tensors()
    for _ in range(warm):
        cc.reshape_and_cache_flash(*given)
    recorder.take()
    cc.reshape_and_cache_flash(*given[:4], torch.arange(0))
    assert not recorder.take()
    cc.reshape_and_cache_flash(*given)
    cc.reshape_and_cache_flash(*given, stream=5)
    assert [sent[3] for sent in recorder.take()] == [77, 5]


def test_one_object_given_twice(recorder):
    """torch's comparison always refuses it: the long way every time."""
    key, _, *rest = tensors()
    for _ in range(KNOWN + repeats.USES + 1):
        cc.reshape_and_cache_flash(key, key, *rest)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields((key, key, *rest))


def test_more_signatures_than_are_known(recorder, monkeypatch):
    """Where many come in turns, few of them are learnt anew."""
    made, same_as = [], torch_tensors.same_as
    monkeypatch.setattr(torch_tensors, "same_as", lambda *a: made.append(a) or same_as(*a))
    signatures = [tensors(heads=n) for n in range(1, repeats.MAX_REPEATS + 3)]
    for _ in range(30):
        for given in signatures:
            cc.reshape_and_cache_flash(*given)
            (sent,) = recorder.take()
            assert fields(sent[-1]) == expected_fields(given)
    # Each known one, and a call of its own; then one for every MORE_USES others.
    assert len(made) <= 2 * repeats.MAX_REPEATS + 2 * 30 * len(signatures) / repeats.MORE_USES
    for _ in range(3 * repeats.MORE_USES):  # but what stays is learnt
        cc.reshape_and_cache_flash(*given)
    (known,) = flash.OP._repeats.values()
    assert known.calls[0](given, (), None)


def test_bound_to_its_caches(recorder):
    key, value, *caches, slots = tensors()
    cache = cc.PagedKVCache(*([c] for c in caches))
    for tokens in (5, 5, 5, 2, 5, 5, 2, 5):
        given = key[:tokens], value[:tokens], *caches, slots[:tokens]
        cache.write(0, *given[:2], given[-1])
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(given)


def test_bound_with_too_few_or_too_many(recorder, warm):
    key, value, *caches, slots = tensors()
    write = cc.PagedKVCache(*([c] for c in caches)).writer(0)
    for _ in range(warm):
        write(key, value, slots)
        recorder.take()
        for given in ((key, value), (key, value, slots, slots)):
            with pytest.raises(TypeError, match="expected key, value, slot_mapping, got "):
                write(*given)
        assert not recorder.take()


def test_without_the_comparison(recorder, monkeypatch, warm):
    """A torch that has none, or changed it."""
    monkeypatch.setattr(torch_tensors, "_tensor_guards", lambda: None)
    given = tensors()
    for _ in range(warm):
        cc.reshape_and_cache_flash(*given)
        (sent,) = recorder.take()
        assert fields(sent[-1]) == expected_fields(given)


def test_a_comparison_that_lies_is_not_used(monkeypatch):
    class Lies:
        def __init__(self, *tensors, **shapes):
            del tensors, shapes

        def check(self, *tensors):
            del tensors
            return True

    torch_tensors._tensor_guards.cache_clear()
    assert torch_tensors._tensor_guards() is not None  # else nothing here was tested
    torch_tensors._tensor_guards.cache_clear()
    monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Lies)
    assert torch_tensors._tensor_guards() is None
    torch_tensors._tensor_guards.cache_clear()


def test_more_than_one_launch_takes():
    """Kernels number the threads along x in 32 bits."""
    launcher = launch.Launcher(modules.Kernel("an_op", "stem", "k<1>", params.Struct("a:ptr")), 0)
    assert launcher.has_work((2**25 - 1, 65535, 1), 128)
    assert not launcher.has_work((0, 1, 1), 128)
    for grid, threads in (((2**25, 1, 1), 128), ((2**22, 1, 1), 1024), ((1, 65536, 1), 32)):
        with pytest.raises(cc.ShapeError, match="an_op: .* split the call"):
            launcher.has_work(grid, threads)


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


def test_views_of_the_same_memory(recorder):
    """One address, several layouts: each has its own plan."""
    flat = [torch.zeros(8 * 128, dtype=torch.float16) for _ in range(2)]
    sent = []
    for _ in range(2):
        for shape, strides in (((8, 64), (128, 1)), ((8, 128), (128, 1)), ((16, 64), (64, 1))):
            cc.copy_blocks_mla([t.as_strided(shape, strides) for t in flat], [(1, 3)])
            sent += recorder.take()
    assert sent[:3] == sent[3:] and len({record for *_, record in sent}) == 3


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
