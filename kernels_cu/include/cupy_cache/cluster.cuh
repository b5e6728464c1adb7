// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Clusters: thread blocks that run at the same time and read each other's shared memory (sm_90 and
// newer).
#pragma once

#include "cupy_cache/ints.cuh"

// Blocks of a cluster, along x; and shared memory of a size that the launch gives.
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
#define CUPY_CACHE_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define CUPY_CACHE_CLUSTER(blocks)
#endif
#ifdef __CUDACC__
#define CUPY_CACHE_ALIGNED_SHARED(name, bytes, alignment) \
  extern __shared__ __align__(alignment) char name[]
#else
#define CUPY_CACHE_ALIGNED_SHARED(name, bytes, alignment) \
  __shared__ __align__(alignment) char name[bytes]
#endif
#define CUPY_CACHE_DYNAMIC_SHARED(name, bytes) CUPY_CACHE_ALIGNED_SHARED(name, bytes, 128)

namespace cupy_cache {

// Waits until all threads of the cluster are here; what they wrote to shared memory is then seen.
__device__ __forceinline__ void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// The two halves of that for what needs no order of memory: tells that this thread is here, and waits
// until all are. Whole warps call them.
__device__ __forceinline__ void arrive_at_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Sends two numbers to the place that `here` has in the shared memory of block `rank` of the cluster.
// They arrive at that block's word, as rows that are copied do (async.cuh), when they are there: no fence
// is needed, which takes half a microsecond.
__device__ __forceinline__ void send_to_block(float2* here, float2 numbers, u64* word, u32 rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(here));
  const u32 word_at = static_cast<u32>(__cvta_generic_to_shared(word));
  u32 there, word_there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(word_there) : "r"(word_at), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          there),
      "f"(numbers.x), "f"(numbers.y), "r"(word_there)
      : "memory");
#endif
}

// Waits until all that was expected at the word has been sent.
__device__ __forceinline__ void wait_for_sent(u64* word) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(word));
  u32 over;
  do {
    asm volatile(
        "{ .reg .pred over; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], 0; "
        "selp.u32 %0, 1, 0, over; }"
        : "=r"(over)
        : "r"(at)
        : "memory");
  } while (over == 0);
#endif
}

// Two numbers at the place that `here` has in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ float2 load_from_block(const float2* here, u32 rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(here));
  u32 there;
  float2 found;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(found.x), "=f"(found.y)
               : "r"(there)
               : "memory");
  return found;
#else
  return *here;
#endif
}

}  // namespace cupy_cache
