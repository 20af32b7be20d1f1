// MutualAttention: keys and values [B, H, T, d], words [B, T], seen_keys [B, H, d, N], seen_values
// [B, H, N, d] -> product [B, T, N], weights of the words [B, T, N] float.
#pragma once
#include "softmax.h"

namespace refedge {

// What 32 words see in eight strips of pixels: largest score, sum of powers, powers x seen_values.
template <class T>
__device__ void mutual_seen(Call const& c) {
  REFEDGE_SHARED(memory);
  int const h = blockIdx.y % c.heads, t0 = blockIdx.y / c.heads * kPiece, b = blockIdx.z;
  int const lane = lane_of(), warp = warp_of(), p0 = (blockIdx.x * kWarps + warp) * kPiece;
  int const pixels = c.pixels - p0, words = min(kPiece, c.words - t0);
  float* const room = reinterpret_cast<float*>(memory);
  float* const tops = room + kRoom / 4;  // a row a warp
  float* const sums = tops + kWarps * kPiece;
  long long const head = 1ll * b * c.heads + h,
                  first = (head * c.chunks + blockIdx.x) * c.words + t0;
  T const* const keys = static_cast<T const*>(c.in[0]) + (head * c.words + t0) * c.width;
  T const* const seen = static_cast<T const*>(c.in[3]) + head * c.width * c.pixels + p0;
  T const* const values = static_cast<T const*>(c.in[4]) + (head * c.pixels + p0) * c.width;

  Sums<> scores;
  for (int k = 0; k < c.width && pixels > 0; k += kPiece) {
    Piece<T> left, right;
    lines(left, keys + k, c.width, words, c.width - k, fit_of(c, 0));
    columns(right, seen + 1ll * k * c.pixels, c.pixels, first_of(c.width - k), pixels,
            fit_of(c, 3));
    multiply(scores, left, right.line);
  }
  float limits[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) limits[k] = lane % 4 * 8 + k < pixels ? -kLowest : kLowest;
  Softmax<T> softmax;
  softmax.take(scores, limits);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (lane % 4 == 0) tops[warp * kPiece + lane + i] = softmax.top[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float most = softmax.top[i];
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, tops[w * kPiece + lane / 4 * 4 + i]);
    float const share = exp_of<T>(softmax.top[i] - most);
    if (lane % 4 == 0) sums[warp * kPiece + lane + i] = softmax.sum[i] * share;
#pragma unroll
    for (int k = 0; k < 8; ++k) scores.at(i, k) *= share;
  }
  __syncthreads();
  if (warp == 0 && lane < words) {
    float most = kLowest, sum = 0.f;
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, tops[w * kPiece + lane]);
    for (int w = 0; w < kWarps; ++w) sum += sums[w * kPiece + lane];
    Pair<float>* const said = static_cast<Pair<float>*>(c.part[0]) + first + lane;
    *said = {most, sum};
  }
  Piece<T> powers;
  round_to(powers, scores);
  for (int d = 0; d < c.width; d += kPiece) {
    Piece<T> left;
    columns(left, values + d, c.width, first_of(pixels), c.width - d, fit_of(c, 4));
    Sums<> product;
    multiply(product, left, powers.line);
    float found[4];
    meet(room, product, found);
    int const t = lane % 4 * 8 + warp, at = d + lane / 4 * 4;
    if (t < words)
      put(static_cast<float*>(c.part[1]) + (first + t) * c.width + at, found[0], found[1], found[2],
          found[3], c.width - at, c.width % 4 ? 1 : 4);
  }
}

// All runs of strips together, then the product of what a word saw with the values of every word.
template <class T>
__device__ void mutual_pairs(Call const& c) {
  REFEDGE_SHARED(memory);
  int const warp = warp_of(), lane = lane_of();
  int const s = blockIdx.x * kWarps + warp, h = blockIdx.y, b = blockIdx.z;
  float* const seen = reinterpret_cast<float*>(memory) + warp * c.width;
  long long const head = 1ll * b * c.heads + h;
  float const* const tops = static_cast<float const*>(c.part[0]);
  float const* const sums = static_cast<float const*>(c.part[1]);
  Words words(c, c.in[2], b);
  words.meet();
  if (s >= c.words) return;
  T* const pairs = static_cast<T*>(c.part[2]) + (head * c.words + s) * padded_words(c.words);
  bool const there = words.any && words[s];
  if (there) {
    float top = kLowest, total = 0.f;
    for (int k = 0; k < c.chunks; ++k)
      top = fmaxf(top, tops[((head * c.chunks + k) * c.words + s) * 2]);
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

// Softmax over the words, its mean over the heads, and the sum of pairs x weights, for a strip; the
// warps share the heads. Beyond 32 words, all is computed again for each 32.
template <class T>
__device__ void mutual_product(Call const& c) {
  REFEDGE_SHARED(memory);
  int const p0 = blockIdx.x * kPiece, s0 = blockIdx.y * kPiece, b = blockIdx.z;
  int const lane = lane_of(), warp = warp_of(), wide = padded_words(c.words);
  int const pixels = min(kPiece, c.pixels - p0), p = lane / 4 * 4;
  float* const room = reinterpret_cast<float*>(memory);
  Words words(c, c.in[2], b);
  words.meet();

  float meeting[4];
  Sums<> product;
  for (int group = 0; group < c.words; group += kPiece) {
    Sums<> told;
    for (int h = warp; h < c.heads; h += kWarps) {
      long long const head = 1ll * b * c.heads + h;
      T const* const keys = static_cast<T const*>(c.in[0]) + head * c.words * c.width;
      T const* const seen = static_cast<T const*>(c.in[3]) + head * c.width * c.pixels + p0;
      T const* const pairs = static_cast<T const*>(c.part[2]) + (head * c.words + s0) * wide;
      auto scores = [&](Sums<>& sums, int t0) {
        for (int k = 0; k < c.width; k += kPiece) {
          Piece<T> left, right;
          lines(right, keys + 1ll * t0 * c.width + k, c.width, c.words - t0, c.width - k,
                fit_of(c, 0));
          columns(left, seen + 1ll * k * c.pixels, c.pixels, first_of(c.width - k), pixels,
                  fit_of(c, 3));
          multiply(sums, left, right.line);
        }
      };
      Softmax<T> softmax;
      word_softmax(softmax, words, 0, scores, [&](Sums<> const& weights, int t0) {
        if (t0 != group) return;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int k = 0; k < 8; ++k) told.at(i, k) += weights.at(i, k);
        Piece<T> left, right;
        round_to(left, weights);
        lines(right, pairs + t0, wide, c.words - s0, kPiece, 8);
        multiply(product, left, right.line);
      });
    }
    if (blockIdx.y) continue;
    meet(room, told, meeting);
    int const t = group + lane % 4 * 8 + warp;
    float* const at = static_cast<float*>(c.out[1]) + (1ll * b * c.words + t) * c.pixels + p0 + p;
    float const share = 1.f / c.heads;
    if (t < c.words)
      put(at, meeting[0] * share, meeting[1] * share, meeting[2] * share, meeting[3] * share,
          pixels - p, fit_out(c, 1));
  }
  meet(room, product, meeting);
  int const s = s0 + lane % 4 * 8 + warp;
  if (s < c.words)
    put(static_cast<T*>(c.out[0]) + (1ll * b * c.words + s) * c.pixels + p0 + p, meeting[0],
        meeting[1], meeting[2], meeting[3], pixels - p, fit_out(c, 0));
}

}  // namespace refedge
