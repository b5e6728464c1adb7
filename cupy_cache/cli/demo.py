# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The library's main job on real input: a language model whose keys and values live in pages.

``python -m cupy_cache demo`` runs it. It is also the tutorial, to be read from top to bottom:

1. arrays: the module ``xp`` is NumPy on the CPU, CuPy on a GPU;
2. `PagedCache`: **here the library is used**, every operation that serving a model takes;
3. `DenseCache`: the same keys and values in plain arrays, and attention to them, to compare with;
4. `Decoder`: the model, a small transformer with grouped-query heads and ALiBi, random weights;
5. `Run`: feeds tokens to the model on both caches, and compares them at every step;
6. `search` and `demo`, which fork, free and preempt sequences.
"""

import time
from collections import Counter, defaultdict
from typing import NamedTuple

import ml_dtypes
import numpy as np

import cupy_cache as cc

QUERY_HEADS, KV_HEADS, HEAD_SIZE = 8, 2, 32
WIDTH = QUERY_HEADS * HEAD_SIZE
VOCABULARY = 256  # the model reads and writes bytes
CHUNK = 100  # tokens of the prompt at a time; chunks end inside blocks, as they do in engines
# Of logits, whose standard deviation is about 1: queries and what they attend to are rounded to the
# cache's dtype, and where sums differ in the last bit, so may what is rounded.
TOLERANCE = {"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-4}
WEIGHTS = {  # of a layer
    "query, key, value": (WIDTH, (QUERY_HEADS + 2 * KV_HEADS) * HEAD_SIZE),
    "output": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Difference(Exception):
    """The paged cache and the dense one disagree; the text says where and how."""


# --- 1. arrays ------------------------------------------------------------------------------------


def bits(array):
    """The same memory as integers."""
    return array.view(f"i{array.dtype.itemsize}")


def poison(array):
    """Set every bit of ``array``, which makes NaN of any float type, and return it: whoever reads
    what nobody wrote is found out."""
    bits(array)[...] = -1
    return array


def to_host(array):
    """``array`` as NumPy's; waits for the GPU."""
    return array if isinstance(array, np.ndarray) else array.get()


def matmul(a, b):
    """``a @ b``, without a BLAS: for CuPy that is cuBLAS, which this library does not bring along,
    and NumPy's threads cost more than they save on matrices as small as these."""
    if isinstance(a, np.ndarray):
        return np.einsum("...ij,...jk->...ik", a, b)
    return (a[..., :, :, None] * b[..., None, :, :]).sum(axis=-2)


def attention(xp, query, keys, values, slopes):
    """The model's attention without pages: of a sequence's last n tokens, ``query`` [n,
    QUERY_HEADS, HEAD_SIZE], to all its T tokens, ``keys`` and ``values`` [T, KV_HEADS, HEAD_SIZE].
    Returns an array like ``query``."""
    n, total, dtype = len(query), len(keys), query.dtype
    query, keys, values = (x.astype(np.float32) for x in (query, keys, values))
    # Neighbouring query heads share a key/value head: [KV_HEADS, queries of these, HEAD_SIZE].
    query = query.transpose(1, 0, 2).reshape(KV_HEADS, -1, HEAD_SIZE)
    scores = matmul(query, keys.transpose(1, 2, 0)) * np.float32(HEAD_SIZE**-0.5)
    scores = scores.reshape(QUERY_HEADS, n, total)
    distance = xp.arange(total) - xp.arange(total - n, total)[:, None]  # of a key from a query
    scores = scores + slopes[:, None, None] * distance.astype(np.float32)
    scores = xp.where(distance > 0, np.float32(-np.inf), scores)
    weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    mixed = matmul(weights.reshape(KV_HEADS, -1, total), values.transpose(1, 0, 2))
    return mixed.reshape(QUERY_HEADS, n, HEAD_SIZE).transpose(1, 0, 2).astype(dtype)


def attend_each(xp, query, starts, sequences, slopes):
    """`attention` of each of the ``sequences``, (keys, values), to which the rows of ``query``
    between ``starts`` belong."""
    parts = zip(starts, starts[1:], sequences)
    return xp.concatenate(
        [attention(xp, query[start:end], *pair, slopes) for start, end, pair in parts]
    )


