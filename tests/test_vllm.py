# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The functions under vLLM 0.33's names, and vLLM calling them: a stand-in for its modules."""

import inspect
import sys
import types

import cases
import numpy as np
import oracle
import pytest
import recording
import worlds

import cupy_cache as cc
from cupy_cache.integrations import vllm as ops

# Facts: the arguments of vLLM 0.33.0's functions in vllm/_custom_ops.py.
SIGNATURES = {
    "reshape_and_cache": "key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, "
    "k_scale, v_scale, interleaved_v=False",
    "reshape_and_cache_flash": "key, value, key_cache, value_cache, slot_mapping, "
    "kv_cache_dtype, k_scale, v_scale",
    "concat_and_cache_mla": "kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, "
    "skip_scale=False",
    "concat_and_cache_mla_grouped": "kv_c, k_pe, kv_cache_ptrs, slot_mapping, block_size, "
    "block_stride, entry_stride, kv_scales=None, kv_cache_dtype='auto'",
    "concat_and_cache_mla_rope_fused": "positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, "
    "slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale",
    "swap_blocks": "src, dst, block_size_in_bytes, block_mapping",
    "swap_blocks_batch": "src_ptrs, dst_ptrs, sizes, is_src_access_order_any=False",
    "convert_fp8": "output, input, scale=1.0, kv_dtype='fp8'",
    "gather_and_maybe_dequant_cache": "src_cache, dst, block_table, cu_seq_lens, token_to_seq, "
    "num_tokens, kv_cache_dtype, scale, seq_starts=None",
    "cp_gather_cache": "src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts=None",
    "cp_gather_and_upconvert_fp8_kv_cache": "src_cache, dst, block_table, workspace_starts, "
    "batch_size, seq_starts=None, host_cache=None, host_row_ids=None, device_row_ids=None",
    "cp_gather_and_upconvert_nvfp4_kv_cache": "src_cache, dst, block_table, workspace_starts, "
    "batch_size",
    "indexer_k_quant_and_cache": "k, kv_cache, slot_mapping, quant_block_size, kv_cache_dtype",
    "cp_gather_indexer_k_quant_cache": "kv_cache, dst_k, dst_scale, block_table, cu_seq_lens",
    "merge_attn_states": "output, prefix_output, prefix_lse, suffix_output, suffix_lse, "
    "output_lse=None, prefill_tokens_with_context=None, output_scale=None",
    "rotary_embedding": "positions, query, key, head_size, cos_sin_cache, is_neox, "
    "rope_dim_offset=0, inverse=False",
}
SCALES = ("scale", "k_scale", "v_scale", "kv_cache_scale")


def function_of(text):
    """One with these arguments, which must not be called."""
    found = {}
    exec(f"def function({text}): raise AssertionError('vLLM was called')", found)
    return found["function"]


@pytest.fixture
def vllm(monkeypatch):
    """Stand-ins: ``_custom_ops``, and a backend that has imported some by name."""
    package, module, backend = (
        types.ModuleType(name) for name in ("vllm", "vllm._custom_ops", "vllm.v1.backend")
    )
    package.__path__, package._custom_ops = [], module
    for name, text in SIGNATURES.items():
        setattr(module, name, function_of(text))
    module.unrelated = function_of("")
    backend.reshape_and_cache_flash = module.reshape_and_cache_flash
    backend.convert = module.convert_fp8
    for one in (package, module, backend):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    monkeypatch.setitem(sys.modules, "vllm.absent", None)
    yield types.SimpleNamespace(ops=module, backend=backend)
    ops.uninstall()


def contents(vllm):
    return {**vars(vllm.ops)}, {**vars(vllm.backend)}


# --- names and arguments --------------------------------------------------------------------------


def test_every_function_is_there():
    assert set(SIGNATURES) == {*ops.ROUTED, *ops.NOT_ROUTED}
    others = {"NOT_ROUTED", "ROUTED", "install", "routed", "uninstall"}
    assert set(ops.__all__) == set(SIGNATURES) | others


