// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Latent attention as paged_attention_mla.cu computes it, with the products of warpgroups that compute
// capability 9.0 has. The work is shared among thread blocks as latent.cuh says.
//
// Both products are transposed: tokens are the rows of the scores, elements of the values those of the
// result, and rows of queries the columns of both. An instruction has 64 rows, and as few columns as a
// unit has rows: a unit of 16 rows wastes nothing. All operands are read from shared memory, where a tile
// of 64 tokens lies as it is multiplied, as keys and, transposed, as values.
//
// A thread block has a multiprocessor of its own, and two tiles: one arrives while the other is
// multiplied. It has two warpgroups, or one for few values.
#include "cupy_cache/async.cuh"
#include "cupy_cache/cluster.cuh"
#include "cupy_cache/elements.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/latent.cuh"
#include "cupy_cache/matrix.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"
#include "cupy_cache/scratch.cuh"
#include "cupy_cache/softmax.cuh"
#include "cupy_cache/warpgroup.cuh"

namespace cupy_cache {

constexpr int kKeys = 64;   // tokens of a tile
constexpr int kStages = 2;  // tiles in shared memory
constexpr int kSpan = 128;  // columns of a row that a warp has at a time, four each lane

// How a result lies in scratch memory: its rows, of whole spans, and then the largest score and the sum
// of each row.
template <int kRows, int kLatent>
struct Slot {
  static constexpr int kSpans = (kLatent + kSpan - 1) / kSpan;
  static constexpr int kColumns = kSpans * kSpan;
  static constexpr int kWritten = (kLatent + kPanel - 1) / kPanel * kPanel;  // of these
  static constexpr int kBytes = kRows * (kColumns * 4 + 8);

  static __device__ __forceinline__ char* number(const Params& p, u32 slot) {
    return p.scratch + p.slots_at + static_cast<u64>(slot) * kBytes;
  }
  static __device__ __forceinline__ float* columns(char* slot, int row) {
    return reinterpret_cast<float*>(slot) + row * kColumns;
  }
  static __device__ __forceinline__ float2* totals(char* slot) {
    return reinterpret_cast<float2*>(slot + kRows * kColumns * 4);
  }
};

// A row's largest score and sum, and what is joined to them.
__device__ __forceinline__ Joined join_total(float2* all, float2 more) {
  Joined joined;
  joined.largest = all->x;
  joined.join(more.x);
  *all = {joined.largest, joined.sum(all->y, more.y)};
  return joined;
}
__device__ __forceinline__ void add(const Joined& joined, float4* sums, const float4& more) {
  *sums = {joined.sum(sums->x, more.x), joined.sum(sums->y, more.y), joined.sum(sums->z, more.z),
           joined.sum(sums->w, more.w)};
}

// Writes kCount times four columns of a row, kSpan columns behind one another, and with the first ones
// its log-sum-exp. What is the same for all is asked once: branches of each take long to compile.
template <typename Query, int kLatent, int kCount>
__device__ __forceinline__ void write_fours(const Params& p, const Row& row, int column, float2 total,
                                            const float4 (&sums)[kCount]) {
  if (!row.valid) return;
  const bool any = total.y != 0.0f;  // tokens; of logits that are no numbers the sum is none
  const float weight = any ? 1.0f / total.y : 0.0f;
  u32 pairs[kCount][2];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    pairs[i][0] = any ? pack_pair<Query>(sums[i].x * weight, sums[i].y * weight) : 0u;
    pairs[i][1] = any ? pack_pair<Query>(sums[i].z * weight, sums[i].w * weight) : 0u;
  }
  char* const at = p.out + row.token * p.out_stride + row.head * p.out_head_stride + column * 2;
  if ((p.aligned & 2) && kLatent % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (column + i * kSpan >= kLatent) continue;
      u32* const its = reinterpret_cast<u32*>(at + i * kSpan * 2);
      its[0] = pairs[i][0];
      its[1] = pairs[i][1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount * 4; ++i) {
      const int its = i / 4 * kSpan + i % 4;
      if (column + its >= kLatent) continue;
      reinterpret_cast<u16*>(at)[its] = static_cast<u16>(pairs[i / 4][i % 4 / 2] >> i % 2 * 16);
    }
  }
  if (p.lse && column == 0) {
    *reinterpret_cast<float*>(p.lse + row.token * p.lse_stride + row.head * p.lse_head_stride) =
        any ? (total.x + log2f(total.y)) * kLn2 : __uint_as_float(0xff800000u);
  }
}

