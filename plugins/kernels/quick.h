// Included by quick.cu once a type, so without a guard.

extern "C" __global__ void __launch_bounds__(refedge::kThreads) REFEDGE_QUICK(quick_scores)(
    REFEDGE_SCALAR const* query, REFEDGE_SCALAR const* keys, bool const* words, int pixels,
    int channels, int count, float* relevance, float* weights, float* moments) {
  refedge::Call c = refedge::norm_call(pixels, channels, count);
  c.in[0] = query, c.in[1] = keys, c.in[3] = words;
  c.out[1] = relevance, c.part[0] = weights, c.part[1] = moments;
  c.vector = refedge::vectors(refedge::kNormAttention, sizeof *query, c);
  refedge::norm_scores<REFEDGE_SCALAR>(c);
}

// The weights are there for their shape alone.
extern "C" __global__ void __launch_bounds__(refedge::kThreads) REFEDGE_QUICK(quick_columns)(
    REFEDGE_SCALAR const* values, bool const* words, float const*, float const* moments,
    float const* epsilon, int pixels, int channels, int count, REFEDGE_SCALAR* columns,
    float* mean) {
  refedge::Call c = refedge::norm_call(pixels, channels, count);
  c.in[2] = values, c.in[3] = words, c.epsilon = *epsilon;
  c.part[1] = const_cast<float*>(moments), c.part[2] = mean, c.part[3] = columns;
  refedge::norm_columns<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(refedge::kThreads) REFEDGE_QUICK(quick_thin)(
    REFEDGE_SCALAR const* first, REFEDGE_SCALAR const* columns, int channels, int padded,
    REFEDGE_SCALAR* thin) {
  refedge::Call c = refedge::norm_call(1, channels, padded);
  c.in[4] = first, c.part[3] = const_cast<REFEDGE_SCALAR*>(columns), c.part[4] = thin;
  c.vector = refedge::vectors(refedge::kNormAttention, sizeof *first, c);
  refedge::norm_thin<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(refedge::kThreads) REFEDGE_QUICK(quick_output)(
    float const* weights, float const* mean, REFEDGE_SCALAR const* columns,
    REFEDGE_SCALAR const* thin, REFEDGE_SCALAR const* second, int pixels, int channels, int count,
    REFEDGE_SCALAR* y) {
  refedge::Call c = refedge::norm_call(pixels, channels, count);
  c.part[0] = const_cast<float*>(weights), c.part[2] = const_cast<float*>(mean);
  c.part[3] = const_cast<REFEDGE_SCALAR*>(columns), c.part[4] = const_cast<REFEDGE_SCALAR*>(thin);
  c.in[5] = second, c.out[0] = y;
  c.vector = refedge::vectors(refedge::kNormAttention, sizeof *second, c);
  refedge::norm_output<REFEDGE_SCALAR>(c);
}