@pytest.mark.whole
@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments(name):
    """By name and order; what may be left out there may be here, and means the same."""
    theirs = inspect.signature(function_of(SIGNATURES[name])).parameters
    ours = inspect.signature(getattr(ops, name)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for one in theirs.values():
        assert ours[one.name].kind == one.kind
        assert one.default in (one.empty, ours[one.name].default)
    for one in list(ours.values())[len(theirs) :]:
        assert one.kind is one.KEYWORD_ONLY and one.default is not one.empty


# `swap_blocks` below. The rest is refused, or needs what vLLM does not give.
SERVED = set(SIGNATURES) - {
    "concat_and_cache_mla_grouped", "cp_gather_and_upconvert_nvfp4_kv_cache", "swap_blocks",
}  # fmt: skip


class Called:
    """In the place of the package, for the common cases: calls go to vLLM's names, with all that
    vLLM gives, by position."""

    def __init__(self, vllm, world):
        self._vllm, self._world = vllm, world
        self.names = set()

    def __getattr__(self, name):
        signature = inspect.signature(function_of(SIGNATURES[name]))
        one = self._world.put(worlds.of_values(np.ones(1, np.float32)))

        def call(*args, **named):
            bound = signature.bind_partial(*args, **named)
            bound.apply_defaults()
            left_out = {"kv_cache_dtype": "auto", "is_neox": True, **dict.fromkeys(SCALES, one)}
            for parameter in left_out.keys() & signature.parameters.keys():
                if bound.arguments.get(parameter) is None:
                    bound.arguments[parameter] = left_out[parameter]
            self.names.add(name)
            getattr(self._vllm.ops, name)(*(bound.arguments[p] for p in signature.parameters))

        return call


def test_calls(world, rng, vllm, monkeypatch):
    """Every function, called as vLLM calls it, does what the one of its name here does."""
    called = Called(vllm, world)
    monkeypatch.setattr(cases, "cc", called)
    with ops.routed((*ops.ROUTED, "rotary_embedding")):
        for name, make in cases.CASES.items():
            if name.partition("-")[0] in SERVED:
                case = make(rng)
                case.call(world)
                case.check(world)
    assert called.names == SERVED


def test_swaps(world, rng):
    source, destination = (worlds.array(rng, (n, 16, 72), "bfloat16") for n in (6, 8))
    pairs = np.array([(5, 0), (0, 7)])
    expected = destination.buffer.bytes.copy()
    oracle.swap_blocks(source.on(source.buffer.bytes), destination.on(expected), pairs.tolist())
    size = 16 * 72 * 2
    ops.swap_blocks(world.put(source), world.put_on_host(destination), size, pairs)
    np.testing.assert_array_equal(world.bytes_of(destination), expected)


@pytest.mark.parametrize("count", [0, 2, 5, 9])
@pytest.mark.parametrize("with_lse", [True, False])
def test_tokens_without_context_take_the_suffix(rng, count, with_lse):
    rows = [rng.standard_normal((5, 3, 8)).astype(np.float32) for _ in range(2)]
    lses = [rng.standard_normal((3, 5)).astype(np.float32) for _ in range(2)]
    out, lse = np.full_like(rows[0], np.nan), np.full_like(lses[0], np.nan)
    expected, expected_lse = rows[1].copy(), lses[1].copy()
    oracle.merge_attn_states(
        expected[:count], rows[0], lses[0], rows[1], lses[1], expected_lse[:, :count]
    )
    ops.merge_attn_states(out, rows[0], lses[0], rows[1], lses[1], lse if with_lse else None, count)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-7)
    if with_lse:
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-7)


def merging(rng, out, lse, count, rows=5, columns=5, like=np.asarray):
    """A call of `merge_attn_states` with so many rows and columns of what is merged."""
    given = [rng.standard_normal((rows, 3, 8)).astype(np.float32) for _ in range(2)]
    lses = [rng.standard_normal((3, columns)).astype(np.float32) for _ in range(2)]
    prefix, suffix, *put = map(like, (*given, *lses))
    ops.merge_attn_states(out, prefix, put[0], suffix, put[1], lse, count)
    return given[1], lses[1]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_there_may_be_more_of_everything_but_of_the_output(rng, kind):
    out, lse = np.full((5, 3, 8), np.nan, np.float32), np.full((3, 7), 9, np.float32)
    like = np.asarray
    if kind == "torch":
        like = pytest.importorskip("torch").from_numpy
    suffix, suffix_lse = merging(rng, like(out), like(lse), 2, rows=8, columns=6, like=like)
    np.testing.assert_array_equal(out[2:], suffix[2:5])
    assert np.isfinite(out[:2]).all()
    np.testing.assert_array_equal(lse[:, 2:5], suffix_lse[:, 2:5])
    assert (lse[:, :2] != 9).all() and (lse[:, 5:] == 9).all()


