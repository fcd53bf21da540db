// dW[o, c, r, s] = Σ over n, p of grad[n, o, p] · x[n, c, p · stride + (r, s) · dilation - padding], for the kept
// weights                                                                             (pyops/ops/sparse_conv2d.py)
// The lane groups are cut into chunks. For each lane group the panels of x and of grad are packed, then multiplied for
// one group of output channels after the other. Every sum is taken in the same order, whatever the number of threads:
// over the lanes of a tile as in sparse_conv2d_dw.inc, tile after tile within a chunk, then over the chunks.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu.h"
#include "sparse_conv2d_call.h"
#include "sparse_conv2d_dw.h"
#include "sparse_conv2d_panels.h"
#include "vec_lanes.h"

#define PYOPS_ISA_FILE "sparse_conv2d_dw.inc"
#include "for_each_isa.h"

namespace pyops::sparse {

const DwKernels& dw_kernels() {
  static const DwKernels generic{pyops::generic::dw_kernel};
#if defined(__x86_64__)
  static const DwKernels avx2{pyops::avx2::dw_kernel}, avx512{pyops::avx512::dw_kernel};
  if (active_isa() >= Isa::avx512) return avx512;
  if (active_isa() == Isa::avx2) return avx2;
#endif
  return generic;
}

namespace {

constexpr int64_t kL1Bytes = 36 << 10, kWaveBytes = 3 << 19;

struct DwProblem {
  Weight w;
  int64_t N, H, W, OH, OW, top, left;
  bool x_last, grad_last;
  const void *x, *grad;
  float* out;  // [blocks][bo][bc]
};

struct DwPlan {
  Tiling tiling;
  int64_t channels_in_block;  // of a group
  double cycles;
};

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cycles of a tiling: packing, multiplying, and what each run of weights costs before its first.
DwPlan judge(const DwProblem& p, const Tiling& t, double taps) {
  const Conv& c = p.w.conv;
  Window whole, tile;
  whole.init(c, t);
  tile.init(c, {t.nr, t.nc, t.nr, t.nc, t.flat});
  const int64_t L = kernels().lanes, line = L * sizeof(float);
  const int64_t subtiles = t.flat ? up(p.N * p.OH * p.OW, t.nc) : p.N * up(p.OH, t.mh) * up(p.OW, t.mw);
  const double positions = t.nr * t.nc, tiles = double(t.mh / t.nr) * (t.mw / t.nc);
  const int64_t fit = std::max<int64_t>(1, kL1Bytes / (int64_t(tile.HR) * tile.HC * line));
  const int64_t blocks = up(std::max(c.channels(), 1), fit);
  const double multiply = taps * (positions * 0.75 + 7) + double(c.O) * p.w.bc * blocks * (positions * 2 + 12);
  const double vectors = double(c.C) * whole.HR * (p.x_last ? whole.HC : up(whole.HC, 4) * 4) +
                         double(c.O) * t.mh * (p.grad_last ? t.mw : up(t.mw, 4) * 4);
  const double pack = vectors * (t.flat ? 3 : vectors * line > kWaveBytes ? 10 : 5);
  return {t, up(std::max(c.channels(), 1), blocks), up(subtiles, L) * (pack + tiles * multiply)};
}

DwPlan choose(const DwProblem& p, bool flat) {
  const Conv& c = p.w.conv;
  const double taps = double(p.w.crow[p.w.block_rows()]) * p.w.bo * p.w.bc;
  DwPlan best{{}, 1, std::numeric_limits<double>::infinity()};
  const auto consider = [&](const Tiling& t) {
    const DwPlan found = judge(p, t, taps);
    if (found.cycles < best.cycles) best = found;
  };
  for (int32_t nr = 1; nr <= 4; nr++)
    for (int32_t nc = 1; nc <= 28; nc++) {
      if (!dw_kernels().runs(nr, nc)) continue;
      if (flat) {
        if (nr == 1) consider({1, nc, 1, nc, 1});
        continue;
      }
      for (int32_t mh = nr; mh < p.OH + nr && mh <= 16; mh += nr)
        for (int32_t mw = nc; mw < p.OW + nc && mw <= 28; mw += nc) {
          const Tiling t{mh, mw, nr, nc, 0};
          Window window;
          window.init(c, t);
          const int64_t floats = (int64_t(c.C) * window.HR * window.HC + int64_t(c.O) * mh * mw) * kernels().lanes;
          if ((mh > nr || mw > nc) && floats * 4 > kWaveBytes) break;
          consider(t);
        }
    }
  return best;
}

std::vector<int32_t> first_numbers(int64_t n) {
  std::vector<int32_t> numbers(n);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

template <class T>
class SparseDw {
 public:
  SparseDw(const DwProblem& problem, const DwPlan& plan)
      : p(problem),
        w(problem.w),
        t(plan.tiling),
        conv(w.conv),
        channels(first_numbers(std::max(conv.C, conv.O))),
        x({static_cast<const T*>(p.x), p.N, conv.C, p.H, p.W, p.x_last}, {p.OH, p.OW, p.top, p.left}, conv, t,
          channels.data(), conv.C),
        grad({static_cast<const T*>(p.grad), p.N, conv.O, p.OH, p.OW, p.grad_last}, {p.OH, p.OW, 0, 0},
             {conv.O, conv.O, 1, 1, 1, 1, 1, 1, 1}, t, channels.data(), conv.O),
        L(x.L) {
    find_runs(plan.channels_in_block);
    chunks = std::clamp<int64_t>(kChunkSums / std::max<int64_t>(sum_count, 1), 1, std::min(x.groups, kMostChunks));
  }

  void run() {
    thread_local Scratch scratch;
    const int64_t threads = torch::stable::get_num_threads();
    float* sums = reinterpret_cast<float*>(scratch.get(chunks * sum_count * sizeof(float)));
    // A thread packs a panel and uses it while it is in its cache.
    const int64_t apart = chunks >= 4 * threads ? chunks : chunks - chunks % threads;
    in_parallel(apart, chunk_cycles(), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++) compute_chunk(chunk, sums + chunk * sum_count);
    });
    if (apart < chunks) together(apart, sums);
    in_parallel(tasks.size(), double(sum_count) * chunks / tasks.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) put_sums(tasks[i], sums);
    });
  }

 private:
  static constexpr int64_t kTaskRows = 32;  // output channels of a task
  static constexpr int64_t kChunkSums = 2 << 20, kMostChunks = 32;

  int64_t panel_floats() const { return x.panel_floats + grad.panel_floats; }
  double task_cycles() const { return double(sum_count) / tasks.size() * t.mh * t.mw; }
  double chunk_cycles() const { return task_cycles() * tasks.size() * x.groups / chunks; }
  int64_t chunk_begin(int64_t chunk) const { return x.groups * chunk / chunks; }

  // Part `part` of the panels of x and grad.
  void pack(int64_t group, int64_t part, float* panel) {
    if (part < x.parts)
      x.pack(group, part, panel);
    else
      grad.pack(group, part - x.parts, panel + x.panel_floats);
  }
  // The last pixels may leave lanes unwritten.
  void clear_last(int64_t group, float* panel) const {
    if (t.flat && group + 1 == x.groups) std::memset(panel, 0, panel_floats() * sizeof(float));
  }

  void compute_chunk(int64_t chunk, float* sums) {
    thread_local Scratch scratch;
    float* panel = reinterpret_cast<float*>(scratch.get(panel_floats() * sizeof(float)));
    std::memset(sums, 0, sum_count * sizeof(float));
    for (int64_t group = chunk_begin(chunk); group < chunk_begin(chunk + 1); group++) {
      clear_last(group, panel);
      for (int64_t part = 0; part < x.parts + grad.parts; part++) pack(group, part, panel);
      for (const Task& task : tasks) compute(task, panel, sums);
    }
  }

  // The chunks that do not go round: all threads share in packing some lane groups, then each computes some of the
  // rows.
  void together(int64_t first_chunk, float* sums) {
    thread_local Scratch scratch;
    const int64_t each = panel_floats(), bytes = each * sizeof(float), parts = x.parts + grad.parts;
    const int64_t wave = std::clamp<int64_t>(kWaveBytes / std::max<int64_t>(bytes, 1), 1, x.groups);
    float* panels = reinterpret_cast<float*>(scratch.get(wave * bytes));
    std::memset(sums + first_chunk * sum_count, 0, (chunks - first_chunk) * sum_count * sizeof(float));
    for (int64_t first = chunk_begin(first_chunk); first < x.groups; first += wave) {
      const int64_t n = std::min(wave, x.groups - first);
      for (int64_t g = 0; g < n; g++) clear_last(first + g, panels + g * each);
      in_parallel(n * parts, (x.pack_cycles() + grad.pack_cycles()) / parts, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) pack(first + i / parts, i % parts, panels + i / parts * each);
      });
      in_parallel(tasks.size(), task_cycles() * n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
          for (int64_t g = 0, chunk = first_chunk; g < n; g++) {
            while (first + g >= chunk_begin(chunk + 1)) chunk++;
            compute(tasks[i], panels + g * each, sums + chunk * sum_count);
          }
      });
    }
  }

  // Rows of blocks that are computed together. Their runs lie block of channels after block of channels.
  struct Task {
    int64_t rows, end;             // [rows, end)
    std::vector<int64_t> runs_at;  // of each block of channels, and the end
    std::vector<int64_t> sums_at;
  };
  struct Place {
    int32_t i, j;  // in its blocks
  };

  void find_runs(int64_t channels_in_block) {
    const int64_t RS = int64_t(conv.R) * conv.S, in_group = w.block_rows() / conv.groups,
                  CB = up(conv.channels(), w.bc);
    const int64_t of_block = std::max<int64_t>(1, channels_in_block / w.bc),
                  blocks = std::max<int64_t>(1, up(CB, of_block));
    const int64_t channel_bytes = x.channel_floats * sizeof(float);
    offsets.resize(CB * RS);
    for (int64_t i = 0; i < CB * RS; i++) {
      const int64_t tap = int64_t(x.window.row_of_tap[i % RS / conv.S]) * x.window.HC + x.window.col_of_tap[i % conv.S];
      offsets[i] = static_cast<int32_t>(i / RS % of_block * w.bc * channel_bytes + tap * L * sizeof(float));
    }
    std::vector<int32_t> next(w.crow, w.crow + w.block_rows());
    const int64_t task_rows = std::max<int64_t>(1, kTaskRows / w.bo);
    for (int64_t row = 0; row < w.block_rows(); row += task_rows) {
      Task task{row, std::min(row + task_rows, w.block_rows()), {}, {}};
      for (int64_t block = 0; block < blocks; block++) {
        task.runs_at.push_back(runs.size()), task.sums_at.push_back(sum_count);
        const int64_t limit = std::min(CB, (block + 1) * of_block) * RS;
        for (int64_t b = task.rows; b < task.end; b++) {
          const int32_t first = next[b], end = w.crow[b + 1];
          int32_t stop = first;
          while (stop < end && w.col[stop] < limit) stop++;
          next[b] = stop;
          if (stop == first) continue;
          // The last block of channels may reach past the group's end.
          int32_t whole = stop;
          while (whole > first && w.col[whole - 1] >= (CB - 1) * RS) whole--;
          const int64_t group = b / in_group, o = b % in_group * w.bo;
          const int64_t panel = (group * conv.channels() + block * of_block * w.bc) * channel_bytes;
          for (int64_t i = 0; i < w.bo && o + i < conv.rows(); i++)
            for (int64_t j = 0; j < w.bc; j++) {
              const int32_t count = ((CB - 1) * w.bc + j < conv.channels() ? stop : whole) - first;
              if (!count) continue;
              runs.push_back(
                  {(group * conv.rows() + o + i) * grad.channel_floats, panel + j * channel_bytes, first, count});
              places.push_back({static_cast<int32_t>(i), static_cast<int32_t>(j)});
              sum_count += count;
            }
        }
      }
      task.runs_at.push_back(runs.size());
      tasks.push_back(std::move(task));
    }
  }

  void compute(const Task& task, const float* panel, float* sums) const {
    const DwFn kernel = dw_kernels().runs(t.nr, t.nc);
    const int64_t gradient_row = t.flat ? 0 : grad.window.HC * L * sizeof(float);
    for (int32_t i = 0; i < t.mh; i += t.nr)
      for (int32_t j = 0; j < t.mw; j += t.nc)
        for (size_t block = 0; block + 1 < task.runs_at.size(); block++) {
          const int64_t begin = task.runs_at[block];
          if (begin == task.runs_at[block + 1]) continue;
          kernel({reinterpret_cast<const char*>(panel + (int64_t(i) * x.window.HC + j) * L),
                  panel + x.panel_floats + (int64_t(i) * grad.window.HC + j) * L,
                  static_cast<ptrdiff_t>(x.window.HC * L * sizeof(float)), static_cast<ptrdiff_t>(gradient_row),
                  runs.data() + begin, task.runs_at[block + 1] - begin, w.col, offsets.data(),
                  sums + task.sums_at[block]});
        }
  }

  void put_sums(const Task& task, const float* sums) const {
    const int64_t size = w.bo * w.bc;
    const int64_t begin = w.crow[task.rows], end = w.crow[task.end];
    if (conv.rows() % w.bo || conv.channels() % w.bc) std::fill(p.out + begin * size, p.out + end * size, 0.0f);
    int64_t at = task.sums_at[0];
    for (int64_t r = task.runs_at.front(); r < task.runs_at.back(); r++) {
      float* to = p.out + runs[r].first * size + places[r].i * w.bc + places[r].j;
      for (int32_t k = 0; k < runs[r].count; k++) {
        float sum = sums[at];
        for (int64_t chunk = 1; chunk < chunks; chunk++) sum += sums[chunk * sum_count + at];
        to[k * size] = sum;
        at++;
      }
    }
  }

  const DwProblem& p;
  const Weight& w;
  const Tiling t;
  const Conv& conv;
  std::vector<int32_t> channels;
  Panels<T> x, grad;
  const int L;
  std::vector<Run> runs;
  std::vector<Place> places;
  std::vector<int32_t> offsets;
  std::vector<Task> tasks;
  int64_t sum_count = 0, chunks;
};