// Joins what thread blocks have left of units that they share, where these are few. A thread has four
// columns of a row, and all of a group's results.
template <typename Query, int kLatent, int kRows, typename Length, typename Start>
__global__ void __launch_bounds__(kJoiningThreads) join_rows(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using Shares = Share<kRows, Length, Start, kJoiningThreads>;
  using Slots = Slot<kRows, kLatent>;
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
  const int row = static_cast<int>(blockIdx.y) / Slots::kSpans;
  const int column = static_cast<int>(blockIdx.y) % Slots::kSpans * kSpan + lane * 4;
  __shared__ float4 numbers[kGroups][32];
  __shared__ float2 totals[kGroups];
  static_assert(kGroups * 32 == kJoiningThreads, "a warp for each group");
  // Each lane looks at one of the group's parts, as that takes long. What the unit's first block has of
  // several groups is for the first.
  const i32 begin = group * cut.group, end = min(begin + cut.group, parts);
  const Result<Shares> mine(share, cut, parts, static_cast<i32>(p.slots), min(begin + lane, parts - 1));
  const u32 there = __ballot_sync(kWarp, begin + lane < end && mine.begins);
  const u32 number =
      (mine.block * p.lanes + blockIdx.x % p.lanes) * p.slots + static_cast<u32>(mine.slot);
  float2 total = {kNone, 0.0f};
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  for (i32 first = 0; first < end - begin; first += kTogether) {
    float4 fours[kTogether];
    float2 its_totals[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if ((there >> (first + i) & 1) == 0) continue;
      char* const slot = Slots::number(p, __shfl_sync(kWarp, number, first + i));
      fours[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (column < Slots::kWritten) {
        fours[i] = *reinterpret_cast<const float4*>(Slots::columns(slot, row) + column);
      }
      its_totals[i] = Slots::totals(slot)[row];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if ((there >> (first + i) & 1) == 0) continue;
      add(join_total(&total, its_totals[i]), &sum, fours[i]);
    }
  }
  numbers[group][lane] = sum;
  // A group that is told of by another has no weight at all.
  if (lane == 0) totals[group] = there != 0 ? total : float2{__uint_as_float(0x7fc00000u), 0.0f};
  __syncthreads();
  if (group > 0) return;
  total = {kNone, 0.0f};
  sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (totals[i].x != totals[i].x) continue;
    add(join_total(&total, totals[i]), &sum, numbers[i][lane]);
  }
  const float4 fours[1] = {sum};
  write_fours<Query, kLatent>(p, Row(p, unit, row), column, total, fours);
}

// Combines numbers of a warp's lanes: each lane has some of eight lanes' columns, of each of which four
// lanes hold neighbours. A lane gets the result of one of them, whose index is returned; lanes from 4 *
// kValues on get what others have too.
template <int kValues, typename Combine>
__device__ __forceinline__ int combine_rows(float (&values)[kValues], int lane, Combine combine) {
  int index = 0;
#pragma unroll
  for (int mask = 4, left = kValues; mask < 32; mask *= 2) {
    if (left > 1) {
      left /= 2;
      const bool upper = (lane & mask) != 0;
      if (upper) index += left;
#pragma unroll
      for (int i = 0; i < kValues / 2; ++i) {
        if (i >= left) continue;
        const float kept = upper ? values[left + i] : values[i];
        const float given = upper ? values[i] : values[left + i];
        values[i] = combine(kept, __shfl_xor_sync(kWarp, given, mask));
      }
    } else {
      values[0] = combine(values[0], __shfl_xor_sync(kWarp, values[0], mask));
    }
  }
  return index;
}
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};

// Query is F16 or BF16, of queries, entries and output. A unit has kRows rows; of their result each of
// kWarpgroups has some columns. kShared are the bytes of shared memory.
template <typename Query, int kLatent, int kRope, int kRows, int kWarpgroups, int kShared,
          typename Block, typename Length, typename Start>
