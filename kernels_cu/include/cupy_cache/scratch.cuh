// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Thread blocks that share a piece of work through scratch memory: each writes its part, and the last
// one to be done finds the others'.
//
// The memory comes as it is, and is another's again when the kernel is done. So a count of arrivals
// must not depend on what was there before: it is told from anything else by a tag, a random number
// of 48 bits that the host has chosen for the process, in the upper bits. A word without it counts as
// none, and the last one to arrive takes it away. Words are 64 bits, aligned.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

constexpr u64 kCountBits = 0xffff;  // of a word: the number of blocks that have arrived

// Whether this thread is the last of `expected` to come to this word.
__device__ __forceinline__ bool arrive(u64* word, u64 tag, u32 expected) {
  u64 known = 0;
  for (;;) {
    const u64 arrived = (known & ~kCountBits) == tag ? (known & kCountBits) + 1 : 1;
    const bool last = arrived == expected;
    const u64 found = atomicCAS(word, known, last ? 0 : tag | arrived);
    if (found == known) return last;
    known = found;
  }
}

// The same for a block whose threads have written to global memory: all of them call it. If it is the
// last one, they see what the other blocks had written before they came; read it with load_shared.
__device__ __forceinline__ bool arrive_block(u64* word, u64 tag, u32 expected) {
  __shared__ u32 last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = arrive(word, tag, expected);
    __threadfence();
  }
  __syncthreads();
  return last != 0;
}

}  // namespace cupy_cache
