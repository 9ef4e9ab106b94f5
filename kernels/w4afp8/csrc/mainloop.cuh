// What the consumers do with a block: wgmma, and promotion to float32.
#pragma once
#include "formats.cuh"

namespace w4afp8 {

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

}  // namespace w4afp8
