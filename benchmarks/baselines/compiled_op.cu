// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// The kernel of compiled_op.cpp: contiguous rows of 16-byte vectors to their slots.
#include <cuda_runtime.h>

__global__ void write_rows(const uint4* key, const uint4* value, uint4* key_cache,
                           uint4* value_cache, const long* slots, long vectors) {
  const long slot = slots[blockIdx.x];
  if (slot < 0) return;
  for (long i = threadIdx.x; i < vectors; i += blockDim.x) {
    key_cache[slot * vectors + i] = key[blockIdx.x * vectors + i];
    value_cache[slot * vectors + i] = value[blockIdx.x * vectors + i];
  }
}

void launch_write(const void* key, const void* value, void* key_cache, void* value_cache,
                  const long* slots, long tokens, long vectors, void* stream) {
  const int threads = vectors < 512 ? static_cast<int>(vectors) : 512;
  write_rows<<<static_cast<unsigned>(tokens), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(key), static_cast<const uint4*>(value),
      static_cast<uint4*>(key_cache), static_cast<uint4*>(value_cache), slots, vectors);
}
