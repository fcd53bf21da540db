// A step of Adafactor over many tensors: their memory as a table.
#pragma once

#include <deque>
#include <vector>

#include "adafactor.h"

namespace pyops::adafactor {

class Table {
 public:
  // Adds a tensor; `sizes` and the strides of p, g, the average and the variance are copied. Its gradient may move, and
  // its numbers change from step to step.
  void add(Item item, const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& strides);

  void step(const optim::Options& options);

  std::vector<Item> items;

 private:
  // Items [begin, end), which the caches may keep from pass to pass.
  void step_some(size_t begin, size_t end, int64_t chunk_size, const optim::Options& options);

  std::deque<std::vector<int64_t>> numbers_;  // what Entry::sizes and Operand::strides point to
};

}  // namespace pyops::adafactor
