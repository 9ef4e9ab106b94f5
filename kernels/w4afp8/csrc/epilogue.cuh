// From accumulators to memory: channel scale, token scale, routing weight, and SwiGLU where the weight is gate and up.
#pragma once
#include "schedule.cuh"

namespace w4afp8 {

// Within 2^-21 of exact; where 1 + exp(-x) passes 2^126 the quotient is 0, which silu has long become.
W4AFP8_INLINE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

enum class Epilogue { kBf16, kF32, kSwiglu };

// One warpgroup's 64 channels x kTokens tokens of a tile.
// acc[4j], [4j+1]: channel lane/4 of tokens 8j + 2*(lane%4), +1; acc[4j+2], [4j+3]: channel + 8.
// channel: first of the 64. channel_factors, token_factors: shared memory, of the 64 channels and the tile's tokens.
template <int kTokens, Epilogue kEpilogue>
W4AFP8_INLINE void write_tile(const GemmParams& p, const Tile& tile, int channel, const float* acc,
                              uint32_t channel_factors, uint32_t token_factors) {
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) & 3, warp_channel = channel + warp * 16;
  const uint32_t own = channel_factors + (warp * 16 + (lane >> 2)) * 4;
  const float c0 = __uint_as_float(load1(own)), c1 = __uint_as_float(load1(own + 32));
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int token = 8 * j + 2 * (lane & 3);
    const float2 t = load_float2(token_factors + token * 4);
    const float t0 = t.x, t1 = t.y;
    const float v0 = acc[4 * j] * c0 * t0, v1 = acc[4 * j + 1] * c0 * t1;
    const float v2 = acc[4 * j + 2] * c1 * t0, v3 = acc[4 * j + 3] * c1 * t1;
    if constexpr (kEpilogue == Epilogue::kBf16) {
      const int own = 8 * j + (lane >> 2), offset = (lane & 2) * 2 + (lane & 1) * 8;
      __nv_bfloat16* row = static_cast<__nv_bfloat16*>(p.y) + (size_t)(tile.first_row + own) * p.n + warp_channel;
      store_bf16(row, own < tile.rows && warp_channel + offset < p.n, lane, v0, v1, v2, v3);
    } else if constexpr (kEpilogue == Epilogue::kF32) {
      float* row = static_cast<float*>(p.y) + (size_t)(tile.first_row + token) * p.n + warp_channel + (lane >> 2);
      const bool low = warp_channel + (lane >> 2) < p.n, high = warp_channel + (lane >> 2) + 8 < p.n;
      if (token < tile.rows) {
        if (low) row[0] = v0;
        if (high) row[8] = v2;
      }
      if (token + 1 < tile.rows) {
        if (low) row[p.n] = v1;
        if (high) row[p.n + 8] = v3;
      }
    } else {
      // Rows of the weight are 8 gate, 8 up, in turn, so a lane has both of its channel.
      const int half = p.n / 2, out = warp_channel / 2 + (lane >> 2);
      float* row = static_cast<float*>(p.y) + (size_t)(tile.first_row + token) * half + out;
      if (out < half) {
        if (token < tile.rows) row[0] = silu(v0) * v2;
        if (token + 1 < tile.rows) row[half] = silu(v1) * v3;
      }
    }
  }
}

}  // namespace w4afp8
