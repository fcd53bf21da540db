// Products of a few rows of floats with 32 columns of weights that were unpacked into scratch: acc[r][n] (+)= Σ_k
// a[r][k] · w[k][n], products and sums in fp32. For weights of any format, k range by k range.
//
//   vectors   a [k][rows] fp32, w [k][32] fp32
//   AMX       a [k/32][parts][16 or 32 rows][32 k] bf16, w [k/2][32 n][2 k] bf16, k padded to 32 with zeros
//
// With AMX a float is the sum of one to three bf16 numbers (its parts), which hold all of its bits: 8 + 8 + 8 of fp32,
// 8 + 3 of fp16. Where w is exact in bf16, as small integers are, every product is exact and only the fp32 sum rounds.
// AMX takes bf16 and fp32 denormals for zero: rows are scaled by a power of two, so that what is lost lies below 2⁻¹⁰²
// of a row's largest magnitude.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "int8_dot.h"
#include "vec.h"
#include "vec_lanes.h"

namespace pyops {

struct FloatDotArgs {
  const void* a;
  const void* w;
  int64_t k;   // how many
  float* acc;  // [rows][32]
  bool add;    // to acc, which is overwritten otherwise
  // scaled_dot_*: acc[r][n] (+)= Σ_g scale[g][n] · Σ_{k ∈ g} a[r][k] · w[k][n]
  const float* scale = nullptr;  // [groups][32]
  int64_t group = 0, into = 0;   // k of a group; how many of the first came before
};
using FloatDotFn = void (*)(const FloatDotArgs&);

}  // namespace pyops

#define PYOPS_ISA_FILE "float_dot.inc"
#include "for_each_isa.h"

#if defined(__x86_64__)
#define PYOPS_TARGET_BEGIN_AMX_BF16 \
  PYOPS_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8,amx-bf16")

namespace pyops {

// How many bf16 numbers hold all bits of a T.
template <class T>
constexpr int kParts = 3;
template <>
inline constexpr int kParts<fp16> = 2;
template <>
inline constexpr int kParts<bf16> = 1;

PYOPS_TARGET_BEGIN_AMX_BF16
namespace amx {

constexpr int kSumsRow = kPanelN * 4, kTileBytes = 16 * 64, kSums = 32 * kPanelN;

// 32 elements of x · scale, those from `n` on zero, as parts: part p at out + p · stride. What is not finite stands in
// the first part alone.
template <class T>
PYOPS_INLINE void split_parts(const T* x, int n, float scale, int8_t* out, int64_t stride) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
#pragma GCC unroll 2
  for (int half = 0; half < 32; half += 16) {
    avx512::Vec v = n >= half + 16 ? avx512::load(x + half) : avx512::load(x + half, n - half);
    v = v * avx512::set1(scale);
#pragma GCC unroll 3
    for (int p = 0; p < kParts<T>; p++) {
      const __m256i part = avx512::to_bf16(v);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + p * stride + half * 2), part);
      const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16);
      const __mmask16 finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(wide, exponent), exponent);
      v.v = _mm512_maskz_sub_ps(finite, v.v, _mm512_castsi512_ps(wide));
    }
  }
}

// What the steps of a tile read; they move on.
struct Operands {
  const int8_t *a, *w;
};

