# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""The bare read of so many bytes: the ceiling of what must read them and writes little."""

import functools

from cupy_cache.runtime import launch, params

from .. import timing
from . import Kernel, current_stream

PARAMS = params.Struct(per_call="from:ptr sink:ptr vectors:i64")
THREADS, TOGETHER = 256, 4
BLOCKS_PER_PROCESSOR = (4, 8, 16)  # the quickest counts


@functools.cache
def _launcher():
    return launch.Launcher(Kernel("bare_read", f"bare_read<{THREADS}>", PARAMS), 0)


@functools.cache
def read_us(count):
    """Microseconds that reading ``count`` bytes takes, measured as the operations are."""
    torch = timing.torch_module()
    count = count // 16 * 16
    sets = timing.sets_for(count)
    source = torch.randint(0, 256, (sets, count), dtype=torch.uint8, device="cuda")
    sink = torch.zeros(16, dtype=torch.uint8, device="cuda")
    needed = launch.ceil_div(count // 16, THREADS * TOGETHER)

    def call(index, blocks):
        _launcher().enqueue(
            (min(needed, blocks * launch.processors(0)), 1, 1), THREADS, current_stream(),
            source[index].data_ptr(), sink.data_ptr(), count // 16,
        )  # fmt: skip

    return min(
        timing.DeviceTimer(
            [functools.partial(call, index, blocks) for index in range(sets)]
        ).median()
        for blocks in BLOCKS_PER_PROCESSOR
    )
