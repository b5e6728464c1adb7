// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Turns tokens' positions into slots: one thread for each entry of the result.
//
// Block size and context-parallel layout are run-time fields: one or two integer divisions for each
// token do not show, and no engine's settings need a specialisation of their own.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/paging.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* block_table;      // [requests, position_limit / block_size / cp_world_size] of Block
  const char* positions;        // [tokens] of Position
  const char* query_start_loc;  // [requests + 1] of Start
  i64* out;                     // [slots]
  i64 slots;
  i64 requests;
  i64 tokens;
  i64 table_stride;
  i64 position_stride;
  i64 position_limit;
  i64 block_limit;  // below it, block * block_size + offset fits 64 bits
  i64 block_size;
  i64 cp_world_size;
  i64 cp_rank;
  i64 cp_interleave;
};

constexpr u32 kPositions = 1;
constexpr u32 kBlockTable = 2;
constexpr i64 kNoSlot = -1;

// The slot of `token`, which belongs to `request`.
template <bool kParallel, typename Block, typename Position>
__device__ __forceinline__ i64 slot_of(const Params& p, i64 request, i64 token) {
  const i64 position = static_cast<i64>(
      *reinterpret_cast<const Position*>(p.positions + token * p.position_stride));
  if (!in_bounds(position, p.position_limit, kPositions, token)) return kNoSlot;

  u64 page, offset;
  if constexpr (kParallel) {
    // A table entry stands for one block on each rank; runs of cp_interleave tokens go round them.
    const u64 tokens = static_cast<u64>(p.block_size) * p.cp_world_size;
    page = static_cast<u64>(position) / tokens;
    const u64 inside = static_cast<u64>(position) % tokens;
    const u64 run = inside / p.cp_interleave;
    if (run % p.cp_world_size != static_cast<u64>(p.cp_rank)) return kNoSlot;
    offset = run / p.cp_world_size * p.cp_interleave + inside % p.cp_interleave;
  } else {
    page = static_cast<u64>(position) / p.block_size;
    offset = static_cast<u64>(position) % p.block_size;
  }
  const i64 block = static_cast<i64>(
      reinterpret_cast<const Block*>(p.block_table + request * p.table_stride)[page]);
  if (!in_bounds(block, p.block_limit, kBlockTable, token)) return kNoSlot;
  return block * p.block_size + static_cast<i64>(offset);
}

// kParallel: more than one rank.
template <bool kParallel, typename Block, typename Position, typename Start, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) slot_mapping(const __grid_constant__ Params p) {
  const i64 token = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= p.slots) return;
  i64 slot = kNoSlot;
  if (token < p.tokens) {
    const i64 request =
        find_segment(reinterpret_cast<const Start*>(p.query_start_loc), p.requests, token);
    if (request >= 0 && request < p.requests) {
      slot = slot_of<kParallel, Block, Position>(p, request, token);
    }
  }
  p.out[token] = slot;
}

}  // namespace cupy_cache
