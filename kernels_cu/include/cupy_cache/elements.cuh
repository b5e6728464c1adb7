// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Element types: their bits, and what the bits mean. Only converting kernels include this (CUDA's
// fp8 header costs compile time); kernels that move bytes do not know element types.
//
// Every type has Bits, decode(Bits) -> float and encode(float) -> Bits, which rounds to nearest,
// ties to even (I8: ties away from zero), and saturates where the type is an 8-bit one. An 8-bit
// NaN is encoded as 0x7f whatever its sign, and as 0 in an I8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

struct F32 {
  using Bits = u32;
  static __device__ __forceinline__ float decode(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits encode(float value) { return __float_as_uint(value); }
};

struct F16 {
  using Bits = u16;
  static __device__ __forceinline__ float decode(Bits bits) {
    return __half2float(__ushort_as_half(bits));
  }
  static __device__ __forceinline__ Bits encode(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
};

struct BF16 {
  using Bits = u16;
  static __device__ __forceinline__ float decode(Bits bits) {
    return __uint_as_float(static_cast<u32>(bits) << 16);  // keeps subnormals under -ftz=true
  }
  static __device__ __forceinline__ Bits encode(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

template <__nv_fp8_interpretation_t kKind>
struct FP8 {
  using Bits = u8;
  static __device__ __forceinline__ float decode(Bits bits) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, kKind)));  // every fp8 is a half
  }
  static __device__ __forceinline__ Bits encode(float value) {
    const u8 bits = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, kKind);
    return value != value ? static_cast<u8>(0x7f) : bits;
  }
};
using E4M3 = FP8<__NV_E4M3>;
using E5M2 = FP8<__NV_E5M2>;

struct I8 {
  using Bits = u8;
  static __device__ __forceinline__ float decode(Bits bits) {
    return static_cast<float>(static_cast<i8>(bits));
  }
  static __device__ __forceinline__ Bits encode(float value) {
    if (value != value) return 0;
    return static_cast<Bits>(static_cast<i8>(roundf(fminf(fmaxf(value, -128.0f), 127.0f))));
  }
};

// IEEE division, subnormal operands and results included. Compiled kernels run with -ftz=true, which
// the plain operator obeys; a quotient must be the same on every backend.
__device__ __forceinline__ float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  float quotient;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
#else
  return a / b;
#endif
}

// The same for the product.
__device__ __forceinline__ float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
#else
  return a * b;
#endif
}

}  // namespace cupy_cache
