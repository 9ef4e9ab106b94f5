// Which tiles a CTA computes: rows of experts are known only on the device, so every CTA works it out for itself.
#pragma once
#include "primitives.cuh"

namespace w4afp8 {

constexpr int kMaxExperts = 512;

// What becomes of the accumulators. kAny: what the parameters say. Code that has not run before must be fetched, which
// takes 7 us where everything is unrolled for one epilogue: so the kernel for loads of few tiles serves all of them, in
// small loops, and the two GEMMs of a layer share it.
enum class Epilogue : int16_t { kBf16, kF32, kSwiglu, kAny };

struct GemmParams {
  const uint8_t* weight;
  const float* channel_scales;
  const float* x_scales;
  const float* row_weights;
  const int64_t* offsets;
  const int32_t* counts;
  void* y;
  int experts, n, row_tiles, row_strips, groups, scale_columns, max_rows;
  // row_strips: row tiles / CTAs of a cluster, rounded up.
  // 16 bits each: with a word of parameters more, the compiler orders decode's loop worse (17 % at one row).
  int16_t early_start;  // offsets are older than the previous kernel, which may still write the activations
  Epilogue epilogue;
  int token_cap;  // tokens of a tile at most, a multiple of 8
  // Counts and offsets in shared memory (`Ring`), after which the schedule lies.
  int stages;
  uint32_t ring_weights, ring_scales, ring_slots, ring_full, ring_empty, ring_slot_full, ring_slot_empty, schedule;
};

// row_tile: beyond the last one where a cluster has more CTAs than tiles are left.
struct Tile {
  int expert, row_tile, first_row, rows;

  // Which weights to read: those of the last row tile where there are none.
  W4AFP8_INLINE size_t weight_tile(const GemmParams& p) const {
    return (size_t)expert * p.row_tiles + min(row_tile, p.row_tiles - 1);
  }
};

constexpr int kTileChoices = 8;

// In shared memory, for the experts in the order of their tiles: which expert, its first row, its rows, and the number
// of the first tile that is not before it. After them the tokens of a tile at most, and what each choice of them costs.
class Schedule {
 public:
  // memory: in shared memory, `bytes` of it.
  W4AFP8_INLINE Schedule(int* memory, const GemmParams& p) : memory_(memory), p_(p) {}
  static int bytes(int experts) { return (4 * experts + 2 + kTileChoices) * 4; }

  W4AFP8_INLINE int& expert(int place) const { return memory_[place]; }
  W4AFP8_INLINE int& first_row(int place) const { return memory_[p_.experts + place]; }
  W4AFP8_INLINE int& rows(int place) const { return memory_[2 * p_.experts + place]; }
  W4AFP8_INLINE int& first_tile(int place) const { return memory_[3 * p_.experts + place]; }
  W4AFP8_INLINE int& tile_cap() const { return memory_[4 * p_.experts + 1]; }
  W4AFP8_INLINE int& cost(int choice) const { return memory_[4 * p_.experts + 2 + choice]; }

