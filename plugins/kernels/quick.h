// Included by quick.cu once a type, so without a guard. Inputs are not written to, const or not.

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    REFEDGE_NAME(quick_cross_attention)(REFEDGE_SCALAR const* x, REFEDGE_SCALAR const* keys,
                                        REFEDGE_SCALAR const* values, bool const* words,
                                        REFEDGE_SCALAR const* offset, int pixels, int channels,
                                        int count, int heads, int width, REFEDGE_SCALAR* y) {
  Call c = call_of(kCrossAttention, {pixels, channels, count, heads, width});
  c.in[0] = x, c.in[1] = keys, c.in[2] = values, c.in[3] = words, c.in[4] = offset, c.out[0] = y;
  c.fits = fits(kCrossAttention, sizeof *x, c);
  cross_attention<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(kThreads, REFEDGE_BLOCKS)
    REFEDGE_NAME(quick_norm_scores)(REFEDGE_SCALAR const* query, REFEDGE_SCALAR const* keys,
                                    bool const* words, int pixels, int channels, int count,
                                    float* relevance, REFEDGE_SCALAR* weights, float* means,
                                    float* moments) {
  Call c = call_of(kNormAttention, {pixels, channels, count});
  c.in[0] = query, c.in[1] = keys, c.in[3] = words, c.out[1] = relevance;
  c.part[0] = weights, c.part[1] = means, c.part[2] = moments;
  c.fits = fits(kNormAttention, sizeof *query, c);
  norm_scores<REFEDGE_SCALAR>(c);
}

// Here and in norm_output, the relevance is there for its shape alone.
extern "C" __global__ void __launch_bounds__(kThreads, REFEDGE_BLOCKS)
    REFEDGE_NAME(quick_norm_columns)(REFEDGE_SCALAR const* values, bool const* words,
                                     float* moments, float const* epsilon, float const*, int pixels,
                                     int channels, int count, REFEDGE_SCALAR* columns,
                                     float* mean) {
  Call c = call_of(kNormAttention, {pixels, channels, count});
  c.in[2] = values, c.in[3] = words, c.epsilon = *epsilon;
  c.part[2] = moments, c.part[3] = mean, c.part[4] = columns;
  norm_columns<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(kThreads, REFEDGE_BLOCKS)
    REFEDGE_NAME(quick_norm_thin)(REFEDGE_SCALAR const* first, REFEDGE_SCALAR* columns,
                                  int channels, int padded, REFEDGE_SCALAR* thin) {
  Call c = call_of(kNormAttention, {1, channels, padded});
  c.in[4] = first, c.part[4] = columns, c.part[5] = thin;
  c.fits = fits(kNormAttention, sizeof *first, c);
  norm_thin<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(kThreads, REFEDGE_BLOCKS)
    REFEDGE_NAME(quick_norm_output)(REFEDGE_SCALAR* weights, float* means, float* mean,
                                    REFEDGE_SCALAR* columns, REFEDGE_SCALAR* thin,
                                    REFEDGE_SCALAR const* second, float const*, int pixels,
                                    int channels, int count, REFEDGE_SCALAR* y) {
  Call c = call_of(kNormAttention, {pixels, channels, count});
  c.in[5] = second, c.out[0] = y, c.part[0] = weights, c.part[1] = means;
  c.part[3] = mean, c.part[4] = columns, c.part[5] = thin;
  c.fits = fits(kNormAttention, sizeof *second, c);
  norm_output<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(kThreads, REFEDGE_BLOCKS)
    REFEDGE_NAME(quick_mutual_seen)(REFEDGE_SCALAR const* keys, REFEDGE_SCALAR const* seen_keys,
                                    REFEDGE_SCALAR const* seen_values, int pixels, int count,
                                    int heads, int width, float* tops, float* sums) {
  Call c = call_of(kMutualAttention, {pixels, 1, count, heads, width});
  c.in[0] = keys, c.in[3] = seen_keys, c.in[4] = seen_values;
  c.part[0] = tops, c.part[1] = sums;
  c.fits = fits(kMutualAttention, sizeof *keys, c);
  mutual_seen<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(kThreads, REFEDGE_BLOCKS)
    REFEDGE_NAME(quick_mutual_pairs)(REFEDGE_SCALAR const* values, bool const* words, float* tops,
                                     float* sums, int chunks, int count, int heads, int width,
                                     REFEDGE_SCALAR* pairs) {
  Call c = call_of(kMutualAttention, {1, 1, count, heads, width});
  c.chunks = chunks, c.in[1] = values, c.in[2] = words;
  c.part[0] = tops, c.part[1] = sums, c.part[2] = pairs;
  mutual_pairs<REFEDGE_SCALAR>(c);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    REFEDGE_NAME(quick_mutual_product)(REFEDGE_SCALAR const* keys, bool const* words,
                                       REFEDGE_SCALAR const* seen_keys, REFEDGE_SCALAR* pairs,
                                       int pixels, int count, int heads, int width,
                                       REFEDGE_SCALAR* product, float* told) {
  Call c = call_of(kMutualAttention, {pixels, 1, count, heads, width});
  c.in[0] = keys, c.in[2] = words, c.in[3] = seen_keys;
  c.out[0] = product, c.out[1] = told, c.part[2] = pairs;
  c.fits = fits(kMutualAttention, sizeof *keys, c);
  mutual_product<REFEDGE_SCALAR>(c);
}
