// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Writes tokens into an x-packed cache: keys [block, head, d / x, offset, d % x], values
// [block, head, d, offset] or, interleaved, [block, head, offset / x, d, offset % x].
//
// A thread block takes a part of one head of kTile tokens; values are transposed through shared
// memory (transposed.cuh).
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/transposed.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* key;           // [tokens, heads, :]
  const char* value;         // [tokens, heads, :]
  char* key_cache;           // [num_blocks, heads, kKeyBytes / kPackBytes, kBlockSize, kPackBytes]
  // [num_blocks, heads, kBlockSize / kSlots, kValueBytes / kElement, kSlots]
  char* value_cache;
  const char* slot_mapping;  // [tokens]
  const char* k_scale;       // [heads] of float, or null: k_scale_value
  const char* v_scale;       // [heads] of float, or null: v_scale_value
  i64 tokens;
  float k_scale_value;
  float v_scale_value;
  i64 num_blocks;
  i64 slot_stride;
  i64 key_token_stride;
  i64 key_head_stride;
  i64 value_token_stride;
  i64 value_head_stride;
  i64 key_block_stride;
  i64 key_cache_head_stride;
  i64 key_pack_stride;
  i64 key_offset_stride;
  i64 value_block_stride;
  i64 value_cache_head_stride;
  i64 value_slots_stride;
  i64 value_element_stride;
  i64 k_scale_stride;
  i64 v_scale_stride;
};

constexpr u32 kSlotMapping = 1;

// Keys and Values are the converters of both, to vectors of kKeyVec and kValueVec bytes of the
// cache. kElement is the bytes of an element there, kPackBytes those of x elements, and kSlots the
// slots that lie together in the value cache: all of a block, or x where it is interleaved.
// kVectorValues says that the value cache's address and strides allow 16-byte stores. A part of a
// head is kPartBytes, or what is left.
template <typename Keys, typename Values, int kElement, int kPackBytes, int kKeyVec, int kValueVec,
          int kKeyBytes, int kValueBytes, int kBlockSize, int kSlots, bool kVectorValues,
          typename Slot, int kThreads>
__global__ void __launch_bounds__(kThreads)
    reshape_and_cache(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  static_assert(kKeyBytes % kPackBytes == 0 && kPackBytes % kKeyVec == 0, "whole packs");
  static_assert(kPartBytes % 16 == 0, "whole packs");
  constexpr int kKeyPart = smaller(kKeyBytes, kPartBytes);
  constexpr int kKeyCount = (kTile * (kKeyPart / kKeyVec) + kThreads - 1) / kThreads;
  constexpr int kLargest = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;
  constexpr u32 kParts = (kLargest + kPartBytes - 1) / kPartBytes;

  using Held = Transposed<Values, kElement, kValueVec, kValueBytes, kBlockSize, kSlots,
                          kVectorValues, kThreads>;
  __shared__ typename Held::Shared shared;

  // blockIdx.x counts the parts of all heads, blockIdx.y and z the tiles; there may be more of these
  // than there are tokens.
  const Work work =
      Work::of_block<Slot>(blockIdx.z * gridDim.y + blockIdx.y, blockIdx.x, gridDim.y * gridDim.z,
                           gridDim.x, p.slot_mapping, p.slot_stride, p.tokens);
  const int head = static_cast<int>(work.part / kParts);
  const int begin = static_cast<int>(work.part % kParts) * kPartBytes;
  const i64 first = static_cast<i64>(work.tile) * kTile;
  const i64 left = p.tokens - first;
  if (left <= 0) return;  // the whole block
  const int thread = static_cast<int>(threadIdx.x);

  // One warp waits for the slots before it loads anything else. Were its loads to come first, 256
  // consecutive slots would take 10 % longer on an H100.
  i64 own_slot = kSkip;
  if (thread < kTile && thread < left) {
    own_slot = load_number<Slot>(p.slot_mapping + (first + thread) * p.slot_stride);
  }
  const Target<kBlockSize> target(own_slot, p.num_blocks);
  if (thread < kTile) shared.slots[thread] = target.valid ? own_slot : kSkip;
  typename Keys::Source keys[kKeyCount];
  Held values;
  load_rows<Keys, kKeyVec, kKeyPart, kThreads>(
      keys, p.key + first * p.key_token_stride + head * p.key_head_stride, p.key_token_stride, left,
      begin, kKeyBytes);
  values.load(p.value + first * p.value_token_stride + head * p.value_head_stride,
              p.value_token_stride, left, begin);
  const float k_scale = scale_of(p.k_scale, p.k_scale_stride, head, p.k_scale_value);
  const float v_scale = scale_of(p.v_scale, p.v_scale_stride, head, p.v_scale_value);
  __syncthreads();

  Held::find_adjacent(shared);

#pragma unroll
  for (int i = 0; i < kKeyCount; ++i) {
    const int number = i * kThreads + thread;
    const Item<kKeyPart / kKeyVec> item(number);
    const int at = begin + item.vector * kKeyVec;
    if (number < kTile * (kKeyPart / kKeyVec) && at < kKeyBytes &&
        shared.slots[item.token] >= 0) {
      const Place<kBlockSize> place(shared.slots[item.token]);
      store_vector<kKeyVec>(p.key_cache + place.block * p.key_block_stride +
                                head * p.key_cache_head_stride +
                                at / kPackBytes * p.key_pack_stride +
                                place.offset * p.key_offset_stride + at % kPackBytes,
                            Keys::convert(keys[i], k_scale));
    }
  }

  values.transpose(shared, left, begin, v_scale);
  __syncthreads();
  const ValuePlaces places = {p.value_cache + head * p.value_cache_head_stride,
                              p.value_block_stride, p.value_slots_stride, p.value_element_stride};
  Held::store(shared, places, begin);
  if (begin == 0) target.report(kSlotMapping, first + thread);
}

}  // namespace cupy_cache
