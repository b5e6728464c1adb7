# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Launches that overlap: chains of operations give what they give without, and where nothing can
overlap nobody notices. That kernels wait before they touch memory, tests/test_compile_all.py reads
in their machine code."""

import ctypes
import functools
import os
import re
import struct
import subprocess
import sys
import types

import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.runtime import driver, env, modules, overlap

# --- the setting ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def as_before():
    before = overlap.on
    yield
    assert overlap.on == before


def test_the_setting():
    with cc.overlap(False):
        with cc.overlap():
            assert overlap.on
            kept = cc.overlap(False)
            assert not overlap.on
            with kept:
                assert not overlap.on
            assert overlap.on  # as it was when `kept` was made
        assert not overlap.on


@pytest.mark.parametrize("given", [1, None, "yes", np.array([True, False])])
def test_what_is_no_setting(given):
    before = overlap.on
    with pytest.raises(cc.ArgumentError, match="overlap: Invalid type of on: expected True or"):
        cc.overlap(given)
    assert overlap.on == before


def test_a_setting_of_numpys():
    before = overlap.on
    with cc.overlap(np.True_):
        assert overlap.on is True
    assert overlap.on == before


def test_what_was_prepared_is_forgotten():
    """Launches are prepared for the setting; only a change has them prepared anew."""

    class Prepared:
        count = 0

        def forget(self):
            self.count += 1

    with cc.overlap(False):
        prepared = Prepared()
        overlap.prepared.add(prepared)
        with cc.overlap(False):
            assert prepared.count == 0
        with cc.overlap():
            assert prepared.count == 1
        assert prepared.count == 2


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), (None, False)])
def test_the_variable(value, expected):
    code = "import cupy_cache; from cupy_cache.runtime import overlap; print(overlap.on)"
    environment = {k: v for k, v in os.environ.items() if k != env.OVERLAP.name}
    if value is not None:
        environment[env.OVERLAP.name] = value
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)


# --- kernels --------------------------------------------------------------------------------------


@pytest.mark.whole
@pytest.mark.parametrize("path", sorted(modules.kernel_dir().glob("*.cu")), ids=lambda p: p.stem)
def test_every_kernel_waits_first(path):
    """And lets the next launch begin, somewhere."""
    text = path.read_text(encoding="utf-8")
    kernels = re.findall(r"\b__global__\b[^;{]*\{\s*([^;]*;)", text)
    assert kernels and set(kernels) == {"await_earlier_launches();"}
    assert text.count("__global__") == len(kernels) <= text.count("  release_next_launch();")


# --- where nothing can overlap --------------------------------------------------------------------


class Library:
    """A driver's library, and what it was called with."""

    def __init__(self, version=13000, status=0, has_entry=True):
        self.version, self.status, self.launches = version, status, []
        if has_entry:
            kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
            self.cuLaunchKernelEx = kind(self._launch)

    def cuDriverGetVersion(self, number):
        number._obj.value = self.version
        return 0

    def _launch(self, config, handle, parameters, extra):
        """Takes the bytes that the header cuda.h says: 56 of the configuration, with 72 of each of
        its attributes."""
        numbers = struct.unpack("<7I4xQQI4x", ctypes.string_at(config, 56))
        *shape, stream, attributes, count = numbers
        assert count == 1
        kind, value = struct.unpack("<i4xi60x", ctypes.string_at(attributes, 72))
        self.launches.append((tuple(shape), stream, (kind, value), handle, parameters, extra))
        return self.status


class Error(Exception):
    def __init__(self, status):
        super().__init__(status)
        self.status = status


KERNEL = types.SimpleNamespace(op="op", shared_bytes=512)
LOADED = types.SimpleNamespace(kernel=KERNEL, device=0, handle=0x1234567890)
RECORD = types.SimpleNamespace(address=0x7F0000001230)
STREAM = 0x55AA00000010


