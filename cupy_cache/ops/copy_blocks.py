# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Copying blocks inside paged caches, all layers and pairs in one launch."""

from __future__ import annotations

from ..runtime import contract, dispatch
from ..types import Layers, Pairs, StreamLike
from .shared import blocks, copying, mappings


def copy_blocks(
    key_caches: Layers,
    value_caches: Layers,
    block_mapping: Pairs,
    *,
    stream: StreamLike | None = None,
) -> None:
    """Copy blocks within every layer's key and value cache.

    For each layer and each pair ``(source, destination)`` the whole block ``source`` is copied over
    block ``destination``. All pairs are copied at once. Pointers and pairs in host memory travel
    inside the kernel's parameters: nothing is uploaded, nothing waits, and the call can be captured
    in a CUDA graph. What does not fit one launch's parameters takes several.

    Parameters
    ----------
    key_caches : list of arrays [num_blocks, ...]
        One for each layer, all of the same shape, strides, dtype (any) and device. Blocks may have
        gaps between and inside them (views of packed pages); only their elements are copied, of
        which no two arrays may share any.
    value_caches : list of arrays [num_blocks, ...]
        Likewise, as many; their blocks may be shaped differently from the keys'.
    block_mapping : sequence of (source, destination), or int32 or int64 array [num_pairs, 2]
        In host memory it is checked before anything is written: numbers in range, no destination
        twice, no block both source and destination. On the device it is used where it is: pairs
        out of range are skipped and recorded (see `raise_faults`), and repeated destinations or
        chains give undefined contents of the blocks concerned.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns the caches.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    OP((key_caches, value_caches, block_mapping), (), stream)


def copy_blocks_mla(
    kv_caches: Layers, block_mapping: Pairs, *, stream: StreamLike | None = None
) -> None:
    """Copy blocks within every layer's cache, where a layer has only one (multi-head latent
    attention): `copy_blocks` with a single list.

    Parameters
    ----------
    kv_caches : list of arrays [num_blocks, block_size, entry_size]
        One for each layer.
    block_mapping, stream
        As for `copy_blocks`.

    Raises
    ------
    CupyCacheError
        One of its kinds, before anything is written.
    """
    MLA_OP((kv_caches, block_mapping), (), stream)


def _plan(op, described, options):
    del options
    *tensors, mapping = described
    check = contract.Contract(op.name)
    geometries = []
    for arg, array in zip(op.args, tensors):
        check.shape(arg.name, array, "num_blocks ...")
        check.device(arg.name, array)
        check.writable(arg.name, array)
        geometries.append((blocks.geometry(op.name, arg.name, array, array), array.ptr))
    if mapping is not None:
        check.device("block_mapping", mapping)
    num_blocks, copy = check.sizes["num_blocks"], None
    if tensors[0].device.kind == "cuda":
        copy = blocks.CopyPlan(
            op.name, geometries, True, num_blocks, num_blocks, mapping,
            tensors[0].device.index,
        )  # fmt: skip

    def checked(pairs):
        mappings.check(op.name, pairs, num_blocks, num_blocks, disjoint=True)
        return pairs

    return copying.InPlace(tensors, copy, checked, index=lambda numbers: numbers)


def _op(name, *lists):
    return dispatch.Op(
        name,
        args=(
            *(dispatch.Arg(caches, layers=True, written=True) for caches in lists),
            dispatch.Arg("block_mapping", varies=dispatch.ROWS, chosen=True, pairs=True),
        ),
        plan=_plan,
        count=copying.count,
    )


OP = _op("copy_blocks", "key_caches", "value_caches")
MLA_OP = _op("copy_blocks_mla", "kv_caches")
