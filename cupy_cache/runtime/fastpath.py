# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path of a signature that comes again with arrays of torch or of CuPy on a GPU, as at
every layer and step of an engine. Both kinds of arrays are called tensors here.

One comparison tells whether a call has the signature (guards.py); then the tensors are asked for
nothing but their addresses and how many elements they have. There is one function for each
signature (`_kernel_path`, `_plan_path`), whatever the counts; the layers of a `PagedKVCache` share
it.
"""

import functools
import itertools
import math
import operator
import struct

from . import arrays, faults, guards, indices, lists, overlap, plans, streams

MAX_PATHS = 8  # signatures of calls of one form
MAX_FORMS = 256
MAX_APART = 1024  # combinations of addresses
MAX_COUNTS = 256  # combinations of extents and scalars, of one signature
PATIENCE = 64  # calls before a new signature takes the place of one of so many: learning takes long


class FastPaths:
    """The fast paths of an operation, by the *form* of a call, which is seen without looking at any
    array: its options and how many arguments there are, and of lists which are given."""

    def __init__(self, op):
        self._op = op
        self.forms = {}

    def of(self, form):
        """The fast paths for calls of this form, the latest first: kept up to date."""
        found = self.forms.get(form)
        if found is None:
            if len(self.forms) >= MAX_FORMS:
                self.forms.clear()
            found = self.forms[form] = Recent()
        return found

    def clear(self):
        """Forget all."""
        for paths in self.forms.values():
            paths.clear()

    def learn(self, paths, entry, objects, options, given=None):
        """Make the fast path of the signature of these objects, if it has one. ``given``: the
        indices of the arguments that a call gives, where a `dispatch.Bound` has the others."""
        on_cpu = entry.device is None and any(entry.strides)
        if on_cpu or entry.most_rows or not paths.may_learn():
            return
        if self._op.has_lists:
            path = _plan_path(self._op, entry, objects, options, given)
        elif isinstance(entry.plan, plans.KernelPlan):
            path = _kernel_path(self._op, entry, objects, options, given)
        else:
            path = None
        if path is not None:
            paths.learn(path)


class Recent(list):
    """The fast paths of the latest signatures of one form. Each is a function ``path(tensors,
    scalars, stream, more)``: it runs the call and returns True, or returns False with nothing done.
    ``more``: the `dispatch.Bound` that was called, or else the call's objects."""

    _patience = 0

    def may_learn(self):
        """Whether a further one may be made now."""
        if len(self) < MAX_PATHS:
            return True
        self._patience -= 1
        if self._patience > 0:
            return False
        self._patience = PATIENCE
        return True

    def learn(self, path):
        """Add one; the oldest goes where there are too many."""
        self[:] = [path, *self[: MAX_PATHS - 1]]


# --- one kernel -----------------------------------------------------------------------------------


class _Launches:
    """The launches of a signature.

    known : {numbers of elements, shapes and scalars of a call: (enqueue, errors, what to call at
        these errors instead, scratch, fields)}, of which the value is () where there is nothing to
        do.
    records : parameters, each with the fields that it was filled with last. One in use by a thread
        must not be repacked by another: each takes one and puts it back.
    """

    def __init__(self, op, entry, options, extents):
        self._op, self._options = op, options
        self._alike, self._find = extents.alike, extents.find
        self._launcher, self._plan = entry.plan.launcher, entry.plan
        letters = self._launcher.kernel.params.call_letters[len(op.args) :]
        self._pack = struct.Struct("<" + "".join(letters)).pack_into
        self._fields_at = 8 * len(op.args)
        self._grids = {}  # {rows: (enqueue, errors, what to call at these instead, scratch)}
        self.known, self.records = {}, []
        overlap.prepared.add(self)

    def forget(self):
        """Prepare all launches anew."""
        self._grids.clear()
        self.known.clear()

    def prepare(self, key, tensors, scalars):
        """The launch for a key that is not known; None where the plan is not for these tensors, or
        its kernel is not loaded yet."""
        if not self._alike(tensors):
            return None
        extents = self._find(tensors)
        rows, fields = 1, ()
        if self._op.count is not None:
            rows, fields = self._op.count(extents, self._options, scalars)
        launch = ()
        if rows:
            launch = self._grids.get(rows) or self._of_grid(rows)
            if launch is None:
                return None
            if launch:
                launch = *launch, fields
        if len(self.known) >= MAX_COUNTS:
            self.known.clear()
            self._grids.clear()
        self.known[key] = launch
        return launch

    def _of_grid(self, rows):
        launcher, grid, threads = self._plan.launch_for(rows)
        if not launcher.has_work(grid, threads):
            return ()
        if not launcher.loaded:  # the calls before had no work: the long way loads it
            return None
        enqueue, failed = launcher.prepare(grid, threads)
        again = functools.partial(launcher.launch, grid, threads)
        # Other threads may forget it at any time.
        made = self._grids[rows] = enqueue, failed, again, self._plan.scratch_for(rows)
        return made

    def fill(self, record, fields):
        """A record with these fields: ``record``, or a new one for None."""
        if record is None:
            record = self._launcher.new_record()
        self._pack(record.buffer, self._fields_at, *fields)
        record.fields = fields
        return record


