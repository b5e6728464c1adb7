// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Attention of queries over the keys and values in a paged cache, in one launch.
//
// A unit of work is a number of rows: query heads that share a KV head, of one or several neighbouring
// tokens of one sequence. The keys that it sees are cut into tiles of 16, and these into parts, by their
// number alone. Of up to 16 rows, the warps of a thread block take the tiles of a part in turns, and each
// works by itself: it copies its tiles to shared memory ahead of use and has a running maximum, a sum and
// an output of its own. At the end of a part these are joined. Of more rows, each warp copies tiles
// likewise, but takes all of them for 16 of the rows. Parts are joined to one another in their order, in
// groups first, of which a unit has at most eight. Two units of a sequence of many queries are taken as
// one, without parts: each warp has 32 rows then, for which it reads a tile from shared memory once.
//
// So it does not matter to any bit of the result who computes a part: a thread block takes all of a unit,
// or of two units of neighbouring KV heads, or a group; or each thread block takes as many parts of all
// units as any other, and what a unit lacks is exchanged through scratch memory. The host chooses by how
// much there is to do. Nor does it matter what else is in the batch.
#include "cupy_cache/async.cuh"
#include "cupy_cache/cluster.cuh"
#include "cupy_cache/divide.cuh"
#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/matrix.cuh"
#include "cupy_cache/operands.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/scratch.cuh"
#include "cupy_cache/softmax.cuh"
#include "cupy_cache/tiles.cuh"

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
  u64 scratch_tag;  // see scratch.cuh
  i64 tall_tokens;  // from so many on, a sequence's units are taken two at a time
  float base_scale;  // what `scale` is multiplied with
  u32 block_size;
  u32 kv_heads;
  u32 group;       // query heads of a KV head
  u32 row_tokens;  // tokens of a unit
  u32 head_parts;  // units that a token's group is cut into
  u32 part_rows;   // query heads of one of them, at most
  u32 causal;
  u32 float_sinks;  // they are float32, else of the query's type
  u32 key_pack;     // bytes
  u32 slot_bytes;   // of a slot of scratch memory
  u32 value_pack;   // bytes
  u32 pairs_in;     // the query's elements can be read in pairs
  u32 pairs_out;    // the output's can be written in pairs
  Divisor by_block_size;
  Divisor by_heads;  // units of a sequence, or of a number of its tokens
  char* scratch;    // where kCluster is 0: a word for each sequence and KV head, and slots of results
  u64 slots_at;     // bytes
  u32 slots;        // of a thread block
};

constexpr u32 kBlockTable = 1, kSeqLens = 2, kQueryStartLoc = 3;  // numbers of guarded arguments

constexpr int kWide = 64;  // the most rows of a unit, where it may have more than one tile of rows
constexpr int kWarps = 4;   // of a thread block
constexpr int kGroups = 8;     // of parts; a cluster's blocks take one each
constexpr int kMaxParts = 64;  // of a unit
constexpr int kSorted = 32 * kWarps;
// By how much, as a power of two, a score may be above the one that weights are relative to before all
// sums are made relative to it: weights stay far below what an operand holds.
constexpr float kSlack = 8.0f;

// A block may have two teams of kWarps warps, for two neighbouring KV heads of a sequence. Warps of the
// same number copy the same tile, one the keys of both heads and the other the values: memory reads rows
// of 256 bytes faster than shorter ones.
__device__ __forceinline__ u32 team() { return threadIdx.x / (kWarps * 32); }
__device__ __forceinline__ u32 thread_of_team() { return threadIdx.x % (kWarps * 32); }
__device__ __forceinline__ i32 warp_of_team() { return static_cast<i32>(thread_of_team() / 32); }
// From one team's shared memory to the other's: tiles are at multiples of 128 bytes.
template <int kShared>
constexpr int kOfTeam = (kShared + 127) / 128 * 128;

// Which queries a unit has.
struct Unit {
  i64 sequence;
  i64 token;        // the first one's row in query and out
  i32 tokens;       // of this unit
  i64 position;     // the first one's in its sequence
  i64 length;       // of the sequence
  i64 stated;       // the same, as it was given
  i64 count;        // of the sequence's queries
  i64 before;       // of these
  bool any = false;
};

// What a length may be at most: what the table has room for. Keys have 32-bit numbers.
__device__ __forceinline__ i64 longest(const Params& p) {
  return min(p.table_width * p.block_size, i64{0x7fffff00});
}

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
#pragma unroll 1
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
  unit.stated = load_number<Length>(p.seq_lens + unit.sequence * static_cast<i64>(sizeof(Length)));
  unit.length = max(min(unit.stated, longest(p)), i64{0});
  unit.position = unit.length - count + first;
  unit.count = count, unit.before = first;
  unit.any = true;
  return unit;
}