 private:
  int* memory_;
  const GemmParams& p_;
};

W4AFP8_INLINE int token_tiles(int rows, int cap) { return (rows + cap - 1) / cap; }

// Tokens of an expert's tiles: an even split into whole boxes of 8 rows.
W4AFP8_INLINE int tile_tokens(int rows, int tiles) { return tiles == 0 ? 0 : ((rows + tiles - 1) / tiles + 7) & ~7; }

// All threads of the CTA; s.rows(e) are there. Smaller tiles can fill the last round of the CTAs better, and cost more in
// all: beside its tokens a tile takes as long as 128 of them for its weights, and 800 / groups for its begin and end
// (measured, BENCHMARKS.md).
W4AFP8_INLINE void choose_tile_cap(const Schedule& s, const GemmParams& p, int clusters) {
  const int choice = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
  auto cap_of = [&](int index) { return max(p.token_cap - 16 * index, 48); };
  if (choice < kTileChoices) {
    int tiles = 0, rows = 0;
#pragma unroll 1
    for (int e = lane; e < p.experts; e += 32) {
      tiles += token_tiles(s.rows(e), cap_of(choice));
      rows += s.rows(e);
    }
    tiles = max(__reduce_add_sync(~0u, tiles), 1);
    rows = __reduce_add_sync(~0u, rows);
    const int64_t rounds = ((int64_t)tiles * p.row_strips + clusters - 1) / clusters;
    if (lane == 0) s.cost(choice) = (int)min(rounds * (128 + 800 / p.groups + rows / tiles), (int64_t)0x7fffffff);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int best = 0;
#pragma unroll 1
    for (int other = 1; other < kTileChoices; ++other)
      if (s.cost(other) < s.cost(best)) best = other;
    s.tile_cap() = cap_of(best);
  }
  __syncthreads();
}

// All threads of the CTA. kLargestFirst: experts by descending tokens of a tile, so that the CTAs, which take tiles in
// turn, end at about the same time; where reading weights bounds, all tiles cost the same.
// kChoosesTiles: s.tile_cap() is chosen, for clusters of kCluster CTAs.
template <bool kLargestFirst, int kCluster, bool kChoosesTiles>
W4AFP8_INLINE void build_schedule(const Schedule& s, const GemmParams& p) {
  auto rows_of = [&](int e) { return p.offsets ? (int)(p.offsets[e + 1] - p.offsets[e]) : p.counts[e]; };
  if constexpr (kChoosesTiles) {
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x) s.rows(e) = rows_of(e);
    __syncthreads();
    choose_tile_cap(s, p, (int)gridDim.x / kCluster);
    const int cap = s.tile_cap();
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x)
      s.first_tile(e) = tile_tokens(s.rows(e), token_tiles(s.rows(e), cap));
    __syncthreads();
  } else if constexpr (kLargestFirst) {
    for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
      const int rows = rows_of(e);
      s.first_tile(e) = tile_tokens(rows, token_tiles(rows, p.token_cap));
    }
    __syncthreads();
  }
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int place = e;
    if constexpr (kLargestFirst) {
      const int own = s.first_tile(e);
      place = 0;
      for (int other = 0; other < p.experts; ++other) {
        const int tokens = s.first_tile(other);
        place += tokens > own || (tokens == own && other < e);
      }
    }
    s.expert(place) = e;
    s.first_row(place) = p.offsets ? (int)p.offsets[e] : e * p.max_rows;
    s.rows(place) = rows_of(e);
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // sums up to each expert, 32 experts at a time
    const int cap = kChoosesTiles ? s.tile_cap() : p.token_cap;
    int carry = 0;
    for (int base = 0; base < p.experts; base += 32) {
      const int at = base + (int)threadIdx.x;
      int sum = at < p.experts ? token_tiles(s.rows(at), cap) * p.row_strips : 0;
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if ((int)threadIdx.x >= step) sum += other;
      }
      if (at < p.experts) s.first_tile(at + 1) = carry + sum;
      carry += __shfl_sync(~0u, sum, 31);
    }
    if (threadIdx.x == 0) s.first_tile(0) = 0;
  }
  __syncthreads();
}

// Makes a value that all lanes of a warp agree on one that the compiler knows to be so: a reduction's result lies in a
// uniform register. What comes from shared memory does not, and then every stage number and wgmma descriptor that
// depends on it goes through vector registers and R2UR, between the wgmma of a batch.
W4AFP8_INLINE int uniform(int value) { return __reduce_max_sync(~0u, value); }

// This CTA's tiles in ascending order. Whole warps walk together. The CTAs of a cluster take row tiles side by side.
// kTurn: every second round goes backwards, which evens out tiles that become smaller.
template <bool kTurn, int kCluster, bool kChoosesTiles>
class Walk {
 public:
  W4AFP8_INLINE Walk(const Schedule& s, const GemmParams& p) : s_(s), p_(p), cap_(kChoosesTiles ? s.tile_cap() : 0) {}

  // Finds the next tile. Returns: whether there is one.
  W4AFP8_INLINE bool next() {
    const int round = round_++;
    const int clusters = (int)gridDim.x / kCluster, own = (int)blockIdx.x / kCluster;
    const int tile = round * clusters + (kTurn && round % 2 ? clusters - 1 - own : own);
    // In the last round there may be none; there is none after that either.
    if (tile >= s_.first_tile(p_.experts)) return false;
    for (unsigned before = ~0u; before == ~0u; place_ += __popc(before)) {
      const int other = place_ + (int)(threadIdx.x & 31);
      before = __ballot_sync(~0u, other < p_.experts && s_.first_tile(other + 1) <= tile);
    }
    const int rows = s_.rows(place_), tiles = token_tiles(rows, kChoosesTiles ? cap_ : p_.token_cap), inside = tile - s_.first_tile(place_);
    const int share = tile_tokens(rows, tiles);
    // Token tiles fastest, so that a weight block read again is still in L2.
    const int token_tile = inside % tiles;
    const int row_tile = inside / tiles * kCluster + (int)blockIdx.x % kCluster;
    tile_ = {s_.expert(place_), row_tile, s_.first_row(place_) + token_tile * share,
             min(share, rows - token_tile * share)};
    return true;
  }
  W4AFP8_INLINE const Tile& tile() const { return tile_; }

 private:
  const Schedule& s_;
  const GemmParams& p_;
  int cap_, round_ = 0, place_ = 0;
  Tile tile_{};
};

}  // namespace w4afp8