def _kernel_path(op, entry, objects, options, given):
    """The fast path of a `plans.KernelPlan`: one launch."""
    given = list(range(len(objects)) if given is None else given)
    bound = [i for i, value in enumerate(objects) if value is not None and i not in given]
    present = [index for index in given if objects[index] is not None]
    kind = guards.kind_of([objects[index] for index in (*present, *bound)])
    if entry.others or kind is None:
        return None
    # torch's comparison refuses one tensor given twice: it gets each once.
    unique = []
    for index in present:
        if not any(objects[index] is objects[other] for other in unique):
            unique.append(index)
    tensors = [objects[index] for index in unique]
    if not all(map(kind.elements, tensors)):
        return None  # then the number of elements does not tell the rows
    same = kind.same_as(tensors, [op.args[index].varies for index in unique])
    if same is None:
        return None
    pick = _Pick(given, objects, unique)
    pointers = _Pointers(op, entry, kind, objects, unique, pick.twins, bound)
    places = {id(objects[index]): at for at, index in enumerate(unique)}
    parts = []
    for arg, value in itertools.zip_longest(op.args, objects):
        at = places.get(id(value))
        is_bound = at is None and value is not None and arg.varies
        parts.append((arg, at, kind.extent(arg, value) if is_bound else None))
    extents = _Extents(kind, parts, tensors)
    launches = _Launches(op, entry, options, extents)
    sized = [at for at, index in enumerate(unique) if op.args[index].varies == arrays.ROWS]
    plain = not (pick.needed or extents.free or pointers.arrange or pointers.odd)
    if plain:
        if len(unique) == 3 and sized == [0, 1, 2] and pointers.insert_at == len(bound) == 2:
            return _write_path(entry, kind, same, launches, pointers, caches_bound=True)
        if len(unique) == 5 and sized == [0, 1, 4] and not bound:
            return _write_path(entry, kind, same, launches, pointers, caches_bound=False)
    # Every statement of `run` is one of every call: all that it needs is at hand.
    picks, pick = pick.needed, pick.pick
    insert_at, arrange, pack = pointers.insert_at, pointers.arrange, pointers.pack
    misaligned, odd, lowest = pointers.misaligned, pointers.odd, arrays.LOWEST
    written, varies = pointers.written, pointers.written_rows_vary
    apart, check_apart = pointers.apart, pointers.check_apart
    sized, free = extents.sized, extents.free
    known, prepare = launches.known, launches.prepare
    records, fill = launches.records, launches.fill
    current_stream, device, torchs = entry.current_stream, entry.device, entry.torchs
    address, elements = kind.address, kind.elements

    def run(objects, scalars, stream, more):
        tensors = objects
        if picks:
            tensors = pick(objects)
            if tensors is None:
                return False
        if not same(*tensors):
            return False
        sizes = tuple(map(elements, tensors if sized is None else sized(tensors)))
        if free is not None:
            sizes += free(tensors)
        key = sizes + scalars if scalars else sizes
        launch = known.get(key)
        if launch is None:
            launch = prepare(key, tensors, scalars)
            if launch is None:
                return False
        if not launch:
            return True
        addresses = list(map(address, tensors))
        if insert_at:
            addresses[insert_at:insert_at] = more.addresses
        if arrange is not None:
            addresses = arrange(addresses)
        bits = odd
        for number in addresses:
            if number < lowest:
                return False
            bits |= number
        if bits & 15 and misaligned(addresses):
            return False
        if written is not None:
            where = written(addresses) + sizes if varies else written(addresses)
            if where not in apart:
                check_apart(where, addresses, tensors)
        enqueue, failed, again, scratch, fields = launch
        try:
            record = records.pop()
        except IndexError:
            record = fill(None, fields)
        if record.fields is not fields:
            fill(record, fields)
        pack(record.buffer, 0, *addresses)
        if stream is None:
            stream = current_stream()
        elif torchs is not None and stream != torchs():
            streams.lend((*tensors, *more.tensors) if insert_at else tensors, stream, device)
        held = None
        if scratch is not None:
            held = streams.scratch(scratch.framework, device, scratch.size, stream)
            record.fill_tail(scratch.tail(held.__enter__()))
        try:
            enqueue(stream, record.address, 0)
        except failed:
            again(stream, record)
        finally:
            if held is not None:
                held.__exit__(None, None, None)
        records.append(record)
        if faults.debug:
            faults.after_call(stream, device)
        return True

    return run


