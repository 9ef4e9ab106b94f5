// Many tokens per expert: bound by the tensor cores and the power they may draw. One CTA on a multiprocessor, 128 inputs
// a stage.
#pragma once
#include "mainloop.cuh"
#include "producer.cuh"

namespace w4afp8 {

// Two CTAs share their tokens, each bringing half of them to both, which halves what L2 delivers.
constexpr int kPrefillCluster = 2;

// With any epilogue it is for few tiles, whose number decides how well they fill the multiprocessors.
template <class F, Epilogue kEpilogue>
using PrefillRing = Ring<1, kPrefillCluster, F, kEpilogue == Epilogue::kAny>;

// Tokens of a tile at most. Loops that name their accumulators take registers.
template <class F, bool kGroupScale, Epilogue kEpilogue>
constexpr int prefill_cap() {
  constexpr int kCap = F::prefill_cap(kGroupScale);
  return kEpilogue == Epilogue::kAny && kCap > 160 ? 160 : kCap;
}

template <int kTokens, bool kGroupScale, Epilogue kEpilogue, class F>
W4AFP8_INLINE void prefill_tile(const GemmParams& p, const PrefillRing<F, kEpilogue>& ring, Cursor& ahead,
                                const Slot& slot) {
  const int lane = threadIdx.x & 31;
  float acc[kTokens / 2], part[kTokens / 2];
  // Weights are read from shared memory two blocks ahead, so that their latency passes under the promotion, and
  // converted one block ahead, under the wgmma in flight.
  Packed<F> packed;
  Fragment<F> f[2];
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) acc[i] = part[i] = 0.f;
  int next = ahead.stage;
  auto read_ahead = [&] {
    wait(ring.full(ahead.stage), ahead.phase);
    packed.load(ring.weight(ahead.stage, 0));
    ahead.advance(p.stages);
  };
  read_ahead();
  f[0].convert(packed);
  read_ahead();
#pragma unroll 1
  for (int group = 0; group < p.groups; group += 2) {
#pragma unroll
    for (int sub = 0; sub < 2; ++sub) {
      const int stage = next;
      next = stage + 1 == p.stages ? 0 : stage + 1;
      multiply<kTokens, kGroupScale>(
          acc, part, f[sub], ring.activation(stage, 0), ring.scale(stage, 0) + 8 * (lane & 3),
          [&] {
            f[sub ^ 1].convert(packed);
            f[sub ^ 1].pin();
            if (group + sub + 2 < p.groups) read_ahead();
          },
          [&] { ring.release(stage); });
    }
  }
  write_tile<kTokens, !kGroupScale, kEpilogue>(p, slot, acc);
}

// Sizes of tiles: for the format that most checkpoints have finest where most of prefill's tiles are, for the others as
// few as keep the build short. With twice as many the compiler stops inlining, and then serialises wgmma.
template <class F, Epilogue kEpilogue>
constexpr int next_smaller(int tokens) {
  if (F::kCodes != Codes::kInt4 || tokens <= 96) return tokens - 32;
  return tokens - (kEpilogue == Epilogue::kAny ? 16 : 8);
}

// The tile of the fewest tokens that has room for `rows`.
template <int kTokens, bool kGroupScale, Epilogue kEpilogue, class F>
W4AFP8_INLINE void prefill_tile_for(int rows, const GemmParams& p, const PrefillRing<F, kEpilogue>& ring, Cursor& ahead,
                                    const Slot& slot) {
  if constexpr (constexpr int kFewer = next_smaller<F, kEpilogue>(kTokens); kFewer > 0) {
    if (rows <= kFewer) {
      prefill_tile_for<kFewer, kGroupScale, kEpilogue, F>(rows, p, ring, ahead, slot);
      return;
    }
  }
  prefill_tile<kTokens, kGroupScale, kEpilogue, F>(p, ring, ahead, slot);
}

template <class F, bool kGroupScale, Epilogue kEpilogue>
__global__ void __launch_bounds__(384, 1) prefill_kernel(const GemmParams p, const __grid_constant__ ActivationMaps maps) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ((uint32_t)__cvta_generic_to_shared(shared) + 1023u) & ~1023u;
  const PrefillRing<F, kEpilogue> ring{base, p};
  const Schedule schedule(reinterpret_cast<int*>(shared + (base - (uint32_t)__cvta_generic_to_shared(shared)) + p.schedule), p);
  const int warp = uniform((int)threadIdx.x >> 5);
  if (threadIdx.x == 0) ring.init(kGroupScale);
  start_early(p);
  build_schedule<true, kPrefillCluster, kEpilogue == Epilogue::kAny>(schedule, p);
  cluster_sync();  // the barriers are there
  if (warp >= 8) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    produce_all<kGroupScale, true>(warp, p, schedule, ring, maps, kEvictNormal);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    Cursor ahead;
    consume_all(ring, [&](int rows, const Slot& slot) {
      prefill_tile_for<prefill_cap<F, kGroupScale, kEpilogue>(), kGroupScale, kEpilogue, F>(rows, p, ring, ahead, slot);
    });
  }
  __syncwarp();
  cluster_sync();  // nobody copies into a CTA, or arrives at its barriers, that has ended
}

}  // namespace w4afp8