class Machine:
    """A `driver.CudaDriver` with a library of the driver, and CuPy's launches."""

    def __init__(self, monkeypatch, library, capability="90"):
        monkeypatch.setattr(overlap.cuda, "load_library", lambda: library)
        numbers = dict(zip(driver._CAPABILITY, divmod(int(capability), 10)))
        runtime = types.SimpleNamespace(deviceGetAttribute=lambda number, gpu: numbers[number])
        fake = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
        monkeypatch.setattr(overlap.cuda, "import_cupy", lambda why: fake)
        self.ordinary = []
        self.driver = driver.CudaDriver()
        self.driver._launch = lambda *given: self.ordinary.append(given)
        self.driver._several, self.driver._driver_error = False, Error

    def launch(self):
        self.driver.launch(LOADED, (3, 2, 1), 96, STREAM, RECORD)

    def launch_prepared(self):
        enqueue, errors = self.driver.prepare(LOADED, (3, 2, 1), 96)
        try:
            enqueue(STREAM, RECORD.address, 0)
        except errors:
            self.launch()


@pytest.fixture(autouse=True)
def no_memory():
    """What is remembered of a library of the driver."""
    overlap._entry.cache_clear()
    overlap.prepare.cache_clear()
    yield
    overlap._entry.cache_clear()
    overlap.prepare.cache_clear()


ORDINARY = (0x1234567890, 3, 2, 1, 96, 1, 1, 512, STREAM, 0x7F0000001230, 0)
both_ways = pytest.mark.parametrize("way", ["launch", "launch_prepared"])


@both_ways
@pytest.mark.whole
def test_what_the_driver_gets(monkeypatch, way):
    library = Library()
    machine = Machine(monkeypatch, library)
    with cc.overlap():
        getattr(machine, way)()
        getattr(machine, way)()
    allowed = 6, 1  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    expected = ((3, 2, 1, 96, 1, 1, 512), STREAM, allowed, LOADED.handle, RECORD.address, None)
    assert library.launches == [expected] * 2 and not machine.ordinary
    with cc.overlap(False):
        getattr(machine, way)()
    assert machine.ordinary == [ORDINARY] and len(library.launches) == 2


@both_ways
@pytest.mark.whole
@pytest.mark.parametrize(
    "library, capability",
    [
        ({"has_entry": False}, "90"),
        ({"version": 12020}, "90"),
        ({"version": 11080}, "90"),
        ({}, "89"),
        ({}, "75"),
    ],
)
def test_where_nothing_can_overlap(monkeypatch, library, capability, way):
    """An old driver, an old GPU: ordinary launches, without a word."""
    library = Library(**library)
    machine = Machine(monkeypatch, library, capability)
    with cc.overlap():
        getattr(machine, way)()
    assert machine.ordinary == [ORDINARY] and not library.launches


@pytest.mark.parametrize("version, capability", [(12030, "90"), (13000, "100"), (13010, "120")])
def test_where_launches_can_overlap(monkeypatch, version, capability):
    library = Library(version)
    machine = Machine(monkeypatch, library, capability)
    with cc.overlap():
        machine.launch()
    assert len(library.launches) == 1 and not machine.ordinary


@both_ways
@pytest.mark.whole
@pytest.mark.parametrize("status, asked", [(801, 1), (1, 1), (201, 2)])
def test_launches_that_the_driver_refuses(monkeypatch, status, asked, way):
    """They are made in the ordinary way, and from then on only these; but for a thread that had no
    context, which says nothing of others."""
    library, forgotten = Library(status=status), []
    machine = Machine(monkeypatch, library)
    monkeypatch.setattr(overlap, "forget_prepared", lambda: forgotten.append(1))
    with cc.overlap():
        machine.launch()
        assert bool(forgotten[1:]) == (asked == 1)  # the first is the setting's
        del library.launches[:]
        machine.driver._overlaps.clear()
        getattr(machine, way)()
        before = len(library.launches)
        getattr(machine, way)()
    assert len(machine.ordinary) == 3 and before >= 1
    assert (len(library.launches) > before) == (asked == 2)


def test_errors_are_those_of_the_ordinary_launch(monkeypatch):
    machine = Machine(monkeypatch, Library(status=700))

    def fail(*given):
        raise Error(700)

    machine.driver._launch = fail
    with (
        cc.overlap(),
        pytest.raises(cc.KernelError, match="op on cuda:0: .* could not be launched"),
    ):
        machine.launch_prepared()


def test_many_streams(monkeypatch):
    library = Library()
    machine = Machine(monkeypatch, library)
    streams = [16 * number for number in range(3 * overlap.MAX_STREAMS)]
    with cc.overlap():
        enqueue, _ = machine.driver.prepare(LOADED, (3, 2, 1), 96)
        for stream in (*streams, *streams):
            enqueue(stream, RECORD.address, 0)
    assert [launch[1] for launch in library.launches] == [*streams, *streams]


