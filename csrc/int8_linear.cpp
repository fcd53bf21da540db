// y[m, n] = act(s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + bias[n] + residual[m, n])      (pyops/ops/int8_linear.py)
//
// Rows are quantized once into scratch, in tiles of as many rows as a kernel holds in registers. Blocks of row tiles
// that fit in L2 then meet every panel of 32 output channels: tile kernel (int8_dot.h), accumulators through L1 into
// the epilogue (epilogue.h): 128 bytes a row written and read once there cost about a hundredth of a tile, and one
// epilogue serves every instruction set. Work is cut into (block, panel) pairs, even over the threads.
#include <tuple>

#include "epilogue.h"
#include "int8_dot.h"
#include "int8_pack.h"
#include "linear_args.h"
#include "quantize_rows.h"
#include "row_tiles.h"
#include "scratch.h"
#include "tensor.h"

namespace pyops {
namespace {

constexpr int kMaxBeside = 3, kMaxBesideRows = 16;  // panels side by side, and the rows that read them so
constexpr int64_t kAmxSteps = 16;                   // 64·16 k of a panel, 32 KiB, stay in L1 while the row tiles pass

// ------------------------------------------------------------------------------------------------- kernels of an ISA

template <class T>
struct TypeKernels {
  float (*quantize)(const T* x, int64_t K, const float* scale, int8_t* q, int64_t chunk_stride);
  float (*quantize_smooth)(const T* x, const float* factors, int64_t K, const float* scale, int8_t* q,
                           int64_t chunk_stride);
  EpilogueFn<T> (*epilogue_for)(Activation);
};

struct Beside {
  int panels;
  DotFn dot;
};

template <int MR, int P>
constexpr Beside beside(DotFn dot) {
  static_assert(MR <= kMaxBesideRows && P <= kMaxBeside);
  return {P, dot};
}

struct Kernels {
  int max_rows;  // rows of a tile
  bool tiles;    // rows in AMX tiles, else in quads
  uint8_t flip;  // xor on the quantized rows
  double macs_per_cycle;
  const DotFn* dot;             // quads: dot[r - 1] for r rows; tiles: dot[0] for 16, dot[1] for 32
  int max_beside, beside_rows;  // rows for which several panels are read side by side: beside[(r - 1) / beside_rows]
  const Beside* beside;
  decltype(&pack_quads) pack_rows;  // null for tiles, which are quantized in place
  decltype(&pack_panel) panel_packer;
  void (*reciprocals)(const float* smooth, int64_t K, float* factors);
  void (*fence)();
  std::tuple<TypeKernels<float>, TypeKernels<bf16>, TypeKernels<fp16>> types;
};

// What all kernels of a vector ISA share.
#define PYOPS_TYPED(isa, T) \
  TypeKernels<T> { isa::quantize_row<T>, isa::quantize_smooth_row<T>, isa::epilogue_for<T> }
#define PYOPS_SHARED(isa) \
  isa::reciprocals, isa::fence_streams, { PYOPS_TYPED(isa, float), PYOPS_TYPED(isa, bf16), PYOPS_TYPED(isa, fp16) }

const Kernels& select(Isa isa, int64_t M) {
  static constexpr DotFn kGeneric[] = {generic::int8_dot<1>, generic::int8_dot<2>, generic::int8_dot<3>,
                                       generic::int8_dot<4>};
  static const Kernels generic{4, false, 0, 2, kGeneric, 0, 1, nullptr, pack_quads, pack_panel, PYOPS_SHARED(generic)};
#if defined(__x86_64__)
  static constexpr DotFn kAvx2[] = {avx2::int8_dot<1>, avx2::int8_dot<2>, avx2::int8_dot<3>};
  static constexpr DotFn kAvx512[] = {avx512::int8_dot<1>, avx512::int8_dot<2>, avx512::int8_dot<3>,
                                      avx512::int8_dot<4>, avx512::int8_dot<5>, avx512::int8_dot<6>,
                                      avx512::int8_dot<7>, avx512::int8_dot<8>};
  using namespace avx512vnni;
  static constexpr DotFn kVnni[] = {int8_dot<1>,  int8_dot<2>,  int8_dot<3>,  int8_dot<4>, int8_dot<5>,
                                    int8_dot<6>,  int8_dot<7>,  int8_dot<8>,  int8_dot<9>, int8_dot<10>,
                                    int8_dot<11>, int8_dot<12>, int8_dot<13>, int8_dot<14>};
  static constexpr Beside kBeside[] = {beside<1, 3>(int8_dot_beside<1, 3>), beside<2, 2>(int8_dot_beside<2, 2>),
                                       beside<3, 2>(int8_dot_beside<3, 2>), beside<4, 2>(int8_dot_beside<4, 2>)};
  static constexpr Beside kAmxBeside[] = {beside<16, 2>(amx::int8_dot_beside)};
  static constexpr DotFn kAmx[] = {amx::int8_dot<1>, amx::int8_dot<2>};
  static const Kernels avx2{3, false, 0, 24, kAvx2, 0, 1, nullptr, pack_quads, pack_panel, PYOPS_SHARED(avx2)};
  static const Kernels avx512{
      8, false, 0, 40, kAvx512, 0, 1, nullptr, pack_quads_avx512, pack_panel_avx512, PYOPS_SHARED(avx512)};
  static const Kernels vnni{
      14, false, 0x80, 128, kVnni, 4, 1, kBeside, pack_quads_avx512, pack_panel_avx512, PYOPS_SHARED(avx512)};
  static const Kernels amx{
      32, true, 0, 800, kAmx, 16, 16, kAmxBeside, nullptr, pack_panel_avx512, PYOPS_SHARED(avx512)};
  switch (isa) {
    case Isa::amx:
      return M <= 4 ? vnni : amx;  // a tile would be mostly padding; one to four rows only stream weights
    case Isa::avx512vnni:
      return vnni;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    case Isa::generic:
      break;
  }
#endif
  (void)isa, (void)M;
  return generic;
}

// -------------------------------------------------------------------------------------------------------- launcher

struct Problem : LinearProblem {
  const int8_t* weight;
  bool packed;
  const float *w_scale, *x_scale, *smooth;
  int64_t x_scales;  // 0 dynamic, 1 one for all, M one a row
};

template <class T>
class Int8Linear {
 public:
  explicit Int8Linear(const Problem& problem)
      : p(problem),
        kernels(select(active_isa(), p.M)),
        k64((p.K + 63) / 64),
        panels(panels_of(p.N)),
        blocks(p.M, k64, kernels.max_rows),
        tile_bytes((kernels.tiles ? kDotMaxRows : kernels.max_rows) * k64 * 64),
        past_cache(p.K >= kPastCacheMinK && p.M * p.N * int64_t(sizeof(T)) >= kPastCacheBytes &&
                   whole_lines(static_cast<T*>(p.y), p.N)) {}

