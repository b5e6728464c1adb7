// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Gathers the quantised keys of several sequences, and their scales, from the cache of a
// sparse-attention indexer, whose blocks hold first the keys of all slots, then the scales of all
// slots.
//
// kRowThreads threads share a row. Each moves vectors of the key and of the scales with the same
// indices, and finds its row's sequence by a search of its own, in lines that its neighbours read
// too.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/sequences.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* kv_cache;     // [num_blocks], blocks as below
  char* dst_k;              // [rows, kKeyBytes]
  char* dst_scale;          // [rows, kScaleBytes]
  const char* block_table;  // [sequences, table_width] of Block
  const char* cu_seq_lens;  // [sequences + 1] of Length
  i64 rows;
  i64 sequences;
  i64 table_width;
  i64 table_stride;
  Even even;  // sequences of the rows
  i64 num_blocks;
  i64 block_stride;
  i64 k_stride;
  i64 scale_stride;
};

constexpr u32 kCuSeqLens = 2;

// kBytes bytes, moved in vectors of kVec by kThreads threads; this is one thread's share.
template <int kVec, int kBytes, int kThreads>
struct Share {
  static_assert(kBytes % kVec == 0, "whole vectors");
  static constexpr int kVectors = kBytes / kVec;
  static constexpr int kHeld = (kVectors + kThreads - 1) / kThreads;
  Vec<kVec> held[kHeld];

  static __device__ __forceinline__ bool has(int vector) {
    return kVectors % kThreads == 0 || vector < kVectors;
  }
  __device__ __forceinline__ void load(const char* from, int thread) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = thread + i * kThreads;
      if (has(vector)) held[i] = load_vector<kVec>(from + vector * kVec);
    }
  }
  __device__ __forceinline__ void store(char* to, int thread) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = thread + i * kThreads;
      if (has(vector)) store_vector<kVec>(to + vector * kVec, held[i]);
    }
  }
};

// A block of the cache is [kBlockSize, kKeyBytes], then [kBlockSize, kScaleBytes].
template <int kKeyVec, int kScaleVec, int kKeyBytes, int kScaleBytes, int kRowThreads,
          int kBlockSize, typename Block, typename Length, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    cp_gather_indexer_k_quant_cache(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const i64 row = static_cast<i64>(index / kRowThreads);
  const int thread = static_cast<int>(index % kRowThreads);
  if (row >= p.rows || p.sequences <= 0) return;

  const Sequences sequences = {
      p.cu_seq_lens, p.block_table, nullptr,        p.even, static_cast<i32>(p.sequences),
      p.num_blocks,  p.table_width, p.table_stride, 0};
  const TokenSearch<kBlockSize, false, Block, Length, void> search(sequences, row);
  const OrderCheck<Length> order(p.cu_seq_lens, p.sequences, index,
                                 static_cast<u32>(p.rows) * kRowThreads);
  Share<kKeyVec, kKeyBytes, kRowThreads> key;
  Share<kScaleVec, kScaleBytes, kRowThreads> scales;
  const auto load = [&](const Token& token) {
    const char* const from = p.kv_cache + token.block * p.block_stride;
    const i64 offset = token.offset;
    key.load(from + offset * kKeyBytes, thread);
    scales.load(from + static_cast<i64>(kBlockSize) * kKeyBytes + offset * kScaleBytes, thread);
  };
  constexpr u32 kFirstGuarded = 0;  // there are no seq_starts
  if (!search.load_token(kFirstGuarded, load)) return order.report(kCuSeqLens, p.rows);
  key.store(p.dst_k + row * p.k_stride, thread);
  scales.store(p.dst_scale + row * p.scale_stride, thread);
  order.report(kCuSeqLens, p.rows);
}

}  // namespace cupy_cache
