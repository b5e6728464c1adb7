# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The caches of a model's layers as one object, which decides once what depends on them alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, SupportsIndex

from .. import errors
from ..attention import paged_attention, paged_attention_mla
from ..errors import ArgumentError, CopyError, CupyCacheError, DTypeError, ShapeError
from ..ops import (
    concat_and_cache_mla,
    concat_and_cache_mla_rope_fused,
    copy_blocks,
    gather_and_maybe_dequant_cache,
    pack_blocks,
    reshape_and_cache,
    reshape_and_cache_flash,
    reshape_and_cache_flash_per_token_head,
    rotary_and_cache,
    swap_blocks,
    zero_blocks,
)
from ..ops.shared import gathering, gathering_both, rotary
from ..runtime import arrays, contract, dispatch, formats, lists, streams
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

MAX_BOUND = 16  # combinations of options of one layer
_ATTEND, _GATHER = "PagedKVCache.attend", gathering_both.NAME
_ROTARY, _ATTEND_MLA = "PagedKVCache.rotary_write", "PagedKVCache.attend_mla"
_BY_TOKEN = "k_scale_cache", "v_scale_cache"  # what operations call them


class PagedKVCache:
    """Paged caches of all layers of a model, for callers to whom a microsecond a call matters.

    `allocate` makes the arrays; this makes an object of arrays that exist.

    The functions of this library read their arguments at every call: of `copy_blocks` for 32 layers
    these are 64 arrays. This object reads the caches once for `write`, `rotary_write`, `attend`,
    `gather` and the methods that copy, pack, unpack or zero blocks; the others read them at every
    call. Its methods mean what the functions of the same arguments mean, with the same checks and
    errors, which name the method.

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
        One of its kinds, where the lists or the scales do not fit each other; the writing
        functions' errors come at the first write.

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
        self._set_up(key_caches, value_caches, kv_cache_dtype, k_scales, v_scales, None)

    def _set_up(self, *given):
        with errors.renamed("PagedKVCache", {"k_scale": "k_scales", "v_scale": "v_scales"}):
            self._bind(*given)

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
            "int8_per_token_head" or "fp8_per_token_head" each token and head has a scale, found by
            the write (`reshape_and_cache_flash_per_token_head`) and kept in the same block, behind
            the elements: the layout is "NHD" or "HND", and blocks are moved with their scales, as
            they lie in memory, so only between caches of one layout.
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
        made._set_up(keys, values, kv_cache_dtype, k_scales, v_scales, pages)
        made.layout = layout
        made._dtype = formats.dtype_named(dtype)
        return made

    def _bind(self, key_caches, value_caches, kv_cache_dtype, k_scales, v_scales, pages):
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
        self.k_scale_caches = self.v_scale_caches = None
        self._moved = key_caches, value_caches
        if pages is not None:  # then whole blocks are moved, scales too
            self.k_scale_caches, self.v_scale_caches = (side.scales for side in pages)
            self._moved = tuple(side.whole for side in pages)
            given = dict(zip(given, self._moved))
            for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
                if scales is not None:
                    expected = f"None with {kv_cache_dtype}, which finds them"
                    got = contract.shown(scales)
                    raise ArgumentError(
                        errors.wrong("value", f"PagedKVCache: {name}", expected, got)
                    )
        for name, caches in given.items():
            lists.require_list("PagedKVCache", name, caches)
        self._copy = dispatch.Bound(op, given, name="PagedKVCache.copy_blocks")
        self._copy.check()
        self.key_caches = list(key_caches)
        self.value_caches = None if value_caches is None else list(value_caches)
        # Of the first layer's arrays; none where there are no layers.
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
        # Of what `gather` makes. Caches of 8 bits do not tell what was written.
        self._dtype = None
        if key_caches and pages is None and not formats.is_scaled(kv_cache_dtype):
            self._dtype = self._described[0].dtype
        k_scales = _for_each_layer("k_scales", k_scales, len(self))
        v_scales = _for_each_layer("v_scales", v_scales, len(self))
        self._kv_cache_dtype, self._scales = kv_cache_dtype, list(zip(k_scales, v_scales))
        self._attenders: dict[tuple, Any] = {}
        self._movers: dict[tuple, dispatch.Bound] = {}  # by method and layout
        self._rotators: dict[tuple, Any] = {}
        self._gatherers: dict[tuple, dispatch.Bound] = {}  # by layer, and whether all start at 0
        # Not a list: that has layers of negative numbers, too.
        self._writers = {
            layer: self._writer(layer, kv_cache_dtype, k_scales[layer], v_scales[layer])
            for layer in range(len(self))
        }

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.key_caches)

    def __repr__(self) -> str:
        text = f"<PagedKVCache of {len(self)} layer{'s' * (len(self) != 1)}"
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

    def _writer(self, layer, kv_cache_dtype, k_scale, v_scale):
        fixed, options, scales = {}, (kv_cache_dtype,), ()
        if self.k_scale_caches is not None:
            op, names, scalars = reshape_and_cache_flash_per_token_head.OP, (), ()
            fixed = dict(zip(_BY_TOKEN, self._scales_of_tokens(layer)))
            fixed["key_cache"] = self.key_caches[layer]
            fixed["value_cache"] = self.value_caches[layer]
        elif self.value_caches is None:
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

    def _scales_of_tokens(self, layer):
        """A layer's scale caches of keys and of values, or None twice."""
        if self.k_scale_caches is None:
            return None, None
        return self.k_scale_caches[layer], self.v_scale_caches[layer]

    def writer(self, layer: int) -> Writer:
        """`write` for one layer, as a function of the other arguments: the cheapest call."""
        if type(layer) is not int:
            layer = contract.integer("PagedKVCache.writer", "layer", layer)
        try:
            return self._writers[layer]
        except KeyError:
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
        if type(layer) is not int:  # True would be layer 1
            layer = contract.integer("PagedKVCache.write", "layer", layer)
        try:
            bound = self._writers[layer]
        except KeyError:
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
                layer = self._layer("rotary_write", layer)
            # In their one form: what is remembered must not change, and True equals 1.
            if mrope_section is not None:
                mrope_section = rotary.three_sections(_ROTARY, mrope_section)
            options = (
                contract.flag(_ROTARY, "is_neox", is_neox),
                contract.integer(_ROTARY, "rope_dim_offset", rope_dim_offset, least=0),
                mrope_section,
                contract.flag(_ROTARY, "mrope_interleaved", mrope_interleaved),
                norm_eps, norm_weight_bias, out_dtype, rounding,
            )  # fmt: skip
            kinds = (*map(type, options[4:]), type(q_scale))
            number = q_scale if type(q_scale) is float else _identity(q_scale)
            weights = _identity(q_norm_weight), _identity(k_norm_weight)
            place = layer, options, kinds, number, weights, has_out
            try:
                bound, _ = self._rotators.get(place, (None, None))
            except TypeError:  # what cannot be hashed is not remembered, and may be refused
                place = bound = None
            if bound is None:
                layer = self._layer("rotary_write", layer)
                arrays = q_norm_weight, k_norm_weight, q_scale, out if has_out else None
                bound = self._rotator(layer, *options, *arrays)
                if len(self._rotators) >= MAX_BOUND * len(self):
                    self._rotators.clear()
                if place is not None:  # with the scale: no other gets its identity
                    self._rotators[place] = bound, q_scale
            bound(*step, *((out,) if has_out else ()), stream=stream)
        except CupyCacheError as error:
            errors.rename(error, _ROTARY, _ROTATED)
            raise

    def _rotator(
        self, layer, is_neox, offset, sections, interleaved, norm_eps, norm_weight_bias, out_dtype,
        rounding, q_norm_weight, k_norm_weight, q_scale, out,
    ):  # fmt: skip
        """`rotary_write` for one layer and these options, as a function of the other arguments."""
        stored, (k_scale, v_scale) = self._kv_cache_dtype, self._scales[layer]
        fixed, numbers = {}, {}
        if self.value_caches is None:
            self._refuse_unusual(
                rope_dim_offset=offset, mrope_section=sections, mrope_interleaved=interleaved,
                norm_eps=norm_eps, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
                norm_weight_bias=norm_weight_bias, out_dtype=out_dtype, q_scale=q_scale,
                rounding=rounding, out=out,
            )  # fmt: skip
            call = concat_and_cache_mla_rope_fused.CALL
            fixed["kv_cache"] = self.key_caches[layer]
            if formats.is_scaled(stored):
                scale, number = contract.split_scale(call.name, "kv_cache_scale", k_scale)
                fixed["kv_cache_scale"] = scale
                numbers = {"k_scale": number, "v_scale": number}
            op, options, scalars = call.settle(is_neox=is_neox, kv_cache_dtype=stored, **numbers)
        else:
            call = rotary_and_cache.CALL
            fixed |= {
                "key_cache": self.key_caches[layer], "value_cache": self.value_caches[layer],
                "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight,
                **dict(zip(_BY_TOKEN, self._scales_of_tokens(layer))),
            }  # fmt: skip
            scales = {}
            if self.k_scale_caches is None and formats.is_scaled(stored):
                scales |= {"k_scale": k_scale, "v_scale": v_scale}
            if formats.is_scaled(out_dtype):
                scales["q_scale"] = q_scale
            for name, scale in scales.items():
                fixed[name], numbers[name] = contract.split_scale(call.name, name, scale)
            op, options, scalars = call.settle(
                is_neox=is_neox, kv_cache_dtype=stored, out_dtype=out_dtype, rounding=rounding,
                offset=offset, sections=sections, interleaved=interleaved, norm_eps=norm_eps,
                norm_weight_bias=norm_weight_bias, **numbers,
            )  # fmt: skip
        fixed = {name: array for name, array in fixed.items() if array is not None}
        return dispatch.Bound(op, fixed, options, scalars, _ROTARY, ["out"] * (out is not None))

    @staticmethod
    def _refuse_unusual(**options):
        """Refuse options of `rotary_write` that latent caches have no use for."""
        usually = inspect.signature(rotary_and_cache.rotary_and_cache).parameters
        for name, option in options.items():
            usual = usually[name].default
            if option is not usual and (usual is None or option != usual):
                expected = f"{usual!r} where there are no value caches"
                got = contract.shown(option)
                raise ArgumentError(errors.wrong("value", f"{_ROTARY}: {name}", expected, got))

    def _layer(self, method, layer):
        """``layer``, which must be one: lists have layers of negative numbers, too."""
        if type(layer) is not int:
            layer = contract.integer(f"PagedKVCache.{method}", "layer", layer)
        if layer not in self._writers:
            raise self._no_layer(method, layer)
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
        if type(layer) is not int:
            layer = contract.integer(_ATTEND, "layer", layer)
        # In their one form: what is remembered must not change.
        if sliding_window is not None:
            sliding_window = contract.integer(_ATTEND, "sliding_window", sliding_window, 1)
        options = scale, sliding_window, soft_cap, contract.flag(_ATTEND, "causal", causal)
        given = query_start_loc is not None, lse is not None
        kinds = type(scale), type(soft_cap)  # True equals 1
        key = layer, options, kinds, _identity(alibi_slopes), _identity(sinks), given
        try:
            bound = self._attenders.get(key)
        except TypeError:  # what cannot be hashed is not remembered, and may be refused
            key = bound = None
        if bound is None:
            bound = self._attender(layer, *options, alibi_slopes, sinks, *given)
            if len(self._attenders) >= MAX_BOUND * len(self):
                self._attenders.clear()
            if key is not None:
                self._attenders[key] = bound
        if out is None:
            if stream is not None:
                stream = streams.pointer(_ATTEND, stream)
            out = paged_attention.new_out(_ATTEND, query, *self._caches_of(layer), stream)
        step = query, block_table, seq_lens, query_start_loc, out, lse
        bound(*[array for array in step if array is not None], stream=stream)
        return out

    def _attender(
        self, layer, scale, sliding_window, soft_cap, causal, alibi_slopes, sinks, with_starts,
        with_lse,
    ):  # fmt: skip
        caches = self._caches_of(layer)
        heads, others, options, scalars = paged_attention.arguments(
            _ATTEND, scale, alibi_slopes, sliding_window, soft_cap, sinks, causal,
            self._kv_cache_dtype, *self._scales[layer], *self._scales_of_tokens(layer),
        )  # fmt: skip
        named = zip(paged_attention.LAYERS, (*caches, *heads, *others))
        fixed = {name: array for name, array in named if array is not None}
        also = ["query_start_loc"] * with_starts + ["lse"] * with_lse
        return dispatch.Bound(paged_attention.OP, fixed, options, scalars, name=_ATTEND, also=also)

    def _caches_of(self, layer):
        """The key and the value cache that `attend` reads."""
        if self.value_caches is None:
            expected = "key and value caches to attend to"
            got, way_out = "entries of latent attention", "use attend_mla"
            raise ArgumentError(errors.wrong("kind", f"{_ATTEND}: caches", expected, got, way_out))
        layer = self._layer("attend", layer)
        return self.key_caches[layer], self.value_caches[layer]

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
        layer = self._layer("attend_mla", layer)
        if self.value_caches is not None:
            expected, got = "entries of latent attention", "key and value caches"
            raise ArgumentError(errors.wrong("kind", f"{_ATTEND_MLA}: caches", expected, got))
        try:
            return paged_attention_mla.paged_attention_mla(
                query, self.key_caches[layer], block_table, seq_lens, scale=scale,
                kv_lora_rank=kv_lora_rank, query_start_loc=query_start_loc, causal=causal,
                kv_cache_dtype=self._kv_cache_dtype, kv_scale=self._scales[layer][0], out=out,
                lse=lse, stream=stream,
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
        layer = self._layer("gather", layer)
        if out is None:
            out, num_tokens = self._new_rows(num_tokens, dtype, stream), None
        elif self.value_caches is None:
            out = (out,)
        elif not isinstance(out, (list, tuple)) or len(out) != 2:
            expected, got = "a pair of arrays, for keys and values", type(out).__name__
            raise DTypeError(errors.wrong("type", f"{_GATHER}: out", expected, got))
        if num_tokens is not None:
            num_tokens = contract.integer(_GATHER, "num_tokens", num_tokens, 0)
        bound = self._gatherers.get((layer, seq_starts is None))
        try:
            if bound is None:
                bound = self._gatherer(layer, seq_starts)
            step, scalars = (*out, block_table, cu_seq_lens), (*bound.scalars, num_tokens)
            if seq_starts is not None:
                step = *step, seq_starts
            bound(*step, stream=stream, scalars=scalars)
        except CupyCacheError as error:
            errors.rename(error, _GATHER, _GATHERED)
            raise
        return out[0] if self.value_caches is None else tuple(out)

    def _gatherer(self, layer, seq_starts):
        """`gather` for one layer, with or without ``seq_starts``, as a function of the other
        arguments."""
        stored, by_token = self._kv_cache_dtype, self.k_scale_caches is not None
        arrays_and_numbers = [
            gathering.scales(_GATHER, stored, *one)
            for one in zip(self._scales[layer], self._scales_of_tokens(layer))
        ]
        also = ["seq_starts"] * (seq_starts is not None)
        named = layouts.of_rows(self._described)
        if self.value_caches is None:
            op, options = gather_and_maybe_dequant_cache.OP, (*named, stored, by_token)
            ((array, number), _), names = arrays_and_numbers, ("src_cache", "scale")
            fixed, scalars = dict(zip(names, (self.key_caches[layer], array))), (number,)
        else:
            op, options = gathering_both.OP, (tuple(named), stored, by_token)
            scales, scalars = zip(*arrays_and_numbers)
            caches = self.key_caches[layer], self.value_caches[layer]
            names = *gathering_both.CACHES, *gathering_both.SCALES
            fixed = dict(zip(names, (*caches, *scales)))
        fixed = {name: array for name, array in fixed.items() if array is not None}
        bound = dispatch.Bound(op, fixed, options, scalars, _GATHER, also)
        self._gatherers[layer, seq_starts is None] = bound
        return bound

    def _new_rows(self, num_tokens, dtype, stream):
        """What `gather` returns, uninitialised."""
        if num_tokens is None:
            expected, way_out = "how many rows there are, or out", "it is not read on the device"
            name = f"{_GATHER}: num_tokens"
            raise ArgumentError(errors.wrong("value", name, expected, "None", way_out))
        num_tokens = contract.integer(_GATHER, "num_tokens", num_tokens, 0)
        if dtype is None and self._dtype is None:
            expected, way_out = "that of the rows, or out", "caches of 8 bits do not tell"
            name = f"{_GATHER}: dtype"
            raise ArgumentError(errors.wrong("value", name, expected, "None", way_out))
        dtype = self._dtype if dtype is None else formats.dtype_named(dtype, f"{_GATHER}: dtype")
        if stream is not None:
            stream = streams.pointer(_GATHER, stream)
        like = self._described[0]
        return [
            streams.empty(like.framework, like.device, (num_tokens, *token), dtype, stream)
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
        if not isinstance(other, PagedKVCache):
            got = type(other).__name__
            raise DTypeError(errors.wrong("type", f"{name}: other", "a PagedKVCache", got))
        mine, theirs = (
            "key caches alone" if caches.value_caches is None else "key and value caches"
            for caches in (self, other)
        )
        if mine != theirs:
            raise ShapeError(errors.wrong("kind", f"{name}: other", mine, theirs))
        by_token = self.k_scale_caches is not None and other.k_scale_caches is not None
        if by_token and self.layout != other.layout:  # whole pages, as they lie in memory
            raise ShapeError(errors.wrong("layout", f"{name}: other", self.layout, other.layout))
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
        """An operation on chosen blocks, with the caches given."""
        known = layout is None or isinstance(layout, str)  # else it may have no hash
        mover = self._movers.get((method, layout)) if known else None
        if mover is None:
            name = f"PagedKVCache.{method}"
            caches = [side for side in self._moved if side is not None]
            with errors.renamed(name, {}):
                mover = operation.bound(name, caches, layout)
            if layout is None or layout in pack_blocks.LAYOUTS:
                self._movers[method, layout] = mover
        return mover


# What the arguments of operations that rotate are called here.
_ROTATED = {
    "q_pe": "query", "k_pe": "key", "kv_c": "value", "kv_cache": "key_caches",
    "key_cache": "key_caches", "value_cache": "value_caches", "kv_cache_scale": "k_scales",
    "k_scale": "k_scales", "v_scale": "v_scales",
}  # fmt: skip
# What the arguments of a gather without values are called here.
_GATHERED = {"src_cache": "key_caches", "dst": "out", "scale": "k_scales"}
# What the arguments of a swap are called here.
_SWAPPED = {
    "src": "key_caches", "dst": "other.key_caches", "src_values": "value_caches",
    "dst_values": "other.value_caches",
}  # fmt: skip


def _identity(array):
    """What an array that is kept is known by. ``set_`` and ``.data = `` put torch's elsewhere."""
    if array is None:
        return None
    if arrays.is_torch(array):
        try:
            return id(array), array.data_ptr(), array.shape, array.stride(), array.dtype
        except Exception:  # it has no memory: whoever reads it says so
            return id(array)
    return id(array)


def _for_each_layer(name, scales, layers):
    if not isinstance(scales, (list, tuple)):
        return [scales] * layers
    if len(scales) != layers:
        raise ArgumentError(
            f"PagedKVCache: Invalid length of {name}: expected one scale for each of {layers} "
            f"layers, got {len(scales)}"
        )
    return list(scales)
