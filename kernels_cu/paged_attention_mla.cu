// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention over the entries of a paged cache: all query heads share one entry for
// each token, whose first elements are its value too.
//
// A unit of work is 16 rows: query heads of neighbouring tokens of one sequence. The tokens of a
// sequence are cut into parts, and these are put together in groups, by the sequence's length alone.
// The results of a group's parts are joined one after the other, and so are those of a sequence's
// groups. So it does not matter to any bit whether a thread block takes one part, a group or a whole
// unit, and what it takes may be chosen by how much there is to do: each block finds that out from all
// sequences' lengths (`Schedule`). Groups are taken, as long as there is a round of them for all
// multiprocessors; the rest is taken in parts. What does not make up a unit is written to memory, and
// a second launch joins it (`join_parts`).
//
// The four warps of a thread block share each tile of tokens, which is copied to shared memory ahead of
// use. Each has a quarter of the queries' elements in registers, for which it multiplies with the
// tokens'; the sums of all four are the scores, which each adds up for itself. Each then has a quarter
// of the columns of the result.
#include "cupy_cache/async.cuh"
#include "cupy_cache/cluster.cuh"
#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/matrix.cuh"
#include "cupy_cache/operands.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/softmax.cuh"

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* query;            // [tokens, heads, entry]
  const char* kv_cache;         // [num_blocks, block_size, entry]
  const char* block_table;      // [sequences, table_width]
  const char* seq_lens;         // [sequences]
  const char* query_start_loc;  // [sequences + 1]; where Start is void each has one token
  const char* kv_scale;         // float32, or null: kv_scale_value
  float* partial;               // [places, a result], or null
  char* out;                    // [tokens, heads, kLatent]
  char* lse;                    // float32 [tokens, heads], or null
  i64 tokens;
  i64 sequences;
  i64 table_width;
  i64 table_stride;
  i64 places;  // of results that are to be joined; 0: none is, so every block takes whole units
  float scale;
  float kv_scale_value;
  i64 num_blocks;
  i64 query_stride;
  i64 query_head_stride;
  i64 out_stride;
  i64 out_head_stride;
  i64 lse_stride;
  i64 lse_head_stride;
  i64 block_stride;
  i64 slot_stride;
  u32 block_size;
  u32 heads;
  u32 processors;  // multiprocessors
  u32 causal;
  u32 chunks_in;  // the query's rows can be read 16 bytes at a time
  u32 pairs_out;  // the output's can be written in pairs
};

constexpr u32 kBlockTable = 1, kSeqLens = 2;  // numbers of guarded arguments
constexpr int kRows = 16;                     // of a unit
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kJoiningThreads = 256;
constexpr int kMostGroups = 32;  // of a sequence

// How a sequence is cut: into at most 128 parts of at least 64 tokens, and groups of at least 1,024.
struct Cut {
  i32 part;  // tokens
  i32 parts;
  i32 of_group;  // parts
  i32 groups;

  __device__ __forceinline__ explicit Cut(i32 length) {
    part = length > 4096 ? 256 : length > 1024 ? 128 : 64;
    while (static_cast<i64>(part) * 128 < length) part *= 2;
    of_group = part < 256 ? 1024 / part : 4;
    parts = length > 0 ? (length - 1) / part + 1 : 1;
    groups = (parts - 1) / of_group + 1;
  }
  // Parts of group `index`.
  __device__ __forceinline__ i32 parts_of(i32 index) const {
    return min(of_group, parts - index * of_group);
  }
};

struct Sequence {
  i64 first;  // token, a row of query and out
  u32 count;  // tokens
  u32 units;
  i32 length;
  i64 given_length;
};

template <typename Start>
__device__ __forceinline__ i64 start_of(const Params& p, i64 sequence) {
  const i64 start = load_number<Start>(p.query_start_loc + sequence * static_cast<i64>(sizeof(Start)));
  return start < 0 ? 0 : start > p.tokens ? p.tokens : start;
}

__device__ __forceinline__ i64 longest(const Params& p) {
  constexpr i64 kLongest = 0x7fffff00;  // tokens have 32-bit numbers
  const i64 in_table = p.table_width * p.block_size;
  return in_table < kLongest ? in_table : kLongest;
}

template <typename Length, typename Start>
__device__ __forceinline__ Sequence sequence_at(const Params& p, i64 index) {
  Sequence found;
  found.first = index;
  found.count = 1;
  if constexpr (!IsVoid<Start>::value) {
    const i64 end = start_of<Start>(p, index + 1);
    found.first = start_of<Start>(p, index);
    found.count = static_cast<u32>(end > found.first ? end - found.first : 0);
  }
  found.units = (found.count * p.heads + (kRows - 1)) / kRows;
  const i64 most = longest(p);
  found.given_length = load_number<Length>(p.seq_lens + index * static_cast<i64>(sizeof(Length)));
  const i64 length = found.given_length;
  found.length = static_cast<i32>(length < 0 ? 0 : length > most ? most : length);
  return found;
}

enum class Kind { kUnit, kGroup, kPart };

