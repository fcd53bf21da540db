// int8 and int4 weights as floats: the first step of every kernel that multiplies them with unquantized activations.
#pragma once

#include "vec.h"

namespace pyops {

// Weights become floats 2²⁴ times as large: a byte is converted where it stands highest in its lane, without a shift
// to extend its sign. Who multiplies them divides by this.
constexpr float kQuadScale = 16777216.0f;

namespace generic {

// Four bytes a lane.
struct Quads {
  int8_t v[Vec::kLanes * 4];
};
PYOPS_INLINE Quads load_quads(const int8_t* p) {
  Quads r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
// One byte a lane, four times.
PYOPS_INLINE Quads spread_quads(const uint8_t* p) {
  Quads r;
  for (int i = 0; i < Vec::kLanes * 4; i++) r.v[i] = static_cast<int8_t>(p[i / 4]);
  return r;
}
// The low and the high nibbles of `packed`, less `zero`.
PYOPS_INLINE void nibble_quads(Quads packed, Quads zero, Quads& low, Quads& high) {
  for (int i = 0; i < Vec::kLanes * 4; i++) {
    const int both = static_cast<uint8_t>(packed.v[i]);
    low.v[i] = static_cast<int8_t>((both & 15) - zero.v[i]);
    high.v[i] = static_cast<int8_t>((both >> 4) - zero.v[i]);
  }
}
// The four bytes of each lane as f[0] … f[3], times kQuadScale.
PYOPS_INLINE void quad_floats(Quads q, Vec* f) {
  for (int i = 0; i < Vec::kLanes; i++)
    for (int j = 0; j < 4; j++) f[j].v[i] = static_cast<float>(q.v[i * 4 + j]) * kQuadScale;
}

}  // namespace generic

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX2
namespace avx2 {

struct Quads {
  __m256i v;
};
PYOPS_INLINE Quads load_quads(const int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
PYOPS_INLINE Quads spread_quads(const uint8_t* p) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_mullo_epi32(lanes, _mm256_set1_epi32(0x01010101))};
}
PYOPS_INLINE void nibble_quads(Quads packed, Quads zero, Quads& low, Quads& high) {
  const __m256i mask = _mm256_set1_epi8(15);
  low.v = _mm256_sub_epi8(_mm256_and_si256(packed.v, mask), zero.v);
  high.v = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(packed.v, 4), mask), zero.v);
}
PYOPS_INLINE void quad_floats(Quads q, Vec* f) {
  const __m256i v = q.v;
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xff000000u));
  const __m256i lanes = _mm256_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12);
  const auto byte = [&](int i) PYOPS_LAMBDA {  // byte i of each lane to its highest place; 0x80 clears the others
    const __m256i from = _mm256_add_epi32(lanes, _mm256_set1_epi32(i));
    return _mm256_shuffle_epi8(v, _mm256_or_si256(_mm256_slli_epi32(from, 24), _mm256_set1_epi32(0x00808080)));
  };
  f[0].v = _mm256_cvtepi32_ps(_mm256_slli_epi32(v, 24));
  f[1].v = _mm256_cvtepi32_ps(byte(1));
  f[2].v = _mm256_cvtepi32_ps(byte(2));
  f[3].v = _mm256_cvtepi32_ps(_mm256_and_si256(v, top));
}

}  // namespace avx2
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
namespace avx512 {

struct Quads {
  __m512i v;
};
PYOPS_INLINE Quads load_quads(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
PYOPS_INLINE Quads spread_quads(const uint8_t* p) {
  const __m512i lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x01010101))};
}
PYOPS_INLINE void nibble_quads(Quads packed, Quads zero, Quads& low, Quads& high) {
  const __m512i mask = _mm512_set1_epi8(15);
  low.v = _mm512_sub_epi8(_mm512_and_si512(packed.v, mask), zero.v);
  high.v = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(packed.v, 4), mask), zero.v);
}
PYOPS_INLINE void quad_floats(Quads q, Vec* f) {
  const __m512i v = q.v;
  const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4, 8, 12));
  const auto byte = [&](int i) PYOPS_LAMBDA {
    const __m512i from = _mm512_add_epi32(lanes, _mm512_set1_epi32(i));
    return _mm512_shuffle_epi8(v, _mm512_or_si512(_mm512_slli_epi32(from, 24), _mm512_set1_epi32(0x00808080)));
  };
  f[0].v = _mm512_cvtepi32_ps(_mm512_slli_epi32(v, 24));
  f[1].v = _mm512_cvtepi32_ps(byte(1));
  f[2].v = _mm512_cvtepi32_ps(byte(2));
  f[3].v = _mm512_cvtepi32_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xff000000u))));
}

}  // namespace avx512
PYOPS_TARGET_END
#endif
}  // namespace pyops
