// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Turns tokens' positions into slots: one thread for each entry of the result.
//
// Block size and context-parallel layout are run-time fields: one or two integer divisions for each
// token do not show, and no engine's settings need a specialisation of their own.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/sequences.cuh"
#include "cupy_cache/slots.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* block_table;      // [requests, :] of Block
  const char* positions;        // [tokens] of Position
  const char* query_start_loc;  // [requests + 1] of Start
  i64* out;                     // [slots]
  i64 slots;
  i64 requests;
  i64 tokens;
  i64 table_stride;
  i64 position_limit;
  Even even;  // requests of the tokens
  i64 position_stride;
  i64 block_limit;
  i64 block_size;
  i64 cp_world_size;
  i64 cp_rank;
  i64 cp_interleave;
};

// kParallel: more than one rank.
template <bool kParallel, typename Block, typename Position, typename Start, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) slot_mapping(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  const i64 token = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= p.slots) return;
  i64 slot = kNoSlot;
  if (token < p.tokens && p.requests > 0) {
    // Loaded with the search's numbers, which it does not depend on.
    const i64 position = load_number<Position>(p.positions + token * p.position_stride);
    const i32 requests = static_cast<i32>(p.requests);
    const SegmentSearch<Start> search(p.query_start_loc, requests, token, p.even);
    const i64 request = search.right() ? search.guess : search.find().index;
    if (within(request, p.requests)) {
      const Table table = {p.block_table, p.requests,      p.table_stride,
                           p.position_limit, p.block_limit, p.block_size,
                           p.cp_world_size,  p.cp_rank,     p.cp_interleave};
      slot = slot_of<kParallel, Block>(table, request, position, token);
    }
  }
  p.out[token] = slot;
}

}  // namespace cupy_cache
