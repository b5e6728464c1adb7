// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Thread blocks that share a piece of work through scratch memory: each writes its part, and the last
// one to be done finds the others'.
//
// The memory comes as it is, and is another's again when the kernel is done. So a count of arrivals
// must not depend on what was there before: it is told from anything else by a tag, a random number
// of 48 bits that the host has chosen for the process, in the upper bits. Whoever is to arrive begins
// the count if nobody has, and the last one to arrive takes the tag away. Words are 64 bits, aligned.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

constexpr u64 kCountBits = 0xffff;  // of a word: the number of blocks that have arrived

// What is in a word, to be given to begin_count when there is time to wait for it. Nobody need have
// written it: compute-sanitizer's initcheck tells of this read, and of no other.
__device__ __forceinline__ u64 look_at_count(u64* word) { return atomicAdd(word, u64{0}); }

// Begins the count, unless another thread that is to arrive has.
__device__ __forceinline__ void begin_count(u64* word, u64 tag, u64 seen) {
  if ((seen & ~kCountBits) != tag) atomicCAS(word, seen, tag);
}

// Called by all threads of a block that have written to global memory: whether it is the last of
// `expected` blocks to come to this word. If so, they see what the other blocks had written before
// they came; read it through the L2. `begun`: thread 0 has begun the count before.
__device__ __forceinline__ bool arrive_block(u64* word, u64 tag, u32 expected, bool begun = false) {
  __shared__ u32 last;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!begun) begin_count(word, tag, look_at_count(word));
    __threadfence();
    last = (atomicAdd(word, u64{1}) & kCountBits) + 1 == expected;
    if (last) atomicExch(word, u64{0});
    __threadfence();
  }
  __syncthreads();
  return last != 0;
}

}  // namespace cupy_cache
