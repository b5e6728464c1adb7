// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Gathers the pages of several sequences from a layer's key and value caches into contiguous rows,
// in one launch: blocks of threads whose y is 0 move keys, the others values. Otherwise as
// gather_cache.cu.
#include "cupy_cache/gathered.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/sequences.cuh"

namespace cupy_cache {

// The number of seq_starts in the list of guarded arguments; block_table and cu_seq_lens follow.
constexpr u32 kSeqStarts = 1;

// Of pairs, the first is of the keys. Strides are in bytes.
struct Params {
  char* rows[2];            // [row_count, a token]
  const char* block_table;  // [sequences, table_width] of Block
  const char* cu_seq_lens;  // [sequences + 1] of Length
  const char* seq_starts;   // [sequences] of Start, if that is not void; else all start at 0
  const char* caches[2];    // [num_blocks, kBlockSize, a token]
  const char* scales[2];    // see gather_cache.cu
  i64 row_count;
  i64 sequences;
  i64 table_width;
  i64 table_stride;
  float scale_values[2];
  Even even;  // sequences of the rows
  i64 num_blocks;
  i64 start_stride;
  Sides sides[2];
};

// What a thread of the keys, or of the values, does: `side` is 0 or 1.
template <typename Shape, int kVec, int kBlockSize, typename Block, typename Length, typename Start>
__device__ __forceinline__ void gather(const Params& p, int side) {
  using Part = RowPart<Shape, kVec, kBlockSize>;
  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const i64 row = static_cast<i64>(index / Part::kThreads);
  if (row >= p.row_count || p.sequences <= 0) return;
  const Sequences sequences = sequences_of(p);
  const TokenSearch<kBlockSize, false, Block, Length, Start> search(sequences, row);
  const char* const cache = p.caches[side];
  const char* const scales = p.scales[side];
  const float scale = scale_of_all<Shape>(scales, p.scale_values[side]);
  const OrderCheck<Length> order(p.cu_seq_lens, p.sequences, index,
                                 static_cast<u32>(p.row_count) * Part::kThreads);

  Part part(static_cast<int>(index % Part::kThreads));
  const auto load = [&](const Token& token) {
    part.load(cache, scales, p.sides[side], token.block, token.offset);
  };
  if (!search.load_token(kSeqStarts, load)) return order.report(kSeqStarts + 2, p.row_count);
  part.store(p.rows[side] + row * p.sides[side].dst_row_stride, p.sides[side], scale);
  order.report(kSeqStarts + 2, p.row_count);
}

// Keys and Values are `RowShape`s, of which vectors of kKeyVec and of kValueVec bytes are moved. Where
// both are the same, there is one code for both.
template <typename Keys, typename Values, int kKeyVec, int kValueVec, int kBlockSize,
          typename Block, typename Length, typename Start, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) gather_both(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  if constexpr (IsSame<Keys, Values>::value && kKeyVec == kValueVec) {
    gather<Keys, kKeyVec, kBlockSize, Block, Length, Start>(p, blockIdx.y);
  } else if (blockIdx.y == 0) {
    gather<Keys, kKeyVec, kBlockSize, Block, Length, Start>(p, 0);
  } else {
    gather<Values, kValueVec, kBlockSize, Block, Length, Start>(p, 1);
  }
}

}  // namespace cupy_cache
