# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.counters``: what the profiler counts in one launch of each bulk case.

Runs itself under Nsight Compute (``ncu``), which must be installed and allowed to read the hardware
counters, and writes ``<gpu>-counters.json``: bytes read from and written to memory, sectors at the
L2, registers, occupancy, and how busy memory and the schedulers were. Caches are emptied before
each launch and clocks are left alone. The bytes that an operation must move stand beside it
(``bytes``), as does a kernel of torch's that streams as many from one array to another
(``linear``).

What stays in the L2 at the end of a launch has not been written to memory yet: ``dram_written`` is
less than what was stored by up to that much.
"""

import argparse
import csv
import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import report, suite, timing

MODULES = (
    "bench_reshape_and_cache_flash", "bench_quantised_writes", "bench_mla", "bench_gather_cache",
    "bench_copy_blocks", "bench_reshape_and_cache",
)  # fmt: skip
LEAST, MOST = 40e6, 350e6  # bytes moved: bulk, but soon over
METRICS = {
    "ns": "gpu__time_duration.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "dram_busy_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_sectors_read": "lts__t_sectors_op_read.sum",
    "l2_sectors_written": "lts__t_sectors_op_write.sum",
    "l2_busy_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "occupancy_limit_percent": "sm__maximum_warps_per_active_cycle_pct",
    "registers": "launch__registers_per_thread",
    "threads": "launch__block_size",
    "instructions": "smsp__inst_executed.sum",
    "issue_slots_busy_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
}


def launches():
    """(facts, call) of each case; a call launches one kernel."""
    for name in MODULES:
        module = importlib.import_module(f"benchmarks.{name}")
        for case in module.CASES:
            load = module.make(case)
            record = load.record
            if LEAST <= record["bytes"] <= MOST:
                facts = {k: record[k] for k in ("op", "case", "dtype", "layout", "bytes")}
                yield facts, load.calls(suite.OURS)[0]
            load.close()


def linear(moved):
    """Facts and call of torch's kernel that reads half of ``moved`` bytes and writes as many."""
    torch = timing.torch_module()
    source, result = (torch.zeros(moved // 16, dtype=torch.int64, device="cuda") for _ in range(2))
    facts = {"op": "linear", "case": "torch.bitwise_not", "dtype": "int64", "layout": ""}
    return facts | {"bytes": moved}, functools.partial(torch.bitwise_not, source, out=result)


def run_all(path):
    """Under the profiler: each launch once, with its facts in ``path`` in the same order."""
    cudart = timing.torch_module().cuda.cudart()
    synchronize = timing.torch_module().cuda.synchronize
    ran = []

    def profiled(facts, call):
        call()  # compiles
        synchronize()
        cudart.cudaProfilerStart()
        call()
        synchronize()
        cudart.cudaProfilerStop()
        ran.append(facts)

    for facts, call in launches():
        profiled(facts, call)
    for moved in sorted({facts["bytes"] for facts in ran}):
        profiled(*linear(moved))
    Path(path).write_text(json.dumps({"machine": timing.machine(), "ran": ran}), encoding="utf-8")


def profile():
    """The records: facts of each launch and what was counted."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("Nsight Compute (ncu) is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "ran.json")
        command = [
            ncu, "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "all",
            "--csv", "--page", "raw", "--print-units", "base", "--metrics",
            ",".join(METRICS.values()), sys.executable, "-m", "benchmarks.counters", "--run", path,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        said = f"{ncu}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        if done.returncode or not os.path.exists(path):
            raise SystemExit(said)
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    counted = list(csv.DictReader(lines))[1:]  # the first row holds the units
    if len(counted) != len(kept["ran"]):
        raise SystemExit(
            f"{len(counted)} kernels were profiled, {len(kept['ran'])} launched. {said}"
        )
    return [
        kept["machine"] | facts | {name: _number(row.get(m)) for name, m in METRICS.items()}
        for facts, row in zip(kept["ran"], counted)
    ]


def _number(text):
    try:
        value = float(text.replace(",", ""))
    except (AttributeError, ValueError):
        return None
    return int(value) if value.is_integer() else round(value, 2)


def table(records):
    """The records as Markdown."""
    head = ["case", "MB moved", "us", "DRAM read, MB", "written", "busy", "L2 busy", "occupancy",
            "of at most", "registers", "issuing"]  # fmt: skip
    shown = (
        ("bytes", 1e6, ".1f"), ("ns", 1e3, ".2f"), ("dram_read", 1e6, ".1f"),
        ("dram_written", 1e6, ".1f"), ("dram_busy_percent", 100, ".0%"),
        ("l2_busy_percent", 100, ".0%"), ("occupancy_percent", 100, ".0%"),
        ("occupancy_limit_percent", 100, ".0%"), ("registers", 1, ".0f"),
        ("issue_slots_busy_percent", 100, ".0%"),
    )  # fmt: skip
    rows = [
        [
            f"{r['op']}: {r['case']}",
            *("" if r[name] is None else format(r[name] / unit, how) for name, unit, how in shown),
        ]
        for r in records
    ]
    return report.markdown(head, rows)


def main(arguments=None):
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counters", description=__doc__)
    parser.add_argument("--run", metavar="PATH", help=argparse.SUPPRESS)
    parser.add_argument("--results", default=report.RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    if options.run:
        run_all(options.run)
        return
    records = profile()
    print(table(records))
    path = Path(options.results) / f"{report.machine_name(records)}-counters.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
