// Chooses a token's experts, in one CTA: logits from the slice products of w4afp8.linear or as the client sent them,
// scores of all experts by as many threads, then one warp ranks them. The bits are those of moe_forward.gates: each
// step is one IEEE operation by its intrinsic, none is fused, and sums have torch's order. Must not be compiled with
// -ftz=true or -prec-div=false.
#include <cuda_fp16.h>

#include <algorithm>

#include "device.cuh"
#include "ranking.cuh"
#include "w4afp8.h"

namespace w4afp8 {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;    // a lane each
constexpr int kMaxGroups = 32;  // a lane each
constexpr int kMaxBits = 26;
constexpr int kAhead = 16;     // partial sums that a thread loads before it adds
constexpr int kFewRows = 128;  // up to here a CTA has an SM to itself, and a thread for each sum

struct Params {
  const void* logits;
  const double* products;
  const double* row_units;
  const double* expert_units;
  const float* bias;
  int64_t* ids;
  float* weights;
  uint8_t* non_finite;
  int64_t rows;
  double unit;  // 2^-bits of a slice
  int experts, parts, logits_type;
  bool softmax;
  int top_k, groups, top_groups;
  bool normalize;
  float sum_floor, scaling;
};

// Partial sums are exact, so any order gives the sum's bits.
__device__ __forceinline__ double sum_parts(const double* first, int64_t stride, int parts) {
  double sum = 0;
  for (int base = 0; base < parts; base += kAhead) {
    double held[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) held[i] = base + i < parts ? first[(base + i) * stride] : 0.0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum = __dadd_rn(sum, held[i]);
  }
  return sum;
}

// w4afp8.linear._combine, the units, and float32. sums: high high, high low, low high, low low of every expert.
__device__ __forceinline__ float combine(const Params& p, int64_t row, const double* sums, int expert) {
  const double high_high = sums[expert], high_low = sums[p.experts + expert];
  const double low_high = sums[2 * p.experts + expert], low_low = sums[3 * p.experts + expert];
  const double square = __dmul_rn(p.unit, p.unit);  // exact
  double y = __dadd_rn(__dmul_rn(__dadd_rn(high_low, low_high), p.unit), high_high);
  y = __dmul_rn(__dadd_rn(__dmul_rn(low_low, square), y), square);
  return __double2float_rn(__dmul_rn(__dmul_rn(y, p.row_units[row]), p.expert_units[expert]));
}

__device__ __forceinline__ float load_logit(const Params& p, int64_t index) {
  if (p.logits_type == W4AFP8_F32) return static_cast<const float*>(p.logits)[index];
  const unsigned short bits = static_cast<const unsigned short*>(p.logits)[index];
  return p.logits_type == W4AFP8_F16 ? __half2float(__ushort_as_half(bits)) : __uint_as_float((uint32_t)bits << 16);
}

// Launched while the kernel before it may still run: nothing of memory may be read or written above
// griddepcontrol.wait. (With one CTA an SM promised, all kAhead loads are under way; else registers are saved.)
template <int kSlots>
__global__ void __launch_bounds__(kMaxThreads, 1) gate_kernel(const Params p) {
  constexpr int kExperts = 32 * kSlots;
  __shared__ double sums[4 * kExperts];
  __shared__ float logits[kExperts];
  __shared__ float scores[kExperts];
  __shared__ uint32_t keys[kExperts];
  __shared__ uint32_t group_keys[kMaxGroups];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x;
  if (p.products) {
    const int columns = 2 * p.experts;
    for (int i = threadIdx.x; i < 2 * columns; i += blockDim.x) {
      const int64_t first = i < columns ? row * columns + i : (p.rows + row) * columns + (i - columns);
      sums[i] = sum_parts(p.products + first, 2 * p.rows * columns, p.parts);
    }
    __syncthreads();
  }
  bool lost = false;
  for (int expert = threadIdx.x; expert < p.experts; expert += blockDim.x) {
    const float logit = p.products ? combine(p, row, sums, expert) : load_logit(p, row * p.experts + expert);
    lost |= !isfinite(logit);
    if (p.softmax) {
      logits[expert] = logit;
    } else {
      const float score = sigmoid(logit);
      scores[expert] = score;
      keys[expert] = key(p.bias ? __fadd_rn(score, p.bias[expert]) : score);
    }
  }
  lost = __syncthreads_or(lost);
  if (p.softmax) {
    uint32_t most = 0;
    for (int expert = lane; expert < p.experts; expert += 32) most = max(most, key(logits[expert]));
    const float top = value(__reduce_max_sync(~0u, most));
    for (int expert = threadIdx.x; expert < p.experts; expert += blockDim.x)
      scores[expert] = __double2float_rn(exponential((double)__fsub_rn(logits[expert], top)));
    __syncthreads();
  } else if (p.groups > 1) {
    const int size = p.experts / p.groups;
    for (int group = warp; group < p.groups; group += blockDim.x / 32) {
      const uint32_t k = group_key(keys + group * size, size, lane);
      if (lane == 0) group_keys[group] = k;
    }
    __syncthreads();
  }
  if (warp != 0) return;

  uint32_t mine[kSlots];
  if (p.softmax) {
    const float total = halving_sum<kSlots>(scores, p.experts, lane);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int expert = j * 32 + lane;
      if (expert < p.experts) scores[expert] = __fdiv_rn(scores[expert], total);
      mine[j] = expert < p.experts ? key(scores[expert]) : 0;
    }
  } else {
    const int size = p.experts / p.groups;
    const uint32_t group = p.groups > 1 && lane < p.groups ? group_keys[lane] : 0;
    const uint32_t open = p.groups > 1 ? pick_groups(group, p.top_groups, lane) : ~0u;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      const int expert = j * 32 + lane;
      const bool dropped = p.groups > 1 && expert < p.experts && !(open >> (expert / size) & 1);
      mine[j] = expert >= p.experts ? 0 : dropped ? kMinusInfinity : keys[expert];
    }
  }
  __syncwarp();
  const int id = (int)pick<kSlots>(mine, p.top_k, lane);
  float weight = lane < p.top_k ? scores[id] : 0.f;
  if (p.normalize) {
    float total = __shfl_sync(~0u, weight, 0);
    for (int i = 1; i < p.top_k; ++i) total = __fadd_rn(total, __shfl_sync(~0u, weight, i));
    weight = __fdiv_rn(weight, __fadd_rn(total, p.sum_floor));
  }
  if (lane < p.top_k) {
    p.ids[row * p.top_k + lane] = id;
    p.weights[row * p.top_k + lane] = __fmul_rn(weight, p.scaling);
  }
  if (lane == 0) p.non_finite[row] = lost;
}

