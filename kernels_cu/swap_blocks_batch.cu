// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Copies ranges of bytes, given by address and of any size, in one launch. Ranges are cut into
// chunks; a thread block takes one chunk at a time and finds its range by a binary search, so that
// long and short ranges share a launch without idle blocks. The ranges travel inside the parameter
// struct.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

constexpr int kRanges = 512;  // 12 KiB of kernel parameters: CUDA 12.1 or newer

struct Range {
  u64 source;
  u64 destination;
  u32 end;    // chunks of this range and of those before it
  u32 bytes;  // at most 2^31
};

struct Params {
  i64 ranges;
  i64 chunks;  // of all ranges
  Range table[kRanges];
};

// Both addresses are multiples of kVec; the bytes need not be.
template <int kVec, int kThreads>
__device__ __forceinline__ void move(char* to, const char* from, u32 bytes) {
  const u32 vectors = bytes / kVec;
  for (u32 index = threadIdx.x; index < vectors; index += 2 * kThreads) {
    const u32 other = index + kThreads;
    Vec<kVec> held[2] = {};
    held[0] = load_vector<kVec>(from + index * kVec);
    if (other < vectors) held[1] = load_vector<kVec>(from + other * kVec);
    store_vector<kVec>(to + index * kVec, held[0]);
    if (other < vectors) store_vector<kVec>(to + other * kVec, held[1]);
  }
  const u32 rest = vectors * kVec + threadIdx.x;
  if (rest < bytes) to[rest] = from[rest];
}

template <int kChunk, int kThreads>
__global__ void __launch_bounds__(kThreads) swap_blocks_batch(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  for (u32 chunk = blockIdx.x; chunk < p.chunks; chunk += gridDim.x) {
    u32 low = 0, high = static_cast<u32>(p.ranges) - 1;  // the first range that ends behind it
    while (low < high) {
      const u32 middle = (low + high) / 2;
      if (p.table[middle].end > chunk) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const Range& range = p.table[low];
    const u32 at = (chunk - (low ? p.table[low - 1].end : 0)) * kChunk;  // below 2^31
    const u32 bytes = range.bytes - at < kChunk ? range.bytes - at : kChunk;
    const char* from = reinterpret_cast<const char*>(range.source) + at;
    char* to = reinterpret_cast<char*>(range.destination) + at;
    const u64 both = range.source | range.destination;
    if (both % 16 == 0) {
      move<16, kThreads>(to, from, bytes);
    } else if (both % 8 == 0) {
      move<8, kThreads>(to, from, bytes);
    } else if (both % 4 == 0) {
      move<4, kThreads>(to, from, bytes);
    } else if (both % 2 == 0) {
      move<2, kThreads>(to, from, bytes);
    } else {
      move<1, kThreads>(to, from, bytes);
    }
  }
}

}  // namespace cupy_cache
