// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// How the work of latent attention is shared among thread blocks.
//
// A unit of work is some rows: query heads of neighbouring tokens of one sequence. The tokens of a
// sequence are cut into parts, and these are put together in at most eight groups, by the sequence's
// length alone. The results of a group's parts are joined one after the other, and so are those of a
// sequence's groups. So it does not matter to any bit who computes a part: each thread block takes as
// much of all units, one after the other, as any other, and what a unit lacks is exchanged through
// scratch memory. The last of the blocks that share a unit joins their results; where many share one, a
// second launch does. Where sequences have many units, these are dealt out to lanes of thread blocks, so
// that those of one sequence are worked on at the same time, and its tokens are read from memory once.
#pragma once

#include "cupy_cache/divide.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/matrix.cuh"
#include "cupy_cache/paging.cuh"

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
template <int kRows>
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
template <int kRows, typename Length, typename Start, int kThreads>
class Share {
 public:
  u64 each;        // turns of a block
  u64 begin, end;  // of this block
  u64 before;      // turns of the units before
  i64 index;       // of the sequence
  Sequence<kRows> sequence;
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
  // Where those that share the unit are counted.
  __device__ __forceinline__ u64* word(const Params& p) const {
    u64 number = static_cast<u64>(index) * sequence.units + unit;
    if constexpr (!IsVoid<Start>::value) {
      number = static_cast<u64>(sequence.first) * p.heads / kRows + static_cast<u64>(index) + unit;
    }
    return reinterpret_cast<u64*>(p.scratch) + number;
  }

 private:
  u32 lane_;
  i64 sequences_;

  __device__ __forceinline__ u64 turns_of(const Params& p, i64 number, i64 start, i64 behind,
                                          u32& units) const {
    if (behind <= start || start < 0 || behind > p.tokens) return 0;
    Sequence<kRows> its;
    its.template load<Length>(p, number, start, behind);
    units += its.of_lane(p, lane_);
    return static_cast<u64>(its.of_lane(p, lane_)) * static_cast<u32>(Cut(its.length).turns);
  }
  __device__ __forceinline__ void load(const Params& p, i64 start) {
    i64 behind = start + 1;
    if constexpr (!IsVoid<Start>::value) behind = in_order(p, load_start<Start>(p, index + 1), start);
    sequence.template load<Length>(p, index, start, behind);
  }
};

// Where the rows of a unit stand.
template <int kRows>
struct Unit {
  i64 first;  // token of the sequence, a row of query and out
  u32 count;  // tokens of the sequence
  u32 row;    // the first one's number among the sequence's
  i32 length;
  i32 seen;  // tokens that any row sees: those before

  __device__ __forceinline__ Unit(const Params& p, const Sequence<kRows>& its, u32 unit)
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

  template <int kRows>
  __device__ __forceinline__ Row(const Params& p, const Unit<kRows>& unit, int index) {
    const u32 number = unit.row + index, in_sequence = number / p.heads;
    valid = in_sequence < unit.count;
    token = unit.first + in_sequence;
    head = number % p.heads;
    high = valid ? unit.seen_by(p, in_sequence) : 0;
  }
};

// What scores and values are multiplied with.
template <bool kScaled>
__device__ __forceinline__ float scale_of_cache(const Params& p) {
  if constexpr (!kScaled) return 1.0f;
  return p.kv_scale ? *reinterpret_cast<const float*>(p.kv_scale) : p.kv_scale_value;
}

// The parts of a unit that have a result, and those of them that a thread block has.
struct Parts {
  i32 tokens, count;  // tokens of a part; parts
  i32 from, to;       // the block's

  template <typename Share, typename Unit>
  __device__ __forceinline__ Parts(const Share& share, const Cut& cut, const Unit& unit) {
    tokens = kTurn << cut.log;
    count = max((unit.seen + tokens - 1) / tokens, 1);
    from = min(share.part_at(cut, share.begin), count);
    to = min(share.part_at(cut, share.end), count);
  }
};

// Goes on to the next unit of a thread block's share, which is in shared memory as there are no
// registers to keep it. Whether there is one.
template <typename Share>
__device__ __forceinline__ bool next_unit(Share* kept, const Params& p) {
  Share share = *kept;
  __syncthreads();  // what is shared is free
  share.go_on(p);
  if (threadIdx.x == 0) *kept = share;
  __syncthreads();
  return share.more();
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

}  // namespace cupy_cache
