// int8 dot products of a few rows with one packed panel of 32 columns: acc[r][n] = Σ_k a[r][k] · b[n][k], exact in
// int32.
//
// The panel is that of pack_int8 (pyops/ops/int8_linear.py): 128-byte rows, row 0 = 32 int32 of compensation, row 1 + j
// = k 4j … 4j+3 as [32 n][4 k]. The rows come in the layout their kernel wants:
//   quads   [K/4][rows][4]      one broadcast feeds a row; a power-of-two row stride cannot alias in L1
//   tiles   [K/64][rows][64]    what AMX loads, rows padded to 16 or 32
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "vec.h"

namespace pyops {

constexpr int kPanelN = 32;
constexpr int kPanelRow = 128;              // bytes of a panel's row
constexpr int kPanelStep = 16 * kPanelRow;  // bytes for 64 k
constexpr int kDotMaxRows = 32;

inline int64_t panels_of(int64_t n) { return (n + kPanelN - 1) / kPanelN; }
inline int64_t panel_bytes(int64_t k64) { return kPanelRow + k64 * kPanelStep; }

// Work of another kind that an AMX kernel does between its steps: the vector units are idle while tiles multiply.
// `some(self, n)` does n pieces, or what is left; `pieces` is all there is.
struct Background {
  void (*some)(void* self, int n) = nullptr;
  void* self = nullptr;
  int pieces = 0;
};

// The k range [64·begin, 64·end) of a tile. acc [rows][32] is overwritten by the range that begins at 0, else added to;
// only AMX cuts the range, the others begin where `a` and `panel` point. `ahead`: null for the panel's own stream, else
// where the next panel is, of which `ahead_lines` cache lines are fetched into L2 for each 64 k.
struct DotArgs {
  const int8_t* a;  // the tile's rows, from k = 0
  const int8_t* panel;
  int64_t begin, end;
  int32_t* acc;
  const int8_t* ahead;
  int ahead_lines;
  Background background{};
  const DotArgs* others = nullptr;  // of the panels that a kernel reads beside this one: their panel and acc
};
using DotFn = void (*)(const DotArgs&);

PYOPS_INLINE int32_t quad(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

namespace generic {

template <int MR, int Q = 16>
void int8_dot(const DotArgs& d) {
  int32_t acc[MR][kPanelN] = {};
  const int8_t* a = d.a;
  const int8_t* b = d.panel + kPanelRow;
  for (int64_t k = 0; k < d.end * Q; k++, a += MR * 4, b += kPanelRow)
    for (int r = 0; r < MR; r++)
      for (int n = 0; n < kPanelN; n++)
        for (int i = 0; i < 4; i++) acc[r][n] += int32_t(a[r * 4 + i]) * b[n * 4 + i];
  std::memcpy(d.acc, acc, sizeof acc);
}

}  // namespace generic

#if defined(__x86_64__)

// For a kernel that meets panels one after the other, at every `step` bytes. The hardware fetches the stream, but stops
// at the end of each 4 KiB page: the first lines of the next page restart it. (Fetching every line of one stream by
// software is slower: the requests compete with the loads for the same 16 line buffers.)
PYOPS_INLINE void prefetch_stream(const int8_t* b, uintptr_t step = kPanelStep) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t at = reinterpret_cast<uintptr_t>(b);
  if (at % kPage >= step) return;
  const char* next = reinterpret_cast<const char*>(at / kPage * kPage + kPage);
  for (int i = 0; i < 4; i++) _mm_prefetch(next + i * 64, _MM_HINT_T1);
}

// For a kernel that reads several panels side by side, at every 512 bytes of each: memory answers several streams
// faster than one, and fastest if every line is asked for well before its load, which then finds it in L2. What follows
// the last `left` bytes of one of P panels, of `bytes` each, lies behind the others.
template <int P = 1>
PYOPS_INLINE void prefetch_beside(const void* b, int64_t left = 0, int64_t bytes = 0) {
  constexpr int64_t kAhead = 2048;
  const char* next = static_cast<const char*>(b) + kAhead + (P > 1 && left <= kAhead ? (P - 1) * bytes : 0);
  for (int i = 0; i < 8; i++) _mm_prefetch(next + i * 64, _MM_HINT_T1);
}

PYOPS_INLINE void prefetch_ahead(const DotArgs& d, int64_t step, const int8_t* b) {
  if (d.ahead) {
    const char* p = reinterpret_cast<const char*>(d.ahead) + step * d.ahead_lines * 64;
    for (int i = 0; i < d.ahead_lines; i++) _mm_prefetch(p + i * 64, _MM_HINT_T1);
  } else {
    prefetch_stream(b);
  }
}

PYOPS_TARGET_BEGIN_AVX2
namespace avx2 {

// vpmaddubsw saturates at 2¹⁵ for unsigned · signed bytes. |b| · (a with b's sign) is the same product with both
// factors at most 128 and 127, and 2 · 128 · 127 < 2¹⁵: exact.
template <int MR, int Q = 16>
void int8_dot(const DotArgs& d) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[MR][4];
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < 4; j++) acc[r][j] = _mm256_setzero_si256();
  const int8_t* a = d.a;
  const int8_t* b = d.panel + kPanelRow;
  for (int64_t step = 0; step < d.end; step++) {
    prefetch_ahead(d, step, b);
    for (int k = 0; k < Q; k++, a += MR * 4, b += kPanelRow) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + j * 32));
        const __m256i magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 3
        for (int r = 0; r < MR; r++) {
          const __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(quad(a + r * 4)), w);
          acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones));
        }
      }
    }
  }
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < 4; j++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(d.acc + r * kPanelN + j * 8), acc[r][j]);
}

}  // namespace avx2
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
namespace avx512 {

// The products of avx2::int8_dot, the sign applied through a mask.
template <int MR, int Q = 16>
void int8_dot(const DotArgs& d) {
  const __m512i ones = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
  __m512i acc[MR][2];
  for (int r = 0; r < MR; r++) acc[r][0] = acc[r][1] = zero;
  const int8_t* a = d.a;
  const int8_t* b = d.panel + kPanelRow;
  for (int64_t step = 0; step < d.end; step++) {
    prefetch_ahead(d, step, b);
    for (int k = 0; k < Q; k++, a += MR * 4, b += kPanelRow) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const __m512i w = _mm512_loadu_si512(b + j * 64);
        const __m512i magnitude = _mm512_abs_epi8(w);
        const __mmask64 negative = _mm512_movepi8_mask(w);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
          const __m512i v = _mm512_set1_epi32(quad(a + r * 4));
          const __m512i x = _mm512_mask_sub_epi8(v, negative, zero, v);
          acc[r][j] = _mm512_add_epi32(acc[r][j], _mm512_madd_epi16(_mm512_maddubs_epi16(magnitude, x), ones));
        }
      }
    }
  }
  for (int r = 0; r < MR; r++)
    for (int j = 0; j < 2; j++) _mm512_storeu_si512(d.acc + r * kPanelN + j * 16, acc[r][j]);
}

}  // namespace avx512
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_VNNI
namespace avx512vnni {

// One broadcast, two dot-product steps. Written in assembly because GCC hoists the broadcasts of an unrolled tile out
// of order and then spills the accumulators (a third of the speed); zmm31 is the broadcast.
#define PYOPS_DOT2(acc0, acc1, a, b0, b1)                                                             \
  __asm__ volatile("vpbroadcastd %4, %%zmm31\n\tvpdpbusd %2, %%zmm31, %0\n\tvpdpbusd %3, %%zmm31, %1" \
                   : "+v"(acc0), "+v"(acc1)                                                           \
                   : "v"(b0), "v"(b1), "m"(*reinterpret_cast<const int32_t*>(a))                      \
                   : "xmm31")

// vpdpbusd multiplies unsigned a by signed b: a holds q + 128, and the accumulators start at -128·Σ b, the panel's row
// 0.
template <int MR>
void int8_dot(const DotArgs& d) {
  __m512i acc[MR][2];
  const __m512i start0 = _mm512_loadu_si512(d.panel), start1 = _mm512_loadu_si512(d.panel + 64);
#pragma GCC unroll 14
  for (int r = 0; r < MR; r++) {
    acc[r][0] = start0;
    acc[r][1] = start1;
  }
  const int8_t* a = d.a;
  const int8_t* b = d.panel + kPanelRow;
  for (int64_t step = 0; step < d.end; step++) {
    prefetch_ahead(d, step, b);
    for (int k = 0; k < 16; k += 4, a += 4 * MR * 4, b += 4 * kPanelRow) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const __m512i b0 = _mm512_loadu_si512(b + u * kPanelRow), b1 = _mm512_loadu_si512(b + u * kPanelRow + 64);
#pragma GCC unroll 14
        for (int r = 0; r < MR; r++) PYOPS_DOT2(acc[r][0], acc[r][1], a + (u * MR + r) * 4, b0, b1);
      }
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < MR; r++) {
    _mm512_storeu_si512(d.acc + r * kPanelN, acc[r][0]);
    _mm512_storeu_si512(d.acc + r * kPanelN + 16, acc[r][1]);
  }
}

