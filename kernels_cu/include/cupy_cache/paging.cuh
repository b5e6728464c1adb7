// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Where a token lives: slot -> (block, offset), the bounds guard, and the fault record.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

// The first value outside its bounds that this module met. Module loading zeroes it, so it needs
// neither an allocation nor a memset, and works inside a graph capture. Read by name by the host.
struct Fault {
  u32 taken;
  u32 argument;  // 1-based index into the operation's list of guarded arguments
  i64 row;
  i64 value;
  i64 limit;
};

}  // namespace cupy_cache

extern "C" {
__device__ cupy_cache::Fault cupy_cache_fault;
}

namespace cupy_cache {

__device__ __noinline__ void record_fault(u32 argument, i64 row, i64 value, i64 limit) {
  if (atomicCAS(&cupy_cache_fault.taken, 0u, 1u) == 0u) {
    cupy_cache_fault.argument = argument;
    cupy_cache_fault.row = row;
    cupy_cache_fault.value = value;
    cupy_cache_fault.limit = limit;
  }
}

// Whether 0 <= value < limit; records a fault where it is not. Nothing may be dereferenced with a
// value that was refused here.
__device__ __forceinline__ bool in_bounds(i64 value, i64 limit, u32 argument, i64 row) {
  if (static_cast<u64>(value) < static_cast<u64>(limit)) return true;
  record_fault(argument, row, value, limit);
  return false;
}

// A slot's block and the offset inside it. kBlockSize is a template argument so that the division
// is a shift, or a multiplication.
template <int kBlockSize>
struct Place {
  i64 block;
  i32 offset;

  __device__ __forceinline__ explicit Place(i64 slot)
      : block(static_cast<i64>(static_cast<u64>(slot) / kBlockSize)),
        offset(static_cast<i32>(static_cast<u64>(slot) % kBlockSize)) {}
};

// The index i of the segment that holds `row`: starts[i] <= row < starts[i + 1], for `count`
// segments with non-decreasing starts (count + 1 entries). Returns count where row is not below
// starts[count], and -1 where it is below starts[0]. Reads inside starts[0..count] whatever they
// hold.
template <typename Index>
__device__ __forceinline__ i64 find_segment(const Index* starts, i64 count, i64 row) {
  i64 low = -1, high = count;  // starts[low] <= row < starts[high], outside ends assumed
  if (row >= static_cast<i64>(starts[count])) return count;
  while (high - low > 1) {
    const i64 middle = (low + high) / 2;
    if (static_cast<i64>(starts[middle]) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace cupy_cache
