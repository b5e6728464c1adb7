// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Rows of several sequences, one after the other: which sequence a row belongs to, and where in a
// paged cache the token is that it stands for.
//
// What costs time here are loads that wait for one another. So the sequence is guessed as if all
// were equally long, and the page with it; all that tells whether the guess is right is loaded
// together. For one sequence, and for the steps of a decoding batch, it is.
#pragma once

#include "cupy_cache/ints.cuh"
#include "cupy_cache/paging.cuh"

namespace cupy_cache {

// One of several neighbouring segments of rows: its number and its first row.
struct Segment {
  i32 index;
  i64 start;
};

// How many segments a row has, and a segment rows, if all are equally long.
struct Even {
  float segments;
  float rows;
};

// A search for the segment that holds `row`: starts[i] <= row < starts[i + 1], for `count`
// segments, at least one. There are count + 1 entries of Index; if kOpenEnd count, and the last
// segment has no end. Reads no others, whatever they hold. Where starts descend, several segments
// may hold a row, and it is one of them, or none: cpu/operations.py searches alike, so nothing here
// may be rounded otherwise there.
template <typename Index, bool kOpenEnd = false>
class SegmentSearch {
 public:
  i32 guess = 0;
  u32 row_in_guess;  // the number that the row has in the guessed segment, if all are equally long

  // Loads the bounds of the guessed segment.
  __device__ __forceinline__ SegmentSearch(const char* starts, i32 count, i64 row, Even even)
      : row_in_guess(static_cast<u32>(row)), starts_(starts), count_(count), row_(row) {
    if (count > 1) {
      // Any guess would do: 32 bits of the number.
      const float at = __fmul_rn(static_cast<float>(row_in_guess), even.segments);
      guess = min(__float2int_rz(at), count - 1);
      const float inside = at - static_cast<float>(guess);
      row_in_guess = __float2uint_rz(inside * even.rows + 0.5f);
    }
    start_ = start_of(guess);
    end_ = start_of(guess + 1);
  }

  // Whether the guess was right, and what it was.
  __device__ __forceinline__ bool right() const { return start_ <= row_ && row_ < end_; }
  __device__ __forceinline__ Segment guessed() const { return {guess, start_}; }

  // Where it was not. The index is count where row is not below the end of the last segment, and -1
  // where it is below the start of the first.
  __device__ __forceinline__ Segment find() const {
    // The ends, and a bracket that leaves few halvings where lengths do not differ much. Selected
    // without branches: the loads of one would wait for the other's.
    const i32 reach = 2 + (count_ >> 4);
    const i32 below = max(guess - reach, 0);
    const i32 above = reach < count_ - guess - 1 ? guess + 1 + reach : count_;
    const i64 first = start_of(0), last = start_of(count_);
    const i64 at_below = start_of(below), at_above = start_of(above);
    const bool lower = row_ < start_;
    const bool near = lower ? at_below <= row_ : row_ < at_above;
    // starts[low] = start <= row < starts[high]
    i32 low = lower ? (near ? below : 0) : (near ? guess + 1 : above);
    i32 high = lower ? (near ? guess : below) : (near ? above : count_);
    i64 start = lower ? (near ? at_below : first) : (near ? end_ : at_above);
    if (row_ < first) low = high = -1, start = first;
    if (row_ >= last) low = high = count_, start = last;
    while (high - low > 1) {
      const i32 middle = low + (high - low) / 2;
      const i64 value = start_of(middle);
      if (value <= row_) {
        low = middle, start = value;
      } else {
        high = middle;
      }
    }
    return {low, start};
  }

 private:
  const char* starts_;
  i32 count_;
  i64 row_;
  i64 start_, end_;  // of the guessed segment

  __device__ __forceinline__ i64 start_of(i32 segment) const {
    if constexpr (kOpenEnd) {
      constexpr i64 kNever = 0x7fffffffffffffff;
      if (segment == count_) return kNever;
    }
    return load_number<Index>(starts_ + segment * static_cast<i64>(sizeof(Index)));
  }
};

// Whether `count` + 1 starts descend, each looked at with the one before by one of `threads` threads,
// of which this is that of an `index`. The first two are loaded where this is made.
template <typename Index>
class OrderCheck {
 public:
  __device__ __forceinline__ OrderCheck(const char* starts, i64 count, u32 index, u32 threads)
      : starts_(starts), count_(static_cast<u32>(count)), index_(index), threads_(threads) {
    odd_ = index < count_ && load(index + 1) < load(index);
  }
  // Records the starts that are below the one before; there are some `rows`. Called once, last: what
  // is needed behind a call is kept in more registers.
  __device__ __forceinline__ void report(u32 argument, i64 rows) const {
    if (!odd_ && count_ <= threads_) return;
    for (u32 i = index_; i < count_; i += threads_) {
      const i64 end = load(i + 1);
      if (end < load(i)) record_fault(argument, i + 1, end, rows + 1);
    }
  }

 private:
  const char* starts_;
  u32 count_, index_, threads_;
  bool odd_;

