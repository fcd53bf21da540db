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
constexpr uint8_t kUnsigned = 0x80;  // xor: what makes the bytes unsigned, 128 more

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
    while (std::isfinite(step) && g < groups && fits(g, step)) g++;
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

inline void unpack_steps_wide(const Int4Panel& p, int64_t quads, int64_t group_quads, uint8_t flip, int8_t* w) {
  const __m512i low = _mm512_set1_epi8(15), flips = _mm512_set1_epi8(static_cast<char>(flip));
  // Byte 0 of each 32-bit lane four times.
  const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  const uint8_t* nibbles = p.weight;
  for (int64_t g = 0; g * group_quads < quads; g++) {
    __m512 s[2];
    load_scales16(p, g, s[0], s[1]);
    __m512i m[2], shift[2];
    for (int j = 0; j < 2; j++) {
      const __m512i multiple = _mm512_cvtps_epi32(_mm512_div_ps(s[j], _mm512_loadu_ps(p.step + j * 16)));
      const __m512i zero =
          p.zero ? _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p.zero + g * kPanelN) + j))
                 : _mm512_set1_epi32(kMiddle);
      shift[j] = _mm512_sub_epi8(_mm512_shuffle_epi8(_mm512_mullo_epi16(multiple, zero), spread), flips);
      m[j] = _mm512_or_si512(multiple, _mm512_slli_epi32(multiple, 16));
    }
    const int64_t rows = smaller(group_quads, quads - g * group_quads) / 2;
    for (int64_t r = 0; r < rows; r++, nibbles += kNibbleRow, w += 2 * kPanelRow)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const __m512i v = _mm512_loadu_si512(nibbles + j * 64);
        const __m512i l = _mm512_mullo_epi16(_mm512_and_si512(v, low), m[j]);
        const __m512i h = _mm512_mullo_epi16(_mm512_and_si512(_mm512_srli_epi16(v, 4), low), m[j]);
        _mm512_storeu_si512(w + j * 64, _mm512_sub_epi8(l, shift[j]));
        _mm512_storeu_si512(w + kPanelRow + j * 64, _mm512_sub_epi8(h, shift[j]));
      }
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

#endif
}  // namespace pyops
