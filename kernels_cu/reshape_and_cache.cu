// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Writes tokens into an x-packed cache: keys [block, head, d / x, offset, d % x], values
// [block, head, d, offset] or, interleaved, [block, head, offset / x, d, offset % x].
//
// A thread block takes kTile tokens of one head; values are transposed through shared memory. Where
// a group of 16 bytes' worth of slots is consecutive and aligned, its values leave as 16-byte
// vectors along the offset; elsewhere element by element, which costs a whole memory sector for
// each. What is converted is converted before the transposition.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
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
  i64 heads;
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
  float k_scale_value;
  float v_scale_value;
};

constexpr u32 kSlotMapping = 1;
constexpr int kTile = 16;         // tokens of a thread block
constexpr int kChunkBytes = 512;  // of a token's head in the cache that are in flight at a time
constexpr i64 kSkip = -1;

__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Which token of the tile, and which of its row's kVectors vectors, an item is. Where it can be, a
// warp takes 4 tokens by 8 vectors, so that loads and stores both are runs of 64 bytes and more: on
// an H100 1 to 3 % faster with consecutive slots, 5 % with random ones, than 16 tokens by 2.
template <int kVectors>
struct Item {
  int token;
  int vector;

  __device__ __forceinline__ explicit Item(int item) {
    if constexpr (kVectors % 8 == 0) {
      token = (item & 3) | (item >> 5 & 3) << 2;
      vector = (item >> 2 & 7) | item >> 7 << 3;
    } else {
      token = item % kTile;
      vector = item / kTile;
    }
  }
};

// Whether there are many tokens, and neighbours have slots that are none. Then one head comes after
// the other: elements of one sector that are written by several thread blocks meet in the L2. Else a
// tile's heads come together, because they are neighbours in all arrays.
template <typename Slot>
__device__ __forceinline__ bool many_apart(const Params& p) {
  constexpr i64 kMany = 8192;
  if (p.tokens < kMany) return false;
  const auto slot = [&](i64 token) {
    return static_cast<i64>(
        *reinterpret_cast<const Slot*>(p.slot_mapping + token * p.slot_stride));
  };
  const i64 middle = p.tokens / 2;
  return slot(0) + 1 != slot(1) && slot(middle) + 1 != slot(middle + 1);
}

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
// kVectorValues says that the value cache's address and strides allow 16-byte stores.
template <typename Keys, typename Values, int kElement, int kPackBytes, int kKeyVec, int kValueVec,
          int kKeyBytes, int kValueBytes, int kBlockSize, int kSlots, bool kVectorValues,
          typename Slot, int kThreads>
__global__ void __launch_bounds__(kThreads)
    reshape_and_cache(const __grid_constant__ Params p) {
  static_assert(kKeyBytes % kPackBytes == 0 && kPackBytes % kKeyVec == 0, "whole packs");
  static_assert(kBlockSize % kSlots == 0, "whole groups of slots");
  constexpr int kKeyChunk = smaller(kKeyBytes, kChunkBytes);
  constexpr int kValueChunk = smaller(kValueBytes, kChunkBytes);
  constexpr int kKeyCount = (kTile * (kKeyChunk / kKeyVec) + kThreads - 1) / kThreads;
  constexpr int kValueCount = (kTile * (kValueChunk / kValueVec) + kThreads - 1) / kThreads;
  constexpr int kLargest = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;

  // Values, transposed. An odd number of words in a row spreads both accesses over all banks;
  // elements of 8 bytes must stay aligned.
  constexpr int kRowWords = kTile * kElement / 4 + (kElement > 4 ? kElement / 4 : 1);
  constexpr int kValueElements = kValueChunk / kElement;
  __shared__ u32 transposed[kValueElements * kRowWords];
  char* const transposed_bytes = reinterpret_cast<char*>(transposed);

  constexpr int kGroup = 16 / kElement;  // slots of a 16-byte vector
  constexpr int kGroups = kTile / kGroup;
  constexpr bool kMayBeAdjacent = kVectorValues && kSlots % kGroup == 0;
  __shared__ i64 slots[kTile];
  __shared__ bool adjacent[kGroups];

  const u32 heads = static_cast<u32>(p.heads), tiles = gridDim.x / heads;
  const bool by_head = many_apart<Slot>(p);
  const u32 tile = by_head ? blockIdx.x % tiles : blockIdx.x / heads;
  const int head = static_cast<int>(by_head ? blockIdx.x / tiles : blockIdx.x % heads);
  const i64 first = static_cast<i64>(tile) * kTile;
  const i64 left = p.tokens - first;
  const char* key = p.key + first * p.key_token_stride + head * p.key_head_stride;
  const char* value = p.value + first * p.value_token_stride + head * p.value_head_stride;
  const float k_scale = scale_of(p.k_scale, p.k_scale_stride, head, p.k_scale_value);
  const float v_scale = scale_of(p.v_scale, p.v_scale_stride, head, p.v_scale_value);

  if (threadIdx.x < kTile) {
    const int token = threadIdx.x;
    i64 slot = kSkip;
    if (token < left) {
      slot = static_cast<i64>(
          *reinterpret_cast<const Slot*>(p.slot_mapping + (first + token) * p.slot_stride));
      if (slot < 0 || !in_bounds(slot, p.num_blocks * kBlockSize, kSlotMapping, first + token)) {
        slot = kSkip;
      }
    }
    slots[token] = slot;
  }

  for (int begin = 0; begin < kLargest; begin += kChunkBytes) {
    typename Keys::Source keys[kKeyCount];
    typename Values::Source values[kValueCount];
    load_rows<Keys, kKeyVec, kKeyChunk, kThreads>(keys, key, p.key_token_stride, left, begin,
                                                  kKeyBytes);
    load_rows<Values, kValueVec, kValueChunk, kThreads>(values, value, p.value_token_stride, left,
                                                        begin, kValueBytes);
    __syncthreads();  // slots are there; the last chunk's values have been read

    if (kMayBeAdjacent && begin == 0 && threadIdx.x < kGroups) {
      const i64 start = slots[threadIdx.x * kGroup];
      bool run = start >= 0 && start % kGroup == 0;
      for (int i = 1; i < kGroup; ++i) run = run && slots[threadIdx.x * kGroup + i] == start + i;
      adjacent[threadIdx.x] = run;
    }

#pragma unroll
    for (int i = 0; i < kKeyCount; ++i) {
      const int number = i * kThreads + static_cast<int>(threadIdx.x);
      const Item<kKeyChunk / kKeyVec> item(number);
      const int at = begin + item.vector * kKeyVec;
      if (number < kTile * (kKeyChunk / kKeyVec) && at < kKeyBytes && slots[item.token] >= 0) {
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
      const int number = i * kThreads + static_cast<int>(threadIdx.x);
      const Item<kValueChunk / kValueVec> item(number);
      const int at = item.vector * kValueVec;  // in the chunk
      if (number < kTile * (kValueChunk / kValueVec) && item.token < left &&
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
    for (int item = threadIdx.x; item < kValueElements * kGroups; item += kThreads) {
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
  }
}

}  // namespace cupy_cache
