#include <algorithm>

#include "device.cuh"
#include "grouped_gemm.cuh"

namespace w4afp8 {

constexpr int kMaxStages = 12;
constexpr int64_t kMaxRows = 1ll << 31;  // a tensor map's row coordinate, and a tile's first row, have 32 bits

static int encode(ActivationMaps* maps, const W4AFP8GroupedGemm& a) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return W4AFP8_NO_DRIVER;
  const cuuint64_t sizes[2] = {(cuuint64_t)a.k, (cuuint64_t)a.rows}, strides[1] = {(cuuint64_t)a.k};
  const cuuint32_t steps[2] = {1, 1};
  auto encode_box = [&](CUtensorMap& map, cuuint32_t rows) {
    const cuuint32_t box[2] = {128, rows};  // rows past the end come as zeros
    return reinterpret_cast<Encode>(entry)(
        &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(a.x), sizes, strides, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  for (int i = 0; i < ActivationMaps::kSmall; ++i)
    if (encode_box(maps->small[i], 8 * (i + 1)) != CUDA_SUCCESS) return W4AFP8_NO_DRIVER;
  for (int i = 0; i < ActivationMaps::kLarge; ++i)
    if (encode_box(maps->large[i], 32 * (i + 1)) != CUDA_SUCCESS) return W4AFP8_NO_DRIVER;
  return W4AFP8_OK;
}

static bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

static int check(const W4AFP8GroupedGemm& a) {
  const bool sizes = a.experts >= 1 && a.experts <= kMaxExperts && a.n >= 8 && a.n % 8 == 0 && a.k >= 128 &&
                     a.k % 128 == 0 && a.rows >= 0 && a.rows < kMaxRows && a.n < (1ll << 24) && a.k < (1ll << 24);
  if (!sizes || (a.offsets == nullptr) == (a.counts == nullptr)) return W4AFP8_BAD_SHAPE;
  if ((a.rows / 8 + a.experts) * ((a.n + 127) / 128) >= (1ll << 31)) return W4AFP8_BAD_SHAPE;  // tiles are counted in int
  if (a.weight_type == W4AFP8_FP8 ? a.group != 128 : a.group != 128 && (a.group != 32 || !a.full_range))
    return W4AFP8_BAD_SHAPE;
  if (a.counts && a.max_rows * a.experts > a.rows) return W4AFP8_BAD_SHAPE;
  if (a.epilogue == W4AFP8_SWIGLU && (a.y_type != W4AFP8_F32 || a.n % 16 != 0 || a.row_weights)) return W4AFP8_BAD_SHAPE;
  if (!aligned(a.x) || !aligned(a.weight) || !aligned(a.channel_scales) || !aligned(a.y)) return W4AFP8_BAD_ALIGNMENT;
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

static Launch choose(const W4AFP8GroupedGemm& a, const GemmParams& p, int sms) {
  const int expected = (int)std::max<int64_t>(1, std::min<int64_t>(a.expected_rows, a.rows));
  const auto launch = a.weight_type == W4AFP8_FP8 ? fp8_launch
                      : a.group == 32             ? int4_group32_launch
                      : a.full_range              ? int4_full_launch
                                                  : int4_launch;
  return launch({a.token_group != 0, p.epilogue, expected, p.experts, p.row_tiles, p.groups, sms});
}

static int run(const W4AFP8GroupedGemm& a) {
  int error = check(a);
  if (error != W4AFP8_OK) return error;
  if (a.rows == 0) return W4AFP8_OK;
  const OnDevice on(a.device);
  if (on.error() != cudaSuccess) return on.error();
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
  p.early_start = a.early_start;

  p.epilogue = a.epilogue == W4AFP8_SWIGLU ? Epilogue::kSwiglu
               : a.y_type == W4AFP8_BF16   ? Epilogue::kBf16
                                           : Epilogue::kF32;

  const Launch launch = choose(a, p, device.sms);
  p.token_cap = launch.token_cap;
  p.row_strips = (p.row_tiles + launch.cluster - 1) / launch.cluster;
  // 1 KiB of each CTA's shared memory is the system's, 1 KiB aligns the ring.
  const int room = device.shared_bytes / launch.ctas_per_sm - 2048 - launch.fixed_bytes;
  p.stages = std::min(kMaxStages, room / launch.stage_bytes);
  launch.lay_out(p);

  const void* kernel = reinterpret_cast<const void*>(launch.kernel);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // the kernel waits before it touches what others write
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {(unsigned)launch.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(device.sms * launch.ctas_per_sm / launch.cluster * launch.cluster);
  config.blockDim = dim3(384);
  config.dynamicSmemBytes = p.stages * launch.stage_bytes + launch.fixed_bytes + 1024;
  config.stream = static_cast<cudaStream_t>(a.stream);
  config.attrs = attributes;
  config.numAttrs = launch.cluster > 1 ? 2 : 1;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)config.dynamicSmemBytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {&p, &maps};
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

}  // namespace w4afp8

int w4afp8_grouped_gemm(const W4AFP8GroupedGemm* args) { return w4afp8::run(*args); }
