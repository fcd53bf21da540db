// y[n, o, p] = act(bias[o] + Σ over kept (c, r, s) of W[o, c, r, s] · x[n, c, p + (r, s)] + residual[n, o, p])
//                                                                                     (pyops/ops/sparse_conv2d.py)
// In waves of lane groups: their panels are packed (sparse_conv2d.h), then each (lane group, group of rows, tile) is
// computed block of input channels after block, so that a block's panel stays in L1, and its accumulators go out
// through the epilogue. Both phases are cut evenly over the threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "scratch.h"
#include "sparse_conv2d_call.h"
#include "sparse_conv2d_panels.h"

namespace pyops::sparse {
namespace {

// From images of X, floats or quads, to images of T.
template <class T, class X = T>
class SparseConv {
 public:
  explicit SparseConv(const Problem& problem)
      : p(problem),
        w(*problem.w),
        t(w.tiling),
        L(w.lanes),
        k(kernels()),
        conv(w.conv),
        typed(&type_kernels<T>(k)),
        panels({static_cast<const X*>(p.x), p.N, conv.C, p.H, p.W, p.channels_last}, {p.OH, p.OW, p.top, p.left}, conv,
               t, w.live_channels(), w.live),
        window(panels.window),
        channel_floats(panels.channel_floats),
        panel_floats(panels.panel_floats),
        groups(panels.groups) {
    tiles_across = t.mw / t.nc;
    tiles = int64_t(t.mh / t.nr) * tiles_across;
    positions = t.nr * t.nc;
    segment_fn = (p.int8 ? int8_kernels().segments : k.segments)(w.rows_at_once, t.nr, t.nc);
    if (p.int8) std::memcpy(&panels.pad, &int8_kernels().zero, 4);
    for (int64_t g = 0; g < w.row_groups; g++) {
      bias_at.push_back(bias_rows.size());
      bias_rows.resize(bias_rows.size() + w.groups()[g].rows, 0.0f);
      if (p.int8) scale_rows.resize(bias_rows.size()), shift_rows.resize(bias_rows.size());
      for (int32_t o = w.groups()[g].o0; o < w.groups()[g].o1; o++) {
        const size_t at = bias_at[g] + w.row_of()[o];
        bias_rows[at] = p.bias[o];
        if (p.int8) scale_rows[at] = p.int8->s_w[o], shift_rows[at] = p.int8->bias[o];
      }
      max_rows = std::max<int64_t>(max_rows, w.groups()[g].rows);
    }
    taps = (w.values_at - w.taps_at) / 2;
  }

  void run() {
    const int64_t threads = torch::stable::get_num_threads(), bytes = panel_floats * sizeof(float);
    const int64_t tasks = w.row_groups * tiles;
    const double packing = panels.pack_cycles(), task = row_group_cycles();
    const bool whole = groups % threads == 0 || groups >= 8 * threads;
    if (!whole && packing > 0.25 * task * static_cast<double>(tasks * groups) / static_cast<double>(threads))
      return together(bytes);
    // A thread packs a panel and uses it while it is in its cache. Of the group that two share each packs its own.
    const int64_t unit = whole ? tasks : 1;
    in_parallel(groups * tasks / unit, whole ? packing + task * static_cast<double>(tasks) : task,
                [&](int64_t begin, int64_t end) {
                  thread_local Scratch scratch;
                  float* panel = reinterpret_cast<float*>(scratch.get(bytes));
                  for (int64_t i = begin * unit; i < end * unit;) {
                    const int64_t group = i / tasks, stop = std::min(end * unit, (group + 1) * tasks);
                    for (int64_t part = 0; part < panels.parts; part++) panels.pack(group, part, panel);
                    compute(group, i - group * tasks, stop - group * tasks, panel);
                    i = stop;
                  }
                });
  }

 private:
  static constexpr int kMaxLanes = Panels<X>::kMaxLanes;
  static constexpr int kMaxPositions = 32;
  static constexpr int64_t kRowsAhead =
      6;                                 // that are fetched before they are written, where a row has lines in each lane
  static constexpr int64_t kAhead = 32;  // rows that are fetched before they are written

