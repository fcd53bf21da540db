// int4 dot products with VNNI, whose one operand is unsigned: see int4_dot.h.
#pragma once

#include "int4_dot.h"

namespace pyops {
#if defined(__x86_64__)

PYOPS_TARGET_BEGIN_VNNI
namespace avx512vnni {

// As PYOPS_DOT2 (int8_dot.h), the other way round: the weights b are unsigned, the rows a signed.
#define PYOPS_DOT2_UNSIGNED_B(acc0, acc1, a, b0, b1)                                                  \
  __asm__ volatile("vpbroadcastd %4, %%zmm31\n\tvpdpbusd %%zmm31, %2, %0\n\tvpdpbusd %%zmm31, %3, %1" \
                   : "+v"(acc0), "+v"(acc1)                                                           \
                   : "v"(b0), "v"(b1), "m"(*reinterpret_cast<const int32_t*>(a))                      \
                   : "xmm31")

// c = float(acc) · s + c in memory, in assembly so that GCC does not keep a tile's c in registers, which it has not.
#define PYOPS_SCALE_SUMS(acc0, acc1, c, s0, s1)                                                            \
  __asm__ volatile(                                                                                        \
      "vcvtdq2ps %0, %0\n\tvcvtdq2ps %1, %1\n\tvfmadd213ps (%4), %2, %0\n\tvfmadd213ps 64(%4), %3, %1\n\t" \
      "vmovups %0, (%4)\n\tvmovups %1, 64(%4)"                                                             \
      : "+v"(acc0), "+v"(acc1)                                                                             \
      : "v"(s0), "v"(s1), "r"(c)                                                                           \
      : "memory")

// c = acc · m + c in memory, of integers.
#define PYOPS_ADD_MULTIPLES(acc0, acc1, c, m0, m1)                                                   \
  __asm__ volatile(                                                                                  \
      "vpmulld %2, %0, %0\n\tvpmulld %3, %1, %1\n\tvpaddd (%4), %0, %0\n\tvpaddd 64(%4), %1, %1\n\t" \
      "vmovdqu32 %0, (%4)\n\tvmovdqu32 %1, 64(%4)"                                                   \
      : "+v"(acc0), "+v"(acc1)                                                                       \
      : "v"(m0), "v"(m1), "r"(c)                                                                     \
      : "memory")

// out[g] = -Σ of the bytes of group g of a row.
inline void group_sums(const int8_t* row, int64_t quads, int64_t group_quads, int32_t* out, int64_t stride) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t q = 0; q < quads; q += group_quads, out += stride) {
    const int64_t bytes = smaller(group_quads, quads - q) * 4;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < bytes; k += 64) {
      const __mmask64 wanted = bytes - k >= 64 ? ~0ull : (1ull << (bytes - k)) - 1;
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(wanted, row + q * 4 + k));
    }
    *out = -_mm512_reduce_add_epi32(sum);
  }
}

// What a group's sums start at: -z·Σ a.
PYOPS_INLINE void start_group(const Int4Panel& p, int64_t group, const int32_t* sum, __m512i& acc0, __m512i& acc1) {
  if (p.zero) {
    const __m128i* zero = reinterpret_cast<const __m128i*>(p.zero + group * kPanelN);
    const __m512i s = _mm512_set1_epi32(*sum);
    acc0 = _mm512_mullo_epi32(s, _mm512_cvtepu8_epi32(_mm_loadu_si128(zero)));
    acc1 = _mm512_mullo_epi32(s, _mm512_cvtepu8_epi32(_mm_loadu_si128(zero + 1)));
  } else {
    acc0 = acc1 = _mm512_set1_epi32(*sum * kMiddle);
  }
}

PYOPS_INLINE void prefetch_nibbles(const uint8_t* p) {
  constexpr uintptr_t kPage = 4096, kStep = 8 * kNibbleRow;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (at % kPage >= kStep) return;
  const char* next = reinterpret_cast<const char*>(at / kPage * kPage + kPage);
  for (int i = 0; i < 4; i++) _mm_prefetch(next + i * 64, _MM_HINT_T1);
}

