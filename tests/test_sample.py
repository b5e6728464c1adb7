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


def test_kernels_that_come_later():
    kinds = ["numpy", "dlpack", "emulated"]
    given = items_of("test_a", [pytest.mark.kernels_later], world=kinds, size=range(9))
    kept = conftest._sample(given)
    assert sorted(item.callspec.params["world"] for item in kept) == ["dlpack", "numpy"]


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


class Metafunc(types.SimpleNamespace):
    """What pytest asks for a test's combinations, when it has them all."""

    def __init__(self, items, *args, options=()):
        super().__init__(config=Config(*args), definition=Item(nodeid="tests/test_x.py::test_a"))
        self.definition.get_closest_marker = items[0].get_closest_marker
        self.config.getoption = options.__contains__
        self._calls = [item.callspec for item in items]
        for item, call in zip(items, self._calls):
            call.id, call.marks = item.nodeid.partition("[")[2].rstrip("]"), []

    def left(self):
        """Those that become items."""
        steps = conftest.pytest_generate_tests(self)
        next(steps)
        assert next(steps, None) is None
        return self._calls


@pytest.mark.parametrize("marks", [(), [pytest.mark.each("size")], [pytest.mark.whole]])
def test_only_the_sample_is_made(marks):
    items = items_of("test_a", marks, **WORLDS, size=range(9))
    sample = conftest._sample(items)
    assert Metafunc(items).left() == [item.callspec for item in items if item in sample]


def test_one_is_made_of_what_is_never_in_the_sample():
    items = items_of("test_a", size=range(9))
    metafunc = Metafunc(items)
    for call in metafunc._calls:
        call.marks = [pytest.mark.extra.mark]
    assert metafunc.left() == [items[0].callspec]


@pytest.mark.parametrize(
    "args, options", [((), ["--rest"]), ((), ["--everything"]), (("test_x.py::test_a",), [])]
)
def test_all_are_made_where_they_may_run(args, options):
    items = items_of("test_a", size=range(9))
    assert len(Metafunc(items, *args, options=options).left()) == 9
