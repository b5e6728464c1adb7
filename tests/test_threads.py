# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Threads that launch the same plan do not mix up their parameters. Needs no GPU: what would be
launched is noted, at a driver that lets the other threads go on before it looks."""

import sys
import threading
import time

import numpy as np
import pytest

import cupy_cache as cc

WORKERS, CALLS, TOKENS = 4, 60, 5


@pytest.fixture
def recorder(nothing_remembered, recorder):
    note = recorder.launch

    def slow(loaded, grid, threads, stream, record):
        time.sleep(1e-5)
        note(loaded, grid, threads, stream, record)

    recorder.launch = slow
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield recorder
    sys.setswitchinterval(interval)


def arrays(framework, *shape, dtype="float16"):
    """An array for each call of each thread, at addresses of their own."""
    whole = np.zeros((WORKERS, CALLS, *shape), dtype)
    if framework == "torch":
        whole = pytest.importorskip("torch").from_numpy(whole)
    return whole


def in_threads(work):
    """Run ``work(number)`` in all threads at once; returns what they raised."""
    raised = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def address(array):
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


@pytest.mark.parametrize("framework", ["torch", "numpy"])
@pytest.mark.parametrize("counts", ["same", "changing"])
def test_writes(recorder, framework, counts):
    """Of arrays that come by the fast path, and of others. Also where the fields that depend on
    the number of tokens change from call to call."""
    key, value = (arrays(framework, TOKENS, 3, 16) for _ in range(2))
    caches = [arrays(framework, 2, 4, 3, 16) for _ in range(2)]
    slots = arrays(framework, TOKENS, dtype="int64")

    def step(worker, call):
        tokens = TOKENS if counts == "same" else 1 + (worker + call) % TOKENS
        return (
            key[worker, call], value[worker, call], *(cache[worker, call] for cache in caches),
            slots[worker, call, :tokens],
        )  # fmt: skip

    def work(worker):
        for call in range(CALLS):
            cc.reshape_and_cache_flash(*step(worker, call))

    assert not in_threads(work)
    unpack = cc.ops.reshape_and_cache_flash.PARAMS.per_call.unpack_from
    sent = sorted((*(fields := unpack(record))[:5], fields[7]) for *_, record in recorder.take())
    wanted = sorted(
        (*map(address, made), len(made[4]))
        for made in (step(worker, call) for worker in range(WORKERS) for call in range(CALLS))
    )
    assert sent == wanted


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_copies(recorder, framework):
    """Tables of pointers and pairs, which change at each call."""
    caches = [arrays(framework, 9, 2, 8) for _ in range(2)]

    def work(worker):
        for call in range(CALLS):
            made = [[cache[worker, call]] for cache in caches]
            cc.copy_blocks(*made, [(call % 4, 4 + call % 5)])

    assert not in_threads(work)
    sent = sorted(record[-480 * 8 :][:24] for *_, record in recorder.take())
    wanted = sorted(
        np.array(
            [*(address(cache[w, c]) for cache in caches), c % 4 | (4 + c % 5) << 32], np.uint64
        ).tobytes()
        for w in range(WORKERS)
        for c in range(CALLS)
    )
    assert sent == wanted