# --- on a GPU -------------------------------------------------------------------------------------

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS, ROWS = 8, 2, 64, 16, 512, 24
LATENT, ROPE = 512, 64
MOST = BLOCK * 8  # tokens of a sequence


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    capability = torch.cuda.get_device_capability()
    if capability < (9, 0) or not overlap.available(10 * capability[0] + capability[1]):
        pytest.skip("no launch can overlap here")
    return torch


class Chain:
    """Operations on few arrays, each on what those before have written, and nothing between them.

    Parameters
    ----------
    torch : module
    rng : numpy.random.Generator
    sequences : int
        Each has one token to write and one query.
    names : sequence of str
        The operations, methods of this.
    """

    def __init__(self, torch, rng, sequences, names):
        n, self.names = sequences, names

        generator = torch.Generator("cuda").manual_seed(int(rng.integers(1 << 31)))

        def random(*shape):
            made = torch.randn(shape, generator=generator, device="cuda")
            return made.to(torch.bfloat16)

        def integers(values, dtype):
            return torch.from_numpy(np.asarray(values)).to("cuda", dtype)

        lengths = rng.integers(1, MOST + 1, n)
        per_row = MOST // BLOCK
        blocks = [rng.permutation(BLOCKS)[:per_row] for _ in range(n)]
        if n * per_row <= BLOCKS:  # of their own
            blocks = rng.permutation(BLOCKS)[: n * per_row].reshape(n, per_row)
        else:  # shared, but for the block that each writes to
            blocks = np.array(blocks)
            blocks[np.arange(n), (lengths - 1) // BLOCK] = rng.permutation(BLOCKS)[:n]
        self.table = integers(blocks, torch.int32)
        self.lengths, self.positions = (
            integers(lengths, torch.int32), integers(lengths - 1, torch.int64)
        )  # fmt: skip
        self.starts = integers(np.arange(n + 1), torch.int32)
        self.angles = torch.cat(
            [t(random(MOST, SIZE // 2).float()) for t in (torch.cos, torch.sin)], 1
        )
        self.rows = integers(np.arange(n + 1), torch.int32)
        self.pairs = rng.permutation(BLOCKS)[:8].reshape(4, 2).tolist()
        self.others = random(n, HEADS, SIZE), random(HEADS, n).float()
        # What is written; all begins anew with each run.
        caches = random(BLOCKS, BLOCK, KV_HEADS, SIZE), random(BLOCKS, BLOCK, KV_HEADS, SIZE)
        self.first = {
            "key_cache": caches[0], "value_cache": caches[1],
            "latents": random(BLOCKS, BLOCK, LATENT + ROPE),
            "states": random(n, HEADS, SIZE), "merged": random(n, HEADS, SIZE),
            "latent_queries": random(n, HEADS, LATENT + ROPE),
            "latent_out": random(n, HEADS, LATENT),
            "lse": torch.zeros(n, HEADS, device="cuda"),
            "slots": torch.full((n,), -1, device="cuda"),
            "gathered": random(n, KV_HEADS, SIZE),
        }  # fmt: skip
        self.now = {name: tensor.clone() for name, tensor in self.first.items()}

    def begin_anew(self):
        for name, tensor in self.now.items():
            tensor.copy_(self.first[name])

    def run(self):
        for name in self.names:
            getattr(self, name)(types.SimpleNamespace(**self.now))

    def content(self):
        return [tensor.clone() for tensor in self.now.values()]

    def mapping(self, now):
        cc.slot_mapping(self.table, self.positions, self.starts, BLOCK, out=now.slots)

    def write(self, now):
        key, value = now.states[:, :KV_HEADS], now.gathered
        cc.reshape_and_cache_flash(key, value, now.key_cache, now.value_cache, now.slots)

    def attention(self, now):
        cc.paged_attention(
            now.merged, now.key_cache, now.value_cache, self.table, self.lengths, out=now.states,
            lse=now.lse,
        )  # fmt: skip

    def merging(self, now):
        cc.merge_attn_states(now.merged, now.states, now.lse.t(), *self.others)

    def gather(self, now):
        cc.gather_cache(now.key_cache, now.gathered, self.table, self.rows)

    def turn(self, now):
        cc.rotary_embedding(self.positions, now.states, now.gathered, SIZE, self.angles)

    def turn_and_write(self, now):
        cc.rotary_and_cache(
            self.positions, now.states, now.gathered, now.states[:, KV_HEADS : 2 * KV_HEADS],
            self.angles, now.key_cache, now.value_cache, now.slots, out=now.merged,
        )  # fmt: skip

    def copy(self, now):
        cc.copy_blocks([now.key_cache], [now.value_cache], self.pairs)

    def write_latents(self, now):
        cc.concat_and_cache_mla(now.latent_out[:, 0], now.states[:, 0], now.latents, now.slots)

    def attend_latents(self, now):
        cc.paged_attention_mla(
            now.latent_queries, now.latents, self.table, self.lengths, scale=0.1,
            out=now.latent_out,
        )  # fmt: skip


ORDINARY_STEPS = (
    "mapping", "write", "attention", "merging", "gather", "turn", "turn_and_write", "copy",
)  # fmt: skip
LATENT_STEPS = "mapping", "write_latents", "attend_latents", "turn"


def capture(torch, call):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def chains(torch, rng, count):
    """So many chains by chance."""
    for number in range(count):
        steps = LATENT_STEPS if number % 4 == 3 else ORDINARY_STEPS
        names = ["mapping", *rng.choice(steps, rng.integers(2, 14))]
        yield Chain(torch, rng, int(rng.choice([1, 2, 7, 64, 400])), names)


def differing(torch, found, expected):
    return [not torch.equal(a, b) for a, b in zip(found, expected)]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_chains(torch, rng, part):
    """A thousand in all: enqueued one by one, and captured."""
    del part  # another seed
    for chain in chains(torch, rng, 250):
        with cc.overlap(False):
            chain.begin_anew()
            chain.run()
            expected = chain.content()
        with cc.overlap():
            for _ in range(2):
                chain.begin_anew()
                chain.run()
                assert not any(differing(torch, chain.content(), expected)), chain.names
            graph = capture(torch, chain.run)
        for _ in range(3):
            chain.begin_anew()
            graph.replay()
            assert not any(differing(torch, chain.content(), expected)), chain.names
    cc.raise_faults()


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("steps", [ORDINARY_STEPS, LATENT_STEPS], ids=["ordinary", "latent"])
def test_ten_thousand_replays(torch, rng, steps):
    """With other numbers each time, beside a graph without overlap."""
    seed = rng.integers(1 << 31)
    both = [Chain(torch, np.random.default_rng(seed), 64, steps * 3) for _ in range(2)]
    graphs = []
    for chain, on in zip(both, (False, True)):
        with cc.overlap(on):
            chain.run()
            graphs.append(capture(torch, functools.partial(again, chain)))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        shift = torch.randn((), device="cuda")
        for chain, graph in zip(both, graphs):
            chain.first["states"].add_(shift).clamp_(-4, 4)
            graph.replay()
        for one, other in zip(both[0].now.values(), both[1].now.values()):
            wrong += (one != other).any()
    assert not int(wrong)
    cc.raise_faults()


def again(chain):
    chain.begin_anew()
    chain.run()


@pytest.mark.gpu
def test_edges_of_a_graph(torch):
    """What was captured with the setting may overlap in replays: so say the graph's edges."""
    import cupy

    chain = Chain(torch, np.random.default_rng(1), 4, ["mapping", "write", "mapping", "write"])
    kinds = {}
    for on in (False, True):
        with cc.overlap(on):
            chain.run()
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                shown = cupy.cuda.Stream.from_external(stream)
                shown.begin_capture()
                chain.run()
                graph = shown.end_capture()
        kinds[on] = edge_kinds(graph.graph)
    assert kinds == {False: [0, 0, 0], True: [1, 1, 1]}  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


def edge_kinds(graph):
    """The type of each edge of a graph, of which the driver knows the address."""
    library = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_size_t(16)
    begins, ends = (ctypes.c_void_p * 16)(), (ctypes.c_void_p * 16)()
    data = (ctypes.c_ubyte * (16 * 8))()  # from port, to port, type, and five bytes more
    found = library.cuGraphGetEdges_v2(
        ctypes.c_void_p(graph), begins, ends, data, ctypes.byref(count)
    )
    assert found == 0
    return [data[8 * edge + 2] for edge in range(count.value)]