// One row: eight accumulators hide the latency of vpdpbusd, so that only the stream of b is left.
template <>
inline void int8_dot<1>(const DotArgs& d) {
  __m512i acc[4][2] = {};
  acc[0][0] = _mm512_loadu_si512(d.panel);
  acc[0][1] = _mm512_loadu_si512(d.panel + 64);
  const int8_t* a = d.a;
  const int8_t* b = d.panel + kPanelRow;
  for (int64_t step = 0; step < d.end; step++) {
    prefetch_stream(b);
    for (int k = 0; k < 16; k += 4, a += 16, b += 4 * kPanelRow) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++) {
        const __m512i v = _mm512_set1_epi32(quad(a + u * 4));
        const int8_t* w = b + u * kPanelRow;
        acc[u][0] = _mm512_dpbusd_epi32(acc[u][0], v, _mm512_loadu_si512(w));
        acc[u][1] = _mm512_dpbusd_epi32(acc[u][1], v, _mm512_loadu_si512(w + 64));
      }
    }
  }
  for (int j = 0; j < 2; j++) {
    const __m512i s = _mm512_add_epi32(_mm512_add_epi32(acc[0][j], acc[1][j]), _mm512_add_epi32(acc[2][j], acc[3][j]));
    _mm512_storeu_si512(d.acc + j * 16, s);
  }
}

