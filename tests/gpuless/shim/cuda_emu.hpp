// Runs the source of CUDA kernels as host C++: each CUDA thread is a fiber, blocks run one after another.
//
// A fiber runs until it waits at a barrier; shuffles, votes and matrix instructions are barriers of their warp. The order
// in which the fibers of a block take turns is set by the environment variable CUDA_EMU_ORDER (0 forward, 1 reverse, any
// other number seeds a shuffle), so that a missing barrier shows up as a wrong result in some order. Memory is plain host
// memory: AddressSanitizer finds accesses out of bounds. Dynamic shared memory starts as 0xFF bytes (NaN as floats) in
// every block, and the destination of a cp.async holds 0xFF until its group has been waited for.
//
// Not modelled: blocks running at the same time, memory ordering, spinning on a flag, static __shared__ memory that is
// not initialized (it keeps the values of the block before).
#pragma once

#include <driver_types.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_EMU_ASAN(...) __VA_ARGS__
#else
#define CUDA_EMU_ASAN(...)
#endif

#undef __global__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

namespace cuda_emu {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_emu: %s\n", message);
  std::exit(3);
}

struct Barrier {
  int arrived = 0;
  int generation = 0;
};

struct CopyAsync {
  void* to;
  unsigned char bytes[16];
};

struct Thread {
  ucontext_t context;
  char* stack;
  uint3 index;
  int linear;
  bool done;
  std::vector<std::vector<CopyAsync>> copies;  // cp.async groups; the last one is still open
};

struct Warp {
  uint32_t live = 0;                    // lanes that have not returned
  std::map<uint32_t, Barrier> barriers;  // one for each mask of participants
  alignas(16) unsigned char box[kWarp][32];
};

struct Block {
  uint3 index;
  dim3 size, grid;
  int live;
  Barrier barrier;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  std::function<void()> body;
};

inline Block block;
inline Thread* current;
inline ucontext_t scheduler;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline bool progress;  // a barrier opened or a thread returned since the last round

inline int lane() { return current->linear % kWarp; }
inline Warp& warp() { return block.warps[current->linear / kWarp]; }

// ------------------------------------------------------------------------------------------------------------ scheduling

inline void resume(Thread& thread) {
  current = &thread;
  CUDA_EMU_ASAN(void* fake; __sanitizer_start_switch_fiber(&fake, thread.stack, kStackBytes);)
  swapcontext(&scheduler, &thread.context);
  CUDA_EMU_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
}

inline void pause(bool returns_later = true) {
  Thread* self = current;
  CUDA_EMU_ASAN(void* fake; __sanitizer_start_switch_fiber(returns_later ? &fake : nullptr, scheduler_stack,
                                                           scheduler_stack_bytes);)
  swapcontext(&self->context, &scheduler);
  CUDA_EMU_ASAN(__sanitizer_finish_switch_fiber(fake, nullptr, nullptr);)
  (void)returns_later;
}

inline void open_if_full(Barrier& barrier, int expected) {
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  barrier.arrived = 0;
  barrier.generation++;
  progress = true;
}

inline void wait(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  barrier.arrived++;
  open_if_full(barrier, expected);
  while (barrier.generation == generation) pause();
}

inline void sync_block() { wait(block.barrier, block.live); }

inline void sync_warp(uint32_t mask) {
  if (!(mask >> lane() & 1)) fail("a lane takes part in a warp operation whose mask does not name it");
  wait(warp().barriers[mask], std::popcount(mask & warp().live));
}

inline void thread_main() {
  CUDA_EMU_ASAN(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);)
  block.body();
  current->done = true;
  progress = true;
  Warp& own = warp();
  own.live &= ~(1u << lane());
  block.live--;
  open_if_full(block.barrier, block.live);
  for (auto& [mask, barrier] : own.barriers) open_if_full(barrier, std::popcount(mask & own.live));
  pause(false);
}

