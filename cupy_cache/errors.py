# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Everything this library raises.

Each class also derives from the built-in that fits, so ``except ValueError`` keeps working.

Messages have one form. Of an argument: ``op: Invalid <what> of <argument>: expected …, got …``. Of
what else fails: ``op on cuda:0: what failed: why``. Where there is a usual way out, it follows a
semicolon.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple


class _Wrong(NamedTuple):
    """What is wrong with an argument; as a string, the message."""

    op: str
    what: str
    argument: str
    expected: str
    got: str
    way_out: str

    def __str__(self) -> str:
        op = f"{self.op}: " if self.op else ""
        text = f"{op}Invalid {self.what} of {self.argument}: expected {self.expected}"
        return f"{text}, got {self.got}" + (f"; {self.way_out}" if self.way_out else "")


class CupyCacheError(Exception):
    """Base of every error raised here."""

    _on_gpus_alone = False  # whether the CPU takes what is refused
    _wrong: _Wrong | None = None


def wrong(
    what: str,
    name: str,
    expected: object,
    got: object,
    way_out: str = "",
    error: type[CupyCacheError] | None = None,
) -> CupyCacheError:
    """The error about an argument; ``name`` is "operation: argument". Its class is that of ``what``
    is wrong, if no other is given."""
    op, _, argument = name.rpartition(": ")
    found = _Wrong(op, what, argument, in_a_line(expected), in_a_line(got), way_out)
    made = (error or _CLASSES[what])(str(found))
    made._wrong = found
    return made


def shown(value: object) -> str:
    """``value`` as errors show it: as Python does, but in one line, and shortened. Of an array that
    may be on a GPU, or nowhere, no number is read: that would wait for the GPU, and break a
    capture."""
    text = in_a_line(value, _text)
    return text if len(text) <= 80 else f"{text[:77]}..."


def in_a_line(value: object, show: Callable[[Any], str] = str) -> str:
    """What ``show`` makes of a value, in one line, also if it cannot show itself: an integer of
    thousands of digits cannot."""
    try:
        return " ".join(line.strip() for line in show(value).splitlines())
    except Exception:
        return f"an object of type {type(value).__name__}"


def _text(value: Any) -> str:
    if type(value) in (list, tuple):
        items = [_text(item) for item in value[:MOST_SHOWN]]  # longer text is cut
        text = ", ".join(items)
        if type(value) is list:
            return f"[{text}]"
        return f"({text},)" if len(items) == 1 else f"({text})"
    for module, name in (("torch", "Tensor"), ("cupy", "ndarray")):
        if issubclass(type(value), getattr(sys.modules.get(module), name, ())):
            return f"a {module}.{name} of shape {list(value.shape)}, {value.dtype}"
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    if package != "numpy" and hasattr(kind, "__dlpack__"):  # such as JAX's
        return f"a {package}.{kind.__name__} of shape {list(value.shape)}, {value.dtype}"
    return repr(value)


MOST_SHOWN = 40  # items of a list


