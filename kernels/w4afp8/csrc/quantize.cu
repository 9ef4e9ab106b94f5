// Quantizes tokens to e4m3 with the bits of w4afp8.quantize_tokens: scale = max(amax, tiny) / 448, value = x / scale,
// both IEEE divisions, then round to nearest even and saturate. One CTA a row; the row stays in registers between its
// maximum and its values, so that memory is read once. Must not be compiled with -ftz=true or -prec-div=false.
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <float.h>

#include <algorithm>

#include "w4afp8.h"

namespace w4afp8 {
namespace {

constexpr float kFp8Max = 448.f;
constexpr int kGroup = 128;
constexpr int kMaxThreads = 1024;
constexpr int kHeld = 4;  // 16-byte vectors of a row that a thread keeps in registers
constexpr uint32_t kInfinity = 0x7f800000u;

struct Params {
  const uint4* x;
  const int64_t* num_rows;
  uint8_t* values;
  float* scales;
  uint8_t* non_finite;
  int64_t rows;
  int vectors;  // of 16 bytes, in a row
};

// Bits of non-negative floats are ordered as the floats are, with Inf and NaN on top; so one integer maximum finds amax
// and what is not finite. Two 16-bit floats share a register and a maximum.
struct Bf16 {
  static constexpr int kElements = 8;
  static __device__ uint32_t peak(uint4 v) {
    constexpr uint32_t kMagnitude = 0x7fff7fffu;
    uint32_t m = __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude), __vmaxu2(v.z & kMagnitude, v.w & kMagnitude));
    return max(m << 16, m & 0xffff0000u);
  }
  static __device__ float2 pair(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
};

struct F16 {
  static constexpr int kElements = 8;
  static __device__ uint32_t peak(uint4 v) {
    constexpr uint32_t kMagnitude = 0x7fff7fffu;
    uint32_t m = __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude), __vmaxu2(v.z & kMagnitude, v.w & kMagnitude));
    return __float_as_uint(__half2float(__ushort_as_half((unsigned short)max(m & 0xffffu, m >> 16))));
  }
  static __device__ float2 pair(uint32_t word) { return __half22float2(*reinterpret_cast<const __half2*>(&word)); }
};

struct F32 {
  static constexpr int kElements = 4;
  static __device__ uint32_t peak(uint4 v) {
    constexpr uint32_t kMagnitude = 0x7fffffffu;
    return max(max(v.x & kMagnitude, v.y & kMagnitude), max(v.z & kMagnitude, v.w & kMagnitude));
  }
};

struct Scale {
  float scale, inverse;
  bool ordinary;  // the quotients that do not round to zero, and their remainders, are normal floats
};

__device__ __forceinline__ Scale make_scale(uint32_t peak) {
  const float scale = __fdiv_rn(fmaxf(__uint_as_float(peak), FLT_MIN), kFp8Max);
  return {scale, __frcp_rn(scale), scale >= 0x1p-80f && scale <= 0x1p80f};
}

// x / scale, rounded once. With the correctly rounded inverse, a second correction by the exact remainder gives the
// correctly rounded quotient (Markstein, IBM J. Res. Dev. 34, 1990): five operations instead of a whole division.
__device__ __forceinline__ float divide(float x, const Scale& s) {
  if (!s.ordinary || x == 0.f) return __fdiv_rn(x, s.scale);  // the corrections would turn -0 into +0
  float q = __fmul_rn(x, s.inverse);
  q = __fmaf_rn(__fmaf_rn(-s.scale, q, x), s.inverse, q);
  return __fmaf_rn(__fmaf_rn(-s.scale, q, x), s.inverse, q);
}

__device__ __forceinline__ uint32_t convert(float2 x, const Scale& s) {
  return __nv_cvt_float2_to_fp8x2(make_float2(divide(x.x, s), divide(x.y, s)), __NV_SATFINITE, __NV_E4M3);
}

template <class T>
__device__ __forceinline__ void write(uint8_t* out, uint4 v, const Scale& s, bool finite) {
  if constexpr (T::kElements == 4) {
    const float2 low = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
    const float2 high = make_float2(__uint_as_float(v.z), __uint_as_float(v.w));
    *reinterpret_cast<uint32_t*>(out) = finite ? convert(low, s) | convert(high, s) << 16 : 0u;
  } else {
    const uint32_t low = convert(T::pair(v.x), s) | convert(T::pair(v.y), s) << 16;
    const uint32_t high = convert(T::pair(v.z), s) | convert(T::pair(v.w), s) << 16;
    *reinterpret_cast<uint2*>(out) = finite ? make_uint2(low, high) : make_uint2(0u, 0u);
  }
}

