// What the int8 sparse convolution adds to the fp32 one (sparse_conv2d.h).
//
// Four channels are one element: 32 bits in the place of a float. In memory, in a panel and in a packed weight it moves
// as a float does, and the kernels multiply it as four bytes and accumulate int32. So the quantized image is an image
// [N, ⌈C/4⌉, H, W] of such quads, in x's memory format, and the packed weight is that of a [O, ⌈C/4⌉, R, S] one.
#pragma once

#include <vector>

#include "sparse_conv2d.h"
#include "tensor.h"

namespace pyops::sparse {

// Four planes of one image → quads; a channel that is not there has the factor 0.
template <class T>
struct PlanesArgs {
  const T* planes[4];
  float factors[4];
  int64_t n;      // pixels
  uint32_t zero;  // Int8Kernels::zero
  uint32_t* out;  // [n]
};

template <class T>
struct QuantizeKernels {
  uint32_t (*max_bits)(const T* x, int64_t n);  // of the largest |x|; 0x7f800000 and above: there is an Inf or NaN
  // With `clamp`, x may lie beyond ±127 / factor, and the result is max_bits of what was read; without, 0.
  uint32_t (*planes)(const PlanesArgs<T>& args, bool clamp);
  uint32_t (*bytes)(const T* x, int64_t n, float factor, uint32_t zero, bool clamp, uint8_t* out);
};

// Accumulators to floats, in place: act(acc · s_x · scale + shift).
struct DequantizeArgs {
  float* acc;  // [rows][positions][lanes], int32
  int64_t rows, positions;
  const float *scale, *shift;  // [rows]
  const float* s_x;            // [lanes], or [positions][lanes]
  int64_t s_x_step;            // 0 or lanes
  Activation activation;
};

struct Int8Kernels {
  SegmentFn (*segments)(int rows_at_once, int nr, int nc);
  uint32_t zero;  // four channels that are 0: 0x80808080 where quads are unsigned, with an offset of 128
  void (*dequantize)(const DequantizeArgs&);
  QuantizeKernels<float> fp32;
  QuantizeKernels<bf16> half;
};
const Int8Kernels& int8_kernels();  // of the active ISA

// What a call has beside the arguments of the fp32 op.
struct Int8Call {
  Tensor w_scale;                 // [O] fp32
  std::optional<Tensor> x_scale;  // one element, or [N] fp32
};

// What accumulators are multiplied with, and what is added.
struct Dequantization {
  std::vector<float> s_x, s_w, bias;  // [N], [O], [O]
};

struct Problem;

// x [N, C, H, W] as quads in this thread's scratch, until its next call: given to `problem`, which has the packed
// weight, the bias and x's sizes already.
void quantize(const Int8Call& call, const Tensor& x, int64_t groups, Problem& problem, Dequantization& out);

}  // namespace pyops::sparse