# --- 2. the paged cache: here the library is used -------------------------------------------------


class PagedCache:
    """Keys and values of many sequences, in blocks of ``block_size`` slots for one token each.

    A layer has two arrays [num_blocks, block_size, KV_HEADS, HEAD_SIZE]. A sequence has a *block
    table*: its blocks in order, the same in all layers; `cupy_cache.BlockTables` keeps them.
    Sequences that begin alike share blocks. Sequence 0 exists, and is empty; all others are forked
    off from one that exists. What is in blocks that nobody uses is poison.
    """

    def __init__(self, xp, layers, block_size, dtype, layout, num_blocks, **limits):
        self.xp, self.dtype = xp, np.dtype(dtype)
        # To be found by their tokens, blocks would have to be known by these: here they are not.
        self.tables = cc.BlockTables(
            num_blocks, block_size, reuse_prefixes=False, framework=xp.__name__, **limits
        )
        self.tables.add(0)

        def caches(empty, blocks):
            if layout == "NHD":
                shape = blocks, block_size, KV_HEADS, HEAD_SIZE
                return [poison(empty(shape, dtype)) for _ in range(layers)]
            # In memory a block holds one head after the other; operations follow a view's strides.
            shape = blocks, KV_HEADS, block_size, HEAD_SIZE
            return [poison(empty(shape, dtype)).transpose(0, 2, 1, 3) for _ in range(layers)]

        self.keys, self.values = (caches(xp.empty, num_blocks) for _ in range(2))
        on_host, host_blocks = np.empty, limits["host_blocks"]
        if xp is not np:
            from cupyx import empty_pinned as on_host  # pinned memory: the GPU can reach it
        self.host_keys, self.host_values = (caches(on_host, host_blocks) for _ in range(2))
        self.calls, self.moved = Counter(), Counter()  # of each operation: calls, bytes
        self.row_bytes = 2 * KV_HEADS * HEAD_SIZE * self.dtype.itemsize  # a layer's key and value
        self.block_bytes = layers * block_size * self.row_bytes

    def fork(self, parent, child):
        """Let ``child`` begin as ``parent``. Nothing is copied: they share all blocks so far."""
        self.tables.fork(parent, child)

    def free(self, sequence):
        blocks = self.tables.blocks(sequence)
        self.tables.free(sequence)
        self._poison(blocks)

    def extend(self, batch, counts):
        """Begin a step in which each sequence of ``batch`` gets ``counts`` new tokens."""
        step = self.step = self.tables.step(batch, counts)
        if step.copies:  # who writes into a block that others read too gets one of its own
            cc.copy_blocks(self.keys, self.values, step.copies)
            self._count("copy_blocks", len(step.copies) * self.block_bytes)
        # The step has its slots; this is how they are computed where tables are one's own.
        self.slots = cc.slot_mapping(
            step.block_table, step.positions, step.query_start_loc, self.tables.block_size
        )
        self._count("slot_mapping", self.slots.nbytes)
        self.starts = np.cumsum([0, *counts])
        self.ends = np.cumsum([0, *map(self.tables.length, batch)], dtype=np.int32)

    def write(self, layer, key, value):
        """Write the step's keys and values [new tokens, KV_HEADS, HEAD_SIZE] of one layer."""
        cc.reshape_and_cache_flash(key, value, self.keys[layer], self.values[layer], self.slots)
        self._count("reshape_and_cache_flash", len(key) * self.row_bytes)

    def attend(self, layer, query, slopes):
        """Attend from the step's queries [new tokens, QUERY_HEADS, HEAD_SIZE] to the pages of their
        sequences. Returns an array like ``query``."""
        if self.xp is not np and query.dtype == np.float32:
            # A GPU's tensor cores take 16 bits: the pages are gathered.
            return attend_each(self.xp, query, self.starts, self.read(layer), slopes)
        out = poison(self.xp.empty(query.shape, query.dtype))
        cc.paged_attention(
            query, self.keys[layer], self.values[layer], self.step.block_table,
            self.step.seq_lens, query_start_loc=self.step.query_start_loc, alibi_slopes=slopes,
            out=out,
        )  # fmt: skip
        self._count("paged_attention", int(self.ends[-1]) * self.row_bytes)
        return out

    def read(self, layer):
        """All (keys, values) [tokens, KV_HEADS, HEAD_SIZE] of each sequence of the step."""
        shape = 2, int(self.ends[-1]), KV_HEADS, HEAD_SIZE
        rows = poison(self.xp.empty(shape, self.dtype))
        bounds = self.xp.asarray(self.ends)
        for cache, out in zip((self.keys[layer], self.values[layer]), rows):
            cc.gather_cache(cache, out, self.step.block_table, bounds)
            self._count("gather_cache", out.nbytes)
        return [tuple(rows[:, start:end]) for start, end in zip(self.ends, self.ends[1:])]

    def swap_out(self, sequence):
        """Preempt ``sequence``: move its blocks to host memory, so that others can have them."""
        blocks = self.tables.blocks(sequence)
        pairs = self.tables.swap_out(sequence)
        self._swap(self.keys + self.values, self.host_keys + self.host_values, pairs)
        self._poison(blocks)

    def swap_in(self, sequence):
        """Bring ``sequence`` back, into whatever blocks are free now."""
        pairs = self.tables.swap_in(sequence)
        self._swap(self.host_keys + self.host_values, self.keys + self.values, pairs)

    def _swap(self, sources, destinations, pairs):
        cc.swap_blocks(sources, destinations, pairs)
        self._count("swap_blocks", len(pairs) * self.block_bytes)

    def _poison(self, blocks):
        """What the last owner left must not pass for the next one's."""
        for block in blocks:
            if not self.tables.pool.users(block):
                for cache in self.keys + self.values:
                    poison(cache[block])

    def _count(self, operation, moved):
        self.calls[operation] += 1
        self.moved[operation] += moved


