# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Stock models of transformers, small and with random weights, give the same tokens with our
attention and cache as with their own. Skipped where transformers is not installed."""

import contextlib
import copy
import gc
import inspect
import pickle
import re
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest

import cupy_cache as cc
from cupy_cache.errors import ArgumentError, MissingDependencyError, ShapeError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")

from transformers.generation.continuous_batching import input_outputs  # noqa: E402

import cupy_cache.integrations.transformers as hf  # noqa: E402
from cupy_cache.integrations.transformers import cache as cache_module  # noqa: E402

# The package has a function of that name.
attention_module = sys.modules["cupy_cache.integrations.transformers.attention"]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, to itself

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.3,
    "max_position_embeddings": 512, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 12
MODELS = {
    "llama": ("Llama", {}),
    "all heads": ("Llama", {"num_key_value_heads": 8}),
    "window": ("Mistral", {"sliding_window": WINDOW}),
    "mixed, soft cap": (
        "Gemma2",
        {"num_hidden_layers": 4, "sliding_window": WINDOW, "tie_word_embeddings": False},
    ),
    "sinks": (
        "GptOss",
        {
            "sliding_window": WINDOW, "num_hidden_layers": 2, "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
}  # fmt: skip
# What generate calls its cache.
CACHE = "cache"
if CACHE not in inspect.signature(transformers.LlamaForCausalLM.forward).parameters:
    CACHE = "past_key_values"


def make(name="llama", device="cpu", dtype=torch.float32, **changed):
    """A model, always the same one, with its own eager attention."""
    kind, options = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | options | changed)
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    if name == "sinks":
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    model.set_attn_implementation("eager")
    return model.to(device=device, dtype=dtype).eval()


def tokens(*shape, seed=5):
    return torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(seed))


def generate(model, given, mask=None, new=20, cache=None, **options):
    options = {"do_sample": False, "max_new_tokens": new} | options
    if cache is not None:
        options[CACHE] = cache
    mask = torch.ones_like(given) if mask is None else mask
    return model.generate(given, attention_mask=mask, **options)


def padded(rows, columns, left):
    """(Tokens, mask) with so many tokens of padding on the left of each row."""
    given, mask = tokens(rows, columns), torch.ones(rows, columns, dtype=torch.long)
    for row, count in enumerate(left):
        given[row, :count] = mask[row, :count] = 0
    return given, mask


def forward(model, given, cache, mask=None, **options):
    with torch.no_grad():
        out = model(given, attention_mask=mask, **{CACHE: cache}, **options)
    return out.logits


# --- generate


@pytest.mark.whole
@pytest.mark.parametrize("name", MODELS)
def test_generate(name):
    """With both of ours, and with one of them."""
    model = make(name)
    given, mask = padded(3, 17, (7, 0, 1))
    expected = generate(model, given, mask, new=10)
    assert len(set(expected[:, 17:].flatten().tolist())) > 10
    for attention in ("cupy_cache", "eager"):
        model.set_attn_implementation(attention)
        cache = hf.PagedCache(model.config, 4)
        assert generate(model, given, mask, new=10, cache=cache).equal(expected)
    model.set_attn_implementation("cupy_cache")
    assert generate(model, given, mask, new=10).equal(expected)
    cc.raise_faults()


@pytest.mark.whole
@pytest.mark.parametrize("name", MODELS)
def test_prompts_that_are_whole(name):
    """Without padding, and within the window: torch's attention may do them, where it does all that
    the model's does."""
    model = make(name)
    given = tokens(2, WINDOW - 2)
    expected = generate(model, given, new=6)
    states = forward(model, given, None, use_cache=False)
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config, 4)
    assert torch.allclose(forward(model, given, cache), states, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert generate(model, given, new=6, cache=cache).equal(expected)


@pytest.mark.parametrize("name", ["llama", "window"])
@pytest.mark.parametrize("columns", [WINDOW, WINDOW + 1])
def test_prompts_without_padding(name, columns):
    """Which torch may attend to."""
    model = make(name)
    given = tokens(2, columns)
    expected = generate(model, given, new=8)
    model.set_attn_implementation("cupy_cache")
    assert generate(model, given, new=8, cache=hf.PagedCache(model.config, 4)).equal(expected)


@pytest.mark.parametrize("attention", ["cupy_cache", "sdpa"])
@pytest.mark.parametrize("beams", [2, 3])
def test_beams(attention, beams):
    model = make()
    given, mask = padded(2, 9, (0, 4))
    expected = generate(model, given, mask, num_beams=beams, num_return_sequences=beams)
    model.set_attn_implementation(attention)
    cache = hf.PagedCache(model.config, 4)
    found = generate(model, given, mask, num_beams=beams, num_return_sequences=beams, cache=cache)
    assert found.equal(expected)


def test_beams_share_blocks():
    model = make()
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config, 4)
    generate(model, tokens(1, 40), num_beams=4, new=2, cache=cache)
    assert len({block for row in cache.rows for block in cache.tables.blocks(row)[:10]}) == 10


