// A canonical int8 weight as panels, for a call that was not given a packed one.
#pragma once

#include <cstring>

#include "row_tiles.h"

namespace pyops {

// `rows` rows of a canonical weight [N, K] → a panel, as pack_int8 lays it out.
inline void pack_panel(const int8_t* w, int rows, int64_t K, int8_t* panel) {
  std::memset(panel, 0, panel_bytes((K + 63) / 64));
  for (int n = 0; n < rows; n++, w += K) {
    int8_t* out = panel + kPanelRow + n * 4;
    int32_t sum = 0;
    for (int64_t k = 0; k < K; k++) {
      out[k / 4 * kPanelRow + k % 4] = w[k];
      sum += w[k];
    }
    const uint32_t compensation = -128u * static_cast<uint32_t>(sum);  // wraps, as VNNI's sums do
    std::memcpy(panel + n * 4, &compensation, 4);
  }
}

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX512
inline void pack_panel_avx512(const int8_t* w, int rows, int64_t K, int8_t* panel) {
  const __m512i ones8 = _mm512_set1_epi8(1), ones16 = _mm512_set1_epi16(1);
  for (int half = 0; half < 2; half++, panel += 64) {
    int8_t* out = panel + kPanelRow;
    __m512i sums = _mm512_setzero_si512();  // lane n: Σ_k w[n, k]
    for (int64_t k = 0; k < K; k += 64) {
      const __mmask64 wanted = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
      __m512i r[16];
      for (int i = 0; i < 16; i++) {
        const int n = half * 16 + i;
        r[i] = n < rows ? _mm512_maskz_loadu_epi8(wanted, w + n * K + k) : _mm512_setzero_si512();
      }
      transpose16(r);
      for (int i = 0; i < 16; i++, out += kPanelRow) {
        sums = _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(ones8, r[i]), ones16));
        _mm512_storeu_si512(out, r[i]);
      }
    }
    _mm512_storeu_si512(panel, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sums), 7));
  }
}
PYOPS_TARGET_END
#endif

}  // namespace pyops
