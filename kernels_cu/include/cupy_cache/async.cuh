// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that run on while the thread computes (sm_80 and newer; before,
// and where a host compiler reads this, they are done at once).
#pragma once

#include "cupy_cache/ints.cuh"
#include "cupy_cache/vec.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define CUPY_CACHE_ASYNC
#endif

namespace cupy_cache {

// Starts to copy kBytes bytes; if not `present`, nothing is read and zeros are written. What has less
// than four bytes is copied at once.
template <int kBytes>
__device__ __forceinline__ void copy_async(char* shared, const char* global, bool present) {
#ifdef CUPY_CACHE_ASYNC
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  const u64 from = __cvta_generic_to_global(global);
  const u32 bytes = present ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(bytes)
                 : "memory");
    return;
  } else if constexpr (kBytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
    return;
  } else if constexpr (kBytes == 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
    return;
  }
#endif
  Vec<kBytes> vector = {};
  if (present) vector = *reinterpret_cast<const Vec<kBytes>*>(global);
  *reinterpret_cast<Vec<kBytes>*>(shared) = vector;
}

// Ends a group of copies of this thread.
__device__ __forceinline__ void commit_copies() {
#ifdef CUPY_CACHE_ASYNC
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies, but for those of the latest kGroups groups.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  static_assert(kGroups >= 0 && kGroups <= 3, "the number is part of the instruction");
#ifdef CUPY_CACHE_ASYNC
  if constexpr (kGroups == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if constexpr (kGroups == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else if constexpr (kGroups == 2) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
#endif
}

// Waits until as many whole warps of the block have come to the barrier of this number, 1 to 15; what they
// wrote to shared memory is then seen.
__device__ __forceinline__ void sync_warps(u32 number, u32 warps) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(warps * 32) : "memory");
}

// Copies of whole rows, which one thread starts (sm_90 and newer): of a multiple of 16 bytes, all
// addresses too. They arrive at a word in shared memory, which tells when all of a round are there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasRowCopies = true;
#else
constexpr bool kHasRowCopies = false;
#endif

// Makes a word one at which `count` threads arrive in each round. One thread calls it; the others use
// the word behind a barrier.
__device__ __forceinline__ void begin_arrivals(u64* word, u32 count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(word));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrives at the word, and says how many bytes are on their way to this round.
__device__ __forceinline__ void expect_bytes(u64* word, u32 bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(word));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
               : "memory");
#endif
}

// Starts to copy a row, whose bytes are expected at the word.
__device__ __forceinline__ void copy_row(char* shared, const char* global, u32 bytes, u64* word) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
  const u64 from = __cvta_generic_to_global(global);
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(word));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(at)
      : "memory");
#endif
}

// Waits until a round of the word is over: an even one if `odd` is 0, counted from 0.
__device__ __forceinline__ void wait_for_rows(u64* word, u32 odd) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(word));
  u32 over;
  do {
    asm volatile(
        "{ .reg .pred over; mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2; "
        "selp.u32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(at), "r"(odd)
        : "memory");
  } while (over == 0);
#endif
}

// Orders what this thread read and wrote in shared memory before row copies to the same place, which
// come behind a barrier; and what it wrote, or others did in front of a barrier, before products that
// read shared memory (warpgroup.cuh). It waits for all that this thread has under way.
__device__ __forceinline__ void fence_row_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace cupy_cache
