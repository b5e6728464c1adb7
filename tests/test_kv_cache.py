# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import functools

import attending
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc

BLOCKS, BLOCK_SIZE, HEADS, SIZE = 7, 4, 3, 8


def write_case(rng, kind, dtype="float32"):
    """(key, value, slots) views of one step."""
    tokens = int(rng.integers(1, 9))
    if kind == "rows":
        rows = [worlds.of_values(rng.standard_normal((tokens, n)).astype(dtype)) for n in (16, 8)]
    else:
        rows = [
            worlds.of_values(rng.standard_normal((tokens, HEADS, SIZE)).astype(dtype))
            for _ in range(2)
        ]
    slots = rng.permutation(BLOCKS * BLOCK_SIZE)[:tokens].astype(np.int64)
    slots[rng.random(tokens) < 0.2] = -1
    return *rows, worlds.of_values(slots)


def caches(rng, kind, dtype, count=3):
    shape = {
        "flash": [(BLOCKS, BLOCK_SIZE, HEADS, SIZE)] * 2,
        "x-packed": [(BLOCKS, HEADS, SIZE // 4, BLOCK_SIZE, 4), (BLOCKS, HEADS, SIZE, BLOCK_SIZE)],
        "interleaved": [(BLOCKS, HEADS, SIZE // 4, BLOCK_SIZE, 4), (BLOCKS, HEADS, 1, SIZE, 4)],
        "rows": [(BLOCKS, BLOCK_SIZE, 24)],
    }[kind]
    return [[worlds.array(rng, s, dtype) for _ in range(count)] for s in shape]


def put(world, lists):
    return [[world.put(spec) for spec in specs] for specs in lists]


def expected_write(kind, storage, lists, layer, key, value, slots, scales):
    """The oracle's write into copies of the caches' bytes."""
    views = [specs[layer].on(storage[id(specs[layer].buffer)]) for specs in lists]
    rows = [spec.on(spec.buffer.bytes) for spec in (key, value, slots)]
    if kind == "rows":
        oracle.concat_and_cache_mla(rows[0], rows[1], views[0], rows[2])
    elif kind in ("x-packed", "interleaved"):
        oracle.reshape_and_cache(*rows[:2], *views, rows[2])
    else:
        oracle.reshape_and_cache_flash(*rows[:2], *views, rows[2], *scales)


@pytest.mark.parametrize("kind", ["flash", "x-packed", "interleaved", "rows"])
@pytest.mark.parametrize("through", ["write", "writer"])
def test_writes_again_and_again(world, rng, kind, through):
    """Steps of different length in every layer: the same signature comes again."""
    lists = caches(rng, kind, "float32")
    cache = cc.PagedKVCache(*put(world, lists))
    assert len(cache) == 3
    storage = {id(s.buffer): s.buffer.bytes.copy() for specs in lists for s in specs}
    for _ in range(4):
        for layer in range(3):
            case = write_case(rng, kind)
            given = [world.put(spec) for spec in case]
            if through == "write":
                cache.write(layer, *given)
            else:
                cache.writer(layer)(*given)
            expected_write(kind, storage, lists, layer, *case, ())
    for specs in lists:
        for spec in specs:
            np.testing.assert_array_equal(world.bytes_of(spec), storage[id(spec.buffer)])


@pytest.mark.parametrize("k_scale", [None, 2.0])
def test_an_array_for_the_values_alone(world, rng, k_scale):
    lists = caches(rng, "flash", "uint8", 1)
    expected = {id(specs[0].buffer): specs[0].buffer.bytes.copy() for specs in lists}
    scale = worlds.of_values(np.array([0.5], np.float32))
    cache = cc.PagedKVCache(
        *put(world, lists), kv_cache_dtype="fp8", k_scales=k_scale, v_scales=world.put(scale)
    )
    for _ in range(6):
        case = write_case(rng, "flash")
        cache.write(0, *(world.put(spec) for spec in case))
        expected_write("flash", expected, lists, 0, *case, (k_scale or 1.0, 0.5, "float8_e4m3fn"))
    for specs in lists:
        np.testing.assert_array_equal(world.bytes_of(specs[0]), expected[id(specs[0].buffer)])


@pytest.mark.parametrize("scales", ["numbers", "arrays", "lists", "one-array"])
def test_scales_of_each_layer(world, rng, scales):
    """What each layer's own call writes."""
    lists = caches(rng, "flash", "uint8", 2)
    numbers = [[float(n) for n in rng.uniform(0.5, 4, 2)] for _ in range(2)]
    if scales in ("numbers", "one-array"):
        numbers = [[n[0], n[0]] for n in numbers]

    def as_given(side):
        values = [worlds.of_values(np.array([n], np.float32)) for n in numbers[side]]
        if scales == "numbers":
            return numbers[side][0]
        if scales == "one-array":
            return world.put(values[0])
        return [world.put(v) for v in values] if scales == "arrays" else numbers[side]

    cache = cc.PagedKVCache(
        *put(world, lists), kv_cache_dtype="fp8", k_scales=as_given(0), v_scales=as_given(1)
    )
    other = [[worlds.Buffer(s.buffer.bytes.size, rng).view(s.shape, s.dtype) for s in specs]
             for specs in lists]  # fmt: skip
    for specs, copies in zip(lists, other):
        for spec, copy in zip(specs, copies):
            copy.buffer.bytes[:] = spec.buffer.bytes
    for layer in range(2):
        for _ in range(3):
            case = [world.put(spec) for spec in write_case(rng, "flash")]
            cache.write(layer, *case)
            k_scale, v_scale = (numbers[side][layer] for side in range(2))
            cc.reshape_and_cache_flash(
                *case[:2], *(world.put(copies[layer]) for copies in other), case[2], "fp8",
                np.float32(k_scale).item(), np.float32(v_scale).item(),
            )  # fmt: skip
    for specs, copies in zip(lists, other):
        for spec, copy in zip(specs, copies):
            np.testing.assert_array_equal(world.bytes_of(spec), world.bytes_of(copy))


@pytest.mark.parametrize("kind", ["flash", "x-packed", "rows"])
@pytest.mark.parametrize("where", ["list", "host", "device-int64"])
def test_copies_again_and_again(world, rng, kind, where):
    lists = caches(rng, kind, "float16")
    cache = cc.PagedKVCache(*put(world, lists))
    expected = {id(s.buffer): s.buffer.bytes.copy() for specs in lists for s in specs}
    for count in (2, 1, 3, 0):
        numbers = rng.permutation(BLOCKS)
        pairs = np.stack([numbers[:count], numbers[count : 2 * count]], 1).astype(np.int64)
        if where == "list":
            mapping = [tuple(map(int, pair)) for pair in pairs]
        else:
            mapping = pairs if where == "host" else world.put(worlds.of_values(pairs))
        cache.copy_blocks(mapping)
        oracle.copy_blocks([s.on(expected[id(s.buffer)]) for specs in lists for s in specs], pairs)
    for specs in lists:
        for spec in specs:
            np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])


@pytest.mark.parametrize("kind", ["flash", "rows"])
def test_swaps_with_another(world, rng, kind):
    gpu, host = caches(rng, kind, "float16"), caches(rng, kind, "float16")
    here = cc.PagedKVCache(*put(world, gpu))
    there = cc.PagedKVCache(*[[world.put_on_host(s) for s in specs] for specs in host])
    out, back = [(1, 5), (2, 0)], [(5, 3)]
    here.swap_blocks(there, out)
    world.synchronize()
    there.swap_blocks(here, back)
    for specs, others in zip(gpu, host):
        for spec, other in zip(specs, others):
            first, second = (s.on(s.buffer.bytes.copy()) for s in (spec, other))
            first, second = first.copy(), second.copy()
            for i, j in out:
                second[j] = first[i]
            for i, j in back:
                first[j] = second[i]
            np.testing.assert_array_equal(
                world.bytes_of(spec), np.ascontiguousarray(first).view(np.uint8).reshape(-1)
            )


def test_swaps_refused_for_the_keys_alone_write_no_values(world, rng):
    """Two that share key caches, in which blocks may not be both source and destination."""
    (keys, values), (others,) = caches(rng, "flash", "float16"), caches(rng, "flash", "float16")[1:]
    shared, *values_put = put(world, [keys, values, others])
    here, there = (cc.PagedKVCache(shared, held) for held in values_put)
    with pytest.raises(cc.ArgumentError, match="got block 2 as both"):
        here.swap_blocks(there, [(1, 2), (2, 3)])
    for spec in (*keys, *values, *others):
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    here.swap_blocks(there, [(1, 2), (0, 3)])
    for held, source in (*zip(keys, keys), *zip(others, values)):
        expected = held.on(held.buffer.bytes.copy())
        read = source.on(source.buffer.bytes)
        expected[2], expected[3] = read[1], read[0]
        np.testing.assert_array_equal(held.on(world.bytes_of(held)), expected)


def test_refusals(world, rng):
    keys, values = caches(rng, "flash", "float32")
    with pytest.raises(cc.ShapeError, match="value_caches"):
        cc.PagedKVCache(*put(world, [keys, values[:2]]))
    with pytest.raises(cc.ArgumentError, match="k_scales"):
        cc.PagedKVCache(*put(world, [keys, values]), k_scales=[1.0, 2.0])
    with pytest.raises(cc.DTypeError, match="key_caches"):
        cc.PagedKVCache(world.put(keys[0]), world.put(values[0]))
    with pytest.raises(cc.ArgumentError, match="v_scales"):
        cc.PagedKVCache([world.put(keys[0])], v_scales=2.0)
    odd = [*keys[:2], worlds.array(rng, (BLOCKS, BLOCK_SIZE, HEADS, SIZE + 1), "float32")]
    with pytest.raises(cc.ShapeError, match=r"key_caches\[2\]"):
        cc.PagedKVCache(*put(world, [odd, values]))
    cache = cc.PagedKVCache(*put(world, [keys, values]))
    key, value, slots = (world.put(spec) for spec in write_case(rng, "flash"))
    for _ in range(3):
        cache.write(0, key, value, slots)
    written = [world.bytes_of(s) for s in (*keys, *values)]
    wrong = world.put(worlds.array(rng, (9, HEADS, SIZE + 1), "float32"))
    with pytest.raises(cc.ShapeError, match="value"):
        cache.write(0, key, wrong, slots)
    many = world.put(worlds.of_values(np.zeros(10, np.int64)))
    with pytest.raises(cc.ShapeError, match="slot_mapping"):
        cache.write(0, key, value, many)
    with pytest.raises(cc.ArgumentError, match="block_mapping"):
        cache.copy_blocks([(0, BLOCKS)])
    for spec, before in zip((*keys, *values), written):
        np.testing.assert_array_equal(world.bytes_of(spec), before)


# --- rotary ---------------------------------------------------------------------------------------


def rotary_case(rng, kind, tokens=5):
    """Positions, queries, keys, values, a table and slots, as specs."""
    shapes = [(tokens, 6, SIZE), (tokens, HEADS, SIZE), (tokens, HEADS, SIZE)]
    if kind == "rows":
        shapes = [(tokens, 6, 8), (tokens, 8), (tokens, 16)]
    rows = [worlds.of_values(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    return (
        worlds.of_values(rng.integers(0, 9, tokens)), *rows,
        worlds.of_values(rng.standard_normal((9, 8)).astype(np.float32)),
        worlds.of_values(rng.permutation(BLOCKS * BLOCK_SIZE)[:tokens]),
    )  # fmt: skip


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("stored", ["float32", "fp8"])
@pytest.mark.parametrize("kind", ["flash", "x-packed", "interleaved", "rows"])
def test_rotary_writes(world, rng, kind, stored, is_neox):
    """What the functions do, which have tests of their own, in every layer and again and again."""
    dtype = "uint8" if stored == "fp8" else "float32"
    lists = caches(rng, kind, dtype)
    named = {"kv_cache_dtype": stored, "k_scales": [0.25, 0.5, 2.0]}
    if kind != "rows":
        named["v_scales"] = 0.125
    cache = cc.PagedKVCache(*put(world, lists), **named)
    plain = worlds.NumPyWorld()
    for layer in (0, 2, 1) * 2:
        case = rotary_case(rng, kind)
        cache.rotary_write(layer, *map(world.put, case), is_neox)
        positions, query, key, value, table, slots = map(plain.put, case)
        step = [plain.put(specs[layer]) for specs in lists]
        if kind == "rows":
            cc.concat_and_cache_mla_rope_fused(
                positions, query, key, value, table, is_neox, slots, *step, stored,
                named["k_scales"][layer],
            )  # fmt: skip
        else:
            cc.rotary_and_cache(
                positions, query, key, value, table, *step, slots, is_neox, stored,
                named["k_scales"][layer], 0.125,
            )  # fmt: skip
        for spec in case:
            np.testing.assert_array_equal(world.bytes_of(spec), plain.bytes_of(spec))
    for spec in (s for specs in lists for s in specs):
        np.testing.assert_array_equal(world.bytes_of(spec), plain.bytes_of(spec))


def test_rotary_writes_to_out(world, rng):
    lists, case = caches(rng, "flash", "float32"), rotary_case(rng, "flash")
    cache = cc.PagedKVCache(*put(world, lists))
    out = worlds.array(rng, (5, 6, SIZE), "uint8")
    named = {"norm_eps": 1e-5, "rope_dim_offset": 0, "out_dtype": "fp8", "q_scale": 0.125}
    cache.rotary_write(1, *map(world.put, case), out=world.put(out), **named)
    assert not np.array_equal(world.bytes_of(out), out.buffer.bytes)
    np.testing.assert_array_equal(world.bytes_of(case[1]), case[1].buffer.bytes)


def test_rotary_writes_with_scales_that_are_gone(rng):
    """A number that is no float may have the identity of an earlier one."""
    world, case = worlds.NumPyWorld(), rotary_case(rng, "flash")
    lists, out = caches(rng, "flash", "float32"), np.empty((5, 6, SIZE), np.uint8)
    cache = cc.PagedKVCache(*put(world, lists))
    step, wanted = list(map(world.put, case)), np.empty_like(out)
    for turn in range(40):
        scale = 2.0 ** (turn % 7 - 3)
        cache.rotary_write(1, *step, out=out, out_dtype="fp8", q_scale=np.float32(scale))
        cc.rotary_and_cache(
            *step[:5], *(side[1] for side in put(world, lists)), step[5], out=wanted,
            out_dtype="fp8", q_scale=scale,
        )  # fmt: skip
        np.testing.assert_array_equal(out, wanted)


class Number:
    """An integer that changes."""

    value = 0

    def __index__(self):
        return self.value


@pytest.mark.parametrize(
    "option, values",
    [("is_neox", (1, 0)), ("rope_dim_offset", (0, 2)), ("mrope_interleaved", (0, 1))],
)
def test_options_of_rotary_writes_that_change(rng, option, values):
    """What is remembered is what an option was, not the object that says it. (Flags are no objects
    that change.)"""
    world, case = worlds.NumPyWorld(), rotary_case(rng, "flash")
    lists, number = caches(rng, "flash", "float32"), Number()
    cache = cc.PagedKVCache(*put(world, lists))
    step = list(map(world.put, case))
    step[0] = np.stack([step[0], (step[0] + 1) % 9, (step[0] + 2) % 9])
    step[4] = step[4][:, :4]
    for value in values * 2:
        number.value = value
        given = {option: number if option == "rope_dim_offset" else np.bool_(value)}
        queries = [case[1].on(case[1].buffer.bytes).copy() for _ in range(2)]
        named = {"mrope_section": (1, 1, 0)}
        cache.rotary_write(1, step[0], queries[0], *step[2:], **named, **given)
        cc.rotary_and_cache(
            step[0], queries[1], *step[2:5], *(side[1] for side in put(world, lists)), step[5],
            **named, **{option: value},
        )  # fmt: skip
        np.testing.assert_array_equal(*queries)


@pytest.mark.parametrize("bad", [(True, 2, 1), (1.0, 2, 1), (1, 2, 1.0), {0, 1, 3}])
def test_sections_that_equal_known_ones(rng, bad):
    cache = cc.PagedKVCache(*put(worlds.NumPyWorld(), caches(rng, "flash", "float32")))
    step = [spec.on(spec.buffer.bytes) for spec in rotary_case(rng, "flash")]
    step[0] = np.stack([step[0]] * 3)
    cache.rotary_write(1, *step, mrope_section=(1, 2, 1))
    with pytest.raises(cc.ArgumentError, match=r"PagedKVCache.rotary_write: .* of mrope_section"):
        cache.rotary_write(1, *step, mrope_section=bad)


@pytest.mark.parametrize("option", ["norm_eps", "norm_weight_bias", "q_scale"])
def test_options_that_equal_known_ones(rng, option):
    """True equals 1, and is no number."""
    cache = cc.PagedKVCache(*put(worlds.NumPyWorld(), caches(rng, "flash", "float32")))
    step = [spec.on(spec.buffer.bytes) for spec in rotary_case(rng, "flash")]
    named = {"norm_eps": 1, "out_dtype": "int8", "out": np.zeros(step[1].shape, np.int8)}
    for number in (1, 1.0):
        cache.rotary_write(1, *step, **named | {option: number})
    with pytest.raises(cc.ArgumentError, match=rf"PagedKVCache.rotary_write: .* of {option}"):
        cache.rotary_write(1, *step, **named | {option: True})


@pytest.mark.parametrize("biases", [(0.0, -0.0), (-0.0, 0.0)])
def test_a_bias_that_equals_a_known_one(rng, biases):
    """Of weights that are -0.0 the sign of a bias of 0 could be told."""
    cache = cc.PagedKVCache(*put(worlds.NumPyWorld(), caches(rng, "flash", "float32")))
    step = [spec.on(spec.buffer.bytes) for spec in rotary_case(rng, "flash")]
    size = step[1].shape[2]
    named = {"norm_eps": 1.0, "q_norm_weight": np.full(size, -0.0, np.float32)}
    written = []
    for bias in biases:
        query = step[1].copy()
        cache.rotary_write(1, step[0], query, *step[2:], norm_weight_bias=bias, **named)
        written.append(query.tobytes())
    cc.rotary_and_cache(
        *step[:5], cache.key_caches[1], cache.value_caches[1], step[5], norm_weight_bias=0.0,
        **named,
    )  # fmt: skip
    assert written == [step[1].tobytes()] * 2


def moved(tensor, values, how):
    """Have a tensor of torch hold these values, in other memory."""
    if how == "data":
        tensor.data = values
    elif how == "set":
        tensor.set_(values)
    else:  # its memory is given up, and that of a larger one taken
        tensor.resize_(0)
        tensor.untyped_storage().resize_(0)
        tensor.resize_(values.shape).copy_(values)


@pytest.mark.parametrize("how", ["data", "set", "resize"])
def test_arrays_that_are_kept_and_moved(rng, how):
    """Weights, sinks and scales of torch are the same objects after `.to()` of their module."""
    torch = pytest.importorskip("torch")
    world, case = worlds.TorchWorld(), rotary_case(rng, "flash")
    lists = caches(rng, "flash", "float32")
    cache = cc.PagedKVCache(*put(world, lists))
    step = list(map(world.put, case))
    table, lens = torch.tensor([[0], [1]]), torch.tensor([3, 4])
    weight, scale, sinks = torch.ones(SIZE), torch.ones(1), torch.zeros(6)
    query = torch.from_numpy(rng.standard_normal((2, 6, SIZE)).astype(np.float32))
    out, wanted = (torch.empty((5, 6, SIZE), dtype=torch.uint8) for _ in range(2))
    layer = [side[1].zero_() for side in put(world, lists)]
    kept = []
    for number in range(1, 4):
        named = {"norm_eps": 1e-5, "q_norm_weight": weight, "q_scale": scale, "out_dtype": "fp8"}
        cache.rotary_write(1, *step, out=out, **named)
        cc.rotary_and_cache(*step[:5], *layer, step[5], out=wanted, **named)
        assert torch.equal(out, wanted)
        attended = cache.attend(1, query, table, lens, sinks=sinks)
        assert torch.equal(attended, cc.paged_attention(query, *layer, table, lens, sinks=sinks))
        for tensor in (weight, scale, sinks):
            moved(tensor, torch.full(tensor.shape, 2.0**number), how)
            kept.append(torch.full(tensor.shape, -5.0))  # where it was, perhaps


def test_refusals_of_rotary_writes(rng):
    pair = cc.PagedKVCache(*put(worlds.NumPyWorld(), caches(rng, "flash", "float32")))
    rows = cc.PagedKVCache(*put(worlds.NumPyWorld(), caches(rng, "rows", "float32")))
    name = r"PagedKVCache\.rotary_write: Invalid "
    for cache, kind in ((pair, "flash"), (rows, "rows")):
        step = [spec.on(spec.buffer.bytes) for spec in rotary_case(rng, kind)]
        cache.rotary_write(1, *step)
        for layer in (-1, 3, 1.5, None, [0], True, 1.0):
            with pytest.raises(cc.ArgumentError, match=f"{name}.* of layer"):
                cache.rotary_write(layer, *step)
        with pytest.raises(cc.ShapeError, match=f"{name}shape of query"):
            cache.rotary_write(0, step[0], step[1][:2], *step[2:])
    for option, value in (
        ("out", step[1]), ("rope_dim_offset", 2), ("norm_eps", 1e-6), ("rounding", "steps"),
        ("norm_weight_bias", 1.0), ("mrope_interleaved", True), ("q_norm_weight", step[1]),
        ("norm_weight_bias", step[1]), ("out_dtype", step[1]), ("rounding", step[1]),
    ):  # fmt: skip
        with pytest.raises(cc.ArgumentError, match=f"{name}value of {option}"):
            rows.rotary_write(0, *step, **{option: value})


def test_no_layers(world):
    del world
    cache = cc.PagedKVCache([], [])
    cache.copy_blocks([(0, 1)])
    assert len(cache) == 0


# --- attention ------------------------------------------------------------------------------------


def attending_to(world, cache, layer, problem):
    """A call that does what `attending.Problem.run` does, with the caches of a `PagedKVCache`."""
    step = [world.put(spec) for spec in (problem.query, problem.table, problem.lens)]
    named = {
        "query_start_loc": problem.starts, "alibi_slopes": problem.slopes, "sinks": problem.sinks,
        "out": problem.out, "lse": problem.lse,
    }  # fmt: skip
    named = {name: world.put(spec) for name, spec in named.items()}
    named |= {name: v for name, v in problem.options.items() if name != "kv_cache_dtype"}
    return functools.partial(cache.attend, layer, *step, **named)


@pytest.mark.parametrize(
    "named",
    [
        {},
        {"queries": [2, 0, 3], "lse": None},
        {"layout": "x-packed", "slopes": True, "sinks": "float32"},
        {"kv_cache_dtype": "fp8", "scales": "number", "sliding_window": 3, "causal": False},
        {"kv_cache_dtype": "int8", "scales": "heads", "soft_cap": 3.0, "scale": 0.5},
        {"queries": [1, 1, 1], "slopes": True, "layout": "HND"},
        {"slopes": "sequences"},
    ],
)
def test_attention_again_and_again(world, rng, named):
    named = {"width": 2, "storage": "uint8" if "kv_cache_dtype" in named else None} | named
    problems = [attending.Problem(rng, [20, 3, 9], **named) for _ in range(2)]
    scales = [
        [s and world.put(s) if isinstance(s, worlds.Spec) else s for s in values] or None
        for values in zip(*(problem.scales.values() for problem in problems))
    ]
    cache = cc.PagedKVCache(
        *([world.put(p.caches[side]) for p in problems] for side in (0, 1)),
        named.get("kv_cache_dtype", "auto"), *scales,
    )  # fmt: skip
    calls = [attending_to(world, cache, *numbered) for numbered in enumerate(problems)]
    for _ in range(3):
        for call, problem in zip(calls, problems):
            assert call() is call.keywords["out"]
            problem.judge(world)
    assert len(cache._bound) == 2


def test_new_result_of_attention(world, rng):
    problem = attending.Problem(rng, [20, 3, 9], dtype="float16", lse=None)
    cache = cc.PagedKVCache(*([world.put(cache)] for cache in problem.caches))
    step = [world.put(spec) for spec in (problem.query, problem.table, problem.lens)]
    made = world.numpy(cache.attend(0, *step))
    problem.run(world)
    np.testing.assert_array_equal(made, problem.out.on(world.bytes_of(problem.out))[:3])


def test_attention_is_remembered_by_its_options_and_within_bounds(rng):
    world, problem = worlds.NumPyWorld(), attending.Problem(rng, [9])
    cache = cc.PagedKVCache(*([world.put(cache)] for cache in problem.caches))
    step = [world.put(spec) for spec in (problem.query, problem.table, problem.lens)]
    cache.attend(0, *step, scale=1, sliding_window=1)
    for name in ("scale", "sliding_window"):
        with pytest.raises(cc.ArgumentError, match=f"PagedKVCache.attend: Invalid value of {name}"):
            cache.attend(0, *step, **{"scale": 1, "sliding_window": 1, name: True})
    for number in range(50):
        sinks = np.full(4, number, np.float32)
        wanted = cc.paged_attention(
            step[0], *map(world.put, problem.caches), *step[1:], sinks=sinks
        )
        np.testing.assert_array_equal(cache.attend(0, *step, sinks=sinks), wanted)
    assert len(cache._bound) <= 16


@pytest.mark.parametrize("layer", [-1, 1, 1.5, None, [0], 2**70])
def test_attention_of_a_layer_that_is_not_there(rng, layer):
    world, problem = worlds.NumPyWorld(), attending.Problem(rng, [9])
    cache = cc.PagedKVCache(*([world.put(cache)] for cache in problem.caches))
    for _ in range(2):
        with pytest.raises(cc.ArgumentError, match=r"PagedKVCache\.attend: .* of layer: expected"):
            attending_to(world, cache, layer, problem)()


def test_a_window_that_changes(rng):
    world, problem, window = worlds.NumPyWorld(), attending.Problem(rng, [9]), Number()
    pair = [world.put(cache) for cache in problem.caches]
    cache = cc.PagedKVCache(*([side] for side in pair))
    query, *step = (world.put(spec) for spec in (problem.query, problem.table, problem.lens))
    for window.value in (1, 4, 1, 2):
        found = cache.attend(0, query, *step, sliding_window=window)
        wanted = cc.paged_attention(query, *pair, *step, sliding_window=window.value)
        np.testing.assert_array_equal(found, wanted)


def test_options_of_attention_that_cannot_be_hashed(rng):
    world, problem = worlds.NumPyWorld(), attending.Problem(rng, [9], sliding_window=3)
    cache = cc.PagedKVCache(*([world.put(cache)] for cache in problem.caches))
    call = attending_to(world, cache, 0, problem)
    call(sliding_window=np.array(3))
    problem.judge(world)
    for name in ("scale", "soft_cap", "sliding_window"):
        with pytest.raises(cc.ArgumentError, match=rf"PagedKVCache\.attend: .* of {name}"):
            call(**{name: [3]})


@pytest.mark.parametrize("value", [[1.0, 2.0], "sinks", np.ones(4, ">f4")], ids=type)
def test_arrays_of_attention_that_are_none(rng, value):
    """What is kept is refused under the name of what was called, as all else is."""
    world, problem = worlds.NumPyWorld(), attending.Problem(rng, [9])
    cache = cc.PagedKVCache(*([world.put(cache)] for cache in problem.caches))
    for name in ("sinks", "alibi_slopes"):
        with pytest.raises(cc.DTypeError, match=rf"^PagedKVCache\.attend: .* of {name}: expected"):
            attending_to(world, cache, 0, problem)(**{name: value})


@pytest.mark.parametrize("name", ["query", "block_table", "seq_lens"])
def test_attention_needs_all_that_is_no_option(rng, name):
    world, problem = worlds.NumPyWorld(), attending.Problem(rng, [9])
    cache = cc.PagedKVCache(*([world.put(cache)] for cache in problem.caches))
    step = {"query": problem.query, "block_table": problem.table, "seq_lens": problem.lens}
    step = {n: None if n == name else world.put(spec) for n, spec in step.items()}
    for out in (None, world.put(problem.out)):
        with pytest.raises(cc.DTypeError, match=rf"^PagedKVCache\.attend: Invalid type of {name}"):
            cache.attend(0, **step, out=out)


def test_attention_needs_values(world, rng):
    cache = cc.PagedKVCache(*put(world, caches(rng, "rows", "float32")))
    problem = attending.Problem(rng, [9])
    with pytest.raises(cc.ArgumentError, match="expected key and value caches"):
        attending_to(world, cache, 0, problem)()


class OfCache(attending.Latent):
    """The same problem for a `PagedKVCache`."""

    op = "PagedKVCache.attend_mla"

    def run(self, world, layer=0, **changes):
        named = {"query_start_loc": self.starts, "out": self.out, "lse": self.lse, **self.options}
        put = {n: world.put(v) if isinstance(v, worlds.Spec) else v for n, v in named.items()}
        scale, *step = (
            None if spec is None else spec if isinstance(spec, float) else world.put(spec)
            for spec in (self.scales.get("kv_scale"), self.query, self.table, self.lens)
        )
        stored = put.pop("kv_cache_dtype", "auto")
        cache = cc.PagedKVCache([world.put(self.caches[0])], None, stored, scale)
        return cache.attend_mla(layer, *step, **{"kv_lora_rank": self.rank, **put, **changes})


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8"])
def test_attention_to_entries(world, rng, kv_cache_dtype):
    storage = None if kv_cache_dtype == "auto" else "uint8"
    OfCache(
        rng, [20, 0, 9], [2, 0, 1], dtype="float16", kv_cache_dtype=kv_cache_dtype, storage=storage
    ).solve(world)


def test_refused_attention_to_entries(rng):
    world, problem = worlds.NumPyWorld(), OfCache(rng, [9], dtype="float32")
    problem.refused(world, cc.ArgumentError, "value of layer", layer=1)
    problem.refused(world, cc.ArgumentError, "value of scale", scale="1")
    problem.refused(world, cc.ArgumentError, "kv_lora_rank: expected", kv_lora_rank=0)
    keys = [np.zeros((2, 4, 2, 8), np.float32)]
    with pytest.raises(cc.ArgumentError, match="attend_mla: Invalid kind of caches: expected ent"):
        cc.PagedKVCache(keys, [keys[0].copy()]).attend_mla(0, keys[0], keys[0], keys[0], scale=1.0)


class Counted:
    """A NumPy array with nothing but DLPack, of which it is counted how often it is read."""

    def __init__(self, *shape):
        self.array, self.reads = np.zeros(shape, np.float32), 0

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        self.reads += 1
        return self.array.__dlpack__(**options)


def test_caches_are_read_once(rng):
    """Those of which the docstring says so."""
    keys, values = ([Counted(7, 4, 3, 8) for _ in range(2)] for _ in "kv")
    cache = cc.PagedKVCache(keys, values)
    key, value, query = (rng.standard_normal((5, 3, 8)).astype(np.float32) for _ in "kvq")
    turns = rng.standard_normal((5, 8)).astype(np.float32)
    slots, table = np.arange(5), np.arange(7, dtype=np.int32)[np.newaxis]
    lens, ends = np.array([5], np.int32), np.array([0, 5], np.int32)
    packed = np.zeros(2 * cache.bytes_per_block, np.uint8)

    def step():
        cache.write(1, key, value, slots)
        cache.writer(1)(key, value, slots)
        cache.rotary_write(1, slots, query, key, value, turns, slots)
        cache.attend(1, query, table, lens, query_start_loc=ends)
        cache.gather(1, table, ends, num_tokens=5)
        cache.copy_blocks([(0, 3)])
        cache.zero_blocks([6])
        cache.pack_blocks([0, 1], packed)
        cache.unpack_blocks(packed, [4, 5])

    step()
    before = [array.reads for array in (*keys, *values)]
    step()
    assert [array.reads for array in (*keys, *values)] == before
