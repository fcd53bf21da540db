// y[m, n] = act(s_w[n] · Σ_k x[m, k] · w[n, k] + bias[n] + residual[m, n]) with x in floats and w of any format: what
// int8_weight_linear and int4_linear share.
//
// A few rows meet each panel of 32 output channels as it streams in from memory, and are multiplied with its weights in
// registers: as floats, or as digits, which multiply int8 weights as they are. More rows are cut into blocks; for each
// range of K, a block is laid out for the tile kernel (float_dot.h) in L2, and the panels are unpacked one after the
// other, in slices that fit in L1. The sums of a block wait for the next range of K in scratch.
//
// Every row is multiplied by a power of two that brings its largest magnitude to about 1, and the sums by its inverse:
// both are exact, sums of large activations do not overflow, and what AMX takes for zero is out of sight.
//
// A format is a class Weight:
//   kExponent            its unpacked weights are 2^kExponent times as large
//   kGrouped             whether AMX gets scales of groups (scaled_dot) beside the weights
//   group()              k of a group, 0 if there are none; groups_of(k): most groups that k in a row touch
//   stream_rows()        rows that its streaming kernel takes
//   beside()             panels that it takes at once, where there are so many
//   stream(panel, count, x, rows, acc)         acc [count][rows][32] = x [rows][k64·64] · w, x with zeros at the end
//   unpack(panel, k, count, w)                 k … k + count → fp32 [count][32], up to a multiple of 32
//   unpack_bf16(panel, k, count, w, scale)     the same → bf16 [count/2][32 n][2 k], and scales of groups [groups][32]
//   column_scales(panel, columns, s)           s_w, zeros up to 32
//   kDigitRows           up to so many rows, VNNI takes as digits where they fit (digits.h); 0: never. Then also
//   stream_digits(panel, x, rows, acc)         as stream of one panel, with x in digits
//   kBesideRows          up to so many rows (at most 16), AMX unpacks panels beside their products; 0: never. Then also
//   multiply_beside<parts>(panel, count, a, rows, steps, acc)   1 or kAmxBeside panels: float_dot_beside (float_dot.h)
#pragma once

#include <algorithm>
#include <tuple>

#include "digits.h"
#include "epilogue.h"
#include "float_dot.h"
#include "linear_args.h"
#include "quantize_rows.h"
#include "row_tiles.h"
#include "scratch.h"
#include "tensor.h"

namespace pyops {
constexpr int kMostStreamRows = 4, kMostBeside = 3;  // rows and panels that a streaming kernel takes at once
constexpr int kAmxBeside = 2;                        // panels that AMX takes at once
}  // namespace pyops

#define PYOPS_ISA_FILE "float_linear.inc"
#include "for_each_isa.h"

