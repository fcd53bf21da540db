// y[n, o, p] = act(s_x[n] · s_w[o] · Σ over kept (c, t) of q_w[o, c, t] · q_x[n, c, p + t] + bias[o] + residual[n, o,
// p])
//                                                                                (pyops/ops/int8_sparse_conv2d.py)
// The image is quantized to quads (int8_sparse_conv2d.h) of x's memory format, a quarter of its bytes; from there on it
// is the convolution of sparse_conv2d.cpp with other kernels.
#include <algorithm>
#include <cstring>
#include <limits>

#include "quantize_rows.h"
#include "scratch.h"
#include "sparse_conv2d_call.h"
#include "sparse_conv2d_panels.h"

namespace pyops::sparse {
namespace {

constexpr uint32_t kNotFinite = 0x7f800000u;  // bits of the least magnitude that is not finite
constexpr double kCyclesEach = 0.2;           // of an element that is read once

// Images are cut into chunks: a quad of channels where they are planes, else a run of pixels.
template <class T>
class Quantizer {
 public:
  Quantizer(const Problem& p, const T* x, int64_t C, int64_t groups, const float* given, int64_t given_step,
            uint32_t* quads, float* s_x)
      : x(x),
        N(p.N),
        C(C),
        area(p.H * p.W),
        quads_of_pixel(p.w->conv.C),
        channels_last(p.channels_last),
        given(given),
        given_step(given_step),
        out(quads),
        s_x(s_x),
        zero(int8_kernels().zero),
        k(type_kernels<T>(int8_kernels())) {
    const int64_t in_group = C / groups;
    whole = in_group % 4 == 0;
    for (int64_t first = 0; first < C; first += in_group)
      for (int64_t c = 0; c < in_group; c += 4) {
        quad_at.push_back(first + c);
        quad_size.push_back(static_cast<int>(std::min<int64_t>(4, in_group - c)));
        int8_t keep[4] = {};
        std::fill(keep, keep + quad_size.back(), int8_t(-1));
        std::memcpy(&quad_mask.emplace_back(), keep, 4);
      }
    run = channels_last ? std::max<int64_t>(kChunk / std::max<int64_t>(C, 1), 1) : area;
    chunks = channels_last ? (area + run - 1) / run : quads_of_pixel;
  }

  void operator()() {
    if (!C || !area) {
      std::fill(s_x, s_x + N, 0.0f);
      return;
    }
    if (N >= static_cast<int64_t>(torch::stable::get_num_threads()))
      in_parallel(N, double(C * area) * 2 * kCyclesEach, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) quantize_image(n, [](int64_t n, const auto& each) { each(0, n); });
      });
    else
      for (int64_t n = 0; n < N; n++)
        quantize_image(n, [&](int64_t n, const auto& each) {
          in_parallel(n, double(C * area) / std::max<int64_t>(n, 1) * kCyclesEach, each);
        });
  }

 private:
  static constexpr int64_t kChunk = 8192;  // elements of a run, about

  // `cut(n, f)` calls f(begin, end) for all of [0, n), in parallel or not.
  template <class Cut>
  void quantize_image(int64_t n, const Cut& cut) {
    const T* image = x + n * C * area;
    std::vector<uint32_t> bits(chunks, 0);
    float factor = 0;
    s_x[n] = 0;
    if (given) {
      s_x[n] = given[n * given_step];
      factor = 1.0f / s_x[n];
    } else {
      const int64_t all = C * area;
      cut(chunks, [&](int64_t begin, int64_t end) {
        const int64_t from = all * begin / chunks;
        bits[begin] = k.max_bits(image + from, all * end / chunks - from);
      });
      const uint32_t largest = max_of(bits);
      float amax;
      std::memcpy(&amax, &largest, 4);
      if (largest < kNotFinite && amax >= kSmallestAmax) s_x[n] = amax / kInt8Max, factor = kInt8Max / amax;
    }
    cut(chunks, [&](int64_t begin, int64_t end) {
      // Backwards: what the search for the maximum read last is still in the caches.
      for (int64_t i = end; i-- > begin;) {
        const uint32_t read = channels_last ? quantize_run(image, n, i, factor) : quantize_planes(image, n, i, factor);
        if (given) bits[i] = read;
      }
    });
    if (max_of(bits) >= kNotFinite) s_x[n] = std::numeric_limits<float>::quiet_NaN();
  }

  static uint32_t max_of(const std::vector<uint32_t>& bits) {
    return bits.empty() ? 0 : *std::max_element(bits.begin(), bits.end());
  }