// What there is to do for a number of sequences. (Of bounds in query_start_loc that make no sense there
// may be more than 32 bits hold; then which rows are attended to is not defined.)
struct Amounts {
  u32 units, groups, parts;  // those of all units

  __device__ __forceinline__ u32 of(Kind kind) const {
    return kind == Kind::kUnit ? units : kind == Kind::kGroup ? groups : parts;
  }

  __device__ __forceinline__ void add(const Amounts& more) {
    units += more.units;
    groups += more.groups;
    parts += more.parts;
  }
  __device__ __forceinline__ void add(const Sequence& sequence) {
    const Cut cut(sequence.length);
    units += sequence.units;
    groups += sequence.units * cut.groups;
    parts += sequence.units * cut.parts;
  }
};

// What a thread block takes: parts first <= part < last of a unit.
struct Item {
  i64 sequence;  // negative: none
  u32 unit;      // of the sequence
  i32 first, last;
  Amounts before;  // of the sequences before this one
};

// How the work is shared among thread blocks: the same for all of them. What there is to do has the
// order of sequences, groups, units of a sequence, parts of a group.
template <typename Length, typename Start, int kBlockThreads>
class Schedule {
 public:
  u32 coarse;   // so many groups are items, one each; the parts of those behind them are
  u32 skipped;  // parts of those groups
  u32 items;
  bool whole;  // units are items

  // All threads of the block come here. `item` is in shared memory: the one of this number, or all of
  // the unit of this number.
  __device__ __forceinline__ Schedule(const Params& p, u32 number, bool of_units) : p_(p) {
    const u32 sequences = static_cast<u32>(p.sequences);
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    Item& found = shared_item();
    __shared__ Amounts warps[kBlockThreads / 32];
    Kind kind = Kind::kGroup;
    u32 target = 0;
    // All there is; where the groups end that are items; and the one that is looked for. One loop, so
    // that there is little to fetch before the work begins.
#pragma unroll 1
    for (int pass = 0; pass < 3; ++pass) {
      Amounts all = {};
#pragma unroll 1
      for (u32 first = 0; first < sequences; first += kBlockThreads) {
        const u32 index = first + threadIdx.x;
        Sequence its;
        Amounts mine = {};
        if (index < sequences) {
          its = sequence_at<Length, Start>(p, index);
          mine.add(its);
        }
        Amounts sum = mine;
#pragma unroll 1
        for (int other = 1; other < 32; other *= 2) {
          Amounts lower;
          lower.units = __shfl_up_sync(kWarp, sum.units, other);
          lower.groups = __shfl_up_sync(kWarp, sum.groups, other);
          lower.parts = __shfl_up_sync(kWarp, sum.parts, other);
          if (lane >= other) sum.add(lower);
        }
        if (lane == 31) warps[warp] = sum;
        if (first == 0 && threadIdx.x == 0) found.sequence = -1;
        __syncthreads();
        Amounts before = all;
#pragma unroll 1
        for (int i = 0; i < kBlockThreads / 32; ++i) {
          if (i < warp) before.add(warps[i]);
          all.add(warps[i]);
        }
        before.add(sum);
        before.units -= mine.units;
        before.groups -= mine.groups;
        before.parts -= mine.parts;
        const u32 inside = target - before.of(kind);
        if (pass > 0 && target >= before.of(kind) && inside < mine.of(kind)) {
          describe(found, kind, index, its, before, inside);
        }
        __syncthreads();
      }
      if (pass == 0) {
        const u32 rest = all.groups % p.processors;
        coarse = rest * 10 >= p.processors * 7 ? all.groups : all.groups - rest;
        target = coarse;
      } else if (pass == 1) {
        skipped = all.parts;
        if (coarse < all.groups && found.sequence >= 0) {
          const Sequence its = sequence_at<Length, Start>(p, found.sequence);
          const Cut cut(its.length);
          skipped = part_number(found, its, cut, found.first / cut.of_group);
        }
        items = coarse + all.parts - skipped;
        whole = items > p.places;
        if (whole) items = all.units;
        kind = whole || of_units ? Kind::kUnit : number < coarse ? Kind::kGroup : Kind::kPart;
        target = kind == Kind::kPart ? number - coarse + skipped : number;
        __syncthreads();  // `found` has been read
      }
    }
  }

  __device__ __forceinline__ const Item& item() const { return shared_item(); }

  // Where the result of the first part of a group is, or the group's, which is then `alone`.
  __device__ __forceinline__ u32 place(const Sequence& its, const Cut& cut, i32 group,
                                       bool& alone) const {
    const u32 number = item().before.groups + group * its.units + item().unit;
    alone = number < coarse;
    return alone ? number : coarse + part_number(item(), its, cut, group) - skipped;
  }

 private:
  const Params& p_;

