# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What attention needs besides the cache: ALiBi slopes, born on the device.

Slopes are a handful of constants, so each list is made once and remembered: a further call returns
the same array and launches nothing.
"""

import sys

import numpy as np

from .. import cpu
from ..errors import ArgumentError, DeviceError, MissingDependencyError, ShapeError
from ..runtime import arrays, contract, formats, launch, modules, params

FLOAT32 = formats.DTYPES["float32"]
MAX_HEADS = 1 << 20
MAX_BIAS = 126.0  # 2^-126 is the smallest normal float32
MAX_THREADS = 256
PLACED_VALUES = 1016  # kPlacedValues of the kernel
# Beyond this nothing new is remembered, rather than something old forgotten: memory that was given
# out is never recycled under a stream that still reads it.
MAX_REMEMBERED = 256

PARAMS = params.Struct("out:ptr stride:i64 count:i64 first:i64 power:i64 step:f64")
PLACE_PARAMS = params.Struct("out:ptr stride:i64 count:i64", tail=f"values:f32[{PLACED_VALUES}]")
ALIBI = modules.Kernel("alibi_slopes", "alibi_slopes", f"alibi_slopes<{MAX_THREADS}>", PARAMS)
PLACE = modules.Kernel("place_slopes", "place_slopes", f"place_slopes<{MAX_THREADS}>", PLACE_PARAMS)


def alibi_slopes(
    num_heads, *, max_bias=8.0, tp_rank=0, tp_size=1, framework=None, device=None, out=None,
    stream=None,
):  # fmt: skip
    """The slopes of attention with linear biases (ALiBi), one for each query head.

    With c the largest power of two that is at most ``num_heads`` and M = ``max_bias``, they are
    ``2^(-M * i / c)`` for i = 1 … c, followed, where ``num_heads`` is not a power of two, by
    ``2^(-M * j / 2c)`` for j = 1, 3, 5 … On a GPU a kernel computes them: no array on the CPU, no
    transfer, no waiting, and the call can be captured in a CUDA graph.

    Parameters
    ----------
    num_heads : int
        Query heads of the whole model, at most 2**20.
    max_bias : float
        Above 0, at most 126: the negated binary logarithm of the smallest slope.
    tp_rank, tp_size : int
        Tensor parallelism: slopes are those of the whole model, and those of heads ``[tp_rank * n,
        (tp_rank + 1) * n)`` with ``n = num_heads / tp_size`` are returned. ``tp_size`` must divide
        ``num_heads``.
    framework : {"torch", "cupy", "numpy"}, optional
        Whose array to return. By default torch's if ``device`` is a ``torch.device``, NumPy's if it
        is the CPU, and CuPy's if it is a GPU.
    device : int, str, torch.device or cupy.cuda.Device, optional
        A GPU's index, "cpu", "cuda", "cuda:1" or a device object. By default the current GPU; the
        CPU for NumPy, and where there is no GPU or no CuPy.
    out : float32 array [n], optional
        Write here instead, at any stride; its framework and device apply. Nothing is remembered.
    stream : optional
        Where to enqueue; by default the framework's current stream.

    Returns
    -------
    float32 array [n]
        ``out``, or an array that is remembered for these arguments and returned again: treat it as
        read-only (NumPy's is). It may be used on any stream from then on. While a CUDA graph is
        captured, a new result belongs to the graph and is not remembered; one whose kernel has not
        been seen to finish before is computed anew.

    Raises
    ------
    ArgumentError
        Or one of its kinds.
    MissingDependencyError
        For a GPU without CuPy, or torch's arrays where torch has not been imported.

    Notes
    -----
    For ``max_bias=8`` this is the rule that the ALiBi paper (Press, Smith, Lewis: "Train Short,
    Test Long", 2022) was published with, used in Bloom, Falcon and Baichuan. That rule knows no
    other bias; MPT's does (``alibi_bias_max``): it takes ``2^(-M * i / p)``, i = 1 … p, for the
    power of two p that is at least ``num_heads``; where they differ it puts the even i before the
    odd ones and keeps ``num_heads`` of them. With p = 2c these are the two series above, number for
    number, so one formula serves both. What differs is rounding: published code raises a rounded
    float32 base to powers, or exponentiates in float32, and is up to 5e-7 (relative) off; here the
    error is below 3e-7, and powers of two are exact.

    The factor that some models apply besides, such as Falcon's ``1 / sqrt(head_size)``, is not
    included: it belongs to their attention's scale.

    Examples
    --------
    >>> alibi_slopes(8, device="cpu")[:3]
    array([0.5  , 0.25 , 0.125], dtype=float32)
    """
    op = "alibi_slopes"
    check = contract.Contract(op)
    for name, value in (("num_heads", num_heads), ("tp_size", tp_size)):
        check.positive(name, value)
    if num_heads > MAX_HEADS:
        raise ArgumentError(
            f"{op}: Invalid value of num_heads: expected at most {MAX_HEADS}, got {num_heads}"
        )
    if num_heads % tp_size:
        raise ArgumentError(
            f"{op}: Invalid value of tp_size: expected a divisor of num_heads = {num_heads}, got "
            f"{tp_size}"
        )
    if isinstance(tp_rank, bool) or not isinstance(tp_rank, int) or not 0 <= tp_rank < tp_size:
        raise ArgumentError(
            f"{op}: Invalid value of tp_rank: expected an integer in 0..{tp_size - 1}, got "
            f"{tp_rank!r}"
        )
    if not isinstance(max_bias, (int, float)) or not 0 < max_bias <= MAX_BIAS:
        raise ArgumentError(
            f"{op}: Invalid value of max_bias: expected a number above 0 and at most {MAX_BIAS:g}, "
            f"got {max_bias!r}"
        )
    power = 1 << (num_heads.bit_length() - 1)
    count = num_heads // tp_size
    values = _Computed(op, tp_rank * count, count, power, max_bias / (2 * power))
    return _fill(values, framework, device, out, stream)


def place_slopes(slopes, *, framework=None, device=None, out=None, stream=None):
    """A caller's own slopes as an array on the device, placed there once.

    The numbers travel inside the kernel's parameters: nothing is uploaded, nothing waits, and the
    call can be captured in a CUDA graph.

    Parameters
    ----------
    slopes : sequence of float [n], or a NumPy array
        Rounded to float32, at most 2**20.
    framework, device, out, stream
        As for `alibi_slopes`.

    Returns
    -------
    float32 array [n]
        As of `alibi_slopes`, remembered by the values.

    Raises
    ------
    ArgumentError
        Or one of its kinds.
    MissingDependencyError
        As for `alibi_slopes`.
    """
    op = "place_slopes"
    try:
        with np.errstate(all="ignore"):  # a signalling NaN is invalid in a cast
            given = np.asarray(slopes, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{op}: Invalid value of slopes: expected numbers in host memory ({error})"
        ) from error
    if given.ndim != 1 or given.size > MAX_HEADS:
        raise ShapeError(
            f"{op}: Invalid shape of slopes: expected [n] with n at most {MAX_HEADS}, got "
            f"{list(given.shape)}"
        )
    with np.errstate(all="ignore"):
        rounded = given.astype(np.float32)
    lost = given[np.isinf(rounded)]
    if np.isfinite(lost).any():
        raise ArgumentError(
            f"{op}: Invalid value of slopes: expected numbers within float32, got "
            f"{lost[np.isfinite(lost)][0]:g}"
        )
    return _fill(_Given(op, rounded), framework, device, out, stream)


# --- what an array is filled with -----------------------------------------------------------------


class _Computed:
    """Slopes by the formula: ``count`` of them from head ``first``."""

    def __init__(self, op, first, count, power, step):
        self.op, self.count = op, count
        self._arguments = first, power, step
        self.key = first, count, power, step

    def numpy(self):
        first, power, step = self._arguments
        return cpu.alibi_slopes(first, self.count, power, step)

    def enqueue(self, array, stream):
        grid, threads = _shape(self.count, array)
        launch.Launcher(ALIBI, array.device.index).enqueue(
            grid, threads, stream, array.ptr, array.strides[0], self.count, *self._arguments
        )


class _Given:
    """Slopes that a caller brought, as a float32 NumPy array."""

    def __init__(self, op, values):
        self.op, self.count = op, values.size
        self._values = values
        self.key = values.tobytes()

    def numpy(self):
        return self._values

    def enqueue(self, array, stream):
        launcher = launch.Launcher(PLACE, array.device.index)
        for first in range(0, self.count, PLACED_VALUES):
            part = self._values[first : first + PLACED_VALUES]
            grid, threads = _shape(part.size, array)
            at = array.ptr + first * array.strides[0]
            launcher.enqueue(
                grid, threads, stream, at, array.strides[0], part.size, tail=part.tobytes()
            )


def _shape(count, array):
    return launch.FlatShape(1, array.device.index, MAX_THREADS)(count)


# --- where it goes --------------------------------------------------------------------------------


class _Remembered:
    """An array, and the mark behind the kernel that fills it, until that was seen to be reached."""

    __slots__ = ("array", "mark")

    def __init__(self, array, mark):
        self.array, self.mark = array, mark


_remembered = {}


def _fill(values, framework, device, out, stream):
    if out is not None:
        if framework is not None or device is not None:
            raise ArgumentError(
                f"{values.op}: Invalid value of framework or device: expected None, because out "
                f"decides both, got {framework!r} and {device!r}"
            )
        _write(values, out, stream)
        return out
    framework, device = _home(values.op, framework, device)
    key = framework, device, values.op, values.key
    found = _remembered.get(key)
    if found is not None and found.mark is None:
        return found.array
    wanted = arrays.Array(0, (values.count,), (FLOAT32.bytes,), FLOAT32, device, True, framework)
    if device.kind == "cuda":
        return _on_gpu(values, wanted, key, found, stream)
    made = _make(wanted)
    _write(values, made, None)
    if framework == "numpy":
        made.flags.writeable = False
    return _remember(key, made, None)


def _on_gpu(values, wanted, key, found, stream):
    index = wanted.device.index
    current = arrays.current_stream_of(wanted)()
    stream = current if stream is None else arrays.stream_pointer(stream)
    # A stream that is being captured may neither wait for work outside its graph nor be marked.
    capturing = launch.driver.capturing(stream)
    mark = found.mark if found is not None else None
    if found is not None and not capturing:
        if mark is None or mark.reached():
            found.mark = None
        else:
            mark.hold(stream)
        return found.array
    made = _make(wanted)
    if stream != current and not capturing:
        # The new memory may have been freed under work that the current stream has yet to do.
        launch.driver.mark(current, index).hold(stream)
    _write(values, made, stream)
    if capturing:
        return made
    return _remember(key, made, launch.driver.mark(stream, index))


def _make(wanted):
    return arrays.empty(wanted.framework, wanted.device, wanted.shape, wanted.dtype)


def _remember(key, made, mark):
    if len(_remembered) < MAX_REMEMBERED:
        _remembered[key] = _Remembered(made, mark)
    return made


def _write(values, out, stream):
    """Fill ``out``, on its framework's current stream by default."""
    name = f"{values.op}: out"
    described = arrays.view(out, name)
    if described.device.kind == "cuda":
        if stream is None:
            stream = arrays.current_stream_of(described)()
        else:
            stream = arrays.stream_pointer(stream)
    facts = arrays.read(out, name, stream)  # keeps a DLPack view alive until all is enqueued
    array = arrays.describe(facts, name)
    check = contract.Contract(values.op)
    check.shape("out", array, str(values.count))
    check.dtype("out", array, FLOAT32)
    check.aligned("out", array)
    check.writable("out", array)
    if array.device.kind == "cpu":
        view = arrays.as_numpy(array.ptr, array.shape, array.strides, array.dtype.numpy)
        view[:] = values.numpy()
    else:
        values.enqueue(array, stream)


def _home(op, framework, device):
    """The framework and the `arrays.Device` of a new array."""
    if framework is None and type(device).__module__.partition(".")[0] == "torch":
        framework = "torch"
    if framework == "torch" and "torch" not in sys.modules:
        raise MissingDependencyError(f"{op}: framework 'torch' was asked for: import torch before")
    if device is None and framework == "numpy":
        place = arrays.CPU
    elif device is None and framework == "torch":
        gpu = sys.modules["torch"].cuda.is_available()
        place = launch.device_named("cuda" if gpu else "cpu", f"{op}: device")
    else:
        place = launch.device_named(device, f"{op}: device")
    if framework is None:
        framework = "numpy" if place.kind == "cpu" else "cupy"
    if not arrays.makes(framework):
        raise ArgumentError(
            f"{op}: Invalid value of framework: expected 'torch', 'cupy' or 'numpy', got "
            f"{framework!r}"
        )
    if framework != "torch" and (framework == "numpy") != (place.kind == "cpu"):
        expected = "the CPU" if framework == "numpy" else "a GPU"
        raise DeviceError(
            f"{op}: Invalid value of device: expected {expected} for framework {framework!r}, got "
            f"{place}"
        )
    return framework, place
