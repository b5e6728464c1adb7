# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Attention under the names, and with the arguments, of FlashAttention 2's functions for inference.

``import cupy_cache.flash_attn as flash_attn`` serves code that was written for ``flash_attn``.
Arrays are torch's, CuPy's or NumPy's, on a GPU or on the CPU; pages may have any size, and there
may be any number of query heads for each key and value head. Nothing has a gradient. Work goes to
the current stream of the framework.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence
from typing import Any, cast

from . import errors
from .attention.paged_attention import NO_WINDOW, paged_attention
from .ops.reshape_and_cache_flash import reshape_and_cache_flash
from .ops.slot_mapping import slot_mapping
from .runtime import arrays, contract, faults, formats, lists, making
from .types import ArrayLike

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache"]

PAGES = {
    "k_cache": "num_blocks block_size num_kv_heads head_size",
    "v_cache": "num_blocks block_size num_kv_heads head_size_v",
}

# What the arguments of the operations are called here.
_CALLED = {
    "query": "q", "key_cache": "k_cache", "value_cache": "v_cache", "key": "k", "value": "v",
    "seq_lens": "cache_seqlens", "positions": "cache_seqlens", "scale": "softmax_scale",
    "sliding_window": "window_size", "soft_cap": "softcap",
}  # fmt: skip
_CALLED_VARLEN = {
    **_CALLED, "key_cache": "k", "value_cache": "v", "seq_lens": "cu_seqlens_k",
    "query_start_loc": "cu_seqlens_q",
}  # fmt: skip


