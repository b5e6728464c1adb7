// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Reads bytes and does nothing with them: what an operation that must read as many is held against.
namespace baselines {

struct Params {
  const char* from;
  char* sink;
  long long vectors;  // of 16 bytes
};

constexpr int kTogether = 4;  // loads of a thread on their way

template <int kThreads>
__global__ void __launch_bounds__(kThreads) bare_read(const __grid_constant__ Params p) {
  const uint4* const from = reinterpret_cast<const uint4*>(p.from);
  const long long step = static_cast<long long>(gridDim.x) * kThreads * kTogether;
  unsigned found = 0;
  for (long long at = static_cast<long long>(blockIdx.x) * kThreads * kTogether + threadIdx.x;
       at < p.vectors; at += step) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (at + i * kThreads >= p.vectors) continue;
      uint4 vector;
      asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w)
                   : "l"(from + at + i * kThreads));
      found ^= vector.x ^ vector.y ^ vector.z ^ vector.w;
    }
  }
  // So that the loads are needed. Of random bytes it is hardly ever true.
  if (found == 0x5eed5eedu) *p.sink = 1;
}

}  // namespace baselines
