// The sparse convolution with channels as lanes (sparse_conv2d.h): blocks of 16 output channels, AVX-512.
//
// Patch by patch: what it sees is packed, padded and rid of dead channels, into a panel in L2. Then, for a group of
// rows whose weights have room beside it, tile by tile: block of input channels after block, so that a tile's part of
// the panel stays in L1, for all rows of the group; then its accumulators go out through the epilogue.
#include <algorithm>
#include <vector>

#include "scratch.h"
#include "sparse_conv2d_call.h"
#include "sparse_conv2d_panels.h"

namespace pyops::sparse {
namespace {

constexpr int L = kChannelLanes;
// Of panels, which share a 2 MiB L2 with the weights: enough to use weights that are read again for each wave, or,
// where they stay in L2, a few pages of each channel.
constexpr int64_t kWaveBytes = 640 << 10, kSmallWaveBytes = 96 << 10;

template <class T>
class ChannelsConv {
 public:
  explicit ChannelsConv(const Problem& problem)
      : p(problem), w(*problem.w), t(w.tiling), k(kernels()), conv(w.conv), typed(type_kernels<T>(k)) {
    window.init(conv, t);
    step = int64_t(window.HR) * window.HC;
    panel_floats = w.live * step;
    H = p.H, W = p.W, OH = p.OH, OW = p.OW;
    if (t.flat) W *= H, OW *= OH, H = OH = 1;
    down = (OH + t.mh - 1) / t.mh, across = (OW + t.mw - 1) / t.mw;
    patches = p.N * down * across;
    tiles_across = (std::min<int64_t>(t.mw, OW) + t.nc - 1) / t.nc;
    tiles = (std::min<int64_t>(t.mh, OH) + t.nr - 1) / t.nr * tiles_across;
    rows_at.resize(window.HR), cols_at.resize(window.HC);
    if (t.flat) {
      columns = t.mw;
      for (int32_t j = 0; j < columns; j++) cols_at[j] = j;
    } else {
      Window::slots(conv.R, conv.sh, conv.dh, t.mh, nullptr, rows_at.data());
      columns = Window::slots(conv.S, conv.sw, conv.dw, t.mw, nullptr, cols_at.data());
    }
    for (int32_t j = 0, n; j < columns; j += n) {
      for (n = 1; j + n < columns && cols_at[j + n] == cols_at[j] + conv.sw * n;) n++;
      runs.push_back({j, n, cols_at[j]});
    }
    if (p.channels_last) {
      out_at.assign(conv.C, -1);
      for (int64_t i = 0; i < w.live; i++) out_at[w.live_channels()[i]] = i * step;
    }
    parts = ((p.channels_last ? conv.C : w.live) + kChannelsPacked - 1) / kChannelsPacked;
    for (int64_t g = 0; g < w.row_groups; g++) {
      const RowGroup& group = w.groups()[g];
      bias_at.push_back(bias_rows.size());
      bias_rows.resize(bias_rows.size() + group.rows, 0.0f);
      blocks_at.push_back(blocks.size());
      for (int32_t o = group.o0; o < group.o1; o++) {
        const int32_t row = w.row_of()[o];
        bias_rows[bias_at[g] + row] = p.bias[o];
        if (row % L == 0) blocks.push_back({o, row, 0});
        blocks.back().n++;
      }
      max_rows = std::max<int64_t>(max_rows, group.rows);
    }
    blocks_at.push_back(blocks.size());
  }

  void run() {
    const int64_t threads = torch::stable::get_num_threads(), tasks = w.row_groups * tiles;
    const double taps = static_cast<double>(w.values_at - w.taps_at) / 2;
    const double task = (taps * 0.7 + double(max_rows) * 0.5) / static_cast<double>(w.row_groups) * t.nr * t.nc;
    const double packing = static_cast<double>(panel_floats) * 0.3;
    const int64_t panel_bytes = std::max<int64_t>(panel_floats, 1) * sizeof(float);
    const int64_t wave = std::max<int64_t>(1, (w.row_groups > 1 ? kWaveBytes : kSmallWaveBytes) / panel_bytes);
    // A thread packs panels and uses them while they are in its cache. Of the patch that two share each packs its own.
    const int64_t unit = patches % threads == 0 || patches >= 8 * threads ? tasks : 1;
    in_parallel(patches * tasks / unit, task * static_cast<double>(unit) + packing / static_cast<double>(tasks / unit),
                [&](int64_t begin, int64_t end) {
                  thread_local Scratch scratch;
                  float* panels = reinterpret_cast<float*>(scratch.get(std::min(wave, patches) * panel_bytes));
                  for (int64_t i = begin * unit, stop = end * unit; i < stop;) {
                    const int64_t first = i / tasks, from = i - first * tasks;
                    const int64_t n = from || stop - i < tasks ? 1 : std::min(wave, (stop - i) / tasks);
                    const int64_t to = std::min(n * tasks, stop - first * tasks);
                    pack(first, n, 0, parts, panels);
                    compute(first, n, from, to, panels);
                    i = first * tasks + to;
                  }
                });
  }