namespace pyops {

constexpr int64_t kRangeK = 1024;           // k of a block in L2
constexpr int64_t kSliceK = 256;            // k of a panel in L1: 32 KiB of fp32; of bf16 twice as many
constexpr int64_t kFloatBlock = 768 << 10;  // bytes of a block: 128 rows of three parts
constexpr int64_t kMostRows = 384;          // of a block
constexpr int64_t kMostAcc = 64 << 20;      // bytes of waiting sums

// ------------------------------------------------------------------------------------------------- kernels of an ISA

template <class T>
struct FloatTypeKernels {
  uint32_t (*max_bits)(const T* x, int64_t K);
  void (*scale_row)(const T* x, int64_t K, int64_t padded, float scale, float* out);
  void (*interleave)(const T* x, int64_t stride, int rows, int64_t k, const float* scale, float* out);
  EpilogueFn<T, float> (*epilogue_for)(Activation);
};

struct FloatKernels {
  int max_rows;
  double macs_per_cycle;
  const FloatDotFn* dot;
  void (*fence)();
  std::tuple<FloatTypeKernels<float>, FloatTypeKernels<bf16>, FloatTypeKernels<fp16>> types;
};

inline const FloatKernels& float_kernels() {
#define PYOPS_TYPED(isa, T) \
  FloatTypeKernels<T>{isa::row_max_bits<T>, isa::scale_row<T>, isa::interleave_rows<T>, isa::epilogue_for<T, float>}
#define PYOPS_KERNELS(isa, macs)                                              \
  {                                                                           \
    isa::kFloatDotRows, macs, isa::float_dots(), isa::fence_streams, {        \
      PYOPS_TYPED(isa, float), PYOPS_TYPED(isa, bf16), PYOPS_TYPED(isa, fp16) \
    }                                                                         \
  }
  static const FloatKernels generic PYOPS_KERNELS(generic, 2);
#if defined(__x86_64__)
  static const FloatKernels avx2 PYOPS_KERNELS(avx2, 14), avx512 PYOPS_KERNELS(avx512, 28);
  if (active_isa() >= Isa::avx512) return avx512;
  if (active_isa() == Isa::avx2) return avx2;
#endif
  return generic;
#undef PYOPS_KERNELS
#undef PYOPS_TYPED
}

// AMX works on `rows` of T from here on; below, a tile would be mostly padding.
template <class T>
constexpr int kAmxFrom = 3;

// ------------------------------------------------------------------------------------------------- launcher

template <class T, class Weight>
class FloatLinear {
 public:
  FloatLinear(const LinearProblem& problem, const Weight& w)
      : p(problem),
        weight(w),
        kernels(float_kernels()),
        typed(std::get<FloatTypeKernels<T>>(kernels.types)),
        amx(amx_multiplies_bf16() && p.M >= kAmxFrom<T> && !takes_digits()),
        k64((p.K + 63) / 64),
        panels(panels_of(p.N)),
        past_cache(p.K >= kPastCacheMinK && p.M * p.N * int64_t(sizeof(T)) >= kPastCacheBytes &&
                   whole_lines(static_cast<T*>(p.y), p.N)) {}

  void run() {
    thread_local Scratch scale_scratch;
    scale = reinterpret_cast<float*>(scale_scratch.get(2 * p.M * sizeof(float)));
    unscale = scale + p.M;
    in_parallel(p.M, p.K / 16.0 + 20, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) find_scale(m);
    });
    if (!amx && p.M <= weight.stream_rows()) return run_stream();
#if defined(__x86_64__)
    if constexpr (Weight::kBesideRows > 0)
      if (amx && p.M <= Weight::kBesideRows) return run_beside();
#endif
    // The sums of a block wait for all of K: with very many columns, a block gets fewer rows.
    const int64_t fit = std::min(kFloatBlock / std::max<int64_t>(tile_k() * row_bytes(), 1) / 32 * 32, kMostRows);
    const int64_t most = std::max<int64_t>(kMostAcc / (panels * kPanelN * 4) / 32 * 32, 32);
    const int64_t block = std::min(fit, most), blocks = (p.M + block - 1) / block;
    for (int64_t b = 0; b < blocks; b++) run_block(p.M * b / blocks, p.M * (b + 1) / blocks);
  }

 private:
  int columns(int64_t panel) const { return static_cast<int>(std::min<int64_t>(kPanelN, p.N - panel * kPanelN)); }
  int64_t tile_k() const { return std::min(kRangeK, k64 * 64); }  // of a block
  int64_t row_bytes() const { return amx ? 2 * kParts<T> : 4; }   // of one k of a block
  bool takes_digits() const {
    return p.M <= Weight::kDigitRows && p.K <= kMostDigitK && active_isa() >= Isa::avx512vnni;
  }
  int rows() const { return static_cast<int>(p.M); }
  const T* row(int64_t m) const { return static_cast<const T*>(p.x) + m * p.K; }

  // 2ᵉ that brings the largest magnitude of a row to [1, 2) / 2^kExponent, and what undoes it and kExponent. No e above
  // 100 - kExponent: that makes normal numbers of all denormals, and what undoes it is large enough to be multiplied
  // with scales of columns. Zeros are scaled as if they were ones.
  void find_scale(int64_t m) {
    constexpr int kExponent = Weight::kExponent;
    const uint32_t largest = typed.max_bits(row(m), p.K);
    const int exponent = largest ? static_cast<int>(largest >> 23) - 127 : 0;
    const int e = std::clamp(-kExponent - exponent, -126, 100 - kExponent);
    const auto power = [](int n) {
      const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    };
    scale[m] = power(e);
    unscale[m] = power(-kExponent - e);
  }

  void finish(int64_t panel, int64_t m0, int64_t rows, const float* acc) const {
    alignas(64) float s_w[kPanelN], bias[kPanelN];
    const int64_t n0 = panel * kPanelN, at = m0 * p.N + n0;
    weight.column_scales(panel, columns(panel), s_w);
    load_columns(p.bias, p.bias_type, n0, columns(panel), bias);
    const T* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
    typed.epilogue_for(p.activation)(
        {acc, unscale + m0, s_w, bias, residual, static_cast<T*>(p.y) + at, p.N, columns(panel), past_cache}, 0,
        static_cast<int>(rows));
  }

  void run_stream() {
#if defined(__x86_64__)
    if constexpr (Weight::kDigitRows > 0)
      if (takes_digits()) return run_digits();
#endif
    stream_floats();
  }

  void stream_floats() {
    float* x = floats_of_rows(p.M);
    for (int64_t m = 0; m < p.M; m++) scale_row(m, x + m * k64 * 64);
    stream(weight.beside(), [&](int64_t panel, int count, float* acc) { weight.stream(panel, count, x, rows(), acc); });
  }

  float* floats_of_rows(int64_t count) const {
    thread_local Scratch scratch;
    return reinterpret_cast<float*>(scratch.get(count * k64 * 64 * sizeof(float)));
  }
  void scale_row(int64_t m, float* out) const { typed.scale_row(row(m), p.K, k64 * 64, scale[m], out); }

