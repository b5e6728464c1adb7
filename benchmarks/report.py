# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.report RESULT.json``: from pytest-benchmark's JSON to tables and plots.

Writes ``<gpu>.json``, a flat list with one record for each case, and prints Markdown tables.
``--plots DIR`` draws five pictures of a few cases with matplotlib, to be read 900 pixels wide.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "cupy_cache"
COLOURS = {OURS: "#1b6ca8", "bound": "#6baed6", "compiled": "#4a4e69", "torch": "#d1495b",
           "triton": "#edae49", "bare": "#2a9d8f"}  # fmt: skip

# What the pictures show. Panels: title, operation, and what a record must say, if it says it.
PANELS = (
    ("NHD write", "reshape_and_cache_flash",
     {"heads": 8, "dtype": "bfloat16", "layout": "NHD", "slots": "random"}),
    ("NHD write to fp8", "reshape_and_cache_flash, quantised",
     {"stored": "fp8", "layout": "NHD", "scales": "one scale"}),
    ("x-packed write, consecutive slots", "reshape_and_cache",
     {"dtype": "bfloat16", "slots": "consecutive", "stored": "auto"}),
    ("MLA write", "concat_and_cache_mla", {"stored": "auto", "slots": "random"}),
    ("gather, rows of 576", "gather_cache", {"layout": "rows", "lengths": "equal"}),
    ("copying blocks in 32 layers", "copy_blocks", {"blocks": "random", "same_pairs": False}),
)  # fmt: skip
ATTENTION = {"heads": 32, "kv_heads": 8, "head_size": 128, "block_size": 16, "layout": "NHD",
             "queries": 1, "option": ""}  # fmt: skip
READ_PANELS = (
    ("bfloat16", "paged_attention", {**ATTENTION, "stored": "auto"}),
    ("fp8", "paged_attention", {**ATTENTION, "stored": "fp8"}),
    ("fp8, a scale for each token and head", "paged_attention",
     {**ATTENTION, "stored": "fp8_per_token_head"}),
    ("latent attention", "paged_attention_mla", {"stored": "auto", "queries": 1, "option": ""}),
)  # fmt: skip
HOST_OPS = ("host time, in turns", "reshape_and_cache_flash", "reshape_and_cache",
            "concat_and_cache_mla", "gather_cache", "copy_blocks", "slot_mapping")  # fmt: skip
HOST_FIRST = ("bound", "compiled")
ABLATION_CASES = ("copy_blocks, 32 layers, 8 pairs", "copy_blocks, 32 layers, 64 pairs",
                  "write, 4096 tokens", "slopes")  # fmt: skip
WIDTH = 9  # inches
FONT = {"font.size": 10, "axes.titlesize": 10, "figure.titlesize": 12}
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


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
    level_ceilings(records.values())
    return sorted(records.values(), key=_order)


def level_ceilings(records):
    """Let ``copy_us``, what copies on the GPU or over the bus took, be what they can take: a copy
    of these bytes takes no longer than one of more bytes, nor than some of fewer one after the
    other, nor, over the bus, than one the other way.

    Of some sizes the driver's copies take a quarter longer than of sizes beside them.
    """
    for over_the_bus in (False, True):
        copies = [r for r in records if r.get("gpu") and r.get("copy_us")]
        copies = [r for r in copies if ("swap" in r["op"]) == over_the_bus]
        known = {}
        for record in copies:
            size, us = record["bytes"], record["copy_us"]
            known[size] = min(us, known.get(size, us))
        for record in copies:
            size = record["bytes"]
            ceiling = min(us * max(1, size / moved) for moved, us in known.items())
            if "of_copy" in record:
                record["of_copy"] *= ceiling / record["copy_us"]
            record["copy_us"] = ceiling


def _order(record):
    """By operation, then by name, where numbers count as numbers."""
    words = re.split(r"(\d+)", record["case"])
    return record["op"], [(int(w), "") if w.isdigit() else (-1, w) for w in words]


def machine_name(records):
    """What the results file is called: the GPU, or "cpu"."""
    names = {record.get("gpu") for record in records}
    if len(names) != 1:
        raise SystemExit(f"the records come from several machines: {sorted(map(str, names))}")
    return re.sub(r"[^a-z0-9.]+", "-", (names.pop() or "cpu").lower()).strip("-")


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
    return markdown(head, rows)


