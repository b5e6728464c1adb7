// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Softmax in parts: sums of exponentials, and of values weighted by them, relative to a maximum.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

constexpr float kNone = -3.0e38f;  // the maximum of no scores
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2 to the power of x.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Sums of exponentials and of values weighted by them, relative to a maximum: one after the other is
// joined to what came before, always by the same operations.
struct Joined {
  float largest = kNone;
  float before = 0.0f, now = 0.0f;  // what weights the sums so far, and those of what is joined

  __device__ __forceinline__ void join(float other) {
    const float both = fmaxf(largest, other);
    before = power_of_two(largest - both);
    now = power_of_two(other - both);
    largest = both;
  }
  __device__ __forceinline__ float sum(float sum_before, float sum_now) const {
    return __fmaf_rn(sum_now, now, __fmul_rn(sum_before, before));
  }
};

// What a row has been joined to over all parts, for the output.
struct Sums {
  Joined joined;
  float sum = 0.0f, first = 0.0f, second = 0.0f;

  __device__ __forceinline__ void join(float largest, float other, float2 pair) {
    joined.join(largest);
    sum = joined.sum(sum, other);
    first = joined.sum(first, pair.x);
    second = joined.sum(second, pair.y);
  }
};

}  // namespace cupy_cache
