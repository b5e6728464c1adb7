// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Products of matrices in shared memory by a warpgroup, four warps (compute capability 9.0 alone, and
// code for sm_90a). Elsewhere, and where a host compiler reads this, each thread multiplies what it
// holds of the sum.
//
// A panel is 64 elements of 16 bits of each of some rows: 128 bytes a row, at a multiple of 1,024. The
// chunks of 16 bytes of a row are exchanged, so that those of eight rows lie in different banks.
#pragma once

#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/matrix.cuh"

// What the compiler defines for sm_90a.
#if defined(__CUDA_ARCH__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CUPY_CACHE_WARPGROUPS
#endif

namespace cupy_cache {

constexpr int kWarpgroup = 128;  // threads
constexpr int kPanel = 64, kPanelRow = kPanel * 2;  // elements of a row of a panel; bytes
constexpr int kDepth = 16;                          // of a product

// Where a chunk of a row of a panel is.
__device__ __forceinline__ int in_panel(int row, int chunk) {
  return row * kPanelRow + (chunk ^ row % 8) * 16;
}

// Orders accesses to the sums, and what other threads' fences have ordered, before the products that
// follow.
__device__ __forceinline__ void begin_products() {
#ifdef CUPY_CACHE_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Waits for all products that this warpgroup has begun. Until then none may touch their sums.
__device__ __forceinline__ void wait_for_products() {
#ifdef CUPY_CACHE_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

#ifdef CUPY_CACHE_WARPGROUPS
// Tells the machine of a panel `further` bytes behind `at`: rows of 128 bytes, eight of them 1,024 bytes
// apart from the next eight, chunks exchanged.
__device__ __forceinline__ u64 panel_at(const char* at, int further) {
  const u32 low = (static_cast<u32>(__cvta_generic_to_shared(at)) >> 4) + further / 16;
  constexpr u32 kHigh = 1024 >> 4 | 1u << 30;
  return static_cast<u64>(kHigh) << 32 | low;
}
#endif

// Begins sums [64 x kColumns] += A [64 x 16] * B [16 x kColumns] of elements of type T (F16 or BF16),
// summed in float32. B is the transpose of a panel of kColumns rows: of its columns the 16 of number
// `step`. So is A one of a panel of 64 rows; or, if kTransposed, the transpose of 16 of its rows. The
// panels are `a_at` and `b_at` bytes behind an address that several have in common: what the machine is
// told of it is made once.
//
// Warp w of the warpgroup holds rows w * 16 to w * 16 + 15. With row = lane / 4 and pair = 2 * (lane %
// 4), c[4 * j + 2 * half + i] is row + 8 * half, column 8 * j + pair + i.
template <typename T, bool kTransposed, int kColumns>
__device__ __forceinline__ void multiply_panels(float (&c)[kColumns / 2], const char* a, int a_at,
                                                const char* b, int b_at, int step) {
  static_assert(kColumns == 16 || kColumns == 32, "what is listed below");
#ifdef CUPY_CACHE_WARPGROUPS
  const u64 left = panel_at(a, a_at + step * kDepth * (kTransposed ? kPanelRow : 2));
  const u64 right = panel_at(b, b_at + step * kDepth * 2);
  if constexpr (kColumns == 16 && IsBF16<T>::value) {
    asm volatile(
        "{ .reg .pred adds; setp.eq.u32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, "
        "%6, %7}, "
        "%8, %9, adds, 1, 1, %10, 0; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7])
        : "l"(left), "l"(right), "n"(kTransposed));
  } else if constexpr (kColumns == 16 && !IsBF16<T>::value) {
    asm volatile(
        "{ .reg .pred adds; setp.eq.u32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, "
        "%7}, "
        "%8, %9, adds, 1, 1, %10, 0; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7])
        : "l"(left), "l"(right), "n"(kTransposed));
  } else if constexpr (kColumns == 32 && IsBF16<T>::value) {
    asm volatile(
        "{ .reg .pred adds; setp.eq.u32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, "
        "%6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, adds, 1, 1, %18, 0; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]),
          "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
        : "l"(left), "l"(right), "n"(kTransposed));
  } else if constexpr (kColumns == 32 && !IsBF16<T>::value) {
    asm volatile(
        "{ .reg .pred adds; setp.eq.u32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, "
        "%7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%16, %17, adds, 1, 1, %18, 0; }"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),
          "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]),
          "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
        : "l"(left), "l"(right), "n"(kTransposed));
  }
#else
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first = static_cast<int>(threadIdx.x % kWarpgroup) / 32 * 16 + lane / 4;
  // Chunks are exchanged by the address, of which `panel` may be a step's.
  const auto element = [](const char* panel, int row, int column) {
    const u64 at = reinterpret_cast<u64>(panel) + static_cast<u64>(row * kPanelRow + column * 2);
    return T::decode(*reinterpret_cast<const u16*>(at ^ (at >> 7 & 7) << 4));
  };
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = first + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = c[i];
    for (int k = step * kDepth; k < (step + 1) * kDepth; ++k) {
      const float its = kTransposed ? element(a + a_at, k, row) : element(a + a_at, row, k);
      sum = __fmaf_rn(its, element(b + b_at, column, k), sum);
    }
    c[i] = sum;
  }
#endif
}

}  // namespace cupy_cache
