// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Quantises the keys of a sparse-attention indexer and writes them, with their scales, into their
// slots of a cache whose blocks hold first the keys of all slots, then the scales of all slots.
//
// A quant block is kQuantBlock elements of a key with one scale. kLanes neighbouring lanes share it:
// each loads its vectors, a shuffle finds the largest value, and the same registers are converted.
// Groups never straddle a warp, and leave as a whole.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"
#include "cupy_cache/warp.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* k;             // [tokens, head size]
  char* kv_cache;            // [num_blocks], blocks as below
  const char* slot_mapping;  // [tokens] of Slot
  i64 tokens;
  i64 num_blocks;
  i64 slot_stride;
  i64 k_stride;
  i64 block_stride;
};

constexpr u32 kSlotMapping = 1;

// How four bytes hold a scale.
enum class Scales {
  kFloat32,
  kPowerOfTwo,  // a float32 whose mantissa is zero
  kExponents,   // its biased exponent, in each of the four
};

#ifdef CUPY_CACHE_CONVERTS

// A block of the cache is [kBlockSize, kQuantBlocks, kQuantBlock] of E4M3, then
// [kBlockSize, kQuantBlocks] of four bytes. kVec elements are converted at a time; kScaleVec is the
// alignment of the scales.
template <typename Element, Scales kScales, int kVec, int kScaleVec, int kQuantBlock,
          int kQuantBlocks, int kLanes, int kBlockSize, typename Slot, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    indexer_k_quant_and_cache(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  static_assert(kQuantBlock % kVec == 0, "whole vectors");
  using Converter = Quantise<Element, E4M3, kVec>;
  constexpr int kVectors = kQuantBlock / kVec;
  constexpr int kHeld = (kVectors + kLanes - 1) / kLanes;
  constexpr i64 kScalesAt = static_cast<i64>(kBlockSize) * kQuantBlocks * kQuantBlock;

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(index % kLanes);
  const int quant_block = static_cast<int>(index / kLanes % kQuantBlocks);
  const i64 token = static_cast<i64>(index / (kLanes * kQuantBlocks));
  if (token >= p.tokens) return;

  // The slot and the data are loaded together: only the stores have to wait for the slot.
  const i64 slot = load_number<Slot>(p.slot_mapping + token * p.slot_stride);
  const char* const from =
      p.k + token * p.k_stride + quant_block * (kVectors * Converter::kSourceBytes);
  typename Converter::Source held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = lane + i * kLanes;
    if (kVectors % kLanes == 0 || vector < kVectors) {
      held[i] = Converter::load(from + vector * Converter::kSourceBytes);
    }
  }

  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (kVectors % kLanes == 0 || lane + i * kLanes < kVectors) {
      float values[Converter::kElements];
      decode_all<Element>(held[i], values);
#pragma unroll
      for (float value : values) largest = fmaxf(largest, fabsf(value));  // passes over NaN
    }
  }
  largest = group_max<kLanes>(largest);
  float scale = divide(fmaxf(largest, 1e-4f), 448.0f);
  if (kScales != Scales::kFloat32) scale = power_of_two_from(scale);

  const Target<kBlockSize> target(slot, p.num_blocks);
  const Place<kBlockSize> place = target.place();
  char* const block = p.kv_cache + place.block * p.block_stride;
  const i64 at = static_cast<i64>(place.offset) * kQuantBlocks + quant_block;  // in quant blocks
  char* const to = block + at * kQuantBlock;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int vector = lane + i * kLanes;
    if (kVectors % kLanes == 0 || vector < kVectors) {
      store_vector<kVec>(to + vector * kVec, Converter::convert(held[i], scale), target.valid);
    }
  }
  u32 bits = __float_as_uint(scale);
  if (kScales == Scales::kExponents) bits = (bits >> 23) * 0x01010101u;
  const Elements<kScaleVec, 4> parts(bits);
#pragma unroll
  for (int i = 0; i < 4 / kScaleVec; ++i) {
    store_vector<kScaleVec>(block + kScalesAt + at * 4 + i * kScaleVec, parts.part[i],
                            target.valid && lane == 0);
  }
  target.report(kSlotMapping, token);
}

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
