// CrossAttention: x [B, N, C], keys [B, C, H, T], values [B, H, T, D], words [B, T], offset
// [B, H, T] -> [B, N, D].
#pragma once
#include "tile.h"

namespace refedge {

// The weights of one head for a tile of pixels, to the workspace.
template <class T> __device__ void cross_weights(Call const& c) {
  REFEDGE_SHARED(memory);
  constexpr int kDepth = depth_of(sizeof(T));
  int const h = blockIdx.x, p0 = blockIdx.y * kTile, b = blockIdx.z;
  int const pixels = min(kTile, c.pixels - p0), row = row_of(padded_words(c.words), 4);
  float* const scores = reinterpret_cast<float*>(memory);
  T* const left = reinterpret_cast<T*>(scores + kTile * row);
  T* const right = left + kTile * row_of(kDepth, sizeof(T));
  T const* const x = static_cast<T const*>(c.in[0]) + (1ll * b * c.pixels + p0) * c.channels;
  int const columns = c.heads * c.words;
  T const* const keys =
      static_cast<T const*>(c.in[1]) + 1ll * b * c.channels * columns + h * c.words;
  T const* const offset = static_cast<T const*>(c.in[4]) + 1ll * b * columns + h * c.words;
  Words const words(c, c.in[3], b);

  for (int t0 = 0; t0 < c.words; t0 += kGroup) {
    Product<T, kTile, kGroup> product;
    product.clear();
    for (int k = 0; k < c.channels; k += kDepth) {
      load_tile<kTile, kDepth>(left, x + k, c.channels, pixels, c.channels - k, c.vector & 1);
      load_tile<kDepth, kGroup>(right, keys + 1ll * k * columns + t0, columns, c.channels - k,
                                c.words - t0, c.vector & 2);
      __syncthreads();
      product.template add<kDepth>(left, row_of(kDepth, sizeof(T)), right, row_of(kGroup, sizeof(T)));
      __syncthreads();
    }
    product.store(scores + t0, row);
  }
  __syncthreads();
  // the scores that this thread reads in word_softmax, so that there is nothing to wait for
  for (int t = threadIdx.x % 4; t < c.words; t += 4)
    scores[threadIdx.x / 4 * row + t] += to_float(offset[t]);
  word_softmax(scores, 1, row, words, c.words, pixels);
  __syncthreads();
  T* const weights = static_cast<T*>(c.part[0]);
  for (int e = threadIdx.x; e < pixels * c.words; e += kThreads) {
    int const p = e / c.words, t = e % c.words;
    weights[((1ll * b * c.pixels + p0 + p) * c.heads + h) * c.words + t] =
        from_float<T>(scores[p * row + t]);
  }
}

// weights [N, H T] x values [H T, D], a tile of the output.
template <class T> __device__ void cross_output(Call const& c) {
  REFEDGE_SHARED(memory);
  int const d0 = blockIdx.x * kTile, p0 = blockIdx.y * kTile, b = blockIdx.z;
  int const pixels = min(kTile, c.pixels - p0), depth = c.heads * c.words;
  constexpr int row = row_of(kTile, 4);
  float* const sums = reinterpret_cast<float*>(memory);
  T* const left = reinterpret_cast<T*>(sums + kTile * row);
  T* const right = left + kTile * row_of(kGroup, sizeof(T));
  T const* const weights = static_cast<T const*>(c.part[0]) + (1ll * b * c.pixels + p0) * depth;
  T const* const values = static_cast<T const*>(c.in[2]) + 1ll * b * depth * c.width + d0;
  bool const aligned = depth % (16 / sizeof(T)) == 0;

  Product<T, kTile, kTile> product;
  product.clear();
  for (int k = 0; k < depth; k += kGroup) {
    load_tile<kTile, kGroup>(left, weights + k, depth, pixels, depth - k, aligned);
    load_tile<kGroup, kTile>(right, values + 1ll * k * c.width, c.width, depth - k, c.width - d0,
                             c.vector & 4);
    __syncthreads();
    product.template add<kGroup>(left, row_of(kGroup, sizeof(T)), right, row_of(kTile, sizeof(T)));
    __syncthreads();
  }
  product.store(sums, row);
  __syncthreads();
  T* const y = static_cast<T*>(c.out[0]) + (1ll * b * c.pixels + p0) * c.width + d0;
  store_tile(y, c.width, pixels, c.width - d0, c.vector & 256,
             [&](int r, int x) { return sums[r * row + x]; });
}

}  // namespace refedge
