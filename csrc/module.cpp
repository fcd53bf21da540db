// pyops._C: what is not a tensor op. Loading it also registers the CPU kernels with PyTorch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu.h"

namespace py = pybind11;

namespace pyops::optim {
void bind(py::module_& m);  // optim_python.cpp
}
namespace pyops::adafactor {
void bind(py::module_& m);  // adafactor_python.cpp
}
namespace pyops::sparse {
void bind(py::module_& m);  // sparse_conv2d_python.cpp
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyops: CPU features and build facts; the ops are in torch.ops.pyops";
  m.def(
      "cpu_isa", [] { return std::string(pyops::isa_name(pyops::active_isa())); },
      "Instruction set that the CPU kernels use");
  m.def("available_cpu_isas", &pyops::available_isas, "Instruction sets that can be forced on this machine, ascending");
  m.def("force_cpu_isa", &pyops::force_isa, py::arg("name"),
        "Use this instruction set from now on; \"\" for the best. Raises ValueError if the machine lacks it");
  m.def("int8_peak_gops", &pyops::int8_peak_gops, py::arg("isa"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(),
        "Rate of the int8 multiply of an instruction set from registers, 10^9 operations a second");
  m.def("read_bandwidth_gbs", &pyops::read_bandwidth_gbs, py::arg("bytes"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>(), "Memory read bandwidth, 10^9 bytes a second");
  m.def("update_bandwidth_gbs", &pyops::update_bandwidth_gbs, py::arg("bytes"), py::arg("threads"),
        py::arg("read_streams"), py::arg("update_streams"), py::call_guard<py::gil_scoped_release>(),
        "Memory bandwidth, 10^9 bytes a second, of reading some arrays and updating others in place");
  m.def(
      "advise_huge_pages",
      [](uintptr_t data, size_t bytes, bool filled) {
        pyops::advise_huge_pages(reinterpret_cast<const void*>(data), bytes, filled);
      },
      py::arg("data"), py::arg("bytes"), py::arg("filled"),
      "Ask for 2 MiB pages under a buffer that will be streamed, filled already or not");
  pyops::optim::bind(m);
  pyops::adafactor::bind(m);
  pyops::sparse::bind(m);
  m.def("build_info", [] {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = "Clang " __clang_version__;
#else
    info["compiler"] = "GCC " __VERSION__;
#endif
    info["torch_target"] = "2.11";
#ifdef PYOPS_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    return info;
  });
}