  static __device__ __forceinline__ Item& shared_item() {
    __shared__ Item found;
    return found;
  }
  // That of the first part of a group, among all.
  static __device__ __forceinline__ u32 part_number(const Item& item, const Sequence& its,
                                                    const Cut& cut, i32 group) {
    return item.before.parts + group * its.units * cut.of_group + item.unit * cut.parts_of(group);
  }
  // The unit, group or part of this number inside a sequence.
  static __device__ __forceinline__ void describe(Item& item, Kind kind, u32 sequence,
                                                  const Sequence& its, const Amounts& before,
                                                  u32 index) {
    const Cut cut(its.length);
    u32 group = 0, unit = index, part = 0;
    i32 parts = cut.parts;
    if (kind == Kind::kGroup) {
      group = index / its.units;
      unit = index % its.units;
      parts = cut.parts_of(group);
    } else if (kind == Kind::kPart) {
      const u32 of_groups = its.units * cut.of_group;
      group = index / of_groups;
      const u32 of_group = cut.parts_of(group), rest = index % of_groups;
      unit = rest / of_group;
      part = rest % of_group;
      parts = 1;
    }
    item.sequence = sequence;
    item.unit = unit;
    item.first = static_cast<i32>(group * cut.of_group + part);
    item.last = item.first + parts;
    item.before = before;
  }
};

// Where the rows of a unit stand.
struct Unit {
  i64 first;  // token of the sequence, a row of query and out
  u32 count;  // tokens of the sequence
  u32 row;    // the first one's number among the sequence's
  i32 length;
  i32 seen;  // tokens that any row sees: those before

  __device__ __forceinline__ Unit(const Params& p, const Item& item, const Sequence& its)
      : first(its.first), count(its.count), row(item.unit * kRows), length(its.length) {
    seen = seen_by(p, (min(row + kRows, count * p.heads) - 1) / p.heads);
  }
  // Tokens that the sequence's query `token` sees.
  __device__ __forceinline__ i32 seen_by(const Params& p, u32 token) const {
    if (!p.causal) return length;
    const i64 high = static_cast<i64>(length) - count + token + 1;
    return high < 0 ? 0 : static_cast<i32>(high < length ? high : length);
  }
};

// A row of a unit.
struct Row {
  bool valid;
  i64 token;  // its row in query and out
  u32 head;
  i32 high;  // it sees the tokens before

  __device__ __forceinline__ Row(const Params& p, const Unit& unit, int index) {
    const u32 number = unit.row + index, in_sequence = number / p.heads;
    valid = in_sequence < unit.count;
    token = unit.first + in_sequence;
    head = number % p.heads;
    high = valid ? unit.seen_by(p, in_sequence) : 0;
  }
};

// Of the result of a unit, a warp has kTiles tiles of 8 columns, and each of its lanes four numbers of
// one: two neighbouring columns of row lane / 4, and of row lane / 4 + 8. This is the column of those;
// if kAlternate, two tiles have every second column of 16.
template <bool kAlternate>
__device__ __forceinline__ int column_of(int tile, int lane, int i) {
  const int pair = lane % 4;
  return kAlternate ? tile / 2 * 16 + pair * 4 + i * 2 + tile % 2 : tile * 8 + pair * 2 + i;
}

// Writes a lane's two numbers of a row, and with the first ones its log-sum-exp.
template <typename Query, int kLatent, bool kAlternate>
__device__ __forceinline__ void write_two(const Params& p, const Row& row, int tile, int lane,
                                          float largest, float sum, float first, float second,
                                          float v_scale) {
  if (!row.valid) return;
  const bool any = sum > 0.0f;  // tokens
  const float weight = any ? v_scale / sum : 0.0f;
  const u32 bits = any ? pack_pair<Query>(first * weight, second * weight) : 0u;
  char* const at = p.out + row.token * p.out_stride + row.head * p.out_head_stride;
  const int column = column_of<kAlternate>(tile, lane, 0), other = column_of<kAlternate>(tile, lane, 1);
  if (!kAlternate && p.pairs_out && other < kLatent) {
    *reinterpret_cast<u32*>(at + column * 2) = bits;
  } else {
    if (column < kLatent) *reinterpret_cast<u16*>(at + column * 2) = static_cast<u16>(bits);
    if (other < kLatent) *reinterpret_cast<u16*>(at + other * 2) = static_cast<u16>(bits >> 16);
  }
  if (p.lse && tile == 0 && lane % 4 == 0) {
    *reinterpret_cast<float*>(p.lse + row.token * p.lse_stride + row.head * p.lse_head_stride) =
        any ? (largest + log2f(sum)) * kLn2 : __uint_as_float(0xff800000u);
  }
}

// A result that is to be joined: four numbers of each lane, tile and warp, then the largest score and
// the sum of each row.
__device__ constexpr int result_floats(int columns) { return kRows * (columns + 2); }

// What scores and values are multiplied with.
template <bool kScaled>
__device__ __forceinline__ float scale_of_cache(const Params& p) {
  if constexpr (!kScaled) return 1.0f;
  return p.kv_scale ? *reinterpret_cast<const float*>(p.kv_scale) : p.kv_scale_value;
}

// Joins two rows' largest scores and sums to those in `all`, and tells what weights what is summed.
__device__ __forceinline__ void join_totals(Joined (&rows)[2], float4* all, const float4& more) {
  const float4 before = *all;
  rows[0].largest = before.x;
  rows[1].largest = before.y;
  rows[0].join(more.x);
  rows[1].join(more.y);
  *all = {rows[0].largest, rows[1].largest, rows[0].sum(before.z, more.z),
          rows[1].sum(before.w, more.w)};
}

