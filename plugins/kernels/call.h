// What a launch needs: one argument for every kernel, grids, shared memory, workspace.
//
// Plain C++17 without CUDA: the kernels, the TensorRT plugin, the host emulation of the tests and
// the GPU benchmark include this file, so a launch is decided in one place. Shapes as in
// ../reference.py: B expressions, N pixels, C channels, T words, H heads.
#pragma once

namespace refedge {

enum Operator { kCrossAttention, kNormAttention, kMutualAttention };
enum Type { kFloat, kHalf, kBfloat };

constexpr int kThreads = 256;    // of every block
constexpr int kWarps = kThreads / 32;
constexpr int kPiece = 32;       // pixels of a strip, words of a group, channels of a step
constexpr int kMaxWords = 128;   // more than kPiece are streamed
constexpr int kMaxWidth = 1024;  // channels, and channels of a head
constexpr int kMaxChunks = 128;  // partial moments per expression
constexpr int kMaxStrips = 131070;
constexpr int kReach = 512;      // channels that a block gives
constexpr int kRoom = 32768;     // bytes of shared memory: a float piece a warp, or left pieces
constexpr int kSquare = 32 * 33; // floats of moments of 32 by 32 words, rows on other banks

// The kernels' argument; `in` and `out` in the order of the operator's inputs and outputs.
struct Call {
  void const* in[6];
  void* out[2];
  void* work;
  void* part[6];  // pieces of the workspace, see *_places(); set by align()
  int batch, pixels, channels, words, heads;
  int width;   // channels of the values: D of CrossAttention, of a head of MutualAttention
  int word;    // bytes of an element of `words`; 0 is 1. TensorRT 8.6 gives plugins no booleans
  int chunks;  // runs of strips whose partial results meet in the workspace; set by cut()
  int span;    // times that a block goes through its strips; set by cut()
  int fits;    // bits i and 8 + i: four and eight elements of in[i] may be read at once; 16 + i:
               // four of out[i] may be written; set by align()
  float epsilon;
};

struct Launch {
  char const* kernel;  // without the suffix of the type
  int grid[3];
  int shared;  // bytes
};

struct Plan {
  Launch launch[4];
  int launches;        // 0: the operator does not take such a call
  unsigned long long workspace;  // bytes
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int size_of(Type type) { return type == kFloat ? 4 : 2; }
constexpr int triangle(int n) { return n * (n + 1) / 2; }
constexpr int groups_of(int words) { return ceil_div(words, kPiece); }
constexpr int padded_words(int words) { return groups_of(words) * kPiece; }
// Strips of a block of NormAttention, where they are read and where they are written; its warps
// share them, and the channels of each. One where words are streamed.
constexpr int strips_of(Call const& c) {
  int const k = c.channels;
  return c.words > kPiece ? 1 : k <= 64 ? 8 : k <= 128 ? 4 : k <= 384 ? 2 : 1;
}
constexpr int outputs_of(Call const& c) {
  return c.words > kPiece ? 1 : c.channels <= 128 ? 4 : c.channels <= 256 ? 2 : 1;
}
// Floats of a record of moments: T means, T (T + 1) / 2 sums, to a multiple of four.
constexpr int record_of(int words) { return ceil_div(words + triangle(words), 4) * 4; }

// Byte offsets in the workspace, each a multiple of 256.
struct Places {
  unsigned long long at[6];
  unsigned long long end;
  constexpr Places() : at{}, end(0) {}
  constexpr void place(int i, unsigned long long bytes) {
    at[i] = end;
    end += (bytes + 255) / 256 * 256;
  }
};

// 0 centred weights [B, strips, groups, 1024] in the operator's type, 1 what they are centred by
// [B, strips, T] float, 2 partial moments [B, chunks, record] float (room for the most chunks, so
// that more pixels never need less), 3 their mean [B, T] float, 4 columns and 5 thin [B, C, padded
// T] in the operator's type.
constexpr Places norm_places(Call const& c, int size) {
  Places p;
  unsigned long long const strips = 1ull * c.batch * ceil_div(c.pixels, kPiece);
  p.place(0, strips * groups_of(c.words) * kPiece * kPiece * size);
  p.place(1, 4 * strips * c.words);
  int const runs = ceil_div(ceil_div(c.pixels, kPiece), strips_of(c));
  p.place(2, 4ull * c.batch * (runs < kMaxChunks ? runs : kMaxChunks) * record_of(c.words));
  p.place(3, 4ull * c.batch * c.words);
  p.place(4, 1ull * c.batch * c.channels * padded_words(c.words) * size);
  p.place(5, 1ull * c.batch * c.channels * padded_words(c.words) * size);
  return p;
}

// 0 largest score and sum [B, H, chunks, T, 2] float, 1 what is seen [B, H, chunks, T, d] float,
// 2 pairs [B, H, T, padded T] in the operator's type.
constexpr Places mutual_places(Call const& c, int size) {
  Places p;
  p.place(0, 8ull * c.batch * c.heads * c.chunks * c.words);
  p.place(1, 4ull * c.batch * c.heads * c.chunks * c.words * c.width);
  p.place(2, 1ull * c.batch * c.heads * c.words * padded_words(c.words) * size);
  return p;
}

// Set chunks and span, and what is said by zero.
constexpr void cut(Operator op, Call& c) {
  c.word = c.word ? c.word : 1;
  int const strips = ceil_div(c.pixels, kPiece);
  int const each = op == kNormAttention ? strips_of(c) : kWarps;
  c.span = op == kNormAttention ? ceil_div(strips, each * kMaxChunks) : 1;
  c.chunks = ceil_div(strips, each * c.span);
}

// What may be read and written at once, from the pointers and the lengths of the rows.
inline int fits(Operator op, int size, Call const& c) {
  int const n = c.pixels, k = c.channels, t = c.words, w = c.width;
  int const rows[3][6] = {{k, c.heads * t, w, 0, 0, 0}, {n, k, 0, 0, k, k}, {w, 0, 0, n, w, 0}};
  auto whole = [](void const* at, int row, int many, int bytes) {
    int const together = many * bytes < 16 ? many * bytes : 16;
    return row > 0 && row * bytes % together == 0 &&
           reinterpret_cast<unsigned long long>(at) % together == 0;
  };
  int found = whole(c.out[0], op == kCrossAttention ? w : n, 4, size) << 16;
  found |= whole(c.out[1], n, 4, 4) << 17;
  for (int i = 0; i < 6; ++i) {
    found |= whole(c.in[i], rows[op][i], 4, size) << i;
    found |= whole(c.in[i], rows[op][i], 8, size) << (8 + i);
  }
  return found;
}
// Elements of input i, and of the output, that may be read or written at once.
constexpr int fit_of(Call const& c, int i) {
  return c.fits >> (8 + i) & 1 ? 8 : c.fits >> i & 1 ? 4 : 1;
}
constexpr int fit_out(Call const& c, int i) { return c.fits >> (16 + i) & 1 ? 4 : 1; }

#ifndef __CUDACC__
// Decide the launches of a call and set its chunks and span; pointers are not looked at.
inline Plan plan(Operator op, Type type, Call& c) {
  Plan p{};
  if (c.batch < 1 || c.batch > 65535 || c.pixels < 1 || c.words < 1 || c.words > kMaxWords ||
      c.channels < 1 || c.channels > kMaxWidth || c.heads < 1 || c.heads > 1024 || c.width < 1 ||
      c.width > kMaxWidth || c.pixels > kMaxStrips * kPiece)
    return p;
  int const size = size_of(type), strips = ceil_div(c.pixels, kPiece);
  int const groups = groups_of(c.words), wide = padded_words(c.words);
  cut(op, c);
  auto add = [&p](char const* name, int x, int y, int z, int shared) {
    p.launch[p.launches++] = Launch{name, {x, y, z}, shared};
  };
  if (op == kCrossAttention) {
    add("cross_attention", strips, ceil_div(c.width, kReach), c.batch, kRoom);
  } else if (op == kNormAttention) {
    int const each = strips_of(c), slices = ceil_div(c.channels, kPiece);
    p.workspace = norm_places(c, size).end;
    add("norm_scores", c.chunks, 1, c.batch, kWarps * kSquare * 4 + (each + 2) * wide * 4);
    add("norm_columns", slices, 1, c.batch,
        kThreads * 16 + record_of(c.words) * 4 + wide * 4 + kWarps * wide * 8);
    add("norm_thin", slices, groups, c.batch, kRoom);
    int const few = outputs_of(c);
    add("norm_output", ceil_div(strips, few), ceil_div(c.channels, kReach), c.batch,
        kRoom + few * groups * kPiece * kPiece * size);
  } else {
    p.workspace = mutual_places(c, size).end;
    add("mutual_seen", c.chunks, c.heads * groups, c.batch, kRoom + kWarps * kPiece * 8);
    add("mutual_pairs", ceil_div(c.words, kWarps), c.heads, c.batch, kWarps * c.width * 4);
    add("mutual_product", strips, groups, c.batch, kRoom);
  }
  return p;
}

// Set what follows from the pointers.
inline void align(Operator op, Type type, Call& c) {
  int const size = size_of(type);
  Places const p = op == kNormAttention ? norm_places(c, size)
                   : op == kMutualAttention ? mutual_places(c, size)
                                            : Places();
  for (int i = 0; i < 6; ++i) c.part[i] = static_cast<char*>(c.work) + p.at[i];
  c.fits = fits(op, size, c);
}
#endif

}  // namespace refedge