# --- 3. the dense cache, to compare with ----------------------------------------------------------


class DenseCache:
    """What `PagedCache` must give back: each sequence's keys and values in plain arrays."""

    def __init__(self, xp, layers, dtype):
        self.xp, nothing = xp, xp.empty((0, KV_HEADS, HEAD_SIZE), dtype)
        self.rows = {0: [(nothing, nothing)] * layers}  # sequence -> layers -> (keys, values)

    def fork(self, parent, child):
        self.rows[child] = list(self.rows[parent])

    def free(self, sequence):
        del self.rows[sequence]

    def extend(self, batch, counts):
        self.batch, self.starts = batch, np.cumsum([0, *counts])

    def write(self, layer, key, value):
        for sequence, start, end in zip(self.batch, self.starts, self.starts[1:]):
            self.rows[sequence][layer] = tuple(
                self.xp.concatenate((old, new[start:end]))
                for old, new in zip(self.rows[sequence][layer], (key, value))
            )

    def read(self, layer):
        return [self.rows[sequence][layer] for sequence in self.batch]

    def attend(self, layer, query, slopes):
        return attend_each(self.xp, query, self.starts, self.read(layer), slopes)


# --- 4. the model ---------------------------------------------------------------------------------


class Decoder:
    """A transformer that predicts the next byte; its weights are random, and so is its prose."""

    def __init__(self, xp, layers, seed, dtype):
        self.xp, self.dtype = xp, dtype
        rng = np.random.default_rng(seed)

        def matrix(rows, columns):
            return xp.asarray(rng.standard_normal((rows, columns), np.float32) / rows**0.5)

        self.embedding, self.head = matrix(VOCABULARY, WIDTH), matrix(WIDTH, VOCABULARY)
        self.layers = [
            {name: matrix(*shape) for name, shape in WEIGHTS.items()} for _ in range(layers)
        ]

    def forward(self, cache, slopes, batch, chunks):
        """Feed each sequence of ``batch`` the tokens of its chunk.

        Returns the logits [sequences, VOCABULARY] after each chunk's last token, and what the cache
        was given: (keys, values) of each layer.
        """
        xp = self.xp
        counts = [len(chunk) for chunk in chunks]
        cache.extend(batch, counts)
        ends, written = np.cumsum([0, *counts]), []
        x = self.embedding[xp.asarray(np.concatenate(chunks))]
        for index, layer in enumerate(self.layers):
            projected = matmul(normalize(x), layer["query, key, value"])
            heads = projected.reshape(len(x), -1, HEAD_SIZE)
            query = heads[:, :QUERY_HEADS].astype(self.dtype)
            key, value = xp.split(heads[:, QUERY_HEADS:].astype(self.dtype), 2, axis=1)
            cache.write(index, key, value)
            written.append((key, value))
            attended = cache.attend(index, query, slopes).reshape(len(x), WIDTH)
            x = x + matmul(attended.astype(np.float32), layer["output"])
            x = x + matmul(xp.maximum(matmul(normalize(x), layer["up"]), 0), layer["down"])
        return matmul(normalize(x[xp.asarray(ends[1:] - 1)]), self.head), written


