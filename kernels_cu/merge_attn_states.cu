// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Merges two attentions of the same queries, to different tokens, into the attention to all of them.
//
// kLanes neighbouring lanes take a head of a token: each reads both logarithms and its vectors of both
// sides, all under way together. The merged logarithm is written when all of them have read, so that
// it may take a side's place; so may the merged rows. Groups never straddle a warp, and leave as a
// whole.
#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/vec.cuh"
#include "cupy_cache/warp.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  char* output;               // [tokens, kHeads, a head] of T
  const char* prefix_output;  // likewise
  const char* prefix_lse;     // [kHeads, tokens] of float
  const char* suffix_output;
  const char* suffix_lse;
  char* output_lse;  // or null
  i64 tokens;
  i64 prefix_lse_head_stride;
  i64 suffix_lse_head_stride;
  i64 output_lse_head_stride;
  i64 output_token_stride;
  i64 output_head_stride;
  i64 prefix_token_stride;
  i64 prefix_head_stride;
  i64 suffix_token_stride;
  i64 suffix_head_stride;
  i64 prefix_lse_token_stride;
  i64 suffix_lse_token_stride;
  i64 output_lse_token_stride;
};

// An attention to no tokens has the logarithm -infinity. +infinity stands for it too.
__device__ __forceinline__ float known_logarithm(float lse) {
  return lse == __uint_as_float(0x7f800000u) ? -lse : lse;
}

constexpr int kMostHeld = 4;  // vectors of each side, that a thread holds

// T is an element type of elements.cuh. A head is kVectors vectors of kVec bytes.
template <typename T, int kVec, int kVectors, int kLanes, int kHeads, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads)
    merge_attn_states(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using Bits = typename T::Bits;
  constexpr int kCount = kVec / static_cast<int>(sizeof(Bits));
  constexpr int kRounds = (kVectors + kLanes - 1) / kLanes;
  constexpr int kHeld = kRounds < kMostHeld ? kRounds : kMostHeld;
  const float nothing = __uint_as_float(0xff800000u);  // -infinity

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const int lane = static_cast<int>(index % kLanes);
  const int head = static_cast<int>(index / kLanes % kHeads);
  const i64 token = static_cast<i64>(index / (kLanes * kHeads));
  if (token >= p.tokens) return;

  const float prefix_lse = known_logarithm(*reinterpret_cast<const float*>(
      p.prefix_lse + head * p.prefix_lse_head_stride + token * p.prefix_lse_token_stride));
  const float suffix_lse = known_logarithm(*reinterpret_cast<const float*>(
      p.suffix_lse + head * p.suffix_lse_head_stride + token * p.suffix_lse_token_stride));
  const char* const prefix =
      p.prefix_output + token * p.prefix_token_stride + head * p.prefix_head_stride;
  const char* const suffix =
      p.suffix_output + token * p.suffix_token_stride + head * p.suffix_head_stride;
  Vec<kVec> prefixes[kHeld], suffixes[kHeld];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = first + i * kLanes;
      if (kVectors % (kLanes * kHeld) == 0 || vector < kVectors) {
        prefixes[i] = load_vector<kVec>(prefix + vector * kVec);
        suffixes[i] = load_vector<kVec>(suffix + vector * kVec);
      }
    }
  };
  load(lane);  // with the logarithms

  // A NaN on either side is kept: fmaxf would pass over it.
  const bool later = !(prefix_lse >= suffix_lse);
  const float largest = later ? suffix_lse : prefix_lse;
  const bool none = prefix_lse == nothing && suffix_lse == nothing;
  float prefix_weight = none ? 1.0f : expf(prefix_lse - largest);
  float suffix_weight = none ? 0.0f : expf(suffix_lse - largest);
  const float sum = prefix_weight + suffix_weight;
  prefix_weight = divide(prefix_weight, sum);
  suffix_weight = divide(suffix_weight, sum);

  char* const output = p.output + token * p.output_token_stride + head * p.output_head_stride;
  const auto store = [&](int first) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int vector = first + i * kLanes;
      const Elements<static_cast<int>(sizeof(Bits)), kVec> one(prefixes[i]), other(suffixes[i]);
      Bits bits[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        // What weighs nothing may be anything, and zero times that is not always zero.
        const float a = prefix_weight == 0.0f ? 0.0f : T::decode(one.part[j]);
        const float b = suffix_weight == 0.0f ? 0.0f : T::decode(other.part[j]);
        bits[j] = none ? one.part[j] : T::encode(fmaf(a, prefix_weight, b * suffix_weight));
      }
      Vec<kVec> merged;
      memcpy(&merged, bits, sizeof(merged));  // becomes register moves
      store_vector<kVec>(output + vector * kVec, merged, vector < kVectors);
    }
  };
  store(lane);
  for (int first = lane + kLanes * kHeld; first < kVectors; first += kLanes * kHeld) {
    load(first);
    store(first);
  }
  __syncwarp(group_lanes<kLanes>());
  if (p.output_lse && lane == 0) {
    *reinterpret_cast<float*>(p.output_lse + head * p.output_lse_head_stride +
                              token * p.output_lse_token_stride) =
        none ? nothing : logf(sum) + largest;
  }
}

}  // namespace cupy_cache