#if defined(__x86_64__)
  // Whether a row is taken as digits does not depend on the others. Either way it has the same sums beside any: digits
  // have exact ones, and floats are added in the same order for each of so few rows.
  void run_digits() {
    const int64_t row_bytes = k64 * 64 * 4;
    thread_local Scratch scratch;
    int8_t* x = scratch.get(p.M * row_bytes);
    int64_t order[Weight::kDigitRows];  // those that are taken, then the others
    int taken = 0, end = rows();
    for (int64_t m = 0; m < p.M; m++) order[split_row(m, x + taken * row_bytes) ? taken++ : --end] = m;
    if (taken == 0) return stream_floats();
    if (taken == p.M)
      return stream(1, [&](int64_t panel, int, float* acc) { weight.stream_digits(panel, x, taken, acc); });
    const int others = rows() - taken;
    float* floats = floats_of_rows(others);
    for (int i = 0; i < others; i++) scale_row(order[taken + i], floats + i * k64 * 64);
    stream(1, [&](int64_t panel, int, float* acc) {
      alignas(64) float sums[Weight::kDigitRows * kPanelN];
      weight.stream_digits(panel, x, taken, sums);
      weight.stream(panel, 1, floats, others, sums + taken * kPanelN);
      for (int i = 0; i < Weight::kDigitRows && i < rows(); i++)
        std::copy_n(sums + i * kPanelN, kPanelN, acc + order[i] * kPanelN);
    });
  }

  bool split_row(int64_t m, int8_t* out) const {
    const float power = unscale[m];
    return power >= kLeastDigitRow && power <= kMostDigitRow &&
           avx512vnni::split_digits(row(m), p.K, k64 * 64, kDigitScale / power, out);
  }
