// y[m, n] = act(s_x[m] · s_w[n] · Σ_k q_x[m, k] · q_w[n, k] + bias[n] + residual[m, n])      (pyops/ops/int8_linear.py)
//
// Rows are quantized once into scratch, in tiles of as many rows as a kernel holds in registers. Blocks of row tiles that
// fit in L2 then meet every panel of 32 output channels: tile kernel (int8_dot.h), accumulators through L1 into the
// epilogue (epilogue.h). Work is cut into (block, panel) pairs, even over the threads.
#include <algorithm>
#include <memory>

#include "epilogue.h"
#include "int8_dot.h"
#include "quantize_rows.h"
#include "tensor.h"

namespace pyops {
namespace {

constexpr int64_t kBlockBytes = 1 << 20;   // quantized rows of a block: half of a 2 MiB L2, the rest is for panels
constexpr int64_t kTaskCycles = 30'000;    // less work than this is not worth another thread

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
    for (int i = 0; i < 16; i++)
      r[i] = i < n ? _mm512_loadu_si512(rows + i * stride + k * 64) : _mm512_setzero_si512();
    transpose16(r);
    for (int i = 0; i < 16; i++, out += n * 4)
      _mm512_mask_storeu_epi32(out, wanted, _mm512_xor_si512(r[i], flips));
  }
}
PYOPS_TARGET_END
#endif

// ------------------------------------------------------------------------------------------------- kernels of an ISA

struct Kernels {
  int max_rows;               // rows of a tile
  bool tiles;                 // rows in AMX tiles, else in quads
  uint8_t flip;               // xor on the quantized rows
  double macs_per_cycle;
  const DotFn* dot;           // quads: dot[r - 1] for r rows; tiles: dot[0] for 16, dot[1] for 32
  decltype(&pack_quads) pack;
  float (*quantize_f32)(const float*, int64_t, const float*, int8_t*, int64_t);
  float (*quantize_bf16)(const bf16*, int64_t, const float*, int8_t*, int64_t);
  float (*quantize_fp16)(const fp16*, int64_t, const float*, int8_t*, int64_t);
  void (*epilogue_f32)(const EpilogueTile<float>&, Activation);
  void (*epilogue_bf16)(const EpilogueTile<bf16>&, Activation);
  void (*epilogue_fp16)(const EpilogueTile<fp16>&, Activation);

  float quantize(const float* x, int64_t K, const float* s, int8_t* q, int64_t stride) const {
    return quantize_f32(x, K, s, q, stride);
  }
  float quantize(const bf16* x, int64_t K, const float* s, int8_t* q, int64_t stride) const {
    return quantize_bf16(x, K, s, q, stride);
  }
  float quantize(const fp16* x, int64_t K, const float* s, int8_t* q, int64_t stride) const {
    return quantize_fp16(x, K, s, q, stride);
  }
  void epilogue(const EpilogueTile<float>& t, Activation a) const { epilogue_f32(t, a); }
  void epilogue(const EpilogueTile<bf16>& t, Activation a) const { epilogue_bf16(t, a); }
  void epilogue(const EpilogueTile<fp16>& t, Activation a) const { epilogue_fp16(t, a); }
};

#define PYOPS_SHARED(isa)                                                                              \
  isa::quantize_row<float>, isa::quantize_row<bf16>, isa::quantize_row<fp16>, isa::epilogue<float>,    \
      isa::epilogue<bf16>, isa::epilogue<fp16>

const Kernels& select(Isa isa, int64_t M) {
  static constexpr DotFn kGeneric[] = {generic::int8_dot<1>, generic::int8_dot<2>, generic::int8_dot<3>,
                                       generic::int8_dot<4>};
  static const Kernels generic{4, false, 0, 2, kGeneric, pack_quads, PYOPS_SHARED(generic)};
#if defined(__x86_64__)
  static constexpr DotFn kAvx2[] = {avx2::int8_dot<1>, avx2::int8_dot<2>, avx2::int8_dot<3>};
  static constexpr DotFn kAvx512[] = {avx512::int8_dot<1>, avx512::int8_dot<2>, avx512::int8_dot<3>,
                                      avx512::int8_dot<4>, avx512::int8_dot<5>, avx512::int8_dot<6>,
                                      avx512::int8_dot<7>, avx512::int8_dot<8>};
  using namespace avx512vnni;
  static constexpr DotFn kVnni[] = {int8_dot<1>, int8_dot<2>,  int8_dot<3>,  int8_dot<4>,  int8_dot<5>,
                                    int8_dot<6>, int8_dot<7>,  int8_dot<8>,  int8_dot<9>,  int8_dot<10>,
                                    int8_dot<11>, int8_dot<12>, int8_dot<13>, int8_dot<14>};
  static constexpr DotFn kAmx[] = {amx::int8_dot<1>, amx::int8_dot<2>};
  static const Kernels avx2{3, false, 0, 24, kAvx2, pack_quads, PYOPS_SHARED(avx2)};
  static const Kernels avx512{8, false, 0, 40, kAvx512, pack_quads_avx512, PYOPS_SHARED(avx512)};
  static const Kernels vnni{14, false, 0x80, 128, kVnni, pack_quads_avx512, PYOPS_SHARED(avx512)};
  static const Kernels amx{32, true, 0, 800, kAmx, nullptr, PYOPS_SHARED(avx512)};
  switch (isa) {
    case Isa::amx: return M <= 4 ? vnni : amx;  // a tile would be mostly padding; one to four rows only stream weights
    case Isa::avx512vnni: return vnni;
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::generic: break;
  }
#endif
  (void)isa, (void)M;
  return generic;
}

