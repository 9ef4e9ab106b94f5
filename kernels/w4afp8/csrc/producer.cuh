// The producer's warpgroup: everything that a CTA reads comes through it.
#pragma once
#include "ring.cuh"

namespace w4afp8 {

// The activations [rows, k] as boxes of 128 inputs and 8, 16, 24 or 32, 64 ... 160 rows. A tile's rows, rounded up to 8,
// are one box or two: issuing copies takes the producer's time, and rows too many L2's.
struct ActivationMaps {
  static constexpr int kSmall = 3, kLarge = 5;
  CUtensorMap small[kSmall], large[kLarge];
};

// One warp of the producer: the weights of every stage of every tile of this CTA, one linear stream a tile. It does not
// wait for the previous kernel, since nobody writes weights.
template <bool kTurn, class R>
W4AFP8_INLINE void produce_weights(const GemmParams& p, const Schedule& s, const R& ring, uint64_t policy) {
  using F = typename R::Format;
  constexpr int kBytes = R::kDepth * F::kBlockBytes;
  Cursor at;
  at.phase = 1;
  for (Walk<kTurn, R::kCluster, R::kChoosesTiles> walk(s, p); walk.next(); __syncwarp()) {
    if ((threadIdx.x & 31) != 0) continue;
    const Tile& tile = walk.tile();
    const uint8_t* block = p.weight + tile.weight_tile(p) * p.groups * F::kBlockBytes;
    for (int group = 0; group < p.groups; group += R::kDepth, block += kBytes) {
      wait(ring.empty(at.stage), at.phase);
      expect(ring.full(at.stage), kBytes);
      copy_bulk(ring.weight(at.stage, 0), block, kBytes, ring.full(at.stage), policy);
      at.advance(p.stages);
    }
  }
}

// One warp beside it: the activations. A warp of its own, since what one thread issues would keep the tensor cores waiting.
template <bool kTurn, class R>
W4AFP8_INLINE void produce_activations(const GemmParams& p, const Schedule& s, const R& ring, const ActivationMaps& maps) {
  Cursor at;
  at.phase = 1;
  for (Walk<kTurn, R::kCluster, R::kChoosesTiles> walk(s, p); walk.next(); __syncwarp()) {
    if ((threadIdx.x & 31) != 0) continue;
    const Tile& tile = walk.tile();
    const int eights = (tile.rows + 7) / 8;
    // Every CTA of a cluster copies a share of the rows to all of them.
    const int before = eights * ((int)blockIdx.x % R::kCluster) / R::kCluster;
    const int own = eights * ((int)blockIdx.x % R::kCluster + 1) / R::kCluster - before;
    const int large = own / 4, small = own % 4, row = tile.first_row + before * 8;
    const CUtensorMap *first = &maps.large[large - 1], *rest = &maps.small[small - 1];
    auto copy = [&](uint32_t target, const CUtensorMap* map, uint32_t full, int column, int from) {
      if constexpr (R::kCluster == 1) {
        copy_tensor(target, map, full, column, from);
      } else {
        copy_tensor_to((1 << R::kCluster) - 1, target, map, full, column, from);
      }
    };
    for (int group = 0; group < p.groups; group += R::kDepth) {
      const uint32_t full = ring.full(at.stage);
      wait(ring.empty(at.stage), at.phase);
      expect(full, R::kDepth * eights * 1024);
#pragma unroll
      for (int d = 0; d < R::kDepth; ++d) {
        const uint32_t target = ring.activation(at.stage, d) + before * 1024;
        if (large) copy(target, first, full, (group + d) * 128, row);
        if (small) copy(target + large * 4096, rest, full, (group + d) * 128, row + large * 32);
      }
      at.advance(p.stages);
    }
  }
}

// One warp beside them, where activations have a scale per token and 128 inputs: row-major in memory, so 4 bytes each.
template <bool kTurn, class R>
W4AFP8_INLINE void produce_scales(const GemmParams& p, const Schedule& s, const R& ring) {
  constexpr int kDepth = R::kDepth;
  Cursor at;
  at.phase = 1;
  const int lane = threadIdx.x & 31;
  for (Walk<kTurn, R::kCluster, R::kChoosesTiles> walk(s, p); walk.next();) {
    const Tile& tile = walk.tile();
    for (int group = 0; group < p.groups; group += kDepth) {
      wait(ring.empty(at.stage), at.phase);
#pragma unroll 1
      for (int token = lane; token < tile.rows; token += 32)
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const bool inside = group + d < p.scale_columns;  // K is padded to an even number of groups
          const float* source = p.x_scales + (size_t)(tile.first_row + token) * p.scale_columns + (inside ? group + d : 0);
          copy_async<4>(ring.scale(at.stage, d) + token * 4, source, inside ? 4 : 0);
        }
      arrive_after_copies(ring.full(at.stage));
      at.advance(p.stages);
    }
  }
}

// One warp beside them: which tile comes next, and what its end multiplies with. It waits for no copy.
template <bool kGroupScale, bool kTurn, class R>
W4AFP8_INLINE void produce_slots(const GemmParams& p, const Schedule& s, const R& ring) {
  Cursor at;
  at.phase = 1;
  const int lane = threadIdx.x & 31;
  Walk<kTurn, R::kCluster, R::kChoosesTiles> walk(s, p);
  for (bool more = true; more; at.advance(R::kSlots)) {
    more = walk.next();
    const Tile& tile = walk.tile();
    const Slot slot = ring.slot(at.stage);
    wait(ring.slot_empty(at.stage), at.phase);
    if (more) {
      const float* channels = p.channel_scales + tile.weight_tile(p) * 128;
      copy_async<16>(slot.channel_scales() + lane * 16, channels + lane * 4);
#pragma unroll 1
      for (int token = lane; token < tile.rows; token += 32) {
        if (!kGroupScale) copy_async<4>(slot.token_scales() + token * 4, p.x_scales + tile.first_row + token);
        if (p.row_weights) copy_async<4>(slot.row_weights() + token * 4, p.row_weights + tile.first_row + token);
      }
    }
    arrive_after_copies(ring.slot_full(at.stage));
    if (lane == 0) {
      store4(slot.base, more ? tile.rows : kNoMoreTiles, tile.first_row, tile.row_tile * 128, 0);
      arrive(ring.slot_full(at.stage));
    }
    __syncwarp();
  }
}

// The producer's warpgroup: one warp for each kind of copy.
template <bool kGroupScale, bool kTurn, class R>
W4AFP8_INLINE void produce_all(int warp, const GemmParams& p, const Schedule& s, const R& ring,
                               const ActivationMaps& maps, uint64_t policy) {
  if (warp == 8) {
    produce_weights<kTurn>(p, s, ring, policy);
    return;
  }
  wait_for_previous_kernel();
  if (warp == 9) {
    produce_activations<kTurn>(p, s, ring, maps);
  } else if (warp == 10) {
    produce_slots<kGroupScale, kTurn>(p, s, ring);
  } else if (kGroupScale) {
    produce_scales<kTurn>(p, s, ring);
  }
}

// All threads. What the kernel reads first are offsets, which the previous kernel may have written, or not.
W4AFP8_INLINE void start_early(const GemmParams& p) {
  if (!p.early_start) wait_for_previous_kernel();
  let_next_kernel_start();
}

}  // namespace w4afp8