Tensor sparse_conv2d_dw_cpu(Tensor grad, Tensor x, Tensor crow, Tensor col, Ints shape, Ints block, Ints stride,
                            Ints padding, Ints dilation, int64_t groups) {
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 4 && x.is_cpu() && x.dim() == 4,
                  "sparse_conv2d_dw: grad and x must have 4 dimensions, on the CPU");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "sparse_conv2d_dw: grad and x must have one dtype");
  const bool grad_last = channels_last(grad), x_last = channels_last(x);
  if (!grad_last) grad = as_contiguous(grad);
  if (!x_last) x = as_contiguous(x);
  crow = as_contiguous(crow), col = as_contiguous(col);
  STD_TORCH_CHECK(block.size() == 2 && col.dim() == 1, "sparse_conv2d_dw: col_indices must be 1-D, block [bo, bc]");
  const int64_t sizes[3] = {col.numel(), block[0], block[1]};
  Tensor values = empty_cpu(sizes, 3, ScalarType::Float);
  const Weight w = weight_of(values, crow, col, shape, block, stride, dilation, groups);
  check_structure(w, sizes[0]);
  const OutputSize out = output_size(w.conv, {x.size(0), x.size(1), x.size(2), x.size(3)}, padding);
  STD_TORCH_CHECK(
      grad.size(0) == x.size(0) && grad.size(1) == w.conv.O && grad.size(2) == out.OH && grad.size(3) == out.OW,
      "sparse_conv2d_dw: grad must be [", x.size(0), ", ", w.conv.O, ", ", out.OH, ", ", out.OW,
      "], the shape of the output");
  DwProblem p{w,          x.size(0), x.size(2), x.size(3), out.OH,  out.OW, padding[0],
              padding[2], x_last,    grad_last, nullptr,   nullptr, nullptr};
  p.x = x.const_data_ptr(), p.grad = grad.const_data_ptr();
  p.out = static_cast<float*>(values.mutable_data_ptr());
  if (!values.numel()) return values;
  if (!grad.numel() || !x.numel()) {
    std::memset(p.out, 0, values.numel() * sizeof(float));
    return values;
  }
  const Conv& c = w.conv;
  const bool unpadded = std::all_of(padding.begin(), padding.end(), [](int64_t v) { return v == 0; });
  const bool pointwise = c.R == 1 && c.S == 1 && c.sh == 1 && c.sw == 1 && unpadded;
  if (pointwise) {  // rows of pixels, however the image is shaped
    p.W = p.OW = p.H * p.W, p.H = p.OH = 1;
    if (x_last && grad_last) p.W = p.OW = p.N * p.W, p.N = 1;
  }
  const DwPlan plan = choose(p, pointwise && !x_last && !grad_last);
  if (x.scalar_type() == ScalarType::Float)
    SparseDw<float>(p, plan).run();
  else if (x.scalar_type() == ScalarType::BFloat16)
    SparseDw<bf16>(p, plan).run();
  else
    STD_TORCH_CHECK(false, "sparse_conv2d_dw: grad and x must be fp32 or bf16");
  return values;
}

}  // namespace
}  // namespace pyops::sparse

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("sparse_conv2d_dw_native", TORCH_BOX(&pyops::sparse::sparse_conv2d_dw_cpu));
}
