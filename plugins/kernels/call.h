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
constexpr int kTile = 64;        // pixels of a tile, and rows or columns of an output tile
constexpr int kGroup = 32;       // words that are on chip at a time
constexpr int kMaxWords = 128;   // more than kGroup are streamed
constexpr int kMaxWidth = 1024;  // channels, and channels of a head
constexpr int kMaxChunks = 128;  // partial moments per expression

// The kernels' argument; `in` and `out` in the order of the operator's inputs and outputs.
struct Call {
  void const* in[6];
  void* out[2];
  void* work;
  void* part[5];  // pieces of the workspace, see *_places(); set by align()
  int batch, pixels, channels, words, heads;
  int width;   // channels of the values: D of CrossAttention, of a head of MutualAttention
  int chunks;  // runs of tiles whose partial results meet in the workspace; set by cut()
  int span;    // tiles of a run; set by cut()
  int vector;  // bit i: rows of in[i] start at multiples of 16 bytes; bit 8: those of out[0]
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
constexpr int depth_of(int size) { return 128 / size; }  // channels of one step of a product
constexpr int size_of(Type type) { return type == kFloat ? 4 : 2; }
// Elements from row to row in shared memory: 16 bytes more, so that rows fall on other banks.
constexpr int row_of(int columns, int size) { return columns + 16 / size; }
constexpr int tile_bytes(int rows, int columns, int size) {
  return rows * row_of(columns, size) * size;
}
constexpr int triangle(int n) { return n * (n + 1) / 2; }
constexpr int padded_words(int words) { return ceil_div(words, kGroup) * kGroup; }

// Byte offsets in the workspace, each a multiple of 256.
struct Places {
  unsigned long long at[5];
  unsigned long long end;
  constexpr Places() : at{}, end(0) {}
  constexpr void place(int i, unsigned long long bytes) {
    at[i] = end;
    end += (bytes + 255) / 256 * 256;
  }
};

// 0 weights [B, N, H T] in the operator's type.
constexpr Places cross_places(Call const& c, int size) {
  Places p;
  p.place(0, 1ull * c.batch * c.pixels * c.heads * c.words * size);
  return p;
}

// 0 weights [B, T, N] float, 1 partial moments [B, chunks, T + T (T + 1) / 2] float (room for the
// most chunks, so that more pixels never need less), 2 their mean
// [B, T] float, 3 columns and 4 thin [B, C, padded T] in the operator's type.
constexpr Places norm_places(Call const& c, int size) {
  Places p;
  p.place(0, 4ull * c.batch * c.words * c.pixels);
  int const tiles = ceil_div(c.pixels, kTile), most = tiles < kMaxChunks ? tiles : kMaxChunks;
  p.place(1, 4ull * c.batch * most * (c.words + triangle(c.words)));
  p.place(2, 4ull * c.batch * c.words);
  p.place(3, 1ull * c.batch * c.channels * padded_words(c.words) * size);
  p.place(4, 1ull * c.batch * c.channels * padded_words(c.words) * size);
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

// Set chunks and span.
constexpr void cut(Operator op, Call& c) {
  int const tiles = ceil_div(c.pixels, kTile);
  c.span = op == kNormAttention ? ceil_div(tiles, kMaxChunks) : 1;
  c.chunks = ceil_div(tiles, c.span);
}

// Which rows may be read 16 bytes at a time, from the pointers and the lengths of the rows.
inline int vectors(Operator op, int size, Call const& c) {
  int const n = c.pixels, k = c.channels, t = c.words, w = c.width;
  int const rows[3][6] = {{k, t, w, 0, 0, 0}, {n, k, 0, 0, k, k}, {w, 0, 0, n, w, 0}};
  auto fits = [size](void const* at, int row) {
    return row > 0 && row * size % 16 == 0 && reinterpret_cast<unsigned long long>(at) % 16 == 0;
  };
  int found = fits(c.out[0], op == kCrossAttention ? w : n) << 8;
  for (int i = 0; i < 6; ++i) found |= fits(c.in[i], rows[op][i]) << i;
  return found;
}

#ifndef __CUDACC__
// Decide the launches of a call and set its chunks and span; pointers are not looked at.
inline Plan plan(Operator op, Type type, Call& c) {
  Plan p{};
  int const size = size_of(type), tiles = ceil_div(c.pixels, kTile);
  int const groups = ceil_div(c.words, kGroup), words = padded_words(c.words);
  int const depth = depth_of(size);
  if (c.batch < 1 || c.batch > 65535 || c.pixels < 1 || c.words < 1 || c.words > kMaxWords ||
      c.channels < 1 || c.channels > kMaxWidth || c.heads < 1 || c.heads > 1024 || c.width < 1 ||
      c.width > kMaxWidth || tiles > 65535)
    return p;
  cut(op, c);
  auto add = [&p](char const* name, int x, int y, int z, int shared) {
    p.launch[p.launches++] = Launch{name, {x, y, z}, shared};
  };
  int const scores = tile_bytes(words, kTile, 4);  // one row a word
  int const by_word = tile_bytes(kGroup, depth, size) + tile_bytes(depth, kTile, size);
  if (op == kCrossAttention) {
    p.workspace = cross_places(c, size).end;
    int const by_pixel = tile_bytes(kTile, depth, size) + tile_bytes(depth, kGroup, size);
    add("cross_weights", c.heads, tiles, c.batch, tile_bytes(kTile, words, 4) + by_pixel);
    int const stages = tile_bytes(kTile, kGroup, size) + tile_bytes(kGroup, kTile, size);
    add("cross_output", ceil_div(c.width, kTile), tiles, c.batch,
        stages + tile_bytes(kTile, kTile, 4));
  } else if (op == kNormAttention) {
    p.workspace = norm_places(c, size).end;
    int const rows = ceil_div(c.channels, kTile);
    add("norm_scores", c.chunks, 1, c.batch, scores + by_word + 4 * c.words);
    add("norm_columns", ceil_div(c.channels, kThreads / 32), 1, c.batch,
        4 * (c.words + triangle(c.words) + kThreads / 32 * words));
    add("norm_thin", rows, groups, c.batch,
        tile_bytes(kTile, depth, size) + tile_bytes(depth, kGroup, size) +
            tile_bytes(kTile, kGroup, 4));
    add("norm_output", rows, tiles, c.batch,
        tile_bytes(kTile, depth, size) + tile_bytes(kGroup, kTile, size) +
            tile_bytes(depth, kTile, size) +
            tile_bytes(kTile, kTile, 4));
  } else {
    p.workspace = mutual_places(c, size).end;
    add("mutual_seen", tiles, c.heads * groups, c.batch,
        tile_bytes(kGroup, kTile, 4) + tile_bytes(kGroup, kTile, size) + by_word);
    add("mutual_pairs", ceil_div(c.words, kThreads / 32), c.heads, c.batch,
        kThreads / 32 * c.width * 4);
    add("mutual_product", tiles, groups, c.batch, scores + by_word);
  }
  return p;
}

// Set what follows from the pointers.
inline void align(Operator op, Type type, Call& c) {
  int const size = size_of(type);
  Places const p = op == kCrossAttention  ? cross_places(c, size)
                   : op == kNormAttention ? norm_places(c, size)
                                          : mutual_places(c, size);
  for (int i = 0; i < 5; ++i) c.part[i] = static_cast<char*>(c.work) + p.at[i];
  c.vector = vectors(op, size, c);
}
#endif

}  // namespace refedge
