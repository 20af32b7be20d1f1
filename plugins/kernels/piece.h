// What all kernels are made of: pieces of 32 lines by 32 elements that a warp holds in registers,
// and their products.
//
// Of a piece, lane 4 g + t of a warp holds elements 8 t to 8 t + 7 of lines 4 g to 4 g + 3, as
// pairs of neighbours. A product of two pieces sums over the elements of their lines, and its sums
// lie the same way: rounded, they are the next product's left piece without any shared memory.
// Which lines and elements a lane brings to the tensor cores is free as long as both sides agree;
// here lanes load and store neighbours.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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
template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline half from_float<half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline bfloat from_float<bfloat>(float v) {
  return __float2bfloat16_rn(v);
}

// The hardware's own tanh and powers are good to 2^-11 and 2^-21 of themselves: enough for half
// types.
template <class T>
__device__ inline float tanh_of(float v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    float found;
    asm("tanh.approx.f32 %0, %1;" : "=f"(found) : "f"(v));
    return found;
  }
#endif
  return tanhf(v);
}
template <class T>
__device__ inline float exp_of(float v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(T) == 2) {
    float found;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(found) : "f"(v * 1.44269504f));
    return found;
  }
#endif
  return expf(v);
}

// As large as the type can hold: a sum that leaves half's range is not to become infinite.
template <class T>
__device__ inline float within(float v) {
  return v;
}
template <>
__device__ inline float within<half>(float v) {
  return fminf(fmaxf(v, -65504.f), 65504.f);
}

// Two neighbours of a line; of the half types in one register.
template <class T>
struct Pair {
  unsigned bits;
};
template <>
struct alignas(8) Pair<float> {
  float low, high;
};
template <class T>
__device__ inline Pair<T> pair(float low, float high) {
  alignas(Pair<T>) T const both[2] = {from_float<T>(low), from_float<T>(high)};
  return *reinterpret_cast<Pair<T> const*>(both);
}
template <class T>
__device__ inline float low(Pair<T> p) {
  return to_float(reinterpret_cast<T const*>(&p)[0]);
}
template <class T>
__device__ inline float high(Pair<T> p) {
  return to_float(reinterpret_cast<T const*>(&p)[1]);
}
// The first and the second elements of two pairs.
template <class T>
__device__ inline Pair<T> lows(Pair<T> a, Pair<T> b) {
  if constexpr (sizeof(T) == 4) return {a.low, b.low};
  else return {(a.bits & 0xffffu) | b.bits << 16};
}
template <class T>
__device__ inline Pair<T> highs(Pair<T> a, Pair<T> b) {
  if constexpr (sizeof(T) == 4) return {a.high, b.high};
  else return {a.bits >> 16 | (b.bits & 0xffff0000u)};
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
  Pair<T> v[2];
};
template <class T>
struct alignas(16) Eight {
  Pair<T> v[4];
};
template <class T>
struct Piece {
  Eight<T> line[4];
};

// Sums of left lines 4 g + i and right lines 8 t + k, for COLUMNS / 8 right lines of each lane.
template <int COLUMNS = 32>
struct Sums {
  float v[COLUMNS / 8][4][2];  // k % (COLUMNS / 8), i, k / (COLUMNS / 8)
  __device__ Sums() {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) v[j][i][0] = v[j][i][1] = 0.f;
  }
  __device__ float& at(int i, int k) { return v[k % (COLUMNS / 8)][i][k / (COLUMNS / 8)]; }
  __device__ float at(int i, int k) const { return v[k % (COLUMNS / 8)][i][k / (COLUMNS / 8)]; }
};

__device__ inline int lane_of() { return threadIdx.x % 32; }
__device__ inline int warp_of() { return threadIdx.x / 32; }

#ifndef REFEDGE_EMULATED
// Another lane's value.
template <class V>
__device__ inline V from_lane(V const& v, int lane) {
  V found;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i)
    reinterpret_cast<unsigned*>(&found)[i] =
        __shfl_sync(~0u, reinterpret_cast<unsigned const*>(&v)[i], lane);
  return found;
}
#endif
__device__ inline float warp_sum(float v) {
  for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(~0u, v, mask);
  return v;
}
// Over the four lanes that hold the same lines, and over the eight that hold the same elements.
__device__ inline float line_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}
__device__ inline float line_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ inline float cross_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 4);
  v += __shfl_xor_sync(~0u, v, 8);
  return v + __shfl_xor_sync(~0u, v, 16);
}

