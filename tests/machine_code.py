# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Ordinary models, their kernels as machine code, and what NVIDIA's cuobjdump says of these. Needs
no GPU."""

import functools
import importlib.metadata
import re
import subprocess

from cupy_cache import errors
from cupy_cache.runtime import modules

# heads, head size, block size, dtype
ONE_SHAPE = (8, 128, 16, "bfloat16")
MLA_SHAPE = (1, 576, 64, "bfloat16")
INDEXER_SHAPE = (1, 128, 64, "bfloat16")
CONVERTING = (
    "reshape_and_cache_flash", "reshape_and_cache", "reshape_and_cache_flash_per_token_head",
    "gather_and_maybe_dequant_cache", "gather_slots", "convert_fp8", "rotary_and_cache",
    "rotary_embedding",
)  # fmt: skip
NOT_READ = "THE MACHINE CODE WAS NOT READ: the wheel nvidia-cuda-cuobjdump is not installed"


@functools.cache
def cuobjdump():
    """The tool that reads machine code, from its wheel; None where that is not installed."""
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((f.locate() for f in files if f.stem == "cuobjdump"), None)


def _run_cuobjdump(option, path):
    return subprocess.run(
        [cuobjdump(), option, path], capture_output=True, text=True, check=True
    ).stdout


def compile_cubin(kernel, architecture):
    """``kernel`` as machine code for ``architecture`` (such as 90), with NVRTC alone: no GPU, no
    driver. Returns (cubin bytes, mangled name)."""
    cubin, names = compile_cubins((kernel,), architecture)
    return cubin, names[kernel.expression]


def compile_cubins(kernels, architecture):
    """`compile_cubin` for several kernels of one source, which is read once. Returns (bytes of one
    cubin, {expression: mangled name})."""
    from cupy.cuda import compiler  # its program class is private: this is its only use

    first = kernels[0]
    expressions = tuple(kernel.expression for kernel in kernels)
    program = compiler._NVRTCProgram(
        first.source(), f"{first.stem}.cu", (), (), expressions, "cubin"
    )
    options = (*modules.OPTIONS, *first.options(), f"-arch=sm_{architecture}", "-ftz=true")
    try:
        cubin, names = program.compile(options)
    except compiler.CompileException as error:
        raise errors.KernelError(
            f"{first.op}: {first!r} could not be compiled for sm_{architecture}: {error}"
        ) from error
    # CuPy strips the image's last byte, a NUL; the tools that read it insist on it.
    return cubin + b"\0", names


def resources(path):
    """{mangled name: {resource: number}} of a cubin's kernels."""
    found = re.findall(r"Function (\S+):\s*\n(.*)", _run_cuobjdump("-res-usage", path))
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        for name, numbers in found
    }


def instructions(path):
    """{mangled name: disassembly} of a cubin's kernels."""
    functions = _run_cuobjdump("-sass", path).split("Function : ")[1:]
    return {text.split(None, 1)[0]: text for text in functions}


def template_parameters(kernel):
    """The name of the kernel's function, and the names of its template parameters."""
    name = re.match(r"cupy_cache::(\w+)<", kernel.expression)[1]
    text = modules.expanded_source(kernel.stem)
    found = re.search(rf"template <([^<>]*)>\s*__global__[^;{{]*?\b{name}\(", text)
    return name, [item.split()[-1] for item in found[1].split(",")]
