// What this machine can do at best: the ceilings that benchmarks compare kernels with.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "int8_dot.h"

namespace pyops {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `work(thread)` on all threads at once, `rounds` times; the shortest round in seconds.
double best_round(int threads, int rounds, const std::function<void(int)>& work) {
  std::atomic<int> round{0}, finished{0};
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++)
    others.emplace_back([&, t] {
      for (int r = 1; r <= rounds; r++) {
        while (round.load() < r) std::this_thread::yield();
        work(t);
        finished++;
      }
    });
  double best = 1e30;
  for (int r = 1; r <= rounds; r++) {
    const double start = seconds();
    round.store(r);
    work(0);
    while (finished.load() < (threads - 1) * r) std::this_thread::yield();
    best = std::min(best, seconds() - start);
  }
  for (auto& t : others) t.join();
  return best;
}

#if defined(__x86_64__)

PYOPS_TARGET_BEGIN_VNNI
double vnni_peak_ops(int64_t n) {
#define PYOPS_STEP(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n\t"
  for (int64_t i = 0; i < n; i++)
    __asm__ volatile(PYOPS_STEP(0) PYOPS_STEP(1) PYOPS_STEP(2) PYOPS_STEP(3) PYOPS_STEP(4) PYOPS_STEP(5) PYOPS_STEP(6)
                         PYOPS_STEP(7) PYOPS_STEP(8) PYOPS_STEP(9) PYOPS_STEP(10) PYOPS_STEP(11)::
                             : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                               "xmm11");
#undef PYOPS_STEP
  return 12.0 * 128 * n;
}
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AMX
double amx_peak_ops(int64_t n) {
  amx::TileConfig config(amx::kTileShapes);
  for (int64_t i = 0; i < n; i++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  return 4.0 * 2 * 16 * 16 * 64 * n;
}
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
void read_avx512(const int8_t* p, int64_t bytes) {
  __m512i s[8];
  for (auto& v : s) v = _mm512_setzero_si512();
  for (int64_t i = 0; i + 512 <= bytes; i += 512)
    for (int j = 0; j < 8; j++) s[j] = _mm512_xor_si512(s[j], _mm512_loadu_si512(p + i + j * 64));
  for (auto& v : s) __asm__ volatile("" ::"v"(v));
}

// Three streams side by side, as the kernels for few rows read panels.
void read_beside_avx512(const int8_t* p, int64_t bytes) {
  const int64_t third = bytes / 3 / 512 * 512;
  __m512i s[8];
  for (auto& v : s) v = _mm512_setzero_si512();
  for (int64_t i = 0; i < third; i += 512)
    for (int k = 0; k < 3; k++) {
      const int8_t* q = p + k * third + i;
      prefetch_beside(q);
      for (int j = 0; j < 8; j++) s[j] = _mm512_xor_si512(s[j], _mm512_loadu_si512(q + j * 64));
    }
  for (auto& v : s) __asm__ volatile("" ::"v"(v));
  read_avx512(p + 3 * third, bytes - 3 * third);
}
PYOPS_TARGET_END

#endif

void read_generic(const int8_t* p, int64_t bytes) {
  uint64_t s[8] = {};
  for (int64_t i = 0; i + 64 <= bytes; i += 64)
    for (int j = 0; j < 8; j++) {
      uint64_t v;
      std::memcpy(&v, p + i + j * 8, 8);
      s[j] ^= v;
    }
  for (auto& v : s) __asm__ volatile("" ::"r"(v));
}

constexpr int kMaxStreams = 8, kUpdateStep = 64;

struct Streams {
  const float* read[kMaxStreams];
  float* update[kMaxStreams];
  int reads, updates;
};

// Elements [begin, end): 256 bytes of every array in turn, as an optimizer goes through gradient, parameter and states,
// each prefetched 3 KiB ahead: the hardware starts anew at every page.
#define PYOPS_UPDATE(isa)                                           \
  void update_##isa(const Streams& s, int64_t begin, int64_t end) { \
    using namespace isa;                                            \
    constexpr int kVecs = kUpdateStep / Vec::kLanes;                \
    for (int64_t i = begin; i < end; i += kUpdateStep) {            \
      Vec sum[kVecs];                                               \
      for (auto& v : sum) v = set1(0.0f);                           \
      for (int r = 0; r < s.reads; r++)                             \
        for (int j = 0; j < kVecs; j++) {                           \
          const float* p = s.read[r] + i + j * Vec::kLanes;         \
          __builtin_prefetch(p + 768);                              \
          sum[j] = sum[j] + load(p);                                \
        }                                                           \
      for (int u = 0; u < s.updates; u++)                           \
        for (int j = 0; j < kVecs; j++) {                           \
          float* p = s.update[u] + i + j * Vec::kLanes;             \
          __builtin_prefetch(p + 768);                              \
          store(p, sum[j] + load(p));                               \
        }                                                           \
    }                                                               \
  }

