// The C interface of the sm_90a library. Plain structs, device pointers, a stream; nothing allocates, nothing waits.
// kernels/w4afp8/library.py mirrors these structs with ctypes and refuses a library whose sizes differ.
#pragma once
#include <stdint.h>

#define W4AFP8_ABI_VERSION 3
#define W4AFP8_API extern "C" __attribute__((visibility("default")))

// Error codes below 1000 are cudaError_t; these are ours. w4afp8_error_string knows both.
enum {
  W4AFP8_OK = 0,
  W4AFP8_BAD_SHAPE = 1001,      // a size is out of range or not a multiple of what it must be
  W4AFP8_BAD_ALIGNMENT = 1002,  // a pointer is not aligned to 16 bytes
  W4AFP8_BAD_ARCH = 1003,       // the device is not of compute capability 9.0
  W4AFP8_NO_DRIVER = 1004,      // cuTensorMapEncodeTiled was not found or failed
};

enum { W4AFP8_BF16 = 0, W4AFP8_F16 = 1, W4AFP8_F32 = 2 };
enum { W4AFP8_PLAIN = 0, W4AFP8_SWIGLU = 1 };
enum { W4AFP8_INT4 = 0, W4AFP8_FP8 = 1 };
enum { W4AFP8_AS_IS = 0, W4AFP8_HALVES = 1, W4AFP8_INTERLEAVED = 2 };
enum { W4AFP8_SIGMOID = 0, W4AFP8_SOFTMAX = 1 };

// y[t, n] = row_weight[t] * x_scale[t] * sum over k of q[e, n, k] * scale[e, n, k / group] * x[t, k] for the rows t of
// each expert e. The weights are packed (w4afp8.packed).
struct W4AFP8GroupedGemm {
  const void* x;                // [rows, k] e4m3, row-major, 16-byte aligned
  const float* x_scales;        // [rows] (token) or [rows, k / 128] (token_group)
  const void* weight;           // [experts, n_padded / 128, k_padded / 128] blocks, 16-byte aligned
  const float* channel_scales;  // [experts, n_padded]
  const float* row_weights;     // [rows], or null for ones
  const int64_t* offsets;       // [experts + 1] on the device: rows of expert e are [offsets[e], offsets[e + 1])
  const int32_t* counts;        // or, with offsets null, [experts]: rows of expert e are e * max_rows + [0, counts[e])
  void* y;                      // [rows, n] bf16 or f32; SWIGLU: [rows, n / 2] f32
  int64_t rows;                 // capacity of x and y
  int64_t max_rows;             // of one expert, where `counts` is used
  int64_t experts, n, k;
  int64_t expected_rows;        // of a busy expert: chooses the tile, never the result
  int32_t weight_type;          // INT4 or FP8
  int32_t group;                // inputs that share a weight scale: 128, or 32 where full_range
  int32_t full_range;           // int4 codes may be -8 (7 operations to convert 8 codes instead of 3)
  int32_t token_group;          // granularity of x_scales
  int32_t epilogue;             // PLAIN, or SWIGLU: rows of the weight are 8 gate, 8 up, in turn
  int32_t y_type;               // BF16 or F32
  int32_t early_start;          // offsets or counts are older than the stream's previous kernel: weights come meanwhile
  int32_t device;
  void* stream;
};

// values[t, i] = e4m3(v[t, i] / scale[t]), scale[t] = amax / 448; see w4afp8.quantize_tokens. v is x, or
// SiLU(gate) * up in float32 where x holds both.
struct W4AFP8Quantize {
  const void* x;                // [rows, k], or [rows, 2 * k] of gate and up, of x_type, 16-byte aligned
  const int64_t* num_rows;      // on the device: rows that count, or null for all
  void* values;                 // [rows, k] e4m3
  float* scales;                // [rows] or [rows, k / 128]
  uint8_t* non_finite;          // [rows] 0 or 1, or null
  int64_t rows, k;
  int32_t x_type;               // BF16, F16 or F32; not F16 for gate and up
  int32_t token_group;
  int32_t device;
  void* stream;
  int32_t activation;           // AS_IS; or gate and up: k and k (HALVES), 8 and 8 in turn (INTERLEAVED)
  int32_t nan_scales;           // a row with NaN or Inf gets scales NaN instead of 0; its values are 0 either way
};

