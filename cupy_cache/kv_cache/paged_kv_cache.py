# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The caches of all layers as one object, which reads and checks them once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

from .. import errors
from ..attention import paged_attention_mla
from ..errors import CopyError, CupyCacheError, ShapeError
from ..ops import copy_blocks, pack_blocks, swap_blocks, zero_blocks
from ..ops.shared import rotary
from ..runtime import arrays, contract, formats, lists, making, streams
from ..runtime.bound import Bound
from ..types import (
    ArrayLike,
    CacheLayout,
    DeviceLike,
    DTypeLike,
    FrameworkName,
    Indices,
    Layers,
    PackedLayout,
    Pairs,
    Scale,
    StreamLike,
    Writer,
)
from . import allocation, layouts
from .layer import ATTEND, GATHER, ROTARY_WRITE, Layer

MAX_BOUND = 16  # combinations of options of one layer
_ATTEND_MLA = "PagedKVCache.attend_mla"


class PagedKVCache:
    """The paged caches of all layers of a model: the keys and values of many sequences.

    `allocate` makes the arrays; the constructor takes arrays that exist. Methods mean what the
    functions of the same arguments mean, with the same checks and errors, which name the method.

    They take less of the host's time. The functions read their arguments at every call: of
    `copy_blocks` for 32 layers these are 64 arrays. This object reads the caches once for `write`,
    `rotary_write`, `attend`, `gather` and the methods that copy, pack, unpack or zero blocks; the
    others read them at every call.

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
        [num_blocks, num_kv_heads, block_size / x, head_size_v, x]. Of one array for both, such as
        [num_blocks, 2, ...] or [2, num_blocks, ...], give two lists of views.
    kv_cache_dtype : str
        See the function that writes.
    k_scales, v_scales : float, array, or list of these with one for each layer, optional
        The scales of `reshape_and_cache_flash`, or of `reshape_and_cache`; of
        `concat_and_cache_mla` only ``k_scales``; there ``v_scales`` is refused. A number or an
        array is for all layers.

    Attributes
    ----------
    key_caches : list of arrays
        As given, one for each layer.
    value_caches : list of arrays, or None
        Likewise; None where there are none.
    k_scale_caches, v_scale_caches : list of float32 arrays [num_blocks, block_size, num_kv_heads]
        The scales of each layer's tokens and heads, where `allocate` made such caches; else None.
    num_blocks : int
        Blocks of each layer; 0 without layers.
    bytes_per_block : int
        Of one block in all layers, keys and values together: what `pack_blocks` writes for it.
    layout : str
        "NHD", "HND", "packed" (each page holds K|V), "x-packed" or "rows", as `allocate` was told;
        of arrays that were given, as their dimensions and strides say. "" where they are none of
        these.

    Raises
    ------
    CupyCacheError
        One of its kinds, where the lists or the scales do not fit each other. From methods those of
        the functions that they are like, before anything is written; what is wrong with the caches
        for a function that writes is told at the first write.

    Notes
    -----
    The arrays are kept alive. Their memory must stay where it is for as long as this object is
    used: the addresses that they had at first are what is written to. So it cannot be copied or
    pickled: `CopyError`.
    """

    key_caches: list[Any]
    value_caches: list[Any] | None
    k_scale_caches: list[Any] | None
    v_scale_caches: list[Any] | None
    num_blocks: int
    bytes_per_block: int
    layout: str

    def __init__(
        self,
        key_caches: Layers,
        value_caches: Layers | None = None,
        kv_cache_dtype: str = "auto",
        k_scales: Scale | Sequence[Scale] = None,
        v_scales: Scale | Sequence[Scale] = None,
    ) -> None:
        self._bind(key_caches, value_caches, kv_cache_dtype, k_scales, v_scales, None)

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        *,
        head_size_v: int | None = None,
        dtype: DTypeLike = "bfloat16",
        kv_cache_dtype: str = "auto",
        k_scales: Scale | Sequence[Scale] = None,
        v_scales: Scale | Sequence[Scale] = None,
        layout: CacheLayout = "NHD",
        framework: FrameworkName | None = None,
        device: DeviceLike | None = None,
        pinned: bool = False,
    ) -> PagedKVCache:
        """Make the caches of a model, filled with zeros.

        Parameters
        ----------
        num_layers, num_blocks : int
        block_size : int
            Tokens of a block.
        num_kv_heads, head_size : int
            Of the model's layers, on this GPU.
        head_size_v : int, optional
            Of the values, where it differs.
        dtype : str, NumPy or torch dtype
            Of the model's keys and values, and of caches that are raw.
        kv_cache_dtype, k_scales, v_scales
            As of the constructor. Caches of fp8 are arrays of uint8, those of "int8" of int8. With
            "int8_per_token_head" or "fp8_per_token_head" each token and head has a scale, which the
            write finds (`reshape_and_cache_flash_per_token_head`). It is kept in the same block,
            behind the elements. The layout is "NHD" or "HND". Blocks are moved with their scales,
            as they lie in memory, so only between caches of one layout.
        layout : {"NHD", "HND", "packed", "x-packed", "rows"}
            What lies where in memory, with BS slots of a block, H heads, D = head_size, and x
            elements in 16 bytes:

            * "NHD" [num_blocks, BS, H, D], keys and values apart
            * "HND" [num_blocks, H, BS, D], of which the caches are views [num_blocks, BS, H, D]
            * "packed" [num_blocks, BS, H, D + head_size_v]: K|V, of which the caches are views
            * "x-packed" keys [num_blocks, H, D / x, BS, x], values [num_blocks, H, head_size_v, BS]
            * "rows" [num_blocks, BS, head_size]: entries of latent attention. There is one head,
              and no value cache; ``head_size`` is the elements of an entry (576, or 656 bytes with
              kv_cache_dtype "fp8_ds_mla"), of which ``head_size_v`` changes nothing.
        framework : {"torch", "cupy", "numpy"}, optional
            Whose arrays. By default torch's if ``device`` or ``dtype`` is torch's, NumPy's on the
            CPU, and CuPy's on a GPU.
        device : int, str, torch.device or cupy.cuda.Device, optional
            A GPU's index, "cpu", "cuda", "cuda:1" or a device object. By default the current GPU;
            the CPU for NumPy, if ``pinned``, and where there is no GPU or no CuPy.
        pinned : bool
            Host memory that GPUs reach by themselves: the other side of `swap_blocks`.

        Returns
        -------
        PagedKVCache

        Raises
        ------
        CupyCacheError
            One of its kinds. Where memory runs out, the framework's own error.

        Examples
        --------
        >>> cache = PagedKVCache.allocate(2, 64, 16, 4, 32, dtype="float32", device="cpu")
        >>> cache
        <PagedKVCache of 2 layers: keys and values [64, 16, 4, 32], float32, NHD, numpy on cpu, \
2.00 MiB>
        >>> sizes = 2, 256, 16, 4, 32  # its other side, on a machine with a GPU:
        >>> host = PagedKVCache.allocate(*sizes, dtype="float32", pinned=True)  # doctest: +SKIP
        """
        keys, values, pages = allocation.caches(
            "PagedKVCache.allocate", (num_layers, num_blocks, block_size, num_kv_heads, head_size),
            head_size_v, dtype, kv_cache_dtype, layout, framework, device, pinned,
        )  # fmt: skip
        made = cls.__new__(cls)
        made._bind(keys, values, kv_cache_dtype, k_scales, v_scales, pages)
        made.layout = formats.text_of(layout)
        made._dtype = formats.dtype_named(dtype)
        return made

    @errors.renamed("PagedKVCache", {"k_scale": "k_scales", "v_scale": "v_scales"})
    def _bind(self, key_caches, value_caches, kv_cache_dtype, k_scales, v_scales, pages):
        kv_cache_dtype = formats.text_of(kv_cache_dtype) or kv_cache_dtype
        if value_caches is None:
            if v_scales is not None:
                expected = "None, since there are no value caches"
                got = errors.shown(v_scales)
                raise errors.wrong("value", "PagedKVCache: v_scales", expected, got)
            op, given = copy_blocks.MLA_OP, {"kv_caches": key_caches}
        else:
            op = copy_blocks.OP
            given = {"key_caches": key_caches, "value_caches": value_caches}
        # Lists of its own: the caller's may change.
        given = {name: list(lists.plain("PagedKVCache", name, one)) for name, one in given.items()}
        key_caches, value_caches = (*given.values(), None)[:2]
        self.k_scale_caches = self.v_scale_caches = None
        self._moved = key_caches, value_caches
        if pages is not None:  # then blocks are moved as whole pages, with their scales
            self.k_scale_caches, self.v_scale_caches = (side.scales for side in pages)
            self._moved = tuple(side.whole for side in pages)
            given = dict(zip(given, self._moved))
            for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
                if scales is not None:
                    expected = f"None with {kv_cache_dtype}, which finds them"
                    got = errors.shown(scales)
                    raise errors.wrong("value", f"PagedKVCache: {name}", expected, got)
        self._copy = Bound(op, "PagedKVCache.copy_blocks", given)
        self._copy.check()
        self.key_caches = list(key_caches)
        self.value_caches = None if value_caches is None else list(value_caches)
        # The first layer's arrays; empty without layers.
        self._described = [one for one in op.describe(self._copy.found) if one is not None]
        self.num_blocks = self._described[0].shape[0] if key_caches else 0
        self.bytes_per_block = len(self) * sum(
            math.prod(one.shape[1:]) * one.dtype.bytes for one in self._described
        )
        if pages is None:
            found = self._copy.found[: len(self._described)]
            addresses = [layers.addresses for layers in found]
            self.layout = layouts.of_arrays(self._described, addresses)
        elif key_caches:
            sides = zip(given, (key_caches[0], value_caches[0]))
            self._described = [arrays.view(one, f"PagedKVCache: {name}") for name, one in sides]
        # The dtype of `gather`'s new rows. Caches of 8 bits do not tell what was written.
        self._dtype = None
        if key_caches and pages is None and not formats.is_scaled(kv_cache_dtype):
            self._dtype = self._described[0].dtype
        self._kv_cache_dtype = kv_cache_dtype
        of_layers = [
            self.key_caches, self.value_caches or [None] * len(self),
            _for_each_layer("k_scales", k_scales, len(self)),
            _for_each_layer("v_scales", v_scales, len(self)),
            self.k_scale_caches or [None] * len(self), self.v_scale_caches or [None] * len(self),
        ]  # fmt: skip
        self._layers = [
            Layer(self._described, kv_cache_dtype, *of_one) for of_one in zip(*of_layers)
        ]
        # Not a list: that has layers of negative numbers, too.
        self._writers = {at: layer.writer() for at, layer in enumerate(self._layers)}
        # The `bound.Bound`s of all other methods, by what is bound to them.
        self._bound: dict[tuple, Bound] = {}

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.key_caches)

    def __repr__(self) -> str:
        text = f"<PagedKVCache of {errors.counted(len(self), 'layer')}"
        if not self._described:
            return f"{text}>"
        shapes = [str(list(one.shape)) for one in self._described]
        sides = ("entries",) if len(shapes) == 1 else ("keys", "values")
        if len(set(shapes)) == 1:
            sides, shapes = [" and ".join(sides)], shapes[:1]
        stored = self._described[0].dtype.name
        if self._kv_cache_dtype not in (*formats.RAW, stored):
            stored = f"{self._kv_cache_dtype} in {stored}"
        where = f"{self._described[0].framework} on {self._described[0].device}"
        size = self.num_blocks * self.bytes_per_block / 2**20
        size = f"{size / 1024:.2f} GiB" if size >= 1024 else f"{size:.2f} MiB"
        parts = *(map(" ".join, zip(sides, shapes))), stored, self.layout, where, size
        return f"{text}: {', '.join(filter(None, parts))}>"

    def __reduce__(self) -> Any:
        raise CopyError(
            "PagedKVCache: it cannot be copied or pickled: it writes to memory by its address; "
            "move blocks with pack_blocks, or make a new one of other arrays"
        )

    def writer(self, layer: int) -> Writer:
        """`write` for one layer, as a function of the other arguments: the cheapest call."""
        return self._writers[self._index("writer", layer)]

    def _index(self, method, layer):
        """``layer``, if there is such a layer. Lists would take negative numbers, too."""
        name = f"PagedKVCache.{method}"
        if type(layer) is not int:  # True would be layer 1
            layer = contract.integer(name, "layer", layer)
        if layer not in self._writers:
            last = len(self) - 1
            expected = "no layer, as there are none" if last < 0 else f"a layer in 0..{last}"
            raise errors.wrong("value", f"{name}: layer", expected, layer)
        return layer

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
        bound = self._writers.get(layer) if type(layer) is int else None
        if bound is None:
            bound = self._writers[self._index("write", layer)]
        if stream is None:  # the beginning of ``bound``'s call, inlined for an engine's every layer
            given = key, value, slot_mapping
            for path in bound.fast_paths:
                if path(given, bound.scalars, None, bound) is not False:
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
        caches, in one launch.

        Parameters
        ----------
        layer : int
            From 0 on.
        positions, query, key, value, cos_sin_cache, slot_mapping, is_neox, stream
            As for `rotary_and_cache`; without value caches ``positions``, ``q_pe``, ``k_pe``,
            ``kv_c``, ``cos_sin_cache``, ``slot_mapping`` and ``is_neox`` of
            `concat_and_cache_mla_rope_fused`, which rotates ``k_pe`` in place, too.
        rope_dim_offset, mrope_section, mrope_interleaved, norm_eps, q_norm_weight, k_norm_weight
            As for `rotary_and_cache`; without value caches they are refused.
        norm_weight_bias, out, out_dtype, q_scale, rounding
            As for `rotary_and_cache`; without value caches they are refused. The combination of
            ``is_neox`` and all of these but ``out`` is remembered for the layer, and the arrays
            among them are kept, as the caches are: give the same ones at each step.
        """
        has_out = out is not None and (out is not query or self.value_caches is None)
        step = positions, query, key, value, cos_sin_cache, slot_mapping
        try:
            if type(layer) is not int:
                layer = self._index("rotary_write", layer)
            # In their one form: what is remembered must not change, and True equals 1.
            if mrope_section is not None:
                mrope_section = rotary.three_sections(ROTARY_WRITE, mrope_section)
            options = (
                contract.flag(ROTARY_WRITE, "is_neox", is_neox),
                contract.integer(ROTARY_WRITE, "rope_dim_offset", rope_dim_offset, least=0),
                mrope_section,
                contract.flag(ROTARY_WRITE, "mrope_interleaved", mrope_interleaved),
                norm_eps, norm_weight_bias, out_dtype, rounding,
            )  # fmt: skip
            kinds = (*map(type, options[4:]), type(q_scale))
            scale = q_scale
            if scale is not None and type(scale) is not float:
                is_number = not arrays.is_torch(scale) and contract.is_real(scale)
                scale = scale if is_number else _identity(scale)
            weights = _identity(q_norm_weight), _identity(k_norm_weight)
            key = ROTARY_WRITE, layer, options, kinds, scale, weights, has_out
            try:
                bound = self._bound.get(key)
            except Exception:  # what cannot be hashed is not remembered, and may be refused
                key = bound = None
            if bound is None:
                layer = self._layers[self._index("rotary_write", layer)]
                kept = q_norm_weight, k_norm_weight, q_scale, out if has_out else None
                bound = self._remember(key, layer.rotator(*options, *kept))
            bound(*step, *((out,) if has_out else ()), stream=stream)
        except CupyCacheError as error:
            errors.rename(error, ROTARY_WRITE, _ROTATED)
            raise

    def _remember(self, key, bound):
        """``bound``, remembered by ``key`` unless that is None."""
        if key is not None:
            if len(self._bound) >= MAX_BOUND * len(self):
                self._bound.clear()
            self._bound[key] = bound
        return bound

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
        if type(layer) is not int:
            layer = self._index("attend", layer)
        # In their one form: what is remembered must not change.
        if sliding_window is not None:
            sliding_window = contract.integer(ATTEND, "sliding_window", sliding_window, 1)
        options = scale, sliding_window, soft_cap, contract.flag(ATTEND, "causal", causal)
        given = query_start_loc is not None, lse is not None
        kinds = type(scale), type(soft_cap)  # True equals 1
        key = ATTEND, layer, options, kinds, _identity(alibi_slopes), _identity(sinks), given
        try:
            bound = self._bound.get(key)
        except Exception:  # what cannot be hashed is not remembered, and may be refused
            key = bound = None
        if bound is None:
            if self.value_caches is None:
                expected = "key and value caches to attend to"
                got, way_out = "entries of latent attention", "use attend_mla"
                raise errors.wrong("kind", f"{ATTEND}: caches", expected, got, way_out)
            one = self._layers[self._index("attend", layer)]
            bound = self._remember(key, one.attender(*options, alibi_slopes, sinks, *given))
        given = [query, block_table, seq_lens, query_start_loc, out, lse]
        if lse is None:
            del given[5]
        if query_start_loc is None:
            del given[3]
        made = bound(*given, stream=stream)
        return out if made is None else made

    def attend_mla(
        self,
        layer: int,
        query: ArrayLike,
        block_table: ArrayLike,
        seq_lens: ArrayLike,
        *,
        scale: float,
        kv_lora_rank: int = 512,
        query_start_loc: ArrayLike | None = None,
        causal: bool = True,
        out: ArrayLike | None = None,
        lse: ArrayLike | None = None,
        stream: StreamLike | None = None,
    ) -> Any:
        """Attend from one step's queries to a layer's latent entries, where there are no value
        caches. The cache is read again at each call.

        Parameters
        ----------
        layer : int
        query, block_table, seq_lens, scale, kv_lora_rank, query_start_loc, causal, out, lse, stream
            As for `paged_attention_mla`, and so is what is returned.
        """
        layer = self._layers[self._index("attend_mla", layer)]
        if self.value_caches is not None:
            expected, got = "entries of latent attention", "key and value caches"
            raise errors.wrong("kind", f"{_ATTEND_MLA}: caches", expected, got)
        try:
            return paged_attention_mla.paged_attention_mla(
                query, layer.key_cache, block_table, seq_lens, scale=scale,
                kv_lora_rank=kv_lora_rank, query_start_loc=query_start_loc, causal=causal,
                kv_cache_dtype=self._kv_cache_dtype, kv_scale=layer.k_scale, out=out, lse=lse,
                stream=stream,
            )  # fmt: skip
        except CupyCacheError as error:
            errors.rename(error, _ATTEND_MLA, {"kv_cache": "key_caches", "kv_scale": "k_scales"})
            raise

    def gather(
        self,
        layer: int,
        block_table: ArrayLike,
        cu_seq_lens: ArrayLike,
        *,
        num_tokens: int | None = None,
        seq_starts: ArrayLike | None = None,
        dtype: DTypeLike | None = None,
        out: ArrayLike | Sequence[ArrayLike] | None = None,
        stream: StreamLike | None = None,
    ) -> Any:
        """Read the tokens of several sequences out of a layer's pages, into contiguous rows: keys
        and values in one launch.

        Elements of 8 bits are multiplied with the layer's scale, or with that of their head.

        Parameters
        ----------
        layer : int
        block_table, cu_seq_lens, seq_starts, stream
            As for `gather_and_maybe_dequant_cache`.
        num_tokens : int, optional
            How many rows there are: ``cu_seq_lens[-1]``, which is not read here. By default as many
            as ``out`` has.
        dtype : str, NumPy or torch dtype, optional
            Of new rows, where the cache is not raw. By default that of `allocate`.
        out : pair of arrays [at least num_tokens, num_kv_heads, head_size], optional
            For the keys and the values; written in place. Without value caches one array [at least
            num_tokens, entry_size].

        Returns
        -------
        (keys, values)
            ``out`` where it was given, otherwise new arrays of the caches' framework, whose rows
            are uninitialised where no sequence owns them. Without value caches one array.

        Raises
        ------
        CupyCacheError
            One of its kinds, before anything is written.
        """
        layer = self._index("gather", layer)
        if out is None:
            out, num_tokens = self._new_rows(num_tokens, dtype, stream), None
        elif self.value_caches is None:
            out = (out,)
        else:
            given, out = out, lists.plain_or_none(out) or ()
            if len(out) != 2:
                expected, got = "a pair of arrays, for keys and values", type(given).__name__
                raise errors.wrong("type", f"{GATHER}: out", expected, got)
        if num_tokens is not None:
            num_tokens = contract.integer(GATHER, "num_tokens", num_tokens, 0)
        key = GATHER, layer, seq_starts is not None
        bound = self._bound.get(key)
        try:
            if bound is None:
                bound = self._remember(key, self._layers[layer].gatherer(seq_starts is not None))
            step, scalars = (*out, block_table, cu_seq_lens), (*bound.scalars, num_tokens)
            if seq_starts is not None:
                step = *step, seq_starts
            bound(*step, stream=stream, scalars=scalars)
        except CupyCacheError as error:
            errors.rename(error, GATHER, _GATHERED)
            raise
        return out[0] if self.value_caches is None else tuple(out)

    def _new_rows(self, num_tokens, dtype, stream):
        """New rows for `gather`, uninitialised."""
        if num_tokens is None:
            expected, way_out = "how many rows there are, or out", "it is not read on the device"
            name = f"{GATHER}: num_tokens"
            raise errors.wrong("value", name, expected, "None", way_out)
        num_tokens = contract.integer(GATHER, "num_tokens", num_tokens, 0)
        if dtype is None and self._dtype is None:
            expected, way_out = "that of the rows, or out", "caches of 8 bits do not tell"
            name = f"{GATHER}: dtype"
            raise errors.wrong("value", name, expected, "None", way_out)
        dtype = self._dtype if dtype is None else formats.dtype_named(dtype, f"{GATHER}: dtype")
        if stream is not None:
            stream = streams.pointer(GATHER, stream)
        like = self._described[0]
        return [
            making.empty(like.framework, like.device, (num_tokens, *token), dtype, stream)
            for token in map(layouts.token, layouts.of_rows(self._described), self._described)
        ]

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
        if not issubclass(type(other), PagedKVCache):
            got = type(other).__name__
            raise errors.wrong("type", f"{name}: other", "a PagedKVCache", got)
        mine, theirs = (
            "key caches alone" if caches.value_caches is None else "key and value caches"
            for caches in (self, other)
        )
        if mine != theirs:
            raise errors.wrong("kind", f"{name}: other", mine, theirs, error=ShapeError)
        by_token = self.k_scale_caches is not None and other.k_scale_caches is not None
        if by_token and self.layout != other.layout:  # whole pages are copied as they are
            raise errors.wrong("layout", f"{name}: other", self.layout, other.layout)
        (keys, values), (other_keys, other_values) = self._moved, other._moved
        caches = keys, other_keys, values, other_values
        try:
            swap_blocks.OP((*caches, block_mapping), (None,), stream)
        except CupyCacheError as error:
            errors.rename(error, name, _SWAPPED)
            raise

    def zero_blocks(self, block_ids: Indices, *, stream: StreamLike | None = None) -> None:
        """Fill whole blocks of every layer with zero bytes: see `zero_blocks`."""
        self._mover("zero_blocks", zero_blocks.OP)(block_ids, stream=stream)

    def pack_blocks(
        self,
        block_ids: Indices,
        out: ArrayLike,
        *,
        layout: PackedLayout = "layer_first",
        stream: StreamLike | None = None,
    ) -> None:
        """Copy chosen blocks of every layer into one contiguous buffer: see `pack_blocks`. It takes
        `bytes_per_block` for each."""
        self._mover("pack_blocks", pack_blocks.PACK_BLOCKS, layout)(block_ids, out, stream=stream)

    def unpack_blocks(
        self,
        packed: ArrayLike,
        block_ids: Indices,
        *,
        layout: PackedLayout = "layer_first",
        stream: StreamLike | None = None,
    ) -> None:
        """Copy blocks out of one contiguous buffer into every layer: see `unpack_blocks`."""
        mover = self._mover("unpack_blocks", pack_blocks.UNPACK_BLOCKS, layout)
        mover(block_ids, packed, stream=stream)

    def _mover(self, method, operation, layout=None):
        """The `bound.Bound` of an operation on chosen blocks."""
        layout = formats.text_of(layout) or layout
        known = layout is None or type(layout) is str  # anything else may have no hash
        key = (method, layout) if known else None
        mover = self._bound.get(key)
        if mover is None:
            name = f"PagedKVCache.{method}"
            caches = [side for side in self._moved if side is not None]
            with errors.renamed(name, {}):
                mover = operation.bound(name, caches, layout)
            self._remember(key, mover)
        return mover


# {name of an argument of the rotating operations: its name here}.
_ROTATED = {
    "q_pe": "query", "k_pe": "key", "kv_c": "value", "kv_cache": "key_caches",
    "key_cache": "key_caches", "value_cache": "value_caches", "kv_cache_scale": "k_scales",
    "k_scale": "k_scales", "v_scale": "v_scales",
}  # fmt: skip
# The same of a gather without values.
_GATHERED = {"src_cache": "key_caches", "dst": "out", "scale": "k_scales"}
# The same of a swap.
_SWAPPED = {
    "src": "key_caches", "dst": "other.key_caches", "src_values": "value_caches",
    "dst_values": "other.value_caches",
}  # fmt: skip


def _identity(array):
    """What identifies a kept array. torch's ``set_`` and ``.data =`` move a tensor to other
    memory, so its address is part of it."""
    if array is None:
        return None
    if arrays.is_torch(array):
        try:
            return id(array), array.data_ptr(), array.shape, array.stride(), array.dtype
        except Exception:  # it has no memory: the operation refuses it
            return id(array)
    return id(array)


def _for_each_layer(name, scales, layers):
    if not issubclass(type(scales), lists.LISTS):
        return [scales] * layers
    scales = lists.plain("PagedKVCache", name, scales)
    if len(scales) != layers:
        expected = f"one scale for each of {errors.counted(layers, 'layer')}"
        raise errors.wrong("length", f"PagedKVCache: {name}", expected, len(scales))
    return scales
