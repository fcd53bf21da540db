// The way from the linear layers to their kernels past PyTorch's dispatcher, whose handling of eleven arguments takes
// as long as a small layer. Its answer is None, and nothing is done, for a call that is not plain: tensors that are not
// their memory, or somebody (autograd, a mode, a transform, a trace, the profiler) who has a say in it.
//
// To ask a tensor anything takes 0.05 to 0.1 µs. So what was found out of the tensors of a layer is kept, for as long
// as they are the same objects at the same addresses.
#include <pybind11/pybind11.h>

#include <array>

#include "int4_problem.h"
#include "linear_args.h"

namespace py = pybind11;

namespace pyops::linear {
namespace {

// What is asked of torch and its tensors, looked up once. Never freed: the interpreter may end first.
struct Names {
  static PyObject* of(const py::object& owner, const char* name) {
    return py::object(owner.attr(name)).release().ptr();
  }
  static PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

  py::object torch = py::module_::import("torch"), core = torch.attr("_C"), autograd = torch.attr("autograd");
  PyObject *tensor = of(torch, "Tensor"), *parameter = of(torch.attr("nn"), "Parameter");
  std::array<std::pair<PyObject*, ScalarType>, 5> dtypes{{{of(torch, "float32"), ScalarType::Float},
                                                          {of(torch, "bfloat16"), ScalarType::BFloat16},
                                                          {of(torch, "float16"), ScalarType::Half},
                                                          {of(torch, "uint8"), ScalarType::Byte},
                                                          {of(torch, "int8"), ScalarType::Char}}};
  PyObject *grad_enabled = of(torch, "is_grad_enabled"), *profiling = of(autograd, "_profiler_enabled"),
           *transforming = of(core, "_are_functorch_transforms_active"),
           *dispatch_modes = of(core, "_len_torch_dispatch_stack"),
           *function_modes = of(core, "_len_torch_function_stack"), *tracing = of(core, "_get_tracing_state"),
           *forward_ad = of(autograd, "forward_ad"), *level = interned("_current_level");
  PyObject *is_cpu = interned("is_cpu"), *is_contiguous = interned("is_contiguous"), *is_neg = interned("is_neg"),
           *requires_grad = interned("requires_grad"), *data_ptr = interned("data_ptr"), *numel = interned("numel"),
           *dtype = interned("dtype"), *shape = interned("shape"), *new_empty = interned("new_empty");
};
const Names* names;

py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
py::object call(PyObject* function) { return checked(PyObject_CallNoArgs(function)); }
py::object get(py::handle t, PyObject* name) { return checked(PyObject_GetAttr(t.ptr(), name)); }
py::object ask(py::handle t, PyObject* name) { return checked(PyObject_CallMethodNoArgs(t.ptr(), name)); }
bool is_true(const py::object& answer) { return answer.ptr() == Py_True; }
int64_t number(py::handle n) {
  const int64_t value = PyLong_AsLongLong(n.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Somebody would have to see the op.
bool watched() {
  return is_true(call(names->transforming)) || is_true(call(names->profiling)) || number(call(names->dispatch_modes)) ||
         number(call(names->function_modes)) || !call(names->tracing).is_none() ||
         number(get(names->forward_ad, names->level)) >= 0;
}

bool wants_grad(py::handle t) { return !t.is_none() && is_true(get(t, names->requires_grad)); }
uintptr_t address_of(py::handle t) { return static_cast<uintptr_t>(number(ask(t, names->data_ptr))); }

// The memory of a tensor; nothing of None.
struct Memory {
  uintptr_t at = 0;
  ScalarType type = ScalarType::Float;

  // False if t is not what lies contiguous in the memory of the CPU, or of another type than those above.
  bool find(py::handle t) {
    if (t.is_none()) return true;
    const auto* is = reinterpret_cast<PyObject*>(Py_TYPE(t.ptr()));
    if ((is != names->tensor && is != names->parameter) || !is_true(get(t, names->is_cpu)) ||
        !is_true(ask(t, names->is_contiguous)) || is_true(ask(t, names->is_neg)))
      return false;
    at = address_of(t);
    const py::object dtype = get(t, names->dtype);
    for (const auto& known : names->dtypes)
      if (dtype.ptr() == known.first) {
        type = known.second;
        return at;  // a tensor of zeros may have none
      }
    return false;
  }
  bool is_float() const {
    return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
  }
  template <class T = void>
  const T* as() const {
    return reinterpret_cast<const T*>(at);
  }
};

// A tensor of a layer, and its memory while it is the same. Weakly: a layer may let go of it.
class KeptTensor {
 public:
  bool same(py::handle t) const { return t.is_none() ? !memory.at : held(t) && address_of(t) == memory.at; }

  bool keep(py::handle t) {
    memory = {};
    if (!memory.find(t)) return false;
    elements = t.is_none() ? 0 : number(ask(t, names->numel));
    if (!t.is_none()) reference = checked(PyWeakref_NewRef(t.ptr(), nullptr));
    return true;
  }

  Memory memory;
  int64_t elements = 0;

 private:
  bool held(py::handle t) const {
    if (!reference) return false;
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* object = nullptr;
    PyWeakref_GetRef(reference.ptr(), &object);
    Py_XDECREF(object);
    return object == t.ptr();
#else
    return PyWeakref_GetObject(reference.ptr()) == t.ptr();
#endif
  }

  py::object reference;
};

// The layer's side of a call: what its kernel is told beside the rows, kept for as long as that stays so.
template <class Problem, size_t kTensors>
class Layer {
 public:
  using Given = std::array<py::handle, kTensors>;  // the bias first; what is not there is None
  using Kept = std::array<KeptTensor, kTensors>;
  struct Settings {
    int64_t N, K;
    std::array<int64_t, 2> own;  // of this kind of layer

    bool operator==(const Settings& s) const { return N == s.N && K == s.K && own == s.own; }
  };

  // `load(kept, p)` tells p of the layer's own tensors; false if they are not what the settings ask for.
  template <class Load, class Kernel>
  py::object run(py::handle x, const Given& given, const Settings& wanted, const char* activation, const Load& load,
                 const Kernel& kernel) {
    Memory rows;
    if (watched() || !rows.find(x) || !rows.is_float() || !rows.at) return py::none();
    if (is_true(call(names->grad_enabled)) && (wants_grad(x) || wants_grad(given[0]))) return py::none();
    const py::object shape = get(x, names->shape);
    const py::ssize_t last = PyTuple_GET_SIZE(shape.ptr()) - 1;
    if (last < 0 || number(PyTuple_GET_ITEM(shape.ptr(), last)) != wanted.K) return py::none();
    if (!(wanted == settings && same(given)) && !keep(given, wanted, load)) return py::none();
    Problem p = problem;
    p.M = 1;
    py::tuple sizes(last + 1);
    for (py::ssize_t i = 0; i < last; i++) {
      const py::handle size = PyTuple_GET_ITEM(shape.ptr(), i);
      p.M *= number(size);
      sizes[i] = size;
    }
    sizes[last] = p.N;
    if (p.M == 0) return py::none();
    py::object y = checked(PyObject_CallMethodOneArg(x.ptr(), names->new_empty, sizes.ptr()));
    p.x = rows.as(), p.x_type = rows.type;
    p.y = reinterpret_cast<void*>(address_of(y));
    p.activation = parse_activation(activation);
    {
      py::gil_scoped_release released;
      kernel(p);
    }
    return y;
  }

 private:
  bool same(const Given& given) const {
    for (size_t i = 0; i < kTensors; i++)
      if (!tensors[i].same(given[i])) return false;
    return true;
  }

  template <class Load>
  bool keep(const Given& given, const Settings& wanted, const Load& load) {
    settings = {};  // until all is well
    for (size_t i = 0; i < kTensors; i++)
      if (!tensors[i].keep(given[i])) return false;
    const KeptTensor& bias = tensors[0];
    problem = {};
    problem.N = wanted.N, problem.K = wanted.K;
    problem.packed = true;
    problem.bias = bias.memory.as(), problem.bias_type = bias.memory.type;
    if (wanted.N < 1 || wanted.K < 1 || !bias.memory.is_float() || (bias.memory.at && bias.elements != wanted.N) ||
        !load(tensors, problem))
      return false;
    settings = wanted;
    return true;
  }

  Settings settings{};
  Kept tensors;
  Problem problem{};
};

bool is_fp32(const KeptTensor& t, int64_t elements) {
  return t.memory.at && t.memory.type == ScalarType::Float && t.elements == elements;
}

class Int8Layer : Layer<Int8Problem, 5> {
 public:
  py::object operator()(py::handle x, py::handle weight, py::handle w_scale, py::handle bias, py::handle x_scale,
                        py::handle smooth, int64_t N, int64_t K, const char* activation, bool weight_only) {
    const auto load = [](const Kept& t, Int8Problem& p) {
      const auto& [bias, weight, w_scale, x_scale, smooth] = t;
      if (p.K > kMaxInt8K || weight.memory.type != ScalarType::Char ||
          weight.elements != panels_of(p.N) * panel_bytes((p.K + 63) / 64) || !is_fp32(w_scale, p.N) ||
          !(is_fp32(x_scale, 1) || !x_scale.memory.at) || !(is_fp32(smooth, p.K) || !smooth.memory.at))
        return false;
      p.weight = weight.memory.as<int8_t>();
      p.w_scale = w_scale.memory.as<float>();
      p.x_scale = x_scale.memory.as<float>(), p.x_scales = x_scale.memory.at ? 1 : 0;
      p.smooth = smooth.memory.as<float>();
      return true;
    };
    return run(x, {bias, weight, w_scale, x_scale, smooth}, {N, K, {}}, activation, load,
               weight_only ? run_int8_weight_linear : run_int8_linear);
  }
};

class Int4Layer : Layer<Int4Problem, 4> {
 public:
  py::object operator()(py::handle x, py::handle weight, py::handle w_scale, py::handle w_zero, py::handle bias,
                        int64_t N, int64_t K, const char* activation, int64_t group_size, const char* compute) {
    const auto load = [&](const Kept& t, Int4Problem& p) {
      const auto& [bias, weight, w_scale, w_zero] = t;
      if (p.K > kMaxInt4K || !is_group_size(group_size)) return false;
      set_groups(group_size, p);
      const int64_t scales = panels_of(p.N) * p.padded_groups() * kPanelN;
      if (weight.memory.type != ScalarType::Byte || weight.elements != panels_of(p.N) * int4_panel_bytes(p.k64()) ||
          !w_scale.memory.is_float() || w_scale.elements != scales ||
          (w_zero.memory.at && (w_zero.memory.type != ScalarType::Byte || w_zero.elements != scales)))
        return false;
      p.weight = weight.memory.as<uint8_t>();
      p.scale = w_scale.memory.as(), p.scale_type = w_scale.memory.type;
      p.zero = w_zero.memory.as<uint8_t>();
      return true;
    };
    const Compute how = parse_compute(compute);
    return run(x, {bias, weight, w_scale, w_zero}, {N, K, {group_size}}, activation, load,
               [how](const Int4Problem& p) { run_int4_linear(p, how); });
  }
};

}  // namespace

void bind(py::module_& m) {
  names = new Names;
  py::class_<Int8Layer>(m, "Int8Layer", "int8_linear and int8_weight_linear by a packed weight")
      .def(py::init())
      .def("__call__", &Int8Layer::operator(), "y, or None if the call is not plain");
  py::class_<Int4Layer>(m, "Int4Layer", "int4_linear by a packed weight")
      .def(py::init())
      .def("__call__", &Int4Layer::operator(), "y, or None if the call is not plain");
}

}  // namespace pyops::linear
