// y[n, o, p] = act(bias[o] + Σ over kept (c, r, s) of W[o, c, r, s] · x[n, c, p + (r, s)] + residual[n, o, p])
//                                                                                     (pyops/ops/sparse_conv2d.py)
// In waves of lane groups: their panels are packed (sparse_conv2d.h), then each (lane group, group of rows, tile) is
// computed block of input channels after block, so that a block's panel stays in L1, and its accumulators go out
// through the epilogue. Both phases are cut evenly over the threads.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "scratch.h"
#include "sparse_conv2d_pack.h"

namespace pyops::sparse {
namespace {

constexpr int64_t kWaveBytes = 3 << 19;  // panels of a wave, for each thread: most of a 2 MiB L2
constexpr double kTaskCycles = 20'000;   // less work than this is not worth another thread

struct Problem {
  const Packed* w;
  const float* values;
  int64_t N, H, W, OH, OW, top, left;
  const void *x, *residual;
  void* y;
  bool channels_last;
  Activation activation;
  std::vector<float> bias;  // [O]
};

template <class F>
void in_parallel(int64_t n, double cycles_each, const F& work) {
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kTaskCycles / std::max(cycles_each, 1.0)));
  if (n <= grain)
    work(0, n);
  else
    torch::stable::parallel_for(0, n, grain, work);
}

template <class T>
class SparseConv {
 public:
  explicit SparseConv(const Problem& problem)
      : p(problem), w(*problem.w), t(w.tiling), L(w.lanes), k(kernels()), conv(w.conv) {
    if constexpr (std::is_same_v<T, float>)
      typed = &k.fp32;
    else
      typed = &k.half;
    window.init(conv, t);
    channel_floats = int64_t(window.HR) * window.HC * L;
    panel_floats = w.live * channel_floats;
    if (t.flat) {
      groups = (p.N * p.OH * p.OW + t.nc * L - 1) / (t.nc * L);
    } else {
      down = (p.OH + t.mh - 1) / t.mh, across = (p.OW + t.mw - 1) / t.mw;
      subtiles = p.N * down * across;
      groups = (subtiles + L - 1) / L;
      rows_at.resize(window.HR), cols_at.resize(window.HC);
      Window::slots(conv.R, conv.sh, conv.dh, t.mh, nullptr, rows_at.data());
      Window::slots(conv.S, conv.sw, conv.dw, t.mw, nullptr, cols_at.data());
    }
    if (p.channels_last) {
      out_at.assign(conv.C, -1);
      for (int64_t i = 0; i < w.live; i++) out_at[w.live_channels()[i]] = i * channel_floats;
    } else {
      out_at.assign((window.cols + 3) / 4 * 4, -1);
      for (int32_t i = 0; i < window.HC && !t.flat; i++) out_at[cols_at[i]] = i * L;
    }
    tiles_across = t.mw / t.nc;
    tiles = int64_t(t.mh / t.nr) * tiles_across;
    positions = t.nr * t.nc;
    segment_fn = k.segments(w.rows_at_once, t.nr, t.nc);
    for (int64_t g = 0; g < w.row_groups; g++) {
      bias_at.push_back(bias_rows.size());
      bias_rows.resize(bias_rows.size() + w.groups()[g].rows, 0.0f);
      for (int32_t o = w.groups()[g].o0; o < w.groups()[g].o1; o++) bias_rows[bias_at[g] + w.row_of()[o]] = p.bias[o];
      max_rows = std::max<int64_t>(max_rows, w.groups()[g].rows);
    }
    taps = (w.values_at - w.taps_at) / 2;
    parts = p.channels_last ? window.HR : (w.live + kChannelsPacked - 1) / kChannelsPacked;
  }

  void run() {
    const int64_t threads = torch::stable::get_num_threads(), bytes = panel_floats * sizeof(float);
    const double work = pack_cycles() + row_group_cycles() * w.row_groups * tiles;
    if (groups % threads == 0 || groups >= 8 * threads)
      // A thread packs a panel and uses it while it is in its cache.
      in_parallel(groups, work, [&](int64_t begin, int64_t end) {
        thread_local Scratch scratch;
        float* panel = reinterpret_cast<float*>(scratch.get(bytes));
        for (int64_t group = begin; group < end; group++) {
          for (int64_t part = 0; part < parts; part++) pack(group, part, panel);
          compute(group, 0, w.row_groups * tiles, panel);
        }
      });
    else
      together(bytes);
  }