__global__ void __launch_bounds__(kWarpgroups * kWarpgroup, 1)
    paged_attention_mla_warpgroups(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using Slots = Slot<kRows, kLatent>;
  constexpr int kThreads = kWarpgroups * kWarpgroup, kWarps = kThreads / 32;
  constexpr int kEntryBytes = (kLatent + kRope) * 2, kChunks = kEntryBytes / 16;
  constexpr int kSteps = (kLatent + kRope + kDepth - 1) / kDepth;
  constexpr int kPanels = (kSteps * kDepth + kPanel - 1) / kPanel;          // of an entry
  constexpr int kOutPanels = (kLatent + kPanel - 1) / kPanel;               // of its values
  constexpr int kMyPanels = (kOutPanels + kWarpgroups - 1) / kWarpgroups;   // of a warpgroup
  constexpr int kMyScores = kRows / kWarpgroups;                           // columns of them
  constexpr int kMine = kMyScores / 4, kAll = kRows / 4;  // rows of which a thread has numbers
  constexpr int kTileBytes = kPanels * kKeys * kPanelRow, kQueryPanel = kRows * kPanelRow;
  constexpr int kQueriesAt = kStages * kTileBytes, kWeightsAt = kQueriesAt + kPanels * kQueryPanel;
  constexpr int kExchangeAt = kWeightsAt + kQueryPanel;
  constexpr bool kExchanges = kWarpgroups == 2;  // of scores
  constexpr int kExchanged = kExchanges ? kThreads * kMyScores * 2 : 0;
  static_assert(kWarpgroups <= 2, "who exchanges scores with whom");
  static_assert(kShared == kExchangeAt + kExchanged, "what the host gives");
  static_assert(kEntryBytes % 16 == 0, "entries are whole chunks");
  static_assert(kRows * kPanelRow % 1024 == 0, "panels are at multiples of 1,024");
  CUPY_CACHE_ALIGNED_SHARED(shared, kShared, 1024);
  char* const queries = shared + kQueriesAt;
  char* const weights = shared + kWeightsAt;
  __shared__ float4 of_warps[kRows];  // maxima, or sums, of a warpgroup's four warps
  __shared__ float2 kept_totals[kRows], joined_totals[kRows];  // of a group, and of groups
  __shared__ u64 missing[kStages];  // tokens of a tile: all warps' absences
  using Absences = Vec<8 / kWarps>;

  const i32 warp = static_cast<i32>(threadIdx.x / 32), lane = static_cast<i32>(threadIdx.x % 32);
  // As all lanes are told, the compiler knows that descriptors are the same for all.
  const int group = kWarpgroups == 1 ? 0 : __shfl_sync(kWarp, warp / 4, 0), quarter = warp % 4;
  const int row8 = lane / 4, pair = lane % 4 * 2;
  const float scale = p.scale * kLog2E;
  // Rows whose sums a thread has: in a result, and in its warpgroup's scores.
  const auto row_of = [&](int index) { return index / 2 * 8 + pair + index % 2; };
  const int first_score = group * kMyScores;

  using Shares = Share<kRows, Length, Start, kThreads>;
  const u32 my_lane = blockIdx.x % p.lanes, my_block = blockIdx.x / p.lanes;
  __shared__ Shares kept_share;
  {
    Shares share;
    share.find(p, my_lane, my_block);
    if (!share.more()) return;
    if (threadIdx.x == 0) kept_share = share;
    __syncthreads();
  }
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
    // A warp copies some tokens of a tile. Lanes have their blocks, as the table has them, of some
    // tiles.
    constexpr int kMyTokens = kKeys / kWarps, kAtATime = 32 / kMyTokens;
    static_assert(kMyTokens % 4 == 0 && kWarps % 2 == 0, "a lane's rows are alike but for constants");
    const auto token_of = [&](int number) {  // in a tile, of the warp's
      return number / 4 * (kWarps * 4) + warp * 4 + number % 4;
    };
    const auto blocks_from = [&](i32 index) -> Block {
      const i32 token = begin + (index + lane / kMyTokens) * kKeys + token_of(lane % kMyTokens);
      if (token >= end) return -1;
      return static_cast<Block>(
          load_number<Block>(p.block_table + share.index * p.table_stride +
                             static_cast<i64>(p.by_block_size.quotient(static_cast<u32>(token))) *
                                 static_cast<i64>(sizeof(Block))));
    };
    Block upcoming = blocks_from(0);
    const auto request = [&](i32 index) {
      if (index < tiles) {
        const int in_time = index % kAtATime * kMyTokens, number = lane % kMyTokens;
        const i32 token = begin + index * kKeys + token_of(number);
        const Block block = __shfl_sync(kWarp, upcoming, in_time + number);
        const bool present =
            token < end && (lane < kMyTokens ? in_bounds(block, p.num_blocks, kBlockTable, share.index)
                                             : within(block, p.num_blocks));
        const u32 offset = p.by_block_size.remainder(static_cast<u32>(token), p.block_size);
        const i64 away =
            present ? static_cast<i64>(block) * p.block_stride + offset * p.slot_stride : 0;
        if (in_time + kMyTokens == 32) upcoming = blocks_from(index + 1);
        constexpr u32 kEach = kWarp >> (32 - kMyTokens);
        const u32 there = __ballot_sync(kWarp, present);
        const int stage = index % kStages;
        if (lane == 0) {
          reinterpret_cast<Absences*>(missing + stage)[warp] = static_cast<Absences>(~there & kEach);
        }
        char* const tile = shared + stage * kTileBytes;
        // Eight lanes copy a line of a token. The places of a lane's chunks differ by constants.
        const int chunk = lane % 8;
#pragma unroll
        for (int number = 0; number < kMyTokens; number += 4) {
          const int its = number + lane / 8;
          const bool is_there = (there >> its & 1) != 0;
          const char* const its_from = p.kv_cache + __shfl_sync(kWarp, away, its) + chunk * 16;
          char* const its_to =
              tile + in_panel(token_of(lane / 8), chunk) + number / 4 * (kWarps * 4 * kPanelRow);
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            if (panel * 8 + 8 > kSteps * 2 && panel * 8 + chunk >= kSteps * 2) continue;
            const bool inside = panel * 8 + 8 <= kChunks || panel * 8 + chunk < kChunks;
            copy_async<16>(its_to + panel * (kKeys * kPanelRow),
                           inside ? its_from + panel * kPanelRow : p.kv_cache, is_there && inside);
          }
        }
      }
      commit_copies();
    };
    // --- queries
