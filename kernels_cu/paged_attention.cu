// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Attention of queries over the keys and values in a paged cache, in one launch.
//
// A unit of work is a number of rows: query heads that share a KV head, of one or several neighbouring
// tokens of one sequence. The keys that it sees are cut into tiles of 16, and these into at most
// kMaxParts parts, by their number alone. Of up to 16 rows, the warps of a thread block take the tiles
// of a part in turns, and each works by itself: it copies its tiles to shared memory ahead of use and
// has a running maximum, a sum and an output of its own. Of more, each warp copies tiles likewise, but
// takes all of them for 16 of the rows. At the end of a part its results are joined to what the same
// warp had of the parts before, and at the end of all parts those of warps with the same rows are.
//
// So it does not matter to any bit of the result whether one block takes the parts one after the other
// or each of a cluster's blocks takes one: the host may choose by how much there is to do. Nor does it
// matter what else is in the batch.
#include "cupy_cache/async.cuh"
#include "cupy_cache/cluster.cuh"
#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/matrix.cuh"
#include "cupy_cache/operands.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/softmax.cuh"

namespace cupy_cache {

// Strides are in bytes. A cache is told by the strides of its blocks and KV heads, and of two more
// things. Of keys, and of values unless kByToken: of slots, and of packs of a head's elements, of which
// most caches have one. Else of a head's elements, and of packs of neighbouring slots.
struct Params {
  const char* query;            // [tokens, heads, kKeySize]
  const char* key_cache;        // [num_blocks, block_size, kv_heads, kKeySize] in any order
  const char* value_cache;      // likewise, kValueSize
  const char* block_table;      // [sequences, table_width]
  const char* seq_lens;         // [sequences]
  const char* query_start_loc;  // [sequences + 1]; where Start is void each has one token
  const char* alibi_slopes;     // float32 [heads], or null
  const char* sinks;            // [heads], or null
  const char* k_scale;          // float32, one or one for each KV head; or null: k_scale_value
  const char* v_scale;
  char* out;  // [tokens, heads, kValueSize]
  char* lse;  // float32 [tokens, heads], or null
  const char* k_scale_cache;  // float32 [num_blocks, block_size, kv_heads] in any order, or null
  const char* v_scale_cache;
  const char* sequence_slopes;  // float32 [sequences, heads], where there are no alibi_slopes
  i64 tokens;
  i64 sequences;
  i64 table_width;
  i64 table_stride;
  i64 window;  // keys that a query sees, its own included
  float scale;
  float soft_cap;
  float k_scale_value;
  float v_scale_value;
  i64 num_blocks;
  i64 query_stride;
  i64 query_head_stride;
  i64 out_stride;
  i64 out_head_stride;
  i64 lse_stride;
  i64 lse_head_stride;
  i64 key_block_stride;
  i64 key_head_stride;
  i64 key_slot_stride;
  i64 key_pack_stride;
  i64 value_block_stride;
  i64 value_head_stride;
  i64 value_slot_stride;  // kByToken: of elements
  i64 value_pack_stride;
  i64 slope_stride;
  i64 slope_sequence_stride;  // 0 where they are those of all sequences
  i64 sink_stride;
  i64 k_scale_stride;  // 0 where there is one for all heads
  i64 v_scale_stride;
  i64 k_scale_block_stride;  // of k_scale_cache
  i64 k_scale_slot_stride;
  i64 k_scale_head_stride;
  i64 v_scale_block_stride;
  i64 v_scale_slot_stride;
  i64 v_scale_head_stride;
  float base_scale;  // what `scale` is multiplied with
  u32 block_size;
  u32 kv_heads;
  u32 group;       // query heads of a KV head
  u32 row_tokens;  // tokens of a unit
  u32 head_parts;  // units that a token's group is cut into
  u32 causal;
  u32 float_sinks;  // they are float32, else of the query's type
  u32 key_pack;     // bytes
  u32 value_pack;   // bytes
  u32 pairs_in;     // the query's elements can be read in pairs
  u32 pairs_out;    // the output's can be written in pairs
};

constexpr u32 kBlockTable = 1, kSeqLens = 2, kQueryStartLoc = 3;  // numbers of guarded arguments

constexpr int kWide = 64;  // the most rows of a unit, where it may have more than one tile of rows
constexpr int kKeys = 16;   // of a tile of keys
constexpr int kWarps = 4;   // of a thread block
constexpr int kMaxParts = 8;
constexpr int kSorted = 32 * kWarps;
// Rows of kBytes bytes in shared memory: an odd number of 16-byte chunks apart, so that eight rows of a
// matrix lie in different banks.
template <int kTileRows, int kBytes>
struct Tile {
  static constexpr int kChunks = kBytes / 16;  // of a row
  static constexpr int kRowBytes = (kChunks | 1) * 16;
  static constexpr int kSize = kTileRows * kRowBytes;
};

// Which queries a unit has.
struct Unit {
  i64 sequence;
  i64 token;        // the first one's row in query and out
  i32 tokens;       // of this unit
  i64 position;     // the first one's in its sequence
  i64 length;       // of the sequence
  bool any = false;
};

// A sequence, and where its rows of the query begin and end.
struct Span {
  i64 sequence = -1;  // none
  i64 start, end;

