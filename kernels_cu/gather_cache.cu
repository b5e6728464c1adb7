// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Gathers the pages of several sequences from a paged cache into contiguous rows.
//
// `gathered.cuh` says what a row is made of, and moves it. The fp8_ds_mla entry, whose scales are in
// it, has a kernel of its own below.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/gathered.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/sequences.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* src_cache;    // [num_blocks, kBlockSize / kGroup, kGroup, a token]
  char* dst;                // [rows, kOuter, kHeads, kBytes]
  const char* block_table;  // [sequences, table_width] of Block
  const char* cu_seq_lens;  // [sequences + 1] of Length; [sequences] if the last end is open
  const char* seq_starts;   // [sequences] of Start, if that is not void; else all start at 0
  const char* scale;        // one float, or null: scale_value is used; or of heads, see kScaleHeads
  i64 rows;
  i64 sequences;
  i64 table_width;
  i64 table_stride;
  float scale_value;
  u32 first_guarded;  // see TokenSearch::find; behind the block table is cu_seq_lens
  Even even;          // sequences of the rows
  i64 num_blocks;
  i64 start_stride;
  Sides sides;
};

// Converter makes vectors of kVec bytes of a row; kBytes are of a row. kScaleHeads heads, of which a
// row has equal parts, have scales of their own; 0: one is for all.
template <typename Converter, int kVec, int kOuter, int kHeads, int kBytes, int kScaleHeads,
          int kBlockSize, int kGroup, typename Block, typename Length, typename Start, int kVectors,
          int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) gather_cache(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using Shape = RowShape<Converter, kOuter, kHeads, kBytes, kScaleHeads, kGroup, kVectors>;
  using Part = RowPart<Shape, kVec, kBlockSize>;

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const i64 row = static_cast<i64>(index / Part::kThreads);
  if (row >= p.rows || p.sequences <= 0) return;
  const Sequences sequences = sequences_of(p);
  const TokenSearch<kBlockSize, false, Block, Length, Start> search(sequences, row);
  const float scale = scale_of_all<Shape>(p.scale, p.scale_value);
  const OrderCheck<Length> order(p.cu_seq_lens, p.sequences, index,
                                 static_cast<u32>(p.rows) * Part::kThreads);

  Part part(static_cast<int>(index % Part::kThreads));
  const auto load = [&](const Token& token) {
    part.load(p.src_cache, p.scale, p.sides, token.block, token.offset);
  };
  if (!search.load_token(p.first_guarded, load)) return order.report(p.first_guarded + 2, p.rows);
  part.store(p.dst + row * p.sides.dst_row_stride, p.sides, scale);
  order.report(p.first_guarded + 2, p.rows);
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
  await_earlier_launches();
  release_next_launch();
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
  if (row >= p.rows || p.sequences <= 0) return;
  const Sequences sequences = sequences_of(p);
  const TokenSearch<kBlockSize, true, Block, Start, SeqStart> search(sequences, row);
  const OrderCheck<Start> order(p.cu_seq_lens, p.sequences - 1, index,
                                static_cast<u32>(p.rows) * kRowThreads);

  // Everything is loaded before anything is converted.
  typename Latent::Source latent[kVectors];
  typename Rope::Source rope[kVectors];
  float scale[kVectors];
  const auto load = [&](const Token& token) {
    const char* const from =
        address_of<kBlockSize, kBlockSize>(p.src_cache, p.sides, token.block, token.offset);
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
  };
  if (!search.load_token(p.first_guarded, load)) return order.report(p.first_guarded + 2, p.rows);
  char* const to = p.dst + row * p.sides.dst_row_stride;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int item = first + i * kRowThreads;
    store_vector<kVec>(to + item * kVec, item < kLatentVectors
                                             ? Latent::convert(latent[i], scale[i])
                                             : Rope::convert(rope[i], 1.0f));
  }
  order.report(p.first_guarded + 2, p.rows);
}

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
