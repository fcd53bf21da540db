// The kernels of the int8 sparse convolution for every ISA, and the choice among them. Their loops over kept weights
// are those of sparse_conv2d.inc, compiled with other vectors.
#include "cpu.h"
#include "int8_sparse_conv2d.h"
#include "int8_sparse_conv2d_vec.h"
#include "quantize_rows.h"
#include "vec_lanes.h"

#define PYOPS_ISA_FILE "sparse_conv2d.inc"
#include "for_each_isa.h"
#define PYOPS_ISA_FILE "int8_sparse_conv2d.inc"
#include "for_each_isa.h"

#define PYOPS_SEGMENTS_ONLY
namespace pyops::generic::int8 {
#include "sparse_conv2d.inc"
}
#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX2
namespace pyops::avx2::int8 {
#include "sparse_conv2d.inc"
}
PYOPS_TARGET_END
PYOPS_TARGET_BEGIN_AVX512
namespace pyops::avx512::int8 {
#include "sparse_conv2d.inc"
}
PYOPS_TARGET_END
PYOPS_TARGET_BEGIN_VNNI
namespace pyops::avx512vnni::int8 {
#include "sparse_conv2d.inc"
}
PYOPS_TARGET_END
#endif

namespace pyops::sparse {

const Int8Kernels& int8_kernels() {
#define PYOPS_KERNELS(isa, base)                                                                    \
  {                                                                                                 \
    isa::int8::segment_kernel, isa::int8::kZero, base::dequantize, base::quantize_kernels<float>(), \
        base::quantize_kernels<bf16>()                                                              \
  }
  static const Int8Kernels generic PYOPS_KERNELS(pyops::generic, pyops::generic);
#if defined(__x86_64__)
  static const Int8Kernels avx2 PYOPS_KERNELS(pyops::avx2, pyops::avx2),
      avx512 PYOPS_KERNELS(pyops::avx512, pyops::avx512), vnni PYOPS_KERNELS(pyops::avx512vnni, pyops::avx512);
  if (active_isa() >= Isa::avx512vnni) return vnni;
  if (active_isa() == Isa::avx512) return avx512;
  if (active_isa() == Isa::avx2) return avx2;
#endif
  return generic;
#undef PYOPS_KERNELS
}

}  // namespace pyops::sparse
