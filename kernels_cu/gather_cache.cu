// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Gathers the pages of several sequences from a paged cache into contiguous rows.
//
// A row is kHeads segments of kBytes contiguous bytes; the host merges heads that are adjacent on
// both sides into one segment. Consecutive threads take consecutive vectors of a row, so both sides
// coalesce whatever the shape. A thread finds its row's sequence by a binary search of its own, in
// lines that its neighbours read too; moving kVectors vectors pays for it, and keeps that many loads
// in flight.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* src_cache;    // [num_blocks, kBlockSize, kHeads, kBytes]
  char* dst;                // [rows, kHeads, kBytes]
  const char* block_table;  // [sequences, table_width] of Block
  const char* cu_seq_lens;  // [sequences + 1] of Length
  const char* seq_starts;   // [sequences] of Start, or null: all start at 0
  i64 rows;
  i64 sequences;
  i64 num_blocks;
  i64 table_width;
  i64 table_tokens;  // table_width * kBlockSize
  i64 table_stride;
  i64 start_stride;
  i64 src_block_stride;
  i64 src_offset_stride;
  i64 src_head_stride;
  i64 dst_row_stride;
  i64 dst_head_stride;
};

constexpr u32 kSeqStarts = 1;
constexpr u32 kBlockTable = 2;

template <int kVec, int kHeads, int kBytes, int kBlockSize, typename Block, typename Length,
          typename Start, int kVectors, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) gather_cache(const __grid_constant__ Params p) {
  static_assert(kBytes % kVec == 0, "whole vectors");
  constexpr int kSegmentVectors = kBytes / kVec;
  constexpr int kRowVectors = kHeads * kSegmentVectors;
  constexpr int kRowThreads = (kRowVectors + kVectors - 1) / kVectors;

  const u64 index = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 row = static_cast<i64>(index / kRowThreads);
  const int first = static_cast<int>(index % kRowThreads);
  if (row >= p.rows) return;

  const Length* const lengths = reinterpret_cast<const Length*>(p.cu_seq_lens);
  const i64 sequence = find_segment(lengths, p.sequences, row);
  if (sequence < 0 || sequence == p.sequences) return;
  i64 start = 0;
  if (p.seq_starts) {
    start = static_cast<i64>(
        *reinterpret_cast<const Start*>(p.seq_starts + sequence * p.start_stride));
    if (!in_bounds(start, p.table_tokens, kSeqStarts, row)) return;
  }
  // Unsigned, because the lengths may hold anything.
  const u64 position =
      static_cast<u64>(start) + (static_cast<u64>(row) - static_cast<u64>(lengths[sequence]));
  const Place<kBlockSize> place(static_cast<i64>(position));
  if (!in_bounds(place.block, p.table_width, kBlockTable, row)) return;
  const i64 block = static_cast<i64>(reinterpret_cast<const Block*>(
      p.block_table + sequence * p.table_stride)[place.block]);
  if (!in_bounds(block, p.num_blocks, kBlockTable, row)) return;

  const char* const from =
      p.src_cache + block * p.src_block_stride + place.offset * p.src_offset_stride;
  char* const to = p.dst + row * p.dst_row_stride;
  Vec<kVec> held[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int item = first + i * kRowThreads;
    if (kRowVectors % kVectors == 0 || item < kRowVectors) {
      held[i] = load_streaming<kVec>(from + (item / kSegmentVectors) * p.src_head_stride +
                                     (item % kSegmentVectors) * kVec);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int item = first + i * kRowThreads;
    if (kRowVectors % kVectors == 0 || item < kRowVectors) {
      store_streaming<kVec>(to + (item / kSegmentVectors) * p.dst_head_stride +
                                (item % kSegmentVectors) * kVec,
                            held[i]);
    }
  }
}

}  // namespace cupy_cache