  __device__ __forceinline__ i64 load(u32 i) const {
    return load_number<Index>(starts_ + i * static_cast<i64>(sizeof(Index)));
  }
};

// Sequences with their pages. Strides in bytes.
struct Sequences {
  const char* starts;       // see SegmentSearch
  const char* block_table;  // [count, table_width]
  const char* seq_starts;   // [count]: the token that is each sequence's first row, if not 0
  Even even;
  i32 count;
  i64 num_blocks;
  i64 table_width;
  i64 table_stride;
  i64 start_stride;
};

// Those of a kernel's parameters.
template <typename Params>
__device__ __forceinline__ Sequences sequences_of(const Params& p) {
  return {p.cu_seq_lens,
          p.block_table,
          p.seq_starts,
          p.even,
          static_cast<i32>(p.sequences),
          p.num_blocks,
          p.table_width,
          p.table_stride,
          p.start_stride};
}

// Where a token is, if it is `valid`.
struct Token {
  bool valid;
  i64 block;
  i32 offset;
};

// A search for the token of a row.
//
// Where there is one sequence, the guessed token can be read before it is known whether it is the
// right one. (Where there are several, that costs more for those of different lengths than it gains
// for the others.) SeqStart is void where there are no seq_starts.
template <int kBlockSize, bool kOpenEnd, typename Block, typename Start, typename SeqStart>
class TokenSearch {
  static constexpr bool kStarts = !IsVoid<SeqStart>::value;

 public:
  // Starts the loads. There must be sequences.
  __device__ __forceinline__ TokenSearch(const Sequences& sequences, i64 row)
      : s_(sequences), row_(row), search_(s_.starts, s_.count, row, s_.even) {
    // What the guess leads to is loaded with what tells whether it is right: the start of the
    // sequence or, where all start at 0, the block.
    const i64 page = search_.row_in_guess / kBlockSize;
    has_block_ = !kStarts && page < s_.table_width;
    if (has_block_) block_ = load_block(search_.guess, page);
    start_ = load_start(search_.guess);
  }

  // The guessed token, valid where it should be read at once.
  __device__ __forceinline__ Token guessed() const {
    const bool valid = s_.count == 1 && has_block_ && within(block_, s_.num_blocks);
    return {valid, block_, static_cast<i32>(search_.row_in_guess % kBlockSize)};
  }

  // Whether that is the token of the row.
  __device__ __forceinline__ bool right() const {
    // Unsigned, because the starts may hold anything.
    const u64 in_sequence = static_cast<u64>(row_) - static_cast<u64>(search_.guessed().start);
    return search_.right() && in_sequence == search_.row_in_guess;
  }

  // The token of the row; not valid where the row belongs to no sequence, or its token is outside
  // the table or the cache, which is recorded. `first_guarded` is the number of seq_starts in the
  // list of guarded arguments; that of the block table is the next.
  __device__ __forceinline__ Token find(u32 first_guarded) const {
    constexpr Token kNone = {false, 0, 0};
    Segment segment = search_.guessed();
    i64 start = start_;
    bool has_block = has_block_;
    if (!search_.right()) {
      segment = search_.find();
      if (!within(segment.index, s_.count)) return kNone;
      has_block = false;
      start = load_start(segment.index);
    }
    if (kStarts && !in_bounds(start, s_.table_width * kBlockSize, first_guarded, row_)) {
      return kNone;
    }
    const u64 position =  // unsigned like above
        static_cast<u64>(start) + (static_cast<u64>(row_) - static_cast<u64>(segment.start));
    const Place<kBlockSize> place(static_cast<i64>(position));
    const u32 block_table = first_guarded + 1;
    if (!in_bounds(place.block, s_.table_width, block_table, row_)) return kNone;
    i64 block = block_;
    if (!has_block || place.block != search_.row_in_guess / kBlockSize) {
      block = load_block(segment.index, place.block);
    }
    if (!in_bounds(block, s_.num_blocks, block_table, row_)) return kNone;
    return {true, block, place.offset};
  }

  // Calls load(token) for the token of the row, ahead of that perhaps for the guessed one. Whether
  // there is one; `first_guarded` is as of find.
  template <typename Load>
  __device__ __forceinline__ bool load_token(u32 first_guarded, const Load& load) const {
    Token token = guessed();
    if (token.valid) load(token);
    if (!token.valid || !right()) {
      token = find(first_guarded);
      if (!token.valid) return false;
      load(token);
    }
    return true;
  }

 private:
  const Sequences& s_;
  i64 row_;
  SegmentSearch<Start, kOpenEnd> search_;
  bool has_block_;
  i64 block_ = 0;  // of the guess
  i64 start_;      // likewise

  __device__ __forceinline__ i64 load_block(i32 sequence, i64 page) const {
    return load_number<Block>(s_.block_table + sequence * s_.table_stride +
                              page * static_cast<i64>(sizeof(Block)));
  }
  __device__ __forceinline__ i64 load_start(i32 sequence) const {
    if constexpr (kStarts) {
      return load_number<SeqStart>(s_.seq_starts + sequence * s_.start_stride);
    } else {
      return 0;
    }
  }
};

}  // namespace cupy_cache
