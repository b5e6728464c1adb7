# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""ALiBi slopes, computed on the device.

Slopes are a handful of constants, so each list is made once and remembered: a further call returns
the same array and launches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import cpu, errors
from ..runtime import (
    contract,
    dispatch,
    driver,
    formats,
    launch,
    making,
    modules,
    params,
    plans,
    streams,
    tracing,
)
from ..types import ArrayLike, DeviceLike, FrameworkName, StreamLike

MAX_HEADS = 1 << 20
MAX_BIAS = 126.0  # 2^-126 is the smallest normal float32
MAX_THREADS = 256
PLACED_VALUES = 1016  # kPlacedValues of the kernel
# Beyond this nothing new is remembered, rather than something old forgotten: memory that was given
# out is never recycled under a stream that still reads it.
MAX_REMEMBERED = 256

PARAMS = params.Struct("out:ptr count:i64 first:i64 power:i64 step:f64", "stride:i64")
PLACE_PARAMS = params.Struct("out:ptr stride:i64 count:i64", tail=f"values:f32[{PLACED_VALUES}]")
ALIBI = modules.Kernel("alibi_slopes", "alibi_slopes", f"alibi_slopes<{MAX_THREADS}>", PARAMS)
PLACE = modules.Kernel("place_slopes", "place_slopes", f"place_slopes<{MAX_THREADS}>", PLACE_PARAMS)


def alibi_slopes(
    num_heads: int,
    *,
    max_bias: float = 8.0,
    tp_rank: int = 0,
    tp_size: int = 1,
    framework: FrameworkName | None = None,
    device: DeviceLike | None = None,
    out: ArrayLike | None = None,
    stream: StreamLike | None = None,
) -> Any:
    """The slopes of attention with linear biases (ALiBi), one for each query head.

    With c the largest power of two that is at most ``num_heads`` and M = ``max_bias``, they are
    ``2^(-M * i / c)`` for i = 1 … c. Where ``num_heads`` is not a power of two, ``2^(-M * j / 2c)``
    follow, for j = 1, 3, 5 and so on. On a GPU a kernel computes them: no array on the CPU, no
    transfer, no waiting. The call can be captured in a CUDA graph.

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
        read-only (NumPy's is; one of torch's that was written is not returned again). It may be
        used on any stream from then on. While a CUDA graph is captured, a new result belongs to the
        graph and is not remembered; one whose kernel has not been seen to finish before is computed
        anew.

    Raises
    ------
    CupyCacheError
        One of its kinds.
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
    num_heads = contract.integer(op, "num_heads", num_heads, 1)
    tp_size = contract.integer(op, "tp_size", tp_size, 1)
    tp_rank = contract.integer(op, "tp_rank", tp_rank)
    if num_heads > MAX_HEADS:
        raise errors.wrong("value", f"{op}: num_heads", f"at most {MAX_HEADS}", num_heads)
    if num_heads % tp_size:
        expected = f"a divisor of num_heads = {num_heads}"
        raise errors.wrong("value", f"{op}: tp_size", expected, tp_size)
    if not 0 <= tp_rank < tp_size:
        expected = f"an integer in 0..{tp_size - 1}"
        raise errors.wrong("value", f"{op}: tp_rank", expected, repr(tp_rank))
    bias = contract.real(max_bias)
    if bias is None or not 0 < bias <= MAX_BIAS:
        expected = f"a number above 0 and at most {MAX_BIAS:g}"
        raise errors.wrong("value", f"{op}: max_bias", expected, errors.shown(max_bias))
    power = 1 << (num_heads.bit_length() - 1)
    count = num_heads // tp_size
    scalars = count, tp_rank * count, power, bias / (2 * power)
    return _fill(OP, scalars, framework, device, out, stream)


def place_slopes(
    slopes: Sequence[float] | np.ndarray[Any, Any],
    *,
    framework: FrameworkName | None = None,
    device: DeviceLike | None = None,
    out: ArrayLike | None = None,
    stream: StreamLike | None = None,
) -> Any:
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
    CupyCacheError
        One of its kinds.
    MissingDependencyError
        As for `alibi_slopes`.
    """
    op = "place_slopes"
    try:
        given = _numbers(slopes)
    except Exception as error:
        got = f"{errors.shown(slopes)} ({error or type(error).__name__})"
        raise errors.wrong("value", f"{op}: slopes", "numbers in host memory", got) from error
    if given.ndim != 1 or given.size > MAX_HEADS:
        expected = f"[n] with n at most {MAX_HEADS}"
        raise errors.wrong("shape", f"{op}: slopes", expected, list(given.shape))
    with np.errstate(all="ignore"):
        rounded = given.astype(np.float32)
    lost = given[np.isinf(rounded)]
    if np.isfinite(lost).any():
        got = f"{lost[np.isfinite(lost)][0]:g}"
        raise errors.wrong("value", f"{op}: slopes", "numbers within float32", got)
    return _fill(PLACE_OP, (rounded.size, rounded.tobytes()), framework, device, out, stream)


