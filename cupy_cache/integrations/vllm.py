# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The cache operations of vLLM 0.33, and a way to have an installed vLLM call them here.

The functions have the names of those in vLLM's module ``_custom_ops``, and their arguments, in
their order::

    from cupy_cache.integrations import vllm as ops  # was: from vllm import _custom_ops as ops

`install` puts them in the place of an installed vLLM's own, `uninstall` puts vLLM's back, and
`routed` does both around a block of code::

    with cupy_cache.integrations.vllm.routed():
        llm = vllm.LLM(...)

What a function does is in the docstring of the one of its name in `cupy_cache`. nvfp4 caches are
refused. docs/vllm.md lists what is routed, what is not, and which of vLLM's backends call past it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cupy_cache
from cupy_cache import (
    concat_and_cache_mla,
    concat_and_cache_mla_grouped,
    concat_and_cache_mla_rope_fused,
    convert_fp8,
    cp_gather_cache,
    cp_gather_indexer_k_quant_cache,
    gather_and_maybe_dequant_cache,
    indexer_k_quant_and_cache,
    reshape_and_cache,
    reshape_and_cache_flash,
    rotary_embedding,
    swap_blocks_batch,
)

from .. import errors
from ..errors import MissingDependencyError
from ..runtime import apart, arrays, contract, making, tracing
from ..types import ArrayLike, Pairs

# What `install` routes by itself.
ROUTED = (
    "concat_and_cache_mla",
    "concat_and_cache_mla_rope_fused",
    "convert_fp8",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "gather_and_maybe_dequant_cache",
    "indexer_k_quant_and_cache",
    "merge_attn_states",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "swap_blocks",
    "swap_blocks_batch",
)
# What it does not, and why.
NOT_ROUTED = {
    "concat_and_cache_mla_grouped": "vLLM gives addresses, without which slots have no bound: call "
    "it with num_blocks",
    "cp_gather_and_upconvert_nvfp4_kv_cache": "nvfp4 caches are not read here",
    "rotary_embedding": "vLLM calls it in what it compiles whole, where plain functions are "
    "refused: name it with enforce_eager=True",
}

__all__ = [
    "NOT_ROUTED",
    "ROUTED",
    "concat_and_cache_mla",
    "concat_and_cache_mla_grouped",
    "concat_and_cache_mla_rope_fused",
    "convert_fp8",
    "cp_gather_and_upconvert_fp8_kv_cache",
    "cp_gather_and_upconvert_nvfp4_kv_cache",
    "cp_gather_cache",
    "cp_gather_indexer_k_quant_cache",
    "gather_and_maybe_dequant_cache",
    "indexer_k_quant_and_cache",
    "install",
    "merge_attn_states",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "rotary_embedding",
    "routed",
    "swap_blocks",
    "swap_blocks_batch",
    "uninstall",
]


