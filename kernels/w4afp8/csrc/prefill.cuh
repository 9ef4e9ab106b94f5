// Many tokens per expert: bound by the tensor cores. One CTA on a multiprocessor, 128 inputs a stage.
#pragma once
#include "mainloop.cuh"

namespace w4afp8 {

constexpr int kPrefillCap = 160;  // tokens whose sums fit in registers, beside the partial sums and two fragments
using PrefillRing = Ring<1>;

template <int kTokens, bool kFullRange, bool kGroupScale, Epilogue kEpilogue>
W4AFP8_INLINE void prefill_tile(const GemmParams& p, const PrefillRing& ring, Cursor& at, Cursor& slot,
                                const Schedule& s, const Walk& walk) {
  const int warpgroup = threadIdx.x >> 7, thread = threadIdx.x & 127, warp = thread >> 5, lane = threadIdx.x & 31;
  const uint32_t codes = warpgroup * 4096 + thread * 16;
  const uint32_t scales = kCodeBytes + (warpgroup * 32 + warp * 8 + (lane >> 2)) * 4;
  float acc[kTokens / 2], part[kTokens / 2];
  Fragment f[2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) acc[i] = part[i] = 0.f;
  auto load = [&](Fragment& fragment) {
    const uint32_t block = ring.weight(at.stage, 0);
    fragment.template load<kFullRange>(block + codes, block + scales);
  };
  auto release = [&](int stage) {
    if (lane == 0) arrive(ring.empty(stage));
  };
  wait(ring.full(at.stage), at.phase);
  load(f[0]);
#pragma unroll 1
  for (int group = 0; group < p.groups; group += 2) {
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      const int stage = at.stage;
      issue<kTokens>(part, f[sub], ring.activation(stage, 0));
      at.advance(p.stages);
      if (group + sub + 1 < p.groups) {  // the next weights are converted under the wgmma in flight
        wait(ring.full(at.stage), at.phase);
        load(f[sub ^ 1]);
        f[sub ^ 1].pin();
      }
      cute::warpgroup_wait<0>();
      if constexpr (!kGroupScale) release(stage);
      promote<kTokens, kGroupScale>(acc, part, f[sub].scale0, f[sub].scale1, ring.scale(stage, 0) + 8 * (lane & 3));
      if constexpr (kGroupScale) release(stage);
    }
  }
  finish_tile<kTokens, kEpilogue>(p, ring, slot, s, walk, acc);
}

template <bool kFullRange, bool kGroupScale, Epilogue kEpilogue>
__global__ void __launch_bounds__(384, 1) prefill_kernel(const GemmParams p, const __grid_constant__ ActivationMaps maps) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Schedule schedule;
  const PrefillRing ring{((uint32_t)__cvta_generic_to_shared(shared) + 1023u) & ~1023u, p};
  const int warp = uniform((int)threadIdx.x >> 5);
  if (threadIdx.x == 0) ring.init(kGroupScale ? 33 : 1);
  build_schedule(schedule, p);
  if (warp >= 8) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    produce_all<1, kGroupScale>(warp, p, schedule, ring, maps, kEvictNormal);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    Cursor at, slot;
    for (Walk walk; walk.here(schedule, p); walk.advance()) {
      const int rows = locate(schedule, p, walk.tile, walk.expert).rows;
      if (rows <= 32) {
        prefill_tile<32, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      } else if (rows <= 64) {
        prefill_tile<64, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      } else if (rows <= 96) {
        prefill_tile<96, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      } else if (rows <= 128) {
        prefill_tile<128, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      } else {
        prefill_tile<160, kFullRange, kGroupScale, kEpilogue>(p, ring, at, slot, schedule, walk);
      }
    }
  }
}

}  // namespace w4afp8
