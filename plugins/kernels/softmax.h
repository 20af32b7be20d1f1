// Which words there are, and softmax over them or over pixels.
#pragma once
#include "piece.h"

namespace refedge {

// Which words there are; without any, all of them count alike. Known after meet(), a barrier of the
// block, so that nothing waits for the words before it has to.
struct Words {
  bool const* given;
  int count, step;
  bool own, any;
  __device__ Words(Call const& c, void const* words, int b)
      : given(static_cast<bool const*>(words) + 1ll * b * c.words * c.word),
        count(c.words),
        step(c.word),
        own(static_cast<int>(threadIdx.x) < c.words && given[threadIdx.x * step]),
        any(false) {}
  __device__ void meet() { any = __syncthreads_or(own); }
  __device__ bool operator[](int t) const { return !any || given[t * step]; }
  // Which of 32 words from the first on there are.
  __device__ unsigned from(int first) const {
    int const t = first + lane_of();
    return __ballot_sync(~0u, t >= 0 && t < count && (*this)[t]);
  }
  // The most that scores of this lane's words first + 8 t + k may be: nothing where there is none.
  __device__ void limits(float (&found)[8], int first) const {
    unsigned const there = from(first) >> lane_of() % 4 * 8;
#pragma unroll
    for (int k = 0; k < 8; ++k) found[k] = there >> k & 1 ? -kLowest : kLowest;
  }
};

// Softmax over the elements of lines, 32 at a time; four lanes share a line.
template <class T>
struct Softmax {
  float top[4] = {kLowest, kLowest, kLowest, kLowest}, sum[4] = {};

  // Take in some scores; they become powers relative to the largest so far.
  __device__ void take(Sums<>& scores, float const (&limits)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float most = top[i];
#pragma unroll
      for (int k = 0; k < 8; ++k) most = fmaxf(most, fminf(scores.at(i, k), limits[k]));
      most = line_max(most);
      sum[i] *= exp_of<T>(top[i] - most);
      top[i] = most;
    }
    raise(scores, limits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float more = 0.f;
#pragma unroll
      for (int k = 0; k < 8; ++k) more += scores.at(i, k);
      sum[i] += line_sum(more);
    }
  }
  __device__ void raise(Sums<>& scores, float const (&limits)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int k = 0; k < 8; ++k)
        scores.at(i, k) = exp_of<T>(fminf(scores.at(i, k), limits[k]) - top[i]);
  }
};

// Softmax of `scores(sums, t0)`, 32 words from t0 on, over all words; `each(weights, t0)` gets
// them. The first t0 may lie before the first word.
template <class T, class S, class E>
__device__ inline void word_softmax(Softmax<T>& softmax, Words const& words, int first,
                                    S const& scores, E const& each) {
  bool const once = words.count - first <= kPiece;
  for (int turn = once; turn < 2; ++turn)
    for (int t0 = first; t0 < words.count; t0 += kPiece) {
      Sums<> sums;
      scores(sums, t0);
      if (!words.any) sums = Sums<>();
      float limits[8];
      words.limits(limits, t0);
      if (once || !turn) softmax.take(sums, limits);
      else softmax.raise(sums, limits);
      if (!turn) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const share = 1.f / softmax.sum[i];
#pragma unroll
        for (int k = 0; k < 8; ++k) sums.at(i, k) *= share;
      }
      each(sums, t0);
    }
}

}  // namespace refedge
