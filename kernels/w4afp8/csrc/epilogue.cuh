// From accumulators to memory: channel scale, token scale, routing weight, and SwiGLU where the weight is gate and up.
#pragma once
#include "schedule.cuh"

namespace w4afp8 {

// Within 2^-21 of exact; where 1 + exp(-x) passes 2^126 the quotient is 0, which silu has long become.
W4AFP8_INLINE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

enum class Epilogue { kBf16, kF32, kSwiglu };

// What a tile's end needs, in shared memory, brought while earlier tiles are computed:
// rows, first row and first channel of the tile (4 words) | 128 channel scales | token scales | routing weights.
struct Slot {
  uint32_t base;
  int token_cap;

  static __host__ __device__ constexpr int bytes(int token_cap) { return 16 + 512 + 2 * token_cap * 4; }
  W4AFP8_INLINE uint32_t channel_scales() const { return base + 16; }
  W4AFP8_INLINE uint32_t token_scales() const { return base + 16 + 512; }
  W4AFP8_INLINE uint32_t row_weights() const { return token_scales() + token_cap * 4; }
};

constexpr int kNoMoreTiles = -1;  // in place of a tile's rows

// One warpgroup's 64 channels x kTokens tokens of a tile.
// acc[4j], [4j+1]: channel lane/4 of tokens 8j + 2*(lane%4), +1; acc[4j+2], [4j+3]: channel + 8.
template <int kTokens, Epilogue kEpilogue, bool kTokenScale>
W4AFP8_INLINE void write_tile(const GemmParams& p, const Slot& slot, const float* acc) {
  const int lane = threadIdx.x & 31, local = (threadIdx.x >> 5) * 16;  // 8 warps, 16 channels each
  uint32_t tile[4];
  load4(tile, slot.base);
  const int rows = (int)tile[0], first_row = (int)tile[1], channel = (int)tile[2] + local;
  const uint32_t own = slot.channel_scales() + (local + (lane >> 2)) * 4;
  const float c0 = __uint_as_float(load1(own)), c1 = __uint_as_float(load1(own + 32));
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
    const int token = 8 * j + 2 * (lane & 3);
    float2 t = kTokenScale ? load_float2(slot.token_scales() + token * 4) : make_float2(1.f, 1.f);
    if (kEpilogue != Epilogue::kSwiglu && p.row_weights) {
      const float2 weight = load_float2(slot.row_weights() + token * 4);
      t.x *= weight.x;
      t.y *= weight.y;
    }
    const float v0 = acc[4 * j] * c0 * t.x, v1 = acc[4 * j + 1] * c0 * t.y;
    const float v2 = acc[4 * j + 2] * c1 * t.x, v3 = acc[4 * j + 3] * c1 * t.y;
    if constexpr (kEpilogue == Epilogue::kBf16) {
      const int row = 8 * j + (lane >> 2), offset = (lane & 2) * 2 + (lane & 1) * 8;
      __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.y) + (size_t)(first_row + row) * p.n + channel;
      store_bf16(out, row < rows && channel + offset < p.n, lane, v0, v1, v2, v3);
    } else if constexpr (kEpilogue == Epilogue::kF32) {
      float* out = static_cast<float*>(p.y) + (size_t)(first_row + token) * p.n + channel + (lane >> 2);
      const bool low = channel + (lane >> 2) < p.n, high = channel + (lane >> 2) + 8 < p.n;
      if (token < rows) {
        if (low) out[0] = v0;
        if (high) out[8] = v2;
      }
      if (token + 1 < rows) {
        if (low) out[p.n] = v1;
        if (high) out[p.n + 8] = v3;
      }
    } else {
      // Rows of the weight are 8 gate, 8 up, in turn, so a lane has both of its channel.
      const int half = p.n / 2, column = channel / 2 + (lane >> 2);
      float* out = static_cast<float*>(p.y) + (size_t)(first_row + token) * half + column;
      if (column < half) {
        if (token < rows) out[0] = silu(v0) * v2;
        if (token + 1 < rows) out[half] = silu(v1) * v3;
      }
    }
  }
}

}  // namespace w4afp8
