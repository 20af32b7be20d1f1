// The fused operators of ../reference.py as CUDA kernels; ../../docs/plugins.md has the passes.
//
// Softmax, moments and sums are float32 whatever the type of inputs and outputs; products of half
// and bfloat16 pieces run on tensor cores. No atomics: the same call gives the same bits.
#include "cross.h"
#include "gate.h"
#include "mutual.h"

// `blocks` of the half types are to fit a multiprocessor at once.
#define REFEDGE_TYPE(name, type, suffix, blocks)                                       \
  extern "C" __global__ void __launch_bounds__(refedge::kThreads, blocks)              \
      name##_##suffix(refedge::Call call) {                                            \
    refedge::name<type>(call);                                                         \
  }
#define REFEDGE_KERNEL(name, blocks)                \
  REFEDGE_TYPE(name, float, float32, 1)             \
  REFEDGE_TYPE(name, refedge::half, float16, blocks) \
  REFEDGE_TYPE(name, refedge::bfloat, bfloat16, blocks)

REFEDGE_KERNEL(cross_attention, 1)
REFEDGE_KERNEL(norm_scores, 2)
REFEDGE_KERNEL(norm_columns, 2)
REFEDGE_KERNEL(norm_thin, 2)
REFEDGE_KERNEL(norm_output, 2)
REFEDGE_KERNEL(mutual_seen, 2)
REFEDGE_KERNEL(mutual_pairs, 2)
REFEDGE_KERNEL(mutual_product, 1)
