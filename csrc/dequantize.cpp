// Packed weights as dense matrices (pyops/ops/dequantize.py): what gradients are multiplied with.
#include "int4_problem.h"
#include "linear_args.h"
#include "row_tiles.h"
#include "tensor.h"

#define PYOPS_ISA_FILE "dequantize.inc"
#include "for_each_isa.h"

namespace pyops {
namespace {

// Calls work(isa's functions) for the ISA in use.
#define PYOPS_FOR_ISA(call)                             \
  if (active_isa() >= Isa::avx512) return avx512::call; \
  if (active_isa() == Isa::avx2) return avx2::call;     \
  return generic::call

#if !defined(__x86_64__)
#undef PYOPS_FOR_ISA
#define PYOPS_FOR_ISA(call) return generic::call
#endif

template <class T>
void int4_panel(const Int4Panel& p, int64_t K, int64_t group_quads, int cols, T* out) {
  PYOPS_FOR_ISA(dequantize_int4_panel(p, K, group_quads, cols, out, K));
}
template <class T>
void int8_panel(const int8_t* panel, const float* scale, int64_t K, int cols, T* out) {
  PYOPS_FOR_ISA(dequantize_int8_panel(panel, scale, K, cols, out, K));
}

// Calls fill(panel, columns, T*) for every panel of a result [N, K] of dtype, in parallel.
template <class F>
Tensor by_panels(int64_t N, int64_t K, ScalarType dtype, const char* op, const F& fill) {
  const int64_t sizes[] = {N, K}, panels = panels_of(N);
  Tensor out = empty_cpu(sizes, 2, dtype);
  const auto run = [&](auto* data) {
    in_parallel(panels, kPanelN * double(K), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        fill(i, static_cast<int>(smaller(kPanelN, N - i * kPanelN)), data + i * kPanelN * K);
    });
  };
  void* data = out.mutable_data_ptr();
  if (N == 0 || K == 0) return out;
  check_float_type(dtype, op, "dtype");
  by_float_type(dtype, [&](auto tag) { run(static_cast<typename decltype(tag)::type*>(data)); });
  return out;
}

Tensor int4_dequantize_cpu(Tensor weight, Tensor w_scale, std::optional<Tensor> w_zero, int64_t group_size, int64_t N,
                           int64_t K, ScalarType dtype) {
  const int64_t k64 = k64_of(K), panels = panels_of(N);
  STD_TORCH_CHECK(N >= 0 && K >= 0 && is_group_size(group_size), "int4_dequantize: N=", N, ", K=", K,
                  " or group_size=", group_size, " is none");
  const int64_t group_quads = group_quads_of(group_size, K), groups = padded_groups_of(group_quads, K);
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Byte && weight.dim() == 3 &&
                      weight.size(0) == panels && weight.size(1) == 1 + 8 * k64 && weight.size(2) == kNibbleRow,
                  "int4_dequantize: weight must be packed for N=", N, " and K=", K);
  for (const Tensor* t : {&w_scale, w_zero ? &*w_zero : &w_scale})
    STD_TORCH_CHECK(
        t->is_cpu() && t->dim() == 3 && t->size(0) == panels && t->size(1) == groups && t->size(2) == kPanelN,
        "int4_dequantize: w_scale or w_zero do not fit N=", N, ", K=", K, ", group_size=", group_size);
  const ScalarType type = w_scale.scalar_type();
  check_float_type(type, "int4_dequantize", "w_scale");
  STD_TORCH_CHECK(!w_zero || w_zero->scalar_type() == ScalarType::Byte, "int4_dequantize: w_zero must be uint8");
  weight = as_contiguous(weight);
  w_scale = as_contiguous(w_scale);
  if (w_zero) w_zero = as_contiguous(*w_zero);
  const auto* nibbles = static_cast<const uint8_t*>(weight.const_data_ptr());
  const auto* zeros = w_zero ? static_cast<const uint8_t*>(w_zero->const_data_ptr()) : nullptr;
  const Int4Panel all{nibbles, w_scale.const_data_ptr(), type, zeros, nullptr};
  return by_panels(N, K, dtype, "int4_dequantize", [&](int64_t i, int cols, auto* out) {
    int4_panel(nth_panel(all, i, k64, groups), K, group_quads, cols, out);
  });
}

Tensor int8_dequantize_cpu(Tensor weight, Tensor w_scale, int64_t K, ScalarType dtype) {
  const int64_t N = w_scale.numel(), k64 = (K + 63) / 64, panels = panels_of(N);
  STD_TORCH_CHECK(w_scale.is_cpu() && w_scale.scalar_type() == ScalarType::Float && w_scale.dim() == 1,
                  "int8_dequantize: w_scale must be [N] of float32");
  STD_TORCH_CHECK(K >= 0 && weight.is_cpu() && weight.scalar_type() == ScalarType::Char && weight.dim() == 3 &&
                      weight.size(0) == panels && weight.size(1) == 1 + 16 * k64 && weight.size(2) == kPanelRow,
                  "int8_dequantize: weight must be packed for N=", N, " and K=", K);
  weight = as_contiguous(weight);
  w_scale = as_contiguous(w_scale);
  const auto* data = static_cast<const int8_t*>(weight.const_data_ptr());
  const auto* scale = static_cast<const float*>(w_scale.const_data_ptr());
  return by_panels(N, K, dtype, "int8_dequantize", [&](int64_t i, int cols, auto* out) {
    int8_panel(data + i * panel_bytes(k64), scale + i * kPanelN, K, cols, out);
  });
}

}  // namespace
}  // namespace pyops

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("int4_dequantize", TORCH_BOX(&pyops::int4_dequantize_cpu));
  m.impl("int8_dequantize", TORCH_BOX(&pyops::int8_dequantize_cpu));
}
