# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import inspect

import attending
import numpy as np
import pytest
import worlds

import cupy_cache as cc

# Of vLLM 0.11.
V1 = (
    "out query key_cache value_cache num_kv_heads scale block_tables seq_lens block_size "
    "max_seq_len alibi_slopes kv_cache_dtype k_scale v_scale tp_rank blocksparse_local_blocks "
    "blocksparse_vert_stride blocksparse_block_size blocksparse_head_sliding_step"
).split()
V2 = [V1[0], "exp_sum", "max_logits", "tmp_out", *V1[1:]]
FUNCTIONS = {"paged_attention_v1": V1, "paged_attention_v2": V2}


def arguments(problem, world, **changes):
    """All that have no default, by name."""
    put = {
        "out": problem.out, "query": problem.query, "key_cache": problem.caches[0],
        "value_cache": problem.caches[1], "block_tables": problem.table, "seq_lens": problem.lens,
        "alibi_slopes": problem.slopes,
    }  # fmt: skip
    scales = {"k_scale": 1.0, "v_scale": 1.0, **problem.scales}
    scales = {n: world.put(s) if isinstance(s, worlds.Spec) else s for n, s in scales.items()}
    return {
        **{name: world.put(spec) for name, spec in put.items()}, **scales, "num_kv_heads": 2,
        "block_size": 16, "max_seq_len": 99, "exp_sum": None, "max_logits": None, "tmp_out": None,
        "scale": problem.options.get("scale", 32**-0.5),
        "kv_cache_dtype": problem.options.get("kv_cache_dtype", "auto"), **changes,
    }  # fmt: skip


def call(function, named):
    """By position, in vLLM's order."""
    names = FUNCTIONS[function]
    last = next((i for i, n in enumerate(names) if n not in named), len(names))
    return getattr(cc, function)(*(named[name] for name in names[:last]))


@pytest.mark.whole
@pytest.mark.parametrize("function", FUNCTIONS)
def test_names_and_order(function):
    parameters = dict(inspect.signature(getattr(cc, function)).parameters)
    assert parameters.pop("stream").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters) == FUNCTIONS[function]
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    assert defaults == [0, 0, 0, 64, 0]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "named",
    [
        {"layout": "x-packed"},
        {"layout": "x-packed", "slopes": True, "scale": 0.3},
        {"layout": "x-packed", "kv_cache_dtype": "fp8", "scales": "array"},
        {"layout": "NHD"},
        {"layout": "interleaved", "dtype": "float16"},
    ],
)
def test_attention(world, rng, function, named):
    problem = attending.Problem(rng, [40, 0, 1, 33], lse=None, **named)
    assert call(function, arguments(problem, world)) is None
    problem.judge(world)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"num_kv_heads": 4}, cc.ShapeError, ("num_kv_heads = 4", "got 2 and 16")),
        ({"block_size": 8}, cc.ShapeError, ("block_size = 8", "got 2 and 16")),
        ({"out": None}, cc.ArgumentError, ("out",)),
        ({"kv_cache_dtype": "fp9"}, cc.ArgumentError, ("kv_cache_dtype", "fp9")),
        ({"scale": float("nan")}, cc.ArgumentError, ("scale", "nan")),
        ({"num_kv_heads": 2.0}, cc.ArgumentError, ("num_kv_heads", "2.0")),
        ({"num_kv_heads": np.array([2, 2])}, cc.ArgumentError, ("num_kv_heads",)),
        ({"block_size": 16.0}, cc.ArgumentError, ("block_size", "16.0")),
        ({"block_tables": np.zeros(3, np.int32)}, cc.CupyCacheError, ("of block_tables",)),
    ],
)
def test_refusals(world, rng, function, changes, error, words):
    problem = attending.Problem(rng, [40], layout="x-packed", lse=None)
    with pytest.raises(error) as caught:
        call(function, arguments(problem, world, **changes))
    for word in (f"{function}: Invalid", *words):
        assert word in str(caught.value)
    np.testing.assert_array_equal(world.bytes_of(problem.out), problem.out.buffer.bytes)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "name, value", [*zip(V1[-4:], (1, 8, 32, -1)), (V1[-4], False), (V1[-2], 64.0)]
)
def test_sparse_attention_is_refused(rng, function, name, value):
    problem, world = attending.Problem(rng, [40], layout="x-packed", lse=None), worlds.NumPyWorld()
    named = arguments(problem, world, tp_rank=3)
    with pytest.raises(cc.ArgumentError, match=f"{function}: Invalid value of the blocksparse"):
        getattr(cc, function)(*(named[n] for n in FUNCTIONS[function][:-4]), **{name: value})