def flash_attn_with_kvcache(
    q: ArrayLike,
    k_cache: ArrayLike,
    v_cache: ArrayLike,
    k: ArrayLike | None = None,
    v: ArrayLike | None = None,
    rotary_cos: object = None,
    rotary_sin: object = None,
    cache_seqlens: int | ArrayLike | None = None,
    cache_batch_idx: ArrayLike | None = None,
    cache_leftpad: object = None,
    block_table: ArrayLike | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: ArrayLike | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attend from a step's queries to a cache, to which the step's keys and values are added first
    where they are given.

    Parameters
    ----------
    q : array [batch, seqlen_q, num_heads, head_size]
        float16, bfloat16 or float32; the last dimension contiguous.
    k_cache, v_cache : array [num_blocks, block_size, num_kv_heads, head_size or head_size_v]
        With ``block_table``, pages; without it [batch, seqlen_cache, num_kv_heads, ...], the whole
        of each sequence. Of the dtype of ``q``. Written where ``k`` and ``v`` are given.
    k, v : array [batch, seqlen_new, num_kv_heads, head_size or head_size_v], optional
        Both or neither: what is added to each sequence after its ``cache_seqlens`` tokens.
    rotary_cos, rotary_sin : None
        Rotary embedding is not applied here: call `rotary_embedding` before.
    cache_seqlens : int, or int32 or int64 array [batch], optional
        The tokens of each sequence in the cache, without those that are added; a number is that of
        all sequences. By default, where nothing is added, all that the cache or the table holds.
    cache_batch_idx : int32 or int64 array [batch], optional
        Which row of the caches is which sequence's, where there is no ``block_table``.
    cache_leftpad : None
        Padding on the left is not taken.
    block_table : int32 or int64 array [batch, width], optional
        Block numbers of each sequence.
    softmax_scale : float, optional
        By default ``1 / sqrt(head_size)``.
    causal : bool
        Whether the ``seqlen_q`` queries are those of the last tokens, and see none after their
        own.
    window_size : (left, right)
        How many tokens a query sees before its own and after it; -1 is all. ``right`` must be 0 or
        -1.
    softcap : float
        0 is none.
    alibi_slopes : float32 array [num_heads] or [batch, num_heads], optional
        With ``causal``, or one query for each sequence.
    rotary_interleaved, num_splits : ignored
    return_softmax_lse : bool
        Whether the logarithms are returned too.

    Returns
    -------
    array [batch, seqlen_q, num_heads, head_size_v]
        A new one. With ``return_softmax_lse`` a pair of it and a float32 array [batch, num_heads,
        seqlen_q] of natural logarithms.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    What is out of range, in tables and in lengths, is treated as by `cupy_cache.paged_attention`,
    `cupy_cache.slot_mapping` and `cupy_cache.reshape_and_cache_flash`. A row without tokens is 0,
    its logarithm -infinity.
    """
    del rotary_interleaved, num_splits
    op = "flash_attn_with_kvcache"
    rotary = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin}
    _refuse_unserved(op, rotary, cache_leftpad, block_table, cache_batch_idx, k, v, cache_seqlens)
    return_softmax_lse = contract.flag(op, "return_softmax_lse", return_softmax_lse)
    one_length = issubclass(type(cache_seqlens), numbers.Integral)
    if one_length:
        cache_seqlens = contract.integer(op, "cache_seqlens", cache_seqlens)
        too_large = not -(2**31) <= cache_seqlens < 2**31
        _refuse(op, "cache_seqlens", too_large, "a number of 32 bits", cache_seqlens)
    check, framework = _checked(
        op,
        {
            "q": (q, "batch seqlen_q num_heads head_size"),
            **{name: (x, PAGES[name]) for name, x in (("k_cache", k_cache), ("v_cache", v_cache))},
            "k": (k, "batch seqlen_new num_kv_heads head_size"),
            "v": (v, "batch seqlen_new num_kv_heads head_size_v"),
            "cache_seqlens": (None if one_length else cache_seqlens, "batch"),
            "cache_batch_idx": (cache_batch_idx, "batch"),
            "block_table": (block_table, "batch width"),
            "alibi_slopes": (alibi_slopes, _of_slopes(op, alibi_slopes, "batch")),
        },
    )
    size = check.sizes
    batch, length, block_size = size["batch"], size["seqlen_q"], size["block_size"]
    options = _options(op, softmax_scale, causal, window_size, softcap, alibi_slopes, length == 1)

    with making.on_device_of(q):
        table, lengths, rows = (cast(Any, x) for x in (block_table, cache_seqlens, q))
        if table is None:  # each sequence is one page
            if cache_batch_idx is None and size["num_blocks"] < batch:
                expected = f"at least {errors.counted(batch, 'sequence')}, as many as q"
                raise errors.wrong("shape", f"{op}: k_cache", expected, size["num_blocks"])
            table = cast(Any, cache_batch_idx)
            if table is None:
                table = _made(framework, q, "arange", batch)
            table = table.reshape(-1, 1)
        if lengths is None:
            one_length, lengths = True, size.get("width", 1) * block_size
        if one_length:
            lengths = _made(framework, q, "full", (batch,), int(lengths))
        rows = rows.reshape(batch * length, *rows.shape[2:])
        starts = None
        if length != 1:
            starts = _made(framework, q, "arange", batch + 1) * length
        with errors.renamed(op, _CALLED), faults.together():
            if k is not None:
                # Without sequences everything is checked: nothing is to be written before.
                no_starts = None if starts is None else starts[:1]
                paged_attention(
                    rows[:0], k_cache, v_cache, table[:0], lengths[:0], query_start_loc=no_starts,
                    **options,
                )  # fmt: skip
                lengths = _add(framework, k, v, k_cache, v_cache, table, lengths, block_size)
            lse = _empty_lse(rows) if return_softmax_lse else None
            out = paged_attention(
                rows, k_cache, v_cache, table, lengths, query_start_loc=starts, lse=lse, **options,
            )  # fmt: skip
        out = out.reshape(batch, length, *out.shape[1:])
        if lse is None:
            return out
        return out, lse.reshape(batch, length, lse.shape[1]).swapaxes(1, 2)


def _refuse_unserved(
    op, rotary, cache_leftpad, block_table, cache_batch_idx, k, v, cache_seqlens
):  # fmt: skip
    """Refuse arguments of `flash_attn_with_kvcache` that are not served, or not together."""
    for name, value in rotary.items():
        way_out = "rotate queries and keys before, with rotary_embedding"
        _refuse(op, name, value is not None, "None", value, way_out)
    _refuse(op, "cache_leftpad", cache_leftpad is not None, "None", cache_leftpad)
    both = block_table is not None and cache_batch_idx is not None
    _refuse(op, "cache_batch_idx", both, "None with a block_table", cache_batch_idx)
    _refuse(op, "v", (k is None) != (v is None), "both k and v, or neither", v)
    unknown = k is not None and cache_seqlens is None
    _refuse(op, "cache_seqlens", unknown, "lengths where there is k", cache_seqlens)


def _add(framework, k, v, k_cache, v_cache, table, lengths, block_size):
    """Write new tokens behind the others of each sequence; returns how many there are then."""
    batch, added = k.shape[:2]
    positions = lengths.reshape(-1, 1) + _made(framework, k, "arange", added)
    bounds = _made(framework, k, "arange", batch + 1) * added
    slots = slot_mapping(table, positions.reshape(-1), bounds, block_size)
    new = [rows.reshape(batch * added, *rows.shape[2:]) for rows in (k, v)]
    reshape_and_cache_flash(*new, k_cache, v_cache, slots)
    return lengths + added


def flash_attn_varlen_func(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: ArrayLike | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: ArrayLike | None = None,
) -> Any:
    """Attend from the queries of sequences of different lengths, one after another, to their
    keys and values in pages.

    Parameters
    ----------
    q : array [total_q, num_heads, head_size]
        float16, bfloat16 or float32; the last dimension contiguous.
    k, v : array [num_blocks, block_size, num_kv_heads, head_size or head_size_v]
        With ``block_table``, pages; without it [total_k, num_kv_heads, ...], the tokens of the
        sequences one after another. They then count as pages of one token, which is slower than
        pages of several.
    cu_seqlens_q, cu_seqlens_k : int32 or int64 array [batch + 1]
        Where each sequence's queries, and its tokens, start, and where the last one's end.
    max_seqlen_q : ignored
    max_seqlen_k : int
        The most tokens of a sequence. Used where there is no ``block_table``.
    dropout_p : 0.0
    softmax_scale, causal, window_size, softcap
        As for `flash_attn_with_kvcache`.
    alibi_slopes : float32 array [num_heads] or [batch, num_heads], optional
        With ``causal``.
    deterministic : ignored
        Results always are.
    return_attn_probs : bool
        Whether to return the logarithms too.
    block_table : int32 or int64 array [batch, width], optional
        Block numbers of each sequence.

    Returns
    -------
    array [total_q, num_heads, head_size_v]
        A new one. With ``return_attn_probs`` three: it, a float32 array [num_heads, total_q] of
        natural logarithms, and None.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError
        Before anything is written.
    """
    del max_seqlen_q, deterministic
    op = "flash_attn_varlen_func"
    dropout_p = contract.number(op, "dropout_p", dropout_p, kind="")
    _refuse(op, "dropout_p", dropout_p != 0, "0.0", dropout_p)
    return_attn_probs = contract.flag(op, "return_attn_probs", return_attn_probs)
    rows = {"k": "_ num_kv_heads head_size", "v": "_ num_kv_heads head_size_v"}
    pages = {"k": PAGES["k_cache"], "v": PAGES["v_cache"]}
    patterns = rows if block_table is None else pages
    _, framework = _checked(
        op,
        {
            "q": (q, "_ num_heads head_size"),
            "k": (k, patterns["k"]),
            "v": (v, patterns["v"]),
            "cu_seqlens_q": (cu_seqlens_q, "bounds"),
            "cu_seqlens_k": (cu_seqlens_k, "bounds"),
            "block_table": (block_table, "_ _"),
            "alibi_slopes": (alibi_slopes, _of_slopes(op, alibi_slopes, "_")),
        },
    )
    options = _options(op, softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    with making.on_device_of(q):
        keys, values, bounds, table = (cast(Any, x) for x in (k, v, cu_seqlens_k, block_table))
        if table is None:
            keys, values = keys[:, None], values[:, None]
            longest = contract.integer(op, "max_seqlen_k", max_seqlen_k, 0)
            token = _made(framework, q, "arange", min(longest, keys.shape[0]))
            table = bounds[:-1].reshape(-1, 1) + token
        lse = _empty_lse(q) if return_attn_probs else None
        with errors.renamed(op, _CALLED_VARLEN):
            out = paged_attention(
                q, keys, values, table, bounds[1:] - bounds[:-1], query_start_loc=cu_seqlens_q,
                lse=lse, **options,
            )  # fmt: skip
        return out if lse is None else (out, lse.swapaxes(0, 1), None)


def _options(op, softmax_scale, causal, window_size, softcap, alibi_slopes, one_query):
    """The options of `paged_attention`."""
    pair = lists.plain_or_none(window_size) or ()
    _refuse(op, "window_size", len(pair) != 2, "a pair of integers", window_size)
    left, right = (contract.integer(op, "window_size", n) for n in pair)
    causal = contract.flag(op, "causal", causal) or right == 0
    _refuse(op, "window_size", not causal and right > 0, "0 or -1 as the right one", window_size)
    if alibi_slopes is not None and not causal and not one_query:
        expected = "None where queries see tokens after their own"
        raise errors.wrong("value", f"{op}: alibi_slopes", expected, type(alibi_slopes).__name__)
    if softmax_scale is not None:
        softmax_scale = contract.number(op, "softmax_scale", softmax_scale)
    softcap = contract.number(op, "softcap", softcap, kind="")
    softcap = None if softcap == 0 else contract.number(op, "softcap", softcap, positive=True)
    return {
        "causal": causal,
        "sliding_window": left + 1 if 0 <= left < NO_WINDOW else None,
        "scale": softmax_scale,
        "soft_cap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _of_slopes(op, slopes, batch):
    """The pattern of their shape: of all sequences, or of each of a ``batch``."""
    two = slopes is not None and len(arrays.view(slopes, f"{op}: alibi_slopes").shape) == 2
    return f"{batch} num_heads" if two else "num_heads"


def _refuse(op, name, when, expected, got, way_out=""):
    if when:
        plain = issubclass(type(got), (int, float, tuple, list))
        shown = errors.shown(got) if plain else type(got).__name__
        raise errors.wrong("value", f"{op}: {name}", expected, shown, way_out)


def _checked(op, named):
    """(The `contract.Contract` of arrays, {name: (array, pattern)}, of which None are absent; their
    framework). What is checked is what may be wrong before tokens are added to a cache."""
    check, framework = contract.Contract(op), ""
    for name, (array, pattern) in named.items():
        if array is None:
            if name in ("q", "k_cache", "v_cache", "cu_seqlens_q", "cu_seqlens_k"):
                raise errors.wrong("type", f"{op}: {name}", "an array", "None")
            continue
        view = arrays.view(array, f"{op}: {name}")
        if name == "q":
            framework, dtype = view.framework, view.dtype
            check.dtype(name, view, *formats.FLOATS)
        if view.framework != framework or framework not in ("torch", "cupy", "numpy"):
            expected = "an array of torch, CuPy or NumPy, all of one of these"
            raise errors.wrong("type", f"{op}: {name}", expected, type(array).__name__)
        check.shape(name, view, pattern)
        check.readable(name, view)
        if name == "alibi_slopes":
            check.dtype(name, view, formats.FLOAT32)
        elif len(pattern.split()) > 2:
            check.dtype(name, view, dtype)
            check.contiguous(name, view)
        else:
            check.dtype(name, view, *formats.INDICES)
    heads, kv_heads = check.sizes["num_heads"], check.sizes["num_kv_heads"]
    if not kv_heads or heads % kv_heads:
        expected = f"a multiple of {errors.counted(kv_heads, 'head')}, those of the cache"
        raise errors.wrong("shape", f"{op}: q", expected, heads)
    return check, framework


def _made(framework, like, name, *arguments) -> Any:
    """An int32 array, made by this function of the framework, on the device of ``like``."""
    module = sys.modules[framework]
    if framework == "torch":
        return getattr(module, name)(*arguments, dtype=module.int32, device=like.device)
    return getattr(module, name)(*arguments, dtype=module.int32)


def _empty_lse(rows) -> Any:
    like = arrays.view(rows, "q")
    return making.empty(like.framework, like.device, like.shape[:2], formats.FLOAT32)