def _numbers(slopes):
    """``slopes`` as float64; raises where they are no numbers, or not real ones."""
    if issubclass(type(slopes), np.ma.MaskedArray):
        raise TypeError("a MaskedArray")
    for number in slopes if isinstance(slopes, (list, tuple)) else (slopes,):
        if type(number) is not float:
            contract.refuse_no_number(number)
    given = np.asarray(slopes)
    kind = given.dtype.kind
    if kind == "O":
        if not all(map(contract.is_real, given.flat)):
            raise TypeError("objects")
    elif (
        kind not in "fiu" and given.dtype.name not in ("bfloat16", *formats.LARGEST) and given.size
    ):
        raise TypeError(f"elements of {given.dtype.name}")
    with np.errstate(all="ignore"):  # a signalling NaN is invalid in a cast
        return given.astype(np.float64)


# --- the operations -------------------------------------------------------------------------------


class _PlacePlan:
    """Numbers of the host, as many as fit the parameters in each launch."""

    def __init__(self, out):
        self._launcher = launch.Launcher(PLACE, out.device.index)
        self._shape = launch.FlatShape(1, out.device.index, MAX_THREADS)
        self._stride = out.strides[0]

    def run(self, call):
        """Enqueue."""
        (out,), (count, values) = call.values, call.fields
        for first in range(0, count, PLACED_VALUES):
            part = min(PLACED_VALUES, count - first)
            tail = values[first * formats.FLOAT32.bytes : (first + part) * formats.FLOAT32.bytes]
            at = out + first * self._stride
            self._launcher.enqueue(
                *self._shape(part), call.stream, at, self._stride, part, tail=tail
            )


def _place_on_cpu(out, count, values):
    del count
    out[...] = np.frombuffer(values, np.float32)


def _check(op, out):
    check = contract.Contract(op.name)
    check.shape("out", out, "_")
    check.dtype("out", out, formats.FLOAT32)
    check.aligned("out", out)
    check.writable("out", out)


def _plan(op, described, options):
    del options
    (out,) = described
    _check(op, out)
    if out.device.kind == "cpu":
        return plans.NumPyPlan(cpu.alibi_slopes, op.args, described)
    return plans.flat(ALIBI, out.device.index, (out.strides[0],), 1, MAX_THREADS)


def _place_plan(op, described, options):
    del options
    (out,) = described
    _check(op, out)
    if out.device.kind == "cpu":
        return plans.NumPyPlan(_place_on_cpu, op.args, described)
    return _PlacePlan(out)


def _op(name, plan):
    def count(extents, options, scalars):
        del options
        if extents[0] != scalars[0]:
            raise errors.wrong("shape", f"{name}: out", f"[{scalars[0]}]", list(extents))
        return scalars[0], scalars

    return dispatch.Op(
        name, [dispatch.Arg("out", varies=dispatch.ROWS, written=True)], plan, count=count
    )


OP = _op("alibi_slopes", _plan)
PLACE_OP = _op("place_slopes", _place_plan)


# --- where it goes --------------------------------------------------------------------------------


class _Remembered:
    """An array, and the event behind the kernel that fills it, until that was seen to be done."""

    __slots__ = ("_version", "array", "event")

    def __init__(self, array, event):
        self.array, self.event = array, event
        self._version = getattr(array, "_version", None)

    def is_changed(self):
        """Whether somebody else has written it, or given it a gradient: torch tells."""
        return self._version is not None and (
            self.array._version != self._version or self.array.requires_grad
        )


_remembered: dict[tuple | _Remembered, _Remembered] = {}


def _fill(op, scalars, framework, device, out, stream):
    """``out`` filled by ``op``; without it, an array that is made and remembered."""
    if stream is not None:
        stream = streams.pointer(op.name, stream)
    if out is not None:
        for name, value in (("framework", framework), ("device", device)):
            if value is not None:
                expected = "None, because out decides it"
                raise errors.wrong("value", f"{op.name}: {name}", expected, errors.shown(value))
        op((out,), (), stream, scalars)
        return out
    framework, device = making.home(op.name, framework, device)
    key = framework, device, op.name, scalars
    found = _remembered.get(key)
    if found is not None and found.is_changed():
        # It stays with whoever has it, and here under another name: a stream may still read it.
        _remembered[found] = found
        if _remembered.get(key) is found:  # another thread may have been here
            _remembered.pop(key, None)
        found = None
    if framework == "torch" and tracing.tracer() is not None:
        found = None  # what is known is refused as what is not
    if found is not None and found.event is None:
        return found.array
    with making.outside_inference_mode(framework):
        return _made(op, scalars, framework, device, key, found, stream)


def _made(op, scalars, framework, device, key, found, stream):
    if device.kind == "cuda":
        return _on_gpu(op, scalars, framework, device, key, found, stream)
    made = making.empty(framework, device, scalars[:1], formats.FLOAT32)
    op((made,), (), None, scalars)
    if framework == "numpy":
        made.flags.writeable = False
    return _remember(key, made, None)


def _on_gpu(op, scalars, framework, device, key, found, stream):
    if stream is None:
        stream = streams.current(framework, device.index)()
    # A stream that is being captured may neither wait for work outside its graph nor be asked.
    capturing = driver.active.capturing(stream, device.index)
    if found is not None and not capturing:
        event = found.event
        if event is None or event.done():
            found.event = None
        else:
            event.hold(stream)
        return found.array
    made = making.empty(framework, device, scalars[:1], formats.FLOAT32, stream)
    op((made,), (), stream, scalars)
    if capturing:
        return made
    return _remember(key, made, driver.active.event(stream, device.index))


def _remember(key, made, event):
    if len(_remembered) < MAX_REMEMBERED:
        _remembered[key] = _Remembered(made, event)
    return made
