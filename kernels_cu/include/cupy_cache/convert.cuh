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

// The bytes as they are.
template <int kBytes>
struct Copy {
  static constexpr int kSourceBytes = kBytes;
  using Source = Vec<kBytes>;

  static __device__ __forceinline__ Source load(const char* at) {
    return load_streaming<kBytes>(at);
  }
  static __device__ __forceinline__ Vec<kBytes> convert(const Source& source, float) {
    return source;
  }
};

#ifdef CUPY_CACHE_CONVERTS

// Elements of type From become elements of type To, through Arithmetic::apply(value, scale).
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
      source.parts[i] = load_streaming<kPart>(at + i * kPart);
    }
    return source;
  }

  static __device__ __forceinline__ Vec<kBytes> convert(const Source& source, float scale) {
    typename From::Bits from[kElements];
    typename To::Bits to[kElements];
    memcpy(from, &source, sizeof(from));
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      to[i] = To::encode(Arithmetic::apply(From::decode(from[i]), scale));
    }
    Vec<kBytes> vector;
    memcpy(&vector, to, sizeof(vector));
    return vector;
  }
};

// stored = value / scale
struct Divide {
  static __device__ __forceinline__ float apply(float value, float scale) {
    return divide(value, scale);
  }
};
// value = stored * scale
struct Multiply {
  static __device__ __forceinline__ float apply(float value, float scale) {
    return multiply(value, scale);
  }
};

template <typename From, typename To, int kBytes>
using Quantise = Convert<From, To, Divide, kBytes>;
template <typename From, typename To, int kBytes>
using Dequantise = Convert<From, To, Multiply, kBytes>;

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
