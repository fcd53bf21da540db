// y[m, n] = act(s_w[n] · Σ_k x[m, k] · q_w[n, k] + bias[n] + residual[m, n])      (pyops/ops/int8_weight_linear.py)
//
// The launcher is that of float_linear.h; here stands how int8 panels are unpacked and streamed.
#include "digits.h"
#include "float_linear.h"
#include "int8_dot.h"
#include "int8_pack.h"
#include "linear_args.h"
#include "quad_floats.h"
#include "row_tiles.h"
#include "scratch.h"
#include "tensor.h"

namespace pyops {

using StreamFn = void (*)(const float* x, const int8_t* panels, int64_t k64, float* acc);

// At every four rows of each of P panels: see prefetch_beside.
template <int P>
PYOPS_INLINE void prefetch_rows(const int8_t* p, int64_t left, int64_t bytes) {
#if defined(__x86_64__)
  P > 1 ? prefetch_beside<P>(p, left, bytes) : prefetch_stream(p, 4 * kPanelRow);
#endif
}

}  // namespace pyops

#define PYOPS_ISA_FILE "int8_weight_linear.inc"
#include "for_each_isa.h"

namespace pyops {
namespace {

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX512
// `quads` rows of a packed panel → w [k/2][32 n][2 k] bf16, times kQuadScale. The integers are exact in 8 bits, so that
// the lower halves of their floats are zero.
PYOPS_INLINE void unpack_rows_bf16(const int8_t* panel, int64_t quads, int8_t* w) {
  for (int64_t q = 0; q < quads; q++, panel += kPanelRow, w += 2 * kPanelRow)
#pragma GCC unroll 2
    for (int half = 0; half < kPanelRow; half += 64) {
      avx512::Vec f[4];
      avx512::quad_floats(avx512::load_quads(panel + half), f);
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const __m512i even = _mm512_castps_si512(f[2 * i].v), odd = _mm512_castps_si512(f[2 * i + 1].v);
        _mm512_store_si512(w + i * kPanelRow + half, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd));
      }
    }
}
void unpack_bf16(const int8_t* panel, int64_t quads, int8_t* w) { unpack_rows_bf16(panel, quads, w); }
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AMX_BF16
// P panels from `panel` on.
template <int PARTS, int P>
void multiply_beside(const int8_t* panel, int64_t k64, const int8_t* a, int rows, int64_t steps, float* acc) {
  constexpr int kStep = 8 * kPanelRow;  // bytes of 32 k
  const int64_t bytes = panel_bytes(k64);
  amx::float_dot_beside<PARTS, P>(a, rows, steps, acc, [&](int64_t step, int i, int8_t* w) PYOPS_LAMBDA {
    const int8_t* from = panel + i * bytes + kPanelRow + step * kStep;
    for (int at = 0; at < kStep; at += 512) prefetch_beside<P>(from + at, (k64 * 2 - step) * kStep - at, bytes);
    unpack_rows_bf16(from, 8, w);
  });
}
PYOPS_TARGET_END
#else
void unpack_bf16(const int8_t*, int64_t, int8_t*) {}
#endif

struct Kernels {
  int stream_rows;
  const StreamFn* stream;
  int beside;  // panels that a streaming kernel takes at once, where there are so many
  const StreamFn* stream_beside;
  void (*unpack)(const int8_t* panel, int64_t quads, float* w);
  decltype(&pack_panel) pack;
};

const Kernels& select() {
  static const Kernels generic{
      generic::kStreamRows, generic::stream_kernels<1>(), 1, nullptr, generic::unpack_floats, pack_panel};
#if defined(__x86_64__)
  static const Kernels avx2{avx2::kStreamRows, avx2::stream_kernels<1>(), 1, nullptr, avx2::unpack_floats, pack_panel};
  static const Kernels avx512{avx512::kStreamRows,         avx512::stream_kernels<1>(), 2,
                              avx512::stream_kernels<2>(), avx512::unpack_floats,       pack_panel_avx512};
  if (active_isa() >= Isa::avx512) return avx512;
  if (active_isa() == Isa::avx2) return avx2;
#endif
  return generic;
}