  double row_group_cycles() const { return double(taps) / w.row_groups * positions + double(max_rows) * positions * 5; }

  // Too little work for each panel: all threads share in packing some of them, then in computing them.
  void together(int64_t bytes) {
    const int64_t threads = torch::stable::get_num_threads();
    thread_local Scratch scratch;
    const int64_t wave = std::min(groups, std::max<int64_t>(1, kPanelsBytes / std::max<int64_t>(bytes, 1)) * threads);
    float* wave_panels = reinterpret_cast<float*>(scratch.get(wave * bytes));
    for (int64_t first = 0; first < groups; first += wave) {
      const int64_t n = std::min(wave, groups - first), tasks = w.row_groups * tiles;
      const int64_t parts = panels.parts;
      in_parallel(n * parts, panels.pack_cycles() / std::max<int64_t>(parts, 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
          panels.pack(first + i / parts, i % parts, wave_panels + i / parts * panel_floats);
      });
      in_parallel(n * tasks, row_group_cycles(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end;) {
          const int64_t group = i / tasks, stop = std::min(end, (group + 1) * tasks);
          compute(first + group, i - group * tasks, stop - group * tasks, wave_panels + group * panel_floats);
          i = stop;
        }
      });
    }
  }

  // -------------------------------------------------------------------------------------------------- computing

  // Tasks [begin, end) of a lane group's (group of rows, tile) pairs.
  void compute(int64_t group, int64_t begin, int64_t end, const float* panel) {
    thread_local Scratch scratch;
    float* acc = reinterpret_cast<float*>(scratch.get(max_rows * positions * L * sizeof(float)));
    float s_x[kMaxPositions * kMaxLanes];
    if (p.int8) scales_of(group, s_x);
    for (int64_t task = begin; task < end; task++) {
      const int64_t row_group = task / tiles, tile = task % tiles;
      const int64_t i0 = tile / tiles_across * t.nr, j0 = tile % tiles_across * t.nc;
      const char* from = reinterpret_cast<const char*>(panel + (i0 * window.HC + j0) * L);
      for (int64_t b = 0; b < w.blocks; b++) {
        const Block& block = *w.block(row_group, b);
        if (!block.segments) continue;
        segment_fn({from + b * w.channels_in_block * channel_floats * sizeof(float),
                    static_cast<ptrdiff_t>(window.HC * L * sizeof(float)), w.segments() + block.segment, block.segments,
                    w.taps() + block.tap, p.values + block.value, acc, bias_rows.data() + bias_at[row_group]});
      }
      const RowGroup& rows = w.groups()[row_group];
      if (p.int8 && p.channels_last)
        dequantize(row_group, 0, rows.rows, s_x, acc);
      else if (!p.int8 && p.activation != Activation::none && !p.residual)
        k.activate(acc, rows.rows * positions, p.activation);
      if (t.flat)
        store_flat(group, row_group, s_x, acc);
      else if (p.phases)
        store_phases(group, rows, i0, j0, acc);
      else
        store_tile(group, row_group, i0, j0, s_x, acc);
    }
  }

  // The scale of each lane's image; of `flat`, of each position's.
  void scales_of(int64_t group, float* s_x) const {
    const std::vector<float>& scales = p.int8->s_x;
    if (t.flat) {
      const int64_t area = p.OH * p.OW, first = group * t.nc * L, n = t.nc * L;
      for (int64_t i = 0, image = first / area; i < n; image++) {
        const int64_t end = std::min((image + 1) * area - first, n);
        std::fill(s_x + i, s_x + end, scales[std::min(image, p.N - 1)]);
        i = end;
      }
    } else {
      const auto lanes = panels.lanes_of(group);
      for (int l = 0; l < L; l++) s_x[l] = scales[std::max<int64_t>(lanes.n[l], 0)];
    }
  }

  // Rows [begin, begin + n) of int32 accumulators to floats, up to the activation unless a residual comes before it.
  void dequantize(int64_t row_group, int64_t begin, int64_t n, const float* s_x, float* acc) const {
    const size_t at = bias_at[row_group] + begin;
    int8_kernels().dequantize({acc + begin * positions * L, n, positions, scale_rows.data() + at,
                               shift_rows.data() + at, s_x, t.flat ? L : 0,
                               p.residual ? Activation::none : p.activation});
  }

