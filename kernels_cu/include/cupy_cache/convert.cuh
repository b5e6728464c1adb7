// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Value <-> cache element: the one place where data may change on its way.
//
// A converter turns kSourceBytes of the source into one vector of kBytes of the destination:
//   kSourceBytes                           bytes read for one vector written
//   Source load(const char* at)            the reads, so that all can start before any is used
//   Vec<kBytes> convert(Source, float)     the arithmetic, with the scale
// `load` needs an address that is a multiple of min(16, kSourceBytes).
#pragma once

#include "cupy_cache/vec.cuh"
#ifdef CUPY_CACHE_CONVERTS  // defined by the host for kernels that convert (Kernel.converts)
#include "cupy_cache/elements.cuh"
#endif

namespace cupy_cache {

// The scale of a head: one of those on the device, `stride` bytes apart, or else a number.
__device__ __forceinline__ float scale_of(const char* scales, i64 stride, int head, float number) {
  return scales ? *reinterpret_cast<const float*>(scales + head * stride) : number;
}

// The bytes as they are.
template <int kBytes>
struct Copy {
  static constexpr int kSourceBytes = kBytes;
  using Source = Vec<kBytes>;

  static __device__ __forceinline__ Source load(const char* at) { return load_vector<kBytes>(at); }
  static __device__ __forceinline__ Vec<kBytes> convert(const Source& source, float) {
    return source;
  }
};

#ifdef CUPY_CACHE_CONVERTS

// The bytes of kCount elements of type T, wherever they come from or go to, as floats.
template <typename T, int kCount, typename Bytes>
__device__ __forceinline__ void decode_all(const Bytes& bytes, float (&values)[kCount]) {
  static_assert(kCount * sizeof(typename T::Bits) == sizeof(bytes), "whole elements");
  if constexpr (sizeof(typename T::Bits) == 1 && kCount % 2 == 0) {
    u16 pairs[kCount / 2];
    memcpy(pairs, &bytes, sizeof(pairs));  // becomes register moves
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) T::decode_pair(pairs[i], values[2 * i], values[2 * i + 1]);
  } else {
    typename T::Bits bits[kCount];
    memcpy(bits, &bytes, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = T::decode(bits[i]);
  }
}

template <typename T, int kCount, typename Bytes>
__device__ __forceinline__ void encode_all(const float (&values)[kCount], Bytes& bytes) {
  if constexpr (sizeof(typename T::Bits) == 1 && kCount % 2 == 0) {
    u16 pairs[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      pairs[i] = T::encode_pair(values[2 * i], values[2 * i + 1]);
    }
    memcpy(&bytes, pairs, sizeof(pairs));
  } else {
    typename T::Bits bits[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = T::encode(values[i]);
    memcpy(&bytes, bits, sizeof(bits));
  }
}

// Elements of type From become elements of type To, through Arithmetic(scale)(value).
template <typename From, typename To, typename Arithmetic, int kBytes>
struct Convert {
  static constexpr int kElements = kBytes / static_cast<int>(sizeof(typename To::Bits));
  static constexpr int kSourceBytes = kElements * static_cast<int>(sizeof(typename From::Bits));
  static constexpr int kPart = kSourceBytes < 16 ? kSourceBytes : 16;

  struct Source {
    Vec<kPart> parts[kSourceBytes / kPart];
  };

  static __device__ __forceinline__ Source load(const char* at) {
    Source source;
#pragma unroll
    for (int i = 0; i < kSourceBytes / kPart; ++i) {
      source.parts[i] = load_vector<kPart>(at + i * kPart);
    }
    return source;
  }

  static __device__ __forceinline__ Vec<kBytes> convert(const Source& source, float scale) {
    const Arithmetic arithmetic(scale);
    float values[kElements];
    decode_all<From>(source, values);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = arithmetic(values[i]);
    Vec<kBytes> vector;
    encode_all<To>(values, vector);
    return vector;
  }
};

// value = stored * scale
struct Multiply {
  float scale;

  __device__ __forceinline__ explicit Multiply(float scale) : scale(scale) {}
  __device__ __forceinline__ float operator()(float value) const { return multiply(value, scale); }
};

// stored = value / scale
struct Divide {
  float scale;

  __device__ __forceinline__ explicit Divide(float scale) : scale(scale) {}
  __device__ __forceinline__ float operator()(float value) const { return divide(value, scale); }
};

// The same for quotients that become 8-bit codes: not always the IEEE quotient, but always its
// code, from float32 to int8 excepted. It costs three instructions, an IEEE division some twenty,
// with which fast memory is not kept busy.
//
// 1 / scale is high, rounded towards zero, plus low, off by 2^-46 of it at most. So the result is a
// quotient off by less than 2^-45 of itself, then rounded once. This can differ from the IEEE
// quotient only where the exact one is that close to the middle of two floats, and so can its code
// only where one of those two is a boundary of codes: a number of at most 5 bits in fp8, 8 bits in
// int8. The tests go through all significands for which that could be: all there are for values of
// 11 bits (float16, bfloat16); for others the scales of which 24 bits are within 64 of a multiple
// of 2^20.
struct DivideToCode {
  float shift;  // a power of two that keeps everything clear of the smallest and largest floats
  float high;
  float low;

  __device__ __forceinline__ explicit DivideToCode(float scale) {
    const float magnitude = fabsf(scale);
    shift = magnitude < 0x1p-64f ? 0x1p64f : magnitude < 0x1p64f ? 1.0f : 0x1p-64f;
    const float divisor = multiply(scale, shift);
    const float nearest = __frcp_rn(divisor);
    high = nearest;
    float rest = __fmaf_rn(-divisor, high, 1.0f);  // exact
    if (rest < 0.0f) {
      high = __uint_as_float(__float_as_uint(high) - 1);
      rest = __fmaf_rn(-divisor, high, 1.0f);
    }
    // Of the sign of high and never 0 alone, so that zeros and infinities divide as they should. A
    // product with the nearest reciprocal, not with high: that decides the closest cases.
    low = rest > 0.0f ? rest * nearest : high * 0x1p-48f;
  }
  __device__ __forceinline__ float operator()(float value) const {
    value = multiply(value, shift);
    return __fmaf_rn(value, high, __fmul_rn(value, low));
  }
};

template <typename From, typename To>
struct DivideFor {
  static_assert(sizeof(typename To::Bits) == 1, "only codes of 8 bits are sure to be right");
  using type = DivideToCode;
};
template <>
struct DivideFor<F32, I8> {
  using type = Divide;
};

// The smallest power of two that is not below a positive normal value: a mantissa that is not zero
// carries into the exponent. Infinity stays what it is.
__device__ __forceinline__ float power_of_two_from(float value) {
  return __uint_as_float((__float_as_uint(value) + 0x007fffffu) & 0xff800000u);
}

template <typename From, typename To, int kBytes>
using Quantise = Convert<From, To, typename DivideFor<From, To>::type, kBytes>;
template <typename From, typename To, int kBytes>
using Dequantise = Convert<From, To, Multiply, kBytes>;

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
