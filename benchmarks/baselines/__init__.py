# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Operations without the founding optimisations, each of which can be switched off by itself.

1. ``upload``: pointer tables and mapping go to the device by blocking copies from pageable memory,
   instead of inside the kernel's parameters;
2. ``two_loops``: keys, then values, element by element, instead of one loop of 16-byte vectors;
3. ``capped``: thread blocks of ``min(n, 512)`` threads for n elements, instead of whole warps;
4. slopes from a Python list through a CPU tensor, instead of a kernel's.

With nothing switched off these are the library's design in its smallest form, launched as the
library launches, without its checks of arguments: the control that shows what else differs between
them and the library's own calls.
"""

import functools
import struct
from pathlib import Path

from cupy_cache.runtime import launch, modules, params

TABLE_WORDS = 480
COPY_PARAMS = params.Struct(
    per_call="block_bytes:i64 key_caches:ptr value_caches:ptr mapping:ptr",
    tail=f"table:u64[{TABLE_WORDS}]",
)
WRITE_PARAMS = params.Struct(
    per_call="key:ptr value:ptr key_cache:ptr value_cache:ptr slot_mapping:ptr tokens:i64 "
    "num_slots:i64",
)
MAX_THREADS = 256


class Kernel(modules.Kernel):
    """A kernel of this folder, which the library then loads and launches like its own."""

    def __init__(self, stem, expression, params):
        super().__init__(f"baseline {stem}", stem, expression, params)
        self.expression = f"baselines::{expression}"

    def source(self):
        """The ``.cu`` file, and the check that its parameters are laid out as here."""
        text = (Path(__file__).parent / f"{self.stem}.cu").read_text(encoding="utf-8")
        return text + self.params.asserts("baselines::Params")


def copy_kernel(upload, two_loops):
    """The instantiation of ``copy_blocks.cu`` for these switches."""
    merged, element = ("false", "unsigned short") if two_loops else ("true", "uint4")
    expression = f"copy_blocks<{'true' if upload else 'false'}, {merged}, {element}>"
    return Kernel("copy_blocks", expression, COPY_PARAMS)


def write_kernel(vectors):
    """The instantiation of ``write_rows.cu`` for rows of so many 16-byte vectors."""
    return Kernel("write_rows", f"write_rows<{vectors}>", WRITE_PARAMS)


@functools.cache
def _launcher(make, *switches):
    return launch.Launcher(make(*switches), 0)


def current_stream():
    """torch's, on the first GPU."""
    import torch

    return torch._C._cuda_getCurrentRawStream(0)


def threads_for(items, elements, capped):
    """Threads of a block: the library's whole warps for ``items`` vectors, or min(n, 512)."""
    return min(elements, 512) if capped else launch.block_threads(items, 1, MAX_THREADS)


def copy_blocks(
    key_caches, value_caches, pairs, upload=False, two_loops=False, capped=False, tables=None
):
    """`cupy_cache.copy_blocks` of contiguous caches and a list of pairs, on torch's stream.

    ``tables``, from `upload_tables`, stand for uploads made beforehand.
    """
    first = key_caches[0][0]
    block_bytes = first.numel() * first.element_size()
    threads = threads_for(block_bytes // 16, first.numel(), capped)
    launcher = _launcher(copy_kernel, upload, two_loops)
    grid = (launch.ceil_div(block_bytes, threads * 16), len(pairs), len(key_caches))
    if upload:
        tables = tables or upload_tables(key_caches, value_caches, pairs)
        pointers = (table.data_ptr() for table in tables)
        launcher.enqueue(grid, threads, current_stream(), block_bytes, *pointers)
        return
    words = [c.data_ptr() for layer in zip(key_caches, value_caches) for c in layer]
    words += [to << 32 | of for of, to in pairs]
    if len(words) > TABLE_WORDS:
        raise ValueError(f"{len(words)} words of pointers and pairs do not fit {TABLE_WORDS}")
    tail = struct.pack(f"<{len(words)}Q", *words)
    launcher.enqueue(grid, threads, current_stream(), block_bytes, 0, 0, 0, tail=tail)


def upload_tables(key_caches, value_caches, pairs):
    """Both pointer tables and the mapping on the device, by three blocking copies."""
    import torch

    tables = [c.data_ptr() for c in key_caches], [c.data_ptr() for c in value_caches], pairs
    device = key_caches[0].device
    return [torch.tensor(table, dtype=torch.int64).to(device) for table in tables]


def write_rows(key, value, key_cache, value_cache, slots, capped=False):
    """`cupy_cache.reshape_and_cache_flash` of contiguous arrays, on torch's stream."""
    tokens, heads, size = key.shape
    vectors, rest = divmod(heads * size * key.element_size(), 16)
    if rest:
        raise ValueError(f"{heads}x{size} {key.dtype} are not whole 16-byte vectors")
    threads = threads_for(tokens * vectors, heads * size, capped)
    grid = (launch.ceil_div(tokens * vectors, threads), 1, 1)
    pointers = (a.data_ptr() for a in (key, value, key_cache, value_cache, slots))
    num_slots = key_cache.shape[0] * key_cache.shape[1]
    _launcher(write_kernel, vectors).enqueue(
        grid, threads, current_stream(), *pointers, tokens, num_slots
    )


def slopes_through_cpu(slopes, device):
    """A Python list of slopes to a device tensor, by way of a CPU tensor."""
    import torch

    return torch.tensor(slopes, dtype=torch.float32).to(device)
