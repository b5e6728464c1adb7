# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.report RESULT.json``: from pytest-benchmark's JSON to tables and plots.

Writes ``<gpu>.json``, a flat list with one record for each case, and prints Markdown tables.
``--plots DIR`` draws three pictures with matplotlib.
"""

import argparse
import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "cupy_cache"
COLOURS = {OURS: "#1b6ca8", "torch": "#d1495b", "triton": "#edae49"}


# --- records --------------------------------------------------------------------------------------


def load(path):
    """The records of a ``--benchmark-json`` file, or of a results file, one for each case."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    found = data if isinstance(data, list) else [b["extra_info"] for b in data["benchmarks"]]
    records = {}
    for record in found:
        if "op" in record:
            # Every benchmark of a case carries the same record, complete when the run ended.
            records[record["op"], record["case"]] = record
    return sorted(records.values(), key=_order)


def _order(record):
    """By operation, then by name, where numbers count as numbers."""
    words = re.split(r"(\d+)", record["case"])
    return record["op"], [(int(w), "") if w.isdigit() else (-1, w) for w in words]


def machine_name(records):
    """What the results file is called: the GPU, or "cpu"."""
    names = {record.get("gpu") for record in records}
    if len(names) != 1:
        raise SystemExit(f"the records come from several machines: {sorted(map(str, names))}")
    return re.sub(r"[^A-Za-z0-9.]+", "-", names.pop() or "cpu").strip("-")


def write(records, folder):
    """Write the flat list; returns its path."""
    path = Path(folder) / f"{machine_name(records)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return path


def by_op(records):
    """Records grouped by operation, in order."""
    groups = {}
    for record in records:
        groups.setdefault(record["op"], []).append(record)
    return groups


# --- tables ---------------------------------------------------------------------------------------


def tables(records):
    """All tables, as Markdown."""
    first = records[0]
    where = first["gpu"] or f"no GPU, {first['cpu']}"
    versions = ", ".join(
        f"{name} {first[name]}"
        for name in ("cuda", "driver", "cupy", "torch", "python")
        if first.get(name)
    )
    parts = [f"# {where}", f"{versions}; {first['date']}, commit {first['commit']}. Microseconds."]
    for op, group in by_op(records).items():
        table = _ablation if op == "ablation" else _plain if not _compared(group) else _contest
        parts += [f"## {op}", table(group)]
    left_out = [
        f"- {r['op']}, {r['case']}: {who} failed: {why}"
        for r in records
        for who, why in r.get("failed", {}).items()
    ]
    reasons = sorted({f"- {why}" for r in records for why in r.get("skipped", {}).values()})
    if left_out or reasons:
        parts += ["## Not measured", "\n".join(left_out + reasons)]
    return "\n\n".join(parts) + "\n"


def _compared(group):
    return any(r["peers"] or r["copy_us"] for r in group)


def _contest(group):
    names = _peers(group)
    gpu = group[0]["gpu"] is not None
    head = ["case", "MiB moved"]
    if gpu:
        head += ["device", "L2 cold", "copy", "of copy", *(f"{n} device" for n in names)]
    else:
        head += ["memcpy"]
    head += ["host", *(f"{n} host" for n in names)]
    rows = []
    for r in group:
        row = [r["case"], f"{r['bytes'] / 2**20:.4g}" if r["bytes"] else ""]
        if gpu:
            row += [_us(r["device_us"]), _us(r.get("device_cold_us")), _us(r["copy_us"])]
            row += [f"{100 * r['of_copy']:.0f} %" if r.get("of_copy") else ""]
            row += [_us(r["peers"].get(n, {}).get("device_us")) for n in names]
        else:
            row += [_us(r["copy_us"])]
        row += [_us(r["host_us"])]
        row += [_us(r["peers"].get(n, {}).get("host_us")) for n in names]
        rows.append(row)
    return _markdown(head, rows)


def _ablation(group):
    rows = [
        [r["case"], who, *(_us(place.get(k)) for k in ("device_us", "host_us", "wall_us"))]
        for r in group
        for who, place in {OURS: r, **r["peers"]}.items()
    ]
    return _markdown(["case", "version", "device", "host", "until done"], rows)


def _plain(group):
    rows = [[r["case"], _us(r["device_us"]), _us(r["host_us"])] for r in group]
    return _markdown(["case", "device", "host"], rows)


def _peers(group):
    return list(dict.fromkeys(name for r in group for name in r["peers"]))


def _us(value):
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _markdown(head, rows):
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- plots ----------------------------------------------------------------------------------------


def plots(records, folder):
    """Draw the pictures that the records allow; returns their paths."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plots needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in (
        ("bandwidth", draw_bandwidth), ("host", draw_host), ("ablation", draw_ablation)
    ):  # fmt: skip
        figure = draw(pyplot, records)
        if figure is None:
            print(f"nothing to draw for {name}.png", file=sys.stderr)
            continue
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150, bbox_inches="tight")
        pyplot.close(figure)
    return paths


def _over_memory(record):
    """Whether a record is about the GPU's memory: not the bus, and more than some indices."""
    return bool(
        record["bytes"] and record["device_us"] and record["copy_us"]
        and record.get("path") != "bus" and record["op"] not in ("ablation", "slot_mapping")
    )  # fmt: skip


