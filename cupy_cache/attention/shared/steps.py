# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of a step's arrays, common to all attention."""

from ... import errors
from ...runtime import contract, formats


def check_shapes(check, named, value_size):
    """Match the shapes of all but query and caches. ``check``: the call's `contract.Contract`.
    ``named``: {argument: array or None}. ``value_size``: the last extent of out."""
    for name, pattern in (
        ("block_table", "_ _"), ("seq_lens", "_"), ("out", f"_ num_heads {value_size}"),
        ("query_start_loc", "_"), ("lse", "_ num_heads"),
    ):  # fmt: skip
        if named[name] is not None:
            check.shape(name, named[name], pattern)


def check_arrays(check, named, caches):
    """Refuse dtypes, devices and strides that attention cannot read or write. The dtypes of the
    query and of the arguments ``caches`` were checked."""
    for name in ("block_table", "seq_lens", "query_start_loc"):
        if named[name] is not None:
            check.dtype(name, named[name], *formats.INDICES)
    check.dtype("out", named["out"], named["query"].dtype)
    if named["lse"] is not None:
        check.dtype("lse", named["lse"], formats.FLOAT32)
    for name, array in named.items():
        if array is not None:
            check.readable(name, array)
    for name in ("query", *caches, "block_table", "out"):
        check.contiguous(name, named[name])
    for name in ("seq_lens", "query_start_loc"):
        if named[name] is not None:
            check.contiguous_rows(name, named[name])
    for name in ("out", "lse"):
        if named[name] is not None:
            check.writable(name, named[name], rows=True)


def check_query(check, query, fmt, cache_name, cache):
    """Refuse queries of no float dtype, and of another than that of a raw cache of floats. A cache
    stays, and queries are new at each call: so the query is the one to blame."""
    check.dtype("query", query, *formats.FLOATS)
    if fmt.stored is None and cache.dtype in formats.FLOATS:
        check.dtype("query", query, cache.dtype, way_out=f"it is that of a raw {cache_name}")


def check_query_on_gpu(check, query):
    """Refuse queries of a dtype that the kernels cannot multiply."""
    check.dtype(
        "query", query, *formats.FLOATS[:2],
        way_out="for float32 on a GPU use gather_cache and the framework's attention",
    )  # fmt: skip


def check_counts(op, tokens, sequences, table_rows, starts, written):
    """Refuse counts of a step's arrays that do not fit each other. ``starts``: the length of
    query_start_loc, or None. ``written``: {name: rows or None} of results."""
    contract.check_sequence_count(op, "seq_lens", sequences)
    if table_rows < sequences:
        expected = f"rows for the {errors.counted(sequences, 'sequence')} of seq_lens"
        raise errors.wrong("shape", f"{op}: block_table", expected, table_rows)
    if starts is None and tokens != sequences:
        expected = f"[{tokens}], one for each row of query, where there is no query_start_loc"
        raise errors.wrong("shape", f"{op}: seq_lens", expected, f"[{sequences}]")
    if starts is not None and starts != sequences + 1:
        expected = f"[{sequences + 1}], one more than seq_lens"
        raise errors.wrong("shape", f"{op}: query_start_loc", expected, f"[{starts}]")
    for name, rows in written.items():
        if rows is not None and rows < tokens:
            expected = f"at least {errors.counted(tokens, 'row')}, those of query"
            raise errors.wrong("shape", f"{op}: {name}", expected, rows)
