// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Where a token lives: slot -> (block, offset), the bounds guard, and the fault record.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

// The first value outside its bounds that this module met. Module loading zeroes it, so it needs
// neither an allocation nor a memset, and works inside a graph capture. Read by name by the host.
struct Fault {
  u32 taken;     // kFree, kClaimed while the others are filled in, then kPublished
  u32 argument;  // 1-based index into the operation's list of guarded arguments
  i64 row;
  i64 value;
  i64 limit;
};

constexpr u32 kFree = 0;
constexpr u32 kClaimed = 1;
constexpr u32 kPublished = 2;

}  // namespace cupy_cache

extern "C" {
__device__ cupy_cache::Fault cupy_cache_fault;
}

namespace cupy_cache {

__device__ __noinline__ void record_fault(u32 argument, i64 row, i64 value, i64 limit) {
  if (atomicCAS(&cupy_cache_fault.taken, kFree, kClaimed) != kFree) return;
  cupy_cache_fault.argument = argument;
  cupy_cache_fault.row = row;
  cupy_cache_fault.value = value;
  cupy_cache_fault.limit = limit;
  // The host may read while this runs: it must not see that there is a fault before it sees which.
  __threadfence_system();
  atomicExch(&cupy_cache_fault.taken, kPublished);
}

// The integer of type T at an address, read where this stands. The compiler moves ordinary loads
// behind the branches before their use, where they wait for what those depend on.
template <typename T>
__device__ __forceinline__ i64 load_number(const char* at) {
#ifdef __CUDA_ARCH__
  const u64 from = __cvta_generic_to_global(at);
  if constexpr (sizeof(T) == 8) {
    i64 number;
    asm volatile("ld.global.s64 %0, [%1];" : "=l"(number) : "l"(from));
    return number;
  } else {
    static_assert(sizeof(T) == 4, "an index");
    i32 number;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(number) : "l"(from));
    return number;
  }
#else
  return static_cast<i64>(*reinterpret_cast<const T*>(at));
#endif
}

// Whether 0 <= value < limit. Nothing may be dereferenced with a value that was refused here.
__device__ __forceinline__ bool within(i64 value, i64 limit) {
  return static_cast<u64>(value) < static_cast<u64>(limit);
}

// The same, and records a fault where it is not.
__device__ __forceinline__ bool in_bounds(i64 value, i64 limit, u32 argument, i64 row) {
  if (within(value, limit)) return true;
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

// The slot that a token is written to. Stores are made if it is `valid` (store_vector's `when`),
// not behind a branch, where the loads would go as well.
template <int kBlockSize>
struct Target {
  i64 slot;
  i64 slots;  // of the cache
  bool valid;

  __device__ __forceinline__ Target(i64 slot, i64 num_blocks)
      : slot(slot), slots(num_blocks * kBlockSize), valid(within(slot, slots)) {}

  // That of slot 0 where it is not valid, so that addresses can be computed without asking.
  __device__ __forceinline__ Place<kBlockSize> place() const {
    return Place<kBlockSize>(valid ? slot : 0);
  }
  // Records a slot past the cache. Negative ones are padding.
  __device__ __forceinline__ void report(u32 argument, i64 row) const {
    if (slot >= slots) record_fault(argument, row, slot, slots);
  }
};

}  // namespace cupy_cache
