// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Rotates queries and keys by the angles of their positions, and writes the keys, and the values as
// they are, into their slots of a cache.
//
// A token's work is dealt to lanes head by head: the heads of the queries, then those of the keys,
// then those of the values. A head's elements lie in units of kVec bytes; a lane holds both units of
// a pair that turns together, so no other thread reads what it overwrites. Where a head is
// normalised, or has a scale of its own, its kLanes lanes are neighbours in one warp.
//
// In x-packed caches tokens of consecutive slots are neighbours, not the elements of one token.
// There neighbouring lanes take neighbouring tokens of a key's head, and thread blocks of their own
// take values (transposed.cuh).
#include "cupy_cache/convert.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/row.cuh"
#include "cupy_cache/transposed.cuh"
#include "cupy_cache/vec.cuh"
#include "cupy_cache/warp.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* positions;     // [tokens], or [3, tokens] where there are sections
  char* query;               // [tokens, kHeads, kSize]
  char* key;                 // [tokens, kKeyHeads, kSize]
  const char* value;         // [tokens, kKeyHeads, kValueSize]
  const char* cos_sin;       // [max_position, kRotary]: cosines, then sines
  char* key_cache;           // [num_blocks, kBlockSize, kKeyHeads, kSize], or see kPack
  char* value_cache;         // likewise; null where kEntries
  const char* slot_mapping;  // [slots]
  char* out;                 // [tokens, kHeads, kSize]
  const char* q_weight;      // [kSize], or null
  const char* k_weight;      // likewise
  const char* q_scale;       // [kHeads] of float, or null: q_scale_value
  const char* k_scale;       // [kKeyHeads] of float, or null: k_scale_value
  const char* v_scale;       // likewise
  char* k_scale_cache;       // [num_blocks, kBlockSize, kKeyHeads] of float
  char* v_scale_cache;       // likewise
  i64 tokens;
  i64 slots;
  i64 position_axis_stride;
  float epsilon;
  float weight_bias;
  float q_scale_value;
  float k_scale_value;
  float v_scale_value;
  u32 unused;
  // These are a line of constants; where kDense, no other strides are read.
  i64 max_position;
  i64 num_blocks;
  i64 query_token_stride;
  i64 out_token_stride;
  i64 key_token_stride;
  i64 value_token_stride;
  i64 key_block_stride;
  i64 value_block_stride;
  i64 position_stride;
  i64 slot_stride;
  i64 cos_sin_stride;
  i64 query_head_stride;
  i64 out_head_stride;
  i64 key_head_stride;
  i64 value_head_stride;
  i64 key_offset_stride;
  i64 key_cache_head_stride;
  i64 key_pack_stride;
  i64 value_slots_stride;
  i64 value_offset_stride;
  i64 value_cache_head_stride;
  i64 value_element_stride;
  i64 q_scale_stride;
  i64 k_scale_stride;
  i64 v_scale_stride;
  i64 k_scale_block_stride;
  i64 k_scale_offset_stride;
  i64 k_scale_head_stride;
  i64 v_scale_block_stride;
  i64 v_scale_offset_stride;
  i64 v_scale_head_stride;
  u32 section_ends[2];  // see Sections
};

constexpr u32 kPositions = 1;
constexpr u32 kSlotMapping = 2;

#ifdef CUPY_CACHE_CONVERTS

// Which of three positions, of time, height and width, turns a pair.
enum class Sections {
  kNone,         // there is one position
  kWhole,        // as kRuns, and all angles of a load are of one section
  kRuns,         // pairs below section_ends[0] by time, below section_ends[1] by height
  kInterleaved,  // of three neighbours the second by height below section_ends[0], the third by
                 // width below section_ends[1]; all others by time
};

// kCount elements of type T, read at an address that is a multiple of their size in all, or of 16.
template <typename T, int kCount>
struct Numbers {
  static constexpr int kBytes = kCount * static_cast<int>(sizeof(typename T::Bits));
  static constexpr int kPart = kBytes < 16 ? kBytes : 16;

  Vec<kPart> parts[kBytes / kPart];

  __device__ __forceinline__ void load(const char* at) {
#pragma unroll
    for (int i = 0; i < kBytes / kPart; ++i) {
      parts[i] = load_shared_vector<kPart>(at + i * kPart);
    }
  }
};

