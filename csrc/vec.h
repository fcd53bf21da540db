// One vector of floats for each ISA, with the few operations that the shared kernels need. Loads and stores convert
// from and to fp32, bf16 and fp16. min/max keep a NaN that stands in their second argument.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#define PYOPS_PRAGMA(x) _Pragma(#x)
#define PYOPS_TARGET_BEGIN(isa) PYOPS_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define PYOPS_TARGET_END _Pragma("clang attribute pop")
#else
#define PYOPS_PRAGMA(x) _Pragma(#x)
#define PYOPS_TARGET_BEGIN(isa) PYOPS_PRAGMA(GCC push_options) PYOPS_PRAGMA(GCC target(isa))
#define PYOPS_TARGET_END _Pragma("GCC pop_options")
#endif
#define PYOPS_TARGET_BEGIN_AVX2 PYOPS_TARGET_BEGIN("avx2,fma,f16c")
#define PYOPS_TARGET_BEGIN_AVX512 PYOPS_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define PYOPS_TARGET_BEGIN_VNNI PYOPS_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#define PYOPS_TARGET_BEGIN_AMX \
  PYOPS_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
#endif

#define PYOPS_INLINE static inline __attribute__((always_inline))
#define PYOPS_MEMBER inline __attribute__((always_inline))
#define PYOPS_LAMBDA __attribute__((always_inline))

