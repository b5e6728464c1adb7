// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Writes one token's keys and values into its slot of a cache of 8-bit elements indexed
// [block, offset, head, :], with scales of its own for each token and head beside it.
//
// kLanes neighbouring lanes share a row, the elements of one token's head, of the keys and of the
// values: each loads its vectors, a shuffle finds the largest value, and the same registers are
// converted. Everything is read once.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/row.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* key;           // [tokens, heads, kKeySize]
  const char* value;         // [tokens, heads, kValueSize]
  char* key_cache;           // [num_blocks, kBlockSize, heads, kKeySize]
  char* value_cache;         // [num_blocks, kBlockSize, heads, kValueSize]
  char* k_scale_cache;       // [num_blocks, kBlockSize, heads] of float
  char* v_scale_cache;       // likewise
  const char* slot_mapping;  // [tokens]
  i64 tokens;
  i64 num_blocks;
  i64 slot_stride;
  i64 key_token_stride;
  i64 key_head_stride;
  i64 value_token_stride;
  i64 value_head_stride;
  i64 key_block_stride;
  i64 key_offset_stride;
  i64 key_cache_head_stride;
  i64 value_block_stride;
  i64 value_offset_stride;
  i64 value_cache_head_stride;
  i64 k_scale_block_stride;
  i64 k_scale_offset_stride;
  i64 k_scale_head_stride;
  i64 v_scale_block_stride;
  i64 v_scale_offset_stride;
  i64 v_scale_head_stride;
};

constexpr u32 kSlotMapping = 1;

#ifdef CUPY_CACHE_CONVERTS

// kVec elements are converted at a time. kLargest is what the largest magnitude of a row becomes.
template <typename From, typename To, int kLargest, int kVec, int kLanes, int kHeads, int kKeySize,
          int kValueSize, int kBlockSize, typename Slot, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    reshape_and_cache_flash_per_token_head(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(index % kLanes);
  const int head = static_cast<int>(index / kLanes % kHeads);
  const i64 token = static_cast<i64>(index / (kLanes * kHeads));
  if (token >= p.tokens) return;  // the whole group

  const i64 slot = load_number<Slot>(p.slot_mapping + token * p.slot_stride);
  Row<From, To, kVec, kKeySize, kLanes> key;
  Row<From, To, kVec, kValueSize, kLanes> value;
  key.load(p.key + token * p.key_token_stride + head * p.key_head_stride, lane);
  value.load(p.value + token * p.value_token_stride + head * p.value_head_stride, lane);

  // Found before the slot is looked at, so that loads do not wait for it.
  const float k_scale = row_scale<kLargest>(key.largest(lane));
  const float v_scale = row_scale<kLargest>(value.largest(lane));

  const Target<kBlockSize> target(slot, p.num_blocks);
  const Place<kBlockSize> place = target.place();
  key.store(p.key_cache + place.block * p.key_block_stride + place.offset * p.key_offset_stride +
                head * p.key_cache_head_stride,
            lane, divide(1.0f, k_scale), target.valid);
  value.store(p.value_cache + place.block * p.value_block_stride +
                  place.offset * p.value_offset_stride + head * p.value_cache_head_stride,
              lane, divide(1.0f, v_scale), target.valid);
  if (target.valid && lane == 0) {
    *reinterpret_cast<float*>(p.k_scale_cache + place.block * p.k_scale_block_stride +
                              place.offset * p.k_scale_offset_stride +
                              head * p.k_scale_head_stride) = k_scale;
    *reinterpret_cast<float*>(p.v_scale_cache + place.block * p.v_scale_block_stride +
                              place.offset * p.v_scale_offset_stride +
                              head * p.v_scale_head_stride) = v_scale;
  }
  target.report(kSlotMapping, token);
}

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