  uint32_t quantize_planes(const T* image, int64_t n, int64_t quad, float factor) const {
    PlanesArgs<T> args{{}, {}, area, zero, out + (n * quads_of_pixel + quad) * area};
    for (int j = 0; j < 4; j++) {
      const bool real = j < quad_size[quad];
      args.planes[j] = image + (quad_at[quad] + (real ? j : 0)) * area;
      args.factors[j] = real ? factor : 0.0f;
    }
    return k.planes(args, given);
  }

  uint32_t quantize_run(const T* image, int64_t n, int64_t chunk, float factor) const {
    const int64_t first = chunk * run, pixels = std::min(run, area - first);
    uint32_t* to = out + (n * area + first) * quads_of_pixel;
    if (whole) return k.bytes(image + first * C, pixels * C, factor, zero, given, reinterpret_cast<uint8_t*>(to));
    thread_local Scratch scratch;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch.get(pixels * C + 4));  // 4: a quad is read whole
    const uint32_t read = k.bytes(image + first * C, pixels * C, factor, zero, given, bytes);
    for (int64_t i = 0; i < pixels; i++, bytes += C)
      for (int64_t q = 0; q < quads_of_pixel; q++) {
        uint32_t quad;
        std::memcpy(&quad, bytes + quad_at[q], 4);
        *to++ = (quad & quad_mask[q]) | (zero & ~quad_mask[q]);
      }
    return read;
  }

  const T* x;
  const int64_t N, C, area, quads_of_pixel;
  const bool channels_last;
  const float* given;
  const int64_t given_step;
  uint32_t* out;
  float* s_x;
  const uint32_t zero;
  const QuantizeKernels<T>& k;
  bool whole;  // quads never end within a pixel's group of channels
  int64_t run, chunks;
  std::vector<int64_t> quad_at;  // first channel of each quad
  std::vector<int> quad_size;
  std::vector<uint32_t> quad_mask;
};

Tensor int8_sparse_conv2d_cpu(Tensor x, Tensor values, Tensor w_scale, Tensor crow, Tensor col, Ints shape,
                              std::optional<Tensor> bias, std::optional<Tensor> residual, Ints stride, Ints padding,
                              Ints dilation, int64_t groups, Activation activation, std::optional<Tensor> x_scale,
                              std::optional<Tensor> packed) {
  const Int8Call call{w_scale, x_scale};
  return sparse_conv2d(x, values, crow, col, shape, {1, 4}, bias, residual, stride, padding, dilation, groups,
                       activation, packed, &call);
}

}  // namespace

void quantize(const Int8Call& call, const Tensor& x, int64_t groups, Problem& p, Dequantization& out) {
  thread_local Scratch scratch;
  const auto floats = [](const Tensor& t, int64_t n, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.numel() == n, "int8_sparse_conv2d: ", name,
                    " must be fp32 with ", n, " elements");
    return as_contiguous(t);
  };
  const Conv& c = p.w->conv;
  const Tensor s_w = floats(call.w_scale, c.O, "w_scale");
  const float* given = nullptr;
  Tensor x_scale;
  if (call.x_scale) {
    x_scale = floats(*call.x_scale, call.x_scale->numel() == 1 ? 1 : p.N, "x_scale");
    given = static_cast<const float*>(x_scale.const_data_ptr());
  }
  uint32_t* quads = reinterpret_cast<uint32_t*>(scratch.get(p.N * c.C * p.H * p.W * sizeof(uint32_t)));
  out.s_x.resize(p.N);
  const auto run = [&](const auto* images) {
    Quantizer(p, images, x.size(1), groups, given, given && x_scale.numel() > 1, quads, out.s_x.data())();
  };
  if (x.scalar_type() == ScalarType::Float)
    run(static_cast<const float*>(x.const_data_ptr()));
  else if (x.scalar_type() == ScalarType::BFloat16)
    run(static_cast<const bf16*>(x.const_data_ptr()));
  else
    STD_TORCH_CHECK(false, "int8_sparse_conv2d: x must be fp32 or bf16");
  const float* scales = static_cast<const float*>(s_w.const_data_ptr());
  out.s_w.assign(scales, scales + c.O);
  out.bias = std::move(p.bias);
  p.bias.assign(c.O, 0.0f);
  if (int8_kernels().zero) std::memcpy(p.bias.data(), p.w->starts(), c.O * sizeof(float));
  p.x = quads;
  p.int8 = &out;
}

}  // namespace pyops::sparse

STABLE_TORCH_LIBRARY_IMPL(pyops, CPU, m) {
  m.impl("int8_sparse_conv2d_native", TORCH_BOX(&pyops::sparse::int8_sparse_conv2d_cpu));
}