// The sequence that comes at this place if the longest is first, so that none is begun late. `keys` is
// shared memory for kSorted + 1 numbers, free again when this returns.
template <typename Length>
__device__ __forceinline__ i64 sequence_by_length(const Params& p, u32 place, u32* keys) {
  const u32 count = static_cast<u32>(p.sequences), index = thread_of_team();
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
#pragma unroll 4
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

// kOne: a unit has one token.
template <bool kOne>
__device__ __forceinline__ Row find_row(const Params& p, const Unit& unit, u32 head, u32 head_part,
                                        u32 index) {
  Row row;
  const bool one = kOne || p.head_parts > 1;
  const u32 token = one ? 0 : index / p.group;
  const u32 in_group = one ? head_part * p.part_rows + index : index % p.group;
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
  i32 part;   // tiles of one: kWarps times a power of two
  i32 log;    // of that
  i32 parts;  // at least 1, at most kMaxParts
  i32 group;  // parts that are joined to one another before they are to all others; kGroups of them

  // `whole`: a group is not cut into parts.
  __device__ __forceinline__ Cut(const Params& p, const Unit& unit, bool whole) {
    const i64 last = unit.position + unit.tokens;
    const i64 end = p.causal ? last : unit.length;
    high = static_cast<i32>(end < 0 ? 0 : end < unit.length ? end : unit.length);
    const i64 begin = unit.position + 1 - p.window;
    low = static_cast<i32>(begin > 0 ? begin : 0);
    first = low / kKeys;
    tiles = high > low ? (high - 1) / kKeys + 1 - first : 0;
    // A power of two of tiles for each warp, such that sequences of all lengths have a number of parts
    // that suits them.
    log = tiles <= 32     ? 0
          : tiles <= 64   ? 1
          : tiles <= 128  ? 2
          : tiles <= 1024 ? 3
          : tiles <= 4096 ? 4
                          : 32 - __clz((tiles - 1) / 256);
    part = kWarps << log;
    parts = max((tiles + part - 1) / kWarps >> log, 1);
    group = (parts + kGroups - 1) / kGroups;
    if (whole) {
      part *= group;
      parts = (parts + group - 1) / group;
      group = 1;
    }
  }
};

// The tiles of a unit that a block takes: from `begin` to before `end`, its warps in turns.
struct Tiles {
  i32 begin, end;

  __device__ __forceinline__ Tiles(const Cut& cut, i32 from, i32 to)
      : begin(from * cut.part), end(min(to * cut.part, cut.tiles)) {}

  __device__ __forceinline__ i32 turns() const {
    return end > begin ? (end - begin - 1) / kWarps + 1 : 0;
  }
  // The tile of a warp at a turn; there is none if that is not below `end`.
  __device__ __forceinline__ i32 of(i32 warp, i32 turn) const { return begin + turn * kWarps + warp; }
};

// What a warp looks up first in the block table, if its keys begin with the sequence's. It is asked for
// before the length is known; what is there behind the sequence's blocks is not used.
template <typename Block, int kRun>
class Guess {
 public:
  static constexpr i32 kEntries = kKeys / kRun;  // of a tile

  // `wanted`: else nothing is read.
  __device__ __forceinline__ Guess(const Params& p, const Unit& unit, bool wanted) {
    const i32 lane = static_cast<i32>(threadIdx.x % 32);
    const i32 tile = lane / kEntries * kWarps + warp_of_team();
    const u32 entry = p.by_block_size.quotient(tile * kKeys + lane % kEntries * kRun);
    if (wanted && kRun > 1 && entry < p.table_width) {
      number = load_number<Block>(p.block_table + unit.sequence * p.table_stride +
                                  entry * static_cast<i64>(sizeof(Block)));
    }
  }

  i64 number = -1;  // of the lane's keys, if there are any
};

// The blocks of a tile's first eight keys and of the others (kRun = 1: both are that of the lane's key),
// negative where they are not in the cache.
struct Blocks {
  i32 low, high;
};

// The blocks of the tiles that a warp takes, of runs of kRun keys: one for each lane and for as many of
// the next tiles as that makes, or one for each key of the next tile.
template <typename Block, int kRun>
class Pages {
 public:
  // `guess`: of these tiles, or null.
  __device__ __forceinline__ Pages(const Params& p, const Unit& unit, const Cut& cut,
                                   const Tiles& tiles, const Guess<Block, kRun>* guess)
      : p_(p), unit_(unit), cut_(cut), tiles_(tiles) {
    if (kRun > 1 && guess && cut.first == 0) {
      upcoming_ = wanted(key_of(0)) ? checked(guess->number) : -1;
    } else {
      upcoming_ = load(0);
    }
  }

  // Goes on to the tile of this index.
  __device__ __forceinline__ Blocks next(i32 index) {
    if (index % kTilesLoaded == 0) {
      blocks_ = upcoming_;
      upcoming_ = load(index + kTilesLoaded);
    }
    if constexpr (kRun == 1) return {blocks_, blocks_};
    const i32 first = index % kTilesLoaded * kEntries;
    return {__shfl_sync(kWarp, blocks_, first), __shfl_sync(kWarp, blocks_, first + kEntries - 1)};
  }

 private:
  static constexpr i32 kEntries = kKeys / kRun;  // of a tile
  static constexpr i32 kTilesLoaded = kRun == 1 ? 1 : 32 / kEntries;
  const Params& p_;
  const Unit& unit_;
  const Cut& cut_;
  const Tiles& tiles_;
  i32 blocks_ = -1, upcoming_;

  // The first key of the lane's entry, of the tiles from this index on; negative if there is none.
  __device__ __forceinline__ i32 key_of(i32 index) const {
    const i32 lane = static_cast<i32>(threadIdx.x % 32);
    const i32 tile = tiles_.of(warp_of_team(), index + lane / kEntries);
    if (tile >= tiles_.end || (kRun == 1 && lane >= kKeys)) return -1;
    return (cut_.first + tile) * kKeys + lane % kEntries * kRun;
  }
  // Whether a query sees any of its keys. Of a tile one is seen.
  __device__ __forceinline__ bool wanted(i32 key) const {
    return key >= 0 && (kRun == kKeys || (key + kRun > cut_.low && key < cut_.high));
  }
  __device__ __forceinline__ i32 load(i32 index) const {
    const i32 key = key_of(index);
    if (!wanted(key)) return -1;
    return checked(load_number<Block>(
        p_.block_table + unit_.sequence * p_.table_stride +
        static_cast<i64>(p_.by_block_size.quotient(key)) * static_cast<i64>(sizeof(Block))));
  }
  __device__ __forceinline__ i32 checked(i64 block) const {
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
  template <bool kPacked>
  __device__ __forceinline__ i64 in_slot(u32 byte) const {
    if constexpr (!kPacked) return byte;
    return static_cast<i64>(byte / pack) * pack_stride + byte % pack;
  }
};

// The block of the key at this place of a tile.
template <int kRun>
__device__ __forceinline__ i32 block_of(const Blocks& blocks, i32 row) {
  if constexpr (kRun == 1) return __shfl_sync(kWarp, blocks.low, row);
  return kRun == kKeys || row < kRun ? blocks.low : blocks.high;
}

// Starts a warp's copy of the tile of keys from `key` on, kBytes of each, to shared memory, kVec bytes
// at a time. Keys that are not there get zeros; `complete`: all are there. kPacked: a slot has several
// packs. kHeads: so many neighbouring heads, whose tiles are `apart` bytes from one another.
template <typename T, int kBytes, int kVec, int kRun, bool kPacked, int kHeads>
__device__ __forceinline__ void copy_tile(char* to, i32 apart, const Source& from, const Params& p,
                                          const Cut& cut, const Blocks& blocks, i32 key,
                                          bool complete) {
  const i32 lane = static_cast<i32>(threadIdx.x % 32);
  // Where the runs' first keys are.
  const auto run_at = [&](bool high) {
    const i32 first = high ? key + kRun : key;
    return from.head + ((high ? blocks.high : blocks.low) * from.block_stride +
                        p.by_block_size.remainder(first, p.block_size) * from.slot_stride);
  };
  if constexpr (kRun > 1 && kVec == 16 && kPacked) {
    if (complete && from.pack == 16) {
      const i32 row = lane % kKeys, first = lane / kKeys;
      const char* its = run_at(kRun < kKeys && row >= kRun) +
                        (row % kRun * from.slot_stride + first * from.pack_stride);
#pragma unroll
      for (i32 base = 0; base < T::kChunks; base += 32 / kKeys) {
        const i32 chunk = base + first;
        // The last chunks may have no elements, or not be there.
        const bool inside = kBytes == T::kChunks * 16 || chunk * 16 < kBytes;
        if (T::kChunks % 2 == 0 || chunk < T::kChunks) {
          copy_async<16>(to + T::at(row, chunk), inside ? its : from.head, inside);
        }
        its += 32 / kKeys * from.pack_stride;
      }
      return;
    }
  }
  if constexpr (kRun > 1 && kVec >= 4 && kBytes == T::kChunks * 16 && !kPacked) {
    // The lanes take pieces one after the other, and after some rows the same ones again.
    constexpr i32 kPieces = kHeads * kBytes / kVec;
    constexpr i32 kCommon = kPieces % 32 == 0   ? 32
                            : kPieces % 16 == 0 ? 16
                            : kPieces % 8 == 0  ? 8
                            : kPieces % 4 == 0  ? 4
                            : kPieces % 2 == 0  ? 2
                                                : 1;
    constexpr i32 kTogether = 32 / kCommon;  // rows
    if constexpr (kTogether <= kKeys) {
      if (complete) {
        constexpr i32 kOneRun = kTogether > kRun ? kKeys : kRun;  // of a lane's rows
#pragma unroll
        for (i32 base = 0; base < kKeys; base += kOneRun) {
          const char* const first = run_at(base > 0);
#pragma unroll
          for (i32 part = 0; part < kPieces / kCommon; ++part) {
            const i32 at = part * 32 + lane, row = at / kPieces, away = at % kPieces * kVec;
            const i32 byte = away % kBytes;
            char* const its_tile = to + away / kBytes * apart;
            const char* its = first + (row * from.slot_stride + away);
            if (kTogether > kRun && row >= kRun) its = run_at(true) + (row % kRun * from.slot_stride + away);
#pragma unroll
            for (i32 i = base; i < base + kOneRun; i += kTogether) {
              copy_async<kVec>(its_tile + T::at(row + i, byte / 16) + byte % 16, its, true);
              its += kTogether * from.slot_stride;
            }
          }
        }
        return;
      }
    }
  }
  constexpr i32 kAll = kKeys * T::kChunks;
#pragma unroll 1
  for (i32 i = 0; i < kHeads * ((kAll + 31) / 32); ++i) {
    const i32 head = i / ((kAll + 31) / 32), at = i % ((kAll + 31) / 32) * 32 + lane;
    const i32 row = at / T::kChunks % kKeys, chunk = at % T::kChunks;
    const char* const its_head = from.head + head * kBytes;
    const i32 its_block = block_of<kRun>(blocks, row);
    const u32 its_slot = p.by_block_size.remainder(key + row, p.block_size);
    const bool present = its_block >= 0 && key + row >= cut.low && key + row < cut.high;
    const i64 away = present ? its_block * from.block_stride + its_slot * from.slot_stride : 0;
    if (kAll % 32 == 0 || at < kAll) {
#pragma unroll
      for (i32 piece = 0; piece < 16; piece += kVec) {
        // The last chunks may have no elements: nothing is read for them.
        const bool inside = kBytes == T::kChunks * 16 || chunk * 16 + piece < kBytes;
        copy_async<kVec>(to + head * apart + T::at(row, chunk) + piece,
                         inside ? its_head + away + from.template in_slot<kPacked>(chunk * 16 + piece)
                                : from.head,
                         present && inside);
      }
    }
  }
}

// Starts a warp's copy of the scales of a tile's keys, and behind them of its values, to shared memory,
// one for each lane. The arguments are as of copy_tile.
template <int kRun>
__device__ __forceinline__ void copy_scales(float* to, const Params& p, u32 head, const Cut& cut,
                                            const Blocks& blocks, i32 key) {
  const i32 lane = static_cast<i32>(threadIdx.x % 32), row = lane % kKeys;
  const bool of_key = lane < kKeys;
  const char* const from = of_key ? p.k_scale_cache + head * p.k_scale_head_stride
                                  : p.v_scale_cache + head * p.v_scale_head_stride;
  const i64 block_stride = of_key ? p.k_scale_block_stride : p.v_scale_block_stride;
  const i64 slot_stride = of_key ? p.k_scale_slot_stride : p.v_scale_slot_stride;
  const i32 its_block = block_of<kRun>(blocks, row);
  const u32 its_slot = p.by_block_size.remainder(key + row, p.block_size);
  const bool present = its_block >= 0 && key + row >= cut.low && key + row < cut.high;
  const i64 away = present ? its_block * block_stride + its_slot * slot_stride : 0;
  copy_async<4>(reinterpret_cast<char*>(to + lane), from + away, present);
}

// The tiles of a thread block in shared memory: kStages of each warp, which copies them ahead of use.
template <typename Copied, int kKeySize, int kValueSize, int kKeyVec, int kValueVec, int kRun,
          bool kByToken, int kStages, int kTeams, typename Block>
class Copies {
  using In = typename Copied::In;
  using KeyTile = typename Copied::KeyTile;
  using ValueTile = typename Copied::ValueTile;
  static constexpr int kScales = In::kTokenScales ? 2 * kKeys : 0;  // of a tile

 public:
  // Bytes behind the tiles: which of their keys are missing, and then their scales.
  static constexpr int kMore = kWarps * kStages * 4 * (1 + kScales);

  __device__ __forceinline__ Copies(const Params& p, const Unit& unit, const Cut& cut,
                                    const Tiles& tiles, u32 head, char* shared, i32 apart, char* more,
                                    const Guess<Block, kRun>* guess = nullptr)
      : p_(p),
        cut_(cut),
        tiles_(tiles),
        head_(head),
        turns_(tiles.turns()),
        shared_(shared),
        apart_(apart),
        missing_(reinterpret_cast<u32*>(more)),
        scales_(reinterpret_cast<float*>(more + kWarps * kStages * 4)),
        pages_(p, unit, cut, tiles, guess) {}

  // Where the tile of a warp is.
  static __device__ __forceinline__ int keys_at(int warp, int stage) {
    return (warp * kStages + stage) * Copied::kBytes;
  }
  static __device__ __forceinline__ int values_at(int warp, int stage) {
    return keys_at(warp, stage) + KeyTile::kSize;
  }
  // Of those whose block is not in the cache a bit each.
  __device__ __forceinline__ u32 absent(int warp, int stage) const {
    return missing_[warp * kStages + stage];
  }
  __device__ __forceinline__ const float* key_scales(int warp, int stage) const {
    return scales_ + (warp * kStages + stage) * kScales;
  }
  __device__ __forceinline__ const float* value_scales(int warp, int stage) const {
    return key_scales(warp, stage) + kKeys;
  }

  // Starts the copy of this warp's tile at a turn.
  __device__ __forceinline__ void request(i32 index) {
    const i32 warp = warp_of_team(), lane = static_cast<i32>(threadIdx.x % 32);
    const i32 tile = tiles_.of(warp, index);
    const Blocks blocks = index < turns_ ? pages_.next(index) : Blocks{-1, -1};
    if (tile < tiles_.end) {
      const i32 key = (cut_.first + tile) * kKeys;
      const i32 stage = index % kStages;
      const bool there = blocks.low >= 0 && blocks.high >= 0;
      const bool complete = there && key >= cut_.low && key + kKeys <= cut_.high;
      // Of two teams one copies the keys of both heads, and one the values.
      const u32 first_head = head_ - (kTeams == 1 ? 0 : team());
      char* const first = shared_ - (kTeams == 1 ? 0 : static_cast<i32>(team()) * apart_);
      if (kTeams == 1 || team() == 0) {
        copy_tile<KeyTile, kKeySize * In::kBytes, kKeyVec, kRun, kByToken, kTeams>(
            first + keys_at(warp, stage), apart_,
            {p_.key_cache + first_head * p_.key_head_stride, p_.key_block_stride, p_.key_slot_stride,
             p_.key_pack_stride, p_.key_pack},
            p_, cut_, blocks, key, complete);
      }
      const char* const value_head = p_.value_cache + first_head * p_.value_head_stride;
      if constexpr (kByToken) {
        constexpr int kPieces = kKeys * In::kBytes / kValueVec;  // of a row; each lane's are alike
        constexpr int kTogether = 32 / kPieces;                  // rows
        const int piece = lane % kPieces * kValueVec, in_tile = piece / In::kBytes;
        const i32 its_block = block_of<kRun>(blocks, in_tile);
        const u32 byte =  // of the block's
            p_.by_block_size.remainder(key + in_tile, p_.block_size) * In::kBytes;
        const bool present = its_block >= 0;
        const char* its = value_head;
        if (present) {
          its += its_block * p_.value_block_stride + byte / p_.value_pack * p_.value_pack_stride +
                 byte % p_.value_pack + lane / kPieces * p_.value_slot_stride;
        }
        const i64 step = present ? kTogether * p_.value_slot_stride : 0;
        char* const column = shared_ + values_at(warp, stage) + piece % 16;
#pragma unroll
        for (int base = 0; base < kValueSize; base += kTogether) {
          const int row = base + lane / kPieces;
          if (kValueSize % kTogether == 0 || row < kValueSize) {
            copy_async<kValueVec>(column + ValueTile::at(row, piece / 16), its, present);
          }
          its += step;
        }
      } else if (kTeams == 1 || team() == 1) {
        copy_tile<ValueTile, kValueSize * In::kBytes, kValueVec, kRun, false, kTeams>(
            first + values_at(warp, stage), apart_,
            {value_head, p_.value_block_stride, p_.value_slot_stride, p_.value_pack_stride,
             p_.value_pack},
            p_, cut_, blocks, key, complete);
      }
      if constexpr (In::kTokenScales) {
        copy_scales<kRun>(scales_ + (warp * kStages + stage) * kScales, p_, head_, cut_, blocks, key);
      }
      // Of the tile's keys a bit each.
      const u32 absent = kRun == 1 ? __ballot_sync(kWarp, blocks.low < 0) & 0xffffu
                                   : (blocks.low < 0 ? 0xffu : 0u) | (blocks.high < 0 ? 0xff00u : 0u);
      if (lane == 0) missing_[warp * kStages + stage] = absent;
    }
    commit_copies();
  }

  // By token, what was copied with the values of tokens that are there becomes zeros.
  __device__ __forceinline__ void clear_others(i32 index) const {
    const i32 warp = warp_of_team(), lane = static_cast<i32>(threadIdx.x % 32);
    const i32 tile = tiles_.of(warp, index), key = (cut_.first + tile) * kKeys;
    if (tile < tiles_.end && (key < cut_.low || key + kKeys > cut_.high)) {
      char* const at = shared_ + values_at(warp, index % kStages);
      for (int i = lane; i < kValueSize * kKeys; i += 32) {
        const int token = i % kKeys;
        if (key + token >= cut_.low && key + token < cut_.high) continue;
        const int byte = token * In::kBytes;
        char* const element = at + ValueTile::at(i / kKeys, byte / 16) + byte % 16;
        if constexpr (In::kNarrow) *element = 0;
        else *reinterpret_cast<u16*>(element) = 0;
      }
    }
  }

 private:
  const Params& p_;
  const Cut& cut_;
  const Tiles& tiles_;
  const u32 head_;
  const i32 turns_;
  char* const shared_;
  const i32 apart_;  // of the teams' tiles
  u32* const missing_;
  float* const scales_;
  Pages<Block, kRun> pages_;
};

// The logarithm of the power of two next below a scale's magnitude: from -64, so that sums of weights are
// not too large, to 120, so that they do not vanish.
__device__ __forceinline__ float magnitude(float scale) {
  const i32 biased = static_cast<i32>(__float_as_uint(scale) >> 23 & 0xffu);
  return static_cast<float>(min(max(biased, 63), 247) - 127);
}

// Joins the row's sink to what its sums have, and says what these are then multiplied with; writes the
// log-sum-exp if so told.
template <typename Query>
__device__ __forceinline__ float end_row(const Params& p, const Row& row, Joined joined, float sum,
                                         float v_scale, bool writes) {
  const bool any = sum != 0.0f;  // keys; of logits that are no numbers the sum is none
  float weight = v_scale;
  if (p.sinks && any) {
    const char* const at = p.sinks + row.head * p.sink_stride;
    const float sink = p.float_sinks ? *reinterpret_cast<const float*>(at)
                                     : Query::decode(*reinterpret_cast<const u16*>(at));
    joined.join(sink * kLog2E);
    sum = joined.sum(sum, 1.0f);
    weight *= joined.before;
  }
  if (p.lse && writes) {
    *reinterpret_cast<float*>(p.lse + row.token * p.lse_stride + row.head * p.lse_head_stride) =
        any ? (joined.largest + log2f(sum)) * kLn2 : __uint_as_float(0xff800000u);
  }
  return any ? weight / sum : 0.0f;
}

// Two columns of a row's output: sums and their weight, which is 0 where there are no keys.
template <typename Query>
__device__ __forceinline__ u32 weighted(float2 sums, float weight) {
  return weight != 0.0f ? pack_pair<Query>(sums.x * weight, sums.y * weight) : 0u;
}

// Writes kCount pairs of columns of a row's output, the first at `column`, and each kApart columns behind
// the one before; of the last not all may be there. Whether pairs can be written is asked once: a branch
// for each of many pairs takes long to compile.
template <int kValueSize, int kApart, int kCount>
__device__ __forceinline__ void write_pairs(const Params& p, const Row& row, int column,
                                            const u32 (&pairs)[kCount]) {
  char* const at = p.out + row.token * p.out_stride + row.head * p.out_head_stride + column * 2;
  if (kValueSize % 2 == 0 && p.pairs_out) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i * kApart < kValueSize) *reinterpret_cast<u32*>(at + i * kApart * 2) = pairs[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      u16* const both = reinterpret_cast<u16*>(at + i * kApart * 2);
      const int first = column + i * kApart;
      if (first < kValueSize) both[0] = static_cast<u16>(pairs[i]);
      if (first + 1 < kValueSize) both[1] = static_cast<u16>(pairs[i] >> 16);
    }
  }
}

