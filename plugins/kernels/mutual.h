// MutualAttention: keys and values [B, H, T, d], words [B, T], seen_keys [B, H, d, N], seen_values
// [B, H, N, d] -> product [B, T, N], weights of the words [B, T, N] float.
#pragma once
#include "tile.h"

namespace refedge {

// Scores of 32 words from t0 on and one head for a tile of pixels, rows of 64 + 4 floats.
template <class T>
__device__ void mutual_scores(Call const& c, int b, int h, int t0, int p0, float* scores, T* left,
                              T* right) {
  constexpr int kDepth = depth_of(sizeof(T));
  T const* const keys =
      static_cast<T const*>(c.in[0]) + ((1ll * b * c.heads + h) * c.words + t0) * c.width;
  T const* const seen =
      static_cast<T const*>(c.in[3]) + (1ll * b * c.heads + h) * c.width * c.pixels + p0;
  Product<T, kGroup, kTile> product;
  product.clear();
  for (int k = 0; k < c.width; k += kDepth) {
    load_tile<kGroup, kDepth>(left, keys + k, c.width, c.words - t0, c.width - k, c.vector & 1);
    load_tile<kDepth, kTile>(right, seen + 1ll * k * c.pixels, c.pixels, c.width - k,
                             c.pixels - p0, c.vector & 8);
    __syncthreads();
    product.template add<kDepth>(left, row_of(kDepth, sizeof(T)), right, row_of(kTile, sizeof(T)));
    __syncthreads();
  }
  product.store(scores, row_of(kTile, 4));
}

// What 32 words see in a tile of pixels: largest score, sum of powers, powers x seen_values.
template <class T> __device__ void mutual_seen(Call const& c) {
  REFEDGE_SHARED(memory);
  constexpr int kDepth = depth_of(sizeof(T));
  constexpr int row = row_of(kTile, 4), line = row_of(kTile, sizeof(T));
  int const chunk = blockIdx.x, h = blockIdx.y % c.heads, t0 = blockIdx.y / c.heads * kGroup;
  int const b = blockIdx.z, p0 = chunk * kTile, lane = threadIdx.x % 32;
  int const pixels = min(kTile, c.pixels - p0), words = min(kGroup, c.words - t0);
  float* const scores = reinterpret_cast<float*>(memory);
  T* const powers = reinterpret_cast<T*>(scores + kGroup * row);
  T* const left = powers + kGroup * line;
  T* const right = left + kGroup * row_of(kDepth, sizeof(T));
  long long const first = ((1ll * b * c.heads + h) * c.chunks + chunk) * c.words + t0;
  float* const tops = static_cast<float*>(c.part[0]) + first * 2;
  float* const sums = static_cast<float*>(c.part[1]) + first * c.width;
  T const* const values =
      static_cast<T const*>(c.in[4]) + ((1ll * b * c.heads + h) * c.pixels + p0) * c.width;

  mutual_scores(c, b, h, t0, p0, scores, left, right);
  __syncthreads();
  for (int t = threadIdx.x / 32; t < kGroup; t += kThreads / 32) {
    float top = kLowest, sum = 0.f;
    for (int p = lane; p < pixels; p += 32) top = fmaxf(top, scores[t * row + p]);
    top = warp_max(top);
    for (int p = lane; p < kTile; p += 32) {
      float const power = t < words && p < pixels ? expf(scores[t * row + p] - top) : 0.f;
      powers[t * line + p] = from_float<T>(power);
      sum += power;
    }
    sum = warp_sum(sum);
    if (lane == 0 && t < words) tops[2 * t] = top, tops[2 * t + 1] = sum;
  }
  __syncthreads();
  for (int d0 = 0; d0 < c.width; d0 += kTile) {
    Product<T, kGroup, kTile> product;
    product.clear();
    for (int k = 0; k < kTile; k += kDepth) {
      load_tile<kDepth, kTile>(right, values + 1ll * k * c.width + d0, c.width, pixels - k,
                               c.width - d0, c.vector & 16);
      __syncthreads();
      product.template add<kDepth>(powers + k, line, right, row_of(kTile, sizeof(T)));
      __syncthreads();
    }
    product.store(scores, row);
    __syncthreads();
    for (int e = threadIdx.x; e < words * kTile; e += kThreads)
      if (d0 + e % kTile < c.width)
        sums[1ll * (e / kTile) * c.width + d0 + e % kTile] = scores[e / kTile * row + e % kTile];
    __syncthreads();
  }
}

// All tiles together, then the product of what a word saw with the values of every word.
template <class T> __device__ void mutual_pairs(Call const& c) {
  REFEDGE_SHARED(memory);
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const s = blockIdx.x * (kThreads / 32) + warp, h = blockIdx.y, b = blockIdx.z;
  float* const seen = reinterpret_cast<float*>(memory) + warp * c.width;
  long long const head = 1ll * b * c.heads + h;
  float const* const tops = static_cast<float const*>(c.part[0]);
  float const* const sums = static_cast<float const*>(c.part[1]);
  Words const words(c, c.in[2], b);
  if (s >= c.words) return;
  T* const pairs =
      static_cast<T*>(c.part[2]) + (head * c.words + s) * padded_words(c.words);
  bool const there = words.any && words[s];
  if (there) {
    float top = kLowest, total = 0.f;
    for (int k = lane; k < c.chunks; k += 32)
      top = fmaxf(top, tops[((head * c.chunks + k) * c.words + s) * 2]);
    top = warp_max(top);
    for (int k = lane; k < c.chunks; k += 32) {
      float const* const one = tops + ((head * c.chunks + k) * c.words + s) * 2;
      total += expf(one[0] - top) * one[1];
    }
    float const share = rsqrtf(1.f * c.heads * c.width) / warp_sum(total);
    for (int d = lane; d < c.width; d += 32) {
      float sum = 0.f;
#pragma unroll 4
      for (int k = 0; k < c.chunks; ++k) {
        long long const at = (head * c.chunks + k) * c.words + s;
        sum += expf(tops[at * 2] - top) * sums[at * c.width + d];
      }
      seen[d] = sum * share;
    }
  }
  __syncwarp();
  T const* const values = static_cast<T const*>(c.in[1]) + head * c.words * c.width;
  for (int t = lane; t < padded_words(c.words); t += 32) {
    float sum = 0.f;
    if (there && t < c.words && words[t]) {
      T const* const one = values + t * c.width;
#pragma unroll 8
      for (int d = 0; d < c.width; ++d) sum += seen[d] * to_float(one[d]);
    }
    pairs[t] = from_float<T>(sum);
  }
}

// Softmax over the words, its mean over the heads, and the sum of pairs x weights, for a tile.
template <class T> __device__ void mutual_product(Call const& c) {
  REFEDGE_SHARED(memory);
  constexpr int kDepth = depth_of(sizeof(T));
  constexpr int row = row_of(kTile, 4), line = row_of(kTile, sizeof(T));
  int const p0 = blockIdx.x * kTile, s0 = blockIdx.y * kGroup, b = blockIdx.z;
  int const pixels = min(kTile, c.pixels - p0), wide = padded_words(c.words);
  float* const scores = reinterpret_cast<float*>(memory);
  T* const left = reinterpret_cast<T*>(scores + wide * row);
  T* const right = left + kGroup * row_of(kDepth, sizeof(T));
  T const* const pairs = static_cast<T const*>(c.part[2]);
  float* const told =
      static_cast<float*>(c.out[1]) + 1ll * b * c.words * c.pixels + p0;
  Words const words(c, c.in[2], b);

  Product<T, kGroup, kTile> product;
  product.clear();
  for (int h = 0; h < c.heads; ++h) {
    for (int t0 = 0; t0 < c.words; t0 += kGroup)
      mutual_scores(c, b, h, t0, p0, scores + t0 * row, left, right);
    __syncthreads();
    word_softmax(scores, row, 1, words, c.words, pixels);
    __syncthreads();
    for (int e = threadIdx.x; blockIdx.y == 0 && e < c.words * kTile; e += kThreads) {
      int const t = e / kTile, p = e % kTile;
      float* const at = told + 1ll * t * c.pixels + p;
      if (p < pixels) *at = (h ? *at : 0.f) + scores[t * row + p] / c.heads;
    }
    for (int t0 = 0; t0 < c.words; t0 += kGroup) {
      load_tile<kGroup, kGroup>(left,
                                pairs + ((1ll * b * c.heads + h) * c.words + s0) * wide + t0, wide,
                                c.words - s0, kGroup, true);
      for (int e = threadIdx.x; e < kGroup * kTile; e += kThreads) {
        int const t = e / kTile, p = e % kTile;
        right[t * line + p] =
            from_float<T>(t0 + t < c.words ? scores[(t0 + t) * row + p] : 0.f);
      }
      __syncthreads();
      product.template add<kGroup>(left, row_of(kGroup, sizeof(T)), right, line);
      __syncthreads();
    }
  }
  product.store(scores, row);
  __syncthreads();
  T* const y = static_cast<T*>(c.out[0]) + (1ll * b * c.words + s0) * c.pixels + p0;
  store_tile(y, c.pixels, min(kGroup, c.words - s0), pixels, c.vector & 256,
             [&](int r, int x) { return scores[r * row + x]; });
}

}  // namespace refedge