// The angles of a token: a row of the table for each of its positions.
template <typename Table, typename Position, Sections kSections, int kRotary, bool kDense>
struct Angles {
  static constexpr int kAxes = kSections == Sections::kNone ? 1 : 3;
  static constexpr int kElement = sizeof(typename Table::Bits);
  static constexpr int kSines = kRotary / 2 * kElement;  // from a cosine to its sine
  static constexpr i64 kPosition = sizeof(Position), kRow = kRotary * kElement;
  // Whether neighbouring pairs that are loaded together turn by one position.
  static constexpr bool kIsRun = kSections == Sections::kNone || kSections == Sections::kWhole;
  using Type = Table;

  i64 position[kAxes];

  __device__ __forceinline__ Angles(const Params& p, i64 token) {
#pragma unroll
    for (int axis = 0; axis < kAxes; ++axis) {
      position[axis] = load_number<Position>(p.positions + axis * p.position_axis_stride +
                                             token * (kDense ? kPosition : p.position_stride));
    }
  }
  __device__ __forceinline__ bool valid(const Params& p) const {
    bool all = true;
#pragma unroll
    for (int axis = 0; axis < kAxes; ++axis) all = all && within(position[axis], p.max_position);
    return all;
  }
  __device__ __forceinline__ void report(const Params& p, i64 token) const {
#pragma unroll
    for (int axis = 0; axis < kAxes; ++axis) {
      if (!in_bounds(position[axis], p.max_position, kPositions, token)) return;
    }
  }
  // The row of a pair.
  __device__ __forceinline__ const char* row(const Params& p, u32 pair) const {
    i64 of = position[0];
    if constexpr (kSections == Sections::kWhole || kSections == Sections::kRuns) {
      if (pair >= p.section_ends[0]) of = position[1];
      if (pair >= p.section_ends[1]) of = position[2];
    } else if constexpr (kSections == Sections::kInterleaved) {
      if (pair % 3 == 1 && pair < p.section_ends[0]) of = position[1];
      if (pair % 3 == 2 && pair < p.section_ends[1]) of = position[2];
    }
    return p.cos_sin + (within(of, p.max_position) ? of : 0) * (kDense ? kRow : p.cos_sin_stride);
  }
};

// The cosines and sines of kCount neighbouring pairs, loaded long before they are used.
template <typename Of, int kCount>
struct Turn {
  static constexpr bool kTogether = Of::kIsRun;
  static constexpr int kEach = kTogether ? kCount : 1;

  Numbers<typename Of::Type, kEach> cosines[kCount / kEach], sines[kCount / kEach];

  __device__ __forceinline__ void load(const Params& p, const Of& angles, u32 first) {
#pragma unroll
    for (int i = 0; i < kCount / kEach; ++i) {
      const char* const from = angles.row(p, first + i) + (first + i) * Of::kElement;
      cosines[i].load(from);
      sines[i].load(from + Of::kSines);
    }
  }
  __device__ __forceinline__ void get(float (&cosine)[kCount], float (&sine)[kCount]) const {
    decode_all<typename Of::Type>(cosines, cosine);
    decode_all<typename Of::Type>(sines, sine);
  }
};

// The same where a warp's lanes are all of one token, and neighbouring pairs turn by several
// positions: each lane reads the angles of a part of the kPairs pairs, and gives them to the others.
// So a lane reads 4 numbers instead of 16 of heads of 128.
template <typename Of, int kCount, int kPairs>
struct SharedTurn {
  static constexpr int kMine = kPairs < 32 ? 1 : kPairs / 32;  // neighbouring pairs

  Numbers<typename Of::Type, 1> cosines[kMine], sines[kMine];

  __device__ __forceinline__ void load(const Params& p, const Of& angles) {
    const u32 first = threadIdx.x % 32 * kMine;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const char* const from = angles.row(p, first + i) + (first + i) * Of::kElement;
      cosines[i].load(from);
      sines[i].load(from + Of::kSines);
    }
  }
  // Of the pairs from `first` on, a multiple of kMine.
  __device__ __forceinline__ void get(u32 first, float (&cosine)[kCount],
                                      float (&sine)[kCount]) const {
    constexpr u32 kWarp = 0xffffffff;
    float mine[2][kMine];
    decode_all<typename Of::Type>(cosines, mine[0]);
    decode_all<typename Of::Type>(sines, mine[1]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int lane = static_cast<int>(first / kMine) + i / kMine;
      cosine[i] = __shfl_sync(kWarp, mine[0][i % kMine], lane);
      sine[i] = __shfl_sync(kWarp, mine[1][i % kMine], lane);
    }
  }
};

