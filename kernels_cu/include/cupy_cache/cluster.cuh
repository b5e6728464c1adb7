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