  void store_flat(int64_t group, int64_t row_group, const float* s_x, float* acc) {
    const RowGroup& rows = w.groups()[row_group];
    const int64_t area = p.OH * p.OW, all = p.N * area, first = group * t.nc * L;
    for (int32_t o = rows.o0; o < rows.o1; o++) {
      const float* from = acc + w.row_of()[o] * positions * L;
      if (p.int8) dequantize(row_group, w.row_of()[o], 1, s_x, acc);
      if (o + kAhead < rows.o1) fetch_lines(y() + (first / area * conv.O + o + kAhead) * area + first % area, t.nc * L);
      for (int64_t pixel = first, end = std::min(all, first + t.nc * L); pixel < end;) {
        const int64_t n = std::min(end, (pixel / area + 1) * area) - pixel;
        const int64_t at = (pixel / area * conv.O + o) * area + pixel % area;
        typed->copy_out(from + (pixel - first), n, y() + at, residual() ? residual() + at : nullptr, p.activation);
        pixel += n;
      }
    }
  }

  void store_tile(int64_t group, int64_t row_group, int64_t i0, int64_t j0, const float* s_x, float* acc) {
    const RowGroup& rows = w.groups()[row_group];
    const typename Panels<X>::Lanes lanes = panels.lanes_of(group);
    int64_t lane[kMaxLanes];
    int32_t counts[kMaxLanes];
    if (!p.channels_last) {
      for (int64_t r = 0; r < t.nr; r++) {
        for (int l = 0; l < L; l++) {
          const int64_t y = lanes.y[l] + i0 + r, x = lanes.x[l] + j0;
          counts[l] = lanes.n[l] < 0 || y >= p.OH ? 0 : static_cast<int32_t>(std::clamp<int64_t>(p.OW - x, 0, t.nc));
          lane[l] = (lanes.n[l] * conv.O * p.OH + y) * p.OW + x;
        }
        for (int32_t o = rows.o0; o < rows.o1; o++) {
          const int64_t at = o * p.OH * p.OW;
          if (o + kRowsAhead < rows.o1)
            for (int l = 0; l < L; l++)
              if (counts[l]) __builtin_prefetch(y() + at + kRowsAhead * p.OH * p.OW + lane[l], 1);
          if (p.int8 && r == 0) dequantize(row_group, w.row_of()[o], 1, s_x, acc);
          typed->scatter({acc + (w.row_of()[o] * positions + r * t.nc) * L, L, t.nc, y() + at,
                          residual() ? residual() + at : nullptr, lane, counts, p.activation});
        }
      }
      return;
    }
    for (int32_t o = rows.o0; o < rows.o1;) {  // runs of channels whose accumulators follow each other
      int32_t n = 1;
      while (o + n < rows.o1 && w.row_of()[o + n] == w.row_of()[o] + n) n++;
      for (int64_t q = 0; q < positions; q++) {
        for (int l = 0; l < L; l++) {
          const int64_t y = lanes.y[l] + i0 + q / t.nc, x = lanes.x[l] + j0 + q % t.nc;
          counts[l] = lanes.n[l] < 0 || y >= p.OH || x >= p.OW ? 0 : n;
          lane[l] = ((lanes.n[l] * p.OH + y) * p.OW + x) * conv.O;
        }
        typed->scatter({acc + (w.row_of()[o] * positions + q) * L, positions * L, n, y() + o,
                        residual() ? residual() + o : nullptr, lane, counts, p.activation});
      }
      o += n;
    }
  }