 private:
  static constexpr int64_t kChannelsPacked = 16;
  static constexpr int kMaxLanes = 16;
  static constexpr int64_t kAhead = 32;  // rows that are fetched before they are read or written

  double pack_cycles() const { return double(panel_floats) / L * 4; }
  double row_group_cycles() const { return double(taps) / w.row_groups * positions + double(max_rows) * positions * 5; }

  // Too few lane groups for the threads: all share in packing some of them, then in computing them.
  void together(int64_t bytes) {
    thread_local Scratch scratch;
    const int64_t wave = std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(bytes, 1), 1, groups);
    float* panels = reinterpret_cast<float*>(scratch.get(wave * bytes));
    for (int64_t first = 0; first < groups; first += wave) {
      const int64_t n = std::min(wave, groups - first), tasks = w.row_groups * tiles;
      in_parallel(n * parts, pack_cycles() / std::max<int64_t>(parts, 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) pack(first + i / parts, i % parts, panels + i / parts * panel_floats);
      });
      in_parallel(n * tasks, row_group_cycles(), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end;) {
          const int64_t group = i / tasks, stop = std::min(end, (group + 1) * tasks);
          compute(first + group, i - group * tasks, stop - group * tasks, panels + group * panel_floats);
          i = stop;
        }
      });
    }
  }

  // The sub-tile of each lane: image and first output pixel; -1 for lanes that have none.
  struct Lanes {
    int64_t n[kMaxLanes], y[kMaxLanes], x[kMaxLanes];
  };
  Lanes lanes_of(int64_t group) const {
    Lanes lanes;
    for (int l = 0; l < L; l++) {
      const int64_t s = group * L + l, in_image = s % (down * across);
      lanes.n[l] = s < subtiles ? s / (down * across) : -1;
      lanes.y[l] = in_image / across * t.mh;
      lanes.x[l] = in_image % across * t.mw;
    }
    return lanes;
  }

  // -------------------------------------------------------------------------------------------------- packing

  // A part is some channels of NCHW, a row of the panel of channels_last.
  void pack(int64_t group, int64_t part, float* panel) {
    if (t.flat)
      pack_flat(group, part, panel);
    else if (p.channels_last)
      pack_channels_last(group, part, panel);
    else
      pack_channels_first(group, part, panel);
  }

  void pack_flat(int64_t group, int64_t part, float* panel) {
    const int64_t area = p.H * p.W, all = p.N * area, first = group * t.nc * L;
    for (int64_t i = part * kChannelsPacked; i < std::min<int64_t>(w.live, (part + 1) * kChannelsPacked); i++) {
      const T* channel = x() + w.live_channels()[i] * area;
      float* out = panel + i * channel_floats;
      if (i + kAhead < w.live)
        prefetch(x() + w.live_channels()[i + kAhead] * area + first / area * conv.C * area + first % area, t.nc * L);
      for_flat_runs(first, std::min(all, first + t.nc * L), [&](int64_t pixel, int64_t n, bool whole) {
        const T* from = channel + pixel / area * conv.C * area + pixel % area;
        float* to = out + (pixel - first);
        if (whole)
          typed->copy_in(from, n, (n + L - 1) / L, to);
        else
          for (int64_t j = 0; j < n; j++) to[j] = static_cast<float>(from[j]);
      });
    }
  }

  // Calls f(pixel, n, whole) for runs of pixels in one image; `whole` runs begin with a vector and either fill their
  // last one or end all pixels.
  template <class F>
  void for_flat_runs(int64_t begin, int64_t end, const F& f) const {
    const int64_t area = p.OH * p.OW, origin = begin;
    while (begin < end) {
      const int64_t image_end = std::min(end, (begin / area + 1) * area);
      const int64_t vector_end = image_end == end ? end : origin + (image_end - origin) / L * L;
      if ((begin - origin) % L == 0 && vector_end > begin) {
        f(begin, vector_end - begin, true);
        begin = vector_end;
      } else {
        const int64_t n = std::min(image_end, origin + (begin - origin) / L * L + L) - begin;
        f(begin, n, false);
        begin += n;
      }
    }
  }

  void pack_channels_first(int64_t group, int64_t part, float* panel) {
    const Lanes lanes = lanes_of(group);
    const int64_t area = p.H * p.W, all = p.N * conv.C * area, cols = (window.cols + 3) / 4 * 4;
    std::vector<uint32_t> inside(cols), valid(cols);
    int64_t x0[kMaxLanes];
    for (int l = 0; l < L; l++) x0[l] = lanes.x[l] * conv.sw - p.left;
    for (int64_t e = 0; e < cols; e++)
      for (int l = 0; l < L; l++) inside[e] |= uint32_t(lanes.n[l] >= 0 && x0[l] + e >= 0 && x0[l] + e < p.W) << l;
    const int64_t begin = part * kChannelsPacked, end = std::min<int64_t>(w.live, begin + kChannelsPacked);
    for (int32_t row = 0; row < window.HR; row++) {
      int64_t lane[kMaxLanes], low = INT64_MAX, high = INT64_MIN;
      uint32_t in_rows = 0;
      for (int l = 0; l < L; l++) {
        const int64_t y = lanes.y[l] * conv.sh - p.top + rows_at[row];
        in_rows |= uint32_t(y >= 0 && y < p.H) << l;
        lane[l] = lanes.n[l] < 0 ? 0 : lanes.n[l] * conv.C * area + std::clamp<int64_t>(y, 0, p.H - 1) * p.W + x0[l];
        low = std::min(low, lane[l]), high = std::max(high, lane[l]);
      }
      for (int64_t e = 0; e < cols; e++) valid[e] = inside[e] & in_rows;
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = w.live_channels()[i] * area;
        float* to = panel + i * channel_floats + int64_t(row) * window.HC * L;
        if (low + first >= 0 && high + first + cols <= all) {
          typed->gather({x() + first, lane, window.cols, to, out_at.data(), valid.data(), 1});
        } else {  // some lane would read outside the tensor
          for (int64_t e = 0; e < window.cols; e++)
            for (int l = 0; out_at[e] >= 0 && l < L; l++)
              to[out_at[e] + l] = valid[e] >> l & 1 ? static_cast<float>(x()[first + lane[l] + e]) : 0.0f;
        }
      }
    }
  }

  void pack_channels_last(int64_t group, int64_t row, float* panel) {
    const Lanes lanes = lanes_of(group);
    const int64_t C = conv.C;
    for (int32_t col = 0; col < window.HC; col++) {
      float* to = panel + (int64_t(row) * window.HC + col) * L;
      int64_t lane[kMaxLanes], last = 0;
      uint32_t inside = 0;
      for (int l = 0; l < L; l++) {
        const int64_t y = lanes.y[l] * conv.sh - p.top + rows_at[row], x = lanes.x[l] * conv.sw - p.left + cols_at[col];
        const bool in = lanes.n[l] >= 0 && y >= 0 && y < p.H && x >= 0 && x < p.W;
        inside |= uint32_t(in) << l;
        lane[l] = in ? ((lanes.n[l] * p.H + y) * p.W + x) * C : 0;
        last = std::max(last, lane[l]);
      }
      // In fours, unless that would read behind the tensor.
      const int64_t n = last + (C + 3) / 4 * 4 <= p.N * p.H * p.W * C ? C : C / 4 * 4;
      typed->gather({x(), lane, n, to, out_at.data(), &inside, 0});
      for (int64_t c = n; c < C; c++)
        for (int l = 0; out_at[c] >= 0 && l < L; l++)
          to[out_at[c] + l] = inside >> l & 1 ? static_cast<float>(x()[lane[l] + c]) : 0.0f;
    }
  }

  // -------------------------------------------------------------------------------------------------- computing

  // Tasks [begin, end) of a lane group's (group of rows, tile) pairs.
  void compute(int64_t group, int64_t begin, int64_t end, const float* panel) {
    thread_local Scratch scratch;
    float* acc = reinterpret_cast<float*>(scratch.get(max_rows * positions * L * sizeof(float)));
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
      if (p.activation != Activation::none && !p.residual) k.activate(acc, rows.rows * positions, p.activation);
      if (t.flat)
        store_flat(group, rows, acc);
      else
        store_tile(group, rows, i0, j0, acc);
    }
  }

  static void prefetch(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
  }

  void store_flat(int64_t group, const RowGroup& rows, const float* acc) {
    const int64_t area = p.OH * p.OW, all = p.N * area, first = group * t.nc * L;
    for (int32_t o = rows.o0; o < rows.o1; o++) {
      const float* from = acc + w.row_of()[o] * positions * L;
      if (o + kAhead < rows.o1) prefetch(y() + (first / area * conv.O + o + kAhead) * area + first % area, t.nc * L);
      for (int64_t pixel = first, end = std::min(all, first + t.nc * L); pixel < end;) {
        const int64_t n = std::min(end, (pixel / area + 1) * area) - pixel;
        const int64_t at = (pixel / area * conv.O + o) * area + pixel % area;
        typed->copy_out(from + (pixel - first), n, y() + at, residual() ? residual() + at : nullptr, p.activation);
        pixel += n;
      }
    }
  }

  void store_tile(int64_t group, const RowGroup& rows, int64_t i0, int64_t j0, const float* acc) {
    const Lanes lanes = lanes_of(group);
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

  const T* x() const { return static_cast<const T*>(p.x); }
  const T* residual() const { return static_cast<const T*>(p.residual); }
  T* y() const { return static_cast<T*>(p.y); }

  const Problem& p;
  const Packed& w;
  const Tiling t;
  const int L;
  const Kernels& k;
  const Conv& conv;
  const TypeKernels<T>* typed;
  Window window{};
  int64_t channel_floats, panel_floats, groups, down = 1, across = 1, subtiles = 0, tiles, tiles_across, positions;
  int64_t max_rows = 1, taps, parts;
  SegmentFn segment_fn;
  std::vector<int32_t> rows_at, cols_at;
  std::vector<int64_t> out_at;  // floats from a panel to the vectors of each channel, or of each column of a row
  std::vector<float> bias_rows;
  std::vector<size_t> bias_at;
};