#pragma unroll 1
    for (int row = warp; row < kRows; row += kWarps) {
      const Row its_row(p, unit, row);
      const char* const its_from = p.query + its_row.token * p.query_stride +
                                   static_cast<i64>(its_row.head) * p.query_head_stride;
#pragma unroll 1
      for (int chunk = lane; chunk < kSteps * 2; chunk += 32) {
        const bool present = its_row.valid && chunk < kChunks;
        char* const to = queries + chunk / 8 * kQueryPanel + in_panel(row, chunk % 8);
        if (p.aligned & 1) {
          copy_async<16>(to, present ? its_from + chunk * 16 : p.query, present);
        } else {
#pragma unroll
          for (int i = 0; i < 16; i += 2) {
            copy_async<2>(to + i, present ? its_from + chunk * 16 + i : p.query, present);
          }
        }
      }
    }
    i32 high[kMine];
#pragma unroll
    for (int i = 0; i < kMine; ++i) high[i] = Row(p, unit, first_score + row_of(i)).high;
    const i32 all_high = Row(p, unit, 0).high;  // the first row sees the least

    // --- results
    // A block has a slot for each result of a unit that it does not begin, and two for one that it
    // begins: of its groups that are complete, which are joined there, and of another.
    const auto slot_at = [&](u32 block, i32 slot) {
      return Slots::number(p, (block * p.lanes + my_lane) * p.slots + static_cast<u32>(slot));
    };
    float largest[kAll], my_largest[kMine], sums[kMine];  // of all rows, and of the scores'
    float out[kMyPanels][kRows / 2], kept_out[kMyPanels][kRows / 2];
    const auto begin_part = [&] {
#pragma unroll
      for (int i = 0; i < kAll; ++i) largest[i] = kNone;
#pragma unroll
      for (int i = 0; i < kMine; ++i) my_largest[i] = kNone, sums[i] = 0.0f;
#pragma unroll
      for (int panel = 0; panel < kMyPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) out[panel][i] = 0.0f;
      }
    };
    const bool tells = warp == 0 && lane < 4;  // of all rows' totals
    const auto begin_group = [&] {
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        if (tells) kept_totals[row_of(i)] = {kNone, 0.0f};
      }
