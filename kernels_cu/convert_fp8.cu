// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Converts all elements of an array to another type.
//
// The host merges dimensions that are adjacent on both sides. What remains is a run of elements
// that is contiguous on both sides (maybe a single element) and up to kMaxDims dimensions around
// it, in the order of the output's memory: consecutive threads write consecutive vectors.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

constexpr int kMaxDims = 5;

// Strides are in bytes; dimensions are outermost first.
struct Params {
  char* output;
  const char* input;
  const float* scale;  // or null: scale_value
  float scale_value;
  u32 unused;
  i64 vectors;
  i64 run_vectors;
  i64 extents[kMaxDims];
  i64 output_strides[kMaxDims];
  i64 input_strides[kMaxDims];
};

// Converter makes vectors of kVec bytes of the output. kDims dimensions surround the run.
template <typename Converter, int kVec, int kDims, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) convert_fp8(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  static_assert(kDims <= kMaxDims, "dimensions that Params holds");
  u32 rest = blockIdx.x * blockDim.x + threadIdx.x;
  if (rest >= p.vectors) return;

  char* to = p.output;
  const char* from = p.input;
  if constexpr (kDims > 0) {
    const u32 run = static_cast<u32>(p.run_vectors);
    const u32 inside = rest % run;
    to += static_cast<i64>(inside) * kVec;
    from += static_cast<i64>(inside) * Converter::kSourceBytes;
    rest /= run;
#pragma unroll
    for (int d = kDims - 1; d >= 0; --d) {
      const u32 extent = static_cast<u32>(p.extents[d]);
      const i64 at = static_cast<i64>(d > 0 ? rest % extent : rest);
      to += at * p.output_strides[d];
      from += at * p.input_strides[d];
      if (d > 0) rest /= extent;
    }
  } else {
    to += static_cast<i64>(rest) * kVec;
    from += static_cast<i64>(rest) * Converter::kSourceBytes;
  }
  const typename Converter::Source source = Converter::load(from);
  const float scale = p.scale ? *p.scale : p.scale_value;
  store_vector<kVec>(to, Converter::convert(source, scale));
}

}  // namespace cupy_cache