def _ablation(group):
    rows = [
        [r["case"], who, *(_us(place.get(k)) for k in ("device_us", "host_us", "wall_us"))]
        for r in group
        for who, place in {OURS: r, **r["peers"]}.items()
    ]
    return markdown(["case", "version", "device", "host", "until done"], rows)


def _plain(group):
    rows = [[r["case"], _us(r["device_us"]), _us(r["host_us"])] for r in group]
    return markdown(["case", "device", "host"], rows)


def _peers(group):
    return list(dict.fromkeys(name for r in group for name in r["peers"]))


def _us(value):
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def markdown(head, rows):
    """A table of strings, of which the first column is text and the others numbers."""
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
        ("bandwidth", draw_bandwidth), ("attention", draw_attention), ("decoding", draw_decoding),
        ("host", draw_host), ("ablation", draw_ablation),
    ):  # fmt: skip
        with pyplot.rc_context(FONT):
            figure = draw(pyplot, records)
        if figure is None:
            print(f"nothing to draw for {name}.png", file=sys.stderr)
            continue
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
        pyplot.close(figure)
    return paths


def draw_bandwidth(pyplot, records):
    """Bytes moved per second against bytes moved, one panel for each of the main operations."""
    ceiling = "copy_us", "device-to-device copy"
    return _draw_panels(pyplot, records, PANELS, ceiling, "Bandwidth by bytes that must move")


def draw_attention(pyplot, records):
    """Bytes read per second against bytes of keys and values, one panel for each kind of cache."""
    ceiling = "read_us", "bare read of the same bytes"
    title = "Attention over pages: bandwidth by bytes that must be read"
    return _draw_panels(pyplot, records, READ_PANELS, ceiling, title)


