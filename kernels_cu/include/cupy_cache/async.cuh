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

}  // namespace cupy_cache