// Few rows and P panels side by side: memory answers several streams faster than one. c stays in registers. Low and
// high nibbles have sums of their own, so that two chains hide the latency. kSteps: groups are added up in integers,
// into acc.
template <int MR, bool kSteps, int P>
void int4_fused_few(const Int4Args& d) {
  const __m512i low = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
  const Int4Args* args[P];
  const uint8_t* w[P];
  const int8_t* a = d.a;
  __m512 c[P][MR][2];
  __m512i total[P][MR][2];
  for (int i = 0; i < P; i++) {
    args[i] = i ? d.others + i - 1 : &d;
    w[i] = args[i]->panel.weight;
    for (int r = 0; r < MR; r++) {
      c[i][r][0] = c[i][r][1] = _mm512_setzero_ps();
      total[i][r][0] = total[i][r][1] = zero;
    }
  }
  const int64_t groups = (d.quads + d.group_quads - 1) / d.group_quads;
  for (int64_t q = 0, g = 0; q < d.quads; q += d.group_quads, g++) {
    __m512i acc[P][MR][2], high[P][MR][2];
    for (int i = 0; i < P; i++) prefetch_group(args[i]->panel, g + P * groups);
    for (int i = 0; i < P; i++)
      for (int r = 0; r < MR; r++) {
        start_group(args[i]->panel, g, d.sums + g * MR + r, acc[i][r][0], acc[i][r][1]);
        high[i][r][0] = high[i][r][1] = zero;
      }
    const int64_t rows = smaller(d.group_quads, d.quads - q) / 2;
    for (int64_t row = 0; row < rows; row += 4) {
      for (int i = 0; i < P; i++) {
        if (P > 1)
          prefetch_beside<P>(w[i], ((d.quads - q) / 2 - row) * kNibbleRow, int4_panel_bytes(d.quads / 16));
        else
          prefetch_nibbles(w[i]);
      }
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++, a += 8 * MR)
#pragma GCC unroll 3
        for (int i = 0; i < P; i++) {
          const __m512i v0 = _mm512_loadu_si512(w[i]), v1 = _mm512_loadu_si512(w[i] + 64);
          const __m512i l0 = _mm512_and_si512(v0, low), l1 = _mm512_and_si512(v1, low);
          const __m512i h0 = _mm512_and_si512(_mm512_srli_epi16(v0, 4), low);
          const __m512i h1 = _mm512_and_si512(_mm512_srli_epi16(v1, 4), low);
          w[i] += kNibbleRow;
#pragma GCC unroll 4
          for (int r = 0; r < MR; r++) {
            const __m512i x = _mm512_set1_epi32(quad(a + r * 4)), y = _mm512_set1_epi32(quad(a + (MR + r) * 4));
            acc[i][r][0] = _mm512_dpbusd_epi32(acc[i][r][0], l0, x);
            acc[i][r][1] = _mm512_dpbusd_epi32(acc[i][r][1], l1, x);
            high[i][r][0] = _mm512_dpbusd_epi32(high[i][r][0], h0, y);
            high[i][r][1] = _mm512_dpbusd_epi32(high[i][r][1], h1, y);
          }
        }
    }
    for (int i = 0; i < P; i++) {
      if constexpr (kSteps) {
        __m512i m[2];
        avx512::load_multiples(args[i]->panel, g, m);
        for (int r = 0; r < MR; r++)
          for (int j = 0; j < 2; j++) {
            const __m512i sum = _mm512_add_epi32(acc[i][r][j], high[i][r][j]);
            total[i][r][j] = _mm512_add_epi32(total[i][r][j], _mm512_mullo_epi32(sum, m[j]));
          }
      } else {
        __m512 s[2];
        avx512::load_scales16(args[i]->panel, g, s[0], s[1]);
        for (int r = 0; r < MR; r++)
          for (int j = 0; j < 2; j++) {
            const __m512i sum = _mm512_add_epi32(acc[i][r][j], high[i][r][j]);
            c[i][r][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s[j], c[i][r][j]);
          }
      }
    }
  }
  for (int i = 0; i < P; i++)
    for (int r = 0; r < MR; r++)
      for (int j = 0; j < 2; j++) {
        if constexpr (kSteps)
          _mm512_storeu_si512(args[i]->acc + r * kPanelN + j * 16, total[i][r][j]);
        else
          _mm512_storeu_ps(args[i]->c + r * kPanelN + j * 16, c[i][r][j]);
      }
}