// Turns the pair (a, b), or turns it back. No product is part of a fused multiply-add, so that every
// backend rounds the same.
template <bool kInverse>
__device__ __forceinline__ void turn(float& a, float& b, float cosine, float sine) {
  const float ac = multiply(a, cosine), as = multiply(a, sine);
  const float bc = multiply(b, cosine), bs = multiply(b, sine);
  a = kInverse ? add(ac, bs) : subtract(ac, bs);
  b = kInverse ? subtract(bc, as) : add(bc, as);
}

// How a head's elements are dealt to items, two units of kElements for each: the two of a pair that
// turns together where pairs go across units; then units by themselves, of which pairs may be
// inside. !kOthers: only what turns is dealt.
template <int kSize, int kRotary, int kOffset, int kElements, bool kNeox, bool kOthers>
struct Deal {
  static constexpr bool kAcross = kNeox || kElements == 1;
  static constexpr int kPairs = kAcross ? kRotary / 2 / kElements : 0;
  static constexpr int kSingles =
      ((kOthers ? kSize : kRotary) - (kAcross ? kRotary : 0)) / kElements;
  static constexpr int kHalf = (kSingles + 1) / 2;
  static constexpr int kItems = kPairs + kHalf;

  u32 at[2];  // the elements that begin its units
  bool there[2];
  bool is_pair;

  __device__ __forceinline__ explicit Deal(u32 item) {
    is_pair = item < kPairs;
    if (is_pair) {
      at[0] = kOffset + item * (kNeox ? kElements : 2);
      at[1] = at[0] + (kNeox ? kRotary / 2 : 1);
      there[0] = there[1] = true;
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 single = item - kPairs + i * kHalf;
        at[i] = single * kElements;
        if (!kOthers || (kAcross && at[i] >= kOffset)) at[i] += kOthers ? kRotary : kOffset;
        there[i] = item < kItems && single < kSingles;
      }
    }
  }
  // Whether unit i turns.
  __device__ __forceinline__ bool turns(int i) const {
    return is_pair || (!kAcross && at[i] >= kOffset && at[i] < kOffset + kRotary);
  }
};

// Loads a lane's units; without kOthers only those that turn.
template <typename Dealt, int kVec, int kElement, int kLanes, bool kOthers, int kHeld>
__device__ __forceinline__ void load_units(Vec<kVec> (&loaded)[kHeld][2], const char* from,
                                           u32 lane) {
#pragma unroll
  for (int n = 0; n < kHeld; ++n) {
    const Dealt dealt(lane + n * kLanes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (dealt.there[i] && (kOthers || dealt.turns(i))) {
        loaded[n][i] = load_vector<kVec>(from + dealt.at[i] * kElement);
      }
    }
  }
}

template <typename T, int kCount>
__device__ __forceinline__ void round_all(float (&values)[kCount]) {
#pragma unroll
  for (float& value : values) value = T::decode(T::encode(value));
}

// Stores what Arithmetic makes of the values, as elements of type To.
template <typename To, typename Arithmetic, int kCount>
__device__ __forceinline__ void store_all(char* at, float (&values)[kCount],
                                          const Arithmetic& arithmetic, bool when) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(typename To::Bits));
  float stored[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) stored[i] = arithmetic(values[i]);
  Vec<kBytes> vector;
  encode_all<To>(stored, vector);
  store_vector<kBytes>(at, vector, when);
}

template <bool kFirst, typename First, typename Second>
struct Either {
  using type = First;
};
template <typename First, typename Second>
struct Either<false, First, Second> {
  using type = Second;
};

struct AsItIs {
  __device__ __forceinline__ explicit AsItIs(float) {}
  __device__ __forceinline__ float operator()(float value) const { return value; }
};

// From float32 results of queries and keys of type Element to what is stored.
template <typename Element, typename To>
struct ToStore {
  using type = typename DivideFor<F32, To>::type;
};
template <typename Element>
struct ToStore<Element, Element> {
  using type = AsItIs;
};

// Where the scale of a token's head is.
template <int kBlockSize>
__device__ __forceinline__ char* scale_at(char* cache, const Place<kBlockSize>& place, u32 head,
                                          i64 block_stride, i64 offset_stride, i64 head_stride) {
  return cache + place.block * block_stride + place.offset * offset_stride + head * head_stride;
}

