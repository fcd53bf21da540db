// y[m, n] = act(s_x[m] · Σ_g s[n, g] · Σ_{k ∈ g} q_x[m, k] · (q[n, k] - z[n, g]) + bias[n] + residual[m, n])
//                                                                                        (pyops/ops/int4_linear.py)
//
// Rows are quantized and cut as in int8_linear. A row tile that is alone with its panels reads their nibbles and
// unpacks them in registers. More of them share a range of the panel that is unpacked into bytes, 16 KiB that stay in
// L1 while the tiles pass; unpacking costs one store for 64 weights, as much as half a row's products with AMX.
// Panels whose scales are multiples of steps (int4_steps.h) are unpacked into int8 weights, and multiplied as
// int8_linear's: their sums stay integers, and meet the step in the epilogue. AMX unpacks them beside its products, for
// each row tile anew.
// Rows that are not quantized are int4_float.cpp's.
#include "int4_kernels.h"
#include "int4_problem.h"
#include "scratch.h"
#include "tensor.h"

namespace pyops {
namespace {

constexpr int64_t kRangeQuads = 128;  // 512 k of a panel: 16 KiB

// -------------------------------------------------------------------------------------------------------- launcher

// The panel of the columns from n0 on, packed into scratch if the weight is canonical.
Int4Panel panel_at(const Int4Problem& p, int64_t n0) {
  if (p.packed) return nth_panel({p.weight, p.scale, p.scale_type, p.zero, nullptr}, n0 / kPanelN, p);
  thread_local Scratch w, scale, zero;
  const int64_t groups = p.padded_groups() * kPanelN;
  const uint8_t* rows = reinterpret_cast<uint8_t*>(w.get(int4_panel_bytes(p.k64())));
  const Int4Panel panel{rows + kNibbleRow, scale.get(groups * sizeof(float)), p.scale_type,
                        p.zero ? reinterpret_cast<uint8_t*>(zero.get(groups)) : nullptr, nullptr};
  pack_int4_panel(p, n0, panel);
  return panel_of_rows(rows, panel);
}

template <class T>
class Int4Linear {
 public:
  explicit Int4Linear(const Int4Problem& problem)
      : p(problem),
        kernels(int4_kernels(active_isa(), p.M, p.packed && panel_of_rows(p.weight, {}).step)),
        k64(p.k64()),
        quads(k64 * 16),
        padded_groups(p.padded_groups()),
        panels(panels_of(p.N)),
        blocks(p.M, k64, kernels.max_rows),
        tile_bytes((kernels.tiles ? kDotMaxRows : kernels.max_rows) * k64 * 64),
        range_quads(p.group_quads >= kRangeQuads ? smaller(p.group_quads, quads)
                                                 : kRangeQuads / p.group_quads * p.group_quads),
        past_cache(p.K >= kPastCacheMinK && p.M * p.N * int64_t(sizeof(T)) >= kPastCacheBytes &&
                   whole_lines(static_cast<T*>(p.y), p.N)) {}

  void run() {
    const int64_t wave = std::min(blocks.count, std::max<int64_t>(kMinWave, torch::stable::get_num_threads()));
    thread_local Scratch scratch, scales, group_sums;
    a = scratch.get(wave * blocks.max_tiles * tile_bytes);
    s_x = reinterpret_cast<float*>(scales.get(p.M * sizeof(float)));
    if (kernels.sums)
      sums = reinterpret_cast<int32_t*>(
          group_sums.get(wave * blocks.max_tiles * (padded_groups + 1) * kernels.max_rows * sizeof(int32_t)));
    for (first_block = 0; first_block < blocks.count; first_block += wave)
      run_wave(std::min(wave, blocks.count - first_block));
  }

 private:
  void run_wave(int64_t count) {
    in_parallel(count * blocks.max_tiles, kernels.max_rows * (p.K / 4.0 + 20), [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) quantize(first_block + i / blocks.max_tiles, i % blocks.max_tiles);
    });
    const double rows = static_cast<double>(p.M) / blocks.count;
    const double cycles = kPanelN * double(p.K) * std::max(1.0 / 16, rows / kernels.macs_per_cycle) + 20 * rows + 50;
    in_parallel(count * panels, cycles, [this](int64_t begin, int64_t end) {
#if defined(__x86_64__)
      if (kernels.tiles)
        return amx::with_tiles([&] { multiply(begin, end); },
                               p.group_quads == 8 ? amx::kHalfTileShapes : amx::kTileShapes);
#endif
      multiply(begin, end);
    });
  }

