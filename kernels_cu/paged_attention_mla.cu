// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention over the entries of a paged cache: all query heads share one entry for
// each token, whose first elements are its value too.
//
// A unit of work is 16 rows: query heads of neighbouring tokens of one sequence. The tokens of a
// sequence are cut into parts, and these are put together in at most eight groups, by the sequence's
// length alone. The results of a group's parts are joined one after the other, and so are those of a
// sequence's groups. So it does not matter to any bit who computes a part: each thread block takes as
// much of all units, one after the other, as any other, and what a unit lacks is exchanged through
// scratch memory. The last of the blocks that share a unit joins their results; where many share one, a
// second launch does. Where sequences have many units, these are dealt out to lanes of thread blocks, so
// that those of one sequence are worked on at the same time, and its tokens are read from memory once.
//
// The warps of a thread block share each tile of tokens, which is copied to shared memory ahead of use.
// Four of them make up a team, which multiplies some of a tile's tokens with the queries: each warp with
// a quarter of the queries' elements, which it has in registers. The sums of all four are the scores,
// which each warp adds up for itself. Each then has some of the columns of the result.
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

namespace cupy_cache {

// Strides are in bytes.
struct Params {
  const char* query;            // [tokens, heads, entry]
  const char* kv_cache;         // [num_blocks, block_size, entry]
  const char* block_table;      // [sequences, table_width]
  const char* seq_lens;         // [sequences]
  const char* query_start_loc;  // [sequences + 1]; where Start is void each has one token
  const char* kv_scale;         // float32, or null: kv_scale_value
  char* out;                    // [tokens, heads, kLatent]
  char* lse;                    // float32 [tokens, heads], or null
  i64 tokens;
  i64 sequences;
  i64 table_width;
  i64 table_stride;
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
  u64 scratch_tag;  // see scratch.cuh
  u32 block_size;
  u32 heads;
  u32 causal;
  u32 aligned;  // 1: the query's rows can be read 16 bytes at a time; 2: the output's written in pairs
  Divisor by_block_size;
  char* scratch;  // a word for each unit, and slots of results
  u64 slots_at;   // bytes
  u32 slots;      // of a thread block
  u32 lanes;      // that a sequence's units are dealt out to
  u32 blocks;     // of a lane
  u32 joins;      // the last block that has a part of a unit joins all; else a second launch does
};

constexpr u32 kBlockTable = 1, kSeqLens = 2, kQueryStartLoc = 3;  // numbers of guarded arguments
constexpr int kRows = 16;                                         // of a unit
constexpr int kTeam = 4;                                          // warps
constexpr i32 kTurn = 64;                                         // tokens, in which work is measured
constexpr i32 kGroups = 8, kMostParts = 128;                      // of a sequence, at most
constexpr int kJoiningThreads = 256;
constexpr int kTogether = 8;  // results that a thread of the second launch loads at the same time

// How a sequence is cut: into at most 128 parts of at least 64 tokens, and groups of at least 1,024.
struct Cut {
  i32 turns;  // at least 1
  i32 log;    // of the turns of a part
  i32 parts;
  i32 group;  // parts

  __device__ __forceinline__ explicit Cut(i32 length) {
    turns = max((length + (kTurn - 1)) / kTurn, 1);
    log = turns <= 16 ? 0 : turns <= 64 ? 1 : turns <= 512 ? 2 : 32 - __clz((turns - 1) / 128);
    parts = (turns + (1 << log) - 1) >> log;
    group = max(16 >> log, (parts + (kGroups - 1)) / kGroups);
  }
};

__device__ __forceinline__ i64 longest(const Params& p) {
  constexpr i64 kLongest = 0x7fffff00;  // tokens have 32-bit numbers
  const i64 in_table = p.table_width * p.block_size;
  return in_table < kLongest ? in_table : kLongest;
}

// A sequence: where its rows of the query begin, and how much there is to do for it.
struct Sequence {
  i64 first;  // token, a row of query and out
  u32 count;  // tokens
  u32 units;
  i32 length;
  i64 stated;  // the same, as it was given

  template <typename Length>
  __device__ __forceinline__ void load(const Params& p, i64 index, i64 start, i64 end) {
    first = start;
    count = static_cast<u32>(end - start);
    units = static_cast<u32>((static_cast<u64>(count) * p.heads + (kRows - 1)) / kRows);
    stated = load_number<Length>(p.seq_lens + index * static_cast<i64>(sizeof(Length)));
    length = static_cast<i32>(max(min(stated, longest(p)), i64{0}));
  }
  // How many of its units are those of a lane.
  __device__ __forceinline__ u32 of_lane(const Params& p, u32 lane) const {
    return units > lane ? (units - lane - 1) / p.lanes + 1 : 0;
  }
};

// A start counts as the nearest number that is neither below an earlier one nor outside the query.
__device__ __forceinline__ i64 in_order(const Params& p, i64 start, i64 before) {
  return start < before ? before : start > p.tokens ? p.tokens : start;
}
template <typename Start>
__device__ __forceinline__ i64 load_start(const Params& p, i64 index) {
  if constexpr (IsVoid<Start>::value) return index;
  else return load_number<Start>(p.query_start_loc + index * static_cast<i64>(sizeof(Start)));
}

// What a thread block takes of the units of its lane: their turns, those of all sequences one after the
// other, are numbered, and a block takes the parts whose first turn is one of its own.
template <typename Length, typename Start, int kThreads>
class Share {
 public:
  u64 each;        // turns of a block
  u64 begin, end;  // of this block
  u64 before;      // turns of the units before
  i64 index;       // of the sequence
  Sequence sequence;
  u32 unit;  // of the sequence

