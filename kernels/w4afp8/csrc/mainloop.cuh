// The parts both kernels share: a weight block to registers, one wgmma batch, promotion to float32.
#pragma once
#include "epilogue.cuh"

namespace w4afp8 {

// A 64 x 128 block of weights as wgmma's register operand, and the group scales of this lane's two rows.
struct Fragment {
  uint32_t a[4][4];
  float scale0, scale1;

  // codes: this thread's 16 bytes of the block's first half; scales: this lane's pair.
  template <bool kFullRange>
  W4AFP8_INLINE void load(uint32_t codes, uint32_t scales) {
    uint32_t q[8];
    load4(q, codes);
    load4(q + 4, codes + 2048);
    uint32_t pair = load1(scales);
    float2 f = __half22float2(*reinterpret_cast<__half2*>(&pair));
    scale0 = f.x;
    scale1 = f.y;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      convert<kFullRange>(q[2 * step], a[step][0], a[step][1]);
      convert<kFullRange>(q[2 * step + 1], a[step][2], a[step][3]);
    }
  }

  // Keeps the compiler from moving the conversion past the next wait: it shall run under the wgmma in flight.
  W4AFP8_INLINE void pin() {
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[step][i]));
  }
};

// part = weights x activations over 128 inputs: four wgmma of 32.
template <int kTokens>
W4AFP8_INLINE void issue(float* part, Fragment& f, uint32_t activations) {
  const uint64_t descriptor = operand(activations);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) cute::warpgroup_fence_operand(part[i]);
#pragma unroll
  for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) cute::warpgroup_fence_operand(f.a[step][i]);
  cute::warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < 4; ++step) Mma<kTokens>::run(part, f.a[step], descriptor + step * 2, step != 0);
  cute::warpgroup_commit_batch();
}

// acc += part * scale. The tensor core keeps 13 bits below the largest term, so 128 inputs at most before this.
// token_scales: shared memory, this lane's pair of the first 8 tokens (group scales of the activations only).
template <int kTokens, bool kGroupScale>
W4AFP8_INLINE void promote(float* acc, float* part, float scale0, float scale1, uint32_t token_scales) {
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) cute::warpgroup_fence_operand(part[i]);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    float2 f = kGroupScale ? load_float2(token_scales + j * 32) : make_float2(1.f, 1.f);
    acc[4 * j] = fmaf(part[4 * j], kGroupScale ? scale0 * f.x : scale0, acc[4 * j]);
    acc[4 * j + 1] = fmaf(part[4 * j + 1], kGroupScale ? scale0 * f.y : scale0, acc[4 * j + 1]);
    acc[4 * j + 2] = fmaf(part[4 * j + 2], kGroupScale ? scale1 * f.x : scale1, acc[4 * j + 2]);
    acc[4 * j + 3] = fmaf(part[4 * j + 3], kGroupScale ? scale1 * f.y : scale1, acc[4 * j + 3]);
  }
}

// The ring of stages in shared memory. A stage has kDepth groups of 128 inputs:
// kDepth tiles of activations | kDepth weight blocks | kDepth rows of token scales.
// Then two slots of the epilogue's factors, a float for each token and each of the 128 channels; the barriers.
// Offsets are kernel parameters, which cost no registers.
template <int kDepth>
struct Ring {
  uint32_t base;
  const GemmParams& p;

  static void lay_out(GemmParams& p) {
    p.ring_weights = p.stages * kDepth * p.token_cap * 128;
    p.ring_scales = p.ring_weights + p.stages * kDepth * kBlockBytes;
    p.ring_factors = p.ring_scales + p.stages * kDepth * p.token_cap * 4;
    p.ring_full = p.ring_factors + 2 * slot_bytes(p.token_cap);
    p.ring_empty = p.ring_full + p.stages * 8;
    p.ring_factors_full = p.ring_empty + p.stages * 8;
    p.ring_factors_empty = p.ring_factors_full + 16;
  }
  static int stage_bytes(int cap) { return kDepth * (cap * 132 + kBlockBytes) + 16; }
  static int fixed_bytes(int cap) { return 2 * slot_bytes(cap) + 32; }
  static __host__ __device__ constexpr int slot_bytes(int cap) { return (cap + 128) * 4; }

