// int4 weights whose scales are whole multiples of a step of their channel: s[g][n] = step[n] · m[g][n], and m · (q -
// z) fits in int8. Unpacked so, a panel is an int8 panel: acc[r][n] = Σ_k a[r][k] · m[g][n] · (q[n][k] - z[g][n]) is
// exact in int32 over all of K, and meets one scale, step[n], in the epilogue. Which weights are such: find_steps
// (pyops/ops/int4_weight.py).
#pragma once

#include <cmath>

#include "int4_vnni.h"

namespace pyops {

constexpr int64_t kMostSteppedK = 1 << 17;  // 127 · 127 · K < 2³¹
constexpr int kMostMultiple = 15;
constexpr float kLeastStep = 0x1p-100f, kMostStep = 0x1p100f;  // whose inverse is as normal a number
constexpr uint8_t kUnsigned = 0x80;                            // xor: what makes the bytes unsigned, 128 more

// `quads` of a panel → w [quads][32][4], each m · (q - z), xor `flip`.
using UnpackStepsFn = void (*)(const Int4Panel& panel, int64_t quads, int64_t group_quads, uint8_t flip, int8_t* w);

inline void unpack_steps(const Int4Panel& p, int64_t quads, int64_t group_quads, uint8_t flip, int8_t* w) {
  const uint8_t* nibbles = p.weight;
  for (int64_t g = 0; g * group_quads < quads; g++) {
    uint8_t multiple[kNibbleRow], shift[kNibbleRow];  // modulo 256, as all of it
    for (int i = 0; i < kNibbleRow; i++) {
      multiple[i] = static_cast<uint8_t>(std::lrint(scale_of(p, g * kPanelN + i / 4) / p.step[i / 4]));
      shift[i] = static_cast<uint8_t>(multiple[i] * (p.zero ? p.zero[g * kPanelN + i / 4] : kMiddle));
    }
    const int64_t rows = smaller(group_quads, quads - g * group_quads) / 2;
    for (int64_t r = 0; r < rows; r++, nibbles += kNibbleRow, w += 2 * kPanelRow)
      for (int i = 0; i < kNibbleRow; i++) {
        w[i] = static_cast<int8_t>(((nibbles[i] & 15) * multiple[i] - shift[i]) ^ flip);
        w[kPanelRow + i] = static_cast<int8_t>(((nibbles[i] >> 4) * multiple[i] - shift[i]) ^ flip);
      }
  }
}

// The step of channel n of a panel of `groups`: the largest that there is; 1 for a channel of zeros, 0 for none.
inline float find_step(const Int4Panel& p, int64_t groups, int n) {
  const auto scale = [&](int64_t g) { return static_cast<double>(scale_of(p, g * kPanelN + n)); };
  const auto fits = [&](int64_t g, double step) {
    const int zero = p.zero ? p.zero[g * kPanelN + n] : kMiddle, reach = zero > 15 - zero ? zero : 15 - zero;
    const double s = scale(g), multiple = std::nearbyint(s / step);
    return multiple * step == s && multiple >= 0 && multiple <= std::fmin(127 / reach, kMostMultiple);
  };
  double largest = 0;
  bool zeros = true;
  for (int64_t g = 0; g < groups; g++) {
    largest = std::fmax(largest, scale(g));
    zeros = zeros && scale(g) == 0;
  }
  if (zeros) return 1;
  for (int m = 1; m <= kMostMultiple; m++) {
    const float step = static_cast<float>(largest / m);
    int64_t g = 0;
    if (!(step >= kLeastStep && step <= kMostStep)) continue;
    while (g < groups && fits(g, step)) g++;
    if (g == groups) return step;
  }
  return 0;
}

// Rows by quads over the int8 kernels, all of K.
template <int MR, DotFn kDot>
void int4_steps_by_dot(const Int4Args& d) {
  kDot({d.a, d.w - kPanelRow, 0, d.quads / 16, d.acc, static_cast<const int8_t*>(d.ahead), d.ahead_lines});
}

#if defined(__x86_64__)

// The wide versions multiply two codes of a word at once: 15 · 15 needs no more than the lower one's byte.
PYOPS_TARGET_BEGIN_AVX2
namespace avx2 {

inline void unpack_steps_wide(const Int4Panel& p, int64_t quads, int64_t group_quads, uint8_t flip, int8_t* w) {
  const __m256i low = _mm256_set1_epi8(15), flips = _mm256_set1_epi8(static_cast<char>(flip));
  // Byte 0 of each 32-bit lane four times.
  const __m256i spread = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  const uint8_t* nibbles = p.weight;
  for (int64_t g = 0; g * group_quads < quads; g++) {
    float scale[kPanelN];
    for (int n = 0; n < kPanelN; n++) scale[n] = scale_of(p, g * kPanelN + n);
    __m256i m[4], shift[4];
    for (int j = 0; j < 4; j++) {
      const __m256 s = _mm256_div_ps(_mm256_loadu_ps(scale + j * 8), _mm256_loadu_ps(p.step + j * 8));
      const __m256i multiple = _mm256_cvtps_epi32(s);
      const __m256i zero =
          p.zero ? _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.zero + g * kPanelN + j * 8)))
                 : _mm256_set1_epi32(kMiddle);
      shift[j] = _mm256_sub_epi8(_mm256_shuffle_epi8(_mm256_mullo_epi16(multiple, zero), spread), flips);
      m[j] = _mm256_or_si256(multiple, _mm256_slli_epi32(multiple, 16));
    }
    const int64_t rows = smaller(group_quads, quads - g * group_quads) / 2;
    for (int64_t r = 0; r < rows; r++, nibbles += kNibbleRow, w += 2 * kPanelRow)
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(nibbles + j * 32));
        const __m256i l = _mm256_mullo_epi16(_mm256_and_si256(v, low), m[j]);
        const __m256i h = _mm256_mullo_epi16(_mm256_and_si256(_mm256_srli_epi16(v, 4), low), m[j]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + j * 32), _mm256_sub_epi8(l, shift[j]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(w + kPanelRow + j * 32), _mm256_sub_epi8(h, shift[j]));
      }
  }
}

}  // namespace avx2
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
namespace avx512 {

// Of a group: the multiples twice in a lane of 32 bits, the same times 2¹², and m · z four times.
struct Multiples {
  __m512i low[2], high[2], shift[2];
};

PYOPS_INLINE Multiples multiples_of(const Int4Panel& p, int64_t group, uint8_t flip) {
  // Byte 0 of each 32-bit lane four times.
  const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  __m512i multiple[2];
  load_multiples(p, group, multiple);
  Multiples of;
  for (int j = 0; j < 2; j++) {
    const __m512i zero =
        p.zero ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.zero + group * kPanelN) + j))
               : _mm512_set1_epi32(kMiddle);
    of.shift[j] = _mm512_sub_epi8(_mm512_shuffle_epi8(_mm512_mullo_epi16(multiple[j], zero), spread), flips);
    of.low[j] = _mm512_or_si512(multiple[j], _mm512_slli_epi32(multiple[j], 16));
    of.high[j] = _mm512_slli_epi16(of.low[j], 12);
  }
  return of;
}

