# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Calls of which one thing is another than it should be."""

import inspect
from fractions import Fraction

import numpy as np
import worlds

import cupy_cache as cc
from cupy_cache.runtime import formats

from .arrays import (
    DTYPES,
    as_list,
    fits_torch,
    form_of,
    fresh,
    numpy_array,
    opaque,
    parameter,
    pick,
    tensor,
)
from .attention import MAKERS
from .calls import ORDINARY, SLOW, SOURCES

try:
    import torch
except ImportError:
    torch = None


def another_dtype(rng, call, name, spec):
    dtype = pick(rng, *DTYPES)
    new = codes(rng, name, fresh(rng, spec.shape, dtype))
    if name in ("src_ptrs", "dst_ptrs", "sizes"):  # addresses are believed
        if dtype in ("int32", "int64"):
            return None
        call.must_refuse = True
    elif dtype in ("int32", "int64") and spec.dtype in ("int32", "int64"):
        numpy_array(new)[...] = numpy_array(spec)
    return new


def another_shape(rng, call, name, spec):
    shape = list(spec.shape)
    what = pick(rng, "more", "less", "added", "dropped", "empty")
    if what == "added":
        shape.insert(int(rng.integers(len(shape) + 1)), pick(rng, 1, 2))
    elif shape:
        at = int(rng.integers(len(shape)))
        if what == "dropped":
            del shape[at]
        else:
            shape[at] = {"more": shape[at] + 1, "less": max(shape[at] - 1, 0), "empty": 0}[what]
    if tuple(shape) == spec.shape or name in ("src_ptrs", "dst_ptrs", "sizes"):
        return None
    if spec.dtype in ("int32", "int64") and spec.buffer.bytes.size < 400:
        return fresh(rng, shape, spec.dtype, values=0)
    return codes(rng, name, fresh(rng, shape, spec.dtype))


def codes(rng, name, spec):
    """Bytes that are no NaN where they may be read as numbers: which NaN comes out is not
    defined."""
    if formats.DTYPES[spec.dtype].bytes == 1 and name in ("src_cache", "input"):
        view = numpy_array(spec).view(np.uint8)
        view[...] = rng.integers(0, 2 if spec.dtype == "bool" else 0x70, spec.shape)
    return spec


def other_byte_order(rng, call, name, spec):
    dtype = spec.numpy_dtype
    if dtype.itemsize == 1 or dtype.kind == "V" or spec.dtype == "bfloat16":
        return None
    call.must_refuse = True

    def swapped(spec):
        return numpy_array(spec).view(dtype.newbyteorder())

    call.forms[id(spec)] = swapped
    return spec


def read_only(rng, call, name, spec):
    call.must_refuse |= name in call.written

    def fixed(spec):
        array = numpy_array(spec)
        array.flags.writeable = False
        return array

    call.forms[id(spec)] = fixed
    return spec


def masked(rng, call, name, spec):
    call.must_refuse = True
    call.forms[id(spec)] = lambda spec: np.ma.masked_array(numpy_array(spec))
    return spec


def negative(rng, call, name, spec):
    if not fits_torch(spec) or spec.dtype not in ("float16", "float32", "int32", "int64"):
        return None
    call.must_refuse = True
    call.forms[id(spec)] = lambda spec: torch._neg_view(tensor(spec))
    return spec


def without_memory(rng, call, name, spec):
    if not fits_torch(spec) or 0 in spec.shape:
        return None
    kind = pick(rng, "meta", "asleep", "behind", "sparse", "gradient", "zero")

    def gone(spec):
        shown = tensor(spec)
        if kind == "meta":
            return shown.to("meta")
        if kind == "sparse":
            return shown.to(torch.float32).to_sparse()
        if kind == "zero":
            return torch._efficientzerotensor(spec.shape, dtype=shown.dtype)
        if kind == "gradient":
            return worlds.Opaque(torch.ones(spec.shape, requires_grad=True))
        made = torch.empty((2, *spec.shape), dtype=shown.dtype)
        made = made[1] if kind == "behind" else made[0]
        made.untyped_storage().resize_(0)
        return made

    call.must_refuse = True
    call.forms[id(spec)] = gone
    return spec


def misaligned(rng, call, name, spec):
    if formats.DTYPES[spec.dtype].bytes == 1 or name in ("src_ptrs", "dst_ptrs", "sizes"):
        return None
    content = numpy_array(spec).copy()
    new = worlds.Spec(spec.buffer, spec.offset - 1, spec.shape, spec.strides, spec.dtype)
    numpy_array(new)[...] = content
    call.forms[id(new)] = numpy_array
    return new


