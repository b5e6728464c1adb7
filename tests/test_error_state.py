# SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
# SPDX-License-Identifier: Apache-2.0
"""Floating-point errors of the caller's numbers are ignored on NumPy arrays, as on a GPU: no bits
make an operation warn or raise, whatever np.seterr says. The bytes are compared elsewhere."""

import numpy as np
import pytest

import cupy_cache as cc
from cupy_cache.runtime import formats

FLOATS = [dtype.name for dtype in formats.FLOATS]
KINDS = ["fp8", "fp8_e5m2", "int8"]


def numbers(dtype, *shape):
    """65536 numbers: the bits of a 16-bit type, or the upper half of float32's. Subnormals,
    infinities, quiet and signalling NaNs among them."""
    upper = np.arange(1 << 16, dtype=np.uint32)
    bits = upper << 16 | 1 if dtype == "float32" else upper.astype(np.uint16)
    return bits.view(formats.DTYPES[dtype].numpy).reshape(shape)


def silent(operation, *arrays, **options):
    """Run where every floating-point error raises."""
    with np.errstate(all="raise"):
        operation(*arrays, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_scaled_writes(dtype, kind):
    rows, slots = numbers(dtype, 128, 4, 128), np.arange(128)
    caches = np.zeros((2, 2, 64, 4, 128), np.uint8)
    packed = caches.reshape(2, 2, 4, 8, 64, 16), caches.reshape(2, 2, 4, 128, 64)
    entries = numbers(dtype, 128, 512)
    for scale in (1.0, 1e-30, 1e30):
        scales = {"k_scale": scale, "v_scale": np.full(4, scale, np.float32)}
        silent(cc.reshape_and_cache_flash, rows, rows, *caches, slots, kind, **scales)
        silent(cc.reshape_and_cache, rows, rows, packed[0][0], packed[1][1], slots, kind, **scales)
        flat = caches[0].reshape(2, 64, 512)
        silent(cc.concat_and_cache_mla, entries, entries[:, :0], flat, slots, kind, scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_scales_found_for_each_row(dtype, kind):
    rows = numbers(dtype, 128, 4, 128)
    caches = np.zeros((2, 2, 64, 4, 128), np.uint8)
    scales = np.zeros((2, 2, 64, 4), np.float32)
    operation = cc.reshape_and_cache_flash_per_token_head
    silent(operation, rows, rows, *caches, *scales, np.arange(128), kind)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", ["power_of_two", "amax"])
def test_entries_of_656_bytes(dtype, rule):
    kv_c = numbers(dtype, 128, 512)
    cache = np.zeros((2, 64, 656), np.uint8)
    write = cc.concat_and_cache_mla
    silent(write, kv_c, kv_c[:, :64], cache, np.arange(128), "fp8_ds_mla", scale_rule=rule)
    cache[..., 512:528] = numbers("float32", 65536)[-512:].view(np.uint8).reshape(2, 64, 16)
    for target in FLOATS:
        rows = np.zeros((128, 576), formats.DTYPES[target].numpy)
        read = cc.cp_gather_and_upconvert_fp8_kv_cache
        step = np.array([[0, 1]]), np.array([0]), 1
        silent(read, cache, rows, *step, rope_dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["auto", "ue8m0", "mxfp8"])
def test_indexer_keys(dtype, kind):
    keys, cache = numbers(dtype, 512, 128), np.zeros((8, 64, 132), np.uint8)
    silent(cc.indexer_k_quant_and_cache, keys, cache, np.arange(512), 128, kind)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_conversions(dtype, kind):
    codes = np.tile(np.arange(256, dtype=np.uint8), (2, 1))
    for scale in (1.0, 1e-38, 1e38):
        rows = np.zeros((2, 256), formats.DTYPES[dtype].numpy)
        step = np.array([[0]]), np.array([0, 2]), None, 2
        silent(cc.gather_and_maybe_dequant_cache, codes[None], rows, *step, kind, scale)
        if kind != "int8":
            silent(cc.convert_fp8, rows, codes, scale, kind)
            silent(cc.convert_fp8, np.zeros(65536, np.uint8), numbers(dtype, 65536), scale, kind)


@pytest.mark.parametrize("dtype", FLOATS)
def test_biases(dtype):
    slopes, positions = numbers("float32", 65536)[::257], np.array([0, 1, 2**62])
    out = np.zeros((len(slopes), 3, 3), formats.DTYPES[dtype].numpy)
    for sqrt in (False, True):
        silent(cc.alibi_bias, slopes, positions, positions, out=out, sqrt=sqrt)


def test_slopes():
    silent(cc.place_slopes, numbers("float32", 65536), device="cpu")
    silent(cc.place_slopes, [1e-300, float("nan"), float("inf")], device="cpu")
    silent(cc.alibi_slopes, 1000, max_bias=126, device="cpu")
