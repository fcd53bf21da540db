// Floats as integers of four digits: for the products of one to three rows with a stream of int8 weights, which
// vpdpbusd takes at four instructions for 64 weights; to convert them to floats takes twelve.
//
//   x[k] ≈ 2^(e - 30) · v[k],  v an int32, |x| < 2^(e + 1) in the row;  v + 2³¹ = Σ_i d_i[k] · 256^i, digits of 0 … 255
//   Σ_k v[k] · w[k] = Σ_i 256^i · (Σ_k d_i[k] · w[k]) - 2³¹ · Σ_k w[k]
//
// An x with more bits than fit is rounded, by at most 2^(e - 31); of 2^(e - 6) and above none is. The sums of digits
// are exact, and put together in doubles: exactly up to K = 2¹⁵, to within 2⁻⁵³ beyond. That is rounded to fp32.
//
// What is rounded off is little beside the row, but need not be beside y: weights may be zero where x is large. A row
// is taken if all that it loses is at most 2⁻²² of Σ |x| over its x below 2^(e - 6). Whatever the weights of the larger
// x, this adds about as much to the error as an fp32 sum of the others has. It is more only where weights also leave
// out the largest of those others. Of Gaussian rows of K in the hundreds less than 2⁻²⁴ is lost; rows with
// a value of 1000 σ are just within.
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
// 2^e of the rows that are taken: kDigitScale / 2^e is a float, and at least 1, so that none of x becomes zero unseen.
// NaN and Inf have larger ones.
constexpr float kLeastDigitRow = 0x1p-97f, kMostDigitRow = kDigitScale;
constexpr float kWholeFrom = 0x1p24f;  // floats from here on are integers
constexpr float kMostLost = 0x1p-22f;  // of a row, as a part of its Σ |v| below kWholeFrom

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_VNNI
namespace avx512vnni {

// x [K] · scale → [padded/4][4 digits, the lowest first][4 k]. Whether no more is lost than kMostLost.
template <class T>
bool split_digits(const T* x, int64_t K, int64_t padded, float scale, int8_t* out) {
  using namespace avx512;
  const __m512i by_digit = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  const Vec limit = set1(kWholeFrom);
  Vec lost = set1(0.0f), rest = lost;
  for (int64_t k = 0; k < padded; k += 16, out += 64) {
    const Vec v = load_in_row(x, k < K ? k : K, K) * set1(scale), size = abs(v);
    const __m512i whole = _mm512_cvtps_epi32(v.v);
    _mm512_storeu_si512(out, _mm512_shuffle_epi8(_mm512_xor_si512(whole, sign), by_digit));
    lost = lost + abs(v - Vec{_mm512_cvtepi32_ps(whole)});
    rest.v = _mm512_mask_add_ps(rest.v, _mm512_cmp_ps_mask(size.v, limit.v, _CMP_LT_OQ), rest.v, size.v);
  }
  return _mm512_reduce_add_ps(lost.v) <= kMostLost * _mm512_reduce_add_ps(rest.v);
}

// (Σ_i 256^i · sums[i]) / kDigitScale, in doubles; the sum is at most 2³⁸ · K.
PYOPS_INLINE __m512 join_digits(const __m512i* sums) {
  const auto half = [&](int at) PYOPS_LAMBDA {
    __m512d all = _mm512_setzero_pd();
#pragma GCC unroll 4
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
  __m512i sum[MR][2][4];  // in registers if every loop over it is unrolled
#pragma GCC unroll 3
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
#pragma GCC unroll 3
      for (int d = 0; d < 3; d++) sum[r][j][d] = _mm512_setzero_si512();
      sum[r][j][3] = _mm512_loadu_si512(panel + j * 64);  // -128 · Σ w, for 2³¹ = 128 · 256³
    }
  const auto multiply = [&](const int8_t* w, const int8_t* x) PYOPS_LAMBDA {  // four k
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 3
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
#pragma GCC unroll 3
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) _mm512_storeu_ps(acc + r * kPanelN + j * 16, join_digits(sum[r][j]));
}

}  // namespace avx512vnni
PYOPS_TARGET_END
#endif
}  // namespace pyops