def odd_strides(rng, call, name, spec):
    """In a larger storage; extents of 1 get strides that mean nothing."""
    if not spec.shape or name in ("src_ptrs", "dst_ptrs", "sizes"):
        return None
    size = formats.DTYPES[spec.dtype].bytes
    strides, at = list(spec.strides), int(rng.integers(len(spec.shape)))
    kind = pick(rng, "gaps", "nothing", "same", "backwards")
    content, offset = numpy_array(spec).copy(), spec.offset
    if kind == "nothing":
        strides = [pick(rng, 0, 1, 7, -3) if n == 1 else s for n, s in zip(spec.shape, strides)]
        if strides == list(spec.strides):
            return None
    elif kind == "gaps":
        strides = [2 * s for s in strides]
    elif kind == "same":
        strides[at] = 0
        call.must_refuse |= name in call.written and spec.shape[at] > 1 and 0 not in spec.shape
    else:
        offset += strides[at] * max(spec.shape[at] - 1, 0)
        strides[at] = -strides[at]
    buffer = worlds.Buffer(3 * spec.buffer.bytes.size + 64 * size, rng)
    new = worlds.Spec(buffer, offset, spec.shape, strides, spec.dtype)
    numpy_array(new)[...] = content
    call.forms[id(new)] = numpy_array
    return new


def shared(rng, call, name, spec):
    """The memory of another array that is written, whole or in part."""
    others = [s for n, s in call.specs() if n in call.written and s is not spec]
    if name not in call.written or not others:
        return None
    other = pick(rng, *others)
    if (other.shape, other.dtype, other.strides) != (spec.shape, spec.dtype, spec.strides):
        return None
    size = formats.DTYPES[spec.dtype].bytes
    shift = pick(rng, 0, size, 4 * size)
    end = other.offset + shift + sum(s * (n - 1) for s, n in zip(spec.strides, spec.shape)) + size
    if end > other.buffer.bytes.size:
        return None
    new = worlds.Spec(other.buffer, other.offset + shift, spec.shape, spec.strides, spec.dtype)
    places = [_bytes_of(s) for s in (other, new)]
    if places[0].isdisjoint(places[1]):
        return None
    call.must_refuse = True
    return new


def _bytes_of(spec):
    size = formats.DTYPES[spec.dtype].bytes
    return {spec.offset + sum(i * s for i, s in zip(index, spec.strides)) + byte
            for index in np.ndindex(*spec.shape) for byte in range(size)}  # fmt: skip


OPTIONAL = {
    "seq_starts", "out", "idx_mapping", "query_start_loc", "alibi_slopes", "sinks", "lse",
    "output_lse",
}  # fmt: skip


def no_array(rng, call, name, spec):
    if "scale" in name or name in OPTIONAL:
        return None
    # A rotary embedding of queries alone has no key.
    call.must_refuse = True
    value = pick(
        rng,
        *([None] if (call.name, name) != ("rotary_embedding", "key") else []),
        "text",
        1.5,
        object(),
        {"a": 1},
        ["x"],
        [1.5],
        b"bytes",
        [None],
        np.int64,
    )
    call.forms[id(spec)] = lambda spec: value
    return spec


def of_another_framework(rng, call, name, spec):
    """One of a list."""
    listed = [s for n, s in call.specs() if n == name and s is not spec]
    if not listed or not fits_torch(spec):
        return None
    forms = {call.forms[id(s)] for s in listed}
    call.forms[id(spec)] = opaque if forms <= {tensor, parameter} else tensor
    call.must_refuse = isinstance(call.args[name][0], worlds.Spec)
    return spec


def of_complex_numbers(rng, call, name, spec):
    call.must_refuse = True
    call.forms[id(spec)] = lambda spec: np.zeros(spec.shape, pick(rng, np.complex64, object, "V3",
                                                                  "M8[s]", "U2"))  # fmt: skip
    return spec


ARRAY_CHANGES = (
    another_dtype, another_dtype, another_shape, another_shape, other_byte_order, read_only, masked,
    negative, without_memory, misaligned, odd_strides, odd_strides, shared, shared, no_array,
    of_another_framework, of_complex_numbers,
)  # fmt: skip


class Index:
    """An integer by its `__index__` alone."""

    def __init__(self, value):
        self._value = value

    def __index__(self):
        return self._value

    def __repr__(self):
        return f"Index({self._value})"


