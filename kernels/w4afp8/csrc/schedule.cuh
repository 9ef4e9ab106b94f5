// Which tile a CTA computes next: rows of experts are known only on the device, so every CTA works it out for itself.
#pragma once
#include "primitives.cuh"

namespace w4afp8 {

constexpr int kMaxExperts = 512;

struct GemmParams {
  const uint8_t* weight;
  const float* channel_scales;
  const float* x_scales;
  const float* row_weights;
  const int64_t* offsets;
  const int32_t* counts;
  void* y;
  int experts, n, row_tiles, groups, scale_columns, max_rows;
  int token_cap;               // tokens of a tile at most, a multiple of 8
  uint32_t token_cap_inverse;  // 2^32 / token_cap, rounded up
  // The ring of stages in shared memory: counts and offsets from its start (`Ring`).
  int stages;
  uint32_t ring_weights, ring_scales, ring_factors, ring_full, ring_empty, ring_factors_full, ring_factors_empty;
};

struct Tile {
  int expert, row_tile, first_row, rows;
};

// In shared memory: for each expert its first row, its rows, and the number of the first tile that is not before it.
struct Schedule {
  int first_row[kMaxExperts];
  int rows[kMaxExperts];
  int first_tile[kMaxExperts + 1];
};

// rows / token_cap, rounded up: a product with 2^32 / cap rounded up, which is exact below 2^32 / cap rows. A division
// here, for every tile and role, made short K (two groups) 10 % slower.
W4AFP8_INLINE int token_tiles(const GemmParams& p, int rows) {
  return (int)__umulhi((unsigned)(rows + p.token_cap - 1), p.token_cap_inverse);
}

// All threads of the CTA.
W4AFP8_INLINE void build_schedule(Schedule& s, const GemmParams& p) {
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int64_t first = p.offsets ? p.offsets[e] : (int64_t)e * p.max_rows;
    int rows = p.offsets ? (int)(p.offsets[e + 1] - first) : p.counts[e];
    s.first_row[e] = (int)first;
    s.rows[e] = rows;
    s.first_tile[e + 1] = token_tiles(p, rows) * p.row_tiles;
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // inclusive sums, 32 experts at a time
    int carry = 0;
    for (int base = 0; base < p.experts; base += 32) {
      int e = base + (int)threadIdx.x;
      int sum = e < p.experts ? s.first_tile[e + 1] : 0;
      for (int step = 1; step < 32; step <<= 1) {
        int other = __shfl_up_sync(~0u, sum, step);
        if ((int)threadIdx.x >= step) sum += other;
      }
      if (e < p.experts) s.first_tile[e + 1] = carry + sum;
      carry += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0) s.first_tile[0] = 0;
  }
  __syncthreads();
}

// Makes a value that all lanes of a warp agree on one that the compiler knows to be so: a reduction's result lies in a
// uniform register. What comes from shared memory does not, and then every stage number and wgmma descriptor that
// depends on it goes through vector registers and R2UR, between the wgmma of a batch.
W4AFP8_INLINE int uniform(int value) { return __reduce_max_sync(~0u, value); }

// Tile number `tile`, which is one of `expert`.
W4AFP8_INLINE Tile locate(const Schedule& s, const GemmParams& p, int tile, int expert) {
  const int rows = uniform(s.rows[expert]), tiles = token_tiles(p, rows), at = tile - uniform(s.first_tile[expert]);
  const int first_row = uniform(s.first_row[expert]);
  if (tiles == 1) return {expert, at, first_row, rows};
  const int token_tile = at % tiles;  // fastest, so that a weight block read again is still in L2
  const int share = ((rows + tiles - 1) / tiles + 7) & ~7;  // an even split, whole boxes of 8 rows
  return {expert, at / tiles, first_row + token_tile * share,
          min(share, rows - token_tile * share)};
}

// This CTA's tiles in ascending order. Whole warps walk together.
struct Walk {
  int tile, expert = 0;

  W4AFP8_INLINE Walk() : tile(blockIdx.x) {}
  W4AFP8_INLINE bool here(const Schedule& s, const GemmParams& p) {
    if (tile >= uniform(s.first_tile[p.experts])) return false;
    while (tile >= uniform(s.first_tile[expert + 1])) ++expert;
    return true;
  }
  W4AFP8_INLINE void advance() { tile += gridDim.x; }
};

}  // namespace w4afp8
