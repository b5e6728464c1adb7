// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Writes the entries [kv_c | k_pe] of multi-head latent attention into their slots of caches indexed
// [block, offset, :], for one layer or for many.
//
// blockIdx.y is the layer. A work item is one vector of an entry: consecutive threads take
// consecutive items and several entries share a block, so loads and stores coalesce whatever the
// sizes. The fp8_ds_mla entry, whose scales depend on the values, has a kernel of its own below.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/vec.cuh"
#include "cupy_cache/warp.cuh"

namespace cupy_cache {

constexpr int kMaxLayers = 128;

// Strides are in bytes.
struct Params {
  const char* kv_c;          // [layers, tokens, latent]
  const char* k_pe;          // [layers, tokens, rope]
  char* kv_cache;            // [num_blocks, kBlockSize, latent + rope], or see Caches
  const char* slot_mapping;  // [layers, tokens]
  const char* scale;         // float32 [layers], or null: scale_value is used
  i64 tokens;
  float scale_value;
  u32 unused;
  i64 first_layer;  // the one of blockIdx.y = 0
  i64 kv_c_layer_stride;
  i64 k_pe_layer_stride;
  i64 slot_layer_stride;
  i64 num_blocks;
  i64 kv_c_stride;
  i64 k_pe_stride;
  i64 slot_stride;
  i64 block_stride;
  i64 offset_stride;
  u64 caches[kMaxLayers];
};

constexpr u32 kSlotMapping = 1;

// Where a layer's cache is.
enum class Caches {
  kOne,       // Params::kv_cache; there is one layer
  kTable,     // in Params::caches, by blockIdx.y
  kPointers,  // Params::kv_cache points to the addresses of all layers' caches
};

template <Caches kCaches>
__device__ __forceinline__ char* cache_of(const Params& p, i64 layer) {
  if constexpr (kCaches == Caches::kOne) {
    return p.kv_cache;
  } else if constexpr (kCaches == Caches::kTable) {
    return reinterpret_cast<char*>(p.caches[blockIdx.y]);
  } else {
    return reinterpret_cast<char*>(load_number<i64>(p.kv_cache + layer * 8));
  }
}

// The host chose kVec for the alignment of everything it knows, which addresses that are read on the
// device are not part of.
template <Caches kCaches, int kVec>
__device__ __forceinline__ void store_entry(char* at, const Vec<kVec>& vector, bool when) {
  if (kCaches == Caches::kPointers && reinterpret_cast<u64>(at) % kVec) {
    const Elements<1, kVec> bytes(vector);
#pragma unroll
    for (int i = 0; i < kVec; ++i) store_vector<1>(at + i, bytes.part[i], when);
  } else {
    store_vector<kVec>(at, vector, when);
  }
}

// The address of an entry.
template <int kBlockSize>
__device__ __forceinline__ char* entry_at(const Params& p, char* cache,
                                          const Place<kBlockSize>& place) {
  return cache + place.block * p.block_stride + place.offset * p.offset_stride;
}

// Converter makes vectors of kVec bytes of the cache; kLatentBytes and kRopeBytes are of the cache.
template <typename Converter, Caches kCaches, int kVec, int kLatentBytes, int kRopeBytes,
          int kBlockSize, typename Slot, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    concat_and_cache_mla(const __grid_constant__ Params p) {
  await_earlier_launches();
  if constexpr (kCaches == Caches::kOne) assume_launched_with<kMaxThreads>();
  static_assert(kLatentBytes % kVec == 0 && kRopeBytes % kVec == 0, "whole vectors");
  constexpr int kLatentItems = kLatentBytes / kVec;
  constexpr int kItems = kLatentItems + kRopeBytes / kVec;  // of one entry

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const i64 token = static_cast<i64>(index / kItems);
  const int item = static_cast<int>(index % kItems);
  if (token >= p.tokens) return;
  const i64 layer = kCaches == Caches::kOne ? 0 : p.first_layer + blockIdx.y;

  // The slot and the data are loaded together: only the store has to wait for the slot.
  const i64 slot = load_number<Slot>(p.slot_mapping + layer * p.slot_layer_stride +
                                     token * p.slot_stride);
  char* const cache = cache_of<kCaches>(p, layer);
  // Selected, not branched to: a launch of few tokens takes 0.03 us less on an H100.
  const bool is_latent = item < kLatentItems;
  const char* const from =
      (is_latent ? p.kv_c : p.k_pe) +
      layer * (is_latent ? p.kv_c_layer_stride : p.k_pe_layer_stride) +
      token * (is_latent ? p.kv_c_stride : p.k_pe_stride) +
      (item - (is_latent ? 0 : kLatentItems)) * Converter::kSourceBytes;
  const typename Converter::Source source = Converter::load(from);
  const float scale = scale_of(p.scale, sizeof(float), static_cast<int>(layer), p.scale_value);

  const Target<kBlockSize> target(slot, p.num_blocks);
  store_entry<kCaches, kVec>(entry_at<kBlockSize>(p, cache, target.place()) + item * kVec,
                             Converter::convert(source, scale), target.valid);
  release_next_launch();
  target.report(kSlotMapping, layer * p.tokens + token);
}

#ifdef CUPY_CACHE_CONVERTS

// kBytes bytes, moved in vectors of kVec.
template <int kVec, int kBytes>
struct Run {
  Vec<kVec> parts[kBytes / kVec];

