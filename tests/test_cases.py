# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The common cases are right wherever they run, and none is missing."""

import cases
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import dispatch

NO_OPERATION = {"packed_size", "raise_faults", "warmup"}


@pytest.mark.parametrize("name", cases.CASES)
def test_case(world, rng, name):
    case = cases.CASES[name](rng)
    case.call(world)
    case.check(world)


def test_every_operation_has_a_case():
    operations = {n for n in cc.__all__ if n.islower() and not n.startswith("_")} - NO_OPERATION
    found = {name.partition("-")[0] for name in cases.CASES}
    assert operations == found, f"in tests/cases.py: {operations ^ found}"


@pytest.mark.whole
@pytest.mark.parametrize("name", cases.CASES)
def test_options_that_are_numbers_go_with_their_types(name, rng, monkeypatch):
    """By `dispatch.exact`: True and 1.0 equal 1, and would find the plan that was made for it."""
    seen, call = [], dispatch.Op.__call__

    def noting(op, objects, options=(), *more):
        seen.append(options)
        call(op, objects, options, *more)

    monkeypatch.setattr(dispatch.Op, "__call__", noting)
    cases.CASES[name](rng).call(worlds.NumPyWorld())
    assert seen and not any(map(list, map(loose_numbers, seen)))


def loose_numbers(options):
    """Numbers in options, which may be nested, that stand without their types."""
    if isinstance(options, tuple):
        match options:
            case (tuple() as values, tuple() as types) if types == tuple(map(type, values)):
                return
        for option in options:
            yield from loose_numbers(option)
    elif isinstance(options, (int, float)) and not isinstance(options, bool):
        yield options