// A lane's numbers of a tile, joined.
struct Quad {
  Joined joined[2];
  float sums[2] = {0.0f, 0.0f};
  float numbers[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  __device__ __forceinline__ void join(const float (&largest)[2], const float (&more)[2],
                                       const float4& four) {
    const float its[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      joined[half].join(largest[half]);
      sums[half] = joined[half].sum(sums[half], more[half]);
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        numbers[i] = joined[half].sum(numbers[i], its[i]);
      }
    }
  }
};

// Joins the results of units that were cut. A thread has a quad, and all groups or, where units are
// few, every eighth.
template <typename Query, int kLatent, bool kAlternate, bool kScaled, typename Length, typename Start>
__global__ void __launch_bounds__(kJoiningThreads) join_parts(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  constexpr int kColumns = (kLatent + 63) / 64 * 64, kQuads = kColumns * 4, kFew = 32;
  static_assert(kFew * 8 == kJoiningThreads, "of a block, eight threads for each");
  const Schedule<Length, Start, kJoiningThreads> schedule(p, blockIdx.x, true);
  const Item& item = schedule.item();
  if (schedule.whole || item.sequence < 0) return;
  const Sequence its = sequence_at<Length, Start>(p, item.sequence);
  const Cut cut(its.length);
  bool alone;
  schedule.place(its, cut, 0, alone);
  if (cut.parts == 1 || (cut.groups == 1 && alone)) return;  // it was written

  const Unit unit(p, item, its);
  const i32 parts = unit.seen > 0 ? (unit.seen - 1) / cut.part + 1 : 0;  // that have results
  const i32 groups = (parts + cut.of_group - 1) / cut.of_group;
  const bool few = gridDim.y * kJoiningThreads > kQuads;
  const int thread = static_cast<int>(threadIdx.x);
  const int quads = few ? kFew : kJoiningThreads, of_quad = thread % quads;
  const int quad = static_cast<int>(blockIdx.y) * quads + of_quad, lane = quad % 32;
  Quad all, joined;
  __shared__ float4 numbers[kMostGroups][kFew], totals[kMostGroups][kFew];
  i32 group = thread / quads, part = 0, count = 0;
  i64 place = 0;
  while (group < groups) {
    constexpr int kTogether = 4;  // results that are on their way at the same time
    float4 fours[kTogether];
    float2 lows[kTogether], highs[kTogether];
    i32 ended[kTogether];  // the group that this is the last result of, or -1
    i32 loaded = 0;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (group >= groups) continue;
      if (part == 0) {
        place = schedule.place(its, cut, group, alone);
        count = alone ? 1 : min(cut.of_group, parts - group * cut.of_group);
        if (place + count > p.places) return;  // as of bounds that make no sense
      }
      const float* const result = p.partial + (place + part) * result_floats(kColumns);
      const float2* const rows = reinterpret_cast<const float2*>(result + kRows * kColumns);
      fours[i] = reinterpret_cast<const float4*>(result)[quad];
      lows[i] = rows[lane / 4];
      highs[i] = rows[lane / 4 + 8];
      ended[i] = -1;
      if (++part == count) {
        ended[i] = group;
        group += few ? 8 : 1;
        part = 0;
      }
      ++loaded;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (i >= loaded) continue;
      joined.join({lows[i].x, highs[i].x}, {lows[i].y, highs[i].y}, fours[i]);
      if (ended[i] < 0) continue;
      const float4 four = {joined.numbers[0], joined.numbers[1], joined.numbers[2],
                           joined.numbers[3]};
      if (few) {
        numbers[ended[i]][of_quad] = four;
        totals[ended[i]][of_quad] = {joined.joined[0].largest, joined.sums[0],
                                     joined.joined[1].largest, joined.sums[1]};
      } else {
        all.join({joined.joined[0].largest, joined.joined[1].largest}, joined.sums, four);
      }
      joined = Quad();
    }
  }
  if (few) {
    __syncthreads();
    if (thread >= quads) return;
    for (i32 group = 0; group < groups; ++group) {
      const float4 total = totals[group][of_quad];
      all.join({total.x, total.z}, {total.y, total.w}, numbers[group][of_quad]);
    }
  }
  const float v_scale = scale_of_cache<kScaled>(p);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    write_two<Query, kLatent, kAlternate>(
        p, Row(p, unit, lane / 4 + half * 8), quad / 32, lane, all.joined[half].largest,
        all.sums[half], all.numbers[2 * half], all.numbers[2 * half + 1], v_scale);
  }
}

// Query is F16 or BF16, of queries and output; Stored is Query or one of the 8-bit types. kEntries: of
// fp8_ds_mla, whose Stored is E4M3. Entries are read kVec bytes at a time. kShared are the bytes of
// shared memory, kStages the tiles in it.
template <typename Query, typename Stored, int kLatent, int kRope, bool kEntries, int kVec,
          int kStages, int kShared, typename Block, typename Length, typename Start>