#endif

  // multiply(panel, count, acc): the products of rows that are laid out.
  template <class F>
  void stream(int beside, const F& multiply) {
    in_parallel(panels, kPanelN * double(p.K) / 8 + 100, [&](int64_t begin, int64_t end) {
      alignas(64) float acc[kMostBeside * kMostStreamRows * kPanelN];
      for (int64_t i = begin; i < end;) {
        const int count = i + beside <= end ? beside : 1;
        multiply(i, count, acc);
        for (int j = 0; j < count; j++, i++) finish(i, 0, p.M, acc + j * p.M * kPanelN);
      }
      if (past_cache) kernels.fence();
    });
  }

  // Tiles of a block: AMX takes 32 rows and what is left, others share the rows evenly.
  struct Tiles {
    int64_t rows, count;
    bool amx;
    int64_t first(int64_t t) const { return amx ? std::min(t * 32, rows) : rows * t / count; }
    int64_t height(int64_t t) const { return first(t + 1) - first(t); }
    int64_t padded(int64_t t) const { return amx ? (height(t) > 16 ? 32 : 16) : height(t); }
  };

  void run_block(int64_t m0, int64_t m1) {
    const int64_t max_rows = amx ? 32 : kernels.max_rows;
    const Tiles tiles{m1 - m0, (m1 - m0 + max_rows - 1) / max_rows, amx};
    const int64_t padded_rows = amx ? (tiles.rows + 31) / 32 * 32 : tiles.rows;
    const int64_t row_bytes = this->row_bytes(), tile_k = this->tile_k();
    thread_local Scratch rows_scratch, acc_scratch;
    int8_t* a = rows_scratch.get(padded_rows * tile_k * row_bytes);
    // With one range there is nothing to wait: each thread has sums for one panel.
    const bool waits = p.K > kRangeK;
    float* sums = waits ? reinterpret_cast<float*>(acc_scratch.get(panels * padded_rows * kPanelN * 4)) : nullptr;
    for (int64_t k = 0; k < std::max<int64_t>(p.K, 1); k += kRangeK) {
      const int64_t count = std::min(kRangeK, p.K - k);
      in_parallel(tiles.count, max_rows * (count + 20.0), [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) lay_out(tiles, t, m0, k, count, a + tiles.first(t) * tile_k * row_bytes);
      });
      const double macs = amx ? 256.0 / kParts<T> : kernels.macs_per_cycle;
      const double cycles = kPanelN * double(count) * (1.0 / 8 + tiles.rows / macs) + 20.0 * tiles.rows + 50;
      const auto work = [&](int64_t begin, int64_t end) {
        thread_local Scratch slice_scratch, own_scratch, group_scratch;
        const int64_t slice = kSliceK * (amx ? 2 : 1);
        int8_t* w = slice_scratch.get(slice * kPanelN * 4);
        float* group_scale = reinterpret_cast<float*>(group_scratch.get(weight.groups_of(slice) * kPanelN * 4));
        float* own = waits ? nullptr : reinterpret_cast<float*>(own_scratch.get(padded_rows * kPanelN * 4));
        for (int64_t i = begin; i < end; i++) {
          float* acc = waits ? sums + i * padded_rows * kPanelN : own;
          if (!count) std::fill(acc, acc + padded_rows * kPanelN, 0.0f);
          for (int64_t s = 0; s < count; s += slice) {
            FloatDotArgs args{nullptr, w, std::min(slice, count - s), nullptr, k + s > 0};
            if (amx) {
              weight.unpack_bf16(i, k + s, args.k, w, group_scale);
              args.scale = group_scale;
              args.group = weight.group();
              args.into = args.group ? (k + s) % args.group : 0;
            } else {
              weight.unpack(i, k + s, args.k, reinterpret_cast<float*>(w));
            }
            for (int64_t t = 0; t < tiles.count; t++) {
              args.a = a + tiles.first(t) * tile_k * row_bytes + s * tiles.padded(t) * row_bytes;
              args.acc = acc + tiles.first(t) * kPanelN;
              dot(tiles.height(t), args);
            }
          }
          if (k + count == p.K) finish(i, m0, tiles.rows, acc);
        }
        if (past_cache) kernels.fence();
      };
      in_parallel(panels, cycles, [&](int64_t begin, int64_t end) {
#if defined(__x86_64__)
        if (amx) return amx::with_tiles([&] { work(begin, end); });
#endif
        work(begin, end);
      });
    }
  }

  void dot(int64_t rows, const FloatDotArgs& args) const {
#if defined(__x86_64__)
    if constexpr (Weight::kGrouped) {
      if (amx) return (rows > 16 ? amx::scaled_dot<2, kParts<T>> : amx::scaled_dot<1, kParts<T>>)(args);
    } else {
      if (amx) return (rows > 16 ? amx::float_dot_32<kParts<T>> : amx::float_dot_16<kParts<T>>)(args);
    }
#endif
    kernels.dot[rows - 1](args);
  }

  // Columns [k, k + count) of a tile's rows as its kernel wants them.
  void lay_out(const Tiles& tiles, int64_t t, int64_t m0, int64_t k, int64_t count, int8_t* out) const {
    const int64_t m = m0 + tiles.first(t), rows = tiles.height(t);
#if defined(__x86_64__)
    if (amx) return lay_out_parts(m, rows, tiles.padded(t), k, count, out);
#endif
    typed.interleave(row(m) + k, p.K, static_cast<int>(rows), count, scale + m, reinterpret_cast<float*>(out));
  }