  // In waves of blocks, which bound the scratch however many rows there are.
  void run() {
    const int64_t wave = std::min(blocks.count, std::max<int64_t>(kMinWave, torch::stable::get_num_threads()));
    thread_local Scratch scratch, scales, factors_scratch;
    if (p.smooth) {
      factors = reinterpret_cast<float*>(factors_scratch.get(p.K * sizeof(float)));
      kernels.reciprocals(p.smooth, p.K, factors);
    }
    a = scratch.get(wave * blocks.max_tiles * tile_bytes);
    s_x = reinterpret_cast<float*>(scales.get(p.M * sizeof(float)));
    for (first_block = 0; first_block < blocks.count; first_block += wave)
      run_wave(std::min(wave, blocks.count - first_block));
  }

 private:
  void run_wave(int64_t count) {
    in_parallel(count * blocks.max_tiles, kernels.max_rows * (p.K / 4.0 + 20), [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) quantize(first_block + i / blocks.max_tiles, i % blocks.max_tiles);
    });
    // A panel costs its bytes at about 8 a cycle or its products, whichever is more, and its epilogue.
    const double rows = static_cast<double>(p.M) / blocks.count;
    const double cycles = kPanelN * double(p.K) * std::max(1.0 / 8, rows / kernels.macs_per_cycle) + 20 * rows + 50;
    in_parallel(count * panels, cycles, [this](int64_t begin, int64_t end) {
#if defined(__x86_64__)
      if (kernels.tiles)
        return amx::with_tiles([&] { multiply(begin, end); },
                               p.M <= kDotMaxRows ? amx::shapes_of_rows(p.M) : amx::kTileShapes);
#endif
      multiply(begin, end);
    });
  }

  int8_t* tile(int64_t b, int64_t t) const { return a + ((b - first_block) * blocks.max_tiles + t) * tile_bytes; }

