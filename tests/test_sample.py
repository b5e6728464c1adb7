# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Which combinations of parameters run by default, and which do not: together they are all."""

import types

import conftest
import pytest


class Item(types.SimpleNamespace):
    """Known by its identity, as pytest's are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def items_of(test, marks=(), **params):
    """What pytest makes of a test: one item for each combination of values."""
    found = [{}]
    for name, values in params.items():
        found = [{**one, name: value} for one in found for value in values]
    marks = {mark.name: mark for mark in marks}
    return [
        Item(
            nodeid=f"tests/test_x.py::{test}[{'-'.join(map(str, one.values()))}]",
            callspec=types.SimpleNamespace(params=one),
            get_closest_marker=marks.get,
        )
        for one in found
    ]


WORLDS = {"world": ["numpy", "emulated"]}


def test_one_on_each_kind_of_array():
    kept = conftest._sample(items_of("test_a", **WORLDS, size=range(9)))
    assert sorted(item.callspec.params["world"] for item in kept) == ["emulated", "numpy"]


def test_kinds_of_arrays_that_take_turns():
    kinds = ["numpy", "torch-cpu", "dlpack", "emulated", "torch-cuda"]
    chosen = set()
    for name in "abcdefghijklmnop":
        kept = conftest._sample(items_of(f"test_{name}", world=kinds))
        found = {item.callspec.params["world"] for item in kept}
        assert len(kept) == 3 and {"numpy", "torch-cuda"} < found
        chosen |= found
    assert chosen == {*kinds}


def test_without_kinds_of_arrays():
    assert len(conftest._sample(items_of("test_a", size=range(9)))) == conftest.WITHOUT_ARRAYS


def test_whole():
    assert len(conftest._sample(items_of("test_a", [pytest.mark.whole], size=range(9)))) == 9


def test_one_for_each_value():
    given = items_of("test_a", [pytest.mark.each("a", "b")], a=[[1], [2]], b="xyz", c=range(5))
    kept = [item.callspec.params for item in conftest._sample(given)]
    assert len(kept) == 6 and len({(*one["a"], one["b"]) for one in kept}) == 6


def test_extra_is_never_there():
    assert not conftest._sample(items_of("test_a", [pytest.mark.extra], size=range(9)))
    assert not conftest._sample(
        items_of("test_a", [pytest.mark.whole, pytest.mark.extra], size=range(9))
    )


class Config:
    """What of pytest's is asked for."""

    def __init__(self, *args):
        self.args, self.gone = args, []
        self.hook = types.SimpleNamespace(pytest_deselected=lambda items: self.gone.extend(items))


def test_the_sample_and_the_rest_are_all():
    given = [
        *items_of("test_a", **WORLDS, size=range(9)),
        *items_of("test_b", [pytest.mark.extra], size=range(3)),
        *items_of("test_c", [pytest.mark.each("size")], **WORLDS, size="ab", more=range(3)),
    ]
    parts = []
    for rest in (False, True):
        config, items = Config("tests"), list(given)
        conftest._keep(config, items, rest)
        assert {*items, *config.gone} == {*given} and len(items) + len(config.gone) == len(given)
        parts.append(items)
    assert not {*parts[0]} & {*parts[1]} and len(parts[0]) == 2 + 4


def test_what_is_named_runs_whole():
    items = items_of("test_a", size=range(9))
    conftest._keep(Config("tests/test_x.py::test_a"), items, rest=False)
    assert len(items) == 9
