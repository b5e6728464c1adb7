// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Element types: their bits, and what the bits mean. Kernels that move bytes do not know them.
//
// Every type has Bits, decode(Bits) -> float and encode(float) -> Bits, which rounds to nearest,
// ties to even (I8: ties away from zero), and saturates where the type is an 8-bit one. A NaN is
// encoded with all bits but the sign set, whatever its sign, and as 0 in an I8. 8-bit types
// have encode_pair and decode_pair for two neighbours, one instruction where there is such a one;
// of two 16-bit encodes in a row the compiler makes one itself.
//
// CUDA's own headers would make the first call of a kernel several times slower: compiling them
// takes longer than compiling the kernel. Where the machine has no instruction for a conversion,
// and where a host compiler reads this, integer arithmetic does it, with the same results.
#pragma once

#include "cupy_cache/ints.cuh"

namespace cupy_cache {

// Encodes a magnitude, given by a float's bits, in a type of kExponent and kMantissa bits; what is
// larger than the code kLargest becomes that.
template <int kExponent, int kMantissa, u32 kLargest>
__device__ __forceinline__ u32 encode_magnitude(u32 magnitude) {
  constexpr int kDropped = 23 - kMantissa;
  constexpr int kBias = (1 << (kExponent - 1)) - 1;
  constexpr u32 kSmallestNormal = static_cast<u32>(127 - kBias + 1) << 23;
  // Adding the float whose last place is the type's smallest subnormal rounds to multiples of it.
  constexpr u32 kAligning = static_cast<u32>(127 + 23 + 1 - kBias - kMantissa) << 23;
  const float aligned = __fadd_rn(__uint_as_float(magnitude), __uint_as_float(kAligning));
  const u32 subnormal = __float_as_uint(aligned) - kAligning;
  const u32 half_less_one = (1u << (kDropped - 1)) - 1 + (magnitude >> kDropped & 1);
  const u32 normal = ((magnitude + half_less_one) >> kDropped) -
                     (static_cast<u32>(127 - kBias) << kMantissa);
  const u32 code = magnitude < kSmallestNormal ? subnormal : normal;
  return code < kLargest ? code : kLargest;
}

struct F32 {
  using Bits = u32;
  static __device__ __forceinline__ float decode(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits encode(float value) {
    return value != value ? 0x7fffffffu : __float_as_uint(value);
  }
};

struct F16 {
  using Bits = u16;

  static __device__ __forceinline__ float decode(Bits bits) {
#ifdef __CUDA_ARCH__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const u32 magnitude = bits & 0x7fffu;
    // The exponents differ by 112, for subnormals too; infinity and NaN keep the largest.
    const float value = magnitude < 0x7c00u ? __uint_as_float(magnitude << 13) * 0x1p112f
                                            : __uint_as_float(magnitude << 13 | 0x7f800000u);
    return __uint_as_float(__float_as_uint(value) | (bits & 0x8000u) << 16);
#endif
  }

  static __device__ __forceinline__ Bits encode(float value) {
#ifdef __CUDA_ARCH__
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    if (value != value) return 0x7fff;
    const u32 bits = __float_as_uint(value);
    return static_cast<Bits>(encode_magnitude<5, 10, 0x7c00>(bits & 0x7fffffffu) |
                             (bits >> 16 & 0x8000u));
#endif
  }
};

struct BF16 {
  using Bits = u16;

  static __device__ __forceinline__ float decode(Bits bits) {
    return __uint_as_float(static_cast<u32>(bits) << 16);
  }

  static __device__ __forceinline__ Bits encode(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    Bits bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    if (value != value) return 0x7fff;
    const u32 bits = __float_as_uint(value);
    return static_cast<Bits>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
#endif
  }
};

// kLargest is the code of the largest number.
template <int kExponent, int kMantissa, u32 kLargest>
struct FP8 {
  using Bits = u8;

  static __device__ __forceinline__ float decode(Bits bits) {
    if constexpr (kExponent == 5) {
      return F16::decode(static_cast<u16>(bits << 8));  // the upper half of a half
    } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
      u32 halves;
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<u16>(bits)));
      return F16::decode(static_cast<u16>(halves));
#else
      // As a half, whose exponent has one bit more: smaller by a factor of 2^8.
      const u32 half = (bits & 0x80u) << 8 | (bits & 0x7fu) << 7;
      const float value = F16::decode(static_cast<u16>(half)) * 256.0f;
      return (bits & 0x7fu) == 0x7fu ? __uint_as_float(0x7fffffffu) : value;
#endif
    }
  }

  static __device__ __forceinline__ void decode_pair(u16 pair, float& low, float& high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (kExponent == 4) {
      u32 halves;
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
      low = F16::decode(static_cast<u16>(halves));
      high = F16::decode(static_cast<u16>(halves >> 16));
      return;
    }
#endif
    low = decode(static_cast<u8>(pair));
    high = decode(static_cast<u8>(pair >> 8));
  }

  static __device__ __forceinline__ Bits encode(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return static_cast<Bits>(encode_pair(value, 0.0f));
#else
    const u32 bits = __float_as_uint(value);
    const u32 code = encode_magnitude<kExponent, kMantissa, kLargest>(bits & 0x7fffffffu);
    return static_cast<Bits>(value != value ? 0x7fu : code | (bits >> 24 & 0x80u));
#endif
  }

  static __device__ __forceinline__ u16 encode_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    u16 pair;
    if constexpr (kExponent == 5) {
      asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    }
    return pair;
#else
    return static_cast<u16>(encode(low) | encode(high) << 8);
#endif
  }
};
using E4M3 = FP8<4, 3, 0x7e>;
using E5M2 = FP8<5, 2, 0x7b>;

struct I8 {
  using Bits = u8;

  static __device__ __forceinline__ float decode(Bits bits) {
    return static_cast<float>(static_cast<i8>(bits));
  }

  static __device__ __forceinline__ void decode_pair(u16 pair, float& low, float& high) {
    low = decode(static_cast<u8>(pair));
    high = decode(static_cast<u8>(pair >> 8));
  }

  static __device__ __forceinline__ Bits encode(float value) {
#ifdef __CUDA_ARCH__
    return static_cast<Bits>(encode_pair(value, 0.0f));
#else
    if (value != value) return 0;
    return static_cast<Bits>(static_cast<i8>(roundf(fminf(fmaxf(value, -128.0f), 127.0f))));
#endif
  }

  static __device__ __forceinline__ u16 encode_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    u32 pair;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, 0;" : "=r"(pair) : "r"(round(high)), "r"(round(low)));
    return static_cast<u16>(pair);
#else
    return static_cast<u16>(encode(low) | encode(high) << 8);
#endif
  }

#ifdef __CUDA_ARCH__
  // Saturates, and makes 0 of a NaN. The sum is rounded towards zero, or it could reach the next
  // integer by rounding.
  static __device__ __forceinline__ i32 round(float value) {
    return __float2int_rz(__fadd_rz(value, copysignf(0.5f, value)));
  }
#endif
};

// IEEE division, subnormal operands and results included. Compiled kernels run with -ftz=true,
// which the plain operator obeys; a quotient must be the same on every backend.
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

// And for the sum and the difference: a negation, too, would make zeros of subnormal numbers.
__device__ __forceinline__ float add(float a, float b) {
#ifdef __CUDA_ARCH__
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
#else
  return a + b;
#endif
}
__device__ __forceinline__ float subtract(float a, float b) {
#ifdef __CUDA_ARCH__
  float difference;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(difference) : "f"(a), "f"(b));
  return difference;
#else
  return a - b;
#endif
}

}  // namespace cupy_cache