// slices[0, t, i] = rint(v) and slices[1, t, i] = rint((v - slices[0, t, i]) * 2^bits), where v = x[t, i] * 2^bits /
// units[t] and units[t] is the power of two above row t's largest magnitude; see w4afp8.linear. A row with NaN or Inf
// gets NaN.
struct W4AFP8Slice {
  const void* x;                // [rows, k] of x_type, 16-byte aligned
  double* slices;               // [2, rows, k], 16-byte aligned
  double* units;                // [rows]
  int64_t rows, k;              // k even
  int32_t x_type;               // BF16, F16 or F32
  int32_t bits;                 // of a slice, 1 to 26
  int32_t device;
  void* stream;
};

// The experts of tokens: what moe_forward.gates computes, by logits or by the slice products that make them.
struct W4AFP8Gate {
  const void* logits;           // [rows, experts] of logits_type, or null where products has them
  const double* products;       // [parts, 2 * rows, 2 * experts]: high slices before low ones; the parts are added
  const double* row_units;      // [rows]; with products
  const double* expert_units;   // [experts]; with products
  const float* bias;            // [experts], added to scores for choosing only, or null
  int64_t* ids;                 // [rows, top_k], best first, equals by ascending id
  float* weights;               // [rows, top_k]
  uint8_t* non_finite;          // [rows] 0 or 1: a logit is NaN or Inf; the row's ids are valid nevertheless
  int64_t rows;
  int64_t experts;              // up to 1024
  int32_t logits_type;          // BF16, F16 or F32
  int32_t parts, bits;          // of products; of a slice
  int32_t scores;               // SIGMOID, or SOFTMAX: without bias and groups
  int32_t top_k;                // up to 32
  int32_t groups;               // up to 32, of equal size; 1 for none
  int32_t top_groups;           // experts are chosen inside the groups whose two best have the largest sums
  int32_t normalize;            // divide weights by their sum plus sum_floor
  float sum_floor;
  float scaling_factor;         // of the weights
  int32_t device;
  void* stream;
};

// Bytes from one place to another: device memory, or host memory that CUDA knows (registered and mapped, or pinned).
struct W4AFP8Copy {
  void* to;
  const void* from;
  int64_t bytes;
};

// out_ids[t, j] = ids[t, j] for t < rows, -1 up to padded_rows; out_weights = weights, which padding does not need.
struct W4AFP8Routes {
  const void* ids;              // [rows, top_k] int32, or int64 where wide
  const float* weights;         // [rows, top_k]
  int64_t* out_ids;             // [padded_rows, top_k]
  float* out_weights;           // [padded_rows, top_k]
  int64_t rows, padded_rows, top_k;
  int32_t wide;
  int32_t device;
  void* stream;
};

W4AFP8_API int32_t w4afp8_abi_version(void);
// 0: W4AFP8GroupedGemm, 1: ..Quantize, 2: ..Slice, 3: ..Gate, 4: ..Routes, 5: ..Copy
W4AFP8_API int64_t w4afp8_struct_bytes(int32_t which);
W4AFP8_API int w4afp8_grouped_gemm(const struct W4AFP8GroupedGemm* args);
W4AFP8_API int w4afp8_quantize(const struct W4AFP8Quantize* args);
W4AFP8_API int w4afp8_slice(const struct W4AFP8Slice* args);
W4AFP8_API int w4afp8_gate(const struct W4AFP8Gate* args);
W4AFP8_API int w4afp8_copy(const struct W4AFP8Copy* copies, int64_t count, int32_t device, void* stream);
W4AFP8_API int w4afp8_routes(const struct W4AFP8Routes* args);
W4AFP8_API const char* w4afp8_error_string(int code);
