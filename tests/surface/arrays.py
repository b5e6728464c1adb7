# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Calls, and arrays that lie somewhere in byte storages of their own."""

import numpy as np
import worlds

from cupy_cache.runtime import formats

try:
    import torch
except ImportError:
    torch = None

GUARD = 32  # bytes before and behind an array
FLOATS = ("float16", "bfloat16", "float32")
DTYPES = (*FLOATS, "float64", "int8", "uint8", "int16", "int32", "int64", "float8_e4m3fn", "bool")


class Call:
    """A call that can be made once.

    args : {name: value}; an array is a `worlds.Spec`, in lists and tuples too.
    expected : ``expected(args)``, with NumPy views for the specs, does what the call must do. What
        it returns, if anything, is what the call must return.
    written : names of arguments that are written.
    choice : names of arguments that may be lists of numbers as well as arrays.
    near : names of arguments whose elements need only be near those of the loops.
    free : names of numbers of which any float will do.
    """

    def __init__(self, name, args, expected, written, choice=()):
        self.name, self.args, self.expected = name, args, expected
        self.written, self.choice = written, choice
        self.near = self.free = ()
        self.faulty, self.faults = False, ()  # whether a fault must be recorded; those of the loops
        self.must_refuse = False
        self.bound = False  # whether it goes through a `PagedKVCache`
        self.changes = []  # what is another than it should be
        self.forms = {}  # of specs by id: what makes the object that is given

    def specs(self):
        """All arrays: (names of the argument and of the place in it, spec)."""
        for name, value in self.args.items():
            yield from ((name, spec) for spec in _leaves(value))

    def replace(self, old, new):
        """Have ``new`` where the spec ``old`` is."""
        self.args = {name: mapped(value, lambda s: new if s is old else s)
                     for name, value in self.args.items()}  # fmt: skip

    def objects(self):
        """The arguments as they are given."""
        return {name: mapped(value, self._object) for name, value in self.args.items()}

    def _object(self, spec):
        return self.forms.get(id(spec), numpy_array)(spec)

    def views(self, storages):
        """The arguments with NumPy views of copies, {id of a buffer: bytes}."""
        return {
            name: mapped(value, lambda s: s.on(storages[id(s.buffer)]))
            for name, value in self.args.items()
            if name != "stream"
        }

    def __repr__(self):
        shown = ", ".join(f"{name}={_text(value)}" for name, value in self.objects_shown().items())
        way = " by a PagedKVCache" if self.bound else ""
        return f"{self.name}({shown}){way}  # {', '.join(self.changes) or 'ordinary'}"

    def objects_shown(self):
        """The arguments, to be read."""
        return {name: mapped(value, lambda s: _Shown(s, self.forms.get(id(s), numpy_array)))
                for name, value in self.args.items()}  # fmt: skip


def _text(value):
    try:
        return repr(value)
    except RuntimeError:
        return "Broken()"


class _Shown:
    def __init__(self, spec, form):
        self._spec, self._form = spec, form

    def __repr__(self):
        return f"{getattr(self._form, '__name__', self._form)}{self._spec!r}"


def _leaves(value):
    if isinstance(value, worlds.Spec):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)


def mapped(value, function):
    """An argument with ``function`` of each `worlds.Spec` in it."""
    if isinstance(value, worlds.Spec):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(item, function) for item in value)
    return value


def fresh(rng, shape, dtype, dense=False, values=None):
    """A `worlds.Spec` in a new storage of random bytes, or with ``values``. Unless ``dense``, the
    dimensions before the last may be in any order in memory, with gaps."""
    size = formats.DTYPES[dtype].bytes
    shape = tuple(int(n) for n in shape)
    strides, step = [0] * len(shape), size
    order = list(range(len(shape) - 2, -1, -1))
    loose = not dense and rng.random() < 0.5
    if loose and rng.random() < 0.5:
        order = [int(axis) for axis in rng.permutation(len(order))]
    for axis in ([len(shape) - 1] if shape else []) + order:
        strides[axis] = step
        step *= max(shape[axis], 1)
        if loose and rng.random() < 0.4:
            step += size * int(rng.integers(1, 4))
    offset = GUARD + size * int(rng.choice([0, 0, 1, 3]))
    buffer = worlds.Buffer(offset + step + GUARD, rng)
    spec = buffer.view(shape, dtype, offset, strides)
    if values is not None:
        spec.on(buffer.bytes)[...] = values
    elif dtype in FLOATS:  # numbers, not bits: what is a NaN is another test's
        spec.on(buffer.bytes)[...] = rng.standard_normal(shape)
    elif dtype == "bool":
        spec.on(buffer.bytes)[...] = rng.integers(0, 2, shape)
    return spec


def bits(array):
    """The array as unsigned integers of its elements' size."""
    return array.view(f"u{array.itemsize}")


def numpy_array(spec):
    return spec.on(spec.buffer.bytes)


def subclass(spec):
    return numpy_array(spec).view(type("Array", (np.ndarray,), {}))


def tensor(spec):
    """As `worlds.TorchWorld` makes it."""
    storage = torch.from_numpy(spec.buffer.bytes)
    size = formats.DTYPES[spec.dtype].bytes
    flat = storage[spec.offset :]
    flat = flat[: flat.numel() // size * size].view(getattr(torch, spec.dtype))
    return flat.as_strided(spec.shape, [s // size for s in spec.strides])


def parameter(spec):
    return torch.nn.Parameter(tensor(spec), requires_grad=False)


def opaque(spec):
    return worlds.Opaque(tensor(spec))


def opaque_numpy(spec):
    return worlds.Opaque(numpy_array(spec))


def as_list(spec):
    return numpy_array(spec).tolist()


ORDINARY_FORMS = (numpy_array, subclass, tensor, parameter, opaque, opaque_numpy)


def fits_torch(spec):
    """Whether torch can show it."""
    size = formats.DTYPES[spec.dtype].bytes
    fits = spec.offset % size == 0 and all(s >= 0 and s % size == 0 for s in spec.strides)
    return torch is not None and hasattr(torch, spec.dtype) and fits


def form_of(rng, spec, call, name):
    """A way to give it."""
    forms = [numpy_array, numpy_array, subclass]
    if fits_torch(spec):
        forms += [tensor, tensor, parameter, opaque]
    if spec.dtype not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        forms.append(opaque_numpy)
    if name in call.choice:
        forms += [as_list, as_list]
    return forms[int(rng.integers(len(forms)))]


def pick(rng, *values):
    return values[int(rng.integers(len(values)))]
