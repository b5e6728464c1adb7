// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Vectors of 1 to 16 bytes and the loads and stores that move them. Kernels move bytes: the width
// is what alignment allows, the element type does not matter.
#pragma once

#include "cupy_cache/ints.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define CUPY_CACHE_L2_POLICY
#endif

namespace cupy_cache {

template <int kBytes>
struct VecOf;
template <>
struct VecOf<1> {
  using type = u8;
};
template <>
struct VecOf<2> {
  using type = u16;
};
template <>
struct VecOf<4> {
  using type = u32;
};
template <>
struct VecOf<8> {
  using type = uint2;
};
template <>
struct VecOf<16> {
  using type = uint4;
};

// The vector of kBytes bytes; addresses must be multiples of kBytes.
template <int kBytes>
using Vec = typename VecOf<kBytes>::type;

// A vector of kBytes bytes as its elements of kElement bytes.
template <int kElement, int kBytes>
struct Elements {
  Vec<kElement> part[kBytes / kElement];

  __device__ __forceinline__ explicit Elements(const Vec<kBytes>& vector) {
    static_assert(sizeof(part) == sizeof(vector), "whole elements");
    memcpy(part, &vector, sizeof(part));  // becomes register moves
  }
};

// What the L2 is to do with this launch's lines. How much is moved decides, and the number of
// threads tells it: each moves 16 to 64 bytes. (Not where they loop, as for copies over the bus,
// which are too slow to fill the L2; 2^32 threads and more are counted wrong, which costs a hint.)
// Measured on an H200:
// - Lines are the first to leave. What others keep in the L2 stays there, and what was written has
//   reached the memory before later lines need its room.
// - But a few (of fewer than `few` threads) that are read, from what was written just before, cost
//   less where they stay.
// - Many lines (some 8 MB) all stay like any others: if they left first, they would share what room
//   the lines of others leave, and go to memory in small lots, which takes 2 to 6 % longer.
// The numbers are what createpolicy gives for evict_first and evict_normal from sm_80 to sm_121; the
// instruction itself would be carried out every time.
constexpr u64 kNormalPolicy = 0x16f0000000000000;
__device__ __forceinline__ u64 l2_policy(u32 few) {
  constexpr u32 kMany = 128 << 10;
  const u32 threads = gridDim.x * gridDim.y * blockDim.x;
  return threads >= few && threads < kMany ? 0x12f0000000000000 : kNormalPolicy;
}

// What the host launches a kernel with, always: a row of blocks of kThreads. Where the compiler knows,
// 1 to 256 tokens are rotated and written in 0.03 to 0.1 us less on an H100.
template <int kThreads>
__device__ __forceinline__ void assume_launched_with() {
  __builtin_assume(blockDim.x == kThreads);
  __builtin_assume(gridDim.y == 1);
}

// The same address, computed where this stands: the compiler would compute it behind the next branch.
// Before it, the parameters that it is made of are read at once, and by a launch that began early
// while it waits: 256 tokens that overlap are written in 0.05 us less on an H100. (Not where loads are
// C++'s: of such an address the compiler does not know that it is one of global memory.)
__device__ __forceinline__ const char* computed_here(const char* address) {
#ifdef CUPY_CACHE_L2_POLICY
  u64 here;
  asm volatile("mov.s64 %0, %1;" : "=l"(here) : "l"(reinterpret_cast<u64>(address)));
  return reinterpret_cast<const char*>(here);
#else
  return address;
#endif
}

// Loads and stores of vectors in global memory. The policy is an operand: of two loads under
// opposite conditions the compiler would move the second behind the check of the slot.
template <int kBytes>
__device__ __forceinline__ Vec<kBytes> load_vector(const char* at, u64 policy) {
#ifdef CUPY_CACHE_L2_POLICY
  const u64 from = __cvta_generic_to_global(at);
  Vec<kBytes> vector;
  if constexpr (kBytes == 16) {
    asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w)
                 : "l"(from), "l"(policy));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.global.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
                 : "=r"(vector.x), "=r"(vector.y)
                 : "l"(from), "l"(policy));
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;"
                 : "=r"(vector)
                 : "l"(from), "l"(policy));
  } else if constexpr (kBytes == 2) {
    asm volatile("ld.global.L2::cache_hint.u16 %0, [%1], %2;"
                 : "=h"(vector)
                 : "l"(from), "l"(policy));
  } else {
    u16 byte;
    asm volatile("ld.global.L2::cache_hint.u8 %0, [%1], %2;" : "=h"(byte) : "l"(from), "l"(policy));
    vector = static_cast<u8>(byte);
  }
  return vector;
#else
  return *reinterpret_cast<const Vec<kBytes>*>(at);
#endif
}
template <int kBytes>
__device__ __forceinline__ Vec<kBytes> load_vector(const char* at) {
  return load_vector<kBytes>(at, l2_policy(6 << 10));
}
// Of what others read, too: the lines stay like any others.
template <int kBytes>
__device__ __forceinline__ Vec<kBytes> load_shared_vector(const char* at) {
  return load_vector<kBytes>(at, kNormalPolicy);
}

// Stores if `when`. Without a branch: loads whose results are only stored under a condition the
// compiler would move behind it, where they wait for what it depends on.
template <int kBytes>
__device__ __forceinline__ void store_vector(char* at, Vec<kBytes> vector, bool when = true) {
#ifdef CUPY_CACHE_L2_POLICY
  const u64 policy = l2_policy(0), to = __cvta_generic_to_global(at);
  const u32 condition = when;
  if constexpr (kBytes == 16) {
    asm volatile(
        "{ .reg .pred when; setp.ne.u32 when, %6, 0;\n"
        "@when st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5; }" ::"l"(to),
        "r"(vector.x), "r"(vector.y), "r"(vector.z), "r"(vector.w), "l"(policy), "r"(condition)
        : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile(
        "{ .reg .pred when; setp.ne.u32 when, %4, 0;\n"
        "@when st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3; }" ::"l"(to),
        "r"(vector.x), "r"(vector.y), "l"(policy), "r"(condition)
        : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile(
        "{ .reg .pred when; setp.ne.u32 when, %3, 0;\n"
        "@when st.global.L2::cache_hint.u32 [%0], %1, %2; }" ::"l"(to),
        "r"(vector), "l"(policy), "r"(condition)
        : "memory");
  } else if constexpr (kBytes == 2) {
    asm volatile(
        "{ .reg .pred when; setp.ne.u32 when, %3, 0;\n"
        "@when st.global.L2::cache_hint.u16 [%0], %1, %2; }" ::"l"(to),
        "h"(vector), "l"(policy), "r"(condition)
        : "memory");
  } else {
    asm volatile(
        "{ .reg .pred when; setp.ne.u32 when, %3, 0;\n"
        "@when st.global.L2::cache_hint.u8 [%0], %1, %2; }" ::"l"(to),
        "h"(static_cast<u16>(vector)), "l"(policy), "r"(condition)
        : "memory");
  }
#else
  if (when) *reinterpret_cast<Vec<kBytes>*>(at) = vector;
#endif
}

}  // namespace cupy_cache