// Writes values into an x-packed cache: a part of a head of a tile, for the `block`-th of the thread
// blocks that do so.
template <typename Angles, typename Held, int kKeyHeads, int kBytes, int kBlockSize, typename Slot>
__device__ __forceinline__ void write_transposed(const Params& p, typename Held::Shared& shared,
                                                 u32 block) {
  constexpr u32 kPartsOfHead = (kBytes + kPartBytes - 1) / kPartBytes;
  constexpr u32 kParts = kKeyHeads * kPartsOfHead;
  const u32 tiles = (static_cast<u32>(p.slots) + kTile - 1) / kTile;
  if (block >= tiles * kParts) return;  // the whole block
  const Work work = Work::of_block<Slot>(block / kParts, block % kParts, tiles, kParts,
                                         p.slot_mapping, p.slot_stride, p.slots);
  const u32 head = work.part / kPartsOfHead;
  const int begin = static_cast<int>(work.part % kPartsOfHead) * kPartBytes;
  const i64 first = static_cast<i64>(work.tile) * kTile, token = first + threadIdx.x;
  const i64 left = p.slots - first;

  i64 slot = kSkip;
  bool valid = false;
  if (threadIdx.x < kTile && token < p.slots) {
    slot = load_number<Slot>(p.slot_mapping + token * p.slot_stride);
    valid = Angles(p, token).valid(p);
  }
  const Target<kBlockSize> target(slot, p.num_blocks);
  if (threadIdx.x < kTile) shared.slots[threadIdx.x] = valid && target.valid ? slot : kSkip;
  Held values;
  values.load(p.value + first * p.value_token_stride + head * p.value_head_stride,
              p.value_token_stride, left, begin);
  const float scale = scale_of(p.v_scale, p.v_scale_stride, head, p.v_scale_value);
  __syncthreads();
  Held::find_adjacent(shared);
  values.transpose(shared, left, begin, scale);
  __syncthreads();
  const ValuePlaces places = {p.value_cache + head * p.value_cache_head_stride,
                              p.value_block_stride, p.value_slots_stride, p.value_element_stride};
  Held::store(shared, places, begin);
  if (work.part == 0) target.report(kSlotMapping, token);
}