  W4AFP8_INLINE uint32_t activation(int stage, int group) const {
    return base + (stage * kDepth + group) * p.token_cap * 128;
  }
  W4AFP8_INLINE uint32_t weight(int stage, int group) const {
    return base + p.ring_weights + (stage * kDepth + group) * kBlockBytes;
  }
  W4AFP8_INLINE uint32_t scale(int stage, int group) const {
    return base + p.ring_scales + (stage * kDepth + group) * p.token_cap * 4;
  }
  W4AFP8_INLINE uint32_t token_factors(int slot) const { return base + p.ring_factors + slot * slot_bytes(p.token_cap); }
  W4AFP8_INLINE uint32_t channel_factors(int slot) const { return token_factors(slot) + p.token_cap * 4; }
  W4AFP8_INLINE uint32_t factors_full(int slot) const { return base + p.ring_factors_full + slot * 8; }
  W4AFP8_INLINE uint32_t factors_empty(int slot) const { return base + p.ring_factors_empty + slot * 8; }
  W4AFP8_INLINE uint32_t full(int stage) const { return base + p.ring_full + stage * 8; }
  W4AFP8_INLINE uint32_t empty(int stage) const { return base + p.ring_empty + stage * 8; }

  // full_arrivals: the copying thread, and 32 lanes where token scales come too. 8 warps consume.
  W4AFP8_INLINE void init(int full_arrivals) const {
    for (int i = 0; i < p.stages; ++i) {
      init_barrier(full(i), full_arrivals);
      init_barrier(empty(i), 8);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(factors_full(i), 32);
      init_barrier(factors_empty(i), 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }
};

struct Cursor {
  int stage = 0;
  uint32_t phase = 0;
  W4AFP8_INLINE void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The activations [rows, k] as boxes of 128 inputs and 8 or 64 rows.
struct ActivationMaps {
  CUtensorMap rows8, rows64;
};

// One warp of the producer: brings every stage of every tile of this CTA. Weights are one linear stream.
template <int kDepth>
W4AFP8_INLINE void produce(const GemmParams& p, const Schedule& s, const Ring<kDepth>& ring,
                           const ActivationMaps& maps, uint64_t policy) {
  Cursor at;
  at.phase = 1;
  for (Walk walk; walk.here(s, p); walk.advance()) {
    const Tile tile = locate(s, p, walk.tile, walk.expert);
    // Whole boxes of 64 rows while a tile has many, since issuing copies takes time; then boxes of 8, to load no more.
    int large = tile.rows / 64, small = (tile.rows % 64 + 7) / 8;
    if (small > 4) {
      ++large;
      small = 0;
    }
    const uint8_t* block = p.weight + ((size_t)tile.expert * p.row_tiles + tile.row_tile) * p.groups * kBlockBytes;
    for (int group = 0; group < p.groups; group += kDepth) {
      wait(ring.empty(at.stage), at.phase);
      if ((threadIdx.x & 31) == 0) {
        const uint32_t full = ring.full(at.stage);
        expect(full, kDepth * (kBlockBytes + large * 8192 + small * 1024));
        copy_bulk(ring.weight(at.stage, 0), block + (size_t)group * kBlockBytes, kDepth * kBlockBytes, full, policy);
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          uint32_t target = ring.activation(at.stage, d);
          int row = tile.first_row;
          for (int box = 0; box < large; ++box, target += 8192, row += 64)
            copy_tensor(target, &maps.rows64, full, (group + d) * 128, row);
          for (int box = 0; box < small; ++box, target += 1024, row += 8)
            copy_tensor(target, &maps.rows8, full, (group + d) * 128, row);
        }
      }
      __syncwarp();
      at.advance(p.stages);
    }
  }
}

// One warp beside it, where activations have a scale per token and 128 inputs: row-major in memory, so 4 bytes each.
template <int kDepth>
W4AFP8_INLINE void produce_scales(const GemmParams& p, const Schedule& s, const Ring<kDepth>& ring) {
  Cursor at;
  at.phase = 1;
  const int lane = threadIdx.x & 31;
  for (Walk walk; walk.here(s, p); walk.advance()) {
    const Tile tile = locate(s, p, walk.tile, walk.expert);
    for (int group = 0; group < p.groups; group += kDepth) {
      wait(ring.empty(at.stage), at.phase);
      for (int token = lane; token < tile.rows; token += 32)
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const bool inside = group + d < p.scale_columns;  // K is padded to an even number of groups
          const float* source = p.x_scales + (size_t)(tile.first_row + token) * p.scale_columns + (inside ? group + d : 0);
          asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(ring.scale(at.stage, d) + token * 4), "l"(source),
                       "r"(inside ? 4 : 0)
                       : "memory");
        }
      asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(ring.full(at.stage)) : "memory");
      at.advance(p.stages);
    }
  }
}

