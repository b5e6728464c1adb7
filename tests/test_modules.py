# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between a source and a loaded kernel has a name and a way out."""

from types import SimpleNamespace

import pytest

import cupy_cache as cc
from cupy_cache.attention import alibi_slopes as attention
from cupy_cache.runtime import modules

KERNEL = attention.ALIBI
CUPY = SimpleNamespace(
    cuda=SimpleNamespace(Device=lambda index: SimpleNamespace(compute_capability="999"))
)


def explained(error):
    return modules._explain(error, KERNEL, 1, CUPY)


def test_an_architecture_that_nvrtc_does_not_know():
    """With the very text that NVRTC gives."""
    pytest.importorskip("cupy")
    with pytest.raises(cc.KernelError) as caught:
        modules.compile_cubin(KERNEL, 999)
    error = explained(RuntimeError(str(caught.value.__cause__)))
    assert isinstance(error, cc.UnsupportedArchitectureError)
    assert "999" in str(error) and "nvidia-cuda-nvrtc" in str(error) and "cuda:1" in str(error)


@pytest.mark.parametrize(
    "error, word",
    [
        (RuntimeError("CuPy failed to load libnvrtc.so.13: cannot open shared object"), "NVRTC"),
        (OSError("libnvrtc.so.13: cannot open shared object file"), "NVRTC"),
        (ImportError("libnvrtc"), "NVRTC"),
        (RuntimeError("Failed to find CUDA headers. Install nvidia-cuda-runtime"), "headers"),
    ],
)
def test_what_is_missing_is_named_with_the_command(error, word):
    named = explained(error)
    assert isinstance(named, cc.MissingDependencyError)
    assert word in str(named) and "pip install 'cupy-cache[cuda13x]'" in str(named)


def test_a_mistake_in_a_source_stays_a_mistake():
    named = explained(
        RuntimeError("kernels_cu/include/cupy_cache/vec.cuh(7): error: no header cuda")
    )
    assert type(named) is cc.KernelError


def test_no_kernel_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYCACHE_KERNEL_DIR", str(tmp_path))
    with pytest.raises(cc.KernelError, match="CUPYCACHE_KERNEL_DIR"):
        modules.kernel_dir()


def test_an_old_cupy_is_refused():
    with pytest.raises(cc.MissingDependencyError, match=r"14\.2.*14\.1\.3"):
        modules._require_cupy_version(SimpleNamespace(__version__="14.1.3"))
    modules._require_cupy_version(SimpleNamespace(__version__="15.0.0a1"))
