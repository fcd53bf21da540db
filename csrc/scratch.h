// Aligned memory that a thread keeps between calls and grows as needed.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "cpu.h"

namespace pyops {

class Scratch {
 public:
  int8_t* get(size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      // From a few hundred KiB on, whole huge pages: the first-level TLB holds 96 of the small ones.
      const size_t page = bytes < kSmall ? 4096 : size_t(2) << 20;
      const size_t rounded = (bytes + page - 1) / page * page;
      data_.reset(static_cast<int8_t*>(std::aligned_alloc(page, rounded)));
      STD_TORCH_CHECK(data_ != nullptr, "pyops: no memory for ", rounded, " bytes of scratch");
      size_ = rounded;
      advise_huge_pages(data_.get(), size_);
    }
    return data_.get();
  }

 private:
  static constexpr size_t kSmall = 192 << 10;
  struct Free {
    void operator()(int8_t* p) const { std::free(p); }
  };
  std::unique_ptr<int8_t[], Free> data_;
  size_t size_ = 0;
};

}  // namespace pyops