__global__ void __launch_bounds__(kThreads, 2)
    paged_attention_mla(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using In = Operands<Query, Stored>;
  using Type = typename In::Type;
  constexpr bool kNarrow = In::kNarrow, kScaled = kNarrow && !kEntries;
  constexpr int kSize = kLatent + kRope;
  constexpr int kKeys = kNarrow ? 32 : 16;         // tokens of a tile
  constexpr int kScoreTiles = kKeys / 8;           // tiles of 8 columns of scores
  constexpr int kSteps = (kSize + 15) / 16;        // of the product of queries and entries
  constexpr int kColumns = (kLatent + 63) / 64 * 64;
  constexpr int kTiles = kColumns / 8 / kWarps;    // of 8 columns of a warp's output
  constexpr int kScalesAt = 512, kRopeAt = 528;    // bytes of a kEntries entry
  constexpr int kEntryBytes = kEntries ? 656 : kSize * In::kBytes;
  constexpr int kMine = kEntries ? 8 : (kSteps + kWarps - 1) / kWarps;  // steps of a warp
  constexpr int kOfSteps = kMine * kWarps > kColumns / 16 ? kMine * kWarps : kColumns / 16;
  constexpr int kChunks = kEntries ? 41 : kOfSteps * In::kBytes;  // of 16 bytes
  // An odd number of chunks apart, so that eight rows of a matrix lie in different banks.
  constexpr int kRowBytes = (kChunks | 1) * 16;
  constexpr int kTileBytes = kKeys * kRowBytes;
  constexpr int kScoresAt = kStages * kTileBytes;
  constexpr int kScoresOfTile = kWarps * kScoreTiles * 32;  // in fours
  constexpr int kTotalsAt = kScoresAt + 2 * kScoresOfTile * 16;
  constexpr int kMissingAt = kTotalsAt + 2 * kThreads * 16;
  static_assert(kStages * kTileBytes >= kRows * kColumns * 4, "there is room for a result");
  static_assert(kShared == kMissingAt + kStages * 4, "what the host gives");
  CUPY_CACHE_DYNAMIC_SHARED(shared, kShared);

  const i32 warp = static_cast<i32>(threadIdx.x / 32), lane = static_cast<i32>(threadIdx.x % 32);
  const int in_half = lane / 4, pair = lane % 4;
  float4* const scores_of_all = reinterpret_cast<float4*>(shared + kScoresAt);
  const int of_lane = warp * kTiles * 32 + lane;  // its first four numbers of a result
  // The thread's own: the largest scores and the sums of its two rows, joined so far. There are no
  // registers to keep them.
  float4* const kept_totals = reinterpret_cast<float4*>(shared + kTotalsAt) + threadIdx.x;
  float4* const joined_totals = kept_totals + kThreads;
  u32* const missing = reinterpret_cast<u32*>(shared + kMissingAt);
  const float kv_scale = scale_of_cache<kScaled>(p);
  const float scale = p.scale * kv_scale * kLog2E;

  u32 number = blockIdx.x, items;
  do {
    // Found again for each item, of which a block has several where there are many: there are no
    // registers to keep it.
    const Schedule<Length, Start, kThreads> schedule(p, number, false);
    items = schedule.items;
    const Item& item = schedule.item();
    if (number >= items || item.sequence < 0) return;
    const Sequence its = sequence_at<Length, Start>(p, item.sequence);
    if (its.given_length != its.length && threadIdx.x == 0) {
      record_fault(kSeqLens, item.sequence, its.given_length, longest(p) + 1);
    }
    const Cut cut(its.length);
    const Unit unit(p, item, its);
    const bool alone = item.last - item.first == cut.parts;  // it is all of the unit
    const i32 begin = item.first * cut.part;
    const i64 behind = static_cast<i64>(item.last) * cut.part;
    const i32 end = static_cast<i32>(behind < unit.seen ? behind : unit.seen);
    const i32 tiles = end > begin ? (end - begin - 1) / kKeys + 1 : 0;

    // --- copies, ahead of use
    // The block of the lane's token of a tile, as the table has it.
    const auto block_at = [&](i32 index) -> Block {
      const i32 token = begin + index * kKeys + lane;
      if (lane >= kKeys || token >= end) return -1;
      return static_cast<Block>(
          load_number<Block>(p.block_table + item.sequence * p.table_stride +
                             static_cast<i64>(static_cast<u32>(token) / p.block_size) *
                                 static_cast<i64>(sizeof(Block))));
    };
    Block upcoming = block_at(0);
    const auto request = [&](i32 index) {
      if (index < tiles) {
        const i32 token = begin + index * kKeys + lane;
        const bool present = lane < kKeys && token < end &&
                             in_bounds(upcoming, p.num_blocks, kBlockTable, item.sequence);
        const i64 away = present ? static_cast<i64>(upcoming) * p.block_stride +
                                       static_cast<u32>(token) % p.block_size * p.slot_stride
                                 : 0;
        upcoming = block_at(index + 1);
        const u32 absent = __ballot_sync(kWarp, !present);
        const i32 stage = index % kStages;
        if (threadIdx.x == 0) missing[stage] = absent;
        char* const to = shared + stage * kTileBytes + lane * 16;
        constexpr int kMyRows = kKeys / kWarps;
#pragma unroll
        for (int i = 0; i < kMyRows; ++i) {
          const int row = warp * kMyRows + i;
          const bool there = (absent >> row & 1) == 0;
          const char* const from = p.kv_cache + __shfl_sync(kWarp, away, row) + lane * 16;
#pragma unroll
          for (int first = 0; first < kChunks; first += 32) {
            if (first + 32 > kChunks && first + lane >= kChunks) continue;
#pragma unroll
            for (int piece = first * 16; piece < first * 16 + 16; piece += kVec) {
              const bool inside = kEntryBytes == kChunks * 16 || lane * 16 + piece < kEntryBytes;
              copy_async<kVec>(to + row * kRowBytes + piece, inside ? from + piece : p.kv_cache,
                               there && inside);
            }
          }
        }
      }
      commit_copies();
    };
    // --- queries, by way of what the last tile is copied to
    const Row rows[2] = {Row(p, unit, in_half), Row(p, unit, in_half + 8)};
    const i32 high[2] = {rows[0].high, rows[1].high};
    constexpr int kQuerySteps = kEntries ? kSteps : kWarps * kMine;
    constexpr int kQueryChunks = kQuerySteps * 2, kQueryRow = (kQueryChunks | 1) * 16;
    static_assert(kRows * kQueryRow <= kTileBytes, "there is room for the queries");
    char* const queries_at = shared + (kStages - 1) * kTileBytes;
#pragma unroll 1
    for (int row = warp; row < kRows; row += kWarps) {
      const Row its_row(p, unit, row);
      const char* const from = p.query + its_row.token * p.query_stride +
                               static_cast<i64>(its_row.head) * p.query_head_stride;
      char* const to = queries_at + row * kQueryRow;
      if (kSize % 8 == 0 && p.chunks_in) {
#pragma unroll 1
        for (int chunk = lane; chunk < kQueryChunks; chunk += 32) {
          const bool present = its_row.valid && chunk * 8 < kSize;
          copy_async<16>(to + chunk * 16, present ? from + chunk * 16 : p.query, present);
        }
      } else {
#pragma unroll 1
        for (int element = lane; element < kQueryChunks * 8; element += 32) {
          const bool present = its_row.valid && element < kSize;
          copy_async<2>(to + element * 2, present ? from + element * 2 : p.query, present);
        }
      }
    }
    commit_copies();
    u32 queries[kMine][4], rope[4];
    const auto read_queries = [&] {
#pragma unroll
    for (int step = 0; step < kMine; ++step) {
      const int first = (warp * kMine + step) * 2;  // chunk
      if constexpr (kNarrow) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const char* const at = queries_at + (in_half + half * 8) * kQueryRow + first * 16 + pair * 8;
          queries[step][half] = query_pair<Query, Type>(at, true, 2);
          queries[step][2 + half] = query_pair<Query, Type>(at + 4, true, 2);
        }
      } else {
        load_matrices<false>(queries[step],
                             queries_at + lane % 16 * kQueryRow + (first + lane / 16) * 16);
      }
    }
    if constexpr (kEntries) {
      load_matrices<false>(rope, queries_at + lane % 16 * kQueryRow +
                                     (kLatent / 8 + warp * 2 + lane / 16) * 16);
    }
    };
    const i32 all_high = __shfl_sync(kWarp, high[0], 0);  // the first row sees the least

    // --- tiles
    float largest[2], sums[2], out[kTiles][4];
    float kept_out[kTiles][4];
    constexpr float kSmallest = 0x1p-126f;
    float unit_scale = kSmallest;  // kEntries: what the output is relative to, a power of two
    const auto begin_part = [&] {
#pragma unroll
      for (int half = 0; half < 2; ++half) largest[half] = kNone, sums[half] = 0.0f;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
      unit_scale = kSmallest;
    };
    const auto begin_group = [&] {
      *kept_totals = {kNone, kNone, 0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        kept_out[i][0] = kept_out[i][1] = kept_out[i][2] = kept_out[i][3] = 0.0f;
      }
    };
    // Joins the part to those of its group before.
    const auto end_part = [&] {
      Joined kept[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums[half] += __shfl_xor_sync(kWarp, sums[half], 1);
        sums[half] += __shfl_xor_sync(kWarp, sums[half], 2);
      }
      join_totals(kept, kept_totals, {largest[0], largest[1], sums[0], sums[1]});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            const float its_out = kEntries ? out[i][j] * unit_scale : out[i][j];
            kept_out[i][j] = kept[half].sum(kept_out[i][j], its_out);
          }
        }
      }
    };
    // Joins the group to those of its unit before: all are then in kept_out if it is the last, else
    // in memory that is the lane's own.
    const auto end_group = [&](bool is_first, bool is_last) {
      float4* const state = reinterpret_cast<float4*>(
          p.partial + static_cast<i64>(blockIdx.x) * result_floats(kColumns)) + of_lane;
      Joined joined[2];
      join_totals(joined, joined_totals, *kept_totals);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float4 before = {0.0f, 0.0f, 0.0f, 0.0f};
        if (!is_first) before = state[i * 32];
        kept_out[i][0] = joined[0].sum(before.x, kept_out[i][0]);
        kept_out[i][1] = joined[0].sum(before.y, kept_out[i][1]);
        kept_out[i][2] = joined[1].sum(before.z, kept_out[i][2]);
        kept_out[i][3] = joined[1].sum(before.w, kept_out[i][3]);
        if (!is_last) {
          state[i * 32] = {kept_out[i][0], kept_out[i][1], kept_out[i][2], kept_out[i][3]};
        }
      }
    };
    *joined_totals = {kNone, kNone, 0.0f, 0.0f};
    begin_part();
    begin_group();
    const i32 of_part = cut.part / kKeys, of_group = of_part * cut.of_group;  // powers of two
    // This warp's part of a tile's scores, for all to add up.
    const auto multiply_queries = [&](i32 index) {
      const char* const tile = shared + index % kStages * kTileBytes;
      float scores[kScoreTiles][4] = {}, others[kScoreTiles][4] = {};  // of every second step
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int step = warp * kMine + i;
        u32 loaded[4];
        if constexpr (kNarrow) {
          load_matrices<false>(loaded, tile + lane * kRowBytes + step * 16);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            multiply_add<Type>(scores[j], queries[i], widen<Stored, 0, 1>(loaded[j]),
                               widen<Stored, 2, 3>(loaded[j]));
          }
        } else {
          load_matrices<false>(loaded, tile + (lane % 8 + lane / 16 * 8) * kRowBytes +
                                           (step * 2 + lane / 8 % 2) * 16);
          auto& sums_of = i % 2 ? others : scores;
          multiply_add<Type>(sums_of[0], queries[i], loaded[0], loaded[1]);
          multiply_add<Type>(sums_of[1], queries[i], loaded[2], loaded[3]);
        }
      }
      if constexpr (kEntries) {
        const float token_scale =
            *reinterpret_cast<const float*>(tile + lane * kRowBytes + kScalesAt + warp * 4);
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float its = __shfl_sync(kWarp, token_scale, j * 8 + pair * 2 + i);
            scores[j][i] *= its;
            scores[j][2 + i] *= its;
          }
        }
