// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Division by a number that the host knows, by a multiplication.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

// factor = 2^shift / divisor, rounded up, where 2^(shift - 31) is the smallest power of two that is not
// below the divisor: then the quotients of all numbers below 2^31 are right.
struct Divisor {
  u32 factor, shift;

  __device__ __forceinline__ u32 quotient(u32 number) const {
    return static_cast<u32>(static_cast<u64>(number) * factor >> shift);
  }
  __device__ __forceinline__ u32 remainder(u32 number, u32 divisor) const {
    return number - quotient(number) * divisor;
  }
};

}  // namespace cupy_cache
