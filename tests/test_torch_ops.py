# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The operations as torch's: results, schemas, tracing, compiled code.

What the operations do is tested elsewhere; here the common cases (tests/cases.py) are called
through ``torch.ops.cupy_cache`` and compared with the same plain loops.
"""

import contextlib
import functools
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import attending
import cases
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc

torch = pytest.importorskip("torch")

from cupy_cache import integrations  # noqa: E402
from cupy_cache.integrations import torch_ops  # noqa: E402

# Where there is a GPU, torch 2.11's compiler imports parts of torch that warn of other parts.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")

NOT_REGISTERED = torch_ops.NOT_REGISTERED
CASES = [name for name in cases.CASES if name.partition("-")[0] not in NOT_REGISTERED]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
NAMES = [schema.partition("(")[0] for schema in torch_ops.SCHEMAS]

only_torch = pytest.mark.parametrize(
    "world",
    ["torch-cpu", pytest.param("torch-cuda", marks=pytest.mark.gpu)],
    indirect=True,
)


def overload(name):
    """The `OpOverload` of a name with or without an overload's."""
    packet, _, which = name.partition(".")
    return getattr(getattr(torch.ops.cupy_cache, packet), which or "default")


# --- the common cases, through torch --------------------------------------------------------------


def as_tensor(value):
    """A NumPy array as a tensor of the same memory."""
    bits = torch.from_numpy(value.view(f"i{value.itemsize}"))
    return bits.view(getattr(torch, value.dtype.name))


CHOSEN = ("block_mapping", "pairs", "block_ids", "slot_mapping")


def translate(name, signature, args, options):
    """A public function's call as an operation's: (the name with its overload, args, options)."""
    given = dict(signature.bind(*args, **options).arguments)
    if "size_and_mapping" in given:
        (given["block_mapping"],) = given.pop("size_and_mapping")
    for argument, value in list(given.items()):
        if isinstance(value, np.ndarray):
            given[argument] = as_tensor(value)
        elif argument in CHOSEN and type(value) is list:
            given[argument] = torch.tensor(value)
        elif argument == "scale" and "output" in given and isinstance(value, float):
            device = given["output"].device
            given[argument] = torch.tensor([value], dtype=torch.float32, device=device)
        elif argument == "caches" and isinstance(value[0], tuple):
            given[argument] = [cache for layer in value for cache in layer]
            given["with_values"] = True
    if "out" in given and f"{name}.out" in NAMES:
        name += ".out"
    schema = overload(name)._schema
    positional = [a.name for a in schema.arguments if not a.kwarg_only and a.name in given]
    return name, [given.pop(argument) for argument in positional], given


@pytest.fixture(params=CASES)
def call_of(request, rng, monkeypatch):
    """Makes, of ``run(operation, args, options)``, the common case whose call goes through it."""
    name = request.param.partition("-")[0]
    signature = inspect.signature(getattr(cc, name))

    def make(run):
        def through(*args, **options):
            which, args, options = translate(name, signature, args, options)
            run(overload(which), args, options)

        monkeypatch.setattr(cc, name, through)
        return cases.CASES[request.param](rng)

    yield make


@pytest.mark.whole
@only_torch
def test_common_case(world, call_of):
    case = call_of(lambda operation, args, options: operation(*args, **options))
    case.call(world)
    case.check(world)


def skip_unless_compiled(operation):
    """torch 2.4 compiles nothing that writes a list of tensors, nor uint16, of which lists here
    are."""
    arguments = operation._schema.arguments
    if TORCH < (2, 5) and any(str(argument.type) == "List[Tensor]" for argument in arguments):
        pytest.skip("torch 2.4 does not compile this operation")


@pytest.mark.each("backend")
@only_torch
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.extra)]
)
def test_compiled(world, call_of, backend):
    def run(operation, args, options):
        skip_unless_compiled(operation)

        def step(*args):
            operation(*args, **options)

        torch._dynamo.reset()
        torch.compile(step, fullgraph=True, backend=backend)(*args)

    case = call_of(run)
    case.call(world)
    case.check(world)


# --- every operation that is registered -----------------------------------------------------------


def call_of_row(row, world, rng, monkeypatch):
    """(The `OpOverload`, args, options) of a common case, of `NAMES` or with a case's full name."""
    name = row.partition("-")[0]
    packet, _, which = name.partition(".")
    case = row if row in cases.CASES else next(c for c in CASES if c.partition("-")[0] == packet)
    calls, signature = [], inspect.signature(getattr(cc, packet))

    def through(*args, **options):
        calls.append(translate(packet, signature, args, options))

    with monkeypatch.context() as patch:
        patch.setattr(cc, packet, through)
        cases.CASES[case](rng).call(world)
    ((found, args, options),) = calls
    if which == "layers":
        args[:2] = [args[0]], [args[1]]
    elif which == "sized":
        args.insert(2, args[0][0].numel() * args[0].element_size())
    elif found != name and row != case:  # the result is new
        names = [argument.name for argument in overload(found)._schema.arguments]
        out = args.pop(names.index("out"))
        if which == "lse":
            options["lse"] = out.new_empty(out.shape[:2], dtype=torch.float32)
    return overload(found if row == case else name), args, options


ROWS = [*NAMES, *(case for case in CASES if "-" in case)]
every_row = pytest.mark.parametrize("row", ROWS)


