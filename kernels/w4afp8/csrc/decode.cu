#include "grouped_gemm.cuh"

namespace w4afp8 {

template <bool kFullRange, bool kGroupScale, Epilogue kEpilogue>
struct Decode {
  static constexpr GemmKernel value = decode_kernel<kFullRange, kGroupScale, kEpilogue>;
};

Launch decode_launch(bool full_range, bool token_group, Epilogue epilogue) {
  return {choose<Decode>(full_range, token_group, epilogue), 2};
}

}  // namespace w4afp8
