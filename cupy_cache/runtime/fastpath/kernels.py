# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Fast paths of plans that launch one kernel, with arguments that are single arrays."""

import itertools
import struct

from ...errors import CupyCacheError
from .. import arrays, faults, guards, launch, making, overlap, streams
from . import calls

MAX_APART = 1024  # combinations of addresses


def path_of(op, entry, objects, options, made, given):
    """The fast path of a `plans.KernelPlan`; None where there is none. See `FastPaths.learn`."""
    given = list(range(len(objects)) if given is None else given)
    bound = [i for i, value in enumerate(objects) if value is not None and i not in given]
    present = [index for index in given if objects[index] is not None]
    new = [] if made is None else [made]
    kind = guards.kind_of([*(objects[index] for index in (*present, *bound)), *new])
    if entry.others or kind is None:
        return None
    # torch's comparison refuses a tensor that is given twice: it gets each tensor once.
    unique = []
    for index in present:
        if not any(objects[index] is objects[other] for other in unique):
            unique.append(index)
    tensors = [objects[index] for index in unique]
    if not all(map(kind.elements, [*tensors, *new])):
        return None  # no rows can be computed from 0 elements
    same = kind.same_as(tensors, [op.args[index].varies for index in unique])
    if same is None:
        return None
    distinct = _Unique(given, objects, unique)
    pointers = _Pointers(op, entry, kind, objects, unique, distinct.arguments, bound, made)
    extents = _extents(op, kind, objects, unique, tensors)
    new = None if made is None else calls.New(op, kind, made)
    launches = _Launches(kind, same, extents, new, op, entry, options)
    if not (distinct.needed or extents.free or pointers.arrange or pointers.odd):
        sized = [at for at, index in enumerate(unique) if op.args[index].varies == arrays.ROWS]
        if len(unique) == 3 and sized == [0, 1, 2] and pointers.insert_at == len(bound) == 2:
            return _write_path(entry, kind, launches, pointers, caches_bound=True)
        if len(unique) == 5 and sized == [0, 1, 4] and not bound:
            return _write_path(entry, kind, launches, pointers, caches_bound=False)
    return _any_path(entry, kind, launches, pointers, distinct)


def _extents(op, kind, objects, unique, tensors):
    """The `calls.Extents` of calls that give ``tensors``, the arguments ``unique``."""
    places = {id(objects[index]): at for at, index in enumerate(unique)}
    parts = []
    for arg, value in itertools.zip_longest(op.args, objects):
        at = places.get(id(value))
        # All that varies of a bound array is its number of rows.
        is_bound = at is None and value is not None and arg.varies == arrays.ROWS
        parts.append((arg, at, value.shape[0] if is_bound else None))
    return calls.Extents(kind, parts, tensors)


def _any_path(entry, kind, launches, pointers, distinct):
    """The path of any signature.

    Each statement of `run` is executed at each call: what it needs is in local variables, and no
    step is a function of its own."""
    picks, take, absent, twins = distinct.needed, distinct.take, distinct.absent, distinct.twins
    insert_at, arrange, pack = pointers.insert_at, pointers.arrange, pointers.pack
    misaligned, odd, above = pointers.misaligned, pointers.odd, kind.above
    written, varies = pointers.written, pointers.written_varies
    apart, check_apart = pointers.apart, pointers.check_apart
    find, records, fill = launches.find, launches.records, launches.fill
    current_stream, device, torchs = entry.current_stream, entry.device, entry.torchs
    address, framework = kind.address, kind.framework

    def run(objects, scalars, stream, caller):
        tensors = objects
        if picks:
            tensors = take(objects)
            for at in absent:
                if objects[at] is not None:
                    return False
            for at, one in twins:
                if objects[at] is not tensors[one]:
                    return False
        alike, settled_scalars, found = launches.settled
        if alike is None or scalars != settled_scalars or not alike(*tensors):
            found = find(tensors, scalars)
            if found is None:
                return False
        enqueue, failed, shape, scratch, fields, sizes, new = found
        made = None if new is None else new()
        if enqueue is None and written is None:
            return made
        # The addresses, in order, and their checks.
        addresses = list(map(address, tensors))
        if insert_at:
            addresses[insert_at:insert_at] = caller.addresses
        if made is not None:
            addresses.append(address(made))
        if arrange is not None:
            addresses = arrange(addresses)
        if written is not None:
            where = (*written(addresses), sizes) if varies else written(addresses)
            if where not in apart and not check_apart(where, addresses, tensors):
                return False
            if enqueue is None:  # an empty tensor has no address
                return made
        bits, is_low = odd, False
        for number in addresses:
            if number < above:
                is_low = True
            bits |= number
        if is_low and arrays.doubtful(addresses, tensors):
            return False
        if bits & 15 and misaligned(addresses):
            return False
        # The parameters, the stream, the launch.
        try:
            record = records.pop()
        except IndexError:
            record = fill(None, fields, scratch)
        if record.fields is not fields:
            fill(record, fields, scratch)
        pack(record.buffer, 0, *addresses)
        if stream is None:
            stream = current_stream()
        else:
            if torchs is not None and stream != torchs():
                streams.lend((*tensors, *caller.tensors) if insert_at else tensors, stream, device)
            if made is not None:
                making.hand_over(made, framework, device, stream)
        held = None
        if scratch is not None:
            held = streams.scratch(scratch.framework, device, scratch.size, stream)
            record.tail[:8] = held.__enter__().to_bytes(8, "little")
        try:
            enqueue(stream, record.address, 0)
        except failed:
            launch.launch_again(shape, stream, record)
        finally:
            if held is not None:
                held.__exit__(None, None, None)
        records.append(record)
        if faults.debug:
            faults.after_call(stream, device)
        return made

    return run