// 32 rows x 32 columns: tiles 0–3 accumulate `k`, 4–5 hold rows, 6–7 columns.
template <int PARTS>
PYOPS_INLINE void multiply_32(Operands& at, int64_t k) {
  for (; k > 0; k -= 32, at.w += 16 * kPanelRow) {
    _tile_loadd(6, at.w, kPanelRow);
    _tile_loadd(7, at.w + 64, kPanelRow);
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; p++, at.a += 2 * kTileBytes) {
      _tile_stream_loadd(4, at.a, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, at.a + kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// 16 rows x 32 columns. One step takes 16 cycles, its result 52: two sums of each tile, by turns, hide half of that.
template <int PARTS>
PYOPS_INLINE void multiply_16(Operands& at, int64_t k) {
  for (; k > 0; k -= 64)
#pragma GCC unroll 2
    for (int step = 0; step < 2; step++, at.w += 16 * kPanelRow) {
      if (step && k <= 32) break;
      _tile_loadd(6, at.w, kPanelRow);
      _tile_loadd(7, at.w + 64, kPanelRow);
#pragma GCC unroll 3
      for (int p = 0; p < PARTS; p++, at.a += kTileBytes) {
        _tile_stream_loadd(4, at.a, 64);
        if ((step * PARTS + p) % 2 == 0) {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
        } else {
          _tile_dpbf16ps(2, 4, 6);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
    }
}

// Up to 16 rows and P panels side by side, all of K: `unpack(step, panel, w)` makes w of 32 k of a panel, in L1, while
// the 32 before multiply. a [steps][parts][rows][32 k] for tiles of as many rows; acc [P][16][32].
template <int PARTS, int P, class Unpack>
PYOPS_INLINE void float_dot_beside(const int8_t* a, int rows, int64_t steps, float* acc, const Unpack& unpack) {
  alignas(64) int8_t w[2][P][16 * kPanelRow];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int i = 0; i < P && steps > 0; i++) unpack(0, i, w[0][i]);
  for (int64_t step = 1; step <= steps; step++, a += PARTS * rows * 64) {
    const int8_t* b = w[(step - 1) % 2][0];
    order_tile_loads();
    if (step < steps) unpack(step, 0, w[step % 2][0]);
    order_tile_loads();
    _tile_loadd(6, b, kPanelRow);
    _tile_loadd(7, b + 64, kPanelRow);
#pragma GCC unroll 3
    for (int p = 0; p < PARTS; p++) {
      _tile_loadd(4, a + p * rows * 64, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (P == 2) {
      if (step < steps) unpack(step, 1, w[step % 2][1]);
      _tile_loadd(6, b + 16 * kPanelRow, kPanelRow);
      _tile_loadd(7, b + 16 * kPanelRow + 64, kPanelRow);
#pragma GCC unroll 3
      for (int p = 0; p < PARTS; p++) {
        _tile_loadd(5, a + p * rows * 64, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, acc, kSumsRow);
  _tile_stored(1, acc + 16, kSumsRow);
  if constexpr (P == 2) {
    _tile_stored(2, acc + 16 * kPanelN, kSumsRow);
    _tile_stored(3, acc + 16 * kPanelN + 16, kSumsRow);
  }
}

PYOPS_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles 0–3 as [32][32]. Of 16 rows these are two sums, one after the other.
PYOPS_INLINE void store_sums(float* sums) {
  _tile_stored(0, sums, kSumsRow);
  _tile_stored(1, sums + 16, kSumsRow);
  _tile_stored(2, sums + 16 * kPanelN, kSumsRow);
  _tile_stored(3, sums + 16 * kPanelN + 16, kSumsRow);
}

template <int PARTS>
void float_dot_32(const FloatDotArgs& d) {
  Operands at{static_cast<const int8_t*>(d.a), static_cast<const int8_t*>(d.w)};
  if (d.add) {
    _tile_loadd(0, d.acc, kSumsRow);
    _tile_loadd(1, d.acc + 16, kSumsRow);
    _tile_loadd(2, d.acc + 16 * kPanelN, kSumsRow);
    _tile_loadd(3, d.acc + 16 * kPanelN + 16, kSumsRow);
  } else {
    zero_sums();
  }
  multiply_32<PARTS>(at, d.k);
  store_sums(d.acc);
}

template <int PARTS>
void float_dot_16(const FloatDotArgs& d) {
  Operands at{static_cast<const int8_t*>(d.a), static_cast<const int8_t*>(d.w)};
  zero_sums();
  if (d.add) {
    _tile_loadd(0, d.acc, kSumsRow);
    _tile_loadd(1, d.acc + 16, kSumsRow);
  }
  multiply_16<PARTS>(at, d.k);
  alignas(64) float sums[kSums];
  store_sums(sums);
  for (int i = 0; i < kSums / 2; i += 16)
    avx512::store(d.acc + i, avx512::load(sums + i) + avx512::load(sums + kSums / 2 + i));
}

// acc (+)= scale · sums, what store_sums left of 16·MT rows.
template <int MT>
PYOPS_INLINE void add_scaled(const float* sums, const float* scale, bool add, float* acc) {
  using namespace avx512;
  const Vec s[2] = {load(scale), load(scale + 16)};
  for (int i = 0; i < 16 * MT * kPanelN; i += kPanelN)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      Vec sum = load(sums + i + j * 16);
      if (MT == 1) sum = sum + load(sums + kSums / 2 + i + j * 16);
      float* to = acc + i + j * 16;
      store(to, add ? fma(sum, s[j], load(to)) : sum * s[j]);
    }
}

// Scales of a group apply to its sums: w stays exact, which products of both in bf16 would not. The sums go through
// memory, and are scaled while the tiles multiply the next group.
template <int MT, int PARTS>
void scaled_dot(const FloatDotArgs& d) {
  alignas(64) float sums[2][kSums];
  Operands at{static_cast<const int8_t*>(d.a), static_cast<const int8_t*>(d.w)};
  int64_t into = d.into, g = 0;
  for (int64_t k = 0; k < d.k; g++) {
    const int64_t left = d.k - k, n = d.group - into < left ? d.group - into : left;
    zero_sums();
    if constexpr (MT == 2)
      multiply_32<PARTS>(at, n);
    else
      multiply_16<PARTS>(at, n);
    if (g) add_scaled<MT>(sums[(g - 1) % 2], d.scale + (g - 1) * kPanelN, d.add || g > 1, d.acc);
    store_sums(sums[g % 2]);
    k += n;
    into = 0;
  }
  if (g) add_scaled<MT>(sums[(g - 1) % 2], d.scale + (g - 1) * kPanelN, d.add || g > 1, d.acc);
}

}  // namespace amx
PYOPS_TARGET_END
}  // namespace pyops
#endif
