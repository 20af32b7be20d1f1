// The passes of the operators for TensorRT's ahead-of-time plugins: those launch one kernel, know
// no workspace, and hand over inputs, integers, outputs in this order. What a pass leaves to the
// next ones is an output. ../quick.py has the shapes of the tensors and the grids.
#include "cross.h"
#include "gate.h"
#include "mutual.h"

namespace refedge {

// A pass gives the sizes that it looks at; the others may be anything from 1 on.
struct Sizes {
  int pixels = 1, channels = 1, words = 1, heads = 1, width = 1;
};
__device__ inline Call call_of(Operator op, Sizes const& given) {
  Call c{};
  c.pixels = given.pixels, c.channels = given.channels, c.words = given.words;
  c.heads = given.heads, c.width = given.width;
  cut(op, c);
  return c;
}

#define REFEDGE_SCALAR float
#define REFEDGE_BLOCKS 1
#define REFEDGE_NAME(name) name##_float32
#include "quick.h"
#undef REFEDGE_SCALAR
#undef REFEDGE_NAME
#undef REFEDGE_BLOCKS

#define REFEDGE_BLOCKS 2  // of the half types, on a multiprocessor
#define REFEDGE_SCALAR half
#define REFEDGE_NAME(name) name##_float16
#include "quick.h"
#undef REFEDGE_SCALAR
#undef REFEDGE_NAME

#define REFEDGE_SCALAR bfloat
#define REFEDGE_NAME(name) name##_bfloat16
#include "quick.h"
#undef REFEDGE_SCALAR
#undef REFEDGE_NAME

}  // namespace refedge
