// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Copies whole blocks, for every layer and every (source, destination) pair, in one launch: inside
// one cache (copy_blocks) or between two (swap_blocks, where one side may be mapped host memory); or
// the tokens of single slots inside one cache (copy_tokens).
//
// blockIdx.y is the layer. blockIdx.x walks over (pair, chunk); a chunk is the part of a block that
// one thread block moves at a time. Keys and values are moved by the same loop: twice the loads in
// flight, half the address arithmetic. Layer pointers and pairs travel inside the parameter struct,
// so there is no upload, no allocation and nothing to wait for.
#include "cupy_cache/blocks.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// A block of one tensor: runs of contiguous bytes, `middle_count` of them in each outer step.
struct Tensor {
  Side from;
  Side to;
  u32 vectors;  // of one block
  u32 middle_count;
};

constexpr int kTableWords = 480;

struct Params {
  i64 pairs;
  const char* mapping;  // [pairs, 2] of Index on the device, if Index is not void
  i64 from_blocks;
  i64 to_blocks;
  Tensor tensors[2];
  i64 slot_strides[2];  // of slots: from one to the next in a block, of each tensor
  u32 chunks;  // of one block
  u32 unused;
  // For each layer and tensor the source's and, unless kInPlace, the destination's address; then,
  // if Index is void, the pairs, source in the low half of each word.
  u64 table[kTableWords];
};

constexpr u32 kBlockMapping = 1;

// From a tensor's address to a block or, where kBlockSize is not 0, to a slot.
template <int kBlockSize>
__device__ __forceinline__ i64 start_of(i64 number, i64 block_stride, i64 slot_stride) {
  if constexpr (kBlockSize == 0) {
    return number * block_stride;
  } else {
    const Place<kBlockSize> place(number);
    return place.block * block_stride + place.offset * slot_stride;
  }
}

// kFirstRun and kSecondRun belong to tensors 0 and 1. kItems vectors of each tensor per thread.
// kBlockSize 0: pairs are of blocks; else they are of slots, of which negative ones are padding.
template <int kTensors, bool kInPlace, int kVec, int kFirstRun, int kSecondRun, bool kNested,
          int kItems, int kBlockSize, typename Index, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) copy_blocks(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  constexpr u32 kPointers = kTensors * (kInPlace ? 1 : 2);
  const u64* pointers = p.table + blockIdx.y * kPointers;
  const u32 works = static_cast<u32>(p.pairs) * p.chunks;  // the host keeps this below 2^31

  for (u32 work = blockIdx.x; work < works; work += gridDim.x) {
    const u32 pair = work / p.chunks;
    const u32 chunk = work % p.chunks;
    i64 from, to;
    if constexpr (IsVoid<Index>::value) {
      const u64 packed = p.table[gridDim.y * kPointers + pair];
      from = static_cast<i64>(packed & 0xffffffffu);
      to = static_cast<i64>(packed >> 32);
    } else {
      const char* at = p.mapping + 2 * static_cast<i64>(pair) * static_cast<i64>(sizeof(Index));
      from = load_number<Index>(at);
      to = load_number<Index>(at + sizeof(Index));
      if (kBlockSize > 0 && (from < 0 || to < 0)) continue;
      if (!in_bounds(from, p.from_blocks, kBlockMapping, pair)) continue;
      if (!in_bounds(to, p.to_blocks, kBlockMapping, pair)) continue;
    }

    Vec<kVec> held[kTensors][kItems];
    const u32 start = chunk * (blockDim.x * kItems) + threadIdx.x;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      const Tensor& tensor = p.tensors[t];
      const char* source =
          reinterpret_cast<const char*>(pointers[t]) +
          start_of<kBlockSize>(from, tensor.from.block, p.slot_strides[t]);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const u32 index = start + i * blockDim.x;
        if (index < tensor.vectors) {
          const i64 offset =
              t == 0 ? offset_in_block<kVec, kFirstRun, kNested>(tensor.from, tensor.middle_count, index)
                     : offset_in_block<kVec, kSecondRun, kNested>(tensor.from, tensor.middle_count, index);
          held[t][i] = load_vector<kVec>(source + offset);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      const Tensor& tensor = p.tensors[t];
      char* destination =
          reinterpret_cast<char*>(pointers[kInPlace ? t : kTensors + t]) +
          start_of<kBlockSize>(to, tensor.to.block, p.slot_strides[t]);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const u32 index = start + i * blockDim.x;
        if (index < tensor.vectors) {
          const i64 offset =
              t == 0 ? offset_in_block<kVec, kFirstRun, kNested>(tensor.to, tensor.middle_count, index)
                     : offset_in_block<kVec, kSecondRun, kNested>(tensor.to, tensor.middle_count, index);
          store_vector<kVec>(destination + offset, held[t][i]);
        }
      }
    }
  }
}

}  // namespace cupy_cache
