// The arguments that int8_linear, int8_weight_linear and int4_linear share: checked, made contiguous and described.
#pragma once

#include <initializer_list>

#include "int8_dot.h"
#include "int8_pack.h"
#include "tensor.h"

namespace pyops {

struct LinearProblem {
  int64_t M, N, K;
  const void *x, *residual, *bias;
  void* y;
  ScalarType x_type, bias_type;
  Activation activation;
};

inline void check_float_type(ScalarType type, const char* op, const char* argument) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ",
                  argument, " must be fp32, bf16 or fp16");
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) for a type that check_float_type let pass.
template <class F>
void by_float_type(ScalarType type, const F& f) {
  if (type == ScalarType::Float) f(TypeTag<float>{});
  if (type == ScalarType::BFloat16) f(TypeTag<bf16>{});
  if (type == ScalarType::Half) f(TypeTag<fp16>{});
}

inline void check_on_cpu(const char* op, const Tensor& x, const Tensor& weight, const Tensor& w_scale,
                         std::initializer_list<const std::optional<Tensor>*> others) {
  for (const auto* t : others) STD_TORCH_CHECK(!*t || (*t)->is_cpu(), op, ": all tensors must be on the CPU, as x is");
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu() && w_scale.is_cpu(), op, ": x, weight and w_scale must be on the CPU");
}

// M, N, K and x's dtype.
inline void set_sizes(const char* op, const Tensor& x, int64_t N, LinearProblem& p) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= 64, op, ": x must be [..., K] of at most 64 dimensions");
  p.K = x.size(dim - 1);
  p.N = N;
  p.M = 1;
  for (int64_t i = 0; i < dim - 1; i++) p.M *= x.size(i);
  p.x_type = x.scalar_type();
}

// y [..., N], uninitialized.
inline Tensor empty_result(const Tensor& x, int64_t N) {
  const int64_t dim = x.dim();
  int64_t sizes[64];
  for (int64_t i = 0; i < dim - 1; i++) sizes[i] = x.size(i);
  sizes[dim - 1] = N;
  return empty_cpu(sizes, dim, x.scalar_type());
}

// Whether an int8 weight is packed, after the checks of it and its scales.
inline bool check_int8_weight(const char* op, const Tensor& weight, const Tensor& w_scale, const LinearProblem& p) {
  const bool packed = weight.dim() == 3;
  const int64_t k64 = (p.K + 63) / 64, panels = panels_of(p.N);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8");
  STD_TORCH_CHECK(p.K <= INT32_MAX / (127 * 128), op, ": K=", p.K, " could overflow an int32 sum");
  STD_TORCH_CHECK(packed ? weight.size(0) == panels && weight.size(1) == 1 + 16 * k64 && weight.size(2) == kPanelRow
                         : weight.dim() == 2 && weight.size(0) == p.N && weight.size(1) == p.K,
                  op, ": weight does not fit N=", p.N, " (w_scale) and K=", p.K, " (x)");
  STD_TORCH_CHECK(w_scale.scalar_type() == ScalarType::Float && w_scale.dim() == 1, op, ": w_scale must be fp32 [N]");
  return packed;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); i++)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

// x, bias, residual and y, of sizes that set_sizes found. The tensors are replaced by contiguous ones, which must
// outlive p.
inline void load_shared(const char* op, Tensor& x, std::optional<Tensor>& bias, std::optional<Tensor>& residual,
                        Tensor& y, Activation activation, LinearProblem& p) {
  x = as_contiguous(x);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.activation = activation;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == p.N, op, ": bias must be [N], N=", p.N);
    bias = as_contiguous(*bias);
    p.bias = bias->const_data_ptr();
    p.bias_type = bias->scalar_type();
    check_float_type(p.bias_type, op, "bias");
  }
  if (residual) {
    STD_TORCH_CHECK(same_shape(*residual, y) && residual->scalar_type() == p.x_type, op,
                    ": residual must have the shape of the result and x's dtype");
    residual = as_contiguous(*residual);
    p.residual = residual->const_data_ptr();
  }
  check_float_type(p.x_type, op, "x");
}

}  // namespace pyops
