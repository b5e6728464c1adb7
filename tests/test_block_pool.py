# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks that are taken, shared and dropped, and found again by what they hold."""

import copy
import functools
import pickle

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import cupy_cache as cc


def test_blocks_go_round():
    pool = cc.BlockPool(4)
    assert pool.take(3) == [0, 1, 2] and pool.num_free == 1
    pool.drop(1)
    assert pool.take() == [3]  # what has been free the longest
    assert pool.take(1) == [1] and pool.take(0) == [] and pool.num_free == 0
    assert repr(pool) == "<BlockPool: 0 of 4 blocks are free>"


def test_who_shares_a_block():
    pool = cc.BlockPool(2)
    (block,) = pool.take()
    pool.share(block)
    assert pool.users(block) == 2
    pool.drop(block)
    assert pool.users(block) == 1 and pool.num_free == 1
    pool.drop(block)
    assert pool.users(block) == 0 and pool.num_free == 2


def test_what_was_free_first_loses_its_content_first():
    pool = cc.BlockPool(4)
    for block in pool.take(3):
        assert pool.hold(block, b"%d" % block)
    for block in (2, 0, 1):
        pool.drop(block)
    assert pool.num_free == 4 and [pool.find(b"%d" % n) for n in range(3)] == [0, 1, 2]
    pool.share(2)  # found, and dropped again: used last
    pool.drop(2)
    assert pool.take() == [3]  # it holds nothing
    assert pool.take() == [0] and pool.find(b"0") is None
    assert pool.take(2) == [1, 2] and pool.find(b"1") is pool.find(b"2") is None


def test_a_content_has_one_block():
    pool = cc.BlockPool(3)
    first, second, _ = pool.take(3)
    assert pool.hold(first, b"a") and not pool.hold(second, b"a") and pool.hold(first, b"a")
    assert pool.find(b"a") == first
    assert pool.hold(first, b"b") and pool.find(b"a") is None and pool.find(b"b") == first
    assert pool.hold(second, b"a") and pool.find(b"a") == second
    pool.forget(second)
    pool.forget(second)
    assert pool.find(b"a") is None
    pool.drop(first)
    pool.forget(first)  # it is free, and has nothing more to be kept for
    assert pool.num_free == 1 and pool.find(b"b") is None and pool.take() == [first]


def test_free_blocks():
    """They have no users that could go, and nothing can be found in them."""
    pool = cc.BlockPool(3)
    for method, *more in (("share",), ("drop",), ("hold", b"a")):
        message = (
            rf"^BlockPool\.{method}: Invalid value of block: expected .* users.*, got 1, which"
        )
        with pytest.raises(cc.ArgumentError, match=message):
            getattr(pool, method)(1, *more)
    assert pool.num_free == 3 and pool.users(1) == 0 and pool.find(b"a") is None


@pytest.mark.parametrize("content", [None, "a", [b"a"], bytearray(b"a"), 7])
def test_a_content_is_bytes(content):
    pool = cc.BlockPool(2)
    pool.take()
    for call in (functools.partial(pool.hold, 0), pool.find):
        with pytest.raises(cc.DTypeError, match=r"BlockPool\.(hold|find): Invalid type of content"):
            call(content)
    pool.drop(0)
    assert pool.take(2) == [1, 0]  # it holds nothing


def test_blocks_by_integers_of_numpy():
    pool = cc.BlockPool(1)
    pool.take()
    block = np.int64(0)
    pool.hold(block, b"a")
    pool.share(block)
    pool.drop(block)
    pool.drop(block)
    assert type(pool.find(b"a")) is int and [type(found) for found in pool.take()] == [int]


