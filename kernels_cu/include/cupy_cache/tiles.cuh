// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Tiles of keys and values in shared memory: where their bytes lie, and how they become operands of
// matrix products.
#pragma once

#include "cupy_cache/ints.cuh"
#include "cupy_cache/matrix.cuh"
#include "cupy_cache/operands.cuh"

namespace cupy_cache {

constexpr int kKeys = 16;  // of a tile

// Rows of kBytes bytes in shared memory, in chunks of 16. Eight rows of a matrix lie in different banks:
// chunks of a row are exchanged, unless it has an odd number. Two that make a sector of memory stay side
// by side in a line of 128 bytes: a copy would else read the sector twice.
template <int kTileRows, int kBytes>
struct Tile {
  static constexpr int kChunks = kBytes / 16;  // of a row
  // So many are exchanged with one another.
  static constexpr int kAmong = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  static constexpr int kSize = kTileRows * kBytes;

  // Where a chunk of a row is.
  static __device__ __forceinline__ int at(int row, int chunk) {
    return row * kBytes + (chunk ^ row / (8 / kAmong) % kAmong) * 16;
  }
  // Where the chunk is that comes `further` chunks, an even number, behind the first or second one of a
  // row, which is at `first`. The tile is at a multiple of 128.
  static __device__ __forceinline__ int behind(int first, int further) {
    return (first ^ further % kAmong * 16) + further / kAmong * kAmong * 16;
  }
};

// The same for packs of one chunk, of which those of neighbouring rows are side by side, as they are in
// a cache: an instruction that copies from whole lines then writes whole lines.
template <int kTileRows, int kBytes>
struct PackedTile {
  static constexpr int kChunks = kBytes / 16;
  static constexpr int kSize = kTileRows * kBytes;

  static __device__ __forceinline__ int at(int row, int chunk) { return (chunk * kTileRows + row) * 16; }
  static __device__ __forceinline__ int behind(int first, int further) {
    return first + further * kTileRows * 16;
  }
};
template <bool kPacked, int kTileRows, int kBytes>
struct KeyTileOf {
  using Type = Tile<kTileRows, kBytes>;
};
template <int kTileRows, int kBytes>
struct KeyTileOf<true, kTileRows, kBytes> {
  using Type = PackedTile<kTileRows, kBytes>;
};

// How a tile's keys and values lie in shared memory, and become operands.
template <typename Operand, int kKeySize, int kValueSize, bool kByToken>
struct Stage {
  using In = Operand;
  using Stored = typename In::Stored;
  static constexpr int kSteps = (kKeySize + 15) / 16;  // of the product of queries and keys
  static constexpr int kOutSize = (kValueSize + 15) / 16 * 16;
  using KeyTile = typename KeyTileOf<kByToken, kKeys, kSteps * 16 * In::kBytes>::Type;
  // By token it has a row for each element of a head.
  using ValueTile = Tile<kByToken ? kOutSize : kKeys, (kByToken ? kKeys : kOutSize) * In::kBytes>;
  static constexpr int kBytes = KeyTile::kSize + ValueTile::kSize;

  // The key of the tile that a place among the scores is for. 8-bit values by token are read four
  // neighbours at a time, which stand where the instruction wants two and two.
  static __device__ __forceinline__ int key_of_place(int place) {
    if constexpr (kByToken && In::kNarrow) {
      return place % 8 / 2 * 4 + place / 8 * 2 + place % 2;
    } else {
      return place;
    }
  }

  // Reads two chunks of the keys at `at`, a multiple of 128: calls add(step, low0, low1, high0, high1)
  // for what is in them of keys 0 to 7 and 8 to 15, of the first and the second half of a step's
  // elements.
  template <typename Add>
  static __device__ __forceinline__ void read_keys(const char* shared, int at, int chunk, Add add) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int row = key_of_place(lane % 8 + lane / 16 * 8);
    u32 loaded[4];
    // The last chunk may have no neighbour: it is read twice.
    const int first = at + KeyTile::at(row, chunk + 1 < KeyTile::kChunks ? lane / 8 % 2 : 0);
    load_matrices<false>(loaded, shared + KeyTile::behind(first, chunk));
    if constexpr (In::kNarrow) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (chunk + i >= kSteps) continue;
        add(chunk + i, widen<Stored, 0, 1>(loaded[i]), widen<Stored, 2, 3>(loaded[i]),
            widen<Stored, 0, 1>(loaded[2 + i]), widen<Stored, 2, 3>(loaded[2 + i]));
      }
    } else {
      add(chunk / 2, loaded[0], loaded[1], loaded[2], loaded[3]);
    }
  }

  // Reads the values at `at`, likewise: calls add(columns, low0, low1, high0, high1) for each 16 columns
  // of the output, the first and the last 8 of these, of keys 0 to 7 and 8 to 15.
  template <typename Add>
  static __device__ __forceinline__ void read_values(const char* shared, int at, Add add) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    if constexpr (kByToken) {
      // Matrices of 8 elements of a head by 8 tokens, or by 16 that have 8 bits.
      constexpr int kRowsLoaded = 32 / ValueTile::kChunks;
#pragma unroll
      for (int row = 0; row < kValueSize; row += kRowsLoaded) {
        u32 loaded[4];
        const int further = In::kNarrow ? lane : lane % 8 + lane / 16 * 8;
        const int chunk = In::kNarrow ? 0 : lane / 8 % 2;
        // The last rows may be fewer: others are read twice.
        const int its_row = row + further < kValueSize ? row + further : further % 8;
        load_matrices<false>(loaded, shared + at + ValueTile::at(its_row, chunk));
        if constexpr (In::kNarrow) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (row / 16 + i >= kOutSize / 16) continue;
            const u32 low = loaded[2 * i], high = loaded[2 * i + 1];
            add(row / 16 + i, widen<Stored, 0, 1>(low), widen<Stored, 2, 3>(low),
                widen<Stored, 0, 1>(high), widen<Stored, 2, 3>(high));
          }
        } else {
          add(row / 16, loaded[0], loaded[1], loaded[2], loaded[3]);
        }
      }
    } else {
      const int row = lane % 16;
#pragma unroll
      for (int chunk = 0; chunk < ValueTile::kChunks; chunk += 2) {
        u32 loaded[4];
        const int first = at + ValueTile::at(row, chunk + 1 < ValueTile::kChunks ? lane / 16 : 0);
        load_matrices<true>(loaded, shared + ValueTile::behind(first, chunk));
        if constexpr (In::kNarrow) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (chunk + i >= ValueTile::kChunks) continue;
            // Every second column, then the others.
            const u32 low = loaded[2 * i], high = loaded[2 * i + 1];
            add(chunk + i, widen<Stored, 0, 2>(low), widen<Stored, 0, 2>(high),
                widen<Stored, 1, 3>(low), widen<Stored, 1, 3>(high));
          }
        } else {
          add(chunk / 2, loaded[0], loaded[1], loaded[2], loaded[3]);
        }
      }
    }
  }
};

}  // namespace cupy_cache
