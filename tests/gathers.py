# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Cases for the operations that gather pages into rows, and how their results are compared."""

import hypothesis.strategies as st
import numpy as np
import pytest
import worlds
from guards import check_faults, draw_numbers

import cupy_cache as cc


def cache(rng, layout, num_blocks, block_size, inner, dtype, pad=0):
    """A cache view [NB, BS, *inner] in the memory order of ``layout``."""
    if layout == "NHD":
        return worlds.array(rng, (num_blocks, block_size, *inner), dtype, pad)
    if layout == "HND":
        heads, *rest = inner
        stored = worlds.array(rng, (num_blocks, heads, block_size, *rest), dtype, pad)
        return stored.permuted(0, 2, 1, *range(3, 2 + len(inner)))
    if layout == "packed":  # the second half of K|V entries, in pages that lie between others
        heads, size = inner
        return worlds.array(rng, (num_blocks, 2, block_size, heads, 2 * size), dtype, pad)[
            :, 1, ..., size:
        ]
    # Entries in pages of a pool of several layers, with bytes of another use after each entry.
    (size,) = inner
    return worlds.array(rng, (num_blocks, 3, block_size, size + 3), dtype, pad)[:, 1, :, :size]


def sequences(rng, count, width, block_size, num_blocks, with_starts):
    """Tables, row bounds and starts of ``count`` sequences that fit; some are empty, and the
    entries that no row needs are poisoned."""
    starts = rng.integers(0, width * block_size, count)
    if not with_starts:
        starts[:] = 0
    lengths = rng.integers(0, width * block_size - starts + 1)
    lengths[rng.random(count) < 0.3] = 0
    table = rng.integers(0, num_blocks, (count, width))
    page = np.arange(width)
    first, last = starts // block_size, (starts + lengths - 1) // block_size
    unused = (page < first[:, None]) | (page > last[:, None]) | (lengths == 0)[:, None]
    table[unused] = -7
    return table, np.concatenate([[0], np.cumsum(lengths)]), starts if with_starts else None


def typed(numbers, dtypes):
    """Specs of table, bounds and starts in these index types."""
    return [None if n is None else worlds.of_values(n.astype(t)) for n, t in zip(numbers, dtypes)]


@st.composite
def batches(draw, pool):
    """One of ``pool``, specialisations that end with block size and index types of table, bounds
    and starts (None: no starts); a number of blocks; table, bounds and starts of a batch; a number
    of rows near what that needs; and a seed for the contents."""
    case = draw(st.sampled_from(pool))
    *_, block_size, table_type, bounds_type, starts_type = case
    count, width = draw(st.integers(0, 5)), draw(st.integers(0, 4))
    num_blocks = draw(st.integers(1, 6))

    table = draw_numbers(draw, (count, width), st.integers(0, num_blocks - 1), table_type)
    starts = None
    if starts_type:
        starts = draw_numbers(draw, (count,), st.integers(0, width * block_size), starts_type)
    lengths = draw(st.lists(st.integers(0, 3 * block_size), min_size=count, max_size=count))
    bounds = np.cumsum([draw(st.integers(-2, 4)), *lengths]).astype(bounds_type)
    rows = max(int(bounds[-1]) + draw(st.integers(-2, 3)), 0)
    return case, num_blocks, table, bounds, starts, rows, draw(st.integers(0, 2**32))


def check(world, specs, call, expect, op="gather_cache", converted=None):
    """``call`` the operation on ``world``'s arrays of ``specs``; compare the whole storages, and
    the faults recorded for ``op``, with what ``expect`` makes of copies and returns.

    Numbers of the spec ``converted`` that are expected to be NaN may be any NaN.
    """
    call(*(world.put(s) for s in specs))
    present = [s for s in specs if s is not None]
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in present}
    faults = expect(*(s and s.on(expected[id(s.buffer)]) for s in specs))
    for spec in present:
        got, wanted = world.bytes_of(spec), expected[id(spec.buffer)]
        if spec is converted:
            ones, others = spec.on(got), spec.on(wanted)
            with np.errstate(invalid="ignore"):
                nan = np.isnan(others)
                np.testing.assert_array_equal(np.isnan(ones), nan)
            ones[nan] = others[nan] = 0
        np.testing.assert_array_equal(got, wanted)
    check_faults(op, faults)


def bounds_out_of_order(rng, count, rows):
    """Bounds of so many sequences of which some are below others, negative or beyond the rows."""
    bounds = np.sort(rng.integers(0, rows + 1, count + 1))
    odd = rng.random(count + 1) < rng.choice([0.05, 0.3, 1.0])
    wild = rng.choice([-(2**31), -1, 2**31 - 1, *range(-3, rows + 3)], count + 1)
    bounds[odd] = wild[odd]
    return bounds


def descents(bounds, argument, rows):
    """The faults to expect for these bounds: (row, argument, value, limit)."""
    return {
        (at, argument, int(bounds[at]), rows + 1)
        for at in range(1, len(bounds))
        if bounds[at] < bounds[at - 1]
    }


def as_on_numpy(world, specs, call, written, allowed, must):
    """``call`` the operation on ``world``'s arrays of ``specs``, and on NumPy's, and require the
    same bytes in what is ``written``. Faults are recorded if they ``must`` be, for the arguments
    that are ``allowed``. Returns what was written as NumPy's."""
    results = []
    for one in (worlds.NumPyWorld(), world):
        call(*(one.put(spec) for spec in specs))
        results.append([spec.on(one.bytes_of(spec)) for spec in written])
        try:
            cc.raise_faults()
            found = ()
        except cc.FaultError as error:
            found = error.faults
        assert found or not must
        assert {fault.argument for fault in found} <= {*allowed}
    for one, other in zip(*results):
        np.testing.assert_array_equal(
            np.ascontiguousarray(one).view(np.uint8), np.ascontiguousarray(other).view(np.uint8)
        )
    return results[0]


def refused(world, call, specs, error, *words):
    """``call`` on the world's arrays raises ``error`` with ``words`` and writes nothing."""
    with pytest.raises(error) as caught:
        call(*(world.put(s) for s in specs))
    assert issubclass(error, cc.CupyCacheError)
    for word in words:
        assert word in str(caught.value)
    for spec in specs:
        if spec is not None:
            np.testing.assert_array_equal(world.bytes_of(spec), spec.buffer.bytes)
