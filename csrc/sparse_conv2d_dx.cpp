// dx[n, c, p] = Σ over kept (o, r, s) with p + padding = q · stride + (r, s) · dilation of W[o, c, r, s] · grad[n, o,
// q]
//                                                                                     (pyops/ops/sparse_conv2d.py)
// One sparse convolution of grad, with stride 1. Which taps reach a pixel of dx depends on its phase, p modulo the
// stride: each channel of dx in each phase is a row of a weight whose input channels are those of grad, and whose
// window holds the places that any phase reads. What it computes is dealt out to the pixels on the way to memory.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "sparse_conv2d_call.h"

namespace pyops::sparse {
namespace {

// Of one direction: pixel phase + stride · k of dx reads, through tap t, pixel k + at[t] of grad.
struct Taps {
  std::vector<int32_t> phase, at;
  int32_t first = 0, step = 1, count = 1;  // the places are first + step · [0, count)

  Taps(int64_t taps, int64_t stride, int64_t dilation, int64_t padding) {
    for (int64_t t = 0; t < taps; t++) {
      const int64_t p = ((t * dilation - padding) % stride + stride) % stride;
      phase.push_back(static_cast<int32_t>(p));
      at.push_back(static_cast<int32_t>((p + padding - t * dilation) / stride));
    }
    first = *std::min_element(at.begin(), at.end());
    int32_t common = 0;
    for (const int32_t a : at) common = std::gcd(common, a - first);
    step = std::max(common, 1);
    count = (*std::max_element(at.begin(), at.end()) - first) / step + 1;
  }
  int32_t place(int64_t t) const { return (at[t] - first) / step; }
};

// The weight of that convolution. Its blocks are the given ones transposed, bc × bo.
struct Transposed {
  Taps rows, cols;
  Phases phases;
  Weight weight;
  std::vector<int32_t> crow, col, block_at;

  Transposed(const Weight& w, const Ints& padding, bool channels_last)
      : rows(w.conv.R, w.conv.sh, w.conv.dh, padding[0]), cols(w.conv.S, w.conv.sw, w.conv.dw, padding[2]) {
    const Conv& c = w.conv;
    phases = {c.sh, c.sw, (c.channels() + w.bc - 1) / w.bc, w.bc, c.channels()};
    const bool one = c.sh == 1 && c.sw == 1, outside = channels_last || one;
    const int64_t O = one ? c.C : c.groups * phases.rows();
    STD_TORCH_CHECK(rows.count <= kMaxTaps && cols.count <= kMaxTaps && O < (1 << 24), "sparse_conv2d: a stride of ",
                    c.sh, " x ", c.sw, " and a dilation of ", c.dh, " x ", c.dw, " are too much");
    weight = {{static_cast<int32_t>(O), c.O, rows.count, cols.count, c.groups, 1, 1, rows.step, cols.step},
              w.bc,
              w.bo,
              nullptr,
              nullptr,
              w.values,
              w.dtype};
    if (!one) {
      const auto below = [](int64_t v, int32_t stride) { return static_cast<int32_t>((v % stride + stride) % stride); };
      weight.kind = {outside ? 2 : 1, c.sh, c.sw, below(padding[0], c.sh), below(padding[2], c.sw)};
      if (!outside) weight.together = phases.sw * phases.bc;
    } else {
      weight.kind = {1, 1, 1, 0, 0};
    }
  }

  // Sorts the blocks by counting. Those of a row of w that come to the same row are reached from the last to the
  // first: later taps read earlier pixels.
  void sort(const Weight& w, int64_t stored) {
    const Conv& c = w.conv;
    const int64_t RS = int64_t(c.R) * c.S, n_cols = phases.blocks * RS, in_group = w.block_rows() / c.groups;
    const bool outside = weight.kind.order == 2;
    std::vector<int32_t> row_of(n_cols), place_of(n_cols);  // of each column of w, within a group
    for (int64_t i = 0; i < n_cols; i++) {
      const int64_t cb = i / RS, r = i % RS / c.S, s = i % c.S, py = rows.phase[r], px = cols.phase[s];
      row_of[i] = static_cast<int32_t>(outside ? (py * c.sw + px) * phases.blocks + cb : (cb * c.sh + py) * c.sw + px);
      place_of[i] = rows.place(r) * cols.count + cols.place(s);
    }
    const int64_t rows_in_group = phases.blocks * c.sh * c.sw, taps = int64_t(rows.count) * cols.count;
    crow.assign(c.groups * rows_in_group + 1, 0), col.resize(stored), block_at.resize(stored);
    int32_t* const next = crow.data() + 1;
    for (int64_t b = 0; b < w.block_rows(); b++)
      for (int64_t k = w.crow[b]; k < w.crow[b + 1]; k++) next[b / in_group * rows_in_group + row_of[w.col[k]]]++;
    for (size_t i = 1; i < crow.size(); i++) crow[i] += crow[i - 1];
    for (size_t i = crow.size() - 1; i > 0; i--) crow[i] = crow[i - 1];  // next[row]: where the row begins, then ends
    for (int64_t b = 0; b < w.block_rows(); b++)
      for (int64_t k = w.crow[b + 1] - 1; k >= w.crow[b]; k--) {
        const int32_t at = next[b / in_group * rows_in_group + row_of[w.col[k]]]++;
        col[at] = static_cast<int32_t>(b % in_group * taps + place_of[w.col[k]]);
        block_at[at] = static_cast<int32_t>(k);
      }
    weight.crow = crow.data(), weight.col = col.data(), weight.block_at = block_at.data();
  }
};

// The convolution of grad, for dx [N, C, H, W].
struct Call {
  OutputSize grad;  // first: it checks x_shape and padding
  Transposed transposed;
  Problem p{};
  Target target;