 private:
  static constexpr int64_t kChannelsPacked = 64;  // of a part: four lines of a pixel of channels_last

  struct Place {
    int64_t n, y, x;  // image and first output pixel
  };
  Place place_of(int64_t patch) const {
    return {patch / (down * across), patch / across % down * t.mh, patch % across * t.mw};
  }

  // Of n patches from `first` on, the channels of parts [begin, end).
  void pack(int64_t first, int64_t n, int64_t begin, int64_t end, float* panels) const {
    begin *= kChannelsPacked, end *= kChannelsPacked;
    if (p.channels_last)
      pack_pixels(first, n, begin, std::min<int64_t>(end, conv.C), panels);
    else
      pack_rows(first, n, begin, std::min<int64_t>(end, w.live), panels);
  }

  // NCHW, channel by channel as they lie in memory: the same runs of pixels of each.
  void pack_rows(int64_t first, int64_t n, int64_t begin, int64_t end, float* panels) const {
    struct Copy {
      int64_t from, to;
      int32_t before, n, after;  // zeros, pixels, zeros
    };
    thread_local std::vector<Copy> copies;
    copies.clear();
    const int64_t area = H * W, sw = conv.sw;
    for (int64_t j = 0; j < n; j++) {
      const Place at = place_of(first + j);
      for (int32_t row = 0; row < window.HR; row++) {
        const int64_t y = at.y * conv.sh - p.top + rows_at[row];
        for (const Run& run : runs) {
          const int64_t x = at.x * sw - p.left + run.x;
          Copy copy{0, j * panel_floats + int64_t(row) * window.HC + run.at, run.n, 0, 0};
          if (y >= 0 && y < H) {
            const auto low = std::clamp<int64_t>((sw - 1 - x) / sw, 0, run.n);  // outside on the left
            const auto high = std::clamp<int64_t>((W - 1 - x + sw) / sw, low, run.n);
            copy.from = at.n * conv.C * area + y * W + x + low * sw;
            copy.before = static_cast<int32_t>(low), copy.n = static_cast<int32_t>(high - low);
            copy.after = static_cast<int32_t>(run.n - high);
          }
          copies.push_back(copy);
        }
      }
    }
    for (int64_t i = begin; i < end; i++) {
      const T* x = static_cast<const T*>(p.x) + w.live_channels()[i] * area;
      for (const Copy& copy : copies) {
        float* to = panels + i * step + copy.to;
        for (int32_t j = 0; j < copy.before; j++) *to++ = 0.0f;
        if (copy.n) typed.copy_steps(x + copy.from, sw, copy.n, to);
        for (int32_t j = copy.n; j < copy.n + copy.after; j++) to[j] = 0.0f;
      }
    }
  }

  // channels_last, 16 pixels at a time; rows are whole vectors.
  void pack_pixels(int64_t first, int64_t n, int64_t begin, int64_t end, float* panels) const {
    const int64_t C = conv.C;
    const T* x = static_cast<const T*>(p.x);
    for (int64_t j = 0; j < n; j++) {
      const Place at = place_of(first + j);
      for (int32_t row = 0; row < window.HR; row++) {
        const int64_t y = at.y * conv.sh - p.top + rows_at[row];
        for (int32_t col = 0; col < columns; col += L) {
          float* to = panels + j * panel_floats + int64_t(row) * window.HC + col;
          int64_t lane[L], last = 0;
          uint32_t inside = 0;
          for (int l = 0; l < L; l++) {
            const int64_t column = col + l < columns ? at.x * conv.sw - p.left + cols_at[col + l] : -1;
            const bool in = y >= 0 && y < H && column >= 0 && column < W;
            inside |= uint32_t(in) << l;
            lane[l] = in ? ((at.n * H + y) * W + column) * C : 0;
            last = std::max(last, lane[l]);
          }
          // In fours, unless that would read behind the tensor.
          const int64_t all = end - begin;
          const int64_t fours = last + begin + (all + 3) / 4 * 4 <= p.N * H * W * C ? all : all / 4 * 4;
          typed.gather({x + begin, lane, fours, to, out_at.data() + begin, &inside, 0});
          for (int64_t c = begin + fours; c < end; c++)
            for (int l = 0; out_at[c] >= 0 && l < L; l++)
              to[out_at[c] + l] = inside >> l & 1 ? static_cast<float>(x[lane[l] + c]) : 0.0f;
        }
      }
    }
  }

