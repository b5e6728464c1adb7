# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks' report does with the times that were measured."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_ceilings():
    """A copy takes no longer than one of more bytes, nor than several of fewer."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    measured = (("a", 100, 10.0), ("b", 200, 30.0), ("c", 210, 16.0), ("d", 630, 60.0))
    records = [
        {"op": op, "gpu": "any", "bytes": moved, "copy_us": us, "of_copy": 1.0}
        for op, moved, us in measured
    ]
    for us in (500.0, 400.0):  # there and back
        records.append({"op": "swap_blocks", "gpu": "any", "bytes": 100, "copy_us": us})
    records.append({"op": "nothing moves", "gpu": "any", "bytes": 0, "copy_us": None})
    for _ in range(2):  # nor does it change anything again
        report.level_ceilings(records)
        assert [r["copy_us"] for r in records] == [10.0, 16.0, 16.0, 48.0, 400.0, 400.0, None]
        assert [r["of_copy"] for r in records[:4]] == [1.0, 16 / 30, 1.0, 0.8]
