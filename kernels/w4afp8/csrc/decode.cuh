// Few tokens per expert: bound by reading the weights. Two CTAs on a multiprocessor, or three of 8 tokens where K is so
// short that a tile is mostly latency; 256 inputs a stage.
#pragma once
#include "mainloop.cuh"
#include "producer.cuh"

namespace w4afp8 {

template <class F>
using DecodeRing = Ring<2, 1, F>;

template <int kTokens, int kCtas, bool kGroupScale, Epilogue kEpilogue, class F>
W4AFP8_INLINE void decode_tile(const GemmParams& p, const DecodeRing<F>& ring, Cursor& at, const Slot& slot) {
  const int lane = threadIdx.x & 31;
  // 32 tokens and more leave room for one set of partial sums, as do scales of 32 inputs for their own waits.
  constexpr int kParts = kTokens <= 16 && kCtas == 2 && F::kScales == 1 ? 2 : 1;
  float acc[kTokens / 2], part[kParts][kTokens / 2];
  Fragment<F> f[2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) {
    acc[i] = 0.f;
#pragma unroll
    for (int b = 0; b < kParts; ++b) part[b][i] = 0.f;
  }
  wait(ring.full(at.stage), at.phase);
  f[0].load(ring.weight(at.stage, 0));
#pragma unroll 1
  for (int group = 0; group < p.groups; group += 2) {
    const int stage = at.stage;
    const uint32_t token_scales = ring.scale(stage, 0) + 8 * (lane & 3), second_scales = token_scales + p.token_cap * 4;
    auto load_next = [&] {
      at.advance(p.stages);
      if (group + 2 < p.groups) {
        wait(ring.full(at.stage), at.phase);
        f[0].load(ring.weight(at.stage, 0));
      }
    };
    if constexpr (kParts == 2) {
      issue<kTokens>(part[0], f[0], ring.activation(stage, 0));
      f[1].load(ring.weight(stage, 1));
      issue<kTokens>(part[1], f[1], ring.activation(stage, 1));
      cute::warpgroup_wait<1>();
      promote<kTokens, kGroupScale>(acc, part[0], f[0].scales[0], token_scales);
      load_next();
      cute::warpgroup_wait<0>();
      if constexpr (!kGroupScale) ring.release(stage);
      promote<kTokens, kGroupScale>(acc, part[1], f[1].scales[0], second_scales);
      if constexpr (kGroupScale) ring.release(stage);
    } else if constexpr (kCtas == 3) {  // the other CTAs hide this one's latencies
      multiply<kTokens, kGroupScale>(acc, part[0], f[0], ring.activation(stage, 0), token_scales, [] {}, [] {});
      f[0].load(ring.weight(stage, 1));
      multiply<kTokens, kGroupScale>(acc, part[0], f[0], ring.activation(stage, 1), second_scales, [] {},
                                     [&] { ring.release(stage); });
      load_next();
    } else {
      multiply<kTokens, kGroupScale>(acc, part[0], f[0], ring.activation(stage, 0), token_scales,
                                     [&] { f[1].load(ring.weight(stage, 1)); }, [] {});
      multiply<kTokens, kGroupScale>(acc, part[0], f[1], ring.activation(stage, 1), second_scales, load_next,
                                     [&] { ring.release(stage); });
    }
  }
  write_tile<kTokens, !kGroupScale, kEpilogue>(p, slot, acc);
}

template <class F, bool kGroupScale, Epilogue kEpilogue, int kCtas>
__global__ void __launch_bounds__(384, kCtas) decode_kernel(const GemmParams p, const __grid_constant__ ActivationMaps maps) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ((uint32_t)__cvta_generic_to_shared(shared) + 1023u) & ~1023u;
  const DecodeRing<F> ring{base, p};
  const Schedule schedule(reinterpret_cast<int*>(shared + (base - (uint32_t)__cvta_generic_to_shared(shared)) + p.schedule), p);
  const int warp = uniform((int)threadIdx.x >> 5);
  if (threadIdx.x == 0) ring.init(kGroupScale);
  start_early(p);
  build_schedule<false, 1, false>(schedule, p);
  if (warp >= 8) {
    cutlass::arch::warpgroup_reg_dealloc<kCtas == 2 ? 32 : 40>();
    produce_all<kGroupScale, false>(warp, p, schedule, ring, maps, kEvictFirst);
  } else {
    cutlass::arch::warpgroup_reg_alloc<kCtas == 2 ? 104 : 64>();
    Cursor at;
    consume_all(ring, [&](int rows, const Slot& slot) {
      if (kCtas == 3 || rows <= 8) {
        decode_tile<8, kCtas, kGroupScale, kEpilogue, F>(p, ring, at, slot);
      } else if constexpr (kCtas == 2) {
        if (rows <= 16) {
          decode_tile<16, kCtas, kGroupScale, kEpilogue, F>(p, ring, at, slot);
        } else if (rows <= 32) {
          decode_tile<32, kCtas, kGroupScale, kEpilogue, F>(p, ring, at, slot);
        } else if constexpr (constexpr int kCap = F::decode_cap(kGroupScale); kCap > 32) {
          decode_tile<kCap, kCtas, kGroupScale, kEpilogue, F>(p, ring, at, slot);
        }
      }
    });
  }
}

}  // namespace w4afp8
