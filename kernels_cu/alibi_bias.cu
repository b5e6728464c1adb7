// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// The bias of attention with linear biases (ALiBi) for a block of query and key positions.
//
// blockIdx.x walks over the vectors of a row of keys, blockIdx.y over the queries, blockIdx.z over the
// heads: no divisions. What depends on the positions alone is computed once for all heads of a thread.
// Queries and keys may be those of several sequences, one after the other.
#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/sequences.cuh"
#include "cupy_cache/vec.cuh"

namespace cupy_cache {

// The numbers of these arguments in the list of guarded ones.
constexpr u32 kQueryStarts = 1;
constexpr u32 kKeyStarts = 2;

// Strides are in bytes.
struct Params {
  const char* slopes;           // [heads] of float
  const char* query_positions;  // [queries] of Query
  const char* key_positions;    // [keys] of Key
  char* out;                    // [heads, queries, keys] of T, keys contiguous
  const char* query_start_loc;  // [sequences + 1] of QueryStart; not if that is void
  const char* cu_seq_lens;      // [sequences + 1] of KeyStart; likewise
  i64 heads;
  i64 queries;
  i64 keys;
  i64 out_head_stride;
  i64 out_query_stride;
  i64 sequences;
  Even even;  // sequences of the queries
  i64 slope_stride;
  i64 query_stride;
  i64 key_stride;
  u32 causal;  // keys ahead of their query get -infinity
  u32 root;    // the bias grows with the square root of the distance
};

// The keys of a query's sequence, from `begin` to before `end`; none if it belongs to none.
struct Seen {
  i64 begin = 0;
  i64 end = 0;

  __device__ __forceinline__ bool has(i64 key) const { return begin <= key && key < end; }
};

template <typename QueryStart, typename KeyStart>
__device__ __forceinline__ Seen seen_by(const Params& p, i64 query) {
  Seen seen;
  if (p.sequences > 0) {
    const SegmentSearch<QueryStart> search(p.query_start_loc, static_cast<i32>(p.sequences), query,
                                           p.even);
    const i32 sequence = search.right() ? search.guess : search.find().index;
    if (within(sequence, p.sequences)) {
      const char* const bounds = p.cu_seq_lens + sequence * static_cast<i64>(sizeof(KeyStart));
      seen.begin = load_number<KeyStart>(bounds);
      seen.end = load_number<KeyStart>(bounds + sizeof(KeyStart));
    }
  }
  return seen;
}

// T is an element type of elements.cuh; kStoreVec are the bytes of a vector of them. QueryStart and
// KeyStart are void where all is one sequence.
template <typename T, int kStoreVec, typename Query, typename Key, typename QueryStart,
          typename KeyStart, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) alibi_bias(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using Bits = typename T::Bits;
  constexpr int kCount = kStoreVec / static_cast<int>(sizeof(Bits));
  constexpr bool kRagged = !IsVoid<QueryStart>::value;
  const i64 first = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) * kCount;
  if (first >= p.keys) return;
  const i64 left = p.keys - first;  // a row's last vector may be a part of one

  if constexpr (kRagged) {
    if (blockIdx.y == 0 && blockIdx.z == 0) {
      const u32 index = static_cast<u32>(first / kCount);
      const u32 threads = static_cast<u32>((p.keys + kCount - 1) / kCount);
      OrderCheck<QueryStart>(p.query_start_loc, p.sequences, index, threads)
          .report(kQueryStarts, p.queries);
      OrderCheck<KeyStart>(p.cu_seq_lens, p.sequences, index, threads).report(kKeyStarts, p.keys);
    }
  }
  for (i64 query = blockIdx.y; query < p.queries; query += gridDim.y) {
    const i64 query_position = static_cast<i64>(
        *reinterpret_cast<const Query*>(p.query_positions + query * p.query_stride));
    Seen seen;
    if constexpr (kRagged) seen = seen_by<QueryStart, KeyStart>(p, query);
    float offset[kCount] = {};
    u32 masked = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= left) continue;
      const i64 key_position = static_cast<i64>(
          *reinterpret_cast<const Key*>(p.key_positions + (first + i) * p.key_stride));
      // Unsigned, so that positions without sense may wrap round.
      const i64 ahead = static_cast<i64>(static_cast<u64>(key_position) - query_position);
      offset[i] = static_cast<float>(ahead);
      if (p.root) offset[i] = ahead > 0 ? 0.0f : -__fsqrt_rn(fabsf(offset[i]));
      if (p.causal && ahead > 0) masked |= 1u << i;
      if (kRagged && !seen.has(first + i)) masked |= 1u << i;
    }
    for (i64 head = blockIdx.z; head < p.heads; head += gridDim.z) {
      const float slope = *reinterpret_cast<const float*>(p.slopes + head * p.slope_stride);
      Bits bits[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool hidden = masked >> i & 1;
        bits[i] = T::encode(hidden ? __uint_as_float(0xff800000u) : multiply(slope, offset[i]));
      }
      char* at = p.out + head * p.out_head_stride + query * p.out_query_stride +
                 first * static_cast<i64>(sizeof(Bits));
      if (left >= kCount) {
        Vec<kStoreVec> vector;
        memcpy(&vector, bits, sizeof(vector));  // becomes register moves
        *reinterpret_cast<Vec<kStoreVec>*>(at) = vector;
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (i < left) reinterpret_cast<Bits*>(at)[i] = bits[i];
        }
      }
    }
  }
}

}  // namespace cupy_cache