# The writes of an engine's every layer, written out for their five tensors, of which the caches may
# be bound. What `_kernel_path` does with any number of them takes 0.7 us more.


def _write_path(entry, kind, same, launches, pointers, caches_bound):
    """`_kernel_path` of two sources, two caches and slots."""
    pack, misaligned, lowest = pointers.pack, pointers.misaligned, arrays.LOWEST
    apart, admits = pointers.apart, pointers.admits
    known, prepare = launches.known, launches.prepare
    records, fill = launches.records, launches.fill
    current_stream, device, torchs = entry.current_stream, entry.device, entry.torchs
    address, elements = kind.address, kind.elements

    def run(objects, scalars, stream, more):
        if not same(*objects):
            return False
        if caches_bound:
            key, value, slots = objects
            c, d = more.addresses
        else:
            key, value, key_cache, value_cache, slots = objects
            c, d = address(key_cache), address(value_cache)
            if (c, d) not in apart and not admits((c, d)):
                return False
        sizes = elements(key), elements(value), elements(slots), scalars
        launch = known.get(sizes)
        if launch is None:
            launch = prepare(sizes, objects, scalars)
            if launch is None:
                return False
        if not launch:
            return True
        a, b, e = address(key), address(value), address(slots)
        if a < lowest or b < lowest or e < lowest:
            return False
        if (a | b | e) & 15 and misaligned((a, b, c, d, e)):
            return False
        enqueue, failed, again, _, fields = launch
        try:
            record = records.pop()
        except IndexError:
            record = fill(None, fields)
        if record.fields is not fields:
            fill(record, fields)
        pack(record.buffer, 0, a, b, c, d, e)
        if stream is None:
            stream = current_stream()
        elif torchs is not None and stream != torchs():
            streams.lend((*objects, *more.tensors) if caches_bound else objects, stream, device)
        try:
            enqueue(stream, record.address, 0)
        except failed:
            again(stream, record)
        records.append(record)
        if faults.debug:
            faults.after_call(stream, device)
        return True

    return run


class _Pick:
    """Which of a call's objects are compared with the earlier call: all tensors, each once. The
    others are None, or one of these tensors again.

    twins : of each argument that is such a tensor again, its index and the place of that tensor.
    """

    def __init__(self, given, objects, unique):
        place = {id(objects[index]): at for at, index in enumerate(unique)}
        twins = [index for index in given if objects[index] is not None and index not in unique]
        self.twins = [(index, place[id(objects[index])]) for index in twins]
        self._absent = [given.index(index) for index in given if objects[index] is None]
        self._twins = [(given.index(index), at) for index, at in self.twins]
        self._take = _getter([given.index(index) for index in unique])
        self.needed = unique != given

    def pick(self, objects):
        """The tensors; None where it is not the same objects that are None, or given twice."""
        tensors = self._take(objects)
        for at in self._absent:
            if objects[at] is not None:
                return None
        for at, one in self._twins:
            if objects[at] is not tensors[one]:
                return None
        return tensors