  int64_t tile_index(int64_t b, int64_t t) const { return (b - first_block) * blocks.max_tiles + t; }
  int8_t* tile(int64_t b, int64_t t) const { return a + tile_index(b, t) * tile_bytes; }
  // [groups][rows of the tile], then a row of the sums of all groups
  int32_t* tile_sums(int64_t b, int64_t t) const {
    return kernels.sums ? sums + tile_index(b, t) * (padded_groups + 1) * kernels.max_rows : nullptr;
  }

  void quantize(int64_t b, int64_t t) {
    if (t >= blocks.tiles(b)) return;
    const int64_t m0 = blocks.first_row(b, t);
    const int rows = static_cast<int>(blocks.first_row(b, t + 1) - m0);
    thread_local Scratch scratch, gathered;
    const int64_t between = k64 % 2 ? k64 * 64 : k64 * 64 + 64;  // as in int8_linear
    int8_t* q = kernels.tiles ? tile(b, t) : scratch.get(rows * between);
    const int64_t row_stride = kernels.tiles ? 64 : between;
    const int64_t chunk_stride = kernels.tiles ? (rows > 16 ? 32 : 16) * 64 : 64;
    const auto quantize_row = std::get<Int4TypeKernels<T>>(kernels.types).quantize;
    T* ordered = p.order ? reinterpret_cast<T*>(gathered.get((p.K + 1) * sizeof(T))) : nullptr;
    for (int64_t m = m0; m < m0 + rows; m++, q += row_stride) {
      const T* x = static_cast<const T*>(p.x) + m * p.K;
      if (ordered) {
        for (int64_t k = 0; k < p.K; k++) ordered[k] = x[p.order[k]];
        x = ordered;
      }
      s_x[m] = quantize_row(x, p.K, nullptr, q, chunk_stride);
      if (kernels.sums) {
        int32_t* out = tile_sums(b, t) + (m - m0);
        kernels.sums(q, quads, p.group_quads, out, rows);
        int32_t& all = out[padded_groups * rows] = 0;
        for (int64_t g = 0; g < padded_groups; g++) all += out[g * rows];
      }
    }
    if (!kernels.tiles) kernels.pack_rows(q - rows * between, between, rows, k64, 0, tile(b, t));
  }

  static constexpr int64_t kTile = kDotMaxRows * kPanelN;

  // A tile's sums c, and what becomes of them. With steps they are integers.
  struct Out {
    EpilogueTile<T, float> tile;
    EpilogueFn<T, float> fn;
    EpilogueFn<T> steps_fn;  // or null
    float* c;
    int rows;

    int32_t* acc() const { return reinterpret_cast<int32_t*>(c); }
    void run(int begin, int end) const {
      const auto& t = tile;
      end = std::min(end, rows);
      if (!steps_fn) return fn(t, begin, end);
      steps_fn({acc(), t.s_x, t.s_w, t.bias, t.residual, t.y, t.ld, t.cols, t.past_cache}, begin, end);
    }
    static void done(const void* self, int begin, int end) { static_cast<const Out*>(self)->run(begin, end); }
  };

  // What the tasks [begin, end) of a thread share, and what the tiles of a few panels in turn are.
  struct Work {
    float *c, *scale;
    int8_t* w;
    int32_t* acc;
    Out* outs;
    // A tile that is not finished keeps those of its panel.
    alignas(64) float bias[kMaxBeside][kPanelN], s_w[kMaxBeside][kPanelN];
  };

  void multiply(int64_t begin, int64_t end) {
    thread_local Scratch sums, acc, epilogues, weights, scales;
    Work work;
    work.c =
        reinterpret_cast<float*>(sums.get(std::max<int64_t>(blocks.max_tiles, kMaxBeside) * kTile * sizeof(float)));
    work.acc = reinterpret_cast<int32_t*>(acc.get(4 * kTile * sizeof(int32_t)));
    work.outs = reinterpret_cast<Out*>(epilogues.get(kMaxBeside * blocks.max_tiles * sizeof(Out)));
    work.w = weights.get((kernels.tiles ? range_quads : quads) * kPanelRow);
    work.scale = reinterpret_cast<float*>(scales.get(2 * range_groups() * kPanelN * sizeof(float)));
    if (kernels.tiles && quads) {
      multiply_tiles(begin, end, work);
    } else {
      for (int64_t task = begin; task < end; task++) {
        const int64_t b = first_block + task / panels;
        if (const int64_t done = multiply_beside(b, task, end, work)) {
          task += done - 1;
          continue;
        }
        const Int4Panel panel = panel_of(task);
        const Out* out = prepare(task, panel, work);
        if (fits_fused(b))
          multiply_fused(b, panel, out);
        else if (panel.step && quads)
          multiply_steps(b, panel, out, work);
        else
          multiply_unpacked(b, panel, out, work);
        for (int64_t t = 0; t < blocks.tiles(b); t++) out[t].run(0, out[t].rows);
      }
    }
    if (past_cache) kernels.fence();
  }