def draw_bandwidth(pyplot, records):
    """Bytes moved per second against bytes moved, one panel for each operation."""
    groups = {op: [r for r in group if _over_memory(r)] for op, group in by_op(records).items()}
    groups = {op: group for op, group in groups.items() if group}
    if not groups:
        return None
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(5 * columns, 3.8 * lines), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    ceiling = _points([(r["bytes"], r["copy_us"]) for g in groups.values() for r in g])
    l2 = records[0].get("l2_bytes")
    for axis, (op, group) in zip(axes.flat, groups.items()):
        axis.plot(*ceiling, color="0.6", linewidth=3, label="device-to-device copy", zorder=1)
        if l2:
            axis.axvline(l2, color="0.6", linestyle=":", label="L2 size")
        for name in (OURS, *_peers(group)):
            found = [(r["bytes"], _place(r, name).get("device_us")) for r in group]
            points = _points([(b, us) for b, us in found if us])
            axis.plot(
                *points, "o", color=_colour(name), markersize=5 if name == OURS else 4, label=name,
                zorder=3 if name == OURS else 2,
            )  # fmt: skip
        axis.set(title=op, xlabel="bytes that must move", xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for line in axes:
        line[0].set_ylabel("TB/s")
        line[0].set_ylim(bottom=0)
    figure.suptitle(f"Device time as bandwidth, {_where(records)}")
    figure.tight_layout()
    return figure


def _points(pairs):
    """(bytes, TB/s) sorted by bytes."""
    pairs = sorted(set(pairs))
    return [b for b, _ in pairs], [b / us / 1e6 for b, us in pairs]


def draw_host(pyplot, records):
    """Host time of one middling case of each operation."""
    chosen = []
    for op, group in by_op(records).items():
        measured = [r for r in group if r["host_us"] and r["peers"]]
        if op not in ("ablation", "start", "limits") and measured:
            chosen.append(measured[len(measured) // 2])
    if not chosen:
        return None
    names = [OURS, *_peers(chosen)]
    figure, axis = pyplot.subplots(figsize=(9, 0.35 * len(chosen) * len(names) + 1.5))
    height = 0.8 / len(names)
    for offset, name in enumerate(names):
        for position, record in enumerate(chosen):
            us = _place(record, name).get("host_us")
            if us:
                y = position + offset * height
                label = name if position == 0 else None
                axis.barh(y, us, height, color=_colour(name), label=label)
                axis.text(us, y, f" {us:.1f}", va="center", fontsize=7)
    axis.set_yticks(
        [p + 0.4 - height / 2 for p in range(len(chosen))],
        [f"{r['op']}\n{r['case']}" for r in chosen], fontsize=7,
    )  # fmt: skip
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=_colour(name)) for name in names]
    axis.legend(handles, names, fontsize=8)
    axis.set(xlabel="µs per call", xscale="log", title=f"Host time per call, {_where(records)}")
    axis.margins(x=0.12)
    axis.invert_yaxis()
    figure.tight_layout()
    return figure


def draw_ablation(pyplot, records):
    """Each version's device, host and total time, one panel for each case."""
    group = [r for r in records if r["op"] == "ablation" and r["peers"]]
    if not group:
        return None
    columns = min(2, len(group))
    lines = -(-len(group) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(7 * columns, 3 * lines), squeeze=False)
    for axis in axes.flat[len(group) :]:
        axis.remove()
    kinds = {"device_us": "kernels", "host_us": "caller", "wall_us": "until done"}
    for axis, record in zip(axes.flat, group):
        versions = [OURS, *record["peers"]]
        for offset, (kind, label) in enumerate(kinds.items()):
            values = [_place(record, name).get(kind) or 0 for name in versions]
            positions = [p + 0.27 * offset for p in range(len(versions))]
            axis.barh(positions, values, 0.25, label=label)
            for y, us in zip(positions, values):
                axis.text(us, y, f" {us:.1f}" if us else "", va="center", fontsize=6)
        axis.set_yticks([p + 0.27 for p in range(len(versions))], versions, fontsize=7)
        axis.set_title(record["case"], fontsize=8)
        axis.set_xlabel("µs per call", fontsize=8)
        axis.invert_yaxis()
    axes.flat[0].legend(fontsize=7)
    figure.suptitle(f"What each optimisation is worth, {_where(records)}")
    figure.tight_layout()
    return figure


def _place(record, name):
    return record if name == OURS else record["peers"].get(name, {})


def _colour(name):
    others = ("#66a182", "#8d6a9f", "#2e4057", "#9c6644", "#5f6c7b")
    return COLOURS.get(name) or others[sum(map(ord, name)) % len(others)]


def _where(records):
    return records[0]["gpu"] or records[0]["cpu"]


def main(arguments=None):
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", help="what --benchmark-json wrote, or a results file")
    parser.add_argument("--results", default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--commit", help="the commit measured, where the run could not know")
    parser.add_argument("--plots", metavar="DIR", help="draw PNGs there; needs matplotlib")
    options = parser.parse_args(arguments)
    records = load(options.result)
    if not records:
        raise SystemExit(f"{options.result} holds no record of these benchmarks")
    if options.commit:
        for record in records:
            record["commit"] = options.commit
    print(tables(records), end="")
    print(f"wrote {write(records, options.results)}", file=sys.stderr)
    if options.plots:
        for path in plots(records, options.plots):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
