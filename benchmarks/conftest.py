# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""A time limit for the whole run, and what the reports say of the machine."""

import time

import pytest

from . import timing

_started = time.monotonic()


def pytest_addoption(parser):
    parser.addoption(
        "--time-limit", type=float, default=None, metavar="SECONDS",
        help="skip the benchmarks that have not begun after so many seconds; the results so far "
        "are written all the same",
    )  # fmt: skip


def pytest_report_header():
    facts = timing.machine()
    where = facts["gpu"] or f"no GPU, {facts['cpu']}"
    return f"benchmarks: {where}; torch {facts['torch']}; commit {facts['commit']}"


def pytest_runtest_setup(item):
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - _started > limit:
        pytest.skip("the time limit is reached")


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["cupy_cache"] = timing.machine()
