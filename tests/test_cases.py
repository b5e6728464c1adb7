# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The common cases are right wherever they run, and none is missing."""

import functools
import inspect
import weakref

import cases
import numpy as np
import pytest
import worlds

import cupy_cache as cc
from cupy_cache.runtime import dispatch

# No operations; other names of one.
NO_OPERATION = {"overlap", "packed_size", "raise_faults", "warmup"}
NO_OPERATION |= {"block_table_to_csr", "csr_to_block_table"}
NO_OPERATION |= {"flash_attn", "paged_attention_v1", "paged_attention_v2"}


@pytest.mark.parametrize("name", cases.CASES)
def test_case(world, rng, name):
    case = cases.CASES[name](rng)
    case.call(world)
    case.check(world)


def test_every_operation_has_a_case():
    operations = {n for n in cc.__all__ if n.islower() and not n.startswith("_")} - NO_OPERATION
    found = {name.partition("-")[0] for name in cases.CASES}
    assert operations == found, f"in tests/cases.py: {operations ^ found}"


class Index:
    """What is an integer by its `__index__` alone."""

    def __init__(self, value):
        self._value = value

    def __index__(self):
        return self._value


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, Index], ids=lambda k: k.__name__)
def test_options_have_one_form(name, kind, monkeypatch):
    """Integers of whatever kind become Python's before anything is remembered: True and 1.0 equal
    1, and would find the plan that was made for it."""
    seen, call = [], dispatch.Op.__call__

    def noting(op, objects, options=(), stream=None, scalars=()):
        seen.append((options, list(map(type, flat(options))), list(map(type, flat(scalars)))))
        call(op, objects, options, stream, scalars)

    def run():
        seen.clear()
        cases.CASES[name](np.random.default_rng(0)).call(worlds.NumPyWorld())
        return list(seen)

    monkeypatch.setattr(dispatch.Op, "__call__", noting)
    expected = run()
    assert expected and not any(float in kinds for _, kinds, _ in expected)
    for given in cc.__all__:
        public = getattr(cc, given)
        if inspect.isfunction(public):
            monkeypatch.setattr(cc, given, with_integers(public, kind))
    assert run() == expected


def flat(options):
    """Options, which may be nested."""
    for option in options:
        if isinstance(option, (tuple, list)):
            yield from flat(option)
        else:
            yield option


def with_integers(function, kind):
    """``function``, which gets its integers as ``kind``."""

    def changed(value):
        if type(value) is int and value >= 0:
            return kind(value)
        if isinstance(value, list) and value and all(type(item) is int for item in value):
            return value if min(value) < 0 else [kind(item) for item in value]
        return value

    @functools.wraps(function)
    def wrapper(*args, **named):
        return function(*map(changed, args), **{name: changed(v) for name, v in named.items()})

    return wrapper


class Stream:
    """Is destroyed where it is dropped, as CuPy's are."""

    cuda_stream = 5


STREAMED = [
    name
    for name in cases.CASES
    if "stream" in inspect.signature(getattr(cc, name.partition("-")[0])).parameters
]


@pytest.mark.whole
@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_lives_as_long_as_the_call(rng, monkeypatch, name):
    """Nobody else needs to keep what is given for the call alone."""
    made, seen = [], []

    def stream():
        one = Stream()
        made.append(weakref.ref(one))
        return one

    def function(*args, **options):
        # Nothing but the call may keep it, as a dict of its options would.
        given = [f"args[{at}]" for at in range(len(args))]
        given += [f"{option}=options[{option!r}]" for option in options]
        names = {"f": original, "args": args, "options": options, "stream": stream}
        return eval(f"f({', '.join(given)}, stream=stream())", names)

    def finish(self, entry, values, tables, its, *others):
        seen.append(its)
        assert its == 5 and made[-1]() is not None
        return finished(self, entry, values, tables, its, *others)

    original, finished = getattr(cc, name.partition("-")[0]), dispatch.Op.finish
    monkeypatch.setattr(cc, name.partition("-")[0], function)
    monkeypatch.setattr(dispatch.Op, "finish", finish)
    cases.CASES[name](rng).call(worlds.NumPyWorld())
    assert len(made) == len(seen)


def test_streams_of_methods_live_as_long_as_the_call(rng, monkeypatch):
    def finish(self, entry, values, tables, its, *others):
        assert its == 5 and its.owner.cuda_stream == 5
        seen.append(self.name)
        return finished(self, entry, values, tables, its, *others)

    seen, finished = [], dispatch.Op.finish
    monkeypatch.setattr(dispatch.Op, "finish", finish)
    cache = cc.PagedKVCache.allocate(1, 4, 4, 1, 8, dtype="float32", framework="numpy")
    rows, slots, table = np.ones((2, 1, 8), np.float32), np.arange(2), np.zeros((1, 1), np.int32)
    bounds = np.array([0, 2], np.int32)
    cache.writer(0)(rows, rows, slots, stream=Stream())
    cache.write(0, rows, rows, slots, stream=Stream())
    cache.attend(0, rows[:1], table, bounds[1:], stream=Stream())
    cache.gather(0, table, bounds, num_tokens=2, stream=Stream())
    assert len(seen) == 4