@pytest.mark.slow
@pytest.mark.extra
@only_torch
@every_row
def test_opcheck(world, row, rng, monkeypatch):
    """torch's own: what is written is what the schema says, and tracing sees what runs."""
    operation, *call = call_of_row(row, world, rng, monkeypatch)
    skip_unless_compiled(operation)
    torch.library.opcheck(operation, *call)


@pytest.mark.whole
@only_torch
@every_row
@pytest.mark.parametrize("traced", [False, True])
def test_changes_are_counted(world, row, rng, monkeypatch, traced):
    """Of what is written, and of nothing else; also where torch.compile traces gradients."""
    operation, args, options = call_of_row(row, world, rng, monkeypatch)
    if traced and torch_ops._AUTOGRAD_TRACES is None:
        pytest.skip("torch 2.4 cannot be told")
    names = [argument.name for argument in operation._schema.arguments]
    with torch_ops._AUTOGRAD_TRACES() if traced else contextlib.nullcontext():
        if traced:
            wrap = torch._subclasses.functional_tensor.FunctionalTensor.to_functional
            args, options = torch.utils._pytree.tree_map_only(torch.Tensor, wrap, (args, options))
        given = dict(zip(names, args)) | options
        before = {n: [tensor._version for tensor in tensors_of(v)] for n, v in given.items()}
        operation(*args, **options)
    for argument in operation._schema.arguments:
        versions, value = before.get(argument.name, ()), given.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        changed = [tensor._version > old for tensor, old in zip(tensors_of(value), versions)]
        assert changed == [written] * len(versions), argument.name


def tensors_of(value):
    """What of an argument is a tensor, in a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in items if isinstance(item, torch.Tensor)]


@only_torch
@pytest.mark.parametrize("form", ["tensor", "list"])
def test_autograd_refuses_what_was_overwritten(world, rng, form):
    values, blocks = rng.normal(size=(3, 4)).astype(np.float32), torch.tensor([1])
    leaf = world.put(worlds.of_values(values)).requires_grad_()
    saved = leaf * 2
    squares = (saved * saved).sum()
    if form == "list":
        torch.ops.cupy_cache.zero_blocks([saved.detach()], blocks)
    else:
        torch.ops.cupy_cache.swap_blocks(saved.detach(), saved.detach(), torch.tensor([[0, 1]]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.extra
@pytest.mark.skipif(TORCH < (2, 5), reason="torch 2.4 cannot be told")
@pytest.mark.parametrize("form", ["list", "out", "absent"])
@pytest.mark.parametrize("saved", ["given", "new"])
def test_autograd_refuses_what_compiled_code_overwrites(rng, form, saved):
    """It has saved it before; where nothing is saved there is nothing to refuse."""
    pages = torch.from_numpy(rng.normal(size=(3, 4, 2, 8)).astype(np.float32))

    def overwrite(pages):
        rows = pages.view(12, 2, 8)
        if form == "list":
            torch.ops.cupy_cache.zero_blocks([pages], torch.tensor([1]))
        elif form == "out":
            given = rows + 0, pages + 0, pages + 0, torch.zeros(12, 1).int(), torch.ones(12).int()
            torch.ops.cupy_cache.paged_attention.out(*given, rows)
        else:
            table = torch.ones(12, 8)
            torch.ops.cupy_cache.rotary_embedding(torch.arange(12), rows, None, 8, table)

    def loss(pages, weight, needed):
        if saved == "new":
            pages = pages * 2
        made = (pages * weight).sum() if needed else weight.sum()
        overwrite(pages)
        return made + pages.sum()

    weight = torch.ones(3, 4, 2, 8, requires_grad=True)
    for needed in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        if needed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                compiled(pages.clone(), weight, needed)
        else:
            compiled(pages.clone(), weight, needed).backward()
            assert (weight.grad == 1).all()


# What is done to a tensor; the first three are never right, others may be.
SPOILED = {
    "one dimension more": lambda tensor: tensor[None],
    "another dtype": lambda tensor: torch.zeros_like(tensor, dtype=torch.complex64),
    "one dimension less": lambda tensor: tensor[..., 0] if tensor.dim() else tensor,
    "gaps": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "longer": lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    "shorter": lambda tensor: tensor[1:],
    "narrower": lambda tensor: tensor[..., 1:],
    "int16": lambda tensor: tensor.to(torch.int16),
}


NUMBERS = f"Invalid value of ({'|'.join(CHOSEN)})"


def spoiled(args, options):
    """(What was done, args, options): each tensor, or all of a list, and each name in turn."""
    for at, value in enumerate(args):
        for what, change in SPOILED.items():
            if not tensors_of(value) or any(tensor.dim() == 0 for tensor in tensors_of(value)):
                continue
            many = isinstance(value, (list, tuple))
            other = [change(item) for item in value] if many else change(value)
            yield f"argument {at}: {what}", [*args[:at], other, *args[at + 1 :]], options
        if isinstance(value, str):
            yield f"argument {at}: nonsense", [*args[:at], "nonsense", *args[at + 1 :]], options
        elif isinstance(value, int):
            yield f"argument {at}: -1", [*args[:at], -1, *args[at + 1 :]], options
    for name, value in options.items():
        if isinstance(value, str):
            yield f"{name}: nonsense", args, options | {name: "nonsense"}


def refusal(operation, args, options):
    """The kind of the library's error and what is wrong with which argument; None without one."""
    try:
        operation(*args, **options)
    except cc.CupyCacheError as error:
        return type(error), str(error).partition(": expected")[0]
    return None