  void quantize(int64_t b, int64_t t) {
    if (t >= blocks.tiles(b)) return;
    const int64_t m0 = blocks.first_row(b, t);
    const int rows = static_cast<int>(blocks.first_row(b, t + 1) - m0);
    thread_local Scratch scratch;
    // Rows on their way to quads lie an odd number of cache lines apart, so that K = 2ⁿ does not alias in L1.
    const int64_t between = k64 % 2 ? k64 * 64 : k64 * 64 + 64;
    int8_t* q = kernels.tiles ? tile(b, t) : scratch.get(rows * between);
    const int64_t row_stride = kernels.tiles ? 64 : between;
    const int64_t chunk_stride = kernels.tiles ? (rows > 16 ? 32 : 16) * 64 : 64;
    const TypeKernels<T>& typed = std::get<TypeKernels<T>>(kernels.types);
    for (int64_t m = m0; m < m0 + rows; m++, q += row_stride) {
      const float* given = p.x_scales ? p.x_scale + (p.x_scales == 1 ? 0 : m) : nullptr;
      const T* x = static_cast<const T*>(p.x) + m * p.K;
      s_x[m] = factors ? typed.quantize_smooth(x, factors, p.K, given, q, chunk_stride)
                       : typed.quantize(x, p.K, given, q, chunk_stride);
    }
    if (!kernels.tiles) kernels.pack_rows(q - rows * between, between, rows, k64, kernels.flip, tile(b, t));
  }

  // How the row tiles of a block meet a panel: in steps of 64·k_step k, fetching the panel's own stream or, for each 64
  // k, `lines` cache lines of the next panel.
  struct Walk {
    int64_t k_step;
    bool own_stream;
    int lines;
  };
  Walk walk_of(int64_t tiles) const {
    const int share = static_cast<int>((kPanelStep / 64 + tiles - 1) / tiles);
    const int64_t whole = std::max<int64_t>(k64, 1);
    if (!kernels.tiles) return {whole, tiles == 1, share};
    // Two or three AMX tiles are fed best by the hardware's own prefetch; more of them share the work of fetching.
    if (tiles == 1) return {whole, true, 0};
    if (tiles < 4) return {kAmxSteps / 2, false, 0};
    return {kAmxSteps, false, share};
  }

  // A tile whose sums are complete and whose epilogue is not.
  struct Pending {
    EpilogueTile<T> tile;
    EpilogueFn<T> fn;
    int next = 0, rows = 0;

    void some(int n) {
      const int end = std::min(next + n, rows);
      fn(tile, next, end);
      next = end;
    }
    static void advance(void* self, int n) { static_cast<Pending*>(self)->some(n); }
  };

  // Does the first of the tasks [begin, end), several panels at a time, if the rows are few; returns the first task
  // left.
  int64_t multiply_beside(int64_t begin, int64_t end) {
    if (!p.packed || p.M > kernels.max_beside) return begin;
    const Beside& beside = kernels.beside[(p.M - 1) / kernels.beside_rows];
    const auto epilogue = std::get<TypeKernels<T>>(kernels.types).epilogue_for(p.activation);
    alignas(64) int32_t acc[kMaxBeside][kMaxBesideRows * kPanelN];
    alignas(64) float s_w[kPanelN], bias[kPanelN];
    DotArgs args[kMaxBeside];
    for (; begin + beside.panels <= end; begin += beside.panels) {
      for (int i = 0; i < beside.panels; i++)
        args[i] = {tile(0, 0), p.weight + (begin + i) * panel_bytes(k64), 0, k64, acc[i], nullptr, 0};
      args[0].others = args + 1;
      beside.dot(args[0]);
      for (int i = 0; i < beside.panels; i++) {
        const int64_t n0 = (begin + i) * kPanelN;
        const int cols = static_cast<int>(std::min<int64_t>(kPanelN, p.N - n0));
        load_columns(p.w_scale, ScalarType::Float, n0, cols, s_w);
        load_columns(p.bias, p.bias_type, n0, cols, bias);
        const T* added = p.residual ? residual() + n0 : nullptr;
        epilogue({acc[i], s_x, s_w, bias, added, y() + n0, p.N, cols, past_cache}, 0, static_cast<int>(p.M));
      }
    }
    return begin;
  }