// c (rows g) and d (rows g + 8) += a [16, 16] x b [16, 8]; PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type" and for mma.m16n8k8. And 8 x 8 elements transposed.
// Volatile: a warp has to stay together.
template <class T>
constexpr bool has_mma = false;
template <class T>
__device__ void mma(float (&c)[2], float (&d)[2], Pair<T> const (&a)[4], Pair<T> const (&b)[2]);
template <class T>
__device__ Pair<T> movmatrix(Pair<T> p);
#if defined(__CUDA_ARCH__) || defined(REFEDGE_EMULATED)
template <>
constexpr bool has_mma<half> = true;
#endif
#if __CUDA_ARCH__ >= 800 || defined(REFEDGE_EMULATED)
template <>
constexpr bool has_mma<bfloat> = true;
#endif
#ifdef __CUDA_ARCH__
#if __CUDA_ARCH__ >= 800
#define REFEDGE_MMA(T, name)                                                                       \
  template <>                                                                                      \
  __device__ inline void mma(float (&c)[2], float (&d)[2], Pair<T> const(&a)[4],                   \
                             Pair<T> const(&b)[2]) {                                               \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                            \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                      \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(d[0]), "+f"(d[1])                                  \
                 : "r"(a[0].bits), "r"(a[1].bits), "r"(a[2].bits), "r"(a[3].bits), "r"(b[0].bits), \
                   "r"(b[1].bits));                                                                \
  }
REFEDGE_MMA(half, "f16")
REFEDGE_MMA(bfloat, "bf16")
#undef REFEDGE_MMA
#else
template <>
__device__ inline void mma(float (&c)[2], float (&d)[2], Pair<half> const (&a)[4],
                           Pair<half> const (&b)[2]) {
#pragma unroll
  for (int k = 0; k < 2; ++k)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(d[0]), "+f"(d[1])
        : "r"(a[2 * k].bits), "r"(a[2 * k + 1].bits), "r"(b[k].bits));
}
#endif
template <class T>
__device__ inline Pair<T> movmatrix(Pair<T> p) {
  Pair<T> found;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found.bits) : "r"(p.bits));
  return found;
}
#endif

// sums += left x right over 32 elements. Of right lines, lane 4 g + t brings those that are g-th of
// each eight: line g * N + j where all 8 N are a piece, 8 j + g where they are not (then sums lie
// so).
template <class T, int N>
__device__ inline void multiply(Sums<8 * N>& sums, Piece<T> const& left,
                                Eight<T> const (&right)[N]) {
  if constexpr (has_mma<T>) {
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int k = 0; k < 4; k += 2)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          mma<T>(sums.v[j][i], sums.v[j][i + 1],
                 {left.line[i].v[k], left.line[i + 1].v[k], left.line[i].v[k + 1],
                  left.line[i + 1].v[k + 1]},
                 {right[j].v[k], right[j].v[k + 1]});
  } else {  // the same by hand, for float and wherever there is no such instruction
    int const g = lane_of() / 4, t = lane_of() % 4;
#pragma unroll 1
    for (int s = 0; s < 4; ++s) {
      Piece<T> const a = from_lane(left, 4 * g + s);
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Eight<T> const b = from_lane(right[j], 4 * (2 * t + e) + s);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              sums.v[j][i][e] += low<T>(a.line[i].v[k]) * low<T>(b.v[k]);
              sums.v[j][i][e] += high<T>(a.line[i].v[k]) * high<T>(b.v[k]);
            }
        }
    }
  }
}

// Eight by eight elements across a warp: lane 4 g + t gives elements 2 t and 2 t + 1 of line g, and
// gets those of column g.
template <class T>
__device__ inline Pair<T> flip(Pair<T> p) {
  if constexpr (has_mma<T>) {
    return movmatrix(p);
  } else {
    int const g = lane_of() / 4, t = lane_of() % 4;
    Pair<T> const a = from_lane(p, 8 * t + g / 2), b = from_lane(p, 8 * t + 4 + g / 2);
    return g % 2 ? highs<T>(a, b) : lows<T>(a, b);
  }
}

