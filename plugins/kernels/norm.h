// NormAttention: query [B, C, N], keys [B, T, C], values [B, C, T], words [B, T], first and second
// [C, C] -> gated map [B, C, N], relevance [B, N] float. ../../docs/folding.md has the algebra.
#pragma once
#include "softmax.h"

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

// This lane's centred weights of a strip and 32 words in the workspace, in the order of pairs, so
// that words that are not there are neither written nor read.
template <class T>
__device__ inline Eight<T>* strip_of(Call const& c, int b, int strip, int t0) {
  long long const strips = ceil_div(c.pixels, kPiece);
  long long const group = (b * strips + strip) * groups_of(c.words) + t0 / kPiece;
  return static_cast<Eight<T>*>(c.part[0]) + group * 4 * 32 + lane_of();
}
template <class T>
__device__ inline void keep(Eight<T>* at, Piece<T> const& piece, int words) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (lane_of() % 4 * 8 + 2 * k < words)
      at[k * 32] = {
          {piece.line[0].v[k], piece.line[1].v[k], piece.line[2].v[k], piece.line[3].v[k]}};
}
template <class T>
__device__ inline void recall(Piece<T>& piece, Eight<T> const* at, int words) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    Eight<T> found{};
    if (lane_of() % 4 * 8 + 2 * k < words) found = at[k * 32];
#pragma unroll
    for (int i = 0; i < 4; ++i) piece.line[i].v[k] = found.v[i];
  }
}

// A piece's elements as lines: its pixels become elements. Line i of lane 4 g + t is then element
// 8 (g / 2) + 2 i + g % 2 of the lines that were.
template <class T>
__device__ inline void turn(Piece<T>& to, Piece<T> const& from) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) to.line[i].v[k] = flip<T>(from.line[k].v[i]);
}