  // Tasks [begin, end) of the wave's (block, panel) pairs. With AMX the epilogue of a tile runs between the steps of
  // the next one.
  void multiply(int64_t begin, int64_t end) {
    thread_local Scratch panel_scratch, acc_scratch;
    constexpr int64_t kAcc = kDotMaxRows * kPanelN;
    const int64_t accs = kernels.tiles ? blocks.max_tiles : 1;
    int32_t* acc = reinterpret_cast<int32_t*>(acc_scratch.get(accs * kAcc * sizeof(int32_t)));
    alignas(64) float s_w[2][kPanelN], bias[2][kPanelN];  // a pending tile keeps those of its panel
    begin = multiply_beside(begin, end);
    Pending pending{{}, std::get<TypeKernels<T>>(kernels.types).epilogue_for(p.activation)};
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = first_block + task / panels, n0 = task % panels * kPanelN;
      const int cols = static_cast<int>(std::min<int64_t>(kPanelN, p.N - n0));
      const int8_t* panel = p.weight + n0 / kPanelN * panel_bytes(k64);
      if (!p.packed) {
        int8_t* packed = panel_scratch.get(panel_bytes(k64));
        kernels.panel_packer(p.weight + n0 * p.K, cols, p.K, packed);
        panel = packed;
      }
      load_columns(p.w_scale, ScalarType::Float, n0, cols, s_w[task % 2]);
      load_columns(p.bias, p.bias_type, n0, cols, bias[task % 2]);
      const int64_t tiles = blocks.tiles(b);
      const Walk walk = walk_of(tiles);
      const int8_t* ahead = walk.own_stream ? nullptr : panel + panel_bytes(k64);
      for (int64_t k = 0; k < std::max<int64_t>(k64, 1); k += walk.k_step)
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t m0 = blocks.first_row(b, t), rows = blocks.first_row(b, t + 1) - m0;
          const int64_t k_end = std::min(k + walk.k_step, k64);
          int32_t* sums = acc + t % accs * kAcc;
          DotArgs args{tile(b, t), panel, k, k_end, sums, ahead, walk.lines};
          if (pending.next < pending.rows) args.background = {Pending::advance, &pending, pending.rows - pending.next};
          kernels.dot[kernels.tiles ? rows > 16 : rows - 1](args);
          if (ahead) ahead += (k_end - k) * walk.lines * 64;
          if (k_end < k64) continue;
          const int64_t at = m0 * p.N + n0;
          pending.some(pending.rows);
          pending.tile = {sums,     s_x + m0, s_w[task % 2], bias[task % 2], p.residual ? residual() + at : nullptr,
                          y() + at, p.N,      cols,          past_cache};
          pending.next = 0;
          pending.rows = static_cast<int>(rows);
          if (!kernels.tiles) pending.some(pending.rows);
        }
    }
    pending.some(pending.rows);
    if (past_cache) kernels.fence();
  }

  const T* residual() const { return static_cast<const T*>(p.residual); }
  T* y() const { return static_cast<T*>(p.y); }

  const Problem& p;
  const Kernels& kernels;
  const int64_t k64, panels;
  const Blocks blocks;
  const int64_t tile_bytes;
  const bool past_cache;
  int64_t first_block = 0;   // of the wave
  int8_t* a = nullptr;       // the wave's quantized rows, tile by tile
  float* s_x = nullptr;      // [M]
  float* factors = nullptr;  // [K], 1 / smooth
};

Tensor int8_linear_cpu(Tensor x, Tensor weight, Tensor w_scale, std::optional<Tensor> bias,
                       std::optional<Tensor> residual, Activation activation, std::optional<Tensor> x_scale,
                       std::optional<Tensor> smooth) {
  constexpr const char* op = "int8_linear";
  check_on_cpu(op, x, weight, w_scale, {&bias, &residual, &x_scale, &smooth});
  Problem p{};
  set_sizes(op, x, w_scale.numel(), p);
  p.packed = check_int8_weight(op, weight, w_scale, p);
  Tensor y = empty_result(x, p.N);
  load_shared(op, x, bias, residual, y, activation, p);
  if (p.M == 0 || p.N == 0) return y;
  weight = as_contiguous(weight);
  w_scale = as_contiguous(w_scale);
  p.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  p.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
  if (x_scale) {
    p.x_scales = x_scale->numel();
    STD_TORCH_CHECK((p.x_scales == 1 || p.x_scales == p.M) && x_scale->scalar_type() == ScalarType::Float,
                    "int8_linear: x_scale must be fp32 with one element or one for each row");
    x_scale = as_contiguous(*x_scale);
    p.x_scale = static_cast<const float*>(x_scale->const_data_ptr());
  }
  if (smooth) {
    STD_TORCH_CHECK(smooth->numel() == p.K && smooth->scalar_type() == ScalarType::Float,
                    "int8_linear: smooth must be fp32 with ", p.K, " elements, one for each column of x");
    smooth = as_contiguous(*smooth);
    p.smooth = static_cast<const float*>(smooth->const_data_ptr());
  }
  by_float_type(p.x_type, [&](auto tag) { Int8Linear<typename decltype(tag)::type>(p).run(); });
  return y;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("int8_linear", TORCH_BOX(&pyops::int8_linear_cpu)); }
