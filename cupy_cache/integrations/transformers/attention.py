# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What transformers calls in each layer."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.generation.continuous_batching import input_outputs
from transformers.masking_utils import flash_attention_mask

from ... import errors, flash_attn, paged_attention, reshape_and_cache_flash
from ...errors import MissingDependencyError

ATTENTION, BATCHING = "cupy_cache", "cupy_cache_flash2"
NAMES = {ATTENTION, BATCHING, f"paged|{BATCHING}"}
OF_LAYER = "_cupy_cache_layer"  # an attribute of keys that are on their way to a layer's pages


def register() -> None:
    """Make the implementations known to transformers."""
    for name in sorted(NAMES):
        AttentionInterface.register(name, attention)
        # As for FlashAttention: the mask of padding, [batch, tokens], or None where there is none.
        AttentionMaskInterface.register(name, flash_attention_mask)
    known = _known(modeling_flash_attention_utils, "_lazy_imports")

    # An implementation that counts as FlashAttention is asked for its functions. What decides
    # whether block tables are used is that there is a second one; `attention` calls none of them.
    def lazy_imports(implementation, *args, **kwargs):
        if implementation is not None and implementation.removeprefix("paged|") == BATCHING:
            functions = flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_with_kvcache
            return None, *functions, None, None
        return known(implementation, *args, **kwargs)

    modeling_flash_attention_utils._lazy_imports = lazy_imports
    _order_steps()


def _known(owner, name):
    """A part of transformers that it does not document."""
    found = getattr(owner, name, None)
    if found is None:
        raise MissingDependencyError(
            "cupy_cache.integrations.transformers does not know this version of transformers: "
            f"{owner.__name__} has no {name}"
        )
    return found


def _order_steps():
    """Have each step of continuous batching wait for what fills its inputs.

    transformers fills and clears the inputs of steps on the current stream, or copies to them on a
    second one, and computes on a third; neither waits for the current one. On a GPU that other
    processes kept busy, what clears them at the start of a session came behind the copies of the
    first two batches, whose keys and values then went to no place, whatever the attention.
    """
    for name in ("ContinuousBatchingIOs", "ContinuousBatchingAsyncIOs"):
        kind = _known(input_outputs, name)
        kind.get_model_kwargs = _behind_the_current_stream(_known(kind, "get_model_kwargs"))


def _behind_the_current_stream(get_model_kwargs):
    """What is called when the inputs are filled, and nothing is enqueued yet that reads them."""

    @functools.wraps(get_model_kwargs)
    def called(self, *args, **kwargs):
        for name in ("h2d_stream", "compute_stream"):
            stream = getattr(self, name, None)
            if stream is not None and stream.device.type == "cuda":
                stream.wait_stream(torch.cuda.current_stream(stream.device))
        return get_model_kwargs(self, *args, **kwargs)

    return called


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as an `AttentionInterface` of transformers has it.

    Parameters
    ----------
    module : the layer's attention module
    query : tensor [batch, num_heads, new tokens, head_size]
        See `cupy_cache.paged_attention` for its dtypes and head sizes: on a GPU not float32.
    key, value : tensor [batch, num_kv_heads, tokens, head_size or head_size_v]
        What the cache returned.
    attention_mask : tensor [batch, tokens], optional
        Which tokens are no padding.
    scaling, is_causal, sliding_window, softcap, s_aux
        Of the layer. ``s_aux`` are sinks.
    dropout : 0.0
    **kwargs
        Of continuous batching: where the pages are. Others are ignored.

    Returns
    -------
    (tensor [batch, new tokens, num_heads, head_size_v], None)

    Raises
    ------
    CupyCacheError
        One of its kinds. Also where a gradient would be needed.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options = {
        "scale": scaling,
        "sliding_window": sliding_window or None,
        "soft_cap": softcap or None,
        "sinks": s_aux,
        "causal": bool(is_causal),
    }
    layer = getattr(key, OF_LAYER, None)
    try:
        _check(query, attention_mask, dropout, kwargs.get("position_bias"))
        if layer is not None:
            return layer.attend(query, key, value, attention_mask, options), None
    except BaseException:
        if layer is not None:
            layer.give_up(key)
        raise
    if kwargs.get("cu_seq_lens_q") is not None:
        return _batched(module, query, key, value, options, kwargs), None
    return _dense(query, key, value, attention_mask, options), None