  void store_phases(int64_t group, const RowGroup& rows, int64_t i0, int64_t j0, const float* acc) {
    const Phases& f = *p.phases;
    const typename Panels<X>::Lanes lanes = panels.lanes_of(group);
    const int64_t C = conv.groups * f.channels, unit = f.sw * f.bc;
    if (p.channels_last) {
      for (int64_t o = rows.o0; o < rows.o1;) {  // runs of channels in one phase
        const int64_t c = o % (f.blocks * f.bc), phase = o / (f.blocks * f.bc) % (f.sh * f.sw);
        const int64_t n = std::min<int64_t>(rows.o1 - o, f.blocks * f.bc - c);
        const int64_t wanted = std::min(n, f.channels - c);
        for (int64_t q = 0; q < positions && wanted > 0; q++) {
          int64_t lane[kMaxLanes];
          int32_t counts[kMaxLanes];
          for (int l = 0; l < L; l++) {
            const int64_t y = (lanes.y[l] + i0 + q / t.nc) * f.sh + phase / f.sw;
            const int64_t x = (lanes.x[l] + j0 + q % t.nc) * f.sw + phase % f.sw;
            counts[l] = lanes.n[l] < 0 || y >= p.high || x >= p.wide ? 0 : static_cast<int32_t>(wanted);
            lane[l] = ((lanes.n[l] * p.high + y) * p.wide + x) * C;
          }
          typed->scatter({acc + (w.row_of()[o] * positions + q) * L, positions * L, static_cast<int>(wanted),
                          y() + o / f.rows() * f.channels + c, nullptr, lane, counts, Activation::none});
        }
        o += n;
      }
      return;
    }
    std::vector<int64_t> lane(L * f.sh * t.nr);
    std::vector<int32_t> counts(lane.size());
    for (int64_t i = 0; i < static_cast<int64_t>(lane.size()); i++) {
      const int64_t l = i % L, y = (lanes.y[l] + i0 + i / L % t.nr) * f.sh + i / L / t.nr;
      const int64_t x = (lanes.x[l] + j0) * f.sw;
      lane[i] = (lanes.n[l] * C * p.high + y) * p.wide + x;
      const bool none = lanes.n[l] < 0 || y >= p.high;
      counts[i] = none ? 0 : static_cast<int32_t>(std::clamp<int64_t>(p.wide - x, 0, t.nc * f.sw));
    }
    thread_local Scratch scratch;
    float* row = reinterpret_cast<float*>(scratch.get(t.nc * f.sw * L * sizeof(float)));
    for (int64_t o = rows.o0; o < rows.o1; o += unit) {
      const int64_t py = o / unit % f.sh, cb = o / unit / f.sh % f.blocks, channel = o / f.rows() * f.channels;
      for (int64_t c = cb * f.bc; c < std::min((cb + 1) * f.bc, f.channels); c++)
        for (int64_t r = 0; r < t.nr; r++) {
          for (int64_t px = 0; px < f.sw; px++) {  // the phases of a row side by side
            const float* from = acc + (w.row_of()[o + px * f.bc + c % f.bc] * positions + r * t.nc) * L;
            for (int64_t q = 0; q < t.nc; q++) std::memcpy(row + (q * f.sw + px) * L, from + q * L, L * sizeof(float));
          }
          const int64_t at = (py * t.nr + r) * L;
          typed->scatter({row, L, static_cast<int>(t.nc * f.sw), y() + (channel + c) * p.high * p.wide, nullptr,
                          lane.data() + at, counts.data() + at, Activation::none});
        }
    }
  }

  const T* residual() const { return static_cast<const T*>(p.residual); }
  T* y() const { return static_cast<T*>(p.y); }

  const Problem& p;
  const Packed& w;
  const Tiling t;
  const int L;
  const Kernels& k;
  const Conv& conv;
  const TypeKernels<T>* typed;
  Panels<X> panels;
  const Window& window;
  const int64_t channel_floats, panel_floats, groups;
  int64_t tiles, tiles_across, positions, max_rows = 1, taps;
  SegmentFn segment_fn;
  std::vector<float> bias_rows, scale_rows, shift_rows;
  std::vector<size_t> bias_at;
};

}  // namespace

void run(const Problem& problem, ScalarType dtype) {
  if (problem.w->tiling.channels)
    run_channels(problem, dtype);
  else if (dtype == ScalarType::Float)
    SparseConv<float>(problem).run();
  else if (dtype == ScalarType::BFloat16)
    problem.int8 ? SparseConv<bf16, float>(problem).run() : SparseConv<bf16>(problem).run();
  else
    STD_TORCH_CHECK(false, "sparse_conv2d: x must be fp32 or bf16");
}

// -------------------------------------------------------------------------------------------------- checked wrappers

