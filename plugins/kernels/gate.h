// The gate of NormAttention and its output: tanh(second relu(first y)) y for y = columns P.
#pragma once
#include "norm.h"

namespace refedge {

// first [C, C] x columns [C, T]: the gate's first map of what a word adds, 32 rows and words a
// block.
template <class T>
__device__ void norm_thin(Call const& c) {
  REFEDGE_SHARED(memory);
  int const r0 = blockIdx.x * kPiece, t0 = blockIdx.y * kPiece, b = blockIdx.z;
  int const wide = padded_words(c.words), lane = lane_of(), warp = warp_of();
  T const* const first = static_cast<T const*>(c.in[4]) + 1ll * r0 * c.channels;
  T const* const given = static_cast<T const*>(c.part[4]) + 1ll * b * c.channels * wide + t0;
  Sums<> sums;
  for (int k = warp * kPiece; k < c.channels; k += kWarps * kPiece) {
    Piece<T> left, right;
    lines(right, first + k, c.channels, c.channels - r0, c.channels - k, fit_of(c, 4));
    columns(left, given + 1ll * k * wide, wide, first_of(c.channels - k), kPiece, 8);
    multiply(sums, left, right.line);
  }
  float found[4];
  meet(reinterpret_cast<float*>(memory), sums, found);
  int const row = r0 + lane % 4 * 8 + warp;
  if (row < c.channels)
    put(static_cast<T*>(c.part[5]) + (1ll * b * c.channels + row) * wide + t0 + lane / 4 * 4,
        within<T>(found[0]), within<T>(found[1]), within<T>(found[2]), within<T>(found[3]), 4, 4);
}

// tanh(second relu(thin P)) (columns P) for centred weights P. Warps that share a strip share its
// centred weights and what opens the gate, 32 channels each at a time; each gives up to 64
// channels, MOST eights at a time. With 8 there are whole slices of 32 channels, on chip all at
// once.
template <class T, int MOST>
__device__ inline void norm_map(Call const& c, char* memory, int held) {
  constexpr int kEights = 8, kBatch = 4;  // eights of a warp in all, and loaded together
  int const each = outputs_of(c), ways = kWarps / each, groups = groups_of(c.words);
  int const b = blockIdx.z, lane = lane_of(), wide = padded_words(c.words);
  int const mine = warp_of() / ways, way = warp_of() % ways;
  int const strips = ceil_div(c.pixels, kPiece), strip = blockIdx.x * each + mine;
  int const p0 = strip * kPiece, pixels = min(max(c.pixels - p0, 0), kPiece);
  int const end = min(c.channels, static_cast<int>(blockIdx.y + 1) * kReach);
  int const share = ceil_div(end - static_cast<int>(blockIdx.y) * kReach, 8 * ways);
  int const slices = ceil_div(c.channels, kPiece);
  Eight<T>* const kept = reinterpret_cast<Eight<T>*>(memory) + mine * groups * 4 * 32 + lane;
  Eight<T>* const room = kept + ((each - mine) * groups + mine * held) * 4 * 32;
  T const* const grown = static_cast<T const*>(c.part[4]) + 1ll * b * c.channels * wide;
  T const* const thin = static_cast<T const*>(c.part[5]) + 1ll * b * c.channels * wide;

  // the weights of 32 words less their mean over all pixels, in the type only then
  for (int t0 = way * kPiece; t0 < c.words; t0 += ways * kPiece) {
    Piece<T> centred{};
    if (pixels) recall(centred, strip_of<T>(c, b, strip, t0), c.words - t0);
    float const* const mean = static_cast<float const*>(c.part[3]) + 1ll * b * c.words;
    float const* const means =
        static_cast<float const*>(c.part[1]) + (1ll * b * strips + strip) * c.words;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float apart[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int const t = t0 + lane % 4 * 8 + 2 * k + e;
        apart[e] = t < c.words && pixels ? (means[t] - mean[t]) * kRaise : 0.f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Pair<T> const p = centred.line[i].v[k];
        centred.line[i].v[k] = lane / 4 * 4 + i < pixels
                                   ? pair<T>(low<T>(p) + apart[0], high<T>(p) + apart[1])
                                   : pair<T>(0.f, 0.f);
      }
    }
    store(kept + t0 * 4, centred);
  }
  __syncthreads();

