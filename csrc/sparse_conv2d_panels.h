// Images in the lane layout (sparse_conv2d.h): which pixels a lane group has, and the packing of what it sees.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "scratch.h"
#include "sparse_conv2d.h"

namespace pyops::sparse {

template <class T>
struct Image {
  const T* x;
  int64_t N, C, H, W;
  bool channels_last;
};

// The pixels that are cut into lanes, and where the window of the first one begins in the image.
struct Pixels {
  int64_t OH, OW, top, left;
};

constexpr double kTaskCycles = 20'000;  // less work than this is not worth another thread

template <class F>
void in_parallel(int64_t n, double cycles_each, const F& work) {
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kTaskCycles / std::max(cycles_each, 1.0)));
  if (n <= grain)
    work(0, n);
  else
    torch::stable::parallel_for(0, n, grain, work);
}

// Of Kernels or Int8Kernels, those for T.
template <class T, class K>
const auto& type_kernels(const K& k) {
  if constexpr (std::is_same_v<T, float>)
    return k.fp32;
  else
    return k.half;
}

// Of n elements, into L2.
template <class T>
void fetch_lines(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}

template <class T>
class Panels {
 public:
  static constexpr int kMaxLanes = 16;

  // `live`: the channels that a panel holds, in order.
  Panels(const Image<T>& image, const Pixels& out, const Conv& conv, const Tiling& tiling, const int32_t* live,
         int64_t live_count)
      : image(image),
        out(out),
        conv(conv),
        t(tiling),
        live(live),
        live_count(live_count),
        typed(&type_kernels<T>(kernels())),
        L(kernels().lanes) {
    window.init(conv, t);
    channel_floats = int64_t(window.HR) * window.HC * L;
    panel_floats = live_count * channel_floats;
    if (t.flat) {
      groups = (image.N * out.OH * out.OW + t.nc * L - 1) / (t.nc * L);
    } else {
      down = (out.OH + t.mh - 1) / t.mh, across = (out.OW + t.mw - 1) / t.mw;
      subtiles = image.N * down * across;
      groups = (subtiles + L - 1) / L;
      rows_at.resize(window.HR), cols_at.resize(window.HC);
      Window::slots(conv.R, conv.sh, conv.dh, t.mh, nullptr, rows_at.data());
      Window::slots(conv.S, conv.sw, conv.dw, t.mw, nullptr, cols_at.data());
    }
    if (image.channels_last) {
      out_at.assign(image.C, -1);
      for (int64_t i = 0; i < live_count; i++) out_at[live[i]] = i * channel_floats;
    } else {
      out_at.assign((window.cols + 3) / 4 * 4, -1);
      for (int32_t i = 0; i < window.HC && !t.flat; i++) out_at[cols_at[i]] = i * L;
    }
    parts = image.channels_last ? window.HR : (live_count + kChannelsPacked - 1) / kChannelsPacked;
  }

  double pack_cycles() const { return double(panel_floats) / L * 4; }

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

  // A part is some channels of NCHW, a row of the panel of channels_last.
  void pack(int64_t group, int64_t part, float* panel) {
    if (t.flat)
      pack_flat(group, part, panel);
    else if (image.channels_last)
      pack_channels_last(group, part, panel);
    else
      pack_channels_first(group, part, panel);
  }

