#include "grouped_gemm.cuh"

namespace w4afp8 {

template <bool kFullRange, bool kGroupScale, Epilogue kEpilogue>
struct Prefill {
  static constexpr GemmKernel value = prefill_kernel<kFullRange, kGroupScale, kEpilogue>;
};

Launch prefill_launch(bool full_range, bool token_group, Epilogue epilogue) {
  return {choose<Prefill>(full_range, token_group, epilogue), 1};
}

}  // namespace w4afp8
