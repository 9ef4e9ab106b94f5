// Quantizes tokens to e4m3 with the bits of w4afp8.quantize_tokens: scale = max(amax, tiny) / 448, value = x / scale,
// both IEEE divisions, then round to nearest even and saturate; where a row is gate and up, x is SiLU(gate) * up. One
// CTA a row; the row stays in registers between its maximum and its values, so that memory is read once. Must not be
// compiled with -ftz=true or -prec-div=false.
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <float.h>

#include <algorithm>
#include <limits>

#include "device.cuh"
#include "w4afp8.h"

namespace w4afp8 {
namespace {

constexpr float kFp8Max = 448.f;
constexpr int kGroup = 128;
constexpr int kMaxThreads = 1024;
constexpr int kHeld = 4;  // 16-byte vectors of a row that a thread keeps in registers
constexpr uint32_t kInfinity = 0x7f800000u;

struct Params {
  const void* x;
  const int64_t* num_rows;
  uint8_t* values;
  float* scales;
  uint8_t* non_finite;
  int64_t rows;
  int vectors;       // of 16 bytes, in a row as it is quantized
  int up, pairs;     // gate and up, in fours of elements: gate i lies at i + (i & pairs), its up lies up further
  float lost_scale;  // of a row with NaN or Inf
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

// Where a row comes from. `load` only loads, so that a thread's loads are all under way before `make` waits for one; it
// loads plainly, since __ldg promises that nobody writes and may be moved above griddepcontrol.wait.
template <class T>
struct AsIs {
  using Type = T;
  using Loaded = uint4;
  static __device__ Loaded load(const Params& p, int64_t row, int index) {
    if (index >= p.vectors) return make_uint4(0, 0, 0, 0);
    return static_cast<const uint4*>(p.x)[row * p.vectors + index];
  }
  static __device__ uint4 make(Loaded v) { return v; }
};

__device__ __forceinline__ float4 floats(uint4 v) {
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

__device__ __forceinline__ float4 floats(uint2 v) {
  const float2 low = Bf16::pair(v.x), high = Bf16::pair(v.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

// The GEMM's epilogue has the same, to the bit (epilogue.cuh).
__device__ __forceinline__ uint32_t silu_mul(float gate, float up) {
  return __float_as_uint(__fdividef(gate, 1.f + __expf(-gate)) * up);
}

// Four: four elements of a row in memory, uint4 of floats or uint2 of bf16.
template <class Four>
struct GateUp {
  using Type = F32;
  struct Loaded {
    Four gate, up;
  };
  static __device__ Loaded load(const Params& p, int64_t row, int index) {
    if (index >= p.vectors) return {};
    const Four* gate = static_cast<const Four*>(p.x) + row * 2 * p.vectors + index + (index & p.pairs);
    return {*gate, gate[p.up]};
  }
  static __device__ uint4 make(const Loaded& v) {
    const float4 g = floats(v.gate), u = floats(v.up);
    return make_uint4(silu_mul(g.x, u.x), silu_mul(g.y, u.y), silu_mul(g.z, u.z), silu_mul(g.w, u.w));
  }
};

// scale, and what divides by it: x / scale = (x * factor) / divisor, whose remainders are normal floats.
struct Scale {
  float scale, factor, divisor, inverse;
};

__device__ __forceinline__ Scale make_scale(uint32_t peak) {
  const float scale = __fdiv_rn(fmaxf(__uint_as_float(peak), FLT_MIN), kFp8Max);
  const float factor = scale < 0x1p-80f ? 0x1p100f : scale > 0x1p80f ? 0x1p-100f : 1.f;
  return {scale, factor, scale * factor, __frcp_rn(scale * factor)};
}

// x / scale, rounded once, where it does not become zero in e4m3. With the correctly rounded inverse, a second
// correction by the exact remainder gives the correctly rounded quotient (Markstein, IBM J. Res. Dev. 34, 1990).
// The corrections turn -0 into +0, so the sign is x's again at the end.
__device__ __forceinline__ float divide(float x, const Scale& s) {
  x = __fmul_rn(x, s.factor);
  float q = __fmul_rn(x, s.inverse);
  q = __fmaf_rn(__fmaf_rn(-s.divisor, q, x), s.inverse, q);
  q = __fmaf_rn(__fmaf_rn(-s.divisor, q, x), s.inverse, q);
  return __uint_as_float(__float_as_uint(q) | (__float_as_uint(x) & 0x80000000u));
}

__device__ __forceinline__ uint32_t convert(float2 x, const Scale& s) {
  return __nv_cvt_float2_to_fp8x2(make_float2(divide(x.x, s), divide(x.y, s)), __NV_SATFINITE, __NV_E4M3);
}

template <class T>
__device__ __forceinline__ void write(uint8_t* out, uint4 v, const Scale& s) {
  if constexpr (T::kElements == 4) {
    const float4 x = floats(v);
    const uint32_t low = convert(make_float2(x.x, x.y), s);
    *reinterpret_cast<uint32_t*>(out) = low | convert(make_float2(x.z, x.w), s) << 16;
  } else {
    const uint32_t low = convert(T::pair(v.x), s) | convert(T::pair(v.y), s) << 16;
    const uint32_t high = convert(T::pair(v.z), s) | convert(T::pair(v.w), s) << 16;
    *reinterpret_cast<uint2*>(out) = make_uint2(low, high);
  }
}

// One vector of a row. Where 128 elements share a scale, they are the vectors of 16 or 32 lanes, all of them here.
template <class T, bool kTokenGroup>
__device__ __forceinline__ void finish(const Params& p, int64_t row, int index, uint4 v, Scale s, bool finite) {
  if (!finite) v = make_uint4(0, 0, 0, 0);
  if constexpr (kTokenGroup) {
    constexpr int kLanes = kGroup / T::kElements;
    uint32_t peak = T::peak(v);
#pragma unroll
    for (int step = kLanes / 2; step > 0; step >>= 1) peak = max(peak, __shfl_xor_sync(~0u, peak, step));
    s = make_scale(peak);
    if (index < p.vectors && index % kLanes == 0)
      p.scales[row * (p.vectors / kLanes) + index / kLanes] = finite ? s.scale : p.lost_scale;
  }
  if (index < p.vectors) write<T>(p.values + (row * p.vectors + index) * T::kElements, v, s);
}

// Launched while the kernel before it may still run: nothing of memory may be read above griddepcontrol.wait.
template <class Source, bool kTokenGroup>
__global__ void __launch_bounds__(kMaxThreads) quantize_kernel(const Params p) {
  using T = typename Source::Type;
  // Two in turn: a warp may write the next row's while another still reads this row's.
  __shared__ uint32_t warp_peaks[2][kMaxThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int64_t rows = p.num_rows ? min(*p.num_rows, p.rows) : p.rows;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    auto load = [&](int index) { return Source::make(Source::load(p, row, index)); };
    typename Source::Loaded loaded[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) loaded[i] = Source::load(p, row, i * blockDim.x + threadIdx.x);
    uint4 held[kHeld];
    uint32_t peak = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      held[i] = Source::make(loaded[i]);
      peak = max(peak, T::peak(held[i]));
    }
    for (int base = kHeld * blockDim.x; base < p.vectors; base += blockDim.x)
      peak = max(peak, T::peak(load(base + threadIdx.x)));

    peak = __reduce_max_sync(~0u, peak);
    if (lane == 0) warp_peaks[turn][warp] = peak;
    __syncthreads();
    peak = __reduce_max_sync(~0u, lane < blockDim.x / 32 ? warp_peaks[turn][lane] : 0u);
    const bool finite = peak < kInfinity;
    const Scale scale = make_scale(finite ? peak : 0u);
    if (threadIdx.x == 0) {
      if (p.non_finite) p.non_finite[row] = !finite;
      if (!kTokenGroup) p.scales[row] = finite ? scale.scale : p.lost_scale;
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      finish<T, kTokenGroup>(p, row, i * blockDim.x + threadIdx.x, held[i], scale, finite);
    for (int base = kHeld * blockDim.x; base < p.vectors; base += blockDim.x)  // what no register held is read again
      finish<T, kTokenGroup>(p, row, base + threadIdx.x, load(base + threadIdx.x), scale, finite);
  }
}

using Kernel = void (*)(Params);

template <class Source>
Kernel pick(bool token_group) {
  return token_group ? quantize_kernel<Source, true> : quantize_kernel<Source, false>;
}

Kernel pick(const W4AFP8Quantize& a) {
  const bool group = a.token_group != 0;
  const bool wide = a.x_type == W4AFP8_F32;
  if (a.activation != W4AFP8_AS_IS) return wide ? pick<GateUp<uint4>>(group) : pick<GateUp<uint2>>(group);
  return wide ? pick<AsIs<F32>>(group) : a.x_type == W4AFP8_F16 ? pick<AsIs<F16>>(group) : pick<AsIs<Bf16>>(group);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int check(const W4AFP8Quantize& a) {
  const bool gate_up = a.activation == W4AFP8_HALVES || a.activation == W4AFP8_INTERLEAVED;
  if (a.activation != W4AFP8_AS_IS && !gate_up) return W4AFP8_BAD_SHAPE;
  if (a.x_type != W4AFP8_F32 && a.x_type != W4AFP8_BF16 && (gate_up || a.x_type != W4AFP8_F16)) return W4AFP8_BAD_SHAPE;
  if (a.rows < 0 || a.k < 8 || a.k >= (1ll << 24) || a.k % (a.token_group ? kGroup : 8) != 0) return W4AFP8_BAD_SHAPE;
  if (!aligned(a.x) || !aligned(a.values)) return W4AFP8_BAD_ALIGNMENT;
  return W4AFP8_OK;
}

int run(const W4AFP8Quantize& a) {
  const int refused = check(a);
  if (refused != W4AFP8_OK) return refused;
  if (a.rows == 0) return W4AFP8_OK;
  const OnDevice on(a.device);
  if (on.error() != cudaSuccess) return on.error();
  int sms = 0, major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, a.device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, a.device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, a.device);
  if (error != cudaSuccess) return error;
  if (major != 9 || minor != 0) return W4AFP8_BAD_ARCH;

  Params p{};
  p.x = a.x;
  p.num_rows = a.num_rows;
  p.values = static_cast<uint8_t*>(a.values);
  p.scales = a.scales;
  p.non_finite = a.non_finite;
  p.rows = a.rows;
  p.vectors = (int)(a.k / (a.x_type == W4AFP8_F32 || a.activation != W4AFP8_AS_IS ? 4 : 8));
  p.up = a.activation == W4AFP8_INTERLEAVED ? 2 : p.vectors;
  p.pairs = a.activation == W4AFP8_INTERLEAVED ? ~1 : 0;
  p.lost_scale = a.nan_scales ? std::numeric_limits<float>::quiet_NaN() : 0.f;
  const int threads = std::min(kMaxThreads, ((p.vectors + kHeld - 1) / kHeld + 31) / 32 * 32);
  // About as many CTAs as the device holds at once: num_rows may be far below the rows there is room for.
  const int64_t resident = (int64_t)sms * std::min(32, 2048 / threads);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)std::min(a.rows, resident));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(a.stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  void* arguments[] = {&p};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(pick(a)), arguments);
}

}  // namespace
}  // namespace w4afp8

int w4afp8_quantize(const W4AFP8Quantize* args) { return w4afp8::run(*args); }
