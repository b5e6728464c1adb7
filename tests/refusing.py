# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What tests of refusals share: the errors, tensors without memory, and calls that are known."""

import re

import pytest

import cupy_cache as cc


def refused(op, argument, *words):
    """A context in which an error of the one form must be raised."""
    pattern = rf"^{op}: Invalid [a-z]+ of {re.escape(argument)}: expected .*, got .*"
    return pytest.raises(cc.CupyCacheError, match=pattern + ".*".join(map(re.escape, words)))


def asleep(torch, tensor):
    """A tensor whose storage was resized to nothing."""
    made = torch.empty_like(tensor)
    made.untyped_storage().resize_(0)
    return made


def asleep_behind_others(torch, tensor):
    """The same, of which the address is an offset that counts from nothing."""
    made = torch.empty(2, *tensor.shape, dtype=tensor.dtype)[1]
    made.untyped_storage().resize_(0)
    return made


def step(torch):
    """A write's tensors, by their names."""
    return {
        "key": torch.ones(3, 2, 8),
        "value": torch.ones(3, 2, 8),
        "key_cache": torch.zeros(6, 4, 2, 8),
        "value_cache": torch.zeros(6, 4, 2, 8),
        "slot_mapping": torch.arange(3),
    }


def learnt(recorder, call):
    """Make a call until it takes the fast path."""
    for _ in range(4):
        call()
    assert len(recorder.take()) == 4
