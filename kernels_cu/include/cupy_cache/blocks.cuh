// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// What a block looks like: runs of contiguous bytes, laid out in up to two dimensions.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

// Strides in bytes: from block to block, and of the runs inside one.
struct Side {
  i64 block;
  i64 outer;
  i64 middle;
};

// Where vector `index` of a block lies, its runs counted outer dimension first. kRun is the vectors
// of a run; 0 means that the whole block is one run, kNested that runs are laid out in two
// dimensions, of which the inner one has `middle_count`.
template <int kVec, int kRun, bool kNested>
__device__ __forceinline__ i64 offset_in_block(const Side& side, u32 middle_count, u32 index) {
  if constexpr (kRun == 0) {
    return static_cast<i64>(index) * kVec;
  } else {
    const u32 run = index / kRun;
    const i64 inside = static_cast<i64>(index % kRun) * kVec;
    if constexpr (kNested) {
      return (run / middle_count) * side.outer + (run % middle_count) * side.middle + inside;
    } else {
      return run * side.middle + inside;
    }
  }
}

}  // namespace cupy_cache
