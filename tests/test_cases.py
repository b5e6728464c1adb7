# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The common cases are right wherever they run, and none is missing."""

import cases
import pytest

import cupy_cache as cc

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
