// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Moves chosen items, whole blocks or the tokens of single slots, of every layer in one launch: into
// one contiguous buffer (pack), out of it (unpack), or fills them with zeros (zero).
//
// blockIdx.y is the layer; blockIdx.x walks over the vectors of all items. A work item is one vector
// of a key and the vector of the value with the same index: consecutive threads take consecutive
// vectors, of the next item where one ends, so that accesses coalesce and warps are full whatever an
// item's size. Layer pointers and, if they are in host memory, the items' numbers travel inside the
// parameter struct: there is no upload and nothing to wait for.
#include "cupy_cache/blocks.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// Strides in bytes.
struct Tensor {
  Side cache;   // of a block; for slots, its runs are those of one token
  i64 slot;     // from slot to slot of a block
  u32 vectors;  // of an item
  u32 middle_count;
};

constexpr int kTableWords = 480;

struct Params {
  char* packed[2];   // where the buffer has item 0 of this launch, layer 0, of each tensor
  const char* index; // [items] of Index on the device, if Index is not void
  i64 index_stride;
  i64 items;
  i64 first;         // the item's row in the caller's list, for faults
  i64 layer_stride;  // from layer to layer in the buffer
  i64 item_stride[2];  // there, from item to item, whose bytes are contiguous, of each tensor
  i64 limit;         // the blocks, or slots, that there are
  i64 vectors;       // of an item of the tensor that has more
  Tensor tensors[2];
  // The address of each layer's tensors; then, if Index is void, the items' numbers, two in a word.
  u64 table[kTableWords];
};

enum class Direction { kPack, kUnpack, kZero };

constexpr u32 kIndices = 1;

template <int kTensors, typename Index>
__device__ __forceinline__ i64 number_of(const Params& p, u32 item) {
  if constexpr (IsVoid<Index>::value) {
    const u64 word = p.table[gridDim.y * kTensors + item / 2];
    return static_cast<i32>(static_cast<u32>(item % 2 ? word >> 32 : word));
  } else {
    return load_number<Index>(p.index + item * p.index_stride);
  }
}

// kFirstRun and kSecondRun belong to tensors 0 and 1. kBlockSize 0: items are blocks; else they are
// slots, of which negative ones are padding. kItems work items per thread.
template <Direction kMove, int kTensors, int kVec, int kFirstRun, int kSecondRun, bool kNested,
          int kBlockSize, int kItems, typename Index, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) pack_blocks(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  const u64* caches = p.table + blockIdx.y * kTensors;
  const i64 layer = blockIdx.y * p.layer_stride;
  const u32 vectors = static_cast<u32>(p.vectors);
  const u32 works = static_cast<u32>(p.items) * vectors;  // the host keeps this below 2^31
  const u32 step = gridDim.x * blockDim.x * kItems;

  const auto in_cache = [&](int t, i64 number, u32 index) {
    const Tensor& tensor = p.tensors[t];
    char* at = reinterpret_cast<char*>(caches[t]);
    if constexpr (kBlockSize == 0) {
      at += number * tensor.cache.block;
    } else {
      const Place<kBlockSize> place(number);
      at += place.block * tensor.cache.block + place.offset * tensor.slot;
    }
    const u32 middles = tensor.middle_count;
    return at + (t == 0 ? offset_in_block<kVec, kFirstRun, kNested>(tensor.cache, middles, index)
                        : offset_in_block<kVec, kSecondRun, kNested>(tensor.cache, middles, index));
  };
  const auto in_buffer = [&](int t, u32 item, u32 index) {
    return p.packed[t] + layer + item * p.item_stride[t] + static_cast<i64>(index) * kVec;
  };
  const auto has = [&](int t, u32 index) { return index < p.tensors[t].vectors; };

  for (u32 start = blockIdx.x * (blockDim.x * kItems) + threadIdx.x; start < works; start += step) {
    i64 number[kItems];
    Vec<kVec> held[kItems][kTensors] = {};
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const u32 work = start + i * blockDim.x;
      number[i] = work < works ? number_of<kTensors, Index>(p, work / vectors) : -1;
    }
    if constexpr (kMove == Direction::kUnpack) {  // only the stores have to wait for the numbers
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const u32 work = start + i * blockDim.x;
        const u32 item = work / vectors, index = work % vectors;
#pragma unroll
        for (int t = 0; t < kTensors; ++t) {
          if (work < works && has(t, index)) {
            held[i][t] = load_vector<kVec>(in_buffer(t, item, index));
          }
        }
      }
    }
    if constexpr (!IsVoid<Index>::value) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const u32 work = start + i * blockDim.x;
        if (work >= works || (kBlockSize > 0 && number[i] < 0)) continue;
        if (!in_bounds(number[i], p.limit, kIndices, p.first + work / vectors)) number[i] = -1;
      }
    }
    if constexpr (kMove == Direction::kPack) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const u32 index = (start + i * blockDim.x) % vectors;
#pragma unroll
        for (int t = 0; t < kTensors; ++t) {
          if (number[i] >= 0 && has(t, index)) {
            held[i][t] = load_vector<kVec>(in_cache(t, number[i], index));
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const u32 work = start + i * blockDim.x;
      const u32 item = work / vectors, index = work % vectors;
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
        if (number[i] < 0 || !has(t, index)) continue;
        store_vector<kVec>(
            kMove == Direction::kPack ? in_buffer(t, item, index) : in_cache(t, number[i], index),
            held[i][t]);
      }
    }
  }
}

}  // namespace cupy_cache