// The ALiBi slope of a row.
__device__ __forceinline__ float slope_of(const Params& p, const Unit& unit, const Row& row) {
  if (!row.valid) return 0.0f;
  return *reinterpret_cast<const float*>((p.alibi_slopes ? p.alibi_slopes : p.sequence_slopes) +
                                         unit.sequence * p.slope_sequence_stride +
                                         row.head * p.slope_stride);
}

// cap * tanh(score / cap). A series where it is nearly the score: the difference of two numbers as large
// as the cap would be off by a part of the cap. No product may become one instruction with what follows
// in one kernel and not in another.
__device__ __forceinline__ float capped(float score, float cap, float cap_inverse) {
  const float ratio = score * cap_inverse, square = ratio * ratio;
  const float bent = ((-17.0f / 315.0f * square + 2.0f / 15.0f) * square - 1.0f / 3.0f) * square;
  const float whole = 1.0f - 2.0f * __fdividef(1.0f, power_of_two(2.0f * kLog2E * ratio) + 1.0f);
  return fabsf(ratio) < 0.3f ? __fmaf_rn(score, bent, score) : __fmul_rn(cap, whole);
}

// The scale of a head's elements, where they have one: an array's, or one that the host knows.
template <typename In>
__device__ __forceinline__ float head_scale(const char* array, i64 stride, u32 head, float value) {
  if constexpr (!In::kNarrow || In::kTokenScales) return 1.0f;
  return array ? *reinterpret_cast<const float*>(array + head * stride) : value;
}


// What a lane has of a row of the query, in the fragments of its half of a tile's rows.
template <typename Query, typename Type, int kSize, bool kNarrow, int kSteps>
__device__ __forceinline__ void load_query(const Params& p, const char* row, int pair, int half,
                                           u32 (&queries)[kSteps][4]) {
  const auto element_of = [&](int step, int i) {
    return step * 16 + (kNarrow ? pair * 4 + i * 2 : pair * 2 + i * 8);
  };
  if (p.pairs_in && kSize % 16 == 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const char* const at = row + element_of(step, i) * 2;
        queries[step][2 * i + half] = static_cast<u32>(load_number<i32>(at));
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u32& bits = queries[step][2 * i + half];
        bits = as_operands<Query, Type>(bits);
      }
    }
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int element = element_of(step, i);
        queries[step][2 * i + half] =
            query_pair<Query, Type>(row + element * 2, p.pairs_in, kSize - element);
      }
    }
  }
}

