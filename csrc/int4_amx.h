// int4 dot products with AMX tiles: see int4_dot.h.
#pragma once

#include "int4_dot.h"

namespace pyops {
#if defined(__x86_64__)

PYOPS_TARGET_BEGIN_AMX
namespace amx {

// Up to `count` more rows of sums into c.
template <int G, bool kFirst>
PYOPS_INLINE void scale_some(const Unscaled& u, int begin, int end) {
  __m512 s[G][2];
  for (int g = 0; g < G; g++) {
    s[g][0] = _mm512_loadu_ps(u.scale + g * kPanelN);
    s[g][1] = _mm512_loadu_ps(u.scale + g * kPanelN + 16);
  }
  const int32_t* acc = u.acc + begin * kPanelN;
  float* c = u.c + begin * kPanelN;
  for (int r = begin; r < end; r++, acc += kPanelN, c += kPanelN)
    for (int j = 0; j < 2; j++) {
      __m512 sum = kFirst ? _mm512_setzero_ps() : _mm512_loadu_ps(c + j * 16);
      for (int g = 0; g < G; g++) {
        const __m512i v = _mm512_loadu_si512(acc + g * kDotMaxRows * kPanelN + j * 16);
        sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), s[g][j], sum);
      }
      _mm512_storeu_ps(c + j * 16, sum);
    }
}

inline void scale_rows(Unscaled& u, int count) {
  const int begin = u.next, end = begin + count < u.rows ? begin + count : u.rows;
  if (begin >= end) return;
  if (u.groups == 2)
    u.first ? scale_some<2, true>(u, begin, end) : scale_some<2, false>(u, begin, end);
  else
    u.first ? scale_some<1, true>(u, begin, end) : scale_some<1, false>(u, begin, end);
  u.next = end;
  if (u.done) u.done(u.self, begin, end);
}

inline void finish_rows(Unscaled& u) { scale_rows(u, u.rows); }

constexpr int kAccRow = kPanelN * 4;

// The products of one group of any length, into acc [16·MT][32]. kQuads: 16, or 8 for groups of 32, whose tiles are 32
// bytes wide.
template <int MT, int kQuads>
PYOPS_INLINE void multiply_group(const int8_t* a, int64_t in_chunk, const int8_t* w, int64_t steps, int32_t* acc,
                                 Unscaled& before, int rows_a_step) {
  constexpr int kRows = 16 * MT;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; i++, w += kQuads * kPanelRow) {
    const int8_t* rows = a + (kQuads == 16 ? i * kRows * 64 : in_chunk);
    _tile_loadd(6, w, kPanelRow);
    _tile_stream_loadd(4, rows, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w + 64, kPanelRow);
    _tile_dpbssd(1, 4, 7);
    if constexpr (MT == 2) {
      _tile_stream_loadd(5, rows + 16 * 64, 64);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    scale_rows(before, rows_a_step);
  }
  _tile_stored(0, acc, kAccRow);
  _tile_stored(1, acc + 16, kAccRow);
  if constexpr (MT == 2) {
    _tile_stored(2, acc + 16 * kPanelN, kAccRow);
    _tile_stored(3, acc + 16 * kPanelN + 16, kAccRow);
  }
}