// Weights of strips of 32 pixels, centred by their mean over the strip; their largest per pixel;
// and the mean and centred second moments of a block's strips, by Chan's rule: nothing is lost
// however flat the attention is. Where there are many channels, several warps share a strip.
template <class T>
__device__ void norm_scores(Call const& c) {
  REFEDGE_SHARED(memory);
  int const each = strips_of(c), ways = kWarps / each;
  int const b = blockIdx.z, lane = lane_of(), wide = padded_words(c.words);
  int const mine = warp_of() / ways, way = warp_of() % ways;
  float* const room = reinterpret_cast<float*>(memory);  // sums of ways, then squares of moments
  float* const means = room + kWarps * kSquare;  // a row a strip, then so far, then with this turn
  float* const before = means + each * wide;
  float* const after = before + wide;
  T const* const query = static_cast<T const*>(c.in[0]) + 1ll * b * c.channels * c.pixels;
  T const* const keys = static_cast<T const*>(c.in[1]) + 1ll * b * c.words * c.channels;
  Words words(c, c.in[3], b);
  float* const record =
      static_cast<float*>(c.part[2]) + (1ll * b * c.chunks + blockIdx.x) * record_of(c.words);
  int const strips = ceil_div(c.pixels, kPiece), used = c.words + triangle(c.words);
  if (used + static_cast<int>(threadIdx.x) < record_of(c.words))
    record[used + threadIdx.x] = 0.f;  // read with the last moments

  for (int turn_of = 0; turn_of < c.span; ++turn_of) {
    int const first = (blockIdx.x * c.span + turn_of) * each, strip = first + mine;
    if (first >= strips) break;
    int const p0 = strip * kPiece, pixels = min(max(c.pixels - p0, 0), kPiece);
    Softmax<T> softmax;
    Piece<T> centred;
    auto scores = [&](Sums<>& sums, int t0) {
      for (int k = way * kPiece; k < c.channels && pixels; k += ways * kPiece) {
        Piece<T> left, right;
        lines(right, keys + 1ll * t0 * c.channels + k, c.channels, c.words - t0, c.channels - k,
              fit_of(c, 1));
        columns(left, query + 1ll * k * c.pixels + p0, c.pixels, first_of(c.channels - k), pixels,
                fit_of(c, 0));
        multiply(sums, left, right.line);
      }
      words.meet();
      if (ways == 1) return;
#pragma unroll
      for (int e = 0; e < 32; ++e)
        if (way) room[(warp_of() * 32 + e) * 32 + lane] = sums.at(e / 8, e % 8);
      __syncthreads();
      for (int other = 1; other < ways && !way; ++other)
#pragma unroll
        for (int e = 0; e < 32; ++e)
          sums.at(e / 8, e % 8) += room[((warp_of() + other) * 32 + e) * 32 + lane];
    };
    word_softmax(softmax, words, 0, scores, [&](Sums<>& weights, int t0) {
      if (way || !pixels) return;
      int const line = lane / 4 * 4;
      float mean[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        mean[k] = 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (line + i < pixels) mean[k] += weights.at(i, k);
        mean[k] = cross_sum(mean[k]) / pixels;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          centred.line[i].v[k] =
              line + i < pixels ? pair<T>((weights.at(i, 2 * k) - mean[2 * k]) * kRaise,
                                          (weights.at(i, 2 * k + 1) - mean[2 * k + 1]) * kRaise)
                                : pair<T>(0.f, 0.f);
      keep(strip_of<T>(c, b, strip, t0), centred, c.words - t0);
      if (lane < 4) {
        float* const kept =
            static_cast<float*>(c.part[1]) + (1ll * b * strips + strip) * c.words + t0;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          means[mine * wide + t0 + lane * 8 + k] = mean[k];
          if (t0 + lane * 8 + k < c.words) kept[lane * 8 + k] = mean[k];
        }
      }
    });
    if (!way && lane % 4 == 0) {
      float* const largest = static_cast<float*>(c.out[1]) + 1ll * b * c.pixels + p0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (lane + i < pixels) largest[lane + i] = 1.f / softmax.sum[i];
    }
    __syncthreads();
    auto count = [&](int s) { return min(max(c.pixels - (first + s) * kPiece, 0), kPiece); };
    float const seen = 1.f * turn_of * each * kPiece;  // all of them there
    float all = seen;
    for (int s = 0; s < each; ++s) all += count(s);
    for (int t = threadIdx.x; t < c.words; t += kThreads) {
      float sum = turn_of ? seen * before[t] : 0.f;
      for (int s = 0; s < each; ++s)
        if (count(s)) sum += count(s) * means[s * wide + t];
      record[t] = after[t] = sum / all;
    }
    for (int a0 = 0; a0 < c.words; a0 += kPiece)
      for (int b0 = 0; b0 <= a0; b0 += kPiece) {
        __syncthreads();
        if (!way && pixels) {
          Piece<T> rows, others;
          if (c.words > kPiece) recall(centred, strip_of<T>(c, b, strip, a0), c.words - a0);
          turn(rows, centred);
          if (c.words > kPiece) recall(centred, strip_of<T>(c, b, strip, b0), c.words - b0);
          others = rows;
          if (b0 < a0) turn(others, centred);
          Sums<> sums;
          multiply(sums, rows, others.line);
          int const row = lane / 8 * 8 + lane / 4 % 2, column = lane % 4 * 8;
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int k = 0; k < 8; ++k)
              room[mine * kSquare + (row + 2 * i) * 33 + column + 2 * (k % 4) + k / 4] =
                  sums.at(i, k);
        }
        __syncthreads();
        int const height = min(c.words - a0, kPiece),
                  entries = a0 == b0 ? triangle(height) : height * kPiece;
        for (int e = threadIdx.x; e < entries; e += kThreads) {
          int r = e / kPiece, q = e % kPiece;
          if (a0 == b0) row_column(e, r, q);
          int const i = a0 + r, j = b0 + q;
          float* const at = record + c.words + triangle(i) + j;
          float sum = 0.f;
#pragma unroll 4
          for (int s = 0; s < each; ++s)
            if (count(s)) {
              float const apart = means[s * wide + i] - after[i];
              sum += room[s * kSquare + r * 33 + q] / (kRaise * kRaise) +
                     count(s) * apart * (means[s * wide + j] - after[j]);
            }
          if (turn_of) sum += *at + seen * (before[i] - after[i]) * (before[j] - after[j]);
          *at = sum;
        }
      }
    __syncthreads();
    for (int t = threadIdx.x; t < c.words; t += kThreads) before[t] = after[t];
    __syncthreads();
  }
}