def _draw_panels(pyplot, records, wanted_panels, ceiling_of, heading):
    """A panel of bandwidth against bytes for each of ``wanted_panels`` that was measured.
    ``ceiling_of``: the field of the time that nothing can beat, and what it is called."""
    field, ceiling_name = ceiling_of
    measured = [r for r in records if r["bytes"] and r["device_us"] and r.get(field)]
    panels = []
    for title, op, wanted in wanted_panels:
        group = [r for r in measured if r["op"] == op and _is(r, wanted)]
        if group:
            panels.append((title, group))
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(WIDTH, 2.6 * lines + 1), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    l2 = records[0].get("l2_bytes")
    handles = {}
    for axis, (title, group) in zip(axes.flat, panels):
        ceiling = _points((r["bytes"], r[field]) for r in group)
        (handles[ceiling_name],) = axis.plot(*ceiling, color="0.75", linewidth=5)
        if l2:
            handles["size of the L2"] = axis.axvline(l2, color="0.5", linestyle=":")
        for name in reversed([OURS, *_peers(group)]):  # ours on top
            points = _points(
                (r["bytes"], us) for r in group if (us := _place(r, name).get("device_us"))
            )
            if points[0]:
                (handles[name],) = axis.plot(
                    *points, "o-", color=_colour(name), markersize=5, linewidth=1
                )
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_xticks([16 * KIB, MIB, 64 * MIB, 4 * GIB], ["16 KiB", "1 MiB", "64 MiB", "4 GiB"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
    for line in axes:
        line[0].set_ylabel("TB/s")
    names = sorted(handles, key=lambda name: (name != OURS, name not in COLOURS))
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=5, frameon=False
    )
    figure.suptitle(f"{heading}, {_where(records)}")
    return figure


def _is(record, wanted):
    """Whether a record says all this, as far as it says it."""
    return all(record.get(key, value) == value for key, value in wanted.items())


def draw_decoding(pyplot, records):
    """A step's time against the tokens of each sequence, one panel for each number of sequences
    that was measured at several lengths."""
    groups = {}
    for record in records:
        known = record["op"] == "paged_attention" and record["device_us"] and record.get("read_us")
        wanted = {**ATTENTION, "stored": "auto"}
        if known and _is(record, wanted) and isinstance(record["lengths"], int):
            groups.setdefault(record["sequences"], []).append(record)
    groups = {count: group for count, group in sorted(groups.items()) if len(group) > 1}
    if not groups:
        return None
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(WIDTH, 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    handles = {}
    for axis, (count, group) in zip(axes.flat, groups.items()):
        group = sorted(group, key=lambda record: record["lengths"])
        lengths = [record["lengths"] for record in group]
        read = [record["read_us"] for record in group]
        (handles["bare read of the same bytes"],) = axis.plot(
            lengths, read, color="0.75", linewidth=5
        )
        for name in reversed([OURS, *_peers(group)]):  # ours on top
            times = [_place(record, name).get("device_us") for record in group]
            points = [(length, us) for length, us in zip(lengths, times) if us]
            (handles[name],) = axis.plot(
                *zip(*points), "o-", color=_colour(name), markersize=5, linewidth=1
            )
        axis.set_title(f"{count} sequence{'s' if count > 1 else ''}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.minorticks_off()
        axis.margins(x=0.15)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.set_xlabel("tokens of each")
    axes[0][0].set_ylabel("µs")
    names = sorted(handles, key=lambda name: (name != OURS, name not in COLOURS))
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=5, frameon=False
    )
    figure.suptitle(f"Attention over pages: time of a step in bfloat16, {_where(records)}")
    return figure


def _points(pairs):
    """(bytes, TB/s) sorted by bytes."""
    pairs = sorted(set(pairs))
    return [b for b, _ in pairs], [b / us / 1e6 for b, us in pairs]


def draw_host(pyplot, records):
    """Host time of one case of each of the main operations: the one with the most to compare, or
    else a middling one."""
    groups = by_op(records)
    bars = []  # (row, name, microseconds)
    headings = []  # (row, operation and case)
    row = 0
    for op in HOST_OPS:
        group = [r for r in groups.get(op, []) if r["host_us"] and r["peers"]]
        group = [r for r in group if not r.get("same_pairs")]  # the host does not care
        if not group:
            continue
        most = max(_compared_first(r) for r in group)
        group = [r for r in group if _compared_first(r) == most]
        record = group[len(group) // 2]
        headings.append((row, f" {op}: {record['case']}"))
        for name in (OURS, *HOST_FIRST, *(n for n in record["peers"] if n not in HOST_FIRST)):
            us = _place(record, name).get("host_us")
            if us:
                row += 1
                bars.append((row, name, us))
        row += 1.4
    if not bars:
        return None
    figure, axis = pyplot.subplots(figsize=(WIDTH, 0.21 * row + 1), layout="constrained")
    rows, names, times = zip(*bars)
    axis.barh(rows, times, 0.8, color=[_colour(name) for name in names])
    for y, _, us in bars:
        axis.text(us, y, f" {us:.1f}" if us < 100 else f" {us:.0f}", va="center")
    for y, heading in headings:
        axis.text(0, y, heading, va="center", weight="bold", transform=axis.get_yaxis_transform())
    axis.set_yticks(rows, names)
    axis.tick_params(axis="y", length=0)
    axis.set(xlabel="µs per call", xscale="log", ylim=(row - 0.6, -0.8))
    axis.set_xlim(left=1, right=2 * max(times))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Host time per call, {_where(records)}")
    return figure


def _compared_first(record):
    return sum(name in record["peers"] for name in HOST_FIRST)


def draw_ablation(pyplot, records):
    """Each version's device and total time, one panel for each case."""
    group = [r for r in records if r["op"] == "ablation" and r["peers"]]
    found = [next((r for r in group if r["case"].startswith(c)), None) for c in ABLATION_CASES]
    found = [r for r in found if r]
    if not found:
        return None
    columns = min(2, len(found))
    lines = -(-len(found) // columns)
    heights = [
        max(len(r["peers"]) + 1 for r in found[i * columns : (i + 1) * columns])
        for i in range(lines)
    ]
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(WIDTH, 0.5 * sum(heights) + 0.8 * lines + 1), squeeze=False,
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(found) :]:
        axis.remove()
    kinds = {"device_us": ("kernels", "#1b6ca8"), "wall_us": ("until the GPU is done", "#edae49")}
    for axis, record in zip(axes.flat, found):
        versions = [OURS, *record["peers"]]
        for offset, (kind, (label, colour)) in enumerate(kinds.items()):
            for y, name in enumerate(versions):
                us = _place(record, name).get(kind) or 0
                axis.barh(y + 0.4 * offset, us, 0.38, color=colour, label=None if y else label)
                axis.text(us, y + 0.4 * offset, f" {us:.1f}" if us else "", va="center")
        labels = [textwrap.fill(name, 18) for name in versions]
        axis.set_yticks([y + 0.2 for y in range(len(versions))], labels)
        axis.set_title(record["case"])
        axis.margins(x=0.18)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("µs per call")
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
        frameon=False,
    )  # fmt: skip
    figure.suptitle(f"What each optimisation is worth, {_where(records)}")
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