@pytest.mark.parametrize("attention", ["cupy_cache", "sdpa"])
def test_guesses_that_are_wrong_are_cropped(attention):
    model, assistant = make(), make(num_hidden_layers=1)
    given = tokens(1, 6).repeat(1, 3)
    expected = generate(model, given, new=30)
    for one in (model, assistant):
        one.set_attn_implementation(attention)
    for how in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        cache = hf.PagedCache(model.config, 4)
        assert generate(model, given, new=30, cache=cache, **how).equal(expected)
        held = sum(len(cache.tables.blocks(row)) for row in cache.rows)
        assert held == -(-cache.get_seq_length() // 4)


@pytest.mark.parametrize("attention", ["cupy_cache", "eager"])
@pytest.mark.parametrize("max_length, room", [(None, 36), (10, 40), (70, 70)])
def test_room_grows(attention, max_length, room, monkeypatch):
    monkeypatch.setattr(cache_module, "AHEAD", 4)
    model = make()
    given, mask = padded(2, 5, (0, 2))
    expected = generate(model, given, mask, new=30)
    model.set_attn_implementation(attention)
    cache = hf.PagedCache(model.config, 8, max_length=max_length)
    assert generate(model, given, mask, new=30, cache=cache).equal(expected)
    assert cache.tables.max_length == room
    cc.raise_faults()


@pytest.mark.parametrize("attention", ["cupy_cache", "eager"])
def test_a_cache_is_used_again(attention):
    """For a second turn, in which rows have padding of their own; and, emptied, for others."""
    model = make()
    turns = [padded(2, 7, (3, 0)), padded(2, 6, (0, 4) if attention == "cupy_cache" else (0, 0))]
    given, mask = (torch.cat(parts, 1) for parts in zip(*turns))
    expected = forward(model, given, None, mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    model.set_attn_implementation(attention)
    cache, at = hf.PagedCache(model.config, 4), 0
    for _ in range(2):
        for part, _ in turns:
            seen = mask[:, : at + part.shape[1]]
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, at:]
            found = forward(model, part, cache, seen, position_ids=positions)
            here = seen[:, at:].bool()
            part_of = expected[:, at : at + part.shape[1]][here]
            torch.testing.assert_close(found[here], part_of, rtol=1e-4, atol=1e-4)
            at += part.shape[1]
        pool, at = cache.tables.pool, 0
        cache.reset()
        assert pool.num_free == pool.num_blocks and cache.get_seq_length() == 0
    forward(model, tokens(5, 3), cache)  # more rows than before
    assert len(cache.rows) == 5


@pytest.mark.parametrize("attention", ["cupy_cache", "eager"])
@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-3),
        lambda cache: cache.crop(-9),
        lambda cache: cache.crop(0),
        lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
        lambda cache: cache.batch_repeat_interleave(2),
    ],
)
def test_rows_and_columns_change(attention, change):
    """As in a cache of transformers."""
    model = make()
    given, mask = padded(3, 14, (0, 6, 1) if attention == "cupy_cache" else (0, 0, 0))
    stock, ours = transformers.DynamicCache(config=model.config), hf.PagedCache(model.config, 4)
    forward(model, given, stock, mask)
    model.set_attn_implementation(attention)
    forward(model, given, ours, mask)
    change(stock)
    change(ours)
    length, rows = stock.get_seq_length(), stock.layers[0].keys.shape[0]
    assert ours.get_seq_length() == length
    numbers = torch.arange(3)[:, None, None, None].expand(3, 1, 14, 1).float()
    which = transformers.DynamicCache()
    which.update(numbers, numbers, 0)
    change(which)
    mask = mask[which.layers[0].keys[:, 0, 0, 0].long(), :length]
    for step in range(3):
        mask = torch.cat([mask, torch.ones(rows, 2, dtype=torch.long)], 1)
        new = tokens(rows, 2, seed=step)
        model.set_attn_implementation("eager")
        expected = forward(model, new, stock, mask)
        model.set_attn_implementation(attention)
        found = forward(model, new, ours, mask)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    cc.raise_faults()


