// The parts both kernels share: copies to shared memory, weights to registers, wgmma, promotion to float32.
#pragma once
#include "epilogue.cuh"

namespace w4afp8 {

enum class Codes { kInt4, kInt4Full, kFp8 };

// How a block of weights, 128 rows x 128 inputs, lies in memory: codes, then kScales rows of 128 scales of 16 bits, each
// for 128 / kScales inputs (w4afp8.packed and packed_fp8 say where in them).
template <Codes kCodes_, int kScales_>
struct Format {
  static constexpr Codes kCodes = kCodes_;
  static constexpr int kScales = kScales_;
  static constexpr int kCodeBytes = kCodes == Codes::kFp8 ? 16384 : 8192;
  static constexpr int kBlockBytes = kCodeBytes + 256 * kScales;
  // Tokens of a tile at most: as many as registers hold without spilling.
  static constexpr int decode_cap(bool group_scale) {
    return kScales == 4 ? 32 : kCodes == Codes::kInt4Full || group_scale ? 40 : 48;
  }
  static constexpr int prefill_cap(bool group_scale) {
    if (kScales == 4) return 128;
    if (kCodes == Codes::kFp8) return group_scale ? 128 : 160;
    return kCodes == Codes::kInt4Full || group_scale ? 160 : 176;
  }
};

// A thread's part of a warpgroup's half of a block, 64 rows x 128 inputs, as it lies in shared memory.
template <class F>
struct Packed {
  uint32_t codes[F::kCodes == Codes::kFp8 ? 16 : 8];
  uint32_t scales[F::kScales];  // of this lane's two rows, the first one's in the lower half

  // block: shared memory.
  W4AFP8_INLINE void load(uint32_t block) {
    const uint32_t first = block + (threadIdx.x >> 7) * (F::kCodeBytes / 2) + (threadIdx.x & 127) * 16;
    const uint32_t pair = block + F::kCodeBytes + (threadIdx.x >> 2) * 4;  // 8 warps, 8 pairs of rows each
#pragma unroll
    for (int i = 0; i < F::kCodeBytes / 4096; ++i) load4(codes + 4 * i, first + i * 2048);
#pragma unroll
    for (int i = 0; i < F::kScales; ++i) scales[i] = load1(pair + i * 256);
  }
};

// The same as wgmma's register operand.
template <class F>
struct Fragment {
  uint32_t a[4][4];
  uint32_t scales[F::kScales];

  W4AFP8_INLINE void convert(const Packed<F>& packed) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if constexpr (F::kCodes == Codes::kFp8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[step][i] = packed.codes[4 * step + i];
      } else {
        w4afp8::convert<F::kCodes == Codes::kInt4Full>(packed.codes[2 * step], a[step][0], a[step][1]);
        w4afp8::convert<F::kCodes == Codes::kInt4Full>(packed.codes[2 * step + 1], a[step][2], a[step][3]);
      }
    }
#pragma unroll
    for (int i = 0; i < F::kScales; ++i) scales[i] = packed.scales[i];
  }

  W4AFP8_INLINE void load(uint32_t block) {
    Packed<F> packed;
    packed.load(block);
    convert(packed);
  }

  // Keeps the compiler from moving the conversion past the next wait: it shall run under the wgmma in flight.
  W4AFP8_INLINE void pin() {
#pragma unroll
    for (int step = 0; step < 4; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[step][i]));
  }
};

// part = weights x activations over the inputs of scale row `index`: one or four wgmma of 32 inputs.
template <int kTokens, class F>
W4AFP8_INLINE void issue(float* part, Fragment<F>& f, uint32_t activations, int index = 0) {
  constexpr int kSteps = 4 / F::kScales;
  const uint64_t descriptor = operand(activations);
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) cute::warpgroup_fence_operand(part[i]);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) cute::warpgroup_fence_operand(f.a[index * kSteps + step][i]);
  cute::warpgroup_arrive();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = index * kSteps + step;
    Mma<kTokens>::run(part, f.a[at], descriptor + at * 2, step != 0);
  }
  cute::warpgroup_commit_batch();
}

// A scale of 4 bits of exponent and 12 of mantissa, without a sign, as a float: 2^(exponent - 6) * (1 + mantissa / 4096).
W4AFP8_INLINE float widen(uint32_t scale) { return __uint_as_float((scale << 11) + ((127 - 6) << 23)); }

