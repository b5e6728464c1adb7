# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""From a call to its plan: every operation comes this way, on the GPU and on the CPU.

A call's *signature* is what stays the same from step to step: shapes, strides, dtypes, devices,
alignment, options. Everything that depends on it alone is decided once, in the operation's plan
function, and remembered. What changes from call to call is not in the signature: addresses, the
extents that an `Arg` says vary (the tokens of a step, the width of a block table), scales that are
floats, blocks chosen in host memory, the number of layers.

A call first tries the fast paths of its form (fastpath/). `Op.run` is the slow path.
"""

import itertools
import weakref
from collections.abc import Callable
from typing import NamedTuple

from .. import errors
from ..errors import KernelError, MissingDependencyError
from . import (
    apart,
    arrays,
    contract,
    dlpack,
    driver,
    fastpath,
    faults,
    formats,
    indices,
    lists,
    plans,
    signatures,
    streams,
    tracing,
)
from .fastpath.layers import flattened


class Arg(NamedTuple):
    """An argument of an operation that is an array, or several.

    varies : the dimensions whose extents change from call to call. The strides of the dimensions
        before the last of these may change too.
    optional : may be None.
    index : an array of indices. Kernels read them one at a time, so alignment beyond 8 bytes is not
        part of the signature.
    layers : a list of arrays that differ in nothing but what varies. All such lists of an operation
        are equally long. Errors call its items ``name[i]``, followed by ``suffix``.
    chosen : block or slot numbers, any number of them, in host memory or in an array on the GPU.
        ``pairs``: pairs of them, [n, 2].
    written : the operation writes it. No two written arrays may share memory.
    called : its name in errors, if that differs from ``name``.
    """

    name: str
    varies: tuple = ()
    optional: bool = False
    index: bool = False
    layers: bool = False
    suffix: str = ""
    chosen: bool = False
    pairs: bool = False
    written: bool = False
    called: str = ""

    @property
    def mask(self):
        """The low bits of an address that are part of the signature: its alignment."""
        return 7 if self.index or self.chosen else 15

    def item(self, index):
        """The name of array ``index`` of a list, in errors."""
        return f"{self.name}[{index}]{self.suffix}"


class Result(NamedTuple):
    """The argument that a function returns, which is made where a call gives None.

    at : its index.
    rows : the arguments, by their indices, whose numbers of rows are its extents that vary.
    make : ``make(op, objects, options, stream)`` -> the new array. It raises where that has no
        shape. ``objects`` are a call's, or `arrays.Array`\\ s of those that are fixed.
    """

    at: int
    rows: tuple
    make: Callable


_ops: weakref.WeakSet = weakref.WeakSet()


def forget_everything():
    """Forget the plans of all operations: their loaded kernels are gone."""
    for op in _ops:
        op.memory.clear()
        op.fast_paths.clear()
        for bound in op.bound:
            bound.forget()


def written_by(name):
    """The names of the arguments that operation ``name`` writes."""
    return {arg.name for op in _ops if op.name == name for arg in op.args if arg.written}


ROWS = arrays.ROWS
_NO_VIEWS = (), ()
_IN_HOST_MEMORY = indices.Chosen, list, tuple, range
_PLAIN = {str, int, bool, float, type(None)}  # types of options without code of their own


def _has_hash(named):
    try:
        hash(named[1])
    except Exception:
        return False
    return True


class Op:
    """An operation.

    Parameters
    ----------
    name : str
        The public function's name.
    args : sequence of Arg
        Its arguments that are arrays, in the order of the kernel's pointers.
    plan : callable
        ``plan(op, described, options)`` -> an object with ``run(plans.Call)`` and, optionally,
        ``tables(values)``, see `plans.Call`. It checks everything that the signature decides, and
        raises before anything is written. ``described`` has an `arrays.Array` for each argument:
        for a list, its first array, with the alignment common to all as its address; None for an
        argument that is absent or in host memory.
    count : callable
        ``count(extents, options, scalars)`` -> (rows, fields): how much work there is, 0 for none,
        and the kernel's fields that change at every call. It raises where extents do not fit each
        other. ``extents`` has an entry for each argument that varies or is chosen: the first extent
        where that alone varies, else (shape, byte strides); for a list, a list of these; for chosen
        numbers, how many; None for an absent argument.
    destination : int or tuple of int
        Indices of arguments; the first of them that is on a GPU decides device and stream. Among
        them must be all written arguments whose number of rows varies.
    options : tuple of str
        The names, for errors, of the function's arguments that stand first in a call's options.
    result : Result, optional
    """

    def __init__(
        self,
        name: str,
        args,
        plan: Callable,
        count: Callable,
        destination: int | tuple = 0,
        options: tuple = (),
        result: Result | None = None,
    ):
        self.result = result
        self.name, self.args, self.options = name, tuple(args), options
        # `fastpath.calls.Extents` counts no rows of listed arrays.
        assert not any(arg.layers and arg.varies == ROWS for arg in self.args), name
        self.make_plan, self.count = plan, count
        self.destination = destination if isinstance(destination, tuple) else (destination,)
        self.has_lists = any(arg.layers or arg.chosen for arg in self.args)
        self.memory = plans.Memory()
        self.fast_paths = fastpath.FastPaths(self)
        self.bound: weakref.WeakSet = weakref.WeakSet()  # its `bound.Bound`s
        _ops.add(self)

    def __call__(self, objects, options=(), stream=None, scalars=()):
        """Run on ``objects``, one for each `Arg`; optional ones at the end may be left out.
        ``options``, all hashable, go to the plan; ``scalars``, which may change from call to call,
        go to ``count``. Returns the new result where the call gives none, else None."""
        if stream is not None and not (type(stream) is int and 0 <= stream <= streams.LARGEST):
            stream = streams.pointer(self.name, stream)
        # Every statement from here to the launch runs at every call. Ten take a microsecond.
        tensors, form = objects, (options, len(objects))
        if self.has_lists:
            objects, tensors, form = flattened(self, self.args, objects, options)
        try:
            paths = self.fast_paths.forms.get(form, ())
        except Exception as error:
            raise self.unhashable(options) from error
        for path in paths:
            made = path(tensors, scalars, stream, objects)
            if made is not False:
                return made
        if not _PLAIN.issuperset(map(type, options)):
            options = tuple([formats.text_of(option) or option for option in options])
            form = (options, *form[1:])
        if self.has_lists:  # what a producer does while it exports must not change them
            objects = [[*value] if type(value) is list else value for value in objects]
        objects, made = self.with_result(objects, objects, options, stream)
        entry = self.run(self.read(objects, stream), objects, options, scalars, stream)
        if entry is not None:
            self.fast_paths.learn(self.fast_paths.of(form), entry, objects, options, made)
        return made

    def with_result(self, objects, known, options, stream):
        """(``objects`` with the new result, that result), or None as the latter where there is none
        to make. ``known``: as for `Result.make`."""
        if self.result is None or objects[self.result.at] is not None:
            return objects, None
        try:
            made = self.result.make(self.name, known, options, stream)
        except MissingDependencyError as error:  # it says only what is missing
            raise MissingDependencyError(f"{self.name}, {error}") from error
        return [*objects[: self.result.at], made, *objects[self.result.at + 1 :]], made

    def unhashable(self, options):
        """The error for the option that cannot be hashed, or compared, and so is no name."""
        others = [pair for pair in zip(self.options, options) if type(pair[1]) not in _PLAIN]
        name, option = next(itertools.filterfalse(_has_hash, others), others[0])
        got = f"a {type(option).__name__}"
        return errors.wrong("value", f"{self.name}: {name}", "a string", got)

    # --- reading

    def read(self, objects, stream, only=None):
        """`Read` the arguments, or only those at the indices ``only``."""
        wanted = range(len(objects)) if only is None else only
        self.refuse_traced(objects, wanted)
        if stream is None and any(
            arrays.is_foreign(array, name) for name, array in self._leaves(objects, wanted)
        ):  # DLPack wants the stream before it exports
            stream = self._stream_before_reading(objects)
        found, keep = [], []
        for index, (arg, value) in enumerate(zip(self.args, objects)):
            if index not in wanted:
                found.append(None)
            elif value is None:
                if not arg.optional:
                    require_array(self.name, arg.name, value)
                found.append(None)
            elif arg.layers:
                layers, kept = lists.read(self.name, arg, value, stream)
                found.append(layers)
                keep += kept
            elif arg.chosen:
                found.append(indices.read(self.name, arg, value, stream))
            else:
                found.append(arrays.read(value, f"{self.name}: {arg.called or arg.name}", stream))
        found += [None] * (len(self.args) - len(found))
        return Read(found, keep)

    def _leaves(self, objects, wanted):
        """(Name, array) of each array of the arguments at these indices. Those of a list have the
        list's name."""
        for index in wanted:
            value, arg = (objects[index] if index < len(objects) else None), self.args[index]
            name = f"{self.name}: {arg.name}"
            if arg.layers and value is not None:
                yield from zip(itertools.repeat(name), lists.plain(self.name, arg.name, value))
            elif not (value is None or issubclass(type(value), _IN_HOST_MEMORY)):
                yield name, value

    def refuse_traced(self, objects, wanted):
        """Refuse torch's tensors while a tracer is at work, which would not see the call. To the
        comparison of fast paths torch.jit.trace is another mode of torch; of make_fx they know
        nothing."""
        if tracing.tracer() is None:
            return
        for name, array in self._leaves(objects, wanted):
            if arrays.is_torch(array):
                tracing.refuse(name)

    def _stream_before_reading(self, objects):
        """The stream of the coming launch, for producers of exports: the current one of the
        destination's framework; None on the CPU. Bound arguments may be without a destination: then
        the first one on a GPU stands for it."""
        given = [i for i in self.destination if i < len(objects) and objects[i] is not None]
        for index in given or range(len(objects)):
            for name, array in itertools.islice(self._leaves(objects, (index,)), 1):
                device = arrays.device_of(array, name)
                if device.kind == "cuda":
                    foreign = arrays.is_foreign(array, name)
                    framework = None if foreign else arrays.view(array, name).framework
                    try:
                        return streams.current(framework, device.index)()
                    except MissingDependencyError as error:
                        raise arrays.unreadable(array, name, error) from error
        return None

    # --- running

    def run(self, read, objects, options, scalars, stream):
        """Find or make the plan for what was ``read`` of ``objects``, and run it. Returns the
        `plans.Entry` of a signature that was known already; else None."""
        try:
            return self._run(read, objects, options, scalars, stream)
        except (KernelError, MissingDependencyError) as error:
            text = str(error)
            if text.startswith(self.name):
                raise
            # From a place that knows no operation. Its words begin with a GPU, or with what failed.
            text = f"{self.name}{' on ' if text.startswith('cuda:') else ': '}{text}"
            raise type(error)(text) from error.__cause__ or error

    def _run(self, read, objects, options, scalars, stream):
        signature, values, extents = signatures.of(self, read.found, options)
        if signature is None:  # a list is empty: there is nothing to do
            return None
        entry = known = self.memory.get(signature)
        if entry is None or self._has_more_rows(entry, read.found):
            entry = self.remember(signature, read.found, options)
        if entry.apart is not None:
            laid = self._views(read.found, entry) if entry.apart.varies else ()
            entry.apart.check(values, *laid)
        views = _NO_VIEWS if entry.device is not None else self._views(read.found, entry)
        work = self.count(extents, options, scalars)
        owners = read.owners() if entry.hosted else ()
        self.finish(entry, values, None, stream, work, objects, views, owners)
        return entry if entry is known else None

    def finish(self, entry, values, tables, stream, work, objects, views=_NO_VIEWS, owners=()):
        """Run a plan on its stream, behind the streams that it must wait for. ``tables`` and
        ``stream`` are found here where they are None. ``views``: shapes and strides, for NumPy.
        ``owners``: what owns host memory beside the objects."""
        rows, fields = work
        if not rows:
            return
        if entry.device is not None:
            torchs = entry.torchs
            if stream is None:
                stream = entry.current_stream()
                torchs = None if torchs is entry.current_stream else torchs
            for other in entry.others:
                its = other()
                if its is not None:
                    driver.active.order(its, stream, entry.device)
            if torchs is not None and stream != torchs():
                leaves = self._leaves(objects, range(len(objects)))
                streams.lend([array for _, array in leaves], stream, entry.device)
        if tables is None and entry.tables is not None:
            tables = entry.tables(values)
        entry.plan.run(plans.Call(values, rows, fields, tables, stream, *views))
        if entry.hosted:
            kept = [*owners]  # not the caller's lists, which may change before the work is done
            for index in entry.hosted:
                value = objects[index]
                kept += value if isinstance(value, (list, tuple)) else (value,)
            streams.keep_until_done(kept, stream, entry.device)
        if faults.debug:
            faults.after_call(stream, entry.device)

    def _has_more_rows(self, entry, found):
        return any(found[index].shape[0] > rows for index, rows in entry.most_rows)

    def _views(self, found, entry):
        """Shapes, None of what is no array, and strides in bytes."""
        strides = []
        for arg, meta, known in zip(self.args, found, entry.strides):
            if arg.varies and type(meta) is arrays.Metadata:
                unit = arrays.stride_unit(meta)
                known = tuple(s * unit for s in meta.strides)
            strides.append(known)
        shapes = [meta.shape if type(meta) is arrays.Metadata else None for meta in found]
        return shapes, strides

    # --- plans

    def describe(self, found):
        """The arguments as `arrays.Array`; None for one that is absent or in host memory."""
        described = []
        for arg, meta in zip(self.args, found):
            name = arg.called or arg.name
            if type(meta) is lists.Layers:
                meta, name = meta.metadata, arg.item(0)
            if type(meta) is not arrays.Metadata:
                described.append(None)
                continue
            array = arrays.describe(meta, f"{self.name}: {name}")
            strides = arrays.regular(array.shape, array.strides, array.dtype.bytes)
            if 0 in array.shape:  # an empty array's strides mean nothing, and NumPy's are all 0
                strides = dlpack.contiguous_strides(array.shape, array.dtype.bytes)
            described.append(array._replace(strides=strides))
        return described

    def remember(self, signature, found, options):
        """Make the `plans.Entry` of a signature."""
        described = self.describe(found)
        for arg, array in zip(self.args, described):
            if arg.chosen and array is not None:
                indices.check(self.name, arg, array)
        entry = self._entry(self.make_plan(self, described, options), described)
        # An empty array's strides were not checked, and an array with rows may have the same
        # signature: so no plan for empty arrays is remembered.
        given = [pair for pair in zip(self.args, described) if pair[1] is not None]
        if not any(array.shape[dim] == 0 for arg, array in given for dim in arg.varies):
            self.memory.add(signature, entry)
        return entry

    def _entry(self, plan, described):
        destination, tables = self._destination(described), getattr(plan, "tables", None)
        separate = apart.Apart(self, described)
        separate = separate if separate.needed else None
        strides = [None if array is None else array.strides for array in described]
        # Rows that interleave were checked up to this number; more might overlap.
        most_rows = tuple(
            (index, described[index].shape[0])
            for index in self.destination
            if self._interleaves(self.args[index], described[index])
        )
        if destination is None or destination.device.kind == "cpu":
            return plans.Entry(plan, tables, separate, None, None, (), None, (), strides, most_rows)
        device, framework = destination.device.index, destination.framework
        # Host memory too: a framework's copies to pinned memory may be pending on its stream.
        given = [array for array in described if array is not None]
        owners = {array.framework for array in given}
        on_gpu = {array.framework for array in given if array.device.kind == "cuda"}
        others = tuple(
            (streams.current if owner in on_gpu else streams.of_host_memory)(owner, device)
            for owner in sorted(owners - {framework})
            if streams.knows(owner)
        )
        lends = any(
            a is not None and a.framework == "torch" and a.device.kind == "cuda" for a in described
        )
        torchs = streams.current("torch", device) if lends else None
        hosted = tuple(
            index
            for index, array in enumerate(described)
            if array is not None and array.device.kind == "cpu"
        )
        current = torchs if framework == "torch" else streams.current(framework, device)
        return plans.Entry(
            plan, tables, separate, device, current, others, torchs, hosted, strides, most_rows
        )

    @staticmethod
    def _interleaves(arg, array):
        whole = array is not None and not (arg.layers or arg.chosen)
        return whole and arg.varies == ROWS and contract.rows_interleave(array)

    def _destination(self, described):
        """The array that decides device and stream; None where no destination is given."""
        given = [described[i] for i in self.destination if described[i] is not None]
        on_gpu = [array for array in given if array.device.kind == "cuda"]
        return (on_gpu or given or [None])[0]


class Read(NamedTuple):
    """What `Op.read` found.

    found : for each argument an `arrays.Metadata`, a `lists.Layers`, the `indices.Chosen` in host
        memory, or None.
    keep : owners of the memory of exported arrays in lists.
    """

    found: list
    keep: list

    def owners(self):
        """All owners of the memory of exported arrays."""
        single = (meta.keep for meta in self.found if type(meta) is arrays.Metadata)
        return [owner for owner in (*self.keep, *single) if owner is not None]


def require_array(op, name, value):
    """Refuse None where an array is needed."""
    if value is None:
        raise errors.wrong("type", f"{op}: {name}", "an array", "None")
