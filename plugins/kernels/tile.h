// Pieces that all kernels are made of: tiles in shared memory, their products, softmax, sums.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>
#define REFEDGE_SHARED(name) extern __shared__ __align__(128) char name[]
#endif
#include "call.h"

namespace refedge {

using half = __half;
using bfloat = __nv_bfloat16;

constexpr float kLowest = -3.4028235e38f;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(half v) { return __half2float(v); }
__device__ inline float to_float(bfloat v) { return __bfloat162float(v); }
template <class T> __device__ T from_float(float v);
template <> __device__ inline float from_float<float>(float v) { return v; }
template <> __device__ inline half from_float<half>(float v) { return __float2half_rn(v); }
template <> __device__ inline bfloat from_float<bfloat>(float v) { return __float2bfloat16_rn(v); }

template <class T> __device__ inline float tanh_of(float v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {  // to 2^-11 of itself, as good as the type
    float found;
    asm("tanh.approx.f32 %0, %1;" : "=f"(found) : "f"(v));
    return found;
  }
#endif
  return tanhf(v);
}

__device__ inline float warp_sum(float v) {
  for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(~0u, v, mask);
  return v;
}
__device__ inline float warp_max(float v) {
  for (int mask = 16; mask; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, mask));
  return v;
}

// Which words there are; without any, all of them count alike (their scores are zero).
struct Words {
  bool const* given;
  bool any;
  __device__ Words(Call const& c, void const* words, int b)
      : given(static_cast<bool const*>(words) + 1ll * b * c.words),
        any(__syncthreads_or(int(threadIdx.x) < c.words && given[threadIdx.x])) {}
  __device__ bool operator[](int t) const { return !any || given[t]; }
};

// Copy [ROWS, COLUMNS] to shared memory, zero beyond `rows` and `columns`; 16 bytes at a time where
// `vector` says that rows start at multiples of 16 bytes.
template <int ROWS, int COLUMNS, class T>
__device__ void load_tile(T* to, T const* from, long long stride, int rows, int columns,
                          bool vector) {
  constexpr int piece = 16 / sizeof(T), line = COLUMNS / piece;
  for (int e = threadIdx.x; e < ROWS * line; e += kThreads) {
    int const r = e / line, c = e % line * piece;
    T* const at = to + r * row_of(COLUMNS, sizeof(T)) + c;
    if (vector && r < rows && c + piece <= columns) {
      *reinterpret_cast<uint4*>(at) = *reinterpret_cast<uint4 const*>(from + r * stride + c);
    } else {
      for (int i = 0; i < piece; ++i)
        at[i] = r < rows && c + i < columns ? from[r * stride + c + i] : from_float<T>(0.f);
    }
  }
}

// Write float elements value(r, c) as type T, four neighbours at a time where `vector` allows it.
template <class T, class F>
__device__ void store_tile(T* to, long long stride, int rows, int columns, bool vector,
                           F const& value) {
  struct alignas(4 * sizeof(T)) Four {
    T v[4];
  };
  for (int e = threadIdx.x; e < kTile * kTile / 4; e += kThreads) {
    int const r = e / (kTile / 4), c = e % (kTile / 4) * 4;
    if (r >= rows) break;
    if (vector && c + 4 <= columns) {
      Four four;
      for (int i = 0; i < 4; ++i) four.v[i] = from_float<T>(value(r, c + i));
      *reinterpret_cast<Four*>(to + r * stride + c) = four;
    } else {
      for (int i = 0; i < 4 && c + i < columns; ++i)
        to[r * stride + c + i] = from_float<T>(value(r, c + i));
    }
  }
}

template <class T> constexpr bool has_mma = false;
template <> constexpr bool has_mma<half> = true;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
template <> constexpr bool has_mma<bfloat> = true;
#endif

// A [ROWS, COLUMNS] float sum of products of tiles, spread over the threads of a block.
template <class T, int ROWS, int COLUMNS, bool MMA = has_mma<T>> struct Product;