def counted(number: int, noun: str, plural: str = "") -> str:
    """So many of what ``noun`` calls one of: "1 dimension", "3 dimensions". ``plural``: the word
    for several, where an s does not make it."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def below(limit: int, what: str = "") -> str:
    """What errors expect of a number of ``what``, of which there are ``limit``."""
    if limit <= 0:
        return f"no {what or 'number'}, as there are none"
    return f"{what} in 0..{limit - 1}" if what else f"0..{limit - 1}"


def rename(error: CupyCacheError, name: str, arguments: Mapping[str, str]) -> None:
    """Make an error about an argument of an operation one of ``name``, which called it.
    ``arguments`` has what the operation's are called there. Faults stay the operation's."""
    found = error._wrong
    if found is not None:
        argument, bracket, index = found.argument.partition("[")
        argument = f"{arguments.get(argument, argument)}{bracket}{index}"
        expected, got = (_renamed(text, arguments) for text in (found.expected, found.got))
        error._wrong = found._replace(op=name, argument=argument, expected=expected, got=got)
        error.args = (str(error._wrong),)


def _renamed(text: str, arguments: Mapping[str, str]) -> str:
    """``text`` with the other arguments in it as they are called there. A name that is also a word,
    such as "key", stays."""

    def called(found: re.Match[str]) -> str:
        name = found[0]
        return arguments.get(name, name) if "_" in name or name in ("src", "dst") else name

    return re.sub(r"\w+", called, text)


@contextlib.contextmanager
def renamed(name: str, arguments: Mapping[str, str]) -> Iterator[None]:
    """`rename` errors that are raised meanwhile."""
    try:
        yield
    except CupyCacheError as error:
        rename(error, name, arguments)
        raise


@contextlib.contextmanager
def on_gpus_alone() -> Iterator[None]:
    """Mark errors that are raised meanwhile as those of kernels: the CPU takes what they refuse."""
    try:
        yield
    except CupyCacheError as error:
        error._on_gpus_alone = True
        raise


class ArgumentError(CupyCacheError, ValueError):
    """An argument is wrong; nothing was written."""


class ShapeError(ArgumentError):
    """Wrong rank or extent."""


class StrideError(ArgumentError, RuntimeError):
    """The memory of an array is not laid out as the operation needs it."""


class DeviceError(ArgumentError, RuntimeError):
    """Arrays live on different devices, or on one the operation cannot use."""


class DTypeError(CupyCacheError, TypeError):
    """Wrong element type, or an object that is no array at all; nothing was written."""


class NotWritableError(ArgumentError):
    """A destination is read-only, or could only be written in a copy."""


# The class of each thing that can be wrong with an argument.
_CLASSES: dict[str, type[CupyCacheError]] = {
    **dict.fromkeys(("value", "kind", "memory", "order"), ArgumentError),
    **dict.fromkeys(("type", "dtype", "framework"), DTypeError),
    **dict.fromkeys(("shape", "length", "size", "layout"), ShapeError),
    **dict.fromkeys(("strides", "address"), StrideError),
    "device": DeviceError,
    "access": NotWritableError,
}


class CopyError(CupyCacheError, TypeError):
    """An object cannot be copied or pickled: it holds memory by its address."""


class MissingDependencyError(CupyCacheError, ImportError):
    """CUDA, CuPy, NVRTC or the CUDA runtime headers are needed and absent."""


class KernelError(CupyCacheError, RuntimeError):
    """A kernel could not be compiled, loaded or launched."""


class UnsupportedArchitectureError(KernelError):
    """The installed NVRTC cannot compile for this GPU."""


class CaptureError(KernelError):
    """A kernel met for the first time could not be loaded while a CUDA graph is captured."""


class OutOfBlocksError(CupyCacheError, MemoryError):
    """Fewer blocks are free than are needed; nothing was changed.

    Attributes
    ----------
    op : str
        What needed them.
    needed, free, num_blocks : int
        How many are needed, how many are free, and how many there are in all.
    """

    op: str
    needed: int
    free: int
    num_blocks: int

    def __init__(
        self,
        op: str,
        needed: int,
        free: int,
        num_blocks: int,
        way_out: str = "free a sequence, or swap one out",
    ) -> None:
        self.op, self.needed, self.free, self.num_blocks = op, needed, free, num_blocks
        self._way_out = way_out
        super().__init__(
            f"{op}: out of blocks: {needed} are needed, and {free} of {num_blocks} are free; "
            f"{way_out}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        given = self.op, self.needed, self.free, self.num_blocks, self._way_out
        return type(self), given, self.__dict__


class FaultError(CupyCacheError, IndexError):
    """Kernels met slots, block numbers or table entries outside their bounds.

    ``faults`` lists one `Fault` for each specialisation that recorded one (the first it met).
    """

    faults: tuple[Fault, ...]

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in self.faults))

    def __reduce__(self) -> tuple[Any, ...]:
        # Not from the message, as exceptions do: copies and other processes get the faults.
        return type(self), (self.faults,), self.__dict__


class Fault:
    """One recorded violation: the number was not followed, nothing outside the arrays was read or
    written. What counted in its place, if anything, is in the operation's notes.

    Attributes
    ----------
    op : str
        The operation.
    argument : str
        What held the bad value.
    row : int
        Which token, pair or output row it belongs to.
    value : int
        The value found.
    limit : int
        The exclusive upper bound it had to obey (the lower one is 0).
    device : str
        Where it happened.
    """

    __slots__ = ("argument", "device", "limit", "op", "row", "value")

    op: str
    argument: str
    row: int
    value: int
    limit: int
    device: str

    def __init__(
        self, op: str, argument: str, row: int, value: int, limit: int, device: str
    ) -> None:
        self.op, self.argument, self.row = op, argument, row
        self.value, self.limit, self.device = value, limit, device

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.op, self.argument, self.row, self.value, self.limit, self.device
        return type(self), fields

    def __eq__(self, other: object) -> bool:
        return self.__reduce__() == other.__reduce__() if type(other) is Fault else NotImplemented

    def __hash__(self) -> int:
        return hash(self.__reduce__())

    def __repr__(self) -> str:
        return f"<Fault {self}>"

    def __str__(self) -> str:
        got, way_out = f"{self.value} in row {self.row} on {self.device}", "it was not followed"
        return str(_Wrong(self.op, "value", self.argument, below(self.limit), got, way_out))