#pragma unroll
        for (int j = 0; j < kScoreTiles; j += 2) {
          u32 loaded[4];
          load_matrices<false>(loaded, tile + (j * 8 + lane % 8 + lane / 16 * 8) * kRowBytes +
                                           kRopeAt + (warp * 2 + lane / 8 % 2) * 16);
          multiply_add<Query>(scores[j], rope, loaded[0], loaded[1]);
          multiply_add<Query>(scores[j + 1], rope, loaded[2], loaded[3]);
        }
      }
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        float4 four = {scores[j][0], scores[j][1], scores[j][2], scores[j][3]};
        if constexpr (!kNarrow) {
          four = {four.x + others[j][0], four.y + others[j][1], four.z + others[j][2],
                  four.w + others[j][3]};
        }
        scores_of_all[index % 2 * kScoresOfTile + (warp * kScoreTiles + j) * 32 + lane] = four;
      }
    };
    // Each turn multiplies the weights of a tile with its values, and the queries with the next one:
    // one waits for little of the other. The first turns only copy.
    for (i32 index = 1 - kStages; index < tiles; ++index) {
      if (index >= -1) {
        wait_for_copies<kStages - 3>();
        // All have the next tile and this one's scores, and are done with the tile before.
        __syncthreads();
        if (index == -1) read_queries();
        if (index + 1 < tiles) multiply_queries(index + 1);
      }
      if (index < 0) {
        request(index + kStages - 1);
        continue;
      }
      const i32 stage = index % kStages;
      const char* const tile = shared + stage * kTileBytes;
      float scores[kScoreTiles][4];
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        const float4* const its = scores_of_all + index % 2 * kScoresOfTile + j * 32 + lane;
        float4 sum = its[0];
#pragma unroll
        for (int from = 1; from < kWarps; ++from) {
          const float4 more = its[from * kScoreTiles * 32];
          sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
        }
        scores[j][0] = sum.x * scale;
        scores[j][1] = sum.y * scale;
        scores[j][2] = sum.z * scale;
        scores[j][3] = sum.w * scale;
      }

      const i32 token = begin + index * kKeys;
      const u32 absent = missing[stage] & (0xffffffffu >> (32 - kKeys));
      const bool all = token + kKeys <= all_high && absent == 0;
      float most[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        most[half] = kNone;
        if (!all) {
#pragma unroll
          for (int j = 0; j < kScoreTiles; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int in_tile = j * 8 + pair * 2 + i;
              if (token + in_tile >= high[half] || (absent >> in_tile & 1)) {
                scores[j][2 * half + i] = __uint_as_float(0xff800000u);  // minus infinity
              }
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kScoreTiles; ++j) {
          most[half] = fmaxf(most[half], fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
        }
        most[half] = fmaxf(most[half], __shfl_xor_sync(kWarp, most[half], 1));
        most[half] = fmaxf(most[half], __shfl_xor_sync(kWarp, most[half], 2));
      }
      if (__any_sync(kWarp, most[0] > largest[0] || most[1] > largest[1])) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float now = fmaxf(largest[half], most[half]);
          const float weight = power_of_two(largest[half] - now);
          largest[half] = now;
          sums[half] *= weight;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            out[i][2 * half] *= weight;
            out[i][2 * half + 1] *= weight;
          }
        }
      }
      float token_scale = 0.0f;  // kEntries: of the lane's token
      if constexpr (kEntries) {
        token_scale =
            *reinterpret_cast<const float*>(tile + lane * kRowBytes + kScalesAt + warp * 4);
        float highest = fabsf(token_scale);
#pragma unroll
        for (int other = 16; other > 0; other /= 2) {
          highest = fmaxf(highest, __shfl_xor_sync(kWarp, highest, other));
        }
        if (highest > unit_scale) {
          // The smallest power of two that is not below it.
          const u32 bits = (__float_as_uint(fminf(highest, 0x1p126f)) + 0x007fffffu) & 0x7f800000u;
          const float shrink = unit_scale * __uint_as_float(0x7f000000u - bits);
          unit_scale = __uint_as_float(bits);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            out[i][0] *= shrink;
            out[i][1] *= shrink;
            out[i][2] *= shrink;
            out[i][3] *= shrink;
          }
        }
        token_scale *= __uint_as_float(0x7f000000u - __float_as_uint(unit_scale));
      }
      u32 weights[kKeys / 16][4];
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        float scales[2] = {1.0f, 1.0f};
        if constexpr (kEntries) {
          scales[0] = __shfl_sync(kWarp, token_scale, j * 8 + pair * 2);
          scales[1] = __shfl_sync(kWarp, token_scale, j * 8 + pair * 2 + 1);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = power_of_two(scores[j][2 * half] - largest[half]);
          const float high = power_of_two(scores[j][2 * half + 1] - largest[half]);
          sums[half] += low + high;
          weights[j / 2][j % 2 * 2 + half] = pack_pair<Type>(low * scales[0], high * scales[1]);
        }
      }