  // Takes this sequence if its units include the one of this index. Sequence s has those from
  // start / row_tokens + s on: enough for any start inside a unit.
  __device__ __forceinline__ void take(const Params& p, i64 index, i64 other, i64 from, i64 to) {
    const i64 behind = (index - other) * p.row_tokens;
    if (other <= index && from < behind + p.row_tokens && to >= behind) {
      sequence = other, start = from, end = to;
    }
  }
};

// The same where some start is below an earlier one or outside the query: it counts as the nearest that
// is neither, and is recorded. All starts are read by each thread.
template <typename Start>
__device__ __forceinline__ Span find_span_of_odd(const Params& p, i64 index) {
  Span span;
  i64 before = 0;
  for (i64 s = 0; s <= p.sequences; ++s) {
    const i64 found = load_number<Start>(p.query_start_loc + s * static_cast<i64>(sizeof(Start)));
    const i64 start = found < before ? before : found > p.tokens ? p.tokens : found;
    if (start != found && threadIdx.x == 0) record_fault(kQueryStartLoc, s, found, p.tokens + 1);
    if (s > 0) span.take(p, index, s - 1, before, start);
    before = start;
  }
  return span;
}

// The sequence that the unit of this index belongs to. `found` is shared memory for a Span of each warp
// and a number of each, free again when this returns.
template <typename Start>
__device__ __forceinline__ Span find_span(const Params& p, i64 index, Span* found) {
  u32* const what = reinterpret_cast<u32*>(found + kWarps);  // of a warp: 1, it has one; 2, one is odd
  const i64 most = index < p.sequences - 1 ? index : p.sequences - 1;
  Span span;
  bool odd = false;
  for (i64 s = threadIdx.x; s <= most; s += kWarps * 32) {
    const char* const at = p.query_start_loc + s * static_cast<i64>(sizeof(Start));
    const i64 start = load_number<Start>(at), end = load_number<Start>(at + sizeof(Start));
    odd |= start < 0 || end < start || end > p.tokens;
    span.take(p, index, s, start, end);
  }
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 holders = __ballot_sync(kWarp, span.sequence >= 0), odds = __ballot_sync(kWarp, odd);
  if (holders != 0 && lane == static_cast<u32>(__ffs(static_cast<int>(holders)) - 1)) {
    found[warp] = span;
  }
  if (lane == 0) what[warp] = (holders != 0 ? 1u : 0u) | (odds != 0 ? 2u : 0u);
  __syncthreads();
  span.sequence = -1;
  u32 all = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (what[i] & 1) span = found[i];
    all |= what[i];
  }
  __syncthreads();
  return all & 2 ? find_span_of_odd<Start>(p, index) : span;
}

// `shared` is what find_span needs.
template <typename Length, typename Start>
__device__ __forceinline__ Unit find_unit(const Params& p, i64 index, char* shared) {
  Unit unit;
  i64 count = 1, first = 0;
  if constexpr (IsVoid<Start>::value) {
    unit.sequence = unit.token = index;
  } else {
    const Span span = find_span<Start>(p, index, reinterpret_cast<Span*>(shared));
    if (span.sequence < 0) return unit;
    unit.sequence = span.sequence;
    count = span.end - span.start;
    first = (index - (span.start / p.row_tokens + span.sequence)) * p.row_tokens;
    unit.token = span.start + first;
    if (first >= count) return unit;
  }
  unit.tokens = static_cast<i32>(count - first < p.row_tokens ? count - first : p.row_tokens);
  const i64 length = load_number<Length>(p.seq_lens + unit.sequence * static_cast<i64>(sizeof(Length)));
  constexpr i64 kLongest = 0x7fffff00;  // keys have 32-bit numbers
  const i64 in_table = p.table_width * p.block_size;
  const i64 most = in_table < kLongest ? in_table : kLongest;
  unit.length = length < 0 ? 0 : length > most ? most : length;
  if (unit.length != length && threadIdx.x == 0) {
    record_fault(kSeqLens, unit.sequence, length, most + 1);
  }
  unit.position = unit.length - count + first;
  unit.any = true;
  return unit;
}

// The sequence that comes at this place if the longest is first, so that none is begun late. `keys` is
// shared memory for kSorted + 1 numbers, free again when this returns.
template <typename Length>
__device__ __forceinline__ i64 sequence_by_length(const Params& p, u32 place, u32* keys) {
  const u32 count = static_cast<u32>(p.sequences), index = threadIdx.x;
  static_assert(kSorted == kWarps * 32, "a sequence for each thread");
  u32 key = 0;
  if (index < count) {
    const i64 length = load_number<Length>(p.seq_lens + index * static_cast<i64>(sizeof(Length)));
    // All keys differ; of lengths that are out of range or the like the order means nothing.
    key = static_cast<u32>(length < 0 ? 0 : length < 0xffffff ? length : 0xffffff) * kSorted + index;
  }
  keys[index] = key;
  __syncthreads();
  u32 longer = 0;
  for (u32 i = 0; i < count; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(keys + i);
    longer += (four.x > key) + (four.y > key) + (four.z > key) + (four.w > key);
  }
  if (index < count && longer == place) keys[kSorted] = index;
  __syncthreads();
  const u32 found = keys[kSorted];
  __syncthreads();
  return found;
}

// A row of the unit, as a lane needs it.
struct Row {
  bool valid;
  i64 token;    // its row in query and out
  u32 head;
  i32 low, high;  // keys that it sees: low <= key < high
  i32 position;   // in the sequence
};

