// What every caller asks the library first: its version, the sizes of its structs, what an error code means.
#include <cuda_runtime.h>

#include "w4afp8.h"

int32_t w4afp8_abi_version(void) { return W4AFP8_ABI_VERSION; }

int64_t w4afp8_struct_bytes(int32_t which) {
  switch (which) {
    case 0: return sizeof(W4AFP8GroupedGemm);
    case 1: return sizeof(W4AFP8Quantize);
    case 2: return sizeof(W4AFP8Slice);
    case 3: return sizeof(W4AFP8Gate);
    case 4: return sizeof(W4AFP8Routes);
    case 5: return sizeof(W4AFP8Copy);
    default: return 0;
  }
}

const char* w4afp8_error_string(int code) {
  switch (code) {
    case W4AFP8_OK: return "no error";
    case W4AFP8_BAD_SHAPE: return "a size is out of range or not a multiple of what it must be";
    case W4AFP8_BAD_ALIGNMENT: return "a pointer is not aligned to 16 bytes";
    case W4AFP8_BAD_ARCH: return "the device is not of compute capability 9.0";
    case W4AFP8_NO_DRIVER: return "the CUDA driver could not encode a tensor map";
    default: return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
}