def normalize(x):
    """Each row scaled to a root mean square of 1."""
    return x * ((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-6)) ** np.float32(-0.5)


# --- 5. running and comparing ---------------------------------------------------------------------


class Run:
    """Feeds tokens to the decoder on the paged and on the dense cache, and compares at every step.

    Three things must hold: the pages give back what was written, bit for bit; the logits are those
    of the dense cache, within `TOLERANCE`; and the tokens chosen are those that the dense cache's
    logits choose, or as good within it.
    ``progress(phase, tokens)`` is told of each step.
    """

    def __init__(self, xp, decoder, paged, progress):
        self.decoder, self.paged, self.progress = decoder, paged, progress
        layers = len(decoder.layers)
        self.dense, self.written = (DenseCache(xp, layers, paged.dtype) for _ in range(2))
        self.slopes = cc.alibi_slopes(QUERY_HEADS, framework=xp.__name__)
        published = [2.0 ** (-8 * (head + 1) / QUERY_HEADS) for head in range(QUERY_HEADS)]
        self.published_slopes = xp.asarray(np.array(published, np.float32))
        self.sequences = self.steps = self.compared = 0
        self.worst, self.tolerance = 0.0, TOLERANCE[paged.dtype.name]
        self.rates = defaultdict(list)  # phase -> tokens per second of each step, paged

    def fork(self, parent):
        """A new sequence that begins as ``parent``."""
        self.sequences += 1
        for cache in (self.paged, self.dense, self.written):
            cache.fork(parent, self.sequences)
        return self.sequences

    def free(self, sequence):
        for cache in (self.paged, self.dense, self.written):
            cache.free(sequence)

    def step(self, phase, batch, chunks):
        """Feed tokens; returns the logits with the paged cache and those with the dense one."""
        self.steps += 1
        where = f"step {self.steps} ({phase})"
        start = time.perf_counter()
        logits, written = self.decoder.forward(self.paged, self.slopes, batch, chunks)
        logits = to_host(logits)
        self.rates[phase].append(sum(map(len, chunks)) / (time.perf_counter() - start))
        try:
            cc.raise_faults()
        except cc.FaultError as error:
            raise Difference(f"{where}: {error}") from error

        self.written.extend(batch, [len(chunk) for chunk in chunks])
        for layer, rows in enumerate(written):
            self.written.write(layer, *rows)
            pairs = zip(batch, self.paged.read(layer), self.written.read(layer))
            for sequence, got, expected in pairs:
                at = f"{where}: layer {layer}, sequence {sequence}"
                self._require_same_bits(f"{at}, keys", got[0], expected[0])
                self._require_same_bits(f"{at}, values", got[1], expected[1])
        expected, _ = self.decoder.forward(self.dense, self.published_slopes, batch, chunks)
        expected = to_host(expected)
        self._require_close(where, float(np.abs(logits - expected).max()))
        self.progress(phase, len(chunks[0]))
        return logits, expected

    def _require_close(self, where, worst):
        if not worst <= self.tolerance:  # NaN is refused too
            raise Difference(f"{where}: logits differ by {worst:g}, more than {self.tolerance:g}")
        self.worst = max(self.worst, worst)

    def _require_same_bits(self, where, got, expected):
        different = bits(got) != bits(expected)
        count = int(different.sum())
        if count:
            first = tuple(np.argwhere(to_host(different))[0].tolist())
            raise Difference(
                f"{where}: {count} of {different.size} elements differ, the first at (token, head, "
                f"element) {first}: wrote {to_host(expected)[first]}, read {to_host(got)[first]}"
            )
        self.compared += different.size