namespace pyops {
using bf16 = torch::headeronly::BFloat16;
using fp16 = torch::headeronly::Half;

namespace generic {

// Eight lanes, so that a compiler can use whatever the baseline has (SSE2, NEON).
struct Vec {
  static constexpr int kLanes = 8;
  float v[kLanes];
};

#define PYOPS_LANES for (int i = 0; i < Vec::kLanes; i++)
template <class T>
PYOPS_INLINE Vec load(const T* p) {
  Vec r;
  PYOPS_LANES r.v[i] = static_cast<float>(p[i]);
  return r;
}
PYOPS_INLINE Vec load_int(const int32_t* p) {
  Vec r;
  PYOPS_LANES r.v[i] = static_cast<float>(p[i]);
  return r;
}
template <class T>
PYOPS_INLINE void store(T* p, Vec a) {
  PYOPS_LANES p[i] = static_cast<T>(a.v[i]);
}
// The first n lanes; those beyond are zero, and are not touched in memory.
template <class T>
PYOPS_INLINE Vec load(const T* p, int n) {
  Vec r;
  PYOPS_LANES r.v[i] = i < n ? static_cast<float>(p[i]) : 0.0f;
  return r;
}
template <class T>
PYOPS_INLINE void store(T* p, Vec a, int n) {
  PYOPS_LANES if (i < n) p[i] = static_cast<T>(a.v[i]);
}
template <class T>
PYOPS_INLINE void stream(T* p, Vec a) {
  store(p, a);
}
PYOPS_INLINE void fence_streams() {}
PYOPS_INLINE Vec set1(float x) {
  Vec r;
  PYOPS_LANES r.v[i] = x;
  return r;
}
PYOPS_INLINE Vec operator+(Vec a, Vec b) {
  PYOPS_LANES a.v[i] += b.v[i];
  return a;
}
PYOPS_INLINE Vec operator-(Vec a, Vec b) {
  PYOPS_LANES a.v[i] -= b.v[i];
  return a;
}
PYOPS_INLINE Vec operator*(Vec a, Vec b) {
  PYOPS_LANES a.v[i] *= b.v[i];
  return a;
}
PYOPS_INLINE Vec operator/(Vec a, Vec b) {
  PYOPS_LANES a.v[i] /= b.v[i];
  return a;
}
PYOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
PYOPS_INLINE Vec min(Vec a, Vec b) {
  PYOPS_LANES b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return b;
}
PYOPS_INLINE Vec max(Vec a, Vec b) {
  PYOPS_LANES b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return b;
}
PYOPS_INLINE Vec abs(Vec a) {
  PYOPS_LANES a.v[i] = std::fabs(a.v[i]);
  return a;
}
PYOPS_INLINE Vec sqrt(Vec a) {
  PYOPS_LANES a.v[i] = __builtin_sqrtf(a.v[i]);
  return a;
}
PYOPS_INLINE Vec quick_sqrt(Vec a) { return sqrt(a); }
PYOPS_INLINE Vec quick_div(Vec a, Vec b) { return a / b; }
// a < 0 ? x : y; a NaN selects y.
PYOPS_INLINE Vec if_negative(Vec a, Vec x, Vec y) {
  PYOPS_LANES y.v[i] = a.v[i] < 0 ? x.v[i] : y.v[i];
  return y;
}
PYOPS_INLINE Vec round(Vec a) {
  PYOPS_LANES a.v[i] = std::nearbyintf(a.v[i]);
  return a;
}
// 2ⁿ for integral n in [-126, 128], infinite for 128; anything for NaN.
PYOPS_INLINE Vec pow2(Vec n) {
  PYOPS_LANES {
    const int32_t e = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    std::memcpy(&n.v[i], &bits, 4);
  }
  return n;
}
// max over the lanes of the bit patterns of |a|: orders like |a|, with NaN above Inf.
PYOPS_INLINE uint32_t max_magnitude_bits(Vec a) {
  uint32_t m = 0;
  PYOPS_LANES {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    bits &= 0x7fffffffu;
    m = bits > m ? bits : m;
  }
  return m;
}
PYOPS_INLINE Vec max_magnitude(Vec m, Vec a) {
  PYOPS_LANES {
    uint32_t x, y;
    std::memcpy(&x, &m.v[i], 4);
    std::memcpy(&y, &a.v[i], 4);
    y &= 0x7fffffffu;
    x = y > x ? y : x;
    std::memcpy(&m.v[i], &x, 4);
  }
  return m;
}
// √a, 1/√a for a ≥ 0, and a / b, at worst with 13 bits; 1/√0 is finite.
PYOPS_INLINE Vec rough_sqrt(Vec a) { return sqrt(a); }
PYOPS_INLINE Vec rough_rsqrt(Vec a) { return set1(1.0f) / sqrt(max(set1(1.17549435e-38f), a)); }
PYOPS_INLINE Vec rough_div(Vec a, Vec b) { return a / b; }
// |a| with the sign of b, where a ≥ 0.
PYOPS_INLINE Vec with_sign(Vec a, Vec b) {
  PYOPS_LANES a.v[i] = std::copysign(a.v[i], b.v[i]);
  return a;
}
// 64 floats, already within ±127, to the nearest int8.
template <class F>
PYOPS_INLINE void store_int8x64(int8_t* p, F&& part) {
  for (int j = 0; j < 64; j += Vec::kLanes) {
    const Vec a = round(part(j));
    PYOPS_LANES p[j + i] = static_cast<int8_t>(a.v[i]);
  }
}
// 32-bit unsigned integers, as many as a Vec has floats.
struct Words {
  uint32_t v[Vec::kLanes];
};
PYOPS_INLINE Words load_words(const uint32_t* p) {
  Words r;
  PYOPS_LANES r.v[i] = p[i];
  return r;
}
PYOPS_INLINE Words load_words(const uint8_t* p) {
  Words r;
  PYOPS_LANES r.v[i] = p[i];
  return r;
}
// With the sign extended.
PYOPS_INLINE Words load_words(const int8_t* p) {
  Words r;
  PYOPS_LANES r.v[i] = static_cast<uint32_t>(p[i]);
  return r;
}
PYOPS_INLINE void store(uint32_t* p, Words a) { PYOPS_LANES p[i] = a.v[i]; }
// 64 words, each a number that fits the byte.
template <class C, class F>
PYOPS_INLINE void store_bytesx64(C* p, F&& part) {
  for (int j = 0; j < 64; j += Vec::kLanes) {
    const Words a = part(j);
    PYOPS_LANES p[j + i] = static_cast<C>(a.v[i]);
  }
}
// The bits of floats.
PYOPS_INLINE Words bits_of(Vec a) {
  Words r;
  std::memcpy(&r, &a, sizeof(a));
  return r;
}
PYOPS_INLINE Vec floats_of(Words a) {
  Vec r;
  std::memcpy(&r, &a, sizeof(a));
  return r;
}
// first, first + 1, …
PYOPS_INLINE Words words_from(uint32_t first) {
  Words r;
  PYOPS_LANES r.v[i] = first + i;
  return r;
}
PYOPS_INLINE Words add(Words a, uint32_t b) {
  PYOPS_LANES a.v[i] += b;
  return a;
}
PYOPS_INLINE Words add(Words a, Words b) {
  PYOPS_LANES a.v[i] += b.v[i];
  return a;
}
PYOPS_INLINE Words mul(Words a, uint32_t b) {
  PYOPS_LANES a.v[i] *= b;
  return a;
}
// |a| of signed numbers.
PYOPS_INLINE Words magnitude(Words a) {
  PYOPS_LANES a.v[i] = a.v[i] >> 31 ? 0 - a.v[i] : a.v[i];
  return a;
}
// -a where b has its sign bit.
PYOPS_INLINE Words with_sign(Words a, Vec b) {
  PYOPS_LANES a.v[i] = std::signbit(b.v[i]) ? 0 - a.v[i] : a.v[i];
  return a;
}
// max(a, 1) where b > 0.
PYOPS_INLINE Words one_if_positive(Words a, Vec b) {
  PYOPS_LANES a.v[i] = b.v[i] > 0 && a.v[i] == 0 ? 1 : a.v[i];
  return a;
}
// a ^ a >> n
template <int n>
PYOPS_INLINE Words fold(Words a) {
  PYOPS_LANES a.v[i] ^= a.v[i] >> n;
  return a;
}
template <int n>
PYOPS_INLINE Words shift_right(Words a) {
  PYOPS_LANES a.v[i] >>= n;
  return a;
}
template <int n>
PYOPS_INLINE Words shift_left(Words a) {
  PYOPS_LANES a.v[i] <<= n;
  return a;
}
template <int n>
PYOPS_INLINE Words low_bits(Words a) {
  PYOPS_LANES a.v[i] &= (1u << n) - 1;
  return a;
}
// The first n of a, with `bits` added to what bf16 cuts off; NaN and Inf are only cut.
PYOPS_INLINE void store_cut(bf16* p, Vec a, Words bits, int n = Vec::kLanes) {
  PYOPS_LANES if (i < n) {
    uint32_t raw;
    std::memcpy(&raw, &a.v[i], 4);
    raw = (raw & 0x7f800000u) == 0x7f800000u ? raw : raw + bits.v[i];
    const uint16_t half = static_cast<uint16_t>(raw >> 16);
    std::memcpy(p + i, &half, 2);
  }
}
#undef PYOPS_LANES

}  // namespace generic

#if defined(__x86_64__)

PYOPS_TARGET_BEGIN_AVX2
namespace avx2 {

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
};

PYOPS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
PYOPS_INLINE Vec load(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
PYOPS_INLINE Vec load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
PYOPS_INLINE Vec load_int(const int32_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PYOPS_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
PYOPS_INLINE void store(fp16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// Round to nearest even by adding 0x7fff + the lowest kept bit; a NaN becomes the quiet NaN 0x7fc0.
PYOPS_INLINE void store(bf16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(_mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
// The first n lanes; those beyond are zero, and are not touched in memory.
template <class T>
PYOPS_INLINE Vec load(const T* p, int n) {
  T part[Vec::kLanes] = {};
  for (int i = 0; i < Vec::kLanes && i < n; i++) part[i] = p[i];
  return load(part);
}
template <class T>
PYOPS_INLINE void store(T* p, Vec a, int n) {
  T part[Vec::kLanes];
  store(part, a);
  for (int i = 0; i < Vec::kLanes && i < n; i++) p[i] = part[i];
}
// Past the caches; p on a vector's boundary. Other threads see the data after fence_streams.
PYOPS_INLINE void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
template <class T>
PYOPS_INLINE void stream(T* p, Vec a) {
  store(p, a);
}
PYOPS_INLINE void fence_streams() { _mm_sfence(); }
PYOPS_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
PYOPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
PYOPS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
PYOPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
PYOPS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
PYOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
PYOPS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
PYOPS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
PYOPS_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
PYOPS_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
PYOPS_INLINE Vec quick_sqrt(Vec a) { return sqrt(a); }
PYOPS_INLINE Vec quick_div(Vec a, Vec b) { return a / b; }
PYOPS_INLINE Vec if_negative(Vec a, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, _mm256_setzero_ps(), _CMP_LT_OQ))};
}
PYOPS_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PYOPS_INLINE Vec pow2(Vec n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
}
PYOPS_INLINE Vec max_magnitude(Vec m, Vec a) {
  return {_mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(m.v), _mm256_castps_si256(abs(a).v)))};
}
PYOPS_INLINE uint32_t max_magnitude_bits(Vec a) {
  __m256i m = _mm256_castps_si256(abs(a).v);
  m = _mm256_max_epi32(m, _mm256_permute2x128_si256(m, m, 1));
  m = _mm256_max_epi32(m, _mm256_shuffle_epi32(m, 0x4e));
  m = _mm256_max_epi32(m, _mm256_shuffle_epi32(m, 0xb1));
  return static_cast<uint32_t>(_mm256_extract_epi32(m, 0));
}
PYOPS_INLINE Vec rough_sqrt(Vec a) { return sqrt(a); }
PYOPS_INLINE Vec rough_rsqrt(Vec a) { return set1(1.0f) / sqrt(max(set1(0x1p-126f), a)); }
PYOPS_INLINE Vec rough_div(Vec a, Vec b) { return a / b; }
PYOPS_INLINE Vec with_sign(Vec a, Vec b) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(a.v, _mm256_and_ps(sign, b.v))};
}
struct Words {
  __m256i v;
};
PYOPS_INLINE Words load_words(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
PYOPS_INLINE Words load_words(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
PYOPS_INLINE Words load_words(const int8_t* p) {
  return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
template <class C, class F>
PYOPS_INLINE void store_bytesx64(C* p, F&& part) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int j = 0; j < 64; j += 32) {
    const __m256i ab = _mm256_packs_epi32(part(j).v, part(j + 8).v);
    const __m256i cd = _mm256_packs_epi32(part(j + 16).v, part(j + 24).v);
    const __m256i q = C(-1) > C(0) ? _mm256_packus_epi16(ab, cd) : _mm256_packs_epi16(ab, cd);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + j), _mm256_permutevar8x32_epi32(q, order));
  }
}
template <class F>
PYOPS_INLINE void store_int8x64(int8_t* p, F&& part) {
  store_bytesx64(p, [&](int j) PYOPS_LAMBDA { return Words{_mm256_cvtps_epi32(part(j).v)}; });
}
PYOPS_INLINE Words bits_of(Vec a) { return {_mm256_castps_si256(a.v)}; }
PYOPS_INLINE Vec floats_of(Words a) { return {_mm256_castsi256_ps(a.v)}; }
PYOPS_INLINE void store(uint32_t* p, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
PYOPS_INLINE Words words_from(uint32_t first) {
  return {_mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(first)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
}
PYOPS_INLINE Words add(Words a, uint32_t b) { return {_mm256_add_epi32(a.v, _mm256_set1_epi32(static_cast<int>(b)))}; }
PYOPS_INLINE Words mul(Words a, uint32_t b) {
  return {_mm256_mullo_epi32(a.v, _mm256_set1_epi32(static_cast<int>(b)))};
}
template <int n>
PYOPS_INLINE Words shift_right(Words a) {
  return {_mm256_srli_epi32(a.v, n)};
}
template <int n>
PYOPS_INLINE Words fold(Words a) {
  return {_mm256_xor_si256(a.v, shift_right<n>(a).v)};
}
PYOPS_INLINE Words add(Words a, Words b) { return {_mm256_add_epi32(a.v, b.v)}; }
template <int n>
PYOPS_INLINE Words shift_left(Words a) {
  return {_mm256_slli_epi32(a.v, n)};
}
template <int n>
PYOPS_INLINE Words low_bits(Words a) {
  return {_mm256_and_si256(a.v, _mm256_set1_epi32((1 << n) - 1))};
}
PYOPS_INLINE Words magnitude(Words a) { return {_mm256_abs_epi32(a.v)}; }
PYOPS_INLINE Words with_sign(Words a, Vec b) {
  const __m256i sign = _mm256_srai_epi32(_mm256_castps_si256(b.v), 31);
  return {_mm256_sub_epi32(_mm256_xor_si256(a.v, sign), sign)};
}
PYOPS_INLINE Words one_if_positive(Words a, Vec b) {
  const __m256i positive = _mm256_castps_si256(_mm256_cmp_ps(b.v, _mm256_setzero_ps(), _CMP_GT_OQ));
  return {_mm256_max_epi32(a.v, _mm256_srli_epi32(positive, 31))};
}
PYOPS_INLINE void store_cut(bf16* p, Vec a, Words bits, int n = Vec::kLanes) {
  const __m256i raw = _mm256_castps_si256(a.v), exponent = _mm256_set1_epi32(0x7f800000);
  const __m256i special = _mm256_cmpeq_epi32(_mm256_and_si256(raw, exponent), exponent);
  const __m256i cut = _mm256_srli_epi32(_mm256_add_epi32(raw, _mm256_andnot_si256(special, bits.v)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(cut, cut), 0xd8);
  bf16 part[Vec::kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(n < Vec::kLanes ? part : p), _mm256_castsi256_si128(packed));
  for (int i = 0; n < Vec::kLanes && i < n; i++) p[i] = part[i];
}

}  // namespace avx2
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
namespace avx512 {

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
};

PYOPS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
PYOPS_INLINE Vec load(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
PYOPS_INLINE Vec load(const fp16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PYOPS_INLINE Vec load_int(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
PYOPS_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
PYOPS_INLINE void store(fp16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
PYOPS_INLINE __m256i to_bf16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i r = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
PYOPS_INLINE void store(bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
PYOPS_INLINE __mmask16 first_lanes(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}
PYOPS_INLINE Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
PYOPS_INLINE Vec load(const bf16* p, int n) {
  const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
PYOPS_INLINE Vec load(const fp16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
PYOPS_INLINE void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
PYOPS_INLINE void store(bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bf16(a)); }
PYOPS_INLINE void store(fp16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
PYOPS_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
PYOPS_INLINE void stream(bf16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bf16(a)); }
PYOPS_INLINE void stream(fp16* p, Vec a) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
PYOPS_INLINE void fence_streams() { _mm_sfence(); }
PYOPS_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
PYOPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
PYOPS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
PYOPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
PYOPS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
PYOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PYOPS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
PYOPS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
PYOPS_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
PYOPS_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// sqrt and a / b to within an ulp, from 14-bit estimates and two corrections: the instructions themselves take 19 and
// 16 cycles a vector, as long as a memory-bound loop takes in all. What the estimates cannot do goes to the
// instructions.
PYOPS_INLINE Vec quick_sqrt(Vec a) {
  if (__builtin_expect(_mm512_fpclass_ps_mask(a.v, 0x08), 0)) return sqrt(a);  // +Inf
  const __m512 y = _mm512_maskz_rsqrt14_ps(_mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), a.v);
  const __m512 half = _mm512_set1_ps(0.5f);
  __m512 s = _mm512_mul_ps(a.v, y), h = _mm512_mul_ps(y, half);
  const __m512 r = _mm512_fnmadd_ps(s, h, half);
  s = _mm512_fmadd_ps(s, r, s);
  h = _mm512_fmadd_ps(h, r, h);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(s, s, a.v), h, s)};
}
PYOPS_INLINE Vec quick_div(Vec a, Vec b) {
  const __m512 size = _mm512_abs_ps(b.v);
  const __mmask16 usual = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(size, _mm512_set1_ps(0x1p-100f), _CMP_GE_OQ), size,
                                                  _mm512_set1_ps(0x1p100f), _CMP_LE_OQ);
  if (__builtin_expect(usual != 0xffff, 0)) return a / b;
  __m512 r = _mm512_rcp14_ps(b.v);
  r = _mm512_fmadd_ps(_mm512_fnmadd_ps(b.v, r, _mm512_set1_ps(1.0f)), r, r);
  const __m512 q = _mm512_mul_ps(a.v, r);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(b.v, q, a.v), r, q)};
}
PYOPS_INLINE Vec if_negative(Vec a, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, _mm512_setzero_ps(), _CMP_LT_OQ), x.v)};
}
PYOPS_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PYOPS_INLINE Vec pow2(Vec n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
PYOPS_INLINE Vec max_magnitude(Vec m, Vec a) {
  return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(m.v), _mm512_castps_si512(abs(a).v)))};
}
PYOPS_INLINE uint32_t max_magnitude_bits(Vec a) {
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_castps_si512(abs(a).v)));
}
PYOPS_INLINE Vec rough_rsqrt(Vec a) { return {_mm512_rsqrt14_ps(_mm512_max_ps(_mm512_set1_ps(0x1p-126f), a.v))}; }
PYOPS_INLINE Vec rough_sqrt(Vec a) {
  const __mmask16 infinite = _mm512_fpclass_ps_mask(a.v, 0x08);  // where the product is Inf · 0
  return {_mm512_mask_mul_ps(a.v, static_cast<__mmask16>(~infinite), a.v, rough_rsqrt(a).v)};
}
PYOPS_INLINE Vec with_sign(Vec a, Vec b) {
  const __m512i size = _mm512_castps_si512(a.v), sign = _mm512_castps_si512(b.v);
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), sign, size, 0xea))};
}
PYOPS_INLINE Vec rough_div(Vec a, Vec b) { return {_mm512_mul_ps(a.v, _mm512_rcp14_ps(b.v))}; }
struct Words {
  __m512i v;
};
PYOPS_INLINE Words load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
PYOPS_INLINE Words load_words(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PYOPS_INLINE Words load_words(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <class C, class F>
PYOPS_INLINE void store_bytesx64(C* p, F&& part) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i ab = _mm512_packs_epi32(part(0).v, part(16).v), cd = _mm512_packs_epi32(part(32).v, part(48).v);
  const __m512i q = C(-1) > C(0) ? _mm512_packus_epi16(ab, cd) : _mm512_packs_epi16(ab, cd);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, q));
}
template <class F>
PYOPS_INLINE void store_int8x64(int8_t* p, F&& part) {
  store_bytesx64(p, [&](int j) PYOPS_LAMBDA { return Words{_mm512_cvtps_epi32(part(j).v)}; });
}
PYOPS_INLINE Words bits_of(Vec a) { return {_mm512_castps_si512(a.v)}; }
PYOPS_INLINE Vec floats_of(Words a) { return {_mm512_castsi512_ps(a.v)}; }
PYOPS_INLINE void store(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
PYOPS_INLINE Words words_from(uint32_t first) {
  const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), count)};
}
PYOPS_INLINE Words add(Words a, uint32_t b) { return {_mm512_add_epi32(a.v, _mm512_set1_epi32(static_cast<int>(b)))}; }
PYOPS_INLINE Words mul(Words a, uint32_t b) {
  return {_mm512_mullo_epi32(a.v, _mm512_set1_epi32(static_cast<int>(b)))};
}
template <int n>
PYOPS_INLINE Words shift_right(Words a) {
  return {_mm512_srli_epi32(a.v, n)};
}
template <int n>
PYOPS_INLINE Words fold(Words a) {
  return {_mm512_xor_si512(a.v, shift_right<n>(a).v)};
}
PYOPS_INLINE Words add(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int n>
PYOPS_INLINE Words shift_left(Words a) {
  return {_mm512_slli_epi32(a.v, n)};
}
template <int n>
PYOPS_INLINE Words low_bits(Words a) {
  return {_mm512_and_si512(a.v, _mm512_set1_epi32((1 << n) - 1))};
}
PYOPS_INLINE Words magnitude(Words a) { return {_mm512_abs_epi32(a.v)}; }
PYOPS_INLINE Words with_sign(Words a, Vec b) {
  const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(b.v));
  return {_mm512_mask_sub_epi32(a.v, negative, _mm512_setzero_si512(), a.v)};
}
PYOPS_INLINE Words one_if_positive(Words a, Vec b) {
  const __mmask16 positive = _mm512_cmp_ps_mask(b.v, _mm512_setzero_ps(), _CMP_GT_OQ);
  return {_mm512_mask_max_epu32(a.v, positive, a.v, _mm512_set1_epi32(1))};
}
PYOPS_INLINE void store_cut(bf16* p, Vec a, Words bits, int n = Vec::kLanes) {
  const __m512i raw = _mm512_castps_si512(a.v), exponent = _mm512_set1_epi32(0x7f800000);
  const __mmask16 finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512(raw, exponent), exponent);
  const __m512i cut = _mm512_srli_epi32(_mm512_mask_add_epi32(raw, finite, raw, bits.v), 16);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtepi32_epi16(cut));
}

}  // namespace avx512
PYOPS_TARGET_END

#endif
}  // namespace pyops