// Queries and keys are of type Element, the table of type Table, weights of type Weight; queries are
// written as Out, keys as Stored, and values as Values (a converter to kValueVec bytes) makes them.
//
// kPack elements of a key lie together, and kSlots slots of the value cache. kScattered: a value's
// elements do not lie together; thread blocks then have kMaxThreads threads, and kVectorValues says
// that the cache allows 16-byte stores. kLargest: what the largest magnitude of a row becomes, whose
// scale is stored; 0 where scales are given. kToOut: queries are written to `out`, not in place.
// kKeys: keys are written in place. kCached: keys and values are written to caches; kEntries: to one,
// which has the value's elements and then the key's. kDense: heads of a token, tokens of a block,
// rows of the table, positions and slots lie side by side, and nothing is converted; with strides
// that the code knows, few tokens take 0.03 to 0.05 us less. kSteps: each step rounds to Element.
template <typename Element, typename Table, typename Weight, typename Out, typename Stored,
          typename Values, int kVec, int kValueVec, int kLanes, int kValueLanes, int kHeads,
          int kKeyHeads, int kSize, int kValueSize, int kRotary, int kOffset, int kPack, int kSlots,
          int kBlockSize, bool kScattered, bool kVectorValues, int kLargest, bool kNeox,
          bool kInverse, Sections kSections, bool kNorm, bool kSteps, bool kToOut, bool kKeys,
          bool kCached, bool kEntries, bool kDense, typename Position, typename Slot,
          int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) rotary(const __grid_constant__ Params p) {
  await_earlier_launches();
  assume_launched_with<kMaxThreads>();
  constexpr int kElement = sizeof(typename Element::Bits);
  constexpr int kElements = kVec / kElement;
  constexpr int kStored = sizeof(typename Stored::Bits);
  constexpr bool kQueryOthers = kToOut || kNorm;
  constexpr bool kKeyOthers = kCached || kNorm;
  using Dealt = Deal<kSize, kRotary, kOffset, kElements, kNeox, kQueryOthers || kKeyOthers>;
  constexpr int kHeld = (Dealt::kItems + kLanes - 1) / kLanes;
  constexpr int kRotatedItems = (kHeads + kKeyHeads) * kLanes;
  constexpr int kValueItems = kCached && !kScattered ? kKeyHeads * kValueLanes : 0;
  constexpr int kItems = kRotatedItems + kValueItems;  // of a token
  constexpr int kDivisor = kBlockSize > 0 ? kBlockSize : 1;  // 0 where there is no cache
  // Bytes of heads and of tokens where kDense: nothing is converted there.
  constexpr i64 kHead = kSize * kElement, kSlot = kKeyHeads * kHead;
  constexpr i64 kValueHead = kValueSize * kElement, kValueSlot = kKeyHeads * kValueHead;
  using AnglesOf = Angles<Table, Position, kSections, kRotary, kDense>;

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  i64 token = static_cast<i64>(index / kItems);
  u32 item = index % kItems;
  if constexpr (kScattered) {
    // All queries, then all keys, in tiles of tokens; then, from a thread block on, all values.
    constexpr u32 kTogether = 4;  // tokens whose keys a warp writes side by side
    constexpr u32 kQueryItems = kHeads * kLanes, kKeyItems = kKeyHeads * kLanes;
    const u32 tokens = static_cast<u32>(p.tokens);  // all threads count in 32 bits
    const u32 queries = tokens * kQueryItems;
    const u32 rotated = queries + (tokens + kTogether - 1) / kTogether * kTogether * kKeyItems;
    const u32 blocks = (rotated + kMaxThreads - 1) / kMaxThreads;
    if (blockIdx.x >= blocks) {
      using Held = Transposed<Values, kStored, kValueVec, kValueSize * kStored, kDivisor, kSlots,
                              kVectorValues, kMaxThreads>;
      __shared__ typename Held::Shared shared;
      write_transposed<AnglesOf, Held, kKeyHeads, kValueSize * kStored, kDivisor, Slot>(
          p, shared, blockIdx.x - blocks);
      release_next_launch();
      return;
    }
    token = static_cast<i64>(index / kQueryItems);
    item = index % kQueryItems;
    if (index >= queries) {
      const u32 row = (index - queries) / kLanes;
      token = static_cast<i64>(row / (kTogether * kKeyHeads) * kTogether + row % kTogether);
      item = kQueryItems + row / kTogether % kKeyHeads * kLanes + (index - queries) % kLanes;
    }
  }
  // All threads count in 32 bits, and so do tokens.
  if (static_cast<u32>(token) >= static_cast<u32>(p.tokens)) return;  // whole heads

  // The position comes first: the angles wait for it.
  const AnglesOf angles(p, token);
  const bool valid = angles.valid(p);
  const bool has_slot = kCached && static_cast<u32>(token) < static_cast<u32>(p.slots);
  if (!has_slot && item >= (kHeads + (kKeys ? kKeyHeads : 0)) * kLanes) return;  // nothing to write
  const bool is_query = item < kHeads * kLanes;
  i64 slot = -1;
  if constexpr (kCached) {
    const i64 stride = kDense ? static_cast<i64>(sizeof(Slot)) : p.slot_stride;
    if (has_slot && !is_query) slot = load_number<Slot>(p.slot_mapping + token * stride);
  }

  if (item < kRotatedItems) {
    const u32 lane = item % kLanes;
    const u32 head = item / kLanes - (is_query ? 0 : kHeads);
    // Each in its own branch: behind it the compiler would have the loads wait for the position.
    Vec<kVec> loaded[kHeld][2];  // of no meaning where a unit is not there
    char* from;
    if (is_query) {
      from = p.query + token * p.query_token_stride + head * (kDense ? kHead : p.query_head_stride);
      load_units<Dealt, kVec, kElement, kLanes, kQueryOthers>(loaded, from, lane);
    } else {
      from = p.key + token * p.key_token_stride + head * (kDense ? kHead : p.key_head_stride);
      load_units<Dealt, kVec, kElement, kLanes, kKeyOthers>(loaded, from, lane);
    }
    // Before anything waits for the rows.
    constexpr int kTurns = Dealt::kAcross ? 1 : 2;  // of an item
    using Turned = Turn<AnglesOf, kElements / kTurns>;
    Turned turns[kHeld][kTurns];
    // Each warp has whole heads of one token, of queries or of keys, of which all elements turn.
    constexpr int kAllPairs = kRotary / 2, kMine = kAllPairs < 32 ? 1 : kAllPairs / 32;
    constexpr bool kShared = kSections == Sections::kInterleaved && Dealt::kAcross &&
                             kRotary == kSize && kLanes * kElements == kAllPairs &&
                             kAllPairs == 32 * kMine && kElements % kMine == 0 && !kScattered &&
                             kHeads * kLanes % 32 == 0 && kKeyHeads * kLanes % 32 == 0 &&
                             kItems % 32 == 0;
    SharedTurn<AnglesOf, kElements / kTurns, kAllPairs> shared_turn;
    if constexpr (kShared) shared_turn.load(p, angles);
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Dealt dealt(lane + n * kLanes);
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        const u32 first = kTurns == 1 ? (lane + n * kLanes) * kElements : (dealt.at[i] - kOffset) / 2;
        if constexpr (!kShared) {
          turns[n][i].load(p, angles, dealt.there[i] && dealt.turns(i) ? first : 0);
        }
      }
    }
    // Nor does what is computed while the angles are on their way come behind them.
    char* to = from;
    bool when = valid;
    if (is_query) {
      if (kToOut) {
        to = p.out + token * p.out_token_stride + head * (kDense ? kHead : p.out_head_stride);
      }
    } else if (kCached) {
      const Target<kDivisor> target(slot, p.num_blocks);
      const Place<kDivisor> place = target.place();
      to = p.key_cache + (kEntries ? kValueSize * kStored : 0) + place.block * p.key_block_stride +
           place.offset * (kDense ? kSlot : p.key_offset_stride) +
           head * (kDense ? kHead : p.key_cache_head_stride);
      when = valid && target.valid;
    }

    float values[kHeld][2][kElements];