// Packed panels, and the scales of their columns.
class Int8Weight {
 public:
  static constexpr int kExponent = 24;  // kQuadScale
  static constexpr bool kGrouped = false;
  static constexpr int kBesideRows = 16;  // of AMX
  static constexpr int kDigitRows = 3;    // of VNNI: 24 sums, of 32 registers

  // A canonical `weight` [N, K] is packed here, into scratch.
  Int8Weight(const int8_t* weight, bool packed, const float* w_scale, int64_t N, int64_t K)
      : kernels(select()), panels(weight), w_scale(w_scale), k64((K + 63) / 64) {
    if (packed) return;
    thread_local Scratch scratch;
    const int64_t count = panels_of(N);
    int8_t* out = scratch.get(count * panel_bytes(k64));
    in_parallel(count, kPanelN * double(K), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        kernels.pack(weight + i * kPanelN * K, static_cast<int>(std::min<int64_t>(kPanelN, N - i * kPanelN)), K,
                     out + i * panel_bytes(k64));
    });
    panels = out;
  }

  int64_t group() const { return 0; }
  int64_t groups_of(int64_t) const { return 0; }
  int stream_rows() const { return kernels.stream_rows; }
  int beside() const { return kernels.beside; }
  void stream(int64_t panel, int count, const float* x, int rows, float* acc) const {
    (count > 1 ? kernels.stream_beside : kernels.stream)[rows - 1](x, panels + panel * panel_bytes(k64), k64, acc);
  }
#if defined(__x86_64__)
  void stream_digits(int64_t panel, const int8_t* x, int rows, float* acc) const {
    using namespace avx512vnni;
    static constexpr auto kAll = std::array{multiply_digits<1>, multiply_digits<2>, multiply_digits<3>};
    kAll[rows - 1](x, panels + panel * panel_bytes(k64), k64, acc);
  }
#endif
  void unpack(int64_t panel, int64_t k, int64_t count, float* w) const {
    kernels.unpack(at(panel, k), (count + 31) / 32 * 8, w);
  }
  void unpack_bf16(int64_t panel, int64_t k, int64_t count, int8_t* w, float*) const {
    pyops::unpack_bf16(at(panel, k), (count + 31) / 32 * 8, w);
  }
#if defined(__x86_64__)
  template <int PARTS>
  void multiply_beside(int64_t panel, int count, const int8_t* a, int rows, int64_t steps, float* acc) const {
    const int8_t* from = panels + panel * panel_bytes(k64);
    (count > 1 ? pyops::multiply_beside<PARTS, 2> : pyops::multiply_beside<PARTS, 1>)(from, k64, a, rows, steps, acc);
  }
#endif
  void column_scales(int64_t panel, int columns, float* s) const {
    load_columns(w_scale, ScalarType::Float, panel * kPanelN, columns, s);
  }

 private:
  const int8_t* at(int64_t panel, int64_t k) const {
    return panels + panel * panel_bytes(k64) + kPanelRow + k / 4 * kPanelRow;
  }

  const Kernels& kernels;
  const int8_t* panels;
  const float* w_scale;
  const int64_t k64;
};

Tensor int8_weight_linear_cpu(Tensor x, Tensor weight, Tensor w_scale, std::optional<Tensor> bias,
                              std::optional<Tensor> residual, Activation activation) {
  constexpr const char* op = "int8_weight_linear";
  check_on_cpu(op, x, weight, w_scale, {&bias, &residual});
  LinearProblem p{};
  set_sizes(op, x, w_scale.numel(), p);
  const bool packed = check_int8_weight(op, weight, w_scale, p);
  Tensor y = empty_result(x, p.N);
  load_shared(op, x, bias, residual, y, activation, p);
  if (p.M == 0 || p.N == 0) return y;
  weight = as_contiguous(weight);
  w_scale = as_contiguous(w_scale);
  const Int8Weight panels_of(static_cast<const int8_t*>(weight.const_data_ptr()), packed,
                             static_cast<const float*>(w_scale.const_data_ptr()), p.N, p.K);
  float_linear(p, panels_of);
  return y;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("int8_weight_linear", TORCH_BOX(&pyops::int8_weight_linear_cpu)); }