__device__ __forceinline__ Row find_row(const Params& p, const Unit& unit, u32 head, u32 head_part,
                                        u32 index) {
  Row row;
  const u32 token = p.head_parts > 1 ? 0 : index / p.group;
  const u32 in_group = p.head_parts > 1 ? head_part * kWide + index : index % p.group;
  row.valid = token < static_cast<u32>(unit.tokens) && in_group < p.group;
  row.token = unit.token + token;
  row.head = head * p.group + in_group;
  const i64 position = unit.position + token;
  const i64 high = p.causal ? position + 1 : unit.length;
  const i64 low = position + 1 - p.window;
  row.position = static_cast<i32>(position);
  row.high = row.valid && high > 0 ? static_cast<i32>(high < unit.length ? high : unit.length) : 0;
  row.low = low > 0 ? static_cast<i32>(low) : 0;
  return row;
}

// The keys of a unit, in tiles of kKeys, and how they are cut.
struct Cut {
  i32 low, high;  // keys that any row sees: low <= key < high
  i32 first;      // tile
  i32 tiles;
  i32 part;  // tiles of one: a multiple of kWarps

  __device__ __forceinline__ Cut(const Params& p, const Unit& unit) {
    const i64 last = unit.position + unit.tokens;
    const i64 end = p.causal ? last : unit.length;
    high = static_cast<i32>(end < 0 ? 0 : end < unit.length ? end : unit.length);
    const i64 begin = unit.position + 1 - p.window;
    low = static_cast<i32>(begin > 0 ? begin : 0);
    first = low / kKeys;
    tiles = high > low ? (high - 1) / kKeys + 1 - first : 0;
    constexpr int kAll = kMaxParts * kWarps;
    part = max((tiles + kAll - 1) / kAll, 1) * kWarps;
  }
};

// The blocks of the tiles that a warp takes, one for each lane and for the next 32 tiles (kWhole: tiles
// do not cross blocks), or one for each key of the next tile.
template <typename Block, bool kWhole>
class Pages {
 public:
  __device__ __forceinline__ Pages(const Params& p, const Unit& unit, const Cut& cut, i32 tile,
                                   i32 tiles)
      : p_(p), unit_(unit), cut_(cut), tile_(tile), tiles_(tiles) {
    upcoming_ = load(0);
  }

  // Goes on to the tile of this index: `block` is that of the lane's key (kWhole: of all), negative
  // where it is not in the cache.
  __device__ __forceinline__ i32 next(i32 index) {
    if constexpr (kWhole) {
      if (index % 32 == 0) {
        blocks_ = upcoming_;
        upcoming_ = load(index + 32);
      }
      return __shfl_sync(kWarp, blocks_, index % 32);
    } else {
      blocks_ = upcoming_;
      upcoming_ = load(index + 1);
      return blocks_;
    }
  }

 private:
  const Params& p_;
  const Unit& unit_;
  const Cut& cut_;
  i32 tile_, tiles_;
  i32 blocks_ = -1, upcoming_;

  __device__ __forceinline__ i32 load(i32 index) const {
    const i32 lane = static_cast<i32>(threadIdx.x % 32);
    const i32 at = kWhole ? index + lane : index;
    i32 key = (tile_ + at * kWarps) * kKeys + (kWhole ? 0 : lane);
    if (at >= tiles_ || (!kWhole && (lane >= kKeys || key < cut_.low || key >= cut_.high))) return -1;
    const i64 block = load_number<Block>(
        p_.block_table + unit_.sequence * p_.table_stride +
        static_cast<i64>(static_cast<u32>(key) / p_.block_size) * static_cast<i64>(sizeof(Block)));
    if (!in_bounds(block, p_.num_blocks, kBlockTable, unit_.sequence)) return -1;
    return static_cast<i32>(block);
  }
};

// Keys or values of one head. Strides in bytes.
struct Source {
  const char* head;
  i64 block_stride;
  i64 slot_stride;
  i64 pack_stride;
  u32 pack;  // bytes

  // Where a byte of a slot's elements is.
  __device__ __forceinline__ i64 in_slot(u32 byte) const {
    return static_cast<i64>(byte / pack) * pack_stride + byte % pack;
  }
};

// Starts a warp's copy of the tile of keys from `key` on, kBytes of each, to shared memory, kVec bytes
// at a time. `block` is that of the lane's key (kWhole: of all), negative where there is none, whose
// place gets zeros; `complete`: all are there.
template <typename T, int kBytes, int kVec, bool kWhole>
__device__ __forceinline__ void copy_tile(char* to, const Source& from, u32 block_size, const Cut& cut,
                                          i32 block, i32 key, bool complete) {
  const i32 lane = static_cast<i32>(threadIdx.x % 32);
  const u32 slot = static_cast<u32>(key) % block_size;
  // Where the warp's lanes take whole rows, each lane always has the same chunk of a row.
  if constexpr (kWhole && 32 % T::kChunks == 0 && kVec == 16) {
    if (complete) {
      const i32 row = lane / T::kChunks, chunk = lane % T::kChunks;
      constexpr i32 kTogether = 32 / T::kChunks;  // rows
      const char* its = from.head + (block * from.block_stride + (slot + row) * from.slot_stride +
                                     from.in_slot(chunk * 16));
      to += row * T::kRowBytes + chunk * 16;
#pragma unroll
      for (i32 i = 0; i < kKeys; i += kTogether) {
        copy_async<16>(to + i * T::kRowBytes, its, true);
        its += kTogether * from.slot_stride;
      }
      return;
    }
  }
  constexpr i32 kAll = kKeys * T::kChunks;
#pragma unroll
  for (i32 i = 0; i < (kAll + 31) / 32; ++i) {
    const i32 at = i * 32 + lane, row = at / T::kChunks % kKeys, chunk = at % T::kChunks;
    i32 its_block = block;
    u32 its_slot = slot + row;
    if constexpr (!kWhole) {
      its_block = __shfl_sync(kWarp, block, row);
      its_slot = static_cast<u32>(key + row) % block_size;
    }
    const bool present = its_block >= 0 && key + row >= cut.low && key + row < cut.high;
    const i64 away = present ? its_block * from.block_stride + its_slot * from.slot_stride : 0;
    if (kAll % 32 == 0 || at < kAll) {
#pragma unroll
      for (i32 piece = 0; piece < 16; piece += kVec) {
        const bool inside = kBytes % 16 == 0 || chunk * 16 + piece < kBytes;
        copy_async<kVec>(to + row * T::kRowBytes + chunk * 16 + piece,
                         inside ? from.head + away + from.in_slot(chunk * 16 + piece) : from.head,
                         present && inside);
      }
    }
  }
}