int check(const W4AFP8Gate& a) {
  if (a.rows < 0 || a.rows >= (1ll << 31) || a.experts < 1 || a.experts > kMaxExperts) return W4AFP8_BAD_SHAPE;
  if (a.top_k < 1 || a.top_k > std::min<int64_t>(kMaxTopK, a.experts)) return W4AFP8_BAD_SHAPE;
  if (a.scores != W4AFP8_SIGMOID && a.scores != W4AFP8_SOFTMAX) return W4AFP8_BAD_SHAPE;
  if (a.scores == W4AFP8_SOFTMAX && (a.bias || a.groups != 1)) return W4AFP8_BAD_SHAPE;
  if (a.groups < 1 || a.groups > kMaxGroups || a.experts % a.groups != 0) return W4AFP8_BAD_SHAPE;
  if (a.groups > 1) {
    const int64_t size = a.experts / a.groups;
    if (size < 2 || a.top_groups < 1 || a.top_groups > a.groups || a.top_groups * size < a.top_k)
      return W4AFP8_BAD_SHAPE;
  }
  if (a.products) return a.logits || a.parts < 1 || a.bits < 1 || a.bits > kMaxBits ? W4AFP8_BAD_SHAPE : W4AFP8_OK;
  const bool floats = a.logits_type == W4AFP8_F32 || a.logits_type == W4AFP8_BF16 || a.logits_type == W4AFP8_F16;
  return floats && (a.logits || a.rows == 0) ? W4AFP8_OK : W4AFP8_BAD_SHAPE;
}

int run(const W4AFP8Gate& a) {
  const int refused = check(a);
  if (refused != W4AFP8_OK) return refused;
  if (a.rows == 0) return W4AFP8_OK;
  const OnDevice on(a.device);
  if (on.error() != cudaSuccess) return on.error();
  Params p{};
  p.logits = a.logits;
  p.products = a.products;
  p.row_units = a.row_units;
  p.expert_units = a.expert_units;
  p.bias = a.bias;
  p.ids = a.ids;
  p.weights = a.weights;
  p.non_finite = a.non_finite;
  p.rows = a.rows;
  p.unit = a.products ? 1.0 / (1ll << a.bits) : 0.0;
  p.experts = (int)a.experts;
  p.parts = a.parts;
  p.logits_type = a.logits_type;
  p.softmax = a.scores == W4AFP8_SOFTMAX;
  p.top_k = a.top_k;
  p.groups = a.groups;
  p.top_groups = a.top_groups;
  p.normalize = a.normalize != 0;
  p.sum_floor = a.sum_floor;
  p.scaling = a.scaling_factor;
  const int values = (a.products && a.rows <= kFewRows ? 4 : 1) * p.experts;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)a.rows);
  config.blockDim = dim3((unsigned)std::min(kMaxThreads, (values + 31) / 32 * 32));
  config.stream = static_cast<cudaStream_t>(a.stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  if (p.experts <= 256) return cudaLaunchKernelEx(&config, gate_kernel<8>, p);
  if (p.experts <= 512) return cudaLaunchKernelEx(&config, gate_kernel<16>, p);
  return cudaLaunchKernelEx(&config, gate_kernel<32>, p);
}

}  // namespace
}  // namespace w4afp8

int w4afp8_gate(const W4AFP8Gate* args) { return w4afp8::run(*args); }
