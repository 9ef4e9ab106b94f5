// Brings a request's routes into the form that exchanges take: ids of 64 bits, and none for the rows of padding.
#include "device.cuh"
#include "w4afp8.h"

namespace w4afp8 {
namespace {

constexpr int kThreads = 256;

struct Params {
  const void* ids;
  const float* weights;
  int64_t* out_ids;
  float* out_weights;
  int64_t count, padded;  // slots
};

template <class Id>
__global__ void __launch_bounds__(kThreads) routes_kernel(const Params p) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int64_t slot = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (slot >= p.padded) return;
  const bool live = slot < p.count;
  p.out_ids[slot] = live ? (int64_t)static_cast<const Id*>(p.ids)[slot] : -1;
  if (live) p.out_weights[slot] = p.weights[slot];
}

int run(const W4AFP8Routes& a) {
  if (a.rows < 0 || a.padded_rows < a.rows || a.top_k < 1 || a.top_k > 1024 || a.padded_rows > (1ll << 30))
    return W4AFP8_BAD_SHAPE;
  if (a.padded_rows == 0) return W4AFP8_OK;
  const OnDevice on(a.device);
  if (on.error() != cudaSuccess) return on.error();
  Params p{a.ids, a.weights, a.out_ids, a.out_weights, a.rows * a.top_k, a.padded_rows * a.top_k};
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((unsigned)((p.padded + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(a.stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  return a.wide ? cudaLaunchKernelEx(&config, routes_kernel<int64_t>, p)
                : cudaLaunchKernelEx(&config, routes_kernel<int32_t>, p);
}

}  // namespace
}  // namespace w4afp8

int w4afp8_routes(const W4AFP8Routes* args) { return w4afp8::run(*args); }
