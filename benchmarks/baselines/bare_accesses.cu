// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// The reads and writes of an operation by kernels that do nothing else: no bounds, no strides, no
// block tables, everything known when compiling. What these take, memory takes.

namespace baselines {

using i64 = long long;
using u32 = unsigned int;

struct Params {
  const uint4* from_0;
  const uint4* from_1;  // of a second array that is moved likewise, if there is one
  uint4* to_0;
  uint4* to_1;
  const i64* slots;  // [rows]
  i64 rows;
};

// Rows of kVectors vectors to their slots; if kGather, from their slots to rows.
template <int kVectors, int kArrays, bool kGather>
__global__ void __launch_bounds__(128) move_rows(const __grid_constant__ Params p) {
  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const u32 row = index / kVectors;
  if (row >= p.rows) return;
  const i64 scattered = p.slots[row] * kVectors + index % kVectors;
  const i64 from = kGather ? scattered : index;
  const i64 to = kGather ? index : scattered;
  const uint4 first = p.from_0[from];
  uint4 second;
  if (kArrays == 2) second = p.from_1[from];
  p.to_0[to] = first;
  if (kArrays == 2) p.to_1[to] = second;
}

// Keys and values of 2-byte elements to x-packed caches: a vector of each for every thread, those of
// one head after those of the other, so that what shares a sector comes soon after one another.
template <int kHeads, int kSize, int kBlockSize>
__global__ void __launch_bounds__(128) write_packed(const __grid_constant__ Params p) {
  constexpr int kVectors = kSize / 8;  // of a head
  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const u32 vector = index % kVectors;
  const u32 row = index / kVectors % static_cast<u32>(p.rows);
  const u32 head = index / kVectors / static_cast<u32>(p.rows);
  if (head >= kHeads) return;
  const i64 from = (static_cast<i64>(row) * kHeads + head) * kVectors + vector;
  const i64 slot = p.slots[row];
  const uint4 key = p.from_0[from], value = p.from_1[from];
  const i64 first = slot / kBlockSize * kHeads + head;  // the head in the slot's block
  const i64 offset = slot % kBlockSize;
  p.to_0[(first * kVectors + vector) * kBlockSize + offset] = key;
  unsigned short elements[8];
  memcpy(elements, &value, sizeof(elements));
  unsigned short* const to = reinterpret_cast<unsigned short*>(p.to_1);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    to[(first * kSize + vector * 8 + i) * kBlockSize + offset] = elements[i];
  }
}

}  // namespace baselines
