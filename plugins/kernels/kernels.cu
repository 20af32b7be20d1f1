// The fused operators of ../reference.py as CUDA kernels; ../../docs/plugins.md has the passes.
//
// Softmax, moments and sums are float32 whatever the type of inputs and outputs; products of half
// and bfloat16 tiles run on tensor cores. No atomics: the same call gives the same bits.
#include "cross.h"
#include "mutual.h"
#include "norm.h"

#define REFEDGE_TYPE(name, type, suffix)                                               \
  extern "C" __global__ void __launch_bounds__(refedge::kThreads) name##_##suffix(     \
      refedge::Call call) {                                                            \
    refedge::name<type>(call);                                                         \
  }
#define REFEDGE_KERNEL(name)                \
  REFEDGE_TYPE(name, float, float32)        \
  REFEDGE_TYPE(name, refedge::half, float16) \
  REFEDGE_TYPE(name, refedge::bfloat, bfloat16)

REFEDGE_KERNEL(cross_weights)
REFEDGE_KERNEL(cross_output)
REFEDGE_KERNEL(norm_scores)
REFEDGE_KERNEL(norm_columns)
REFEDGE_KERNEL(norm_thin)
REFEDGE_KERNEL(norm_output)
REFEDGE_KERNEL(mutual_seen)
REFEDGE_KERNEL(mutual_pairs)
REFEDGE_KERNEL(mutual_product)
