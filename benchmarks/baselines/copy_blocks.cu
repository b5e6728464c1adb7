// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Copies blocks of all layers' key and value caches, with the founding optimisations as switches:
//   kUploaded  pointers and pairs are read from device memory that the host filled beforehand,
//              instead of from the parameters
//   kMerged    keys and values in one loop, loads of both before the stores; else two loops
//   Element    what one thread moves per iteration: uint4 (16 bytes) or unsigned short (2 bytes)
// The block size is whatever the launch says. Everything else is the same in all versions: the grid
// is (chunk, pair, layer), and a chunk is 16 bytes for each thread of the block.

namespace baselines {

using i64 = long long;
using u64 = unsigned long long;
using u32 = unsigned int;

constexpr int kTableWords = 480;

struct Params {
  i64 block_bytes;
  const u64* key_caches;    // [layers], if kUploaded
  const u64* value_caches;  // [layers], if kUploaded
  const i64* mapping;       // [pairs, 2], if kUploaded
  // Else: each layer's key and value cache, then each pair, source in the low half.
  u64 table[kTableWords];
};

template <typename Element>
__device__ __forceinline__ void copy_one(const Element* from, Element* to, u32 i) {
  __stcs(to + i, __ldcs(from + i));
}

template <bool kUploaded, bool kMerged, typename Element>
__global__ void copy_blocks(const __grid_constant__ Params p) {
  const u32 chunk = blockIdx.x, pair = blockIdx.y, layer = blockIdx.z, layers = gridDim.z;
  u64 keys, values;
  i64 from, to;
  if constexpr (kUploaded) {
    keys = p.key_caches[layer];
    values = p.value_caches[layer];
    from = p.mapping[2 * pair];
    to = p.mapping[2 * pair + 1];
  } else {
    keys = p.table[2 * layer];
    values = p.table[2 * layer + 1];
    const u64 packed = p.table[2 * layers + pair];
    from = static_cast<i64>(packed & 0xffffffffu);
    to = static_cast<i64>(packed >> 32);
  }
  const u32 chunk_bytes = blockDim.x * 16;
  const i64 first = static_cast<i64>(chunk) * chunk_bytes;
  const i64 left = p.block_bytes - first;
  const u32 count = static_cast<u32>(left < chunk_bytes ? left : chunk_bytes) / sizeof(Element);
  from = from * p.block_bytes + first;
  to = to * p.block_bytes + first;
  const Element* key_from = reinterpret_cast<const Element*>(keys + from);
  const Element* value_from = reinterpret_cast<const Element*>(values + from);
  Element* key_to = reinterpret_cast<Element*>(keys + to);
  Element* value_to = reinterpret_cast<Element*>(values + to);
  if constexpr (kMerged) {
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
      const Element key = __ldcs(key_from + i);
      const Element value = __ldcs(value_from + i);
      __stcs(key_to + i, key);
      __stcs(value_to + i, value);
    }
  } else {
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) copy_one(key_from, key_to, i);
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) copy_one(value_from, value_to, i);
  }
}

}  // namespace baselines
