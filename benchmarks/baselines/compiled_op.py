# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Building the compiled torch operation that host times are compared with."""

import functools
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@functools.cache
def _built():
    """The operation, or why there is none; torch keeps what it built for later processes."""
    import torch
    from torch.utils import cpp_extension

    if not torch.cuda.is_available():
        return "no GPU"
    if shutil.which("nvcc") is None and cpp_extension.CUDA_HOME is None:
        return "no nvcc"
    sources = [str(HERE / f"compiled_op.{suffix}") for suffix in ("cpp", "cu")]
    major, minor = torch.cuda.get_device_capability()
    try:
        cpp_extension.load(
            "cupy_cache_benchmarks", sources, is_python_module=False, extra_cflags=["-O2"],
            extra_cuda_cflags=["-O2", f"-arch=sm_{major}{minor}"],
        )  # fmt: skip
    except Exception as error:
        return f"the build failed: {str(error)[-500:]}"
    return torch.ops.cupy_cache_benchmarks.write


def write():
    """torch.ops' callable, with the arguments of `cupy_cache.reshape_and_cache_flash` in order;
    skips where it cannot be built."""
    found = _built()
    if isinstance(found, str):
        pytest.skip(f"compiled torch op: {found}")
    return found