def _check(query, mask, dropout, bias):
    """Refuse what is not done."""
    _refuse("dropout", dropout != 0, "0.0", dropout)
    _refuse("position_bias", bias is not None, "None", "a tensor")
    if query.requires_grad and torch.is_grad_enabled():
        expected, way_out = "one that needs no gradient", "call the model under torch.no_grad()"
        raise errors.wrong("kind", "attention: query", expected, "one that does", way_out)
    if mask is not None and mask.ndim != 2:
        expected, got = "[batch, tokens], of padding alone", str(list(mask.shape))
        raise errors.wrong("shape", "attention: attention_mask", expected, got)


def _refuse(argument, when, expected, got):
    if when:
        raise errors.wrong("value", f"attention: {argument}", expected, got)


def rows(states: torch.Tensor) -> torch.Tensor:
    """[batch, heads, tokens, size] -> [batch * tokens, heads, size]"""
    return states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])


# --- keys and values that are not in pages


def is_plain(new, options):
    """Whether torch's attention does the same for sequences that are new."""
    window = options["sliding_window"]
    if options["soft_cap"] is not None or options["sinks"] is not None:
        return False
    return options["causal"] and (window is None or window >= new)


def dense_causal(query, key, value, scale):
    """Attention of sequences to themselves by torch: [batch, tokens, heads, size]."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    ).transpose(1, 2)


def _dense(query, key, value, mask, options):
    """Attention to keys and values [batch, heads, tokens, size]."""
    batch, heads, new, _ = query.shape
    tokens = key.shape[2]
    if mask is not None:
        if mask.shape[1] < tokens:  # a static cache has room that is not used yet
            mask = torch.nn.functional.pad(mask, (0, tokens - mask.shape[1]))
        _refuse(
            "attention_mask",
            mask.shape[1] != tokens,
            f"of {errors.counted(tokens, 'token')}",
            mask.shape[1],
        )
        return _padded(query, key, value, mask.bool(), options)
    # Each sequence is one page.
    of = {"dtype": torch.int32, "device": query.device}
    table = torch.arange(batch, **of)[:, None]
    lengths = torch.full((batch,), tokens, **of)
    starts = torch.arange(batch + 1, **of) * new if new > 1 else None
    pages = (states.transpose(1, 2) for states in (key, value))
    out = paged_attention(
        rows(query), *pages, table, lengths, query_start_loc=starts, **options
    )  # fmt: skip
    return out.view(batch, new, heads, -1)


def _padded(query, key, value, mask, options):
    """Likewise; tokens where ``mask`` is False are not there."""
    batch, heads, new, _ = query.shape
    here = mask[:, -new:].flatten()
    starts, bounds = (_bounds(part.sum(1)) for part in (mask[:, -new:], mask))
    key, value = (states.transpose(1, 2)[mask] for states in (key, value))
    found = _ragged(rows(query)[here], key, value, starts, bounds, mask.shape[1], options)
    out = found.new_zeros((batch * new, heads, found.shape[2]))
    out[here] = found
    return out.view(batch, new, heads, -1)


def _ragged(query, key, value, starts, bounds, longest, options):
    """Attention of [tokens, heads, size], one sequence behind the other. Pages are of one token."""
    table = bounds[:-1, None] + torch.arange(longest, dtype=bounds.dtype, device=bounds.device)
    return paged_attention(
        query, key[:, None], value[:, None], table, bounds.diff(), query_start_loc=starts, **options
    )


def _bounds(counts):
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


# --- continuous batching


class _Step(threading.local):
    """What the layers of one forward pass have in common: computed by the first one.

    A layer that does not come behind the last one begins another forward pass. Nothing else tells:
    tensors are filled anew in their places, and graphs are captured with those of the pass before.
    """

    layer = -1

    def __init__(self):
        self.known = {}

    def of(self, layer, tensor, make):
        if layer <= self.layer:
            self.known.clear()
        self.layer = layer
        place = tensor.data_ptr(), tensor.shape
        if place not in self.known:
            # The tensor is kept, so that no other comes to lie in its place.
            self.known[place] = tensor, make()
        return self.known[place][1]


_step = _Step()


def _batched(module, query, key, value, options, given):
    """Attention of a batch of continuous batching, or of sequences that are packed in one row."""
    new = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    layer, cache = getattr(module, "layer_idx", 0), given.get("cache")
    bounds = given["cu_seq_lens_k"]
    if given.get("k_cache") is not None:  # transformers 5.24 has chosen a layer's pages
        # Both see the pages of keys and of values, which take turns: here each sees its own.
        pages = given["k_cache"][::2], given["v_cache"][::2]
        return _decode(layer, *new, pages, given["block_table"], bounds, options, 2)[None]
    longest = given.get("max_seqlen_k", given.get("max_length_k"))
    if not hasattr(cache, "layer_index_to_group_indices"):  # keys and values are read already
        starts = given["cu_seq_lens_q"]
        if longest is None:
            longest = int(bounds.diff().max())
        return _ragged(*new, starts, bounds, longest, options)[None]

    group, index = cache.layer_index_to_group_indices[layer]
    windowed = cache.sliding_windows[layer] != 1
    if isinstance(bounds, dict):
        kind = "sliding_attention" if windowed else "full_attention"
        bounds, longest = bounds[kind], longest[kind]
    if windowed:  # its pages are a ring
        # What transformers gathers there ended in a failed assertion of torch on the device.
        expected = "False for a model whose layers have a sliding window"
        _refuse("use_cuda_graph", _is_captured(query), expected, "a capture")
        read, write = given["read_index"], given["write_index"]
        keys_and_values = cache.update(key, value, layer, read, write)
        return _ragged(
            new[0], *keys_and_values, given["cu_seq_lens_q"], bounds, longest, options
        )[None]  # fmt: skip
    shape = -1, cache.block_size, *cache.key_cache[index].shape[1:]
    pages = cache.key_cache[index].view(shape), cache.value_cache[index].view(shape)
    if given.get("block_table") is not None:
        return _decode(layer, *new, pages, given["block_table"][group], bounds, options)[None]
    slots = given["write_index"][group]
    reshape_and_cache_flash(new[1], new[2], *pages, slots)
    # Where each token is tells where each page is. Prompts that are new are nowhere but there.
    places = given["read_index"][group]
    places = places if places.numel() else slots
    table, lengths = _step.of(
        layer, places, lambda: _table(places, bounds, longest, cache.block_size)
    )
    out = paged_attention(
        new[0], *pages, table, lengths, query_start_loc=given["cu_seq_lens_q"], **options
    )
    return out[None]


def _is_captured(query):
    """Whether a graph is being captured of what is done with ``query``."""
    if not query.is_cuda:
        return False
    with torch.cuda.device(query.device):  # the stream that is asked about is the current GPU's
        return torch.cuda.is_current_stream_capturing()


def _table(places, bounds, longest, block_size):
    """The block table and the lengths of sequences, of which each token's slot is known."""
    first = torch.arange(0, longest, block_size, dtype=bounds.dtype, device=bounds.device)
    first = (bounds[:-1, None] + first).clamp_(max=places.numel() - 1)
    return places[first] // block_size, bounds.diff()


def _decode(layer, query, key, value, pages, table, bounds, options, every=1):
    """A step of one token of each sequence. Of the pages that the table counts, ``every`` one is in
    ``pages``."""
    table, slots, lengths = _step.of(
        layer, table, lambda: _slots(table, every, bounds, pages[0].shape[1])
    )
    reshape_and_cache_flash(key, value, *pages, slots)
    return paged_attention(query, *pages, table, lengths, **options)


def _slots(table, every, bounds, block_size):
    """The table of the blocks that are counted, the slots of the last tokens, -1 in rows of no
    sequence, and the lengths."""
    table = table // every if every > 1 else table
    lengths = bounds.diff()
    last = lengths.long() - 1
    position = last.clamp(min=0)
    blocks = table.gather(1, (position // block_size)[:, None])[:, 0]
    slots = torch.where(last < 0, last, blocks * block_size + position % block_size)
    return table, slots, lengths