template <int MR, bool kSteps>
void int4_fused(const Int4Args& d) {
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* w = d.panel.weight;
  const int8_t* a = d.a;
  void* out = kSteps ? static_cast<void*>(d.acc) : d.c;
  std::memset(out, 0, MR * kPanelN * 4);
  for (int64_t q = 0, g = 0; q < d.quads; q += d.group_quads, g++) {
    __m512i acc[MR][2];
#pragma GCC unroll 14
    for (int r = 0; r < MR; r++) start_group(d.panel, g, d.sums + g * MR + r, acc[r][0], acc[r][1]);
    const int64_t rows = smaller(d.group_quads, d.quads - q) / 2;
    for (int64_t i = 0; i < rows; i += 4) {
      prefetch_nibbles(w);
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++, w += kNibbleRow, a += 8 * MR) {
        const __m512i l0 = _mm512_and_si512(_mm512_loadu_si512(w), low);
        const __m512i l1 = _mm512_and_si512(_mm512_loadu_si512(w + 64), low);
#pragma GCC unroll 14
        for (int r = 0; r < MR; r++) PYOPS_DOT2_UNSIGNED_B(acc[r][0], acc[r][1], a + r * 4, l0, l1);
        const __m512i h0 = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(w), 4), low);
        const __m512i h1 = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(w + 64), 4), low);
#pragma GCC unroll 14
        for (int r = 0; r < MR; r++) PYOPS_DOT2_UNSIGNED_B(acc[r][0], acc[r][1], a + (MR + r) * 4, h0, h1);
      }
    }
    if constexpr (kSteps) {
      __m512i m[2];
      avx512::load_multiples(d.panel, g, m);
#pragma GCC unroll 14
      for (int r = 0; r < MR; r++) PYOPS_ADD_MULTIPLES(acc[r][0], acc[r][1], d.acc + r * kPanelN, m[0], m[1]);
      continue;
    }
    __m512 s0, s1;
    avx512::load_scales16(d.panel, g, s0, s1);
#pragma GCC unroll 14
    for (int r = 0; r < MR; r++) PYOPS_SCALE_SUMS(acc[r][0], acc[r][1], d.c + r * kPanelN, s0, s1);
  }
}

template <int MR>
void int4_unpacked(const Int4Args& d) {
  const int8_t* w = d.w;
  const int8_t* a = d.a;
  const char* ahead = static_cast<const char*>(d.ahead);
  for (int64_t q = 0, g = 0; q < d.quads; q += d.group_quads, g++) {
    __m512i acc[MR][2];
#pragma GCC unroll 14
    for (int r = 0; r < MR; r++) acc[r][0] = acc[r][1] = _mm512_set1_epi32(d.sums[g * MR + r] * kVnniOffset);
    const int64_t quads = smaller(d.group_quads, d.quads - q);
    for (int64_t i = 0; i < quads; i += 8) {
      if (i % 16 == 0)
        for (int line = 0; line < d.ahead_lines; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 8
      for (int u = 0; u < 8; u++, w += kPanelRow, a += 4 * MR) {
        const __m512i b0 = _mm512_loadu_si512(w), b1 = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 14
        for (int r = 0; r < MR; r++) PYOPS_DOT2_UNSIGNED_B(acc[r][0], acc[r][1], a + r * 4, b0, b1);
      }
    }
    const __m512 s0 = _mm512_loadu_ps(d.scale + g * kPanelN), s1 = _mm512_loadu_ps(d.scale + g * kPanelN + 16);
#pragma GCC unroll 14
    for (int r = 0; r < MR; r++) PYOPS_SCALE_SUMS(acc[r][0], acc[r][1], d.c + r * kPanelN, s0, s1);
  }
}

}  // namespace avx512vnni
PYOPS_TARGET_END

#endif
}  // namespace pyops
