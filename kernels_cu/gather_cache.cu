// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Gathers the pages of several sequences from a paged cache into contiguous rows.
//
// A row is kOuter * kHeads segments of kBytes contiguous bytes; the host merges heads that are
// adjacent on both sides into one segment. Consecutive threads take consecutive vectors of a row,
// so both sides coalesce but for the shortest rows. A thread finds its row's sequence by a search
// of its own, in lines that its neighbours read too; moving kVectors vectors pays for it, and keeps
// that many loads in flight. The fp8_ds_mla entry, whose scales are in it, has a kernel of its own
// below.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* src_cache;    // [num_blocks, kBlockSize / kGroup, kGroup, a token]
  char* dst;                // [rows, kOuter, kHeads, kBytes]
  const char* block_table;  // [sequences, table_width] of Block
  const char* cu_seq_lens;  // [sequences + 1] of Length; [sequences] if the last end is open
  const char* seq_starts;   // [sequences] of Start, or null: all start at 0
  const float* scale;       // one, or null: scale_value is used
  i64 rows;
  i64 sequences;
  i64 num_blocks;
  i64 table_width;
  i64 table_tokens;  // table_width * kBlockSize
  i64 table_stride;
  i64 start_stride;
  i64 src_block_stride;
  i64 src_group_stride;
  i64 src_offset_stride;
  i64 src_outer_stride;
  i64 src_head_stride;
  i64 dst_row_stride;
  i64 dst_outer_stride;
  i64 dst_head_stride;
  float scale_value;
  u32 unused;
};

constexpr u32 kSeqStarts = 1;
constexpr u32 kBlockTable = 2;

// The token that `row` is made of; null where the row belongs to no sequence, or its token is
// outside the table or the cache. kGroup slots of a block are equally far apart. kOpenEnd: the last
// sequence has all rows from its start on.
template <int kBlockSize, int kGroup, bool kOpenEnd, typename Block, typename Length,
          typename Start>
__device__ __forceinline__ const char* token_of(const Params& p, i64 row) {
  static_assert(kBlockSize % kGroup == 0, "whole groups");
  const Length* const lengths = reinterpret_cast<const Length*>(p.cu_seq_lens);
  const Segment segment =
      find_segment(lengths, kOpenEnd ? p.sequences - 1 : p.sequences, row, p.sequences, p.rows);
  const i64 sequence = segment.index;
  if (sequence < 0 || sequence == p.sequences) return nullptr;
  i64 start = 0;
  if (p.seq_starts) {
    start = static_cast<i64>(
        *reinterpret_cast<const Start*>(p.seq_starts + sequence * p.start_stride));
    if (!in_bounds(start, p.table_tokens, kSeqStarts, row)) return nullptr;
  }
  // Unsigned, because the lengths may hold anything.
  const u64 position =
      static_cast<u64>(start) + (static_cast<u64>(row) - static_cast<u64>(segment.start));
  const Place<kBlockSize> place(static_cast<i64>(position));
  if (!in_bounds(place.block, p.table_width, kBlockTable, row)) return nullptr;
  const i64 block = static_cast<i64>(reinterpret_cast<const Block*>(
      p.block_table + sequence * p.table_stride)[place.block]);
  if (!in_bounds(block, p.num_blocks, kBlockTable, row)) return nullptr;

  const char* const first = p.src_cache + block * p.src_block_stride;
  if constexpr (kGroup == kBlockSize) {
    return first + place.offset * p.src_offset_stride;
  } else {
    return first + place.offset / kGroup * p.src_group_stride +
           place.offset % kGroup * p.src_offset_stride;
  }
}

