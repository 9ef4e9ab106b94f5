// The device that a function of the library was asked to work on, made the thread's own for as long as it lasts.
#pragma once
#include <cuda_runtime.h>

namespace w4afp8 {

class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device_) error_ = cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (error_ == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int device_, before_ = 0;
  cudaError_t error_;
};

}  // namespace w4afp8
