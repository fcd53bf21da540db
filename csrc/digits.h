// Floats as integers of four digits: for the products of one or two rows with a stream of int8 weights, which vpdpbusd
// takes at four instructions for 64 weights; to convert them to floats takes twelve.
//
//   x[k] ≈ 2^(e - 30) · v[k],  v an int32, |x| < 2^(e + 1) in the row;  v + 2³¹ = Σ_i d_i[k] · 256^i, digits of 0 … 255
//   Σ_k v[k] · w[k] = Σ_i 256^i · (Σ_k d_i[k] · w[k]) - 2³¹ · Σ_k w[k]
//
// Where x has more bits than fit, it is rounded, to within 2⁻³¹ of the row's largest magnitude. All after that is exact
// up to the sum of the four, which is rounded to fp32 once. A row's largest magnitude is at most √K times its root mean
// square: for K up to some thousands the rounding is below that of fp32 sums, which it takes the place of.
#pragma once

#include <cstdint>

#include "int8_dot.h"
#include "quantize_rows.h"
#include "vec.h"
#include "vec_lanes.h"

namespace pyops {

constexpr int64_t kMostDigitK = 1 << 16;  // 255 · 128 · K < 2³¹
// What stands between x · 2^-e and v.
constexpr float kDigitScale = 0x1p30f;
// 2^e of the rows that are taken: that it times kDigitScale, and the inverse, are normal floats.
constexpr float kLeastDigitRow = 0x1p-90f, kMostDigitRow = 0x1p100f;

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_VNNI
namespace avx512vnni {

// x [K] · scale → [padded/4][4 digits, the lowest first][4 k].
template <class T>
void split_digits(const T* x, int64_t K, int64_t padded, float scale, int8_t* out) {
  const __m512i by_digit = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  for (int64_t k = 0; k < padded; k += 16, out += 64) {
    const avx512::Vec v = avx512::load_in_row(x, k < K ? k : K, K) * avx512::set1(scale);
    const __m512i whole = _mm512_cvtps_epi32(v.v);
    _mm512_storeu_si512(out, _mm512_shuffle_epi8(_mm512_xor_si512(whole, sign), by_digit));
  }
}

// (Σ_i 256^i · sums[i]) / kDigitScale, in doubles: at most 2⁵⁴.
PYOPS_INLINE __m512 join_digits(const __m512i* sums) {
  const auto half = [&](int at) PYOPS_LAMBDA {
    __m512d all = _mm512_setzero_pd();
    for (int i = 3; i >= 0; i--) {
      const __m256i part = at ? _mm512_extracti64x4_epi64(sums[i], 1) : _mm512_castsi512_si256(sums[i]);
      all = _mm512_fmadd_pd(all, _mm512_set1_pd(256), _mm512_cvtepi32_pd(part));
    }
    return _mm512_cvtpd_ps(_mm512_mul_pd(all, _mm512_set1_pd(1 / kDigitScale)));
  };
  return _mm512_insertf32x8(_mm512_castps256_ps512(half(0)), half(1), 1);
}

// acc[r][n] = Σ_k x[r][k] · w[k][n] of a panel; x [rows] of split_digits' rows, k64·64 each. The panel is read as
// several streams, parts of its K, which memory answers faster than one: the order of integer sums does not matter.
template <int MR>
void multiply_digits(const int8_t* x, const int8_t* panel, int64_t k64, float* acc) {
  constexpr int kStreams = 3;
  const int64_t row = k64 * 64 * 4, part = k64 / kStreams * kPanelStep, part_of_x = part / kPanelRow * 16;
  __m512i sum[MR][2][4];
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < 2; j++) {
      for (int d = 0; d < 3; d++) sum[r][j][d] = _mm512_setzero_si512();
      sum[r][j][3] = _mm512_loadu_si512(panel + j * 64);  // -128 · Σ w, for 2³¹ = 128 · 256³
    }
  const auto multiply = [&](const int8_t* w, const int8_t* x) PYOPS_LAMBDA {  // four k
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 2
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
      for (int d = 0; d < 4; d++) PYOPS_DOT2(sum[r][0][d], sum[r][1][d], x + r * row + d * 4, w0, w1);
  };
  const int8_t* w = panel + kPanelRow;
  for (int64_t left = part; left > 0; left -= 4 * kPanelRow, w += 4 * kPanelRow, x += 64) {
    for (int s = 0; s < kStreams; s++) prefetch_beside<kStreams>(w + s * part, left, part);
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++)
#pragma GCC unroll 3
      for (int s = 0; s < kStreams; s++) multiply(w + s * part + u * kPanelRow, x + s * part_of_x + u * 16);
  }
  w += (kStreams - 1) * part;
  x += (kStreams - 1) * part_of_x;
  for (int64_t q = 0; q < k64 % kStreams * 16; q++, w += kPanelRow, x += 16) multiply(w, x);
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < 2; j++) _mm512_storeu_ps(acc + r * kPanelN + j * 16, join_digits(sum[r][j]));
}

}  // namespace avx512vnni
PYOPS_TARGET_END
#endif
}  // namespace pyops