  int64_t rows_of(int64_t b, int64_t t) const { return blocks.first_row(b, t + 1) - blocks.first_row(b, t); }
  int64_t range_groups() const { return range_quads / p.group_quads + 1; }
  int columns(int64_t task) const {
    return static_cast<int>(std::min<int64_t>(kPanelN, p.N - task % panels * kPanelN));
  }
  Int4Panel panel_of(int64_t task) const { return panel_at(p, task % panels * kPanelN); }

  // The tiles of a task.
  const Out* prepare(int64_t task, const Int4Panel& panel, Work& work, int64_t first_tile = 0) const {
    const int64_t b = first_block + task / panels, n0 = task % panels * kPanelN;
    Out* out = work.outs + task % kMaxBeside * blocks.max_tiles;
    float *bias = work.bias[task % kMaxBeside], *s_w = work.s_w[task % kMaxBeside];
    load_columns(p.bias, p.bias_type, n0, columns(task), bias);
    for (int n = 0; n < kPanelN; n++) s_w[n] = panel.step ? panel.step[n] : 1;
    const auto& typed = std::get<Int4TypeKernels<T>>(kernels.types);
    for (int64_t t = 0; t < blocks.tiles(b); t++) {
      const int64_t m0 = blocks.first_row(b, t), at = m0 * p.N + n0;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
      float* c = work.c + (first_tile + t) * kTile;
      out[t] = {{c, s_x + m0, s_w, bias, residual, static_cast<T*>(p.y) + at, p.N, columns(task), past_cache},
                typed.epilogue_for(p.activation),
                panel.step ? typed.steps_epilogue_for(p.activation) : nullptr,
                c,
                static_cast<int>(rows_of(b, t))};
    }
    return out;
  }

  bool fits_fused(int64_t b) const { return blocks.tiles(b) == 1 && rows_of(b, 0) <= kernels.max_fused; }

  Int4Args fused_args(int64_t b, int64_t t, const Int4Panel& panel, const Out* out) const {
    Int4Args args{};
    args.panel = panel;
    args.a = tile(b, t);
    args.sums = tile_sums(b, t);
    args.quads = quads;
    args.group_quads = p.group_quads;
    args.c = out->c;
    args.acc = out->acc();
    args.cached = t > 0;
    return args;
  }

  void multiply_fused(int64_t b, const Int4Panel& panel, const Out* out) const {
    (panel.step ? kernels.fused_steps : kernels.fused)[out->rows - 1](fused_args(b, 0, panel, out));
  }

  // How many tasks from this one on, of panels side by side, were done at once; 0 if that is not for them.
  int64_t multiply_beside(int64_t b, int64_t task, int64_t end, Work& work) const {
    if (!p.packed || !quads || blocks.tiles(b) > 1 || rows_of(b, 0) > kernels.max_beside) return 0;
    const Int4Beside& beside = kernels.beside[(rows_of(b, 0) - 1) / kernels.beside_rows];
    const int count = beside.panels;
    if (task + count > end || task % panels + count > panels) return 0;
    const Out* outs[kMaxBeside];
    Int4Args args[kMaxBeside];
    const bool steps = panel_of(task).step;
    if (!(steps ? beside.fused_steps : beside.fused)) return 0;
    for (int i = 1; i < count; i++)
      if (!panel_of(task + i).step == steps) return 0;
    for (int i = 0; i < count; i++) {
      const Int4Panel panel = panel_of(task + i);
      outs[i] = prepare(task + i, panel, work, i);
      args[i] = fused_args(b, 0, panel, outs[i]);
    }
    args[0].others = args + 1;
    (steps ? beside.fused_steps : beside.fused)(args[0]);
    for (int i = 0; i < count; i++) outs[i]->run(0, outs[i]->rows);
    return count;
  }