#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        u32 loaded[4];
        if constexpr (kNarrow) {
          load_matrices<true>(loaded, tile + lane * kRowBytes + (warp * kTiles + i) * 8);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const u32 b0 = loaded[2 * j], b1 = loaded[2 * j + 1];
            // Every second column, then the others.
            multiply_add<Type>(out[i], weights[j],
                               widen<Stored, 0, 2>(b0),
                               widen<Stored, 0, 2>(b1));
            multiply_add<Type>(out[i + 1], weights[j],
                               widen<Stored, 1, 3>(b0),
                               widen<Stored, 1, 3>(b1));
          }
        } else {
          load_matrices<true>(loaded, tile + lane % 16 * kRowBytes +
                                          (warp * kTiles + i + lane / 16) * 16);
          multiply_add<Type>(out[i], weights[0], loaded[0], loaded[1]);
          multiply_add<Type>(out[i + 1], weights[0], loaded[2], loaded[3]);
        }
      }

      request(index + kStages - 1);

      const bool is_last = index + 1 == tiles;
      if (((index + 1) & (of_part - 1)) == 0 || is_last) {
        end_part();
        begin_part();
      }
      if ((((index + 1) & (of_group - 1)) == 0 || is_last) && alone) {
        end_group(index < of_group, is_last);
        if (!is_last) begin_group();
      }
    }
    wait_for_copies<0>();

    // --- the result
    if (alone) {
      __syncthreads();  // the tiles' place is free
      float4* const result = reinterpret_cast<float4*>(shared) + of_lane;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        result[i * 32] = {kept_out[i][0], kept_out[i][1], kept_out[i][2], kept_out[i][3]};
      }
      // Where the rows stand is found again: there are no registers to keep it.
      const Unit same(p, item, sequence_at<Length, Start>(p, item.sequence));
      const Row low(p, same, in_half), upper(p, same, in_half + 8);
      const float4 totals = *joined_totals;
#pragma unroll 1
      for (int i = 0; i < kTiles; ++i) {
        const float4 four = result[i * 32];
        write_two<Query, kLatent, kNarrow>(p, low, warp * kTiles + i, lane, totals.x, totals.z,
                                           four.x, four.y, kv_scale);
        write_two<Query, kLatent, kNarrow>(p, upper, warp * kTiles + i, lane, totals.y, totals.w,
                                           four.z, four.w, kv_scale);
      }
    } else if (tiles > 0) {
      float* const result = p.partial + static_cast<i64>(number) * result_floats(kColumns);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        reinterpret_cast<float4*>(result)[of_lane + i * 32] = {
            kept_out[i][0], kept_out[i][1], kept_out[i][2], kept_out[i][3]};
      }
      if (warp == 0 && pair == 0) {
        float2* const totals = reinterpret_cast<float2*>(result + kRows * kColumns);
        totals[in_half] = {kept_totals->x, kept_totals->z};
        totals[in_half + 8] = {kept_totals->y, kept_totals->w};
      }
    }
    number += gridDim.x;
    __syncthreads();  // what is shared is free
  } while (number < items);
}

}  // namespace cupy_cache
