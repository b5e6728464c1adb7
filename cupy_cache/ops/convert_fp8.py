# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Converting whole arrays to and from fp8."""

from __future__ import annotations

import functools
import math

from .. import cpu, errors
from ..runtime import contract, dispatch, formats, modules, params, plans, spelling
from ..types import ArrayLike, Scale, StreamLike

NAME = "convert_fp8"
KV_DTYPES = ("fp8", "fp8_e4m3", "fp8_e5m2")
MAX_DIMS = 5  # kMaxDims of the kernel
PARAMS = params.Struct(
    per_call="output:ptr input:ptr scale:ptr scale_value:f32",
    constant=f"unused:u32 vectors:i64 run_vectors:i64 extents:i64[{MAX_DIMS}] "
    f"output_strides:i64[{MAX_DIMS}] input_strides:i64[{MAX_DIMS}]",
)
MAX_THREADS = 256


def convert_fp8(
    output: ArrayLike,
    input: ArrayLike,
    scale: Scale = 1.0,
    kv_dtype: str = "fp8",
    *,
    stream: StreamLike | None = None,
) -> None:
    """Convert an array to fp8, or an fp8 array back.

    The direction is that of the dtypes. To fp8, an element becomes input / scale, a float32
    quotient rounded to nearest, ties to even; what is larger than the largest number becomes that,
    infinities too, and a NaN becomes 0x7f. From fp8, it becomes input * scale, rounded to the
    output's dtype; NaN has all bits but the sign set.

    Parameters
    ----------
    output : array [...]
        Written in place. Of the fp8 dtype or uint8 where ``input`` is of float16, bfloat16 or
        float32, and the other way round.
    input : array [...]
        Of the same shape. Both may have any strides, each its own, as long as at most five
        dimensions are left when those adjacent in both arrays count as one.
    scale : float, or float32 array of one element, optional
        An array is read on its device, and its value is not looked at. None is 1.0.
    kv_dtype : str
        "fp8" or "fp8_e4m3", "fp8_e5m2".
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``output``.

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Names, order and meaning are those of vLLM's operation of the same name, which converts
    contiguous e4m3 arrays.
    """
    array, number = contract.split_scale(NAME, "scale", scale)
    OP((output, input, array), (kv_dtype,), stream, (number,))


def _plan(op, described, options):
    output, source, scale = described
    (kv_dtype,) = options
    fmt = formats.cache_format(op.name, kv_dtype, KV_DTYPES, "kv_dtype")
    check = contract.Contract(op.name)
    if output.shape != source.shape:
        expected = f"{list(output.shape)} like output"
        raise errors.wrong("shape", f"{op.name}: input", expected, list(source.shape))
    check.dtype("input", source, *formats.FLOATS, *fmt.storage)
    quantises = source.dtype in formats.FLOATS
    check.dtype("output", output, *(fmt.storage if quantises else formats.FLOATS))
    for name, array in (("output", output), ("input", source)):
        check.readable(name, array)
    check.writable("output", output)
    if scale is not None:
        check.scale("scale", scale)

    run_elements, dims = _merged(op.name, output, source)

    if output.device.kind == "cpu":
        run = functools.partial(
            cpu.convert_fp8,
            source=source.dtype if quantises else fmt.stored,
            target=fmt.stored if quantises else output.dtype,
        )
        return plans.NumPyPlan(run, op.args, described, ("output", "input"))

    run_bytes = run_elements * output.dtype.bytes
    vector = contract.converting_vector_bytes(
        source.dtype.bytes / output.dtype.bytes,
        (run_elements * source.dtype.bytes, source.ptr, *(stride for *_, stride in dims)),
        (run_bytes, output.ptr, *(stride for _, stride, _ in dims)),
    )
    if quantises:
        converter = spelling.quantiser(source.dtype, fmt.stored, vector)
    else:
        converter = spelling.dequantiser(fmt.stored, output.dtype, vector)
    vectors = math.prod(output.shape) * output.dtype.bytes // vector
    kernel = modules.Kernel(
        op.name,
        op.name,
        f"convert_fp8<{converter}, {vector}, {len(dims)}, {MAX_THREADS}>",
        PARAMS,
        converts=True,
    )
    padded = [*dims, *[(1, 0, 0)] * (MAX_DIMS - len(dims))]
    constants = 0, vectors, run_bytes // vector, *(n for column in zip(*padded) for n in column)
    return plans.flat(kernel, output.device.index, constants, vectors, MAX_THREADS)


def _count(extents, options, scalars):
    del extents, options
    return 1, scalars


def _merged(op, output, source):
    """The elements of the innermost run that has no gaps in both arrays, and the dimensions around
    it as (extent, stride in the output, stride in the source), outermost in the output first."""
    dims = [d for d in zip(output.shape, output.strides, source.strides) if d[0] != 1]
    dims.sort(key=lambda dim: -abs(dim[1]))
    merged = []
    for extent, to, at in dims:
        if merged and merged[-1][1:] == (to * extent, at * extent):
            extent *= merged.pop()[0]
        merged.append((extent, to, at))
    if len(merged) > MAX_DIMS:
        expected = f"at most {MAX_DIMS} dimensions where those adjacent in both arrays count as one"
        got = (
            f"byte strides {list(output.strides)} of output and {list(source.strides)} of input "
            f"for shape {list(output.shape)}"
        )
        raise errors.wrong("strides", f"{op}: output", expected, got)
    run = 1
    if merged and merged[-1][1:] == (output.dtype.bytes, source.dtype.bytes):
        run = merged.pop()[0]
    return run, merged


OP = dispatch.Op(
    NAME,
    args=(
        dispatch.Arg("output", written=True),
        dispatch.Arg("input"),
        dispatch.Arg("scale", optional=True),
    ),
    plan=_plan,
    destination=0,
    count=_count,
    options=("kv_dtype",),
)