# --- 6. decoding ----------------------------------------------------------------------------------


class Beam(NamedTuple):
    score: float  # sum of its tokens' log probabilities
    sequence: int
    tokens: list


def search(run, phase, beams, logits, width, count):
    """Beam search: continue ``beams``, whose last step gave ``logits``, by ``count`` tokens, and
    keep the ``width`` best at each step; with a width of 1 that is greedy decoding.

    Returns the new beams, instead of the old ones, and their logits.
    """
    for _ in range(count):
        scores = np.array([[beam.score] for beam in beams])
        totals = [scores + log_softmax(rows) for rows in logits]
        best, expected = (np.argsort(-t, axis=None)[:width].tolist() for t in totals)
        # Logits that differ a little may exchange choices that are nearly as good.
        lost = totals[1].flat[expected] - totals[1].flat[best]
        if lost.max() > 2 * run.tolerance:
            raise Difference(f"after step {run.steps} ({phase}): chose {best}, not {expected}")
        children = []
        for parent, token in (divmod(index, VOCABULARY) for index in best):
            sequence = run.fork(beams[parent].sequence)
            tokens = [*beams[parent].tokens, token]
            children.append(Beam(float(totals[0][parent, token]), sequence, tokens))
        for beam in beams:
            run.free(beam.sequence)  # a sequence without children gives its own blocks back
        beams = children
        logits = run.step(phase, [b.sequence for b in beams], [b.tokens[-1:] for b in beams])
    return beams, logits


def log_softmax(rows):
    shifted = rows - rows.max(axis=-1, keepdims=True).astype(np.float64)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def demo(xp, prompt, tokens, width, layers, seed, block_size, layout, dtype, progress):
    """Decode ``tokens`` tokens after ``prompt`` (bytes), greedily and with ``width`` beams.

    Returns the `Run`, the greedy `Beam`, the list of beams, and of the greedy sequence's blocks how
    many were swapped and how many came back elsewhere. Raises `Difference` at the first step where
    the paged cache is not as good as a dense one.
    """
    whole, part = -(-len(prompt) // block_size), tokens // block_size + 2
    # Too few for the greedy sequence and the beams together: one of them has to be preempted.
    blocks, dtype = whole + width * part, DTYPES[dtype]
    paged = PagedCache(
        xp, layers, block_size, dtype, layout, blocks, host_blocks=whole + part,
        max_sequences=width, max_tokens=max(width, CHUNK), max_length=len(prompt) + tokens,
    )  # fmt: skip
    run = Run(xp, Decoder(xp, layers, seed, dtype), paged, progress)
    for start in range(0, len(prompt), CHUNK):
        logits = run.step("prompt", [0], [list(prompt[start : start + CHUNK])])

    half = tokens // 2
    (greedy,), later = search(run, "greedy", [Beam(0.0, run.fork(0), [])], logits, 1, half)
    before = paged.tables.blocks(greedy.sequence)
    paged.swap_out(greedy.sequence)
    beams, _ = search(run, "beam search", [Beam(0.0, run.fork(0), [])], logits, width, tokens)
    for sequence in (0, *(beam.sequence for beam in beams)):
        run.free(sequence)
    paged.swap_in(greedy.sequence)
    after = paged.tables.blocks(greedy.sequence)
    elsewhere = sum(old != new for old, new in zip(before, after))
    (greedy,), _ = search(run, "greedy", [greedy], later, 1, tokens - half)
    return run, greedy, beams, len(before), elsewhere