template <class T, int ROWS, int COLUMNS> struct Product<T, ROWS, COLUMNS, false> {
  static constexpr int R = ROWS / 16, C = COLUMNS / 16;
  float sum[R][C];

  __device__ void clear() {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) sum[i][j] = 0.f;
  }
  // Add a [ROWS, DEPTH] x b [DEPTH, COLUMNS]; `row_a`, `row_b` elements from row to row.
  template <int DEPTH> __device__ void add(T const* a, int row_a, T const* b, int row_b) {
    int const y = threadIdx.x / 16 * R, x = threadIdx.x % 16 * C;
#pragma unroll 8
    for (int k = 0; k < DEPTH; ++k) {
      float left[R], right[C];
#pragma unroll
      for (int i = 0; i < R; ++i) left[i] = to_float(a[(y + i) * row_a + k]);
#pragma unroll
      for (int j = 0; j < C; ++j) right[j] = to_float(b[k * row_b + x + j]);
#pragma unroll
      for (int i = 0; i < R; ++i)
#pragma unroll
        for (int j = 0; j < C; ++j) sum[i][j] += left[i] * right[j];
    }
  }
  // Each element by `f` of itself and of another sum's element at its place.
  template <class F> __device__ void combine(Product const& other, F const& f) {
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) sum[i][j] = f(sum[i][j], other.sum[i][j]);
  }
  __device__ void store(float* to, int row) const {
    int const y = threadIdx.x / 16 * R, x = threadIdx.x % 16 * C;
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < C; ++j) to[(y + i) * row + x + j] = sum[i][j];
  }
};

// The same by tensor cores: each warp holds whole 16 x 16 pieces.
template <class T, int ROWS, int COLUMNS> struct Product<T, ROWS, COLUMNS, true> {
  static constexpr int line = COLUMNS / 16, pieces = ROWS / 16 * line, each = pieces / 8;
  static_assert(pieces % 8 == 0, "one or more pieces a warp");
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[each];

  __device__ void clear() {
    for (int i = 0; i < each; ++i) nvcuda::wmma::fill_fragment(sum[i], 0.f);
  }
  template <int DEPTH> __device__ void add(T const* a, int row_a, T const* b, int row_b) {
    using namespace nvcuda::wmma;
    int const first = threadIdx.x / 32 * each, y = first / line * 16;
    static_assert(line % each == 0, "the pieces of a warp lie in one row");
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      fragment<matrix_a, 16, 16, 16, T, row_major> left;
      load_matrix_sync(left, a + y * row_a + k, row_a);
#pragma unroll
      for (int i = 0; i < each; ++i) {
        fragment<matrix_b, 16, 16, 16, T, row_major> right;
        load_matrix_sync(right, b + k * row_b + (first + i) % line * 16, row_b);
        mma_sync(sum[i], left, right, sum[i]);
      }
    }
  }
  // Where an element lies in a fragment is not told, but it is the same for all fragments of a type.
  template <class F> __device__ void combine(Product const& other, F const& f) {
#pragma unroll
    for (int i = 0; i < each; ++i)
#pragma unroll
      for (int e = 0; e < sum[i].num_elements; ++e)
        sum[i].x[e] = f(sum[i].x[e], other.sum[i].x[e]);
  }
  __device__ void store(float* to, int row) const {
    int const first = threadIdx.x / 32 * each;
    for (int i = 0; i < each; ++i)
      nvcuda::wmma::store_matrix_sync(to + (first + i) / line * 16 * row + (first + i) % line * 16,
                                      sum[i], row, nvcuda::wmma::mem_row_major);
  }
};

// Softmax over the words of each of 64 pixels, in place; score (t, p) at t * word + p * pixel.
// Four neighbouring threads share a pixel. Pixels from `pixels` on and words that are not there get
// zero. Returns the largest weight of the thread's pixel, threadIdx.x / 4.
__device__ inline float word_softmax(float* scores, int word, int pixel, Words const& words,
                                     int count, int pixels) {
  float* const mine = scores + threadIdx.x / 4 * pixel;
  float top = kLowest, sum = 0.f;
  for (int t = threadIdx.x % 4; t < count; t += 4)
    if (words[t]) top = fmaxf(top, words.any ? mine[t * word] : 0.f);
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  for (int t = threadIdx.x % 4; t < count; t += 4) {
    float const power = words[t] ? expf((words.any ? mine[t * word] : 0.f) - top) : 0.f;
    mine[t * word] = power;
    sum += power;
  }
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  float const share = static_cast<int>(threadIdx.x) / 4 < pixels ? 1.f / sum : 0.f;
  for (int t = threadIdx.x % 4; t < count; t += 4)
    mine[t * word] = share != 0.f ? mine[t * word] * share : 0.f;
  return share;
}

}  // namespace refedge
