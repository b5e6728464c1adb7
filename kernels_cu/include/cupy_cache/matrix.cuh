// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Products of small matrices by a warp, and how their fragments are read from shared memory.
//
// Of the product of A [16 x 16] and B [16 x 8], added to C [16 x 8], lane l holds, with row = l / 4 and
// pair = 2 * (l % 4):
//   A: a[0] = A[row, pair..], a[1] = A[row + 8, pair..], a[2] = A[row, pair + 8..], a[3] = A[row + 8,
//      pair + 8..]
//   B: b0 = B[pair.., row], b1 = B[pair + 8.., row]
//   C: c[0], c[1] = C[row, pair..], c[2], c[3] = C[row + 8, pair..]
// where `..` means two neighbours, the first in the lower half of 32 bits.
//
// Where the machine has no instruction, and where a host compiler reads this, lanes exchange their
// fragments.
#pragma once

#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"

namespace cupy_cache {

constexpr u32 kWarp = 0xffffffffu;

// Two numbers as neighbouring elements of type T.
template <typename T>
__device__ __forceinline__ u32 pack_pair(float low, float high) {
  return static_cast<u32>(T::encode(low)) | static_cast<u32>(T::encode(high)) << 16;
}

template <typename T>
struct IsBF16 {
  static constexpr bool value = false;
};
template <>
struct IsBF16<BF16> {
  static constexpr bool value = true;
};

// Whether the machine has an instruction for products of elements of type T. Without it they are long,
// and slow.
template <typename T>
struct HasProducts {
#if __CUDA_ARCH__ < 800
  static constexpr bool value = !IsBF16<T>::value;
#else
  static constexpr bool value = true;
#endif
};

// c += A * B of half as many columns and rows, in elements of type F16.
__device__ __forceinline__ void half_multiply_add(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a0), "r"(a1), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// c += A * B in elements of type T (F16 or BF16), summed in float32.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (IsBF16<T>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
          "f"(c[2]), "f"(c[3]));
  }
#else
  if constexpr (!IsBF16<T>::value) {
    half_multiply_add(c, a[0], a[1], b0);
    half_multiply_add(c, a[2], a[3], b1);
    return;
  }
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane / 4 * 4, pair = lane % 4 * 2;
  for (int from = 0; from < 4; ++from) {
    u32 rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = __shfl_sync(kWarp, a[i], row + from);
    for (int column = 0; column < 2; ++column) {
      const u32 columns[2] = {__shfl_sync(kWarp, b0, (pair + column) * 4 + from),
                              __shfl_sync(kWarp, b1, (pair + column) * 4 + from)};
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 2; ++i) {
          const u32 left = rows[2 * i + half], right = columns[i];
          float& sum = c[2 * half + column];
          sum = __fmaf_rn(T::decode(static_cast<u16>(left)), T::decode(static_cast<u16>(right)), sum);
          sum = __fmaf_rn(T::decode(static_cast<u16>(left >> 16)),
                          T::decode(static_cast<u16>(right >> 16)), sum);
        }
      }
    }
  }
#endif
}

// Reads four 8 x 8 matrices of 16-bit elements from shared memory: lane l gives the address of row
// l % 8 of matrix l / 8, 16 bytes, and gets in out[i] the elements [l / 4, 2 * (l % 4)..] of matrix i;
// if kTransposed those of [2 * (l % 4).., l / 4].
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(u32 (&out)[4], const char* row) {
  const u32 at = static_cast<u32>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(at)
                 : "memory");
  }
}

// Of an 8 x 8 matrix of 16-bit elements, lane l has [l / 4, 2 * (l % 4)..] and gets those of the
// transpose.
__device__ __forceinline__ u32 transpose(u32 pair) {
  u32 turned;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

}  // namespace cupy_cache