Weight weight_of(const Tensor& values, const Tensor& crow, const Tensor& col, const Ints& shape, const Ints& block,
                 const Ints& stride, const Ints& dilation, int64_t groups) {
  STD_TORCH_CHECK(values.is_cpu() && crow.is_cpu() && col.is_cpu(),
                  "sparse_conv2d: values, crow_indices and col_indices must be on the CPU");
  STD_TORCH_CHECK(shape.size() == 4 && block.size() == 2 && stride.size() == 2 && dilation.size() == 2,
                  "sparse_conv2d: weight_shape must have 4 elements, block, stride and dilation 2");
  for (const auto* list : {&block, &stride, &dilation})
    for (const int64_t v : *list)
      STD_TORCH_CHECK(v >= 1 && v < (1 << 20), "sparse_conv2d: block, stride and dilation must be positive, got ", v);
  for (const int64_t v : shape)
    STD_TORCH_CHECK(v >= 0 && v < (1 << 24), "sparse_conv2d: weight_shape holds ", v, ", out of range");
  STD_TORCH_CHECK(groups >= 1 && shape[0] % groups == 0 && shape[1] * groups < (1 << 24),
                  "sparse_conv2d: groups=", groups, " does not divide ", shape[0], " output channels");
  STD_TORCH_CHECK(crow.scalar_type() == ScalarType::Int && col.scalar_type() == ScalarType::Int,
                  "sparse_conv2d: crow_indices and col_indices must be int32");
  const bool int8 = values.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(int8 || values.scalar_type() == ScalarType::Float || values.scalar_type() == ScalarType::BFloat16,
                  "sparse_conv2d: values must be fp32 or bf16, or int8");
  STD_TORCH_CHECK(!int8 || (block[0] == 1 && block[1] == 4), "sparse_conv2d: int8 values must be in blocks of 1 x 4");
  STD_TORCH_CHECK(values.dim() == 3 && values.size(1) == block[0] && values.size(2) == block[1],
                  "sparse_conv2d: values must be [blocks, ", block[0], ", ", block[1], "]");
  const auto i32 = [](int64_t v) { return static_cast<int32_t>(v); };
  Weight w{{i32(shape[0]), i32((int8 ? (shape[1] + 3) / 4 : shape[1]) * groups), i32(shape[2]), i32(shape[3]),
            i32(groups), i32(stride[0]), i32(stride[1]), i32(dilation[0]), i32(dilation[1])},
           block[0],
           int8 ? 1 : block[1],
           static_cast<const int32_t*>(crow.const_data_ptr()),
           static_cast<const int32_t*>(col.const_data_ptr()),
           values.const_data_ptr(),
           values.scalar_type()};
  STD_TORCH_CHECK(w.conv.R >= 1 && w.conv.R <= kMaxTaps && w.conv.S >= 1 && w.conv.S <= kMaxTaps,
                  "sparse_conv2d: a kernel of ", w.conv.R, " x ", w.conv.S, " is not supported; up to ", kMaxTaps);
  STD_TORCH_CHECK(int64_t(w.conv.C) * w.conv.R * w.conv.S < INT32_MAX, "sparse_conv2d: weight_shape is too large");
  STD_TORCH_CHECK(crow.dim() == 1 && crow.numel() == w.block_rows() + 1, "sparse_conv2d: crow_indices must have ",
                  w.block_rows() + 1, " elements, got ", crow.numel());
  STD_TORCH_CHECK(col.dim() == 1 && col.numel() == values.size(0), "sparse_conv2d: col_indices must have ",
                  values.size(0), " elements, one for each block");
  return w;
}

bool channels_last(const Tensor& x) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const auto stride_is = [&](int64_t d, int64_t s) { return x.size(d) == 1 || x.stride(d) == s; };
  return !x.is_contiguous() && stride_is(1, 1) && stride_is(3, C) && stride_is(2, C * W) && stride_is(0, C * W * H);
}

Tensor empty_image(const int64_t (&s)[4], ScalarType dtype, bool last) {
  if (!last) return empty_cpu(s, 4, dtype);
  const int64_t strides[4] = {s[1] * s[2] * s[3], 1, s[3] * s[1], s[1]};
  AtenTensorHandle handle;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, s, strides, type, aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}

