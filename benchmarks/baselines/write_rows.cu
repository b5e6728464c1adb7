// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Writes rows of keys and of values into their slots. One thread moves one 16-byte vector of both;
// consecutive threads take consecutive vectors. The block size is whatever the launch says, which
// is the only difference between the versions compared.

namespace baselines {

using i64 = long long;
using u64 = unsigned long long;

struct Params {
  const uint4* key;    // [tokens, kVectors]
  const uint4* value;  // [tokens, kVectors]
  uint4* key_cache;    // [num_slots, kVectors]
  uint4* value_cache;  // [num_slots, kVectors]
  const i64* slot_mapping;
  i64 tokens;
  i64 num_slots;
};

template <int kVectors>
__global__ void write_rows(const __grid_constant__ Params p) {
  const u64 index = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 token = static_cast<i64>(index / kVectors);
  const int item = static_cast<int>(index % kVectors);
  if (token >= p.tokens) return;
  const i64 slot = p.slot_mapping[token];
  const i64 from = token * kVectors + item;
  const uint4 key = __ldcs(p.key + from);
  const uint4 value = __ldcs(p.value + from);
  if (slot < 0 || slot >= p.num_slots) return;
  const i64 to = slot * kVectors + item;
  __stcs(p.key_cache + to, key);
  __stcs(p.value_cache + to, value);
}

}  // namespace baselines
