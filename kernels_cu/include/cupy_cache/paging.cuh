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

// One of several neighbouring segments of rows: its number and its first row.
struct Segment {
  i64 index;
  i64 start;
};

// The segment that holds `row`: starts[i] <= row < starts[i + 1], for `count` segments with
// non-decreasing starts (count + 1 entries). The index is count where row is not below
// starts[count], and -1 where it is below starts[0]. Reads inside starts[0..count] whatever they
// hold. `segments` of `rows` there are in all, or about so many.
//
// What counts is how many loads wait for one another. The segment is guessed as if all were equally
// long, and looked up together with its neighbourhood: right at once for the steps of a decoding
// batch, and else a bracket that leaves few halvings.
template <typename Index>
__device__ __forceinline__ Segment find_segment(const Index* starts, i64 count, i64 row,
                                                i64 segments, i64 rows) {
  // In floating point, because a product could overflow. Any quotient would do: the quick one takes
  // few instructions.
  const float per_row = __fdividef(static_cast<float>(segments), static_cast<float>(rows));
  const i64 reach = 2 + (count >> 4);
  i64 guess = static_cast<i64>(per_row * static_cast<float>(row));
  guess = guess >= count ? count - 1 : guess;
  guess = guess < 0 ? 0 : guess;  // not even for what is no number out of bounds
  const i64 next = guess < count ? guess + 1 : count;
  const i64 below = guess > reach ? guess - reach : 0;
  const i64 above = next + reach < count ? next + reach : count;
  const i64 first = static_cast<i64>(starts[0]);
  const i64 at_below = static_cast<i64>(starts[below]);
  const i64 at_guess = static_cast<i64>(starts[guess]);
  const i64 at_next = static_cast<i64>(starts[next]);
  const i64 at_above = static_cast<i64>(starts[above]);
  const i64 last = static_cast<i64>(starts[count]);
  if (row >= last) return {count, last};
  if (row < first) return {-1, first};
  i64 low = 0, start = first, high = count;  // starts[low] = start <= row < starts[high]
  if (row < at_guess) {
    high = at_below <= row ? guess : below;
    if (at_below <= row) low = below, start = at_below;
  } else if (row < at_next) {
    return {guess, at_guess};
  } else if (row < at_above) {
    low = next, start = at_next, high = above;
  } else {
    low = above, start = at_above;
  }
  while (high - low > 1) {
    const i64 middle = (low + high) / 2;
    const i64 value = static_cast<i64>(starts[middle]);
    if (value <= row) {
      low = middle, start = value;
    } else {
      high = middle;
    }
  }
  return {low, start};
}

}  // namespace cupy_cache
