#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyops {
namespace {

constexpr const char* kNames[] = {"generic", "avx2", "avx512", "avx512vnni", "amx"};

#if defined(__x86_64__)

// The AMX registers are 8 KiB of state that Linux gives to a process only on request.
bool amx_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}

// EDX of CPUID leaf 7. __builtin_cpu_supports does not know AMX in GCC 12: bits 22 (AMX-BF16), 24 (AMX-TILE) and 25
// (AMX-INT8).
uint32_t cpuid_7_edx() {
  uint32_t a = 7, b, c = 0, d;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return d;
}
bool has_amx_int8() { return (cpuid_7_edx() >> 24 & 3) == 3 && amx_granted(); }

Isa detect() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return Isa::generic;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  if (!__builtin_cpu_supports("avx512vnni")) return Isa::avx512;
  return has_amx_int8() ? Isa::amx : Isa::avx512vnni;
}

#else
Isa detect() { return Isa::generic; }
#endif

Isa parse(const std::string& name) {
  if (name.empty()) return detected_isa();
  std::string known;
  for (int i = 0; i <= int(Isa::amx); i++) {
    if (name == kNames[i]) {
      if (Isa(i) <= detected_isa()) return Isa(i);
      throw std::invalid_argument("PYOPS_CPU_ISA=" + name + ": this machine offers up to " + isa_name(detected_isa()));
    }
    known += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::invalid_argument("PYOPS_CPU_ISA=" + name + " is not one of " + known);
}

std::atomic<int>& active() {
  static std::atomic<int> isa{int(parse(std::getenv("PYOPS_CPU_ISA") ? std::getenv("PYOPS_CPU_ISA") : ""))};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[int(isa)]; }

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

bool amx_multiplies_bf16() {
#if defined(__x86_64__)
  static const bool has = detected_isa() == Isa::amx && (cpuid_7_edx() >> 22 & 1);
  return has && active_isa() == Isa::amx;
#else
  return false;
#endif
}

Isa active_isa() { return Isa(active().load(std::memory_order_relaxed)); }

void force_isa(const std::string& name) { active().store(int(parse(name))); }

std::vector<std::string> available_isas() { return std::vector<std::string>(kNames, kNames + int(detected_isa()) + 1); }

void advise_huge_pages(const void* data, size_t bytes, bool filled) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin >= end) return;
  // Hints: where the kernel refuses them, 4 KiB pages serve as well. The second makes huge pages of what is there
  // already, for memory that malloc hands out again.
  constexpr int kMadvCollapse = 25;  // Linux 6.1; older C libraries do not name it
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  if (filled) (void)madvise(reinterpret_cast<void*>(begin), end - begin, kMadvCollapse);
#else
  (void)data, (void)bytes, (void)filled;
#endif
}

}  // namespace pyops
