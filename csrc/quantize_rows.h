// Symmetric int8 quantization of a row: q[k] = round(x[k] · inverse), the rounding of pyops/ops/int8_linear.py.
#pragma once

#include <cstdint>

namespace pyops {

constexpr float kInt8Max = 127.0f;
// 127 / amax overflows below this: such a row quantizes to zeros.
constexpr float kSmallestAmax = 1.504632769e-36f;  // 2⁻¹¹⁹

}  // namespace pyops

#define PYOPS_ISA_FILE "quantize_rows.inc"
#include "for_each_isa.h"