  // `block` is one of those of the lane. kUnits: it is the number of one of its units, which is found.
  template <bool kUnits = false>
  __device__ __forceinline__ void find(const Params& p, u32 lane, u32 block) {
    lane_ = lane;
    sequences_ = p.sequences;
    constexpr int kWarps = kThreads / 32;
    __shared__ u64 numbers[kWarps];
    __shared__ u32 odd_ones[kWarps];
    __shared__ i64 found[4];
    __shared__ u32 units_of_warps[kWarps];
    const u32 count = static_cast<u32>(p.sequences), of_thread = (count + kThreads - 1) / kThreads;
    const u32 first = min(threadIdx.x * of_thread, count), last = min(first + of_thread, count);
    const u32 warp = threadIdx.x / 32, in_warp = threadIdx.x % 32;
    i64 start = first < last ? load_start<Start>(p, first) : 0;
    u64 mine = 0;
    u32 units = 0;  // kUnits
    bool odd = false;
    i64 at = start;
    for (u32 i = first; i < last; ++i) {
      const i64 next = load_start<Start>(p, i + 1);
      odd |= at < 0 || next < at || next > p.tokens;
      mine += turns_of(p, i, at, next, units);
      at = next;
    }
    if constexpr (!IsVoid<Start>::value) {
      const u32 odds = __ballot_sync(kWarp, odd);
      if (in_warp == 0) odd_ones[warp] = odds;
      __syncthreads();
      bool any = false;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) any |= odd_ones[i] != 0;
      if (any) {  // all starts are read by each thread
        i64 behind = 0;
        for (u32 i = 0; i <= last; ++i) {
          const i64 stated = load_start<Start>(p, i), next = in_order(p, stated, behind);
          if (next != stated) record_fault(kQueryStartLoc, i, stated, p.tokens + 1);
          if (i == first) start = next, mine = 0, units = 0;
          else if (i > first) mine += turns_of(p, i - 1, behind, next, units);
          behind = next;
        }
      }
    }
    u64 until = mine;  // of this warp's threads, up to this one
    u32 units_until = units;
#pragma unroll
    for (u32 other = 1; other < 32; other *= 2) {
      const u64 lower = __shfl_up_sync(kWarp, until, other);
      if (in_warp >= other) until += lower;
      if constexpr (kUnits) {
        const u32 units_lower = __shfl_up_sync(kWarp, units_until, other);
        if (in_warp >= other) units_until += units_lower;
      }
    }
    if (in_warp == 31) numbers[warp] = until, units_of_warps[warp] = units_until;
    if (threadIdx.x == 0) found[0] = count;
    __syncthreads();
    u64 total = 0;
    before = until - mine;
    u32 units_before = units_until - units;
#pragma unroll
    for (u32 i = 0; i < kWarps; ++i) {
      if (i < warp) before += numbers[i], units_before += units_of_warps[i];
      total += numbers[i];
    }
    each = max((total + p.blocks - 1) / p.blocks, u64{1});
    begin = min(block * each, total);
    end = min(begin + each, total);
    if (kUnits ? units_before <= block && block < units_before + units
               : before <= begin && begin < before + mine) {
      i64 its = start;
      for (u32 i = first; i < last; ++i) {
        const i64 next = in_order(p, load_start<Start>(p, i + 1), its);
        u32 its_units = 0;
        const u64 turns = turns_of(p, i, its, next, its_units);
        if (kUnits ? block < units_before + its_units : begin < before + turns) {
          found[0] = i;
          found[1] = its;
          found[2] = static_cast<i64>(before);
          found[3] = units_before;
          break;
        }
        before += turns;
        units_before += its_units;
        its = next;
      }
    }
    __syncthreads();
    index = found[0];
    if (index >= p.sequences) return;
    before = static_cast<u64>(found[2]);
    load(p, found[1]);
    const u64 turns = Cut(sequence.length).turns;
    const u64 skipped = kUnits ? block - static_cast<u32>(found[3]) : (begin - before) / turns;
    unit = lane_ + static_cast<u32>(skipped) * p.lanes;
    before += skipped * turns;
  }

  __device__ __forceinline__ bool more() const {
    return index < sequences_ && before < end && begin < end;
  }
  // Goes on to the next unit.
  __device__ __forceinline__ void go_on(const Params& p) {
    before += static_cast<u32>(Cut(sequence.length).turns);
    unit += p.lanes;
    while (unit >= sequence.units) {
      const i64 start = sequence.first + sequence.count;
      unit = lane_;
      if (++index >= sequences_) return;
      load(p, start);
    }
  }
  // The first part of the unit that is not for the blocks before turn `turn`.
  __device__ __forceinline__ i32 part_at(const Cut& cut, u64 turn) const {
    const u64 turns = turn > before ? turn - before : 0;
    const u64 part = (turns + ((u64{1} << cut.log) - 1)) >> cut.log;
    return part < static_cast<u64>(cut.parts) ? static_cast<i32>(part) : cut.parts;
  }
  // The block that a part of the unit is for.
  __device__ __forceinline__ u32 block_of(const Cut& cut, i32 part) const {
    const u64 turn = before + (static_cast<u64>(part) << cut.log);
    if (((turn | each) >> 32) == 0) return static_cast<u32>(turn) / static_cast<u32>(each);
    return static_cast<u32>(turn / each);
  }

 private:
  u32 lane_;
  i64 sequences_;

  __device__ __forceinline__ u64 turns_of(const Params& p, i64 number, i64 start, i64 behind,
                                          u32& units) const {
    if (behind <= start || start < 0 || behind > p.tokens) return 0;
    Sequence its;
    its.load<Length>(p, number, start, behind);
    units += its.of_lane(p, lane_);
    return static_cast<u64>(its.of_lane(p, lane_)) * static_cast<u32>(Cut(its.length).turns);
  }
  __device__ __forceinline__ void load(const Params& p, i64 start) {
    i64 behind = start + 1;
    if constexpr (!IsVoid<Start>::value) behind = in_order(p, load_start<Start>(p, index + 1), start);
    sequence.load<Length>(p, index, start, behind);
  }
};

