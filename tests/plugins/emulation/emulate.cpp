// Runs the kernels' own source on the host: a fiber for every thread of a block, switched at
// barriers. The order in which threads run between barriers is given by the caller, shared memory
// starts as NaN, so a missing barrier or an unwritten cell changes the result.
#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define REFEDGE_SHARED(name) char* const name = emulation::shared

struct Dim3 {
  unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx;
struct uint4 {
  unsigned x, y, z, w;
};
using std::max;
using std::min;

struct __half {
  _Float16 v;
};
static inline float __half2float(__half h) { return static_cast<float>(h.v); }
static inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
struct __nv_bfloat16 {
  uint16_t bits;
};
static inline float __bfloat162float(__nv_bfloat16 h) {
  uint32_t const bits = static_cast<uint32_t>(h.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace emulation {
constexpr int kThreads = 256, kStack = 64 * 1024, kShared = 256 * 1024;
alignas(128) static char shared[kShared];
static ucontext_t scheduler, context[kThreads];
static jmp_buf back, place[kThreads];  // a jump costs no system call, a switch of contexts two
static bool started[kThreads];
static std::vector<char> stacks;
static void (*step)();
static int current, order;
// where a thread waits: 0 runs, 1 at the block's barrier, 2 at its warp's, 3 is done
static int waits[kThreads];
static float lanes[kThreads];
static bool votes[kThreads], verdict, diverged;

static void enter(int kind) {
  waits[current] = kind;
  if (!_setjmp(place[current])) _longjmp(back, 1);
}
static void body() {
  step();
  waits[current] = 3;
  _longjmp(back, 1);
}
static void resume() {
  if (_setjmp(back)) return;
  if (started[current]) _longjmp(place[current], 1);
  started[current] = true;
  swapcontext(&scheduler, &context[current]);
}

// Run a block to its end; false if threads wait for others that never come.
static bool block() {
  std::memset(shared, 0xff, kShared);
  for (int i = 0; i < kThreads; ++i) {
    getcontext(&context[i]);
    context[i].uc_stack.ss_sp = stacks.data() + i * kStack;
    context[i].uc_stack.ss_size = kStack;
    context[i].uc_link = nullptr;
    makecontext(&context[i], body, 0);
    waits[i] = started[i] = 0;
  }
  for (;;) {
    for (int k = 0; k < kThreads; ++k) {
      // forwards, backwards, or scattered by an odd factor
      current = order == 0 ? k : order == 1 ? kThreads - 1 - k : k * 77 % kThreads;
      if (waits[current]) continue;
      threadIdx.x = current;
      resume();
    }
    int done = 0, all = 0;
    bool moved = false;
    for (int w = 0; w < kThreads; w += 32) {
      int warp = 0;
      for (int i = w; i < w + 32; ++i) {
        warp += waits[i] == 2;
        all += waits[i] == 1;
        done += waits[i] == 3;
      }
      if (warp == 32) {
        moved = true;
        for (int i = w; i < w + 32; ++i) waits[i] = 0;
      }
    }
    if (done == kThreads) return true;
    if (all && all + done == kThreads) {
      moved = true;
      verdict = false;
      for (int i = 0; i < kThreads; ++i) {
        if (waits[i] == 1) verdict |= votes[i], waits[i] = 0;
      }
    }
    if (!moved) return false;
  }
}
}  // namespace emulation

static void __syncthreads() {
  emulation::votes[emulation::current] = false;
  emulation::enter(1);
}
static bool __syncthreads_or(bool vote) {
  emulation::votes[emulation::current] = vote;
  emulation::enter(1);
  return emulation::verdict;
}
static void __syncwarp() { emulation::enter(2); }
static float __shfl_sync(unsigned, float v, int from) {
  emulation::lanes[emulation::current] = v;
  emulation::enter(2);
  float const got = emulation::lanes[emulation::current / 32 * 32 + from % 32];
  emulation::enter(2);
  return got;
}
static float __shfl_xor_sync(unsigned mask, float v, int flip) {
  return __shfl_sync(mask, v, emulation::current % 32 ^ flip);
}
static float rsqrtf(float v) { return 1.f / std::sqrt(v); }

// Tensor cores: lane 0 holds a warp's pieces whole and works for all, between two meetings.
namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
enum layout_t { mem_row_major };
template <class Use, int, int, int, class T, class = row_major> struct fragment {
  static constexpr int num_elements = 256;
  T x[256];
};
template <class W> static void together(W const& work) {
  emulation::enter(2);
  if (emulation::current % 32 == 0) work();
  emulation::enter(2);
}
template <class F> void fill_fragment(F& f, float v) {
  together([&] {
    for (auto& x : f.x) x = v;
  });
}
template <class F, class T> void load_matrix_sync(F& f, T const* from, int row) {
  if (reinterpret_cast<uintptr_t>(from) % 32 || row * sizeof(T) % 16) emulation::diverged = true;
  together([&] {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) f.x[i * 16 + j] = from[i * row + j];
  });
}
template <class F> void store_matrix_sync(float* to, F const& f, int row, layout_t) {
  if (reinterpret_cast<uintptr_t>(to) % 32 || row % 4) emulation::diverged = true;
  together([&] {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) to[i * row + j] = f.x[i * 16 + j];
  });
}
}  // namespace nvcuda::wmma

