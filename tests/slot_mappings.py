# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""How the operations that compute slots are compared with the oracle."""

import numpy as np
import worlds
from guards import check_faults


def values(numbers, dtype="int64"):
    return worlds.of_values(np.asarray(numbers, dtype))


def compare(world, op, specs, out, shape, result, expect):
    """Compare the result of ``op``, the whole storages and the recorded faults with the oracle's.

    ``out`` is the spec written to; None: ``result`` is a new array of ``shape``. ``expect(on,
    slots)`` writes the expected slots and returns the faults; ``on`` gives a spec's content before
    the call. Returns the slots.
    """
    specs = [s for s in (*specs, out) if s is not None]
    expected = {id(s.buffer): s.buffer.bytes.copy() for s in specs}

    def on(spec):
        return None if spec is None else spec.on(expected[id(spec.buffer)])

    slots = np.full(shape, 123) if out is None else on(out)
    faults = expect(on, slots)
    for spec in specs:
        np.testing.assert_array_equal(world.bytes_of(spec), expected[id(spec.buffer)])
    if out is None:
        world.synchronize()
        result = world.numpy(result)
        assert result.dtype == np.int64
        np.testing.assert_array_equal(result, slots)
    check_faults(op, faults)
    return slots