inline std::vector<int> thread_order(int threads) {
  const char* setting = std::getenv("CUDA_EMU_ORDER");
  const unsigned seed = setting ? unsigned(std::atoi(setting)) : 0;
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed <= 1) return order;
  unsigned state = seed;
  for (int i = threads - 1; i > 0; i--) {
    state = state * 1664525u + 1013904223u;
    std::swap(order[i], order[(state >> 8) % (i + 1)]);
  }
  return order;
}

inline void run_block(const std::vector<int>& order, char* stacks, size_t shared_bytes) {
  const int threads = int(order.size());
  block.shared.reset(new unsigned char[shared_bytes]);
  std::memset(block.shared.get(), 0xFF, shared_bytes);
  block.barrier = {};
  block.live = threads;
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  block.threads.assign(threads, Thread());
  for (int i = 0; i < threads; i++) {
    Thread& t = block.threads[i];
    t.stack = stacks + i * kStackBytes;
    t.linear = i;
    t.index = {i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y)};
    t.copies.resize(1);
    block.warps[i / kWarp].live |= 1u << i % kWarp;
    CUDA_EMU_ASAN(ASAN_UNPOISON_MEMORY_REGION(t.stack, kStackBytes);)  // frames of the block before never returned
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack;
    t.context.uc_stack.ss_size = kStackBytes;
    makecontext(&t.context, thread_main, 0);
  }
  while (block.live > 0) {
    progress = false;
    for (int i : order)
      if (!block.threads[i].done) resume(block.threads[i]);
    if (!progress) fail("deadlock: some threads of the block or warp never reach the barrier where others wait");
  }
}

template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 size, size_t shared_bytes, Args... args) {
  const std::vector<int> order = thread_order(int(size.x * size.y * size.z));
  const std::unique_ptr<char[]> stacks(new char[order.size() * kStackBytes]);
  block.size = size;
  block.grid = grid;
  block.body = [=] { kernel(args...); };
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        block.index = {x, y, z};
        run_block(order, stacks.get(), shared_bytes);
      }
}

// ----------------------------------------------------------------------------------------------------- warp exchanges

// Every lane of `mask` puts `value` in its box; then `read` sees all boxes; then the boxes are free again.
template <class T, class Read>
auto exchange(uint32_t mask, const T& value, Read read) {
  static_assert(sizeof(T) <= sizeof Warp::box[0]);
  std::memcpy(warp().box[lane()], &value, sizeof value);
  sync_warp(mask);
  const auto result = read([](int source) {
    T t;
    std::memcpy(&t, warp().box[source], sizeof t);
    return t;
  });
  sync_warp(mask);
  return result;
}

// Lanes exchange within segments of `width`; a lane without a source keeps its own value.
template <class T>
T shuffle(uint32_t mask, T value, int source_in_segment, int width) {
  const int first = lane() / width * width;
  const bool inside = source_in_segment >= 0 && source_in_segment < width;
  const int source = inside ? first + source_in_segment : lane();
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask does not name");
  return exchange(mask, value, [&](auto box) { return box(source); });
}

inline uint32_t ballot(uint32_t mask, bool vote) {
  return exchange(mask, uint32_t(vote), [&](auto box) {
    uint32_t votes = 0;
    for (int i = 0; i < kWarp; i++)
      if (mask >> i & 1) votes |= box(i) << i;
    return votes;
  });
}

}  // namespace cuda_emu

// ------------------------------------------------------------------------------------------------- CUDA's own vocabulary

#define threadIdx (cuda_emu::current->index)
#define blockIdx (cuda_emu::block.index)
#define blockDim (cuda_emu::block.size)
#define gridDim (cuda_emu::block.grid)
#define warpSize 32

using std::max;
using std::min;

