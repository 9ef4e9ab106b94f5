#include "grouped_gemm.cuh"

namespace w4afp8 {

Launch int4_full_launch(Choice choice) {
  return launch_for<Format<Codes::kInt4Full, 1>>(choice);
}

}  // namespace w4afp8
