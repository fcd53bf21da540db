// The launcher of Adafactor; pyops/ops/adafactor.py has the equations, adafactor.inc the kernels.
#include "adafactor.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "adafactor_table.h"
#include "cpu.h"
#include "optim_chunks.h"

#define PYOPS_ISA_FILE "adafactor.inc"
#include "for_each_isa.h"

namespace pyops::adafactor {
namespace {

using optim::Chunk;
using optim::Chunks;
using optim::Dtype;

// Elements a thread that go through all passes together, so that parameters and gradients (2 MiB in fp32) stay in the
// caches. A larger tensor goes through them alone.
constexpr int64_t kTogether = 256 * 1024;

const Kernels& kernels(const Item& item) {
  const Kernels* all = generic::adafactor::kernels;
#if defined(__x86_64__)
  if (active_isa() >= Isa::avx2) all = avx2::adafactor::kernels;
  if (active_isa() >= Isa::avx512) all = avx512::adafactor::kernels;
#endif
  return all[item.e.p.dtype == Dtype::f64];
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles whose sums of columns stay in L2, of so many rows that these sums, which wait in memory for those of the other
// strips, are few beside the elements.
Tiling tiles_of(const Shape& s) {
  constexpr int64_t kMostColumns = 16 * 1024, kFewest = 16 * 1024;
  Tiling t;
  if (s.inner > 1) t.depth = std::clamp<int64_t>(kMostSums / (s.rows + s.columns) / 16 * 16, 16, kBlock);
  t.depth = std::min(t.depth, s.inner);
  t.depths = ceil_div(s.inner, t.depth);
  t.panels = ceil_div(s.columns * t.depth, kMostColumns);
  t.panel = ceil_div(s.columns, t.panels);
  t.panels = ceil_div(s.columns, t.panel);
  t.strip = std::clamp<int64_t>(std::max(s.rows / 256, kFewest / (t.panel * t.depth)), 32, 1024);
  t.strips = ceil_div(s.rows, t.strip);
  t.strip = ceil_div(ceil_div(s.rows, t.strips), 4) * 4;
  t.strips = ceil_div(s.rows, t.strip);
  t.whole = t.strips == 1 && t.panels == 1 && (s.rows + s.columns) * t.depth <= kMostSums;
  return t;
}

double root_mean(double squares, int64_t count) { return std::sqrt(squares / double(count)); }

// A NaN or Inf in p or g reaches p through the update alone, as in torch: these comparisons are false for NaN.
double step_size(const Item& item, double p_squares, double u_squares) {
  const Numbers& n = item.numbers;
  const double scale = root_mean(p_squares, item.e.numel), excess = root_mean(u_squares, item.e.numel) / n.clip;
  return (scale > n.least_scale ? scale : n.least_scale) * n.largest_step / (excess > 1 ? excess : 1);
}

}  // namespace

void Table::add(Item item, const std::vector<int64_t>& sizes, const std::vector<std::vector<int64_t>>& strides) {
  const Shape& s = item.shape;
  if (item.e.state[0].data || !item.e.numel) {
    item.kind = Kind::vector;
  } else if (s.inner == 1 && s.rows * s.columns <= kTiny) {
    item.kind = Kind::tiny;
  } else {
    item.kind = Kind::tiled;
    item.tiling = tiles_of(s);
  }
  item.e.row = item.e.numel;
  numbers_.push_back(sizes);
  item.e.sizes = numbers_.back().data();
  item.e.dim = static_cast<int>(sizes.size());
  optim::Operand* operands[] = {&item.e.p, &item.e.g, &item.e.ema, &item.e.state[0]};
  for (size_t i = 0; i < strides.size() && i < std::size(operands); i++) {
    if (strides[i].empty()) continue;
    numbers_.push_back(strides[i]);
    operands[i]->strides = numbers_.back().data();
  }
  items.push_back(item);
}

void Table::step(const optim::Options& options) {
  int64_t total = 0;
  for (const Item& item : items) total += item.e.numel;
  const int64_t chunk_size = Chunks::size_for(total), together = kTogether * torch::stable::get_num_threads();
  for (size_t begin = 0, end; begin < items.size(); begin = end) {
    int64_t elements = items[begin].e.numel;
    for (end = begin + 1; end < items.size() && elements + items[end].e.numel <= together; end++)
      elements += items[end].e.numel;
    step_some(begin, end, chunk_size, options);
  }
}

void Table::step_some(size_t begin, size_t end, int64_t chunk_size, const optim::Options& options) {
  const size_t count = end - begin;
  Item* some = &items[begin];

  // The sums and means of tiled matrices, of one step only.
  size_t bytes = 0;
  const auto place = [&](void*& to, int64_t elements, char* base) {
    if (base) to = base + bytes;
    bytes += ceil_div(elements, 16) * 16 * sizeof(double);
  };
  const auto place_all = [&](char* base) {
    bytes = 0;
    for (size_t i = 0; i < count; i++) {
      Item& it = some[i];
      const Shape& s = it.shape;
      if (it.kind == Kind::tiled) place(it.inverse, s.outer * s.inner, base);
      if (!it.in_pieces()) continue;
      place(it.row_sums, it.tiling.panels * s.outer * s.rows * s.inner, base);
      place(it.column_sums, it.tiling.strips * s.outer * s.columns * s.inner, base);
    }
  };
  place_all(nullptr);
  const std::unique_ptr<char[]> memory(new char[bytes + 64]);
  place_all(memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64));