// -------------------------------------------------------------------------------------------------------- scratch

// Aligned memory that a thread keeps between calls and grows as needed.
class Scratch {
 public:
  int8_t* get(size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      data_.reset(static_cast<int8_t*>(std::aligned_alloc(4096, rounded)));
      STD_TORCH_CHECK(data_ != nullptr, "int8_linear: no memory for ", rounded, " bytes of scratch");
      size_ = rounded;
      advise_huge_pages(data_.get(), size_);
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(int8_t* p) const { std::free(p); }
  };
  std::unique_ptr<int8_t[], Free> data_;
  size_t size_ = 0;
};

// A canonical weight [N, K] → the panel of columns [n0, n0 + 32), as pack_int8 lays it out.
void pack_panel(const int8_t* w, int64_t N, int64_t K, int64_t n0, int64_t k64, int8_t* panel) {
  std::memset(panel, 0, panel_bytes(k64));
  for (int64_t n = 0; n < std::min<int64_t>(kPanelN, N - n0); n++) {
    const int8_t* row = w + (n0 + n) * K;
    int8_t* out = panel + kPanelRow + n * 4;
    int32_t sum = 0;
    for (int64_t k = 0; k < K; k++) {
      out[k / 4 * kPanelRow + k % 4] = row[k];
      sum += row[k];
    }
    const int32_t compensation = -128 * sum;
    std::memcpy(panel + n * 4, &compensation, 4);
  }
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

// `cols` elements at p + n0 as fp32, zeros up to 32.
void load_columns(const void* p, ScalarType type, int64_t n0, int cols, float* out) {
  for (int n = 0; n < kPanelN; n++) out[n] = 0;
  if (!p) return;
  for (int n = 0; n < cols; n++) {
    if (type == ScalarType::Float) out[n] = static_cast<const float*>(p)[n0 + n];
    if (type == ScalarType::BFloat16) out[n] = static_cast<const bf16*>(p)[n0 + n];
    if (type == ScalarType::Half) out[n] = static_cast<const fp16*>(p)[n0 + n];
  }
}

template <class T>
void run(const Problem& p) {
  const int64_t k64 = (p.K + 63) / 64, panels = (p.N + kPanelN - 1) / kPanelN;
  const Kernels& kernels = select(active_isa(), p.M);

  // Blocks of rows, cut evenly into tiles.
  const int64_t block_max = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(k64 * 64, 1) / kDotMaxRows, 1, 64) * kDotMaxRows;
  const int64_t blocks = (p.M + block_max - 1) / block_max;
  const int64_t tiles_max = block_max / kernels.max_rows + 1;
  const int64_t tile_bytes = kDotMaxRows * k64 * 64;  // room for any layout
  struct Block {
    int64_t m0, rows, tiles;
    int64_t row(int64_t t) const { return rows * t / tiles; }
  };
  auto block_of = [&](int64_t b) {
    Block block{p.M * b / blocks, 0, 0};
    block.rows = p.M * (b + 1) / blocks - block.m0;
    block.tiles = (block.rows + kernels.max_rows - 1) / kernels.max_rows;
    return block;
  };

  thread_local Scratch shared_scratch;
  const int64_t a_bytes = blocks * tiles_max * tile_bytes;
  int8_t* a = shared_scratch.get(a_bytes + p.M * sizeof(float));
  float* s_x = reinterpret_cast<float*>(a + a_bytes);

  auto quantize_tile = [&](int64_t b, int64_t t) {
    const Block block = block_of(b);
    const int64_t m0 = block.m0 + block.row(t);
    const int rows = static_cast<int>(block.m0 + block.row(t + 1) - m0);
    int8_t* out = a + (b * tiles_max + t) * tile_bytes;
    const int64_t padded = rows > 16 ? 32 : 16;
    thread_local Scratch row_scratch;
    // Quads pass through rows an odd number of cache lines apart, so that K = 2ⁿ does not alias.
    const int64_t stride = k64 * 64 + 64;
    int8_t* q = kernels.tiles ? out : row_scratch.get(rows * stride);
    for (int r = 0; r < rows; r++) {
      const int64_t m = m0 + r;
      const float* given = p.x_scales ? p.x_scale + (p.x_scales == 1 ? 0 : m) : nullptr;
      const T* x = static_cast<const T*>(p.x) + m * p.K;
      s_x[m] = kernels.tiles ? kernels.quantize(x, p.K, given, q + r * 64, padded * 64)
                             : kernels.quantize(x, p.K, given, q + r * stride, 64);
    }
    if (!kernels.tiles) kernels.pack(q, stride, rows, k64, kernels.flip, out);
  };

  auto multiply = [&](int64_t begin, int64_t end) {
    thread_local Scratch panel_scratch;
    alignas(64) int32_t acc[kDotMaxRows * kPanelN];
    alignas(64) float s_w[kPanelN], bias[kPanelN];
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / panels, n0 = task % panels * kPanelN;
      const int cols = static_cast<int>(std::min<int64_t>(kPanelN, p.N - n0));
      const int8_t* panel;
      if (p.packed) {
        panel = p.weight + n0 / kPanelN * panel_bytes(k64);
      } else {
        int8_t* scratch = panel_scratch.get(panel_bytes(k64));
        pack_panel(p.weight, p.N, p.K, n0, k64, scratch);
        panel = scratch;
      }
      load_columns(p.w_scale, ScalarType::Float, n0, cols, s_w);
      load_columns(p.bias, p.bias_type, n0, cols, bias);
      const Block block = block_of(b);
      const int lines = static_cast<int>((kPanelStep / 64 + block.tiles - 1) / block.tiles);
      for (int64_t t = 0; t < block.tiles; t++) {
        const int64_t m0 = block.m0 + block.row(t);
        const int rows = static_cast<int>(block.m0 + block.row(t + 1) - m0);
        // A panel that only one tile meets is a stream; else each tile fetches its share of the next panel.
        const int8_t* ahead = block.tiles == 1 ? nullptr : panel + panel_bytes(k64) + t * lines * 64 * k64;
        const DotFn dot = kernels.tiles ? kernels.dot[rows > 16] : kernels.dot[rows - 1];
        dot({a + (b * tiles_max + t) * tile_bytes, panel, k64, acc, ahead, lines});
        const int64_t at = m0 * p.N + n0;
        kernels.epilogue(EpilogueTile<T>{acc, s_x + m0, s_w, bias,
                                         p.residual ? static_cast<const T*>(p.residual) + at : nullptr,
                                         static_cast<T*>(p.y) + at, p.N, rows, cols},
                         p.activation);
      }
    }
  };

  const int64_t block_rows = p.M / blocks;
  const double quantize_cycles = double(kernels.max_rows) * p.K / 4;
  torch::stable::parallel_for(0, blocks * tiles_max, std::max<int64_t>(1, int64_t(kTaskCycles / (quantize_cycles + 1))),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; i++)
                                  if (i % tiles_max < block_of(i / tiles_max).tiles)
                                    quantize_tile(i / tiles_max, i % tiles_max);
                              });
  // A panel costs its bytes at about 8 a cycle or its products, whichever is more.
  const double panel_cycles =
      kPanelN * double(p.K) * std::max(1.0 / 8, block_rows / kernels.macs_per_cycle) + 100.0 * block_rows;
  torch::stable::parallel_for(0, blocks * panels, std::max<int64_t>(1, int64_t(kTaskCycles / panel_cycles)),
                              [&](int64_t begin, int64_t end) {
#if defined(__x86_64__)
                                if (kernels.tiles) return amx::with_tiles([&] { multiply(begin, end); });
#endif
                                multiply(begin, end);
                              });
}

Tensor int8_linear_cpu(Tensor x, Tensor weight, Tensor w_scale, std::optional<Tensor> bias,
                       std::optional<Tensor> residual, Activation activation, std::optional<Tensor> x_scale) {
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
    STD_TORCH_CHECK(p.bias_type == ScalarType::Float || p.bias_type == ScalarType::BFloat16 ||
                        p.bias_type == ScalarType::Half,
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
    case ScalarType::Float: run<float>(p); break;
    case ScalarType::BFloat16: run<bf16>(p); break;
    case ScalarType::Half: run<fp16>(p); break;
    default: STD_TORCH_CHECK(false, "int8_linear: x must be fp32, bf16 or fp16");
  }
  return y;
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) { m.impl("int8_linear", TORCH_BOX(&pyops::int8_linear_cpu)); }