def swap_blocks(
    src: ArrayLike, dst: ArrayLike, block_size_in_bytes: int, block_mapping: Pairs
) -> None:
    """`cupy_cache.swap_blocks` with the size of a block, which vLLM needs and gives third."""
    cupy_cache.swap_blocks(src, dst, block_size_in_bytes, block_mapping)


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: ArrayLike,
    dst: ArrayLike,
    block_table: ArrayLike,
    workspace_starts: ArrayLike,
    batch_size: int,
    seq_starts: ArrayLike | None = None,
    host_cache: ArrayLike | None = None,
    host_row_ids: ArrayLike | None = None,
    device_row_ids: ArrayLike | None = None,
) -> None:
    """`cupy_cache.cp_gather_and_upconvert_fp8_kv_cache`, of caches that are on the GPU in whole.

    Parameters
    ----------
    src_cache, dst, block_table, workspace_starts, batch_size, seq_starts
        As there.
    host_cache, host_row_ids, device_row_ids : None
        Rows in host memory are not read here.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    rows = {
        "host_cache": host_cache, "host_row_ids": host_row_ids, "device_row_ids": device_row_ids,
    }  # fmt: skip
    for name, value in rows.items():
        if value is not None:
            expected = "None, since rows in host memory are not read here"
            raise errors.wrong(
                "value", f"cp_gather_and_upconvert_fp8_kv_cache: {name}", expected, "an array"
            )
    cupy_cache.cp_gather_and_upconvert_fp8_kv_cache(
        src_cache, dst, block_table, workspace_starts, batch_size, seq_starts
    )


def cp_gather_and_upconvert_nvfp4_kv_cache(
    src_cache: ArrayLike,
    dst: ArrayLike,
    block_table: ArrayLike,
    workspace_starts: ArrayLike,
    batch_size: int,
) -> None:
    """Refused: nvfp4 caches are not read here.

    Parameters
    ----------
    src_cache, dst, block_table, workspace_starts, batch_size : ignored

    Raises
    ------
    ArgumentError
        Always.
    """
    del src_cache, dst, block_table, workspace_starts, batch_size
    expected = "another format, since nvfp4 is not read here"
    raise errors.wrong(
        "value", "cp_gather_and_upconvert_nvfp4_kv_cache: src_cache", expected, "an nvfp4 cache"
    )


def merge_attn_states(
    output: ArrayLike,
    prefix_output: ArrayLike,
    prefix_lse: ArrayLike,
    suffix_output: ArrayLike,
    suffix_lse: ArrayLike,
    output_lse: ArrayLike | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: ArrayLike | None = None,
) -> None:
    """`cupy_cache.merge_attn_states`, of the first tokens only where that is asked for.

    Parameters
    ----------
    output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse
        As there; arrays that can be sliced and assigned to.
    prefill_tokens_with_context : int, optional
        Of tokens from this one on the suffix is copied. By default all tokens are merged.
    output_scale : None
        fp8 outputs are not written here.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    op = "merge_attn_states"
    if output_scale is not None:
        expected = "None, since fp8 outputs are not written here"
        raise errors.wrong("value", f"{op}: output_scale", expected, "an array")
    if prefill_tokens_with_context is None:
        cupy_cache.merge_attn_states(
            output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse
        )
        return
    count = contract.integer(op, "prefill_tokens_with_context", prefill_tokens_with_context, 0)
    given: tuple[Any, ...] = output, prefix_output, prefix_lse, suffix_output, suffix_lse
    merged, prefix, prefix_weights, suffix, weights = given
    weights_out: Any = output_lse
    tokens = _extent(op, "output", merged, 0)
    count = min(count, tokens)
    # What is copied must be right, too, before anything is written.
    check = contract.Contract(op)
    check.writable("output", arrays.view(output, f"{op}: output"), rows=True)
    copied = {"suffix_output": (suffix, 0), "suffix_lse": (weights, 1)}
    if weights_out is not None:
        check.writable("output_lse", arrays.view(weights_out, f"{op}: output_lse"))
        copied["output_lse"] = weights_out, 1
    for name, array, dim in (("prefix_output", prefix, 0), ("prefix_lse", prefix_weights, 1)):
        _extent(op, name, array, dim)  # they are sliced
    kind = arrays.framework_of(output, f"{op}: output")
    if kind not in ("torch", "cupy", "numpy"):
        raise errors.wrong("framework", f"{op}: output", "torch, cupy or numpy", kind)
    for name, (array, dim) in copied.items():
        found = arrays.framework_of(array, f"{op}: {name}")
        if found != kind:
            raise errors.wrong("framework", f"{op}: {name}", f"{kind} like output", found)
        if _extent(op, name, array, dim) < tokens:
            expected = f"at least {tokens} in dimension {dim}, the rows of output"
            got = str(_extent(op, name, array, dim))
            raise errors.wrong("shape", f"{op}: {name}", expected, got)
    if weights_out is not None:
        apart.refuse_shared(op, output=merged, output_lse=weights_out)
    cupy_cache.merge_attn_states(
        *(
            None if array is None else _sliced(op, name, array, dim, 0, count)
            for name, array, dim in (
                ("output", merged, 0), ("prefix_output", prefix, 0),
                ("prefix_lse", prefix_weights, 1), ("suffix_output", suffix, 0),
                ("suffix_lse", weights, 1), ("output_lse", weights_out, 1),
            )
        )
    )  # fmt: skip
    if kind == "torch":  # which refuses to write what needs a gradient
        merged = merged.detach()
        weights_out = None if weights_out is None else weights_out.detach()
    with making.on_device_of(output):
        merged[count:] = suffix[count:tokens]
        if weights_out is not None:
            weights_out[:, count:tokens] = weights[:, count:tokens]


def _sliced(op: str, name: str, array: Any, dim: int, first: int, last: int) -> Any:
    """Some of an array's rows, along dimension 0 or 1."""
    try:
        return array[first:last] if dim == 0 else array[:, first:last]
    except Exception as error:
        expected, got = "an array that can be sliced", type(array).__name__
        raise errors.wrong("type", f"{op}: {name}", expected, got) from error