PYOPS_UPDATE(generic)
#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX2
PYOPS_UPDATE(avx2)
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
PYOPS_UPDATE(avx512)
PYOPS_TARGET_END
#endif
#undef PYOPS_UPDATE

struct Free {
  void operator()(int8_t* p) const { std::free(p); }
};

// Memory on 2 MiB pages, where the kernel grants them, each byte 1: as floats, normal numbers.
std::unique_ptr<int8_t[], Free> filled_buffer(int64_t bytes) {
  constexpr int64_t kHuge = 2 << 20;
  const int64_t total = (bytes + kHuge) & ~(kHuge - 1);
  std::unique_ptr<int8_t[], Free> data(static_cast<int8_t*>(std::aligned_alloc(kHuge, total)));
  if (!data) throw std::bad_alloc();
  advise_huge_pages(data.get(), total);
  std::memset(data.get(), 1, total);
  return data;
}

}  // namespace

double int8_peak_gops(const std::string& isa, int threads) {
#if defined(__x86_64__)
  const bool amx = isa == "amx", vnni = isa == "avx512vnni";
  if ((amx && detected_isa() >= Isa::amx) || (vnni && detected_isa() >= Isa::avx512vnni)) {
    const int64_t n = amx ? 50'000 : 500'000;
    double ops = 0;
    const double time = best_round(threads, 20, [&](int t) {
      const double done = amx ? amx_peak_ops(n) : vnni_peak_ops(n);
      if (t == 0) ops = done;
    });
    return ops * threads / time / 1e9;
  }
#endif
  (void)threads;
  throw std::invalid_argument("isa='" + isa +
                              "': the peak is known for avx512vnni and amx, where the machine has them");
}

double read_bandwidth_gbs(int64_t bytes, int threads) {
  if (threads < 1 || bytes < 4096 * int64_t(threads))
    throw std::invalid_argument("threads must be at least 1 and bytes at least 4096 a thread");
  const int64_t part = bytes / threads / 4096 * 4096;
  const auto data = filled_buffer(part * threads);
  std::vector<void (*)(const int8_t*, int64_t)> ways{read_generic};
#if defined(__x86_64__)
  if (detected_isa() >= Isa::avx512) ways = {read_avx512, read_beside_avx512};
#endif
  double best = 1e30;
  for (auto read : ways)
    best = std::min(best, best_round(threads, 20, [&](int t) { read(data.get() + t * part, part); }));
  return part * threads / best / 1e9;
}

double update_bandwidth_gbs(int64_t bytes, int threads, int read_streams, int update_streams) {
  if (read_streams < 0 || read_streams > kMaxStreams || update_streams < 1 || update_streams > kMaxStreams)
    throw std::invalid_argument("read_streams must be 0 … 8 and update_streams 1 … 8");
  const int streams = read_streams + update_streams;
  if (threads < 1 || bytes < 4096 * int64_t(threads) * streams)
    throw std::invalid_argument("threads must be at least 1 and bytes at least 4096 a thread and stream");
  const int64_t part = bytes / 4 / streams / threads / kUpdateStep * kUpdateStep;  // elements
  // Each array begins 17 cache lines further into its page than the one before: equal offsets would contend for the
  // same sets of the cache, and a load would wait for a store that only looks like its own address.
  const int64_t stride = (part * threads + 1023) / 1024 * 1024 + 17 * 16;
  const auto data = filled_buffer(4 * stride * streams);
  float* const first = reinterpret_cast<float*>(data.get());
  Streams s{{}, {}, read_streams, update_streams};
  for (int i = 0; i < read_streams; i++) s.read[i] = first + i * stride;
  for (int i = 0; i < update_streams; i++) s.update[i] = first + (read_streams + i) * stride;
  auto update = &update_generic;
#if defined(__x86_64__)
  if (detected_isa() >= Isa::avx2) update = &update_avx2;
  if (detected_isa() >= Isa::avx512) update = &update_avx512;
#endif
  const double time = best_round(threads, 20, [&](int t) { update(s, t * part, (t + 1) * part); });
  return 4.0 * part * threads * (read_streams + 2 * update_streams) / time / 1e9;
}

}  // namespace pyops
