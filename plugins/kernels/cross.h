// CrossAttention: x [B, N, C], keys [B, C, H, T], values [B, H, T, D], words [B, T], offset
// [B, H, T] -> [B, N, D].
#pragma once
#include "softmax.h"

namespace refedge {

// A strip of 32 pixels: a warp makes the weights of a head, then up to 64 channels of all heads'
// sum.
template <class T>
__device__ void cross_attention(Call const& c) {
  REFEDGE_SHARED(memory);
  int const p0 = blockIdx.x * kPiece, d0 = blockIdx.y * kReach, b = blockIdx.z;
  int const lane = lane_of(), warp = warp_of();
  int const pixels = min(kPiece, c.pixels - p0), all = c.heads * c.words;
  // where the rows of all heads' keys are aligned, words are read from an aligned place before the
  // head's first on; those of the head before get no weight
  int const step = fit_of(c, 1) >= 4 ? 4 : 1, groups = ceil_div(c.words + step - 1, kPiece);
  int const held = kRoom / static_cast<int>(sizeof(Piece<T>) * 32) / groups;  // heads on chip
  Eight<T>* const room = reinterpret_cast<Eight<T>*>(memory) + lane;
  T const* const x = static_cast<T const*>(c.in[0]) + (1ll * b * c.pixels + p0) * c.channels;
  T const* const keys = static_cast<T const*>(c.in[1]) + 1ll * b * c.channels * all;
  T const* const values = static_cast<T const*>(c.in[2]) + 1ll * b * all * c.width;
  T const* const offset = static_cast<T const*>(c.in[4]) + 1ll * b * all;
  Words words(c, c.in[3], b);
  words.meet();

  Sums<> found[kReach / kPiece / kWarps];
  for (int h0 = 0; h0 < c.heads; h0 += held) {
    int const end = min(h0 + held, c.heads);
    if (h0) __syncthreads();
    for (int h = h0 + warp; h < end; h += kWarps) {
      int const before = h * c.words % step;
      auto scores = [&](Sums<>& sums, int t0) {
        int const at = h * c.words + t0;
        constexpr int kSteps = sizeof(T) == 2 ? 2 : 1;  // loads of two before any product
        for (int k = 0; k < c.channels; k += kSteps * kPiece) {
          int const rest = c.channels - k;
          T const* const rows = keys + 1ll * k * all + at;
          Piece<T> left[kSteps], right;
#pragma unroll
          for (int e = 0; e < kSteps; ++e)
            lines(left[e], x + k + e * kPiece, c.channels, pixels, rest - e * kPiece, fit_of(c, 0));
          Rows<T> const first(rows, all, first_of(rest), all - at, fit_of(c, 1));
          if constexpr (kSteps == 2) {
            Rows<T> const next(rows + 1ll * kPiece * all, all, first_of(rest - kPiece), all - at,
                               fit_of(c, 1));
            first.to(right);
            multiply(sums, left[0], right.line);
            next.to(right);
          } else {
            first.to(right);
          }
          multiply(sums, left[kSteps - 1], right.line);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          int const t = t0 + lane % 4 * 8 + k;
          float const more = t >= 0 && t < c.words ? to_float(offset[h * c.words + t]) : 0.f;
#pragma unroll
          for (int i = 0; i < 4; ++i) sums.at(i, k) += more;
        }
      };
      Softmax<T> softmax;
      word_softmax(softmax, words, -before, scores, [&](Sums<> const& weights, int t0) {
        Piece<T> piece;
        round_to(piece, weights);
        int const place = (h - h0) * groups + (t0 + before) / kPiece;
        store(room + place * 4 * 32, piece);
      });
    }
    __syncthreads();
    for (int h = h0; h < end; ++h) {
      int const before = h * c.words % step;
      for (int t0 = -before; t0 < c.words; t0 += kPiece) {
        int const place = (h - h0) * groups + (t0 + before) / kPiece;
        Piece<T> left, right;
        unsigned const there = words.from(t0);
        load(left, room + place * 4 * 32);
#pragma unroll
        for (int u = 0; u < kReach / kPiece / kWarps; ++u) {
          int const d = d0 + (u * kWarps + warp) * kPiece;
          if (d >= c.width) break;
          columns(right, values + 1ll * (h * c.words + t0) * c.width + d, c.width, there,
                  c.width - d, fit_of(c, 2));
          multiply(found[u], left, right.line);
        }
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kReach / kPiece / kWarps; ++u)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const p = lane / 4 * 4 + i, d = d0 + (u * kWarps + warp) * kPiece + lane % 4 * 8;
      T* const y = static_cast<T*>(c.out[0]) + (1ll * b * c.pixels + p0 + p) * c.width + d;
#pragma unroll
      for (int k = 0; k < 8; k += 4)
        if (p < pixels)
          put(y + k, found[u].at(i, k), found[u].at(i, k + 1), found[u].at(i, k + 2),
              found[u].at(i, k + 3), c.width - d - k, fit_out(c, 0));
    }
}

}  // namespace refedge
