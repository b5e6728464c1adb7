// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Puts numbers that the host knows into an array on the device. They travel inside the kernel's
// parameters: no upload, nothing to wait for.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"

namespace cupy_cache {

constexpr int kPlacedValues = 1016;  // as many as the 4 KiB of kernel parameters hold

struct Params {
  char* out;   // [count] float
  i64 stride;  // of out, in bytes
  i64 count;   // at most kPlacedValues
  float values[kPlacedValues];
};

template <int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) place_slopes(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  const i64 index = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.count) return;
  *reinterpret_cast<float*>(p.out + index * p.stride) = p.values[index];
}

}  // namespace cupy_cache
