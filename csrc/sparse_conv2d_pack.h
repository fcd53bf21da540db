// Packing a canonical weight for the CPU kernels.
#pragma once

#include <cstring>
#include <vector>

#include "sparse_conv2d.h"
#include "tensor.h"

namespace pyops::sparse {

// The canonical weight (pyops/ops/sparse_weight.py): values [blocks][bo][bc]. An int8 one is in quads of channels: its
// blocks of 1 × 4 are single values.
struct Weight {
  Conv conv;
  int64_t bo, bc;
  const int32_t *crow, *col;
  const void* values;
  ScalarType dtype;
  // Of a weight whose blocks are those of another, transposed (pack_dx): the other's block of each. Null: its own.
  const int32_t* block_at = nullptr;
  Kind kind{};
  int64_t together = 1;  // output channels, beginning with a multiple of it, that stay in one group of rows

  int64_t block_rows() const { return conv.groups * ((conv.rows() + bo - 1) / bo); }
  // Where the value (i, j) of a block is, and how far from it the one of the next output channel.
  int64_t index(int64_t block, int64_t i, int64_t j) const {
    return block_at ? (int64_t(block_at[block]) * bc + j) * bo + i : (block * bo + i) * bc + j;
  }
  int64_t row_step() const { return block_at ? 1 : bc; }
  // Of an int8 weight, the bits of a quad (int8_sparse_conv2d.h).
  bool int8() const { return dtype == ScalarType::Char; }
  float value(int64_t i) const {
    if (int8()) {
      float bits;
      std::memcpy(&bits, static_cast<const int8_t*>(values) + 4 * i, 4);
      return bits;
    }
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

// Whether images of this layout and padding can be seen as rows of pixels, if the tiling wants them to be.
inline bool flat_fits(const Tiling& t, const Target& target) {
  return !t.flat || (target.unpadded && (t.channels || !target.channels_last));
}

constexpr int64_t kPanelsBytes = 3 << 19;  // of a wave, for each thread: most of a 2 MiB L2

struct Plan {
  Tiling tiling;
  int32_t at_once, channels_in_block, group_rows;
  double cycles;
};

// Throws where a buffer does not describe a weight of this shape with `stored` blocks.
void check_structure(const Weight& w, int64_t stored);

// Of a weight that was checked. `forced` is empty, or {rows at once}, or {mh, mw, nr, nc, flat, rows at once, channels
// in a block, rows in a group}. Without values it stands for the structure alone, for as long as that lasts, and each
// call fetches the values.
Tensor pack(const Weight& w, const Target& target, bool with_values, const std::vector<int64_t>& forced = {});

Tensor pack_as(const Weight& w, const Plan& plan, int32_t lanes, bool with_values);

// Whether this process made it.
bool sealed(const Packed& packed);

}  // namespace pyops::sparse