// -------------------------------------------------------------------------------------------------- checked wrappers

using Ints = std::vector<int64_t>;

// The weight that these arguments describe, its indices unread; the tensors must outlive it.
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
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Float || values.scalar_type() == ScalarType::BFloat16,
                  "sparse_conv2d: values must be fp32 or bf16");
  STD_TORCH_CHECK(values.dim() == 3 && values.size(1) == block[0] && values.size(2) == block[1],
                  "sparse_conv2d: values must be [blocks, ", block[0], ", ", block[1], "]");
  const auto i32 = [](int64_t v) { return static_cast<int32_t>(v); };
  Weight w{{i32(shape[0]), i32(shape[1] * groups), i32(shape[2]), i32(shape[3]), i32(groups), i32(stride[0]),
            i32(stride[1]), i32(dilation[0]), i32(dilation[1])},
           block[0],
           block[1],
           static_cast<const int32_t*>(crow.const_data_ptr()),
           static_cast<const int32_t*>(col.const_data_ptr()),
           values.const_data_ptr(),
           values.scalar_type()};
  STD_TORCH_CHECK(w.conv.R >= 1 && w.conv.R <= kMaxTaps && w.conv.S >= 1 && w.conv.S <= kMaxTaps,
                  "sparse_conv2d: a kernel of ", w.conv.R, " x ", w.conv.S, " is not supported; up to ", kMaxTaps);
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

