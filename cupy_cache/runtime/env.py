# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The environment variables, in one table; nothing else reads the environment.

The prefix is ``CUPYCACHE_``: ``CUPY_CACHE_`` belongs to CuPy itself. CUPYCACHE_DEBUG,
CUPYCACHE_LOGLEVEL and CUPYCACHE_OVERLAP are read at import, the others at use.
"""

import os
import warnings
from typing import NamedTuple

from .. import errors


class Variable(NamedTuple):
    """One variable: its name, its default as text, and what it does."""

    name: str
    default: str
    meaning: str


DEBUG = Variable(
    "CUPYCACHE_DEBUG", "0", "1: after each call wait for its stream and raise recorded faults"
)
KERNEL_DIR = Variable(
    "CUPYCACHE_KERNEL_DIR", "", "folder to load the .cu sources from, instead of the installed one"
)
LINEINFO = Variable(
    "CUPYCACHE_LINEINFO", "0", "1: compile kernels with line information, for profilers"
)
NO_COMPILE = Variable(
    "CUPYCACHE_NO_COMPILE", "0", "1: outside warmup(), fail rather than load a new specialisation"
)
LOGLEVEL = Variable(
    "CUPYCACHE_LOGLEVEL", "", "a logging level, such as DEBUG: print the log to standard error"
)
OVERLAP = Variable(
    "CUPYCACHE_OVERLAP", "0", "1: kernels may begin before the one in front of them is done"
)
REQUIRE_GPU = Variable(
    "CUPYCACHE_REQUIRE_GPU", "0", "1: tests marked gpu run, and fail, where there is no GPU"
)

# torch's own variable. If it is set, to whatever, torch's allocator caches no memory.
TORCH_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"

TABLE = (DEBUG, KERNEL_DIR, LINEINFO, NO_COMPILE, OVERLAP, LOGLEVEL, REQUIRE_GPU)


def torch_is_uncached():
    """Whether torch's allocator returns freed memory to the device at once."""
    return TORCH_UNCACHED in os.environ


def text(variable):
    """The variable's value, or its default."""
    return os.environ.get(variable.name, variable.default)


def flag(variable):
    """Whether the variable is on: true, yes, on, or a number other than 0. It is off for the
    opposites of these, and, with a warning, for anything else."""
    value = text(variable).strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    number = whole_number(value)
    if number is not None:
        return number != 0
    got = errors.shown(text(variable))
    say_once(f"{variable.name}: expected 1 or 0, got {got}; it counts as 0")
    return False


def whole_number(text):
    """The number that a text spells; None where it spells none, or has more digits than Python
    reads."""
    try:
        return int(text) if text.isdecimal() else None
    except ValueError:
        return None


_said = set()


def say_once(what):
    """Warn of a variable's value, once. At import nobody could catch an error."""
    if what not in _said:
        _said.add(what)
        warnings.warn(what, RuntimeWarning, stacklevel=3)


def other(name):
    """Another library's variable (CuPy's, CUDA's), for reports; None where unset."""
    return os.environ.get(name)