// Starts a warp's copy of the scales of a tile's keys, and behind them of its values, to shared memory,
// one for each lane. The arguments are as of copy_tile.
template <bool kWhole>
__device__ __forceinline__ void copy_scales(float* to, const Params& p, u32 head, const Cut& cut,
                                            i32 block, i32 key) {
  const i32 lane = static_cast<i32>(threadIdx.x % 32), row = lane % kKeys;
  const bool of_key = lane < kKeys;
  const char* const from = of_key ? p.k_scale_cache + head * p.k_scale_head_stride
                                  : p.v_scale_cache + head * p.v_scale_head_stride;
  const i64 block_stride = of_key ? p.k_scale_block_stride : p.v_scale_block_stride;
  const i64 slot_stride = of_key ? p.k_scale_slot_stride : p.v_scale_slot_stride;
  const i32 its_block = kWhole ? block : __shfl_sync(kWarp, block, row);
  const u32 slot = static_cast<u32>(key + row) % p.block_size;
  const bool present = its_block >= 0 && key + row >= cut.low && key + row < cut.high;
  const i64 away = present ? its_block * block_stride + slot * slot_stride : 0;
  copy_async<4>(reinterpret_cast<char*>(to + lane), from + away, present);
}

// The logarithm of the power of two next below a scale's magnitude: from -64, so that sums of weights are
// not too large, to 120, so that they do not vanish.
__device__ __forceinline__ float magnitude(float scale) {
  const i32 biased = static_cast<i32>(__float_as_uint(scale) >> 23 & 0xffu);
  return static_cast<float>(min(max(biased, 63), 247) - 127);
}

// Writes two columns of a row's output, and with the first two its log-sum-exp.
template <typename Query, int kValueSize>
__device__ __forceinline__ void write_row(const Params& p, const Row& row, int column, Sums sums,
                                          float v_scale) {
  const bool any = sums.sum > 0.0f;  // keys
  if (p.sinks && any) {
    const char* const at = p.sinks + row.head * p.sink_stride;
    const float sink = p.float_sinks ? *reinterpret_cast<const float*>(at)
                                     : Query::decode(*reinterpret_cast<const u16*>(at));
    sums.join(sink * kLog2E, 1.0f, {0.0f, 0.0f});
  }
  const float weight = any ? v_scale / sums.sum : 0.0f;
  char* const at = p.out + row.token * p.out_stride + row.head * p.out_head_stride + column * 2;
  const u32 bits = any ? pack_pair<Query>(sums.first * weight, sums.second * weight) : 0u;
  if (p.pairs_out && column + 1 < kValueSize) {
    *reinterpret_cast<u32*>(at) = bits;
  } else {
    if (column < kValueSize) *reinterpret_cast<u16*>(at) = static_cast<u16>(bits);
    if (column + 1 < kValueSize) reinterpret_cast<u16*>(at)[1] = static_cast<u16>(bits >> 16);
  }
  if (p.lse && column == 0) {
    *reinterpret_cast<float*>(p.lse + row.token * p.lse_stride + row.head * p.lse_head_stride) =
        any ? (sums.joined.largest + log2f(sums.sum)) * kLn2 : __uint_as_float(0xff800000u);
  }
}

// A scale of this head: an array's, or one that the host knows.
__device__ __forceinline__ float head_scale(const char* array, i64 stride, u32 head, float value) {
  return array ? *reinterpret_cast<const float*>(array + head * stride) : value;
}

// Query is F16 or BF16, of queries and output; Cached is Query, one of the 8-bit types, or TokenScaled of
// one of these: then the scales of keys multiply scores, and those of values multiply weights. kRows: a unit
// has at most 8 rows, 16, or kWide. Caches are read kKeyVec and kValueVec bytes at a time. kWhole:
// block_size is a multiple of kKeys. kByToken: a head's values of neighbouring slots are side by side.
// kShared are the bytes of shared memory. kCluster blocks take a part each, or 1 block takes all.
template <typename Query, typename Cached, int kKeySize, int kValueSize, int kKeyVec, int kValueVec,
          int kRows, bool kWhole, bool kByToken, bool kCapped, bool kSloped, int kStages,
          int kShared, int kCluster, typename Block, typename Length, typename Start>
