// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// What is multiplied on tensor cores: elements of caches and of queries, in pairs.
#pragma once

#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/matrix.cuh"

namespace cupy_cache {

// Two of four 8-bit elements, by their place from the lowest byte on, as F16, which holds them all.
template <typename Stored, int kFirst, int kSecond>
struct Widened {
  static __device__ __forceinline__ u32 of(u32 four) {
    const u16 pair = static_cast<u16>(__byte_perm(four, 0, kSecond << 4 | kFirst));
    float first, second;
    Stored::decode_pair(pair, first, second);
    return pack_pair<F16>(first, second);
  }
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
template <int kFirst, int kSecond>
struct Widened<E4M3, kFirst, kSecond> {
  static __device__ __forceinline__ u32 of(u32 four) {
    constexpr bool kNeighbours = kSecond - kFirst == 1;
    constexpr bool kUpper = kFirst == (kNeighbours ? 2 : 1);  // of the two pairs
    // The other pair comes along, so that one permutation serves both.
    const u32 pairs = kNeighbours ? four : __byte_perm(four, 0, 0x3120);
    u32 halves;
    if constexpr (kUpper) {
      // Read where it is: a shift is one instruction more.
      asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high;}"
          : "=r"(halves)
          : "r"(pairs));
    } else {
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<u16>(pairs)));
    }
    return halves;
  }
};
#endif
template <int kFirst, int kSecond>
struct Widened<E5M2, kFirst, kSecond> {
  static __device__ __forceinline__ u32 of(u32 four) {
    return __byte_perm(four, 0, kSecond << 12 | kFirst << 4 | 0x404);  // the upper halves of halves
  }
};
template <int kFirst, int kSecond>
struct Widened<I8, kFirst, kSecond> {
  static __device__ __forceinline__ u32 of(u32 four) {
    // 1024 + n is the half with n in its lowest bits; here n is the element + 128.
    const u32 biased = __byte_perm(four ^ 0x80808080u, 0x64u, kSecond << 8 | kFirst | 0x4040);
    constexpr u32 kBias = 0x64806480;  // 1152, twice
    u32 halves;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(biased), "r"(kBias));
    return halves;
  }
};
template <typename Stored, int kFirst, int kSecond>
__device__ __forceinline__ u32 widen(u32 four) {
  return Widened<Stored, kFirst, kSecond>::of(four);
}

// 8-bit elements of a cache beside which there is a scale for each token and head.
template <typename Stored>
struct TokenScaled {};

// How the caches' elements become operands of a product: those of the query's type as they are, 8-bit
// ones as F16. Of these a fragment holds other elements than the instruction's description says, keys
// and queries alike, and the columns of values come out in another order.
template <typename Query, typename Cached>
struct Operands {
  using Type = F16;
  using Stored = Cached;
  static constexpr bool kNarrow = true;
  static constexpr bool kTokenScales = false;
  static constexpr int kBytes = 1;
};
template <typename Query>
struct Operands<Query, Query> {
  using Type = Query;
  using Stored = Query;
  static constexpr bool kNarrow = false;
  static constexpr bool kTokenScales = false;
  static constexpr int kBytes = 2;
};
template <typename Query, typename Element>
struct Operands<Query, TokenScaled<Element>> : Operands<Query, Element> {
  static constexpr bool kTokenScales = true;
};

// Two elements of a query as operands.
template <typename Query, typename Type>
__device__ __forceinline__ u32 as_operands(u32 bits) {
  if constexpr (IsBF16<Query>::value == IsBF16<Type>::value) {
    return bits;
  } else {
    return pack_pair<Type>(Query::decode(static_cast<u16>(bits)),
                           Query::decode(static_cast<u16>(bits >> 16)));
  }
}

// Two neighbouring elements of a query, as operands. `there` are those that exist, at most two.
template <typename Query, typename Type>
__device__ __forceinline__ u32 query_pair(const char* at, bool together, int there) {
  u32 bits = 0;
  if (together && there >= 2) {
    bits = *reinterpret_cast<const u32*>(at);
  } else {
    if (there >= 1) bits = *reinterpret_cast<const u16*>(at);
    if (there >= 2) bits |= static_cast<u32>(reinterpret_cast<const u16*>(at)[1]) << 16;
  }
  return as_operands<Query, Type>(bits);
}

}  // namespace cupy_cache