def _write_path(entry, kind, launches, pointers, caches_bound):
    """The path of a write of keys and values: two sources, two caches and slots, and the caches may
    be bound.

    It does what `_any_path` does, written out for five tensors: that saves 0.7 us at every layer of
    an engine."""
    pack, misaligned, above = pointers.pack, pointers.misaligned, kind.above
    apart, admits = pointers.apart, pointers.admits
    find, records, fill = launches.find, launches.records, launches.fill
    current_stream, device, torchs = entry.current_stream, entry.device, entry.torchs
    address = kind.address

    def run(objects, scalars, stream, caller):
        alike, settled_scalars, found = launches.settled
        if alike is None or scalars != settled_scalars or not alike(*objects):
            found = find(objects, scalars)
            if found is None:
                return False
        if caches_bound:
            key, value, slots = objects
            c, d = caller.addresses
        else:
            key, value, key_cache, value_cache, slots = objects
            c, d = address(key_cache), address(value_cache)
            if (c, d) not in apart and not admits((c, d), objects):
                return False
        enqueue, failed, shape, _, fields, _, _ = found
        if enqueue is None:
            return None
        a, b, e = address(key), address(value), address(slots)
        if (a < above or b < above or e < above) and arrays.doubtful((a, b, e), objects):
            return False
        if (a | b | e) & 15 and misaligned((a, b, c, d, e)):
            return False
        try:
            record = records.pop()
        except IndexError:
            record = fill(None, fields, None)
        if record.fields is not fields:
            fill(record, fields, None)
        pack(record.buffer, 0, a, b, c, d, e)
        if stream is None:
            stream = current_stream()
        elif torchs is not None and stream != torchs():
            streams.lend((*objects, *caller.tensors) if caches_bound else objects, stream, device)
        try:
            enqueue(stream, record.address, 0)
        except failed:
            launch.launch_again(shape, stream, record)
        records.append(record)
        if faults.debug:
            faults.after_call(stream, device)
        return None

    return run


class _Launches(calls.Results):
    """The launches of a signature. A result is (enqueue, failed, shape, scratch, fields, sizes,
    new): a launch of `launch.Launches`; the `plans.Scratch`; the bytes of the kernel's fields that
    the operation's count gave; what the extents were computed from; and a function that makes the
    operation's result, None where calls give it.

    records : filled parameter records, each with the fields that it has. A thread takes one and
        puts it back, so that no other thread fills it meanwhile.
    """

    def __init__(self, kind, same, extents, new, op, entry, options):
        super().__init__(kind, same, extents, new)
        self._op, self._options = op, options
        self._launcher, self._plan = entry.plan.launcher, entry.plan
        letters = self._launcher.kernel.params.call_letters[len(op.args) :]
        self._pack = struct.Struct("<" + "".join(letters)).pack
        at = 8 * len(op.args)
        self._fields_at = slice(at, at + struct.calcsize("<" + "".join(letters)))
        self._launches = launch.Launches(self._plan.launch_for)
        self.records = []
        overlap.prepared.add(self)

    def forget(self):
        """Forget all launches, which then are prepared anew."""
        self._launches.forget()
        super().forget()

    def make(self, extents, scalars, sizes, new):
        """The launch of a call; None where the kernel is not loaded yet."""
        rows, fields = self._op.count(extents, self._options, scalars)
        if not rows:
            return None, (), None, None, b"", sizes, new
        prepared = self._launches.known(rows) or self._launches.prepare(rows)
        if prepared is None:  # earlier calls had no work: the slow path loads it
            return None
        scratch = None if prepared[0] is None else self._plan.scratch_for(rows)
        return *prepared, scratch, self._pack(*fields), sizes, new

    def fill(self, record, fields, scratch):
        """Write these fields, and what a `plans.Scratch` has behind its address, into a record, a
        new one if it is None."""
        if record is None:
            record = self._launcher.new_record()
        record.bytes[self._fields_at] = fields
        if scratch is not None:
            record.tail[8 : 8 + len(scratch.rest)] = scratch.rest
        record.fields = fields
        return record


