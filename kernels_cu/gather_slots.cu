// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Gathers the tokens in given slots of a paged cache into contiguous rows. `gathered.cuh` says what a
// row is made of, and moves it.
#include "cupy_cache/convert.cuh"
#include "cupy_cache/gathered.cuh"
#include "cupy_cache/ints.cuh"
#include "cupy_cache/overlap.cuh"
#include "cupy_cache/paging.cuh"

namespace cupy_cache {

// The number of slot_mapping in the list of guarded arguments.
constexpr u32 kSlotMapping = 1;

struct Params {
  const char* src_cache;     // [num_blocks, kBlockSize / kGroup, kGroup, a token]
  char* dst;                 // [rows, kOuter, kHeads, kBytes]
  const char* slot_mapping;  // [rows] of Slot
  const char* scale;         // one float, or null: scale_value is used; or of heads, see RowShape
  i64 rows;
  float scale_value;
  u32 unused;
  i64 num_blocks;
  Sides sides;
};

// Converter makes vectors of kVec bytes of a row; for the others see RowShape.
template <typename Converter, int kVec, int kOuter, int kHeads, int kBytes, int kScaleHeads,
          int kBlockSize, int kGroup, typename Slot, int kVectors, int kMaxThreads>
__global__ void __launch_bounds__(kMaxThreads) gather_slots(const __grid_constant__ Params p) {
  await_earlier_launches();
  release_next_launch();
  using Shape = RowShape<Converter, kOuter, kHeads, kBytes, kScaleHeads, kGroup, kVectors>;
  using Part = RowPart<Shape, kVec, kBlockSize>;

  const u32 index = blockIdx.x * blockDim.x + threadIdx.x;
  const i64 row = static_cast<i64>(index / Part::kThreads);
  if (row >= p.rows) return;
  const i64 slot = load_number<Slot>(p.slot_mapping + row * static_cast<i64>(sizeof(Slot)));
  const float scale = scale_of_all<Shape>(p.scale, p.scale_value);
  const Target<kBlockSize> target(slot, p.num_blocks);
  if (!target.valid) return target.report(kSlotMapping, row);

  Part part(static_cast<int>(index % Part::kThreads));
  const Place<kBlockSize> place = target.place();
  part.load(p.src_cache, p.scale, p.sides, place.block, place.offset);
  part.store(p.dst + row * p.sides.dst_row_stride, p.sides, scale);
}

}  // namespace cupy_cache
