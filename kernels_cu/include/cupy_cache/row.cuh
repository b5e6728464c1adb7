// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// The elements of one token's head, held by neighbouring lanes and quantised with a scale of its own.
#pragma once

#include "cupy_cache/convert.cuh"
#include "cupy_cache/vec.cuh"
#include "cupy_cache/warp.cuh"

namespace cupy_cache {

#ifdef CUPY_CACHE_CONVERTS

// A lane's part of a row of kSize elements of type From, which become elements of type To.
template <typename From, typename To, int kVec, int kSize, int kLanes>
struct Row {
  static_assert(kSize % kVec == 0 && sizeof(typename To::Bits) == 1, "whole vectors of bytes");
  // The scale is multiplied: it is given as its inverse.
  using Converter = Convert<From, To, Multiply, kVec>;
  static constexpr int kVectors = kSize / kVec;
  static constexpr int kHeld = (kVectors + kLanes - 1) / kLanes;

  typename Converter::Source held[kHeld];

  static __device__ __forceinline__ bool has(int vector) {
    return kVectors % kLanes == 0 || vector < kVectors;
  }
  __device__ __forceinline__ void load(const char* from, int lane) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = lane + i * kLanes;
      if (has(vector)) held[i] = Converter::load(from + vector * Converter::kSourceBytes);
    }
  }
  // The largest magnitude of the whole row, for all its lanes; NaN does not count.
  __device__ __forceinline__ float largest(int lane) const {
    float found = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (!has(lane + i * kLanes)) continue;
      float values[kVec];
      decode_all<From>(held[i], values);
#pragma unroll
      for (float value : values) found = fmaxf(found, fabsf(value));
    }
    return group_max<kLanes>(found);
  }
  __device__ __forceinline__ void store(char* to, int lane, float inverse, bool when) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = lane + i * kLanes;
      if (has(vector)) {
        store_vector<kVec>(to + vector * kVec, Converter::convert(held[i], inverse), when);
      }
    }
  }
};

// The scale of a row whose largest magnitude, `largest`, becomes kLargest.
template <int kLargest>
__device__ __forceinline__ float row_scale(float largest) {
  return fmaxf(divide(largest, kLargest), 1e-6f);
}

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