@only_torch
@every_row
def test_tracing_checks_what_eager_checks(world, row, rng, monkeypatch):
    operation, *call = call_of_row(row, world, rng, monkeypatch)
    fakes = torch._subclasses.FakeTensorMode()
    seen = set()
    for what, args, options in [("nothing", *call), *spoiled(*call)]:
        traced = torch.utils._pytree.tree_map_only(torch.Tensor, fakes.from_tensor, (args, options))
        expected = refusal(operation, args, options)
        if expected is not None and re.search(NUMBERS, expected[1]):
            continue  # tracing does not know them
        with fakes:
            assert refusal(operation, *traced) == expected, what
        seen.add((what.partition(": ")[2], expected is not None))
    assert ("", False) in seen  # as it is it is right
    assert {("one dimension more", True), ("another dtype", True)} <= seen
    with contextlib.suppress(cc.FaultError):  # of spoiled calls whose numbers alone are wrong
        cc.raise_faults()


@pytest.mark.parametrize("gone", ["key", "key_cache", "slot_mapping"])
def test_some_tensors_without_memory(gone):
    """torch takes a call with one of "meta" for one without memory: nothing would be written, in
    silence. Where all are, there is nothing to write."""
    key, cache = torch.ones(1, 2, 8), torch.zeros(2, 4, 2, 8)
    given = {
        "key": key, "value": key, "key_cache": cache, "value_cache": cache.clone(),
        "slot_mapping": torch.tensor([3]),
    }  # fmt: skip
    write = torch.ops.cupy_cache.reshape_and_cache_flash
    message = f"reshape_and_cache_flash: Invalid device of {gone}: expected cpu like the others"
    with pytest.raises(cc.DeviceError, match=message):
        write(**given | {gone: given[gone].to("meta")})
    with pytest.raises(cc.DeviceError, match=r"zero_blocks: Invalid device of caches"):
        torch.ops.cupy_cache.zero_blocks([cache, cache.to("meta")], torch.tensor([0]))
    write(**{name: tensor.to("meta") for name, tensor in given.items()})


