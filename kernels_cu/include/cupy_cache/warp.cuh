// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Reductions over groups of neighbouring lanes of a warp.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

// The lanes of this thread's group of kLanes, as a mask. Blocks have one dimension.
template <int kLanes>
__device__ __forceinline__ u32 group_lanes() {
  static_assert(kLanes >= 1 && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "divides a warp");
  return 0xffffffffu >> (32 - kLanes) << (threadIdx.x % 32 / kLanes * kLanes);
}

// The largest value in the group, for all its lanes, each of which must take part; NaN loses.
template <int kLanes>
__device__ __forceinline__ float group_max(float value) {
  const u32 lanes = group_lanes<kLanes>();
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2) {
    value = fmaxf(value, __shfl_xor_sync(lanes, value, other));
  }
  return value;
}

// The sum over the group, for all its lanes, each of which must take part: the same in each.
template <int kLanes>
__device__ __forceinline__ float group_sum(float value) {
  const u32 lanes = group_lanes<kLanes>();
#pragma unroll
  for (int other = kLanes / 2; other > 0; other /= 2) {
    value += __shfl_xor_sync(lanes, value, other);
  }
  return value;
}

}  // namespace cupy_cache
