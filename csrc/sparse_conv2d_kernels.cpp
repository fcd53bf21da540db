// The kernels of the sparse convolution for every ISA, and the choice among them.
#include <type_traits>

#include "cpu.h"
#include "sparse_conv2d.h"
#include "vec_lanes.h"

#define PYOPS_ISA_FILE "sparse_conv2d.inc"
#include "for_each_isa.h"

namespace pyops::sparse {

const Kernels& kernels() {
#define PYOPS_KERNELS(isa)                                                                     \
  {                                                                                            \
    isa::Vec::kLanes, isa::segment_kernel, isa::activate_in_place, isa::type_kernels<float>(), \
        isa::type_kernels<bf16>()                                                              \
  }
  static const Kernels generic PYOPS_KERNELS(pyops::generic);
#if defined(__x86_64__)
  static const Kernels avx2 PYOPS_KERNELS(pyops::avx2), avx512 PYOPS_KERNELS(pyops::avx512);
  if (active_isa() >= Isa::avx512) return avx512;
  if (active_isa() == Isa::avx2) return avx2;
#endif
  return generic;
#undef PYOPS_KERNELS
}

}  // namespace pyops::sparse
