// Host side of the grouped GEMM: which kernel, how much shared memory, the tensor map of the activations.
#pragma once
#include "w4afp8.h"
#include "decode.cuh"
#include "prefill.cuh"

namespace w4afp8 {

using GemmKernel = void (*)(GemmParams, ActivationMaps);

// A kernel and how to launch it. One table an instantiation file (decode.cu, prefill.cu), so that they compile apart.
struct Launch {
  GemmKernel kernel;
  int ctas_per_sm;
};

Launch decode_launch(bool full_range, bool token_group, Epilogue epilogue);
Launch prefill_launch(bool full_range, bool token_group, Epilogue epilogue);

template <template <bool, bool, Epilogue> class Kernel>
GemmKernel choose(bool full_range, bool token_group, Epilogue epilogue) {
  auto pick = [&](auto full, auto group) -> GemmKernel {
    switch (epilogue) {
      case Epilogue::kBf16: return Kernel<full(), group(), Epilogue::kBf16>::value;
      case Epilogue::kF32: return Kernel<full(), group(), Epilogue::kF32>::value;
      default: return Kernel<full(), group(), Epilogue::kSwiglu>::value;
    }
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (full_range) return token_group ? pick(Yes{}, Yes{}) : pick(Yes{}, No{});
  return token_group ? pick(No{}, Yes{}) : pick(No{}, No{});
}

}  // namespace w4afp8