// Converter makes vectors of kVec bytes of a row; kBytes are of a row.
template <typename Converter, int kVec, int kOuter, int kHeads, int kBytes, int kBlockSize,
          int kGroup, typename Block, typename Length, typename Start, int kVectors,
          int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) gather_cache(const __grid_constant__ Params p) {
  static_assert(kBytes % kVec == 0, "whole vectors");
  constexpr int kSegmentVectors = kBytes / kVec;
  constexpr int kRowVectors = kOuter * kHeads * kSegmentVectors;
  constexpr int kRowThreads = (kRowVectors + kVectors - 1) / kVectors;

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const i64 row = static_cast<i64>(index / kRowThreads);
  const int first = static_cast<int>(index % kRowThreads);
  if (row >= p.rows) return;
  const char* const from = token_of<kBlockSize, kGroup, false, Block, Length, Start>(p, row);
  if (!from) return;
  const float scale = p.scale ? *p.scale : p.scale_value;  // a copy does not use it

  char* const to = p.dst + row * p.dst_row_stride;
  typename Converter::Source held[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int item = first + i * kRowThreads;
    if (kRowVectors % kVectors == 0 || item < kRowVectors) {
      const int segment = item / kSegmentVectors;
      const i64 outer = kOuter == 1 ? 0 : segment / kHeads * p.src_outer_stride;
      const int head = kOuter == 1 ? segment : segment % kHeads;
      held[i] = Converter::load(from + outer + head * p.src_head_stride +
                                (item % kSegmentVectors) * Converter::kSourceBytes);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int item = first + i * kRowThreads;
    if (kRowVectors % kVectors == 0 || item < kRowVectors) {
      const int segment = item / kSegmentVectors;
      const i64 outer = kOuter == 1 ? 0 : segment / kHeads * p.dst_outer_stride;
      const int head = kOuter == 1 ? segment : segment % kHeads;
      store_vector<kVec>(to + outer + head * p.dst_head_stride + (item % kSegmentVectors) * kVec,
                         Converter::convert(held[i], scale));
    }
  }
}

#ifdef CUPY_CACHE_CONVERTS

// A T from an address that is a multiple of kAlignment.
template <int kAlignment, typename T>
__device__ __forceinline__ T load_in_parts(const char* at) {
  constexpr int kPart = kAlignment < static_cast<int>(sizeof(T)) ? kAlignment : sizeof(T);
  Vec<kPart> parts[sizeof(T) / kPart];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T)) / kPart; ++i) {
    parts[i] = load_vector<kPart>(at + i * kPart);
  }
  T value;
  memcpy(&value, parts, sizeof(T));
  return value;
}

// From fp8_ds_mla entries of 656 bytes: 512 values as e4m3, in four tiles with a scale each; the four
// scales; 64 elements of 16 bits. To rows of 576 elements. Latent and Rope are the converters of both
// parts to vectors of kVec bytes; kSourceVec is the alignment of the entries.
template <typename Latent, typename Rope, int kVec, int kSourceVec, int kBlockSize, typename Block,
          typename Start, typename SeqStart, int kVectors, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    gather_fp8_ds_mla(const __grid_constant__ Params p) {
  constexpr int kTile = 128;
  constexpr int kScalesAt = 512;
  constexpr int kRopeAt = 528;
  constexpr int kLatentVectors = 512 / Latent::kSourceBytes;
  constexpr int kRowVectors = kLatentVectors + 128 / Rope::kSourceBytes;
  constexpr int kRowThreads = kRowVectors / kVectors;
  static_assert(kRowVectors % kVectors == 0, "equal work");

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const i64 row = static_cast<i64>(index / kRowThreads);
  const int first = static_cast<int>(index % kRowThreads);
  if (row >= p.rows) return;
  const char* const from = token_of<kBlockSize, kBlockSize, true, Block, Start, SeqStart>(p, row);
  if (!from) return;

  // Everything is loaded before anything is converted.
  typename Latent::Source latent[kVectors];
  typename Rope::Source rope[kVectors];
  float scale[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int item = first + i * kRowThreads;
    if (item < kLatentVectors) {
      const int at = item * Latent::kSourceBytes;
      latent[i] = load_in_parts<kSourceVec, typename Latent::Source>(from + at);
      scale[i] = load_in_parts<kSourceVec, float>(from + kScalesAt + at / kTile * 4);
    } else {
      const int at = (item - kLatentVectors) * Rope::kSourceBytes;
      rope[i] = load_in_parts<kSourceVec, typename Rope::Source>(from + kRopeAt + at);
    }
  }
  char* const to = p.dst + row * p.dst_row_stride;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int item = first + i * kRowThreads;
    store_vector<kVec>(to + item * kVec, item < kLatentVectors
                                             ? Latent::convert(latent[i], scale[i])
                                             : Rope::convert(rope[i], 1.0f));
  }
}

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
