// Copies between the device and host memory that CUDA knows (registered or pinned), on a stream. An engine's copy costs
// the host 5 to 10 us, and a step of many small requests has a hundred of them, so all small ones are one kernel's, which
// reaches host memory by itself.
#include <algorithm>

#include "device.cuh"
#include "w4afp8.h"

namespace w4afp8 {
namespace {

constexpr int64_t kLargeBytes = 128 * 1024;  // from here on engines copy: the kernel would only take SMs from others
constexpr int kChunkBytes = 16 * 1024;       // of one CTA
constexpr int kThreads = 256;
constexpr int kUnroll = 4;
constexpr int kEntries = 160;  // what fits into 4 KB of parameters

struct Entry {
  uint8_t* to;
  const uint8_t* from;
  int64_t bytes;
};

struct Table {
  Entry entries[kEntries];
};

// Host memory changes behind the caches between two launches, so every load goes to memory (ld.cv). All loads of a
// round are under way before the first store waits for one.
template <class Vector>
__device__ void copy_vectors(uint8_t* to, const uint8_t* from, int64_t bytes) {
  const int64_t count = bytes / (int64_t)sizeof(Vector);
  const Vector* source = reinterpret_cast<const Vector*>(from);
  Vector* target = reinterpret_cast<Vector*>(to);
  for (int64_t base = threadIdx.x; base < count; base += kUnroll * kThreads) {
    Vector held[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (base + i * kThreads < count) held[i] = __ldcv(source + base + i * kThreads);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (base + i * kThreads < count) target[base + i * kThreads] = held[i];
  }
  for (int64_t at = count * (int64_t)sizeof(Vector) + threadIdx.x; at < bytes; at += kThreads) to[at] = __ldcv(from + at);
}

__global__ void __launch_bounds__(kThreads) copy_kernel(const __grid_constant__ Table table) {
  const Entry& entry = table.entries[blockIdx.x];
  const int64_t first = (int64_t)blockIdx.y * kChunkBytes;
  if (first >= entry.bytes) return;
  uint8_t* to = entry.to + first;
  const uint8_t* from = entry.from + first;
  const int64_t bytes = min((int64_t)kChunkBytes, entry.bytes - first);
  // Tensors inside a request's body start where the client put them.
  const uintptr_t low = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16;
  if (low == 0) return copy_vectors<uint4>(to, from, bytes);
  if (low % 8 == 0) return copy_vectors<uint2>(to, from, bytes);
  if (low % 4 == 0) return copy_vectors<unsigned int>(to, from, bytes);
  copy_vectors<unsigned char>(to, from, bytes);
}

cudaError_t launch(const Table& table, int entries, int64_t most_bytes, cudaStream_t stream) {
  const dim3 grid(entries, (unsigned)((most_bytes + kChunkBytes - 1) / kChunkBytes));
  copy_kernel<<<grid, kThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

cudaError_t copy_all(const W4AFP8Copy* copies, int64_t count, cudaStream_t stream) {
  Table table;
  int entries = 0;
  int64_t most_bytes = 0;
  for (int64_t i = 0; i < count; ++i) {
    const W4AFP8Copy& copy = copies[i];
    cudaError_t error = cudaSuccess;
    if (copy.bytes >= kLargeBytes) {
      error = cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyDefault, stream);
    } else if (copy.bytes > 0) {
      table.entries[entries++] = {static_cast<uint8_t*>(copy.to), static_cast<const uint8_t*>(copy.from), copy.bytes};
      most_bytes = std::max(most_bytes, copy.bytes);
    }
    if (error == cudaSuccess && entries > 0 && (entries == kEntries || i + 1 == count)) {
      error = launch(table, entries, most_bytes, stream);
      entries = 0, most_bytes = 0;
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace w4afp8

int w4afp8_copy(const W4AFP8Copy* copies, int64_t count, int32_t device, void* stream) {
  for (int64_t i = 0; i < count; ++i)
    if (copies[i].bytes < 0) return W4AFP8_BAD_SHAPE;
  const w4afp8::OnDevice on(device);
  if (on.error() != cudaSuccess) return on.error();
  return w4afp8::copy_all(copies, count, static_cast<cudaStream_t>(stream));
}
