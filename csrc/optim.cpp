// The launcher of optimizer steps; pyops/ops/optim.py has the equations, optim.inc the kernels.
#include "optim.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>

#include "cpu.h"
#include "optim_table.h"

#define PYOPS_ISA_FILE "optim.inc"
#include "for_each_isa.h"

namespace pyops::optim {
namespace {

// All kernels that an ISA has.
struct Kernels {
  const RuleKernels* rules;
  SquaresFn squares;
};

Kernels kernels(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return {avx512::optim::rules, &avx512::optim::squares};
  if (isa >= Isa::avx2) return {avx2::optim::rules, &avx2::optim::squares};
#endif
  (void)isa;
  return {generic::optim::rules, &generic::optim::squares};
}

constexpr int kRules = int(std::size(generic::optim::rules));

int index_of(const std::string& rule) {
  for (int i = 0; i < kRules; i++)
    if (rule == generic::optim::rules[i].name) return i;
  throw std::invalid_argument("rule='" + rule + "' is unknown");
}

}  // namespace

std::vector<std::string> rule_names() {
  std::vector<std::string> names;
  for (const RuleKernels& rule : generic::optim::rules) names.push_back(rule.name);
  return names;
}

int states_of(const std::string& rule) { return generic::optim::rules[index_of(rule)].states; }

int64_t Table::add(Entry entry, const std::string& rule, const std::vector<int64_t>& sizes,
                   const std::vector<std::vector<int64_t>>& strides) {
  rules_.push_back(index_of(rule));
  numbers_.push_back(sizes);
  entry.sizes = numbers_.back().data();
  entry.dim = static_cast<int>(sizes.size());
  Operand* operands[] = {&entry.p, &entry.g, &entry.state[0], &entry.state[1], &entry.state[2], &entry.ema};
  for (size_t i = 0; i < strides.size() && i < std::size(operands); i++) {
    if (strides[i].empty()) continue;
    numbers_.push_back(strides[i]);
    operands[i]->strides = numbers_.back().data();
  }
  entries.push_back(entry);
  return static_cast<int64_t>(entries.size()) - 1;
}

void Table::cut() {
  int64_t total = 0;
  for (const Entry& e : entries) total += e.numel;
  chunks_.clear();
  for (size_t i = 0; i < entries.size(); i++)
    chunks_.add(static_cast<int32_t>(i), entries[i].blocks(), entries[i].numel, Chunks::size_for(total));
}

std::vector<std::tuple<int64_t, int64_t, int64_t>> Table::chunks() const {
  std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
  for (size_t i = 0; i < chunks_.size(); i++) {
    const Chunk& c = chunks_[i];
    const Entry& e = entries[c.entry];
    const generic::optim::Block first = generic::optim::block_at(e, c.begin),
                                last = generic::optim::block_at(e, c.end - 1);
    found.emplace_back(c.entry, first.start, last.start + last.n - first.start);
  }
  return found;
}

double Table::sum_squares() {
  const Kernels k = kernels(active_isa());
  std::vector<double> sums(chunks_.size());
  chunks_.for_each([&](const Chunk& c, size_t i) { sums[i] = k.squares(entries[c.entry], c.begin, c.end); });
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

void Table::step(const std::vector<Scalars>& scalars, const std::vector<int32_t>& which, const Options& options) {
  const RuleKernels* rules = kernels(active_isa()).rules;
  const std::vector<Scalars>* used = &scalars;
  const std::vector<int32_t>* index = &which;
  std::vector<Scalars> scaled;
  std::vector<int32_t> own;
  if (std::any_of(rules_.begin(), rules_.end(), [&](int rule) { return rules[rule].norms_float != nullptr; })) {
    scaled = scalars, own = which;
    scale_by_norms(scaled, own);
    used = &scaled, index = &own;
  }
  chunks_.for_each([&](const Chunk& c, size_t) {
    const Entry& e = entries[c.entry];
    const RuleKernels& rule = rules[rules_[c.entry]];
    const bool narrow = e.state[0].data && e.state[0].dtype != Dtype::f32;
    const StepFn run = e.p.dtype == Dtype::f64 ? rule.step_double : narrow ? rule.step_rough : rule.step_float;
    run(e, (*used)[(*index)[c.entry]], options, c.begin, c.end);
  });
}

void Table::scale_by_norms(std::vector<Scalars>& scalars, std::vector<int32_t>& which) {
  const RuleKernels* rules = kernels(active_isa()).rules;
  std::vector<double> sums(2 * chunks_.size());
  chunks_.for_each([&](const Chunk& c, size_t i) {
    const Entry& e = entries[c.entry];
    const RuleKernels& rule = rules[rules_[c.entry]];
    const NormsFn norms = e.p.dtype == Dtype::f64 ? rule.norms_double : rule.norms_float;
    if (norms) norms(e, scalars[which[c.entry]], c.begin, c.end, &sums[2 * i]);
  });
  std::vector<double> of_entry(2 * entries.size());
  for (size_t i = 0; i < chunks_.size(); i++)
    for (int j = 0; j < 2; j++) of_entry[2 * chunks_[i].entry + j] += sums[2 * i + j];
  for (size_t i = 0; i < entries.size(); i++) {
    if (!rules[rules_[i]].norms_float) continue;
    Scalars own = scalars[which[i]];
    const double p = std::sqrt(of_entry[2 * i]), u = std::sqrt(of_entry[2 * i + 1]);
    if (p > 0 && u > 0) own.c[6] *= p / u;
    which[i] = static_cast<int32_t>(scalars.size());
    scalars.push_back(own);
  }
}

}  // namespace pyops::optim
