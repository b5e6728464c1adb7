# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The environment variables, in one table; nothing else reads the environment.

The prefix is ``CUPYCACHE_``: ``CUPY_CACHE_`` belongs to CuPy itself. CUPYCACHE_DEBUG and
CUPYCACHE_LOGLEVEL are read at import, the others at use.
"""

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """One variable: its name, its default as text, and what it does."""

    name: str
    default: str
    meaning: str


DEBUG = Variable(
    "CUPYCACHE_DEBUG", "0", "1: after each call wait for the device and raise recorded faults"
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
    "CUPYCACHE_LOGLEVEL", "", "a logging level name: print this library's log to standard error"
)
REQUIRE_GPU = Variable(
    "CUPYCACHE_REQUIRE_GPU", "0", "1: tests marked gpu fail rather than skip where there is no GPU"
)

TABLE = (DEBUG, KERNEL_DIR, LINEINFO, NO_COMPILE, LOGLEVEL, REQUIRE_GPU)


def text(variable):
    """The variable's value, or its default."""
    return os.environ.get(variable.name, variable.default)


def flag(variable):
    """Whether the variable is 1, true, yes or on."""
    return text(variable).strip().lower() in ("1", "true", "yes", "on")


def other(name):
    """A variable that belongs to somebody else (CuPy, CUDA), for reports; None where unset."""
    return os.environ.get(name)
