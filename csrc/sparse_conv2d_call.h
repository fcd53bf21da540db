// What the launchers of the sparse convolution share: the problem of a call, its tensors, the run.
#pragma once

#include <vector>

#include "int8_sparse_conv2d.h"
#include "sparse_conv2d_pack.h"

namespace pyops::sparse {

using Ints = std::vector<int64_t>;

// Of the gradient of x: row o of a group is channel cb · bc + j in phase (py, px), with o the number of (cb, py, px,
// j), or of (py, px, cb, j) for channels_last. Channels from `channels` on are none.
struct Phases {
  int64_t sh, sw, blocks, bc, channels;  // blocks and channels of a group
  int64_t rows() const { return sh * sw * blocks * bc; }
};

struct Problem {
  const Packed* w;
  const float* values;
  int64_t N, H, W, OH, OW, top, left;
  const void *x, *residual;
  void* y;
  bool channels_last;
  Activation activation;
  std::vector<float> bias;         // [O]
  const Phases* phases = nullptr;  // if set, y is [N, groups · channels, high, wide], OH × OW the largest phase
  int64_t high = 0, wide = 0;
  // From [O] in fp32 (`wide`) or bf16; null: zeros.
  void set_bias(int32_t O, const void* from, bool wide) {
    bias.assign(O, 0.0f);
    for (int32_t o = 0; from && o < O; o++)
      bias[o] = wide ? static_cast<const float*>(from)[o] : static_cast<float>(static_cast<const bf16*>(from)[o]);
  }
  // x is an image of quads, and bias what int32 accumulators start at. Null: they are not.
  const Dequantization* int8 = nullptr;
};

// The op. `int8`: what the int8 one is called with besides; null: it is the other one.
Tensor sparse_conv2d(Tensor x, Tensor values, Tensor crow, Tensor col, Ints shape, Ints block,
                     std::optional<Tensor> bias, std::optional<Tensor> residual, Ints stride, Ints padding,
                     Ints dilation, int64_t groups, Activation activation, std::optional<Tensor> packed,
                     const Int8Call* int8);

// Of x and y in this dtype, fp32 or bf16; the second with channels as lanes.
void run(const Problem& problem, ScalarType dtype);
void run_channels(const Problem& problem, ScalarType dtype);

// Where pixels are rows of channels that are multiplied by a matrix, the shape of the images does not matter: they
// become one row of pixels.
void join_pixels(Problem& problem, const Conv& conv, const Ints& padding);

// The weight that these arguments describe, its indices unread; the tensors must outlive it.
Weight weight_of(const Tensor& values, const Tensor& crow, const Tensor& col, const Ints& shape, const Ints& block,
                 const Ints& stride, const Ints& dilation, int64_t groups);

// The sizes of a call, input and output, and what a weight is packed for that serves it.
Problem sizes_of(const Conv& conv, const Ints& x_shape, const Ints& padding);
Target target_of(const Problem& problem, const Ints& padding, bool channels_last);

// The values in the order of the packed structure, in scratch that lasts until this thread's next call.
const float* fetch_values(const Weight& w, const Packed& packed);

// [N, C, H, W] that is channels_last and not NCHW too.
bool channels_last(const Tensor& x);
Tensor empty_image(const int64_t (&sizes)[4], ScalarType dtype, bool channels_last);

// The height and width of the output; throws where x, the padding and the weight do not fit.
struct OutputSize {
  int64_t OH, OW;
};
OutputSize output_size(const Conv& c, const Ints& x_shape, const Ints& padding);

}  // namespace pyops::sparse