// A row of nibbles → two of w. The high nibbles, 16 · q, meet the upper half of a product with 2¹² · m: no shift.
PYOPS_INLINE void unpack_row(const uint8_t* nibbles, const Multiples& of, int8_t* w) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 2
  for (int j = 0; j < 2; j++) {
    const __m512i v = _mm512_loadu_si512(nibbles + j * 64);
    const __m512i l = _mm512_mullo_epi16(_mm512_and_si512(v, low), of.low[j]);
    const __m512i h = _mm512_mulhi_epu16(_mm512_andnot_si512(low, v), of.high[j]);
    _mm512_storeu_si512(w + j * 64, _mm512_sub_epi8(l, of.shift[j]));
    _mm512_storeu_si512(w + kPanelRow + j * 64, _mm512_sub_epi8(h, of.shift[j]));
  }
}

inline void unpack_steps_wide(const Int4Panel& p, int64_t quads, int64_t group_quads, uint8_t flip, int8_t* w) {
  const uint8_t* nibbles = p.weight;
  for (int64_t g = 0; g * group_quads < quads; g++) {
    const Multiples of = multiples_of(p, g, flip);
    const int64_t rows = smaller(group_quads, quads - g * group_quads) / 2;
    for (int64_t r = 0; r < rows; r++, nibbles += kNibbleRow, w += 2 * kPanelRow) unpack_row(nibbles, of, w);
  }
}

}  // namespace avx512
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_VNNI
namespace avx512vnni {

// Unsigned weights; `sums` has -Σ a of a row, over all of K.
template <int MR>
void int4_steps(const Int4Args& d) {
  const int8_t* w = d.w;
  const int8_t* a = d.a;
  const char* ahead = static_cast<const char*>(d.ahead);
  __m512i acc[MR][2];
#pragma GCC unroll 14
  for (int r = 0; r < MR; r++) acc[r][0] = acc[r][1] = _mm512_set1_epi32(d.sums[r] * kUnsigned);
  for (int64_t i = 0; i < d.quads; i += 16) {
    for (int line = 0; line < d.ahead_lines; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    for (int k = 0; k < 16; k += 8) {
#pragma GCC unroll 8
      for (int u = 0; u < 8; u++, w += kPanelRow, a += 4 * MR) {
        const __m512i b0 = _mm512_loadu_si512(w), b1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 14
        for (int r = 0; r < MR; r++) PYOPS_DOT2_UNSIGNED_B(acc[r][0], acc[r][1], a + r * 4, b0, b1);
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < 2; j++) _mm512_storeu_si512(d.acc + r * kPanelN + j * 16, acc[r][j]);
}

}  // namespace avx512vnni
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AMX
namespace amx {

// A tile of 16·MT rows and P panels side by side, of which 64 k are unpacked into L1 while those before multiply.
// All of K; acc [rows][32] of each panel is the result.
template <int MT, int P>
void int4_steps(const Int4Args& d) {
  static_assert(MT * P <= 2, "accumulators");
  constexpr int kAccRow = kPanelN * 4, kRows = 16 * MT;
  constexpr int kStepRows = 8;  // of nibbles: 64 k
  alignas(64) int8_t w[2][P][kPanelStep];
  const Int4Args* args[P];
  const uint8_t* nibbles[P];
  avx512::Multiples of[P];
  for (int i = 0; i < P; i++) {
    args[i] = i ? d.others + i - 1 : &d;
    nibbles[i] = args[i]->panel.weight;
  }
  const int64_t k64 = d.quads / 16, group_rows = smaller(d.group_quads, d.quads) / 2;
  const int64_t groups = (d.quads + d.group_quads - 1) / d.group_quads;
  const int64_t bytes = k64 * kStepRows * kNibbleRow;
  int64_t group[P], left[P];  // rows of the group
  const auto unpack_some = [&](auto rows, int i, int8_t* out) PYOPS_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++, nibbles[i] += kNibbleRow)
      avx512::unpack_row(nibbles[i], of[i], out + r * 2 * kPanelRow);
    left[i] -= rows;
    if (!left[i] && group[i] < groups) {
      prefetch_group(args[i]->panel, group[i] + P * groups);
      of[i] = avx512::multiples_of(args[i]->panel, group[i]++, 0);
      left[i] = group_rows;
    }
  };
  const auto unpack = [&](int slot, int i) PYOPS_LAMBDA {
    if (!d.cached)
      for (int row = 0; row < kStepRows; row += 4) {
        const uint8_t* at = nibbles[i] + row * kNibbleRow;
        prefetch_beside<P>(at, args[i]->panel.weight + bytes - at, bytes + kNibbleRow);
      }
    if (group_rows >= kStepRows) {
      unpack_some(std::integral_constant<int, kStepRows>{}, i, w[slot][i]);
    } else {
      unpack_some(std::integral_constant<int, kStepRows / 2>{}, i, w[slot][i]);
      unpack_some(std::integral_constant<int, kStepRows / 2>{}, i, w[slot][i] + kPanelStep / 2);
    }
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t* a = d.a;
  for (int i = 0; i < P; i++) {
    group[i] = 1;
    left[i] = group_rows;
    of[i] = avx512::multiples_of(args[i]->panel, 0, 0);
    unpack(0, i);
  }
  for (int64_t k = 1; k <= k64; k++, a += kRows * 64) {
    const int8_t* b = w[(k - 1) % 2][0];
    order_tile_loads();
    if (k < k64) unpack(k % 2, 0);
    order_tile_loads();
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, kPanelRow);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + 64, kPanelRow);
    _tile_dpbssd(1, 4, 7);
    if constexpr (MT == 2) {
      _tile_loadd(5, a + 16 * 64, 64);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    if constexpr (P == 2) {
      if (k < k64) unpack(k % 2, 1);
      _tile_loadd(6, b + kPanelStep, kPanelRow);
      _tile_dpbssd(2, 4, 6);
      _tile_loadd(7, b + kPanelStep + 64, kPanelRow);
      _tile_dpbssd(3, 4, 7);
    }
  }
  int32_t* acc = d.acc;
  _tile_stored(0, acc, kAccRow);
  _tile_stored(1, acc + 16, kAccRow);
  if constexpr (MT == 2) acc += 16 * kPanelN;
  if constexpr (P == 2) acc = d.others->acc;
  if constexpr (MT * P == 2) {
    _tile_stored(2, acc, kAccRow);
    _tile_stored(3, acc + 16, kAccRow);
  }
}

}  // namespace amx
PYOPS_TARGET_END

#endif
}  // namespace pyops
