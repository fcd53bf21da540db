// What the launchers need of a tensor, over the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "epilogue.h"

namespace pyops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A contiguous tensor on CPU, uninitialized.
inline Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[64];
  STD_TORCH_CHECK(dim <= 64, "a tensor has at most 64 dimensions");
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, type, aoti_torch_device_type_cpu(), -1, &handle));
  return Tensor(handle);
}

// How a matmul with quantized weights takes its activations: quantized as well, or as they are.
enum class Compute { int8, floating };

inline Compute parse_compute(const char* name) {
  if (std::string_view(name) == "int8") return Compute::int8;
  if (std::string_view(name) == "float") return Compute::floating;
  throw std::invalid_argument(std::string("compute='") + name + "' is neither 'int8' nor 'float'");
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace pyops

// `str` arguments of a schema arrive as their enums. (The library's own conversion to std::string loses 32 bytes a
// call.)
HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <class Parse>
auto parse_string(StableIValue value, Parse&& parse) {
  const StringHandle handle = to<StringHandle>(value);
  const char* name;
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &name));
  struct Release {
    StringHandle handle;
    ~Release() { torch_delete_string(handle); }
  } release{handle};
  return parse(name);
}
template <>
struct ToImpl<pyops::Activation> {
  static pyops::Activation call(StableIValue value, uint64_t, bool) {
    return parse_string(value, pyops::parse_activation);
  }
};
template <>
struct ToImpl<pyops::Compute> {
  static pyops::Compute call(StableIValue value, uint64_t, bool) { return parse_string(value, pyops::parse_compute); }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)
