# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of the documents, docs/images/*.svg, and writes the tables of times in the
README and in docs/performance.md.

Layouts: tokens are written by the library itself into a small cache, and the picture shows where
they are in its memory. Times: from a results file of the benchmarks. A test compares the files with
what this makes.

    python docs/make_pictures.py
"""

import json
from pathlib import Path

import numpy as np

import cupy_cache as cc

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3.json"
OF_ENGINE = RESULTS.with_name("nvidia-h100-80gb-hbm3-engine.json")
OF_TRANSFORMERS = RESULTS.with_name("nvidia-h100-80gb-hbm3-transformers.json")
README = ROOT / "README.md"
PERFORMANCE = ROOT / "docs" / "performance.md"

# Of each token, by the first of its letters: a colour for its first head, and one for the second.
COLOURS = (
    ("#f2c14e", "#f9e2a8"), ("#7fb3a0", "#c3ded4"), ("#e58a94", "#f3c6cb"), ("#8aa8d6", "#c8d6ec"),
)  # fmt: skip
INK, GREY, OURS, OTHER = "#222222", "#999999", "#1b6ca8", "#d9a0a7"


class Svg:
    """A picture on white, in which y grows downwards."""

    def __init__(self, width, height, title):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="{INK}" '
            f'text-anchor="middle" stroke-width="0" role="img" aria-label="{title}">',
            f'<rect width="{width}" height="{height}" rx="6" fill="#ffffff"/>',
        ]

    def box(self, x, y, width, height, fill, text="", edge=None):
        """Of its size, with an edge; or a little smaller, so that there is a gap to the next."""
        gap, stroke = (1, "") if edge is None else (0, f' stroke="{edge}" stroke-width="1"')
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width - gap:g}" height="{height - gap:g}" '
            f'fill="{fill}"{stroke}/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 4, text, "middle")

    def text(self, x, y, text, anchor="start", weight="normal", fill=INK):
        more = "" if anchor == "middle" else f' text-anchor="{anchor}"'
        more += "" if weight == "normal" else f' font-weight="{weight}"'
        more += "" if fill == INK else f' fill="{fill}"'
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{more}>{text}</text>')

    def line(self, x1, y1, x2, y2):
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}C{(x1 + x2) / 2:g} {y1:g} {(x1 + x2) / 2:g} {y2:g} {x2:g} '
            f'{y2:g}" fill="none" stroke="{GREY}" stroke-width="1"/>'
        )

    def __str__(self):
        return "\n".join([*self.parts, "</svg>\n"])


# --- layouts --------------------------------------------------------------------------------------

BLOCK_SIZE, HEADS, HEAD_SIZE = 4, 2, 8  # of float32, of which four are x-packed
LATENT, ROPE = 12, 4
INDEX_SIZE = 128
WIDTH, ROW = 480, 26  # of a line of memory


def memory_of(array):
    """The memory of a cache's first block, as it lies there."""
    step = array.itemsize
    return np.lib.stride_tricks.as_strided(array, (array.strides[0] // step,), (step,))


def written(layout):
    """[(What is shown, how many elements a line has, what each element is)] of one block: (token,
    head or part, "k" or "v"), or None for what was not written."""
    slots = np.arange(BLOCK_SIZE)
    if layout == "indexer":
        return [("cache", INDEX_SIZE, _indexer(slots))]
    if layout == "rows":
        cache = cc.PagedKVCache.allocate(
            1, 1, BLOCK_SIZE, 1, LATENT + ROPE, dtype="float32", layout="rows", device="cpu"
        )
        codes = [_codes(slots, part, size) for part, size in ((0, LATENT), (1, ROPE))]
        cache.write(0, *codes, slots)
        return [("cache", LATENT + ROPE, _decoded(memory_of(cache.key_caches[0])))]
    cache = cc.PagedKVCache.allocate(
        1, 1, BLOCK_SIZE, HEADS, HEAD_SIZE, dtype="float32", layout=layout, device="cpu"
    )
    key = np.stack([_codes(slots, head, HEAD_SIZE) for head in range(HEADS)], axis=1)
    cache.write(0, key, -key, slots)
    arrays = {"key cache": cache.key_caches[0], "value cache": cache.value_caches[0]}
    if layout == "packed":
        arrays = {"page": cache.key_caches[0]}
    return [(name, 16, _decoded(memory_of(array))) for name, array in arrays.items()]


def _codes(slots, part, size):
    """Elements that tell their token and part: they are negated for values."""
    codes = 1 + 2 * slots + part
    return np.repeat(codes[:, None], size, axis=1).astype(np.float32)


def _decoded(memory):
    found = []
    for code in memory.astype(int).tolist():
        token, part = divmod(abs(code) - 1, 2)
        found.append((token, part, "k" if code > 0 else "v") if code else None)
    return found


def _indexer(slots):
    """Bytes are a token's if they no longer are what they were; those of a key are e4m3's largest
    number, 448, where all its elements are equal, and the others are the scale."""
    found = [None] * (BLOCK_SIZE * (INDEX_SIZE + 4))
    key = np.ones((1, INDEX_SIZE), np.float32)
    for slot in slots.tolist():
        caches = [np.full((1, BLOCK_SIZE, INDEX_SIZE + 4), fill, np.uint8) for fill in (0, 255)]
        for cache in caches:
            cc.indexer_k_quant_and_cache(key, cache, np.array([slot]), INDEX_SIZE, "fp8")
        zeros, ones = (cache.reshape(-1) for cache in caches)
        for at in np.flatnonzero(zeros == ones).tolist():
            found[at] = slot, int(zeros[at] != 0x7E), "k"
    return found


TITLES = {
    "NHD": "NHD: token by token, in it head by head",
    "HND": "HND: head by head, in it token by token",
    "packed": "packed: each head's key, then its value",
    "x-packed": "x-packed: keys in pieces of 16 bytes; of values, one element of all tokens",
    "rows": "rows: one entry a token, latent and rotated part",
    "indexer": "indexer: the keys of a block, then their scales",
}
PARTS = {"rows": ("latent", "rotated"), "indexer": ("key", "scale")}


def layout_picture(layout):
    """One block of the layout."""
    arrays = written(layout)
    lines = [-(-len(elements) // width) for _, width, elements in arrays]
    svg = Svg(WIDTH + 110, 34 + sum(lines) * ROW + 10 * len(lines), TITLES[layout])
    svg.text(12, 22, TITLES[layout], weight="bold")
    y = 34
    for (name, width, elements), count in zip(arrays, lines):
        svg.text(12, y + 17, name)
        for line in range(count):
            part = elements[line * width : (line + 1) * width]
            for start, length, what in _runs(part):
                unit = WIDTH / width
                _element(svg, 100 + start * unit, y, length * unit, layout, what)
            y += ROW
        y += 10
    return str(svg)


def _runs(elements):
    """(Start, length, what) of neighbours that are the same."""
    start = 0
    for end in range(1, len(elements) + 1):
        if end == len(elements) or elements[end] != elements[start]:
            yield start, end - start, elements[start]
            start = end


def _element(svg, x, y, width, layout, what):
    token, part, side = what
    name = PARTS[layout][part] if layout in PARTS else f"h{part}"
    texts = [f"t{token} {name}", f"t{token}", ""]
    if layout not in PARTS:
        texts.insert(0, f"t{token} {name} {side}")
    text = next(t for t in texts if 7 * len(t) <= width)
    svg.box(x, y, width, ROW - 2, COLOURS[token][part], text)


# --- what a paged cache is ------------------------------------------------------------------------


def paged_picture():
    """Three sequences, two of which begin alike, in the blocks that `BlockTables` gives them."""
    tables = cc.BlockTables(
        10, BLOCK_SIZE, max_sequences=3, max_tokens=64, max_length=16, device="cpu"
    )
    first = list(range(10))
    for name, tokens in (("A", first[:9]), ("B", [*range(40, 46)])):
        tables.add(name, tokens)
        tables.step([name], [len(tokens)])
    tables.step(["A"], [1])
    known = tables.add("C", [*first[:8], 70, 71, 72])
    tables.step(["C"], [11 - known])
    svg = Svg(640, 262, "Sequences, their block tables, and the blocks of the cache")
    for x, text in ((12, "sequences"), (236, "block tables"), (470, "the cache")):
        svg.text(x, 24, text, weight="bold")
    users, tokens_in = {}, {}
    size = 16
    for row, name in enumerate("ABC"):
        y = 52 + 70 * row
        svg.text(12, y + 15, name, weight="bold")
        for token in range(tables.length(name)):
            gap = 4 * (token // BLOCK_SIZE)
            block = tables.blocks(name)[token // BLOCK_SIZE]
            svg.box(30 + size * token + gap, y, size, 22, _colour(users, block, row))
            tokens_in[block] = max(tokens_in.get(block, 0), token % BLOCK_SIZE + 1)
        for at, block in enumerate(tables.blocks(name)):
            svg.box(236 + 34 * at, y, 30, 22, "#eeeeee", str(block), GREY)
    for block in range(10):
        y = 34 + 22 * block
        svg.text(462, y + 15, str(block), "end")
        for slot in range(BLOCK_SIZE):
            filled = slot < tokens_in.get(block, 0)
            fill = users[block] if filled else "#ffffff"
            svg.box(470 + 38 * slot, y, 38, 20, fill, "", GREY)
    for row, name in enumerate("ABC"):
        for at, block in enumerate(tables.blocks(name)):
            start = 236 + 34 * at + 15
            svg.line(start, 52 + 70 * row + 22, 448, 34 + 22 * block + 11)
    return str(svg)


def _colour(users, block, row):
    """Of a block's tokens: that of the sequence that came first."""
    return users.setdefault(block, COLOURS[row][0])


# --- times ----------------------------------------------------------------------------------------

# What the README shows: its words, the operation and the case in the results file, the field of
# what it is held against, and the peer.
CASES = (
    ("write 1 token", "reshape_and_cache_flash",
     "1 tokens, 8x128 bfloat16 NHD, random slots", "copy_us", "torch"),
    ("write 256 tokens", "reshape_and_cache_flash",
     "256 tokens, 8x128 bfloat16 NHD, random slots", "copy_us", "torch"),
    ("write 16,384 tokens", "reshape_and_cache_flash",
     "16384 tokens, 8x128 bfloat16 NHD, random slots", "copy_us", "torch"),
    ("write 16,384 tokens to fp8", "reshape_and_cache_flash, quantised",
     "16384 tokens, 8x128 bfloat16 to fp8 NHD, one scale", "copy_us", "torch"),
    ("write 131,072 latent entries", "concat_and_cache_mla",
     "131072 tokens of 512+64 bfloat16, random slots", "copy_us", "torch"),
    ("gather 131,072 latent entries", "gather_cache",
     "131072 rows of 576 bfloat16 rows, 512 sequences", "copy_us", "torch"),
    ("slots of 256 sequences", "slot_mapping", "256 requests of 1 tokens", None, "torch"),
    ("copy 64 blocks in 32 layers", "copy_blocks",
     "32 layers, 64 pairs of 2x32 KiB, random blocks, mapping on the host", "copy_us", "torch"),
    ("swap 256 blocks to the host", "swap_blocks",
     "device to host, 256 blocks of 32 KiB, scattered", "copy_us", "torch"),
    ("attend, 64 sequences of 4,096", "paged_attention",
     "64 x 4096, 32/8 x 128, bfloat16", "read_us", "dense"),
)  # fmt: skip


# What the page shows: of each table the columns, as (heading, field or peer), and the rows, as
# (words, operation, case).
OPERATIONS = (
    (("ours", "device_us"), ("copy of the same bytes", "copy_us"), ("bare", "bare"),
     ("torch indexing", "torch"), ("our Triton kernel", "triton")),
    (
        ("NHD write, 1 token", *CASES[0][1:3]),
        ("NHD write, 256 tokens, random slots", *CASES[1][1:3]),
        ("NHD write, 16,384 tokens, random slots", *CASES[2][1:3]),
        ("NHD write, 16,384 tokens, consecutive slots", "reshape_and_cache_flash",
         "16384 tokens, 8x128 bfloat16 NHD, consecutive slots"),
        ("NHD write to fp8, 16,384 tokens, one scale", *CASES[3][1:3]),
        ("x-packed write, 16,384 tokens, consecutive slots", "reshape_and_cache",
         "16384 tokens, 8x128 bfloat16, consecutive slots"),
        ("x-packed write, 16,384 tokens, random slots", "reshape_and_cache",
         "16384 tokens, 8x128 bfloat16, random slots"),
        ("MLA write, 131,072 tokens of 512 + 64, random slots", *CASES[4][1:3]),
        ("MLA write, 131,072 tokens, consecutive slots", "concat_and_cache_mla",
         "131072 tokens of 512+64 bfloat16, consecutive slots"),
        ("gather, 64 rows of 576 of one sequence", "gather_cache",
         "64 rows of 576 bfloat16 rows, 1 sequences"),
        ("gather, 131,072 rows of 576 in 512 sequences", *CASES[5][1:3]),
        ("slot mapping, 256 requests of one token", *CASES[6][1:3]),
        ("`copy_blocks`, 32 layers, 8 pairs of 2 × 32 KiB", "copy_blocks",
         "32 layers, 8 pairs of 2x32 KiB, random blocks, mapping on the host"),
        ("`copy_blocks`, 32 layers, 64 pairs of 2 × 32 KiB", *CASES[7][1:3]),
        ("`copy_blocks`, 32 layers, 256 pairs of 2 × 32 KiB", "copy_blocks",
         "32 layers, 256 pairs of 2x32 KiB, random blocks, mapping on the host"),
        ("`swap_blocks`, 256 scattered blocks of 32 KiB to pinned memory (copy: the bus)",
         *CASES[8][1:3]),
    ),
)  # fmt: skip
ATTENTION = (
    (("ours", "device_us"), ("bare read", "read_us"), ("torch, dense", "dense")),
    tuple((words, "paged_attention", case) for words, case in (
        ("1 sequence of 512 tokens", "1 x 512, 32/8 x 128, bfloat16"),
        ("1 of 4,096", "1 x 4096, 32/8 x 128, bfloat16"),
        ("64 of 1,024", "64 x 1024, 32/8 x 128, bfloat16"),
        ("64 of 4,096", "64 x 4096, 32/8 x 128, bfloat16"),
        ("64 of 4,096, 128 query heads", "64 x 4096, 128/8 x 128, bfloat16"),
        ("64 of 128 to 8,192", "64 x 128 to 8192, 32/8 x 128, bfloat16"),
        ("64 of 4,096, fp8 cache", "64 x 4096, 32/8 x 128, fp8"),
        ("64 of 4,096, 4 queries each", "64 x 4096, 32/8 x 128, bfloat16, 4 queries"),
    )),
)  # fmt: skip
# Of the page's table of optimisations: what is switched off, as the results file calls it.
ABLATION = (
    ("`PagedKVCache.copy_blocks`", "cupy_cache, bound"),
    ("the baseline's code, everything on", "control"),
    ("pointers and pairs by synchronising uploads", "1 off: synchronising uploads"),
    ("keys and values in two scalar loops", "2 off: two scalar loops"),
    ("`min(n, 512)` threads instead of whole warps from the work", "3 off: min(n, 512) threads"),
    ("all three off", "all off"),
)


def records():
    """{(Operation, case): what was measured}."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {(record["op"], record["case"]): record for record in found}


def times():
    """[(Words, ours, the floor or None, torch)] in microseconds."""
    found, rows = records(), []
    for words, op, case, floor, peer in CASES:
        record = found[op, case]
        torch = record["peers"][peer]["device_us"]
        rows.append((words, record["device_us"], floor and record[floor], torch))
    return rows


def shown(us):
    """Three digits."""
    return (
        "–" if us is None else f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:.0f}"
    )


def speed_table():
    """The README's table."""
    lines = ["| µs | ours | floor | torch |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {words} | {' | '.join(map(shown, numbers))} |" for words, *numbers in times()]
    return "\n".join(lines)


def page_table(columns, rows):
    """A table of the page."""
    found = records()
    headings, keys = zip(*columns)
    lines = [f"| | {' | '.join(headings)} |", f"| --- |{' ---: |' * len(columns)}"]
    for words, op, case in rows:
        record = found[op, case]
        peers = {name: peer["device_us"] for name, peer in record["peers"].items()}
        times = [record[key] if key.endswith("_us") else peers.get(key) for key in keys]
        lines.append(f"| {words} | {' | '.join(map(shown, times))} |")
    return "\n".join(lines)


def ablation_table():
    """Times on the device, and until done."""
    found = records()
    sides = [
        found["ablation", f"copy_blocks, 32 layers, {pairs} pairs of 2x32 KiB"]["peers"]
        for pairs in (8, 64)
    ]
    lines = ["| | 8 pairs | 64 pairs |", "| --- | ---: | ---: |"]
    for words, peer in ABLATION:
        times = [(side[peer]["device_us"], side[peer]["wall_us"]) for side in sides]
        cells = [f"{shown(device)} / {wall:.0f}" for device, wall in times]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def engine_table():
    """Steps of the example's engine."""
    found = json.loads(OF_ENGINE.read_text(encoding="utf-8"))
    lines = [
        "| sequences × tokens | step, ms | floor | host between two replays | tokens a second |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for record in found["decoding"]:
        times = [record[key] for key in ("step_ms", "least_ms", "host_between_replays_ms")]
        cells = [*map(shown, times), f"{record['tokens_per_second']:,.0f}"]
        lines.append(f"| {_size(record)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(record):
    return f"{record['sequences']} × {record['context']:,}"


def transformers_table():
    """Both ways of transformers with ours and without."""
    found = json.loads(OF_TRANSFORMERS.read_text(encoding="utf-8"))
    ways = "ours", "stock", "stock, graphs", "stock, no cuDNN"
    lines = [f"| | {' | '.join(ways)} |", f"| --- |{' ---: |' * len(ways)}"]
    for what, key, words in (
        ("batching", "tokens_per_second", "continuous batching, {}: tokens a second"),
        ("batching", "step_ms", "the same, {}: ms of a step that decodes"),
        ("generate", "step_ms", "`generate`, {}: ms of a step"),
    ):
        for record in found[what]:
            cells = [_cell(record.get(way, {}), key) for way in ways]
            lines.append(f"| {words.format(_size(record))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(measured, key):
    if "out of memory" in measured.get("error", ""):
        return "out of memory"
    number = measured.get(key)
    return f"{number:,.0f}" if number and number >= 1000 else shown(number)


FULL = 390  # pixels of the whole


def speed_picture():
    """How close each comes to its floor."""
    rows = [row for row in times() if row[2] is not None]
    title = "Speed against a copy of the same bytes"
    svg = Svg(640, 60 + 36 * len(rows), title)
    svg.text(12, 22, "Share of the speed of a copy of the same bytes (attention: of a bare read)")
    for place, (words, ours, floor, torch) in enumerate(rows):
        y = 36 + 36 * place
        svg.text(212, y + 18, words, "end")
        for offset, us, colour, name in ((0, ours, OURS, "ours"), (14, torch, OTHER, "torch")):
            share = floor / us
            text = f"{share:.0%} {name}"
            svg.box(222, y + offset, FULL * share, 14, colour)
            if share > 0.5:
                fill = "#ffffff" if colour == OURS else INK
                svg.text(216 + FULL * share, y + offset + 11, text, "end", fill=fill)
            else:
                svg.text(228 + FULL * share, y + offset + 11, text)
    svg.parts.append(
        f'<path d="M{222 + FULL} 32V{40 + 36 * len(rows)}" stroke="{GREY}" stroke-width="1"/>'
    )
    return str(svg)


# --- the files ------------------------------------------------------------------------------------

TABLE = "<!-- times: written by docs/make_pictures.py -->"


def files():
    """{Path: text} of all that is written here."""
    made = {IMAGES / f"layout-{layout}.svg": layout_picture(layout) for layout in TITLES}
    made[IMAGES / "paged.svg"] = paged_picture()
    made[IMAGES / "speed.svg"] = speed_picture()
    made[README] = filled(README, speed_table())
    tables = [page_table(*OPERATIONS), page_table(*ATTENTION), engine_table()]
    tables += [transformers_table(), ablation_table()]
    made[PERFORMANCE] = filled(PERFORMANCE, *tables)
    return made


def filled(page, *tables):
    """The text of a page, with a table below each of its marks."""
    text, *parts = page.read_text(encoding="utf-8").split(TABLE)
    for table, part in zip(tables, parts, strict=True):
        after = part.partition("\n\n| ")[2].partition("\n\n")[2]
        text += f"{TABLE}\n\n{table}\n\n{after}"
    return text


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(text)} characters")
