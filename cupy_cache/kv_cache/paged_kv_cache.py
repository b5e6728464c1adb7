# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The caches of a model's layers as one object, which decides once what depends on them alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

from .. import errors
from ..attention import paged_attention
from ..errors import ArgumentError, CupyCacheError, DTypeError, ShapeError
from ..ops import (
    concat_and_cache_mla,
    concat_and_cache_mla_rope_fused,
    copy_blocks,
    reshape_and_cache,
    reshape_and_cache_flash,
    rotary_and_cache,
    swap_blocks,
)
from ..runtime import contract, dispatch, lists, streams
from ..types import ArrayLike, Layers, Pairs, Scale, StreamLike, Writer

MAX_ATTENDERS = 16  # of one layer
_ATTEND = "PagedKVCache.attend"
_ROTARY = "PagedKVCache.rotary_write"


class PagedKVCache:
    """Paged caches of all layers of a model, for callers to whom a microsecond a call matters.

    The functions of this library read their arguments at every call: of `copy_blocks` for 32 layers
    these are 64 arrays. This object reads the caches once, but for `swap_blocks`, which reads those
    of both sides at every call. Its methods mean what the functions of the same arguments mean,
    with the same checks and errors, which name the method.

    Parameters
    ----------
    key_caches : list of arrays
        One for each layer, all of the same shape, strides, dtype and device:
        [num_blocks, block_size, num_kv_heads, head_size], written by `reshape_and_cache_flash`;
        [num_blocks, num_kv_heads, head_size / x, block_size, x], by `reshape_and_cache`; or, with
        no ``value_caches``, [num_blocks, block_size, entry_size], by `concat_and_cache_mla`. The
        number of dimensions tells which.
    value_caches : list of arrays, optional
        Likewise, as many. Beside x-packed keys, five dimensions mean interleaved values,
        [num_blocks, num_kv_heads, block_size / x, head_size_v, x].
    kv_cache_dtype : str
        See the function that writes.
    k_scales, v_scales : float, array, or list of these with one for each layer, optional
        The scales of `reshape_and_cache_flash`, or of `reshape_and_cache`; of
        `concat_and_cache_mla` only ``k_scales``; there ``v_scales`` is refused. A number or an
        array is for all layers.

    Raises
    ------
    CupyCacheError
        One of its kinds, where the lists or the scales do not fit each other; the writing
        functions' errors come at the first write.

    Notes
    -----
    The arrays are kept alive. Their memory must stay where it is for as long as this object is
    used: the addresses that they had at first are what is written to.
    """

    key_caches: list[Any]
    value_caches: list[Any] | None

    def __init__(
        self,
        key_caches: Layers,
        value_caches: Layers | None = None,
        kv_cache_dtype: str = "auto",
        k_scales: Scale | Sequence[Scale] = None,
        v_scales: Scale | Sequence[Scale] = None,
    ) -> None:
        try:
            self._bind(key_caches, value_caches, kv_cache_dtype, k_scales, v_scales)
        except CupyCacheError as error:
            errors.rename(error, "PagedKVCache", {"k_scale": "k_scales", "v_scale": "v_scales"})
            raise

    def _bind(self, key_caches, value_caches, kv_cache_dtype, k_scales, v_scales):
        if value_caches is None:
            if v_scales is not None:
                raise ArgumentError(
                    "PagedKVCache: Invalid value of v_scales: expected None, since there are no "
                    f"value caches, got {v_scales!r:.80}"
                )
            op, given = copy_blocks.MLA_OP, {"kv_caches": key_caches}
        else:
            op = copy_blocks.OP
            given = {"key_caches": key_caches, "value_caches": value_caches}
        for name, caches in given.items():
            lists.require_list("PagedKVCache", name, caches)
        self._copy = dispatch.Bound(op, given, name="PagedKVCache.copy_blocks")
        self._copy.check()
        self.key_caches = list(key_caches)
        self.value_caches = None if value_caches is None else list(value_caches)
        k_scales = _for_each_layer("k_scales", k_scales, len(self))
        v_scales = _for_each_layer("v_scales", v_scales, len(self))
        self._kv_cache_dtype, self._scales = kv_cache_dtype, list(zip(k_scales, v_scales))
        self._attenders: dict[tuple, Any] = {}
        # Not a list: that has layers of negative numbers, too.
        self._writers = {
            layer: self._writer(layer, kv_cache_dtype, k_scales[layer], v_scales[layer])
            for layer in range(len(self))
        }

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.key_caches)

    def _writer(self, layer, kv_cache_dtype, k_scale, v_scale):
        fixed, options = {}, (kv_cache_dtype,)
        if self.value_caches is None:
            op = concat_and_cache_mla.OP
            fixed["kv_cache"] = self.key_caches[layer]
            names = ("scale",)
            scales, scalars = concat_and_cache_mla.scales_of("k_scales", kv_cache_dtype, k_scale)
            options = (kv_cache_dtype, concat_and_cache_mla.SCALE_RULES[0])
        else:
            op, names = reshape_and_cache_flash.OP, ("k_scale", "v_scale")
            keys, values = (len(found.metadata.shape) for found in self._copy.found[:2])
            if keys == 5:
                op, options = reshape_and_cache.OP, (kv_cache_dtype, values == 5)
            fixed["key_cache"] = self.key_caches[layer]
            fixed["value_cache"] = self.value_caches[layer]
            scales, scalars = contract.split_scales(op.name, kv_cache_dtype, k_scale, v_scale)
        fixed |= {name: scale for name, scale in zip(names, scales) if scale is not None}
        return dispatch.Bound(op, fixed, options, scalars, name="PagedKVCache.write")

    def writer(self, layer: int) -> Writer:
        """`write` for one layer, as a function of the other arguments: the cheapest call."""
        try:
            return self._writers[layer]
        except (KeyError, TypeError):
            raise self._no_layer("writer", layer) from None

    def _no_layer(self, method, layer):
        layers = f"a layer in 0..{len(self) - 1}" if len(self) else "no layer, as there are none"
        name = f"PagedKVCache.{method}: layer"
        return ArgumentError(errors.wrong("value", name, layers, repr(layer)))

    def write(
        self,
        layer: int,
        key: ArrayLike,
        value: ArrayLike,
        slot_mapping: ArrayLike,
        *,
        stream: StreamLike | None = None,
    ) -> None:
        """Write one step's keys and values into a layer's caches.

        Parameters
        ----------
        layer : int
            From 0 on.
        key, value, slot_mapping, stream
            As for `reshape_and_cache_flash` or `reshape_and_cache`; without value caches ``kv_c``,
            ``k_pe`` and ``slot_mapping`` of `concat_and_cache_mla`.
        """
        try:
            bound = self._writers[layer]
        except (KeyError, TypeError):
            raise self._no_layer("write", layer) from None
        if stream is None:  # what the call of ``bound`` begins with: an engine's every layer
            given = key, value, slot_mapping
            for path in bound.fast_paths:
                if path(given, bound.scalars, None, bound):
                    return
        bound(key, value, slot_mapping, stream=stream)

    def rotary_write(
        self,
        layer: int,
        positions: ArrayLike,
        query: ArrayLike,
        key: ArrayLike,
        value: ArrayLike,
        cos_sin_cache: ArrayLike,
        slot_mapping: ArrayLike,
        is_neox: bool = True,
        *,
        rope_dim_offset: SupportsIndex = 0,
        mrope_section: Sequence[SupportsIndex] | None = None,
        mrope_interleaved: bool = False,
        norm_eps: float | None = None,
        q_norm_weight: ArrayLike | None = None,
        k_norm_weight: ArrayLike | None = None,
        norm_weight_bias: float = 0.0,
        out: ArrayLike | None = None,
        out_dtype: str = "auto",
        q_scale: Scale = None,
        rounding: Literal["once", "steps"] = "once",
        stream: StreamLike | None = None,
    ) -> None:
        """Rotate one step's queries and keys, and write the keys and the values into a layer's
        caches, in one launch. The caches are read again at each call.

        Parameters
        ----------
        layer : int
            From 0 on.
        positions, query, key, value, cos_sin_cache, slot_mapping, is_neox, stream
            As for `rotary_and_cache`; without value caches ``positions``, ``q_pe``, ``k_pe``,
            ``kv_c``, ``cos_sin_cache``, ``slot_mapping`` and ``is_neox`` of
            `concat_and_cache_mla_rope_fused`, which rotates ``k_pe`` in place, too.
        rope_dim_offset, mrope_section, mrope_interleaved, norm_eps, q_norm_weight, k_norm_weight,
        norm_weight_bias, out, out_dtype, q_scale, rounding
            As for `rotary_and_cache`; without value caches they are refused.
        """
        try:
            k_scale, v_scale = self._scales[self._known("rotary_write", layer)]
            options = {
                "rope_dim_offset": rope_dim_offset, "mrope_section": mrope_section,
                "mrope_interleaved": mrope_interleaved, "norm_eps": norm_eps,
                "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight,
                "norm_weight_bias": norm_weight_bias, "out": out, "out_dtype": out_dtype,
                "q_scale": q_scale, "rounding": rounding,
            }  # fmt: skip
            if self.value_caches is None:
                for name, option in options.items():
                    usual = _USUAL.get(name)
                    if option is not usual and (usual is None or option != usual):
                        expected = f"{usual!r} where there are no value caches"
                        name = f"{_ROTARY}: {name}"
                        raise ArgumentError(
                            errors.wrong("value", name, expected, contract.shown(option))
                        )
                concat_and_cache_mla_rope_fused.concat_and_cache_mla_rope_fused(
                    positions, query, key, value, cos_sin_cache, is_neox, slot_mapping,
                    self.key_caches[layer], self._kv_cache_dtype, k_scale, stream=stream,
                )  # fmt: skip
                return
            rotary_and_cache.rotary_and_cache(
                positions, query, key, value, cos_sin_cache, self.key_caches[layer],
                self.value_caches[layer], slot_mapping, is_neox, self._kv_cache_dtype, k_scale,
                v_scale, stream=stream, **options,
            )  # fmt: skip
        except CupyCacheError as error:
            errors.rename(error, _ROTARY, _ROTATED)
            raise

    def _known(self, method, layer):
        """``layer``, which must be one: lists have layers of negative numbers, too."""
        try:
            self._writers[layer]
        except (KeyError, TypeError):
            raise self._no_layer(method, layer) from None
        return layer

    def attend(
        self,
        layer: int,
        query: ArrayLike,
        block_table: ArrayLike,
        seq_lens: ArrayLike,
        *,
        query_start_loc: ArrayLike | None = None,
        scale: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        sinks: ArrayLike | None = None,
        causal: bool = True,
        out: ArrayLike | None = None,
        lse: ArrayLike | None = None,
        stream: StreamLike | None = None,
    ) -> Any:
        """Attend from one step's queries to a layer's pages.

        Parameters
        ----------
        layer : int
        query, block_table, seq_lens, query_start_loc, out, lse, stream
            As for `paged_attention`, and so is what is returned.
        scale, alibi_slopes, sliding_window, soft_cap, sinks, causal
            Likewise. Their combination is remembered for the layer, and the arrays among them are
            kept, as the caches are: give the same ones at each step.
        """
        options = scale, sliding_window, soft_cap, contract.flag(_ATTEND, "causal", causal)
        given = query_start_loc is not None, lse is not None
        kinds = tuple(map(type, options))  # True equals 1
        key = layer, options, kinds, id(alibi_slopes), id(sinks), given
        try:
            bound = self._attenders.get(key)
        except TypeError:  # what cannot be hashed is not remembered, and may be refused
            key = bound = None
        if bound is None:
            bound = self._attender(layer, *options, alibi_slopes, sinks, *given)
            if len(self._attenders) >= MAX_ATTENDERS * len(self):
                self._attenders.clear()
            if key is not None:
                self._attenders[key] = bound
        if out is None:
            if stream is not None:
                stream = streams.pointer(_ATTEND, stream)
            out = paged_attention.new_out(_ATTEND, query, *self._caches_of(layer), stream)
        step = query, block_table, seq_lens, query_start_loc, out, lse
        bound(*(array for array in step if array is not None), stream=stream)
        return out

    def _attender(
        self, layer, scale, sliding_window, soft_cap, causal, alibi_slopes, sinks, with_starts,
        with_lse,
    ):  # fmt: skip
        objects, options, scalars = paged_attention.arguments(
            _ATTEND, *self._caches_of(layer), scale, alibi_slopes, sliding_window, soft_cap, sinks,
            causal, self._kv_cache_dtype, *self._scales[layer],
        )  # fmt: skip
        names = "key_cache", "value_cache", "alibi_slopes", "sinks", "k_scale", "v_scale"
        fixed = {name: array for name, array in zip(names, objects) if array is not None}
        also = ["query_start_loc"] * with_starts + ["lse"] * with_lse
        return dispatch.Bound(paged_attention.OP, fixed, options, scalars, name=_ATTEND, also=also)

    def _caches_of(self, layer):
        """The key and the value cache that `attend` reads."""
        if self.value_caches is None:
            expected = "key and value caches to attend to"
            got = "entries of latent attention"
            raise ArgumentError(errors.wrong("kind", f"{_ATTEND}: caches", expected, got))
        self._known("attend", layer)
        return self.key_caches[layer], self.value_caches[layer]

    def copy_blocks(self, block_mapping: Pairs, *, stream: StreamLike | None = None) -> None:
        """Copy blocks within every layer: see `copy_blocks`. The host's time does not depend on the
        number of layers, as long as their pointers fit one launch."""
        self._copy(block_mapping, stream=stream)

    def swap_blocks(
        self, other: PagedKVCache, block_mapping: Pairs, *, stream: StreamLike | None = None
    ) -> None:
        """Copy blocks of every layer to those of ``other``, a `PagedKVCache` with as many layers of
        like blocks, on the same GPU or in host memory: see `swap_blocks`.

        Parameters
        ----------
        other : PagedKVCache
        block_mapping : sequence of (block here, block there), or array [num_pairs, 2]
            In host memory.
        stream : optional
            See `swap_blocks`.
        """
        name = "PagedKVCache.swap_blocks"
        if not isinstance(other, PagedKVCache):
            got = type(other).__name__
            raise DTypeError(errors.wrong("type", f"{name}: other", "a PagedKVCache", got))
        mine, theirs = (
            "key caches alone" if caches.value_caches is None else "key and value caches"
            for caches in (self, other)
        )
        if mine != theirs:
            raise ShapeError(errors.wrong("kind", f"{name}: other", mine, theirs))
        caches = (
            self.key_caches, other.key_caches, self.value_caches, other.value_caches
        )  # fmt: skip
        try:
            swap_blocks.OP((*caches, block_mapping), (None,), stream)
        except CupyCacheError as error:
            errors.rename(error, name, _SWAPPED)
            raise


# What options of `rotary_write` are that are not given, where that is not None.
_USUAL = {
    "rope_dim_offset": 0, "mrope_interleaved": False, "norm_weight_bias": 0.0, "out_dtype": "auto",
    "rounding": "once",
}  # fmt: skip
# What the arguments of operations that rotate are called here.
_ROTATED = {
    "q_pe": "query", "k_pe": "key", "kv_c": "value", "kv_cache": "key_caches",
    "key_cache": "key_caches", "value_cache": "value_caches", "kv_cache_scale": "k_scales",
    "k_scale": "k_scales", "v_scale": "v_scales",
}  # fmt: skip
# What the arguments of a swap are called here.
_SWAPPED = {
    "src": "key_caches", "dst": "other.key_caches", "src_values": "value_caches",
    "dst_values": "other.value_caches",
}  # fmt: skip


def _for_each_layer(name, scales, layers):
    if not isinstance(scales, (list, tuple)):
        return [scales] * layers
    if len(scales) != layers:
        raise ArgumentError(
            f"PagedKVCache: Invalid length of {name}: expected one scale for each of {layers} "
            f"layers, got {len(scales)}"
        )
    return list(scales)