#if defined(__x86_64__)
  // Few rows with AMX, on panels that are unpacked beside their products.
  void run_beside() {
    thread_local Scratch rows_scratch;
    const int64_t steps = (p.K + 31) / 32, part = p.M * 64;
    int8_t* a = rows_scratch.get(steps * kParts<T> * part);
    in_parallel(p.M, p.K * 2.0 + 20, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; m++) lay_out_row(m, 0, p.K, part, a + m * 64);
    });
    const auto work = [&](int64_t begin, int64_t end) {
      alignas(64) float acc[kAmxBeside * Weight::kBesideRows * kPanelN];
      for (int64_t i = begin; i < end;) {
        const int count = i + kAmxBeside <= end ? kAmxBeside : 1;
        weight.template multiply_beside<kParts<T>>(i, count, a, static_cast<int>(p.M), steps, acc);
        for (int j = 0; j < count; j++, i++) finish(i, 0, p.M, acc + j * Weight::kBesideRows * kPanelN);
      }
      if (past_cache) kernels.fence();
    };
    in_parallel(panels, kPanelN * double(p.K) / 8 + 100, [&](int64_t begin, int64_t end) {
      amx::with_tiles([&] { work(begin, end); }, amx::shapes_of_rows(p.M));
    });
  }

  PYOPS_TARGET_BEGIN_AMX_BF16
  __attribute__((noinline)) void lay_out_row(int64_t m, int64_t k, int64_t count, int64_t part, int8_t* to) const {
    const T* x = row(m) + k;
    for (int64_t c = 0; c < count; c += 32, to += kParts<T> * part)
      amx::split_parts(x + c, static_cast<int>(std::min<int64_t>(count - c, 32)), scale[m], to, part);
  }

  __attribute__((noinline)) void lay_out_parts(int64_t m, int64_t rows, int64_t padded, int64_t k, int64_t count,
                                               int8_t* out) const {
    const int64_t part = padded * 64;
    for (int64_t r = 0; r < rows; r++) lay_out_row(m + r, k, count, part, out + r * 64);
    for (int64_t r = rows; r < padded; r++) {
      int8_t* to = out + r * 64;
      for (int64_t c = 0; c < (count + 31) / 32 * kParts<T>; c++, to += part) std::memset(to, 0, 64);
    }
  }
  PYOPS_TARGET_END
#endif

  const LinearProblem& p;
  const Weight& weight;
  const FloatKernels& kernels;
  const FloatTypeKernels<T>& typed;
  const bool amx;
  const int64_t k64, panels;
  const bool past_cache;
  float *scale = nullptr, *unscale = nullptr;  // [M]
};

template <class Weight>
void float_linear(const LinearProblem& p, const Weight& weight) {
  by_float_type(p.x_type, [&](auto tag) { FloatLinear<typename decltype(tag)::type, Weight>(p, weight).run(); });
}

}  // namespace pyops
