// A step over many tensors: their memory as a table, cut once into chunks, run by all threads in one parallel region.
#pragma once

#include <deque>
#include <string>
#include <tuple>
#include <vector>

#include "optim.h"
#include "optim_chunks.h"

namespace pyops::optim {

class Table {
 public:
  // Adds a tensor; `sizes` and the operands' strides are copied. Returns its index.
  int64_t add(Entry entry, const std::string& rule, const std::vector<int64_t>& sizes,
              const std::vector<std::vector<int64_t>>& strides);

  // Cuts the tensors into chunks; to be called once after the last add.
  void cut();

  // Σg² over all tensors, the same for every number of threads.
  double sum_squares();

  // Steps tensor i by scalars[which[i]].
  void step(const std::vector<Scalars>& scalars, const std::vector<int32_t>& which, const Options& options);

  // (entry, its first element, elements) of every chunk in order.
  std::vector<std::tuple<int64_t, int64_t, int64_t>> chunks() const;

  std::vector<Entry> entries;

 private:
  // For entries whose rule scales its direction by norms: c[6] times ‖p‖/‖u‖.
  void scale_by_norms(std::vector<Scalars>& scalars, std::vector<int32_t>& which);

  std::vector<int> rules_;                    // of each entry
  Chunks chunks_;                             // of blocks
  std::deque<std::vector<int64_t>> numbers_;  // what Entry::sizes and Operand::strides point to
};

// The names of the rules, in the order of their kernels.
std::vector<std::string> rule_names();

// The most states that `rule` has. Throws std::invalid_argument for an unknown one.
int states_of(const std::string& rule);

}  // namespace pyops::optim
