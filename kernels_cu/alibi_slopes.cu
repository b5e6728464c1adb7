// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// ALiBi slopes, computed where they are needed: no upload, nothing to wait for.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"

namespace cupy_cache {

struct Params {
  char* out;    // [count] float
  i64 count;
  i64 first;    // this array's first head among all heads
  i64 power;    // the largest power of two that is at most the number of all heads
  double step;  // max_bias / (2 * power): every exponent is an integer multiple of it
  i64 stride;   // of out, in bytes
};

template <int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) alibi_slopes(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  const i64 index = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.count) return;
  const i64 head = p.first + index;
  const i64 steps = head < p.power ? 2 * (head + 1) : 2 * (head - p.power) + 1;

  // 2^-exponent as 2^-fraction * 2^-whole: powers of two come out exact, and the error stays that
  // of exp2f near 0 however large max_bias is. The product is exact: the host keeps exponents
  // below 127.
  const double exponent = p.step * static_cast<double>(steps);
  const double whole = rint(exponent);
  const float fraction = static_cast<float>(exponent - whole);
  *reinterpret_cast<float*>(p.out + index * p.stride) =
      exp2f(-fraction) * __int_as_float((127 - static_cast<i32>(whole)) << 23);
}

}  // namespace cupy_cache
