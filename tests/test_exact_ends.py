# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Sources and slots that end where their memory ends: a kernel that reads one row, or one byte, too
many leaves it, which the emulator sees.

Any number of tokens, on a GPU with many processors and with one: a launch has threads to spare at
some of them, and thread blocks of one warp or of several.
"""

import contextlib

import cases
import ml_dtypes
import numpy as np
import oracle
import pytest
import worlds

import cupy_cache as cc

SLOTS = 96


def rows(rng, tokens, *shape, dtype, gap=0):
    """[tokens, *shape] ordinary numbers, the last of which are the memory's last bytes; before each
    row lie ``gap`` others."""
    size = int(np.prod(shape))
    whole = worlds.of_values(rng.normal(size=(tokens, gap + size)).astype(dtype))
    inner = [whole.strides[1] * int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
    return worlds.Spec(
        whole.buffer, gap * whole.strides[1], (tokens, *shape), (whole.strides[0], *inner),
        whole.dtype,
    )  # fmt: skip


def slots(rng, tokens):
    dtype = rng.choice([np.int32, np.int64])
    return worlds.of_values(rng.permutation(SLOTS)[:tokens].astype(dtype))


def flash(rng, tokens, gap):
    specs = [
        *(rows(rng, tokens, 3, 5, dtype=np.float16, gap=gap) for _ in range(2)),
        *(worlds.array(rng, (SLOTS // 4, 4, 3, 5), "float16") for _ in range(2)),
        slots(rng, tokens),
    ]
    return cases.Case(specs, specs[2:4], cc.reshape_and_cache_flash, oracle.reshape_and_cache_flash)


def flash_wide_values(rng, tokens, gap):
    specs = [
        rows(rng, tokens, 2, 8, dtype=np.float16, gap=gap),
        rows(rng, tokens, 2, 24, dtype=np.float16, gap=gap),
        *(worlds.array(rng, (SLOTS // 4, 4, 2, size), "float16") for size in (8, 24)),
        slots(rng, tokens),
    ]
    return cases.Case(specs, specs[2:4], cc.reshape_and_cache_flash, oracle.reshape_and_cache_flash)


def x_packed(rng, tokens, gap):
    specs = [
        *(rows(rng, tokens, 3, 16, dtype=np.float16, gap=gap) for _ in range(2)),
        worlds.array(rng, (SLOTS // 8, 3, 2, 8, 8), "float16"),
        worlds.array(rng, (SLOTS // 8, 3, 16, 8), "float16"),
        slots(rng, tokens),
    ]
    return cases.Case(specs, specs[2:4], cc.reshape_and_cache, oracle.reshape_and_cache)


def per_token_head(rng, tokens, gap):
    specs = [
        *(rows(rng, tokens, 3, 10, dtype=np.float16, gap=gap) for _ in range(2)),
        *(worlds.array(rng, (SLOTS // 4, 4, 3, 10), "uint8") for _ in range(2)),
        *(worlds.array(rng, (SLOTS // 4, 4, 3), "float32") for _ in range(2)),
        slots(rng, tokens),
    ]
    return cases.Case(
        specs,
        specs[2:6],
        lambda *args: cc.reshape_and_cache_flash_per_token_head(*args, "fp8"),
        lambda *args: oracle.reshape_and_cache_flash_per_token_head(*args, "float8_e4m3fn"),
    )


def entries(rng, tokens, gap):
    specs = [
        *(rows(rng, tokens, size, dtype=np.float16, gap=gap) for size in (24, 7)),
        worlds.array(rng, (SLOTS // 4, 4, 31), "float16"),
        slots(rng, tokens),
    ]
    return cases.Case(specs, specs[2:3], cc.concat_and_cache_mla, oracle.concat_and_cache_mla)


def ds_entries(rng, tokens, gap):
    tokens = min(tokens, 7)
    specs = [
        *(rows(rng, tokens, size, dtype=ml_dtypes.bfloat16, gap=gap) for size in (512, 64)),
        worlds.array(rng, (SLOTS // 4, 4, 656), "uint8"),
        slots(rng, tokens),
    ]
    return cases.Case(
        specs,
        specs[2:3],
        lambda *args: cc.concat_and_cache_mla(*args, "fp8_ds_mla"),
        lambda *args: oracle.concat_and_cache_fp8_ds_mla(*args, "power_of_two"),
    )


def layers_of_entries(rng, tokens, gap):
    def layers(size):
        whole = rng.normal(size=(2, tokens, gap + size)).astype(np.float16)
        return worlds.of_values(whole)[..., gap:]

    caches = [worlds.array(rng, (SLOTS // 4, 4, 31), "float16") for _ in range(2)]
    numbers = worlds.of_values(np.stack([rng.permutation(SLOTS)[:tokens] for _ in caches]))

    def run(kv_c, k_pe, numbers, *caches):
        cc.concat_and_cache_mla_grouped(kv_c, k_pe, list(caches), numbers)

    def expected(kv_c, k_pe, numbers, *caches):
        for layer in zip(kv_c, k_pe, caches, numbers):
            oracle.concat_and_cache_mla(*layer)

    return cases.Case([layers(24), layers(7), numbers, *caches], caches, run, expected)


def indexer(rng, tokens, gap):
    specs = [
        rows(rng, tokens, 48, dtype=np.float16, gap=gap),
        worlds.array(rng, (SLOTS // 4, 4, 48 + 12), "uint8"),
        slots(rng, tokens),
    ]
    return cases.Case(
        specs,
        specs[1:2],
        lambda *args: cc.indexer_k_quant_and_cache(*args, 16, "ue8m0"),
        lambda *args: oracle.indexer_k_quant_and_cache(*args, 16, "ue8m0"),
    )


def converted(rng, tokens, gap):
    specs = [
        worlds.array(rng, (tokens, 3, 5), "uint8"),
        rows(rng, tokens, 3, 5, dtype=np.float16, gap=gap),
    ]

    def expected(output, source):
        output[...] = oracle.quantise(source, 0.25, "float8_e4m3fn")

    return cases.Case(
        specs, specs[:1], lambda out, source: cc.convert_fp8(out, source, 0.25), expected
    )


MADE = (
    flash, flash_wide_values, x_packed, per_token_head, entries, ds_entries, layers_of_entries,
    indexer, converted,
)  # fmt: skip


@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_nothing_is_read_past_the_last_row(emulated_world, rng, make, gap):
    for processors in (132, 1):
        for tokens in (1, 2, *rng.integers(3, 40, 2)):
            case = make(rng, int(tokens), gap)
            with contextlib.closing(emulated_world(processors=processors)) as world:
                case.call(world)
                case.check(world)
