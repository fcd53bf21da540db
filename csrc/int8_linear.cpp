// y[m, n] = act(s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + bias[n] + residual[m, n])      (pyops/ops/int8_linear.py)
//
// Rows are quantized once into scratch, in tiles of as many rows as a kernel holds in registers. Blocks of row tiles
// that fit in L2 then meet every panel of 32 output channels: tile kernel (int8_dot.h), accumulators through L1 into
// the epilogue (epilogue.h): 128 bytes a row written and read once there cost about a hundredth of a tile, and one
// epilogue serves every instruction set. Work is cut into (block, panel) pairs, even over the threads.
#include <algorithm>
#include <tuple>

#include "epilogue.h"
#include "int8_dot.h"
#include "quantize_rows.h"
#include "scratch.h"
#include "tensor.h"

namespace pyops {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;  // quantized rows of a block: half of a 2 MiB L2, the rest is for panels
constexpr int64_t kMaxBlockRows = 512;    // so that a block's accumulators stay in L2 as well
constexpr int64_t kMinWave = 16;          // blocks that are quantized before they are multiplied, or one a thread
// A result of this size is stored past the caches, unless K is so short that storing is all there is to do.
constexpr int64_t kPastCacheBytes = 4 << 20;
constexpr int64_t kPastCacheMinK = 512;
constexpr int64_t kAmxSteps = 16;       // 64·16 k of a panel, 32 KiB, stay in L1 while the row tiles pass
constexpr double kTaskCycles = 30'000;  // less work than this is not worth another thread

// ------------------------------------------------------------------------------------------------- row layouts

// rows x [k64·64] row-major, `stride` bytes apart → quads [k64·16][rows][4], each byte xor `flip`.
void pack_quads(const int8_t* rows, int64_t stride, int n, int64_t k64, uint8_t flip, int8_t* out) {
  const int32_t flips = 0x01010101 * flip;
  for (int64_t k = 0; k < k64 * 16; k++)
    for (int r = 0; r < n; r++, out += 4) {
      const int32_t v = quad(rows + r * stride + k * 4) ^ flips;
      std::memcpy(out, &v, 4);
    }
}

// `rows` rows of a canonical weight [N, K] → a panel, as pack_int8 lays it out.
void pack_panel(const int8_t* w, int rows, int64_t K, int8_t* panel) {
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
// 16 x 16 transpose of 32-bit elements.
PYOPS_INLINE void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

void pack_quads_avx512(const int8_t* rows, int64_t stride, int n, int64_t k64, uint8_t flip, int8_t* out) {
  const __m512i flips = _mm512_set1_epi8(static_cast<char>(flip));
  const __mmask16 wanted = static_cast<__mmask16>((1u << n) - 1);
  for (int64_t k = 0; k < k64; k++) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = i < n ? _mm512_loadu_si512(rows + i * stride + k * 64) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < 16; i++, out += n * 4) _mm512_mask_storeu_epi32(out, wanted, _mm512_xor_si512(r[i], flips));
  }
}