  // what opens the gate, of `held` slices from q0 on
  auto open = [&](int q0) {
#pragma unroll 1
    for (int q = q0 + way; q < min(q0 + held, slices); q += ways) {
      Sums<> sums;
#pragma unroll 1
      for (int t0 = 0; t0 < c.words; t0 += kPiece) {
        Piece<T> left, right;
        int const k = q * kPiece;
        lines(right, thin + 1ll * k * wide + t0, wide, c.channels - k, kPiece, 8);
        load(left, kept + t0 * 4);
        multiply(sums, left, right.line);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int k = 0; k < 8; ++k) sums.at(i, k) = within<T>(fmaxf(sums.at(i, k), 0.f));
      Piece<T> opened;
      round_to(opened, sums);
      store(room + (q - q0) * 4 * 32, opened);
    }
    __syncthreads();
  };
  // its product with `second`, for `many` eights of channels from `row` on, the last one's to
  // `rows`
  auto gather = [&](Sums<8>(&gate)[MOST], int q0, int row, int rows, int many) {
    if (many <= 0) return;
    T const* const second =
        static_cast<T const*>(c.in[5]) + (1ll * row + lane / 4) * c.channels + lane % 4 * 8;
#pragma unroll 1
    for (int q = q0; q < min(q0 + held, slices); ++q) {
      Piece<T> opened;
      load(opened, room + (q - q0) * 4 * 32);
      T const* const at = second + q * kPiece;
      if constexpr (MOST == kEights) {
#pragma unroll
        for (int j0 = 0; j0 < MOST; j0 += kBatch) {
          Eight<T> right[kBatch][1];
#pragma unroll
          for (int j = 0; j < kBatch; ++j)
            right[j][0] = *reinterpret_cast<Eight<T> const*>(at + (j0 + j < many ? j0 + j : 0) * 8 *
                                                                      c.channels);
#pragma unroll
          for (int j = 0; j < kBatch; ++j)
            if (j0 + j < many) multiply(gate[j0 + j], opened, right[j]);
        }
      } else {
        int const depth = c.channels - q * kPiece - lane % 4 * 8;
        Eight<T> right[MOST][1];
#pragma unroll
        for (int j = 0; j < MOST; ++j) {
          int const there = j < many && j * 8 + lane / 4 < rows ? depth : 0;
          right[j][0] = eight(at + j * 8 * c.channels, there, fit_of(c, 5));
        }
#pragma unroll
        for (int j = 0; j < MOST; ++j)
          if (j < many) multiply(gate[j], opened, right[j]);
      }
    }
  };
  auto give = [&](Sums<8> const(&gate)[MOST], int row, int rows, int many) {
    auto grown_at = [&](int j, int t0) {
      int const r = j * 8 + lane / 4;
      Eight<T> found{};
      if (r < rows)
        found =
            *reinterpret_cast<Eight<T> const*>(grown + (1ll * row + r) * wide + t0 + lane % 4 * 8);
      return found;
    };
    Piece<T> left;
    load(left, kept);
    Eight<T> next = grown_at(0, 0);  // under way while the one before is worked on
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
      if (j >= many) break;
      Sums<8> found;
      Eight<T> const right[1] = {next};
      next = grown_at(j + 1, 0);
      multiply(found, left, right);
#pragma unroll 1
      for (int t0 = kPiece; t0 < c.words; t0 += kPiece) {
        Eight<T> const more[1] = {grown_at(j, t0)};
        load(left, kept + t0 * 4);
        multiply(found, left, more);
      }
      if (c.words > kPiece) load(left, kept);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int const r = j * 8 + lane % 4 * 2 + e, p = lane / 4 * 4;
        T* const y =
            static_cast<T*>(c.out[0]) + (1ll * b * c.channels + row + r) * c.pixels + p0 + p;
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = found.v[0][i][e] * tanh_of<T>(gate[j].v[0][i][e]);
        if (r < rows) put(y, v[0], v[1], v[2], v[3], pixels - p, fit_out(c, 0));
      }
    }
  };

  int const start = blockIdx.y * kReach + way * share * 8;  // this warp's channels
  if constexpr (MOST == kEights) {
    open(0);
    Sums<8> gate[MOST];
    int const rows = end - start, many = min(share, ceil_div(max(rows, 0), 8));
    gather(gate, 0, start, rows, many);
    give(gate, start, rows, many);
  } else {
    for (int j = 0; j < share; j += MOST) {
      Sums<8> gate[MOST];
      int const row = start + j * 8, rows = end - row;
      int const many = min(share - j, ceil_div(max(rows, 0), 8));
      for (int q0 = 0; q0 < slices; q0 += held) {
        __syncthreads();
        open(q0);
        gather(gate, q0, row, rows, many);
      }
      give(gate, row, rows, many);
    }
  }
}

template <class T>
__device__ void norm_output(Call const& c) {
  REFEDGE_SHARED(memory);
  int const held = kRoom / static_cast<int>(sizeof(Piece<T>) * 32) / outputs_of(c);
  if constexpr (sizeof(T) == 2) {
    bool const whole = c.channels % kPiece == 0 && fit_of(c, 5) == 8;
    if (whole && c.channels <= held * kPiece) return norm_map<T, 8>(c, memory, held);
  }
  norm_map<T, 4>(c, memory, held);
}

}  // namespace refedge
