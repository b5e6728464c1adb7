# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Fast paths of plans that launch one kernel, with arguments that are single arrays.

Each statement of such a path is executed at each call of an engine's layers, so it is written out
for the arguments of its signature, as Python's own named tuples are: `_source` writes it. That
saves a write 0.8 us, and attention as much, over loops and tuples of any length.
"""

import functools
import itertools
import struct
import textwrap

from ...errors import CupyCacheError
from .. import arrays, faults, guards, launch, making, overlap, plans, streams
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
    first = {}  # of each argument, the first one that is the same tensor
    for index in present:
        first[index] = next(i for i in present if objects[i] is objects[index])
    unique = [index for index in present if first[index] == index]
    tensors = [objects[index] for index in unique]
    if not all(map(kind.elements, [*tensors, *new])):
        return None  # no rows can be computed from 0 elements
    same = kind.same_as(tensors, [op.args[index].varies for index in unique])
    if same is None:
        return None
    extents = _extents(op, kind, objects, unique, tensors)
    new = None if made is None else calls.New(op, kind, made)
    launches = _Launches(kind, same, extents, new, op, entry, options)
    pointers = _Pointers(op, entry, kind, objects, first, bound, made)
    source = _source(
        given=tuple(given), first=tuple(first.items()), bound=tuple(bound),
        made=None if made is None else op.result.at, checked=pointers.checked,
        varies=pointers.varies, odd=pointers.odd,
        scratch=type(entry.plan).scratch_for is not plans.KernelPlan.scratch_for,
    )  # fmt: skip
    return _factory(source)(
        launches=launches, find=launches.find, records=launches.records, fill=launches.fill,
        pack=pointers.pack, address=kind.address, lowest=arrays.LOWEST,
        misaligned=pointers.misaligned, apart=pointers.apart, admits=pointers.admits,
        current_stream=entry.current_stream, torchs=entry.torchs, device=entry.device,
        framework=kind.framework, faults=faults, launch=launch, making=making, streams=streams,
    )  # fmt: skip


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


@functools.lru_cache(maxsize=256)
def _factory(source):
    """The function that makes paths whose code is ``source``."""
    made = {}
    exec(compile(source, f"<{__name__}>", "exec"), made)
    return made["path_of"]


@functools.lru_cache(maxsize=256)
def _source(*, given, first, bound, made, checked, varies, odd, scratch):
    """The text of a function ``path_of``, whose keyword arguments are what a path needs, and which
    gives the path.

    Parameters
    ----------
    given : tuple
        The arguments of a call, by their indices.
    first : tuple of pairs
        Of each of them that is a tensor, the first one that is the same tensor. The others are
        None.
    bound : tuple
        The arguments whose addresses the `bound.Bound` has.
    made : int or None
        The argument that is the new result.
    checked : tuple
        The arguments that must share no memory; empty where no call can break that.
    varies : bool
        Whether the shapes of these vary.
    odd : bool
        Whether some addresses were no multiples of 16 when the plan was made.
    scratch : bool
        Whether some launches need scratch memory.
    """
    first = dict(first)
    unique = [index for index in given if first.get(index) == index]
    objects, tensors = (_listed("g", indices) for indices in (given, unique))
    others = [f"g{index} is not None" for index in given if index not in first]
    others += [f"g{i} is not g{one}" for i, one in first.items() if i != one]
    new = () if made is None else (made,)
    numbers = {i: f"a{i}" for i in (*unique, *bound, *new)}
    numbers |= {i: f"a{one}" for i, one in first.items()}
    addresses = ", ".join(numbers[index] for index in sorted(numbers))
    # Those of fixed shapes that must share no memory were looked at when they were admitted.
    fresh = [f"a{i}" for i in (*unique, *new) if varies or i not in checked]
    result = "made" if new else "None"

    code = [f"{objects} = objects"]
    if others:
        code += [f"if {' or '.join(others)}:", "    return False"]
    code += [
        "alike, known_scalars, found = launches.settled",
        f"if alike is None or scalars != known_scalars or not alike({tensors}):",
        f"    found = find(({tensors}), scalars)",
        "    if found is None:",
        "        return False",
        "enqueue, failed, shape, scratch, fields, sizes, new = found",
    ]
    if new:
        code += ["made = new()", f"a{made} = address(made)"]
    if not checked:
        code += ["if enqueue is None:", f"    return {result}"]
    code += [f"a{index} = address(g{index})" for index in unique]
    if bound:
        code += [f"{_listed('a', bound)} = caller.addresses"]
    if checked:
        where = "".join(f"{numbers[index]}, " for index in checked) + "sizes" * varies
        code += [
            f"where = {where}",
            f"if where not in apart and not admits(where, ({addresses},), ({tensors})):",
            "    return False",
            "if enqueue is None:",  # an empty tensor has no address
            f"    return {result}",
        ]
    if fresh:
        bits = "" if odd else f"({' | '.join(fresh)}) & 15 and "
        code += [
            f"if {' or '.join(f'{number} < lowest' for number in fresh)}:",
            "    return False",
            f"if {bits}misaligned(({addresses},)):",
            "    return False",
        ]
    code += [
        # Each thread takes a record, so that no other one fills it meanwhile.
        "try:",
        "    record = records.pop()",
        "except IndexError:",
        "    record = fill(None, fields, scratch)",
        "if record.fields is not fields:",
        "    fill(record, fields, scratch)",
        f"pack(record.buffer, 0, {addresses})",
        "if stream is None:",
        "    stream = current_stream()",
        "else:",
        "    if torchs is not None and stream != torchs():",
        f"        streams.lend(({tensors}{' *caller.tensors' if bound else ''}), stream, device)",
    ]
    if new:
        code += ["    making.hand_over(made, framework, device, stream)"]
    if scratch:
        code += [
            "held = None",
            "if scratch is not None:",
            "    held = streams.scratch(scratch.framework, device, scratch.size, stream)",
            '    record.tail[:8] = held.__enter__().to_bytes(8, "little")',
        ]
    code += [
        "try:",
        "    enqueue(stream, record.address, 0)",
        "except failed:",
        "    launch.launch_again(shape, stream, record)",
    ]
    if scratch:
        code += ["finally:", "    if held is not None:", "        held.__exit__(None, None, None)"]
    code += [
        "records.append(record)",
        "if faults.debug:",
        "    faults.after_call(stream, device)",
        f"return {result}",
    ]
    body = textwrap.indent("\n".join(code), "        ")
    return (
        "def path_of(*, launches, find, records, fill, pack, address, lowest, misaligned, apart,\n"
        "            admits, current_stream, torchs, device, framework, faults, launch, making,\n"
        "            streams):\n"
        f"    def path(objects, scalars, stream, caller):\n{body}\n    return path\n"
    )


def _listed(letter, indices):
    """Names in a row, each with a comma behind it."""
    return " ".join(f"{letter}{index}," for index in indices)


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
        self._fields_at = slice(
            at := 8 * len(op.args), at + struct.calcsize("<" + "".join(letters))
        )
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


class _Pointers:
    """The addresses of a call: their checks, and where they go in the kernel's parameters.

    pack : writes them into a record, in the order of the arguments.
    odd : whether the plan was made for addresses that are not all multiples of 16.
    checked : the written arguments that must share no memory, by their indices; empty where at most
        one of them is new at a call.
    varies : whether the shapes of these vary.
    apart : addresses of these that were admitted. Where their shapes vary, each tuple ends in what
        the call's extents were computed from.
    """

    def __init__(self, op, entry, kind, objects, first, bound, made):
        objects = list(objects)
        self._indices = sorted((*first, *bound))
        if made is not None:
            objects[op.result.at] = made
            self._indices = sorted((*self._indices, op.result.at))
        letters = ["Q" if i in self._indices else "8x" for i in range(self._indices[-1] + 1)]
        self.pack = struct.Struct("<" + "".join(letters)).pack_into
        self._masks = {index: op.args[index].mask for index in self._indices}
        addresses = {index: kind.address(objects[index]) for index in self._indices}
        self._low = {index: addresses[index] & mask for index, mask in self._masks.items()}
        self.odd = any(self._low.values())
        self._entry, self._first, self._laid_out = entry, first, kind.laid_out
        self._bound = {index: kind.laid_out(objects[index]) for index in bound}
        self.apart, self.checked, self.varies = set(), (), False
        # Arrays that are all bound were checked when they were. A new one has memory of its own.
        written = [i for i in (*first, *bound) if op.args[i].written]
        if entry.apart is not None and len(written) > 1 and not set(written) <= set(bound):
            self.checked, self.varies = tuple(sorted(written)), entry.apart.varies

    def admits(self, where, addresses, tensors):
        """Whether the arguments `checked` share no memory and, where their shapes are fixed, are
        aligned as the plan needs. Where not, the slow path raises or finds another plan."""
        found, laid = dict(zip(self._indices, addresses)), ()
        if self.varies:
            unique = [index for index, one in self._first.items() if index == one]
            known = dict(zip(unique, map(self._laid_out, tensors)))
            known |= self._bound | {index: known[one] for index, one in self._first.items()}
            laid = zip(*(known.get(index, ((), ())) for index in range(self._indices[-1] + 1)))
        elif any(
            found[i] < arrays.LOWEST or self._is_misaligned(i, found[i]) for i in self.checked
        ):
            return False
        values = [found.get(index, 0) for index in range(self._indices[-1] + 1)]
        try:
            self._entry.apart.check(values, *laid)
        except CupyCacheError:
            return False
        if len(self.apart) >= MAX_APART:
            self.apart.clear()
        self.apart.add(where)
        return True

    def _is_misaligned(self, index, address):
        return address & self._masks[index] != self._low[index]

    def misaligned(self, addresses):
        """Whether addresses have another alignment than the plan was made for. Multiples of 16 have
        not, unless ``odd``."""
        return any(map(self._is_misaligned, self._indices, addresses))
