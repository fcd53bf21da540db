// The kernels of the gradient of a sparse weight. Sums over pixels are taken with one pixel a lane (sparse_conv2d.h):
// the gradient of one output channel stays in registers while every kept weight of that channel multiplies it by the
// panel of its input channel, moved by its tap. That leaves a vector for each weight, whose lanes are added up for as
// many weights together as a vector has lanes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pyops::sparse {

// Kept weights of one output channel, and one input channel of each block, within a block of input channels.
struct Run {
  int64_t grad;   // floats from the gradient's panel to the channel's
  int64_t panel;  // bytes from the input's panel to where `offsets` count from
  int32_t first, count;
};

// sums[i] += Σ grad · panel for the weights of all runs, one after the other.
struct DwArgs {
  const char* panel;
  const float* grad;
  ptrdiff_t panel_row, grad_row;  // bytes from one row of positions to the next
  const Run* runs;
  int64_t count;
  const int32_t* cols;     // the canonical indices
  const int32_t* offsets;  // bytes, of each column
  float* sums;
};
using DwFn = void (*)(const DwArgs&);

struct DwKernels {
  DwFn (*runs)(int nr, int nc);  // for nr × nc positions; null: there is no such kernel
};
const DwKernels& dw_kernels();  // of the active ISA

}  // namespace pyops::sparse