// A few rows and P panels side by side.
template <int MR, int P>
void int8_dot_beside(const DotArgs& d) {
  constexpr int kChains = MR == 1 ? 2 : 1;
  __m512i acc[kChains][P][MR][2];
  const int8_t* b[P];
  int32_t* out[P];
  for (int i = 0; i < P; i++) {
    const DotArgs& own = i ? d.others[i - 1] : d;
    b[i] = own.panel + kPanelRow;
    out[i] = own.acc;
    for (int r = 0; r < MR; r++)
      for (int j = 0; j < 2; j++) {
        acc[0][i][r][j] = _mm512_loadu_si512(own.panel + j * 64);
        if (kChains > 1) acc[kChains - 1][i][r][j] = _mm512_setzero_si512();
      }
  }
  const int8_t* a = d.a;
  for (int64_t k = 0; k < d.end * 16; k += 4, a += 4 * MR * 4) {
    for (int i = 0; i < P; i++) prefetch_beside<P>(b[i], (d.end * 16 - k) * kPanelRow, panel_bytes(d.end));
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++)
#pragma GCC unroll 3
      for (int i = 0; i < P; i++) {
        const __m512i b0 = _mm512_loadu_si512(b[i]), b1 = _mm512_loadu_si512(b[i] + 64);
        b[i] += kPanelRow;
#pragma GCC unroll 4
        for (int r = 0; r < MR; r++) {
          __m512i* sums = acc[u % kChains][i][r];
          PYOPS_DOT2(sums[0], sums[1], a + (u * MR + r) * 4, b0, b1);
        }
      }
  }
  for (int i = 0; i < P; i++)
    for (int r = 0; r < MR; r++)
      for (int j = 0; j < 2; j++) {
        __m512i sum = acc[0][i][r][j];
        if (kChains > 1) sum = _mm512_add_epi32(sum, acc[kChains - 1][i][r][j]);
        _mm512_storeu_si512(out[i] + r * kPanelN + j * 16, sum);
      }
}

}  // namespace avx512vnni
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AMX
namespace amx {

// Tiles 0–3 are 16 rows of 64 bytes, or as many as there are: a product takes a cycle for each. 4–5 hold rows, of `k`
// bytes, 6–7 the panel, k/4 rows. In static memory: the compiler does not know that ldtilecfg reads all of it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16];
  uint8_t rows[16];
  constexpr TileShapes() : TileShapes(64) {}
  // `first` in tiles 0, 1 and 4, `second` in 2, 3 and 5
  explicit constexpr TileShapes(uint8_t k, uint8_t first = 16, uint8_t second = 16)
      : row_bytes{64, 64, 64, 64, k, k, 64, 64},
        rows{first, first, second, second, first, second, uint8_t(k / 4), uint8_t(k / 4)} {}
};
inline constexpr TileShapes kTileShapes, kHalfTileShapes(32);

