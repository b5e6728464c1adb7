# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Checks of one call's arrays against named sizes, with errors that say what to mend.

A `Contract` checks the arguments of one new signature, one after the other, and is dropped. That
happens once for a signature, so it may be thorough.
"""

import collections.abc
import math
import numbers
import operator

import numpy as np

from .. import errors
from . import arrays, formats

# What a float32 can hold without becoming zero or infinite.
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-149, 2.0**128 - 2.0**104
SMALLEST_NORMAL = 2.0**-126  # what is smaller counts as 0 in a kernel's sums and products

# How operations spell the shapes of their caches.
_NHD = ["num_blocks", "block_size", "num_kv_heads", "head_size"]
_X_PACKED = ["num_blocks", "num_kv_heads", "_", "block_size", "x"]


class Contract:
    """Named sizes and the arguments checked so far.

    Parameters
    ----------
    op : str
        The operation's name, for messages.
    """

    def __init__(self, op):
        self.op = op
        self.sizes = {}
        self._origin = {}
        self._first = None

    def shape(self, name, array, pattern):
        """Match ``array.shape`` with ``pattern``, such as ``"num_blocks block_size heads 8"``.

        A word binds a size at its first use and must agree later; ``_`` matches anything; a number
        only itself; a pattern may end in ``...`` for any further dimensions.
        """
        words = pattern.split()
        rest = words[-1] == "..."
        fixed = words[:-1] if rest else words
        shape = array.shape
        if len(shape) < len(fixed) or (len(shape) > len(fixed) and not rest):
            self._refuse_shape(name, array, words, errors.counted(len(shape), "dimension"))
        for word, extent in zip(fixed, shape):
            if word == "_":
                continue
            expected = int(word) if word.isdigit() else self.sizes.setdefault(word, extent)
            if expected != extent:
                why = f"{word} = {extent}"
                if word in self._origin:
                    why += f" where {self._origin[word]} has {expected}"
                elif word.isdigit():
                    why = f"{extent} instead of {word}"
                self._refuse_shape(name, array, words, why)
            if word in self.sizes:
                self._origin.setdefault(word, name)

    def _refuse_shape(self, name, array, words, why):
        expected = ", ".join(
            f"{word}={self.sizes[word]}" if word in self._origin else word for word in words
        )
        got, way_out = f"{list(array.shape)} ({why})", self._of_another_layout(words, array.shape)
        raise errors.wrong("shape", f"{self.op}: {name}", f"[{expected}]", got, way_out)

    def _of_another_layout(self, words, shape):
        """What to do with a cache that is as it should be, but in another of the layouts."""
        if words == _NHD and len(shape) == 5:
            return "x-packed caches are for reshape_and_cache"
        if words == _X_PACKED and len(shape) == 4:
            return f"caches [{', '.join(_NHD)}] are for reshape_and_cache_flash"
        if words[:3] == _NHD[:3] and len(shape) == len(words):
            by_head = shape[0], shape[2], shape[1], *shape[3:]
            if all(self.sizes.get(word, n) == n for word, n in zip(words[2:], by_head[2:])):
                return "of an HND cache give the view whose dimensions 1 and 2 are exchanged"
        return ""

    def dtype(self, name, array, *allowed, way_out=""):
        """Require one of the `formats.DType`\\ s ``allowed``."""
        if array.dtype not in allowed:
            expected = " or ".join(d.name for d in allowed)
            name = f"{self.op}: {name}"
            raise errors.wrong("dtype", name, expected, array.dtype.name, way_out)

    def device(self, name, array):
        """Require the same device as the first array checked."""
        if self._first is None:
            self._first = (name, array.device)
        same_device(self.op, name, array.device, *self._first)

    def readable(self, name, array):
        """Require what kernels can read: of the same device, and aligned."""
        self.device(name, array)
        self.aligned(name, array)

    def writable(self, name, array, rows=False):
        """Require memory that can be written in place, where no two elements share an address.

        ``rows``: the first dimension varies from call to call, so its stride matters even if this
        array has a single row.
        """
        arrays.require_writable(array, self.op, name)
        if rows and array.shape[:1] == (1,):
            array = array._replace(shape=(2, *array.shape[1:]))
        check_elements_apart(self.op, name, array.shape, array.strides, array.dtype.bytes)

    def contiguous(self, name, array, dims=1):
        """Require the last ``dims`` dimensions to be contiguous; strides of an empty array mean
        nothing."""
        if 0 not in array.shape and contiguous_dims(array) < min(dims, len(array.shape)):
            expected = (
                f"the last {f'{dims} dimensions' if dims > 1 else 'dimension'} to be contiguous"
            )
            got = (
                f"byte strides {list(array.strides)} for shape {list(array.shape)} of "
                f"{array.dtype.bytes}-byte elements"
            )
            raise errors.wrong("strides", f"{self.op}: {name}", expected, got)

    def contiguous_rows(self, name, array):
        """Require an argument of one dimension, whose extent varies from call to call, to have no
        gaps. The stride is in the signature but the extent is not, so a single element must have
        this stride too."""
        if 0 not in array.shape and array.strides != (array.dtype.bytes,):
            got = f"byte strides {list(array.strides)} of {array.dtype.bytes}-byte elements"
            raise errors.wrong("strides", f"{self.op}: {name}", "a contiguous array", got)

    def indices(self, name, array):
        """Require indices of one dimension that the kernels can read, without gaps."""
        self.shape(name, array, "_")
        self.dtype(name, array, *formats.INDICES)
        self.readable(name, array)
        self.contiguous_rows(name, array)

    def aligned(self, name, array):
        """Require an address and strides that are multiples of the element size."""
        size = array.dtype.bytes
        if 0 not in array.shape and (array.ptr % size or any(s % size for s in array.strides)):
            expected = f"multiples of the element size {size}"
            got = (
                f"an address of alignment {array.alignment} and byte strides {list(array.strides)}"
            )
            raise errors.wrong("address", f"{self.op}: {name}", expected, got)

    def writes(self, described, fmt):
        """The checks common to operations that write keys and values into slots.

        Parameters
        ----------
        described : dict
            key, value, key_cache, value_cache and slot_mapping by their names, in this order, with
            shapes that were checked.
        fmt : formats.CacheFormat
            Of the caches.

        Returns
        -------
        formats.DType or None
            The type that elements are converted to; None where they are copied.
        """
        names = list(described)
        sources, caches, slots = names[:2], names[2:4], names[4]
        source = described[sources[0]].dtype
        if fmt.stored is not None:
            self.dtype(sources[0], described[sources[0]], *formats.FLOATS, fmt.stored)
        stored, storage = formats.conversion(fmt, source)
        self.dtype(sources[1], described[sources[1]], source)
        for name in caches:
            array = described[name]
            way_out = formats.way_to_convert(fmt, array.dtype, sources[0])
            self.dtype(name, array, *storage, way_out=way_out)
        self.dtype(slots, described[slots], *formats.INDICES)
        for size in ("block_size", "head_size", "head_size_v"):
            self.positive(size, self.sizes[size])
        for name, array in described.items():
            self.readable(name, array)
        for name in (*sources, *caches):
            self.contiguous(name, described[name])
        for name in caches:
            self.writable(name, described[name])
        return stored

    def scale(self, name, array, count=1):
        """Require ``count`` float32 scales, without gaps. A single one may have no dimensions."""
        if array.shape != (count,) and (count != 1 or array.shape):
            raise errors.wrong("shape", f"{self.op}: {name}", f"[{count}]", list(array.shape))
        self.dtype(name, array, formats.FLOAT32)
        self.readable(name, array)
        if array.shape:
            self.contiguous(name, array)

    def head_scale(self, name, array, heads):
        """Require one float32 scale, or one for each of the heads.

        Returns
        -------
        int
            The bytes from one head's scale to the next; 0 for one scale for all heads, and None.
        """
        if array is None:
            return 0
        if array.shape not in ((), (1,), (heads,)):
            expected = f"[1], or [{heads}] for one scale a head"
            raise errors.wrong("shape", f"{self.op}: {name}", expected, list(array.shape))
        self.dtype(name, array, formats.FLOAT32)
        self.readable(name, array)
        return array.strides[0] if array.shape == (heads,) and heads > 1 else 0

    def x_packed_caches(self, key_cache, value_cache, interleaved):
        """Match the shapes of x-packed caches; the size ``head_size`` is bound already."""
        self.shape("key_cache", key_cache, "num_blocks num_kv_heads _ block_size x")
        self._packs("key_cache", key_cache, "head_size")
        if interleaved:
            self.shape("value_cache", value_cache, "num_blocks num_kv_heads _ head_size_v x")
            self._packs("value_cache", value_cache, "block_size")
        else:
            pattern = "num_blocks num_kv_heads head_size_v block_size"
            self.shape("value_cache", value_cache, pattern)

    def _packs(self, name, cache, whole):
        """Require dimension 2 of an x-packed cache to be the size ``whole`` divided by x."""
        size, x = self.sizes[whole], self.sizes["x"]
        if cache.shape[2] * x != size:
            expected = f"{whole} / x = {size} / {x} in dimension 2"
            raise errors.wrong("shape", f"{self.op}: {name}", expected, cache.shape[2])

    def positive(self, name, value):
        """Require a positive number; ``value`` is an integer."""
        if value <= 0:
            raise errors.wrong("value", f"{self.op}: {name}", "a positive integer", value)


def index(value):
    """``value`` as a Python integer. It may be anything with ``__index__``, such as an integer of
    NumPy or an array of one; `TypeError` for booleans and all else."""
    if type(value) is int:
        return value
    refuse_no_number(value)
    return operator.index(value)


def refuse_no_number(value):
    """`TypeError` for what Python and NumPy would take for a number: booleans, and tensors without
    memory, which torch would read."""
    if type(value) is bool or "bool" in str(getattr(value, "dtype", "")):
        raise TypeError("a boolean")
    # The address first: of what torch.jit traces, the number of elements is a tensor.
    if arrays.is_torch(value) and not arrays.torch_address(value) and value.numel():
        raise TypeError("a tensor without memory")


def is_unordered(value):
    """Whether Python would list a value in an order that nobody chose, of {5, 3} 3 first; a dict's
    keys count too."""
    return issubclass(type(value), (dict, set, frozenset, collections.abc.Set))


def refuse_unordered(value):
    """`TypeError` for what `is_unordered`."""
    if is_unordered(value):
        raise TypeError(f"a {type(value).__name__} has no order")


def integer(op, name, value, least=None, way_out=""):
    """``value`` as a Python integer, see `index`; at least ``least``. ``way_out``: for the error
    where it is less."""
    found = value
    if type(value) is not int:
        try:
            found = index(value)
        except Exception as error:
            raise errors.wrong(
                "value", f"{op}: {name}", "an integer", errors.shown(value)
            ) from error
    if not -(2**63) <= found < 2**63:
        raise errors.wrong("value", f"{op}: {name}", "an integer of 64 bits", errors.shown(found))
    if least is not None and found < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise errors.wrong("value", f"{op}: {name}", kind, found, way_out)
    return found


def integers(op, names, values):
    """``values``, those of the arguments ``names``, as Python integers. Options must have this form
    before a plan is remembered by them, because True and 1.0 equal 1."""
    for value in values:
        if type(value) is not int or not -(2**63) <= value < 2**63:
            break
    else:
        return tuple(values)
    return tuple(integer(op, name, value) for name, value in zip(names, values))


def choice(op, name, value, names):
    """``value``, which must be one of ``names``."""
    text = formats.text_of(value)
    if text not in names:
        expected = " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
        raise errors.wrong("value", f"{op}: {name}", expected, errors.shown(value))
    return text


def flag(op, name, value):
    """``value``, which is True or False, NumPy's too, or 1 or 0, as Python's boolean. What else is
    true is refused: "False" is, and to ask a tensor on a GPU would wait for it."""
    if type(value) is bool:
        return value
    kind = type(value)
    if issubclass(kind, (int, np.integer, np.bool_)):
        found = bool(value) if issubclass(kind, np.bool_) else operator.index(value)
        if found in (0, 1):
            return bool(found)
    raise errors.wrong("value", f"{op}: {name}", "True or False", errors.shown(value))


def check_elements_apart(op, name, shape, strides, size):
    """Refuse an array whose elements, of ``size`` bytes, may share memory. Exact for strides that
    nest, where each covers the whole span of the smaller ones, as in all permuted, sliced and
    packed views; all other strides are refused."""
    span = size
    for stride, extent in sorted(zip(map(abs, strides), shape)):
        if extent < 2:
            continue
        if stride < span and 0 not in shape:
            got = f"byte strides {list(strides)} for shape {list(shape)}"
            raise errors.wrong("strides", f"{op}: {name}", "elements that do not share memory", got)
        span += stride * (extent - 1)


def same_device(op, name, device, other_name, other):
    """Require ``device`` to be ``other``, that of the argument ``other_name``."""
    if device != other:
        raise errors.wrong("device", f"{op}: {name}", f"{other} like {other_name}", device)


def check_sequence_count(op, name, count):
    """Refuse more sequences, by the shape of the argument ``name``, than kernels can number."""
    if count >= 2**31:
        raise errors.wrong("shape", f"{op}: {name}", "less than 2^31 sequences", count)


def slot_count(op, *arrays, scales):
    """The count of an operation on tokens, for `dispatch.Op`: one row for each slot. There may not
    be more slots than rows of each of ``arrays``, names of the arguments before ``slot_mapping``.
    The fields are the number of slots and ``scales`` floats."""
    no_scalars = (0.0,) * scales

    def count(extents, options, scalars):
        del options
        *all_rows, slots = extents
        if slots > min(all_rows):
            name, rows = next(pair for pair in zip(arrays, all_rows) if slots > pair[1])
            expected = f"at most {errors.counted(rows, 'slot')}, the rows of {name}"
            raise errors.wrong("shape", f"{op}: slot_mapping", expected, slots)
        return slots, (slots, *(scalars or no_scalars))

    return count


def number(op, name, value, positive=False, kind="None or ", way_out=""):
    """``value`` as a float that float32 can hold; -0.0 becomes 0.0, as the two are equal where they
    are remembered. ``kind``: what else the argument may be, for the error; ``way_out``: where it is
    0."""
    found = value if type(value) is float else real(value)
    least = SMALLEST_NORMAL if positive else -LARGEST_SCALE
    if found is None or not least <= found <= LARGEST_SCALE:
        kind += "a positive, normal float32" if positive else "a finite float32"
        got, way_out = errors.shown(value), way_out if found == 0 else ""
        raise errors.wrong("value", f"{op}: {name}", kind, got, way_out)
    return found + 0.0


def is_real(value):
    """Whether a value is a real number, by its type: a boolean is none."""
    return type(value) is not bool and issubclass(type(value), numbers.Real)


def real(value):
    """A real number as a float, infinite where it is too large; None for anything else."""
    if not is_real(value):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except Exception:  # whatever its class raises
        return None


def split_scale(op, name, scale):
    """A scale as (array, float); the float counts where the array is None. None means 1.0."""
    if scale is None:
        return None, 1.0
    found = scale
    if type(scale) is not float:
        if arrays.is_torch(scale):  # to ask whether it is a real number takes a microsecond
            return scale, 0.0
        if type(scale) is bool:
            raise errors.wrong("value", f"{op}: {name}", _SCALE, scale)
        if not is_real(scale):
            if issubclass(type(scale), _NO_SCALES):
                raise errors.wrong("type", f"{op}: {name}", _SCALE, type(scale).__name__)
            return scale, 0.0
        found = real(scale)
    if found is None or not SMALLEST_SCALE <= found <= LARGEST_SCALE:
        expected = "a positive, finite float32"
        raise errors.wrong("value", f"{op}: {name}", expected, errors.shown(scale))
    return None, found


_SCALE = "None, a number or a float32 array"
# What is taken for a scale, and is neither; a number of ml_dtypes' is a `generic`.
_NO_SCALES = (list, tuple, str, bytes, np.generic)


def split_scales(op, kv_cache_dtype, k_scale, v_scale):
    """The scales of keys and values as (arrays, floats). An array is None where its float counts;
    ``arrays`` is empty where both floats do. Both are empty for a raw copy, which has no scales."""
    if not formats.is_scaled(kv_cache_dtype):
        return (), ()
    k_array, k_number = split_scale(op, "k_scale", k_scale)
    v_array, v_number = split_scale(op, "v_scale", v_scale)
    if k_array is v_array is None:
        return (), (k_number, v_number)
    return (k_array, v_array), (k_number, v_number)


def contiguous_dims(array):
    """How many trailing dimensions of ``array`` are laid out without gaps."""
    step, count = array.dtype.bytes, 0
    for extent, stride in zip(reversed(array.shape), reversed(array.strides)):
        if extent != 1 and stride != step:
            break
        step *= extent
        count += 1
    return count


def rows_interleave(array):
    """Whether a row, along the first dimension, begins inside the span of the one before. Then it
    depends on their number whether they overlap."""
    span = sum((n - 1) * abs(s) for n, s in zip(array.shape[1:], array.strides[1:]))
    return abs(array.strides[0]) <= span


def vector_bytes(*numbers):
    """The bytes of the widest vector, at most 16, that divides all these addresses, strides and
    lengths."""
    return math.gcd(16, *numbers)


def row_starts(*arrays):
    """The addresses of arrays, and their strides down to rows of elements without gaps: what
    `vector_bytes` must divide."""
    return [number for array in arrays for number in (array.ptr, *array.strides[:-1])]


def converting_vector_bytes(ratio, source_numbers, destination_numbers):
    """`vector_bytes` of a destination whose bytes are each made of ``ratio`` source bytes, read in
    vectors of up to 16 bytes. ``ratio`` may be a fraction (1/2: one byte makes two)."""
    width = vector_bytes(*destination_numbers)
    source = vector_bytes(*source_numbers)
    while width > 1 and min(16, width * ratio) > source:
        width //= 2
    return width
