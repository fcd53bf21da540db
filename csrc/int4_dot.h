// Group-wise int4 dot products: c[r][n] += Σ_g s[g][n] · Σ_{k ∈ g} a[r][k] · (q[n][k] - z[g][n]), the inner sums exact
// in int32, the outer one over g in order, one fp32 rounding a term.
//
// A packed panel is that of pack_int4 (pyops/ops/int4_weight.py): 128-byte rows of 8 k · 32 n, the k 0–3 of a channel
// in the low nibbles of its 4 bytes, 4–7 in the high ones; scales and zero points [groups][32]. A group begins and ends
// with a row; the last of a panel may be shorter. Kernels of two kinds:
//   fused     read the nibbles and unpack them in registers: for a tile that is alone with its panel. AMX, of panels
//             with steps, unpacks them into L1 beside its products: for any tile
//   unpacked  read what unpack_int4 made of a range of the panel, for tiles that share it: bytes [K/4][32][4], q - z
//             (+ 16 for VNNI, whose weights are unsigned), and the scales in fp32
// Those of VNNI and AMX are int4_vnni.h's and int4_amx.h's.
#pragma once

#include "int8_dot.h"
#include "tensor.h"

namespace pyops {

constexpr int kNibbleRow = 128;  // bytes: 8 k of 32 columns
// A packed panel: a row of steps, and those of the nibbles.
inline int64_t int4_panel_bytes(int64_t k64) { return (1 + k64 * 8) * kNibbleRow; }

constexpr int kVnniOffset = 16;  // makes q - z, at least -16, unsigned
constexpr int kMiddle = 8;       // the zero point where there are none

// A range of a packed panel.
struct Int4Panel {
  const uint8_t* weight;  // [quads / 2][128]
  const void* scale;      // [groups][32]
  ScalarType scale_type;
  const uint8_t* zero;  // [groups][32], or null
  const float* step;    // [32], of which the scales are whole multiples, see int4_steps.h; or null
};

// Sums of one or two groups of a tile, in memory, that are not yet scaled and added to c.
struct Unscaled {
  const int32_t* acc = nullptr;  // [groups][32][32]
  const float* scale = nullptr;  // [groups][32]
  float* c = nullptr;            // [rows][32]
  int groups = 0;
  bool first = false;  // overwrite c
  int next = 0, rows = 0;
  // Rows of c that are complete, if these are the last groups of K; or null.
  void (*done)(const void* self, int begin, int end) = nullptr;
  const void* self = nullptr;
};

struct Int4Args {
  Int4Panel panel;      // what a fused kernel reads
  const int8_t* w;      // what the others read: [quads][32][4]
  const float* scale;   // [groups][32]
  const int8_t* a;      // the tile's rows, from the range's first k on
  const int32_t* sums;  // VNNI: [groups][rows] of -Σ_{k ∈ g} a
  int64_t quads;        // of the range: K / 4
  int64_t group_quads;
  float* c;      // [rows][32]
  int32_t* acc;  // where tiles pass through memory: [32][32], for AMX [2][2][32][32]; with steps the result
  // AMX: what the call before left, and this one leaves; `first` and `done` of this call's.
  Unscaled* unscaled;
  bool first;
  void (*done)(const void* self, int begin, int end);
  const void* self;
  const void* ahead;  // VNNI: what to fetch into L2, `ahead_lines` cache lines for each 16 quads
  int ahead_lines;
  bool cached;             // AMX with steps: the tile before has brought the panel into L2
  const Int4Args* others;  // of the panels that a kernel reads beside this one's: their panel, c and acc
};
using Int4Fn = void (*)(const Int4Args&);
using ScaleFn = void (*)(const int32_t* acc, const float* scale, int rows, float* c);
// `quads` of a panel → w [quads][32][4], each q - z + offset, and its scales [groups][32].
using UnpackInt4Fn = void (*)(const Int4Panel& panel, int64_t quads, int64_t group_quads, int offset, int8_t* w,
                              float* scale);

PYOPS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline const void* scale_at(const Int4Panel& p, int64_t group) {
  const int bytes = p.scale_type == ScalarType::Float ? 4 : 2;
  return static_cast<const char*>(p.scale) + group * kPanelN * bytes;
}

// Asks for what a group has beside its nibbles. Too little for the hardware to notice a stream.
PYOPS_INLINE void prefetch_group(const Int4Panel& p, int64_t group) {
#if defined(__x86_64__)
  const char* scale = static_cast<const char*>(scale_at(p, group));
  _mm_prefetch(scale, _MM_HINT_T1);
  if (p.scale_type == ScalarType::Float) _mm_prefetch(scale + 64, _MM_HINT_T1);
  if (p.zero) _mm_prefetch(reinterpret_cast<const char*>(p.zero + group * kPanelN), _MM_HINT_T1);
#endif
}

// The part of a panel from group `group` on.
inline Int4Panel panel_from(const Int4Panel& p, int64_t group, int64_t group_quads) {
  return {p.weight + group * group_quads / 2 * kNibbleRow, scale_at(p, group), p.scale_type,
          p.zero ? p.zero + group * kPanelN : nullptr, p.step};
}

// Element i of a panel's scales [groups][32].
PYOPS_INLINE float scale_of(const Int4Panel& p, int64_t i) {
  if (p.scale_type == ScalarType::BFloat16) return static_cast<const bf16*>(p.scale)[i];
  if (p.scale_type == ScalarType::Half) return static_cast<const fp16*>(p.scale)[i];
  return static_cast<const float*>(p.scale)[i];
}

inline void unpack_int4(const Int4Panel& p, int64_t quads, int64_t group_quads, int offset, int8_t* w, float* scale) {
  const uint8_t* nibbles = p.weight;
  for (int64_t g = 0; g * group_quads < quads; g++) {
    for (int64_t i = g * kPanelN; i < (g + 1) * kPanelN; i++) scale[i] = scale_of(p, i);
    int8_t shift[kNibbleRow];
    for (int i = 0; i < kNibbleRow; i++)
      shift[i] = static_cast<int8_t>(offset - (p.zero ? p.zero[g * kPanelN + i / 4] : kMiddle));
    const int64_t rows = smaller(group_quads, quads - g * group_quads) / 2;
    for (int64_t r = 0; r < rows; r++, nibbles += kNibbleRow, w += 2 * kPanelRow)
      for (int i = 0; i < kNibbleRow; i++) {
        w[i] = static_cast<int8_t>((nibbles[i] & 15) + shift[i]);
        w[kPanelRow + i] = static_cast<int8_t>((nibbles[i] >> 4) + shift[i]);
      }
  }
}

// Rows by quads over the int8 kernels, one group at a time: for instruction sets whose int8 products are signed.
template <int MR, DotFn kDot64, DotFn kDot32, ScaleFn kScale>
void int4_by_groups(const Int4Args& d) {
  for (int64_t q = 0, g = 0; q < d.quads; q += d.group_quads, g++) {
    const int64_t quads = smaller(d.group_quads, d.quads - q);
    const bool whole = quads % 16 == 0;
    DotArgs dot{
        d.a + q * MR * 4, d.w + q * kPanelRow - kPanelRow, 0, whole ? quads / 16 : quads / 8, d.acc, nullptr, 0};
    (whole ? kDot64 : kDot32)(dot);
    kScale(d.acc, d.scale + g * kPanelN, MR, d.c);
  }
}

}  // namespace pyops