  void multiply_steps(int64_t b, const Int4Panel& panel, const Out* out, Work& work) {
    const int64_t tiles = blocks.tiles(b);
    kernels.unpack_steps(panel, quads, p.group_quads, kernels.flip, work.w);
    const int lines = static_cast<int>((16 + tiles - 1) / tiles);
    for (int64_t t = 0; t < tiles; t++) {
      Int4Args args{};
      args.w = work.w;
      args.a = tile(b, t);
      args.sums = kernels.sums ? tile_sums(b, t) + padded_groups * out[t].rows : nullptr;
      args.quads = quads;
      args.acc = out[t].acc();
      args.ahead = panel.weight + int4_panel_bytes(p.k64()) - kNibbleRow + t * lines * k64 * 64;
      args.ahead_lines = lines;
      kernels.steps[out[t].rows - 1](args);
    }
  }

  void multiply_unpacked(int64_t b, const Int4Panel& panel, const Out* out, Work& work) {
    const int64_t tiles = blocks.tiles(b);
    std::memset(work.c, 0, tiles * kTile * sizeof(float));
    for (int64_t q = 0; q < quads; q += range_quads) {
      const int64_t count = smaller(range_quads, quads - q), group = q / p.group_quads;
      kernels.unpack(panel_from(panel, group, p.group_quads), count, p.group_quads, kernels.offset, work.w, work.scale);
      const char* ahead = reinterpret_cast<const char*>(panel.weight) + (q + count) / 2 * kNibbleRow;
      const int lines = static_cast<int>((16 + tiles - 1) / tiles);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t rows = out[t].rows;
        Int4Args args{};
        args.w = work.w;
        args.scale = work.scale;
        args.a = tile(b, t) + q * 4 * rows;
        args.sums = kernels.sums ? tile_sums(b, t) + group * rows : nullptr;
        args.quads = count;
        args.group_quads = p.group_quads;
        args.c = out[t].c;
        args.acc = work.acc;
        args.ahead = ahead + t * lines * (count / 16) * 64;
        args.ahead_lines = lines;
        kernels.dot[rows - 1](args);
      }
    }
  }

  // AMX. The vector units are idle while tiles multiply: between their steps the sums of the groups before are scaled,
  // or, of panels with steps, the nibbles that come next unpacked.
  void multiply_tiles(int64_t begin, int64_t end, Work& work) {
#if defined(__x86_64__)
    Unscaled unscaled;
    const amx::TileShapes& free_shapes = p.group_quads == 8 ? amx::kHalfTileShapes : amx::kTileShapes;
    const amx::TileShapes* shapes = &free_shapes;  // as the tiles are configured
    int64_t range = 0;
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = first_block + task / panels, tiles = blocks.tiles(b);
      const Int4Panel panel = panel_of(task);
      const amx::TileShapes& wanted = !panel.step  ? free_shapes
                                      : tiles == 1 ? amx::shapes_of_rows(rows_of(b, 0))
                                                   : amx::kTileShapes;
      if (shapes != &wanted) amx::configure(*(shapes = &wanted));
      if (panel.step) {
        amx::finish_rows(unscaled);
        if (const int64_t done = multiply_beside(b, task, end, work)) {
          task += done - 1;
          continue;
        }
      }
      const Out* out = prepare(task, panel, work);
      if (panel.step) {
        for (int64_t t = 0; t < tiles; t++) {
          kernels.fused_steps[out[t].rows > 16](fused_args(b, t, panel, out + t));
          out[t].run(0, out[t].rows);
        }
        continue;
      }
      for (int64_t q = 0; q < quads; q += range_quads, range++) {
        const int64_t count = smaller(range_quads, quads - q);
        // Two in turn: sums that are not scaled yet go on to need theirs.
        float* scale = work.scale + range % 2 * range_groups() * kPanelN;
        kernels.unpack(panel_from(panel, q / p.group_quads, p.group_quads), count, p.group_quads, 0, work.w, scale);
        for (int64_t t = 0; t < tiles; t++) {
          const bool two = out[t].rows > 16;
          Int4Args args{};
          args.w = work.w;
          args.scale = scale;
          args.a = tile(b, t) + q * 4 * (two ? 32 : 16);
          args.quads = count;
          args.group_quads = p.group_quads;
          args.c = out[t].c;
          args.acc = work.acc;
          args.unscaled = &unscaled;
          args.first = q == 0;
          args.done = q + count == quads ? Out::done : nullptr;
          args.self = &out[t];
          kernels.dot[two + (p.group_quads == 8 ? 2 : 0)](args);
        }
      }
    }
    amx::finish_rows(unscaled);
#endif
  }

  const Int4Problem& p;
  const Int4Kernels& kernels;
  const int64_t k64, quads, padded_groups, panels;
  const Blocks blocks;
  const int64_t tile_bytes, range_quads;
  const bool past_cache;
  int64_t first_block = 0;  // of the wave
  int8_t* a = nullptr;      // the wave's quantized rows, tile by tile
  float* s_x = nullptr;     // [M]
  int32_t* sums = nullptr;  // of the wave's tiles
};

