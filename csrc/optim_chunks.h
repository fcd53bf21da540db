// Work on many tensors cut into chunks, which all threads share in one parallel region. How it is cut depends on the
// tensors alone, so that sums over chunks are the same for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor.h"

namespace pyops::optim {

struct Chunk {
  int32_t entry;       // or whatever the caller counts
  int64_t begin, end;  // units of it
};

class Chunks {
 public:
  static constexpr int64_t kGrain = 16'384;  // elements that are worth another thread

  // How many elements a chunk should have where there are `total` to work on: few enough that threads end together,
  // so many that a chunk costs nothing.
  static int64_t size_for(int64_t total) { return std::clamp<int64_t>(total / 256, 2 * 1024, 32 * 1024); }

  void clear() {
    chunks_.clear();
    cost_.assign(1, 0);
  }

  // Units 0 … count - 1 of `entry`, which are `elements` together.
  void add(int32_t entry, int64_t count, int64_t elements, int64_t chunk_size) {
    const int64_t step = count ? std::max<int64_t>(1, chunk_size * count / std::max<int64_t>(elements, 1)) : 1;
    for (int64_t begin = 0; begin < count; begin += step) {
      const int64_t end = std::min(begin + step, count);
      chunks_.push_back({entry, begin, end});
      cost_.push_back(cost_.back() + kChunkCost + elements * (end - begin) / count);
    }
  }

  size_t size() const { return chunks_.size(); }
  const Chunk& operator[](size_t i) const { return chunks_[i]; }

  // work(chunk, its index) for every chunk, on threads that get equal shares.
  template <class F>
  void for_each(const F& work) const {
    const int64_t total = cost_.back();
    const auto run = [&](int64_t begin, int64_t end) {
      size_t i = std::lower_bound(cost_.begin(), cost_.end(), begin) - cost_.begin();
      for (; i < chunks_.size() && cost_[i] < end; i++) work(chunks_[i], i);
    };
    if (total <= kGrain)
      run(0, total);
    else
      torch::stable::parallel_for(0, total, kGrain, run);
  }

 private:
  static constexpr int64_t kChunkCost = 64;  // what a chunk costs beside its elements, in elements

  std::vector<Chunk> chunks_;
  std::vector<int64_t> cost_{0};  // of the chunks before one
};

}  // namespace pyops::optim
