// Few tokens per expert: bound by reading the weights. Two CTAs on a multiprocessor, 256 inputs a stage.
#pragma once
#include "mainloop.cuh"

namespace w4afp8 {

constexpr int kDecodeCap = 32;
using DecodeRing = Ring<2>;

template <int kTokens, bool kFullRange, bool kGroupScale, Epilogue kEpilogue>
W4AFP8_INLINE void decode_tile(const GemmParams& p, const DecodeRing& ring, Cursor& at, Cursor& slot, const Schedule& s,
                               const Walk& walk) {
  const int warpgroup = threadIdx.x >> 7, thread = threadIdx.x & 127, warp = thread >> 5, lane = threadIdx.x & 31;
  const uint32_t codes = warpgroup * 4096 + thread * 16;
  const uint32_t scales = kCodeBytes + (warpgroup * 32 + warp * 8 + (lane >> 2)) * 4;
  // Registers are for two CTAs: 32 tokens leave room for one set of partial sums.
  constexpr int kParts = kTokens <= 16 ? 2 : 1;
  float acc[kTokens / 2], part[kParts][kTokens / 2];
  Fragment f[2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    acc[i] = 0.f;
#pragma unroll
    for (int b = 0; b < kParts; ++b) part[b][i] = 0.f;
  }
  auto load = [&](Fragment& fragment, int group) {
    const uint32_t block = ring.weight(at.stage, group);
    fragment.template load<kFullRange>(block + codes, block + scales);
  };
  auto release = [&](int stage) {
    if (lane == 0) arrive(ring.empty(stage));
  };
  wait(ring.full(at.stage), at.phase);
  load(f[0], 0);
#pragma unroll 1
  for (int group = 0; group < p.groups; group += 2) {
    const int stage = at.stage;
    const uint32_t token_scales = ring.scale(stage, 0) + 8 * (lane & 3);
    issue<kTokens>(part[0], f[0], ring.activation(stage, 0));
    load(f[1], 1);
    if constexpr (kParts == 2) {
      issue<kTokens>(part[1], f[1], ring.activation(stage, 1));
      cute::warpgroup_wait<1>();
      promote<kTokens, kGroupScale>(acc, part[0], f[0].scale0, f[0].scale1, token_scales);
    } else {
      cute::warpgroup_wait<0>();
      promote<kTokens, kGroupScale>(acc, part[0], f[0].scale0, f[0].scale1, token_scales);
      issue<kTokens>(part[0], f[1], ring.activation(stage, 1));
    }
    at.advance(p.stages);
    if (group + 2 < p.groups) {
      wait(ring.full(at.stage), at.phase);
      load(f[0], 0);
    }
    cute::warpgroup_wait<0>();
    if constexpr (!kGroupScale) release(stage);
    promote<kTokens, kGroupScale>(acc, part[kParts - 1], f[1].scale0, f[1].scale1, token_scales + p.token_cap * 4);
    if constexpr (kGroupScale) release(stage);
  }
  finish_tile<kTokens, kEpilogue>(p, ring, slot, s, walk, acc);
}

template <bool kFullRange, bool kGroupScale, Epilogue kEpilogue>
__global__ void __launch_bounds__(384, 2) decode_kernel(const GemmParams p, const __grid_constant__ ActivationMaps maps) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Schedule schedule;
  const DecodeRing ring{((uint32_t)__cvta_generic_to_shared(shared) + 1023u) & ~1023u, p};
  const int warp = uniform((int)threadIdx.x >> 5);
  if (threadIdx.x == 0) ring.init(kGroupScale ? 33 : 1);
  build_schedule(schedule, p);
  if (warp >= 8) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    produce_all<2, kGroupScale>(warp, p, schedule, ring, maps, kEvictFirst);
  } else {
    cutlass::arch::warpgroup_reg_alloc<96>();
    Cursor at, slot;
    for (Walk walk; walk.here(schedule, p); walk.advance()) {
      const int rows = locate(schedule, p, walk.tile, walk.expert).rows;
      if (rows <= 8) {
        decode_tile<8, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      } else if (rows <= 16) {
        decode_tile<16, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      } else {
        decode_tile<32, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      }
    }
  }
}

}  // namespace w4afp8
