# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The bias of attention with linear biases (ALiBi), for attention that takes it as a tensor."""

import functools

from .. import cpu
from ..errors import ArgumentError
from ..runtime import arrays, contract, formats, launch, modules, params

NAME = "alibi_bias"
PARAMS = params.Struct(
    "slopes:ptr query_positions:ptr key_positions:ptr out:ptr heads:i64 queries:i64 keys:i64 "
    "slope_stride:i64 query_stride:i64 key_stride:i64 out_head_stride:i64 out_query_stride:i64 "
    "causal:u32 root:u32"
)
MAX_THREADS = 256
VECTOR = 16
BLOCKS_PER_PROCESSOR = 8  # with fewer, the heads are spread over blocks too


def alibi_bias(
    slopes, query_positions, key_positions, *, out=None, dtype=None, sqrt=False, causal=False,
    stream=None,
):  # fmt: skip
    """Compute what ALiBi adds to the scaled attention scores: for head ``h``, query ``i`` and key
    ``j``, ``slopes[h] * (key_positions[j] - query_positions[i])``.

    Attention that adds ``slope * k`` instead, for the key's position ``k`` alone, differs by a
    constant for each row, which the softmax removes. A query position of 0 gives that form, and the
    length of the sequence less 1 the one that ends with 0.

    Parameters
    ----------
    slopes : float32 array [num_heads]
        Such as `alibi_slopes` returns; any stride.
    query_positions : int32 or int64 array [num_queries]
        Positions in the sequence; any stride.
    key_positions : int32 or int64 array [num_keys]
        Likewise.
    out : array [num_heads, num_queries, num_keys], optional
        Written in place. The last dimension contiguous; the other strides are free, so that it may
        be a view of rows that are padded, as some attention needs them.
    dtype : {"float32", "float16", "bfloat16"}, optional
        Of the result: by default that of ``out``, or else float32.
    sqrt : bool
        The bias is ``-slopes[h] * sqrt(query position - key position)``, and 0 where the key is
        ahead of the query, as in Step1.
    causal : bool
        Keys ahead of the query get -infinity.
    stream : optional
        Where to enqueue; by default the current stream of the framework that owns ``out``, or else
        ``query_positions``.

    Returns
    -------
    array [num_heads, num_queries, num_keys]
        ``out`` where it was given; otherwise a new array of the framework of ``query_positions``,
        on its device (of CuPy or NumPy where that framework's arrays cannot be written).

    Raises
    ------
    ArgumentError, ShapeError, StrideError, DTypeError, DeviceError, NotWritableError
        Before anything is written.

    Notes
    -----
    Nothing synchronises, and nothing is uploaded. The difference of the positions is taken in 64
    bits and rounded to float32, which holds it exactly up to 2**24; for ``sqrt`` the correctly
    rounded root follows. The float32 product with the slope is rounded to ``dtype`` to nearest,
    ties to even. CPU and GPU agree in every bit.

    The formulas are those of Press, Smith, Lewis: "Train Short, Test Long" (2022), and, for
    ``sqrt``, of vLLM's attention kernels.
    """
    if stream is not None:
        stream = arrays.stream_pointer(stream)
    else:
        owner = query_positions if out is None else out
        described = arrays.view(owner, f"{NAME}: {'query_positions' if out is None else 'out'}")
        if described.device.kind == "cuda":
            stream = arrays.current_stream_of(described)()
    check = contract.Contract(NAME)
    given = {
        "slopes": slopes, "query_positions": query_positions, "key_positions": key_positions
    }  # fmt: skip
    # The facts keep views through DLPack alive until all is enqueued.
    facts = {name: arrays.read(value, f"{NAME}: {name}", stream) for name, value in given.items()}
    described = {name: arrays.describe(fact, f"{NAME}: {name}") for name, fact in facts.items()}
    for (name, array), size in zip(described.items(), ("num_heads", "num_queries", "num_keys")):
        check.shape(name, array, size)
        indices = formats.INDICES if size != "num_heads" else (formats.DTYPES["float32"],)
        check.dtype(name, array, *indices)
        check.device(name, array)
        check.aligned(name, array)
    wanted = _dtype(dtype)
    if out is None:
        like = described["query_positions"]
        shape = tuple(check.sizes[size] for size in ("num_heads", "num_queries", "num_keys"))
        wanted = wanted or formats.DTYPES["float32"]
        out = arrays.empty(like.framework, like.device, shape, wanted)
    facts["out"] = arrays.read(out, f"{NAME}: out", stream)
    described["out"] = array = arrays.describe(facts["out"], f"{NAME}: out")
    check.shape("out", array, "num_heads num_queries num_keys")
    check.dtype("out", array, *([wanted] if wanted else formats.FLOATS))
    check.device("out", array)
    check.aligned("out", array)
    check.contiguous("out", array)
    check.writable("out", array)
    if 0 not in array.shape:
        run = _on_cpu if array.device.kind == "cpu" else _on_gpu
        run(*described.values(), bool(sqrt), bool(causal), stream)
    return out


def _dtype(dtype):
    """The `formats.DType` asked for, if any."""
    if dtype is None:
        return None
    found = formats.dtype_named(dtype)
    if found not in formats.FLOATS:
        raise ArgumentError(
            f"{NAME}: Invalid value of dtype: expected one of "
            f"{', '.join(d.name for d in formats.FLOATS)}, got {dtype!r}"
        )
    return found


def _on_cpu(slopes, queries, keys, out, sqrt, causal, stream):
    del stream
    views = (
        arrays.as_numpy(a.ptr, a.shape, a.strides, a.dtype.numpy) for a in (slopes, queries, keys)
    )
    bits = arrays.as_numpy(out.ptr, out.shape, out.strides, out.dtype.bits)
    cpu.alibi_bias(*views, bits, out.dtype, sqrt, causal)


def _on_gpu(slopes, queries, keys, out, sqrt, causal, stream):
    heads, rows, columns = out.shape
    wide = contract.vector_bytes(out.ptr, *out.strides[:2]) == VECTOR
    launcher = _launcher(out.dtype, wide, queries.dtype, keys.dtype, out.device.index)
    vectors = launch.ceil_div(columns * out.dtype.bytes, VECTOR if wide else out.dtype.bytes)
    threads = min(MAX_THREADS, launch.ceil_div(vectors, launch.WARP) * launch.WARP)
    x, y = launch.ceil_div(vectors, threads), min(rows, launch.MAX_GRID_YZ)
    enough = BLOCKS_PER_PROCESSOR * launch.processors(out.device.index)
    z = min(heads, launch.ceil_div(enough, x * y), launch.MAX_GRID_YZ)
    launcher.enqueue(
        (x, y, z), threads, stream, slopes.ptr, queries.ptr, keys.ptr, out.ptr, heads, rows,
        columns, slopes.strides[0], queries.strides[0], keys.strides[0], *out.strides[:2], causal,
        sqrt,
    )  # fmt: skip


@functools.cache  # a few dtypes, on as many devices as there are
def _launcher(dtype, wide, query, key, device):
    return launch.Launcher(kernel(dtype, wide, query, key), device)


def kernel(dtype, wide, query, key):
    """The specialisation for elements of ``dtype``, in vectors of 16 bytes if ``wide``, and for
    these dtypes of the positions."""
    vector = VECTOR if wide else dtype.bytes
    indices = ", ".join(formats.INDEX_NAMES[index.name] for index in (query, key))
    element = formats.ELEMENT_NAMES[dtype.name]
    expression = f"{NAME}<{element}, {vector}, {indices}, {MAX_THREADS}>"
    return modules.Kernel(NAME, NAME, expression, PARAMS)