__global__ void CUPY_CACHE_CLUSTER(kCluster)
    __launch_bounds__(kWarps * 32, kKeySize + kValueSize > 256 ? 1 : 2)
    paged_attention(const __grid_constant__ Params p) {
  using In = Operands<Query, Cached>;
  using Type = typename In::Type;
  using Stored = typename In::Stored;
  static_assert(!(In::kTokenScales && kByToken), "columns of scores are keys in their order");
  constexpr int kSteps = (kKeySize + 15) / 16;  // of the product of queries and keys
  constexpr int kOutSize = (kValueSize + 15) / 16 * 16;
  constexpr int kColumns = kOutSize / 8;  // tiles of 8 columns of the output
  using KeyTile = Tile<kKeys, kSteps * 16 * In::kBytes>;
  // By token it has a row for each element of a head.
  using ValueTile = Tile<kByToken ? kOutSize : kKeys, (kByToken ? kKeys : kOutSize) * In::kBytes>;
  constexpr int kHalves = kRows == 8 ? 1 : 2;  // of a tile of rows
  constexpr int kTileRows = 8 * kHalves;
  constexpr int kOutRow = (kOutSize + 8) / 2;  // in pairs of numbers; rows in different banks
  constexpr int kStageBytes = KeyTile::kSize + ValueTile::kSize;
  constexpr int kCopyBytes = kWarps * kStages * kStageBytes;
  constexpr int kOutBytes = kWarps * kTileRows * (kOutRow + 1) * 8;
  constexpr int kBytes = kCopyBytes > kOutBytes ? kCopyBytes : kOutBytes;
  // Behind the tiles which of their keys are missing, and then their scales.
  constexpr int kTileScales = In::kTokenScales ? 2 * kKeys : 0;
  static_assert(kShared == kBytes + kWarps * kStages * 4 * (1 + kTileScales), "what the host gives");
  CUPY_CACHE_DYNAMIC_SHARED(shared, kShared);

  const u32 rank = blockIdx.x % kCluster, work = blockIdx.x / kCluster;
  const u32 heads = p.kv_heads * p.head_parts;
  const u32 head = work % heads / p.head_parts, head_part = work % p.head_parts;
  i64 place = work / heads;
  constexpr u32 kMany = 256;  // more units than run at once: then the order matters
  if (IsVoid<Start>::value && kCluster == 1 && gridDim.x > kMany && p.sequences > 1 &&
      p.sequences <= kSorted) {
    place = sequence_by_length<Length>(p, static_cast<u32>(place), reinterpret_cast<u32*>(shared));
  }
  const Unit unit = find_unit<Length, Start>(p, place, shared);
  if (!unit.any) return;  // as do all blocks of the cluster

  const Cut cut(p, unit);
  const i32 warp = static_cast<i32>(threadIdx.x / 32), lane = static_cast<i32>(threadIdx.x % 32);
  const i32 offset = kCluster > 1 ? static_cast<i32>(rank) * cut.part : 0;
  const i32 behind = kCluster > 1 && offset + cut.part < cut.tiles ? offset + cut.part : cut.tiles;
  const i32 mine = behind > offset + warp ? (behind - offset - warp - 1) / kWarps + 1 : 0;
  const i32 first = cut.first + offset + warp;
  char* const copies = shared + warp * (kStages * kStageBytes);
  u32* const missing = reinterpret_cast<u32*>(shared + kBytes) + warp * kStages;
  float* const scales = reinterpret_cast<float*>(shared + kBytes + kWarps * kStages * 4);

  // --- copies, ahead of use
  Pages<Block, kWhole> pages(p, unit, cut, first, mine);
  const char* const key_head = p.key_cache + head * p.key_head_stride;
  const char* const value_head = p.value_cache + head * p.value_head_stride;
  const auto request = [&](i32 index) {
    if (index < mine) {
      const i32 block = pages.next(index);
      const i32 key = (first + index * kWarps) * kKeys;
      const i32 stage = index % kStages;
      const u32 slot = static_cast<u32>(key) % p.block_size;
      const bool complete = block >= 0 && key >= cut.low && key + kKeys <= cut.high;
      char* const keys = copies + stage * kStageBytes;
      copy_tile<KeyTile, kKeySize * In::kBytes, kKeyVec, kWhole>(
          keys, {key_head, p.key_block_stride, p.key_slot_stride, p.key_pack_stride, p.key_pack},
          p.block_size, cut, block, key, complete);
      if constexpr (kByToken) {
        constexpr int kPieces = kKeys * In::kBytes / kValueVec;  // of a row
        constexpr int kAll = kValueSize * kPieces;
#pragma unroll 4
        for (int base = 0; base < kAll; base += 32) {
          const int at = base + lane, row = at / kPieces, piece = at % kPieces * kValueVec;
          const int in_tile = piece / In::kBytes;
          i32 its_block = block;
          u32 byte = (slot + in_tile) * In::kBytes;  // of the block's
          if constexpr (!kWhole) {
            its_block = __shfl_sync(kWarp, block, in_tile);
            byte = static_cast<u32>(key + in_tile) % p.block_size * In::kBytes;
          }
          const i64 away = its_block >= 0
                               ? its_block * p.value_block_stride +
                                     byte / p.value_pack * p.value_pack_stride + byte % p.value_pack
                               : 0;
          if (kAll % 32 == 0 || at < kAll) {
            copy_async<kValueVec>(keys + KeyTile::kSize + row * ValueTile::kRowBytes + piece,
                                  value_head + away + row * p.value_slot_stride, its_block >= 0);
          }
        }
      } else {
        copy_tile<ValueTile, kValueSize * In::kBytes, kValueVec, kWhole>(
            keys + KeyTile::kSize,
            {value_head, p.value_block_stride, p.value_slot_stride, p.value_pack_stride,
             p.value_pack},
            p.block_size, cut, block, key, complete);
      }
      if constexpr (In::kTokenScales) {
        copy_scales<kWhole>(scales + (warp * kStages + stage) * kTileScales, p, head, cut, block, key);
      }
      const u32 absent = kWhole ? (block < 0 ? kWarp : 0u) : __ballot_sync(kWarp, block < 0);
      if (lane == 0) missing[stage] = absent;
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) request(i);

  // --- queries: rows row and row + 8 of the tile
  const int used = p.head_parts > 1 ? static_cast<int>(min(p.group - head_part * kWide, u32{kWide}))
                                    : unit.tokens * static_cast<int>(p.group);
  const bool wide = kRows == kWide && used > kTileRows;  // each warp has rows of its own
  const int first_row = wide ? warp * kTileRows : 0;
  const int in_half = lane / 4, pair = lane % 4;
  Row rows[kHalves];
  float slopes[kHalves];
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    rows[half] = find_row(p, unit, head, head_part, first_row + half * 8 + in_half);
    slopes[half] = 0.0f;
    if (kSloped && rows[half].valid) {
      slopes[half] = *reinterpret_cast<const float*>(
          (p.alibi_slopes ? p.alibi_slopes : p.sequence_slopes) +
          unit.sequence * p.slope_sequence_stride + rows[half].head * p.slope_stride);
    }
  }
  u32 queries[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      queries[step][i] = 0;
      if (i % 2 < kHalves && rows[i % 2 % kHalves].valid) {
        const Row& row = rows[i % 2 % kHalves];
        const int element = step * 16 + (In::kNarrow ? pair * 4 + i / 2 * 2 : pair * 2 + i / 2 * 8);
        queries[step][i] = query_pair<Query, Type>(
            p.query + row.token * p.query_stride + row.head * p.query_head_stride + element * 2,
            p.pairs_in, kKeySize - element);
      }
    }
  }
  const float k_scale = In::kNarrow && !In::kTokenScales
                            ? head_scale(p.k_scale, p.k_scale_stride, head, p.k_scale_value)
                            : 1.0f;
  const float scale = p.scale * p.base_scale * k_scale * (kCapped || kSloped ? 1.0f : kLog2E);
  const float cap_inverse = kCapped ? 2.0f * kLog2E / p.soft_cap : 0.0f;
  // Keys that all rows of this warp see: those between the last row's first and the first row's last.
  const int last_row = first_row + kTileRows < used ? first_row + kTileRows - 1 : used - 1;
  const i32 all_low = find_row(p, unit, head, head_part, last_row).low;
  const i32 all_high = find_row(p, unit, head, head_part, first_row).high;

  // --- tiles
  // The key of the tile that a column of scores is for. 8-bit values by token are read four
  // neighbours at a time, which stand where the instruction wants two and two.
  const auto key_of_column = [](int column) {
    if constexpr (kByToken && In::kNarrow) {
      return column % 8 / 2 * 4 + column / 8 * 2 + column % 2;
    } else {
      return column;
    }
  };
  float largest[kHalves], sums[kHalves], out[kColumns][4];
  Joined kept[kHalves];
  float kept_sums[kHalves], kept_out[kColumns][4];
  const auto begin = [&] {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) largest[half] = kNone, sums[half] = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  };
  // Joins the part to those before.
  const auto keep = [&] {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float sum = sums[half];
      sum += __shfl_xor_sync(kWarp, sum, 1);
      sum += __shfl_xor_sync(kWarp, sum, 2);
      sums[half] = sum;
      if constexpr (kCluster == 1) {
        kept[half].join(largest[half]);
        kept_sums[half] = kept[half].sum(kept_sums[half], sum);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& sum_of = kept_out[i][2 * half + j];
            sum_of = kept[half].sum(sum_of, out[i][2 * half + j]);
          }
        }
      }
    }
  };
  begin();
  if constexpr (kCluster == 1) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) kept_sums[half] = 0.0f;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      kept_out[i][0] = kept_out[i][1] = kept_out[i][2] = kept_out[i][3] = 0.0f;
    }
  }
  const i32 of_part = cut.part / kWarps;
  i32 left = of_part;  // tiles of this part
  const i32 turns = wide ? (behind > offset ? (behind - offset - 1) / kWarps + 1 : 0) : mine;
  for (i32 index = 0; index < turns; ++index) {
    request(index + kStages - 1);
    wait_for_copies<kStages - 1>();
    const i32 stage = index % kStages;
    if constexpr (kByToken) {
      // What was copied with the values of tokens that are there.
      __syncwarp();
      const i32 key = (first + index * kWarps) * kKeys;
      if (index < mine && (key < cut.low || key + kKeys > cut.high)) {
        char* const at = copies + stage * kStageBytes + KeyTile::kSize;
        for (int i = lane; i < kValueSize * kKeys; i += 32) {
          const int token = i % kKeys;
          if (key + token >= cut.low && key + token < cut.high) continue;
          char* const element = at + i / kKeys * ValueTile::kRowBytes + token * In::kBytes;
          if constexpr (In::kNarrow) *element = 0;
          else *reinterpret_cast<u16*>(element) = 0;
        }
      }
    }
    if (wide) __syncthreads();
    else __syncwarp();
    for (i32 turn = 0; turn < (kRows == kWide && wide ? kWarps : 1); ++turn) {
      const i32 copier = wide ? turn : warp;
      const i32 tile = offset + copier + index * kWarps;
      if (wide && tile >= behind) break;
      const char* const keys = shared + (copier * kStages + stage) * kStageBytes;
      const char* const values = keys + KeyTile::kSize;

      float scores[2][4] = {}, others[2][4] = {};  // of every second step: two chains of products
      const int key_row = key_of_column(lane % 8 + lane / 16 * 8), key_chunk = lane / 8 % 2;
#pragma unroll
      for (int chunk = 0; chunk < KeyTile::kChunks; chunk += 2) {
        u32 loaded[4];
        // The last chunk may have no neighbour: it is read twice.
        const int at = chunk + (chunk + 1 < KeyTile::kChunks ? key_chunk : 0);
        load_matrices<false>(loaded, keys + key_row * KeyTile::kRowBytes + at * 16);
        if constexpr (In::kNarrow) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int step = chunk + i % 2;
            if (step < kSteps) {
              multiply_add<Type>(i % 2 ? others[i / 2] : scores[i / 2],
                                 queries[step < kSteps ? step : 0],
                                 widen<Stored>(static_cast<u16>(loaded[i])),
                                 widen<Stored>(static_cast<u16>(loaded[i] >> 16)));
            }
          }
        } else {
          auto& sums_of = chunk / 2 % 2 ? others : scores;
          multiply_add<Type>(sums_of[0], queries[chunk / 2], loaded[0], loaded[1]);
          multiply_add<Type>(sums_of[1], queries[chunk / 2], loaded[2], loaded[3]);
        }
      }

      const i32 key = (cut.first + tile) * kKeys;
      const u32 absent = reinterpret_cast<const u32*>(shared + kBytes)[copier * kStages + stage];
      const bool all = key >= all_low && key + kKeys <= all_high && absent == 0;
      // Of this lane's columns of scores. A weight times its value's scale is an operand, which has few
      // bits: so the largest score is found with the scales' magnitudes added.
      float factors[4], value_scales[4], magnitudes[4];
      if constexpr (In::kTokenScales) {
        const float* const its = scales + (copier * kStages + stage) * kTileScales;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int in_tile = i / 2 * 8 + pair * 2 + i % 2;
          factors[i] = its[in_tile] * scale;
          value_scales[i] = its[kKeys + in_tile];
          magnitudes[i] = magnitude(value_scales[i]);
        }
      }
      float most[kHalves];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        most[half] = kNone;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int in_tile = key_of_column(i / 2 * 8 + pair * 2 + i % 2);
          float& score = scores[i / 2][2 * half + i % 2];
          score = (score + others[i / 2][2 * half + i % 2]) *
                  (In::kTokenScales ? factors[i] : scale);
          if constexpr (kCapped) {
            score = p.soft_cap -
                    2.0f * p.soft_cap * __fdividef(1.0f, power_of_two(score * cap_inverse) + 1.0f);
          }
          if constexpr (kSloped) {
            score += slopes[half] * static_cast<float>(key + in_tile - rows[half].position);
          }
          if constexpr (kCapped || kSloped) score *= kLog2E;
        }
        if (!all) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int in_tile = key_of_column(i / 2 * 8 + pair * 2 + i % 2);
            if (key + in_tile < rows[half].low || key + in_tile >= rows[half].high ||
                (absent >> in_tile & 1)) {
              scores[i / 2][2 * half + i % 2] = __uint_as_float(0xff800000u);  // minus infinity
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float score = scores[i / 2][2 * half + i % 2];
          most[half] = fmaxf(most[half], In::kTokenScales ? score + magnitudes[i] : score);
        }
        most[half] = fmaxf(most[half], __shfl_xor_sync(kWarp, most[half], 1));
        most[half] = fmaxf(most[half], __shfl_xor_sync(kWarp, most[half], 2));
      }
      bool grows = most[0] > largest[0];
      if constexpr (kHalves == 2) grows |= most[1] > largest[1];
      if (__any_sync(kWarp, grows)) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const float now = fmaxf(largest[half], most[half]);
          const float weight = power_of_two(largest[half] - now);
          largest[half] = now;
          sums[half] *= weight;
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            out[i][2 * half] *= weight;
            out[i][2 * half + 1] *= weight;
          }
        }
      }
      u32 weights[4] = {};
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float low = power_of_two(scores[i][2 * half] - largest[half]);
          const float high = power_of_two(scores[i][2 * half + 1] - largest[half]);
          sums[half] += low + high;
          weights[2 * i + half] = In::kTokenScales
                                      ? pack_pair<Type>(low * value_scales[2 * i],
                                                        high * value_scales[2 * i + 1])
                                      : pack_pair<Type>(low, high);
        }
      }

      if constexpr (kByToken) {
        // Matrices of 8 elements of a head by 8 tokens, or by 16 that have 8 bits.
        constexpr int kRowsLoaded = 32 / ValueTile::kChunks;
#pragma unroll
        for (int row = 0; row < kValueSize; row += kRowsLoaded) {
          u32 loaded[4];
          const int at = In::kNarrow ? lane : lane % 8 + lane / 16 * 8;
          const int chunk = In::kNarrow ? 0 : lane / 8 % 2;
          // The last rows may be fewer: others are read twice.
          const int its_row = row + at < kValueSize ? row + at : at % 8;
          load_matrices<false>(loaded, values + its_row * ValueTile::kRowBytes + chunk * 16);
#pragma unroll
          for (int i = 0; i < kRowsLoaded / 8; ++i) {
            const int column = row / 8 + i;
            if (column >= kColumns) continue;
            float(&sum)[4] = out[column < kColumns ? column : 0];
            if constexpr (In::kNarrow) {
              multiply_add<Type>(sum, weights, widen<Stored>(static_cast<u16>(loaded[i])),
                                 widen<Stored>(static_cast<u16>(loaded[i] >> 16)));
            } else {
              multiply_add<Type>(sum, weights, loaded[2 * i], loaded[2 * i + 1]);
            }
          }
        }
      } else {
        const int value_row = lane % 16, value_chunk = lane / 16;
#pragma unroll
        for (int chunk = 0; chunk < ValueTile::kChunks; chunk += 2) {
          u32 loaded[4];
          const int at = chunk + (chunk + 1 < ValueTile::kChunks ? value_chunk : 0);
          load_matrices<true>(loaded, values + value_row * ValueTile::kRowBytes + at * 16);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (chunk + i >= ValueTile::kChunks) continue;
            const u32 b0 = loaded[2 * i], b1 = loaded[2 * i + 1];
            if constexpr (In::kNarrow) {
              // Every second column, then the others.
              const int column = (chunk + i) * 2 < kColumns ? (chunk + i) * 2 : 0;
              multiply_add<Type>(out[column], weights,
                                 widen<Stored>(static_cast<u16>(__byte_perm(b0, 0, 0x20))),
                                 widen<Stored>(static_cast<u16>(__byte_perm(b1, 0, 0x20))));
              multiply_add<Type>(out[column + 1], weights,
                                 widen<Stored>(static_cast<u16>(__byte_perm(b0, 0, 0x31))),
                                 widen<Stored>(static_cast<u16>(__byte_perm(b1, 0, 0x31))));
            } else {
              multiply_add<Type>(out[chunk + i < kColumns ? chunk + i : 0], weights, b0, b1);
            }
          }
        }
      }
    }
    // The stage is copied to next.
    if (wide) __syncthreads();
    else __syncwarp();
    if (--left == 0 && kCluster == 1) {
      left = of_part;
      keep();
      begin();
    }
  }
  if (kCluster > 1 || left < of_part) keep();

  // --- the warps' results side by side
  wait_for_copies<0>();
  __syncthreads();
  constexpr bool kAlternate = In::kNarrow && !kByToken;  // columns of a pair of tiles
  float2* const outputs = reinterpret_cast<float2*>(shared);
  float2* const totals = outputs + kWarps * kTileRows * kOutRow;
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const int row = warp * kTileRows + half * 8 + in_half;
    const auto& from = [&]() -> float (&)[kColumns][4] {
      if constexpr (kCluster == 1) return kept_out;
      else return out;
    }();
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      // Columns next to each other: of one tile, or of two that have every second one.
      const int j = 2 * half;
      float2* const at = outputs + row * kOutRow + i * 4 + (kAlternate ? 2 * pair : pair);
      if constexpr (kAlternate) {
        at[0] = {from[i][j], from[i + 1][j]};
        at[1] = {from[i][j + 1], from[i + 1][j + 1]};
      } else {
        at[0] = {from[i][j], from[i][j + 1]};
        at[4] = {from[i + 1][j], from[i + 1][j + 1]};
      }
    }
    if (pair == 0) {
      if constexpr (kCluster == 1) totals[row] = {kept[half].largest, kept_sums[half]};
      else totals[row] = {largest[half], sums[half]};
    }
  }

  // --- joined
  const float v_scale = In::kNarrow && !In::kTokenScales
                            ? head_scale(p.v_scale, p.v_scale_stride, head, p.v_scale_value)
                            : 1.0f;
  // Row `row` of the unit is in row `row` of the first tile, and of the other warps' tiles, or of one.
  const int sources = wide ? 1 : kWarps;
  constexpr int kPairs = kOutSize / 2;
  if constexpr (kCluster == 1) {
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < used * kPairs; at += kWarps * 32) {
      const int row = at / kPairs, column = at % kPairs;
      Sums joined;
#pragma unroll
      for (int from = 0; from < kWarps; ++from) {
        if (from >= sources) continue;
        const int its_row = from * kTileRows + row;
        joined.join(totals[its_row].x, totals[its_row].y, outputs[its_row * kOutRow + column]);
      }
      const Row its = find_row(p, unit, head, head_part, row);
      write_row<Query, kValueSize>(p, its, 2 * column, joined, v_scale);
    }
  } else {
    sync_cluster();
    const int parts = (cut.tiles + cut.part - 1) / cut.part;
    const int every = kCluster * kWarps * 8;
    for (int at = (static_cast<int>(rank) * kWarps + warp) * 8; at < used * kPairs; at += every) {
      // Four lanes for a pair of columns: one for each warp's parts.
      const int place = at + in_half < used * kPairs ? at + in_half : 0;
      const int row = place / kPairs, column = place % kPairs;
      const int its_row = pair < sources ? pair * kTileRows + row : row;
      // All are on their way before the first is used.
      float2 its_totals[kCluster], its_pairs[kCluster];
#pragma unroll
      for (int part = 0; part < kCluster; ++part) {
        const u32 from = part < parts ? part : 0;
        its_totals[part] = load_from_block(totals + its_row, from);
        its_pairs[part] = load_from_block(outputs + its_row * kOutRow + column, from);
      }
      Sums joined;
#pragma unroll
      for (int part = 0; part < kCluster; ++part) {
        if (part < parts) joined.join(its_totals[part].x, its_totals[part].y, its_pairs[part]);
      }
      Sums all;
#pragma unroll
      for (int from = 0; from < kWarps; ++from) {
        const int source = lane / 4 * 4 + from;
        if (from >= sources) continue;
        all.join(__shfl_sync(kWarp, joined.joined.largest, source),
                 __shfl_sync(kWarp, joined.sum, source),
                 {__shfl_sync(kWarp, joined.first, source), __shfl_sync(kWarp, joined.second, source)});
      }
      if (pair == 0 && at + in_half < used * kPairs) {
        const Row its = find_row(p, unit, head, head_part, row);
        write_row<Query, kValueSize>(p, its, 2 * column, all, v_scale);
      }
    }
    sync_cluster();  // the others may still be reading
  }
}

}  // namespace cupy_cache