Tensor int4_linear_cpu(Tensor x, Tensor weight, Tensor w_scale, std::optional<Tensor> w_zero,
                       std::optional<Tensor> bias, std::optional<Tensor> residual, Activation activation,
                       int64_t group_size, int64_t out_features, std::optional<Tensor> order, Compute compute) {
  constexpr const char* op = "int4_linear";
  check_on_cpu(op, x, weight, w_scale, {&w_zero, &bias, &residual, &order});
  Int4Problem p{};
  set_sizes(op, x, out_features, p);
  STD_TORCH_CHECK(p.N >= 0 && p.K <= INT32_MAX / (127 * 16), "int4_linear: K=", p.K, " could overflow the int32 sum");
  STD_TORCH_CHECK(is_group_size(group_size), "int4_linear: group_size is ", group_size,
                  "; allowed: 32, a multiple of 64, or -1");

  p.packed = weight.dim() == 3;
  const int64_t k64 = p.k64(), panels = panels_of(p.N);
  p.group_quads = group_quads_of(group_size, p.K);
  p.groups = group_size == -1 ? std::min<int64_t>(p.K, 1) : (p.K + group_size - 1) / group_size;
  const int64_t padded_groups = p.padded_groups();
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Byte, "int4_linear: weight must be uint8");
  STD_TORCH_CHECK(p.packed ? weight.size(0) == panels && weight.size(1) == 1 + 8 * k64 && weight.size(2) == kNibbleRow
                           : weight.dim() == 2 && weight.size(0) == p.N && weight.size(1) == (p.K + 1) / 2,
                  "int4_linear: weight does not fit N=", p.N, " (out_features) and K=", p.K, " (x)");
  p.scale_type = w_scale.scalar_type();
  check_float_type(p.scale_type, op, "w_scale");
  STD_TORCH_CHECK(!w_zero || w_zero->scalar_type() == ScalarType::Byte, "int4_linear: w_zero must be uint8");
  for (const Tensor* t : {&w_scale, w_zero ? &*w_zero : &w_scale})
    STD_TORCH_CHECK(p.packed
                        ? t->dim() == 3 && t->size(0) == panels && t->size(1) == padded_groups && t->size(2) == kPanelN
                        : t->dim() == 2 && t->size(0) == p.N && t->size(1) == p.groups,
                    "int4_linear: w_scale or w_zero do not fit N=", p.N, ", K=", p.K, " and group_size=", group_size);
  Tensor y = empty_result(x, p.N);
  load_shared(op, x, bias, residual, y, activation, p);
  if (p.M == 0 || p.N == 0) return y;
  weight = as_contiguous(weight);
  w_scale = as_contiguous(w_scale);
  p.weight = static_cast<const uint8_t*>(weight.const_data_ptr());
  p.scale = w_scale.const_data_ptr();
  if (w_zero) {
    w_zero = as_contiguous(*w_zero);
    p.zero = static_cast<const uint8_t*>(w_zero->const_data_ptr());
  }
  if (order) {
    STD_TORCH_CHECK(order->scalar_type() == ScalarType::Int && order->numel() == p.K,
                    "int4_linear: order must be int32 with an element for each column of x");
    order = as_contiguous(*order);
    p.order = static_cast<const int32_t*>(order->const_data_ptr());
    for (int64_t k = 0; k < p.K; k++)
      STD_TORCH_CHECK(p.order[k] >= 0 && p.order[k] < p.K, "int4_linear: order[", k, "] is ", p.order[k],
                      "; x has K=", p.K);
  }
  if (compute != Compute::int8)
    int4_linear_float(p);
  else
    by_float_type(p.x_type, [&](auto tag) { Int4Linear<typename decltype(tag)::type>(p).run(); });
  return y;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("int4_linear", TORCH_BOX(&pyops::int4_linear_cpu)); }