void pack_panel_avx512(const int8_t* w, int rows, int64_t K, int8_t* panel) {
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

// ------------------------------------------------------------------------------------------------- kernels of an ISA

template <class T>
struct TypeKernels {
  float (*quantize)(const T* x, int64_t K, const float* scale, int8_t* q, int64_t chunk_stride);
  EpilogueFn<T> (*epilogue_for)(Activation);
};

struct Kernels {
  int max_rows;  // rows of a tile
  bool tiles;    // rows in AMX tiles, else in quads
  uint8_t flip;  // xor on the quantized rows
  double macs_per_cycle;
  const DotFn* dot;                 // quads: dot[r - 1] for r rows; tiles: dot[0] for 16, dot[1] for 32
  decltype(&pack_quads) pack_rows;  // null for tiles, which are quantized in place
  decltype(&pack_panel) panel_packer;
  void (*fence)();
  std::tuple<TypeKernels<float>, TypeKernels<bf16>, TypeKernels<fp16>> types;
};

// What all kernels of a vector ISA share.
#define PYOPS_SHARED(isa)                                                                        \
  isa::fence_streams, {                                                                          \
    TypeKernels<float>{isa::quantize_row<float>, isa::epilogue_for<float>},                      \
        TypeKernels<bf16>{isa::quantize_row<bf16>, isa::epilogue_for<bf16>}, TypeKernels<fp16> { \
      isa::quantize_row<fp16>, isa::epilogue_for<fp16>                                           \
    }                                                                                            \
  }

const Kernels& select(Isa isa, int64_t M) {
  static constexpr DotFn kGeneric[] = {generic::int8_dot<1>, generic::int8_dot<2>, generic::int8_dot<3>,
                                       generic::int8_dot<4>};
  static const Kernels generic{4, false, 0, 2, kGeneric, pack_quads, pack_panel, PYOPS_SHARED(generic)};
#if defined(__x86_64__)
  static constexpr DotFn kAvx2[] = {avx2::int8_dot<1>, avx2::int8_dot<2>, avx2::int8_dot<3>};
  static constexpr DotFn kAvx512[] = {avx512::int8_dot<1>, avx512::int8_dot<2>, avx512::int8_dot<3>,
                                      avx512::int8_dot<4>, avx512::int8_dot<5>, avx512::int8_dot<6>,
                                      avx512::int8_dot<7>, avx512::int8_dot<8>};
  using namespace avx512vnni;
  static constexpr DotFn kVnni[] = {int8_dot<1>,  int8_dot<2>,  int8_dot<3>,  int8_dot<4>, int8_dot<5>,
                                    int8_dot<6>,  int8_dot<7>,  int8_dot<8>,  int8_dot<9>, int8_dot<10>,
                                    int8_dot<11>, int8_dot<12>, int8_dot<13>, int8_dot<14>};
  static constexpr DotFn kAmx[] = {amx::int8_dot<1>, amx::int8_dot<2>};
  static const Kernels avx2{3, false, 0, 24, kAvx2, pack_quads, pack_panel, PYOPS_SHARED(avx2)};
  static const Kernels avx512{8, false, 0, 40, kAvx512, pack_quads_avx512, pack_panel_avx512, PYOPS_SHARED(avx512)};
  static const Kernels vnni{14, false, 0x80, 128, kVnni, pack_quads_avx512, pack_panel_avx512, PYOPS_SHARED(avx512)};
  static const Kernels amx{32, true, 0, 800, kAmx, nullptr, pack_panel_avx512, PYOPS_SHARED(avx512)};
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

struct Problem {
  int64_t M, N, K;
  const void *x, *residual, *bias;
  void* y;
  ScalarType bias_type;
  const int8_t* weight;
  bool packed;
  const float *w_scale, *x_scale;
  int64_t x_scales;  // 0 dynamic, 1 one for all, M one a row
  Activation activation;
};

// Rows are cut into blocks that fit in L2, blocks evenly into tiles of at most Kernels::max_rows.
struct Blocks {
  int64_t M, count, max_tiles;
  int max_rows;

  Blocks(int64_t M, int64_t k64, int max_rows) : M(M), max_rows(max_rows) {
    const int64_t fit = kBlockBytes / std::max<int64_t>(k64 * 64, 1) / kDotMaxRows * kDotMaxRows;
    const int64_t block_rows = std::clamp<int64_t>(fit, kDotMaxRows, kMaxBlockRows);
    count = (M + block_rows - 1) / block_rows;
    max_tiles = ((M + count - 1) / count + max_rows - 1) / max_rows;
  }
  int64_t first_row(int64_t b) const { return count == 1 ? b * M : M * b / count; }
  int64_t tiles(int64_t b) const { return (first_row(b + 1) - first_row(b) + max_rows - 1) / max_rows; }
  // First row of tile t of block b; t may be one past the last.
  int64_t first_row(int64_t b, int64_t t) const {
    const int64_t m0 = first_row(b), n = tiles(b);
    return n == 1 ? m0 + t * (first_row(b + 1) - m0) : m0 + (first_row(b + 1) - m0) * t / n;
  }
};

// Calls work(begin, end) over parts of [0, n), on threads if the whole takes more than kTaskCycles.
template <class F>
void in_parallel(int64_t n, double cycles_each, const F& work) {
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(kTaskCycles / cycles_each));
  if (n <= grain)
    work(0, n);
  else
    torch::stable::parallel_for(0, n, grain, work);
}

// `cols` elements at p + n0 as fp32, zeros up to 32.
void load_columns(const void* p, ScalarType type, int64_t n0, int cols, float* out) {
  if (p && cols == kPanelN && type == ScalarType::Float) {
    std::memcpy(out, static_cast<const float*>(p) + n0, kPanelN * sizeof(float));
    return;
  }
  std::memset(out, 0, kPanelN * sizeof(float));
  for (int n = 0; p && n < cols; n++) {
    if (type == ScalarType::Float) out[n] = static_cast<const float*>(p)[n0 + n];
    if (type == ScalarType::BFloat16) out[n] = static_cast<const bf16*>(p)[n0 + n];
    if (type == ScalarType::Half) out[n] = static_cast<const fp16*>(p)[n0 + n];
  }
}

template <class T>
class Int8Linear {
 public:
  explicit Int8Linear(const Problem& problem)
      : p(problem),
        kernels(select(active_isa(), p.M)),
        k64((p.K + 63) / 64),
        panels((p.N + kPanelN - 1) / kPanelN),
        blocks(p.M, k64, kernels.max_rows),
        tile_bytes((kernels.tiles ? kDotMaxRows : kernels.max_rows) * k64 * 64),
        past_cache(p.K >= kPastCacheMinK && p.M * p.N * int64_t(sizeof(T)) >= kPastCacheBytes &&
                   whole_lines(static_cast<T*>(p.y), p.N)) {}

  // In waves of blocks, which bound the scratch however many rows there are.
  void run() {
    const int64_t wave = std::min(blocks.count, std::max<int64_t>(kMinWave, torch::stable::get_num_threads()));
    thread_local Scratch scratch, scales;
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
      if (kernels.tiles) return amx::with_tiles([&] { multiply(begin, end); });
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
    const auto quantize_row = std::get<TypeKernels<T>>(kernels.types).quantize;
    for (int64_t m = m0; m < m0 + rows; m++, q += row_stride) {
      const float* given = p.x_scales ? p.x_scale + (p.x_scales == 1 ? 0 : m) : nullptr;
      s_x[m] = quantize_row(static_cast<const T*>(p.x) + m * p.K, p.K, given, q, chunk_stride);
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

  // Tasks [begin, end) of the wave's (block, panel) pairs. With AMX the epilogue of a tile runs between the steps of
  // the next one.
  void multiply(int64_t begin, int64_t end) {
    thread_local Scratch panel_scratch, acc_scratch;
    constexpr int64_t kAcc = kDotMaxRows * kPanelN;
    const int64_t accs = kernels.tiles ? blocks.max_tiles : 1;
    int32_t* acc = reinterpret_cast<int32_t*>(acc_scratch.get(accs * kAcc * sizeof(int32_t)));
    alignas(64) float s_w[2][kPanelN], bias[2][kPanelN];  // a pending tile keeps those of its panel
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
  int64_t first_block = 0;  // of the wave
  int8_t* a = nullptr;      // the wave's quantized rows, tile by tile
  float* s_x = nullptr;     // [M]
};

Tensor int8_linear_cpu(Tensor x, Tensor weight, Tensor w_scale, std::optional<Tensor> bias,
                       std::optional<Tensor> residual, Activation activation, std::optional<Tensor> x_scale) {
  for (const auto& t : {&bias, &residual, &x_scale})
    STD_TORCH_CHECK(!*t || (*t)->is_cpu(), "int8_linear: all tensors must be on the CPU, as x is");
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu() && w_scale.is_cpu(),
                  "int8_linear: x, weight and w_scale must be on the CPU");
  Problem p{};
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1, "int8_linear: x must be [..., K]");
  p.K = x.size(dim - 1);
  p.N = w_scale.numel();
  p.M = 1;
  int64_t sizes[64];
  STD_TORCH_CHECK(dim <= 64, "int8_linear: x has more than 64 dimensions");
  for (int64_t i = 0; i < dim - 1; i++) p.M *= sizes[i] = x.size(i);
  sizes[dim - 1] = p.N;

  p.packed = weight.dim() == 3;
  const int64_t k64 = (p.K + 63) / 64, panels = (p.N + kPanelN - 1) / kPanelN;
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "int8_linear: weight must be int8");
  STD_TORCH_CHECK(p.packed ? weight.size(0) == panels && weight.size(1) == 1 + 16 * k64 && weight.size(2) == kPanelRow
                           : weight.dim() == 2 && weight.size(0) == p.N && weight.size(1) == p.K,
                  "int8_linear: weight does not fit N=", p.N, " (w_scale) and K=", p.K, " (x)");
  STD_TORCH_CHECK(w_scale.scalar_type() == ScalarType::Float, "int8_linear: w_scale must be fp32");
  STD_TORCH_CHECK(p.K <= INT32_MAX / (127 * 128), "int8_linear: K=", p.K, " could overflow the int32 sum");
  Tensor y = empty_cpu(sizes, dim, x.scalar_type());
  if (p.M == 0 || p.N == 0) return y;

  x = as_contiguous(x);
  weight = as_contiguous(weight);
  w_scale = as_contiguous(w_scale);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  p.w_scale = static_cast<const float*>(w_scale.const_data_ptr());
  p.activation = activation;
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == p.N, "int8_linear: bias has ", bias->numel(), " elements, expected ", p.N);
    bias = as_contiguous(*bias);
    p.bias = bias->const_data_ptr();
    p.bias_type = bias->scalar_type();
    STD_TORCH_CHECK(
        p.bias_type == ScalarType::Float || p.bias_type == ScalarType::BFloat16 || p.bias_type == ScalarType::Half,
        "int8_linear: bias must be fp32, bf16 or fp16");
  }
  if (residual) {
    STD_TORCH_CHECK(residual->numel() == p.M * p.N && residual->scalar_type() == x.scalar_type(),
                    "int8_linear: residual must have the shape of the result and x's dtype");
    residual = as_contiguous(*residual);
    p.residual = residual->const_data_ptr();
  }
  if (x_scale) {
    p.x_scales = x_scale->numel();
    STD_TORCH_CHECK((p.x_scales == 1 || p.x_scales == p.M) && x_scale->scalar_type() == ScalarType::Float,
                    "int8_linear: x_scale must be fp32 with one element or one for each row");
    x_scale = as_contiguous(*x_scale);
    p.x_scale = static_cast<const float*>(x_scale->const_data_ptr());
  }
  switch (x.scalar_type()) {
    case ScalarType::Float:
      Int8Linear<float>(p).run();
      break;
    case ScalarType::BFloat16:
      Int8Linear<bf16>(p).run();
      break;
    case ScalarType::Half:
      Int8Linear<fp16>(p).run();
      break;
    default:
      STD_TORCH_CHECK(false, "int8_linear: x must be fp32, bf16 or fp16");
  }
  return y;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("int8_linear", TORCH_BOX(&pyops::int8_linear_cpu)); }
