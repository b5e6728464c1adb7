# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The fast path of a signature that comes again with arrays of torch or of CuPy on a GPU, as at
every layer and step of an engine. Both kinds of arrays are called tensors here.

One comparison tells whether a call has the signature (guards.py); then the tensors are asked for
nothing but their addresses and how many elements they have, and where these stay the same, for
their addresses alone (`_Calls`). There is one function for each signature (`_kernel_path`,
`_plan_path`), whatever the counts; the layers of a `PagedKVCache` share it.
"""

import abc
import itertools
import math
import operator
import struct

from ..errors import CupyCacheError
from . import arrays, faults, guards, indices, lists, overlap, plans, streams

MAX_PATHS = 8  # signatures of calls of one form
MAX_FORMS = 256
MAX_APART = 1024  # combinations of addresses
MAX_COUNTS = 256  # combinations of extents and scalars, of one signature
# Calls with the same extents in a row, after which one comparison tells them too: it takes 6 us to
# make, and saves a write 0.4.
SETTLED = 4
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


# --- what calls of a signature have in common -----------------------------------------------------


class _Calls(abc.ABC):
    """What calls of a signature come to, but for their addresses: told by their extents and
    scalars, and remembered.

    settled : (alike, scalars, what it comes to) of a call that came many times in a row, as at
        every layer of a step. ``alike(*tensors)`` tells whether tensors have its extents and
        strides too: one comparison, instead of the signature's and a question to each tensor.
        ``alike`` is None where no call is settled.

    Parameters
    ----------
    kind : guards.Kind
    same : callable
        As `guards.same_as` gives it, for the signature.
    extents : _Extents
    """

    def __init__(self, kind, same, extents):
        self._same, self._exactly, self._elements = same, kind.exactly, kind.elements
        self._extents, self._sized, self._free = extents, extents.sized, extents.free
        # {numbers of elements, shapes and strides, scalars: what they come to; or ``alike``}
        self._known, self._alike = {}, {}
        self._latest, self._repeats = None, 0
        self.settled = _UNSETTLED

    @abc.abstractmethod
    def make(self, extents, scalars, told):
        """What such a call comes to; None where it must go the long way. ``told``: the numbers of
        elements, shapes and strides that tell the extents."""

    def forget(self):
        """Make everything anew."""
        self._known.clear()
        self._alike.clear()
        self._latest, self.settled = None, _UNSETTLED

    def find(self, tensors, scalars):
        """What a call comes to; None where it has another signature."""
        if not self._same(*tensors):
            return None
        sized, free, freed = self._sized, self._free, ()
        key = sizes = tuple(map(self._elements, tensors if sized is None else sized(tensors)))
        if scalars:
            key += scalars
        if free is not None:
            freed = free(tensors)
            key += freed
        found = self._known.get(key)
        if found is None:
            extents = self._extents.find(sizes, freed)
            try:
                found = None if extents is None else self.make(extents, scalars, sizes + freed)
            except CupyCacheError:  # the long way tells it, by the name that was called
                found = None
            if found is None:
                return None
            if len(self._known) >= MAX_COUNTS:
                self._known.clear()
                self._alike.clear()
            self._known[key] = found
        if found is not self._latest:  # so calls that take turns are never settled
            self._latest, self._repeats, self.settled = found, 0, _UNSETTLED
            return found
        self._repeats += 1
        alike = self._alike.get(key)
        if alike is None and self._repeats == SETTLED:
            alike = self._alike[key] = self._exactly(tensors)
        if alike is not None:
            self.settled = alike, scalars, found
        return found


_UNSETTLED = None, None, None


# --- one kernel -----------------------------------------------------------------------------------


class _Launches(_Calls):
    """The launches of a signature. What a call comes to is (enqueue, errors, what to launch the
    long way at these errors, scratch, fields, what tells its extents); ``enqueue`` is None where
    there is nothing to do.

    records : parameters, each with the fields that it was filled with last. One in use by a thread
        must not be repacked by another: each takes one and puts it back.
    """

    def __init__(self, kind, same, extents, op, entry, options):
        super().__init__(kind, same, extents)
        self._op, self._options = op, options
        self._launcher, self._plan = entry.plan.launcher, entry.plan
        letters = self._launcher.kernel.params.call_letters[len(op.args) :]
        self._pack = struct.Struct("<" + "".join(letters)).pack_into
        self._fields_at = 8 * len(op.args)
        self._grids = {}  # {rows: (enqueue, errors, what to launch at these, scratch)}
        self.records = []
        overlap.prepared.add(self)

    def forget(self):
        """Prepare all launches anew."""
        self._grids.clear()
        super().forget()

    def make(self, extents, scalars, told):
        """The launch of a call; None where the kernel is not loaded yet."""
        rows, fields = self._op.work(extents, self._options, scalars)
        launch = _NOTHING
        if rows:
            launch = self._grids.get(rows) or self._of_grid(rows)
            if launch is None:
                return None
        return *launch, fields, told

    def _of_grid(self, rows):
        launcher, grid, threads = self._plan.launch_for(rows)
        if not launcher.has_work(grid, threads):
            return _NOTHING
        if not launcher.loaded:  # the calls before had no work: the long way loads it
            return None
        enqueue, failed = launcher.prepare(grid, threads)
        if len(self._grids) >= MAX_COUNTS:
            self._grids.clear()
        # Other threads may forget it at any time.
        made = self._grids[rows] = (
            enqueue, failed, (launcher, grid, threads), self._plan.scratch_for(rows)
        )  # fmt: skip
        return made

    def fill(self, record, fields):
        """A record with these fields: ``record``, or a new one for None."""
        if record is None:
            record = self._launcher.new_record()
        self._pack(record.buffer, self._fields_at, *fields)
        record.fields = fields
        return record


_NOTHING = None, None, None, None


def _again(shape, stream, record):
    """Launch the long way."""
    launcher, grid, threads = shape
    launcher.launch(grid, threads, stream, record)


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
    launches = _Launches(kind, same, extents, op, entry, options)
    sized = [at for at, index in enumerate(unique) if op.args[index].varies == arrays.ROWS]
    plain = not (pick.needed or extents.free or pointers.arrange or pointers.odd)
    if plain:
        if len(unique) == 3 and sized == [0, 1, 2] and pointers.insert_at == len(bound) == 2:
            return _write_path(entry, kind, launches, pointers, caches_bound=True)
        if len(unique) == 5 and sized == [0, 1, 4] and not bound:
            return _write_path(entry, kind, launches, pointers, caches_bound=False)
    # Every statement of `run` is one of every call: all that it needs is at hand.
    picks, pick = pick.needed, pick.pick
    insert_at, arrange, pack = pointers.insert_at, pointers.arrange, pointers.pack
    misaligned, odd, lowest = pointers.misaligned, pointers.odd, arrays.LOWEST
    written, varies = pointers.written, pointers.written_varies
    apart, check_apart = pointers.apart, pointers.check_apart
    find, records, fill = launches.find, launches.records, launches.fill
    current_stream, device, torchs = entry.current_stream, entry.device, entry.torchs
    address = kind.address

    def run(objects, scalars, stream, more):
        tensors = objects
        if picks:
            tensors = pick(objects)
            if tensors is None:
                return False
        alike, of, launch = launches.settled
        if alike is None or scalars != of or not alike(*tensors):
            launch = find(tensors, scalars)
            if launch is None:
                return False
        enqueue, failed, shape, scratch, fields, told = launch
        if enqueue is None and written is None:
            return True
        addresses = list(map(address, tensors))
        if insert_at:
            addresses[insert_at:insert_at] = more.addresses
        if arrange is not None:
            addresses = arrange(addresses)
        if written is not None:
            where = (*written(addresses), told) if varies else written(addresses)
            if where not in apart and not check_apart(where, addresses, tensors):
                return False
            if enqueue is None:  # what is empty has no address
                return True
        bits = odd
        for number in addresses:
            if number < lowest:
                return False
            bits |= number
        if bits & 15 and misaligned(addresses):
            return False
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
            _again(shape, stream, record)
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


def _write_path(entry, kind, launches, pointers, caches_bound):
    """`_kernel_path` of two sources, two caches and slots."""
    pack, misaligned, lowest = pointers.pack, pointers.misaligned, arrays.LOWEST
    apart, admits = pointers.apart, pointers.admits
    find, records, fill = launches.find, launches.records, launches.fill
    current_stream, device, torchs = entry.current_stream, entry.device, entry.torchs
    address = kind.address

    def run(objects, scalars, stream, more):
        alike, of, launch = launches.settled
        if alike is None or scalars != of or not alike(*objects):
            launch = find(objects, scalars)
            if launch is None:
                return False
        if caches_bound:
            key, value, slots = objects
            c, d = more.addresses
        else:
            key, value, key_cache, value_cache, slots = objects
            c, d = address(key_cache), address(value_cache)
            if (c, d) not in apart and not admits((c, d)):
                return False
        enqueue, failed, shape, _, fields, _ = launch
        if enqueue is None:
            return True
        a, b, e = address(key), address(value), address(slots)
        if a < lowest or b < lowest or e < lowest:
            return False
        if (a | b | e) & 15 and misaligned((a, b, c, d, e)):
            return False
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
            _again(shape, stream, record)
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
        ``written_varies`` they end in what tells the call's extents.
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
        self._entry, self._everything = entry, everything
        self._unique, self._twins = unique, twins
        self._laid_out = kind.laid_out
        self._bound = {index: kind.laid_out(objects[index]) for index in bound}
        self.apart, self.written, self.written_varies = set(), None, False
        # What is bound was found to lie apart before.
        if entry.apart is not None and not all(
            i in bound for i in everything if op.args[i].written
        ):
            self.written = _getter([at for at, i in enumerate(everything) if op.args[i].written])
            self.written_varies = entry.apart.varies

    def check_apart(self, where, addresses, tensors):
        """Whether tensors that are written share no memory; where they do, the long way tells."""
        values, laid = [0] * (self._everything[-1] + 1), ()
        for index, address in zip(self._everything, addresses):
            values[index] = address
        if self.written_varies:
            known = self._bound | dict(zip(self._unique, map(self._laid_out, tensors)))
            known |= {index: known[self._unique[at]] for index, at in self._twins}
            laid = zip(*(known.get(index, ((), ())) for index in range(len(values))))
        try:
            self._entry.apart.check(values, *laid)
        except CupyCacheError:
            return False
        if len(self.apart) >= MAX_APART:
            self.apart.clear()
        self.apart.add(where)
        return True

    def admits(self, caches):
        """Whether a write's caches at these two addresses are placed as those that the plan was
        made for, and share no memory."""
        if min(caches) < arrays.LOWEST or arrays.any_bits(caches) & 15:
            return False
        return self.check_apart(caches, (0, 0, *caches, 0), ())

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
        tensors -> (shape, strides) of each of the others; None where there are none.
    """

    def __init__(self, kind, parts, tensors):
        # Of each argument that varies: where in the sizes or the shapes it begins, None where
        # calls do not give it; how many tensors, as in ``parts``; and of sizes how many elements a
        # row has, of shapes 0.
        self._parts = []
        sized, free = [], []
        for arg, at, count in parts:
            if not arg.varies:
                continue
            if at is None:
                self._parts.append((None, count, 0))
                continue
            rows = arg.varies == arrays.ROWS
            into = sized if rows else free
            self._parts.append((len(into), count, math.prod(tensors[at].shape[1:]) if rows else 0))
            into += [(arg, place) for place in range(at, at + (1 if count is None else count))]
        places = [at for _, at in sized]
        self.sized = None if places == list(range(len(tensors))) else _getter(places)
        self.free = _shapes_and_strides(kind, [at for _, at in free]) if free else None
        self._units = [kind.unit(tensors[at]) for _, at in free]
        # Where a plan cares for the alignment of strides that vary: which of `free`, the bytes from
        # element to element, how many of its strides, and their low bits.
        self._low = []
        freed = () if self.free is None else self._in_bytes(self.free(tensors))
        for at, (arg, place) in enumerate(free):
            if not arg.index:
                step, last = kind.step(tensors[place]) * self._units[at], max(arg.varies)
                self._low.append((at, step, last, _low_bits(*freed[at], step, last)))

    def find(self, sizes, freed):
        """What the operation's count gets, of the numbers of elements of `sized` and of what `free`
        gives; None where strides are aligned otherwise than the plan wants."""
        freed = freed and self._in_bytes(freed)
        for at, step, last, low in self._low:
            if _low_bits(*freed[at], step, last) != low:
                return None
        extents = []
        for at, count, elements in self._parts:
            if at is None:
                extents.append(count)
            elif elements:
                if count is None:
                    extents.append(sizes[at] // elements)
                else:
                    extents.append([size // elements for size in sizes[at : at + count]])
            elif count is None:
                extents.append(freed[at])
            else:
                extents.append(freed[at : at + count])
        return extents

    def _in_bytes(self, freed):
        """What `free` gives as tuples, with strides in bytes."""
        return [
            (tuple(shape), arrays.meant(shape, strides, unit))
            for (shape, strides), unit in zip(freed, self._units)
        ]


def _low_bits(shape, strides, step, last):
    """What the alignment of the first ``last`` strides means to a plan."""
    return arrays.any_bits(arrays.regular(shape, strides, step)[:last]) & 15


def _shapes_and_strides(kind, places):
    """What gives (shape, strides) of each of the tensors at ``places``."""
    strides = kind.strides
    if len(places) > 1:
        return lambda tensors: tuple([(tensors[at].shape, strides(tensors[at])) for at in places])
    (one,) = places  # most often: a block table

    def shape_and_strides(tensors):
        tensor = tensors[one]
        return ((tensor.shape, strides(tensor)),)

    return shape_and_strides


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


class _Works(_Calls):
    """What calls of a signature come to: extents, and what the operation's count made of them; None
    where more than these decide that."""

    def __init__(self, kind, same, extents, op, options, chosen):
        super().__init__(kind, same, extents)
        self._op, self._options, self._chosen = op, options, chosen

    def make(self, extents, scalars, told):
        """(Extents, work) of a call."""
        work = None if self._chosen else self._op.work(extents, self._options, scalars)
        return extents, work


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
    address = kind.address
    same = kind.same_as(tensors, [arg.varies for arg in args])
    if same is None or arrays.any_bits(map(address, tensors)) & 15:
        return None
    extents = _Extents(kind, [(op.args[index], at, count) for index, at, count in parts], tensors)
    sized = extents.sized
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

    works = _Works(kind, same, extents, op, options, bool(chosen))
    find = works.find

    def run(tensors, scalars, stream, objects, fixed=()):
        alike, of, found = works.settled
        if alike is None or scalars != of or not alike(*tensors):
            found = find(tensors, scalars)
            if found is None:
                return False
        addresses = list(map(address, tensors))
        known, known_fixed, values, tables = latest
        if addresses != known or fixed != known_fixed:
            values, tables = values_of(addresses, fixed)
            if values is None:
                return False
            latest[:] = addresses, fixed, values, tables
        extents, work = found
        if chosen:
            values, extents = values.copy(), extents.copy()
            for index, at in chosen:
                values[index] = objects[index].numbers
                extents[at] = values[index].shape[-1]
            work = op.work(extents, options, scalars)
        op.finish(entry, values, tables, stream, work, objects)
        return True

    return run