// Two groups of 128, 32 rows, while what is pending, G groups or none, is scaled: each of the four sums of a group is
// finished, and on its way to memory, while the next multiplies. For that, two tiles more are loaded than in the order
// above.
template <int G, bool kFirst>
inline void multiply_two128(const int8_t* a, const int8_t* w, int32_t* acc, Unscaled& before) {
  constexpr int kChunk = 32 * 64;  // bytes of 64 k of the rows, and of the panel
  constexpr int kRows = 4;         // of 32, in each of eight slots
  const Unscaled u = before;
  int row = 0;
  const auto scale = [&]() PYOPS_LAMBDA {
    if constexpr (G > 0) {
      scale_some<G, kFirst>(u, row, row + kRows);
      if (u.done) u.done(u.self, row, row + kRows);
      row += kRows;
    }
  };
  for (int g = 0; g < 2; g++, a += 2 * kChunk, w += 2 * kChunk, acc += kDotMaxRows * kPanelN) {
    _tile_zero(0);
    _tile_loadd(6, w, kPanelRow);
    _tile_stream_loadd(4, a, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, w + kChunk, kPanelRow);
    _tile_stream_loadd(5, a + kChunk, 64);
    _tile_dpbssd(0, 5, 7);
    scale();
    _tile_zero(1);
    _tile_loadd(6, w + 64, kPanelRow);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(7, w + kChunk + 64, kPanelRow);
    _tile_dpbssd(1, 5, 7);
    _tile_stored(0, acc, kAccRow);
    scale();
    _tile_zero(3);
    _tile_stream_loadd(4, a + 16 * 64, 64);
    _tile_dpbssd(3, 4, 6);
    _tile_stream_loadd(5, a + kChunk + 16 * 64, 64);
    _tile_dpbssd(3, 5, 7);
    _tile_stored(1, acc + 16, kAccRow);
    scale();
    _tile_zero(2);
    _tile_loadd(6, w, kPanelRow);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(7, w + kChunk, kPanelRow);
    _tile_dpbssd(2, 5, 7);
    _tile_stored(3, acc + 16 * kPanelN + 16, kAccRow);
    scale();
    _tile_stored(2, acc + 16 * kPanelN, kAccRow);
  }
  before.next = before.rows;
}

inline void multiply_two128(const int8_t* a, const int8_t* w, int32_t* acc, Unscaled& before) {
  if (before.rows != 2 * 16 || before.next) finish_rows(before);
  if (before.next == before.rows)
    multiply_two128<0, true>(a, w, acc, before);
  else if (before.groups == 2)
    before.first ? multiply_two128<2, true>(a, w, acc, before) : multiply_two128<2, false>(a, w, acc, before);
  else
    before.first ? multiply_two128<1, true>(a, w, acc, before) : multiply_two128<1, false>(a, w, acc, before);
}

// Groups two by two: their sums go through memory, and are scaled while the next two multiply.
template <int MT, bool kHalf>
void int4_unpacked(const Int4Args& d) {
  constexpr int kRows = 16 * MT, kQuads = kHalf ? 8 : 16, kTile = kDotMaxRows * kPanelN;
  Unscaled& before = *d.unscaled;
  for (int64_t q = 0, g = 0; q < d.quads;) {
    int32_t* acc = d.acc + (before.acc == d.acc ? 2 * kTile : 0);
    Unscaled next{acc, d.scale + g * kPanelN, d.c, 0, d.first && q == 0, 0, kRows};
    const int64_t batch = smaller(2 * d.group_quads, d.quads - q), steps = (batch + kQuads - 1) / kQuads;
    if (MT == 2 && !kHalf && d.group_quads == 32 && batch == 64) {
      multiply_two128(d.a + q / 16 * (kRows * 64), d.w + q * kPanelRow, acc, before);
      next.groups = 2;
      g += 2;
      q += batch;
    }
    const int rows = static_cast<int>((before.rows - before.next + steps - 1) / steps);
    for (; next.groups < 2 && q < d.quads; next.groups++, g++, acc += kTile) {
      const int64_t quads = smaller(d.group_quads, d.quads - q);
      const int8_t* a = d.a + q / 16 * (kRows * 64);
      const int8_t* w = d.w + q * kPanelRow;
      multiply_group<MT, kQuads>(a, q % 16 * 4, w, quads / kQuads, acc, before, rows);
      q += quads;
    }
    finish_rows(before);
    if (q == d.quads) next.done = d.done, next.self = d.self;
    before = next;
  }
}

}  // namespace amx
PYOPS_TARGET_END

#endif
}  // namespace pyops
