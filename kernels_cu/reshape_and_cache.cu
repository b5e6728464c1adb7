// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Writes tokens into an x-packed cache: keys [block, head, d / x, offset, d % x], values
// [block, head, d, offset] or, interleaved, [block, head, offset / x, d, offset % x].
//
// A thread block takes a part of one head of kTile tokens; values are transposed through shared
// memory. Where a group of 16 bytes' worth of slots is consecutive and aligned, its values leave as
// 16-byte vectors along the offset; elsewhere element by element, which costs a whole memory sector
// for each. What is converted is converted before the transposition.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
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
constexpr int kTile = 16;  // tokens of a thread block
constexpr i64 kSkip = -1;

__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Which token of the tile, and which of its row's kVectors vectors, an item is. Where it can be, a
// warp takes 4 tokens by 8 vectors, or 8 by 4, so that loads and stores both are runs of 64 bytes
// and more: on an H100 1 to 3 % faster with consecutive slots, 5 % with random ones, than 16 by 2.
template <int kVectors>
struct Item {
  int token;
  int vector;

  __device__ __forceinline__ explicit Item(int item) {
    if constexpr (kVectors % 8 == 0) {
      token = (item & 3) | (item >> 5 & 3) << 2;
      vector = (item >> 2 & 7) | item >> 7 << 3;
    } else if constexpr (kVectors == 4) {
      token = (item & 7) | (item >> 5 & 1) << 3;
      vector = item >> 3 & 3;
    } else {
      token = item % kTile;
      vector = item / kTile;
    }
  }
};

// Which tokens, head and bytes of it a thread block takes. blockIdx.x counts the parts of all
// heads, blockIdx.y and z the tiles; there may be more of these than there are tokens.
//
// The parts of a tile come together, because they are neighbours in all arrays. But where there are
// many tokens, and neighbours have slots that are none, all tiles come before the next part:
// elements of one sector that are written by several thread blocks meet in the L2.
struct Work {
  u32 tile;
  u32 part;

  template <typename Slot>
  static __device__ __forceinline__ Work of_block(const Params& p) {
    constexpr i64 kMany = 8192;
    const u32 tile = blockIdx.z * gridDim.y + blockIdx.y, tiles = gridDim.y * gridDim.z;
    if (p.tokens < kMany || static_cast<u64>(tiles) * gridDim.x > 0xffffffffu) {
      return {tile, blockIdx.x};
    }
    const auto slot = [&](i64 token) {
      return load_number<Slot>(p.slot_mapping + token * p.slot_stride);
    };
    const i64 middle = p.tokens / 2;
    const i64 a = slot(0), behind_a = slot(1), b = slot(middle), behind_b = slot(middle + 1);
    const auto follows = [](i64 next, i64 one) {  // unsigned, because slots may be anything
      return static_cast<u64>(next) - static_cast<u64>(one) == 1;
    };
    if (follows(behind_a, a) || follows(behind_b, b)) return {tile, blockIdx.x};
    const u32 block = tile * gridDim.x + blockIdx.x;
    return {block % tiles, block / tiles};
  }
};

// Loads what becomes this thread's vectors of bytes [begin, begin + kBytes) of each of the tile's
// rows.
template <typename Converter, int kVec, int kBytes, int kThreads, int kCount>
__device__ __forceinline__ void load_rows(typename Converter::Source (&held)[kCount],
                                          const char* base, i64 token_stride, i64 tokens_left,
                                          int begin, int end) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int number = i * kThreads + static_cast<int>(threadIdx.x);
    const Item<kBytes / kVec> item(number);
    const int at = begin + item.vector * kVec;
    if (number < kTile * (kBytes / kVec) && item.token < tokens_left && at < end) {
      held[i] = Converter::load(base + item.token * token_stride +
                                at / kVec * Converter::kSourceBytes);
    }
  }
}

// Keys and Values are the converters of both, to vectors of kKeyVec and kValueVec bytes of the
// cache. kElement is the bytes of an element there, kPackBytes those of x elements, and kSlots the
// slots that lie together in the value cache: all of a block, or x where it is interleaved.
// kVectorValues says that the value cache's address and strides allow 16-byte stores. A part of a
// head is kPartBytes, or what is left.
template <typename Keys, typename Values, int kElement, int kPackBytes, int kKeyVec, int kValueVec,
          int kKeyBytes, int kValueBytes, int kBlockSize, int kSlots, bool kVectorValues,
          typename Slot, int kPartBytes, int kThreads>