  static __device__ __forceinline__ Run load(const char* at) {
    Run run;
#pragma unroll
    for (int i = 0; i < kBytes / kVec; ++i) run.parts[i] = load_vector<kVec>(at + i * kVec);
    return run;
  }
  __device__ __forceinline__ void store(char* at, bool when) const {
#pragma unroll
    for (int i = 0; i < kBytes / kVec; ++i) store_vector<kVec>(at + i * kVec, parts[i], when);
  }
};

// The scale of a tile whose largest absolute value is `largest`.
template <bool kPowerOfTwo>
__device__ __forceinline__ float tile_scale(float largest) {
  const float wanted = divide(largest, 448.0f);
  if constexpr (kPowerOfTwo) {
    return power_of_two_from(fmaxf(wanted, 1e-4f));
  } else {
    return fmaxf(wanted, 1.17549435e-38f);  // the smallest normal number
  }
}

// An fp8_ds_mla entry of 656 bytes: 512 values as e4m3, in four tiles with a scale each; the four
// scales; 64 elements of 16 bits as they are (zeros where !kRope).
//
// A warp makes an entry. Eight lanes share a tile, 16 values each, and find its largest value by
// shuffles; the first eight copy the rope as well. kVec is the alignment of the sources, kCacheVec
// that of the cache.
template <typename Element, bool kPowerOfTwo, int kVec, int kCacheVec, bool kRope, int kBlockSize,
          typename Slot, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    concat_and_cache_fp8_ds_mla(const __grid_constant__ Params p) {
  await_earlier_launches();
  constexpr int kLanes = 32;
  constexpr int kTileLanes = 8;
  constexpr int kValues = 16;  // of a lane
  constexpr int kScalesAt = kLanes * kValues;
  constexpr int kRopeAt = kScalesAt + kLanes / kTileLanes * 4;
  constexpr int kElement = sizeof(typename Element::Bits);
  using Rope = Run<(kVec < kCacheVec ? kVec : kCacheVec), 16>;

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(index % kLanes);
  const i64 token = static_cast<i64>(index / kLanes);
  if (token >= p.tokens) return;  // the whole warp

  const i64 slot = load_number<Slot>(p.slot_mapping + token * p.slot_stride);
  const auto loaded = Run<kVec, kValues * kElement>::load(p.kv_c + token * p.kv_c_stride +
                                                          lane * (kValues * kElement));
  Rope rope{};
  if (kRope && lane < kTileLanes) rope = Rope::load(p.k_pe + token * p.k_pe_stride + lane * 16);

  // Found before the slot is looked at, so that loads do not wait for it.
  float values[kValues];
  decode_all<Element>(loaded, values);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) largest = fmaxf(largest, fabsf(values[i]));  // NaN loses
  const float scale = tile_scale<kPowerOfTwo>(group_max<kTileLanes>(largest));
  const Target<kBlockSize> target(slot, p.num_blocks);
  char* const entry = entry_at<kBlockSize>(p, p.kv_cache, target.place());
  rope.store(entry + kRopeAt + lane * 16, target.valid && lane < kTileLanes);
  const typename DivideFor<Element, E4M3>::type divide_by_scale(scale);
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = divide_by_scale(values[i]);
  Run<kCacheVec, kValues> stored;
  encode_all<E4M3>(values, stored);
  stored.store(entry + lane * kValues, target.valid);
  Run<(kCacheVec < 4 ? kCacheVec : 4), 4> bytes;
  memcpy(&bytes, &scale, sizeof(scale));
  bytes.store(entry + kScalesAt + lane / kTileLanes * 4, target.valid && lane % kTileLanes == 0);
  target.report(kSlotMapping, token);
  release_next_launch();
}

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