OutputSize output_size(const Conv& c, const Ints& x_shape, const Ints& padding) {
  STD_TORCH_CHECK(x_shape.size() == 4 && padding.size() == 4,
                  "sparse_conv2d: x must be [N, C, H, W] and padding have 4 elements");
  for (const int64_t v : padding)
    STD_TORCH_CHECK(v > -(1 << 24) && v < (1 << 24), "sparse_conv2d: padding holds ", v, ", out of range");
  STD_TORCH_CHECK(x_shape[1] == c.C, "sparse_conv2d: x has ", x_shape[1], " channels, the weight ", c.C);
  const int64_t high = x_shape[2] + padding[0] + padding[1] - int64_t(c.R - 1) * c.dh;
  const int64_t wide = x_shape[3] + padding[2] + padding[3] - int64_t(c.S - 1) * c.dw;
  STD_TORCH_CHECK(high >= 1 && wide >= 1, "sparse_conv2d: the kernel is larger than the padded input");
  return {(high - 1) / c.sh + 1, (wide - 1) / c.sw + 1};
}

void join_pixels(Problem& p, const Conv& c, const Ints& padding) {
  const bool unpadded = std::all_of(padding.begin(), padding.end(), [](int64_t v) { return v == 0; });
  if (!p.channels_last || !unpadded || c.R != 1 || c.S != 1 || c.sh != 1 || c.sw != 1 || !p.N) return;
  p.W = p.OW = p.N * p.H * p.W;
  p.N = p.H = p.OH = 1;
}

Problem sizes_of(const Conv& c, const Ints& x_shape, const Ints& padding) {
  const OutputSize out = output_size(c, x_shape, padding);
  Problem p{};
  p.N = x_shape[0], p.H = x_shape[2], p.W = x_shape[3], p.top = padding[0], p.left = padding[2];
  p.OH = out.OH, p.OW = out.OW;
  return p;
}

Target target_of(const Problem& p, const Ints& padding, bool channels_last) {
  const auto at_least_one = [](int64_t v) { return std::max<int64_t>(v, 1); };
  const bool unpadded = std::all_of(padding.begin(), padding.end(), [](int64_t v) { return v == 0; });
  return {at_least_one(p.N), p.OH, p.OW, channels_last, unpadded, kernels().lanes};
}

const float* fetch_values(const Weight& w, const Packed& packed) {
  thread_local Scratch scratch;
  const int64_t n = packed.stored ? packed.value_count() : 0;
  float* out = reinterpret_cast<float*>(scratch.get(n * sizeof(float)));
  const int32_t* sources = packed.sources();
  in_parallel(n, 3, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) out[i] = w.value(sources[i]);
  });
  return out;
}

namespace {

// Of an int8 weight, x's shape in quads of channels.
Ints seen(const Weight& w, const Ints& shape, int64_t groups, Ints x_shape) {
  if (!w.int8()) return x_shape;
  STD_TORCH_CHECK(x_shape.size() == 4 && x_shape[1] == shape[1] * groups, "int8_sparse_conv2d: x must have ",
                  shape[1] * groups, " channels");
  x_shape[1] = w.conv.C;
  return x_shape;
}

Tensor sparse_conv2d_pack_cpu(Tensor values, Tensor crow, Tensor col, Ints shape, Ints block, Ints stride, Ints padding,
                              Ints dilation, int64_t groups, Ints x_shape, bool channels_last, bool with_values,
                              Ints tiling) {
  values = as_contiguous(values), crow = as_contiguous(crow), col = as_contiguous(col);
  const Weight w = weight_of(values, crow, col, shape, block, stride, dilation, groups);
  check_structure(w, values.size(0));
  Problem p = sizes_of(w.conv, seen(w, shape, groups, x_shape), padding);
  p.channels_last = channels_last;
  if (!w.int8()) join_pixels(p, w.conv, padding);
  return pack(w, target_of(p, padding, channels_last), with_values, tiling);
}

}  // namespace