#include "../../../plugins/kernels/tile.h"

namespace nvcuda::wmma {
template <class S, class A, class B> void mma_sync(S& d, A const& a, B const& b, S const& c) {
  together([&] {
    float left[16][16], right[16][16];
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j)
        left[i][j] = refedge::to_float(a.x[i * 16 + j]),
        right[i][j] = refedge::to_float(b.x[i * 16 + j]);
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 16; ++j) {
        float sum = c.x[i * 16 + j];
        for (int k = 0; k < 16; ++k) sum += left[i][k] * right[k][j];
        d.x[i * 16 + j] = sum;
      }
  });
}
}  // namespace nvcuda::wmma

#include "../../../plugins/kernels/kernels.cu"
#include "../../../plugins/kernels/quick.cu"

// Run `step` as every thread of a grid; 0, 3 or 4 as below.
static int run(int const (&grid)[3], int shared, int order) {
  if (shared > 48 * 1024) return 4;
  emulation::stacks.resize(emulation::kThreads * emulation::kStack);
  emulation::order = order;
  emulation::diverged = false;
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) {
        blockIdx = {unsigned(x), unsigned(y), unsigned(z)};
        if (!emulation::block() || emulation::diverged) return 3;
      }
  return 0;
}

// Call a kernel with pointers to its arguments, as cuLaunchKernel gets them.
template <class... A, size_t... I>
static void unpacked(void (*kernel)(A...), void** given, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(given[I])...);
}
template <class... A> static void call(void (*kernel)(A...), void** given) {
  unpacked(kernel, given, std::index_sequence_for<A...>());
}
#define REFEDGE_ENTRY(name) {#name, [](void** given) { call(refedge::name, given); }}
#define REFEDGE_ENTRIES(name) \
  REFEDGE_ENTRY(name##_float32), REFEDGE_ENTRY(name##_float16), REFEDGE_ENTRY(name##_bfloat16)
static std::map<std::string, void (*)(void**)> const quick = {
    REFEDGE_ENTRIES(quick_cross_weights), REFEDGE_ENTRIES(quick_cross_output),
    REFEDGE_ENTRIES(quick_norm_scores), REFEDGE_ENTRIES(quick_norm_columns),
    REFEDGE_ENTRIES(quick_norm_thin), REFEDGE_ENTRIES(quick_norm_output),
    REFEDGE_ENTRIES(quick_mutual_seen), REFEDGE_ENTRIES(quick_mutual_pairs),
    REFEDGE_ENTRIES(quick_mutual_product)};

extern "C" {
// Bytes of workspace, or -1 if the operator does not take the call.
long long refedge_workspace(int op, int type, refedge::Call* call) {
  auto const plan = refedge::plan(refedge::Operator(op), refedge::Type(type), *call);
  return plan.launches ? static_cast<long long>(plan.workspace) : -1;
}

// The launches of a call, its chunks, and which rows may be read 16 bytes at a time.
int refedge_plan(int op, int type, refedge::Call* call, refedge::Plan* found) {
  *found = refedge::plan(refedge::Operator(op), refedge::Type(type), *call);
  refedge::align(refedge::Operator(op), refedge::Type(type), *call);
  return found->launches;
}

// 0: done; 1: refused; 2: no such kernel; 3: threads wait for ever, or misaligned pieces; 4: more
// shared memory than every architecture gives without being asked.
int refedge_emulate(int op, int type, refedge::Call* call, int order) {
  static char const* const suffix[] = {"_float32", "_float16", "_bfloat16"};
  auto const plan = refedge::plan(refedge::Operator(op), refedge::Type(type), *call);
  refedge::align(refedge::Operator(op), refedge::Type(type), *call);
  if (!plan.launches) return 1;
  Dl_info own;
  dladdr(reinterpret_cast<void*>(&refedge_workspace), &own);
  static void* const library = dlopen(own.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  static refedge::Call argument;
  static void (*kernel)(refedge::Call);
  argument = *call;
  for (int i = 0; i < plan.launches; ++i) {
    auto const& l = plan.launch[i];
    kernel = reinterpret_cast<void (*)(refedge::Call)>(
        dlsym(library, (std::string(l.kernel) + suffix[type]).c_str()));
    if (!kernel) return 2;
    emulation::step = [] { kernel(argument); };
    if (int const status = run(l.grid, l.shared, order)) return status;
  }
  return 0;
}

// The same for a kernel of the ahead-of-time plugins.
int refedge_quick(char const* name, void** arguments, int const (&grid)[3], int shared, int order) {
  auto const found = quick.find(name);
  if (found == quick.end()) return 2;
  static void (*kernel)(void**);
  static void** given;
  kernel = found->second, given = arguments;
  emulation::step = [] { kernel(given); };
  return run(grid, shared, order);
}
}
