# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""One layer's caches, bound to the operations that take them."""

import inspect
import numbers

from .. import errors
from ..attention import paged_attention
from ..ops import (
    concat_and_cache_mla,
    concat_and_cache_mla_rope_fused,
    gather_and_maybe_dequant_cache,
    gather_both,
    reshape_and_cache,
    reshape_and_cache_flash,
    reshape_and_cache_flash_per_token_head,
    rotary_and_cache,
)
from ..ops.shared import gathering
from ..runtime import contract, formats
from ..runtime.bound import Bound
from . import layouts

WRITE, ROTARY_WRITE = "PagedKVCache.write", "PagedKVCache.rotary_write"
ATTEND, GATHER = "PagedKVCache.attend", gather_both.NAME


class Layer:
    """A layer of a `PagedKVCache`. Each method returns a `bound.Bound`: an operation to which
    the caches, their scales and options are bound.

    Parameters
    ----------
    described : list of arrays.Array
        Of the caches: one or two.
    kv_cache_dtype : str
    key_cache, value_cache : array, or None
    k_scale, v_scale : float or array, or None
    k_scale_cache, v_scale_cache : array, or None
        With a scale of each token and head.
    """

    def __init__(
        self, described, kv_cache_dtype, key_cache, value_cache, k_scale, v_scale, k_scale_cache,
        v_scale_cache,
    ):  # fmt: skip
        self._described, self._kv_cache_dtype = described, kv_cache_dtype
        self.key_cache, self.value_cache = key_cache, value_cache
        self.k_scale, self._v_scale = k_scale, v_scale
        self._scale_caches = k_scale_cache, v_scale_cache
        self._by_token = k_scale_cache is not None

    def writer(self):
        """`PagedKVCache.write`, as a function of the other arguments."""
        stored, scales = self._kv_cache_dtype, {}
        options, scalars = (stored,), ()
        if self._by_token:
            op = reshape_and_cache_flash_per_token_head.OP
        elif self.value_cache is None:
            op = concat_and_cache_mla.OP
            arrays, scalars = concat_and_cache_mla.scales_of("k_scales", stored, self.k_scale)
            scales = dict(zip(("scale",), arrays))
            options = stored, concat_and_cache_mla.SCALE_RULES[0]
        else:
            op = reshape_and_cache_flash.OP
            keys, values = (len(one.shape) for one in self._described)
            if keys == 5:
                op, options = reshape_and_cache.OP, (stored, values == 5)
            arrays, scalars = contract.split_scales(op.name, stored, self.k_scale, self._v_scale)
            scales = dict(zip(("k_scale", "v_scale"), arrays))
        return Bound(op, WRITE, self._fixed(**scales), options, scalars)

    def rotator(
        self, is_neox, offset, sections, interleaved, norm_eps, norm_weight_bias, out_dtype,
        rounding, q_norm_weight, k_norm_weight, q_scale, out,
    ):  # fmt: skip
        """`PagedKVCache.rotary_write` with these options; ``out``: whether a call gives one."""
        stored, fixed, numbers = self._kv_cache_dtype, {}, {}
        if self.value_cache is None:
            _refuse_unusual(
                rope_dim_offset=offset, mrope_section=sections, mrope_interleaved=interleaved,
                norm_eps=norm_eps, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
                norm_weight_bias=norm_weight_bias, out_dtype=out_dtype, q_scale=q_scale,
                rounding=rounding, out=out,
            )  # fmt: skip
            call = concat_and_cache_mla_rope_fused.CALL
            if formats.is_scaled(stored):
                scale, number = contract.split_scale(call.name, "kv_cache_scale", self.k_scale)
                fixed["kv_cache_scale"] = scale
                numbers = {"k_scale": number, "v_scale": number}
            op, options, scalars = call.settle(is_neox=is_neox, kv_cache_dtype=stored, **numbers)
        else:
            call = rotary_and_cache.CALL
            fixed |= {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
            scales = {}
            if not self._by_token and formats.is_scaled(stored):
                scales |= {"k_scale": self.k_scale, "v_scale": self._v_scale}
            if formats.is_scaled(out_dtype):
                scales["q_scale"] = q_scale
            for name, scale in scales.items():
                fixed[name], numbers[name] = contract.split_scale(call.name, name, scale)
            op, options, scalars = call.settle(
                is_neox=is_neox, kv_cache_dtype=stored, out_dtype=out_dtype, rounding=rounding,
                offset=offset, sections=sections, interleaved=interleaved, norm_eps=norm_eps,
                norm_weight_bias=norm_weight_bias, **numbers,
            )  # fmt: skip
        also = ["out"] * (out is not None)
        return Bound(op, ROTARY_WRITE, self._fixed(**fixed), options, scalars, also)

    def attender(
        self, scale, sliding_window, soft_cap, causal, alibi_slopes, sinks, with_starts, with_lse
    ):  # fmt: skip
        """`PagedKVCache.attend` with these options."""
        heads, others, options, scalars = paged_attention.arguments(
            ATTEND, scale, alibi_slopes, sliding_window, soft_cap, sinks, causal,
            self._kv_cache_dtype, self.k_scale, self._v_scale, *self._scale_caches,
        )  # fmt: skip
        objects = self.key_cache, self.value_cache, *heads, *others
        fixed = _given(zip(paged_attention.LAYERS, objects))
        also = ["query_start_loc"] * with_starts + ["lse"] * with_lse
        return Bound(paged_attention.OP, ATTEND, fixed, options, scalars, also)

    def gatherer(self, with_starts):
        """`PagedKVCache.gather`, of sequences from their beginnings on or ``with_starts``."""
        stored = self._kv_cache_dtype
        scales, scalars = zip(
            *(
                gathering.scales(GATHER, stored, *one)
                for one in zip((self.k_scale, self._v_scale), self._scale_caches)
            )
        )
        named = layouts.of_rows(self._described)
        if self.value_cache is None:
            op, options = gather_and_maybe_dequant_cache.OP, (*named, stored, self._by_token)
            fixed, scalars = {"src_cache": self.key_cache, "scale": scales[0]}, scalars[:1]
        else:
            op, options = gather_both.OP, (tuple(named), stored, self._by_token)
            names = *gather_both.CACHES, *gather_both.SCALES
            fixed = dict(zip(names, (self.key_cache, self.value_cache, *scales)))
        also = ["seq_starts"] * with_starts
        return Bound(op, GATHER, _given(fixed.items()), options, scalars, also)

    def _fixed(self, **others):
        """The caches, by the names that writing operations have for them, and ``others``; without
        those that are None."""
        caches = {"kv_cache": self.key_cache}
        if self.value_cache is not None:
            caches = {"key_cache": self.key_cache, "value_cache": self.value_cache}
        scale_caches = zip(("k_scale_cache", "v_scale_cache"), self._scale_caches)
        return _given((caches | dict(scale_caches) | others).items())


def _given(named):
    return {name: array for name, array in named if array is not None}


def _refuse_unusual(**options):
    """Refuse options of `PagedKVCache.rotary_write` that the operation on latent caches lacks."""
    usually = inspect.signature(rotary_and_cache.rotary_and_cache).parameters
    for name, option in options.items():
        usual = usually[name].default
        plain = isinstance(option, (numbers.Real, str))  # of arrays none can be asked
        if option is not usual and (usual is None or not plain or option != usual):
            expected = f"{usual!r} where there are no value caches"
            got = errors.shown(option)
            raise errors.wrong("value", f"{ROTARY_WRITE}: {name}", expected, got)