#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) decode_all<Element>(loaded[n][i], values[n][i]);
    }

    if constexpr (kNorm) {
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (float value : values[n][i]) sum += Dealt(lane + n * kLanes).there[i] ? value * value : 0;
        }
      }
      const float factor = rsqrtf(group_sum<kLanes>(sum) / kSize + p.epsilon);
      const char* const weights = is_query ? p.q_weight : p.k_weight;
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
        const Dealt dealt(lane + n * kLanes);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float weight[kElements];
          if (weights && dealt.there[i]) {
            Numbers<Weight, kElements> bytes;
            bytes.load(weights + dealt.at[i] * sizeof(typename Weight::Bits));
            decode_all<Weight>(bytes, weight);
#pragma unroll
            for (float& one : weight) one += p.weight_bias;
          } else {
#pragma unroll
            for (float& one : weight) one = 1.0f;
          }
#pragma unroll
          for (int e = 0; e < kElements; ++e) values[n][i][e] *= factor * weight[e];
          if constexpr (kSteps) round_all<Element>(values[n][i]);
        }
      }
    }

#pragma unroll
    for (int n = 0; n < kHeld; ++n) {
      const Dealt dealt(lane + n * kLanes);
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        if (!dealt.there[i] || !dealt.turns(i)) continue;
        float cosine[kElements / kTurns], sine[kElements / kTurns];
        if constexpr (kShared) {
          shared_turn.get(lane * kElements, cosine, sine);
        } else {
          turns[n][i].get(cosine, sine);
        }
#pragma unroll
        for (int e = 0; e < kElements / kTurns; ++e) {
          if constexpr (Dealt::kAcross) {
            turn<kInverse>(values[n][0][e], values[n][1][e], cosine[e], sine[e]);
          } else {
            turn<kInverse>(values[n][i][2 * e], values[n][i][2 * e + 1], cosine[e], sine[e]);
          }
        }
      }
      if constexpr (kSteps) {
#pragma unroll
        for (int i = 0; i < 2; ++i) round_all<Element>(values[n][i]);
      }
    }

    if (is_query) {
      using Arithmetic = typename ToStore<Element, Out>::type;
      const Arithmetic arithmetic(scale_of(p.q_scale, p.q_scale_stride, head, p.q_scale_value));
#pragma unroll
      for (int n = 0; n < kHeld; ++n) {
        const Dealt dealt(lane + n * kLanes);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          store_all<Out>(to + dealt.at[i] * static_cast<int>(sizeof(typename Out::Bits)),
                         values[n][i], arithmetic,
                         when && dealt.there[i] && (kQueryOthers || dealt.turns(i)));
        }
      }
    } else {
      if constexpr (kKeys) {
#pragma unroll
        for (int n = 0; n < kHeld; ++n) {
          const Dealt dealt(lane + n * kLanes);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            store_all<Element>(from + dealt.at[i] * kElement, values[n][i], AsItIs(1.0f),
                               valid && dealt.there[i] && (kNorm || dealt.turns(i)));
          }
        }
      }
      if constexpr (kCached) {
        float scale = 0.0f;
        if constexpr (kLargest > 0) {
          float largest = 0.0f;
#pragma unroll
          for (int n = 0; n < kHeld; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
              for (float value : values[n][i]) {
                if (Dealt(lane + n * kLanes).there[i]) largest = fmaxf(largest, fabsf(value));
              }
            }
          }
          const float found = row_scale<kLargest>(group_max<kLanes>(largest));
          scale = divide(1.0f, found);
          if (when && lane == 0) {
            const Place<kDivisor> place(slot);
            *reinterpret_cast<float*>(scale_at(p.k_scale_cache, place, head, p.k_scale_block_stride,
                                               p.k_scale_offset_stride, p.k_scale_head_stride)) =
                found;
          }
        } else {
          scale = scale_of(p.k_scale, p.k_scale_stride, head, p.k_scale_value);
        }
        using Given = typename ToStore<Element, Stored>::type;
        using Arithmetic = typename Either<(kLargest > 0), Multiply, Given>::type;
        const Arithmetic arithmetic(scale);