// Where the rows of a unit stand.
struct Unit {
  i64 first;  // token of the sequence, a row of query and out
  u32 count;  // tokens of the sequence
  u32 row;    // the first one's number among the sequence's
  i32 length;
  i32 seen;  // tokens that any row sees: those before

  __device__ __forceinline__ Unit(const Params& p, const Sequence& its, u32 unit)
      : first(its.first), count(its.count), row(unit * kRows), length(its.length) {
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
  const bool any = sum != 0.0f;  // tokens; of logits that are no numbers the sum is none
  const float weight = any ? v_scale / sum : 0.0f;
  const u32 bits = any ? pack_pair<Query>(first * weight, second * weight) : 0u;
  char* const at = p.out + row.token * p.out_stride + row.head * p.out_head_stride;
  const int column = column_of<kAlternate>(tile, lane, 0), other = column_of<kAlternate>(tile, lane, 1);
  if (!kAlternate && (p.aligned & 2) && other < kLatent) {
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

// What lies in scratch memory of a part of a unit, if one of the blocks that share it has a result that
// begins with it. Of a unit that it begins, a block has whole groups, and then what it has of another;
// of others single parts until a group begins, and then groups, or what it has of them.
template <typename Share>
struct Result {
  bool begins;  // with the part; else this belongs to a result before
  i32 count;    // parts of it
  i32 slot;     // of the block
  u32 block;

  // `parts` of the unit have results; a block has `slots`.
  __device__ __forceinline__ Result(const Share& share, const Cut& cut, i32 parts, i32 slots, i32 part) {
    block = share.block_of(cut, part);
    const i32 from = share.part_at(cut, block * share.each);
    const i32 to = min(share.part_at(cut, (block + u64{1}) * share.each), parts);
    const i32 groups_end = to - to % cut.group;
    if (from == 0) {
      const bool whole = part < groups_end;
      begins = part == (whole ? 0 : groups_end);
      slot = whole ? slots - 2 : slots - 1;
      count = whole ? groups_end - part : to - part;
      return;
    }
    const i32 first = min((from + cut.group - 1) / cut.group * cut.group, to);  // in a whole group
    begins = part < first || part % cut.group == 0;
    slot = part - from;
    count = 1;
    if (part >= first) {
      slot = first - from + (part - first) / cut.group;
      count = min(part + cut.group, to) - part;
    }
  }
  // Whether a result of a block ends before `part`, if its parts are those from `from` to before `to`.
  static __device__ __forceinline__ bool ends_at(const Cut& cut, i32 from, i32 to, i32 part) {
    const i32 in_group = (part - 1) % cut.group;
    return part == to || in_group + 1 == cut.group || (from > 0 && part - 1 - in_group < from);
  }
};

// Joins what thread blocks have left of units that they share, where these are few. A thread has a quad
// of numbers, and all of a group's results.
template <typename Query, int kLatent, bool kAlternate, bool kScaled, int kTeams, typename Length,
          typename Start>
__global__ void __launch_bounds__(kJoiningThreads) join_parts(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  constexpr int kWarps = kTeams * kTeam;
  constexpr int kColumns = (kLatent + 16 * kWarps - 1) / (16 * kWarps) * (16 * kWarps);
  constexpr int kFours = kRows * kColumns / 4, kSlotBytes = kFours * 16 + kRows * 8;
  using Shares = Share<Length, Start, kJoiningThreads>;
  Shares share;
  share.template find<true>(p, blockIdx.x % p.lanes, blockIdx.x / p.lanes);
  if (share.index >= p.sequences) return;
  const Cut cut(share.sequence.length);
  const Unit unit(p, share.sequence, share.unit);
  const i32 part_tokens = kTurn << cut.log;
  const i32 parts = max((unit.seen + part_tokens - 1) / part_tokens, 1);
  const u32 first_block = share.block_of(cut, 0);
  if (share.part_at(cut, (first_block + u64{1}) * share.each) >= parts) return;  // it was written

  const int lane = static_cast<int>(threadIdx.x % 32), group = static_cast<int>(threadIdx.x / 32);
  const int quad = static_cast<int>(blockIdx.y) * 32 + lane;
  __shared__ float4 numbers[kGroups][32], totals[kGroups][32];
  static_assert(kGroups * 32 == kJoiningThreads, "a warp for each group");
  // Each lane looks at one of the group's parts, as that takes long. What the unit's first block has of
  // several groups is for the first.
  const i32 begin = group * cut.group, end = min(begin + cut.group, parts);
  const Result<Shares> mine(share, cut, parts, static_cast<i32>(p.slots),
                            min(begin + lane, parts - 1));
  const u32 there = __ballot_sync(kWarp, begin + lane < end && mine.begins);
  const u32 number =
      (mine.block * p.lanes + blockIdx.x % p.lanes) * p.slots + static_cast<u32>(mine.slot);
  Joined joined[2];
  float4 total = {kNone, kNone, 0.0f, 0.0f}, sum = {0.0f, 0.0f, 0.0f, 0.0f};
  for (i32 first = 0; first < end - begin; first += kTogether) {
    float4 fours[kTogether];
    float2 lows[kTogether], uppers[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if ((there >> (first + i) & 1) == 0) continue;
      const u64 its_number = __shfl_sync(kWarp, number, first + i);
      const char* const slot = p.scratch + p.slots_at + its_number * kSlotBytes;
      const float4* const its = reinterpret_cast<const float4*>(slot);
      const float2* const rows = reinterpret_cast<const float2*>(its + kFours);
      fours[i] = its[quad];
      lows[i] = rows[lane / 4];
      uppers[i] = rows[lane / 4 + 8];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if ((there >> (first + i) & 1) == 0) continue;
      join_totals(joined, &total, {lows[i].x, uppers[i].x, lows[i].y, uppers[i].y});
      sum = {joined[0].sum(sum.x, fours[i].x), joined[0].sum(sum.y, fours[i].y),
             joined[1].sum(sum.z, fours[i].z), joined[1].sum(sum.w, fours[i].w)};
    }
  }
  numbers[group][lane] = sum;
  // A group that is told of by another has no weight at all.
  totals[group][lane] = there != 0 ? total : float4{__uint_as_float(0x7fc00000u), 0.0f, 0.0f, 0.0f};
  __syncthreads();
  if (group > 0) return;
  total = {kNone, kNone, 0.0f, 0.0f};
  sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const float4 more = totals[i][lane], its = numbers[i][lane];
    if (more.x != more.x) continue;
    join_totals(joined, &total, more);
    sum = {joined[0].sum(sum.x, its.x), joined[0].sum(sum.y, its.y), joined[1].sum(sum.z, its.z),
           joined[1].sum(sum.w, its.w)};
  }
  const float v_scale = scale_of_cache<kScaled>(p);
  const Row low(p, unit, lane / 4), upper(p, unit, lane / 4 + 8);
  write_two<Query, kLatent, kAlternate>(p, low, quad / 32, lane, total.x, total.z, sum.x, sum.y,
                                        v_scale);
  write_two<Query, kLatent, kAlternate>(p, upper, quad / 32, lane, total.y, total.w, sum.z, sum.w,
                                        v_scale);
}

// Query is F16 or BF16, of queries and output; Stored is Query or one of the 8-bit types. kEntries: of
// fp8_ds_mla, whose Stored is E4M3. Entries are read kVec bytes at a time. kShared are the bytes of
// shared memory, kStages the tiles in it.
template <typename Query, typename Stored, int kLatent, int kRope, bool kEntries, int kVec,
          int kTeams, int kStages, int kShared, typename Block, typename Length, typename Start>
__global__ void __launch_bounds__(kTeams * kTeam * 32, kTeams == 1 ? 2 : 1)
    paged_attention_mla(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using In = Operands<Query, Stored>;
  using Type = typename In::Type;
  constexpr int kWarps = kTeams * kTeam, kThreads = kWarps * 32;
  constexpr bool kNarrow = In::kNarrow, kScaled = kNarrow && !kEntries;
  constexpr int kSize = kLatent + kRope;
  constexpr int kOfTeam = kNarrow ? 32 : 16;       // tokens of a tile that a team multiplies
  constexpr int kKeys = kTeams * kOfTeam;          // tokens of a tile
  constexpr int kMyRows = kKeys / kWarps;          // of a tile that a warp copies
  constexpr int kScoreTiles = kKeys / 8;           // tiles of 8 columns of scores
  constexpr int kMyScores = kOfTeam / 8;           // of a team
  constexpr int kSteps = (kSize + 15) / 16;        // of the product of queries and entries
  constexpr int kColumns = (kLatent + 16 * kWarps - 1) / (16 * kWarps) * (16 * kWarps);
  constexpr int kTiles = kColumns / 8 / kWarps;    // of 8 columns of a warp's output
  constexpr int kScalesAt = 512, kRopeAt = 528;    // bytes of a kEntries entry
  constexpr int kEntryBytes = kEntries ? 656 : kSize * In::kBytes;
  constexpr int kMine = kEntries ? 8 : (kSteps + kTeam - 1) / kTeam;  // steps of a warp
  constexpr int kOfSteps = kMine * kTeam > kColumns / 16 ? kMine * kTeam : kColumns / 16;
  constexpr int kChunks = kEntries ? 41 : kOfSteps * In::kBytes;  // of 16 bytes
  // An odd number of chunks apart, so that eight rows of a matrix lie in different banks.
  constexpr int kRowBytes = (kChunks | 1) * 16;
  constexpr int kTileBytes = kKeys * kRowBytes;
  constexpr int kScoresAt = kStages * kTileBytes;
  constexpr int kScoresOfTile = kTeam * kScoreTiles * 32;  // in fours
  constexpr int kTotalsAt = kScoresAt + 2 * kScoresOfTile * 16;
  constexpr int kMissingAt = kTotalsAt + 2 * kThreads * 16;
  constexpr int kArrivalsAt = kMissingAt + kStages * 8;
  constexpr int kFours = kTiles * kThreads;  // of a result; then it has its rows' totals
  constexpr int kSlotBytes = kFours * 16 + kRows * 8;
  constexpr bool kWholeRows = kHasRowCopies && kVec == 16 && kEntryBytes == kChunks * 16;
  static_assert(kStages * kTileBytes >= kRows * kColumns * 4, "there is room for a result");
  static_assert(kShared == kArrivalsAt + kStages * 8, "what the host gives");
  CUPY_CACHE_DYNAMIC_SHARED(shared, kShared);

  const i32 warp = static_cast<i32>(threadIdx.x / 32), lane = static_cast<i32>(threadIdx.x % 32);
  const int in_half = lane / 4, pair = lane % 4;
  const int quarter = warp % kTeam, team = warp / kTeam;
  float4* const scores_of_all = reinterpret_cast<float4*>(shared + kScoresAt);
  const int of_lane = warp * kTiles * 32 + lane;  // its first four numbers of a result
  // The thread's own: the largest scores and the sums of its two rows, joined so far.
  float4* const kept_totals = reinterpret_cast<float4*>(shared + kTotalsAt) + threadIdx.x;
  float4* const joined_totals = kept_totals + kThreads;
  u8* const missing = reinterpret_cast<u8*>(shared + kMissingAt);  // of each warp's rows
  u64* const arrivals = reinterpret_cast<u64*>(shared + kArrivalsAt);
  const float kv_scale = scale_of_cache<kScaled>(p);
  const float scale = p.scale * kv_scale * kLog2E;

  using Shares = Share<Length, Start, kThreads>;
  const u32 my_lane = blockIdx.x % p.lanes, my_block = blockIdx.x / p.lanes;
  // There are no registers to keep it.
  __shared__ Shares kept_share;
  {
    Shares share;
    share.find(p, my_lane, my_block);
    if (!share.more()) return;
    if (threadIdx.x == 0) {
      kept_share = share;
      for (int i = 0; kWholeRows && i < kStages; ++i) begin_arrivals(arrivals + i, kWarps);
    }
    __syncthreads();
  }
  u32 copied = 0;  // tiles of the units before
  bool more = true;
  const auto go_on = [&] {
    Shares share = kept_share;
    __syncthreads();  // what is shared is free
    share.go_on(p);
    if (threadIdx.x == 0) kept_share = share;
    __syncthreads();
    more = share.more();
  };
  do {
    const Shares& share = kept_share;
    const Cut cut(share.sequence.length);
    const Unit unit(p, share.sequence, share.unit);
    // Parts that have a result.
    const i32 part_tokens = kTurn << cut.log;
    const i32 parts = max((unit.seen + part_tokens - 1) / part_tokens, 1);
    const i32 from = min(share.part_at(cut, share.begin), parts);
    const i32 to = min(share.part_at(cut, share.end), parts);
    if (from >= to) {
      go_on();
      continue;
    }
    if (share.sequence.stated != share.sequence.length && threadIdx.x == 0) {
      record_fault(kSeqLens, share.index, share.sequence.stated, longest(p) + 1);
    }
    const bool alone = from == 0 && to == parts;  // it is all of the unit
    const auto word_of = [&] {  // where those that share it are counted
      u64 number = static_cast<u64>(share.index) * share.sequence.units + share.unit;
      if constexpr (!IsVoid<Start>::value) {
        number = static_cast<u64>(share.sequence.first) * p.heads / kRows +
                 static_cast<u64>(share.index) + share.unit;
      }
      return reinterpret_cast<u64*>(p.scratch) + number;
    };
    const i32 begin = from * part_tokens;
    const i64 behind = static_cast<i64>(to) * part_tokens;
    const i32 end = static_cast<i32>(behind < unit.seen ? behind : unit.seen);
    const i32 tiles = end > begin ? (end - begin - 1) / kKeys + 1 : 0;

    // --- copies, ahead of use
    // The blocks of the warp's rows of some tiles, as the table has them: each of its lanes has one.
    constexpr int kAtATime = 32 / kMyRows;
    const auto blocks_from = [&](i32 index) -> Block {
      const i32 token = begin + (index + lane / kMyRows) * kKeys + warp * kMyRows + lane % kMyRows;
      if (token >= end) return -1;
      return static_cast<Block>(
          load_number<Block>(p.block_table + share.index * p.table_stride +
                             static_cast<i64>(p.by_block_size.quotient(static_cast<u32>(token))) *
                                 static_cast<i64>(sizeof(Block))));
    };
    Block upcoming = blocks_from(0);
    const auto stage_of = [&](i32 index) { return (copied + static_cast<u32>(index)) % kStages; };
    const auto request = [&](i32 index) {
      if (index < tiles) {
        const i32 token = begin + index * kKeys + warp * kMyRows + lane;
        const int in_time = index % kAtATime * kMyRows;
        const Block block = __shfl_sync(kWarp, upcoming, in_time + lane % kMyRows);
        const bool present = lane < kMyRows && token < end &&
                             in_bounds(block, p.num_blocks, kBlockTable, share.index);
        const u32 offset = p.by_block_size.remainder(static_cast<u32>(token), p.block_size);
        const i64 away =
            present ? static_cast<i64>(block) * p.block_stride + offset * p.slot_stride : 0;
        if (in_time + kMyRows == 32) upcoming = blocks_from(index + 1);
        constexpr u32 kAll = (1u << kMyRows) - 1;
        const u32 there = __ballot_sync(kWarp, present);
        const u32 stage = stage_of(index);
        if (lane == 0) missing[stage * 8 + warp] = static_cast<u8>(~there & kAll);
        char* const to_rows = shared + stage * kTileBytes + warp * kMyRows * kRowBytes;
        if constexpr (kWholeRows) {
          if (there != kAll) {
            for (int row = 0; row < kMyRows; ++row) {
              if (there >> row & 1) continue;
              for (int chunk = lane; chunk < kChunks; chunk += 32) {
                *reinterpret_cast<uint4*>(to_rows + row * kRowBytes + chunk * 16) = {0, 0, 0, 0};
              }
            }
            fence_row_copies();
            __syncwarp();
          }
          if (lane == 0) expect_bytes(arrivals + stage, __popc(there) * kEntryBytes);
          __syncwarp();
          if (present) {
            copy_row(to_rows + lane * kRowBytes, p.kv_cache + away, kEntryBytes, arrivals + stage);
          }
        } else {
#pragma unroll
          for (int row = 0; row < kMyRows; ++row) {
            const bool its = (there >> row & 1) != 0;
            const char* const its_from = p.kv_cache + __shfl_sync(kWarp, away, row) + lane * 16;
            char* const its_to = to_rows + row * kRowBytes + lane * 16;
#pragma unroll
            for (int first = 0; first < kChunks; first += 32) {
              if (first + 32 > kChunks && first + lane >= kChunks) continue;
#pragma unroll
              for (int piece = first * 16; piece < first * 16 + 16; piece += kVec) {
                const bool inside = kEntryBytes == kChunks * 16 || lane * 16 + piece < kEntryBytes;
                copy_async<kVec>(its_to + piece, inside ? its_from + piece : p.kv_cache, its && inside);
              }
            }
          }
        }
      }
      if constexpr (!kWholeRows) commit_copies();
    };
    // --- queries, by way of what the last tile is copied to
    const i32 high[2] = {Row(p, unit, in_half).high, Row(p, unit, in_half + 8).high};
    constexpr int kQuerySteps = kEntries ? kSteps : kTeam * kMine;
    constexpr int kQueryChunks = kQuerySteps * 2, kQueryRow = (kQueryChunks | 1) * 16;
    static_assert(kRows * kQueryRow <= kTileBytes, "there is room for the queries");
    char* const queries_at = shared + stage_of(kStages - 1) * kTileBytes;
#pragma unroll 1
    for (int row = warp; row < kRows; row += kWarps) {
      const Row its_row(p, unit, row);
      const char* const its_from = p.query + its_row.token * p.query_stride +
                                   static_cast<i64>(its_row.head) * p.query_head_stride;
      char* const its_to = queries_at + row * kQueryRow;
      if (kSize % 8 == 0 && (p.aligned & 1)) {
#pragma unroll 1
        for (int chunk = lane; chunk < kQueryChunks; chunk += 32) {
          const bool present = its_row.valid && chunk * 8 < kSize;
          copy_async<16>(its_to + chunk * 16, present ? its_from + chunk * 16 : p.query, present);
        }
      } else {
#pragma unroll 1
        for (int element = lane; element < kQueryChunks * 8; element += 32) {
          const bool present = its_row.valid && element < kSize;
          copy_async<2>(its_to + element * 2, present ? its_from + element * 2 : p.query, present);
        }
      }
    }
    commit_copies();
    for (i32 index = 0; index < kStages - 1; ++index) request(index);
    u32 queries[kMine][4], rope[4];
    const auto read_queries = [&] {
#pragma unroll
      for (int step = 0; step < kMine; ++step) {
        const int first = (quarter * kMine + step) * 2;  // chunk
        if constexpr (kNarrow) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const char* const at =
                queries_at + (in_half + half * 8) * kQueryRow + first * 16 + pair * 8;
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
                                       (kLatent / 8 + quarter * 2 + lane / 16) * 16);
      }
      if constexpr (kWholeRows) fence_row_copies();
    };
    const i32 all_high = __shfl_sync(kWarp, high[0], 0);  // the first row sees the least
    if (!alone && p.joins && threadIdx.x == 0) {  // while the first tiles are on their way
      begin_count(word_of(), p.scratch_tag, look_at_count(word_of()));
    }

    // --- results
    // A block has a slot for each result of a unit that it does not begin, and two for one that it
    // begins: of its groups that are complete, which are joined there, and of another.
    const auto slot_of = [&](u32 number) {
      return reinterpret_cast<float4*>(p.scratch + p.slots_at + static_cast<u64>(number) * kSlotBytes);
    };
    const auto slot_at = [&](u32 block, i32 slot) {
      return slot_of((block * p.lanes + my_lane) * p.slots + static_cast<u32>(slot));
    };
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
    // where there are registers, or else in a slot, each thread's numbers of it.
    constexpr bool kKeepsAll = kTeams > 1;
    float all_out[kKeepsAll ? kTiles : 1][4];
    const auto end_group = [&](bool is_first, bool is_last) {
      float4* const state = slot_at(my_block, static_cast<i32>(p.slots) - 2) + of_lane;
      Joined joined[2];
      join_totals(joined, joined_totals, *kept_totals);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float before[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (!is_first) {
          if constexpr (kKeepsAll) {
#pragma unroll
            for (int j = 0; j < 4; ++j) before[j] = all_out[i][j];
          } else {
            const float4 four = state[i * 32];
            before[0] = four.x, before[1] = four.y, before[2] = four.z, before[3] = four.w;
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          kept_out[i][j] = joined[j / 2].sum(before[j], kept_out[i][j]);
          if constexpr (kKeepsAll) all_out[i][j] = kept_out[i][j];
        }
        if (!kKeepsAll && !is_last) {
          state[i * 32] = {kept_out[i][0], kept_out[i][1], kept_out[i][2], kept_out[i][3]};
        }
      }
    };
    const auto store_totals = [&](float4* slot, const float4& totals) {
      float2* const rows = reinterpret_cast<float2*>(slot + kFours);
      if (warp == 0 && pair == 0) {
        rows[in_half] = {totals.x, totals.z};
        rows[in_half + 8] = {totals.y, totals.w};
      }
    };
    const auto store = [&](i32 slot) {
      float4* const at = slot_at(my_block, slot);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        at[of_lane + i * 32] = {kept_out[i][0], kept_out[i][1], kept_out[i][2], kept_out[i][3]};
      }
      store_totals(at, *kept_totals);
    };
    *joined_totals = {kNone, kNone, 0.0f, 0.0f};
    begin_part();
    begin_group();
    const i32 of_part = part_tokens / kKeys;  // tiles, a power of two
    i32 slot = 0;
    // This warp's part of a tile's scores, for all to add up.
    const auto multiply_queries = [&](i32 index) {
      const char* const tile = shared + stage_of(index) * kTileBytes + team * kOfTeam * kRowBytes;
      float scores[kMyScores][4] = {}, others[kMyScores][4] = {};  // of every second step
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const int step = quarter * kMine + i;
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
            *reinterpret_cast<const float*>(tile + lane * kRowBytes + kScalesAt + quarter * 4);
#pragma unroll
        for (int j = 0; j < kMyScores; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float its = __shfl_sync(kWarp, token_scale, j * 8 + pair * 2 + i);
            scores[j][i] *= its;
            scores[j][2 + i] *= its;
          }
        }
#pragma unroll
        for (int j = 0; j < kMyScores; j += 2) {
          u32 loaded[4];
          load_matrices<false>(loaded, tile + (j * 8 + lane % 8 + lane / 16 * 8) * kRowBytes +
                                           kRopeAt + (quarter * 2 + lane / 8 % 2) * 16);
          multiply_add<Query>(scores[j], rope, loaded[0], loaded[1]);
          multiply_add<Query>(scores[j + 1], rope, loaded[2], loaded[3]);
        }
      }
#pragma unroll
      for (int j = 0; j < kMyScores; ++j) {
        float4 four = {scores[j][0], scores[j][1], scores[j][2], scores[j][3]};
        if constexpr (!kNarrow) {
          four = {four.x + others[j][0], four.y + others[j][1], four.z + others[j][2],
                  four.w + others[j][3]};
        }
        scores_of_all[index % 2 * kScoresOfTile + (quarter * kScoreTiles + team * kMyScores + j) * 32 +
                      lane] = four;
      }
    };
    // Each turn multiplies the weights of a tile with its values, and the queries with the next one:
    // one waits for little of the other.
    for (i32 index = -1; index < tiles; ++index) {
      if constexpr (kWholeRows) {
        if (index == -1) wait_for_copies<0>();  // the queries
        if (index + 1 < tiles) {
          wait_for_rows(arrivals + stage_of(index + 1), (copied + index + 1) / kStages % 2);
        }
      } else {
        wait_for_copies<kStages - 3>();
      }
      // All have the next tile and this one's scores, and are done with the tile before.
      __syncthreads();
      if (index == -1) read_queries();
      else request(index + kStages - 1);
      if (index + 1 < tiles) multiply_queries(index + 1);
      if (index < 0) continue;
      const char* const tile = shared + stage_of(index) * kTileBytes;
      float scores[kScoreTiles][4];
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        const float4* const its = scores_of_all + index % 2 * kScoresOfTile + j * 32 + lane;
        float4 sum = its[0];
#pragma unroll
        for (int other = 1; other < kTeam; ++other) {
          const float4 more = its[other * kScoreTiles * 32];
          sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
        }
        scores[j][0] = sum.x * scale;
        scores[j][1] = sum.y * scale;
        scores[j][2] = sum.z * scale;
        scores[j][3] = sum.w * scale;
      }

