# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
import pytest
from pending import FRAMEWORKS, framework_named

import cupy_cache as cc


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return framework_named(request.param)


@pytest.fixture
def torch():
    return framework_named("torch").module


@pytest.fixture
def cupy():
    return framework_named("cupy").module


@pytest.fixture
def two_gpus(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only")


@pytest.fixture(autouse=True)
def no_faults():
    """Those that a test leaves are its own, not those of a later one."""
    yield
    cc.raise_faults()
