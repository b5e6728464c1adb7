// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Values of an x-packed cache, [block, head, d, offset] or, interleaved, [block, head, offset / x,
// d, offset % x]: a token's elements do not lie together there, those of consecutive slots do.
//
// A thread block takes a part of one head of kTile tokens and transposes it through shared memory.
// Where a group of 16 bytes' worth of slots is consecutive and aligned, its values leave as 16-byte
// vectors along the offset; elsewhere element by element, which costs a whole memory sector for
// each. What is converted is converted before the transposition.
#pragma once

#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

constexpr int kTile = 16;        // tokens of a thread block
constexpr int kPartBytes = 128;  // of a head, that it takes
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

// Which tile, and which part of its heads, a thread block takes.
//
// The parts of a tile come together, because they are neighbours in all arrays. But where there are
// many tokens, and neighbours have slots that are none, all tiles come before the next part:
// elements of one sector that are written by several thread blocks meet in the L2.
struct Work {
  u32 tile;
  u32 part;

  // Of thread blocks that are numbered tile by tile, `parts` for each.
  template <typename Slot>
  static __device__ __forceinline__ Work of_block(u32 tile, u32 part, u32 tiles, u32 parts,
                                                  const char* slot_mapping, i64 slot_stride,
                                                  i64 tokens) {
    constexpr i64 kMany = 8192;
    if (tokens < kMany || static_cast<u64>(tiles) * parts > 0xffffffffu) return {tile, part};
    const auto slot = [&](i64 token) {
      return load_number<Slot>(slot_mapping + token * slot_stride);
    };
    const i64 middle = tokens / 2;
    const i64 a = slot(0), behind_a = slot(1), b = slot(middle), behind_b = slot(middle + 1);
    const auto follows = [](i64 next, i64 one) {  // unsigned, because slots may be anything
      return static_cast<u64>(next) - static_cast<u64>(one) == 1;
    };
    if (follows(behind_a, a) || follows(behind_b, b)) return {tile, part};
    const u32 block = tile * parts + part;
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

// Where a head's values are in the cache. Strides are in bytes.
struct ValuePlaces {
  char* head;
  i64 block_stride;
  i64 slots_stride;
  i64 element_stride;
};

// What a thread holds of the values of a tile's part of a head: Values, a converter, makes vectors of
// kVec bytes of the cache of them, of which a head has kBytes. kElement is the bytes of an element
// there, and kSlots the slots that lie together. kVectorValues says that the cache's address and
// strides allow 16-byte stores.
template <typename Values, int kElement, int kVec, int kBytes, int kBlockSize, int kSlots,
          bool kVectorValues, int kThreads>
struct Transposed {
  static_assert(kBlockSize % kSlots == 0, "whole groups of slots");
  static_assert(kPartBytes % 16 == 0, "whole vectors");
  static constexpr int kPart = smaller(kBytes, kPartBytes);
  static constexpr int kCount = (kTile * (kPart / kVec) + kThreads - 1) / kThreads;
  static constexpr int kElements = kPart / kElement;
  // An odd number of words in a row spreads both accesses over all banks; elements of 8 bytes must
  // stay aligned.
  static constexpr int kRowWords = kTile * kElement / 4 + (kElement > 4 ? kElement / 4 : 1);
  static constexpr int kGroup = 16 / kElement;  // slots of a 16-byte vector
  static constexpr int kGroups = kTile / kGroup;
  static constexpr bool kMayBeAdjacent = kVectorValues && kSlots % kGroup == 0;

  struct Shared {
    alignas(16) u32 words[kElements * kRowWords];
    i64 slots[kTile];  // kSkip where nothing is written
    bool adjacent[kGroups];
  };

  typename Values::Source held[kCount];

  // Of the rows at `base`, of which there are `left`, from byte `begin` of the cache's on.
  __device__ __forceinline__ void load(const char* base, i64 token_stride, i64 left, int begin) {
    load_rows<Values, kVec, kPart, kThreads>(held, base, token_stride, left, begin, kBytes);
  }

  // Behind a barrier that follows the writing of the slots.
  static __device__ __forceinline__ void find_adjacent(Shared& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    if (kMayBeAdjacent && thread < kGroups) {
      const i64 start = shared.slots[thread * kGroup];
      bool run = start >= 0 && start % kGroup == 0;
      for (int i = 1; i < kGroup; ++i) run = run && shared.slots[thread * kGroup + i] == start + i;
      shared.adjacent[thread] = run;
    }
  }

  __device__ __forceinline__ void transpose(Shared& shared, i64 left, int begin,
                                            float scale) const {
    char* const bytes = reinterpret_cast<char*>(shared.words);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int number = i * kThreads + static_cast<int>(threadIdx.x);
      const Item<kPart / kVec> item(number);
      const int at = item.vector * kVec;  // in the part
      if (number < kTile * (kPart / kVec) && item.token < left && begin + at < kBytes) {
        const Elements<kElement, kVec> elements(Values::convert(held[i], scale));
#pragma unroll
        for (int j = 0; j < kVec / kElement; ++j) {
          *reinterpret_cast<Vec<kElement>*>(bytes + (at / kElement + j) * (kRowWords * 4) +
                                            item.token * kElement) = elements.part[j];
        }
      }
    }
  }

  // Behind another barrier.
  static __device__ __forceinline__ void store(const Shared& shared, const ValuePlaces& places,
                                               int begin) {
    const char* const bytes = reinterpret_cast<const char*>(shared.words);
    const int elements_left = (kBytes - begin) / kElement;
    for (int item = static_cast<int>(threadIdx.x); item < kElements * kGroups; item += kThreads) {
      const int element = item / kGroups;
      const int group = item % kGroups;
      if (element >= elements_left) break;
      const int start = element * kRowWords + group * 4;
      char* const row = places.head + (begin / kElement + element) * places.element_stride;
      const auto at = [&](i64 slot) {
        const Place<kBlockSize> place(slot);
        const i64 before =
            kSlots == kBlockSize ? 0 : place.offset / kSlots * places.slots_stride;
        return row + place.block * places.block_stride + before + place.offset % kSlots * kElement;
      };
      if (kMayBeAdjacent && shared.adjacent[group]) {
        const uint4 vector = {shared.words[start], shared.words[start + 1],
                              shared.words[start + 2], shared.words[start + 3]};
        store_vector<16>(at(shared.slots[group * kGroup]), vector);
      } else {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const i64 slot = shared.slots[group * kGroup + i];
          if (slot < 0) continue;
          *reinterpret_cast<Vec<kElement>*>(at(slot)) =
              *reinterpret_cast<const Vec<kElement>*>(bytes + start * 4 + i * kElement);
        }
      }
    }
  }
};

}  // namespace cupy_cache