// Mean and covariance over all pixels, then the columns (U - U mean) / sqrt(diag(U cov U') + eps).
template <class T>
__device__ void norm_columns(Call const& c) {
  REFEDGE_SHARED(memory);
  int const b = blockIdx.z, lane = lane_of(), warp = warp_of(), wide = padded_words(c.words);
  int const record = record_of(c.words), quads = record / 4;
  float* const raw = reinterpret_cast<float*>(memory);  // sums of records, later the covariance
  float* const mean = raw + kThreads * 4 + record;
  float* const shares = mean + wide;  // a row of pairs a warp
  float const* const partial = static_cast<float const*>(c.part[2]) + 1ll * b * c.chunks * record;
  int const run = c.span * strips_of(c) * kPiece;
  Words words(c, c.in[3], b);

  // a word's values for the channels of this warp, under way while the moments meet
  constexpr int kEach = kPiece / kWarps;
  T const* const values = static_cast<T const*>(c.in[2]);
  int const channel0 = blockIdx.x * kPiece + warp * kEach;
  float own[kEach] = {};
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (lane < c.words && channel0 + k < c.channels)
      own[k] = to_float(values[(1ll * b * c.channels + channel0 + k) * c.words + lane]);

  int const parts = max(kThreads / quads, 1);
  for (int e = threadIdx.x; e < parts * quads; e += kThreads) {
    float sum[4] = {};
    for (int k0 = e / quads; k0 < c.chunks; k0 += 8 * parts) {
      Four<float> found[8] = {};
#pragma unroll
      for (int u = 0; u < 8; ++u)
        if (k0 + u * parts < c.chunks)
          found[u] = *reinterpret_cast<Four<float> const*>(
              partial + 1ll * (k0 + u * parts) * record + e % quads * 4);
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        sum[0] += found[u].v[0].low, sum[1] += found[u].v[0].high;
        sum[2] += found[u].v[1].low, sum[3] += found[u].v[1].high;
      }
    }
    for (int i = 0; i < 4; ++i) raw[e * 4 + i] = sum[i];
  }
  for (int t = lane; t < c.words; t += 32) {
    float sum = 0.f;
    for (int k0 = warp; k0 < c.chunks; k0 += 8 * kWarps)
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        int const k = k0 + u * kWarps;
        if (k < c.chunks) sum += partial[1ll * k * record + t] * min(run, c.pixels - k * run);
      }
    shares[warp * wide + t] = sum;
  }
  words.meet();
  for (int t = threadIdx.x; t < c.words; t += kThreads) {
    float sum = 0.f;
    for (int k = 0; k < kWarps; ++k) sum += shares[k * wide + t];
    mean[t] = sum / c.pixels;
    if (blockIdx.x == 0) static_cast<float*>(c.part[3])[1ll * b * c.words + t] = mean[t];
  }
  __syncthreads();
  float* const covariance = raw + c.words;
  for (int e = threadIdx.x; e < triangle(c.words); e += kThreads) {
    int i, j;
    row_column(e, i, j);
    float sum = 0.f;
    for (int k = 0; k < parts; ++k) sum += covariance[k * record + e];
    for (int k0 = 0; k0 < c.chunks; k0 += 8)
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        int const k = k0 + u;
        float const* const one = partial + 1ll * k * record;
        if (k < c.chunks)
          sum += (one[i] - mean[i]) * (one[j] - mean[j]) * min(run, c.pixels - k * run);
      }
    covariance[e] = sum / c.pixels;
  }
  __syncthreads();

  // two channels of a warp at a time: every entry of the covariance serves both
  T* const columns = static_cast<T*>(c.part[4]);
  Pair<float>* const shifted = reinterpret_cast<Pair<float>*>(shares) + warp * wide;
#pragma unroll
  for (int k = 0; k < kEach; k += 2) {
    int const channel = channel0 + k;
    if (channel >= c.channels) break;
    bool const two = channel + 1 < c.channels;
    long long const at = 1ll * b * c.channels + channel;
    float common[2] = {}, variance[2] = {};
    for (int t = lane; t < c.words; t += 32) {
      Pair<float> v{};
      if (words[t]) {
        v = {own[k], own[k + 1]};
        if (t >= kPiece) v.low = to_float(values[at * c.words + t]);
        if (t >= kPiece && two) v.high = to_float(values[(at + 1) * c.words + t]);
      }
      shifted[t] = v;
      common[0] += v.low * mean[t], common[1] += v.high * mean[t];
    }
    common[0] = warp_sum(common[0]), common[1] = warp_sum(common[1]);
    for (int t = lane; t < wide; t += 32) {
      Pair<float> v{};
      if (t < c.words && words[t]) v = {shifted[t].low - common[0], shifted[t].high - common[1]};
      shifted[t] = v;
    }
    __syncwarp();
    for (int i = lane; i < c.words; i += 32) {
      float spread[2] = {};
#pragma unroll 4
      for (int j = 0; j < c.words; ++j) {
        float const both = covariance[triangle(max(i, j)) + min(i, j)];
        spread[0] += both * shifted[j].low, spread[1] += both * shifted[j].high;
      }
      variance[0] += spread[0] * shifted[i].low, variance[1] += spread[1] * shifted[i].high;
    }
    float scale[2];
    for (int e = 0; e < 2; ++e)
      scale[e] = 1.f / (sqrtf(fmaxf(warp_sum(variance[e]), 0.f) + c.epsilon) * kRaise);
    for (int t = lane; t < wide; t += 32) {
      columns[at * wide + t] = from_float<T>(within<T>(shifted[t].low * scale[0]));
      if (two) columns[(at + 1) * wide + t] = from_float<T>(within<T>(shifted[t].high * scale[1]));
    }
    __syncwarp();
  }
}

}  // namespace refedge
