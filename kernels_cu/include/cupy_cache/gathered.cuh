// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// From a token in a cache to a row: its bytes as they are, or its elements times their scale.
//
// A row is kOuter * kHeads segments of kBytes contiguous bytes; the host merges heads that are
// adjacent on both sides into one segment. Consecutive threads take consecutive vectors of a row,
// so both sides coalesce but for the shortest rows. A thread finds its row's token by itself, in
// lines that its neighbours read too; moving kVectors vectors pays for it, and keeps that many
// loads in flight.
#pragma once

#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// How a cache and the rows lie in memory. Strides in bytes.
struct Sides {
  i64 src_block_stride;
  i64 src_group_stride;
  i64 src_offset_stride;
  i64 src_outer_stride;
  i64 src_head_stride;
  i64 dst_row_stride;
  i64 dst_outer_stride;
  i64 dst_head_stride;
  i64 scale_block_stride;  // and the next: of scales of heads
  i64 scale_offset_stride;
  i64 scale_head_stride;
};

// The address of a token. kGroup slots of a block are equally far apart.
template <int kBlockSize, int kGroup>
__device__ __forceinline__ const char* address_of(const char* cache, const Sides& sides, i64 block,
                                                  i32 offset) {
  static_assert(kBlockSize % kGroup == 0, "whole groups");
  const char* const first = cache + block * sides.src_block_stride;
  if constexpr (kGroup == kBlockSize) {
    return first + offset * sides.src_offset_stride;
  } else {
    return first + offset / kGroup * sides.src_group_stride +
           offset % kGroup * sides.src_offset_stride;
  }
}

// What a row is made of. kBytes are of the row. kScaleHeads heads, of which it has equal parts, have
// scales of their own; 0: one is for all.
template <typename RowConverter, int kRowOuter, int kRowHeads, int kRowBytes, int kRowScaleHeads,
          int kRowGroup, int kRowVectors>
struct RowShape {
  using Converter = RowConverter;
  static constexpr int kOuter = kRowOuter;
  static constexpr int kHeads = kRowHeads;
  static constexpr int kBytes = kRowBytes;
  static constexpr int kScaleHeads = kRowScaleHeads;
  static constexpr int kGroup = kRowGroup;
  static constexpr int kVectors = kRowVectors;
};

// A thread's part of a row: kVectors vectors of kVec bytes, kThreads apart, from vector `first` on.
template <typename Shape, int kVec, int kBlockSize>
class RowPart {
  using Converter = typename Shape::Converter;
  static_assert(Shape::kBytes % kVec == 0, "whole vectors");
  static constexpr int kVectors = Shape::kVectors;
  static constexpr int kSegmentVectors = Shape::kBytes / kVec;
  static constexpr int kRowVectors = Shape::kOuter * Shape::kHeads * kSegmentVectors;
  static constexpr int kHeadVectors = Shape::kScaleHeads ? kRowVectors / Shape::kScaleHeads : 1;
  static_assert(!Shape::kScaleHeads || kHeadVectors * Shape::kScaleHeads == kRowVectors,
                "whole vectors of heads");

 public:
  static constexpr int kThreads = (kRowVectors + kVectors - 1) / kVectors;

  __device__ __forceinline__ explicit RowPart(int first) : first_(first) {}

  __device__ __forceinline__ void load(const char* cache, const char* scales, const Sides& sides,
                                       i64 block, i32 offset) {
    const char* const from = address_of<kBlockSize, Shape::kGroup>(cache, sides, block, offset);
    const char* const token_scales =
        Shape::kScaleHeads
            ? scales + block * sides.scale_block_stride + offset * sides.scale_offset_stride
            : nullptr;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int item = first_ + i * kThreads;
      if (kRowVectors % kVectors == 0 || item < kRowVectors) {
        held_[i] = Converter::load(from + offset_of(item, sides.src_outer_stride,
                                                    sides.src_head_stride,
                                                    Converter::kSourceBytes));
        if constexpr (Shape::kScaleHeads != 0) {
          scales_[i] = *reinterpret_cast<const float*>(token_scales +
                                                       item / kHeadVectors * sides.scale_head_stride);
        }
      }
    }
  }

  // `scale` is that for all heads.
  __device__ __forceinline__ void store(char* to, const Sides& sides, float scale) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int item = first_ + i * kThreads;
      if (kRowVectors % kVectors == 0 || item < kRowVectors) {
        store_vector<kVec>(
            to + offset_of(item, sides.dst_outer_stride, sides.dst_head_stride, kVec),
            Converter::convert(held_[i], Shape::kScaleHeads ? scales_[i] : scale));
      }
    }
  }

 private:
  int first_;
  typename Converter::Source held_[kVectors];
  float scales_[kVectors];

  // Where a vector of `bytes` is in its row.
  static __device__ __forceinline__ i64 offset_of(int item, i64 outer_stride, i64 head_stride,
                                                  int bytes) {
    if constexpr (Shape::kOuter * Shape::kHeads == 1) {
      return item * bytes;
    } else {
      const int segment = item / kSegmentVectors;
      const i64 outer = Shape::kOuter == 1 ? 0 : segment / Shape::kHeads * outer_stride;
      const int head = Shape::kOuter == 1 ? segment : segment % Shape::kHeads;
      return outer + head * head_stride + item % kSegmentVectors * bytes;
    }
  }
};

// The scale for all heads: one on the device, or else a number. A copy does not use it.
template <typename Shape>
__device__ __forceinline__ float scale_of_all(const char* scales, float number) {
  if constexpr (Shape::kScaleHeads == 0) {
    if (scales) return *reinterpret_cast<const float*>(scales);
  }
  return number;
}

}  // namespace cupy_cache