class Broken:
    """What cannot even be shown."""

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no repr")

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def change_option(rng, call):
    """Another form of an option, or what is none. Returns what was done."""
    names = [n for n, v in call.args.items()
             if isinstance(v, (bool, int, float, str)) and n != "token_to_seq"]  # fmt: skip
    takes_stream = "stream" in inspect.signature(getattr(cc, call.name)).parameters
    if takes_stream and rng.random() < 0.15:
        call.args["stream"] = value = pick(rng, None, 0, "x", 1.5, [], Broken(), True)
        call.must_refuse = value is not None and type(value) is not int
        return f"stream={type(value).__name__}"
    raw = call.args.get("kv_cache_dtype") == "auto" or call.args.get("skip_scale")
    names = [n for n in names if n != "scale" or not raw]  # else it is ignored
    names = [n for n in names if n not in call.free]
    if not names:
        return None
    name = pick(rng, *names)
    value = call.args[name]
    if isinstance(value, bool):
        same = [int(value), np.bool_(value), np.array(value), "yes" if value else ""]
        wrong = [np.array([1, 0])]
    elif isinstance(value, int):
        same = [np.int64(value), np.uint8(value), np.array(value), Index(value)]
        same += [torch.tensor(value)] if torch is not None else []
        wrong = [bool(value), float(value), str(value), [value], np.float32(value), np.bool_(value),
                 np.array([value]), np.array(float(value)), 1j, object(), Broken(), -1, b"1",
                 2**70 if name != "batch_size" else -5]  # fmt: skip
        wrong += [torch.tensor(True), torch.tensor(1.0)] if torch is not None else []
    elif isinstance(value, float):
        same = [np.float32(value), np.float64(value), Fraction(value)]
        wrong = [0.0, -value, float("nan"), float("inf"), str(value), True, [value], 1j, 1e-60,
                 10**400, Broken(), np.float32(0), object()]  # fmt: skip
        if call.bound:
            wrong.remove([value])  # a list has one for each layer
    else:
        same = [np.str_(value)]
        wrong = [[value], {value: 1}, {value}, 3, value.upper() + "?", value.encode(), True,
                 (value,), np.array([1, 2]), Broken(), 1.5, object()]  # fmt: skip
        if name == "dtype":
            wrong.remove(value.encode())  # NumPy knows it
        if name == "device":
            same, wrong = [np.str_(value)], [[value], "gpu", 1.5, Broken(), {value}]
    if rng.random() < 0.4:
        call.args[name] = new = pick(rng, *same)
    else:
        call.args[name] = new = pick(rng, *wrong)
        call.must_refuse = True
    try:
        return f"{name}={new!r}"
    except RuntimeError:
        return f"{name}=Broken()"


def change_numbers(rng, call):
    """Numbers that lead nowhere."""
    name = next((n for n in ("block_mapping", "block_ids") if n in call.args), None)
    if name is None:
        return None
    pairs = name == "block_mapping"
    bad = pick(
        rng, 99, -1, 2**31, 2**63 - 1, 2**64, -(2**70), 1.0, "1", None, True, (1, 2), Broken()
    )
    value = [(0, bad)] if pairs else [0, bad]
    layers = next(iter(call.args.values()))
    call.args[name] = value
    call.must_refuse = layers != []  # without any there is nothing that a number could leave
    return f"{name} with {type(bad).__name__}"


def change_slots(rng, call):
    """A slot behind the cache: skipped, and recorded."""
    spec = call.args.get("slot_mapping")
    if "caches" in call.args or not isinstance(spec, worlds.Spec) or 0 in spec.shape:
        return None
    view = numpy_array(spec)
    view[(0,) * view.ndim] = pick(rng, 10**6, 2**31 - 1)
    call.faulty = True
    return "a slot behind the cache"


def change_array(rng, call):
    found = list(call.specs())
    if not found:
        return None
    name, spec = pick(rng, *found)
    raw = call.args.get("kv_cache_dtype") == "auto" or call.args.get("skip_scale")
    if name == "scale" and raw:  # it is ignored
        return None
    change = ARRAY_CHANGES[int(rng.integers(len(ARRAY_CHANGES)))]
    new = change(rng, call, name, spec)
    if new is None:
        return None
    if new is not spec:
        call.replace(spec, new)
    return f"{name}: {change.__name__}"


def call(rng):
    """A random call."""
    makers = SLOW if rng.random() < 0.01 else (*ORDINARY, *MAKERS)
    made = makers[int(rng.integers(len(makers)))](rng)
    others = {"skip_scale", "scale_rule"} & set(made.args)
    made.bound = made.name in SOURCES and not others and rng.random() < 0.2
    lists = {}  # arrays of a list are of one framework
    for name, spec in list(made.specs()):
        form = form_of(rng, spec, made, name)
        if isinstance(made.args[name], (list, tuple)):
            form = lists.setdefault((name, spec.dtype), form)
        made.forms[id(spec)] = form
    if rng.random() < 0.75:
        change = pick(rng, change_array, change_array, change_array, change_option, change_option,
                      change_numbers, change_slots)  # fmt: skip
        done = change(rng, made)
        if done is not None:
            made.changes.append(done)
    for name, spec in made.specs():
        form = made.forms.setdefault(id(spec), numpy_array)
        if form in (tensor, parameter, opaque) and not fits_torch(spec):
            made.forms[id(spec)] = numpy_array
        if name not in made.choice and form is as_list:
            made.forms[id(spec)] = numpy_array
    return made
