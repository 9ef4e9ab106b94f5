// Cuts rows into the two slices of w4afp8.linear, whose products with a weight's slices are exact in float64 in any
// order. One CTA a row; the row stays in registers between its maximum and its slices. Every step is exact or one IEEE
// operation, so that the bits are torch's.
#include <cuda_fp16.h>

#include <algorithm>

#include "device.cuh"
#include "w4afp8.h"

namespace w4afp8 {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kHeld = 4;  // pairs of a row that a thread keeps in registers
constexpr int kMaxBits = 26;
constexpr uint32_t kInfinity = 0x7f800000u;

struct Params {
  const void* x;
  double* slices;
  double* units;
  int64_t rows;
  int pairs, bits;
};

// Two elements of a row: their largest magnitude as the bits of a float, which are ordered as the floats are, with Inf
// and NaN on top; and both as floats. In twos, so that a warp's stores of two doubles each are one piece of memory.
struct Bf16 {
  using Pair = uint32_t;
  static __device__ uint32_t peak(Pair v) { return max((v & 0x7fffu) << 16, v & 0x7fff0000u); }
  static __device__ float2 floats(Pair v) {
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
  }
};

struct F16 {
  using Pair = uint32_t;
  static __device__ uint32_t peak(Pair v) {
    const uint32_t most = max(v & 0x7fffu, v >> 16 & 0x7fffu);
    return __float_as_uint(__half2float(__ushort_as_half((unsigned short)most)));
  }
  static __device__ float2 floats(Pair v) {
    return make_float2(__half2float(__ushort_as_half((unsigned short)(v & 0xffffu))),
                       __half2float(__ushort_as_half((unsigned short)(v >> 16))));
  }
};

struct F32 {
  using Pair = uint2;
  static __device__ uint32_t peak(Pair v) { return max(v.x & 0x7fffffffu, v.y & 0x7fffffffu); }
  static __device__ float2 floats(Pair v) { return make_float2(__uint_as_float(v.x), __uint_as_float(v.y)); }
};

// frexp's exponent of a row's largest magnitude, by its bits; 1 for NaN and Inf, as of 1.0.
__device__ __forceinline__ int exponent_of(uint32_t peak) {
  if (peak >= kInfinity) return 1;
  if (peak == 0) return 0;
  const int biased = (int)(peak >> 23);
  return biased ? biased - 126 : 32 - __clz((int)peak) - 149;
}

__device__ __forceinline__ double power_of_two(int exponent) {
  return __longlong_as_double((long long)(exponent + 1023) << 52);
}

// One element: [high slice, low slice]. Inf - Inf is NaN, which makes the row's products NaN.
__device__ __forceinline__ double2 cut(float x, double scale, double step) {
  const double wide = __dmul_rn((double)x, scale);
  const double high = rint(wide);
  return make_double2(high, rint(__dmul_rn(__dsub_rn(wide, high), step)));
}

// Launched while the kernel before it may still run: nothing of memory may be read or written above
// griddepcontrol.wait.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) slice_kernel(const Params p) {
  using Pair = typename T::Pair;
  __shared__ uint32_t warp_peaks[kMaxThreads / 32];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x;
  const Pair* x = static_cast<const Pair*>(p.x) + row * p.pairs;
  Pair held[kHeld];
  uint32_t peak = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int index = i * blockDim.x + threadIdx.x;
    held[i] = index < p.pairs ? x[index] : Pair{};
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) peak = max(peak, T::peak(held[i]));
  for (int index = kHeld * blockDim.x + threadIdx.x; index < p.pairs; index += blockDim.x)
    peak = max(peak, T::peak(x[index]));

  peak = __reduce_max_sync(~0u, peak);
  if (lane == 0) warp_peaks[warp] = peak;
  __syncthreads();
  peak = __reduce_max_sync(~0u, lane < blockDim.x / 32 ? warp_peaks[lane] : 0u);
  const int exponent = exponent_of(peak);
  const double scale = power_of_two(p.bits - exponent), step = power_of_two(p.bits);
  if (threadIdx.x == 0) p.units[row] = power_of_two(exponent);
  double2* high = reinterpret_cast<double2*>(p.slices) + row * p.pairs;
  double2* low = high + p.rows * p.pairs;
  auto write = [&](int index, Pair pair) {
    const float2 v = T::floats(pair);
    const double2 first = cut(v.x, scale, step), second = cut(v.y, scale, step);
    high[index] = make_double2(first.x, second.x);
    low[index] = make_double2(first.y, second.y);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int index = i * blockDim.x + threadIdx.x;
    if (index < p.pairs) write(index, held[i]);
  }
  for (int index = kHeld * blockDim.x + threadIdx.x; index < p.pairs; index += blockDim.x) write(index, x[index]);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int check(const W4AFP8Slice& a) {
  if (a.x_type != W4AFP8_F32 && a.x_type != W4AFP8_BF16 && a.x_type != W4AFP8_F16) return W4AFP8_BAD_SHAPE;
  if (a.rows < 0 || a.rows >= (1ll << 31) || a.k < 2 || a.k % 2 != 0 || a.k >= (1ll << 24)) return W4AFP8_BAD_SHAPE;
  if (a.bits < 1 || a.bits > kMaxBits) return W4AFP8_BAD_SHAPE;
  if (!aligned(a.x) || !aligned(a.slices)) return W4AFP8_BAD_ALIGNMENT;
  return W4AFP8_OK;
}

int run(const W4AFP8Slice& a) {
  const int refused = check(a);
  if (refused != W4AFP8_OK) return refused;
  if (a.rows == 0) return W4AFP8_OK;
  const OnDevice on(a.device);
  if (on.error() != cudaSuccess) return on.error();
  const Params p{a.x, a.slices, a.units, a.rows, (int)(a.k / 2), a.bits};
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)a.rows);
  config.blockDim = dim3((unsigned)std::min(kMaxThreads, ((p.pairs + kHeld - 1) / kHeld + 31) / 32 * 32));
  config.stream = static_cast<cudaStream_t>(a.stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  if (a.x_type == W4AFP8_F32) return cudaLaunchKernelEx(&config, slice_kernel<F32>, p);
  if (a.x_type == W4AFP8_F16) return cudaLaunchKernelEx(&config, slice_kernel<F16>, p);
  return cudaLaunchKernelEx(&config, slice_kernel<Bf16>, p);
}

}  // namespace
}  // namespace w4afp8

int w4afp8_slice(const W4AFP8Slice* args) { return w4afp8::run(*args); }