inline void __syncthreads() { cuda_emu::sync_block(); }
inline void __syncwarp(uint32_t mask = ~0u) { cuda_emu::sync_warp(mask); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  return cuda_emu::shuffle(mask, value, source % width, width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int flip, int width = 32) {
  return cuda_emu::shuffle(mask, value, cuda_emu::lane() % width ^ flip, width);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
  return cuda_emu::shuffle(mask, value, cuda_emu::lane() % width + int(distance), width);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
  return cuda_emu::shuffle(mask, value, cuda_emu::lane() % width - int(distance), width);
}
inline uint32_t __ballot_sync(uint32_t mask, int vote) { return cuda_emu::ballot(mask, vote != 0); }
inline int __any_sync(uint32_t mask, int vote) { return cuda_emu::ballot(mask, vote != 0) != 0; }
inline int __all_sync(uint32_t mask, int vote) { return cuda_emu::ballot(mask, vote == 0) == 0; }

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  const T old = *p;
  *p = std::max(old, value);
  return old;
}

// Compile with -ffp-contract=off: these must not become part of a multiply-add.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += int(int8_t(a >> i)) * int(int8_t(b >> i));
  return sum;
}

#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_emu::block.shared.get())
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ((void)(stream), cuda_emu::launch([](auto... args) { kernel(args...); }, grid, block, shared_bytes, __VA_ARGS__))

// ------------------------------------------------------------- PTX instructions, by the fragment layouts of its manual

namespace cuda_emu {

struct MmaOperands {
  uint32_t a[4], b[2];
};

// The m16n8 family: K elements of E, packed into 32-bit registers. A register holds P = 4 / sizeof(E) neighbours in k;
// lane 4 · row + i holds register i of its row. A: registers 0, 2 are rows 0–7 and 1, 3 rows 8–15; 2, 3 and B's 1 are
// the upper half of K.
template <class E, class Sum, class ToSum>
void mma_m16n8(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToSum to_sum) {
  constexpr int P = 4 / sizeof(E), K = 8 * P;
  const MmaOperands own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto element = [&](uint32_t packed, int i) {
    return to_sum(std::bit_cast<std::array<E, P>>(packed)[size_t(i)]);
  };
  struct Four {
    Sum value[4];
  };
  const Four result = exchange(~0u, own, [&](auto box) {
    Four out;
    for (int e = 0; e < 4; e++) {
      const int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
      Sum sum = d[e];
      for (int k = 0; k < K; k++) {
        const int upper = k / (4 * P), i = k / P % 4;
        sum += element(box(row % 8 * 4 + i).a[row / 8 + 2 * upper], k % P) *
               element(box(column * 4 + i).b[upper], k % P);
      }
      out.value[e] = sum;
    }
    return out;
  });
  std::memcpy(d, result.value, sizeof d);
}

}  // namespace cuda_emu

inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_emu::mma_m16n8<int8_t>(d, a, b, [](int8_t v) { return int(v); });
}
inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_emu::mma_m16n8<__nv_bfloat16>(d, a, b, [](__nv_bfloat16 v) { return __bfloat162float(v); });
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cuda_emu::mma_m16n8<__half>(d, a, b, [](__half v) { return __half2float(v); });
}

// Lanes 8i … 8i+7 give the 16-byte rows of matrix i; register i gets 4 bytes of row lane / 4 of matrix i.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_emu::fail("an ldmatrix row does not start on 16 bytes");
  struct Row {
    uint32_t words[4];
  } own;
  std::memcpy(&own, row, 16);
  const Row result = cuda_emu::exchange(~0u, own, [](auto box) {
    Row out;
    for (int i = 0; i < 4; i++) out.words[i] = box(8 * i + cuda_emu::lane() / 4).words[cuda_emu::lane() % 4];
    return out;
  });
  std::memcpy(r, result.words, 16);
}

// Copies the first `bytes` of 16 and fills the rest with zeros; lands when its group is waited for.
inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    cuda_emu::fail("a cp.async does not start on 16 bytes");
  cuda_emu::CopyAsync copy = {shared, {}};
  std::memcpy(copy.bytes, global, size_t(bytes));
  std::memset(shared, 0xFF, 16);
  cuda_emu::current->copies.back().push_back(copy);
}
inline void cp_async_commit() { cuda_emu::current->copies.emplace_back(); }
// Waits until at most `Pending` of this thread's committed groups are still under way.
template <int Pending>
void cp_async_wait() {
  auto& groups = cuda_emu::current->copies;
  while (groups.size() > Pending + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}
