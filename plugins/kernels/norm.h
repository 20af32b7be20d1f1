// NormAttention: query [B, C, N], keys [B, T, C], values [B, C, T], words [B, T], first and second
// [C, C] -> gated map [B, C, N], relevance [B, N] float. ../../docs/folding.md has the algebra.
#pragma once
#include "tile.h"

namespace refedge {

// Powers of two that cancel: centred weights of a flat attention are too small for half's normal
// range, columns are not large.
constexpr float kRaise = 256.f;

// Row and column of entry e of a lower triangle stored by rows.
__device__ inline void row_column(int e, int& i, int& j) {
  i = static_cast<int>((sqrtf(8.f * e + 1.f) - 1.f) * 0.5f);
  while (triangle(i + 1) <= e) ++i;
  while (triangle(i) > e) --i;
  j = e - triangle(i);
}

// Weights of a run of tiles, their largest per pixel, and their mean and centred second moments,
// tile by tile by Chan's rule: nothing is lost however flat the attention is.
template <class T> __device__ void norm_scores(Call const& c) {
  REFEDGE_SHARED(memory);
  constexpr int kDepth = depth_of(sizeof(T));
  constexpr int row = row_of(kTile, 4);
  int const chunk = blockIdx.x, b = blockIdx.z, lane = threadIdx.x % 32;
  float* const scores = reinterpret_cast<float*>(memory);
  T* const left = reinterpret_cast<T*>(scores + padded_words(c.words) * row);
  T* const right = left + kGroup * row_of(kDepth, sizeof(T));
  float* const mean = reinterpret_cast<float*>(right + kDepth * row_of(kTile, sizeof(T)));
  T const* const query = static_cast<T const*>(c.in[0]) + 1ll * b * c.channels * c.pixels;
  T const* const keys = static_cast<T const*>(c.in[1]) + 1ll * b * c.words * c.channels;
  Words const words(c, c.in[3], b);
  float* const weights =
      static_cast<float*>(c.part[0]) + 1ll * b * c.words * c.pixels;
  int const record = c.words + triangle(c.words);
  float* const running =
      static_cast<float*>(c.part[1]) + (1ll * b * c.chunks + chunk) * record;
  float* const moments = running + c.words;

  for (int tile = 0; tile < c.span; ++tile) {
    int const before = tile * kTile, p0 = chunk * c.span * kTile + before;
    int const pixels = min(kTile, c.pixels - p0);
    if (pixels <= 0) break;
    for (int t0 = 0; t0 < c.words; t0 += kGroup) {
      Product<T, kGroup, kTile> product;
      product.clear();
      for (int k = 0; k < c.channels; k += kDepth) {
        load_tile<kGroup, kDepth>(left, keys + 1ll * t0 * c.channels + k, c.channels, c.words - t0,
                                  c.channels - k, c.vector & 2);
        load_tile<kDepth, kTile>(right, query + 1ll * k * c.pixels + p0, c.pixels, c.channels - k,
                                 pixels, c.vector & 1);
        __syncthreads();
        product.template add<kDepth>(left, row_of(kDepth, sizeof(T)), right, row_of(kTile, sizeof(T)));
        __syncthreads();
      }
      product.store(scores + t0 * row, row);
    }
    __syncthreads();
    float const largest = word_softmax(scores, row, 1, words, c.words, pixels);
    int const p = threadIdx.x / 4;
    if (threadIdx.x % 4 == 0 && p < pixels)
      static_cast<float*>(c.out[1])[1ll * b * c.pixels + p0 + p] = largest;
    __syncthreads();
    for (int t = threadIdx.x / 32; t < c.words; t += kThreads / 32) {
      float* const line = scores + t * row;
      float const m = warp_sum(line[lane] + line[lane + 32]) / pixels;
      for (int q = lane; q < kTile; q += 32) {
        if (q < pixels) weights[1ll * t * c.pixels + p0 + q] = line[q];
        line[q] = q < pixels ? line[q] - m : 0.f;
      }
      if (lane == 0) mean[t] = m;
    }
    __syncthreads();
    float const meet = 1.f * before * pixels / (before + pixels);
    for (int e = threadIdx.x; e < triangle(c.words); e += kThreads) {
      int i, j;
      row_column(e, i, j);
      float sum = 0.f;
      for (int q = 0; q < kTile; ++q) {
        int const at = (q + lane) % kTile;
        sum += scores[i * row + at] * scores[j * row + at];
      }
      if (tile)
        sum += moments[e] + (mean[i] - running[i]) * (mean[j] - running[j]) * meet;
      moments[e] = sum;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < c.words; t += kThreads)
      running[t] = tile ? running[t] + (mean[t] - running[t]) * pixels / (before + pixels) : mean[t];
    __syncthreads();
  }
}

// Mean and covariance over all pixels, then the columns (U - U mean) / sqrt(diag(U cov U') + eps).
template <class T> __device__ void norm_columns(Call const& c) {
  REFEDGE_SHARED(memory);
  int const b = blockIdx.z, lane = threadIdx.x % 32, record = c.words + triangle(c.words);
  float* const mean = reinterpret_cast<float*>(memory);
  float* const covariance = mean + c.words;
  float const* const partial =
      static_cast<float const*>(c.part[1]) + 1ll * b * c.chunks * record;
  int const run = c.span * kTile;
  Words const words(c, c.in[3], b);

  int const wide = padded_words(c.words), warp = threadIdx.x / 32;
  float* const shares = covariance + triangle(c.words);  // a row a warp; the columns' room later
  for (int t = lane; t < c.words; t += 32) {
    float sum = 0.f;
#pragma unroll 8
    for (int k = warp; k < c.chunks; k += kThreads / 32)
      sum += partial[k * record + t] * min(run, c.pixels - k * run);
    shares[warp * wide + t] = sum;
  }
  __syncthreads();
  for (int t = threadIdx.x; t < c.words; t += kThreads) {
    float sum = 0.f;
    for (int k = 0; k < kThreads / 32; ++k) sum += shares[k * wide + t];
    mean[t] = sum / c.pixels;
    if (blockIdx.x == 0)
      static_cast<float*>(c.part[2])[1ll * b * c.words + t] = mean[t];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < triangle(c.words); e += kThreads) {
    int i, j;
    row_column(e, i, j);
    float sum = 0.f;
#pragma unroll 16
    for (int k = 0; k < c.chunks; ++k) {
      float const* const one = partial + k * record;
      sum += one[c.words + e] +
             (one[i] - mean[i]) * (one[j] - mean[j]) * min(run, c.pixels - k * run);
    }
    covariance[e] = sum / c.pixels;
  }
  __syncthreads();

  float* const shifted = shares + warp * wide;
  T const* const values = static_cast<T const*>(c.in[2]);
  T* const columns = static_cast<T*>(c.part[3]);
  int const channel = blockIdx.x * (kThreads / 32) + warp;  // one a warp: nothing waits in line
  if (channel < c.channels) {
    long long const at = 1ll * b * c.channels + channel;
    float common = 0.f, variance = 0.f;
    for (int t = lane; t < c.words; t += 32) {
      shifted[t] = words[t] ? to_float(values[at * c.words + t]) : 0.f;
      common += shifted[t] * mean[t];
    }
    common = warp_sum(common);
    for (int t = lane; t < wide; t += 32)
      shifted[t] = t < c.words && words[t] ? shifted[t] - common : 0.f;
    __syncwarp();
    for (int i = lane; i < c.words; i += 32) {
      float spread = 0.f;
      for (int j = 0; j < c.words; ++j)
        spread += covariance[triangle(max(i, j)) + min(i, j)] * shifted[j];
      variance += spread * shifted[i];
    }
    variance = fmaxf(warp_sum(variance), 0.f);
    float const scale = 1.f / (sqrtf(variance + c.epsilon) * kRaise);
    for (int t = lane; t < wide; t += 32)
      columns[at * wide + t] = from_float<T>(shifted[t] * scale);
  }
}

// first [C, C] x columns [C, T]: the gate's first map of what a word adds.
template <class T> __device__ void norm_thin(Call const& c) {
  REFEDGE_SHARED(memory);
  constexpr int kDepth = depth_of(sizeof(T));
  constexpr int row = row_of(kGroup, 4);
  int const r0 = blockIdx.x * kTile, t0 = blockIdx.y * kGroup, b = blockIdx.z;
  int const wide = padded_words(c.words), rows = min(kTile, c.channels - r0);
  float* const sums = reinterpret_cast<float*>(memory);
  T* const left = reinterpret_cast<T*>(sums + kTile * row);
  T* const right = left + kTile * row_of(kDepth, sizeof(T));
  T const* const first = static_cast<T const*>(c.in[4]) + 1ll * r0 * c.channels;
  T const* const columns =
      static_cast<T const*>(c.part[3]) + 1ll * b * c.channels * wide + t0;
  T* const thin =
      static_cast<T*>(c.part[4]) + (1ll * b * c.channels + r0) * wide + t0;

  Product<T, kTile, kGroup> product;
  product.clear();
  for (int k = 0; k < c.channels; k += kDepth) {
    load_tile<kTile, kDepth>(left, first + k, c.channels, rows, c.channels - k, c.vector & 16);
    load_tile<kDepth, kGroup>(right, columns + 1ll * k * wide, wide, c.channels - k, kGroup, true);
    __syncthreads();
    product.template add<kDepth>(left, row_of(kDepth, sizeof(T)), right, row_of(kGroup, sizeof(T)));
    __syncthreads();
  }
  product.store(sums, row);
  __syncthreads();
  for (int e = threadIdx.x; e < rows * kGroup; e += kThreads)
    thin[1ll * (e / kGroup) * wide + e % kGroup] =
        from_float<T>(sums[e / kGroup * row + e % kGroup]);
}

// tanh(second relu(thin P)) (columns P) for centred weights P, a tile of the output.
template <class T> __device__ void norm_output(Call const& c) {
  REFEDGE_SHARED(memory);
  constexpr int kDepth = depth_of(sizeof(T));
  constexpr int row = row_of(kTile, 4), line = row_of(kTile, sizeof(T));
  constexpr int deep = row_of(kDepth, sizeof(T)), narrow = row_of(kGroup, sizeof(T));
  int const r0 = blockIdx.x * kTile, p0 = blockIdx.y * kTile, b = blockIdx.z;
  int const rows = min(kTile, c.channels - r0), pixels = min(kTile, c.pixels - p0);
  int const wide = padded_words(c.words);
  float* const sums = reinterpret_cast<float*>(memory);
  T* const left = reinterpret_cast<T*>(sums + kTile * row);
  T* const centred = left + kTile * deep;
  T* const opened = centred + kGroup * line;
  float const* const weights =
      static_cast<float const*>(c.part[0]) + 1ll * b * c.words * c.pixels + p0;
  float const* const mean =
      static_cast<float const*>(c.part[2]) + 1ll * b * c.words;
  T const* const columns =
      static_cast<T const*>(c.part[3]) + (1ll * b * c.channels + r0) * wide;
  T const* const thin =
      static_cast<T const*>(c.part[4]) + 1ll * b * c.channels * wide;
  T const* const second = static_cast<T const*>(c.in[5]) + 1ll * r0 * c.channels;

  auto centre = [&](int t0) {
    for (int e = threadIdx.x; e < kGroup * kTile; e += kThreads) {
      int const t = t0 + e / kTile, p = e % kTile;
      float const v =
          t < c.words && p < pixels ? weights[1ll * t * c.pixels + p] - mean[t] : 0.f;
      centred[e / kTile * line + p] = from_float<T>(v * kRaise);
    }
  };
  Product<T, kTile, kTile> found, gate;
  found.clear();
  gate.clear();
  for (int t0 = 0; t0 < c.words; t0 += kGroup) {
    centre(t0);
    load_tile<kTile, kGroup>(left, columns + t0, wide, rows, kGroup, true);
    __syncthreads();
    found.template add<kGroup>(left, narrow, centred, line);
    __syncthreads();
  }
  for (int k = 0; k < c.channels; k += kDepth) {
    Product<T, kDepth, kTile> thinned;
    thinned.clear();
    for (int t0 = 0; t0 < c.words; t0 += kGroup) {
      if (c.words > kGroup) centre(t0);
      load_tile<kDepth, kGroup>(left, thin + 1ll * k * wide + t0, wide, c.channels - k, kGroup,
                                true);
      __syncthreads();
      thinned.template add<kGroup>(left, narrow, centred, line);
      __syncthreads();
    }
    thinned.combine(thinned, [](float v, float) { return fmaxf(v, 0.f); });
    thinned.store(sums, row);
    load_tile<kTile, kDepth>(left, second + k, c.channels, rows, c.channels - k, c.vector & 32);
    __syncthreads();
    for (int e = threadIdx.x; e < kDepth * kTile; e += kThreads)
      opened[e / kTile * line + e % kTile] =
          from_float<T>(sums[e / kTile * row + e % kTile]);
    __syncthreads();
    gate.template add<kDepth>(left, deep, opened, line);
    __syncthreads();
  }
  found.combine(gate, [](float v, float open) { return v * tanh_of<T>(open); });
  found.store(sums, row);
  __syncthreads();
  T* const y = static_cast<T*>(c.out[0]) + (1ll * b * c.channels + r0) * c.pixels + p0;
  store_tile(y, c.pixels, rows, pixels, c.vector & 256,
             [&](int r, int x) { return sums[r * row + x]; });
}

}  // namespace refedge
