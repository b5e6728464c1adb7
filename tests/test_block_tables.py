# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Sequences that come, grow, fork, are swapped and go: what their tables say is read back from
caches in which the operations on NumPy wrote it."""

import collections
import copy
import itertools
import pickle

import numpy as np
import pytest
import recording
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import cupy_cache as cc
from cupy_cache.runtime import allocations, arrays, making, streams


def tables_of(num_blocks=8, block_size=4, **options):
    sizes = {"max_sequences": 4, "max_tokens": 64, "max_length": 32, "framework": "numpy"}
    return cc.BlockTables(num_blocks, block_size, **(sizes | options))


# --- any history, against a dict of lists ---------------------------------------------------------


class Serials(collections.defaultdict):
    """A number for each key, from 1 on. Keys and values of a model depend on all tokens before:
    here a token is written as the number of (salt, tokens so far)."""

    def __missing__(self, key):
        self[key] = len(self) + 1
        return self[key]


class Broken:
    """What should be a number, and is none, like a tensor without memory."""

    def __index__(self):
        raise RuntimeError("it has no value")


class Modelled:
    """What is known of a sequence: all its tokens, how many were told and how many are written."""

    def __init__(self, salt, tokens, told, written):
        self.salt, self.tokens, self.told, self.written = salt, tokens, told, written


class History:
    """Tables, caches and a model of them. Each action is chosen by plain numbers, and afterwards
    `check` compares everything."""

    LENGTH, ROWS, TOKENS = 13, 3, 12

    def __init__(self, blocks, host, size, reuse, framework):
        self.tables = cc.BlockTables(
            blocks, size, max_sequences=self.ROWS, max_tokens=self.TOKENS, max_length=self.LENGTH,
            host_blocks=host, reuse_prefixes=reuse, framework=framework, device="cpu",
        )  # fmt: skip
        self.size, self.reuse = size, reuse
        self.caches, self.host = (
            cc.PagedKVCache.allocate(1, n, size, 1, 1, dtype="float32", framework="numpy")
            for n in (blocks, host)
        )
        self.sequences, self.names, self.secrets = {}, itertools.count(), itertools.count(1000)
        self.serials, self.seen = Serials(), collections.Counter()

    def row(self, sequence, position):
        return self.serials[sequence.salt, tuple(sequence.tokens[: position + 1])]

    def state(self):
        """All that must not change where something is refused."""
        pools = [
            [copy.copy(part) for _, part in sorted(vars(pool).items())]
            for pool in (self.tables.pool, self.tables.host_pool)
        ]
        names = [(name, self.tables.blocks(name), self.tables.length(name)) for name in self.tables]
        return pools, names, [self.tables.is_swapped_out(name) for name in self.tables]

    def pick(self, number, swapped=None):
        """One of the sequences that are swapped out, or not; None where there is none."""
        names = [n for n in self.sequences if swapped in (None, self.tables.is_swapped_out(n))]
        return names[number % len(names)] if names else None

    def add(self, tokens, salt):
        name = next(self.names)
        written = self.tables.add(name, tokens, salt=salt)
        assert written % self.size == 0 and (written < len(tokens) or not written)
        assert self.reuse or not written
        self.sequences[name] = Modelled(salt, tokens, len(tokens), written)
        self.seen["prefixes found"] += written > 0

    def append(self, number, tokens):
        name = self.pick(number)
        if name is None:
            return
        sequence = self.sequences[name]
        if sequence.told < sequence.written:
            with pytest.raises(cc.ArgumentError, match="append: Invalid order of tokens"):
                self.tables.append(name, tokens)
            return
        self.tables.append(name, tokens[0] if len(tokens) == 1 else tokens)
        sequence.tokens = sequence.tokens + tokens
        sequence.told += len(tokens)

    def step(self, numbers, counts, more_rows, more_tokens):
        """New tokens that were not told are secrets."""
        names = list(dict.fromkeys(self.pick(n, swapped=False) for n in numbers))
        names = [name for name in names if name is not None]
        batch, most = [self.sequences[name] for name in names], self.TOKENS
        counts = counts[: len(batch)]
        for at, sequence in enumerate(batch):
            counts[at] = min(counts[at], most, self.LENGTH - sequence.written)
            most -= counts[at]
            missing = sequence.written + counts[at] - len(sequence.tokens)
            sequence.tokens = sequence.tokens + [next(self.secrets) for _ in range(missing)]
        rows = None if more_rows is None else min(len(batch) + more_rows, self.ROWS)
        tokens = None if more_tokens is None else min(sum(counts) + more_tokens, self.TOKENS)
        before, free = self.state(), self.tables.pool.num_free
        needed = self.tables.blocks_needed(names, counts)
        try:
            step = self.tables.step(names, counts, num_sequences=rows, num_tokens=tokens)
        except cc.OutOfBlocksError as error:
            assert (error.needed, error.free) == (needed, free) and needed > free
            assert self.state() == before
            for sequence in batch:
                del sequence.tokens[max(sequence.told, sequence.written) :]
            self.seen["out of blocks"] += 1
            return
        assert needed == free - self.tables.pool.num_free
        self.seen["copies"] += len(step.copies)
        self.write(step, names, counts, rows, tokens)

    def write(self, step, names, counts, rows, tokens):
        """What an engine does with a step, and what its arrays must be."""
        self.caches.copy_blocks(step.copies)
        batch, values, positions, slots = [self.sequences[name] for name in names], [], [], []
        fed = []
        for name, sequence, count in zip(names, batch, counts):
            for position in range(sequence.written, sequence.written + count):
                block = self.tables.blocks(name)[position // self.size]
                slots.append(block * self.size + position % self.size)
                positions.append(position)
                fed.append(sequence.tokens[position] if position < sequence.told else 0)
                values.append(self.row(sequence, position))
            sequence.written += count
        total, n = len(positions), len(batch)
        rows, tokens = n if rows is None else rows, total if tokens is None else tokens
        no_rows, no_tokens = rows - n, tokens - total
        lengths = [sequence.written for sequence in batch]
        width = -(-self.LENGTH // self.size)
        tables = [self.tables.blocks(name) for name in names] + [[]] * no_rows
        expected = {
            "positions": ("int64", positions + [0] * no_tokens),
            "query_start_loc": ("int32", [0, *itertools.accumulate(counts)] + [total] * no_rows),
            "seq_lens": ("int32", lengths + [0] * no_rows),
            "slot_mapping": ("int64", slots + [-1] * no_tokens),
            "token_ids": ("int64", fed + [0] * no_tokens),
            "block_table": ("int32", [row + [-1] * (width - len(row)) for row in tables]),
        }
        for name, (dtype, numbers) in expected.items():
            found = np.asarray(getattr(step, name))
            assert (str(found.dtype), found.tolist()) == (dtype, numbers), name
        assert np.asarray(step.block_table).shape == (rows, width)
        assert (step.num_sequences, step.num_tokens) == (n, total)
        assert (step.max_seq_len, step.max_query_len) == (max([*lengths, 0]), max([*counts, 0]))
        values = np.array(values + [-5] * no_tokens, np.float32).reshape(-1, 1, 1)
        self.caches.write(0, values, -values, np.asarray(step.slot_mapping))

    def fork(self, number):
        parent = self.pick(number)
        if parent is not None:
            name, of = next(self.names), self.sequences[parent]
            self.tables.fork(parent, name)
            self.sequences[name] = Modelled(of.salt, of.tokens[:], of.told, of.written)

    def reorder(self, numbers, parents, new):
        """Some of those that there are, and ``new`` others, become what others are."""
        names = list(dict.fromkeys(map(self.pick, numbers)))
        parents = [self.pick(number) for number in parents]
        if None in names or None in parents:
            return
        names += [next(self.names) for _ in range(new)]
        count = min(len(names), len(parents))
        names, parents = names[:count], parents[:count]
        self.tables.reorder(names, parents)
        old = [copy.deepcopy(self.sequences[parent]) for parent in parents]
        self.sequences.update(zip(names, old))
        self.seen["reordered"] += names != parents

    def truncate(self, number, by):
        name = self.pick(number, swapped=False)
        if name is not None:
            sequence = self.sequences[name]
            length = max(sequence.written - by, 0)
            self.tables.truncate(name, length)
            sequence.tokens = sequence.tokens[:length]
            sequence.written, sequence.told = length, min(length, sequence.told)

    def free(self, number):
        name = self.pick(number)
        if name is not None:
            self.tables.free(name)
            del self.sequences[name]

    def swap(self, numbers, out):
        names = list(dict.fromkeys(self.pick(number, swapped=not out) for number in numbers))
        if None in names:
            return
        before, old = self.state(), [block for name in names for block in self.tables.blocks(name)]
        try:
            pairs = (self.tables.swap_out if out else self.tables.swap_in)(*names)
        except cc.OutOfBlocksError as error:
            assert error.needed > error.free and self.state() == before
            self.seen["out of blocks"] += 1
            return
        of, to = (self.caches, self.host) if out else (self.host, self.caches)
        of.swap_blocks(to, pairs)
        new = [block for name in names for block in self.tables.blocks(name)]
        assert {block for block, _ in pairs} <= set(old) and len(old) == len(new)
        assert {block for _, block in pairs} <= set(new) and len(set(new)) <= len(set(old))
        assert all(self.tables.is_swapped_out(name) == out for name in names)
        self.seen["swaps"] += 1
        self.seen["shared instead of swapped"] += len(old) - len(pairs)

    def check(self):
        """No block is in two places, none is lost, and everything is read back."""
        assert list(self.tables) == list(self.sequences) and len(self.tables) == len(self.sequences)
        for swapped, pool in ((False, self.tables.pool), (True, self.tables.host_pool)):
            used = collections.Counter()
            for name, sequence in self.sequences.items():
                if self.tables.is_swapped_out(name) == swapped:
                    blocks = self.tables.blocks(name)
                    assert len(set(blocks)) == len(blocks) == -(-sequence.written // self.size)
                    used.update(blocks)
            users = [pool.users(block) for block in range(pool.num_blocks)]
            assert users == [used[block] for block in range(pool.num_blocks)]
            assert pool.num_free == pool.num_blocks - len(used)
        for name, sequence in self.sequences.items():
            assert self.tables.length(name) == sequence.written
            assert self.tables.tokens(name) == sequence.tokens[: sequence.told]
            assert self.tables.num_pending(name) == max(sequence.told - sequence.written, 0)
            cache = self.host if self.tables.is_swapped_out(name) else self.caches
            table = np.array([self.tables.blocks(name)], np.int32).reshape(1, -1)
            bounds = np.array([0, sequence.written], np.int32)
            keys, values = cache.gather(0, table, bounds, num_tokens=sequence.written)
            expected = [self.row(sequence, position) for position in range(sequence.written)]
            assert keys.reshape(-1).tolist() == expected and (values == -keys).all()


NUMBER, TOKEN = st.integers(0, 11), st.integers(0, 1)  # few tokens, so that prompts are alike


class Tables(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(0, 9), host=st.integers(0, 6), size=st.integers(1, 3),
        reuse=st.booleans(),
    )  # fmt: skip
    def begin(self, blocks, host, size, reuse):
        self.history = History(blocks, host, size, reuse, "numpy")

    @rule(tokens=st.lists(TOKEN, max_size=9), salt=st.sampled_from([b"", b"x"]))
    def add(self, tokens, salt):
        self.history.add(tokens, salt)

    @rule(number=NUMBER, tokens=st.lists(TOKEN, max_size=3))
    def append(self, number, tokens):
        self.history.append(number, tokens)

    @rule(
        numbers=st.lists(NUMBER, max_size=3), counts=st.tuples(*[st.integers(0, 5)] * 3).map(list),
        more_rows=st.none() | st.integers(0, 3), more_tokens=st.none() | st.integers(0, 3),
    )  # fmt: skip
    def step(self, numbers, counts, more_rows, more_tokens):
        self.history.step(numbers, counts, more_rows, more_tokens)

    @rule(number=NUMBER)
    def fork(self, number):
        self.history.fork(number)

    @rule(
        numbers=st.lists(NUMBER, max_size=3), parents=st.lists(NUMBER, max_size=4),
        new=st.integers(0, 2),
    )  # fmt: skip
    def reorder(self, numbers, parents, new):
        self.history.reorder(numbers, parents, new)

    @rule(number=NUMBER, by=st.integers(0, 5))
    def truncate(self, number, by):
        self.history.truncate(number, by)

    @rule(number=NUMBER)
    def free(self, number):
        self.history.free(number)

    @rule(numbers=st.lists(NUMBER, max_size=3), out=st.booleans())
    def swap(self, numbers, out):
        self.history.swap(numbers, out)

    @invariant()
    def check(self):
        if hasattr(self, "history"):
            self.history.check()


test_any_history = pytest.mark.extra(Tables.TestCase)


@pytest.mark.parametrize("size, framework", [(1, "numpy"), (2, "numpy"), (3, "torch")])
def test_long_histories(rng, size, framework):
    """In which everything happens often, until there is nothing left."""
    pytest.importorskip(framework)
    history = History(30 // size, 15 // size, size, True, framework)

    def numbers(least, most, count):
        return rng.integers(least, most + 1, count).tolist()

    def tokens(most):
        return numbers(0, 1, int(rng.integers(0, most + 1)))

    for _ in range(400):
        number, other = numbers(0, 99, 2)
        match int(rng.integers(0, 13)):
            case 0 | 1 if len(history.sequences) < 6:
                history.add(tokens(9), b"" if number % 4 else b"x")
            case 0 | 1 | 2:
                history.free(number)
            case 3:
                history.append(number, tokens(3))
            case 4 | 6 if len(history.sequences) < 6:
                history.fork(number)
            case 5:
                history.truncate(number, other % 6)
            case 7:
                history.swap(numbers(0, 99, 1 + other % 3), out=number % 2 == 0)
            case 8 if len(history.sequences) < 7:
                history.reorder(numbers(0, 99, 3), numbers(0, 99, 4), other % 2)
            case _:
                padding = [None if n < 0 else n for n in numbers(-2, 3, 2)]
                history.step(numbers(0, 99, 3), numbers(0, 3, 3), *padding)
        history.check()
    for what in ("swaps", "out of blocks", "reordered"):
        assert history.seen[what], history.seen
    for _ in range(len(history.sequences)):
        history.free(0)
        history.check()
    pools = history.tables.pool, history.tables.host_pool
    assert [pool.num_free for pool in pools] == [pool.num_blocks for pool in pools]


# --- prefixes -------------------------------------------------------------------------------------


def test_beams_that_go_on_as_others():
    """Nothing is taken or given back for those that stay, and names stay."""
    tables = tables_of()
    tables.add("a", range(6))
    tables.step(["a"], [6])
    tables.reorder(["a", "b", "c"], ["a", "a", "a"])
    assert [tables.blocks(name) for name in "abc"] == [[0, 1]] * 3
    for name, token in zip("abc", (10, 11, 12)):
        tables.append(name, token)
    assert tables.step(list("abc"), [1, 1, 1]).copies == [(1, 2), (1, 3)]
    kept = {name: tables.blocks(name) for name in "abc"}
    tables.reorder(["a", "b", "c"], ["b", "c", "b"])
    assert list(tables) == ["a", "b", "c"]
    assert [tables.blocks(name) for name in "abc"] == [kept["b"], kept["c"], kept["b"]]
    assert [tables.tokens(name)[-1] for name in "abc"] == [11, 12, 11]
    assert tables.pool.num_free == 8 - 3  # that of a has gone
    tables.reorder([], [])
    tables.reorder(["d"], ["a"])
    assert tables.blocks("d") == tables.blocks("a")


@pytest.mark.parametrize("kind", [set, frozenset])
def test_sets_have_no_order(kind):
    """Nobody knows whose counts these are, or which token comes first."""
    tables = tables_of()
    for name in "ab":
        tables.add(name, range(6))
    for call in (
        lambda: tables.step(kind("ab"), [1, 2]), lambda: tables.extend(["a", "b"], kind([1, 2])),
        lambda: tables.reorder(kind("ab"), ["a", "a"]),
        lambda: tables.blocks_needed(kind("a"), [1]), lambda: tables.schedule(kind("ab")),
    ):  # fmt: skip
        with pytest.raises(cc.DTypeError, match="Invalid type of .* a list( of names)?, got"):
            call()
    assert tables.length("a") == tables.length("b") == 0
    for call in (
        lambda: tables.add("c", kind([5, 3])), lambda: tables.append("a", kind([5, 3])),
    ):  # fmt: skip
        with pytest.raises(cc.ArgumentError, match="Invalid value of tokens: .* has no order"):
            call()
    assert "c" not in tables and tables.num_pending("a") == 6


class Unread(list):
    """As a tensor without memory, it has a length."""

    def __iter__(self):
        raise NotImplementedError


def test_lists_that_cannot_be_read():
    tables, unread = tables_of(), Unread(["a"])
    tables.add("a", range(6))
    for name, call in (
        ("sequences", lambda: tables.step(unread, [1])),
        ("counts", lambda: tables.extend(["a"], unread)),
        ("parents", lambda: tables.reorder(["a"], unread)),
        ("sequences", lambda: tables.schedule(unread)),
    ):
        with pytest.raises(cc.DTypeError, match=f": Invalid type of {name}: expected .*, got "):
            call()
    assert tables.length("a") == 0


def test_names_in_one_string_are_no_list():
    tables = tables_of()
    tables.add("a", range(6))
    for given in (("aba", "aab"), (["a"], "a"), (b"a", ["a"])):
        with pytest.raises(cc.DTypeError, match="reorder: Invalid type of .* a list, got"):
            tables.reorder(*given)
    with pytest.raises(cc.DTypeError, match="step: Invalid type of sequences: .* a list, got"):
        tables.step("a", [1])


def test_prompts_that_begin_alike_share_blocks():
    tables, prompt = tables_of(), list(range(10))
    assert tables.add("a", prompt) == 0
    tables.step(["a"], [10])
    tables.append("a", 10)
    assert tables.add("b", [*prompt[:9], 99]) == 8 and tables.length("b") == 8
    assert tables.blocks("b") == tables.blocks("a")[:2]
    assert tables.add("c", prompt[:8]) == 4  # one token is left for the model
    assert tables.add("d", [0, 1, 2, 9, *prompt[4:]]) == 0  # the same block behind another one
    assert tables.add("e", prompt, salt=b"adapter") == 0
    assert tables.blocks_needed(["b"], [2]) == 1


def test_generated_tokens_are_found_too():
    tables = tables_of()
    tables.add("a", [1, 2, 3])
    tables.step(["a"], [3])
    for token in (4, 5):
        tables.append("a", token)
        tables.step(["a"], [1])
    assert tables.add("turn", [1, 2, 3, 4, 5, 6]) == 4
    tables.free("a")
    tables.free("turn")
    assert tables.pool.num_free == 8 and tables.add("later", [1, 2, 3, 4, 7]) == 4


def test_a_step_that_was_given_up_is_not_found():
    tables = tables_of()
    for name in "ab":
        tables.add(name, range(9))
    tables.step(["a", "b"], [9, 8])
    tables.free("a")  # its work failed
    tables.truncate("b", 0)
    assert tables.add("c", range(9)) == 0


def test_the_least_recently_used_prefix_goes_first():
    tables = tables_of(num_blocks=4)
    for first in (10, 20):
        tables.add(first, [first, *range(7)])
        tables.step([first], [8])
        tables.append(first, 99)
        tables.free(first)
    tables.add(10, [10, *range(7), 0])  # used again, so 20 is older
    tables.free(10)
    tables.add("new")
    tables.step(["new"], [4])
    tables.free("new")
    assert tables.add("old", [20, *range(8)]) == 4  # its end went first
    tables.free("old")
    assert tables.add("used", [10, *range(8)]) == 8


def test_tokens_that_were_not_told_are_not_found():
    tables = tables_of()
    tables.add("a")
    tables.step(["a"], [4])
    with pytest.raises(cc.ArgumentError, match="append: Invalid order of tokens: expected "):
        tables.append("a", [1, 2, 3, 4])
    assert tables.add("b", [1, 2, 3, 4, 5]) == 0


def test_blocks_that_are_written_again_lose_their_content():
    tables = tables_of()
    tables.add("a", [1, 2, 3, 4])
    tables.step(["a"], [4])
    tables.append("a", 5)
    tables.truncate("a", 3)
    assert tables.add("b", [1, 2, 3, 4, 5]) == 4  # nothing was written over it yet
    tables.append("a", 9)
    assert tables.step(["a"], [1]).copies == [(0, 1)]
    tables.append("a", 5)
    assert tables.add("c", [1, 2, 3, 9, 5]) == 4 and tables.blocks("c") == [1]
    tables.free("c")
    tables.truncate("a", 2)
    tables.append("a", [8])
    assert not tables.step(["a"], [1]).copies
    assert tables.add("d", [1, 2, 3, 9, 5]) == 0


@pytest.mark.parametrize("tokens", [
    (1, 2, 3, 4, 5), range(1, 6), np.arange(1, 6), bytes(range(1, 6)), list(np.arange(1, 6)),
])  # fmt: skip
def test_tokens_of_any_kind(tokens):
    tables = tables_of()
    tables.add("a", tokens)
    tables.step(["a"], [4])
    tables.step(["a"], [1])
    assert tables.add("b", [1, 2, 3, 4, 9]) == 4


# --- swaps and forks ------------------------------------------------------------------------------


def test_what_the_cache_still_has_is_not_swapped_in():
    tables = tables_of(host_blocks=4)
    tables.add("a", range(6))
    tables.step(["a"], [5])
    tables.step(["a"], [1])
    assert tables.swap_out("a") == [(0, 0), (1, 1)]
    assert tables.is_swapped_out("a") and tables.pool.num_free == 8
    assert tables.blocks("a") == [0, 1] and tables.length("a") == 6
    assert tables.swap_in("a") == [(1, 2)]  # the first is full, and nobody took it
    assert tables.blocks("a") == [0, 2] and tables.host_pool.num_free == 4


def test_who_is_fed_in_a_step():
    """Those that decode first, then prompts as far as they fit, in order."""
    tables = tables_of(num_blocks=40, max_sequences=8, max_tokens=10)
    for name, length in (("a", 7), ("b", 1), ("c", 9), ("d", 0), ("e", 1), ("f", 2)):
        tables.add(name, range(length))
    assert tables.schedule(tables) == {"b": 1, "e": 1, "a": 7, "c": 1}
    assert list(tables.schedule([*"fabe"])) == ["b", "e", "f", "a"]
    assert tables.schedule(iter("ca"), max_tokens=4) == {"c": 4}
    assert tables.schedule([*"be"], max_tokens=1) == {"b": 1}
    assert (
        tables.schedule([*"d"])
        == tables.schedule([])
        == tables.schedule([*"a"], max_tokens=0)
        == {}
    )
    counts = tables.schedule([*"abe"])
    tables.step(list(counts), list(counts.values()))
    assert tables.schedule(tables) == {"c": 9, "f": 1}
    tables.append("b", 5)
    assert tables.schedule(tables) == {"b": 1, "c": 9}


def test_who_is_fed_where_there_are_more_than_a_step_takes():
    tables = tables_of(num_blocks=40, max_sequences=2)
    for name, length in (("a", 7), ("b", 1), ("c", 9), ("d", 1), ("e", 1)):
        tables.add(name, range(length))
    assert tables.schedule(tables) == {"b": 1, "d": 1}
    assert tables.schedule([*"abc"]) == {"b": 1, "a": 7}
    counts = tables.schedule([*"ca"])
    assert tables.step(list(counts), list(counts.values())).num_tokens == 16


def test_beams_are_swapped_together():
    """What they share is moved once, and shared again; all go, or none."""
    tables = tables_of(host_blocks=3)
    tables.add("a", range(6))
    tables.step(["a"], [6])
    tables.reorder(["a", "b"], ["a", "a"])
    assert tables.swap_out("a", "b") == [(0, 0), (1, 1)]
    assert tables.blocks("a") == tables.blocks("b") == [0, 1] and tables.pool.num_free == 8
    tables.reorder(["a", "b", "c"], ["b", "b", "a"])
    assert tables.host_pool.num_free == 1
    assert tables.swap_in("c") == [(0, 2), (1, 3)]
    assert tables.swap_in("a", "b") == [(0, 4), (1, 5)]
    assert tables.host_pool.num_free == 3
    tables.append("a", 10)
    tables.append("b", 11)
    tables.step(["a", "b"], [1, 1])
    with pytest.raises(cc.OutOfBlocksError, match="5 are needed, and 3 of 3") as raised:
        tables.swap_out("a", "b", "c")
    assert (raised.value.needed, tables.pool.num_free) == (5, 3)
    assert tables.swap_out() == []


def test_what_host_memory_has_is_not_swapped_out_again():
    """Neither what a fork shares, nor what was there before, until another takes it."""
    tables = tables_of(host_blocks=4)
    tables.add("a", range(10))
    tables.step(["a"], [9])
    tables.fork("a", "b")
    tables.step(["a", "b"], [1, 1])  # of the last block each has its own
    assert len(tables.swap_out("a")) == 3
    assert len(tables.swap_out("b")) == 1 and tables.host_pool.num_free == 0
    assert tables.blocks("a")[:2] == tables.blocks("b")[:2]
    tables.swap_in("b")
    assert len(tables.swap_out("b")) == 1
    tables.free("a")
    tables.swap_in("b")
    tables.add("c")
    tables.step(["c"], [12])
    tables.swap_out("c")  # takes what has no content first
    assert len(tables.swap_in("c")) == 3 and len(tables.swap_out("b")) == 2


def test_what_was_swapped_in_is_found_again():
    tables = tables_of(num_blocks=2, host_blocks=2)
    tables.add("a", range(6))
    tables.step(["a"], [5])
    tables.step(["a"], [1])
    tables.swap_out("a")
    tables.add("b")
    tables.step(["b"], [8])
    tables.free("b")
    assert len(tables.swap_in("a")) == 2
    assert tables.add("c", range(6)) == 4


def test_blocks_that_are_shared_again_are_no_longer_free():
    """Of three, the full one is still there, and one is free besides; but nobody may have both."""
    tables = tables_of(num_blocks=3, host_blocks=2)
    tables.add("a", range(6))
    tables.step(["a"], [5])
    tables.step(["a"], [1])
    tables.swap_out("a")
    tables.add("b")
    tables.step(["b"], [8])
    with pytest.raises(cc.OutOfBlocksError, match=r"^BlockTables\.swap_in: .* 2 are needed, and 1"):
        tables.swap_in("a")
    assert tables.is_swapped_out("a") and tables.pool.num_free == 1
    assert tables.host_pool.num_free == 0 and tables.blocks("a") == [0, 1]


def test_the_last_of_those_that_share_a_block_keeps_it():
    tables = tables_of(num_blocks=3)
    tables.add("a")
    tables.step(["a"], [3])
    for name in "bc":
        tables.fork("a", name)
    assert tables.blocks_needed(["a", "b", "c"], [1, 1, 1]) == 2
    assert tables.step(["a", "b", "c"], [1, 1, 1]).copies == [(0, 1), (0, 2)]
    assert [tables.blocks(name) for name in "abc"] == [[1], [2], [0]]


def test_out_of_blocks_names_the_pool():
    tables = tables_of(num_blocks=2, host_blocks=1)
    tables.add("a")
    with pytest.raises(cc.OutOfBlocksError, match=r"^BlockTables\.step: .* 3 are needed"):
        tables.step(["a"], [9])
    tables.step(["a"], [8])
    host = r"^BlockTables\.swap_out, in host memory: .* 2 .*; bring a sequence back, or free one"
    with pytest.raises(cc.OutOfBlocksError, match=host):
        tables.swap_out("a")
    with pytest.raises(cc.OutOfBlocksError, match=r"^BlockTables\.extend: "):
        tables.extend(["a"], [1])
    assert tables.blocks("a") == [0, 1] and tables.length("a") == 8


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_arrays_of_a_size_stay_where_they_are(framework):
    pytest.importorskip(framework)
    tables = tables_of(framework=framework, device="cpu")
    for name in range(3):
        tables.add(name)
    first = tables.step([0, 1], [1, 1], num_sequences=4, num_tokens=4)
    arrays = first.block_table, first.seq_lens, first.slot_mapping, first.query_start_loc
    tables.step([1, 2, 0], [2, 5, 9])
    again = tables.step([2], [1], num_sequences=4, num_tokens=4)
    for one, other in zip(arrays, (again.block_table, again.seq_lens, again.slot_mapping)):
        assert one is other
    assert again.seq_lens.tolist() == [6, 0, 0, 0]


def test_a_step_made_in_inference_mode():
    """Its arrays are kept, and autograd takes them later."""
    torch = pytest.importorskip("torch")
    with torch.inference_mode():
        tables = tables_of(framework="torch", device="cpu")
        tables.add("a", [1, 2])
        tables.step(["a"], [2])
    step = tables.step(["a"], [0], num_tokens=2)
    torch.nn.Embedding(3, 2)(step.token_ids).sum().backward()
    assert not step.block_table.is_inference()


def test_sequences_of_a_larger_number_than_a_step_has():
    tables = tables_of(num_blocks=40)
    for name in range(30):
        tables.add(name)
        tables.extend([name], [1])
    assert tables.step([29, 0], [1, 1]).block_table[:, 0].tolist() == [29, 0]


def test_rows_of_the_table_are_used_again():
    """Whoever ends, is swapped out, or becomes another gives its row back."""
    tables = tables_of(num_blocks=40, host_blocks=8, max_sequences=8)
    tables.add("a", range(3))
    rows = len(tables._table)
    for _ in range(10):
        tables.swap_out("a")
        tables.swap_in("a")
        tables.fork("a", "b")
        tables.fork("a", "c")
        tables.reorder(["b", "c"], ["a", "a"])
        tables.free("b")
        tables.swap_out("c")
        tables.free("c")
    assert len(tables._table) == rows


def test_views_of_many_sizes():
    tables = cc.BlockTables(
        8, 4, max_sequences=1, max_tokens=600, max_length=32, framework="numpy", device="cpu"
    )
    tables.add("a")
    for tokens in range(1, 600):
        step = tables.step(["a"], [0], num_tokens=tokens)
        assert step.positions.shape == (tokens,) and (step.slot_mapping == -1).all()


def test_text():
    tables = tables_of(host_blocks=2)
    tables.add("a")
    tables.step(["a"], [1])
    tables.add("b")
    tables.swap_out("b")
    assert repr(tables) == (
        "<BlockTables of 2 sequences, 1 swapped out: 7 of 8 blocks of 4 tokens are free, 2 of 2 on "
        "the host>"
    )
    step = tables.step(["a"], [1], num_sequences=2, num_tokens=3)
    assert repr(step) == (
        "<Step of 1 new token of 1 sequence, the longest 2, in arrays for 3 and 2>"
    )
    tables.fork("a", "c")
    assert repr(tables.step(["c"], [1])).endswith("1 and 1, 1 block to copy>")
    tables.free("c")
    assert "a" in tables and "c" not in tables and list(tables) == ["a", "b"]


REFUSALS = [
    (lambda t: t.add("a"), "add", "value", "sequence"),
    (lambda t: t.add([1]), "add", "type", "sequence"),
    (lambda t: t.add("x", [1.5]), "add", "value", "tokens"),
    (lambda t: t.add("x", 2**70), "add", "value", "tokens"),
    (lambda t: t.add("x", None), "add", "value", "tokens"),
    (lambda t: t.add("x", [1], salt="adapter"), "add", "type", "salt"),
    (lambda t: t.append("x", 1), "append", "value", "sequence"),
    (lambda t: t.append("told", "text"), "append", "value", "tokens"),
    (lambda t: t.append("told", 2**63), "append", "value", "tokens"),
    (lambda t: t.append("told", [1, 2**63]), "append", "value", "tokens"),
    (lambda t: t.append("a", 1), "append", "order", "tokens"),
    (lambda t: t.append("told", True), "append", "value", "tokens"),
    (lambda t: t.append("told", [5, False]), "append", "value", "tokens"),
    (lambda t: t.add("x", [0, 1, True]), "add", "value", "tokens"),
    (lambda t: t.add("x", (n > 0 for n in range(2))), "add", "value", "tokens"),
    (lambda t: t.add("x", np.array([True])), "add", "value", "tokens"),
    (lambda t: t.add("x", range(33)), "add", "length", "tokens"),
    (lambda t: t.step(iter("a"), [1]), "step", "type", "sequences"),
    (lambda t: t.step(None, [1]), "step", "type", "sequences"),
    (lambda t: t.step(np.array("a"), [1]), "step", "type", "sequences"),
    (lambda t: t.step(["a"], np.array(1)), "step", "type", "counts"),
    (lambda t: t.append("told", Broken()), "append", "value", "tokens"),
    (lambda t: t.append("told", [Broken()]), "append", "value", "tokens"),
    (lambda t: t.extend(["a"], 1), "extend", "type", "counts"),
    (lambda t: t.blocks_needed(["a"], None), "blocks_needed", "type", "counts"),
    (lambda t: t.fork("x", "y"), "fork", "value", "parent"),
    (lambda t: t.fork("a", "out"), "fork", "value", "child"),
    (lambda t: t.schedule("told"), "schedule", "type", "sequences"),
    (lambda t: t.reorder(["a"], ["x"]), "reorder", "value", "parents"),
    (lambda t: t.reorder(["x", "x"], ["a", "told"]), "reorder", "value", "sequences"),
    (lambda t: t.reorder(["x", ["y"]], ["a", "a"]), "reorder", "type", "sequences"),
    (lambda t: t.reorder(["a", "told"], ["a"]), "reorder", "length", "parents"),
    (lambda t: t.reorder(["a"], None), "reorder", "type", "parents"),
    (lambda t: t.schedule(["x"]), "schedule", "value", "sequences"),
    (lambda t: t.schedule(["out"]), "schedule", "value", "sequences"),
    (lambda t: t.schedule(["a", []]), "schedule", "type", "sequences"),
    (lambda t: t.schedule(["a"], max_tokens=-1), "schedule", "value", "max_tokens"),
    (lambda t: t.schedule(["a"], max_tokens=1000), "schedule", "value", "max_tokens"),
    (lambda t: t.schedule(None), "schedule", "type", "sequences"),
    (lambda t: t.free("x"), "free", "value", "sequence"),
    (lambda t: t.truncate("a", 4), "truncate", "value", "length"),
    (lambda t: t.truncate("a", -1), "truncate", "value", "length"),
    (lambda t: t.truncate("out", 0), "truncate", "value", "sequence"),
    (lambda t: t.swap_out("out"), "swap_out", "value", "sequence"),
    (lambda t: t.swap_in("a"), "swap_in", "value", "sequence"),
    (lambda t: t.swap_in("out", "a"), "swap_in", "value", "sequence"),
    (lambda t: t.swap_in("out", "out"), "swap_in", "value", "sequences"),
    (lambda t: t.swap_out("a", "a"), "swap_out", "value", "sequences"),
    (lambda t: t.step(["a"], [1, 1]), "step", "length", "counts"),
    (lambda t: t.step(["a"], [-1]), "step", "value", "counts"),
    (lambda t: t.step(["a"], [1.0]), "step", "value", "counts"),
    (lambda t: t.step(["a"], [30]), "step", "value", "counts"),
    (lambda t: t.step(["a", "a"], [1, 1]), "step", "value", "sequences"),
    (lambda t: t.step(["a", "x"], [1, 1]), "step", "value", "sequences"),
    (lambda t: t.step(["a", "out"], [1, 1]), "step", "value", "sequences"),
    (lambda t: t.step(["a", ["b"]], [1, 1]), "step", "type", "sequences"),
    (lambda t: t.step(["a"], [1], num_tokens=0), "step", "value", "num_tokens"),
    (lambda t: t.step(["a"], [1], num_sequences=5), "step", "value", "num_sequences"),
    (lambda t: t.step(list("abcde"), [1] * 5), "step", "value", "num_sequences"),
    (lambda t: t.step(list("abcd"), [20] * 4), "step", "value", "num_tokens"),
    (lambda t: t.step(["a"], [1], stream="s"), "step", "type", "stream"),
    (lambda t: t.blocks("x"), "blocks", "value", "sequence"),
    (lambda t: t.length("x"), "length", "value", "sequence"),
    (lambda t: t.tokens("x"), "tokens", "value", "sequence"),
    (lambda t: t.num_pending("x"), "num_pending", "value", "sequence"),
]


@pytest.mark.parametrize("framework", [np.array(["numpy", "torch"]), 1, ["numpy"], np])
def test_frameworks_that_are_no_names(framework):
    makers = (
        ("BlockTables", lambda: tables_of(num_blocks=4, framework=framework)),
        (
            "PagedKVCache.allocate",
            lambda: cc.PagedKVCache.allocate(1, 2, 4, 1, 8, framework=framework, device="cpu"),
        ),
    )
    for name, make in makers:
        with pytest.raises(
            cc.ArgumentError, match=f"^{name}: Invalid value of framework: expected"
        ):
            make()


@pytest.mark.whole
@pytest.mark.parametrize("call, method, what, argument", REFUSALS)
def test_refusals(call, method, what, argument):
    tables = tables_of(num_blocks=40, host_blocks=2)
    for name in "abcde":
        tables.add(name)
        tables.extend([name], [3])
    for name in ("out", "told"):
        tables.add(name)
    tables.swap_out("out")
    before = [(name, tables.blocks(name), tables.length(name)) for name in tables]
    with pytest.raises(
        cc.CupyCacheError, match=rf"^BlockTables\.{method}: Invalid {what} of {argument}: expected "
    ):
        call(tables)
    assert before == [(name, tables.blocks(name), tables.length(name)) for name in tables]


def test_texts_of_refusals():
    tables = tables_of(num_blocks=40, host_blocks=2)
    for name in ("a", "b", "out"):
        tables.add(name)
    tables.swap_out("out")
    calls = [
        (lambda t: t.add("a"), "add", "value", "sequence", "a new name", "'a', which is taken"),
        (lambda t: t.blocks("x"), "blocks", "value", "sequence", "a sequence that was added",
         "'x', which was not"),
        (lambda t: t.swap_out("out"), "swap_out", "value", "sequence",
         "a sequence that is not swapped out", "'out', which is"),
        (lambda t: t.swap_in("a"), "swap_in", "value", "sequence", "a sequence that is swapped out",
         "'a', which is not"),
        (lambda t: t.reorder(["a", "b", "a"], ["a", "a", "b"]), "reorder", "value", "sequences",
         "each sequence once", "'a' twice"),
        (lambda t: t.reorder(["a"], ["a", "b"]), "reorder", "length", "parents",
         "one parent for each of 1 sequence", 2),
        (lambda t: t.step(["a", "b"], [1]), "step", "length", "counts",
         "one count for each of 2 sequences", 1),
    ]  # fmt: skip
    for call, method, what, argument, expected, got in calls:
        with pytest.raises(cc.CupyCacheError) as raised:
            call(tables)
        text = f"BlockTables.{method}: Invalid {what} of {argument}: expected {expected}, got {got}"
        assert str(raised.value) == text


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_go_their_own_ways(framework, copied):
    if framework == "torch":
        pytest.importorskip("torch")
    tables = cc.BlockTables(
        8, 4, max_sequences=4, max_tokens=32, max_length=16, framework=framework, device="cpu"
    )
    tables.add("a", range(5))
    step = tables.step(["a"], [5])
    other = copied(tables)
    other.add("b", [7, 8, 9])
    its = other.step(["a", "b"], [2, 3])
    assert its.token_ids.tolist() == [0, 0, 7, 8, 9] and its.seq_lens.tolist() == [7, 3]
    assert its.slot_mapping.tolist() == [5, 6, 8, 9, 10]
    assert its.block_table.tolist() == [[0, 1, -1, -1], [2, -1, -1, -1]]
    assert "b" not in tables and tables.pool.num_free == 6
    assert step.token_ids.tolist() == [0, 1, 2, 3, 4] and step.seq_lens.tolist() == [5]


def test_an_upload_is_one_copy(recorder, monkeypatch):
    """By one copy into the arrays' memory, on the stream that is named, behind the current one, or
    on that; what is copied is kept."""
    torch = pytest.importorskip("torch")
    memory, copies, kept = torch.zeros(10_000, dtype=torch.uint8), [], []
    monkeypatch.setattr(making, "home", lambda *a: ("torch", arrays.Device("cuda", 0)))
    monkeypatch.setattr(making, "empty", lambda *a: memory)
    monkeypatch.setattr(allocations, "pinned", lambda size: np.zeros(size, np.uint8))
    monkeypatch.setattr(streams, "keep_until_done", lambda *where: kept.append(where))
    monkeypatch.setattr(recorder, "copy", lambda *what: copies.append(what))
    tables = tables_of(framework="torch", device="cuda")
    tables.add("a", range(5))
    for named, stream in ((None, recording.STREAM), (9, 9), (recording.STREAM, recording.STREAM)):
        tables.step(["a"], [1], stream=named)
        ((kept_arrays, *where),) = kept
        sent, received = kept_arrays
        assert received is memory
        assert copies == [(memory.data_ptr(), sent.ctypes.data, sent.nbytes, stream, 0)]
        assert where == [stream, 0]
        assert recorder.ordered == ([(recording.STREAM, 9, 0)] if named == 9 else [])
        for seen in (copies, kept, recorder.ordered):
            seen.clear()


def test_shallow_copies_are_refused():
    tables = tables_of()
    for one in (tables, tables.pool):
        with pytest.raises(cc.CopyError, match="a shallow copy would give out the same blocks"):
            copy.copy(one)


@pytest.mark.parametrize("options, argument", [
    ({"num_blocks": -1}, "num_blocks"), ({"block_size": 0}, "block_size"),
    ({"max_sequences": 0}, "max_sequences"), ({"max_tokens": True}, "max_tokens"),
    ({"max_length": None}, "max_length"), ({"host_blocks": -1}, "host_blocks"),
    ({"framework": "jax"}, "framework"),
])  # fmt: skip
def test_tables_that_cannot_be(options, argument):
    with pytest.raises(cc.ArgumentError, match=rf"^BlockTables: Invalid value of {argument}: "):
        tables_of(**options)


# --- on a GPU -------------------------------------------------------------------------------------


def on_host(array):
    return array.cpu().numpy() if hasattr(array, "cpu") else array.get()


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_uploads(framework):
    """The same numbers as on the host, step after step, although nothing waits between them."""
    pytest.importorskip(framework)
    options = {"num_blocks": 4000, "block_size": 16, "max_length": 4096, "max_tokens": 4096}
    there = tables_of(**options, framework=framework, device="cuda")
    here = tables_of(**options)
    names = (
        "block_table", "seq_lens", "query_start_loc", "positions", "slot_mapping", "token_ids",
    )  # fmt: skip
    for tables in (there, here):
        for name in range(4):
            tables.add(name, range(1000 * name, 1000 * name + 900))
    for at in range(120):
        counts = [900] * 4 if not at else [at % 3, 1, 1, 2]
        steps = [tables.step([3, 1, 2, 0], counts, num_tokens=4000) for tables in (there, here)]
        if at % 20 < 3:
            for name in names:
                found, expected = on_host(getattr(steps[0], name)), getattr(steps[1], name)
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
def test_steps_of_a_captured_graph():
    """What a graph that is replayed writes is read back from where the tables say it is."""
    torch = pytest.importorskip("torch")
    cache = cc.PagedKVCache.allocate(1, 40, 4, 2, 8, dtype=torch.float16, device="cuda")
    tables = tables_of(num_blocks=40, framework="torch", device="cuda")
    for name in range(4):
        tables.add(name)
    key = torch.zeros(4, 2, 8, dtype=torch.float16, device="cuda")

    def write(step):
        cache.write(0, key, key, step.slot_mapping)

    step = tables.step([0, 1], [1, 1], num_sequences=4, num_tokens=4)
    write(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(step)
        with pytest.raises(cc.CaptureError, match="before the capture"):
            tables.step([0], [1])
    written = {name: [] for name in range(4)}
    for name in (0, 1):
        tables.truncate(name, 0)
    for at in range(20):
        batch = [name for name in (3, 0, 2, 1) if (at + name) % 3]
        step = tables.step(batch, [1] * len(batch), num_sequences=4, num_tokens=4)
        values = torch.arange(4, device="cuda") + 10 * at
        key[:] = values[:, None, None]
        graph.replay()
        for row, name in enumerate(batch):
            written[name].append(10 * at + row)
    for name, expected in written.items():
        table = torch.tensor([tables.blocks(name)], dtype=torch.int32, device="cuda")
        bounds = torch.tensor([0, len(expected)], device="cuda")
        keys, _ = cache.gather(0, table, bounds, num_tokens=len(expected))
        assert keys[:, 1, 3].tolist() == expected
    cc.raise_faults()


@pytest.mark.gpu
def test_another_stream():
    cupy = pytest.importorskip("cupy")
    tables = tables_of(framework="cupy", device="cuda")
    tables.add("a")
    stream = cupy.cuda.Stream(non_blocking=True)
    step = tables.step(["a"], [3], stream=stream)
    stream.synchronize()
    assert step.positions.get().tolist() == [0, 1, 2]