// One warp beside them: what the epilogue multiplies with, a tile ahead.
template <int kDepth, bool kGroupScale>
W4AFP8_INLINE void produce_factors(const GemmParams& p, const Schedule& s, const Ring<kDepth>& ring) {
  Cursor at;
  at.phase = 1;
  const int lane = threadIdx.x & 31;
  for (Walk walk; walk.here(s, p); walk.advance()) {
    const Tile tile = locate(s, p, walk.tile, walk.expert);
    wait(ring.factors_empty(at.stage), at.phase);
    for (int token = lane; token < tile.rows; token += 32) {
      float factor = kGroupScale ? 1.f : __ldg(p.x_scales + tile.first_row + token);
      if (p.row_weights) factor *= __ldg(p.row_weights + tile.first_row + token);
      store1(ring.token_factors(at.stage) + token * 4, factor);
    }
    const float* channels = p.channel_scales + (size_t)tile.expert * p.row_tiles * 128 + tile.row_tile * 128;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      store1(ring.channel_factors(at.stage) + (i * 32 + lane) * 4, __ldg(channels + i * 32 + lane));
    arrive(ring.factors_full(at.stage));
    at.advance(2);
  }
}

// The producer's warpgroup: one warp for each kind of copy, the fourth has nothing to do.
template <int kDepth, bool kGroupScale>
W4AFP8_INLINE void produce_all(int warp, const GemmParams& p, const Schedule& s, const Ring<kDepth>& ring,
                               const ActivationMaps& maps, uint64_t policy) {
  if (warp == 8) {
    produce(p, s, ring, maps, policy);
  } else if (kGroupScale && warp == 9) {
    produce_scales(p, s, ring);
  } else if (warp == 10) {
    produce_factors<kDepth, kGroupScale>(p, s, ring);
  }
}

// A consumer warpgroup's end of a tile. The tile is worked out again: keeping it would cost the main loop registers.
template <int kTokens, Epilogue kEpilogue, int kDepth>
W4AFP8_INLINE void finish_tile(const GemmParams& p, const Ring<kDepth>& ring, Cursor& slot, const Schedule& s,
                               const Walk& walk, const float* acc) {
  const int warpgroup = threadIdx.x >> 7;
  const Tile tile = locate(s, p, walk.tile, walk.expert);
  wait(ring.factors_full(slot.stage), slot.phase);
  write_tile<kTokens, kEpilogue>(p, tile, tile.row_tile * 128 + warpgroup * 64, acc,
                                 ring.channel_factors(slot.stage) + warpgroup * 256, ring.token_factors(slot.stage));
  __syncwarp();
  if ((threadIdx.x & 31) == 0) arrive(ring.factors_empty(slot.stage));
  slot.advance(2);
}

}  // namespace w4afp8
