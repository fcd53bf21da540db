// The arguments of int4_linear, and a canonical weight as panels for a call that was not given a packed one.
#pragma once

#include <algorithm>
#include <cstring>

#include "epilogue.h"
#include "int4_steps.h"
#include "linear_args.h"
#include "tensor.h"

namespace pyops {

inline bool is_group_size(int64_t size) { return size == -1 || size == 32 || (size > 0 && size % 64 == 0); }
inline int64_t k64_of(int64_t K) { return (K + 63) / 64; }
// Groups of a packed weight, whose K is padded to 64: how long one is in quads, and how many there are.
inline int64_t group_quads_of(int64_t group_size, int64_t K) {
  const int64_t quads = k64_of(K) * 16;
  return std::max<int64_t>(group_size == -1 ? quads : std::min(group_size / 4, quads), 8);
}
inline int64_t padded_groups_of(int64_t group_quads, int64_t K) {
  return (k64_of(K) * 16 + group_quads - 1) / group_quads;
}

struct Int4Problem : LinearProblem {
  int64_t group_quads;  // of the padded K
  const uint8_t* weight;
  bool packed;
  const void* scale;
  ScalarType scale_type;
  const uint8_t* zero;
  int64_t groups;        // columns of the canonical scales
  const int32_t* order;  // or null

  int64_t k64() const { return k64_of(K); }
  int64_t padded_groups() const { return padded_groups_of(group_quads, K); }
};

// int4_float.cpp: with x as it is.
void int4_linear_float(const Int4Problem& p);

// The panel whose first row `row` is, with the scales and zero points of `rest`.
inline Int4Panel panel_of_rows(const uint8_t* row, const Int4Panel& rest) {
  const float* step = reinterpret_cast<const float*>(row);
  return {row + kNibbleRow, rest.scale, rest.scale_type, rest.zero, *step > 0 ? step : nullptr};
}

// The columns of a canonical weight from n0 on → a panel as pack_int4 lays it out: weight [k64·8][128], scale and zero
// [padded_groups][32]. Its steps are written before the weight.
inline void pack_int4_panel(const Int4Problem& p, int64_t n0, const Int4Panel& out) {
  const int64_t rows = smaller(kPanelN, p.N - n0), groups = p.padded_groups(), bytes = (p.K + 1) / 2,
                element = p.scale_type == ScalarType::Float ? 4 : 2;
  uint8_t *w = const_cast<uint8_t*>(out.weight), *zero = const_cast<uint8_t*>(out.zero);
  char* scale = static_cast<char*>(const_cast<void*>(out.scale));
  std::memset(w, 0, p.k64() * 8 * kNibbleRow);
  std::memset(scale, 0, groups * kPanelN * element);
  if (zero) std::memset(zero, 0, groups * kPanelN);
  for (int n = 0; n < rows; n++) {
    const uint8_t* q = p.weight + (n0 + n) * bytes;
    for (int64_t k = 0; k < p.K; k++) {
      const uint8_t value = k % 2 ? q[k / 2] >> 4 : q[k / 2] & 15;
      w[k / 8 * kNibbleRow + n * 4 + k % 4] |= static_cast<uint8_t>(k % 8 < 4 ? value : value << 4);
    }
    for (int64_t g = 0; g < p.groups; g++) {
      const int64_t from = (n0 + n) * p.groups + g, to = g * kPanelN + n;
      std::memcpy(scale + to * element, static_cast<const char*>(p.scale) + from * element, element);
      if (zero) zero[to] = p.zero[from];
    }
  }
  float steps[kPanelN];
  bool all = p.K <= kMostSteppedK;
  for (int n = 0; n < kPanelN && all; n++) all = (steps[n] = find_step(out, groups, n)) > 0;
  if (!all) std::memset(steps, 0, sizeof steps);
  std::memcpy(w - kNibbleRow, steps, sizeof steps);
}

// Panel i of packed panels one after the other, of which `all` is the first; its weight begins with its steps.
inline Int4Panel nth_panel(const Int4Panel& all, int64_t i, int64_t k64, int64_t padded_groups) {
  return panel_of_rows(all.weight + i * int4_panel_bytes(k64), panel_from(all, i * padded_groups, 0));
}
inline Int4Panel nth_panel(const Int4Panel& all, int64_t i, const Int4Problem& p) {
  return nth_panel(all, i, p.k64(), p.padded_groups());
}

}  // namespace pyops
