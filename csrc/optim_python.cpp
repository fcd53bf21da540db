// The optimizer table as a Python class: built once, checked against the tensors it points to at every step.
//
// A step over a thousand tensors takes a millisecond; reading four lists of them through the dispatcher takes as long.
// So a table keeps raw pointers and, for each parameter, what it was built from. `refresh` walks those objects, takes
// the pointers of gradients that moved, and says no if anything else is not what it was.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "optim_table.h"

namespace py = pybind11;

namespace pyops::optim {
namespace {

Operand operand(const py::handle& given) {
  Operand o;
  if (given.is_none()) return o;
  const auto [address, dtype] = given.cast<std::pair<uintptr_t, int>>();
  if (dtype < 0 || dtype > int(Dtype::u8)) throw std::invalid_argument("dtype is unknown");
  o.data = reinterpret_cast<void*>(address);
  o.dtype = static_cast<Dtype>(dtype);
  return o;
}

// A 0-dim tensor on the CPU that counts steps, fp32 or fp64.
struct Counter {
  void* data;
  bool wide;
  double read() const {
    float narrow;
    double value;
    if (wide) return std::memcpy(&value, data, 8), value;
    return std::memcpy(&narrow, data, 4), double(narrow);
  }
  void write(double value) const {
    const float narrow = static_cast<float>(value);
    wide ? std::memcpy(data, &value, 8) : std::memcpy(data, &narrow, 4);
  }
};

// What a parameter must still be for its entry to hold.
struct Watch {
  py::object param, state;
  struct Value {
    py::object key, tensor;
    uintptr_t data;
  };
  std::vector<Value> values;  // of `state`
  uintptr_t param_data;
  int64_t entry;  // -1: a parameter without a gradient
  bool local;     // a DTensor, whose local tensor counts
};

// Methods and names that refresh calls for every parameter.
struct Names {
  py::object tensor = py::module_::import("torch").attr("Tensor");
  py::object data_ptr = tensor.attr("data_ptr");
  py::str grad{"grad"}, local{"_local_tensor"}, params{"params"};
  static const Names& get() {
    static const Names* names = new Names();  // never freed: the interpreter may be gone by then
    return *names;
  }
};

py::object call(const py::object& method, const py::handle& self) {
  PyObject* argument = self.ptr();
  PyObject* result = PyObject_Vectorcall(method.ptr(), &argument, 1, nullptr);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object attribute(const py::handle& self, const py::str& name) {
  PyObject* result = PyObject_GetAttr(self.ptr(), name.ptr());
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

uintptr_t data_of(const py::handle& tensor) {
  return static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(call(Names::get().data_ptr, tensor).ptr()));
}

class PyTable {
 public:
  int64_t add(const std::string& rule, int64_t numel, int64_t row, int64_t stream, const std::vector<int64_t>& sizes,
              const py::list& operands, const std::vector<std::vector<int64_t>>& strides,
              const std::vector<uintptr_t>& scales, const std::vector<std::pair<uintptr_t, bool>>& counters, int group,
              int first) {
    Entry e;
    e.numel = numel, e.row = row, e.stream = stream;
    Operand* all[] = {&e.p, &e.g, &e.state[0], &e.state[1], &e.state[2], &e.ema, &e.mask};
    if (operands.size() != 7 || scales.size() > kMaxStates || counters.size() > kMaxScalars)
      throw std::invalid_argument("operands, scales or counters do not fit an entry");
    for (size_t i = 0; i < 7; i++) *all[i] = operand(operands[i]);
    for (size_t i = 0; i < scales.size(); i++) e.scale[i] = reinterpret_cast<float*>(scales[i]);
    for (int j = 0; j < states_of(rule); j++)
      if (!e.state[j].data && numel) throw std::invalid_argument("rule '" + rule + "' lacks a state");
    std::vector<Counter> own;
    for (const auto& [address, wide] : counters) own.push_back({reinterpret_cast<void*>(address), wide});
    counters_.push_back(own);
    groups_.push_back(group);
    first_.push_back(first);
    return table_.add(e, rule, sizes, strides);
  }

  void watch(py::object param, bool local, py::object state, const py::dict& values, const py::dict& counters,
             int64_t entry) {
    Watch w{param, state, {}, 0, entry, local};
    if (entry >= 0) {
      w.param_data = data_of(tensor_of(w, param));
      for (const py::dict* some : {&values, &counters})
        for (const auto& [key, value] : *some)
          w.values.push_back({py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value),
                              data_of(tensor_of(w, value))});
    }
    watches_.push_back(std::move(w));
  }

  // After the last entry; `state` is the optimizer's, as `refresh` will be given it.
  void cut(const py::dict& state) {
    state_.clear();
    for (const auto& [key, value] : state)
      state_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
    table_.cut();
  }

  // The gradients (of DTensors the local ones), if every parameter of `groups` and its state are the objects that the
  // table was built from, at the same addresses; else None. Whether all have the same sizes, strides and dtypes as well
  // is left to the caller.
  py::object refresh(const py::dict& state, const py::list& groups) {
    size_t at = 0;
    for (const py::handle& group : groups) {
      const py::object params = group[Names::get().params];
      if (!PyList_Check(params.ptr())) return py::none();
      const Py_ssize_t count = PyList_GET_SIZE(params.ptr());
      if (at + count > watches_.size()) return py::none();
      for (Py_ssize_t i = 0; i < count; i++, at++)
        if (PyList_GET_ITEM(params.ptr(), i) != watches_[at].param.ptr()) return py::none();
    }
    if (at != watches_.size() || !same_state(state)) return py::none();
    py::list grads;
    for (const Watch& w : watches_)
      if (!still_valid(w, grads)) return py::none();
    return grads;
  }

  auto chunks() const { return table_.chunks(); }

  double sum_squares() {
    py::gil_scoped_release release;
    return table_.sum_squares();
  }

  // The distinct (group, first, scalars) among the entries, in the order that `step` wants their rows.
  std::vector<std::tuple<int, int, std::vector<double>>> combinations() {
    combinations_.clear();
    which_.resize(table_.entries.size());
    size_t last = 0;
    for (size_t i = 0; i < which_.size(); i++) {
      std::vector<double> values;
      for (const Counter& c : counters_[i]) values.push_back(c.read());
      const auto is = [&](const Combination& c) {
        return std::get<0>(c) == groups_[i] && std::get<1>(c) == first_[i] && std::get<2>(c) == values;
      };
      if (last >= combinations_.size() || !is(combinations_[last])) {
        for (last = 0; last < combinations_.size() && !is(combinations_[last]);) last++;
        if (last == combinations_.size()) combinations_.emplace_back(groups_[i], first_[i], values);
      }
      which_[i] = static_cast<int32_t>(last);
    }
    return combinations_;
  }

  // For another table over the same tensors: which combination each entry is of, where its gradient is now, and the
  // count of a step by new scalars of each combination.
  const std::vector<int32_t>& which() const { return which_; }
  std::vector<uintptr_t> gradients() const {
    std::vector<uintptr_t> found;
    for (const Entry& e : table_.entries) found.push_back(reinterpret_cast<uintptr_t>(e.g.data));
    return found;
  }
  void count(const std::vector<std::vector<double>>& scalars) {
    for (size_t i = 0; i < which_.size(); i++)
      for (size_t j = 0; j < counters_[i].size(); j++) counters_[i][j].write(scalars.at(which_[i]).at(j));
    first_.assign(first_.size(), 0);
  }

  // One step. A row for each combination: c0 … c7, multiplier, decay, l2, threshold, ema_weight, new scalars.
  void step(const std::vector<std::vector<double>>& rows, bool zero_grad, bool stochastic_rounding, uint32_t key) {
    constexpr size_t kFixed = kCoefficients + 5;
    if (rows.size() != combinations_.size() || which_.size() != table_.entries.size())
      throw std::invalid_argument("rows do not fit the combinations");
    std::vector<Scalars> scalars;
    for (size_t i = 0; i < rows.size(); i++) {
      const std::vector<double>& row = rows[i];
      if (row.size() != kFixed + std::get<2>(combinations_[i]).size())
        throw std::invalid_argument("a row is too short");
      Scalars s;
      for (int j = 0; j < kCoefficients; j++) s.c[j] = row[j];
      s.multiplier = row[kCoefficients], s.decay = row[kCoefficients + 1], s.l2 = row[kCoefficients + 2];
      s.threshold = row[kCoefficients + 3], s.ema_weight = row[kCoefficients + 4];
      scalars.push_back(s);
    }
    py::gil_scoped_release release;
    for (size_t i = 0; i < which_.size(); i++)
      for (size_t j = 0; j < counters_[i].size(); j++) counters_[i][j].write(rows[which_[i]][kFixed + j]);
    Options options;
    options.zero_grad = zero_grad, options.stochastic_rounding = stochastic_rounding, options.key = key;
    table_.step(scalars, which_, options);
    first_.assign(first_.size(), 0);
  }

 private:
  using Combination = std::tuple<int, int, std::vector<double>>;

  static py::object tensor_of(const Watch& w, const py::handle& tensor) {
    return w.local && py::hasattr(tensor, Names::get().local) ? attribute(tensor, Names::get().local)
                                                              : py::reinterpret_borrow<py::object>(tensor);
  }

  // The optimizer's state holds the dictionaries that it held. In their order: a look-up would hash every parameter
  // through Python.
  bool same_state(const py::dict& state) const {
    PyObject *key, *value;
    Py_ssize_t position = 0;
    size_t at = 0;
    for (; PyDict_Next(state.ptr(), &position, &key, &value); at++)
      if (at == state_.size() || state_[at].first.ptr() != key || state_[at].second.ptr() != value) return false;
    return at == state_.size();
  }

  bool still_valid(const Watch& w, py::list& grads) {
    const Names& names = Names::get();
    py::object grad = attribute(w.param, names.grad);
    if (grad.is_none() || w.entry < 0) return grad.is_none() && w.entry < 0;
    py::object param = w.param;
    if (w.local) {
      if (!py::hasattr(grad, names.local)) return false;
      grad = attribute(grad, names.local);
      param = attribute(param, names.local);
    }
    if (data_of(param) != w.param_data) return false;
    for (const Watch::Value& v : w.values) {
      if (PyDict_GetItemWithError(w.state.ptr(), v.key.ptr()) != v.tensor.ptr()) return false;
      if (data_of(tensor_of(w, v.tensor)) != v.data) return false;
    }
    table_.entries[w.entry].g.data = reinterpret_cast<void*>(data_of(grad));
    grads.append(std::move(grad));
    return true;
  }

  Table table_;
  std::vector<std::vector<Counter>> counters_;
  std::vector<int> groups_, first_;
  std::vector<Watch> watches_;
  std::vector<std::pair<py::object, py::object>> state_;
  std::vector<Combination> combinations_;
  std::vector<int32_t> which_;
};

}  // namespace

void bind(py::module_& m) {
  m.def("optim_rules", &rule_names, "Names of the update rules that the CPU kernels have");
  py::class_<PyTable>(m, "OptimTable", "Raw pointers to the tensors of an optimizer; see pyops/ops/optim_native.py")
      .def(py::init<>())
      .def("add", &PyTable::add)
      .def("watch", &PyTable::watch)
      .def("cut", &PyTable::cut)
      .def("chunks", &PyTable::chunks)
      .def("refresh", &PyTable::refresh)
      .def("sum_squares", &PyTable::sum_squares)
      .def("combinations", &PyTable::combinations)
      .def("which", &PyTable::which)
      .def("gradients", &PyTable::gradients)
      .def("count", &PyTable::count)
      .def("step", &PyTable::step);
}

}  // namespace pyops::optim
