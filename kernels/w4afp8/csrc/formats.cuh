// How weights lie in a block, and how they become wgmma's register operand.
#pragma once
#include "primitives.cuh"

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

}  // namespace w4afp8
