#include "grouped_gemm.cuh"

namespace w4afp8 {

Launch fp8_launch(Choice choice) {
  return launch_for<Format<Codes::kFp8, 1>>(choice);
}

}  // namespace w4afp8