// What a thread has of the results of a row: its maximum and sum, and kOwn pairs of columns.
template <int kOwn>
struct Results {
  Joined joined;
  float sum = 0.0f;
  float2 pairs[kOwn] = {};

  __device__ __forceinline__ void join_total(float2 total) {
    joined.join(total.x);
    sum = joined.sum(sum, total.y);
  }
  __device__ __forceinline__ void join_pair(int own, float2 pair) {
    pairs[own].x = joined.sum(pairs[own].x, pair.x);
    pairs[own].y = joined.sum(pairs[own].y, pair.y);
  }
  __device__ __forceinline__ void join(const Results& other) {
    join_total({other.joined.largest, other.sum});
#pragma unroll
    for (int own = 0; own < kOwn; ++own) join_pair(own, other.pairs[own]);
  }
};

// The results of parts, joined in their order: in groups first.
template <int kOwn>
struct Folded {
  Results<kOwn> all, group;
  i32 parts = 0;  // of the group

  __device__ __forceinline__ void join(const Results<kOwn>& part, i32 of_group) {
    group.join(part);
    if (++parts == of_group) close();
  }
  __device__ __forceinline__ void close() {
    all.join(group);
    group = {};
    parts = 0;
  }
};

// What a thread block takes of one head's work where all blocks take equal shares: the turns of its
// warps, those of all sequences one after the other, are numbered, and a block takes the parts whose
// first turn is one of its own.
struct Share {
  u32 each;        // turns of a block
  u32 begin, end;  // of this block
  u32 before;      // turns of the sequences before
  i64 sequence;

  // `block` is one of `blocks`. `numbers` is shared memory for kWarps + 2 numbers, free again when
  // this returns.
  template <typename Length>
  static __device__ __forceinline__ Share find(const Params& p, u32 block, u32 blocks, u32* numbers) {
    constexpr u32 kThreads = kWarps * 32;
    const u32 count = static_cast<u32>(p.sequences), of_thread = (count + kThreads - 1) / kThreads;
    const u32 first = threadIdx.x * of_thread, last = min(first + of_thread, count);
    u32 mine = 0;
    for (u32 i = first; i < last; ++i) mine += turns_of<Length>(p, i);
    u32 until = mine;  // of this warp's threads, up to this one
#pragma unroll
    for (u32 lanes = 1; lanes < 32; lanes *= 2) {
      const u32 other = __shfl_up_sync(kWarp, until, lanes);
      if (threadIdx.x % 32 >= lanes) until += other;
    }
    if (threadIdx.x % 32 == 31) numbers[threadIdx.x / 32] = until;
    __syncthreads();
    u32 total = 0, before = until - mine;
#pragma unroll
    for (u32 warp = 0; warp < kWarps; ++warp) {
      if (warp < threadIdx.x / 32) before += numbers[warp];
      total += numbers[warp];
    }
    Share share;
    share.each = (total + blocks - 1) / blocks;
    share.begin = min(block * share.each, total);
    share.end = min(share.begin + share.each, total);
    if (before <= share.begin && share.begin < before + mine) {
      u32 at = first;
      for (u32 turns = of_thread == 1 ? mine : turns_of<Length>(p, at); before + turns <= share.begin;) {
        before += turns;
        turns = turns_of<Length>(p, ++at);
      }
      numbers[kWarps] = at;
      numbers[kWarps + 1] = before;
    }
    __syncthreads();
    share.sequence = numbers[kWarps];
    share.before = numbers[kWarps + 1];
    __syncthreads();
    return share;
  }

  __device__ __forceinline__ bool more() const { return before < end && begin < end; }
  // Goes on to the next sequence.
  __device__ __forceinline__ void go_on(const Cut& cut) {
    before += turns_of(cut);
    ++sequence;
  }
  // The first part of the sequence that is not for the blocks before turn `turn`.
  __device__ __forceinline__ i32 part_at(const Cut& cut, u32 turn) const {
    const u32 turns = turn > before ? turn - before : 0;
    return static_cast<i32>(min((turns + (1u << cut.log) - 1) >> cut.log, static_cast<u32>(cut.parts)));
  }
  // The block that a part of the sequence is for.
  __device__ __forceinline__ u32 block_of(const Cut& cut, i32 part) const {
    return (before + (static_cast<u32>(part) << cut.log)) / each;
  }

 private:
  static __device__ __forceinline__ u32 turns_of(const Cut& cut) {
    return max((cut.tiles + kWarps - 1) / kWarps, 1);
  }
  template <typename Length>
  static __device__ __forceinline__ u32 turns_of(const Params& p, u32 sequence) {
    return turns_of(Cut(p, find_unit<Length, void>(p, sequence, nullptr), false));
  }
};

// Attends to up to twice kWide rows, of which each warp has two tiles. There are no parts.
template <typename Query, typename Cached, int kKeySize, int kValueSize, int kKeyVec, int kValueVec,
          int kRun, bool kByToken, bool kCapped, bool kSloped, int kStages, int kShared,
          typename Block>
__device__ __forceinline__ void attend_tall(const Params& p, char* shared, const Unit& unit, u32 head) {
  using In = Operands<Query, Cached>;
  using Type = typename In::Type;
  using Copied = Stage<In, kKeySize, kValueSize, kByToken>;
  using Copying =
      Copies<Copied, kKeySize, kValueSize, kKeyVec, kValueVec, kRun, kByToken, kStages, 1, Block>;
  constexpr int kSteps = Copied::kSteps, kColumns = Copied::kOutSize / 8;
  constexpr int kTogether = 2;  // tiles of keys
  constexpr int kTiles = 2, kHalves = 2 * kTiles;  // of rows
  constexpr int kCopyBytes = kWarps * kStages * Copied::kBytes;
  static_assert(kCopyBytes + kWarps * kTiles * kSteps * 512 <= kShared - Copying::kMore,
                "room for queries");

  const i32 warp = warp_of_team(), lane = static_cast<i32>(threadIdx.x % 32);
  const int in_half = lane / 4, pair = lane % 4;
  const int used = unit.tokens * static_cast<int>(p.group), first_row = warp * kTiles * 16;
  const auto row_of = [&](int half) {
    return find_row<false>(p, unit, head, 0, first_row + half * 8 + in_half);
  };
  const Cut cut(p, unit, true);
  const Tiles tiles(cut, 0, cut.parts);
  const i32 turns = tiles.turns();
  Copying copies(p, unit, cut, tiles, head, shared, 0, shared + kShared - Copying::kMore);
  // --- queries: in shared memory, as fragments
  uint4* const fragments =
      reinterpret_cast<uint4*>(shared + kCopyBytes) + warp * kTiles * kSteps * 32 + lane;
#pragma unroll 1
  for (int tile = 0; tile < kTiles; ++tile) {
    u32 queries[kSteps][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = row_of(2 * tile + half);
      const char* const at = p.query + row.token * p.query_stride + row.head * p.query_head_stride;
      if (row.valid) load_query<Query, Type, kKeySize, In::kNarrow>(p, at, pair, half, queries);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const u32(&four)[4] = queries[step];
      fragments[(tile * kSteps + step) * 32] = {four[0], four[1], four[2], four[3]};
    }
  }
  if (unit.length != unit.stated && threadIdx.x == 0) {
    record_fault(kSeqLens, unit.sequence, unit.stated, longest(p) + 1);
  }
  float slopes[kHalves];
  i32 positions[kHalves];
  if constexpr (kSloped) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const Row row = row_of(half);
      slopes[half] = slope_of(p, unit, row);
      positions[half] = row.position;
    }
  }
  const float k_scale = head_scale<In>(p.k_scale, p.k_scale_stride, head, p.k_scale_value);
  const float scale = p.scale * p.base_scale * k_scale * (kCapped || kSloped ? 1.0f : kLog2E);
  const float cap_inverse = kCapped ? 1.0f / p.soft_cap : 0.0f;
  // Keys that all rows of this warp see.
  const i32 all_low = find_row<false>(p, unit, head, 0, min(first_row + kTiles * 16, used) - 1).low;
  const i32 all_high = find_row<false>(p, unit, head, 0, first_row).high;
  const auto key_of = [&](int i) { return Copied::key_of_place(i / 2 * 8 + pair * 2 + i % 2); };

  // Of half a tile of rows.
  constexpr auto score_of = [](float(&scores)[kTogether][kTiles][2][4], int half, int i) -> float& {
    return scores[i / 4][half / 2][i % 4 / 2][2 * (half % 2) + i % 2];
  };
  float largest[kHalves], sums[kHalves] = {}, out[kTiles][kColumns][4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) largest[half] = kNone;
  for (i32 index = -1; index < turns; ++index) {
    if (index >= 0) {
      wait_for_copies<0>();
      if constexpr (kByToken) {
        __syncwarp();
        copies.clear_others(index);
      }
      __syncthreads();  // what is requested next is copied to where nothing is read any more
    }
    copies.request(index + 1);
    if (index < 0) continue;
    const i32 stage = index % kStages;
#pragma unroll 1
    for (int copier = 0; copier < kWarps; copier += kTogether) {
      const i32 first_tile = tiles.of(copier, index);
      const int count = min(kTogether, tiles.end - first_tile);
      if (count <= 0) break;
      float scores[kTogether][kTiles][2][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < Copied::KeyTile::kChunks; chunk += 2) {
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          Copied::read_keys(shared, copies.keys_at(copier + t, stage), chunk,
                            [&](int step, u32 low0, u32 low1, u32 high0, u32 high1) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              const uint4 four = fragments[(tile * kSteps + step) * 32];
              const u32 queries[4] = {four.x, four.y, four.z, four.w};
              multiply_add<Type>(scores[t][tile][0], queries, low0, low1);
              multiply_add<Type>(scores[t][tile][1], queries, high0, high1);
            }
          });
        }
      }

      const i32 key = (cut.first + first_tile) * kKeys;
      bool all = key >= all_low && key + kTogether * kKeys <= all_high && count == kTogether;
      u32 absent[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        absent[t] = t < count ? copies.absent(copier + t, stage) : kWarp;
        all = all && absent[t] == 0;
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int i = 0; i < kTogether * 4; ++i) {
          float& score = score_of(scores, half, i);
          const int t = i / 4, in_tile = key_of(i % 4);
          score *= In::kTokenScales ? copies.key_scales(copier + t, stage)[in_tile] * scale : scale;
          if constexpr (kCapped) score = capped(score, p.soft_cap, cap_inverse);
          if constexpr (kSloped) {
            score += slopes[half] * static_cast<float>(key + t * kKeys + in_tile - positions[half]);
          }
          if constexpr (kCapped || kSloped) score *= kLog2E;
        }
      }
      if (!all) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const Row row = row_of(half);