  std::vector<double> p_squares(count), u_squares(count);
  const auto add_up = [&](const Chunks& chunks, const auto& work) {
    std::vector<double> sums(chunks.size());
    chunks.for_each([&](const Chunk& c, size_t i) { sums[i] = work(c); });
    return sums;
  };

  // 2i counts the pieces of item i, 2i + 1 the blocks of its parameter.
  Chunks chunks;
  for (size_t i = 0; i < count; i++) {
    const Item& it = some[i];
    chunks.add(static_cast<int32_t>(2 * i), it.pieces(), it.e.numel, chunk_size);
    chunks.add(static_cast<int32_t>(2 * i + 1), it.e.blocks(), it.e.numel, chunk_size);
  }
  std::vector<double> sums = add_up(chunks, [&](const Chunk& c) {
    const Item& it = some[c.entry / 2];
    return c.entry % 2 ? kernels(it).squares(it, c.begin, c.end) : kernels(it).sums(it, c.begin, c.end);
  });
  for (size_t i = 0; i < chunks.size(); i++)
    (chunks[i].entry % 2 ? p_squares : u_squares)[chunks[i].entry / 2] += sums[i];

  chunks.clear();
  for (size_t i = 0; i < count; i++)
    if (some[i].in_pieces()) {
      const Shape& s = some[i].shape;
      chunks.add(static_cast<int32_t>(i), some[i].factor_pieces(), s.outer * (s.rows + s.columns) * s.inner,
                 chunk_size);
    }
  if (chunks.size()) {
    chunks.for_each([&](const Chunk& c, size_t) { kernels(some[c.entry]).factors(some[c.entry], c.begin, c.end); });
    chunks.clear();
    for (size_t i = 0; i < count; i++)
      if (some[i].in_pieces()) chunks.add(static_cast<int32_t>(i), some[i].e.blocks(), some[i].e.numel, chunk_size);
    sums = add_up(chunks,
                  [&](const Chunk& c) { return kernels(some[c.entry]).directions(some[c.entry], c.begin, c.end); });
    for (size_t i = 0; i < chunks.size(); i++) u_squares[chunks[i].entry] += sums[i];
  }

  chunks.clear();
  for (size_t i = 0; i < count; i++) {
    some[i].step_size = step_size(some[i], p_squares[i], u_squares[i]);
    chunks.add(static_cast<int32_t>(i), some[i].e.blocks(), some[i].e.numel, chunk_size);
  }
  chunks.for_each([&](const Chunk& c, size_t) { kernels(some[c.entry]).step(some[c.entry], options, c.begin, c.end); });
}

}  // namespace pyops::adafactor
