// Shared memory between producers and consumers: stages of a main loop, slots of tiles' ends.
#pragma once
#include "epilogue.cuh"
#include "formats.cuh"

namespace w4afp8 {

// The ring of stages in shared memory. A stage has kDepth groups of 128 inputs:
// kDepth tiles of activations | kDepth weight blocks | kDepth rows of token scales.
// Then the slots of the tiles' ends; the barriers. Offsets are kernel parameters, which cost no registers.
// kChoosesTiles: the schedule chooses the tokens of a tile by the load.
template <int kDepth_, int kCluster_, class F, bool kChoosesTiles_ = false>
struct Ring {
  static constexpr int kDepth = kDepth_;
  static constexpr int kCluster = kCluster_;  // CTAs that share their tokens
  static constexpr bool kChoosesTiles = kChoosesTiles_;
  static constexpr int kSlots = 4;
  using Format = F;
  uint32_t base;
  const GemmParams& p;

  static void lay_out(GemmParams& p) {
    p.ring_weights = p.stages * kDepth * p.token_cap * 128;
    p.ring_scales = p.ring_weights + p.stages * kDepth * F::kBlockBytes;
    p.ring_slots = p.ring_scales + p.stages * kDepth * p.token_cap * 4;
    p.ring_full = p.ring_slots + kSlots * Slot::bytes(p.token_cap);
    p.ring_empty = p.ring_full + p.stages * 8;
    p.ring_slot_full = p.ring_empty + p.stages * 8;
    p.ring_slot_empty = p.ring_slot_full + kSlots * 8;
    p.schedule = p.ring_slot_empty + kSlots * 8;
  }
  static int stage_bytes(int cap) { return kDepth * (cap * 132 + F::kBlockBytes) + 16; }
  static int fixed_bytes(int cap, int experts) {
    return kSlots * (Slot::bytes(cap) + 16) + Schedule::bytes(experts);
  }

  W4AFP8_INLINE uint32_t activation(int stage, int group) const {
    return base + (stage * kDepth + group) * p.token_cap * 128;
  }
  W4AFP8_INLINE uint32_t weight(int stage, int group) const {
    return base + p.ring_weights + (stage * kDepth + group) * F::kBlockBytes;
  }
  W4AFP8_INLINE uint32_t scale(int stage, int group) const {
    return base + p.ring_scales + (stage * kDepth + group) * p.token_cap * 4;
  }
  W4AFP8_INLINE Slot slot(int index) const {
    return {base + p.ring_slots + index * Slot::bytes(p.token_cap), p.token_cap};
  }
  W4AFP8_INLINE uint32_t slot_full(int index) const { return base + p.ring_slot_full + index * 8; }
  W4AFP8_INLINE uint32_t slot_empty(int index) const { return base + p.ring_slot_empty + index * 8; }
  W4AFP8_INLINE uint32_t full(int stage) const { return base + p.ring_full + stage * 8; }
  W4AFP8_INLINE uint32_t empty(int stage) const { return base + p.ring_empty + stage * 8; }

  // Full: the threads that bring weights and activations, and 32 lanes where token scales come too. 8 warps of each CTA
  // consume, since what one CTA copies lands in all of them.
  W4AFP8_INLINE void init(bool token_scales) const {
    const int full_arrivals = token_scales ? 34 : 2;
    for (int i = 0; i < p.stages; ++i) {
      init_barrier(full(i), full_arrivals);
      init_barrier(empty(i), 8 * kCluster);
    }
    for (int i = 0; i < kSlots; ++i) {
      init_barrier(slot_full(i), 33);  // 32 lanes' copies, and the thread that writes the tile
      init_barrier(slot_empty(i), 8);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
  }

  // A consumer warp has read what it needs of a stage.
  W4AFP8_INLINE void release(int stage) const {
    const int lane = threadIdx.x & 31;
    if constexpr (kCluster == 1) {
      if (lane == 0) arrive(empty(stage));
    } else {
      if (lane < kCluster) arrive_at(lane, empty(stage));
    }
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

// The consumers' loop. compute(rows, slot): one tile, of which `rows` (uniform) tokens count.
template <class R, class Compute>
W4AFP8_INLINE void consume_all(const R& ring, Compute compute) {
  for (Cursor at;; at.advance(R::kSlots)) {  // a slot is full only after the previous kernel's end
    wait(ring.slot_full(at.stage), at.phase);
    const int rows = uniform((int)load1(ring.slot(at.stage).base));
    if (rows == kNoMoreTiles) return;
    compute(rows, ring.slot(at.stage));
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive(ring.slot_empty(at.stage));
  }
}

}  // namespace w4afp8