#pragma unroll
          for (int i = 0; i < kTogether * 4; ++i) {
            const int in_tile = key_of(i % 4);
            const i32 its_key = key + i / 4 * kKeys + in_tile;
            if (its_key < row.low || its_key >= row.high || (absent[i / 4] >> in_tile & 1)) {
              score_of(scores, half, i) = __uint_as_float(0xff800000u);  // minus infinity
            }
          }
        }
      }
      float most[kHalves];
      bool grows = false;
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        most[half] = largest[half];
#pragma unroll
        for (int i = 0; i < kTogether * 4; ++i) {
          float score = score_of(scores, half, i);
          if constexpr (In::kTokenScales) {
            score += magnitude(copies.value_scales(copier + i / 4, stage)[key_of(i % 4)]);
          }
          most[half] = fmaxf(most[half], score);
        }
        grows |= most[half] > largest[half] + kSlack;
      }
      if (__any_sync(kWarp, grows)) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          float now = most[half];
          now = fmaxf(now, __shfl_xor_sync(kWarp, now, 1));
          now = fmaxf(now, __shfl_xor_sync(kWarp, now, 2));
          if (now <= largest[half] + kSlack) now = largest[half];  // whatever the other rows do
          const float weight = power_of_two(largest[half] - now);
          largest[half] = now;
          sums[half] *= weight;
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            out[half / 2][i][2 * (half % 2)] *= weight;
            out[half / 2][i][2 * (half % 2) + 1] *= weight;
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (t >= count) continue;
        u32 weights[kTiles][4];
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float* const two = scores[t][half / 2][i] + 2 * (half % 2);
            float low = power_of_two(two[0] - largest[half]);
            float high = power_of_two(two[1] - largest[half]);
            sums[half] += low + high;
            if constexpr (In::kTokenScales) {
              low *= copies.value_scales(copier + t, stage)[key_of(2 * i)];
              high *= copies.value_scales(copier + t, stage)[key_of(2 * i + 1)];
            }
            weights[half / 2][2 * i + half % 2] = pack_pair<Type>(low, high);
          }
        }
        Copied::read_values(shared, copies.values_at(copier + t, stage),
                            [&](int columns, u32 low0, u32 low1, u32 high0, u32 high1) {
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply_add<Type>(out[tile][2 * columns], weights[tile], low0, low1);
            multiply_add<Type>(out[tile][2 * columns + 1], weights[tile], high0, high1);
          }
        });
      }
    }
  }

  const float v_scale = head_scale<In>(p.v_scale, p.v_scale_stride, head, p.v_scale_value);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const Row row = row_of(half);
    float sum = sums[half];
    sum += __shfl_xor_sync(kWarp, sum, 1);
    sum += __shfl_xor_sync(kWarp, sum, 2);
    if (!row.valid) continue;
    Joined joined;
    joined.largest = largest[half];
    const float weight = end_row<Query>(p, row, joined, sum, v_scale, pair == 0);
    const int j = 2 * (half % 2);
    // Columns next to each other: of one product, or of two that have every second one.
    constexpr bool kAlternate = In::kNarrow && !kByToken;
    u32 here[kColumns / 2], there[kColumns / 2];
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      const float(&first)[4] = out[half / 2][i], (&second)[4] = out[half / 2][i + 1];
      here[i / 2] = weighted<Query>({first[j], kAlternate ? second[j] : first[j + 1]}, weight);
      there[i / 2] = weighted<Query>({kAlternate ? first[j + 1] : second[j], second[j + 1]}, weight);
    }
    const int column = (kAlternate ? 4 : 2) * pair;
    write_pairs<kValueSize, 16>(p, row, column, here);
    write_pairs<kValueSize, 16>(p, row, column + (kAlternate ? 2 : 8), there);
  }
}

// Attends to a unit, or to what the block has of it, and moves `share` on behind it. The template's
// arguments are those of paged_attention; `shared` has kShared bytes.
template <typename Query, typename Cached, int kKeySize, int kValueSize, int kKeyVec, int kValueVec,
          int kRows, bool kTurned, int kRun, bool kByToken, bool kCapped, bool kSloped, int kStages,
          int kShared, int kCluster, int kTeams, typename Block, typename Length, typename Start>
__device__ __forceinline__ void attend(const Params& p, char* shared, const Unit& unit, u32 head,
                                       u32 head_part, u32 rank, Share& share) {
  using In = Operands<Query, Cached>;
  using Type = typename In::Type;
  static_assert(!(In::kTokenScales && kByToken), "columns of scores are keys in their order");
  using Copied = Stage<In, kKeySize, kValueSize, kByToken>;
  using KeyTile = typename Copied::KeyTile;
  constexpr int kSteps = Copied::kSteps, kStageBytes = Copied::kBytes;
  constexpr int kOutSize = Copied::kOutSize;
  constexpr int kColumns = kOutSize / 8;  // tiles of 8 columns of the output
  constexpr int kHalves = kRows == 8 ? 1 : 2;  // of a tile of rows
  constexpr int kTileRows = 8 * kHalves;
  constexpr int kPairs = kOutSize / 2;  // of columns
  // Of results: rows in different banks, unless that is what a tile has no room for. Those of kTurned
  // exchange pairs instead.
  constexpr int kOutRow = kTurned || (kRows != kWide && kTileRows * kPairs * 8 <= kStageBytes &&
                                      kTileRows * (kPairs + 4) * 8 > kStageBytes)
                              ? kPairs
                              : kPairs + 4;
  const auto place_in = [](int row, int column) {
    return row * kOutRow + (kTurned ? column ^ row / 2 % (kPairs % 16 == 0 ? 4 : 2) * 4 : column);
  };
  constexpr int kCopyBytes = kWarps * kStages * kStageBytes;
  constexpr int kResultBytes = kTileRows * kOutRow * 8;  // of a warp
  // They have a place of their own if they stay, or if that of a tile that is done with is too small.
  constexpr bool kOwnPlace = kRows == kWide || kResultBytes > kStageBytes;
  constexpr int kBytes = kCopyBytes + kWarps * ((kOwnPlace ? kResultBytes : 0) + kTileRows * 8);
  using Copying =
      Copies<Copied, kKeySize, kValueSize, kKeyVec, kValueVec, kRun, kByToken, kStages, kTeams, Block>;
  constexpr bool kOne = IsVoid<Start>::value;
  constexpr int kThreads = kWarps * 32;
  // What the blocks of a cluster send to each of them, and it writes: pairs of columns, as many as are
  // for its threads in turn, and totals of rows. Where units are wide, each fetches it.
  constexpr bool kSends = kCluster > 1 && kRows != kWide;
  constexpr int kInTurn = (kSends ? kCluster : 1) * kThreads;
  constexpr int kSent = ((kTileRows * kPairs - 1) / kInTurn + 1) * kThreads;  // of a block
  constexpr int kSentBytes = kSends ? 8 * kCluster * (kSent + kTileRows) : 0;
  constexpr int kUsed = kBytes + Copying::kMore;
  static_assert(kShared == (kUsed > kSentBytes ? kUsed : kSentBytes), "what the host gives");
  constexpr int kOfRow = kThreads / kTileRows;  // threads that join a row's results
  constexpr int kOwn = (kPairs + kOfRow - 1) / kOfRow;

  const i32 warp = warp_of_team(), lane = static_cast<i32>(threadIdx.x % 32);
  const int used = p.head_parts > 1
                       ? static_cast<int>(min(p.group - head_part * p.part_rows, p.part_rows))
                       : unit.tokens * static_cast<int>(p.group);
  const bool wide = kRows == kWide && used > kTileRows;  // each warp has rows of its own

  // --- what may be on its way while the length is read
  const Guess<Block, kRun> guess(p, unit, kCluster == 1);
  // Queries, rows row and row + 8 of the tile.
  const int first_row = wide ? warp * kTileRows : 0;
  const int in_half = lane / 4, pair = lane % 4;
  u32 queries[kSteps][4] = {};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const Row row = find_row<kOne>(p, unit, head, head_part, first_row + half * 8 + in_half);
    const char* const at = p.query + row.token * p.query_stride + row.head * p.query_head_stride;
    if (row.valid) {
      load_query<Query, Type, kKeySize, In::kNarrow>(p, at, pair, half, queries);
    }
  }

  const Cut cut(p, unit, wide);
  i32 from = 0, to = cut.parts;  // the parts to take
  if constexpr (kCluster > 1) {
    from = static_cast<i32>(rank) * cut.group;
    to = min(from + cut.group, to);
  } else if constexpr (kCluster == 0) {
    from = share.part_at(cut, share.begin);
    to = share.part_at(cut, share.end);
    if (from >= to) {
      share.go_on(cut);
      return;
    }
  }
  const Tiles tiles(cut, from, to);
  const i32 turns = tiles.turns();
  // --- copies, ahead of use
  Copying copies(p, unit, cut, tiles, head, shared, kOfTeam<kShared>, shared + kBytes,
                 kCluster == 1 ? &guess : nullptr);
  for (i32 index = 0; index < kStages - 1; ++index) copies.request(index);
  // --- rows
  if (unit.length != unit.stated && threadIdx.x == 0) {
    record_fault(kSeqLens, unit.sequence, unit.stated, longest(p) + 1);
  }
  // Those that this lane has scores of.
  constexpr int kHeld = kTurned ? 2 : kHalves;
  const auto held_row = [&](int held) { return kTurned ? 2 * pair + held : held * 8 + in_half; };
  Row rows[kHeld];
  float slopes[kHeld];
