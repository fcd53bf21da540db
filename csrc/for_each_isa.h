// Compiles the file PYOPS_ISA_FILE once for each vector ISA, inside pyops::generic, pyops::avx2 and pyops::avx512,
// where `Vec` is that ISA's vector of floats. Code that all kernels share (epilogue, row quantization) is written once
// in such a file, in terms of `Vec`.
//
// Regions of `#pragma target` rather than files with -m flags: the linker keeps one copy of an inline function, and a
// copy of std::min compiled for AVX-512 would crash an older machine. For the same reason such a file uses no std::
// templates.

#include "vec.h"

namespace pyops::generic {
#include PYOPS_ISA_FILE
}

#if defined(__x86_64__)
PYOPS_TARGET_BEGIN_AVX2
namespace pyops::avx2 {
#include PYOPS_ISA_FILE
}
PYOPS_TARGET_END

PYOPS_TARGET_BEGIN_AVX512
namespace pyops::avx512 {
#include PYOPS_ISA_FILE
}
PYOPS_TARGET_END
#endif

#undef PYOPS_ISA_FILE
