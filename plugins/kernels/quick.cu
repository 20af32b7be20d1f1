// The passes of NormAttention as kernels of their own, for TensorRT's ahead-of-time plugins: those
// launch one kernel, know no workspace, and hand over inputs, integers, outputs in this order. What
// a pass leaves to the next ones is an output. ../quick.py has the tensors' shapes and the grids.
#include "norm.h"

namespace refedge {

// Sizes that a pass does not look at may be anything from 1 on.
__device__ inline Call norm_call(int pixels, int channels, int words) {
  Call c{};
  c.pixels = pixels, c.channels = channels, c.words = words;
  cut(kNormAttention, c);
  return c;
}

}  // namespace refedge

#define REFEDGE_SCALAR float
#define REFEDGE_QUICK(name) name##_float32
#include "quick.h"
#undef REFEDGE_SCALAR
#undef REFEDGE_QUICK

#define REFEDGE_SCALAR refedge::half
#define REFEDGE_QUICK(name) name##_float16
#include "quick.h"
#undef REFEDGE_SCALAR
#undef REFEDGE_QUICK

#define REFEDGE_SCALAR refedge::bfloat
#define REFEDGE_QUICK(name) name##_bfloat16
#include "quick.h"
#undef REFEDGE_SCALAR
#undef REFEDGE_QUICK