// Those of a lone tile of that many rows; up to 16 of them may meet two panels.
inline const TileShapes& shapes_of_rows(int64_t rows) {
  static constexpr auto kShapes = [] {
    std::array<TileShapes, kDotMaxRows> shapes{};
    for (int n = 1; n <= kDotMaxRows; n++) shapes[n - 1] = TileShapes(64, n < 16 ? n : 16, n <= 16 ? n : n - 16);
    return shapes;
  }();
  return kShapes[rows - 1];
}

// Holds the configuration while it lives, on its thread.
class TileConfig {
 public:
  explicit TileConfig(const TileShapes& shapes) { _tile_loadconfig(&shapes); }
  ~TileConfig() { _tile_release(); }
  TileConfig(const TileConfig&) = delete;
  TileConfig& operator=(const TileConfig&) = delete;
};

inline void configure(const TileShapes& shapes) { _tile_loadconfig(&shapes); }

// Between a tile's load and the stores, before or after it, to what it reads: the compiler does not know that
// _tile_loadd reads memory.
PYOPS_INLINE void order_tile_loads() { asm volatile("" ::: "memory"); }

// Runs `work` with the tiles configured. Not inlined: the caller need not be compiled for AMX.
template <class F>
__attribute__((noinline)) void with_tiles(F&& work, const TileShapes& shapes = kTileShapes) {
  TileConfig config(shapes);
  work();
}

// 16·MT rows x 32 columns: tiles 0–3 accumulate, 4–5 hold rows, 6–7 the panel. Signed · signed needs no compensation.
// Rows come from L2 with the streaming hint, so that the range of the panel, which all row tiles meet in turn, stays in
// L1.
template <int MT>
void int8_dot(const DotArgs& d) {
  constexpr int kRows = 16 * MT;
  constexpr int kAccRow = kPanelN * 4;
  const int8_t* a = d.a + d.begin * kRows * 64;
  const int8_t* b = d.panel + kPanelRow + d.begin * kPanelStep;
  if (d.begin == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, d.acc, kAccRow);
    _tile_loadd(1, d.acc + 16, kAccRow);
    if constexpr (MT == 2) {
      _tile_loadd(2, d.acc + 16 * kPanelN, kAccRow);
      _tile_loadd(3, d.acc + 16 * kPanelN + 16, kAccRow);
    }
  }
  const int steps = static_cast<int>(d.end - d.begin);
  const int pieces = steps && d.background.pieces ? (d.background.pieces + steps - 1) / steps : 0;
  for (int step = 0; step < steps; step++, a += kRows * 64, b += kPanelStep) {
    prefetch_ahead(d, step, b);
    if (pieces) d.background.some(d.background.self, pieces);
    _tile_loadd(6, b, kPanelRow);
    _tile_stream_loadd(4, a, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + 64, kPanelRow);
    _tile_dpbssd(1, 4, 7);
    if constexpr (MT == 2) {
      _tile_stream_loadd(5, a + 16 * 64, 64);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  _tile_stored(0, d.acc, kAccRow);
  _tile_stored(1, d.acc + 16, kAccRow);
  if constexpr (MT == 2) {
    _tile_stored(2, d.acc + 16 * kPanelN, kAccRow);
    _tile_stored(3, d.acc + 16 * kPanelN + 16, kAccRow);
  }
}

// Up to 16 rows and two panels side by side, all of K.
inline void int8_dot_beside(const DotArgs& d) {
  constexpr int kAccRow = kPanelN * 4;
  const DotArgs& other = *d.others;
  const int8_t *a = d.a, *b = d.panel + kPanelRow, *c = other.panel + kPanelRow;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto prefetch = [&](const int8_t* panel, int64_t k) PYOPS_LAMBDA {
    for (int i = 0; i < kPanelStep; i += 512)
      prefetch_beside<2>(panel + i, (d.end - k) * kPanelStep - i, panel_bytes(d.end));
  };
  for (int64_t k = 0; k < d.end; k++, a += 16 * 64, b += kPanelStep, c += kPanelStep) {
    prefetch(b, k);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, kPanelRow);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, b + 64, kPanelRow);
    _tile_dpbssd(1, 4, 7);
    prefetch(c, k);
    _tile_loadd(6, c, kPanelRow);
    _tile_dpbssd(2, 4, 6);
    _tile_loadd(7, c + 64, kPanelRow);
    _tile_dpbssd(3, 4, 7);
  }
  _tile_stored(0, d.acc, kAccRow);
  _tile_stored(1, d.acc + 16, kAccRow);
  _tile_stored(2, other.acc, kAccRow);
  _tile_stored(3, other.acc + 16, kAccRow);
}

}  // namespace amx
PYOPS_TARGET_END

#endif
}  // namespace pyops
