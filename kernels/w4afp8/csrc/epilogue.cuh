// From accumulators to memory: channel scale, token scale, routing weight, and SwiGLU where the weight is gate and up.
#pragma once
#include "schedule.cuh"

namespace w4afp8 {

// Within 2^-21 of exact; where 1 + exp(-x) passes 2^126 the quotient is 0, which silu has long become.
W4AFP8_INLINE float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

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

// threadIdx.x, read where it is asked for: what is worked out from it is not kept in registers that the mainloop needs.
W4AFP8_INLINE int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The accumulators of `kEights` x 8 tokens, the `chunk`th such of a tile, in registers that code for every chunk can name.
template <int kTokens, int kEights>
W4AFP8_INLINE void pick(float* v, const float* acc, int chunk) {
#pragma unroll
  for (int c = 0; c * kEights < kTokens / 8; ++c) {
    if (c == chunk) {
#pragma unroll
      for (int i = 0; i < 4 * kEights; ++i) v[i] = 4 * kEights * c + i < kTokens / 2 ? acc[4 * kEights * c + i] : 0.f;
      if (kTokens / 8 > kEights) asm volatile("");  // a branch: all chunks' moves under predicates would take longer
    }
  }
}

// kEights x 8 tokens of a tile, from the one at `first`, times what multiplies whole rows and columns.
// v[4j], [4j+1]: channel lane/4 of tokens first + 8j + 2*(lane%4), +1; v[4j+2], [4j+3]: channel + 8.
// rows: of the tile. first_row, channel: in y, of the tile's first token and this warp's first channel.
template <int kEights>
W4AFP8_INLINE void write_eights(const GemmParams& p, Epilogue epilogue, const float* v, int lane, int first, int rows,
                                int first_row, int channel) {
  if (epilogue == Epilogue::kBf16) {
#pragma unroll
    for (int j = 0; j < kEights; ++j) {
      const int row = first + 8 * j + (lane >> 2), offset = (lane & 2) * 2 + (lane & 1) * 8;
      __nv_bfloat16* out = static_cast<__nv_bfloat16*>(p.y) + (size_t)(first_row + row) * p.n + channel;
      store_bf16(out, row < rows && channel + offset < p.n, lane, v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3]);
    }
    return;
  }
  const int token = first + 2 * (lane & 3);
  if (epilogue == Epilogue::kSwiglu) {
    // Rows of the weight are 8 gate, 8 up, in turn, so a lane has both of its channel.
    const int half = p.n / 2, column = channel / 2 + (lane >> 2);
    float* out = static_cast<float*>(p.y) + (size_t)(first_row + token) * half + column;
#pragma unroll
    for (int j = 0; j < kEights; ++j, out += 8 * (size_t)half) {
      if (column < half && token + 8 * j < rows) out[0] = silu(v[4 * j]) * v[4 * j + 2];
      if (column < half && token + 8 * j + 1 < rows) out[half] = silu(v[4 * j + 1]) * v[4 * j + 3];
    }
    return;
  }
  float* out = static_cast<float*>(p.y) + (size_t)(first_row + token) * p.n + channel + (lane >> 2);
  const bool low = channel + (lane >> 2) < p.n, high = channel + (lane >> 2) + 8 < p.n;
#pragma unroll
  for (int j = 0; j < kEights; ++j, out += 8 * (size_t)p.n) {
    if (token + 8 * j < rows) {
      if (low) out[0] = v[4 * j];
      if (high) out[8] = v[4 * j + 2];
    }
    if (token + 8 * j + 1 < rows) {
      if (low) out[p.n] = v[4 * j + 1];
      if (high) out[p.n + 8] = v[4 * j + 3];
    }
  }
}

// v *= what multiplies whole rows and columns, for the 8 tokens of a tile from the one at `first`.
// channel_low, channel_high: scales of channels lane/4 and lane/4 + 8.
template <bool kTokenScale, bool kWeighted>
W4AFP8_INLINE void scale_eight(const GemmParams& p, const Slot& slot, float* v, int lane, int first, float channel_low,
                               float channel_high) {
  const int token = first + 2 * (lane & 3);
  float2 t = kTokenScale ? load_float2(slot.token_scales() + token * 4) : make_float2(1.f, 1.f);
  if (kWeighted && p.row_weights) {
    const float2 weight = load_float2(slot.row_weights() + token * 4);
    t.x *= weight.x;
    t.y *= weight.y;
  }
  v[0] = v[0] * channel_low * t.x;
  v[1] = v[1] * channel_low * t.y;
  v[2] = v[2] * channel_high * t.x;
  v[3] = v[3] * channel_high * t.y;
}

// One warpgroup's 64 channels x kTokens tokens of a tile; for kAny 32 tokens at a time.
// acc[4j], [4j+1]: channel lane/4 of tokens 8j + 2*(lane%4), +1; acc[4j+2], [4j+3]: channel + 8.
template <int kTokens, bool kTokenScale, Epilogue kEpilogue>
W4AFP8_INLINE void write_tile(const GemmParams& p, const Slot& slot, const float* acc) {
  constexpr bool kAny = kEpilogue == Epilogue::kAny;
  const int thread = kAny ? thread_again() : (int)threadIdx.x;
  const int lane = thread & 31, local = (thread >> 5) * 16;  // 8 warps, 16 channels each
  uint32_t tile[4];
  load4(tile, slot.base);
  const int rows = (int)tile[0], first_row = (int)tile[1], channel = (int)tile[2] + local;
  const uint32_t own = slot.channel_scales() + (local + (lane >> 2)) * 4;
  const float c0 = __uint_as_float(load1(own)), c1 = __uint_as_float(load1(own + 32));
  if constexpr (!kAny) {
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
  } else {
    constexpr int kEights = 4;
#pragma unroll 1
    for (int chunk = 0; chunk * kEights * 8 < min(rows, kTokens); ++chunk) {
      const int first = chunk * kEights * 8;
      float v[4 * kEights];
      pick<kTokens, kEights>(v, acc, chunk);
#pragma unroll
      for (int j = 0; j < kEights; ++j)  // the last chunk may end beyond the tile
        scale_eight<kTokenScale, true>(p, slot, v + 4 * j, lane, min(first + 8 * j, p.token_cap - 8), c0, c1);
      write_eights<kEights>(p, p.epilogue, v, lane, first, rows, first_row, channel);
    }
  }
}

}  // namespace w4afp8