// Sizes of a call: input and output, checked against each other.
Problem sizes_of(const Conv& c, const Ints& x_shape, const Ints& padding) {
  STD_TORCH_CHECK(x_shape.size() == 4 && padding.size() == 4,
                  "sparse_conv2d: x must be [N, C, H, W] and padding have 4 elements");
  STD_TORCH_CHECK(x_shape[1] == c.C, "sparse_conv2d: x has ", x_shape[1], " channels, the weight ", c.C);
  Problem p{};
  p.N = x_shape[0], p.H = x_shape[2], p.W = x_shape[3], p.top = padding[0], p.left = padding[2];
  const int64_t high = p.H + padding[0] + padding[1] - int64_t(c.R - 1) * c.dh;
  const int64_t wide = p.W + padding[2] + padding[3] - int64_t(c.S - 1) * c.dw;
  STD_TORCH_CHECK(high >= 1 && wide >= 1, "sparse_conv2d: the kernel is larger than the padded input");
  p.OH = (high - 1) / c.sh + 1, p.OW = (wide - 1) / c.sw + 1;
  return p;
}

Target target_of(const Problem& p, const Ints& padding, bool channels_last) {
  const auto at_least_one = [](int64_t v) { return std::max<int64_t>(v, 1); };
  const bool unpadded = std::all_of(padding.begin(), padding.end(), [](int64_t v) { return v == 0; });
  return {at_least_one(p.N), p.OH, p.OW, channels_last, unpadded, kernels().lanes};
}

