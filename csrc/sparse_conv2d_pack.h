// Packing a canonical weight for the CPU kernels.
#pragma once

#include <vector>

#include "sparse_conv2d.h"
#include "tensor.h"

namespace pyops::sparse {

// The canonical weight (pyops/ops/sparse_weight.py): values [blocks][bo][bc].
struct Weight {
  Conv conv;
  int64_t bo, bc;
  const int32_t *crow, *col;
  const void* values;
  ScalarType dtype;

  int64_t block_rows() const { return conv.groups * ((conv.rows() + bo - 1) / bo); }
  float value(int64_t i) const {
    return dtype == ScalarType::Float ? static_cast<const float*>(values)[i]
                                      : static_cast<float>(static_cast<const bf16*>(values)[i]);
  }
};

// What a packed weight is tuned for; it serves every input.
struct Target {
  int64_t N, OH, OW;
  bool channels_last, unpadded;
  int lanes;
};

// Throws where a buffer does not describe a weight of this shape with `stored` blocks.
void check_structure(const Weight& w, int64_t stored);

// Of a weight that was checked. `forced` is empty, or {mh, mw, nr, nc, flat, rows at once, channels in a block, rows in
// a group}. Without values it stands for the structure alone, for as long as that lasts, and each call fetches the
// values.
Tensor pack(const Weight& w, const Target& target, bool with_values, const std::vector<int64_t>& forced = {});

// Whether this process made it.
bool sealed(const Packed& packed);

}  // namespace pyops::sparse