def test_nothing_is_taken_where_too_few_are_free():
    pool = cc.BlockPool(3)
    pool.take(2)
    with pytest.raises(cc.OutOfBlocksError) as caught:
        pool.take(2)
    error = caught.value
    assert (error.op, error.needed, error.free, error.num_blocks) == ("BlockPool.take", 2, 1, 3)
    assert isinstance(error, cc.CupyCacheError) and isinstance(error, MemoryError)
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(again) == str(error) and vars(again) == vars(error)
    assert "2 are needed, and 1 of 3 are free" in str(error)
    assert pool.num_free == 1 and pool.take() == [2]


@pytest.mark.parametrize("call, argument", [
    (lambda pool: pool.drop(3), "block"), (lambda pool: pool.share(3), "block"),
    (lambda pool: pool.hold(3, b""), "block"), (lambda pool: pool.users(4), "block"),
    (lambda pool: pool.users(-1), "block"), (lambda pool: pool.forget(4), "block"),
    (lambda pool: pool.users(1.0), "block"), (lambda pool: pool.take(-1), "count"),
    (lambda pool: pool.take(True), "count"), (lambda pool: cc.BlockPool(-1), "num_blocks"),
    (lambda pool: cc.BlockPool(0).users(0), "block"),
])  # fmt: skip
def test_refusals(call, argument):
    pool = cc.BlockPool(4)
    pool.take(3)
    with pytest.raises(cc.ArgumentError, match=rf"^BlockPool[.\w]*: Invalid value of {argument}: "):
        call(pool)
    assert pool.num_free == 1


class Pool(RuleBasedStateMachine):
    """Against a list of users and a list of what is free, in the order in which it is given out."""

    BLOCKS = 4

    def __init__(self):
        super().__init__()
        self.pool = cc.BlockPool(self.BLOCKS)
        self.users, self.contents = [0] * self.BLOCKS, [None] * self.BLOCKS
        self.free = list(range(self.BLOCKS))  # in the order of their becoming free

    def order(self):
        return sorted(self.free, key=lambda block: self.contents[block] is not None)

    @rule(count=st.integers(0, 3))
    def take(self, count):
        if count > len(self.free):
            with pytest.raises(cc.OutOfBlocksError):
                self.pool.take(count)
            return
        expected = self.order()[:count]
        assert self.pool.take(count) == expected
        for block in expected:
            self.free.remove(block)
            self.users[block], self.contents[block] = 1, None

    @rule(block=st.integers(0, BLOCKS - 1))
    def share(self, block):
        if not self.users[block] and self.contents[block] is None:
            with pytest.raises(cc.ArgumentError):
                self.pool.share(block)
            return
        self.pool.share(block)
        if not self.users[block]:
            self.free.remove(block)
        self.users[block] += 1

    @rule(block=st.integers(0, BLOCKS - 1))
    def drop(self, block):
        if not self.users[block]:
            with pytest.raises(cc.ArgumentError):
                self.pool.drop(block)
            return
        self.pool.drop(block)
        self.users[block] -= 1
        if not self.users[block]:
            self.free.append(block)

    @rule(block=st.integers(0, BLOCKS - 1), content=st.sampled_from([b"a", b"b", b"c"]))
    def hold(self, block, content):
        if not self.users[block]:
            with pytest.raises(cc.ArgumentError):
                self.pool.hold(block, content)
            return
        there = content in self.contents
        assert self.pool.hold(block, content) == (not there or self.contents[block] == content)
        if not there:
            self.contents[block] = content

    @rule(block=st.integers(0, BLOCKS - 1))
    def forget(self, block):
        self.pool.forget(block)
        if block in self.free and self.contents[block] is not None:
            self.free.remove(block)
            self.free.append(block)
        self.contents[block] = None

    @invariant()
    def agrees(self):
        assert [self.pool.users(block) for block in range(self.BLOCKS)] == self.users
        assert self.pool.num_free == len(self.free) == self.users.count(0)
        for content in (b"a", b"b", b"c"):
            found = self.contents.index(content) if content in self.contents else None
            assert self.pool.find(content) == found


test_any_order_of_calls = Pool.TestCase
