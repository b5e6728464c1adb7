# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Parameter structs: Python's side of the one ``struct Params`` that each kernel takes by value.

The driver copies exactly ``sizeof(Params)`` bytes from the host record at launch, without a check.
So `Struct.asserts` is compiled with every kernel: where a size or an offset here differs from that
in the ``.cu`` file, the compile fails, on any machine.
"""

import struct

# Field types: letter of `struct`, size, spelling in C++.
_TYPES = {
    "ptr": ("Q", 8),
    "i64": ("q", 8),
    "u64": ("Q", 8),
    "i32": ("i", 4),
    "u32": ("I", 4),
    "f32": ("f", 4),
    "f64": ("d", 8),
}


class Struct:
    """The fields of one kernel's ``Params``, in order.

    Parameters
    ----------
    per_call : str
        Fields written at every call, as ``"name:type name:type[count] …"``; they come first.
    constant : str
        Fields with the same values in all calls of a plan, in the same form.
    tail : str
        The last fields. Each call writes as many of their bytes as it needs: of an array, or of
        fields that only some calls have.
    """

    def __init__(self, per_call, constant="", tail=""):
        self._call, self.constant_at = _parse(per_call, 0)
        self._constant, self.tail_at = _parse(constant, self.constant_at)
        self._tail, end = _parse(tail, self.tail_at)
        self.size = -(-end // 8) * 8
        self.per_call = struct.Struct("<" + "".join(f.letters for f in self._call))
        # `struct`'s letters of each of the fields of a call.
        self.call_letters = tuple(f.letters for f in self._call)
        self.constant = struct.Struct("<" + "".join(f.letters for f in self._constant))

    def constants(self, values):
        """The constant fields' ``values``, given by name, in order; that of an array is a tuple."""
        if values.keys() != {field.name for field in self._constant}:
            raise ValueError(f"not the constant fields: {sorted(values)}")
        ordered = []
        for field in self._constant:
            value = values[field.name]
            ordered += value if isinstance(value, tuple) else (value,)
        return tuple(ordered)

    def record(self, *constants):
        """A zeroed record of ``size`` bytes with the constant fields filled in."""
        record = bytearray(self.size)
        self.constant.pack_into(record, self.constant_at, *constants)
        return bytes(record)

    def asserts(self, name):
        """C++ that refuses to compile unless struct ``name`` has this size and these offsets.

        NVRTC knows offsetof from some 13.x on; before, only the sizes are compared there. The tests
        compile every kernel with a compiler that knows it.
        """
        fields = self._call + self._constant + self._tail
        lines = [f'static_assert(sizeof({name}) == {self.size}, "size of {name}");']
        lines += ["#if __has_builtin(__builtin_offsetof)"]
        lines += [
            f"static_assert(__builtin_offsetof({name}, {f.name}) == {f.offset}, "
            f'"offset of {name}::{f.name}");'
            for f in fields
        ]
        return "\n".join([*lines, "#endif\n"])


class _Field:
    __slots__ = ("letters", "name", "offset")

    def __init__(self, name, letters, offset):
        self.name, self.letters, self.offset = name, letters, offset


def _parse(text, offset):
    fields = []
    for item in text.split():
        name, kind = item.split(":")
        kind, _, count = kind.rstrip("]").partition("[")
        letter, size = _TYPES[kind]
        if offset % size:
            raise ValueError(f"field {name} would need padding before it: reorder the fields")
        count = int(count or 1)
        fields.append(_Field(name, letter * count, offset))
        offset += size * count
    return fields, offset