def _extent(op: str, name: str, array: ArrayLike, dim: int) -> int:
    """How large a dimension of an array is."""
    shape = arrays.view(array, f"{op}: {name}").shape
    if len(shape) <= dim:
        expected = f"at least {errors.counted(dim + 1, 'dimension')}"
        raise errors.wrong("shape", f"{op}: {name}", expected, list(shape))
    return shape[dim]


if not TYPE_CHECKING:  # to which a module with this function has every name

    def __getattr__(name: str) -> Any:
        """Refuse a name, with where it is."""
        text = f"module {__name__!r} has no attribute {name!r}"
        if name in cupy_cache.__all__:
            text += f": vLLM 0.33 has none of that name; cupy_cache.{name} is it"
        elif not name.startswith("_"):
            text += ": it has the operations on caches; take others from vllm._custom_ops"
        raise AttributeError(text)


# --- routing --------------------------------------------------------------------------------------

_originals: dict[str, Any] = {}  # of what is routed now: vLLM's own functions


def install(names: Sequence[str] = ROUTED) -> tuple[str, ...]:
    """Have the installed vLLM call these functions instead of its own.

    They are put into ``vllm._custom_ops``, and into each module of vLLM that has imported one from
    there. Call it before an engine is made: objects that hold a function keep what they hold. It
    holds for this process; vLLM's workers are others unless ``VLLM_ENABLE_V1_MULTIPROCESSING=0``,
    or a plug-in of vLLM calls it there.

    Parameters
    ----------
    names : sequence of str
        Which functions; by default `ROUTED`. What is routed already stays so.

    Returns
    -------
    tuple of str
        Those that were not routed before.

    Raises
    ------
    MissingDependencyError
        vLLM cannot be imported.
    ArgumentError
        A name is of none of these functions, or this vLLM has no such function or one with other
        arguments. Nothing is routed then.
    """
    if isinstance(names, str):
        names = (names,)
    new = tuple(name for name in dict.fromkeys(names) if name not in _originals)
    module = _custom_ops()
    originals = {name: _checked(module, name) for name in new}
    for name, original in originals.items():
        _exchange(original, globals()[name])
    _originals.update(originals)
    return new


def uninstall() -> None:
    """Have vLLM call its own functions again; does nothing where nothing is routed."""
    _restore(tuple(_originals))


@contextlib.contextmanager
def routed(names: Sequence[str] = ROUTED) -> Iterator[tuple[str, ...]]:
    """`install` for a ``with`` statement, which gives what was routed, and undoes it at its end.

    Parameters
    ----------
    names : sequence of str
        As for `install`, which raises what this raises.
    """
    new = install(names)
    try:
        yield new
    finally:
        _restore(new)


def _custom_ops() -> Any:
    try:
        from vllm import _custom_ops as module
    except ImportError as error:
        raise MissingDependencyError(
            f"cupy_cache.integrations.vllm routes an installed vLLM (pip install vllm==0.33.0): "
            f"{error}"
        ) from error
    return module


def _checked(module: Any, name: str) -> Any:
    """vLLM's function of this name, which can be called as ours can."""
    if name not in ROUTED and name not in NOT_ROUTED:
        offered = ", ".join((*ROUTED, *NOT_ROUTED))
        raise errors.wrong("value", "install: names", f"some of {offered}", repr(name))
    original = getattr(module, name, None)
    if not callable(original):
        expected = "functions that this vLLM has, as 0.33 does"
        raise errors.wrong("value", "install: names", expected, repr(name))
    ours = list(inspect.signature(globals()[name]).parameters.values())
    theirs = list(inspect.signature(original).parameters.values())
    if not _takes(ours, theirs):
        expected = "functions with the arguments of vLLM 0.33"
        got = f"{name!r}, which takes {', '.join(p.name for p in theirs)} here"
        raise errors.wrong("value", "install: names", expected, got)
    return original


def _takes(ours: list[inspect.Parameter], theirs: list[inspect.Parameter]) -> bool:
    """Whether each call of theirs is one of ours, and means the same."""
    return len(ours) >= len(theirs) and all(
        mine.name == other.name
        and mine.kind == other.kind
        and (other.default is other.empty or mine.default == other.default)
        for mine, other in zip(ours, theirs)
    ) and all(mine.default is not mine.empty for mine in ours[len(theirs) :])  # fmt: skip


def _exchange(old: Any, new: Any) -> None:
    """In every module of vLLM, whatever it is called there."""
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] == "vllm":
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _restore(names: tuple[str, ...]) -> None:
    for name in names:
        if name in _originals:
            _exchange(globals()[name], _originals.pop(name))


tracing.hint({name: globals()[name] for name in __all__ if callable(globals()[name])})