Tensor sparse_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Ints shape, Ints block,
                     std::optional<Tensor> bias, std::optional<Tensor> residual, Ints stride, Ints padding,
                     Ints dilation, int64_t groups, Activation activation, std::optional<Tensor> packed,
                     const Int8Call* int8) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "sparse_conv2d: x must be [N, C, H, W], on the CPU");
  const bool last = channels_last(x);
  if (!last) x = as_contiguous(x);
  values = as_contiguous(values), crow = as_contiguous(crow), col = as_contiguous(col);
  const Weight w = weight_of(values, crow, col, shape, block, stride, dilation, groups);
  STD_TORCH_CHECK(w.int8() == (int8 != nullptr), "sparse_conv2d: int8 values go with int8_sparse_conv2d");
  const Conv& c = w.conv;
  Problem p = sizes_of(c, seen(w, shape, groups, {x.size(0), x.size(1), x.size(2), x.size(3)}), padding);
  p.channels_last = last;
  const int64_t sizes[4] = {p.N, c.O, p.OH, p.OW};
  Tensor y = empty_image(sizes, x.scalar_type(), p.channels_last);
  if (!p.N || !c.O || !p.OH || !p.OW) return y;
  if (!int8) join_pixels(p, c, padding);
  const Target target = target_of(p, padding, last);
  const Packed* blob = nullptr;
  const auto usable = [&](const Tensor& t) {
    blob = static_cast<const Packed*>(t.const_data_ptr());
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() >= int64_t(sizeof(Packed)) && sealed(*blob) &&
                        blob->bytes == t.numel() && blob->stored == values.size(0) * w.bo * w.bc &&
                        !blob->starts_at == !int8 && !blob->kind.order && !std::memcmp(&blob->conv, &c, sizeof(Conv)),
                    "sparse_conv2d: packed is not the packed form of this weight");
    return blob->lanes == target.lanes && flat_fits(blob->tiling, target);
  };
  Tensor own;
  if (!packed || !usable(*packed)) {
    check_structure(w, values.size(0));
    own = pack(w, target, true);
    usable(own);
  }
  p.w = blob;
  p.values = blob->values();
  if (blob->sources_at) p.values = fetch_values(w, *blob);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.activation = activation;
  p.set_bias(c.O, nullptr, true);
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == c.O, "sparse_conv2d: bias has ", bias->numel(), " elements, expected ", c.O);
    bias = as_contiguous(*bias);
    const bool wide = bias->scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(wide || bias->scalar_type() == ScalarType::BFloat16, "sparse_conv2d: bias must be fp32 or bf16");
    p.set_bias(c.O, bias->const_data_ptr(), wide);
  }
  if (residual) {
    STD_TORCH_CHECK(residual->dim() == 4 && residual->scalar_type() == x.scalar_type(),
                    "sparse_conv2d: residual must have the shape of the result and x's dtype");
    for (int64_t d = 0; d < 4; d++)
      STD_TORCH_CHECK(residual->size(d) == sizes[d], "sparse_conv2d: residual must have the shape of the result");
    if (channels_last(*residual) != p.channels_last || (!p.channels_last && !residual->is_contiguous())) {
      Tensor same = empty_image(sizes, x.scalar_type(), p.channels_last);
      torch::stable::copy_(same, *residual);
      residual = same;
    }
    p.residual = residual->const_data_ptr();
  }
  Dequantization dequantization;
  if (int8) quantize(*int8, x, groups, p, dequantization);
  run(p, x.scalar_type());
  return y;
}

namespace {

Tensor sparse_conv2d_cpu(Tensor x, Tensor values, Tensor crow, Tensor col, Ints shape, Ints block,
                         std::optional<Tensor> bias, std::optional<Tensor> residual, Ints stride, Ints padding,
                         Ints dilation, int64_t groups, Activation activation, std::optional<Tensor> packed) {
  return sparse_conv2d(x, values, crow, col, shape, block, bias, residual, stride, padding, dilation, groups,
                       activation, packed, nullptr);
}

}  // namespace
}  // namespace pyops::sparse

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("sparse_conv2d_native", TORCH_BOX(&pyops::sparse::sparse_conv2d_cpu));
  m.impl("sparse_conv2d_pack", TORCH_BOX(&pyops::sparse::sparse_conv2d_pack_cpu));
}