def test_the_suffix_is_copied_on_the_arrays_gpu(rng, monkeypatch):
    """By CuPy, whichever GPU is current."""
    written = []

    class OnGPU(np.ndarray):
        def __setitem__(self, index, value):
            written.append(list(inside))
            self.view(np.ndarray)[index] = value

    inside = recording.as_cupys_on_gpu_1(monkeypatch, OnGPU)
    out, lse = (np.zeros(shape, np.float32).view(OnGPU) for shape in ((5, 3, 8), (3, 5)))
    merging(rng, out, lse, 2)
    assert written == [[1], [1]] and inside == []


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2, 5])
@pytest.mark.parametrize("rows, columns, width", [(4, 5, 5), (5, 4, 5), (5, 5, 4)])
def test_nothing_is_merged_where_the_suffix_is_too_short(rng, count, rows, columns, width):
    out, lse = np.full((5, 3, 8), 7, np.float32), np.full((3, width), 7, np.float32)
    with pytest.raises(cc.ShapeError, match="merge_attn_states: Invalid shape"):
        merging(rng, out, lse, count, rows, columns)
    assert (out == 7).all() and (lse == 7).all()


def test_nothing_is_merged_into_what_the_suffix_cannot_be_copied_to(rng):
    torch = pytest.importorskip("torch")
    out, lse = torch.full((5, 3, 8), 7.0), torch.full((3, 5), 7.0)
    with pytest.raises(cc.DTypeError, match="framework of suffix_output: expected torch"):
        merging(rng, out, lse, 2)
    assert (out == 7).all() and (lse == 7).all()


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("shared", ["output", "output_lse"])
def test_nothing_is_merged_into_memory_that_rows_share(rng, count, shared):
    torch = pytest.importorskip("torch")
    out, lse = torch.full((5, 3, 8), 7.0), torch.full((3, 5), 7.0)
    given = {
        "output": (torch.full((1, 3, 8), 7.0).expand(5, 3, 8), lse),
        "output_lse": (out, torch.full((3, 1), 7.0).expand(3, 5)),
    }[shared]
    with pytest.raises(cc.StrideError, match=f"merge_attn_states: Invalid strides of {shared}"):
        merging(rng, *given, count, like=torch.from_numpy)
    assert all((one == 7).all() for one in given)


@pytest.mark.parametrize("place, name", [(1, "prefix_output"), (2, "prefix_lse")])
@pytest.mark.parametrize("value", [3, "text", [1.0], memoryview(np.ones((5, 5))), None], ids=type)
def test_what_cannot_be_sliced_is_refused(rng, place, name, value):
    given = [np.zeros((5, 3, 8), np.float32), np.zeros((3, 5), np.float32)] * 2
    arguments = [np.zeros((5, 3, 8), np.float32), *given]
    arguments[place] = value
    with pytest.raises(cc.DTypeError, match=f"^merge_attn_states: Invalid type of {name}"):
        ops.merge_attn_states(*arguments, None, 2)


def test_the_suffix_is_copied_where_gradients_are_wanted(rng):
    """They are not given, as nowhere; what is merged is written, too."""
    torch = pytest.importorskip("torch")
    out = torch.full((5, 3, 8), np.nan).requires_grad_()
    suffix, _ = merging(rng, out, torch.zeros(3, 5), 2, like=torch.from_numpy)
    assert (out[2:] == torch.from_numpy(suffix[2:5])).all() and out[:2].isfinite().all()


def zeros(*shape, dtype=np.float16):
    return np.zeros(shape, dtype)