#pragma unroll
      for (int panel = 0; panel < kMyPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) kept_out[panel][i] = 0.0f;
      }
    };
    // Joins totals of the thread's rows to those of all, which it gets.
    const auto join_totals = [&](float2* all, float2 (&totals)[kAll], Joined (&joined)[kAll]) {
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        float2 its = all[row_of(i)];
        joined[i] = join_total(&its, totals[i]);
        totals[i] = its;
      }
      __syncthreads();  // all have read them
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        if (tells) all[row_of(i)] = totals[i];
      }
    };
    // Joins the part to those of its group before, whose totals it gives.
    const auto end_part = [&](float2 (&totals)[kAll]) {
      const int index = combine_rows(sums, lane, Sum());
      if (lane < 4 * kMine) {
        reinterpret_cast<float*>(of_warps + first_score + row_of(index))[quarter] = sums[0];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        const float4 its = of_warps[row_of(i)];
        totals[i] = {largest[i], its.x + its.y + its.z + its.w};
      }
      Joined joined[kAll];
      join_totals(kept_totals, totals, joined);
#pragma unroll
      for (int panel = 0; panel < kMyPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
          kept_out[panel][i] = joined[i / 4 * 2 + i % 2].sum(kept_out[panel][i], out[panel][i]);
        }
      }
    };
    // Where the first of the thread's numbers is in rows of `stride` columns, and how far behind it
    // another is: apart, as only so all have one address and constants.
    const auto in_rows = [&](int stride) {
      return group * (kMyPanels * kPanel) + quarter * 16 + row8 + pair * stride;
    };
    const auto behind_first = [](int panel, int i, int stride) {
      return panel * kPanel + i / 2 % 2 * 8 + (i / 4 * 8 + i % 2) * stride;
    };
    const auto is_mine_too = [&](int panel) {  // not behind the last one
      return kMyPanels * kWarpgroups == kOutPanels || group * kMyPanels + panel < kOutPanels;
    };
    const auto store_rows = [&](float* rows, int stride) {
      float* const mine = rows + in_rows(stride);
#pragma unroll
      for (int panel = 0; panel < kMyPanels; ++panel) {
        if (!is_mine_too(panel)) continue;
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) mine[behind_first(panel, i, stride)] = kept_out[panel][i];
      }
    };
    const auto store = [&](i32 slot, const float2 (&totals)[kAll]) {
      char* const at = slot_at(my_block, slot);
      store_rows(Slots::columns(at, 0), Slots::kColumns);
#pragma unroll
      for (int i = 0; i < kAll; ++i) {
        if (tells) Slots::totals(at)[row_of(i)] = totals[i];
      }
    };
    // Joins the group to those of its unit before, which are in a slot; all are then in kept_out.
    const i32 state = static_cast<i32>(p.slots) - 2;
    const auto end_group = [&](float2 (&totals)[kAll], bool is_first) {
      char* const at = slot_at(my_block, state);
      const float* const mine = Slots::columns(at, 0) + in_rows(Slots::kColumns);
      Joined joined[kAll];
      join_totals(joined_totals, totals, joined);
#pragma unroll
      for (int panel = 0; panel < kMyPanels; ++panel) {
        if (!is_mine_too(panel)) continue;
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) {
          const float before = is_first ? 0.0f : mine[behind_first(panel, i, Slots::kColumns)];
          kept_out[panel][i] = joined[i / 4 * 2 + i % 2].sum(before, kept_out[panel][i]);
        }
      }
    };
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      if (tells) joined_totals[row_of(i)] = {kNone, 0.0f};
    }
    begin_part();
    begin_group();
    const i32 of_part = part_tokens / kKeys;  // tiles, a power of two
    i32 slot = 0;
    for (i32 index = -kStages; index < max(tiles, 1); ++index) {
      if (index >= 0 && tiles > 0) {
        const int stage = index % kStages;
        const char* const tile = shared + stage * kTileBytes;
        wait_for_copies<kStages - 1>();
        fence_row_copies();
        __syncthreads();
        // --- scores: a thread has those of two tokens
        float all_scores[kRows / 2];
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) all_scores[i] = 0.0f;
        begin_products();
        // Two warpgroups share the elements, not the rows: half as many rows take as long.
        constexpr int kMySteps = 4 / kWarpgroups;  // of each panel
        const int first_step = group * kMySteps;
        const char* const my_tile = tile + first_step * kDepth * 2;
        const char* const my_queries = queries + first_step * kDepth * 2;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
          for (int i = 0; i < kMySteps; ++i) {
            if (panel * 4 + 4 > kSteps && panel * 4 + first_step + i >= kSteps) continue;
            multiply_panels<Query, false, kRows>(all_scores, my_tile, panel * (kKeys * kPanelRow),
                                                 my_queries, panel * kQueryPanel, i);
          }
        }
        wait_for_products();
        float scores[kMyScores / 2];
        if constexpr (!kExchanges) {
#pragma unroll
          for (int i = 0; i < kMyScores / 2; ++i) scores[i] = all_scores[i];
        } else {
          // Each adds up some of the rows'.
          float* const exchanged =
              reinterpret_cast<float*>(shared + kExchangeAt) + threadIdx.x % kWarpgroup;
#pragma unroll
          for (int i = 0; i < kMyScores / 2; ++i) {
            const float other = group == 0 ? all_scores[kMyScores / 2 + i] : all_scores[i];
            exchanged[(group * (kMyScores / 2) + i) * kWarpgroup] = other;
          }
          __syncthreads();
#pragma unroll
          for (int i = 0; i < kMyScores / 2; ++i) {
            const float mine = group == 0 ? all_scores[i] : all_scores[kMyScores / 2 + i];
            scores[i] = mine + exchanged[((1 - group) * (kMyScores / 2) + i) * kWarpgroup];
          }
        }
        const i32 token = begin + index * kKeys;
        const u64 absent = missing[stage];
        const bool all = token + kKeys <= all_high && absent == 0;