#define PYOPS_ISA_FILE "int4_dot.inc"
#include "for_each_isa.h"

namespace pyops {
#if defined(__x86_64__)

PYOPS_TARGET_BEGIN_AVX512
namespace avx512 {

PYOPS_INLINE void load_scales16(const Int4Panel& p, int64_t group, __m512& s0, __m512& s1) {
  const void* at = scale_at(p, group);
  if (p.scale_type == ScalarType::BFloat16) {
    const __m512i both = _mm512_loadu_si512(at);
    s0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
    s1 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
  } else if (p.scale_type == ScalarType::Half) {
    const __m256i* half = static_cast<const __m256i*>(at);
    s0 = _mm512_cvtph_ps(_mm256_loadu_si256(half));
    s1 = _mm512_cvtph_ps(_mm256_loadu_si256(half + 1));
  } else {
    s0 = _mm512_loadu_ps(at);
    s1 = _mm512_loadu_ps(static_cast<const float*>(at) + 16);
  }
}

// The scales of a group as multiples of the panel's steps. Of a multiple up to 15 an inverse of 14 bits is enough.
PYOPS_INLINE void load_multiples(const Int4Panel& p, int64_t group, __m512i* m) {
  __m512 s[2];
  load_scales16(p, group, s[0], s[1]);
  for (int j = 0; j < 2; j++)
    m[j] = _mm512_cvtps_epi32(_mm512_mul_ps(s[j], _mm512_rcp14_ps(_mm512_loadu_ps(p.step + j * 16))));
}

inline void unpack_int4_wide(const Int4Panel& p, int64_t quads, int64_t group_quads, int offset, int8_t* w,
                             float* scale) {
  const __m512i low = _mm512_set1_epi8(15), base = _mm512_set1_epi8(static_cast<char>(offset));
  // Byte 0 of each 32-bit lane four times: a channel's zero point beside each of its four k.
  const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
  const uint8_t* nibbles = p.weight;
  for (int64_t g = 0; g * group_quads < quads; g++) {
    __m512 s0, s1;
    load_scales16(p, g, s0, s1);
    _mm512_storeu_ps(scale + g * kPanelN, s0);
    _mm512_storeu_ps(scale + g * kPanelN + 16, s1);
    __m512i shift0, shift1;
    if (p.zero) {
      const __m128i* zero = reinterpret_cast<const __m128i*>(p.zero + g * kPanelN);
      const __m512i z0 = _mm512_cvtepu8_epi32(_mm_loadu_si128(zero)),
                    z1 = _mm512_cvtepu8_epi32(_mm_loadu_si128(zero + 1));
      shift0 = _mm512_sub_epi8(base, _mm512_shuffle_epi8(z0, spread));
      shift1 = _mm512_sub_epi8(base, _mm512_shuffle_epi8(z1, spread));
    } else {
      shift0 = shift1 = _mm512_set1_epi8(static_cast<char>(offset - kMiddle));
    }
    const int64_t rows = smaller(group_quads, quads - g * group_quads) / 2;
    for (int64_t r = 0; r < rows; r++, nibbles += kNibbleRow, w += 2 * kPanelRow) {
      const __m512i v0 = _mm512_loadu_si512(nibbles), v1 = _mm512_loadu_si512(nibbles + 64);
      const __m512i h0 = _mm512_and_si512(_mm512_srli_epi16(v0, 4), low);
      const __m512i h1 = _mm512_and_si512(_mm512_srli_epi16(v1, 4), low);
      _mm512_storeu_si512(w, _mm512_add_epi8(_mm512_and_si512(v0, low), shift0));
      _mm512_storeu_si512(w + 64, _mm512_add_epi8(_mm512_and_si512(v1, low), shift1));
      _mm512_storeu_si512(w + 128, _mm512_add_epi8(h0, shift0));
      _mm512_storeu_si512(w + 192, _mm512_add_epi8(h1, shift1));
    }
  }
}

}  // namespace avx512
PYOPS_TARGET_END

#endif
}  // namespace pyops
