// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// From a token's position to its slot.
#pragma once

#include "cupy_cache/ints.cuh"
#include "cupy_cache/paging.cuh"

namespace cupy_cache {

// The numbers of these arguments in the operations' lists of guarded ones.
constexpr u32 kPositions = 1;
constexpr u32 kBlockTable = 2;
constexpr i64 kNoSlot = -1;

// A block table and what its entries stand for. Strides in bytes.
struct Table {
  const char* blocks;  // [rows, position_limit / block_size / cp_world_size] of Block
  i64 rows;
  i64 stride;
  i64 position_limit;
  i64 block_limit;  // below it, block * block_size + offset fits 64 bits
  i64 block_size;
  i64 cp_world_size;
  i64 cp_rank;
  i64 cp_interleave;
};

// The slot of a position in the sequence of one of the table's rows; faults are recorded as
// `fault_row`. kParallel: there may be more than one rank.
template <bool kParallel, typename Block>
__device__ __forceinline__ i64 slot_of(const Table& table, i64 row, i64 position, i64 fault_row) {
  if (!in_bounds(position, table.position_limit, kPositions, fault_row)) return kNoSlot;

  u64 page, offset;
  if constexpr (kParallel) {
    // A table entry stands for one block on each rank; runs of cp_interleave tokens go round them.
    const u64 tokens = static_cast<u64>(table.block_size) * table.cp_world_size;
    page = static_cast<u64>(position) / tokens;
    const u64 inside = static_cast<u64>(position) % tokens;
    const u64 run = inside / table.cp_interleave;
    if (run % table.cp_world_size != static_cast<u64>(table.cp_rank)) return kNoSlot;
    offset = run / table.cp_world_size * table.cp_interleave + inside % table.cp_interleave;
  } else {
    const u64 size = static_cast<u64>(table.block_size);
    if ((size & (size - 1)) == 0) {  // as nearly always: a division takes longer than a load
      page = static_cast<u64>(position) >> (__ffsll(table.block_size) - 1);
      offset = static_cast<u64>(position) & (size - 1);
    } else {
      page = static_cast<u64>(position) / size;
      offset = static_cast<u64>(position) % size;
    }
  }
  const i64 block = load_number<Block>(table.blocks + row * table.stride +
                                       static_cast<i64>(page * sizeof(Block)));
  if (!in_bounds(block, table.block_limit, kBlockTable, fault_row)) return kNoSlot;
  return block * table.block_size + static_cast<i64>(offset);
}

}  // namespace cupy_cache