#pragma unroll
  for (int held = 0; held < kHeld; ++held) {
    rows[held] = find_row<kOne>(p, unit, head, head_part, first_row + held_row(held));
    slopes[held] = kSloped ? slope_of(p, unit, rows[held]) : 0.0f;
  }
  const float k_scale = head_scale<In>(p.k_scale, p.k_scale_stride, head, p.k_scale_value);
  const float scale = p.scale * p.base_scale * k_scale * (kCapped || kSloped ? 1.0f : kLog2E);
  const float cap_inverse = kCapped ? 1.0f / p.soft_cap : 0.0f;
  // Keys that all rows of this warp see: those between the last row's first and the first row's last.
  const int last_row = first_row + kTileRows < used ? first_row + kTileRows - 1 : used - 1;
  const i32 all_low = find_row<kOne>(p, unit, head, head_part, last_row).low;
  const i32 all_high = find_row<kOne>(p, unit, head, head_part, first_row).high;

  // --- tiles
  // Scores of a tile are those of kScores products; this lane has kLaneKeys of each row that it holds.
  constexpr int kScores = kTurned ? 1 : 2, kLaneKeys = 2 * kScores;
  const auto key_of = [&](int i) {
    return Copied::key_of_place(kTurned ? i * 8 + in_half : i / 2 * 8 + pair * 2 + i % 2);
  };
  constexpr auto score_of = [](float(&scores)[kScores][4], int held, int i) -> float& {
    return kTurned ? scores[0][2 * i + held] : scores[i / 2][2 * held + i % 2];
  };
  constexpr int kOuts = kTurned ? kColumns / 2 : kColumns;  // products that make the output
  float largest[kHeld], sums[kHeld], out[kOuts][4];
  const auto begin = [&] {
#pragma unroll
    for (int held = 0; held < kHeld; ++held) largest[held] = kNone, sums[held] = 0.0f;
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  };
  // The lanes that hold the same row.
  constexpr int kNextLane = kTurned ? 4 : 1, kRowLanes = kTurned ? 8 : 4;
  begin();
  // The results of the warps; of a wide unit those of all parts so far.
  float2* const totals = reinterpret_cast<float2*>(shared + kBytes) - kWarps * kTileRows;
  const auto place_of = [&](int of_warp, int stage) {
    char* const at = kOwnPlace ? shared + kCopyBytes + of_warp * kResultBytes
                               : shared + (of_warp * kStages + stage) * kStageBytes;
    return reinterpret_cast<float2*>(at);
  };
  if (wide) {
    for (int i = lane; i < kTileRows * kOutRow; i += 32) place_of(warp, 0)[i] = {0.0f, 0.0f};
    if (lane < kTileRows) totals[warp * kTileRows + lane] = {kNone, 0.0f};
    __syncwarp();
  }
  // What this thread joins, otherwise.
  const int its_row = static_cast<int>(thread_of_team()) / kOfRow, its_column = threadIdx.x % kOfRow;
  const auto has = [&](int own) { return kPairs % kOfRow == 0 || its_column + own * kOfRow < kPairs; };
  Folded<kOwn> folded;
  // The scratch memory of a block, in slots of results: the pairs of all rows, and then their totals.
  // A block has a slot for each part of a unit that it does not begin, and two for all the parts of
  // one that it begins and does not end: their groups, and what is of the last group.
  const int slot_bytes = static_cast<int>(p.slot_bytes);
  const u32 heads = p.kv_heads * p.head_parts, its_head = head * p.head_parts + head_part;
  const auto slot_at = [&](u32 block, i32 slot) {
    const u64 number = static_cast<u64>(block * heads + its_head) * p.slots + slot;
    return reinterpret_cast<float2*>(p.scratch + p.slots_at + number * slot_bytes);
  };
  const bool shares = kCluster == 0 && (from > 0 || to < cut.parts);  // the unit with other blocks
  u64* const word = reinterpret_cast<u64*>(p.scratch) + unit.sequence * heads + its_head;
  u64 seen = 0;
  if (shares && threadIdx.x == 0) seen = look_at_count(word);
  const auto store = [&](float2* slot, const Results<kOwn>& results) {
    if (its_row >= used) return;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (has(own)) slot[its_row * kPairs + its_column + own * kOfRow] = results.pairs[own];
    }
    if (its_column == 0) {
      slot[used * kPairs + its_row] = {results.joined.largest, results.sum};
    }
  };
  const bool keeps = kCluster != 0 || from == 0;  // joins the parts here
  i32 parts_done = 0;
  // Ends a part. `stage` is that of the last tile.
  const auto end_part = [&](int stage) {
    float2* const outputs = place_of(warp, stage);
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
      const int row = held_row(held), j = 2 * held;
      float sum = sums[held];
#pragma unroll
      for (int apart = kNextLane; apart < kNextLane * kRowLanes; apart *= 2) {
        sum += __shfl_xor_sync(kWarp, sum, apart);
      }
      float2& total = totals[warp * kTileRows + row];
      Joined joined;
      if (wide) {
        joined.largest = total.x;
        joined.join(largest[held]);
        sum = joined.sum(total.y, sum);
        largest[held] = joined.largest;
        __syncwarp();
      }
      // Every second column, then the others?
      constexpr bool kAlternate = In::kNarrow && !kByToken;
      if constexpr (kTurned) {
#pragma unroll
        for (int i = 0; i < kOuts; ++i) {
          if constexpr (kAlternate) {
            outputs[place_in(row, i * 8 + in_half)] = {out[i][held], out[i][2 + held]};
          } else {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float2& both = outputs[place_in(row, i * 8 + half * 4 + in_half / 2)];
              (&both.x)[in_half % 2] = out[i][2 * half + held];
            }
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kOuts; i += 2) {
          // Columns next to each other: of one product, or of two that have every second one.
          float2* const at = outputs + row * kOutRow + i * 4 + (kAlternate ? 2 * pair : pair);
          float2 here = {out[i][j], out[i][j + 1]}, there = {out[i + 1][j], out[i + 1][j + 1]};
          if constexpr (kAlternate) {
            here = {out[i][j], out[i + 1][j]};
            there = {out[i][j + 1], out[i + 1][j + 1]};
          }
          float2& second = at[kAlternate ? 1 : 4];
          if (wide) {
            here = {joined.sum(at->x, here.x), joined.sum(at->y, here.y)};
            there = {joined.sum(second.x, there.x), joined.sum(second.y, there.y)};
          }
          *at = here;
          second = there;
        }
      }
      if (kTurned ? in_half == 0 : pair == 0) total = {largest[held], sum};
    }
    begin();
    if (wide) return;
    __syncthreads();
    if (its_row < used) {
      Results<kOwn> part;
#pragma unroll
      for (int source = 0; source < kWarps; ++source) {
        part.join_total(totals[source * kTileRows + its_row]);
        const float2* const from = place_of(source, stage);
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
          if (has(own)) part.join_pair(own, from[place_in(its_row, its_column + own * kOfRow)]);
        }
      }
      if (keeps) folded.join(part, cut.group);
      else store(slot_at(p.by_heads.quotient(blockIdx.x), parts_done), part);
    }
    ++parts_done;
    __syncthreads();  // what is read here may be copied over
  };
  // Tiles that a warp of a wide unit takes at a time, as registers allow.
  constexpr bool kTwo = kKeySize + kValueSize <= 256 && HasProducts<Type>::value;
  constexpr int kTogether = kRows == kWide && kTwo ? 2 : 1;
  // Whether a tile is requested only when the next but kStages - 1 is there: then no warp reads what is
  // in its place any more, by the same barrier.
  constexpr bool kLate = kRows == kWide || kTeams > 1;
  const i32 of_part = cut.part / kWarps;
  i32 left = of_part;  // turns of this part
  for (i32 index = 0; index < turns; ++index) {
    if constexpr (!kLate) copies.request(index + kStages - 1);
    {
      if (shares && index == 0 && threadIdx.x == 0) begin_count(word, p.scratch_tag, seen);
      wait_for_copies<kLate ? kStages - 2 : kStages - 1>();
      if constexpr (kByToken) {
        __syncwarp();
        copies.clear_others(index);
      }
      if constexpr (kTeams > 1) sync_warps(warp + 1, kTeams);  // those of the same tiles
      else if (wide) __syncthreads();
      else __syncwarp();
    }
    if constexpr (kLate) copies.request(index + kStages - 1);
    const i32 stage = index % kStages;
    for (int turn = 0; turn < (kRows == kWide && wide ? kWarps : 1); turn += kTogether) {
      // The tiles that are taken together, one behind the other.
      const int first_copier = wide ? turn : warp;
      const i32 first_tile = tiles.of(first_copier, index);
      if (first_tile >= tiles.end) break;
      const int count = wide ? min(kTogether, tiles.end - first_tile) : 1;
      float scores[kTogether][kScores][4];
      float most[kHeld];
#pragma unroll
      for (int held = 0; held < kHeld; ++held) most[held] = largest[held];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (t >= count) continue;
        const int copier = first_copier + t;
        // Two chains of products: of every second step.
        float others[kScores][4] = {};
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          for (float& score : scores[t][i]) score = 0.0f;
        }
#pragma unroll
        for (int chunk = 0; chunk < KeyTile::kChunks; chunk += 2) {
          Copied::read_keys(shared, copies.keys_at(copier, stage), chunk,
                            [&](int step, u32 low0, u32 low1, u32 high0, u32 high1) {
            auto& sum = step % 2 ? others : scores[t];
            if constexpr (kTurned) {
              const u32 keys[4] = {low0, high0, low1, high1};
              multiply_add<Type>(sum[0], keys, queries[step][0], queries[step][2]);
            } else {
              multiply_add<Type>(sum[0], queries[step], low0, low1);
              multiply_add<Type>(sum[kScores - 1], queries[step], high0, high1);
            }
          });
        }

        const i32 key = (cut.first + first_tile + t) * kKeys;
        const u32 absent = copies.absent(copier, stage);
        const bool all = key >= all_low && key + kKeys <= all_high && absent == 0;
        // Of this lane's keys. A weight times its value's scale is an operand, which has few bits: so the
        // largest score is found with the scales' magnitudes added.
        float factors[kLaneKeys], magnitudes[kLaneKeys];
        if constexpr (In::kTokenScales) {
#pragma unroll
          for (int i = 0; i < kLaneKeys; ++i) {
            factors[i] = copies.key_scales(copier, stage)[key_of(i)] * scale;
            magnitudes[i] = magnitude(copies.value_scales(copier, stage)[key_of(i)]);
          }
        }
#pragma unroll
        for (int held = 0; held < kHeld; ++held) {
#pragma unroll
          for (int i = 0; i < kLaneKeys; ++i) {
            float& score = score_of(scores[t], held, i);
            const float factor = In::kTokenScales ? factors[i] : scale;
            // Never one instruction with the subtraction below: all kernels are to give the same bits.
            score = __fmul_rn(score + score_of(others, held, i), factor);
            if constexpr (kCapped) score = capped(score, p.soft_cap, cap_inverse);
            if constexpr (kSloped) {
              score += slopes[held] * static_cast<float>(key + key_of(i) - rows[held].position);
            }
            if constexpr (kCapped || kSloped) score *= kLog2E;
          }
          if (!all) {
#pragma unroll
            for (int i = 0; i < kLaneKeys; ++i) {
              const int in_tile = key_of(i);
              if (key + in_tile < rows[held].low || key + in_tile >= rows[held].high ||
                  (absent >> in_tile & 1)) {
                score_of(scores[t], held, i) = __uint_as_float(0xff800000u);  // minus infinity
              }
            }
          }
#pragma unroll
          for (int i = 0; i < kLaneKeys; ++i) {
            const float score = score_of(scores[t], held, i);
            most[held] = fmaxf(most[held], In::kTokenScales ? score + magnitudes[i] : score);
          }
        }
      }
      bool grows = false;
