// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Vectors of 1 to 16 bytes and the loads and stores that move them. Kernels move bytes: the width
// is what alignment allows, the element type does not matter.
#pragma once

#include "cupy_cache/ints.cuh"

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

// Streaming accesses: each byte of a cache operation is touched once, so it should not push out of
// the L2 what the model's other kernels keep there.
template <int kBytes>
__device__ __forceinline__ Vec<kBytes> load_streaming(const char* at) {
  return __ldcs(reinterpret_cast<const Vec<kBytes>*>(at));
}

template <int kBytes>
__device__ __forceinline__ void store_streaming(char* at, Vec<kBytes> value) {
  __stcs(reinterpret_cast<Vec<kBytes>*>(at), value);
}

}  // namespace cupy_cache
