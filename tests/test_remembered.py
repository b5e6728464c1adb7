# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Random histories of calls that are alike: each call comes to what it comes to where nothing is
remembered. ``--surface-calls=N`` makes more of them."""

import contextlib
import itertools
import types

import numpy as np
import pytest
import recording
from surface import variants
from surface.arrays import as_list, opaque, tensor

from cupy_cache.runtime import arrays, dispatch, launch

FEW, STEPS = 2, 24
CALLS = 1000  # of `--surface-calls` for each history

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("nothing_remembered")]


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.extra)], ids=["few", "many"])
def histories(request, seed):
    """A generator for each history."""
    count = request.config.getoption("--surface-calls") // CALLS if request.param else FEW
    return [np.random.default_rng([seed, number]) for number in range(count)]


def compare(rng, trials, run):
    """Make the calls in any order, often the same again. ``run(trial, again, caches)`` makes one,
    with the objects of the last time if ``again``, and tells what it comes to."""
    expected = []
    for trial in trials:
        dispatch.forget_everything()
        expected.append(run(trial, False, None))
    dispatch.forget_everything()
    caches, made, at = {}, [], 0
    for _ in range(STEPS if trials else 0):
        if rng.random() < 0.5:
            at = int(rng.integers(len(trials)))
        made.append(at)
        found = run(trials[at], rng.random() < 0.5, caches)
        if found != expected[at]:
            shown = "\n".join(f"{n}: {trials[n]!r}" for n in dict.fromkeys(made))
            unlike = [pair for pair in zip(expected[at], found) if pair[0] != pair[1]]
            raise AssertionError(f"calls {made} of\n{shown}\n{str(unlike)[:2000]}")
    return expected


@pytest.mark.parametrize("family", variants.FAMILIES)
@pytest.mark.parametrize("bound", [False, True])
def test_on_the_cpu(histories, family, bound):
    """The same bytes, results, faults and errors."""
    if family not in ("numpy", "dlpack of numpy"):
        pytest.importorskip("torch")
    for rng in histories:
        compare(rng, variants.history(rng, family, bound=bound), variants.Trial.run)


# --- as on a GPU ----------------------------------------------------------------------------------


class Array:
    """What is asked of a CuPy array."""

    def __init__(self, spec):
        self.dtype, self.shape, self.strides = spec.numpy_dtype, spec.shape, spec.strides
        self.itemsize, self.ndim = self.dtype.itemsize, len(spec.shape)
        self.size = int(np.prod(spec.shape))
        ptr = spec.buffer.bytes.ctypes.data + spec.offset if self.size else 0
        self.data = types.SimpleNamespace(ptr=ptr, device_id=0)


FORMS = {
    "torch": (tensor,), "dlpack": (opaque,), "mixed": (tensor, tensor, opaque), "cupy": (Array,),
    "cupy and torch": (Array, Array, Array, tensor),
}  # fmt: skip
# What these return is made on a GPU unless it is given.
MADE = "slot_mapping", "slot_mapping_groups", "alibi_bias", "paged_attention", "paged_attention_mla"
NEVER = "swap_blocks_batch", "alibi_slopes", "packed_size"
# Arguments that may be in host memory.
HOSTED = {
    "swap_blocks": ("src", "dst"), "pack_blocks": ("out",), "unpack_blocks": ("packed",),
    "pack_tokens": ("out",), "unpack_tokens": ("packed",),
}  # fmt: skip


@pytest.fixture
def recorder(monkeypatch):
    """`recording.recorder`, where CuPy's arrays are `Array`, launches tell the fields that their
    kernels read, and there are no faults."""
    made = recording.recorder(monkeypatch)

    def launched(loaded, grid, threads, stream, record):
        made.launches.append((loaded.expression, grid, threads, stream, bytes(record.buffer)))
        record.tail[:] = bytes(len(record.tail))  # of which the next call may fill less

    monkeypatch.setattr(made, "launch", launched)
    monkeypatch.setattr(made, "take_faults", lambda *given: [], raising=False)
    stage = contextlib.nullcontext(1 << 45)
    monkeypatch.setattr(made, "staging", lambda *given: stage, raising=False)
    yield made
    launch.processors.cache_clear()


def as_for_a_gpu(rng, trial):
    """Whether a call can be made so. Its ``pinned`` are pieces of what is in host memory then."""
    made = trial.made
    known = tensor, opaque, as_list, Array
    if made.name in NEVER or not all(form in known for form in made.forms.values()):
        return False
    if made.name in MADE and made.args.get("out") is None:
        return False
    trial.pinned = []
    for buffer, _ in trial.content:
        begin, size = buffer.bytes.ctypes.data, buffer.bytes.size
        edges = [0, *np.sort(rng.integers(0, size + 1, int(rng.integers(0, 3)))).tolist(), size]
        trial.pinned += [
            (begin + first, begin + last)
            for first, last in itertools.pairwise(edges)
            if first < last and rng.random() < 0.8
        ]
    return True


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("bound", [False, True])
def test_for_a_gpu(histories, recorder, monkeypatch, family, bound):
    """The same launches with the same parameters, copies, and orders of streams; the same tensors
    lent."""
    pytest.importorskip("torch")
    if "cupy" in family:
        monkeypatch.setattr(pytest.importorskip("cupy"), "ndarray", Array)
        monkeypatch.setattr(arrays, "_READERS", dict(arrays._REGISTERED))
    monkeypatch.setitem(variants.FAMILIES, family, FORMS[family])

    def run(trial, again, caches):
        recorder.pinned = trial.pinned
        recorder.lent.clear()
        told, *_ = trial.run(again, caches)
        ordered, copies = sorted(set(recorder.ordered)), list(recorder.copies)
        recorder.ordered.clear()
        recorder.copies.clear()
        lent = {
            (one.data_ptr(), stream, device)
            for tensors, stream, device in recorder.lent
            for one in tensors
            if hasattr(one, "data_ptr")
        }
        return told, recorder.take(), lent, copies, ordered

    for rng in histories:
        trials = variants.history(rng, family, bound=bound, for_gpu=True)
        trials = [trial for trial in trials if as_for_a_gpu(rng, trial)]
        recorder.host = ()
        if trials and not bound:
            words = HOSTED.get(trials[0].name, ())
            recorder.host = tuple(word for word in words if rng.random() < 0.4)
        compare(rng, trials, run)