#pragma unroll
      for (int held = 0; held < kHeld; ++held) grows |= most[held] > largest[held] + kSlack;
      if (__any_sync(kWarp, grows)) {
#pragma unroll
        for (int held = 0; held < kHeld; ++held) {
          float now = most[held];
#pragma unroll
          for (int apart = kNextLane; apart < kNextLane * kRowLanes; apart *= 2) {
            now = fmaxf(now, __shfl_xor_sync(kWarp, now, apart));
          }
          if (now <= largest[held] + kSlack) now = largest[held];  // whatever the other rows do
          const float weight = power_of_two(largest[held] - now);
          largest[held] = now;
          sums[held] *= weight;
#pragma unroll
          for (int i = 0; i < kOuts; ++i) {
            out[i][kTurned ? held : 2 * held] *= weight;
            out[i][kTurned ? 2 + held : 2 * held + 1] *= weight;
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (t >= count) continue;
        const int copier = first_copier + t;
        float value_scales[kLaneKeys];
        if constexpr (In::kTokenScales) {
#pragma unroll
          for (int i = 0; i < kLaneKeys; ++i) {
            value_scales[i] = copies.value_scales(copier, stage)[key_of(i)];
          }
        }
        u32 weights[4];
#pragma unroll
        for (int held = 0; held < kHeld; ++held) {
#pragma unroll
          for (int i = 0; i < kLaneKeys; ++i) {
            float& score = score_of(scores[t], held, i);
            score = power_of_two(score - largest[held]);
            sums[held] += score;
            if constexpr (In::kTokenScales) score *= value_scales[i];
          }
        }
        if constexpr (kTurned) {
          // What the lanes have of a key becomes what they have of a row.
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            weights[i] = transpose(pack_pair<Type>(scores[t][0][2 * i], scores[t][0][2 * i + 1]));
          }
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float* const two = scores[t][i / 2] + i % 2 * 2;
            weights[i] = i % 2 < kHalves ? pack_pair<Type>(two[0], two[1]) : 0;
          }
        }
        Copied::read_values(shared, copies.values_at(copier, stage),
                            [&](int columns, u32 low0, u32 low1, u32 high0, u32 high1) {
          if constexpr (kTurned) {
            const u32 values[4] = {low0, high0, low1, high1};
            multiply_add<Type>(out[columns], values, weights[0], weights[1]);
          } else {
            multiply_add<Type>(out[2 * columns], weights, low0, low1);
            multiply_add<Type>(out[2 * columns + 1], weights, high0, high1);
          }
        });
      }
    }
    if constexpr (kRows != kWide) __syncwarp();  // the stage is written to next
    if (--left == 0 || index + 1 == turns) {
      left = of_part;
      end_part(stage);
    }
  }

  // --- joined
  const float v_scale = head_scale<In>(p.v_scale, p.v_scale_stride, head, p.v_scale_value);
  const auto write = [&](int row, int column, const Sums& sums) {
    const Row its = find_row<kOne>(p, unit, head, head_part, row);
    const float weight = end_row<Query>(p, its, sums.joined, sums.sum, v_scale, column == 0);
    const u32 pair[1] = {weighted<Query>({sums.first, sums.second}, weight)};
    write_pairs<kValueSize, 1>(p, its, 2 * column, pair);
  };
  if constexpr (kCluster == 0) {
    if (shares) {
      const u32 first_block = share.block_of(cut, 0), last_block = share.block_of(cut, cut.parts - 1);
      // If a block has no turn of each part, each part is for another one.
      const bool all = share.each >> cut.log > 0;
      const u32 blocks = all ? last_block - first_block + 1 : static_cast<u32>(cut.parts);
      const Share here = share;
      share.go_on(cut);
      if (from == 0) {
        float2* const slot = slot_at(first_block, p.slots - 2);
        store(slot, folded.all);
        store(reinterpret_cast<float2*>(reinterpret_cast<char*>(slot) + slot_bytes), folded.group);
      }
      if (!arrive_block(word, p.scratch_tag, blocks, true)) return;
      // All parts are there: those of the first block are joined, the others come one by one.
      const auto load = [&](const float2* slot, Results<kOwn>& results) {
        if (its_row >= used) return;
        const float2 total = slot[used * kPairs + its_row];
        results.joined.largest = total.x;
        results.sum = total.y;
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
          if (has(own)) results.pairs[own] = slot[its_row * kPairs + its_column + own * kOfRow];
        }
      };
      const i32 joined = here.part_at(cut, (first_block + 1) * here.each);
      // As many at a time as shared memory has room for, and as there are places for addresses.
      __shared__ const char* slots[kMaxParts];
      const int fit = min(kCopyBytes / slot_bytes, kMaxParts);
      for (i32 next = joined - 2; next < cut.parts; next += fit) {
        const int count = min(fit, cut.parts - next);
        if (threadIdx.x < count) {
          const i32 part = next + static_cast<i32>(threadIdx.x);
          const u32 block = part < joined ? first_block : here.block_of(cut, part);
          const i32 slot = part < joined ? static_cast<i32>(p.slots) + part - joined
                                         : part - here.part_at(cut, block * here.each);
          slots[threadIdx.x] = reinterpret_cast<const char*>(slot_at(block, slot));
        }
        __syncthreads();
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
          for (int byte = threadIdx.x * 16; byte < slot_bytes; byte += kThreads * 16) {
            copy_async<16>(shared + i * slot_bytes + byte, slots[i] + byte, true);
          }
        }
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
        for (int i = 0; i < count; ++i) {
          const float2* const slot = reinterpret_cast<const float2*>(shared + i * slot_bytes);
          const i32 part = next + i;
          Results<kOwn> results;
          load(slot, results);
          if (part >= joined) {
            folded.join(results, cut.group);
          } else if (part == joined - 2) {
            folded.all = results;
          } else {
            folded.group = results;
            folded.parts = joined % cut.group;
          }
        }
        __syncthreads();
      }
    } else {
      share.go_on(cut);
    }
  }
  if (folded.parts > 0) folded.close();
  if constexpr (kCluster <= 1) {
    if (wide) {
      __syncthreads();
      for (int at = static_cast<int>(threadIdx.x); at < used * kPairs; at += kThreads) {
        const int row = at / kPairs, column = at % kPairs;
        const float2 total = totals[row], sums = place_of(0, 0)[place_in(row, column)];
        Sums joined;
        joined.join(total.x, total.y, sums);
        write(row, column, joined);
      }
    } else if (its_row < used) {
      const Results<kOwn>& all = folded.all;
      const Row its = find_row<kOne>(p, unit, head, head_part, its_row);
      const float weight = end_row<Query>(p, its, all.joined, all.sum, v_scale, its_column == 0);
      u32 pairs[kOwn];
#pragma unroll
      for (int own = 0; own < kOwn; ++own) pairs[own] = weighted<Query>(all.pairs[own], weight);
      write_pairs<kValueSize, 2 * kOfRow>(p, its, 2 * its_column, pairs);
    }
  } else if constexpr (kSends) {
    const u32 senders = static_cast<u32>((cut.parts + cut.group - 1) / cut.group);
    float2* const sent = reinterpret_cast<float2*>(shared);  // where tiles were
    float2* const sent_totals = sent + kCluster * kSent;
    __shared__ u64 sent_word;
    if (threadIdx.x == 0) begin_arrivals(&sent_word, 1);
    __syncwarp();
    arrive_at_cluster();
    wait_for_cluster();  // all are done with their tiles
    if (rank < senders && its_row < used) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const int at = its_row * kPairs + its_column + own * kOfRow;
        const u32 place = rank * kSent + at / kInTurn * kThreads + at % kThreads;
        const u32 writer = at / kThreads % kCluster;
        if (has(own)) send_to_block(sent + place, folded.all.pairs[own], &sent_word, writer);
      }
      if (its_column < kCluster) {
        send_to_block(sent_totals + rank * kTileRows + its_row,
                      {folded.all.joined.largest, folded.all.sum}, &sent_word, its_column);
      }
    }
    if (threadIdx.x == 0) {
      int count = used;
      for (int at = static_cast<int>(rank) * kThreads; at < used * kPairs; at += kInTurn) {
        count += min(kThreads, used * kPairs - at);
      }
      expect_bytes(&sent_word, senders * count * 8);
    }
    wait_for_sent(&sent_word);
    for (int at = static_cast<int>(rank * kThreads + threadIdx.x); at < used * kPairs; at += kInTurn) {
      const int row = at / kPairs, column = at % kPairs;
      const int place = at / kInTurn * kThreads + static_cast<int>(threadIdx.x);
      Sums joined;
#pragma unroll
      for (u32 other = 0; other < kCluster; ++other) {
        const float2 total = sent_totals[other * kTileRows + row], pair = sent[other * kSent + place];
        if (other < senders) joined.join(total.x, total.y, pair);
      }
      write(row, column, joined);
    }
  } else {
    // Where the other blocks of the cluster find this one's.
    float2* const outputs = place_of(0, 0);
    if (!wide && its_row < used) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        if (has(own)) outputs[place_in(its_row, its_column + own * kOfRow)] = folded.all.pairs[own];
      }
      if (its_column == 0) totals[its_row] = {folded.all.joined.largest, folded.all.sum};
    }
    sync_cluster();
    const auto is_there = [&](u32 other) { return static_cast<i32>(other) * cut.group < cut.parts; };
    for (int at = static_cast<int>(rank * kThreads + threadIdx.x); at < used * kPairs;
         at += kCluster * kThreads) {
      const int row = at / kPairs, column = at % kPairs;
      // All are on their way before the first is used.
      float2 its_totals[kCluster], its_pairs[kCluster];
#pragma unroll
      for (u32 other = 0; other < kCluster; ++other) {
        const u32 block = is_there(other) ? other : 0;
        its_totals[other] = load_from_block(totals + row, block);
        its_pairs[other] = load_from_block(outputs + place_in(row, column), block);
      }
      Sums joined;
#pragma unroll
      for (u32 other = 0; other < kCluster; ++other) {
        if (is_there(other)) joined.join(its_totals[other].x, its_totals[other].y, its_pairs[other]);
      }
      write(row, column, joined);
    }
    arrive_at_cluster();  // the others may still be reading
    wait_for_cluster();
  }
}

