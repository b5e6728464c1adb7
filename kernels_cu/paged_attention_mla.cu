// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention over the entries of a paged cache: all query heads share one entry for
// each token, whose first elements are its value too. The work is shared among thread blocks as
// latent.cuh says, in units of 16 rows.
//
// The warps of a thread block share each tile of tokens, which is copied to shared memory ahead of use.
// Four of them make up a team, which multiplies some of a tile's tokens with the queries: each warp with
// a quarter of the queries' elements, which it has in registers. The sums of all four are the scores,
// which each warp adds up for itself. Each then has some of the columns of the result.
#include "cupy_cache/async.cuh"
#include "cupy_cache/cluster.cuh"
#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/latent.cuh"
#include "cupy_cache/matrix.cuh"
#include "cupy_cache/operands.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/scratch.cuh"
#include "cupy_cache/softmax.cuh"

namespace cupy_cache {

constexpr int kRows = 16;  // of a unit
constexpr int kTeam = 4;   // warps

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
  using Shares = Share<kRows, Length, Start, kJoiningThreads>;
  Shares share;
  share.template find<true>(p, blockIdx.x % p.lanes, blockIdx.x / p.lanes);
  if (share.index >= p.sequences) return;
  const Cut cut(share.sequence.length);
  const Unit<kRows> unit(p, share.sequence, share.unit);
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

  using Shares = Share<kRows, Length, Start, kThreads>;
  const u32 my_lane = blockIdx.x % p.lanes, my_block = blockIdx.x / p.lanes;
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
  do {
    const Shares& share = kept_share;
    const Cut cut(share.sequence.length);
    const Unit<kRows> unit(p, share.sequence, share.unit);
    const Parts held(share, cut, unit);
    const i32 part_tokens = held.tokens, parts = held.count, from = held.from, to = held.to;
    if (from >= to) {
      more = next_unit(&kept_share, p);
      continue;
    }
    if (share.sequence.stated != share.sequence.length && threadIdx.x == 0) {
      record_fault(kSeqLens, share.index, share.sequence.stated, longest(p) + 1);
    }
    const bool alone = from == 0 && to == parts;  // it is all of the unit
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
      begin_count(share.word(p), p.scratch_tag, look_at_count(share.word(p)));
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
      if (p.joins) is_mine = arrive_block(share.word(p), p.scratch_tag, blocks, true);
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
      const Unit<kRows> same(p, share.sequence, share.unit);
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
    more = next_unit(&kept_share, p);
  } while (more);
}

}  // namespace cupy_cache
