// The table of Adafactor as a Python class.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "adafactor_table.h"

namespace py = pybind11;

namespace pyops::adafactor {
namespace {

using Address = std::optional<std::pair<uintptr_t, int>>;  // and dtype

optim::Operand operand(const Address& given) {
  optim::Operand o;
  if (!given) return o;
  if (given->second < 0 || given->second > int(optim::Dtype::u8)) throw std::invalid_argument("dtype is unknown");
  o.data = reinterpret_cast<void*>(given->first);
  o.dtype = static_cast<optim::Dtype>(given->second);
  return o;
}

// `operands`: p, g, average, variance, mask, row_var, column_var. `shape`: outer, rows, columns, inner. `epsilon` is
// the eps1 of p's dtype.
void add(Table& table, int64_t numel, int64_t stream, const std::vector<int64_t>& sizes,
         const std::vector<Address>& operands, const std::vector<std::vector<int64_t>>& strides,
         const std::vector<int64_t>& shape, bool transposed, double epsilon) {
  if (operands.size() != 7 || shape.size() != 4) throw std::invalid_argument("operands or shape do not fit an item");
  Item item;
  item.e.numel = numel, item.e.stream = stream;
  item.e.p = operand(operands[0]), item.e.g = operand(operands[1]), item.e.ema = operand(operands[2]);
  item.e.state[0] = operand(operands[3]), item.e.mask = operand(operands[4]);
  item.row_var = operand(operands[5]).data, item.column_var = operand(operands[6]).data;
  item.shape = {shape[0], shape[1], shape[2], shape[3], transposed};
  item.own_epsilon = epsilon;
  if (shape[0] * shape[1] * shape[2] * shape[3] != numel) throw std::invalid_argument("shape does not fit numel");
  if (numel && !item.e.state[0].data && !(item.row_var && item.column_var))
    throw std::invalid_argument("there is neither a variance nor its factors");
  table.add(item, sizes, strides);
}

// One step: of item i with rows[which[i]], in the order of Numbers, and the gradient at grads[i]. Rows without an
// epsilon use each item's own.
void step(Table& table, const std::vector<std::pair<std::optional<double>, std::vector<double>>>& rows,
          const std::vector<int32_t>& which, const std::vector<uintptr_t>& grads, bool zero_grad,
          bool stochastic_rounding, uint32_t key) {
  if (which.size() != table.items.size() || grads.size() != which.size())
    throw std::invalid_argument("which or grads do not fit the items");
  for (size_t i = 0; i < which.size(); i++) {
    const auto& [epsilon, n] = rows.at(which[i]);
    if (n.size() != 8) throw std::invalid_argument("a row is too short");
    Item& item = table.items[i];
    item.numbers = {n[0], n[1], epsilon.value_or(item.own_epsilon), n[2], n[3], n[4], n[5], n[6], n[7]};
    item.e.g.data = reinterpret_cast<void*>(grads[i]);
  }
  optim::Options options;
  options.zero_grad = zero_grad, options.stochastic_rounding = stochastic_rounding, options.key = key;
  py::gil_scoped_release release;
  table.step(options);
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Table>(m, "AdafactorTable",
                    "Raw pointers to the tensors of an optimizer; see pyops/ops/adafactor_native.py")
      .def(py::init<>())
      .def("add", &add)
      .def("step", &step);
}

}  // namespace pyops::adafactor