#pragma unroll
        for (int n = 0; n < kHeld; ++n) {
          const Dealt dealt(lane + n * kLanes);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            store_all<Stored>(to + dealt.at[i] / kPack * p.key_pack_stride +
                                  dealt.at[i] % kPack * kStored,
                              values[n][i], arithmetic, when && dealt.there[i]);
          }
        }
      }
    }
    if (item == 0) angles.report(p, token);
  } else if constexpr (kCached && !kScattered) {
    const u32 lane = (item - kRotatedItems) % kValueLanes;
    const u32 head = (item - kRotatedItems) / kValueLanes;
    const char* const from = p.value + token * p.value_token_stride +
                             head * (kDense ? kValueHead : p.value_head_stride);
    const Target<kDivisor> target(slot, p.num_blocks);
    const Place<kDivisor> place = target.place();
    char* const to = (kEntries ? p.key_cache : p.value_cache) + place.block * p.value_block_stride +
                     place.offset * (kDense ? kValueSlot : p.value_offset_stride) +
                     head * (kDense ? kValueHead : p.value_cache_head_stride);
    const bool when = valid && target.valid;
    if constexpr (kLargest > 0) {
      Row<Element, Stored, kValueVec, kValueSize, kValueLanes> row;
      row.load(from, lane);
      const float scale = row_scale<kLargest>(row.largest(lane));
      row.store(to, lane, divide(1.0f, scale), when);
      if (when && lane == 0) {
        *reinterpret_cast<float*>(scale_at(p.v_scale_cache, place, head, p.v_scale_block_stride,
                                           p.v_scale_offset_stride, p.v_scale_head_stride)) = scale;
      }
    } else {
      constexpr int kVectors = kValueSize * kStored / kValueVec;
      constexpr int kCount = (kVectors + kValueLanes - 1) / kValueLanes;
      const float scale = scale_of(p.v_scale, p.v_scale_stride, head, p.v_scale_value);
      typename Values::Source held[kCount];
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const u32 vector = lane + n * kValueLanes;
        if (vector < kVectors) held[n] = Values::load(from + vector * Values::kSourceBytes);
      }
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const u32 vector = lane + n * kValueLanes;
        store_vector<kValueVec>(to + static_cast<i64>(vector) * kValueVec,
                                Values::convert(held[n], scale), when && vector < kVectors);
      }
    }
    if (item == kRotatedItems) target.report(kSlotMapping, token);
  }
  release_next_launch();
}

// What a head is of.
struct Role {
  bool is_query, is_value;

  // All three are parameters, and read: of reads under conditions the compiler would make branches.
  template <typename T>
  __device__ __forceinline__ T of(T query, T key, T value) const {
    return is_query ? query : is_value ? value : key;
  }
};