// What each of the kernels does; the template's arguments are those of paged_attention.
template <typename Query, typename Cached, int kKeySize, int kValueSize, int kKeyVec, int kValueVec,
          int kRows, bool kTurned, int kRun, bool kByToken, bool kCapped, bool kSloped, int kStages,
          int kShared, int kCluster, bool kTall, int kTeams, typename Block, typename Length,
          typename Start>
__device__ __forceinline__ void run(const Params& p) {
  CUPY_CACHE_DYNAMIC_SHARED(all_shared, kTeams == 1 ? kShared : kTeams * kOfTeam<kShared>);
  char* const shared = all_shared + (kTeams == 1 ? 0 : team() * kOfTeam<kShared>);
  u32* const numbers = reinterpret_cast<u32*>(shared);
  const u32 rank = kCluster > 1 ? blockIdx.x % kCluster : 0;
  const u32 work = kCluster > 1 ? blockIdx.x / kCluster : blockIdx.x * kTeams + (kTeams > 1 ? team() : 0);
  const u32 heads = p.kv_heads * p.head_parts;
  i64 place = p.by_heads.quotient(work);
  u32 head = work - static_cast<u32>(place) * heads, head_part = 0;
  if (p.head_parts > 1) {
    head_part = head % p.head_parts;
    head /= p.head_parts;
  }
  // Later tokens see more keys: they come first, so that none of them is begun late.
  if constexpr (!IsVoid<Start>::value) {
    place = p.by_heads.quotient(gridDim.x / (kCluster > 1 ? kCluster : 1)) - 1 - place;
  }
  Share share;
  if constexpr (kCluster == 0) {
    static_assert(IsVoid<Start>::value && kRows != kWide, "units are sequences");
    share = Share::find<Length>(p, static_cast<u32>(place), p.by_heads.quotient(gridDim.x),
                                numbers);
    if (!share.more()) return;
    place = share.sequence;
  }
  constexpr u32 kMany = 256;  // more units than run at once: then the order matters
  if (IsVoid<Start>::value && kCluster == 1 && gridDim.x * kTeams > kMany && p.sequences > 1 &&
      p.sequences <= kSorted) {
    place = sequence_by_length<Length>(p, static_cast<u32>(place), numbers);
  }
  do {
    Unit unit = find_unit<Length, Start>(p, place, shared);
    if (!unit.any) return;  // as do all blocks of the cluster
    if constexpr (kTall && HasProducts<typename Operands<Query, Cached>::Type>::value) {
      if (unit.count >= p.tall_tokens) {
        // Every second unit comes with the one before it.
        if (unit.before / p.row_tokens % 2 != 0) return;
        unit.tokens = static_cast<i32>(min(unit.count - unit.before, i64{2 * p.row_tokens}));
        attend_tall<Query, Cached, kKeySize, kValueSize, kKeyVec, kValueVec, kRun, kByToken, kCapped,
                    kSloped, kStages, kShared, Block>(p, shared, unit, head);
        return;
      }
    }
    attend<Query, Cached, kKeySize, kValueSize, kKeyVec, kValueVec, kRows, kTurned, kRun, kByToken,
           kCapped, kSloped, kStages, kShared, kCluster, kTeams, Block, Length, Start>(p, shared, unit, head,
                                                                     head_part, rank, share);
    if constexpr (kCluster == 0) place = share.sequence;
  } while (kCluster == 0 && share.more());
}

// Thread blocks that a multiprocessor is to have registers for, at least. Of small heads fewer than four at
// once read memory more slowly, and a compiler that is not told gives a block now more, now less than a
// quarter. kBoth: scores have a cap and slopes, for which that is too little.
template <typename Query, typename Cached, int kKeySize, int kValueSize, int kRows, bool kBoth, int kCluster,
          int kTeams>
constexpr int kResident = kTeams > 1 || kKeySize + kValueSize > 256 ? 1
                          : kKeySize + kValueSize <= 128 && kRows == 8 && kCluster == 1 && !kBoth &&
                                  HasProducts<typename Operands<Query, Cached>::Type>::value
                              ? 4
                              : 2;

// Query is F16 or BF16, of queries and output; Cached is Query, one of the 8-bit types, or TokenScaled of
// one of these: then the scales of keys multiply scores, and those of values multiply weights. kRows: a
// unit has at most 8 rows, 16, or kWide. kTurned: of at most 8, rows are columns of the products, whose rows
// are keys and then elements of values. Caches are read kKeyVec and kValueVec bytes at a time. kRun: so
// many keys of a tile are in one block, 16, 8 or 1, of which block_size is a multiple. kByToken: a head's
// values of neighbouring slots are side by side. kShared are the bytes of shared memory, of a team.
// kCluster blocks take a group of parts each, or 1 block takes all; or, if 0, all blocks take equal shares
// of all parts. kTall: sequences may have enough tokens for units to be taken two at a time. kTeams: 2 take
// a unit each, of KV heads whose rows are side by side in memory.
template <typename Query, typename Cached, int kKeySize, int kValueSize, int kKeyVec, int kValueVec,
          int kRows, bool kTurned, int kRun, bool kByToken, bool kCapped, bool kSloped, int kStages,
          int kShared, int kCluster, bool kTall, int kTeams, typename Block, typename Length,
          typename Start>
__global__ void __launch_bounds__(kTeams * kWarps * 32,
                                  (kResident<Query, Cached, kKeySize, kValueSize, kRows,
                                             kCapped && kSloped, kCluster, kTeams>))
    paged_attention(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  run<Query, Cached, kKeySize, kValueSize, kKeyVec, kValueVec, kRows, kTurned, kRun, kByToken, kCapped,
      kSloped, kStages, kShared, kCluster, kTall, kTeams, Block, Length, Start>(p);
}

// The same where kCluster is more than 1: without a cluster it would be launched later.
template <typename Query, typename Cached, int kKeySize, int kValueSize, int kKeyVec, int kValueVec,
          int kRows, bool kTurned, int kRun, bool kByToken, bool kCapped, bool kSloped, int kStages,
          int kShared, int kCluster, bool kTall, int kTeams, typename Block, typename Length,
          typename Start>
__global__ void CUPY_CACHE_CLUSTER(kCluster)
    __launch_bounds__(kWarps * 32, kKeySize + kValueSize > 256 ? 1 : 2)
    paged_attention_clustered(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  run<Query, Cached, kKeySize, kValueSize, kKeyVec, kValueVec, kRows, kTurned, kRun, kByToken, kCapped,
      kSloped, kStages, kShared, kCluster, kTall, kTeams, Block, Length, Start>(p);
}

}  // namespace cupy_cache
