// Moving data between memory order and lanes, for each ISA: what layouts with one pixel a lane need beyond vec.h.
//
// A quarter is four neighbouring lanes (of a vector of eight there are two of them).
#pragma once

#include "vec.h"

namespace pyops {
namespace generic {

// Quarter q < N holds the four elements at parts[q]; the others hold anything.
template <int N = Vec::kLanes / 4, class T>
PYOPS_INLINE Vec load_quarters(const T* const* parts) {
  Vec r;
  for (int i = 0; i < Vec::kLanes; i++) r.v[i] = i < 4 * N ? static_cast<float>(parts[i / 4][i % 4]) : 0.0f;
  return r;
}
// In each quarter: element j of vector i becomes element i of vector j.
PYOPS_INLINE void transpose4(Vec& a, Vec& b, Vec& c, Vec& d) {
  Vec* v[4] = {&a, &b, &c, &d};
  for (int q = 0; q < Vec::kLanes; q += 4)
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < i; j++) {
        const float t = v[i]->v[q + j];
        v[i]->v[q + j] = v[j]->v[q + i];
        v[j]->v[q + i] = t;
      }
}
// The lanes whose bit is set, those of `pad` elsewhere.
PYOPS_INLINE Vec keep(Vec a, uint32_t lanes, Vec pad) {
  for (int i = 0; i < Vec::kLanes; i++) a.v[i] = lanes >> i & 1 ? a.v[i] : pad.v[i];
  return a;
}
// Keeps the compiler from loading or broadcasting again what is in a register.
PYOPS_INLINE Vec pin(Vec a) { return a; }

}  // namespace generic

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX2
namespace avx2 {

PYOPS_INLINE __m128 four(const float* p) { return _mm_loadu_ps(p); }
PYOPS_INLINE __m128 four(const bf16* p) {
  const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16));
}
template <int N = 2, class T>
PYOPS_INLINE Vec load_quarters(const T* const* parts) {
  if constexpr (N == 1) return {_mm256_castps128_ps256(four(parts[0]))};
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(four(parts[0])), four(parts[1]), 1)};
}
PYOPS_INLINE void transpose4(Vec& a, Vec& b, Vec& c, Vec& d) {
  const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a.v, b.v)),
                ab1 = _mm256_castps_pd(_mm256_unpackhi_ps(a.v, b.v));
  const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c.v, d.v)),
                cd1 = _mm256_castps_pd(_mm256_unpackhi_ps(c.v, d.v));
  a.v = _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0));
  b.v = _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0));
  c.v = _mm256_castpd_ps(_mm256_unpacklo_pd(ab1, cd1));
  d.v = _mm256_castpd_ps(_mm256_unpackhi_pd(ab1, cd1));
}
PYOPS_INLINE Vec keep(Vec a, uint32_t lanes, Vec pad) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(lanes)), bit);
  return {_mm256_blendv_ps(pad.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)))};
}
PYOPS_INLINE Vec pin(Vec a) {
  asm("" : "+x"(a.v));
  return a;
}

}  // namespace avx2
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
namespace avx512 {

PYOPS_INLINE __m128 four(const float* p) { return _mm_loadu_ps(p); }
PYOPS_INLINE __m128 four(const bf16* p) {
  const __m128i h = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16));
}
template <int N = 4, class T>
PYOPS_INLINE Vec load_quarters(const T* const* parts) {
  __m512 v = _mm512_castps128_ps512(four(parts[0]));
  if constexpr (N > 1) v = _mm512_mask_broadcast_f32x4(v, 0x00f0, four(parts[1]));
  if constexpr (N > 2) v = _mm512_mask_broadcast_f32x4(v, 0x0f00, four(parts[2]));
  if constexpr (N > 3) v = _mm512_mask_broadcast_f32x4(v, 0xf000, four(parts[3]));
  return {v};
}
PYOPS_INLINE void transpose4(Vec& a, Vec& b, Vec& c, Vec& d) {
  const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a.v, b.v)),
                ab1 = _mm512_castps_pd(_mm512_unpackhi_ps(a.v, b.v));
  const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c.v, d.v)),
                cd1 = _mm512_castps_pd(_mm512_unpackhi_ps(c.v, d.v));
  a.v = _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0));
  b.v = _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0));
  c.v = _mm512_castpd_ps(_mm512_unpacklo_pd(ab1, cd1));
  d.v = _mm512_castpd_ps(_mm512_unpackhi_pd(ab1, cd1));
}
PYOPS_INLINE Vec keep(Vec a, uint32_t lanes, Vec pad) {
  return {_mm512_mask_mov_ps(pad.v, static_cast<__mmask16>(lanes), a.v)};
}
PYOPS_INLINE Vec pin(Vec a) {
  asm("" : "+v"(a.v));
  return a;
}

}  // namespace avx512
PYOPS_TARGET_END
#endif
}  // namespace pyops