      const i32 token = begin + index * kKeys;
      const u8* const absences = missing + stage_of(index) * 8;
      u64 absent;
      if constexpr (kWarps == 8) absent = *reinterpret_cast<const u64*>(absences);
      else absent = *reinterpret_cast<const u32*>(absences);
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
              const int bit = in_tile / kMyRows * 8 + in_tile % kMyRows;
              if (token + in_tile >= high[half] || (absent >> bit & 1)) {
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
      float token_scales[kTeams] = {};  // kEntries: of the lane's tokens
      if constexpr (kEntries) {
        float highest = 0.0f;
#pragma unroll
        for (int of = 0; of < kTeams; ++of) {
          token_scales[of] = *reinterpret_cast<const float*>(
              tile + (of * kOfTeam + lane) * kRowBytes + kScalesAt + warp * kTiles / 16 * 4);
          highest = fmaxf(highest, fabsf(token_scales[of]));
        }
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
#pragma unroll
        for (int of = 0; of < kTeams; ++of) {
          token_scales[of] *= __uint_as_float(0x7f000000u - __float_as_uint(unit_scale));
        }
      }
      u32 weights[kKeys / 16][4];
#pragma unroll
      for (int j = 0; j < kScoreTiles; ++j) {
        float scales[2] = {1.0f, 1.0f};
        if constexpr (kEntries) {
          const float its = token_scales[j * 8 / kOfTeam];
          scales[0] = __shfl_sync(kWarp, its, j * 8 % kOfTeam + pair * 2);
          scales[1] = __shfl_sync(kWarp, its, j * 8 % kOfTeam + pair * 2 + 1);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = power_of_two(scores[j][2 * half] - largest[half]);
          const float upper = power_of_two(scores[j][2 * half + 1] - largest[half]);
          sums[half] += low + upper;
          weights[j / 2][j % 2 * 2 + half] = pack_pair<Type>(low * scales[0], upper * scales[1]);
        }
      }

#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
#pragma unroll
        for (int of = 0; of < kTeams; ++of) {
          u32 loaded[4];
          if constexpr (kNarrow) {
            load_matrices<true>(loaded,
                                tile + (of * kOfTeam + lane) * kRowBytes + (warp * kTiles + i) * 8);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const u32 b0 = loaded[2 * j], b1 = loaded[2 * j + 1];
              const u32(&its)[4] = weights[of * 2 + j];
              // Every second column, then the others.
              multiply_add<Type>(out[i], its, widen<Stored, 0, 2>(b0), widen<Stored, 0, 2>(b1));
              multiply_add<Type>(out[i + 1], its, widen<Stored, 1, 3>(b0), widen<Stored, 1, 3>(b1));
            }
          } else {
            load_matrices<true>(loaded, tile + (of * kOfTeam + lane % 16) * kRowBytes +
                                            (warp * kTiles + i + lane / 16) * 16);
            multiply_add<Type>(out[i], weights[of], loaded[0], loaded[1]);
            multiply_add<Type>(out[i + 1], weights[of], loaded[2], loaded[3]);
          }
        }
      }

      const bool is_last = index + 1 == tiles;
      if (((index + 1) & (of_part - 1)) != 0 && !is_last) continue;
      end_part();
      begin_part();
      const i32 part = is_last ? to : from + (index + 1) / of_part;  // the next
      if (!Result<Shares>::ends_at(cut, from, to, part)) continue;
      if (from > 0) {
        store(slot++);
        begin_group();
      } else if (part == parts || part % cut.group == 0) {
        end_group(part <= cut.group, part == parts);
        if (part < to) begin_group();
      }
    }
    wait_for_copies<0>();
    copied += static_cast<u32>(max(tiles, 0));
    float4 totals = *joined_totals;

    // --- the result
    bool is_mine = alone;
    if (!alone) {
      const u32 first_block = share.block_of(cut, 0), last_block = share.block_of(cut, parts - 1);
      // If a block has no turn of each part, each part is for another one.
      const bool all = share.each >> cut.log > 0;
      const u32 blocks = all ? last_block - first_block + 1 : static_cast<u32>(parts);
      if (from == 0) {
        const i32 state = static_cast<i32>(p.slots) - 2;
        if (to >= cut.group) {
          if constexpr (kKeepsAll) {
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
              slot_at(my_block, state)[of_lane + i * 32] = {all_out[i][0], all_out[i][1], all_out[i][2],
                                                            all_out[i][3]};
            }
          }
          store_totals(slot_at(my_block, state), totals);
        }
        if (to % cut.group != 0) store(state + 1);
      }
      if (p.joins) is_mine = arrive_block(word_of(), p.scratch_tag, blocks, true);
    }
    float4* const result = reinterpret_cast<float4*>(shared) + of_lane;
    if (alone) {
      __syncthreads();  // the tiles' place is free
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        result[i * 32] = {kept_out[i][0], kept_out[i][1], kept_out[i][2], kept_out[i][3]};
      }
    } else if (is_mine) {
      // All results are there. They are listed first, in order: each thread looks at one of the parts,
      // as that takes long. Then each copies what it joins, ahead of use, and some of its tiles of
      // columns at a time, for which there are registers.
      __shared__ u32 listed[kMostParts], listed_of_warps[kMostParts / 32];
      constexpr u32 kEndsGroup = 1u << 31;
      u32 lower = 0, entry = 0;  // results of the warp's parts before; what is listed
      bool begins = false;
      if (warp < kMostParts / 32) {
        const i32 part = static_cast<i32>(threadIdx.x);
        const Result<Shares> its(share, cut, parts, static_cast<i32>(p.slots), min(part, parts - 1));
        begins = part < parts && its.begins;
        const i32 behind_it = part + its.count;
        entry = (its.block * p.lanes + my_lane) * p.slots + static_cast<u32>(its.slot);
        if (behind_it % cut.group == 0 || behind_it == parts) entry |= kEndsGroup;
        const u32 there = __ballot_sync(kWarp, begins);
        lower = __popc(there & ((1u << lane) - 1));
        if (lane == 0) listed_of_warps[warp] = __popc(there);
      }
      __syncthreads();
      u32 count = 0;
#pragma unroll
      for (int i = 0; i < kMostParts / 32; ++i) {
        if (i < warp) lower += listed_of_warps[i];
        count += listed_of_warps[i];
      }
      if (begins) listed[lower] = entry;
      __syncthreads();
      constexpr int kAtOnce = kTiles <= 8 ? kTiles : kTiles / 2;  // of at most 16, an even number
      constexpr int kPlace = kFours * 16 + 16 * kThreads;
      constexpr int kPlaces = kMissingAt / kPlace < 4 ? kMissingAt / kPlace : 4;
      static_assert(kPlaces >= 1 && kTiles % kAtOnce == 0, "there is room for a result");
#pragma unroll 1
      for (int first = 0; first < kTiles; first += kAtOnce) {
        u32 asked = 0;
        const int of_tile = of_lane + first * 32;
        const auto ask = [&] {
          if (asked < count) {
            const float4* const its = slot_of(listed[asked] & ~kEndsGroup);
            char* const at = shared + asked % kPlaces * kPlace;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              copy_async<16>(at + (of_tile + i * 32) * 16,
                             reinterpret_cast<const char*>(its + of_tile + i * 32), true);
            }
            const char* const rows = reinterpret_cast<const char*>(its + kFours);
            char* const its_totals = at + kFours * 16 + threadIdx.x * 16;
            copy_async<8>(its_totals, rows + in_half * 8, true);
            copy_async<8>(its_totals + 8, rows + (in_half + 8) * 8, true);
          }
          ++asked;
          commit_copies();
        };
#pragma unroll 1
        for (int i = 0; i < kPlaces - 1; ++i) ask();
        float joined_out[kAtOnce][4] = {}, group_out[kAtOnce][4] = {};
        totals = {kNone, kNone, 0.0f, 0.0f};
        float4 group = totals;
        for (u32 number = 0; number < count; ++number) {
          ask();
          wait_for_copies<kPlaces - 1>();
          const char* const at = shared + number % kPlaces * kPlace;
          const float2* const rows =
              reinterpret_cast<const float2*>(at + kFours * 16 + threadIdx.x * 16);
          const float4* const fours = reinterpret_cast<const float4*>(at) + of_tile;
          Joined joined[2];
          join_totals(joined, &group, {rows[0].x, rows[1].x, rows[0].y, rows[1].y});
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const float4 four = fours[i * 32];
            group_out[i][0] = joined[0].sum(group_out[i][0], four.x);
            group_out[i][1] = joined[0].sum(group_out[i][1], four.y);
            group_out[i][2] = joined[1].sum(group_out[i][2], four.z);
            group_out[i][3] = joined[1].sum(group_out[i][3], four.w);
          }
          if (listed[number] & kEndsGroup) {
            join_totals(joined, &totals, group);
            group = {kNone, kNone, 0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                joined_out[i][j] = joined[j / 2].sum(joined_out[i][j], group_out[i][j]);
                group_out[i][j] = 0.0f;
              }
            }
          }
        }
        wait_for_copies<0>();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          result[(first + i) * 32] = {joined_out[i][0], joined_out[i][1], joined_out[i][2],
                                      joined_out[i][3]};
        }
      }
    }
    if (is_mine) {
      // Where the rows stand is found again: there are no registers to keep it.
      const Unit same(p, share.sequence, share.unit);
      const Row low(p, same, in_half), upper(p, same, in_half + 8);
#pragma unroll 1
      for (int i = 0; i < kTiles; ++i) {
        const float4 four = result[i * 32];
        write_two<Query, kLatent, kNarrow>(p, low, warp * kTiles + i, lane, totals.x, totals.z,
                                           four.x, four.y, kv_scale);
        write_two<Query, kLatent, kNarrow>(p, upper, warp * kTiles + i, lane, totals.y, totals.w,
                                           four.z, four.w, kv_scale);
      }
    }
    if constexpr (kWholeRows) fence_row_copies();
    go_on();
  } while (more);
}

}  // namespace cupy_cache