#pragma unroll
        for (int i = 0; i < kMyScores / 2; ++i) scores[i] *= scale;
        if (!all) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int its = quarter * 16 + half * 8 + row8;
            const int bit =
                its % (kWarps * 4) / 4 * (64 / kWarps) + its / (kWarps * 4) * 4 + its % 4;
            const bool is_absent = (absent >> bit & 1) != 0;
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              if (is_absent || token + its >= high[i]) {
                scores[i / 2 * 4 + half * 2 + i % 2] = __uint_as_float(0xff800000u);  // minus infinity
              }
            }
          }
        }
        float most[kMine];
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          most[i] = fmaxf(scores[i / 2 * 4 + i % 2], scores[i / 2 * 4 + 2 + i % 2]);
        }
        const int its_index = combine_rows(most, lane, Larger());
        if (lane < 4 * kMine) {
          reinterpret_cast<float*>(of_warps + first_score + row_of(its_index))[quarter] = most[0];
        }
        __syncthreads();
        const auto larger = [&](float before, int row) {
          const float4 its = of_warps[row];
          return fmaxf(before, fmaxf(fmaxf(its.x, its.y), fmaxf(its.z, its.w)));
        };
        float now[kAll];
        bool grows = false;
#pragma unroll
        for (int i = 0; i < kAll; ++i) {
          now[i] = larger(largest[i], row_of(i));
          grows |= now[i] > largest[i];
        }
        if (__any_sync(kWarp, grows)) {
          float shrink[kAll];
#pragma unroll
          for (int i = 0; i < kAll; ++i) {
            shrink[i] = power_of_two(largest[i] - now[i]);
            largest[i] = now[i];
          }
#pragma unroll
          for (int i = 0; i < kMine; ++i) {
            const float its_now = larger(my_largest[i], first_score + row_of(i));
            sums[i] *= power_of_two(my_largest[i] - its_now);
            my_largest[i] = its_now;
          }
#pragma unroll
          for (int panel = 0; panel < kMyPanels; ++panel) {
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i) out[panel][i] *= shrink[i / 4 * 2 + i % 2];
          }
        }
#pragma unroll
        for (int i = 0; i < kMyScores / 2; ++i) {
          const int mine = i / 4 * 2 + i % 2;
          scores[i] = power_of_two(scores[i] - my_largest[mine]);
          sums[mine] += scores[i];
        }