__global__ void __launch_bounds__(kThreads)
    reshape_and_cache(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  static_assert(kKeyBytes % kPackBytes == 0 && kPackBytes % kKeyVec == 0, "whole packs");
  static_assert(kBlockSize % kSlots == 0, "whole groups of slots");
  static_assert(kPartBytes % 16 == 0, "whole packs and vectors");
  constexpr int kKeyPart = smaller(kKeyBytes, kPartBytes);
  constexpr int kValuePart = smaller(kValueBytes, kPartBytes);
  constexpr int kKeyCount = (kTile * (kKeyPart / kKeyVec) + kThreads - 1) / kThreads;
  constexpr int kValueCount = (kTile * (kValuePart / kValueVec) + kThreads - 1) / kThreads;
  constexpr int kLargest = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;
  constexpr u32 kParts = (kLargest + kPartBytes - 1) / kPartBytes;

  // Values, transposed. An odd number of words in a row spreads both accesses over all banks;
  // elements of 8 bytes must stay aligned.
  constexpr int kRowWords = kTile * kElement / 4 + (kElement > 4 ? kElement / 4 : 1);
  constexpr int kValueElements = kValuePart / kElement;
  __shared__ __align__(16) u32 transposed[kValueElements * kRowWords];
  char* const transposed_bytes = reinterpret_cast<char*>(transposed);

  constexpr int kGroup = 16 / kElement;  // slots of a 16-byte vector
  constexpr int kGroups = kTile / kGroup;
  constexpr bool kMayBeAdjacent = kVectorValues && kSlots % kGroup == 0;
  __shared__ i64 slots[kTile];
  __shared__ bool adjacent[kGroups];

  const Work work = Work::of_block<Slot>(p);
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
  if (thread < kTile) slots[thread] = target.valid ? own_slot : kSkip;
  typename Keys::Source keys[kKeyCount];
  typename Values::Source values[kValueCount];
  load_rows<Keys, kKeyVec, kKeyPart, kThreads>(
      keys, p.key + first * p.key_token_stride + head * p.key_head_stride, p.key_token_stride, left,
      begin, kKeyBytes);
  load_rows<Values, kValueVec, kValuePart, kThreads>(
      values, p.value + first * p.value_token_stride + head * p.value_head_stride,
      p.value_token_stride, left, begin, kValueBytes);
  const float k_scale = scale_of(p.k_scale, p.k_scale_stride, head, p.k_scale_value);
  const float v_scale = scale_of(p.v_scale, p.v_scale_stride, head, p.v_scale_value);
  __syncthreads();

  if (kMayBeAdjacent && thread < kGroups) {
    const i64 start = slots[thread * kGroup];
    bool run = start >= 0 && start % kGroup == 0;
    for (int i = 1; i < kGroup; ++i) run = run && slots[thread * kGroup + i] == start + i;
    adjacent[thread] = run;
  }

#pragma unroll
  for (int i = 0; i < kKeyCount; ++i) {
    const int number = i * kThreads + thread;
    const Item<kKeyPart / kKeyVec> item(number);
    const int at = begin + item.vector * kKeyVec;
    if (number < kTile * (kKeyPart / kKeyVec) && at < kKeyBytes && slots[item.token] >= 0) {
      const Place<kBlockSize> place(slots[item.token]);
      store_vector<kKeyVec>(p.key_cache + place.block * p.key_block_stride +
                                head * p.key_cache_head_stride +
                                at / kPackBytes * p.key_pack_stride +
                                place.offset * p.key_offset_stride + at % kPackBytes,
                            Keys::convert(keys[i], k_scale));
    }
  }

#pragma unroll
  for (int i = 0; i < kValueCount; ++i) {
    const int number = i * kThreads + thread;
    const Item<kValuePart / kValueVec> item(number);
    const int at = item.vector * kValueVec;  // in the part
    if (number < kTile * (kValuePart / kValueVec) && item.token < left &&
        begin + at < kValueBytes) {
      const Elements<kElement, kValueVec> elements(Values::convert(values[i], v_scale));
#pragma unroll
      for (int j = 0; j < kValueVec / kElement; ++j) {
        *reinterpret_cast<Vec<kElement>*>(transposed_bytes +
                                          (at / kElement + j) * (kRowWords * 4) +
                                          item.token * kElement) = elements.part[j];
      }
    }
  }
  __syncthreads();

  const int elements_left = (kValueBytes - begin) / kElement;
  for (int item = thread; item < kValueElements * kGroups; item += kThreads) {
    const int element = item / kGroups;
    const int group = item % kGroups;
    if (element >= elements_left) break;
    const int start = element * kRowWords + group * 4;
    char* const row = p.value_cache + head * p.value_cache_head_stride +
                      (begin / kElement + element) * p.value_element_stride;
    const auto at = [&](i64 slot) {
      const Place<kBlockSize> place(slot);
      const i64 before = kSlots == kBlockSize ? 0 : place.offset / kSlots * p.value_slots_stride;
      return row + place.block * p.value_block_stride + before + place.offset % kSlots * kElement;
    };
    if (kMayBeAdjacent && adjacent[group]) {
      const uint4 vector = {transposed[start], transposed[start + 1], transposed[start + 2],
                            transposed[start + 3]};
      store_vector<16>(at(slots[group * kGroup]), vector);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const i64 slot = slots[group * kGroup + i];
        if (slot < 0) continue;
        *reinterpret_cast<Vec<kElement>*>(at(slot)) =
            *reinterpret_cast<const Vec<kElement>*>(transposed_bytes + start * 4 + i * kElement);
      }
    }
  }
  if (begin == 0) target.report(kSlotMapping, first + thread);
}

}  // namespace cupy_cache
