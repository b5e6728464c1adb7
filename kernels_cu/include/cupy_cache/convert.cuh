// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Value -> cache element: the one place where a writing kernel's data may change on its way.
//
// A converter turns kSourceBytes of the source into one vector of kBytes of the cache:
//   kSourceBytes                     bytes read for one vector written
//   Source load(const char* at)      the reads, so that all of them can start before any is used
//   Vec<kBytes> convert(Source)      the arithmetic
#pragma once

#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// The bytes as they are.
template <int kBytes>
struct Copy {
  static constexpr int kSourceBytes = kBytes;
  using Source = Vec<kBytes>;

  static __device__ __forceinline__ Source load(const char* at) {
    return load_streaming<kBytes>(at);
  }
  static __device__ __forceinline__ Vec<kBytes> convert(Source source) { return source; }
};

}  // namespace cupy_cache