def test_devices_are_checked(monkeypatch):
    """Of GPUs too that are not there."""
    module = torch._subclasses.fake_tensor  # looks at them, where there is one
    monkeypatch.setattr(module, "init_gpu_context", lambda device: None, raising=False)
    with torch._subclasses.FakeTensorMode():
        on = {d: torch.empty(4, 16, 8, device=d) for d in ("cuda:1", "cuda:0", "cpu")}
        pairs, blocks = torch.empty(3, 2, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
        operations = torch.ops.cupy_cache
        for source, destination in (("cuda:0", "cpu"), ("cpu", "cuda:1"), ("cuda:1", "cuda:1")):
            operations.swap_blocks(on[source], on[destination], pairs)
        for device in ("cuda:0", "cpu"):
            packed = torch.empty(2, 3, 16, 8, device=device)
            operations.pack_blocks([on["cuda:0"]] * 2, blocks, packed)
            few = torch.empty(2, 2, 16, 8, device=device)
            with pytest.raises(cc.ShapeError, match="size of out: expected at least"):
                operations.pack_blocks([on["cuda:0"]] * 2, blocks, few)
        with pytest.raises(cc.DeviceError, match="dst: expected cuda:0 like src, got cuda:1"):
            operations.swap_blocks(on["cuda:0"], on["cuda:1"], pairs)
        with pytest.raises(cc.DeviceError, match="block_mapping: expected host memory, got cuda:0"):
            operations.swap_blocks(on["cuda:0"], on["cpu"], pairs.to("cuda:0"))
        with pytest.raises(cc.DeviceError, match="kv_cache: expected cpu like kv_c, got cuda:0"):
            parts = on["cpu"][0, :, :6], on["cpu"][0, :, 6:]
            operations.concat_and_cache_mla(*parts, on["cuda:0"], blocks)


@only_torch
@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes_are_checked_but_not_fixed(world, rng, dynamic):
    """A wrong call is refused while it is traced; the right one is compiled once for all sizes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(write, fullgraph=True, backend=backend, dynamic=dynamic)
    for tokens in (6, 5, 4, 3):
        key, value = rng.normal(size=(2, tokens, 2, 8)).astype(np.float32)
        pages, slots = np.zeros((2, 5, 4, 2, 8), np.float32), rng.permutation(20)[:tokens]
        key, value, keys, values, slots = map(
            world.put, map(worlds.of_values, (key, value, *pages, slots))
        )
        compiled(key, value, keys, values, slots)
        oracle.reshape_and_cache_flash(
            key.cpu().numpy(), value.cpu().numpy(), *pages, slots.cpu().numpy()
        )
        np.testing.assert_array_equal(keys.cpu(), pages[0])
        np.testing.assert_array_equal(values.cpu(), pages[1])
    assert len(graphs) == (1 if dynamic else 2)
    with pytest.raises(RuntimeError, match="Invalid shape of key: expected"):
        compiled(key[0], value, keys, values, slots)


def write(*args):
    torch.ops.cupy_cache.reshape_and_cache_flash(*args)


def test_sizes_that_depend_on_data_are_not_checked(rng):
    """While tracing; the call checks them."""

    def step(key, pages, mask):
        slots = mask.nonzero()[:, 0]
        torch.ops.cupy_cache.reshape_and_cache_flash(key, key, pages, pages + 0, slots)
        return slots + 1

    key, pages = torch.ones(3, 2, 8), torch.zeros(5, 4, 2, 8)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        mask = torch.zeros(20, dtype=torch.bool)
        mask[[4, 19]] = True
        assert compiled(key, pages, mask).tolist() == [5, 20]
    assert pages.sum(dim=(2, 3)).nonzero().tolist() == [[1, 0], [4, 3]]


# --- results that are new -------------------------------------------------------------------------


def step_arrays(rng):
    """(block table, positions, query_start_loc) of three requests and nine tokens."""
    table = rng.integers(0, 1000, (3, 2)).astype(np.int32)
    return table, rng.integers(0, 32, 9), np.array([0, 4, 4, 9], np.int32)


def put_all(world, values):
    return [world.put(worlds.of_values(value)) for value in values]


def check_new(world, name, args, options, expected):
    """Called, and compiled, the operation returns ``expected``; opcheck has nothing to say."""
    torch.library.opcheck(overload(name), args, options)
    torch._dynamo.reset()
    packet = getattr(torch.ops.cupy_cache, name)
    compiled = torch.compile(
        lambda *args: packet(*args, **options) + 0, fullgraph=True, backend="aot_eager"
    )
    for made in (packet(*args, **options), compiled(*args)):
        assert made.dtype == getattr(torch, expected.dtype.name)
        np.testing.assert_array_equal(made.cpu().float().numpy(), expected.astype(np.float32))


@only_torch
def test_new_slots(world, rng):
    values = step_arrays(rng)
    expected = np.empty(9, np.int64)
    oracle.slot_mapping(*values, 8 * 4, expected, 2, 1, 4)
    options = {"cp_world_size": 2, "cp_rank": 1, "cp_interleave": 4}
    check_new(world, "slot_mapping", [*put_all(world, values), 32], options, expected)


@only_torch
def test_new_slots_of_groups(world, rng):
    table, positions, starts = step_arrays(rng)
    expected = np.empty((2, 9), np.int64)
    oracle.slot_mapping(table, positions, starts, 16, expected[0])
    expected[1] = -1
    table, positions, starts = put_all(world, (table, positions, starts))
    args = [table, table], None, positions, starts, [16, 8]
    check_new(world, "slot_mapping_groups", args, {"enabled": [True, False]}, expected)


@only_torch
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_new_bias(world, rng, dtype):
    values = np.array([0.5, 0.25, 0.75], np.float32), rng.integers(0, 99, 4), np.arange(24)
    expected = np.empty((3, 4, 24), dtype or np.float32)
    oracle.alibi_bias(*values, expected, sqrt=True)
    options = {"dtype": dtype, "sqrt": True}
    check_new(world, "alibi_bias", put_all(world, values), options, expected)


@only_torch
@pytest.mark.parametrize("layout", ["NHD", "x-packed", "interleaved"])
def test_new_attention(world, rng, layout):
    """With logarithms, which are written, and without."""
    problem = attending.Problem(rng, [9, 0, 20], sizes=(32, 16), layout=layout, scale=0.5)
    problem.solve(world)
    expected = problem.out.on(world.bytes_of(problem.out))[:3]
    args = problem.query, *problem.caches, problem.table, problem.lens
    args = list(map(world.put, args))
    check_new(world, "paged_attention", args, {"scale": 0.5}, expected)
    written = problem.lse.on(world.bytes_of(problem.lse))
    lse = world.put(problem.lse).fill_(0)
    torch.ops.cupy_cache.paged_attention(*args, scale=0.5, lse=lse)
    torch.library.opcheck(overload("paged_attention.lse"), args, {"scale": 0.5, "lse": lse})
    np.testing.assert_array_equal(problem.lse.on(world.bytes_of(problem.lse)), written)


@only_torch
def test_new_attention_with_scales_of_tokens(world, rng):
    problem = attending.Problem(
        rng, [9, 0, 20], kv_cache_dtype="int8_per_token_head", scales="tokens", lse=None
    )
    problem.solve(world)
    expected = problem.out.on(world.bytes_of(problem.out))[:3]
    args = problem.query, *problem.caches, problem.table, problem.lens
    options = {**problem.options, **{n: world.put(s) for n, s in problem.scales.items()}}
    check_new(world, "paged_attention", list(map(world.put, args)), options, expected)


@only_torch
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_new_latent_attention(world, rng, kv_cache_dtype):
    """With logarithms, which are written, and without."""
    problem = attending.Latent(
        rng,
        [9, 0, 20],
        sizes=(24, 16),
        kv_cache_dtype=kv_cache_dtype,
        scales="array",
        storage="uint8" if kv_cache_dtype == "fp8" else None,
    )
    problem.solve(world)
    expected = problem.out.on(world.bytes_of(problem.out))[:3]
    args = problem.query, *problem.caches, problem.table, problem.lens
    args = list(map(world.put, args))
    options = {"scale": 0.2, "kv_lora_rank": 16, "kv_cache_dtype": kv_cache_dtype}
    options |= {name: world.put(scale) for name, scale in problem.scales.items()}
    check_new(world, "paged_attention_mla", args, options, expected)
    written = problem.lse.on(world.bytes_of(problem.lse))
    options["lse"] = world.put(problem.lse).fill_(0)
    torch.ops.cupy_cache.paged_attention_mla(*args, **options)
    torch.library.opcheck(overload("paged_attention_mla.lse"), args, options)
    np.testing.assert_array_equal(problem.lse.on(world.bytes_of(problem.lse)), written)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["float32", "large heads"])
def test_attention_that_the_cpu_alone_takes(device, kind):
    """While it is traced it is refused for a GPU alone, as at a call."""
    dtype, size = (torch.float32, 16) if kind == "float32" else (torch.float16, 1056)
    pages = torch.randn(3, 4, 1, size, dtype=dtype, device=device)
    query = torch.randn(2, 2, size, dtype=dtype, device=device)
    step = [torch.tensor(n, device=device) for n in ([[2], [0]], [4, 3])]
    latent = {"scale": 0.1, "kv_lora_rank": size - 8}
    for name, args, options in (
        ("paged_attention", (query, pages, pages + 1, *step), {}),
        ("paged_attention_mla", (query, pages[:, :, 0], *step), latent),
    ):
        compiled = torch.compile(
            lambda *a, n=name, o=options: overload(n)(*a, **o) + 1, backend="eager", fullgraph=True
        )
        torch._dynamo.reset()
        if device == "cuda":
            with pytest.raises(RuntimeError, match=f"{name}: Invalid .* of query: .* on a GPU"):
                compiled(*args)
            continue
        assert torch.equal(compiled(*args), getattr(cc, name)(*args, **options) + 1)


def test_what_makes_a_result_may_write_nothing_but_what_it_is_given():
    """torch 2.13's Inductor takes the result of an operation apart whose other result, what it
    writes, is None."""
    for name in NAMES:
        schema = overload(name)._schema
        for argument in schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            may_be_absent = isinstance(argument.type, torch.OptionalType)
            assert not (schema.returns and written and may_be_absent), name


def test_attention_without_logarithms(rng):
    """None for them, as the function takes it, is for the operation that makes a result alone."""
    query, pages = (torch.from_numpy(rng.normal(size=s)).float() for s in ((2, 4, 8), (3, 4, 2, 8)))
    given = query, pages, pages + 1, torch.tensor([[2, 0], [1, 0]]), torch.tensor([5, 3])

    attention = torch.ops.cupy_cache.paged_attention

    def attend(*args):
        return attention(*args, lse=None) + 1

    expected = cc.paged_attention(*given) + 1
    traced = torch.fx.experimental.proxy_tensor.make_fx(attend)(*given)
    assert overload("paged_attention") in [node.target for node in traced.graph.nodes]
    assert torch.equal(attend(*given), expected) and torch.equal(traced(*given), expected)
    for operation, wrong in ((attention, True), (attention, False), (attention.lse, None)):
        with pytest.raises(cc.DTypeError, match="paged_attention: Invalid type of lse"):
            operation(*given, lse=wrong)


@pytest.mark.extra
@only_torch
@pytest.mark.parametrize("name", ["paged_attention", "paged_attention_mla", "rotary_embedding"])
def test_by_inductor_without_what_may_be_written(world, rng, name):
    """It is compiled as by others."""
    query, pages = tensors_for(rng, world)
    options = {"scale": 0.3, "kv_lora_rank": 24, "lse": None}
    step = torch.tensor([[2, 0], [1, 3]]), torch.tensor([5, 3])
    given = (query, pages, *step)
    if name == "paged_attention":
        given = query, pages[:, :, None], pages[:, :, None] + 1, *step
        options = {"lse": None}
    if name == "rotary_embedding":
        given = torch.tensor([3, 5]), query, None, 32, torch.randn(9, 32, dtype=query.dtype)
        options = {}
    given = [one.to(world.device) if isinstance(one, torch.Tensor) else one for one in given]

    def call(*args):
        query = args[at] * 2
        made = getattr(torch.ops.cupy_cache, name)(*args[:at], query, *args[at + 1 :], **options)
        return query + 1, None if made is None else made + 1

    at = int(name == "rotary_embedding")
    torch._dynamo.reset()
    made = torch.compile(call, fullgraph=True)(*given)
    for one, other in zip(made, call(*given)):
        assert one is other is None or torch.equal(one, other)


def tensors_for(rng, world):
    """Queries [2, 4, 32] and entries [5, 4, 32] that attention takes on the device of ``world``."""
    dtype = torch.float16 if world.on_gpu else torch.float32
    return [torch.from_numpy(rng.standard_normal(s)).to(dtype) for s in ((2, 4, 32), (5, 4, 32))]


@only_torch
def test_rotary_embedding_of_queries_alone(world, rng):
    """What is written may be absent: the others count as changed."""
    positions, table = torch.arange(3), torch.from_numpy(rng.standard_normal((9, 8), np.float32))
    queries = [torch.from_numpy(rng.standard_normal((3, 2, 8), np.float32)) for _ in range(2)]
    positions, table, *queries = (x.to(world.device) for x in (positions, table, *queries))
    queries[1].copy_(queries[0])
    before = queries[0]._version
    torch.ops.cupy_cache.rotary_embedding(positions, queries[0], None, 8, table)
    cc.rotary_embedding(positions, queries[1], None, 8, table)
    assert torch.equal(*queries) and queries[0]._version > before


# --- several in one function ----------------------------------------------------------------------


def write_copy_and_gather(key, value, key_cache, value_cache, slots, pairs, table, bounds):
    """Write a step's tokens, copy blocks and read keys back, all on what came before."""
    torch.ops.cupy_cache.reshape_and_cache_flash(key * 2, value, key_cache, value_cache, slots)
    torch.ops.cupy_cache.copy_blocks([key_cache], [value_cache], pairs)
    rows = torch.zeros_like(key)
    torch.ops.cupy_cache.cp_gather_cache(key_cache, rows, table, bounds, table.shape[0])
    return rows + 1


def numbers_of(rng, tokens):
    """NumPy arrays for `write_copy_and_gather`; block 3 becomes a copy of block 1 and is read."""
    key, value = rng.integers(-9, 9, (2, tokens, 2, 8)).astype(np.float32)
    pages = rng.integers(-9, 9, (5, 4, 2, 16)).astype(np.float32)
    slots = 4 + rng.permutation(4)[:tokens]
    pairs, table = np.array([[1, 3]]), np.array([[3]], np.int32)
    bounds = np.array([0, tokens], np.int32)
    return key, value, pages, slots, pairs, table, bounds


def run_step(function, world, values, mark=lambda tensor: None):
    """``function`` on the world's arrays, with both caches views of one packed page, each given to
    ``mark``; what it returned and the pages, as NumPy."""
    specs = [worlds.of_values(value) for value in values]
    key, value, pages, *others = map(world.put, specs)
    caches = pages[..., :8], pages[..., 8:]
    for cache in caches:
        mark(cache)
    rows = function(key, value, *caches, *others)
    return rows.cpu().numpy(), specs[2].on(world.bytes_of(specs[2]))


def expected_step(key, value, pages, slots, pairs, table, bounds):
    pages, rows = pages.copy(), np.zeros_like(key)
    key_cache, value_cache = pages[..., :8], pages[..., 8:]
    oracle.reshape_and_cache_flash(key * 2, value, key_cache, value_cache, slots)
    oracle.copy_blocks([key_cache, value_cache], pairs.tolist())
    oracle.gather_cache(key_cache, rows, table, bounds, None)
    return rows + 1, pages


def step_of_pages(key, value, pages, *others):
    """`write_copy_and_gather` on both parts of pages."""
    return write_copy_and_gather(key, value, pages[..., :8], pages[..., 8:], *others)


def call_with_pages(step, key, value, key_cache, value_cache, *others):
    """Give ``step`` the pages that both caches are views of."""
    pages = key_cache.as_strided((*key_cache.shape[:3], 16), key_cache.stride())
    return step(key, value, pages, *others)


def torch_is_right(mark, dynamic):
    """Whether torch, by itself, compiles a function that writes two views of one page."""

    def write(key, value, one, other, slots):
        one.add_(key.sum())
        other.add_(value.sum() + slots.sum())
        return one + 1

    def results(function):
        pages = torch.arange(5.0 * 4 * 2 * 16).view(5, 4, 2, 16)
        for tokens in (4, 3):
            views = pages[..., :8], pages[..., 8:]
            for view in views:
                mark(view)
            key, value, slots = (torch.arange(tokens) for _ in range(3))
            yield function(key, value, *views, slots)
        yield pages

    torch._dynamo.reset()
    compiled = torch.compile(write, backend="aot_eager", dynamic=dynamic)
    try:
        return all(map(torch.equal, results(compiled), results(write)))
    except Exception:  # torch 2.4 and 2.7 raise various
        return False


MARKS = {"views": lambda tensor: None, "static views": torch._dynamo.mark_static}


@pytest.mark.each("way")
@only_torch
@pytest.mark.parametrize("way", ["pages", *MARKS])
@pytest.mark.parametrize("dynamic", [False, None, True])
def test_compiled_function(world, rng, way, dynamic):
    """Steps of different length; the second one compiles for any, or finds that done."""
    skip_unless_compiled(torch.ops.cupy_cache.copy_blocks.default)
    mark = MARKS.get(way)
    if mark is not None and not torch_is_right(mark, dynamic):
        pytest.xfail("torch itself is wrong")
    torch._dynamo.reset()
    function = write_copy_and_gather if mark else step_of_pages
    function = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    if not mark:
        function = functools.partial(call_with_pages, function)
    for tokens in (4, 3):
        values = numbers_of(rng, tokens)
        made = run_step(function, world, values, mark or MARKS["views"])
        for one, other in zip(made, expected_step(*values)):
            np.testing.assert_array_equal(one, other)


@pytest.mark.xfail(strict=True, reason="torch 2.4 to 2.13: an exception, or wrong results")
def test_torch_with_dynamic_views_of_one_page():
    """Where this passes, the docstring of `torch_ops` need not warn."""
    assert torch_is_right(MARKS["views"], True)


def compiled_anew(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def written_second_half(operation, options=None, mark=lambda tensor: None):
    """Halves of a page, of which Inductor compiled a write of the second to zeros."""
    pages = torch.ones(2, 6, 4)
    mark(pages)

    def write(pages, blocks):
        operation(pages[1], blocks)
        return pages + 1

    made = compiled_anew(write, dynamic=True, options=options)(pages, torch.arange(6))
    assert torch.equal(made, pages + 1)
    return [half.any().item() for half in pages]


def zero_all(tensor, blocks):
    del blocks
    tensor.zero_()


@pytest.fixture
def torchs_own():
    """An operation that writes zeros, and has nothing of ours."""
    with torch.library._scoped_library("cupy_cache_test", "FRAGMENT") as library:
        library.define("zero(Tensor(a!) x, Tensor blocks) -> ()")
        library.impl("zero", zero_all, "CPU")
        library.impl("zero", lambda x, blocks: None, "Meta")
        yield torch.ops.cupy_cache_test.zero


def zero_blocks(cache, blocks):
    torch.ops.cupy_cache.zero_blocks([cache], blocks)


@pytest.mark.extra
@pytest.mark.skipif(TORCH < (2, 13), reason="older ones were not tried")
@pytest.mark.xfail(raises=AssertionError, strict=True, reason="the first half is written")
def test_torch_with_a_view_that_begins_where_sizes_say(torchs_own):
    """Where this passes, the docstring of `torch_ops` need not warn."""
    assert written_second_half(torchs_own) == [True, False]


@pytest.mark.extra
@pytest.mark.skipif(TORCH < (2, 5), reason="torch 2.4 compiles nothing that writes a list")
@pytest.mark.parametrize("way", ["static", "options"])
def test_a_view_that_begins_where_sizes_say(way):
    given = {"mark": torch._dynamo.mark_static}
    if way == "options":
        name = "enable_auto_functionalized_v2"
        if not hasattr(torch._inductor.config, name):
            pytest.skip("this torch has no such option")
        given = {"options": {name: False}}
    assert written_second_half(zero_blocks, **given) == [True, False]


def copied_and_written(operation, dynamic, options=None):
    """Of a compiled function that writes zeros to a copy, as bytes: (what was copied, the copy)."""
    given = torch.ones(6, 4, 1, dtype=torch.int32)

    def write(given, blocks):
        copy = given.clone()
        operation(copy.view(torch.uint8), blocks)
        return copy + 1

    compiled = compiled_anew(write, dynamic=dynamic, options=options)
    return given, compiled(given, torch.arange(6))


@pytest.mark.extra
@pytest.mark.skipif(TORCH < (2, 13), reason="older ones were not tried")
@pytest.mark.xfail(raises=AssertionError, strict=True, reason="what was copied is written")
def test_torch_with_a_copy_that_is_written_as_another_dtype(torchs_own):
    """Where this passes, docs/compiled_code.md need not warn."""
    given, copy = copied_and_written(torchs_own, False)
    assert copy.eq(1).all() and given.eq(1).all()


@pytest.mark.extra
@pytest.mark.skipif(TORCH < (2, 13), reason="older ones were not tried")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_copy_that_is_written_as_another_dtype(dynamic):
    options = {"enable_auto_functionalized_v2": False}
    given, copy = copied_and_written(zero_blocks, dynamic, options)
    assert copy.eq(1).all() and given.eq(1).all()


@pytest.mark.extra
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_table_that_compiled_code_expands(dynamic):
    """Inductor computes one row for all sequences, and need not keep the strides of 0."""

    def slots(positions, starts):
        table = torch.arange(6, dtype=torch.int32).expand(starts.shape[0] - 1, 6).contiguous()
        return torch.ops.cupy_cache.slot_mapping(table, positions, starts, 4)

    compiled = compiled_anew(slots, dynamic=dynamic)
    for count in (5, 3):
        found = compiled(torch.arange(count), torch.arange(count + 1))
        assert found.tolist() == list(range(count))


@pytest.mark.extra
@pytest.mark.parametrize(
    "copied, view",
    [
        (torch.clone, lambda x: x.squeeze(0)),
        (lambda x: torch.empty_like(x).copy_(x), lambda x: x[0]),
    ],
)
def test_a_copy_of_which_a_view_is_rotated(copied, view):
    """As models do that have a dimension for the batch, of one."""
    table = torch.randn(16, 8)

    def rotated(keys, positions):
        out = copied(keys)
        torch.ops.cupy_cache.rotary_embedding(positions, view(out), None, 8, table, True)
        return out

    compiled = compiled_anew(rotated, dynamic=True)
    for count in (5, 7):
        keys, positions = torch.randn(1, count, 2, 8), torch.arange(count)
        torch.testing.assert_close(compiled(keys, positions), rotated(keys, positions))


@only_torch
def test_errors(world, rng):
    """What can be told from shapes is told while tracing, within torch's error."""
    key, value, pages, slots, *others = numbers_of(rng, 4)
    wrong = key, value, pages, slots[None], *others
    torch._dynamo.reset()
    compiled = torch.compile(write_copy_and_gather, fullgraph=True, backend="aot_eager")
    for function, kind in ((write_copy_and_gather, cc.ShapeError), (compiled, RuntimeError)):
        with pytest.raises(kind, match="reshape_and_cache_flash: Invalid shape of slot_mapping"):
            run_step(function, world, wrong)


@only_torch
def test_an_odd_list_of_keys_and_values_is_refused(world, rng):
    specs = [worlds.array(rng, (4, 2, 8), "float16") for _ in range(3)]
    with pytest.raises(cc.ShapeError, match=r"Invalid length of caches\[1\]"):
        torch.ops.cupy_cache.zero_blocks(
            [world.put(spec) for spec in specs], torch.tensor([1]), with_values=True
        )
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)


@only_torch
def test_one_cache_for_each_layer(world, rng):
    specs = [worlds.array(rng, (4, 2, 8), "float16") for _ in range(3)]
    expected = [spec.on(spec.buffer.bytes.copy()) for spec in specs]
    torch.ops.cupy_cache.zero_blocks([world.put(spec) for spec in specs], torch.tensor([1, 2]))
    oracle.zero_blocks(expected, [1, 2])
    for spec, cache in zip(specs, expected):
        np.testing.assert_array_equal(spec.on(world.bytes_of(spec)), cache)


@only_torch
@pytest.mark.parametrize("form", ["layers", "sized"])
def test_other_forms_of_swap_blocks(world, rng, form):
    source, destination = (worlds.array(rng, (n, 4, 8), "int32") for n in (3, 5))
    src, dst, pairs = world.put(source), world.put(destination), torch.tensor([[2, 0], [0, 4]])
    args = ([src], [dst], pairs) if form == "layers" else (src, dst, 128, pairs)
    torch.library.opcheck(overload(f"swap_blocks.{form}"), args)
    torch.ops.cupy_cache.swap_blocks(*args)
    expected = destination.on(destination.buffer.bytes.copy())
    oracle.swap_blocks(source.on(source.buffer.bytes), expected, pairs.tolist())
    np.testing.assert_array_equal(destination.on(world.bytes_of(destination)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("world", ["torch-cuda"], indirect=True)
def test_graph(world, rng):
    """Captured, the operation does nothing; replayed, it writes."""
    warm = worlds.TorchCudaWorld()
    case = cases.CASES["reshape_and_cache_flash"](rng)
    operation = torch.ops.cupy_cache.reshape_and_cache_flash
    operation(*case.put(warm))
    put = case.put(world)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operation(*put)
    for spec in case.written:
        np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
    graph.replay()
    case.check(world)


# --- the table ------------------------------------------------------------------------------------


def test_every_function_is_registered_or_has_a_reason():
    public = {n for n in cc.__all__ if inspect.isfunction(getattr(cc, n))}
    registered = {name.partition(".")[0] for name in NAMES}
    assert registered | NOT_REGISTERED.keys() == public
    assert not registered & NOT_REGISTERED.keys()
    assert all(NOT_REGISTERED.values())
    page = (Path(__file__).parent.parent / "docs" / "compiled_code.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| \*\*Which functions\*\* .*$", page, re.MULTILINE)
    assert not [name for name in NOT_REGISTERED if f"`{name}`" not in row]


def positional(parameter):
    """An optional keyword as an argument that is needed."""
    return parameter.replace(default=parameter.empty, kind=parameter.POSITIONAL_OR_KEYWORD)


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_function(name):
    """Names, order, defaults. torch leaves out arguments that have their default, so those of the
    schema must mean what the function's do."""
    packet, _, which = name.partition(".")
    wanted = dict(inspect.signature(getattr(cc, packet)).parameters)
    del wanted["stream"]
    if packet == "swap_blocks":
        del wanted["size_and_mapping"]
        mapping, size = wanted.pop("block_mapping"), wanted.pop("block_size_in_bytes")
        if which == "sized":
            wanted["block_size_in_bytes"] = positional(size)
        wanted["block_mapping"] = positional(mapping)
    if "out" in wanted and packet in torch_ops._RESULTS:
        out = wanted.pop("out")
        if which == "out":
            at = [p.kind is p.KEYWORD_ONLY for p in wanted.values()].index(True)
            named = list(wanted.items())
            wanted = dict([*named[:at], ("out", positional(out)), *named[at:]])
    if packet in torch_ops.WITH_LSE and which != "out":
        lse = wanted.pop("lse")
        wanted["lse"] = lse.replace(default=lse.empty) if which == "lse" else lse
    arguments = list(overload(name)._schema.arguments)
    takes_pairs = "Pairs" in str(getattr(wanted.get("caches"), "annotation", ""))
    assert takes_pairs == (arguments[-1].name == "with_values")
    if takes_pairs:
        arguments.pop()
    assert [argument.name for argument in arguments] == list(wanted)
    for argument, parameter in zip(arguments, wanted.values()):
        assert argument.kwarg_only == (parameter.kind is parameter.KEYWORD_ONLY)
        has_default = parameter.default is not parameter.empty
        assert argument.has_default_value() == has_default
        if has_default:
            same = (argument.name, packet) == ("scale", "convert_fp8") and parameter.default == 1.0
            assert same or argument.default_value == parameter.default


# --- importing ------------------------------------------------------------------------------------


def test_reloading_and_importing_again(monkeypatch):
    before = torch.ops.cupy_cache.convert_fp8
    importlib.reload(torch_ops)
    monkeypatch.delitem(sys.modules, "cupy_cache.integrations.torch_ops")
    monkeypatch.setattr(integrations, "torch_ops", torch_ops)
    importlib.import_module("cupy_cache.integrations.torch_ops")
    assert torch.ops.cupy_cache.convert_fp8 is before
    stored = torch.zeros(3, dtype=torch.uint8)
    before(stored, torch.ones(3))
    assert stored.tolist() == [0x38] * 3  # 1.0 in e4m3


def run_python(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True,
                          text=True, check=True).stdout  # fmt: skip


@pytest.mark.parametrize(
    "torch_is", ["None", "types.SimpleNamespace(library=0, __version__='2.3')"]
)
def test_without_torch(torch_is):
    code = (
        f"import sys, types, cupy_cache\nsys.modules['torch'] = {torch_is}\n"
        "try: import cupy_cache.integrations.torch_ops\n"
        "except cupy_cache.MissingDependencyError as error: print(error)\n"
        "sys.modules['torch'] = None\n"
        "try: import cupy_cache.integrations.torch_graphs\n"
        "except cupy_cache.MissingDependencyError as error: print(error)"
    )
    told = run_python(code)
    assert "needs torch 2.4 or newer (pip install 'torch>=2.4')" in told
    assert "torch_graphs needs torch (pip install torch)" in told