class _Unique:
    """What takes from a call's objects each tensor once.

    needed : False where the objects are these tensors.
    take : objects -> the tensors.
    absent : where among the objects None must be.
    twins : (where among the objects, place of the tensor) of each that must be a tensor again.
    """

    def __init__(self, given, objects, unique):
        place = {id(objects[index]): at for at, index in enumerate(unique)}
        twins = [index for index in given if objects[index] is not None and index not in unique]
        self.arguments = [(index, place[id(objects[index])]) for index in twins]
        self.absent = [given.index(index) for index in given if objects[index] is None]
        self.twins = [(given.index(index), at) for index, at in self.arguments]
        self.take = calls.getter([given.index(index) for index in unique])
        self.needed = unique != given


class _Pointers:
    """The addresses of a call: their checks, and where they go in the kernel's parameters.

    insert_at : where among the tensors' addresses those of bound arrays are inserted; 0 where no
        array is bound.
    arrange : puts the addresses, bound ones included, in the order of the arguments; None where
        they have it.
    pack : writes them into a record.
    odd : 1 where the plan was made for addresses that are not all multiples of 16, else 0.
    written : addresses -> those of the arrays that the kernel writes; None where at most one of
        these is new at a call.
    written_varies : whether the shapes of these arrays vary.
    apart : results of ``written`` that were checked: the arrays share no memory. Where
        ``written_varies``, each ends in what the call's extents were computed from.
    """

    def __init__(self, op, entry, kind, objects, unique, twins, bound, made):
        self.insert_at = next((at for at, i in enumerate(unique) if bound and i > bound[0]), 0)
        if bound and not self.insert_at:
            self.insert_at = len(unique)
        objects = list(objects)
        order = [*unique[: self.insert_at], *bound, *unique[self.insert_at :]]
        if made is not None:
            objects[op.result.at] = made
            order.append(op.result.at)
        sources = {index: at for at, index in enumerate(order)}
        sources |= {index: sources[unique[at]] for index, at in twins}
        everything = sorted(sources)
        self.arrange = None
        if order != everything:
            self.arrange = calls.getter([sources[index] for index in everything])
        letters = ["Q" if index in sources else "8x" for index in range(everything[-1] + 1)]
        self.pack = struct.Struct("<" + "".join(letters)).pack_into
        self._masks = [op.args[index].mask for index in everything]
        self._low = self._low_bits([kind.address(objects[index]) for index in everything])
        self.odd = int(any(self._low))
        self._entry, self._everything = entry, everything
        self._unique, self._twins = unique, twins
        self._laid_out, self._above = kind.laid_out, kind.above
        self._bound = {index: kind.laid_out(objects[index]) for index in bound}
        self.apart, self.written, self.written_varies = set(), None, False
        # Arrays that are all bound were checked when they were. A new one has memory of its own.
        written = [i for i in everything if op.args[i].written]
        if made is not None:
            written.remove(op.result.at)
        if entry.apart is not None and len(written) > 1 and not set(written) <= set(bound):
            self.written = calls.getter([everything.index(i) for i in written])
            self.written_varies = entry.apart.varies

    def check_apart(self, where, addresses, tensors):
        """Whether the written tensors share no memory. Where they do, the slow path raises."""
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

    def admits(self, caches, tensors):
        """Whether caches at these two addresses, which are among a call's tensors, are aligned as
        the plan needs, and share no memory."""
        if arrays.any_bits(caches) & 15:
            return False
        if min(caches) < self._above and arrays.doubtful(caches, tensors):
            return False
        return self.check_apart(caches, (0, 0, *caches, 0), ())

    def _low_bits(self, addresses):
        return [address & mask for address, mask in zip(addresses, self._masks)]

    def misaligned(self, addresses):
        """Whether addresses have another alignment than the plan was made for. Multiples of 16 have
        not, unless ``odd``."""
        return self._low_bits(addresses) != self._low