def test_an_8_bit_cache():
    """Attention reads what stock attention is given."""
    model = make()
    given = tokens(2, 11)
    exact = generate(model, given)
    found = []
    for attention in ("cupy_cache", "eager"):
        model.set_attn_implementation(attention)
        options = {"kv_cache_dtype": "fp8", "k_scales": 0.02, "v_scales": 0.02}
        cache = hf.PagedCache(model.config, **options)
        logits = forward(model, given, cache), forward(model, given[:, :1], cache)
        found.append(logits)
        assert cache.pages.key_caches[0].dtype == torch.uint8
        assert generate(model, given, cache=hf.PagedCache(model.config, **options)).shape == (
            exact.shape
        )
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


def test_dtypes_of_16_bits():
    model = make(dtype=torch.bfloat16)
    given = tokens(2, 11)
    expected = forward(model, given, None)
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config)
    found = forward(model, given, cache)
    assert cache.pages.key_caches[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.3)


# --- continuous batching


@pytest.fixture
def block_tables(monkeypatch):
    """On the CPU transformers gives block tables to no implementation."""
    from transformers.generation.continuous_batching import initialization

    nothing = lambda *arguments, **options: None  # noqa: E731
    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", nothing)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """More only wait for each other: the models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Of the CPU transformers knows it by psutil alone."""
    from transformers.generation.continuous_batching import cache

    handler = cache.PagedAttentionMemoryHandler
    if not torch.cuda.is_available():
        monkeypatch.setattr(handler, "get_available_memory", lambda self: 1 << 30)


def batch(model, prompts, new=12, **settings):
    size = {"block_size": 8}
    if "block_size" not in inspect.signature(transformers.ContinuousBatchingConfig).parameters:
        size = {"page_size": 8}
    if model.device.type == "cpu":  # otherwise a GPU that is there is used for its graphs
        size["use_cuda_graph"] = False
    settings = size | {"num_blocks": 60, "max_batch_tokens": 48} | settings
    found = model.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**settings),
    )
    assert {one.error for one in found.values()} == {None}
    return [one.generated_tokens for one in found.values()]


# One is read in parts; the last three begin alike.
LENGTHS = 5, 70, 33, 1, 18
PROMPTS = [tokens(length, seed=length) for length in LENGTHS]
PROMPTS += [torch.cat([PROMPTS[2][:24], tokens(n, seed=n)]) for n in (3, 4)]


def expected_of(model, prompts=PROMPTS, new=12):
    return [
        generate(model, prompt[None].to(model.device), new=new)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


@pytest.mark.whole
@pytest.mark.parametrize("name", [name for name in MODELS if name != "sinks"])
def test_batching(name):
    model = make(name)
    expected = expected_of(model)
    model.set_attn_implementation(hf.BATCHING)
    assert batch(model, PROMPTS) == expected
    cc.raise_faults()


@pytest.mark.parametrize("name", ["llama", "all heads"])
def test_batching_with_block_tables(name, block_tables):
    model = make(name)
    expected = expected_of(model)
    model.set_attn_implementation(hf.BATCHING)
    assert batch(model, PROMPTS, max_blocks_per_request=11) == expected
    cc.raise_faults()


def test_batching_with_too_few_blocks(block_tables):
    """Requests wait, or lose their blocks and begin again."""
    model = make()
    expected = expected_of(model, new=30)
    model.set_attn_implementation(hf.BATCHING)
    few = {"num_blocks": 14, "max_blocks_per_request": 13}
    assert batch(model, PROMPTS, new=30, **few) == expected
    cc.raise_faults()


def test_the_implementation_stays_after_a_batch():
    model = make()
    model.set_attn_implementation(hf.BATCHING)
    batch(model, PROMPTS[:2])
    assert model.config._attn_implementation == hf.BATCHING
    given = tokens(2, 5)
    found = generate(model, given, cache=hf.PagedCache(model.config))
    model.set_attn_implementation("eager")
    assert found.equal(generate(model, given))


def test_the_page():
    """What docs/transformers.md shows runs."""
    page = Path(__file__).resolve().parent.parent / "docs" / "transformers.md"
    parts = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    names = {}
    for part in parts:
        exec(compile(part, str(page), "exec"), names)
    assert len(parts) == 5 and names["cache"].get_seq_length() == 59
    assert [len(one.generated_tokens) for one in names["results"].values()] == [20, 20, 20]
    model, tables = names["model"], names["tables"]
    model.set_attn_implementation("eager")
    for name in "ab":
        *given, last = tables.tokens(name)
        assert generate(model, torch.tensor([given]), new=1)[0, -1] == last


# --- what is refused


def prepared():
    model = make()
    model.set_attn_implementation("cupy_cache")
    return model, hf.PagedCache(model.config)


def test_gradients_are_refused():
    model, _ = prepared()
    with pytest.raises(ArgumentError, match=r"attention: Invalid kind of query.*no_grad"):
        model(tokens(1, 3))


def test_a_refused_call_leaves_no_trace():
    model, given = make(), tokens(2, 9)
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config, 4)
    with pytest.raises(ArgumentError, match="needs no gradient"):
        model(given, **{CACHE: cache})
    expected = forward(model, given, hf.PagedCache(model.config, 4))
    assert forward(model, given, cache).equal(expected)


def test_a_call_that_failed_half_way_is_told(monkeypatch):
    """The first layer has tokens that the others have not."""
    model, given = make(), tokens(2, 9)
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config, 4)
    expected = forward(model, given, cache)
    with monkeypatch.context() as changed, pytest.raises(MemoryError):
        changed.setattr(model.model.layers[1].mlp, "forward", raising(MemoryError))
        forward(model, given[:, :1], cache)
    with pytest.raises(ArgumentError, match=r"reset\(\) the cache, or crop\(\) it"):
        forward(model, given[:, :1], cache)
    cache.crop(9)
    more = torch.cat([given, given[:, :1]], 1)
    wanted = forward(model, more, hf.PagedCache(model.config, 4))[:, -1:]
    torch.testing.assert_close(forward(model, given[:, :1], cache), wanted, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert forward(model, given, cache).equal(expected)


def raising(error):
    """A function that does."""

    def function(*args, **options):
        raise error

    return function


def test_memory_is_free_as_soon_as_a_cache_is_dropped():
    model = make()
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config, 4)
    forward(model, tokens(1, 5), cache)
    pages = weakref.ref(cache.pages)
    gc.disable()
    try:
        del cache
        assert pages() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_caches_are_copied_while_they_are_empty(copied):
    """A copy has layers of its own."""
    model, given = make(), tokens(1, 5)
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config, 4, max_length=100, kv_cache_dtype="fp8", k_scales=0.5)
    other = copied(cache)
    other._config = model.config
    forward(model, given, other)
    assert cache.pages is None and other.pages is not None and other._format == cache._format
    with pytest.raises(cc.CopyError, match="PagedCache: it cannot be copied"):
        copied(other)


def test_dropout_is_refused():
    model, _ = prepared()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with pytest.raises(ArgumentError, match=r"attention: Invalid value of dropout"):
        forward(model, tokens(1, 3), None)


def test_other_masks_are_refused():
    model, cache = prepared()
    with pytest.raises(ShapeError, match=r"attention: Invalid shape of attention_mask.*padding"):
        forward(model, tokens(1, 3), None, torch.zeros(1, 1, 3, 3))
    with pytest.raises(ArgumentError, match=r"Invalid value of attention_mask.*on the left"):
        forward(model, tokens(1, 3), cache, torch.tensor([[1, 1, 0]]))


def test_other_rows_are_refused():
    model, cache = prepared()
    forward(model, tokens(2, 3), cache)
    with pytest.raises(ShapeError, match=r"PagedCache: Invalid shape of key_states.*\[2, \.\.\.\]"):
        forward(model, tokens(3, 1), cache)


def test_padding_is_not_kept_for_stock_attention():
    model, cache = prepared()
    given, mask = padded(2, 5, (2, 0))
    forward(model, given, cache, mask)
    model.set_attn_implementation("eager")
    with pytest.raises(ArgumentError, match=r"PagedCache: Invalid value of attn_implementation"):
        forward(model, given[:, :1], cache, torch.cat([mask, mask[:, -1:]], 1))


def test_models_that_change_the_keys_are_told(monkeypatch):
    """Whose attention would not see the cache."""
    model, cache = prepared()
    update = cache.update
    monkeypatch.setattr(
        cache, "update", lambda *given, **named: [x.clone() for x in update(*given, **named)]
    )
    with pytest.raises(ArgumentError, match=r"PagedCache: Invalid kind of model.*sdpa"):
        forward(model, tokens(1, 3), cache)


def test_other_layers_are_refused():
    config = make().config
    config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ArgumentError, match=r"PagedCache: Invalid value of config.*linear_att"):
        hf.PagedCache(config)


@pytest.mark.parametrize("given", [{"block_size": 0}, {"max_length": 0}, {"max_length": 1.5}])
def test_bad_sizes_are_refused(given):
    with pytest.raises(cc.CupyCacheError, match=rf"PagedCache: Invalid .* of {next(iter(given))}"):
        hf.PagedCache(make().config, **given)


@pytest.mark.parametrize(
    "before, told",
    [
        ("sys.modules['transformers'] = None", "needs torch 2.5 and transformers 5.17"),
        (
            "old = types.ModuleType('transformers'); old.__version__ = '5.9.1'; "
            "sys.modules['transformers'] = old",
            "got 5.9.1",
        ),
    ],
)
def test_missing_or_too_old(before, told):
    # torch is not what this is about, and takes seconds to import.
    start = "import sys, types, cupy_cache; sys.modules['torch'] = types.ModuleType('torch')"
    code = f"{start}; {before}\nimport cupy_cache.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert MissingDependencyError.__name__ in done.stderr and told in done.stderr


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "window"])
def test_generate_on_a_gpu(name):
    model = make(name, "cuda", torch.float16, head_dim=64)
    given, mask = (one.cuda() for one in padded(3, 37, (7, 0, 1)))
    expected = forward(model, given, None, mask)[mask.bool()]
    model.set_attn_implementation("cupy_cache")
    cache = hf.PagedCache(model.config)
    found = torch.cat([
        forward(model, given[:, :30], cache, mask[:, :30]),
        *(forward(model, given[:, at, None], cache, mask[:, : at + 1]) for at in range(30, 37)),
    ], 1)[mask.bool()]  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.3)
    cc.raise_faults()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, graphs",
    [
        ("llama", (False, False)), ("llama", (False, True)), ("llama", (True, True)),
        ("window", (False, False)),
    ],
)  # fmt: skip
def test_batching_on_a_gpu(name, graphs):
    """With block tables and graphs. Sums in another order may decide otherwise."""
    model = make(name, "cuda", torch.float16, head_dim=64)
    expected = expected_of(model)
    model.set_attn_implementation(hf.BATCHING)
    found = batch(model, PROMPTS, use_cuda_graph=graphs)
    pairs = [pair for both in zip(expected, found) for pair in zip(*both)]
    assert sum(one == other for one, other in pairs) > 0.75 * len(pairs)
    cc.raise_faults()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [(True, True), (False, True)])
@pytest.mark.parametrize("attention", [hf.BATCHING, "sdpa"])
def test_batching_where_inputs_are_cleared_late(monkeypatch, attention, graphs):
    """As on a GPU that is busy with the work of other processes: clearing is held up, and steps
    longer still. No batch loses its inputs."""
    inputs = input_outputs.ContinuousBatchingAsyncIOs

    def held_up(clear):
        def late(self, *args, **kwargs):
            torch.cuda._sleep(10**8)  # cycles
            clear(self, *args, **kwargs)
            with torch.cuda.stream(self.compute_stream):
                torch.cuda._sleep(3 * 10**8)

        return late

    for name in ("__init__", "reset"):
        monkeypatch.setattr(inputs, name, held_up(getattr(inputs, name)))
    model = make("llama", "cuda", torch.float16, head_dim=64)
    expected = expected_of(model)
    model.set_attn_implementation(attention)
    found = batch(model, PROMPTS, use_cuda_graph=graphs, use_async_batching=True)
    # Sums in another order may decide otherwise, but not at once.
    assert [one[:2] for one in found] == [one[:2] for one in expected]


def test_steps_wait_for_what_fills_their_inputs(monkeypatch):
    told = []

    class Stream:
        device = torch.device("cuda", 3)

        def wait_stream(self, other):
            told.append((self.name, other))

    copies, computes = Stream(), Stream()
    copies.name, computes.name = "copies", "computes"

    class Inputs:
        def __init__(self, **streams):
            vars(self).update(streams)

        def get_model_kwargs(self, use_padding=False):
            told.append(use_padding)
            return "given"

    class AsyncInputs(Inputs):
        get_model_kwargs = Inputs.get_model_kwargs

    monkeypatch.setattr(input_outputs, "ContinuousBatchingIOs", Inputs)
    monkeypatch.setattr(input_outputs, "ContinuousBatchingAsyncIOs", AsyncInputs)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    attention_module._order_steps()
    for inputs in (
        AsyncInputs(h2d_stream=copies, compute_stream=computes), Inputs(compute_stream=computes),
        Inputs(compute_stream=None),
    ):  # fmt: skip
        assert inputs.get_model_kwargs(use_padding=True) == "given"
    waits = [("copies", Stream.device), ("computes", Stream.device)]
    assert told == [*waits, True, waits[1], True, True]

    monkeypatch.delattr(input_outputs, "ContinuousBatchingAsyncIOs")
    with pytest.raises(MissingDependencyError, match="this version.* has no ContinuousBatchingAs"):
        attention_module._order_steps()


def test_the_stream_that_may_be_captured(monkeypatch):
    """It is one of the queries' GPU, whichever is current."""
    current = [0]

    @contextlib.contextmanager
    def device(its):
        current.append(its.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    for index in (0, 1):
        query = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
        assert attention_module._is_captured(query) == (index == 1)
    assert current == [0] and not attention_module._is_captured(torch.zeros(1))


def test_a_window_in_a_captured_graph(monkeypatch):
    """What transformers gathers for it does not bear a replay."""
    monkeypatch.setattr(attention_module, "_is_captured", lambda query: True)
    cache = types.SimpleNamespace(
        layer_index_to_group_indices={0: (0, 0)}, sliding_windows=[WINDOW]
    )
    states = torch.zeros(1, 2, 4, 8)
    given = {"cache": cache, "cu_seq_lens_k": torch.tensor([0, 4]), "max_seqlen_k": 4}
    with pytest.raises(ArgumentError, match="use_cuda_graph: expected False for a model whose"):
        attention_module._batched(torch.nn.Module(), states, states, states, {}, given)
