// The way to the kernels without the dispatcher, whose handling of fifteen arguments takes as long as a small layer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "sparse_conv2d_call.h"

namespace py = pybind11;

namespace pyops::sparse {
namespace {

// False, and nothing done, if the packed form is not for this machine, layout or padding, or has no values.
bool run_packed(uintptr_t packed, int64_t packed_bytes, const Ints& shape, const Ints& x_shape, const Ints& padding,
                bool channels_last, bool half, const std::string& activation, uintptr_t x, uintptr_t y,
                int64_t y_elements, uintptr_t bias, bool half_bias, uintptr_t residual) {
  const Packed& w = *reinterpret_cast<const Packed*>(packed);
  STD_TORCH_CHECK(packed_bytes >= int64_t(sizeof(Packed)) && sealed(w) && w.bytes == packed_bytes && !w.kind.order &&
                      !w.starts_at && shape == Ints({w.conv.O, w.conv.channels(), w.conv.R, w.conv.S}),
                  "sparse_conv2d: packed is not the packed form of this weight");
  Problem p = sizes_of(w.conv, x_shape, padding);
  STD_TORCH_CHECK(y_elements == p.N * w.conv.O * p.OH * p.OW, "sparse_conv2d: y has ", y_elements, " elements");
  p.channels_last = channels_last;
  join_pixels(p, w.conv, padding);
  if (w.sources_at || w.lanes != kernels().lanes || !flat_fits(w.tiling, target_of(p, padding, channels_last)))
    return false;
  p.w = &w;
  p.values = w.values();
  p.x = reinterpret_cast<const void*>(x), p.y = reinterpret_cast<void*>(y);
  p.residual = reinterpret_cast<const void*>(residual);
  p.activation = parse_activation(activation.c_str());
  p.set_bias(w.conv.O, reinterpret_cast<const void*>(bias), !half_bias);
  run(p, half ? ScalarType::BFloat16 : ScalarType::Float);
  return true;
}

}  // namespace

void bind(py::module_& m) {
  m.def("sparse_conv2d", &run_packed, py::call_guard<py::gil_scoped_release>(),
        "sparse_conv2d on memory that the caller vouches for: x, y and residual of one dtype and memory format");
}

}  // namespace pyops::sparse