class _Pointers:
    """Where the addresses of a call go in the kernel's parameters.

    insert_at : before which of the tensors' addresses those that are bound are inserted; 0 where
        none are bound.
    arrange : addresses, these included -> the same in the order of the arguments; None where that
        is their order.
    pack : writes them into a record.
    odd : 1 where the plan was made for addresses that are not all multiples of 16, else 0.
    written : addresses -> those of the arrays that are written; None where there is at most one.
    apart : results of ``written`` that were found to share no memory. Where
        ``written_rows_vary`` they end in what tells the extents of the call.
    """

    def __init__(self, op, entry, kind, objects, unique, twins, bound):
        self.insert_at = next((at for at, i in enumerate(unique) if bound and i > bound[0]), 0)
        if bound and not self.insert_at:
            self.insert_at = len(unique)
        order = [*unique[: self.insert_at], *bound, *unique[self.insert_at :]]
        sources = {index: at for at, index in enumerate(order)}
        sources |= {index: sources[unique[at]] for index, at in twins}
        everything = sorted(sources)
        self.arrange = None
        if order != everything:
            self.arrange = _getter([sources[index] for index in everything])
        letters = ["Q" if index in sources else "8x" for index in range(everything[-1] + 1)]
        self.pack = struct.Struct("<" + "".join(letters)).pack_into
        self._masks = [op.args[index].mask for index in everything]
        self._low = self._low_bits([kind.address(objects[index]) for index in everything])
        self.odd = int(any(self._low))
        self._entry, self._everything, self._unique = entry, everything, unique
        self._bound_shapes = {index: objects[index].shape for index in bound}
        self.apart, self.written, self.written_rows_vary = set(), None, False
        # What is bound was found to lie apart before.
        if entry.apart is not None and not all(
            i in bound for i in everything if op.args[i].written
        ):
            self.written = _getter([at for at, i in enumerate(everything) if op.args[i].written])
            self.written_rows_vary = entry.apart.varies

    def check_apart(self, where, addresses, tensors):
        """Raise where tensors that are written share memory."""
        values, shapes = [0] * (self._everything[-1] + 1), None
        for index, address in zip(self._everything, addresses):
            values[index] = address
        if self.written_rows_vary:
            shapes = [self._bound_shapes.get(index, ()) for index in range(len(values))]
            for index, tensor in zip(self._unique, tensors):
                shapes[index] = tensor.shape
        self._entry.apart.check(values, shapes)
        if len(self.apart) >= MAX_APART:
            self.apart.clear()
        self.apart.add(where)

    def admits(self, caches):
        """Whether a write's caches at these two addresses are placed as those that the plan was
        made for; raises where they share memory."""
        if min(caches) < arrays.LOWEST or arrays.any_bits(caches) & 15:
            return False
        self.check_apart(caches, (0, 0, *caches, 0), ())
        return True

    def _low_bits(self, addresses):
        return [address & mask for address, mask in zip(addresses, self._masks)]

    def misaligned(self, addresses):
        """Whether addresses are aligned otherwise than those that the plan was made for. It need
        not be asked of multiples of 16, unless ``odd``."""
        return self._low_bits(addresses) != self._low


def _getter(places):
    """What takes a tuple's items at ``places``, as a tuple."""
    if len(places) == 1:
        return lambda items: (items[places[0]],)
    return operator.itemgetter(*places) if places else lambda items: ()