  // Of n patches from `first` on, tasks [begin, end): a task is a group of rows for a tile of a patch.
  void compute(int64_t first, int64_t n, int64_t begin, int64_t end, const float* panels) const {
    thread_local Scratch scratch;
    float* acc = reinterpret_cast<float*>(scratch.get(max_rows * t.nr * t.nc * sizeof(float)));
    for (int64_t task = begin; task < end; task++) {
      const int64_t g = task / (n * tiles), patch = task / tiles % n, tile = task % tiles;
      const Place at = place_of(first + patch);
      const int64_t i0 = tile / tiles_across * t.nr, j0 = tile % tiles_across * t.nc;
      const int64_t rows = std::min<int64_t>(t.nr, std::min(OH - at.y, int64_t(t.mh)) - i0);
      const int64_t cols = std::min<int64_t>(t.nc, std::min(OW - at.x, int64_t(t.mw)) - j0);
      if (rows <= 0 || cols <= 0) continue;
      const SegmentFn multiply = k.segments(L, static_cast<int>(rows), static_cast<int>(cols));
      const char* from = reinterpret_cast<const char*>(panels + patch * panel_floats + i0 * window.HC + j0);
      for (int64_t b = 0; b < w.blocks; b++) {
        const Block& block = *w.block(g, b);
        if (!block.segments) continue;
        SegmentArgs args{from + b * w.channels_in_block * step * sizeof(float),
                         static_cast<ptrdiff_t>(window.HC * sizeof(float)),
                         w.segments() + block.segment,
                         block.segments,
                         w.taps() + block.tap,
                         p.values + block.value,
                         acc,
                         bias_rows.data() + bias_at[g]};
        if (b + 1 < w.blocks) {
          multiply(args);
          continue;
        }
        args.count = 1;  // the last of each row: it goes out at once, the lines for the next one are fetched meanwhile
        for (const Segment *s = args.segments, *end = s + block.segments; s < end; args.segments = ++s) {
          const ChannelBlock& out = blocks[blocks_at[g] + s->row[0] / L];
          if (s + 1 < end) fetch(blocks[blocks_at[g] + s[1].row[0] / L], at.n, at.y + i0, at.x + j0, rows, cols);
          multiply(args);
          put(out, at.n, at.y + i0, at.x + j0, rows, cols, acc + out.row * rows * cols);
          args.taps += s->count[0], args.values += s->count[0] * L;
        }
      }
    }
  }

  struct ChannelBlock {
    int32_t o, row, n;  // first output channel, row of accumulators, channels
  };

  void fetch(const ChannelBlock& block, int64_t n, int64_t y, int64_t x, int64_t rows, int64_t cols) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    if (p.channels_last) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < cols; i++)
          __builtin_prefetch(static_cast<const T*>(p.y) + ((n * OH + y + r) * OW + x + i) * conv.O + block.o, 1);
      return;
    }
    const int64_t area = OH * OW;
    const T* out = static_cast<const T*>(p.y) + (n * conv.O + block.o) * area + y * OW + x;
    for (int32_t l = 0; l < block.n; l++)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < cols + kLine - 1; i += kLine)
          __builtin_prefetch(out + l * area + r * OW + std::min(i, cols - 1), 1);
  }

  void put(const ChannelBlock& block, int64_t n, int64_t y, int64_t x, int64_t rows, int64_t cols, float* acc) const {
    const T* residual = static_cast<const T*>(p.residual);
    if (p.activation != Activation::none && !residual) k.activate(acc, rows * cols, p.activation);
    T* out = static_cast<T*>(p.y);
    int64_t lane[L];
    int32_t counts[L];
    const int64_t area = OH * OW;
    for (int l = 0; l < L && !p.channels_last; l++)
      lane[l] = std::min(l, block.n - 1) * area, counts[l] = l < block.n ? static_cast<int32_t>(cols) : 0;
    for (int64_t r = 0; r < rows; r++) {
      const float* from = acc + r * cols * L;
      if (p.channels_last) {
        const int64_t to = ((n * OH + y + r) * OW + x) * conv.O + block.o;
        typed.copy_rows(from, cols, block.n, out + to, residual ? residual + to : nullptr, conv.O, p.activation);
      } else {
        const int64_t to = (n * conv.O + block.o) * area + (y + r) * OW + x;
        typed.scatter({from, L, static_cast<int>(cols), out + to, residual ? residual + to : nullptr, lane, counts,
                       p.activation});
      }
    }
  }

  const Problem& p;
  const Packed& w;
  const Tiling t;
  const Kernels& k;
  const Conv& conv;
  const TypeKernels<T>& typed;
  Window window{};
  int64_t step, panel_floats, H, W, OH, OW, down, across, patches, tiles, tiles_across, parts, max_rows = 1;
  struct Run {
    int32_t at, n, x;  // columns of the panel, and the first one's in the window
  };
  int32_t columns = 0;  // of the panel's rows that hold something
  std::vector<int32_t> rows_at, cols_at;
  std::vector<Run> runs;
  std::vector<int64_t> out_at;  // floats from the panel to the vectors of each channel of channels_last
  std::vector<float> bias_rows;
  std::vector<size_t> bias_at, blocks_at;
  std::vector<ChannelBlock> blocks;
};

}  // namespace

void run_channels(const Problem& problem, ScalarType dtype) {
  if (dtype == ScalarType::Float)
    ChannelsConv<float>(problem).run();
  else if (dtype == ScalarType::BFloat16)
    ChannelsConv<bf16>(problem).run();
  else
    STD_TORCH_CHECK(false, "sparse_conv2d: x must be fp32 or bf16");
}

}  // namespace pyops::sparse