// Four or eight neighbours of which `valid` are there, zero beyond; at once where `fit` allows it.
template <class T>
__device__ inline T or_zero(T const* at, bool there) {
  return there ? *at : from_float<T>(0.f);
}
template <class T>
__device__ inline Four<T> four(T const* at, int valid, int fit) {
  if (fit >= 4 && valid >= 4) return *reinterpret_cast<Four<T> const*>(at);
  alignas(Four<T>) T const found[4] = {or_zero(at, valid > 0), or_zero(at + 1, valid > 1),
                                       or_zero(at + 2, valid > 2), or_zero(at + 3, valid > 3)};
  return *reinterpret_cast<Four<T> const*>(found);
}
template <class T>
__device__ inline Eight<T> eight(T const* at, int valid, int fit) {
  if (fit >= 8 && valid >= 8) return *reinterpret_cast<Eight<T> const*>(at);
  Four<T> const a = four(at, valid, fit), b = four(at + 4, valid - 4, fit);
  return {{a.v[0], a.v[1], b.v[0], b.v[1]}};
}
template <class T>
__device__ inline void put(T* at, float a, float b, float c, float d, int valid, int fit) {
  if (fit >= 4 && valid >= 4) {
    Four<T> four;
    four.v[0] = pair<T>(a, b), four.v[1] = pair<T>(c, d);
    *reinterpret_cast<Four<T>*>(at) = four;
  } else {
    if (valid > 0) at[0] = from_float<T>(a);
    if (valid > 1) at[1] = from_float<T>(b);
    if (valid > 2) at[2] = from_float<T>(c);
    if (valid > 3) at[3] = from_float<T>(d);
  }
}

// A piece whose lines lie in memory with their elements side by side: `count` lines that are
// `stride` apart, of `depth` elements; zero beyond.
template <class T>
__device__ inline void lines(Piece<T>& to, T const* from, long long stride, int count, int depth,
                             int fit) {
  int const first = lane_of() / 4 * 4, k = lane_of() % 4 * 8;
  from += first * stride + k;
  if (fit >= 8 && depth % 8 == 0) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to.line[i] = Eight<T>{};
      if (first + i < count && k < depth)
        to.line[i] = *reinterpret_cast<Eight<T> const*>(from + i * stride);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      to.line[i] = eight(from + i * stride, first + i < count ? depth - k : 0, fit);
  }
}

// The first so many of 32.
__device__ inline unsigned first_of(int many) { return many > 31 ? ~0u : (1u << max(many, 0)) - 1; }
// A piece whose lines lie side by side, `count` of them, in rows that are `stride` apart: those of
// 32 whose bits are in `there`; zero for the others. Loads may go out before other work.
template <class T>
struct Rows {
  Four<T> v[8];

  __device__ Rows(T const* from, long long stride, unsigned there, int count, int fit) {
    int const first = lane_of() / 4 * 4, k = lane_of() % 4 * 8;
    from += k * stride + first;
    there >>= k;
    if (fit >= 4) {  // then rows are whole fours, and so is `count`
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        v[e] = Four<T>{};
        if (first < count && there >> e & 1) v[e] = *reinterpret_cast<Four<T> const*>(from);
        from += stride;
      }
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        v[e] = four(from, there >> e & 1 ? count - first : 0, 1);
        from += stride;
      }
    }
  }
  __device__ void to(Piece<T>& piece) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Four<T> const a = v[2 * e], b = v[2 * e + 1];
      piece.line[0].v[e] = lows<T>(a.v[0], b.v[0]), piece.line[1].v[e] = highs<T>(a.v[0], b.v[0]);
      piece.line[2].v[e] = lows<T>(a.v[1], b.v[1]), piece.line[3].v[e] = highs<T>(a.v[1], b.v[1]);
    }
  }
};
template <class T>
__device__ inline void columns(Piece<T>& to, T const* from, long long stride, unsigned there,
                               int count, int fit) {
  Rows<T>(from, stride, there, count, fit).to(to);
}

// A left piece in shared memory, a register of all lanes side by side; `at` is this lane's place.
template <class T>
__device__ inline void store(Eight<T>* at, Piece<T> const& piece) {
#pragma unroll
  for (int i = 0; i < 4; ++i) at[i * 32] = piece.line[i];
}
template <class T>
__device__ inline void load(Piece<T>& piece, Eight<T> const* at) {
#pragma unroll
  for (int i = 0; i < 4; ++i) piece.line[i] = at[i * 32];
}

template <class T>
__device__ inline void round_to(Piece<T>& to, Sums<> const& sums) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int k = 0; k < 4; ++k) to.line[i].v[k] = pair<T>(sums.at(i, 2 * k), sums.at(i, 2 * k + 1));
}

// Sums of all warps of a block, by way of kRoom bytes of shared memory: of lines 4 g + i by the
// right line 8 t + warp.
__device__ inline void meet(float* room, Sums<> const& sums, float (&found)[4]) {
  int const lane = lane_of(), warp = warp_of();
  __syncthreads();  // the room may still be read
#pragma unroll
  for (int k = 0; k < 8; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) room[((warp * 8 + k) * 4 + i) * 32 + lane] = sums.at(i, k);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    found[i] = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) found[i] += room[((w * 8 + warp) * 4 + i) * 32 + lane];
  }
}

}  // namespace refedge
