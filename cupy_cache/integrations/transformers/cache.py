# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a model of transformers in pages."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ... import BlockTables, PagedKVCache, errors
from ...errors import CopyError
from ...runtime import contract, formats
from ...types import Scale
from .attention import NAMES, OF_LAYER, dense_causal, is_plain, rows

NAME = "PagedCache"
LAYER_TYPES = {"full_attention", "sliding_attention"}
AHEAD = 256  # tokens of a sequence that there is room for behind its prompt


class PagedCache(Cache):
    """A cache for ``generate`` with keys and values in a `PagedKVCache`.

    Give it as ``past_key_values``, which transformers 5.24 calls ``cache``. With the attention
    implementations of this module, queries attend to the pages where they are; with others, such as
    "sdpa" and "eager", each layer's keys and values are gathered at each step. Beams share blocks,
    and a block is copied when one of them writes into it.

    Padding must be on the left of what is new in each call. With the attention implementations of
    this module it takes no place. Prompts of an empty cache without padding, whose keys are all at
    hand, are left to torch's attention, which is the faster one there.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model. Every layer must have full or sliding attention, and all as many heads of the
        same size, on one device.
    block_size : int
        Tokens of a block.
    max_length : int, optional
        Tokens of a sequence that there is room for from the first one on. Without it, and behind
        that, the room is doubled when it is used up: both are there while pages are moved.
    kv_cache_dtype, k_scales, v_scales
        As of `PagedKVCache`: "auto", "fp8", "int8" and so on.

    Attributes
    ----------
    pages : PagedKVCache, or None
        None before the first call.
    tables : BlockTables, or None
        Who has which blocks. The sequences' names are `rows`.
    rows : list of int
        The name of each row's sequence.

    Raises
    ------
    CupyCacheError
        One of its kinds, also from what transformers calls.

    Examples
    --------
    >>> cache = PagedCache(model.config)  # doctest: +SKIP
    >>> model.set_attn_implementation("cupy_cache")  # doctest: +SKIP
    >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    pages: PagedKVCache | None
    tables: BlockTables | None
    rows: list[int]

    def __init__(
        self,
        config: PreTrainedConfig,
        block_size: int = 16,
        *,
        max_length: int | None = None,
        kv_cache_dtype: str = "auto",
        k_scales: Scale | list[Scale] = None,
        v_scales: Scale | list[Scale] = None,
    ) -> None:
        self._config = config.get_text_config(decoder=True)
        others = {*(getattr(self._config, "layer_types", None) or ())} - LAYER_TYPES
        if others:
            expected = "full_attention and sliding_attention as layer_types"
            got = ", ".join(sorted(others))
            raise errors.wrong("value", f"{NAME}: config", expected, got)
        self._block_size = contract.integer(NAME, "block_size", block_size, 1)
        self._sized = 0
        if max_length is not None:
            self._sized = contract.integer(NAME, "max_length", max_length, 1)
        self._is_raw = kv_cache_dtype in formats.RAW
        self._format = {
            "kv_cache_dtype": kv_cache_dtype, "k_scales": k_scales, "v_scales": v_scales
        }  # fmt: skip
        super().__init__(
            layers=[_Layer(self, index) for index in range(self._config.num_hidden_layers)]
        )
        self.pages = self.tables = None
        self._forget()

    def _forget(self):
        self.rows, self._next_name = [], 0
        self._length = 0  # columns, padding included
        # Columns of padding: (first column of a call, how many of each row).
        self._padding: list[tuple[int, list[int]]] = []
        self._step, self._waiting = None, None
        for layer in self.layers:
            layer.length = 0

    def __repr__(self) -> str:
        sequences = errors.counted(len(self.rows), "sequence")
        return (
            f"<{NAME} of {sequences}, {errors.counted(self._length, 'token')} each: {self.pages}>"
        )

    def __reduce__(self) -> Any:
        if self.pages is not None:
            raise CopyError(
                f"{NAME}: it cannot be copied or pickled once it has pages; make a new one, or "
                "repeat rows with batch_repeat_interleave"
            )
        make = functools.partial(type(self), max_length=self._sized or None, **self._format)
        return make, (self._config, self._block_size)

    @property
    def attends(self) -> bool:
        """Whether the model's attention is that of this module."""
        return self._config._attn_implementation in NAMES

    # --- what transformers asks for

    def reset(self) -> None:
        """Forget all tokens. The memory is kept."""
        for name in self.rows:
            self.tables.free(name)
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each row.

        Parameters
        ----------
        tokens_to_remove : int
            Minus their number. Above 0: how many tokens are to stay.
        """
        length = int(tokens_to_remove)  # assisted generation gives a tensor
        if length <= 0:
            length = max(self._length + length, 0)
        if length >= self._length:
            return
        for row, name in enumerate(self.rows):
            self.tables.truncate(name, self._real(row, length))
        self._padding = [(start, counts) for start, counts in self._padding if start < length]
        self._set_length(length)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Have row ``i`` go on with what row ``beam_idx[i]`` holds."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each row ``repeats`` times."""
        self._select([row for row in range(len(self.rows)) for _ in range(repeats)])

    def _select(self, chosen):
        if not self._length or chosen == list(range(len(self.rows))):
            return
        names = self.rows[: len(chosen)]
        names += [self._new_name() for _ in range(len(chosen) - len(names))]
        self.tables.reorder(names, [self.rows[row] for row in chosen])
        for name in self.rows[len(chosen) :]:
            self.tables.free(name)
        self.rows, self._step = names, None
        self._padding = [
            (start, [counts[row] for row in chosen]) for start, counts in self._padding
        ]

    def _new_name(self):
        self._next_name += 1
        return self._next_name

    def _set_length(self, length):
        self._length, self._step, self._waiting = length, None, None
        for layer in self.layers:
            layer.length = length

    def _real(self, row, length):
        """How many of a row's first columns are no padding."""
        pads = (
            min(counts[row], length - start) for start, counts in self._padding if start < length
        )
        return length - sum(pads)

    # --- a step

    def _begin(self, layer, key, value, mask):
        """What the layers of a forward pass have in common: see `_Step`."""
        batch, _, new, _ = key.shape
        if layer.length == self._length and self._step is not None:
            return self._step  # another layer began it
        if layer.length != self._length + new:
            expected = f"{errors.counted(self._length, 'token')} before this call"
            got = f"{layer.length - new} in layer {layer.index}"
            way_out = "if a call before has failed, reset() the cache, or crop() it"
            raise errors.wrong("order", f"{NAME}: layers", expected, got, way_out)
        if self.rows and len(self.rows) != batch:
            expected = f"[{len(self.rows)}, ...], as many sequences as before"
            raise errors.wrong("shape", f"{NAME}: key_states", expected, list(key.shape))
        counts, here = [new] * batch, None
        if mask is not None:
            counts, here = self._counts(mask, new)
        if not self.rows:
            self.rows = [self._new_name() for _ in range(batch)]
            if self.tables is not None:
                for name in self.rows:
                    self.tables.add(name)
        self._make_room(key, value, counts)
        found = self.tables.step(self.rows, counts)
        self.pages.copy_blocks(found.copies)
        if here is not None:
            self._padding.append((self._length, [new - count for count in counts]))
        self._length += new
        starts = None if new == 1 and here is None else found.query_start_loc
        bounds = None
        if not self.attends:
            bounds = torch.arange(batch + 1, dtype=torch.int32, device=key.device) * self._length
        self._step = _Step(found, here, starts, bounds)
        return self._step

    def _counts(self, mask, new):
        """(New tokens of each row that are no padding, where they are among all new ones); None
        instead, where all are."""
        batch, columns = mask.shape
        if columns != self._length + new:
            expected = f"[batch, {self._length + new}]"
            name = f"{NAME}: attention_mask"
            raise errors.wrong("shape", name, expected, list(mask.shape))
        last = mask[:, self._length :].bool()
        counts = last.sum(1).tolist()
        if counts == [new] * batch:
            return counts, None
        if (last[:, :-1] & ~last[:, 1:]).any():
            name = f"{NAME}: attention_mask"
            raise errors.wrong("value", name, "padding on the left of what is new", "another order")
        return counts, last.flatten().nonzero()[:, 0]

    def _make_room(self, key, value, counts):
        """Have blocks, and arrays for a step's numbers, for new tokens."""
        lengths = [0] * len(self.rows)
        old, tables = self.pages, self.tables
        if tables is not None:
            lengths = [tables.length(name) for name in self.rows]
        longest = max(length + count for length, count in zip(lengths, counts))
        if tables is not None and (
            longest <= tables.max_length
            and len(counts) <= tables.max_sequences
            and tables.blocks_needed(self.rows, counts) <= tables.pool.num_free
        ):
            return
        known = 0
        if tables is not None:
            known = tables.max_length * (2 if longest > tables.max_length else 1)
        longest = max(self._sized, longest + AHEAD if not any(lengths) else longest, known)
        # A copy of a shared block is there before its last user has left.
        num_blocks = len(counts) * (-(-longest // self._block_size) + 1)
        self.pages = PagedKVCache.allocate(
            len(self.layers), num_blocks, self._block_size, key.shape[1], key.shape[3],
            head_size_v=value.shape[3], dtype=key.dtype, framework="torch", device=key.device,
            **self._format,
        )  # fmt: skip
        self.tables = BlockTables(
            num_blocks, self._block_size, max_sequences=len(counts),
            max_tokens=len(counts) * longest, max_length=longest, reuse_prefixes=False,
            framework="torch", device=key.device,
        )  # fmt: skip
        for name in self.rows:
            self.tables.add(name)
        if any(lengths):
            self.tables.extend(self.rows, lengths)
            pairs = (zip(tables.blocks(name), self.tables.blocks(name)) for name in self.rows)
            old.swap_blocks(self.pages, [pair for row in pairs for pair in row])

    def _gathered(self, layer, dtype):
        """All keys and values of a layer, [batch, heads, tokens, size]."""
        if self._padding:
            expected, way_out = "one of this module, as before", "what was padding was not kept"
            name, got = f"{NAME}: attn_implementation", self._config._attn_implementation
            raise errors.wrong("value", name, expected, got, way_out)
        batch, length = len(self.rows), self._length
        found = self.pages.gather(
            layer.index, self._step.found.block_table, self._step.bounds,
            num_tokens=batch * length, dtype=dtype,
        )  # fmt: skip
        return tuple(rows.view(batch, length, *rows.shape[1:]).transpose(1, 2) for rows in found)


class _Step(NamedTuple):
    """What the layers of a forward pass have in common.

    found : the step of `BlockTables`.
    here : where new tokens are that are no padding, among all of the batch; None where all are.
    starts : of each sequence's queries; None where each has one.
    bounds : of each sequence's columns, where layers are gathered.
    """

    found: Any
    here: torch.Tensor | None
    starts: torch.Tensor | None
    bounds: torch.Tensor | None


class _Layer(CacheLayerMixin):
    """What transformers sees of a layer. ``length`` counts the new tokens of a call already."""

    is_sliding = False  # all tokens are kept; attention looks at those of the window
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache, index):
        super().__init__()
        self._cache, self.index, self.length = weakref.ref(cache), index, 0
        self.is_initialized = True

    @property
    def cache(self):
        """Whose layer it is. It does not keep it: its memory is free as soon as it is dropped."""
        return self._cache()

    def lazy_initialization(self, key_states, value_states):
        """Pages come with the first keys and values."""

    def get_mask_sizes(self, query_length):
        return self.length + query_length, 0

    def get_seq_length(self):
        return self.length

    def get_max_length(self):
        return -1

    def update(self, key_states, value_states, *args, **kwargs):
        cache = self.cache
        if cache._waiting is not None:
            expected = "one that gives the cache's keys to its attention"
            got = f"another in layer {cache._waiting.index}"
            raise errors.wrong("kind", f"{NAME}: model", expected, got, 'use it with "sdpa"')
        self.length += key_states.shape[2]
        if cache.attends:  # `attend` has what else it takes
            setattr(key_states, OF_LAYER, self)
            cache._waiting = self
            return key_states, value_states
        step = cache._begin(self, key_states, value_states, None)
        cache.pages.write(
            self.index, rows(key_states), rows(value_states), step.found.slot_mapping
        )  # fmt: skip
        return cache._gathered(self, key_states.dtype)

    def give_up(self, key):
        """A call has failed: forget its keys, unless they have a place already."""
        if self.cache._waiting is self:
            self.cache._waiting = None
            self.length -= key.shape[2]

    def attend(self, query, key, value, mask, options):
        """Write new keys and values, if they are new, and attend to the layer's pages."""
        cache = self.cache
        first = cache._waiting is self and self.length == key.shape[2]
        if cache._waiting is self:
            step = cache._begin(self, key, value, mask)
            cache._waiting = None
            new = (
                states if step.here is None else states[step.here]
                for states in map(rows, (key, value))
            )
            cache.pages.write(self.index, *new, step.found.slot_mapping)
        step, found = cache._step, cache._step.found
        batch, heads, new, _ = query.shape
        if first and new > 1 and step.here is None and cache._is_raw and is_plain(new, options):
            return dense_causal(query, key, value, options["scale"])
        queries = rows(query)
        if step.here is not None:
            queries = queries[step.here]
        out = cache.pages.attend(
            self.index, queries, found.block_table, found.seq_lens, query_start_loc=step.starts,
            **options,
        )  # fmt: skip
        if step.here is not None:
            found, out = out, out.new_zeros((batch * new, heads, out.shape[2]))
            out[step.here] = found
        return out.view(batch, new, heads, -1)
