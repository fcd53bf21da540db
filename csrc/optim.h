// One optimizer step over many tensors: what the kernels of an ISA are given (pyops/ops/optim.py has the equations).
//
// A tensor is worked on in blocks of at most kBlock elements, small enough that a block of all its operands stays in
// L1: whatever is not already a dense run of the arithmetic's type is widened into scratch there, the rule runs over
// it, and decay, masks, averages and rounding are further passes over the same lines of L1. Memory sees one pass.
#pragma once

#include <cstdint>
#include <vector>

namespace pyops::optim {

enum class Dtype : int8_t { f32, bf16, f16, f64, i8, u8 };

constexpr int kBlock = 1024;      // elements of a block: 4 KiB of fp32 an operand
constexpr int kScaleBlock = 128;  // elements that share a scale of 8-bit state (pyops/ops/optim_codec.py)
constexpr int kMaxStates = 3;     // states of a rule
constexpr int kCoefficients = 8;  // c0, c1, … of a rule
constexpr int kMaxScalars = 2;    // step, mu_product
constexpr int kStreams = 8;       // streams of random bits a parameter has

// One tensor's memory. `strides` (in elements, row-major over Entry::sizes) is null for a dense run in the entry's
// order.
struct Operand {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  const int64_t* strides = nullptr;
};

// A parameter with everything that belongs to it.
struct Entry {
  Operand p, g, state[kMaxStates], ema, mask;  // data is null where there is no such operand
  float* scale[kMaxStates] = {};               // of 8-bit state
  int64_t numel = 0;
  int64_t row = 0;  // elements that blocks do not cross: numel, or those of a slice along dimension 0 for 8-bit state
  int dim = 0;
  const int64_t* sizes = nullptr;
  int64_t stream = 0;  // of random bits

  int64_t blocks_of_row() const { return (row + kBlock - 1) / kBlock; }
  int64_t blocks() const { return numel ? numel / row * blocks_of_row() : 0; }
};

// What one parameter's step depends on besides its elements. Equal for all of a group that took equally many steps.
struct Scalars {
  double c[kCoefficients] = {};
  double multiplier = 1;  // of the gradient: clipping, unscaling, -1 to maximize
  double decay = 1;       // of p, before the rule
  double l2 = 0;          // g += l2·p
  double threshold = 0;   // lr·l1
  double ema_weight = 0;  // ema += weight·(p - ema)
};

struct Options {
  bool zero_grad = false;
  bool stochastic_rounding = false;
  uint32_t key = 0;
};

// Steps blocks [begin, end) of an entry.
using StepFn = void (*)(const Entry&, const Scalars&, const Options&, int64_t begin, int64_t end);
// Adds Σp² and Σu² of blocks [begin, end) to sums[0] and sums[1]; u is the direction of a rule that scales it by norms.
using NormsFn = void (*)(const Entry&, const Scalars&, int64_t begin, int64_t end, double* sums);
// Σg² of blocks [begin, end).
using SquaresFn = double (*)(const Entry&, int64_t begin, int64_t end);

struct RuleKernels {
  const char* name;
  int states;
  StepFn step_float, step_rough, step_double;  // rough: for narrow states, whose rounding is coarser than 14 bits
  NormsFn norms_float, norms_double;           // null for elementwise rules
};

}  // namespace pyops::optim