#pragma unroll
        for (int i = 0; i < kMyScores / 4; ++i) {
          // Tokens are neighbours in what is multiplied.
          const u32 turned = transpose(pack_pair<Query>(scores[2 * i], scores[2 * i + 1]));
          const int row = first_score + i / 2 * 8 + row8, chunk = quarter * 2 + i % 2;
          *reinterpret_cast<u32*>(weights + in_panel(row, chunk) + pair * 2) = turned;
        }
        fence_row_copies();
        __syncthreads();
        // --- the result
        begin_products();
        const char* const my_values = tile + group * kMyPanels * (kKeys * kPanelRow);
#pragma unroll
        for (int step = 0; step < kKeys / kDepth; ++step) {
#pragma unroll
          for (int panel = 0; panel < kMyPanels; ++panel) {
            if (!is_mine_too(panel)) continue;
            multiply_panels<Query, true, kRows>(out[panel], my_values, panel * (kKeys * kPanelRow),
                                                weights, 0, step);
          }
        }
        wait_for_products();
        __syncthreads();  // the tile's place is free
      }
      request(index + kStages);
      if (index < 0) {
        if (index == -1 && !alone && p.joins && threadIdx.x == 0) {  // tiles are on their way
          begin_count(share.word(p), p.scratch_tag, look_at_count(share.word(p)));
        }
        continue;
      }

      const bool is_last = index + 1 >= tiles;
      if (((index + 1) & (of_part - 1)) != 0 && !is_last) continue;
      float2 totals[kAll];
      end_part(totals);
      const i32 part = is_last ? to : from + (index + 1) / of_part;  // the next
      if (Result<Shares>::ends_at(cut, from, to, part)) {
        i32 its_slot = state + 1;  // of the last, if of its group there is more
        const bool ends = from == 0 && (part == parts || part % cut.group == 0);
        if (ends) {
          its_slot = state;
          end_group(totals, part <= cut.group);
        } else if (from > 0) {
          its_slot = slot++;
        }
        if (!ends || part != parts) store(its_slot, totals);
        if (!is_last) begin_group();
      }
      if (!is_last) begin_part();
    }
    wait_for_copies<0>();

    // --- the result
    bool is_mine = alone;
    if (!alone) {
      const u32 first_block = share.block_of(cut, 0), last_block = share.block_of(cut, parts - 1);
      // If a block has no turn of each part, each part is for another one.
      const bool all = share.each >> cut.log > 0;
      const u32 blocks = all ? last_block - first_block + 1 : static_cast<u32>(parts);
      if (p.joins) is_mine = arrive_block(share.word(p), p.scratch_tag, blocks, true);
    }
    // A warp writes some of the rows.
    constexpr int kOfWarp = kRows / kWarps;
    if (alone) {
      // By way of the tiles' place, so that lanes have neighbouring columns.
      constexpr int kStride = Slots::kColumns + 4;
      static_assert(kRows * kStride * 4 <= kExchangeAt, "there is room for a result");
      float* const rows = reinterpret_cast<float*>(shared);
      store_rows(rows, kStride);
      __syncthreads();
#pragma unroll 1
      for (int row = warp * kOfWarp; row < (warp + 1) * kOfWarp; ++row) {
        float4 fours[Slots::kSpans];
#pragma unroll
        for (int span = 0; span < Slots::kSpans; ++span) {
          fours[span] =
              *reinterpret_cast<const float4*>(rows + row * kStride + span * kSpan + lane * 4);
        }
        write_fours<Query, kLatent>(p, Row(p, unit, row), lane * 4, joined_totals[row], fours);
      }
    } else if (is_mine) {
      // All results are there. They are listed first, in order: each thread looks at one of the parts,
      // as that takes long. Then each warp copies its rows of them, ahead of use.
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
      // What a warp has of a result at a time: spans of its rows, and their totals.
      constexpr int kSpansAtOnce = (Slots::kSpans * 16 + kRows - 1) / kRows;
      constexpr int kFours = kOfWarp * kSpansAtOnce;  // of a lane
      constexpr int kPlace = kFours * 512 + kOfWarp * 8;
      constexpr int kRoom = kExchangeAt / kWarps / 16 * 16;
      constexpr int kPlaces = kRoom / kPlace < 4 ? kRoom / kPlace : 4;
      static_assert(kPlaces >= 2 && kPlace % 16 == 0, "there is room for two results");
      char* const mine = shared + warp * kRoom;
#pragma unroll 1
      for (int first = 0; first < Slots::kSpans; first += kSpansAtOnce) {
        u32 asked = 0;
        const auto ask = [&] {
          if (asked < count) {
            char* const its = Slots::number(p, listed[asked] & ~kEndsGroup);
            char* const at = mine + asked % kPlaces * kPlace;
#pragma unroll
            for (int i = 0; i < kFours; ++i) {
              const int span = first + i % kSpansAtOnce;
              if (Slots::kSpans % kSpansAtOnce != 0 && span >= Slots::kSpans) continue;
              const int column = span * kSpan + lane * 4;
              const float* const four =
                  Slots::columns(its, warp * kOfWarp + i / kSpansAtOnce) + column;
              copy_async<16>(at + i * 512 + lane * 16, reinterpret_cast<const char*>(four),
                             column < Slots::kWritten);
            }
            if (lane < kOfWarp) {
              const float2* const total = Slots::totals(its) + warp * kOfWarp + lane;
              copy_async<8>(at + kFours * 512 + lane * 8, reinterpret_cast<const char*>(total), true);
            }
          }
          ++asked;
          commit_copies();
        };
#pragma unroll 1
        for (int i = 0; i < kPlaces - 1; ++i) ask();
        float4 joined_out[kFours] = {}, group_out[kFours] = {};
        float2 totals[kOfWarp], group_totals[kOfWarp];
#pragma unroll
        for (int i = 0; i < kOfWarp; ++i) totals[i] = group_totals[i] = {kNone, 0.0f};
        for (u32 number = 0; number < count; ++number) {
          ask();
          wait_for_copies<kPlaces - 1>();
          __syncwarp();
          const char* const at = mine + number % kPlaces * kPlace;
          const bool ends_group = (listed[number] & kEndsGroup) != 0;
#pragma unroll
          for (int row = 0; row < kOfWarp; ++row) {
            const Joined joined = join_total(
                group_totals + row, reinterpret_cast<const float2*>(at + kFours * 512)[row]);
#pragma unroll
            for (int i = row * kSpansAtOnce; i < (row + 1) * kSpansAtOnce; ++i) {
              add(joined, group_out + i, *reinterpret_cast<const float4*>(at + i * 512 + lane * 16));
            }
          }
          if (ends_group) {
#pragma unroll
            for (int row = 0; row < kOfWarp; ++row) {
              const Joined both = join_total(totals + row, group_totals[row]);
              group_totals[row] = {kNone, 0.0f};
#pragma unroll
              for (int i = row * kSpansAtOnce; i < (row + 1) * kSpansAtOnce; ++i) {
                add(both, joined_out + i, group_out[i]);
                group_out[i] = {0.0f, 0.0f, 0.0f, 0.0f};
              }
            }
          }
          __syncwarp();
        }
        wait_for_copies<0>();
        // By way of a result's place, so that rows are written by one piece of code.
        float2* const its_totals = reinterpret_cast<float2*>(mine + kFours * 512);
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          *reinterpret_cast<float4*>(mine + i * 512 + lane * 16) = joined_out[i];
        }
#pragma unroll
        for (int i = 0; i < kOfWarp; ++i) {
          if (lane == 0) its_totals[i] = totals[i];
        }
        __syncwarp();
        // Where the rows stand is found again: there are no registers to keep it.
        const Unit<kRows> same(p, share.sequence, share.unit);
#pragma unroll 1
        for (int row = 0; row < kOfWarp; ++row) {
          float4 fours[kSpansAtOnce];  // what is behind kLatent is not written
#pragma unroll
          for (int i = 0; i < kSpansAtOnce; ++i) {
            fours[i] = *reinterpret_cast<const float4*>(mine + (row * kSpansAtOnce + i) * 512 +
                                                        lane * 16);
          }
          write_fours<Query, kLatent>(p, Row(p, same, warp * kOfWarp + row), first * kSpan + lane * 4,
                                      its_totals[row], fours);
        }
        __syncwarp();
      }
    }
    more = next_unit(&kept_share, p);
  } while (more);
}

}  // namespace cupy_cache
