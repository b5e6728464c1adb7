# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Merging two attentions of the same queries to different tokens."""

from __future__ import annotations

import functools

from .. import cpu, errors
from ..runtime import contract, dispatch, formats, launch, modules, params, plans, spelling
from ..types import ArrayLike, StreamLike

NAME = "merge_attn_states"
PARAMS = params.Struct(
    per_call="output:ptr prefix_output:ptr prefix_lse:ptr suffix_output:ptr suffix_lse:ptr "
    "output_lse:ptr tokens:i64 prefix_lse_head_stride:i64 suffix_lse_head_stride:i64 "
    "output_lse_head_stride:i64",
    constant="output_token_stride:i64 output_head_stride:i64 "
    "prefix_token_stride:i64 prefix_head_stride:i64 "
    "suffix_token_stride:i64 suffix_head_stride:i64 "
    "prefix_lse_token_stride:i64 suffix_lse_token_stride:i64 output_lse_token_stride:i64",
)
MAX_THREADS = 256


def merge_attn_states(
    output: ArrayLike,
    prefix_output: ArrayLike,
    prefix_lse: ArrayLike,
    suffix_output: ArrayLike,
    suffix_lse: ArrayLike,
    output_lse: ArrayLike | None = None,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Merge two attentions of the same queries, to two sets of tokens, into the attention to all of
    them.

    With ``p`` and ``s`` the logarithms of a query and head in ``prefix_lse`` and ``suffix_lse``,
    ``output = (exp(p) * prefix_output + exp(s) * suffix_output) / (exp(p) + exp(s))`` and
    ``output_lse = log(exp(p) + exp(s))``.

    Parameters
    ----------
    output : array [num_tokens, num_heads, head_size]
        Written in place. float16, bfloat16 or float32; the last dimension contiguous. It may be
        ``prefix_output`` or ``suffix_output``.
    prefix_output, suffix_output : array [at least num_tokens, num_heads, head_size]
        Of the dtype of ``output``; the last dimension contiguous.
    prefix_lse, suffix_lse : float32 array [num_heads, at least num_tokens]
        Natural logarithms; any strides, so that the transpose of what `paged_attention` writes
        works. FlashInfer's are binary: times ``log(2)``.
    output_lse : float32 array [num_heads, at least num_tokens], optional
        Written in place; any strides. It may be ``prefix_lse`` or ``suffix_lse``.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``output``.

    Raises
    ------
    ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Sums are float32, rounded once. A logarithm of -infinity is that of an attention to no tokens,
    and +infinity counts as such. Where both are, the prefix's row is copied, and the logarithm is
    -infinity. Where only one side weighs anything, the other's row may hold anything, NaN included.

    Names, order and meaning are those of vLLM's operation of the same name.
    """
    OP((output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse), (), stream)


def _plan(op, described, options):
    del options
    named = {arg.name: x for arg, x in zip(op.args, described) if x is not None}
    output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse = described
    check = contract.Contract(op.name)
    for name, array in named.items():
        is_lse = name.endswith("lse")
        check.shape(name, array, "num_heads _" if is_lse else "_ num_heads head_size")
        expected = formats.FLOATS if array is output else (output.dtype,)
        check.dtype(name, array, *((formats.FLOAT32,) if is_lse else expected))
    for size in ("num_heads", "head_size"):
        check.positive(size, check.sizes[size])
    for name, array in named.items():
        check.readable(name, array)
        if not name.endswith("lse"):
            check.contiguous(name, array)
    check.writable("output", output, rows=True)
    if output_lse is not None:
        check.writable("output_lse", output_lse)

    if output.device.kind == "cpu":
        run = functools.partial(cpu.merge_attn_states, dtype=output.dtype)
        bits = [name for name in named if name.endswith("output")]
        return plans.NumPyPlan(run, op.args, described, bits)

    heads, length = check.sizes["num_heads"], check.sizes["head_size"] * output.dtype.bytes
    strides = [n for a in (output, prefix_output, suffix_output) for n in a.strides[:2]]
    vector = contract.vector_bytes(
        length, output.ptr, prefix_output.ptr, suffix_output.ptr, *strides
    )
    vectors = length // vector
    lanes = launch.lanes(vectors)
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"{NAME}<{spelling.element(output.dtype)}, {vector}, {vectors}, {lanes}, "
        f"{heads}, {MAX_THREADS}>",
        PARAMS,
    )
    steps = (0 if a is None else a.strides[1] for a in (prefix_lse, suffix_lse, output_lse))
    device, constants = output.device.index, (*strides, *steps)
    return plans.flat(kernel, device, constants, heads * lanes, MAX_THREADS)


def _count(extents, options, scalars):
    """(Tokens; these and the strides of the heads of the logarithms)."""
    del options, scalars
    tokens, prefixes, prefix_lse, suffixes, suffix_lse, output_lse = extents
    for name, rows in (("prefix_output", prefixes), ("suffix_output", suffixes)):
        if rows < tokens:
            expected = f"at least {errors.counted(tokens, 'row')}, those of output"
            raise errors.wrong("shape", f"{NAME}: {name}", expected, rows)
    steps = []
    named = (("prefix_lse", prefix_lse), ("suffix_lse", suffix_lse), ("output_lse", output_lse))
    for name, extent in named:
        shape, strides = extent or ((0, tokens), (0, 0))
        if shape[1] < tokens:
            expected = f"[{shape[0]}, at least {tokens}], the rows of output"
            raise errors.wrong("shape", f"{NAME}: {name}", expected, list(shape))
        steps.append(strides[0])
    if output_lse is not None:
        contract.check_elements_apart(NAME, "output_lse", *output_lse, formats.FLOAT32.bytes)
    return tokens, (tokens, *steps)


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("output", varies=dispatch.ROWS, written=True),
        dispatch.Arg("prefix_output", varies=dispatch.ROWS),
        dispatch.Arg("prefix_lse", varies=(1,), index=True),
        dispatch.Arg("suffix_output", varies=dispatch.ROWS),
        dispatch.Arg("suffix_lse", varies=(1,), index=True),
        dispatch.Arg("output_lse", varies=(1,), optional=True, index=True, written=True),
    ),
    plan=_plan,
    count=_count,
)