  // Calls f(pixel, n, whole) for runs of pixels in one image; `whole` runs begin with a vector and either fill their
  // last one or end all pixels.
  template <class F>
  void for_flat_runs(int64_t begin, int64_t end, const F& f) const {
    const int64_t area = out.OH * out.OW, origin = begin;
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

  const Image<T> image;
  const Pixels out;
  const Conv conv;
  const Tiling t;
  const int32_t* live;
  const int64_t live_count;
  const TypeKernels<T>* typed;
  const int L;
  Window window{};
  float pad = 0;  // what the panel holds outside of the image
  int64_t channel_floats, panel_floats, groups, parts, down = 1, across = 1, subtiles = 0;

 private:
  static constexpr int64_t kChannelsPacked = 16;
  static constexpr int64_t kAhead = 32;  // channels that are fetched before they are read

  void pack_flat(int64_t group, int64_t part, float* panel) {
    const int64_t area = image.H * image.W, all = image.N * area, first = group * t.nc * L;
    for (int64_t i = part * kChannelsPacked; i < std::min<int64_t>(live_count, (part + 1) * kChannelsPacked); i++) {
      const T* channel = image.x + live[i] * area;
      float* channel_panel = panel + i * channel_floats;
      if (i + kAhead < live_count)
        fetch_lines(image.x + live[i + kAhead] * area + first / area * image.C * area + first % area, t.nc * L);
      for_flat_runs(first, std::min(all, first + t.nc * L), [&](int64_t pixel, int64_t n, bool whole) {
        const T* from = channel + pixel / area * image.C * area + pixel % area;
        float* to = channel_panel + (pixel - first);
        if (whole)
          typed->copy_in(from, n, (n + L - 1) / L, to);
        else
          for (int64_t j = 0; j < n; j++) to[j] = static_cast<float>(from[j]);
      });
    }
  }

  void pack_channels_first(int64_t group, int64_t part, float* panel) {
    const Lanes lanes = lanes_of(group);
    const int64_t area = image.H * image.W, all = image.N * image.C * area, cols = (window.cols + 3) / 4 * 4;
    std::vector<uint32_t> inside(cols), valid(cols);
    int64_t x0[kMaxLanes];
    for (int l = 0; l < L; l++) x0[l] = lanes.x[l] * conv.sw - out.left;
    for (int64_t e = 0; e < cols; e++)
      for (int l = 0; l < L; l++) inside[e] |= uint32_t(lanes.n[l] >= 0 && x0[l] + e >= 0 && x0[l] + e < image.W) << l;
    const int64_t begin = part * kChannelsPacked, end = std::min<int64_t>(live_count, begin + kChannelsPacked);
    for (int32_t row = 0; row < window.HR; row++) {
      int64_t lane[kMaxLanes], low = INT64_MAX, high = INT64_MIN;
      uint32_t in_rows = 0;
      for (int l = 0; l < L; l++) {
        const int64_t y = lanes.y[l] * conv.sh - out.top + rows_at[row];
        in_rows |= uint32_t(y >= 0 && y < image.H) << l;
        lane[l] = lanes.n[l] < 0 ? 0
                                 : lanes.n[l] * image.C * area +
                                       std::clamp<int64_t>(y, 0, std::max<int64_t>(image.H - 1, 0)) * image.W + x0[l];
        low = std::min(low, lane[l]), high = std::max(high, lane[l]);
      }
      for (int64_t e = 0; e < cols; e++) valid[e] = inside[e] & in_rows;
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = live[i] * area;
        float* to = panel + i * channel_floats + int64_t(row) * window.HC * L;
        if (low + first >= 0 && high + first + cols <= all) {
          typed->gather({image.x + first, lane, window.cols, to, out_at.data(), valid.data(), 1, pad});
        } else {  // some lane would read outside the tensor
          for (int64_t e = 0; e < window.cols; e++)
            for (int l = 0; out_at[e] >= 0 && l < L; l++)
              to[out_at[e] + l] = valid[e] >> l & 1 ? static_cast<float>(image.x[first + lane[l] + e]) : pad;
        }
      }
    }
  }

  void pack_channels_last(int64_t group, int64_t row, float* panel) {
    const Lanes lanes = lanes_of(group);
    const int64_t C = image.C;
    for (int32_t col = 0; col < window.HC; col++) {
      float* to = panel + (int64_t(row) * window.HC + col) * L;
      int64_t lane[kMaxLanes], last = 0;
      uint32_t inside = 0;
      for (int l = 0; l < L; l++) {
        const int64_t y = lanes.y[l] * conv.sh - out.top + rows_at[row],
                      x = lanes.x[l] * conv.sw - out.left + cols_at[col];
        const bool in = lanes.n[l] >= 0 && y >= 0 && y < image.H && x >= 0 && x < image.W;
        inside |= uint32_t(in) << l;
        lane[l] = in ? ((lanes.n[l] * image.H + y) * image.W + x) * C : 0;
        last = std::max(last, lane[l]);
      }
      // In fours, unless that would read behind the tensor.
      const int64_t n = last + (C + 3) / 4 * 4 <= image.N * image.H * image.W * C ? C : C / 4 * 4;
      typed->gather({image.x, lane, n, to, out_at.data(), &inside, 0, pad});
      for (int64_t c = n; c < C; c++)
        for (int l = 0; out_at[c] >= 0 && l < L; l++)
          to[out_at[c] + l] = inside >> l & 1 ? static_cast<float>(image.x[lane[l] + c]) : pad;
    }
  }
  std::vector<int32_t> rows_at, cols_at;
  std::vector<int64_t> out_at;  // floats from a panel to the vectors of each channel, or of each column of a row
};

}  // namespace pyops::sparse
