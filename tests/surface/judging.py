# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Making a call, and looking whether it did what it must."""

import inspect

import numpy as np
import worlds

import cupy_cache as cc

from .arrays import ORDINARY_FORMS, fits_torch, tensor
from .calls import SOURCES

try:
    import torch
except ImportError:
    torch = None


def invoke(made, rng, objects):
    """Call the function, some of the arguments by their names."""
    if made.bound:
        _write_bound(made.name, dict(objects))
        return None
    function = getattr(cc, made.name)
    names = list(inspect.signature(function).parameters)
    args, options = [], dict(objects)
    if made.name == "swap_blocks":
        names = ["src", "dst"]
    by_place = int(rng.integers(len(names) + 1))
    for name in names[:by_place]:
        kind = inspect.signature(function).parameters[name].kind
        if name not in options or kind is inspect.Parameter.KEYWORD_ONLY:
            break
        args.append(options.pop(name))
    return function(*args, **options)


def _write_bound(name, given):
    """The write through a `PagedKVCache`."""
    two = name != "concat_and_cache_mla"
    stream = {"stream": given.pop("stream")} if "stream" in given else {}
    caches = ("key_cache", "value_cache") if two else ("kv_cache",)
    fixed = [[given.pop(cache)] for cache in caches]
    names = {"k_scale": "k_scales", "v_scale": "v_scales", "scale": "k_scales"}
    options = {names.get(n, n): given.pop(n) for n in ("kv_cache_dtype", *names) if n in given}
    cache = cc.PagedKVCache(*fixed, **options)
    cache.write(0, *(given.pop(n) for n in (*SOURCES[name], "slot_mapping")), **stream)


def _is_named(made, error):
    """Whether an error's message has the one form, and names the function, or what a `PagedKVCache`
    calls it."""
    names = [made.name]
    if made.bound:
        names += ["PagedKVCache", "PagedKVCache.write"]
    text = str(error)
    return text.startswith(tuple(f"{n}: Invalid " for n in names)) and ": expected " in text


def judge(made, rng):
    """Make the call. Returns whether it was taken; raises `AssertionError` where it did what it
    must not."""
    buffers = {id(spec.buffer): spec.buffer for _, spec in made.specs()}
    buffers |= {id(spec.buffer): spec.buffer for spec in getattr(made, "hidden", ())}
    before = {key: buffer.bytes.copy() for key, buffer in buffers.items()}
    objects = made.objects()
    try:
        result = invoke(made, rng, objects)
    except cc.CupyCacheError as error:
        text = str(error)
        assert _is_named(made, error), f"not of the one form: {text}"
        assert not isinstance(error, cc.FaultError), text
        for key, buffer in buffers.items():
            assert (buffer.bytes == before[key]).all(), f"something was written before: {text}"
        assert not _faults(), f"a fault was left behind: {text}"
        too_loose = "at most two" in text or "at most five" in text  # dimensions around a run
        assert made.changes or too_loose, f"an ordinary call was refused: {text}"
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    assert not made.must_refuse, "it should have been refused"
    copies = {key: content.copy() for key, content in before.items()}
    made.copies = copies
    expected = made.expected(made.views(copies))
    _settle(made, copies)
    for key, buffer in buffers.items():
        np.testing.assert_array_equal(buffer.bytes, copies[key])
    if expected is not None:
        _compare(result, expected)
    faults = _faults()
    assert bool(faults) == bool(made.faulty or made.faults), f"faults: {faults}"
    return True


def judge_recorded(made, rng, recorder):
    """Make the call with tensors that count as on a GPU, where nothing runs: a named error with
    nothing launched, or no error. Returns whether it was taken; None where it cannot be made so."""
    if any("of_another_framework" in change for change in made.changes):
        return None
    for _, spec in made.specs():
        if made.forms[id(spec)] in ORDINARY_FORMS:
            if not fits_torch(spec):
                return None
            made.forms[id(spec)] = tensor
    needs_cuda = made.name in (
        "slot_mapping", "slot_mapping_groups", "alibi_bias", "packed_size", "paged_attention",
        "paged_attention_mla",
    )  # fmt: skip
    if made.name == "swap_blocks_batch" or (needs_cuda and "out" not in made.args):
        return None
    objects = made.objects()
    try:
        invoke(made, rng, objects)
    except cc.CupyCacheError as error:
        text = str(error)
        assert _is_named(made, error), f"not of the one form: {text}"
        assert not recorder.take() and not recorder.copies, f"launched before: {text}"
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    assert not made.must_refuse, "it should have been refused"
    recorder.take()
    recorder.copies.clear()
    return True


def _settle(made, copies):
    """Take what is near for what is expected."""
    for name, spec in made.specs():
        if name in made.near and 0 not in spec.shape:
            got, wanted = spec.on(spec.buffer.bytes), spec.on(copies[id(spec.buffer)])
            size = 0.02 if got.dtype.itemsize == 2 else 1e-5
            with np.errstate(all="ignore"):
                largest = np.abs(wanted[np.isfinite(wanted)].astype(np.float64)).max(initial=1)
            np.testing.assert_allclose(
                got.astype(np.float64), wanted.astype(np.float64), rtol=size, atol=size * largest
            )
            wanted[...] = got


def _compare(result, expected):
    if not isinstance(expected, np.ndarray):
        assert result == expected
        return
    if torch is not None and isinstance(result, torch.Tensor):
        assert str(result.dtype).endswith(expected.dtype.name)
        result = result.detach().to(torch.float64).numpy()
    elif isinstance(result, worlds.Opaque):
        return  # the buffers were compared
    np.testing.assert_allclose(
        np.asarray(result, np.float64), np.asarray(expected, np.float64), rtol=3e-7
    )


def _faults():
    try:
        cc.raise_faults()
    except cc.FaultError as error:
        return error.faults
    return ()