class _Extents:
    """How the extents of a call are found: from the number of elements where only the first one
    varies, else from shapes and strides.

    Parameters
    ----------
    kind : guards.Kind
    parts : list of (dispatch.Arg, at, count)
        Of each argument the place of its first tensor, and how many tensors there are, None where
        it is no list; or, where calls give none, None and its extent, if it has one.
    tensors : list

    Attributes
    ----------
    sized : callable
        tensors -> those of which the number of elements is asked; None where that is all of them.
    free : callable
        tensors -> shapes and strides of the others; None where there are none.
    """

    def __init__(self, kind, parts, tensors):
        self._kind = kind
        self._parts = []  # and how many elements a row has, where they tell the extent
        whole, free, self._low = [], [], []
        for arg, at, count in parts:
            if not arg.varies:
                continue
            places = () if at is None else range(at, at + (1 if count is None else count))
            rows = arg.varies == arrays.ROWS
            one = rows and places and count is None
            self._parts.append((arg, at, count, math.prod(tensors[at].shape[1:]) if one else 0))
            if rows:
                whole += places
                continue
            free += places
            if not arg.index:
                self._low += [(arg, place, kind.low_bits(arg, tensors[place])) for place in places]
        self.sized = None if whole == list(range(len(tensors))) else _getter(whole)
        self.free = None
        strides = kind.strides
        if len(free) == 1:  # most often: a block table
            (one,) = free

            def shape_and_stride(tensors):
                tensor = tensors[one]
                return tensor.shape, strides(tensor)

            self.free = shape_and_stride
        elif free:

            def shapes_and_strides(tensors):
                return tuple([(tensors[at].shape, strides(tensors[at])) for at in free])

            self.free = shapes_and_strides

    def alike(self, tensors):
        """Whether the strides are aligned as the plan wants them."""
        for arg, at, low in self._low:
            if self._kind.low_bits(arg, tensors[at]) != low:
                return False
        return True

    def find(self, tensors):
        """What the operation's count gets."""
        extents, kind = [], self._kind
        for arg, at, count, elements in self._parts:
            if at is None:
                extents.append(count)
            elif elements:  # asked in half the time of a shape
                extents.append(kind.elements(tensors[at]) // elements)
            elif count is None:
                extents.append(kind.extent(arg, tensors[at]))
            else:
                extents.append([kind.extent(arg, tensor) for tensor in tensors[at : at + count]])
        return extents


# --- any plan of an operation with lists ----------------------------------------------------------


def flattened(op, args, objects, options):
    """``objects``, one for each of these arguments of ``op``, with what is in host memory read, all
    their tensors in one list, and the form of the call."""
    read, tensors, form = [], [], [options]
    for arg, value in zip(args, objects):
        if value is None:
            form.append(type(value))
        elif arg.layers:
            lists.require_list(op.name, arg.name, value)
            tensors += value
            form.append(len(value))
        elif arg.chosen and type(value := indices.read_host(op.name, arg, value)) is indices.Chosen:
            form.append(indices.Chosen)
        else:
            tensors.append(value)
            form.append(True)
        read.append(value)
    return read, tensors, tuple(form)


def _plan_path(op, entry, objects, options, given):
    """The fast path of any other plan: what is remembered is found without reading the arrays. What
    is bound must be lists; a call gives their addresses as ``fixed``."""
    bound = []
    if given is None:
        given = range(len(objects))
    else:
        bound = [i for i, value in enumerate(objects) if value is not None and i not in given]
    if entry.others or not all(op.args[index].layers for index in bound):
        return None
    given_args = [op.args[index] for index in given]
    _, tensors, form = flattened(op, given_args, [objects[index] for index in given], options)
    kind = guards.kind_of(tensors)
    if kind is None:
        return None
    # Of each argument: its index, the place of its first tensor or None, how many it lists or None.
    parts, args = [], []
    for index, arg, length in zip(given, given_args, form[1:]):
        if type(length) is type:  # absent, or in host memory
            parts.append((index, None, None))
        else:
            parts.append((index, len(args), None if length is True else length))
            args += [arg] * int(length)
    address, elements = kind.address, kind.elements
    same = kind.same_as(tensors, [arg.varies for arg in args])
    if same is None or arrays.any_bits(map(address, tensors)) & 15:
        return None
    extents = _Extents(kind, [(op.args[index], at, count) for index, at, count in parts], tensors)
    alike, find, sized, free = extents.alike, extents.find, extents.sized, extents.free
    if any(0 in tensor.shape[1:] for tensor in (tensors if sized is None else sized(tensors))):
        return None  # then the number of elements does not tell the rows
    varying = [index for index, _, _ in parts if op.args[index].varies]
    # Of what is chosen in host memory: the index of the argument, and the place of its extent.
    chosen = [
        (index, varying.index(index))
        for index, length in zip(given, form[1:])
        if length is indices.Chosen
    ]
    layered = [index for index, arg in enumerate(op.args) if arg.layers]
    # Addresses, and what was made of them: values, tables.
    latest = [None, None, None, None]

    def values_of(addresses, fixed):
        """The values of `plans.Call`, but for what is chosen in host memory; the plan's tables."""
        if arrays.any_bits(addresses) & 15 or min(addresses, default=arrays.LOWEST) < arrays.LOWEST:
            return None, None
        values = [0] * len(op.args)
        for index, at, count in parts:
            if count is not None:
                values[index] = tuple(addresses[at : at + count])
            elif at is not None:
                values[index] = addresses[at]
        for index, kept in zip(bound, fixed):
            values[index] = kept
        if entry.apart is not None:
            entry.apart.check(values)
        _, _, known, tables = latest
        if entry.tables is None:
            return values, None
        if known is None or any(known[index] != values[index] for index in layered):
            tables = entry.tables(values)
        return values, tables

    # What tells the extents; these; and what the operation's count made of them, where nothing else
    # decides that.
    latest_extents = [None, None, None]

    def run(tensors, scalars, stream, objects, fixed=()):
        if not same(*tensors):
            return False
        addresses = list(map(address, tensors))
        known, known_fixed, values, tables = latest
        if addresses != known or fixed != known_fixed:
            values, tables = values_of(addresses, fixed)
            if values is None:
                return False
            latest[:] = addresses, fixed, values, tables
        key = tuple(map(elements, tensors if sized is None else sized(tensors)))
        if free is not None:
            key += free(tensors)
        known, extents, work = latest_extents
        if key != known:
            if not alike(tensors):
                return False
            extents = find(tensors)
            work = None if chosen or scalars else op.work(extents, options, ())
            latest_extents[:] = key, extents, work
        if chosen:
            values, extents = values.copy(), extents.copy()
            for index, at in chosen:
                values[index] = objects[index].numbers
                extents[at] = values[index].shape[-1]
        if work is None or scalars:
            work = op.work(extents, options, scalars)
        op.finish(entry, values, tables, stream, work, objects)
        return True

    return run
