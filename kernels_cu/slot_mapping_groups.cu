// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Turns tokens' positions into slots, for several groups of layers with block tables of their own.
//
// blockIdx.y is the group, blockIdx.x walks over the entries of its row of the result. The groups'
// tables travel inside the parameter struct: there is no upload and nothing to wait for.
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/sequences.cuh"
#include "cupy_cache/slots.cuh"

namespace cupy_cache {

constexpr int kMaxGroups = 48;  // as many as the 4 KiB of kernel parameters hold, and some room

// Strides are in bytes.
struct Params {
  const char* idx_mapping;      // [requests] of Row, or null: request b has row b
  const char* positions;        // [tokens] of Position
  const char* query_start_loc;  // [requests + 1] of Start
  char* out;                    // [groups, slots] of i64
  i64 slots;
  i64 requests;
  i64 tokens;
  i64 first;  // this launch's first group, for faults
  i64 out_stride;
  Even even;  // requests of the tokens
  i64 idx_stride;
  i64 position_stride;
  Table groups[kMaxGroups];  // with a block size of 0: disabled, all its slots are -1
};

constexpr u32 kIdxMapping = 3;

// kParallel: there are groups with more than one rank.
template <bool kParallel, typename Block, typename Row, typename Position, typename Start,
          int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    slot_mapping_groups(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  const i64 token = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= p.slots) return;
  const Table& table = p.groups[blockIdx.y];
  i64 slot = kNoSlot;
  if (token < p.tokens && p.requests > 0 && table.block_size > 0) {
    // Loaded with the search's numbers, which it does not depend on.
    const i64 position = load_number<Position>(p.positions + token * p.position_stride);
    const i32 requests = static_cast<i32>(p.requests);
    const SegmentSearch<Start> search(p.query_start_loc, requests, token, p.even);
    const i64 request = search.right() ? search.guess : search.find().index;
    if (within(request, p.requests)) {
      const i64 fault_row = (p.first + blockIdx.y) * p.tokens + token;
      const i64 row = p.idx_mapping
                          ? load_number<Row>(p.idx_mapping + request * p.idx_stride)
                          : request;
      if (row >= 0 && in_bounds(row, table.rows, kIdxMapping, fault_row)) {
        slot = slot_of<kParallel, Block>(table, row, position, fault_row);
      }
    }
  }
  reinterpret_cast<i64*>(p.out + blockIdx.y * p.out_stride)[token] = slot;
}

}  // namespace cupy_cache