// One vector of a row. Where 128 elements share a scale, they are the vectors of 16 or 32 lanes, all of them here.
template <class T, bool kTokenGroup>
__device__ __forceinline__ void finish(const Params& p, int64_t row, int index, uint4 v, Scale s, bool finite) {
  if constexpr (kTokenGroup) {
    constexpr int kLanes = kGroup / T::kElements;
    uint32_t peak = T::peak(v);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step >>= 1) peak = max(peak, __shfl_xor_sync(~0u, peak, step));
    s = make_scale(peak);
    if (index < p.vectors && index % kLanes == 0)
      p.scales[row * (p.vectors / kLanes) + index / kLanes] = finite ? s.scale : 0.f;
  }
  if (index < p.vectors) write<T>(p.values + (row * p.vectors + index) * T::kElements, v, s, finite);
}

template <class T, bool kTokenGroup>
__global__ void __launch_bounds__(kMaxThreads) quantize_kernel(const Params p) {
  // Two in turn: a warp may write the next row's while another still reads this row's.
  __shared__ uint32_t warp_peaks[2][kMaxThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t rows = p.num_rows ? min(*p.num_rows, p.rows) : p.rows;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    const uint4* x = p.x + row * p.vectors;
    auto load = [&](int index) { return index < p.vectors ? __ldg(x + index) : make_uint4(0, 0, 0, 0); };
    uint4 held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = load(i * blockDim.x + threadIdx.x);
    uint32_t peak = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) peak = max(peak, T::peak(held[i]));
    for (int base = kHeld * blockDim.x; base < p.vectors; base += blockDim.x)
      peak = max(peak, T::peak(load(base + threadIdx.x)));

    peak = __reduce_max_sync(~0u, peak);
    if (lane == 0) warp_peaks[turn][warp] = peak;
    __syncthreads();
    peak = __reduce_max_sync(~0u, lane < blockDim.x / 32 ? warp_peaks[turn][lane] : 0u);
    const bool finite = peak < kInfinity;
    const Scale scale = make_scale(peak);
    if (threadIdx.x == 0) {
      if (p.non_finite) p.non_finite[row] = !finite;
      if (!kTokenGroup) p.scales[row] = finite ? scale.scale : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      finish<T, kTokenGroup>(p, row, i * blockDim.x + threadIdx.x, held[i], scale, finite);
    for (int base = kHeld * blockDim.x; base < p.vectors; base += blockDim.x)  // what no register held is read again
      finish<T, kTokenGroup>(p, row, base + threadIdx.x, load(base + threadIdx.x), scale, finite);
  }
}

using Kernel = void (*)(Params);

template <class T>
Kernel pick(bool token_group) {
  return token_group ? quantize_kernel<T, true> : quantize_kernel<T, false>;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int run(const W4AFP8Quantize& a) {
  const bool wide = a.x_type == W4AFP8_F32;
  if (!wide && a.x_type != W4AFP8_BF16 && a.x_type != W4AFP8_F16) return W4AFP8_BAD_SHAPE;
  if (a.rows < 0 || a.k < 8 || a.k >= (1ll << 24) || a.k % (a.token_group ? kGroup : 8) != 0) return W4AFP8_BAD_SHAPE;
  if (!aligned(a.x) || !aligned(a.values)) return W4AFP8_BAD_ALIGNMENT;
  if (a.rows == 0) return W4AFP8_OK;
  int sms = 0, major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, a.device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, a.device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, a.device);
  if (error != cudaSuccess) return error;
  if (major != 9 || minor != 0) return W4AFP8_BAD_ARCH;

  Params p{static_cast<const uint4*>(a.x), a.num_rows, static_cast<uint8_t*>(a.values), a.scales,
           a.non_finite,                   a.rows,     (int)(a.k / (wide ? 4 : 8))};
  const int threads = std::min(kMaxThreads, ((p.vectors + kHeld - 1) / kHeld + 31) / 32 * 32);
  // About as many CTAs as the device holds at once: num_rows may be far below the rows there is room for.
  const int64_t resident = (int64_t)sms * std::min(32, 2048 / threads);
  const bool group = a.token_group != 0;
  const Kernel kernel = wide ? pick<F32>(group) : a.x_type == W4AFP8_F16 ? pick<F16>(group) : pick<Bf16>(group);
  void* arguments[] = {&p};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3((unsigned)std::min(a.rows, resident)),
                          dim3(threads), arguments, 0, static_cast<cudaStream_t>(a.stream));
}

}  // namespace
}  // namespace w4afp8

int w4afp8_quantize(const W4AFP8Quantize* args) { return w4afp8::run(*args); }