// acc += part * scale. The tensor core keeps 13 bits below the largest term, so 128 inputs at most before this.
// token_scales: shared memory, this lane's pair of the first 8 tokens (group scales of the activations only).
template <int kTokens, bool kGroupScale>
W4AFP8_INLINE void promote(float* acc, float* part, uint32_t scales, uint32_t token_scales) {
  const float2 scale = make_float2(widen(scales & 0xffffu), widen(scales >> 16));
#pragma unroll
  for (int i = 0; i < kTokens / 2; ++i) cute::warpgroup_fence_operand(part[i]);
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    float2 f = kGroupScale ? load_float2(token_scales + j * 32) : make_float2(1.f, 1.f);
    acc[4 * j] = fmaf(part[4 * j], kGroupScale ? scale.x * f.x : scale.x, acc[4 * j]);
    acc[4 * j + 1] = fmaf(part[4 * j + 1], kGroupScale ? scale.x * f.y : scale.x, acc[4 * j + 1]);
    acc[4 * j + 2] = fmaf(part[4 * j + 2], kGroupScale ? scale.y * f.x : scale.y, acc[4 * j + 2]);
    acc[4 * j + 3] = fmaf(part[4 * j + 3], kGroupScale ? scale.y * f.y : scale.y, acc[4 * j + 3]);
  }
}

// acc += weights x activations over the 128 inputs of a block.
// meanwhile: done under the first wgmma in flight. read: called once the block's weights and activations are read;
// token scales are read with the promotion.
template <int kTokens, bool kGroupScale, class F, class Meanwhile, class Read>
W4AFP8_INLINE void multiply(float* acc, float* part, Fragment<F>& f, uint32_t activations, uint32_t token_scales,
                            Meanwhile meanwhile, Read read) {
#pragma unroll
  for (int index = 0; index < F::kScales; ++index) {
    issue<kTokens>(part, f, activations, index);
    if (index == 0) meanwhile();
    cute::warpgroup_wait<0>();
    if (!kGroupScale && index == F::kScales - 1) read();
    promote<kTokens, kGroupScale>(acc, part, f.scales[index], token_scales);
    if (kGroupScale && index == F::kScales - 1) read();
  }
}

// The ring of stages in shared memory. A stage has kDepth groups of 128 inputs:
// kDepth tiles of activations | kDepth weight blocks | kDepth rows of token scales.
// Then the slots of the tiles' ends; the barriers. Offsets are kernel parameters, which cost no registers.
template <int kDepth_, class F>
struct Ring {
  static constexpr int kDepth = kDepth_;
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

  // Full: the threads that bring weights and activations, and 32 lanes where token scales come too. 8 warps consume.
  W4AFP8_INLINE void init(bool token_scales) const {
    const int full_arrivals = token_scales ? 34 : 2;
    for (int i = 0; i < p.stages; ++i) {
      init_barrier(full(i), full_arrivals);
      init_barrier(empty(i), 8);
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
    if ((threadIdx.x & 31) == 0) arrive(empty(stage));
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
  for (Walk<kTurn> walk(s, p); walk.next(); __syncwarp()) {
    if ((threadIdx.x & 31) != 0) continue;
    const Tile& tile = walk.tile();
    const uint8_t* block = p.weight + ((size_t)tile.expert * p.row_tiles + tile.row_tile) * p.groups * F::kBlockBytes;
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
  for (Walk<kTurn> walk(s, p); walk.next(); __syncwarp()) {
    if ((threadIdx.x & 31) != 0) continue;
    const Tile& tile = walk.tile();
    const int eights = (tile.rows + 7) / 8, large = eights / 4, small = eights % 4;
    const CUtensorMap *first = &maps.large[large - 1], *rest = &maps.small[small - 1];
    for (int group = 0; group < p.groups; group += R::kDepth) {
      const uint32_t full = ring.full(at.stage);
      wait(ring.empty(at.stage), at.phase);
      expect(full, R::kDepth * eights * 1024);
#pragma unroll
      for (int d = 0; d < R::kDepth; ++d) {
        const uint32_t target = ring.activation(at.stage, d);
        if (large) copy_tensor(target, first, full, (group + d) * 128, tile.first_row);
        if (small) copy_tensor(target + large * 4096, rest, full, (group + d) * 128, tile.first_row + large * 32);
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
  for (Walk<kTurn> walk(s, p); walk.next();) {
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
  Walk<kTurn> walk(s, p);
  for (bool more = true; more; at.advance(R::kSlots)) {
    more = walk.next();
    const Tile& tile = walk.tile();
    const Slot slot = ring.slot(at.stage);
    wait(ring.slot_empty(at.stage), at.phase);
    if (more) {
      const float* channels = p.channel_scales + ((size_t)tile.expert * p.row_tiles + tile.row_tile) * 128;
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
