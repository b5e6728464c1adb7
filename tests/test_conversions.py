# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Of many elements, each bit pattern is converted once: the same codes as one by one."""

import numpy as np
import oracle
import pytest

from cupy_cache.cpu import conversions
from cupy_cache.runtime import formats


@pytest.mark.whole
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "int8"])
@pytest.mark.parametrize("source", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [1, 3])
def test_many_elements(rng, source, stored, heads):
    bits = rng.integers(0, 2**16, (700, heads, 97)).astype(np.uint16)
    scales = rng.uniform(0.01, 4, (heads, 1)).astype(np.float32)
    dtype, target = formats.DTYPES[source], formats.DTYPES[stored]
    made = conversions.quantise(bits, dtype, scales, target)
    few = [conversions.quantise(part, dtype, scales, target) for part in np.split(bits, 70)]
    np.testing.assert_array_equal(made, np.concatenate(few))
    values = bits.view(dtype.numpy)
    for _ in range(300):
        token, head, at = (int(rng.integers(0, n)) for n in bits.shape)
        expected = oracle.quantise(values[token, head, at], scales[head, 0], stored)
        assert made[token, head, at] == expected
