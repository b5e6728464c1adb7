# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Indices that kernels must not follow, and the faults that are recorded for them."""

import hypothesis.strategies as st
import numpy as np

import cupy_cache as cc

# What tables, bounds, starts or positions may hold by mistake, wherever they lead.
BAD = (-(2**63), -(2**31), -1, 2**31, 2**32 + 1, 2**62, 2**63 - 1)


def draw_numbers(draw, shape, good, dtype):
    """An array of ``good``, a strategy; half of the times with bad numbers among them."""
    limits = np.iinfo(dtype)
    wild = st.sampled_from([b for b in BAD if limits.min <= b <= limits.max])
    n = int(np.prod(shape))
    value = st.one_of(good, good, good, wild) if draw(st.booleans()) else good
    drawn = draw(st.lists(value, min_size=n, max_size=n))
    return np.array(drawn, dtype).reshape(shape)


def check_faults(op, expected):
    """What is recorded for ``op`` is among ``expected``: (row, argument, value, limit) of each
    violation. The first one met is recorded; on a GPU any may be the first."""
    try:
        cc.raise_faults()
        recorded = ()
    except cc.FaultError as error:
        recorded = error.faults
    assert bool(recorded) == bool(expected)
    for fault in recorded:
        assert fault.op == op
        assert (fault.row, fault.argument, fault.value, fault.limit) in expected
