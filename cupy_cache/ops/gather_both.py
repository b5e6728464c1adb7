# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Reading a layer's keys and values back into rows in one launch: what `PagedKVCache.gather` calls.
Its arguments are called what that calls them."""

import functools

from .. import cpu, errors
from ..runtime import contract, dispatch, launch, modules, params, plans, spelling
from .shared import gathering

NAME = "PagedKVCache.gather"
STEM = "gather_both"
PARAMS = params.Struct(
    per_call="rows[0]:ptr rows[1]:ptr block_table:ptr cu_seq_lens:ptr seq_starts:ptr "
    "caches[0]:ptr caches[1]:ptr scales[0]:ptr scales[1]:ptr "
    "row_count:i64 sequences:i64 table_width:i64 table_stride:i64 scale_values:f32[2] "
    "even.segments:f32 even.rows:f32",
    constant="num_blocks:i64 start_stride:i64 "
    f"{gathering.sides('sides[0]')} {gathering.sides('sides[1]')}",
)
ROWS = "out[0]", "out[1]"
CACHES = "key_caches", "value_caches"
SCALES = "k_scales", "v_scales"
NAMES = tuple(
    gathering.Names(cache, rows, scale, scale_cache)
    for cache, rows, scale, scale_cache in zip(
        CACHES, ROWS, SCALES, ("k_scale_caches", "v_scale_caches")
    )
)
INDICES = "block_table", "cu_seq_lens", "seq_starts"


class _Shape:
    """Launch shapes for two sides with a row of blocks each."""

    def __init__(self, threads, device):
        self._flat = launch.FlatShape(threads, device, gathering.MAX_THREADS)

    def __call__(self, rows):
        (x, _, z), threads = self._flat(rows)
        return (x, 2, z), threads


def _plan(op, described, options):
    layouts, kv_cache_dtype, by_token = options
    rows, indices, caches, scales = described[:2], described[2:5], described[5:7], described[7:]
    moved = []
    for at, layout in enumerate(layouts):
        check = contract.Contract(op.name)  # of its own: sizes of heads may differ
        check.shape(CACHES[0], caches[0], "num_blocks ...")
        check.device(CACHES[0], caches[0])
        moved.append(
            gathering.movement(
                check, caches[at], rows[at], scales[at], layout, kv_cache_dtype, by_token, NAMES[at]
            )
        )
        gathering.check_indices(check, INDICES, indices)
    keys, values = moved
    if keys.block_size != values.block_size:
        expected = f"blocks of {errors.counted(keys.block_size, 'slot')} like {CACHES[0]}"
        raise errors.wrong("shape", f"{op.name}: {CACHES[1]}", expected, values.block_size)
    if rows[0].device.kind == "cpu":
        run = functools.partial(cpu.gather_both, op=op.name, sides=moved)
        return plans.NumPyPlan(run, op.args, described, (*ROWS, *CACHES))
    kernel = modules.Kernel(
        op.name,
        STEM,
        f"gather_both<{keys.shape}, {values.shape}, {keys.vector}, {values.vector}, "
        f"{keys.block_size}, {spelling.indices(*indices)}, {gathering.MAX_THREADS}>",
        PARAMS,
        guarded=("seq_starts", "block_table", "cu_seq_lens"),
        converts=keys.stored is not None,
    )
    device, starts = rows[0].device.index, indices[2]
    constants = caches[0].shape[0], starts.strides[0] if starts else 0
    launcher = launch.Launcher(kernel, device, (*constants, *keys.strides, *values.strides))
    return plans.KernelPlan(launcher, _Shape(max(keys.threads, values.threads), device))


def _count(extents, options, scalars):
    """``scalars`` are the scales that are numbers, and how many rows there are; None where that is
    as many as the shorter ``out`` has."""
    del options
    k_scale, v_scale, num_tokens = scalars
    keys, values, ((table_rows, width), (step, _)), bounds, starts = extents
    rows, sequences = gathering.count_rows(
        NAME, min(keys, values), num_tokens, bounds, table_rows, starts, "out"
    )
    even = launch.evenly(sequences, rows)
    return rows, (rows, sequences, width, step, k_scale, v_scale, *even)


# What the caches of a `PagedKVCache` are comes last: the addresses of the others are then in order.
OP = dispatch.Op(
    NAME,
    args=(
        *(dispatch.Arg(name, varies=dispatch.ROWS, written=True) for name in ROWS),
        dispatch.Arg("block_table", varies=(0, 1), index=True),
        dispatch.Arg("cu_seq_lens", varies=dispatch.ROWS, index=True),
        dispatch.Arg("seq_starts", varies=dispatch.ROWS, optional=True, index=True),
        *(dispatch.Arg(name) for name in CACHES),
        *(dispatch.Arg(name, optional=True) for name in SCALES),
    ),
    plan=_plan,
    destination=(0, 1),
    count=_count,
)