Tensor sparse_conv2d_pack_cpu(Tensor values, Tensor crow, Tensor col, Ints shape, Ints block, Ints stride, Ints padding,
                              Ints dilation, int64_t groups, Ints x_shape, bool channels_last, bool with_values,
                              Ints tiling) {
  values = as_contiguous(values), crow = as_contiguous(crow), col = as_contiguous(col);
  const Weight w = weight_of(values, crow, col, shape, block, stride, dilation, groups);
  check_structure(w, values.size(0));
  return pack(w, target_of(sizes_of(w.conv, x_shape, padding), padding, channels_last), with_values, tiling);
}

// The values in the order of the packed structure, in scratch that lasts until this thread's next call.
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

Tensor sparse_conv2d_cpu(Tensor x, Tensor values, Tensor crow, Tensor col, Ints shape, Ints block,
                         std::optional<Tensor> bias, std::optional<Tensor> residual, Ints stride, Ints padding,
                         Ints dilation, int64_t groups, Activation activation, std::optional<Tensor> packed) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "sparse_conv2d: x must be [N, C, H, W], on the CPU");
  const bool last = channels_last(x);
  if (!last) x = as_contiguous(x);
  values = as_contiguous(values), crow = as_contiguous(crow), col = as_contiguous(col);
  const Weight w = weight_of(values, crow, col, shape, block, stride, dilation, groups);
  const Conv& c = w.conv;
  Problem p = sizes_of(c, {x.size(0), x.size(1), x.size(2), x.size(3)}, padding);
  p.channels_last = last;
  const int64_t sizes[4] = {p.N, c.O, p.OH, p.OW};
  Tensor y = empty_image(sizes, x.scalar_type(), p.channels_last);
  if (!p.N || !c.O || !p.OH || !p.OW) return y;
  const Target target = target_of(p, padding, last);
  const Packed* blob = nullptr;
  const auto usable = [&](const Tensor& t) {
    blob = static_cast<const Packed*>(t.const_data_ptr());
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() >= int64_t(sizeof(Packed)) && sealed(*blob) &&
                        blob->bytes == t.numel() && blob->stored == values.numel() &&
                        !std::memcmp(&blob->conv, &c, sizeof(Conv)),
                    "sparse_conv2d: packed is not the packed form of this weight");
    return blob->lanes == target.lanes && !(blob->tiling.flat && (last || !target.unpadded));
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
  p.bias.assign(c.O, 0.0f);
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == c.O, "sparse_conv2d: bias has ", bias->numel(), " elements, expected ", c.O);
    bias = as_contiguous(*bias);
    for (int32_t o = 0; o < c.O; o++) {
      if (bias->scalar_type() == ScalarType::Float)
        p.bias[o] = static_cast<const float*>(bias->const_data_ptr())[o];
      else if (bias->scalar_type() == ScalarType::BFloat16)
        p.bias[o] = static_cast<const bf16*>(bias->const_data_ptr())[o];
      else
        STD_TORCH_CHECK(false, "sparse_conv2d: bias must be fp32 or bf16");
    }
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
  switch (x.scalar_type()) {
    case ScalarType::Float:
      SparseConv<float>(p).run();
      break;
    case ScalarType::BFloat16:
      SparseConv<bf16>(p).run();
      break;
    default:
      STD_TORCH_CHECK(false, "sparse_conv2d: x must be fp32 or bf16");
  }
  return y;
}

}  // namespace
}  // namespace pyops::sparse

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("sparse_conv2d_native", TORCH_BOX(&pyops::sparse::sparse_conv2d_cpu));
  m.impl("sparse_conv2d_pack", TORCH_BOX(&pyops::sparse::sparse_conv2d_pack_cpu));
}
