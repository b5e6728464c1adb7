# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Random calls of every public function: each gives the right bytes, or a named error with nothing
written, and leaves no fault behind. ``--surface-calls=N`` makes more of them."""

import collections
import contextlib
import inspect

import numpy as np
import pytest
import recording
import surface
from surface import others
from surface.arrays import ORDINARY_FORMS, fits_torch, tensor

import cupy_cache as cc
from cupy_cache.runtime import dispatch, launch

PARTS = 10
HISTORY = 100  # calls after which everything is forgotten


def calls_of(config, part):
    return range(part, config.getoption("--surface-calls"), PARTS)


@contextlib.contextmanager
def told_of(seed, number, call):
    """What fails says which call it was."""
    try:
        yield
    except AssertionError as error:
        shown = f"CUPYCACHE_TEST_SEED={seed}, call {number}: {call!r}\n{error}"
        raise AssertionError(shown) from error


@pytest.mark.extra
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part, request, seed):
    """The n-th call of a part depends on the seed and on n; what is remembered then, on the calls
    before, up to a hundred."""
    taken = collections.Counter()
    made = collections.Counter()
    for count, number in enumerate(calls_of(request.config, part)):
        if count % HISTORY == 0:
            dispatch.forget_everything()
        rng = np.random.default_rng([seed, number])
        call = surface.call(rng)
        with told_of(seed, number, call):
            made[call.name] += 1
            taken[call.name] += surface.judge(call, rng)
    dispatch.forget_everything()
    # Else the test would hold of nothing. Of few calls all may be refused by chance.
    if sum(made.values()) >= 1000:
        assert sum(taken.values()) > sum(made.values()) // 2, taken
    assert all(taken[name] > made[name] // 10 for name in made if made[name] >= 100), taken


def far(spec):
    """A tensor whose strides that mean nothing have any size."""
    shown = tensor(spec)
    empty = 0 in spec.shape
    strides = [2**62 if empty or n == 1 else s for n, s in zip(spec.shape, shown.stride())]
    return shown.as_strided(spec.shape, strides)


@pytest.mark.extra
@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_strides_that_mean_nothing(request, seed, monkeypatch, on_gpu):
    """Of extents of 1, and of what is empty: in bytes they may take more than 64 bits."""
    pytest.importorskip("torch")
    recorder = recording.recorder(monkeypatch) if on_gpu else None
    taken = collections.Counter()
    for number in range(request.config.getoption("--surface-calls") // PARTS):
        rng = np.random.default_rng([seed, 3, number])
        call = surface.call(rng)
        specs = [spec for _, spec in call.specs()]
        if call.changes or call.name == "swap_blocks_batch" or not all(map(fits_torch, specs)):
            continue
        for spec in specs:
            if call.forms[id(spec)] in ORDINARY_FORMS:
                call.forms[id(spec)] = far
        with told_of(seed, number, call):
            if not on_gpu:
                taken[surface.judge(call, rng)] += 1
                continue
            for _ in range(3):
                taken[surface.judge_recorded(call, rng, recorder)] += 1
    dispatch.forget_everything()
    launch.processors.cache_clear()
    assert taken[True] > sum(taken.values()) // 2


# Public functions of which no random call is made, and why.
NOT_CALLED = {
    "raise_faults": "each call is looked at by it",
    "warmup": "it compiles, and is refused without a GPU",
    "paged_attention_v1": "another name of paged_attention",
    "paged_attention_v2": "likewise",
    "block_table_to_csr": "it writes no array that is given: test_csr.py",
    "csr_to_block_table": "likewise",
}


@pytest.mark.extra
def test_every_function_is_called():
    made = {surface.call(np.random.default_rng([0, number])).name for number in range(3000)}
    functions = {name for name in cc.__all__ if inspect.isfunction(getattr(cc, name))}
    assert made == functions - NOT_CALLED.keys()


def contents(arrays):
    """The bytes of those that have any."""
    found = []
    for one in arrays:
        if isinstance(one, others.torch.Tensor if others.torch else ()):
            has_bytes = one.layout == others.torch.strided and not one.is_nested and not one.is_meta
            one = one.detach().numpy() if has_bytes else None
        found.append(one.tobytes() if isinstance(one, np.ndarray) else None)
    return found


@pytest.mark.extra
@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_random_calls_of_methods_and_other_names(request, seed):
    """Each ends, or is refused by a named error with nothing written."""
    taken = collections.Counter()
    total = request.config.getoption("--surface-calls") // PARTS
    for number in range(total):
        rng = np.random.default_rng([seed, 2, number])
        tensors = others.torch is not None and rng.random() < 0.5
        made, caches = others.calls(rng, others.torch.from_numpy if tensors else np.asarray)
        name = surface.pick(rng, *made)
        function, given = made[name]
        for argument in rng.permutation(list(given))[: rng.integers(1, 3)].tolist():
            given[argument] = others.changed(rng, given[argument])
        shown = {n: type(value).__name__ for n, value in given.items()}
        arrays = [*given.values(), *caches]
        before, refused = contents(arrays), False
        try:
            function(**given)
        except cc.CupyCacheError as error:
            refused = True
            # "BlockTables: device 2: …", where there is no CuPy
            missing = isinstance(error, cc.MissingDependencyError) and ": device " in str(error)
            formed = ": Invalid " in str(error) and ": expected " in str(error)
            assert missing or formed, (name, shown)
        except Exception as error:
            told = f"CUPYCACHE_TEST_SEED={seed}, call {number}: {name}{shown}"
            raise AssertionError(told) from error
        assert not refused or contents(arrays) == before, (number, name, shown)
        taken[refused] += 1
        with contextlib.suppress(cc.FaultError):
            cc.raise_faults()
    if total >= 1000:
        assert taken[True] > total // 3 and taken[False] > total // 20, taken


@pytest.mark.extra
@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")
def test_random_calls_for_a_gpu(request, seed, monkeypatch):
    """Plans and fast paths for kernels, with tensors that count as on a GPU: each call launches, or
    is refused with nothing launched, whatever was remembered."""
    pytest.importorskip("torch")
    recorder = recording.recorder(monkeypatch)
    taken = collections.Counter()
    total = request.config.getoption("--surface-calls") // PARTS
    for number in range(total):
        if number % HISTORY == 0:
            dispatch.forget_everything()
        rng = np.random.default_rng([seed, 1, number])
        call = surface.call(rng)
        with told_of(seed, number, call):
            for _ in range(3):  # the third time on a fast path, if there is one
                taken[surface.judge_recorded(call, rng, recorder)] += 1
    dispatch.forget_everything()
    launch.processors.cache_clear()
    if total >= 1000:
        assert taken[True] > total // 3 and taken[False] > total // 10, taken
