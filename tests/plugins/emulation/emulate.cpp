// Runs the kernels' own source on the host: a fiber for every thread of a block, switched at
// barriers. The order in which threads run between barriers is given by the caller, shared memory
// starts as NaN, so a missing barrier or an unwritten cell changes the result.
#include <dlfcn.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#define __device__
#define __noinline__
#define __global__
#define __launch_bounds__(...)
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
static char *shared, *room;  // in front of a page that nobody may touch
static int asked;
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

static void share(int bytes) {
  if (!room) {
    auto const how = MAP_PRIVATE | MAP_ANONYMOUS;
    room = static_cast<char*>(mmap(nullptr, kShared + 4096, PROT_READ | PROT_WRITE, how, -1, 0));
    mprotect(room + kShared, 4096, PROT_NONE);
  }
  asked = (bytes + 15) / 16 * 16;
  shared = room + kShared - asked;
}

// Run a block to its end; false if threads wait for others that never come.
static bool block() {
  std::memset(shared, 0xff, asked);
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
static unsigned __ballot_sync(unsigned, bool vote) {
  emulation::lanes[emulation::current] = vote;
  emulation::enter(2);
  unsigned found = 0;
  for (int i = 0; i < 32; ++i)
    found |= unsigned(emulation::lanes[emulation::current / 32 * 32 + i] != 0.f) << i;
  emulation::enter(2);
  return found;
}
static float rsqrtf(float v) { return 1.f / std::sqrt(v); }

#define REFEDGE_EMULATED
namespace refedge {
// Any lane's value, all at once.
template <class V> static V from_lane(V const& v, int lane) {
  static char given[emulation::kThreads][256];
  static_assert(sizeof(V) <= 256);
  std::memcpy(given[emulation::current], &v, sizeof(V));
  emulation::enter(2);
  V found;
  std::memcpy(&found, given[emulation::current / 32 * 32 + lane % 32], sizeof(V));
  emulation::enter(2);
  return found;
}
}  // namespace refedge
#include "../../../plugins/kernels/piece.h"

// Tensor cores, after the PTX ISA's figures: "Matrix Fragments for mma.m16n8k16 with floating point
// type", with g = lane / 4 and t = lane % 4: a0 and a1 row g, column 2 t and 2 t + 1; a2 and a3 row
// g + 8; a4 and a5 row g, column 2 t + 8; a6, a7 row g + 8; b0 and b1 rows 2 t and 2 t + 1, column
// g; b2, b3 rows 2 t + 8; c0 and c1 row g, columns 2 t and 2 t + 1; c2, c3 row g + 8.
template <class T>
void refedge::mma(float (&c)[2], float (&d)[2], Pair<T> const (&a)[4], Pair<T> const (&b)[2]) {
  struct Given {
    float c[4];
    T a[8], b[4];
  };
  static Given given[emulation::kThreads];
  auto& mine = given[emulation::current];
  for (int i = 0; i < 2; ++i) mine.c[i] = c[i], mine.c[2 + i] = d[i];
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  emulation::enter(2);
  auto const* const warp = given + emulation::current / 32 * 32;
  int const lane = emulation::current % 32;
  float found[4];
  for (int e = 0; e < 4; ++e) {
    int const row = lane / 4 + (e < 2 ? 0 : 8), column = lane % 4 * 2 + e % 2;
    found[e] = mine.c[e];
    for (int k = 0; k < 16; ++k) {
      int const of_a = row % 8 * 4 + k % 8 / 2, of_b = column * 4 + k % 8 / 2;
      found[e] += to_float(warp[of_a].a[k % 2 + (row < 8 ? 0 : 2) + (k < 8 ? 0 : 4)]) *
                  to_float(warp[of_b].b[k % 2 + (k < 8 ? 0 : 2)]);
    }
  }
  emulation::enter(2);
  for (int i = 0; i < 2; ++i) c[i] = found[i], d[i] = found[2 + i];
}

// "movmatrix": lane i gives elements 2 (i % 4) and 2 (i % 4) + 1 of row i / 4, and gets those of
// column i / 4.
template <class T> refedge::Pair<T> refedge::movmatrix(Pair<T> p) {
  static T given[emulation::kThreads][2];
  std::memcpy(given[emulation::current], &p, sizeof p);
  emulation::enter(2);
  int const warp = emulation::current / 32 * 32, lane = emulation::current % 32;
  T found[2];
  for (int e = 0; e < 2; ++e) found[e] = given[warp + (lane % 4 * 2 + e) * 4 + lane / 8][lane / 4 % 2];
  emulation::enter(2);
  std::memcpy(&p, found, sizeof p);
  return p;
}

#include "../../../plugins/kernels/kernels.cu"
#include "../../../plugins/kernels/quick.cu"

// Run `step` as every thread of a grid; 0, 3 or 4 as below.
static int run(int const (&grid)[3], int shared, int order) {
  if (shared > 48 * 1024) return 4;
  emulation::share(shared);
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
    REFEDGE_ENTRIES(quick_cross_attention),
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

// 0: done; 1: refused; 2: no such kernel; 3: threads wait for ever; 4: more
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