@pytest.mark.whole
@pytest.mark.parametrize("kv_cache_dtype", ["nvfp4", "nvfp4_4over6", "nvfp4_ds_mla"])
def test_nvfp4_is_refused(kv_cache_dtype):
    rows, one, slots = zeros(2, 1, 64), np.ones(1, np.float32), np.arange(2)
    cache = zeros(2, 4, 1, 36, dtype=np.uint8)
    calls = (
        lambda: ops.reshape_and_cache_flash(
            rows, rows, cache, cache, slots, kv_cache_dtype, one, one
        ),
        lambda: ops.concat_and_cache_mla(
            zeros(2, 512), zeros(2, 64), zeros(2, 4, 352, dtype=np.uint8), slots, kv_cache_dtype,
            one,
        ),
        lambda: ops.gather_and_maybe_dequant_cache(
            cache, rows, zeros(1, 1, dtype=np.int32), np.array([0, 2]), None, 2, kv_cache_dtype,
            one,
        ),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(cc.ArgumentError, match=f"kv_cache_dtype: .*{kv_cache_dtype}"):
            call()
    assert not cache.any()


@pytest.mark.whole
@pytest.mark.parametrize("name", ["host_cache", "host_row_ids", "device_row_ids"])
def test_rows_in_host_memory_are_refused(name):
    arguments = [None] * 5
    with pytest.raises(cc.ArgumentError, match=f"Invalid value of {name}: expected None"):
        ops.cp_gather_and_upconvert_fp8_kv_cache(*arguments, **{name: np.zeros(1)})


@pytest.mark.whole
def test_other_refusals():
    with pytest.raises(cc.ArgumentError, match="expected another format, .* nvfp4"):
        ops.cp_gather_and_upconvert_nvfp4_kv_cache(None, None, None, None, 1)
    with pytest.raises(cc.ArgumentError, match="Invalid value of output_scale"):
        ops.merge_attn_states(None, None, None, None, None, None, None, np.ones(1))
    with pytest.raises(cc.ArgumentError, match="of prefill_tokens_with_context: .* got -1"):
        ops.merge_attn_states(None, None, None, None, None, None, -1)
    addresses = np.zeros(2, np.int64)
    with pytest.raises(cc.ArgumentError, match="num_blocks"):
        ops.concat_and_cache_mla_grouped(
            zeros(2, 3, 8), zeros(2, 3, 4), addresses, np.zeros((2, 3), int), 4, 48, 12
        )


# --- routing --------------------------------------------------------------------------------------


def test_routing_is_undone(vllm):
    before = contents(vllm)
    with ops.routed() as names:
        assert names == ops.ROUTED
        for name in ops.ROUTED:
            assert getattr(vllm.ops, name) is getattr(ops, name)
        for name in (*ops.NOT_ROUTED, "unrelated"):
            assert getattr(vllm.ops, name) is before[0][name]
        assert vllm.backend.reshape_and_cache_flash is cc.reshape_and_cache_flash
        assert vllm.backend.convert is cc.convert_fp8
    assert contents(vllm) == before


def test_modules_that_are_imported_meanwhile(vllm, monkeypatch):
    original = vllm.ops.reshape_and_cache_flash
    ops.install()
    late = types.ModuleType("vllm.late")
    late.write = vllm.ops.reshape_and_cache_flash
    monkeypatch.setitem(sys.modules, "vllm.late", late)
    ops.uninstall()
    assert late.write is original
    ops.uninstall()  # does nothing


def test_routing_inside_routing(vllm):
    before = contents(vllm)
    assert ops.install("convert_fp8") == ("convert_fp8",)
    with pytest.raises(KeyError), ops.routed(["convert_fp8", "swap_blocks"]) as names:
        assert names == ("swap_blocks",)
        raise KeyError
    assert vllm.ops.swap_blocks is before[0]["swap_blocks"]
    assert vllm.ops.convert_fp8 is cc.convert_fp8
    ops.uninstall()
    assert contents(vllm) == before


@pytest.mark.whole
@pytest.mark.parametrize(
    "text, words",
    [
        ("key, value, caches, slot_mapping", "takes key, value, caches, slot_mapping here"),
        (SIGNATURES["reshape_and_cache_flash"] + ", out=None", "'reshape_and_cache_flash'"),
        (SIGNATURES["reshape_and_cache_flash"].replace("v_scale", "v_scale=1"), "v_scale"),
        ("key", "takes key here"),
        (None, "functions that this vLLM has"),
    ],
)
def test_another_vllm_is_refused(vllm, text, words):
    """And nothing is routed."""
    if text is None:
        del vllm.ops.reshape_and_cache_flash
    else:
        vllm.ops.reshape_and_cache_flash = function_of(text)
    before = contents(vllm)
    with pytest.raises(cc.ArgumentError, match="of names: expected") as caught:
        ops.install()
    assert words in str(caught.value)
    assert contents(vllm) == before


def test_names_that_are_none(vllm):
    before = contents(vllm)
    with pytest.raises(cc.ArgumentError, match="expected some of .*got 'unrelated'"):
        ops.install(["convert_fp8", "unrelated"])
    assert contents(vllm) == before


@pytest.mark.parametrize("name, words", [
    ("copy_blocks", "cupy_cache.copy_blocks is it"), ("rms_norm", "from vllm._custom_ops"),
])  # fmt: skip
def test_names_that_are_elsewhere(name, words):
    with pytest.raises(AttributeError, match=words):
        getattr(ops, name)
    assert not hasattr(ops, "__wrapped__")


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(cc.MissingDependencyError, match="pip install vllm==0.33.0"):
        ops.install()