// The same of few tokens of one position each, whose heads are stored as they come. One of them takes little more than its
// two loads, of the position and then of the row; so queries, keys and values go one way, without a
// branch, and in small units, which take fewer instructions.
template <typename Element, typename Table, int kVec, int kHeads, int kKeyHeads, int kSize,
          int kRotary, int kOffset, int kBlockSize, bool kNeox, bool kToOut, bool kDense,
          typename Position, typename Slot, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) rotary_few(const __grid_constant__ Params p) {
  await_earlier_launches();
  assume_launched_with<kMaxThreads>();
  constexpr int kElement = sizeof(typename Element::Bits);
  constexpr int kElements = kVec / kElement;
  using Dealt = Deal<kSize, kRotary, kOffset, kElements, kNeox, true>;
  constexpr u32 kLanes = Dealt::kItems, kItems = (kHeads + 2 * kKeyHeads) * kLanes;
  constexpr int kTurns = Dealt::kAcross ? 1 : 2;  // of an item
  constexpr i64 kHead = kSize * kElement, kSlot = kKeyHeads * kHead;
  using AnglesOf = Angles<Table, Position, Sections::kNone, kRotary, kDense>;

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index / kItems >= static_cast<u32>(p.tokens)) return;
  const i64 token = static_cast<i64>(index / kItems);
  const u32 item = index % kItems, lane = item % kLanes, row = item / kLanes;
  const Role role = {row < kHeads, row >= kHeads + kKeyHeads};
  const u32 head = row - role.of<u32>(0, kHeads, kHeads + kKeyHeads);
  const Dealt dealt(lane);

  const AnglesOf angles(p, token);
  const char* const slot_at =
      p.slot_mapping + token * (kDense ? static_cast<i64>(sizeof(Slot)) : p.slot_stride);
  i64 slot = -1;
  if (static_cast<u32>(token) < static_cast<u32>(p.slots)) slot = load_number<Slot>(slot_at);
  const char* const from =
      role.of<const char*>(p.query, p.key, p.value) +
      token * role.of(p.query_token_stride, p.key_token_stride, p.value_token_stride) +
      head * (kDense ? kHead : role.of(p.query_head_stride, p.key_head_stride, p.value_head_stride));
  Vec<kVec> loaded[2];
  const u64 policy = l2_policy((6 << 10) * (16 / kVec));  // a thread moves less than elsewhere
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (dealt.there[i]) loaded[i] = load_vector<kVec>(from + dealt.at[i] * kElement, policy);
  }
  Turn<AnglesOf, kElements / kTurns> turns[kTurns];
  if (!role.is_value) {
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const u32 first = kTurns == 1 ? lane * kElements : (dealt.at[i] - kOffset) / 2;
      turns[i].load(p, angles, dealt.there[i] && dealt.turns(i) ? first : 0);
    }
  }

  const Target<kBlockSize> target(slot, p.num_blocks);
  const Place<kBlockSize> place = target.place();
  const i64 query_token_stride = kToOut ? p.out_token_stride : p.query_token_stride;
  const i64 query_head_stride = kToOut ? p.out_head_stride : p.query_head_stride;
  char* const to =
      role.of(kToOut ? p.out : p.query, p.key_cache, p.value_cache) +
      (role.is_query ? token : place.block) *
          role.of(query_token_stride, p.key_block_stride, p.value_block_stride) +
      place.offset * (kDense ? (role.is_query ? 0 : kSlot)
                             : role.of<i64>(0, p.key_offset_stride, p.value_offset_stride)) +
      head * (kDense ? kHead
                     : role.of(query_head_stride, p.key_cache_head_stride, p.value_cache_head_stride));
  const bool when = angles.valid(p) && (role.is_query || target.valid);

  float values[2][kElements];
#pragma unroll
  for (int i = 0; i < 2; ++i) decode_all<Element>(loaded[i], values[i]);
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    if (!dealt.there[i] || !dealt.turns(i)) continue;
    float cosine[kElements / kTurns], sine[kElements / kTurns];
    turns[i].get(cosine, sine);
#pragma unroll
    for (int e = 0; e < kElements / kTurns; ++e) {
      if constexpr (Dealt::kAcross) {
        turn<false>(values[0][e], values[1][e], cosine[e], sine[e]);
      } else {
        turn<false>(values[i][2 * e], values[i][2 * e + 1], cosine[e], sine[e]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    Vec<kVec> turned;
    encode_all<Element>(values[i], turned);
    store_vector<kVec>(to + dealt.at[i] * kElement, role.is_value ? loaded[i] : turned,
                       when && dealt.there[i] && (kToOut || !role.is_query || dealt.turns(i)));
  }
  if (item == 0) angles.report(p, token);
  if (item == (kHeads + kKeyHeads) * kLanes) target.report(kSlotMapping, token);
  release_next_launch();
}

#endif  // CUPY_CACHE_CONVERTS

}  // namespace cupy_cache
