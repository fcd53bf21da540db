// int4_linear with x as it is: y[m, n] = act(Σ_g s[n, g] · Σ_{k ∈ g} x[m, k] · (q[n, k] - z[n, g]) + …).
//
// The launcher is that of float_linear.h; here stands how int4 panels are unpacked and streamed. The differences q - z
// are exact in bf16. AMX and the streaming kernels therefore sum x·(q - z) within a group, and scale the sums: one
// rounding a group. FMA tiles take fp32 weights (q - z)·s, rounded once each, as dequantize_int4 gives them.
#include "float_linear.h"
#include "int4_problem.h"
#include "quad_floats.h"
#include "scratch.h"

namespace pyops {

using NibbleStreamFn = void (*)(const float* x, const Int4Panel& panel, int64_t K, int64_t group_k, float* acc);

PYOPS_INLINE void prefetch_nibbles(const uint8_t* p) {
#if defined(__x86_64__)
  prefetch_stream(reinterpret_cast<const int8_t*>(p));
#endif
}

}  // namespace pyops

#define PYOPS_ISA_FILE "int4_float.inc"
#include "for_each_isa.h"

namespace pyops {
namespace {

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX512
// k … k + count of a panel, whole rows of 8 → w [count/2][32 n][2 k] bf16, each q - z, and the scales of the groups
// that it touches, [groups][32].
void unpack_int4_bf16(const Int4Panel& p, int64_t k, int64_t count, int64_t group_k, int8_t* w, float* scale) {
  // What a word's lowest five bits are as a signed number, in bf16.
  alignas(64) static constexpr uint16_t kBf16[32] = {0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                     0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170,
                                                     0xc180, 0xc170, 0xc160, 0xc150, 0xc140, 0xc130, 0xc120, 0xc110,
                                                     0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
  const __m512i table = _mm512_load_si512(kBf16);
  // Bytes 0 and 1 of each lane, or 2 and 3, as words; a word's upper byte is ignored.
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
  const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(2));
  const uint8_t* nibbles = p.weight + k / 8 * kNibbleRow;
  for (int64_t end = k + count; k < end; scale += kPanelN) {
    const int64_t group = k / group_k, stop = smaller((group + 1) * group_k, end);
    avx512::Quads zero[2];
    for (int j = 0; j < 2; j++) {
      avx512::store(scale + j * 16, avx512::load_scale(p, group, j * 16));
      zero[j] = avx512::load_zero(p, group, j * 16);
    }
    for (; k < stop; k += 8, nibbles += kNibbleRow, w += 4 * kPanelRow)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        avx512::Quads four[2];
        avx512::nibble_quads(avx512::load_quads(reinterpret_cast<const int8_t*>(nibbles) + j * 64), zero[j], four[0],
                             four[1]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          int8_t* to = w + i * 2 * kPanelRow + j * 64;
          _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_shuffle_epi8(four[i].v, first), table));
          _mm512_store_si512(to + kPanelRow, _mm512_permutexvar_epi16(_mm512_shuffle_epi8(four[i].v, second), table));
        }
      }
  }
}
PYOPS_TARGET_END
#else
void unpack_int4_bf16(const Int4Panel&, int64_t, int64_t, int64_t, int8_t*, float*) {}
#endif

struct Kernels {
  int stream_rows;
  const NibbleStreamFn* stream;
  decltype(&generic::unpack_int4_floats) unpack;
};

const Kernels& select() {
  static const Kernels generic{generic::kStreamRows, generic::nibble_streams(), generic::unpack_int4_floats};
#if defined(__x86_64__)
  static const Kernels avx2{avx2::kStreamRows, avx2::nibble_streams(), avx2::unpack_int4_floats},
      avx512{avx512::kStreamRows, avx512::nibble_streams(), avx512::unpack_int4_floats};
  if (active_isa() >= Isa::avx512) return avx512;
  if (active_isa() == Isa::avx2) return avx2;
#endif
  return generic;
}

class Int4Weight {
 public:
  static constexpr int kExponent = 0;  // kQuadScale is undone by the scales of groups
  static constexpr int kBesideRows = 0, kDigitRows = 0;
  static constexpr bool kGrouped = true;

  // A canonical weight is packed here, into scratch.
  explicit Int4Weight(const Int4Problem& problem)
      : p(problem), kernels(select()), all{p.weight, p.scale, p.scale_type, p.zero, nullptr} {
    if (p.packed) return;
    thread_local Scratch w, scale, zero;
    const int64_t panels = panels_of(p.N), groups = panels * p.padded_groups() * kPanelN;
    all.weight = reinterpret_cast<uint8_t*>(w.get(panels * int4_panel_bytes(p.k64())));
    all.scale = scale.get(groups * sizeof(float));
    if (p.zero) all.zero = reinterpret_cast<uint8_t*>(zero.get(groups));
    in_parallel(panels, 8 * kPanelN * double(p.K), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) pack_int4_panel(p, i * kPanelN, nth_panel(all, i, p));
    });
  }

  int64_t group() const { return p.group_quads * 4; }
  int64_t groups_of(int64_t k) const { return k / group() + 2; }
  int stream_rows() const { return kernels.stream_rows; }
  int beside() const { return 1; }
  void stream(int64_t panel, int, const float* x, int rows, float* acc) const {
    kernels.stream[rows - 1](x, nth_panel(all, panel, p), p.k64() * 64, group(), acc);
  }
  void unpack(int64_t panel, int64_t k, int64_t count, float* w) const {
    kernels.unpack(nth_panel(all, panel, p), k, (count + 31) / 32 * 32, group(), w);
  }
  void unpack_bf16(int64_t panel, int64_t k, int64_t count, int8_t* w, float* scale) const {
    unpack_int4_bf16(nth_panel(all, panel, p), k, (count + 31) / 32 * 32, group(), w, scale);
  }
  void column_scales(int64_t, int, float* s) const { std::fill(s, s + kPanelN, 1.0f); }

 private:
  const Int4Problem& p;
  const Kernels& kernels;
  Int4Panel all;  // the first panel
};

// x [M, K] in the order of the weight's columns.
template <class Bits>
const void* gather(const Int4Problem& p) {
  thread_local Scratch scratch;
  Bits* out = reinterpret_cast<Bits*>(scratch.get(std::max<int64_t>(p.M * p.K, 1) * sizeof(Bits)));
  const Bits* x = static_cast<const Bits*>(p.x);
  in_parallel(p.M, p.K + 1.0, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; m++)
      for (int64_t k = 0; k < p.K; k++) out[m * p.K + k] = x[m * p.K + p.order[k]];
  });
  return out;
}

}  // namespace

void int4_linear_float(const Int4Problem& p) {
  LinearProblem problem = p;
  if (p.order) problem.x = p.x_type == ScalarType::Float ? gather<uint32_t>(p) : gather<uint16_t>(p);
  float_linear(problem, Int4Weight(p));
}

}  // namespace pyops
