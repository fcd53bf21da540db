// Vectors of quads (int8_sparse_conv2d.h) for each ISA: packing floats to them, and the operations that the kernels of
// sparse_conv2d.inc are written in, with quads for floats and int32 accumulators.
#pragma once

#include "vec.h"

namespace pyops {
namespace generic {

// Lane i of the four vectors, to the nearest integers, as quad i.
PYOPS_INLINE Words quads_of(Vec a, Vec b, Vec c, Vec d, uint32_t zero) {
  const Vec v[4] = {round(a), round(b), round(c), round(d)};
  Words r;
  for (int i = 0; i < Vec::kLanes; i++) {
    int8_t q[4];
    for (int j = 0; j < 4; j++) q[j] = static_cast<int8_t>(v[j].v[i]);
    std::memcpy(&r.v[i], q, 4);
    r.v[i] ^= zero;
  }
  return r;
}
// The lanes of the four vectors, one after the other, as bytes.
PYOPS_INLINE Words bytes_of(Vec a, Vec b, Vec c, Vec d, uint32_t zero) {
  const Vec v[4] = {round(a), round(b), round(c), round(d)};
  int8_t q[4 * Vec::kLanes];
  for (int j = 0; j < 4; j++)
    for (int i = 0; i < Vec::kLanes; i++) q[j * Vec::kLanes + i] = static_cast<int8_t>(v[j].v[i]);
  Words r;
  std::memcpy(&r, q, sizeof r);
  for (int i = 0; i < Vec::kLanes; i++) r.v[i] ^= zero;
  return r;
}

namespace int8 {

constexpr uint32_t kZero = 0;
struct Vec {
  static constexpr int kLanes = generic::Vec::kLanes;
  uint32_t v[kLanes];
};
PYOPS_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
PYOPS_INLINE void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
PYOPS_INLINE Vec set1(float bits) {
  Vec r;
  for (int i = 0; i < Vec::kLanes; i++) std::memcpy(&r.v[i], &bits, 4);
  return r;
}
PYOPS_INLINE Vec pin(Vec a) { return a; }
PYOPS_INLINE Vec fma(Vec w, Vec x, Vec acc) {
  for (int i = 0; i < Vec::kLanes; i++) {
    for (int j = 0; j < 32; j += 8) acc.v[i] += static_cast<int8_t>(w.v[i] >> j) * static_cast<int8_t>(x.v[i] >> j);
  }
  return acc;
}

}  // namespace int8
}  // namespace generic

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX2
namespace avx2 {

// Saturated to bytes; each four lanes hold those of a, then of b, c, d.
PYOPS_INLINE __m256i packed(Vec a, Vec b, Vec c, Vec d) {
  const __m256i ab = _mm256_packs_epi32(_mm256_cvtps_epi32(a.v), _mm256_cvtps_epi32(b.v));
  const __m256i cd = _mm256_packs_epi32(_mm256_cvtps_epi32(c.v), _mm256_cvtps_epi32(d.v));
  return _mm256_packs_epi16(ab, cd);
}
PYOPS_INLINE Words quads_of(Vec a, Vec b, Vec c, Vec d, uint32_t zero) {
  const __m256i order =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return {_mm256_xor_si256(_mm256_shuffle_epi8(packed(a, b, c, d), order), _mm256_set1_epi32(static_cast<int>(zero)))};
}
PYOPS_INLINE Words bytes_of(Vec a, Vec b, Vec c, Vec d, uint32_t zero) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i q = _mm256_permutevar8x32_epi32(packed(a, b, c, d), order);
  return {_mm256_xor_si256(q, _mm256_set1_epi32(static_cast<int>(zero)))};
}

namespace int8 {

constexpr uint32_t kZero = 0;
struct Vec {
  static constexpr int kLanes = 8;
  __m256i v;
};
PYOPS_INLINE Vec load(const float* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
PYOPS_INLINE void store(float* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
PYOPS_INLINE Vec set1(float bits) { return {_mm256_castps_si256(_mm256_set1_ps(bits))}; }
PYOPS_INLINE Vec pin(Vec a) {
  asm("" : "+x"(a.v));
  return a;
}
// vpmaddubsw saturates at 2¹⁵; |w| · (x with w's sign) cannot reach it, both being at most 127.
PYOPS_INLINE Vec fma(Vec w, Vec x, Vec acc) {
  const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(w.v), _mm256_sign_epi8(x.v, w.v));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(products, _mm256_set1_epi16(1)))};
}

}  // namespace int8
}  // namespace avx2
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
namespace avx512 {

PYOPS_INLINE __m512i packed(Vec a, Vec b, Vec c, Vec d) {
  const __m512i ab = _mm512_packs_epi32(_mm512_cvtps_epi32(a.v), _mm512_cvtps_epi32(b.v));
  const __m512i cd = _mm512_packs_epi32(_mm512_cvtps_epi32(c.v), _mm512_cvtps_epi32(d.v));
  return _mm512_packs_epi16(ab, cd);
}
PYOPS_INLINE Words quads_of(Vec a, Vec b, Vec c, Vec d, uint32_t zero) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  return {_mm512_xor_si512(_mm512_shuffle_epi8(packed(a, b, c, d), order), _mm512_set1_epi32(static_cast<int>(zero)))};
}
PYOPS_INLINE Words bytes_of(Vec a, Vec b, Vec c, Vec d, uint32_t zero) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i q = _mm512_permutexvar_epi32(order, packed(a, b, c, d));
  return {_mm512_xor_si512(q, _mm512_set1_epi32(static_cast<int>(zero)))};
}

// What both kinds of kernels use; not in a namespace of either, where argument-dependent lookup would find the other's.
namespace quads {

struct Vec {
  static constexpr int kLanes = 16;
  __m512i v;
};
PYOPS_INLINE Vec load(const float* p) { return {_mm512_loadu_si512(p)}; }
PYOPS_INLINE void store(float* p, Vec a) { _mm512_storeu_si512(p, a.v); }
PYOPS_INLINE Vec set1(float bits) { return {_mm512_castps_si512(_mm512_set1_ps(bits))}; }
PYOPS_INLINE Vec pin(Vec a) {
  asm("" : "+v"(a.v));
  return a;
}
}  // namespace quads

namespace int8 {

using quads::load, quads::pin, quads::set1, quads::store, quads::Vec;
constexpr uint32_t kZero = 0;
// As in AVX2, the sign applied through a mask.
PYOPS_INLINE Vec fma(Vec w, Vec x, Vec acc) {
  const __m512i signed_x = _mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(w.v), _mm512_setzero_si512(), x.v);
  const __m512i products = _mm512_maddubs_epi16(_mm512_abs_epi8(w.v), signed_x);
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(products, _mm512_set1_epi16(1)))};
}

}  // namespace int8
}  // namespace avx512
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_VNNI
namespace avx512vnni::int8 {

namespace quads = avx512::quads;
using quads::load, quads::pin, quads::set1, quads::store, quads::Vec;

// vpdpbusd multiplies unsigned x by signed w: x holds q + 128, and the accumulators start at -128·Σ w.
constexpr uint32_t kZero = 0x80808080u;
PYOPS_INLINE Vec fma(Vec w, Vec x, Vec acc) { return {_mm512_dpbusd_epi32(acc.v, x.v, w.v)}; }

}  // namespace avx512vnni::int8
PYOPS_TARGET_END
#endif
}  // namespace pyops
