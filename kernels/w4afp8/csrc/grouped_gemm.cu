#include <algorithm>
#include <utility>

#include "grouped_gemm.cuh"

namespace w4afp8 {

// Decode pays while a tile's tokens hide under its weights; above, the tensor cores bound (BENCHMARKS.md).
constexpr int kDecodeRows = 64;  // expected of a busy expert: about 32 on average
constexpr int kMaxStages = 12;
constexpr int64_t kMaxRows = 1ll << 24;  // see token_tiles; a tensor map's row coordinate has 32 bits

static int encode(ActivationMaps* maps, const W4AFP8GroupedGemm& a) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return W4AFP8_NO_DRIVER;
  const cuuint64_t sizes[2] = {(cuuint64_t)a.k, (cuuint64_t)a.rows}, strides[1] = {(cuuint64_t)a.k};
  const cuuint32_t steps[2] = {1, 1};
  for (auto [map, rows] : {std::pair{&maps->rows8, 8u}, std::pair{&maps->rows64, 64u}}) {
    const cuuint32_t box[2] = {128, rows};  // rows past the end come as zeros
    CUresult result = reinterpret_cast<Encode>(entry)(
        map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(a.x), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) return W4AFP8_NO_DRIVER;
  }
  return W4AFP8_OK;
}

static bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

static int check(const W4AFP8GroupedGemm& a) {
  const bool sizes = a.experts >= 1 && a.experts <= kMaxExperts && a.n >= 8 && a.n % 8 == 0 && a.k >= 128 &&
                     a.k % 128 == 0 && a.rows >= 0 && a.rows < kMaxRows && a.n < (1ll << 24) && a.k < (1ll << 24);
  if (!sizes || a.group != 128 || (a.offsets == nullptr) == (a.counts == nullptr)) return W4AFP8_BAD_SHAPE;
  if (a.counts && a.max_rows * a.experts > a.rows) return W4AFP8_BAD_SHAPE;
  if (a.epilogue == W4AFP8_SWIGLU && (a.y_type != W4AFP8_F32 || a.n % 16 != 0)) return W4AFP8_BAD_SHAPE;
  if (!aligned(a.x) || !aligned(a.weight) || !aligned(a.y)) return W4AFP8_BAD_ALIGNMENT;
  return W4AFP8_OK;
}

struct Device {
  int sms, shared_bytes;
};

static int describe(int device, Device* out) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&out->sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&out->shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error != cudaSuccess) return error;
  return major == 9 && minor == 0 ? W4AFP8_OK : W4AFP8_BAD_ARCH;
}

template <int kDepth>
static int stages_for(GemmParams& p, int bytes) {
  using R = Ring<kDepth>;
  const int fixed = R::fixed_bytes(p.token_cap), stage = R::stage_bytes(p.token_cap);
  p.stages = std::min(kMaxStages, (bytes - fixed) / stage);
  R::lay_out(p);
  return p.stages * stage + fixed;
}

static int run(const W4AFP8GroupedGemm& a) {
  int error = check(a);
  if (error != W4AFP8_OK) return error;
  if (a.rows == 0) return W4AFP8_OK;
  Device device;
  if ((error = describe(a.device, &device)) != W4AFP8_OK) return error;
  ActivationMaps maps;
  if ((error = encode(&maps, a)) != W4AFP8_OK) return error;

  GemmParams p{};
  p.weight = static_cast<const uint8_t*>(a.weight);
  p.channel_scales = a.channel_scales;
  p.x_scales = a.x_scales;
  p.row_weights = a.row_weights;
  p.offsets = a.offsets;
  p.counts = a.counts;
  p.y = a.y;
  p.experts = (int)a.experts;
  p.n = (int)a.n;
  p.row_tiles = (int)((a.n + 127) / 128);
  p.groups = (int)((a.k + 255) / 256 * 2);
  p.scale_columns = (int)(a.k / 128);
  p.max_rows = (int)a.max_rows;

  const Epilogue epilogue = a.epilogue == W4AFP8_SWIGLU ? Epilogue::kSwiglu
                            : a.y_type == W4AFP8_BF16   ? Epilogue::kBf16
                                                        : Epilogue::kF32;
  const bool full = a.full_range != 0, group = a.token_group != 0;
  const int expected = (int)std::max<int64_t>(1, std::min<int64_t>(a.expected_rows, a.rows));
  Launch launch;
  int shared;
  // 1 KiB of each CTA's shared memory is the system's, 1 KiB aligns the ring, the schedule takes the rest.
  const int reserved = 2048 + (int)sizeof(Schedule);
  if (expected <= kDecodeRows) {
    launch = decode_launch(full, group, epilogue);
    p.token_cap = expected <= 8 ? 8 : expected <= 16 ? 16 : kDecodeCap;
    shared = stages_for<2>(p, device.shared_bytes / launch.ctas_per_sm - reserved);
  } else {
    launch = prefill_launch(full, group, epilogue);
    p.token_cap = kPrefillCap;
    shared = stages_for<1>(p, device.shared_bytes / launch.ctas_per_sm - reserved);
  }
  p.token_cap_inverse = (uint32_t)(((1ull << 32) + p.token_cap - 1) / p.token_cap);
  const int bytes = shared + 1024;
  cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(launch.kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {&p, &maps};
  status = cudaLaunchKernel(reinterpret_cast<const void*>(launch.kernel), dim3(device.sms * launch.ctas_per_sm), dim3(384),
                            arguments, bytes, static_cast<cudaStream_t>(a.stream));
  return status;
}

}  // namespace w4afp8

int w4afp8_grouped_gemm(const W4AFP8GroupedGemm* args) { return w4afp8::run(*args); }