  Call(const Weight& w, const Ints& x_shape, const Ints& padding, bool channels_last)
      : grad(output_size(w.conv, x_shape, padding)), transposed(w, padding, channels_last) {
    p.N = x_shape[0], p.H = grad.OH, p.W = grad.OW;
    p.OH = (x_shape[2] + w.conv.sh - 1) / w.conv.sh, p.OW = (x_shape[3] + w.conv.sw - 1) / w.conv.sw;
    p.top = -transposed.rows.first, p.left = -transposed.cols.first;
    p.channels_last = channels_last;
    p.high = x_shape[2], p.wide = x_shape[3];
    if (w.conv.sh != 1 || w.conv.sw != 1) p.phases = &transposed.phases;
    const bool unpadded = !p.phases && !p.top && !p.left && p.H == p.OH && p.W == p.OW;
    join_pixels(p, w.conv, padding);
    target = {std::max<int64_t>(p.N, 1), p.OH, p.OW, channels_last, unpadded, kernels().lanes};
  }
  Call(const Call&) = delete;
};

Tensor sparse_conv2d_pack_dx_cpu(Tensor values, Tensor crow, Tensor col, Ints shape, Ints block, Ints stride,
                                 Ints padding, Ints dilation, int64_t groups, Ints x_shape, bool channels_last) {
  values = as_contiguous(values), crow = as_contiguous(crow), col = as_contiguous(col);
  const Weight w = weight_of(values, crow, col, shape, block, stride, dilation, groups);
  check_structure(w, values.size(0));
  Call call(w, x_shape, padding, channels_last);
  call.transposed.sort(w, values.size(0));
  return pack(call.transposed.weight, call.target, false);
}

Tensor sparse_conv2d_dx_cpu(Tensor grad, Tensor values, Tensor crow, Tensor col, Ints shape, Ints block, Ints x_shape,
                            Ints stride, Ints padding, Ints dilation, int64_t groups, std::optional<Tensor> packed) {
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 4, "sparse_conv2d_dx: grad must be [N, O, OH, OW], on the CPU");
  const bool last = channels_last(grad);
  if (!last) grad = as_contiguous(grad);
  values = as_contiguous(values), crow = as_contiguous(crow), col = as_contiguous(col);
  const Weight w = weight_of(values, crow, col, shape, block, stride, dilation, groups);
  Call call(w, x_shape, padding, last);
  Problem& p = call.p;
  const OutputSize out = call.grad;
  STD_TORCH_CHECK(
      grad.size(0) == x_shape[0] && grad.size(1) == w.conv.O && grad.size(2) == out.OH && grad.size(3) == out.OW,
      "sparse_conv2d_dx: grad must be [", x_shape[0], ", ", w.conv.O, ", ", out.OH, ", ", out.OW,
      "], the shape of the output");
  const int64_t sizes[4] = {x_shape[0], x_shape[1], x_shape[2], x_shape[3]};
  Tensor dx = empty_image(sizes, grad.scalar_type(), last);
  if (!dx.numel()) return dx;
  const Weight& t = call.transposed.weight;
  const Packed* blob = nullptr;
  const auto usable = [&](const Tensor& given) {
    blob = static_cast<const Packed*>(given.const_data_ptr());
    STD_TORCH_CHECK(given.is_contiguous() && given.numel() >= int64_t(sizeof(Packed)) && sealed(*blob) &&
                        blob->bytes == given.numel() && blob->stored == values.numel() && blob->kind.order,
                    "sparse_conv2d_dx: packed is not the packed form of this weight's gradient");
    return !std::memcmp(&blob->conv, &t.conv, sizeof(Conv)) && !std::memcmp(&blob->kind, &t.kind, sizeof(Kind)) &&
           blob->lanes == call.target.lanes && flat_fits(blob->tiling, call.target);
  };
  Tensor own;
  if (!packed || !usable(*packed)) {
    check_structure(w, values.size(0));
    call.transposed.sort(w, values.size(0));
    own = pack(t, call.target, true);
    usable(own);
  }
  p.w = blob;
  p.values = blob->sources_at ? fetch_values(w, *blob) : blob->values();
  p.x = grad.const_data_ptr();
  p.y = dx.mutable_data_ptr();
  p.activation = Activation::none;
  p.bias.assign(t.conv.O, 0.0f);
  run(p, grad.scalar_type());
  return dx;
}

}  // namespace
}  // namespace pyops::sparse

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("sparse_conv2d_dx_native", TORCH_BOX(&pyops::sparse::sparse_conv2d_dx_cpu));
  m.impl("sparse_conv2d_pack_dx", TORCH_BOX(&pyops::sparse::sparse_conv2d_pack_dx_cpu));
}
