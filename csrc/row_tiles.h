// How the rows of a quantized matmul are cut and laid out: blocks that fit in L2, of tiles as high as a kernel wants,
// in quads [k64·16][rows][4] or as AMX loads them. And how work is dealt to threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "int8_dot.h"
#include "tensor.h"

namespace pyops {

constexpr int64_t kBlockBytes = 1 << 20;  // quantized rows of a block: half of a 2 MiB L2, the rest is for panels
constexpr int64_t kMaxBlockRows = 512;    // so that a block's accumulators stay in L2 as well
constexpr int64_t kMinWave = 16;          // blocks that are quantized before they are multiplied, or one a thread
// A result of this size is stored past the caches, unless K is so short that storing is all there is to do.
constexpr int64_t kPastCacheBytes = 4 << 20;
constexpr int64_t kPastCacheMinK = 512;
constexpr double kTaskCycles = 30'000;  // less work than this is not worth another thread

// rows x [k64·64] row-major, `stride` bytes apart → quads [k64·16][rows][4], each byte xor `flip`.
inline void pack_quads(const int8_t* rows, int64_t stride, int n, int64_t k64, uint8_t flip, int8_t* out) {
  const int32_t flips = 0x01010101 * flip;
  for (int64_t k = 0; k < k64 * 16; k++)
    for (int r = 0; r < n; r++, out += 4) {
      const int32_t v = quad(rows + r * stride + k * 4) ^ flips;
      std::memcpy(out, &v, 4);
    }
}

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX512
// 16 x 16 transpose of 32-bit elements.
PYOPS_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

inline void pack_quads_avx512(const int8_t* rows, int64_t stride, int n, int64_t k64, uint8_t flip, int8_t* out) {
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  const __mmask16 wanted = static_cast<__mmask16>((1u << n) - 1);
  for (int64_t k = 0; k < k64; k++) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = i < n ? _mm512_loadu_si512(rows + i * stride + k * 64) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < 16; i++, out += n * 4) _mm512_mask_storeu_epi32(out, wanted, _mm512_xor_si512(r[i], flips));
  }
}
PYOPS_TARGET_END
#endif

// Rows are cut into blocks that fit in L2, blocks evenly into tiles of at most Kernels::max_rows.
struct Blocks {
  int64_t M, count, max_tiles;
  int max_rows;

  Blocks(int64_t M, int64_t k64, int max_rows) : M(M), max_rows(max_rows) {
    const int64_t fit = kBlockBytes / std::max<int64_t>(k64 * 64, 1) / kDotMaxRows * kDotMaxRows;
    const int64_t block_rows = std::clamp<int64_t>(fit, kDotMaxRows, kMaxBlockRows);
    count = (M + block_rows - 1) / block_rows;
    max_tiles = ((M + count - 1) / count + max_rows - 1) / max_rows;
  }
  int64_t first_row(int64_t b) const { return count == 1 ? b * M : M * b / count; }
  int64_t tiles(int64_t b) const { return (first_row(b + 1) - first_row(b) + max_rows - 1) / max_rows; }
  // First row of tile t of block b; t may be one past the last.
  int64_t first_row(int64_t b, int64_t t) const {
    const int64_t m0 = first_row(b), n = tiles(b);
    return n == 1 ? m0 + t * (first_row(b + 1) - m0) : m0 + (first_row(b + 1) - m0) * t / n;
  }
};

// Calls work(begin, end) over parts of [0, n), on threads if the whole takes more than kTaskCycles.
template <class F>
void in_parallel(int64_t n, double cycles_each, const F& work) {
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kTaskCycles / cycles_each));
  if (n <= grain)
    work(0, n);
  else
    torch::stable::parallel_for(0, n, grain, work);
}

// `cols` elements at p + n0 as fp32, zeros up to 32.
inline void load_columns(const void* p, ScalarType type, int64_t n0, int cols, float* out) {
  if (p && cols == kPanelN && type == ScalarType::Float) {
    std::memcpy(out, static_cast<const float*>(p) + n0, kPanelN * sizeof(float));
    return;
  }
  std::memset(out, 0, kPanelN * sizeof(float));
  for (int n = 0; p && n < cols; n++) {
    if (type == ScalarType::Float) out[n] = static_cast<const float*>(p)[n0 + n];
    if (type == ScalarType::BFloat16) out[n] = static_cast<const bf16*>(p)[n0 + n];
    if (type == ScalarType::Half) out[n] = static_cast<const fp16*>(p)[n0 + n];
  }
}

}  // namespace pyops
